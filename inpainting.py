"""Fills the holes of images with a trained VQGAN and transformer.

    python inpainting.py                                    # skimage's cat chelsea, every family of holes
    python inpainting.py --test-maskedimage-path masked_image --test-mask-path mask64 --gtcsv-path test_gt.csv
    python inpainting.py --mask-func linear --sweet-spot 10 --total-iter 10
    python inpainting.py --image photo.jpg --mask mask.png --out filled.png   # a picture of any size
    python inpainting.py --samples 4 --animate              # four answers an image, and films of the decoding
    python inpainting.py --list                             # the weights that are here

From Python: `Inpainter.from_pretrained("pretrained/cats64")(images, hole)`.
"""

if __name__ == "__main__":
    import interrupts

    interrupts.in_one_line()

import argparse
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from config import add_flag, at_least, whole
from evaluation.metrics import RunningAverages, diversity
from interrupts import run_script
from maskgit.completion import InpaintingResult
from maskgit.data import MEGAPIXELS, Inputs, admit, to_float
from maskgit.decoding_config import AUTO, CODES, GUESSES, SAMPLERS, DecodingConfig
from maskgit.folders import Folders, Options, chelsea, inpaint, refuse_inputs, write_manifest
from maskgit.inpainter import CATS, PHOTOS, Inpainter
from maskgit.listing import listing
from maskgit.masks import SCHEDULES, TOKEN_RULES
from models.perceptual import Perceptual
from photos.crops import CONTEXT
from photos.fill import TILINGS, fill_photo
from photos.photo import grown, pair_photos, read_photo, write_photo
from photos.tight import tight_notes
from utils import check_folder, log, one_line, start_logging

__all__ = ["Inpainter", "InpaintingResult"]

# --- the command line ---

BAR = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}"  # of a single picture
ALWAYS = {"checkpoint", "out", "samples", "seed", "margin", "batch_size", "device", "precision", "compile"}
ALWAYS |= set(DecodingConfig.model_fields)
LAB = {"predicted_path", "lpips_weights", "profile", "grids", "animate"}
TILED = {"squares": {"context"}, "windows": {"coarse", "feather"}}  # flags that ask for a tiling
MODES = {  # what each way to name the pictures understands beside ALWAYS
    "--list": set(),
    "--image": {"image", "mask", "hole_color", "box", "max_megapixels", "tiling", "grow"}.union(*TILED.values()),
    "--test-maskedimage-path": {"test_maskedimage_path", "test_mask_path", "gtcsv_path", "num_workers", *LAB},
    "scikit-image's cat": LAB,
}


def numbers(count: int, most: float = math.inf) -> Callable[[str], tuple[int, ...]]:
    """Reads `count` integers from 0 to `most`, written 1,2,3."""

    def parse(text: str) -> tuple[int, ...]:
        try:
            values = tuple(int(part) for part in text.split(","))
        except ValueError:
            values = ()
        if len(values) != count:
            raise argparse.ArgumentTypeError(f"expected {count} integers with commas between, found {text}")
        if min(values) < 0 or max(values) > most:
            upwards = f"0 to {most}" if most < math.inf else "at least 0"
            raise argparse.ArgumentTypeError(f"expected integers, {upwards}, found {text}")
        return values

    return parse


def total_iter(text: str) -> int | str:
    """Reads a number of iterations, or auto."""
    if text != AUTO and not text.removeprefix("-").isdecimal():
        raise argparse.ArgumentTypeError(f"expected a whole number or {AUTO}, found {text!r}")
    return AUTO if text == AUTO else int(text)


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
    add_flag(where, "--checkpoint", metavar="DIR", type=Path,
             help="folder with vqgan.safetensors and transformer.safetensors "
             "(default: pretrained/photos64 with --image, else pretrained/cats64)")  # fmt: skip
    add_flag(
        where,
        "--out",
        default=Path("results"),
        type=Path,
        metavar="DIR",
        help="folder, or with --image a file (default: results)",
    )
    add_flag(where, "--test-maskedimage-path", metavar="DIR", help="images with holes (or whole: holes are cut out)")
    add_flag(where, "--test-mask-path", metavar="DIR", help="their masks, of the same names or numbers: 0 = hole")
    add_flag(where, "--gtcsv-path", metavar="PATH", help="true images, to score: folder, .npz or the lab's test_gt.csv")
    add_flag(where, "--predicted-path", type=Path, metavar="DIR", help="composited results (default: OUT/test_results)")
    add_flag(where, "--samples", type=whole(1), default=1, metavar="K",
             help="answers an image: more in OUT/samples, of --image NAME_0.png ... (default: 1)")  # fmt: skip
    add_flag(where, "--lpips-weights", metavar="FILE",
             help="AlexNet features, for how the samples differ (default: torchvision downloads them)")  # fmt: skip
    add_flag(where, "--list", action="store_true", help="list the weights in pretrained/ and checkpoints/, and stop")
    own = parser.add_argument_group("your picture, of any size and mode; its hole is a mask, a colour, a box, "
                                    "or else what is transparent")  # fmt: skip
    add_flag(own, "--image", type=Path, metavar="PATH", help="a picture, or a folder of them")
    hole = own.add_mutually_exclusive_group()
    add_flag(hole, "--mask", type=Path, metavar="PATH", help="its mask, or a folder of them: 0 = hole, 255 = known")
    add_flag(hole, "--hole-color", type=numbers(3, 255), metavar="R,G,B", help="the colour of the hole, 0..255 each")
    add_flag(hole, "--box", type=numbers(4), metavar="X,Y,W,H", help="a rectangle, in pixels from the top left")
    add_flag(own, "--grow", type=whole(0), default=0, metavar="N", help="pixels that the hole is grown by (default: 0)")
    add_flag(own, "--feather", type=whole(0), default=0, metavar="N",
             help="blend N known pixels around the hole with the model's (default: 0, known pixels stay)")  # fmt: skip
    add_flag(own, "--tiling", choices=TILINGS,
             help="windows over the picture at its own scale, or squares around the regions, shrunk to the model's "
             "size (default: windows, where the model's encoder can)")  # fmt: skip
    add_flag(own, "--coarse", action=argparse.BooleanOptionalAction, default=True,
             help="fill thick holes at smaller scales first (windows; default: yes)")  # fmt: skip
    add_flag(own, "--max-megapixels", type=at_least(1e-6), default=MEGAPIXELS, metavar="X",
             help=f"refuse pictures that are larger (default: {MEGAPIXELS})")  # fmt: skip
    add_flag(own, "--context", type=at_least(1), default=CONTEXT, metavar="X",
             help=f"squares: X times as large as the region (default: {CONTEXT:g})")  # fmt: skip
    how = parser.add_argument_group("decoding (defaults: those of the checkpoint)")
    add_flag(how, "--total-iter", type=total_iter, metavar="T",
             help="iterations of the schedule; auto: as many as the hole needs")  # fmt: skip
    add_flag(how, "--sweet-spot", type=int, metavar="S", help="stop after this many; what is left is filled then")
    add_flag(how, "--mask-func", choices=list(SCHEDULES), help="mask schedule")
    add_flag(how, "--sampler", choices=SAMPLERS,
             help="order of decoding: log p + noise, p + noise, p + growing noise, any, or evenly spread")  # fmt: skip
    add_flag(how, "--temperature", type=float, metavar="X", help="weight of that noise; it shrinks, or grows")
    add_flag(how, "--sampling-temperature", type=float, metavar="X", help="temperature of the codes; 0: most probable")
    add_flag(how, "--top-k", type=int, metavar="K", help="draw from the K most probable codes; 0: from all")
    add_flag(how, "--codes", choices=CODES,
             help="decode drawn codes, the likeliest, the mean of all, that for the last ones alone, or (auto) where "
             "one iteration is enough")  # fmt: skip
    add_flag(how, "--forget", action="store_true", default=None, help="predict from the given tokens alone")
    add_flag(how, "--second-look", type=float, metavar="X", help="share of the tokens, the least sure, decoded again")
    add_flag(how, "--seed", type=whole(0), default=0, help="image i takes seed + i (default: 0)")
    add_flag(how, "--margin", type=whole(0), default=0, help="rings of tokens hidden around the hole (default: 0)")
    add_flag(how, "--token-rule", choices=TOKEN_RULES,
             help="a token is hidden where any, or most, of its pixels are missing")  # fmt: skip
    add_flag(how, "--pre-fill", action=argparse.BooleanOptionalAction,
             help="encode the hole filled by the first guess, or grey")  # fmt: skip
    add_flag(how, "--guess", choices=GUESSES,
             help="Navier-Stokes inpainting, or frequency selective reconstruction of thin parts")  # fmt: skip
    add_flag(how, "--rim", type=at_least(0), metavar="X", help="share of biharmonic inpainting beside known pixels")
    add_flag(how, "--self-ensemble", action=argparse.BooleanOptionalAction,
             help="the mean with that of its mirror image: smaller errors, softer, up to twice as long")  # fmt: skip
    run_time = parser.add_argument_group("running")
    add_flag(run_time, "--batch-size", type=whole(1),
             help="images at once (default: 8 on a CPU, whose caches hold no more, else 64)")  # fmt: skip
    add_flag(run_time, "--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: auto)")
    add_flag(run_time, "--num-workers", type=whole(0), default=4, help="threads that read images (default: 4)")
    add_flag(run_time, "--precision", choices=["auto", "float32", "bfloat16"], default="auto",
             help="arithmetic of the networks (default: bfloat16 where the device has it)")  # fmt: skip
    add_flag(run_time, "--profile", type=whole(0), default=0, metavar="N",
             help="record N iterations after the first into OUT/profile, for Perfetto or TensorBoard")  # fmt: skip
    add_flag(run_time, "--compile", action="store_true", help="torch.compile both networks: pays for many images")
    add_flag(run_time, "--grids", type=whole(0), default=6, metavar="N",
             help="draw every iteration of N images (default: 6; each costs a decode)")  # fmt: skip
    add_flag(run_time, "--animate", action="store_true", help="animate these iterations, in OUT/animation")
    return parser


def given(argv: list[str] | None) -> set[str]:
    """The flags on the command line, by their names in the parsed arguments."""
    parser, unset = build_parser(), object()
    parser.set_defaults(**dict.fromkeys(vars(parser.parse_args([])), unset))
    return {name for name, value in vars(parser.parse_args(argv)).items() if value is not unset}


def check(parser: argparse.ArgumentParser, args: argparse.Namespace, flags: set[str]) -> str:
    """The one of MODES that `flags`, those given, ask for; completes the checkpoint, and the tiling where one is meant.

    Ends the program where flags do not go together, or one of them would do nothing.
    """
    for tiling, own in TILED.items():
        if args.image and own & flags:
            args.tiling = args.tiling or tiling
            if args.tiling != tiling:
                told = ", ".join(f"--{name}" for name in sorted(own & flags))
                parser.error(f"{told}: would do nothing with --tiling {args.tiling}")
    if args.image and args.test_maskedimage_path:
        parser.error("--image and --test-maskedimage-path exclude each other")
    if not args.image and (args.mask or args.hole_color or args.box):
        parser.error("--mask, --hole-color and --box tell the hole of --image, which is missing")
    if (args.test_maskedimage_path is None) != (args.test_mask_path is None):
        parser.error("--test-maskedimage-path and --test-mask-path go together")
    if args.gtcsv_path and not args.test_mask_path:
        parser.error("--gtcsv-path is the truth of --test-maskedimage-path, which is missing")
    asked = {"--list": args.list, "--image": args.image, "--test-maskedimage-path": args.test_mask_path}
    mode = next((name for name, value in asked.items() if value), "scikit-image's cat")
    args.checkpoint = args.checkpoint or (PHOTOS if args.image else CATS)
    known = MODES[mode] | (ALWAYS if mode != "--list" else {"list"})
    if idle := flags - known:
        told = ", ".join(sorted(f"--{name.replace('_', '-')}" for name in idle))
        parser.error(f"{told}: would do nothing with {mode}")
    if args.lpips_weights and args.samples == 1:
        parser.error("--lpips-weights measures how several completions differ: give --samples too")
    if args.animate and not args.grids:
        parser.error("--animate shows the images that --grids draws, which is 0")
    return mode


def lpips(samples: int, weights: str | None, device: torch.device) -> Perceptual | None:
    """What measures how samples differ; None without samples, or, said in a line, where its weights are out of reach.

    Raises ValueError or FileNotFoundError for a file that does not fit.
    """
    if samples == 1:
        return None
    try:
        return Perceptual("alex", weights).to(device)
    except RuntimeError as error:
        log.info(f"no diversity: {error}")
        return None


@torch.no_grad()
def count(
    averages: dict[str, RunningAverages],
    batch: Inputs,
    result: InpaintingResult,
    distance: Callable[[Tensor, Tensor], Tensor] | None,
    device: torch.device,
) -> None:
    """Adds a batch to the row of each of its groups."""
    completions = result.images.unflatten(0, (len(batch), -1))  # (b, K, 3, H, W)
    spread = None
    if distance and completions.shape[1] > 1:
        spread = diversity(to_float(completions.to(device)), distance).cpu()
    for group in dict.fromkeys(batch.groups):
        chosen = torch.tensor([other == group for other in batch.groups])
        truth, part = (None if x is None else x[chosen] for x in (batch.truth, spread))
        averages.setdefault(group, RunningAverages()).add(batch.hole[chosen], completions[chosen, 0], truth, part)


def fill_folders(inpainter: Inpainter, args: argparse.Namespace, decoding: DecodingConfig) -> bool:
    """Fills the lab's folders or scikit-image's cat, and prints a table. Whether all images could be read."""
    options = Options(
        out=args.out, predicted=args.predicted_path, seed=args.seed, samples=args.samples, batch_size=args.batch_size,
        margin=args.margin, drawn=args.grids, animate=args.animate, keep_truth=not args.gtcsv_path,
        profiled=args.profile,
    )  # fmt: skip
    if args.test_mask_path:
        paths = args.test_maskedimage_path, args.test_mask_path, args.gtcsv_path
        inputs = Folders(*paths, inpainter.size, args.num_workers)
        refuse_inputs(inputs, options)
    else:
        inputs = chelsea(inpainter.size)
    if args.predicted_path:
        check_folder(args.predicted_path, "--predicted-path")
    check_folder(args.out, "--out").mkdir(parents=True, exist_ok=True)
    distance = lpips(args.samples, args.lpips_weights, inpainter.device)
    averages: dict[str, RunningAverages] = {}
    start, names = time.perf_counter(), []
    for batch, result in inpaint(inpainter, inputs, decoding, options):
        count(averages, batch, result, distance, inpainter.device)
        names += batch.names
    seconds = time.perf_counter() - start
    notes = {
        "diversity": {group: row.diversity for group, row in averages.items()},  # None: not measured
        "device": str(inpainter.device),
        "seconds": round(seconds, 3),
        "images": args.test_maskedimage_path or "skimage.data.chelsea",
        "masks": args.test_mask_path or "masks.make_holes, seed 0",
    }
    write_manifest(args.checkpoint, inputs, names, decoding, options, notes)
    more = f" {'diversity':>10}" if args.samples > 1 else ""
    log.info(f"{'holes':<10} {'n':>4} {'hole %':>7} {'hole PSNR dB':>13}{more}")
    for group, row in averages.items():
        log.info(row.row(group, args.samples))
    log.info(f"{seconds / max(len(names), 1):.3f} s an image, {seconds:.1f} s in all, pictures included")
    log.info(f"pictures: {args.predicted_path or args.out / 'test_results'}   decoder output: {args.out / 'raw'}   "
             f"steps: {args.out / 'imga'}   run: {args.out / 'manifest.json'}")  # fmt: skip
    refused = inputs.refused if args.test_mask_path else {}
    for _, told in sorted(refused.items()):
        print(f"inpainting.py: error: {told}", file=sys.stderr)
    if refused and args.gtcsv_path:
        log.info(f"note: {len(refused)} images are left out, so fid_score.py needs a truth without them")
    return not refused


def fill_photos(
    inpainter: Inpainter,
    jobs: list[tuple[Path, Path | None, list[Path]]],
    args: argparse.Namespace,
    decoding: DecodingConfig,
) -> bool:
    """Fills the pictures of `pair_photos`; one that cannot be filled is reported. Whether all could."""
    done = True
    for number, (image, mask, targets) in enumerate(tqdm(jobs, "inpainting", unit="picture", disable=len(jobs) < 2)):
        try:
            photo = grown(read_photo(image, mask, args.hole_color, args.box), args.grow)
            with tqdm(total=1.0, desc="inpainting", disable=len(jobs) > 1, delay=1, bar_format=BAR) as bar:
                pictures, notes = fill_photo(
                    inpainter, photo, args.seed + number, args.samples, decoding,
                    tiling=args.tiling, coarse=args.coarse, feather=args.feather, context=args.context,
                    batch_size=args.batch_size, margin=args.margin,
                    on_step=lambda share, bar=bar: bar.update(share - bar.n),
                )  # fmt: skip
            notes = photo.notes + tight_notes(photo) + notes
            for path in targets:
                notes += write_photo(path, photo, pictures.pop(0), args.feather)
                tqdm.write(f"{image} -> {path}")
        except (ValueError, OSError) as error:
            done = False
            tqdm.write(f"inpainting.py: error: {error}", file=sys.stderr)
        else:
            for note in notes:
                tqdm.write(f"note: {note}")
    return done


def main(argv: list[str] | None = None) -> None:
    """The command line; see --help."""
    start_logging()
    parser = build_parser()
    args = parser.parse_args(argv)
    mode = check(parser, args, given(argv))
    if mode == "--list":
        log.info(listing())
        return
    try:
        if mode == "--image":
            admit(args.max_megapixels)
            jobs = pair_photos(args.image, args.mask, args.out, args.samples)  # before networks are loaded
        inpainter = Inpainter.from_pretrained(args.checkpoint, args.device, args.precision, args.compile)
        decoding = inpainter.decoding.changed(**{name: getattr(args, name) for name in DecodingConfig.model_fields})
        if mode == "--image":
            done = fill_photos(inpainter, jobs, args, decoding)
        else:
            done = fill_folders(inpainter, args, decoding)
    except (ValueError, OSError) as error:
        parser.error(one_line(error))
    if not done:
        sys.exit(1)


if __name__ == "__main__":
    run_script(main)
