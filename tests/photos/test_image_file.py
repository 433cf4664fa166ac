"""photos/image_file.py: every mode, orientation and kind of file comes back bit for bit but for the hole."""

import io
import struct
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps, PngImagePlugin
from torchvision.io import decode_image

from photos import image_file
from photos.image_file import FORMATS, format_of, read_image_file, turn, turn_back, write_image_file

H, W = 7, 5
RNG = np.random.default_rng(0)
NOISE = RNG.integers(256, size=(H, W, 4), dtype=np.uint8)
HOLE = np.zeros((H, W), dtype=bool)
HOLE[2:5, 1:4] = True
NEW = RNG.integers(256, size=(H, W, 3), dtype=np.uint8)
ICC = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def example(mode: str) -> Image.Image:
    """A picture of noise in `mode`."""
    if mode == "I;16":
        return Image.fromarray(RNG.integers(65536, size=(H, W)).astype(np.uint16))
    if mode in ("RGBA", "LA"):
        return Image.merge(mode, [Image.fromarray(NOISE[..., i].copy()) for i in range(len(mode))])
    return Image.fromarray(NOISE[..., :3].copy()).convert(mode)


def deep(path, channels: int, **info):
    """A 16-bit PNG of noise, and its values (H, W, channels)."""
    values = RNG.integers(65536, size=(H, W, channels)).astype(np.uint16)
    picture = image_file.ImageFile("made", image_file.DEEP[channels], values, **info)
    path.write_bytes(image_file._deep_png(picture))
    return values


def stored(path) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image)


# --- there and back ---

MODES = [(mode, ".png") for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")]
MODES += [(mode, ".tif") for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16", "CMYK")]
MODES += [(mode, ".bmp") for mode in ("1", "L", "P", "RGB")] + [("RGB", ".webp"), ("RGBA", ".webp")]


@pytest.mark.parametrize(("mode", "suffix"), MODES)
def test_known_values_stay_in_the_files_own_mode_and_the_hole_takes_the_nearest(tmp_path, mode, suffix):
    source, result = tmp_path / f"in{suffix}", tmp_path / f"new/out{suffix}"
    image = example(mode)
    image.save(
        source, **({"lossless": True, "exact": True} if suffix == ".webp" else {}), icc_profile=ICC, dpi=(72, 72)
    )
    picture = read_image_file(source)
    assert (picture.mode, picture.notes) == (mode, ())
    with Image.open(source) as file:
        before = np.array(file)
        if mode not in ("LA", "RGBA", "I;16"):
            assert np.array_equal(picture.rgb(), np.array(file.convert("RGB")))
    assert picture.rgb().dtype == np.uint8 and picture.rgb().shape == (H, W, 3)
    assert write_image_file(result, picture.filled(NEW, HOLE)) == []
    with Image.open(result) as file:
        assert file.mode == mode
        assert file.info.get("icc_profile") == (ICC if suffix != ".bmp" else None)
    after = stored(result)
    assert np.array_equal(after[~HOLE], before[~HOLE]) and (after[HOLE] != before[HOLE]).any()
    again = read_image_file(result).rgb()
    if mode in ("RGB", "RGBA", "CMYK"):
        assert np.array_equal(again[HOLE], NEW[HOLE])
    elif mode != "1" and mode != "P":
        grey = np.array(Image.fromarray(NEW).convert("L"))
        assert np.array_equal(again[HOLE], np.dstack([grey] * 3)[HOLE])
    if mode in ("LA", "RGBA"):
        assert (after[HOLE][:, -1] == 255).all()


@pytest.mark.parametrize("channels", [2, 3, 4])
@pytest.mark.parametrize("orientation", [1, 6])
def test_sixteen_bits_a_colour_stay(tmp_path, channels, orientation):
    tags = Image.Exif()
    tags[image_file.ORIENTATION] = orientation
    values = deep(tmp_path / "in.png", channels, icc=ICC, exif=tags.tobytes(), orientation=orientation)
    picture = read_image_file(tmp_path / "in.png")
    assert np.array_equal(picture.stored, values) and picture.orientation == orientation and picture.icc == ICC
    hole, new = turn(HOLE, orientation), np.ascontiguousarray(turn(NEW, orientation))
    assert write_image_file(tmp_path / "out.png", picture.filled(new, hole)) == []
    after = decode_image(str(tmp_path / "out.png")).permute(1, 2, 0).numpy()
    assert after.dtype == np.uint16 and np.array_equal(after[~HOLE], values[~HOLE])
    if channels > 2:
        assert np.array_equal(after[HOLE][:, :3], NEW[HOLE].astype(np.uint16) * 257)
    if channels != 3:
        assert (after[HOLE][:, -1] == 65535).all()
        assert np.array_equal(picture.alpha(), turn(values[..., -1] // 257, orientation))
    with Image.open(tmp_path / "out.png") as file:  # Pillow finds the chunks in order, too
        assert file.getexif().get(image_file.ORIENTATION) == orientation and file.info["icc_profile"] == ICC
        assert file.size == (W, H)


def test_sixteen_bits_are_read_as_eight_where_there_is_no_other_way_and_a_note_says_so(tmp_path):
    deep(tmp_path / "in.png", 3)
    with Image.open(tmp_path / "in.png") as image:
        picture = read_image_file(image)
    assert picture.mode == "RGB" and "in.png: 16 bits a colour are read as 8" in picture.notes[0]
    notes = write_image_file(tmp_path / "out.webp", read_image_file(tmp_path / "in.png"))
    assert notes == [f"{tmp_path / 'out.webp'}: WEBP cannot hold this picture's RGB;16, saved as RGB of 8 bits"]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".png", ".webp", ".tif", ".bmp"])
def test_pictures_are_upright_to_us_and_lie_in_the_file_as_before(tmp_path, orientation, suffix):
    tags = Image.Exif()
    tags[image_file.ORIENTATION], tags[0x010F] = orientation, "Maker"
    example("RGB").save(tmp_path / "in.png", exif=tags)
    picture = read_image_file(tmp_path / "in.png")
    with Image.open(tmp_path / "in.png") as file:
        upright = np.array(ImageOps.exif_transpose(file))
    assert np.array_equal(picture.rgb(), upright)
    hole, new = turn(HOLE, orientation), np.ascontiguousarray(turn(NEW, orientation))
    write_image_file(tmp_path / f"out{suffix}", picture.filled(new, hole))
    with Image.open(tmp_path / f"out{suffix}") as file:
        lies, maker = np.array(file), file.getexif().get(0x010F)
        shown = np.array(ImageOps.exif_transpose(file))
    assert np.array_equal(shown, np.where(hole[..., None], new, upright))
    if suffix in (".png", ".webp"):
        assert np.array_equal(lies, np.where(HOLE[..., None], NEW, NOISE[..., :3]))
    assert maker == (None if suffix == ".bmp" else "Maker")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_turning_back_is_the_inverse(orientation):
    assert np.array_equal(turn_back(turn(NEW, orientation), orientation), NEW)


@pytest.mark.parametrize("orientation", [0, 9, "up"])
def test_an_orientation_that_is_none_is_upright(tmp_path, orientation):
    image = example("RGB")
    image.getexif()[image_file.ORIENTATION] = orientation
    assert np.array_equal(read_image_file(image).rgb(), NOISE[..., :3])


def test_a_tiff_on_its_side_is_written_upright(tmp_path):
    tags = Image.Exif()
    tags[image_file.ORIENTATION] = 6
    example("RGB").save(tmp_path / "in.tif", exif=tags)
    picture = read_image_file(tmp_path / "in.tif")
    assert picture.rgb().shape == (W, H, 3)
    write_image_file(tmp_path / "out.tif", picture)
    with Image.open(tmp_path / "out.tif") as file:
        assert np.array_equal(np.array(ImageOps.exif_transpose(file)), turn(NOISE[..., :3], 6))


def test_the_thumbnail_goes_and_odd_tags_are_told(tmp_path, monkeypatch):
    tags = Image.Exif()
    tags[0x010F] = "Maker"
    tags.get_ifd(0x8769)[0x9286] = b"a comment"
    tags.get_ifd(1)[0x0201] = 100  # IFD1: the thumbnail's
    image = example("RGB")
    image.save(tmp_path / "in.jpg", exif=tags)
    write_image_file(tmp_path / "out.png", read_image_file(tmp_path / "in.jpg"))
    with Image.open(tmp_path / "out.png") as file:
        exif = file.getexif()
        assert exif[0x010F] == "Maker" and exif.get_ifd(0x8769)[0x9286] == b"a comment" and not exif.get_ifd(1)

    def broken(self, offset=8):
        raise struct.error("odd")

    monkeypatch.setattr(Image.Exif, "tobytes", broken)
    picture = read_image_file(tmp_path / "in.jpg")
    assert picture.exif is None and picture.notes == (f"{tmp_path / 'in.jpg'}: its EXIF tags cannot be kept (odd)",)


# --- transparency and palettes ---


def test_a_palette_keeps_its_indices_and_the_hole_never_a_transparent_one(tmp_path):
    image = Image.fromarray(RNG.integers(4, size=(H, W)).astype(np.uint8), "P")
    colours = [(250, 0, 0), (0, 250, 0), (0, 0, 250), (9, 9, 9)]
    image.putpalette([part for colour in colours for part in colour])
    image.save(tmp_path / "in.png", transparency=bytes([255, 0, 255, 255]))
    picture = read_image_file(tmp_path / "in.png")
    assert picture.palette.tolist() == [[250, 0, 0, 255], [0, 250, 0, 0], [0, 0, 250, 255], [9, 9, 9, 255]]
    assert np.array_equal(picture.alpha() == 0, np.array(image) == 1)
    green = np.full((H, W, 3), (1, 240, 1), np.uint8)
    write_image_file(tmp_path / "out.png", picture.filled(green, HOLE))
    with Image.open(tmp_path / "out.png") as file:
        assert file.info["transparency"] == 1 or file.info["transparency"][1] == 0
    after = stored(tmp_path / "out.png")
    assert (after[HOLE] == 3).all() and np.array_equal(after[~HOLE], np.array(image)[~HOLE])
    clear = np.zeros((4, 4), np.uint8)
    clear = image_file.replace(picture, palette=np.hstack([picture.palette[:, :3], clear[:, :1]]))
    assert (clear.filled(green, HOLE).stored[HOLE] == 1).all()  # all are transparent: the nearest


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "I;16"])
def test_a_colour_that_stands_for_transparent_does_so_for_known_pixels_alone(tmp_path, mode):
    image = example(mode)
    first = np.array(image)[0, 0]
    key = tuple(int(x) for x in first) if mode == "RGB" else int(first)
    image.save(tmp_path / "in.png", transparency=key)
    picture = read_image_file(tmp_path / "in.png")
    alpha = picture.alpha()
    assert alpha[0, 0] == 0 and set(np.unique(alpha)) == {0, 255}
    shade = picture.rgb()[0, 0]  # a filling of the very colour
    filled = picture.filled(np.broadcast_to(shade, (H, W, 3)).copy(), HOLE)
    assert (filled.alpha()[HOLE] == 255).all() or mode == "I;16"
    assert write_image_file(tmp_path / "out.png", filled) == []
    assert np.array_equal(read_image_file(tmp_path / "out.png").alpha()[~HOLE], alpha[~HOLE])


def test_a_deep_colour_that_stands_for_transparent(tmp_path):
    values = deep(tmp_path / "in.png", 3)
    picture = image_file.replace(read_image_file(tmp_path / "in.png"), key=tuple(int(x) for x in values[0, 0]))
    write_image_file(tmp_path / "out.png", picture)
    again = read_image_file(tmp_path / "out.png")
    assert again.key == picture.key and again.alpha()[0, 0] == 0 and again.stored.shape == (H, W, 3)


def test_pictures_without_transparency_have_no_alpha():
    assert read_image_file(example("RGB")).alpha() is None and read_image_file(example("CMYK")).alpha() is None


# --- formats that cannot ---


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
@pytest.mark.parametrize("suffix", FORMATS)
def test_every_mode_is_written_in_every_format_and_changes_are_told(tmp_path, mode, suffix):
    picture = read_image_file(example(mode))
    path = tmp_path / f"out{suffix}"
    notes = write_image_file(path, picture)
    again = read_image_file(path)
    assert again.stored.shape[:2] == (H, W) and all(note.startswith(f"{path}: ") for note in notes)
    jpeg = suffix in (".jpg", ".jpeg")
    assert jpeg == any("JPEG changes known pixels" in note for note in notes)
    assert (again.mode != mode) == any("cannot hold this picture's" in note for note in notes)
    if mode in ("LA", "RGBA"):
        kept = suffix in (".png", ".webp", ".tif", ".tiff")
        assert kept == np.array_equal(again.alpha(), picture.alpha())
        assert kept != any("has no transparency" in note for note in notes)
    if not jpeg:
        assert np.array_equal(again.rgb(), picture.rgb())


def test_opaque_alpha_is_no_loss_and_a_profile_goes_with_its_kind_of_colours(tmp_path):
    image = example("RGB").convert("RGBA")
    image.info["icc_profile"] = ICC
    notes = write_image_file(tmp_path / "out.bmp", read_image_file(image))
    assert len(notes) == 1 and "RGBA, saved as RGB" in notes[0]
    write_image_file(tmp_path / "out.jpg", read_image_file(image))
    grey = example("L")
    grey.info["icc_profile"] = ICC
    write_image_file(tmp_path / "grey.webp", read_image_file(grey))
    for name, icc in (("out.jpg", ICC), ("grey.webp", None)):
        with Image.open(tmp_path / name) as file:
            assert file.info.get("icc_profile") == icc


# --- what is read ---


def test_rare_modes_become_common_ones():
    assert read_image_file(example("RGBA").convert("RGBa")).mode == "RGBA"
    assert read_image_file(example("HSV")).mode == read_image_file(example("YCbCr")).mode == "RGB"
    big = Image.fromarray(np.array([[0, 40000]], dtype=np.int32))
    assert read_image_file(big).stored.tolist() == [[0, 40000]] and read_image_file(big).mode == "I;16"


def test_big_endian_tiff_greys_are_the_same_numbers(tmp_path):
    values = RNG.integers(65536, size=(H, W)).astype(np.uint16)
    header = struct.pack(">2sHIH", b"MM", 42, 8, 8)
    rows = [(256, W), (257, H), (258, 16), (259, 1), (262, 1), (273, 8 + 2 + 8 * 12 + 4), (278, H), (279, H * W * 2)]
    entries = b"".join(struct.pack(">HHII", tag, 4, 1, value) for tag, value in rows)
    (tmp_path / "in.tif").write_bytes(header + entries + bytes(4) + values.astype(">u2").tobytes())
    picture = read_image_file(tmp_path / "in.tif")
    assert picture.mode == "I;16" and np.array_equal(picture.stored, values)


def test_only_the_first_of_several_pictures_is_taken_and_a_note_says_so(tmp_path):
    example("RGB").save(tmp_path / "two.tif", save_all=True, append_images=[example("L")])
    assert read_image_file(tmp_path / "two.tif").notes == (f"{tmp_path / 'two.tif'}: the first of 2 pictures in it",)


def test_lossy_files_are_known(tmp_path):
    for suffix, lossy in ((".jpg", True), (".webp", True), (".png", False)):
        example("RGB").save(tmp_path / f"a{suffix}")
        assert read_image_file(tmp_path / f"a{suffix}").lossy == lossy


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (
            Image.fromarray(np.zeros((2, 2), np.float32)),
            "the picture: a picture of Pillow's mode F, expected one of 1, L",
        ),
        (Image.fromarray(np.array([[70000]], np.int32)), "the picture: grey values 70000..70000, expected 0..65535"),
        (Image.fromarray(np.array([[-1, 3]], np.int32)), "grey values -1..3"),
    ],
)
def test_values_without_a_known_range_are_refused(image, message):
    with pytest.raises(ValueError, match=message):
        read_image_file(image)


def test_files_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "text.png").write_text("not a picture")
    half = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(half, "PNG")
    (tmp_path / "half.png").write_bytes(half.getvalue()[:500])
    for name in ("text.png", "half.png", "nowhere.png"):
        with pytest.raises(ValueError, match=f"{name}: cannot be read as an image"):
            read_image_file(tmp_path / name)
    with Image.open(tmp_path / "half.png") as image, pytest.raises(ValueError, match=r"half.png: cannot be read"):
        read_image_file(image)


def test_files_that_cannot_be_written_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"a\.gif: unknown kind of picture '\.gif', expected one of \.png"):
        format_of("a.gif")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"a\.png: cannot be written"):
        write_image_file(tmp_path / "file" / "a.png", read_image_file(example("L")))


def test_the_tags_of_a_camera_that_a_tiff_does_not_take_are_left_out_with_a_note(tmp_path):
    tags = Image.Exif()
    tags[0x8769] = {0x9000: b"0230"}  # ExifVersion
    Image.new("RGB", (16, 8), (10, 200, 30)).save(tmp_path / "camera.jpg", exif=tags)
    picture = read_image_file(tmp_path / "camera.jpg")
    notes = write_image_file(tmp_path / "out.tif", picture)
    assert any("TIFF does not keep the EXIF tags" in note for note in notes)
    assert np.array_equal(read_image_file(tmp_path / "out.tif").rgb(), picture.rgb())


def test_a_preview_in_the_makers_note_goes_with_a_note(tmp_path):
    tags = Image.Exif()
    tags[0x010F] = "Maker"
    tags.get_ifd(0x8769)[0x9286], tags.get_ifd(0x8769)[0x927C] = b"a comment", b"\xff\xd8 a preview \xff\xd9"
    example("RGB").save(tmp_path / "in.jpg", exif=tags)
    picture = read_image_file(tmp_path / "in.jpg")
    (note,) = picture.notes
    assert "the maker's note in its EXIF tags, which may show what was in the hole, is left out" in note
    write_image_file(tmp_path / "out.jpg", picture)
    assert b"a preview" in (tmp_path / "in.jpg").read_bytes()
    assert b"a preview" not in (tmp_path / "out.jpg").read_bytes()
    with Image.open(tmp_path / "out.jpg") as file:
        assert file.getexif().get_ifd(0x8769)[0x9286] == b"a comment"


@pytest.mark.parametrize("bits", [8, 16])
def test_what_a_png_says_of_its_colours_is_kept(tmp_path, bits):
    said = {b"gAMA": b"\0\0\xb1\x8f", b"cHRM": bytes(32), b"cICP": b"\x01\x0d\x00\x01"}
    chunks = PngImagePlugin.PngInfo()
    for name, content in said.items():
        chunks.add(name, content)
    if bits == 8:
        example("RGB").save(tmp_path / "in.png", pnginfo=chunks)
    else:
        deep(tmp_path / "plain.png", 3)
        plain = read_image_file(tmp_path / "plain.png")
        write_image_file(tmp_path / "in.png", replace(plain, chunks=tuple(said.items())))
    picture = read_image_file(tmp_path / "in.png")
    assert dict(picture.chunks) == said and picture.stored.dtype.itemsize == bits // 8
    assert write_image_file(tmp_path / "out.png", picture) == []
    again = read_image_file(tmp_path / "out.png")
    assert dict(again.chunks) == said and np.array_equal(again.stored, picture.stored)
    notes = write_image_file(tmp_path / "out.bmp", picture)
    assert "BMP does not keep what the PNG said of its colours (" in notes[-1] and "gAMA" in notes[-1]
