"""Tests of decoding: no network is needed, stub predictors stand in for a transformer."""

import math
from itertools import pairwise

import numpy as np
import pydantic
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maskgit import decoding
from maskgit.decoding import State, decode_step, fill, sample
from maskgit.decoding_config import CODES, DecodingConfig
from maskgit.iterations import depth, iterations, steps_of_second_look
from maskgit.masks import SCHEDULES, make_holes, schedule, to_hidden
from maskgit.orders import halton_turns

K = 12  # codes; the mask id is K
CODEBOOK = torch.randn(K, 5, generator=torch.Generator().manual_seed(9))
SAMPLERS = ("maskgit", "lab", "growing", "random", "halton")


def uniform_logits(tokens):
    return torch.zeros(*tokens.shape, K)


def peaked_logits(tokens, seed=0, scale=3.0):
    """Logits (b, n, K) that differ from position to position, the same for every image and step."""
    table = torch.randn(tokens.shape[1], K, generator=torch.Generator().manual_seed(seed)) * scale
    return table.expand(len(tokens), -1, -1)


def context_logits(tokens):
    """Logits that depend on the image's own tokens, as a transformer's do."""
    position = torch.arange(tokens.shape[1])[:, None] + 1
    code = torch.arange(K) + 1
    return 2 * torch.sin(position * code + (tokens + 1).sum(dim=1)[:, None, None] * 0.7)


def problem(b=3, n=16, ratio=0.6, seed=0):
    """tokens (b, n), hidden (b, n), with a different number of hidden tokens in every image."""
    rng = torch.Generator().manual_seed(seed)
    tokens = torch.randint(K, (b, n), generator=rng)
    counts = (torch.rand(b, generator=rng) * 0.5 + ratio - 0.2).clamp(0, 1).mul(n).long()
    return tokens, torch.rand(b, n, generator=rng).argsort(dim=1) < counts[:, None]


def of_hidden(logits):
    """A predictor for `sample` from a function tokens (b, n) -> logits (b, n, k)."""
    return lambda tokens: logits(tokens)[tokens == K]


def states(predict=peaked_logits, tokens=None, hidden=None, config=None, seeds=None, **problem_options):
    if tokens is None:
        tokens, hidden = problem(**problem_options)
    config, seeds = config or DecodingConfig(), seeds or range(len(tokens))
    return list(sample(of_hidden(predict), tokens, hidden, K, config, seeds, CODEBOOK))


def rounded_down(exact):
    """floor, but of 9.999999999999998 it is 10."""
    return round(exact) if math.isclose(exact, round(exact), abs_tol=1e-9) else math.floor(exact)


def hidden_counts(count, config, left=None, first=1):
    """The rule in plain Python: how many tokens stay hidden after each step from `first` on, until none does."""
    counts, left = [], count if left is None else left
    stop = config.stop
    for t in range(first, stop + 1):
        target = rounded_down(schedule(config.mask_func)(t / config.total_iter) * count)
        left = 0 if t == stop else max(0, min(target, left - 1))
        counts.append(left)
    return counts


# --- how many tokens are decided, and which ---------------------------------------------------------------------------


@st.composite
def decodings(draw):
    total_iter = draw(st.integers(1, 14))
    config = DecodingConfig(
        total_iter=total_iter,
        sweet_spot=draw(st.integers(1, total_iter)),
        mask_func=draw(st.sampled_from(sorted(SCHEDULES))),
        sampler=draw(st.sampled_from(SAMPLERS)),
        temperature=draw(st.sampled_from([0.0, 1.0, 4.5])),
        sampling_temperature=draw(st.sampled_from([0.0, 0.5, 1.0])),
        top_k=draw(st.sampled_from([0, 1, 3, K + 5])),
        codes=draw(st.sampled_from(CODES)),
        forget=draw(st.booleans()),
        second_look=draw(st.sampled_from([0.0, 0.0, 0.3, 0.5, 0.99])),
    )
    b = draw(st.integers(1, 4))
    n = draw(st.sampled_from([1, 4, 9, 25]) if config.sampler == "halton" else st.integers(1, 30))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    hidden = torch.from_numpy(rng.random((b, n)) < rng.random((b, 1)) * 1.2)  # from no hole to all hole
    return config, torch.from_numpy(rng.integers(0, K, (b, n))), hidden


@settings(max_examples=120, deadline=None)
@given(decodings(), st.sampled_from([uniform_logits, peaked_logits, context_logits]), st.integers(0, 2**70))
def test_any_decoding_keeps_every_rule(decoding_, predict, seed):
    config, tokens, hidden = decoding_
    original, hole = tokens.clone(), hidden.clone()
    everything = states(predict, tokens, hidden, config, [seed + i for i in range(len(tokens))])
    assert [state.step for state in everything] == list(range(1, len(everything) + 1))
    done = next(index for index, state in enumerate(everything, start=1) if not state.hidden.any())
    result, again = everything[:done], everything[done:]

    assert torch.equal(tokens, original) and torch.equal(hidden, hole)  # the input is not modified
    counts = torch.tensor([hidden_counts(count, config) for count in hole.sum(dim=1).tolist()])
    keeps_every_rule(State(0, tokens.masked_fill(hole, K), hole, torch.ones(tokens.shape)), result, counts)
    assert again == [] or config.second_look
    if config.second_look:
        count, first = (
            hole.sum(dim=1).tolist(),
            int(steps_of_second_look(torch.tensor([config.total_iter]), config)),
        )
        back = [rounded_down(config.second_look * number) for number in count]
        start = decoding.look_again(result[-1], hole, K, config)
        assert start.hidden.sum(dim=1).tolist() == back and not (start.hidden & ~hole).any()
        counts = [hidden_counts(*both, first) for both in zip(count, [config] * len(count), back, strict=True)]
        keeps_every_rule(start, again, torch.tensor(counts))
    final = everything[-1]
    assert not final.hidden.any() and all(state.hidden.any() for state in [*result[:-1], *again[:-1]])
    assert final.tokens.min() >= 0 and final.tokens.max() < K
    assert torch.equal(final.tokens[~hole], original[~hole]) and (final.confidence[~hole] == 1).all()
    assert (final.codes is not None) == config.blends
    if config.blends:
        assert torch.equal(final.codes[~hole], CODEBOOK[original[~hole]]) and final.codes.isfinite().all()


def keeps_every_rule(before, result, counts):
    """`result` goes on from the State `before`, whose counts (b, steps) are those after each of its steps."""
    for state, count in zip(result, counts.T, strict=False):
        assert torch.equal(state.hidden.sum(dim=1), count)  # per image, even with tied confidences
        assert not (state.hidden & ~before.hidden).any()  # never hidden again
        assert torch.equal(state.tokens == K, state.hidden)
        assert torch.equal(state.tokens[~before.hidden], before.tokens[~before.hidden])  # known and decided are frozen
        assert torch.equal(state.confidence[~before.hidden], before.confidence[~before.hidden])
        assert ((state.confidence >= 0) & (state.confidence <= 1)).all()
        assert state.tokens.dtype == torch.long and state.confidence.dtype == torch.float32
        before = state


def test_counts_are_of_each_image_and_not_of_image_0():
    hidden = torch.arange(40) < torch.tensor([40, 1, 0, 20])[:, None]
    config = DecodingConfig(total_iter=4, sweet_spot=4, mask_func="linear")
    result = states(uniform_logits, torch.zeros(4, 40, dtype=torch.long), hidden, config)
    assert [state.hidden.sum(dim=1).tolist() for state in result] == [
        [30, 0, 0, 15],
        [20, 0, 0, 10],
        [10, 0, 0, 5],
        [0, 0, 0, 0],
    ]


def test_linear_counts_of_100_tokens_in_10_steps_are_round_despite_binary_fractions():
    config = DecodingConfig(mask_func="linear")
    result = states(uniform_logits, torch.zeros(1, 100, dtype=torch.long), torch.ones(1, 100, dtype=torch.bool), config)
    assert [state.hidden.sum().item() for state in result] == [90, 80, 70, 60, 50, 40, 30, 20, 10, 0]


@pytest.mark.parametrize("sweet_spot", [1, 3, 9])
def test_stopping_early_fills_everything_left_in_that_step(sweet_spot):
    result = states(config=DecodingConfig(sweet_spot=sweet_spot), n=64)
    assert len(result) == sweet_spot
    assert not result[-1].hidden.any() and (result[-1].tokens < K).all()
    assert sweet_spot == 1 or result[-2].hidden.sum() > sweet_spot  # several at once, in the last step


def test_more_iterations_than_tokens_decide_one_per_step_and_stop_early():
    calls = []

    def predict(tokens):
        calls.append((tokens == K).sum().item())
        return uniform_logits(tokens)

    hidden = torch.arange(9)[None] < 5
    config = DecodingConfig(total_iter=100, sweet_spot=100)
    result = states(predict, torch.zeros(1, 9, dtype=torch.long), hidden, config)
    assert calls == [5, 4, 3, 2, 1] and len(result) == 5


def test_known_tokens_are_not_resampled_even_when_the_logits_deny_them():
    tokens = torch.full((2, 20), 3)
    hidden = torch.zeros(2, 20, dtype=torch.bool)
    hidden[:, ::4] = True

    def predict(tokens):
        return torch.zeros(*tokens.shape, K).index_fill(2, torch.tensor([3]), -math.inf)

    for state in states(predict, tokens, hidden):
        assert (state.tokens[~hidden] == 3).all()
    assert (state.tokens[hidden] != 3).all()


def test_the_confident_tokens_are_kept_and_the_others_stay_hidden():
    n = 16
    strength = torch.rand(2, n, generator=torch.Generator().manual_seed(1)) * 8
    config = DecodingConfig(total_iter=n, sweet_spot=n, mask_func="linear", temperature=0.0, sampling_temperature=0.0)

    def predict(tokens):
        return torch.nn.functional.one_hot(torch.full_like(tokens, 5), K) * strength[..., None]

    hidden = torch.ones(2, n, dtype=torch.bool)
    order, before = [], hidden
    for state in states(predict, torch.zeros(2, n, dtype=torch.long), hidden, config):
        order.append((before & ~state.hidden).long().argmax(dim=1))
        before = state.hidden
    assert torch.equal(torch.stack(order, dim=1), strength.argsort(dim=1, descending=True))


@pytest.mark.parametrize("sampler", ["maskgit", "lab"])
def test_without_noise_each_step_decides_the_most_probable_proposals(sampler):
    tokens, hidden = problem(b=4, n=50)
    before = hidden
    for state in states(context_logits, tokens, hidden, DecodingConfig(sampler=sampler, temperature=0.0)):
        for i in range(4):
            decided, left = before[i] & ~state.hidden[i], state.hidden[i]
            if left.any():
                assert state.confidence[i][decided].min() >= state.confidence[i][left].max()
        before = state.hidden


def test_every_token_has_its_own_gumbel():
    tokens, hidden = torch.zeros(400, 16).long(), torch.ones(400, 16, dtype=torch.bool)
    first = states(uniform_logits, tokens, hidden)[0]  # 400 seeds, equal confidences, one of 16 tokens decided
    share = (~first.hidden).float().mean(dim=0)  # (n), with one Gumbel for all: 1 for one token and 0 for the others
    assert (share - 1 / 16).abs().max() < 0.06  # sd .012


# --- what the predictor sees and may answer ---------------------------------------------------------------------------


def test_predict_sees_the_mask_id_where_hidden_and_never_the_tokens_underneath():
    tokens, hidden = problem()
    garbage = tokens.masked_fill(hidden, -7)
    seen = []

    def predict(tokens):
        seen.append(tokens.clone())
        return context_logits(tokens)

    first = states(predict, tokens, hidden)
    assert torch.equal(seen[0], tokens.masked_fill(hidden, K))
    for state, given_ in zip(first, seen[1:], strict=False):
        assert torch.equal(state.tokens[state.hidden.any(dim=1)], given_)  # what was decided is read back
    second = states(predict, garbage, hidden)
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(first, second, strict=True))


def test_images_without_hidden_tokens_pass_through():
    tokens, hidden = problem()
    hidden[1] = False
    result = states(tokens=tokens, hidden=hidden)
    assert all(torch.equal(state.tokens[1], tokens[1]) for state in result)


def test_images_that_are_complete_leave_the_batch():
    hidden = torch.arange(16) < torch.tensor([0, 2, 16])[:, None]
    sizes = []

    def predict(tokens):
        sizes.append(len(tokens))
        return context_logits(tokens)

    result = states(predict, torch.zeros(3, 16).long(), hidden, DecodingConfig(total_iter=8, sweet_spot=8))
    assert sizes == [2, 2, 1, 1, 1, 1, 1, 1] and not result[-1].hidden.any()


def test_without_any_hidden_token_there_is_one_state_and_no_prediction():
    tokens, hidden = torch.tensor([[1, 2]]), torch.zeros(1, 2, dtype=torch.bool)
    result = states(lambda tokens: pytest.fail("predict was called"), tokens, hidden)
    assert [state.step for state in result] == [1]
    assert torch.equal(result[0].tokens, tokens) and torch.equal(result[0].confidence, torch.ones(1, 2))
    none = torch.zeros(0, 4)
    assert fill(of_hidden(uniform_logits), none.long(), none.bool(), K, DecodingConfig(), []).tokens.shape == (0, 4)


def test_fill_gives_the_last_tokens_and_no_gradients():
    weight = torch.ones((), requires_grad=True)
    tokens, hidden = problem()
    result = states(lambda tokens: context_logits(tokens) * weight, tokens, hidden)
    filled = fill(of_hidden(context_logits), tokens, hidden, K, DecodingConfig(), range(3))
    assert torch.equal(filled.tokens, result[-1].tokens)
    assert not result[-1].confidence.requires_grad


def test_bfloat16_logits_are_decoded_as_their_float32_values():
    result = states(lambda tokens: context_logits(tokens).bfloat16())
    exact = states(lambda tokens: context_logits(tokens).bfloat16().float())
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(result, exact, strict=True))
    assert result[-1].confidence.dtype == torch.float32


def test_forgetting_predicts_from_the_given_tokens_and_keeps_what_was_decided():
    tokens, hidden = problem(n=36, ratio=0.8)
    seen = []

    def predict(tokens):
        seen.append(tokens.clone())
        return context_logits(tokens)

    config = DecodingConfig(forget=True, second_look=0.3)
    result = states(predict, tokens, hidden, config)
    before = [hidden, *(state.hidden for state in result)]
    before[config.stop] = decoding.look_again(result[config.stop - 1], hidden, K, config).hidden
    for hidden_then, tokens_then in zip(before, seen, strict=False):  # what was in the picture, not what was decided
        assert torch.equal(tokens_then, tokens.masked_fill(hidden_then, K)[hidden_then.any(dim=1)])
    for state, later in pairwise(result[: config.stop]):
        assert torch.equal(later.tokens[~state.hidden], state.tokens[~state.hidden])
    assert len(seen) == len(result) > config.stop
    remembering = states(predict, tokens, hidden, config.changed(forget=False))
    assert not torch.equal(result[-1].tokens, remembering[-1].tokens)


def test_forgetting_needs_tokens_under_the_hole_too():
    with pytest.raises(ValueError, match=r"tokens.*0\.\.11.*-7"):
        states(
            tokens=torch.full((1, 4), -7), hidden=torch.ones(1, 4, dtype=torch.bool), config=DecodingConfig(forget=True)
        )


# --- the second look --------------------------------------------------------------------------------------------------


def test_the_second_look_hides_the_least_sure_of_the_decided_tokens():
    hidden = torch.tensor([[True] * 8 + [False] * 2, [True] * 3 + [False] * 7])
    confidence = torch.tensor([[0.9, 0.1, 0.8, 0.2, 0.7, 0.3, 0.6, 1.0, 1, 1], [0.5, 0.4, 0.6, 1, 1, 1, 1, 1, 1, 1]])
    done = State(9, torch.arange(20).view(2, 10) % K, torch.zeros_like(hidden), confidence)
    again = decoding.look_again(done, hidden, K, DecodingConfig(second_look=0.5))
    assert again.hidden.tolist()[0] == [False, True, False, True, False, True, True, False, False, False]
    assert again.hidden[1].nonzero().flatten().tolist() == [1]  # 1.5 of 3 tokens, rounded down
    assert torch.equal(again.tokens == K, again.hidden) and again.step == 9
    assert torch.equal(again.tokens[~again.hidden], done.tokens[~again.hidden])


@pytest.mark.parametrize(
    ("options", "first"),
    [
        ({"second_look": 0.3}, 9),  # cos(pi / 2 x 8 / 10) = .309, of 9 / 10 .156
        ({"second_look": 0.32}, 8),
        ({"second_look": 0.3, "mask_func": "linear"}, 8),
        ({"second_look": 0.3, "total_iter": 1, "sweet_spot": 1}, 1),
        ({"second_look": 0.3, "sweet_spot": 4}, 4),
        ({"second_look": 0.01}, 10),
    ],
)
def test_the_second_look_goes_on_where_the_schedule_leaves_less_than_its_share(options, first):
    config = DecodingConfig(**options)
    total = torch.tensor([config.total_iter, 1])  # of each image
    assert steps_of_second_look(total, config.changed(sweet_spot=None)).tolist() == [first, 1]


def test_the_second_look_changes_unsure_tokens_alone_and_uses_new_draws():
    tokens, hidden = torch.zeros(4, 64).long(), torch.ones(4, 64, dtype=torch.bool)
    config = DecodingConfig(second_look=0.3)
    once, twice = (states(peaked_logits, tokens, hidden, c) for c in (config.changed(second_look=0.0), config))
    changed = once[-1].tokens != twice[-1].tokens
    back = decoding.look_again(once[-1], hidden, K, config).hidden
    assert len(twice) == len(once) + 2 and not (changed & ~back).any()
    assert changed[back].float().mean() > 0.3
    assert twice[-1].confidence[back].mean() > once[-1].confidence[back].mean()


# --- randomness -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_image_alone_equals_the_image_in_a_batch(sampler):
    tokens, hidden = problem(b=5, n=49)
    hidden[2] = False
    seeds, config = [11, 5, 0, 11, 2**40], DecodingConfig(sampler=sampler, top_k=7, second_look=0.3)
    batch = states(context_logits, tokens, hidden, config, seeds)
    for i in range(5):
        alone = states(context_logits, tokens[i : i + 1], hidden[i : i + 1], config, seeds[i : i + 1])
        for a, b in zip(alone, batch, strict=False):
            assert torch.equal(a.tokens[0], b.tokens[i]) and torch.equal(a.confidence[0], b.confidence[i])
        assert torch.equal(alone[-1].tokens[0], batch[-1].tokens[i])


def test_the_same_seed_repeats_and_another_seed_differs():
    tokens, hidden = torch.zeros(1, 64).long(), torch.ones(1, 64, dtype=torch.bool)
    results = [states(uniform_logits, tokens, hidden, seeds=[seed])[-1].tokens for seed in (1, 1, 2, 1 + 2**32)]
    assert torch.equal(results[0], results[1])
    for other in results[2:]:  # torch's own CPU generator would not tell 1 from 1 + 2**32
        assert (other != results[0]).float().mean() > 0.5


def test_the_global_generators_are_neither_read_nor_moved():
    torch.manual_seed(0)
    first = states()[-1].tokens
    after = torch.get_rng_state()
    torch.manual_seed(0)
    assert torch.equal(torch.get_rng_state(), after)
    torch.manual_seed(1)
    assert torch.equal(states()[-1].tokens, first)


def test_draws_are_uniform_and_differ_between_seeds_steps_codes_and_ranks():
    steps = range(1, 11)
    uniforms = torch.stack([decoding.draws(range(20), [step] * 20, 256) for step in steps])  # (steps, seeds, 2, n)
    assert (uniforms >= 0).all() and (uniforms < 1).all()
    rows = uniforms.reshape(-1, 256)
    correlation = torch.corrcoef(rows) - torch.eye(len(rows))
    assert correlation.abs().max() < 0.4  # 80,000 pairs of 256 values: sd 1/16, six sd
    assert abs(rows.mean() - 0.5) < 0.005 and abs(rows.std() - 12**-0.5) < 0.005
    assert torch.equal(decoding.draws([3, 9], [1, 4], 256)[1], decoding.draws([9], [4], 256)[0])


# --- which code is drawn ----------------------------------------------------------------------------------------------


def drawn_frequencies(logits, config, seed=0, n=40_000):
    uniform = torch.rand(n, generator=torch.Generator().manual_seed(seed))
    codes = decoding.choose_codes(logits.expand(n, -1), uniform, config)
    return codes.bincount(minlength=len(logits)).double()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("top_k", [0, 4])
def test_codes_are_drawn_with_the_tempered_probabilities(temperature, top_k):
    logits = torch.tensor([0.3, -1.0, 2.0, 0.0, 1.1, -math.inf, 0.7, -2.0])
    expected = logits.double() / temperature
    if top_k:
        expected = expected.masked_fill(logits < logits.sort().values[-top_k], -math.inf)
    expected = expected.softmax(dim=0) * 40_000
    counts = drawn_frequencies(logits, DecodingConfig(sampling_temperature=temperature, top_k=top_k))
    possible = expected > 0
    assert counts[~possible].sum() == 0
    chi_square = ((counts - expected)[possible] ** 2 / expected[possible]).sum()
    freedom = possible.sum() - 1
    assert chi_square < freedom + 4 * (2 * freedom) ** 0.5


def test_the_loop_itself_draws_codes_with_their_probabilities():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    tokens, hidden = torch.zeros(40, 200).long(), torch.ones(40, 200, dtype=torch.bool)
    config = DecodingConfig(sampler="random")  # an order that does not prefer probable codes
    filled = fill(lambda tokens: logits.expand(int((tokens == 4).sum()), 4), tokens, hidden, 4, config, range(40))
    frequency = filled.tokens.flatten().bincount(minlength=4) / filled.tokens.numel()
    assert torch.allclose(frequency, logits.softmax(dim=0), atol=0.02)  # sd <= .0054


def test_top_k_keeps_exactly_k_codes_even_with_ties():
    counts = drawn_frequencies(torch.zeros(K), DecodingConfig(top_k=3))
    assert (counts > 0).sum() == 3
    result = states(peaked_logits, config=DecodingConfig(top_k=2, sampling_temperature=5.0), n=60)
    tokens, hidden = problem(n=60)
    allowed = peaked_logits(tokens).topk(2, dim=2).indices
    chosen = (allowed == result[-1].tokens[..., None]).any(dim=2)
    assert chosen[hidden].all()
    assert (result[-1].tokens == allowed[..., 1])[hidden].any()  # and the second of them does occur


@pytest.mark.parametrize("options", [{"sampling_temperature": 0.0}, {"sampling_temperature": 1e-30}, {"top_k": 1}])
def test_temperature_0_and_top_1_take_the_most_probable_code(options):
    tokens, hidden = problem(n=60)
    final = states(peaked_logits, tokens, hidden, DecodingConfig(**options))[-1]
    assert torch.equal(final.tokens[hidden], peaked_logits(tokens).argmax(dim=2)[hidden])


def test_confidence_is_the_probability_at_temperature_1_over_all_codes():
    tokens, hidden = problem(n=60)
    config = DecodingConfig(sampling_temperature=0.3, top_k=3)
    final = states(peaked_logits, tokens, hidden, config)[-1]
    p = peaked_logits(tokens).softmax(dim=2).gather(2, final.tokens[..., None])[..., 0]
    assert torch.allclose(final.confidence[hidden], p[hidden], atol=1e-6)


def test_rounding_never_ends_on_a_code_of_probability_0():
    p = torch.tensor([[0.0, 0.5, 0.5, 0.0, 0.0]])
    cases = [(0.0, 1), (0.499, 1), (0.5, 2), (1 - 2**-24, 2), (1.0, 2)]  # 1.0: past the end, as rounding could make it
    for uniform, code in cases:
        assert decoding._invert(p, torch.tensor([uniform])).item() == code
    many = torch.rand(500, 300, generator=torch.Generator().manual_seed(0)) ** 4
    many[:, 250:] = 0
    assert (decoding._invert(many / many.sum(dim=1, keepdim=True), torch.full((500,), 1 - 2**-24)) < 250).all()


# --- what is decoded --------------------------------------------------------------------------------------------------


def mean_code(logits, temperature=1.0, top_k=0):
    """By hand: the mean of the codes under the tempered probabilities of logits (..., K), in float64."""
    p = (logits.double() / temperature).softmax(dim=-1)
    if top_k:
        p = p * (p >= p.sort(dim=-1).values[..., -top_k, None])
    return (p / p.sum(dim=-1, keepdim=True)) @ CODEBOOK.double()


@pytest.mark.parametrize("options", [{}, {"sampling_temperature": 0.6}, {"sampling_temperature": 0.6, "top_k": 4}])
@pytest.mark.parametrize("codes", ["expected", "mixed"])
def test_expected_codes_are_the_mean_under_the_probabilities_that_codes_are_drawn_with(codes, options):
    tokens, hidden = problem(n=60)
    final = states(tokens=tokens, hidden=hidden, config=DecodingConfig(codes=codes, total_iter=1, **options))[-1]
    wanted = mean_code(peaked_logits(tokens), options.get("sampling_temperature", 1.0), options.get("top_k", 0))
    assert torch.allclose(final.codes[hidden].double(), wanted[hidden], atol=1e-5)
    assert torch.equal(final.codes[~hidden], CODEBOOK[tokens[~hidden]]) and final.decodable is final.codes
    drawn = states(tokens=tokens, hidden=hidden, config=DecodingConfig(total_iter=1, **options))[-1]
    assert torch.equal(final.tokens, drawn.tokens) and drawn.decodable is drawn.tokens


def test_expected_codes_are_float32_inside_a_context_of_bfloat16():
    tokens, hidden = problem(n=60)
    config = DecodingConfig(codes="expected", total_iter=2)
    outside = states(tokens=tokens, hidden=hidden, config=config)[-1].codes
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(states(tokens=tokens, hidden=hidden, config=config)[-1].codes, outside)


def test_expected_codes_are_those_of_the_moment_when_a_token_was_decided():
    tokens, hidden = problem(n=36, ratio=0.8)
    seen = []

    def predict(tokens):
        seen.append(context_logits(tokens))
        return seen[-1]

    soft = states(predict, tokens, hidden, DecodingConfig(codes="expected", total_iter=4))
    before = hidden
    for state, logits in zip(soft, seen, strict=True):
        decided = before & ~state.hidden
        assert torch.allclose(state.codes[decided].double(), mean_code(logits)[decided], atol=1e-5)
        assert torch.equal(soft[-1].codes[decided], state.codes[decided])
        before = state.hidden


def test_mixed_codes_are_means_for_the_tokens_decided_last_alone():
    tokens, hidden = problem(n=36, ratio=0.8)
    *rest, last = states(context_logits, tokens, hidden, DecodingConfig(codes="mixed", total_iter=4))
    early = ~rest[-1].hidden
    assert torch.equal(last.codes[early], CODEBOOK[last.tokens[early]])
    assert torch.allclose(last.codes[~early].double(), mean_code(context_logits(rest[-1].tokens))[~early], atol=1e-5)
    assert hidden.sum() > rest[-1].hidden.sum() > 0


def test_an_image_that_is_done_earlier_has_its_own_last_iteration():
    hidden = torch.arange(16) < torch.tensor([2, 16])[:, None]
    config = DecodingConfig(codes="mixed", total_iter=8)
    both = states(context_logits, torch.zeros(2, 16).long(), hidden, config, [3, 4])
    alone = states(context_logits, torch.zeros(1, 16).long(), hidden[:1], config, [3])
    assert len(alone) == 2 and torch.equal(alone[-1].codes[0], both[-1].codes[0])


def test_codes_argmax_are_the_most_probable_whatever_the_temperature():
    tokens, hidden = problem(n=60)
    final = states(peaked_logits, tokens, hidden, DecodingConfig(codes="argmax", sampling_temperature=2.0))[-1]
    assert torch.equal(final.tokens[hidden], peaked_logits(tokens).argmax(dim=2)[hidden]) and final.codes is None


@pytest.mark.parametrize("codebook", [None, CODEBOOK[1:], CODEBOOK[0]])
def test_means_of_codes_need_the_codebook(codebook):
    tokens, hidden = problem()
    with pytest.raises(ValueError, match=r"codebook: codes expected expects \(12, e\), found"):
        sample(of_hidden(uniform_logits), tokens, hidden, K, DecodingConfig(codes="expected"), range(3), codebook)


# --- as many iterations as the hole needs -----------------------------------------------------------------------------


def test_depth_is_the_mean_distance_to_what_is_known():
    hole = torch.zeros(5, 1, 8, 8, dtype=torch.bool)
    hole[0, 0, 2:5, 2:5] = True  # 8 tokens at distance 1, one at 2
    hole[1, 0, :, :4] = True  # columns at distances 4, 3, 2, 1: beyond the border nothing is known
    hole[2, 0, ::2] = True  # rows between known rows
    hole[3] = True  # nothing is known: as deep as the grid is wide
    depths = depth(to_hidden(hole, 8))
    assert torch.allclose(depths, torch.tensor([10 / 9, 2.5, 1.0, 8.0, 0.0]))
    with pytest.raises(ValueError, match=r"total_iter auto: expected a square grid of tokens, found 12"):
        depth(torch.zeros(1, 12, dtype=torch.bool))


def test_auto_takes_one_iteration_where_known_pixels_are_near_and_more_for_half_a_picture():
    config = DecodingConfig(total_iter="auto")
    hidden = {family: to_hidden(make_holes(family, 8), 16) for family in ("walk", "half")}
    totals = {family: iterations(given, config) for family, given in hidden.items()}
    assert (totals["walk"] == 1).all() and (totals["half"] > 3).all() and (totals["half"] <= 8).all()
    assert iterations(hidden["walk"], DecodingConfig(total_iter=7)).tolist() == [7] * 8


def test_each_image_has_its_own_number_of_iterations_and_is_what_it_is_alone():
    hole = torch.cat([make_holes(family, 1, 64) for family in ("walk", "half", "thick")])
    hidden, tokens = to_hidden(hole, 16), torch.zeros(3, 256).long()
    config = DecodingConfig(total_iter="auto", second_look=0.3, codes="mixed")
    totals = iterations(hidden, config).tolist()
    both = states(context_logits, tokens, hidden, config, [5, 6, 7])
    for i, total in enumerate(totals):
        fixed_config = config.changed(total_iter=total)
        fixed = states(context_logits, tokens[i : i + 1], hidden[i : i + 1], fixed_config, [5 + i])[-1]
        assert torch.equal(fixed.codes[0], both[-1].codes[i]) and torch.equal(fixed.tokens[0], both[-1].tokens[i])
    assert len(set(totals)) > 1


def test_codes_auto_are_means_for_what_takes_one_iteration_and_drawn_else():
    hole = torch.cat([make_holes(family, 1, 64) for family in ("walk", "half", "thick")])
    hidden, tokens = to_hidden(hole, 16), torch.zeros(3, 256).long()
    config = DecodingConfig(total_iter="auto", codes="auto")
    once = iterations(hidden, config) == 1
    assert once.any() and not once.all()
    ends = {kind: states(context_logits, tokens, hidden, config.changed(codes=kind), [5, 6, 7])[-1] for kind in CODES}
    for i in range(3):
        other = ends["expected"].codes[i] if once[i] else ends["auto"].codes[i]
        assert torch.equal(ends["auto"].codes[i], other)
        drawn = ends["auto"].tokens[i] == ends["sampled"].tokens[i]
        assert once[i] or drawn.all()
        assert torch.equal(ends["mixed"].codes[i], ends["auto"].codes[i]) == bool(once[i])


def test_a_sweet_spot_alone_means_ten_iterations():
    auto = DecodingConfig(total_iter="auto")
    assert auto.changed(sweet_spot=10).model_dump() == DecodingConfig(sweet_spot=10).model_dump()
    assert auto.changed(total_iter=4).stop == 4 and auto.stop is None and auto.changed(sweet_spot=3).stop == 3


# --- the order -------------------------------------------------------------------------------------------------------


def test_the_halton_sampler_decides_tokens_in_that_order():
    hidden = torch.rand(2, 64, generator=torch.Generator().manual_seed(0)) < 0.5
    config = DecodingConfig(total_iter=64, sweet_spot=64, mask_func="linear", sampler="halton")
    before = hidden
    turns = halton_turns(64)
    for state in states(peaked_logits, torch.zeros(2, 64).long(), hidden, config):
        for was, now in zip(before, state.hidden, strict=True):
            if now.any():
                assert turns[was & ~now].max() < turns[now].min()
        before = state.hidden


# --- options and errors -----------------------------------------------------------------------------------------------


def test_defaults_are_maskgit_with_ten_cosine_steps():
    assert DecodingConfig().model_dump() == {
        "total_iter": 10,
        "sweet_spot": None,
        "mask_func": "cosine",
        "sampler": "maskgit",
        "temperature": 4.5,
        "sampling_temperature": 1.0,
        "top_k": 0,
        "codes": "sampled",
        "forget": False,
        "second_look": 0.0,
        "token_rule": "any",
        "pre_fill": False,
        "guess": "navier_stokes",
        "rim": 0.0,
        "self_ensemble": False,
    }


@pytest.mark.parametrize(
    "options, changed",
    [
        ({}, {}),
        ({"top_k": None, "sampler": None}, {}),
        ({"total_iter": 3}, {"total_iter": 3, "sweet_spot": None}),
        ({"total_iter": "auto"}, {"total_iter": "auto", "sweet_spot": None}),
        ({"total_iter": 12, "sweet_spot": 2}, {"total_iter": 12, "sweet_spot": 2}),
        ({"sweet_spot": 4, "temperature": 0.0}, {"sweet_spot": 4, "temperature": 0.0}),
    ],
)
def test_changed_options_replace_those_of_the_settings_and_none_leaves_them(options, changed):
    before = DecodingConfig(total_iter=8, sweet_spot=6, top_k=5)
    assert before.changed(**options).model_dump() == before.model_dump() | changed
    with pytest.raises(ValueError, match=r"^sweet_spot = 9 must be at most total_iter = 8$"):
        before.changed(sweet_spot=9)
    with pytest.raises(ValueError, match=r"^total_itr: unknown key, known are: total_iter, [^\n]*$"):
        before.changed(total_itr=4)


@pytest.mark.parametrize(
    ("options", "needed"),
    [
        ({}, True),
        ({"sampling_temperature": 0.0}, True),  # the order is noisy
        ({"sampling_temperature": 0.0, "temperature": 0.0}, False),
        ({"sampling_temperature": 0.0, "temperature": 0.0, "sampler": "random"}, True),
        ({"sampling_temperature": 0.0, "sampler": "halton"}, False),
        ({"sampler": "halton"}, True),
        ({"top_k": 1, "temperature": 0.0}, False),
        ({"total_iter": 1, "sweet_spot": 1, "sampling_temperature": 0.0}, False),
        ({"total_iter": 1, "sweet_spot": 1}, True),
        ({"codes": "argmax"}, True),
        ({"codes": "argmax", "temperature": 0.0}, False),
        ({"codes": "expected"}, True),
        ({"codes": "mixed", "temperature": 0.0}, True),
        ({"codes": "expected", "total_iter": 1}, False),
        ({"codes": "mixed", "total_iter": 1}, False),
        ({"codes": "mixed", "total_iter": 4, "sweet_spot": 1}, False),
        ({"codes": "mixed", "total_iter": 4, "sweet_spot": 1, "second_look": 0.3}, True),
        ({"total_iter": "auto", "sampling_temperature": 0.0}, True),
        ({"total_iter": "auto", "sampling_temperature": 0.0, "temperature": 0.0}, False),
    ],
)
def test_needs_seed_says_whether_two_seeds_may_differ(options, needed):
    config = DecodingConfig(**options)
    tokens, hidden = torch.zeros(2, 64).long(), torch.ones(2, 64, dtype=torch.bool)
    results = [states(context_logits, tokens, hidden, config, [seed, seed + 1])[-1].decodable for seed in (0, 8)]
    assert config.needs_seed is needed and torch.equal(*results) is not needed


@pytest.mark.parametrize(
    "options, message",
    [
        ({"total_iter": 0}, "total_iter"),
        ({"total_iter": "many"}, "total_iter"),
        ({"total_iter": "auto", "sweet_spot": 3}, "sweet_spot = 3 needs a number for total_iter"),
        ({"codes": "mean"}, "sampled.*argmax.*expected.*mixed"),
        ({"sweet_spot": 0}, "sweet_spot"),
        ({"total_iter": 8, "sweet_spot": 9}, "sweet_spot = 9 must be at most total_iter = 8"),
        ({"mask_func": "cosin"}, "cosin.*cosine.*linear.*square"),
        ({"sampler": "hilton"}, "maskgit.*lab.*growing.*random.*halton"),
        ({"temperature": -1.0}, "temperature"),
        ({"sampling_temperature": -0.1}, "sampling_temperature"),
        ({"top_k": -1}, "top_k"),
        ({"total_iter": 2.5}, "total_iter"),
        ({"second_look": 1.0}, "second_look"),
        ({"second_look": -0.1}, "second_look"),
        ({"iterations": 3}, "iterations"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(pydantic.ValidationError, match=f"(?s){message}"):
        DecodingConfig(**options)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"tokens": torch.zeros(2, 4)}, r"tokens.*int64.*float32"),
        ({"tokens": torch.zeros(8).long()}, r"tokens.*\(8,\)"),
        ({"hidden": torch.zeros(2, 4)}, r"hidden.*bool.*float32"),
        ({"hidden": torch.zeros(2, 5).bool()}, r"hidden.*\(2, 4\).*\(2, 5\)"),
        ({"hidden": torch.zeros(2, 4).bool().to("meta")}, r"hidden.*cpu.*meta"),
        ({"seeds": [1]}, r"seeds.*2 images.*found 1"),
        ({"seeds": [1, 2.5]}, r"seeds.*integers.*2\.5"),
        ({"seeds": [1, -3]}, r"seeds.*>= 0.*-3"),
        ({"tokens": torch.full((2, 4), K)}, r"tokens.*0\.\.11.*12"),
    ],
)
def test_inputs_that_do_not_fit_are_refused_at_once(change, message):
    inputs = {
        "tokens": torch.zeros(2, 4).long(),
        "hidden": torch.tensor([[True, False, False, False]] * 2),
        "seeds": [1, 2],
    }
    with pytest.raises(ValueError, match=message):
        sample(uniform_logits, mask_id=K, config=DecodingConfig(), **inputs | change)


@pytest.mark.parametrize(
    "predict, message",
    [
        (lambda m: torch.zeros(m, K + 1), r"k <= mask_id = 12.*13"),  # could emit the mask id
        (lambda m: torch.zeros(m), r"\(30, k\).*\(30,\)"),
        (lambda m: torch.zeros(3, 16, K), r"\(30, k\).*\(3, 16, 12\)"),
        (lambda m: torch.zeros(m - 1, K), r"\(30, k\).*29 rows"),
        (lambda m: [torch.zeros(m - 1, K), torch.zeros(2, K)], r"\(30, k\).*\(2, 12\)"),
        (lambda m: [], r"\(30, k\).*0 rows"),
        (lambda m: torch.zeros(m, K, dtype=torch.long), r"floating-point.*int64"),
        (lambda m: torch.full((m, K), math.nan), r"step 1.*NaN"),
        (lambda m: torch.full((m, K), -math.inf), r"step 1.*-inf"),
    ],
)
def test_logits_that_do_not_fit_are_refused(predict, message):
    tokens, hidden = problem()
    with pytest.raises(ValueError, match=message):
        list(sample(lambda tokens: predict(int(hidden.sum())), tokens, hidden, K, DecodingConfig(), range(3)))


def test_the_decode_step_is_pure():
    tokens, hidden = problem()
    start = State(0, tokens.masked_fill(hidden, K), hidden, torch.ones(tokens.shape))
    logits, uniforms = context_logits(tokens)[hidden], decoding.draws(range(3), [1] * 3, 16)
    copies = [tensor.clone() for tensor in (start.tokens, hidden, start.confidence, logits, uniforms)]
    left = torch.tensor([2, 1, 0])
    r = torch.full((3,), 0.1)
    results = [decode_step(start, [logits], left, uniforms, r, DecodingConfig()) for _ in range(2)]
    assert torch.equal(results[0].tokens, results[1].tokens) and results[0].step == 1
    assert torch.equal(results[0].hidden.sum(dim=1), left)
    for tensor, copy in zip((start.tokens, hidden, start.confidence, logits, uniforms), copies, strict=True):
        assert torch.equal(tensor, copy)


@pytest.mark.parametrize(
    ("column", "refused"),
    [
        ([torch.inf, 0, 0], True),
        ([0, torch.nan, 0], True),
        ([-torch.inf] * 3, True),
        ([-torch.inf, 0, -torch.inf], False),
    ],
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_without_a_softmax_are_refused_whatever_code_is_drawn(column, refused, temperature):
    tokens, hidden = torch.zeros(1, 4, dtype=torch.long), torch.ones(1, 4, dtype=torch.bool)
    logits = torch.zeros(4, 3)
    logits[2] = torch.tensor(column, dtype=torch.float32)
    config = DecodingConfig(total_iter=1, sweet_spot=1, sampling_temperature=temperature)
    for seed in range(5):
        states = decoding.sample(lambda _: logits, tokens, hidden, 3, config, [seed])
        if refused:
            with pytest.raises(ValueError, match="step 1: logits of a hidden token hold NaN or"):
                list(states)
        else:
            assert list(states)[-1].tokens[0, 2] == 1
