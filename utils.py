"""Small things every script needs: seeds, devices, numeric precision, logging, picture grids."""

import contextlib
import logging
import sys

import numpy as np
import torch
from torch import Tensor

log = logging.getLogger("maskgit")


def start_logging() -> None:
    """Plain lines on standard output."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout, force=True)


def mix(*numbers: int) -> int:
    """A well-mixed 63-bit seed from integers: every random draw is a function of (seed, step)."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64).item() >> 1)


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one. Raises ValueError for a device that this machine lacks."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device {name}: expected auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise ValueError(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices")
    return device


def has_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 arithmetic is native there (so that autocast pays)."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.cpu._is_avx512_bf16_supported()  # so have all processors with AMX


def autocast(device: torch.device, precision: str = "auto"):
    """A context of mixed precision: `precision` is auto, float32 or bfloat16."""
    wanted = precision == "bfloat16" or (precision == "auto" and has_bfloat16(device))
    return torch.autocast(device.type, torch.bfloat16) if wanted else contextlib.nullcontext()


def grid(images: Tensor, columns: int, gap: int = 2) -> Tensor:
    """uint8 images (N, 3, H, W) -> one uint8 picture (3, rows * (H + gap) - gap, ...), white between."""
    n, c, height, width = images.shape
    rows = -(-n // columns)
    sheet = images.new_full((c, rows * (height + gap) - gap, columns * (width + gap) - gap), 255)
    for index, image in enumerate(images):
        top, left = (index // columns) * (height + gap), (index % columns) * (width + gap)
        sheet[:, top : top + height, left : left + width] = image
    return sheet
