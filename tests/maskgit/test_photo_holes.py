"""photo_holes.py: holes of photographs, in pictures and in windows."""

import numpy as np
import pytest
import torch
from scipy import ndimage

from maskgit.photo_holes import PHOTO_FAMILIES, photo_hole, window_holes


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
    holes = window_holes(family, 20, 64, seed=1)
    assert holes.shape == (20, 1, 64, 64) and holes.dtype == torch.bool
    assert holes.flatten(1).any(dim=1).all() and not holes.flatten(1).all(dim=1).any()
    assert len(holes.flatten(1).unique(dim=0)) == 20 and 0.02 < holes.float().mean() < 0.5
    assert torch.equal(window_holes(family, 3, 64, seed=1), holes[:3])
    assert not torch.equal(window_holes(family, 3, 64, seed=2), holes[:3])


def test_an_unknown_family_is_named():
    with pytest.raises(ValueError, match="unknown hole family 'dust', expected one of: scratches, text, spots"):
        photo_hole("dust", (64, 64), 0)
    with pytest.raises(ValueError, match="unknown hole family 'walk'"):
        window_holes("walk", 1, 64)


@pytest.mark.parametrize(("family", "shape"), [("scratches", (1, 1)), ("text", (200, 3)), ("objects", (9, 9))])
def test_pictures_that_are_too_small_for_a_family_are_refused(family, shape):
    with pytest.raises(ValueError, match=f"{shape[1]}x{shape[0]} pixels: too small for holes of this family"):
        photo_hole(family, shape, 0)
