"""metrics.py: distances between sets against closed forms, errors inside the hole, codes, running averages."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from evaluation import metrics
from evaluation.metrics import (
    Moments,
    code_usage,
    frechet_distance,
    hole_l1,
    hole_psnr,
    hole_ssim,
    kid,
    psnr,
)
from models.perceptual import Perceptual


def covariance(rng, d: int, n: int) -> np.ndarray:
    """A random covariance (d, d) of rank min(d, n - 1)."""
    return np.cov(rng.normal(size=(n, d)) * rng.uniform(0.5, 3, size=d), rowvar=False)


def picture(seed: int, b: int = 2, size: int = 16) -> torch.Tensor:
    return torch.rand(b, 3, size, size, generator=torch.Generator().manual_seed(seed))


def box_hole(b: int = 2, size: int = 16) -> torch.Tensor:
    hole = torch.zeros(b, 1, size, size, dtype=torch.bool)
    hole[:, :, 4:10, 5:12] = True
    return hole


# --- moments and Frechet distance ---


@given(st.lists(st.integers(1, 7), min_size=2, max_size=6), st.floats(-1e6, 1e6))
@settings(max_examples=30, deadline=None)
def test_moments_of_batches_equal_numpy_on_the_whole_even_far_from_zero(sizes, offset):
    features = np.random.default_rng(sum(sizes)).normal(size=(sum(sizes), 4)) + offset
    moments = Moments(4)
    for batch in np.split(features, np.cumsum(sizes)[:-1]):
        moments.update(torch.from_numpy(batch))
    assert moments.n == len(features)
    np.testing.assert_allclose(moments.mean, features.mean(axis=0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(moments.covariance, np.cov(features, rowvar=False), rtol=1e-6, atol=1e-7)


def test_moments_refuse_wrong_shapes_nan_and_a_single_image():
    moments = Moments(3)
    for bad in (np.zeros((2, 4)), np.zeros(3), np.zeros((0, 3))):
        with pytest.raises(ValueError, match=r"expected features \(b, 3\)"):
            moments.update(bad)
    with pytest.raises(ValueError, match="NaN"):
        moments.update(np.full((2, 3), np.nan))
    moments.update(np.zeros((1, 3)))
    with pytest.raises(ValueError, match="at least 2 images, found 1"):
        _ = moments.covariance


def test_frechet_of_diagonal_gaussians_is_the_closed_form():
    mean1, mean2 = np.array([0.0, 1, 2]), np.array([1.0, -1, 2])
    sd1, sd2 = np.array([1.0, 2, 0]), np.array([3.0, 0.5, 1])
    expected = np.sum((mean1 - mean2) ** 2) + np.sum((sd1 - sd2) ** 2)
    assert frechet_distance(mean1, np.diag(sd1**2), mean2, np.diag(sd2**2)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_frechet_of_commuting_covariances_is_the_closed_form(seed):
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    sd1, sd2, mean = rng.uniform(0, 3, size=6), rng.uniform(0, 3, size=6), rng.normal(size=6)
    cov1, cov2 = (basis @ np.diag(sd**2) @ basis.T for sd in (sd1, sd2))
    expected = np.sum(mean**2) + np.sum((sd1 - sd2) ** 2)
    assert frechet_distance(mean, cov1, np.zeros(6), cov2) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_frechet_equals_scipy_sqrtm_on_full_rank_covariances(seed):
    rng = np.random.default_rng(seed)
    cov1, cov2, mean1, mean2 = covariance(rng, 12, 100), covariance(rng, 12, 80), rng.normal(size=12), np.zeros(12)
    root = scipy.linalg.sqrtm(cov1 @ cov2).real
    expected = np.sum((mean1 - mean2) ** 2) + np.trace(cov1 + cov2 - 2 * root)
    assert frechet_distance(mean1, cov1, mean2, cov2) == pytest.approx(expected, rel=1e-9)


def test_frechet_is_exact_for_fewer_images_than_features():
    """n images, d > n features: the distance is that of the same images in a subspace that holds them all."""
    rng = np.random.default_rng(0)
    small1, small2 = rng.normal(size=(7, 12)), rng.normal(size=(8, 12)) * 2 + 1
    basis = np.linalg.qr(rng.normal(size=(90, 12)))[0].T  # (12, 90), rows orthonormal
    values = [
        frechet_distance(x.mean(0), np.cov(x, rowvar=False), y.mean(0), np.cov(y, rowvar=False))
        for x, y in ((small1, small2), (small1 @ basis, small2 @ basis))
    ]
    assert values[1] == pytest.approx(values[0], rel=1e-6)


def test_frechet_of_perpendicular_rank_deficient_gaussians_is_the_sum_of_traces():
    cov1, cov2 = np.diag([4.0, 0, 0, 0]), np.diag([0.0, 9, 1, 0])
    assert frechet_distance(np.zeros(4), cov1, np.zeros(4), cov2) == pytest.approx(14)


@given(st.integers(0, 1000), st.integers(2, 20), st.integers(2, 20))
@settings(max_examples=25, deadline=None)
def test_frechet_is_symmetric_not_negative_and_zero_for_equal_sets(seed, n1, n2):
    rng = np.random.default_rng(seed)
    one, two = ((rng.normal(size=8), covariance(rng, 8, n)) for n in (n1, n2))
    forth, back = frechet_distance(*one, *two), frechet_distance(*two, *one)
    assert forth == pytest.approx(back, rel=1e-6)
    assert forth > 0
    assert 0 <= frechet_distance(*one, *one) < 1e-5


def test_frechet_never_calls_scipy_sqrtm(monkeypatch):
    monkeypatch.setattr(scipy.linalg, "sqrtm", lambda *arguments: pytest.fail("sqrtm is gone from scipy 1.18"))
    assert frechet_distance(np.zeros(2), np.eye(2), np.ones(2), np.eye(2)) == pytest.approx(2)


def test_frechet_refuses_shapes_that_do_not_agree_and_nan():
    with pytest.raises(ValueError, match=r"cov2: expected shape \(2, 2\)"):
        frechet_distance(np.zeros(2), np.eye(2), np.zeros(2), np.eye(3))
    with pytest.raises(ValueError, match="mean2"):
        frechet_distance(np.zeros(2), np.eye(2), np.zeros(3), np.eye(2))
    with pytest.raises(ValueError, match="finite"):
        frechet_distance(np.zeros(2), np.eye(2) * np.nan, np.zeros(2), np.eye(2))


# --- KID ---


def test_kid_is_near_zero_for_one_distribution_and_grows_with_the_shift():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(400, 16)), rng.normal(size=(400, 16))
    mean, sd = kid(x, y, subsets=50, subset_size=100, rng=rng)
    near, far = (kid(x, y + shift, subsets=10, subset_size=100, rng=rng)[0] for shift in (0.3, 1.0))
    assert abs(mean) < 3 * sd / math.sqrt(4)  # 4 disjoint subsets in 400 images
    assert far > near > 10 * abs(mean)


def test_kid_of_whole_sets_is_the_estimator_written_as_loops():
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(5, 3)), rng.normal(size=(5, 3)) + 1
    kernel = lambda a, b: (a @ b / 3 + 1) ** 3  # noqa: E731
    within = sum(kernel(s[i], s[j]) for s in (x, y) for i in range(5) for j in range(5) if i != j) / 20
    across = sum(kernel(a, b) for a in x for b in y) / 25
    mean, sd = kid(x, y, subsets=3, subset_size=5, rng=rng)
    assert mean == pytest.approx(within - 2 * across)
    assert sd == pytest.approx(0, abs=1e-9)


def test_kid_repeats_with_its_seed():
    x, y = np.random.default_rng(2).normal(size=(2, 60, 4))
    one, two, other = (kid(x, y, 5, 20, rng=np.random.default_rng(seed)) for seed in (7, 7, 8))
    assert one == two != other


def test_kid_says_how_many_images_it_lacks():
    x, y = np.zeros((500, 4)), np.zeros((499, 4))
    with pytest.raises(ValueError, match="features2 holds n = 499 images, fewer than subset_size = 500"):
        kid(x, y, rng=np.random.default_rng(0))
    with pytest.raises(ValueError, match="of one d"):
        kid(x, np.zeros((500, 5)), rng=np.random.default_rng(0))
    with pytest.raises(ValueError, match="subset_size >= 2"):
        kid(x, x, subset_size=1, rng=np.random.default_rng(0))


def test_mind_in_one_dimension_is_the_mean_squared_difference_of_what_is_sorted():
    one, other = np.array([[2.0], [0.0]]), np.array([[1.0], [5.0]])  # 0 to 1 and 2 to 5
    assert metrics.mind(one, other, rng=np.random.default_rng(0)) == pytest.approx((1 + 9) / 2)


def test_mind_of_a_shift_is_its_squared_length_and_of_one_set_0():
    rng = np.random.default_rng(0)
    features, shift = rng.standard_normal((200, 16)), rng.standard_normal(16)
    found = metrics.mind(features, rng.permutation(features) + shift, rng=np.random.default_rng(1))
    assert found == pytest.approx(shift @ shift, rel=0.1)
    assert metrics.mind(features, rng.permutation(features), rng=np.random.default_rng(1)) == 0


@pytest.mark.parametrize("other", [np.zeros((3, 2)), np.zeros((4, 3)), np.zeros(4)])
def test_mind_refuses_sets_of_other_shapes(other):
    with pytest.raises(ValueError, match=r"one shape \(n, d\), found \(4, 2\) and"):
        metrics.mind(np.zeros((4, 2)), other, rng=np.random.default_rng(0))


# --- images ---


def test_psnr_of_a_constant_error():
    truth = torch.full((2, 3, 8, 8), 0.5)
    images = truth + torch.tensor([0.1, 0.01]).view(2, 1, 1, 1)
    torch.testing.assert_close(psnr(images, truth), torch.tensor([20.0, 40.0]), rtol=1e-4, atol=1e-3)
    assert psnr(truth, truth).tolist() == [math.inf] * 2


@pytest.mark.parametrize("measure", [hole_psnr, hole_l1])
def test_hole_errors_ignore_known_pixels(measure):
    images, truth, hole = picture(0), picture(1), box_hole()
    changed = torch.where(hole, images, picture(2))
    assert torch.equal(measure(images, truth, hole), measure(changed, truth, hole))
    assert not torch.equal(measure(images, truth, hole), measure(images, truth, ~hole))


def test_hole_errors_are_means_over_missing_pixels_and_channels():
    images, truth, hole = picture(0), picture(1), box_hole()
    difference = (images - truth)[:, :, 4:10, 5:12]
    torch.testing.assert_close(hole_l1(images, truth, hole), difference.abs().mean(dim=(1, 2, 3)))
    torch.testing.assert_close(hole_psnr(images, truth, hole), -10 * difference.square().mean(dim=(1, 2, 3)).log10())
    whole = torch.ones_like(hole)
    torch.testing.assert_close(hole_psnr(images, truth, whole), psnr(images, truth))
    assert hole_psnr(torch.where(hole, truth, images), truth, hole).tolist() == [math.inf] * 2


def test_hole_ssim_is_one_for_a_perfect_fill_and_falls_with_noise():
    truth, hole = F.interpolate(picture(0, size=8), scale_factor=4, mode="bilinear"), box_hole(size=32)
    noise = picture(3, size=32) - 0.5
    scores = [hole_ssim((truth + amount * noise).clamp(0, 1), truth, hole) for amount in (0.0, 0.1, 0.6)]
    torch.testing.assert_close(scores[0], torch.ones(2))
    assert (scores[0] > scores[1]).all() and (scores[1] > scores[2]).all()


def test_hole_ssim_reads_no_pixel_beyond_its_window():
    images, truth, hole = picture(0, size=32), picture(1, size=32), box_hole(size=32)
    images[..., 20:, :], images[..., :, 20:] = (
        0,
        1,
    )  # the hole ends at row 9 and column 11, the window reaches 5 further
    expected = hole_ssim(picture(0, size=32), truth, hole)
    torch.testing.assert_close(hole_ssim(images, truth, hole), expected)


@pytest.mark.parametrize("measure", [hole_psnr, hole_l1, hole_ssim])
def test_image_alone_scores_as_in_a_batch(measure):
    images, truth = picture(0, b=3), picture(1, b=3)
    hole = torch.rand(3, 1, 16, 16, generator=torch.Generator().manual_seed(5)) < torch.tensor([0.1, 0.5, 0.9]).view(
        3, 1, 1, 1
    )
    together = measure(images, truth, hole)
    assert together.shape == (3,)
    for i in range(3):
        alone = measure(images[i : i + 1], truth[i : i + 1], hole[i : i + 1])
        torch.testing.assert_close(alone, together[i : i + 1])


def test_image_measures_refuse_what_would_give_a_wrong_number():
    images, hole = picture(0), box_hole()
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        psnr(images * 255, images)
    with pytest.raises(ValueError, match="floating-point"):
        psnr((images * 255).byte(), (images * 255).byte())
    with pytest.raises(ValueError, match="of one shape"):
        psnr(images, images[:1])
    with pytest.raises(ValueError, match="hole: expected bool"):
        hole_psnr(images, images, hole.float())
    with pytest.raises(ValueError, match=r"\(2, 1, 16, 16\)"):
        hole_l1(images, images, hole[:1])
    hole[1] = False
    with pytest.raises(ValueError, match="no missing pixel in image 1"):
        hole_ssim(images, images, hole)


def framed(error: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A black truth of 10x10, a hole of 4x4 in it, and images with `error` in the hole."""
    truth, hole = torch.zeros(1, 3, 10, 10), torch.zeros(1, 1, 10, 10, dtype=torch.bool)
    hole[..., 3:7, 3:7] = True
    return truth.masked_fill(hole, error), truth, hole


def test_seam_error_is_that_of_the_rim_inside_the_hole():
    images, truth, hole = framed(0.5)
    images[..., 4:6, 4:6] = 0  # 2x2 in the middle are right
    assert metrics.seam_error(images, truth, hole, width=1)[0].item() == pytest.approx(0.5)
    assert metrics.seam_error(images, truth, hole)[0].item() == pytest.approx(0.5 * 12 / 16)
    assert [float(error) for error in metrics.seam_error(truth, truth, hole)] == [0, 0]


def test_seam_gradient_error_of_a_constant_error_is_at_the_rim():
    images, truth, hole = framed(0.4)  # central differences: .2 in two of four rows, and in two of four columns
    assert metrics.seam_error(images, truth, hole)[1].item() == pytest.approx(0.2 / 2)
    smooth = torch.linspace(0, 0.9, 10).expand(1, 3, 10, 10)
    assert metrics.seam_error(smooth, truth, hole)[1].item() == pytest.approx(0.1 / 2)  # to the right alone


def test_hole_gradient_is_the_slope():
    _, _, hole = framed(0.0)
    right = torch.linspace(0, 0.9, 10).expand(1, 3, 10, 10)
    assert metrics.hole_gradient(right, hole).item() == pytest.approx(0.1)
    assert metrics.hole_gradient(right / 2 + right.mT / 2, hole).item() == pytest.approx(0.05 * 2**0.5)


def test_diversity_is_the_mean_over_all_pairs_of_completions():
    completions = torch.rand(2, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    completions[1] = completions[1, :1]  # an image whose completions are all alike

    def distance(one, other):
        return (one - other).square().mean(dim=(1, 2, 3))

    pairs = [(i, j) for i in range(4) for j in range(4) if i < j]
    expected = sum(float((completions[0, i] - completions[0, j]).square().mean()) for i, j in pairs) / len(pairs)
    found = metrics.diversity(completions, distance)
    assert found.shape == (2,) and found[1] == 0 and float(found[0]) == pytest.approx(expected, rel=1e-5)


def test_diversity_with_lpips_grows_with_the_difference(tmp_path):
    torch.manual_seed(0)
    layers = torchvision.models.alexnet(weights=None).features.state_dict()
    save_file({f"features.{key}": value for key, value in layers.items()}, tmp_path / "alex.safetensors")
    lpips = Perceptual("alex", tmp_path / "alex.safetensors")
    base = torch.rand(1, 1, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 0.5
    other = torch.rand(1, 1, 3, 64, 64, generator=torch.Generator().manual_seed(2)) * 0.5
    near, far = (metrics.diversity(torch.cat((base, base + x * other), dim=1), lpips) for x in (0.1, 1.0))
    assert 0 < float(near) < float(far)


@pytest.mark.parametrize(
    ("completions", "message"),
    [
        (torch.rand(2, 3, 8, 8), r"expected completions \(b, K, 3, H, W\) with K >= 2, found \(2, 3, 8, 8\)"),
        (torch.rand(2, 1, 3, 8, 8), r"found \(2, 1, 3, 8, 8\)"),
        (torch.rand(2, 2, 3, 8, 8) * 255, r"values in \[0, 1\]"),
    ],
)
def test_diversity_refuses_single_completions_and_other_ranges(completions, message):
    with pytest.raises(ValueError, match=message):
        metrics.diversity(completions, None)


# --- codes ---


def test_code_usage_counts_codes_that_occur():
    tokens = torch.tensor([[0, 3], [3, 7]])
    assert code_usage(tokens, 8) == pytest.approx(3 / 8)
    assert code_usage(torch.arange(8), 8) == 1


def test_code_usage_refuses_the_mask_id():
    for bad in (torch.tensor([0, 8]), torch.tensor([-1]), torch.tensor([]), torch.tensor([0.5])):
        with pytest.raises(ValueError, match=r"0\.\.7"):
            code_usage(bad, 8)


# --- running averages ---


def test_one_exact_fill_counts_as_100_db_in_the_running_psnr():
    truth = torch.full((2, 3, 16, 16), 100, dtype=torch.uint8)
    filled, averages = truth.clone(), metrics.RunningAverages()
    filled[1] += 51  # an error of .2: 13.98 dB
    averages.add(box_hole(), filled, truth, None)
    assert averages.psnr / averages.scored == pytest.approx((metrics.EXACT - 20 * math.log10(0.2)) / 2, rel=1e-5)
    assert "56.99" in averages.row("box") and averages.diversity is None
