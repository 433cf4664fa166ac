"""methods.py: ways to fill holes, with tiny networks."""

import re
from pathlib import Path

import pytest
import torch
from evaluator_stubs import N, stubs, truth
from tiny_networks import CONV, GRID, PATCH, SIZE, save, transformer, vqgan

from evaluation import methods
from evaluation.methods import Method
from maskgit.classical import paint, smooth_rims
from maskgit.completion import Codec, sample_seed
from maskgit.data import GREY, to_float
from maskgit.decoding_config import DecodingConfig
from maskgit.inpainter import Inpainter
from maskgit.masks import composite, make_holes
from models.checkpoint import save_weights
from utils import mix

__all__ = ["stubs"]  # fixtures
WITH_NETWORKS = ("vq_reconstruction", "one_pass", "inpainting")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    torch.manual_seed(1)
    return save(tmp_path_factory.mktemp("weights"), vqgan(PATCH), transformer())


@pytest.fixture(scope="module")
def inpainter(checkpoint) -> Inpainter:
    return Inpainter.from_pretrained(checkpoint, "cpu")


# --- rows -------------------------------------------------------------------------------------------------------------


def filled(inpainter, seed=0, hole=None, images=None, workers=0, **options) -> methods.Completion:
    images = truth() if images is None else images
    hole = make_holes("walk", len(images), SIZE) if hole is None else hole
    return methods.complete(Method(name="x", **options), inpainter, images, hole, seed, workers)


@pytest.mark.parametrize("kind", ["masked", "telea", "navier_stokes", "biharmonic", "fsr", *WITH_NETWORKS])
def test_every_row_keeps_known_pixels_and_fills_the_hole_without_having_seen_it(inpainter, kind):
    images, hole = truth(), make_holes("walk", N, SIZE)
    result, everywhere = filled(inpainter, kind=kind), hole.expand_as(images)
    assert torch.equal(result.images[~everywhere], images[~everywhere])
    other = torch.where(hole, 255 - images, images)
    blind = torch.equal(
        filled(inpainter, kind=kind, images=other, hole=hole).images, torch.where(hole, result.images, other)
    )
    assert blind is (kind != "vq_reconstruction")  # which decodes the true tokens
    assert (result.images[everywhere] == GREY).all() == (kind == "masked")
    assert (result.raw is None) is (kind not in WITH_NETWORKS)


def test_the_floor_is_the_decoded_true_tokens(inpainter):
    images, hole = truth(), make_holes("box", N, SIZE)
    result = filled(inpainter, kind="vq_reconstruction", hole=hole)
    assert torch.equal(result.tokens, inpainter.vqgan.encode(to_float(images)))
    assert torch.equal(result.raw, inpainter.decode(result.tokens, images, hole))
    assert torch.equal(result.images, composite(result.raw, images, hole))


def test_one_pass_decodes_zero_vectors_where_tokens_are_hidden(inpainter):
    images, hole = truth(), make_holes("box", N, SIZE)
    rules = {"token_rule": "majority", "pre_fill": True}
    result = filled(inpainter, kind="one_pass", hole=hole, decoding=rules)
    painted = paint(images, hole, True)
    codes = inpainter.codebook[inpainter.encode(painted)]
    codes[inpainter.hide(hole, rule="majority")] = 0
    assert torch.equal(result.raw, inpainter.decode(codes, painted, hole))
    smooth = filled(inpainter, kind="one_pass", hole=hole, decoding=rules | {"rim": 0.5})
    assert torch.equal(smooth.images, smooth_rims(result.images, hole, 0.5)) and torch.equal(smooth.raw, result.raw)
    assert not torch.equal(smooth.images, result.images)
    with pytest.raises(ValueError, match="kind one_pass takes no mean_of"):
        Method(name="x", kind="one_pass", mean_of=2)


def test_an_inpainting_row_is_the_inpainter_with_seeds_mixed_from_seed_and_image(inpainter):
    images, hole = truth(9), make_holes("walk", 9, SIZE)  # two batches
    options = {"total_iter": 2, "top_k": 5, "token_rule": "majority", "pre_fill": True}
    row = {"kind": "inpainting", "decoding": options, "margin": 1}
    result = filled(inpainter, 3, images=images, **row)
    seeds = [mix(3, index) for index in range(9)]
    expected = inpainter(images.masked_fill(hole, GREY), hole, seed=seeds, steps=2, top_k=5, margin=1,
                         token_rule="majority", pre_fill=True)  # fmt: skip
    assert torch.equal(result.raw, expected.raw)
    fewer = filled(inpainter, 3, images=images[:5], **row)
    assert torch.equal(fewer.raw, result.raw[:5])  # whatever the number of images
    assert not torch.equal(filled(inpainter, 4, kind="inpainting", images=images).raw, result.raw)


def test_the_mean_of_completions_is_their_mean(inpainter):
    images, hole = truth(), make_holes("half", N, SIZE)
    seeds = [[sample_seed(mix(0, index), number) for index in range(N)] for number in range(3)]
    each = torch.stack([inpainter(images.masked_fill(hole, GREY), hole, seed=own).raw.float() for own in seeds])
    result = filled(inpainter, kind="inpainting", hole=hole, mean_of=3)
    assert (each[0] != each[1]).any() and torch.equal(result.raw, each.mean(dim=0).round().byte())


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"kind": "telea", "margin": 1}, "method x: kind telea takes no margin"),
        ({"kind": "masked", "checkpoint": "a"}, "method x: kind masked takes no checkpoint"),
        ({"kind": "vq_reconstruction", "decoding": {"top_k": 3}}, "method x: kind vq_reconstruction takes no decoding"),
        ({"kind": "magic"}, "'masked', 'telea'"),
        ({"kind": "inpainting", "decoding": {"total_itr": 3}}, "total_itr: unknown key, known are: total_iter"),
        ({"kind": "inpainting", "decoding": {"top_k": -3}}, "top_k: Input should be greater than or equal to 0, found"),
        ({"kind": "inpainting", "mean_of": 0}, "mean_of"),
    ],
)  # fmt: skip
def test_a_wrong_row_is_named(options, told):
    with pytest.raises(ValueError, match=re.escape(told)):
        Method(name="x", **options)


def test_a_row_may_take_another_vqgan_of_the_same_tokens(tmp_path):
    other, notes = vqgan(PATCH), {"decoding": DecodingConfig().model_dump_json()}
    checkpoint = save(tmp_path / "own", other, transformer(), **notes, vqgan=other.tokens_key())
    for parameter in other.decoder.parameters():
        parameter.data.mul_(1.5)
    save_weights(tmp_path / "other.safetensors", other, other.config, torch.float32)
    told = {}
    for kind in ("vq_reconstruction", "inpainting"):
        for vqgan_file in ("", str(tmp_path / "other.safetensors")):
            row = Method(name="x", kind=kind, checkpoint=str(checkpoint), vqgan=vqgan_file)
            networks = row.open("cpu")
            assert type(networks) is {"vq_reconstruction": Codec, "inpainting": Inpainter}[kind]
            decodes = torch.equal(networks.vqgan.decoder.last_layer, other.decoder.last_layer)
            assert decodes is bool(vqgan_file)
            told[kind, bool(vqgan_file)] = methods.settings_of(row, networks)
    assert all("vqgan" not in settings for settings in told.values())
    assert told["vq_reconstruction", True]["weights"]["vqgan"] == told["inpainting", True]["weights"]["vqgan"]
    assert told["vq_reconstruction", True]["weights"] != told["vq_reconstruction", False]["weights"]


def test_leak_is_the_share_of_known_tokens_that_the_hole_changes_by_distance():
    images, hole = truth(), torch.zeros(N, 1, SIZE, SIZE, dtype=torch.bool)
    hole[..., : SIZE // GRID] = True  # the first column of tokens
    whole, grey = (paint(images, x, False) for x in (torch.zeros_like(hole), hole))
    for encoder in (PATCH, CONV):
        torch.manual_seed(1)
        codec = Codec(vqgan(encoder), "cpu")
        changed = codec.vqgan.encode(to_float(whole)) != codec.vqgan.encode(to_float(grey))
        column = changed.view(N, GRID, GRID).float().mean(dim=(0, 1)).tolist()
        found = methods.leak(codec, codec.encode(images), images, hole)
        assert found["leak"] == pytest.approx(sum(column[1:]) / (GRID - 1))
        assert [found[f"leak {ring}"] for ring in range(1, GRID)] == pytest.approx(column[1:])
        assert set(found) == {"leak", *(f"leak {ring}" for ring in range(1, GRID))}
        assert (found["leak"] > 0) is (encoder is CONV)


@pytest.mark.parametrize("mean_of", [1, 2])
def test_an_inpainting_row_is_judged_with_its_smooth_rim(inpainter, mean_of):
    hole = make_holes("box", N, SIZE)
    plain, smooth = (
        filled(inpainter, kind="inpainting", hole=hole, mean_of=mean_of, decoding={"rim": rim}) for rim in (0.0, 0.5)
    )
    assert torch.equal(plain.raw, smooth.raw) and not torch.equal(plain.images, smooth.images)
    assert torch.equal(plain.images, composite(plain.raw, truth(), hole))
    if mean_of == 1:
        assert torch.equal(smooth.images, smooth_rims(plain.images, hole, 0.5))


def test_a_decoding_that_does_not_fit_the_checkpoints_is_named(inpainter):
    row = Method(name="x", kind="inpainting", decoding={"sweet_spot": 9})  # of total_iter 10, but the checkpoint has 4
    with pytest.raises(ValueError, match=r"method x: sweet_spot = 9 must be at most total_iter = 4"):
        methods.decoding_of(row, inpainter)


def test_settings_tell_weights_and_options_that_matter(inpainter, checkpoint):
    classical = methods.settings_of(Method(name="x", kind="telea"), None)
    floor = methods.settings_of(Method(name="x", kind="vq_reconstruction", checkpoint=str(checkpoint)), inpainter)
    ours = methods.settings_of(Method(name="x", kind="inpainting", checkpoint=str(checkpoint), margin=2), inpainter)
    assert classical == {"kind": "telea"} and set(floor["weights"]) == {"vqgan"}
    assert ours["margin"] == 2 and ours["decoding"] == inpainter.decoding.model_dump(
        exclude={"guess", "rim", "self_ensemble"}
    )
    rim = {"kind": "inpainting", "checkpoint": str(checkpoint), "decoding": {"rim": 0.5}}
    assert methods.settings_of(Method(name="x", **rim), inpainter)["decoding"]["rim"] == 0.5
    assert ours["weights"]["vqgan"] == floor["weights"]["vqgan"] and "checkpoint" not in ours


def test_a_conv_encoder_sees_the_pre_filled_hole():
    """With an encoder that looks beyond a token's patch, what the hole is painted with changes known tokens."""
    torch.manual_seed(0)
    inpainter = Inpainter(vqgan(CONV), transformer(), DecodingConfig(total_iter=2, sweet_spot=2), "cpu")
    hole = make_holes("box", N, SIZE)
    known = ~inpainter.hide(hole)
    grey, painted = (inpainter.encode(paint(truth(), hole, pre_fill)) for pre_fill in (False, True))
    assert known.shape == (N, GRID**2) and (grey != painted)[known].any()
