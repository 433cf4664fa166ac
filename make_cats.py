"""Makes the folder that configs/cats64.yml reads out of a public set: the heads of the cats of Oxford-IIIT Pet.

    python make_cats.py --out data/cats64

Oxford-IIIT Pet (Parkhi et al. 2012, https://www.robots.ox.ac.uk/~vgg/data/pets/, CC BY-SA 4.0) has a box around the
head in about half of its photographs, some 1,200 of them of cats; torchvision downloads 800 MB. Every tenth goes to
val/, the others to train/. The pictures of val/ also become the lab's test: test_gt/, mask64/ (random walks, 0 = hole)
and masked_image/ (the hole painted grey).
"""

if __name__ == "__main__":
    import interrupts

    interrupts.in_one_line()

import argparse
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.error import URLError

import numpy as np
from PIL import Image
from torchvision.datasets import OxfordIIITPet
from tqdm import tqdm

from interrupts import run_script
from maskgit.data import GREY, open_upright, write_image
from maskgit.masks import make_holes
from utils import check_folder

AROUND = 1.25  # side of a crop / longer side of the box around the head
VAL_EVERY = 10
BY_HAND = (
    "fetch images.tar.gz and annotations.tar.gz from https://www.robots.ox.ac.uk/~vgg/data/pets/ and unpack both in"
)


class Head(NamedTuple):
    """A cat's head in a photograph: left, top, right, bottom in pixels."""

    photograph: Path
    box: tuple[int, int, int, int]


def heads(folder: Path) -> Iterator[Head]:
    """The cats' heads that Oxford-IIIT Pet's `folder` tells of, by name. Raises ValueError naming a malformed file."""
    for file in sorted((folder / "annotations" / "xmls").glob("*.xml")):
        try:
            thing = ElementTree.parse(file).find("object")
            if thing.findtext("name") == "cat":
                box = tuple(int(thing.findtext(f"bndbox/{side}")) for side in ("xmin", "ymin", "xmax", "ymax"))
                yield Head(folder / "images" / f"{file.stem}.jpg", box)
        except (ElementTree.ParseError, AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"{file}: expected one object with a name and a box ({error})") from error


def crop(head: Head, size: int) -> Image.Image:
    """The square around a head, inside the photograph, at `size` pixels (Lanczos)."""
    picture = open_upright(head.photograph).convert("RGB")
    left, top, right, bottom = head.box
    side = min(round(AROUND * max(right - left, bottom - top)), *picture.size)
    x, y = (
        min(max((low + high - side) // 2, 0), length - side)
        for low, high, length in zip((left, top), (right, bottom), picture.size, strict=True)
    )
    return picture.crop((x, y, x + side, y + side)).resize((size, size), Image.Resampling.LANCZOS)


def write_dataset(found: list[Head], out: Path, size: int) -> tuple[int, int]:
    """Writes train/, val/ and the test of val/ into `out`; the numbers of pictures in train/ and val/."""
    counts = {"train": 0, "val": 0}
    held_back = []
    for number, head in enumerate(tqdm(found, "cats", unit="picture")):
        part = "train" if number % VAL_EVERY else "val"
        pixels = np.asarray(crop(head, size))
        write_image(out / part / f"image_{counts[part]:05d}.png", pixels)
        counts[part] += 1
        if part == "val":
            held_back.append(pixels)
    holes = make_holes("walk", len(held_back), size, seed=1)[:, 0].numpy()
    for number, (pixels, hole) in enumerate(zip(held_back, holes, strict=True)):
        write_image(out / "test_gt" / f"image_{number:03d}.png", pixels)
        write_image(out / "mask64" / f"mask_{number:03d}.png", np.where(hole, 0, 255).astype(np.uint8))
        write_image(
            out / "masked_image" / f"image_{number:03d}.png", np.where(hole[..., None], GREY, pixels).astype(np.uint8)
        )
    return counts["train"], counts["val"]


def main(argv: list[str] | None = None) -> None:
    """The command line; see --help."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("data/cats64"), metavar="DIR", help="default: data/cats64")
    parser.add_argument("--size", type=int, default=64, help="side of the pictures in pixels (default: 64)")
    parser.add_argument("--downloads", type=Path, default=Path("data"), metavar="DIR",
                        help="where oxford-iiit-pet/ is, or is downloaded to (default: data)")  # fmt: skip
    options = parser.parse_args(argv)
    if options.size < 8:
        parser.error(f"--size {options.size}: expected at least 8")
    try:
        check_folder(options.downloads, "--downloads")
        if check_folder(options.out, "--out").exists() and any(options.out.iterdir()):
            raise ValueError(f"--out {options.out}: is not empty, expected a new folder")
        options.out.mkdir(parents=True, exist_ok=True)  # before the download
        OxfordIIITPet(options.downloads, download=True)
        found = list(heads(options.downloads / "oxford-iiit-pet"))
        if not found:
            raise ValueError(f"{options.downloads / 'oxford-iiit-pet'}: no cat's head in annotations/xmls")
        train, val = write_dataset(found, options.out, options.size)
    except (URLError, RuntimeError) as error:
        parser.error(
            f"Oxford-IIIT Pet could not be downloaded ({error}); {BY_HAND} {options.downloads}/oxford-iiit-pet"
        )
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(f"{train} pictures in {options.out / 'train'}, {val} in {options.out / 'val'}")


if __name__ == "__main__":
    run_script(main)
