"""data.py: any picture file becomes the same tensors, masks keep their polarity, what does not fit is named."""

import io
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import colourful, save_picture
from PIL import Image

from maskgit.data import (
    GREY,
    MEGAPIXELS,
    admit,
    as_hole,
    file_number,
    list_images,
    open_upright,
    pair,
    read_hole,
    read_image,
    read_pair,
    resize_pair,
    to_float,
    to_pixels,
    to_uint8,
    write_image,
)
from maskgit.dataset import ImageDataset
from maskgit.masks import make_holes

ORIENTATION = 0x0112  # the EXIF tag


# --- value ranges -----------------------------------------------------------------------------------------------------


def test_all_256_values_survive_the_round_trip_through_float():
    values = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(2, 3, 16, 16)
    floats = to_float(values)
    assert floats.dtype == torch.float32 and floats.min() == 0 and floats.max() == 1
    assert torch.equal(to_uint8(floats), values)


def test_all_256_values_survive_the_round_trip_through_half_precision():
    values = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(to_float(values).half()), values)


def test_to_uint8_rounds_and_clips():
    floats = torch.tensor([-1.0, -0.01, 0.49 / 255, 0.51 / 255, 254.6 / 255, 1.01, 7.0])
    assert to_uint8(floats).tolist() == [0, 0, 0, 1, 255, 255, 255]


# --- order ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "number"),
    [("mask_012.png", 12), ("cat.png", None), ("7.png", 7), ("set2_image10.v.png", 10), ("image_00000.png", 0)],
)
def test_file_number_is_the_last_run_of_digits(name, number):
    assert file_number(name) == number


def test_pictures_are_listed_by_number_then_by_name(tmp_path, pixels):
    names = ["image_10.png", "image_2.PNG", "image_1.jpg", "b.bmp", "a.webp", "b_2.jpeg"]
    for name in names:
        save_picture(tmp_path / name, pixels)
    (tmp_path / "notes.txt").write_text("no picture")
    listed = [path.name for path in list_images(tmp_path)]
    assert listed == ["a.webp", "b.bmp", "image_1.jpg", "b_2.jpeg", "image_2.PNG", "image_10.png"]


def test_a_missing_folder_and_a_folder_without_pictures_are_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere: no such folder of images"):
        list_images(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty: no images in it \(looked for .bmp, .jpeg, .jpg, .png, .webp\)"):
        list_images(tmp_path / "empty")


def named(folder: str, names: str) -> list[Path]:
    return [Path(f"{folder}/{name}.png") for name in names.split()]


@pytest.mark.parametrize(
    ("images", "masks"),
    [
        ("image_00003 image_00004", "mask_003 mask_004"),
        ("apple cat9 7dog", "apple cat9 7dog"),  # names first: their numbers are nobody's
        ("image1 image2", "image1_mask001 image2_mask001"),  # as LaMa names them
        ("image2", "image2_mask001"),
        ("cat dog", "mask_cat mask-dog"),
        ("cat", "elsewhere"),  # one and one
        ("mask_1 mask_2", "mask_1 mask_2"),
    ],
)
def test_images_and_masks_are_paired_by_name_or_else_by_number(images, masks):
    images, masks = named("i", images), named("m", masks)
    assert pair(images, masks[::-1]) == list(zip(images, masks, strict=True))


@pytest.mark.parametrize(
    ("images", "masks", "why"),
    [
        ("image_1 image_2 image_3", "mask_1 mask_3 mask_4", "alone are image_2.png, mask_4.png"),
        ("apple cat", "cat dog", "alone are apple.png, dog.png"),
        ("1 2", "1", "alone are 2.png"),
        ("a a", "a a", "two have one"),
        ("a b c", "u v w", "alone are a.png, b.png, c.png, u.png, ..."),
    ],
)
def test_images_and_masks_that_do_not_fit_are_named(images, masks, why):
    images, masks = named("i", images), named("m", masks)
    with pytest.raises(ValueError) as error:
        pair(images, masks, "true image")
    head = f"{len(images)} images in i and {len(masks)} true images in m: expected a true image of each image's name"
    assert str(error.value) == f"{head} or number; {why}"


def test_hidden_files_and_folders_are_no_pictures(tmp_path):
    for name in ("1.png", "._1.png", ".DS_Store", "Thumbs.db"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "grid.png").mkdir()
    assert list_images(tmp_path) == [tmp_path / "1.png"]


def test_a_pipe_is_no_picture(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ValueError, match=r"pipe\.png: cannot be read as an image \(not a file\)"):
        open_upright(tmp_path / "pipe.png")


@pytest.fixture
def few_megapixels():
    """At most .01 megapixels are read."""
    admit(0.01)
    yield
    admit(MEGAPIXELS)


@pytest.mark.parametrize("side", [120, 1000])
def test_a_picture_that_is_too_large_is_refused_before_it_is_decoded(tmp_path, few_megapixels, side):
    Image.new("1", (side, side)).save(tmp_path / "bomb.png")
    with pytest.raises(ValueError, match=r"bomb\.png: .* at most 0\.01 are read; inpainting\.py --image"):
        open_upright(tmp_path / "bomb.png")


def test_a_picture_that_another_program_would_draw_is_refused(tmp_path):
    Image.fromarray(colourful(1, 8)[0]).save(tmp_path / "drawn.eps")
    (tmp_path / "drawn.eps").rename(tmp_path / "drawn.png")
    with pytest.raises(ValueError, match=r"drawn\.png: cannot be read as an image \(EPS: a program, not a picture"):
        read_image(tmp_path / "drawn.png")


def test_a_mask_in_colours_that_have_no_grey_is_named(tmp_path):
    Image.new("LAB", (8, 8)).save(tmp_path / "lab.tif")
    with pytest.raises(ValueError, match=r"lab\.tif: cannot be read as an image"):
        read_hole(tmp_path / "lab.tif")


@pytest.mark.parametrize("kind", [struct.error, KeyError, ZeroDivisionError, MemoryError, RuntimeError])
def test_whatever_a_decoder_raises_becomes_a_line_that_names_the_file(tmp_path, monkeypatch, kind):
    def fail(*given, **options):
        raise kind("deep within")

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(ValueError, match=r"a\.png: cannot be read as an image"):
        open_upright(tmp_path / "a.png")


# --- formats and modes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "options"), [("x.png", {}), ("x.bmp", {}), ("x.webp", {"lossless": True})])
def test_lossless_formats_give_the_pixels_that_were_written(tmp_path, pixels, name, options):
    assert np.array_equal(read_image(save_picture(tmp_path / name, pixels, **options)), pixels)


@pytest.mark.parametrize("name", ["x.jpg", "x.JPEG", "x.webp"])
def test_lossy_formats_come_close(tmp_path, name):
    smooth = np.linspace(40, 200, 16 * 16 * 3).reshape(16, 16, 3).astype(np.uint8)
    read = read_image(save_picture(tmp_path / name, smooth, quality=95))
    assert read.dtype == np.uint8 and np.abs(read.astype(int) - smooth).max() < 16


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "I;16", "CMYK"])
def test_every_mode_becomes_rgb(tmp_path, pixels, mode):
    colour = Image.fromarray(pixels)
    grey = np.array(colour.convert("L"))
    if mode == "I;16":
        picture, expected = Image.fromarray(grey.astype(np.uint16) * 257), np.dstack([grey] * 3)
    elif mode == "P":
        picture = colour.quantize(64)
        expected = np.array(picture.convert("RGB"))
    elif mode == "1":
        picture = colour.convert("1")
        expected = np.dstack([np.array(picture).astype(np.uint8) * 255] * 3)
    else:
        picture = colour.convert(mode)
        expected = np.dstack([grey] * 3) if mode in ("L", "LA") else pixels
    assert picture.mode == mode
    path = save_picture(tmp_path / ("x.jpg" if mode == "CMYK" else "x.png"), picture, quality=100)
    read = read_image(path)
    assert read.shape == (16, 16, 3) and read.dtype == np.uint8
    tolerance = 40 if mode == "CMYK" else 0  # JPEG is the one of our formats that stores CMYK
    assert np.abs(read.astype(int) - expected).max() <= tolerance


def test_16_bit_greys_are_scaled_not_clipped(tmp_path):
    """Pillow's own conversion would make all but the darkest 255 of 65,536 greys white."""
    greys = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
    read = read_image(save_picture(tmp_path / "x.png", greys))
    assert np.array_equal(read[..., 0].ravel(), np.arange(256))


def test_transparency_is_dropped_and_the_colour_below_it_stays(tmp_path, pixels):
    alpha = np.random.default_rng(0).integers(0, 256, (16, 16, 1), dtype=np.uint8)
    assert np.array_equal(read_image(save_picture(tmp_path / "x.png", np.dstack([pixels, alpha]))), pixels)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_honoured(tmp_path, orientation):
    """A red corner comes upright, wherever the camera put it (EXIF 2.3, tag 274)."""
    upright = np.zeros((8, 16, 3), dtype=np.uint8)
    upright[:4, :4] = (255, 0, 0)
    as_stored = {  # what a camera stores so that its tag brings `upright` back
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1],
        5: upright.transpose(1, 0, 2), 6: np.rot90(upright), 7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    path = save_picture(tmp_path / "x.png", np.ascontiguousarray(as_stored), exif=exif)
    assert np.array_equal(read_image(path), upright)


def test_a_picture_is_cropped_at_its_centre(tmp_path):
    """Three bands, 8 | 16 | 8 wide: the centre square is the middle one, as tall as the picture."""
    bands = np.zeros((16, 32, 3), dtype=np.uint8)
    bands[:, 8:24] = (10, 200, 30)
    wide = read_image(save_picture(tmp_path / "wide.png", bands), size=16)
    tall = read_image(save_picture(tmp_path / "tall.png", bands.transpose(1, 0, 2).copy()), size=16)
    for read in (wide, tall):
        assert read.shape == (16, 16, 3) and (read == (10, 200, 30)).all()


def test_a_picture_of_the_right_size_is_not_resampled(tmp_path, pixels):
    assert np.array_equal(read_image(save_picture(tmp_path / "x.png", pixels), size=16), pixels)


@pytest.mark.parametrize("side", [7, 33, 64])
def test_any_size_is_resized(tmp_path, side):
    plain = np.full((side, side + 5, 3), (200, 100, 50), dtype=np.uint8)
    assert (read_image(save_picture(tmp_path / "x.png", plain), size=16) == (200, 100, 50)).all()


def test_a_broken_file_is_named(tmp_path):
    (tmp_path / "noise.png").write_bytes(b"not a picture at all")
    with pytest.raises(ValueError, match=r"noise\.png: cannot be read as an image"):
        read_image(tmp_path / "noise.png")
    with pytest.raises(ValueError, match=r"none\.png: cannot be read as an image"):
        open_upright(tmp_path / "none.png")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP"])
def test_a_file_cut_short_is_named(tmp_path, kind):
    """Wherever a download stopped: an error that names the file, never a grey picture or a foreign exception."""
    whole = io.BytesIO()
    Image.fromarray(colourful(1, size=48)[0]).save(whole, kind)
    path = tmp_path / "cut.png"
    for share in (0.02, 0.1, 0.3, 0.6, 0.9):
        path.write_bytes(whole.getvalue()[: int(share * len(whole.getvalue()))])
        with pytest.raises(ValueError, match=r"cut\.png: cannot be read as an image"):
            read_image(path)


# --- masks ------------------------------------------------------------------------------------------------------------


def test_zero_is_the_hole_and_255_is_known(tmp_path):
    mask = np.full((8, 8), 255, dtype=np.uint8)
    mask[2:4, 5] = 0
    hole = read_hole(save_picture(tmp_path / "mask.png", mask))
    assert hole.dtype == bool and hole.sum() == 2 and hole[2, 5] and hole[3, 5]


def test_a_mask_is_cut_at_128(tmp_path):
    """JPEG masks are never just 0 and 255."""
    mask = np.array([[0, 127, 128, 255]], dtype=np.uint8)
    assert read_hole(save_picture(tmp_path / "mask.png", mask)).tolist() == [[True, True, False, False]]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "RGB", "RGBA", "P", "I;16"])
def test_masks_of_every_mode_mean_the_same(tmp_path, mode):
    hole = np.random.default_rng(1).random((8, 8)) < 0.3
    known = (~hole).astype(np.uint8) * 255
    picture = Image.fromarray(known.astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(known).convert(mode)
    assert picture.mode == mode
    assert np.array_equal(read_hole(save_picture(tmp_path / "mask.png", picture)), hole)


def test_16_bit_masks_are_cut_at_their_middle(tmp_path):
    greys = np.array([[0, 300, 32767, 32896, 65535]], dtype=np.uint16)
    assert read_hole(save_picture(tmp_path / "mask.png", greys)).tolist() == [[True, True, True, False, False]]


@pytest.mark.parametrize("size", [16, 48])
def test_a_resized_mask_keeps_its_place(tmp_path, size):
    mask = np.full((32, 64), 255, dtype=np.uint8)
    mask[:16, 16:32] = 0  # the top left quarter of the centre square
    image = save_picture(tmp_path / "image.png", np.zeros((32, 64, 3), np.uint8))
    _, hole = read_pair(image, save_picture(tmp_path / "mask.png", mask), size)
    expected = np.zeros((size, size), dtype=bool)
    expected[: size // 2, : size // 2] = True
    assert np.array_equal(hole, expected)


@pytest.mark.parametrize(("side", "size"), [(512, 64), (100, 64), (64, 64), (40, 64), (13, 64)])
def test_no_colour_of_the_hole_reaches_a_known_pixel_whatever_the_size(side, size):
    """The lab paints holes grey: at 512 pixels, Lanczos carried that grey into 385 of 3,471 known pixels."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(256, size=(side, side, 3), dtype=np.uint8)
    hole = make_holes("walk", 1, side, seed=3)[0, 0].numpy() if side > 20 else rng.random((side, side)) < 0.3
    results = [resize_pair(np.where(hole[..., None], np.uint8(grey), pixels), hole, size) for grey in (128, 0, 255)]
    known = ~results[0][1]
    assert known.any() and not known.all()
    for image, missing in results[1:]:
        assert np.array_equal(missing, results[0][1]) and np.array_equal(image[known], results[0][0][known])


@pytest.mark.parametrize(("side", "size"), [(512, 64), (500, 64), (64, 64), (30, 64)])
def test_a_missing_pixel_stays_missing_however_thin_the_hole(side, size):
    for place in (0, side // 3, side - 1):
        for axis in (0, 1):
            hole = np.zeros((side, side), bool)
            hole[(slice(None), place)[:: 1 if axis else -1]] = True
            _, resized = resize_pair(np.zeros((side, side, 3), np.uint8), hole, size)
            assert resized.any(axis=1 - axis).sum() == 1 or size > side
            assert resized.any(axis=axis).all()  # the line goes through


def test_an_image_that_is_all_hole_is_grey(tmp_path):
    pixels, hole = resize_pair(np.zeros((20, 20, 3), np.uint8), np.ones((20, 20), bool), 8)
    assert (pixels == GREY).all() and hole.all() and hole.shape == (8, 8)


def test_what_is_written_is_read_back(tmp_path, pixels):
    image = torch.from_numpy(pixels).permute(2, 0, 1)
    write_image(tmp_path / "new" / "folder" / "x.png", to_pixels(image))
    assert torch.equal(ImageDataset(tmp_path / "new" / "folder").images, image[None])


@pytest.mark.parametrize(
    ("mode", "dtype", "known"),
    [("L", np.uint8, 255), ("L", np.uint8, 1), ("I;16", np.uint16, 65535), ("I;16", np.uint16, 255),
     ("I;16", np.uint16, 1), ("I", np.int32, 65535), ("I", np.int32, 255), ("I", np.int32, 1), ("F", np.float32, 1.0),
     ("F", np.float32, 255.0)],
)  # fmt: skip
def test_a_mask_is_understood_in_the_range_that_it_uses(mode, dtype, known):
    hole = np.array([[True, False, False], [True, True, False]])
    picture = Image.fromarray(np.where(hole, 0, known).astype(dtype))
    assert picture.mode == mode and np.array_equal(as_hole(picture), hole)


def test_the_middle_of_the_range_divides():
    for dtype, middle in ((np.uint8, 128), (np.uint16, 128 * 257)):
        values = np.array([[0, middle - 1, middle, 255 * middle // 128]]).astype(dtype)
        assert as_hole(Image.fromarray(values)).tolist() == [[True, True, False, False]]
