"""The tables of README, docs/results.md and the model cards against the measured figures that they come from.

Sweeps leave docs/sweeps/NAME/rows.csv; single trainings are in docs/trainings.csv. A comment above a table names its
sweeps, and what all of its cells have in common: <!-- decoding, box -->; without one it is of the sweep `main`. Labels
of the corner, the row and the column together name a method, a family of holes and a figure.
"""

import csv
import re
from pathlib import Path

import pytest

from evaluation.report import FIGURES, Line, read_lines, spread
from maskgit.classical import METHODS

ROOT = Path(__file__).parents[1]
SWEEPS = {path.parent.name: read_lines(path) for path in sorted((ROOT / "docs" / "sweeps").glob("*/rows.csv"))}
FAMILIES = ("walk", "thick", "box", "half")
NAMES = {
    "FD-VGG16": "fd_vgg16",
    "FD-VGG16 of the raw decoder output": "raw_fd_vgg16",
    "hole PSNR in dB": "psnr",
    "PSNR dB": "psnr",
    "LPIPS (AlexNet, whole image)": "lpips",
    "LPIPS": "lpips",
    "KID": "kid",
    "hole SSIM": "ssim",
    "all": "leak",
} | {f"{ring} away": f"leak {ring}" for ring in range(1, 5)}
TRAININGS = {
    (row["name"], row["figure"]): row["value"]
    for row in csv.DictReader((ROOT / "docs" / "trainings.csv").read_text(encoding="utf-8").splitlines())
}


def text_of(lines: list[Line], method: str, family: str, figure: str) -> str:
    value = spread([line for line in lines if (line.method, line.family) == (method, family)], figure)
    assert value is not None, f"no {figure} of {method} on {family}"
    digits = FIGURES[figure.removeprefix("raw_").split()[0]].digits
    return f"{value.mean:.{digits}f}" + (f" ± {value.sd:.{digits}f}" if value.n > 1 else "")


def parts(label: str, methods: set[str]) -> dict[str, str]:
    """What a label names: a method, a family or a figure, or two of them with `: ` or `, ` between."""
    if label in methods:
        return {"method": label}
    if label in NAMES:
        return {"figure": NAMES[label]}
    if label in FAMILIES:
        return {"family": label}
    for mark in (": ", ", "):
        first, found, second = label.partition(mark)
        if found and (one := parts(first, methods)) and (other := parts(second, methods)):
            return one | other
    return {}


def tables(text: str) -> list[tuple[list[str], str, list[list[str]]]]:
    """(sweeps, what all cells have in common, rows of cells) of every Markdown table, its ruler left out."""
    found = []
    for comment, block in re.findall(r"(?:<!-- ([^\n]*) -->\n\n)?((?:^\|.*\n?)+)", text, flags=re.MULTILINE):
        names, _, common = (comment or "main").partition(", ")
        cells = [[cell.strip(" *≈") for cell in line.strip("|").split("|")] for line in block.splitlines()]
        found.append((names.split(), common, [row for row in cells if not set(row[-1]) <= {"-"} or not row[-1]]))
    return found


def compared(text: str) -> list[tuple[str, str, str]]:
    """(where, cell, measured) of every cell that names a method, a family and a figure."""
    found = []
    for names, common, (head, *body) in tables(text):
        if names == ["trainings"]:
            for row in body:
                cells = zip(head[2:], row[2:], strict=True)
                found += [
                    (f"{row[0]}, {name}", cell.removesuffix(" %"), TRAININGS[row[0], name]) for name, cell in cells
                ]
            continue
        lines = [line for name in names for line in SWEEPS[name]]
        methods, figure = {line.method for line in lines}, {}
        for column, label in enumerate(head[1:], start=1):
            above = parts(label, methods)
            figure = {"figure": above["figure"]} if "figure" in above else figure
            for row in body:
                place = figure | parts(common, methods) | parts(head[0], methods) | parts(row[0], methods) | above
                if place.keys() == {"method", "family", "figure"}:
                    found.append((f"{row[0]}, {label}", row[column], text_of(lines, **place)))
    return found


def differences(text: str) -> list[str]:
    return [f"{where}: {cell}, measured {measured}" for where, cell, measured in compared(text) if cell != measured]


@pytest.mark.parametrize(("path", "least"), [("README.md", 24), ("docs/results.md", 600)])
def test_tables_say_what_was_measured(path, least):
    text = (ROOT / path).read_text(encoding="utf-8")
    assert len(compared(text)) >= least and not differences(text)


def short(value: float) -> str:
    """Three digits, or four below .1, without the nought."""
    return f"{value:.{3 if value >= 0.1 else 4}f}".removeprefix("0")


@pytest.mark.parametrize(("path", "least"), [("README.md", 16), ("docs/photographs.md", 31)])
def test_tables_of_photographs_say_what_was_measured(path, least):
    """Cells of LPIPS in and near the hole / hole PSNR in dB."""
    found = []
    for _, _, (head, *body) in tables((ROOT / path).read_text(encoding="utf-8")):
        for row in body if "scratches" in head else []:
            for family, cell in zip(head[1:], row[1:], strict=True):
                own = [line for line in SWEEPS["photos"] if (line.method, line.family) == (row[0], family)]
                if " / " in cell:
                    lpips, psnr = (spread(own, name).mean for name in ("lpips_near", "psnr"))
                    found.append(cell.replace("*", "") == f"{short(lpips)} / {psnr:.2f}")
    assert len(found) >= least and all(found)


def test_no_table_of_the_results_is_left_out():
    """But those that name the changes of a training."""
    for names, common, rows in tables((ROOT / "docs" / "results.md").read_text(encoding="utf-8")):
        text = f"<!-- {' '.join(names)}, {common} -->\n\n" if common else f"<!-- {' '.join(names)} -->\n\n"
        text += "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"
        cells = sum(len(row) - 1 for row in rows[1:])
        assert len(compared(text)) >= cells * 0.8 or rows[0] == ["NAME", "CHANGES"], rows[0]


def test_a_changed_number_is_found():
    right = "| KID | box |\n| --- | --- |\n| ours | 0.370 ± 0.014 |\n"
    assert not differences(right) and len(compared(right)) == 1
    assert differences(right.replace("0.370", "0.371")) and differences(right.replace("0.014", "0.015"))


def one_line_each(lines: list[Line]) -> list[Line]:
    """The same without what another sweep has measured too."""
    return list({(line.method, line.family): line for line in lines}.values())


def test_the_card_of_cats64_says_what_was_measured():
    """A line a family: FD-VGG16, hole PSNR and LPIPS of ours, and in brackets the best classical method each."""
    card, cats, main = (
        (ROOT / "pretrained/cats64/README.md").read_text(encoding="utf-8"),
        SWEEPS["cats64"],
        SWEEPS["main"],
    )
    lines = [line for line in card.splitlines() if line.startswith("| inpainting, ")]
    assert len(lines) == len(FAMILIES)
    classical = [line for line in (*main, *cats) if line.settings["kind"] in METHODS]
    methods = {family: {line.method for line in classical if line.family == family} for family in FAMILIES}
    for family, line in zip(FAMILIES, lines, strict=True):
        ours = [text_of(cats, "ours", family, figure) for figure in ("fd_vgg16", "psnr", "lpips")]
        best = [
            choose((text_of(one_line_each(classical), method, family, figure) for method in methods[family]), key=float)
            for figure, choose in (("fd_vgg16", min), ("psnr", max), ("lpips", min))
        ]
        assert line.split("|")[2].strip() == f"{ours[0]}, {ours[1]} dB, {ours[2]} ({', '.join(best)})"
    whole = [text_of(cats, "true tokens decoded", "whole", figure) for figure in ("psnr", "lpips", "fd_vgg16")]
    assert f"{whole[0]} dB, {whole[1]}, {whole[2]} |" in card
