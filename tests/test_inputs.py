"""inputs.py: batches of images, holes and truth from folders, read when they are asked for."""

import threading

import numpy as np
import pytest
import torch
from PIL import Image

import inputs
from inputs import Folders, batches, chelsea
from masks import FAMILIES


def write(folder, arrays, name="image"):
    folder.mkdir()
    for index, array in enumerate(arrays):
        Image.fromarray(array).save(folder / f"{name}_{index:03}.png")
    return folder


@pytest.fixture
def lab(tmp_path):
    """images, masks and truth of 7 pictures of 16x16 pixels: the paths, then the arrays."""
    rng = np.random.default_rng(0)
    truth = rng.integers(256, size=(7, 16, 16, 3), dtype=np.uint8)
    holes = rng.random((7, 16, 16)) < 0.3
    masked = np.where(holes[..., None], np.uint8(128), truth)
    paths = [write(tmp_path / "images", masked), write(tmp_path / "masks", np.where(holes, 0, 255).astype(np.uint8))]
    return *paths, write(tmp_path / "truth", truth), torch.from_numpy(truth).permute(0, 3, 1, 2), holes


def test_a_slice_holds_images_holes_truth_and_names_of_its_files(lab):
    images, masks, true, truth, holes = lab
    source = Folders(images, masks, true, 16, workers=2)
    part = source[2:5]
    assert (len(source), len(part), source.names[2:5]) == (7, 3, part.names)
    assert torch.equal(part.truth, truth[2:5]) and np.array_equal(part.hole[:, 0].numpy(), holes[2:5])
    assert torch.equal(part.images, truth[2:5].masked_fill(part.hole, 128))
    assert part.groups == ["masks"] * 3 and Folders(images, masks, None, 16, 0)[:1].truth is None


def test_truth_from_one_file_equals_truth_from_a_folder(lab, tmp_path):
    images, masks, _, truth, _ = lab
    np.savez(tmp_path / "truth.npz", images=truth.permute(0, 2, 3, 1).numpy())
    assert torch.equal(Folders(images, masks, tmp_path / "truth.npz", 16, 1)[3:7].truth, truth[3:7])


def test_files_are_read_with_their_batch_and_not_before(lab, monkeypatch):
    images, masks, true, _, _ = lab
    read = []
    original = inputs.read_pair
    monkeypatch.setattr(inputs, "read_pair", lambda *args: (read.append(args[0].name), original(*args))[1])
    source = Folders(images, masks, true, 16, 1)
    assert read == []
    source[1:3]
    assert read == ["image_001.png", "image_002.png"]


def test_batches_cover_everything_in_order_and_read_ahead(lab, monkeypatch):
    source = Folders(*lab[:3], 16, 1)
    threads, original = [], Folders.__getitem__

    def noted(*args):
        threads.append(threading.current_thread())
        return original(*args)

    monkeypatch.setattr(Folders, "__getitem__", noted)
    found = list(batches(source, 3))
    assert [(start, len(batch)) for start, batch in found] == [(0, 3), (3, 3), (6, 1)]
    assert torch.equal(torch.cat([batch.truth for _, batch in found]), lab[3])
    assert threads[0] is threading.main_thread() and threading.main_thread() not in threads[1:]


def test_no_more_than_two_batches_are_in_memory(lab):
    """The one at work and the one read ahead: reading never runs further away."""
    source, served = Folders(*lab[:3], 16, 1), []

    class Counting:
        __len__ = source.__len__

        def __getitem__(self, window):
            served.append(window.start)
            return source[window]

    seen = []
    for start, _ in batches(Counting(), 2):
        seen.append(start)
        assert len(served) <= len(seen) + 1


def test_wrong_truth_is_named(lab, tmp_path):
    images, masks, true, _, _ = lab
    (true / "image_006.png").unlink()
    with pytest.raises(ValueError, match=r"truth: 6 true images for 7 to fill"):
        Folders(images, masks, true, 16, 1)
    Image.new("RGB", (8, 16)).save(true / "image_006.png")
    with pytest.raises(ValueError, match=r"image_006\.png: 8x16, expected 16x16"):
        Folders(images, masks, true, 16, 1)[6:7]


def test_chelsea_has_every_family_and_slices():
    whole = chelsea(32)
    part = whole[3:8]
    assert len(whole) == 6 * len(FAMILIES) and part.names == whole.names[3:8]
    assert torch.equal(part.truth[~part.hole.expand_as(part.truth)], part.images[~part.hole.expand_as(part.images)])
    assert (part.images[part.hole.expand_as(part.images)] == inputs.GREY).all()
