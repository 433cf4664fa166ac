"""classical.py: each method continues what is around the hole and leaves it alone."""

import numpy as np
import pytest
import torch
from scipy import ndimage
from skimage.data import chelsea

from maskgit import classical
from maskgit.classical import BAND, THIN, biharmonic, fsr_of_thin_parts, navier_stokes, paint, smooth_rim
from maskgit.data import to_pixels
from maskgit.masks import thick_parts


def boxed(size: int = 32) -> torch.Tensor:
    hole = torch.zeros(2, 1, size, size, dtype=torch.bool)
    hole[:, :, 12:18, 12:18] = True
    return hole


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("method", classical.METHODS)
def test_a_flat_image_is_continued(method, workers):
    flat, hole = torch.full((2, 3, 32, 32), 77, dtype=torch.uint8), boxed()
    filled = classical.fill(method, flat.masked_fill(hole, 128), hole, workers)
    assert filled.shape == flat.shape and filled.dtype == torch.uint8
    assert (filled.int() - 77).abs().max() <= 2  # Telea rounds down twice


@pytest.mark.parametrize("method", classical.METHODS)
def test_known_pixels_stay_and_each_image_is_filled_alone(method):
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    hole = boxed()
    hole[1, :, :3, 5:20] = True  # another hole, and at the border
    masked, known = images.masked_fill(hole, 128), ~hole.expand_as(images)
    filled = classical.fill(method, masked, hole)
    assert torch.equal(filled[known], images[known]) and not torch.equal(filled, masked)
    assert torch.equal(classical.fill(method, masked[1:], hole[1:]), filled[1:])


@pytest.mark.parametrize("method", classical.METHODS)
def test_without_a_hole_or_an_image_nothing_happens(method):
    images = torch.full((2, 3, 16, 16), 9, dtype=torch.uint8)
    for count in (2, 0):
        hole = torch.zeros(count, 1, 16, 16, dtype=torch.bool)
        assert torch.equal(classical.fill(method, images[:count], hole), images[:count])


@pytest.mark.parametrize("edge", range(4))
def test_biharmonic_inpainting_continues_a_ramp_to_the_border(edge):
    """scikit-image 0.26 alone gives garbage or an IndexError there, depending on what was in memory."""
    ramp = np.add.outer(3 * np.arange(24), 2 * np.arange(24))[..., None].repeat(3, -1).astype(np.uint8)
    hole = np.ascontiguousarray(np.rot90(np.pad(np.ones((3, 8), bool), ((0, 21), (9, 7))), edge))
    np.full((4096, 64), 1e18)  # what was in memory
    filled = classical.biharmonic(np.where(hole[..., None], np.uint8(128), ramp), hole)
    assert np.abs(filled.astype(int) - ramp)[hole].max() <= 4 and np.array_equal(filled[~hole], ramp[~hole])


def test_what_networks_are_shown_depends_on_known_pixels_alone():
    images, hole = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8), boxed()
    grey, filled = (classical.paint(images, hole, pre_fill) for pre_fill in (False, True))
    assert torch.equal(grey, images.masked_fill(hole, 128))
    assert torch.equal(filled, classical.fill("navier_stokes", grey, hole)) and not torch.equal(filled, grey)
    repainted = torch.where(hole, 255 - images, images)
    assert torch.equal(classical.paint(repainted, hole, True), filled)


def test_an_unknown_method_is_named():
    known = "telea, navier_stokes, biharmonic, fsr"
    with pytest.raises(ValueError, match=f"unknown method 'magic', expected one of: {known}"):
        classical.fill("magic", torch.zeros(1, 3, 8, 8, dtype=torch.uint8), torch.ones(1, 1, 8, 8, dtype=torch.bool))


def test_the_guess_fsr_is_that_of_thin_parts_and_navier_stokes_of_thick_ones():
    pixels = chelsea()[:160, :160]
    hole = np.zeros((160, 160), dtype=bool)
    hole[10:13, 20:140] = hole[60:130, 60:130] = True
    thick = thick_parts(hole, THIN)
    assert np.array_equal(np.argwhere(thick).min(axis=0), (60, 60)) and thick.sum() == 70 * 70
    filled = fsr_of_thin_parts(pixels, hole)
    assert np.array_equal(filled[thick], navier_stokes(pixels, hole)[thick])
    assert np.array_equal(filled[~hole], pixels[~hole])
    thin = hole & ~thick
    guesses = filled, navier_stokes(pixels, hole), np.full_like(pixels, 128)
    errors = [np.abs(guess.astype(int) - pixels)[thin].mean() for guess in guesses]
    assert errors == sorted(errors)
    image = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None]
    missing = torch.from_numpy(hole)[None, None]
    painted = paint(image.masked_fill(missing, 3), missing, True, "fsr")
    assert np.array_equal(to_pixels(painted[0])[thin], filled[thin])


def model_of(pixels: np.ndarray, hole: np.ndarray) -> np.ndarray:
    """`pixels` with a hole full of what a model may make of it: the truth, and noise of its own."""
    noise = np.random.default_rng(0).normal(0, 12, pixels.shape)
    return np.where(hole[..., None], (pixels + noise).round().clip(0, 255), pixels).astype(np.uint8)


def test_a_smooth_rim_is_the_mean_of_two_ways_to_see_it_and_the_model_alone_farther_in():
    pixels = chelsea()[60:124, 100:164]
    hole = np.zeros((64, 64), dtype=bool)
    hole[20:50, 10:40] = hole[5:8, :] = True
    model = model_of(pixels, hole)
    smooth, depth = smooth_rim(model, hole, 0.5), ndimage.distance_transform_edt(hole)
    assert np.array_equal(smooth[~hole], pixels[~hole])
    assert np.array_equal(smooth[depth >= 3], model[depth >= 3])
    solved = biharmonic(model, hole & (depth <= BAND))
    for distance, share in ((1, 0.5), (2, 0.25)):
        at = depth == distance
        mean = (1 - share) * model[at] + share * solved[at]
        assert np.abs(smooth[at] - mean).max() <= 0.5
    errors = [np.abs(filled.astype(int) - pixels)[depth == 1].mean() for filled in (smooth, model, solved)]
    assert errors[0] < min(errors[1:])
    assert np.array_equal(smooth_rim(model, hole, 0), model)


def test_a_rim_is_as_smooth_in_tiles(monkeypatch):
    pixels = np.ascontiguousarray(chelsea()[:200, :150])
    hole = np.zeros((200, 150), dtype=bool)
    for row in range(200):
        hole[row, max(0, row - 60) : max(0, row - 52)] = True
    hole[:60, 90:] = True  # to the border, and tiles without a known pixel
    model = model_of(pixels, hole)
    monkeypatch.setattr(classical, "TILE", 1000)
    whole = smooth_rim(model, hole, 0.5)
    monkeypatch.setattr(classical, "TILE", 24)
    tiles = smooth_rim(model, hole, 0.5)
    assert np.abs(tiles.astype(int) - whole).max() <= 1 and (tiles != model)[hole].any()


def test_rims_are_smooth_where_there_is_something_known():
    hole = torch.zeros(3, 1, 32, 32, dtype=torch.bool)
    hole[0, 0, 8:20, 8:20] = hole[1] = True
    images = torch.stack(
        [torch.from_numpy(model_of(chelsea()[:32, :32], one[0].numpy())).permute(2, 0, 1) for one in hole]
    )
    smooth = classical.smooth_rims(images, hole, 0.5)
    assert not torch.equal(smooth[0], images[0]) and torch.equal(smooth[1:], images[1:])
    assert classical.smooth_rims(images, hole, 0.0) is images


def test_a_tall_picture_is_done_in_strips_that_see_what_is_beside_them(monkeypatch):
    pixels = np.ascontiguousarray(chelsea()[:200, :64])
    hole = np.zeros(pixels.shape[:2], dtype=bool)
    hole[:, 30:33] = True
    whole = fsr_of_thin_parts(pixels, hole)
    monkeypatch.setattr(classical, "STRIP", 70)
    strips = fsr_of_thin_parts(pixels, hole)
    assert np.array_equal(strips[~hole], pixels[~hole]) and strips.shape == pixels.shape
    error, other = (np.abs(filled.astype(int) - pixels)[hole].mean() for filled in (whole, strips))
    assert abs(error - other) < 0.1 * error
