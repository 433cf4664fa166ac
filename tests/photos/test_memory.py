"""What a large picture costs in memory: processes of their own, on the weights of tiny networks."""

import subprocess
import sys

import pytest
import torch
from PIL import Image
from tiny_networks import save, transformer, vqgan

from utils import ROOT

LARGE = 4000, 5000  # 20 megapixels

CODE = """
import resource, sys
import inpainting
inpainting.main(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux alone")
@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_a_small_hole_in_a_large_picture_takes_12_bytes_a_pixel(tmp_path, suffix):
    torch.manual_seed(0)
    folder, peaks = save(tmp_path / "model", vqgan(), transformer()), []
    for size in ((200, 300), LARGE):
        Image.linear_gradient("L").convert("RGB").resize(size).save(tmp_path / f"photo.{suffix}")
        line = ["--image", tmp_path / f"photo.{suffix}", "--box", "100,90,20,20", "--checkpoint", folder]
        command = [
            sys.executable,
            "-c",
            CODE,
            *map(str, line),
            "--out",
            str(tmp_path / f"out.{suffix}"),
            "--device",
            "cpu",
        ]
        said = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
        peaks.append(int(said.split()[-1]))
    assert peaks[1] - peaks[0] < 12 * LARGE[0] * LARGE[1]
