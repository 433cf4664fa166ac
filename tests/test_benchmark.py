"""benchmark.py with tiny networks: what is compared, how it is timed and counted, what is written."""

import contextlib
import json
import statistics
import tempfile

import pytest
import torch
from PIL import Image

import benchmark
from benchmark import Settings
from config import load_config
from evaluation import speed

SETTINGS = Settings("cpu", "float32", False, 1, None)


@pytest.fixture
def tiny(tiny_config_once):
    return load_config(tiny_config_once)


@pytest.mark.parametrize(("steps", "count"), [(1, 2), (3, 1)])
def test_the_reference_loop_fills_the_holes_and_saves_every_step(tiny, monkeypatch, tmp_path, steps, count):
    monkeypatch.setattr(benchmark, "TemporaryDirectory", lambda: contextlib.nullcontext(str(tmp_path)))
    decoded, original = [], benchmark.VQGAN.decode

    def decode(self, tokens):
        decoded.append(tokens)
        return original(self, tokens)

    monkeypatch.setattr(benchmark.VQGAN, "decode", decode)
    benchmark.reference_inpainting(tiny, SETTINGS, count, steps)()
    inputs = benchmark.faces(count, 16)
    hidden = benchmark.to_hidden(inputs.hole, 4)
    known = benchmark.networks(tiny)[0].encode(benchmark.to_float(inputs.images))
    assert len(decoded) == steps * count and all(len(tokens) == 1 for tokens in decoded)  # one image at a time
    for index, tokens in enumerate(decoded[steps - 1 :: steps]):
        assert tokens.min() >= 0 and tokens.max() < tiny.transformer.codes
        assert torch.equal(tokens[0][~hidden[index]], known[index][~hidden[index]])
    names = [f"{prefix}image_{index:03}.png" for index in range(count) for prefix in ("", "masks_", "steps_")]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    with Image.open(tmp_path / "image_000.png") as picture:
        assert picture.size == (16, 16)


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("who", ["ours", "reference"])
def test_training_works_go_forward_and_backward(tiny, stage, who):
    network = benchmark.networks(tiny)[stage - 1]
    inputs = torch.rand(4, 3, 16, 16) if stage == 1 else torch.zeros(4, 16, dtype=torch.long)
    forward = speed.gflop(lambda: network(inputs))
    found = speed.gflop(getattr(benchmark, f"{who}_stage_{stage}")(tiny, SETTINGS, 4))
    assert 1.5 * forward < found < 5 * forward  # backward is twice forward; some of ours is of hidden tokens alone


def test_inpainting_leaves_no_temporary_folder(tiny, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for build in (benchmark.ours_inpainting, benchmark.reference_inpainting):
        build(tiny, SETTINGS, 2)()
    assert not list(tmp_path.iterdir())


def test_peak_memory_is_of_the_work_and_not_of_this_process(tiny):
    ballast = torch.ones(2**28)  # 1 GiB here, none there
    found = speed.peak_mb(benchmark.ours_stage_2, 1, "cpu", tiny, SETTINGS, 4)
    assert 100 < found < 900 and ballast[-1] == 1


def test_quick_prints_tables_and_writes_every_repeat(tiny_config_once, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "load_config", lambda path: load_config(tiny_config_once))
    report = tmp_path / "new" / "report.json"
    benchmark.main(
        ["--quick", "--device", "cpu", "--precision", "float32", "--threads", "1", "--operators", "--json", str(report)]
    )
    printed, found = capsys.readouterr().out, json.loads(report.read_text())
    rows = {row["name"]: row for row in found["rows"]}
    ours, reference = rows["inpainting"], rows["reference inpainting"]
    rates = [row["images"] / statistics.median(row["seconds"]) for row in (ours, reference)]
    (line,) = [line for line in printed.splitlines() if "| inpainting |" in line]
    assert f"| {rates[0]:.3g} | 1 | {rates[0] / rates[1]:.2f} |" in line
    assert {"stage 1", "reference stage 1", "stage 2", "reference stage 2", "transformer passes"} <= set(rows)
    assert {"inpainting, T = 4, batch 8", "inpainting, T = 5, batch 4", "stage 2, 1000 images cached"} <= set(rows)
    assert found["machine"]["torch"] == torch.__version__ and found["ceilings_gflop_s"]["float32 product"] > 0
    assert all(0 < sum(row["operators"].values()) <= 1 for name, row in rows.items() if "reference" not in name)
    assert all(row["gflop"] > 0 and min(row["seconds"]) > 0 for row in found["rows"])


def test_unknown_models_are_named(capsys):
    with pytest.raises(SystemExit):
        benchmark.main(["--models", "nonsense"])
    assert "nonsense.yml" in capsys.readouterr().err
