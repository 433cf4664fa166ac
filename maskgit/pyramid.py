"""From coarse to fine: what is too thick for a window to bridge is filled at half the scale first, and so on.

    pixels  (H, W, 3) uint8   RGB
    hole    (H, W) bool       True = missing

The coarse result, brought up, is the first guess of the finer level: see `Canvas`.
"""

from collections import deque
from collections.abc import Generator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from scipy import ndimage
from torch import Tensor

from maskgit.canvas import Canvas, paint_picture
from maskgit.completion import Completer, InpaintingResult, check_numbers, checked_seeds, sample_seed
from maskgit.data import to_pixels
from maskgit.decoding import State
from maskgit.decoding_config import DecodingConfig
from maskgit.masks import EIGHT_NEIGHBOURS, thick_parts
from utils import finish

VERSION = 2  # of what comes out, counted up when the same settings come to give another picture
THICK = 1.0  # of a window's side: a thicker hole is filled at half the scale first
TRUST = 8.0  # in the guess from the coarser level, see `Canvas`

Box = tuple[slice, slice]  # rows and columns


class Step(NamedTuple):
    """What an iteration left."""

    level: int  # 0: the picture's own scale, 1: half of it, ...
    canvas: Canvas
    state: State  # of the picture as it is; while its mirror image is being filled (self_ensemble), the last one
    share: float  # of the work that is done, in [0, 1]
    corner: tuple[int, int]  # row and column of its first pixel in the picture at its own scale


def fill_picture(
    inpainter: Completer,
    pixels: np.ndarray,
    hole: np.ndarray,
    seed: int = 0,
    decoding: DecodingConfig | None = None,
    *,
    coarse: bool = True,
    trust: float = TRUST,
    feather: int = 0,
    margin: int = 0,
    batch_size: int | None = None,
    level: int = 0,
    span: tuple[float, float] = (0.0, 1.0),
    corner: tuple[int, int] = (0, 0),
) -> Generator[Step, None, np.ndarray]:
    """The picture with its hole filled, (H, W, 3) uint8, known pixels as they are; yields every iteration's Step.

    seed >= 0; decoding, margin, batch_size as of `Completer.complete`; `coarse` False fills at the picture's own scale
    alone; `feather` known pixels around the hole, at most half a window, are blended with the decoder's. `level`,
    `span`, its part of the work, and `corner` are its own: it calls itself for coarser scales.

    Networks see windows over the hole alone; the rest of the work, and the memory, grow with the rectangle around the
    hole, not with the picture. Raises ValueError for another feather, and what `Canvas` raises.
    """
    options = {"trust": trust, "margin": margin, "batch_size": batch_size}
    if not 0 <= feather <= inpainter.size // 2:  # what windows over the hole see for sure
        raise ValueError(f"feather {feather}: expected 0 to {inpainter.size // 2} pixels")
    rows, columns = around(hole, inpainter.size, inpainter.vqgan.config.factor)
    part, missing, guess = pixels[rows, columns], hole[rows, columns], {}
    corner = corner[0] + (rows.start << level), corner[1] + (columns.start << level)
    parts = around_thick_parts(missing, inpainter.size) if coarse else []
    smaller = [(box, thick, *halved(part[box], missing[box])) for box, thick in parts]
    smaller = [each for each in smaller if not each[3].all()]  # from nothing known comes no guess
    if smaller:
        rough, trusted = part.copy(), np.zeros_like(missing)
        ends = np.linspace(span[0], sum(span) / 2, len(smaller) + 1).tolist()  # coarser scales: half of the work
        span = ends[-1], span[1]
        for (box, thick, *half), *own in zip(smaller, ends, ends[1:], strict=False):
            there = corner[0] + (box[0].start << level), corner[1] + (box[1].start << level)
            further = {"level": level + 1, "span": tuple(own), "corner": there}
            found = yield from fill_picture(inpainter, *half, seed, decoding, **further, **options)
            rough[box][thick] = doubled(found, thick.shape)[thick]
            trusted[box] |= thick
        guess = {"guess": paint_picture(inpainter, rough, missing & ~trusted, decoding), "trusted": trusted}
    canvas = Canvas(inpainter, part, missing, decoding, **guess, **options)
    ways, last = [canvas, canvas.twin] if canvas.twin else [canvas], []
    for number, way in enumerate(ways):
        for state in way.steps(seed):
            done = (number + 1 - float(state.hidden.sum() / way.hidden.sum().clamp(min=1))) / len(ways)
            yield Step(level, canvas, last[0] if last else state, span[0] + done * (span[1] - span[0]), corner)
        last.append(state)
    canvas.render(*last)
    filled = pixels.copy()
    filled[rows, columns] = canvas.paste(canvas.raw, feather, canvas.decoding.rim)
    return filled


def complete_pictures(
    inpainter: Completer,
    images: Tensor,
    hole: Tensor,
    seeds: Sequence[int],
    *,
    samples: int = 1,
    margin: int = 0,
    decoding: DecodingConfig | None = None,
) -> InpaintingResult:
    """`Completer.complete` for images (b, 3, H, W) uint8 of any size, their hole (b, 1, H, W) bool."""
    check_numbers(samples=samples, margin=margin)
    seeds = checked_seeds(seeds, len(images))
    rows = []
    for image, missing, seed in zip(images, hole, seeds, strict=True):
        for number in range(samples):
            own = sample_seed(seed, number), (decoding or inpainter.decoding).of_completion(number)
            rows.append(_completed(inpainter, to_pixels(image), missing[0].numpy(), *own, margin=margin))
    return InpaintingResult(*map(torch.stack, zip(*rows, strict=True)))


def _completed(inpainter: Completer, pixels, hole, seed: int, decoding, margin: int) -> tuple[Tensor, ...]:
    """The fields of an `InpaintingResult` for one completion."""
    factor, size = inpainter.vqgan.config.factor, inpainter.size
    grid = tuple(-(-max(length, size) // factor) for length in hole.shape)
    tokens, confidence, hidden = torch.full(grid, -1), torch.ones(grid), torch.zeros(grid, dtype=torch.bool)
    raw = filled = pixels
    if hole.any():
        latest: deque[Step] = deque(maxlen=1)
        filled = finish(fill_picture(inpainter, pixels, hole, seed, decoding, margin=margin), latest.append)
        ((_, canvas, state, _, (top, left)),), raw = latest, pixels.copy()
        height, width = canvas.hole.shape
        raw[top : top + height, left : left + width] = canvas.raw
        where = (canvas.windows.cells + torch.tensor((top // factor, left // factor))).unbind(dim=1)
        for of_grid, of_cells in ((tokens, state.tokens), (confidence, state.confidence), (hidden, canvas.hidden)):
            of_grid[where] = of_cells[0].cpu()
    images = (torch.from_numpy(picture).permute(2, 0, 1) for picture in (filled, raw))
    return *images, tokens.flatten(), confidence.flatten(), hidden.flatten()


def around(hole: np.ndarray, reach: int, factor: int = 1) -> Box:
    """The rectangle of the hole and `reach` pixels more on every side, where the picture is; it begins with a cell of
    `factor` pixels of the picture's grid."""
    along = (hole.any(axis=axis).nonzero()[0] for axis in (1, 0))
    rectangle = _grown([slice(int(at[0]), int(at[-1]) + 1) for at in along], hole.shape, reach)
    return tuple(slice(side.start // factor * factor, side.stop) for side in rectangle)


def _grown(box: Sequence[slice], shape: tuple[int, int], reach: int) -> Box:
    return tuple(
        slice(max(0, x.start - reach), min(length, x.stop + reach)) for x, length in zip(box, shape, strict=True)
    )


def around_thick_parts(hole: np.ndarray, size: int) -> list[tuple[Box, np.ndarray]]:
    """The connected parts of the hole that are thicker than THICK of a window of `size` pixels: rectangles around them,
    a window of the next scale larger, and where in each of them such parts are, bool (h, w).

    Rectangles that overlap are one.
    """
    thick = thick_parts(hole, THICK * size)
    boxes: list[Box] = []
    for extent in ndimage.find_objects(ndimage.label(thick, EIGHT_NEIGHBOURS)[0]):
        box = _grown(extent, hole.shape, 2 * size)
        while met := next((other for other in boxes if _overlap(box, other)), None):
            boxes.remove(met)
            box = tuple(slice(min(a.start, b.start), max(a.stop, b.stop)) for a, b in zip(box, met, strict=True))
        boxes.append(box)
    return [(box, thick[box]) for box in boxes]


def _overlap(one: Box, other: Box) -> bool:
    return all(a.start < b.stop and b.start < a.stop for a, b in zip(one, other, strict=True))


def halved(pixels: np.ndarray, hole: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both at half the scale: the mean of the known ones of 2x2 pixels; missing where one of them is."""
    beyond = [(0, length % 2) for length in hole.shape]
    pixels, hole = np.pad(pixels, [*beyond, (0, 0)], mode="edge"), np.pad(hole, beyond, mode="edge")
    height, width = hole.shape[0] // 2, hole.shape[1] // 2
    known = ~hole.reshape(height, 2, width, 2)[..., None]  # (h, 2, w, 2, 1)
    sums = (pixels.reshape(height, 2, width, 2, 3) * known).sum(axis=(1, 3), dtype=np.float32)
    counts = known.sum(axis=(1, 3))
    return (sums / counts.clip(1)).round().astype(np.uint8), counts[..., 0] < 4


def doubled(pixels: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """pixels (h, w, 3) at twice the scale, cut to `shape`."""
    picture = Image.fromarray(pixels)
    larger = picture.resize((2 * picture.width, 2 * picture.height), Image.Resampling.BICUBIC)
    return np.asarray(larger)[: shape[0], : shape[1]]
