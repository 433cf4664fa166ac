"""The rows of a sweep: ways to fill holes, their settings and `fill`.

truth (N, 3, H, W) uint8, hole (N, 1, H, W) bool (True = missing), tokens (N, n).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pydantic
import torch
from pydantic import Field
from torch import Tensor

from maskgit import classical
from maskgit.data import GREY
from maskgit.decoding import DecodingConfig
from maskgit.inpainter import PRETRAINED, Codec, Inpainter
from maskgit.masks import composite
from models.checkpoint import file_hash
from models.settings import Settings
from models.vqgan import VQGAN
from utils import ROOT, images_at_once, mix

NETWORKS = ("vqgan", "transformer")
RINGS = 4  # of tokens around a hole in which the leak is measured


class Row(Settings):
    """One way to fill holes."""

    name: str
    kind: Literal["masked", "telea", "navier_stokes", "biharmonic", "floor", "inpainting"] = Field(
        description="grey holes, a classical method, the decoded true tokens, or an Inpainter"
    )
    checkpoint: str = Field(str(PRETRAINED.relative_to(ROOT)), description="folder of weights: floor and inpainting")
    vqgan: str = Field("", description="a VQGAN of the same tokens in place of the checkpoint's: its file")
    decoding: dict[str, object] = Field({}, description="changes of the checkpoint's decoding")
    margin: int = Field(0, ge=0, description="rings of tokens hidden around the hole")
    mean_of: int = Field(1, ge=1, description="the mean of so many completions")

    @property
    def files(self) -> tuple[Path, ...]:
        """The weights it needs: none, a VQGAN, or a VQGAN and a transformer."""
        files = [Path(self.checkpoint) / f"{name}.safetensors" for name in NETWORKS]
        if self.vqgan:
            files[0] = Path(self.vqgan)
        return tuple(files[: {"floor": 1, "inpainting": 2}.get(self.kind, 0)])

    def open(self, device: str) -> Codec | None:
        """Its networks, an `Inpainter` where it decodes. Raises FileNotFoundError or ValueError naming the file."""
        if self.kind == "inpainting":
            return Inpainter.from_pretrained(self.checkpoint, device, vqgan=self.files[0])
        return Codec(VQGAN.load(self.files[0]), device) if self.kind == "floor" else None

    @pydantic.field_validator("decoding")
    @classmethod
    def _decodes(cls, given: dict[str, object]):
        DecodingConfig().changed(**given)
        return given

    @pydantic.model_validator(mode="after")
    def _takes(self):
        taken = {"name", "kind"} | ({"checkpoint", "vqgan"} if self.kind == "floor" else set())
        needless = self.model_fields_set - taken
        if self.kind != "inpainting" and needless:
            raise ValueError(f"row {self.name}: kind {self.kind} takes no {', '.join(sorted(needless))}")
        return self


def decoding_of(row: Row, inpainter: Inpainter) -> DecodingConfig:
    """The checkpoint's decoding with the row's changes. Raises ValueError naming the row."""
    try:
        return inpainter.decoding.changed(**row.decoding)
    except ValueError as error:
        raise ValueError(f"row {row.name}: {error}") from error


def needs_seed(row: Row, networks: Codec | None) -> bool:
    """Whether two decoding seeds may give two results."""
    return row.kind == "inpainting" and decoding_of(row, networks).needs_seed


def settings_of(row: Row, networks: Codec | None) -> dict:
    """All that the row's result depends on, beside images, hole and seed."""
    settings = {"kind": row.kind}
    if row.files:
        settings["weights"] = {name: file_hash(file)[:16] for name, file in zip(NETWORKS, row.files, strict=False)}
    if row.kind == "inpainting":
        settings |= row.model_dump(exclude={"name", "kind", "checkpoint", "vqgan"})
        settings["decoding"] = decoding_of(row, networks).model_dump()
    return settings


@dataclass(frozen=True, eq=False)
class Result:
    """What a row makes of the holes of N images."""

    images: Tensor  # (N, 3, H, W) uint8, known pixels as they were
    raw: Tensor | None = None  # (N, 3, H, W) uint8: the decoder's pixels everywhere
    tokens: Tensor | None = None  # (N, n), of kind floor


def fill(row: Row, networks: Codec | None, truth: Tensor, hole: Tensor, seed: int | None, workers: int) -> Result:
    """The row's way: from the known pixels of `truth`, but for kind floor, which decodes the true tokens.

    `workers`: processes of a classical method.
    """
    masked = truth.masked_fill(hole, GREY)
    if row.kind == "masked":
        return Result(masked)
    if row.kind in classical.METHODS:
        return Result(composite(classical.fill(row.kind, masked, hole, workers), truth, hole))
    if row.kind == "floor":
        raw, tokens = _floor(networks, truth, masked, hole)
        return Result(composite(raw, truth, hole), raw, tokens)
    raw = _inpaint(row, networks, masked, hole, seed or 0)
    return Result(composite(raw, truth, hole), raw)


def leak(codec: Codec, tokens: Tensor, truth: Tensor, hole: Tensor) -> dict[str, float]:
    """How far the encoder carries what is in the hole: the share of known tokens that change when it is painted grey.

    `tokens` (N, n) on the CPU are those of the whole images. `leak` of all tokens with no missing pixel, `leak R` of
    those R tokens from the nearest with one, up to RINGS.
    """
    grey = torch.cat([codec.encode(*batch) for _, batch in _batches(codec, truth, hole)]).cpu()
    changed, reached = grey != tokens, [codec.hide(hole, margin).cpu() for margin in range(RINGS + 1)]
    places = {"leak": ~reached[0]}
    places |= {f"leak {ring}": reached[ring] & ~reached[ring - 1] for ring in range(1, RINGS + 1)}
    return {name: float(changed[place].float().mean()) for name, place in places.items() if place.any()}


def _batches(codec: Codec, *tensors: Tensor) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
    """The number of its first image and each batch."""
    size = images_at_once(codec.device)
    for start in range(0, len(tensors[0]), size):
        yield start, tuple(tensor[start : start + size] for tensor in tensors)


def _floor(codec: Codec, truth: Tensor, masked: Tensor, hole: Tensor) -> tuple[Tensor, Tensor]:
    """The decoded true tokens, uint8 (N, 3, H, W), and the tokens (N, n)."""
    raw, tokens = [], []
    for _, (whole, images, missing) in _batches(codec, truth, masked, hole):
        tokens.append(codec.encode(whole, torch.zeros_like(missing)))
        raw.append(codec.decode(tokens[-1], images, missing))
    return torch.cat(raw), torch.cat(tokens).cpu()


def _inpaint(row: Row, inpainter: Inpainter, masked: Tensor, hole: Tensor, seed: int) -> Tensor:
    """The decoder's output, uint8 (N, 3, H, W): the mean of `mean_of` completions.

    Image i's draws are a function of (seed, i, completion), whatever the number of images.
    """
    decoding, done = decoding_of(row, inpainter), []
    for start, (images, missing) in _batches(inpainter, masked, hole):
        total = torch.zeros(images.shape)
        for completion in range(row.mean_of):
            seeds = [mix(seed, start + index, completion) for index in range(len(images))]
            *_, last = inpainter.steps(images, missing, seeds, row.margin, decoding)
            total += inpainter.finish(images, missing, last.tokens).raw
        done.append((total / row.mean_of).round().to(torch.uint8))
    return torch.cat(done)
