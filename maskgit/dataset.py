"""Pictures to train on: decoded once, kept in memory or in files, read whole or in random windows.

images  uint8 (N, 3, S, S); maps of any sizes, pictures or tokens, are read in square windows (b, c, side, side)
"""

import hashlib
import math
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor

from files import replace_file
from maskgit.data import list_images, open_upright, opened, read_hole, read_image, to_mode

Windows = Literal["centre", "random", "fixed"]
CHUNK = 256  # files decoded before their pixels are put away


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
        """The rows of `chunks`, together of `shape` and `dtype`. The file NAME-KEY.npy is reused where it exists.

        Files of other keys stay: another run, on another machine perhaps, may have them mapped.
        """
        if math.prod(shape) * np.dtype(dtype).itemsize <= self.memory:
            array, end = np.empty(shape, dtype), 0
            for chunk in chunks:
                array[end : (end := end + len(chunk))] = chunk
            return torch.from_numpy(array)
        path = self.folder / f"{name}-{key[:16]}.npy"
        if not path.is_file():
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
    with opened(path) as picture:
        turned = picture.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
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


def read_holes(paths: list[Path], workers: int = 4) -> Tensor:
    """The masks `paths`, all of one size, as hole (N, 1, H, W) bool, True = missing."""
    chunks = _read(lambda path, _: read_hole(path), paths, None, workers)
    return torch.from_numpy(np.stack([hole for chunk in chunks for hole in chunk]))[:, None]
