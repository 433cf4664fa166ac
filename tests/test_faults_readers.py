"""Damaged, odd and hostile files, drawn by Hypothesis, before every reader: slow, run by `make test-faults`.

A reader returns something well-formed, or raises what the scripts turn into a line (ValueError, OSError) that names the
file, within SECONDS and MEMORY, and runs nothing that a file asks for. Files are read in a forked process: a crash is a
failure too. The draws are the same at every run; ROUNDS = 10 takes ten times as long and draws further ones.
"""

import collections
import contextlib
import io
import json
import multiprocessing
import os
import pickle
import re
import resource
import signal
import struct
import sys
import traceback
import warnings
import zipfile
import zlib
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import TINY, colourful, write_config, write_pictures
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save
from tiny_networks import save as save_networks
from tiny_networks import transformer, vqgan
from training_runs import differences

import fid_score
from config import load_config
from evaluation.report import read_lines
from evaluation.sweeps import SweepConfig
from maskgit.data import admit, read_hole, read_image, read_pair
from maskgit.dataset import ImageDataset
from maskgit.folders import read_truth
from maskgit.inpainter import Inpainter
from models.checkpoint import read_weights
from models.transformer import Transformer
from photos.image_file import FORMATS, ImageFile, write_image_file
from photos.photo import read_photo, write_photo
from training.run import Run

ROUNDS = 1
SECONDS, MEMORY = 5, 400 * 2**20  # of the processor, and of what is resident, for a file of at most a megapixel
FORK = multiprocessing.get_context("fork")
RUNS = ("pickle.find_class", "os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect")  # code
pytestmark = [pytest.mark.faults, pytest.mark.skipif(sys.platform != "linux", reason="bounds by Linux's /proc")]


def often(count: int):
    return settings(max_examples=int(count * ROUNDS), derandomize=True, deadline=None, database=None)


class Worker:
    """A forked process that carries out checks, one after the other; where one ends it, another takes its place."""

    def __init__(self, room: Path):
        self.room, self.process, self.said = room, None, collections.Counter()

    def __call__(self, check, *values) -> None:
        if self.process is None:
            self.pipe, there = FORK.Pipe()
            self.process = FORK.Process(target=serve, args=(there, self.pipe), daemon=True)
            self.process.start()
            there.close()
        self.pipe.send((check, values))
        try:
            verdict = self.pipe.recv()
        except EOFError:
            self.process.join()
            verdict, self.process = f"ended by {signal.Signals(-self.process.exitcode).name}", None
        self.said[verdict if len(verdict) < 9 else "fault"] += 1
        assert verdict in ("read", "refused"), verdict
        assert not (self.room / "canary").exists()


def serve(pipe, other) -> None:
    other.close()
    warnings.simplefilter("ignore")
    admit(1)
    os.fsync = lambda descriptor: None
    most, ran = memory("VmSize") + 4 * MEMORY, None
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.addaudithook(lambda event, given: ran.append(f"{event} {given}") if ran is not None and event in RUNS else None)
    with contextlib.suppress(EOFError):
        while True:
            check, values = pipe.recv()
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
            before, ran = memory("VmRSS"), []
            signal.setitimer(signal.ITIMER_PROF, SECONDS)  # ends the process, as does the alarm where it sleeps
            signal.alarm(20 * SECONDS)
            try:
                verdict = "read" if check(*values) else "refused"
                assert not ran, ran
                taken = (memory("VmHWM") - before) / 2**20
                assert taken < MEMORY / 2**20, f"{taken:.0f} MiB"
            except BaseException:
                verdict = traceback.format_exc()
            ran = None
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.alarm(0)
            pipe.send(verdict)


def memory(what: str) -> int:
    return 1024 * int(re.search(rf"{what}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def attempt(path: Path, reader, *values, **options):
    """What a reader returns, None where it refuses, naming the file; whatever else it raises is a fault."""
    try:
        return reader(*values, **options)
    except (ValueError, OSError) as error:
        assert str(path) in str(error), f"does not name the file: {error}"


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    worker = Worker(tmp_path_factory.mktemp("room"))
    yield worker
    if worker.process:
        worker.pipe.close()
        worker.process.join()


@pytest.fixture(autouse=True)
def both(work):
    """After a test: some files were read, some refused."""
    work.said.clear()
    yield
    print(dict(work.said))
    assert work.said["fault"] or min(work.said["read"], work.said["refused"]) > 0.02 * work.said.total()


WIDE = [n for n in (0, 1, 9, 255, 999, 2**15 - 1, 2**16 - 1, 70_000, 2**31 - 1, 2**32 - 1)]
NUMBERS = [
    n.to_bytes(size, order) for order in ("little", "big") for size in (1, 2, 4, 8) for n in WIDE if n < 256**size
]
PLACES = st.integers(0, 100) | st.integers(0, 2**20)
WAYS = st.sampled_from(["flip", "put", "put", "cut", "add", "repeat", "splice", "end"])
EDITS = st.lists(
    st.tuples(WAYS, PLACES, PLACES, st.sampled_from(NUMBERS) | st.binary(min_size=1, max_size=8)), max_size=4
)


def edited(content: bytes, edits, other: bytes) -> bytes:
    for way, at, length, new in edits:
        at %= len(content) + 1
        start, past = content[:at], content[at + len(new) :]
        flipped = bytes(a ^ b for a, b in zip(content[at:], new, strict=False))
        content = {"flip": start + flipped + past, "put": start + new + past, "cut": start + content[at + length :],
                   "add": start + new + content[at:], "repeat": content[: at + length] + content[at:],
                   "splice": start + other[length % (len(other) + 1) :], "end": start}[way]  # fmt: skip
    return content


def repaired(png: bytes) -> bytes:
    """With the right checksum of every chunk."""
    parts, at = [png[:8]], 8
    while at < len(png) and png.startswith(b"\x89PNG\r\n\x1a\n"):
        body = png[at + 4 : at + 8 + int.from_bytes(png[at : at + 4])]
        parts.append(png[at : at + 4] + body + struct.pack(">I", zlib.crc32(body)))
        at += len(body) + 8
    return b"".join(parts) if at > 8 else png


# --- pictures and masks ---

EXIF = Image.Exif()
EXIF.update({0x0112: 6, 0x010F: "maker", 0x8769: {0x9000: b"0230", 0x927C: b"note"}})
DXT = [{"pixel_format": name} for name in ("DXT1", "DXT3", "DXT5", "BC2", "BC3", "BC5")]
TIFF = [{"compression": name} for name in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "zstd")]
MORE = {"PNG": [{"exif": EXIF}, {"transparency": 3}, {"transparency": (1, 2, 3)}, {"bits": 2}, {"save_all": True}],
        "TIFF": [*TIFF, {"exif": EXIF}, {"big_tiff": True}, {"save_all": True}], "TGA": [{"compression": "tga_rle"}],
        "JPEG": [{"exif": EXIF}, {"progressive": True}], "GIF": [{"transparency": 3}, {"save_all": True}],
        "DDS": DXT, "MPO": [{"save_all": True}], "ICO": [{"bitmap_format": "bmp"}], "BLP": [{"blp_version": "BLP1"}],
        "WEBP": [{"exif": EXIF}, {"lossless": True}, {"save_all": True}], "SGI": [{"bpc": 2}]}  # fmt: skip
BITS = [{"compression": name} for name in ("tiff_ccitt", "group3", "group4")]  # in other modes they crash the writer
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV", "I", "F", "I;16", "I;16B")


@lru_cache
def samples(room: Path) -> list[list[bytes]]:
    """Small files of every kind, mode and layout that Pillow writes and, PNG of 16 bits, that we write; by kind."""
    Image.init()
    kinds = collections.defaultdict(dict)
    for mode in MODES:
        with contextlib.suppress(ValueError):
            one, other = (
                Image.fromarray(pixels).convert("L" if mode[0] == "I" else "RGB") for pixels in colourful(2, 19)
            )
            one, other = ((p.convert("I") if mode[0] == "I" else p).convert(mode) for p in (one, other))
            for kind in sorted(Image.SAVE.keys() - ({"ICNS"} if mode != "1" else set())):
                for option in [{}, *MORE.get(kind, []), *BITS * (mode == "1" and kind == "TIFF")]:
                    with contextlib.suppress(Exception):
                        one.save(stream := io.BytesIO(), kind, append_images=[other], **option)
                        kinds[kind] |= {stream.getvalue(): None} if len(stream.getvalue()) < 30_000 else {}
    for mode, channels in (("LA;16", 2), ("RGB;16", 3), ("RGBA;16", 4)):
        deep = np.random.default_rng(0).integers(2**16, size=(9, 7, channels), dtype=np.uint16)
        write_image_file(room / "deep.png", ImageFile("deep", mode, deep, orientation=5))
        kinds["deep"][(room / "deep.png").read_bytes()] = None
    return [list(files) for files in kinds.values() if files]


def check_picture(path: Path, suffix: str) -> bool:
    pixels, hole = attempt(path, read_image, path), attempt(path, read_hole, path)
    photo = attempt(path, read_photo, path, box=(0, 0, 1, 1))
    for found in (found for found in (pixels, photo and photo.pixels) if found is not None):
        assert found.dtype == np.uint8 and found.shape[2:] == (3,) and 0 < found.size <= 3e6
        assert hole.dtype == bool and hole.shape == found.shape[:2]
    if pixels is not None:
        square, smaller = read_pair(path, path, 16)
        assert (square.shape, square.dtype, smaller.shape, smaller.dtype) == ((16, 16, 3), np.uint8, (16, 16), bool)
        kept = ImageDataset([path], 1, windows="random").maps[0].movedim(0, 2)
        assert np.array_equal(kept, pixels)
    if photo is not None:
        assert np.abs(photo.pixels - pixels.astype(int)).max() <= 1
        out = path.with_suffix(suffix)
        if attempt(out, write_photo, out, photo, 255 - photo.pixels) is not None and "j" not in suffix:
            again = read_photo(out, box=(0, 0, 1, 1))
            assert ((again.pixels == photo.pixels).all(axis=2) | photo.hole).all()
    return photo is not None


@often(5000)
@given(st.tuples(*[st.integers(0, 10**6)] * 4), EDITS, st.booleans(), st.sampled_from(sorted(FORMATS)))
def test_pictures(work, which, edits, repair, suffix):
    kinds = samples(work.room)
    one, other = ((kind := kinds[i % len(kinds)])[j % len(kind)] for i, j in (which[:2], which[2:]))
    content = edited(one, edits, other)
    (work.room / "in").mkdir(exist_ok=True)
    (work.room / "in" / "picture.png").write_bytes(repaired(content) if repair else content)
    work(check_picture, work.room / "in" / "picture.png", suffix)


# --- configs, tables, arrays, weights, checkpoints ---

TRUTH = torch.zeros(1, 3, 2, 2, dtype=torch.uint8)
SWEEP = """
data: {truth: TRUTH, masks: {walk: MASKS}, generated: [thick]}
rows: [{name: one, kind: telea}, {name: two, kind: inpainting, checkpoint: A, decoding: {total_iter: 1}}]
judge: {lpips_weights: FILE}
"""
ROW = 'method,family,seed,n,key,psnr,settings\na,b,1,2,k,3.5,"{""kind"": ""telea"", ""a"": [[1]]}"\n'
TAGS = ["int", "float", "bool", "null", "timestamp", "binary", "set", "omap", "pairs", "python/object/apply:os.system"]
WORDS = [*"ab&*{}[],?|>'\"#~-1:\n\t\0", "&a ", "*a", "<<: *a", "\na: ", "\n- ", "base: ", "---\n", "%YAML 1.1\n", "256"]
WORDS += [
    "2001-01-01",
    "1e9",
    ".inf",
    "9" * 5000,
    "x" * 140_000,
    "[" * 100_000,
    "\u0663",
    *(f"!!{tag} " for tag in TAGS),
]
LEAVES = (
    st.none() | st.booleans() | st.sampled_from([0, -1, 3, 32, 10**5, 10**9, 2**63, 10**400]) | st.floats() | st.text()
)
VALUES = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner))
CHANGES = st.lists(st.tuples(st.lists(st.integers(0, 40), min_size=1, max_size=4), VALUES), max_size=2)
TENSORS = [torch.clone, torch.Tensor.double, torch.Tensor.bfloat16, torch.Tensor.int, torch.ravel, lambda t: t[:1],
           lambda t: t.to(torch.float8_e4m3fn), torch.Tensor.cfloat, torch.Tensor.to_sparse, lambda t: t.to("meta"),
           lambda t: torch.zeros(1).half().expand(10**6, 10**6)]  # fmt: skip


def a_run(folder: Path) -> Run:
    model, settings = transformer(), load_config(folder.parent / "tiny.yml").transformer_training
    return Run("transformer", folder, settings, 8, model, {"adam": torch.optim.Adam(model.parameters())})


def step(run: Run) -> dict:
    run.model(torch.zeros(1, 16, dtype=torch.long)).sum().backward()
    run.optimizers["adam"].step()
    return {"step": run.step}


def resumed(path: Path) -> dict:
    run = a_run(path.parent)
    run.resume()
    assert type(run.step) is int and 0 <= run.step <= run.steps and type(run.best) in (int, float), (run.step, run.best)
    try:
        return step(run)
    except Exception as error:
        raise AssertionError("resumed, and cannot go on") from error


def images(path: Path) -> torch.Tensor:
    found = read_truth(path)
    assert found.dtype == torch.uint8 and found.ndim == 4 and found.shape[1] == 3
    return found


def moments(path: Path) -> tuple:
    found = fid_score.truth_moments(TRUTH, "", path.parent, None)
    assert [(part.dtype, part.ndim) for part in found] == [(float, 1), (float, 2)], "no moments"
    return tuple(map(torch.from_numpy, found))


def tensors(path: Path) -> tuple:
    found, notes = read_weights(path)
    assert all(tensor.dtype == torch.float32 for tensor in found.values() if tensor.is_floating_point())
    return (found, notes) if path.suffix == ".pt" or "sha256" in notes else ()


READERS = {
    "config.yml": lambda path: load_config(path).model_dump(),
    "sweep.yml": lambda path: load_config(path, root=SweepConfig).model_dump(),
    "rows.csv": lambda path: list(map(vars, read_lines(path))),
    "truth.csv": images,
    "truth.npz": images,
    "moments.npz": moments,
    "manifest.json": lambda path: fid_score.find_paths(None, None, path.parent),
    "weights.pt": tensors,
    "weights.safetensors": tensors,
    "transformer.pt": lambda path: Transformer.load(path, transformer().config).state_dict(),
    "vqgan.safetensors": lambda path: vars(Inpainter.from_pretrained(path.parent, "cpu")),
    "transformer.safetensors": lambda path: vars(Inpainter.from_pretrained(path.parent, "cpu")),
    "transformer_last.pt": resumed,
}


class Trap:
    """Pickled, it asks for a call."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


def packed(write, *values, **options) -> bytes:
    write(stream := io.BytesIO(), *values, **options)
    return stream.getvalue()


@lru_cache
def sound(room: Path, key: str) -> tuple[Path, list[bytes]]:
    """Where a file lies, and what may be in it: the first is sound, the last ones are traps."""
    torch.manual_seed(0)
    path = room / key.replace(".", "_") / key
    path.parent.mkdir()
    write_config(room)
    touch, canary = f"touch {room / 'canary'}", room / "canary"
    inner = pickle.dumps(Trap(os.system, (touch,)))
    calls = [(os.system, (touch,)), (exec, (f"open({str(canary)!r}, 'w')",)), (Path.touch, (canary,)),
             (pickle.loads, (inner,)), (torch.storage._load_from_bytes, (inner,)), (getattr, (canary, "touch")),
             (torch.Size, ((10**9, 10**9),))]  # fmt: skip
    traps = [Trap(*call) for call in calls]
    if key == "moments.npz":
        made = type("Moments", (), {"mean": np.arange(3.0), "covariance": np.eye(3)})
        fid_score.truth_moments(TRUTH, "", path.parent, lambda: made)
        (path,) = path.parent.iterdir()
    elif key == "transformer_last.pt":
        run = a_run(path.parent)
        run.step = step(run)["step"] + 1
        run.save()
    elif key == "manifest.json":
        write_pictures(path.parent / "test_results", 1)
        path.write_text(json.dumps({"truth": "truth", "predicted": None, "results": ["image_000.png"]}))
    elif path.suffix in (".yml", ".csv"):
        text = {
            "config.yml": TINY,
            "sweep.yml": SWEEP,
            "rows.csv": ROW,
            "truth.csv": "\n".join([",".join(["7"] * 12)] * 3),
        }
        path.write_text(text[key])
    elif path.suffix != ".npz":
        save_networks(path.parent, vqgan(), transformer())
    pixels, state = colourful(3, 5), transformer().state_dict()
    files = [path.read_bytes()] if path.exists() else []
    if path.suffix == ".npz":
        files += [packed(np.savez, images=pixels), packed(np.savez_compressed, images=pixels), packed(np.save, pixels)]
        files += [packed(np.savez, images=array) for array in (pixels.astype(int), pixels.T, pixels[:0], pixels[0])]
        files += [packed(np.savez, images=np.array([trap], dtype=object)) for trap in traps] + [inner]
    elif key == "weights.safetensors":
        files += [(path.parent / "vqgan.safetensors").read_bytes(), save(state)]
    elif path.suffix == ".pt":
        for new in (True, False):
            values = [state] * (not files or not new) + [{"a": trap} for trap in traps]
            files += [
                packed(lambda f, v, n: torch.save(v, f, _use_new_zipfile_serialization=n), v, new) for v in values
            ]
        files += [pickle.dumps(trap) for trap in traps]
    (path.parent / "sound").mkdir()
    (path.parent / "sound" / path.name).write_bytes(files[0])
    return path, files


def changed(value, changes, way, which: int):
    """Nested values with others in some places, and one of its tensors made another."""
    for where, new in changes:
        place = value
        for number, turn in enumerate(where, start=1):
            key = sorted(place, key=str)[turn % len(place)] if isinstance(place, dict) else turn % len(place)
            if number == len(where) or not isinstance(place[key], dict | list) or not place[key]:
                place[key] = new
                break
            place = place[key]
    keys = [key for key, item in value.items() if isinstance(item, torch.Tensor)] if isinstance(value, dict) else []
    return value | {keys[which % len(keys)]: way(value[keys[which % len(keys)]])} if keys else value


def remade(path: Path, content: bytes, changes, way, which: int) -> bytes:
    """A sound file with other values in it, and the right checksums."""
    if path.suffix in (".yml", ".json"):
        value = changed(yaml.safe_load(content), changes, way, which)
        return (yaml.safe_dump(value) if path.suffix == ".yml" else json.dumps(value)).encode()
    if path.suffix == ".pt":
        return packed(lambda f: torch.save(changed(torch.load(io.BytesIO(content)), changes, way, which), f))
    found, notes = read_weights(path.parent / "sound" / path.name)
    found = changed(found, [], way, which)
    if any(t.layout is not torch.strided or t.is_meta or t.numel() > 10**6 for t in found.values()):
        return content
    config = changed(json.loads(notes["config"]), changes, way, which)
    notes = {key: note for key, note in notes.items() if key != "sha256"}  # as in older files
    return save(found, notes | {"config": json.dumps(config)})


def zipped(content: bytes, edits) -> bytes:
    """A zip file whose members (of weights the pickle alone) are edited, with the right checksums."""
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(out := io.BytesIO(), "w") as new:
        for name in old.namelist():
            part = old.read(name)
            new.writestr(name, edited(part, edits, part) if name.endswith((".pkl", ".npy")) else part)
    return out.getvalue()


def check_file(key: str, path: Path, same: bool) -> bool:
    found = attempt(path.parent, READERS[key], path)
    if found is not None and same:
        assert (isinstance(found, tuple) and not found) or not differences(
            found, READERS[key](path.parent / "sound" / path.name)
        )
    return found is not None


@pytest.mark.parametrize("key", READERS)
@often(700)
@given(st.integers(0, 1) | st.integers(0, 30), st.sampled_from(["values", "inside", "bytes", "words"]), EDITS, CHANGES,
       st.sampled_from(TENSORS), st.integers(0, 99), st.lists(st.sampled_from(WORDS), max_size=8))  # fmt: skip
@example(0, "words", [], [], torch.clone, 99, ["\nb: !!bool x\n"])
def test_files(work, key, which, where, edits, changes, way, place, words):
    path, files = sound(work.room, key)
    which %= len(files)
    content = files[which]
    inside = where == "inside" and zipfile.is_zipfile(io.BytesIO(content))
    values = where == "values" and which == 0 and path.suffix not in (".csv", ".npz")
    if values:
        content = remade(path, content, changes, way, place)
    elif where == "words" and path.suffix in (".yml", ".csv", ".json"):
        at = place * len(content) // 50  # often at the end
        content = content[:at] + "".join(words).encode() + content[at:]
    else:
        content = zipped(content, edits) if inside else edited(content, edits, content)
    path.write_bytes(content)
    checksums = key in ("truth.npz", "moments.npz", "weights.pt", "weights.safetensors") and which == 0
    damage = not inside and not values and all(edit[0] in ("flip", "put") for edit in edits)
    work(check_file, key, path, checksums and damage)
