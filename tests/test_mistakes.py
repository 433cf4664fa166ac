"""What a user gets wrong, on every command line: one line that names the file or the flag, and an exit status.

0: done; 1: some inputs failed, the others are done; 2: a usage that is refused, or a whole run. A row's command is run
in a folder that has all that is right; its `setup` breaks some of it.
"""

import importlib
import os
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import yaml
from conftest import colourful, write_config, write_pictures
from PIL import Image
from safetensors.torch import save_file
from tiny_networks import SIZE, save, transformer, vqgan

from config import load_config
from interrupts import run_script
from maskgit import data
from models.checkpoint import save_weights
from models.vqgan import VQGAN
from utils import ROOT

# --- what is broken ---

Setup = Callable[[Path], object]  # of the folder that a command is run in


def write(name: str, content: str | bytes = b"") -> Setup:
    return lambda folder: place(folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def place(path: Path) -> Path:
    path.parent.mkdir(exist_ok=True)
    return path


def picture(name: str, size: tuple[int, int] = (SIZE, SIZE), colour: int = 255, mode: str = "L") -> Setup:
    return lambda folder: Image.new(mode, size, colour).save(place(folder / name))


def cut(name: str, length: int = 100) -> Setup:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:length])


def move(name: str, other: str) -> Setup:
    return lambda folder: (folder / name).replace(folder / other)


def copy(name: str, other: str) -> Setup:
    return lambda folder: shutil.copy(folder / name, folder / other)


def remove(name: str) -> Setup:
    return lambda folder: (folder / name).unlink()


def link(name: str, target: str) -> Setup:
    return lambda folder: (folder / name).symlink_to(folder / target)


def pipe(name: str) -> Setup:
    return lambda folder: os.mkfifo(folder / name)


def subfolder(name: str) -> Setup:
    return lambda folder: (folder / name).mkdir()


def read_only(name: str) -> Setup:
    def setup(folder: Path) -> None:
        (folder / name).mkdir(mode=0o555)
        if os.access(folder / name, os.W_OK):
            pytest.skip("root may write everywhere")

    return setup


def claiming(name: str, width: int, height: int) -> Setup:
    """A PNG of a hundred bytes whose header says that it is so large."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return write(name, b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b""))


def archive(name: str, images: np.ndarray) -> Setup:
    return lambda folder: np.savez(folder / name, images=images)


def saved(name: str, value: object) -> Setup:
    return lambda folder: torch.save(value, place(folder / name))


def weights(name: str, **notes: str) -> Setup:
    return lambda folder: save_file({"a": torch.zeros(2)}, folder / name, notes)


def changed(section: str, **values: object) -> Setup:
    """sweep.yml with other values in a section."""

    def setup(folder: Path) -> None:
        config = yaml.safe_load((folder / "sweep.yml").read_text())
        config[section] |= values
        (folder / "sweep.yml").write_text(yaml.safe_dump(config))

    return setup


# --- the table ---


class Row(NamedTuple):
    name: str
    command: str
    message: str  # the last line of standard error, of one that is done of standard output; ...: a library's own words
    code: int = 2
    setup: tuple[Setup, ...] = ()


CATS = "inpainting.py --checkpoint model --device cpu --out out"
PHOTO = f"{CATS} --image photo.png"
MASKED = f"{PHOTO} --mask mask.png"
PHOTOS = f"{CATS} --image images --mask masks"
LAB = f"{CATS} --test-maskedimage-path images --test-mask-path masks --num-workers 1"
TRUTH = f"{LAB} --gtcsv-path truth"
MASKS = "make_masks.py --count 1 --out out"
SCORE = "fid_score.py --predicted-path images --gtcsv-path images --no-cache --device cpu"
SWEEP = "sweep.py --config sweep.yml --out out --device cpu"
REPORT = "sweep.py --config sweep.yml --out out --report"
VQGAN_RUN = "training_vqgan.py --config tiny.yml --out out --device cpu"
OTHER = "training_vqgan.py --config other.yml --out out --device cpu"
STAGE_2 = "training_transformer.py --config tiny.yml --out stage1 --device cpu"
SPEED = "benchmark.py --device cpu --json out.json"
PAGE = "demo.py --device cpu --checkpoint model"
PETS = "make_cats.py --downloads downloads --out out"

NO_IMAGE = "cannot be read as an image"
PAIR = "expected a mask of each image's name or number; alone are"
HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(200)
STATE = {"step": 1, "best": 0.5, "steps_an_epoch": 3}  # what a checkpoint has beside networks and optimizers
LINES = "method,family,seed,n,key,psnr,settings\n"
KNOWN = "known are: data, vqgan, transformer, vqgan_training, transformer_training, decoding"

FLAGS = [
    Row("no iteration", f"{CATS} --total-iter 0",
        "error: total_iter: expected a whole number from 1, or auto, found 0"),
    Row("a sweet spot after the end", f"{CATS} --sweet-spot 5",
        "error: sweet_spot = 5 must be at most total_iter = 4"),
    Row("a temperature that is no number", f"{CATS} --temperature nan",
        "error: temperature: Input should be a finite number, found nan"),
    Row("an infinite temperature", f"{CATS} --sampling-temperature inf",
        "error: sampling_temperature: Input should be a finite number, found inf"),
    Row("a negative temperature", f"{CATS} --temperature -1",
        "error: temperature: Input should be greater than or equal to 0, found -1.0"),
    Row("a temperature in words", f"{CATS} --temperature warm",
        "error: argument --temperature: invalid float value: 'warm'"),
    Row("fewer codes than none", f"{CATS} --top-k -1",
        "error: top_k: Input should be greater than or equal to 0, found -1"),
    Row("a second look at everything", f"{CATS} --second-look 1",
        "error: second_look: Input should be less than 1, found 1.0"),
    Row("an unknown schedule", f"{CATS} --mask-func exponential",
        "error: argument --mask-func/--mask_func: invalid choice: 'exponential' (choose from ...)"),
    Row("an unknown precision", f"{CATS} --precision int8",
        "error: argument --precision: invalid choice: 'int8' (choose from ...)"),
    Row("an unknown device", f"{CATS} --device toaster",
        "error: --device toaster: expected auto, cpu, cuda or cuda:N"),
    Row("a device that is not there", f"{CATS} --device cuda:99",
        "error: --device cuda:99: this machine has ... CUDA devices"),
    Row("no sample", f"{CATS} --samples 0",
        "error: argument --samples: expected a whole number of at least 1, found '0'"),
    Row("half a sample", f"{CATS} --samples 1.5",
        "error: argument --samples: expected a whole number of at least 1, found '1.5'"),
    Row("an empty batch", f"{CATS} --batch-size 0",
        "error: argument --batch-size/--batch_size: expected a whole number of at least 1, found '0'"),
    Row("a batch beyond counting", f"{CATS} --batch-size 98765432109876543210",
        "error: argument --batch-size/--batch_size: expected a whole number of at least 1, found "
        "'98765432109876543210'"),
    Row("a negative seed", f"{CATS} --seed -1",
        "error: argument --seed: expected a whole number of at least 0, found '-1'"),
    Row("a negative margin", f"{CATS} --margin -1",
        "error: argument --margin: expected a whole number of at least 0, found '-1'"),
    Row("fewer threads than none", f"{LAB} --num-workers -1",
        "error: argument --num-workers/--num_workers: expected a whole number of at least 0, found '-1'"),
    Row("an unknown flag", f"{CATS} --colour red", "error: unrecognized arguments: --colour red"),
    Row("a flag without its value", f"{CATS} --predicted-path",
        "error: argument --predicted-path/--predicted_path: expected one argument"),
    Row("a flag of another mode", f"{MASKED} --grids 6", "error: --grids: would do nothing with --image"),
    Row("a flag of another tiling", f"{MASKED} --tiling windows --context 3",
        "error: --context: would do nothing with --tiling windows"),
    Row("two modes", f"{PHOTO} --test-maskedimage-path images",
        "error: --image and --test-maskedimage-path exclude each other"),
    Row("a mask of no picture", f"{CATS} --mask mask.png",
        "error: --mask, --hole-color and --box tell the hole of --image, which is missing"),
    Row("masks without images", f"{CATS} --test-mask-path masks",
        "error: --test-maskedimage-path and --test-mask-path go together"),
    Row("two sources of a hole", f"{MASKED} --box 1,2,3,4", "error: argument --box: not allowed with argument --mask"),
    Row("a box of three numbers", f"{PHOTO} --box 1,2,3",
        "error: argument --box: expected 4 integers with commas between, found 1,2,3"),
    Row("a colour in words", f"{PHOTO} --hole-color red",
        "error: argument --hole-color/--hole_color: expected 3 integers with commas between, found red"),
    Row("a context that is no number", f"{MASKED} --context nan",
        "error: argument --context: expected a number of at least 1, found 'nan'"),
    Row("no megapixels", f"{MASKED} --max-megapixels 0",
        "error: argument --max-megapixels/--max_megapixels: expected a number of at least 1e-06, found '0'"),
    Row("infinite megapixels", f"{MASKED} --max-megapixels inf",
        "error: argument --max-megapixels/--max_megapixels: expected a number of at least 1e-06, found 'inf'"),
    Row("a colour beyond white", f"{PHOTO} --hole-color 0,0,300",
        "error: argument --hole-color/--hole_color: expected integers, 0 to 255, found 0,0,300"),
    Row("iterations of another kind", f"{MASKED} --total-iter many",
        "error: argument --total-iter/--total_iter: expected a whole number or auto, found 'many'"),
    Row("a temperature beyond float32", f"{MASKED} --temperature 1e300",
        "error: temperature: Input should be less than or equal to 1000000, found 1e+300"),
    Row("more rings than tokens", f"{MASKED} --margin 99999999999", "photo.png -> out/photo.png", 0),
    Row("a picture that is not there, its masks in a folder", f"{CATS} --image gone.png --mask masks",
        "error: gone.png: no such picture or folder"),
    Row("a result below a file", f"{MASKED} --out mask.png/x.png",
        "error: --out mask.png: mask.png is a file, expected a folder"),
    Row("LPIPS of one sample", f"{CATS} --lpips-weights alex.pth",
        "error: --lpips-weights measures how several completions differ: give --samples too"),
    Row("LPIPS without its file", f"{CATS} --samples 2 --lpips-weights gone.pth",
        "error: gone.pth: no such weights file"),
]  # fmt: skip

PICTURES = [
    Row("a picture that is not there", f"{CATS} --image gone.png --mask mask.png",
        f"error: gone.png: {NO_IMAGE} ([Errno 2] No such file or directory: 'gone.png')", 1),
    Row("an empty file", MASKED, f"error: photo.png: {NO_IMAGE} (cannot identify image file 'photo.png')", 1,
        (write("photo.png"),)),
    Row("half a picture", MASKED, f"error: photo.png: {NO_IMAGE} (image file is truncated...)", 1, (cut("photo.png"),)),
    Row("a text as a mask", MASKED, f"error: mask.png: {NO_IMAGE} (cannot identify image file 'mask.png')", 1,
        (write("mask.png", "a hole"),)),
    Row("a picture that claims too much", MASKED,
        f"error: photo.png: {NO_IMAGE} (120 megapixels, at most 100 are read; inpainting.py --image has "
        "--max-megapixels)", 1, (claiming("photo.png", 12000, 10000),)),
    Row("a pipe as a picture", f"{CATS} --image pipe.png --mask mask.png",
        f"error: pipe.png: {NO_IMAGE} (not a file)", 1, (pipe("pipe.png"),)),
    Row("a pipe as a mask", f"{PHOTO} --mask pipe.png", f"error: pipe.png: {NO_IMAGE} (not a file)", 1,
        (pipe("pipe.png"),)),
    Row("a folder that is called like a picture", f"{CATS} --image folder.png --mask mask.png",
        "error: folder.png and its mask mask.png: expected two files or two folders", 2, (subfolder("folder.png"),)),
    Row("a phone's picture without its reader", f"{CATS} --image phone.heic --mask mask.png",
        f"error: phone.heic: {NO_IMAGE} (a HEIC file: pip install pillow-heif, or save it as PNG)", 1,
        (write("phone.heic", HEIC),)),
    Row("a picture of floats", f"{CATS} --image photo.tif --mask mask.png",
        "error: photo.tif: a picture of Pillow's mode F, expected one of 1, L, LA, P, RGB, RGBA, CMYK, I;16", 1,
        (picture("photo.tif", mode="F"),)),
    Row("no hole told", PHOTO,
        "error: photo.png: no hole: expected a mask, a hole colour, a box or a transparent part", 1),
    Row("a colour that is nowhere", f"{PHOTO} --hole-color 1,2,3",
        "error: photo.png: pixels of colour 1,2,3: an empty hole, expected at least one pixel", 1),
    Row("a mask of another size", MASKED, "error: photo.png is 16x16, its mask mask.png 8x8: they must be equal", 1,
        (picture("mask.png", (8, 8)),)),
    Row("a mask without a hole", MASKED, "error: mask.png: an empty hole, expected at least one pixel", 1,
        (picture("mask.png"),)),
    Row("a mask that is all hole", MASKED,
        "error: mask.png: the hole is the whole picture, expected some known pixels", 1,
        (picture("mask.png", colour=0),)),
    Row("a mask the wrong way round", MASKED,
        "note: mask.png: 92 % of the picture is hole; is it the wrong way round?", 0,
        (copy("turned.png", "mask.png"),)),
    Row("a box beyond the picture", f"{PHOTO} --box 10,10,10,10",
        "error: photo.png: box 10,10,10,10 (x, y, width, height) does not lie in its 16x16 pixels", 1),
    Row("a hole grown over everything", f"{MASKED} --grow 100",
        "error: photo.png: grown by 100 pixels the hole is the whole picture", 1),
    Row("a picture and a folder", f"{PHOTO} --mask masks",
        "error: photo.png and its mask masks: expected two files or two folders"),
    Row("a broken picture among others", PHOTOS,
        f"error: images/image_001.png: {NO_IMAGE} (cannot identify image file 'images/image_001.png')", 1,
        (write("images/image_001.png", "no"),)),
    Row("a mask too few", PHOTOS, f"error: 3 images in images and 2 masks in masks: {PAIR} image_002.png", 2,
        (remove("masks/mask_002.png"),)),
    Row("pictures of one name", PHOTOS,
        "error: images: two images of one name but for their ending would overwrite each other", 2,
        (copy("images/image_001.png", "images/image_001.jpg"),)),
    Row("a result over the picture", f"{MASKED} --out photo.png",
        "error: photo.png: is an input (photo.png), expected another place for the results"),
    Row("a result over the mask", f"{MASKED} --out mask.png",
        "error: mask.png: is an input (mask.png), expected another place for the results"),
    Row("a result over the picture by another name", f"{MASKED} --out link.png",
        "error: link.png: is an input (photo.png), expected another place for the results", 2,
        (link("link.png", "photo.png"),)),
    Row("results into their pictures", f"{PHOTOS} --out images",
        "error: images: is an input (images), expected another place for the results"),
    Row("results of a folder into a file", f"{PHOTOS} --out out.png",
        "error: out.png: expected a folder for the results, as images is one"),
    Row("a result of an unknown kind", f"{MASKED} --out out.gif",
        "error: out.gif: unknown kind of picture '.gif', expected one of .png, .jpg, .jpeg, .webp, .bmp, .tif, .tiff"),
    Row("a result where nothing may be written", f"{MASKED} --out locked/photo.png",
        "error: locked/photo.png: cannot be written ([Errno 13] Permission denied: ...)", 1, (read_only("locked"),)),
]  # fmt: skip

FOLDERS = [
    Row("images that are not there", f"{CATS} --test-maskedimage-path gone --test-mask-path masks",
        "error: gone: no such folder of images"),
    Row("no images", f"{CATS} --test-maskedimage-path empty --test-mask-path masks",
        "error: empty: no images in it (looked for .bmp, .jpeg, .jpg, .png, .webp)", 2, (subfolder("empty"),)),
    Row("a mask of another number", LAB,
        f"error: 3 images in images and 3 masks in masks: {PAIR} image_002.png, mask_009.png", 2,
        (move("masks/mask_002.png", "masks/mask_009.png"),)),
    Row("a pipe among the images", LAB, f"error: 2 images in images and 3 masks in masks: {PAIR} mask_001.png", 2,
        (remove("images/image_001.png"), pipe("images/image_001.png"))),
    Row("a wide mask", LAB,
        "error: images/image_001.png is 16x16, its mask masks/mask_001.png 18x16: they must be equal", 1,
        (picture("masks/mask_001.png", (18, 16)),)),
    Row("an empty image", LAB,
        f"error: images/image_001.png: {NO_IMAGE} (cannot identify image file 'images/image_001.png')", 1,
        (write("images/image_001.png"),)),
    Row("results into the images", f"{LAB} --out images",
        "error: images: is an input (images), expected another place for the results"),
    Row("results into the masks", f"{LAB} --predicted-path masks",
        "error: masks: is an input (masks), expected another place for the results"),
    Row("results into a file", f"{LAB} --out photo.png",
        "error: --out photo.png: photo.png is a file, expected a folder"),
    Row("results below a file", f"{LAB} --out photo.png/out",
        "error: --out photo.png/out: {tmp}/photo.png is a file, expected a folder"),
    Row("a truth that is not there", f"{TRUTH}.csv", "error: truth.csv: no such folder or file of true images"),
    Row("a truth of an unknown kind", f"{TRUTH}.txt",
        "error: truth.txt: true images come as a folder, an .npz or a .csv file", 2, (write("truth.txt"),)),
    Row("a csv with a header alone", f"{TRUTH}.csv", "error: truth.csv: no rows after the header", 2,
        (write("truth.csv", "pixel_0\n"),)),
    Row("a csv with a short line", f"{TRUTH}.csv",
        "error: truth.csv, line 2: 4 values, expected H*W*3 of a square image", 2,
        (write("truth.csv", "pixel_0\n1,2,3,4\n"),)),
    Row("a csv with values beyond a byte", f"{TRUTH}.csv", "error: truth.csv, line 3: values outside 0..255", 2,
        (write("truth.csv", "pixel_0\n1,2,3\n1,2,256\n"),)),
    Row("a csv of too few images", f"{TRUTH}.csv", "error: truth.csv: 1 true images for 3 to fill", 2,
        (write("truth.csv", "pixel_0\n1,2,3\n"),)),
    Row("a csv that is no text", f"{TRUTH}.csv",
        "error: truth.csv: not a .csv file ('utf-8' codec can't decode byte 0xff in position 0: invalid start byte)", 2,
        (write("truth.csv", b"\xff\xfe"),)),
    Row("an npz that is none", f"{TRUTH}.npz",
        "error: truth.npz: not an .npz of plain arrays (File is not a zip file)", 2, (write("truth.npz", "no"),)),
    Row("an npz of floats", f"{TRUTH}.npz",
        "error: truth.npz: expected uint8 (N, H, W, 3), found float64 (3, 16, 16, 3)", 2,
        (archive("truth.npz", np.zeros((3, SIZE, SIZE, 3))),)),
    Row("an npz that would run code", f"{TRUTH}.npz",
        "error: truth.npz: not an .npz of plain arrays (Object arrays cannot be loaded when allow_pickle=False)", 2,
        (archive("truth.npz", np.array([{}])),)),
    Row("true images of another size", f"{TRUTH}",
        "error: truth/image_002.png: 8x8, expected 16x16", 1,
        tuple(picture(f"truth/image_00{i}.png", (8, 8)) for i in range(3))),
]  # fmt: skip

CHECKPOINTS = [
    Row("a checkpoint that is not there", f"{MASKED} --checkpoint gone",
        "error: gone: expected a folder with vqgan.safetensors and transformer.safetensors"),
    Row("a folder of something else", f"{MASKED} --checkpoint images",
        "error: images/vqgan.safetensors: no such weights file"),
    Row("a checkpoint without its transformer", MASKED, "error: model/transformer.safetensors: no such weights file", 2,
        (remove("model/transformer.safetensors"),)),
    Row("half a weights file", MASKED, "error: model/vqgan.safetensors: not a weights file (...)", 2,
        (cut("model/vqgan.safetensors"),)),
    Row("foreign weights", MASKED,
        "error: model/vqgan.safetensors: expected the weights of a VQGAN, found no description (a plain state_dict "
        "needs config=FILE.yml)", 2, (weights("model/vqgan.safetensors"),)),
    Row("weights of the other network", MASKED,
        "error: model/vqgan.safetensors: expected the weights of a VQGAN, found Transformer", 2,
        (copy("model/transformer.safetensors", "model/vqgan.safetensors"),)),
    Row("weights that do not say enough", MASKED,
        "error: model/vqgan.safetensors: latent: Field required; encoder: Field required; decoder: Field required; and "
        "1 more", 2, (weights("model/vqgan.safetensors", kind="VQGAN", config="{}"),)),
    Row("a transformer of another VQGAN", MASKED,
        "error: model/transformer.safetensors: was trained on the tokens of another VQGAN than model/vqgan.safetensors",
        2, (copy("another/transformer.safetensors", "model/transformer.safetensors"),)),
    Row("an unknown key in decoding.yml", MASKED,
        "error: model/decoding.yml: steps: unknown key, known are: total_iter, sweet_spot, mask_func, sampler, "
        "temperature, sampling_temperature, top_k, codes, forget, second_look, token_rule, pre_fill, guess, rim, "
        "self_ensemble", 2,
        (write("model/decoding.yml", "steps: 3"),)),
    Row("a wrong type in decoding.yml", MASKED,
        "error: model/decoding.yml: total_iter: expected a whole number from 1, or auto, found 'many'", 2,
        (write("model/decoding.yml", "total_iter: many"),)),
]  # fmt: skip

OTHER_SCRIPTS = [
    Row("no mask", f"{MASKS} --count 0", "error: count 0: expected at least 1"),
    Row("too many masks", f"{MASKS} --count 1000000000000",
        "error: 1000000000000 holes of 64x64: expected at most 4,294,967,296 pixels in all"),
    Row("masks by the float", f"{MASKS} --count 1e3", "error: argument --count: invalid int value: '1e3'"),
    Row("small masks", f"{MASKS} --size 7", "error: size 7: expected at least 8"),
    Row("masks of a negative seed", f"{MASKS} --seed -1", "error: seed -1: expected at least 0"),
    Row("masks of an unknown family", f"{MASKS} --family blob",
        "error: argument --family: invalid choice: 'blob' (choose from ...)"),
    Row("masks for nowhere", "make_masks.py", "error: the following arguments are required: --out"),
    Row("masks into a file", "make_masks.py --count 1 --out photo.png",
        "error: --out photo.png: photo.png is a file, expected a folder"),
    Row("a score of a manifest of numbers", "fid_score.py --results out",
        "error: out/manifest.json: its key 'truth' is 3, expected a path", 2,
        (write("out/manifest.json", '{"truth": 3}'),)),
    Row("no threads", f"{SPEED} --threads 0",
        "error: argument --threads: expected a whole number of at least 1, found '0'"),
    Row("a port beyond ports", f"{PAGE} --port 99999999", "error: --port 99999999: expected 1 to 65535"),
    Row("a score of empty batches", f"{SCORE} --batch-size 0",
        "error: argument --batch-size/--batch_size: expected a whole number of at least 1, found '0'"),
    Row("a score by fewer threads than none", f"{SCORE} --num-workers -1",
        "error: argument --num-workers/--num_workers: expected a whole number of at least 0, found '-1'"),
    Row("a score on an unknown device", f"{SCORE} --device toaster",
        "error: --device toaster: expected auto, cpu, cuda or cuda:N"),
    Row("a score of unknown features", f"{SCORE} --features clip",
        "error: argument --features: invalid choice: 'clip' (choose from ...)"),
    Row("speed of a model that is not there", f"{SPEED} --models nowhere",
        "error: {root}/configs/nowhere.yml: no such config file"),
    Row("speed of an unknown part", f"{SPEED} --parts all",
        "error: argument --parts: invalid choice: 'all' (choose from ...)"),
    Row("speed on an unknown device", f"{SPEED} --device toaster",
        "error: --device toaster: expected auto, cpu, cuda or cuda:N"),
    Row("a page of no model", f"{PAGE} --checkpoint gone",
        "error: gone: expected a folder with vqgan.safetensors and transformer.safetensors"),
    Row("a page of a broken model", PAGE, "error: model/vqgan.safetensors: not a weights file (...)", 2,
        (write("model/vqgan.safetensors", "no"),)),
    Row("a page at no port", f"{PAGE} --port web", "error: argument --port: invalid int value: 'web'"),
    Row("a page of an unknown tiling", f"{PAGE} --tiling hexagons",
        "error: argument --tiling: invalid choice: 'hexagons' (choose from ...)"),
    Row("tiny cats", f"{PETS} --size 4", "error: --size 4: expected at least 8"),
    Row("cats among others", f"{PETS} --out images", "error: --out images: is not empty, expected a new folder"),
]  # fmt: skip

SWEEPS = [
    Row("a sweep without its config", f"{SWEEP} --config gone.yml", "error: gone.yml: no such config file"),
    Row("a sweep of an unknown method", f"{SWEEP} --rows theirs",
        "error: --rows theirs: expected some of 'grey', 'ours'"),
    Row("a sweep of an unknown flag", f"{SWEEP} --colour red",
        "error: unknown argument '--colour'; a value of the config is overridden as --section.key VALUE"),
    Row("a sweep of a seed in words", f"{SWEEP} --seeds one", "error: argument --seeds: invalid int value: 'one'"),
    Row("a sweep of more images than there are", f"{SWEEP} --n 99",
        "error: data.n 99: expected 2 to 3, the images in images"),
    Row("a sweep of a negative number", f"{SWEEP} --n -1",
        "data.n: Input should be greater than or equal to 0, found -1"),
    Row("a sweep into a file", f"{SWEEP} --out photo.png",
        "error: --out photo.png: photo.png is a file, expected a folder"),
    Row("a sweep of unknown holes", SWEEP,
        "data: generated: unknown family blob, expected some of walk, thin, medium, thick, box, half", 2,
        (changed("data", generated=["blob"]),)),
    Row("a sweep of no masks", SWEEP, "error: gone: no such folder of images", 2,
        (changed("data", masks={"walk": "gone"}),)),
    Row("a sweep of a mask without a hole", SWEEP, "error: masks: mask 1 has no hole, every image needs one", 2,
        (picture("masks/mask_001.png"),)),
    Row("a sweep of images of two sizes", SWEEP,
        "error: images/image_001.png is 8x8, but images/image_000.png is 16x16: one size is needed", 2,
        (picture("images/image_001.png", (8, 8)),)),
    Row("a report of nothing", REPORT, "error: out/rows.csv: nothing there to report"),
    Row("a report of another table", REPORT, "error: out/rows.csv, row 2: not a line of a sweep (KeyError('method'))",
        2, (write("out/rows.csv", "a,b\n1,2\n"),)),
    Row("a report of a broken line", REPORT,
        "error: out/rows.csv, row 2: not a line of a sweep (ValueError(\"could not convert string to float: 'x'\"))", 2,
        (write("out/rows.csv", LINES + 'grey,walk,,3,abc,x,"{""kind"": ""masked""}"\n'),)),
    Row("a report that should measure", f"{REPORT} --seeds 3", "error: --seeds: would do nothing with --report"),
]  # fmt: skip

CONFIGS = [
    Row("no config", f"{VQGAN_RUN} --config gone.yml", "error: gone.yml: no such config file"),
    Row("an empty config", OTHER, "error: other.yml: expected a mapping of options, found NoneType", 2,
        (write("other.yml"),)),
    Row("a config that is a list", OTHER, "error: other.yml: expected a mapping of options, found list", 2,
        (write("other.yml", "[1, 2]"),)),
    Row("a config that is no text", f"{VQGAN_RUN} --config photo.png",
        "error: photo.png: not valid YAML: 'utf-8' codec can't decode byte 0x89 in position 0: invalid start byte"),
    Row("a config that is a pipe", OTHER, "error: other.yml: no such config file", 2, (pipe("other.yml"),)),
    Row("a config nested too deeply", OTHER, "error: other.yml: not valid YAML: nested too deeply", 2,
        (write("other.yml", "[" * 5000),)),
    Row("a config that contains itself", OTHER,
        "error: other.yml: not valid YAML: more than 100000 values, its aliases written out", 2,
        (write("other.yml", "a: &a [*a]"),)),
    Row("an impossible date", OTHER,
        "error: other.yml: not valid YAML: a value that is not of its tag (month must be in 1..12)", 2,
        (write("other.yml", "a: 2020-99-01"),)),
    Row("a base that is not there", OTHER, "error: other.yml: base: no such file gone.yml", 2,
        (write("other.yml", "base: gone.yml"),)),
    Row("bases in a circle", OTHER, "error: other.yml: its base leads back to itself: other.yml -> third.yml", 2,
        (write("other.yml", "base: third.yml"), write("third.yml", "base: other.yml"))),
    Row("an unknown section", OTHER, f"trainsformer: unknown key, {KNOWN}", 2,
        (write("other.yml", "base: tiny.yml\ntrainsformer: {width: 3}"),)),
    Row("an unknown key", OTHER,
        "data.tain: unknown key, known are: train, val, windows, flip, workers, memory_mb", 2,
        (write("other.yml", "base: tiny.yml\ndata: {tain: train}"),)),
    Row("a wrong type", OTHER, "transformer.width: Input should be a valid integer, found 'wide'", 2,
        (write("other.yml", "base: tiny.yml\ntransformer: {width: wide}"),)),
    Row("networks that do not fit", f"{VQGAN_RUN} --transformer.codes 17",
        "transformer.codes 17 and vqgan.codebook.codes 16 must be equal"),
    Row("endless epochs", f"{VQGAN_RUN} --epochs 1e300",
        "vqgan_training.epochs: Input should be less than or equal to 1000000, found 1e+300"),
    Row("epochs that are no number", f"{STAGE_2} --epochs nan",
        "transformer_training.epochs: Input should be a finite number, found nan"),
    Row("epochs in words", f"{VQGAN_RUN} --epochs many", "error: argument --epochs: invalid float value: 'many'"),
    Row("a value that is no YAML", f"{VQGAN_RUN} --vqgan_training.epochs '{{a: '",
        "error: --vqgan_training.epochs: '{a: ' is not a YAML value"),
    Row("a value that is missing", f"{VQGAN_RUN} --vqgan_training.epochs",
        "error: --vqgan_training.epochs: a value is missing"),
    Row("an unknown flag of a training", f"{VQGAN_RUN} --colour red",
        "error: unknown argument '--colour'; a value of the config is overridden as --section.key VALUE"),
    Row("a profile of fewer steps than none", f"{VQGAN_RUN} --profile -1",
        "error: --profile -1: expected a number of steps"),
]  # fmt: skip

TRAININGS = [
    Row("no pictures to train on", f"{VQGAN_RUN} --train-d-path gone", "error: gone: no such folder of images"),
    Row("a broken picture to train on", VQGAN_RUN,
        f"error: train/image_003.png: {NO_IMAGE} (cannot identify image file 'train/image_003.png')", 2,
        (write("train/image_003.png", "no"),)),
    Row("a training into a file", f"{VQGAN_RUN} --out photo.png",
        "error: --out photo.png: photo.png is a file, expected a folder"),
    Row("a start from nothing", f"{VQGAN_RUN} --init gone.safetensors",
        "error: gone.safetensors: no such weights file"),
    Row("a start from the other network", f"{VQGAN_RUN} --init model/transformer.safetensors",
        "error: model/transformer.safetensors: does not fit this VQGAN: missing encoder.patchify.weight; unexpected "
        "bias; missing encoder.patchify.bias; and 105 more"),
    Row("nothing to resume", f"{VQGAN_RUN} --resume", "error: out/vqgan_last.pt: nothing to resume from"),
    Row("foreign tensors to resume", f"{VQGAN_RUN} --resume",
        "error: out/vqgan_last.pt: not a checkpoint of a training", 2,
        (saved("out/vqgan_last.pt", {"weight": torch.zeros(2)}),)),
    Row("a training of other data to resume", f"{VQGAN_RUN} --resume",
        "error: out/vqgan_last.pt: 3 steps an epoch, now 2: other data or another batch size", 2,
        (saved("out/vqgan_last.pt", STATE),)),
    Row("a training that is there already", VQGAN_RUN,
        "error: out: there is a training already (vqgan_last.pt); --resume goes on with it, --out DIR starts one "
        "elsewhere", 2, (saved("out/vqgan_last.pt", STATE),)),
    Row("a transformer without a VQGAN", f"{STAGE_2} --out new",
        "error: new/vqgan.safetensors: no VQGAN there; train one with training_vqgan.py, or pass --vqgan FILE"),
    Row("a transformer of a VQGAN of another size", f"{STAGE_2} --vqgan model/vqgan.safetensors",
        "error: model/vqgan.safetensors: another token grid or number of codes than the config's vqgan section"),
    Row("a transformer of no VQGAN", f"{STAGE_2} --vqgan tensors.pt",
        "error: tensors.pt: expected a state_dict of tensors", 2, (saved("tensors.pt", [1]),)),
    Row("no transformer to resume", f"{STAGE_2} --resume", "error: stage1/transformer_last.pt: nothing to resume from"),
    Row("an unknown way to hide", f"{STAGE_2} --transformer_training.hiding '{{nothing: 1}}'",
        "transformer_training.hiding: unknown hiding policy 'nothing', expected one of: bernoulli, uniform, cosine, "
        "walk, thin, medium, thick, box, half, holes"),
]  # fmt: skip

TABLE = [*FLAGS, *PICTURES, *FOLDERS, *CHECKPOINTS, *OTHER_SCRIPTS, *SWEEPS, *CONFIGS, *TRAININGS]
REAL = ("a mask the wrong way round", "a broken picture among others", "no mask")  # status 0, 1, 2


# --- the test ---


@pytest.fixture(scope="module")
def right(tmp_path_factory) -> Path:
    """A folder with all that a command needs, named as seen from it."""
    root = tmp_path_factory.mktemp("right")
    torch.manual_seed(1)
    for name in ("model", "another"):
        save(root / name, vqgan(), transformer())
    known = np.full((SIZE, SIZE), 255, np.uint8)
    known[4:9, 5:9] = 0
    write_pictures(root / "images", 3), (root / "masks").mkdir()
    for path in [*(root / "masks" / f"mask_00{i}.png" for i in range(3)), root / "mask.png"]:
        Image.fromarray(known).save(path)
    Image.fromarray(255 - known).save(root / "turned.png")
    Image.fromarray(colourful(1)[0]).save(root / "photo.png")
    config = write_config(root)
    config.write_text(config.read_text().replace(f"{root}/", ""))
    settings = load_config(config).vqgan
    save_weights(root / "stage1" / "vqgan.safetensors", VQGAN(settings), settings)
    methods = [{"name": "grey", "kind": "masked"}, {"name": "ours", "kind": "inpainting", "checkpoint": "model"}]
    sweep = {"data": {"truth": "images", "masks": {"walk": "masks"}}, "rows": methods}
    (root / "sweep.yml").write_text(yaml.safe_dump(sweep))
    return root


@pytest.fixture
def folder(right, tmp_path, monkeypatch) -> Path:
    """A copy of it, the current folder; HEIC has no reader, and what a command admits is forgotten."""
    shutil.copytree(right, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    Image.init()  # all kinds, or those that come later go with the list
    monkeypatch.setattr(Image, "ID", [kind for kind in Image.ID if kind != "HEIF"])
    monkeypatch.delitem(Image.OPEN, "HEIF", raising=False)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
    monkeypatch.setattr(data, "_most", data._most)
    return tmp_path


def run(script: str) -> int:
    """The exit status of a script's `main`, run in this process as the script itself runs it."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        run_script(importlib.import_module(script.removesuffix(".py")).main)
    except SystemExit as end:
        return end.code
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return 0


def check(row: Row, folder: Path, code: int, output: str, errors: str) -> None:
    """Status and last line are the row's; the line before may be the one that names a config, whose key is told."""
    script = row.command.partition(" ")[0]
    said = (errors if row.code else output).replace(str(folder), "{tmp}").replace(str(ROOT), "{root}")
    lines = [line for line in re.split(r"[\r\n]+", said) if line.strip() and "%|" not in line]  # %|: a progress bar
    expected = f"{script}: {row.message}" if row.message.startswith("error: ") else row.message
    assert "Traceback" not in errors
    assert re.fullmatch(re.escape(expected).replace(r"\.\.\.", ".*"), lines[-1]), lines[-1]
    assert not row.code or any(line.startswith(f"{script}: error: ") for line in lines[-2:])
    assert code == row.code


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)
def test_a_mistake_is_told_in_a_line(row, folder, monkeypatch, capsys):
    script, *_ = argv = shlex.split(row.command)
    if script == "demo.py":
        pytest.importorskip("gradio", reason="gradio is not installed: pip install -r requirements-demo.txt")
    for setup in row.setup:
        setup(folder)
    monkeypatch.setattr(sys, "argv", argv)
    code = run(script)
    check(row, folder, code, *capsys.readouterr())


@pytest.mark.parametrize("row", [row for row in TABLE if row.name in REAL], ids=lambda row: row.name)
def test_a_real_process_says_the_same(row, folder):
    for setup in row.setup:
        setup(folder)
    script, *arguments = shlex.split(row.command)
    done = subprocess.run([sys.executable, ROOT / script, *arguments], capture_output=True, text=True, timeout=300)
    check(row, folder, done.returncode, done.stdout, done.stderr)


def test_every_row_has_its_own_name():
    names = [row.name for row in TABLE]
    assert len(set(names)) == len(names) >= 60 and set(REAL) <= set(names)
