"""Filling the hole of a photo, at once or before one's eyes.

    completions, notes = fill_photo(inpainter, photo, samples=4)

    filling = Filling(inpainter, photo, samples=4)
    shown = StepPictures(filling)
    for rows, state in filling.steps():
        shown.add(rows, state)
        shown.pictures()
    filling.completions(), shown.maps()

The model sees a square crop, S pixels wide, around each of the hole's r regions. Completion k of region i is row
i * samples + k wherever rows are counted.
"""

import math
from collections.abc import Callable, Iterator
from functools import cached_property

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from maskgit.canvas import has_grid_of_any_size
from maskgit.classical import smooth_rim
from maskgit.completion import Completer, sample_seed
from maskgit.data import to_pixels
from maskgit.decoding import State
from maskgit.decoding_config import DecodingConfig
from maskgit.inpainter import Inpainter
from maskgit.iterations import iterations
from maskgit.masks import known_name
from maskgit.pyramid import fill_picture
from maskgit.visualize import confidence_map, frames, sheet_of
from photos.crops import CONTEXT, Crops, crop_regions, paste_crops
from photos.photo import Photo
from utils import finish, mix

TILINGS = ("windows", "squares")
SHOWN = 9  # regions in the pictures of the steps, at most


def fill_photo(
    inpainter: Inpainter,
    photo: Photo,
    seed: int = 0,
    samples: int = 1,
    decoding: DecodingConfig | None = None,
    *,
    tiling: str | None = None,
    coarse: bool = True,
    feather: int = 0,
    margin: int = 0,
    context: float = CONTEXT,
    batch_size: int | None = None,
    on_step: Callable[[float], object] | None = None,
) -> tuple[list[np.ndarray], list[str]]:
    """`samples` completions, pixels (H, W, 3) uint8 each, and notes on how much was shrunk.

    tiling: `windows` over the picture at its own scale, with `coarse` and `feather` as of `pyramid.fill_picture`, or
        `squares` around the hole's regions, shrunk to the model's size; None: as `usual_tiling` says
    on_step: called after each iteration with the share of the work done, in [0, 1]

    The other arguments as of `Filling`. Raises ValueError for an unknown tiling, or one that does not fit the model.
    """
    if known_name("tiling", tiling or usual_tiling(inpainter), TILINGS) == "windows":
        options = {"coarse": coarse, "feather": feather, "margin": margin, "batch_size": batch_size}
        return _through_windows(inpainter, photo, seed, samples, decoding, on_step or (lambda share: None), options), []
    filling = Filling(inpainter, photo, seed, samples, decoding, margin=margin, context=context, batch_size=batch_size)
    for rows, state in filling.steps():
        if on_step:
            on_step(filling.share(rows, state))
    return filling.completions(), shrinking(photo.name, filling.crops, inpainter.size)


def usual_tiling(inpainter: Completer) -> str:
    """`windows` where the model's encoder has a grid of any size, else `squares`."""
    return TILINGS[0] if has_grid_of_any_size(inpainter) else TILINGS[1]


def _through_windows(inpainter, photo: Photo, seed: int, samples: int, decoding, on_step, options) -> list[np.ndarray]:
    completions = []
    for number in range(samples):
        own = sample_seed(seed, number), (decoding or inpainter.decoding).of_completion(number)
        steps = fill_picture(inpainter, photo.pixels, photo.hole, *own, **options)
        completions.append(finish(steps, lambda step, number=number: on_step((number + step.share) / samples)))
    return completions


class Filling:
    """The completions of a photo in the making.

    seed >= 0: of the first region; region i takes mix(seed, 0, i), and completion k of either `sample_seed(., k)`
    decoding, margin, batch_size: as of `Inpainter.complete`; a completion depends neither on the latter nor on samples
    context: side of a crop / longer side of its region
    """

    def __init__(
        self,
        inpainter: Inpainter,
        photo: Photo,
        seed: int = 0,
        samples: int = 1,
        decoding: DecodingConfig | None = None,
        *,
        margin: int = 0,
        context: float = CONTEXT,
        batch_size: int | None = None,
    ):
        self.inpainter, self.photo, self.samples = inpainter, photo, samples
        self.decoding, self.margin, self.batch_size = decoding or inpainter.decoding, margin, batch_size
        self.crops = crop_regions(photo.pixels, photo.hole, inpainter.size, context)
        self.seeds = [region_seed(seed, region) for region in range(len(self.crops.boxes))]

    @cached_property
    def _total(self) -> Tensor:
        """T of each row, (r * samples) long."""
        hidden = self.inpainter.hide(self.crops.hole, self.margin, self.decoding.token_rule)
        return iterations(hidden, self.decoding).repeat_interleave(self.samples)

    def steps(self) -> Iterator[tuple[slice, State]]:
        """Fills; after each iteration of each batch its rows and their State."""
        self.painted = self.inpainter.paint(self.crops.images, self.crops.hole, self.decoding)
        self.result = yield from self.inpainter.steps(
            self.crops.images, self.crops.hole, self.seeds, batch_size=self.batch_size, samples=self.samples,
            margin=self.margin, decoding=self.decoding.changed(rim=0.0), painted=self.painted,
        )  # fmt: skip

    def share(self, rows: slice, state: State) -> float:
        """Of the work, what is done after an iteration, in [0, 1]; a second look is not reckoned with."""
        within = min(state.step / self.last(rows), 1)
        return (rows.start + within * (rows.stop - rows.start)) / (len(self.seeds) * self.samples)

    def last(self, rows: slice) -> int:
        """The iteration that completes these rows, but for a second look."""
        return self.decoding.sweet_spot or int(self._total[rows].max())

    def completions(self) -> list[np.ndarray]:
        """After the steps: the photo's pixels (H, W, 3) uint8, filled, of each completion; the rim at its own scale."""
        images, raw = self.result.images, self.result.raw
        pasted = (
            paste_crops(self.photo.pixels, self.crops, images[k :: self.samples], raw[k :: self.samples])
            for k in range(self.samples)
        )
        return [smooth_rim(filled, self.photo.hole, self.decoding.rim) for filled in pasted]


class StepPictures:
    """Pictures of a filling's iterations, its first SHOWN regions side by side.

    Hidden tokens are grey, those just decided framed.
    """

    def __init__(self, filling: Filling):
        self.filling = filling
        region = torch.arange(min(len(filling.seeds), SHOWN)).repeat_interleave(filling.samples)
        self.region = region  # (m), of each row that is shown
        self.images, self.hole = filling.crops.images[region], filling.crops.hole[region]
        hide = filling.inpainter.hide
        self.hidden = hide(self.hole, filling.margin, filling.decoding.token_rule)  # (m, n), as of the last step
        self.latest = torch.stack([  # (m, 3, h, w) uint8
            frames(image, hole, hidden[None], image[None][:0], image)[0]
            for image, hole, hidden in zip(self.images, self.hole, self.hidden, strict=True)
        ])  # fmt: skip
        self._film: list[Tensor] = []  # of the first completion, (regions, 3, h, w) uint8 a step

    def add(self, rows: slice, state: State) -> None:
        """What `Filling.steps` yields."""
        rows = slice(rows.start, min(rows.stop, len(self.region)))
        count = max(rows.stop - rows.start, 0)
        if state.step > len(self._film):  # regions that are done stay as they are
            self._film.append(self.latest[:: self.filling.samples].clone())
        if not count:
            return
        hidden, images, hole = state.hidden[:count], self.images[rows], self.hole[rows]
        codes = self.filling.inpainter.shown(state)[:count]
        painted = self.filling.painted[self.region[rows]]
        decoded = self.filling.inpainter.decode(codes, painted, hole)
        around = torch.stack((self.hidden[rows], hidden), dim=1)  # (count, 2, n)
        for row, (image, missing, two, one) in enumerate(zip(images, hole, around, decoded, strict=True), rows.start):
            self.latest[row] = frames(image, missing, two, one[None], one)[1]
            region, sample = divmod(row, self.filling.samples)
            if sample == 0:
                for sheet in self._film[state.step - 1 :]:
                    sheet[region] = self.latest[row]
        self.hidden[rows] = hidden

    def pictures(self) -> list[np.ndarray]:
        """Of each completion, (h, w, 3) uint8, as it is now."""
        return self._side_by_side(self.latest)

    def film(self, first: int = 1) -> list[np.ndarray]:
        """Of the first completion, (h, w, 3) uint8, after each iteration from number `first`.

        A batch changes those from its own iteration on: its regions that are done stay as they are.
        """
        return [sheet(pictures) for pictures in self._film[first - 1 :]]

    def maps(self) -> list[np.ndarray]:
        """After the steps, of each completion: how sure the model was of its tokens."""
        result, count = self.filling.result, len(self.region)
        codes = self.filling.inpainter.transformer.config.codes
        return self._side_by_side(confidence_map(self.images, result.hidden[:count], result.confidence[:count], codes))

    def _side_by_side(self, pictures: Tensor) -> list[np.ndarray]:
        """(m, 3, h, w) -> a sheet of each completion."""
        samples = self.filling.samples
        return [sheet(pictures[sample::samples]) for sample in range(samples)]


def sheet(pictures: Tensor) -> np.ndarray:
    """uint8 (N, 3, h, w) -> one picture (h', w', 3), about as many rows as columns."""
    return to_pixels(sheet_of(pictures, math.ceil(math.sqrt(len(pictures)))))


def region_seed(seed: int, region: int) -> int:
    """`seed` itself for the first region: a small picture is filled as `Inpainter` does."""
    return mix(seed, 0, region) if region else seed


def shrinking(name: str, crops: Crops, size: int) -> list[str]:
    """A note on the region that was shrunk most, if any was."""
    factors = [box.side / size for box in crops.boxes]
    worst, count = max(factors), sum(factor > 1 for factor in factors)
    if not count:
        return []
    rows, cols = ndimage.find_objects(crops.owner)[factors.index(worst)]
    what = "region" if count == 1 else f"{count} regions, the largest"
    soft = "; it will look soft" if worst >= 4 else ""
    return [
        f"{name}: {what} of {cols.stop - cols.start}x{rows.stop - rows.start} pixels shrunk {worst:.1f} times{soft}"
    ]
