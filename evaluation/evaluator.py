"""How good a set of images is: `Evaluator`, the figures of filled images beside the truth.

    images, truth  (N, 3, H, W) uint8
    hole           (N, 1, H, W) bool   True = missing, some pixel in every image

Of the set: fd_vgg16 (Frechet distance of VGG16 features; not the FID), mind (of the same features), sharpness (mean
gradient in the holes over that of the truth) and, from 500 images, kid and kid_sd (mean and standard deviation over
subsets of 500). Of each image, then averaged: lpips (AlexNet, whole image), and in the hole psnr (dB), ssim and l1 (of
values in [0, 1]), and along its rim seam and seam_gradient (see `metrics.seam_error`).
"""

import hashlib
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from evaluation.metrics import (
    EXACT,
    Moments,
    frechet_distance,
    hole_gradient,
    hole_l1,
    hole_psnr,
    hole_ssim,
    kid,
    mind,
    seam_error,
)  # fmt: skip
from maskgit.data import to_float
from models.checkpoint import file_hash
from models.features import VGG16Features
from models.perceptual import Perceptual

BATCH = 64
SUBSET = 500  # images of a subset for KID
BINNED = ("psnr", "lpips", "l1")
WIDTH = 10  # per cent of the pixels: of a bin of hole sizes


def digest(tensor: Tensor) -> str:
    """A short hash of a CPU tensor's shape and values."""
    return hashlib.sha256(repr(tuple(tensor.shape)).encode() + tensor.contiguous().numpy().tobytes()).hexdigest()[:16]


@dataclass(frozen=True, eq=False)
class Figures:
    """What an `Evaluator` says of a set of images."""

    of_set: dict[str, float]
    of_images: dict[str, Tensor]  # (N) float32 each

    @classmethod
    def of(cls, of_set: dict[str, float], parts: list[dict[str, Tensor]]) -> "Figures":
        """Of batches whose figures, `in_holes` among them, are `parts`."""
        of_images = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        sharpness = float(of_images.pop("gradient").sum() / of_images.pop("true_gradient").sum())
        return cls(of_set | {"sharpness": sharpness}, of_images)

    def means(self) -> dict[str, float]:
        """All figures, those of images averaged; a NaN, which is no figure of an image, is left out."""
        means = {name: float(values.nanmean()) for name, values in self.of_images.items()}
        return {name: value for name, value in (self.of_set | means).items() if not math.isnan(value)}

    def by_hole_size(self, hole: Tensor) -> dict[str, float]:
        """`psnr 10-20`: the mean over the images whose holes take 10 to 20 % of the pixels; `n 10-20`: their number."""
        missing, pixels = hole.flatten(1).sum(dim=1), hole[0].numel()
        bins, found = (missing * (100 // WIDTH) // pixels).clamp(max=100 // WIDTH - 1), {}  # integers: (N)
        for number in bins.unique().tolist():
            name, inside = f"{WIDTH * number}-{WIDTH * (number + 1)}", bins == number
            found[f"n {name}"] = int(inside.sum())
            found |= {f"{figure} {name}": float(self.of_images[figure][inside].mean()) for figure in BINNED}
        return found


def in_holes(images: Tensor, truth: Tensor, hole: Tensor) -> dict[str, Tensor]:
    """Figures in the holes of images (b, 3, H, W) in [0, 1], (b) each: `psnr`, `l1`, `seam`, `seam_gradient`, and the
    gradients of which `Figures.of` makes the sharpness."""
    seam, seam_gradient = seam_error(images, truth, hole)
    return {
        "psnr": hole_psnr(images, truth, hole).clamp(max=EXACT),
        "l1": hole_l1(images, truth, hole),
        "seam": seam,
        "seam_gradient": seam_gradient,
        "gradient": hole_gradient(images, hole),
        "true_gradient": hole_gradient(truth, hole),
    }


def name_of(lpips_weights) -> str:
    """How `identity` names AlexNet's weights."""
    return file_hash(lpips_weights)[:16] if lpips_weights else "torchvision"


class Evaluator:
    """Compares sets of images with the `truth`.

    feature_weights: a file of VGG16; lpips_weights: one of AlexNet; None lets torchvision download them. `identity`
    says by hashes what the figures depend on. Raises FileNotFoundError, or ValueError naming what does not fit, or
    models.features.WeightsError.
    """

    def __init__(self, truth: Tensor, feature_weights, lpips_weights, device: torch.device):
        self.truth, self.device = truth, device
        self.network = VGG16Features(feature_weights).to(device)
        self.perceptual = Perceptual("alex", lpips_weights).to(device)
        self.features = self._features(truth)
        self.moments = self._moments(self.features)
        self.identity = {
            "truth": digest(truth),
            "vgg16": file_hash(self.network.weights_file)[:16],
            "alexnet": name_of(lpips_weights),
        }

    def __call__(self, images: Tensor, hole: Tensor) -> Figures:
        """The figures of `images`; image i is compared with truth i."""
        features = self._features(images)
        moments, truth = self._moments(features), self.moments
        of_set = {"fd_vgg16": frechet_distance(moments.mean, moments.covariance, truth.mean, truth.covariance)}
        directions = np.random.default_rng(0)  # the same for all
        of_set["mind"] = mind(features, self.features, rng=directions)
        if len(images) >= SUBSET:
            subsets = np.random.default_rng(0)  # the same for all, so that they differ in the images alone
            of_set["kid"], of_set["kid_sd"] = kid(features, self.features, subset_size=SUBSET, rng=subsets)
        batches = zip(*(x.split(BATCH) for x in (images, self.truth, hole)), strict=True)
        parts = [self._compare(*batch) for batch in batches]
        return Figures.of(of_set, parts)

    @torch.no_grad()
    def _features(self, images: Tensor) -> np.ndarray:
        """(N, d) float32."""
        return np.concatenate([self.network(self._send(batch)).cpu().numpy() for batch in images.split(BATCH)])

    def _moments(self, features: np.ndarray) -> Moments:
        moments = Moments(self.network.dimensions)
        moments.update(features)
        return moments

    @torch.no_grad()
    def _compare(self, images: Tensor, truth: Tensor, hole: Tensor) -> dict[str, Tensor]:
        """Figures of a batch, (b) each."""
        one, other = to_float(images), to_float(truth)
        figures = {
            "lpips": self.perceptual(self._send(images), self._send(truth)).cpu(),
            "ssim": hole_ssim(one, other, hole).float(),
        }
        return figures | in_holes(one, other, hole)

    def _send(self, images: Tensor) -> Tensor:
        return to_float(images.to(self.device))
