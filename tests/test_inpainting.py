"""inpainting.py with tiny random networks: the command line, on folders in the lab's layout and on photographs."""

import json
import shutil
from pathlib import Path
from typing import NamedTuple

import lpips
import numpy as np
import pytest
import torch
from PIL import Image
from tiny_networks import CODES, DECODING, GRID, SIZE, noise
from torch import Tensor, nn

import fid_score
import inpainting
from evaluation.metrics import frechet_distance, hole_psnr
from maskgit import visualize
from maskgit.data import GREY, to_float, to_pixels
from maskgit.masks import FAMILIES, make_holes, to_hidden
from models import features
from models.checkpoint import file_hash

# --- the command line on folders in the lab's layout ---


class Lab(NamedTuple):
    """Folders under tmp_path: masked_image/image_000.png, mask64/mask_000.png, test_gt.csv."""

    images: Path
    masks: Path
    csv: Path
    truth: Tensor  # (N, 3, H, W) uint8
    hole: Tensor  # (N, 1, H, W) bool

    @property
    def flags(self) -> tuple:
        return "--test-maskedimage-path", self.images, "--test-mask-path", self.masks

    @property
    def names(self) -> list[str]:
        return [path.name for path in sorted(self.images.iterdir())]


def make_lab(root: Path, hole: Tensor) -> Lab:
    truth = noise(len(hole), seed=8)
    images, masks = root / "masked_image", root / "mask64"
    images.mkdir(parents=True), masks.mkdir()
    rows = [",".join(f"pixel_{i}" for i in range(3 * SIZE * SIZE))]
    for i in range(len(hole)):
        pixels = truth[i].permute(1, 2, 0).numpy()
        rows.append(",".join(map(str, pixels.flatten())))
        Image.fromarray(np.where(hole[i, 0].numpy()[..., None], np.uint8(GREY), pixels)).save(
            images / f"image_{i:03}.png"
        )
        Image.fromarray(np.where(hole[i, 0].numpy(), 0, 255).astype(np.uint8)).save(masks / f"mask_{i:03}.png")
    (root / "test_gt.csv").write_text("\n".join(rows) + "\n")
    return Lab(images, masks, root / "test_gt.csv", truth, hole)


@pytest.fixture
def lab(tmp_path) -> Lab:
    holes = [make_holes(family, 1, SIZE, seed=2) for family in ("walk", "thick", "box", "half", "medium")]
    return make_lab(tmp_path / "lab", torch.cat(holes))


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch, tmp_path):
    """The current folder, where results/ goes by default, is temporary."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def run(checkpoint, tmp_path):
    def run(*arguments, out: str = "out", device: str = "cpu", folder: Path = checkpoint) -> Path:
        where = ["--checkpoint", folder, "--out", tmp_path / out, "--device", device]
        where += ["--num-workers", 1] if "--test-mask-path" in arguments and "--num-workers" not in arguments else []
        inpainting.main([str(argument) for argument in (*where, *arguments)])
        return tmp_path / out

    return run


def read(path: Path) -> Tensor:
    """A written PNG as uint8 (3, H, W)."""
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def read_all(folder: Path) -> Tensor:
    return torch.stack([read(path) for path in sorted(folder.iterdir())])


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def tiles(path: Path, count: int) -> list[Tensor]:
    """The pictures of a grid of at most five, which has one row."""
    sheet = read(path)
    assert sheet.shape == (3, SIZE, count * (SIZE + 2) - 2)
    return [sheet[:, :, i * (SIZE + 2) : i * (SIZE + 2) + SIZE] for i in range(count)]


def test_command_line_writes_composited_and_raw_pictures_and_grids_of_the_first_images(run, lab, inpainters):
    out = run(*lab.flags, "--gtcsv-path", lab.csv, "--grids", 2, "--seed", 3, "--batch-size", 3)
    expected = ["confidence", "imga", "manifest.json", "mask_scheduling", "overview.png", "raw", "test_results"]
    assert files(out) == expected and files(out / "confidence") == lab.names
    assert files(out / "test_results") == files(out / "raw") == lab.names == [f"image_00{i}.png" for i in range(5)]
    assert files(out / "imga") == files(out / "mask_scheduling") == lab.names[:2]

    known = ~lab.hole.expand_as(lab.truth)
    results, raw = read_all(out / "test_results"), read_all(out / "raw")
    assert torch.equal(results[known], lab.truth[known]) and torch.equal(results[~known], raw[~known])
    expected = inpainters["patch"](lab.truth, lab.hole, seed=3)
    assert torch.equal(results, expected.images) and torch.equal(raw, expected.raw)


def test_batch_size_and_grids_do_not_change_the_pictures(run, lab):
    whole = run(*lab.flags, out="whole")
    for size, grids in ((1, 5), (2, 0), (4, 3)):
        out = run(*lab.flags, "--batch-size", size, "--grids", grids, out=f"by{size}")
        for folder in ("test_results", "raw"):
            assert torch.equal(read_all(out / folder), read_all(whole / folder))
        assert (files(out / "imga") if grids else []) == lab.names[:grids]
        assert (out / "imga").exists() == (out / "overview.png").exists() == (grids > 0)
    for name in lab.names[:3]:  # nor do the grids depend on the batch
        assert torch.equal(read(whole / "imga" / name), read(out / "imga" / name))


def test_linear_schedule_with_a_sweet_spot_fills_everything_and_draws_each_step(run, lab):
    out = run(*lab.flags, "--mask-func", "linear", "--sweet-spot", 3, "--total-iter", 6, "--grids", 5)
    for i, name in enumerate(lab.names):
        start = int(to_hidden(lab.hole, GRID)[i].sum())
        steps = tiles(out / "mask_scheduling" / name, 3)
        hidden = [to_hidden((step == 0).all(dim=0)[None, None], GRID) for step in steps]
        # linear: floor((1 - t / 6) m) of the m tokens that the hole touches stay hidden, and none at the sweet spot
        assert [int(tokens.sum()) for tokens in hidden] == [start * 5 // 6, start * 4 // 6, 0]
        assert not (hidden[1] & ~hidden[0]).any()  # what is decided stays so
        pictures = tiles(out / "imga" / name, 3)
        for picture, step in zip(pictures, steps, strict=True):
            assert set(step.unique().tolist()) <= {0, 255}
            assert (picture[step == 0] == GREY).all()  # pixels of tokens still hidden
        assert torch.equal(pictures[-1], read(out / "raw" / name))
    decoding = json.loads((out / "manifest.json").read_text())["decoding"]
    assert (decoding["mask_func"], decoding["sweet_spot"], decoding["total_iter"]) == ("linear", 3, 6)


@pytest.mark.parametrize("known_truth", [True, False])
def test_overview_shows_truth_hole_four_steps_and_the_result_at_twice_the_size(run, lab, known_truth):
    out = run(*lab.flags, "--grids", 3, "--batch-size", 2, *(("--gtcsv-path", lab.csv) if known_truth else ()))
    columns = 6 + known_truth
    sheet, height, width = read(out / "overview.png"), 2 * (3 * (SIZE + 2) - 2), 2 * (columns * (SIZE + 2) - 2)
    assert sheet.shape[1] == height + visualize.LINE and sheet.shape[2] > width + 40
    for written in (sheet[:, : visualize.LINE], sheet[:, :, :-width]):  # captions, labels
        assert written.min() < 100 and (written == 255).float().mean() > 0.7
    sheet = sheet[:, -height::2, -width::2]
    for row, name in enumerate(lab.names[:3]):
        shown = [sheet[:, row * 18 : row * 18 + SIZE, i * 18 : i * 18 + SIZE] for i in range(columns)]
        expected = [lab.truth[row]] * known_truth + [read(lab.images / name), *tiles(out / "imga" / name, 4)]
        for picture, other in zip(shown, [*expected, read(out / "test_results" / name)], strict=True):
            assert torch.equal(picture, other)


def test_forgetting_the_second_look_and_the_token_rule_reach_the_inpainter(run, lab, inpainters):
    flags = ("--forget", "--second_look", 0.5, "--token-rule", "majority", "--pre_fill", "--self-ensemble")
    out = run(*lab.flags, *flags, "--grids", 1)
    options = {"forget": True, "second_look": 0.5, "token_rule": "majority", "pre_fill": True}
    options |= {"self_ensemble": True}
    expected = inpainters["patch"](lab.truth, lab.hole, **options)
    assert torch.equal(read_all(out / "test_results"), expected.images)
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["decoding"] == DECODING.model_dump() | options


def test_manifest_says_what_is_needed_to_repeat_the_run(run, lab, checkpoint, tmp_path):
    out = run(*lab.flags, "--gtcsv-path", lab.csv, "--seed", 11, "--margin", 1, "--top-k", 4, "--sampler", "lab")
    manifest = json.loads((out / "manifest.json").read_text())
    given = {"sampler": "lab", "top_k": 4}
    assert manifest["decoding"] == DECODING.model_dump() | given
    assert (manifest["seed"], manifest["margin"], manifest["device"]) == (11, 1, "cpu")
    assert manifest["checkpoint"] == str(checkpoint) and manifest["seconds"] > 0
    assert manifest["weights_sha256"] == {
        name: file_hash(checkpoint / f"{name}.safetensors") for name in ("vqgan", "transformer")
    }
    assert manifest["versions"]["torch"] == torch.__version__ and set(manifest["versions"]) >= {"python", "numpy"}
    assert (manifest["images"], manifest["masks"]) == (str(lab.images), str(lab.masks))
    assert (manifest["truth"], manifest["predicted"]) == (str(lab.csv), None)
    assert manifest["results"] == lab.names

    again = run(*lab.flags, "--seed", 11, "--margin", 1, "--top-k", 4, "--sampler", "lab", out="again")
    assert torch.equal(read_all(again / "test_results"), read_all(out / "test_results"))
    assert json.loads((again / "manifest.json").read_text())["truth"] is None
    other = run(*lab.flags, "--seed", 12, "--margin", 1, "--top-k", 4, "--sampler", "lab", out="other")
    assert not torch.equal(read_all(other / "test_results"), read_all(out / "test_results"))


def test_flags_are_understood_with_hyphens_and_with_underscores(run, lab):
    values = {
        "--test-maskedimage-path": lab.images, "--test-mask-path": lab.masks, "--gtcsv-path": lab.csv,
        "--total-iter": 5, "--sweet-spot": 4, "--mask-func": "square", "--sampling-temperature": 0.7, "--top-k": 8,
        "--temperature": 2.0, "--batch-size": 2, "--num-workers": 2,
    }  # fmt: skip
    outs = []
    for spelling in (str, lambda flag: "--" + flag[2:].replace("-", "_")):
        flags = [part for flag, value in values.items() for part in (spelling(flag), value)]
        outs.append(run(*flags, out=f"out{len(outs)}"))
    first, second = (json.loads((out / "manifest.json").read_text()) for out in outs)
    assert first["decoding"] == second["decoding"] == {
        "total_iter": 5, "sweet_spot": 4, "mask_func": "square", "sampler": "maskgit", "temperature": 2.0,
        "sampling_temperature": 0.7, "top_k": 8, "codes": "sampled", "forget": False, "second_look": 0.0,
        "token_rule": "any", "pre_fill": False, "guess": "navier_stokes", "rim": 0.0, "self_ensemble": False,
    }  # fmt: skip
    assert torch.equal(*(read_all(out / "test_results") for out in outs))


def test_profile_records_iterations(run, lab):
    out = run(*lab.flags, "--profile", 2)
    trace = json.loads((out / "profile" / "inpainting.pt.trace.json").read_text())
    names = {event.get("name", "") for event in trace["traceEvents"]}
    assert "aten::bmm" in names and {"ProfilerStep#1", "ProfilerStep#2"} <= names


def test_total_iter_alone_moves_the_sweet_spot_with_it(run, lab):
    out = run(*lab.flags, "--total-iter", 2)
    decoding = json.loads((out / "manifest.json").read_text())["decoding"]
    assert (decoding["total_iter"], decoding["sweet_spot"]) == (2, None)


def test_the_codes_and_iterations_by_need_reach_the_inpainter(run, lab):
    outs = [run(*lab.flags, *flags, out=f"out{i}") for i, flags in enumerate((
        (), ("--codes", "expected"), ("--codes", "mixed"), ("--codes", "argmax"), ("--total-iter", "auto"),
    ))]  # fmt: skip
    told = [json.loads((out / "manifest.json").read_text())["decoding"] for out in outs]
    assert [decoding["codes"] for decoding in told] == ["sampled", "expected", "mixed", "argmax", "sampled"]
    assert told[-1]["total_iter"] == "auto"
    pictures = [read_all(out / "raw") for out in outs]
    assert len({picture.numpy().tobytes() for picture in pictures}) == len(outs)
    for out in outs[1:4]:  # the pictures of the steps show what was decoded
        assert torch.equal(tiles(out / "imga" / lab.names[0], 4)[-1], read(out / "raw" / lab.names[0]))


def test_predicted_path_takes_the_composited_pictures_and_the_score_finds_them(run, lab, tmp_path, score):
    usual = run(*lab.flags, out="usual")
    out = run(*lab.flags, "--gtcsv-path", lab.csv, "--predicted-path", "mine")
    assert not (out / "test_results").exists() and files(out / "raw") == lab.names
    assert torch.equal(read_all(tmp_path / "mine"), read_all(usual / "test_results"))
    assert json.loads((out / "manifest.json").read_text())["predicted"] == str(tmp_path / "mine")
    assert score("--results", out)["predicted"] == str(tmp_path / "mine")


def test_whole_pictures_give_what_masked_ones_give(run, lab):
    masked = run(*lab.flags, out="masked")
    for image, name in zip(lab.truth, lab.names, strict=True):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(lab.images / name)
    whole = run(*lab.flags, out="whole")
    assert torch.equal(read_all(whole / "test_results"), read_all(masked / "test_results"))
    assert torch.equal(read(whole / "overview.png"), read(masked / "overview.png"))


def test_pictures_of_other_sizes_and_formats_are_cropped_and_named_png(run, tmp_path):
    images, masks = tmp_path / "photographs", tmp_path / "masks"
    images.mkdir(), masks.mkdir()
    pixels = np.random.default_rng(0).integers(256, size=(40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(images / "cat_1.jpg")
    Image.fromarray(np.where(np.arange(60) < 30, 0, 255).astype(np.uint8)[None].repeat(40, 0)).save(masks / "m1.bmp")
    out = run("--test-maskedimage-path", images, "--test-mask-path", masks)
    assert files(out / "test_results") == ["cat_1.png"]
    assert read(out / "test_results" / "cat_1.png").shape == (3, SIZE, SIZE)


# --- more than one answer, and how it came about ---


def difference(one: Tensor, other: Tensor) -> Tensor:
    """A stand-in for LPIPS: the mean absolute difference of images (b, 3, H, W) in [0, 1]."""
    return (one - other).abs().mean(dim=(1, 2, 3))


class Stub:
    """Takes the place of models.perceptual.Perceptual."""

    def __init__(self, net: str, weights):
        assert net == "alex"

    def to(self, device):
        return difference


def completions(out: Path, name: str, count: int) -> Tensor:
    """The written completions of an image, (count, 3, H, W)."""
    others = [out / "samples" / f"{Path(name).stem}_{number}.png" for number in range(1, count)]
    return torch.stack([read(path) for path in (out / "test_results" / name, *others)])


@pytest.mark.parametrize("size", [2, 8])
def test_samples_are_written_and_their_diversity_measured(run, lab, monkeypatch, capsys, inpainters, size):
    monkeypatch.setattr(inpainting, "Perceptual", Stub)
    out = run(*lab.flags, "--samples", 3, "--seed", 3, "--batch-size", size)
    assert files(out / "samples") == [f"image_00{i}_{k}.png" for i in range(5) for k in (1, 2)]
    expected = inpainters["patch"](lab.truth, lab.hole, seed=3, samples=3)
    found = torch.stack([completions(out, name, 3) for name in lab.names])
    assert torch.equal(found.flatten(0, 1), expected.images)
    values = to_float(found)
    pairs = [difference(values[:, i], values[:, j]) for i, j in ((0, 1), (0, 2), (1, 2))]
    mean = float(torch.stack(pairs).mean())
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["samples"] == 3 and manifest["diversity"]["mask64"] == pytest.approx(mean, rel=1e-4)
    assert table_row(capsys.readouterr().out, "mask64")[-1] == f"{mean:.4f}"


def test_images_without_a_hole_do_not_lower_the_diversity(run, tmp_path, monkeypatch):
    monkeypatch.setattr(inpainting, "Perceptual", Stub)
    hole = make_holes("box", 3, SIZE)
    hole[1] = False
    lab = make_lab(tmp_path / "partly", hole)
    out = run(*lab.flags, "--samples", 2)
    distances = [float(difference(*to_float(completions(out, name, 2))[:, None])) for name in lab.names]
    found = json.loads((out / "manifest.json").read_text())["diversity"]["mask64"]
    assert distances[1] == 0 and found == pytest.approx((distances[0] + distances[2]) / 2, rel=1e-4)


def test_without_the_weights_of_lpips_the_samples_come_without_diversity(run, lab, monkeypatch, capsys):
    def offline(*arguments, **options):
        raise OSError("no network")

    monkeypatch.setattr(lpips, "LPIPS", offline)
    out = run(*lab.flags, "--samples", 2)
    printed = capsys.readouterr().out
    assert len(files(out / "samples")) == 5 and table_row(printed, "mask64")[-1] == "-"
    (line,) = [line for line in printed.splitlines() if line.startswith("no diversity: ")]
    assert "the alex backbone of LPIPS could not be downloaded (no network)" in line and "--lpips-weights" in line
    assert json.loads((out / "manifest.json").read_text())["diversity"] == {"mask64": None}


def test_confidence_maps_are_those_of_the_decoding(run, lab, inpainters):
    out = run(*lab.flags, "--margin", 1, "--samples", 1)
    model = inpainters["patch"]
    confidence = model(lab.truth, lab.hole, margin=1).confidence
    expected = visualize.confidence_map(lab.truth, model.hide(lab.hole, 1), confidence, CODES)
    assert torch.equal(read_all(out / "confidence"), expected)


def test_animations_of_the_drawn_images(run, lab):
    out = run(*lab.flags, "--animate", "--grids", 2, "--batch-size", 1)
    assert files(out / "animation") == ["image_000.webp", "image_001.webp"]
    with Image.open(out / "animation" / "image_001.webp") as film:
        durations = []
        for number in range(film.n_frames):
            film.seek(number)
            film.load()
            durations.append(film.info["duration"])
        last = np.array(film.convert("RGB"))
    factor = visualize.SIDE // SIZE
    assert len(durations) == DECODING.total_iter + 2 and durations == [visualize.SHOWN] * 5 + [visualize.HELD]
    assert np.array_equal(last[::factor, ::factor], to_pixels(read(out / "test_results" / "image_001.png")))


def test_the_list_needs_no_checkpoint(monkeypatch, capsys):
    monkeypatch.setattr(inpainting, "listing", lambda: "nothing here")
    inpainting.main(["--list"])
    assert capsys.readouterr().out == "nothing here\n"


# --- the table ---


def table_row(text: str, group: str) -> list[str]:
    (row,) = [line.split() for line in text.splitlines() if line.startswith(f"{group} ")]
    return row


def test_table_holds_the_hole_psnr_as_computed_by_hand(run, lab, capsys):
    out = run(*lab.flags, "--gtcsv-path", lab.csv)
    results = read_all(out / "test_results").double().numpy()
    values = []
    for result, true, hole in zip(results, lab.truth.double().numpy(), lab.hole.numpy(), strict=True):
        error = (result - true)[:, hole[0]] / 255  # (3, missing pixels)
        values.append(10 * np.log10(1 / np.mean(error**2)))
    text = capsys.readouterr().out
    share = 100 * lab.hole.float().mean()
    assert table_row(text, "mask64") == ["mask64", "5", f"{share:.1f}", f"{np.mean(values):.2f}"]
    assert str(out / "manifest.json") in text and "s an image" in text


def test_table_without_truth_has_no_quality(run, lab, capsys):
    run(*lab.flags)
    assert table_row(capsys.readouterr().out, "mask64")[-1] == "-"


@pytest.mark.parametrize("empty", [1, 3])
def test_images_without_a_hole_stay_as_they_are_and_out_of_the_mean(run, tmp_path, capsys, empty):
    hole = make_holes("box", 3, SIZE)
    hole[:empty] = False
    lab = make_lab(tmp_path / "partly", hole)
    out = run(*lab.flags, "--gtcsv-path", lab.csv)
    results = read_all(out / "test_results")
    assert torch.equal(results[:empty], lab.truth[:empty])
    quality = "-"
    if empty < 3:
        values = hole_psnr(to_float(results[empty:]), to_float(lab.truth[empty:]), hole[empty:])
        quality = f"{values.mean():.2f}"
    assert table_row(capsys.readouterr().out, "mask64")[1::2] == ["3", quality]


# --- without arguments, and on to the score ---


class TinyFeatures(nn.Module):
    """Images (b, 3, H, W) in [0, 1] -> channel means (b, 3), in the place of Inception."""

    label, dimensions, published_hash = "FID", 3, ""

    def __init__(self, weights):
        super().__init__()
        self.weights_file = Path(weights)

    def forward(self, images):
        return images.mean(dim=(2, 3))


@pytest.fixture
def score(monkeypatch, tmp_path):
    """fid_score.main in the current folder with a tiny network."""
    monkeypatch.setattr(features, "FEATURES", {"inception": TinyFeatures})
    monkeypatch.setattr(fid_score, "FEATURES", features.FEATURES)
    (tmp_path / "weights.pth").write_bytes(b"tiny")
    return lambda *arguments: fid_score.main(
        ["--feature-weights", str(tmp_path / "weights.pth"), "--device", "cpu", "--no-cache", *map(str, arguments)]
    )


def test_without_arguments_chelsea_is_filled_and_scored(checkpoint, monkeypatch, tmp_path, capsys, score):
    monkeypatch.setattr(inpainting, "CATS", checkpoint)
    inpainting.main([])
    out, printed = tmp_path / "results", capsys.readouterr().out
    assert [line.split()[0] for line in printed.splitlines()[1 : 1 + len(FAMILIES)]] == list(FAMILIES)
    for family in FAMILIES:
        n, _, quality = table_row(printed, family)[1:]
        assert n == "6" and 3 < float(quality) < 40
    results, truth = read_all(out / "test_results"), read_all(out / "truth")
    assert results.shape == truth.shape == (6 * len(FAMILIES), 3, SIZE, SIZE)
    hole = torch.cat([make_holes(family, 6, SIZE) for family in FAMILIES]).expand_as(truth)
    assert torch.equal(results[~hole], truth[~hole])
    assert torch.equal(truth[3:6], truth[:3].flip(-1))  # each crop also mirrored
    assert len({bytes(image.numpy()) for image in truth}) == 6 and truth.float().std() > 20
    assert files(out / "imga") == [f"image_{i:03}.png" for i in range(0, 36, 6)]  # the first of each family
    assert [visualize.first_of_each([*"aabb"], count) for count in (0, 1, 3, 9)] == [[], [0], [0, 1, 2], [0, 1, 2, 3]]
    assert visualize.first_of_each([*"aaaaabbb"], 2) == [0, 5]

    report = score()  # reads results/manifest.json
    assert report["n"] == len(results) and report["truth"] == str(out / "truth") and report["value"] > 0


def test_results_on_folders_are_scored_against_the_truth_in_the_manifest(run, lab, score):
    out = run(*lab.flags, "--gtcsv-path", lab.csv)
    report = score("--results", out)
    means = [
        to_float(images).mean(dim=(2, 3)).double().numpy() for images in (read_all(out / "test_results"), lab.truth)
    ]
    moments = [part for mean in means for part in (mean.mean(axis=0), np.cov(mean, rowvar=False))]
    assert (report["n"], report["truth"]) == (5, str(lab.csv))
    assert report["value"] == pytest.approx(frechet_distance(*moments), rel=1e-3) and report["value"] > 0


# --- the command line: errors ---


@pytest.fixture
def failure(run, capsys):
    """What the command line says on standard error when it ends with status 2, as argparse does, or another."""

    def failure(*arguments, status: int = 2, **options) -> str:
        with pytest.raises(SystemExit) as raised:
            run(*arguments, **options)
        assert raised.value.code == status
        return capsys.readouterr().err

    return failure


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sweet-spot", 5], "sweet_spot = 5 must be at most total_iter = 4"),
        (["--sweet-spot", 7, "--total-iter", 6], "sweet_spot = 7 must be at most total_iter = 6"),
        (["--total-iter", 0], "total_iter"),
        (["--temperature", "nan"], "temperature"),
        (["--top-k", -1], "top_k: Input should be greater than or equal to 0, found -1"),
        (["--mask-func", "exponential"], "'cosine', 'linear', 'square', 'cubic', 'sqrt'"),
        (["--sampler", "hilton"], "'maskgit', 'lab', 'growing', 'random', 'halton'"),
        (["--second-look", "1"], "second_look: Input should be less than 1, found 1.0"),
        (["--token-rule", "most"], "'any', 'majority'"),
        (["--batch-size", 0], "argument --batch-size/--batch_size: expected a whole number of at least 1, found '0'"),
        (["--samples", 0], "argument --samples: expected a whole number of at least 1, found '0'"),
        (["--seed", "x"], "argument --seed: expected a whole number of at least 0, found 'x'"),
        (["--grids", "9" * 20], "argument --grids: expected a whole number of at least 0, found '9999"),
        (["--total-iter", "x"], "argument --total-iter/--total_iter: expected a whole number or auto, found 'x'"),
        (
            ["--lpips-weights", "alex.pth"],
            "--lpips-weights measures how several completions differ: give --samples",
        ),
        (["--samples", 2, "--lpips-weights", "alex.pth"], "alex.pth: no such weights file"),
        (["--animate", "--grids", 0], "--animate shows the images that --grids draws, which is 0"),
        (["--test-mask-path", "mask64"], "--test-maskedimage-path and --test-mask-path go together"),
        (["--test-maskedimage-path", "images"], "--test-maskedimage-path and --test-mask-path go together"),
        (["--gtcsv-path", "test_gt.csv"], "--gtcsv-path is the truth of --test-maskedimage-path, which is missing"),
        (["--test-maskedimage-path", "nowhere", "--test-mask-path", "m"], "nowhere: no such folder of images"),
        (["--colour", "red"], "unrecognized arguments: --colour red"),
    ],
)
def test_wrong_arguments_are_named(failure, arguments, message):
    assert message in " ".join(failure(*arguments).split())


def test_bad_devices_checkpoints_and_output_folders_are_named(failure, tmp_path):
    assert "--device toaster: expected auto, cpu, cuda or cuda:N" in failure(device="toaster")
    assert "nowhere: expected a folder with vqgan.safetensors" in failure(folder=tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    assert str(tmp_path / "file") in failure(out="file")


def test_counts_that_differ_name_both_folders(failure, lab):
    (lab.masks / "mask_004.png").unlink()
    assert f"5 images in {lab.images} and 4 masks in {lab.masks}" in failure(*lab.flags)


def test_numbers_that_differ_name_both_files(failure, lab):
    (lab.masks / "mask_004.png").rename(lab.masks / "mask_009.png")
    assert "alone are image_004.png, mask_009.png" in failure(*lab.flags)


def test_sizes_that_differ_name_both_files(failure, lab):
    Image.new("L", (SIZE + 2, SIZE), 255).save(lab.masks / "mask_002.png")
    message = failure(*lab.flags, status=1)
    assert f"{lab.images / 'image_002.png'} is 16x16, its mask {lab.masks / 'mask_002.png'} 18x16" in message


def test_sizes_are_compared_upright(run, failure, lab):
    """A camera's picture that lies on its side (EXIF orientation 6) is 10 wide and 16 high, and so must its mask be."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (16, 10)).save(lab.images / "image_001.png", exif=exif)
    Image.new("L", (16, 10), 255).save(lab.masks / "mask_001.png")
    assert "image_001.png is 10x16, its mask" in failure(*lab.flags, status=1)
    Image.new("L", (10, 16), 255).save(lab.masks / "mask_001.png")
    assert files(run(*lab.flags) / "raw") == lab.names


@pytest.mark.parametrize("size", [1, 2, 64])
def test_unreadable_pictures_are_named_and_the_others_filled_as_ever(run, lab, capsys, size):
    whole = run(*lab.flags, "--grids", 5)
    expected = {name: (whole / "raw" / name).read_bytes() for name in lab.names}
    shutil.rmtree(whole)
    capsys.readouterr()
    (lab.images / "image_003.png").write_text("not a picture")
    (lab.masks / "mask_000.png").write_text("no mask")
    with pytest.raises(SystemExit) as end:
        run(*lab.flags, "--grids", 5, "--batch-size", size)
    assert end.value.code == 1
    lines = capsys.readouterr().err.splitlines()
    for file in (lab.images / "image_003.png", lab.masks / "mask_000.png"):
        assert any(line.startswith(f"inpainting.py: error: {file}: cannot be read as an image") for line in lines)
    left = [name for name in lab.names if name not in ("image_000.png", "image_003.png")]
    for folder in ("raw", "test_results", "imga", "confidence"):
        assert files(whole / folder) == left
    assert {name: (whole / "raw" / name).read_bytes() for name in left} == {name: expected[name] for name in left}
    assert json.loads((whole / "manifest.json").read_text())["results"] == left


def test_results_that_would_overwrite_each_other_are_refused(failure, lab):
    with Image.open(lab.images / "image_003.png") as picture:
        picture.save(lab.images / "image_002.jpg")
    (lab.images / "image_003.png").unlink()
    (lab.masks / "mask_003.png").rename(lab.masks / "mask_002_again_2.png")
    (lab.images / "image_004.png").unlink()
    (lab.masks / "mask_004.png").unlink()
    assert f"{lab.images}: two images of one name" in failure(*lab.flags)


@pytest.mark.parametrize("where", ["truth", "images", "masks"])
def test_results_never_go_into_the_folders_they_come_from(failure, lab, where):
    truth = lab.csv.parent / "truth"
    shutil.copytree(lab.images, truth)
    folder = {"images": lab.images, "masks": lab.masks, "truth": truth}[where]
    before = {path: path.read_bytes() for path in lab.csv.parent.rglob("*") if path.is_file()}
    given = (*lab.flags, "--gtcsv-path", truth)
    assert "is an input" in failure(*given, "--predicted-path", folder)
    assert "is an input" in failure(*given, out=folder)
    assert {path: path.read_bytes() for path in lab.csv.parent.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("link", ["symlink_to", "hardlink_to"])
def test_results_never_replace_an_input_that_has_another_name_there(failure, lab, tmp_path, link):
    name = lab.names[0]
    (tmp_path / "out" / "test_results").mkdir(parents=True)
    getattr(tmp_path / "out" / "test_results" / name, link)(lab.images / name)
    before = (lab.images / name).read_bytes()
    assert "is an input" in failure(*lab.flags)
    assert (lab.images / name).read_bytes() == before


def test_truth_of_another_shape_is_named(failure, lab):
    lines = lab.csv.read_text().splitlines()
    lab.csv.write_text("\n".join(lines[:4]) + "\n")
    message = failure(*lab.flags, "--gtcsv-path", lab.csv)
    assert f"{lab.csv}: 3 true images for 5 to fill" in message
    np.savez(lab.csv.with_suffix(".npz"), images=np.zeros((5, 8, 8, 3), np.uint8))
    assert "(5, 3, 8, 8) true images (n, 3, H, W), expected 16x16" in failure(
        *lab.flags, "--gtcsv-path", lab.csv.with_suffix(".npz")
    )
    assert "no such folder or file of true images" in failure(*lab.flags, "--gtcsv-path", "nowhere.csv")


def test_help_shows_the_labs_flags(capsys):
    with pytest.raises(SystemExit) as raised:
        inpainting.main(["--help"])
    text = capsys.readouterr().out
    assert raised.value.code == 0 and "chelsea" in text
    for flag in ("--test-maskedimage-path", "--test-mask-path", "--total-iter", "--sweet-spot", "--mask-func"):
        assert flag in text


# --- every flag works or is refused ---


def flags_of() -> dict[str, list[str]]:
    """Each flag of the parser, by its name in the parsed arguments, as it may be typed."""
    values = {"precision": "float32", "mask_func": "linear", "sampler": "halton", "token_rule": "any", "codes": "mixed",
              "guess": "fsr", "tiling": "windows", "box": "1,1,3,3", "hole_color": "0,255,0"}  # fmt: skip
    found = {}
    for action in inpainting.build_parser()._actions:
        flag = action.option_strings[0]
        found[action.dest] = [flag] if action.nargs == 0 else [flag, values.get(action.dest, "1")]
    del found["help"]
    return found


CHOOSING = {  # these choose the mode, or are told to go with the flag that does
    "image", "test_maskedimage_path", "test_mask_path", "list", "mask", "hole_color", "box", "gtcsv_path",
}  # fmt: skip
MODES = {
    "--list": ["--list"],
    "--image": ["--image", "a.png"],
    "--test-maskedimage-path": ["--test-maskedimage-path", "images", "--test-mask-path", "masks"],
    "scikit-image's cat": [],
}


@pytest.mark.parametrize("mode", MODES)
def test_a_flag_that_would_do_nothing_is_refused_in_every_mode(mode, capsys):
    known = inpainting.MODES[mode] | (inpainting.ALWAYS if mode != "--list" else {"list"})
    parser = inpainting.build_parser()
    for name, typed in flags_of().items():
        if name in CHOOSING:
            continue
        line = [*MODES[mode], *typed]
        args, given = parser.parse_args(line), inpainting.given(line)
        assert name in given
        if name in known:
            continue
        with pytest.raises(SystemExit):
            inpainting.check(parser, args, given)
        told = capsys.readouterr().err
        assert f"--{name.replace('_', '-')}" in told and f"would do nothing with {mode}" in told, told


def test_every_flag_is_known_to_some_mode():
    known = inpainting.ALWAYS.union({"list"}, *inpainting.MODES.values())
    assert set(flags_of()) == known


def test_a_flag_given_with_its_default_value_is_refused_too(capsys):
    line = ["--image", "a.png", "--grids", "6"]
    with pytest.raises(SystemExit):
        inpainting.main(line)
    assert "--grids: would do nothing with --image" in capsys.readouterr().err
