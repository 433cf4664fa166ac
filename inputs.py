"""What is to be filled: images, their holes and, where it is known, the truth; read a batch at a time.

`chelsea` and `Folders` have the same face: `len`, `names`, `groups`, and a slice gives the `Inputs` of a batch.
`to_images` and `to_hole` take what Python has in hand: PIL pictures, numpy arrays, tensors.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from data import as_hole, as_image, list_images, pair, read_image, read_pair, read_truth, to_uint8
from masks import FAMILIES, make_holes

GREY = 128  # what the encoder sees in a hole
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


# --- from Python ---


def to_images(given, size: int) -> Tensor:
    """One picture or several -> images (b, 3, size, size) uint8 on the CPU; one picture is a batch of one.

    given: a PIL picture of any mode; a uint8 array (H, W, 3) or (b, H, W, 3); a tensor (3, H, W) or (b, 3, H, W),
    uint8 or floating-point in [0, 1]; or a list of these. Raises ValueError that says what was expected and found.
    """
    if isinstance(given, list | tuple):
        return torch.cat(_each(to_images, given, size, "images"))
    if isinstance(given, Image.Image):
        given = as_image(ImageOps.exif_transpose(given))
    if isinstance(given, np.ndarray) and given.dtype == np.uint8 and given.ndim in (3, 4) and given.shape[-1] == 3:
        given = torch.from_numpy(given.copy()).movedim(-1, -3).contiguous()
    if not isinstance(given, Tensor) or given.ndim not in (3, 4) or given.shape[-3] != 3:
        raise ValueError("images: expected PIL pictures, uint8 arrays (H, W, 3) or (b, H, W, 3), or tensors (3, H, W) "
                         f"or (b, 3, H, W), found {_described(given)}")  # fmt: skip
    if given.is_floating_point():
        if not ((given >= 0) & (given <= 1)).all():
            raise ValueError("images: expected floating-point values in [0, 1], found others")
        given = to_uint8(given)
    if given.dtype != torch.uint8:
        raise ValueError(f"images: expected uint8, or floating-point in [0, 1], found {_described(given)}")
    return _of_size(given.view(-1, *given.shape[-3:]), size, "images")


def to_hole(given, size: int) -> Tensor:
    """One mask or several -> hole (b, 1, size, size) bool on the CPU, True = missing.

    given: a PIL mask, dark (below 128) where the hole is, as in the lab; a bool array or tensor, True = missing,
    (H, W), (b, H, W) or (b, 1, H, W); or a list of these. Raises ValueError that says what was expected and found.
    """
    if isinstance(given, list | tuple):
        return torch.cat(_each(to_hole, given, size, "hole"))
    if isinstance(given, Image.Image):
        given = as_hole(ImageOps.exif_transpose(given))
    if isinstance(given, np.ndarray) and given.dtype == bool:
        given = torch.from_numpy(given.copy())
    fits = isinstance(given, Tensor) and given.dtype == torch.bool
    if not fits or given.ndim not in (2, 3, 4) or (given.ndim == 4 and given.shape[1] != 1):
        raise ValueError("hole: expected PIL masks (dark: missing), or bool (True: missing) arrays or tensors (H, W), "
                         f"(b, H, W) or (b, 1, H, W), found {_described(given)}")  # fmt: skip
    return _of_size(given.reshape(-1, 1, *given.shape[-2:]), size, "hole")


def _each(convert: Callable, given, size: int, noun: str) -> list[Tensor]:
    if not given:
        raise ValueError(f"{noun}: expected at least one, found an empty list")
    return [convert(item, size) for item in given]


def _described(given) -> str:
    has_shape = isinstance(given, np.ndarray | Tensor)
    return f"{given.dtype} {tuple(given.shape)}" if has_shape else type(given).__name__


def _of_size(batch: Tensor, size: int, noun: str) -> Tensor:
    if not len(batch):
        raise ValueError(f"{noun}: expected at least one, found {_described(batch)}")
    if batch.shape[-2:] != (size, size):
        found = f"{batch.shape[-1]}x{batch.shape[-2]} pixels"
        raise ValueError(f"{noun}: expected {size}x{size} pixels, this model's size, found {found}; "
                         "photos.fill_photo fills pictures of any size")  # fmt: skip
    return batch.cpu()
