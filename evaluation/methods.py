"""What a sweep compares: ways to fill holes, their settings and `complete`.

truth (N, 3, H, W) uint8, hole (N, 1, H, W) bool (True = missing), tokens (N, n).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pydantic
import torch
from PIL import Image
from pydantic import Field
from torch import Tensor

from maskgit import classical
from maskgit.completion import Codec
from maskgit.data import GREY
from maskgit.decoding_config import DecodingConfig
from maskgit.inpainter import CATS, Inpainter
from maskgit.masks import composite
from models.checkpoint import file_hash
from models.settings import Settings
from models.vqgan import VQGAN
from photos.fill import fill_photo
from photos.photo import read_photo
from utils import ROOT, images_at_once, mix, uses_bfloat16

NETWORKS = ("vqgan", "transformer")
LATER = {"guess": "navier_stokes", "rim": 0.0, "self_ensemble": False}  # of decoding: before there was a choice
DRAWS = 2  # the rule by which a seed becomes draws, counted up when the same seed comes to give another result
RINGS = 4  # of tokens around a hole in which the leak is measured
FORMER_KINDS = {"floor": "vq_reconstruction"}  # as configs and rows.csv called them before


class Method(Settings):
    """One way to fill holes."""

    name: str
    kind: Literal[
        "masked", "telea", "navier_stokes", "biharmonic", "fsr", "vq_reconstruction", "one_pass", "inpainting"
    ] = Field(
        description="grey holes, a classical method, the true (oracle) tokens decoded, a decoder that was trained with "
        "vqgan_training.blank, or an Inpainter"
    )
    checkpoint: str = Field(
        str(CATS.relative_to(ROOT)), description="folder of weights: vq_reconstruction, one_pass and inpainting"
    )
    vqgan: str = Field("", description="a VQGAN of the same tokens in place of the checkpoint's: its file")
    decoding: dict[str, object] = Field(
        {},
        description="changes of the checkpoint's decoding; of one_pass rim, and, as in training, token_rule, pre_fill",
    )
    tiling: Literal["squares", "windows"] = Field(
        "windows", description="of whole photographs: windows at their own scale, or squares shrunk to the model's size"
    )
    coarse: bool = Field(True, description="of windows: thick holes at smaller scales first")
    margin: int = Field(0, ge=0, description="rings of tokens hidden around the hole")
    mean_of: int = Field(1, ge=1, description="the mean of so many completions")
    made_by: str = Field("", description="the command that makes its weights, told where they are missing")

    @property
    def files(self) -> tuple[Path, ...]:
        """The weights it needs: none, a VQGAN, or a VQGAN and a transformer."""
        files = [Path(self.checkpoint) / f"{name}.safetensors" for name in NETWORKS]
        if self.vqgan:
            files[0] = Path(self.vqgan)
        return tuple(files[: {"vq_reconstruction": 1, "one_pass": 1, "inpainting": 2}.get(self.kind, 0)])

    @property
    def missing(self) -> list[Path]:
        """Those of its weights that are not there."""
        return [file for file in self.files if not file.is_file()]

    def open(self, device: str, precision: str = "auto") -> Codec | None:
        """Its networks, an `Inpainter` where it decodes. Raises FileNotFoundError or ValueError naming the file."""
        if self.kind == "inpainting":
            return Inpainter.from_pretrained(self.checkpoint, device, precision, vqgan=self.files[0])
        return Codec(VQGAN.load(self.files[0]), device, precision) if self.files else None

    @pydantic.field_validator("kind", mode="before")
    @classmethod
    def _named_as_now(cls, kind: object):
        return FORMER_KINDS.get(kind, kind) if isinstance(kind, str) else kind

    @pydantic.field_validator("decoding")
    @classmethod
    def _decodes(cls, given: dict[str, object]):
        DecodingConfig().changed(**given)
        return given

    @pydantic.model_validator(mode="after")
    def _takes(self):
        taken = {"name", "kind"}
        if self.kind in ("vq_reconstruction", "one_pass"):
            taken |= {"checkpoint", "vqgan", "made_by"}
        if self.kind == "one_pass":
            taken |= {"decoding"}
        needless = self.model_fields_set - taken
        if self.tiling == "squares" and "coarse" in self.model_fields_set:
            raise ValueError(f"method {self.name}: coarse is of windows, not of squares")
        if self.kind != "inpainting" and needless:
            raise ValueError(f"method {self.name}: kind {self.kind} takes no {', '.join(sorted(needless))}")
        return self


def decoding_of(method: Method, inpainter: Inpainter) -> DecodingConfig:
    """The checkpoint's decoding with the method's changes. Raises ValueError naming the method."""
    try:
        return inpainter.decoding.changed(**method.decoding)
    except ValueError as error:
        raise ValueError(f"method {method.name}: {error}") from error


def needs_seed(method: Method, networks: Codec | None) -> bool:
    """Whether two decoding seeds may give two results."""
    return method.kind == "inpainting" and decoding_of(method, networks).needs_seed


def settings_of(method: Method, networks: Codec | None) -> dict:
    """All that the method's result depends on, beside images, hole and seed."""
    settings = {"kind": method.kind}
    if networks is not None:
        settings["weights"] = {name: file_hash(file)[:16] for name, file in zip(NETWORKS, method.files, strict=False)}
        settings |= arithmetic(networks.device, networks.precision)
    if method.kind == "inpainting":
        settings |= method.model_dump(include={"margin", "mean_of"})
        settings["decoding"] = decoding_of(method, networks).model_dump()
        if needs_seed(method, networks):
            settings["draws"] = DRAWS
    if method.kind == "one_pass":
        decoding = DecodingConfig().changed(**method.decoding)
        settings["decoding"] = decoding.model_dump(include={"token_rule", "pre_fill", "rim"})
    for key, value in LATER.items():
        if settings.get("decoding", {}).get(key) == value:
            del settings["decoding"][key]
    return settings


def arithmetic(device: torch.device, precision: str) -> dict[str, str]:
    """The kind of device, and the precision in which networks run there."""
    return {"device": device.type, "precision": "bfloat16" if uses_bfloat16(device, precision) else "float32"}


@dataclass(frozen=True, eq=False)
class Completion:
    """What a method makes of the holes of N images."""

    images: Tensor  # (N, 3, H, W) uint8, known pixels as they were
    raw: Tensor | None = None  # (N, 3, H, W) uint8: the decoder's pixels everywhere
    tokens: Tensor | None = None  # (N, n), of kind vq_reconstruction


def complete(
    method: Method, networks: Codec | None, truth: Tensor, hole: Tensor, seed: int | None, workers: int
) -> Completion:
    """The method's way: from the known pixels of `truth`, but for kind vq_reconstruction, which decodes its tokens.

    Image i takes the seed mix(seed, i), whatever the number of images. `workers`: processes of a classical method.
    """
    masked = truth.masked_fill(hole, GREY)
    if method.kind == "masked":
        return Completion(masked)
    if method.kind in classical.METHODS:
        return Completion(composite(classical.fill(method.kind, masked, hole, workers), truth, hole))
    if method.kind == "vq_reconstruction":
        raw, tokens = _reconstruct(networks, truth, masked, hole)
        return Completion(composite(raw, truth, hole), raw, tokens)
    if method.kind == "one_pass":
        decoding = DecodingConfig().changed(**method.decoding)
        raw = _one_pass(networks, masked, hole, decoding)
        return Completion(classical.smooth_rims(composite(raw, truth, hole), hole, decoding.rim), raw)
    seeds = [mix(seed or 0, index) for index in range(len(truth))]
    result = networks.complete(
        masked, hole, seeds, samples=method.mean_of, margin=method.margin, decoding=decoding_of(method, networks)
    )
    filled, raw = (
        pictures.unflatten(0, (-1, method.mean_of)).float().mean(dim=1).round().to(torch.uint8)
        for pictures in (result.images, result.raw)
    )
    return Completion(composite(filled, truth, hole), raw)


def complete_photo(
    method: Method, networks: Inpainter | None, pixels: np.ndarray, hole: np.ndarray, seed: int
) -> np.ndarray:
    """The method's way with a photograph (H, W, 3) uint8 of any size, whose hole (H, W) bool it does not see: that of a
    classical method or of kind inpainting."""
    masked = np.where(hole[..., None], np.uint8(GREY), pixels)
    if method.kind in classical.METHODS:
        return np.where(hole[..., None], classical.METHODS[method.kind](masked, hole), pixels)
    photo = read_photo(Image.fromarray(masked), mask=Image.fromarray(np.where(hole, 0, 255).astype(np.uint8)))
    options = {"tiling": method.tiling, "coarse": method.coarse, "margin": method.margin}
    completions, _ = fill_photo(networks, photo, seed, method.mean_of, decoding_of(method, networks), **options)
    return np.mean(completions, axis=0).round().astype(np.uint8)


def leak(codec: Codec, tokens: Tensor, truth: Tensor, hole: Tensor) -> dict[str, float]:
    """How far the encoder carries what is in the hole: the share of known tokens that change when it is painted grey.

    `tokens` (N, n) on the CPU are those of the whole images. `leak` of all tokens with no missing pixel, `leak R` of
    those R tokens from the nearest with one, up to RINGS.
    """
    grey = torch.cat(
        [codec.encode(images.masked_fill(missing, GREY)) for images, missing in _batches(codec, truth, hole)]
    )
    changed, reached = grey.cpu() != tokens, [codec.hide(hole, margin).cpu() for margin in range(RINGS + 1)]
    places = {"leak": ~reached[0]}
    places |= {f"leak {ring}": reached[ring] & ~reached[ring - 1] for ring in range(1, RINGS + 1)}
    return {name: float(changed[place].float().mean()) for name, place in places.items() if place.any()}


def _batches(codec: Codec, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(tensor.split(images_at_once(codec.device)) for tensor in tensors), strict=True)


def _reconstruct(codec: Codec, truth: Tensor, masked: Tensor, hole: Tensor) -> tuple[Tensor, Tensor]:
    """The decoded true tokens, uint8 (N, 3, H, W), and the tokens (N, n)."""
    raw, tokens = [], []
    guessed = codec.vqgan.config.decoder.pre_filled
    for whole, images, missing in _batches(codec, truth, masked, hole):
        tokens.append(codec.encode(whole))
        raw.append(codec.decode(tokens[-1], classical.paint(images, missing, guessed), missing))
    return torch.cat(raw), torch.cat(tokens).cpu()


def _one_pass(codec: Codec, masked: Tensor, hole: Tensor, decoding: DecodingConfig) -> Tensor:
    """The known tokens decoded beside the known pixels, the hidden ones as zero vectors: uint8 (N, 3, H, W)."""
    raw = []
    for images, missing in _batches(codec, masked, hole):
        painted = classical.paint(images, missing, decoding.pre_fill)
        hidden = codec.hide(missing, rule=decoding.token_rule)
        codes = codec.codebook[codec.encode(painted)].masked_fill(hidden[..., None], 0)  # (b, n, e)
        raw.append(codec.decode(codes, painted, missing))
    return torch.cat(raw)
