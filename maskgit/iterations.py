"""How many iterations a hole needs, and how many of its tokens each of them leaves hidden.

b images, n tokens; counts stay on the CPU.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from maskgit.decoding_config import AUTO, DecodingConfig
from maskgit.masks import schedule
from maskgit.orders import square_side
from maskgit.windows import Windows

REACH = 2.0  # tokens: a hole whose tokens are at most so far from known ones, on average, needs one iteration
STEPS_A_RING = 4.0  # further iterations for each token that it is deeper
LONGEST = 8


def iterations(hidden: Tensor, config: DecodingConfig, windows: Windows | None = None) -> Tensor:
    """T of each image of hidden (b, n): (b) long. With total_iter auto, as many as the hole needs (see `depth`).

    Raises ValueError for auto where n is no square number.
    """
    if config.total_iter != AUTO:
        return torch.full((len(hidden),), config.total_iter)
    return ((depth(hidden, windows) - REACH) * STEPS_A_RING).ceil().long().clamp(1, LONGEST)


def depth(hidden: Tensor, windows: Windows | None = None) -> Tensor:
    """How far what is hidden is from what is known: the mean over the hidden tokens of hidden (b, n) of the distance,
    in tokens (8 neighbours), to the nearest known one; the border of the picture is none. (b) float32, 0 for no hole.

    A token next to a known one is at distance 1; beyond a window's side distances are not told apart. Raises ValueError
    where n is no square number and no `windows` tell where the tokens are.
    """
    if windows is None:
        side = square_side(hidden.shape[1], f"total_iter {AUTO}")
        left = hidden.view(-1, 1, side, side).float()
    else:
        side, (rows, columns) = windows.side, windows.cells.T.to(hidden.device)
        left = torch.zeros(len(hidden), 1, *windows.shape, device=hidden.device)
        left[:, 0, rows, columns] = hidden.float()
    total = torch.zeros(len(hidden), device=hidden.device)
    for _ in range(side):  # a ring less each time; a picture that is all hole counts as `side` deep
        total += left.sum(dim=(1, 2, 3))
        left = 1 - F.max_pool2d(1 - left, 3, stride=1, padding=1)  # pads with -inf: beyond the border nothing is known
    return total / hidden.sum(dim=1).clamp(min=1)


def still_hidden(count: Tensor, left: Tensor, step: Tensor, total: Tensor, config: DecodingConfig) -> Tensor:
    """How many tokens of each image stay hidden after `step`: floor(schedule(step / T) count), (b) long, on the CPU.

    count (b): hidden at the start; left (b): hidden before this step; step and total (b): t and T. At least one token
    is decided wherever any is left, none comes back, and at the sweet spot nothing is left.
    """
    fraction = schedule(config.mask_func)((step / total.double()).clamp(max=1))
    # 1e-9: in binary (1 - 0.9) * 100 is 9.999999999999998, which must count as 10
    target = (count * fraction + 1e-9).floor().long()
    return torch.minimum(target, left - 1).clamp(min=0).masked_fill(step >= (config.sweet_spot or total), 0)


def steps_of_second_look(total: Tensor, config: DecodingConfig) -> Tensor:
    """The step of the schedule that each image's second look starts with: the first that leaves less than its share.

    total (b): T of each image; (b) long.
    """
    fraction = schedule(config.mask_func)

    def first(total: int) -> int:
        stop = config.sweet_spot or total
        return next((t for t in range(1, stop) if fraction(t / total) < config.second_look), stop)

    return torch.tensor([first(number) for number in total.tolist()], dtype=torch.long)
