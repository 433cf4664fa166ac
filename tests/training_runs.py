"""How the tests run both stages: their command lines in-process, and what a run leaves behind."""

import pytest
import torch
from conftest import colourful
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import training_transformer
import training_vqgan

IMAGES = torch.from_numpy(colourful(12)).permute(0, 3, 1, 2).contiguous()  # (12, 3, 16, 16) uint8
TRAIN, VAL = IMAGES[:8], IMAGES[8:]
STAGES = {"vqgan": training_vqgan.main, "transformer": training_transformer.main}
PER_EPOCH = 2  # steps: 8 pictures in batches of 4


def train(stage: str, config, out, *arguments: str):
    """Runs `stage` of `config` into the folder `out`, which is returned."""
    STAGES[stage](["--config", str(config), "--out", str(out), "--device", "cpu", *arguments])
    return out


def refusal(capsys, stage: str, config, out, *arguments: str) -> str:
    """What the command line says when it refuses; it must leave with code 2."""
    with pytest.raises(SystemExit) as stopped:
        train(stage, config, out, *arguments)
    assert stopped.value.code == 2
    return capsys.readouterr().err


def checkpoint(out, stage: str) -> dict:
    """What --resume would read."""
    return torch.load(out / f"{stage}_last.pt", weights_only=True)


def differences(one, other, where: str = "") -> list[str]:
    """The paths at which two nested states are not bit-equal."""
    if isinstance(one, dict):
        keys = [f"{where}: keys"] * (one.keys() != other.keys())
        return keys + [
            d for key in one.keys() & other.keys() for d in differences(one[key], other[key], f"{where}.{key}")
        ]
    if isinstance(one, list | tuple):
        lengths = [f"{where}: length"] * (len(one) != len(other))
        return lengths + [
            d for i, (a, b) in enumerate(zip(one, other, strict=False)) for d in differences(a, b, f"{where}.{i}")
        ]
    equal = torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
    return [] if equal else [where]


def events(out, stage: str) -> EventAccumulator:
    """What TensorBoard shows of a run."""
    return EventAccumulator(str(out / "tensorboard" / stage), {"scalars": 0, "images": 0}).Reload()


def step(stage, number: int, count: int) -> dict:
    """One update on the first `count` training images."""
    return stage.update(number, stage.fetch(number, torch.arange(count)))


def gradients(module, monkeypatch, stage, batch: int) -> tuple[list, float]:
    """The gradients of one update, which is not applied, and its loss."""
    seen = []
    with monkeypatch.context() as patch:
        patch.setattr(
            module, "apply_gradients", lambda loss, optimizer, parameters, clip: seen.append(list(parameters))
        )
        loss = float(step(stage, 0, batch)["loss"])
    return [parameter.grad for parameter in seen[0]], loss
