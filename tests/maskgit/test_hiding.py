"""hiding.py: which tokens a training step hides, and holes for training."""

import math

import pytest
import torch

from maskgit.hiding import POLICIES, HidingPolicy, HoleMixture
from maskgit.masks import FAMILIES, make_holes, to_hidden

GRID, N = 16, 256


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def policy(weights, **options) -> HidingPolicy:
    return HidingPolicy(weights, grid=GRID, image_size=64, **{"bank": 8, **options})


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_hides_at_least_one_token_in_every_sample(name):
    hidden = policy({name: 1.0})(300, generator())
    assert hidden.shape == (300, N) and hidden.dtype == torch.bool
    assert hidden.any(dim=1).all()


def test_bernoulli_hides_each_token_with_probability_p():
    for p in (0.5, 0.2):
        hidden = policy({"bernoulli": 1}, p=p)(400, generator()).float()
        assert hidden.mean() == pytest.approx(p, abs=0.01)
        assert hidden.sum(dim=1).var() == pytest.approx(N * p * (1 - p), rel=0.25)  # binomial: tokens independent
        assert (hidden.mean(dim=0) - p).abs().max() < 0.12


def test_bernoulli_that_hides_nothing_hides_one_token():
    hidden = policy({"bernoulli": 1}, p=1e-9)(20, generator())
    assert (hidden.sum(dim=1) == 1).all()
    assert len(set(hidden.int().argmax(dim=1).tolist())) > 10


@pytest.mark.parametrize(("name", "mean"), [("uniform", 1 / 2), ("cosine", 2 / math.pi)])
def test_each_sample_has_its_own_ratio(name, mean):
    """A ratio shared by the batch is a known trap."""
    hidden = policy({name: 1})(1000, generator())
    counts = hidden.sum(dim=1)
    assert len(counts.unique()) > 150
    assert counts.float().mean() / N == pytest.approx(mean, abs=0.03)
    assert (hidden.float().mean(dim=0) - mean).abs().max() < 0.08  # no place is preferred


@pytest.mark.parametrize("name", ["uniform", "cosine"])
def test_counts_are_the_ceiling_of_ratio_times_n(name, monkeypatch):
    u = torch.tensor([0.0, 0.001, 0.25, 0.5, 0.7511, 0.999])
    rand = torch.rand
    monkeypatch.setattr(torch, "rand", lambda *shape, **draws: u if shape == (6,) else rand(*shape, **draws))
    counts = policy({name: 1})(6, generator()).sum(dim=1).tolist()
    ratios = [float(x) if name == "uniform" else math.cos(math.pi / 2 * float(x)) for x in u]
    assert counts == [max(1, math.ceil(ratio * N)) for ratio in ratios]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_hole_policy_hides_a_random_part_of_one_hole(family):
    hidden = policy({family: 1}, bank=4, seed=9)(200, generator())
    touched = to_hidden(make_holes(family, 4, seed=9), GRID)
    inside = ~(hidden[:, None] & ~touched[None]).any(dim=2)  # (sample, hole): nothing hidden outside the hole
    assert inside.any(dim=1).all()
    shares = torch.cat([hidden[inside[:, i]].sum(dim=1) / touched[i].sum() for i in range(4)])
    assert shares.max() > 0.95 and shares.min() < 0.3


def test_holes_draws_from_every_family():
    sides = policy({"holes": 1}, bank=2)
    assert sides.kinds == list(FAMILIES)
    box = to_hidden(make_holes("box", 1), GRID)
    in_box = ~(sides(600, generator()) & ~box).any(dim=1)
    assert 0.1 < in_box.float().mean() < 0.3  # a sixth, and sparse remains of other holes


def test_a_mixture_draws_per_sample_by_weight():
    hidden = policy({"bernoulli": 3, "box": 1}, p=1.0)(1000, generator())
    assert hidden.all(dim=1).float().mean() == pytest.approx(0.75, abs=0.04)


def test_a_mixture_does_not_depend_on_the_order_or_scale_of_its_weights():
    one = policy({"walk": 0.25, "cosine": 0.75})(50, generator())
    assert torch.equal(one, policy({"cosine": 3.0, "walk": 1.0, "half": 0.0})(50, generator()))


def test_hiding_is_a_function_of_the_generator():
    hide = policy({"holes": 1, "cosine": 1})
    assert torch.equal(hide(32, generator(1)), hide(32, generator(1)))
    assert not torch.equal(hide(32, generator(1)), hide(32, generator(2)))


@pytest.mark.parametrize(
    ("weights", "options", "message"),
    [
        ({"beta": 1}, {}, "'beta'.*bernoulli, uniform, cosine, walk.*holes"),
        ({"cosine": -1}, {}, "weight of cosine: -1"),
        ({"cosine": math.nan}, {}, "weight of cosine: nan"),
        ({"holes": 5e-324}, {}, "weight of holes: 5e-324, expected 0 or a number in"),
        ({"cosine": 0}, {}, "at least one above 0"),
        ({}, {}, "at least one above 0"),
        ({"bernoulli": 1}, {"p": 0.0}, "p 0.0"),
        ({"bernoulli": 1}, {"p": 1.5}, "p 1.5"),
        ({"walk": 1}, {"bank": 0}, "bank 0"),
    ],
)
def test_bad_policies_are_refused(weights, options, message):
    with pytest.raises(ValueError, match=message):
        policy(weights, **options)


def test_a_grid_that_does_not_divide_the_image_is_refused():
    with pytest.raises(ValueError, match="grid 15"):
        HidingPolicy({"cosine": 1}, grid=15, image_size=64, bank=1)


def test_a_mixture_of_holes_draws_families_by_weight():
    weights = {"box": 3.0, "half": 1.0, "walk": 0.0, "all": 1.0}
    hole = HoleMixture(weights, 16, bank=50)(2000, generator())
    assert hole.shape == (2000, 1, 16, 16) and hole.dtype == torch.bool
    share = hole.float().mean(dim=(1, 2, 3))
    found = [((share - value).abs() < 1e-6).float().mean().item() for value in (0.25, 0.5, 1.0)]
    assert all(abs(a - b) < 0.04 for a, b in zip(found, (0.6, 0.2, 0.2), strict=True))  # sd <= .011
    assert torch.equal(
        hole, HoleMixture({"box": 3.0, "half": 1.0, "walk": 0.0, "all": 1.0}, 16, bank=50)(2000, generator())
    )
    walks = HoleMixture({"walk": 1.0}, 16, bank=50)(200, generator())
    assert 30 < len({bytes(walk.numpy()) for walk in walks}) <= 50


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"cosine": 1.0}, "hole family 'cosine'.*walk.*all"),
        ({"box": -1.0}, "weight of box: -1"),
        ({"box": 0.0}, "above 0"),
    ],
)
def test_a_mixture_of_holes_names_what_is_wrong(weights, message):
    with pytest.raises(ValueError, match=message):
        HoleMixture(weights, 16)
