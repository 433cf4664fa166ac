"""photos/photo.py: sources of holes, messages, files; and the command line of inpainting.py for photos."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage
from skimage.data import chelsea
from tiny_networks import CONV, PATCH, save, transformer, vqgan

import inpainting
from photos.photo import grown, pair_photos, read_photo, write_photo

CAT = Image.fromarray(chelsea())  # 451x300
HOLE = np.zeros((300, 451), dtype=bool)
HOLE[100:140, 120:180] = HOLE[200:210, 300:330] = True
MASK = Image.fromarray(np.where(HOLE, 0, 255).astype(np.uint8))


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


def test_heic_is_read_where_its_reader_is_installed_and_named_where_not(tmp_path, monkeypatch):
    for name in ("phone.heic", "renamed.jpg"):
        CAT.save(tmp_path / name, "HEIF", quality=95)
        photo = read_photo(tmp_path / name, box=(1, 2, 3, 4))
        assert photo.file.lossy and np.abs(photo.pixels.astype(int) - np.array(CAT)).mean() < 5
    assert [job[0].name for job in pair_photos(tmp_path, None, tmp_path / "out")] == ["phone.heic", "renamed.jpg"]
    Image.init()  # all kinds, or those that come later go with the list
    monkeypatch.setattr(Image, "ID", [kind for kind in Image.ID if kind != "HEIF"])
    monkeypatch.delitem(Image.OPEN, "HEIF")
    for name in ("phone.heic", "renamed.jpg"):
        with pytest.raises(ValueError, match=rf"{name}: .*\(a HEIC file: pip install pillow-heif, or save it as PNG\)"):
            read_photo(tmp_path / name, box=(1, 2, 3, 4))


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


# --- writing ---


def test_a_photo_is_written_in_its_own_mode_and_never_over_itself(tmp_path):
    sixteen = Image.fromarray(np.array(CAT.convert("L")).astype(np.uint16) * 255 + 7)
    sixteen.save(tmp_path / "cat.png")
    photo = read_photo(tmp_path / "cat.png", mask=MASK)
    pixels = np.full_like(photo.pixels, 200)
    assert write_photo(tmp_path / "out.png", photo, pixels) == []
    with Image.open(tmp_path / "out.png") as file:
        after = np.array(file)
        assert file.mode == "I;16"
    assert np.array_equal(after[~HOLE], np.array(sixteen)[~HOLE]) and (after[HOLE] % 257 == 0).all()
    with pytest.raises(ValueError, match=r"cat\.png: is an input"):
        write_photo(tmp_path / "cat.png", photo, pixels)
    assert "JPEG changes known pixels" in " ".join(write_photo(tmp_path / "out.jpg", photo, pixels))


def test_feathered_pixels_stay_as_transparent_as_they_are(tmp_path):
    clear = np.dstack((np.array(CAT), np.full(HOLE.shape, 40, np.uint8)))
    photo = read_photo(Image.fromarray(clear), mask=MASK)
    write_photo(tmp_path / "out.png", photo, np.full_like(photo.pixels, 200), feather=2)
    with Image.open(tmp_path / "out.png") as file:
        after = np.array(file)
    distance = ndimage.distance_transform_edt(~HOLE)
    near = (distance <= 2) & ~HOLE
    assert (after[HOLE] == (200, 200, 200, 255)).all() and (after[near] == (200, 200, 200, 40)).all()
    assert np.array_equal(after[distance > 2], clear[distance > 2])


def test_a_transparent_hole_is_opaque_afterwards(tmp_path):
    clear = CAT.copy()
    clear.putalpha(MASK)
    photo = read_photo(clear)
    pixels = np.full_like(photo.pixels, 200)
    write_photo(tmp_path / "out.png", photo, pixels)
    with Image.open(tmp_path / "out.png") as file:
        after = np.array(file)
    assert (after[..., 3] == 255).all() and np.array_equal(after[~HOLE], np.array(clear)[~HOLE])


# --- the command line ---


@pytest.fixture
def run(checkpoint, tmp_path, monkeypatch):
    """inpainting.main in an empty folder, with the tiny networks."""
    monkeypatch.chdir(tmp_path)
    return lambda *flags: inpainting.main(["--checkpoint", str(checkpoint), "--device", "cpu", *map(str, flags)])


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
    squares = "--image", "photo.jpg", "--tiling", "squares", "--mask-func", "linear"
    run(*squares, "--mask", "mask.png", "--out", "filled.png", "--seed", 4)
    assert "note: photo.jpg: region of 24x18 pixels shrunk 2.5 times" in capsys.readouterr().out
    known = np.array(mask) == 255
    assert np.array_equal(pixels_of("filled.png")[known], pixels_of("photo.jpg")[known])
    run(*squares, "--mask", "mask.png", "--out", "k.png", "--seed", 4, "--samples", 2)
    assert np.array_equal(pixels_of("k_0.png"), pixels_of("filled.png"))
    assert not np.array_equal(pixels_of("k_1.png"), pixels_of("filled.png"))
    run(*squares, "--box", "10,12,24,18", "--seed", 4)
    assert np.array_equal(pixels_of("results/photo.png"), pixels_of("filled.png"))
    run(*squares, "--box", "10,12,24,18", "--seed", 5, "--total-iter", 2, "--out", "o.png")
    assert not np.array_equal(pixels_of("o.png"), pixels_of("filled.png"))
    run("--image", "photo.jpg", "--box", "10,12,24,18", "--out", "o.jpg", "--context", 1.1)
    said = capsys.readouterr().out  # --context is of squares
    assert "JPEG changes known pixels" in said and "shrunk" in said
    box = "--image", "photo.jpg", "--box", "10,12,24,18"
    for flags in (("w.png",), ("c.png", "--no-coarse"), ("f.png", "--feather", 3), ("g.png", "--grow", 2)):
        run(*box, "--out", *flags)
    pixels, kept = pixels_of("w.png"), np.ones((40, 60), dtype=bool)
    kept[12:30, 10:34] = False
    changed = {name: (pixels_of(name) != pixels).any(axis=2) & kept for name in ("c.png", "f.png", "g.png")}
    assert [bool(where.any()) for where in changed.values()] == [False, True, True]
    assert not np.array_equal(pixels_of("c.png"), pixels)


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
        (["--image", "cat.png", "--mask", "folder"], "cat.png: no such picture or folder"),
        (
            ["--image", "here.png", "--mask", "folder"],
            "here.png and its mask folder: expected two files or two folders",
        ),
        (["--image", "folder", "--box", "1,1,1,1", "--out", "x.png"], "x.png: expected a folder for the results"),
        (["--image", "folder", "--box", "1,1,1,1"], "folder: no images in it"),
        (["--mask", "m.png"], "tell the hole of --image, which is missing"),
        (["--image", "cat.png", "--mask", "m", "--box", "1,1,1,1"], "not allowed with argument --mask"),
        (["--image", "cat.png", "--test-maskedimage-path", "a", "--test-mask-path", "b"], "exclude each other"),
        (
            ["--image", "cat.png", "--samples", "0"],
            "argument --samples: expected a whole number of at least 1, found '0'",
        ),
        (
            ["--image", "cat.png", "--context", "inf"],
            "argument --context: expected a number of at least 1, found 'inf'",
        ),
        (
            ["--image", "cat.png", "--context", "nan"],
            "argument --context: expected a number of at least 1, found 'nan'",
        ),
        (["--image", "cat.png", "--context", "3", "--tiling", "windows"], "--context: would do nothing with --tiling"),
        (["--image", "cat.png", "--feather", "3", "--context", "2"], "--feather: would do nothing with --tiling"),
        (["--image", "cat.png", "--no-coarse", "--tiling", "squares"], "--coarse: would do nothing with --tiling"),
        (["--image", "cat.png", "--box", "1,1,1"], "expected 4 integers with commas between, found 1,1,1"),
        (["--image", "cat.png", "--hole-color", "red"], "expected 3 integers with commas between, found red"),
        (["--image", "cat.png", "--hole-color", "0,0,256"], "expected integers, 0 to 255, found 0,0,256"),
    ],
)
def test_flags_that_do_not_fit_are_named(failure, tmp_path, flags, message):
    (tmp_path / "folder").mkdir()
    (tmp_path / "here.png").touch()
    code, said = failure(*flags)
    assert code == 2 and message in " ".join(said.split())


def test_a_single_bad_picture_is_status_1(failure):
    code, said = failure("--image", "nowhere.png", "--box", "1,1,1,1")
    assert code == 1 and said.startswith("inpainting.py: error: nowhere.png: cannot be read as an image")


def test_a_grown_hole_is_the_hole_and_what_is_so_near():
    photo = read_photo(CAT, mask=MASK)
    wider = grown(photo, 2)
    distance = ndimage.distance_transform_edt(~photo.hole)
    assert np.array_equal(wider.hole, distance <= 2) and wider.hole.sum() > photo.hole.sum()
    assert grown(photo, 0) is photo
    with pytest.raises(ValueError, match="grown by 1000 pixels the hole is the whole picture"):
        grown(photo, 1000)


def test_pairs_and_names(tmp_path):
    assert pair_photos("a/cat.jpg", "m.png", "out.webp") == [(Path("a/cat.jpg"), Path("m.png"), [Path("out.webp")])]
    targets = pair_photos("a/cat.v2.jpg", None, tmp_path, 2)[0][2]
    assert targets == [tmp_path / "cat.v2_0.png", tmp_path / "cat.v2_1.png"]
    folder = tmp_path / "images"
    folder.mkdir()
    CAT.save(folder / "cat.png")
    shutil.copy(folder / "cat.png", folder / "cat.webp")
    with pytest.raises(ValueError, match="two images of one name"):
        pair_photos(folder, None, tmp_path / "out")


def test_no_result_replaces_a_picture_or_a_mask(tmp_path):
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
        CAT.save(tmp_path / name / "cat.png")
    image, mask = tmp_path / "images" / "cat.png", tmp_path / "masks" / "cat.png"
    (tmp_path / "link.png").symlink_to(mask)
    CAT.save(tmp_path / "cat_1.png")
    for given in (
        (image, mask, image), (image, mask, mask), (image, mask, image.parent), (image, mask, mask.parent),
        (image, mask, tmp_path / "link.png"), (image.parent, mask.parent, mask.parent),
        (image.parent, None, tmp_path / "images" / ".." / "images"), (image, tmp_path / "cat_1.png", tmp_path, 2),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="is an input"):
            pair_photos(*given)


@pytest.mark.parametrize(
    ("flags", "name"),
    [(["--image", "cat.png", "--box", "1,1,2,2"], "photos64"), ([], "cats64"),
     (["--image", "cat.png", "--checkpoint", "pretrained/cats64"], "cats64")],
)  # fmt: skip
def test_photographs_are_filled_by_the_model_of_photographs(monkeypatch, capsys, flags, name):
    def stop(folder, *rest):
        raise ValueError(f"asked for {Path(folder).name}")

    monkeypatch.setattr(inpainting.Inpainter, "from_pretrained", stop)
    with pytest.raises(SystemExit):
        inpainting.main(flags)
    assert f"asked for {name}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("encoder", "flags", "tiling"),
    [(PATCH, [], "windows"), (PATCH, ["--context", "3"], "squares"), (CONV, [], "squares")],
)
def test_a_tiling_that_is_not_asked_for_is_what_the_flags_mean_and_the_model_can(tmp_path, encoder, flags, tiling):
    torch.manual_seed(0)
    folder = save(tmp_path / "model", vqgan(encoder), transformer())
    CAT.resize((60, 40)).save(tmp_path / "cat.png")
    pictures = []
    for name, more in (("one.png", flags), ("two.png", ["--tiling", tiling, *flags])):
        line = [
            "--image",
            tmp_path / "cat.png",
            "--box",
            "10,12,24,18",
            "--checkpoint",
            folder,
            "--out",
            tmp_path / name,
        ]
        inpainting.main([*map(str, line), *more])
        pictures.append(pixels_of(tmp_path / name))
    assert np.array_equal(*pictures)
