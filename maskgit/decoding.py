"""Iterative parallel decoding: one pure decode step, and the one sampling loop of the repository.

    tokens      (b, n)     long   codes 0..k-1; mask_id = k where hidden
    hidden      (b, n)     bool   tokens to predict, True = hidden
    logits      (m, k)     float  what a transformer says of the hidden tokens, image by image
    confidence  (b, n)     float  probability of the chosen code, in [0, 1]

b batch, n tokens, k codes, e dimension of a code, m hidden tokens of the whole batch, T iterations, t the step 1..T,
r = t / T.
The loop sees `predict: tokens (b, n) -> logits (m, k)`, never a model, a trainer or a device.
"""

import operator
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from maskgit.decoding_config import AUTO, DecodingConfig
from maskgit.iterations import iterations, steps_of_second_look, still_hidden
from maskgit.orders import noise_weight, rank_score
from maskgit.windows import Windows


@dataclass(frozen=True, eq=False)
class State:
    """The tokens after one iteration."""

    step: int  # 1-based
    tokens: Tensor  # (b, n) long, mask_id where still hidden
    hidden: Tensor  # (b, n) bool
    confidence: Tensor  # (b, n) float32, 1 for tokens known from the start; where still hidden, of the code not taken
    codes: Tensor | None = None  # (b, n, e) float32: vectors to decode in place of tokens, where `config.blends`

    @property
    def decodable(self) -> Tensor:
        """What a VQGAN decodes: code vectors (b, n, e), or tokens (b, n)."""
        return self.tokens if self.codes is None else self.codes


# --- the loop ---------------------------------------------------------------------------------------------------------


def sample(
    predict: Callable[[Tensor], Tensor | Iterable[Tensor]],
    tokens: Tensor,
    hidden: Tensor,
    mask_id: int,
    config: DecodingConfig,
    seeds: Sequence[int],
    codebook: Tensor | None = None,
    windows: Windows | None = None,
    further: Tensor | None = None,
) -> Iterator[State]:
    """Decodes the hidden tokens, yielding a State after every iteration; in the last one nothing is hidden.

    predict: tokens (b, n), mask_id where hidden, -> logits (m, k) of the m hidden tokens, in row-major order, of any
        float type, k <= mask_id, all at once or in chunks; images that are complete are not among the b
    tokens (b, n) long: ids 0..mask_id-1 where known, anything where hidden (but with `config.forget`, which reads
        what was there); hidden (b, n) bool; neither is modified
    seeds: b integers >= 0. Image i's draws in its t-th iteration are a function of (seeds[i], t) alone, made on the
        CPU: its result depends neither on the rest of the batch nor on the device that draws.
    codebook (mask_id, e): the code vectors, which `config.codes` expected and mixed average
    windows: whose cells the n tokens are; None: they are a square, row by row
    further (b) bool: which images are further completions, of which codes auto makes no means (all would be alike)

    Known and decided tokens are never sampled again, but for the second look: after the last iteration the least sure
    of the decided ones are hidden, and the schedule goes on from where about as many were left. Without a hidden
    token anywhere there is one State, the tokens as they are, and no call of `predict`. Runs without gradients.
    Raises ValueError, at once, for tensors or seeds that do not fit, and while iterating for logits that do not.
    """
    seeds = _check_inputs(tokens, hidden, mask_id, config, seeds)
    if not config.blends:
        codebook = None
    elif codebook is None or codebook.ndim != 2 or len(codebook) != mask_id:
        found = codebook if codebook is None else tuple(codebook.shape)
        raise ValueError(f"codebook: codes {config.codes} expects ({mask_id}, e), found {found}")
    return _Loop(predict, tokens, hidden, mask_id, config, seeds, codebook, windows, further).states()


def fill(predict, tokens: Tensor, hidden: Tensor, mask_id: int, config, seeds: Sequence[int], codebook=None) -> State:
    """The last state of `sample`, whose arguments these are."""
    *_, state = sample(predict, tokens, hidden, mask_id, config, seeds, codebook)
    return state


class _Loop:
    """The iterations of a batch. The counts (b) stay on the CPU: asking for them waits for no GPU."""

    def __init__(self, predict, tokens, hidden, mask_id, config: DecodingConfig, seeds, codebook, windows, further):
        self.predict, self.given, self.hidden, self.mask_id = predict, tokens, hidden, mask_id
        self.config, self.seeds, self.codebook, self.windows = config, seeds, codebook, windows
        self.further = further
        self.count = hidden.sum(dim=1).cpu()
        self.total = iterations(hidden, config, windows).cpu()
        self.turn = torch.zeros_like(self.count)  # iterations that decided something of each image

    def states(self) -> Iterator[State]:
        tokens = self.given.masked_fill(self.hidden, self.mask_id)
        vectors = None if self.codebook is None else F.embedding(self.given.masked_fill(self.hidden, 0), self.codebook)
        state = State(0, tokens, self.hidden, torch.ones(tokens.shape, device=tokens.device), vectors)
        if not self.count.any():
            yield State(1, state.tokens, state.hidden, state.confidence, state.codes)
            return
        state = yield from self._decode(state, torch.ones_like(self.total))
        if self.config.second_look:
            state = look_again(state, self.hidden, self.mask_id, self.config)
            yield from self._decode(state, steps_of_second_look(self.total, self.config))

    def _decode(self, state: State, step: Tensor) -> Generator[State, None, State]:
        """Decodes until nothing is hidden, each image from its `step` (b) of the schedule."""
        left = state.hidden.sum(dim=1).cpu()
        while left.any():
            seen = self.given.masked_fill(state.hidden, self.mask_id) if self.config.forget else state.tokens
            unfinished = seen if left.all() else seen[(left > 0).to(seen.device)]
            before, self.turn = int(left.sum()), self.turn + (left > 0)
            left = still_hidden(self.count, left, step, self.total, self.config)
            uniforms = draws(self.seeds, self.turn.tolist(), seen.shape[1])
            r = (step / self.total.double()).clamp(max=1)  # images that are done go beyond their T
            with torch.no_grad():
                logits = _checked(self.predict(unfinished), before, self.mask_id)
                given = self.config, self.codebook, self.windows, self.further
                state = decode_step(state, logits, left, uniforms, r, *given)
            yield state
            step = step + 1
        return state


# --- one step, in pure functions --------------------------------------------------------------------------------------


def draws(seeds: Sequence[int], steps: Sequence[int], n: int) -> Tensor:
    """Uniforms in [0, 1) of a step of each image, (b, 2, n) float32: for each token one for its code, one for its rank.

    NumPy's SeedSequence mixes all bits of (seed, step); torch's CPU generator would keep only 32 bits of a seed.
    """
    uniforms = np.empty((len(seeds), 2, n), dtype=np.float32)
    for image, seed, step in zip(uniforms, seeds, steps, strict=True):
        np.random.default_rng([seed, step]).random(out=image, dtype=np.float32)
    return torch.from_numpy(uniforms)


def decode_step(
    state: State,
    logits: Iterable[Tensor],
    left: Tensor,
    uniforms: Tensor,
    r: Tensor,
    config: DecodingConfig,
    codebook: Tensor | None = None,
    windows: Windows | None = None,
    further: Tensor | None = None,
) -> State:
    """Proposes a code for every hidden token and decides the most confident ones; `left` (b) of them stay hidden.

    logits: chunks (m', k), together (m, k); uniforms (b, 2, n) as `draws` gives them; r (b) in (0, 1]; codebook (k, e)
    where the state has code vectors; windows and further as of `sample`; a pure function. The confidence is the
    probability of the proposed code under the softmax of the logits at temperature 1 and over all k codes, as in the
    official MaskGIT, however the code was drawn: sampling_temperature and top_k change the code, not what the model
    thinks of it. Raises ValueError where the logits have no softmax (NaN or +inf, or -inf only).
    """
    hidden, step = state.hidden, state.step + 1
    image, place = torch.where(hidden)  # (m) each
    code_draw, rank_draw = (part[hidden] for part in uniforms.to(hidden.device).unbind(dim=1))  # (m) each
    soft = None  # (m) bool: of which tokens the mean is taken
    if state.codes is not None:
        last = left == 0
        if config.codes == AUTO:
            last &= (state.step == 0) & ~(torch.zeros_like(last) if further is None else further)
        soft = last.to(hidden.device)[image] | (config.codes == "expected")
    parts, start = [], 0
    for chunk in logits:
        rows = slice(start, start + len(chunk))
        own = code_draw[rows], None if soft is None else soft[rows]
        parts.append(_propose(chunk.float(), *own, step, config, codebook))
        start = rows.stop
    codes, log_p, vectors = (None if part[0] is None else torch.cat(part) for part in zip(*parts, strict=True))

    score = torch.full_like(state.confidence, torch.inf)  # (b, n), +inf freezes what is known or decided
    turn, n = (place, hidden.shape[1]) if windows is None else (windows.place.to(place.device)[place], windows.side**2)
    weight = noise_weight(r, config).to(image.device)[image]
    score[hidden] = rank_score(log_p, rank_draw, turn, n, weight, config)
    rank = score.argsort(dim=1, stable=True).argsort(dim=1)  # 0 = least confident; no two alike, so counts are exact
    stays = rank < left.to(hidden.device)[:, None]

    proposed = state.tokens.masked_scatter(hidden, codes)
    confidence = state.confidence.masked_scatter(hidden, log_p.exp())
    decided = hidden & ~stays
    if vectors is not None:
        vectors = state.codes.masked_scatter(decided[..., None], vectors[decided[hidden]])
    return State(step, torch.where(stays, state.tokens, proposed), stays, confidence, vectors)


def _propose(logits: Tensor, uniform: Tensor, soft: Tensor | None, step: int, config: DecodingConfig, codebook):
    """A code for each row of logits (m', k) float32, its log p, and where `soft` (m') is given its vector, or the mean
    of all: (m') long, (m') and (m', e)."""
    codes = choose_codes(logits, uniform, config)
    log_p = (logits.gather(1, codes[:, None])[:, 0] - logits.logsumexp(dim=1)).clamp(max=0)
    if (log_p.isnan() | logits.amax(dim=1).isinf()).any():
        raise ValueError(f"step {step}: logits of a hidden token hold NaN or +inf, or only -inf; expected finite ones")
    if soft is None:
        return codes, log_p, None
    vectors = F.embedding(codes, codebook)
    vectors[soft] = expected_codes(logits[soft], codebook, config)
    return codes, log_p, vectors


def choose_codes(logits: Tensor, uniform: Tensor, config: DecodingConfig) -> Tensor:
    """One code for each row of logits (m, k) float32, by inverse CDF at uniform (m) in [0, 1): (m) long."""
    if config.codes == "argmax" or config.sampling_temperature == 0:
        return logits.argmax(dim=1)
    p, ids = _tempered(logits, config)
    index = _invert(p, uniform)
    return index if ids is None else ids.gather(1, index[:, None])[:, 0]


def expected_codes(logits: Tensor, codebook: Tensor, config: DecodingConfig) -> Tensor:
    """The mean of the code vectors, codebook (k, e), under the probabilities that codes are drawn with: (m, e) float32.

    Kin: soft-masking (arXiv 2510.17206). Of l2-normalised codes it is shorter than one where the model is unsure.
    """
    if config.sampling_temperature == 0:
        return F.embedding(logits.argmax(dim=1), codebook)
    p, ids = _tempered(logits, config)
    codebook = codebook.float()[: logits.shape[1]]
    with torch.autocast(p.device.type, enabled=False):  # around a training, say
        return p @ codebook if ids is None else (p[..., None] * F.embedding(ids, codebook)).sum(dim=1)


def _tempered(logits: Tensor, config: DecodingConfig) -> tuple[Tensor, Tensor | None]:
    """Probabilities (m, k) at the sampling temperature (> 0), or those of the top_k alone with their ids (m, top_k)."""
    top, ids = logits, None
    if 0 < config.top_k < logits.shape[1]:
        top, ids = logits.topk(config.top_k, dim=1)  # exactly top_k columns, even with ties
    # the maximum first, or a small temperature overflows; below 1e-6 float32 knows the argmax only
    scaled = (top - top.amax(dim=1, keepdim=True)) / max(config.sampling_temperature, 1e-6)
    return scaled.softmax(dim=1), ids


def _invert(p: Tensor, uniform: Tensor) -> Tensor:
    """The first index whose cumulated p (m, k) exceeds uniform (m) times the row's total: (m) long, p[index] > 0."""
    cdf = p.cumsum(dim=1)
    index = torch.searchsorted(cdf, uniform[:, None] * cdf[:, -1:], right=True).clamp(max=p.shape[1] - 1)  # (m, 1)
    # rounding (a uniform next to 1, or the GPU's parallel sum) may end on a code of probability 0: step back from it
    stray = (p.gather(1, index) == 0)[:, 0]
    ids = torch.arange(p.shape[1], device=p.device)
    index[stray] = (ids * ((p[stray] > 0) & (ids < index[stray]))).amax(dim=1, keepdim=True)
    return index[:, 0]


def look_again(state: State, hidden: Tensor, mask_id: int, config: DecodingConfig) -> State:
    """`state`, complete, with the least sure of its decided tokens hidden: floor(second_look count) of each image.

    hidden (b, n) bool: at the start, count of each image; the others, known, stay as they are.
    """
    again = (hidden.sum(dim=1).double() * config.second_look + 1e-9).floor()  # (b)
    unsure = state.confidence.masked_fill(~hidden, torch.inf).argsort(dim=1, stable=True).argsort(dim=1)
    back = unsure < again[:, None]
    return State(state.step, state.tokens.masked_fill(back, mask_id), back, state.confidence, state.codes)


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


def _checked(given: Tensor | Iterable[Tensor], hidden: int, mask_id: int) -> Iterator[Tensor]:
    """The logits of the `hidden` tokens, in chunks. Raises ValueError for what they must not be."""
    found = 0
    for logits in [given] if isinstance(given, Tensor) else given:
        shape = tuple(logits.shape)
        found += shape[0] if shape else 0
        if len(shape) != 2 or found > hidden or not 1 <= shape[1] <= mask_id or not logits.is_floating_point():
            raise _misfit(hidden, mask_id, f"{shape} of {logits.dtype}")
        yield logits
    if found != hidden:
        raise _misfit(hidden, mask_id, f"{found} rows")


def _misfit(hidden: int, mask_id: int, found: str) -> ValueError:
    return ValueError(f"predict: expected floating-point logits ({hidden}, k) of the hidden tokens with 1 <= k <= "
                      f"mask_id = {mask_id}, found {found}")  # fmt: skip
