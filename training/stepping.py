"""What a step of a training is made of: averaged weights, learning rates, gradients, batches in parts."""

import contextlib
import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import ChainedScheduler, LinearLR, LRScheduler, MultiStepLR
from torch.optim.swa_utils import AveragedModel

from config import TrainingConfig
from models.distributed import mean, rank, world


class NotFiniteError(FloatingPointError):
    """A loss or a gradient became NaN or infinite; checkpoints written before are intact."""


def averaged(model: nn.Module, decay: float) -> AveragedModel:
    """Exponential moving average of `model`'s parameters and buffers; the decay grows as (1 + t) / (10 + t)."""

    @torch.no_grad()
    def average(averages: list[Tensor], currents: list[Tensor], count: Tensor) -> None:
        rate = 1 - min(decay, (1 + int(count)) / (10 + int(count)))
        if averages[0].is_floating_point():  # one call has tensors of one type
            torch._foreach_lerp_(averages, currents, rate)
        else:
            torch._foreach_copy_(averages, currents)

    return AveragedModel(model, multi_avg_fn=average, use_buffers=True).requires_grad_(False).eval()


def lr_schedule(optimizer: torch.optim.Optimizer, settings: TrainingConfig, per_epoch: int) -> LRScheduler:
    """A linear warm-up and MultiStepLR, multiplied; `per_epoch` steps an epoch."""
    warmup = max(1, round(settings.warmup * per_epoch))
    milestones = [round(epoch * per_epoch) for epoch in settings.milestones]
    linear = LinearLR(optimizer, start_factor=1 / warmup, total_iters=warmup - 1)
    return ChainedScheduler([linear, MultiStepLR(optimizer, milestones, settings.gamma)])


def apply_gradients(loss: Tensor, optimizer: torch.optim.Optimizer, parameters: Iterable[Tensor], clip: float) -> None:
    """One step of `optimizer` on gradients already there. Raises NotFiniteError before it touches a weight.

    A loss that is not finite in one process stops all: each sees the mean of their losses.
    """
    norm = nn.utils.clip_grad_norm_(parameters, clip or math.inf)
    loss = mean(loss)
    if not (torch.isfinite(loss) and torch.isfinite(norm)):
        raise NotFiniteError(f"loss {loss.item()}, norm of the gradient {norm.item()}")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def parallel(model: nn.Module, compiled: bool = False) -> nn.Module:
    """What to call in training in place of `model`: compiled where asked, gradients averaged over all processes.

    `model` itself stays what is averaged, saved and validated. Raises ValueError where torch.compile lacks a compiler.
    """
    network = model
    if compiled:
        torch._functorch.config.donated_buffer = False  # adaptive_weight goes backward twice
        try:
            torch.compile(torch.sin)(next(model.parameters()).detach())
        except (RuntimeError, OSError) as error:
            raise ValueError(f"compile: torch.compile does not work here ({str(error).splitlines()[0]})") from error
        network = torch.compile(model)
    return DistributedDataParallel(network, broadcast_buffers=False) if world() > 1 else network


def micro_batches(network: nn.Module, batch: list) -> Iterator:
    """The micro-batches of a step; the processes exchange the gradients of `network` after the last one only."""
    for number, part in enumerate(batch, start=1):
        waits = isinstance(network, DistributedDataParallel) and number < len(batch)
        with network.no_sync() if waits else contextlib.nullcontext():
            yield part


def shard(whole: Tensor, count: int) -> list[Tensor]:
    """This process's rows of each of the `count` micro-batches of a batch."""
    return [part.chunk(world())[rank()] for part in whole.chunk(count)]


def staged(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor`, in memory from which a GPU copies while it computes."""
    return tensor.pin_memory() if device.type == "cuda" else tensor
