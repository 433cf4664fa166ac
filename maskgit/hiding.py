"""Holes and hidden tokens at training time: mixtures of families and of hiding policies, drawn for each sample.

hole    (b, 1, H, W) bool   pixels to fill, True = missing
hidden  (b, n)       bool   tokens to predict, True = hidden; n = grid * grid, row by row
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from maskgit.masks import FAMILIES, TokenRule, known_name, make_holes, schedule, to_hidden
from maskgit.photo_holes import PHOTO_FAMILIES, window_holes

EVERYTHING = "all"
HOLES = (*FAMILIES, *PHOTO_FAMILIES, EVERYTHING)  # what a HoleMixture draws from


class HoleMixture:
    """Holes for training: a family drawn for each sample, then one of its `bank` holes, made once from `seed`.

    weights: family -> weight, 0 or more, in any scale; of those of photographs what a window sees; the family `all`
    misses every pixel. Raises ValueError naming the value for an unknown family or bad weights.
    """

    def __init__(self, weights: Mapping[str, float], image_size: int, bank: int = 1024, seed: int = 0):
        self._weights = checked_weights(weights, HOLES, "hole family")
        self._bank = [
            torch.ones(1, 1, image_size, image_size, dtype=torch.bool)
            if family == EVERYTHING
            else (window_holes if family in PHOTO_FAMILIES else make_holes)(family, bank, image_size, seed)
            for family in weights
        ]

    def __call__(self, batch: int, generator: torch.Generator) -> Tensor:
        """hole (batch, 1, H, W) bool."""
        kinds = torch.multinomial(self._weights, batch, replacement=True, generator=generator).tolist()
        places = torch.rand(batch, generator=generator, dtype=torch.float64).tolist()
        return torch.stack(
            [self._bank[kind][int(x * len(self._bank[kind]))] for kind, x in zip(kinds, places, strict=True)]
        )


def checked_weights(weights: Mapping[str, float], known: tuple[str, ...], noun: str) -> Tensor:
    """The weights (len(weights)) float64, each of a name among the `known`. Raises ValueError naming what is wrong."""
    for name, weight in weights.items():
        known_name(noun, name, known)
        if weight and not 1e-9 <= weight <= 1e9:  # beyond, shares of it round to 0 or add up to inf
            raise ValueError(f"weight of {name}: {weight}, expected 0 or a number in [1e-9, 1e9]")
    if not any(weights.values()):
        raise ValueError(f"weights {dict(weights)}: expected at least one above 0")
    return torch.tensor(list(weights.values()), dtype=torch.float64)


_EVERYWHERE = ("bernoulli", "uniform", "cosine")
POLICIES: tuple[str, ...] = (*_EVERYWHERE, *FAMILIES, "holes")


def _may_be_hidden(hole: Tensor, grid: int, rule: TokenRule) -> Tensor:
    """`to_hidden` by `rule`, or by `any` where a hole is too thin to hide a single token: (b, n)."""
    hidden = to_hidden(hole, grid, rule=rule)
    return torch.where(hidden.any(dim=1, keepdim=True), hidden, to_hidden(hole, grid))


class HidingPolicy:
    """Which tokens a training step hides: a mixture of policies, drawn for each sample.

    - `bernoulli`: every token with probability `p`
    - `uniform`: ceil(u n) tokens, u ~ U(0, 1) for each sample
    - `cosine`: ceil(cos(pi u / 2) n) tokens (MaskGIT, section 3.2)
    - a hole family: ceil(cos(pi u / 2) m) of the m tokens that a hole of the family hides by `rule`; the others are
      shown, because iterative decoding sees half-filled holes
    - `holes`: a family at random

    weights: policy -> weight, 0 or more, in any scale. The hole families draw from `bank` hidden maps each, made once
    from `seed` (strokes are too slow for the training loop).
    Raises ValueError naming the value for an unknown policy, bad weights, p outside (0, 1], bank < 1 or a grid that
    does not divide `image_size`.
    """

    def __init__(
        self,
        weights: Mapping[str, float],
        grid: int,
        image_size: int,
        p: float = 0.5,
        bank: int = 1024,
        seed: int = 0,
        rule: TokenRule = "any",
    ):
        checked_weights(weights, POLICIES, "hiding policy")
        if not 0 < p <= 1:
            raise ValueError(f"p {p}: expected a probability in (0, 1]")
        if bank < 1:
            raise ValueError(f"bank {bank}: expected at least one hidden map for each hole family")
        self.p = p
        shared = weights.get("holes", 0) / len(FAMILIES)
        totals = {name: weights.get(name, 0) + shared * (name in FAMILIES) for name in POLICIES if name != "holes"}
        self.kinds = [name for name, weight in totals.items() if weight]  # in one order, whatever that of `weights`
        self._weights = torch.tensor([totals[name] for name in self.kinds], dtype=torch.float64)

        holes = [
            torch.ones(bank, 1, image_size, image_size, dtype=torch.bool)
            if name in _EVERYWHERE
            else make_holes(name, bank, image_size, seed)
            for name in self.kinds
        ]
        self._bank = torch.stack([_may_be_hidden(hole, grid, rule) for hole in holes])  # (kinds, bank, n)

    def __call__(self, batch: int, generator: torch.Generator) -> Tensor:
        """hidden (batch, n) bool on the generator's device, at least one hidden token in every sample."""
        device = generator.device
        if self._bank.device != device:
            self._bank, self._weights = self._bank.to(device), self._weights.to(device)
        draws = {"generator": generator, "device": device}
        kind = torch.multinomial(self._weights, batch, replacement=True, generator=generator)  # (b)
        entry = torch.randint(self._bank.shape[1], (batch,), **draws)  # (b)
        u = torch.rand(batch, **draws)  # (b)
        candidates = self._bank[kind, entry]  # (b, n)
        scores = torch.rand(candidates.shape, **draws)  # (b, n)

        ratio = torch.where(self._is("uniform", kind), u, schedule("cosine")(u))
        counts = (ratio * candidates.sum(dim=1)).ceil().long()  # (b)
        counts = torch.where(self._is("bernoulli", kind), (scores < self.p).sum(dim=1), counts).clamp(min=1)
        # the `counts` candidates with the lowest scores; for bernoulli these are the tokens with scores < p
        rank = scores.masked_fill(~candidates, 2.0).argsort(dim=1).argsort(dim=1)  # (b, n)
        return rank < counts[:, None]

    def _is(self, name: str, kind: Tensor) -> Tensor:
        return kind == (self.kinds.index(name) if name in self.kinds else -1)
