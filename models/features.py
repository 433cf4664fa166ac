"""Feature networks for distances between sets of images: Inception (FID) and VGG16 (FD-VGG16)."""

import http.client
import importlib.util
from pathlib import Path
from types import ModuleType

import torch
import torchvision
from pytorch_fid import inception
from torch import Tensor, nn

from models.checkpoint import read_weights


def private_copy(module: str, **names) -> ModuleType:
    """A library's module of our own, in which `names` stand for other things; everybody else's stays as it is."""
    spec = importlib.util.find_spec(module)
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    vars(copy).update(names)
    return copy


class WeightsError(RuntimeError):
    """A feature network's weights could not be had; the message says what to fetch and where to put it."""


def downloaded(url: str, flag: str, what: str) -> Path:
    """Where torch hub keeps the file `url`, fetched and checked against the hash in its name if it is not there yet.

    Raises WeightsError that says what to fetch and which `flag` to pass.
    """
    file = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]
    if file.is_file():
        return file
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(file), hash_prefix=file.stem.rsplit("-", 1)[1])
    except (OSError, http.client.HTTPException, RuntimeError) as error:  # RuntimeError: the hash differs
        raise WeightsError(
            f"the {what} weights could not be downloaded ({error}). Fetch {url} where there is a network "
            f"and save it as {file}, or pass it with {flag} FILE"
        ) from error
    return file


class VGG16Features(nn.Module):
    """relu5_3 of an ImageNet VGG16, averaged over space: images (b, 3, H, W) in [0, 1] -> (b, 512).

    Images keep their own size (H and W at least 16). `weights` holds `features.N.weight|bias` for N = 0..28, as
    .safetensors or as torchvision's vgg16 .pth; other keys (classifier, LPIPS heads) are ignored; None takes
    torchvision's, downloaded on first use. The Frechet distance of these features is not the FID.
    Raises WeightsError when the download fails, FileNotFoundError, or ValueError naming the file.
    """

    label = "FD-VGG16"
    dimensions = 512

    def __init__(self, weights=None):
        super().__init__()
        url = torchvision.models.VGG16_Weights.IMAGENET1K_V1.url
        self.weights_file = downloaded(url, "--feature-weights", "VGG16") if weights is None else Path(weights)
        with torch.device("meta"):  # spares 138 M random numbers
            self.layers = torchvision.models.vgg16(weights=None).features[:30]  # 29 = relu5_3
        (state, _), prefix = read_weights(self.weights_file), "features."
        layers = {name: state.get(prefix + name) for name in self.layers.state_dict()}
        missing = [prefix + name for name, tensor in layers.items() if tensor is None]
        if missing:
            raise ValueError(f"{self.weights_file}: not the weights of a VGG16, no {', '.join(missing)} in it")
        try:
            self.layers.load_state_dict({name: tensor.float() for name, tensor in layers.items()}, assign=True)
        except RuntimeError as error:
            raise ValueError(
                f"{self.weights_file}: does not fit a VGG16: {' '.join(str(error).split())[:200]}"
            ) from error
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("deviation", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1), persistent=False)
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        if min(images.shape[-2:]) < 16:
            raise ValueError(f"VGG16 features need images of at least 16x16 pixels, found {tuple(images.shape)}")
        maps = self.layers((images - self.mean) / self.deviation)  # (b, 512, H/16, W/16)
        return maps.mean(dim=(2, 3))


class InceptionFeatures(nn.Module):
    """pytorch-fid's Inception network (final average pooling): images (b, 3, H, W) in [0, 1] -> (b, 2048).

    It resizes to 299x299 itself. `weights` names pytorch-fid's weights file; without it the file is taken from torch
    hub's folder, where it is downloaded on first use and checked. Raises WeightsError when the download fails,
    FileNotFoundError, or ValueError naming a file that does not fit.
    """

    label = "FID"
    dimensions = 2048
    published_hash = "6726825d"  # how the SHA-256 of pytorch-fid's file begins; another file gives another distance

    def __init__(self, weights=None):
        super().__init__()
        url = inception.FID_WEIGHTS_URL
        self.weights_file = downloaded(url, "--feature-weights", "Inception") if weights is None else Path(weights)
        state, _ = read_weights(self.weights_file)
        block = inception.InceptionV3.BLOCK_INDEX_BY_DIM[self.dimensions]
        # pytorch-fid has no argument for the file
        ours = private_copy("pytorch_fid.inception", load_state_dict_from_url=lambda url, progress: state)
        try:
            self.network = ours.InceptionV3([block])
        except RuntimeError as error:
            raise ValueError(
                f"{self.weights_file}: does not fit pytorch-fid's Inception: {' '.join(str(error).split())[:200]}"
            ) from error
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)[0].flatten(1)  # (b, 2048, 1, 1) -> (b, 2048)


FEATURES = {"inception": InceptionFeatures, "vgg16": VGG16Features}


def feature_network(name: str, weights=None) -> nn.Module:
    """The frozen network `name` of FEATURES, its weights from the file `weights`, or downloaded.

    Raises ValueError for an unknown name; the networks' own errors.
    """
    if name not in FEATURES:
        raise ValueError(f"unknown features {name!r}, expected one of {', '.join(FEATURES)}")
    return FEATURES[name](weights)
