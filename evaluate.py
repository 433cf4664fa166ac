"""Compares inpainting with classical methods on the same images and holes: a table of figures.

    python evaluate.py --gtcsv-path ../shared/data/cats64/test_gt --test-mask-path ../shared/data/cats64/mask64 \\
        --holes thick box half --feature-weights vgg16.safetensors --lpips-weights alexnet.safetensors

Figures, over N images: FD-VGG16 (Frechet distance of VGG16 features to the true images; not the FID), LPIPS (AlexNet,
whole image) and PSNR in the hole in dB (mean over images); for ours the mean and sd over decoding seeds.
"""

import argparse
import json
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from unittest.mock import patch

import cv2
import numpy as np
import torch
from skimage.restoration import inpaint as skimage_inpaint
from torch import Tensor
from tqdm import tqdm

from config import add_flag
from data import list_images, read_holes, read_truth, to_float, to_pixels
from inpainter import PRETRAINED, Inpainter
from inputs import GREY
from masks import FAMILIES, composite, make_holes
from metrics import Moments, VGG16Features, code_usage, frechet_distance, hole_psnr, psnr
from models.perceptual import Perceptual
from utils import log, pick_device, start_logging

HOLE_SEED = 1
BATCH = 64


def telea(image: np.ndarray, hole: np.ndarray) -> np.ndarray:
    """Fast marching (Telea 2004), radius 3; uint8 (H, W, 3) and bool (H, W)."""
    return cv2.inpaint(image, hole.astype(np.uint8), 3, cv2.INPAINT_TELEA)


def navier_stokes(image: np.ndarray, hole: np.ndarray) -> np.ndarray:
    """Fluid dynamics (Bertalmio et al. 2001), radius 3."""
    return cv2.inpaint(image, hole.astype(np.uint8), 3, cv2.INPAINT_NS)


class ZeroedNumpy:
    """numpy for scikit-image 0.26, whose sparse matrix keeps what was in memory where a hole touches the border."""

    empty = staticmethod(np.zeros)

    def __getattr__(self, name: str):
        return getattr(np, name)


def biharmonic(image: np.ndarray, hole: np.ndarray) -> np.ndarray:
    """Biharmonic equation (Damelin and Hoang 2018)."""
    with patch.object(skimage_inpaint, "np", ZeroedNumpy()):
        filled = skimage_inpaint.inpaint_biharmonic(image, hole, channel_axis=-1)
    return (filled.clip(0, 1) * 255).round().astype(np.uint8)


CLASSICAL = {"OpenCV Telea": telea, "OpenCV Navier-Stokes": navier_stokes, "scikit-image biharmonic": biharmonic}


@dataclass(frozen=True)
class Row:
    """One method on one family of holes, one seed."""

    holes: str
    method: str
    seed: int | None
    fd_vgg16: float
    lpips: float
    hole_psnr: float
    seconds_an_image: float


class Judge:
    """The figures of a set of images (N, 3, H, W) uint8 against the truth."""

    def __init__(self, truth: Tensor, feature_weights, lpips_weights, device: torch.device):
        self.truth, self.device = truth, device
        self.features = VGG16Features(feature_weights).to(device)
        self.perceptual = Perceptual("alex", lpips_weights).to(device)
        self.moments = self._moments(truth)

    @torch.no_grad()
    def _moments(self, images: Tensor) -> Moments:
        moments = Moments(self.features.dimensions)
        for batch in images.split(BATCH):
            moments.update(self.features(to_float(batch.to(self.device))))
        return moments

    @torch.no_grad()
    def lpips(self, images: Tensor) -> float:
        """Mean LPIPS over images."""
        pairs = zip(images.split(BATCH), self.truth.split(BATCH), strict=True)
        values = [self.perceptual(*(to_float(side.to(self.device)) for side in pair)) for pair in pairs]
        return float(torch.cat(values).mean())

    def fd(self, images: Tensor) -> float:
        """FD-VGG16 to the truth."""
        found = self._moments(images)
        return frechet_distance(found.mean, found.covariance, self.moments.mean, self.moments.covariance)

    def row(self, holes: str, method: str, seed: int | None, images: Tensor, hole: Tensor, seconds: float) -> Row:
        quality = float(hole_psnr(to_float(images), to_float(self.truth), hole).mean())
        each = seconds / len(images)
        return Row(holes, method, seed, self.fd(images), self.lpips(images), quality, each)


def classical(fill: Callable, images: Tensor, hole: Tensor, workers: int) -> Tensor:
    """`fill` on every image, in processes."""
    pixels = [to_pixels(image) for image in images]
    with ProcessPoolExecutor(workers) as pool:
        filled = list(pool.map(fill, pixels, list(hole[:, 0].numpy()), chunksize=16))
    return torch.from_numpy(np.stack(filled)).permute(0, 3, 1, 2)


def reconstruct(inpainter: Inpainter, truth: Tensor, hole: Tensor) -> tuple[Tensor, Tensor]:
    """The decoded true tokens (N, 3, H, W) uint8, beside what is known outside `hole`, and the tokens (N, n)."""
    batches = []
    for batch, missing in zip(truth.split(BATCH), hole.split(BATCH), strict=True):
        tokens = inpainter.encode(batch, torch.zeros_like(missing))
        batches.append((inpainter.decode(tokens, batch, missing), tokens.cpu()))
    images, tokens = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(tokens)


def inpaint(inpainter: Inpainter, images: Tensor, hole: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Composited and raw images (N, 3, H, W) uint8; image i takes the seed `seed` * N + i."""
    done = []
    for start in range(0, len(images), BATCH):
        window = slice(start, start + BATCH)
        done.append(inpainter(images[window], hole[window], seed=seed * len(images) + start))
    return torch.cat([part.images for part in done]), torch.cat([part.raw for part in done])


def timed(work: Callable):
    """`work()` and the seconds it took."""
    start = time.perf_counter()
    return work(), time.perf_counter() - start


def evaluate(judge: Judge, inpainter: Inpainter, name: str, hole: Tensor, args: argparse.Namespace) -> list[Row]:
    """All rows of one family of holes (N, 1, H, W)."""
    truth = judge.truth
    masked = truth.masked_fill(hole, GREY)
    rows = [judge.row(name, "masked input", None, masked, hole, 0.0)]
    for method, fill in CLASSICAL.items():
        filled, seconds = timed(partial(classical, fill, masked, hole, args.num_workers))
        rows.append(judge.row(name, method, None, composite(filled, truth, hole), hole, seconds))
    decoded, _ = reconstruct(inpainter, truth, hole)
    rows.append(judge.row(name, "true tokens decoded", None, composite(decoded, truth, hole), hole, 0.0))
    for seed in args.seeds:
        (filled, raw), seconds = timed(partial(inpaint, inpainter, masked, hole, seed))
        rows.append(judge.row(name, "ours", seed, filled, hole, seconds))
        if args.raw:
            rows.append(judge.row(name, "ours, decoder output", seed, raw, hole, seconds))
    return rows


def table(rows: list[Row]) -> str:
    """The rows as Markdown, methods with several seeds as mean ± sd."""
    lines = [
        "| holes | method | FD-VGG16 | LPIPS | hole PSNR dB | s an image |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for holes, method in dict.fromkeys((row.holes, row.method) for row in rows):
        group = [row for row in rows if (row.holes, row.method) == (holes, method)]
        cells = []
        for key, digits in (("fd_vgg16", 1), ("lpips", 4), ("hole_psnr", 2), ("seconds_an_image", 3)):
            values = np.array([getattr(row, key) for row in group])
            spread = f" ± {values.std(ddof=1):.{digits}f}" if len(values) > 1 else ""
            cells.append(f"{values.mean():.{digits}f}{spread}")
        lines.append(f"| {holes} | {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def reconstruction_figures(judge: Judge, decoded: Tensor, tokens: Tensor, codes: int) -> dict[str, float]:
    """How well the VQGAN alone does on whole true images."""
    return {
        "psnr": float(psnr(to_float(decoded), to_float(judge.truth)).mean()),
        "lpips": judge.lpips(decoded),
        "fd_vgg16": judge.fd(decoded),
        "code_usage": code_usage(tokens, codes),
    }


def main(argv: list[str] | None = None) -> None:
    """The command line; see --help."""
    start_logging()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flag(parser, "--checkpoint", default=PRETRAINED, type=Path, metavar="DIR", help="default: pretrained/cats64")
    add_flag(parser, "--gtcsv-path", required=True, metavar="PATH", help="true images: folder, .npz or .csv")
    add_flag(parser, "--test-mask-path", metavar="DIR", help="a folder of masks, one an image, as a further family")
    add_flag(parser, "--holes", nargs="*", default=[], choices=list(FAMILIES), help="families to generate, seed 1")
    add_flag(parser, "--feature-weights", required=True, metavar="FILE", help="VGG16 features, for FD-VGG16")
    add_flag(parser, "--lpips-weights", metavar="FILE", help="AlexNet features; left out, torchvision downloads them")
    add_flag(parser, "--seeds", type=int, nargs="+", default=[0, 1, 2], help="decoding seeds (default: 0 1 2)")
    add_flag(
        parser, "--raw", action="store_true", help="score the decoder's output too, before known pixels are pasted"
    )
    add_flag(parser, "--device", default="auto", help="auto, cpu, cuda, ... (default: auto)")
    add_flag(parser, "--num-workers", type=int, default=2, help="processes of the classical methods (default: 2)")
    add_flag(parser, "--json", type=Path, default=Path("results/evaluation.json"), metavar="FILE", help="all rows")
    args = parser.parse_args(argv)
    try:
        inpainter = Inpainter.from_pretrained(args.checkpoint, args.device)
        truth = read_truth(args.gtcsv_path)
        judge = Judge(truth, args.feature_weights, args.lpips_weights, pick_device(args.device))
        holes = {family: make_holes(family, len(truth), inpainter.size, HOLE_SEED) for family in args.holes}
        if args.test_mask_path:
            given = read_holes(list_images(args.test_mask_path))
            if given.shape != (len(truth), 1, *truth.shape[2:]):
                raise ValueError(f"{args.test_mask_path}: {tuple(given.shape)} masks for {tuple(truth.shape)} images")
            holes = {Path(args.test_mask_path).name: given} | holes
    except (ValueError, FileNotFoundError, RuntimeError) as error:
        parser.error(str(error))
    decoded, tokens = reconstruct(inpainter, truth, torch.ones_like(truth[:, :1], dtype=torch.bool))
    whole = reconstruction_figures(judge, decoded, tokens, inpainter.vqgan.config.codebook.codes)
    log.info("VQGAN on whole images: " + "  ".join(f"{key} {value:.4f}" for key, value in whole.items()))
    report = {"n": len(truth), "seeds": args.seeds, "decoding": inpainter.decoding.model_dump(), "vqgan": whole}
    args.json.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    for name, hole in tqdm(holes.items(), desc="families of holes"):
        rows += evaluate(judge, inpainter, name, hole, args)
        everything = report | {"rows": [asdict(row) for row in rows]}  # after each family: a run takes long
        args.json.write_text(json.dumps(everything, indent=2) + "\n")
    log.info(f"{table(rows)}\n\nn = {len(truth)}, seeds {args.seeds}, {inpainter.decoding}")


if __name__ == "__main__":
    main()
