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

import classical
from config import ROOT, explain
from decoding import DecodingConfig
from inpainter import PRETRAINED, Inpainter
from inputs import GREY
from masks import composite
from models.base import Settings, file_hash
from utils import images_at_once, mix


class Row(Settings):
    """One way to fill holes."""

    name: str
    kind: Literal["masked", "telea", "navier_stokes", "biharmonic", "floor", "inpainting"] = Field(
        description="grey holes, a classical method, the decoded true tokens, or an Inpainter"
    )
    checkpoint: str = Field(str(PRETRAINED.relative_to(ROOT)), description="folder of weights: floor and inpainting")
    decoding: dict[str, object] = Field({}, description="changes of the checkpoint's decoding")
    margin: int = Field(0, ge=0, description="rings of tokens hidden around the hole")
    mean_of: int = Field(1, ge=1, description="the mean of so many completions")

    @property
    def has_networks(self) -> bool:
        return self.kind in ("floor", "inpainting")

    @pydantic.field_validator("decoding")
    @classmethod
    def _decodes(cls, given: dict[str, object]):
        try:
            DecodingConfig().changed(**given)
        except pydantic.ValidationError as error:
            raise ValueError(explain(error, DecodingConfig)) from error
        return given

    @pydantic.model_validator(mode="after")
    def _takes(self):
        needless = self.model_fields_set - {"name", "kind"} - ({"checkpoint"} if self.kind == "floor" else set())
        if self.kind != "inpainting" and needless:
            raise ValueError(f"row {self.name}: kind {self.kind} takes no {', '.join(sorted(needless))}")
        return self


def decoding_of(row: Row, inpainter: Inpainter) -> DecodingConfig:
    """The checkpoint's decoding with the row's changes. Raises ValueError naming the row."""
    try:
        return inpainter.decoding.changed(**row.decoding)
    except pydantic.ValidationError as error:
        raise ValueError(f"row {row.name}: {explain(error, DecodingConfig)}") from error


def needs_seed(row: Row, inpainter: Inpainter | None) -> bool:
    """Whether two decoding seeds may give two results."""
    return row.kind == "inpainting" and decoding_of(row, inpainter).needs_seed


def settings_of(row: Row, inpainter: Inpainter | None) -> dict:
    """All that the row's result depends on, beside images, hole and seed."""
    settings = {"kind": row.kind}
    if row.has_networks:
        names = ("vqgan", "transformer") if row.kind == "inpainting" else ("vqgan",)
        files = {name: Path(row.checkpoint) / f"{name}.safetensors" for name in names}
        settings["weights"] = {name: file_hash(file)[:16] for name, file in files.items()}
    if row.kind == "inpainting":
        settings |= row.model_dump(exclude={"name", "kind", "checkpoint"})
        settings["decoding"] = decoding_of(row, inpainter).model_dump()
    return settings


@dataclass(frozen=True, eq=False)
class Result:
    """What a row makes of the holes of N images."""

    images: Tensor  # (N, 3, H, W) uint8, known pixels as they were
    raw: Tensor | None = None  # (N, 3, H, W) uint8: the decoder's pixels everywhere
    tokens: Tensor | None = None  # (N, n), of kind floor


def fill(row: Row, inpainter: Inpainter | None, truth: Tensor, hole: Tensor, seed: int | None, workers: int) -> Result:
    """The row's way: from the known pixels of `truth`, but for kind floor, which decodes the true tokens.

    `workers`: processes of a classical method.
    """
    masked = truth.masked_fill(hole, GREY)
    if row.kind == "masked":
        return Result(masked)
    if row.kind in classical.METHODS:
        return Result(composite(classical.fill(row.kind, masked, hole, workers), truth, hole))
    if row.kind == "floor":
        raw, tokens = _floor(inpainter, truth, masked, hole)
        return Result(composite(raw, truth, hole), raw, tokens)
    raw = _inpaint(row, inpainter, masked, hole, seed or 0)
    return Result(composite(raw, truth, hole), raw)


def _batches(inpainter: Inpainter, *tensors: Tensor) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
    """The number of its first image and each batch."""
    size = images_at_once(inpainter.device)
    for start in range(0, len(tensors[0]), size):
        yield start, tuple(tensor[start : start + size] for tensor in tensors)


def _floor(inpainter: Inpainter, truth: Tensor, masked: Tensor, hole: Tensor) -> tuple[Tensor, Tensor]:
    """The decoded true tokens, uint8 (N, 3, H, W), and the tokens (N, n)."""
    raw, tokens = [], []
    for _, (whole, images, missing) in _batches(inpainter, truth, masked, hole):
        tokens.append(inpainter.encode(whole, torch.zeros_like(missing)))
        raw.append(inpainter.decode(tokens[-1], images, missing))
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
