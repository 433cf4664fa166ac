"""Holes and hidden tokens: hole generators, hole -> hidden, schedules, compositing.

    hole    (b, 1, H, W) bool   pixels to fill, True = missing
    hidden  (b, n)       bool   tokens to predict, True = hidden; n = grid * grid, row by row
    images  (b, c, H, W)        any dtype

b batch, n tokens, c channels, H W pixels. In a mask file 0 = hole and 255 = known (the lab's polarity); only
make_masks.py and `data` see that convention.
"""

import math
import zlib
from collections.abc import Callable
from typing import Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from scipy import ndimage
from torch import Tensor

SMALLEST = 8  # pixels: below this a random walk may cover the whole picture
MOST = 2**32  # pixels of `make_holes`
EIGHT_NEIGHBOURS = np.ones((3, 3), dtype=bool)  # of a pixel, in connected parts


# --- schedules: how much is still hidden ---


def _cosine(r):
    # sin(pi (1 - r) / 2) = cos(pi r / 2), but exactly 0 at r = 1, where rounding makes the cosine 6e-17 or -4e-8
    sin = torch.sin if isinstance(r, Tensor) else math.sin
    return sin((1 - r) * (math.pi / 2))


SCHEDULES: dict[str, Callable] = {
    "cosine": _cosine,
    "linear": lambda r: 1 - r,
    "square": lambda r: 1 - r**2,
    "cubic": lambda r: 1 - r**3,
    "sqrt": lambda r: 1 - r**0.5,
}


def schedule(name: str) -> Callable:
    """The mask schedule `name` (MaskGIT, arXiv 2202.04200, section 3.3): progress r in [0, 1] -> fraction still hidden.

    The function takes a float or a tensor, decreases, and is exactly 1 at r = 0 and exactly 0 at r = 1.
    Raises ValueError listing the known names.
    """
    return SCHEDULES[known_name("schedule", name, SCHEDULES)]


def known_name(noun: str, name: str, names) -> str:
    """`name`, which is one of `names`. Raises ValueError listing them."""
    if name not in names:
        raise ValueError(f"unknown {noun} {name!r}, expected one of: {', '.join(names)}")
    return name


# --- hole generators: (size, rng) -> hole (size, size) bool, neither empty nor full ---


def walk(size: int, rng: np.random.Generator) -> np.ndarray:
    """the lab's random walk: size^2 steps of one pixel from a random start, clipped at the border (25 % at size 64)

    Clipping a free walk after its cumulative sum would glue it to the border. Folding it at the pixels' outer edges
    (... 1 0 | 0 1 ... S-1 | S-1 S-2 ...) has exactly the clipped walk's distribution: at the border one sign stays,
    the other leaves, and beyond the edge only the meaning of the (symmetric) sign is swapped.
    """
    steps = np.zeros((size * size + 1, 2), dtype=np.int64)
    steps[0] = rng.integers(size, size=2)
    axes = rng.integers(2, size=size * size)
    steps[np.arange(1, len(steps)), axes] = 2 * rng.integers(2, size=size * size) - 1
    path = steps.cumsum(axis=0) % (2 * size)
    rows, columns = np.minimum(path, 2 * size - 1 - path).T
    hole = np.zeros((size, size), dtype=bool)
    hole[rows, columns] = True
    return hole


def thin(size: int, rng: np.random.Generator) -> np.ndarray:
    """many thin strokes: 4 to 50 of them, 1 to 4 pixels wide at size 64 (LaMa's thin family)"""
    return _strokes(size, rng, count=(4, 50), length=40, width=10)


def medium(size: int, rng: np.random.Generator) -> np.ndarray:
    """4 or 5 strokes, 1 to 14 pixels wide at size 64 (LaMa's medium family)"""
    return _strokes(size, rng, count=(4, 5), length=100, width=50)


def thick(size: int, rng: np.random.Generator) -> np.ndarray:
    """1 to 5 thick strokes, 1 to 26 pixels wide at size 64 (LaMa's thick family)"""
    return _strokes(size, rng, count=(1, 5), length=200, width=100)


def _strokes(size: int, rng: np.random.Generator, count: tuple[int, int], length: int, width: int) -> np.ndarray:
    """LaMa's irregular holes (arXiv 2109.07161; parameters of its configs/data_gen/random_*_256.yaml, strokes only).

    A stroke is a chain of 1 to 5 segments, 10 + [0, length) long and 5 + [0, width) wide, in 256ths of the side. Its
    directions are 0, 1, 2 or 3 rad, mirrored in every other stroke. A hole of more than half of the pixels is drawn
    again, as LaMa discards it (max_tamper_area).
    """
    picture = Image.new("1", (size, size))
    draw = ImageDraw.Draw(picture)
    for stroke in range(rng.integers(*count, endpoint=True)):
        start = rng.uniform(0, size - 1, size=2)
        for _ in range(rng.integers(1, 5, endpoint=True)):
            angle = (0.01 + rng.integers(4)) * (-1) ** stroke
            reach = (10 + rng.uniform(0, length)) * size / 256
            radius = max(1.0, (5 + rng.uniform(0, width)) * size / 256) / 2
            end = np.clip(start + reach * np.array([math.sin(angle), math.cos(angle)]), 0, size - 1)
            draw.line([*start, *end], fill=1, width=round(2 * radius))
            for x, y in (start, end):  # round caps: joints have no notches, and no stroke vanishes at the border
                draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=1)
            start = end
    hole = np.array(picture)
    return hole if hole.mean() <= 0.5 else _strokes(size, rng, count, length, width)


def box(size: int, rng: np.random.Generator) -> np.ndarray:
    """the centre square of half the side, 32x32 at size 64 (always the same)"""
    hole = np.zeros((size, size), dtype=bool)
    inside = slice(size // 4, size // 4 + size // 2)
    hole[inside, inside] = True
    return hole


def half(size: int, rng: np.random.Generator) -> np.ndarray:
    """one half of the picture: left, right, top or bottom"""
    hole = np.zeros((size, size), dtype=bool)
    hole[: size // 2] = True
    return np.ascontiguousarray(np.rot90(hole, rng.integers(4)))


FAMILIES: dict[str, Callable[[int, np.random.Generator], np.ndarray]] = {
    draw.__name__: draw for draw in (walk, thin, medium, thick, box, half)
}


def make_holes(family: str, count: int, size: int = 64, seed: int = 0) -> Tensor:
    """`count` holes (count, 1, size, size) bool, True = missing.

    Hole i depends on (family, size, seed, i) only: the first m of n holes are `make_holes(family, m, size, seed)`.
    Raises ValueError for an unknown family (listing the known ones), count < 1, size < 8, seed < 0 or more than
    MOST pixels.
    """
    draw = FAMILIES[known_name("hole family", family, FAMILIES)]
    for name, value, least in (("count", count, 1), ("size", size, SMALLEST), ("seed", seed, 0)):
        if value < least:
            raise ValueError(f"{name} {value}: expected at least {least}")
    if count * size**2 > MOST:
        raise ValueError(f"{count} holes of {size}x{size}: expected at most {MOST:,} pixels in all")
    number = zlib.crc32(family.encode())  # hash() of a string differs from process to process
    holes = [draw(size, np.random.default_rng([seed, index, number])) for index in range(count)]
    return torch.from_numpy(np.stack(holes)[:, None])


def thick_parts(hole: np.ndarray, limit: float) -> np.ndarray:
    """The connected parts (8 neighbours) of a hole (H, W) bool that are thicker than `limit` pixels somewhere."""
    labels, _ = ndimage.label(hole, EIGHT_NEIGHBOURS)
    thick = np.zeros_like(hole)
    for number, extent in enumerate(ndimage.find_objects(labels), start=1):
        if min(side.stop - side.start for side in extent) > limit:  # or it cannot be
            near = tuple(slice(max(0, side.start - 1), side.stop + 1) for side in extent)
            mine = labels[near] == number
            if 2 * ndimage.distance_transform_edt(mine).max() - 1 > limit:
                thick[near] |= mine
    return thick


# --- hole -> hidden, and back to images ---

TokenRule = Literal["any", "majority"]
TOKEN_RULES: tuple[str, ...] = get_args(TokenRule)


def to_hidden(hole: Tensor, grid: int | tuple[int, int], margin: int = 0, rule: str = "any") -> Tensor:
    """hole (b, 1, H, W) bool -> hidden (b, h * w) bool: a token is hidden when any pixel of its patch is missing.

    grid: tokens a side, or (h, w) of a picture that is no square. With the rule `majority` more than half of its pixels
    must be missing. `margin` rings of tokens around the hidden ones (8 neighbours each) are hidden as well. Raises
    TypeError when the hole is not bool, ValueError when its shape does not fit the grid, margin < 0 or the rule is
    unknown.
    """
    known_name("token rule", rule, TOKEN_RULES)
    if hole.dtype != torch.bool:
        raise TypeError(f"hole is {hole.dtype}, expected torch.bool with True = missing")
    h, w = (grid, grid) if isinstance(grid, int) else grid
    if hole.ndim != 4 or hole.shape[1] != 1 or min(h, w) < 1 or hole.shape[2] % h or hole.shape[3] % w:
        raise ValueError(f"hole {tuple(hole.shape)}: expected (b, 1, H, W) with H and W multiples of the grid {grid}")
    if margin < 0:
        raise ValueError(f"margin {margin}: expected 0 or more rings of tokens")
    b, _, H, W = hole.shape
    margin = min(margin, max(h, w))  # which hides all
    share = hole.reshape(b, h, H // h, w, W // w).float().mean(dim=(2, 4))  # (b, h, w)
    hidden = share > (0.5 if rule == "majority" else 0.0)
    if margin:
        hidden = F.max_pool2d(hidden[:, None].float(), 2 * margin + 1, stride=1, padding=margin) > 0
    return hidden.reshape(b, h * w)


def mean_of(one: Tensor, other: Tensor) -> Tensor:
    """The mean of two uint8 tensors, halves rounded up."""
    return one.to(torch.int16).add_(other).add_(1).bitwise_right_shift_(1).to(torch.uint8)  # in place, for large ones


def composite(filled: Tensor, images: Tensor, hole: Tensor) -> Tensor:
    """`filled` where the hole is, `images` elsewhere: (b, c, H, W), known values bit-identical to those of `images`.

    hole (b, 1, H, W) bool. Raises ValueError when shapes or dtypes differ: one hole for several images, or values
    of another type (another range), would be a mistake upstream.
    """
    if filled.shape != images.shape or filled.dtype != images.dtype:
        raise ValueError(
            f"filled is {filled.dtype} {tuple(filled.shape)}, expected the images' {images.dtype} {tuple(images.shape)}"
        )
    expected = (images.shape[0], 1, *images.shape[2:])
    if hole.dtype != torch.bool or hole.shape != expected:
        raise ValueError(f"hole is {hole.dtype} {tuple(hole.shape)}, expected torch.bool {expected}")
    return torch.where(hole, filled, images)
