"""Fills the holes of images with a trained VQGAN and transformer.

    python inpainting.py                                    # skimage's cat chelsea, every family of holes
    python inpainting.py --test-maskedimage-path masked_image --test-mask-path mask64 --gtcsv-path test_gt.csv
    python inpainting.py --mask-func linear --sweet-spot 10 --total-iter 10
    python inpainting.py --image photo.jpg --mask mask.png --out filled.png   # a picture of any size
    python inpainting.py --samples 4 --animate              # four answers an image, and films of the decoding
    python inpainting.py --list                             # the weights that are here

From Python: `Inpainter.from_pretrained("pretrained/cats64")(images, hole)`.
"""

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from config import add_flag
from evaluation.metrics import Tally, spread_of
from maskgit.data import to_pixels, write_image
from maskgit.decoding import SAMPLERS, DecodingConfig
from maskgit.folders import Folders, Inputs, batches, chelsea
from maskgit.inpainter import PRETRAINED, Filled, Inpainter, sample_seed
from maskgit.masks import SCHEDULES, TOKEN_RULES
from maskgit.visualize import Sheets, confidence_map, drawn
from models.checkpoint import file_hash
from models.perceptual import Perceptual
from photos.fill import fill_photo
from photos.photo import CONTEXT, pair_photos, read_photo, write_photo
from utils import ROOT, images_at_once, log, profile, start_logging

__all__ = ["Filled", "Inpainter"]


def more_samples(
    inpainter: Inpainter, batch: Inputs, seeds: Sequence[int], args: argparse.Namespace, decoding: DecodingConfig
) -> list[Tensor]:
    """Completions 1, 2, ... of every image of the batch, (b, 3, H, W) uint8 each: all but the first."""
    completions = []
    for number in range(1, args.samples):
        others = [sample_seed(seed, number) for seed in seeds]
        *_, state = inpainter.steps(batch.images, batch.hole, others, args.margin, decoding)
        completions.append(inpainter.finish(batch.images, batch.hole, state.tokens).images)
    return completions


def run(
    inpainter: Inpainter,
    inputs: Inputs | Folders,
    args: argparse.Namespace,
    decoding: DecodingConfig,
    distance: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> dict[str, Tally]:
    """Fills every image and writes the pictures; a row of the table a group. `distance` (LPIPS) measures diversity.

    The next batch is read and the last one written while this one is at work; no more than three are in memory.
    """
    sheets = Sheets(inpainter.decode, inpainter.blank(), args.out, drawn(inputs.groups, args.grids), args.animate)
    codes, tallies = inpainter.vqgan.config.codebook.codes, {}
    with (
        tqdm(total=len(inputs), desc="inpainting", unit="image") as bar,
        ThreadPoolExecutor(2) as writers,
        profile(args.out / "profile" / "inpainting.pt.trace.json", args.profile) as profiler_step,
    ):
        pending = []
        for start, batch in batches(inputs, args.batch_size):
            rows, history = sheets.rows(start, len(batch)), []
            seeds = range(args.seed + start, args.seed + start + len(batch))
            for state in inpainter.steps(batch.images, batch.hole, seeds, args.margin, decoding):
                if rows:
                    history.append(sheets.draw(state, batch, rows))
                profiler_step()
            filled = inpainter.finish(batch.images, batch.hole, state.tokens, state.confidence)
            further = more_samples(inpainter, batch, seeds, args, decoding)
            spread = spread_of([filled.images, *further], distance, inpainter.device)
            hidden = inpainter.hide(batch.hole, args.margin, decoding.token_rule)
            maps = confidence_map(batch.images, hidden, filled.confidence, codes)
            for done in pending:
                done.result()  # raises what writing raised
            pictures = outputs(args, batch, filled, maps, further)
            pending = [writers.submit(write_image, path, to_pixels(image)) for path, image in pictures]
            sheets.write(batch, hidden, filled.images, rows, history)
            for group in dict.fromkeys(batch.groups):
                chosen = torch.tensor([other == group for other in batch.groups])
                truth, part = (None if x is None else x[chosen] for x in (batch.truth, spread))
                tallies.setdefault(group, Tally()).add(batch.hole[chosen], filled.images[chosen], truth, part)
            bar.update(len(batch))
        for done in pending:
            done.result()
    sheets.close()
    return tallies


def outputs(
    args: argparse.Namespace, batch: Inputs, filled: Filled, maps: Tensor, further: list[Tensor]
) -> Iterator[tuple[Path, Tensor]]:
    """Where the pictures of a batch go, and each of them, (3, H, W) uint8."""
    kinds = [
        (Path(args.predicted_path or args.out / "test_results"), "", filled.images),
        (args.out / "raw", "", filled.raw),
        (args.out / "confidence", "", maps),
        *((args.out / "samples", f"_{number}", images) for number, images in enumerate(further, start=1)),
    ]
    if batch.truth is not None and not args.gtcsv_path:
        kinds.append((args.out / "truth", "", batch.truth))
    for folder, suffix, images in kinds:
        for name, image in zip(batch.names, images, strict=True):
            yield folder / f"{Path(name).stem}{suffix}.png", image


def write_manifest(
    args, inputs: Inputs | Folders, decoding: DecodingConfig, seconds: float, device, tallies: dict[str, Tally]
) -> None:
    """OUT/manifest.json: all that is needed to repeat the run, and where the truth is."""
    truth = args.gtcsv_path or (args.out / "truth" if inputs.truth is not None else None)
    weights = {name: file_hash(Path(args.checkpoint) / f"{name}.safetensors") for name in ("vqgan", "transformer")}
    manifest = {
        "decoding": decoding.model_dump(),
        "seed": args.seed,
        "margin": args.margin,
        "samples": args.samples,
        "diversity": {group: tally.diversity for group, tally in tallies.items()},  # None: not measured
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


def fill_photos(
    inpainter: Inpainter,
    jobs: list[tuple[Path, Path | None, Path]],
    args: argparse.Namespace,
    decoding: DecodingConfig,
) -> None:
    """Fills pictures of any size; one that cannot be is reported, and the exit status is 1 when the others are done."""
    failed = False
    for number, (image, mask, out) in enumerate(tqdm(jobs, "inpainting", unit="picture", disable=len(jobs) < 2)):
        try:
            photo = read_photo(image, mask, args.hole_color, args.box)
            pictures, notes = fill_photo(
                inpainter, photo, args.seed + number, args.samples, decoding,
                context=args.context, batch_size=args.batch_size, margin=args.margin,
            )  # fmt: skip
            for sample, pixels in enumerate(pictures):
                path = out.with_stem(f"{out.stem}_{sample}") if args.samples > 1 else out
                notes += write_photo(path, photo, pixels)
        except (ValueError, OSError) as error:
            failed = True
            tqdm.write(f"inpainting.py: error: {error}", file=sys.stderr)
        else:
            for note in photo.notes + notes:
                tqdm.write(f"note: {note}")
    if failed:
        sys.exit(1)


SHELVES = (ROOT / "pretrained", Path("checkpoints"))  # the trainings write to checkpoints/ of the current folder
LINE = "{:<24} {:>9} {:>22} {:>14} {:>16}"


def listing(shelves: Iterable[Path] = SHELVES) -> str:
    """A table of the folders in `shelves` that hold weights; one that cannot be loaded has a line that says why."""
    folders = [path.parent for shelf in shelves for path in sorted(shelf.glob("*/*.safetensors"))]
    if not folders:
        return f"no weights in {' or '.join(map(str, shelves))}"
    head = LINE.format("--checkpoint", "pictures", "tokens", "parameters", "files")
    return "\n".join([head, *(line for folder in dict.fromkeys(folders) for line in described(folder))])


def described(folder: Path) -> list[str]:
    """Name, size of the pictures, tokens, and parameters and file sizes of VQGAN + transformer; the model card."""
    name = str(folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder)
    try:
        inpainter = Inpainter.from_pretrained(folder, "cpu")
    except (ValueError, OSError) as error:
        return [f"{name}  cannot be used: {error}"]
    config, side = inpainter.vqgan.config, inpainter.vqgan.config.grid
    networks = inpainter.vqgan, inpainter.transformer
    parameters = [sum(parameter.numel() for parameter in network.parameters()) / 1e6 for network in networks]
    sizes = [(folder / f"{file}.safetensors").stat().st_size / 1e6 for file in ("vqgan", "transformer")]
    tokens = f"{side}x{side} of {config.codebook.codes:,} codes"
    line = LINE.format(name, f"{inpainter.size}x{inpainter.size}", tokens, _sum(parameters, "M"), _sum(sizes, "MB"))
    return [line, f"    {_first_words(folder / 'README.md')}"]


def _sum(values: list[float], unit: str) -> str:
    return " + ".join(f"{value:.1f}" for value in values) + f" {unit}"


def _first_words(card: Path) -> str:
    """The first line of a model card that is no heading, up to its first full stop."""
    lines = card.read_text(encoding="utf-8").splitlines() if card.is_file() else []
    first = next((line.strip() for line in lines if line.strip() and not line.startswith("#")), "no model card")
    return first.partition(". ")[0].rstrip(".")


def numbers(count: int) -> Callable[[str], tuple[int, ...]]:
    """Reads `count` integers, written 1,2,3."""

    def parse(text: str) -> tuple[int, ...]:
        try:
            values = tuple(int(part) for part in text.split(","))
        except ValueError:
            values = ()
        if len(values) != count:
            raise argparse.ArgumentTypeError(f"expected {count} integers with commas between, found {text}")
        return values

    return parse


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
    add_flag(
        where,
        "--out",
        default=Path("results"),
        type=Path,
        metavar="DIR",
        help="folder, or with --image a file (default: results)",
    )
    add_flag(where, "--test-maskedimage-path", metavar="DIR", help="images with holes (or whole: holes are cut out)")
    add_flag(where, "--test-mask-path", metavar="DIR", help="their masks, in the same order: 0 = hole, 255 = known")
    add_flag(where, "--gtcsv-path", metavar="PATH", help="true images, to score: folder, .npz or the lab's test_gt.csv")
    add_flag(where, "--predicted-path", metavar="DIR", help="composited results (default: OUT/test_results)")
    add_flag(where, "--samples", type=int, default=1, metavar="K",
             help="answers an image: more in OUT/samples, of --image NAME_0.png ... (default: 1)")  # fmt: skip
    add_flag(where, "--lpips-weights", metavar="FILE",
             help="AlexNet features, for how the samples differ (default: torchvision downloads them)")  # fmt: skip
    add_flag(where, "--list", action="store_true", help="list the weights in pretrained/ and checkpoints/, and stop")
    own = parser.add_argument_group("your picture, of any size and mode; its hole is a mask, a colour, a box, "
                                    "or else what is transparent")  # fmt: skip
    add_flag(own, "--image", type=Path, metavar="PATH", help="a picture, or a folder of them")
    hole = own.add_mutually_exclusive_group()
    add_flag(hole, "--mask", type=Path, metavar="PATH", help="its mask, or a folder of them: 0 = hole, 255 = known")
    add_flag(hole, "--hole-color", type=numbers(3), metavar="R,G,B", help="the colour of the hole, 0..255 each")
    add_flag(hole, "--box", type=numbers(4), metavar="X,Y,W,H", help="a rectangle, in pixels from the top left")
    add_flag(own, "--context", type=float, default=CONTEXT, metavar="X",
             help=f"the model sees a square X times as large as the hole (default: {CONTEXT:g})")  # fmt: skip
    how = parser.add_argument_group("decoding (defaults: those of the checkpoint)")
    add_flag(how, "--total-iter", type=int, metavar="T", help="iterations of the schedule")
    add_flag(how, "--sweet-spot", type=int, metavar="S", help="stop after this many; what is left is filled then")
    add_flag(how, "--mask-func", choices=list(SCHEDULES), help="mask schedule")
    add_flag(how, "--sampler", choices=SAMPLERS,
             help="order of decoding: log p + noise, p + noise, p + growing noise, any, or evenly spread")  # fmt: skip
    add_flag(how, "--temperature", type=float, metavar="X", help="weight of that noise; it shrinks, or grows")
    add_flag(how, "--sampling-temperature", type=float, metavar="X", help="temperature of the codes; 0: most probable")
    add_flag(how, "--top-k", type=int, metavar="K", help="draw from the K most probable codes; 0: from all")
    add_flag(how, "--forget", action="store_true", default=None, help="predict from the given tokens alone")
    add_flag(how, "--second-look", type=float, metavar="X", help="share of the tokens, the least sure, decoded again")
    add_flag(how, "--seed", type=int, default=0, help="image i takes seed + i (default: 0)")
    add_flag(how, "--margin", type=int, default=0, help="rings of tokens hidden around the hole (default: 0)")
    add_flag(how, "--token-rule", choices=TOKEN_RULES,
             help="a token is hidden where any, or most, of its pixels are missing")  # fmt: skip
    add_flag(how, "--pre-fill", action=argparse.BooleanOptionalAction,
             help="encode the hole filled by Navier-Stokes inpainting, or grey")  # fmt: skip
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
    add_flag(run_time, "--animate", action="store_true", help="animate these iterations, in OUT/animation")
    return parser


def override(decoding: DecodingConfig, args: argparse.Namespace) -> DecodingConfig:
    """The checkpoint's decoding with the given flags; --total-iter alone moves the sweet spot with it."""
    return decoding.changed(**{name: getattr(args, name) for name in DecodingConfig.model_fields})


def lpips(args: argparse.Namespace, device: torch.device) -> Perceptual | None:
    """What measures how samples differ; None without samples, or, said in a line, where its weights are out of reach.

    Raises ValueError or FileNotFoundError for a file that does not fit.
    """
    if args.samples == 1:
        return None
    try:
        return Perceptual("alex", args.lpips_weights).to(device)
    except RuntimeError as error:
        log.info(f"no diversity: {error}")
        return None


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends the program where flags do not go together."""
    if args.image and args.test_maskedimage_path:
        parser.error("--image and --test-maskedimage-path exclude each other")
    if not args.image and (args.mask or args.hole_color or args.box):
        parser.error("--mask, --hole-color and --box tell the hole of --image, which is missing")
    if (args.test_maskedimage_path is None) != (args.test_mask_path is None):
        parser.error("--test-maskedimage-path and --test-mask-path go together")
    if args.gtcsv_path and not args.test_mask_path:
        parser.error("--gtcsv-path is the truth of --test-maskedimage-path, which is missing")
    if min(args.samples, 1 if args.batch_size is None else args.batch_size) < 1 or not args.context >= 1:
        parser.error("--batch-size, --samples and --context must be at least 1")
    if min(args.seed, args.margin, args.grids, args.profile) < 0:
        parser.error("--seed, --margin, --grids and --profile must be at least 0")
    if args.lpips_weights and args.samples == 1:
        parser.error("--lpips-weights measures how several completions differ: give --samples too")
    if args.animate and not args.grids:
        parser.error("--animate shows the images that --grids draws, which is 0")


def main(argv: list[str] | None = None) -> None:
    """The command line; see --help."""
    start_logging()
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.list:
        log.info(listing())
        return
    check(parser, args)
    try:
        jobs = pair_photos(args.image, args.mask, args.out) if args.image else []
        inpainter = Inpainter.from_pretrained(args.checkpoint, args.device, args.precision, args.compile)
        decoding = override(inpainter.decoding, args)
        if jobs:
            return fill_photos(inpainter, jobs, args, decoding)
        if args.test_mask_path:
            paths = args.test_maskedimage_path, args.test_mask_path, args.gtcsv_path
            inputs = Folders(*paths, inpainter.size, args.num_workers)
        else:
            inputs = chelsea(inpainter.size)
        args.batch_size = args.batch_size or images_at_once(inpainter.device)
        args.out.mkdir(parents=True, exist_ok=True)
        distance = lpips(args, inpainter.device)
        start = time.perf_counter()
        tallies = run(inpainter, inputs, args, decoding, distance)
        seconds = time.perf_counter() - start
    except (ValueError, OSError) as error:
        parser.error(str(error))
    write_manifest(args, inputs, decoding, seconds, inpainter.device, tallies)
    more = f" {'diversity':>10}" if args.samples > 1 else ""
    log.info(f"{'holes':<10} {'n':>4} {'hole %':>7} {'hole PSNR dB':>13}{more}")
    for group, tally in tallies.items():
        log.info(tally.row(group, args.samples))
    log.info(f"{seconds / len(inputs):.3f} s an image, {seconds:.1f} s in all, pictures included")
    log.info(f"pictures: {args.predicted_path or args.out / 'test_results'}   decoder output: {args.out / 'raw'}   "
             f"steps: {args.out / 'imga'}   run: {args.out / 'manifest.json'}")  # fmt: skip


if __name__ == "__main__":
    main()
