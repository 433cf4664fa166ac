"""listing.py: which weights are here."""

import pytest
import torch
from tiny_networks import save, transformer, vqgan

from maskgit.listing import listing


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    torch.manual_seed(0)
    folder = save(tmp_path / "shelf" / "cats", vqgan(), transformer())
    (folder / "README.md").write_text("# Model card\n\nFills holes in cats. Two files.\nMore.\n")
    (tmp_path / "shelf" / "empty").mkdir()
    return folder.parent


def test_a_folder_has_its_sizes_its_parameters_and_the_first_words_of_its_card(shelf):
    head, line, card = listing([shelf]).splitlines()
    parameters = [sum(p.numel() for p in network.parameters()) / 1e6 for network in (vqgan(), transformer())]
    sizes = [(shelf / "cats" / f"{name}.safetensors").stat().st_size / 1e6 for name in ("vqgan", "transformer")]
    assert head.split() == ["--checkpoint", "pictures", "tokens", "parameters", "files"]
    assert line.split()[:6] == [str(shelf / "cats"), "16x16", "4x4", "of", "32", "codes"]
    assert "{:.1f} + {:.1f} M ".format(*parameters) in line and line.endswith("{:.1f} + {:.1f} MB".format(*sizes))
    assert card == "    Fills holes in cats"


def test_names_are_relative_to_the_current_folder_and_a_card_may_be_missing(shelf, monkeypatch):
    (shelf / "cats" / "README.md").unlink()
    monkeypatch.chdir(shelf.parent)
    _, line, card = listing([shelf, shelf.parent / "nowhere"]).splitlines()
    assert line.startswith("shelf/cats ") and card.strip() == "no model card"


def test_what_cannot_be_used_is_listed_with_the_reason(shelf):
    content = (shelf / "cats" / "vqgan.safetensors").read_bytes()
    (shelf / "half").mkdir()
    (shelf / "half" / "vqgan.safetensors").write_bytes(content)
    (shelf / "torn").mkdir()
    for name in ("vqgan", "transformer"):
        (shelf / "torn" / f"{name}.safetensors").write_bytes(content[:-9])
    *_, half, torn = listing([shelf]).splitlines()
    told = f"training_transformer.py --vqgan {shelf}/half/vqgan.safetensors goes on"
    assert half == f"{shelf}/half  stage 1 alone: {told}"
    assert torn.startswith(f"{shelf}/torn  cannot be used: {shelf}/torn/vqgan.safetensors: not a weights file (")


def test_no_weights_anywhere_is_said(tmp_path):
    assert listing([tmp_path / "a", tmp_path / "b"]) == f"no weights in {tmp_path / 'a'} or {tmp_path / 'b'}"


def test_the_shipped_weights_are_on_the_list():
    assert "cats64" in (text := listing()) and "64x64" in text and "fills holes in 64x64 pictures" in text
