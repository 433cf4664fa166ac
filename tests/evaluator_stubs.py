"""Stub networks of the evaluator, for its tests and those of a sweep."""

import pytest
import torch
from torch import nn

from evaluation import evaluator

N, SIZE = 6, 16


class Means(nn.Module):
    """Stands in for VGG16Features: the mean of each channel."""

    dimensions = 3

    def __init__(self, weights=None):
        super().__init__()
        self.weights_file = weights

    def forward(self, images):
        return images.mean(dim=(2, 3))


class Distance(nn.Module):
    """Stands in for LPIPS: the mean absolute difference."""

    def __init__(self, net, weights):
        super().__init__()

    def forward(self, images, truth):
        return (images - truth).abs().mean(dim=(1, 2, 3))


@pytest.fixture
def stubs(monkeypatch, tmp_path):
    """A file that stands for both weights."""
    monkeypatch.setattr(evaluator, "VGG16Features", Means)
    monkeypatch.setattr(evaluator, "Perceptual", Distance)
    (tmp_path / "stub.safetensors").write_bytes(b"weights")
    return tmp_path / "stub.safetensors"


def truth(n: int = N) -> torch.Tensor:
    return torch.randint(0, 256, (n, 3, SIZE, SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
