"""The samplers: in which order hidden tokens are decided.

b batch, n tokens an image, m hidden tokens of the whole batch, r = t / T the progress of step t of T.
"""

import functools
import math

import torch
from torch import Tensor

from maskgit.decoding_config import DecodingConfig
from maskgit.masks import schedule


def noise_weight(r: Tensor, config: DecodingConfig) -> Tensor:
    """What the order's Gumbel noise weighs at progress r (b) in (0, 1], (b) float32: temperature times 1 - r, or, for
    the sampler growing, 1 - mask_func(r)."""
    fading = 1 - (schedule(config.mask_func)(r) if config.sampler == "growing" else r)
    return (config.temperature * fading).float()


def rank_score(log_p: Tensor, uniform: Tensor, place: Tensor, n: int, weight: Tensor, config: DecodingConfig) -> Tensor:
    """What hidden tokens are ranked by, (m) float32, the highest is decided first.

    log_p and uniform (m) in [0, 1), place (m) long: which of the image's n tokens it is, weight (m) of the noise
    maskgit: log p + weight Gumbel; lab and growing: p + weight Gumbel; random: Gumbel alone; halton: minus the token's
    turn in `halton_turns`.
    """
    if config.sampler == "halton":
        return -halton_turns(n).to(place.device)[place].float()
    gumbel = -(-uniform.clamp(min=2**-25).log()).log()  # float32 uniforms are multiples of 2^-24: 0 stands for less
    if config.sampler == "random":
        return gumbel
    return (log_p if config.sampler == "maskgit" else log_p.exp()) + weight * gumbel


@functools.cache
def halton_turns(n: int) -> Tensor:
    """When each of n tokens, a square grid row by row, gets its turn: (n) long, a permutation of 0..n-1.

    Cells in the order in which the two-dimensional Halton sequence of bases 2 and 3 first falls into them
    (Besnier et al., Halton-MaskGIT, arXiv 2503.17076): neighbours are decided far apart in time.
    Raises ValueError where n is no square number.
    """
    side = square_side(n, "sampler halton")
    turns = torch.full((n,), -1)
    index = taken = 0
    while taken < n:
        index += 1
        cell = int(_radical_inverse(index, 2) * side) * side + int(_radical_inverse(index, 3) * side)
        if turns[cell] < 0:
            turns[cell] = taken
            taken += 1
    return turns


def square_side(n: int, who: str) -> int:
    """The side of a square grid of n tokens. Raises ValueError, naming `who` needs it, for another n."""
    side = math.isqrt(n)
    if side * side != n:
        raise ValueError(f"{who}: expected a square grid of tokens, found {n}")
    return side


def _radical_inverse(index: int, base: int) -> float:
    """The digits of `index` in `base`, mirrored at the point: in [0, 1)."""
    value, weight = 0.0, 1.0
    while index:
        index, digit = divmod(index, base)
        weight /= base
        value += digit * weight
    return value
