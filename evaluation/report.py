"""What a sweep leaves behind: rows.csv, results.md and plots.

A `Line` is one method on one family of holes with one decoding seed. Tables and plots give mean and sample sd of seeds.
"""

import csv
import json
import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from evaluation.evaluator import BINNED
from evaluation.figures import FIGURES, RAW, Figure
from evaluation.methods import FORMER_KINDS
from files import locked, replace_file, write_text
from maskgit.decoding_config import AUTO
from utils import log

OF_VQGAN = ("psnr", "lpips", "ssim", "fd_vgg16", "kid", "code_usage")
WHOLE = "whole"  # the family of holes in which everything is missing: how well a VQGAN does on whole images
NO_RIVALS = ("masked", "vq_reconstruction")  # kinds that are never the best: they fill nothing, or know the truth
FIRST = ("method", "family", "seed", "n", "key")  # columns of rows.csv, before the figures and `settings`


@dataclass(frozen=True)
class Line:
    method: str
    family: str
    seed: int | None  # None: the result needs none
    n: int  # images
    key: str  # a hash of all that the figures depend on
    figures: dict[str, float]
    settings: dict


def read_lines(path: Path) -> list[Line]:
    """The lines of a rows.csv, none where there is no such file. Raises ValueError naming the file."""
    if not Path(path).is_file():
        return []
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: not a .csv file ({error})") from error
    lines = []
    for number, values in enumerate(rows, start=2):
        try:
            values |= {"method": values.pop("row")} if "row" in values else {}  # as the column was called before
            method, family, seed, n, key = (values.pop(name) for name in FIRST)
            settings = json.loads(values.pop("settings"))
            settings["kind"] = FORMER_KINDS.get(settings["kind"], settings["kind"])
            figures = {name: float(value) for name, value in values.items() if value}
            lines.append(Line(method, family, int(seed) if seed else None, int(n), key, figures, settings))
        except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path}, row {number}: not a line of a sweep ({error!r})") from error
    return lines


def add_line(path: Path, line: Line) -> None:
    """Adds a line to a rows.csv, unless it is there, replacing the file at once, one process after the other."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path.parent):
        lines = read_lines(path)
        if (line.method, line.key) not in {(other.method, other.key) for other in lines}:
            write_lines(path, [*lines, line])


def write_lines(path: Path, lines: list[Line]) -> None:
    """Writes a rows.csv, replacing the one there at once."""
    names = dict.fromkeys(name for line in lines for name in line.figures)
    known = {name: place for place, name in enumerate((*FIGURES, *RAW))}
    columns = sorted(names, key=lambda name: (known.get(name, len(known)), name))

    def write(temporary: Path) -> None:
        with open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [*FIRST, *columns, "settings"], restval="")
            writer.writeheader()
            for line in lines:
                own = {name: getattr(line, name) for name in FIRST}
                writer.writerow(own | line.figures | {"settings": json.dumps(line.settings)})

    replace_file(path, write)


def chosen(lines: list[Line], wanted: list[tuple[str, str]]) -> list[Line]:
    """Those of `lines` whose (method, key) is `wanted`, in that order."""
    found = {(line.method, line.key): line for line in lines}
    return [found[place] for place in wanted if place in found]


def latest(lines: list[Line], methods: list[str], n: int | None = None) -> list[Line]:
    """The last line of each of the `methods` on each family with each seed, in the order of both.

    They are of `n` images, None: as many as the last line; those of a method on a family have the settings of the last
    one: another precision or other weights are another result.
    """
    lines = [line for line in lines if line.n == (n or lines[-1].n)]
    settings = {(line.method, line.family): line.settings for line in lines}
    same = [line for line in lines if line.method in methods and line.settings == settings[line.method, line.family]]
    families = list(dict.fromkeys(line.family for line in lines))
    found = {(line.method, line.family, line.seed): line for line in same}.values()
    return sorted(found, key=lambda line: (families.index(line.family), methods.index(line.method)))


# --- tables -----------------------------------------------------------------------------------------------------------


class Spread(NamedTuple):
    mean: float
    sd: float | None  # None: unknown, of one seed alone
    n: int


def spread(lines: list[Line], figure: str) -> Spread | None:
    """Mean and sample standard deviation (0 where no seed is needed) of a figure; None where no line has it."""
    values = {line.seed: line.figures[figure] for line in lines if figure in line.figures}
    if not values:
        return None
    sd = statistics.stdev(values.values()) if len(values) > 1 else 0.0 if None in values else None
    return Spread(statistics.fmean(values.values()), sd, len(values))


def cells(column: dict[str, Spread | None], figure: Figure, methods: set[str]) -> dict[str, str]:
    """The texts of a column by method: the best of `methods` bold, and ≈ where the best is no better.

    That is a difference of the means of less than 2 standard errors of it, sqrt(s1^2 / n1 + s2^2 / n2) (Welch 1947), s
    the standard deviation over n seeds; of a method with one seed alone the other's s counts.
    """
    texts = {name: _text(value, figure.digits) for name, value in column.items()}
    rivals = {name: value for name, value in column.items() if value is not None and name in methods}
    if not figure.better or len(rivals) < 2:
        return texts
    best = max(rivals, key=lambda name: figure.better * rivals[name].mean)
    for name, value in rivals.items():
        if name == best:
            texts[name] = f"**{texts[name]}**"
        elif abs(value.mean - rivals[best].mean) < 2 * standard_error(value, rivals[best]):
            texts[name] = f"≈ {texts[name]}"
    return texts


def standard_error(one: Spread, other: Spread) -> float:
    """That of the difference of two means over seeds; 0 where no spread is known."""
    known = [value.sd for value in (one, other) if value.sd is not None]
    return math.sqrt(
        sum((value.sd if value.sd is not None else max(known, default=0.0)) ** 2 / value.n for value in (one, other))
    )


def _text(value: Spread | None, digits: int) -> str:
    if value is None:
        return ""
    return f"{value.mean:.{digits}f}" + (f" ± {value.sd:.{digits}f}" if value.n > 1 else "")


def table(lines: list[Line], columns: list[tuple[str, str, list[Line]]], first: str = "") -> str:
    """Markdown with a row for each of the `lines`, and columns (label, figure, the lines that have it)."""
    rows = list(dict.fromkeys(line.method for line in lines))
    methods = {line.method for line in lines if line.settings["kind"] not in NO_RIVALS}
    labels, texts = [first], []
    for label, figure, own in columns:
        column = {row: spread([line for line in own if line.method == row], figure) for row in rows}
        if any(column.values()):
            labels.append(label)
            texts.append(cells(column, FIGURES[figure.removeprefix("raw_").split()[0]], methods))
    body = [[row, *(column[row] for column in texts)] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in (labels, ["---"] * len(labels), *body))


def bins(lines: list[Line]) -> list[str]:
    """The bins of hole sizes that occur, `10-20` and so on, in order."""
    found = {name.split()[1] for line in lines for name in line.figures if name.startswith("n ")}
    return sorted(found, key=lambda name: int(name.split("-")[0]))


def by_family(lines: list[Line]) -> dict[str, list[Line]]:
    return {
        family: [line for line in lines if line.family == family]
        for family in dict.fromkeys(line.family for line in lines)
    }


def write_report(out: Path, lines: list[Line], about: dict[str, object]) -> None:
    """results.md and plots in `out`; `about` says what the figures depend on."""
    families = by_family([line for line in lines if line.family != WHOLE])
    filled = [line for family in families.values() for line in family]
    about = about | {"decoding seeds": decoding_seeds(lines)}
    parts = [f"# {out.name}", "\n".join(f"- {key}: {value}" for key, value in about.items()), NOTE]
    if any("seam" in line.figures for line in lines):  # which the first sweeps did not measure
        parts.append(NOTE_ON_SEAMS)
    if any("fd_vgg16" in line.figures for line in filled):
        parts += ["## FD-VGG16", table(filled, [(family, "fd_vgg16", own) for family, own in families.items()])]
    parts += [part for family, own in families.items() for part in _of_family(family, own)]
    parts += [part for section in (_leaks, _by_hole_size) for item in families.items() for part in section(*item)]
    if vqgans := [line for line in lines if line.family == WHOLE]:
        columns = [(FIGURES[name].label, name, vqgans) for name in OF_VQGAN]
        parts += ["## Whole images, encoded and decoded", table(vqgans, columns)]
    told = {line.method: json.dumps(line.settings) for line in lines}
    parts += ["## Methods", "\n".join(f"- {row}: `{settings}`" for row, settings in told.items())]
    write_text(out / "results.md", "\n\n".join(parts) + "\n")
    if filled:
        draw(out, families)


def decoding_seeds(lines: list[Line]) -> str:
    """The seeds of each method that needs some, by family where these differ."""
    told = []
    for row in dict.fromkeys(line.method for line in lines if line.seed is not None):
        families = by_family([line for line in lines if line.method == row])
        seeds = {family: ", ".join(str(line.seed) for line in own) for family, own in families.items()}
        by_each = ", ".join(f"{family} {own}" for family, own in seeds.items())
        told.append(f"{row}: {by_each if len(set(seeds.values())) > 1 else seeds.popitem()[1]}")
    return "; ".join(told) or "none needed"


def _of_family(family: str, own: list[Line]) -> list[str]:
    columns = [(figure.label, name, own) for name, figure in FIGURES.items() if name not in ("code_usage", "leak")]
    parts = [f"## {family}: known pixels pasted back", table(own, columns)]
    if raw := [line for line in own if "raw_lpips" in line.figures]:
        columns = [(FIGURES[name.removeprefix("raw_")].label, name, raw) for name in RAW]
        parts += [f"### {family}: decoder output", table(raw, columns)]
    return parts


def _leaks(family: str, own: list[Line]) -> list[str]:
    leaks = [line for line in own if "leak" in line.figures]
    rings = sorted({name for line in leaks for name in line.figures if name.startswith("leak ")})
    columns = [("all", "leak", leaks), *((f"{ring.split()[1]} away", ring, leaks) for ring in rings)]
    title = f"## {family}: the share of known tokens that change when the hole is painted grey, by distance in tokens"
    return [title, table(leaks, columns)] if leaks else []


def _by_hole_size(family: str, own: list[Line]) -> list[str]:
    if len(sizes := bins(own)) < 2:
        return []
    columns = [(f"{FIGURES[name].label}, {size} %", f"{name} {size}", own) for size in sizes for name in BINNED]
    counts = [f"{own[0].figures[f'n {size}']:.0f} of {size} %" for size in sizes]
    text = f"Images by their missing pixels: {', '.join(counts)}."
    return [f"## {family} by hole size", text, table(own, columns)]


NOTE = (
    "FD-VGG16 is not the FID; lower is better, as for KID, LPIPS and L1, and higher for PSNR and SSIM. KID, of the "
    "same features, is a mean over subsets of 500, with their sd beside it; below 0 images are nearer to their own "
    "truths than other true images are. PSNR, SSIM and L1 are taken in the hole, where PSNR and L1 of the decoder's "
    "output are those of the composited picture. ± is the sample standard deviation over decoding seeds. Bold: the "
    "best of a column, masked input and true tokens aside; ≈: behind the best by less than 2 standard errors of the "
    "difference, sqrt(s1²/n1 + s2²/n2) over the seeds of both, which counts as no difference (for a method of one seed "
    "the other's s). Between two methods of one seed nothing is marked: how far seeds differ is not known."
)

NOTE_ON_SEAMS = (
    "MIND, of the same features as FD-VGG16, is their squared sliced Wasserstein-2 distance, times their number. Seam: "
    "the mean absolute error of the missing pixels within 3 of a known one, and that of their gradients. Sharpness: "
    "the mean gradient in the holes over that of the truth. LPIPS in and near the hole: its map, averaged there and 8 "
    "pixels around."
)


# --- plots ------------------------------------------------------------------------------------------------------------


def draw(out: Path, families: dict[str, list[Line]]) -> None:
    """fd.png, hole_size.png and total_iter.png in `out`, as far as the lines give them."""
    try:
        from matplotlib.figure import Figure as Canvas
    except ImportError:
        log.warning("no plots: they need matplotlib (pip install -r requirements-dev.txt)")
        return
    rows = list(dict.fromkeys(line.method for own in families.values() for line in own))
    colours, lines = [f"C{number}" for number in range(10)], ("-", "--", ":", "-.")
    styles = {row: {"color": colours[i % 10], "ls": lines[i // 10 % 4]} for i, row in enumerate(rows)}
    if any("fd_vgg16" in line.figures for own in families.values() for line in own):
        _draw_fd(Canvas, families, rows, out / "fd.png")
    sized = {family: own for family, own in families.items() if len(bins(own)) > 1}
    if sized:
        _draw_hole_size(Canvas, sized, styles, out / "hole_size.png")
    if series := by_total_iter(families):
        _draw_total_iter(Canvas, series, out / "total_iter.png")


def _draw_fd(canvas, families: dict[str, list[Line]], rows: list[str], path: Path) -> None:
    """A panel a family, a line a row: mean and standard deviation of FD-VGG16."""
    from matplotlib.ticker import LogLocator

    figure = canvas(figsize=(3 + 2.5 * len(families), 1 + 0.3 * len(rows)), layout="constrained")
    panels = figure.subplots(1, len(families), sharey=True, squeeze=False)[0]
    for panel, (family, own) in zip(panels, families.items(), strict=True):
        for place, row in enumerate(rows):
            if value := spread([line for line in own if line.method == row], "fd_vgg16"):
                panel.errorbar(value.mean, place, xerr=value.sd, fmt="o", color="C0", capsize=3)
        panel.set(title=family, xscale="log", xlabel="FD-VGG16", yticks=range(len(rows)), yticklabels=rows)
        panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.xaxis.set_major_formatter("{x:g}")
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    panels[0].invert_yaxis()
    _save_plot(figure, path)


def _save_plot(figure, path: Path) -> None:
    replace_file(path, lambda temporary: figure.savefig(temporary, dpi=120, format="png"))


def _draw_hole_size(canvas, families: dict[str, list[Line]], styles: dict[str, dict], path: Path) -> None:
    """PSNR above LPIPS, a column a family, a curve a row."""
    figure = canvas(figsize=(3 + 3.5 * len(families), 7), layout="constrained")
    panels = figure.subplots(2, len(families), squeeze=False)
    for column, (family, own) in enumerate(families.items()):
        sizes = bins(own)
        for panel, name in zip(panels[:, column], ("psnr", "lpips"), strict=True):
            for row, style in styles.items():
                values = [spread([line for line in own if line.method == row], f"{name} {size}") for size in sizes]
                if all(values):
                    panel.errorbar(sizes, [value.mean for value in values], [value.sd or 0.0 for value in values],
                                   **style, label=row, marker="o", capsize=3)  # fmt: skip
            panel.set(title=family, ylabel=FIGURES[name].label, xlabel="missing pixels, %")
            panel.grid(alpha=0.3)
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside right upper")
    _save_plot(figure, path)


def by_total_iter(families: dict[str, list[Line]]) -> dict[str, dict[str, dict[int, Spread]]]:
    """family -> name of the first row -> total_iter -> FD-VGG16, of rows that differ in total_iter only."""
    found: dict[str, dict[str, dict[int, Spread]]] = {}
    for family, own in families.items():
        groups: dict[str, dict[int, list[Line]]] = {}
        for line in own:
            decoding = dict(line.settings.get("decoding", {}))
            steps, stop = (decoding.pop(name, None) for name in ("total_iter", "sweet_spot"))
            if steps and steps != AUTO and stop in (steps, None) and "fd_vgg16" in line.figures:
                rest = json.dumps(line.settings | {"decoding": decoding}, sort_keys=True)
                groups.setdefault(rest, {}).setdefault(steps, []).append(line)
        series = {
            next(iter(group.values()))[0].method: {t: spread(group[t], "fd_vgg16") for t in sorted(group)}
            for group in groups.values()
            if len(group) > 1
        }
        if series:
            found[family] = series
    return found


def _draw_total_iter(canvas, series: dict[str, dict[str, dict[int, Spread]]], path: Path) -> None:
    """FD-VGG16 against T, a panel a family."""
    figure = canvas(figsize=(1 + 3.5 * len(series), 4), layout="constrained")
    panels = figure.subplots(1, len(series), squeeze=False)[0]
    for panel, (family, curves) in zip(panels, series.items(), strict=True):
        for name, curve in curves.items():
            means, sds = zip(*((value.mean, value.sd or 0.0) for value in curve.values()), strict=True)
            panel.errorbar(list(curve), means, sds, marker="o", capsize=3, label=f"{name}, ...")
        steps = sorted({t for curve in curves.values() for t in curve})
        panel.set(title=family, xscale="log", xlabel="T", ylabel="FD-VGG16", xticks=steps, xticklabels=steps)
        panel.minorticks_off()
        panel.grid(alpha=0.3)
        panel.legend()
    _save_plot(figure, path)
