"""Measuring speed: works timed in turns, operations counted, memory at its peak, and what the machine can do."""

import resource
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from utils import has_bfloat16


@dataclass
class Measurement:
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


def _peak(build: Callable, threads: int, device: str, *args) -> float:
    torch.set_num_threads(threads)
    build(*args)()
    if device != "cpu":
        return torch.cuda.max_memory_allocated(device) / 2**20
    with suppress(OSError):  # of this process alone; getrusage begins with what the parent had
        (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
        return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def peak_mb(build: Callable, threads: int, device: str, *args) -> float:
    """MiB at most while `build(*args)()` runs in a process of its own, torch itself (some 300 MiB) included."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(_peak, build, threads, device, *args).result()


def table(rows: list[Measurement]) -> str:
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
