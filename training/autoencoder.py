"""Stage 1: what a step of training a VQGAN does, and of finetuning its decoder beside known pixels."""

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import Config
from evaluation.metrics import code_usage, hole_psnr, psnr
from maskgit.classical import paint
from maskgit.data import to_float, to_uint8
from maskgit.dataset import Maps
from maskgit.decoding import fill
from maskgit.hiding import HoleMixture
from maskgit.masks import composite, make_holes, to_hidden
from maskgit.visualize import sheet_of
from models.discriminator import (
    PatchDiscriminator,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
    layer_gradients,
)
from models.distributed import summed
from models.perceptual import Perceptual
from models.transformer import Transformer
from models.vqgan import NEAR, VQGAN
from training.run import VAL_SEED, start_from
from training.stepping import apply_gradients, micro_batches, parallel, shard, staged
from utils import autocast, memory_format, mix


def random_crops(
    images: Tensor, truth: Tensor, size: int, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """The same random square of all images (b, c, H, W) and their truth; whole images where `size` is 0."""
    height, width = images.shape[-2:]
    if not size or size >= min(height, width):
        return images, truth
    top, left = (int(torch.randint(side - size + 1, (), generator=generator)) for side in (height, width))
    window = (..., slice(top, top + size), slice(left, left + size))
    return images[window], truth[window]


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """What a step needs of some images; all but these and `swaps` in decoder finetuning alone."""

    images: Tensor  # (b, 3, H, W) uint8
    hole: Tensor | None = None  # (b, 1, H, W) bool
    painted: Tensor | None = None  # (b, 3, H, W) uint8: the images as inference sees them, by `classical.paint`
    swaps: Tensor | None = None  # (b, n) long: which of the codes near its own a token takes, -1: its own
    seeds: Tensor | None = None  # (b) long: those of the images whose hidden tokens are guessed, -1: none are
    soft: Tensor | None = None  # (b) bool: those of the guessed images that come as means of codes

    @cached_property
    def judged(self) -> Tensor:
        """The rows that a GAN looks at, in each micro-batch by itself: not those of means, which are to be as smooth as
        they are uncertain; all where there are no others."""
        rows = torch.arange(len(self.images))
        if self.soft is None:
            return rows
        drawn = rows[~(self.soft & (self.seeds >= 0)).cpu()]
        return drawn if len(drawn) else rows


class VQGANTrainer:
    """Losses and validation of a VQGAN: pixels, LPIPS, codebook and, after its start, the GAN.

    With `holes` (decoder finetuning) encoder and codebook are frozen, so the tokens stay what they are; the decoder
    sees the known pixels and tokens that are a little wrong, or that a transformer guessed, or (`blank`) none. LPIPS
    and GAN look at the composite.
    """

    def __init__(self, config: Config, device: torch.device, train: Maps, val: Tensor):
        self.settings, self.flip, self.device = config.vqgan_training, config.data.flip, device
        self.train = train
        self.layout = memory_format(device, self.settings.precision)
        self.model = VQGAN(config.vqgan).to(device, memory_format=self.layout)
        if self.settings.init:
            start_from(self.model, self.settings.init, new=("decoder.known.", "decoder.joins."))
        guesses, self.holes, self.transformer = self.settings.guesses, None, None
        # what it forgets it would read from the true tokens underneath
        codes = "expected" if guesses.expected else None
        self.decoding = config.decoding.changed(total_iter=guesses.total_iter, forget=False, codes=codes)
        if self.settings.holes:
            self.holes = HoleMixture(self.settings.holes, config.vqgan.image_size, seed=self.settings.seed)
            for frozen in (self.model.encoder, self.model.quant_conv, self.model.codebook):
                frozen.requires_grad_(False)
        if guesses.transformer:
            self.transformer = Transformer.load(guesses.transformer).to(device)
            made, taken = (config.transformer.tokens, self.codes), self.transformer.config
            if made != (taken.tokens, taken.codes):
                raise ValueError(f"{guesses.transformer}: (tokens, codes) {taken.tokens, taken.codes}, expected {made}")
        self.val_images = val[: self.settings.validate_on or None]
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.network = parallel(self.model, self.settings.compile)
        rate, betas = self.settings.learning_rate, self.settings.betas
        self.optimizer = torch.optim.Adam(self.parameters, rate, betas, fused=True)
        perceptual, gan = self.settings.perceptual, self.settings.adversarial
        place = {"device": device, "memory_format": self.layout}
        self.perceptual = Perceptual(perceptual.net, perceptual.weights).to(**place) if perceptual.weight else None
        self.discriminator = PatchDiscriminator(gan.width, gan.layers).to(**place) if gan.weight else None
        self.optimizers, self.modules = {"generator": self.optimizer}, {}
        if self.discriminator:
            self.critic = parallel(self.discriminator)  # for its own update; the generator's moves no discriminator
            critics = self.discriminator.parameters()
            self.optimizers["discriminator"] = torch.optim.Adam(critics, gan.learning_rate, (0.5, 0.9), fused=True)
            self.modules["discriminator"] = self.discriminator
        self.gan_start = round(gan.start * (len(train) // min(self.settings.batch_size, len(train))))

    @cached_property  # the first process alone validates
    def val(self) -> list[MicroBatch]:
        """In decoder finetuning with thick holes, their tokens guessed where there is a transformer."""
        images = self.val_images
        if not self.holes:
            return [MicroBatch(part) for part in images.split(64)]
        hole = make_holes("thick", len(images), images.shape[-1], VAL_SEED)
        parts = zip(*(x.split(64) for x in (images, hole, paint(images, hole, self.decoding.pre_fill))), strict=True)
        if not self.transformer:
            return [MicroBatch(*part) for part in parts]
        turns = (torch.arange(len(images) + 1) * self.settings.guesses.expected).floor()
        soft = turns.diff() > 0  # evenly spread
        starts = range(0, len(images), 64)
        return [
            MicroBatch(*part, None, torch.arange(len(part[0])), soft[start : start + 64])
            for start, part in zip(starts, parts, strict=True)
        ]

    def images(self, source: Tensor) -> Tensor:
        """uint8 -> float in [0, 1] on the device."""
        return to_float(source.to(self.device, non_blocking=True)).contiguous(memory_format=self.layout)

    def reconstruction_loss(
        self, output: Tensor, shown: Tensor, images: Tensor, crop: int, generator: torch.Generator | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """L1 and L2 of the decoder's output, LPIPS of what is `shown`, weighted: a scalar, and its parts.

        `generator` places the crop.
        """
        parts = {"l1": F.l1_loss(output, images), "l2": F.mse_loss(output, images)}
        loss = self.settings.l1 * parts["l1"] + self.settings.l2 * parts["l2"]
        if self.perceptual:
            parts["lpips"] = self.perceptual(*random_crops(shown, images, crop, generator)).mean()
            loss = loss + self.settings.perceptual.weight * parts["lpips"]
        return loss, parts

    def fetch(self, step: int, indices: Tensor) -> list[MicroBatch]:
        """The micro-batches of a step: this process's share of the images `indices`, half of them mirrored."""
        generator = torch.Generator().manual_seed(mix(self.settings.seed, 3, step))
        size = self.model.config.image_size
        windows = self.train.draw(indices, size, generator)
        mirrored = torch.rand(len(indices), generator=generator) < (0.5 if self.flip else 0.0)
        count = self.settings.accumulate
        holes, swaps, seeds, soft = ([None] * count for _ in range(4))
        if self.holes:
            holes = shard(self.holes(len(indices), generator), count)
        if self.holes or self.settings.token_noise:
            shape = (len(indices), self.model.config.grid**2)
            shares = self.settings.token_noise * torch.rand(len(indices), 1, generator=generator)
            swapped = torch.rand(shape, generator=generator) < shares
            choices = torch.randint(min(NEAR, self.codes - 1), shape, generator=generator)
            swaps = shard(choices.masked_fill(~swapped, -1), count)
        if self.transformer:
            guessed = torch.rand(len(indices), generator=generator) < self.settings.guesses.share
            drawn = torch.randint(2**31, (len(indices),), generator=generator)
            seeds = shard(drawn.masked_fill(~guessed, -1), count)
            soft = shard(torch.rand(len(indices), generator=generator) < self.settings.guesses.expected, count)
        batch = []
        for rows, flips, hole, *rest in zip(
            shard(windows, count), shard(mirrored, count), holes, swaps, seeds, soft, strict=True
        ):
            images = self.train.read(rows, size)
            images = torch.where(flips[:, None, None, None], images.flip(-1), images)
            painted = None if hole is None else paint(images, hole, self.decoding.pre_fill)
            parts = (images, hole, painted, *rest)
            batch.append(MicroBatch(*(x if x is None else staged(x, self.device) for x in parts)))
        return batch

    def decoded(self, network: nn.Module, part: MicroBatch) -> tuple[Tensor, ...]:
        """The images in [0, 1], the decoder's output and what is shown of it (b, 3, H, W), tokens (b, n), codebook
        loss ().

        Where `swaps` says so, similar codes are decoded. With holes, hidden tokens are those of the images, or swapped,
        or guessed; known ones those of what is painted.
        """
        images = self.images(part.images)
        if part.hole is None:
            swaps = part.swaps if part.swaps is None else part.swaps.to(self.device, non_blocking=True)
            output, tokens, loss = network(images, swaps=swaps)
            return images, output.float(), output.float(), tokens, loss
        painted = self.images(part.painted)
        hole, swaps, seeds, soft = (
            x if x is None else x.to(self.device, non_blocking=True)
            for x in (part.hole, part.swaps, part.seeds, part.soft)
        )
        hidden = to_hidden(hole, self.model.config.grid, rule=self.decoding.token_rule)
        with torch.no_grad(), autocast(self.device, "float32"):
            tokens = torch.where(hidden, self.model.encode(images), self.model.encode(painted))
        if swaps is not None:
            tokens = self.model.codebook.swapped(tokens, swaps.masked_fill(~hidden, -1))
        codebook = self.model.codebook.vectors()
        guess = None
        if seeds is not None and (guessed := seeds >= 0).any():
            with autocast(self.device, self.settings.precision):
                guess = fill(self.transformer.of_hidden, tokens[guessed], hidden[guessed], self.transformer.mask_id,
                             self.decoding, seeds[guessed].tolist(), codebook)  # fmt: skip
            tokens[guessed] = guess.tokens
        codes = F.embedding(tokens, codebook)  # (b, n, e)
        if guess is not None and self.decoding.blends:
            codes[guessed] = torch.where(soft[guessed][:, None, None], guess.codes, codes[guessed])
        if self.settings.blank:
            codes = codes.masked_fill(hidden[..., None], 0)
        output, _, loss = network(painted, hole, codes)
        return images, output.float(), composite(output.float(), images, hole), tokens, loss

    def losses(
        self, network: nn.Module, step: int, part: MicroBatch, adversarial: bool
    ) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor]:
        """Losses of a micro-batch (rec: all of the reconstruction, weighted), images, what is shown of the output
        (b, 3, H, W), tokens (b, n)."""
        # the same crop in all micro-batches and processes
        crops = torch.Generator().manual_seed(mix(self.settings.seed, 4, step))
        with autocast(self.device, self.settings.precision):
            images, output, shown, tokens, codebook = self.decoded(network, part)
            rec, losses = self.reconstruction_loss(output, shown, images, self.settings.perceptual.crop, crops)
            losses |= {"rec": rec, "codebook": codebook}
            if adversarial:
                losses["gan"] = generator_loss(self.discriminator(shown[part.judged]).float())
        return losses, images, shown, tokens

    def update(self, step: int, batch: list[MicroBatch]) -> dict[str, Tensor]:
        """One step of both optimizers on what `fetch` made; its losses are the means over the whole batch."""
        adversarial = self.discriminator is not None and step >= self.gan_start
        means, outputs, uses = {}, [], torch.zeros(self.codes, device=self.device)
        weight = self._adaptive_weight(step, batch) if adversarial and len(batch) > 1 else None
        for part in micro_batches(self.network, batch):
            losses, images, shown, tokens = self.losses(self.network, step, part, adversarial)
            loss = losses["rec"]
            if adversarial:
                last = self.model.decoder.last_layer
                if len(batch) == 1:
                    weight = adaptive_weight(layer_gradients(loss, losses["gan"], last))
                loss = loss + self.settings.adversarial.weight * weight * losses["gan"]
            losses["loss"] = loss + losses["codebook"]
            (losses["loss"] / len(batch)).backward()
            for key, value in losses.items():
                means[key] = means.get(key, 0.0) + value.detach() / len(batch)
            if adversarial:
                outputs.append((images[part.judged], shown.detach()[part.judged]))
            uses.index_fill_(0, tokens.flatten(), 1.0)
        apply_gradients(means["loss"], self.optimizer, self.parameters, self.settings.clip)
        self.model.codebook.update()
        means["code_usage"] = (summed(uses) > 0).float().mean()
        if adversarial:
            means["discriminator"] = self._update_discriminator(outputs)
        return {key: value for key, value in means.items() if key != "rec"}

    def _adaptive_weight(self, step: int, batch: list[MicroBatch]) -> Tensor:
        """The GAN's weight for several micro-batches: a pass of its own, since their gradients add up first."""
        total, last = 0.0, self.model.decoder.last_layer
        self.model.eval()  # the codebook is to see the vectors once
        for part in batch:
            losses, *rest = self.losses(self.model, step, part, adversarial=True)
            total = total + layer_gradients(losses["rec"], losses["gan"], last) / len(batch)
            del losses, rest  # the graph goes before the next one comes
        self.model.train()
        return adaptive_weight(total)

    @property
    def codes(self) -> int:
        return self.model.config.codebook.codes

    def _update_discriminator(self, outputs: list[tuple[Tensor, Tensor]]) -> Tensor:
        optimizer, total = self.optimizers["discriminator"], torch.zeros((), device=self.device)
        optimizer.zero_grad(set_to_none=True)  # the generator's pass left gradients there
        for images, output in micro_batches(self.critic, outputs):
            with autocast(self.device, self.settings.precision):
                logits = self.critic(torch.cat((images, output))).float()
            loss = discriminator_loss(*logits.chunk(2)) / len(outputs)
            loss.backward()
            total += loss.detach()
        apply_gradients(total, optimizer, self.discriminator.parameters(), self.settings.clip)
        return total

    def validate(self, model: nn.Module) -> dict:
        """Mean loss, PSNR in dB (with holes: in them), LPIPS and the share of codes used; a few pictures."""
        sums, tokens, pictures = {}, [], []
        for part in self.val:
            with autocast(self.device, self.settings.precision):
                images, output, shown, ids, _ = self.decoded(model, part)
                loss, parts = self.reconstruction_loss(output.clamp(0, 1), shown.clamp(0, 1), images, crop=0)
            shown = shown.clamp(0, 1)
            hole = None if part.hole is None else part.hole.to(self.device)
            quality = psnr(shown, images) if hole is None else hole_psnr(shown, images, hole)
            parts |= {"score": loss, "psnr": quality.mean()}
            for key, value in parts.items():
                sums[key] = sums.get(key, 0.0) + float(value) * len(images)
            tokens.append(ids.cpu())
            if not pictures:
                given = [] if hole is None else [part.painted[:8]]
                pictures = [part.images[:8], *given, to_uint8(shown[:8]).cpu()]
        count = sum(len(part.images) for part in self.val)
        figures = {key: value / count for key, value in sums.items()}
        figures["code_usage"] = code_usage(torch.cat(tokens), self.codes)
        return figures | {"pictures": sheet_of(torch.cat(pictures), columns=len(pictures[0]))}
