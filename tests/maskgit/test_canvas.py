"""canvas.py and pyramid.py: pictures of any size, filled through windows with tiny networks."""

import numpy as np
import pytest
import torch
from scipy import ndimage
from tiny_networks import CONV, DECODING, GRID, SIZE, noise, transformer, vqgan

from maskgit.canvas import Canvas, mirrored, paint_picture
from maskgit.classical import navier_stokes, smooth_rim
from maskgit.completion import sample_seed
from maskgit.data import to_pixels
from maskgit.inpainter import Inpainter
from maskgit.masks import make_holes, mean_of
from maskgit.pyramid import around_thick_parts, doubled, fill_picture, halved
from utils import finish

PICTURE = np.random.default_rng(1).integers(256, size=(45, 62, 3), dtype=np.uint8)


def filled_by(canvas: Canvas, seed: int = 0, feather: int = 0) -> np.ndarray:
    ways = [canvas, canvas.twin] if canvas.twin else [canvas]
    canvas.render(*([*way.steps(seed)][-1] for way in ways))
    return canvas.paste(canvas.raw, feather)


@pytest.fixture(scope="module")
def inpainter() -> Inpainter:
    torch.manual_seed(1)
    return Inpainter(vqgan(known_width=4, pre_filled=True), transformer(), DECODING.changed(pre_fill=True), "cpu")


def hole_at(*boxes, shape=(45, 62)) -> np.ndarray:
    """boxes: (top, left, bottom, right)."""
    hole = np.zeros(shape, dtype=bool)
    for top, left, bottom, right in boxes:
        hole[top:bottom, left:right] = True
    return hole


# --- one scale ---


@pytest.mark.parametrize("options", [{}, {"codes": "expected"}, {"codes": "mixed"}, {"self_ensemble": True}])
@pytest.mark.parametrize("margin", [0, 1])
def test_a_picture_of_the_models_size_is_filled_as_the_inpainter_does(inpainter, options, margin):
    images, hole, decoding = noise(1, seed=4), make_holes("walk", 1, SIZE), inpainter.decoding.changed(**options)
    expected = inpainter.complete(images, hole, [7], decoding=decoding, margin=margin)
    canvas = Canvas(inpainter, to_pixels(images[0]), hole[0, 0].numpy(), decoding, margin=margin)
    assert np.array_equal(filled_by(canvas, 7), to_pixels(expected.images[0]))


@pytest.mark.parametrize(
    "hole",
    [
        hole_at((0, 0, 5, 7)), hole_at((40, 55, 45, 62)), hole_at((0, 30, 45, 33)), hole_at((20, 20, 21, 21)),
        hole_at((3, 3, 6, 6), (3, 8, 6, 12), (40, 60, 45, 62)), hole_at((0, 0, 45, 40)),
    ],
    ids=str,
)  # fmt: skip
def test_known_pixels_stay_and_all_of_the_hole_is_decoded(inpainter, hole):
    filled = filled_by(Canvas(inpainter, PICTURE, hole))
    assert np.array_equal(filled[~hole], PICTURE[~hole]) and filled.shape == PICTURE.shape
    other = np.where(hole[..., None], 255 - PICTURE, PICTURE)
    assert np.array_equal(filled_by(Canvas(inpainter, other, hole))[hole], filled[hole])  # what is missing is not read


@pytest.mark.parametrize("shape", [(1, 9), (9, 1), (15, 16), (17, 3), (3, 70)])
def test_pictures_smaller_than_the_model_are_filled_too(inpainter, shape):
    hole = np.zeros(shape, dtype=bool)
    hole[0, 0] = True
    pixels = np.random.default_rng(0).integers(256, size=(*shape, 3), dtype=np.uint8)
    filled = filled_by(Canvas(inpainter, pixels, hole))
    assert filled.shape == (*shape, 3) and np.array_equal(filled[~hole], pixels[~hole])
    other = np.where(hole[..., None], 255 - pixels, pixels)
    again = filled_by(Canvas(inpainter, other, hole))
    assert np.array_equal(again, filled) and not np.array_equal(filled[hole], pixels[hole])


def test_beyond_the_border_the_picture_is_mirrored_and_asks_for_no_iterations(inpainter):
    hole = hole_at((3, 3, 5, 5), shape=(10, 11))
    canvas = Canvas(inpainter, PICTURE[:10, :11], hole, inpainter.decoding.changed(total_iter="auto"))
    assert len(list(canvas.steps(0))) == 1 and canvas.windows.shape == (GRID, GRID)
    painted = np.zeros((SIZE, SIZE, 3), dtype=np.uint8)
    canvas.windows.scatter(canvas.painted, painted)
    assert np.array_equal(painted[10:12], painted[8:10][::-1]) and np.array_equal(painted[:, 11], painted[:, 10])


@pytest.mark.parametrize("coarse", [False, True])
def test_a_self_ensemble_fills_a_mirrored_picture_with_the_mirror_image(coarse):
    torch.manual_seed(1)
    inpainter = Inpainter(vqgan(known_width=4), transformer(), DECODING.changed(total_iter=1, codes="expected"), "cpu")
    pixels = np.tile(PICTURE, (2, 2, 1))[:48, :64]  # whole cells at both scales
    hole = hole_at((10, 16, 40, 48), (2, 9, 6, 20), shape=(48, 64))

    def both_ways(ensemble: bool) -> list[np.ndarray]:
        decoding = inpainter.decoding.changed(self_ensemble=ensemble)
        pairs = (pixels, hole), (pixels[:, ::-1].copy(), hole[:, ::-1].copy())
        one, other = (finish(fill_picture(inpainter, *pair, decoding=decoding, coarse=coarse)) for pair in pairs)
        return [one.astype(int), other[:, ::-1].astype(int)]

    one, other = both_ways(True)
    assert np.abs(one - other).max() <= 1  # windows are added in another order
    ways = both_ways(False)
    assert np.abs(ways[0] - ways[1])[hole].mean() > 5
    if not coarse:  # else the guess from the coarser scale is another one
        assert np.abs(one - np.mean(ways, axis=0)).max() <= 1


@pytest.mark.parametrize("shape", [(45, 62), (44, 60), (7, 9)])
@pytest.mark.parametrize("options", [{}, {"token_rule": "majority", "pre_fill": False}])
def test_a_self_ensemble_is_the_mean_with_the_mirrored_picture_whatever_its_size(inpainter, shape, options):
    height, width = shape
    pixels, hole = PICTURE[:height, :width], hole_at((2, 3, 6, 8), (1, 1, 2, 3), shape=shape)
    decoding = inpainter.decoding.changed(**options)
    beyond = [(0, max(SIZE, -(-side // 4) * 4) - side) for side in shape]
    whole, missing = np.pad(pixels, [*beyond, (0, 0)], mode="symmetric"), np.pad(hole, beyond, mode="symmetric")
    painted = mirrored(paint_picture(inpainter, whole, missing, decoding))
    twin = Canvas(inpainter, mirrored(whole), mirrored(missing), decoding, guess=painted)
    ways = filled_by(Canvas(inpainter, pixels, hole, decoding)), mirrored(filled_by(twin))[:height, :width]
    canvas = Canvas(inpainter, pixels, hole, decoding.changed(self_ensemble=True))
    ensemble = filled_by(canvas)
    assert np.abs(ensemble - np.mean(ways, axis=0)).max() <= 0.5
    if not decoding.pre_fill:  # its encoder sees grey
        grey = Canvas(inpainter, mirrored(whole), mirrored(missing), decoding)
        assert torch.equal(canvas.twin.tokens, grey.tokens)
    assert np.array_equal(ensemble[~hole], pixels[~hole]) and np.abs(ways[0].astype(int) - ways[1])[hole].max() > 5


def test_the_mirrored_half_of_a_self_ensemble_is_filled_step_by_step_too(inpainter, monkeypatch):
    calls, predict = [], inpainter.predict
    monkeypatch.setattr(inpainter, "predict", lambda tokens: calls.append(len(tokens)) or predict(tokens))
    decoding, hole, seen = inpainter.decoding.changed(self_ensemble=True), hole_at((10, 10, 30, 40)), []
    steps = fill_picture(inpainter, PICTURE, hole, decoding=decoding, coarse=False)
    finish(steps, lambda step: seen.append((len(calls), step)))
    numbers, shares = [step.state.step for _, step in seen], [step.share for _, step in seen]
    assert numbers == [1, 2, 3, 4] + [4] * 4 and seen[-1][0] == len(calls) > seen[3][0]
    assert shares == sorted(shares) and shares[3] == 0.5 and shares[-1] == 1


def test_raw_of_pictures_of_another_size_is_that_of_the_self_ensemble(inpainter):
    hole = hole_at((10, 10, 20, 40))  # thinner than a window
    both, one = (inpainter(PICTURE, hole, self_ensemble=ensemble) for ensemble in (True, False))
    assert torch.equal(both.images[0][:, hole], both.raw[0][:, hole]) and torch.equal(both.tokens, one.tokens)
    assert (both.raw.int() - one.raw)[0][:, hole].abs().float().mean() > 1


def test_a_painted_image_that_is_given_is_mirrored_with_the_image(inpainter):
    images, hole, painted = noise(2), make_holes("walk", 2, SIZE), noise(2, seed=9)
    decoding = inpainter.decoding.changed(token_rule="majority")
    ways = [(images, hole, painted), (images.flip(-1), hole.flip(-1), painted.flip(-1))]
    one, other = (inpainter.complete(*way[:2], [3, 4], decoding=decoding, painted=way[2]).raw for way in ways)
    both = inpainter.complete(*ways[0][:2], [3, 4], decoding=decoding.changed(self_ensemble=True), painted=painted)
    assert torch.equal(both.raw, mean_of(one, other.flip(-1)))
    assert not torch.equal(one, inpainter.complete(images, hole, [3, 4], decoding=decoding).raw)


def test_windows_far_from_the_hole_are_never_computed(inpainter, monkeypatch):
    seen = []
    predict = inpainter.predict
    monkeypatch.setattr(inpainter, "predict", lambda tokens: seen.append(len(tokens)) or predict(tokens))
    large = np.tile(PICTURE, (6, 6, 1))
    hole = hole_at((100, 100, 104, 104), shape=large.shape[:2])
    canvas = Canvas(inpainter, large, hole, DECODING.changed(total_iter=1))
    filled_by(canvas)
    assert sum(seen) <= 9 and len(canvas.windows.cells) <= (2 * GRID + 1) ** 2 * 4


def test_batches_change_no_completion_and_seeds_do(inpainter):
    hole = hole_at((10, 10, 30, 40))
    filled = filled_by(Canvas(inpainter, PICTURE, hole), 5)
    for batch_size in (1, 5):
        alone = filled_by(Canvas(inpainter, PICTURE, hole, batch_size=batch_size), 5)
        assert np.abs(alone.astype(int) - filled).max() <= 1
    assert not np.array_equal(filled_by(Canvas(inpainter, PICTURE, hole), 6), filled)


def test_feathering_blends_known_pixels_near_the_hole_alone(inpainter):
    hole = hole_at((10, 10, 30, 40))
    canvas = Canvas(inpainter, PICTURE, hole)
    plain, soft = filled_by(canvas), filled_by(canvas, feather=3)
    assert np.array_equal(soft[hole], plain[hole])
    changed = (soft != PICTURE).any(axis=2) & ~hole
    distance = ndimage.distance_transform_edt(~hole)
    assert changed[distance == 1].mean() > 0.9 and not changed[distance > 3].any()
    difference = np.abs(soft.astype(int) - PICTURE).mean(axis=2)
    means = [difference[distance == length].mean() for length in (1, 2, 3)]
    assert means == sorted(means, reverse=True) and means[0] > 2 * means[2]


def test_a_feathered_hole_has_no_smooth_rim(inpainter):
    hole = hole_at((10, 10, 30, 40))
    canvas = Canvas(inpainter, PICTURE, hole)
    filled_by(canvas)
    assert np.array_equal(canvas.paste(canvas.raw, rim=0.5), smooth_rim(canvas.paste(canvas.raw), hole, 0.5))
    assert np.array_equal(canvas.paste(canvas.raw, 3, rim=0.5), canvas.paste(canvas.raw, 3))


def test_states_are_of_the_cells_and_hide_ever_fewer(inpainter):
    canvas = Canvas(inpainter, PICTURE, hole_at((8, 8, 32, 40)))
    counts = [int(state.hidden.sum()) for state in canvas.steps(0)]
    assert len(counts) == 4 and counts == sorted(counts, reverse=True) and counts[-1] == 0
    assert int(canvas.hidden.sum()) == 6 * 8 and canvas.tokens.shape == (1, len(canvas.windows.cells))


def test_without_a_guess_the_hole_is_painted_as_the_inpainter_paints(inpainter):
    hole = hole_at((8, 8, 20, 28), shape=(44, 60))
    canvas = Canvas(inpainter, PICTURE[:44, :60], hole)
    painted = np.zeros((44, 60, 3), dtype=np.uint8)
    canvas.windows.scatter(canvas.painted, painted)
    grey = np.where(hole[..., None], np.uint8(128), PICTURE[:44, :60])
    assert np.array_equal(painted[hole], navier_stokes(grey, hole)[hole])


def test_all_trust_takes_the_codes_of_the_guess_where_it_is_trusted(inpainter):
    hole, guess = hole_at((8, 8, 32, 24), (8, 40, 32, 56)), 255 - PICTURE
    left = hole & hole_at((0, 0, 45, 30))
    canvas = Canvas(inpainter, PICTURE, hole, guess=guess, trusted=left, trust=1e4)
    *_, state = canvas.steps(0)
    cells = canvas.windows.cells[:, 1] < 8
    assert torch.equal(state.tokens[:, cells], canvas.tokens[:, cells])  # those of the painted picture
    assert not torch.equal(state.tokens[:, ~cells], canvas.tokens[:, ~cells])
    *_, free = Canvas(inpainter, PICTURE, hole, guess=guess, trust=1e4).steps(0)
    assert not torch.equal(free.tokens[:, cells], canvas.tokens[:, cells])


def test_an_encoder_that_sees_more_than_a_patch_is_refused():
    conv = Inpainter(vqgan(CONV), transformer(), DECODING, "cpu")
    with pytest.raises(ValueError, match="windows need a VQGAN whose encoder sees each patch alone"):
        Canvas(conv, PICTURE, hole_at((0, 0, 4, 4)))


# --- from coarse to fine ---


def test_halving_takes_the_mean_of_known_pixels_and_doubling_brings_it_back():
    pixels = np.zeros((3, 4, 3), dtype=np.uint8)
    pixels[:2, :2] = np.array([[10, 20], [30, 200]])[..., None]
    smaller, missing = halved(pixels, hole_at((1, 1, 2, 2), shape=(3, 4)))
    assert smaller.shape == (2, 2, 3) and smaller[0, 0].tolist() == [20, 20, 20]
    assert missing.tolist() == [[True, False], [False, False]]
    flat = np.full((3, 5, 3), 77, dtype=np.uint8)
    assert (doubled(halved(flat, np.zeros((3, 5), dtype=bool))[0], (3, 5)) == 77).all()


def test_thick_parts_are_those_that_a_window_does_not_bridge():
    hole = hole_at((5, 5, 8, 190), (60, 60, 65, 65), (100, 10, 120, 30), shape=(200, 200))
    (((rows, columns), thick),) = around_thick_parts(hole, SIZE)
    assert (rows.start, rows.stop, columns.start, columns.stop) == (68, 152, 0, 62)
    assert np.array_equal(thick, hole[rows, columns]) and thick.sum() == 400
    assert around_thick_parts(hole_at((5, 5, 8, 190), shape=(200, 200)), SIZE) == []
    near = hole_at((100, 10, 120, 30), (100, 70, 120, 90), shape=(200, 200))
    assert len(around_thick_parts(near, SIZE)) == 1  # one rectangle for both


@pytest.mark.parametrize("options", [{"coarse": False}, {}])
def test_without_a_coarser_scale_a_picture_of_the_models_size_is_filled_as_the_inpainter_does(inpainter, options):
    images, hole = noise(1, seed=4), make_holes("thin", 1, SIZE)
    expected = inpainter.complete(images, hole, [7]).images[0]
    filled = finish(fill_picture(inpainter, to_pixels(images[0]), hole[0, 0].numpy(), 7, **options))
    assert np.array_equal(filled, to_pixels(expected)) and around_thick_parts(hole[0, 0].numpy(), SIZE) == []


def test_scales_at_which_nothing_is_known_are_left_out(inpainter):
    pixels, hole = np.tile(PICTURE, (3, 3, 1))[:100, :100], np.ones((100, 100), dtype=bool)
    hole[50, 50] = False
    assert {step.level for step in fill_picture(inpainter, pixels, hole)} == {0}


@pytest.mark.parametrize("feather", [-1, SIZE // 2 + 1])
def test_feathers_wider_than_what_windows_see_for_sure_are_refused(inpainter, feather):
    with pytest.raises(ValueError, match=f"feather {feather}: expected 0 to 8 pixels"):
        finish(fill_picture(inpainter, PICTURE, hole_at((3, 3, 6, 6)), feather=feather))


def test_a_thick_hole_is_filled_at_coarser_scales_first(inpainter):
    pixels = np.tile(PICTURE, (4, 4, 1))
    hole = hole_at((60, 60, 110, 120), (3, 3, 6, 6), shape=pixels.shape[:2])
    levels = [step.level for step in fill_picture(inpainter, pixels, hole)]
    filled = finish(fill_picture(inpainter, pixels, hole))
    assert sorted(set(levels), reverse=True) == list(dict.fromkeys(levels)) == [2, 1, 0]
    assert np.array_equal(filled[~hole], pixels[~hole])
    flat = [step.level for step in fill_picture(inpainter, pixels, hole, coarse=False)]
    assert set(flat) == {0}


def test_the_coarse_result_is_the_guess_of_the_finer_scale(inpainter, monkeypatch):
    pixels = np.tile(PICTURE, (4, 4, 1))
    hole = hole_at((60, 60, 80, 82), (3, 3, 6, 6), shape=pixels.shape[:2])
    given = []

    def canvas(*arguments, **options) -> Canvas:
        given.append(options)
        return Canvas(*arguments, **options)

    monkeypatch.setattr("maskgit.pyramid.Canvas", canvas)
    coarse, fine = (step for step in fill_picture(inpainter, pixels, hole) if not step.state.hidden.any())
    assert ["guess" in options for options in given] == [False, True]
    guess, trusted = given[1]["guess"], given[1]["trusted"]  # of what is within a window of the hole
    rough = coarse.canvas.paste(coarse.canvas.raw)
    ((box, thick),) = around_thick_parts(fine.canvas.hole, SIZE)
    assert np.array_equal(guess[box][thick], doubled(rough, thick.shape)[thick])
    thin = fine.canvas.hole.copy()
    thin[box] &= ~thick
    assert np.array_equal(trusted, fine.canvas.hole & ~thin)
    grey = np.where(thin[..., None], np.uint8(128), guess)
    assert thin.any() and np.array_equal(guess[thin], navier_stokes(grey, thin)[thin])


# --- from Python ---


def test_the_inpainter_fills_pictures_of_any_size(inpainter):
    hole = hole_at((8, 8, 30, 40), (40, 2, 43, 60))
    images = torch.from_numpy(np.stack((PICTURE, 255 - PICTURE))).permute(0, 3, 1, 2)
    result = inpainter([PICTURE, 255 - PICTURE], [hole, hole_at()], seed=[3, 4], samples=2, steps=3, margin=1)
    assert result.images.shape == result.raw.shape == (4, 3, 45, 62)
    assert result.tokens.shape == result.confidence.shape == result.hidden.shape == (4, 12 * 16)
    assert torch.equal(result.images[2:], images[1:].expand(2, -1, -1, -1)) and (result.tokens[2:] == -1).all()
    known = torch.from_numpy(~hole)
    assert torch.equal(result.images[0][:, known], images[0][:, known])
    assert torch.equal(result.images[0][:, ~known], result.raw[0][:, ~known])
    for number in range(2):
        options = {"margin": 1, "decoding": inpainter.decoding.changed(total_iter=3)}
        alone = finish(fill_picture(inpainter, PICTURE, hole, sample_seed(3, number), **options))
        assert np.array_equal(to_pixels(result.images[number]), alone)
    hidden = result.hidden[0].view(12, 16)
    assert hidden[2:7, 2:10].all() and (result.tokens[0].view(12, 16)[hidden] >= 0).all()
    assert (result.confidence[0].view(12, 16)[hidden] < 1).any()


def test_tokens_of_known_cells_are_those_of_the_picture_whatever_is_missing(inpainter):
    pixels = np.tile(PICTURE, (3, 3, 1))[:128, :180]
    result = inpainter(pixels, hole_at((70, 90, 74, 98), shape=(128, 180)))
    tokens = inpainter.encode(torch.from_numpy(pixels).permute(2, 0, 1)[None])[0]
    seen = (result.tokens[0] >= 0) & ~result.hidden[0]
    assert 0 < seen.sum() < len(tokens) and torch.equal(result.tokens[0][seen], tokens[seen])


def test_pictures_and_holes_of_other_sizes_are_refused(inpainter):
    with pytest.raises(ValueError, match="images and hole: expected one size, found images 62x45, hole 60x45"):
        inpainter(PICTURE, hole_at(shape=(45, 60)))
    with pytest.raises(ValueError, match="samples: expected at least 1, found 0"):
        inpainter(PICTURE, hole_at((3, 3, 5, 5)), samples=0)
