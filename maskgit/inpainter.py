"""`Inpainter`: a trained VQGAN and transformer that fill the holes of pictures.

    result = Inpainter.from_pretrained("pretrained/cats64")(images, hole, steps=10, schedule="cosine", seed=0)
    result.pictures[0].save("filled.png")

A call takes PIL pictures, numpy arrays and tensors, of any size.
"""

from collections.abc import Sequence
from numbers import Integral
from pathlib import Path

import pydantic

from maskgit.completion import Completer, InpaintingResult
from maskgit.data import to_hole, to_images
from maskgit.decoding_config import DecodingConfig
from maskgit.pyramid import complete_pictures
from models.checkpoint import file_hash, read_weights
from models.settings import explain, in_brief, read_yaml
from models.transformer import Transformer
from models.vqgan import VQGAN
from utils import ROOT

CATS, PHOTOS = (ROOT / "pretrained" / name for name in ("cats64", "photos64"))


class Inpainter(Completer):
    """A `Completer` with the weights of a folder, which takes PIL pictures and numpy arrays too, of any size."""

    @classmethod
    def from_pretrained(cls, folder=CATS, device="auto", precision="auto", compiled=False, vqgan=None) -> "Inpainter":
        """The weights in `folder`: vqgan.safetensors and transformer.safetensors, as the two trainings leave them.

        What the transformer's training noted as the decoding is that of a call which does not say; a file decoding.yml
        in the folder, keys of `DecodingConfig`, changes it.
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
        if (own := Path(folder) / "decoding.yml").is_file():
            changes = {str(key): value for key, value in read_yaml(own).items()}
            try:
                decoding = decoding.changed(**changes)
            except ValueError as error:
                raise ValueError(f"{own}: {error}") from error
        return cls(vqgan, transformer, decoding, device, precision, compiled)

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
        guess: str | None = None,
        rim: float | None = None,
        self_ensemble: bool | None = None,
        margin: int = 0,
        samples: int = 1,
    ) -> InpaintingResult:
        """Fills the holes of one picture, or of several of one size.

        Pictures of another size than the model's are filled at their own scale, through windows and from coarse to
        fine: see `pyramid.fill_picture`.

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
        images, hole = to_images(images), to_hole(hole)
        if len(hole) != len(images):
            raise ValueError(f"hole: expected one an image, found {len(hole)} for {len(images)} images")
        if hole.shape[2:] != images.shape[2:]:
            sizes = "images {3}x{2}, hole {7}x{6}".format(*images.shape, *hole.shape)
            raise ValueError(f"images and hole: expected one size, found {sizes}")
        seeds = [seed + i for i in range(len(images))] if isinstance(seed, Integral) else seed
        try:
            decoding = self.decoding.changed(
                total_iter=steps, mask_func=schedule, sweet_spot=sweet_spot, codes=codes, sampler=sampler,
                temperature=temperature, sampling_temperature=sampling_temperature, top_k=top_k, forget=forget,
                second_look=second_look, token_rule=token_rule, pre_fill=pre_fill, guess=guess, rim=rim,
                self_ensemble=self_ensemble,
            )  # fmt: skip
        except ValueError as error:
            raise ValueError(str(error).replace("total_iter", "steps").replace("mask_func", "schedule")) from None
        options = {"samples": samples, "margin": margin, "decoding": decoding}
        if images.shape[2:] == (self.size, self.size):
            return self.complete(images, hole, seeds, **options)
        return complete_pictures(self, images, hole, seeds, **options)
