"""Scores a folder of results against the true images: `python fid_score.py` prints the FID of results/.

The score is the Frechet distance between two sets of image features, so pairing and order do not matter, while image
size, file format and the number of images do: unequal counts or sizes and JPEG results are errors.

Shapes: n images, d features an image, H W pixels; images are uint8 (n, 3, H, W) until they reach the network.
"""

if __name__ == "__main__":
    import interrupts

    interrupts.in_one_line()

import argparse
import hashlib
import importlib.metadata
import json
import os
import sys
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from config import add_flag, whole
from evaluation.metrics import Moments, frechet_distance
from files import replace_file, write_text
from interrupts import run_script
from maskgit.data import list_images, opened, to_float
from maskgit.dataset import ImageDataset
from maskgit.folders import read_truth
from models.checkpoint import file_hash
from models.features import FEATURES, WeightsError, feature_network
from utils import one_line, pick_device

FEW_IMAGES = 2048


def read_results(folder, workers: int = 4) -> Tensor:
    """The pictures of a results folder as uint8 (n, 3, H, W).

    Raises ValueError naming a file that is JPEG, whatever its suffix: the score would measure the compression.
    """
    paths = list_images(folder)
    for path in paths:
        with opened(path) as picture:  # reads the header alone
            kind = picture.format
        if kind in ("JPEG", "MPO"):
            raise ValueError(f"{path}: is a JPEG, so the score would measure the compression; write results as PNG")
    return ImageDataset(paths, workers=workers).images


def check_comparable(results: Tensor, truth: Tensor, predicted: Path, gtcsv: Path) -> None:
    """Raises ValueError unless there are as many results as truths, all of one size."""
    if len(results) != len(truth):
        raise ValueError(f"{len(results)} results in {predicted} but {len(truth)} true images in {gtcsv}")
    if results.shape[2:] != truth.shape[2:]:
        sizes = ["x".join(map(str, images.shape[:1:-1])) for images in (results, truth)]
        raise ValueError(f"results in {predicted} are {sizes[0]} pixels but the true images in {gtcsv} are {sizes[1]}")


@torch.inference_mode()
def feature_moments(
    images: Tensor, network: nn.Module, batch_size: int = 64, device="cpu", title: str = "images"
) -> Moments:
    """Mean and covariance of the features of uint8 images (n, 3, H, W); `network` is on `device`."""
    moments = Moments(network.dimensions)
    with tqdm(total=len(images), desc=title, unit="image") as progress:
        for batch in images.split(batch_size):
            moments.update(network(to_float(batch.to(device))))
            progress.update(len(batch))
    return moments


def truth_moments(truth: Tensor, key: str, cache: Path | None, compute) -> tuple[np.ndarray, np.ndarray]:
    """Mean (d,) and covariance (d, d) of the true images from `cache`, or from `compute()`, then kept there.

    `key` names the feature network; the file's name is a SHA-256 of it and of the pixels, so that a folder, an .npz
    and a .csv with the same images share one entry. Raises ValueError naming a cache file that cannot be read.
    """
    digest = hashlib.sha256(f"{key} {tuple(truth.shape)}".encode())
    digest.update(truth.contiguous().numpy().data)
    file = None if cache is None else Path(cache) / f"truth-{digest.hexdigest()}.npz"
    if file is not None and file.is_file():
        try:
            with np.load(file, allow_pickle=False) as arrays:
                mean, covariance = arrays["mean"], arrays["covariance"]
            if mean.shape * 2 != covariance.shape:
                raise ValueError(f"{mean.shape} and {covariance.shape}")
            return mean, covariance
        except Exception as error:  # a damaged header is Python source that numpy reads
            why = one_line(error)
            raise ValueError(f"{file}: not a readable cache file, delete it or pass --no-cache ({why})") from error
    moments = compute()
    if file is not None:

        def write(temporary: Path) -> None:
            with open(temporary, "wb") as stream:  # np.savez would add .npz to a name
                np.savez(stream, mean=moments.mean, covariance=moments.covariance)

        replace_file(file, write)
    return moments.mean, moments.covariance


def read_manifest(results: Path) -> dict:
    """results/manifest.json as inpainting.py writes it. Raises ValueError when it is missing or names no truth."""
    path = results / "manifest.json"
    if not path.is_file():
        raise ValueError(f"{path}: no such file; run inpainting.py first, or pass --predicted-path and --gtcsv-path")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({one_line(error)})") from error
    if not isinstance(manifest, dict):
        raise ValueError(f"{path}: expected an object with the keys 'truth' and 'results'")
    for key in ("truth", "predicted"):
        if not isinstance(manifest.get(key), str | None):
            raise ValueError(f"{path}: its key {key!r} is {manifest[key]!r}, expected a path")
    names = manifest.get("results", [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{path}: its key 'results' is no list of names")
    return manifest


def find_paths(predicted: Path | None, truth: Path | None, root: Path) -> tuple[Path, Path]:
    """`(folder of results, truth)`: as given, the rest from the manifest in `root`.

    Raises ValueError where that does not help.
    """
    manifest = {} if predicted and truth else read_manifest(root)
    if truth is None:
        if not manifest.get("truth"):
            raise ValueError(f"{root / 'manifest.json'}: its key 'truth' names no true images; pass --gtcsv-path")
        truth = Path(manifest["truth"])
    if predicted is None:
        predicted = Path(manifest.get("predicted") or root / "test_results")
        listed = {Path(name).name for name in manifest.get("results", [])}
        found = {path.name for path in list_images(predicted)}
        if listed != found:
            raise ValueError(
                f"{predicted}: its files are not those of {root / 'manifest.json'}: "
                f"missing {_some(listed - found)}, left over {_some(found - listed)}; "
                "remove the folder and fill again, or fill into another --out"
            )
    return predicted, truth


def _some(names: set[str]) -> str:
    return ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "") or "none"


def score(predicted: Path, truth: Path, features: str = "inception", feature_weights=None, batch_size: int = 64,
          device: str = "cpu", workers: int = 4, cache: Path | None = None) -> dict:  # fmt: skip
    """The Frechet distance of the pictures in `predicted` from those in `truth`, as the report that --json writes.

    `cache` is the folder for the statistics of the truth, None for none. Raises ValueError, FileNotFoundError, or
    models.features.WeightsError when the weights of the features cannot be downloaded.
    """
    results, true_images = read_results(predicted, workers), read_truth(truth)
    check_comparable(results, true_images, predicted, truth)
    network = feature_network(features, feature_weights).to(device)
    weights_hash = file_hash(network.weights_file)
    true_mean, true_covariance = truth_moments(
        true_images, f"{features} {weights_hash}", cache,
        lambda: feature_moments(true_images, network, batch_size, device, "truth"),
    )  # fmt: skip
    moments = feature_moments(results, network, batch_size, device, "results")
    return {
        "label": network.label,
        "value": frechet_distance(moments.mean, moments.covariance, true_mean, true_covariance),
        "n": len(results),
        "features": features,
        "predicted": str(predicted),
        "truth": str(truth),
        "weights": str(network.weights_file),
        "weights_sha256": weights_hash,
        "device": str(device),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "numpy", "pytorch-fid")},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def default_cache() -> Path:
    """~/.cache/maskgit-inpainting, or the same under XDG_CACHE_HOME."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "maskgit-inpainting"


def build_parser() -> argparse.ArgumentParser:
    """The command line; option names may be written with hyphens or underscores."""
    parser = argparse.ArgumentParser(
        prog="fid_score.py",
        description="Scores inpainted pictures against the true ones. Without arguments: the pictures of "
        "results/test_results against the truth that results/manifest.json names. Lower is better.",
    )
    add = partial(add_flag, parser)
    add("--predicted-path", type=Path, metavar="DIR", help="folder of results (default: test_results in --results)")
    add("--gtcsv-path", type=Path, metavar="TRUTH", help="true images: a folder, an .npz (array images, (N, H, W, 3) "
        "uint8) or the lab's test_gt.csv (default: the manifest's)")  # fmt: skip
    add("--results", type=Path, default=Path("results"), metavar="DIR",
        help="what inpainting.py wrote, with its manifest.json (default: results)")  # fmt: skip
    add("--features", choices=list(FEATURES), default="inception",
        help="inception gives the FID, vgg16 the Frechet distance FD-VGG16 (default: inception)")  # fmt: skip
    add("--feature-weights", type=Path, metavar="FILE", help="weights of the feature network, .safetensors or .pth "
        "(default: downloaded)")  # fmt: skip
    add("--batch-size", type=whole(1), default=64, metavar="N", help="images at a time (default: 64)")
    add("--num-workers", type=whole(0), default=4, metavar="N", help="threads that read results (default: 4)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: auto)")
    add("--json", type=Path, metavar="FILE", help="where the report goes (default: fid_score.json beside the results)")
    add("--cache", type=Path, default=default_cache(), metavar="DIR",
        help="keeps the statistics of the truth (default: %(default)s)")  # fmt: skip
    add("--no-cache", dest="cache", action="store_const", const=None, help="compute them anew, keep nothing")
    return parser


def main(argv=None) -> dict:
    """Prints the score, writes it as JSON and returns it. Input that cannot be scored ends with a one-line error."""
    parser = build_parser()
    arguments = parser.parse_args(argv)
    try:
        device = pick_device(arguments.device)
    except ValueError as error:
        parser.error(str(error))
    try:
        predicted, truth = find_paths(arguments.predicted_path, arguments.gtcsv_path, arguments.results)
        report = score(predicted, truth, arguments.features, arguments.feature_weights, arguments.batch_size,
                       str(device), arguments.num_workers, arguments.cache)  # fmt: skip
    except (ValueError, OSError, WeightsError) as error:
        parser.error(one_line(error))
    if report["n"] < FEW_IMAGES:
        _warn(f"n is below {FEW_IMAGES}; values at small n are biased upwards; compare only equal n")
    published = FEATURES["inception"].published_hash
    if arguments.features == "inception" and not report["weights_sha256"].startswith(published):
        _warn(
            f"{report['weights']} is not the published Inception file (SHA-256 {published}...); do not compare with it"
        )
    path = arguments.json or predicted.resolve().parent / "fid_score.json"
    text = json.dumps(report, indent=2) + "\n"
    write_text(path, text)
    print(f"{report['label']}: {report['value']:.4f}")
    print(f"n = {report['n']}")
    return report


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr)


if __name__ == "__main__":
    run_script(main)
