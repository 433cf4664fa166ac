"""masks.py: hole generators, hole -> hidden, schedules, compositing."""

import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.measure import label

from maskgit.masks import FAMILIES, SCHEDULES, composite, make_holes, mean_of, schedule, to_hidden, walk
from utils import ROOT

GRID, N = 16, 256


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- schedules ---


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_schedule_runs_from_exactly_one_down_to_exactly_zero(name, dtype):
    hidden = schedule(name)(torch.linspace(0, 1, 65, dtype=dtype))
    assert hidden[0] == 1 and hidden[-1] == 0
    assert (hidden.diff() < 0).all()
    assert schedule(name)(0.0) == 1 and schedule(name)(1.0) == 0


@pytest.mark.parametrize("name", SCHEDULES)
@given(r=st.floats(0, 1))
@settings(deadline=None, max_examples=30)
def test_schedule_gives_the_same_for_floats_and_tensors(name, r):
    value = schedule(name)(r)
    assert isinstance(value, float) and 0 <= value <= 1
    torch.testing.assert_close(schedule(name)(torch.tensor([r], dtype=torch.float64)).item(), value)


def test_schedules_match_their_formulas():
    formulas = {"cosine": math.cos(math.pi * 0.15), "linear": 0.7, "square": 0.91, "cubic": 0.973}
    for name, value in {**formulas, "sqrt": 1 - math.sqrt(0.3)}.items():
        assert schedule(name)(0.3) == pytest.approx(value, abs=1e-12), name


def test_unknown_schedule_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"'exp'.*cosine, linear, square, cubic, sqrt"):
        schedule("exp")


# --- hole generators ---


@pytest.mark.parametrize("family", FAMILIES)
@given(size=st.integers(8, 96), seed=st.integers(0, 2**32))
@settings(deadline=None, max_examples=15)
def test_a_hole_is_neither_empty_nor_full(family, size, seed):
    hole = FAMILIES[family](size, np.random.default_rng(seed))
    assert hole.shape == (size, size) and hole.dtype == bool
    assert 0 < hole.sum() < size * size


@pytest.mark.parametrize("family", FAMILIES)
def test_hole_i_depends_on_family_seed_and_i_only(family):
    holes = make_holes(family, 5, seed=3)
    assert holes.shape == (5, 1, 64, 64) and holes.dtype == torch.bool
    assert torch.equal(holes[:3], make_holes(family, 3, seed=3))
    if family != "box":
        assert not torch.equal(holes, make_holes(family, 5, seed=4))
        assert len({hole.numpy().tobytes() for hole in holes}) > 1


def test_holes_are_the_same_in_another_process():
    """hash() of a string is salted, so a seed made with it would differ from run to run."""
    code = "from maskgit.masks import make_holes; print(make_holes('walk', 2, 16, 5).int().flatten().tolist())"
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": "77"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout == f"{make_holes('walk', 2, 16, 5).int().flatten().tolist()}\n"


def test_families_do_not_share_their_random_numbers():
    thin, medium = (make_holes(family, 4) for family in ("thin", "medium"))
    assert not torch.equal(thin, medium)


@pytest.mark.parametrize(
    ("family", "low", "high"),
    [("walk", 0.23, 0.27), ("thin", 0.2, 0.38), ("medium", 0.24, 0.34), ("thick", 0.22, 0.38)],
)
def test_share_of_missing_pixels(family, low, high):
    assert low < make_holes(family, 120).float().mean() < high


def test_walk_touches_39_percent_of_the_tokens():
    assert to_hidden(make_holes("walk", 200), GRID).float().mean() == pytest.approx(0.39, abs=0.015)


def test_thicker_families_touch_fewer_tokens_for_their_pixels():
    holes = {family: make_holes(family, 60) for family in ("thin", "medium", "thick")}
    spread = [to_hidden(hole, GRID).float().mean() / hole.float().mean() for hole in holes.values()]
    assert spread[0] > spread[1] > spread[2]


def test_walk_is_one_connected_path():
    for hole in make_holes("walk", 10):
        assert label(hole[0].numpy(), connectivity=1).max() == 1


def test_folded_walk_has_the_distribution_of_the_clipped_walk():
    """Both the area and how often each ring of pixels (border first) is visited, against the walk done step by step."""
    size, count = 12, 1500
    rng = np.random.default_rng(0)
    folded = np.stack([walk(size, rng) for _ in range(count)])
    clipped = np.zeros_like(folded)
    for hole in clipped:
        row, column = rng.integers(size, size=2).tolist()
        hole[row, column] = True
        for move in rng.integers(4, size=size * size).tolist():
            row = min(max(row + (0, 0, 1, -1)[move], 0), size - 1)
            column = min(max(column + (1, -1, 0, 0)[move], 0), size - 1)
            hole[row, column] = True
    depth = np.minimum(np.arange(size), np.arange(size)[::-1])
    ring = np.minimum.outer(depth, depth)
    for r in range(size // 2):
        assert folded[:, ring == r].mean() == pytest.approx(clipped[:, ring == r].mean(), abs=0.025), f"ring {r}"
    areas = [np.quantile(holes.mean(axis=(1, 2)), [0.1, 0.5, 0.9]) for holes in (folded, clipped)]
    np.testing.assert_allclose(*areas, atol=0.025)


def test_box_is_the_centre_32x32():
    hole = make_holes("box", 1)[0, 0]
    assert hole[16:48, 16:48].all() and hole.sum() == 32 * 32


def test_half_takes_each_of_the_four_sides():
    holes = make_holes("half", 40)[:, 0]
    assert (holes.sum(dim=(1, 2)) == 64 * 32).all()
    corners = {(bool(hole[0, 0]), bool(hole[0, -1]), bool(hole[-1, 0]), bool(hole[-1, -1])) for hole in holes}
    left, right, top, bottom = (1, 0, 1, 0), (0, 1, 0, 1), (1, 1, 0, 0), (0, 0, 1, 1)
    assert corners == {left, right, top, bottom}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("blob", 1), "'blob'.*walk, thin, medium, thick, box, half"),
        (("walk", 0), "count 0"),
        (("walk", 1, 4), "size 4"),
        (("walk", 1, 64, -1), "seed -1"),
    ],
)
def test_bad_holes_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_holes(*arguments)


# --- hole -> hidden ---


@given(pixels=st.lists(st.tuples(st.integers(0, 63), st.integers(0, 63)), max_size=20), margin=st.integers(0, 3))
@settings(deadline=None, max_examples=60)
def test_hidden_are_the_touched_tokens_and_their_rings(pixels, margin):
    hole = torch.zeros(1, 1, 64, 64, dtype=torch.bool)
    expected = torch.zeros(GRID, GRID, dtype=torch.bool)
    for y, x in pixels:
        hole[0, 0, y, x] = True
        row, column = y // 4, x // 4
        expected[max(row - margin, 0) : row + margin + 1, max(column - margin, 0) : column + margin + 1] = True
    assert torch.equal(to_hidden(hole, GRID, margin), expected.reshape(1, N))


@given(pixels=st.lists(st.tuples(st.integers(0, 15), st.integers(0, 15)), max_size=200), margin=st.integers(0, 1))
@settings(deadline=None, max_examples=60)
def test_the_majority_rule_hides_tokens_with_more_missing_than_known_pixels(pixels, margin):
    hole = torch.zeros(1, 1, 16, 16, dtype=torch.bool)
    for y, x in pixels:
        hole[0, 0, y, x] = True
    expected = torch.zeros(4, 4, dtype=torch.bool)
    for row in range(4):
        for column in range(4):
            if hole[0, 0, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].sum() > 8:
                expected[max(row - margin, 0) : row + margin + 1, max(column - margin, 0) : column + margin + 1] = True
    assert torch.equal(to_hidden(hole, 4, margin, "majority"), expected.reshape(1, 16))


def test_half_of_a_tokens_pixels_are_no_majority():
    hole = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    hole[..., :2] = True
    assert to_hidden(hole, 1).all() and not to_hidden(hole, 1, rule="majority").any()
    hole[..., 0, 2] = True
    assert to_hidden(hole, 1, rule="majority").all()


def test_to_hidden_treats_each_image_alone():
    hole = make_holes("walk", 4)
    alone = torch.cat([to_hidden(hole[i : i + 1], GRID, margin=1) for i in range(4)])
    assert torch.equal(to_hidden(hole, GRID, margin=1), alone)


def test_to_hidden_at_pixel_grid_is_the_hole():
    hole = make_holes("thin", 2)
    assert torch.equal(to_hidden(hole, 64), hole.reshape(2, 64 * 64))


def test_to_hidden_refuses_what_is_not_a_hole():
    hole = make_holes("box", 2)
    with pytest.raises(TypeError, match="True = missing"):  # a 0/255 mask has the other polarity
        to_hidden(hole.float(), GRID)
    for bad in (hole[0], hole.expand(2, 3, 64, 64)):
        with pytest.raises(ValueError, match="expected"):
            to_hidden(bad, GRID)
    with pytest.raises(ValueError, match="grid 7"):
        to_hidden(hole, 7)
    with pytest.raises(ValueError, match="margin -1"):
        to_hidden(hole, GRID, margin=-1)
    with pytest.raises(ValueError, match="unknown token rule 'most', expected one of: any, majority"):
        to_hidden(hole, GRID, rule="most")


# --- compositing ---


def test_the_mean_of_two_rounds_halves_up_and_changes_neither():
    one, other = torch.meshgrid(*[torch.arange(256, dtype=torch.uint8)] * 2, indexing="ij")
    before = one.clone()
    assert torch.equal(mean_of(one, other), ((one.double() + other.double()) / 2 + 0.5).floor().to(torch.uint8))
    assert torch.equal(one, before)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16])
def test_composite_keeps_known_values_bit_identical(dtype):
    images, filled = (torch.rand(2, 3, 64, 64, generator=generator(i)).mul(255).to(dtype) for i in (1, 2))
    hole = make_holes("walk", 2)
    result = composite(filled, images, hole)
    missing = hole.expand_as(images)
    assert result.dtype == dtype
    assert torch.equal(result[~missing], images[~missing])
    assert torch.equal(result[missing], filled[missing])


def test_composite_is_not_touched_by_nan_outside_the_hole():
    hole = make_holes("box", 1)
    filled = torch.where(hole, 0.5, torch.nan).expand(1, 3, 64, 64)
    assert composite(filled, torch.zeros(1, 3, 64, 64), hole).isfinite().all()


def test_composite_refuses_shapes_and_dtypes_that_differ():
    images, hole = torch.zeros(2, 3, 64, 64), make_holes("box", 2)
    for filled in (images[:1], images.double(), (images * 255).to(torch.uint8)):
        with pytest.raises(ValueError, match="expected the images'"):
            composite(filled, images, hole)
    for bad in (hole[:1], hole[:, 0], hole.float(), hole[..., :32]):
        with pytest.raises(ValueError, match=r"expected torch.bool \(2, 1, 64, 64\)"):
            composite(images, images, bad)
