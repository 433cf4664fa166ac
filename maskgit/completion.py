"""`Completer`: a VQGAN and a transformer that fill the holes of images of the model's size; `Codec`: the VQGAN alone.

Shapes: images (b, 3, S, S) uint8, hole (b, 1, S, S) bool (True = missing), tokens and hidden (b, n); painted images are
images whose holes hold a first guess, as `classical.paint` makes them.
"""

import operator
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Integral

import torch
from PIL import Image
from torch import Tensor

from maskgit.classical import paint, smooth_rims
from maskgit.data import GREY, to_float, to_pixels, to_uint8
from maskgit.decoding import State, sample
from maskgit.decoding_config import DecodingConfig
from maskgit.masks import composite, mean_of, to_hidden
from models.transformer import Transformer
from models.vqgan import VQGAN
from utils import autocast, finish, images_at_once, memory_format, mix, pick_device


@dataclass(frozen=True, eq=False)
class InpaintingResult:
    """What an `Inpainter` returns: a row for each completion.

    Of pictures of another size than the model's, whose hole alone is looked at: `raw` is the given picture and tokens
    are -1 where nothing was decoded; n is the grid that covers the picture, row by row. With self_ensemble, tokens and
    confidence are those of the picture as it is, not of its mirror image.
    """

    images: Tensor  # (b, 3, H, W) uint8: the given pixels byte-identical, the decoder's in the hole, mixed at `rim`
    raw: Tensor  # (b, 3, H, W) uint8: the decoder's pixels everywhere, with self_ensemble the mean of both ways
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
        grey = self._grey
        if grey.shape[1] != state.tokens.shape[1]:  # cells of windows, of an encoder that sees each patch alone
            grey = grey[:, :1]
        if state.codes is None:
            return torch.where(state.hidden, grey, state.tokens)
        return torch.where(state.hidden[..., None], self.codebook[grey], state.codes)

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


class Completer(Codec):
    """A frozen VQGAN and transformer that fill the holes of images of the model's size.

    The same seed gives the same tokens, whatever the batch.
    """

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

    def predict(self, tokens: Tensor) -> Tensor:
        """tokens (b, n), mask_id where hidden -> logits (m, k) of the hidden ones."""
        with autocast(self.device, self.precision):
            return self.transformer.of_hidden(tokens)

    def paint(self, images: Tensor, hole: Tensor, decoding: DecodingConfig | None = None) -> Tensor:
        """The painted images: by the first guess where the encoder or the decoder is to see it, else grey."""
        decoding = decoding or self.decoding
        return paint(images, hole, decoding.pre_fill or self.vqgan.config.decoder.pre_filled, decoding.guess)

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
        on_step: called after every iteration of every batch with its rows of the result and the State; not for mirror
            images
        margin: rings of tokens hidden around the hole
        decoding: None: the checkpoint's
        painted: what `paint` gives, where the caller has it already; None: it is made here, once an image

        Raises ValueError where shapes, dtypes or numbers do not fit.
        """
        options = {"batch_size": batch_size, "samples": samples, "margin": margin, "decoding": decoding}
        steps = self.steps(images, hole, seeds, **options, painted=painted)
        return finish(steps, on_step and (lambda step: on_step(*step)))

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
        self._check(images, hole, painted)
        check_numbers(samples=samples, batch_size=batch_size, margin=margin)
        seeds = checked_seeds(seeds, len(images))
        decoding = decoding or self.decoding
        painted = self.paint(images, hole, decoding) if painted is None else painted
        size, twin = images_at_once(self.device) if batch_size is None else batch_size, None
        if decoding.self_ensemble:
            options = {"batch_size": batch_size, "samples": samples, "margin": margin, "painted": painted.flip(-1)}
            alone = decoding.changed(self_ensemble=False, rim=0.0)
            twin = self.complete(images.flip(-1), hole.flip(-1), seeds, decoding=alone, **options).raw.flip(-1)
        shown = painted if decoding.pre_fill else paint(images, hole, False)
        tokens = torch.cat([self.encode(batch) for batch in shown.split(size)])
        hidden = self.hide(hole, margin, decoding.token_rule)
        owner = torch.arange(len(images)).repeat_interleave(samples)  # the image of each row
        seeds = [sample_seed(seed, number) for seed in seeds for number in range(samples)]
        further = torch.arange(samples).repeat(len(images)) > 0
        raw, last = [], []
        for rows in (slice(start, min(start + size, len(owner))) for start in range(0, len(owner), size)):
            mine = owner[rows]
            own = tokens[mine], hidden[mine], self.transformer.mask_id, decoding, seeds[rows], self.codebook
            for state in sample(self.predict, *own, further=further[rows]):
                yield rows, state
            raw.append(self.decode(state.decodable, painted[mine], hole[mine]))
            last.append(state)
        raw = torch.cat(raw)
        if twin is not None:
            raw = mean_of(raw, twin)
        decided, confidence = (torch.cat([getattr(state, name) for state in last]) for name in ("tokens", "confidence"))
        filled = smooth_rims(composite(raw, images[owner], hole[owner]), hole[owner], decoding.rim)
        return InpaintingResult(filled, raw, decided, confidence, hidden[owner])

    def _check(self, images: Tensor, hole: Tensor, painted: Tensor | None) -> None:
        kinds = ("images", images, torch.uint8, 3), ("hole", hole, torch.bool, 1), ("painted", painted, torch.uint8, 3)
        for name, given, dtype, channels in kinds:
            shape = (len(images), channels, self.size, self.size)
            if given is not None and (given.dtype != dtype or given.shape != shape):
                raise ValueError(f"{name}: expected {dtype} {shape}, found {given.dtype} {tuple(given.shape)}")
        if not len(images):
            raise ValueError("images: expected at least one, found none")


def checked_seeds(seeds: Sequence[int], images: int) -> list[int]:
    """`seeds` as integers, one an image. Raises ValueError unless all are integers >= 0."""
    try:
        found = [operator.index(seed) for seed in seeds]
    except TypeError:
        found = []
    if len(found) != images or min(found, default=0) < 0:
        told = list(seeds) if isinstance(seeds, Iterable) else seeds
        raise ValueError(f"seeds: expected an integer >= 0 for each of {images} images, found {told}")
    return found


def check_numbers(**numbers: int | None) -> None:
    """Raises ValueError, naming it, for a number that is neither None nor an integer of at least 1; `margin`: 0."""
    for name, number in numbers.items():
        least = 0 if name == "margin" else 1
        whole = isinstance(number, Integral) and not isinstance(number, bool)
        if number is not None and not (whole and number >= least):
            raise ValueError(f"{name}: expected at least {least}, found {number!r}")
