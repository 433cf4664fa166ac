"""photos/crops.py: regions of any hole and the boxes around them, crops, shrinking, the rim, pasting back."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from scipy import ndimage

from maskgit.data import resize_pair
from photos import crops
from photos.crops import CropBox, crop, crop_regions, fit_rim, inside, paste_crops, regions

SIZE = 8
shapes = st.tuples(st.integers(1, 40), st.integers(1, 40))


def boxed(shape, *boxes) -> np.ndarray:
    """A hole of the boxes (top, left, bottom, right)."""
    hole = np.zeros(shape, dtype=bool)
    for top, left, bottom, right in boxes:
        hole[top:bottom, left:right] = True
    return hole


@st.composite
def holes(draw) -> np.ndarray:
    """Of any shape down to 1x1's neighbours: noise, or a few boxes; neither empty nor full."""
    height, width = draw(shapes.filter(lambda shape: shape != (1, 1)))
    if draw(st.booleans()):
        hole = draw(arrays(bool, (height, width)))
    else:
        corners = st.tuples(st.integers(0, height - 1), st.integers(0, width - 1))
        ends = [
            (*draw(corners), draw(st.integers(1, 20)), draw(st.integers(1, 20))) for _ in range(draw(st.integers(1, 4)))
        ]
        hole = boxed((height, width), *((top, left, top + rows, left + cols) for top, left, rows, cols in ends))
    if not hole.any():
        hole[draw(st.integers(0, height - 1)), draw(st.integers(0, width - 1))] = True
    if hole.all():
        hole[0, 0] = False
        hole[-1, -1] = True
    return hole


def extent(owner: np.ndarray, number: int) -> tuple[int, int, int, int]:
    """(top, left, bottom, right) of a region."""
    rows, cols = np.nonzero(owner == number)
    return rows.min(), cols.min(), rows.max() + 1, cols.max() + 1


@settings(max_examples=300, deadline=None)
@given(hole=holes(), size=st.integers(1, 50), context=st.floats(1, 4))
@example(hole=boxed((100, 300), (0, 0, 100, 100)), size=8, context=2.0)  # the box at first holds no known pixel
@example(hole=boxed((1, 30), (0, 3, 1, 29)), size=8, context=2.0)
def test_every_hole_pixel_is_of_one_region_and_every_region_inside_its_box(hole, size, context):
    found, owner = regions(hole, size, context)
    assert np.array_equal(owner > 0, hole) and set(np.unique(owner)) - {0} == set(range(1, len(found) + 1))
    for number, box in enumerate(found, start=1):
        top, left, bottom, right = extent(owner, number)
        assert box.left <= left and box.top <= top
        assert box.left + box.side >= right and box.top + box.side >= bottom
        assert box.side >= size
        longest, room = max(bottom - top, right - left), min(hole.shape)
        part = hole[inside(box, hole.shape)]
        assert not part.all()
        allowed = max(longest, min(max(size, round(context * longest)), max(size, room)))
        middle = (top + bottom, left + right)
        if hole[inside(crops.place(middle, allowed, hole.shape), hole.shape)].all():
            assert allowed < box.side <= max(hole.shape)  # larger for want of a known pixel
        else:
            assert box.side == allowed
        if box.side <= room:
            assert part.shape == (box.side, box.side)
        for start, length in ((box.left, hole.shape[1]), (box.top, hole.shape[0])):
            if start < 0 or start + box.side > length:
                assert abs(2 * start + box.side - length) <= 1  # as much beyond on either side


@settings(max_examples=100, deadline=None)
@given(hole=holes())
def test_touching_pixels_are_of_one_region(hole):
    _, owner = regions(hole, SIZE)
    labels, count = ndimage.label(hole, np.ones((3, 3)))
    for label in range(1, count + 1):
        assert len(np.unique(owner[labels == label])) == 1


def test_regions_far_apart_have_crops_of_their_own_with_context_around():
    hole = boxed((100, 200), (10, 10, 20, 30), (80, 150, 90, 160))
    assert regions(hole, SIZE)[0] == [CropBox(0, 0, 40), CropBox(145, 75, 20)]
    assert regions(hole, SIZE, context=1.5)[0] == [CropBox(5, 0, 30), CropBox(147, 77, 15)]
    assert regions(hole, 64)[0] == [CropBox(0, 0, 64), CropBox(123, 36, 64)]


def test_close_regions_and_those_that_one_box_covers_are_one():
    letters = boxed((100, 200), *((40, x, 50, x + 6) for x in range(20, 120, 10)))
    found = regions(letters, 64)[0]
    assert len(found) == 3 and max(box.side for box in found) <= 64 * crops.SLACK
    pair = boxed((100, 200), (40, 40, 60, 60), (42, 62, 60, 64))
    assert len(regions(pair, SIZE)[0]) == 1
    apart = boxed((100, 200), (40, 40, 60, 60), (42, 90, 60, 110))
    assert len(regions(apart, SIZE)[0]) == 2
    small = boxed((64, 64), (0, 0, 5, 5), (60, 60, 64, 64))
    assert regions(small, 64)[0] == [CropBox(0, 0, 64)]  # a picture of the model's own size


def test_specks_without_number_are_put_together(monkeypatch):
    hole = np.zeros((120, 120), dtype=bool)
    hole[::3, ::3] = True  # 1600 regions
    calls = []
    monkeypatch.setattr(crops, "merge", lambda boxes, *rest: calls.append(len(boxes)))
    found, owner = regions(hole, SIZE)
    assert calls == [len(found)] and len(found) <= crops.REGIONS and np.array_equal(owner > 0, hole)


@settings(max_examples=100, deadline=None)
@given(shape=shapes, left=st.integers(-50, 50), top=st.integers(-50, 50), side=st.integers(1, 120))
def test_a_crop_has_the_pictures_pixels_inside_and_mirrored_ones_beyond(shape, left, top, side):
    height, width = shape
    box = CropBox(left, top, side)
    rows, cols = inside(box, shape)
    if rows.start >= rows.stop or cols.start >= cols.stop:
        return
    picture = np.arange(height * width * 3).reshape(height, width, 3)
    taken = crop(picture, box)
    assert taken.shape == (side, side, 3)
    assert np.array_equal(
        taken[rows.start - top : rows.stop - top, cols.start - left : cols.stop - left], picture[rows, cols]
    )
    assert set(np.unique(taken)) == set(np.unique(picture[rows, cols]))
    assert np.array_equal(crop(picture[..., 0], box), taken[..., 0])


def test_mirroring_starts_at_the_border():
    assert crop(np.array([[1, 2, 3]]), CropBox(-2, -1, 7))[0].tolist() == [2, 1, 1, 2, 3, 3, 2]


@settings(max_examples=100, deadline=None)
@given(side=st.integers(8, 40), data=st.data())
def test_a_small_pixel_that_touches_the_hole_is_hole(side, data):
    hole = data.draw(arrays(bool, (side, side), elements=st.booleans(), fill=st.just(False)))
    hole[0, 0] = False
    _, small = resize_pair(np.zeros((side, side, 3), np.uint8), hole, SIZE)
    for y in range(SIZE):
        for x in range(SIZE):
            rows, cols = np.nonzero(hole)
            # pixel r covers [r, r + 1] / side, and small pixel y [y, y + 1] / SIZE, compared without fractions
            touches = [
                (other * SIZE < (at + 1) * side) & ((other + 1) * SIZE > at * side)
                for other, at in ((rows, y), (cols, x))
            ]
            assert small[y, x] == (touches[0] & touches[1]).any()


@settings(max_examples=50, deadline=None)
@given(side=st.integers(8, 40), seed=st.integers(0, 1000))
def test_what_is_painted_in_the_hole_does_not_reach_the_model(side, seed):
    rng = np.random.default_rng(seed)
    one, other = rng.integers(256, size=(2, side, side, 3), dtype=np.uint8)
    hole = rng.random((side, side)) < 0.4
    hole[0, 0] = False
    other[~hole] = one[~hole]
    first, second = resize_pair(one, hole, SIZE), resize_pair(other, hole, SIZE)
    known = ~first[1]
    assert np.array_equal(first[1], second[1]) and np.array_equal(first[0][known], second[0][known])


def test_crops_of_the_models_size_stay_as_they_are_and_others_are_shrunk_by_lanczos():
    pixels = np.random.default_rng(0).integers(256, size=(SIZE, SIZE, 3), dtype=np.uint8)
    hole = boxed((SIZE, SIZE), (1, 1, 3, 3))
    assert all(map(np.array_equal, resize_pair(pixels, hole, SIZE), (pixels, hole)))
    large = np.asarray(Image.fromarray(pixels).resize((20, 20)))
    expected = Image.fromarray(large).resize((SIZE, SIZE), Image.Resampling.LANCZOS)
    assert np.array_equal(resize_pair(large, np.zeros((20, 20), bool) | False, SIZE)[0], np.asarray(expected))


@pytest.mark.parametrize("bias", [-30, 30])
def test_the_rim_is_moved_to_meet_known_colours_and_the_middle_less(bias):
    truth = np.full((32, 32, 3), 120, np.uint8)
    raw = (truth.astype(int) + bias).astype(np.uint8)
    hole = boxed((32, 32), (8, 8, 24, 24))
    filled = np.where(hole[..., None], raw, truth)
    fitted = fit_rim(filled, raw, hole)
    assert np.array_equal(fitted[~hole], truth[~hole])
    jump = np.abs(fitted[..., 0].astype(int) - 120)
    assert jump[8, 16] < abs(bias) / 3 and jump[16, 16] > abs(bias) / 2
    assert np.array_equal(fit_rim(filled, truth, hole), filled)  # a decoder that knows the known pixels needs nothing


def test_regions_are_pasted_each_from_its_own_crop():
    hole = boxed((300, 451), (100, 120, 140, 180), (200, 300, 210, 330))
    given = np.random.default_rng(0).integers(256, size=(300, 451, 3), dtype=np.uint8)
    before, crops = given.copy(), crop_regions(given, hole, 16)
    images = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
    images[1] = 255
    pixels = paste_crops(given, crops, images, images)
    assert (pixels[100:140, 120:180] == 0).all() and (pixels[200:210, 300:330] == 255).all()
    assert np.array_equal(pixels[~hole], given[~hole]) and np.array_equal(given, before)
