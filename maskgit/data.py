"""Pictures and masks: the one place where files become tensors and tensors become files.

Every conversion of value range and polarity happens here, once:
  images  uint8 (N, 3, H, W) in memory; `to_float` gives [0, 1]
  hole    bool (N, 1, H, W), True = missing; on disk 0 = hole, 255 = known (as in the lab)
"""

import contextlib
import os
import re
import stat
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from scipy import ndimage
from torch import Tensor

from files import replace_file
from utils import one_line

with contextlib.suppress(ImportError):  # optional: reads HEIC, what phones write
    import pillow_heif

    pillow_heif.register_heif_opener()

EXTENSIONS = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
GREY = 128  # what the encoder sees in a hole
MEGAPIXELS = 100  # of a picture, at most, unless more are admitted
_most = MEGAPIXELS * 10**6  # pixels


@dataclass(frozen=True, eq=False)
class Inputs:
    """Images with holes, the file names of their results, and the truth where it is known."""

    images: Tensor  # (N, 3, H, W) uint8
    hole: Tensor  # (N, 1, H, W) bool
    names: list[str]
    groups: list[str]  # a row of the table each
    truth: Tensor | None
    source: Path | None = None  # of the truth; None: it is in no file
    numbers: Sequence[int] | None = None  # of a batch: those in the whole run

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, window: slice) -> "Inputs":
        truth = None if self.truth is None else self.truth[window]
        numbers = range(len(self))[window]
        parts = self.images[window], self.hole[window], self.names[window], self.groups[window], truth
        return Inputs(*parts, numbers=numbers)


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
    """The picture files of `folder`, by number, then by name, without hidden ones (macOS writes ._NAME beside NAME).

    Raises ValueError where there are none.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder of images")
    files = [path for path in folder.iterdir() if path.suffix.lower() in suffixes and not path.name.startswith(".")]
    files = [path for path in files if not (path.is_dir() or path.is_fifo())]
    if not files:
        raise ValueError(f"{folder}: no images in it (looked for {', '.join(sorted(suffixes))})")
    return sorted(files, key=lambda path: (file_number(path) or 0, path.name))


def _bare_name(path: Path) -> str:
    """The stem without "mask" before it, or after it with a number: cat for mask_cat.png and LaMa's cat_mask001.png."""
    return re.sub(r"^mask[-_]?|[-_]?mask[-_]?\d*$", "", Path(path).stem, flags=re.IGNORECASE) or Path(path).stem


def pair(images: list[Path], others: list[Path], noun: str = "mask") -> list[tuple[Path, Path]]:
    """Each image and the one of `others` that has its name, or else its number; of one and one whatever they have.

    Raises ValueError naming those that are alone, or that there are two of one number.
    """
    if len(images) == len(others) == 1:
        return [(images[0], others[0])]
    alone: list[Path] = []
    for key in (lambda path: path.stem, _bare_name, file_number):
        wanted, found = ({key(path): path for path in paths} for paths in (images, others))
        if found.keys() == wanted.keys() and None not in found and len(wanted) == len(images) == len(others):
            return [(image, found[key(image)]) for image in images]
        odd = [wanted.get(name) or found[name] for name in wanted.keys() ^ found.keys()]
        alone = odd if odd and (not alone or len(odd) < len(alone)) else alone
    told = ", ".join(sorted(path.name for path in alone)[:4]) + ", ..." * (len(alone) > 4)
    why = f"alone are {told}" if alone else "two have one"
    folders = f"{len(images)} images in {images[0].parent} and {len(others)} {noun}s in {others[0].parent}"
    raise ValueError(f"{folders}: expected a {noun} of each image's name or number; {why}")


def refuse_overwriting(inputs: Iterable[Path], outputs: Iterable[Path]) -> None:
    """Raises ValueError naming the first of `outputs`, files or folders, that is one of `inputs`, whatever its name."""
    taken = {(status.st_dev, status.st_ino): path for path in inputs if (status := _status(path))}
    for path in outputs:
        if (status := _status(path)) and (found := taken.get((status.st_dev, status.st_ino))):
            raise ValueError(f"{path}: is an input ({found}), expected another place for the results")


def _status(path: Path) -> os.stat_result | None:
    try:
        return os.stat(path)
    except OSError:
        return None


def admit(megapixels: float) -> None:
    """Pictures of so many megapixels, wherever files are read; larger ones are refused before they are decoded."""
    global _most
    _most = int(megapixels * 1e6)
    Image.MAX_IMAGE_PIXELS = max(_most, Image.MAX_IMAGE_PIXELS or 0)  # beyond twice that Pillow itself refuses


@contextlib.contextmanager
def readable(path) -> Iterator[None]:
    """What is raised inside, while a picture is read, becomes a ValueError naming the file."""
    try:
        yield
    except Exception as error:  # decoders raise all there is: struct.error, KeyError, ZeroDivisionError, ...
        raise ValueError(f"{path}: cannot be read as an image ({one_line(error)})") from error


@contextlib.contextmanager
def opened(path) -> Iterator[Image.Image]:
    """A picture file, or an open one, not decoded yet.

    Raises ValueError naming it, also for what is raised within the block: no file (to open a pipe would be to wait), no
    picture, or more pixels than `admit` says.
    """
    with readable(path):
        named = isinstance(path, str | os.PathLike)
        if named and (status := _status(path)) and not stat.S_ISREG(status.st_mode):
            raise ValueError("not a file")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            try:
                picture = Image.open(path)
            except Image.DecompressionBombError as error:
                raise ValueError(f"more megapixels than Pillow reads, {_limit()}") from error
            except UnidentifiedImageError as error:
                if named and _is_heic(path) and "HEIF" not in Image.OPEN:
                    raise ValueError("a HEIC file: pip install pillow-heif, or save it as PNG") from error
                raise
        with picture:
            if picture.format == "EPS":  # which Pillow would have another program run
                raise ValueError("EPS: a program, not a picture; save it as PNG")
            if (pixels := picture.width * picture.height) > _most:
                raise ValueError(f"{pixels / 1e6:.3g} megapixels, {_limit()}")
            yield picture


def _limit() -> str:
    return f"at most {_most / 1e6:g} are read; inpainting.py --image has --max-megapixels"


def _is_heic(path) -> bool:
    with open(path, "rb") as file:
        head = file.read(12)
    return head[4:8] == b"ftyp" and head[8:12] in (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")


def open_upright(path) -> Image.Image:
    """The decoded picture with its EXIF orientation applied. Raises ValueError naming the file."""
    with opened(path) as picture:
        return ImageOps.exif_transpose(picture)


def to_mode(picture: Image.Image, mode: str) -> Image.Image:
    """`picture` in `mode` ("RGB" or "L"), 16-bit greys scaled to 8 bits (Pillow alone would clip them)."""
    if picture.mode.startswith("I"):
        values = np.asarray(picture).astype(np.int64)
        picture = Image.fromarray((values // 257).clip(0, 255).astype(np.uint8))
    return picture.convert(mode)


def as_image(picture: Image.Image, size: int | None = None) -> np.ndarray:
    """uint8 (H, W, 3): RGB, the centre square resized (Lanczos) to `size` unless that is None."""
    picture = to_mode(picture, "RGB")
    if size and picture.size != (size, size):
        picture = ImageOps.fit(picture, (size, size), Image.Resampling.LANCZOS)
    return np.array(picture)


def as_hole(picture: Image.Image) -> np.ndarray:
    """bool (H, W), True = missing: the pixels darker than the middle (128 of 0..255).

    Masks of 0 and 1 are understood, and deep ones (16 or 32 bits, floats) that hold 0..1, 0..255 or 0..65535.
    """
    deep = picture.mode.startswith(("I", "F"))
    values = np.asarray(picture if deep else picture.convert("L"))
    most = next((top for top in (1, 255, 65535) if values.max(initial=0) <= top), values.max(initial=0))
    return values < most * (128 / 255)


def read_image(path, size: int | None = None) -> np.ndarray:
    """`as_image` of a file, upright."""
    picture = open_upright(path)
    with readable(path):
        return as_image(picture, size)


def read_hole(path) -> np.ndarray:
    """`as_hole` of a mask's file, upright."""
    picture = open_upright(path)
    with readable(path):
        return as_hole(picture)


def read_pair(image, mask, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The centre squares of an image (uint8 (size, size, 3)) and its mask (bool (size, size)), as `resize_pair` does.

    Raises ValueError naming both files where their sizes differ.
    """
    pictures = open_upright(image), open_upright(mask)
    first, second = ("{}x{}".format(*picture.size) for picture in pictures)
    if first != second:
        raise ValueError(f"{image} is {first}, its mask {mask} {second}: they must be equal")
    with readable(image):
        pixels = as_image(pictures[0])
    with readable(mask):
        hole = as_hole(pictures[1])
    side = min(hole.shape)
    top, left = ((length - side) // 2 for length in hole.shape)
    window = slice(top, top + side), slice(left, left + side)
    return resize_pair(pixels[window], hole[window], size)


def resize_pair(pixels: np.ndarray, hole: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """A square's pixels (side, side, 3) uint8 and hole (side, side) bool at another size (Lanczos); as they are at
    their own.

    A pixel that touches the hole is hole, and no colour leaks out of the hole: there the nearest known one stands in.
    """
    side = len(hole)
    if side == size:
        return pixels, hole
    if hole.all():
        return np.full((size, size, 3), GREY, np.uint8), np.ones((size, size), bool)
    _, nearest = ndimage.distance_transform_edt(hole, return_indices=True)
    resized = Image.fromarray(pixels[tuple(nearest)]).resize((size, size), Image.Resampling.LANCZOS)
    first = np.arange(size) * side // size  # of the pixels that a new one touches
    past = -(-np.arange(1, size + 1) * side // size)
    sums = np.pad(hole.cumsum(axis=0).cumsum(axis=1), ((1, 0), (1, 0)))
    rows = sums[past] - sums[first]
    return np.asarray(resized), rows[:, past] > rows[:, first]


def write_image(path, pixels: np.ndarray) -> None:
    """Writes uint8 (H, W) or (H, W, 3) as a picture; the folder is made where it is missing."""
    save_picture(path, Image.fromarray(pixels))


def save_picture(path, picture: Image.Image, **options) -> None:
    """`picture.save(path, **options)`, replacing the file at once; the format is that of its suffix."""
    kind = Image.registered_extensions()[Path(path).suffix.lower()]
    replace_file(path, lambda temporary: picture.save(temporary, kind, **options))


def write_animation(path, frames: Tensor, milliseconds: list[int]) -> None:
    """Writes uint8 frames (T, 3, H, W), each shown for its `milliseconds`, as an endless animation (WebP, GIF)."""
    first, *rest = (Image.fromarray(to_pixels(frame)) for frame in frames)
    save_picture(path, first, save_all=True, append_images=rest, duration=milliseconds, loop=0, lossless=True)


def to_pixels(image: Tensor) -> np.ndarray:
    """One image, uint8 (3, H, W) -> uint8 (H, W, 3)."""
    return image.permute(1, 2, 0).cpu().numpy()


# --- from Python ---


def to_images(given) -> Tensor:
    """One picture or several of one size -> images (b, 3, H, W) uint8 on the CPU; one picture is a batch of one.

    given: a PIL picture of any mode; a uint8 array (H, W, 3) or (b, H, W, 3); a tensor (3, H, W) or (b, 3, H, W),
    uint8 or floating-point in [0, 1]; or a list of these. Raises ValueError that says what was expected and found.
    """
    if isinstance(given, list | tuple):
        return _together([to_images(item) for item in given], "images")
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
    return _some(given[None] if given.ndim == 3 else given, "images")


def to_hole(given) -> Tensor:
    """One mask or several of one size -> hole (b, 1, H, W) bool on the CPU, True = missing.

    given: a PIL mask, dark (below 128) where the hole is, as in the lab; a bool array or tensor, True = missing,
    (H, W), (b, H, W) or (b, 1, H, W); or a list of these. Raises ValueError that says what was expected and found.
    """
    if isinstance(given, list | tuple):
        return _together([to_hole(item) for item in given], "hole")
    if isinstance(given, Image.Image):
        given = as_hole(ImageOps.exif_transpose(given))
    if isinstance(given, np.ndarray) and given.dtype == bool:
        given = torch.from_numpy(given.copy())
    fits = isinstance(given, Tensor) and given.dtype == torch.bool
    if not fits or given.ndim not in (2, 3, 4) or (given.ndim == 4 and given.shape[1] != 1):
        raise ValueError("hole: expected PIL masks (dark: missing), or bool (True: missing) arrays or tensors (H, W), "
                         f"(b, H, W) or (b, 1, H, W), found {_described(given)}")  # fmt: skip
    return _some(given.reshape(-1, 1, *given.shape[-2:]), "hole")


def _together(parts: list[Tensor], noun: str) -> Tensor:
    if not parts:
        raise ValueError(f"{noun}: expected at least one, found an empty list")
    sizes = dict.fromkeys(f"{part.shape[-1]}x{part.shape[-2]}" for part in parts)
    if len(sizes) > 1:
        raise ValueError(f"{noun}: expected one size in a call, found {', '.join(sizes)}")
    return torch.cat(parts)


def _described(given) -> str:
    has_shape = isinstance(given, np.ndarray | Tensor)
    return f"{given.dtype} {tuple(given.shape)}" if has_shape else type(given).__name__


def _some(batch: Tensor, noun: str) -> Tensor:
    if not batch.numel():
        raise ValueError(f"{noun}: expected at least one, found {_described(batch)}")
    return batch.cpu()
