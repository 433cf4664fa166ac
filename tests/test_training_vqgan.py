"""training_vqgan.py: the three trainings in a row leave a folder that inference takes."""

import shutil

import pytest
import torch
import yaml
from training_runs import VAL, refusal, train

import inpainting
from maskgit.inpainter import Inpainter
from maskgit.masks import make_holes
from models.checkpoint import file_hash


@pytest.fixture
def finetuning(trained, tmp_path):
    """A config of decoder finetuning on top of `trained`."""
    out, config = trained
    ground = shutil.copy(config, tmp_path / "ground.yml")
    values = {
        "base": "ground.yml",
        "vqgan": {"decoder": {"known_width": 4}},
        "vqgan_training": {
            "init": str(out / "vqgan.safetensors"),
            "holes": {"box": 1.0, "walk": 1.0},
            "guesses": {"transformer": str(out / "transformer.safetensors"), "share": 0.5, "total_iter": 2},
            "adversarial": {"weight": 0.0},
            "epochs": 2,
        },
    }
    path = tmp_path / "decoder.yml"
    path.write_text(yaml.safe_dump(values))
    assert ground.is_file()
    return path


def test_the_folder_of_a_finetuned_decoder_is_complete_for_inference(finetuning, trained, tmp_path):
    out = train("vqgan", finetuning, tmp_path / "decoder")
    assert file_hash(out / "transformer.safetensors") == file_hash(trained[0] / "transformer.safetensors")
    images, hole = VAL, make_holes("box", len(VAL), 16)
    ours, plain = (Inpainter.from_pretrained(folder, "cpu") for folder in (out, trained[0]))
    one, other = (inpainter(images, hole) for inpainter in (ours, plain))
    assert torch.equal(one.tokens, other.tokens) and not torch.equal(one.raw, other.raw)  # another decoder, same tokens
    inpainting.main(["--checkpoint", str(out), "--out", str(tmp_path / "filled"), "--device", "cpu"])
    assert (tmp_path / "filled" / "overview.png").is_file()


def test_another_transformer_in_the_folder_is_never_overwritten(finetuning, trained, tmp_path, capsys):
    out = tmp_path / "decoder"
    out.mkdir()
    (out / "transformer.safetensors").write_bytes(b"mine")
    told = refusal(capsys, "vqgan", finetuning, out)
    assert "transformer.safetensors: another transformer than" in told
    assert (out / "transformer.safetensors").read_bytes() == b"mine"
