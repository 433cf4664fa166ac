"""What `inpainting.py` counts: the rows of its table."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from data import to_float
from metrics import diversity, hole_psnr


@dataclass
class Tally:
    """Sums over the images of a group, for its row of the table."""

    images: int = 0
    missing: float = 0.0  # shares of pixels
    scored: int = 0  # images with a hole whose truth is known
    psnr: float = 0.0  # in dB, in the hole
    compared: int = 0  # images with a hole and several completions
    distance: float = 0.0  # their diversity, see metrics

    def add(self, hole: Tensor, filled: Tensor, truth: Tensor | None, spread: Tensor | None) -> None:
        """Counts images (b, 3, H, W) uint8; `spread` (b,) is their diversity."""
        self.images += len(hole)
        self.missing += float(hole.float().mean(dim=(1, 2, 3)).sum())
        some = hole.flatten(1).any(dim=1)
        if truth is not None and some.any():
            self.scored += int(some.sum())
            self.psnr += float(hole_psnr(to_float(filled[some]), to_float(truth[some]), hole[some]).sum())
        if spread is not None:
            self.compared += int(some.sum())
            self.distance += float(spread[some].sum())

    @property
    def diversity(self) -> float | None:
        """The mean over images with a hole; None where it was not measured."""
        return self.distance / self.compared if self.compared else None

    def row(self, group: str, samples: int = 1) -> str:
        quality = f"{self.psnr / self.scored:.2f}" if self.scored else "-"
        line = f"{group:<10} {self.images:>4} {100 * self.missing / self.images:>7.1f} {quality:>13}"
        spread = "-" if self.diversity is None else f"{self.diversity:.4f}"
        return f"{line} {spread:>10}" if samples > 1 else line


def spread_of(completions: list[Tensor], distance: Callable | None, device: torch.device) -> Tensor | None:
    """The diversity (b,) of uint8 completions (b, 3, H, W), at least two; None without a `distance`."""
    if distance is None or len(completions) < 2:
        return None
    with torch.no_grad():
        return diversity(torch.stack([to_float(images.to(device)) for images in completions], dim=1), distance).cpu()
