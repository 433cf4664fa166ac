"""evaluator.py with stub networks: what the figures of a set of images are."""

import numpy as np
import pytest
import torch
from evaluator_stubs import SIZE, N, stubs, truth

from evaluation import evaluator
from evaluation.evaluator import Evaluator
from maskgit.masks import make_holes

__all__ = ["stubs"]  # a fixture


def make(images, weights) -> Evaluator:
    return Evaluator(images, weights, weights, torch.device("cpu"))


def test_the_true_images_are_perfect_and_grey_ones_are_not(stubs):
    images, hole = truth(), make_holes("box", N, SIZE)
    judged = make(images, stubs)
    perfect, grey = judged(images, hole).means(), judged(images.masked_fill(hole, 128), hole).means()
    assert perfect == {
        "fd_vgg16": pytest.approx(0, abs=1e-9), "mind": 0, "sharpness": 1, "lpips": 0, "psnr": evaluator.EXACT,
        "ssim": 1, "l1": 0, "seam": 0, "seam_gradient": 0,
    }  # fmt: skip
    assert grey["mind"] > 0 and grey["seam"] > 0.1 and grey["seam_gradient"] > 0.05 and grey["sharpness"] < 0.5
    assert grey["fd_vgg16"] > 0 and grey["lpips"] > 0 and grey["psnr"] < 20 and grey["ssim"] < 0.9 and grey["l1"] > 0.1


def test_batches_do_not_change_the_figures(stubs, monkeypatch):
    images, hole = truth(), make_holes("walk", N, SIZE)
    grey = images.masked_fill(hole, 128)
    whole = make(images, stubs)(grey, hole).means()
    monkeypatch.setattr(evaluator, "BATCH", 4)
    assert make(images, stubs)(grey, hole).means() == pytest.approx(whole, rel=1e-6)


def test_kid_is_taken_from_500_images_on(stubs, monkeypatch):
    monkeypatch.setattr(evaluator, "SUBSET", 4)
    images, hole = truth(), make_holes("box", N, SIZE)
    judged = make(images, stubs)
    dark = images.masked_fill(hole, 0)
    figures = judged(dark, hole).means()
    assert figures["kid"] > 0 and figures["kid_sd"] > 0
    assert judged(dark, hole).means() == figures  # the same subsets for all
    monkeypatch.setattr(evaluator, "SUBSET", N + 1)
    assert "kid" not in judged(images, hole).means()


def test_what_is_no_figure_is_left_out(stubs):
    images, everything = truth(), torch.ones(N, 1, SIZE, SIZE, dtype=torch.bool)  # nothing is known: there is no seam
    found = make(images, stubs)(images, everything).means()
    assert "l1" in found and not {"seam", "seam_gradient"} & found.keys()
    everything[1:] = make_holes("box", N - 1, SIZE)  # those that have one count
    assert make(images, stubs)(images.masked_fill(everything, 128), everything).means()["seam"] > 0


def test_bins_are_of_a_tenth_of_the_pixels_and_hold_means_of_their_images(stubs):
    hole = torch.zeros(N, 1, 10, 10, dtype=torch.bool)
    for index, missing in enumerate((1, 10, 19, 20, 99, 100)):
        hole[index].view(-1)[:missing] = True
    values = torch.arange(6.0)
    figures = evaluator.Figures({}, {"psnr": values, "lpips": 2 * values, "l1": -values, "ssim": values})
    found = figures.by_hole_size(hole)
    assert {name: found[name] for name in found if name.startswith("n ")} == {
        "n 0-10": 1, "n 10-20": 2, "n 20-30": 1, "n 90-100": 2
    }  # fmt: skip
    assert (found["psnr 10-20"], found["lpips 90-100"], found["l1 20-30"]) == (1.5, 9.0, -3.0)
    assert len(found) == 4 * 4


def test_the_identity_changes_with_images_and_weights(stubs, tmp_path):
    images = truth()
    identity = make(images, stubs).identity
    assert identity == make(images.clone(), stubs).identity
    other = tmp_path / "other.safetensors"
    other.write_bytes(b"other")
    assert make(images, other).identity["vgg16"] != identity["vgg16"]
    assert make(255 - images, stubs).identity["truth"] != identity["truth"]
    assert Evaluator(images, stubs, None, torch.device("cpu")).identity["alexnet"] == "torchvision"
    assert (
        evaluator.digest(images) != evaluator.digest(images.reshape(-1))
        and len(np.unique(list(identity.values()))) == 2  # both weights are one file
    )
