"""Compares ways to fill holes, on the same images and holes: every method x family of holes x decoding seed.

    python sweep.py --config configs/sweeps/main.yml
    python sweep.py --config configs/sweeps/main.yml --n 32 --rows "OpenCV Telea" ours --data.generated "[box]"

Writes rows.csv (all figures, a line for each), results.md, plots and what each method makes of a cat into --out. What
is in rows.csv already, of the same images, holes, weights and settings, is not computed again: start a sweep that was
stopped once more.
Figures: FD-VGG16 (not the FID), KID, LPIPS (AlexNet), and PSNR, SSIM, L1 in the hole; see evaluation/evaluator.py.
"""

if __name__ == "__main__":
    import interrupts

    interrupts.in_one_line()

import argparse
import importlib.metadata
import shlex
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from config import add_flag, load_config, parse_overrides, whole
from evaluation.methods import arithmetic, complete
from evaluation.photo_sweeps import PhotoSweep
from evaluation.report import add_line, chosen, latest, read_lines, write_report
from evaluation.sweeps import Sweep, SweepConfig
from interrupts import run_script
from maskgit.data import write_image
from maskgit.folders import chelsea
from maskgit.visualize import Strip, contact_sheet
from utils import ROOT, check_folder, log, machine, start_logging

# --- the command line -------------------------------------------------------------------------------------------------


def run(sweep: Sweep, out: Path, command: str, methods: list[str]) -> None:
    """Measures what rows.csv in `out` lacks, adding to it after every entry, and reports after every family.

    The report has the `methods`, those that the sweep could not open as they were last measured on as many images.
    """
    entries, path = sweep.entries(), out / "rows.csv"
    wanted = [entry.place for entry in entries]

    def done() -> set[tuple[str, str]]:
        return {(line.method, line.key) for line in read_lines(path)}

    def report() -> None:
        lines, closed = read_lines(path), [name for name in methods if name not in sweep.networks]
        lines = chosen(lines, wanted) + latest(lines, closed, len(sweep.truth))
        write_report(out, latest(lines, methods), about)

    measured = done()
    todo = [entry for entry in entries if entry.place not in measured]
    log.info(f"{len(entries)} entries of {len(sweep.truth)} images, {len(entries) - len(todo)} of them in {path}")
    about = describe(sweep, command)
    for number, entry in enumerate(tqdm(todo, desc="sweep", unit="entry"), start=1):
        if entry.place not in done():  # another process may have measured it meanwhile
            add_line(path, sweep.measure(entry))
        if number == len(todo) or todo[number].family != entry.family:
            report()
    if not todo:
        report()
    if cats := strips(sweep):
        write_image(out / "chelsea.png", contact_sheet(cats))


def strips(sweep: Sweep) -> list[Strip]:
    """What each method makes of a crop of scikit-image's cat, a strip for each family of maskgit/masks.py; none for
    photographs."""
    if isinstance(sweep, PhotoSweep):
        return []
    cat, lines, methods = chelsea(sweep.truth.shape[-1]), [], sweep.config.rows
    for family in dict.fromkeys(group for group in cat.groups if group in sweep.holes):
        first = slice(cat.groups.index(family), cat.groups.index(family) + 1)
        truth, hole, seed = cat.truth[first], cat.hole[first], sweep.config.seeds[0]
        filled = [complete(method, sweep.networks[method.name], truth, hole, seed, 0).images for method in methods]
        lines.append(Strip(family, ["truth", *(method.name for method in methods)], torch.cat([truth, *filled])))
    return lines


def describe(sweep: Sweep, command: str) -> dict[str, object]:
    """What the figures depend on, for results.md."""
    packages = ("numpy", "scikit-image", "opencv-contrib-python-headless", "lpips")
    return {
        "command": f"`{command}`",
        "images": f"{sweep.config.data.truth}, n = {len(sweep.truth)}",
        "machine": ", ".join(f"{key} {value}" for key, value in machine(sweep.device).items() if value),
        "arithmetic": ", ".join(arithmetic(sweep.device, sweep.precision).values()),
        "versions": ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages),
        "hashes of the evaluator (SHA-256)": ", ".join(f"{k} {v}" for k, v in sweep.evaluator.identity.items()),
    }


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="Any value but those of rows is overridden as --section.key VALUE, e.g. --data.generated [box].",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", default=ROOT / "configs" / "sweeps" / "main.yml", type=Path, metavar="FILE",
                        help="default: configs/sweeps/main.yml")  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: results/sweeps/NAME OF THE CONFIG")
    parser.add_argument("--rows", nargs="+", metavar="NAME", help="these methods of the config alone")
    parser.add_argument("--seeds", type=int, nargs="+", metavar="S", help="decoding seeds: overrides seeds")
    parser.add_argument("--n", type=int, dest="data.n", metavar="N", help="the first N images: overrides data.n")
    for key in ("feature_weights", "lpips_weights"):
        flag = f"--{key.replace('_', '-')}"
        add_flag(parser, flag, dest=f"evaluator.{key}", metavar="FILE", help=f"overrides evaluator.{key}")
    parser.add_argument("--report", action="store_true", help="measure nothing: tables and plots of what rows.csv has")
    add_flag(parser, "--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: auto)")
    add_flag(parser, "--precision", choices=["auto", "float32", "bfloat16"], default="auto",
             help="arithmetic of the networks (default: bfloat16 where the device has it)")  # fmt: skip
    add_flag(parser, "--num-workers", type=whole(0), default=2, help="processes of the classical methods (default: 2)")
    return parser


def main(argv: list[str] | None = None) -> None:
    """The command line; see --help."""
    start_logging()
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    flags = {key: value for key, value in vars(args).items() if value is not None and ("." in key or key == "seeds")}
    command = shlex.join(["python", "sweep.py", *(sys.argv[1:] if argv is None else argv)])
    try:
        config = load_config(args.config, flags | parse_overrides(rest), SweepConfig).only(args.rows)
        out = check_folder(args.out or Path("results") / "sweeps" / args.config.stem, "--out")
        methods = [method.name for method in config.rows]
        lines = read_lines(out / "rows.csv")  # one that cannot be read is told before networks are loaded
        if args.report:
            taken = {"config", "out", "rows", "report", "data.n"}
            idle = {name for name, value in vars(args).items() if value != parser.get_default(name)} - taken
            if idle := [f"--{name.removeprefix('evaluator.').replace('_', '-')}" for name in sorted(idle)] + rest:
                raise ValueError(f"{' '.join(idle)}: would do nothing with --report")
            if not (lines := latest(lines, methods, flags.get("data.n"))):
                asked = f" of n = {flags['data.n']}" if "data.n" in flags else ""
                raise ValueError(f"{out / 'rows.csv'}: nothing there to report{asked}")
            write_report(out, lines, {"command": f"`{command}`", "images": f"n = {lines[0].n}"})
        else:
            kind = PhotoSweep if config.data.whole else Sweep
            sweep = kind(config.measurable(), args.device, args.num_workers, args.precision)
    except (ValueError, OSError, RuntimeError) as error:
        parser.error(str(error))
    if not args.report:
        run(sweep, out, command, methods)
    log.info(f"{out / 'results.md'}   {out / 'rows.csv'}")


if __name__ == "__main__":
    run_script(main)
