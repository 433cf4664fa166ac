"""config.py: every shipped YAML loads, what is wrong is named, everything can be overridden on the command line."""

import re
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

import config as config_module
import training_transformer
import training_vqgan
from config import Config, load_config, parse_overrides, parse_training, to_yaml, training_parser
from models.settings import explain

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
SHIPPED = sorted([*CONFIGS.glob("*.yml"), *CONFIGS.glob("ablations/*.yml")])


def command(config: Path, *arguments: str, section: str = "vqgan_training"):
    """What a training script makes of `--config FILE arguments`: (arguments, config, folder)."""
    return parse_training(training_parser("", section), ["--config", str(config), *arguments])


def message(capsys, config: Path, *arguments: str) -> str:
    """What the command line says when it refuses `arguments`; it must leave with code 2."""
    with pytest.raises(SystemExit) as stopped:
        command(config, *arguments)
    assert stopped.value.code == 2
    return capsys.readouterr().err


def rewrite(path: Path, section: str, **changes) -> Path:
    """`path` with keys of `section` changed, or removed where the new value is ..."""
    values = yaml.safe_load(path.read_text())
    for key, value in changes.items():
        if value is ...:
            del values[section][key]
        else:
            values[section][key] = value
    path.write_text(yaml.safe_dump(values))
    return path


# --- the shipped files ------------------------------------------------------------------------------------------------


def test_the_four_experiments_are_shipped():
    assert {path.stem for path in SHIPPED} >= {"cats64", "lab", "reference", "smoke"}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_config_loads_and_opens_with_a_comment_on_itself(path):
    config = load_config(path)
    assert config.transformer.tokens == config.vqgan.grid**2
    assert path.read_text().startswith(f"# {path.stem}: ")


def test_the_default_config_is_cats64():
    assert load_config() == load_config(next(path for path in SHIPPED if path.stem == "cats64"))


def test_reference_is_the_recipe_of_the_report():
    """FIELD.md section 2: Bernoulli 1/2, loss on all tokens, Adam 1e-4, MultiStepLR [2, 10], no EMA."""
    training = load_config(next(path for path in SHIPPED if path.stem == "reference")).transformer_training
    assert training.hiding == {"bernoulli": 1.0} and training.bernoulli == 0.5 and training.loss_on == "all"
    assert training.learning_rate == 1e-4 and training.milestones == (2, 10) and training.gamma == 0.1
    assert training.epochs == 100 and training.ema == 0 and training.label_smoothing == 0


@pytest.mark.parametrize("name", ["cats64_reference", "cats64_public"])
def test_the_rivals_have_the_data_tokens_and_size_of_cats64(name):
    ours, rival = (load_config(CONFIGS / f"{stem}.yml") for stem in ("cats64", name))
    assert rival.data == ours.data and rival.vqgan == ours.vqgan
    size = {key: getattr(ours.transformer, key) for key in ("codes", "tokens", "width", "depth", "heads", "mlp_width")}
    assert size.items() <= rival.transformer.model_dump().items()
    structure = {"norm": "post", "positions": "learned", "tied": True, "position_bias": True}
    assert structure.items() <= rival.transformer.model_dump().items()
    training, decoding = rival.transformer_training, rival.decoding
    assert (training.epochs, training.batch_size) == (10, ours.transformer_training.batch_size)
    assert training.hiding == {"bernoulli": 1.0} and training.bernoulli == 0.5 and training.loss_on == "all"
    assert (training.learning_rate, training.ema, training.warmup, training.start_from_codes) == (1e-4, 0, 0, False)
    assert (decoding.total_iter, decoding.sweet_spot, decoding.temperature) == (10, 10, 4.5)
    if name == "cats64_reference":
        assert training.milestones == (2, 10) and training.gamma == 0.1
        assert (decoding.sampler, decoding.sampling_temperature, decoding.forget) == ("lab", 0, True)
    else:
        assert training.milestones == ()
        assert (decoding.sampler, decoding.sampling_temperature, decoding.forget) == ("growing", 1, False)


def test_a_config_is_frozen(tiny_config_once):
    config = load_config(tiny_config_once)
    with pytest.raises(ValidationError, match="frozen"):
        config.vqgan_training.epochs = 3.0


# --- what is wrong is named -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "changes", "told"),
    [
        ("transformer", {"widht": 3}, ["transformer.widht: unknown key", "known are: codes, tokens, width"]),
        ("transformer", {"width": ...}, ["transformer.width", "required"]),
        ("transformer", {"width": "wide"}, ["transformer.width", "valid integer", "found 'wide'"]),
        ("transformer", {"width": True}, ["transformer.width", "valid integer", "found True"]),
        ("transformer", {"depth": 2.5}, ["transformer.depth", "integer", "found 2.5"]),
        ("transformer", {"depth": 0}, ["transformer.depth", "greater than or equal to 1", "found 0"]),
        ("transformer", {"norm": "none"}, ["transformer.norm", "'pre' or 'post'", "found 'none'"]),
        ("transformer", {"codes": 17}, ["transformer.codes 17", "vqgan.codebook.codes 16"]),
        ("transformer", {"tokens": 25}, ["transformer.tokens 25", "makes 16"]),
        ("vqgan_training", {"learning_rate": "fast"}, ["vqgan_training.learning_rate", "number", "found 'fast'"]),
        ("vqgan_training", {"learning_rate": 0}, ["vqgan_training.learning_rate", "greater than 0", "found 0"]),
        ("vqgan_training", {"learning_rate": float("nan")}, ["vqgan_training.learning_rate", "finite", "found nan"]),
        ("vqgan_training", {"betas": [0.9, 1.5]}, ["vqgan_training.betas.1", "less than 1", "found 1.5"]),
        ("vqgan_training", {"betas": [0.9]}, ["vqgan_training.betas.1", "required"]),
        ("vqgan_training", {"accumulate": 3}, ["vqgan_training", "accumulate 3 must divide batch_size 4"]),
        ("vqgan_training", {"perceptual": {"nett": "vgg"}}, ["vqgan_training.perceptual.nett: unknown key", "crop"]),
        ("transformer_training", {"hiding": {"cosine": "x"}}, ["transformer_training.hiding.cosine", "found 'x'"]),
        ("data", {"train": 3}, ["data.train", "string", "found 3"]),
        ("data", {"workers": -1}, ["data.workers", "greater than or equal to 0", "found -1"]),
        ("decoding", {"mask_func": "cosin"}, ["decoding.mask_func", "cosine, linear, square", "found 'cosin'"]),
    ],
)
def test_a_wrong_key_is_named_with_file_path_value_and_expectation(tiny_config, section, changes, told):
    rewrite(tiny_config, section, **changes)
    with pytest.raises(ValueError) as error:
        load_config(tiny_config)
    for part in (str(tiny_config), *told):
        assert part in str(error.value)


def test_every_wrong_key_is_told_at_once(tiny_config):
    rewrite(tiny_config, "transformer", width=..., depth=0)
    with pytest.raises(ValueError, match=r"(?s)transformer\.width.*transformer\.depth"):
        load_config(tiny_config)


def test_an_unknown_section_lists_the_known_ones(tiny_config):
    with pytest.raises(ValueError, match=r"optimizer: unknown key, known are: data, vqgan, transformer"):
        load_config(tiny_config, {"optimizer.learning_rate": 1.0})


def test_explain_tells_of_any_settings_class():
    with pytest.raises(ValidationError) as error:
        Config.model_fields["data"].annotation.model_validate({"train": "a", "vall": "b"})
    lines = explain(error.value, Config.model_fields["data"].annotation)
    assert lines == [
        "val: Field required",
        "vall: unknown key, known are: train, val, windows, flip, workers, memory_mb",
    ]


def test_a_missing_file_a_broken_file_and_a_list_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.yml: no such config file"):
        load_config(tmp_path / "none.yml")
    for text, told in (("a: [1", "not valid YAML"), ("- 1", "expected a mapping of options, found list")):
        (tmp_path / "bad.yml").write_text(text)
        with pytest.raises(ValueError, match=rf"bad\.yml: {told}"):
            load_config(tmp_path / "bad.yml")


def test_numbers_without_a_dot_are_numbers(tiny_config):
    """PyYAML reads 1e-4 as a string; here it is the float that it looks like."""
    text = tiny_config.read_text()
    assert text.count("learning_rate: 0.002") == 2
    tiny_config.write_text(text.replace("learning_rate: 0.002", "learning_rate: 1e-4"))
    config = load_config(tiny_config)
    assert config.vqgan_training.learning_rate == config.transformer_training.learning_rate == 1e-4


# --- overrides --------------------------------------------------------------------------------------------------------


def test_overrides_are_read_as_yaml_in_both_spellings():
    joined = ["--a.c=1e-4", "--x-y.z=[1,2]", "--a.e=a=b"]
    apart = ["--a.b", "3", "--a.some-key", "null", "--a.d", "true", "--a.f", "-1", "--a.g", "{u: 1}"]
    assert parse_overrides([*joined, *apart]) == {
        "a.b": 3,
        "a.c": 1e-4,
        "a.some_key": None,
        "x_y.z": [1, 2],
        "a.d": True,
        "a.e": "a=b",
        "a.f": -1,
        "a.g": {"u": 1},
    }
    assert parse_overrides([]) == {}


def test_an_overridden_value_keeps_its_hyphens():
    assert parse_overrides(["--data.train", "my-cats"]) == {"data.train": "my-cats"}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--batchsize", "3"], "unknown argument '--batchsize'; .* --section.key VALUE"),
        (["stray"], "unknown argument 'stray'"),
        (["a.b", "3"], "unknown argument 'a.b'"),
        (["--a.b"], "--a.b: a value is missing"),
        (["--a.b", "[1"], r"--a.b: '\[1' is not a YAML value"),
    ],
)
def test_a_bad_override_is_named(arguments, told):
    with pytest.raises(ValueError, match=told):
        parse_overrides(arguments)


def test_overrides_reach_every_depth_of_the_config(tiny_config_once):
    arguments = ["--vqgan_training.milestones", "[1, 2.5]", "--vqgan-training.perceptual.weight=0.5", "--data.flip=no"]
    _, config, _ = command(tiny_config_once, *arguments, "--decoding.sampling-temperature", "1e-1")
    assert config.vqgan_training.milestones == (1, 2.5) and config.vqgan_training.perceptual.weight == 0.5
    assert config.data.flip is False and config.decoding.sampling_temperature == 0.1


def test_an_override_beats_the_file_and_leaves_its_neighbours(tiny_config_once):
    before = load_config(tiny_config_once)
    after = load_config(tiny_config_once, {"transformer.depth": 3})
    assert after.transformer.depth == 3
    assert after.model_copy(update={"transformer": before.transformer}) == before


def test_an_override_below_a_value_says_that_it_is_no_section(tiny_config_once):
    with pytest.raises(ValueError, match=r"--data\.train\.deeper: train is a value, not a section"):
        load_config(tiny_config_once, {"data.train.deeper": 1})


# --- the command line -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("section", ["vqgan_training", "transformer_training"])
@pytest.mark.parametrize("mark", ["-", "_"])
def test_the_labs_flags_reach_the_config_with_hyphens_and_underscores(tiny_config_once, section, mark):
    flags = {
        "train_d_path": "my/train",
        "val_d_path": "my-val",
        "num_workers": "3",
        "batch_size": "7",
        "learning_rate": "3e-4",
        "epochs": "2.5",
    }
    arguments = [part for name, value in flags.items() for part in ("--" + name.replace("_", mark), value)]
    _, config, _ = command(tiny_config_once, *arguments, section=section)
    training = getattr(config, section)
    assert (config.data.train, config.data.val, config.data.workers) == ("my/train", "my-val", 3)
    assert (training.batch_size, training.learning_rate, training.epochs) == (7, 3e-4, 2.5)
    other = "transformer_training" if section == "vqgan_training" else "vqgan_training"
    assert getattr(config, other) == getattr(load_config(tiny_config_once), other)


def test_without_flags_the_config_is_the_files(tiny_config_once):
    args, config, folder = command(tiny_config_once)
    assert config == load_config(tiny_config_once)
    assert folder == Path("checkpoints/tiny") and args.device == "auto" and not args.resume
    assert command(tiny_config_once, "--out", "elsewhere")[2] == Path("elsewhere")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--batch-size", "0"], "vqgan_training.batch_size: Input should be greater than or equal to 1, found 0"),
        (["--batch-size", "many"], "argument --batch-size/--batch_size: invalid int value: 'many'"),
        (["--vqgan_training.epoch", "3"], "vqgan_training.epoch: unknown key"),
        (["--nonsense"], "unknown argument '--nonsense'"),
        (["--profile", "-1"], "--profile -1: expected a number of steps"),
        (["--data.memory_mb", "-1"], "data.memory_mb: Input should be greater than or equal to 0, found -1"),
        (["--config", "nowhere.yml"], "nowhere.yml: no such config file"),
    ],
)
def test_a_refused_command_line_says_why(tiny_config_once, capsys, arguments, told):
    assert told in message(capsys, tiny_config_once, *arguments)


def test_help_names_the_flags_and_how_to_override(capsys):
    with pytest.raises(SystemExit) as stopped:
        training_vqgan.main(["--help"])
    told = capsys.readouterr().out
    assert stopped.value.code == 0
    for part in ("--config", "--out", "--resume", "--device", "--train_d_path", "--vqgan_training.learning_rate 3e-4"):
        assert part in told


# --- names of policies and families, bases, and all of it printed -----------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("transformer_training.hiding", {"cosin": 1.0}, "unknown hiding policy 'cosin', expected one of: bernoulli"),
        ("transformer_training.hiding", {"cosine": -1.0}, "weight of cosine: -1.0, expected 0 or a number in"),
        ("transformer_training.hiding", {"cosine": 0.0}, "expected at least one above 0"),
        ("transformer_training.hiding", {}, "expected at least one above 0"),
        ("vqgan_training.holes", {"wlak": 1.0}, "unknown hole family 'wlak', expected one of: walk"),
        ("vqgan_training.holes", {"walk": 0.0}, "expected at least one above 0"),
    ],
)
def test_policies_and_families_are_checked_when_the_config_is_read(key, value, told):
    with pytest.raises(ValueError, match=re.escape(told)):
        load_config(overrides={key: value})


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_a_config_lists_what_it_changes_of_its_base(tmp_path, tiny_config):
    ground = load_config(tiny_config)
    middle = write(tmp_path / "deep" / "middle.yml", "base: ../tiny.yml\nvqgan: {decoder: {blocks: 2}}\n")
    changes = "transformer_training: {hiding: {walk: 1.0}, milestones: [1]}\nvqgan: {decoder: {widths: [16, 12]}}\n"
    variant = write(tmp_path / "variant.yml", f"base: deep/middle.yml\n{changes}")
    config = load_config(variant)
    assert config.transformer_training.hiding == {"walk": 1.0}  # free keys replace, they do not join those of the base
    assert config.transformer_training.milestones == (1,) and config.vqgan.decoder.blocks == 2
    assert config.vqgan.decoder.widths == (16, 12) and config.vqgan.decoder.upsample_after == (0, 1)
    assert config.data == ground.data and config.decoding == ground.decoding
    assert load_config(middle).transformer_training == ground.transformer_training


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("base: nowhere.yml\n", r"variant\.yml: base: no such file .*nowhere\.yml"),
        ("base: 3\n", r"variant\.yml: base: expected the name of a file, found 3"),
        ("base: variant.yml\n", r"variant\.yml: its base leads back to itself"),
        ("base: tiny.yml\nvqgan: {nonsense: 1}\n", r"vqgan\.nonsense: unknown key"),
    ],
)
def test_a_base_that_cannot_be_is_named(tmp_path, tiny_config, text, told):
    with pytest.raises((ValueError, FileNotFoundError), match=told):
        load_config(write(tmp_path / "variant.yml", text))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_printed_config_is_all_of_it_and_loads_as_it_was(tmp_path, path):
    config = load_config(path)
    text = to_yaml(config)
    assert load_config(write(tmp_path / "printed.yml", text)) == config
    for line in text.splitlines():
        assert line.rstrip().endswith(":") or "  # " in line, f"no description: {line}"


@pytest.mark.parametrize("script", [training_vqgan, training_transformer], ids=lambda script: script.__name__)
def test_print_config_prints_the_overridden_config_and_stops(capsys, tiny_config, script):
    with pytest.raises(SystemExit) as stopped:
        script.main(["--config", str(tiny_config), "--transformer.depth", "3", "--print-config"])
    assert stopped.value.code == 0 and "  depth: 3  # " in capsys.readouterr().out


def test_examples_of_the_docstring_run(monkeypatch):
    monkeypatch.chdir(CONFIGS.parent)
    names = {"load_config": load_config}
    for line in config_module.__doc__.splitlines():
        if line.startswith("    "):
            exec(line.strip(), names)
    assert names["config"].transformer.depth == 12
