"""windows.py: one grid seen through overlapping windows."""

import numpy as np
import pytest
import torch

from maskgit.windows import WindowPredictor, Windows, blending, windows_over

G, F, K = 4, 2, 7  # tokens a side of a window, pixels a side of a cell, codes
CPU = torch.device("cpu")


def at(*cells, shape=(10, 13)) -> np.ndarray:
    wanted = np.zeros(shape, dtype=bool)
    wanted[tuple(np.array(cells).T)] = True
    return wanted


def boxes(windows: Windows) -> list[tuple[int, int]]:
    """The upper left cell of each window."""
    return [tuple(cell) for cell in windows.cells[windows.index[:, 0]].tolist()]


def test_windows_lie_half_a_side_apart_and_see_a_wanted_cell():
    assert boxes(windows_over(at((0, 0)), G)) == [(0, 0)]
    assert boxes(windows_over(at((4, 4)), G)) == [(2, 2), (2, 4), (4, 2), (4, 4)]
    assert boxes(windows_over(at((9, 12)), G)) == [(6, 9)]  # the last ones end at the border
    assert boxes(windows_over(np.ones((4, 4), dtype=bool), G)) == [(0, 0)]
    every = boxes(windows_over(np.ones((10, 13), dtype=bool), G))
    assert every == [(top, left) for top in (0, 2, 4, 6) for left in (0, 2, 4, 6, 8, 9)]


def test_cells_are_those_that_a_window_covers_each_once_in_the_order_of_their_last_window():
    windows = windows_over(at((4, 4), (9, 0)), G)
    covered = {(top + i, left + j) for top, left in boxes(windows) for i in range(G) for j in range(G)}
    cells = [tuple(cell) for cell in windows.cells.tolist()]
    assert set(cells) == covered and len(cells) == len(covered)
    for window, (top, left) in enumerate(boxes(windows)):
        within = [[top + i, left + j] for i in range(G) for j in range(G)]
        assert windows.cells[windows.index[window]].tolist() == within
    last = [max(w for w in range(len(windows)) if i in windows.index[w]) for i in range(len(cells))]
    assert windows.last.tolist() == last == sorted(last)


@pytest.mark.parametrize("wanted", [at((0, 0), shape=(3, 9)), np.zeros((9, 9), dtype=bool)])
def test_a_grid_that_is_too_small_or_wants_nothing_is_refused(wanted):
    with pytest.raises(ValueError, match="expected a grid of at least 4x4 cells, some of them wanted, found"):
        windows_over(wanted, G)


def test_pixels_go_to_cells_and_windows_and_back():
    picture = np.random.default_rng(0).integers(256, size=(10 * F, 13 * F, 3), dtype=np.uint8)
    windows = windows_over(at((4, 4), (9, 12)), G)
    cells = windows.gather(picture)
    row, column = windows.cells[5].tolist()
    assert np.array_equal(cells[5].permute(1, 2, 0), picture[row * F : row * F + F, column * F : column * F + F])
    images = windows.images(cells, torch.arange(len(windows)))
    for (top, left), image in zip(boxes(windows), images, strict=True):
        part = picture[top * F : (top + G) * F, left * F : (left + G) * F]
        assert np.array_equal(image.permute(1, 2, 0), part)
    assert torch.equal(windows.to_cells(images, F), cells[windows.index.flatten()])
    blank = np.zeros_like(picture)
    windows.scatter(cells, blank)
    seen = np.zeros(picture.shape[:2], dtype=bool)
    for row, column in windows.cells.tolist():
        seen[row * F : row * F + F, column * F : column * F + F] = True
    assert np.array_equal(blank, np.where(seen[..., None], picture, 0))


def of_window(tokens: torch.Tensor) -> torch.Tensor:
    """Logits of the hidden ones that depend on all that a window shows, and on the place in it."""
    place = torch.arange(G * G)[:, None] * torch.arange(1, K + 1)
    logits = torch.sin(tokens.float().sum(dim=1)[:, None, None] + place)  # (b, n, k)
    return logits[tokens == K]


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_logits_are_the_mean_over_the_windows_that_see_a_hidden_cell(batch_size):
    windows = windows_over(at((4, 4), (9, 12), (0, 6)), G)
    n = len(windows.cells)
    rng = torch.Generator().manual_seed(0)
    tokens = torch.randint(K, (2, n), generator=rng).masked_fill(torch.rand(2, n, generator=rng) < 0.4, K)
    found = torch.cat(list(WindowPredictor(windows, of_window, K, batch_size, CPU)(tokens)))
    wanted = []
    for row in tokens:
        seen = [[] for _ in range(n)]
        for index in windows.index:
            logits = iter(of_window(row[index][None]))
            for cell in index.tolist():
                if row[cell] == K:
                    seen[cell].append(next(logits))
        wanted += [torch.stack(each).mean(dim=0) for each in seen if each]
    assert torch.allclose(found, torch.stack(wanted), atol=1e-6)


def test_windows_without_a_hidden_cell_are_not_looked_through_and_chunks_come_early():
    windows = windows_over(np.ones((4, 40), dtype=bool), G)
    tokens = torch.zeros(1, len(windows.cells), dtype=torch.long)
    tokens[0, windows.index[0, 0]] = tokens[0, windows.index[-1, -1]] = K
    looked = []

    def predict(seen):
        looked.append(len(seen))
        return of_window(seen)

    chunks = WindowPredictor(windows, predict, K, 1, CPU)(tokens)
    assert len(next(chunks)) == 1 and looked == [1]  # the first is there before the last is looked for
    assert [len(chunk) for chunk in chunks] == [1] and sum(looked) == 2


def test_blending_weighs_the_middle_most_and_shifts_add_up():
    weight = blending(8)[0, 0]
    assert torch.equal(weight, weight.T) and torch.equal(weight, weight.flip(0)) and weight.min() > 0
    assert weight.argmax() == 3 * 8 + 3
    row = weight[0] / weight[0].sum()
    assert torch.allclose(row[:4] + row[4:], (row[:4] + row[4:]).mean().expand(4))  # half a window apart: constant
