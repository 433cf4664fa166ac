"""`Inpainter`: a trained VQGAN and transformer that fill the holes of images; `Codec`: the VQGAN alone.

    result = Inpainter.from_pretrained("pretrained/cats64")(images, hole, steps=10, schedule="cosine", seed=0)
    result.pictures[0].save("filled.png")

Shapes: images (b, 3, S, S) uint8, hole (b, 1, S, S) bool (True = missing), tokens and hidden (b, n); painted images are
images whose holes hold a first guess, as `classical.paint` makes them. A call also takes PIL pictures and numpy arrays;
the other methods take tensors of these shapes.
"""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Integral
from pathlib import Path

import pydantic
import torch
from PIL import Image
from torch import Tensor

from maskgit.classical import paint
from maskgit.data import GREY, to_float, to_hole, to_images, to_pixels, to_uint8
from maskgit.decoding import State, sample
from maskgit.decoding_config import DecodingConfig
from maskgit.masks import composite, to_hidden
from models.checkpoint import file_hash, read_weights
from models.settings import explain, in_brief
from models.transformer import Transformer
from models.vqgan import VQGAN
from utils import ROOT, autocast, images_at_once, memory_format, mix, pick_device

PRETRAINED = ROOT / "pretrained" / "cats64"


@dataclass(frozen=True, eq=False)
class InpaintingResult:
    """What an `Inpainter` returns: a row for each completion."""

    images: Tensor  # (b, 3, S, S) uint8: the decoder's pixels in the hole, the given ones byte-identical elsewhere
    raw: Tensor  # (b, 3, S, S) uint8: the decoder's pixels everywhere
    tokens: Tensor  # (b, n) long
    confidence: Tensor  # (b, n) in [0, 1]: the probability of each code when it was decided, 1 if known
    hidden: Tensor  # (b, n) bool: at the start

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
    def encode(self, images: Tensor) -> Tensor:
        """uint8 images, as the encoder is to see them, -> tokens (b, n), in float32."""
        return self.vqgan.codebook.nearest(self.prepared(images)).flatten(1)

    @torch.no_grad()
    def prepared(self, images: Tensor) -> Tensor:
        """uint8 images -> the vectors (b, h, w, e) whose nearest codes are their tokens, in float32."""
        with autocast(self.device, "float32"):
            latents = self.vqgan.latents(to_float(images).to(self.device, memory_format=self.layout))
            return self.vqgan.codebook.prepare(latents)

    @cached_property
    def _grey(self) -> Tensor:
        """The tokens (1, n) of a grey image."""
        return self.encode(torch.full((1, 3, self.size, self.size), GREY, dtype=torch.uint8))

    def shown(self, state: State) -> Tensor:
        """What `decode` makes a picture of an iteration of: its tokens (b, n), or code vectors (b, n, e), grey where a
        token is hidden."""
        if state.codes is None:
            return torch.where(state.hidden, self._grey, state.tokens)
        return torch.where(state.hidden[..., None], self.codebook[self._grey], state.codes)

    @property
    def codebook(self) -> Tensor:
        """The code vectors (k, e), float32."""
        return self.vqgan.codebook.vectors().float()

    @torch.no_grad()
    def decode(self, tokens: Tensor, painted: Tensor, hole: Tensor) -> Tensor:
        """tokens (b, n), or code vectors (b, n, e), -> uint8 images (b, 3, S, S) on the CPU.

        Some decoders read the known pixels of the `painted` images, some the first guess in their holes too.
        """
        known = to_float(painted).to(self.device, memory_format=self.layout)
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
        keys = vqgan.tokens_key(), vqgan.former_tokens_key(), file_hash(paths[0])  # the first weights noted the last
        if notes["vqgan"] not in keys:
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

    def paint(self, images: Tensor, hole: Tensor, decoding: DecodingConfig | None = None) -> Tensor:
        """The painted images: by Navier-Stokes inpainting where the encoder or the decoder is to see it, else grey."""
        guessed = (decoding or self.decoding).pre_fill or self.vqgan.config.decoder.pre_filled
        return paint(images, hole, guessed)

    def complete(
        self,
        images: Tensor,
        hole: Tensor,
        seeds: Sequence[int],
        *,
        batch_size: int | None = None,
        samples: int = 1,
        on_step: Callable[[slice, State], object] | None = None,
        margin: int = 0,
        decoding: DecodingConfig | None = None,
        painted: Tensor | None = None,
    ) -> InpaintingResult:
        """`samples` completions of each image: completion k of image i is row i * samples + k of the result.

        seeds: one integer >= 0 an image; completion k takes `sample_seed(seed, k)`, so that it depends neither on
            the other images nor on the number of completions
        batch_size: rows at once (None: `images_at_once`); no result depends on it, nor does the memory that the
            networks need grow with the number of images
        on_step: called after every iteration of every batch with its rows of the result and the State
        margin: rings of tokens hidden around the hole
        decoding: None: the checkpoint's
        painted: what `paint` gives, where the caller has it already; None: it is made here, once an image

        Raises ValueError where shapes, dtypes or numbers do not fit.
        """
        options = {"batch_size": batch_size, "samples": samples, "margin": margin, "decoding": decoding}
        steps = self.steps(images, hole, seeds, **options, painted=painted)
        while True:
            try:
                rows, state = next(steps)
            except StopIteration as end:
                return end.value
            if on_step:
                on_step(rows, state)

    def steps(
        self,
        images: Tensor,
        hole: Tensor,
        seeds: Sequence[int],
        *,
        batch_size: int | None = None,
        samples: int = 1,
        margin: int = 0,
        decoding: DecodingConfig | None = None,
        painted: Tensor | None = None,
    ) -> Generator[tuple[slice, State], None, InpaintingResult]:
        """`complete` for who shows it as it goes: yields what `on_step` is given, and returns the result."""
        self._check(images, hole, seeds, samples, batch_size)
        decoding = decoding or self.decoding
        painted = self.paint(images, hole, decoding) if painted is None else painted
        size = images_at_once(self.device) if batch_size is None else batch_size
        shown = painted if decoding.pre_fill else paint(images, hole, False)
        tokens = torch.cat([self.encode(batch) for batch in shown.split(size)])
        hidden = self.hide(hole, margin, decoding.token_rule)
        owner = torch.arange(len(images)).repeat_interleave(samples)  # the image of each row
        seeds = [sample_seed(seed, number) for seed in seeds for number in range(samples)]
        raw, last = [], []
        for rows in (slice(start, min(start + size, len(owner))) for start in range(0, len(owner), size)):
            mine = owner[rows]
            own = tokens[mine], hidden[mine], self.transformer.mask_id, decoding, seeds[rows], self.codebook
            for state in sample(self.predict, *own):
                yield rows, state
            raw.append(self.decode(state.decodable, painted[mine], hole[mine]))
            last.append(state)
        raw = torch.cat(raw)
        decided, confidence = (torch.cat([getattr(state, name) for state in last]) for name in ("tokens", "confidence"))
        filled = composite(raw, images[owner], hole[owner])
        return InpaintingResult(filled, raw, decided, confidence, hidden[owner])

    def _check(self, images: Tensor, hole: Tensor, seeds: Sequence[int], samples: int, batch_size: int | None) -> None:
        for name, given, dtype, channels in (("images", images, torch.uint8, 3), ("hole", hole, torch.bool, 1)):
            shape = (len(images), channels, self.size, self.size)
            if given.dtype != dtype or given.shape != shape:
                raise ValueError(f"{name}: expected {dtype} {shape}, found {given.dtype} {tuple(given.shape)}")
        if not len(images):
            raise ValueError("images: expected at least one, found none")
        if len(seeds) != len(images) or not all(isinstance(seed, Integral) and seed >= 0 for seed in seeds):
            raise ValueError(f"seeds: expected an integer >= 0 for each of {len(images)} images, found {list(seeds)}")
        for name, number in (("samples", samples), ("batch_size", batch_size)):
            if number is not None and number < 1:
                raise ValueError(f"{name}: expected at least 1, found {number}")

    def __call__(
        self,
        images,
        hole,
        *,
        seed: int | Sequence[int] = 0,
        steps: int | str | None = None,
        schedule: str | None = None,
        sweet_spot: int | None = None,
        codes: str | None = None,
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
    ) -> InpaintingResult:
        """Fills the holes of one picture or of a batch of the model's size.

        images: PIL pictures, uint8 arrays (H, W, 3) or (b, H, W, 3), or tensors (3, H, W) or (b, 3, H, W), uint8 or
            floating-point in [0, 1]
        hole: PIL masks, dark where something is missing, or bool arrays or tensors (H, W), (b, H, W) or (b, 1, H, W),
            True = missing; one an image
        seed: one integer >= 0 for all, image i then takes seed + i, or one an image
        steps, schedule: iterations and mask schedule; with the other keywords see `DecodingConfig` (total_iter,
            mask_func); None: as the checkpoint says
        margin: rings of tokens hidden around the hole
        samples: completions an image; those of image i are rows i * samples ... of the result, the first of them what
            samples=1 gives

        Raises ValueError, one line, for what does not fit.
        """
        images, hole = to_images(images, self.size), to_hole(hole, self.size)
        if len(hole) != len(images):
            raise ValueError(f"hole: expected one an image, found {len(hole)} for {len(images)} images")
        seeds = [seed + i for i in range(len(images))] if isinstance(seed, Integral) else list(seed)
        try:
            decoding = self.decoding.changed(
                total_iter=steps, mask_func=schedule, sweet_spot=sweet_spot, codes=codes, sampler=sampler,
                temperature=temperature, sampling_temperature=sampling_temperature, top_k=top_k, forget=forget,
                second_look=second_look, token_rule=token_rule, pre_fill=pre_fill,
            )  # fmt: skip
        except ValueError as error:
            raise ValueError(str(error).replace("total_iter", "steps").replace("mask_func", "schedule")) from None
        return self.complete(images, hole, seeds, samples=samples, margin=margin, decoding=decoding)
