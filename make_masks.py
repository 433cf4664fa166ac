"""Writes a folder of masks: `python make_masks.py --family walk --count 747 --seed 1 --out DIR`."""

if __name__ == "__main__":
    import interrupts

    interrupts.in_one_line()

import argparse
from pathlib import Path

import numpy as np

from interrupts import run_script
from maskgit.data import write_image
from maskgit.masks import FAMILIES, make_holes
from utils import check_folder


def main(argv: list[str] | None = None) -> None:
    """Writes a folder of masks: `python make_masks.py --family walk --count 747 --seed 1 --out DIR`."""
    families = "\n".join(f"  {name:8}{draw.__doc__.splitlines()[0]}" for name, draw in FAMILIES.items())
    parser = argparse.ArgumentParser(
        prog="make_masks.py",
        description="Write hole masks as PNG files mask_000.png, mask_001.png, ...: 0 = hole, 255 = known.",
        epilog=f"families:\n{families}\n\nexamples:\n"
        "  python make_masks.py --family walk --count 747 --seed 1 --out holes/walk\n"
        "  python make_masks.py --family thick --count 16 --size 128 --out holes/thick128\n\n"
        "Mask i depends on family, size, seed and i only: a longer run begins with the same masks.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--family", choices=FAMILIES, default="walk", help="kind of hole, see below (default: walk)")
    parser.add_argument("--count", type=int, default=747, help="number of masks (default: 747, the lab's test set)")
    parser.add_argument("--size", type=int, default=64, help="height and width in pixels (default: 64)")
    parser.add_argument("--seed", type=int, default=0, help="seed, 0 or more (default: 0)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write into, made if missing")
    options = parser.parse_args(argv)
    digits = max(3, len(str(options.count - 1)))
    try:
        check_folder(options.out, "--out")
        holes = make_holes(options.family, options.count, options.size, options.seed)
        for index, known in enumerate((~holes[:, 0]).numpy()):
            write_image(options.out / f"mask_{index:0{digits}}.png", known.astype(np.uint8) * 255)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    share = holes.float().mean().item()
    print(f"{options.count} {options.family} masks in {options.out}, {share:.1%} of the pixels missing")


if __name__ == "__main__":
    run_script(main)
