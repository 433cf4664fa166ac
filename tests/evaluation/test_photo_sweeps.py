"""photo_sweeps.py: photographs of any size, with stub and tiny networks."""

import numpy as np
import pytest
import torch
import yaml
from evaluator_stubs import Distance
from PIL import Image
from skimage.data import chelsea
from tiny_networks import CONV, save, transformer, vqgan

import sweep
from config import load_config
from evaluation import photo_sweeps
from evaluation.methods import Method, complete_photo
from evaluation.photo_sweeps import PhotoEvaluator, PhotoSweep
from evaluation.report import read_lines
from evaluation.sweeps import SweepConfig
from maskgit.classical import telea
from maskgit.inpainter import Inpainter
from maskgit.photo_holes import photo_hole
from photos.fill import fill_photo
from photos.photo import read_photo
from utils import mix

CAT = chelsea()
PICTURES = [CAT[:90, :120], CAT[100:180, 100:170]]


class Maps(Distance):
    """Stands in for LPIPS: the absolute difference of each pixel."""

    def maps(self, images, truth):
        return (images - truth).abs().mean(dim=1, keepdim=True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(1)
    return save(tmp_path_factory.mktemp("weights"), vqgan(), transformer())


@pytest.fixture
def config(tmp_path, checkpoint, monkeypatch):
    monkeypatch.setattr(photo_sweeps, "Perceptual", Maps)
    (tmp_path / "large").mkdir()
    for number, pixels in enumerate(PICTURES):
        Image.fromarray(pixels).save(tmp_path / "large" / f"{number}.png")
    ours = {"kind": "inpainting", "checkpoint": str(checkpoint)}
    values = {
        "data": {"truth": str(tmp_path / "large"), "whole": True, "generated": ["scratches", "spots"]},
        "evaluator": {"lpips_weights": str(checkpoint / "vqgan.safetensors")},
        "seeds": [0, 1],
        "rows": [
            {"name": "Telea", "kind": "telea"}, {"name": "windows", "coarse": False, **ours},
            {"name": "coarse", **ours}, {"name": "squares", "tiling": "squares", **ours},
            {"name": "two steps", "coarse": False, "decoding": {"total_iter": 2}, **ours},
        ],
    }  # fmt: skip
    (tmp_path / "photos.yml").write_text(yaml.safe_dump(values))
    return tmp_path / "photos.yml"


def test_each_photograph_is_filled_at_its_own_size_and_measured_near_its_hole(config, tmp_path):
    sweep.main(["--config", str(config), "--out", str(tmp_path / "out")])
    lines = read_lines(tmp_path / "out" / "rows.csv")
    assert len(lines) == 2 * (1 + 4 * 2) and {line.n for line in lines} == {2}
    assert len({line.key for line in lines}) == len(lines)
    made = PhotoSweep(load_config(config, {}, SweepConfig), "cpu", 0)
    hole = [photo_hole("spots", picture.shape[:2], 1, i) for i, picture in enumerate(PICTURES)]
    assert all(np.array_equal(*pair) for pair in zip(made.holes["spots"], hole, strict=True))
    filled = [np.where(h[..., None], telea(np.where(h[..., None], 128, p).astype(np.uint8), h), p)
              for p, h in zip(PICTURES, hole, strict=True)]  # fmt: skip
    expected = made.evaluator(filled, hole).means()
    own = next(line.figures for line in lines if (line.method, line.family) == ("Telea", "spots"))
    assert {name: own[name] for name in expected} == pytest.approx(expected)
    report = (tmp_path / "out" / "results.md").read_text()
    assert "LPIPS in and near the hole" in report and "## FD-VGG16" not in report and "Seam: the mean" in report


def test_what_is_measured_already_is_not_measured_again(config, tmp_path, monkeypatch):
    for _ in range(2):
        sweep.main(["--config", str(config), "--out", str(tmp_path / "out"), "--rows", "Telea"])
        monkeypatch.setattr(PhotoSweep, "measure", lambda *_: pytest.fail("measured again"))


@pytest.mark.parametrize("options", [{}, {"coarse": False}, {"tiling": "squares"}])
def test_a_photograph_is_completed_as_fill_photo_does(checkpoint, options):
    networks = Inpainter.from_pretrained(checkpoint, "cpu")
    pixels, hole = PICTURES[0], photo_hole("spots", (90, 120), 0)
    found = complete_photo(Method(name="x", kind="inpainting", **options), networks, pixels, hole, mix(1, 0))
    photo = read_photo(Image.fromarray(pixels), mask=Image.fromarray(np.where(hole, 0, 255).astype(np.uint8)))
    (expected,), _ = fill_photo(networks, photo, mix(1, 0), **{"tiling": "windows"} | options)
    assert np.array_equal(found, expected) and np.array_equal(found[~hole], pixels[~hole])
    other = np.where(hole[..., None], 255 - pixels, pixels)  # what is in the hole is not seen
    again = complete_photo(Method(name="x", kind="inpainting", **options), networks, other, hole, mix(1, 0))
    assert np.array_equal(again[hole], found[hole])


def test_lpips_is_taken_in_the_hole_and_eight_pixels_around(monkeypatch):
    monkeypatch.setattr(photo_sweeps, "Perceptual", Maps)
    truth, hole = np.zeros((60, 60, 3), dtype=np.uint8), np.zeros((60, 60), dtype=bool)
    hole[20:30, 20:30] = True
    filled = np.where(hole[..., None], np.uint8(255), truth)
    found = PhotoEvaluator([truth], None, torch.device("cpu"))([filled], [hole]).means()
    around = 26 * 26 - 4 * sum((i * i + j * j) > 64 for i in range(1, 9) for j in range(1, 9))
    assert found["lpips_near"] == pytest.approx(100 / around, rel=1e-5)
    assert found["l1"] == 1 and found["psnr"] == 0 and found["seam"] == 1


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"data.generated": ["walk"]}, "unknown family walk, expected some of scratches, text, spots, objects"),
        ({"data.masks": {"mine": "folder"}}, "whole photographs take generated families, no masks and no window"),
        ({"data.n": 3}, "data.n 3: there are 2 images"),
        ({"rows": [{"name": "grey", "kind": "masked"}]}, "method grey: kind masked fills no photographs"),
        ({"rows": [{"name": "x", "kind": "inpainting", "tiling": "squares", "coarse": True}]}, "coarse is of windows"),
    ],
)
def test_what_does_not_fit_is_named(config, changes, told):
    with pytest.raises(ValueError, match=told):
        PhotoSweep(load_config(config, changes, SweepConfig), "cpu", 0)


def test_windows_over_an_encoder_that_sees_more_than_a_patch_are_refused_at_once(config, tmp_path):
    torch.manual_seed(1)
    (tmp_path / "conv").mkdir()
    conv = save(tmp_path / "conv", vqgan(CONV), transformer())
    rows = [{"name": "x", "kind": "inpainting", "checkpoint": str(conv)}]
    with pytest.raises(ValueError, match="windows need a VQGAN whose encoder sees each patch alone"):
        PhotoSweep(load_config(config, {"rows": rows}, SweepConfig), "cpu", 0)
    PhotoSweep(load_config(config, {"rows": [rows[0] | {"tiling": "squares"}]}, SweepConfig), "cpu", 0)


def test_the_mean_of_completions_is_their_mean(checkpoint):
    networks, pixels = Inpainter.from_pretrained(checkpoint, "cpu"), PICTURES[1]
    hole = photo_hole("spots", pixels.shape[:2], 0)
    photo = read_photo(Image.fromarray(pixels), mask=Image.fromarray(np.where(hole, 0, 255).astype(np.uint8)))
    three, _ = fill_photo(networks, photo, 5, 3, tiling="windows")
    found = complete_photo(Method(name="x", kind="inpainting", mean_of=3), networks, pixels, hole, 5)
    assert np.array_equal(found, np.mean(three, axis=0).round()) and not np.array_equal(found, three[0])
