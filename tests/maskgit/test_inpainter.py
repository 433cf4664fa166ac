"""inpainter.py with tiny random networks: what stays, seeds and batches, options, errors."""

import shutil

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from tiny_networks import CODES, DECODING, GRID, SIZE, noise, save, states_of, transformer, vqgan
from torch import nn

from maskgit import classical
from maskgit.classical import smooth_rims
from maskgit.completion import sample_seed
from maskgit.data import GREY, to_float, to_pixels, to_uint8
from maskgit.decoding_config import DecodingConfig
from maskgit.inpainter import Inpainter
from maskgit.masks import FAMILIES, composite, make_holes, to_hidden


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


def test_a_decoding_yml_beside_the_weights_changes_what_they_note(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "copy")
    (folder / "decoding.yml").write_text("total_iter: auto\ncodes: mixed\n")
    assert Inpainter.from_pretrained(folder, "cpu").decoding == DECODING.changed(total_iter="auto", codes="mixed")
    for text, told in (("steps: 3", "steps: unknown key"), ("codes: red", "codes"), ("[]", "expected a mapping")):
        (folder / "decoding.yml").write_text(text)
        with pytest.raises(ValueError, match=rf"decoding\.yml: .*{told}") as error:
            Inpainter.from_pretrained(folder, "cpu")
        assert "\n" not in str(error.value)


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
    assert torch.equal(filled.raw, inpainter.decode(filled.tokens, inpainter.paint(images, hole), hole))


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
@given(hole=any_holes, seed=st.integers(0, 1000), samples=st.integers(1, 2))
@example(hole=MIXED, seed=3, samples=2)
def test_a_self_ensemble_is_the_mean_of_what_is_made_of_the_image_and_of_its_mirror_image(
    inpainter, hole, seed, samples
):
    images, seeds = noise(2, seed), [seed, seed + 1]
    one = inpainter(images, hole, seed=seeds, samples=samples)
    other = inpainter(images.flip(-1), hole.flip(-1), seed=seeds, samples=samples)
    both = inpainter(images, hole, seed=seeds, samples=samples, self_ensemble=True, rim=0.5)
    mean = torch.stack((one.raw, other.raw.flip(-1))).double().mean(dim=0)
    assert (both.raw - mean).abs().max() <= 0.5
    every = hole.repeat_interleave(samples, dim=0)
    filled = composite(both.raw, images.repeat_interleave(samples, dim=0), every)
    assert torch.equal(both.images, smooth_rims(filled, every, 0.5))
    for name in ("tokens", "confidence", "hidden"):
        assert torch.equal(getattr(both, name), getattr(one, name))


@settings(max_examples=20, deadline=None)
@given(hole=any_holes, seed=st.integers(0, 1000), margin=st.integers(0, 1))
@example(hole=EMPTY, seed=3, margin=0)
def test_with_the_patch_encoder_known_tokens_are_those_of_the_whole_image_to_the_end(inpainters, hole, seed, margin):
    model, images = inpainters["patch"], noise(2, seed)
    whole = model.vqgan.encode(to_float(images))
    states = states_of(model, images, hole, [seed, seed + 1], margin=margin)
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
    assert (model.vqgan.encode(to_float(images)) != model.encode(images.masked_fill(hole, GREY)))[known].any()


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
    states = states_of(inpainters["patch"], noise(2), FULL, [0, 1], decoding=decoding)
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
    *_, last = states_of(model, images, FULL, seeds, decoding=DecodingConfig(**DECODING.model_dump() | settings))
    filled = model(images, FULL, seed=3, **keywords)
    assert torch.equal(filled.tokens, last.tokens) and torch.equal(filled.confidence, last.confidence)


def test_confidence_is_one_where_known_and_the_codes_probability_where_decided(inpainters):
    model, images, hole = inpainters["patch"], noise(2), make_holes("box", 2, SIZE)
    filled, hidden = model(images, hole, steps=1), model.hide(hole)
    assert (filled.confidence[~hidden] == 1).all()
    logits = model.predict(model.encode(images.masked_fill(hole, GREY)).masked_fill(hidden, model.transformer.mask_id))
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


@pytest.mark.parametrize("side", [SIZE, 2 * SIZE])
def test_further_completions_are_drawn_where_the_first_is_a_mean(inpainters, side):
    model, images = inpainters["patch"], noise(2).repeat(1, 1, side // SIZE, side // SIZE)
    hole = torch.zeros_like(images[:, :1], dtype=torch.bool)
    hole[..., 4:12, 4:12] = True
    found = model(images, hole, seed=5, samples=3, steps=1, codes="auto")
    drawn = model(images, hole, seed=5, samples=3, steps=1, codes="sampled")
    for number in range(6):
        same = torch.equal(found.raw[number], drawn.raw[number])
        assert same == (number % 3 > 0) and torch.equal(found.tokens[number], drawn.tokens[number])
    means = model(images, hole, seed=9, steps=1, codes="expected")
    assert torch.equal(found.raw[::3], means.raw)


@pytest.mark.parametrize("side", [SIZE, 2 * SIZE])
def test_the_rim_of_a_hole_is_smooth_where_decoding_says_so(inpainters, side):
    model, images = inpainters["patch"], noise(2).repeat(1, 1, side // SIZE, side // SIZE)
    hole = torch.zeros_like(images[:, :1], dtype=torch.bool)
    hole[..., 4:12, 4:12] = True
    plain, smooth = model(images, hole, samples=2), model(images, hole, samples=2, rim=0.5)
    holes = hole.repeat_interleave(2, dim=0)
    assert torch.equal(smooth.images, classical.smooth_rims(plain.images, holes, 0.5))
    assert torch.equal(smooth.raw, plain.raw) and not torch.equal(smooth.images, plain.images)
    with pytest.raises(ValueError, match=r"^rim: .* 1, found 2\.0"):
        model(images, hole, rim=2.0)


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
    grey, filled = (model.encode(classical.paint(images, hole, pre_fill)) for pre_fill in (False, True))
    touched = to_hidden(hole, GRID)
    assert torch.equal(grey[~touched], filled[~touched]) and (grey != filled)[touched].any()


# --- Inpainter: errors ---


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": noise(2)[:, :, :8]}, "images and hole: expected one size, found images 16x8, hole 16x16"),
        ({"hole": FULL[:1]}, "hole: expected one an image, found 1 for 2 images"),
        ({"seed": [1]}, r"seeds: expected an integer >= 0 for each of 2 images, found \[1\]"),
        ({"seed": -1}, r"seeds: expected an integer >= 0 .*, found \[-1, 0\]"),
        ({"samples": 0}, "samples: expected at least 1, found 0"),
        ({"steps": 0}, "^steps: expected a whole number from 1, or auto, found 0$"),
        ({"steps": 3, "sweet_spot": 9}, "^sweet_spot = 9 must be at most steps = 3$"),
        ({"schedule": "sine"}, "^schedule: unknown schedule 'sine', expected one of: cosine, linear"),
        ({"sampler": "hilton"}, "sampler: .*'halton'"),
        ({"margin": -1}, "margin: expected at least 0, found -1"),
        ({"token_rule": "most"}, "token_rule: .*'any' or 'majority'"),
    ],
)
def test_what_does_not_fit_a_call_is_said_in_one_line(inpainters, changes, message):
    with pytest.raises(ValueError, match=message) as raised:
        inpainters["patch"](**{"images": noise(2), "hole": FULL} | changes)
    assert "\n" not in str(raised.value)


def test_seeds_may_be_a_tensor_or_an_array(inpainters):
    expected = inpainters["patch"](noise(2), FULL, seed=[3, 9]).tokens
    for seeds in (torch.tensor([3, 9]), np.array([3, 9])):
        assert torch.equal(inpainters["patch"](noise(2), FULL, seed=seeds).tokens, expected)


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
    """Decoder finetuning changes the decoder alone: a transformer of the same tokens goes on fitting."""
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
    assert not torch.equal(filled.raw, reader.decode(filled.tokens, reader.paint(255 - images, hole), hole))
    painted = images.masked_fill(hole, 7)
    assert torch.equal(filled.raw, reader(painted, hole).raw)  # and nothing of the hole
    guess = to_float(classical.paint(images, hole, pre_fill=True))
    expected = to_uint8(reader.vqgan.decode(filled.tokens, guess, hole))  # in float32
    assert (filled.raw.int() - expected.int()).abs().float().mean() < 2
    alone = reader(images[1:], hole[1:], seed=1)
    assert torch.equal(alone.raw[0], filled.raw[1])


# --- Inpainter.complete: one way to complete holes ---


@pytest.mark.parametrize(("samples", "batch_size"), [(1, 1), (1, 4), (3, 1), (3, 2), (3, 5), (3, 64)])
def test_a_completion_depends_neither_on_the_batch_nor_on_the_others(inpainter, samples, batch_size):
    images, hole = noise(3), torch.cat([make_holes(family, 1, SIZE) for family in ("walk", "box", "half")])
    result = inpainter.complete(images, hole, [5, 9, 2], samples=samples, batch_size=batch_size)
    assert len(result.images) == 3 * samples
    for image, seed in enumerate([5, 9, 2]):
        for number in range(samples):
            row, part = image * samples + number, slice(image, image + 1)
            alone = inpainter.complete(images[part], hole[part], [sample_seed(seed, number)])
            assert torch.equal(alone.tokens[0], result.tokens[row])
            assert torch.equal(alone.images[0], result.images[row])
            assert torch.equal(alone.confidence[0], result.confidence[row])


def test_on_step_is_told_the_rows_and_the_state_of_every_iteration_of_every_batch(inpainters):
    told = []
    result = inpainters["patch"].complete(
        noise(3),
        torch.cat([FULL, FULL[:1]]),
        [0, 1, 2],
        samples=2,
        batch_size=4,
        on_step=lambda *step: told.append(step),
    )
    assert [(rows.start, rows.stop) for rows, _ in told] == [(0, 4)] * 4 + [(4, 6)] * 4
    assert [state.step for _, state in told] == [1, 2, 3, 4] * 2
    last = torch.cat([told[3][1].tokens, told[7][1].tokens])
    assert torch.equal(last, result.tokens)


@pytest.mark.parametrize("pre_filled", [False, True])
def test_the_first_guess_is_made_once_an_image_whatever_needs_it(monkeypatch, pre_filled):
    torch.manual_seed(3)
    decoding = DECODING.changed(pre_fill=True, token_rule="majority")
    reader = Inpainter(vqgan(known_width=4, pre_filled=pre_filled), transformer(), decoding, "cpu")
    painted, original = [], classical.GUESSES["navier_stokes"]
    monkeypatch.setitem(
        classical.GUESSES, "navier_stokes", lambda image, hole: painted.append(1) or original(image, hole)
    )
    images, hole = noise(3), make_holes("walk", 3, SIZE)
    result = reader.complete(images, hole, [0, 1, 2], samples=4, batch_size=2)
    assert len(painted) == 3
    given = reader.complete(images, hole, [0, 1, 2], samples=4, painted=reader.paint(images, hole))
    assert len(painted) == 6 and equal(given, result)


def test_many_images_need_no_more_memory_than_a_few(inpainters):
    """The networks see a batch at a time; what grows is the pictures themselves."""
    seen = []
    model = inpainters["patch"]
    with pytest.MonkeyPatch.context() as patch:
        for name in ("predict", "decode", "encode"):
            original = getattr(model, name)
            patch.setattr(model, name, lambda x, *rest, original=original: seen.append(len(x)) or original(x, *rest))
        model.complete(noise(747), make_holes("box", 747, SIZE), range(747), batch_size=8)
    assert max(seen) == 8 and sum(seen) > 747
