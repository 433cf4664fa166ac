"""Iterative parallel decoding: the options, one pure decode step, and the one sampling loop of the repository.

    tokens      (b, n)     long   codes 0..k-1; mask_id = k where hidden
    hidden      (b, n)     bool   tokens to predict, True = hidden
    logits      (m, k)     float  what a transformer says of the hidden tokens, image by image
    confidence  (b, n)     float  probability of the chosen code, in [0, 1]

b batch, n tokens, k codes, m hidden tokens of the whole batch, T iterations, t the step 1..T, r = t / T.
The loop sees `predict: tokens (b, n) -> logits (m, k)`, never a model, a trainer or a device.
"""

import functools
import math
import operator
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import pydantic
import torch
from torch import Tensor

from maskgit.masks import TokenRule, schedule
from models.settings import Settings, explain, in_brief

Sampler = Literal["maskgit", "lab", "growing", "random", "halton"]
SAMPLERS: tuple[str, ...] = get_args(Sampler)


class DecodingConfig(Settings):
    """How hidden tokens are decoded: MaskGIT (arXiv 2202.04200, section 3.2) and its kin."""

    total_iter: int = pydantic.Field(10, ge=1, description="T, iterations that the mask schedule is laid out over")
    sweet_spot: int = pydantic.Field(10, ge=1, description="iteration, at most T, that fills everything still hidden")
    mask_func: str = pydantic.Field("cosine", description="mask schedule: cosine, linear, square, cubic or sqrt")
    sampler: Sampler = pydantic.Field(
        "maskgit",
        description="order of decoding: log p + Gumbel noise (maskgit), p + Gumbel noise (lab), the same with noise "
        "that grows (growing), random, or spread evenly over the image (halton)",
    )
    temperature: float = pydantic.Field(
        4.5, ge=0, description="weight of the order's Gumbel noise; it shrinks as 1 - r, or grows as 1 - mask_func(r)"
    )
    sampling_temperature: float = pydantic.Field(1.0, ge=0, description="temperature of the codes; 0 takes the argmax")
    top_k: int = pydantic.Field(0, ge=0, description="codes are drawn from the k most probable ones; 0 = from all")
    forget: bool = pydantic.Field(
        False, description="predict from the tokens of the picture as it was given, never from those decided since"
    )
    second_look: float = pydantic.Field(
        0.0, ge=0, lt=1, description="share of the decided tokens, the least sure, that is hidden and decoded once more"
    )

    token_rule: TokenRule = pydantic.Field(
        "any", description="a token is hidden where any, or more than half, of its pixels are missing"
    )
    pre_fill: bool = pydantic.Field(False, description="encode the hole filled by Navier-Stokes inpainting, not grey")

    @pydantic.field_validator("mask_func")
    @classmethod
    def _known_schedule(cls, name: str) -> str:
        schedule(name)  # raises ValueError that lists the known names
        return name

    @pydantic.model_validator(mode="after")
    def _stops_in_time(self):
        if self.sweet_spot > self.total_iter:
            raise ValueError(f"sweet_spot = {self.sweet_spot} must be at most total_iter = {self.total_iter}")
        return self

    def changed(self, **options) -> "DecodingConfig":
        """These settings with the `options` that are not None; total_iter alone moves the sweet spot with it.

        Raises ValueError, one line, naming what is wrong.
        """
        given = {name: value for name, value in options.items() if value is not None}
        if "total_iter" in given:
            given.setdefault("sweet_spot", given["total_iter"])
        try:
            return DecodingConfig.model_validate(self.model_dump() | given)
        except pydantic.ValidationError as error:
            raise ValueError(in_brief(explain(error, DecodingConfig))) from error

    @property
    def needs_seed(self) -> bool:
        """Whether two seeds may give two results."""
        noisy = self.sampler == "random" or (self.sampler != "halton" and self.temperature > 0)
        return (self.sampling_temperature > 0 and self.top_k != 1) or (noisy and self.sweet_spot > 1)


@dataclass(frozen=True, eq=False)
class State:
    """The tokens after one iteration."""

    step: int  # 1-based
    tokens: Tensor  # (b, n) long, mask_id where still hidden
    hidden: Tensor  # (b, n) bool
    confidence: Tensor  # (b, n) float32, 1 for tokens known from the start; where still hidden, of the code not taken


# --- the loop ---------------------------------------------------------------------------------------------------------


def sample(
    predict: Callable[[Tensor], Tensor],
    tokens: Tensor,
    hidden: Tensor,
    mask_id: int,
    config: DecodingConfig,
    seeds: Sequence[int],
) -> Iterator[State]:
    """Decodes the hidden tokens, yielding a State after every iteration; in the last one nothing is hidden.

    predict: tokens (b, n), mask_id where hidden, -> logits (m, k) of the m hidden tokens, in row-major order, of any
        float type, k <= mask_id; images that are complete are not among the b
    tokens (b, n) long: ids 0..mask_id-1 where known, anything where hidden (but with `config.forget`, which reads
        what was there); hidden (b, n) bool; neither is modified
    seeds: b integers >= 0. Image i's draws at step t are a function of (seeds[i], t) alone, made on the CPU: its
    result depends neither on the rest of the batch nor on the device that draws.

    Known and decided tokens are never sampled again, but for the second look: after the last iteration the least sure
    of the decided ones are hidden, and the schedule goes on from where about as many were left. Without a hidden
    token anywhere there is one State, the tokens as they are, and no call of `predict`. Runs without gradients.
    Raises ValueError, at once, for tensors or seeds that do not fit, and while iterating for logits that do not.
    """
    seeds = _check_inputs(tokens, hidden, mask_id, config, seeds)
    return _iterate(predict, tokens, hidden, mask_id, config, seeds)


def fill(predict, tokens: Tensor, hidden: Tensor, mask_id: int, config: DecodingConfig, seeds: Sequence[int]) -> Tensor:
    """The tokens (b, n) of the last state of `sample`, whose arguments these are."""
    for state in sample(predict, tokens, hidden, mask_id, config, seeds):
        tokens = state.tokens
    return tokens


def _iterate(predict, tokens: Tensor, hidden: Tensor, mask_id: int, config, seeds: list[int]) -> Iterator[State]:
    state = State(0, tokens.masked_fill(hidden, mask_id), hidden, torch.ones(tokens.shape, device=tokens.device))
    count = hidden.sum(dim=1).cpu()  # (b), the counts stay on the CPU: asking for them waits for no GPU
    if not count.any():
        yield State(1, state.tokens, hidden, state.confidence)
        return
    given = tokens if config.forget else None
    state = yield from _decode(predict, given, state, count, 1, mask_id, config, seeds)
    if config.second_look:
        state = look_again(state, hidden, mask_id, config)
        yield from _decode(predict, given, state, count, step_of_second_look(config), mask_id, config, seeds)


def _decode(
    predict, given: Tensor | None, state: State, count: Tensor, t: int, mask_id: int, config, seeds: list[int]
) -> Generator[State, None, State]:
    """Decodes until nothing is hidden, from step `t` of the schedule; `given` (b, n): tokens to predict from."""
    left = state.hidden.sum(dim=1).cpu()
    while left.any():
        seen = state.tokens if given is None else given.masked_fill(state.hidden, mask_id)
        with torch.no_grad():
            logits = predict(seen if left.all() else seen[(left > 0).to(seen.device)])
        _check_logits(logits, int(left.sum()), mask_id)
        left = still_hidden(count, left, t, config)
        uniforms = draws(seeds, state.step + 1, seen.shape[1])
        state = decode_step(state, logits, left, uniforms, t / config.total_iter, config)
        yield state
        t += 1
    return state


# --- one step, in pure functions --------------------------------------------------------------------------------------


def still_hidden(count: Tensor, left: Tensor, step: int, config: DecodingConfig) -> Tensor:
    """How many tokens of each image stay hidden after `step`: floor(schedule(step / T) count), (b) long, on the CPU.

    count (b): hidden at the start; left (b): hidden before this step. At least one token is decided wherever any is
    left, none comes back, and at `sweet_spot` nothing is left.
    """
    if step >= config.sweet_spot:
        return torch.zeros_like(left)
    fraction = schedule(config.mask_func)(step / config.total_iter)
    # 1e-9: in binary (1 - 0.9) * 100 is 9.999999999999998, which must count as 10
    target = (count.double() * fraction + 1e-9).floor().long()
    return torch.minimum(target, left - 1).clamp(min=0)


def draws(seeds: Sequence[int], step: int, n: int) -> Tensor:
    """Uniforms in [0, 1) of one step, (b, 2, n) float32: for each token one for its code and one for its rank.

    NumPy's SeedSequence mixes all bits of (seed, step); torch's CPU generator would keep only 32 bits of a seed.
    """
    uniforms = np.empty((len(seeds), 2, n), dtype=np.float32)
    for image, seed in zip(uniforms, seeds, strict=True):
        np.random.default_rng([seed, step]).random(out=image, dtype=np.float32)
    return torch.from_numpy(uniforms)


def decode_step(
    state: State, logits: Tensor, left: Tensor, uniforms: Tensor, r: float, config: DecodingConfig
) -> State:
    """Proposes a code for every hidden token and decides the most confident ones; `left` (b) of them stay hidden.

    logits (m, k), uniforms (b, 2, n) as `draws` gives them, r in (0, 1]; a pure function. The confidence is the
    probability of the proposed code under the softmax of the logits at temperature 1 and over all k codes, as in the
    official MaskGIT, however the code was drawn: sampling_temperature and top_k change the code, not what the model
    thinks of it. Raises ValueError where the logits have no softmax (NaN or +inf, or -inf only).
    """
    hidden, step = state.hidden, state.step + 1
    code_draw, rank_draw = uniforms.to(hidden.device).unbind(dim=1)  # (b, n) each
    logits = logits.float()
    codes = choose_codes(logits, code_draw[hidden], config)  # (m)
    log_p = (logits.gather(1, codes[:, None])[:, 0] - logits.logsumexp(dim=1)).clamp(max=0)  # (m)
    if (log_p.isnan() | logits.amax(dim=1).isinf()).any():
        raise ValueError(f"step {step}: logits of a hidden token hold NaN or +inf, or only -inf; expected finite ones")

    score = torch.full_like(state.confidence, torch.inf)  # (b, n), +inf freezes what is known or decided
    place = torch.where(hidden)[1]  # (m)
    score[hidden] = rank_score(log_p, rank_draw[hidden], place, hidden.shape[1], r, config)
    rank = score.argsort(dim=1, stable=True).argsort(dim=1)  # 0 = least confident; no two alike, so counts are exact
    stays = rank < left.to(hidden.device)[:, None]

    proposed = state.tokens.masked_scatter(hidden, codes)
    confidence = state.confidence.masked_scatter(hidden, log_p.exp())
    return State(step, torch.where(stays, state.tokens, proposed), stays, confidence)


def choose_codes(logits: Tensor, uniform: Tensor, config: DecodingConfig) -> Tensor:
    """One code for each row of logits (m, k) float32, by inverse CDF at uniform (m) in [0, 1): (m) long."""
    if config.sampling_temperature == 0:
        return logits.argmax(dim=1)
    top, ids = logits, None
    if 0 < config.top_k < logits.shape[1]:
        top, ids = logits.topk(config.top_k, dim=1)  # exactly top_k columns, even with ties
    # the maximum first, or a small temperature overflows; below 1e-6 float32 knows the argmax only
    scaled = (top - top.amax(dim=1, keepdim=True)) / max(config.sampling_temperature, 1e-6)
    index = _invert(scaled.softmax(dim=1), uniform)
    return index if ids is None else ids.gather(1, index[:, None])[:, 0]


def _invert(p: Tensor, uniform: Tensor) -> Tensor:
    """The first index whose cumulated p (m, k) exceeds uniform (m) times the row's total: (m) long, p[index] > 0."""
    cdf = p.cumsum(dim=1)
    index = torch.searchsorted(cdf, uniform[:, None] * cdf[:, -1:], right=True).clamp(max=p.shape[1] - 1)  # (m, 1)
    # rounding (a uniform next to 1, or the GPU's parallel sum) may end on a code of probability 0: step back from it
    stray = (p.gather(1, index) == 0)[:, 0]
    ids = torch.arange(p.shape[1], device=p.device)
    index[stray] = (ids * ((p[stray] > 0) & (ids < index[stray]))).amax(dim=1, keepdim=True)
    return index[:, 0]


def rank_score(log_p: Tensor, uniform: Tensor, place: Tensor, n: int, r: float, config: DecodingConfig) -> Tensor:
    """What hidden tokens are ranked by, (m) float32, the highest is decided first; r in (0, 1].

    log_p and uniform (m) in [0, 1), place (m) long: which of the image's n tokens it is
    maskgit: log p + temperature (1 - r) Gumbel; lab: p + temperature (1 - r) Gumbel; growing: p + temperature
    (1 - mask_func(r)) Gumbel, mask_func the schedule; random: Gumbel alone; halton: minus the token's turn in
    `halton_turns`.
    """
    if config.sampler == "halton":
        return -halton_turns(n).to(place.device)[place].float()
    gumbel = -(-uniform.clamp(min=2**-25).log()).log()  # float32 uniforms are multiples of 2^-24: 0 stands for less
    if config.sampler == "random":
        return gumbel
    confidence = log_p if config.sampler == "maskgit" else log_p.exp()
    noise = 1 - (schedule(config.mask_func)(r) if config.sampler == "growing" else r)
    return confidence + config.temperature * noise * gumbel


def look_again(state: State, hidden: Tensor, mask_id: int, config: DecodingConfig) -> State:
    """`state`, complete, with the least sure of its decided tokens hidden: floor(second_look count) of each image.

    hidden (b, n) bool: at the start, count of each image; the others, known, stay as they are.
    """
    again = (hidden.sum(dim=1).double() * config.second_look + 1e-9).floor()  # (b)
    unsure = state.confidence.masked_fill(~hidden, torch.inf).argsort(dim=1, stable=True).argsort(dim=1)
    back = unsure < again[:, None]
    return State(state.step, state.tokens.masked_fill(back, mask_id), back, state.confidence)


def step_of_second_look(config: DecodingConfig) -> int:
    """The step of the schedule that the second look starts with: the first that leaves less than its share."""
    fraction = schedule(config.mask_func)
    early = (t for t in range(1, config.sweet_spot) if fraction(t / config.total_iter) < config.second_look)
    return next(early, config.sweet_spot)


@functools.cache
def halton_turns(n: int) -> Tensor:
    """When each of n tokens, a square grid row by row, gets its turn: (n) long, a permutation of 0..n-1.

    Cells in the order in which the two-dimensional Halton sequence of bases 2 and 3 first falls into them
    (Besnier et al., Halton-MaskGIT, arXiv 2503.17076): neighbours are decided far apart in time.
    Raises ValueError where n is no square number.
    """
    side = math.isqrt(n)
    if side * side != n:
        raise ValueError(f"sampler halton: expected a square grid of tokens, found {n}")
    turns = torch.full((n,), -1)
    index = taken = 0
    while taken < n:
        index += 1
        cell = int(_radical_inverse(index, 2) * side) * side + int(_radical_inverse(index, 3) * side)
        if turns[cell] < 0:
            turns[cell] = taken
            taken += 1
    return turns


def _radical_inverse(index: int, base: int) -> float:
    """The digits of `index` in `base`, mirrored at the point: in [0, 1)."""
    value, weight = 0.0, 1.0
    while index:
        index, digit = divmod(index, base)
        weight /= base
        value += digit * weight
    return value


# --- checks -----------------------------------------------------------------------------------------------------------


def _check_inputs(tokens: Tensor, hidden: Tensor, mask_id: int, config, seeds: Sequence[int]) -> list[int]:
    if tokens.dtype != torch.long or tokens.ndim != 2:
        raise ValueError(f"tokens: expected (b, n) of torch.int64, found {tuple(tokens.shape)} of {tokens.dtype}")
    if hidden.dtype != torch.bool or hidden.shape != tokens.shape:
        raise ValueError(
            f"hidden: expected {tuple(tokens.shape)} of torch.bool, as tokens is; "
            f"found {tuple(hidden.shape)} of {hidden.dtype}"
        )
    if hidden.device != tokens.device:
        raise ValueError(f"hidden: expected on {tokens.device}, where tokens are, found on {hidden.device}")
    if len(seeds) != len(tokens):
        raise ValueError(f"seeds: expected one for each of the {len(tokens)} images, found {len(seeds)}")
    try:
        seeds = [operator.index(seed) for seed in seeds]
    except TypeError as error:
        raise ValueError(f"seeds: expected integers, found {list(seeds)}") from error
    if any(seed < 0 for seed in seeds):
        raise ValueError(f"seeds: expected integers >= 0, found {min(seeds)}")
    outside = (tokens < 0) | (tokens >= mask_id)
    if not config.forget:
        outside &= ~hidden
    if outside.any():
        raise ValueError(
            f"tokens: expected known ids in 0..{mask_id - 1} (mask_id = {mask_id}), found {tokens[outside].unique()}"
        )
    return seeds


def _check_logits(logits: Tensor, hidden: int, mask_id: int) -> None:
    shape = tuple(logits.shape)
    if len(shape) != 2 or shape[0] != hidden or not 1 <= shape[1] <= mask_id or not logits.is_floating_point():
        raise ValueError(
            f"predict: expected floating-point logits ({hidden}, k) of the hidden tokens with 1 <= k <= mask_id = "
            f"{mask_id}, found {shape} of {logits.dtype}"
        )
