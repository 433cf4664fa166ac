"""Compares ways to fill holes, on the same images and holes: every method x family of holes x decoding seed.

    python sweep.py --config configs/sweeps/main.yml
    python sweep.py --config configs/sweeps/main.yml --n 32 --rows "OpenCV Telea" ours --data.generated "[box]"

Writes rows.csv (all figures, a line for each), results.md, plots and what each method makes of a cat into --out. What
is in rows.csv already, of the same images, holes, weights and settings, is not computed again: start a sweep that was
stopped once more.
Figures: FD-VGG16 (not the FID), KID, LPIPS (AlexNet), and PSNR, SSIM, L1 in the hole; see evaluation/evaluator.py.
"""

import argparse
import hashlib
import importlib.metadata
import json
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pydantic
import torch
from pydantic import Field
from torch import Tensor
from tqdm import tqdm

from config import add_flag, load_config, parse_overrides
from evaluation.evaluator import Evaluator, digest
from evaluation.figures import VERSION
from evaluation.methods import Method, arithmetic, complete, leak, needs_seed, settings_of
from evaluation.metrics import code_usage
from evaluation.report import WHOLE, Line, add_line, chosen, latest, read_lines, write_report
from maskgit.data import list_images, write_image
from maskgit.dataset import read_holes
from maskgit.folders import chelsea, read_truth
from maskgit.masks import FAMILIES, make_holes
from maskgit.visualize import Strip, contact_sheet
from models.settings import Settings
from utils import ROOT, log, machine, pick_device, start_logging

Seed = Annotated[int, Field(ge=0)]
SAME = ("psnr", "l1", "sharpness")  # of the hole, where composited and raw pictures are the same


class SweepDataConfig(Settings):
    truth: str = Field(description="true images: a folder, an .npz or a .csv")
    n: int = Field(0, ge=0, description="the first n of them; 0: all")
    masks: dict[str, str] = Field({}, description="families of holes by name: folders of masks, one an image")
    generated: Annotated[tuple[str, ...], Field(strict=False)] = Field((), description="families of maskgit/masks.py")
    hole_seed: int = Field(1, ge=0, description="of the generated families")

    @pydantic.field_validator("generated")
    @classmethod
    def _known(cls, names: tuple[str, ...]):
        if unknown := set(names) - set(FAMILIES):
            raise ValueError(f"unknown family {', '.join(unknown)}, expected some of {', '.join(FAMILIES)}")
        return names

    @pydantic.model_validator(mode="after")
    def _one_name_each(self):
        if not (self.masks or self.generated):
            raise ValueError("no holes: expected masks or generated families")
        if twice := {WHOLE, *self.generated} & set(self.masks):
            raise ValueError(f"masks {', '.join(twice)}: taken, expected another name")
        return self


class EvaluatorConfig(Settings):
    feature_weights: str | None = Field(
        None, description="file of VGG16 features, for FD-VGG16 and KID; null: torchvision downloads them"
    )
    lpips_weights: str | None = Field(None, description="file of AlexNet features; null: torchvision downloads them")


class SweepConfig(Settings):
    """What to compare, on what."""

    data: SweepDataConfig
    evaluator: EvaluatorConfig = EvaluatorConfig()
    seeds: Annotated[tuple[Seed, ...], Field(strict=False, min_length=1)] = (0, 1, 2, 3, 4)
    rows: Annotated[tuple[Method, ...], Field(strict=False, min_length=1)] = Field(description="the methods to compare")

    @pydantic.model_validator(mode="before")
    @classmethod
    def _judge_is_the_evaluator(cls, values):
        """`judge` is what configs called it before."""
        if isinstance(values, dict) and "judge" in values:
            values = dict(values)
            values["evaluator"] = values.pop("judge") | values.get("evaluator", {})
        return values

    @pydantic.field_validator("rows")
    @classmethod
    def _one_name_each(cls, methods: tuple[Method, ...]):
        names = [method.name for method in methods]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"two methods are called {', '.join(twice)}")
        return methods

    def only(self, names: list[str] | None) -> "SweepConfig":
        """With the methods `names` alone. Raises ValueError listing the known ones."""
        known = [method.name for method in self.rows]
        if unknown := set(names or ()) - set(known):
            raise ValueError(f"--rows {', '.join(unknown)}: expected some of {', '.join(map(repr, known))}")
        methods = tuple(method for method in self.rows if not names or method.name in names)
        return self.model_copy(update={"rows": methods})

    def measurable(self) -> "SweepConfig":
        """Without the methods whose weights are missing; the log says which, and how to make them.

        Raises ValueError where none is left.
        """
        for method in self.rows:
            if method.missing:
                how = f"; {method.made_by} makes it" if method.made_by else ""
                log.info(f"skipped: {method.name}: no {method.missing[0]}{how}")
        methods = tuple(method for method in self.rows if not method.missing)
        if not methods:
            raise ValueError("no method is left to measure")
        return self.model_copy(update={"rows": methods})


# --- what is compared -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Entry:
    """One line to be: a method on a family of holes with a decoding seed, or None where the result needs none."""

    method: Method
    family: str
    hole: Tensor  # (N, 1, H, W) bool
    seed: int | None
    settings: dict  # what the result depends on, beside images, hole and seed
    key: str

    @property
    def place(self) -> tuple[str, str]:
        """Its line in rows.csv."""
        return self.method.name, self.key


class Sweep:
    """The images, the holes, the evaluator and the networks of all methods.

    Raises ValueError, FileNotFoundError or RuntimeError (weights that cannot be downloaded) at once.
    """

    def __init__(self, config: SweepConfig, device: str, workers: int, precision: str = "auto"):
        self.config, self.workers = config, workers
        data = config.data
        self.truth = read_truth(data.truth)
        holes = {name: self._read(folder) for name, folder in data.masks.items()}
        size, n = self.truth.shape[-1], data.n or len(self.truth)
        if not 2 <= n <= len(self.truth):
            raise ValueError(f"data.n {n}: expected 2 to {len(self.truth)}, the images in {data.truth}")
        holes |= {name: make_holes(name, len(self.truth), size, data.hole_seed) for name in data.generated}
        self.truth, self.holes = self.truth[:n], {name: hole[:n] for name, hole in holes.items()}
        self.holes[WHOLE] = torch.ones_like(self.truth[:, :1], dtype=torch.bool)
        needed = {method.files: method for method in config.rows}  # methods of the same files share their networks
        opened = {files: method.open(device, precision) for files, method in needed.items()}
        self.networks = {method.name: opened[method.files] for method in config.rows}
        for method in config.rows:
            if (codec := self.networks[method.name]) and self.truth.shape[2:] != (codec.size, codec.size):
                found = "x".join(map(str, self.truth.shape[2:]))
                raise ValueError(
                    f"{data.truth}: {found} pixels, but method {method.name} takes {codec.size}x{codec.size}"
                )
        self.device, self.precision = pick_device(device), precision
        weights = config.evaluator
        self.evaluator = Evaluator(self.truth, weights.feature_weights, weights.lpips_weights, self.device)

    def _read(self, folder: str) -> Tensor:
        hole = read_holes(list_images(folder))
        if hole.shape != (len(self.truth), 1, *self.truth.shape[2:]):
            raise ValueError(f"{folder}: masks {tuple(hole.shape)} for images {tuple(self.truth.shape)}")
        if not (some := hole.flatten(1).any(dim=1)).all():
            raise ValueError(f"{folder}: mask {int((~some).nonzero()[0])} has no hole, every image needs one")
        return hole

    def entries(self) -> list[Entry]:
        """Family by family, all that is to be compared."""
        settings = {method.name: settings_of(method, self.networks[method.name]) for method in self.config.rows}
        entries = []
        for family, hole in self.holes.items():
            place = self.evaluator.identity | {"hole": digest(hole), "figures": VERSION}
            if self.device.type != "cpu":  # where the evaluator's networks run; keys of lines from a CPU never named it
                place["evaluated on"] = self.device.type
            for method in self.config.rows:
                if family == WHOLE and method.kind != "vq_reconstruction":
                    continue
                own = settings[method.name]
                for seed in self.config.seeds if needs_seed(method, self.networks[method.name]) else (None,):
                    entries.append(Entry(method, family, hole, seed, own, key_of(own, place, seed)))
        return entries

    def measure(self, entry: Entry) -> Line:
        """Fills the holes and evaluates the result."""
        method, hole, networks = entry.method, entry.hole, self.networks[entry.method.name]
        start = time.perf_counter()
        filled = complete(method, networks, self.truth, hole, entry.seed, self.workers)
        figures = {"seconds": (time.perf_counter() - start) / len(hole)}
        found = self.evaluator(filled.images, hole)
        figures |= found.means() | found.by_hole_size(hole)
        if entry.family == WHOLE:
            figures["code_usage"] = code_usage(filled.tokens, networks.vqgan.config.codebook.codes)
        elif filled.raw is not None:
            means = self.evaluator(filled.raw, hole).means()
            figures |= {f"raw_{name}": value for name, value in means.items() if name not in SAME}
            if method.kind == "vq_reconstruction":
                figures |= leak(networks, filled.tokens, self.truth, hole)
        return Line(method.name, entry.family, entry.seed, len(hole), entry.key, figures, entry.settings)


def key_of(settings: dict, place: dict[str, str], seed: int | None) -> str:
    """A hash of all that the figures of a line depend on: method, images, holes, features, seed."""
    return hashlib.sha256(json.dumps([settings, place, seed], sort_keys=True).encode()).hexdigest()[:16]


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
    """What each method makes of a crop of scikit-image's cat, a strip for each family of maskgit/masks.py."""
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
    add_flag(parser, "--num-workers", type=int, default=2, help="processes of the classical methods (default: 2)")
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
        out = args.out or Path("results") / "sweeps" / args.config.stem
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
            sweep = Sweep(config.measurable(), args.device, args.num_workers, args.precision)
    except (ValueError, OSError, RuntimeError) as error:
        parser.error(str(error))
    if not args.report:
        run(sweep, out, command, methods)
    log.info(f"{out / 'results.md'}   {out / 'rows.csv'}")


if __name__ == "__main__":
    main()
