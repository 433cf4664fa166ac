"""photos/fill.py: photos filled with a stub and with tiny networks, whatever the batch; pictures of the steps."""

from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.data import chelsea
from tiny_networks import DECODING, SIZE, transformer, vqgan

from maskgit.classical import smooth_rim
from maskgit.completion import InpaintingResult, sample_seed
from maskgit.data import GREY, to_uint8
from maskgit.decoding_config import DecodingConfig
from maskgit.inpainter import Inpainter
from maskgit.masks import composite
from maskgit.pyramid import fill_picture
from photos import fill
from photos.crops import crop_regions
from photos.fill import Filling, StepPictures, fill_photo, region_seed
from photos.photo import read_photo
from utils import finish, mix

CAT = Image.fromarray(chelsea())  # 451x300
HOLE = np.zeros((300, 451), dtype=bool)
HOLE[100:140, 120:180] = HOLE[200:210, 300:330] = True
MASK = Image.fromarray(np.where(HOLE, 0, 255).astype(np.uint8))
squares = partial(fill_photo, tiling="squares")


@pytest.fixture(scope="module")
def inpainter() -> Inpainter:
    torch.manual_seed(1)
    return Inpainter(vqgan(), transformer(), DECODING, "cpu")


class Stub:
    """An Inpainter whose decoder paints `colour` in the hole and is `bias` off everywhere else."""

    size, decoding = 16, DecodingConfig(total_iter=2, sweet_spot=2)

    def __init__(self, colour=200, bias=0):
        self.colour, self.bias, self.asked = colour, bias, {}

    def paint(self, images, hole, pre_fill):
        return None

    def steps(self, images, hole, seeds, **options):
        self.asked = {"seeds": seeds, **options}
        yield from ()
        raw = to_uint8((images.float() + self.bias) / 255).masked_fill(hole, self.colour)
        nothing = torch.zeros(len(images), 1)
        return InpaintingResult(composite(raw, images, hole), raw, nothing, nothing, nothing)


def states(filling: Filling) -> list:
    return list(filling.steps())


# --- the pixels ---


@pytest.mark.parametrize("box", [(0, 0, 5, 7), (446, 293, 5, 7), (200, 0, 9, 300), (0, 100, 451, 20), (0, 0, 300, 300)])
def test_known_pixels_stay_and_the_whole_hole_is_filled(box):
    photo = read_photo(CAT, box=box)
    before = photo.pixels.copy()
    (pixels,), notes = squares(Stub(), photo)
    assert pixels.dtype == np.uint8 and pixels.shape == before.shape
    assert np.array_equal(photo.pixels, before) and np.array_equal(pixels[~photo.hole], before[~photo.hole])
    assert abs(pixels[photo.hole].mean() - 200) < 25  # Lanczos overshoots in narrow holes
    assert bool(notes) == (max(box[2:]) > 8)


def test_the_rim_of_a_shrunken_square_is_smooth_at_the_scale_of_the_photo():
    """Once: what is brought up has not been smoothed before."""
    photo = read_photo(CAT, box=(100, 100, 90, 70))
    stub = Stub(bias=20)
    plain, smooth = (squares(stub, photo, decoding=DecodingConfig(rim=rim))[0][0] for rim in (0.0, 0.5))
    assert stub.asked["decoding"].rim == 0 and not np.array_equal(plain, smooth)
    assert np.array_equal(smooth, smooth_rim(plain, photo.hole, 0.5))


@pytest.mark.parametrize("size", [(1, 9), (9, 1), (1, 200), (15, 16), (16, 16), (17, 33), (3, 5)])
def test_pictures_of_any_size_even_one_pixel_wide(inpainter, size):
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(256, size=(*size[::-1], 3), dtype=np.uint8))
    hole = np.zeros(size[::-1], dtype=bool)
    hole.flat[[2, -1]] = True
    photo = read_photo(image, mask=Image.fromarray(np.where(hole, 0, 255).astype(np.uint8)))
    for pixels in squares(inpainter, photo, samples=2)[0]:
        assert np.array_equal(pixels[~hole], np.array(image)[~hole])


def test_a_picture_of_the_models_size_is_filled_as_the_inpainter_fills_it(inpainter):
    image = CAT.resize((SIZE, SIZE))
    photo = read_photo(image, box=(3, 4, 7, 6))
    completions, notes = squares(inpainter, photo, seed=3, samples=3, margin=1)
    hole = torch.from_numpy(photo.hole)[None, None]
    images = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    expected = inpainter.complete(images, hole, [3], samples=3, margin=1).images.permute(0, 2, 3, 1).numpy()
    assert np.array_equal(completions, expected) and notes == []


def test_a_completion_depends_neither_on_the_batch_nor_on_the_others(inpainter):
    photo = read_photo(CAT, mask=MASK)
    together, _ = squares(inpainter, photo, seed=5, samples=3, batch_size=64)
    (alone,), _ = squares(inpainter, photo, seed=5)
    for size in (1, 2, 4, 5):
        assert np.array_equal(together, squares(inpainter, photo, seed=5, samples=3, batch_size=size)[0])
    assert np.array_equal(alone, together[0])
    assert not np.array_equal(together[0], together[1]) and not np.array_equal(together[1], together[2])


def test_what_is_painted_in_the_hole_changes_nothing(inpainter):
    painted = Image.fromarray(np.where(HOLE[..., None], 255 - np.array(CAT), np.array(CAT)))
    one, other = (squares(inpainter, read_photo(image, mask=MASK))[0][0] for image in (CAT, painted))
    assert np.array_equal(one, other)


def test_each_region_and_completion_has_a_seed_of_its_own(inpainter):
    assert [region_seed(9, region) for region in (0, 1, 2)] == [9, mix(9, 0, 1), mix(9, 0, 2)]
    seeds = [sample_seed(region_seed(seed, region), k) for seed in (9, 10) for region in range(9) for k in range(6)]
    assert len(set(seeds)) == len(seeds)
    photo = read_photo(CAT, mask=MASK)
    crops = crop_regions(photo.pixels, photo.hole, SIZE)
    filling = Filling(inpainter, photo, seed=9, samples=2)
    states(filling)
    for region, k in ((0, 0), (0, 1), (1, 0), (1, 1)):
        seed = sample_seed(region_seed(9, region), k)
        alone = inpainter.complete(crops.images[region][None], crops.hole[region][None], [seed])
        assert torch.equal(filling.result.tokens[2 * region + k], alone.tokens[0])


def test_the_options_reach_the_inpainter():
    stub, decoding = Stub(), DecodingConfig(total_iter=2, sweet_spot=2, mask_func="square")
    squares(stub, read_photo(CAT, mask=MASK), 9, 1, decoding, margin=2, batch_size=8)
    assert stub.asked == {
        "seeds": [9, mix(9, 0, 1)], "batch_size": 8, "samples": 1, "margin": 2, "decoding": decoding, "painted": None,
    }  # fmt: skip


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_progress_rises_to_one(inpainter, batch_size):
    told = []
    squares(inpainter, read_photo(CAT, mask=MASK), samples=3, batch_size=batch_size, on_step=told.append)
    assert told == sorted(told) and told[-1] == 1 and 0 < told[0] <= 0.25
    assert len(told) == 4 * -(-6 // batch_size)


def test_the_first_guess_is_made_once_a_region(inpainter, monkeypatch):
    painted, paint = [], inpainter.paint
    monkeypatch.setattr(inpainter, "paint", lambda images, *rest: painted.append(len(images)) or paint(images, *rest))
    filling = Filling(inpainter, read_photo(CAT, mask=MASK), samples=3, batch_size=2)
    shown = StepPictures(filling)
    for rows, state in filling.steps():
        shown.add(rows, state)
    filling.completions(), shown.maps()
    assert painted == [2]


def test_windows_fill_at_the_pictures_own_scale_from_coarse_to_fine(inpainter):
    photo, told = read_photo(CAT, mask=MASK), []
    options = {"tiling": "windows", "batch_size": 16}
    completions, notes = fill_photo(inpainter, photo, seed=5, samples=2, on_step=told.append, **options)
    for number, pixels in enumerate(completions):
        assert np.array_equal(pixels[~HOLE], photo.pixels[~HOLE])
        steps = fill_picture(inpainter, photo.pixels, photo.hole, sample_seed(5, number), batch_size=16)
        assert np.array_equal(pixels, finish(steps))
    assert notes == [] and told == sorted(told) and told[-1] == 1 and 0 < told[0] < 0.2
    (flat,), _ = fill_photo(inpainter, photo, seed=5, coarse=False, **options)
    (soft,), _ = fill_photo(inpainter, photo, seed=5, feather=2, **options)
    assert not np.array_equal(flat, completions[0]) and not np.array_equal(soft[~HOLE], photo.pixels[~HOLE])
    with pytest.raises(ValueError, match="unknown tiling 'hexagons', expected one of: windows, squares"):
        fill_photo(inpainter, photo, tiling="hexagons")


def test_a_shrunk_region_meets_known_colours_at_its_rim():
    flat = Image.new("RGB", (200, 150), (120, 120, 120))
    photo = read_photo(flat, box=(60, 40, 80, 60))
    (pixels,), notes = squares(Stub(colour=150, bias=30), photo)
    assert notes == ["the picture: region of 80x60 pixels shrunk 9.4 times; it will look soft"]
    rim, middle = np.abs(pixels[40, 60:140].astype(int) - 120).mean(), pixels[70, 100, 0]
    assert rim < 8 and abs(int(middle) - 150) < 20


def test_notes_on_shrinking():
    assert squares(Stub(), read_photo(CAT, box=(5, 5, 8, 8)))[1] == []
    (one,) = squares(Stub(), read_photo(CAT, box=(5, 5, 20, 10)))[1]
    assert one == "the picture: region of 20x10 pixels shrunk 2.5 times"
    (two,) = squares(Stub(), read_photo(CAT, mask=MASK))[1]
    assert two == "the picture: 2 regions, the largest of 60x40 pixels shrunk 7.5 times; it will look soft"
    (wide,) = squares(Stub(), read_photo(CAT, mask=MASK), context=1.2)[1]
    assert "shrunk 4.5 times" in wide


# --- the steps ---


def shown(inpainter, photo, **options) -> tuple[Filling, StepPictures, list[list[np.ndarray]]]:
    """A filling that is done, its pictures, and those of the completions after every iteration of every batch."""
    filling = Filling(inpainter, photo, **options)
    steps, seen = StepPictures(filling), []
    for rows, state in filling.steps():
        steps.add(rows, state)
        seen.append(steps.pictures())
    return filling, steps, seen


def grey_share(picture: np.ndarray) -> float:
    return (picture == GREY).all(axis=2).mean()


def test_pictures_of_the_steps_show_the_regions_side_by_side_and_less_and_less_grey(inpainter):
    _, steps, seen = shown(inpainter, read_photo(CAT, mask=MASK), samples=3, seed=5)
    assert len(seen) == 4 and all(len(pictures) == 3 for pictures in seen)
    assert seen[0][0].shape == (256, 514, 3)  # two crops of 256, 2 between
    for k in range(3):
        shares = [grey_share(pictures[k]) for pictures in seen]
        assert shares == sorted(shares, reverse=True) and shares[0] > 0.05 and shares[-1] < 0.01
    assert np.array_equal(steps.film(), [pictures[0] for pictures in seen])
    assert np.array_equal(steps.film(3), [pictures[0] for pictures in seen[2:]])
    assert [m.shape[1] for m in steps.maps()] == [514] * 3


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_film_last_pictures_and_maps_do_not_depend_on_the_batch(inpainter, batch_size):
    hole = np.array(HOLE)
    hole[5, 5] = True  # a region of one token, which is done after a step
    photo = read_photo(CAT, mask=Image.fromarray(~hole))
    _, expected, seen = shown(inpainter, photo, samples=2, batch_size=64)
    _, found, own = shown(inpainter, photo, samples=2, batch_size=batch_size)
    assert len(own) > len(seen) == 4 and len(found.film()) == 4
    assert np.array_equal(found.maps(), expected.maps())
    # frames mark what was decided just now: a region that ends early keeps them in its own batch alone
    assert [grey_share(picture) for picture in found.film()] == [grey_share(picture) for picture in expected.film()]


def test_of_many_regions_the_first_are_shown(inpainter, monkeypatch):
    monkeypatch.setattr(fill, "SHOWN", 1)
    photo = read_photo(CAT, mask=MASK)
    filling, steps, seen = shown(inpainter, photo, samples=2, batch_size=3)
    assert seen[-1][0].shape == (256, 256, 3) and steps.maps()[0].shape[1] == 256 and len(steps.film()) == 4
    assert np.array_equal(filling.completions(), squares(inpainter, photo, samples=2)[0])
    assert np.array_equal(seen[3], seen[-1])  # the second batch is of the other region but for one row


def test_further_completions_of_a_hole_that_takes_one_iteration_are_drawn(inpainter):
    photo, decoding = read_photo(CAT, box=(100, 100, 4, 4)), DECODING.changed(total_iter="auto", codes="auto")
    completions, _ = fill_photo(inpainter, photo, 0, 3, decoding)
    (alone,), _ = fill_photo(inpainter, photo, 0, 1, decoding)
    (other,), _ = fill_photo(inpainter, photo, 7, 1, decoding)
    assert np.array_equal(alone, completions[0]) and np.array_equal(alone, other)
    assert len({pixels.tobytes() for pixels in completions}) == 3
