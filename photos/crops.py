"""Squares around the holes of a picture of any size, to a model's size and back.

hole    (H, W) bool       True = missing
owner   (H, W) int        0 where known, else the number 1..r of the hole's region
pixels  (S, S, 3) uint8   of one square
"""

from typing import NamedTuple

import numpy as np
from PIL import Image
from scipy import ndimage

CONTEXT = 2.0  # side of a square / longer side of its region
SLACK = 1.25  # regions close to each other: what is around both is at most so much larger than what is around one
REGIONS = 256  # at most; with more specks than that, those near each other are one
EVERYWHERE = np.ones((3, 3), dtype=bool)  # 8 neighbours


class Square(NamedTuple):
    """In pixels of the picture; it may reach beyond the borders."""

    left: int
    top: int
    side: int


def regions(hole: np.ndarray, size: int, context: float = CONTEXT) -> tuple[list[Square], np.ndarray]:
    """The squares and `owner` of a hole (H, W) with at least one missing and one known pixel.

    A region is a connected part of the hole, or several that are close, or that a square as large as one of theirs
    covers. Its square covers it, is `context` times as large where the picture is, at least `size`, and holds a known
    pixel; it lies inside the picture where the region and `size` fit into one that does.
    """
    labels, count = _connected(hole)
    boxes = [(rows.start, cols.start, rows.stop, cols.stop) for rows, cols in ndimage.find_objects(labels)]
    groups = [[label] for label in range(1, count + 1)]
    _merge(boxes, groups, hole.shape, size, context)
    number = np.zeros(count + 1, dtype=labels.dtype)
    for turn, group in enumerate(groups, start=1):
        number[group] = turn
    squares = []
    for box in boxes:
        middle, side = (box[0] + box[2], box[1] + box[3]), _sides(box, hole.shape, size, context)[1]
        squares.append(_with_context(hole, _place(middle, side, hole.shape)))
    return squares, number[labels]


def _merge(boxes: list[tuple], groups: list[list[int]], shape: tuple[int, int], size: int, context: float) -> None:
    """Puts boxes (top, left, bottom, right) and their groups together, in place, as `regions` says."""

    def one_region(first, second, both) -> bool:
        wanted, sides = zip(*(_sides(box, shape, size, context) for box in (first, second, both)), strict=True)
        return wanted[2] <= SLACK * max(wanted[:2]) or sides[2] <= max(sides[:2])

    count = 0
    while count != len(boxes):  # a pass for each time that a larger box may have come to reach others
        count = len(boxes)
        for one in range(count):
            for other in range(len(boxes) - 1, one, -1):
                both = _union(boxes[one], boxes[other])
                if one_region(boxes[one], boxes[other], both):
                    boxes[one] = both
                    groups[one] += groups.pop(other)
                    del boxes[other]


def _connected(hole: np.ndarray) -> tuple[np.ndarray, int]:
    """owner and count of the connected parts (8 neighbours) of the hole; on ever coarser cells until there are few."""
    cell = 1
    while True:
        rows, cols = (-(-length // cell) for length in hole.shape)
        padded = np.zeros((rows * cell, cols * cell), dtype=bool)
        padded[: hole.shape[0], : hole.shape[1]] = hole
        labels, count = ndimage.label(padded.reshape(rows, cell, cols, cell).any(axis=(1, 3)), EVERYWHERE)
        if count <= REGIONS:
            fine = labels.repeat(cell, axis=0).repeat(cell, axis=1)[: hole.shape[0], : hole.shape[1]]
            return np.where(hole, fine, 0), count
        cell *= 2


def _union(one, other) -> tuple[int, int, int, int]:
    return min(one[0], other[0]), min(one[1], other[1]), max(one[2], other[2]), max(one[3], other[3])


def _sides(box, shape: tuple[int, int], size: int, context: float) -> tuple[int, int]:
    """Of the square around a box: the side that is wanted, and the one that the picture allows."""
    longest = max(box[2] - box[0], box[3] - box[1])
    wanted = max(size, round(context * longest))
    return wanted, max(longest, min(wanted, max(size, min(shape))))


def _place(middle: tuple[int, int], side: int, shape: tuple[int, int]) -> Square:
    """A square of `side` around middle / 2, moved into the picture; centred on the picture where it is too large."""

    def start(doubled: int, length: int) -> int:
        return min(max((doubled - side) // 2, 0), length - side) if side <= length else -((side - length) // 2)

    return Square(start(middle[1], shape[1]), start(middle[0], shape[0]), side)


def _with_context(hole: np.ndarray, square: Square) -> Square:
    """`square`, made larger until it holds a known pixel."""
    while hole[inside(square, hole.shape)].all():
        side = min(2 * square.side, max(hole.shape))
        square = _place((2 * square.top + square.side, 2 * square.left + square.side), side, hole.shape)
    return square


def inside(square: Square, shape: tuple[int, int]) -> tuple[slice, slice]:
    """Rows and columns of the part that lies in the picture."""
    left, top, side = square
    return slice(max(top, 0), min(top + side, shape[0])), slice(max(left, 0), min(left + side, shape[1]))


# --- to the model's size and back ---


def crop(array: np.ndarray, square: Square) -> np.ndarray:
    """The square of a picture's array (H, W, ...), mirrored where it reaches beyond: (side, side, ...)."""
    (left, top, side), (height, width) = square, array.shape[:2]
    rows, cols = inside(square, array.shape[:2])
    beyond = (max(-top, 0), max(top + side - height, 0)), (max(-left, 0), max(left + side - width, 0))
    return np.pad(array[rows, cols], [*beyond, (0, 0)][: array.ndim], mode="symmetric")


def shrink(pixels: np.ndarray, hole: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """A square's pixels and hole (side, side) at a `size` that is no larger; what they are where the sizes are equal.

    A pixel that touches the hole is hole; no colour leaks out of the hole.
    """
    side = len(hole)
    if side == size:
        return pixels, hole
    _, nearest = ndimage.distance_transform_edt(hole, return_indices=True)
    small = Image.fromarray(pixels[tuple(nearest)]).resize((size, size), Image.Resampling.LANCZOS)
    first = np.arange(size) * side // size  # of the pixels that a small one touches
    past = -(-np.arange(1, size + 1) * side // size)
    sums = np.pad(hole.cumsum(axis=0).cumsum(axis=1), ((1, 0), (1, 0)))
    rows = sums[past] - sums[first]
    return np.asarray(small), rows[:, past] > rows[:, first]


def fit_rim(filled: np.ndarray, raw: np.ndarray, hole: np.ndarray, reach: float = 3.0) -> np.ndarray:
    """filled, in whose hole the decoder's mean error on the known pixels near by is taken away, less so inwards.

    filled and raw (S, S, 3) uint8 as of `Filled`; hole (S, S); `reach` in pixels, for a fall to 1/e.
    """
    known = (~hole)[..., None].astype(float)
    blurred = [ndimage.gaussian_filter(x, (1.5, 1.5, 0)) for x in (known * (filled.astype(float) - raw), known)]
    error = blurred[0] / np.maximum(blurred[1], 1e-3)
    fade = np.exp(-ndimage.distance_transform_edt(hole) / reach)[..., None]
    corrected = (filled + error * fade).round().clip(0, 255).astype(np.uint8)
    return np.where(hole[..., None], corrected, filled)
