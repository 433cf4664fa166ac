"""drawing.py: confidence maps, frames of an animation and contact sheets, pixel by pixel where they mean something."""

import numpy as np
import pytest
import torch
from PIL import Image

from maskgit import visualize
from maskgit.data import GREY, write_animation

SIZE, GRID, CODES = 16, 4, 32  # patches of 4x4 pixels


def noise(n: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(1, 255, size=(n, 3, SIZE, SIZE), dtype=np.uint8))


def lightness(colours: torch.Tensor) -> torch.Tensor:
    """Rec. 709 luma of colours (..., 3) in [0, 1]."""
    return colours @ torch.tensor([0.2126, 0.7152, 0.0722])


def test_patches_are_the_pixels_of_the_hidden_tokens():
    hidden = torch.zeros(2, GRID**2, dtype=torch.bool)
    hidden[0, 6] = hidden[1, 0] = True
    pixels = visualize.patches(hidden, SIZE)
    assert pixels.shape == (2, 1, SIZE, SIZE) and pixels.flatten(1).sum(dim=1).tolist() == [16, 16]
    assert pixels[0, 0, 4:8, 8:12].all() and pixels[1, 0, :4, :4].all()


def test_the_colours_of_confidence_rise_in_lightness_and_are_no_greys():
    colours = visualize._helix(torch.linspace(0, 1, 101))
    assert colours.shape == (101, 3) and colours.min() >= 0 and colours.max() <= 1
    assert (lightness(colours).diff() > 0).all() and lightness(colours[-1]) - lightness(colours[0]) > 0.6
    assert (colours.amax(dim=1) - colours.amin(dim=1) > 0.1).all()


def test_a_confidence_map_colours_hidden_tokens_alone_by_the_logarithm_of_their_probability():
    images, hidden = noise(1), torch.zeros(1, GRID**2, dtype=torch.bool)
    hidden[0, :4] = True  # the upper row
    confidence = torch.ones(1, GRID**2)
    confidence[0, :4] = torch.tensor([0.0, 1 / CODES, CODES**-0.5, 1.0])
    (map_,) = visualize.confidence_map(images, hidden, confidence, CODES)
    assert map_.dtype == torch.uint8 and map_.shape == (3, visualize.SIDE + visualize.LINE, visualize.SIDE)
    pixel = visualize.SIDE // SIZE
    shown = map_[:, : visualize.SIDE].unfold(1, 4 * pixel, 4 * pixel).unfold(2, 4 * pixel, 4 * pixel)  # (3, 4, 4, p, p)
    top = shown[:, 0].flatten(2)  # (3, 4, p * p)
    assert (top == top[..., :1]).all()  # a token, a colour
    expected = visualize._helix(torch.tensor([0.0, 0.0, 0.5, 1.0])) * 255
    torch.testing.assert_close(top[..., 0].T.float(), expected, atol=0.51, rtol=0)
    known = shown[:, 1:]
    assert (known == known[:1]).all() and len(known.unique()) > 20  # greys, of the picture


@pytest.mark.parametrize(("size", "shown"), [(16, 256), (60, 300), (256, 256), (300, 300)])
def test_small_pictures_are_magnified(size, shown):
    images = torch.zeros(2, 3, size, size, dtype=torch.uint8)
    hidden = torch.ones(2, 4, dtype=torch.bool)
    maps = visualize.confidence_map(images, hidden, torch.rand(2, 4), CODES)
    assert maps.shape == (2, 3, shown + visualize.LINE, shown)


def test_frames_tell_known_hidden_and_fresh_tokens_apart():
    image, painted, result = noise(1)[0], noise(2) // 2, noise(1)[0] // 3
    hole = torch.zeros(1, SIZE, SIZE, dtype=torch.bool)
    hole[:, 1:4, :8] = True  # the first two tokens, but for their first line
    hidden = torch.zeros(3, GRID**2, dtype=torch.bool)
    hidden[0, :2] = hidden[1, 1] = True  # one is decided in each of two iterations
    film = visualize.frames(image, hole, hidden, painted, result)
    factor = visualize.SIDE // SIZE
    assert film.dtype == torch.uint8 and film.shape == (4, 3, visualize.SIDE, visualize.SIDE)
    assert torch.equal(film[-1], visualize.magnify(result, factor))

    inside = factor // 2  # the middle of a pixel, off the frames of tokens
    small = film[:, :, inside::factor, inside::factor]
    assert (small[0, :, :4, :8] == GREY).all() and (small[1, :, :4, 4:8] == GREY).all()
    assert torch.equal(small[:-1, :, 4:], image[:, 4:].expand(3, -1, -1, -1))  # known, whatever was decoded there
    assert torch.equal(small[1, :, 1:4, :4], painted[0, :, 1:4, :4])
    assert torch.equal(small[2, :, :1, :8], image[:, :1, :8])
    fresh = torch.tensor(visualize.FRESH, dtype=torch.uint8)
    corners = film[:, :, 0, :: 4 * factor]  # (4, 3, 4): of the tokens in the first row
    framed = (corners == fresh[:, None]).all(dim=1)
    assert framed.tolist() == [[False] * 4, [True] + [False] * 3, [False, True, False, False], [False] * 4]


def test_an_animation_keeps_its_pixels_and_its_times(tmp_path):
    film = noise(3)
    write_animation(tmp_path / "new" / "film.webp", film, [40, 50, 60])
    with Image.open(tmp_path / "new" / "film.webp") as picture:
        assert (picture.n_frames, picture.info["loop"]) == (3, 0)
        for number, frame in enumerate(film):
            picture.seek(number)
            picture.load()
            assert picture.info["duration"] == (40, 50, 60)[number]
            assert np.array_equal(np.array(picture.convert("RGB")), frame.permute(1, 2, 0).numpy())


def test_a_contact_sheet_has_captions_where_they_change_and_labels():
    pictures = noise(2)
    rows = [
        visualize.Strip("box\none", ["truth", "hole"], pictures),
        visualize.Strip("box\ntwo", ["truth", "hole"], pictures),
    ]
    same = visualize.contact_sheet(rows)
    other = visualize.contact_sheet([rows[0], visualize.Strip("box\ntwo", ["truth", "step 3"], pictures)])
    side, line = 2 * SIZE, visualize.LINE
    assert same.shape[0] == line + 2 * side + 4 and other.shape[0] == same.shape[0] + line
    assert (same[:line] < 100).any() and (other[line + side + 4 :][:line] < 100).any()
    wide = visualize.contact_sheet([visualize.Strip("a long label\none", ["truth", "hole"], pictures)])
    assert wide.shape[1] > same.shape[1] and (same[line:, :3] == 255).all()
    expected = visualize.magnify(pictures, 2).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(same[line : line + side, -side:], expected[1])
    assert np.array_equal(same[-side:, -2 * side - 4 : -side - 4], expected[0])


def test_a_grid_lays_images_out_row_by_row_with_white_between():
    images = torch.arange(5, dtype=torch.uint8)[:, None, None, None].expand(5, 3, 4, 6)
    sheet = visualize.sheet_of(images, columns=3, gap=2)
    assert sheet.dtype == torch.uint8 and sheet.shape == (3, 2 * 4 + 2, 3 * 6 + 2 * 2)
    for index, (top, left) in enumerate([(0, 0), (0, 8), (0, 16), (6, 0), (6, 8)]):
        assert (sheet[:, top : top + 4, left : left + 6] == index).all()
    assert (sheet[:, 4:6] == 255).all() and (sheet[:, :, 6:8] == 255).all()
    assert (sheet[:, 6:, 16:] == 255).all()  # the empty place
    assert int((sheet != 255).sum()) == 5 * 3 * 4 * 6


def test_a_grid_of_one_image_is_that_image():
    image = torch.randint(0, 255, (1, 3, 5, 7), dtype=torch.uint8)
    assert torch.equal(visualize.sheet_of(image, columns=1)[None], image)
