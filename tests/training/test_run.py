"""training.py: what a step does by hand, `Run`, and what both stages' command lines have in common."""

import itertools
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch import nn
from training_runs import PER_EPOCH, STAGES, checkpoint, differences, events, refusal, train

import training_transformer
import training_vqgan
from config import TrainingConfig, load_config
from files import held
from models.checkpoint import read_weights
from models.transformer import Transformer
from models.vqgan import VQGAN
from training.autoencoder import VQGANTrainer
from training.run import Run
from training.stepping import NotFiniteError, apply_gradients, averaged, lr_schedule
from training.transformer import TransformerTrainer
from utils import ROOT


def settings(**changes) -> TrainingConfig:
    return TrainingConfig(**{"epochs": 2.0, "batch_size": 4, "learning_rate": 1.0, **changes})


class Ramp(nn.Module):
    """One weight, which is all that the averages and the schedules need; and a buffer of each kind."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))
        self.register_buffer("mean", torch.zeros(1))
        self.register_buffer("count", torch.zeros(1, dtype=torch.long))


# --- averages, learning rates, gradients ------------------------------------------------------------------------------


def test_the_average_follows_its_formula_for_weights_and_buffers():
    """mean_t = d mean + (1 - d) current with d = min(decay, (1 + t) / (10 + t)); the first is a copy."""
    model = Ramp()
    ema = averaged(model, decay=0.25)
    expected = None
    for t, value in enumerate([3.0, -1.0, 4.0, 1.0, 5.0]):
        with torch.no_grad():
            model.weight.copy_(torch.tensor([value, 2 * value]))
            model.mean.fill_(value)
            model.count.fill_(t)
        ema.update_parameters(model)
        decay = min(0.25, (1 + t) / (10 + t))  # 2/11, then 3/12 = 0.25
        expected = value if expected is None else decay * expected + (1 - decay) * value
        assert ema.module.weight.tolist() == pytest.approx([expected, 2 * expected], rel=1e-6)
        assert ema.module.mean.item() == pytest.approx(expected, rel=1e-6)
        assert ema.module.count.item() == t  # integers are copied


def test_an_average_without_memory_is_the_model_bit_by_bit():
    model = Ramp()
    ema = averaged(model, decay=0.0)
    for value in (0.1, 0.7, 1e-9):
        model.weight.data.fill_(value)
        ema.update_parameters(model)
        assert torch.equal(ema.module.weight, model.weight)


def test_the_average_is_frozen_and_in_eval_mode():
    ema = averaged(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)), 0.9)
    assert not any(module.training for module in ema.modules())
    assert not any(parameter.requires_grad for parameter in ema.parameters())


@pytest.mark.parametrize(
    ("changes", "rates"),
    [
        ({}, [1] * 10),
        ({"milestones": [2, 4], "gamma": 0.1}, [1, 1, 1, 1, 0.1, 0.1, 0.1, 0.1, 0.01, 0.01]),
        ({"milestones": [1.5, 1.5], "gamma": 0.5}, [1, 1, 1, 0.25, 0.25, 0.25, 0.25, 0.25, 0.25, 0.25]),
        ({"warmup": 2}, [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 1]),
        ({"warmup": 0.5}, [1] * 10),
        ({"warmup": 2, "milestones": [1, 3], "gamma": 0.1}, [0.25, 0.5, 0.075, 0.1, 0.1, 0.1, 0.01, 0.01, 0.01, 0.01]),
    ],
)
def test_learning_rates_at_every_step(changes, rates):
    optimizer = torch.optim.Adam([nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule, found = lr_schedule(optimizer, settings(**changes), PER_EPOCH), []
    for _ in rates:
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert found == pytest.approx([2 * rate for rate in rates], rel=1e-6)


@pytest.mark.parametrize(("clip", "moved"), [(1.0, [-0.6, -0.8]), (0.0, [-3.0, -4.0]), (10.0, [-3.0, -4.0])])
def test_gradients_are_clipped_to_their_norm(clip, moved):
    weight = nn.Parameter(torch.zeros(2))
    weight.grad = torch.tensor([3.0, 4.0])
    apply_gradients(torch.tensor(1.0), torch.optim.SGD([weight], lr=1.0), [weight], clip)
    assert weight.tolist() == pytest.approx(moved, rel=1e-5) and weight.grad is None


@pytest.mark.parametrize(("loss", "gradient"), [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, math.inf)])
def test_a_loss_or_gradient_that_is_not_finite_touches_no_weight(loss, gradient):
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.Adam([weight], lr=1.0)
    weight.grad = torch.tensor([1.0, gradient])
    with pytest.raises(NotFiniteError, match=r"loss .*, norm of the gradient"):
        apply_gradients(torch.tensor(loss), optimizer, [weight], clip=1.0)
    assert weight.tolist() == [1, 1] and not optimizer.state


# --- Run --------------------------------------------------------------------------------------------------------------


def tiny_run(folder, config_file, **changes) -> Run:
    """A Run of the tiny transformer that nobody trains."""
    torch.manual_seed(0)
    model = Transformer(load_config(config_file).transformer)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return Run("transformer", folder, settings(**changes), 10, model, {"sgd": optimizer}, notes={"who": "a test"})


def nothing(step, indices) -> None:
    """A `fetch` for those who read no batch."""


def nudge(run: Run):
    """An `update` that moves the bias by 1 a step, without gradients."""

    def update(step, batch):
        run.model.bias.data += 1
        return {"loss": torch.tensor(float(step))}

    return update


def test_epochs_become_steps(tmp_path, tiny_config_once):
    run = tiny_run(tmp_path, tiny_config_once, epochs=2.5, batch_size=3)
    assert (run.per_epoch, run.steps, run.batch) == (3, 8, 3)  # 10 pictures; 7.5 rounds to 8
    run = tiny_run(tmp_path, tiny_config_once, epochs=0.01, batch_size=64)
    assert (run.per_epoch, run.steps, run.batch) == (1, 1, 10)  # fewer pictures than a batch


def test_an_epoch_sees_every_picture_once_in_an_order_of_its_own(tmp_path, tiny_config_once):
    run = tiny_run(tmp_path, tiny_config_once, batch_size=5)
    epochs = [torch.cat([run.indices(step) for step in (2 * epoch, 2 * epoch + 1)]).tolist() for epoch in range(4)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert tiny_run(tmp_path, tiny_config_once, batch_size=5, seed=1).indices(0).tolist() != epochs[0][:5]


def test_the_best_weights_stay_when_the_score_worsens(tmp_path, tiny_config_once):
    run = tiny_run(tmp_path, tiny_config_once, epochs=4.0, batch_size=5, validate_every=1.0, ema=0.0)
    scores = iter([3.0, 1.0, 2.0, 1.5])
    run.fit(nothing, nudge(run), lambda model: {"score": next(scores)})
    tensors, metadata = read_weights(run.weights)
    assert metadata["step"] == "4" and metadata["score"] == "1.0000" and metadata["who"] == "a test"
    assert (tensors["bias"] == 4).all() and (run.model.bias == 8).all()
    state = checkpoint(tmp_path, "transformer")
    assert state["best"] == 1.0 and state["step"] == 8 and (state["model"]["bias"] == 8).all()


def test_validation_sees_the_averaged_model_in_eval_mode_without_gradients(tmp_path, tiny_config_once):
    run, seen = tiny_run(tmp_path, tiny_config_once, epochs=1.0, batch_size=5, ema=0.99), []

    def validate(model):
        assert not any(module.training for module in model.modules()) and not torch.is_grad_enabled()
        seen.append(model.bias.clone())
        return {"score": 1.0}

    run.fit(nothing, nudge(run), validate)
    (bias,) = seen
    assert bias.tolist() == pytest.approx([1 + (1 - 2 / 11)] * 16)  # 1 copied, then 2 with decay 2/11


def test_the_last_step_is_always_validated_and_saved(tmp_path, tiny_config_once):
    run, steps = tiny_run(tmp_path, tiny_config_once, epochs=2.5, batch_size=5, validate_every=1.0, save_every=100), []
    run.fit(nothing, nudge(run), lambda model: steps.append(run.step) or {"score": float(run.step)})
    assert steps == [2, 4, 5] and checkpoint(tmp_path, "transformer")["step"] == 5


def test_a_resumed_run_keeps_what_was_logged_before(tmp_path, tiny_config_once):
    for epochs in (2.0, 4.0):
        run = tiny_run(tmp_path, tiny_config_once, epochs=epochs, batch_size=5)
        if epochs == 4:
            run.resume()
        run.fit(nothing, nudge(run), lambda model, run=run: {"score": float(run.step)})
    assert [(e.step, e.value) for e in events(tmp_path, "transformer").Scalars("val/score")] == [
        (2, 2), (4, 4), (6, 6), (8, 8),
    ]  # fmt: skip


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04", {"a": 1}, [1], 5, {"steps_an_epoch": 2}, None])
def test_what_is_no_checkpoint_is_named(tmp_path, tiny_config_once, content):
    run = tiny_run(tmp_path, tiny_config_once)
    if isinstance(content, bytes):
        run.checkpoint.write_bytes(content)
    else:
        torch.save(content, run.checkpoint)
    with pytest.raises(ValueError, match=f"{re.escape(str(run.checkpoint))}: not a checkpoint") as raised:
        run.resume()
    assert "\n" not in str(raised.value)


def test_a_run_that_is_complete_resumes_to_nothing(tmp_path, tiny_config_once):
    run = tiny_run(tmp_path, tiny_config_once)
    run.fit(nothing, nudge(run), lambda model: {"score": 1.0})
    again = tiny_run(tmp_path, tiny_config_once)
    again.resume()
    again.fit(nothing, lambda *_: pytest.fail("no step is left"), lambda model: pytest.fail("nothing to validate"))
    assert torch.equal(again.model.bias, run.model.bias)


def test_a_checkpoint_of_another_run_is_refused(tmp_path, tiny_config_once):
    run = tiny_run(tmp_path, tiny_config_once)
    run.save()
    with pytest.raises(ValueError, match=r"transformer_last\.pt: 2 steps an epoch, now 5: other data or another batch"):
        tiny_run(tmp_path, tiny_config_once, batch_size=2).resume()
    wider = Transformer(load_config(tiny_config_once, {"transformer.width": 32}).transformer)
    optimizers = {"sgd": torch.optim.SGD(wider.parameters())}
    with pytest.raises(ValueError, match=r"(?s)transformer_last\.pt: does not fit this config: .*size mismatch"):
        Run("transformer", tmp_path, settings(), 10, wider, optimizers).resume()
    with pytest.raises(ValueError, match=r"does not fit this config: 'optimizer_adam'"):
        Run("transformer", tmp_path, settings(), 10, run.model, {"adam": torch.optim.Adam([run.model.bias])}).resume()


def test_a_broken_checkpoint_is_named(tmp_path, tiny_config_once):
    run = tiny_run(tmp_path, tiny_config_once)
    run.save()
    whole = run.checkpoint.read_bytes()
    for content in (whole[: len(whole) // 2], b"no checkpoint", b""):
        run.checkpoint.write_bytes(content)
        with pytest.raises(ValueError, match=r"transformer_last\.pt: not a checkpoint"):
            run.resume()


# --- both stages through their command lines --------------------------------------------------------------------------


@pytest.mark.parametrize(("stage", "cls"), [("vqgan", VQGAN), ("transformer", Transformer)])
def test_the_best_weights_are_a_model_that_describes_itself(trained, stage, cls):
    out, config = trained
    model = cls.load(out / f"{stage}.safetensors")
    assert model.config == getattr(load_config(config), stage)
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())
    metadata = read_weights(out / f"{stage}.safetensors")[1]
    assert metadata["kind"] == cls.__name__ and int(metadata["step"]) in range(2, 11, 2) and metadata["seed"] == "0"
    if int(metadata["step"]) == 10:  # the best are the averaged weights, not the current ones
        averages = {k.removeprefix("module."): v for k, v in checkpoint(out, stage)["ema"].items()}
        assert all(
            torch.equal(tensor.half().float(), averages[key].half().float())
            for key, tensor in model.state_dict().items()
        )


def test_a_run_leaves_the_files_it_promises_and_no_temporary_ones(trained):
    out, _ = trained
    names = {path.name for path in out.iterdir()}
    assert names == {
        "vqgan.safetensors",
        "vqgan_last.pt",
        "transformer.safetensors",
        "transformer_last.pt",
        "tensorboard",
    }


@pytest.mark.parametrize(("first", "every"), [("2", "1"), ("1.5", "0.5")], ids=["whole epochs", "amid an epoch"])
@pytest.mark.parametrize("stage", STAGES)
def test_n_steps_and_n_more_are_bit_equal_to_2_n(tmp_path, trained, stage, first, every):
    """Weights, averages, optimizers and schedules; with flips, dropout, warm-up, milestones, clipping and the GAN."""
    overrides = {"warmup": "0.5", "milestones": "[1,2]", "clip": "1.0", "validate_every": every, "accumulate": "2"}
    arguments = [f"--{stage}_training.{key}={value}" for key, value in overrides.items()]
    if stage == "transformer":
        arguments += [
            "--vqgan",
            str(trained[0] / "vqgan.safetensors"),
            "--transformer_training.hiding={cosine: 1, box: 1}",
        ]
        arguments += ["--transformer.dropout=0.2", "--transformer.attention_dropout=0.2"]
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    train(stage, trained[1], whole, *arguments, "--epochs", "4")
    train(stage, trained[1], halves, *arguments, "--epochs", first)
    interrupted = checkpoint(halves, stage)
    assert interrupted["step"] == round(float(first) * PER_EPOCH)
    train(stage, trained[1], halves, *arguments, "--epochs", "4", "--resume")
    assert differences(checkpoint(whole, stage), checkpoint(halves, stage)) == []
    assert differences(checkpoint(whole, stage)["model"], interrupted["model"]) != []
    (tensors, notes), (others, their_notes) = (read_weights(out / f"{stage}.safetensors") for out in (whole, halves))
    assert differences(tensors, others) == []
    assert notes == their_notes


@pytest.mark.parametrize("stage", STAGES)
def test_a_resumed_run_follows_the_config_of_now(tmp_path, trained, stage):
    """Learning rate, milestones, gamma and betas, not those of the checkpoint."""
    arguments = ["--vqgan", str(trained[0] / "vqgan.safetensors")] if stage == "transformer" else []
    train(stage, trained[1], tmp_path, *arguments, "--epochs", "1", f"--{stage}_training.milestones=[0.5]")
    changes = {"learning_rate": "0.01", "milestones": "[2.5,3]", "gamma": "0.2", "betas": "[0.5,0.6]"}
    changes = [f"--{stage}_training.{key}={value}" for key, value in changes.items()]
    train(stage, trained[1], tmp_path, *arguments, *changes, "--epochs", "4", "--resume")
    (key,) = checkpoint(tmp_path, stage).keys() & {"optimizer_adam", "optimizer_generator"}
    (group,) = checkpoint(tmp_path, stage)[key]["param_groups"]
    assert group["lr"] == pytest.approx(0.01 * 0.2**2) and tuple(group["betas"]) == (0.5, 0.6) and group["fused"]
    rates = events(tmp_path, stage).Scalars("learning_rate/" + key.removeprefix("optimizer_"))
    assert {event.step: event.value for event in rates} == pytest.approx(
        {2: 0.0002, 4: 0.01, 6: 0.002, 8: 0.0004}, rel=1e-5
    )


@pytest.mark.parametrize("stage", STAGES)
def test_images_and_tokens_in_files_train_the_same_weights(tmp_path, trained, stage):
    arguments = ["--vqgan", str(trained[0] / "vqgan.safetensors")] if stage == "transformer" else []
    for megabytes in ("1", "0"):
        train(stage, trained[1], tmp_path / megabytes, *arguments, "--epochs", "2", "--data.memory_mb", megabytes)
    assert differences(*(checkpoint(tmp_path / megabytes, stage) for megabytes in "10")) == []
    names = {path.name.split("-")[0] for path in (tmp_path / "0" / "cache").iterdir()}
    assert names == ({"train", "val"} if stage == "vqgan" else {"train", "val", "train_tokens", "val_tokens"})
    assert not (tmp_path / "1" / "cache").exists()


def test_the_next_batch_is_fetched_during_a_step_and_waiting_is_logged(tmp_path, tiny_config_once):
    """A fetch as long as a step: the first is waited for, the others hardly."""
    run = tiny_run(tmp_path, tiny_config_once, epochs=3.0, batch_size=5)
    fetched = []

    def fetch(step, indices):
        time.sleep(0.1)
        fetched.append((step, indices.tolist()))
        return step

    def update(step, batch):
        assert batch == step
        time.sleep(0.15)
        return {"loss": torch.tensor(1.0)}

    run.fit(fetch, update, lambda model: {"score": 1.0})
    assert fetched == [(step, run.indices(step).tolist()) for step in range(6)]
    log = events(tmp_path, "transformer")
    (waiting,), (speed,) = (log.Scalars(f"train/{name}") for name in ("waiting", "images_per_second"))
    assert 0.05 < waiting.value < 0.3 and 10 < speed.value < 5 * 6 / 1.0


def test_an_error_in_the_thread_that_fetches_is_raised(tmp_path, tiny_config_once):
    run = tiny_run(tmp_path, tiny_config_once)

    def fetch(step, indices):
        if step == 2:
            raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        run.fit(fetch, nudge(run), lambda model: {"score": 1.0})


@pytest.mark.parametrize("stage", STAGES)
def test_a_profile_is_a_trace_of_some_steps_and_training_goes_on(tmp_path, capsys, trained, stage):
    arguments = ["--vqgan", str(trained[0] / "vqgan.safetensors")] if stage == "transformer" else []
    train(stage, trained[1], tmp_path, *arguments, "--epochs", "3", "--profile", "2")
    path = tmp_path / "profile" / f"{stage}_0.pt.trace.json"
    assert f"profile of 2 steps: {path}" in capsys.readouterr().out and checkpoint(tmp_path, stage)["step"] == 6
    names = [event.get("name", "") for event in json.loads(path.read_text())["traceEvents"]]
    assert {name for name in names if name.startswith("ProfilerStep")} == {"ProfilerStep#1", "ProfilerStep#2"}
    assert "aten::addmm" in names or "aten::convolution" in names


@pytest.mark.parametrize("stage", STAGES)
def test_a_compiled_model_trains_and_saves_the_raw_one(tmp_path, monkeypatch, trained, stage):
    """By a backend that compiles nothing: what is traced is the same arithmetic."""
    compiled = []
    monkeypatch.setattr(
        torch, "compile", lambda model, sound=torch.compile: compiled.append(model) or sound(model, backend="eager")
    )
    arguments = ["--vqgan", str(trained[0] / "vqgan.safetensors")] if stage == "transformer" else []
    for flag in ("true", "false"):
        train(stage, trained[1], tmp_path / flag, *arguments, "--epochs", "0.5", f"--{stage}_training.compile={flag}")
    assert len(compiled) == 2 and isinstance(compiled[1], VQGAN if stage == "vqgan" else Transformer)
    one, two = (checkpoint(tmp_path / flag, stage)["model"] for flag in ("true", "false"))
    assert one.keys() == two.keys()
    for key, tensor in one.items():
        torch.testing.assert_close(tensor, two[key], atol=1e-4, rtol=1e-3)


def test_a_machine_that_cannot_compile_is_told_so(tmp_path, monkeypatch, capsys, trained):
    def broken(model):
        raise RuntimeError("no working C++ compiler\na long story")

    monkeypatch.setattr(torch, "compile", broken)
    told = refusal(capsys, "vqgan", trained[1], tmp_path, "--vqgan_training.compile=true")
    assert told.endswith("error: compile: torch.compile does not work here (no working C++ compiler)\n")


@pytest.mark.parametrize("stage", STAGES)
def test_another_seed_is_another_run(tmp_path, trained, stage):
    arguments = ["--vqgan", str(trained[0] / "vqgan.safetensors")] if stage == "transformer" else []
    for seed in "01":
        train(stage, trained[1], tmp_path / seed, *arguments, "--epochs", "0.5", f"--{stage}_training.seed", seed)
    assert differences(*(checkpoint(tmp_path / seed, stage)["model"] for seed in "01"))


@pytest.mark.parametrize("stage", STAGES)
def test_a_loss_that_turns_nan_stops_with_the_last_checkpoint_intact(tmp_path, monkeypatch, trained, stage):
    """The run that is resumed after it is bit-equal to one that was never poisoned."""
    arguments = [f"--{stage}_training.save_every", "2", "--epochs", "3"]
    arguments += ["--vqgan", str(trained[0] / "vqgan.safetensors")] if stage == "transformer" else []
    cls, name = (VQGANTrainer, "reconstruction_loss") if stage == "vqgan" else (TransformerTrainer, "cross_entropy")
    sound = getattr(cls, name)

    def poisoned(self, *args, **options):
        result = sound(self, *args, **options)
        if not torch.is_grad_enabled() or next(calls) != 4:
            return result
        return (result[0] * math.nan, result[1]) if stage == "vqgan" else result * math.nan

    calls = itertools.count(1)  # of the loss in training: the fourth, of step 3
    with monkeypatch.context() as patch:
        patch.setattr(cls, name, poisoned)
        with pytest.raises(SystemExit, match=rf"error: step 3: loss nan.*last good checkpoint: .*{stage}_last\.pt"):
            train(stage, trained[1], tmp_path / "hurt", *arguments)
    state = checkpoint(tmp_path / "hurt", stage)
    assert state["step"] == 2 and all(tensor.isfinite().all() for tensor in state["model"].values())
    (VQGAN if stage == "vqgan" else Transformer).load(tmp_path / "hurt" / f"{stage}.safetensors")
    train(stage, trained[1], tmp_path / "hurt", *arguments, "--resume")
    train(stage, trained[1], tmp_path / "well", *arguments)
    assert differences(checkpoint(tmp_path / "hurt", stage), checkpoint(tmp_path / "well", stage)) == []


def test_a_loss_that_is_nan_at_once_says_that_there_is_no_checkpoint(tmp_path, tiny_config_once):
    run = tiny_run(tmp_path, tiny_config_once)

    def update(step, indices):
        raise NotFiniteError("loss nan")

    with pytest.raises(NotFiniteError, match="step 0: loss nan; last good checkpoint: none yet"):
        run.fit(nothing, update, lambda model: {"score": 0.0})


@pytest.mark.parametrize("stage", STAGES)
def test_resume_without_a_checkpoint_is_an_error(tmp_path, capsys, trained, stage):
    arguments = ["--vqgan", str(trained[0] / "vqgan.safetensors")] if stage == "transformer" else []
    told = refusal(capsys, stage, trained[1], tmp_path / "new", *arguments, "--resume")
    assert f"{stage}_last.pt: nothing to resume from" in told


@pytest.mark.parametrize("stage", STAGES)
def test_a_folder_without_pictures_is_named(tmp_path, capsys, trained, stage):
    arguments = ["--vqgan", str(trained[0] / "vqgan.safetensors")] if stage == "transformer" else []
    told = refusal(capsys, stage, trained[1], tmp_path / "out", *arguments, "--val_d_path", str(tmp_path / "gone"))
    assert "gone: no such folder of images" in told


@pytest.mark.parametrize("stage", STAGES)
def test_init_starts_from_weights(tmp_path, monkeypatch, trained, stage):
    module, cls = (training_vqgan, "VQGANTrainer") if stage == "vqgan" else (training_transformer, "TransformerTrainer")
    source, started = trained[0] / f"{stage}.safetensors", []

    class Spy(getattr(module, cls)):
        def __init__(self, *args):
            super().__init__(*args)
            started.append({key: tensor.clone() for key, tensor in self.model.state_dict().items()})

    monkeypatch.setattr(module, cls, Spy)
    arguments = ["--vqgan", str(trained[0] / "vqgan.safetensors")] if stage == "transformer" else []
    train(stage, trained[1], tmp_path, *arguments, "--epochs", "0.5", f"--{stage}_training.init", str(source))
    assert differences(started, [read_weights(source)[0]]) == []
    assert differences(checkpoint(tmp_path, stage)["model"], started[0]) != []


@pytest.mark.parametrize("stage", STAGES)
def test_init_from_weights_that_do_not_fit_names_the_file(tmp_path, capsys, trained, stage):
    other = trained[0] / ("transformer.safetensors" if stage == "vqgan" else "vqgan.safetensors")
    arguments = ["--vqgan", str(trained[0] / "vqgan.safetensors")] if stage == "transformer" else []
    told = refusal(capsys, stage, trained[1], tmp_path, *arguments, f"--{stage}_training.init={other}")
    assert f"{other}: does not fit this {'VQGAN' if stage == 'vqgan' else 'Transformer'}" in told


@pytest.mark.parametrize("stage", STAGES)
def test_bfloat16_arithmetic_keeps_float32_weights(tmp_path, trained, stage):
    arguments = ["--vqgan", str(trained[0] / "vqgan.safetensors")] if stage == "transformer" else []
    train(stage, trained[1], tmp_path, *arguments, f"--{stage}_training.precision", "bfloat16")
    state = checkpoint(tmp_path, stage)
    for tensor in [*state["model"].values(), *state["ema"].values()]:
        assert tensor.dtype in (torch.float32, torch.int64) and tensor.isfinite().all()


# --- what is there is not lost ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_a_training_that_is_there_is_not_overwritten(tmp_path, trained, capsys, stage):
    folder, config = trained
    before = {path: path.read_bytes() for path in folder.glob("*.*") if path.is_file()}
    told = refusal(capsys, stage, config, folder)
    assert f"there is a training already ({stage}_last.pt); --resume goes on with it, --out DIR starts one" in told
    assert {path: path.read_bytes() for path in folder.glob("*.*") if path.is_file()} == before


def test_two_trainings_in_one_folder_are_refused(tmp_path, tiny_config_once, capsys):
    with held(tmp_path / "run" / "training.lock", "a training"):
        told = refusal(capsys, "vqgan", tiny_config_once, tmp_path / "run")
        assert f"a training is at work there, process {os.getpid()} on {platform.node()}; wait for it" in told
    assert not list((tmp_path / "run").glob("vqgan*"))


def test_a_checkpoint_beyond_the_config_is_said(tmp_path, trained, capsys):
    folder = shutil.copytree(trained[0], tmp_path / "copy")
    told = refusal(capsys, "vqgan", trained[1], folder, "--resume", "--epochs", "0.5")
    assert "at step " in told and "already, the config says 1; raise epochs" in told


def test_a_damaged_checkpoint_names_the_one_before_which_goes_on_to_the_same_end(tmp_path, tiny_config_once, capsys):
    arguments = ["--vqgan_training.save_every", "1", "--epochs", "2"]
    out = train("vqgan", tiny_config_once, tmp_path / "run", *arguments)
    last, former, end = out / "vqgan_last.pt", out / "vqgan_former.pt", checkpoint(out, "vqgan")
    assert (end["step"], torch.load(former)["step"]) == (4, 3)
    content = bytearray(last.read_bytes())
    content[len(content) // 2] ^= 4
    last.write_bytes(content)
    told = refusal(capsys, "vqgan", tiny_config_once, out, *arguments, "--resume")
    assert "not a checkpoint (damaged: " in told and f"the one before is {former}" in told
    former.rename(last)
    train("vqgan", tiny_config_once, out, *arguments, "--resume")
    assert differences(checkpoint(out, "vqgan"), end) == []


def test_a_disk_that_is_full_ends_the_training_with_a_line(tmp_path, tiny_config_once, monkeypatch):
    writes = []

    def save(state, path):
        writes.append(path)
        if len(writes) == 2:
            raise RuntimeError("[enforce fail at inline_container.cc:603] unexpected pos 64 vs 0")
        return sound(state, path)

    sound = torch.save
    monkeypatch.setattr(torch, "save", save)
    out, arguments = tmp_path / "run", ["--vqgan_training.save_every", "1", "--epochs", "2"]
    with pytest.raises(SystemExit) as stop:
        train("vqgan", tiny_config_once, out, *arguments)
    line = str(stop.value)
    assert line.startswith(f"error: {out / 'vqgan_last.pt'}: step 2 cannot be saved") and "\n" not in line
    assert line.endswith(f"last good checkpoint: {out / 'vqgan_last.pt'}") and checkpoint(out, "vqgan")["step"] == 1


def wait_for_a_step(process: subprocess.Popen) -> None:
    said = ""
    while not re.search(r"[1-9]\d*/\d+ \[", said):
        part = process.stderr.readline(200)
        assert part, said
        said += part


def started(config, out, epochs: str, interrupt: signal.Handlers) -> subprocess.Popen:
    """Stage 1 in a process of one thread that has taken a step; `interrupt`: what SIGINT does, whatever here."""
    code = "import os, signal, sys\nsignal.signal(signal.SIGINT, signal.Handlers(int(sys.argv[1])))\n"
    code += "os.execv(sys.executable, [sys.executable, *sys.argv[2:]])"
    command = [str(int(interrupt)), "training_vqgan.py", "--config", config, "--device", "cpu", "--epochs", epochs]
    command = [sys.executable, "-c", code, *map(str, command), "--out", str(out)]
    alone = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=alone, stderr=subprocess.PIPE, text=True)
    wait_for_a_step(process)
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_training_after_the_step_saved_and_resume_goes_on(tmp_path, tiny_config_once, number):
    with started(tiny_config_once, tmp_path / "run", "4000", signal.SIG_DFL) as process:
        process.send_signal(number)
        said = process.communicate(timeout=300)[1]
    line = said.splitlines()[-1]
    assert process.returncode == 128 + number and "Traceback" not in said
    step = int(re.fullmatch(r"saved step (\d+); --resume goes on", line)[1])
    assert checkpoint(tmp_path / "run", "vqgan")["step"] == step >= 1
    assert not (tmp_path / "run" / "training.lock").exists()
    whole = train("vqgan", tiny_config_once, tmp_path / "whole", "--epochs", str(step / PER_EPOCH + 1))
    train("vqgan", tiny_config_once, tmp_path / "run", "--epochs", str(step / PER_EPOCH + 1), "--resume")
    one, other = checkpoint(tmp_path / "run", "vqgan"), checkpoint(whole, "vqgan")
    assert one["step"] == other["step"] == step + PER_EPOCH and differences(one["model"], other["model"]) == []


def test_a_signal_that_is_ignored_stays_so(tmp_path, tiny_config_once):
    """As Ctrl-C is by a job in the background of a shell."""
    with started(tiny_config_once, tmp_path / "run", "40", signal.SIG_IGN) as process:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=300)
    assert process.returncode == 0 and checkpoint(tmp_path / "run", "vqgan")["step"] == 80


def test_after_a_kill_between_two_names_the_former_checkpoint_goes_on(tmp_path, tiny_config_once):
    out = train("vqgan", tiny_config_once, tmp_path / "run", "--vqgan_training.save_every", "1", "--epochs", "2")
    end = checkpoint(out, "vqgan")
    (out / "vqgan_last.pt").unlink()
    train("vqgan", tiny_config_once, out, "--vqgan_training.save_every", "1", "--epochs", "2", "--resume")
    assert differences(checkpoint(out, "vqgan"), end) == []
