"""Square crops around the regions of a hole, in a picture of any size: to the model's size S and back.

hole    (H, W) bool        True = missing
owner   (H, W) int         0 where known, else the number 1..r of the hole's region
pixels  (H, W, 3) uint8    RGB
images  (r, 3, S, S) uint8, their hole (r, 1, S, S) bool: a crop around each region
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from scipy import ndimage
from torch import Tensor

from maskgit.data import resize_pair, to_pixels
from maskgit.masks import EIGHT_NEIGHBOURS

CONTEXT = 2.0  # side of a crop / longer side of its region
SLACK = 1.25  # regions close to each other: what is around both is at most so much larger than what is around one
REGIONS = 256  # at most; with more specks than that, those near each other are one


class CropBox(NamedTuple):
    """A square, in pixels of the picture; it may reach beyond the borders."""

    left: int
    top: int
    side: int


@dataclass(frozen=True, eq=False)
class Crops:
    """What the model sees of a picture whose hole has r regions."""

    boxes: list[CropBox]  # r
    owner: np.ndarray  # (H, W) int
    images: Tensor  # (r, 3, S, S) uint8
    hole: Tensor  # (r, 1, S, S) bool


def regions(hole: np.ndarray, size: int, context: float = CONTEXT) -> tuple[list[CropBox], np.ndarray]:
    """The box of each region and `owner`, of a hole (H, W) with at least one missing and one known pixel.

    A region is a connected part of the hole, or several that are close, or that a box as large as one of theirs
    covers. Its box covers it, is `context` times as large where the picture is, at least `size`, and holds a known
    pixel; it lies inside the picture where the region and `size` fit into one that does.
    """
    labels, count = _connected(hole)
    extents = [(rows.start, cols.start, rows.stop, cols.stop) for rows, cols in ndimage.find_objects(labels)]
    groups = [[label] for label in range(1, count + 1)]
    merge(extents, groups, hole.shape, size, context)
    number = np.zeros(count + 1, dtype=labels.dtype)
    for turn, group in enumerate(groups, start=1):
        number[group] = turn
    boxes = []
    for extent in extents:
        middle, side = (extent[0] + extent[2], extent[1] + extent[3]), _sides(extent, hole.shape, size, context)[1]
        boxes.append(_with_context(hole, place(middle, side, hole.shape)))
    return boxes, number[labels]


def merge(extents: list[tuple], groups: list[list[int]], shape: tuple[int, int], size: int, context: float) -> None:
    """Merges extents (top, left, bottom, right), and the groups of labels inside, in place, as `regions` says."""

    def one_region(first, second, both) -> bool:
        wanted, sides = zip(*(_sides(extent, shape, size, context) for extent in (first, second, both)), strict=True)
        return wanted[2] <= SLACK * max(wanted[:2]) or sides[2] <= max(sides[:2])

    count = 0
    while count != len(extents):  # a pass for each time that a larger one may have come to reach others
        count = len(extents)
        for one in range(count):
            for other in range(len(extents) - 1, one, -1):
                both = _union(extents[one], extents[other])
                if one_region(extents[one], extents[other], both):
                    extents[one] = both
                    groups[one] += groups.pop(other)
                    del extents[other]


def _connected(hole: np.ndarray) -> tuple[np.ndarray, int]:
    """owner and count of the connected parts (8 neighbours) of the hole; on ever coarser cells until there are few."""
    cell = 1
    while True:
        rows, cols = (-(-length // cell) for length in hole.shape)
        padded = np.zeros((rows * cell, cols * cell), dtype=bool)
        padded[: hole.shape[0], : hole.shape[1]] = hole
        labels, count = ndimage.label(padded.reshape(rows, cell, cols, cell).any(axis=(1, 3)), EIGHT_NEIGHBOURS)
        if count <= REGIONS:
            fine = labels.repeat(cell, axis=0).repeat(cell, axis=1)[: hole.shape[0], : hole.shape[1]]
            return np.where(hole, fine, 0), count
        cell *= 2


def _union(one, other) -> tuple[int, int, int, int]:
    return min(one[0], other[0]), min(one[1], other[1]), max(one[2], other[2]), max(one[3], other[3])


def _sides(extent, shape: tuple[int, int], size: int, context: float) -> tuple[int, int]:
    """Of the box around an extent: the side that is wanted, and the one that the picture allows."""
    longest = max(extent[2] - extent[0], extent[3] - extent[1])
    wanted = max(size, round(context * longest))
    return wanted, max(longest, min(wanted, max(size, min(shape))))


def place(middle: tuple[int, int], side: int, shape: tuple[int, int]) -> CropBox:
    """A box of `side` around middle / 2, moved into the picture; centred on the picture where it is too large."""

    def start(doubled: int, length: int) -> int:
        return min(max((doubled - side) // 2, 0), length - side) if side <= length else -((side - length) // 2)

    return CropBox(start(middle[1], shape[1]), start(middle[0], shape[0]), side)


def _with_context(hole: np.ndarray, box: CropBox) -> CropBox:
    """`box`, made larger until it holds a known pixel."""
    while hole[inside(box, hole.shape)].all():
        side = min(2 * box.side, max(hole.shape))
        box = place((2 * box.top + box.side, 2 * box.left + box.side), side, hole.shape)
    return box


def inside(box: CropBox, shape: tuple[int, int]) -> tuple[slice, slice]:
    """Rows and columns of the part that lies in the picture."""
    left, top, side = box
    return slice(max(top, 0), min(top + side, shape[0])), slice(max(left, 0), min(left + side, shape[1]))


# --- to the model's size and back ---


def crop(array: np.ndarray, box: CropBox) -> np.ndarray:
    """The part of a picture's array (H, W, ...), mirrored where it reaches beyond: (side, side, ...)."""
    (left, top, side), (height, width) = box, array.shape[:2]
    rows, cols = inside(box, array.shape[:2])
    beyond = (max(-top, 0), max(top + side - height, 0)), (max(-left, 0), max(left + side - width, 0))
    return np.pad(array[rows, cols], [*beyond, (0, 0)][: array.ndim], mode="symmetric")


def fit_rim(filled: np.ndarray, raw: np.ndarray, hole: np.ndarray, reach: float = 3.0) -> np.ndarray:
    """filled, in whose hole the decoder's mean error on the known pixels near by is taken away, less so inwards.

    filled and raw (S, S, 3) uint8 as of `InpaintingResult`; hole (S, S); `reach` in pixels, for a fall to 1/e.
    """
    known = (~hole)[..., None].astype(float)
    blurred = [ndimage.gaussian_filter(x, (1.5, 1.5, 0)) for x in (known * (filled.astype(float) - raw), known)]
    error = blurred[0] / np.maximum(blurred[1], 1e-3)
    fade = np.exp(-ndimage.distance_transform_edt(hole) / reach)[..., None]
    corrected = (filled + error * fade).round().clip(0, 255).astype(np.uint8)
    return np.where(hole[..., None], corrected, filled)


# --- of a whole picture ---


def crop_regions(pixels: np.ndarray, hole: np.ndarray, size: int, context: float = CONTEXT) -> Crops:
    """The crops of a picture at the model's `size`: beyond the borders mirrored, shrunk with Lanczos.

    Where a crop is shrunk, a pixel that touches the hole is hole, and no colour leaks out of the hole.
    """
    boxes, owner = regions(hole, size, context)
    pairs = [resize_pair(crop(pixels, box), crop(hole, box), size) for box in boxes]
    images, holes = (torch.from_numpy(np.stack(arrays)) for arrays in zip(*pairs, strict=True))
    return Crops(boxes, owner, images.permute(0, 3, 1, 2).contiguous(), holes[:, None])


def paste_crops(pixels: np.ndarray, crops: Crops, images: Tensor, raw: Tensor) -> np.ndarray:
    """pixels with the hole of each region from its filled crop; images, raw (r, 3, S, S) as of `InpaintingResult`.

    Lanczos brings a crop back to its size. Before that, where it had been shrunk, the decoder's colours are moved to
    meet the known ones at the rim of the hole, less and less so inwards.
    """
    pixels = pixels.copy()
    for number, (box, image, decoded) in enumerate(zip(crops.boxes, images, raw, strict=True), start=1):
        hole, filled = crops.hole[number - 1, 0].numpy(), to_pixels(image)
        if box.side != len(hole):
            filled = fit_rim(filled, to_pixels(decoded), hole)
            filled = np.asarray(Image.fromarray(filled).resize((box.side, box.side), Image.Resampling.LANCZOS))
        rows, cols = inside(box, pixels.shape[:2])
        mine = crops.owner[rows, cols] == number
        top, left = rows.start - box.top, cols.start - box.left
        part = filled[top : top + mine.shape[0], left : left + mine.shape[1]]
        pixels[rows, cols][mine] = part[mine]
    return pixels
