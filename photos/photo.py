"""A photo: a picture of any size and its hole. Reading the two, pairing their files, writing the result.

    photo = read_photo("photo.jpg", mask="mask.png")
    (pixels,), notes = fill_photo(inpainter, photo)
    write_photo("filled.png", photo, pixels)

    pixels  (H, W, 3) uint8   RGB, upright
    hole    (H, W) bool       upright, True = missing

Known pixels are never changed. What the user should know comes back as notes, lines of text; nothing is printed.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from scipy import ndimage

from maskgit.data import as_hole, list_images, open_upright, pair, readable, refuse_overwriting
from maskgit.masks import EIGHT_NEIGHBOURS
from maskgit.pyramid import around
from photos.image_file import FORMATS, ImageFile, format_of, read_image_file, write_image_file
from utils import check_folder

READ = (*FORMATS, *((".heic", ".heif") if "HEIF" in Image.OPEN else ()))  # suffixes of the pictures in a folder
TOLERANCE = 16  # how far from the hole's colour, in each channel, the values of a lossy file may be
LOOKED_AT = 1_000_000  # pixels, about, in search of signs that hole and known were mistaken for each other
SPECK = 16  # fewer pixels than these, in a lossy file, have the hole's colour by chance


@dataclass(frozen=True, eq=False)
class Photo:
    """A picture and its hole. `pixels` may have any colour in the hole: the result does not depend on it."""

    pixels: np.ndarray  # (H, W, 3) uint8
    hole: np.ndarray  # (H, W) bool
    file: ImageFile  # what it was read from
    name: str  # of the file, for messages
    notes: list[str]  # what the user should know


# --- reading ---


def read_photo(image, mask=None, hole_color=None, box=None) -> Photo:
    """The picture `image` and its hole, from exactly one source; image and mask are paths or Pillow pictures;
    the image may be an `ImageFile` that is read already.

    mask: 0 = hole, 255 = known, anything between goes by 128; hole_color: (r, g, b), 0..255, exact, or nearly so where
    the file is lossy; box: (x, y, width, height) in pixels; none of them: the transparent part, alpha < 128.
    Raises ValueError, one line, naming the file: not readable, no source or several, another size, no hole, all hole.
    """
    file = image if isinstance(image, ImageFile) else read_image_file(image)
    pixels, name = file.rgb(), file.name
    notes = list(file.notes)
    sources = {"a mask": mask, "a hole colour": hole_color, "a box": box}
    given = [source for source, value in sources.items() if value is not None]
    if len(given) > 1:
        raise ValueError(f"{name}: its hole is told by {' and by '.join(given)}, expected one of them")
    if mask is not None:
        where, hole = _mask(mask, name, pixels)
    elif hole_color is not None:
        where, hole = f"{name}: pixels of colour {_text(hole_color)}", _colour(pixels, hole_color, file.lossy)
        if file.lossy:
            notes.append(f"{where}: {100 * hole.mean():.1f} % of the picture, known ones of a like colour among them "
                         "as compression blurs colours; a mask is exact")  # fmt: skip
    elif box is not None:
        where, hole = f"{name}: box {_text(box)}", _box(box, name, pixels)
    elif (alpha := file.alpha()) is not None:
        where, hole = f"{name}: transparent part", alpha < 128
    else:
        raise ValueError(f"{name}: no hole: expected a mask, a hole colour, a box or a transparent part")
    if not hole.any():
        raise ValueError(f"{where}: an empty hole, expected at least one pixel")
    if hole.all():
        raise ValueError(f"{where}: the hole is the whole picture, expected some known pixels")
    notes += _doubts(where, pixels, hole, mask is not None, file.lossy)
    return Photo(pixels, hole, file, name, notes)


def grown(photo: Photo, pixels: int) -> Photo:
    """The photo with its hole grown by so many pixels, in all directions. Raises ValueError where nothing is left."""
    if not pixels:
        return photo
    hole = _within(photo.hole, pixels)
    if hole.all():
        raise ValueError(f"{photo.name}: grown by {pixels} pixels the hole is the whole picture")
    return replace(photo, hole=hole)


def _within(hole: np.ndarray, pixels: int) -> np.ndarray:
    """The hole (H, W) and what is at most so many pixels from it."""
    near, found = around(hole, pixels), np.zeros_like(hole)
    found[near] = ndimage.distance_transform_edt(~hole[near]) <= pixels
    return found


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
    with readable(where):
        return where, as_hole(picture)


def _colour(pixels: np.ndarray, colour, lossy: bool) -> np.ndarray:
    if len(colour) != 3 or min(colour) < 0 or max(colour) > 255:
        raise ValueError(f"hole colour {_text(colour)}: expected r,g,b, each 0..255")
    far = np.abs(pixels.astype(np.int16) - np.array(colour, dtype=np.int16)).max(axis=2)
    if not lossy:
        return far == 0
    # compression mixes the colours of neighbours: a few pixels are no hole, and a hole is not its colour near its rim
    labels, count = ndimage.label(far <= TOLERANCE, EIGHT_NEIGHBOURS)
    large = np.bincount(labels.ravel(), minlength=count + 1) >= SPECK
    large[0] = False
    near = ndimage.binary_dilation(large[labels], EIGHT_NEIGHBOURS, iterations=3, mask=far <= 6 * TOLERANCE)
    return ndimage.binary_dilation(near, EIGHT_NEIGHBOURS)


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
    every = max(1, len(hole) * hole.shape[1] // LOOKED_AT)  # row: a large picture is not looked at as a whole
    known = pixels[::every][~hole[::every]].astype(np.int16)
    known = known if len(known) else pixels[~hole].astype(np.int16)
    colour = np.median(known, axis=0)
    spread = TOLERANCE if lossy else 0
    flat = np.mean(np.abs(known - colour).max(axis=1) <= spread) > 0.99
    if masked and flat and np.ptp(pixels[hole].astype(np.int16), axis=0).max() > 2 * spread:
        notes.append(f"{where}: all that it calls known has the colour {_text(colour.astype(int))}, "
                     "as if painted to be the hole; is it the wrong way round?")  # fmt: skip
    return notes


# --- files ---


def pair_photos(image, mask, out, samples: int = 1) -> list[tuple[Path, Path | None, list[Path]]]:
    """(picture, its mask if any, files of its `samples` results), of one picture or of all in a folder, paired as
    `data.pair` does.

    `out` with a suffix is the result of one picture, else the folder of NAME.png; several are NAME_0.png ... Raises
    ValueError naming what does not fit, and a result that is a picture or a mask.
    """
    image, mask, out = Path(image), mask and Path(mask), Path(out)
    if mask and mask.is_dir() != image.is_dir():
        for path in (image, mask):
            if not path.exists():
                raise ValueError(f"{path}: no such picture or folder")
        raise ValueError(f"{image} and its mask {mask}: expected two files or two folders")
    if image.is_dir():
        if out.suffix.lower() in FORMATS:
            raise ValueError(f"{out}: expected a folder for the results, as {image} is one")
        images = list_images(image, READ)
        if len({path.stem for path in images}) < len(images):
            raise ValueError(f"{image}: two images of one name but for their ending would overwrite each other")
        refuse_overwriting([image, *filter(None, [mask])], [out])
        pairs = pair(images, list_images(mask, READ)) if mask else [(path, None) for path in images]
        jobs = [(path, other, out / f"{path.stem}.png") for path, other in pairs]
    else:
        target = out / f"{image.stem}.png" if out.is_dir() or not out.suffix else out
        format_of(target)
        jobs = [(image, mask, target)]
    for folder in {target.parent for *_, target in jobs}:
        check_folder(folder, "--out")
    numbers = [f"_{number}" for number in range(samples)] if samples > 1 else [""]
    jobs = [(*given, [target.with_stem(target.stem + number) for number in numbers]) for *given, target in jobs]
    refuse_overwriting(
        (path for picture, other, _ in jobs for path in (picture, other) if path),
        (path for *_, targets in jobs for path in targets),
    )
    return jobs


# --- writing ---


def write_photo(path, photo: Photo, pixels: np.ndarray, feather: int = 0) -> list[str]:
    """Writes the photo with `pixels` in its hole and `feather` pixels around it, in its own mode where the suffix's
    format has it, and returns notes.

    Size, orientation and colour profile are the file's; known values are bit-identical in lossless formats.
    Raises ValueError naming the file: an unknown suffix, the photo's own file, or one that cannot be written.
    """
    refuse_overwriting([Path(photo.name)], [Path(path)])
    beside = ~photo.hole & _within(photo.hole, feather) if feather else None
    filled = photo.file.filled(pixels, photo.hole, beside)
    del pixels  # of a large picture, which nobody else may have either
    return write_image_file(path, filled)
