"""The shipped weights go on filling the same pixels: what they made when they were committed."""

import hashlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from inpainting import Inpainter
from maskgit.folders import chelsea

BEFORE = Path(__file__).with_name("unchanged.png")  # two crops of chelsea (CC0) under walk, thick, box and half, filled
TOKENS = "d45725b767d369350a6de1a21e83595630ec63251d3fd38e21530770d9b787c6"


def filled(inpainter: Inpainter):
    inputs = chelsea(inpainter.size)
    rows = [inputs.groups.index(family) + crop for family in ("walk", "thick", "box", "half") for crop in (0, 4)]
    return inputs.images[rows], inputs.hole[rows], inpainter(inputs.images[rows], inputs.hole[rows], seed=0)


def test_fixed_seeds_give_the_tokens_and_pixels_they_gave():
    """Tokens exactly; pixels too on the processor that made them, where another rounds a few by one level."""
    images, hole, result = filled(Inpainter.from_pretrained(device="cpu", precision="float32"))
    assert hashlib.sha256(result.tokens.short().numpy().tobytes()).hexdigest() == TOKENS
    before = torch.from_numpy(np.asarray(Image.open(BEFORE))).view(8, 64, 64, 3).permute(0, 3, 1, 2)
    away = (result.images.int() - before.int()).abs()
    assert away.max() <= 1 and (away > 0).float().mean() < 0.001
    assert torch.equal(result.images.masked_fill(hole, 0), images.masked_fill(hole, 0))
