"""LPIPS as a frozen loss: backbone from a local file, no network, gradients to the images only.

The backbone is alex with random weights of the real shapes: LPIPS is a distance with any backbone.
"""

import re
import socket

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from models.perceptual import Perceptual

SHAPES = {0: (64, 3, 11, 11), 3: (192, 64, 5, 5), 6: (384, 192, 3, 3), 8: (256, 384, 3, 3), 10: (256, 256, 3, 3)}


def backbone(seed: int) -> dict[str, Tensor]:
    """Random tensors with the names and shapes of torchvision's alexnet, He-scaled, so that no layer is silent."""
    rng = torch.Generator().manual_seed(seed)
    state = {"classifier.6.bias": torch.zeros(1000)}  # more than LPIPS needs, as in torchvision's own file
    for index, shape in SHAPES.items():
        fan_in = shape[1] * shape[2] * shape[3]
        state[f"features.{index}.weight"] = torch.randn(shape, generator=rng) * (2 / fan_in) ** 0.5
        state[f"features.{index}.bias"] = torch.randn(shape[0], generator=rng) * 0.1
    return state


@pytest.fixture(autouse=True, scope="module")
def quick():
    """torchvision's alexnet draws 59 M random weights for a classifier that LPIPS throws away: skip the draw."""
    patch = pytest.MonkeyPatch()
    patch.setattr(nn.Linear, "reset_parameters", lambda self: None)
    yield
    patch.undo()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("backbones")


@pytest.fixture(scope="module")
def weights(folder):
    save_file(backbone(0), folder / "alex.safetensors")
    return folder / "alex.safetensors"


@pytest.fixture(scope="module")
def perceptual(weights) -> Perceptual:
    return Perceptual("alex", weights)


@pytest.fixture
def connections(monkeypatch) -> list:
    """Every attempt to reach the network, which fails."""
    attempts = []

    def refuse(*args, **kwargs):
        attempts.append(args)
        raise OSError("no network here")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    return attempts


def images(count: int = 2, seed: int = 0, size: int = 64) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def test_equal_images_are_at_distance_zero(perceptual):
    assert torch.equal(perceptual(images(), images()), torch.zeros(2))


def test_different_images_are_at_a_positive_symmetric_distance_each(perceptual):
    one, other = images(3), images(3, seed=1)
    distance = perceptual(one, other)
    assert distance.shape == (3,) and (distance > 1e-3).all()
    assert torch.allclose(distance, perceptual(other, one))


def test_more_noise_is_farther(perceptual):
    truth, noise = images(), images(seed=1) - 0.5
    near, far = (perceptual((truth + scale * noise).clamp(0, 1), truth) for scale in (0.05, 0.8))
    assert (near < far).all()


def test_an_image_alone_is_as_far_as_in_a_batch(perceptual):
    one, other = images(3), images(3, seed=1)
    together = perceptual(one, other)
    for index in range(3):
        alone = perceptual(one[index : index + 1], other[index : index + 1])
        assert alone.shape == (1,) and torch.allclose(alone[0], together[index], rtol=1e-4)


def test_images_in_0_1_are_what_lpips_knows_as_minus_one_to_one(perceptual):
    one, other = images(), images(seed=1)
    assert torch.allclose(perceptual(one, other), perceptual.model(2 * one - 1, 2 * other - 1).flatten(), rtol=1e-5)


def test_the_distance_is_that_of_the_paper(perceptual, weights):
    """LPIPS eq. 1 by hand: unit-length features, weighted squared difference, mean over space, sum over layers."""
    state = backbone(0)
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])

    def features(x: Tensor) -> list[Tensor]:
        x = (2 * x - 1 - shift.view(1, 3, 1, 1)) / scale.view(1, 3, 1, 1)
        layers = []
        for index, (stride, padding) in zip(SHAPES, [(4, 2), (1, 2), (1, 1), (1, 1), (1, 1)], strict=True):
            if index in (3, 6):
                x = nn.functional.max_pool2d(x, 3, 2)
            x = nn.functional.conv2d(
                x, state[f"features.{index}.weight"], state[f"features.{index}.bias"], stride, padding
            )
            x = x.relu()
            layers.append(x / x.square().sum(1, keepdim=True).sqrt())
        return layers

    one, other = images(), images(seed=1)
    heads = [getattr(perceptual.model, f"lin{level}").model[-1].weight for level in range(5)]
    by_hand = sum(
        ((a - b).square() * head.flatten().view(1, -1, 1, 1)).sum(1).mean((1, 2))
        for a, b, head in zip(features(one), features(other), heads, strict=True)
    )
    assert torch.allclose(perceptual(one, other), by_hand, rtol=1e-3)


def test_maps_are_the_distance_before_its_mean(perceptual):
    rng = torch.Generator().manual_seed(3)
    images, truth = torch.rand(2, 3, 64, 64, generator=rng), torch.rand(2, 3, 64, 64, generator=rng)
    truth[:, :, :, :32] = images[:, :, :, :32]
    maps = perceptual.maps(images, truth)
    assert maps.shape == (2, 1, 64, 64) and (maps[..., :8] < maps[..., 40:].mean() / 3).all()
    assert torch.allclose(maps.mean(dim=(1, 2, 3)), perceptual(images, truth), rtol=0.2)


def test_gradients_reach_the_images_but_no_weight(perceptual):
    output, truth = images().requires_grad_(), images(seed=1)
    perceptual(output, truth).sum().backward()
    assert output.grad.abs().sum(dim=(1, 2, 3)).min() > 0
    assert all(not parameter.requires_grad and parameter.grad is None for parameter in perceptual.parameters())


def test_it_stays_in_eval_mode_whatever_contains_it(perceptual):
    assert perceptual.train() is perceptual
    parent = nn.ModuleList([perceptual, nn.Dropout()]).train()
    assert parent[1].training and not any(module.training for module in perceptual.modules())
    one, other = images(), images(seed=1)
    assert torch.equal(perceptual(one, other), perceptual(one, other))  # the heads' dropout is off


def test_the_file_fills_the_whole_backbone_without_network(weights, connections):
    filled = dict(Perceptual("alex", str(weights)).model.net.named_parameters())
    expected = {key: tensor for key, tensor in backbone(0).items() if key.startswith("features.")}
    assert {"features." + name.split(".", 1)[1] for name in filled} == set(expected)
    for name, parameter in filled.items():
        assert torch.equal(parameter, expected["features." + name.split(".", 1)[1]])
    assert not connections


def test_another_file_is_another_distance_and_a_state_dict_will_do(perceptual, folder):
    torch.save(backbone(1), folder / "other.pt")
    one, other = images(), images(seed=1)
    assert not torch.allclose(Perceptual("alex", folder / "other.pt")(one, other), perceptual(one, other), rtol=1e-3)


@pytest.mark.parametrize("found", ["nothing", (256, 256, 1, 1)], ids=str)
def test_a_wrong_file_is_named_with_its_key_and_both_shapes(folder, found):
    state, key = backbone(0), "features.10.weight"
    del state[key]
    if found != "nothing":
        state[key] = torch.zeros(found)
    save_file(state, folder / "wrong.safetensors")
    message = f"wrong.safetensors: expected {key} of shape (256, 256, 3, 3), found {found}"
    with pytest.raises(ValueError, match=re.escape(message)):
        Perceptual("alex", folder / "wrong.safetensors")


def test_a_missing_file_is_named(folder):
    with pytest.raises(FileNotFoundError, match=r"none\.pth: no such weights file"):
        Perceptual("alex", folder / "none.pth")


def test_an_unknown_net_raises_and_lists_the_known_ones():
    with pytest.raises(ValueError, match="perceptual net 'squeeze': known are 'vgg' and 'alex'"):
        Perceptual("squeeze")


def test_without_weights_and_network_the_error_says_what_to_set(connections, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))  # nothing was downloaded before
    with pytest.raises(
        RuntimeError, match=r"alex backbone.*could not be downloaded.*vqgan_training\.perceptual\.weights"
    ):
        Perceptual("alex")
    assert connections
