"""inpainting.py with tiny random networks: `Inpainter`, and the command line on folders in the lab's layout."""

import json
import logging
import shutil
from pathlib import Path
from typing import NamedTuple

import lpips
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from torch import Tensor, nn

import fid_score
import inpainting
from evaluation.metrics import frechet_distance, hole_psnr
from maskgit import classical, visualize
from maskgit.data import GREY, to_float, to_pixels, to_uint8
from maskgit.decoding import DecodingConfig
from maskgit.inpainter import Inpainter, sample_seed
from maskgit.masks import FAMILIES, make_holes, to_hidden
from models import features
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


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def no_handler_left_behind():
    """The command line logs to standard output, which pytest closes after each test."""
    yield
    for handler in [handler for handler in logging.root.handlers if type(handler) is logging.StreamHandler]:
        logging.root.removeHandler(handler)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    """Folders with a VQGAN of each encoder and a transformer."""
    torch.manual_seed(1)
    root = tmp_path_factory.mktemp("checkpoints")
    return {kind: save(root / kind, vqgan(enc), transformer()) for kind, enc in (("patch", PATCH), ("conv", CONV))}


@pytest.fixture(scope="module")
def checkpoint(checkpoints) -> Path:
    return checkpoints["patch"]


@pytest.fixture(scope="module")
def inpainters(checkpoints) -> dict[str, Inpainter]:
    return {kind: Inpainter.from_pretrained(folder, "cpu") for kind, folder in checkpoints.items()}


@pytest.fixture(scope="module", params=["patch", "conv"])
def inpainter(request, inpainters) -> Inpainter:
    return inpainters[request.param]


def noise(n: int, seed: int = 0) -> Tensor:
    """uint8 images (n, 3, H, W), every pixel its own."""
    return torch.from_numpy(np.random.default_rng(seed).integers(256, size=(n, 3, SIZE, SIZE), dtype=np.uint8))


def equal(one, other) -> bool:
    return torch.equal(one.images, other.images) and torch.equal(one.raw, other.raw) and torch.equal(
        one.tokens, other.tokens
    )  # fmt: skip


any_holes = arrays(bool, (2, 1, SIZE, SIZE)).map(torch.from_numpy)
EMPTY, FULL = torch.zeros(2, 1, SIZE, SIZE, dtype=torch.bool), torch.ones(2, 1, SIZE, SIZE, dtype=torch.bool)
MIXED = torch.cat([EMPTY[:1], FULL[:1]])


# --- Inpainter: what stays ---


def test_from_pretrained_gives_frozen_networks_and_the_decoding_of_the_checkpoint(checkpoint):
    loaded = Inpainter.from_pretrained(checkpoint, device="cpu")
    assert (loaded.decoding, loaded.device, loaded.size) == (DECODING, torch.device("cpu"), SIZE)
    for network in (loaded.vqgan, loaded.transformer):
        assert not any(module.training for module in network.modules())
        assert not any(parameter.requires_grad for parameter in network.parameters())


@settings(max_examples=20, deadline=None)
@given(hole=any_holes, seed=st.integers(0, 2**63), margin=st.integers(0, 2))
@example(hole=EMPTY, seed=0, margin=0)
@example(hole=FULL, seed=0, margin=0)
@example(hole=MIXED, seed=0, margin=1)
def test_known_pixels_are_byte_identical_and_the_rest_is_the_decoders(inpainter, hole, seed, margin):
    images = noise(2, seed % 1000)
    filled = inpainter(images, hole, seed=seed, margin=margin)
    everywhere = hole.expand_as(images)
    assert filled.images.dtype == filled.raw.dtype == torch.uint8
    assert torch.equal(filled.images[~everywhere], images[~everywhere])
    assert torch.equal(filled.images[everywhere], filled.raw[everywhere])
    assert filled.tokens.shape == (2, GRID**2) and filled.tokens.min() >= 0 and filled.tokens.max() < CODES
    assert torch.equal(filled.raw, inpainter.decode(filled.tokens, images, hole))


@pytest.mark.parametrize("family", FAMILIES)
def test_known_pixels_are_byte_identical_for_every_family_of_holes(inpainter, family):
    images, hole = noise(4), make_holes(family, 4, SIZE)
    before, everywhere = images.clone(), hole.expand_as(images)
    filled = inpainter(images, hole).images
    assert torch.equal(images, before)  # what was given is not modified
    assert torch.equal(filled[~everywhere], images[~everywhere])
    assert (filled != images)[everywhere].float().mean() > 0.9  # noise is not guessed


def test_raw_differs_from_the_composited_picture_outside_the_hole_alone(inpainter):
    images, hole = noise(2), make_holes("box", 2, SIZE)
    filled = inpainter(images, hole)
    assert torch.equal((filled.raw != filled.images) & hole, torch.zeros_like(images, dtype=torch.bool))
    assert (filled.raw != filled.images)[~hole.expand_as(images)].float().mean() > 0.9


@settings(max_examples=20, deadline=None)
@given(hole=any_holes, seed=st.integers(0, 1000), margin=st.integers(0, 1))
@example(hole=EMPTY, seed=3, margin=0)
def test_with_the_patch_encoder_known_tokens_are_those_of_the_whole_image_to_the_end(inpainters, hole, seed, margin):
    model, images = inpainters["patch"], noise(2, seed)
    whole = model.vqgan.encode(to_float(images))
    states = list(model.steps(images, hole, [seed, seed + 1], margin))
    hidden = to_hidden(hole, GRID, margin)
    assert whole.unique().numel() >= 6  # a codebook in use, so that equality says something
    for state in states:
        assert torch.equal(state.tokens[~hidden], whole[~hidden])
        assert (state.tokens[state.hidden] == model.transformer.mask_id).all()
    assert not states[-1].hidden.any()


def test_the_conv_encoder_leaks_even_grey_into_known_tokens(inpainters):
    """Why the default is the patch encoder; and the test above can fail."""
    model, images, hole = inpainters["conv"], noise(8), make_holes("box", 8, SIZE)
    known = ~to_hidden(hole, GRID)
    assert (model.vqgan.encode(to_float(images)) != model.encode(images, hole))[known].any()


@settings(max_examples=20, deadline=None)
@given(hole=any_holes, seed=st.integers(0, 1000))
@example(hole=FULL, seed=1)
@example(hole=MIXED, seed=1)
def test_the_pixels_painted_in_the_hole_change_nothing(inpainter, hole, seed):
    images = noise(2, seed)
    repainted = torch.where(hole, noise(2, seed + 1), images)
    assert equal(inpainter(images, hole, seed=seed), inpainter(repainted, hole, seed=seed))


# --- Inpainter: seeds and batches ---


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["patch", "conv"])
def test_an_image_alone_equals_the_image_in_a_batch(checkpoints, kind, precision):
    model = Inpainter.from_pretrained(checkpoints[kind], "cpu", precision)
    images, hole = noise(6), torch.cat([make_holes(family, 1, SIZE) for family in FAMILIES])
    together = model(images, hole, seed=5)
    for i in range(6):
        alone = model(images[i : i + 1], hole[i : i + 1], seed=5 + i)
        assert torch.equal(alone.tokens, together.tokens[i : i + 1])
        assert torch.equal(alone.images, together.images[i : i + 1])


def test_compiled_networks_give_the_same_pictures(checkpoint, inpainters, monkeypatch):
    original = nn.Module.compile  # with the backend `eager`, which needs no C++ compiler
    monkeypatch.setattr(nn.Module, "compile", lambda module, **options: original(module, backend="eager", **options))
    images, hole = noise(3), torch.cat([make_holes(family, 1, SIZE) for family in ("walk", "box", "thin")])
    compiled = Inpainter.from_pretrained(checkpoint, "cpu", compiled=True)
    assert equal(compiled(images, hole), inpainters["patch"](images, hole))
    assert compiled.transformer._compiled_call_impl and compiled.vqgan.decoder._compiled_call_impl


def test_bfloat16_logits_agree_with_float32_within_a_hundredth_of_their_spread(checkpoint):
    whole, half = (Inpainter.from_pretrained(checkpoint, "cpu", kind) for kind in ("float32", "bfloat16"))
    tokens = torch.full((2, GRID**2), CODES)
    exact, rounded = whole.predict(tokens), half.predict(tokens)
    assert 0 < (rounded - exact).abs().max() < 0.01 * (exact.max() - exact.min())


def test_the_same_seed_gives_the_same_picture_and_another_seed_another(inpainter):
    images, hole = noise(1).repeat(3, 1, 1, 1), make_holes("half", 1, SIZE).repeat(3, 1, 1, 1)
    filled = inpainter(images, hole, seed=[4, 9, 4])
    assert torch.equal(filled.images[0], filled.images[2]) and not torch.equal(filled.images[0], filled.images[1])
    assert equal(filled, inpainter(images, hole, seed=[4, 9, 4]))
    assert equal(inpainter(images, hole, seed=4), inpainter(images, hole, seed=[4, 5, 6]))  # one seed for all: seed + i


def test_the_global_random_state_is_neither_read_nor_moved(inpainter):
    images, hole = noise(2), FULL
    torch.manual_seed(0)
    before, first = torch.get_rng_state(), inpainter(images, hole)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert equal(first, inpainter(images, hole))


# --- Inpainter: hidden tokens, decoding options ---


def test_margin_hides_rings_of_tokens_around_the_hole_and_draws_them_anew(inpainters):
    model, hole = inpainters["patch"], torch.zeros(8, 1, SIZE, SIZE, dtype=torch.bool)
    hole[:, :, 1, 2] = True  # one pixel of the first token
    assert [int(model.hide(hole[:1], margin).sum()) for margin in (0, 1, 2, 3)] == [1, 4, 9, 16]
    images = noise(8)
    whole, ring = model.vqgan.encode(to_float(images)), model.hide(hole, 1)
    tokens = model(images, hole, margin=1).tokens
    assert (tokens != whole)[ring].float().mean() > 0.5 and torch.equal(tokens[~ring], whole[~ring])


@pytest.mark.parametrize(("total", "stop"), [(6, 3), (5, 1), (3, 3), (40, 40)])
def test_stopping_early_fills_everything(inpainters, total, stop):
    decoding = DecodingConfig(total_iter=total, sweet_spot=stop, mask_func="linear")
    states = list(inpainters["patch"].steps(noise(2), FULL, [0, 1], decoding=decoding))
    assert len(states) == min(stop, GRID**2) and not states[-1].hidden.any()
    assert states[-1].tokens.max() < CODES  # no mask id left


def test_other_decoding_options_reach_the_sampler(inpainters):
    model, images = inpainters["patch"], noise(2)
    greedy = {"sampling_temperature": 0.0, "temperature": 0.0}
    assert equal(model(images, FULL, seed=0, **greedy), model(images, FULL, seed=7, **greedy))
    assert not equal(model(images, FULL, seed=0), model(images, FULL, seed=7))


@pytest.mark.parametrize(
    ("keywords", "settings"),
    [
        ({"steps": 6, "schedule": "linear"}, {"total_iter": 6, "sweet_spot": 6, "mask_func": "linear"}),
        ({"steps": 6, "sweet_spot": 2}, {"total_iter": 6, "sweet_spot": 2}),
        ({"sampler": "halton", "top_k": 3}, {"sampler": "halton", "top_k": 3}),
        ({"temperature": 1, "sampling_temperature": 0.5}, {"temperature": 1.0, "sampling_temperature": 0.5}),
    ],
)
def test_keywords_of_a_call_are_settings_of_the_decoding(inpainters, keywords, settings):
    model, images, seeds = inpainters["patch"], noise(2), [3, 4]
    *_, last = model.steps(images, FULL, seeds, decoding=DecodingConfig(**DECODING.model_dump() | settings))
    filled = model(images, FULL, seed=3, **keywords)
    assert torch.equal(filled.tokens, last.tokens) and torch.equal(filled.confidence, last.confidence)


def test_confidence_is_one_where_known_and_the_codes_probability_where_decided(inpainters):
    model, images, hole = inpainters["patch"], noise(2), make_holes("box", 2, SIZE)
    filled, hidden = model(images, hole, steps=1), model.hide(hole)
    assert (filled.confidence[~hidden] == 1).all()
    logits = model.predict(model.encode(images, hole).masked_fill(hidden, model.transformer.mask_id))
    p = logits.softmax(dim=1).gather(1, filled.tokens[hidden][:, None])[:, 0]
    torch.testing.assert_close(filled.confidence[hidden], p)
    assert p.min() > 0 and p.max() < 1


def test_samples_of_an_image_are_neighbours_and_the_first_is_the_only_one_of_a_plain_call(inpainters):
    model, images, hole = inpainters["patch"], noise(2), make_holes("half", 2, SIZE)
    three, one = model(images, hole, seed=5, samples=3), model(images, hole, seed=5)
    assert torch.equal(three.images[::3], one.images) and len(three.pictures) == 6
    known = ~hole.repeat_interleave(3, dim=0).expand_as(three.images)
    assert torch.equal(three.images[known], images.repeat_interleave(3, dim=0)[known])
    assert len({bytes(image.numpy()) for image in three.images}) == 6
    alone = model(images[1:], hole[1:], seed=[6], samples=3)
    assert torch.equal(alone.images, three.images[3:])
    assert torch.equal(model(images[:1], hole[:1], seed=sample_seed(5, 2)).images, three.images[2:3])


def test_pictures_arrays_and_tensors_give_the_same(inpainters):
    model, images, hole = inpainters["patch"], noise(2), make_holes("box", 2, SIZE)
    expected = model(images, hole, seed=2)
    pixels = images.permute(0, 2, 3, 1).numpy()
    pictures = [Image.fromarray(image) for image in pixels]
    masks = [Image.fromarray(np.where(one[0], 0, 255).astype(np.uint8)) for one in hole.numpy()]
    for some, missing in ((pictures, masks), (pixels, hole[:, 0].numpy()), (to_float(images), hole[:, 0])):
        assert equal(model(some, missing, seed=2), expected)
    first = model(pictures[0], masks[0].convert("1"), seed=np.int64(2))
    assert torch.equal(first.images, expected.images[:1])
    assert isinstance(first.pictures[0], Image.Image) and first.pictures[0].mode == "RGB"
    assert np.array_equal(np.array(expected.pictures[1]), to_pixels(expected.images[1]))


@settings(max_examples=20, deadline=None)
@given(hole=any_holes, seed=st.integers(0, 1000), forget=st.booleans(), look=st.sampled_from([0.0, 0.5]))
@example(hole=EMPTY, seed=3, forget=True, look=0.5)
@example(hole=FULL, seed=3, forget=False, look=0.5)
def test_majority_with_pre_fill_keeps_known_pixels_and_the_tokens_of_the_painted_picture(
    inpainter, hole, seed, forget, look
):
    images, options = noise(2, seed), {"forget": forget, "second_look": look}
    options |= {"token_rule": "majority", "pre_fill": True}
    filled = inpainter(images, hole, seed=seed, **options)
    everywhere = hole.expand_as(images)
    assert torch.equal(filled.images[~everywhere], images[~everywhere])
    assert torch.equal(filled.images[everywhere], filled.raw[everywhere])
    painted = classical.fill("navier_stokes", images.masked_fill(hole, GREY), hole)
    expected, hidden = inpainter.vqgan.encode(to_float(painted)), to_hidden(hole, GRID, rule="majority")
    assert torch.equal(inpainter.hide(hole, rule="majority"), hidden)
    assert torch.equal(filled.tokens[~hidden], expected[~hidden]) and filled.tokens.max() < CODES
    repainted = torch.where(hole, noise(2, seed + 1), images)
    assert equal(filled, inpainter(repainted, hole, seed=seed, **options))  # nothing of the hole is read


def test_pre_fill_changes_the_tokens_of_partly_missing_cells_alone_with_the_patch_encoder(inpainters):
    model, images = inpainters["patch"], noise(8)
    hole = make_holes("walk", 8, SIZE)
    grey, filled = model.encode(images, hole), model.encode(images, hole, pre_fill=True)
    touched = to_hidden(hole, GRID)
    assert torch.equal(grey[~touched], filled[~touched]) and (grey != filled)[touched].any()


# --- Inpainter: errors ---


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": noise(2)[:, :, :8]}, r"images: expected uint8 \(2, 3, 16, 16\), found torch.uint8 \(2, 3, 8, 16\)"),
        ({"images": noise(2)[:, :1]}, r"images: expected uint8 \(2, 3, 16, 16\)"),
        ({"images": noise(2)[0]}, r"images: expected uint8"),
        ({"images": noise(2).float()}, "found torch.float32"),
        ({"hole": FULL.float()}, r"hole: expected bool \(2, 1, 16, 16\), found torch.float32 \(2, 1, 16, 16\)"),
        ({"hole": FULL[:1]}, r"hole: expected bool \(2, 1, 16, 16\)"),
        ({"hole": FULL[:, :, ::2, ::2]}, "hole: expected bool"),
        ({"hole": FULL.expand(2, 3, SIZE, SIZE)}, "hole: expected bool"),
        ({"seeds": [1]}, "seeds: expected one for each of the 2 images, found 1"),
        ({"seeds": [1, -1]}, "seeds: expected integers >= 0, found -1"),
        ({"margin": -1}, "margin -1"),
    ],
)
def test_what_does_not_fit_a_decoding_is_refused(inpainters, changes, message):
    with pytest.raises(ValueError, match=message):
        inpainters["patch"].steps(**{"images": noise(2), "hole": FULL, "seeds": [0, 1]} | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"images": noise(2)[:, :, :8]},
            "images: expected 16x16 pixels, .* found 16x8 pixels; photos.fill_photo fills",
        ),
        ({"hole": FULL[:1]}, "hole: expected one an image, found 1 for 2 images"),
        ({"seed": [1]}, r"seed: expected an integer >= 0 or one for each of 2 images, found \[1\]"),
        ({"seed": -1}, "seed: expected an integer >= 0 .*, found -1"),
        ({"samples": 0}, "samples: expected at least 1, found 0"),
        ({"steps": 0}, "^steps: .*greater than or equal to 1, found 0; sweet_spot: .*found 0$"),
        ({"steps": 3, "sweet_spot": 9}, "^sweet_spot = 9 must be at most steps = 3$"),
        ({"schedule": "sine"}, "^schedule: unknown schedule 'sine', expected one of: cosine, linear"),
        ({"sampler": "hilton"}, "sampler: .*'halton'"),
        ({"margin": -1}, "margin -1"),
        ({"token_rule": "most"}, "token_rule: .*'any' or 'majority'"),
    ],
)
def test_what_does_not_fit_a_call_is_said_in_one_line(inpainters, changes, message):
    with pytest.raises(ValueError, match=message) as raised:
        inpainters["patch"](**{"images": noise(2), "hole": FULL} | changes)
    assert "\n" not in str(raised.value)


def test_networks_that_do_not_fit_each_other_are_refused():
    for other in (transformer(codes=CODES + 1), transformer(tokens=4)):
        with pytest.raises(ValueError, match=r"the VQGAN makes \(16, 32\), the transformer takes"):
            Inpainter(vqgan(), other, DECODING, "cpu")


def test_unknown_devices_are_named(checkpoint):
    with pytest.raises(ValueError, match="--device toaster: expected auto, cpu, cuda"):
        Inpainter.from_pretrained(checkpoint, "toaster")
    with pytest.raises(ValueError, match="--device cuda:99: this machine has"):
        Inpainter.from_pretrained(checkpoint, "cuda:99")


def test_checkpoints_that_lack_a_file_or_do_not_fit_are_named(checkpoint, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere: expected a folder with vqgan\.safetensors and transformer"):
        Inpainter.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"vqgan\.safetensors: expected a folder with"):
        Inpainter.from_pretrained(checkpoint / "vqgan.safetensors")
    half = shutil.copytree(checkpoint, tmp_path / "half")
    (half / "transformer.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"half.transformer\.safetensors: no such weights file"):
        Inpainter.from_pretrained(half)
    shutil.copy(checkpoint / "vqgan.safetensors", half / "transformer.safetensors")
    with pytest.raises(ValueError, match=r"half.transformer\.safetensors: expected the weights of a Transformer"):
        Inpainter.from_pretrained(half)
    with pytest.raises(ValueError, match=r"bare.transformer\.safetensors: its metadata lack vqgan or decoding"):
        Inpainter.from_pretrained(save(tmp_path / "bare", vqgan(), transformer(), step="3"))
    other = save(tmp_path / "other", vqgan(), transformer())
    shutil.copy(checkpoint / "vqgan.safetensors", other / "vqgan.safetensors")
    with pytest.raises(ValueError, match=r"other.transformer\.safetensors: was trained on the tokens of another VQGAN"):
        Inpainter.from_pretrained(other)
    stage1, odd = vqgan(), tmp_path / "odd"
    save(odd, stage1, transformer(), vqgan=stage1.tokens_key(), decoding='{"total_iter": 0}')
    with pytest.raises(ValueError, match=r"odd.transformer\.safetensors: its decoding: total_iter: .* found 0$"):
        Inpainter.from_pretrained(odd)
    content = (checkpoint / "transformer.safetensors").read_bytes()
    (odd / "transformer.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"odd.transformer\.safetensors: not a weights file \(.*\)$"):
        Inpainter.from_pretrained(odd)


def test_another_decoder_of_the_same_tokens_is_accepted(tmp_path):
    """Stage 1b changes the decoder alone: a transformer of the same tokens goes on fitting."""
    torch.manual_seed(2)
    stage1, stage2 = vqgan(), transformer()
    key = stage1.tokens_key()
    for parameter in stage1.decoder.parameters():
        parameter.data.mul_(1.1)
    notes = {"decoding": DECODING.model_dump_json(), "vqgan": key}
    assert Inpainter.from_pretrained(save(tmp_path / "same", stage1, stage2, **notes), "cpu").vqgan.tokens_key() == key
    stage1.codebook.embedding.weight.data[3] += 0.1
    with pytest.raises(ValueError, match="tokens of another VQGAN"):
        Inpainter.from_pretrained(save(tmp_path / "other", stage1, stage2, **notes), "cpu")


@pytest.mark.parametrize("pre_filled", [False, True])
def test_a_decoder_that_reads_known_pixels_reads_those_of_the_image(tmp_path, pre_filled):
    torch.manual_seed(3)
    stage1, stage2 = vqgan(known_width=4, pre_filled=pre_filled), transformer()
    for join in stage1.decoder.joins:
        nn.init.normal_(join.weight, 0.0, 0.3)
    notes = {"decoding": DECODING.model_dump_json(), "vqgan": stage1.tokens_key()}
    reader = Inpainter.from_pretrained(save(tmp_path / "known", stage1, stage2, **notes), "cpu")
    images, hole = noise(2), make_holes("box", 2, SIZE)
    filled = reader(images, hole)
    assert not torch.equal(filled.raw, reader.decode(filled.tokens, 255 - images, hole))
    painted = images.masked_fill(hole, 7)
    assert torch.equal(filled.raw, reader(painted, hole).raw)  # and nothing of the hole
    guess = to_float(classical.paint(images, hole, pre_fill=True))
    expected = to_uint8(reader.vqgan.decode(filled.tokens, guess, hole))  # in float32
    assert (filled.raw.int() - expected.int()).abs().float().mean() < 2
    alone = reader(images[1:], hole[1:], seed=1)
    assert torch.equal(alone.raw[0], filled.raw[1])


# --- the command line on folders in the lab's layout ---


class Lab(NamedTuple):
    """Folders under tmp_path: masked_image/image_000.png, mask64/mask_000.png, test_gt.csv."""

    images: Path
    masks: Path
    csv: Path
    truth: Tensor  # (N, 3, H, W) uint8
    hole: Tensor  # (N, 1, H, W) bool

    @property
    def flags(self) -> tuple:
        return "--test-maskedimage-path", self.images, "--test-mask-path", self.masks

    @property
    def names(self) -> list[str]:
        return [path.name for path in sorted(self.images.iterdir())]


def make_lab(root: Path, hole: Tensor) -> Lab:
    truth = noise(len(hole), seed=8)
    images, masks = root / "masked_image", root / "mask64"
    images.mkdir(parents=True), masks.mkdir()
    rows = [",".join(f"pixel_{i}" for i in range(3 * SIZE * SIZE))]
    for i in range(len(hole)):
        pixels = truth[i].permute(1, 2, 0).numpy()
        rows.append(",".join(map(str, pixels.flatten())))
        Image.fromarray(np.where(hole[i, 0].numpy()[..., None], np.uint8(GREY), pixels)).save(
            images / f"image_{i:03}.png"
        )
        Image.fromarray(np.where(hole[i, 0].numpy(), 0, 255).astype(np.uint8)).save(masks / f"mask_{i:03}.png")
    (root / "test_gt.csv").write_text("\n".join(rows) + "\n")
    return Lab(images, masks, root / "test_gt.csv", truth, hole)


@pytest.fixture
def lab(tmp_path) -> Lab:
    holes = [make_holes(family, 1, SIZE, seed=2) for family in ("walk", "thick", "box", "half", "medium")]
    return make_lab(tmp_path / "lab", torch.cat(holes))


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch, tmp_path):
    """The current folder, where results/ goes by default, is temporary."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def run(checkpoint, tmp_path):
    def run(*arguments, out: str = "out", device: str = "cpu", folder: Path = checkpoint) -> Path:
        where = ["--checkpoint", folder, "--out", tmp_path / out, "--device", device, "--num-workers", 1]
        inpainting.main([str(argument) for argument in (*where, *arguments)])
        return tmp_path / out

    return run


def read(path: Path) -> Tensor:
    """A written PNG as uint8 (3, H, W)."""
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def read_all(folder: Path) -> Tensor:
    return torch.stack([read(path) for path in sorted(folder.iterdir())])


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def tiles(path: Path, count: int) -> list[Tensor]:
    """The pictures of a grid of at most five, which has one row."""
    sheet = read(path)
    assert sheet.shape == (3, SIZE, count * (SIZE + 2) - 2)
    return [sheet[:, :, i * (SIZE + 2) : i * (SIZE + 2) + SIZE] for i in range(count)]


def test_command_line_writes_composited_and_raw_pictures_and_grids_of_the_first_images(run, lab, inpainters):
    out = run(*lab.flags, "--gtcsv-path", lab.csv, "--grids", 2, "--seed", 3, "--batch-size", 3)
    expected = ["confidence", "imga", "manifest.json", "mask_scheduling", "overview.png", "raw", "test_results"]
    assert files(out) == expected and files(out / "confidence") == lab.names
    assert files(out / "test_results") == files(out / "raw") == lab.names == [f"image_00{i}.png" for i in range(5)]
    assert files(out / "imga") == files(out / "mask_scheduling") == lab.names[:2]

    known = ~lab.hole.expand_as(lab.truth)
    results, raw = read_all(out / "test_results"), read_all(out / "raw")
    assert torch.equal(results[known], lab.truth[known]) and torch.equal(results[~known], raw[~known])
    expected = inpainters["patch"](lab.truth, lab.hole, seed=3)
    assert torch.equal(results, expected.images) and torch.equal(raw, expected.raw)


def test_batch_size_and_grids_do_not_change_the_pictures(run, lab):
    whole = run(*lab.flags, out="whole")
    for size, grids in ((1, 5), (2, 0), (4, 3)):
        out = run(*lab.flags, "--batch-size", size, "--grids", grids, out=f"by{size}")
        for folder in ("test_results", "raw"):
            assert torch.equal(read_all(out / folder), read_all(whole / folder))
        assert (files(out / "imga") if grids else []) == lab.names[:grids]
        assert (out / "imga").exists() == (out / "overview.png").exists() == (grids > 0)
    for name in lab.names[:3]:  # nor do the grids depend on the batch
        assert torch.equal(read(whole / "imga" / name), read(out / "imga" / name))


def test_linear_schedule_with_a_sweet_spot_fills_everything_and_draws_each_step(run, lab):
    out = run(*lab.flags, "--mask-func", "linear", "--sweet-spot", 3, "--total-iter", 6, "--grids", 5)
    for i, name in enumerate(lab.names):
        start = int(to_hidden(lab.hole, GRID)[i].sum())
        steps = tiles(out / "mask_scheduling" / name, 3)
        hidden = [to_hidden((step == 0).all(dim=0)[None, None], GRID) for step in steps]
        # linear: floor((1 - t / 6) m) of the m tokens that the hole touches stay hidden, and none at the sweet spot
        assert [int(tokens.sum()) for tokens in hidden] == [start * 5 // 6, start * 4 // 6, 0]
        assert not (hidden[1] & ~hidden[0]).any()  # what is decided stays so
        pictures = tiles(out / "imga" / name, 3)
        for picture, step in zip(pictures, steps, strict=True):
            assert set(step.unique().tolist()) <= {0, 255}
            assert (picture[step == 0] == GREY).all()  # pixels of tokens still hidden
        assert torch.equal(pictures[-1], read(out / "raw" / name))
    decoding = json.loads((out / "manifest.json").read_text())["decoding"]
    assert (decoding["mask_func"], decoding["sweet_spot"], decoding["total_iter"]) == ("linear", 3, 6)


@pytest.mark.parametrize("known_truth", [True, False])
def test_overview_shows_truth_hole_four_steps_and_the_result_at_twice_the_size(run, lab, known_truth):
    out = run(*lab.flags, "--grids", 3, "--batch-size", 2, *(("--gtcsv-path", lab.csv) if known_truth else ()))
    columns = 6 + known_truth
    sheet, height, width = read(out / "overview.png"), 2 * (3 * (SIZE + 2) - 2), 2 * (columns * (SIZE + 2) - 2)
    assert sheet.shape[1] == height + visualize.LINE and sheet.shape[2] > width + 40
    for written in (sheet[:, : visualize.LINE], sheet[:, :, :-width]):  # captions, labels
        assert written.min() < 100 and (written == 255).float().mean() > 0.7
    sheet = sheet[:, -height::2, -width::2]
    for row, name in enumerate(lab.names[:3]):
        shown = [sheet[:, row * 18 : row * 18 + SIZE, i * 18 : i * 18 + SIZE] for i in range(columns)]
        expected = [lab.truth[row]] * known_truth + [read(lab.images / name), *tiles(out / "imga" / name, 4)]
        for picture, other in zip(shown, [*expected, read(out / "test_results" / name)], strict=True):
            assert torch.equal(picture, other)


def test_forgetting_the_second_look_and_the_token_rule_reach_the_inpainter(run, lab, inpainters):
    flags = ("--forget", "--second_look", 0.5, "--token-rule", "majority", "--pre_fill")
    out = run(*lab.flags, *flags, "--grids", 1)
    options = {"forget": True, "second_look": 0.5, "token_rule": "majority", "pre_fill": True}
    expected = inpainters["patch"](lab.truth, lab.hole, **options)
    assert torch.equal(read_all(out / "test_results"), expected.images)
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["decoding"] == DECODING.model_dump() | options


def test_manifest_says_what_is_needed_to_repeat_the_run(run, lab, checkpoint, tmp_path):
    out = run(*lab.flags, "--gtcsv-path", lab.csv, "--seed", 11, "--margin", 1, "--top-k", 4, "--sampler", "lab")
    manifest = json.loads((out / "manifest.json").read_text())
    given = {"sampler": "lab", "top_k": 4}
    assert manifest["decoding"] == DECODING.model_dump() | given
    assert (manifest["seed"], manifest["margin"], manifest["device"]) == (11, 1, "cpu")
    assert manifest["checkpoint"] == str(checkpoint) and manifest["seconds"] > 0
    assert manifest["weights_sha256"] == {
        name: file_hash(checkpoint / f"{name}.safetensors") for name in ("vqgan", "transformer")
    }
    assert manifest["versions"]["torch"] == torch.__version__ and set(manifest["versions"]) >= {"python", "numpy"}
    assert (manifest["images"], manifest["masks"]) == (str(lab.images), str(lab.masks))
    assert (manifest["truth"], manifest["predicted"]) == (str(lab.csv), None)
    assert manifest["results"] == lab.names

    again = run(*lab.flags, "--seed", 11, "--margin", 1, "--top-k", 4, "--sampler", "lab", out="again")
    assert torch.equal(read_all(again / "test_results"), read_all(out / "test_results"))
    assert json.loads((again / "manifest.json").read_text())["truth"] is None
    other = run(*lab.flags, "--seed", 12, "--margin", 1, "--top-k", 4, "--sampler", "lab", out="other")
    assert not torch.equal(read_all(other / "test_results"), read_all(out / "test_results"))


def test_flags_are_understood_with_hyphens_and_with_underscores(run, lab):
    values = {
        "--test-maskedimage-path": lab.images, "--test-mask-path": lab.masks, "--gtcsv-path": lab.csv,
        "--total-iter": 5, "--sweet-spot": 4, "--mask-func": "square", "--sampling-temperature": 0.7, "--top-k": 8,
        "--temperature": 2.0, "--batch-size": 2, "--num-workers": 2,
    }  # fmt: skip
    outs = []
    for spelling in (str, lambda flag: "--" + flag[2:].replace("-", "_")):
        flags = [part for flag, value in values.items() for part in (spelling(flag), value)]
        outs.append(run(*flags, out=f"out{len(outs)}"))
    first, second = (json.loads((out / "manifest.json").read_text()) for out in outs)
    assert first["decoding"] == second["decoding"] == {
        "total_iter": 5, "sweet_spot": 4, "mask_func": "square", "sampler": "maskgit", "temperature": 2.0,
        "sampling_temperature": 0.7, "top_k": 8, "forget": False, "second_look": 0.0, "token_rule": "any",
        "pre_fill": False,
    }  # fmt: skip
    assert torch.equal(*(read_all(out / "test_results") for out in outs))


def test_profile_records_iterations(run, lab):
    out = run(*lab.flags, "--profile", 2)
    trace = json.loads((out / "profile" / "inpainting.pt.trace.json").read_text())
    names = {event.get("name", "") for event in trace["traceEvents"]}
    assert "aten::bmm" in names and {"ProfilerStep#1", "ProfilerStep#2"} <= names


def test_total_iter_alone_moves_the_sweet_spot_with_it(run, lab):
    out = run(*lab.flags, "--total-iter", 2)
    decoding = json.loads((out / "manifest.json").read_text())["decoding"]
    assert (decoding["total_iter"], decoding["sweet_spot"]) == (2, 2)


def test_predicted_path_takes_the_composited_pictures_and_the_score_finds_them(run, lab, tmp_path, score):
    usual = run(*lab.flags, out="usual")
    out = run(*lab.flags, "--gtcsv-path", lab.csv, "--predicted-path", "mine")
    assert not (out / "test_results").exists() and files(out / "raw") == lab.names
    assert torch.equal(read_all(tmp_path / "mine"), read_all(usual / "test_results"))
    assert json.loads((out / "manifest.json").read_text())["predicted"] == str(tmp_path / "mine")
    assert score("--results", out)["predicted"] == str(tmp_path / "mine")


def test_whole_pictures_give_what_masked_ones_give(run, lab):
    masked = run(*lab.flags, out="masked")
    for image, name in zip(lab.truth, lab.names, strict=True):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(lab.images / name)
    whole = run(*lab.flags, out="whole")
    assert torch.equal(read_all(whole / "test_results"), read_all(masked / "test_results"))
    assert torch.equal(read(whole / "overview.png"), read(masked / "overview.png"))


def test_pictures_of_other_sizes_and_formats_are_cropped_and_named_png(run, tmp_path):
    images, masks = tmp_path / "photographs", tmp_path / "masks"
    images.mkdir(), masks.mkdir()
    pixels = np.random.default_rng(0).integers(256, size=(40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(images / "cat_1.jpg")
    Image.fromarray(np.where(np.arange(60) < 30, 0, 255).astype(np.uint8)[None].repeat(40, 0)).save(masks / "m1.bmp")
    out = run("--test-maskedimage-path", images, "--test-mask-path", masks)
    assert files(out / "test_results") == ["cat_1.png"]
    assert read(out / "test_results" / "cat_1.png").shape == (3, SIZE, SIZE)


# --- more than one answer, and how it came about ---


def difference(one: Tensor, other: Tensor) -> Tensor:
    """A stand-in for LPIPS: the mean absolute difference of images (b, 3, H, W) in [0, 1]."""
    return (one - other).abs().mean(dim=(1, 2, 3))


class Stub:
    """Takes the place of models.perceptual.Perceptual."""

    def __init__(self, net: str, weights):
        assert net == "alex"

    def to(self, device):
        return difference


def completions(out: Path, name: str, count: int) -> Tensor:
    """The written completions of an image, (count, 3, H, W)."""
    others = [out / "samples" / f"{Path(name).stem}_{number}.png" for number in range(1, count)]
    return torch.stack([read(path) for path in (out / "test_results" / name, *others)])


@pytest.mark.parametrize("size", [2, 8])
def test_samples_are_written_and_their_diversity_measured(run, lab, monkeypatch, capsys, inpainters, size):
    monkeypatch.setattr(inpainting, "Perceptual", Stub)
    out = run(*lab.flags, "--samples", 3, "--seed", 3, "--batch-size", size)
    assert files(out / "samples") == [f"image_00{i}_{k}.png" for i in range(5) for k in (1, 2)]
    expected = inpainters["patch"](lab.truth, lab.hole, seed=3, samples=3)
    found = torch.stack([completions(out, name, 3) for name in lab.names])
    assert torch.equal(found.flatten(0, 1), expected.images)
    values = to_float(found)
    pairs = [difference(values[:, i], values[:, j]) for i, j in ((0, 1), (0, 2), (1, 2))]
    mean = float(torch.stack(pairs).mean())
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["samples"] == 3 and manifest["diversity"]["mask64"] == pytest.approx(mean, rel=1e-4)
    assert table_row(capsys.readouterr().out, "mask64")[-1] == f"{mean:.4f}"


def test_images_without_a_hole_do_not_lower_the_diversity(run, tmp_path, monkeypatch):
    monkeypatch.setattr(inpainting, "Perceptual", Stub)
    hole = make_holes("box", 3, SIZE)
    hole[1] = False
    lab = make_lab(tmp_path / "partly", hole)
    out = run(*lab.flags, "--samples", 2)
    distances = [float(difference(*to_float(completions(out, name, 2))[:, None])) for name in lab.names]
    found = json.loads((out / "manifest.json").read_text())["diversity"]["mask64"]
    assert distances[1] == 0 and found == pytest.approx((distances[0] + distances[2]) / 2, rel=1e-4)


def test_without_the_weights_of_lpips_the_samples_come_without_diversity(run, lab, monkeypatch, capsys):
    def offline(*arguments, **options):
        raise OSError("no network")

    monkeypatch.setattr(lpips, "LPIPS", offline)
    out = run(*lab.flags, "--samples", 2)
    printed = capsys.readouterr().out
    assert len(files(out / "samples")) == 5 and table_row(printed, "mask64")[-1] == "-"
    (line,) = [line for line in printed.splitlines() if line.startswith("no diversity: ")]
    assert "the alex backbone of LPIPS could not be downloaded (no network)" in line and "--lpips-weights" in line
    assert json.loads((out / "manifest.json").read_text())["diversity"] == {"mask64": None}


def test_confidence_maps_are_those_of_the_decoding(run, lab, inpainters):
    out = run(*lab.flags, "--margin", 1, "--samples", 1)
    model = inpainters["patch"]
    confidence = model(lab.truth, lab.hole, margin=1).confidence
    expected = visualize.confidence_map(lab.truth, model.hide(lab.hole, 1), confidence, CODES)
    assert torch.equal(read_all(out / "confidence"), expected)


def test_animations_of_the_drawn_images(run, lab):
    out = run(*lab.flags, "--animate", "--grids", 2, "--batch-size", 1)
    assert files(out / "animation") == ["image_000.webp", "image_001.webp"]
    with Image.open(out / "animation" / "image_001.webp") as film:
        durations = []
        for number in range(film.n_frames):
            film.seek(number)
            film.load()
            durations.append(film.info["duration"])
        last = np.array(film.convert("RGB"))
    factor = visualize.SIDE // SIZE
    assert len(durations) == DECODING.total_iter + 2 and durations == [visualize.SHOWN] * 5 + [visualize.HELD]
    assert np.array_equal(last[::factor, ::factor], to_pixels(read(out / "test_results" / "image_001.png")))


def test_the_list_needs_no_checkpoint(monkeypatch, capsys):
    monkeypatch.setattr(inpainting, "listing", lambda: "nothing here")
    inpainting.main(["--list"])
    assert capsys.readouterr().out == "nothing here\n"


# --- the table ---


def table_row(text: str, group: str) -> list[str]:
    (row,) = [line.split() for line in text.splitlines() if line.startswith(f"{group} ")]
    return row


def test_table_holds_the_hole_psnr_as_computed_by_hand(run, lab, capsys):
    out = run(*lab.flags, "--gtcsv-path", lab.csv)
    results = read_all(out / "test_results").double().numpy()
    values = []
    for result, true, hole in zip(results, lab.truth.double().numpy(), lab.hole.numpy(), strict=True):
        error = (result - true)[:, hole[0]] / 255  # (3, missing pixels)
        values.append(10 * np.log10(1 / np.mean(error**2)))
    text = capsys.readouterr().out
    share = 100 * lab.hole.float().mean()
    assert table_row(text, "mask64") == ["mask64", "5", f"{share:.1f}", f"{np.mean(values):.2f}"]
    assert str(out / "manifest.json") in text and "s an image" in text


def test_table_without_truth_has_no_quality(run, lab, capsys):
    run(*lab.flags)
    assert table_row(capsys.readouterr().out, "mask64")[-1] == "-"


@pytest.mark.parametrize("empty", [1, 3])
def test_images_without_a_hole_stay_as_they_are_and_out_of_the_mean(run, tmp_path, capsys, empty):
    hole = make_holes("box", 3, SIZE)
    hole[:empty] = False
    lab = make_lab(tmp_path / "partly", hole)
    out = run(*lab.flags, "--gtcsv-path", lab.csv)
    results = read_all(out / "test_results")
    assert torch.equal(results[:empty], lab.truth[:empty])
    quality = "-"
    if empty < 3:
        values = hole_psnr(to_float(results[empty:]), to_float(lab.truth[empty:]), hole[empty:])
        quality = f"{values.mean():.2f}"
    assert table_row(capsys.readouterr().out, "mask64")[1::2] == ["3", quality]


# --- without arguments, and on to the score ---


class TinyFeatures(nn.Module):
    """Images (b, 3, H, W) in [0, 1] -> channel means (b, 3), in the place of Inception."""

    label, dimensions, published_hash = "FID", 3, ""

    def __init__(self, weights):
        super().__init__()
        self.weights_file = Path(weights)

    def forward(self, images):
        return images.mean(dim=(2, 3))


@pytest.fixture
def score(monkeypatch, tmp_path):
    """fid_score.main in the current folder with a tiny network."""
    monkeypatch.setattr(features, "FEATURES", {"inception": TinyFeatures})
    monkeypatch.setattr(fid_score, "FEATURES", features.FEATURES)
    (tmp_path / "weights.pth").write_bytes(b"tiny")
    return lambda *arguments: fid_score.main(
        ["--feature-weights", str(tmp_path / "weights.pth"), "--device", "cpu", "--no-cache", *map(str, arguments)]
    )


def test_without_arguments_chelsea_is_filled_and_scored(checkpoint, monkeypatch, tmp_path, capsys, score):
    monkeypatch.setattr(inpainting, "PRETRAINED", checkpoint)
    inpainting.main([])
    out, printed = tmp_path / "results", capsys.readouterr().out
    assert [line.split()[0] for line in printed.splitlines()[1 : 1 + len(FAMILIES)]] == list(FAMILIES)
    for family in FAMILIES:
        n, _, quality = table_row(printed, family)[1:]
        assert n == "6" and 3 < float(quality) < 40
    results, truth = read_all(out / "test_results"), read_all(out / "truth")
    assert results.shape == truth.shape == (6 * len(FAMILIES), 3, SIZE, SIZE)
    hole = torch.cat([make_holes(family, 6, SIZE) for family in FAMILIES]).expand_as(truth)
    assert torch.equal(results[~hole], truth[~hole])
    assert torch.equal(truth[3:6], truth[:3].flip(-1))  # each crop also mirrored
    assert len({bytes(image.numpy()) for image in truth}) == 6 and truth.float().std() > 20
    assert files(out / "imga") == [f"image_{i:03}.png" for i in range(0, 36, 6)]  # the first of each family
    assert [visualize.drawn([*"aabb"], count) for count in (0, 1, 3, 9)] == [[], [0], [0, 1, 2], [0, 1, 2, 3]]

    report = score()  # reads results/manifest.json
    assert report["n"] == len(results) and report["truth"] == str(out / "truth") and report["value"] > 0


def test_results_on_folders_are_scored_against_the_truth_in_the_manifest(run, lab, score):
    out = run(*lab.flags, "--gtcsv-path", lab.csv)
    report = score("--results", out)
    means = [
        to_float(images).mean(dim=(2, 3)).double().numpy() for images in (read_all(out / "test_results"), lab.truth)
    ]
    moments = [part for mean in means for part in (mean.mean(axis=0), np.cov(mean, rowvar=False))]
    assert (report["n"], report["truth"]) == (5, str(lab.csv))
    assert report["value"] == pytest.approx(frechet_distance(*moments), rel=1e-3) and report["value"] > 0


# --- the command line: errors ---


@pytest.fixture
def failure(run, capsys):
    """What the command line says on standard error when it ends with status 2, as argparse does."""

    def failure(*arguments, **options) -> str:
        with pytest.raises(SystemExit) as raised:
            run(*arguments, **options)
        assert raised.value.code == 2
        return capsys.readouterr().err

    return failure


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sweet-spot", 5], "sweet_spot = 5 must be at most total_iter = 4"),
        (["--sweet-spot", 7, "--total-iter", 6], "sweet_spot = 7 must be at most total_iter = 6"),
        (["--total-iter", 0], "total_iter"),
        (["--temperature", "nan"], "temperature"),
        (["--top-k", -1], "top_k: Input should be greater than or equal to 0, found -1"),
        (["--mask-func", "exponential"], "'cosine', 'linear', 'square', 'cubic', 'sqrt'"),
        (["--sampler", "hilton"], "'maskgit', 'lab', 'growing', 'random', 'halton'"),
        (["--second-look", "1"], "second_look: Input should be less than 1, found 1.0"),
        (["--token-rule", "most"], "'any', 'majority'"),
        (["--batch-size", 0], "--batch-size, --samples and --context must be at least 1"),
        (["--samples", 0], "--batch-size, --samples and --context must be at least 1"),
        (["--seed", -1], "--seed, --margin, --grids and --profile must be at least 0"),
        (["--margin", -1], "--seed, --margin, --grids and --profile must be at least 0"),
        (["--profile", -1], "--seed, --margin, --grids and --profile must be at least 0"),
        (["--grids", -1], "--seed, --margin, --grids and --profile must be at least 0"),
        (
            ["--lpips-weights", "alex.pth"],
            "--lpips-weights measures how several completions differ: give --samples",
        ),
        (["--samples", 2, "--lpips-weights", "alex.pth"], "alex.pth: no such weights file"),
        (["--animate", "--grids", 0], "--animate shows the images that --grids draws, which is 0"),
        (["--test-mask-path", "mask64"], "--test-maskedimage-path and --test-mask-path go together"),
        (["--test-maskedimage-path", "images"], "--test-maskedimage-path and --test-mask-path go together"),
        (["--gtcsv-path", "test_gt.csv"], "--gtcsv-path is the truth of --test-maskedimage-path, which is missing"),
        (["--test-maskedimage-path", "nowhere", "--test-mask-path", "m"], "nowhere: no such folder of images"),
        (["--colour", "red"], "unrecognized arguments: --colour red"),
    ],
)
def test_wrong_arguments_are_named(failure, arguments, message):
    assert message in " ".join(failure(*arguments).split())


def test_bad_devices_checkpoints_and_output_folders_are_named(failure, tmp_path):
    assert "--device toaster: expected auto, cpu, cuda or cuda:N" in failure(device="toaster")
    assert "nowhere: expected a folder with vqgan.safetensors" in failure(folder=tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    assert str(tmp_path / "file") in failure(out="file")


def test_counts_that_differ_name_both_folders(failure, lab):
    (lab.masks / "mask_004.png").unlink()
    assert f"5 images in {lab.images} but 4 masks in {lab.masks}" in failure(*lab.flags)


def test_numbers_that_differ_name_both_files(failure, lab):
    (lab.masks / "mask_004.png").rename(lab.masks / "mask_009.png")
    assert "image_004.png would be paired with" in (message := failure(*lab.flags)) and "mask_009.png" in message


def test_sizes_that_differ_name_both_files(failure, lab):
    Image.new("L", (SIZE + 2, SIZE), 255).save(lab.masks / "mask_002.png")
    message = failure(*lab.flags)
    assert f"{lab.images / 'image_002.png'} is 16x16, its mask {lab.masks / 'mask_002.png'} 18x16" in message


def test_sizes_are_compared_upright(run, failure, lab):
    """A camera's picture that lies on its side (EXIF orientation 6) is 10 wide and 16 high, and so must its mask be."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (16, 10)).save(lab.images / "image_001.png", exif=exif)
    Image.new("L", (16, 10), 255).save(lab.masks / "mask_001.png")
    assert "image_001.png is 10x16, its mask" in failure(*lab.flags)
    Image.new("L", (10, 16), 255).save(lab.masks / "mask_001.png")
    assert files(run(*lab.flags) / "raw") == lab.names


def test_unreadable_pictures_are_named(failure, lab):
    (lab.images / "image_003.png").write_text("not a picture")
    assert f"{lab.images / 'image_003.png'}: cannot be read as an image" in failure(*lab.flags)


def test_results_that_would_overwrite_each_other_are_refused(failure, lab):
    with Image.open(lab.images / "image_003.png") as picture:
        picture.save(lab.images / "image_002.jpg")
    (lab.images / "image_003.png").unlink()
    (lab.masks / "mask_003.png").rename(lab.masks / "mask_002_again_2.png")
    (lab.images / "image_004.png").unlink()
    (lab.masks / "mask_004.png").unlink()
    assert f"{lab.images}: two images of one name" in failure(*lab.flags)


def test_truth_of_another_shape_is_named(failure, lab):
    lines = lab.csv.read_text().splitlines()
    lab.csv.write_text("\n".join(lines[:4]) + "\n")
    message = failure(*lab.flags, "--gtcsv-path", lab.csv)
    assert f"{lab.csv}: 3 true images for 5 to fill" in message
    np.savez(lab.csv.with_suffix(".npz"), images=np.zeros((5, 8, 8, 3), np.uint8))
    assert "(5, 3, 8, 8) true images (b, 3, H, W) for" in failure(
        *lab.flags, "--gtcsv-path", lab.csv.with_suffix(".npz")
    )
    assert "no such folder or file of true images" in failure(*lab.flags, "--gtcsv-path", "nowhere.csv")


def test_help_shows_the_labs_flags(capsys):
    with pytest.raises(SystemExit) as raised:
        inpainting.main(["--help"])
    text = capsys.readouterr().out
    assert raised.value.code == 0 and "chelsea" in text
    for flag in ("--test-maskedimage-path", "--test-mask-path", "--total-iter", "--sweet-spot", "--mask-func"):
        assert flag in text
