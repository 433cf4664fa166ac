"""`DecodingConfig`: how hidden tokens are decoded, every option of `maskgit.decoding`."""

from typing import Annotated, Literal, get_args

import pydantic

from maskgit.masks import TokenRule, schedule
from models.settings import Settings, explain, in_brief

Sampler = Literal["maskgit", "lab", "growing", "random", "halton"]
SAMPLERS: tuple[str, ...] = get_args(Sampler)
Codes = Literal["sampled", "argmax", "expected", "mixed", "auto"]
CODES: tuple[str, ...] = get_args(Codes)
Guess = Literal["navier_stokes", "fsr"]
GUESSES: tuple[str, ...] = get_args(Guess)
AUTO = "auto"
STEPS = 10  # T of a sweet spot that comes without one


def _total_iter(given: object):
    if given != AUTO and (not isinstance(given, int) or isinstance(given, bool) or given < 1):
        raise ValueError(f"expected a whole number from 1, or {AUTO}")
    return given


TotalIter = Annotated[int | Literal["auto"], pydantic.BeforeValidator(_total_iter)]


class DecodingConfig(Settings):
    """How hidden tokens are decoded: MaskGIT (arXiv 2202.04200, section 3.2) and its kin."""

    total_iter: TotalIter = pydantic.Field(
        STEPS, description="T, iterations that the mask schedule is laid out over; auto: as many as the hole needs"
    )
    sweet_spot: int | None = pydantic.Field(
        None, ge=1, description="iteration, at most T, that fills everything still hidden; null: T"
    )
    mask_func: str = pydantic.Field("cosine", description="mask schedule: cosine, linear, square, cubic or sqrt")
    sampler: Sampler = pydantic.Field(
        "maskgit",
        description="order of decoding: log p + Gumbel noise (maskgit), p + Gumbel noise (lab), the same with noise "
        "that grows (growing), random, or spread evenly over the image (halton)",
    )
    temperature: float = pydantic.Field(
        4.5,
        ge=0,
        le=1e6,
        description="weight of the order's Gumbel noise; it shrinks as 1 - r, or grows as 1 - mask_func(r)",
    )
    sampling_temperature: float = pydantic.Field(
        1.0, ge=0, le=1e6, description="temperature of the codes; 0 takes the argmax"
    )
    top_k: int = pydantic.Field(0, ge=0, description="codes are drawn from the k most probable ones; 0 = from all")
    codes: Codes = pydantic.Field(
        "sampled",
        description="what the VQGAN decodes: codes as drawn (sampled), the most probable ones (argmax), the mean of "
        "all under their probabilities (expected), that for those decided last alone (mixed), or for those of an image "
        "that takes one iteration alone (auto)",
    )
    forget: bool = pydantic.Field(
        False, description="predict from the tokens of the picture as it was given, never from those decided since"
    )
    second_look: float = pydantic.Field(
        0.0, ge=0, lt=1, description="share of the decided tokens, the least sure, that is hidden and decoded once more"
    )

    token_rule: TokenRule = pydantic.Field(
        "any", description="a token is hidden where any, or more than half, of its pixels are missing"
    )
    pre_fill: bool = pydantic.Field(False, description="encode the hole filled by the first guess, not grey")
    guess: Guess = pydantic.Field(
        "navier_stokes",
        description="first guess, for the encoder and decoders that see it: Navier-Stokes inpainting, or frequency "
        "selective reconstruction of thin parts (fsr)",
    )
    rim: float = pydantic.Field(
        0.0,
        ge=0,
        le=1,
        description="share of biharmonic inpainting in the hole's pixels beside known ones, none 2 pixels farther in",
    )
    self_ensemble: bool = pydantic.Field(
        False,
        description="the mean of what is made of the picture and of its mirror image, first guess and all (geometric "
        "self-ensemble, arXiv 1707.02921): smaller errors, softer pictures, the networks run twice",
    )

    @pydantic.field_validator("mask_func")
    @classmethod
    def _known_schedule(cls, name: str) -> str:
        schedule(name)  # raises ValueError that lists the known names
        return name

    @pydantic.model_validator(mode="after")
    def _stops_in_time(self):
        if self.sweet_spot is not None and self.total_iter == AUTO:
            raise ValueError(f"sweet_spot = {self.sweet_spot} needs a number for total_iter, which is {AUTO}")
        if self.sweet_spot is not None and self.sweet_spot > self.total_iter:
            raise ValueError(f"sweet_spot = {self.sweet_spot} must be at most total_iter = {self.total_iter}")
        return self

    def changed(self, /, **options) -> "DecodingConfig":
        """These settings with the `options` that are not None.

        total_iter alone moves the sweet spot with it; a sweet spot alone makes T = 10 of auto. Raises ValueError, one
        line, naming what is wrong.
        """
        given = {name: value for name, value in options.items() if value is not None}
        if "total_iter" in given:
            given.setdefault("sweet_spot", None)
        elif "sweet_spot" in given and self.total_iter == AUTO:
            given["total_iter"] = STEPS
        try:
            return DecodingConfig.model_validate(self.model_dump() | given)
        except pydantic.ValidationError as error:
            raise ValueError(in_brief(explain(error, DecodingConfig))) from error

    @property
    def stop(self) -> int | None:
        """The iteration that fills everything still hidden; None: each image's last."""
        return self.sweet_spot or (None if self.total_iter == AUTO else self.total_iter)

    def of_completion(self, number: int) -> "DecodingConfig":
        """For completion `number` of a picture: with codes auto only the first can be a mean, or all were alike."""
        return self.changed(codes="sampled") if number and self.codes == AUTO else self

    @property
    def blends(self) -> bool:
        """Whether the decoder gets means of code vectors."""
        return self.codes in ("expected", "mixed", AUTO)

    @property
    def needs_seed(self) -> bool:
        """Whether two seeds may give two pictures."""
        noisy = self.sampler == "random" or (self.sampler != "halton" and self.temperature > 0)
        drawn = self.sampling_temperature > 0 and self.top_k != 1 and self.codes != "argmax"
        at_once = self.stop == 1
        return (noisy and not at_once) or (drawn and not (self.blends and at_once and not self.second_look))
