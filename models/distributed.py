"""How a process of torchrun speaks with its copies; where there is one process, nothing here does anything.

Every process must call the same functions in the same order.
"""

import torch
import torch.distributed as dist
from torch import Tensor


def world() -> int:
    """The number of processes that train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This process's number, 0 .. world - 1. Process 0 validates, logs and saves."""
    return dist.get_rank() if dist.is_initialized() else 0


def summed(tensor: Tensor) -> Tensor:
    """The sum of `tensor` over all processes, bit-equal in each of them."""
    if world() > 1:
        tensor = tensor.clone()
        dist.all_reduce(tensor)
    return tensor


def mean(tensor: Tensor) -> Tensor:
    """The mean of `tensor` over all processes."""
    return summed(tensor) / world()


def drawn(vectors: Tensor, count: int) -> Tensor:
    """`count` random rows of `vectors` (m, e) of all processes together, with replacement: the same in each process.

    The draw is process 0's, and as if the rows of all processes, in order, were its own.
    """
    picks = torch.randint(len(vectors) * world(), (count,), device=vectors.device)
    if world() == 1:
        return vectors[picks]
    dist.broadcast(picks, src=0)
    mine = picks // len(vectors) == rank()
    return summed(torch.where(mine[:, None], vectors[picks % len(vectors)], 0.0))
