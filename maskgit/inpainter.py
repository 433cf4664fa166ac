"""`Inpainter`: a trained VQGAN and transformer that fill the holes of images; `Codec`: the VQGAN alone.

    filled = Inpainter.from_pretrained("pretrained/cats64")(images, hole, steps=10, schedule="cosine", seed=0)
    filled.pictures[0].save("filled.png")

Shapes: images (b, 3, H, W) uint8, hole (b, 1, H, W) bool (True = missing), tokens and hidden (b, n). A call also takes
PIL pictures and numpy arrays; the other methods take tensors of these shapes.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path

import numpy as np
import pydantic
import torch
from PIL import Image, ImageOps
from torch import Tensor

from maskgit.classical import paint
from maskgit.data import as_hole, as_image, to_float, to_pixels, to_uint8
from maskgit.decoding import DecodingConfig, State, sample
from maskgit.masks import composite, to_hidden
from models.checkpoint import file_hash, read_weights
from models.settings import explain, in_brief
from models.transformer import Transformer
from models.vqgan import VQGAN
from utils import ROOT, autocast, memory_format, mix, pick_device

PRETRAINED = ROOT / "pretrained" / "cats64"


@dataclass(frozen=True, eq=False)
class Filled:
    """What an `Inpainter` returns."""

    images: Tensor  # (b, 3, H, W) uint8: the decoder's pixels in the hole, the given ones byte-identical elsewhere
    raw: Tensor  # (b, 3, H, W) uint8: the decoder's pixels everywhere
    tokens: Tensor  # (b, n) long
    confidence: Tensor | None = None  # (b, n) in [0, 1]: the probability of each code when it was decided, 1 if known

    @property
    def pictures(self) -> list[Image.Image]:
        """`images` as PIL pictures."""
        return [Image.fromarray(to_pixels(image)) for image in self.images]


def sample_seed(seed: int, number: int) -> int:
    """The seed of completion `number` of an image: `seed` itself for the first, 0."""
    return mix(seed, number) if number else seed


class Codec:
    """A frozen VQGAN between uint8 images and tokens."""

    def __init__(self, vqgan: VQGAN, device="auto", precision="auto"):
        self.device, self.precision = pick_device(device), precision
        self.layout = memory_format(self.device, precision)
        self.vqgan = vqgan.to(self.device, memory_format=self.layout).eval().requires_grad_(False)
        self.size = vqgan.config.image_size

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
        painted = paint(images, hole, pre_fill)
        return self.vqgan.encode(to_float(painted).to(self.device, memory_format=self.layout))

    def blank(self) -> Tensor:
        """The tokens (1, n) of a grey image: what pictures of an iteration show where a token is hidden."""
        everything = torch.ones(1, 1, self.size, self.size, dtype=torch.bool)
        return self.encode(torch.zeros(1, 3, self.size, self.size, dtype=torch.uint8), everything)

    @torch.no_grad()
    def decode(self, tokens: Tensor, images: Tensor, hole: Tensor) -> Tensor:
        """tokens (b, n) -> uint8 images (b, 3, H, W) on the CPU; some decoders read the known pixels of `images`."""
        known = to_float(paint(images, hole, self.vqgan.config.decoder.pre_filled)).to(
            self.device, memory_format=self.layout
        )
        with autocast(self.device, self.precision):
            return to_uint8(self.vqgan.decode(tokens, known, hole.to(self.device))).cpu()


class Inpainter(Codec):
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
        super().__init__(vqgan, device, precision)
        self.decoding = decoding
        self.transformer = transformer.to(self.device).eval().requires_grad_(False)
        if compiled:
            for network in (self.transformer, self.vqgan.decoder):
                network.compile(dynamic=True)  # batches shrink and hidden tokens dwindle

    @classmethod
    def from_pretrained(
        cls, folder=PRETRAINED, device="auto", precision="auto", compiled=False, vqgan=None
    ) -> "Inpainter":
        """The weights in `folder`: vqgan.safetensors and transformer.safetensors, as the two trainings leave them.

        `vqgan` is a file to take in place of the folder's, of the same tokens: another decoder. `precision` is auto
        (bfloat16 where the device has it), float32 or bfloat16; `compiled` runs both networks through torch.compile.
        Raises FileNotFoundError, or ValueError naming the file that does not fit.
        """
        if not Path(folder).is_dir():
            raise FileNotFoundError(f"{folder}: expected a folder with vqgan.safetensors and transformer.safetensors")
        paths = [Path(vqgan or Path(folder) / "vqgan.safetensors"), Path(folder) / "transformer.safetensors"]
        vqgan, transformer = VQGAN.load(paths[0]), Transformer.load(paths[1])
        notes = read_weights(paths[1])[1]
        if not {"vqgan", "decoding"} <= notes.keys():
            raise ValueError(f"{paths[1]}: its metadata lack vqgan or decoding, which training_transformer.py notes")
        if notes["vqgan"] not in (vqgan.tokens_key(), file_hash(paths[0])):  # the first weights noted the file's hash
            raise ValueError(f"{paths[1]}: was trained on the tokens of another VQGAN than {paths[0]}")
        try:
            decoding = DecodingConfig.model_validate_json(notes["decoding"])
        except pydantic.ValidationError as error:
            raise ValueError(f"{paths[1]}: its decoding: {in_brief(explain(error, DecodingConfig))}") from error
        return cls(vqgan, transformer, decoding, device, precision, compiled)

    def predict(self, tokens: Tensor) -> Tensor:
        """tokens (b, n), mask_id where hidden -> logits (m, k) of the hidden ones."""
        with autocast(self.device, self.precision):
            return self.transformer.of_hidden(tokens)

    def steps(
        self,
        images: Tensor,
        hole: Tensor,
        seeds: Sequence[int],
        margin: int = 0,
        decoding: DecodingConfig | None = None,
    ) -> Iterator[State]:
        """Decodes iteratively, a State after each iteration; `seeds` holds one integer >= 0 an image.

        Raises ValueError where shapes or dtypes do not fit.
        """
        shape = (len(images), 3, self.size, self.size)
        if images.dtype != torch.uint8 or images.shape != shape:
            raise ValueError(f"images: expected uint8 {shape}, found {images.dtype} {tuple(images.shape)}")
        shape = (len(images), 1, self.size, self.size)
        if hole.dtype != torch.bool or hole.shape != shape:
            raise ValueError(f"hole: expected bool {shape}, found {hole.dtype} {tuple(hole.shape)}")
        decoding = decoding or self.decoding
        tokens = self.encode(images, hole, decoding.pre_fill)
        hidden = self.hide(hole, margin, decoding.token_rule)
        return sample(self.predict, tokens, hidden, self.transformer.mask_id, decoding, seeds)

    def finish(self, images: Tensor, hole: Tensor, tokens: Tensor, confidence: Tensor | None = None) -> Filled:
        """Decodes the final tokens and pastes the known pixels back; `confidence` is that of the last State."""
        raw = self.decode(tokens, images, hole)
        return Filled(composite(raw, images, hole), raw, tokens, confidence)

    def __call__(
        self,
        images,
        hole,
        *,
        seed: int | Sequence[int] = 0,
        steps: int | None = None,
        schedule: str | None = None,
        sweet_spot: int | None = None,
        sampler: str | None = None,
        temperature: float | None = None,
        sampling_temperature: float | None = None,
        top_k: int | None = None,
        forget: bool | None = None,
        second_look: float | None = None,
        token_rule: str | None = None,
        pre_fill: bool | None = None,
        margin: int = 0,
        samples: int = 1,
    ) -> Filled:
        """Fills the holes of one picture or of a batch of the model's size.

        images: PIL pictures, uint8 arrays (H, W, 3) or (b, H, W, 3), or tensors (3, H, W) or (b, 3, H, W), uint8 or
            floating-point in [0, 1]
        hole: PIL masks, dark where something is missing, or bool arrays or tensors (H, W), (b, H, W) or (b, 1, H, W),
            True = missing; one an image
        seed: one integer >= 0 for all, image i then takes seed + i, or one an image
        steps, schedule: iterations and mask schedule; with the other keywords see `DecodingConfig` (total_iter,
            mask_func); None: as the checkpoint says
        margin: rings of tokens hidden around the hole
        samples: completions an image; those of image i are rows i * samples ... of the `Filled`, the first of them
            what samples=1 gives

        Raises ValueError, one line, for what does not fit.
        """
        images, hole = to_images(images, self.size), to_hole(hole, self.size)
        if len(hole) != len(images):
            raise ValueError(f"hole: expected one an image, found {len(hole)} for {len(images)} images")
        seeds = [seed + i for i in range(len(images))] if isinstance(seed, Integral) else list(seed)
        if len(seeds) != len(images) or min(seeds) < 0:
            raise ValueError(f"seed: expected an integer >= 0 or one for each of {len(images)} images, found {seed}")
        if samples < 1:
            raise ValueError(f"samples: expected at least 1, found {samples}")
        try:
            decoding = self.decoding.changed(
                total_iter=steps, mask_func=schedule, sweet_spot=sweet_spot, sampler=sampler, temperature=temperature,
                sampling_temperature=sampling_temperature, top_k=top_k, forget=forget, second_look=second_look,
                token_rule=token_rule, pre_fill=pre_fill,
            )  # fmt: skip
        except ValueError as error:
            raise ValueError(str(error).replace("total_iter", "steps").replace("mask_func", "schedule")) from None
        images, hole = (x.repeat_interleave(samples, dim=0) for x in (images, hole))
        seeds = [sample_seed(one, number) for one in seeds for number in range(samples)]
        *_, last = self.steps(images, hole, seeds, margin, decoding)
        return self.finish(images, hole, last.tokens, last.confidence)


# --- from Python ---


def to_images(given, size: int) -> Tensor:
    """One picture or several -> images (b, 3, size, size) uint8 on the CPU; one picture is a batch of one.

    given: a PIL picture of any mode; a uint8 array (H, W, 3) or (b, H, W, 3); a tensor (3, H, W) or (b, 3, H, W),
    uint8 or floating-point in [0, 1]; or a list of these. Raises ValueError that says what was expected and found.
    """
    if isinstance(given, list | tuple):
        return torch.cat(_each(to_images, given, size, "images"))
    if isinstance(given, Image.Image):
        given = as_image(ImageOps.exif_transpose(given))
    if isinstance(given, np.ndarray) and given.dtype == np.uint8 and given.ndim in (3, 4) and given.shape[-1] == 3:
        given = torch.from_numpy(given.copy()).movedim(-1, -3).contiguous()
    if not isinstance(given, Tensor) or given.ndim not in (3, 4) or given.shape[-3] != 3:
        raise ValueError("images: expected PIL pictures, uint8 arrays (H, W, 3) or (b, H, W, 3), or tensors (3, H, W) "
                         f"or (b, 3, H, W), found {_described(given)}")  # fmt: skip
    if given.is_floating_point():
        if not ((given >= 0) & (given <= 1)).all():
            raise ValueError("images: expected floating-point values in [0, 1], found others")
        given = to_uint8(given)
    if given.dtype != torch.uint8:
        raise ValueError(f"images: expected uint8, or floating-point in [0, 1], found {_described(given)}")
    return _of_size(given.view(-1, *given.shape[-3:]), size, "images")


def to_hole(given, size: int) -> Tensor:
    """One mask or several -> hole (b, 1, size, size) bool on the CPU, True = missing.

    given: a PIL mask, dark (below 128) where the hole is, as in the lab; a bool array or tensor, True = missing,
    (H, W), (b, H, W) or (b, 1, H, W); or a list of these. Raises ValueError that says what was expected and found.
    """
    if isinstance(given, list | tuple):
        return torch.cat(_each(to_hole, given, size, "hole"))
    if isinstance(given, Image.Image):
        given = as_hole(ImageOps.exif_transpose(given))
    if isinstance(given, np.ndarray) and given.dtype == bool:
        given = torch.from_numpy(given.copy())
    fits = isinstance(given, Tensor) and given.dtype == torch.bool
    if not fits or given.ndim not in (2, 3, 4) or (given.ndim == 4 and given.shape[1] != 1):
        raise ValueError("hole: expected PIL masks (dark: missing), or bool (True: missing) arrays or tensors (H, W), "
                         f"(b, H, W) or (b, 1, H, W), found {_described(given)}")  # fmt: skip
    return _of_size(given.reshape(-1, 1, *given.shape[-2:]), size, "hole")


def _each(convert: Callable, given, size: int, noun: str) -> list[Tensor]:
    if not given:
        raise ValueError(f"{noun}: expected at least one, found an empty list")
    return [convert(item, size) for item in given]


def _described(given) -> str:
    has_shape = isinstance(given, np.ndarray | Tensor)
    return f"{given.dtype} {tuple(given.shape)}" if has_shape else type(given).__name__


def _of_size(batch: Tensor, size: int, noun: str) -> Tensor:
    if not len(batch):
        raise ValueError(f"{noun}: expected at least one, found {_described(batch)}")
    if batch.shape[-2:] != (size, size):
        found = f"{batch.shape[-1]}x{batch.shape[-2]} pixels"
        raise ValueError(f"{noun}: expected {size}x{size} pixels, this model's size, found {found}; "
                         "photos.fill_photo fills pictures of any size")  # fmt: skip
    return batch.cpu()
