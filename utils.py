"""Small things every script needs: seeds, devices, processes, numeric precision, logging, profiles."""

import contextlib
import datetime
import logging
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

log = logging.getLogger("maskgit")
ROOT = Path(__file__).resolve().parent  # of the repository

torch.backends.cudnn.allow_tf32 = False  # by default a convolution in float32 rounds to 10 bits on a GPU: tokens flip

# oneDNN keeps 1024 kernels of megabytes each, and on a CPU every new number of hidden tokens makes more of them
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")


def start_logging() -> None:
    """Plain lines on standard output; of torchrun's processes the first alone speaks, the others warn."""
    level = logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stdout, force=True)


def mix(*numbers: int) -> int:
    """A well-mixed 63-bit seed from integers >= 0: every random draw is a function of (seed, step)."""
    if numbers and numbers[-1] == 0:  # SeedSequence pads with zeros: those at the end would not count
        sequence = np.random.SeedSequence((*numbers, len(numbers)), pool_size=8)
    else:
        sequence = np.random.SeedSequence(numbers)
    return int(sequence.generate_state(1, np.uint64).item() >> 1)


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one. Raises ValueError for a device that this machine lacks."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device {name}: expected auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise ValueError(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices")
    return device


def join_processes(name: str) -> torch.device:
    """The device of this process, `name` as for `pick_device`; where torchrun started it, it joins the others.

    On GPUs (NCCL) each process takes its own of the machine, else they speak through Gloo. Raises ValueError for a
    device that this machine lacks.
    """
    device = pick_device(name)
    if "LOCAL_RANK" not in os.environ:
        return device
    if device.type == "cuda":
        if device.index is not None:
            raise ValueError(f"--device {name}: torchrun gives each process a GPU of its own, expected auto or cuda")
        device = pick_device(f"cuda:{os.environ['LOCAL_RANK']}")
        torch.cuda.set_device(device)
    if not dist.is_initialized():  # a day, because the others wait while the first decodes or validates
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(days=1))
    return device


def leave_processes() -> None:
    """The end of `join_processes`. Not after an error: torchrun ends the others, which may wait for this one."""
    if dist.is_initialized():
        dist.destroy_process_group()


@contextlib.contextmanager
def first_on_machine() -> Iterator[None]:
    """The block runs in the first process of each machine, then in the others: they find the files it wrote."""
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    if dist.is_initialized() and not first:
        dist.barrier()
    yield
    if dist.is_initialized() and first:
        dist.barrier()


@contextlib.contextmanager
def profile(path: Path, steps: int) -> Iterator[Callable[[], None]]:
    """Records `steps` steps, after one to warm up, for Perfetto or TensorBoard; 0: none.

    Gives a function to call after every step. `path` should end in .pt.trace.json, as TensorBoard expects.
    """

    def write(profiler: torch.profiler.profile) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(path))
        log.info(f"profile of {steps} steps: {path}; open it in https://ui.perfetto.dev")

    if not steps:
        yield lambda: None
        return
    schedule = torch.profiler.schedule(wait=0, warmup=1, active=steps, repeat=1)
    with torch.profiler.profile(schedule=schedule, on_trace_ready=write, record_shapes=True) as profiler:
        yield profiler.step


def has_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 arithmetic is native there (so that autocast pays)."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.cpu._is_avx512_bf16_supported()  # so have all processors with AMX


def uses_bfloat16(device: torch.device, precision: str) -> bool:
    """What `precision` (auto, float32 or bfloat16) means there."""
    return precision == "bfloat16" or (precision == "auto" and has_bfloat16(device))


def machine(device: torch.device) -> dict:
    """What measured figures depend on: the processor, the versions, the commit."""
    cpu, git = platform.processor(), []
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), cpu)
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        place = {"cwd": Path(__file__).parent, "stderr": subprocess.DEVNULL}  # it may be no clone, but an archive
        for command in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain"]):
            git.append(subprocess.check_output(["git", *command], **place, text=True).strip())
    return {
        "cpu": cpu,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "bfloat16": has_bfloat16(device),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": git[0] + ("+changes" if git[1] else "") if len(git) == 2 else None,
    }


def images_at_once(device: torch.device) -> int:
    """The images of a batch when inpainting: no more than the caches of a CPU hold."""
    return 8 if device.type == "cpu" else 64


def autocast(device: torch.device, precision: str = "auto"):
    """A context of this precision (auto, float32 or bfloat16), whatever precision the code around it asked for."""
    return torch.autocast(device.type, torch.bfloat16, enabled=uses_bfloat16(device, precision))


def memory_format(device: torch.device, precision: str = "auto") -> torch.memory_format:
    """The faster layout for convolutions: channels last, but for float32 on a CPU (0.8 of the speed in training)."""
    fast = device.type == "cuda" or uses_bfloat16(device, precision)
    return torch.channels_last if fast else torch.contiguous_format


def finish(steps: Generator, on_step: Callable[[object], object] | None = None) -> object:
    """What a generator returns; `on_step` is called with each thing that it yields."""
    while True:
        try:
            step = next(steps)
        except StopIteration as end:
            return end.value
        if on_step:
            on_step(step)


def check_folder(path: Path, flag: str) -> Path:
    """`path`, which is a folder or may become one. Raises ValueError, naming the `flag`, where a file is in the way."""
    found = next(place for place in (path, *path.absolute().parents) if place.exists())
    if not found.is_dir():
        raise ValueError(f"{flag} {path}: {found} is a file, expected a folder")
    return path


def one_line(error: Exception) -> str:
    """What an exception says, in one line; its kind where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__
