"""`Canvas`: a picture of any size, at one scale, whose hole is filled through windows of the model's size.

    pixels  (H, W, 3) uint8   RGB
    hole    (H, W) bool       True = missing
    cells   n of f x f pixels, those that `windows.Windows` cover; a token each

H and W are made multiples of f, and at least the model's size, by mirroring the picture at its border.
"""

from collections.abc import Iterator

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from maskgit.classical import smooth_rim
from maskgit.completion import Completer
from maskgit.data import GREY, to_pixels
from maskgit.decoding import State, sample
from maskgit.decoding_config import DecodingConfig
from maskgit.masks import mean_of, to_hidden
from maskgit.windows import WindowPredictor, blending, windows_over
from utils import images_at_once

CELLS = 4096  # encoded at once


def has_grid_of_any_size(inpainter: Completer) -> bool:
    """Whether each token of its VQGAN depends on its patch alone."""
    return inpainter.vqgan.config.encoder.kind == "patch"


def check_encoder(inpainter: Completer) -> None:
    """Raises ValueError for a VQGAN that has no grid of any size."""
    if not has_grid_of_any_size(inpainter):
        raise ValueError("windows need a VQGAN whose encoder sees each patch alone (vqgan.encoder.kind: patch)")


def paint_picture(
    inpainter: Completer, pixels: np.ndarray, hole: np.ndarray, decoding: DecodingConfig | None
) -> np.ndarray:
    """`Completer.paint` of one picture (H, W, 3) uint8."""
    images, missing = torch.from_numpy(pixels).permute(2, 0, 1)[None], torch.from_numpy(hole)[None, None]
    return to_pixels(inpainter.paint(images, missing, decoding)[0])


def mirrored(array: np.ndarray) -> np.ndarray:
    """A picture's array (H, W, ...), left and right exchanged."""
    return np.ascontiguousarray(array[:, ::-1])


class Canvas:
    """A picture's hole in the making.

    guess (H, W, 3) uint8: what the hole is painted with; None: as `Completer.paint` does
    trusted (H, W) bool: where the guess is to be followed: codes near to it are more probable there, as trust times the
        cosine of their vectors is added to the logits. With it the encoder sees all of the guess, whatever `pre_fill`
        says. None: nowhere
    decoding, margin, batch_size: as of `Completer.complete`

    twin: with `decoding.self_ensemble` the canvas of the mirrored picture, of a mirrored guess; else None
    raw (H, W, 3) uint8, None before `render`: the decoder's pixels wherever there are cells, the given ones elsewhere;
        with a twin their mean with those of the twin

    Raises ValueError without a missing pixel, and for a VQGAN whose tokens depend on more than their patch.
    """

    def __init__(
        self,
        inpainter: Completer,
        pixels: np.ndarray,
        hole: np.ndarray,
        decoding: DecodingConfig | None = None,
        *,
        guess: np.ndarray | None = None,
        trusted: np.ndarray | None = None,
        trust: float = 0.0,
        margin: int = 0,
        batch_size: int | None = None,
    ):
        config = inpainter.vqgan.config
        check_encoder(inpainter)
        self.inpainter, self.decoding = inpainter, decoding or inpainter.decoding
        self.batch_size = images_at_once(inpainter.device) if batch_size is None else batch_size
        self.pixels, self.hole, self.factor = pixels, hole, config.factor
        padded, missing = (self._padded(array) for array in (pixels, hole))
        holes = torch.from_numpy(missing)[None, None]
        if guess is None:
            painted = paint_picture(inpainter, padded, missing, self.decoding)
        else:
            painted = np.where(missing[..., None], self._padded(guess), padded)
        grid = tuple(length // self.factor for length in missing.shape)
        hidden = to_hidden(holes, grid, margin, self.decoding.token_rule).view(grid)
        wanted = hidden | to_hidden(holes, grid).view(grid)
        self.windows = windows_over(wanted.numpy(), config.grid)
        self.painted, self.missing = self.windows.gather(painted), self.windows.gather(missing[..., None])
        rows, columns = self.windows.cells.T
        self.hidden = hidden[rows, columns][None].to(inpainter.device)  # (1, n)
        shown = self.painted
        if trusted is None and not self.decoding.pre_fill:
            shown = self.painted.masked_fill(self.missing, GREY)
        parts = [self._latents(part) for part in shown.split(CELLS)]
        latents = torch.cat(parts)  # (n, e)
        self.tokens = torch.cat([inpainter.vqgan.codebook.nearest(part) for part in parts])[None]  # (1, n)
        predict, self.mask_id = inpainter.predict, inpainter.transformer.mask_id
        self.predictor = WindowPredictor(self.windows, predict, self.mask_id, self.batch_size, inpainter.device)
        self.pull = None  # (n, e): what is added to the logits, times the codes
        if trusted is not None:
            trusted = self._padded(trusted)
            follow = self.windows.gather(trusted[..., None]).flatten(1).any(dim=1, keepdim=True)
            self.pull = trust * latents * follow.to(latents.device)
        self.twin = self.raw = None
        if self.decoding.self_ensemble:
            self.twin = Canvas(
                inpainter, mirrored(padded), mirrored(missing), self.decoding.changed(self_ensemble=False),
                guess=mirrored(painted), trusted=None if trusted is None else mirrored(trusted),
                trust=trust, margin=margin, batch_size=batch_size,
            )  # fmt: skip

    @torch.no_grad()
    def _latents(self, cells: Tensor) -> Tensor:
        """uint8 cells (m, 3, f, f) -> vectors (m, e) in the space of the codes: the encoder sees each patch alone."""
        strip = cells.permute(1, 2, 0, 3).reshape(1, 3, self.factor, -1)  # side by side
        return self.inpainter.prepared(strip)[0, 0]

    def predict(self, tokens: Tensor) -> Iterator[Tensor]:
        """What `decoding.sample` is given: logits of the hidden cells of (b, n), in chunks."""
        if self.pull is None:
            yield from self.predictor(tokens)
            return
        pull, codes, start = self.pull[torch.where(tokens == self.mask_id)[1]], self.inpainter.codebook.T, 0
        for logits in self.predictor(tokens):
            rows = slice(start, start + len(logits))
            yield logits + pull[rows] @ codes
            start = rows.stop

    def steps(self, seed: int) -> Iterator[State]:
        """Decodes: the State of the cells after every iteration."""
        own = self.tokens, self.hidden, self.mask_id, self.decoding, [seed]
        return sample(self.predict, *own, self.inpainter.codebook, self.windows)

    def decode(self, codes: Tensor) -> Tensor:
        """Tokens (n), or code vectors (n, e), of the cells -> their pixels (n, 3, f, f) uint8, windows blended."""
        size, factor, windows = self.inpainter.size, self.factor, self.windows
        sums, weights = (torch.zeros(len(windows.cells), channels, factor, factor) for channels in (3, 1))
        weight = windows.to_cells(blending(size), factor)  # (g * g, 1, f, f)
        for some in torch.arange(len(windows)).split(self.batch_size):
            index = windows.index[some]  # (b, g * g)
            shown = windows.images(self.painted, some), windows.images(self.missing, some)
            decoded = windows.to_cells(self.inpainter.decode(codes[index.to(codes.device)], *shown).float(), factor)
            again = weight.repeat(len(some), 1, 1, 1)
            sums.index_add_(0, index.flatten(), decoded * again)
            weights.index_add_(0, index.flatten(), again)
        return (sums / weights).round().to(torch.uint8)

    def decoded(self, cells: Tensor) -> np.ndarray:
        """The picture (H, W, 3) with pixels of the cells (n, 3, f, f) uint8 wherever these are."""
        padded = self._padded(self.pixels)
        self.windows.scatter(cells, padded)
        height, width = self.hole.shape
        return padded[:height, :width]

    def render(self, state: State, mirror_image: State | None = None) -> None:
        """Makes `raw` of the last state of `steps`, and of that of the twin's where there is a twin."""
        self.raw = self.decoded(self.decode(state.decodable[0]))
        if self.twin:
            self.twin.render(mirror_image)
            height, width = self.hole.shape
            pictures = self.raw, mirrored(self.twin.raw)[:height, :width]
            self.raw = mean_of(*map(torch.from_numpy, pictures)).numpy()

    def paste(self, decoded: np.ndarray, feather: int = 0, rim: float = 0.0) -> np.ndarray:
        """The picture (H, W, 3) with the pixels of `decoded` (H, W, 3) uint8 in its hole, known ones as they are.

        `rim`: the share of `classical.smooth_rim`, without effect beside `feather`. With the latter, known pixels at
        most so far from the hole are mixed with the decoded ones, the less the farther.
        """
        if not feather:
            return smooth_rim(np.where(self.hole[..., None], decoded, self.pixels), self.hole, rim)
        distance = ndimage.distance_transform_edt(~self.hole)[..., None]
        share = np.where(distance <= feather, 1 - distance / (feather + 1), 0)
        return (share * decoded + (1 - share) * self.pixels).round().astype(np.uint8)

    def _padded(self, array: np.ndarray) -> np.ndarray:
        """A picture's array (H, W, ...), mirrored to multiples of f, at least the model's size."""
        size, factor = self.inpainter.size, self.factor
        beyond = [(0, max(size, -(-length // factor) * factor) - length) for length in array.shape[:2]]
        return np.pad(array, [*beyond, (0, 0)][: array.ndim], mode="symmetric")
