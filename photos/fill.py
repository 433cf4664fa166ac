"""The holes of a photo filled before one's eyes: `photos.fill_photo`, step by step.

    filling = Filling(inpainter, photo, decoding, seed=0, samples=4)
    for step, pictures in filling.steps():
        ...
    filling.results(), filling.maps()

The model sees a square around each of the r regions of the hole, S pixels wide; pictures show these side by side.
"""

import itertools
import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from maskgit.data import to_pixels
from maskgit.decoding import DecodingConfig, State
from maskgit.inpainter import Inpainter, sample_seed
from maskgit.masks import composite
from maskgit.visualize import confidence_map, frames
from photos.crops import CONTEXT
from photos.photo import Cut, Photo, cut, paste
from utils import grid, images_at_once, mix


def in_step(runs: list[Iterator[State]]) -> Iterator[State]:
    """Several decodings as one: their states side by side, those that are done as they ended."""
    last: tuple = ()
    for states in itertools.zip_longest(*runs):
        last = tuple(new or old for new, old in itertools.zip_longest(states, last))
        tokens, hidden, confidence = (
            torch.cat([getattr(state, name) for state in last]) for name in ("tokens", "hidden", "confidence")
        )
        yield State(max(state.step for state in last), tokens, hidden, confidence)


class Filling:
    """`samples` completions of a photo, decoded together; they are those of `photos.fill_photo`."""

    def __init__(self, inpainter: Inpainter, photo: Photo, decoding: DecodingConfig, seed: int, samples: int):
        self.inpainter, self.photo, self.decoding, self.samples = inpainter, photo, decoding, samples
        self.cut = cut(photo, inpainter.size)
        self.regions = len(self.cut.squares)
        self.images = self.cut.images.repeat(samples, 1, 1, 1)  # (samples r, 3, S, S)
        self.hole = self.cut.hole.repeat(samples, 1, 1, 1)
        self.seeds = [region_seed(seed, sample, region) for sample in range(samples) for region in range(self.regions)]
        size = images_at_once(inpainter.device)
        self.parts = [slice(start, start + size) for start in range(0, len(self.seeds), size)]
        self.hidden = inpainter.hide(self.hole, rule=decoding.token_rule)  # at the start

    def steps(self) -> Iterator[tuple[int, list[np.ndarray]]]:
        """After each iteration its number and a picture (h, w, 3) uint8 a completion.

        Hidden tokens are grey, those just decided framed.
        """
        runs = [
            self.inpainter.steps(self.images[part], self.hole[part], self.seeds[part], decoding=self.decoding)
            for part in self.parts
        ]
        blank, before = self.inpainter.blank(), self.hidden
        for state in in_step(runs):
            painted = self._decode(torch.where(state.hidden, blank, state.tokens))
            around = torch.stack((before, state.hidden), dim=1)  # (samples r, 2, n)
            shown = [
                frames(image, hole, two, one[None], one)[1]
                for image, hole, two, one in zip(self.images, self.hole, around, painted, strict=True)
            ]
            before, self.state = state.hidden, state
            yield state.step, self._sheets(torch.stack(shown))

    def results(self) -> list[np.ndarray]:
        """After the steps: the photo's pixels (H, W, 3) uint8, filled, of each completion."""
        raw = self._decode(self.state.tokens)
        filled = composite(raw, self.images, self.hole)
        chunks = zip(filled.split(self.regions), raw.split(self.regions), strict=True)
        return [paste(self.photo, self.cut, *chunk) for chunk in chunks]

    def maps(self) -> list[np.ndarray]:
        """After the steps: how sure the model was of its tokens, a picture a completion."""
        codes = self.inpainter.transformer.config.codes
        return self._sheets(confidence_map(self.images, self.hidden, self.state.confidence, codes))

    def _decode(self, tokens: Tensor) -> Tensor:
        return torch.cat([self.inpainter.decode(tokens[p], self.images[p], self.hole[p]) for p in self.parts])

    def _sheets(self, pictures: Tensor) -> list[np.ndarray]:
        """(samples r, 3, h, w) -> a picture a completion, its regions side by side."""
        columns = math.ceil(math.sqrt(self.regions))
        return [to_pixels(grid(regions, columns)) for regions in pictures.split(self.regions)]


def fill_photo(
    inpainter: Inpainter,
    photo: Photo,
    seed: int = 0,
    samples: int = 1,
    decoding: DecodingConfig | None = None,
    progress: Callable[[int, int], None] | None = None,
    margin: int = 0,
    context: float = CONTEXT,
    batch_size: int | None = None,
) -> tuple[list[np.ndarray], list[str]]:
    """`samples` completions, pixels (H, W, 3) each, and notes on how much was shrunk.

    All regions and samples are filled together, `batch_size` at a time (default: `images_at_once`); a completion
    depends neither on that nor on how many there are. `progress` is called with the iterations done and their number.
    """
    parts, decoding = cut(photo, inpainter.size, context), decoding or inpainter.decoding
    count = len(parts.squares)
    jobs = [(sample, region) for sample in range(samples) for region in range(count)]
    size = batch_size or images_at_once(inpainter.device)
    total, images, raw = -(-len(jobs) // size) * decoding.sweet_spot, [], []
    for start in range(0, len(jobs), size):
        batch = jobs[start : start + size]
        index = torch.tensor([region for _, region in batch])
        seeds = [region_seed(seed, *job) for job in batch]
        steps = inpainter.steps(parts.images[index], parts.hole[index], seeds, margin, decoding)
        for state in steps:
            if progress:
                progress(start // size * decoding.sweet_spot + state.step, total)
        filled = inpainter.finish(parts.images[index], parts.hole[index], state.tokens)
        images.append(filled.images)
        raw.append(filled.raw)
    chunks = zip(torch.cat(images).split(count), torch.cat(raw).split(count), strict=True)
    return [paste(photo, parts, *chunk) for chunk in chunks], shrinking(photo.name, parts, inpainter.size)


def region_seed(seed: int, sample: int, region: int) -> int:
    """`seed` itself for the first region of the first completion: a small picture is filled as `Inpainter` does."""
    return mix(seed, sample, region) if region else sample_seed(seed, sample)


def shrinking(name: str, parts: Cut, size: int) -> list[str]:
    """A note on the region that was shrunk most, if any was."""
    factors = [square.side / size for square in parts.squares]
    worst, count = max(factors), sum(factor > 1 for factor in factors)
    if not count:
        return []
    rows, cols = ndimage.find_objects(parts.owner)[factors.index(worst)]
    what = "region" if count == 1 else f"{count} regions, the largest"
    soft = "; it will look soft" if worst >= 4 else ""
    return [
        f"{name}: {what} of {cols.stop - cols.start}x{rows.stop - rows.start} pixels shrunk {worst:.1f} times{soft}"
    ]
