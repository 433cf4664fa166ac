"""Holes and hidden tokens: hole generators, hole -> hidden, hiding at training time, schedules, compositing.

    hole    (b, 1, H, W) bool   pixels to fill, True = missing
    hidden  (b, n)       bool   tokens to predict, True = hidden; n = grid * grid, row by row
    images  (b, c, H, W)        any dtype

b batch, n tokens, c channels, H W pixels. In a mask file 0 = hole and 255 = known (the lab's polarity); only the
command line below and `data` see that convention.
"""

import argparse
import math
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

SMALLEST = 8  # pixels: below this a random walk may cover the whole picture


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
    return SCHEDULES[_known("schedule", name, SCHEDULES)]


def _known(noun: str, name: str, names) -> str:
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
    Raises ValueError for an unknown family (listing the known ones), count < 1, size < 8 or seed < 0.
    """
    draw = FAMILIES[_known("hole family", family, FAMILIES)]
    for name, value, least in (("count", count, 1), ("size", size, SMALLEST), ("seed", seed, 0)):
        if value < least:
            raise ValueError(f"{name} {value}: expected at least {least}")
    number = zlib.crc32(family.encode())  # hash() of a string differs from process to process
    holes = [draw(size, np.random.default_rng([seed, index, number])) for index in range(count)]
    return torch.from_numpy(np.stack(holes)[:, None])


# --- hole -> hidden, and back to images ---

TokenRule = Literal["any", "majority"]
TOKEN_RULES: tuple[str, ...] = get_args(TokenRule)


def to_hidden(hole: Tensor, grid: int, margin: int = 0, rule: str = "any") -> Tensor:
    """hole (b, 1, H, W) bool -> hidden (b, grid * grid) bool: a token is hidden when any pixel of its patch is missing.

    With the rule `majority` more than half of its pixels must be missing. `margin` rings of tokens around the hidden
    ones (8 neighbours each) are hidden as well. Raises TypeError when the hole is not bool, ValueError when its shape
    does not fit the grid, margin < 0 or the rule is unknown.
    """
    _known("token rule", rule, TOKEN_RULES)
    if hole.dtype != torch.bool:
        raise TypeError(f"hole is {hole.dtype}, expected torch.bool with True = missing")
    if hole.ndim != 4 or hole.shape[1] != 1 or grid < 1 or hole.shape[2] % grid or hole.shape[3] % grid:
        raise ValueError(f"hole {tuple(hole.shape)}: expected (b, 1, H, W) with H and W multiples of the grid {grid}")
    if margin < 0:
        raise ValueError(f"margin {margin}: expected 0 or more rings of tokens")
    b, _, H, W = hole.shape
    share = hole.reshape(b, grid, H // grid, grid, W // grid).float().mean(dim=(2, 4))  # (b, grid, grid)
    hidden = share > (0.5 if rule == "majority" else 0.0)
    if margin:
        hidden = F.max_pool2d(hidden[:, None].float(), 2 * margin + 1, stride=1, padding=margin) > 0
    return hidden.reshape(b, grid * grid)


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


# --- holes and hiding at training time ---

EVERYTHING = "all"


class HoleMixture:
    """Holes for training: a family drawn for each sample, then one of its `bank` holes, made once from `seed`.

    weights: family -> weight, 0 or more, in any scale; the family `all` misses every pixel.
    Raises ValueError naming the value for an unknown family or bad weights.
    """

    def __init__(self, weights: Mapping[str, float], image_size: int, bank: int = 1024, seed: int = 0):
        self._weights = _checked_weights(weights, (*FAMILIES, EVERYTHING), "hole family")
        self._bank = [
            torch.ones(1, 1, image_size, image_size, dtype=torch.bool)
            if family == EVERYTHING
            else make_holes(family, bank, image_size, seed)
            for family in weights
        ]

    def __call__(self, batch: int, generator: torch.Generator) -> Tensor:
        """hole (batch, 1, H, W) bool."""
        kinds = torch.multinomial(self._weights, batch, replacement=True, generator=generator).tolist()
        places = torch.rand(batch, generator=generator, dtype=torch.float64).tolist()
        return torch.stack(
            [self._bank[kind][int(x * len(self._bank[kind]))] for kind, x in zip(kinds, places, strict=True)]
        )


def _checked_weights(weights: Mapping[str, float], known: tuple[str, ...], noun: str) -> Tensor:
    """(len(weights)) float64. Raises ValueError naming what is wrong."""
    for name, weight in weights.items():
        _known(noun, name, known)
        if not 0 <= weight < math.inf:
            raise ValueError(f"weight of {name}: {weight}, expected a finite number of at least 0")
    if not any(weights.values()):
        raise ValueError(f"weights {dict(weights)}: expected at least one above 0")
    return torch.tensor(list(weights.values()), dtype=torch.float64)


_EVERYWHERE = ("bernoulli", "uniform", "cosine")
POLICIES: tuple[str, ...] = (*_EVERYWHERE, *FAMILIES, "holes")


class HidingPolicy:
    """Which tokens a training step hides: a mixture of policies, drawn for each sample.

    - `bernoulli`: every token with probability `p`
    - `uniform`: ceil(u n) tokens, u ~ U(0, 1) for each sample
    - `cosine`: ceil(cos(pi u / 2) n) tokens (MaskGIT, section 3.2)
    - a hole family: ceil(cos(pi u / 2) m) of the m tokens that a hole of the family touches; the others are shown,
      because iterative decoding sees half-filled holes
    - `holes`: a family at random

    weights: policy -> weight, 0 or more, in any scale. The hole families draw from `bank` hidden maps each, made once
    from `seed` (strokes are too slow for the training loop).
    Raises ValueError naming the value for an unknown policy, bad weights, p outside (0, 1], bank < 1 or a grid that
    does not divide `image_size`.
    """

    def __init__(
        self, weights: Mapping[str, float], grid: int, image_size: int, p: float = 0.5, bank: int = 1024, seed: int = 0
    ):
        _checked_weights(weights, POLICIES, "hiding policy")
        if not 0 < p <= 1:
            raise ValueError(f"p {p}: expected a probability in (0, 1]")
        if bank < 1:
            raise ValueError(f"bank {bank}: expected at least one hidden map for each hole family")
        self.p = p
        shared = weights.get("holes", 0) / len(FAMILIES)
        totals = {name: weights.get(name, 0) + shared * (name in FAMILIES) for name in POLICIES if name != "holes"}
        self.kinds = [name for name, weight in totals.items() if weight]  # in one order, whatever that of `weights`
        self._weights = torch.tensor([totals[name] for name in self.kinds], dtype=torch.float64)

        holes = [
            torch.ones(bank, 1, image_size, image_size, dtype=torch.bool)
            if name in _EVERYWHERE
            else make_holes(name, bank, image_size, seed)
            for name in self.kinds
        ]
        self._bank = torch.stack([to_hidden(hole, grid) for hole in holes])  # (kinds, bank, n): what may be hidden

    def __call__(self, batch: int, generator: torch.Generator) -> Tensor:
        """hidden (batch, n) bool on the generator's device, at least one hidden token in every sample."""
        device = generator.device
        if self._bank.device != device:
            self._bank, self._weights = self._bank.to(device), self._weights.to(device)
        draws = {"generator": generator, "device": device}
        kind = torch.multinomial(self._weights, batch, replacement=True, generator=generator)  # (b)
        entry = torch.randint(self._bank.shape[1], (batch,), **draws)  # (b)
        u = torch.rand(batch, **draws)  # (b)
        candidates = self._bank[kind, entry]  # (b, n)
        scores = torch.rand(candidates.shape, **draws)  # (b, n)

        ratio = torch.where(self._is("uniform", kind), u, schedule("cosine")(u))
        counts = (ratio * candidates.sum(dim=1)).ceil().long()  # (b)
        counts = torch.where(self._is("bernoulli", kind), (scores < self.p).sum(dim=1), counts).clamp(min=1)
        # the `counts` candidates with the lowest scores; for bernoulli these are the tokens with scores < p
        rank = scores.masked_fill(~candidates, 2.0).argsort(dim=1).argsort(dim=1)  # (b, n)
        return rank < counts[:, None]

    def _is(self, name: str, kind: Tensor) -> Tensor:
        return kind == (self.kinds.index(name) if name in self.kinds else -1)


# --- command line ---


def main(argv: list[str] | None = None) -> None:
    """Writes a folder of masks: `python masks.py --family walk --count 747 --seed 1 --out DIR`."""
    families = "\n".join(f"  {name:8}{draw.__doc__.splitlines()[0]}" for name, draw in FAMILIES.items())
    parser = argparse.ArgumentParser(
        prog="masks.py",
        description="Write hole masks as PNG files mask_000.png, mask_001.png, ...: 0 = hole, 255 = known.",
        epilog=f"families:\n{families}\n\nexamples:\n"
        "  python masks.py --family walk --count 747 --seed 1 --out holes/walk\n"
        "  python masks.py --family thick --count 16 --size 128 --out holes/thick128\n\n"
        "Mask i depends on family, size, seed and i only: a longer run begins with the same masks.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--family", choices=FAMILIES, default="walk", help="kind of hole, see below (default: walk)")
    parser.add_argument("--count", type=int, default=747, help="number of masks (default: 747, the lab's test set)")
    parser.add_argument("--size", type=int, default=64, help="height and width in pixels (default: 64)")
    parser.add_argument("--seed", type=int, default=0, help="seed, 0 or more (default: 0)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write into, made if missing")
    options = parser.parse_args(argv)
    try:
        holes = make_holes(options.family, options.count, options.size, options.seed)
    except ValueError as error:
        parser.error(str(error))

    from data import write_image  # only the command line touches files

    digits = max(3, len(str(options.count - 1)))
    for index, known in enumerate((~holes[:, 0]).numpy()):
        write_image(options.out / f"mask_{index:0{digits}}.png", known.astype(np.uint8) * 255)
    share = holes.float().mean().item()
    print(f"{options.count} {options.family} masks in {options.out}, {share:.1%} of the pixels missing")


if __name__ == "__main__":
    main()
