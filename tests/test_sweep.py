"""sweep.py and methods.py with tiny networks and stub features: seeds, resuming, the command line, the configs."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from evaluator_stubs import N, stubs, truth
from tiny_networks import PATCH, SIZE, save, transformer, vqgan

import sweep
from config import load_config
from evaluation.report import read_lines
from maskgit.data import GREY, to_pixels, write_image
from maskgit.decoding_config import DecodingConfig
from maskgit.masks import make_holes

__all__ = ["stubs"]  # fixtures

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = sorted((ROOT / "configs" / "sweeps").glob("*.yml"))
ROWS = [
    {"name": "grey", "kind": "masked"},
    {"name": "Telea", "kind": "telea"},
    {"name": "floor", "kind": "vq_reconstruction"},
    {"name": "ours", "kind": "inpainting"},
    {"name": "argmax", "kind": "inpainting", "decoding": {"total_iter": 1, "sampling_temperature": 0.0}},
]


NETWORKS = ("floor", "ours", "argmax")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    torch.manual_seed(1)
    return save(tmp_path_factory.mktemp("weights"), vqgan(PATCH), transformer())


@pytest.fixture
def config(tmp_path, checkpoint, stubs) -> Path:
    """sweep.yml beside its images and masks: N images, walk holes in a folder and generated boxes, 2 seeds."""
    for index, (image, hole) in enumerate(zip(truth(), make_holes("walk", N, SIZE), strict=True)):
        write_image(tmp_path / "truth" / f"image_{index:03d}.png", to_pixels(image))
        write_image(tmp_path / "mask64" / f"mask_{index:03d}.png", np.where(hole[0], 0, 255).astype(np.uint8))
    values = {
        "data": {"truth": str(tmp_path / "truth"), "masks": {"walk": str(tmp_path / "mask64")}, "generated": ["box"]},
        "evaluator": {"feature_weights": str(stubs), "lpips_weights": str(stubs)},
        "seeds": [0, 1],
        "rows": [row | ({"checkpoint": str(checkpoint)} if row["name"] in NETWORKS else {}) for row in ROWS],
    }  # fmt: skip
    path = tmp_path / "sweep.yml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture
def run(config, tmp_path):
    def run(*arguments) -> Path:
        workers = [] if "--report" in arguments else ["--num-workers", "0"]
        sweep.main(list(map(str, ["--config", config, "--out", tmp_path / "out", *workers, *arguments])))
        return tmp_path / "out"

    return run


@pytest.fixture
def refused(run, capsys):
    """What the command line says when it refuses `arguments`."""

    def refused(*arguments) -> str:
        with pytest.raises(SystemExit) as stopped:
            run(*arguments)
        assert stopped.value.code == 2
        return capsys.readouterr().err

    return refused


def rewrite(path: Path, **changes) -> None:
    """Replaces `section__key` or `key` of a config file."""
    values = yaml.safe_load(path.read_text())
    for key, value in changes.items():
        *section, name = key.split("__")
        (values[section[0]] if section else values)[name] = value
    path.write_text(yaml.safe_dump(values))


# --- the command line -------------------------------------------------------------------------------------------------


def test_a_sweep_writes_a_line_an_entry_tables_and_plots(run):
    out = run()
    lines = read_lines(out / "rows.csv")
    found = [(line.family, line.method, line.seed) for line in lines]
    each = [("grey", None), ("Telea", None), ("floor", None), ("ours", 0), ("ours", 1), ("argmax", None)]
    expected = [(family, *entry) for family in ("walk", "box") for entry in each]
    assert found == [*expected, ("whole", "floor", None)]
    by = {(line.family, line.method, line.seed): line.figures for line in lines}
    both = {"fd_vgg16", "lpips", "psnr", "ssim", "l1", "seconds", "raw_fd_vgg16", "raw_lpips", "raw_ssim"}
    assert both <= set(by["box", "ours", 0]) and not {"raw_psnr", "kid"} & set(by["box", "ours", 0])
    assert both & set(by["box", "Telea", None]) == {name for name in both if not name.startswith("raw_")}
    assert by["box", "ours", 0]["n 20-30"] == N and by["box", "ours", 0] != by["box", "ours", 1]
    assert 0 < by["whole", "floor", None]["code_usage"] <= 1
    assert sorted(path.name for path in out.iterdir()) == [
        "chelsea.png",
        "fd.png",
        "hole_size.png",
        "results.md",
        "rows.csv",
    ]
    text = (out / "results.md").read_text()
    assert by["box", "floor", None]["leak"] == by["walk", "floor", None]["leak 1"] == 0  # a patch encoder
    titles = (
        "walk by hole size",
        "walk: the share of known tokens that change",
        "box: known pixels pasted back",
        "box: decoder output",
        "Whole images",
    )
    for part in ("`python sweep.py --config", f"n = {N}", "decoding seeds: ours: 0, 1", "- ours: `{", *titles):
        assert part in text
    assert "## box by hole size" not in text  # all boxes are of one size
    assert re.search(r"^\| ours \| [\d.]+ ± [\d.]+ \| ", text, flags=re.MULTILINE)


def test_the_figures_do_not_depend_on_what_else_is_compared(run):
    alone = read_lines(run("--rows", "ours", "--data.masks", "{}", "--seeds", 1) / "rows.csv")
    assert [(line.method, line.family, line.seed) for line in alone] == [("ours", "box", 1)]
    everything = {line.key: line for line in read_lines(run() / "rows.csv")}
    assert len(everything) == 13 and everything[alone[0].key] == alone[0]  # which was not measured again


def test_a_sweep_goes_on_where_it_was_stopped(run, monkeypatch):
    measure, seen = sweep.Sweep.measure, []

    def stopping(self, entry):
        seen.append((entry.family, entry.method.name, entry.seed))
        if len(seen) == 5:
            raise KeyboardInterrupt
        return measure(self, entry)

    monkeypatch.setattr(sweep.Sweep, "measure", stopping)
    with pytest.raises(KeyboardInterrupt):
        run()
    out = run()
    assert len(seen) == 14 and seen[5] == seen[4]  # one entry was lost
    assert len(read_lines(out / "rows.csv")) == 13
    (out / "results.md").unlink()
    run()
    assert len(seen) == 14 and (out / "results.md").is_file()  # nothing to measure, the report is written


def test_other_weights_settings_or_images_are_measured_anew(run, config, checkpoint, tmp_path):
    def lines() -> int:
        return len(read_lines(run("--rows", "ours", "floor", "--data.masks", "{}", "--seeds", 0) / "rows.csv"))

    assert lines() == lines() == 3  # ours and floor on boxes, floor on whole images
    values = yaml.safe_load(config.read_text())["rows"]
    values[3]["decoding"] = {"top_k": 7}
    rewrite(config, rows=values)
    assert lines() == 4
    other = shutil.copytree(checkpoint, tmp_path / "other")
    torch.manual_seed(5)
    save(other, vqgan(PATCH), transformer())
    rewrite(config, rows=[row | ({"checkpoint": str(other)} if "checkpoint" in row else {}) for row in values])
    assert lines() == 7
    rewrite(config, data__n=N - 1)
    assert lines() == 10


def test_the_first_n_images_keep_their_holes(config):
    few, all_ = (
        sweep.Sweep(load_config(config, {"data.n": n, "rows": ROWS[:1]}, sweep.SweepConfig), "cpu", 0) for n in (3, 0)
    )
    assert len(few.truth) == 3 and len(all_.truth) == N
    for family in ("walk", "box"):
        assert torch.equal(few.holes[family], all_.holes[family][:3])
    assert torch.equal(all_.holes["walk"], make_holes("walk", N, SIZE))
    assert torch.equal(all_.holes["box"], make_holes("box", N, SIZE, 1)) and few.networks == {"grey": None}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--rows", "mine"], "--rows mine: expected some of 'grey', 'Telea', 'floor', 'ours', 'argmax'"),
        (["--n", "7"], "data.n 7: expected 2 to 6, the images in"),
        (["--n", "1"], "data.n 1: expected 2 to 6"),
        (["--data.generated", "[blob]"], "data: generated: unknown family blob, expected some of walk"),
        (["--data.generated", "[]", "--data.masks", "{}"], "no holes: expected masks or generated families"),
        (["--data.masks", "{whole: x}"], "masks whole: taken"),
        (["--data.masks", "{box: x}"], "masks box: taken"),
        (["--data.truht", "x"], "data.truht: unknown key, known are: truth, n, masks"),
        (["--data.truth", "nowhere"], "nowhere: no such folder or file of true images"),
        (["--seeds", "-1"], "seeds.0: Input should be greater than or equal to 0, found -1"),
        (["--nonsense"], "unknown argument '--nonsense'"),
        (
            ["--report", "--seeds", "3", "--device", "cpu", "--data.truth", "x"],
            "--device --seeds --data.truth x: would do nothing with --report",
        ),
        (["--device", "toaster"], "--device toaster"),
    ],
)
def test_a_refused_command_line_says_why(refused, arguments, told):
    assert told in refused(*arguments)


def test_wrong_rows_masks_and_weights_are_named(refused, config, tmp_path, checkpoint):
    rewrite(config, rows=[*ROWS[:1], {"name": "b", "kind": "masked", "knid": 3}])
    assert "rows.1.knid: unknown key, known are: name, kind, checkpoint" in refused()
    rewrite(config, rows=[*ROWS[:1], *ROWS[:1]])
    assert "two methods are called grey" in refused()
    rewrite(config, rows=[{"name": "ours", "kind": "inpainting", "checkpoint": "nowhere"}])
    assert "no method is left to measure" in refused()
    rewrite(config, rows=ROWS[:1])
    for index in range(N):
        write_image(tmp_path / "full" / f"mask_{index}.png", np.full((SIZE, SIZE), 255 * (index == 2), np.uint8))
    assert "full: mask 2 has no hole" in refused("--data.masks", f"{{full: {tmp_path / 'full'}}}")
    (tmp_path / "full" / "mask_0.png").unlink()
    assert f"full: masks (5, 1, {SIZE}, {SIZE}) for images (6, 3" in refused(
        "--data.masks", f"{{full: {tmp_path / 'full'}}}"
    )
    for index in range(N):
        write_image(tmp_path / "large" / f"image_{index}.png", np.zeros((32, 32, 3), np.uint8))
    rewrite(config, rows=[{"name": "ours", "kind": "inpainting", "checkpoint": str(checkpoint)}])
    told = refused("--data.truth", tmp_path / "large", "--data.masks", "{}")
    assert f"large: 32x32 pixels, but method ours takes {SIZE}x{SIZE}" in told


def keys(config, device="cpu", precision="auto", **changes) -> dict[str, str]:
    found = sweep.Sweep(load_config(config, changes, sweep.SweepConfig), device, 0, precision).entries()
    return {f"{entry.method.name} {entry.family} {entry.seed}": entry.key for entry in found}


def test_float32_and_bfloat16_are_measured_apart_where_networks_are_at_work(config):
    one, other = keys(config, precision="float32"), keys(config, precision="bfloat16")
    assert keys(config) in (one, other)  # auto is what it means here
    same = {name for name in one if one[name] == other[name]}
    assert same == {f"{name} {family} None" for name in ("grey", "Telea") for family in ("walk", "box")}


def test_methods_without_weights_are_skipped_with_what_makes_them(run, config, capsys):
    absent = {"name": "post", "kind": "inpainting", "checkpoint": "nowhere", "made_by": "python train.py --x"}
    rewrite(config, rows=[*ROWS[:1], absent])
    lines = read_lines(run() / "rows.csv")
    assert {line.method for line in lines} == {"grey"}
    told = "skipped: post: no nowhere/vqgan.safetensors; python train.py --x makes it"
    assert told in capsys.readouterr().out


def test_methods_whose_weights_went_stay_in_the_report(run, config, checkpoint, tmp_path):
    moved = shutil.copytree(checkpoint, tmp_path / "moved")
    rewrite(config, rows=[{"name": "ours", "kind": "inpainting", "checkpoint": str(moved)}, *ROWS[:2]])
    before = (run() / "results.md").read_text()
    shutil.rmtree(moved)
    assert (run() / "results.md").read_text() == before and "| ours |" in before
    assert "| ours |" not in (run("--n", 3) / "results.md").read_text()  # it was not measured on these


def test_what_another_process_measured_meanwhile_is_not_measured_again(run, monkeypatch):
    measure, seen = sweep.Sweep.measure, []

    def beside(self, entry):
        seen.append(entry.key)
        monkeypatch.setattr(sweep.Sweep, "measure", measure)
        run()  # the other process
        monkeypatch.setattr(sweep.Sweep, "measure", beside)
        return measure(self, entry)

    monkeypatch.setattr(sweep.Sweep, "measure", beside)
    lines = read_lines(run() / "rows.csv")
    assert len(seen) == 1 and {seen.count(line.key) for line in lines} == {0, 1}
    assert len(lines) == len({line.key for line in lines}) == 13  # the one that both were at, once


def test_the_device_of_the_evaluator_is_part_of_the_key(config, monkeypatch):
    made = sweep.Sweep(load_config(config, {}, sweep.SweepConfig), "cpu", 0)
    here = [entry.key for entry in made.entries()]
    made.device = torch.device("cuda")
    assert not {*here} & {entry.key for entry in made.entries()}


def test_old_names_of_sections_and_kinds_are_read(config):
    before = keys(config)
    values = yaml.safe_load(config.read_text())
    values["judge"] = values.pop("evaluator")
    values["rows"][2]["kind"] = "floor"
    config.write_text(yaml.safe_dump(values))
    assert keys(config) == before
    flags = {"evaluator.feature_weights": "mine"}
    assert load_config(config, flags, sweep.SweepConfig).evaluator.feature_weights == "mine"


# --- the shipped configs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_sweep_loads_and_opens_with_a_comment_on_itself(path):
    config = load_config(path, root=sweep.SweepConfig)
    assert path.read_text().startswith(f"# {path.stem}: ")
    assert f"python sweep.py --config configs/sweeps/{path.name}" in path.read_text()
    for row in config.rows:
        if row.files:
            told = re.search(rf"--config (\S+) .*--out {row.checkpoint}$", path.read_text(), flags=re.MULTILINE)
            trained_by = ROOT / (told[1] if told else f"configs/{Path(row.checkpoint).name}.yml")
            assert told or (ROOT / row.checkpoint).is_dir() or trained_by.is_file()
            shipped = load_config(trained_by).decoding
            assert isinstance(shipped.changed(**row.decoding), DecodingConfig)


def test_the_main_sweep_has_every_row_of_the_protocol():
    config = load_config(ROOT / "configs" / "sweeps" / "main.yml", root=sweep.SweepConfig)
    kinds = [row.kind for row in config.rows]
    assert {"masked", "telea", "navier_stokes", "biharmonic", "vq_reconstruction"} <= set(kinds) and kinds.count(
        "inpainting"
    ) == 8
    assert config.seeds == (0, 1, 2, 3, 4) and config.data.hole_seed == 1 and config.data.n == 0
    assert {*config.data.masks, *config.data.generated} == {"walk", "thick", "box", "half"}
    assert any(row.decoding == {"total_iter": 1} for row in config.rows)


def test_report_measures_nothing(run, monkeypatch):
    out = run("--seeds", 0)
    (out / "results.md").unlink()
    monkeypatch.setattr(sweep.Sweep, "measure", lambda *_: pytest.fail("measured"))
    monkeypatch.setattr(sweep, "Sweep", lambda *_: pytest.fail("images, weights or networks were looked for"))
    run("--report")  # seed 1 is not there
    assert "decoding seeds: ours: 0\n" in (out / "results.md").read_text()


def test_the_picture_shows_every_row_on_every_family(config):
    both = sweep.Sweep(load_config(config, {"rows": ROWS[:2]}, sweep.SweepConfig), "cpu", 0)
    strips = sweep.strips(both)
    assert [strip.label for strip in strips] == ["walk", "box"]
    for strip in strips:
        truth, grey, telea = strip.pictures
        assert strip.captions == ["truth", "grey", "Telea"] and (grey == GREY).any() and not (telea == GREY).all()
        known = (grey != GREY).any(dim=0, keepdim=True).expand_as(truth)
        assert torch.equal(telea[known], truth[known]) and torch.equal(grey[known], truth[known])


def test_a_sweep_may_take_a_window_of_each_image(config, tmp_path):
    large = tmp_path / "large"
    for index in range(3):
        rng = np.random.default_rng(index)
        write_image(large / f"{index}.png", rng.integers(256, size=(20 + index, 40, 3), dtype=np.uint8))
    changes = {"data.truth": str(large), "data.window": 16, "data.masks": {}, "rows": ROWS[:2]}
    made, again = (sweep.Sweep(load_config(config, changes, sweep.SweepConfig), "cpu", 0) for _ in range(2))
    assert made.truth.shape == (3, 3, 16, 16) and torch.equal(made.truth, again.truth)
    assert made.holes["box"].shape == (3, 1, 16, 16)


def test_tilings_are_of_whole_photographs(config):
    rows = [{"name": "tiled", "kind": "inpainting", "tiling": "windows"}]
    with pytest.raises(ValueError, match=r"method tiled: tiling is of whole photographs \(data\.whole\)"):
        load_config(config, {"rows": rows}, sweep.SweepConfig)
