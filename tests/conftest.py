"""What all tests share: one thread, no network, generated pictures and the settings of a tiny experiment."""

import ipaddress
import logging
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

torch.set_num_threads(1)

TINY = """
data: {train: TRAIN, val: VAL, workers: 1}
vqgan:  # 16 pixels, 4 a token's side: 16 tokens
  image_size: 16
  latent: 8
  norm_groups: 4
  encoder: {kind: patch, stem: 16, widths: [16], blocks: 1}
  decoder: {widths: [16, 8], blocks: 1, upsample_after: [0, 1]}
  codebook: {codes: 16, dim: 4, l2_normalised: true, ema_decay: 0.9, reseed_below: 0.1}
vqgan_training:
  epochs: 2
  batch_size: 4
  learning_rate: 0.002
  precision: float32
  perceptual: {weight: 0}
  adversarial: {weight: 0.1, start: 1, width: 8, layers: 1}
transformer: {codes: 16, tokens: 16, width: 16, depth: 1, heads: 2, mlp_width: 32, dropout: 0.0, attention_dropout: 0.0,
              norm: pre, positions: rotary, tied: false, position_bias: false}
transformer_training: {epochs: 2, batch_size: 4, learning_rate: 0.002, precision: float32}
decoding: {total_iter: 2, sweet_spot: 2}
"""


def _is_remote(host: str | None) -> bool:
    try:
        return not ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host not in (None, "", "localhost")


def _guarded(connect):
    """`connect` of a socket, for addresses of this machine only."""

    def local_only(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and _is_remote(address[0]):
            raise ConnectionRefusedError(f"tests use no network, found a connection to {address}")
        return connect(self, address)

    return local_only


def _local_names(host, *args, original=socket.getaddrinfo, **kwargs):
    """Addresses as they are, names of this machine only: a name server is network too."""
    if _is_remote(host) and any(character.isalpha() for character in host):
        raise socket.gaierror(f"tests use no network, found a look-up of {host}")
    return original(host, *args, **kwargs)


@pytest.fixture(autouse=True, scope="session")
def no_network():
    """Connections and look-ups that leave this machine are refused, as on a machine without network."""
    patch = pytest.MonkeyPatch()
    patch.setattr(socket.socket, "connect", _guarded(socket.socket.connect))
    patch.setattr(socket.socket, "connect_ex", _guarded(socket.socket.connect_ex))
    patch.setattr(socket, "getaddrinfo", _local_names)
    yield
    patch.undo()


def colourful(count: int, size: int = 16, seed: int = 0) -> np.ndarray:
    """uint8 (count, size, size, 3): two colours that blend along a random direction, and a box of a third."""
    rng = np.random.default_rng(seed)
    ramp = np.linspace(0, 1, size)
    images = np.empty((count, size, size, 3))
    for image in images:
        first, second, third = rng.uniform(0, 255, (3, 3))
        share = rng.uniform()
        blend = (share * ramp[:, None] + (1 - share) * ramp[None, :])[..., None]
        image[:] = (1 - blend) * first + blend * second
        top, left = rng.integers(size // 2, size=2)
        image[top : top + size // 2, left : left + size // 3] = third
    return images.round().astype(np.uint8)


@pytest.fixture
def pixels() -> np.ndarray:
    return colourful(1)[0]  # (16, 16, 3)


def save_picture(path, picture, **options):
    """Writes an array or a Pillow image; returns the path."""
    picture = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    picture.save(path, **options)
    return path


def write_pictures(folder: Path, count: int, size: int = 16, seed: int = 0) -> Path:
    """`count` colourful PNG files image_000.png, ... in `folder`, which is made and returned."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, pixels in enumerate(colourful(count, size, seed)):
        Image.fromarray(pixels).save(folder / f"image_{index:03}.png")
    return folder


def write_config(folder: Path) -> Path:
    """tiny.yml in `folder`, beside its generated pictures: 8 in train/, 4 in val/."""
    values = yaml.safe_load(TINY)
    values["data"] |= {
        "train": str(write_pictures(folder / "train", 8)),
        "val": str(write_pictures(folder / "val", 4, seed=1)),
    }
    path = folder / "tiny.yml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture
def pictures(tmp_path) -> Path:
    """A folder of 8 colourful pictures of 16x16 pixels, image_000.png to image_007.png."""
    return write_pictures(tmp_path / "pictures", 8)


@pytest.fixture
def tiny_config(tmp_path) -> Path:
    """A config file of tiny networks whose data are generated pictures (8 to train on, 4 to validate on)."""
    return write_config(tmp_path)


@pytest.fixture(scope="session")
def tiny_config_once(tmp_path_factory) -> Path:
    """`tiny_config`, made once for all tests: for those that write elsewhere."""
    return write_config(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The folder of a run of both stages, 5 epochs each (10 steps, GAN after 2); tests only read it."""
    from training_runs import STAGES, train  # the scripts take seconds to import, and few tests need them

    config = write_config(tmp_path_factory.mktemp("data"))
    out = tmp_path_factory.mktemp("trained")
    schedule = ["warmup 1", "milestones [3,4]", "gamma 0.5"]
    for stage in STAGES:
        overrides = [part for line in schedule for part in f"--{stage}_training.{line}".split()]
        train(stage, config, out, "--epochs", "5", *overrides)
    return out, config


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    """Folders with a tiny random VQGAN of each encoder and a transformer."""
    from tiny_networks import CONV, PATCH, save, transformer, vqgan

    torch.manual_seed(1)
    root = tmp_path_factory.mktemp("checkpoints")
    return {kind: save(root / kind, vqgan(enc), transformer()) for kind, enc in (("patch", PATCH), ("conv", CONV))}


@pytest.fixture(scope="session")
def checkpoint(checkpoints) -> Path:
    return checkpoints["patch"]


@pytest.fixture(scope="session")
def inpainters(checkpoints) -> dict:
    """The Inpainters of `checkpoints`."""
    from maskgit.inpainter import Inpainter

    return {kind: Inpainter.from_pretrained(folder, "cpu") for kind, folder in checkpoints.items()}


@pytest.fixture(scope="session", params=["patch", "conv"])
def inpainter(request, inpainters):
    return inpainters[request.param]


@pytest.fixture(autouse=True)
def no_handler_left_behind():
    """A command line logs to standard output, which pytest closes after each test."""
    yield
    for handler in [handler for handler in logging.root.handlers if type(handler) is logging.StreamHandler]:
        logging.root.removeHandler(handler)
