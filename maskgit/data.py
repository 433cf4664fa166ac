"""Pictures and masks: the one place where files become tensors and tensors become files.

Every conversion of value range and polarity happens here, once:
  images  uint8 (N, 3, H, W) in memory; `to_float` gives [0, 1]
  hole    bool (N, 1, H, W), True = missing; on disk 0 = hole, 255 = known (as in the lab)
"""

import contextlib
import hashlib
import math
import re
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from models.checkpoint import replace_file

EXTENSIONS = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
Windows = Literal["centre", "random", "fixed"]
GREY = 128  # what the encoder sees in a hole
CHUNK = 256  # files decoded before their pixels are put away


def to_float(images: Tensor) -> Tensor:
    """uint8 (..., 3, H, W) -> float32 in [0, 1]."""
    return images.float() / 255


def to_uint8(images: Tensor) -> Tensor:
    """float (..., 3, H, W) in [0, 1] -> uint8, rounded; values outside are clipped."""
    return (images.float().clamp(0, 1) * 255).round().to(torch.uint8)


def file_number(path: Path) -> int | None:
    """The last run of digits in a file's stem: 12 for `mask_012.png`, None for `cat.png`."""
    digits = re.findall(r"\d+", Path(path).stem)
    return int(digits[-1]) if digits else None


def list_images(folder, suffixes=frozenset(EXTENSIONS)) -> list[Path]:
    """The picture files of `folder`, by number, then by name. Raises ValueError where there are none."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder of images")
    files = [path for path in folder.iterdir() if path.suffix.lower() in suffixes]
    if not files:
        raise ValueError(f"{folder}: no images in it (looked for {', '.join(sorted(suffixes))})")
    return sorted(files, key=lambda path: (file_number(path) or 0, path.name))


def pair(images: list[Path], masks: list[Path]) -> list[tuple[Path, Path]]:
    """Images and masks by order; their numbers must agree. Raises ValueError naming the first two that do not."""
    if len(images) != len(masks):
        raise ValueError(
            f"{len(images)} images in {images[0].parent} but {len(masks)} masks in {masks[0].parent}: "
            "each image needs its mask"
        )
    for image, mask in zip(images, masks, strict=True):
        numbers = file_number(image), file_number(mask)
        if None not in numbers and numbers[0] != numbers[1]:
            raise ValueError(f"{image} would be paired with {mask}: their numbers differ")
    return list(zip(images, masks, strict=True))


@contextlib.contextmanager
def readable(path) -> Iterator[None]:
    """What Pillow raises inside, while it reads, becomes a ValueError naming the file."""
    try:
        yield
    except (UnidentifiedImageError, OSError, EOFError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: cannot be read as an image ({error})") from error


def open_upright(path) -> Image.Image:
    """The decoded picture with its EXIF orientation applied. Raises ValueError naming the file."""
    with readable(path), Image.open(path) as picture:
        return ImageOps.exif_transpose(picture)


def to_mode(picture: Image.Image, mode: str) -> Image.Image:
    """`picture` in `mode` ("RGB" or "L"), 16-bit greys scaled to 8 bits (Pillow alone would clip them)."""
    if picture.mode.startswith("I"):
        values = np.asarray(picture).astype(np.int64)
        picture = Image.fromarray((values // 257).clip(0, 255).astype(np.uint8))
    return picture.convert(mode)


def square(picture: Image.Image, size: int, resample: Image.Resampling) -> Image.Image:
    """The centre square of `picture`, resized to (size, size); untouched where it is that size already."""
    return picture if picture.size == (size, size) else ImageOps.fit(picture, (size, size), resample)


def as_image(picture: Image.Image, size: int | None = None) -> np.ndarray:
    """uint8 (H, W, 3): RGB, the centre square resized (Lanczos) to `size` unless that is None."""
    picture = to_mode(picture, "RGB")
    return np.array(picture if size is None else square(picture, size, Image.Resampling.LANCZOS))


def as_hole(picture: Image.Image, size: int | None = None) -> np.ndarray:
    """bool (H, W), True = missing: the pixels darker than 128, cropped and resized as `as_image` does."""
    picture = to_mode(picture, "L")
    return np.array(picture if size is None else square(picture, size, Image.Resampling.NEAREST)) < 128


def read_image(path, size: int | None = None) -> np.ndarray:
    """`as_image` of a file, upright."""
    return as_image(open_upright(path), size)


def read_hole(path, size: int | None = None) -> np.ndarray:
    """`as_hole` of a mask's file, upright."""
    return as_hole(open_upright(path), size)


def read_pair(image, mask, size: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """`read_image` and `read_hole` of an image and its mask. Raises ValueError naming both where their sizes differ."""
    pictures = open_upright(image), open_upright(mask)
    first, second = ("{}x{}".format(*picture.size) for picture in pictures)
    if first != second:
        raise ValueError(f"{image} is {first}, its mask {mask} {second}: they must be equal")
    return as_image(pictures[0], size), as_hole(pictures[1], size)


def write_image(path, pixels: np.ndarray) -> None:
    """Writes uint8 (H, W) or (H, W, 3) as a picture; the folder is made where it is missing."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def write_animation(path, frames: Tensor, milliseconds: list[int]) -> None:
    """Writes uint8 frames (T, 3, H, W), each shown for its `milliseconds`, as an endless animation (WebP, GIF)."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    first, *rest = (Image.fromarray(to_pixels(frame)) for frame in frames)
    first.save(path, save_all=True, append_images=rest, duration=milliseconds, loop=0, lossless=True)


def to_pixels(image: Tensor) -> np.ndarray:
    """One image, uint8 (3, H, W) -> uint8 (H, W, 3)."""
    return image.permute(1, 2, 0).cpu().numpy()


def _read(read, paths: list[Path], size: int | None, workers: int, alike: bool = True) -> Iterator[list[np.ndarray]]:
    """What `read` makes of each file, CHUNK files at a time. Raises ValueError where they have to be `alike` in size
    and one is not."""
    expected = None
    with ThreadPoolExecutor(max(1, workers)) as pool:
        for start in range(0, len(paths), CHUNK):
            chunk = paths[start : start + CHUNK]
            arrays = list(pool.map(lambda path: read(path, size), chunk))
            for path, array in zip(chunk, arrays, strict=True):
                expected = expected or array.shape
                if alike and array.shape != expected:
                    raise ValueError(f"{path} is {array.shape[1]}x{array.shape[0]}, but {paths[0]} is "
                                     f"{expected[1]}x{expected[0]}: one size is needed")  # fmt: skip
            yield arrays


class Store:
    """Keeps arrays that are made once: in memory where one needs at most `memory` bytes, else in a file of `folder`.

    Either way a tensor comes back, and to index it is to fetch: a file is mapped read-only, so only the rows asked for
    are read, and the operating system keeps as many as it has memory for.
    """

    def __init__(self, folder: Path | None = None, memory: float = math.inf):
        self.folder, self.memory = folder, memory

    def keep(self, name: str, key: str, shape: tuple[int, ...], chunks: Iterable[np.ndarray], dtype=np.uint8) -> Tensor:
        """The rows of `chunks`, together of `shape` and `dtype`. The file NAME-KEY.npy is reused where it exists."""
        if math.prod(shape) * np.dtype(dtype).itemsize <= self.memory:
            array, end = np.empty(shape, dtype), 0
            for chunk in chunks:
                array[end : (end := end + len(chunk))] = chunk
            return torch.from_numpy(array)
        path = self.folder / f"{name}-{key[:16]}.npy"
        if not path.is_file():
            for stale in self.folder.glob(f"{name}-*.npy"):
                stale.unlink()
            replace_file(path, lambda temporary: _write_rows(temporary, shape, chunks, dtype))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch warns that nobody may write there, and nobody does
            return torch.from_numpy(np.load(path, mmap_mode="r"))


def _write_rows(path: Path, shape: tuple[int, ...], chunks: Iterable[np.ndarray], dtype) -> None:
    """An .npy file of `shape`, written chunk by chunk."""
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for chunk in chunks:
            np.ascontiguousarray(chunk, dtype).tofile(file)


def _fingerprint(paths: list[Path], *options) -> str:
    """A hash of the files' names, sizes and times of change, and of `options`."""
    files = [(str(path.resolve()), (stat := path.stat()).st_size, stat.st_mtime_ns) for path in map(Path, paths)]
    return hashlib.sha256(repr((*options, files)).encode()).hexdigest()


class Maps:
    """Maps (c, H_i, W_i) of any sizes, pictures or tokens, end to end in one array, read in square windows.

    values (sum of c H_i W_i) of any dtype; sizes (N, 2) long: H_i and W_i.
    """

    def __init__(self, values: Tensor, sizes: Tensor, channels: int):
        self.values, self.sizes, self.channels = values, sizes, channels
        self.ends = (channels * sizes.prod(dim=1)).cumsum(dim=0)

    @classmethod
    def of(cls, stack: Tensor) -> "Maps":
        """The maps of a stack (N, c, H, W), which is not copied."""
        count, channels, *size = stack.shape
        return cls(stack.reshape(-1), torch.tensor(size).expand(count, 2), channels)

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: int) -> Tensor:
        """One map, (c, H, W)."""
        height, width = self.sizes[index].tolist()
        end = int(self.ends[index])
        return self.values[end - self.channels * height * width : end].view(self.channels, height, width)

    def stack(self) -> Tensor:
        """All maps, (N, c, H, W), not copied. Raises ValueError where they are not of one size."""
        if (self.sizes != self.sizes[0]).any():
            raise ValueError("maps of unequal sizes do not stack")
        return self.values.view(len(self), self.channels, *self.sizes[0].tolist())

    def draw(self, indices: Tensor, side: int, generator: torch.Generator) -> Tensor:
        """A random window of `side` in each map of `indices` (b): (b, 3) long, its map, top and left.

        Draws nothing where no map is larger than the window. Raises ValueError where one is smaller.
        """
        room = self.sizes[indices] - side  # (b, 2)
        if (room < 0).any():
            small = indices[(room < 0).any(dim=1)][0]
            raise ValueError("a map of {}x{} has no window of {}".format(*self.sizes[small].tolist(), side))
        places = torch.zeros_like(room)
        if (self.sizes != side).any():
            uniforms = torch.rand(room.shape, generator=generator, dtype=torch.float64)
            places = (uniforms * (room + 1)).long()
        return torch.cat((indices[:, None], places), dim=1)

    def read(self, windows: Tensor, side: int) -> Tensor:
        """The windows (b, 3) that `draw` gave: (b, c, side, side)."""
        return torch.stack([self[i][:, y : y + side, x : x + side] for i, y, x in windows.tolist()])


def _whole(path, least: int) -> np.ndarray:
    """`read_image` of a whole picture, enlarged where a side is below `least`."""
    picture = to_mode(open_upright(path), "RGB")
    size = _whole_size(picture.size, least)
    return np.array(picture if picture.size == size else picture.resize(size, Image.Resampling.LANCZOS))


def _whole_size(size: tuple[int, int], least: int) -> tuple[int, int]:
    """Width and height of a picture whose sides shall be at least `least`, in proportion."""
    scale = max(1.0, least / min(size))
    return max(least, round(size[0] * scale)), max(least, round(size[1] * scale))


def _read_size(path) -> tuple[int, int]:
    """Width and height of the upright picture in a file, without decoding it."""
    with readable(path), Image.open(path) as picture:
        turned = picture.getexif().get(ExifTags.Base.Orientation, 1) >= 5
        return picture.size[::-1] if turned else picture.size


class ImageDataset:
    """The pictures of one folder (or a list of files), decoded once and kept as uint8, in memory unless `store` says.

    With windows `centre`, `images` (N, 3, size, size) are their centre squares, resized; `size=None` keeps the files'
    own size, which must then be one. With windows `random` each picture keeps its own size (a side below `size` is
    enlarged to it); `fixed` keeps one random window of each, always the same. `maps` are what is kept.
    `paths` names them in order. With a `store`, `key` says which files, size and windows they were and `name` names
    the array. Raises ValueError naming a file that cannot be read.
    """

    def __init__(
        self,
        source,
        size: int | None = None,
        workers: int = 4,
        store: Store | None = None,
        name: str = "images",
        windows: Windows = "centre",
    ):
        self.paths = list(source) if isinstance(source, list | tuple) else list_images(source)
        self.name, self.windows, whole = name, windows, windows != "centre"
        self.key = _fingerprint(self.paths, size, windows) if store else ""
        if whole:
            with ThreadPoolExecutor(max(1, workers)) as pool:
                sizes = [_whole_size(found, size)[::-1] for found in pool.map(_read_size, self.paths)]
        else:
            sizes = [(size, size) if size else read_image(self.paths[0]).shape[:2]] * len(self.paths)
        sizes = torch.tensor(sizes)
        chunks = (
            np.concatenate([array.transpose(2, 0, 1).ravel() for array in arrays])
            for arrays in _read(_whole if whole else read_image, self.paths, size, workers, not whole)
        )
        shape = (int(3 * sizes.prod(dim=1).sum()),)
        self.maps = Maps((store or Store()).keep(name, self.key, shape, chunks), sizes, channels=3)
        if windows == "fixed":
            drawn = self.maps.draw(torch.arange(len(self.maps)), size, torch.Generator().manual_seed(0))
            self.maps = Maps.of(self.maps.read(drawn, size))

    @property
    def images(self) -> Tensor:
        """All of them, (N, 3, size, size) uint8. Raises ValueError where their sizes differ."""
        return self.maps.stack()

    def __len__(self) -> int:
        return len(self.maps)


def read_holes(paths: list[Path], size: int | None = None, workers: int = 4) -> Tensor:
    """The masks `paths` as hole (N, 1, H, W) bool, True = missing."""
    return torch.from_numpy(np.stack([hole for chunk in _read(read_hole, paths, size, workers) for hole in chunk]))[
        :, None
    ]
