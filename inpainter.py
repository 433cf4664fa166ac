"""`Inpainter`: a trained VQGAN and transformer that fill the holes of images.

    Inpainter.from_pretrained("pretrained/cats64")(images, hole)

Shapes: images (b, 3, H, W) uint8, hole (b, 1, H, W) bool (True = missing), tokens and hidden (b, n).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import classical
from config import ROOT
from data import to_float, to_uint8
from decoding import DecodingConfig, State, sample
from inputs import GREY
from masks import composite, to_hidden
from models.base import file_hash, read_weights
from models.transformer import Transformer
from models.vqgan import VQGAN
from utils import autocast, memory_format, pick_device

PRETRAINED = ROOT / "pretrained" / "cats64"


@dataclass(frozen=True, eq=False)
class Filled:
    """What an `Inpainter` returns."""

    images: Tensor  # (b, 3, H, W) uint8: the decoder's pixels in the hole, the given ones byte-identical elsewhere
    raw: Tensor  # (b, 3, H, W) uint8: the decoder's pixels everywhere
    tokens: Tensor  # (b, n) long


class Inpainter:
    """A frozen VQGAN and transformer that fill holes; the same seed gives the same tokens, whatever the batch."""

    def __init__(
        self,
        vqgan: VQGAN,
        transformer: Transformer,
        decoding: DecodingConfig,
        device="auto",
        precision="auto",
        compiled=False,
    ):
        made = vqgan.config.grid**2, vqgan.config.codebook.codes
        taken = transformer.config.tokens, transformer.config.codes
        if made != taken:
            raise ValueError(f"(tokens, codes): the VQGAN makes {made}, the transformer takes {taken}")
        self.device, self.precision, self.decoding = pick_device(device), precision, decoding
        self.layout = memory_format(self.device, precision)
        self.vqgan = vqgan.to(self.device, memory_format=self.layout).eval().requires_grad_(False)
        self.transformer = transformer.to(self.device).eval().requires_grad_(False)
        self.size = vqgan.config.image_size
        if compiled:
            for network in (self.transformer, self.vqgan.decoder):
                network.compile(dynamic=True)  # batches shrink and hidden tokens dwindle

    @classmethod
    def from_pretrained(cls, folder=PRETRAINED, device="auto", precision="auto", compiled=False) -> "Inpainter":
        """The weights in `folder`: vqgan.safetensors and transformer.safetensors, as the two trainings leave them.

        `precision` is auto (bfloat16 where the device has it), float32 or bfloat16; `compiled` runs both networks
        through torch.compile. Raises FileNotFoundError, or ValueError naming the file that does not fit.
        """
        paths = [Path(folder) / f"{name}.safetensors" for name in ("vqgan", "transformer")]
        vqgan, transformer = VQGAN.load(paths[0]), Transformer.load(paths[1])
        notes = read_weights(paths[1])[1]
        if not {"vqgan", "decoding"} <= notes.keys():
            raise ValueError(f"{paths[1]}: its metadata lack vqgan or decoding, which training_transformer.py notes")
        if notes["vqgan"] not in (vqgan.tokens_key(), file_hash(paths[0])):  # the first weights noted the file's hash
            raise ValueError(f"{paths[1]}: was trained on the tokens of another VQGAN than {paths[0]}")
        decoding = DecodingConfig.model_validate_json(notes["decoding"])
        return cls(vqgan, transformer, decoding, device, precision, compiled)

    def hide(self, hole: Tensor, margin: int = 0, rule: str = "any") -> Tensor:
        """hole (b, 1, H, W) -> hidden (b, n): tokens with a missing pixel, grown by `margin` rings.

        With the rule `majority`: tokens with more missing than known pixels.
        """
        return to_hidden(hole, self.vqgan.config.grid, margin, rule).to(self.device)

    @torch.no_grad()
    def encode(self, images: Tensor, hole: Tensor, pre_fill: bool = False) -> Tensor:
        """uint8 images -> tokens (b, n) of the images with their holes painted grey, in float32.

        `pre_fill` paints the holes by Navier-Stokes inpainting instead.
        """
        painted = images.masked_fill(hole, GREY)
        if pre_fill:
            painted = classical.fill("navier_stokes", painted, hole)
        return self.vqgan.encode(to_float(painted).to(self.device, memory_format=self.layout))

    def predict(self, tokens: Tensor) -> Tensor:
        """tokens (b, n), mask_id where hidden -> logits (m, k) of the hidden ones."""
        with autocast(self.device, self.precision):
            return self.transformer.of_hidden(tokens)

    @torch.no_grad()
    def decode(self, tokens: Tensor, images: Tensor, hole: Tensor) -> Tensor:
        """tokens (b, n) -> uint8 images (b, 3, H, W) on the CPU; some decoders read the known pixels of `images`."""
        known = to_float(images).to(self.device, memory_format=self.layout)
        with autocast(self.device, self.precision):
            return to_uint8(self.vqgan.decode(tokens, known, hole.to(self.device))).cpu()

    def steps(
        self,
        images: Tensor,
        hole: Tensor,
        seeds: Sequence[int],
        margin: int = 0,
        decoding: DecodingConfig | None = None,
        token_rule: str = "any",
        pre_fill: bool = False,
    ) -> Iterator[State]:
        """Decodes iteratively, a State after each iteration; `seeds` holds one integer >= 0 an image.

        `margin` and `token_rule` as for `hide`, `pre_fill` as for `encode`.
        Raises ValueError where shapes or dtypes do not fit.
        """
        shape = (len(images), 3, self.size, self.size)
        if images.dtype != torch.uint8 or images.shape != shape:
            raise ValueError(f"images: expected uint8 {shape}, found {images.dtype} {tuple(images.shape)}")
        if hole.dtype != torch.bool or hole.shape != (len(images), 1, self.size, self.size):
            raise ValueError(f"hole: expected bool (b, 1, {self.size}, {self.size}), found {hole.dtype} {hole.shape}")
        tokens, hidden = self.encode(images, hole, pre_fill), self.hide(hole, margin, token_rule)
        return sample(self.predict, tokens, hidden, self.transformer.mask_id, decoding or self.decoding, seeds)

    def finish(self, images: Tensor, hole: Tensor, tokens: Tensor) -> Filled:
        """Decodes the final tokens and pastes the known pixels back."""
        raw = self.decode(tokens, images, hole)
        return Filled(composite(raw, images, hole), raw, tokens)

    def __call__(
        self,
        images: Tensor,
        hole: Tensor,
        seeds: Sequence[int] | int = 0,
        margin: int = 0,
        decoding: DecodingConfig | None = None,
        token_rule: str = "any",
        pre_fill: bool = False,
    ) -> Filled:
        """images uint8 (b, 3, H, W) and hole bool (b, 1, H, W) -> `Filled`.

        `seeds`: one integer >= 0 an image, or one for all: image i then takes seed + i. The others as for `steps`.
        """
        if isinstance(seeds, int):
            seeds = range(seeds, seeds + len(images))
        *_, last = self.steps(images, hole, seeds, margin, decoding, token_rule, pre_fill)
        return self.finish(images, hole, last.tokens)
