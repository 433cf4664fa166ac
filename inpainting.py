"""Fills the holes of images with a trained VQGAN and transformer.

    python inpainting.py                                    # skimage's cat chelsea, every family of holes
    python inpainting.py --test-maskedimage-path masked_image --test-mask-path mask64 --gtcsv-path test_gt.csv
    python inpainting.py --mask-func linear --sweet-spot 10 --total-iter 10

From Python: `Inpainter.from_pretrained("pretrained/cats64")(images, hole)`.
Shapes: images (b, 3, H, W) uint8, hole (b, 1, H, W) bool (True = missing), tokens and hidden (b, n).
"""

import argparse
import json
import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pydantic
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from config import ROOT, add_flag, explain
from data import ImageFolder, list_images, pair, read_holes, read_truth, to_float, to_pixels, to_uint8, write_image
from decoding import DecodingConfig, State, sample
from masks import FAMILIES, SCHEDULES, composite, make_holes, to_hidden
from metrics import hole_psnr
from models.base import file_hash, read_weights
from models.transformer import Transformer
from models.vqgan import VQGAN
from utils import autocast, grid, log, pick_device, start_logging

PRETRAINED = ROOT / "pretrained" / "cats64"
GREY = 128  # what the encoder sees in a hole
FACES = ((70, 0, 300), (90, 10, 280), (110, 40, 250))  # squares of chelsea: left, top, side in pixels


@dataclass(frozen=True, eq=False)
class Filled:
    """What an `Inpainter` returns."""

    images: Tensor  # (b, 3, H, W) uint8: the decoder's pixels in the hole, the given ones byte-identical elsewhere
    raw: Tensor  # (b, 3, H, W) uint8: the decoder's pixels everywhere
    tokens: Tensor  # (b, n) long


class Inpainter:
    """A frozen VQGAN and transformer that fill holes; the same seed gives the same tokens, whatever the batch."""

    def __init__(
        self, vqgan: VQGAN, transformer: Transformer, decoding: DecodingConfig, device="auto", precision="auto"
    ):
        made = vqgan.config.grid**2, vqgan.config.codebook.codes
        taken = transformer.config.tokens, transformer.config.codes
        if made != taken:
            raise ValueError(f"(tokens, codes): the VQGAN makes {made}, the transformer takes {taken}")
        self.device, self.precision, self.decoding = pick_device(device), precision, decoding
        self.vqgan = vqgan.to(self.device, memory_format=torch.channels_last).eval().requires_grad_(False)
        self.transformer = transformer.to(self.device).eval().requires_grad_(False)
        self.size = vqgan.config.image_size

    @classmethod
    def from_pretrained(cls, folder=PRETRAINED, device="auto", precision="auto") -> "Inpainter":
        """The weights in `folder`: vqgan.safetensors and transformer.safetensors, as the two trainings leave them.

        Raises FileNotFoundError, or ValueError naming the file that does not fit.
        """
        paths = [Path(folder) / f"{name}.safetensors" for name in ("vqgan", "transformer")]
        vqgan, transformer = VQGAN.load(paths[0]), Transformer.load(paths[1])
        notes = read_weights(paths[1])[1]
        if not {"vqgan", "decoding"} <= notes.keys():
            raise ValueError(f"{paths[1]}: its metadata lack vqgan or decoding, which training_transformer.py notes")
        if notes["vqgan"] != file_hash(paths[0]):
            raise ValueError(f"{paths[1]}: was trained on the tokens of another VQGAN than {paths[0]}")
        decoding = DecodingConfig.model_validate_json(notes["decoding"])
        return cls(vqgan, transformer, decoding, device, precision)

    def hide(self, hole: Tensor, margin: int = 0) -> Tensor:
        """hole (b, 1, H, W) -> hidden (b, n): tokens with a missing pixel, grown by `margin` rings."""
        return to_hidden(hole, self.vqgan.config.grid, margin).to(self.device)

    @torch.no_grad()
    def encode(self, images: Tensor, hole: Tensor) -> Tensor:
        """uint8 images -> tokens (b, n) of the images with their holes painted grey, in float32."""
        grey = images.masked_fill(hole, GREY)
        return self.vqgan.encode(to_float(grey).to(self.device, memory_format=torch.channels_last))

    def predict(self, tokens: Tensor) -> Tensor:
        """tokens (b, n), mask_id where hidden -> logits (b, n, k)."""
        with autocast(self.device, self.precision):
            return self.transformer(tokens)

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        """tokens (b, n) -> uint8 images (b, 3, H, W) on the CPU."""
        with autocast(self.device, self.precision):
            return to_uint8(self.vqgan.decode(tokens)).cpu()

    def steps(
        self,
        images: Tensor,
        hole: Tensor,
        seeds: Sequence[int],
        margin: int = 0,
        decoding: DecodingConfig | None = None,
    ) -> Iterator[State]:
        """Decodes iteratively, a State after each iteration; `seeds` holds one integer >= 0 an image.

        Raises ValueError where shapes or dtypes do not fit.
        """
        shape = (len(images), 3, self.size, self.size)
        if images.dtype != torch.uint8 or images.shape != shape:
            raise ValueError(f"images: expected uint8 {shape}, found {images.dtype} {tuple(images.shape)}")
        if hole.dtype != torch.bool or hole.shape != (len(images), 1, self.size, self.size):
            raise ValueError(f"hole: expected bool (b, 1, {self.size}, {self.size}), found {hole.dtype} {hole.shape}")
        tokens, hidden = self.encode(images, hole), self.hide(hole, margin)
        return sample(self.predict, tokens, hidden, self.transformer.mask_id, decoding or self.decoding, seeds)

    def finish(self, images: Tensor, hole: Tensor, tokens: Tensor) -> Filled:
        """Decodes the final tokens and pastes the known pixels back."""
        raw = self.decode(tokens)
        return Filled(composite(raw, images, hole), raw, tokens)

    def __call__(
        self,
        images: Tensor,
        hole: Tensor,
        seeds: Sequence[int] | int = 0,
        margin: int = 0,
        decoding: DecodingConfig | None = None,
    ) -> Filled:
        """images uint8 (b, 3, H, W) and hole bool (b, 1, H, W) -> `Filled`.

        `seeds`: one integer >= 0 an image, or one for all: image i then takes seed + i.
        """
        if isinstance(seeds, int):
            seeds = range(seeds, seeds + len(images))
        *_, last = self.steps(images, hole, seeds, margin, decoding)
        return self.finish(images, hole, last.tokens)


# --- inputs -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Inputs:
    """Images with holes, their file names, and the truth where it is known."""

    images: Tensor  # (N, 3, H, W) uint8
    hole: Tensor  # (N, 1, H, W) bool
    names: list[str]
    groups: list[str]  # a row of the table each
    truth: Tensor | None


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


def folders(images, masks, truth, size: int, workers: int) -> Inputs:
    """The lab's layout: a folder of images, one of masks (0 = hole), and perhaps the truth (folder, .npz or .csv)."""
    pairs = pair(list_images(images), list_images(masks))
    for image, mask in pairs:
        sizes = ["{3}x{2}".format(*pixels.shape) for pixels in (ImageFolder([image]).images, read_holes([mask]))]
        if sizes[0] != sizes[1]:
            raise ValueError(f"{image} is {sizes[0]}, its mask {mask} {sizes[1]}: they must be equal")
    pictures = ImageFolder([image for image, _ in pairs], size, workers).images
    names = [f"{image.stem}.png" for image, _ in pairs]
    if len(set(names)) < len(names):
        raise ValueError(f"{images}: two images of one name but for their ending would overwrite each other")
    true = read_truth(truth) if truth else None
    if true is not None and true.shape != pictures.shape:
        raise ValueError(f"{truth}: {tuple(true.shape)} true images (N, 3, H, W) for {tuple(pictures.shape)} to fill")
    hole = read_holes([mask for _, mask in pairs], size, workers)
    return Inputs(pictures, hole, names, [Path(masks).name] * len(names), true)


# --- the command line -------------------------------------------------------------------------------------------------


def drawn(groups: list[str], count: int) -> list[int]:
    """The images whose iterations are drawn: the first of each group, then the second of each, `count` in all."""
    turns = [(groups[:index].count(group), index) for index, group in enumerate(groups[: count * len(set(groups))])]
    return sorted(index for _, index in sorted(turns)[:count])


def draw(inpainter: Inpainter, state: State, rows: list[int]) -> tuple[Tensor, Tensor]:
    """Pictures (r, 3, H, W) uint8 of the images `rows` after a step, hidden tokens grey, and what is known, white."""
    hidden = state.hidden[rows]
    tokens = state.tokens[rows].masked_fill(hidden, 0)
    side = inpainter.vqgan.config.grid
    pending = F.interpolate(hidden.view(-1, 1, side, side).float(), size=inpainter.size).bool().cpu()
    pictures = inpainter.decode(tokens).masked_fill(pending, GREY)
    return pictures, torch.where(pending, 0, 255).to(torch.uint8).expand_as(pictures)


def run(inpainter: Inpainter, inputs: Inputs, args: argparse.Namespace, decoding: DecodingConfig) -> Tensor:
    """Fills every image, writes the pictures and returns the composited ones (N, 3, H, W) uint8."""
    out, results = Path(args.out), Path(args.predicted_path or Path(args.out) / "test_results")
    shown, overview, filled = drawn(inputs.groups, args.grids), [], []
    with tqdm(total=len(inputs.names), desc="inpainting", unit="image") as bar:
        for start in range(0, len(inputs.names), args.batch_size):
            window = slice(start, start + args.batch_size)
            images, hole, names = inputs.images[window], inputs.hole[window], inputs.names[window]
            seeds = range(args.seed + start, args.seed + start + len(images))
            rows, history = [index - start for index in shown if index in range(*window.indices(len(inputs.names)))], []
            for state in inpainter.steps(images, hole, seeds, args.margin, decoding):
                if rows:
                    history.append(draw(inpainter, state, rows))
            done = inpainter.finish(images, hole, state.tokens)
            for index, name in enumerate(names):
                write_image(results / name, to_pixels(done.images[index]))
                write_image(out / "raw" / name, to_pixels(done.raw[index]))
            for place, row in enumerate(rows):
                pictures, known = (torch.stack([step[kind][place] for step in history]) for kind in (0, 1))
                for folder, sheet in (("imga", pictures), ("mask_scheduling", known)):
                    write_image(out / folder / names[row], to_pixels(grid(sheet, columns=min(len(sheet), 5))))
                few = pictures[torch.linspace(0, len(pictures) - 1, 4).long()]
                before = [] if inputs.truth is None else [inputs.truth[start + row]]
                overview.append(
                    torch.stack([*before, images[row].masked_fill(hole[row], GREY), *few, done.images[row]])
                )
            filled.append(done.images)
            bar.update(len(images))
    if overview:
        sheet = grid(torch.cat(overview), columns=len(overview[-1])).repeat_interleave(2, 1).repeat_interleave(2, 2)
        write_image(out / "overview.png", to_pixels(sheet))
    return torch.cat(filled)


def write_manifest(args, inputs: Inputs, decoding: DecodingConfig, seconds: float, device: torch.device) -> None:
    """OUT/manifest.json: all that is needed to repeat the run, and where the truth is."""
    out, truth = Path(args.out), args.gtcsv_path
    if truth is None and inputs.truth is not None:
        truth = out / "truth"
        for name, image in zip(inputs.names, inputs.truth, strict=True):
            write_image(truth / name, to_pixels(image))
    weights = {name: file_hash(Path(args.checkpoint) / f"{name}.safetensors") for name in ("vqgan", "transformer")}
    manifest = {
        "decoding": decoding.model_dump(),
        "seed": args.seed,
        "margin": args.margin,
        "checkpoint": str(args.checkpoint),
        "weights_sha256": weights,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        "device": str(device),
        "seconds": round(seconds, 3),
        "images": args.test_maskedimage_path or "skimage.data.chelsea",
        "masks": args.test_mask_path or "masks.make_holes, seed 0",
        "predicted": args.predicted_path and str(Path(args.predicted_path).resolve()),  # None: OUT/test_results
        "truth": None if truth is None else str(Path(truth).resolve()),
        "results": inputs.names,
    }
    (out / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")


def print_table(inputs: Inputs, filled: Tensor, seconds: float) -> None:
    """Hole PSNR (mean over the images that have a hole) by family of holes, and the time an image."""
    log.info(f"{'holes':<10} {'n':>4} {'hole %':>7} {'hole PSNR dB':>13}")
    for group in dict.fromkeys(inputs.groups):
        chosen = torch.tensor([other == group for other in inputs.groups])
        scored = chosen & inputs.hole.flatten(1).any(dim=1)
        quality, share = "-", inputs.hole[chosen].float().mean() * 100
        if inputs.truth is not None and scored.any():
            values = hole_psnr(to_float(filled[scored]), to_float(inputs.truth[scored]), inputs.hole[scored])
            quality = f"{values.mean():.2f}"
        log.info(f"{group:<10} {int(chosen.sum()):>4} {share:>7.1f} {quality:>13}")
    log.info(f"{seconds / len(inputs.names):.3f} s an image, {seconds:.1f} s in all, pictures included")


def build_parser() -> argparse.ArgumentParser:
    """The command line; every flag with a hyphen is understood with an underscore too."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0]
        + "\nWithout arguments: skimage's cat chelsea under every family of holes.",
        epilog="With the lab's folders:\n  python inpainting.py --test-maskedimage-path lab3_dataset/masked_image \\\n"
        "    --test-mask-path lab3_dataset/mask64 --gtcsv-path test_gt.csv --mask-func linear --sweet-spot 10",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    where = parser.add_argument_group("files")
    add_flag(where, "--checkpoint", default=PRETRAINED, metavar="DIR", type=Path,
             help="folder with vqgan.safetensors and transformer.safetensors (default: pretrained/cats64)")  # fmt: skip
    add_flag(where, "--out", default=Path("results"), type=Path, metavar="DIR", help="default: results")
    add_flag(where, "--test-maskedimage-path", metavar="DIR", help="images with holes (or whole: holes are cut out)")
    add_flag(where, "--test-mask-path", metavar="DIR", help="their masks, in the same order: 0 = hole, 255 = known")
    add_flag(where, "--gtcsv-path", metavar="PATH", help="true images, to score: folder, .npz or the lab's test_gt.csv")
    add_flag(where, "--predicted-path", metavar="DIR", help="composited results (default: OUT/test_results)")
    how = parser.add_argument_group("decoding (defaults: those of the checkpoint)")
    add_flag(how, "--total-iter", type=int, metavar="T", help="iterations of the schedule")
    add_flag(how, "--sweet-spot", type=int, metavar="S", help="stop after this many; what is left is filled then")
    add_flag(how, "--mask-func", choices=list(SCHEDULES), help="mask schedule")
    add_flag(how, "--sampler", choices=["maskgit", "lab", "random"],
             help="order of decoding: log p + noise, p + noise, or any")  # fmt: skip
    add_flag(how, "--temperature", type=float, metavar="X", help="weight of that noise; it shrinks as 1 - t/T")
    add_flag(how, "--sampling-temperature", type=float, metavar="X", help="temperature of the codes; 0: most probable")
    add_flag(how, "--top-k", type=int, metavar="K", help="draw from the K most probable codes; 0: from all")
    add_flag(how, "--seed", type=int, default=0, help="image i takes seed + i (default: 0)")
    add_flag(how, "--margin", type=int, default=0, help="rings of tokens hidden around the hole (default: 0)")
    run_time = parser.add_argument_group("running")
    add_flag(run_time, "--batch-size", type=int, default=32, help="images at once (default: 32)")
    add_flag(run_time, "--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: auto)")
    add_flag(run_time, "--num-workers", type=int, default=4, help="threads that read images (default: 4)")
    add_flag(run_time, "--grids", type=int, default=6, metavar="N",
             help="draw every iteration of N images (default: 6; each costs a decode)")  # fmt: skip
    return parser


def override(decoding: DecodingConfig, args: argparse.Namespace) -> DecodingConfig:
    """The checkpoint's decoding with the given flags; --total-iter alone moves the sweet spot with it."""
    given = {name: getattr(args, name) for name in DecodingConfig.model_fields if getattr(args, name) is not None}
    if "total_iter" in given:
        given.setdefault("sweet_spot", given["total_iter"])
    return DecodingConfig.model_validate(decoding.model_dump() | given)


def main(argv: list[str] | None = None) -> None:
    """The command line; see --help."""
    start_logging()
    parser = build_parser()
    args = parser.parse_args(argv)
    if (args.test_maskedimage_path is None) != (args.test_mask_path is None):
        parser.error("--test-maskedimage-path and --test-mask-path go together")
    if args.gtcsv_path and not args.test_mask_path:
        parser.error("--gtcsv-path is the truth of --test-maskedimage-path, which is missing")
    if args.batch_size < 1 or min(args.seed, args.margin, args.grids) < 0:
        parser.error("--batch-size must be at least 1, --seed, --margin and --grids at least 0")
    try:
        inpainter = Inpainter.from_pretrained(args.checkpoint, args.device)
        decoding = override(inpainter.decoding, args)
        if args.test_mask_path:
            paths = args.test_maskedimage_path, args.test_mask_path, args.gtcsv_path
            inputs = folders(*paths, inpainter.size, args.num_workers)
        else:
            inputs = chelsea(inpainter.size)
        args.out.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        parser.error(explain(error) if isinstance(error, pydantic.ValidationError) else str(error))
    start = time.perf_counter()
    filled = run(inpainter, inputs, args, decoding)
    seconds = time.perf_counter() - start
    write_manifest(args, inputs, decoding, seconds, inpainter.device)
    print_table(inputs, filled, seconds)
    log.info(f"pictures: {args.predicted_path or args.out / 'test_results'}   decoder output: {args.out / 'raw'}   "
             f"steps: {args.out / 'imga'}   run: {args.out / 'manifest.json'}")  # fmt: skip


if __name__ == "__main__":
    main()
