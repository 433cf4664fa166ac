"""Weights files that describe themselves, and modules built from them.

A weights file is safetensors: plain tensors, and in its metadata `kind` (the class it belongs to), `config` (JSON,
enough to rebuild the module) and `sha256`, which tells a damaged file. Reading one executes no code.
"""

import hashlib
import json
import re
import zipfile
import zlib
from itertools import zip_longest
from pathlib import Path

import pydantic
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from files import replace_file
from models.settings import Settings, explain, in_brief, read_config

MOST_BUFFERS = 2**30  # bytes


def save_weights(path, module: nn.Module, config: Settings, dtype: torch.dtype = torch.float16, **notes: str) -> None:
    """Writes `module` as a self-describing safetensors file, floating-point tensors cast to `dtype`.

    `notes` are further metadata (training step, seed, figures), strings only.
    """
    tensors = {
        name: (tensor.detach().to(dtype) if tensor.is_floating_point() else tensor.detach()).contiguous().cpu()
        for name, tensor in module.state_dict().items()
    }
    metadata = {"kind": type(module).__name__, "config": config.model_dump_json(), **notes}
    metadata["sha256"] = digest(tensors, metadata)
    content = save(tensors, metadata)  # save_file would let nobody but the owner read it
    replace_file(path, lambda temporary: temporary.write_bytes(content))


def digest(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    """SHA-256, in hexadecimal, of tensors of one or more bytes an element and of the metadata but `sha256`."""
    notes = {key: value for key, value in metadata.items() if key != "sha256"}
    found = hashlib.sha256(json.dumps(notes, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        found.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
        found.update(tensor.contiguous().view(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def check_archive(path) -> None:
    """Raises ValueError where a part of what torch.save wrote, a zip file, does not have its checksum (CRC-32)."""
    try:
        if not zipfile.is_zipfile(path):  # as torch wrote before 1.6
            return
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
    except (zipfile.BadZipFile, zlib.error, RuntimeError, EOFError, LookupError) as error:
        raise ValueError(f"damaged: {error}") from error
    if bad:
        raise ValueError(f"damaged: {bad} does not have its checksum")


def read_archive(path):
    """What torch.save wrote into `path`, without any code of its own. Raises ValueError that says what is wrong."""
    check_archive(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # unpicklers raise all there is
        if re.search(r"unsupported (global|class)|GLOBAL", str(error), flags=re.IGNORECASE):
            raise ValueError("refused, it holds more than plain tensors") from error
        raise ValueError(f"no file of torch.save, or a damaged one ({type(error).__name__})") from error


def read_weights(path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """`(tensors, metadata)` of a safetensors file, or of a plain `state_dict` written by torch.save (no metadata).

    Floating-point tensors come as float32. Raises FileNotFoundError, or ValueError naming the file, a damaged one too:
    `sha256` of the metadata is checked where it is there, the checksums of a zip file are.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such weights file")
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
            if "sha256" in metadata and metadata["sha256"] != digest(tensors, metadata):
                raise ValueError("damaged: it does not have its SHA-256")
        else:
            tensors, metadata = read_archive(path), {}
    except (SafetensorError, RuntimeError, OSError, ValueError, LookupError) as error:
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path}: not a weights file ({why})") from error
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in tensors.items()
    ):
        raise ValueError(f"{path}: expected a state_dict of tensors")
    if odd := [name for name, tensor in tensors.items() if not _is_whole(tensor)]:
        raise ValueError(
            f"{path}: the values of {odd[0]} are not there: sparse, without data, or a few that stand for many"
        )
    return {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}, metadata


def _is_whole(tensor: Tensor) -> bool:
    """Whether its values are there: not sparse, not without data, not a few that claim to be terabytes."""
    if tensor.layout != torch.strided or tensor.is_meta:
        return False
    return tensor.numel() * tensor.element_size() <= max(tensor.untyped_storage().nbytes(), 2**30)


def build(cls, path, config=None, section: str | None = None):
    """A frozen `cls` (eval mode, no gradients) with the weights in `path`, loaded strictly.

    `config` is a settings object, or a YAML file whose `section` holds the settings; left out, the file's own
    metadata says. Raises ValueError naming the file and what does not fit.
    """
    tensors, metadata = read_weights(path)
    settings = config if isinstance(config, Settings) else _settings(cls, path, metadata, config, section)
    check_tensors(_without_memory(cls, settings, path), tensors, path)
    module = cls(settings)
    module.load_state_dict(tensors)
    return module.eval().requires_grad_(False)


def _without_memory(cls, settings: Settings, path) -> nn.Module:
    """A `cls` whose tensors have shapes alone. Raises ValueError where the settings ask for more than memory holds."""
    too_large = ValueError(f"{path}: its settings ask for a network that is too large")
    try:
        with torch.device("meta"):
            module = cls(settings)
    except (RuntimeError, TypeError, OverflowError) as error:  # shapes beyond 64 bits
        raise too_large from error
    if sum(buffer.nbytes for buffer in module.buffers()) > MOST_BUFFERS:  # some are in no file
        raise too_large
    return module


def load_tensors(module: nn.Module, tensors: dict[str, Tensor], path) -> None:
    """`module.load_state_dict(tensors)`. Raises ValueError as `check_tensors` does."""
    check_tensors(module, tensors, path)
    module.load_state_dict(tensors)


def check_tensors(module: nn.Module, tensors: dict[str, Tensor], path) -> None:
    """Raises ValueError, one line that names `path` and at most three misfits, for what `module` has not, or else."""
    own = module.state_dict()
    missing = [f"missing {name}" for name in own if name not in tensors]
    unexpected = [f"unexpected {name}" for name in tensors if name not in own]
    shapes = [
        f"{name} is {tuple(tensors[name].shape)}, expected {tuple(tensor.shape)}"
        for name, tensor in own.items()
        if name in tensors and tensors[name].shape != tensor.shape
    ]
    if misfits := [misfit for turn in zip_longest(missing, unexpected, shapes) for misfit in turn if misfit]:
        raise ValueError(f"{path}: does not fit this {type(module).__name__}: {in_brief(misfits)}")


def _settings(cls, path, metadata: dict[str, str], config, section: str | None) -> Settings:
    """The settings of a `cls`, from the YAML file `config` or, left out, from the weights file's own metadata."""
    if config is None:
        if metadata.get("kind") != cls.__name__:
            found = metadata.get("kind", "no description (a plain state_dict needs config=FILE.yml)")
            raise ValueError(f"{path}: expected the weights of a {cls.__name__}, found {found}")
        source, options = path, metadata.get("config", "")
    else:
        root = pydantic.create_model("Config", __base__=Settings, **{section: (cls.Config, ...)})
        source, options = config, read_config(config, root).get(section)
        if options is None:
            raise ValueError(f"{config}: expected a section {section!r}, found none")
    try:
        return cls.Config.model_validate_json(options) if config is None else cls.Config.model_validate(options)
    except pydantic.ValidationError as error:
        raise ValueError(f"{source}: {in_brief(explain(error, cls.Config))}") from error


def file_hash(path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
