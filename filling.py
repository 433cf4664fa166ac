"""The holes of a photo filled before one's eyes: `photos.fill_photo`, step by step.

    filling = Filling(inpainter, photo, decoding, seed=0, samples=4)
    for step, pictures in filling.steps():
        ...
    filling.results(), filling.maps()

The model sees a square around each of the r regions of the hole, S pixels wide; pictures show these side by side.
"""

import itertools
import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from data import to_pixels
from decoding import DecodingConfig, State
from drawing import confidence_map, frames
from inpainter import Inpainter
from masks import composite
from photos import Photo, cut, paste, region_seed
from utils import grid, images_at_once


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
