"""Settings, YAML and weights files: strict, atomic, self-describing, and reading one runs no code."""

import hashlib
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import Field
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_networks import transformer
from torch import Tensor, nn

from models.checkpoint import build, file_hash, read_weights, save_weights
from models.settings import Settings
from models.transformer import Transformer


class NetConfig(Settings):
    width: int = Field(ge=1)
    shape: tuple[float, ...] = Field((1.0,), strict=False)


class Net(nn.Module):
    """One Linear and a buffer of integers: the smallest module with a Config."""

    Config = NetConfig

    def __init__(self, config: NetConfig):
        super().__init__()
        self.config = config
        self.linear = nn.Linear(config.width, 2)
        self.register_buffer("steps", torch.tensor([1, 2**40]))


def make(width: int = 3) -> Net:
    torch.manual_seed(0)
    return Net(NetConfig(width=width, shape=(0.5, 2.0)))


def named(path) -> str:
    """A regular expression that finds the file's name."""
    return re.escape(Path(path).name)


# Settings


# Weights files


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_weights_survive_the_round_trip_up_to_their_dtype(tmp_path, dtype):
    net, path = make(), tmp_path / "net.safetensors"
    save_weights(path, net, net.config, dtype, step="12")
    tensors, metadata = read_weights(path)
    assert metadata["kind"] == "Net" and metadata["step"] == "12"
    assert NetConfig.model_validate_json(metadata["config"]) == net.config
    assert tensors.keys() == net.state_dict().keys()
    assert tensors["linear.weight"].dtype == torch.float32
    assert torch.equal(tensors["linear.weight"], net.linear.weight.to(dtype).float())
    assert torch.equal(tensors["steps"], net.steps) and tensors["steps"].dtype == torch.int64  # never cast
    with safe_open(path, framework="pt") as file:
        assert file.get_tensor("linear.weight").dtype == dtype


def test_float16_is_the_default_and_saving_leaves_the_module_alone(tmp_path):
    net = make()
    before = net.linear.weight.clone()
    save_weights(tmp_path / "net.safetensors", net, net.config)
    with safe_open(tmp_path / "net.safetensors", framework="pt") as file:
        assert file.get_tensor("linear.bias").dtype == torch.float16
    assert torch.equal(net.linear.weight, before) and net.linear.weight.requires_grad


def test_weights_have_the_permissions_of_any_new_file(tmp_path):
    (tmp_path / "other").write_text("")
    save_weights(tmp_path / "net.safetensors", make(), make().config)
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(modes) == 1


def test_a_tensor_that_is_not_contiguous_is_saved(tmp_path):
    net = make()
    net.linear.weight = nn.Parameter(torch.arange(6.0).reshape(3, 2).T)
    save_weights(tmp_path / "net.safetensors", net, net.config, torch.float32)
    assert torch.equal(read_weights(tmp_path / "net.safetensors")[0]["linear.weight"], net.linear.weight)


def test_build_returns_the_same_frozen_module(tmp_path):
    net, path = make(), tmp_path / "net.safetensors"
    save_weights(path, net, net.config, torch.float32)
    loaded = build(Net, path)
    assert loaded.config == net.config and not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), net.state_dict().values(), strict=True))


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_a_plain_state_dict_needs_a_config(tmp_path, legacy):
    net, path, yml = make(), tmp_path / "net.pt", tmp_path / "net.yml"
    torch.save(net.state_dict(), path, _use_new_zipfile_serialization=not legacy)
    yml.write_text("net: {width: 3, shape: [0.5, 2]}")
    with pytest.raises(ValueError, match=r"net\.pt: expected the weights of a Net, found no desc.*config=FILE\.yml"):
        build(Net, path)
    heir = tmp_path / "heir.yml"
    heir.write_text("base: parent.yml\nnet: {width: 3}")
    (tmp_path / "parent.yml").write_text("net: {width: 5, shape: [0.5, 2]}\nelsewhere: 3")
    for config in (net.config, yml, str(yml), heir):
        assert torch.equal(build(Net, path, config, "net").linear.weight, net.linear.weight)


def test_the_weights_of_another_kind_are_refused(tmp_path):
    path = tmp_path / "other.safetensors"
    save_weights(path, nn.Linear(3, 2), NetConfig(width=3))
    with pytest.raises(ValueError, match=r"other\.safetensors: expected the weights of a Net, found Linear"):
        build(Net, path)


def test_weights_of_another_shape_are_refused_with_both_shapes(tmp_path):
    net, path = make(), tmp_path / "net.safetensors"
    save_weights(path, net, net.config)
    with pytest.raises(ValueError, match=r"net\.safetensors.*linear\.weight is \(2, 3\), expected \(2, 4\)"):
        build(Net, path, NetConfig(width=4))


def test_settings_that_ask_for_more_memory_than_there_is_are_refused_by_the_tensors_of_the_file(tmp_path):
    net, path = make(), tmp_path / "net.safetensors"
    save_weights(path, net, NetConfig(width=10**12))  # 8 TB
    with pytest.raises(
        ValueError, match=r"net\.safetensors.*linear\.weight is \(2, 3\), expected \(2, 1000000000000\)"
    ):
        build(Net, path)


@pytest.mark.parametrize("width", [10**20, 2**62])
def test_settings_beyond_64_bits_are_refused(tmp_path, width):
    net, path = make(), tmp_path / "net.safetensors"
    save_weights(path, net, NetConfig(width=width))
    with pytest.raises(ValueError, match=r"net\.safetensors: its settings ask for a network that is too large"):
        build(Net, path)


def test_buffers_that_are_in_no_file_are_counted_too(tmp_path):
    net, path = transformer(), tmp_path / "net.safetensors"
    save_weights(path, net, net.config.model_copy(update={"tokens": 40_000**2}))
    with pytest.raises(ValueError, match=r"net\.safetensors: its settings ask for a network that is too large"):
        Transformer.load(path)


def test_of_many_misfits_three_are_named_one_of_each_kind_first(tmp_path):
    state = {"linear.weight": torch.zeros(5), **{f"more.{number}": torch.zeros(1) for number in range(200)}}
    torch.save(state, tmp_path / "net.pt")
    with pytest.raises(ValueError, match=r"net\.pt: does not fit this Net: ") as raised:
        build(Net, tmp_path / "net.pt", NetConfig(width=3))
    told = str(raised.value).partition("this Net: ")[2].split("; ")
    assert told[:3] == ["missing steps", "unexpected more.0", "linear.weight is (5,), expected (2, 3)"]
    assert told[3:] == ["and 200 more"]


@pytest.mark.parametrize(("key", "change"), [("linear.bias", "missing"), ("linear.more", "unexpected")])
def test_weights_with_a_key_too_few_or_too_many_are_refused_by_its_name(tmp_path, key, change):
    state, path = dict(make().state_dict()), tmp_path / "net.pt"
    if change == "missing":
        del state[key]
    else:
        state[key] = torch.zeros(1)
    torch.save(state, path)
    with pytest.raises(ValueError, match=rf"net\.pt: does not fit this Net: {change} {re.escape(key)}$"):
        build(Net, path, NetConfig(width=3))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("other: {width: 3}", "expected a section 'net', found none"),
        ("net:", "expected a section 'net', found none"),
        ("net: {width: wide}", r"width: Input should be a valid integer, found 'wide'$"),
        ("net: {width: 3, depth: 2}", r"depth: unknown key, known are: width, shape$"),
    ],
)
def test_a_config_file_that_does_not_fit_is_named(tmp_path, text, message):
    torch.save(make().state_dict(), tmp_path / "net.pt")
    (tmp_path / "net.yml").write_text(text)
    with pytest.raises(ValueError, match=rf"(?s)net\.yml: {message}"):
        build(Net, tmp_path / "net.pt", tmp_path / "net.yml", "net")


@pytest.mark.parametrize("metadata", [{}, {"config": "{"}, {"config": '{"width": 3, "depth": 1}'}])
def test_a_weights_file_that_describes_itself_badly_is_named(tmp_path, metadata):
    save_file(dict(make().state_dict()), tmp_path / "net.safetensors", {"kind": "Net"} | metadata)
    with pytest.raises(ValueError, match=r"net\.safetensors: "):
        build(Net, tmp_path / "net.safetensors")


# Reading what is no weights file


class Bomb:
    """Unpickling this makes a folder: any code could run in its place."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return Path.mkdir, (self.folder,)


@pytest.mark.parametrize("form", ["zip", "legacy", "plain pickle"])
def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(tmp_path, form):
    made, path = tmp_path / "made", tmp_path / "evil.pt"
    content = {"linear.weight": torch.zeros(2, 3), "linear.bias": Bomb(made)}
    if form == "plain pickle":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(ValueError, match=r"evil\.pt: not a weights file \(refused, it holds more than plain tensors"):
        read_weights(path)
    assert not made.exists()
    if form == "plain pickle":
        pickle.loads(path.read_bytes())
        assert made.exists()  # the bomb was live


@pytest.mark.parametrize(
    "tensor", [torch.zeros(1).expand(10**6, 10**6), torch.eye(3).to_sparse(), torch.eye(3).to("meta")]
)
def test_tensors_whose_values_are_not_there_are_refused(tmp_path, tensor):
    torch.save({"a": tensor}, tmp_path / "odd.pt")
    with pytest.raises(ValueError, match=r"odd\.pt: the values of a are not there"):
        read_weights(tmp_path / "odd.pt")


@pytest.mark.parametrize(
    "content",
    [{"state_dict": {"w": torch.zeros(1)}}, {"w": torch.zeros(1), "epoch": 3}, [torch.zeros(1)], {0: torch.zeros(1)}],
    ids=["nested", "epoch", "list", "numbered"],
)
def test_only_a_dictionary_of_tensors_counts_as_a_state_dict(tmp_path, content):
    torch.save(content, tmp_path / "odd.pt")
    with pytest.raises(ValueError, match=r"odd\.pt: expected a state_dict of tensors"):
        read_weights(tmp_path / "odd.pt")


@pytest.mark.parametrize("name", ["none.safetensors", "none.pt", "."])
def test_a_missing_weights_file_is_named(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=rf"{named(tmp_path / name)}: no such weights file"):
        read_weights(tmp_path / name)


@pytest.mark.parametrize("name", ["net.safetensors", "net.pt"])
@pytest.mark.parametrize("keep", [0.0, 0.02, 0.5, 0.99])
def test_a_truncated_weights_file_is_named(tmp_path, name, keep):
    net, path = make(), tmp_path / name
    if name.endswith(".pt"):
        torch.save(net.state_dict(), path)
    else:
        save_weights(path, net, net.config)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(ValueError, match=rf"{named(path)}: "):
        read_weights(path)


@pytest.mark.parametrize("name", ["page.safetensors", "page.pt"])
def test_a_web_page_saved_as_weights_is_named(tmp_path, name):
    (tmp_path / name).write_text("<!DOCTYPE html><html><body>404: not found</body></html>")
    with pytest.raises(ValueError, match=rf"{named(tmp_path / name)}: "):
        read_weights(tmp_path / name)


def test_plain_state_dicts_come_as_float32_without_metadata(tmp_path):
    state = {"a": torch.ones(2, dtype=torch.float64), "b": torch.ones(2).half(), "c": torch.ones(2, dtype=torch.bool)}
    torch.save(state, tmp_path / "plain.pt")
    tensors, metadata = read_weights(str(tmp_path / "plain.pt"))
    assert {name: tensor.dtype for name, tensor in tensors.items()} == {
        "a": torch.float32,
        "b": torch.float32,
        "c": torch.bool,
    }
    assert metadata == {} and all(isinstance(tensor, Tensor) for tensor in tensors.values())


def test_a_safetensors_file_of_others_needs_no_metadata(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "plain.safetensors")
    tensors, metadata = read_weights(tmp_path / "plain.safetensors")
    assert metadata == {} and torch.equal(tensors["a"], torch.ones(2))


def test_file_hash_is_sha256(tmp_path):
    (tmp_path / "file").write_bytes(b"cats")
    assert file_hash(tmp_path / "file") == hashlib.sha256(b"cats").hexdigest()
    (tmp_path / "file").write_bytes(b"cat")
    assert file_hash(str(tmp_path / "file")) != hashlib.sha256(b"cats").hexdigest()


# Damage


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pt"])
def test_a_flipped_bit_anywhere_is_noticed_or_changes_nothing(tmp_path, name):
    path = tmp_path / name
    module = nn.Linear(40, 30)
    if path.suffix == ".pt":
        torch.save(module.state_dict(), path)
    else:
        save_weights(path, module, Settings(), psnr="12.5")
    sound, metadata = read_weights(path)
    whole, noticed = path.read_bytes(), 0
    rng = np.random.default_rng(0)
    for bit in rng.integers(8 * len(whole), size=300).tolist():
        content = bytearray(whole)
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        try:
            tensors, notes = read_weights(path)
        except ValueError as error:
            noticed += 1
            assert str(path) in str(error) and "\n" not in str(error)
        else:
            assert notes == metadata or "sha256" not in notes  # its very name was hit
            assert tensors.keys() == sound.keys()
            assert all(torch.equal(tensor, sound[key]) for key, tensor in tensors.items())
    assert noticed > 200


def test_weights_from_before_there_was_a_checksum_are_read(tmp_path):
    path = tmp_path / "old.safetensors"
    save_file({"weight": torch.ones(2)}, path, {"kind": "Linear", "config": "{}"})
    assert read_weights(path)[0]["weight"].tolist() == [1, 1]
