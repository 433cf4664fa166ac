"""A picture file as it is: its values in its own mode, a view of them as RGB, and the way back into a file.

    stored  (H, W) or (H, W, C)   the file's own values, as they lie in it: bool, uint8 or uint16
    pixels  (H, W, 3) uint8       RGB, turned upright as the EXIF orientation says
    alpha   (H, W) uint8          upright, 255 = opaque
    hole    (H, W) bool           upright, True = missing

Only values in the hole are ever converted, so that those of known pixels come back bit for bit.
"""

import contextlib
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image, PngImagePlugin
from scipy.spatial import KDTree
from torchvision.io import decode_image

from files import replace_file
from maskgit.data import opened, readable

ORIENTATION = 0x0112  # the EXIF tag
# EXIF orientation: are rows and columns exchanged, and which axes are flipped then, on the way to upright
TURNS = {
    1: (False, ()), 2: (False, (1,)), 3: (False, (0, 1)), 4: (False, (0,)),
    5: (True, ()), 6: (True, (1,)), 7: (True, (0, 1)), 8: (True, (0,)),
}  # fmt: skip
MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK")  # Pillow's, kept as they are; 16-bit greys are I;16 here
DEEP = {2: "LA;16", 3: "RGB;16", 4: "RGBA;16"}  # channels -> 16 bits each, which Pillow lacks
RARE = {"PA": "RGBA", "RGBa": "RGBA", "La": "LA", "RGBX": "RGB", "YCbCr": "RGB", "HSV": "RGB"}  # read as the latter


class Format(NamedTuple):
    """A kind of file that can be written."""

    name: str  # Pillow's
    modes: tuple[str, ...]
    options: dict  # of Pillow's save
    turns: bool = True  # whether viewers heed its EXIF orientation


JPEG = Format("JPEG", ("L", "RGB", "CMYK"), {"quality": 95, "subsampling": 0})
TIFF = Format("TIFF", (*MODES, "I;16"), {"compression": "tiff_deflate"}, turns=False)
FORMATS = {
    ".png": Format("PNG", ("1", "L", "LA", "P", "RGB", "RGBA", "I;16", *DEEP.values()), {}),
    ".jpg": JPEG,
    ".jpeg": JPEG,
    ".webp": Format("WEBP", ("RGB", "RGBA"), {"lossless": True, "exact": True}),
    ".bmp": Format("BMP", ("1", "L", "P", "RGB"), {}, turns=False),
    ".tif": TIFF,
    ".tiff": TIFF,
}
COLOUR = (b"gAMA", b"cHRM", b"sRGB", b"cICP")  # chunks of a PNG that tell what its values mean
MAKER_NOTE = 0x927C  # an EXIF tag in which cameras keep, among others, previews
LOSSY = ("JPEG", "MPO", "WEBP", "AVIF", "HEIF", "JPEG2000")  # or perhaps so


def turn(array: np.ndarray, orientation: int) -> np.ndarray:
    """(H, W, ...) as it lies in the file -> upright."""
    exchanged, flipped = TURNS[orientation]
    return np.flip(array.swapaxes(0, 1) if exchanged else array, flipped)


def turn_back(array: np.ndarray, orientation: int) -> np.ndarray:
    """The inverse of `turn`."""
    exchanged, flipped = TURNS[orientation]
    array = np.flip(array, flipped)
    return array.swapaxes(0, 1) if exchanged else array


@dataclass(frozen=True, eq=False)
class ImageFile:
    """A picture file, decoded: all that is needed to write it back."""

    name: str  # of the file, for messages
    mode: str  # one of MODES, I;16 or one of DEEP
    stored: np.ndarray
    orientation: int = 1
    palette: np.ndarray | None = None  # (k, 4) uint8, RGBA
    key: int | tuple[int, ...] | None = None  # the stored value that stands for transparent
    lossy: bool = False  # values near each other may have been one before the file was written
    icc: bytes | None = None
    exif: bytes | None = None
    dpi: tuple[float, float] | None = None
    chunks: tuple[tuple[bytes, bytes], ...] = ()  # those of COLOUR, name and content
    notes: tuple[str, ...] = ()  # what the user should know

    def rgb(self) -> np.ndarray:
        """pixels; CMYK by Pillow's plain formula, without the colour profile."""
        values = self.stored // 257 if self.stored.dtype == np.uint16 else self.stored
        if self.mode == "P":
            values = self.palette[values]
        elif self.mode == "CMYK":
            values = np.asarray(_image("CMYK", values).convert("RGB"))
        elif self.mode == "1":
            values = values * 255
        values = np.atleast_3d(values).astype(np.uint8, copy=False)
        colour = values[..., :3] if values.shape[2] > 2 else values[..., :1].repeat(3, axis=2)
        return np.ascontiguousarray(turn(colour, self.orientation))

    def alpha(self) -> np.ndarray | None:
        """alpha, or None where the picture has nothing of the kind."""
        if self.mode == "P":
            alpha = self.palette[self.stored, 3]
        elif self.mode.startswith(("LA", "RGBA")):
            alpha = self.stored[..., -1]
            alpha = alpha // 257 if alpha.dtype == np.uint16 else alpha
        elif self.key is not None:
            alpha = np.where((np.atleast_3d(self.stored) == self.key).all(axis=2), 0, 255)
        else:
            return None
        return np.ascontiguousarray(turn(alpha, self.orientation).astype(np.uint8))

    def filled(self, pixels: np.ndarray, hole: np.ndarray, beside: np.ndarray | None = None) -> "ImageFile":
        """This picture with `pixels` where the hole is, opaque and in its own mode, and in `beside` (H, W) bool, which
        stays as transparent as it is; everything else bit-identical."""
        pixels, stored = turn_back(pixels, self.orientation), self.stored.copy()
        if beside is not None:
            beside = turn_back(beside, self.orientation)
            values = self._own_values(pixels[beside])
            if self.mode.partition(";")[0] in ("LA", "RGBA"):
                values[:, -1] = stored[beside][:, -1]
            stored[beside] = values
        hole = turn_back(hole, self.orientation)
        stored[hole] = self._own_values(pixels[hole])
        return replace(self, stored=stored)

    def _own_values(self, colours: np.ndarray) -> np.ndarray:
        """colours (n, 3) uint8 -> stored values (n) or (n, C); the nearest ones where the mode has fewer."""
        if self.mode == "P":
            ids = np.flatnonzero(self.palette[:, 3] == 255)
            ids = ids if len(ids) else np.arange(len(self.palette))
            return ids[KDTree(self.palette[ids, :3]).query(colours)[1]].astype(np.uint8)
        kind, line = self.mode.partition(";")[0], Image.fromarray(colours[None])
        mode = {"1": "L", "I": "L", "LA": "L", "RGBA": "RGB"}.get(kind, kind)
        values = np.asarray(line.convert(mode)).reshape(len(colours), -1)
        if kind in ("LA", "RGBA"):
            values = np.insert(values, values.shape[1], 255, axis=1)
        if kind == "1":
            values = values >= 128
        if self.stored.dtype == np.uint16:
            values = values.astype(np.uint16) * 257
        values = values.copy()
        if self.key is not None:
            values[(values == self.key).all(axis=1)] ^= values.dtype.type(1)  # by chance: it would be transparent
        return values.reshape(-1, *self.stored.shape[2:])


# --- reading ---


def read_image_file(source) -> ImageFile:
    """A file, or a Pillow picture. Raises ValueError naming the file that cannot be read, or whose mode has no RGB."""
    given = isinstance(source, Image.Image)
    name = (getattr(source, "filename", "") or "the picture") if given else str(source)
    with _given(source, name) if given else opened(source) as image:
        deep = not image.mode.startswith("I") and ";16" in str(getattr(image, "tile", ""))
        frames = getattr(image, "n_frames", 1)
        image.load()
        kind = image.format
        chunks = _colour_chunks(name) if kind == "PNG" and not given else ()
        orientation, exif, notes = _tags(name, image)
        stored = decode_image(name).permute(1, 2, 0).numpy() if deep and kind == "PNG" and not given else None
    if frames > 1 and kind != "MPO":  # whose others are previews
        notes.append(f"{name}: the first of {frames} pictures in it")
    if deep and stored is None:
        notes.append(f"{name}: 16 bits a colour are read as 8; a PNG keeps them")
    mode = image.mode if stored is None else DEEP[stored.shape[2]]
    if stored is None:
        mode, stored, image = _values(name, image)
    return ImageFile(
        name=name,
        mode=mode,
        stored=stored,
        orientation=orientation,
        palette=_palette(image) if mode == "P" else None,
        key=image.info.get("transparency") if mode in ("1", "L", "I;16", "RGB", "RGB;16") else None,
        lossy=kind in LOSSY,
        icc=image.info.get("icc_profile"),
        exif=exif,
        dpi=image.info.get("dpi"),
        chunks=chunks,
        notes=tuple(notes),
    )


@contextlib.contextmanager
def _given(picture: Image.Image, name: str) -> Iterator[Image.Image]:
    with readable(name):
        yield picture


def _tags(name: str, image: Image.Image) -> tuple[int, bytes | None, list[str]]:
    """The orientation, the EXIF tags without the thumbnail, which would still show what was in the hole, and notes."""
    tags = image.getexif()
    orientation = tags.get(ORIENTATION) if tags.get(ORIENTATION) in TURNS else 1
    if not dict(tags) or image.format == "TIFF":  # whose tags also say where in the file its pixels lie
        return orientation, None, []
    notes = []
    if ExifTags.IFD.Exif in tags and tags.get_ifd(ExifTags.IFD.Exif).pop(MAKER_NOTE, None):
        notes.append(f"{name}: the maker's note in its EXIF tags, which may show what was in the hole, is left out")
    try:
        return orientation, tags.tobytes(), notes
    except (ValueError, TypeError, KeyError, struct.error) as error:
        return orientation, None, [f"{name}: its EXIF tags cannot be kept ({error})"]


def _colour_chunks(path: str) -> tuple[tuple[bytes, bytes], ...]:
    """Those of COLOUR in a PNG file that Pillow has read."""
    found = []
    with open(path, "rb") as file:
        file.seek(8)
        while len(head := file.read(8)) == 8 and head[4:] != b"IDAT":
            content = file.read(struct.unpack(">I", head[:4])[0])
            file.seek(4, 1)  # its checksum
            if head[4:] in COLOUR:
                found.append((head[4:], content))
    return tuple(found)


def _values(name: str, image: Image.Image) -> tuple[str, np.ndarray, Image.Image]:
    """mode, stored and the picture that has them."""
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"{name}: grey values {values.min()}..{values.max()}, expected 0..65535")
        return "I;16", values.astype(np.uint16), image
    image = image.convert(RARE[image.mode]) if image.mode in RARE else image
    if image.mode not in MODES:
        raise ValueError(f"{name}: a picture of Pillow's mode {image.mode}, expected one of {', '.join(MODES)}, I;16")
    return image.mode, np.asarray(image), image


def _palette(image: Image.Image) -> np.ndarray:
    """(k, 4) uint8: the colours of a picture with a palette, RGBA whatever the file tells of transparency."""
    ramp = image.resize((256, 1), Image.Resampling.NEAREST)  # keeps the palette
    ramp.frombytes(bytes(range(256)))
    used = max(len(image.getpalette()) // 3, image.getextrema()[1] + 1)
    return np.array(ramp.convert("RGBA"))[0, :used]


# --- writing ---


def format_of(path) -> Format:
    """The kind of file that a name's suffix asks for. Raises ValueError that lists the known ones."""
    suffix = Path(path).suffix.lower()
    if suffix not in FORMATS:
        raise ValueError(f"{path}: unknown kind of picture {suffix!r}, expected one of {', '.join(FORMATS)}")
    return FORMATS[suffix]


def write_image_file(path, picture: ImageFile) -> list[str]:
    """Writes `picture` in the format of the suffix, in its mode where that format has it; the folder is made.

    Returns what the user should know of that: other modes, lost transparency, changed values.
    Raises ValueError naming the file for an unknown suffix or where it cannot be written.
    """
    kind = format_of(path)
    picture, notes = _fit(path, picture, kind)
    if not kind.turns:
        picture = replace(picture, stored=turn(picture.stored, picture.orientation), orientation=1)
    if picture.chunks and kind.name != "PNG":
        told = ", ".join(name.decode() for name, _ in picture.chunks)
        notes.append(f"{path}: {kind.name} does not keep what the PNG said of its colours ({told})")
    if kind is JPEG:
        notes.append(f"{path}: JPEG changes known pixels a little as well; PNG keeps them as they were")
    try:
        if picture.mode in DEEP.values():
            content = _deep_png(picture)
            replace_file(path, lambda temporary: temporary.write_bytes(content))
        else:
            try:
                replace_file(path, lambda temporary: _save(temporary, picture, kind))
            except RuntimeError:  # of libtiff, for tags that cameras write
                if not picture.exif:
                    raise
                picture = replace(picture, exif=None)
                notes.append(f"{path}: {kind.name} does not keep the EXIF tags")
                replace_file(path, lambda temporary: _save(temporary, picture, kind))
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path}: cannot be written ({error})") from error
    return notes


def _fit(path, picture: ImageFile, kind: Format) -> tuple[ImageFile, list[str]]:
    """The picture in a mode that this kind of file holds, and notes."""
    alpha = picture.alpha()
    alpha = None if alpha is None or (alpha == 255).all() else alpha
    sees_through = alpha is None or picture.mode in ("LA", "RGBA") or kind.name == "PNG"
    if picture.mode in kind.modes and sees_through:
        return picture, []
    mode = "RGBA" if alpha is not None and "RGBA" in kind.modes else "RGB"
    upright = replace(picture, orientation=1)
    values = [upright.rgb()] + ([upright.alpha()] if mode == "RGBA" else [])
    notes = [f"{path}: {kind.name} cannot hold this picture's {picture.mode}, saved as {mode} of 8 bits"]
    if alpha is not None and mode == "RGB":
        notes.append(f"{path}: {kind.name} has no transparency, what was transparent is opaque now")
    icc = picture.icc if picture.mode.startswith(("RGB", "P")) else None  # a profile is for one kind of colours
    return replace(picture, mode=mode, stored=np.dstack(values), palette=None, key=None, icc=icc), notes


def _image(mode: str, stored: np.ndarray) -> Image.Image:
    """Pillow's picture of these very values."""
    packed = np.packbits(stored, axis=1) if mode == "1" else stored
    return Image.frombytes(mode, stored.shape[1::-1], np.ascontiguousarray(packed).data)


def _exif(picture: ImageFile) -> bytes | None:
    """The tags with the orientation in which the picture is stored."""
    if picture.exif is None and picture.orientation == 1:
        return None
    tags = Image.Exif()
    tags.load(picture.exif or b"")
    if picture.orientation != 1 or ORIENTATION in tags:
        tags[ORIENTATION] = picture.orientation
    return tags.tobytes()


def _save(path, picture: ImageFile, kind: Format) -> None:
    image = _image(picture.mode, picture.stored)
    options = {"icc_profile": picture.icc, "exif": _exif(picture), "dpi": picture.dpi, "transparency": picture.key}
    if picture.mode == "P":
        image.putpalette(picture.palette[:, :3].tobytes())
        if (picture.palette[:, 3] < 255).any():
            options["transparency"] = picture.palette[:, 3].tobytes()
    if kind.name == "PNG" and picture.chunks:
        options["pnginfo"] = PngImagePlugin.PngInfo()
        for name, content in picture.chunks:
            options["pnginfo"].add(name, content)
    options = {name: value for name, value in options.items() if value is not None}
    image.save(path, kind.name, **kind.options, **options)


def _deep_png(picture: ImageFile) -> bytes:
    """A PNG file of 16 bits a channel (ISO/IEC 15948), every row told as its difference to the one above."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    height, width, channels = picture.stored.shape
    rows = np.frombuffer(picture.stored.astype(">u2").tobytes(), np.uint8).reshape(height, -1)
    above = np.vstack([np.zeros_like(rows[:1]), rows[:-1]])
    lines = np.insert(rows - above, 0, 2, axis=1)  # 2: the filter "up", modulo 256
    colour = {2: 4, 3: 2, 4: 6}[channels]
    chunks = [chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0))]
    chunks += [chunk(*given) for given in picture.chunks if not (picture.icc and given[0] == b"sRGB")]
    if picture.icc:
        chunks.append(chunk(b"iCCP", b"icc\0\0" + zlib.compress(picture.icc)))
    if picture.key is not None:
        chunks.append(chunk(b"tRNS", struct.pack(">3H", *picture.key)))
    if exif := _exif(picture):
        chunks.append(chunk(b"eXIf", exif.removeprefix(b"Exif\0\0")))
    chunks += [chunk(b"IDAT", zlib.compress(lines.tobytes())), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)
