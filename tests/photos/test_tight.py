"""tight.py: masks that leave a seam of what is to go, and masks that do not."""

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage
from skimage.data import astronaut, chelsea, coffee

from photos.photo import read_photo
from photos.tight import LEAST, tight_notes, tightness

THING = ndimage.distance_transform_edt(np.pad(np.zeros((1, 1), bool), 40, constant_values=True)) <= 25


def pasted(background: np.ndarray, thing: np.ndarray, top: int, left: int) -> tuple[np.ndarray, np.ndarray]:
    """A disc of one picture, with a soft rim, upon another, and where it is."""
    where = np.zeros(background.shape[:2], dtype=bool)
    where[top : top + len(THING), left : left + len(THING)] = THING
    share = ndimage.gaussian_filter(where.astype(float), 0.8)[..., None]
    other = np.zeros_like(background)
    other[top : top + len(THING), left : left + len(THING)] = thing[60:141, 160:241]
    return (share * other + (1 - share) * background).round().astype(np.uint8), where


@pytest.mark.parametrize(("background", "thing"), [(astronaut, coffee), (coffee, chelsea), (chelsea, astronaut)])
def test_a_seam_of_a_thing_is_found_and_what_lies_under_a_loose_mask_is_not(background, thing):
    found = {}
    for corner in ((10, 10), (150, 200), (200, 80)):
        pixels, where = pasted(background(), thing(), *corner)
        inside, outside = (ndimage.distance_transform_edt(part) for part in (where, ~where))
        for name, hole in (("tight", inside > 2), ("loose", outside <= 4)):
            found.setdefault(name, []).append(tightness(pixels, hole))
        assert tightness(background(), where) < 0.45
    assert np.median(found["tight"]) > 0.45 and max(found["loose"]) < 0.45


def test_the_note_names_the_share_and_what_may_help():
    pixels = np.full((60, 60, 3), 40, np.uint8)
    pixels[20:40, 20:40] = 200
    hole = np.zeros((60, 60), dtype=bool)
    hole[22:38, 22:38] = True
    photo = read_photo(Image.fromarray(pixels), mask=Image.fromarray(np.where(hole, 0, 255).astype(np.uint8)))
    (note,) = tight_notes(photo)
    assert note == (
        "the picture: the hole looks tight, 100% of its rim lies along something sharp; "
        "grown by 3 to 6 pixels (--grow) it may fill better"
    )
    assert tight_notes(read_photo(Image.fromarray(pixels), box=(18, 18, 24, 24))) == []


@pytest.mark.parametrize("shape", [(1, 9), (9, 1), (3, 3), (16, 16)])
def test_too_little_around_a_hole_to_tell(shape):
    hole = np.zeros(shape, dtype=bool)
    hole.flat[0] = True
    noise = np.random.default_rng(0).integers(256, size=(*shape, 3), dtype=np.uint8)
    assert LEAST > 3 and tightness(noise, hole) == tightness(noise, ~hole) == tightness(noise, hole & ~hole) == 0
