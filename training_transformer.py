"""Stage 2: a frozen VQGAN turns images into tokens, once; a transformer learns to predict the hidden ones.

python training_transformer.py --config configs/cats64.yml
"""

import copy
import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from config import Config, parse_training, training_parser
from data import ImageFolder, Store, to_float
from inpainter import Inpainter
from inputs import GREY
from masks import FAMILIES, HidingPolicy, make_holes, to_hidden
from models.base import save_weights
from models.processes import rank, world
from models.transformer import Transformer
from models.vqgan import VQGAN
from training import Run, apply_gradients, cut, load_images, open_store, parallel, pieces_of, staged, start_from
from utils import autocast, first_on_machine, grid, join_processes, leave_processes, log, mix, start_logging

PREVIEWS, PREVIEWED = 8, ("walk", "thick", "box", "half")  # images, and the families of their holes


@torch.no_grad()
def encode(vqgan: VQGAN, images: Tensor, device: torch.device, views: int = 1) -> Iterator[np.ndarray]:
    """uint8 images (N, 3, H, W) -> their tokens (N, n) int32, then (2 views) those of the mirrored images, in batches.

    In float32: what inference will see.
    """
    for view in range(views):
        for batch in tqdm(images.split(64), desc="tokens", unit="batch", mininterval=1.0, disable=rank() > 0):
            batch = to_float(batch.to(device))
            yield vqgan.encode(batch.flip(-1) if view else batch).int().cpu().numpy()


def load_tokens(vqgan: VQGAN, folder: ImageFolder, key: str, device: torch.device, views: int, store: Store) -> Tensor:
    """Tokens (views, N, n) of the images in `folder`, int16 where the codes fit; `key` names the VQGAN's weights."""
    key = hashlib.sha256(f"{folder.key} {key} {views}".encode()).hexdigest()
    dtype = np.int16 if vqgan.config.codebook.codes <= 2**15 else np.int32
    shape = (views * len(folder), vqgan.config.grid**2)
    with first_on_machine():
        tokens = store.keep(f"{folder.name}_tokens", key, shape, encode(vqgan, folder.images, device, views), dtype)
    return tokens.view(views, len(folder), -1)


class Stage2:
    """Loss and validation of a transformer on cached tokens (views, N, n): view 0 as they are, view 1 mirrored."""

    def __init__(self, config: Config, device: torch.device, vqgan: VQGAN, train: Tensor, val: Tensor, images: Tensor):
        self.settings, self.device, self.vqgan, self.train = config.transformer_training, device, vqgan, train
        self.val, self.images = val[: self.settings.validate_on or None], images[:PREVIEWS]
        settings, size, side, self.decoding = self.settings, vqgan.config.image_size, vqgan.config.grid, config.decoding
        self.model = Transformer(config.transformer).to(device)
        if settings.init:
            start_from(self.model, settings.init)
        elif settings.start_from_codes:
            generator = torch.Generator().manual_seed(mix(settings.seed, 0))
            self.model.init_from_codes(vqgan.codebook.vectors(), generator)
        self.network = parallel(self.model, settings.compile)
        self.optimizer = torch.optim.Adam(self.model.parameters(), settings.learning_rate, settings.betas, fused=True)
        self.hide = HidingPolicy(settings.hiding, side, size, settings.bernoulli, seed=settings.seed)
        self.holes = {family: to_hidden(make_holes(family, len(self.val), size), side) for family in FAMILIES}

    def counted(self, hidden: Tensor) -> Tensor:
        """The tokens (b, n) whose cross-entropy is the loss: the hidden ones, or all where `loss_on` says so."""
        return hidden if self.settings.loss_on == "hidden" else torch.ones_like(hidden)

    def cross_entropy(
        self, model: nn.Module, tokens: Tensor, hidden: Tensor, counted: Tensor, smoothing: float = 0.0
    ) -> Tensor:
        """Mean cross-entropy in nats over the tokens `counted`; all are (b, n)."""
        tokens, hidden, counted = (x.to(self.device, non_blocking=True) for x in (tokens, hidden, counted))
        tokens = tokens.long()
        with autocast(self.device, self.settings.precision):
            logits = model(tokens.masked_fill(hidden, self.model.mask_id), select=counted)  # (s, k)
        return F.cross_entropy(logits.float(), tokens[counted], label_smoothing=smoothing)

    def fetch(self, step: int, indices: Tensor) -> list[tuple[Tensor, Tensor, float]]:
        """The pieces of a step's batch: this process's tokens of the images `indices`, mirrored or not, hidden, share.

        share x the piece's mean over its tokens that count, averaged over the processes, is its part of the mean over
        all that count in the batch: pieces hide unequal numbers.
        """
        generator = torch.Generator().manual_seed(mix(self.settings.seed, 3, step))
        hidden = self.hide(len(indices), generator)
        views = torch.randint(len(self.train), indices.shape, generator=generator)
        count, pieces = self.counted(hidden).sum(), []
        for rows, view, mine in zip(*(cut(x, self.settings.accumulate) for x in (indices, views, hidden)), strict=True):
            share = float(self.counted(mine).sum() / count) * world()
            pieces.append((staged(self.train[view, rows], self.device), staged(mine, self.device), share))
        return pieces

    def update(self, step: int, pieces: list[tuple[Tensor, Tensor, float]]) -> dict[str, Tensor]:
        """One step of the optimizer on what `fetch` made."""
        total = torch.zeros((), device=self.device)
        for tokens, hidden, share in pieces_of(self.network, pieces):
            smoothing = self.settings.label_smoothing
            loss = self.cross_entropy(self.network, tokens, hidden, self.counted(hidden), smoothing) * share
            loss.backward()
            total += loss.detach()
        apply_gradients(total, self.optimizer, self.model.parameters(), self.settings.clip)
        return {"loss": total}

    def validate(self, model: nn.Module) -> dict:
        """Cross-entropy of what the training counts, hidden by its policy (`score`), and of what the holes of each
        family hide; filled pictures."""
        hidden = self.hide(len(self.val), torch.Generator().manual_seed(self.settings.seed))
        figures = {"score": self._mean_loss(model, hidden, self.counted(hidden))}
        figures |= {family: self._mean_loss(model, hidden, hidden) for family, hidden in self.holes.items()}
        return figures | {"pictures": self._preview(model)}

    def _mean_loss(self, model: nn.Module, hidden: Tensor, counted: Tensor) -> float:
        pieces = list(zip(*(x.split(64) for x in (self.val, hidden, counted)), strict=True))
        sums = [float(self.cross_entropy(model, *piece)) * int(piece[2].sum()) for piece in pieces]
        return sum(sums) / int(counted.sum())

    def _preview(self, model: nn.Module) -> Tensor:
        """Some validation images; below, for some families, their holes and how they are filled.

        Images, holes and seeds are always the same: from one validation to the next only the model differs.
        """
        frozen = copy.deepcopy(model)  # an Inpainter freezes what it is given
        inpainter = Inpainter(self.vqgan, frozen, self.decoding, self.device, self.settings.precision)
        images, rows = self.images, [self.images]
        for family in PREVIEWED:
            hole = make_holes(family, len(images), images.shape[-1])
            rows += [images.masked_fill(hole, GREY), inpainter(images, hole).images]
        return grid(torch.cat(rows), columns=len(images))


def same_weights(one: VQGAN, other: VQGAN) -> bool:
    """Whether two models are bit-equal (two files of the same weights are not: the order of their metadata varies)."""
    tensors, others = one.state_dict(), other.state_dict()
    return one.config == other.config and all(torch.equal(tensor, others[key]) for key, tensor in tensors.items())


def frozen_vqgan(path: str | None, folder: Path, config: Config) -> VQGAN:
    """The VQGAN that makes the tokens; one from elsewhere is copied into `folder`, where inference looks for it.

    Raises FileNotFoundError where there is none, ValueError where it does not fit or `folder` has another one.
    """
    own = folder / "vqgan.safetensors"
    source = Path(path or own)
    if not source.is_file():
        raise FileNotFoundError(f"{source}: no VQGAN there; train one with training_vqgan.py, or pass --vqgan FILE")
    vqgan = VQGAN.load(source, None if source.suffix == ".safetensors" else config.vqgan)
    if (vqgan.config.grid, vqgan.config.codebook.codes) != (config.vqgan.grid, config.vqgan.codebook.codes):
        raise ValueError(f"{source}: another token grid or number of codes than the config's vqgan section")
    if not own.is_file():
        save_weights(own, vqgan, vqgan.config, torch.float32, source=str(source))
    elif not same_weights(VQGAN.load(own), vqgan):  # it may be stage 1's best, or that of a transformer to resume
        raise ValueError(f"{own}: another VQGAN than {source}; take another --out, or remove it")
    return vqgan


def main(argv: list[str] | None = None) -> None:
    """The command line; see --help."""
    start_logging()
    parser = training_parser(__doc__, "transformer_training")
    parser.add_argument("--vqgan", help="weights of stage 1, e.g. VQGAN.pt (default: vqgan.safetensors in --out)")
    args, config, folder = parse_training(parser, argv)
    try:
        device, store = join_processes(args.device), open_store(folder, config.data)
        with first_on_machine():
            vqgan = frozen_vqgan(args.vqgan, folder, config).to(device)
        train, val = load_images(config.data, vqgan.config.image_size, store)
        key = vqgan.tokens_key()
        tokens = load_tokens(vqgan, train, key, device, 1 + config.data.flip, store)
        (val_tokens,) = load_tokens(vqgan, val, key, device, 1, store)
        torch.manual_seed(config.transformer_training.seed)
        stage = Stage2(config, device, vqgan, tokens, val_tokens, val.images)
        notes = {"decoding": config.decoding.model_dump_json(), "vqgan": key}
        settings, optimizers = config.transformer_training, {"adam": stage.optimizer}
        run = Run("transformer", folder, settings, len(train), stage.model, optimizers, notes=notes)
        if args.resume:
            run.resume()
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    counts = f"{len(train)} training and {len(val)} validation images, {run.steps} steps"
    log.info(f"stage 2: {counts}, on {world()} x {device.type}")
    run.fit(stage.fetch, stage.update, stage.validate, args.profile)
    log.info(f"weights: {run.weights}")
    leave_processes()


if __name__ == "__main__":
    main()
