"""What an editor in a browser shows of a picture and its hole, and the way back: Gradio's ImageEditor values.

pixels  (H, W, 3) uint8   a picture of any size, upright
view    (h, w, 3) uint8   the same as the editor shows it, its longer side VIEW pixels
hole    (H, W) bool       True = missing
"""

from pathlib import Path

import numpy as np
from PIL import Image

from maskgit.data import to_pixels, write_image
from maskgit.folders import chelsea
from photos.image_file import read_image_file

VIEW = 512  # pixels
PAINT = (255, 0, 128)


def sample_files(folder: Path, size: int) -> list[str]:
    """Writes what one can begin with: two photographs of scikit-image's, and a cat's face at the model's size."""
    from skimage import data

    pictures = {"astronaut": data.astronaut(), "chelsea": data.chelsea(), "face": to_pixels(chelsea(size).truth[0])}
    for name, pixels in pictures.items():
        write_image(folder / f"{name}.png", pixels)
    return [str(folder / f"{name}.png") for name in pictures]


def view(pixels: np.ndarray) -> np.ndarray:
    """pixels -> view; small pictures show their pixels as squares."""
    scale = VIEW / max(pixels.shape)
    size = [max(1, round(length * scale)) for length in pixels.shape[1::-1]]
    return np.asarray(Image.fromarray(pixels).resize(size, Image.NEAREST if scale > 2 else Image.LANCZOS))


def edited(path: str, hole: np.ndarray | None = None) -> dict:
    """The editor's value for a picture file, `hole` of any size painted in; None: the transparent part, if any.

    Raises ValueError naming the file that cannot be read.
    """
    picture = read_image_file(path)
    background = view(picture.rgb())
    if hole is None:
        hole = np.zeros((1, 1), bool) if (alpha := picture.alpha()) is None else alpha < 128
    painted = np.asarray(Image.fromarray(hole).resize(background.shape[1::-1], Image.NEAREST))
    layer = np.where(painted[..., None], np.uint8((*PAINT, 255)), np.uint8(0))
    return {"background": background, "layers": [layer] if hole.any() else [], "composite": None}


def painted_hole(editor: dict | None, shape: tuple[int, int]) -> np.ndarray:
    """The editor's value -> hole of `shape` (H, W): pixels that the brush covered half of.

    Raises ValueError where there are none.
    """
    layers = editor.get("layers") or [] if isinstance(editor, dict) else []
    painted: dict[tuple[int, int], np.ndarray] = {}  # by the size of the layers, which is usually one
    for layer in layers:
        if layer.ndim != 3 or layer.shape[2] != 4:
            raise ValueError(f"layer {layer.shape}: expected (h, w, 4), RGBA")
        painted[layer.shape[:2]] = painted.get(layer.shape[:2], False) | (layer[..., 3] >= 128)
    hole = np.zeros(shape, bool)
    for one in painted.values():
        larger = Image.fromarray(np.where(one, np.uint8(255), np.uint8(0)))
        hole |= np.asarray(larger.resize(shape[::-1], Image.BOX)) >= 128
    if not hole.any():
        raise ValueError("no hole: paint over what should be filled, or choose a ready-made hole")
    return hole
