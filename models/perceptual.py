"""LPIPS (Zhang et al. 2018, arXiv:1801.03924) through the package `lpips`, its backbone local file or download."""

import warnings

import lpips
from torch import Tensor, nn

from models.checkpoint import read_weights


class Perceptual(nn.Module):
    """LPIPS v0.1 of images in [0, 1] (b, 3, H, W) -> (b,). Frozen, gradients flow to the images only.

    `net` is "vgg" or "alex". `weights` is a file with torchvision's `features.N.weight|bias` of that backbone
    (safetensors or a state_dict); None lets torchvision download it. The heads come with the package `lpips`.
    """

    def __init__(self, net: str = "vgg", weights=None):
        super().__init__()
        if net not in ("vgg", "alex"):
            raise ValueError(f"perceptual net {net!r}: known are 'vgg' and 'alex'")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torchvision's notes on its own older arguments
            try:
                self.model = lpips.LPIPS(net=net, pnet_rand=weights is not None, verbose=False)
            except OSError as error:
                raise RuntimeError(
                    f"the {net} backbone of LPIPS could not be downloaded ({error}); name a local file with "
                    "torchvision's weights: --vqgan_training.perceptual.weights in training, --lpips-weights elsewhere"
                ) from error
        if weights is not None:
            self._fill(weights)
        self.eval().requires_grad_(False)

    def _fill(self, weights) -> None:
        """Copies `features.N.*` into lpips's slices, whose modules keep torchvision's numbers as their names."""
        tensors, _ = read_weights(weights)
        for name, parameter in self.model.net.named_parameters():  # sliceS.N.weight
            key = "features." + name.split(".", 1)[1]
            if key not in tensors or tensors[key].shape != parameter.shape:
                found = tuple(tensors[key].shape) if key in tensors else "nothing"
                raise ValueError(f"{weights}: expected {key} of shape {tuple(parameter.shape)}, found {found}")
            parameter.data.copy_(tensors[key])

    def train(self, mode: bool = True) -> "Perceptual":
        """A loss has no training mode (lpips's heads would drop out)."""
        return super().train(False)

    def forward(self, images: Tensor, truth: Tensor) -> Tensor:
        return self.model(images, truth, normalize=True).flatten()

    def maps(self, images: Tensor, truth: Tensor) -> Tensor:
        """The same before the mean over positions, brought to the images' size: (b, 1, H, W)."""
        self.model.spatial = True
        try:
            return self.model(images, truth, normalize=True)
        finally:
            self.model.spatial = False
