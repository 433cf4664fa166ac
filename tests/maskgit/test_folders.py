"""inputs.py: batches of images, holes and truth from folders, read when they are asked for."""

import io
import threading
import zipfile

import numpy as np
import pytest
import torch
from conftest import colourful, write_pictures
from PIL import Image

from maskgit import folders
from maskgit.data import to_hole, to_images
from maskgit.folders import Folders, batches, chelsea, note_others, read_truth
from maskgit.masks import FAMILIES
from utils import start_logging


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
    original = folders.read_pair
    monkeypatch.setattr(folders, "read_pair", lambda *args: (read.append(args[0].name), original(*args))[1])
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
    assert [list(batch.numbers) for batch in found] == [[0, 1, 2], [3, 4, 5], [6]]
    assert torch.equal(torch.cat([batch.truth for batch in found]), lab[3])
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
    for batch in batches(Counting(), 2):
        seen.append(batch.numbers)
        assert len(served) <= len(seen) + 1


def test_wrong_truth_is_named(lab, tmp_path):
    images, masks, true, _, _ = lab
    (true / "image_006.png").unlink()
    with pytest.raises(ValueError, match=r"7 images in .* and 6 true images in .*: .* alone are image_006\.png"):
        Folders(images, masks, true, 16, 1)
    Image.new("RGB", (8, 16)).save(true / "image_006.png")
    inputs = Folders(images, masks, true, 16, 1)
    assert inputs[5:7].names == ["image_005.png"] and len(inputs[6:7]) == 0
    assert all(line.endswith("image_006.png: 8x16, expected 16x16") for line in inputs.refused.values()) and list(
        inputs.refused
    ) == [6]


def test_chelsea_has_every_family_and_slices():
    whole = chelsea(32)
    part = whole[3:8]
    assert len(whole) == 6 * len(FAMILIES) and part.names == whole.names[3:8]
    assert torch.equal(part.truth[~part.hole.expand_as(part.truth)], part.images[~part.hole.expand_as(part.images)])
    assert (part.images[part.hole.expand_as(part.images)] == folders.GREY).all()


# --- from Python ---

PIXELS = np.random.default_rng(1).integers(256, size=(3, 16, 16, 3), dtype=np.uint8)
IMAGES = torch.from_numpy(PIXELS).permute(0, 3, 1, 2)
MASKS = np.random.default_rng(2).random((3, 16, 16)) < 0.4


@pytest.mark.parametrize(
    "given",
    [
        PIXELS,
        IMAGES,
        IMAGES / 255,
        (IMAGES / 255).double(),
        list(PIXELS),
        tuple(IMAGES),
        [Image.fromarray(one) for one in PIXELS],
        [Image.fromarray(PIXELS[0]), PIXELS[1:2], IMAGES[2]],
    ],
    ids=["array", "tensor", "floats", "doubles", "arrays", "tensors", "pictures", "mixed"],
)
def test_images_are_the_same_whatever_they_come_as(given):
    images = to_images(given)
    assert images.dtype == torch.uint8 and torch.equal(images, IMAGES)


def test_one_picture_is_a_batch_of_one():
    for given in (PIXELS[0], IMAGES[0], Image.fromarray(PIXELS[0])):
        assert torch.equal(to_images(given), IMAGES[:1])
    for given in (MASKS[0], torch.from_numpy(MASKS[0]), Image.fromarray(~MASKS[0])):
        assert np.array_equal(to_hole(given).numpy(), MASKS[:1, None])


def test_pictures_of_other_modes_become_rgb_and_upright():
    grey = Image.fromarray(PIXELS[0, ..., 0])
    assert torch.equal(to_images(grey), IMAGES[:1, :1].expand(-1, 3, -1, -1))
    assert torch.equal(to_images(Image.fromarray(PIXELS[0]).convert("RGBA")), IMAGES[:1])
    lying = Image.fromarray(PIXELS[0])
    lying.getexif()[0x0112] = 3  # upside down
    assert torch.equal(to_images(lying), IMAGES[:1].flip(-1, -2))


@pytest.mark.parametrize(
    "given",
    [
        MASKS,
        MASKS[:, None],
        torch.from_numpy(MASKS),
        torch.from_numpy(MASKS)[:, None],
        list(MASKS),
        [Image.fromarray(np.where(one, 0, 255).astype(np.uint8)) for one in MASKS],
        [Image.fromarray(np.where(one, 127, 128).astype(np.uint8)) for one in MASKS],
        [Image.fromarray(~one) for one in MASKS],
    ],
    ids=["arrays", "channel", "tensor", "tensor with channel", "list", "masks", "nearly grey", "bits"],
)
def test_a_hole_is_the_same_whatever_it_comes_as(given):
    hole = to_hole(given)
    assert hole.dtype == torch.bool and np.array_equal(hole.numpy(), MASKS[:, None])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("cat.png", "images: expected PIL pictures, uint8 arrays .* found str"),
        ([], "images: expected at least one, found an empty list"),
        (PIXELS[:0], r"images: expected at least one, found torch.uint8 \(0, 3, 16, 16\)"),
        (PIXELS.astype(np.float32), r"uint8 arrays \(H, W, 3\) or .* found float32 \(3, 16, 16, 3\)"),
        (IMAGES.numpy(), r"found uint8 \(3, 3, 16, 16\)"),
        (PIXELS[..., 0], r"found uint8 \(3, 16, 16\)"),
        (IMAGES[:, :1], r"or tensors \(3, H, W\) or \(b, 3, H, W\), found torch.uint8 \(3, 1, 16, 16\)"),
        (torch.from_numpy(PIXELS), r"found torch.uint8 \(3, 16, 16, 3\)"),
        (IMAGES.long(), r"images: expected uint8, or floating-point in \[0, 1\], found torch.int64"),
        (IMAGES.float(), r"images: expected floating-point values in \[0, 1\], found others"),
        (torch.full((3, 16, 16), torch.nan), r"images: expected floating-point values in \[0, 1\]"),
        (IMAGES[..., :0], r"images: expected at least one, found torch.uint8 \(3, 3, 16, 0\)"),
        ([IMAGES[0], Image.new("RGB", (20, 12))], "images: expected one size in a call, found 16x16, 20x12"),
    ],
)
def test_images_that_do_not_fit_are_described(given, message):
    with pytest.raises(ValueError, match=message):
        to_images(given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("mask.png", "hole: expected PIL masks .* found str"),
        ([], "hole: expected at least one, found an empty list"),
        (MASKS.astype(np.uint8), r"hole: .*bool \(True: missing\) arrays .* found uint8 \(3, 16, 16\)"),
        (torch.from_numpy(MASKS).float(), "found torch.float32"),
        (MASKS[0, 0], r"found torch.bool \(16,\)"),
        (MASKS[:, None].repeat(3, 1), r"found torch.bool \(3, 3, 16, 16\)"),
        ([MASKS[0], MASKS[1, :8]], "hole: expected one size in a call, found 16x16, 16x8"),
    ],
)
def test_holes_that_do_not_fit_are_described(given, message):
    with pytest.raises(ValueError, match=message):
        to_hole(given)


# --- the truth --------------------------------------------------------------------------------------------------------


def write_csv(path, images: np.ndarray):
    """The lab's test_gt.csv: a header, then rows of H*W*3 integers in H, W, C order."""
    rows = [",".join(map(str, image.ravel())) for image in images]
    path.write_text("\n".join([",".join(f"p{i}" for i in range(images[0].size)), *rows]) + "\n")
    return path


@pytest.fixture
def truth(tmp_path) -> np.ndarray:
    """3 images, as tmp_path/folder, truth.npz and test_gt.csv."""
    images = colourful(3, size=8)
    write_pictures(tmp_path / "folder", 3, size=8)
    np.savez(tmp_path / "truth.npz", other=np.zeros(2), images=images)
    np.savez(tmp_path / "unnamed.npz", images)
    write_csv(tmp_path / "test_gt.csv", images)
    return images


@pytest.mark.parametrize("name", ["folder", "truth.npz", "unnamed.npz", "test_gt.csv"])
def test_truth_is_the_same_from_a_folder_an_npz_and_a_csv(tmp_path, truth, name):
    read = read_truth(tmp_path / name)
    assert read.dtype == torch.uint8 and read.is_contiguous()
    assert torch.equal(read, torch.from_numpy(truth).permute(0, 3, 1, 2))


@pytest.mark.parametrize(
    ("row", "text", "told"),
    [
        (2, "1,2,3", "line 3: 3 values, expected"),
        (2, "", "line 3: 0 values, expected"),
        (3, "x," * 191 + "x", "line 4: expected integers, 0..255"),
        (3, "1.5," * 191 + "1", "line 4: expected integers, 0..255"),
        (1, "256," * 191 + "0", r"line 2: values outside 0\.\.255"),
        (1, "0," * 191 + "-1", r"line 2: values outside 0\.\.255"),
    ],
)
def test_a_malformed_csv_row_is_named_by_file_and_line(tmp_path, truth, row, text, told):
    lines = (tmp_path / "test_gt.csv").read_text().splitlines()
    lines[row] = text
    (tmp_path / "test_gt.csv").write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match=rf"test_gt\.csv, {told}"):
        read_truth(tmp_path / "test_gt.csv")


def no_array() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("images.npy", b"no array")
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("only_header.csv", b"a,b,c\n", "no rows after the header"),
        ("empty.csv", b"", "no rows after the header"),
        ("not_square.csv", b"a\n1,2,3,4,5,6\n", "line 2: 6 values"),
        ("binary.csv", b"\xff\xfe\x00\n\x80", "not a .csv file"),
        ("broken.npz", b"PK\x03\x04 cut short", "not an .npz of plain arrays"),
        ("no_array.npz", no_array(), "its first member is no array"),
        ("truth.txt", b"1", "true images come as a folder, an .npz or a .csv file"),
    ],
)
def test_a_truth_that_cannot_be_read_is_named(tmp_path, name, content, told):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name}.*{told}"):
        read_truth(tmp_path / name)


def test_a_missing_truth_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"gone\.csv: no such folder or file of true images"):
        read_truth(tmp_path / "gone.csv")


@pytest.mark.parametrize(
    "array",
    [np.zeros((2, 3, 8, 8), np.uint8), np.zeros((2, 8, 8, 3), np.float32), np.zeros((8, 8, 3), np.uint8)],
    ids=["channels first", "float", "one image"],
)
def test_an_npz_of_another_layout_is_refused(tmp_path, array):
    np.savez(tmp_path / "truth.npz", images=array)
    with pytest.raises(ValueError, match=r"truth\.npz: expected uint8 \(N, H, W, 3\), found"):
        read_truth(tmp_path / "truth.npz")


def test_an_npz_of_pickled_objects_and_an_empty_one_are_refused(tmp_path):
    """Reading the truth executes no code."""
    np.savez(tmp_path / "objects.npz", images=np.array([{}, []], dtype=object))
    np.savez(tmp_path / "empty.npz")
    for name in ("objects", "empty"):
        with pytest.raises(ValueError, match=rf"{name}\.npz: not an \.npz of plain arrays"):
            read_truth(tmp_path / f"{name}.npz")


def test_pictures_of_another_run_are_told(tmp_path, capsys):
    for name in ("image_0.png", "image_7.png", "image_9.png", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    start_logging()
    note_others(tmp_path, ["image_0.png", "image_1.png"])
    said = capsys.readouterr().out
    assert f"note: {tmp_path} holds 2 pictures that are not of this run, such as image_7.png" in said
    note_others(tmp_path, ["image_0.png", "image_7.png", "image_9.png"])
    note_others(tmp_path / "nowhere", [])
    assert capsys.readouterr().out == ""


def test_true_images_are_paired_by_number_not_by_place(lab, tmp_path):
    images, masks, true, _, _ = lab
    for path in sorted(true.iterdir(), reverse=True):
        number = int(path.stem.split("_")[1])
        path.rename(path.with_name(f"image_{number + 1:03}.png"))
    with pytest.raises(ValueError, match=r"alone are image_000\.png, image_007\.png"):
        Folders(images, masks, true, 16, 1)


@pytest.mark.parametrize("shape", [(10**13, 3), (2**62, 2**62)])
def test_an_npz_that_claims_more_than_there_is_memory_is_named(tmp_path, shape):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
    with zipfile.ZipFile(tmp_path / "huge.npz", "w") as archive:
        archive.writestr("images.npy", header.getvalue())
    with pytest.raises(ValueError, match=r"huge\.npz: not an \.npz of plain arrays"):
        read_truth(tmp_path / "huge.npz")


def test_a_csv_with_a_value_beyond_all_integers_is_named(tmp_path):
    (tmp_path / "true.csv").write_text("a,b,c\n1,2,3\n1,2,1" + "0" * 30 + "\n")
    with pytest.raises(ValueError, match=r"true\.csv, line 3: "):
        read_truth(tmp_path / "true.csv")
