"""Sweeps over photographs, each at its own size: what a method makes of scratches, text, spots and objects.

    truth  pixels (H, W, 3) uint8 of each photograph
    holes  (H, W) bool of each, True = missing

Lists of these: photographs differ in size.
"""

import hashlib
import time

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from evaluation.evaluator import Figures, digest, in_holes, name_of
from evaluation.methods import Method, complete_photo
from evaluation.report import Line
from evaluation.sweeps import Entry, Sweep, SweepConfig, open_networks
from maskgit import classical
from maskgit.canvas import check_encoder
from maskgit.data import list_images, read_image, to_float
from maskgit.photo_holes import photo_hole
from maskgit.pyramid import VERSION
from models.perceptual import Perceptual
from utils import mix, pick_device

NEAR = 8  # pixels around a hole in which LPIPS is taken too


def digest_of_all(arrays: list[np.ndarray]) -> str:
    """A short hash of arrays that differ in size."""
    return hashlib.sha256("".join(digest(torch.from_numpy(array)) for array in arrays).encode()).hexdigest()[:16]


class PhotoEvaluator:
    """Figures of filled photographs beside the `truth`, averaged over them.

    lpips_near (AlexNet's map of LPIPS, its mean in the hole and NEAR pixels around it), psnr (dB) and l1 in the hole,
    seam and seam_gradient along its rim, sharpness (see `evaluator`).
    """

    def __init__(self, truth: list[np.ndarray], lpips_weights, device: torch.device):
        self.truth, self.device = truth, device
        self.perceptual = Perceptual("alex", lpips_weights).to(device)
        self.identity = {"truth": digest_of_all(truth), "alexnet": name_of(lpips_weights)}

    def __call__(self, filled: list[np.ndarray], holes: list[np.ndarray]) -> Figures:
        """Photograph i is compared with truth i."""
        return Figures.of({}, [self._compare(*each) for each in zip(filled, self.truth, holes, strict=True)])

    @torch.no_grad()
    def _compare(self, filled: np.ndarray, truth: np.ndarray, hole: np.ndarray) -> dict[str, Tensor]:
        one, other = (to_float(torch.from_numpy(picture).permute(2, 0, 1)[None]) for picture in (filled, truth))
        missing, near = torch.from_numpy(hole)[None, None], ndimage.distance_transform_edt(~hole) <= NEAR
        distances = self.perceptual.maps(one.to(self.device), other.to(self.device))[0, 0].cpu().numpy()
        return {"lpips_near": torch.tensor([distances[near].mean()])} | in_holes(one, other, missing)


class PhotoSweep(Sweep):
    """The photographs, their holes, the evaluator and the networks of all methods.

    Raises ValueError, FileNotFoundError or RuntimeError (weights that cannot be downloaded) at once.
    """

    def __init__(self, config: SweepConfig, device: str, workers: int, precision: str = "auto"):
        self.config, data = config, config.data
        paths = list_images(data.truth)
        if data.n > len(paths):
            raise ValueError(f"data.n {data.n}: there are {len(paths)} images in {data.truth}")
        self.truth = [read_image(path) for path in paths[: data.n or None]]
        self.holes = {
            family: [photo_hole(family, picture.shape[:2], data.hole_seed, i) for i, picture in enumerate(self.truth)]
            for family in data.generated
        }
        self.networks = open_networks(config.rows, device, precision)
        for method in config.rows:
            if method.kind != "inpainting" and method.kind not in classical.METHODS:
                raise ValueError(f"method {method.name}: kind {method.kind} fills no photographs of any size")
            if method.kind == "inpainting" and method.tiling == "windows":
                check_encoder(self.networks[method.name])
        self.device, self.precision = pick_device(device), precision
        self.evaluator = PhotoEvaluator(self.truth, config.evaluator.lpips_weights, self.device)

    def settings(self, method: Method) -> dict:
        own = super().settings(method)
        if method.kind != "inpainting":
            return own
        own["tiling"] = method.tiling
        return own | ({"coarse": method.coarse, "windows": VERSION} if method.tiling == "windows" else {})

    def digest(self, holes: list[np.ndarray]) -> str:
        return digest_of_all(holes)

    def measure(self, entry: Entry) -> Line:
        """Fills the holes and evaluates the result; photograph i takes the seed mix(seed, i)."""
        method, networks, start = entry.method, self.networks[entry.method.name], time.perf_counter()
        filled = [
            complete_photo(method, networks, pixels, hole, mix(entry.seed or 0, index))
            for index, (pixels, hole) in enumerate(zip(self.truth, entry.hole, strict=True))
        ]
        figures = {"seconds": (time.perf_counter() - start) / len(filled)}
        figures |= self.evaluator(filled, entry.hole).means()
        return Line(method.name, entry.family, entry.seed, len(filled), entry.key, figures, entry.settings)
