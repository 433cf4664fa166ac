"""Tests of the orders of decoding."""

import pytest
import torch

from maskgit.decoding import draws
from maskgit.decoding_config import SAMPLERS, DecodingConfig
from maskgit.masks import SCHEDULES, schedule
from maskgit.orders import halton_turns, noise_weight, rank_score

K = 12  # codes


def rank(log_p, uniform, r, **options):
    """`rank_score` of m tokens of an image of m at progress r."""
    m, config = len(log_p), DecodingConfig(**options)
    weight = noise_weight(torch.tensor([r]), config).expand(m)
    return rank_score(log_p, uniform, torch.arange(m), m, weight, config)


def test_every_token_has_its_own_gumbel():
    assert len(rank(torch.zeros(64), draws([0], [1], 64)[0, 1], 0.1).unique()) == 64


def test_extreme_uniforms_rank_finitely():
    for sampler in SAMPLERS:
        score = rank(torch.full((4,), -80.0), torch.tensor([0.0, 1 - 2**-24, 0.5, 0.5]), 0.1, sampler=sampler)
        assert score.isfinite().all() and (sampler == "halton" or score[0] < score[1])


def rank_correlation(sampler, step, n=4000):
    """Spearman's correlation of the order of decoding with p, at `step` of 10 and temperature 4.5."""
    rng = torch.Generator().manual_seed(0)
    log_p = torch.randn(n, K, generator=rng).mul(2).log_softmax(dim=1).amax(dim=1)
    score = rank(log_p, torch.rand(n, generator=rng), step / 10, sampler=sampler)
    ranks = torch.stack([log_p, score]).argsort(dim=1).argsort(dim=1).double()
    return torch.corrcoef(ranks)[0, 1].item()


def test_the_lab_order_is_nearly_random_where_maskgit_follows_confidence():
    lab, maskgit, random = (
        [rank_correlation(name, step) for step in (1, 5, 9)] for name in ("lab", "maskgit", "random")
    )
    assert all(abs(value) < 0.06 for value in random)  # sd .016
    assert lab[0] < 0.12 and lab[0] < lab[1] < lab[2] < 0.6  # p differs by less than 1, the noise is 5 wide at first
    assert all(a < b for a, b in zip(lab, maskgit, strict=True))
    assert maskgit[0] < maskgit[1] < maskgit[2]  # the noise shrinks as 1 - r
    assert rank_correlation("maskgit", 10) > 0.999 and rank_correlation("lab", 10) > 0.999


def test_the_random_order_ignores_p_and_temperature():
    log_p, uniform = torch.linspace(-9, 0, 50), torch.rand(50, generator=torch.Generator().manual_seed(0))
    scores = [
        rank(log_p * scale, uniform, 0.5, sampler="random", temperature=temperature)
        for scale, temperature in [(1, 4.5), (0, 4.5), (1, 0.0)]
    ]
    assert torch.equal(scores[0].argsort(), uniform.argsort())
    assert all(torch.equal(score, scores[0]) for score in scores)


def test_maskgit_ranks_by_log_p_and_lab_by_p():
    log_p, uniform = torch.tensor([-3.0, -0.1]), torch.tensor([0.7, 0.2])
    gumbel = -torch.log(-torch.log(uniform))
    maskgit = rank(log_p, uniform, 0.25, sampler="maskgit", temperature=2.0)
    lab = rank(log_p, uniform, 0.25, sampler="lab", temperature=2.0)
    assert torch.allclose(maskgit, log_p + 1.5 * gumbel)
    assert torch.allclose(lab, log_p.exp() + 1.5 * gumbel)


def test_the_growing_noise_follows_the_schedule_downwards():
    log_p, uniform = torch.tensor([-3.0, -0.1]), torch.tensor([0.7, 0.2])
    gumbel = -torch.log(-torch.log(uniform))
    for name in SCHEDULES:
        score = rank(log_p, uniform, 0.25, sampler="growing", temperature=2.0, mask_func=name)
        assert torch.allclose(score, log_p.exp() + 2.0 * (1 - schedule(name)(0.25)) * gumbel)
    growing = [rank_correlation("growing", step) for step in (1, 5, 9)]
    assert growing[0] > growing[1] > growing[2] and growing[0] > 3 * rank_correlation("lab", 1)


def test_halton_needs_a_square():
    with pytest.raises(ValueError, match=r"halton.*square.*12"):
        halton_turns(12)


@pytest.mark.parametrize("side", [1, 2, 5, 16])
def test_every_token_has_one_halton_turn(side):
    assert torch.equal(halton_turns(side * side).sort().values, torch.arange(side * side))


def test_halton_turns_follow_the_sequence_and_spread_over_the_image():
    # (1/2, 1/3), (1/4, 2/3), (3/4, 1/9), (1/8, 4/9) on a grid of 4x4
    assert [halton_turns(16)[row * 4 + column].item() for row, column in [(2, 1), (1, 2), (3, 0), (0, 1)]] == [
        0, 1, 2, 3
    ]  # fmt: skip
    first = (halton_turns(256) < 16).view(4, 4, 4, 4).sum(dim=(1, 3))  # a 16th of the tokens, by blocks
    assert first.max() <= 2 and (first > 0).sum() >= 13
