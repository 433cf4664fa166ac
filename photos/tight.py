"""Masks that are too tight: something sharp runs along the rim of the hole, just outside.

A mask that leaves a seam of what is to go makes a poor filling, as the model takes the seam for part of the picture.
"""

import numpy as np
from scipy import ndimage
from scipy.spatial import KDTree

from maskgit.pyramid import around
from photos.photo import Photo

SPACING = 3  # pixels between the colours that are compared, on the way out of the hole
TIMES = 4  # how many steps of SPACING that way is long
EDGE = 12  # grey levels, the mean of the channels: a smaller change is none
TIGHT = 0.45  # of the rim, or more, has an edge; see docs/photographs.md for what that finds
MOST, LEAST = 4096, 20  # pixels of the rim looked at; with fewer no answer


def tightness(pixels: np.ndarray, hole: np.ndarray) -> float:
    """The share, in [0, 1], of the rim of the hole (H, W) bool beside which `pixels` (H, W, 3) uint8 change sharply:
    by more than EDGE within SPACING known pixels, and twice as much as in the same distance farther out, on average.

    0 where there is too little rim, or known pixels around it, to tell.
    """
    if not hole.any():
        return 0.0
    near = around(hole, SPACING * (TIMES + 1))
    pixels, hole = pixels[near], hole[near]
    border = np.argwhere(hole & ndimage.binary_dilation(~hole))
    rim = np.argwhere(~hole & ndimage.binary_dilation(hole))
    rim = rim[:: -(-len(rim) // MOST)] if len(rim) else rim
    if len(rim) < LEAST:
        return 0.0
    tree = KDTree(border)
    outwards = rim - border[tree.query(rim)[1]]
    outwards = outwards / np.linalg.norm(outwards, axis=1, keepdims=True)
    far = SPACING * np.arange(TIMES + 1)
    places = np.rint(rim + far[:, None, None] * outwards).astype(int)  # (steps, n, 2)
    inside = ((places >= 0) & (places < hole.shape)).all(axis=2)
    known = inside & (tree.query(places)[0] >= far[:, None])  # of no other part of the hole's
    whole = known.all(axis=0)
    if whole.sum() < LEAST:
        return 0.0
    rows, columns = places[:, whole].transpose(2, 0, 1)
    colours = pixels[rows, columns].astype(np.float32)  # (steps, n, 3)
    first, *others = np.abs(np.diff(colours, axis=0)).mean(axis=2)
    return float(((first > EDGE) & (first > 2 * np.mean(others, axis=0))).mean())


def tight_notes(photo: Photo) -> list[str]:
    """A hint where the photo's hole is likely too tight."""
    share = tightness(photo.pixels, photo.hole)
    if share < TIGHT:
        return []
    return [f"{photo.name}: the hole looks tight, {share:.0%} of its rim lies along something sharp; "
            f"grown by {SPACING} to {2 * SPACING} pixels (--grow) it may fill better"]  # fmt: skip
