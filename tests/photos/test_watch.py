"""watch.py: both kinds of fillings, before one's eyes, with tiny networks."""

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.data import chelsea
from tiny_networks import CONV, DECODING, transformer, vqgan

from maskgit.data import GREY
from maskgit.inpainter import Inpainter
from photos.fill import fill_photo
from photos.photo import Photo, read_photo
from photos.watch import Turns, WatchedSquares, WatchedWindows

CAT = Image.fromarray(chelsea()[:120, :150])
HOLE = np.zeros((120, 150), dtype=bool)
HOLE[40:50, 60:90] = HOLE[100:103, 5:9] = True
KINDS = {"squares": WatchedSquares, "windows": WatchedWindows}


@pytest.fixture(scope="module")
def inpainter() -> Inpainter:
    torch.manual_seed(1)
    return Inpainter(vqgan(), transformer(), DECODING, "cpu")


@pytest.fixture(scope="module")
def photo() -> Photo:
    return read_photo(CAT, mask=Image.fromarray(np.where(HOLE, 0, 255).astype(np.uint8)))


@pytest.mark.parametrize("tiling", KINDS)
def test_what_is_watched_is_what_is_filled(inpainter, photo, tiling):
    watched = KINDS[tiling](inpainter, photo, 5, 2, inpainter.decoding)
    shares, film = [], []
    for share, told, first in watched.steps():
        shares.append(share)
        film[first - 1 :] = watched.film(first)
        assert "tep " in told and len(watched.pictures()) == 2
    expected, notes = fill_photo(inpainter, photo, 5, 2, tiling=tiling)
    assert all(np.array_equal(*pair) for pair in zip(watched.completions(), expected, strict=True))
    assert shares == sorted(shares) and shares[-1] == 1 and watched.notes() == notes
    assert len(film) >= 4 and all(np.array_equal(*pair) for pair in zip(film, watched.film(1), strict=True))
    assert len(watched.maps()) == 2 and all(map_.ndim == 3 and map_.dtype == np.uint8 for map_ in watched.maps())


def test_windows_show_what_is_hidden_grey_and_coarse_scales_in_their_place(inpainter, photo, monkeypatch):
    monkeypatch.setattr("maskgit.pyramid.THICK", 1 / 3)
    watched = WatchedWindows(inpainter, photo, 5, 1, inpainter.decoding)
    rows, columns = watched.area
    assert (rows.start, rows.stop, columns.start, columns.stop) == (24, 119, 0, 106)
    hole, told = HOLE[watched.area], []
    for _, line, _ in watched.steps():
        told.append(line)
        (now,) = watched.pictures()
        assert np.array_equal(now[~hole], photo.pixels[watched.area][~hole])
        grey = (now == GREY).all(axis=2)[hole].mean()
        if "scale" in line and "step 1" in line:
            assert grey > 0.3  # nearly all is hidden still
    assert told[0] == "step 1, at 1/2 of the scale" and told[-1] == "step 4"
    assert np.array_equal(watched.pictures()[0], watched.completions()[0][watched.area])
    frames = watched.film(1)
    thick = slice(40 - rows.start, 50 - rows.start), slice(60, 90)
    thin = slice(100 - rows.start, 103 - rows.start), slice(5, 9)
    coarse = frames[told.index("step 4, at 1/2 of the scale")]
    assert not (coarse[thick] == GREY).all(axis=2).any() and (frames[0][thin] == GREY).all()


def test_while_a_mirror_image_is_filled_no_picture_is_shown_twice(inpainter, photo):
    alone, both = (
        WatchedWindows(inpainter, photo, 5, 1, inpainter.decoding.changed(self_ensemble=ensemble))
        for ensemble in (False, True)
    )
    told = [[line for _, line, _ in watched.steps()] for watched in (alone, both)]
    assert told[1] == [*told[0], *[told[0][-1]] * len(told[0])]
    assert all(np.array_equal(*pair) for pair in zip(alone.film(1), both.film(1), strict=True))
    (expected,), _ = fill_photo(inpainter, photo, 5, 1, inpainter.decoding.changed(self_ensemble=True))
    assert np.array_equal(both.completions()[0], expected) and not np.array_equal(alone.completions()[0], expected)


def test_windows_over_an_encoder_that_sees_more_than_a_patch_are_refused_at_once(photo):
    conv = Inpainter(vqgan(CONV), transformer(), DECODING, "cpu")
    with pytest.raises(ValueError, match="windows need a VQGAN whose encoder sees each patch alone"):
        WatchedWindows(conv, photo, 0, 1, DECODING)


def test_turns_are_taken_by_the_step_in_the_order_of_asking():
    turns, made, together = Turns(), [], []

    def filling(name: str):
        for step in range(20):
            together.append(1)
            time.sleep(0.001)
            made.append((name, step))
            assert together.pop() and not together  # one step at a time
            yield step

    def visitor(name: str) -> list[int]:
        return list(turns.each(filling(name)))

    with ThreadPoolExecutor(3) as people:
        assert list(people.map(visitor, "abc")) == [list(range(20))] * 3
    first = max(made.index((name, 0)) for name in "abc")  # from here on all three are there
    order = [name for name, _ in made[first : first + 30]]
    assert min(order.count(name) for name in "abc") >= 6  # 10 each, but for a thread that was slow to ask again


def test_an_error_in_a_turn_does_not_end_those_of_others():
    turns = Turns()

    def broken():
        yield 1
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        list(turns.each(broken()))
    assert list(turns.each(iter("ab"))) == ["a", "b"]
