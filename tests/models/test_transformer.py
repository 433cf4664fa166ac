"""The transformer: attention equals the reference, every token sees every token, the mask id is an input only."""

import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import nn

import models.transformer
from models.checkpoint import save_weights
from models.transformer import INIT_SD, Block, Dropout, MultiHeadAttention, Rotary, Transformer, TransformerConfig

K, N, D = 12, 16, 32
TINY = dict(
    codes=K,
    tokens=N,
    width=D,
    depth=2,
    heads=4,
    mlp_width=48,
    dropout=0.0,
    attention_dropout=0.0,
    norm="pre",
    positions="learned",
    tied=False,
    position_bias=False,
)
LAB = dict(
    width=768,
    depth=15,
    heads=16,
    mlp_width=1536,
    dropout=0.1,
    attention_dropout=0.1,
    norm="post",
    positions="learned",
    tied=True,
    position_bias=True,
)
KINDS = [
    dict(norm="pre", positions="learned", tied=False, position_bias=False),
    dict(norm="pre", positions="rotary", tied=True, position_bias=True, attention_bias=True),
    dict(norm="post", positions="learned", tied=True, position_bias=True),
    dict(norm="post", positions="rotary", tied=False, position_bias=False),
]
every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind['norm']}-{kind['positions']}")


def make(seed: int = 0, scale: float = 5.0, **options) -> Transformer:
    """A tiny transformer in eval mode; weights `scale` times their initial size, so that attention is not flat."""
    torch.manual_seed(seed)
    model = Transformer(TransformerConfig(**TINY | options)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
            elif parameter.ndim > 1:
                parameter *= scale
    return model


def some_tokens(b: int = 3, seed: int = 0) -> torch.Tensor:
    """(b, N) ids, some of them the mask id."""
    return torch.randint(0, K + 1, (b, N), generator=torch.Generator().manual_seed(seed))


# --- attention ---


def reference_attention(x, attention, rotate=lambda q: q):
    """The same projections around PyTorch's own attention."""
    b, n, d = x.shape

    def project(linear):
        return linear(x).reshape(b, n, attention.heads, d // attention.heads).transpose(1, 2)

    query, key, value = rotate(project(attention.query)), rotate(project(attention.key)), project(attention.value)
    mixed = F.scaled_dot_product_attention(query, key, value)
    return attention.output(mixed.transpose(1, 2).reshape(b, n, d))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 2e-5)])
@pytest.mark.parametrize("rotary", [None, Rotary(3, 8)], ids=["plain", "rotary"])
@pytest.mark.parametrize("bias", [False, True], ids=["bias-free", "bias"])
def test_attention_equals_the_reference_in_value_and_gradient(dtype, tolerance, rotary, bias):
    torch.manual_seed(0)
    attention = MultiHeadAttention(24, heads=3, dropout=0.0, bias=bias).to(dtype)
    x = (2 * torch.randn(2, 9, 24, dtype=dtype)).requires_grad_()
    upstream = torch.randn(2, 9, 24, dtype=dtype)
    rotary = rotary and rotary.to(dtype)
    ours = attention(x, rotary)
    theirs = reference_attention(x, attention, rotary or (lambda q: q))
    assert ours.std() > 0.05
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)
    wanted = [x, *attention.parameters()]
    assert len(wanted) == (9 if bias else 5)
    for mine, reference in zip(
        torch.autograd.grad(ours, wanted, upstream), torch.autograd.grad(theirs, wanted, upstream), strict=True
    ):
        torch.testing.assert_close(mine, reference, rtol=0, atol=10 * tolerance)


def test_attention_is_by_hand():
    source = inspect.getsource(models.transformer)
    assert "scaled_dot_product_attention" not in source
    assert "nn.MultiheadAttention" not in source


def test_each_head_reads_its_own_slice_of_the_width():
    torch.manual_seed(0)
    attention = MultiHeadAttention(12, heads=3, dropout=0.0).double()
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    expected = torch.empty(2, 5, 12, dtype=torch.float64)
    for image in range(2):
        for head in range(3):
            rows = slice(4 * head, 4 * head + 4)
            query, key, value = (
                x[image] @ linear.weight[rows].T for linear in (attention.query, attention.key, attention.value)
            )
            expected[image, :, rows] = torch.softmax(query @ key.T / math.sqrt(4), dim=1) @ value
    torch.testing.assert_close(attention(x), expected @ attention.output.weight.T, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS[::2], ids=["pre", "post"])
def test_projections_have_no_bias_unless_asked(kind):
    names = {name for name, _ in make(**kind).named_parameters() if ".attention." in name}
    assert names and all(name.endswith(".weight") for name in names)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.999999])
def test_dropout_drops_its_share_and_keeps_the_mean(p, dtype):
    torch.manual_seed(0)
    x = torch.ones(3, 333, 777, dtype=dtype, requires_grad=True)
    dropout = Dropout(p)
    y = dropout(x)
    y.backward(torch.ones_like(y))
    kept = y != 0
    assert float(kept.float().mean()) == pytest.approx(1 - p, abs=4 * (p * (1 - p) / x.numel()) ** 0.5 + 2**-16)
    torch.testing.assert_close(
        y[kept].mean().float(), torch.tensor(1 / (1 - int(p * 2**16) / 2**16)), rtol=0.005, atol=0
    )
    assert torch.equal(x.grad, y.detach())
    assert not torch.equal(dropout(x), y)
    assert dropout.eval()(x) is x and Dropout(0.0)(x) is x


def test_dropout_draws_each_element_alone():
    """Neighbours share a word of random bits; nothing of one may tell of the other."""
    torch.manual_seed(0)
    kept = (Dropout(0.5)(torch.ones(2**18)) != 0).float().view(-1, 4) - 0.5
    correlation = 4 * (kept.T @ kept) / len(kept)
    torch.testing.assert_close(correlation, torch.eye(4), rtol=0, atol=0.02)


def test_attention_dropout_falls_on_the_weights():
    torch.manual_seed(0)
    attention = MultiHeadAttention(D, heads=4, dropout=0.5)
    x = torch.randn(1, 1, D).expand(1, N, D)  # equal tokens: every mean of the values is that one value
    kept = attention.eval()(x)
    torch.testing.assert_close(kept, kept[:, :1].expand_as(kept))
    dropped = attention.train()(x)  # weights that no longer sum to 1
    assert (dropped - kept).abs().max() > 0.1 * kept.abs().max()


# --- rotary positions ---


@settings(deadline=None, max_examples=25)
@given(side=st.integers(2, 6), quarter=st.integers(1, 4), seed=st.integers(0, 999))
def test_rotary_scores_depend_on_row_and_column_differences_only(side, quarter, seed):
    generator = torch.Generator().manual_seed(seed)
    query, key = torch.randn(2, 1, 4 * quarter, generator=generator, dtype=torch.float64)
    rotary = Rotary(side, 4 * quarter).double()
    n = side * side
    scores = rotary(query.expand(n, -1)) @ rotary(key.expand(n, -1)).T  # (n, n) of one query and one key everywhere
    place = torch.arange(n)
    row, column = place // side, place % side
    seen = {}
    for i in range(n):
        for j in range(n):
            difference = (int(row[i] - row[j]), int(column[i] - column[j]))
            assert scores[i, j] == pytest.approx(seen.setdefault(difference, float(scores[i, j])), abs=1e-5)
    assert seen[0, 0] == pytest.approx(float(query @ key.T), abs=1e-5)
    assert len({round(score, 9) for score in seen.values()}) == (2 * side - 1) ** 2  # and really on both


def test_rotary_is_a_turn_by_half_of_the_pairs_per_axis():
    rotary, x = Rotary(4, 8), torch.randn(3, 16, 8, generator=torch.Generator().manual_seed(0))
    turned = rotary(x)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(turned[:, 0], x[:, 0])  # row 0, column 0
    by_rows, by_columns = [0, 1, 4, 5], [2, 3, 6, 7]
    torch.testing.assert_close(turned[:, 3][:, by_rows], x[:, 3][:, by_rows])  # row 0, column 3
    torch.testing.assert_close(turned[:, 12][:, by_columns], x[:, 12][:, by_columns])  # row 3, column 0
    first = torch.complex(x[:, 6, 0], x[:, 6, 4]) * torch.exp(torch.tensor(1j))  # row 1, column 2; frequency 1
    torch.testing.assert_close(torch.complex(turned[:, 6, 0], turned[:, 6, 4]), first)


def test_rotary_leaves_values_alone():
    torch.manual_seed(0)
    attention = MultiHeadAttention(D, heads=4, dropout=0.0)
    equal = torch.randn(2, 1, D).expand(2, N, D)  # whatever the weights, their mean is the one unturned value
    expected = attention.output(attention.value(equal))
    torch.testing.assert_close(attention(equal, Rotary(4, 8)), expected, rtol=1e-4, atol=1e-6)


# --- the whole model ---


@every_kind
def test_logits_have_one_column_a_code_and_none_for_the_mask_id(kind):
    model = make(**kind)
    assert model.mask_id == K
    assert model.embedding.weight.shape == (K + 1, D)
    assert model(some_tokens(3)).shape == (3, N, K)
    assert model(torch.full((2, N), model.mask_id)).argmax(dim=-1).max() < model.mask_id


@every_kind
def test_every_token_sees_every_token(kind):
    model = make(**kind)
    tokens = some_tokens(1)
    for changed, read in [(N - 1, 0), (0, N - 1)]:
        other = tokens.clone()
        other[0, changed] = (other[0, changed] + 1) % K
        assert (model(other) - model(tokens))[0, read].abs().max() > 1e-3


@every_kind
def test_an_image_alone_equals_the_image_in_a_batch(kind):
    model = make(**kind).double()
    tokens = some_tokens(3)
    logits = model(tokens)
    for image in range(3):
        torch.testing.assert_close(model(tokens[image : image + 1])[0], logits[image], rtol=0, atol=1e-12)
    other = tokens.clone()
    other[1] = (other[1] + 1) % K
    assert torch.equal(model(other)[[0, 2]], logits[[0, 2]])


@every_kind
def test_places_are_told_apart(kind):
    model = make(**kind)
    tokens = some_tokens(1)
    swapped = tokens[:, [1, 0, *range(2, N)]]
    far = N - 1  # without positions, its logits would not notice that two other tokens changed places
    assert tokens[0, 0] != tokens[0, 1]
    assert (model(swapped) - model(tokens))[0, far].abs().max() > 1e-4


@every_kind
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_select_gives_the_same_logits_and_gradients_for_fewer_tokens(kind, share):
    model = make(**kind).double()
    tokens = some_tokens(3)
    select = torch.rand(3, N, generator=torch.Generator().manual_seed(1)) < share
    some, every = model(tokens, select), model(tokens)[select]
    assert some.shape == (int(select.sum()), K)
    torch.testing.assert_close(some, every, rtol=0, atol=1e-12)
    parameters = list(model.parameters())
    for mine, expected in zip(
        torch.autograd.grad(some.square().sum(), parameters),
        torch.autograd.grad(every.square().sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-12)


def test_tied_head_is_the_embedding_without_the_mask_row():
    tied, free = make(tied=True), make(tied=False)
    count = [sum(parameter.numel() for parameter in model.parameters()) for model in (tied, free)]
    assert count[1] - count[0] == K * D
    assert tied.output_codes.data_ptr() == tied.embedding.weight.data_ptr()
    assert free.output_codes.data_ptr() != free.embedding.weight.data_ptr()
    tokens = torch.full((1, N), 0)  # neither code 5 nor the mask id is read
    before = tied(tokens)
    with torch.no_grad():
        tied.embedding.weight[K] += 1
        assert torch.equal(tied(tokens), before)
        tied.embedding.weight[5] += 1
    changed = (tied(tokens) != before).any(dim=(0, 1))
    assert changed.nonzero().flatten().tolist() == [5]


def test_position_bias_is_added_to_one_place_and_code():
    model = make(position_bias=True)
    tokens = some_tokens(2)
    before = model(tokens)
    with torch.no_grad():
        model.bias[3, 7] += 2
    difference = model(tokens) - before
    expected = torch.zeros(2, N, K)
    expected[:, 3, 7] = 2
    torch.testing.assert_close(difference, expected, rtol=0, atol=1e-5)
    assert make(position_bias=False).bias.shape == (K,)


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_block_normalises_before_its_sublayers_or_after_the_sums(norm):
    torch.manual_seed(0)
    block = Block(TransformerConfig(**TINY | dict(norm=norm)))
    x = 3 * torch.randn(2, N, D)
    if norm == "pre":
        middle = x + block.attention(block.attention_norm(x))
        expected = middle + block.mlp(block.mlp_norm(middle))
    else:
        middle = block.attention_norm(x + block.attention(x))
        expected = block.mlp_norm(middle + block.mlp(middle))
        torch.testing.assert_close(block(x).std(dim=-1, correction=0), torch.ones(2, N), rtol=0, atol=1e-3)
    torch.testing.assert_close(block(x), expected)


@pytest.mark.parametrize("norm, at_input", [("pre", False), ("post", True)])
def test_layer_norm_outside_the_blocks_is_at_the_other_end(norm, at_input):
    model = make(norm=norm)
    assert isinstance(model.input_norm, nn.LayerNorm) == at_input
    assert isinstance(model.output_norm, nn.LayerNorm) != at_input


@pytest.mark.parametrize("option", ["dropout", "attention_dropout"])
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_dropout_acts_in_training_and_never_in_eval(option, norm):
    model, plain = make(**{option: 0.5}, norm=norm), make(norm=norm)
    tokens = some_tokens(2)
    assert torch.equal(model(tokens), plain(tokens))
    model.train()
    assert not torch.equal(model(tokens), model(tokens))
    assert torch.equal(plain.train()(tokens), plain.eval()(tokens))


@pytest.mark.parametrize("place", ["embedding", "attention", "mlp"])
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_dropout_falls_on_the_embedding_and_on_what_each_sublayer_adds(place, norm):
    model, tokens = make(norm=norm, depth=1).train(), some_tokens(2)
    (block,) = model.blocks
    silenced = block.attention.output if place == "mlp" else block.mlp[-1]
    with torch.no_grad():
        for parameter in silenced.parameters():
            parameter.zero_()  # dropping parts of zero changes nothing: only `place` is left to differ
    assert torch.equal(model(tokens), model(tokens))
    (model if place == "embedding" else block).dropout.p = 0.5
    assert not torch.equal(model(tokens), model(tokens))


@pytest.mark.parametrize("kind", KINDS[1:3], ids=["pre-rotary", "post-learned"])
def test_learns_to_fill_hidden_tokens_from_the_visible_ones(kind):
    """Every image repeats one code; half of it is hidden: the code can be had from the other half only."""
    model = make(scale=1.0, **kind).train()
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(100):
        codes = torch.randint(0, K, (16, 1), generator=generator).expand(16, N)
        hidden = torch.rand(16, N, generator=generator) < 0.5
        loss = F.cross_entropy(model(codes.masked_fill(hidden, model.mask_id), hidden), codes[hidden])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < math.log(K) / 4  # a quarter of what guessing costs


@every_kind
def test_all_parameters_have_a_gradient(kind):
    model = make(**kind)
    model(some_tokens()).square().sum().backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]


@every_kind
def test_bfloat16_autocast_is_finite_and_near_float32(kind):
    model = make(scale=2.0, **kind)
    tokens = some_tokens()
    exact = model(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(tokens)
    assert rough.dtype == torch.float32 and rough.isfinite().all()
    assert not torch.equal(rough, exact)
    assert (rough - exact).abs().max() < 0.03 * exact.std()


@pytest.mark.parametrize("kind", KINDS[1:3], ids=["pre-rotary", "post-learned"])
def test_compiles_as_one_graph(kind):
    model = make(**kind)
    tokens = some_tokens()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(tokens), model(tokens))


# --- initial weights ---


def test_initial_weights_are_truncated_normal_and_biases_zero():
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(**TINY | dict(width=64, position_bias=True, norm="post", codes=100)))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif parameter.ndim == 1:
            assert (parameter == 1).all(), name
        else:
            assert parameter.abs().max() <= 2 * INIT_SD, name
            assert parameter.std().item() == pytest.approx(0.88 * INIT_SD, rel=0.08), name  # truncated at two sd


def test_pre_norm_scales_what_the_blocks_add_by_the_root_of_their_number():
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(**TINY | dict(width=64, depth=8)))
    for block in model.blocks:
        for last in (block.attention.output, block.mlp[-1]):
            assert last.weight.std().item() == pytest.approx(0.88 * INIT_SD / 4, rel=0.08)
        assert block.mlp[0].weight.std().item() == pytest.approx(0.88 * INIT_SD, rel=0.08)


def angles(vectors: torch.Tensor) -> torch.Tensor:
    return F.normalize(vectors, dim=1) @ F.normalize(vectors, dim=1).T


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("e, tolerance", [(8, 1e-5), (D, 1e-5), (256, 0.6)])
def test_init_from_codes_keeps_the_angles_between_codes(tied, e, tolerance):
    codes = 7 * torch.randn(K, e, generator=torch.Generator().manual_seed(1))
    model = make(tied=tied)
    mask_row = model.embedding.weight[K].clone()
    model.init_from_codes(codes, torch.Generator().manual_seed(0))
    start = model.embedding.weight[:K]
    assert (angles(start) - angles(codes)).abs().max() < tolerance
    assert start.square().mean().sqrt().item() == pytest.approx(INIT_SD)
    assert torch.equal(model.output_codes, start)
    assert torch.equal(model.embedding.weight[K], mask_row)
    again, other = make(tied=tied), make(tied=tied)
    again.init_from_codes(codes, torch.Generator().manual_seed(0))
    other.init_from_codes(codes, torch.Generator().manual_seed(5))
    assert torch.equal(again.output_codes, model.output_codes)
    assert not torch.equal(other.output_codes, model.output_codes)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    "codes, message",
    [
        (torch.ones(K + 1, 8), r"expected shape \(12, e\), found \(13, 8\)"),
        (torch.ones(K), r"expected shape \(12, e\), found \(12,\)"),
        (torch.zeros(K, 8), "not all zero"),
        (torch.full((K, 8), math.nan), "found root mean square nan"),
    ],
)
def test_init_from_codes_refuses_what_is_no_codebook(codes, message):
    with pytest.raises(ValueError, match=message):
        make().init_from_codes(codes, torch.Generator())


# --- settings and wrong input ---


def test_the_labs_transformer_has_72_7_million_parameters():
    with torch.device("meta"):
        model = Transformer(TransformerConfig(**LAB))
    assert sum(parameter.numel() for parameter in model.parameters()) == 72_699_136
    assert model.config.codes == 1024 and model.config.tokens == 256


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(width=30), r"width 30: expected a multiple of heads \(4\)"),
        (dict(width=24, positions="rotary"), "multiple of 4, found 24 / 4 = 6"),
        (dict(tokens=15), "tokens 15: expected a square number"),
        (dict(norm="middle"), "'pre' or 'post'"),
        (dict(positions="sine"), "'learned' or 'rotary'"),
        (dict(dropout=1.0), "less than 1"),
        (dict(attention_dropout=-0.1), "greater than or equal to 0"),
        (dict(depth=0), "greater than or equal to 1"),
        (dict(codes="1024"), "valid integer"),
        (dict(tied=1), "valid boolean"),
        (dict(layers=2), "layers"),
    ],
)
def test_wrong_settings_are_refused(wrong, message):
    with pytest.raises(ValidationError, match=message):
        TransformerConfig(**TINY | wrong)


def test_every_setting_is_described_and_sizes_must_be_given():
    fields = TransformerConfig.model_fields
    assert all(field.description for field in fields.values())
    assert {name for name, field in fields.items() if not field.is_required()} == {"codes", "tokens", "attention_bias"}


@pytest.mark.parametrize("shape", [(2, N + 1), (N,), (2, 4, 4)])
def test_tokens_of_the_wrong_shape_are_refused(shape):
    with pytest.raises(ValueError) as error:
        make()(torch.zeros(shape, dtype=torch.long))
    assert f"(b, {N})" in str(error.value) and str(tuple(shape)) in str(error.value)


@pytest.mark.parametrize("select", [torch.ones(2, N - 1, dtype=torch.bool), torch.ones(2, N, dtype=torch.long)])
def test_select_that_does_not_fit_the_tokens_is_refused(select):
    with pytest.raises(ValueError, match=r"select: expected bool of shape \(2, 16\), found"):
        make()(some_tokens(2), select)


@pytest.mark.parametrize("identity", [-1, K + 1])
def test_ids_out_of_range_are_refused(identity):
    with pytest.raises(IndexError):
        make()(torch.full((1, N), identity))


# --- weights files ---


@every_kind
def test_weights_file_gives_the_same_frozen_transformer(kind, tmp_path):
    model, tokens = make(**kind).train(), some_tokens()
    save_weights(tmp_path / "t.safetensors", model, model.config)
    loaded = Transformer.load(tmp_path / "t.safetensors")
    assert loaded.config == model.config
    assert not loaded.training and not any(parameter.requires_grad for parameter in loaded.parameters())
    exact = model.eval()(tokens)
    assert (loaded(tokens) - exact).abs().max() < 0.01 * exact.std()


def test_weights_file_fits_a_config_file_or_is_refused(tmp_path):
    path, config = tmp_path / "t.safetensors", tmp_path / "c.yml"
    model = make()
    save_weights(path, model, model.config, dtype=torch.float32)
    lines = [f"  {name}: {str(value).lower()}\n" for name, value in TINY.items()]
    config.write_text("transformer:\n" + "".join(lines))
    tokens = some_tokens()
    assert torch.equal(Transformer.load(path, config)(tokens), model(tokens))
    with pytest.raises(ValueError, match=r"t\.safetensors: does not fit this Transformer"):
        Transformer.load(path, TransformerConfig(**TINY | dict(depth=3)))


def test_weights_of_another_kind_are_refused(tmp_path):
    path = tmp_path / "v.safetensors"
    save_weights(path, nn.Linear(2, 2), TransformerConfig(**TINY))
    with pytest.raises(ValueError, match=r"v\.safetensors: expected the weights of a Transformer, found Linear"):
        Transformer.load(path)
