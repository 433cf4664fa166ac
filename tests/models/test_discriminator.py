"""The PatchGAN discriminator, its hinge losses and the adaptive weight of VQGAN eq. 7."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from models.discriminator import (
    PatchDiscriminator,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
    layer_gradients,
)


def make(width: int = 8, layers: int = 2, groups: int = 8) -> PatchDiscriminator:
    torch.manual_seed(0)
    return PatchDiscriminator(width, layers, groups)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


# Losses


def test_discriminator_loss_by_hand():
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-3.0, 0.0, 1.0])
    # relu(1 - real) = 0, 0.5, 2; relu(1 + fake) = 0, 1, 2
    assert discriminator_loss(real, fake).item() == pytest.approx(0.5 * (2.5 / 3 + 3.0 / 3))


def test_generator_loss_by_hand():
    assert generator_loss(torch.tensor([[1.0, -2.0], [4.0, 1.0]])).item() == pytest.approx(-1.0)


def test_logits_beyond_the_margin_have_no_gradient_and_others_point_the_right_way():
    real = torch.tensor([2.0, 0.0], requires_grad=True)
    fake = torch.tensor([-2.0, 0.0], requires_grad=True)
    discriminator_loss(real, fake).backward()
    assert real.grad.tolist() == [0.0, -0.25]  # a step downhill raises the logits of real images
    assert fake.grad.tolist() == [0.0, 0.25]
    fooling = torch.tensor([-5.0, 5.0], requires_grad=True)
    generator_loss(fooling).backward()
    assert fooling.grad.tolist() == [-0.5, -0.5]  # no margin for the generator


@settings(deadline=None, max_examples=30)
@given(st.lists(st.floats(-9, 9), min_size=1, max_size=8), st.lists(st.floats(-9, 9), min_size=1, max_size=8))
def test_discriminator_loss_is_never_negative_and_zero_only_beyond_both_margins(real, fake):
    loss = discriminator_loss(torch.tensor(real), torch.tensor(fake)).item()
    hand = 0.5 * (sum(max(0, 1 - x) for x in real) / len(real) + sum(max(0, 1 + x) for x in fake) / len(fake))
    assert loss >= 0 and loss == pytest.approx(hand, abs=1e-5)


# Adaptive weight


def test_adaptive_weight_is_the_ratio_of_the_gradients_norms_at_the_last_layer():
    torch.manual_seed(1)
    before, last = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 3, 3, padding=1)
    critic, images, truth = make(layers=1), draw(2, 2, 16, 16), draw(2, 3, 16, 16, seed=1)
    output = last(before(images))
    reconstruction, adversarial = (output - truth).abs().mean(), generator_loss(critic(output))
    weight = adaptive_weight(layer_gradients(reconstruction, adversarial, last.weight))

    norms = []
    for loss in (reconstruction, adversarial):
        last.zero_grad()
        loss.backward(retain_graph=True)
        norms.append(last.weight.grad.double().square().sum().sqrt().item())
    assert weight.item() == pytest.approx(norms[0] / (norms[1] + 1e-6), rel=1e-5)
    assert weight.shape == () and not weight.requires_grad


def test_adaptive_weight_by_hand_ignores_other_parameters_and_touches_no_gradient():
    last, other = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    reconstruction = last @ torch.tensor([3.0, 4.0]) + 100 * other.sum()
    adversarial = last @ torch.tensor([0.0, 2.0]) - 7 * other.sum()
    assert adaptive_weight(layer_gradients(reconstruction, adversarial, last)).item() == pytest.approx(5 / 2, rel=1e-5)
    assert last.grad is None and other.grad is None
    (reconstruction + adversarial).backward()  # the graph is still there for the optimizer's step
    assert last.grad.tolist() == [3.0, 6.0]


def test_adaptive_weight_is_bounded_where_the_adversarial_gradient_vanishes():
    last = nn.Parameter(torch.ones(2))
    assert adaptive_weight(layer_gradients(last.sum(), (last * 0).sum(), last)).item() == 1e4
    assert adaptive_weight(layer_gradients((last * 0).sum(), last.sum(), last)).item() == 0


# Discriminator


@pytest.mark.parametrize(("layers", "size", "side"), [(1, 16, 6), (2, 16, 2), (2, 64, 14), (3, 64, 6), (2, 40, 8)])
def test_one_logit_for_each_overlapping_patch(layers, size, side):
    # `layers` convolutions halve the side, then two of kernel 4 and padding 1 take a pixel each
    assert make(layers=layers)(draw(2, 3, size, size)).shape == (2, 1, side, side)


def test_widths_double_up_to_eight_times_the_first():
    convolutions = [module for module in make(width=8, layers=5).modules() if isinstance(module, nn.Conv2d)]
    assert [conv.out_channels for conv in convolutions] == [8, 16, 32, 64, 64, 64, 1]
    assert [conv.stride[0] for conv in convolutions] == [2, 2, 2, 2, 2, 1, 1]


def test_weights_start_small():
    convolutions = [module for module in make(width=64).modules() if isinstance(module, nn.Conv2d)]
    assert all(conv.weight.std().item() == pytest.approx(0.02, rel=0.1) for conv in convolutions)


def test_images_in_0_1_are_centred_inside():
    critic, images = make(), draw(2, 3, 16, 16)
    assert torch.allclose(critic(images), critic.model(2 * images - 1))
    assert not torch.allclose(critic(images), critic.model(images))


def test_an_image_alone_is_judged_as_in_a_batch():
    critic, images = make(), draw(3, 3, 16, 16)
    together = critic(images)
    for index in range(3):
        assert torch.allclose(critic(images[index : index + 1])[0], together[index], atol=1e-6)


def test_a_few_steps_learn_to_tell_dark_from_bright():
    critic, real, fake = make(), 0.6 + 0.4 * draw(8, 3, 16, 16), 0.4 * draw(8, 3, 16, 16, seed=1)
    optimizer = torch.optim.Adam(critic.parameters(), 2e-3)
    losses = []
    for _ in range(15):
        loss = discriminator_loss(critic(real), critic(fake))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 < losses[0]
    assert critic(real).mean() > 0 > critic(fake).mean()  # positive means real
    bright = fake.clone().requires_grad_()
    generator_loss(critic(bright)).backward()
    assert bright.grad.mean() < 0  # to fool it, brighten
