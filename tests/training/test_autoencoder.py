"""autoencoder.py: losses, GAN, accumulation and validation of stage 1."""

import math
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from training_runs import IMAGES, TRAIN, VAL, events, step, train

from config import load_config
from evaluation.metrics import psnr
from maskgit.classical import paint
from maskgit.data import to_float
from maskgit.dataset import Maps
from maskgit.decoding import fill
from maskgit.masks import make_holes, to_hidden
from models.checkpoint import read_weights, save_weights
from models.transformer import Transformer
from models.vqgan import NEAR, VQGAN
from training import autoencoder
from training.autoencoder import MicroBatch, VQGANTrainer, random_crops
from training.stepping import apply_gradients
from utils import autocast


def stage1(config_file, train=TRAIN, val=VAL, **overrides) -> VQGANTrainer:
    """A VQGANTrainer of the tiny config; `gan__weight=0` would read vqgan_training.gan.weight."""
    keys = {"vqgan_training." + key.replace("__", "."): value for key, value in overrides.items()}
    torch.manual_seed(0)
    return VQGANTrainer(load_config(config_file, keys), torch.device("cpu"), Maps.of(train), val)


def test_stage_1_learns_a_few_pictures_by_heart(tiny_config_once):
    stage = stage1(tiny_config_once, TRAIN[:4], TRAIN[:4], learning_rate=5e-3, adversarial__weight=0.0)
    stage.flip = False
    losses = [float(step(stage, number, 4)["l1"]) for number in range(100)]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


def test_the_gan_starts_at_its_epoch_and_trains_its_discriminator(tiny_config_once):
    stage = stage1(tiny_config_once, adversarial__start=1.5)
    before = [parameter.clone() for parameter in stage.discriminator.parameters()]
    keys, moved = [], []
    for number in range(4):
        keys.append(set(step(stage, number, 4)))
        moved.append(any(not torch.equal(*pair) for pair in zip(before, stage.discriminator.parameters(), strict=True)))
    assert stage.gan_start == 3 and moved == [False, False, False, True]
    assert [bool(found & {"gan", "discriminator"}) for found in keys] == [False, False, False, True]


def test_the_discriminator_learns_from_its_own_loss_only(tiny_config_once, monkeypatch):
    """The generator's pass leaves gradients in the discriminator, which must not add up with its own."""
    stage, seen = stage1(tiny_config_once, adversarial__start=0.0), []

    def spy(loss, optimizer, parameters, clip):
        parameters = list(parameters)
        seen.append([parameter.grad.clone() for parameter in parameters])
        apply_gradients(loss, optimizer, parameters, clip)

    monkeypatch.setattr(autoencoder, "apply_gradients", spy)
    stage.flip = False
    images = to_float(TRAIN[:4])
    output = stage.model.eval()(images)[0].detach()
    stage.model.codebook.eval()
    loss = autoencoder.discriminator_loss(*stage.discriminator(torch.cat((images, output))).chunk(2))
    expected = torch.autograd.grad(loss, list(stage.discriminator.parameters()))
    step(stage, 0, 4)
    for found, wanted in zip(seen[1], expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-4)


def test_without_a_gan_there_is_no_discriminator(tiny_config_once):
    stage = stage1(tiny_config_once, adversarial__weight=0.0)
    assert stage.discriminator is None and set(stage.optimizers) == {"generator"} and not stage.modules
    assert {"gan", "discriminator"}.isdisjoint(step(stage, 99, 4))


def test_the_loss_is_the_weighted_sum_of_its_parts(tiny_config_once):
    stage = stage1(tiny_config_once, l1=2.0, l2=3.0)
    output, images = torch.zeros(2, 3, 4, 4), torch.full((2, 3, 4, 4), 0.5)
    loss, parts = stage.reconstruction_loss(output, output, images, crop=0)
    assert float(loss) == 2 * 0.5 + 3 * 0.25 and float(parts["l1"]) == 0.5 and float(parts["l2"]) == 0.25


def test_lpips_looks_at_a_crop_in_training_and_at_whole_images_in_validation(tiny_config_once, monkeypatch):
    seen = []

    class Stub(nn.Module):
        def __init__(self, net, weights):
            super().__init__()
            assert (net, weights) == ("alex", "a.pt")

        def forward(self, images, truth):
            seen.append(tuple(images.shape))
            return (images - truth).abs().mean(dim=(1, 2, 3)) * 0 + 7

    monkeypatch.setattr(autoencoder, "Perceptual", Stub)
    perceptual = {"net": "alex", "weights": "a.pt", "weight": 0.5, "crop": 10}
    stage = stage1(tiny_config_once, perceptual=perceptual, adversarial__weight=0.0)
    losses = step(stage, 0, 4)
    assert float(losses["lpips"]) == 7
    assert float(losses["loss"]) == pytest.approx(float(losses["l1"] + losses["codebook"]) + 0.5 * 7, rel=1e-5)
    with torch.no_grad():
        figures = stage.validate(stage.model.eval())
    assert figures["lpips"] == 7 and figures["score"] == pytest.approx(figures["l1"] + 3.5, rel=1e-5)
    assert seen == [(4, 3, 10, 10), (4, 3, 16, 16)]


def test_validation_figures_are_those_of_the_images(tiny_config_once):
    stage = stage1(tiny_config_once, validate_on=3, l2=1.0)
    assert sum(len(piece.images) for piece in stage.val) == 3
    with torch.no_grad():
        figures = stage.validate(stage.model.eval())
        output, tokens, _ = stage.model(to_float(VAL[:3]))
    output, truth = output.clamp(0, 1), to_float(VAL[:3])
    assert figures["psnr"] == pytest.approx(float(psnr(output, truth).mean()), rel=1e-5)
    assert figures["score"] == pytest.approx(float(F.l1_loss(output, truth) + F.mse_loss(output, truth)), rel=1e-5)
    assert figures["code_usage"] == len(tokens.unique()) / 16
    assert torch.equal(figures["pictures"][:, :16, :16], VAL[0]) and figures["pictures"].shape == (3, 34, 3 * 18 - 2)


def test_validation_in_pieces_of_64_equals_the_whole(tiny_config_once):
    val = IMAGES[torch.arange(70) % 12]
    stage = stage1(tiny_config_once, val=val)
    with torch.no_grad():
        figures = stage.validate(stage.model.eval())
        output = stage.model(to_float(val))[0].clamp(0, 1)
    assert figures["l1"] == pytest.approx(float(F.l1_loss(output, to_float(val))), rel=1e-5)
    assert figures["pictures"].shape == (3, 34, 8 * 18 - 2)


def test_flips_mirror_each_image_or_leave_it(tiny_config_once):
    stage = stage1(tiny_config_once, TRAIN[torch.arange(64) % 8])
    flipped = stage.fetch(0, torch.arange(64))[0].images
    pairs = list(zip(flipped, stage.train.stack(), strict=True))
    mirrored = [torch.equal(out, image.flip(-1)) for out, image in pairs]
    kept = [torch.equal(out, image) for out, image in pairs]
    assert all(a != b for a, b in zip(mirrored, kept, strict=True)) and 16 < sum(mirrored) < 48
    assert torch.equal(stage.fetch(0, torch.arange(64))[0].images, flipped)
    assert not torch.equal(stage.fetch(1, torch.arange(64))[0].images, flipped)
    stage.flip = False
    assert torch.equal(stage.fetch(0, torch.arange(64))[0].images, stage.train.stack())


def test_crops_cut_the_same_square_of_images_and_truth():
    torch.manual_seed(0)
    images = torch.arange(2 * 3 * 8 * 8.0).view(2, 3, 8, 8)
    corners = set()
    for _ in range(40):
        crop, truth = random_crops(images, -images, 6)
        assert crop.shape == (2, 3, 6, 6) and torch.equal(crop, -truth)
        corners.add(int(crop[0, 0, 0, 0]))
    assert corners == {8 * top + left for top in range(3) for left in range(3)}  # the borders too
    for size in (0, 8, 20):
        assert random_crops(images, -images, size)[0] is images


class SquaredError(nn.Module):
    """In the place of LPIPS; what it says depends on the crop."""

    def __init__(self, net, weights):
        super().__init__()

    def forward(self, images, truth):
        return (images - truth).square().mean(dim=(1, 2, 3))


@pytest.mark.parametrize("gan", [0.0, 0.1])
def test_micro_batches_are_the_whole_batch_in_stage_1(tiny_config_once, monkeypatch, gan):
    """Losses, gradients of both networks and the codebook: accumulate saves memory, no more."""
    monkeypatch.setattr(autoencoder, "Perceptual", SquaredError)
    keys = {"batch_size": 8, "adversarial__weight": gan, "adversarial__start": 0.0}
    keys |= {"perceptual__weight": 1.0, "perceptual__crop": 9}
    whole, cut = (stage1(tiny_config_once, accumulate=n, **keys) for n in (1, 4))
    whole.flip = cut.flip = False
    losses, grads = [], []
    for trainer in (whole, cut):
        seen = []

        def keep(loss, optimizer, parameters, clip, seen=seen):
            seen.append([parameter.grad.clone() for parameter in parameters])

        monkeypatch.setattr(autoencoder, "apply_gradients", keep)
        torch.manual_seed(5)
        losses.append({key: float(value) for key, value in step(trainer, 0, 8).items()})
        grads.append(seen)
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert len(grads[0]) == (2 if gan else 1)
    torch.testing.assert_close(grads[1], grads[0], atol=1e-6, rtol=1e-3)
    for key, tensor in whole.model.codebook.state_dict().items():
        torch.testing.assert_close(cut.model.codebook.state_dict()[key], tensor, atol=1e-6, rtol=1e-4)


def test_the_graph_of_a_micro_batch_goes_before_the_next_one_comes(tiny_config_once):
    """Of the pass for the weight of the GAN too: two graphs at once would take what accumulate is to save."""
    trainer = stage1(tiny_config_once, accumulate=4, batch_size=8, adversarial__weight=0.1, adversarial__start=0.0)
    losses, graphs = trainer.losses, []

    def watched(*arguments, **options):
        assert not [graph for graph in graphs if graph() is not None]
        found = losses(*arguments, **options)
        graphs.append(weakref.ref(found[0]["rec"]))
        return found

    trainer.losses = watched
    trainer._adaptive_weight(0, trainer.fetch(0, torch.arange(8)))
    assert len(graphs) == 4


def test_token_noise_of_stage_1_disturbs_what_is_decoded_alone(tiny_config_once):
    """Perturbed tokens while the encoder learns (RobusTok, arXiv 2509.12474)."""
    plain, noisy = (stage1(tiny_config_once, token_noise=share) for share in (0.0, 1.0))
    (given,), (again,), (other,) = (noisy.fetch(number, torch.arange(8)) for number in (3, 3, 4))
    assert plain.fetch(3, torch.arange(8))[0].swaps is None
    assert torch.equal(given.swaps, again.swaps) and not torch.equal(given.swaps, other.swaps)
    assert 0.2 < (given.swaps >= 0).float().mean() < 0.8  # a share of at most 1, uniform in each image
    assert given.swaps.max() < min(NEAR, noisy.codes - 1)
    with torch.no_grad():
        outputs = [noisy.decoded(noisy.model, MicroBatch(given.images, swaps=swaps)) for swaps in (given.swaps, None)]
    assert torch.equal(outputs[0][3], outputs[1][3]) and torch.equal(outputs[0][4], outputs[1][4])
    assert not torch.equal(outputs[0][1], outputs[1][1])
    assert all(math.isfinite(value) for value in noisy.update(0, [given]).values())


def test_known_tokens_are_those_of_float32_inside_a_context_of_bfloat16(finetuning):
    """What inference encodes in float32; in bfloat16 .7 % of the shipped VQGAN's tokens are others."""
    trainer = finetuning(**{"vqgan_training.token_noise": 0.0})
    seen, encode = [], trainer.model.encode
    trainer.model.encode = lambda images: seen.append(torch.is_autocast_enabled("cpu")) or encode(images)
    (part,) = trainer.fetch(3, torch.arange(8))
    outside = trainer.decoded(trainer.model, part)[3]
    with autocast(torch.device("cpu"), "bfloat16"):
        inside = trainer.decoded(trainer.model, part)[3]
    assert torch.equal(inside, outside) and seen == [False] * 4


def test_tensorboard_holds_losses_rates_codes_and_pictures_of_stage_1(trained):
    log = events(trained[0], "vqgan")
    tags = set(log.Tags()["scalars"])
    assert tags >= {f"train/{key}" for key in ("loss", "l1", "l2", "gan", "discriminator", "codebook", "code_usage")}
    assert tags >= {"val/score", "val/psnr", "val/code_usage", "learning_rate/generator", "learning_rate/discriminator"}
    assert [event.step for event in log.Scalars("val/score")] == [2, 4, 6, 8, 10]
    rates = {event.step: event.value for event in log.Scalars("learning_rate/generator")}
    assert [rates[step] / 0.002 for step in (2, 4, 6, 8, 10)] == pytest.approx([1, 1, 1, 0.5, 0.25])  # those just used
    assert all(0 < event.value <= 1 for event in log.Scalars("val/code_usage"))
    assert all(math.isfinite(event.value) for tag in tags for event in log.Scalars(tag))
    picture = log.Images("val/pictures")[-1]
    assert (picture.width, picture.height) == (4 * 18 - 2, 2 * 18 - 2)  # 4 pictures above their reconstructions


# --- decoder finetuning: the decoder learns to read known pixels ---

KNOWN = {
    "vqgan.decoder.known_width": 4,
    "vqgan_training.holes": {"box": 1.0, "walk": 1.0, "all": 1.0},
    "vqgan_training.token_noise": 0.5,
}


@pytest.fixture
def finetuning(trained, tiny_config_once):
    """A VQGANTrainer on top of the trained VQGAN, its decoder with a branch for known pixels."""

    def make(**changes) -> VQGANTrainer:
        keys = KNOWN | {"vqgan_training.init": str(trained[0] / "vqgan.safetensors")} | changes
        torch.manual_seed(0)
        return VQGANTrainer(load_config(tiny_config_once, keys), torch.device("cpu"), Maps.of(TRAIN), VAL)

    return make


def test_decoder_finetuning_starts_as_the_decoder_it_was_given(finetuning, trained):
    model, plain = finetuning().model.eval(), VQGAN.load(trained[0] / "vqgan.safetensors")
    images, hole = to_float(VAL), make_holes("box", len(VAL), 16)
    tokens = plain.encode(images)
    assert torch.equal(model.encode(images), tokens)
    assert torch.equal(model.decode(tokens, images, hole), plain.decode(tokens))


def test_decoder_finetuning_moves_the_decoder_and_no_token(finetuning):
    stage = finetuning(**{"vqgan_training.adversarial.weight": 0.1, "vqgan_training.adversarial.start": 0})
    before = {name: tensor.clone() for name, tensor in stage.model.state_dict().items()}
    key = stage.model.tokens_key()
    for number in range(3):
        losses = step(stage, number, 4)
    assert "gan" in losses and float(losses["codebook"]) == 0 and stage.model.tokens_key() == key
    for name, tensor in stage.model.state_dict().items():
        frozen = name.startswith(("encoder.", "quant_conv.", "codebook."))
        assert torch.equal(tensor, before[name]) == frozen, name


def test_decoder_finetuning_learns_to_use_the_known_pixels(finetuning):
    stage = finetuning(**{"vqgan_training.holes": {"box": 1.0}, "vqgan_training.learning_rate": 2e-3,
                       "vqgan_training.adversarial.weight": 0.0})  # fmt: skip
    with torch.no_grad():
        start = stage.validate(stage.model.eval())
    for number in range(120):
        step(stage, number, 8)
    with torch.no_grad():
        end = stage.validate(stage.model.eval())
    assert end["l1"] < 0.8 * start["l1"]


def test_a_step_of_decoder_finetuning_draws_holes_and_swaps_as_a_function_of_the_step(finetuning):
    stage = finetuning()
    first, again, other = (stage.fetch(number, torch.arange(8))[0] for number in (3, 3, 4))
    assert torch.equal(first.hole, again.hole) and torch.equal(first.swaps, again.swaps)
    assert not (torch.equal(first.hole, other.hole) and torch.equal(first.swaps, other.swaps))
    assert first.hole.shape == (8, 1, 16, 16) and first.swaps.shape == (8, 16)
    assert 0 < (first.swaps >= 0).float().mean() < 0.5 and first.swaps.max() < min(NEAR, stage.codes - 1)
    assert (finetuning(**{"vqgan_training.token_noise": 0.0}).fetch(3, torch.arange(8))[0].swaps == -1).all()


def test_swapped_tokens_are_hidden_ones_and_take_similar_codes(finetuning):
    stage = finetuning()
    images, hole = to_float(TRAIN), make_holes("half", len(TRAIN), 16)
    tokens = stage.model.encode(images)
    swaps = torch.zeros_like(tokens)  # everyone takes its nearest neighbour
    _, _, shown, found, _ = stage.decoded(stage.model, MicroBatch(TRAIN, hole, TRAIN, swaps))
    hidden = to_hidden(hole, 4)
    assert torch.equal(found[~hidden], tokens[~hidden]) and (found[hidden] != tokens[hidden]).all()
    vectors = stage.model.codebook.vectors()
    distances = torch.cdist(vectors, vectors).fill_diagonal_(torch.inf)
    assert torch.equal(found[hidden], distances.argmin(dim=1)[tokens[hidden]])
    known = ~hole.expand_as(images)
    assert torch.equal(shown[known], images[known])


def differs(stage, part) -> bool:
    """Whether the first guess gives a known cell another token than the truth."""
    known = ~to_hidden(part.hole, 4, rule="majority")
    tokens = [stage.model.encode(to_float(images)) for images in (part.images, part.painted)]
    return bool((tokens[0] != tokens[1])[known].any())


@pytest.mark.parametrize("pre_filled", [False, True])
def test_decoder_finetuning_shows_the_decoder_what_inference_will(finetuning, pre_filled):
    """Partly missing cells that are known keep the tokens of the painted picture, hidden ones those of the truth."""
    keys = {"vqgan.decoder.pre_filled": pre_filled, "decoding.pre_fill": True, "decoding.token_rule": "majority"}
    stage = finetuning(**keys, **{"vqgan_training.token_noise": 0.0})
    batches = (stage.fetch(number, torch.arange(8))[0] for number in range(50))
    piece = next(part for part in batches if differs(stage, part))
    assert torch.equal(piece.painted, paint(piece.images, piece.hole, pre_fill=True))
    assert all(torch.equal(part.painted, paint(part.images, part.hole, pre_fill=True)) for part in stage.val)
    images, painted, hidden = to_float(piece.images), to_float(piece.painted), to_hidden(piece.hole, 4, rule="majority")
    seen = []
    _, output, shown, found, _ = stage.decoded(lambda *given: seen.append(given) or stage.model(*given), piece)
    truth, given = stage.model.encode(images), stage.model.encode(painted)
    assert torch.equal(found, torch.where(hidden, truth, given)) and not torch.equal(found, truth)
    assert torch.equal(seen[0][0], painted)  # never the truth in the hole
    assert torch.equal(shown, torch.where(piece.hole, output, images))


def test_a_decoder_that_reads_a_first_guess_learns_from_it(tiny_config_once, trained):
    keys = KNOWN | {"vqgan_training.init": str(trained[0] / "vqgan.safetensors"), "vqgan.decoder.pre_filled": True}
    with pytest.raises(ValueError, match=r"set decoding\.pre_fill"):
        load_config(tiny_config_once, keys)


def test_decoder_finetuning_needs_a_branch_and_a_trained_vqgan(tiny_config_once):
    with pytest.raises(ValueError, match=r"known_width and vqgan_training\.init"):
        load_config(tiny_config_once, {"vqgan_training.holes": {"box": 1.0}})


def test_guessed_tokens_are_the_transformers_and_only_where_hidden(finetuning, trained):
    guesses = {"transformer": str(trained[0] / "transformer.safetensors"), "share": 0.5, "total_iter": 2}
    stage = finetuning(**{"vqgan_training.guesses": guesses})
    images, hole = to_float(TRAIN), make_holes("half", len(TRAIN), 16)
    tokens, hidden = stage.model.encode(images), to_hidden(hole, 4)
    seeds = torch.arange(len(TRAIN)).masked_fill(torch.arange(len(TRAIN)) % 2 == 0, -1)
    _, _, shown, found, _ = stage.decoded(stage.model, MicroBatch(TRAIN, hole, TRAIN, seeds=seeds))
    assert torch.equal(found[::2], tokens[::2]) and torch.equal(found[~hidden], tokens[~hidden])
    transformer = stage.transformer
    wanted = fill(transformer.of_hidden, tokens[1::2], hidden[1::2], transformer.mask_id, stage.decoding, [1, 3, 5, 7])
    assert torch.equal(found[1::2], wanted.tokens) and not torch.equal(wanted.tokens, tokens[1::2])
    known = ~hole.expand_as(images)
    assert torch.equal(shown[known], images[known])
    first, again = (stage.fetch(3, torch.arange(8))[0].seeds for _ in range(2))
    assert torch.equal(first, again) and 0 < (first >= 0).sum() < 8
    assert {"loss", "l1"} <= set(step(stage, 3, 4)) and not any(p.requires_grad for p in transformer.parameters())


def test_guesses_may_come_as_means_of_codes(finetuning, trained, monkeypatch):
    guesses = {"transformer": str(trained[0] / "transformer.safetensors"), "share": 1.0, "total_iter": "auto"}
    stage = finetuning(**{"vqgan_training.guesses": guesses | {"expected": 0.5}})
    fetched = stage.fetch(3, torch.arange(8))[0]
    assert 0 < fetched.soft.sum() < 8 and torch.equal(fetched.soft, stage.fetch(3, torch.arange(8))[0].soft)
    hole, seeds = make_holes("half", len(TRAIN), 16), torch.arange(len(TRAIN))
    soft, seen = torch.arange(len(TRAIN)) % 2 == 0, []

    def network(images, hole, codes):
        seen.append(codes)
        return stage.model(images, hole, codes)

    stage.decoded(network, MicroBatch(TRAIN, hole, TRAIN, seeds=seeds, soft=soft))
    *_, tokens, _ = stage.decoded(network, MicroBatch(TRAIN, hole, TRAIN, seeds=seeds, soft=~soft))
    hard = stage.model.codebook.vectors()[tokens]  # (b, n, e)
    hidden = to_hidden(hole, 4)
    assert torch.equal(seen[0][~soft], hard[~soft]) and torch.equal(seen[1][soft], hard[soft])
    assert torch.equal(seen[0][~hidden], hard[~hidden])
    assert not torch.isclose(seen[0][soft], hard[soft]).all(dim=-1)[hidden[soft]].any()
    found = torch.cat([part.soft for part in stage.val])
    assert found.tolist() == [False, True] * (len(found) // 2)


def test_the_gan_looks_at_drawn_codes_alone(finetuning, trained, monkeypatch):
    guesses = {"transformer": str(trained[0] / "transformer.safetensors"), "share": 0.6, "expected": 0.5}
    gan = {"weight": 0.1, "start": 0, "width": 8, "layers": 1}
    stage = finetuning(**{"vqgan_training.guesses": guesses, "vqgan_training.adversarial": gan})
    batch, seen = stage.fetch(3, torch.arange(8)), []
    stage.discriminator.register_forward_hook(lambda module, given, output: seen.append(len(given[0])))
    stage.update(3, batch)
    means = batch[0].soft & (batch[0].seeds >= 0)
    drawn = 8 - int(means.sum())
    assert 0 < drawn < 8 and batch[0].judged.tolist() == (~means).nonzero().flatten().tolist()
    assert seen == [drawn, 2 * drawn]
    all_means = MicroBatch(TRAIN, seeds=torch.zeros(len(TRAIN)), soft=torch.ones(len(TRAIN), dtype=torch.bool))
    assert len(all_means.judged) == len(TRAIN) == len(MicroBatch(TRAIN).judged)


def test_blank_decodes_zero_vectors_where_tokens_are_hidden(finetuning):
    stage, seen = finetuning(**{"vqgan_training.blank": True, "vqgan_training.token_noise": 0.0}), []

    def network(images, hole, codes):
        seen.append(codes)
        return stage.model(images, hole, codes)

    hole = make_holes("half", len(TRAIN), 16)
    tokens = stage.decoded(network, MicroBatch(TRAIN, hole, TRAIN))[3]
    hidden, hard = to_hidden(hole, 4), stage.model.codebook.vectors()[tokens]
    assert (seen[0][hidden] == 0).all() and torch.equal(seen[0][~hidden], hard[~hidden])


def test_means_of_codes_need_guesses(tiny_config_once):
    with pytest.raises(ValueError, match=r"guesses\.expected is of guesses: set vqgan_training\.guesses\.transformer"):
        load_config(tiny_config_once, {"vqgan_training.guesses.expected": 0.5})


def test_blank_needs_holes_and_no_guesses(tiny_config_once):
    with pytest.raises(
        ValueError, match=r"blank hides tokens: set vqgan_training\.holes, no guesses and no token_noise"
    ):
        load_config(tiny_config_once, {"vqgan_training.blank": True})


def test_guesses_need_holes_and_a_transformer_that_fits(finetuning, trained, tiny_config_once, tmp_path):
    guesses = {"vqgan_training.guesses.transformer": str(trained[0] / "transformer.safetensors")}
    with pytest.raises(ValueError, match=r"set vqgan_training\.holes"):
        load_config(tiny_config_once, guesses)
    small = load_config(tiny_config_once, {"vqgan.codebook.codes": 8, "transformer.codes": 8}).transformer
    save_weights(tmp_path / "small.safetensors", Transformer(small), small)
    with pytest.raises(ValueError, match=r"small\.safetensors: \(tokens, codes\) \(16, 8\), expected \(16, 16\)"):
        finetuning(**{"vqgan_training.guesses.transformer": str(tmp_path / "small.safetensors")})


def test_a_gan_keeps_its_last_weights_and_others_their_best(tiny_config_once, tmp_path, monkeypatch):
    scores = iter([1.0, 2.0] * 2)
    monkeypatch.setattr(VQGANTrainer, "validate", lambda self, model: {"score": next(scores)})
    for keep, step_kept in (("best", "2"), ("last", "4")):
        out = train("vqgan", tiny_config_once, tmp_path / keep, "--epochs", "2", f"--vqgan_training.keep={keep}")
        assert read_weights(out / "vqgan.safetensors")[1]["step"] == step_kept
