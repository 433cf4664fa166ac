"""speed.py: how works are timed and counted."""

import pytest
import torch
from torch import nn

from evaluation import speed
from evaluation.speed import Measurement

CPU = torch.device("cpu")


def test_works_are_timed_in_turns_after_one_unmeasured_round():
    calls = []
    seconds = speed.interleaved({name: lambda name=name: calls.append(name) for name in "ab"}, 3, CPU)
    assert calls == ["a", "b"] * 4
    assert [len(values) for values in seconds.values()] == [3, 3] and min(map(min, seconds.values())) >= 0


def test_operations_of_a_linear_layer_forward_and_backward():
    layer, x = nn.Linear(20, 30), torch.randn(5, 20)
    assert speed.gflop(lambda: layer(x)) == pytest.approx(2 * 5 * 20 * 30 / 1e9)
    assert speed.gflop(lambda: layer(x).sum().backward()) == pytest.approx(2 * 2 * 5 * 20 * 30 / 1e9)  # no input grad


def test_operators_are_those_that_take_the_time():
    a = torch.randn(400, 400)
    shares = speed.operators(lambda: [a @ a for _ in range(5)], most=3)
    assert next(iter(shares)) == "aten::mm" and 0.5 < shares["aten::mm"] <= 1 and len(shares) <= 3
    text = speed.table([Measurement("tiny", "stage 1", 4, [1.0], operators={"aten::mm": 0.5, "aten::add": 0.25})])
    assert text.endswith("tiny stage 1: mm 50%, add 25%")


def test_rate_and_share_use_the_median():
    row = Measurement("tiny", "x", 10, [1.0, 9.0, 2.0], gflop=8.0, ceiling=16.0)
    assert (row.rate, row.share) == (5.0, 0.25)
    assert Measurement("tiny", "x", 10, [1.0]).share is None


def test_ceilings_are_plausible_for_this_processor():
    found = speed.ceilings(CPU, 2, 128)
    assert {"float32 product", "float32 convolution"} <= set(found)
    assert all(0.1 < value < 1e5 for value in found.values())
