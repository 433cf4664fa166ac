"""Pictures of the decoding: what each iteration knew and painted, animations, confidence maps, an overview of a run.

Shapes: images (b, 3, H, W) uint8, hole (b, 1, H, W) bool, tokens, hidden and confidence (b, n).
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.utils import make_grid

from maskgit.completion import Codec
from maskgit.data import GREY, Inputs, to_pixels, to_uint8, write_animation, write_image
from maskgit.decoding import State

SIDE = 256  # pixels that small pictures are magnified to, at least
LINE = 18  # height of a line of text in pixels
FRESH = (255, 0, 128)  # frames of tokens just decided
SHOWN, HELD = 500, 2500  # how long a frame and the last one stay, in ms


def first_of_each(groups: list[str], count: int) -> list[int]:
    """The images whose iterations are drawn: the first of each group, then the second of each, `count` in all."""
    turns, seen = [], Counter()
    for index, group in enumerate(groups):
        turns.append((seen[group], index))
        seen[group] += 1
    return sorted(index for _, index in sorted(turns)[:count])


def patches(hidden: Tensor, size: int) -> Tensor:
    """hidden (b, n) bool -> the pixels (b, 1, size, size) of hidden tokens, on the CPU."""
    side = math.isqrt(hidden.shape[1])
    return magnify(hidden.cpu().view(-1, 1, side, side), size // side)


def sheet_of(images: Tensor, columns: int, gap: int = 2) -> Tensor:
    """uint8 images (b, 3, H, W) side by side, `columns` in a row, white between: (3, h, w)."""
    if len(images) == 1:  # which make_grid leaves without a border
        return images[0]
    return make_grid(images, columns, gap, pad_value=255)[:, gap:-gap, gap:-gap]


def magnify(images: Tensor, factor: int) -> Tensor:
    """(..., H, W) -> (..., factor H, factor W), every pixel a square."""
    return images.repeat_interleave(factor, dim=-2).repeat_interleave(factor, dim=-1)


# --- how sure the model was ---


def confidence_map(images: Tensor, hidden: Tensor, confidence: Tensor, codes: int) -> Tensor:
    """Maps (b, 3, h, w) uint8, at least SIDE pixels wide, of the probability of each hidden token when it was decided.

    images (b, 3, H, W); hidden and confidence (b, n), of square patches, row by row. The scale is logarithmic, from
    dark (1 / codes: a mere guess) to light (1: certain), and drawn below; known tokens are grey.
    """
    height, width = images.shape[-2:]
    patch = math.isqrt(height * width // hidden.shape[1])
    grid = -1, 1, height // patch, width // patch
    sure = 1 + confidence.float().cpu().clamp(min=1 / codes).log() / math.log(codes)  # (b, n) in [0, 1]
    colours = magnify(to_uint8(_helix(sure)).transpose(1, 2).reshape(-1, 3, *grid[2:]), patch)
    grey = (images.float().mean(dim=1, keepdim=True) * 0.4 + 50).to(torch.uint8).expand_as(images)
    maps = magnify(torch.where(magnify(hidden.cpu().view(grid), patch), colours, grey), _factor(width))
    return torch.cat((maps, _legend(maps.shape[-1], codes).expand(len(maps), -1, -1, -1)), dim=2)


def _helix(values: Tensor) -> Tensor:
    """Colours (..., 3) in [0, 1] of values in [0, 1]: hues change while lightness rises (Green 2011, cubehelix)."""
    light = 0.25 + 0.65 * values[..., None]
    angle = 2 * math.pi * (0.1 - 0.8 * light)
    turn = torch.tensor([[-0.14861, 1.78277], [-0.29227, -0.90649], [1.97294, 0.0]])  # eq. 2
    around = torch.cat((angle.cos(), angle.sin()), dim=-1) @ turn.T
    return (light + light * (1 - light) * 0.9 * around).clamp(0, 1)


def _legend(width: int, codes: int) -> Tensor:
    """The scale of a confidence map, (3, LINE, width) uint8."""
    bar = to_uint8(_helix(torch.linspace(0, 1, width))).T[:, None].expand(3, LINE, width)
    picture = Image.fromarray(to_pixels(bar))
    draw, middle = ImageDraw.Draw(picture), LINE // 2
    draw.text((4, middle), f"p = 1/{codes:,}", "white", _font(), "lm")
    draw.text((width - 4, middle), "1", "black", _font(), "rm")
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def _font() -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(11)


def _factor(size: int) -> int:
    return max(1, -(-SIDE // size))


# --- the iterations ---


def frames(image: Tensor, hole: Tensor, hidden: Tensor, painted: Tensor, result: Tensor) -> Tensor:
    """The frames (T + 2, 3, h, w) uint8 of an animation: what is known, every iteration, the result.

    image and result (3, H, W), hole (1, H, W); hidden (T + 1, n): at the start and after each of T iterations;
    painted (T, 3, H, W): decoded then. Hidden tokens are grey, those just decided have a coloured frame.
    """
    size = image.shape[-1]
    pictures = torch.where(hole, torch.cat((image[None], painted)), image)  # known pixels as they are
    pictures = torch.cat((pictures.masked_fill(patches(hidden, size), GREY), result[None]))  # (T + 2, 3, H, W)
    fresh = torch.zeros(len(pictures), hidden.shape[1], dtype=torch.bool)
    fresh[1:-1] = (hidden[:-1] & ~hidden[1:]).cpu()
    factor = _factor(size)
    pictures, fresh = magnify(pictures, factor), patches(fresh, factor * size)
    side = factor * size // math.isqrt(hidden.shape[1])  # pixels a token's side
    place = torch.arange(factor * size) % side
    rim = (place < 2) | (place >= side - 2)
    colour = torch.tensor(FRESH, dtype=torch.uint8).view(3, 1, 1)
    return torch.where(fresh & (rim | rim[:, None]), colour, pictures)


class Strip(NamedTuple):
    """A row of a contact sheet: what it is, and its pictures (c, 3, H, W) uint8 with a caption each."""

    label: str
    captions: list[str]
    pictures: Tensor


def contact_sheet(rows: list[Strip]) -> np.ndarray:
    """uint8 (h, w, 3): the pictures at twice their size, labels on the left, captions above wherever they change."""
    heads = [row.captions != before.captions for row, before in zip(rows[1:], rows, strict=False)]
    font, size = _font(), 2 * rows[0].pictures.shape[-1]
    step, margin = size + 4, 12 + math.ceil(max(font.getlength(line) for row in rows for line in row.label.split("\n")))
    columns = max(len(row.captions) for row in rows)
    shape = margin + columns * step - 4, len(rows) * step - 4 + LINE * (1 + sum(heads))
    sheet, top = Image.new("RGB", shape, "white"), 0
    draw = ImageDraw.Draw(sheet)
    for row, head in zip(rows, [True, *heads], strict=True):
        if head:
            for column, caption in enumerate(row.captions):
                draw.text((margin + column * step + size / 2, top + LINE / 2), caption, "black", font, "mm")
            top += LINE
        draw.multiline_text((margin - 8, top + size / 2), row.label, "black", font, "rm", align="right")
        sheet.paste(Image.fromarray(to_pixels(magnify(sheet_of(row.pictures, len(row.pictures)), 2))), (margin, top))
        top += step
    return np.array(sheet)


class Film:
    """The tokens of some images of a batch after each iteration.

    images: the numbers, in the batch, of those that are drawn; samples: rows an image in what is decoded, of which the
    first is drawn; shown: what is kept of a State, `Codec.shown`.
    """

    def __init__(self, images: list[int], samples: int, shown: Callable[[State], Tensor]):
        self.samples, self.shown = samples, shown
        self.steps: dict[int, list[tuple[Tensor, Tensor]]] = {image: [] for image in images}

    def add(self, rows: slice, state: State) -> None:
        """Keeps what an iteration made of the rows that are drawn."""
        if drawn := [image for image in self.steps if rows.start <= image * self.samples < rows.stop]:
            codes = self.shown(state)
            for image in drawn:
                row = image * self.samples - rows.start
                self.steps[image].append((codes[row], state.hidden[row]))


class Sheets:
    """Pictures of the iterations of a few images: OUT/imga, OUT/mask_scheduling and a row each of OUT/overview.png;
    OUT/animation where `animate` says so.

    `codec` decodes what it shows of a State; `drawn` numbers the images of the run that are drawn.
    """

    FOLDERS = ("imga", "mask_scheduling", "animation")

    def __init__(self, codec: Codec, out: Path, drawn: list[int], animate: bool = False):
        self.codec, self.out, self.drawn = codec, out, drawn
        self.animate, self.overview = animate, []

    def film(self, numbers: Sequence[int], samples: int) -> Film:
        """A film of those images of a batch that are drawn; `numbers` are theirs in the run."""
        return Film([row for row, number in enumerate(numbers) if number in self.drawn], samples, self.codec.shown)

    def write(self, batch: Inputs, hidden: Tensor, painted: Tensor, results: Tensor, film: Film) -> None:
        """`hidden` (b, n): at the start; `painted` and `results` (b, 3, H, W): the batch as networks see it, filled."""
        for row, steps in film.steps.items():
            codes, after = (torch.stack(part) for part in zip(*steps, strict=True))  # (T, n) or (T, n, e), (T, n)
            part, again = slice(row, row + 1), (len(codes), -1, -1, -1)
            frames_of = self.codec.decode(codes, painted[part].expand(again), batch.hole[part].expand(again))
            name, image, hole = batch.names[row], batch.images[row], batch.hole[row]
            pending = patches(after, image.shape[-1])
            pictures = frames_of.masked_fill(pending, GREY)
            known = torch.where(pending, 0, 255).to(torch.uint8).expand_as(pictures)
            for folder, sheet in (("imga", pictures), ("mask_scheduling", known)):
                write_image(self.out / folder / name, to_pixels(sheet_of(sheet, columns=min(len(sheet), 5))))
            if self.animate:
                shown = frames(image, hole, torch.cat((hidden[part], after)), frames_of, results[row])
                path = (self.out / "animation" / name).with_suffix(".webp")
                write_animation(path, shown, [*[SHOWN] * (len(shown) - 1), HELD])
            self._add_row(batch, row, pictures, results[row])

    def _add_row(self, batch: Inputs, row: int, pictures: Tensor, result: Tensor) -> None:
        """A row of the overview: truth where it is known, hole, four of the iterations, result."""
        four = torch.linspace(0, len(pictures) - 1, 4).long()
        masked = batch.images[row].masked_fill(batch.hole[row], GREY)
        shown = {"hole": masked} if batch.truth is None else {"truth": batch.truth[row], "hole": masked}
        captions = [*shown, *(f"step {step + 1}" for step in four.tolist()), "result"]
        label = f"{batch.groups[row][-20:]}\n{Path(batch.names[row]).stem[-20:]}"
        self.overview.append(Strip(label, captions, torch.stack([*shown.values(), *pictures[four], result])))

    def close(self) -> None:
        """Writes the overview."""
        if self.overview:
            write_image(self.out / "overview.png", contact_sheet(self.overview))
