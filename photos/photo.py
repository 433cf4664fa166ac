"""Holes in pictures of any size: read one with its hole, fill it with a model of small squares, write it back.

    photo = read_photo("photo.jpg", mask="mask.png")
    (pixels,), notes = fill_photo(inpainter, photo)
    write_photo("filled.png", photo, pixels)

    pixels  (H, W, 3) uint8   RGB, upright
    hole    (H, W) bool       upright, True = missing
    owner   (H, W) int        0 where known, else the number 1..r of the hole's region
    images  (r, 3, S, S) uint8, their hole (r, 1, S, S) bool: a square around each region, at the model's size S

Known pixels are never changed. What the user should know comes back as notes, lines of text; nothing is printed.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from scipy import ndimage
from torch import Tensor

from maskgit.data import as_hole, list_images, open_upright, pair, readable, to_pixels
from photos.crops import CONTEXT, EVERYWHERE, Square, crop, fit_rim, inside, regions, shrink
from photos.image_file import FORMATS, Picture, format_of, read_picture, write_picture

__all__ = ["Cut", "Photo", "cut", "pair_photos", "paste", "read_photo", "write_photo"]

TOLERANCE = 16  # how far from the hole's colour, in each channel, the values of a lossy file may be
SPECK = 16  # fewer pixels than these, in a lossy file, have the hole's colour by chance


@dataclass(frozen=True, eq=False)
class Photo:
    """A picture and its hole. `pixels` may have any colour in the hole: the result does not depend on it."""

    pixels: np.ndarray  # (H, W, 3) uint8
    hole: np.ndarray  # (H, W) bool
    picture: Picture  # as the file has it
    name: str
    notes: list[str]


@dataclass(frozen=True, eq=False)
class Cut:
    """What the model sees of a photo."""

    squares: list[Square]
    owner: np.ndarray
    images: Tensor
    hole: Tensor


# --- reading ---


def read_photo(image, mask=None, hole_color=None, box=None) -> Photo:
    """The picture `image` and its hole, from exactly one source; image and mask are paths or Pillow pictures;
    the image may be a `Picture` that is read already.

    mask: 0 = hole, 255 = known, anything between goes by 128; hole_color: (r, g, b), 0..255, exact, or nearly so where
    the file is lossy; box: (x, y, width, height) in pixels; none of them: the transparent part, alpha < 128.
    Raises ValueError, one line, naming the file: not readable, no source or several, another size, no hole, all hole.
    """
    picture = image if isinstance(image, Picture) else read_picture(image)
    pixels, name = picture.rgb(), picture.name
    notes = list(picture.notes)
    sources = {"a mask": mask, "a hole colour": hole_color, "a box": box}
    given = [source for source, value in sources.items() if value is not None]
    if len(given) > 1:
        raise ValueError(f"{name}: its hole is told by {' and by '.join(given)}, expected one of them")
    if mask is not None:
        where, hole = _mask(mask, name, pixels)
    elif hole_color is not None:
        where, hole = f"{name}: pixels of colour {_text(hole_color)}", _colour(pixels, hole_color, picture.lossy)
        if picture.lossy:
            notes.append(f"{where}: {100 * hole.mean():.1f} % of the picture, known ones of a like colour among them "
                         "as compression blurs colours; a mask is exact")  # fmt: skip
    elif box is not None:
        where, hole = f"{name}: box {_text(box)}", _box(box, name, pixels)
    elif (alpha := picture.alpha()) is not None:
        where, hole = f"{name}: transparent part", alpha < 128
    else:
        raise ValueError(f"{name}: no hole: expected a mask, a hole colour, a box or a transparent part")
    if not hole.any():
        raise ValueError(f"{where}: an empty hole, expected at least one pixel")
    if hole.all():
        raise ValueError(f"{where}: the hole is the whole picture, expected some known pixels")
    notes += _doubts(where, pixels, hole, mask is not None, picture.lossy)
    return Photo(pixels, hole, picture, name, notes)


def _text(numbers) -> str:
    return ",".join(map(str, numbers))


def _mask(mask, name: str, pixels: np.ndarray) -> tuple[str, np.ndarray]:
    if isinstance(mask, Image.Image):
        where = getattr(mask, "filename", "") or "the mask"
        with readable(where):
            picture = ImageOps.exif_transpose(mask)
    else:
        where, picture = str(mask), open_upright(mask)
    if picture.size != pixels.shape[1::-1]:
        sizes = "{}x{}, its mask {} {}x{}".format(*pixels.shape[1::-1], where, *picture.size)
        raise ValueError(f"{name} is {sizes}: they must be equal")
    return where, as_hole(picture)


def _colour(pixels: np.ndarray, colour, lossy: bool) -> np.ndarray:
    if len(colour) != 3 or min(colour) < 0 or max(colour) > 255:
        raise ValueError(f"hole colour {_text(colour)}: expected r,g,b, each 0..255")
    far = np.abs(pixels.astype(np.int16) - np.array(colour, dtype=np.int16)).max(axis=2)
    if not lossy:
        return far == 0
    # compression mixes the colours of neighbours: a few pixels are no hole, and a hole is not its colour near its rim
    labels, count = ndimage.label(far <= TOLERANCE, EVERYWHERE)
    large = np.bincount(labels.ravel(), minlength=count + 1) >= SPECK
    large[0] = False
    near = ndimage.binary_dilation(large[labels], EVERYWHERE, iterations=3, mask=far <= 6 * TOLERANCE)
    return ndimage.binary_dilation(near, EVERYWHERE)


def _box(box, name: str, pixels: np.ndarray) -> np.ndarray:
    x, y, width, height = box
    hole = np.zeros(pixels.shape[:2], dtype=bool)
    if min(x, y) < 0 or min(width, height) < 1 or x + width > hole.shape[1] or y + height > hole.shape[0]:
        raise ValueError(f"{name}: box {_text(box)} (x, y, width, height) does not lie in its "
                         f"{hole.shape[1]}x{hole.shape[0]} pixels")  # fmt: skip
    hole[y : y + height, x : x + width] = True
    return hole


def _doubts(where: str, pixels: np.ndarray, hole: np.ndarray, masked: bool, lossy: bool) -> list[str]:
    """Signs that hole and known were mistaken for each other."""
    notes = []
    if hole.mean() > 0.5:
        notes.append(f"{where}: {100 * hole.mean():.0f} % of the picture is hole; is it the wrong way round?")
    known = pixels[~hole].astype(np.int16)
    colour = np.median(known, axis=0)
    spread = TOLERANCE if lossy else 0
    flat = np.mean(np.abs(known - colour).max(axis=1) <= spread) > 0.99
    if masked and flat and np.ptp(pixels[hole].astype(np.int16), axis=0).max() > 2 * spread:
        notes.append(f"{where}: all that it calls known has the colour {_text(colour.astype(int))}, "
                     "as if painted to be the hole; is it the wrong way round?")  # fmt: skip
    return notes


# --- to the model's size and back ---


def cut(photo: Photo, size: int, context: float = CONTEXT) -> Cut:
    """The squares of a photo at the model's `size`: beyond the borders mirrored, shrunk with Lanczos.

    Where a square is shrunk, a pixel that touches the hole is hole, and no colour leaks out of the hole.
    """
    squares, owner = regions(photo.hole, size, context)
    pairs = [shrink(crop(photo.pixels, square), crop(photo.hole, square), size) for square in squares]
    images, holes = (torch.from_numpy(np.stack(arrays)) for arrays in zip(*pairs, strict=True))
    return Cut(squares, owner, images.permute(0, 3, 1, 2).contiguous(), holes[:, None])


def paste(photo: Photo, cut: Cut, images: Tensor, raw: Tensor) -> np.ndarray:
    """The photo's pixels with the hole of each region from its filled square; images, raw (r, 3, S, S) as of `Filled`.

    Lanczos brings a square back to its size. Before that, where it had been shrunk, the decoder's colours are moved to
    meet the known ones at the rim of the hole, less and less so inwards.
    """
    pixels = photo.pixels.copy()
    for number, (square, image, decoded) in enumerate(zip(cut.squares, images, raw, strict=True), start=1):
        hole, filled = cut.hole[number - 1, 0].numpy(), to_pixels(image)
        if square.side != len(hole):
            filled = fit_rim(filled, to_pixels(decoded), hole)
            shape = (square.side, square.side)
            filled = np.asarray(Image.fromarray(filled).resize(shape, Image.Resampling.LANCZOS))
        rows, cols = inside(square, photo.hole.shape)
        mine = cut.owner[rows, cols] == number
        top, left = rows.start - square.top, cols.start - square.left
        part = filled[top : top + mine.shape[0], left : left + mine.shape[1]]
        pixels[rows, cols][mine] = part[mine]
    return pixels


# --- files ---


def pair_photos(image, mask, out) -> list[tuple[Path, Path | None, Path]]:
    """(picture, its mask if any, file of the result), of one picture or of all in a folder, paired as `data.pair` does.

    `out` with a suffix is the result of one picture, else the folder of NAME.png. Raises ValueError naming what does
    not fit.
    """
    image, mask, out = Path(image), mask and Path(mask), Path(out)
    if mask and mask.is_dir() != image.is_dir():
        raise ValueError(f"{image} and its mask {mask}: expected two files or two folders")
    if not image.is_dir():
        target = out / f"{image.stem}.png" if out.is_dir() or not out.suffix else out
        format_of(target)
        return [(image, mask, target)]
    if out.suffix.lower() in FORMATS:
        raise ValueError(f"{out}: expected a folder for the results, as {image} is one")
    images = list_images(image, FORMATS.keys())
    if len({path.stem for path in images}) < len(images):
        raise ValueError(f"{image}: two images of one name but for their ending would overwrite each other")
    pairs = pair(images, list_images(mask, FORMATS.keys())) if mask else [(path, None) for path in images]
    return [(path, other, out / f"{path.stem}.png") for path, other in pairs]


# --- writing ---


def write_photo(path, photo: Photo, pixels: np.ndarray) -> list[str]:
    """Writes the photo with `pixels` in its hole, in its own mode where the suffix's format has it, and returns notes.

    Size, orientation and colour profile are the file's; known values are bit-identical in lossless formats.
    Raises ValueError naming the file: an unknown suffix, the photo's own file, or one that cannot be written.
    """
    if Path(path).exists() and Path(photo.name).exists() and Path(path).samefile(photo.name):
        raise ValueError(f"{path}: is the picture itself, expected another name for the result")
    return write_picture(path, photo.picture.filled(pixels, photo.hole))
