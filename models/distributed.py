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


def sample_rows(vectors: Tensor, count: int) -> Tensor:
    """`count` random rows of `vectors` (p, m, e) of all processes together, with replacement: the same in each process.

    p: micro-batches. The draw is process 0's, as if all processes' rows of each of these, in order, were its own.
    """
    parts, rows, _ = vectors.shape
    picks = torch.randint(parts * world() * rows, (count,), device=vectors.device)
    if world() == 1:
        return vectors.flatten(0, 1)[picks]
    dist.broadcast(picks, src=0)
    part, owner, row = picks // (world() * rows), picks // rows % world(), picks % rows
    return summed(torch.where((owner == rank())[:, None], vectors[part, row], 0.0))
