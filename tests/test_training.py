"""training.py and both stages: what a step does by hand, then the scripts' own command lines on generated pictures."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import colourful, write_config
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import training_transformer
import training_vqgan
from config import TrainingConfig, load_config
from data import ImageFolder, to_float
from masks import FAMILIES
from metrics import psnr
from models.base import file_hash, read_weights, save_weights
from models.transformer import Transformer
from models.vqgan import VQGAN
from training import NotFiniteError, Run, apply_gradients, averaged, learning_rates
from training_transformer import Stage2, encode
from training_vqgan import Stage1, random_crops, random_flip

CPU = torch.device("cpu")
IMAGES = torch.from_numpy(colourful(12)).permute(0, 3, 1, 2).contiguous()  # (12, 3, 16, 16) uint8
TRAIN, VAL = IMAGES[:8], IMAGES[8:]
STAGES = {"vqgan": training_vqgan.main, "transformer": training_transformer.main}
PER_EPOCH = 2  # steps: 8 pictures in batches of 4


# --- helpers ----------------------------------------------------------------------------------------------------------


def settings(**changes) -> TrainingConfig:
    return TrainingConfig(**{"epochs": 2.0, "batch_size": 4, "learning_rate": 1.0, **changes})


def stage1(config_file, train=TRAIN, val=VAL, **overrides) -> Stage1:
    """A Stage1 of the tiny config; `gan__weight=0` would read vqgan_training.gan.weight."""
    keys = {"vqgan_training." + key.replace("__", "."): value for key, value in overrides.items()}
    torch.manual_seed(0)
    return Stage1(load_config(config_file, keys), CPU, train, val)


def stage2(config_file, **overrides) -> Stage2:
    """A Stage2 of the tiny config on tokens of a random VQGAN, both views."""
    keys = {"transformer_training." + key: value for key, value in overrides.items() if "." not in key}
    config = load_config(config_file, keys | {key: value for key, value in overrides.items() if "." in key})
    torch.manual_seed(0)
    vqgan = VQGAN(config.vqgan).eval().requires_grad_(False)
    tokens = torch.stack([encode(vqgan, view, CPU) for view in (TRAIN, TRAIN.flip(-1))])
    return Stage2(config, CPU, vqgan, tokens, encode(vqgan, VAL, CPU))


def train(stage: str, config, out, *arguments: str):
    STAGES[stage](["--config", str(config), "--out", str(out), "--device", "cpu", *arguments])
    return out


def refusal(capsys, stage: str, config, out, *arguments: str) -> str:
    """What the command line says when it refuses; it must leave with code 2."""
    with pytest.raises(SystemExit) as stopped:
        train(stage, config, out, *arguments)
    assert stopped.value.code == 2
    return capsys.readouterr().err


def checkpoint(out, stage: str) -> dict:
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
    return EventAccumulator(str(out / "tensorboard" / stage), {"scalars": 0, "images": 0}).Reload()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run of both stages, 5 epochs each (10 steps, GAN after 2); tests only read it."""
    config = write_config(tmp_path_factory.mktemp("data"))
    out = tmp_path_factory.mktemp("trained")
    schedule = ["warmup 1", "milestones [3,4]", "gamma 0.5"]
    for stage in STAGES:
        overrides = [part for line in schedule for part in f"--{stage}_training.{line}".split()]
        train(stage, config, out, "--epochs", "5", *overrides)
    return out, config


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
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    scheduler = learning_rates(optimizer, settings(**changes), PER_EPOCH)
    found = []
    for _ in rates:
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert found == pytest.approx([2.0 * rate for rate in rates], rel=1e-6)


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


def nudge(run: Run):
    """An `update` that moves the bias by 1 a step, without gradients."""

    def update(step, indices):
        run.model.bias.data += 1
        run.schedulers["sgd"].optimizer.step()  # without gradients; torch warns where schedulers step alone
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
    run.fit(nudge(run), lambda model: {"score": next(scores)})
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

    run.fit(nudge(run), validate)
    (bias,) = seen
    assert bias.tolist() == pytest.approx([1 + (1 - 2 / 11)] * 16)  # 1 copied, then 2 with decay 2/11


def test_the_last_step_is_always_validated_and_saved(tmp_path, tiny_config_once):
    run, steps = tiny_run(tmp_path, tiny_config_once, epochs=2.5, batch_size=5, validate_every=1.0, save_every=100), []
    run.fit(nudge(run), lambda model: steps.append(run.step) or {"score": float(run.step)})
    assert steps == [2, 4, 5] and checkpoint(tmp_path, "transformer")["step"] == 5


def test_a_resumed_run_keeps_what_was_logged_before(tmp_path, tiny_config_once):
    for epochs in (2.0, 4.0):
        run = tiny_run(tmp_path, tiny_config_once, epochs=epochs, batch_size=5)
        if epochs == 4:
            run.resume()
        run.fit(nudge(run), lambda model, run=run: {"score": float(run.step)})
    assert [(e.step, e.value) for e in events(tmp_path, "transformer").Scalars("val/score")] == [
        (2, 2), (4, 4), (6, 6), (8, 8),
    ]  # fmt: skip


def test_a_run_that_is_complete_resumes_to_nothing(tmp_path, tiny_config_once):
    run = tiny_run(tmp_path, tiny_config_once)
    run.fit(nudge(run), lambda model: {"score": 1.0})
    again = tiny_run(tmp_path, tiny_config_once)
    again.resume()
    again.fit(lambda *_: pytest.fail("no step is left"), lambda model: pytest.fail("nothing to validate"))
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


def test_the_transformer_names_its_vqgan_and_its_decoding(trained):
    out, config = trained
    metadata = read_weights(out / "transformer.safetensors")[1]
    assert metadata["vqgan"] == file_hash(out / "vqgan.safetensors")
    assert metadata["decoding"] == load_config(config).decoding.model_dump_json()


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


def test_tensorboard_holds_losses_rates_codes_and_pictures_of_stage_1(trained):
    log = events(trained[0], "vqgan")
    tags = set(log.Tags()["scalars"])
    assert tags >= {f"train/{key}" for key in ("loss", "l1", "l2", "gan", "discriminator", "codebook", "code_usage")}
    assert tags >= {"val/score", "val/psnr", "val/code_usage", "learning_rate/generator", "learning_rate/discriminator"}
    assert [event.step for event in log.Scalars("val/score")] == [2, 4, 6, 8, 10]
    rates = {event.step: event.value for event in log.Scalars("learning_rate/generator")}
    assert [rates[step] / 0.002 for step in (2, 4, 6, 8, 10)] == pytest.approx([1, 1, 0.5, 0.25, 0.25])
    assert all(0 < event.value <= 1 for event in log.Scalars("val/code_usage"))
    assert all(math.isfinite(event.value) for tag in tags for event in log.Scalars(tag))
    picture = log.Images("val/pictures")[-1]
    assert (picture.width, picture.height) == (4 * 18 - 2, 2 * 18 - 2)  # 4 pictures above their reconstructions


def test_tensorboard_holds_loss_rate_families_and_pictures_of_stage_2(trained):
    log = events(trained[0], "transformer")
    assert {"train/loss", "val/score", "learning_rate/adam", *(f"val/{f}" for f in FAMILIES)} <= set(
        log.Tags()["scalars"]
    )
    assert [event.step for event in log.Scalars("train/loss")] == [10]
    for family in FAMILIES:  # an untrained model is at log 16 = 2.77 nats
        assert all(1 < event.value < 4 for event in log.Scalars(f"val/{family}"))
    assert len(log.Images("val/pictures")) == 5
    picture = log.Images("val/pictures")[-1]
    assert (picture.width, picture.height) == (4 * 18 - 2, 2 * 18 - 2)


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
    for out, metadata in ((whole, notes), (halves, their_notes)):  # no two files of one VQGAN are alike byte by byte
        assert metadata.pop("vqgan", None) == (file_hash(out / "vqgan.safetensors") if stage == "transformer" else None)
    assert notes == their_notes


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
    cls, name = (Stage1, "reconstruction_loss") if stage == "vqgan" else (Stage2, "cross_entropy")
    sound = getattr(cls, name)

    def poisoned(self, *args, **options):
        result = sound(self, *args, **options)
        if not torch.is_grad_enabled() or next(calls) != 4:
            return result
        return (result[0] * math.nan, result[1]) if stage == "vqgan" else result * math.nan

    calls = itertools.count(1)  # of the loss in training: the fourth, of step 3
    with monkeypatch.context() as patch:
        patch.setattr(cls, name, poisoned)
        with pytest.raises(NotFiniteError, match=rf"step 3: loss nan.*last good checkpoint: .*{stage}_last\.pt"):
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
        run.fit(update, lambda model: {"score": 0.0})


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
    module, cls = (training_vqgan, "Stage1") if stage == "vqgan" else (training_transformer, "Stage2")
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


# --- stage 1 ----------------------------------------------------------------------------------------------------------


def test_stage_1_learns_a_few_pictures_by_heart(tiny_config_once):
    stage = stage1(tiny_config_once, TRAIN[:4], TRAIN[:4], learning_rate=5e-3, adversarial__weight=0.0)
    stage.flip = False
    losses = [float(stage.update(step, torch.arange(4))["l1"]) for step in range(60)]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


def test_the_gan_starts_at_its_epoch_and_trains_its_discriminator(tiny_config_once):
    stage = stage1(tiny_config_once, adversarial__start=1.5)
    before = [parameter.clone() for parameter in stage.discriminator.parameters()]
    keys, moved = [], []
    for step in range(4):
        keys.append(set(stage.update(step, torch.arange(4))))
        moved.append(any(not torch.equal(*pair) for pair in zip(before, stage.discriminator.parameters(), strict=True)))
    assert stage.gan_start == 3 and moved == [False, False, False, True]
    assert [bool(found & {"gan", "discriminator"}) for found in keys] == [False, False, False, True]


def test_the_discriminator_learns_from_its_own_loss_only(tiny_config_once, monkeypatch):
    """The generator's pass leaves gradients in the discriminator, which must not add up with its own."""
    stage, seen = stage1(tiny_config_once, adversarial__start=0.0), []

    def spy(loss, optimizer, parameters, clip):
        parameters = list(parameters)
        seen.append([parameter.grad.clone() for parameter in parameters])
        apply_gradients(loss, optimizer, parameters, clip)

    monkeypatch.setattr(training_vqgan, "apply_gradients", spy)
    stage.flip = False
    images = to_float(TRAIN[:4])
    output = stage.model.eval()(images)[0].detach()
    stage.model.codebook.eval()
    loss = training_vqgan.discriminator_loss(*stage.discriminator(torch.cat((images, output))).chunk(2))
    expected = torch.autograd.grad(loss, list(stage.discriminator.parameters()))
    stage.update(0, torch.arange(4))
    for found, wanted in zip(seen[1], expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-4)


def test_without_a_gan_there_is_no_discriminator(tiny_config_once):
    stage = stage1(tiny_config_once, adversarial__weight=0.0)
    assert stage.discriminator is None and set(stage.optimizers) == {"generator"} and not stage.modules
    assert {"gan", "discriminator"}.isdisjoint(stage.update(99, torch.arange(4)))


def test_the_loss_is_the_weighted_sum_of_its_parts(tiny_config_once):
    stage = stage1(tiny_config_once, l1=2.0, l2=3.0)
    output, images = torch.zeros(2, 3, 4, 4), torch.full((2, 3, 4, 4), 0.5)
    loss, parts = stage.reconstruction_loss(output, images, crop=0)
    assert float(loss) == 2 * 0.5 + 3 * 0.25 and float(parts["l1"]) == 0.5 and float(parts["l2"]) == 0.25


def test_lpips_looks_at_a_crop_in_training_and_at_whole_images_in_validation(tiny_config_once, monkeypatch):
    seen = []

    class Stub(nn.Module):
        def __init__(self, net, weights):
            super().__init__()
            assert (net, weights) == ("alex", "a.pt")

        def forward(self, images, truth):
            seen.append(tuple(images.shape))
            return (images - truth).abs().mean(dim=(1, 2, 3)) * 0 + 7

    monkeypatch.setattr(training_vqgan, "Perceptual", Stub)
    perceptual = {"net": "alex", "weights": "a.pt", "weight": 0.5, "crop": 10}
    stage = stage1(tiny_config_once, perceptual=perceptual, adversarial__weight=0.0)
    losses = stage.update(0, torch.arange(4))
    assert float(losses["lpips"]) == 7
    assert float(losses["loss"]) == pytest.approx(float(losses["l1"] + losses["codebook"]) + 0.5 * 7, rel=1e-5)
    with torch.no_grad():
        figures = stage.validate(stage.model.eval())
    assert figures["lpips"] == 7 and figures["score"] == pytest.approx(figures["l1"] + 3.5, rel=1e-5)
    assert seen == [(4, 3, 10, 10), (4, 3, 16, 16)]


def test_validation_figures_are_those_of_the_images(tiny_config_once):
    stage = stage1(tiny_config_once, validate_on=3, l2=1.0)
    assert len(stage.val) == 3
    with torch.no_grad():
        figures = stage.validate(stage.model.eval())
        output, tokens, _ = stage.model(to_float(VAL[:3]))
    output, truth = output.clamp(0, 1), to_float(VAL[:3])
    assert figures["psnr"] == pytest.approx(float(psnr(output, truth).mean()), rel=1e-5)
    assert figures["score"] == pytest.approx(float(F.l1_loss(output, truth) + F.mse_loss(output, truth)), rel=1e-5)
    assert figures["code_usage"] == len(tokens.unique()) / 16
    assert torch.equal(figures["pictures"][:, :16, :16], VAL[0]) and figures["pictures"].shape == (3, 34, 3 * 18 - 2)


def test_validation_in_pieces_of_64_equals_the_whole(tiny_config_once):
    val = IMAGES[torch.arange(70) % 12]
    stage = stage1(tiny_config_once, val=val)
    with torch.no_grad():
        figures = stage.validate(stage.model.eval())
        output = stage.model(to_float(val))[0].clamp(0, 1)
    assert figures["l1"] == pytest.approx(float(F.l1_loss(output, to_float(val))), rel=1e-5)
    assert figures["pictures"].shape == (3, 34, 8 * 18 - 2)


def test_flips_mirror_each_image_or_leave_it():
    torch.manual_seed(0)
    images = torch.arange(64 * 3 * 2 * 4, dtype=torch.uint8).view(64, 3, 2, 4)
    flipped = random_flip(images)
    mirrored = [torch.equal(out, image.flip(-1)) for out, image in zip(flipped, images, strict=True)]
    kept = [torch.equal(out, image) for out, image in zip(flipped, images, strict=True)]
    assert all(a != b for a, b in zip(mirrored, kept, strict=True)) and 16 < sum(mirrored) < 48


def test_crops_cut_the_same_square_of_images_and_truth():
    torch.manual_seed(0)
    images = torch.arange(2 * 3 * 8 * 8.0).view(2, 3, 8, 8)
    corners = set()
    for _ in range(40):
        crop, truth = random_crops(images, -images, 6)
        assert crop.shape == (2, 3, 6, 6) and torch.equal(crop, -truth)
        corners.add(int(crop[0, 0, 0, 0]))
    assert corners == {8 * top + left for top in range(3) for left in range(3)}  # the borders too
    for size in (0, 8, 20):
        assert random_crops(images, -images, size)[0] is images


# --- accumulation -----------------------------------------------------------------------------------------------------


def gradients(module, monkeypatch, stage, batch: int) -> tuple[list, float]:
    """The gradients of one update, which is not applied, and its loss."""
    seen = []
    with monkeypatch.context() as patch:
        patch.setattr(
            module, "apply_gradients", lambda loss, optimizer, parameters, clip: seen.append(list(parameters))
        )
        torch.manual_seed(5)
        loss = float(stage.update(0, torch.arange(batch))["loss"])
    return [parameter.grad for parameter in seen[0]], loss


@pytest.mark.parametrize("loss_on", ["hidden", "all"])
@pytest.mark.parametrize("accumulate", [2, 4])
def test_accumulated_gradients_equal_those_of_the_whole_batch_in_stage_2(
    tiny_config_once, monkeypatch, loss_on, accumulate
):
    """Pieces hide different numbers of tokens, so the mean of their means would not be the mean."""
    whole, cut = (stage2(tiny_config_once, batch_size=8, loss_on=loss_on, accumulate=n) for n in (1, accumulate))
    counts = whole.hide(8, torch.Generator().manual_seed(0)).sum(dim=1).unique()
    assert len(counts) > 1
    expected, loss = gradients(training_transformer, monkeypatch, whole, 8)
    found, accumulated = gradients(training_transformer, monkeypatch, cut, 8)
    assert accumulated == pytest.approx(loss, rel=1e-5)
    torch.testing.assert_close(found, expected, atol=1e-7, rtol=1e-4)


def test_accumulated_gradients_equal_those_of_the_whole_batch_in_stage_1(tiny_config, monkeypatch):
    text = tiny_config.read_text().replace("ema_decay: 0.9", "ema_decay: 0.0")  # EMA codes move from piece to piece
    tiny_config.write_text(text)
    whole, cut = (stage1(tiny_config, batch_size=8, accumulate=n, adversarial__weight=0.0) for n in (1, 4))
    whole.flip = cut.flip = False
    expected, loss = gradients(training_vqgan, monkeypatch, whole, 8)
    found, accumulated = gradients(training_vqgan, monkeypatch, cut, 8)
    assert accumulated == pytest.approx(loss, rel=1e-5)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)


# --- stage 2 ----------------------------------------------------------------------------------------------------------


def test_stage_2_learns_a_few_pictures_by_heart(tiny_config_once):
    stage = stage2(tiny_config_once, learning_rate=2e-2, hiding={"bernoulli": 1.0})
    losses = [float(stage.update(step, torch.arange(4))["loss"]) for step in range(80)]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("loss_on", ["hidden", "all"])
def test_cross_entropy_by_hand_on_hidden_tokens_and_on_all(tiny_config_once, loss_on, smoothing):
    """(1 - s) (-log p_true) + s mean over the codes of (-log p), the mean over the tokens that count."""
    stage = stage2(tiny_config_once, loss_on=loss_on)
    tokens = stage.train[0, :3]
    hidden = torch.rand(3, 16, generator=torch.Generator().manual_seed(1)) < torch.tensor([[0.1], [0.5], [0.9]])
    visible = tokens.long().clone()
    visible[hidden] = 16
    with torch.no_grad():
        log_p = stage.model(visible).log_softmax(dim=-1)  # (3, 16, k)
        found = stage.cross_entropy(stage.model, tokens, hidden, smoothing)
    true = -log_p.gather(-1, tokens.long()[..., None])[..., 0]
    each = (1 - smoothing) * true + smoothing * -log_p.mean(dim=-1)
    expected = each[hidden].mean() if loss_on == "hidden" else each.mean()
    assert float(found) == pytest.approx(float(expected), rel=1e-5)


def test_label_smoothing_is_for_training_only(tiny_config_once):
    plain, smooth = stage2(tiny_config_once), stage2(tiny_config_once, label_smoothing=0.3)
    with torch.no_grad():
        assert plain.validate(plain.model.eval())["score"] == smooth.validate(smooth.model.eval())["score"]
    torch.manual_seed(0)
    loss = plain.update(0, torch.arange(8))["loss"]
    torch.manual_seed(0)
    assert smooth.update(0, torch.arange(8))["loss"] != loss


def test_each_sample_hides_tokens_of_its_own_number_and_place(tiny_config_once, monkeypatch):
    """FIELD.md section 4: a mask ratio shared by the batch."""
    stage, seen = stage2(tiny_config_once, batch_size=8), []
    sound = stage.cross_entropy
    monkeypatch.setattr(stage, "cross_entropy", lambda model, tokens, hidden, *rest: (
        seen.append(hidden) or sound(model, tokens, hidden, *rest)
    ))  # fmt: skip
    for step in (0, 1, 0):
        stage.update(step, torch.arange(8))
    counts = seen[0].sum(dim=1)
    partial = seen[0][counts < 16]
    assert len(counts.unique()) > 2 and (counts > 0).all() and len(partial.unique(dim=0)) == len(partial)
    assert not torch.equal(seen[0], seen[1]) and torch.equal(seen[0], seen[2])  # a function of the step


def test_both_views_are_trained_on(tiny_config_once, monkeypatch):
    stage, seen = stage2(tiny_config_once), []
    stage.train = torch.stack([torch.zeros(8, 16), torch.ones(8, 16)]).int()
    sound = stage.cross_entropy
    monkeypatch.setattr(stage, "cross_entropy", lambda model, tokens, *rest: (
        seen.append(tokens[:, 0]) or sound(model, tokens, *rest)
    ))  # fmt: skip
    torch.manual_seed(0)
    stage.update(0, torch.arange(8))
    assert set(seen[0].tolist()) == {0, 1}


def test_validation_is_the_mean_over_tokens_however_the_images_are_cut(tiny_config_once):
    stage = stage2(tiny_config_once)
    stage.val = stage.train[0][torch.arange(70) % 8]
    hidden = stage.hide(70, torch.Generator().manual_seed(3))
    with torch.no_grad():
        whole = float(stage.cross_entropy(stage.model, stage.val, hidden))
        assert stage._mean_loss(stage.model, hidden) == pytest.approx(whole, rel=1e-5)


def test_validation_repeats_itself_and_looks_at_every_hole_family(tiny_config_once):
    stage = stage2(tiny_config_once, validate_on=2)
    assert len(stage.val) == 2
    with torch.no_grad():
        first, second = (stage.validate(stage.model.eval()) for _ in range(2))
    assert set(first) == {"score", "pictures", *FAMILIES}
    assert differences(first, second) == []
    assert first["pictures"].shape == (3, 34, 2 * 18 - 2) and first["pictures"].dtype == torch.uint8


def test_the_preview_keeps_the_tokens_outside_the_hole(tiny_config_once):
    """Above the picture as the VQGAN sees it, below the same with the hole filled."""
    stage = stage2(tiny_config_once, **{"vqgan.attention_resolution": 1000})
    hidden = torch.zeros(4, 16, dtype=torch.bool)
    stage.holes["thick"] = hidden
    with torch.no_grad():
        sheet = stage._preview(stage.model.eval())
    assert torch.equal(sheet[:, :16], sheet[:, 18:])


def test_the_embedding_starts_from_the_codes_where_it_should(tiny_config_once):
    def angles(vectors):
        vectors = F.normalize(vectors.detach(), dim=1)
        return vectors @ vectors.T

    started, plain = stage2(tiny_config_once), stage2(tiny_config_once, start_from_codes=False)
    codes = angles(started.vqgan.codebook.vectors())
    torch.testing.assert_close(angles(started.model.embedding.weight[:16]), codes, atol=1e-4, rtol=0)
    assert (angles(plain.model.embedding.weight[:16]) - codes).abs().max() > 0.3


def test_images_are_encoded_once_a_view_and_trained_on_from_the_cache(tmp_path, monkeypatch, trained):
    out, config = trained
    for flip, views in (("true", 2), ("false", 1)):
        counted, stages, sound = [], [], VQGAN.encode

        class Spy(Stage2):
            def __init__(self, *args, stages=stages):
                super().__init__(*args)
                stages.append(self)

        with monkeypatch.context() as patch:
            patch.setattr(
                VQGAN, "encode", lambda net, x, counted=counted, sound=sound: counted.append(len(x)) or sound(net, x)
            )
            patch.setattr(training_transformer, "Stage2", Spy)
            train("transformer", config, tmp_path / flip, "--vqgan", str(out / "vqgan.safetensors"), "--epochs", "4",
                  "--data.flip", flip)  # fmt: skip
        assert counted == [8] * views + [4]
        (stage,), vqgan = stages, VQGAN.load(out / "vqgan.safetensors")
        images = ImageFolder(load_config(config).data.train).images
        assert stage.train.shape == (views, 8, 16)
        for view, source in zip(stage.train, (images, images.flip(-1)), strict=False):
            assert torch.equal(view.long(), vqgan.encode(to_float(source)))


def test_the_frozen_vqgan_stays_frozen(tmp_path, monkeypatch, trained):
    """FIELD.md section 4: a frozen VQGAN left in train mode or given to the optimizer."""
    out, config = trained
    source = out / "vqgan.safetensors"
    before, stages = file_hash(source), []

    class Spy(Stage2):
        def update(self, step, indices):
            losses = super().update(step, indices)
            assert not any(module.training for module in self.vqgan.modules())
            stages.append(self)
            return losses

    monkeypatch.setattr(training_transformer, "Stage2", Spy)
    train("transformer", config, tmp_path, "--vqgan", str(source))
    stage = stages[-1]
    assert len(stages) == 4 and stage.model.training
    assert not any(p.requires_grad or p.grad is not None for p in stage.vqgan.parameters())
    optimized = {id(p) for group in stage.optimizer.param_groups for p in group["params"]}
    assert optimized == {id(p) for p in stage.model.parameters()}
    assert optimized.isdisjoint(id(p) for p in stage.vqgan.parameters())
    loaded = VQGAN.load(source).state_dict()
    assert differences(dict(stage.vqgan.state_dict()), dict(loaded)) == [] and file_hash(source) == before
    assert differences(dict(VQGAN.load(tmp_path / "vqgan.safetensors").state_dict()), dict(loaded)) == []


def test_a_missing_vqgan_is_a_clear_error(tmp_path, capsys, tiny_config_once):
    told = refusal(capsys, "transformer", tiny_config_once, tmp_path / "new")
    assert "new/vqgan.safetensors: no VQGAN there; train one with training_vqgan.py, or pass --vqgan FILE" in told
    told = refusal(capsys, "transformer", tiny_config_once, tmp_path, "--vqgan", str(tmp_path / "VQGAN.pt"))
    assert "VQGAN.pt: no VQGAN there" in told


@pytest.mark.parametrize("name", ["other.safetensors", "VQGAN.pt"])
def test_a_vqgan_from_elsewhere_is_copied_beside_the_transformer(tmp_path, trained, name):
    """A plain state_dict, as the lab's VQGAN.pt is, takes its layout from the config."""
    vqgan = VQGAN.load(trained[0] / "vqgan.safetensors")
    (tmp_path / "elsewhere").mkdir()
    source = tmp_path / "elsewhere" / name
    if name.endswith(".pt"):
        torch.save(vqgan.state_dict(), source)
    else:
        save_weights(source, vqgan, vqgan.config)
    train("transformer", trained[1], tmp_path / "out", "--vqgan", str(source), "--epochs", "0.5")
    copy = tmp_path / "out" / "vqgan.safetensors"
    assert differences(dict(VQGAN.load(copy).state_dict()), dict(vqgan.state_dict())) == []
    metadata = read_weights(copy)[1]
    assert metadata["source"] == str(source)
    assert read_weights(tmp_path / "out" / "transformer.safetensors")[1]["vqgan"] == file_hash(copy)


def test_another_vqgan_in_the_folder_is_not_overwritten(tmp_path, capsys, trained):
    """It may be stage 1's best; the same weights in another file are welcome, as when a run is resumed."""
    vqgan = VQGAN.load(trained[0] / "vqgan.safetensors")
    arguments = ["--vqgan", str(trained[0] / "vqgan.safetensors"), "--epochs", "0.5"]
    own = tmp_path / "vqgan.safetensors"
    save_weights(own, vqgan, vqgan.config, torch.float32, note="the same")
    before = own.read_bytes()
    train("transformer", trained[1], tmp_path, *arguments)
    assert own.read_bytes() == before
    vqgan.quant_conv.weight[0, 0] += 1
    save_weights(own, vqgan, vqgan.config, torch.float32)
    before = own.read_bytes()
    told = refusal(capsys, "transformer", trained[1], tmp_path, *arguments)
    assert f"{own}: another VQGAN than {trained[0] / 'vqgan.safetensors'}; take another --out" in told
    assert own.read_bytes() == before


def test_the_runs_own_vqgan_is_not_rewritten(tmp_path, trained):
    out = tmp_path / "out"
    out.mkdir()
    (out / "vqgan.safetensors").write_bytes((trained[0] / "vqgan.safetensors").read_bytes())
    before = (out / "vqgan.safetensors").stat().st_mtime_ns
    train("transformer", trained[1], out, "--vqgan", str(out / "vqgan.safetensors"), "--epochs", "0.5")
    assert (out / "vqgan.safetensors").stat().st_mtime_ns == before


def test_a_vqgan_of_another_grid_or_number_of_codes_is_refused(tmp_path, capsys, trained):
    vqgan = str(trained[0] / "vqgan.safetensors")
    overrides = ["--vqgan.codebook.codes", "32", "--transformer.codes", "32"]
    told = refusal(capsys, "transformer", trained[1], tmp_path, "--vqgan", vqgan, *overrides)
    assert "vqgan.safetensors: another token grid or number of codes than the config's vqgan section" in told
    assert not (tmp_path / "vqgan.safetensors").exists()
