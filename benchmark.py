"""Measures speed: ours against the way the field does it, side by side, and against what this machine can do.

    python benchmark.py                 # everything; about 15 minutes on 2 CPU cores
    python benchmark.py --quick         # small networks, a minute

The reference loop does what every public solution does. Inpainting: one image at a time in float32, logits of all
tokens, a full VQGAN decode at every iteration, the pictures stacked and saved. Training: float32, the VQGAN encoding
every batch of every epoch. Weights do not matter for speed: lab.yml's networks are random. Peak memory is that of a
fresh process (on CUDA, of torch's allocator).
"""

if __name__ == "__main__":
    import interrupts

    interrupts.in_one_line()

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.utils import save_image

from config import Config, add_flag, load_config, whole
from evaluation.speed import Measurement, ceilings, gflop, interleaved, operators, peak_mb, table
from files import write_text
from interrupts import run_script
from maskgit.data import GREY, Inputs, to_float
from maskgit.dataset import Maps
from maskgit.folders import Options, chelsea, inpaint
from maskgit.inpainter import Inpainter
from maskgit.masks import make_holes, schedule, to_hidden
from models.transformer import Dropout, Transformer
from models.vqgan import VQGAN
from training.autoencoder import VQGANTrainer
from training.transformer import TransformerTrainer
from utils import ROOT, check_folder, log, machine, pick_device, start_logging, uses_bfloat16

STEPS = 10  # decoding iterations of the comparison


@dataclass(frozen=True)
class Settings:
    """How to measure: what child processes need too."""

    device: str
    precision: str
    compiled: bool
    threads: int
    perceptual: str | None  # backbone weights for stage 1's LPIPS; None: without LPIPS
    operators: bool = False  # profile ours: where does the time go?


# --- inpainting -------------------------------------------------------------------------------------------------------


def faces(count: int, size: int) -> Inputs:
    """`count` crops of scikit-image's cat under random-walk holes."""
    images = chelsea(size)[:6].truth.repeat(-(-count // 6), 1, 1, 1)[:count]
    hole = make_holes("walk", count, size)
    names = [f"image_{index:03}.png" for index in range(count)]
    return Inputs(images.masked_fill(hole, GREY), hole, names, ["walk"] * count, None)


def networks(config: Config) -> tuple[VQGAN, Transformer]:
    """Random frozen networks of these sizes."""
    torch.manual_seed(0)
    return tuple(
        network.eval().requires_grad_(False) for network in (VQGAN(config.vqgan), Transformer(config.transformer))
    )


def ours_inpainting(
    config: Config, settings: Settings, count: int, batch: int | None = None, steps: int = STEPS
) -> Callable:
    """inpainting.py's own loop on `count` images, PNG files included."""
    inpainter = Inpainter(*networks(config), config.decoding, settings.device, settings.precision, settings.compiled)
    inputs, decoding = faces(count, inpainter.size), config.decoding.changed(total_iter=steps)

    def fill() -> None:
        with TemporaryDirectory() as folder:
            for _ in inpaint(inpainter, inputs, decoding, Options(Path(folder), batch_size=batch)):
                pass

    return fill


def reference_inpainting(config: Config, settings: Settings, count: int, steps: int = STEPS) -> Callable:
    """The field's loop, image by image; known and decided tokens are kept, as in the best of them."""
    device = torch.device(settings.device)
    vqgan, transformer = (network.to(device) for network in networks(config))
    inputs = faces(count, config.vqgan.image_size)

    @torch.no_grad()
    def fill(folder: str, image: Tensor, hole: Tensor, name: str) -> None:
        tokens = vqgan.encode(to_float(image[None]).to(device))
        hidden = to_hidden(hole[None], vqgan.config.grid).to(device)
        count, pictures, masks = hidden.sum(), [], []
        for step in range(1, steps + 1):
            logits = transformer(tokens.masked_fill(hidden, transformer.mask_id))
            p, proposed = logits.softmax(dim=-1).max(dim=-1)
            tokens = torch.where(hidden, proposed, tokens)
            r = step / steps
            gumbel = -torch.log(-torch.log(torch.rand_like(p)))
            confidence = (p + config.decoding.temperature * (1 - r) * gumbel).masked_fill(~hidden, torch.inf)
            stay = int(count * schedule("cosine")(r))
            hidden = torch.zeros_like(hidden).scatter_(1, confidence.argsort(dim=1)[:, :stay], True)
            pictures.append(vqgan.decode(tokens)[0])
            masks.append((~hidden).float().view(1, vqgan.config.grid, -1))
        save_image(torch.stack(pictures), f"{folder}/steps_{name}")
        save_image(torch.stack(masks), f"{folder}/masks_{name}")
        save_image(pictures[-1], f"{folder}/{name}")

    def fill_all() -> None:
        with TemporaryDirectory() as folder:
            for image, hole, name in zip(inputs.images, inputs.hole, inputs.names, strict=True):
                fill(folder, image, hole, name)

    return fill_all


def transformer_passes(config: Config, settings: Settings, count: int) -> Callable:
    """One prediction of a batch under random-walk holes, nothing else."""
    inpainter = Inpainter(*networks(config), config.decoding, settings.device, settings.precision, settings.compiled)
    inputs = faces(count, inpainter.size)
    tokens, hidden = inpainter.encode(inputs.images), inpainter.hide(inputs.hole)
    return torch.no_grad()(partial(inpainter.predict, tokens.masked_fill(hidden, inpainter.transformer.mask_id)))


# --- training ---------------------------------------------------------------------------------------------------------


def training_config(config: Config, settings: Settings, batch: int) -> Config:
    perceptual = {"weights": settings.perceptual} | ({} if settings.perceptual else {"weight": 0.0})
    shared = {"precision": settings.precision, "batch_size": batch}
    changes = {
        "vqgan_training": shared | {"perceptual": config.vqgan_training.perceptual.model_copy(update=perceptual)},
        "transformer_training": shared,
    }
    return config.model_copy(update={key: getattr(config, key).model_copy(update=new) for key, new in changes.items()})


def random_images(count: int, size: int) -> Tensor:
    return torch.randint(256, (count, 3, size, size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def ours_stage_1(config: Config, settings: Settings, batch: int) -> Callable:
    config, images = training_config(config, settings, batch), random_images(batch, config.vqgan.image_size)
    trainer = VQGANTrainer(config, torch.device(settings.device), Maps.of(images), images)
    return lambda: trainer.update(0, trainer.fetch(0, torch.arange(batch)))


def reference_stage_1(config: Config, settings: Settings, batch: int) -> Callable:
    """Float32, contiguous, plain Adam; the same losses."""
    config, images = training_config(config, settings, batch), random_images(batch, config.vqgan.image_size)
    device = torch.device(settings.device)
    trainer = VQGANTrainer(config, device, Maps.of(images), images)  # for its losses
    model = VQGAN(config.vqgan).to(device)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], foreach=False)

    def step() -> None:
        x = to_float(images).to(device)
        output, _, codebook = model(x)
        loss = trainer.reconstruction_loss(output, output, x, config.vqgan_training.perceptual.crop)[0] + codebook
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def ours_stage_2(config: Config, settings: Settings, batch: int, rows: int | None = None) -> Callable:
    """Steps on cached tokens of `rows` images (default: one batch)."""
    config, rows = training_config(config, settings, batch), rows or batch
    generator = torch.Generator().manual_seed(0)
    shape = (rows * (1 + config.data.flip), 1, config.vqgan.grid, config.vqgan.grid)
    tokens = torch.randint(config.transformer.codes, shape, generator=generator).short()
    val, images = tokens[0].flatten(1), random_images(1, config.vqgan.image_size)
    trainer = TransformerTrainer(
        config, torch.device(settings.device), networks(config)[0], Maps.of(tokens), val, images
    )
    return lambda: trainer.update(0, trainer.fetch(0, torch.randint(rows, (batch,), generator=generator)))


def reference_stage_2(config: Config, settings: Settings, batch: int) -> Callable:
    """Float32, torch's dropout, the VQGAN encodes the batch, every token hidden with probability 1/2, loss on all."""
    device, images = torch.device(settings.device), to_float(random_images(batch, config.vqgan.image_size))
    vqgan, model = networks(config)[0].to(device), Transformer(config.transformer).to(device)
    for module in model.modules():
        if isinstance(module, Dropout):
            module.__class__ = nn.Dropout
    optimizer = torch.optim.Adam(model.parameters(), 1e-4, foreach=False)

    def step() -> None:
        with torch.no_grad():
            tokens = vqgan.encode(images.to(device))
        hidden = torch.rand(tokens.shape, device=device) < 0.5
        logits = model(tokens.masked_fill(hidden, model.mask_id))
        optimizer.zero_grad()
        F.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()
        optimizer.step()

    return step


# --- putting it together ----------------------------------------------------------------------------------------------


def start(settings: Settings) -> torch.device:
    torch.set_num_threads(settings.threads)
    return torch.device(settings.device)


def compare(
    part: str, works: dict[str, tuple], settings: Settings, repeats: int, ceiling: float | None, memory: bool
) -> list[Measurement]:
    """A row for each work, timed in turns; a work is (images, build, config, ...)."""
    device = start(settings)
    built = {name: build(config, settings, images, *rest) for name, (images, build, config, *rest) in works.items()}
    seconds = interleaved(built, repeats, device)
    rows = []
    for name, (images, build, config, *rest) in works.items():
        peak = peak_mb(build, settings.threads, settings.device, config, settings, images, *rest) if memory else None
        ours = not name.startswith("reference")
        shares = operators(built[name]) if ours and settings.operators else None
        rows.append(
            Measurement(part, name, images, seconds[name], gflop(built[name]), ceiling if ours else None, peak, shares)
        )
    return rows


def scaling(config: Config, settings: Settings, quick: bool, ceiling: float | None) -> list[Measurement]:
    """How cost grows with the batch, the iterations and the number of cached images."""
    batches, steps, rows, count = (1, 8, 64, 256), (1, 5, 10, 20), (1000, 10_000, 100_000), 16
    if quick:
        batches, steps, rows, count = (1, 8), (1, 5), (100, 1000), 4
    works = {f"inpainting, T = 4, batch {b}": (b, ours_inpainting, config, b, 4) for b in batches}
    works |= {f"inpainting, T = {t}, batch {count}": (count, ours_inpainting, config, count, t) for t in steps}
    works |= {f"stage 2, {r} images cached": (count, ours_stage_2, config, r) for r in rows}
    return compare("scaling", works, settings, 1 if quick else 2, ceiling, memory=not quick)


def main(argv: list[str] | None = None) -> None:
    """The command line; see --help."""
    start_logging()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small networks, one repeat, no memory")
    add_flag(parser, "--models", nargs="+", metavar="NAME", help="configs to measure (default: cats64 lab)")
    parts = ["inpainting", "training", "scaling"]
    add_flag(parser, "--parts", nargs="+", choices=parts, default=parts)
    add_flag(parser, "--repeats", type=whole(1), default=5, help="of each measurement (default: 5)")
    add_flag(parser, "--device", default="auto", help="auto, cpu, cuda, ... (default: auto)")
    add_flag(parser, "--precision", choices=["auto", "float32", "bfloat16"], default="auto")
    add_flag(parser, "--compile", action="store_true", help="torch.compile our inpainting")
    add_flag(parser, "--threads", type=whole(1), default=torch.get_num_threads())
    add_flag(parser, "--operators", action="store_true", help="profile ours: where does the time go?")
    add_flag(parser, "--perceptual-weights", metavar="FILE", help="VGG16 features: stage 1 with LPIPS (else without)")
    add_flag(parser, "--json", type=Path, default=Path("results/benchmark.json"), metavar="FILE")
    args = parser.parse_args(argv)
    try:
        device = pick_device(args.device)
        check_folder(args.json.parent, "--json")
        if args.json.is_dir():
            raise ValueError(f"--json {args.json}: is a folder, expected a file")
        if args.perceptual_weights and not Path(args.perceptual_weights).is_file():
            raise ValueError(f"--perceptual-weights {args.perceptual_weights}: no such file")
        models = args.models or (["smoke"] if args.quick else ["cats64", "lab"])
        configs = {name: load_config(ROOT / "configs" / f"{name}.yml") for name in models}
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    settings = Settings(
        str(device), args.precision, args.compile, args.threads, args.perceptual_weights, args.operators
    )
    start(settings)
    repeats = 1 if args.quick else args.repeats
    limits = ceilings(device, repeats, 512 if args.quick or device.type == "cpu" else 8192)
    own = "bfloat16" if uses_bfloat16(device, args.precision) else "float32"
    ceiling = limits.get(f"{own} product")
    log.info("ceilings in GFLOP/s: " + "  ".join(f"{name} {value:.0f}" for name, value in limits.items()))
    rows: list[Measurement] = []

    def note(new: list[Measurement]) -> None:
        rows.extend(new)
        report = {"machine": machine(device), "settings": asdict(settings), "ceilings_gflop_s": limits}
        text = json.dumps(report | {"rows": [asdict(row) for row in rows]}, indent=2) + "\n"
        write_text(args.json, text)
        log.info(table(new))

    for name, config in configs.items():
        large = name == "lab" and device.type == "cpu"
        one, many = (1, 8) if large else (2, 64 if not args.quick else 8)
        if "inpainting" in args.parts:
            works = {
                "inpainting": (many, ours_inpainting, config),
                "reference inpainting": (one, reference_inpainting, config),
                "transformer passes": (many, transformer_passes, config),
            }
            note(compare(name, works, settings, repeats, ceiling, not args.quick))
        if "training" in args.parts:
            batches = (2, 4) if large else (8, 32)
            for stage, batch, ours, reference in (
                ("stage 1", batches[0], ours_stage_1, reference_stage_1),
                ("stage 2", batches[1], ours_stage_2, reference_stage_2),
            ):
                works = {stage: (batch, ours, config), f"reference {stage}": (batch, reference, config)}
                note(compare(name, works, settings, repeats, ceiling, not args.quick))
    if "scaling" in args.parts:
        note(scaling(configs[models[0]], settings, args.quick, ceiling))
    log.info(f"all repeats: {args.json}")


if __name__ == "__main__":
    run_script(main)
