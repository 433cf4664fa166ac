"""Fills the holes of images with a trained VQGAN and transformer.

    python inpainting.py                                    # skimage's cat chelsea, every family of holes
    python inpainting.py --test-maskedimage-path masked_image --test-mask-path mask64 --gtcsv-path test_gt.csv
    python inpainting.py --mask-func linear --sweet-spot 10 --total-iter 10

From Python: `Inpainter.from_pretrained("pretrained/cats64")(images, hole)`.
"""

import argparse
import json
import platform
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pydantic
import torch
from torch import Tensor
from tqdm import tqdm

from config import add_flag, explain
from data import to_float, to_pixels, write_image
from decoding import DecodingConfig
from drawing import Sheets, drawn
from inpainter import PRETRAINED, Filled, Inpainter
from inputs import Folders, Inputs, batches, chelsea
from masks import SCHEDULES, TOKEN_RULES
from metrics import hole_psnr
from models.base import file_hash
from utils import log, profile, start_logging

__all__ = ["Filled", "Inpainter"]


@dataclass
class Tally:
    """Sums over the images of a group, for its row of the table."""

    images: int = 0
    missing: float = 0.0  # shares of pixels
    scored: int = 0  # images with a hole whose truth is known
    psnr: float = 0.0  # in dB, in the hole

    def add(self, hole: Tensor, filled: Tensor, truth: Tensor | None) -> None:
        """Counts images (b, 3, H, W) uint8."""
        self.images += len(hole)
        self.missing += float(hole.float().mean(dim=(1, 2, 3)).sum())
        if truth is not None and (some := hole.flatten(1).any(dim=1)).any():
            self.scored += int(some.sum())
            self.psnr += float(hole_psnr(to_float(filled[some]), to_float(truth[some]), hole[some]).sum())

    def row(self, group: str) -> str:
        quality = f"{self.psnr / self.scored:.2f}" if self.scored else "-"
        return f"{group:<10} {self.images:>4} {100 * self.missing / self.images:>7.1f} {quality:>13}"


def run(
    inpainter: Inpainter, inputs: Inputs | Folders, args: argparse.Namespace, decoding: DecodingConfig
) -> dict[str, Tally]:
    """Fills every image and writes the pictures; a row of the table a group.

    The next batch is read and the last one written while this one is at work; no more than three are in memory.
    """
    folders = {"images": Path(args.predicted_path or args.out / "test_results"), "raw": args.out / "raw"}
    sheets, tallies = Sheets(inpainter.decode, args.out, drawn(inputs.groups, args.grids)), {}
    with (
        tqdm(total=len(inputs), desc="inpainting", unit="image") as bar,
        ThreadPoolExecutor(2) as writers,
        profile(args.out / "profile" / "inpainting.pt.trace.json", args.profile) as profiler_step,
    ):
        pending = []
        for start, batch in batches(inputs, args.batch_size):
            rows, history = sheets.rows(start, len(batch)), []
            seeds = range(args.seed + start, args.seed + start + len(batch))
            for state in inpainter.steps(
                batch.images, batch.hole, seeds, args.margin, decoding, args.token_rule, args.pre_fill
            ):
                if rows:
                    history.append(sheets.draw(state, batch, rows))
                profiler_step()
            filled = inpainter.finish(batch.images, batch.hole, state.tokens)
            for done in pending:
                done.result()  # raises what writing raised
            pictures = {folder: getattr(filled, kind) for kind, folder in folders.items()}
            if batch.truth is not None and not args.gtcsv_path:
                pictures[args.out / "truth"] = batch.truth
            pending = [
                writers.submit(write_image, folder / name, to_pixels(image))
                for folder, images in pictures.items()
                for name, image in zip(batch.names, images, strict=True)
            ]
            sheets.write(batch, filled.images, rows, history)
            for group in dict.fromkeys(batch.groups):
                chosen = torch.tensor([other == group for other in batch.groups])
                truth = None if batch.truth is None else batch.truth[chosen]
                tallies.setdefault(group, Tally()).add(batch.hole[chosen], filled.images[chosen], truth)
            bar.update(len(batch))
        for done in pending:
            done.result()
    sheets.close()
    return tallies


def write_manifest(args, inputs: Inputs | Folders, decoding: DecodingConfig, seconds: float, device) -> None:
    """OUT/manifest.json: all that is needed to repeat the run, and where the truth is."""
    truth = args.gtcsv_path or (args.out / "truth" if inputs.truth is not None else None)
    weights = {name: file_hash(Path(args.checkpoint) / f"{name}.safetensors") for name in ("vqgan", "transformer")}
    manifest = {
        "decoding": decoding.model_dump(),
        "seed": args.seed,
        "margin": args.margin,
        "token_rule": args.token_rule,
        "pre_fill": args.pre_fill,
        "checkpoint": str(args.checkpoint),
        "weights_sha256": weights,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        "device": str(device),
        "seconds": round(seconds, 3),
        "images": args.test_maskedimage_path or "skimage.data.chelsea",
        "masks": args.test_mask_path or "masks.make_holes, seed 0",
        "predicted": args.predicted_path and str(Path(args.predicted_path).resolve()),  # None: OUT/test_results
        "truth": None if truth is None else str(Path(truth).resolve()),
        "results": inputs.names,
    }
    (args.out / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")


def build_parser() -> argparse.ArgumentParser:
    """The command line; every flag with a hyphen is understood with an underscore too."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0]
        + "\nWithout arguments: skimage's cat chelsea under every family of holes.",
        epilog="With the lab's folders:\n  python inpainting.py --test-maskedimage-path lab3_dataset/masked_image \\\n"
        "    --test-mask-path lab3_dataset/mask64 --gtcsv-path test_gt.csv --mask-func linear --sweet-spot 10",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    where = parser.add_argument_group("files")
    add_flag(where, "--checkpoint", default=PRETRAINED, metavar="DIR", type=Path,
             help="folder with vqgan.safetensors and transformer.safetensors (default: pretrained/cats64)")  # fmt: skip
    add_flag(where, "--out", default=Path("results"), type=Path, metavar="DIR", help="default: results")
    add_flag(where, "--test-maskedimage-path", metavar="DIR", help="images with holes (or whole: holes are cut out)")
    add_flag(where, "--test-mask-path", metavar="DIR", help="their masks, in the same order: 0 = hole, 255 = known")
    add_flag(where, "--gtcsv-path", metavar="PATH", help="true images, to score: folder, .npz or the lab's test_gt.csv")
    add_flag(where, "--predicted-path", metavar="DIR", help="composited results (default: OUT/test_results)")
    how = parser.add_argument_group("decoding (defaults: those of the checkpoint)")
    add_flag(how, "--total-iter", type=int, metavar="T", help="iterations of the schedule")
    add_flag(how, "--sweet-spot", type=int, metavar="S", help="stop after this many; what is left is filled then")
    add_flag(how, "--mask-func", choices=list(SCHEDULES), help="mask schedule")
    add_flag(how, "--sampler", choices=["maskgit", "lab", "growing", "random", "halton"],
             help="order of decoding: log p + noise, p + noise, p + growing noise, any, or evenly spread")  # fmt: skip
    add_flag(how, "--temperature", type=float, metavar="X", help="weight of that noise; it shrinks, or grows")
    add_flag(how, "--sampling-temperature", type=float, metavar="X", help="temperature of the codes; 0: most probable")
    add_flag(how, "--top-k", type=int, metavar="K", help="draw from the K most probable codes; 0: from all")
    add_flag(how, "--forget", action="store_true", default=None, help="predict from the given tokens alone")
    add_flag(how, "--second-look", type=float, metavar="X", help="share of the tokens, the least sure, decoded again")
    add_flag(how, "--seed", type=int, default=0, help="image i takes seed + i (default: 0)")
    add_flag(how, "--margin", type=int, default=0, help="rings of tokens hidden around the hole (default: 0)")
    add_flag(how, "--token-rule", choices=TOKEN_RULES, default="any",
             help="a token is hidden where any, or most, of its pixels are missing (default: any)")  # fmt: skip
    add_flag(how, "--pre-fill", action="store_true", help="encode the hole filled by Navier-Stokes instead of grey")
    run_time = parser.add_argument_group("running")
    add_flag(run_time, "--batch-size", type=int,
             help="images at once (default: 8 on a CPU, whose caches hold no more, else 64)")  # fmt: skip
    add_flag(run_time, "--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: auto)")
    add_flag(run_time, "--num-workers", type=int, default=4, help="threads that read images (default: 4)")
    add_flag(run_time, "--precision", choices=["auto", "float32", "bfloat16"], default="auto",
             help="arithmetic of the networks (default: bfloat16 where the device has it)")  # fmt: skip
    add_flag(run_time, "--profile", type=int, default=0, metavar="N",
             help="record N iterations after the first into OUT/profile, for Perfetto or TensorBoard")  # fmt: skip
    add_flag(run_time, "--compile", action="store_true", help="torch.compile both networks: pays for many images")
    add_flag(run_time, "--grids", type=int, default=6, metavar="N",
             help="draw every iteration of N images (default: 6; each costs a decode)")  # fmt: skip
    return parser


def override(decoding: DecodingConfig, args: argparse.Namespace) -> DecodingConfig:
    """The checkpoint's decoding with the given flags; --total-iter alone moves the sweet spot with it."""
    given = {name: getattr(args, name) for name in DecodingConfig.model_fields}
    return decoding.changed({name: value for name, value in given.items() if value is not None})


def main(argv: list[str] | None = None) -> None:
    """The command line; see --help."""
    start_logging()
    parser = build_parser()
    args = parser.parse_args(argv)
    if (args.test_maskedimage_path is None) != (args.test_mask_path is None):
        parser.error("--test-maskedimage-path and --test-mask-path go together")
    if args.gtcsv_path and not args.test_mask_path:
        parser.error("--gtcsv-path is the truth of --test-maskedimage-path, which is missing")
    if args.batch_size == 0 or min(args.batch_size or 0, args.seed, args.margin, args.grids, args.profile) < 0:
        parser.error("--batch-size must be at least 1, --seed, --margin, --grids and --profile at least 0")
    try:
        inpainter = Inpainter.from_pretrained(args.checkpoint, args.device, args.precision, args.compile)
        decoding = override(inpainter.decoding, args)
        if args.test_mask_path:
            paths = args.test_maskedimage_path, args.test_mask_path, args.gtcsv_path
            inputs = Folders(*paths, inpainter.size, args.num_workers)
        else:
            inputs = chelsea(inpainter.size)
        args.batch_size = args.batch_size or (8 if inpainter.device.type == "cpu" else 64)
        args.out.mkdir(parents=True, exist_ok=True)
        start = time.perf_counter()
        tallies = run(inpainter, inputs, args, decoding)
        seconds = time.perf_counter() - start
    except (ValueError, OSError) as error:
        parser.error(explain(error) if isinstance(error, pydantic.ValidationError) else str(error))
    write_manifest(args, inputs, decoding, seconds, inpainter.device)
    log.info(f"{'holes':<10} {'n':>4} {'hole %':>7} {'hole PSNR dB':>13}")
    for group, tally in tallies.items():
        log.info(tally.row(group))
    log.info(f"{seconds / len(inputs):.3f} s an image, {seconds:.1f} s in all, pictures included")
    log.info(f"pictures: {args.predicted_path or args.out / 'test_results'}   decoder output: {args.out / 'raw'}   "
             f"steps: {args.out / 'imga'}   run: {args.out / 'manifest.json'}")  # fmt: skip


if __name__ == "__main__":
    main()
