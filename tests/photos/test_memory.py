"""What a large picture costs in memory: processes of their own, on the weights of tiny networks."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_networks import save, transformer, vqgan

from utils import ROOT

LARGE = 4000, 5000  # 20 megapixels

CODE = """
import sys
import inpainting
inpainting.main(sys.argv[1:])
print(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])  # ru_maxrss begins with that of the parent
"""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    return save(tmp_path_factory.mktemp("tiny") / "model", vqgan(), transformer())


def peak(model, photo, *hole) -> int:
    """Bytes that filling the photo takes at most."""
    line = ["--image", photo, *hole, "--checkpoint", model, "--out", photo.parent / "out", "--device", "cpu"]
    command = [sys.executable, "-c", CODE, *map(str, line)]
    return int(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()[-1]) * 1024


@pytest.fixture(scope="module")
def least(model, tmp_path_factory) -> int:
    """Bytes that a small picture with a small hole takes, the larger figure of two: the system may take pages back."""
    photo = tmp_path_factory.mktemp("small") / "photo.png"
    Image.linear_gradient("L").convert("RGB").save(photo)
    return max(peak(model, photo, "--box", "100,90,20,20") for _ in range(2))


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_a_small_hole_in_a_large_picture_takes_12_bytes_a_pixel(model, least, tmp_path, suffix):
    photo = tmp_path / f"photo.{suffix}"
    Image.linear_gradient("L").convert("RGB").resize(LARGE).save(photo)
    assert peak(model, photo, "--box", "100,90,20,20") - least < 12 * LARGE[0] * LARGE[1]


@pytest.mark.parametrize("kind", ["strip", "specks"])
def test_long_holes_and_many_take_little_more_than_a_small_one(model, least, tmp_path, kind):
    rng, size = np.random.default_rng(0), (10000, 10) if kind == "strip" else (1000, 750)
    mask = np.full(size[::-1], 255, np.uint8)
    if kind == "strip":
        mask[:, 3000:7500] = 0
    else:
        for row, column, side in rng.integers((0, 0, 2), (745, 995, 6), size=(200, 3)):
            mask[row : row + side, column : column + side] = 0
    photo, where = tmp_path / "photo.png", tmp_path / "mask.png"
    Image.fromarray(rng.integers(256, size=(*mask.shape, 3), dtype=np.uint8)).save(photo)
    Image.fromarray(mask).save(where)
    assert peak(model, photo, "--mask", where) - least < 300e6
