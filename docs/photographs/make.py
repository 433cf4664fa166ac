"""Makes the pictures of docs/photographs.md out of scikit-image's photographs (public domain and CC0).

    PYTHONPATH=. python docs/photographs/make.py

NAME.jpg and NAME_mask.png are for you to try; NAME_filled.jpg shows side by side the hole, OpenCV's Navier-Stokes
inpainting and photos64, all from the same pixels.
"""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from skimage import data

from maskgit.classical import METHODS
from maskgit.inpainter import PHOTOS, Inpainter
from maskgit.photo_holes import photo_hole
from maskgit.pyramid import fill_picture
from utils import finish

HERE = Path(__file__).parent
MAST = (194, 116), (209, 116), (214, 200), (230, 386), (164, 386), (189, 200)  # of the rocket's, corners around it
PINK = 255, 0, 128


def polygon(corners: tuple[tuple[int, int], ...], shape: tuple[int, int]) -> np.ndarray:
    picture = Image.new("1", shape[::-1])
    ImageDraw.Draw(picture).polygon(corners, fill=1)
    return np.asarray(picture)


def main() -> None:
    inpainter = Inpainter.from_pretrained(PHOTOS)
    coffee, astronaut, rocket = data.coffee(), data.astronaut(), data.rocket()
    pictures = {
        "coffee": (coffee, photo_hole("scratches", coffee.shape[:2], 1, 0)),
        "astronaut": (astronaut, photo_hole("text", astronaut.shape[:2], 1, 0)),
        "rocket": (rocket, polygon(MAST, rocket.shape[:2])),
    }
    for name, (pixels, hole) in pictures.items():
        Image.fromarray(pixels).save(HERE / f"{name}.jpg", quality=90)
        pixels = np.asarray(Image.open(HERE / f"{name}.jpg"))
        Image.fromarray(np.where(hole, 0, 255).astype(np.uint8)).convert("1").save(HERE / f"{name}_mask.png")
        classical = METHODS["navier_stokes"](pixels, hole)
        ours = finish(fill_picture(inpainter, pixels, hole))
        painted = np.where(hole[..., None], np.uint8(PINK), pixels)
        Image.fromarray(np.hstack((painted, classical, ours))).save(HERE / f"{name}_filled.jpg", quality=90)


if __name__ == "__main__":
    main()
