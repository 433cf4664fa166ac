"""Tiny random networks, and checkpoints of them."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from maskgit.decoding import State
from maskgit.decoding_config import DecodingConfig
from maskgit.inpainter import Inpainter
from models.autoencoder import VQGANConfig
from models.checkpoint import file_hash, save_weights
from models.transformer import Transformer, TransformerConfig
from models.vqgan import VQGAN

SIZE, GRID, CODES = 16, 4, 32
DECODING = DecodingConfig(total_iter=4, sweet_spot=4)
PATCH = {"kind": "patch", "stem": 16, "widths": (16,), "blocks": 1}
CONV = {"kind": "conv", "stem": 8, "widths": (8, 8), "blocks": 1, "downsample_after": (0, 1)}


def vqgan(encoder: dict = PATCH, codes: int = CODES, **branch) -> VQGAN:
    config = VQGANConfig(
        image_size=SIZE, latent=8, norm_groups=4, attention_resolution=GRID, encoder=encoder,
        decoder={"widths": (8, 8), "blocks": 1, "upsample_after": (0, 1)} | branch,
        codebook={"codes": codes, "dim": 8, "l2_normalised": True},
    )  # fmt: skip
    return VQGAN(config)


def transformer(codes: int = CODES, tokens: int = GRID**2) -> Transformer:
    config = TransformerConfig(
        codes=codes, tokens=tokens, width=16, depth=2, heads=2, mlp_width=32, dropout=0.1, attention_dropout=0.1,
        norm="pre", positions="rotary", tied=False, position_bias=False,
    )  # fmt: skip
    model = Transformer(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)  # far from its start, where it says the same of every token
    return model


def save(folder: Path, stage1: VQGAN, stage2: Transformer, **notes: str) -> Path:
    """Both networks as the trainings leave them; `notes` replace the transformer's."""
    save_weights(folder / "vqgan.safetensors", stage1, stage1.config)
    own = {"decoding": DECODING.model_dump_json(), "vqgan": file_hash(folder / "vqgan.safetensors"), "step": "7"}
    save_weights(folder / "transformer.safetensors", stage2, stage2.config, **(notes or own))
    return folder


def noise(n: int, seed: int = 0) -> Tensor:
    """uint8 images (n, 3, H, W), every pixel its own."""
    return torch.from_numpy(np.random.default_rng(seed).integers(256, size=(n, 3, SIZE, SIZE), dtype=np.uint8))


def states_of(model: Inpainter, images: Tensor, hole: Tensor, seeds, **options) -> list[State]:
    """The states of all images decoded in one batch."""
    states: list[State] = []
    model.complete(
        images, hole, seeds, batch_size=len(images), on_step=lambda rows, state: states.append(state), **options
    )
    return states
