"""How good are the filled images: distances between two sets, errors inside the hole, use of the codes.

Sets:   `Moments`, `frechet_distance`, `kid` and `mind` on features (n, d) of `InceptionFeatures` (FID) or
        `VGG16Features`.
Pairs:  `psnr`, `hole_psnr`, `hole_l1`, `hole_ssim`, `seam_error` on images (b, 3, H, W) in [0, 1] and hole
        (b, 1, H, W) bool, True = missing; `diversity` of several completions (b, K, 3, H, W).
Alone:  `hole_gradient` of images and hole.
Codes:  `code_usage` of tokens of any shape, ids 0..k-1.

Shapes: b batch, n images, d features an image, k codes, c channels, H W pixels.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from skimage.metrics import structural_similarity
from torch import Tensor

from maskgit.data import to_float

EXACT = 100.0  # dB: counts in a mean for a hole that is filled exactly, whose PSNR is infinite

# --- two sets of images -----------------------------------------------------------------------------------------------


class Moments:
    """Mean and unbiased covariance of features that arrive in batches, in float64 (Chan et al. 1983, eq. 2.1).

    Batches are merged around their own means, so a large common offset costs no digits.
    """

    def __init__(self, dimensions: int):
        self.n = 0
        self.mean = np.zeros(dimensions)  # (d,)
        self._scatter = np.zeros((dimensions, dimensions))  # sum of (x - mean)(x - mean)^T

    def update(self, features) -> None:
        """Adds features (b, d), a Tensor or an array. Raises ValueError for another shape, NaN or infinity."""
        batch = np.asarray(features.detach().cpu() if isinstance(features, Tensor) else features, dtype=np.float64)
        if batch.ndim != 2 or batch.shape[1] != len(self.mean) or not len(batch):
            raise ValueError(f"expected features (b, {len(self.mean)}) with b >= 1, found {batch.shape}")
        if not np.isfinite(batch).all():
            raise ValueError("features hold NaN or infinity")
        mean = batch.mean(axis=0)
        shift, n = mean - self.mean, self.n + len(batch)
        centred = batch - mean
        self._scatter += centred.T @ centred + np.outer(shift, shift) * (self.n * len(batch) / n)
        self.mean = self.mean + shift * (len(batch) / n)
        self.n = n

    @property
    def covariance(self) -> np.ndarray:
        """Unbiased (n - 1) covariance (d, d). Raises ValueError below two samples."""
        if self.n < 2:
            raise ValueError(f"a covariance needs at least 2 images, found {self.n}")
        return self._scatter / (self.n - 1)


def frechet_distance(mean1, cov1, mean2, cov2) -> float:
    """Squared Frechet (Wasserstein-2) distance of two Gaussians: |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)).

    Heusel et al. 2017 (arXiv 1706.08500), eq. 6. C1 C2 has the eigenvalues of the symmetric R C2 R, R = C1^(1/2), so
    two symmetric eigenproblems give the trace exactly, for rank-deficient covariances too (fewer images than features),
    where a general matrix square root turns unstable.

    Means (d,), covariances (d, d), symmetric. Raises ValueError for shapes that do not agree, NaN or infinity.
    """
    mean1, cov1, mean2, cov2 = (np.asarray(array, dtype=np.float64) for array in (mean1, cov1, mean2, cov2))
    d = mean1.size
    for name, array, shape in (("mean2", mean2, (d,)), ("cov1", cov1, (d, d)), ("cov2", cov2, (d, d))):
        if array.shape != shape:
            raise ValueError(f"{name}: expected shape {shape} as mean1 has {d} features, found {array.shape}")
    if not all(np.isfinite(array).all() for array in (mean1, cov1, mean2, cov2)):
        raise ValueError("means and covariances must be finite")
    values, vectors = np.linalg.eigh(cov1)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T  # rounding makes zeros slightly negative
    cross = np.sqrt(np.linalg.eigvalsh(root @ cov2 @ root).clip(min=0)).sum()
    distance = np.sum((mean1 - mean2) ** 2) + np.trace(cov1) + np.trace(cov2) - 2 * cross
    return max(float(distance), 0.0)


def kid(features1, features2, subsets: int = 100, subset_size: int = 500, *, rng) -> tuple[float, float]:
    """Kernel Inception Distance of features (n, d): (mean, standard deviation) of MMD^2 over random subsets.

    Binkowski et al. 2018 (arXiv 1801.01401): kernel (x.y / d + 1)^3, unbiased estimate (eq. 4), so equal distributions
    give values around 0, negative ones too. `rng` is a numpy Generator. Raises ValueError when a set is smaller than
    `subset_size`: values of other subset sizes scatter differently, so it is not shrunk silently.
    """
    sets = [np.asarray(features, dtype=np.float64) for features in (features1, features2)]
    if sets[0].ndim != 2 or sets[1].ndim != 2 or sets[0].shape[1] != sets[1].shape[1]:
        raise ValueError(f"expected features (n, d) of one d, found {sets[0].shape} and {sets[1].shape}")
    if subsets < 1 or subset_size < 2:
        raise ValueError(f"expected subsets >= 1 and subset_size >= 2, found {subsets} and {subset_size}")
    for number, features in enumerate(sets, start=1):
        if len(features) < subset_size:
            raise ValueError(
                f"features{number} holds n = {len(features)} images, fewer than subset_size = {subset_size}: "
                "give more images or a smaller subset_size"
            )
    values = [_mmd2(*(rng.permutation(x)[:subset_size] for x in sets)) for _ in range(subsets)]
    return float(np.mean(values)), float(np.std(values))


def _mmd2(x: np.ndarray, y: np.ndarray) -> float:
    """Unbiased MMD^2 of x (m, d) and y (m, d): the diagonals of k(x, x) and k(y, y) are left out."""
    m, d = x.shape
    xx, yy, xy = ((a @ b.T / d + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    return (xx.sum() - np.trace(xx) + yy.sum() - np.trace(yy)) / (m * (m - 1)) - 2 * xy.mean()


def mind(features1, features2, directions: int = 1000, *, rng) -> float:
    """Monge Inception Distance: the squared sliced Wasserstein-2 distance of two sets of features (n, d), times d.

    Berthet et al. 2026 (arXiv 2605.06797): the mean over random directions of the squared one-dimensional optimal
    transport distance, which sorting gives, 1 / n sum_i (x_(i) - y_(i))^2. No moments are estimated, so 1,000 images
    say more than to the Frechet distance. Times d a shift of the mean counts as it does there; the paper's own scale,
    and its Inception features, may differ. `rng` is a numpy Generator. Raises ValueError for sets that differ in shape.
    """
    one, other = (np.asarray(features, dtype=np.float64) for features in (features1, features2))
    if one.ndim != 2 or one.shape != other.shape or not len(one):
        raise ValueError(f"expected two sets of features of one shape (n, d), found {one.shape} and {other.shape}")
    lines = rng.standard_normal((one.shape[1], directions))
    lines /= np.linalg.norm(lines, axis=0)
    return float(np.square(np.sort(one @ lines, axis=0) - np.sort(other @ lines, axis=0)).mean() * one.shape[1])


# --- an image and its truth -------------------------------------------------------------------------------------------


def _check(images: Tensor, truth: Tensor, hole: Tensor | None = None) -> None:
    """Raises ValueError unless images and truth are (b, c, H, W) in [0, 1] and hole (b, 1, H, W) bool, none empty."""
    if images.ndim != 4 or images.shape != truth.shape:
        raise ValueError(f"expected two (b, c, H, W) of one shape, found {tuple(images.shape)}, {tuple(truth.shape)}")
    for name, values in (("images", images), ("truth", truth)):
        if not values.is_floating_point() or not ((values >= 0) & (values <= 1)).all():
            raise ValueError(f"{name}: expected floating-point values in [0, 1]")
    if hole is None:
        return
    expected = (images.shape[0], 1, *images.shape[2:])
    if hole.dtype != torch.bool or hole.shape != expected:
        raise ValueError(f"hole: expected bool {expected}, found {hole.dtype} {tuple(hole.shape)}")
    empty = (~hole.flatten(1).any(dim=1)).nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"hole: no missing pixel in image {', '.join(map(str, empty))} of the batch")


def _mean_inside(values: Tensor, hole: Tensor) -> Tensor:
    """Mean of values (b, c, H, W) over each image's missing pixels and all channels -> (b,)."""
    inside = torch.where(hole, values.float().mean(dim=1, keepdim=True), 0.0)  # (b, 1, H, W)
    return inside.sum(dim=(1, 2, 3)) / hole.sum(dim=(1, 2, 3))


def psnr(images: Tensor, truth: Tensor) -> Tensor:
    """Peak signal-to-noise ratio (b,) in dB of images in [0, 1]; infinite for identical images."""
    _check(images, truth)
    return -10 * (images.float() - truth.float()).square().mean(dim=(1, 2, 3)).log10()


def hole_psnr(images: Tensor, truth: Tensor, hole: Tensor) -> Tensor:
    """PSNR (b,) in dB over the missing pixels alone, channels averaged; infinite where the hole is filled exactly."""
    _check(images, truth, hole)
    return -10 * _mean_inside((images.float() - truth.float()).square(), hole).log10()


def hole_l1(images: Tensor, truth: Tensor, hole: Tensor) -> Tensor:
    """Mean absolute error (b,) in [0, 1] over the missing pixels alone."""
    _check(images, truth, hole)
    return _mean_inside((images.float() - truth.float()).abs(), hole)


def hole_ssim(images: Tensor, truth: Tensor, hole: Tensor) -> Tensor:
    """Structural similarity (b,) in [-1, 1], its map averaged over the missing pixels and channels.

    Wang et al. 2004: 11x11 Gaussian window, sigma 1.5, population covariance. H and W at least 11. The window of a
    missing pixel reads known pixels around it, so composited and raw images score differently.
    """
    _check(images, truth, hole)
    maps = [
        structural_similarity(
            image.double().cpu().numpy(), true.double().cpu().numpy(), channel_axis=0, data_range=1, full=True,
            gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
        )[1]
        for image, true in zip(images, truth, strict=True)
    ]  # fmt: skip
    return _mean_inside(torch.from_numpy(np.stack(maps)).to(hole.device), hole)


def _gradients(images: Tensor) -> Tensor:
    """Central differences (one-sided at the border) of images (b, c, H, W) down and right: (b, 2 c, H, W)."""
    return torch.cat(torch.gradient(images.float(), dim=(2, 3)), dim=1)


def seam_error(images: Tensor, truth: Tensor, hole: Tensor, width: int = 3) -> tuple[Tensor, Tensor]:
    """How well the hole's rim meets what surrounds it: (b,) mean absolute error, and (b,) that of the gradients.

    Over the missing pixels at most `width` from a known one (8 neighbours), all of the hole where it is as thin; the
    gradients are central differences in both directions, so that of a rim pixel spans the seam. Mask-aware decoders
    are judged by such a ring (DecFormer, arXiv 2512.05198; ASUKA, arXiv 2312.04831); the numbers here are this
    project's own. Images in [0, 1]; an image without a known pixel has no seam: NaN.
    """
    _check(images, truth, hole)
    near = F.max_pool2d((~hole).float(), 2 * width + 1, stride=1, padding=width) > 0
    ring = hole & near
    errors = (images.float() - truth.float()).abs(), (_gradients(images) - _gradients(truth)).abs()
    return tuple(_mean_inside(error, ring) for error in errors)


def hole_gradient(images: Tensor, hole: Tensor) -> Tensor:
    """Mean length (b,) of the gradient in the missing pixels, channels averaged: how much detail there is.

    Central differences, values in [0, 1] a pixel. Means of completions, and of codes, have less than the truth.
    """
    _check(images, images, hole)
    down, right = _gradients(images).chunk(2, dim=1)
    return _mean_inside(torch.hypot(down, right), hole)


def diversity(completions: Tensor, distance: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """How unlike each other the completions of an image are: the mean distance of all their pairs -> (b,).

    completions (b, K, 3, H, W) in [0, 1], K >= 2; distance: two times (b, 3, H, W) -> (b,), at least 0. With LPIPS
    (models.perceptual, AlexNet) it is what pluralistic inpainting reports, as PUT does (Liu et al. 2022, arXiv
    2205.05076): 0 where all completions are alike. Raises ValueError for another shape or values outside [0, 1].
    """
    if completions.ndim != 5 or completions.shape[1] < 2:
        raise ValueError(f"expected completions (b, K, 3, H, W) with K >= 2, found {tuple(completions.shape)}")
    _check(completions.flatten(0, 1), completions.flatten(0, 1))
    pairs = itertools.combinations(completions.unbind(dim=1), 2)
    return torch.stack([distance(one, other) for one, other in pairs]).mean(dim=0)


# --- codes ------------------------------------------------------------------------------------------------------------


def code_usage(tokens: Tensor, k: int) -> float:
    """Share in [0, 1] of the k codes that occur at least once in tokens of any shape.

    Raises ValueError for none and for ids outside 0..k-1 (mask id).
    """
    if not tokens.numel() or tokens.is_floating_point() or tokens.min() < 0 or tokens.max() >= k:
        raise ValueError(f"expected integer tokens in 0..{k - 1}, at least one")
    return len(tokens.unique()) / k


# --- running averages ---


@dataclass
class RunningAverages:
    """Sums over the images of a group, for its row of the table."""

    images: int = 0
    missing: float = 0.0  # shares of pixels
    scored: int = 0  # images with a hole whose truth is known
    psnr: float = 0.0  # in dB, in the hole
    compared: int = 0  # images with a hole and several completions
    distance: float = 0.0  # their diversity, see metrics

    def add(self, hole: Tensor, filled: Tensor, truth: Tensor | None, spread: Tensor | None) -> None:
        """Counts images (b, 3, H, W) uint8; `spread` (b,) is their diversity."""
        self.images += len(hole)
        self.missing += float(hole.float().mean(dim=(1, 2, 3)).sum())
        some = hole.flatten(1).any(dim=1)
        if truth is not None and some.any():
            self.scored += int(some.sum())
            quality = hole_psnr(to_float(filled[some]), to_float(truth[some]), hole[some])
            self.psnr += float(quality.clamp(max=EXACT).sum())
        if spread is not None:
            self.compared += int(some.sum())
            self.distance += float(spread[some].sum())

    @property
    def diversity(self) -> float | None:
        """The mean over images with a hole; None where it was not measured."""
        return self.distance / self.compared if self.compared else None

    def row(self, group: str, samples: int = 1) -> str:
        quality = f"{self.psnr / self.scored:.2f}" if self.scored else "-"
        line = f"{group:<10} {self.images:>4} {100 * self.missing / self.images:>7.1f} {quality:>13}"
        spread = "-" if self.diversity is None else f"{self.diversity:.4f}"
        return f"{line} {spread:>10}" if samples > 1 else line
