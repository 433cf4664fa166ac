"""make_cats.py: heads of cats out of a folder laid out as Oxford-IIIT Pet."""

import re

import numpy as np
import pytest
from PIL import Image

import make_cats
from maskgit.data import GREY, list_images, read_hole, read_image
from maskgit.masks import make_holes

XML = (
    "<annotation><object><name>{}</name><bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax>"
    "</bndbox></object></annotation>"
)


@pytest.fixture
def pets(tmp_path):
    """21 cats, whose heads are red squares on green, and a dog."""
    folder = tmp_path / "downloads" / "oxford-iiit-pet"
    (folder / "images").mkdir(parents=True)
    (folder / "annotations" / "xmls").mkdir(parents=True)
    (folder / "annotations" / "trainval.txt").touch()
    for number in range(22):
        kind = "dog" if number == 3 else "cat"
        left, top = 10 + 3 * number, 5 + number
        pixels = np.zeros((120, 200, 3), np.uint8)
        pixels[..., 1] = 200
        pixels[top : top + 40, left : left + 40] = (200, 0, 0)
        Image.fromarray(pixels).save(folder / "images" / f"Pet_{number:02d}.jpg", quality=95)
        box = XML.format(kind, left, top, left + 40, top + 40)
        (folder / "annotations" / "xmls" / f"Pet_{number:02d}.xml").write_text(box)
    return folder


def run(pets, out, *arguments):
    make_cats.main(["--downloads", str(pets.parent), "--out", str(out), *arguments])


def test_the_folder_has_the_layout_that_the_configs_read(pets, tmp_path, capsys):
    out = tmp_path / "cats"
    run(pets, out)
    assert {path.name: len(list(path.iterdir())) for path in out.iterdir()} == {
        "train": 18, "val": 3, "test_gt": 3, "mask64": 3, "masked_image": 3,
    }  # fmt: skip
    assert "18 pictures" in capsys.readouterr().out
    holes = make_holes("walk", 3, 64, seed=1)[:, 0].numpy()
    for number in range(3):
        truth, masked = (read_image(out / name / f"image_{number:03d}.png") for name in ("test_gt", "masked_image"))
        hole = read_hole(out / "mask64" / f"mask_{number:03d}.png")
        assert np.array_equal(truth, read_image(out / "val" / f"image_{number:05d}.png"))
        assert np.array_equal(hole, holes[number])
        assert (masked[hole] == GREY).all() and np.array_equal(masked[~hole], truth[~hole])


def test_a_crop_is_a_square_around_the_head(pets, tmp_path):
    run(pets, tmp_path / "cats", "--size", "50")
    for path in list_images(tmp_path / "cats" / "train"):
        pixels = read_image(path)
        assert pixels.shape == (50, 50, 3)
        red = pixels[..., 0] > 100
        assert abs(red.mean() - (40 / 50) ** 2) < 0.05  # a head takes 1 / AROUND of each side
        assert red[25, 25]


def test_a_head_at_the_border_is_cropped_inside_the_photograph(pets):
    head = make_cats.Head(pets / "images" / "Pet_00.jpg", (150, 60, 200, 120))
    assert make_cats.crop(head, 32).size == (32, 32)
    wide = make_cats.Head(pets / "images" / "Pet_00.jpg", (0, 0, 200, 120))
    assert make_cats.crop(wide, 32).size == (32, 32)


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (
            lambda pets, out: (pets / "annotations" / "xmls" / "Pet_05.xml").write_text("<a>"),
            r"Pet_05\.xml: expected one",
        ),
        (lambda pets, out: (pets / "images" / "Pet_07.jpg").write_bytes(b"no"), r"Pet_07\.jpg: cannot be read"),
        (lambda pets, out: (pets / "images" / "Pet_07.jpg").unlink(), r"Pet_07\.jpg"),
        (lambda pets, out: [f.unlink() for f in (pets / "annotations" / "xmls").iterdir()], "no cat's head"),
        (lambda pets, out: (out.mkdir(), (out / "x").touch()), "is not empty"),
    ],
)
def test_what_is_wrong_is_named(pets, tmp_path, capsys, damage, told):
    damage(pets, tmp_path / "cats")
    with pytest.raises(SystemExit) as stopped:
        run(pets, tmp_path / "cats")
    said = capsys.readouterr().err
    assert stopped.value.code == 2
    assert re.search(told, said), said


def test_without_a_network_it_says_what_to_fetch(tmp_path, capsys):
    with pytest.raises(SystemExit):
        make_cats.main(["--downloads", str(tmp_path / "none"), "--out", str(tmp_path / "cats")])
    assert "could not be downloaded" in capsys.readouterr().err
