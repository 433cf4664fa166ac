"""What processes that are killed at random moments leave: slow, run by `make test-faults`.

After every kill what lies under a final name must be whole, and the training or the filling that goes on must end
bit-equal to one that was never killed.
"""

import itertools
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_pictures
from PIL import Image
from tiny_networks import save, transformer, vqgan
from training_runs import checkpoint, differences, train

from models.checkpoint import read_weights
from utils import ROOT

pytestmark = pytest.mark.faults
KILLS = 12  # of each training, and of each way to fill
LINE = {"vqgan": "training_vqgan.py", "transformer": "training_transformer.py"}


def start(*command) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *map(str, command)], cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
    )


def kill_after(process: subprocess.Popen, sign: bytes, seconds: float) -> bool:
    """Kills it so many seconds after it has said `sign` on standard error; whether it was still at work."""
    said = b""
    while sign not in said and (part := process.stderr.read1()):
        said = said[-len(sign) :] + part
    time.sleep(seconds)
    alive = process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return alive


def half_written(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.suffix == ".tmp"]


@pytest.mark.parametrize("stage", ["vqgan", "transformer", "finetuning"])
def test_a_training_killed_at_any_moment_goes_on_to_the_same_end(tmp_path, trained, stage):
    rng, name = random.Random(stage), "transformer" if stage == "transformer" else "vqgan"
    arguments = [f"--{name}_training.save_every", "1", "--epochs", "40", f"--{name}_training.validate_every", "2"]
    if stage == "transformer":
        arguments += ["--vqgan", str(trained[0] / "vqgan.safetensors")]
    if stage == "finetuning":
        arguments += [
            "--vqgan_training.init",
            str(trained[0] / "vqgan.safetensors"),
            "--vqgan.decoder.known_width",
            "8",
        ]
        arguments += ["--vqgan_training.holes", "{walk: 1}"]
        arguments += ["--vqgan_training.guesses.transformer", str(trained[0] / "transformer.safetensors")]
    reference = train(name, trained[1], tmp_path / "whole", *arguments)
    out, kills = tmp_path / "killed", 0
    command = [LINE[name], "--config", trained[1], "--out", out, "--device", "cpu", *arguments]
    while kills < KILLS:
        resumed = ["--resume"] if any(out.glob(f"{name}_*.pt")) else []  # after a kill it may be the former one alone
        alive = kill_after(start(*command, *resumed), b"step/s", rng.uniform(0, 0.4))
        kills += alive
        for path in out.glob("*.safetensors"):
            read_weights(path)
        if (out / f"{name}_last.pt").exists():
            step = checkpoint(out, name)["step"]
            assert 1 <= step <= 80
            if step == 80:  # it is done: from the beginning again, so that every kill hits a training at work
                assert differences(checkpoint(out, name), checkpoint(reference, name)) == []
                for path in out.glob(f"{name}*"):
                    path.unlink()
        elif not alive and not any(out.glob(f"{name}_*.pt")):
            pytest.fail("it ended by itself before the first checkpoint")
    train(name, trained[1], out, *arguments, *(["--resume"] if any(out.glob(f"{name}_*.pt")) else []))
    assert differences(checkpoint(out, name), checkpoint(reference, name)) == []
    one, other = (read_weights(folder / f"{name}.safetensors")[0] for folder in (out, reference))
    assert one.keys() == other.keys() and all(torch.equal(tensor, other[key]) for key, tensor in one.items())
    assert half_written(out) == []


def whole(path: Path) -> None:
    with Image.open(path) as picture:
        picture.load()


def test_folders_filled_under_kills_hold_whole_pictures_and_end_the_same(tmp_path):
    torch.manual_seed(0)
    rng, model = random.Random(1), save(tmp_path / "model", vqgan(), transformer())
    images, masks = write_pictures(tmp_path / "images", 300), tmp_path / "masks"
    masks.mkdir()
    for index in range(300):
        known = np.full((16, 16), 255, np.uint8)
        known[2 : 3 + index % 11, 4:13] = 0
        Image.fromarray(known).save(masks / f"mask_{index:03}.png")
    command = ["inpainting.py", "--test-maskedimage-path", images, "--test-mask-path", masks, "--checkpoint", model]
    command += ["--device", "cpu", "--samples", "2"]
    assert start(*command, "--out", tmp_path / "whole").wait() == 0
    out, kills = tmp_path / "killed", 0
    for _ in range(4 * KILLS):
        kills += kill_after(start(*command, "--out", out), b"image/s", rng.uniform(0, 1.5))
        for path in out.rglob("*.png"):
            whole(path)
        if kills == KILLS:
            break
    assert kills == KILLS and start(*command, "--out", out).wait() == 0 and half_written(out) == []
    for path in (tmp_path / "whole").rglob("*.png"):
        assert (out / path.relative_to(tmp_path / "whole")).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_an_older_result_is_there_until_the_new_one_is(tmp_path, suffix):
    torch.manual_seed(0)
    rng, model = random.Random(2), save(tmp_path / "model", vqgan(), transformer())
    noise = np.random.default_rng(0).integers(256, size=(2000, 2000, 3), dtype=np.uint8)  # slow to write
    Image.fromarray(noise).save(tmp_path / "photo.png", compress_level=1)
    target = tmp_path / "out" / f"target.{suffix}"
    target.parent.mkdir()
    command = ["inpainting.py", "--image", tmp_path / "photo.png", "--box", "900,900,40,40", "--checkpoint", model]
    command += ["--device", "cpu", "--out", target]
    assert start(*command).wait() == 0
    new, kills = target.read_bytes(), 0
    for number in itertools.count():
        Image.new("RGB", (5, 5), (number % 256, 0, 0)).save(target)
        old = target.read_bytes()
        process = start(*command)
        begun = time.monotonic()
        while not half_written(target.parent) and process.poll() is None and time.monotonic() < begun + 120:
            time.sleep(0.001)
        kills += kill_after(process, b"", rng.uniform(0, 0.1))
        assert target.read_bytes() in (old, new)
        if kills >= KILLS // 2:
            break
    assert start(*command).wait() == 0
    assert target.read_bytes() == new and list(target.parent.iterdir()) == [target]
