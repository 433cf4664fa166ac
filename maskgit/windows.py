"""A picture larger than the model: one grid of tokens, seen through overlapping windows of the model's size.

    grid    (h, w)           cells of f x f pixels, one token each; f the VQGAN's downsampling factor
    cells   (n, 2)           row and column of those that some window covers, 0..n-1 from here on
    index   (v, g * g)       the cells of each of v windows, row by row; g the model's tokens a side

Windows lie STRIDE of their side apart and are looked through where the hole is, nowhere else. The logits of a hidden
token are the mean over the windows that see it, so that each iteration decides tokens over the whole grid, as
MultiDiffusion (Bar-Tal et al. 2023, arXiv 2302.08113) joins the steps of a diffusion model. Decoded windows are
blended.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

STRIDE = 0.5  # of a window's side


@dataclass(frozen=True, eq=False)
class Windows:
    """The windows over the parts of a grid that are wanted, and the cells that they cover."""

    shape: tuple[int, int]  # of the grid, (h, w)
    side: int  # g
    cells: Tensor  # (n, 2) long, in the order of the last window that sees them
    index: Tensor  # (v, g * g) long, into cells
    last: Tensor  # (n) long: the last window that sees each cell, never falling

    def __len__(self) -> int:
        return len(self.index)

    @property
    def place(self) -> Tensor:
        """Of each cell, as if windows lay side by side, its number in one: (n) long in 0..g*g-1."""
        rows, columns = (self.cells % self.side).T
        return rows * self.side + columns

    def gather(self, grid: np.ndarray) -> Tensor:
        """An array of the grid's pixels (h f, w f, c) -> those of the cells, (n, c, f, f)."""
        factor = grid.shape[0] // self.shape[0]
        split = grid.reshape(self.shape[0], factor, self.shape[1], factor, -1)
        rows, columns = self.cells.T.numpy()
        return torch.from_numpy(split[rows, :, columns]).permute(0, 3, 1, 2)

    def scatter(self, pixels: Tensor, grid: np.ndarray) -> None:
        """Writes those of the cells (n, c, f, f) into the grid's (h f, w f, c)."""
        factor = grid.shape[0] // self.shape[0]
        split = grid.reshape(self.shape[0], factor, self.shape[1], factor, -1)
        rows, columns = self.cells.T.numpy()
        split[rows, :, columns] = pixels.permute(0, 2, 3, 1).numpy()

    def images(self, pixels: Tensor, windows: Tensor) -> Tensor:
        """Pixels of the cells (n, c, f, f) -> what the `windows` (b) show, (b, c, g f, g f)."""
        b, side, (channels, factor) = len(windows), self.side, pixels.shape[1:3]
        parts = pixels[self.index[windows]].view(b, side, side, channels, factor, factor)
        return parts.permute(0, 3, 1, 4, 2, 5).reshape(b, channels, side * factor, side * factor)

    def to_cells(self, images: Tensor, factor: int) -> Tensor:
        """What windows show (b, c, g f, g f) -> their cells' pixels, (b g g, c, f, f)."""
        b, channels, side = len(images), images.shape[1], self.side
        parts = images.view(b, channels, side, factor, side, factor).permute(0, 2, 4, 1, 3, 5)
        return parts.reshape(b * side * side, channels, factor, factor)


def windows_over(wanted: np.ndarray, side: int) -> Windows:
    """The windows, `side` cells wide, that see a `wanted` cell of a grid (h, w) bool, none of whose sides is smaller.

    Raises ValueError for a smaller grid, or without a wanted cell.
    """
    height, width = wanted.shape
    if min(height, width) < side or not wanted.any():
        raise ValueError(f"expected a grid of at least {side}x{side} cells, some of them wanted, found "
                         f"{height}x{width}, {int(wanted.sum())} of them wanted")  # fmt: skip
    sums = np.pad(wanted.cumsum(axis=0).cumsum(axis=1), ((1, 0), (1, 0)))
    tops, lefts = (_starts(length, side) for length in (height, width))
    below, right = tops + side, lefts + side
    inside = sums[below][:, right] - sums[tops][:, right] - sums[below][:, lefts] + sums[tops][:, lefts]
    rows, columns = inside.nonzero()
    around = np.arange(side)
    where = (tops[rows, None] + around)[:, :, None] * width + (lefts[columns, None] + around)[:, None, :]  # (v, g, g)
    where = where.reshape(len(where), -1)
    last = np.full(height * width, -1)
    for window, cells in enumerate(where):
        last[cells] = window
    seen = (last >= 0).nonzero()[0]
    seen = seen[last[seen].argsort(kind="stable")]
    number = np.full(height * width, -1)
    number[seen] = np.arange(len(seen))
    cells = np.stack((seen // width, seen % width), axis=1)
    return Windows((height, width), side, *map(torch.from_numpy, (cells, number[where], last[seen])))


def _starts(length: int, side: int) -> np.ndarray:
    """Where windows begin along an axis: a stride apart, the last at its end."""
    return np.unique(np.append(np.arange(0, length - side, max(1, round(STRIDE * side))), length - side))


def blending(size: int) -> Tensor:
    """The weight of each pixel of a window (size, size), falling towards its border: (1, 1, size, size)."""
    ramp = torch.arange(size) + 0.5
    ramp = torch.minimum(ramp, size - ramp)
    return (ramp[:, None] * ramp)[None, None]


class WindowPredictor:
    """`predict` of `decoding.sample` for cells (b, n): mean logits over the windows that see a hidden cell.

    They come in chunks, as soon as the last window that sees their cells was looked through: what waits are the logits
    of about two rows of windows. `predict`: tokens (b, g * g) -> logits (m, k) of the hidden ones.
    """

    def __init__(self, windows: Windows, predict, mask_id: int, batch_size: int, device: torch.device):
        self.windows, self.predict, self.mask_id = windows, predict, mask_id
        self.batch_size = batch_size
        self.index, self.last = windows.index.to(device), windows.last.to(device)

    def __call__(self, tokens: Tensor) -> Iterator[Tensor]:
        for row in tokens:
            yield from self._of_picture(row)

    def _of_picture(self, tokens: Tensor) -> Iterator[Tensor]:
        hidden = tokens == self.mask_id  # (n)
        place, last = hidden.cumsum(dim=0) - 1, self.last[hidden]  # of a hidden cell among them, and its last window
        looked = hidden[self.index].any(dim=1).nonzero()[:, 0]
        sums, seen, done = None, None, 0  # of the logits of the hidden cells from number `done` on
        for windows in looked.split(self.batch_size):
            within = self.index[windows]  # (b, g * g)
            logits = self.predict(tokens[within]).float()  # (m', k)
            rows = place[within[hidden[within]]] - done  # (m')
            more = int(rows.max()) + 1
            if sums is None:
                sums, seen = logits.new_zeros(more, logits.shape[1]), logits.new_zeros(more)
            elif more > len(sums):
                sums, seen = (F.pad(x, (0, 0) * (x.ndim - 1) + (0, more - len(x))) for x in (sums, seen))
            sums.index_add_(0, rows, logits)
            seen.index_add_(0, rows, torch.ones_like(rows, dtype=seen.dtype))
            ready = int((last <= windows[-1]).sum()) - done
            if ready:
                yield sums[:ready] / seen[:ready, None]
                sums, seen, done = sums[ready:], seen[ready:], done + ready
