"""photos.py: sources of holes, filling with stubs and tiny networks, files; and the command line of inpainting.py."""

import logging
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.data import chelsea
from test_inpainting import SIZE, save, transformer, vqgan

import inpainting
from maskgit.data import to_uint8
from maskgit.decoding import DecodingConfig
from maskgit.inpainter import Filled, Inpainter
from maskgit.masks import composite
from photos.fill import fill_photo, region_seed
from photos.photo import cut, pair_photos, paste, read_photo, write_photo

CAT = Image.fromarray(chelsea())  # 451x300
HOLE = np.zeros((300, 451), dtype=bool)
HOLE[100:140, 120:180] = HOLE[200:210, 300:330] = True
MASK = Image.fromarray(np.where(HOLE, 0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(1)
    return save(tmp_path_factory.mktemp("checkpoint"), vqgan(), transformer())


@pytest.fixture(scope="module")
def inpainter(checkpoint) -> Inpainter:
    return Inpainter.from_pretrained(checkpoint, "cpu")


@pytest.fixture(autouse=True)
def no_handler_left_behind():
    yield
    for handler in [handler for handler in logging.root.handlers if type(handler) is logging.StreamHandler]:
        logging.root.removeHandler(handler)


class Stub:
    """An Inpainter whose decoder paints `colour` in the hole and is `bias` off everywhere else."""

    size, device, decoding = 16, torch.device("cpu"), DecodingConfig(total_iter=2, sweet_spot=2)

    def __init__(self, colour=200, bias=0):
        self.colour, self.bias, self.batches = colour, bias, []

    def steps(self, images, hole, seeds, margin=0, decoding=None):
        self.batches.append((len(images), list(seeds), margin, decoding))
        return iter([SimpleNamespace(step=step, tokens=step) for step in (1, 2)])

    def finish(self, images, hole, tokens):
        assert tokens == 2
        raw = to_uint8((images.float() + self.bias) / 255).masked_fill(hole, self.colour)
        return Filled(composite(raw, images, hole), raw, tokens)


# --- reading: where the hole is ---


def test_every_source_tells_the_same_hole(tmp_path):
    CAT.save(tmp_path / "cat.png")
    MASK.save(tmp_path / "mask.png")
    painted = np.where(HOLE[..., None], (0, 255, 0), np.array(CAT)).astype(np.uint8)
    Image.fromarray(painted).save(tmp_path / "green.png")
    clear = CAT.copy()
    clear.putalpha(MASK)
    clear.save(tmp_path / "clear.png")
    photos = [
        read_photo(tmp_path / "cat.png", mask=tmp_path / "mask.png"),
        read_photo(str(tmp_path / "cat.png"), mask=str(tmp_path / "mask.png")),
        read_photo(CAT, mask=MASK),
        read_photo(tmp_path / "green.png", hole_color=(0, 255, 0)),
        read_photo(tmp_path / "clear.png"),
    ]
    for photo in photos:
        assert photo.hole.dtype == bool and np.array_equal(photo.hole, HOLE) and photo.notes == []
        assert photo.pixels.dtype == np.uint8 and np.array_equal(photo.pixels[~HOLE], np.array(CAT)[~HOLE])
    assert photos[0].name == str(tmp_path / "cat.png")
    boxed = read_photo(CAT, box=(120, 100, 60, 40)).hole
    assert boxed[100:140, 120:180].all() and boxed.sum() == 60 * 40
    assert read_photo(CAT, box=(450, 299, 1, 1)).hole[-1, -1]


def test_jpeg_masks_are_thresholded_and_masks_are_turned_upright(tmp_path):
    MASK.save(tmp_path / "mask.jpg", quality=60)
    assert np.array_equal(read_photo(CAT, mask=tmp_path / "mask.jpg").hole, HOLE)
    tags = Image.Exif()
    tags[0x0112] = 6
    turned = MASK.transpose(Image.Transpose.ROTATE_90)
    turned.save(tmp_path / "turned.png", exif=tags)
    assert np.array_equal(read_photo(CAT, mask=tmp_path / "turned.png").hole, HOLE)
    with Image.open(tmp_path / "turned.png") as mask:
        assert np.array_equal(read_photo(CAT, mask=mask).hole, HOLE)


@pytest.mark.parametrize(("colour", "quality"), [((0, 255, 0), 75), ((255, 255, 255), 75), ((255, 0, 255), 90)])
def test_a_colour_is_found_in_a_lossy_file_with_all_its_rim(tmp_path, colour, quality):
    painted = np.where(HOLE[..., None], colour, np.array(CAT)).astype(np.uint8)
    Image.fromarray(painted).save(tmp_path / "cat.jpg", quality=quality)
    photo = read_photo(tmp_path / "cat.jpg", hole_color=colour)
    assert photo.hole[HOLE].all() and photo.hole.sum() < 1.4 * HOLE.sum()
    assert "a mask is exact" in photo.notes[0]


# --- reading: messages ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"cat\.png: no hole: expected a mask, a hole colour, a box or a transparent part"),
        ({"mask": MASK, "box": (1, 1, 1, 1)}, r"cat\.png: its hole is told by a mask and by a box, expected one"),
        ({"mask": Image.new("L", (7, 9))}, r"cat\.png is 451x300, its mask the mask 7x9: they must be equal"),
        ({"mask": Image.new("L", CAT.size, 255)}, "the mask: an empty hole, expected at least one pixel"),
        ({"mask": Image.new("L", CAT.size, 0)}, "the mask: the hole is the whole picture, expected some known pixels"),
        ({"mask": "nowhere.png"}, r"nowhere\.png: cannot be read as an image"),
        ({"hole_color": (0, 255, 0)}, r"cat\.png: pixels of colour 0,255,0: an empty hole"),
        ({"hole_color": (0, 256, 0)}, "hole colour 0,256,0: expected r,g,b, each 0..255"),
        ({"box": (400, 0, 52, 9)}, r"cat\.png: box 400,0,52,9 \(x, y, width, height\) does not lie in its 451x300"),
        ({"box": (-1, 0, 5, 9)}, "box -1,0,5,9"),
        ({"box": (3, 3, 0, 9)}, "box 3,3,0,9"),
        ({"box": (0, 0, 451, 300)}, "the hole is the whole picture"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(tmp_path, options, message):
    CAT.save(tmp_path / "cat.png")
    with pytest.raises(ValueError, match=message) as raised:
        read_photo(tmp_path / "cat.png", **options)
    assert "\n" not in str(raised.value)


def test_an_opaque_picture_with_alpha_has_an_empty_hole_and_files_are_named(tmp_path):
    CAT.convert("RGBA").save(tmp_path / "cat.png")
    with pytest.raises(ValueError, match=r"cat\.png: transparent part: an empty hole"):
        read_photo(tmp_path / "cat.png")
    (tmp_path / "text.png").write_text("text")
    with pytest.raises(ValueError, match=r"text\.png: cannot be read as an image"):
        read_photo(tmp_path / "text.png", box=(0, 0, 1, 1))


def test_a_hole_that_may_be_inverted_is_doubted(tmp_path):
    inverted = Image.fromarray(np.where(HOLE, 255, 0).astype(np.uint8))
    (most,) = read_photo(CAT, mask=inverted).notes
    assert "98 % of the picture is hole" in most and "the wrong way round?" in most
    painted = Image.fromarray(np.where(HOLE[..., None], np.array(CAT), 128).astype(np.uint8))
    (flat,) = read_photo(painted, mask=MASK).notes
    assert "all that it calls known has the colour 128,128,128" in flat
    painted.save(tmp_path / "cat.jpg", quality=80)
    (flat,) = read_photo(tmp_path / "cat.jpg", mask=MASK).notes
    assert "all that it calls known" in flat
    assert read_photo(Image.new("RGB", CAT.size, "white"), mask=MASK).notes == []  # a hole in a white wall


# --- filling ---


@pytest.mark.parametrize("box", [(0, 0, 5, 7), (446, 293, 5, 7), (200, 0, 9, 300), (0, 100, 451, 20), (0, 0, 300, 300)])
def test_known_pixels_stay_and_the_whole_hole_is_filled(box):
    photo = read_photo(CAT, box=box)
    before = photo.pixels.copy()
    (pixels,), notes = fill_photo(Stub(), photo)
    assert pixels.dtype == np.uint8 and pixels.shape == before.shape
    assert np.array_equal(photo.pixels, before) and np.array_equal(pixels[~photo.hole], before[~photo.hole])
    assert abs(pixels[photo.hole].mean() - 200) < 25  # Lanczos overshoots in narrow holes
    assert bool(notes) == (max(box[2:]) > 8)


@pytest.mark.parametrize("size", [(1, 9), (9, 1), (1, 200), (15, 16), (16, 16), (17, 33), (3, 5)])
def test_pictures_of_any_size_even_one_pixel_wide(inpainter, size):
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(256, size=(*size[::-1], 3), dtype=np.uint8))
    hole = np.zeros(size[::-1], dtype=bool)
    hole.flat[[2, -1]] = True
    photo = read_photo(image, mask=Image.fromarray(np.where(hole, 0, 255).astype(np.uint8)))
    for pixels in fill_photo(inpainter, photo, samples=2)[0]:
        assert np.array_equal(pixels[~hole], np.array(image)[~hole])


def test_a_picture_of_the_models_size_is_filled_as_the_inpainter_fills_it(inpainter):
    image = CAT.resize((SIZE, SIZE))
    photo = read_photo(image, box=(3, 4, 7, 6))
    (pixels,), notes = fill_photo(inpainter, photo, seed=3, margin=1)
    parts = cut(photo, SIZE)
    *_, last = inpainter.steps(parts.images, parts.hole, [3], 1)
    expected = inpainter.finish(parts.images, parts.hole, last.tokens).images[0].permute(1, 2, 0).numpy()
    assert np.array_equal(pixels, expected) and notes == []
    assert np.array_equal(parts.images[0].permute(1, 2, 0).numpy(), np.array(image))


def test_a_completion_depends_neither_on_the_batch_nor_on_the_others(inpainter):
    photo = read_photo(CAT, mask=MASK)
    assert len(cut(photo, SIZE).squares) == 2
    together, _ = fill_photo(inpainter, photo, seed=5, samples=3, batch_size=64)
    one_by_one, _ = fill_photo(inpainter, photo, seed=5, samples=3, batch_size=1)
    (alone,), _ = fill_photo(inpainter, photo, seed=5)
    assert all(map(np.array_equal, together, one_by_one)) and np.array_equal(alone, together[0])
    assert not np.array_equal(together[0], together[1]) and not np.array_equal(together[1], together[2])


def test_what_is_painted_in_the_hole_changes_nothing(inpainter):
    painted = Image.fromarray(np.where(HOLE[..., None], 255 - np.array(CAT), np.array(CAT)))
    one, other = (fill_photo(inpainter, read_photo(image, mask=MASK))[0][0] for image in (CAT, painted))
    assert np.array_equal(one, other)


def test_regions_and_samples_come_in_batches_with_seeds_of_their_own_and_progress_is_told():
    stub, told = Stub(), []
    decoding = DecodingConfig(total_iter=2, sweet_spot=2, mask_func="square")
    photo = read_photo(CAT, mask=MASK)
    filled, _ = fill_photo(
        stub, photo, 9, 5, decoding, lambda done, total: told.append((done, total)), margin=2, batch_size=8
    )
    assert len(filled) == 5 and [batch[0] for batch in stub.batches] == [8, 2]
    assert stub.batches[0][2:] == (2, decoding) and told == [(1, 4), (2, 4), (3, 4), (4, 4)]
    seeds = stub.batches[0][1] + stub.batches[1][1]
    assert seeds == [region_seed(9, sample, region) for sample in range(5) for region in range(2)]
    assert seeds[0] == 9 and len(set(seeds)) == 10


def test_regions_are_pasted_each_from_its_own_square():
    photo = read_photo(CAT, mask=MASK)
    parts = cut(photo, 16)
    images = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
    images[1] = 255
    pixels = paste(photo, parts, images, images)
    assert (pixels[100:140, 120:180] == 0).all() and (pixels[200:210, 300:330] == 255).all()
    assert np.array_equal(pixels[~HOLE], photo.pixels[~HOLE])


def test_a_shrunk_region_meets_known_colours_at_its_rim():
    flat = Image.new("RGB", (200, 150), (120, 120, 120))
    photo = read_photo(flat, box=(60, 40, 80, 60))
    (pixels,), notes = fill_photo(Stub(colour=150, bias=30), photo)
    assert notes == ["the picture: region of 80x60 pixels shrunk 9.4 times; it will look soft"]
    rim, middle = np.abs(pixels[40, 60:140].astype(int) - 120).mean(), pixels[70, 100, 0]
    assert rim < 8 and abs(int(middle) - 150) < 20


def test_notes_on_shrinking():
    assert fill_photo(Stub(), read_photo(CAT, box=(5, 5, 8, 8)))[1] == []
    (one,) = fill_photo(Stub(), read_photo(CAT, box=(5, 5, 20, 10)))[1]
    assert one == "the picture: region of 20x10 pixels shrunk 2.5 times"
    (two,) = fill_photo(Stub(), read_photo(CAT, mask=MASK))[1]
    assert two == "the picture: 2 regions, the largest of 60x40 pixels shrunk 7.5 times; it will look soft"
    (wide,) = fill_photo(Stub(), read_photo(CAT, mask=MASK), context=1.2)[1]
    assert "shrunk 4.5 times" in wide


# --- writing ---


def test_a_photo_is_written_in_its_own_mode_and_never_over_itself(tmp_path):
    sixteen = Image.fromarray(np.array(CAT.convert("L")).astype(np.uint16) * 255 + 7)
    sixteen.save(tmp_path / "cat.png")
    photo = read_photo(tmp_path / "cat.png", mask=MASK)
    (pixels,), _ = fill_photo(Stub(), photo)
    assert write_photo(tmp_path / "out.png", photo, pixels) == []
    with Image.open(tmp_path / "out.png") as file:
        after = np.array(file)
        assert file.mode == "I;16"
    assert np.array_equal(after[~HOLE], np.array(sixteen)[~HOLE]) and (after[HOLE] % 257 == 0).all()
    with pytest.raises(ValueError, match=r"cat\.png: is the picture itself"):
        write_photo(tmp_path / "cat.png", photo, pixels)
    assert "JPEG changes known pixels" in " ".join(write_photo(tmp_path / "out.jpg", photo, pixels))


def test_a_transparent_hole_is_opaque_afterwards(tmp_path):
    clear = CAT.copy()
    clear.putalpha(MASK)
    photo = read_photo(clear)
    (pixels,), _ = fill_photo(Stub(), photo)
    write_photo(tmp_path / "out.png", photo, pixels)
    with Image.open(tmp_path / "out.png") as file:
        after = np.array(file)
    assert (after[..., 3] == 255).all() and np.array_equal(after[~HOLE], np.array(clear)[~HOLE])


# --- the command line ---


@pytest.fixture
def run(checkpoint, tmp_path, monkeypatch):
    """inpainting.main in an empty folder, with the tiny networks."""
    monkeypatch.chdir(tmp_path)
    return lambda *flags: inpainting.main(
        ["--checkpoint", str(checkpoint), "--device", "cpu", "--num-workers", "1", *map(str, flags)]
    )


@pytest.fixture
def failure(run, capsys):
    """The exit status and what was said on standard error."""

    def failure(*flags) -> tuple[int, str]:
        with pytest.raises(SystemExit) as stop:
            run(*flags)
        return stop.value.code, capsys.readouterr().err

    return failure


def pixels_of(path) -> np.ndarray:
    with Image.open(path) as file:
        return np.array(file.convert("RGB"))


def test_one_picture_and_its_samples(run, tmp_path, capsys):
    small = CAT.resize((60, 40))
    small.save("photo.jpg")
    mask = Image.new("L", small.size, 255)
    mask.paste(0, (10, 12, 34, 30))
    mask.save("mask.png")
    run("--image", "photo.jpg", "--mask", "mask.png", "--out", "filled.png", "--seed", 4, "--mask-func", "linear")
    assert "note: photo.jpg: region of 24x18 pixels shrunk 2.5 times" in capsys.readouterr().out
    known = np.array(mask) == 255
    assert np.array_equal(pixels_of("filled.png")[known], pixels_of("photo.jpg")[known])
    run(
        "--image",
        "photo.jpg",
        "--mask",
        "mask.png",
        "--out",
        "k.png",
        "--seed",
        4,
        "--mask-func",
        "linear",
        "--samples",
        2,
    )
    assert np.array_equal(pixels_of("k_0.png"), pixels_of("filled.png"))
    assert not np.array_equal(pixels_of("k_1.png"), pixels_of("filled.png"))
    run("--image", "photo.jpg", "--box", "10,12,24,18", "--seed", 4, "--mask-func", "linear")
    assert np.array_equal(pixels_of("results/photo.png"), pixels_of("filled.png"))
    run("--image", "photo.jpg", "--box", "10,12,24,18", "--seed", 5, "--total-iter", 2, "--out", "o.png")
    assert not np.array_equal(pixels_of("o.png"), pixels_of("filled.png"))
    run("--image", "photo.jpg", "--box", "10,12,24,18", "--out", "o.jpg", "--context", 1.1)
    assert "JPEG changes known pixels" in capsys.readouterr().out


def test_folders_of_mixed_sizes_go_on_after_a_bad_file(run, failure, tmp_path):
    images, masks = tmp_path / "images", tmp_path / "masks"
    images.mkdir(), masks.mkdir()
    sizes = {"cat_1.png": (20, 31), "cat_2.jpg": (50, 24), "cat_10.tif": (16, 16), "cat_11.png": (9, 9)}
    for name, size in sizes.items():
        CAT.resize(size).save(images / name)
        mask = Image.new("L", size, 255)
        mask.paste(0, (2, 3, 8, 7))
        mask.save(masks / f"mask_{name.split('_')[1].split('.')[0]}.png")
    run("--image", images, "--mask", masks, "--out", "whole")
    assert sorted(path.name for path in (tmp_path / "whole").iterdir()) == [f"cat_{n}.png" for n in (1, 10, 11, 2)]
    with Image.open("whole/cat_2.png") as file:
        assert file.size == (50, 24)
    (images / "cat_2.jpg").write_text("not a picture")
    Image.new("L", (5, 5)).save(masks / "mask_11.png")
    code, said = failure("--image", images, "--mask", masks, "--out", "partly")
    assert code == 1 and f"error: {images / 'cat_2.jpg'}: cannot be read as an image" in said
    assert "cat_11.png is 9x9, its mask" in said
    assert sorted(path.name for path in (tmp_path / "partly").iterdir()) == ["cat_1.png", "cat_10.png"]
    for name in ("cat_1.png", "cat_10.png"):
        assert np.array_equal(pixels_of(f"whole/{name}"), pixels_of(f"partly/{name}"))
    code, said = failure("--image", images, "--box", "1,1,5,5", "--out", "boxes")
    assert code == 1 and len(list((tmp_path / "boxes").iterdir())) == 3


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--image", "cat.png", "--out", "x.gif"], "x.gif: unknown kind of picture '.gif'"),
        (["--image", "cat.png", "--mask", "folder"], "cat.png and its mask folder: expected two files or two folders"),
        (["--image", "folder", "--box", "1,1,1,1", "--out", "x.png"], "x.png: expected a folder for the results"),
        (["--image", "folder", "--box", "1,1,1,1"], "folder: no images in it"),
        (["--mask", "m.png"], "tell the hole of --image, which is missing"),
        (["--image", "cat.png", "--mask", "m", "--box", "1,1,1,1"], "not allowed with argument --mask"),
        (["--image", "cat.png", "--test-maskedimage-path", "a", "--test-mask-path", "b"], "exclude each other"),
        (["--image", "cat.png", "--samples", "0"], "--batch-size, --samples and --context must be at least 1"),
        (["--image", "cat.png", "--context", "nan"], "--batch-size, --samples and --context must be at least 1"),
        (["--image", "cat.png", "--box", "1,1,1"], "expected 4 integers with commas between, found 1,1,1"),
        (["--image", "cat.png", "--hole-color", "red"], "expected 3 integers with commas between, found red"),
    ],
)
def test_flags_that_do_not_fit_are_named(failure, tmp_path, flags, message):
    (tmp_path / "folder").mkdir()
    code, said = failure(*flags)
    assert code == 2 and message in " ".join(said.split())


def test_a_single_bad_picture_is_status_1(failure):
    code, said = failure("--image", "nowhere.png", "--box", "1,1,1,1")
    assert code == 1 and said.startswith("inpainting.py: error: nowhere.png: cannot be read as an image")


def test_pairs_and_names(tmp_path):
    assert pair_photos("a/cat.jpg", "m.png", "out.webp")[0][2].name == "out.webp"
    assert pair_photos("a/cat.v2.jpg", None, tmp_path)[0][2] == tmp_path / "cat.v2.png"
    folder = tmp_path / "images"
    folder.mkdir()
    CAT.save(folder / "cat.png")
    shutil.copy(folder / "cat.png", folder / "cat.webp")
    with pytest.raises(ValueError, match="two images of one name"):
        pair_photos(folder, None, tmp_path / "out")
