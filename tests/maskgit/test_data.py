"""data.py: any picture file becomes the same tensors, masks keep their polarity, what does not fit is named."""

import io
import tracemalloc

import numpy as np
import pytest
import torch
from conftest import colourful, write_pictures
from PIL import Image

from maskgit.data import (
    GREY,
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
from maskgit.dataset import ImageDataset, Maps, Store, read_holes
from maskgit.folders import read_truth
from maskgit.masks import make_holes

ORIENTATION = 0x0112  # the EXIF tag


@pytest.fixture
def pixels() -> np.ndarray:
    return colourful(1)[0]  # (16, 16, 3)


def save(path, picture, **options):
    """Writes an array or a Pillow image; returns the path."""
    picture = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    picture.save(path, **options)
    return path


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
        save(tmp_path / name, pixels)
    (tmp_path / "notes.txt").write_text("no picture")
    listed = [path.name for path in list_images(tmp_path)]
    assert listed == ["a.webp", "b.bmp", "image_1.jpg", "b_2.jpeg", "image_2.PNG", "image_10.png"]


def test_a_missing_folder_and_a_folder_without_pictures_are_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere: no such folder of images"):
        list_images(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty: no images in it \(looked for .bmp, .jpeg, .jpg, .png, .webp\)"):
        list_images(tmp_path / "empty")


def test_images_and_masks_are_paired_by_order(tmp_path):
    images = [tmp_path / f"image_{i:05}.png" for i in (3, 4)]
    masks = [tmp_path / f"mask_{i:03}.png" for i in (3, 4)]
    assert pair(images, masks) == [(images[0], masks[0]), (images[1], masks[1])]
    assert pair([tmp_path / "cat.png"], [masks[0]]) == [(tmp_path / "cat.png", masks[0])]  # no number, no quarrel


def test_a_pair_whose_numbers_differ_is_an_error_that_names_both(tmp_path):
    images = [tmp_path / f"image_{i}.png" for i in (1, 2, 3)]
    masks = [tmp_path / f"mask_{i}.png" for i in (1, 3, 4)]
    with pytest.raises(ValueError, match=r"image_2\.png would be paired with .*mask_3\.png: their numbers differ"):
        pair(images, masks)


def test_unequal_counts_are_an_error_that_names_both_folders(tmp_path):
    images, masks = [tmp_path / "images" / "1.png"] * 2, [tmp_path / "masks" / "1.png"]
    with pytest.raises(ValueError, match=r"2 images in .*images but 1 masks in .*masks"):
        pair(images, masks)


# --- formats and modes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "options"), [("x.png", {}), ("x.bmp", {}), ("x.webp", {"lossless": True})])
def test_lossless_formats_give_the_pixels_that_were_written(tmp_path, pixels, name, options):
    assert np.array_equal(read_image(save(tmp_path / name, pixels, **options)), pixels)


@pytest.mark.parametrize("name", ["x.jpg", "x.JPEG", "x.webp"])
def test_lossy_formats_come_close(tmp_path, name):
    smooth = np.linspace(40, 200, 16 * 16 * 3).reshape(16, 16, 3).astype(np.uint8)
    read = read_image(save(tmp_path / name, smooth, quality=95))
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
    path = save(tmp_path / ("x.jpg" if mode == "CMYK" else "x.png"), picture, quality=100)
    read = read_image(path)
    assert read.shape == (16, 16, 3) and read.dtype == np.uint8
    tolerance = 40 if mode == "CMYK" else 0  # JPEG is the one of our formats that stores CMYK
    assert np.abs(read.astype(int) - expected).max() <= tolerance


def test_16_bit_greys_are_scaled_not_clipped(tmp_path):
    """Pillow's own conversion would make all but the darkest 255 of 65,536 greys white."""
    greys = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
    read = read_image(save(tmp_path / "x.png", greys))
    assert np.array_equal(read[..., 0].ravel(), np.arange(256))


def test_transparency_is_dropped_and_the_colour_below_it_stays(tmp_path, pixels):
    alpha = np.random.default_rng(0).integers(0, 256, (16, 16, 1), dtype=np.uint8)
    assert np.array_equal(read_image(save(tmp_path / "x.png", np.dstack([pixels, alpha]))), pixels)


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
    path = save(tmp_path / "x.png", np.ascontiguousarray(as_stored), exif=exif)
    assert np.array_equal(read_image(path), upright)


def test_a_picture_is_cropped_at_its_centre(tmp_path):
    """Three bands, 8 | 16 | 8 wide: the centre square is the middle one, as tall as the picture."""
    bands = np.zeros((16, 32, 3), dtype=np.uint8)
    bands[:, 8:24] = (10, 200, 30)
    wide = read_image(save(tmp_path / "wide.png", bands), size=16)
    tall = read_image(save(tmp_path / "tall.png", bands.transpose(1, 0, 2).copy()), size=16)
    for read in (wide, tall):
        assert read.shape == (16, 16, 3) and (read == (10, 200, 30)).all()


def test_a_picture_of_the_right_size_is_not_resampled(tmp_path, pixels):
    assert np.array_equal(read_image(save(tmp_path / "x.png", pixels), size=16), pixels)


@pytest.mark.parametrize("side", [7, 33, 64])
def test_any_size_is_resized(tmp_path, side):
    plain = np.full((side, side + 5, 3), (200, 100, 50), dtype=np.uint8)
    assert (read_image(save(tmp_path / "x.png", plain), size=16) == (200, 100, 50)).all()


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
    hole = read_hole(save(tmp_path / "mask.png", mask))
    assert hole.dtype == bool and hole.sum() == 2 and hole[2, 5] and hole[3, 5]


def test_a_mask_is_cut_at_128(tmp_path):
    """JPEG masks are never just 0 and 255."""
    mask = np.array([[0, 127, 128, 255]], dtype=np.uint8)
    assert read_hole(save(tmp_path / "mask.png", mask)).tolist() == [[True, True, False, False]]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "RGB", "RGBA", "P", "I;16"])
def test_masks_of_every_mode_mean_the_same(tmp_path, mode):
    hole = np.random.default_rng(1).random((8, 8)) < 0.3
    known = (~hole).astype(np.uint8) * 255
    picture = Image.fromarray(known.astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(known).convert(mode)
    assert picture.mode == mode
    assert np.array_equal(read_hole(save(tmp_path / "mask.png", picture)), hole)


def test_16_bit_masks_are_cut_at_their_middle(tmp_path):
    greys = np.array([[0, 300, 32767, 32896, 65535]], dtype=np.uint16)
    assert read_hole(save(tmp_path / "mask.png", greys)).tolist() == [[True, True, True, False, False]]


@pytest.mark.parametrize("size", [16, 48])
def test_a_resized_mask_keeps_its_place(tmp_path, size):
    mask = np.full((32, 64), 255, dtype=np.uint8)
    mask[:16, 16:32] = 0  # the top left quarter of the centre square
    image = save(tmp_path / "image.png", np.zeros((32, 64, 3), np.uint8))
    _, hole = read_pair(image, save(tmp_path / "mask.png", mask), size)
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


def test_read_holes_stacks_masks_with_a_channel(tmp_path):
    holes = np.random.default_rng(2).random((3, 8, 8)) < 0.5
    paths = [save(tmp_path / f"m{i}.png", (~hole).astype(np.uint8) * 255) for i, hole in enumerate(holes)]
    stacked = read_holes(paths)
    assert stacked.dtype == torch.bool and torch.equal(stacked, torch.from_numpy(holes)[:, None])


# --- folders ----------------------------------------------------------------------------------------------------------


def test_a_folder_is_kept_as_uint8_in_order(pictures):
    folder = ImageDataset(pictures, workers=2)
    expected = torch.from_numpy(colourful(8)).permute(0, 3, 1, 2)
    assert folder.images.dtype == torch.uint8 and folder.images.is_contiguous() and len(folder) == 8
    assert torch.equal(folder.images, expected)
    assert [path.name for path in folder.paths] == [f"image_{i:03}.png" for i in range(8)]


@pytest.mark.parametrize("workers", [0, 1, 5])
def test_the_number_of_threads_changes_nothing(pictures, workers):
    assert torch.equal(ImageDataset(pictures, 12, workers).images, ImageDataset(pictures, 12, 2).images)


def test_a_list_of_files_is_taken_in_its_own_order(pictures):
    files = list_images(pictures)
    assert torch.equal(ImageDataset([files[5], files[2]]).images, ImageDataset(pictures).images[[5, 2]])


def test_an_image_alone_equals_the_image_in_its_folder(pictures):
    together = ImageDataset(pictures, size=10).images
    for index, path in enumerate(list_images(pictures)):
        assert torch.equal(ImageDataset([path], size=10).images, together[index : index + 1])


def test_without_a_size_the_files_keep_theirs_which_must_be_one(tmp_path, pictures):
    assert ImageDataset(pictures, size=None).images.shape == (8, 3, 16, 16)
    save(pictures / "image_100.png", np.zeros((16, 20, 3), dtype=np.uint8))
    with pytest.raises(ValueError, match=r"image_100\.png is 20x16, but .*image_000\.png is 16x16: one size is needed"):
        ImageDataset(pictures)
    assert ImageDataset(pictures, size=16).images.shape == (9, 3, 16, 16)


def test_a_broken_file_of_a_folder_is_named(pictures):
    (pictures / "image_004.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(ValueError, match=r"image_004\.png: cannot be read"):
        ImageDataset(pictures)


def test_what_is_written_is_read_back(tmp_path, pixels):
    image = torch.from_numpy(pixels).permute(2, 0, 1)
    write_image(tmp_path / "new" / "folder" / "x.png", to_pixels(image))
    assert torch.equal(ImageDataset(tmp_path / "new" / "folder").images, image[None])


# --- windows of pictures that are larger than the model ---------------------------------------------------------------


@pytest.fixture
def large(tmp_path):
    """A folder of three pictures, 40x24, 20x36 and 30x10 (smaller than a window of 16), and their pixels."""
    folder, pictures = tmp_path / "large", []
    folder.mkdir()
    for index, (width, height) in enumerate(((40, 24), (20, 36), (30, 10))):
        noise = np.random.default_rng(index).integers(256, size=(height, width, 3), dtype=np.uint8)
        save(folder / f"{index}.png", noise)
        pictures.append(torch.from_numpy(noise).permute(2, 0, 1))
    return folder, pictures


def test_whole_pictures_keep_their_size_and_small_ones_are_enlarged(large):
    folder, pictures = large
    maps = ImageDataset(folder, 16, windows="random").maps
    assert maps.sizes.tolist() == [[24, 40], [36, 20], [16, 48]]
    assert all(torch.equal(maps[index], pictures[index]) for index in (0, 1))
    with pytest.raises(ValueError, match="unequal sizes"):
        maps.stack()


def test_a_picture_on_its_side_is_turned_upright_before_windows_are_cut(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "turned").mkdir()
    Image.fromarray(colourful(1, 32)[0][:20]).save(tmp_path / "turned" / "a.jpg", exif=exif)
    maps = ImageDataset(tmp_path / "turned", 16, windows="random").maps
    assert maps.sizes.tolist() == [[32, 20]]
    assert torch.equal(maps[0], torch.from_numpy(read_image(tmp_path / "turned" / "a.jpg")).permute(2, 0, 1))


def test_windows_are_a_function_of_the_generator_and_reach_every_place(large):
    folder, pictures = large
    maps = ImageDataset(folder, 16, windows="random").maps
    draws = [maps.draw(torch.tensor([0, 1]).repeat(2000), 16, torch.Generator().manual_seed(s)) for s in (5, 5, 6)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    for index, (rows, columns) in enumerate(((9, 25), (21, 5))):
        seen = {tuple(place) for place in draws[0][draws[0][:, 0] == index][:, 1:].tolist()}
        assert seen == {(y, x) for y in range(rows) for x in range(columns)}
    for window, (index, y, x) in zip(maps.read(draws[0][:8], 16), draws[0][:8].tolist(), strict=True):
        assert torch.equal(window, pictures[index][:, y : y + 16, x : x + 16])


def test_pictures_of_the_windows_size_cost_no_draw(pictures):
    maps, generator = ImageDataset(pictures, 16).maps, torch.Generator().manual_seed(0)
    before = generator.get_state()
    windows = maps.draw(torch.tensor([3, 1]), 16, generator)
    assert windows.tolist() == [[3, 0, 0], [1, 0, 0]] and torch.equal(generator.get_state(), before)


def test_a_map_smaller_than_the_window_is_refused():
    with pytest.raises(ValueError, match=r"a map of 8x8 has no window of 9"):
        Maps.of(torch.zeros(2, 1, 8, 8)).draw(torch.tensor([1]), 9, torch.Generator())


def test_fixed_windows_are_the_same_every_time_and_from_a_file(tmp_path, large):
    folder, pictures = large
    fixed = [
        ImageDataset(folder, 16, store=store, windows="fixed").images
        for store in (None, None, Store(tmp_path / "cache", 0), Store(tmp_path / "cache", 0))
    ]
    assert fixed[0].shape == (3, 3, 16, 16) and all(torch.equal(fixed[0], other) for other in fixed[1:])
    assert any(torch.equal(fixed[0][0], pictures[0][:, y : y + 16, x : x + 16]) for y in range(9) for x in range(25))


# --- where they are kept ----------------------------------------------------------------------------------------------


def test_a_file_gives_the_pixels_that_memory_gives(tmp_path, pictures, monkeypatch):
    monkeypatch.setattr("maskgit.dataset.CHUNK", 3)  # 8 pictures: 3, 3 and 2
    for size in (None, 12):
        images = [ImageDataset(pictures, size, 2, Store(tmp_path / "cache", memory)).images for memory in (10**6, 0)]
        assert torch.equal(*images) and torch.equal(images[0], ImageDataset(pictures, size).images)
        rows = torch.tensor([5, 0, 5, 7])
        assert torch.equal(images[1][rows], images[0][rows])
    names = [path.name for path in (tmp_path / "cache").iterdir()]
    assert len(names) == 2 and all(name.endswith(".npy") for name in names)  # no temporary file


def test_a_file_that_another_run_may_have_mapped_is_never_deleted(tmp_path, pictures):
    store = Store(tmp_path / "cache", 0)
    first = ImageDataset(pictures, 16, 1, store).images
    before = first.clone()
    ImageDataset(pictures, 12, 1, store)
    assert len(list((tmp_path / "cache").iterdir())) == 2 and torch.equal(first, before)
    assert torch.equal(ImageDataset(pictures, 16, 1, store).images, before)


def test_what_fits_stays_in_memory(tmp_path, pictures):
    size = 8 * 3 * 16 * 16
    ImageDataset(pictures, 16, store=Store(tmp_path / "cache", size))
    assert not (tmp_path / "cache").exists()
    ImageDataset(pictures, 16, store=Store(tmp_path / "cache", size - 1))
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_file_is_made_again_only_where_pictures_changed(tmp_path, pictures, pixels, monkeypatch):
    store, decoded = Store(tmp_path / "cache", 0), []
    monkeypatch.setattr("maskgit.dataset.read_image", lambda path, size: decoded.append(path) or read_image(path, size))

    def load():
        decoded.clear()
        return ImageDataset(pictures, 16, 1, store).images, len(decoded)

    first, count = load()
    assert count == 8 and load()[1] == 0
    save(pictures / "image_002.png", pixels[::-1].copy())
    changed, count = load()
    assert count == 8 and not torch.equal(changed[2], first[2]) and torch.equal(changed[3], first[3])
    (pictures / "image_007.png").unlink()
    assert load()[1] == 7 and len(load()[0]) == 7


def test_a_broken_picture_leaves_no_file(tmp_path, pictures):
    (pictures / "image_006.png").write_bytes(b"\x89PNG")
    with pytest.raises(ValueError, match=r"image_006\.png: cannot be read"):
        ImageDataset(pictures, 16, store=Store(tmp_path / "cache", 0))
    assert not list((tmp_path / "cache").iterdir())


def test_memory_does_not_grow_with_the_number_of_rows(tmp_path):
    """Chunks are written as they come, and a batch is all that is read."""

    def peak(chunks: int) -> int:
        tracemalloc.start()
        rows = (np.full((100, 3, 8, 8), index, dtype=np.uint8) for index in range(chunks))
        kept = Store(tmp_path, 0).keep(f"rows{chunks}", "key", (100 * chunks, 3, 8, 8), rows)
        assert kept[torch.tensor([0, 100 * chunks - 1])].amax(dim=(1, 2, 3)).tolist() == [0, chunks - 1]
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    peak(2)  # what the first call imports
    assert peak(200) < 1.5 * peak(10) < 100 * 3 * 8 * 8 * 20


# --- the truth --------------------------------------------------------------------------------------------------------


def write_csv(path, images: np.ndarray):
    """The lab's test_gt.csv: a header, then rows of H*W*3 integers in H, W, C order."""
    rows = [",".join(map(str, image.ravel())) for image in images]
    path.write_text("\n".join([",".join(f"p{i}" for i in range(images[0].size)), *rows]) + "\n")
    return path


@pytest.fixture
def truth(tmp_path) -> np.ndarray:
    """3 images, as tmp_path/folder, truth.npz and test_gt.csv."""
    images = colourful(3, size=8)
    write_pictures(tmp_path / "folder", 3, size=8)
    np.savez(tmp_path / "truth.npz", other=np.zeros(2), images=images)
    np.savez(tmp_path / "unnamed.npz", images)
    write_csv(tmp_path / "test_gt.csv", images)
    return images


@pytest.mark.parametrize("name", ["folder", "truth.npz", "unnamed.npz", "test_gt.csv"])
def test_truth_is_the_same_from_a_folder_an_npz_and_a_csv(tmp_path, truth, name):
    read = read_truth(tmp_path / name)
    assert read.dtype == torch.uint8 and read.is_contiguous()
    assert torch.equal(read, torch.from_numpy(truth).permute(0, 3, 1, 2))


@pytest.mark.parametrize(
    ("row", "text", "told"),
    [
        (2, "1,2,3", "line 3: 3 values, expected"),
        (2, "", "line 3: 0 values, expected"),
        (3, "x," * 191 + "x", "line 4: invalid literal"),
        (3, "1.5," * 191 + "1", "line 4: invalid literal"),
        (1, "256," * 191 + "0", r"line 2: values outside 0\.\.255"),
        (1, "0," * 191 + "-1", r"line 2: values outside 0\.\.255"),
    ],
)
def test_a_malformed_csv_row_is_named_by_file_and_line(tmp_path, truth, row, text, told):
    lines = (tmp_path / "test_gt.csv").read_text().splitlines()
    lines[row] = text
    (tmp_path / "test_gt.csv").write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match=rf"test_gt\.csv, {told}"):
        read_truth(tmp_path / "test_gt.csv")


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("only_header.csv", b"a,b,c\n", "no rows after the header"),
        ("empty.csv", b"", "no rows after the header"),
        ("not_square.csv", b"a\n1,2,3,4,5,6\n", "line 2: 6 values"),
        ("binary.csv", b"\xff\xfe\x00\n\x80", "not a .csv file"),
        ("broken.npz", b"PK\x03\x04 cut short", "not an .npz of plain arrays"),
        ("truth.txt", b"1", "true images come as a folder, an .npz or a .csv file"),
    ],
)
def test_a_truth_that_cannot_be_read_is_named(tmp_path, name, content, told):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name}.*{told}"):
        read_truth(tmp_path / name)


def test_a_missing_truth_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"gone\.csv: no such folder or file of true images"):
        read_truth(tmp_path / "gone.csv")


@pytest.mark.parametrize(
    "array",
    [np.zeros((2, 3, 8, 8), np.uint8), np.zeros((2, 8, 8, 3), np.float32), np.zeros((8, 8, 3), np.uint8)],
    ids=["channels first", "float", "one image"],
)
def test_an_npz_of_another_layout_is_refused(tmp_path, array):
    np.savez(tmp_path / "truth.npz", images=array)
    with pytest.raises(ValueError, match=r"truth\.npz: expected uint8 \(N, H, W, 3\), found"):
        read_truth(tmp_path / "truth.npz")


def test_an_npz_of_pickled_objects_and_an_empty_one_are_refused(tmp_path):
    """Reading the truth executes no code."""
    np.savez(tmp_path / "objects.npz", images=np.array([{}, []], dtype=object))
    np.savez(tmp_path / "empty.npz")
    for name in ("objects", "empty"):
        with pytest.raises(ValueError, match=rf"{name}\.npz: not an \.npz of plain arrays"):
            read_truth(tmp_path / f"{name}.npz")
