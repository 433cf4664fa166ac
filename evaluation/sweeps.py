"""What a sweep compares, on what: its config, its entries, and how one is measured."""

import hashlib
import json
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated

import pydantic
import torch
from pydantic import Field
from torch import Tensor

from evaluation.evaluator import Evaluator, digest
from evaluation.figures import VERSION
from evaluation.methods import Method, complete, leak, needs_seed, settings_of
from evaluation.metrics import code_usage
from evaluation.report import WHOLE, Line
from maskgit.completion import Codec
from maskgit.data import list_images, opened
from maskgit.dataset import ImageDataset, read_holes
from maskgit.folders import read_truth
from maskgit.masks import FAMILIES, make_holes
from maskgit.photo_holes import PHOTO_FAMILIES
from models.settings import Settings
from utils import log, pick_device

Seed = Annotated[int, Field(ge=0)]
SAME = ("psnr", "l1", "sharpness")  # of the hole, where composited and raw pictures are the same


class SweepDataConfig(Settings):
    truth: str = Field(description="true images: a folder, an .npz or a .csv")
    n: int = Field(0, ge=0, description="the first n of them; 0: all")
    masks: dict[str, str] = Field({}, description="families of holes by name: folders of masks, one an image")
    generated: Annotated[tuple[str, ...], Field(strict=False)] = Field(
        (), description="families of maskgit/masks.py; of whole photographs those of maskgit/photo_holes.py"
    )
    window: int = Field(0, ge=0, description="one window of so many pixels of each image; 0: all of it")
    whole: bool = Field(False, description="the images are photographs of any size, each filled at its own")
    hole_seed: int = Field(1, ge=0, description="of the generated families")

    @pydantic.model_validator(mode="after")
    def _known(self):
        families = PHOTO_FAMILIES if self.whole else FAMILIES
        if unknown := set(self.generated) - set(families):
            raise ValueError(f"generated: unknown family {', '.join(unknown)}, expected some of {', '.join(families)}")
        if self.whole and (self.masks or self.window):
            raise ValueError("whole photographs take generated families, no masks and no window")
        return self

    @pydantic.model_validator(mode="after")
    def _one_name_each(self):
        if not (self.masks or self.generated):
            raise ValueError("no holes: expected masks or generated families")
        if twice := {WHOLE, *self.generated} & set(self.masks):
            raise ValueError(f"masks {', '.join(twice)}: taken, expected another name")
        return self


class EvaluatorConfig(Settings):
    feature_weights: str | None = Field(
        None, description="file of VGG16 features, for FD-VGG16 and KID; null: torchvision downloads them"
    )
    lpips_weights: str | None = Field(None, description="file of AlexNet features; null: torchvision downloads them")


class SweepConfig(Settings):
    """What to compare, on what."""

    data: SweepDataConfig
    evaluator: EvaluatorConfig = EvaluatorConfig()
    seeds: Annotated[tuple[Seed, ...], Field(strict=False, min_length=1)] = (0, 1, 2, 3, 4)
    rows: Annotated[tuple[Method, ...], Field(strict=False, min_length=1)] = Field(description="the methods to compare")

    @pydantic.model_validator(mode="before")
    @classmethod
    def _judge_is_the_evaluator(cls, values):
        """`judge` is what configs called it before."""
        if not isinstance(values, dict) or not isinstance(values.get("judge"), dict):
            return values
        rest = {key: value for key, value in values.items() if key != "judge"}
        own = rest.get("evaluator", {})
        return rest | {"evaluator": values["judge"] | own} if isinstance(own, dict) else rest

    @pydantic.model_validator(mode="after")
    def _tiles_photographs(self):
        for method in self.rows:
            if not self.data.whole and (given := {"tiling", "coarse"} & method.model_fields_set):
                raise ValueError(f"method {method.name}: {', '.join(given)} is of whole photographs (data.whole)")
        return self

    @pydantic.field_validator("rows")
    @classmethod
    def _one_name_each(cls, methods: tuple[Method, ...]):
        names = [method.name for method in methods]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"two methods are called {', '.join(twice)}")
        return methods

    def only(self, names: list[str] | None) -> "SweepConfig":
        """With the methods `names` alone. Raises ValueError listing the known ones."""
        known = [method.name for method in self.rows]
        if unknown := set(names or ()) - set(known):
            raise ValueError(f"--rows {', '.join(unknown)}: expected some of {', '.join(map(repr, known))}")
        methods = tuple(method for method in self.rows if not names or method.name in names)
        return self.model_copy(update={"rows": methods})

    def measurable(self) -> "SweepConfig":
        """Without the methods whose weights are missing; the log says which, and how to make them.

        Raises ValueError where none is left.
        """
        for method in self.rows:
            if method.missing:
                how = f"; {method.made_by} makes it" if method.made_by else ""
                log.info(f"skipped: {method.name}: no {method.missing[0]}{how}")
        methods = tuple(method for method in self.rows if not method.missing)
        if not methods:
            raise ValueError("no method is left to measure")
        return self.model_copy(update={"rows": methods})


# --- what is compared -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Entry:
    """One line to be: a method on a family of holes with a decoding seed, or None where the result needs none."""

    method: Method
    family: str
    hole: Tensor  # (N, 1, H, W) bool; of whole photographs a list of arrays (H, W)
    seed: int | None
    settings: dict  # what the result depends on, beside images, hole and seed
    key: str

    @property
    def place(self) -> tuple[str, str]:
        """Its line in rows.csv."""
        return self.method.name, self.key


class Sweep:
    """The images, the holes, the evaluator and the networks of all methods.

    Raises ValueError, FileNotFoundError or RuntimeError (weights that cannot be downloaded) at once.
    """

    def __init__(self, config: SweepConfig, device: str, workers: int, precision: str = "auto"):
        self.config, self.workers = config, workers
        data = config.data
        for path in list_images(data.truth) if data.window else ():
            with opened(path) as picture:
                width, height = picture.size
            if min(width, height) < data.window:
                raise ValueError(f"{path}: {width}x{height} pixels, expected {data.window} (data.window) or more")
        cut = data.window and ImageDataset(data.truth, data.window, windows="fixed")
        self.truth = cut.images if cut else read_truth(data.truth)
        holes = {name: self._read(folder) for name, folder in data.masks.items()}
        size, n = self.truth.shape[-1], data.n or len(self.truth)
        if not 2 <= n <= len(self.truth):
            raise ValueError(f"data.n {n}: expected 2 to {len(self.truth)}, the images in {data.truth}")
        holes |= {name: make_holes(name, len(self.truth), size, data.hole_seed) for name in data.generated}
        self.truth, self.holes = self.truth[:n], {name: hole[:n] for name, hole in holes.items()}
        self.holes[WHOLE] = torch.ones_like(self.truth[:, :1], dtype=torch.bool)
        self.networks = open_networks(config.rows, device, precision)
        for method in config.rows:
            if (codec := self.networks[method.name]) and self.truth.shape[2:] != (codec.size, codec.size):
                found = "x".join(map(str, self.truth.shape[2:]))
                raise ValueError(
                    f"{data.truth}: {found} pixels, but method {method.name} takes {codec.size}x{codec.size}"
                )
        self.device, self.precision = pick_device(device), precision
        weights = config.evaluator
        self.evaluator = Evaluator(self.truth, weights.feature_weights, weights.lpips_weights, self.device)

    def _read(self, folder: str) -> Tensor:
        hole = read_holes(list_images(folder))
        if hole.shape != (len(self.truth), 1, *self.truth.shape[2:]):
            raise ValueError(f"{folder}: masks {tuple(hole.shape)} for images {tuple(self.truth.shape)}")
        if not (some := hole.flatten(1).any(dim=1)).all():
            raise ValueError(f"{folder}: mask {int((~some).nonzero()[0])} has no hole, every image needs one")
        return hole

    def settings(self, method: Method) -> dict:
        """All that the method's result depends on, beside images, hole and seed."""
        return settings_of(method, self.networks[method.name])

    def digest(self, hole: Tensor) -> str:
        """A short hash of a family's holes."""
        return digest(hole)

    def entries(self) -> list[Entry]:
        """Family by family, all that is to be compared."""
        settings = {method.name: self.settings(method) for method in self.config.rows}
        entries = []
        for family, hole in self.holes.items():
            place = self.evaluator.identity | {"hole": self.digest(hole), "figures": VERSION}
            if self.device.type != "cpu":  # where the evaluator's networks run; keys of lines from a CPU never named it
                place["evaluated on"] = self.device.type
            for method in self.config.rows:
                if family == WHOLE and method.kind != "vq_reconstruction":
                    continue
                own = settings[method.name]
                for seed in self.config.seeds if needs_seed(method, self.networks[method.name]) else (None,):
                    entries.append(Entry(method, family, hole, seed, own, key_of(own, place, seed)))
        return entries

    def measure(self, entry: Entry) -> Line:
        """Fills the holes and evaluates the result."""
        method, hole, networks = entry.method, entry.hole, self.networks[entry.method.name]
        start = time.perf_counter()
        filled = complete(method, networks, self.truth, hole, entry.seed, self.workers)
        figures = {"seconds": (time.perf_counter() - start) / len(hole)}
        found = self.evaluator(filled.images, hole)
        figures |= found.means() | found.by_hole_size(hole)
        if entry.family == WHOLE:
            figures["code_usage"] = code_usage(filled.tokens, networks.vqgan.config.codebook.codes)
        elif filled.raw is not None:
            means = self.evaluator(filled.raw, hole).means()
            figures |= {f"raw_{name}": value for name, value in means.items() if name not in SAME}
            if method.kind == "vq_reconstruction":
                figures |= leak(networks, filled.tokens, self.truth, hole)
        return Line(method.name, entry.family, entry.seed, len(hole), entry.key, figures, entry.settings)


def open_networks(methods: Iterable[Method], device: str, precision: str) -> dict[str, Codec | None]:
    """The networks of each method by its name; methods of the same files share them."""
    needed = {method.files: method for method in methods}
    opened = {files: method.open(device, precision) for files, method in needed.items()}
    return {method.name: opened[method.files] for method in methods}


def key_of(settings: dict, place: dict[str, str], seed: int | None) -> str:
    """A hash of all that the figures of a line depend on: method, images, holes, features, seed."""
    return hashlib.sha256(json.dumps([settings, place, seed], sort_keys=True).encode()).hexdigest()[:16]
