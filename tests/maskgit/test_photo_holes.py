"""photo_holes.py: holes of photographs, in pictures and in windows."""

import numpy as np
import pytest
from scipy import ndimage

from maskgit.photo_holes import PHOTO_FAMILIES, photo_hole, window_hole


@pytest.mark.parametrize("family", PHOTO_FAMILIES)
def test_a_hole_depends_on_family_shape_seed_and_number_alone(family):
    hole = photo_hole(family, (90, 140), 3, 1)
    assert hole.shape == (90, 140) and hole.dtype == bool and hole.any() and not hole.all()
    assert np.array_equal(hole, photo_hole(family, (90, 140), 3, 1))
    for other in (photo_hole(family, (90, 140), 4, 1), photo_hole(family, (90, 140), 3, 2)):
        assert not np.array_equal(hole, other)
    assert photo_hole(family, (140, 90), 3, 1).shape == (140, 90)


@pytest.mark.parametrize(
    ("family", "thinnest", "thickest"), [("scratches", 3, 10), ("text", 1, 9), ("spots", 9, 60), ("objects", 30, 110)]
)
def test_holes_are_as_thick_as_they_say(family, thinnest, thickest):
    """Twice the largest distance to a known pixel; crossings, and what overlaps, are thicker."""
    for index in range(6):
        depth = 2 * ndimage.distance_transform_edt(np.pad(photo_hole(family, (321, 481), 0, index), 1)).max()
        assert thinnest <= depth <= thickest


def test_larger_pictures_have_more_of_them():
    shapes = (350, 500), (1400, 2000)
    small, large = (sum(photo_hole("spots", shape, 0, i).sum() for i in range(5)) for shape in shapes)
    assert 10 < large / small < 22


@pytest.mark.parametrize("family", PHOTO_FAMILIES)
def test_a_window_sees_a_part_of_a_hole(family):
    holes = [window_hole(family, 64, np.random.default_rng(seed)) for seed in range(20)]
    assert all(hole.shape == (64, 64) and hole.any() and not hole.all() for hole in holes)
    assert len({hole.tobytes() for hole in holes}) == 20
    assert 0.02 < np.mean(holes) < 0.5


def test_an_unknown_family_is_named():
    with pytest.raises(ValueError, match="unknown hole family 'dust', expected one of: scratches, text, spots"):
        photo_hole("dust", (64, 64), 0)
