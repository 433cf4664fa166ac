"""Measures speed: ours against the way the field does it, side by side, and against what this machine can do.

    python benchmark.py                 # everything; about 15 minutes on 2 CPU cores
    python benchmark.py --quick         # small networks, a minute

The reference loop does what every public solution does. Inpainting: one image at a time in float32, logits of all
tokens, a full VQGAN decode at every iteration, the pictures stacked and saved. Training: float32, the VQGAN encoding
every batch of every epoch. Weights do not matter for speed: lab.yml's networks are random. Peak memory is that of a
fresh process (on CUDA, of torch's allocator).
"""

import argparse
import json
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.utils import save_image

from config import Config, add_flag, load_config
from inpainting import build_parser, run
from maskgit.data import GREY, Maps, to_float
from maskgit.folders import Inputs, chelsea
from maskgit.inpainter import Inpainter
from maskgit.masks import make_holes, schedule, to_hidden
from models.transformer import Dropout, Transformer
from models.vqgan import VQGAN
from training.autoencoder import Stage1
from training.transformer import Stage2
from utils import ROOT, has_bfloat16, images_at_once, log, machine, pick_device, start_logging, uses_bfloat16

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


@dataclass
class Row:
    """One thing measured, n = len(seconds)."""

    part: str
    name: str
    images: int  # a repeat
    seconds: list[float]
    gflop: float | None = None  # a repeat, counted by torch
    ceiling: float | None = None  # GFLOP/s of the machine at this precision
    peak_mb: float | None = None
    operators: dict[str, float] | None = None  # shares of the time, the largest first

    @property
    def rate(self) -> float:
        """Images a second, by the median."""
        return self.images / statistics.median(self.seconds)

    @property
    def share(self) -> float | None:
        """Of the ceiling, in [0, 1]."""
        return self.gflop and self.ceiling and self.gflop / statistics.median(self.seconds) / self.ceiling


def interleaved(works: dict[str, Callable[[], object]], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each work, taken in turns (A B A B ...) so that a machine's moods touch all alike; once unmeasured."""
    seconds = {name: [] for name in works}
    for turn in range(repeats + 1):
        for name, work in works.items():
            start = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def gflop(work: Callable[[], object]) -> float:
    """Floating-point operations of `work` in 10^9: matrix products and convolutions, forward and backward."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops() / 1e9


def operators(work: Callable[[], object], most: int = 8) -> dict[str, float]:
    """The torch operators in which `work` spends most of its time, and their shares of it, in [0, 1]."""
    with torch.profiler.profile() as profiler:
        work()
    own = {e.key: getattr(e, "self_device_time_total", 0) or e.self_cpu_time_total for e in profiler.key_averages()}
    largest = sorted(own, key=own.get, reverse=True)[:most]
    return {key: round(own[key] / sum(own.values()), 3) for key in largest}


# --- the machine ------------------------------------------------------------------------------------------------------


def ceilings(device: torch.device, repeats: int, size: int) -> dict[str, float]:
    """GFLOP/s of matrix products and 3x3 convolutions, the best of a few shapes and layouts, by precision."""
    dtypes = {"float32": torch.float32} | ({"bfloat16": torch.bfloat16} if has_bfloat16(device) else {})
    works, flop = {}, {}
    for precision, dtype in dtypes.items():
        for n in (size, size // 2):
            a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
            works[f"{precision} product {n}"] = partial(torch.mm, a, b)
            flop[f"{precision} product {n}"] = 2 * n**3
        for layout in (torch.contiguous_format, torch.channels_last):
            images, kernel = torch.randn(size // 64, 128, 64, 64), torch.randn(128, 128, 3, 3)
            images, kernel = (x.to(device, dtype, memory_format=layout) for x in (images, kernel))
            name = f"{precision} convolution {layout}"
            works[name] = partial(F.conv2d, images, kernel, padding=1)
            flop[name] = 2 * images.numel() * 128 * 9
    best = {}
    for name, seconds in interleaved(works, repeats, device).items():
        kind = " ".join(name.split()[:2])
        best[kind] = max(best.get(kind, 0.0), flop[name] / min(seconds) / 1e9)
    return best


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
    inputs, folder = faces(count, inpainter.size), tempfile.mkdtemp()
    decoding = config.decoding.model_copy(update={"total_iter": steps, "sweet_spot": steps})
    batch = batch or images_at_once(torch.device(settings.device))
    args = build_parser().parse_args(["--out", folder, "--grids", "0", "--batch-size", str(batch)])
    return partial(run, inpainter, inputs, args, decoding)


def reference_inpainting(config: Config, settings: Settings, count: int, steps: int = STEPS) -> Callable:
    """The field's loop, image by image; known and decided tokens are kept, as in the best of them."""
    device, folder = torch.device(settings.device), Path(tempfile.mkdtemp())
    vqgan, transformer = (network.to(device) for network in networks(config))
    inputs = faces(count, config.vqgan.image_size)

    @torch.no_grad()
    def fill(image: Tensor, hole: Tensor, name: str) -> None:
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
        save_image(torch.stack(pictures), folder / f"steps_{name}")
        save_image(torch.stack(masks), folder / f"masks_{name}")
        save_image(pictures[-1], folder / name)

    return lambda: [fill(*item) for item in zip(inputs.images, inputs.hole, inputs.names, strict=True)]


def transformer_passes(config: Config, settings: Settings, count: int) -> Callable:
    """One prediction of a batch under random-walk holes, nothing else."""
    inpainter = Inpainter(*networks(config), config.decoding, settings.device, settings.precision, settings.compiled)
    inputs = faces(count, inpainter.size)
    tokens, hidden = inpainter.encode(inputs.images, inputs.hole), inpainter.hide(inputs.hole)
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
    stage = Stage1(config, torch.device(settings.device), Maps.of(images), images)
    return lambda: stage.update(0, stage.fetch(0, torch.arange(batch)))


def reference_stage_1(config: Config, settings: Settings, batch: int) -> Callable:
    """Float32, contiguous, plain Adam; the same losses."""
    config, images = training_config(config, settings, batch), random_images(batch, config.vqgan.image_size)
    device = torch.device(settings.device)
    stage = Stage1(config, device, Maps.of(images), images)  # for its losses
    model = VQGAN(config.vqgan).to(device)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], foreach=False)

    def step() -> None:
        x = to_float(images).to(device)
        output, _, codebook = model(x)
        loss = stage.reconstruction_loss(output, output, x, config.vqgan_training.perceptual.crop)[0] + codebook
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
    stage = Stage2(config, torch.device(settings.device), networks(config)[0], Maps.of(tokens), val, images)
    return lambda: stage.update(0, stage.fetch(0, torch.randint(rows, (batch,), generator=generator)))


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


def _peak(build: Callable, *args) -> float:
    device = start(args[1])
    build(*args)()
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    with suppress(OSError):  # of this process alone; getrusage begins with what the parent had
        (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
        return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def peak_mb(build: Callable, *args) -> float:
    """MiB at most while `build(*args)()` runs in a process of its own, torch itself (some 300 MiB) included."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(_peak, build, *args).result()


def compare(
    part: str, works: dict[str, tuple], settings: Settings, repeats: int, ceiling: float | None, memory: bool
) -> list[Row]:
    """A row for each work, timed in turns; a work is (images, build, config, ...)."""
    device = start(settings)
    built = {name: build(config, settings, images, *rest) for name, (images, build, config, *rest) in works.items()}
    seconds = interleaved(built, repeats, device)
    rows = []
    for name, (images, build, config, *rest) in works.items():
        peak = peak_mb(build, config, settings, images, *rest) if memory else None
        ours = not name.startswith("reference")
        shares = operators(built[name]) if ours and settings.operators else None
        rows.append(Row(part, name, images, seconds[name], gflop(built[name]), ceiling if ours else None, peak, shares))
    return rows


def scaling(config: Config, settings: Settings, quick: bool, ceiling: float | None) -> list[Row]:
    """How cost grows with the batch, the iterations and the number of cached images."""
    batches, steps, rows, count = (1, 8, 64, 256), (1, 5, 10, 20), (1000, 10_000, 100_000), 16
    if quick:
        batches, steps, rows, count = (1, 8), (1, 5), (100, 1000), 4
    works = {f"inpainting, T = 4, batch {b}": (b, ours_inpainting, config, b, 4) for b in batches}
    works |= {f"inpainting, T = {t}, batch {count}": (count, ours_inpainting, config, count, t) for t in steps}
    works |= {f"stage 2, {r} images cached": (count, ours_stage_2, config, r) for r in rows}
    return compare("scaling", works, settings, 1 if quick else 2, ceiling, memory=not quick)


def table(rows: list[Row]) -> str:
    """Markdown; the ratio is to the row's own reference, which follows it."""
    lines = [
        "| part | what | images/s | n | ratio | GFLOP an image | of the ceiling | peak MiB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row, after in zip(rows, [*rows[1:], None], strict=True):
        paired = after and after.part == row.part and after.name == f"reference {row.name}"
        cells = [
            row.part,
            row.name,
            f"{row.rate:.3g}",
            str(len(row.seconds)),
            f"{row.rate / after.rate:.2f}" if paired else "",
            f"{row.gflop / row.images:.1f}" if row.gflop else "",
            f"{row.share:.0%}" if row.share else "",
            f"{row.peak_mb:.0f}" if row.peak_mb else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    for row in (row for row in rows if row.operators):
        shares = ", ".join(f"{key.removeprefix('aten::')} {share:.0%}" for key, share in row.operators.items())
        lines.append(f"\n{row.part} {row.name}: {shares}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """The command line; see --help."""
    start_logging()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small networks, one repeat, no memory")
    add_flag(parser, "--models", nargs="+", metavar="NAME", help="configs to measure (default: cats64 lab)")
    parts = ["inpainting", "training", "scaling"]
    add_flag(parser, "--parts", nargs="+", choices=parts, default=parts)
    add_flag(parser, "--repeats", type=int, default=5, help="of each measurement (default: 5)")
    add_flag(parser, "--device", default="auto", help="auto, cpu, cuda, ... (default: auto)")
    add_flag(parser, "--precision", choices=["auto", "float32", "bfloat16"], default="auto")
    add_flag(parser, "--compile", action="store_true", help="torch.compile our inpainting")
    add_flag(parser, "--threads", type=int, default=torch.get_num_threads())
    add_flag(parser, "--operators", action="store_true", help="profile ours: where does the time go?")
    add_flag(parser, "--perceptual-weights", metavar="FILE", help="VGG16 features: stage 1 with LPIPS (else without)")
    add_flag(parser, "--json", type=Path, default=Path("results/benchmark.json"), metavar="FILE")
    args = parser.parse_args(argv)
    try:
        device = pick_device(args.device)
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
    rows: list[Row] = []

    def note(new: list[Row]) -> None:
        rows.extend(new)
        args.json.parent.mkdir(parents=True, exist_ok=True)
        report = {"machine": machine(device), "settings": asdict(settings), "ceilings_gflop_s": limits}
        args.json.write_text(json.dumps(report | {"rows": [asdict(row) for row in rows]}, indent=2) + "\n")
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
    main()
