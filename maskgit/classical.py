"""Classical inpainting, without a model: `fill(method, images, hole)`.

images  (b, 3, H, W) uint8
hole    (b, 1, H, W) bool   True = missing; what `images` hold there may be read, so paint it grey first
"""

import functools
import itertools
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from types import ModuleType

import cv2
import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from maskgit.data import GREY, to_pixels
from maskgit.masks import thick_parts

RADIUS = 3  # pixels around a missing one that OpenCV's methods read
Method = Callable[[np.ndarray, np.ndarray], np.ndarray]  # image (H, W, 3) uint8, hole (H, W) bool -> image
THIN = 32  # pixels: of parts that `fsr_of_thin_parts` takes for thin
STRIP, BESIDE = 1024, 64  # rows that `fsr_of_thin_parts` does at once, and what it sees above and below
RIM, BAND, TILE = 2, 8, 128  # pixels: of `smooth_rim`, what it mixes, solves for, and does at once


def telea(image: np.ndarray, hole: np.ndarray) -> np.ndarray:
    """Fast marching (Telea 2004); uint8 (H, W, 3) and bool (H, W) -> uint8 (H, W, 3)."""
    return cv2.inpaint(image, hole.astype(np.uint8), RADIUS, cv2.INPAINT_TELEA)


def navier_stokes(image: np.ndarray, hole: np.ndarray) -> np.ndarray:
    """Fluid dynamics (Bertalmio et al. 2001)."""
    return cv2.inpaint(image, hole.astype(np.uint8), RADIUS, cv2.INPAINT_NS)


class ZeroedNumpy:
    """numpy for scikit-image 0.26, whose sparse matrix keeps what was in memory where a hole touches the border."""

    empty = staticmethod(np.zeros)

    def __getattr__(self, name: str):
        return getattr(np, name)


@functools.cache
def _skimage_inpaint() -> ModuleType:
    from models.features import private_copy  # imported here: they take seconds, and filling needs OpenCV alone

    return private_copy("skimage.restoration.inpaint", np=ZeroedNumpy())


def biharmonic(image: np.ndarray, hole: np.ndarray) -> np.ndarray:
    """Biharmonic equation (Damelin and Hoang 2018)."""
    filled = _skimage_inpaint().inpaint_biharmonic(image, hole, channel_axis=-1)
    return (filled.clip(0, 1) * 255).round().astype(np.uint8)


def fsr(image: np.ndarray, hole: np.ndarray) -> np.ndarray:
    """Frequency selective reconstruction (Seiler et al. 2015, doi 10.1109/TIP.2015.2463084; Genser et al. 2018), the
    strongest classical method on thin holes, and a slow one: OpenCV's INPAINT_FSR_FAST."""
    filled = np.zeros(image.shape, np.uint8)  # contiguous, or OpenCV fills a copy
    cv2.xphoto.inpaint(image, np.where(hole, 0, 255).astype(np.uint8), filled, cv2.xphoto.INPAINT_FSR_FAST)
    return np.where(hole[..., None], filled, image)  # its way through YCbCr changes known pixels by a level


METHODS: dict[str, Method] = {method.__name__: method for method in (telea, navier_stokes, biharmonic, fsr)}


def fsr_of_thin_parts(image: np.ndarray, hole: np.ndarray) -> np.ndarray:
    """Frequency selective reconstruction of the parts of the hole that are at most THIN pixels thick, Navier-Stokes
    inpainting of the others, which the former smears."""
    rough = navier_stokes(image, hole)
    thin, filled = hole & ~thick_parts(hole, THIN), rough.copy()
    for top in range(0, len(hole), STRIP):  # OpenCV takes many times the memory of what it is given
        rows, above = slice(top, top + STRIP), max(0, top - BESIDE)
        if thin[rows].any():
            near = slice(above, top + STRIP + BESIDE)
            filled[rows] = fsr(rough[near], thin[near])[top - above :][: len(filled[rows])]
    return filled


def smooth_rim(filled: np.ndarray, hole: np.ndarray, share: float) -> np.ndarray:
    """`filled` (H, W, 3) uint8, its hole (H, W) bool full of a model's pixels, with this `share` of biharmonic
    inpainting in those beside known pixels, falling evenly to none RIM pixels farther in.

    Both know what is beside them, and err in different ways: their mean errs less than either. The equation is solved
    for the BAND pixels of the hole along its rim, between what is known and what the model made farther in.
    """
    if not share:
        return filled
    smooth = filled.copy()
    for tile in itertools.product(*(range(0, length, TILE) for length in hole.shape)):
        inner = tuple(slice(start, start + TILE) for start in tile)
        if not hole[inner].any():
            continue
        near = tuple(slice(max(0, start - 2 * BAND), start + TILE + 2 * BAND) for start in tile)
        missing = hole[near]
        if missing.all():
            continue
        depth = ndimage.distance_transform_edt(missing)  # 1 beside a known pixel
        weight = share * np.where(missing, 1 - (depth - 1) / RIM, 0).clip(0)[..., None]
        solved = biharmonic(filled[near], missing & (depth <= BAND))
        mixed = ((1 - weight) * filled[near] + weight * solved).round().astype(np.uint8)
        here = tuple(
            slice(start - beside.start, start - beside.start + TILE) for start, beside in zip(tile, near, strict=True)
        )
        smooth[inner] = mixed[here]
    return smooth


GUESSES = {"navier_stokes": navier_stokes, "fsr": fsr_of_thin_parts}


def paint(images: Tensor, hole: Tensor, pre_fill: bool, guess: str = "navier_stokes") -> Tensor:
    """What networks are shown: the hole grey or, with `pre_fill`, filled by one of GUESSES.

    Nothing that `images` hold in the hole is read.
    """
    painted = images.masked_fill(hole, GREY)
    return _filled(GUESSES[guess], painted, hole) if pre_fill else painted


def smooth_rims(filled: Tensor, hole: Tensor, share: float) -> Tensor:
    """`smooth_rim` of each of `filled` (b, 3, H, W) uint8, whose holes (b, 1, H, W) are full; share 0: as they are."""
    return _filled(functools.partial(smooth_rim, share=share), filled, hole) if share else filled


def fill(method: str, images: Tensor, hole: Tensor, workers: int = 0) -> Tensor:
    """`images` with their holes filled, uint8 (b, 3, H, W) on the CPU, by `workers` processes (0: in this one).

    Known pixels stay as they are. Raises ValueError for an unknown method, listing the known ones.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}, expected one of: {', '.join(METHODS)}")
    return _filled(METHODS[method], images, hole, workers)


def _filled(run: Method, images: Tensor, hole: Tensor, workers: int = 0) -> Tensor:
    if not hole.any():
        return images.cpu()
    pixels, holes = [to_pixels(image) for image in images], list(hole[:, 0].cpu().numpy())
    if workers:
        with ProcessPoolExecutor(workers) as pool:
            filled = list(pool.map(run, pixels, holes, chunksize=16))
    else:
        filled = list(map(run, pixels, holes))
    return torch.from_numpy(np.stack(filled)).permute(0, 3, 1, 2)
