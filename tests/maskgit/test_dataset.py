"""dataset.py: folders of pictures, windows of larger ones, where they are kept."""

import tracemalloc

import numpy as np
import pytest
import torch
from conftest import colourful, save_picture
from PIL import Image

from maskgit.data import (
    list_images,
    read_image,
)
from maskgit.dataset import ImageDataset, Maps, Store, read_holes


def test_read_holes_stacks_masks_with_a_channel(tmp_path):
    holes = np.random.default_rng(2).random((3, 8, 8)) < 0.5
    paths = [save_picture(tmp_path / f"m{i}.png", (~hole).astype(np.uint8) * 255) for i, hole in enumerate(holes)]
    stacked = read_holes(paths)
    assert stacked.dtype == torch.bool and torch.equal(stacked, torch.from_numpy(holes)[:, None])


# --- folders ----------------------------------------------------------------------------------------------------------


def test_a_folder_is_kept_as_uint8_in_order(pictures):
    folder = ImageDataset(pictures, workers=2)
    expected = torch.from_numpy(colourful(8)).permute(0, 3, 1, 2)
    assert folder.images.dtype == torch.uint8 and folder.images.is_contiguous() and len(folder) == 8
    assert torch.equal(folder.images, expected)
    assert [path.name for path in folder.paths] == [f"image_{i:03}.png" for i in range(8)]


@pytest.mark.parametrize("workers", [0, 1, 5])
def test_the_number_of_threads_changes_nothing(pictures, workers):
    assert torch.equal(ImageDataset(pictures, 12, workers).images, ImageDataset(pictures, 12, 2).images)


def test_a_list_of_files_is_taken_in_its_own_order(pictures):
    files = list_images(pictures)
    assert torch.equal(ImageDataset([files[5], files[2]]).images, ImageDataset(pictures).images[[5, 2]])


def test_an_image_alone_equals_the_image_in_its_folder(pictures):
    together = ImageDataset(pictures, size=10).images
    for index, path in enumerate(list_images(pictures)):
        assert torch.equal(ImageDataset([path], size=10).images, together[index : index + 1])


def test_without_a_size_the_files_keep_theirs_which_must_be_one(tmp_path, pictures):
    assert ImageDataset(pictures, size=None).images.shape == (8, 3, 16, 16)
    save_picture(pictures / "image_100.png", np.zeros((16, 20, 3), dtype=np.uint8))
    with pytest.raises(ValueError, match=r"image_100\.png is 20x16, but .*image_000\.png is 16x16: one size is needed"):
        ImageDataset(pictures)
    assert ImageDataset(pictures, size=16).images.shape == (9, 3, 16, 16)


def test_a_broken_file_of_a_folder_is_named(pictures):
    (pictures / "image_004.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(ValueError, match=r"image_004\.png: cannot be read"):
        ImageDataset(pictures)


# --- windows of pictures that are larger than the model ---------------------------------------------------------------


@pytest.fixture
def large(tmp_path):
    """A folder of three pictures, 40x24, 20x36 and 30x10 (smaller than a window of 16), and their pixels."""
    folder, pictures = tmp_path / "large", []
    folder.mkdir()
    for index, (width, height) in enumerate(((40, 24), (20, 36), (30, 10))):
        noise = np.random.default_rng(index).integers(256, size=(height, width, 3), dtype=np.uint8)
        save_picture(folder / f"{index}.png", noise)
        pictures.append(torch.from_numpy(noise).permute(2, 0, 1))
    return folder, pictures


def test_whole_pictures_keep_their_size_and_small_ones_are_enlarged(large):
    folder, pictures = large
    maps = ImageDataset(folder, 16, windows="random").maps
    assert maps.sizes.tolist() == [[24, 40], [36, 20], [16, 48]]
    assert all(torch.equal(maps[index], pictures[index]) for index in (0, 1))
    with pytest.raises(ValueError, match="unequal sizes"):
        maps.stack()


@pytest.mark.parametrize(("orientation", "size"), [(6, [32, 20]), (9, [20, 32])])  # there is no 9
def test_a_picture_on_its_side_is_turned_upright_before_windows_are_cut(tmp_path, orientation, size):
    exif = Image.Exif()
    exif[0x0112] = orientation
    (tmp_path / "turned").mkdir()
    Image.fromarray(colourful(1, 32)[0][:20]).save(tmp_path / "turned" / "a.jpg", exif=exif)
    maps = ImageDataset(tmp_path / "turned", 16, windows="random").maps
    assert maps.sizes.tolist() == [size]
    assert torch.equal(maps[0], torch.from_numpy(read_image(tmp_path / "turned" / "a.jpg")).permute(2, 0, 1))


def test_windows_are_a_function_of_the_generator_and_reach_every_place(large):
    folder, pictures = large
    maps = ImageDataset(folder, 16, windows="random").maps
    draws = [maps.draw(torch.tensor([0, 1]).repeat(2000), 16, torch.Generator().manual_seed(s)) for s in (5, 5, 6)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    for index, (rows, columns) in enumerate(((9, 25), (21, 5))):
        seen = {tuple(place) for place in draws[0][draws[0][:, 0] == index][:, 1:].tolist()}
        assert seen == {(y, x) for y in range(rows) for x in range(columns)}
    for window, (index, y, x) in zip(maps.read(draws[0][:8], 16), draws[0][:8].tolist(), strict=True):
        assert torch.equal(window, pictures[index][:, y : y + 16, x : x + 16])


def test_pictures_of_the_windows_size_cost_no_draw(pictures):
    maps, generator = ImageDataset(pictures, 16).maps, torch.Generator().manual_seed(0)
    before = generator.get_state()
    windows = maps.draw(torch.tensor([3, 1]), 16, generator)
    assert windows.tolist() == [[3, 0, 0], [1, 0, 0]] and torch.equal(generator.get_state(), before)


def test_a_map_smaller_than_the_window_is_refused():
    with pytest.raises(ValueError, match=r"a map of 8x8 has no window of 9"):
        Maps.of(torch.zeros(2, 1, 8, 8)).draw(torch.tensor([1]), 9, torch.Generator())


def test_fixed_windows_are_the_same_every_time_and_from_a_file(tmp_path, large):
    folder, pictures = large
    fixed = [
        ImageDataset(folder, 16, store=store, windows="fixed").images
        for store in (None, None, Store(tmp_path / "cache", 0), Store(tmp_path / "cache", 0))
    ]
    assert fixed[0].shape == (3, 3, 16, 16) and all(torch.equal(fixed[0], other) for other in fixed[1:])
    assert any(torch.equal(fixed[0][0], pictures[0][:, y : y + 16, x : x + 16]) for y in range(9) for x in range(25))


# --- where they are kept ----------------------------------------------------------------------------------------------


def test_a_file_gives_the_pixels_that_memory_gives(tmp_path, pictures, monkeypatch):
    monkeypatch.setattr("maskgit.dataset.CHUNK", 3)  # 8 pictures: 3, 3 and 2
    for size in (None, 12):
        images = [ImageDataset(pictures, size, 2, Store(tmp_path / "cache", memory)).images for memory in (10**6, 0)]
        assert torch.equal(*images) and torch.equal(images[0], ImageDataset(pictures, size).images)
        rows = torch.tensor([5, 0, 5, 7])
        assert torch.equal(images[1][rows], images[0][rows])
    names = [path.name for path in (tmp_path / "cache").iterdir()]
    assert len(names) == 2 and all(name.endswith(".npy") for name in names)  # no temporary file


def test_a_file_that_another_run_may_have_mapped_is_never_deleted(tmp_path, pictures):
    store = Store(tmp_path / "cache", 0)
    first = ImageDataset(pictures, 16, 1, store).images
    before = first.clone()
    ImageDataset(pictures, 12, 1, store)
    assert len(list((tmp_path / "cache").iterdir())) == 2 and torch.equal(first, before)
    assert torch.equal(ImageDataset(pictures, 16, 1, store).images, before)


def test_what_fits_stays_in_memory(tmp_path, pictures):
    size = 8 * 3 * 16 * 16
    ImageDataset(pictures, 16, store=Store(tmp_path / "cache", size))
    assert not (tmp_path / "cache").exists()
    ImageDataset(pictures, 16, store=Store(tmp_path / "cache", size - 1))
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_file_is_made_again_only_where_pictures_changed(tmp_path, pictures, pixels, monkeypatch):
    store, decoded = Store(tmp_path / "cache", 0), []
    monkeypatch.setattr("maskgit.dataset.read_image", lambda path, size: decoded.append(path) or read_image(path, size))

    def load():
        decoded.clear()
        return ImageDataset(pictures, 16, 1, store).images, len(decoded)

    first, count = load()
    assert count == 8 and load()[1] == 0
    save_picture(pictures / "image_002.png", pixels[::-1].copy())
    changed, count = load()
    assert count == 8 and not torch.equal(changed[2], first[2]) and torch.equal(changed[3], first[3])
    (pictures / "image_007.png").unlink()
    assert load()[1] == 7 and len(load()[0]) == 7


def test_a_broken_picture_leaves_no_file(tmp_path, pictures):
    (pictures / "image_006.png").write_bytes(b"\x89PNG")
    with pytest.raises(ValueError, match=r"image_006\.png: cannot be read"):
        ImageDataset(pictures, 16, store=Store(tmp_path / "cache", 0))
    assert not list((tmp_path / "cache").iterdir())


def test_memory_does_not_grow_with_the_number_of_rows(tmp_path):
    """Chunks are written as they come, and a batch is all that is read."""

    def peak(chunks: int) -> int:
        tracemalloc.start()
        rows = (np.full((100, 3, 8, 8), index, dtype=np.uint8) for index in range(chunks))
        kept = Store(tmp_path, 0).keep(f"rows{chunks}", "key", (100 * chunks, 3, 8, 8), rows)
        assert kept[torch.tensor([0, 100 * chunks - 1])].amax(dim=(1, 2, 3)).tolist() == [0, chunks - 1]
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    peak(2)  # what the first call imports
    assert peak(200) < 1.5 * peak(10) < 100 * 3 * 8 * 8 * 20
