"""The figures of a sweep: their names in tables, digits and which way is better."""

from typing import NamedTuple


class Figure(NamedTuple):
    label: str
    digits: int
    better: int = -1  # the sign of better: 1 higher, -1 lower, 0 not compared


FIGURES = {
    "fd_vgg16": Figure("FD-VGG16", 1),
    "kid": Figure("KID", 3),
    "kid_sd": Figure("KID's sd", 3, 0),
    "lpips": Figure("LPIPS", 4),
    "lpips_near": Figure("LPIPS in and near the hole", 4),
    "psnr": Figure("PSNR dB", 2, 1),
    "ssim": Figure("SSIM", 3, 1),
    "l1": Figure("L1", 4),
    "mind": Figure("MIND", 1),
    "seam": Figure("seam", 4),
    "seam_gradient": Figure("seam's gradient", 4),
    "sharpness": Figure("sharpness", 2, 0),
    "seconds": Figure("s an image", 3, 0),
    "code_usage": Figure("codes in use", 3, 0),
    "leak": Figure("known tokens changed", 3, 0),
}
RAW = ("raw_fd_vgg16", "raw_kid", "raw_kid_sd", "raw_lpips", "raw_ssim", "raw_mind")
VERSION = 2  # of the figures that a line has, counted up when all lines are to be measured anew
