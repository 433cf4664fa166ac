"""evaluate.py with stub features: the table, its rows, and the arithmetic of a mean over seeds."""

import json

import numpy as np
import pytest
import torch
from test_inpainting import PATCH, SIZE, save, transformer, vqgan
from torch import nn

import evaluate
from data import to_pixels, write_image
from masks import make_holes

N = 4


class Means(nn.Module):
    """Stands in for VGG16Features: the mean of each channel."""

    dimensions = 3

    def __init__(self, weights=None):
        super().__init__()

    def forward(self, images):
        return images.mean(dim=(2, 3))


class Distance(nn.Module):
    """Stands in for LPIPS: the mean absolute difference."""

    def __init__(self, net, weights):
        super().__init__()

    def forward(self, images, truth):
        return (images - truth).abs().mean(dim=(1, 2, 3))


@pytest.fixture
def stubs(monkeypatch):
    monkeypatch.setattr(evaluate, "VGG16Features", Means)
    monkeypatch.setattr(evaluate, "Perceptual", Distance)


@pytest.fixture
def truth():
    return torch.randint(0, 256, (N, 3, SIZE, SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_the_true_images_score_zero_and_the_grey_ones_do_not(stubs, truth):
    judge = evaluate.Judge(truth, None, None, torch.device("cpu"))
    hole = make_holes("box", N, SIZE)
    perfect = judge.row("box", "truth", None, truth, hole, 2.0)
    assert perfect.fd_vgg16 == pytest.approx(0, abs=1e-9)
    assert (perfect.lpips, perfect.hole_psnr, perfect.seconds_an_image) == (0.0, float("inf"), 0.5)
    grey = judge.row("box", "grey", None, truth.masked_fill(hole, 128), hole, 0.0)
    assert grey.fd_vgg16 > 0 and grey.lpips > 0 and grey.hole_psnr < 20


@pytest.mark.parametrize("method", evaluate.CLASSICAL)
def test_classical_methods_continue_a_flat_image(method):
    flat = torch.full((2, 3, 32, 32), 77, dtype=torch.uint8)
    hole = torch.zeros(2, 1, 32, 32, dtype=torch.bool)
    hole[:, :, 12:18, 12:18] = True
    filled = evaluate.classical(evaluate.CLASSICAL[method], flat.masked_fill(hole, 128), hole, workers=1)
    assert filled.shape == flat.shape
    assert (filled.int() - 77).abs().max() <= 2  # Telea rounds down twice


@pytest.mark.parametrize("edge", range(4))
def test_biharmonic_inpainting_continues_a_ramp_to_the_border(edge):
    """scikit-image 0.26 alone gives garbage or an IndexError there, depending on what was in memory."""
    ramp = np.add.outer(3 * np.arange(24), 2 * np.arange(24))[..., None].repeat(3, -1).astype(np.uint8)
    hole = np.ascontiguousarray(np.rot90(np.pad(np.ones((3, 8), bool), ((0, 21), (9, 7))), edge))
    np.full((4096, 64), 1e18)  # what was in memory
    filled = evaluate.biharmonic(np.where(hole[..., None], np.uint8(128), ramp), hole)
    assert np.abs(filled.astype(int) - ramp)[hole].max() <= 4 and np.array_equal(filled[~hole], ramp[~hole])


def test_table_gives_mean_and_sample_deviation_over_seeds():
    rows = [evaluate.Row("box", "ours", seed, fd, 0.5, 10.0, 0.1) for seed, fd in ((0, 1.0), (1, 3.0))]
    text = evaluate.table([*rows, evaluate.Row("box", "masked input", None, 9.0, 0.5, 10.0, 0.0)])
    assert "| box | ours | 2.0 ± 1.4 | 0.5000 ± 0.0000 | 10.00 ± 0.00 | 0.100 ± 0.000 |" in text
    assert "| box | masked input | 9.0 | 0.5000 | 10.00 | 0.000 |" in text


def test_the_command_line_writes_every_row(stubs, truth, tmp_path):
    for index, image in enumerate(truth):
        write_image(tmp_path / "truth" / f"image_{index:03d}.png", to_pixels(image))
        known = ~make_holes("walk", N, SIZE)[index, 0].numpy()
        write_image(tmp_path / "mask64" / f"mask_{index:03d}.png", known.astype(np.uint8) * 255)
    weights = save(tmp_path / "weights", vqgan(PATCH), transformer())
    arguments = ["--checkpoint", weights, "--gtcsv-path", tmp_path / "truth", "--test_mask_path", tmp_path / "mask64"]
    arguments += ["--holes", "box", "--feature-weights", "stub", "--seeds", "0", "1", "--json", tmp_path / "out.json"]
    evaluate.main(list(map(str, arguments)))
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["n"] == N and 0 < report["vqgan"]["code_usage"] <= 1
    for holes in ("mask64", "box"):
        methods = {row["method"] for row in report["rows"] if row["holes"] == holes}
        assert {"masked input", "OpenCV Telea", "OpenCV Navier-Stokes", "true tokens decoded", "ours"} <= methods
    assert sorted(row["seed"] for row in report["rows"] if row["method"] == "ours") == [0, 0, 1, 1]


def test_a_wrong_number_of_masks_is_refused(stubs, truth, tmp_path, capsys):
    write_image(tmp_path / "truth" / "image_000.png", to_pixels(truth[0]))
    for index in range(2):
        write_image(tmp_path / "masks" / f"mask_{index}.png", np.zeros((SIZE, SIZE), np.uint8))
    weights = save(tmp_path / "weights", vqgan(PATCH), transformer())
    arguments = ["--checkpoint", weights, "--gtcsv-path", tmp_path / "truth", "--test-mask-path", tmp_path / "masks"]
    with pytest.raises(SystemExit):
        evaluate.main([*map(str, arguments), "--feature-weights", "stub"])
    assert "masks" in capsys.readouterr().err
