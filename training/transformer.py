"""Stage 2: what a step of training a transformer on cached tokens does."""

import copy
import hashlib
from collections.abc import Iterator
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from config import Config
from maskgit.classical import paint
from maskgit.data import GREY, to_float
from maskgit.dataset import ImageDataset, Maps, Store
from maskgit.hiding import HidingPolicy
from maskgit.inpainter import Inpainter
from maskgit.masks import FAMILIES, make_holes, to_hidden
from maskgit.visualize import sheet_of
from models.checkpoint import save_weights
from models.distributed import rank, world
from models.transformer import Transformer
from models.vqgan import VQGAN
from training.run import VAL_SEED, start_from
from training.stepping import apply_gradients, micro_batches, parallel, shard, staged
from utils import autocast, first_on_machine, images_at_once, mix

PREVIEWS, PREVIEWED = 8, ("walk", "thick", "box", "half")  # images, and the families of their holes


@torch.no_grad()
def encode(vqgan: VQGAN, pictures: Maps, device: torch.device, views: int = 1) -> Iterator[np.ndarray]:
    """uint8 pictures (3, H_i, W_i) -> their token maps end to end, then (2 views) those of the mirrored pictures.

    What is left of a side over a multiple of the token's is cut off. In float32: what inference will see.
    """
    factor = vqgan.config.factor
    for view in range(views):
        starts = range(0, len(pictures), 64)
        for start in tqdm(starts, desc="tokens", unit="batch", mininterval=1.0, disable=rank() > 0):
            maps = [pictures[i] for i in range(start, min(start + 64, len(pictures)))]
            maps = [x[:, : x.shape[1] // factor * factor, : x.shape[2] // factor * factor] for x in maps]
            tokens = {}
            for shape in {x.shape for x in maps}:
                alike = [i for i, x in enumerate(maps) if x.shape == shape]
                for some in torch.tensor(alike).split(images_at_once(device)):  # more would leave a CPU's caches
                    batch = to_float(torch.stack([maps[i] for i in some]).to(device))
                    found = vqgan.encode(batch.flip(-1) if view else batch).int().cpu().numpy()
                    tokens |= dict(zip(some.tolist(), found, strict=True))
            yield np.concatenate([tokens[i] for i in range(len(maps))])


def load_tokens(vqgan: VQGAN, images: ImageDataset, key: str, device: torch.device, views: int, store: Store) -> Maps:
    """Token maps (1, h_i, w_i) of the pictures in `images`, then of the mirrored ones where `views` is 2; int16 where
    the codes fit. `key` names the VQGAN's weights.

    Raises ValueError for whole pictures and an encoder whose tokens depend on more than their patch.
    """
    if images.windows == "random" and vqgan.config.encoder.kind != "patch":
        raise ValueError("data.windows: random needs vqgan.encoder.kind: patch in stage 2, which cuts windows out of "
                         "the token map of a whole picture")  # fmt: skip
    key = hashlib.sha256(f"{images.key} {key} {views}".encode()).hexdigest()
    dtype = np.int16 if vqgan.config.codebook.codes <= 2**15 else np.int32
    sizes = (images.maps.sizes // vqgan.config.factor).repeat(views, 1)
    shape = (int(sizes.prod(dim=1).sum()),)
    with first_on_machine():
        chunks = encode(vqgan, images.maps, device, views)
        return Maps(store.keep(f"{images.name}_tokens", key, shape, chunks, dtype), sizes, channels=1)


class TransformerTrainer:
    """Loss and validation of a transformer on cached token maps.

    `train` has those of the mirrored pictures behind the others; `val` (N, n) are the tokens of `images` (N, 3, H, W)
    uint8, which are validated on. Training and validation hide as inference does: by `decoding.token_rule`. Validation
    also shows what inference shows: the tokens of known cells are those of the picture whose hole is painted.
    """

    def __init__(self, config: Config, device: torch.device, vqgan: VQGAN, train: Maps, val: Tensor, images: Tensor):
        self.settings, self.device, self.vqgan, self.train = config.transformer_training, device, vqgan, train
        count = self.settings.validate_on or len(val)
        self.val, self.images, self.previews = val[:count], images[:count], images[:PREVIEWS]
        settings, size, self.side, self.decoding = (
            self.settings, vqgan.config.image_size, vqgan.config.grid, config.decoding,
        )  # fmt: skip
        self.views = 1 + config.data.flip
        self.model = Transformer(config.transformer).to(device)
        if settings.init:
            start_from(self.model, settings.init)
        elif settings.start_from_codes:
            generator = torch.Generator().manual_seed(mix(settings.seed, 0))
            self.model.init_from_codes(vqgan.codebook.vectors(), generator)
        self.network = parallel(self.model, settings.compile)
        self.optimizer = torch.optim.Adam(self.model.parameters(), settings.learning_rate, settings.betas, fused=True)
        policy = partial(
            HidingPolicy, settings.hiding, self.side, size, settings.bernoulli, rule=config.decoding.token_rule
        )
        self.hide, self.hide_val = policy(seed=settings.seed), policy(bank=256, seed=VAL_SEED)

    @cached_property  # the first process alone validates
    def shown(self) -> dict[str, tuple[Tensor, Tensor]]:
        return {family: self._shown(family) for family in FAMILIES}

    @torch.no_grad()
    def _shown(self, family: str) -> tuple[Tensor, Tensor]:
        """What inference is shown of the validation images under a family of holes: tokens and hidden, (N, n) each."""
        hole = make_holes(family, len(self.images), self.images.shape[-1], VAL_SEED)
        painted = Maps.of(paint(self.images, hole, self.decoding.pre_fill))
        tokens = torch.from_numpy(np.concatenate(list(encode(self.vqgan, painted, self.device))))
        return tokens.view(self.val.shape), to_hidden(hole, self.side, rule=self.decoding.token_rule)

    def counted(self, hidden: Tensor) -> Tensor:
        """The tokens (b, n) whose cross-entropy is the loss: the hidden ones, or all where `loss_on` says so."""
        return hidden if self.settings.loss_on == "hidden" else torch.ones_like(hidden)

    def cross_entropy(
        self,
        model: nn.Module,
        tokens: Tensor,
        hidden: Tensor,
        counted: Tensor,
        smoothing: float = 0.0,
        shown: Tensor | None = None,
    ) -> Tensor:
        """Mean cross-entropy in nats over the tokens `counted`; all are (b, n).

        `shown`: the tokens that the model sees where they are not hidden; None: the true ones.
        """
        tokens, hidden, counted = (x.to(self.device, non_blocking=True) for x in (tokens, hidden, counted))
        tokens = tokens.long()
        seen = tokens if shown is None else shown.to(self.device).long()
        with autocast(self.device, self.settings.precision):
            logits = model(seen.masked_fill(hidden, self.model.mask_id), select=counted)  # (s, k)
        return F.cross_entropy(logits.float(), tokens[counted], label_smoothing=smoothing)

    def fetch(self, step: int, indices: Tensor) -> list[tuple[Tensor, Tensor, float]]:
        """The micro-batches of a step: this process's tokens of the images `indices`, mirrored or not, hidden, share.

        share x the mean over its tokens that count, averaged over the processes, is its part of the mean over
        all that count in the batch: micro-batches hide unequal numbers.
        """
        generator = torch.Generator().manual_seed(mix(self.settings.seed, 3, step))
        hidden = self.hide(len(indices), generator)
        mirrored = torch.randint(self.views, indices.shape, generator=generator)
        windows = self.train.draw(indices + mirrored * (len(self.train) // self.views), self.side, generator)
        count, batch = self.counted(hidden).sum(), []
        for rows, mine in zip(*(shard(x, self.settings.accumulate) for x in (windows, hidden)), strict=True):
            share = float(self.counted(mine).sum() / count) * world()
            tokens = self.train.read(rows, self.side).flatten(1)
            batch.append((staged(tokens, self.device), staged(mine, self.device), share))
        return batch

    def update(self, step: int, batch: list[tuple[Tensor, Tensor, float]]) -> dict[str, Tensor]:
        """One step of the optimizer on what `fetch` made."""
        total = torch.zeros((), device=self.device)
        for tokens, hidden, share in micro_batches(self.network, batch):
            smoothing = self.settings.label_smoothing
            loss = self.cross_entropy(self.network, tokens, hidden, self.counted(hidden), smoothing) * share
            loss.backward()
            total += loss.detach()
        apply_gradients(total, self.optimizer, self.model.parameters(), self.settings.clip)
        return {"loss": total}

    def validate(self, model: nn.Module) -> dict:
        """Cross-entropy of what the training counts, hidden by its policy (`score`), and by family of holes that of the
        hidden tokens, beside what inference shows; filled pictures."""
        hidden = self.hide_val(len(self.val), torch.Generator().manual_seed(VAL_SEED))
        figures = {"score": self._mean_loss(model, hidden, self.counted(hidden), self.val)}
        figures |= {
            family: self._mean_loss(model, hidden, hidden, shown)
            for family, (shown, hidden) in self.shown.items()
            if hidden.any()
        }
        return figures | {"pictures": self._preview(model)}

    def _mean_loss(self, model: nn.Module, hidden: Tensor, counted: Tensor, shown: Tensor) -> float:
        total = 0.0
        for tokens, *masks, seen in zip(*(x.split(64) for x in (self.val, hidden, counted, shown)), strict=True):
            if count := int(masks[1].sum()):
                total += float(self.cross_entropy(model, tokens, *masks, shown=seen)) * count
        return total / int(counted.sum())

    def _preview(self, model: nn.Module) -> Tensor:
        """Some validation images; below, for some families, their holes and how they are filled.

        Images, holes and seeds are always the same: from one validation to the next only the model differs.
        """
        frozen = copy.deepcopy(model)  # an Inpainter freezes what it is given
        inpainter = Inpainter(self.vqgan, frozen, self.decoding, self.device, self.settings.precision)
        images = self.previews
        rows = [images]
        for family in PREVIEWED:
            hole = make_holes(family, len(images), images.shape[-1], VAL_SEED)
            rows += [images.masked_fill(hole, GREY), inpainter.complete(images, hole, range(len(images))).images]
        return sheet_of(torch.cat(rows), columns=len(images))


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
