"""Stage 1: images -> a VQGAN checkpoint.

python training_vqgan.py --config configs/cats64.yml
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import Config, parse_training, training_parser
from data import to_float, to_uint8
from metrics import code_usage, psnr
from models.discriminator import PatchDiscriminator, adaptive_weight, discriminator_loss, generator_loss
from models.perceptual import Perceptual
from models.processes import summed, world
from models.vqgan import VQGAN
from training import Run, apply_gradients, cut, load_images, open_store, parallel, pieces_of, staged, start_from
from utils import autocast, grid, join_processes, leave_processes, log, mix, start_logging


def random_crops(
    images: Tensor, truth: Tensor, size: int, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """The same random square of all images (b, c, H, W) and their truth; whole images where `size` is 0."""
    height, width = images.shape[-2:]
    if not size or size >= min(height, width):
        return images, truth
    top, left = (int(torch.randint(side - size + 1, (), generator=generator)) for side in (height, width))
    window = (..., slice(top, top + size), slice(left, left + size))
    return tuple(x[window].contiguous(memory_format=torch.channels_last) for x in (images, truth))


class Stage1:
    """Losses and validation of a VQGAN: pixels, LPIPS, codebook and, after its start, the GAN."""

    def __init__(self, config: Config, device: torch.device, train: Tensor, val: Tensor):
        self.settings, self.flip, self.device = config.vqgan_training, config.data.flip, device
        self.train, self.val = train, val[: self.settings.validate_on or None]
        self.model = VQGAN(config.vqgan).to(device, memory_format=torch.channels_last)
        if self.settings.init:
            start_from(self.model, self.settings.init)
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.network = parallel(self.model, self.settings.compile)
        rate, betas = self.settings.learning_rate, self.settings.betas
        self.optimizer = torch.optim.Adam(self.parameters, rate, betas, fused=True)
        perceptual, gan = self.settings.perceptual, self.settings.adversarial
        channels_last = {"device": device, "memory_format": torch.channels_last}
        self.perceptual = (
            Perceptual(perceptual.net, perceptual.weights).to(**channels_last) if perceptual.weight else None
        )
        self.discriminator = PatchDiscriminator(gan.width, gan.layers).to(**channels_last) if gan.weight else None
        self.optimizers, self.modules = {"generator": self.optimizer}, {}
        if self.discriminator:
            self.critic = parallel(self.discriminator)  # for its own update; the generator's moves no discriminator
            critics = self.discriminator.parameters()
            self.optimizers["discriminator"] = torch.optim.Adam(critics, gan.learning_rate, (0.5, 0.9), fused=True)
            self.modules["discriminator"] = self.discriminator
        self.gan_start = round(gan.start * (len(train) // min(self.settings.batch_size, len(train))))

    def images(self, source: Tensor) -> Tensor:
        """uint8 -> float in [0, 1] on the device, channels last."""
        return to_float(source.to(self.device, non_blocking=True)).contiguous(memory_format=torch.channels_last)

    def reconstruction_loss(
        self, output: Tensor, images: Tensor, crop: int, generator: torch.Generator | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """L1, L2 and LPIPS, weighted: a scalar, and its parts. `generator` places the crop."""
        parts = {"l1": F.l1_loss(output, images), "l2": F.mse_loss(output, images)}
        loss = self.settings.l1 * parts["l1"] + self.settings.l2 * parts["l2"]
        if self.perceptual:
            parts["lpips"] = self.perceptual(*random_crops(output, images, crop, generator)).mean()
            loss = loss + self.settings.perceptual.weight * parts["lpips"]
        return loss, parts

    def fetch(self, step: int, indices: Tensor) -> list[Tensor]:
        """The pieces of a step's batch: this process's share of the images `indices`, uint8, half of them mirrored."""
        generator = torch.Generator().manual_seed(mix(self.settings.seed, 3, step))
        mirrored = torch.rand(len(indices), generator=generator) < (0.5 if self.flip else 0.0)
        pieces = []
        for rows, flips in zip(*(cut(whole, self.settings.accumulate) for whole in (indices, mirrored)), strict=True):
            images = self.train[rows]
            images = torch.where(flips[:, None, None, None], images.flip(-1), images)
            pieces.append(staged(images, self.device))
        return pieces

    def update(self, step: int, pieces: list[Tensor]) -> dict[str, Tensor]:
        """One step of both optimizers on what `fetch` made."""
        adversarial = self.discriminator is not None and step >= self.gan_start
        total, outputs, losses = torch.zeros((), device=self.device), [], {}
        crops = torch.Generator().manual_seed(mix(self.settings.seed, 4, step))  # the same in every process
        for piece in pieces_of(self.network, pieces):
            images = self.images(piece)
            with autocast(self.device, self.settings.precision):
                output, tokens, codebook = self.network(images)
                output = output.float()
                loss, losses = self.reconstruction_loss(output, images, self.settings.perceptual.crop, crops)
                if adversarial:
                    fooled = generator_loss(self.discriminator(output).float())
                    losses["gan"] = fooled
                    weight = adaptive_weight(loss, fooled, self.model.decoder.last_layer)
                    loss = loss + self.settings.adversarial.weight * weight * fooled
            loss = (loss + codebook) / len(pieces)
            loss.backward()
            total += loss.detach()
            outputs.append((images, output.detach()))
        apply_gradients(total, self.optimizer, self.parameters, self.settings.clip)
        uses = summed(torch.zeros(self.codes, device=self.device).index_fill_(0, tokens.flatten(), 1.0))
        losses |= {"loss": total, "codebook": codebook, "code_usage": (uses > 0).float().mean()}
        if adversarial:
            losses["discriminator"] = self._update_discriminator(outputs)
        return {key: value.detach() for key, value in losses.items()}

    @property
    def codes(self) -> int:
        return self.model.config.codebook.codes

    def _update_discriminator(self, outputs: list[tuple[Tensor, Tensor]]) -> Tensor:
        optimizer, total = self.optimizers["discriminator"], torch.zeros((), device=self.device)
        optimizer.zero_grad(set_to_none=True)  # the generator's pass left gradients there
        for images, output in pieces_of(self.critic, outputs):
            with autocast(self.device, self.settings.precision):
                logits = self.critic(torch.cat((images, output))).float()
            loss = discriminator_loss(*logits.chunk(2)) / len(outputs)
            loss.backward()
            total += loss.detach()
        apply_gradients(total, optimizer, self.discriminator.parameters(), self.settings.clip)
        return total

    def validate(self, model: nn.Module) -> dict:
        """Mean loss, PSNR in dB, LPIPS and the share of codes used over the validation images; a few pictures."""
        sums, tokens, pictures = {}, [], []
        for source in self.val.split(64):
            images = self.images(source)
            with autocast(self.device, self.settings.precision):
                output, ids, _ = model(images)
                output = output.float().clamp(0, 1)
                loss, parts = self.reconstruction_loss(output, images, crop=0)
            parts |= {"score": loss, "psnr": psnr(output, images).mean()}
            for key, value in parts.items():
                sums[key] = sums.get(key, 0.0) + float(value) * len(source)
            tokens.append(ids.cpu())
            pictures += [source[:8], to_uint8(output[:8]).cpu()] if not pictures else []
        figures = {key: value / len(self.val) for key, value in sums.items()}
        figures["code_usage"] = code_usage(torch.cat(tokens), self.codes)
        return figures | {"pictures": grid(torch.cat(pictures), columns=len(pictures[0]))}


def main(argv: list[str] | None = None) -> None:
    """The command line; see --help."""
    start_logging()
    parser = training_parser(__doc__, "vqgan_training")
    args, config, folder = parse_training(parser, argv)
    try:
        device = join_processes(args.device)
        folders = load_images(config.data, config.vqgan.image_size, open_store(folder, config.data))
        train, val = (images.images for images in folders)
        torch.manual_seed(config.vqgan_training.seed)
        stage = Stage1(config, device, train, val)
        run = Run("vqgan", folder, config.vqgan_training, len(train), stage.model, stage.optimizers, stage.modules)
        if args.resume:
            run.resume()
    except (ValueError, FileNotFoundError, RuntimeError) as error:
        parser.error(str(error))
    counts = f"{len(train)} training and {len(val)} validation images, {run.steps} steps"
    log.info(f"stage 1: {counts}, on {world()} x {device.type}")
    run.fit(stage.fetch, stage.update, stage.validate, args.profile)
    log.info(f"best weights: {run.weights}")
    leave_processes()


if __name__ == "__main__":
    main()
