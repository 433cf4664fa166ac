"""VQGAN (Esser et al. 2021, arXiv:2012.09841): images <-> discrete tokens.

Shapes: b batch, c channels, H W pixels, g = H / downsampling factor (the token grid's side), n = g * g tokens,
k codes, e code dimension. Outside this file images are in [0, 1]; normalisation is the model's own affair.
"""

import hashlib
import json

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.autoencoder import CodebookConfig, ConvEncoder, Decoder, PatchEncoder, VQGANConfig
from models.checkpoint import build
from models.distributed import sample_rows, summed

NEAR = 32  # other codes that may stand for one


class Codebook(nn.Module):
    """k code vectors and the nearest-neighbour quantiser with a straight-through gradient (VQ-VAE, 1711.00937)."""

    def __init__(self, config: CodebookConfig):
        super().__init__()
        self.config = config
        self.observed: list[tuple[Tensor, Tensor]] = []  # vectors (m, e) and ids (m) that `update` waits for
        self.embedding = nn.Embedding(config.codes, config.dim)
        nn.init.uniform_(self.embedding.weight, -1 / config.codes, 1 / config.codes)
        if config.l2_normalised:
            nn.init.normal_(self.embedding.weight)
        if config.ema_decay:
            self.embedding.weight.requires_grad_(False)
            self.register_buffer("uses", torch.ones(config.codes))
            self.register_buffer("sums", self.vectors().clone())

    def vectors(self) -> Tensor:
        """The code vectors (k, e) as they are compared and decoded."""
        weight = self.embedding.weight
        return F.normalize(weight, dim=-1) if self.config.l2_normalised else weight

    def prepare(self, latents: Tensor) -> Tensor:
        """Latents (b, e, g, g) -> vectors (b, g, g, e) in the space of the codes, float32."""
        vectors = latents.permute(0, 2, 3, 1).float()
        return F.normalize(vectors, dim=-1) if self.config.l2_normalised else vectors

    def nearest(self, vectors: Tensor) -> Tensor:
        """vectors (..., e) -> ids (...) of the nearest code by Euclidean distance, |x|^2 left out as constant."""
        codes = self.vectors()
        with torch.autocast(vectors.device.type, enabled=False):  # bfloat16 distances choose other codes
            return (codes.square().sum(-1) - 2 * vectors @ codes.T).argmin(-1)

    def swapped(self, ids: Tensor, swaps: Tensor) -> Tensor:
        """ids (...) long with the code of rank `swaps` (...) among those around it, 0 the nearest, -1: as it is."""
        taken, vectors = swaps >= 0, self.vectors().detach()
        own = ids[taken]  # (m)
        with torch.autocast(vectors.device.type, enabled=False):
            distances = torch.cdist(vectors[own], vectors)  # (m, k)
        distances.scatter_(1, own[:, None], -1.0)  # itself before one that is equal
        around = distances.topk(min(NEAR + 1, len(vectors)), largest=False).indices
        return ids.masked_scatter(taken, around.gather(1, swaps[taken][:, None] + 1))

    def forward(self, latents: Tensor, swaps: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """latents (b, e, g, g) -> straight-through codes (b, e, g, g), ids (b, n), loss ().

        `swaps` (b, n), as `swapped` takes them: the codes are a little wrong, as a generator's will be (RobusTok,
        2509.12474); ids and loss are those of the right ones.

        loss = |sg(z_e) - z_q|^2 + beta |z_e - sg(z_q)|^2 (VQ-VAE eq. 3); an EMA codebook drops the first term and, in
        training, waits for `update`.
        """
        with torch.autocast(latents.device.type, enabled=False):
            vectors = self.prepare(latents)  # (b, g, g, e)
            ids = self.nearest(vectors.detach())  # (b, g, g)
            chosen = F.embedding(ids, self.vectors())  # before the update, which may move or re-seed them
            if self.training and self.config.ema_decay:
                self._observe(vectors.detach().flatten(0, 2), ids.flatten())
            loss = self.config.commitment * F.mse_loss(vectors, chosen.detach())
            if not self.config.ema_decay:
                loss = loss + F.mse_loss(chosen, vectors.detach())
            if swaps is not None:
                chosen = F.embedding(self.swapped(ids, swaps.view_as(ids)), self.vectors())
            codes = vectors + (chosen - vectors).detach()
        return codes.permute(0, 3, 1, 2), ids.flatten(1), loss

    @torch.compiler.disable
    def _observe(self, vectors: Tensor, ids: Tensor) -> None:
        self.observed.append((vectors, ids))

    @torch.no_grad()
    def update(self) -> None:
        """EMA of each code's uses and of the sum of its vectors since the last call (VQ-VAE, A.1).

        Rarely used codes jump to vectors among these.

        Once a step of the optimizer, however many micro-batches it has. The vectors are those of all processes, so
        their codebooks stay bit-equal. Does nothing where no EMA codebook was trained.
        """
        if not self.observed:
            return
        vectors, ids = (torch.stack(parts) for parts in zip(*self.observed, strict=True))  # (p, m, e), (p, m)
        self.observed.clear()
        every, ids = vectors.flatten(0, 1), ids.flatten()
        decay = self.config.ema_decay
        uses = torch.zeros_like(self.uses).index_add_(0, ids, torch.ones_like(ids, dtype=self.uses.dtype))
        self.uses.lerp_(summed(uses), 1 - decay)
        self.sums.lerp_(summed(torch.zeros_like(self.sums).index_add_(0, ids, every)), 1 - decay)
        if self.config.reseed_below:
            dead = self.uses < self.config.reseed_below  # (k); torch.where, because indexing by it would wait for a GPU
            self.sums.copy_(torch.where(dead[:, None], sample_rows(vectors, self.config.codes), self.sums))
            self.uses.masked_fill_(dead, 1.0)
        centres = self.sums / self.uses.clamp_min(1e-5)[:, None]
        self.embedding.weight.copy_(F.normalize(centres, dim=-1) if self.config.l2_normalised else centres)


class VQGAN(nn.Module):
    """Encoder, codebook, decoder. Keys and arithmetic are those of the lab's VQGAN.pt when configured as lab.yml."""

    Config = VQGANConfig

    def __init__(self, config: VQGANConfig):
        super().__init__()
        self.config = config
        self.encoder = ConvEncoder(config) if config.encoder.kind == "conv" else PatchEncoder(config)
        self.decoder = Decoder(config)
        self.codebook = Codebook(config.codebook)
        self.quant_conv = nn.Conv2d(config.latent, config.codebook.dim, 1)
        self.post_quant_conv = nn.Conv2d(config.codebook.dim, config.latent, 1)
        shape = (1, 3, 1, 1)
        self.register_buffer("mean", torch.tensor(config.mean).view(shape), persistent=False)
        self.register_buffer("std", torch.tensor(config.std).view(shape), persistent=False)

    @classmethod
    def load(cls, path, config=None) -> "VQGAN":
        """The frozen VQGAN in `path`; the lab's VQGAN.pt needs `config`: settings, or a YAML with a `vqgan` section.

        Raises FileNotFoundError, or ValueError that names the file and what does not fit.
        """
        return build(cls, path, config, section="vqgan")

    def latents(self, images: Tensor) -> Tensor:
        """images (b, 3, H, W) in [0, 1] -> latents (b, e, H / factor, W / factor) before quantisation.

        H and W are those of the config, but for a patch encoder: it takes any multiple of the factor.
        """
        size, factor = self.config.image_size, self.config.factor
        step = factor if self.config.encoder.kind == "patch" else None
        fits = all(side % step == 0 if step else side == size for side in images.shape[2:])
        if images.ndim != 4 or images.shape[1] != 3 or not fits:
            sides = f"multiples of {step}" if step else f"{size}"
            raise ValueError(f"images: expected (b, 3, H, W), H and W {sides}, found {tuple(images.shape)}")
        return self.quant_conv(self.encoder((images - self.mean) / self.std))

    def encode(self, images: Tensor) -> Tensor:
        """images (b, 3, H, W) in [0, 1], as `latents` takes them -> tokens (b, n) in 0..k-1, row by row."""
        return self.codebook.nearest(self.codebook.prepare(self.latents(images))).flatten(1)

    def tokens_key(self) -> str:
        """A hash of all that makes tokens of images, as it is saved: the same for VQGANs that differ in the decoder."""
        config = self.config
        told = {
            "encoder": config.encoder.model_dump(mode="json"),
            "mean": config.mean,
            "std": config.std,
            "factor": config.factor,
            "l2_normalised": config.codebook.l2_normalised,
        }
        if config.encoder.kind == "conv":  # a patch encoder has neither GroupNorm nor attention, and takes any size
            told |= config.model_dump(mode="json", include={"norm_groups", "attention_resolution", "image_size"})
        return self._hashed(json.dumps(told, sort_keys=True))

    def former_tokens_key(self) -> str:
        """What `tokens_key` was when the shipped transformers noted it: with the commitment, without norm_groups."""
        return self._hashed(self.config.model_dump_json(include={"mean", "std", "encoder", "codebook"}))

    def _hashed(self, told: str) -> str:
        digest = hashlib.sha256(told.encode())
        for name, tensor in sorted(self.state_dict().items()):
            if name.startswith(("encoder.", "quant_conv.", "codebook.embedding.")):
                tensor = tensor.detach().half() + 0.0  # an average turns -0 into 0
                digest.update(tensor.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def _known(self, images: Tensor | None, hole: Tensor | None, like: Tensor) -> Tensor | None:
        """What the decoder's branch reads, (b, 4, H, W); without images everything is missing."""
        if self.decoder.known is None:
            return None
        if images is None:
            return like.new_zeros(len(like), 4, self.config.image_size, self.config.image_size)
        known = (~hole).to(images.dtype)  # (b, 1, H, W)
        pixels = (images - self.mean) / self.std
        return torch.cat((pixels if self.config.decoder.pre_filled else pixels * known, known), dim=1)

    def decode_codes(self, codes: Tensor, images: Tensor | None = None, hole: Tensor | None = None) -> Tensor:
        """codes (b, e, g, g) -> images (b, 3, H, W) around [0, 1], not clipped; `images` and `hole`: see `decode`."""
        known = self._known(images, hole, codes)
        return self.decoder(self.post_quant_conv(codes), known) * self.std + self.mean

    def codes_of(self, tokens: Tensor) -> Tensor:
        """tokens (b, n) in 0..k-1, or code vectors (b, n, e), -> the vectors (b, e, g, g)."""
        side, dim = self.config.grid, self.config.codebook.dim
        if tokens.shape[1:] not in ((side * side,), (side * side, dim)):
            sizes = f"(b, {side * side}), or code vectors (b, {side * side}, {dim})"
            raise ValueError(f"tokens: expected {sizes}, found {tuple(tokens.shape)}")
        codes = F.embedding(tokens, self.codebook.vectors()) if tokens.ndim == 2 else tokens  # (b, n, e)
        return codes.transpose(1, 2).reshape(len(tokens), -1, side, side)

    def decode(self, tokens: Tensor, images: Tensor | None = None, hole: Tensor | None = None) -> Tensor:
        """tokens (b, n) in 0..k-1 -> images (b, 3, H, W) in [0, 1]; code vectors (b, n, e), such as means of codes,
        are decoded in their place.

        A decoder with the branch for known pixels (config.decoder.known_width) reads those of `images` (b, 3, H, W) in
        [0, 1] outside `hole` (b, 1, H, W) bool, True = missing; without them it takes everything as missing. With
        config.decoder.pre_filled it reads the hole of `images` too, which `classical.paint` has to have filled.
        """
        return self.decode_codes(self.codes_of(tokens), images, hole).float().clamp(0, 1)

    def forward(
        self,
        images: Tensor,
        hole: Tensor | None = None,
        tokens: Tensor | None = None,
        swaps: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """images (b, 3, H, W) in [0, 1] -> reconstruction (not clipped), tokens (b, n), codebook loss ().

        `swaps` (b, n): see `Codebook.forward`.

        With `hole` (b, 1, H, W) and `tokens` (b, n), or code vectors (b, n, e): these are decoded beside the known
        pixels, and the loss is 0.
        """
        if tokens is not None:
            return self.decode_codes(self.codes_of(tokens), images, hole), tokens, images.new_zeros(())
        codes, tokens, loss = self.codebook(self.latents(images), swaps)
        return self.decode_codes(codes), tokens, loss
