"""transformer.py: loss, hiding, accumulation, validation and the frozen VQGAN of stage 2."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import colourful
from PIL import Image
from training_runs import TRAIN, VAL, checkpoint, differences, events, gradients, refusal, step, train

import training_transformer
from config import load_config
from maskgit.data import GREY, to_float
from maskgit.dataset import ImageDataset, Maps
from maskgit.inpainter import Inpainter
from maskgit.masks import FAMILIES, composite, make_holes, to_hidden
from models.checkpoint import file_hash, read_weights, save_weights
from models.vqgan import VQGAN
from training import transformer
from training.run import VAL_SEED
from training.transformer import PREVIEWED, TransformerTrainer, encode

CPU = torch.device("cpu")


def stage2(config_file, **overrides) -> TransformerTrainer:
    """A TransformerTrainer of the tiny config on tokens of a random VQGAN, both views."""
    keys = {"transformer_training." + key: value for key, value in overrides.items() if "." not in key}
    config = load_config(config_file, keys | {key: value for key, value in overrides.items() if "." in key})
    torch.manual_seed(0)
    vqgan = VQGAN(config.vqgan).eval().requires_grad_(False)
    tokens, val = (
        torch.from_numpy(np.concatenate(list(encode(vqgan, Maps.of(images), CPU, views)))).view(-1, 1, 4, 4)
        for images, views in ((TRAIN, 2), (VAL, 1))
    )
    return TransformerTrainer(config, CPU, vqgan, Maps.of(tokens), val.flatten(1), VAL)


def test_stage_2_learns_a_few_pictures_by_heart(tiny_config_once):
    stage = stage2(tiny_config_once, learning_rate=2e-2, hiding={"bernoulli": 1.0})
    losses = [float(step(stage, number, 4)["loss"]) for number in range(120)]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("loss_on", ["hidden", "all"])
def test_cross_entropy_by_hand_on_hidden_tokens_and_on_all(tiny_config_once, loss_on, smoothing):
    """(1 - s) (-log p_true) + s mean over the codes of (-log p), the mean over the tokens that count."""
    stage = stage2(tiny_config_once, loss_on=loss_on)
    tokens = stage.train.stack()[:3].flatten(1)
    hidden = torch.rand(3, 16, generator=torch.Generator().manual_seed(1)) < torch.tensor([[0.1], [0.5], [0.9]])
    visible = tokens.long().clone()
    visible[hidden] = 16
    with torch.no_grad():
        log_p = stage.model(visible).log_softmax(dim=-1)  # (3, 16, k)
        found = stage.cross_entropy(stage.model, tokens, hidden, stage.counted(hidden), smoothing)
    true = -log_p.gather(-1, tokens.long()[..., None])[..., 0]
    each = (1 - smoothing) * true + smoothing * -log_p.mean(dim=-1)
    expected = each[hidden].mean() if loss_on == "hidden" else each.mean()
    assert float(found) == pytest.approx(float(expected), rel=1e-5)


def test_label_smoothing_is_for_training_only(tiny_config_once):
    plain, smooth = stage2(tiny_config_once), stage2(tiny_config_once, label_smoothing=0.3)
    with torch.no_grad():
        assert plain.validate(plain.model.eval())["score"] == smooth.validate(smooth.model.eval())["score"]
    assert step(smooth, 0, 8)["loss"] != step(plain, 0, 8)["loss"]


def test_each_sample_hides_tokens_of_its_own_number_and_place(tiny_config_once, monkeypatch):
    """FIELD.md section 4: a mask ratio shared by the batch."""
    stage, seen = stage2(tiny_config_once, batch_size=8), []
    sound = stage.cross_entropy
    monkeypatch.setattr(stage, "cross_entropy", lambda model, tokens, hidden, *rest: (
        seen.append(hidden) or sound(model, tokens, hidden, *rest)
    ))  # fmt: skip
    for number in (0, 1, 0):
        step(stage, number, 8)
    counts = seen[0].sum(dim=1)
    partial = seen[0][counts < 16]
    assert len(counts.unique()) > 2 and (counts > 0).all() and len(partial.unique(dim=0)) == len(partial)
    assert not torch.equal(seen[0], seen[1]) and torch.equal(seen[0], seen[2])  # a function of the step


def test_both_views_are_trained_on(tiny_config_once, monkeypatch):
    stage, seen = stage2(tiny_config_once), []
    stage.train = Maps.of(torch.cat([torch.zeros(8, 1, 4, 4), torch.ones(8, 1, 4, 4)]).int())
    sound = stage.cross_entropy
    monkeypatch.setattr(stage, "cross_entropy", lambda model, tokens, *rest: (
        seen.append(tokens[:, 0]) or sound(model, tokens, *rest)
    ))  # fmt: skip
    step(stage, 0, 8)
    assert set(seen[0].tolist()) == {0, 1}


def test_validation_is_the_mean_over_tokens_however_the_images_are_cut(tiny_config_once):
    stage = stage2(tiny_config_once)
    stage.val = stage.train.stack().flatten(1)[torch.arange(70) % 8]
    hidden = stage.hide(70, torch.Generator().manual_seed(3))
    with torch.no_grad():
        for counted in (hidden, torch.ones_like(hidden)):
            whole = float(stage.cross_entropy(stage.model, stage.val, hidden, counted))
            assert stage._mean_loss(stage.model, hidden, counted, stage.val) == pytest.approx(whole, rel=1e-5)


def test_hole_families_are_compared_by_their_hidden_tokens_whatever_the_training_counts(tiny_config_once):
    hidden, all_ = stage2(tiny_config_once), stage2(tiny_config_once, loss_on="all")
    all_.model.load_state_dict(hidden.model.state_dict())
    with torch.no_grad():
        one, other = (stage.validate(stage.model.eval()) for stage in (hidden, all_))
    assert one["score"] != other["score"]
    assert {family: one[family] for family in FAMILIES} == {family: other[family] for family in FAMILIES}


def test_validation_repeats_itself_and_looks_at_every_hole_family(tiny_config_once):
    stage = stage2(tiny_config_once, validate_on=2)
    assert len(stage.val) == 2
    with torch.no_grad():
        first, second = (stage.validate(stage.model.eval()) for _ in range(2))
    assert set(first) == {"score", "pictures", *FAMILIES}
    assert differences(first, second) == []
    assert first["pictures"].shape == (3, 9 * 18 - 2, 4 * 18 - 2) and first["pictures"].dtype == torch.uint8


FIRST_GUESS = {"decoding.pre_fill": True, "decoding.token_rule": "majority",
               "vqgan.decoder.known_width": 4, "vqgan.decoder.pre_filled": True}  # fmt: skip


def tiles(sheet: torch.Tensor) -> torch.Tensor:
    """A preview (3, ., .) -> (rows, images, 3, 16, 16)."""
    return sheet.unfold(1, 16, 18).unfold(2, 16, 18).permute(1, 2, 0, 3, 4)


@pytest.mark.parametrize("changes", [{}, {"decoding.forget": True}, FIRST_GUESS])
def test_the_preview_keeps_known_pixels_and_reads_nothing_of_the_hole(tiny_config_once, changes):
    stage = stage2(tiny_config_once, **changes)
    if stage.vqgan.decoder.known:
        for join in stage.vqgan.decoder.joins:
            torch.nn.init.normal_(join.weight, 0.0, 0.5)
    rows = tiles(stage._preview(stage.model.eval()))
    for number, family in enumerate(PREVIEWED):
        hole = make_holes(family, len(VAL), 16, VAL_SEED)
        assert torch.equal(rows[2 + 2 * number], composite(rows[2 + 2 * number], VAL, hole))
        stage.images = torch.where(hole, 255 - VAL, VAL)
        assert torch.equal(tiles(stage._preview(stage.model))[2 + 2 * number][hole.expand_as(VAL)],
                           rows[2 + 2 * number][hole.expand_as(VAL)])  # fmt: skip


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

        class Spy(TransformerTrainer):
            def __init__(self, *args, stages=stages):
                super().__init__(*args)
                stages.append(self)

        with monkeypatch.context() as patch:
            patch.setattr(
                VQGAN, "encode", lambda net, x, counted=counted, sound=sound: counted.append(len(x)) or sound(net, x)
            )
            patch.setattr(training_transformer, "TransformerTrainer", Spy)
            train("transformer", config, tmp_path / flip, "--vqgan", str(out / "vqgan.safetensors"), "--epochs", "4",
                  "--data.flip", flip)  # fmt: skip
        assert counted[: views + 1] == [8] * views + [4] and set(counted[views + 1 :]) == {4}  # then previews alone
        (stage,), vqgan = stages, VQGAN.load(out / "vqgan.safetensors")
        images = ImageDataset(load_config(config).data.train).images
        assert stage.train.stack().shape == (8 * views, 1, 4, 4)
        for view, source in zip(stage.train.stack().flatten(1).split(8), (images, images.flip(-1)), strict=False):
            assert torch.equal(view.long(), vqgan.encode(to_float(source)))


def test_the_frozen_vqgan_stays_frozen(tmp_path, monkeypatch, trained):
    """FIELD.md section 4: a frozen VQGAN left in train mode or given to the optimizer."""
    out, config = trained
    source = out / "vqgan.safetensors"
    before, stages = file_hash(source), []

    class Spy(TransformerTrainer):
        def update(self, *args):
            losses = super().update(*args)
            assert not any(module.training for module in self.vqgan.modules())
            stages.append(self)
            return losses

    monkeypatch.setattr(training_transformer, "TransformerTrainer", Spy)
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
    assert read_weights(tmp_path / "out" / "transformer.safetensors")[1]["vqgan"] == VQGAN.load(copy).tokens_key()


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
    told = refusal(capsys, "transformer", trained[1], tmp_path, *arguments, "--resume")
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


@pytest.mark.parametrize("loss_on", ["hidden", "all"])
@pytest.mark.parametrize("accumulate", [2, 4])
def test_accumulated_gradients_equal_those_of_the_whole_batch_in_stage_2(
    tiny_config_once, monkeypatch, loss_on, accumulate
):
    """Pieces hide different numbers of tokens, so the mean of their means would not be the mean."""
    whole, cut = (stage2(tiny_config_once, batch_size=8, loss_on=loss_on, accumulate=n) for n in (1, accumulate))
    counts = whole.hide(8, torch.Generator().manual_seed(0)).sum(dim=1).unique()
    assert len(counts) > 1
    expected, loss = gradients(transformer, monkeypatch, whole, 8)
    found, accumulated = gradients(transformer, monkeypatch, cut, 8)
    assert accumulated == pytest.approx(loss, rel=1e-5)
    torch.testing.assert_close(found, expected, atol=1e-7, rtol=1e-4)


def test_the_transformer_names_its_vqgan_and_its_decoding(trained):
    out, config = trained
    metadata = read_weights(out / "transformer.safetensors")[1]
    assert metadata["vqgan"] == VQGAN.load(out / "vqgan.safetensors").tokens_key()
    assert metadata["decoding"] == load_config(config).decoding.model_dump_json()


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
    assert (picture.width, picture.height) == (4 * 18 - 2, 9 * 18 - 2)


def test_the_pictures_of_a_validation_are_fixed_images_under_fixed_holes_of_several_families(tiny_config_once):
    stage = stage2(tiny_config_once)
    rows = tiles(stage._preview(stage.model.eval()))
    assert torch.equal(rows[0], VAL)
    for number, family in enumerate(PREVIEWED):
        holes, filled = rows[1 + 2 * number], rows[2 + 2 * number]
        assert torch.equal(holes, VAL.masked_fill(make_holes(family, len(VAL), 16, VAL_SEED), GREY))
        assert not torch.equal(filled, rows[0])
    for parameter in stage.model.parameters():
        torch.nn.init.normal_(parameter)
    after = tiles(stage._preview(stage.model))
    assert torch.equal(after[0], rows[0]) and torch.equal(after[1::2], rows[1::2])  # only the fillings have changed
    assert not any(torch.equal(after[row], rows[row]) for row in (2, 4, 6, 8))


# --- windows of pictures that are larger than the model ---------------------------------------------------------------


@pytest.fixture
def large_pictures(tmp_path):
    """8 pictures of 26x39 pixels, a config's keys for random windows of them."""
    folder = tmp_path / "large"
    folder.mkdir()
    for index, pixels in enumerate(colourful(8, size=39)):
        Image.fromarray(pixels[:26]).save(folder / f"{index}.png")
    return ["--train-d-path", str(folder), "--val-d-path", str(folder), "--data.windows", "random"]


def test_the_token_map_of_a_picture_holds_the_tokens_of_its_windows(trained):
    out, _ = trained
    vqgan = VQGAN.load(out / "vqgan.safetensors")
    pictures = torch.from_numpy(colourful(3, size=39)).permute(0, 3, 1, 2)[:, :, :26].contiguous()
    found = torch.from_numpy(np.concatenate(list(encode(vqgan, Maps.of(pictures), CPU, views=2))))
    maps = Maps(found, torch.tensor([[6, 9]]).repeat(6, 1), channels=1)
    for index, y, x in ((0, 0, 0), (1, 2, 5), (2, 1, 3)):
        place = (slice(None), slice(4 * y, 4 * y + 16), slice(4 * x, 4 * x + 16))
        for number, picture in ((index, pictures[index]), (index + 3, pictures[index][..., :36].flip(-1))):
            tokens = maps.read(torch.tensor([[number, y, x]]), 4).flatten(1)
            assert torch.equal(tokens.long(), vqgan.encode(to_float(picture[place][None])))


@pytest.mark.parametrize("stage", ["vqgan", "transformer"])
def test_training_on_windows_resumes_bit_for_bit(tmp_path, trained, large_pictures, stage):
    out, config = trained
    given = [*large_pictures, *(["--vqgan", str(out / "vqgan.safetensors")] if stage == "transformer" else [])]
    whole = train(stage, config, tmp_path / "whole", *given, "--epochs", "4")
    halves = train(stage, config, tmp_path / "halves", *given, "--epochs", "2")
    train(stage, config, halves, *given, "--epochs", "4", "--resume")
    assert differences(checkpoint(whole, stage), checkpoint(halves, stage)) == []


def test_windows_out_of_a_token_map_need_an_encoder_that_sees_a_patch_alone(tmp_path, capsys, trained, large_pictures):
    conv = ["--vqgan.encoder.kind", "conv", "--vqgan.encoder.widths", "[16,16]",
            "--vqgan.encoder.downsample_after", "[0,1]", "--epochs", "1"]  # fmt: skip
    _, config = trained
    train("vqgan", config, tmp_path, *large_pictures, *conv)
    told = refusal(capsys, "transformer", config, tmp_path, *large_pictures, *conv)
    assert "data.windows: random needs vqgan.encoder.kind: patch" in told


# --- validation sees what inference sees ---


def test_validation_by_family_hides_and_shows_what_inference_does(tiny_config_once, monkeypatch):
    trainer = stage2(tiny_config_once, **{"decoding.token_rule": "majority", "decoding.pre_fill": True})
    inpainter = Inpainter(trainer.vqgan, trainer.model, trainer.decoding, CPU)
    for family in FAMILIES:
        hole = make_holes(family, len(VAL), 16, VAL_SEED)
        shown, hidden = trainer.shown[family]
        result = inpainter.complete(VAL, hole, range(len(VAL)))
        assert torch.equal(result.hidden, hidden)
        assert torch.equal(result.tokens[~hidden], shown[~hidden].long())
    changed = [(trainer.shown[f][0] != trainer.val)[~trainer.shown[f][1]].any() for f in FAMILIES]
    assert any(changed)  # partly missing cells have other tokens than the truth's, or this says nothing
    seen = []
    monkeypatch.setattr(trainer, "_preview", lambda model: torch.zeros(3, 4, 4))
    with torch.no_grad():
        trainer.validate(lambda tokens, select: seen.append((tokens, select)) or torch.zeros(int(select.sum()), 16))
    shown, hidden = trainer.shown["half"]
    assert torch.equal(seen[-1][0], shown.long().masked_fill(hidden, 16)) and torch.equal(seen[-1][1], hidden)


def test_validation_and_training_draw_from_different_holes(tiny_config_once):
    trainer = stage2(tiny_config_once, hiding={"walk": 1.0})
    count = len(trainer.hide_val._bank[0])
    same = (trainer.hide._bank[0][:count] == trainer.hide_val._bank[0]).all(dim=1)
    assert count > 100 and same.float().mean() < 0.05  # hole i of a seed would be hole i of the other


@pytest.mark.parametrize("rule", ["any", "majority"])
def test_training_hides_by_the_rule_of_inference(tiny_config_once, rule):
    trainer = stage2(tiny_config_once, hiding={"thick": 1.0}, **{"decoding.token_rule": rule})
    expected = to_hidden(make_holes("thick", 1024, 16, 0), 4, rule=rule)
    some = expected.any(dim=1)
    assert torch.equal(trainer.hide._bank[0][some], expected[some])
    assert trainer.hide._bank[0].any(dim=1).all()
