"""fid_score.py end to end: generated pictures, and a tiny network in the place of Inception and VGG16."""

import contextlib
import hashlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import fid_score
from evaluation.metrics import frechet_distance
from models import features

N, SIZE = 12, 8


class TinyFeatures(nn.Module):
    """Images (b, 3, H, W) in [0, 1] -> channel means and mean squares (b, 6); counts the images it saw."""

    label = "FID"
    dimensions = 6
    published_hash = "0000"
    seen = 0

    def __init__(self, weights=None):
        super().__init__()
        if weights is None:
            raise features.WeightsError("put the file there")
        self.weights_file = Path(weights)

    def forward(self, images):
        assert images.is_floating_point() and images.min() >= 0 and images.max() <= 1
        TinyFeatures.seen += len(images)
        return torch.cat([images.mean(dim=(2, 3)), images.square().mean(dim=(2, 3))], dim=1)


class TinyVGG(TinyFeatures):
    label = "FD-VGG16"


@pytest.fixture(autouse=True)
def tiny_networks(monkeypatch, tmp_path):
    """Stub networks, and no file of the user's own: cache and current folder are temporary."""
    monkeypatch.setattr(features, "FEATURES", {"inception": TinyFeatures, "vgg16": TinyVGG})
    monkeypatch.setattr(fid_score, "FEATURES", features.FEATURES)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home-cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights.pth").write_bytes(b"tiny")
    TinyFeatures.seen = 0


def pixels(seed: int, n: int = N, size: int = SIZE) -> np.ndarray:
    """uint8 (n, size, size, 3), each image with a brightness of its own."""
    rng = np.random.default_rng(seed)
    return (rng.uniform(0, 255, (n, 1, 1, 3)) * rng.uniform(0.5, 1, (n, size, size, 3))).astype(np.uint8)


def write(folder: Path, images: np.ndarray, suffix: str = ".png") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"image_{i:03d}{suffix}")
    return folder


@pytest.fixture
def results(tmp_path) -> Path:
    return write(tmp_path / "results" / "test_results", pixels(1))


@pytest.fixture
def truth(tmp_path) -> Path:
    return write(tmp_path / "truth", pixels(2))


def run(*arguments) -> dict:
    return fid_score.main(["--feature-weights", "weights.pth", "--device", "cpu", *map(str, arguments)])


def failure(*arguments) -> str:
    said = io.StringIO()
    with pytest.raises(SystemExit) as raised, contextlib.redirect_stderr(said):
        run(*arguments)
    assert raised.value.code == 2
    return said.getvalue()


def test_value_is_the_frechet_distance_of_the_features(results, truth):
    def features(images):
        x = images / 255.0
        return np.concatenate([x.mean(axis=(1, 2)), (x**2).mean(axis=(1, 2))], axis=1)

    x, y = features(pixels(1)), features(pixels(2))
    expected = frechet_distance(x.mean(0), np.cov(x, rowvar=False), y.mean(0), np.cov(y, rowvar=False))
    report = run("--predicted-path", results, "--gtcsv-path", truth)
    assert report["value"] == pytest.approx(expected, rel=1e-4) and expected > 1e-3
    assert run("--predicted-path", truth, "--gtcsv-path", truth)["value"] == pytest.approx(0, abs=1e-6)


def test_truth_as_folder_npz_and_csv_gives_one_value(results, truth, tmp_path):
    images = pixels(2)
    np.savez(tmp_path / "truth.npz", images=images)
    np.savez(tmp_path / "first.npz", images)
    rows = [",".join(map(str, range(SIZE * SIZE * 3))), *(",".join(map(str, image.flatten())) for image in images)]
    (tmp_path / "test_gt.csv").write_text("\n".join(rows) + "\n")
    values = [
        run("--predicted-path", results, "--gtcsv-path", tmp_path / source, "--no-cache")["value"]
        for source in ("truth", "truth.npz", "first.npz", "test_gt.csv")
    ]
    assert len(set(values)) == 1


def test_value_does_not_depend_on_order_names_or_batch_size(results, truth, tmp_path):
    shuffled = write(tmp_path / "shuffled", pixels(1)[::-1])
    values = [
        run("--predicted-path", folder, "--gtcsv-path", truth, "--batch-size", size, "--no-cache", "--num-workers", 0)
        for folder, size in ((results, 64), (shuffled, 64), (results, 5), (results, 1))
    ]
    assert [report["value"] for report in values] == pytest.approx([values[0]["value"]] * 4, rel=1e-5)


def test_cache_is_used_and_gives_the_same_value(results, truth, tmp_path):
    arguments = "--predicted-path", results, "--gtcsv-path", truth, "--cache", tmp_path / "cache"
    first, seen = run(*arguments)["value"], TinyFeatures.seen
    second = run(*arguments)["value"]
    assert (first, seen, TinyFeatures.seen) == (second, 2 * N, 3 * N)  # the second run saw the results alone
    (file,) = (tmp_path / "cache").iterdir()
    with np.load(file) as arrays:
        np.savez(file, mean=arrays["mean"] + 1, covariance=arrays["covariance"])
    assert run(*arguments)["value"] > second + 1


def test_cache_entries_are_apart_for_other_truth_weights_and_features(results, truth, tmp_path):
    cache = tmp_path / "home-cache" / "maskgit-inpainting"
    run("--predicted-path", results, "--gtcsv-path", truth)
    run("--predicted-path", results, "--gtcsv-path", truth, "--features", "vgg16")
    assert len(list(cache.iterdir())) == 2
    (tmp_path / "weights.pth").write_bytes(b"other")
    run("--predicted-path", results, "--gtcsv-path", truth)
    run("--predicted-path", results, "--gtcsv-path", write(tmp_path / "other", pixels(3)))
    assert len(list(cache.iterdir())) == 4
    run("--predicted-path", results, "--gtcsv-path", write(tmp_path / "third", pixels(4)), "--no-cache")
    assert len(list(cache.iterdir())) == 4


def test_damaged_cache_file_is_named(results, truth, tmp_path):
    arguments = "--predicted-path", results, "--gtcsv-path", truth, "--cache", tmp_path / "cache"
    run(*arguments)
    (file,) = (tmp_path / "cache").iterdir()
    for damage in (file.read_bytes()[:100], b"hello", b""):
        file.write_bytes(damage)
        assert f"{file}: not a readable cache file" in failure(*arguments)


def test_prints_label_value_and_n_and_warns_of_small_n(results, truth, capsys):
    report = run("--predicted_path", results, "--gtcsv_path", truth, "--num_workers", 1)
    out, err = capsys.readouterr()
    assert out == f"FID: {report['value']:.4f}\nn = {N}\n"
    assert "n is below 2048; values at small n are biased upwards; compare only equal n" in err
    assert "weights.pth is not the published Inception file" in err


def test_no_warning_of_small_n_or_weights_where_they_are_right(results, truth, capsys, monkeypatch):
    monkeypatch.setattr(fid_score, "FEW_IMAGES", N)
    monkeypatch.setattr(TinyFeatures, "published_hash", "")
    run("--predicted-path", results, "--gtcsv-path", truth)
    assert "warning" not in capsys.readouterr().err


def test_vgg16_distance_is_never_called_fid(results, truth, capsys):
    run("--predicted-path", results, "--gtcsv-path", truth, "--features", "vgg16")
    out, err = capsys.readouterr()
    assert out.startswith("FD-VGG16: ") and "FID" not in out + err
    assert "FID" not in (results.parent / "fid_score.json").read_text()


def test_report_is_written_beside_the_results_or_where_asked(results, truth, tmp_path):
    report = run("--predicted-path", results, "--gtcsv-path", truth)
    assert json.loads((results.parent / "fid_score.json").read_text()) == report
    assert (report["n"], report["features"], report["truth"]) == (N, "inception", str(truth))
    assert report["predicted"] == str(results) and set(report["versions"]) == {"torch", "numpy", "pytorch-fid"}
    assert report["weights_sha256"] == hashlib.sha256(b"tiny").hexdigest()
    run("--predicted-path", results, "--gtcsv-path", truth, "--json", tmp_path / "new" / "report.json")
    assert json.loads((tmp_path / "new" / "report.json").read_text())["value"] == report["value"]


# --- the manifest ---


def manifest(root: Path, **content) -> Path:
    names = sorted(path.name for path in (root / "test_results").iterdir())
    (root / "manifest.json").write_text(json.dumps({"results": names, **content}))
    return root


def test_without_arguments_the_manifest_of_results_names_the_truth(results, truth):
    expected = run("--predicted-path", results, "--gtcsv-path", truth)["value"]
    manifest(results.parent, truth=str(truth))
    assert run()["value"] == expected


def test_another_results_root_and_one_path_given(tmp_path, truth):
    other = write(tmp_path / "other" / "test_results", pixels(5))
    raw = write(tmp_path / "other" / "raw", pixels(6))
    root = manifest(other.parent, truth=str(truth))
    assert run("--results", root)["predicted"] == str(other)
    report = run("--results", root, "--predicted-path", raw)
    assert (report["predicted"], report["truth"]) == (str(raw), str(truth))
    elsewhere = write(tmp_path / "elsewhere", pixels(7))
    report = run("--results", root, "--gtcsv-path", elsewhere)
    assert (report["predicted"], report["truth"]) == (str(other), str(elsewhere))


def test_manifest_that_is_missing_broken_or_without_truth_is_named(results):
    assert "manifest.json: no such file; run inpainting.py first" in failure()
    manifest(results.parent, truth=None)
    assert "its key 'truth' names no true images; pass --gtcsv-path" in failure()
    for text, message in (("{", "not valid JSON"), ("[]", "expected an object")):
        (results.parent / "manifest.json").write_text(text)
        assert message in failure()


def test_files_left_over_from_an_earlier_run_are_refused(results, truth):
    manifest(results.parent, truth=str(truth))
    (results / "image_003.png").rename(results / "image_099.png")
    assert "missing image_003.png, left over image_099.png" in failure()


# --- what cannot be scored ---


def test_unequal_counts_name_both_numbers_and_folders(results, tmp_path):
    fewer = write(tmp_path / "fewer", pixels(2, n=N - 1))
    message = failure("--predicted-path", results, "--gtcsv-path", fewer)
    assert f"{N} results in {results} but {N - 1} true images in {fewer}" in message
    assert TinyFeatures.seen == 0


def test_unequal_image_sizes_are_never_resized(results, tmp_path):
    larger = write(tmp_path / "larger", pixels(2, size=10)[:, :, :9])
    message = failure("--predicted-path", results, "--gtcsv-path", larger)
    assert f"are 8x8 pixels but the true images in {larger} are 9x10" in message


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_jpeg_results_are_refused_whatever_their_suffix(results, truth, suffix):
    (results / "image_004.png").unlink()
    Image.fromarray(pixels(1)[4]).save(results / f"image_004{suffix}", format="JPEG")
    message = failure("--predicted-path", results, "--gtcsv-path", truth)
    assert f"image_004{suffix}: is a JPEG, so the score would measure the compression" in message


def test_unreadable_result_is_named(results, truth):
    (results / "image_002.png").write_text("not a picture")
    assert "image_002.png: cannot be read as an image" in failure("--predicted-path", results, "--gtcsv-path", truth)


def test_missing_paths_and_weights_end_with_one_line(results, truth, capsys):
    paths = "--predicted-path", results, "--gtcsv-path", truth
    assert "nowhere: no such folder of images" in failure("--predicted-path", "nowhere", "--gtcsv-path", truth)
    assert "no such folder or file" in failure("--predicted-path", results, "--gtcsv-path", "nowhere.csv")
    for more in ([], ["--features", "vgg16"]):
        with pytest.raises(SystemExit):
            fid_score.main([*map(str, paths), *more])
        assert "error: put the file there" in capsys.readouterr().err
    assert "gone.pth" in failure(*paths, "--feature-weights", "gone.pth")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch-size", "0"], "expected a whole number of at least 1, found '0'"),
        (["--num-workers", "-1"], "--num-workers"),
        (["--device", "toaster"], "--device toaster: expected auto, cpu"),
        (["--features", "clip"], "inception"),
        (["somewhere"], "somewhere"),
    ],
)
def test_wrong_options_are_named(arguments, message, capsys):
    with pytest.raises(SystemExit) as raised:
        fid_score.main(arguments)
    assert raised.value.code == 2
    assert message in capsys.readouterr().err


def test_underscores_in_values_stay(tmp_path):
    arguments = fid_score.build_parser().parse_args(["--predicted_path=my_results/a_b", "--gtcsv_path", "test_gt.csv"])
    assert (arguments.predicted_path, arguments.gtcsv_path) == (Path("my_results/a_b"), Path("test_gt.csv"))


def test_cache_folder_follows_xdg_cache_home(monkeypatch, tmp_path):
    assert fid_score.build_parser().parse_args([]).cache == tmp_path / "home-cache" / "maskgit-inpainting"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert fid_score.build_parser().parse_args([]).cache == Path.home() / ".cache" / "maskgit-inpainting"
    assert fid_score.build_parser().parse_args(["--no-cache"]).cache is None


def test_help_names_the_kinds_of_truth(capsys):
    with pytest.raises(SystemExit) as raised:
        fid_score.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert raised.value.code == 0
    assert "a folder, an .npz (array images, (N, H, W, 3) uint8) or the lab's test_gt.csv" in text
