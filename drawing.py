"""Pictures of the decoding: what each iteration knew and painted, and an overview of a run."""

import math
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from data import to_pixels, write_image
from decoding import State
from inputs import GREY, Inputs
from utils import grid


def drawn(groups: list[str], count: int) -> list[int]:
    """The images whose iterations are drawn: the first of each group, then the second of each, `count` in all."""
    turns = [(groups[:index].count(group), index) for index, group in enumerate(groups[: count * len(set(groups))])]
    return sorted(index for _, index in sorted(turns)[:count])


class Sheets:
    """Pictures of the iterations of a few images: OUT/imga, OUT/mask_scheduling and a row each of OUT/overview.png.

    `decode` takes tokens (b, n), images and hole to uint8 images (b, 3, H, W); `shown` numbers the images of the run
    that are drawn.
    """

    def __init__(self, decode: Callable[[Tensor, Tensor, Tensor], Tensor], out: Path, shown: list[int]):
        self.decode, self.out, self.shown, self.overview = decode, out, shown, []

    def rows(self, start: int, count: int) -> list[int]:
        """Which of the `count` images of a batch are drawn."""
        return [index - start for index in self.shown if start <= index < start + count]

    def draw(self, state: State, batch: Inputs, rows: list[int]) -> tuple[Tensor, Tensor]:
        """Pictures (r, 3, H, W) uint8 of the images `rows` after an iteration, hidden tokens grey, and what is known,
        white."""
        hidden = state.hidden[rows]
        pictures = self.decode(state.tokens[rows].masked_fill(hidden, 0), batch.images[rows], batch.hole[rows])
        side = math.isqrt(hidden.shape[1])
        pending = F.interpolate(hidden.view(-1, 1, side, side).float(), size=pictures.shape[-2:]).bool().cpu()
        return pictures.masked_fill(pending, GREY), torch.where(pending, 0, 255).to(torch.uint8).expand_as(pictures)

    def write(self, batch: Inputs, results: Tensor, rows: list[int], history: list[tuple[Tensor, Tensor]]) -> None:
        """`history` holds what `draw` gave for `rows` after each iteration, `results` (b, 3, H, W) the filled batch."""
        for place, row in enumerate(rows):
            pictures, known = (torch.stack([step[kind][place] for step in history]) for kind in (0, 1))
            for folder, sheet in (("imga", pictures), ("mask_scheduling", known)):
                write_image(self.out / folder / batch.names[row], to_pixels(grid(sheet, columns=min(len(sheet), 5))))
            few = pictures[torch.linspace(0, len(pictures) - 1, 4).long()]
            before = [] if batch.truth is None else [batch.truth[row]]
            masked = batch.images[row].masked_fill(batch.hole[row], GREY)
            self.overview.append(torch.stack([*before, masked, *few, results[row]]))

    def close(self) -> None:
        """Writes the overview."""
        if self.overview:
            sheet = grid(torch.cat(self.overview), columns=len(self.overview[-1]))
            write_image(self.out / "overview.png", to_pixels(sheet.repeat_interleave(2, 1).repeat_interleave(2, 2)))
