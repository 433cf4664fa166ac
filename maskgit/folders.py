"""What is to be filled: images, their holes and, where it is known, the truth; read a batch at a time.

`chelsea` and `Folders` have the same face: `len`, `names`, `groups`, and a slice gives the `Inputs` of a batch.
`to_images` and `to_hole` take what Python has in hand: PIL pictures, numpy arrays, tensors.
"""

import csv
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from maskgit.data import GREY, ImageDataset, list_images, pair, read_image, read_pair
from maskgit.masks import FAMILIES, make_holes

FACES = ((70, 0, 300), (90, 10, 280), (110, 40, 250))  # squares of chelsea: left, top, side in pixels


@dataclass(frozen=True, eq=False)
class Inputs:
    """Images with holes, the file names of their results, and the truth where it is known."""

    images: Tensor  # (N, 3, H, W) uint8
    hole: Tensor  # (N, 1, H, W) bool
    names: list[str]
    groups: list[str]  # a row of the table each
    truth: Tensor | None

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, window: slice) -> "Inputs":
        truth = None if self.truth is None else self.truth[window]
        return Inputs(self.images[window], self.hole[window], self.names[window], self.groups[window], truth)


def chelsea(size: int) -> Inputs:
    """Crops of scikit-image's cat (CC0), each also mirrored, under every family of holes."""
    from skimage.data import chelsea as photograph  # imported here: only the default needs scikit-image

    picture = Image.fromarray(photograph())
    crops = [picture.crop((x, y, x + side, y + side)).resize((size, size), Image.LANCZOS) for x, y, side in FACES]
    faces = torch.from_numpy(np.stack([np.asarray(crop) for crop in crops])).permute(0, 3, 1, 2).contiguous()
    faces = torch.cat((faces, faces.flip(-1)))
    hole = torch.cat([make_holes(family, len(faces), size) for family in FAMILIES])
    truth = faces.repeat(len(FAMILIES), 1, 1, 1)
    groups = [family for family in FAMILIES for _ in faces]
    names = [f"image_{index:03d}.png" for index in range(len(truth))]
    return Inputs(truth.masked_fill(hole, GREY), hole, names, groups, truth)


class Folders:
    """The lab's layout: a folder of images, one of masks (0 = hole), and perhaps the truth (folder, .npz or .csv).

    Files are read when their batch is; a truth that is one file is kept in memory. Raises ValueError that names what
    does not fit: at once for counts and numbers, with its batch for a file.
    """

    def __init__(self, images, masks, truth, size: int, workers: int):
        self.size, self.workers = size, max(1, workers)
        self.pairs = pair(list_images(images), list_images(masks))
        self.names = [f"{image.stem}.png" for image, _ in self.pairs]
        if len(set(self.names)) < len(self.names):
            raise ValueError(f"{images}: two images of one name but for their ending would overwrite each other")
        self.groups = [Path(masks).name] * len(self.names)
        self.source = truth
        self.truth = list_images(truth) if truth and Path(truth).is_dir() else read_truth(truth) if truth else None
        if self.truth is not None and len(self.truth) != len(self.names):
            raise ValueError(f"{truth}: {len(self.truth)} true images for {len(self.names)} to fill")

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, window: slice) -> Inputs:
        with ThreadPoolExecutor(self.workers) as pool:
            read = pool.map(lambda paths: read_pair(*paths, self.size), self.pairs[window])
            pixels, holes = zip(*read, strict=True)
            truth = None if self.truth is None else self._truth(self.truth[window], pool)
        images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()
        hole = torch.from_numpy(np.stack(holes))[:, None]
        if truth is not None and truth.shape != images.shape:
            raise ValueError(f"{self.source}: {tuple(truth.shape)} true images (b, 3, H, W) for {tuple(images.shape)}")
        return Inputs(images, hole, self.names[window], self.groups[window], truth)

    def _truth(self, part: Tensor | list[Path], pool: ThreadPoolExecutor) -> Tensor:
        if isinstance(part, Tensor):
            return part
        images = list(pool.map(partial(read_image, size=None), part))
        for path, image in zip(part, images, strict=True):
            if image.shape[:2] != (self.size, self.size):
                raise ValueError(f"{path}: {image.shape[1]}x{image.shape[0]}, expected {self.size}x{self.size}")
        return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


def batches(inputs: Inputs | Folders, size: int) -> Iterator[tuple[int, Inputs]]:
    """The number of its first image and each batch of `size`, read in a thread while the one before is at work."""
    with ThreadPoolExecutor(1) as pool:
        ahead = None
        for start in range(0, len(inputs), size):
            batch = ahead.result() if ahead else inputs[start : start + size]
            if start + size < len(inputs):
                ahead = pool.submit(inputs.__getitem__, slice(start + size, start + 2 * size))
            yield start, batch


# --- the truth ---


def read_truth(source) -> Tensor:
    """True images as uint8 (N, 3, H, W) from a folder, an .npz (array `images`, or its first, (N, H, W, 3)) or the
    lab's test_gt.csv (a header, then rows of H*W*3 integers in H, W, C order). Raises ValueError naming the file."""
    source = Path(source)
    if source.is_dir():
        return ImageDataset(source).images
    if not source.is_file():
        raise ValueError(f"{source}: no such folder or file of true images")
    if source.suffix == ".npz":
        array = _read_npz(source)
    elif source.suffix == ".csv":
        array = _read_csv(source)
    else:
        raise ValueError(f"{source}: true images come as a folder, an .npz or a .csv file")
    if array.ndim != 4 or array.shape[3] != 3 or array.dtype != np.uint8:
        raise ValueError(f"{source}: expected uint8 (N, H, W, 3), found {array.dtype} {array.shape}")
    return torch.from_numpy(array).permute(0, 3, 1, 2).contiguous()


def _read_npz(path: Path) -> np.ndarray:
    try:
        with zipfile.ZipFile(path), np.load(path) as arrays:  # np.load alone would take an .npy or a pickle
            return arrays["images" if "images" in arrays else arrays.files[0]]
    except (zipfile.BadZipFile, ValueError, IndexError) as error:
        raise ValueError(f"{path}: not an .npz of plain arrays ({error})") from error


def _read_csv(path: Path) -> np.ndarray:
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.reader(file))[1:]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: not a .csv file ({error})") from error
    side = round((len(rows[0]) / 3) ** 0.5) if rows else 0
    images = []
    for number, row in enumerate(rows, start=2):
        if len(row) != side * side * 3 or not row:
            raise ValueError(f"{path}, line {number}: {len(row)} values, expected H*W*3 of a square image")
        try:
            images.append(np.array(row, dtype=np.int64))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
        if images[-1].min() < 0 or images[-1].max() > 255:
            raise ValueError(f"{path}, line {number}: values outside 0..255")
    if not images:
        raise ValueError(f"{path}: no rows after the header")
    return np.stack(images).astype(np.uint8).reshape(-1, side, side, 3)
