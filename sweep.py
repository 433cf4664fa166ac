"""Compares ways to fill holes, on the same images and holes: every row x family of holes x decoding seed.

    python sweep.py --config configs/sweeps/main.yml
    python sweep.py --config configs/sweeps/main.yml --n 32 --rows "OpenCV Telea" ours --data.generated "[box]"

Writes rows.csv (all figures, a line for each), results.md, plots and the rows' pictures of a cat into --out. What is
in rows.csv already, of the same images, holes, weights and settings, is not computed again: start a sweep that was
stopped once more.
Figures: FD-VGG16 (not the FID), KID, LPIPS (AlexNet), and PSNR, SSIM, L1 in the hole; see judge.py.
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
from evaluation.evaluator import Judge, digest
from evaluation.methods import Row, fill, leak, needs_seed, settings_of
from evaluation.metrics import code_usage
from evaluation.report import WHOLE, Line, chosen, read_lines, write_lines, write_report
from maskgit.data import list_images, read_holes, write_image
from maskgit.folders import chelsea, read_truth
from maskgit.masks import FAMILIES, make_holes
from maskgit.visualize import Row as Strip
from maskgit.visualize import contact_sheet
from models.settings import Settings
from utils import ROOT, log, machine, pick_device, start_logging

Seed = Annotated[int, Field(ge=0)]
SAME = ("psnr", "l1")  # of the hole, where composited and raw pictures are the same


class SweepDataConfig(Settings):
    truth: str = Field(description="true images: a folder, an .npz or a .csv")
    n: int = Field(0, ge=0, description="the first n of them; 0: all")
    masks: dict[str, str] = Field({}, description="families of holes by name: folders of masks, one an image")
    generated: Annotated[tuple[str, ...], Field(strict=False)] = Field((), description="families of masks.py")
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


class JudgeConfig(Settings):
    feature_weights: str = Field(description="file of VGG16 features, for FD-VGG16 and KID")
    lpips_weights: str | None = Field(None, description="file of AlexNet features; null: torchvision downloads them")


class SweepConfig(Settings):
    """What to compare, on what."""

    data: SweepDataConfig
    judge: JudgeConfig
    seeds: Annotated[tuple[Seed, ...], Field(strict=False, min_length=1)] = (0, 1, 2, 3, 4)
    rows: Annotated[tuple[Row, ...], Field(strict=False, min_length=1)]

    @pydantic.field_validator("rows")
    @classmethod
    def _one_name_each(cls, rows: tuple[Row, ...]):
        names = [row.name for row in rows]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"two rows are called {', '.join(twice)}")
        return rows

    def only(self, names: list[str] | None) -> "SweepConfig":
        """With the rows `names` alone. Raises ValueError listing the known ones."""
        known = [row.name for row in self.rows]
        if unknown := set(names or ()) - set(known):
            raise ValueError(f"--rows {', '.join(unknown)}: expected some of {', '.join(known)}")
        return self.model_copy(update={"rows": tuple(row for row in self.rows if not names or row.name in names)})


# --- what is compared -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Entry:
    """One line to be: a row on a family of holes with a decoding seed, or None where the result needs none."""

    row: Row
    family: str
    hole: Tensor  # (N, 1, H, W) bool
    seed: int | None
    settings: dict  # what the result depends on, beside images, hole and seed
    key: str


class Sweep:
    """The images, the holes, the judge and the networks of all rows. Raises ValueError, FileNotFoundError at once."""

    def __init__(self, config: SweepConfig, device: str, workers: int):
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
        opened = {row.files: row.open(device) for row in {row.files: row for row in config.rows}.values()}
        self.networks = {row.name: opened[row.files] for row in config.rows}
        for row in config.rows:
            if (codec := self.networks[row.name]) and self.truth.shape[2:] != (codec.size, codec.size):
                found = "x".join(map(str, self.truth.shape[2:]))
                raise ValueError(f"{data.truth}: {found} pixels, but row {row.name} takes {codec.size}x{codec.size}")
        self.device = pick_device(device)
        self.judge = Judge(self.truth, config.judge.feature_weights, config.judge.lpips_weights, self.device)

    def _read(self, folder: str) -> Tensor:
        hole = read_holes(list_images(folder))
        if hole.shape != (len(self.truth), 1, *self.truth.shape[2:]):
            raise ValueError(f"{folder}: masks {tuple(hole.shape)} for images {tuple(self.truth.shape)}")
        if not (some := hole.flatten(1).any(dim=1)).all():
            raise ValueError(f"{folder}: mask {int((~some).nonzero()[0])} has no hole, every image needs one")
        return hole

    def entries(self) -> list[Entry]:
        """Family by family, all that is to be compared."""
        settings = {row.name: settings_of(row, self.networks[row.name]) for row in self.config.rows}
        entries = []
        for family, hole in self.holes.items():
            place = self.judge.identity | {"hole": digest(hole)}
            for row in self.config.rows:
                if family == WHOLE and row.kind != "floor":
                    continue
                for seed in self.config.seeds if needs_seed(row, self.networks[row.name]) else (None,):
                    told = json.dumps([settings[row.name], place, seed], sort_keys=True)
                    key = hashlib.sha256(told.encode()).hexdigest()[:16]
                    entries.append(Entry(row, family, hole, seed, settings[row.name], key))
        return entries

    def measure(self, entry: Entry) -> Line:
        """Fills the holes and judges the result."""
        row, hole, networks = entry.row, entry.hole, self.networks[entry.row.name]
        start = time.perf_counter()
        filled = fill(row, networks, self.truth, hole, entry.seed, self.workers)
        figures = {"seconds": (time.perf_counter() - start) / len(hole)}
        judged = self.judge(filled.images, hole)
        figures |= judged.means() | judged.by_hole_size(hole)
        if entry.family == WHOLE:
            figures["code_usage"] = code_usage(filled.tokens, networks.vqgan.config.codebook.codes)
        elif filled.raw is not None:
            means = self.judge(filled.raw, hole).means()
            figures |= {f"raw_{name}": value for name, value in means.items() if name not in SAME}
            if row.kind == "floor":
                figures |= leak(networks, filled.tokens, self.truth, hole)
        return Line(row.name, entry.family, entry.seed, len(hole), entry.key, figures, entry.settings)


# --- the command line -------------------------------------------------------------------------------------------------


def run(sweep: Sweep, out: Path, command: str, measure: bool = True) -> list[Line]:
    """Measures what rows.csv in `out` lacks, writing it after every entry and the report after every family.

    With `measure` false it reports what is there, no more.
    """
    entries, path = sweep.entries(), out / "rows.csv"
    wanted = [(entry.row.name, entry.key) for entry in entries]
    done = {(line.row, line.key) for line in read_lines(path)}
    todo = [entry for entry, place in zip(entries, wanted, strict=True) if place not in done]
    log.info(f"{len(entries)} entries of {len(sweep.truth)} images, {len(entries) - len(todo)} of them in {path}")
    about = describe(sweep, command)
    if not measure:
        todo = []
    for number, entry in enumerate(tqdm(todo, desc="sweep", unit="entry"), start=1):
        line = sweep.measure(entry)
        write_lines(path, [*read_lines(path), line])  # read anew: another process may have written there
        if number == len(todo) or todo[number].family != entry.family:
            write_report(out, chosen(read_lines(path), wanted), about)
    lines = chosen(read_lines(path), wanted)
    if not todo:
        write_report(out, lines, about)
    if cats := strips(sweep):
        write_image(out / "chelsea.png", contact_sheet(cats))
    return lines


def strips(sweep: Sweep) -> list[Strip]:
    """What each row makes of a crop of scikit-image's cat, a strip for each of the families that is in masks.py."""
    cat, lines, rows = chelsea(sweep.truth.shape[-1]), [], sweep.config.rows
    for family in dict.fromkeys(group for group in cat.groups if group in sweep.holes):
        first = slice(cat.groups.index(family), cat.groups.index(family) + 1)
        truth, hole = cat.truth[first], cat.hole[first]
        filled = [fill(row, sweep.networks[row.name], truth, hole, sweep.config.seeds[0], 0).images for row in rows]
        lines.append(Strip(family, ["truth", *(row.name for row in rows)], torch.cat([truth, *filled])))
    return lines


def describe(sweep: Sweep, command: str) -> dict[str, object]:
    """What the figures depend on, for results.md."""
    packages = ("numpy", "scikit-image", "opencv-python-headless", "lpips")
    return {
        "command": f"`{command}`",
        "images": f"{sweep.config.data.truth}, n = {len(sweep.truth)}",
        "machine": ", ".join(f"{key} {value}" for key, value in machine(sweep.device).items() if value),
        "versions": ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages),
        "hashes of the judge (SHA-256)": ", ".join(f"{key} {value}" for key, value in sweep.judge.identity.items()),
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
    parser.add_argument("--rows", nargs="+", metavar="NAME", help="these rows of the config alone")
    parser.add_argument("--seeds", type=int, nargs="+", metavar="S", help="decoding seeds: overrides seeds")
    parser.add_argument("--n", type=int, dest="data.n", metavar="N", help="the first N images: overrides data.n")
    for key in ("feature_weights", "lpips_weights"):
        flag = f"--{key.replace('_', '-')}"
        add_flag(parser, flag, dest=f"judge.{key}", metavar="FILE", help=f"overrides judge.{key}")
    parser.add_argument("--report", action="store_true", help="measure nothing, report what rows.csv has")
    add_flag(parser, "--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: auto)")
    add_flag(parser, "--num-workers", type=int, default=2, help="processes of the classical methods (default: 2)")
    return parser


def main(argv: list[str] | None = None) -> None:
    """The command line; see --help."""
    start_logging()
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    flags = {key: value for key, value in vars(args).items() if value is not None and ("." in key or key == "seeds")}
    try:
        config = load_config(args.config, flags | parse_overrides(rest), SweepConfig).only(args.rows)
        sweep = Sweep(config, args.device, args.num_workers)
        out = args.out or Path("results") / "sweeps" / args.config.stem
        read_lines(out / "rows.csv")
    except (ValueError, OSError, RuntimeError) as error:
        parser.error(str(error))
    command = shlex.join(["python", "sweep.py", *(sys.argv[1:] if argv is None else argv)])
    run(sweep, out, command, measure=not args.report)
    log.info(f"{out / 'results.md'}   {out / 'rows.csv'}")


if __name__ == "__main__":
    main()
