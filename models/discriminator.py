"""PatchGAN discriminator and hinge losses (VQGAN, arXiv:2012.09841, section 3.1; pix2pix, arXiv:1611.07004)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.distributed import mean


class PatchDiscriminator(nn.Module):
    """images (b, 3, H, W) in [0, 1] -> logits (b, 1, h, w), one for each overlapping patch; positive means real.

    `layers` convolutions of stride 2, each doubling the width up to 8 times the first.
    """

    def __init__(self, width: int = 64, layers: int = 2, groups: int = 8):
        super().__init__()
        modules: list[nn.Module] = [nn.Conv2d(3, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for layer in range(1, layers + 1):
            before, after = width * min(2 ** (layer - 1), 8), width * min(2**layer, 8)
            stride = 2 if layer < layers else 1
            modules += [nn.Conv2d(before, after, 4, stride=stride, padding=1, bias=False)]
            modules += [nn.GroupNorm(groups, after), nn.LeakyReLU(0.2)]
        self.model = nn.Sequential(*modules, nn.Conv2d(after, 1, 4, padding=1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images * 2 - 1)


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Hinge loss of the discriminator's logits (any shape) -> ()."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def generator_loss(fake: Tensor) -> Tensor:
    """Hinge loss of the generator -> ()."""
    return -fake.mean()


def layer_gradients(reconstruction: Tensor, adversarial: Tensor, last_layer: Tensor) -> Tensor:
    """The gradients of the two losses of a (micro-)batch at the decoder's last layer: (2, ...), graphs kept."""
    losses = (reconstruction, adversarial)
    return torch.stack([torch.autograd.grad(loss, last_layer, retain_graph=True)[0] for loss in losses])


def adaptive_weight(gradients: Tensor) -> Tensor:
    """lambda = |grad L_rec| / (|grad L_gan| + 1e-6) at the decoder's last layer, in [0, 1e4] (VQGAN eq. 7).

    gradients (2, ...): those of the whole batch of this process; all processes take the mean of theirs.
    """
    reconstruction, adversarial = mean(gradients)
    return (reconstruction.norm() / (adversarial.norm() + 1e-6)).clamp(0, 1e4).detach()
