"""models/processes.py and training under torchrun: two processes do what one does with the whole batch."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training_runs import STAGES, checkpoint, events, train

from config import TrainingConfig
from models.distributed import mean, rank, sample_rows, summed, world
from models.transformer import Transformer
from models.vqgan import VQGAN
from training import run, stepping

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {
    "vqgan": ["--epochs=3", "--vqgan_training.clip=1.0", "--vqgan_training.accumulate=2",
              "--vqgan.codebook.reseed_below=0.6"],
    "transformer": ["--epochs=3", "--transformer_training.accumulate=2", "--transformer_training.warmup=1"],
}  # fmt: skip


def torchrun(commands: list[list[str]], folder: Path) -> subprocess.CompletedProcess:
    """Two processes that go through `commands`, each a script and its arguments."""
    (folder / "commands.json").write_text(json.dumps(commands))
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", ROOT / "tests/two_processes.py"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *launch, folder / "commands.json"], env=environment, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def both(tmp_path_factory, trained):
    """The same runs of both stages by one process and by two: their folder, arguments, and what the two said."""
    folder, commands = tmp_path_factory.mktemp("processes"), []
    arguments = {**SETTINGS, "transformer": [*SETTINGS["transformer"], f"--vqgan={trained[0] / 'vqgan.safetensors'}"]}
    for stage, settings in arguments.items():
        train(stage, trained[1], folder / stage / "one", *settings)
        options = [f"--config={trained[1]}", "--device=cpu", f"--out={folder / stage / 'two'}"]
        commands.append([f"training_{stage}", *options, *settings])
    result = torchrun(commands, folder)
    assert result.returncode == 0, result.stderr[-3000:]
    return folder, arguments, result.stdout


def assert_close(one, two, where: str = "") -> None:
    """Two nested states that differ at most by the order of float32 sums."""
    if where.endswith(("k.bias", "discriminator.model.5.bias")):
        return  # moves no softmax, or all hinges against each other: the gradient is rounding, and Adam steps on it
    if isinstance(one, torch.Tensor):
        torch.testing.assert_close(two, one, atol=2e-5, rtol=1e-4, msg=lambda told: f"{where}: {told}")
    elif isinstance(one, dict | list):
        pairs = one if isinstance(one, dict) else range(len(one))
        assert len(one) == len(two), where
        for key in pairs:
            assert_close(one[key], two[key], f"{where}.{key}")
    else:
        assert two == (pytest.approx(one, rel=1e-4) if isinstance(one, float) else one), where


@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_are_one_with_the_whole_batch(both, stage):
    """Losses, learning rates, figures and weights after 6 steps: GAN, codebook, re-seeding, hiding, flips, pieces."""
    folders = [both[0] / stage / name for name in ("one", "two")]
    assert_close(*(checkpoint(folder, stage) for folder in folders))
    one, two = (events(folder, stage) for folder in folders)
    assert one.Tags()["scalars"] == two.Tags()["scalars"]
    for tag in set(one.Tags()["scalars"]) - {"train/waiting", "train/images_per_second"}:
        assert [event.step for event in one.Scalars(tag)] == [event.step for event in two.Scalars(tag)]
        values = [[event.value for event in log.Scalars(tag)] for log in (one, two)]
        slack = 1e-3 if tag == "train/gan" else 1e-6  # it holds the discriminator's last bias, see assert_close
        assert values[0] == pytest.approx(values[1], rel=1e-4, abs=slack), tag


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_of_two_processes_is_resumed_by_one(both, tmp_path, trained, stage):
    for name in ("one", "two"):
        shutil.copytree(both[0] / stage / name, tmp_path / name)
        train(stage, trained[1], tmp_path / name, *both[1][stage], "--epochs=4", "--resume")
    assert_close(*(checkpoint(tmp_path / name, stage) for name in ("one", "two")))


def test_one_process_speaks_shares_files_and_leaves_what_inference_needs(both, trained):
    folder, _, output = both
    assert output.count("stage 1:") == output.count("stage 2:") == 1 and "on 2 x cpu" in output
    for stage, module in (("vqgan", VQGAN), ("transformer", Transformer)):
        module.load(folder / stage / "two" / f"{stage}.safetensors")
        assert len(list((folder / stage / "two" / "tensorboard" / stage).iterdir())) == 1
    names = sorted(path.name.split("-")[0] for path in (folder / "transformer" / "two" / "cache").iterdir())
    assert names == ["train", "train_tokens", "val", "val_tokens"]


def test_one_process_alone_has_nobody_to_speak_with():
    values = torch.arange(6.0).view(3, 2)
    assert (rank(), world()) == (0, 1) and summed(values) is values and torch.equal(mean(values), values)
    assert {tuple(row) for row in sample_rows(values[None], 64).tolist()} == {tuple(row) for row in values.tolist()}


def test_a_batch_that_processes_cannot_share_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(run, "world", lambda: 3)
    settings = TrainingConfig(epochs=1.0, batch_size=4, accumulate=2)
    with pytest.raises(ValueError, match=r"4 images a step .* expected a multiple of accumulate 2 times 3 processes"):
        run.Run("model", tmp_path, settings, 10, torch.nn.Linear(1, 1), {})


def test_a_loss_that_is_nan_elsewhere_stops_this_process_too(monkeypatch):
    monkeypatch.setattr(stepping, "mean", lambda loss: loss * math.nan)
    weight = torch.ones(2, requires_grad=True)
    weight.grad = torch.ones(2)
    with pytest.raises(stepping.NotFiniteError):
        stepping.apply_gradients(torch.tensor(1.0), torch.optim.SGD([weight], lr=1.0), [weight], clip=0.0)
    assert weight.tolist() == [1, 1]
