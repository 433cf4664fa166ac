"""Images with holes, filled batch by batch, and the pictures of it.

`chelsea` and `Folders` have the same face: `len`, `names`, `groups`, and a slice gives the `Inputs` of a batch, which
is read when it is asked for. `inpaint` fills them and writes what OUT shall hold:
  test_results/ (or elsewhere)  known pixels pasted back    raw/         the decoder's output
  confidence/  how sure of each token                       samples/     further completions, NAME_1.png ...
  imga/, mask_scheduling/, overview.png, animation/         see `visualize.Sheets`
  truth/       the true images, where they came with none   manifest.json  all that is needed to repeat the run
"""

import csv
import json
import platform
import zipfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from files import write_text
from maskgit.completion import InpaintingResult
from maskgit.data import (
    GREY,
    Inputs,
    list_images,
    pair,
    read_image,
    read_pair,
    refuse_overwriting,
    to_pixels,
    write_image,
)  # fmt: skip
from maskgit.dataset import ImageDataset
from maskgit.decoding import State
from maskgit.decoding_config import DecodingConfig
from maskgit.inpainter import Inpainter
from maskgit.masks import FAMILIES, make_holes
from maskgit.visualize import Sheets, confidence_map, first_of_each
from models.checkpoint import file_hash
from utils import images_at_once, log, one_line, profile

FACES = ((70, 0, 300), (90, 10, 280), (110, 40, 250))  # squares of chelsea: left, top, side in pixels


def chelsea(size: int) -> Inputs:
    """Crops of scikit-image's cat (CC0), each also mirrored, under every family of holes."""
    from skimage.data import chelsea as photograph  # imported here: only the default needs scikit-image

    picture = Image.fromarray(photograph())
    crops = [picture.crop((x, y, x + side, y + side)).resize((size, size), Image.LANCZOS) for x, y, side in FACES]
    faces = torch.from_numpy(np.stack([np.asarray(crop) for crop in crops])).permute(0, 3, 1, 2).contiguous()
    faces = torch.cat((faces, faces.flip(-1)))
    hole = torch.cat([make_holes(family, len(faces), size) for family in FAMILIES])
    truth = faces.repeat(len(FAMILIES), 1, 1, 1)
    groups = [family for family in FAMILIES for _ in faces]
    names = [f"image_{index:03d}.png" for index in range(len(truth))]
    return Inputs(truth.masked_fill(hole, GREY), hole, names, groups, truth)


class Folders:
    """The lab's layout: a folder of images, one of masks (0 = hole), and perhaps the truth (folder, .npz or .csv).

    Files are read when their batch is; a truth that is one file is kept in memory. An image that cannot be read, or
    whose mask or truth cannot, is left out of its batch, and `refused`, by its number, says why. Raises ValueError
    for what does not fit together.
    """

    def __init__(self, images, masks, truth, size: int, workers: int):
        self.size, self.workers, self.refused = size, max(1, workers), dict[int, str]()
        self.folders = [Path(path) for path in (images, masks, truth) if path]
        paths = list_images(images)
        self.names = [f"{path.stem}.png" for path in paths]
        if len(set(self.names)) < len(self.names):
            raise ValueError(f"{images}: two images of one name but for their ending would overwrite each other")
        self.pairs = pair(paths, list_images(masks))
        self.groups = [Path(masks).name] * len(self.names)
        self.source = truth
        self.truth = list_images(truth) if truth and Path(truth).is_dir() else read_truth(truth) if truth else None
        if isinstance(self.truth, list):
            self.truth = [true for _, true in pair(paths, self.truth, "true image")]
        elif self.truth is not None and len(self.truth) != len(self.names):
            raise ValueError(f"{truth}: {len(self.truth)} true images for {len(self.names)} to fill")
        elif self.truth is not None and self.truth.shape[2:] != (size, size):
            raise ValueError(f"{truth}: {tuple(self.truth.shape)} true images (n, 3, H, W), expected {size}x{size}")

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, window: slice) -> Inputs:
        asked = range(len(self))[window]
        with ThreadPoolExecutor(self.workers) as pool:
            read = list(pool.map(self._read, asked))
        for number, one in zip(asked, read, strict=True):
            if isinstance(one, str):
                self.refused[number] = one
        found = [one for one in read if not isinstance(one, str)]
        numbers, shape = [number for number, *_ in found], (len(found), self.size, self.size)
        images = torch.from_numpy(np.array([pixels for _, pixels, *_ in found], np.uint8).reshape(*shape, 3))
        hole = torch.from_numpy(np.array([missing for *_, missing, _ in found], bool).reshape(shape))
        truth = None if self.truth is None or not found else torch.stack([true for *_, true in found])
        names, groups = ([all_of[number] for number in numbers] for all_of in (self.names, self.groups))
        images = images.permute(0, 3, 1, 2).contiguous()
        return Inputs(images, hole[:, None], names, groups, truth, numbers=numbers)

    def _read(self, number: int) -> tuple[int, np.ndarray, np.ndarray, Tensor | None] | str:
        """An image's number, pixels, hole and truth; or why it cannot be read."""
        try:
            pixels, hole = read_pair(*self.pairs[number], self.size)
            true = None if self.truth is None else self.truth[number]
            if isinstance(true, Path):
                path, true = true, torch.from_numpy(read_image(true)).permute(2, 0, 1)
                if true.shape[1:] != (self.size, self.size):
                    raise ValueError(f"{path}: {true.shape[2]}x{true.shape[1]}, expected {self.size}x{self.size}")
        except ValueError as error:
            return str(error)
        return number, pixels, hole, true


def batches(inputs: Inputs | Folders, size: int) -> Iterator[Inputs]:
    """Each batch of `size`, read in a thread while the one before is at work; none without an image."""
    with ThreadPoolExecutor(1) as pool:
        ahead = None
        for start in range(0, len(inputs), size):
            batch = ahead.result() if ahead else inputs[start : start + size]
            if start + size < len(inputs):
                ahead = pool.submit(inputs.__getitem__, slice(start + size, start + 2 * size))
            if len(batch):
                yield batch


# --- filling ---


@dataclass(frozen=True)
class Options:
    """What is made of each image, and where it goes."""

    out: Path
    predicted: Path | None = None  # folder of the composited pictures; None: OUT/test_results
    seed: int = 0  # image i takes seed + i
    samples: int = 1  # completions an image
    batch_size: int | None = None  # None: `images_at_once`
    margin: int = 0  # rings of tokens hidden around the hole
    drawn: int = 0  # images whose iterations are drawn
    animate: bool = False  # film these
    keep_truth: bool = True  # write the truth to OUT/truth
    profiled: int = 0  # iterations to record


def refuse_inputs(inputs: Folders, options: Options) -> None:
    """Raises ValueError where a folder that `inpaint` writes to is one that `inputs` come from, or holds one of their
    files, under whatever name."""
    written = [options.out, *(options.out / name for name in ("test_results", "raw", "confidence", "samples", "truth"))]
    written += [options.out / name for name in Sheets.FOLDERS] + ([options.predicted] if options.predicted else [])
    truth = inputs.truth if isinstance(inputs.truth, list) else []
    files = [*inputs.folders, *(path for both in inputs.pairs for path in both), *truth]
    there = [path for folder in written if folder.is_dir() for path in folder.iterdir()]
    refuse_overwriting(files, [*written, *there])


def inpaint(
    inpainter: Inpainter, inputs: Inputs | Folders, decoding: DecodingConfig, options: Options
) -> Iterator[tuple[Inputs, InpaintingResult]]:
    """Fills every image and writes the pictures; yields each batch and its result, completions of an image together.

    The next batch is read and the last one written while this one is at work; no more than three are in memory.
    """
    drawn = first_of_each(inputs.groups, options.drawn)
    sheets = Sheets(inpainter, options.out, drawn, options.animate)
    size = options.batch_size or images_at_once(inpainter.device)
    pending: list[Future] = []
    written: list[str] = []
    with (
        tqdm(total=len(inputs), desc="inpainting", unit="image") as bar,
        ThreadPoolExecutor(2) as writers,
        profile(options.out / "profile" / "inpainting.pt.trace.json", options.profiled) as profiler_step,
    ):
        for batch in batches(inputs, size):
            film = sheets.film(batch.numbers, options.samples)

            def on_step(rows: slice, state: State, film=film) -> None:
                film.add(rows, state)
                profiler_step()

            painted = inpainter.paint(batch.images, batch.hole, decoding)
            seeds = [options.seed + number for number in batch.numbers]
            result = inpainter.complete(
                batch.images, batch.hole, seeds, batch_size=size, samples=options.samples, on_step=on_step,
                margin=options.margin, decoding=decoding, painted=painted,
            )  # fmt: skip
            hidden = result.hidden[:: options.samples]
            codes = inpainter.vqgan.config.codebook.codes
            maps = confidence_map(batch.images, hidden, result.confidence[:: options.samples], codes)
            for done in pending:
                done.result()  # raises what writing raised
            pictures = _outputs(options, batch, result, maps)
            pending = [writers.submit(write_image, path, to_pixels(image)) for path, image in pictures]
            sheets.write(batch, hidden, painted, result.images[:: options.samples], film)
            written += batch.names
            yield batch, result
            bar.update(len(batch))
        for done in pending:
            done.result()
    sheets.close()
    note_others(options.predicted or options.out / "test_results", written)


def note_others(folder: Path, names: list[str]) -> None:
    """Says, once all is written, where a folder of results holds pictures of another run."""
    others = {path.name for path in folder.glob("*.png")} - set(names)
    if others:
        log.info(f"note: {folder} holds {len(others)} pictures that are not of this run, such as {min(others)}; "
                 "fid_score.py would score them too")  # fmt: skip


def _outputs(options: Options, batch: Inputs, result: InpaintingResult, maps: Tensor) -> Iterator[tuple[Path, Tensor]]:
    """Where the pictures of a batch go, and each of them, (3, H, W) uint8."""
    out, samples = options.out, options.samples
    kinds = [
        (options.predicted or out / "test_results", "", result.images[::samples]),
        (out / "raw", "", result.raw[::samples]),
        (out / "confidence", "", maps),
        *((out / "samples", f"_{number}", result.images[number::samples]) for number in range(1, samples)),
    ]
    if batch.truth is not None and options.keep_truth:
        kinds.append((out / "truth", "", batch.truth))
    for folder, suffix, images in kinds:
        for name, image in zip(batch.names, images, strict=True):
            yield folder / f"{Path(name).stem}{suffix}.png", image


def write_manifest(
    checkpoint: Path,
    inputs: Inputs | Folders,
    results: list[str],
    decoding: DecodingConfig,
    options: Options,
    notes: dict,
) -> None:
    """OUT/manifest.json: all that is needed to repeat the run, the names of its results, the truth's, and `notes`."""
    kept = options.out / "truth" if inputs.truth is not None else None
    truth = kept if options.keep_truth else inputs.source
    manifest = {
        "decoding": decoding.model_dump(),
        "seed": options.seed,
        "margin": options.margin,
        "samples": options.samples,
        "checkpoint": str(checkpoint),
        "weights_sha256": {name: file_hash(checkpoint / f"{name}.safetensors") for name in ("vqgan", "transformer")},
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        "predicted": options.predicted and str(options.predicted.resolve()),  # None: OUT/test_results
        "truth": None if truth is None else str(Path(truth).resolve()),
        "results": results,
    }
    text = json.dumps(manifest | notes, indent=2) + "\n"
    write_text(options.out / "manifest.json", text)


# --- the truth ---


def read_truth(source) -> Tensor:
    """True images as uint8 (N, 3, H, W) from a folder, an .npz (array `images`, or its first, (N, H, W, 3)) or the
    lab's test_gt.csv (a header, then rows of H*W*3 integers in H, W, C order). Raises ValueError naming the file."""
    source = Path(source)
    if source.is_dir():
        return ImageDataset(source).images
    if not source.is_file():
        raise ValueError(f"{source}: no such folder or file of true images")
    if source.suffix == ".npz":
        array = _read_npz(source)
    elif source.suffix == ".csv":
        array = _read_csv(source)
    else:
        raise ValueError(f"{source}: true images come as a folder, an .npz or a .csv file")
    if array.ndim != 4 or array.shape[3] != 3 or array.dtype != np.uint8:
        raise ValueError(f"{source}: expected uint8 (N, H, W, 3), found {array.dtype} {array.shape}")
    return torch.from_numpy(array).permute(0, 3, 1, 2).contiguous()


def _read_npz(path: Path) -> np.ndarray:
    try:
        with zipfile.ZipFile(path), np.load(path) as arrays:  # np.load alone would take an .npy or a pickle
            array = arrays["images" if "images" in arrays else arrays.files[0]]
            if not isinstance(array, np.ndarray):
                raise ValueError("its first member is no array")
            return array
    except Exception as error:  # also MemoryError: a header may claim any size
        raise ValueError(f"{path}: not an .npz of plain arrays ({one_line(error)})") from error


def _read_csv(path: Path) -> np.ndarray:
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.reader(file))[1:]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: not a .csv file ({error})") from error
    side = round((len(rows[0]) / 3) ** 0.5) if rows else 0
    images = []
    for number, row in enumerate(rows, start=2):
        if len(row) != side * side * 3 or not row:
            raise ValueError(f"{path}, line {number}: {len(row)} values, expected H*W*3 of a square image")
        try:
            images.append(np.array(row, dtype=np.int64))
        except (ValueError, OverflowError) as error:
            raise ValueError(f"{path}, line {number}: expected integers, 0..255") from error
        if images[-1].min() < 0 or images[-1].max() > 255:
            raise ValueError(f"{path}, line {number}: values outside 0..255")
    if not images:
        raise ValueError(f"{path}: no rows after the header")
    return np.stack(images).astype(np.uint8).reshape(-1, side, side, 3)
