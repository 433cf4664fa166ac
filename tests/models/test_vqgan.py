"""The VQGAN: the lab's layout key by key and number by number, patches on their own, the codebook's rules."""

import copy
import re
from pathlib import Path

import pydantic
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models.autoencoder import CodebookConfig, NonLocalBlock, VQGANConfig
from models.checkpoint import file_hash, read_weights, save_weights
from models.settings import read_yaml
from models.vqgan import VQGAN, Codebook

LAB = Path(__file__).parents[2] / "configs" / "lab.yml"
LAYOUT = {
    key: tuple(map(int, shape.split(", ")))
    for key, shape in re.findall(
        r"(?m)^(\S+) \[(.+)\]$", Path(__file__).with_name("lab_vqgan_state_dict.txt").read_text()
    )
}
SMALL_LAB = """# the lab's layout at a quarter of its widths or less
vqgan:
  image_size: 64
  latent: 32
  norm_groups: 32
  attention_resolution: 16
  mean: [0.4868, 0.4341, 0.3844]
  std: [0.2620, 0.2527, 0.2543]
  encoder: {kind: conv, stem: 32, widths: [32, 32, 64, 64, 96], blocks: 2, downsample_after: [2, 4]}
  decoder: {widths: [96, 64, 64, 32, 32], blocks: 3, upsample_after: [0, 2]}
  codebook: {codes: 64, dim: 32}
"""
PATCH = dict(
    image_size=16,
    latent=8,
    norm_groups=4,
    encoder=dict(kind="patch", stem=12, widths=[16], blocks=2),
    decoder=dict(widths=[16, 8], blocks=1, upsample_after=[0, 1]),
    codebook=dict(codes=32, dim=4),
)
CONV = PATCH | dict(encoder=dict(kind="conv", stem=8, widths=[8, 16], blocks=1, downsample_after=[0, 1]))
EMA = dict(codes=32, dim=4, ema_decay=0.9, reseed_below=0.0)
every_encoder = pytest.mark.parametrize("options", [PATCH, CONV], ids=["patch", "conv"])
every_space = pytest.mark.parametrize("l2_normalised", [False, True], ids=["euclidean", "l2"])


def make(options: dict, **changes) -> VQGAN:
    """A tiny VQGAN in eval mode with codes spread like its latents, so that many of them are used."""
    torch.manual_seed(0)
    return spread(VQGAN(VQGANConfig.model_validate(options | changes)).eval())


def spread(net: VQGAN) -> VQGAN:
    """Random biases, norms and larger weights: nothing is 0 or 1 by accident; codes where the latents are."""
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            noise = torch.randn(parameter.shape, generator=rng)
            if parameter.ndim == 1:
                parameter.copy_((1.0 if re.search(r"(gn|norm|head\.0)\.weight$", name) else 0.0) + 0.3 * noise)
            else:
                parameter.copy_(1.2 * noise / parameter[0].numel() ** 0.5)
        size = net.config.image_size
        vectors = net.codebook.prepare(net.latents(draw(8, 3, size, size, seed=2))).flatten(0, 2)
        chosen = torch.randperm(len(vectors), generator=rng)[: net.config.codebook.codes]
        net.codebook.embedding.weight.copy_(vectors[chosen])
    return net


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Uniform numbers in [0, 1]."""
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def codebook(**options) -> Codebook:
    """A codebook with well-separated codes, in training mode."""
    torch.manual_seed(0)
    book = Codebook(CodebookConfig(**dict(codes=12, dim=4) | options))
    with torch.no_grad():
        book.embedding.weight.normal_()
        if book.config.ema_decay:
            book.sums.copy_(book.vectors())
    return book


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# The lab's layout


def lab_config() -> VQGANConfig:
    return VQGANConfig.model_validate(read_yaml(LAB)["vqgan"])


def test_lab_yml_has_the_keys_and_shapes_of_the_labs_file():
    with torch.device("meta"):
        net = VQGAN(lab_config())
    assert len(LAYOUT) == 315
    assert {key: tuple(tensor.shape) for key, tensor in net.state_dict().items()} == LAYOUT
    assert sum(parameter.numel() for parameter in net.parameters()) == pytest.approx(70.8e6, abs=0.05e6)
    assert (net.config.factor, net.config.grid) == (4, 16)


def test_a_file_of_the_labs_layout_loads_at_full_size(tmp_path):
    # one number a tensor, expanded: 70.8 M parameters in a file of some kilobytes
    state = {key: torch.full((1,), index / 64).expand(shape) for index, (key, shape) in enumerate(LAYOUT.items())}
    torch.save(state, tmp_path / "VQGAN.pt")
    net = VQGAN.load(tmp_path / "VQGAN.pt", config=LAB)
    for index, key in enumerate(LAYOUT):
        low, high = net.state_dict()[key].aminmax()
        assert low == high == index / 64, key


@pytest.fixture(scope="module")
def small_lab(tmp_path_factory) -> tuple[Path, Path]:
    """(VQGAN.pt, lab.yml): a random file in the lab's layout, with small widths."""
    folder = tmp_path_factory.mktemp("lab")
    (folder / "lab.yml").write_text(SMALL_LAB)
    net = make(read_yaml(folder / "lab.yml")["vqgan"])
    assert net.state_dict().keys() == LAYOUT.keys()
    torch.save(net.state_dict(), folder / "VQGAN.pt")
    return folder / "VQGAN.pt", folder / "lab.yml"


def conv(p: dict[str, Tensor], key: str, x: Tensor, **options) -> Tensor:
    return F.conv2d(x, p[f"{key}.weight"], p[f"{key}.bias"], **options)


def norm(p: dict[str, Tensor], key: str, x: Tensor) -> Tensor:
    """GroupNorm(32, eps 1e-6) in full."""
    b, c, h, w = x.shape
    grouped = x.reshape(b, 32, -1)
    centred = grouped - grouped.mean(-1, keepdim=True)
    unit = (centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()).reshape(b, c, h, w)
    return unit * p[f"{key}.gn.weight"].view(1, c, 1, 1) + p[f"{key}.gn.bias"].view(1, c, 1, 1)


def swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def res(p: dict[str, Tensor], key: str, x: Tensor) -> Tensor:
    y = conv(p, f"{key}.block.2", swish(norm(p, f"{key}.block.0", x)), padding=1)
    y = conv(p, f"{key}.block.5", swish(norm(p, f"{key}.block.3", y)), padding=1)
    return y + (conv(p, f"{key}.channel_up", x) if f"{key}.channel_up.weight" in p else x)


def attend(p: dict[str, Tensor], key: str, x: Tensor) -> Tensor:
    normed = norm(p, f"{key}.norm", x)
    q, k, v = (conv(p, f"{key}.{name}", normed).flatten(2) for name in "qkv")  # (b, c, h*w)
    scores = torch.einsum("bci,bcj->bij", q, k) / x.shape[1] ** 0.5
    weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
    return x + conv(p, f"{key}.proj_out", torch.einsum("bij,bcj->bci", weights, v).view_as(x))


def lab_latents(p: dict[str, Tensor], images: Tensor) -> Tensor:
    """FIELD.md's words about the lab's encoder and quant_conv, one layer a line."""
    mean, std = (images.new_tensor(x).view(1, 3, 1, 1) for x in ((0.4868, 0.4341, 0.3844), (0.2620, 0.2527, 0.2543)))
    x = conv(p, "encoder.model.0", (images - mean) / std, padding=1)
    for layer in (1, 2, 3, 4, 5, 6):  # widths 128, 128, 256
        x = res(p, f"encoder.model.{layer}", x)
    x = conv(p, "encoder.model.7.conv", F.pad(x, (0, 1, 0, 1)), stride=2)
    for layer in (8, 9, 10, 11):  # widths 256, 512
        x = res(p, f"encoder.model.{layer}", x)
    x = conv(p, "encoder.model.12.conv", F.pad(x, (0, 1, 0, 1)), stride=2)
    x = res(p, "encoder.model.13", x)
    x = attend(p, "encoder.model.14", x)
    x = res(p, "encoder.model.15", x)
    x = conv(p, "encoder.model.18", swish(norm(p, "encoder.model.16", x)), padding=1)
    return conv(p, "quant_conv", x)


def lab_images(p: dict[str, Tensor], codes: Tensor) -> Tensor:
    """FIELD.md's words about the lab's post_quant_conv and decoder; images in [0, 1] but for overshoots."""
    x = conv(p, "decoder.model.0", conv(p, "post_quant_conv", codes), padding=1)
    x = res(p, "decoder.model.1", x)
    x = attend(p, "decoder.model.2", x)
    x = res(p, "decoder.model.3", x)
    for layer in (4, 6, 8):  # width 512, at resolution 16
        x = attend(p, f"decoder.model.{layer + 1}", res(p, f"decoder.model.{layer}", x))
    x = conv(p, "decoder.model.10.conv", x.repeat_interleave(2, 2).repeat_interleave(2, 3), padding=1)
    for layer in (11, 12, 13, 14, 15, 16):  # widths 256, 256
        x = res(p, f"decoder.model.{layer}", x)
    x = conv(p, "decoder.model.17.conv", x.repeat_interleave(2, 2).repeat_interleave(2, 3), padding=1)
    for layer in (18, 19, 20, 21, 22, 23):  # widths 128, 128
        x = res(p, f"decoder.model.{layer}", x)
    x = conv(p, "decoder.model.25", norm(p, "decoder.model.24", x), padding=1)  # no activation between
    mean, std = (x.new_tensor(y).view(1, 3, 1, 1) for y in ((0.4868, 0.4341, 0.3844), (0.2620, 0.2527, 0.2543)))
    return x * std + mean


@torch.no_grad()
def test_the_labs_layout_computes_what_the_lab_computes(small_lab):
    state = torch.load(small_lab[0], weights_only=True)
    p = {key: tensor.double() for key, tensor in state.items()}
    net = VQGAN.load(*small_lab)
    images = draw(2, 3, 64, 64)

    latents = lab_latents(p, images.double())  # (b, e, g, g)
    exact = copy.deepcopy(net).double()
    exact.mean, exact.std = (torch.tensor(x, dtype=torch.float64).view(1, 3, 1, 1)
                             for x in (net.config.mean, net.config.std))  # fmt: skip
    assert torch.allclose(exact.latents(images.double()), latents, atol=1e-10)

    points = latents.flatten(2).transpose(1, 2)  # (b, n, e)
    distances = (points[:, :, None] - p["codebook.embedding.weight"]).square().sum(-1).sqrt()  # (b, n, k)
    tokens = net.encode(images)
    chosen = distances.gather(-1, tokens[..., None])[..., 0]
    assert (chosen - distances.amin(-1)).max() < 1e-5  # float32 may break a near tie otherwise than float64
    assert tokens.unique().numel() > 32

    codes = p["codebook.embedding.weight"][tokens].transpose(1, 2).reshape(2, -1, 16, 16)
    pictures = lab_images(p, codes)
    assert torch.allclose(exact.decode_codes(codes), pictures, atol=1e-10)
    assert torch.allclose(net.decode(tokens), pictures.clamp(0, 1).float(), atol=1e-4)
    assert ((pictures > 0) & (pictures < 1)).double().mean() > 0.2  # the clamp does not hide the comparison


def test_load_returns_a_frozen_network(small_lab):
    for config in (small_lab[1], str(small_lab[1]), VQGANConfig.model_validate(read_yaml(small_lab[1])["vqgan"])):
        net = VQGAN.load(small_lab[0], config=config)
        assert not any(module.training for module in net.modules())
        assert not any(parameter.requires_grad for parameter in net.parameters())
    assert torch.equal(net.state_dict()["quant_conv.bias"], torch.load(small_lab[0])["quant_conv.bias"])


def test_the_labs_file_needs_a_config_and_one_that_fits(small_lab):
    with pytest.raises(ValueError, match=r"VQGAN\.pt: expected the weights of a VQGAN.*config=FILE\.yml"):
        VQGAN.load(small_lab[0])
    with pytest.raises(
        ValueError, match=r"VQGAN\.pt: does not fit this VQGAN: .*unexpected encoder\.model\.0.*; and \d+"
    ):
        VQGAN.load(small_lab[0], VQGANConfig.model_validate(PATCH))
    with pytest.raises(FileNotFoundError, match=r"none\.pt"):
        VQGAN.load("none.pt", small_lab[1])


@every_space
def test_our_own_file_describes_itself(tmp_path, l2_normalised):
    net = make(PATCH, codebook=EMA | dict(l2_normalised=l2_normalised), mean=(0.4, 0.5, 0.6))
    save_weights(tmp_path / "vqgan.safetensors", net, net.config, torch.float32)
    loaded, images = VQGAN.load(tmp_path / "vqgan.safetensors"), draw(2, 3, 16, 16)
    assert loaded.config == net.config
    assert torch.equal(loaded.encode(images), net.encode(images))
    assert torch.equal(loaded(images)[0], net(images)[0])
    assert not any(p.requires_grad for p in loaded.parameters()) and not loaded.training


# Images and tokens


@every_encoder
@torch.no_grad()
def test_shapes_and_ranges(options):
    net, images = make(options), draw(3, 3, 16, 16)
    tokens = net.encode(images)
    assert tokens.shape == (3, 16) and tokens.dtype == torch.int64
    assert tokens.min() >= 0 and tokens.max() < 32 and tokens.unique().numel() > 4
    pictures = net.decode(tokens)
    assert pictures.shape == images.shape and pictures.dtype == torch.float32
    output, same, loss = net(images)
    assert torch.equal(same, tokens) and loss.shape == () and loss > 0
    assert torch.allclose(output.clamp(0, 1), pictures, atol=1e-5)
    assert not torch.equal(output, output.clamp(0, 1))  # training sees the overshoot, users do not
    assert pictures.min() == 0 and pictures.max() == 1


@every_encoder
@torch.no_grad()
def test_an_image_alone_is_as_in_a_batch(options):
    net, images = make(options), draw(3, 3, 16, 16)
    tokens, latents = net.encode(images), net.latents(images)
    pictures = net.decode(tokens)
    for index in range(3):
        assert torch.equal(net.encode(images[index : index + 1])[0], tokens[index])
        assert torch.allclose(net.latents(images[index : index + 1])[0], latents[index], atol=1e-5)
        assert torch.allclose(net.decode(tokens[index : index + 1])[0], pictures[index], atol=1e-5)


@every_encoder
@torch.no_grad()
def test_normalisation_belongs_to_the_model(options):
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    own, plain = make(options, mean=mean, std=std), make(options, mean=(0, 0, 0), std=(1, 1, 1))
    plain.load_state_dict(own.state_dict())  # no mean or std among the keys
    mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in (mean, std))
    images, codes = draw(2, 3, 16, 16), normal(2, 4, 4, 4)
    assert torch.allclose(own.latents(images), plain.latents((images - mean) / std), atol=1e-5)
    assert torch.allclose(own.decode_codes(codes), plain.decode_codes(codes) * std + mean, atol=1e-5)


@torch.no_grad()
def test_tokens_are_counted_row_by_row():
    net, images = make(PATCH), draw(1, 3, 16, 16)
    changed = images.clone()
    changed[:, :, 4:8, 8:12] = 1 - changed[:, :, 4:8, 8:12]  # row 1, column 2 of patches
    assert (net.latents(changed) != net.latents(images)).any(1).flatten().nonzero().tolist() == [[6]]
    tokens = net.encode(images)
    latents = net.latents(images).flatten(2)[0].T  # (n, e)
    assert [int(net.codebook.nearest(latent)) for latent in latents] == tokens[0].tolist()


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        *(("conv", shape) for shape in ((1, 3, 16, 12), (1, 3, 32, 32), (1, 1, 16, 16), (3, 16, 16), (1, 16, 16, 3))),
        *(("patch", shape) for shape in ((1, 3, 16, 14), (1, 1, 16, 16), (3, 16, 16), (1, 16, 16, 3))),
    ],
    ids=str,
)
def test_images_of_another_shape_raise_with_both_shapes(kind, shape):
    net = make(CONV if kind == "conv" else PATCH)
    sides = "16" if kind == "conv" else "multiples of 4"
    message = re.escape(f"images: expected (b, 3, H, W), H and W {sides}, found {shape}")
    for method in (net.encode, net.latents, net.forward):
        with pytest.raises(ValueError, match=message):
            method(torch.zeros(shape))


def test_a_patch_encoder_takes_any_multiple_of_its_factor():
    net, images = make(PATCH), draw(2, 3, 24, 36)
    tokens = net.encode(images).view(2, 6, 9)
    assert torch.equal(tokens[:, 1:5, 3:7].flatten(1), net.encode(images[:, :, 4:20, 12:28]))


@pytest.mark.parametrize("shape", [(1, 15), (1, 9), (1, 64), (16,), (1, 4, 4), (1, 1, 16)], ids=str)
def test_tokens_of_another_shape_raise_with_both_shapes(shape):
    net = make(PATCH)
    expected = f"tokens: expected (b, 16), or code vectors (b, 16, {net.config.codebook.dim}), found {shape}"
    with pytest.raises(ValueError, match=re.escape(expected)):
        net.decode(torch.zeros(shape, dtype=torch.int64))


def test_code_vectors_are_decoded_in_place_of_tokens():
    net, tokens = make(PATCH).eval(), torch.randint(32, (2, 16))
    vectors = net.codebook.vectors()[tokens]  # (b, n, e)
    with torch.no_grad():
        assert torch.equal(net.decode(vectors), net.decode(tokens))
        between = (vectors + net.codebook.vectors()[tokens.flip(0)]) / 2
        assert not torch.allclose(net.decode(between), net.decode(tokens), atol=1e-4)


def test_the_mask_id_cannot_be_decoded():
    with pytest.raises(IndexError):
        make(PATCH).decode(torch.full((1, 16), 32))


@every_encoder
def test_every_part_learns_from_one_loss(options):
    net, images = make(options).train(), draw(2, 3, 16, 16)
    output, _, codebook_loss = net(images)
    (F.l1_loss(output, images) + codebook_loss).backward()
    silent = [name for name, parameter in net.named_parameters() if parameter.grad is None or not parameter.grad.any()]
    assert [name for name in silent if not name.endswith("k.bias")] == []  # softmax ignores a bias of k
    assert net.decoder.last_layer is net.decoder.model[-1].weight and net.decoder.last_layer.shape == (3, 8, 3, 3)


@every_encoder
@torch.no_grad()
def test_tokens_of_encode_are_those_of_training_under_bfloat16_too(options):
    net, images = make(options), draw(8, 3, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        output, tokens, loss = net(images)
        assert torch.equal(net.encode(images), tokens)
        assert net.decode(tokens).dtype == torch.float32
    assert output.isfinite().all() and loss.dtype == torch.float32


@pytest.mark.parametrize(("resolution", "blocks"), [(4, 3), (8, 3), (16, 3), (32, 1)])
def test_attention_follows_each_resblock_at_its_resolution_only(resolution, blocks):
    # one in the middle; in the encoder a level starts at 16 and one at 8, in the decoder one at 4 and one at 8
    net = VQGAN(VQGANConfig.model_validate(CONV | dict(attention_resolution=resolution)))
    count = sum(isinstance(module, NonLocalBlock) for module in net.modules())
    levels = {4: 1, 8: 2, 16: 1, 32: 0}[resolution]
    assert count == 2 + levels


# Patches that keep to themselves

KEEPER = make(PATCH)


@settings(deadline=None, max_examples=25)
@given(st.sets(st.integers(0, 15), min_size=1, max_size=15), st.integers(0, 2**32), st.sampled_from(["grey", "noise"]))
@torch.no_grad()
def test_the_patch_encoder_keeps_a_token_whatever_happens_in_other_patches(holes, seed, fill):
    net, images = KEEPER, draw(2, 3, 16, 16, seed=seed)
    hidden = torch.zeros(16, dtype=torch.bool)
    hidden[list(holes)] = True
    hole = hidden.view(1, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
    damaged = torch.where(hole, torch.tensor(0.5) if fill == "grey" else draw(2, 3, 16, 16, seed=seed + 1), images)
    before, after = net.latents(images).flatten(2), net.latents(damaged).flatten(2)
    assert torch.equal(after[..., ~hidden], before[..., ~hidden])
    assert torch.equal(net.encode(damaged)[:, ~hidden], net.encode(images)[:, ~hidden])
    assert not torch.equal(after[..., hidden], before[..., hidden])


@torch.no_grad()
def test_the_conv_encoder_leaks_a_hole_into_every_token():
    net, images = make(CONV), draw(2, 3, 16, 16)
    damaged = images.clone()
    damaged[:, :, 12:, 12:] = 0.5
    change = (net.latents(damaged) - net.latents(images)).abs().amax(1)  # (b, g, g)
    assert (change > 1e-4).all()  # even in the opposite corner


# The codebook


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32))
def test_nearest_is_the_brute_force_nearest_code(seed):
    """Small integers: float32 is exact, ties included (the first code wins)."""
    rng = torch.Generator().manual_seed(seed)
    book = codebook()
    book.embedding.weight.data = torch.randint(-4, 5, (12, 4), generator=rng).float()
    vectors = torch.randint(-4, 5, (2, 3, 3, 4), generator=rng).float()
    by_hand = (vectors[..., None, :].double() - book.embedding.weight.double()).square().sum(-1).argmin(-1)
    ids = book.nearest(vectors)
    assert ids.shape == (2, 3, 3) and torch.equal(ids, by_hand)


@every_space
def test_nearest_agrees_with_cdist(l2_normalised):
    book, latents = codebook(l2_normalised=l2_normalised), 3 * normal(2, 4, 5, 5, seed=3)
    vectors = latents.permute(0, 2, 3, 1)
    codes = book.embedding.weight
    if l2_normalised:
        vectors, codes = (x / x.norm(dim=-1, keepdim=True) for x in (vectors, codes))
    _, ids, _ = book(latents)
    assert torch.equal(ids, torch.cdist(vectors.reshape(2, 25, 4), codes.expand(2, -1, -1)).argmin(-1))


@every_space
def test_quantising_a_code_gives_its_id_and_the_code(l2_normalised):
    book = codebook(l2_normalised=l2_normalised).eval()
    assert torch.equal(book.nearest(book.vectors()), torch.arange(12))
    latents = book.vectors().detach().T.reshape(1, 4, 3, 4)  # the 12 codes as a picture
    codes, ids, loss = book(latents)
    assert torch.equal(ids, torch.arange(12)[None])
    assert torch.allclose(codes, latents, atol=1e-6) and loss.item() == pytest.approx(0, abs=1e-12)


def test_l2_normalised_codes_have_length_one_and_directions_alone_count():
    book, latents = codebook(l2_normalised=True), normal(2, 4, 3, 3)
    codes, ids, loss = book(latents)
    assert torch.allclose(book.vectors().norm(dim=-1), torch.ones(12))
    assert torch.allclose(codes.norm(dim=1), torch.ones(2, 3, 3))
    longer = book(7 * latents)
    assert torch.equal(longer[1], ids) and torch.allclose(longer[2], loss)
    assert not torch.allclose(codebook().vectors().norm(dim=-1), torch.ones(12))


@every_space
def test_forward_returns_the_chosen_codes(l2_normalised):
    book = codebook(l2_normalised=l2_normalised)
    codes, ids, _ = book(normal(2, 4, 3, 3))
    assert torch.allclose(codes.flatten(2).transpose(1, 2), book.vectors()[ids], atol=1e-6)


def test_the_straight_through_gradient_is_the_identity():
    book, latents, upstream = codebook(), normal(2, 4, 3, 3).requires_grad_(), normal(2, 4, 3, 3, seed=1)
    codes, _, _ = book(latents)
    codes.backward(upstream)
    assert torch.equal(latents.grad, upstream)
    assert book.embedding.weight.grad is None  # pixels do not move the codes, the VQ loss does


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_swapped_tokens_are_decoded_as_the_codes_near_theirs_and_learned_as_they_are(decay):
    book, other, latents = codebook(ema_decay=decay), codebook(ema_decay=decay), normal(2, 4, 3, 3).requires_grad_()
    swaps = torch.tensor([[-1, 0, 1, -1, 10, 2, 0, -1, 3], [0, -1, -1, -1, -1, -1, -1, -1, 5]])
    codes, ids, loss = book(latents, swaps)
    order = torch.cdist(book.vectors(), book.vectors()).argsort(dim=1)  # (k, k), itself first
    taken = order[ids].gather(-1, (swaps + 1)[..., None])[..., 0]
    assert torch.allclose(codes.flatten(2).transpose(1, 2), book.vectors()[taken], atol=1e-6)
    assert (taken == ids).equal(swaps < 0)

    _, plain, same = other(latents)
    book.update(), other.update()
    assert torch.equal(ids, plain) and torch.equal(loss, same)
    assert torch.equal(book.embedding.weight, other.embedding.weight)
    (gradient,) = torch.autograd.grad(codes.sum(), latents)
    assert (gradient == 1).all()


def test_a_code_beside_an_equal_one_is_swapped_for_that_one():
    book = codebook()
    with torch.no_grad():
        book.embedding.weight[3] = book.embedding.weight[7]
    ids = torch.tensor([3, 7])
    assert book.swapped(ids, torch.zeros_like(ids)).tolist() == [7, 3]


@pytest.mark.parametrize("beta", [0.0, 0.25, 3.0])
def test_the_commitment_weight_is_on_the_encoders_side(beta):
    """loss = |sg(z_e) - z_q|^2 + beta |z_e - sg(z_q)|^2: beta scales the latents' gradient, never the codes'."""
    book, latents = codebook(commitment=beta), normal(2, 4, 3, 3).requires_grad_()
    _, ids, loss = book(latents)
    loss.backward()
    vectors, chosen = latents.detach().permute(0, 2, 3, 1).reshape(-1, 4), book.embedding.weight.detach()[ids.flatten()]
    count = vectors.numel()
    assert loss.item() == pytest.approx((1 + beta) * (vectors - chosen).square().sum().item() / count, rel=1e-5)

    pull = (2 * beta * (vectors - chosen) / count).reshape(2, 3, 3, 4).permute(0, 3, 1, 2)
    assert torch.allclose(latents.grad, pull, atol=1e-7)
    push = torch.zeros(12, 4).index_add_(0, ids.flatten(), 2 * (chosen - vectors) / count)
    assert torch.allclose(book.embedding.weight.grad, push, atol=1e-7)


@every_space
def test_the_ema_update_is_the_papers(l2_normalised):
    """VQ-VAE eq. 6-8: N <- d N + (1 - d) n, m <- d m + (1 - d) sum z_e, e = m / N; two steps."""
    book = codebook(ema_decay=0.9, l2_normalised=l2_normalised)
    codes, uses = book.vectors().clone(), torch.ones(12)
    sums = codes.clone()
    for step in range(2):
        latents = normal(2, 4, 5, 5, seed=step)
        vectors = latents.permute(0, 2, 3, 1).reshape(-1, 4)
        if l2_normalised:
            vectors = vectors / vectors.norm(dim=-1, keepdim=True)
        ids = torch.cdist(vectors, codes).argmin(-1)
        for code in range(12):
            mine = vectors[ids == code]
            uses[code] = 0.9 * uses[code] + 0.1 * len(mine)
            sums[code] = 0.9 * sums[code] + 0.1 * mine.sum(0)
        chosen = codes[ids]
        codes = sums / uses[:, None]
        if l2_normalised:
            codes = codes / codes.norm(dim=-1, keepdim=True)
        output, found, loss = book(latents)
        book.update()
        assert torch.equal(found.flatten(), ids)
        assert torch.allclose(output.permute(0, 2, 3, 1).reshape(-1, 4), chosen, atol=1e-6)  # not those of the update
        assert torch.allclose(book.uses, uses) and torch.allclose(book.sums, sums, atol=1e-6)
        assert torch.allclose(book.vectors(), codes, atol=1e-6)
        assert loss.item() == pytest.approx(0.25 * (vectors - chosen).square().mean().item(), rel=1e-4)


def test_an_ema_codebook_gets_no_gradient_but_its_encoder_does():
    book, latents = codebook(ema_decay=0.9, commitment=0.5), normal(2, 4, 3, 3).requires_grad_()
    codes, _, loss = book(latents)
    loss.backward()
    assert not book.embedding.weight.requires_grad and book.embedding.weight.grad is None
    assert not list(filter(lambda parameter: parameter.requires_grad, book.parameters()))
    assert torch.allclose(latents.grad, 2 * 0.5 * (latents - codes).detach() / latents.numel(), atol=1e-7)


@every_space
def test_micro_batches_update_the_codebook_as_the_whole_batch_does(l2_normalised):
    options, latents = {"ema_decay": 0.9, "reseed_below": 0.91, "l2_normalised": l2_normalised}, normal(6, 4, 5, 5)
    whole, parts = codebook(**options), codebook(**options)
    parts.load_state_dict(whole.state_dict())
    for book, count in ((whole, 1), (parts, 3)):
        for part in latents.chunk(count):
            book(part)
        torch.manual_seed(7)
        book.update()
        book.update()  # nothing is left to do
    for key, tensor in whole.state_dict().items():
        torch.testing.assert_close(parts.state_dict()[key], tensor, atol=1e-6, rtol=1e-5)


@every_space
def test_dead_codes_are_reseeded_from_the_batch_and_used_codes_are_not(l2_normalised):
    book = codebook(ema_decay=0.5, reseed_below=0.6, l2_normalised=l2_normalised)
    before = book.vectors().clone()
    latents = before[:3].repeat(6, 1)[None].permute(0, 2, 1).reshape(1, 4, 3, 6) * 1.01  # codes 0, 1, 2 six times each
    vectors = book.prepare(latents).reshape(-1, 4)
    book(latents)
    book.update()
    assert torch.allclose(book.uses, torch.tensor([3.5] * 3 + [1.0] * 9))  # 0.5 + 6 / 2; the others restart at 1
    assert torch.allclose(book.vectors()[:3], before[:3], rtol=0.01)
    for code in book.vectors()[3:]:
        assert torch.isclose(vectors, code, atol=1e-6).all(-1).any()
    assert not torch.allclose(book.vectors()[3:], before[3:], atol=0.05)


def test_codes_are_reseeded_only_below_the_threshold():
    latents = normal(1, 4, 3, 3)
    for threshold, reseeded in ((0.0, False), (0.89, False), (0.91, True)):  # an unused code falls from 1 to 0.9
        book = codebook(ema_decay=0.9, reseed_below=threshold)
        before = book.vectors().clone()
        _, ids, _ = book(latents)
        book.update()
        unused = [code for code in range(12) if code not in ids]
        assert unused and torch.allclose(book.vectors()[unused], before[unused], atol=1e-6) != reseeded


def test_reseeding_brings_a_collapsed_codebook_to_life():
    book = codebook(codes=16, ema_decay=0.8, reseed_below=0.5)
    book.embedding.weight += 100.0
    book.sums += 100.0
    torch.manual_seed(0)
    for step in range(20):
        ids = book(normal(8, 4, 8, 8, seed=step))[1]
        book.update()
    assert ids.unique().numel() == 16


@every_encoder
def test_nothing_is_updated_in_eval_mode(options):
    net, images = make(options, codebook=EMA | dict(reseed_below=0.99)), draw(4, 3, 16, 16)
    before = copy.deepcopy(net.state_dict())
    net(images)
    net.encode(images)
    net.codebook.update()
    assert all(torch.equal(tensor, before[key]) for key, tensor in net.state_dict().items())
    net.train()(images)
    assert torch.equal(net.codebook.embedding.weight, before["codebook.embedding.weight"])  # once a step, when told
    net.codebook.update()
    assert not torch.equal(net.codebook.embedding.weight, before["codebook.embedding.weight"])


# Config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(image_size=18), "image_size 18 is no multiple of the downsampling factor 4"),
        (dict(image_size=2), r"image_size\n.*greater than or equal to 4"),
        (dict(norm_groups=3), r"norm_groups 3 must divide every width, found \(16, 8, 8, 8, 16\)"),
        (dict(std=(0.5, 0.0, 0.5)), r"std must be positive, found \(0.5, 0.0, 0.5\)"),
        (dict(mean=(0.5, 0.5)), r"mean\.2\n"),
        (dict(mean=("0.5", 0.5, 0.5)), r"mean\.0\n.*valid number"),
        (dict(latent="8"), r"latent\n.*valid integer"),
        (dict(depth=1), r"depth\n.*not permitted"),
        (dict(encoder=CONV["encoder"] | dict(downsample_after=[0])), "must be equally long"),
        (dict(encoder=CONV["encoder"] | dict(downsample_after=[0, 2])), r"encoder.downsample_after \(0, 2\): .* 0..1,"),
        (dict(encoder=CONV["encoder"] | dict(downsample_after=[1, 1])), r"encoder.downsample_after .* at most once"),
        (dict(encoder=CONV["encoder"] | dict(kind="vit")), r"encoder\.kind\n.*'conv' or 'patch'"),
        (dict(encoder=CONV["encoder"] | dict(widths=[])), r"encoder\.widths\n"),
        (dict(encoder=CONV["encoder"] | dict(widths=[8, 0])), r"encoder\.widths\.1\n"),
        (dict(encoder=CONV["encoder"] | dict(widths=[8.0, 16])), r"encoder\.widths\.0\n.*valid integer"),
        (dict(encoder=PATCH["encoder"] | dict(widths=[16, 16])), "encoder.kind patch takes one width"),
        (dict(encoder=PATCH["encoder"] | dict(downsample_after=[0])), "encoder.kind patch takes one width and no"),
        (dict(encoder=PATCH["encoder"] | dict(blocks=0)), r"encoder\.blocks\n"),
        (
            dict(decoder=PATCH["decoder"] | dict(upsample_after=[0, 2])),
            r"decoder.upsample_after \(0, 2\): levels .* 0..1",
        ),
        (dict(decoder=PATCH["decoder"] | dict(upsample_after=[-1, 0])), r"decoder\.upsample_after\.0\n"),
        (dict(codebook=dict(codes=1, dim=4)), r"codebook\.codes\n"),
        (dict(codebook=EMA | dict(ema_decay=1.0)), r"codebook\.ema_decay\n.*less than 1"),
        (dict(codebook=EMA | dict(commitment=-0.1)), r"codebook\.commitment\n"),
        (dict(codebook=EMA | dict(reseed_below=-1.0)), r"codebook\.reseed_below\n"),
        (dict(codebook=dict(codes=16)), r"codebook\.dim\n.*required"),
    ],
)
def test_a_wrong_config_is_refused_by_the_name_of_its_key(change, message):
    with pytest.raises(pydantic.ValidationError, match=f"(?s){message}"):
        VQGANConfig.model_validate(CONV | change)


def test_the_patch_encoders_widths_need_no_groups():
    config = VQGANConfig.model_validate(PATCH | dict(encoder=PATCH["encoder"] | dict(stem=7, widths=[9])))
    assert VQGAN(config).encode(draw(1, 3, 16, 16)).shape == (1, 16)


@pytest.mark.parametrize("factor", [1, 2, 8])
@pytest.mark.parametrize("kind", ["patch", "conv"])
def test_any_downsampling_factor(factor, kind):
    levels = list(range(factor.bit_length() - 1))
    encoder = (
        PATCH["encoder"]
        if kind == "patch"
        else dict(kind="conv", stem=8, widths=[8] * 3, blocks=1, downsample_after=levels)
    )
    net = make(PATCH, encoder=encoder, decoder=dict(widths=[8] * 3, blocks=1, upsample_after=levels))
    images = draw(2, 3, 16, 16)
    assert (net.config.factor, net.config.grid) == (factor, 16 // factor)
    tokens = net.encode(images)
    assert tokens.shape == (2, (16 // factor) ** 2) and net.decode(tokens).shape == images.shape


# --- a decoder that reads the known pixels ---


def reader(seed: int = 0, **branch) -> VQGAN:
    """A VQGAN whose decoder has the branch, its joins as if trained."""
    torch.manual_seed(seed)
    net = VQGAN(VQGANConfig.model_validate(PATCH | {"decoder": PATCH["decoder"] | {"known_width": 4} | branch})).eval()
    for join in net.decoder.joins:
        torch.nn.init.normal_(join.weight, 0.0, 0.5)
    return net


@torch.no_grad()
def test_the_branch_starts_as_nothing_and_adds_keys_only():
    torch.manual_seed(1)
    plain = VQGAN(VQGANConfig.model_validate(PATCH)).eval()
    net = VQGAN(VQGANConfig.model_validate(PATCH | {"decoder": PATCH["decoder"] | {"known_width": 4}})).eval()
    missing = net.load_state_dict(plain.state_dict(), strict=False)
    assert not missing.unexpected_keys
    assert all(key.startswith(("decoder.known.", "decoder.joins.")) for key in missing.missing_keys)
    size = net.config.image_size
    images, hole = draw(2, 3, size, size), draw(2, 1, size, size) < 0.5
    tokens = plain.encode(images)
    assert torch.equal(net.decode(tokens, images, hole), plain.decode(tokens))


@torch.no_grad()
def test_the_decoder_reads_known_pixels_and_never_those_in_the_hole():
    net = reader()
    size = net.config.image_size
    images, hole = draw(3, 3, size, size), draw(3, 1, size, size, seed=1) < 0.5
    tokens = net.encode(images)
    out = net.decode(tokens, images, hole)
    painted = torch.where(hole, draw(3, 3, size, size, seed=2), images)
    assert torch.equal(net.decode(tokens, painted, hole), out)
    assert not torch.equal(net.decode(tokens, torch.where(hole, images, 1 - images), hole), out)
    everything = torch.ones_like(hole)
    assert torch.equal(net.decode(tokens, images, everything), net.decode(tokens))
    assert torch.allclose(net.decode(tokens[1:2], images[1:2], hole[1:2]), out[1:2], atol=1e-5)


@torch.no_grad()
def test_a_pre_filled_decoder_reads_the_first_guess_too():
    plain, net = reader(), reader(pre_filled=True)
    size = net.config.image_size
    images, hole = draw(2, 3, size, size), draw(2, 1, size, size, seed=1) < 0.5
    tokens, other = net.encode(images), torch.where(hole, draw(2, 3, size, size, seed=2), images)
    assert not torch.equal(net.decode(tokens, images, hole), net.decode(tokens, other, hole))
    mean = torch.where(hole, net.mean, images)  # 0 once normalised: what is missing, without a first guess
    assert torch.allclose(net.decode(tokens, mean, hole), plain.decode(tokens, images, hole), atol=1e-6)
    with pytest.raises(ValueError, match=r"set decoder\.known_width"):
        reader(pre_filled=True, known_width=0)


def test_every_part_of_the_branch_learns():
    net = reader()
    size = net.config.image_size
    images, hole = draw(2, 3, size, size), draw(2, 1, size, size, seed=1) < 0.5
    tokens = net.encode(images)
    output, same, loss = net(images, hole, tokens)
    output.square().mean().backward()
    assert torch.equal(same, tokens) and float(loss) == 0
    for name, parameter in net.named_parameters():
        if name.startswith(("decoder.", "post_quant_conv.")):
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
        elif not name.startswith("codebook."):
            assert parameter.grad is None, name


def test_the_key_of_the_tokens_ignores_the_decoder_and_survives_float16():
    net = reader()
    key = net.tokens_key()
    with torch.no_grad():
        for parameter in net.decoder.parameters():
            parameter.mul_(1.5)
    assert net.tokens_key() == key == net.half().float().tokens_key()
    with torch.no_grad():
        net.quant_conv.weight.mul_(1.5)
    assert net.tokens_key() != key


def test_the_tokens_key_changes_with_what_makes_tokens_and_with_nothing_else():
    def key(options, **changes) -> str:
        torch.manual_seed(0)
        net = VQGAN(VQGANConfig.model_validate(options | changes))
        torch.manual_seed(1)
        for name, parameter in sorted(net.named_parameters()):
            if not name.startswith("decoder."):
                torch.nn.init.normal_(parameter)
        return net.tokens_key()

    for options in (PATCH, CONV):
        book = options["codebook"]
        same = [
            dict(codebook=book | change)
            for change in (dict(commitment=0.7), dict(ema_decay=0.5), dict(reseed_below=1.0))
        ]
        same.append(dict(decoder=options["decoder"] | dict(known_width=4)))
        assert {key(options, **change) for change in same} == {key(options)}
        other = [
            dict(mean=(0.1, 0.2, 0.3)),
            dict(std=(0.1, 0.2, 0.3)),
            dict(codebook=book | dict(l2_normalised=not book.get("l2_normalised"))),
        ]
        assert len({key(options), *(key(options, **change) for change in other)}) == 4
    assert key(CONV, norm_groups=2) != key(CONV) and key(PATCH, norm_groups=2) == key(PATCH)
    assert key(CONV, attention_resolution=8) != key(CONV)  # attention at another level


def test_the_shipped_transformers_fit_the_shipped_vqgans_by_the_key_that_they_noted():
    found = {path.parent for path in (LAB.parents[1] / "pretrained").glob("*/transformer.safetensors")}
    first = {"cats64_public", "cats64_reference"}  # trained before there was a `tokens_key`
    assert first <= {folder.name for folder in found}
    for folder in found:
        noted = read_weights(folder / "transformer.safetensors")[1]["vqgan"]
        vqgan = VQGAN.load(folder / "vqgan.safetensors")
        if folder.name in first:
            assert noted in (vqgan.former_tokens_key(), file_hash(folder / "vqgan.safetensors"))
        else:
            assert noted == vqgan.tokens_key()
