"""The tables of README, docs/results.md and the model cards against the rows.csv of the sweeps that they come from.

A table counts where its first header cell is a figure and its other header cells are families of holes; each first cell
is the name of a method of docs/sweeps/main.
"""

import re
from pathlib import Path

import pytest

from evaluation.report import FIGURES, Line, read_lines, spread

ROOT = Path(__file__).parents[1]
MAIN = read_lines(ROOT / "docs" / "sweeps" / "main" / "rows.csv")
FAMILIES = ("walk", "thick", "box", "half")
NAMES = {
    "FD-VGG16": "fd_vgg16",
    "FD-VGG16 of the raw decoder output": "raw_fd_vgg16",
    "hole PSNR in dB": "psnr",
    "LPIPS (AlexNet, whole image)": "lpips",
    "KID": "kid",
    "hole SSIM": "ssim",
}


def text_of(lines: list[Line], method: str, family: str, figure: str) -> str:
    value = spread([line for line in lines if (line.method, line.family) == (method, family)], figure)
    assert value is not None, f"no {figure} of {method} on {family}"
    digits = FIGURES[figure.removeprefix("raw_")].digits
    return f"{value.mean:.{digits}f}" + (f" ± {value.sd:.{digits}f}" if value.n > 1 else "")


def tables(text: str) -> list[tuple[str, list[str], dict[str, list[str]]]]:
    """(figure, families, method -> cells) of the Markdown tables that count."""
    found = []
    for block in re.findall(r"(?:^\|.*\n?)+", text, flags=re.MULTILINE):
        head, _, *body = [[cell.strip(" *≈") for cell in line.strip("|").split("|")] for line in block.splitlines()]
        if head[0] in NAMES and set(head[1:]) <= {*FAMILIES}:
            found.append((NAMES[head[0]], head[1:], {row[0]: row[1:] for row in body}))
    return found


def differences(text: str) -> list[str]:
    return [
        f"{method}, {family}: {cell}, measured {measured}"
        for figure, families, rows in tables(text)
        for method, cells in rows.items()
        for family, cell in zip(families, cells, strict=True)
        if cell != (measured := text_of(MAIN, method, family, figure))
    ]


@pytest.mark.parametrize(("path", "least"), [("README.md", 1), ("docs/results.md", 3)])
def test_tables_say_what_was_measured(path, least):
    text = (ROOT / path).read_text(encoding="utf-8")
    assert len(tables(text)) >= least and not differences(text)


def test_a_changed_number_is_found():
    right = "| KID | box |\n| --- | --- |\n| ours | 0.370 ± 0.014 |\n"
    assert not differences(right)
    assert differences(right.replace("0.370", "0.371")) and differences(right.replace("0.014", "0.015"))


def test_the_card_of_cats64_says_what_was_measured():
    """A line a family: FD-VGG16, hole PSNR and LPIPS of ours, and in brackets the best classical method each."""
    card = (ROOT / "pretrained" / "cats64" / "README.md").read_text(encoding="utf-8")
    lines = [line for line in card.splitlines() if line.startswith("| inpainting, ")]
    assert len(lines) == len(FAMILIES)
    classical = {line.method for line in MAIN if line.settings["kind"] in ("telea", "navier_stokes", "biharmonic")}
    for family, line in zip(FAMILIES, lines, strict=True):
        ours = [text_of(MAIN, "ours", family, figure) for figure in ("fd_vgg16", "psnr", "lpips")]
        best = [
            choose((text_of(MAIN, method, family, figure) for method in classical), key=float)
            for figure, choose in (("fd_vgg16", min), ("psnr", max), ("lpips", min))
        ]
        assert line.split("|")[2].strip() == f"{ours[0]}, {ours[1]} dB, {ours[2]} ({', '.join(best)})"
