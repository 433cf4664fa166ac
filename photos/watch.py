"""Fillings before one's eyes: pictures of every step, of the completions and of how sure the model was.

`WatchedSquares` and `WatchedWindows` have the same face:

    for progress in watched.steps():
        watched.pictures(), watched.film(progress.first)
    watched.completions(), watched.maps(), watched.notes()
"""

import threading
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from maskgit.canvas import check_encoder
from maskgit.completion import sample_seed
from maskgit.data import GREY, to_pixels
from maskgit.decoding_config import DecodingConfig
from maskgit.inpainter import Inpainter
from maskgit.pyramid import Step, around, fill_picture
from maskgit.visualize import confidence_map
from photos.fill import Filling, StepPictures, shrinking
from photos.photo import Photo


class Progress(NamedTuple):
    """What an iteration brought."""

    share: float  # of the work, in [0, 1]
    told: str
    first: int  # the first picture of the film that it changed, from 1


class WatchedSquares:
    """A filling by squares around the hole's regions."""

    def __init__(self, inpainter: Inpainter, photo: Photo, seed: int, samples: int, decoding: DecodingConfig):
        self.filling = Filling(inpainter, photo, seed, samples, decoding)
        self.shown = StepPictures(self.filling)

    def steps(self) -> Iterator[Progress]:
        for rows, state in self.filling.steps():
            self.shown.add(rows, state)
            told = f"Step {state.step} of {self.filling.last(rows)}"
            yield Progress(self.filling.share(rows, state), told, state.step)

    def pictures(self) -> list[np.ndarray]:
        """Of each completion, (h, w, 3) uint8, as it is now."""
        return self.shown.pictures()

    def film(self, first: int) -> list[np.ndarray]:
        """Of the first completion after each iteration, from number `first` on."""
        return self.shown.film(first)

    def completions(self) -> list[np.ndarray]:
        """After the steps: the photo's pixels (H, W, 3) uint8, filled, of each completion."""
        return self.filling.completions()

    def maps(self) -> list[np.ndarray]:
        """After the steps, of each completion: how sure the model was of its tokens."""
        return self.shown.maps()

    def notes(self) -> list[str]:
        """What the user should know."""
        return shrinking(self.filling.photo.name, self.filling.crops, self.filling.inpainter.size)


class WatchedWindows:
    """A filling at the photo's own scale; its pictures show the hole and what is around it, hidden tokens grey.

    Raises ValueError for an encoder whose tokens depend on more than their patch.
    """

    def __init__(self, inpainter: Inpainter, photo: Photo, seed: int, samples: int, decoding: DecodingConfig):
        check_encoder(inpainter)
        self.inpainter, self.photo, self.decoding = inpainter, photo, decoding
        self.seeds = [sample_seed(seed, number) for number in range(samples)]
        self.area = around(photo.hole, inpainter.size, inpainter.vqgan.config.factor)
        start = np.where(photo.hole[..., None], np.uint8(GREY), photo.pixels)
        self._now = [start[self.area].copy() for _ in self.seeds]
        self._film: list[np.ndarray] = []
        self._filled: list[np.ndarray] = []
        self._maps: list[np.ndarray] = []

    def steps(self) -> Iterator[Progress]:
        for number, seed in enumerate(self.seeds):
            own = seed, self.decoding.of_completion(number)
            steps, shown = fill_picture(self.inpainter, self.photo.pixels, self.photo.hole, *own), None
            while True:
                try:
                    step = next(steps)
                except StopIteration as end:
                    self._filled.append(end.value)
                    break
                if step.state is not shown:  # not so while a mirror image is being filled
                    self._show(number, step)
                    if number == 0:
                        self._film.append(self._now[0].copy())
                shown = step.state
                scale = f", at 1/{2**step.level} of the scale" if step.level else ""
                which = f"Completion {number + 1} of {len(self.seeds)}: " if len(self.seeds) > 1 else ""
                share = (number + step.share) / len(self.seeds)
                yield Progress(share, f"{which}step {step.state.step}{scale}", max(len(self._film), 1))
            self._now[number] = self._filled[number][self.area]
            self._maps.append(self._map(step))

    def _show(self, number: int, step: Step) -> None:
        """Brings what an iteration made, at whatever scale, into the picture of the completion."""
        canvas, hidden = step.canvas, step.state.hidden[0].cpu()
        cells = canvas.decode(self.inpainter.shown(step.state)[0])
        cells = torch.where(hidden[:, None, None, None], torch.full_like(cells, GREY), cells)
        picture = Image.fromarray(canvas.paste(canvas.decoded(cells)))
        size = tuple(length << step.level for length in picture.size)
        larger = np.asarray(picture.resize(size, Image.Resampling.BILINEAR) if step.level else picture)
        top, left = (at - side.start for at, side in zip(step.corner, self.area, strict=True))
        now, hole = self._now[number], self.photo.hole[self.area]
        rows, columns = (
            slice(max(at, 0), min(at + length, limit))
            for at, length, limit in zip((top, left), larger.shape, now.shape, strict=False)
        )
        part = larger[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
        now[rows, columns] = np.where(hole[rows, columns, None], part, now[rows, columns])

    def _map(self, step: Step) -> np.ndarray:
        canvas, codes = step.canvas, self.inpainter.transformer.config.codes
        grid = canvas.windows.shape
        where = canvas.windows.cells.unbind(dim=1)
        hidden, confidence = torch.zeros(grid, dtype=torch.bool), torch.ones(grid)
        hidden[where], confidence[where] = canvas.hidden[0].cpu(), step.state.confidence[0].cpu()
        picture = np.zeros((*(length * canvas.factor for length in grid), 3), dtype=np.uint8)
        height, width = canvas.hole.shape
        picture[:height, :width] = canvas.pixels
        images = torch.from_numpy(picture).permute(2, 0, 1)[None]
        return to_pixels(confidence_map(images, hidden.view(1, -1), confidence.view(1, -1), codes)[0])

    def pictures(self) -> list[np.ndarray]:
        """Of each completion, (h, w, 3) uint8, as it is now."""
        return self._now

    def film(self, first: int) -> list[np.ndarray]:
        """Of the first completion after each iteration, from number `first` on."""
        return self._film[first - 1 :]

    def completions(self) -> list[np.ndarray]:
        """After the steps: the photo's pixels (H, W, 3) uint8, filled, of each completion."""
        return self._filled

    def maps(self) -> list[np.ndarray]:
        """After the steps, of each completion: how sure the model was of its tokens, at the picture's own scale."""
        return self._maps

    def notes(self) -> list[str]:
        """What the user should know."""
        return []


WATCHED = {"squares": WatchedSquares, "windows": WatchedWindows}


class Turns:
    """Fillings of several people take turns: of those that wait, who came first goes on by a step."""

    def __init__(self):
        self._called = threading.Condition()
        self._next, self._at = 0, 0  # number to be given out, number whose turn it is

    def __enter__(self) -> None:
        with self._called:
            mine, self._next = self._next, self._next + 1
            self._called.wait_for(lambda: self._at == mine)

    def __exit__(self, *error) -> None:
        with self._called:
            self._at += 1
            self._called.notify_all()

    def each(self, steps: Iterator) -> Iterator:
        """What `steps` yields, each of them made in a turn."""
        while True:
            with self:
                step = next(steps, None)
            if step is None:
                return
            yield step
