"""Holes as photographs have them: scratches, writing, spots, things to remove; in pictures of any size.

hole (H, W) bool, True = missing; how thick they are does not depend on the picture's size.
"""

import math
import string
import zlib
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from maskgit.masks import known_name

TRIES = 1000  # at a hole that is neither empty nor everything
AROUND = 3  # a model's window is cut out of a hole so many times as wide


def scratches(shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """1 to 4 bent lines from border to border, 3 to 7 pixels wide, a picture of 500x350; more in larger ones"""
    picture, draw = _blank(shape)
    height, width = shape
    for _ in range(_count(shape, rng, 1, 4)):
        angle = rng.uniform(0, 2 * math.pi)
        reach, middle = math.hypot(height, width), rng.uniform(0.15, 0.85, 2) * (width, height)
        along = np.array([math.cos(angle), math.sin(angle)])
        across, bend = along[::-1] * (-1, 1), rng.uniform(-0.15, 0.15, 2)
        t = np.linspace(-1, 1, 65)[:, None]
        points = middle + reach * (t * along + (bend[0] * t**2 + bend[1] * t**3) * across)
        points += rng.normal(0, 0.4, points.shape)
        _stroke(draw, points, rng.uniform(3, 7))
    return np.array(picture)


def text(shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """lines of letters, 14 to 36 pixels high, from the top to the bottom"""
    picture, draw = _blank(shape)
    height, width = shape
    size = int(rng.integers(14, 37))
    font, letters = ImageFont.load_default(size), np.array(list(string.ascii_letters + string.digits + "   .,"))
    top = rng.uniform(-size, 2 * size)
    while top < height:
        line = "".join(rng.choice(letters, int(width / size * rng.uniform(0.7, 2.2))))
        draw.text((rng.uniform(-size, width / 4), top), line, 1, font)
        top += size * rng.uniform(1.2, 3.5)
    return np.array(picture)


def spots(shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """8 to 30 discs of radius 5 to 15, a picture of 500x350; more in larger ones"""
    picture, draw = _blank(shape)
    for _ in range(_count(shape, rng, 8, 30)):
        (x, y), radius = rng.uniform(0, 1, 2) * shape[::-1], rng.uniform(5, 15)
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=1)
    return np.array(picture)


def objects(shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """1 or 2 round shapes, 40 to 90 pixels across, a picture of 500x350; more in larger ones"""
    picture, draw = _blank(shape)
    for _ in range(_count(shape, rng, 1, 2)):
        middle, radius = rng.uniform(0.1, 0.9, 2) * shape[::-1], rng.uniform(20, 45, 2)
        angle = np.linspace(0, 2 * math.pi, 48, endpoint=False)
        waves = sum(rng.uniform(0, 0.22 / k) * np.sin(k * angle + rng.uniform(0, 2 * math.pi)) for k in (2, 3, 5))
        outline = middle + (1 + waves)[:, None] * radius * np.stack((np.cos(angle), np.sin(angle)), axis=1)
        draw.polygon([tuple(point) for point in outline], fill=1)
    return np.array(picture)


def _blank(shape: tuple[int, int]) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    picture = Image.new("1", shape[::-1])
    return picture, ImageDraw.Draw(picture)


def _count(shape: tuple[int, int], rng: np.random.Generator, least: int, most: int) -> int:
    """How many there are: between the two, times the picture's area over that of 500x350 where it is larger."""
    return round(rng.integers(least, most, endpoint=True) * max(1, shape[0] * shape[1] / (500 * 350)))


def _stroke(draw: ImageDraw.ImageDraw, points: np.ndarray, width: float) -> None:
    draw.line([tuple(point) for point in points], fill=1, width=round(width), joint="curve")


PHOTO_FAMILIES: dict[str, Callable[[tuple[int, int], np.random.Generator], np.ndarray]] = {
    draw.__name__: draw for draw in (scratches, text, spots, objects)
}


def photo_hole(family: str, shape: tuple[int, int], seed: int, index: int = 0) -> np.ndarray:
    """Hole number `index` of a family, (H, W) bool, with a missing and a known pixel.

    It depends on (family, shape, seed, index) only. Raises ValueError for an unknown family, listing the known ones.
    """
    draw = PHOTO_FAMILIES[known_name("hole family", family, PHOTO_FAMILIES)]
    rng = np.random.default_rng([seed, index, *shape, zlib.crc32(family.encode())])
    return _some(partial(draw, shape, rng))


def window_holes(family: str, count: int, size: int, seed: int = 0) -> Tensor:
    """What windows of `size` pixels see of holes in pictures AROUND times as wide: (count, 1, size, size) bool, in each
    something missing and something known.

    Hole i depends on (family, size, seed, i) only. Raises ValueError for an unknown family, listing the known ones.
    """
    draw = PHOTO_FAMILIES[known_name("hole family", family, PHOTO_FAMILIES)]
    number = zlib.crc32(family.encode())
    wide = (AROUND * size, AROUND * size)

    def cut(rng: np.random.Generator) -> np.ndarray:
        top, left = rng.integers((AROUND - 1) * size, size=2, endpoint=True)
        return draw(wide, rng)[top : top + size, left : left + size]

    rngs = (np.random.default_rng([seed, index, number]) for index in range(count))
    return torch.from_numpy(np.stack([_some(partial(cut, rng)) for rng in rngs])[:, None])


def _some(draw: Callable[[], np.ndarray]) -> np.ndarray:
    """The first hole drawn that is neither empty nor everything. Raises ValueError where none comes."""
    for _ in range(TRIES):
        hole = draw()
        if hole.any() and not hole.all():
            return hole
    raise ValueError(f"{hole.shape[1]}x{hole.shape[0]} pixels: too small for holes of this family")
