"""VQGAN (Esser et al. 2021, arXiv:2012.09841): images <-> discrete tokens.

Shapes: b batch, c channels, H W pixels, g = H / downsampling factor (the token grid's side), n = g * g tokens,
k codes, e code dimension. Outside this file images are in [0, 1]; normalisation is the model's own affair.
"""

import hashlib
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from models.base import Settings, build
from models.processes import drawn, summed

Widths = Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(strict=False, min_length=1)]
Levels = Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(strict=False)]
Channels = Annotated[tuple[float, float, float], Field(strict=False)]


class EncoderConfig(Settings):
    """`conv` is the lab's stack of ResBlocks; `patch` maps every patch alone, so no token sees its neighbours."""

    kind: Literal["conv", "patch"]
    stem: int = Field(ge=1, description="width after the first convolution")
    widths: Widths = Field(description="width of each level (conv) or of the blocks (patch: one value)")
    blocks: int = Field(ge=1, description="ResBlocks a level, or MLP blocks of the patch encoder")
    downsample_after: Levels = Field((), description="levels followed by a halving of the resolution (conv)")


class DecoderConfig(Settings):
    """Convolution, ResBlock, attention, ResBlock, then levels of ResBlocks with an upsampling after some."""

    widths: Widths = Field(description="width of each level; the first is the middle's width too")
    blocks: int = Field(ge=1, description="ResBlocks a level")
    upsample_after: Levels = Field(description="levels followed by a doubling of the resolution")
    known_width: int = Field(0, ge=0, description="width of the branch that reads the known pixels; 0: no branch")
    pre_filled: bool = Field(False, description="the branch reads a classical first guess in the hole too, not 0 there")


class CodebookConfig(Settings):
    codes: int = Field(ge=2, description="number of codes, k")
    dim: int = Field(ge=1, description="dimension of a code, e")
    l2_normalised: bool = Field(False, description="compare directions only (ViT-VQGAN, arXiv:2110.04627)")
    ema_decay: float = Field(0.0, ge=0, lt=1, description="EMA codebook update (VQ-VAE, A.1); 0: learn by gradient")
    reseed_below: float = Field(0.0, ge=0, description="EMA uses a step under which a code is re-seeded; 0: never")
    commitment: float = Field(0.25, ge=0, description="weight beta of |z_e - sg(z_q)|^2")


class VQGANConfig(Settings):
    """Everything that rebuilds a VQGAN."""

    image_size: int = Field(64, ge=4)
    latent: int = Field(ge=1, description="width between encoder and quant_conv")
    norm_groups: int = Field(32, ge=1, description="groups of GroupNorm")
    attention_resolution: int = Field(16, ge=1, description="side at which attention follows each ResBlock")
    mean: Channels = (0.5, 0.5, 0.5)
    std: Channels = (0.5, 0.5, 0.5)
    encoder: EncoderConfig
    decoder: DecoderConfig
    codebook: CodebookConfig

    @property
    def factor(self) -> int:
        """Pixels a token's side."""
        return 2 ** len(self.decoder.upsample_after)

    @property
    def grid(self) -> int:
        """Tokens a side."""
        return self.image_size // self.factor

    @model_validator(mode="after")
    def _consistent(self):
        encoder, decoder = self.encoder, self.decoder
        if self.image_size % self.factor:
            raise ValueError(f"image_size {self.image_size} is no multiple of the downsampling factor {self.factor}")
        if encoder.kind == "conv" and len(encoder.downsample_after) != len(decoder.upsample_after):
            raise ValueError("encoder.downsample_after and decoder.upsample_after must be equally long")
        if encoder.kind == "patch" and (encoder.downsample_after or len(encoder.widths) != 1):
            raise ValueError("encoder.kind patch takes one width and no downsample_after: it cuts patches at once")
        for name, levels, widths in (
            ("encoder.downsample_after", encoder.downsample_after, encoder.widths),
            ("decoder.upsample_after", decoder.upsample_after, decoder.widths),
        ):
            if any(level >= len(widths) for level in levels) or len(set(levels)) != len(levels):
                raise ValueError(f"{name} {levels}: levels are numbered 0..{len(widths) - 1}, each at most once")
        if decoder.pre_filled and not decoder.known_width:
            raise ValueError("decoder.pre_filled is read by the branch for known pixels: set decoder.known_width")
        normed = decoder.widths + (() if encoder.kind == "patch" else (encoder.stem, *encoder.widths))
        if any(width % self.norm_groups for width in normed):
            raise ValueError(f"norm_groups {self.norm_groups} must divide every width, found {normed}")
        if min(self.std) <= 0:
            raise ValueError(f"std must be positive, found {self.std}")
        return self


class GroupNorm(nn.Module):
    """GroupNorm under the lab's key `gn`."""

    def __init__(self, width: int, groups: int):
        super().__init__()
        self.gn = nn.GroupNorm(groups, width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        layout = torch.channels_last
        slow = x.device.type == "cpu" and x.dtype == torch.bfloat16 and x.requires_grad
        if slow and x.is_contiguous(memory_format=layout):  # its backward pass takes 4 times as long as the plain one's
            return self.gn(x.contiguous()).contiguous(memory_format=layout)
        return self.gn(x)


class ResBlock(nn.Module):
    """x + conv(swish(norm(conv(swish(norm(x))))), with a 1x1 convolution on the skip where the width changes."""

    def __init__(self, width_in: int, width: int, groups: int):
        super().__init__()
        self.block = nn.Sequential(
            GroupNorm(width_in, groups),
            nn.SiLU(),
            nn.Conv2d(width_in, width, 3, padding=1),
            GroupNorm(width, groups),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
        )
        if width_in != width:
            self.channel_up = nn.Conv2d(width_in, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.channel_up(x) if hasattr(self, "channel_up") else x
        return skip + self.block(x)


class NonLocalBlock(nn.Module):
    """Single-head self-attention over the pixels of a feature map, softmax(q.k / sqrt(c)), with a residual."""

    def __init__(self, width: int, groups: int):
        super().__init__()
        self.norm = GroupNorm(width, groups)
        self.q = nn.Conv2d(width, width, 1)
        self.k = nn.Conv2d(width, width, 1)
        self.v = nn.Conv2d(width, width, 1)
        self.proj_out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:  # (b, c, h, w)
        b, c, h, w = x.shape
        normed = self.norm(x)
        q, k, v = (conv(normed).flatten(2).transpose(1, 2) for conv in (self.q, self.k, self.v))  # (b, h*w, c)
        weights = torch.softmax(q @ k.transpose(1, 2) * c**-0.5, dim=-1)  # (b, h*w, h*w)
        mixed = (weights.to(v.dtype) @ v).transpose(1, 2).reshape(b, c, h, w)
        return x + self.proj_out(mixed)


class Downsample(nn.Module):
    """Halves the side: pads right and bottom by one, then a convolution of stride 2."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles the side: nearest neighbour, then a convolution."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class ConvEncoder(nn.Module):
    """images (b, 3, H, W), normalised -> latents (b, latent, g, g); the lab's layout, keys included."""

    def __init__(self, config: VQGANConfig):
        super().__init__()
        encoder, groups = config.encoder, config.norm_groups
        width, side = encoder.stem, config.image_size
        layers: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1)]
        for level, target in enumerate(encoder.widths):
            for _ in range(encoder.blocks):
                layers.append(ResBlock(width, target, groups))
                width = target
                if side == config.attention_resolution:
                    layers.append(NonLocalBlock(width, groups))
            if level in encoder.downsample_after:
                layers.append(Downsample(width))
                side //= 2
        layers += [ResBlock(width, width, groups), NonLocalBlock(width, groups), ResBlock(width, width, groups)]
        layers += [GroupNorm(width, groups), nn.SiLU(), nn.Conv2d(width, config.latent, 3, padding=1)]
        self.model = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)


class PatchMLP(nn.Module):
    """x + MLP(norm(x)), each position alone; the norm is over channels, so nothing crosses positions."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:  # (b, g, g, c)
        return x + self.mlp(self.norm(x))


class PatchEncoder(nn.Module):
    """images (b, 3, H, W), normalised -> latents (b, latent, g, g), every patch encoded without its neighbours.

    A hole can therefore never change a known token: the leak of a convolutional encoder (its norms and attention
    see the whole picture) is gone by construction, as in PUT (Liu et al. 2022, arXiv:2205.05076).
    """

    def __init__(self, config: VQGANConfig):
        super().__init__()
        width = config.encoder.widths[-1]
        self.patchify = nn.Conv2d(3, config.encoder.stem, config.factor, stride=config.factor)
        self.stem = nn.Linear(config.encoder.stem, width)
        self.blocks = nn.Sequential(*(PatchMLP(width) for _ in range(config.encoder.blocks)))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, config.latent))

    def forward(self, images: Tensor) -> Tensor:
        x = self.patchify(images).permute(0, 2, 3, 1)  # (b, g, g, stem)
        return self.head(self.blocks(self.stem(x))).permute(0, 3, 1, 2)


class KnownPixels(nn.Module):
    """The known pixels and where they are -> features at every resolution of the decoder, coarse to fine.

    As in PUT (Liu et al. 2022, arXiv:2205.05076) and the asymmetric VQGAN (Zhu et al. 2023, arXiv:2306.04632): what is
    known of a half-known patch is lost in its token, and the decoder gets it back here.
    """

    def __init__(self, width: int, halvings: int):
        super().__init__()
        self.widths = [width * 2**level for level in range(halvings + 1)]  # fine to coarse
        self.stem = nn.Sequential(nn.Conv2d(4, width, 3, padding=1), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1))
        self.levels = nn.ModuleList(
            nn.Sequential(
                nn.SiLU(),
                nn.Conv2d(fine, coarse, 4, stride=2, padding=1),
                nn.SiLU(),
                nn.Conv2d(coarse, coarse, 3, padding=1),
            )
            for fine, coarse in zip(self.widths, self.widths[1:], strict=False)
        )

    def forward(self, known: Tensor) -> list[Tensor]:
        """known (b, 4, H, W): normalised pixels, where missing 0 or a first guess, and 1 where known."""
        features = [self.stem(known)]
        for level in self.levels:
            features.append(level(features[-1]))
        return features[::-1]


class Decoder(nn.Module):
    """latents (b, latent, g, g) -> images (b, 3, H, W), normalised; the lab's layout, keys included.

    With `known_width` it also reads the known pixels, whose features join after the first convolution, after every
    doubling and before the last norm, through 1x1 convolutions that start at zero: a decoder trained without the branch
    starts as it was.
    """

    def __init__(self, config: VQGANConfig):
        super().__init__()
        decoder, groups = config.decoder, config.norm_groups
        width, side = decoder.widths[0], config.grid
        layers: list[nn.Module] = [nn.Conv2d(config.latent, width, 3, padding=1)]
        layers += [ResBlock(width, width, groups), NonLocalBlock(width, groups), ResBlock(width, width, groups)]
        for level, target in enumerate(decoder.widths):
            for _ in range(decoder.blocks):
                layers.append(ResBlock(width, target, groups))
                width = target
                if side == config.attention_resolution:
                    layers.append(NonLocalBlock(width, groups))
            if level in decoder.upsample_after:
                layers.append(Upsample(width))
                side *= 2
        layers += [GroupNorm(width, groups), nn.Conv2d(width, 3, 3, padding=1)]  # no activation: the lab's layout
        self.model = nn.Sequential(*layers)
        self.known = KnownPixels(decoder.known_width, len(decoder.upsample_after)) if decoder.known_width else None
        if self.known:
            widths = {0: decoder.widths[0]}  # of the outputs that features join, by layer
            widths |= {i: layer.conv.out_channels for i, layer in enumerate(layers) if isinstance(layer, Upsample)}
            self.places = {index: level for level, index in enumerate(widths)}  # layer -> which features
            last = len(layers) - 3
            self.places[last], widths[last] = len(decoder.upsample_after), width
            sources = self.known.widths[::-1]
            self.joins = nn.ModuleList(nn.Conv2d(sources[level], widths[i], 1) for i, level in self.places.items())
            for join in self.joins:
                nn.init.zeros_(join.weight)
                nn.init.zeros_(join.bias)

    @property
    def last_layer(self) -> Tensor:
        """The last convolution's weight, where the adaptive GAN weight compares gradients (VQGAN eq. 7)."""
        return self.model[-1].weight

    def forward(self, latents: Tensor, known: Tensor | None = None) -> Tensor:
        """`known` (b, 4, H, W) as `KnownPixels` takes it, for a decoder with that branch."""
        if self.known is None:
            return self.model(latents)
        features, joins, x = self.known(known), iter(self.joins), latents
        for index, layer in enumerate(self.model):
            x = layer(x)
            if index in self.places:
                x = x + next(joins)(features[self.places[index]])
        return x


class Codebook(nn.Module):
    """k code vectors and the nearest-neighbour quantiser with a straight-through gradient (VQ-VAE, 1711.00937)."""

    def __init__(self, config: CodebookConfig):
        super().__init__()
        self.config = config
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

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """latents (b, e, g, g) -> straight-through codes (b, e, g, g), ids (b, n), loss ().

        loss = |sg(z_e) - z_q|^2 + beta |z_e - sg(z_q)|^2 (VQ-VAE eq. 3); an EMA codebook drops the first term.
        """
        with torch.autocast(latents.device.type, enabled=False):
            vectors = self.prepare(latents)  # (b, g, g, e)
            ids = self.nearest(vectors.detach())  # (b, g, g)
            chosen = F.embedding(ids, self.vectors())  # before the update, which may move or re-seed them
            if self.training and self.config.ema_decay:
                self._update(vectors.detach().flatten(0, 2), ids.flatten())
            loss = self.config.commitment * F.mse_loss(vectors, chosen.detach())
            if not self.config.ema_decay:
                loss = loss + F.mse_loss(chosen, vectors.detach())
            codes = vectors + (chosen - vectors).detach()
        return codes.permute(0, 3, 1, 2), ids.flatten(1), loss

    @torch.compiler.disable  # it speaks with the other processes
    @torch.no_grad()
    def _update(self, vectors: Tensor, ids: Tensor) -> None:
        """EMA of each code's uses and of the sum of its vectors; rarely used codes jump to vectors of this batch.

        The batch is that of all processes, so their codebooks stay bit-equal. vectors (m, e), ids (m).
        """
        decay = self.config.ema_decay
        uses = torch.zeros_like(self.uses).index_add_(0, ids, torch.ones_like(ids, dtype=self.uses.dtype))
        self.uses.lerp_(summed(uses), 1 - decay)
        self.sums.lerp_(summed(torch.zeros_like(self.sums).index_add_(0, ids, vectors)), 1 - decay)
        if self.config.reseed_below:
            dead = self.uses < self.config.reseed_below  # (k); torch.where, because indexing by it would wait for a GPU
            self.sums.copy_(torch.where(dead[:, None], drawn(vectors, self.config.codes), self.sums))
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
        digest = hashlib.sha256(self.config.model_dump_json(include={"mean", "std", "encoder", "codebook"}).encode())
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
        """tokens (b, n) in 0..k-1 -> their vectors (b, e, g, g)."""
        side = self.config.grid
        if tokens.ndim != 2 or tokens.shape[1] != side * side:
            raise ValueError(f"tokens: expected (b, {side * side}), found {tuple(tokens.shape)}")
        codes = F.embedding(tokens, self.codebook.vectors())  # (b, n, e)
        return codes.transpose(1, 2).reshape(len(tokens), -1, side, side)

    def decode(self, tokens: Tensor, images: Tensor | None = None, hole: Tensor | None = None) -> Tensor:
        """tokens (b, n) in 0..k-1 -> images (b, 3, H, W) in [0, 1].

        A decoder with the branch for known pixels (config.decoder.known_width) reads those of `images` (b, 3, H, W) in
        [0, 1] outside `hole` (b, 1, H, W) bool, True = missing; without them it takes everything as missing. With
        config.decoder.pre_filled it reads the hole of `images` too, which `classical.paint` has to have filled.
        """
        return self.decode_codes(self.codes_of(tokens), images, hole).float().clamp(0, 1)

    def forward(
        self, images: Tensor, hole: Tensor | None = None, tokens: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """images (b, 3, H, W) in [0, 1] -> reconstruction (not clipped), tokens (b, n), codebook loss ().

        With `hole` (b, 1, H, W) and `tokens` (b, n): these are decoded beside the known pixels, and the loss is 0.
        """
        if tokens is not None:
            return self.decode_codes(self.codes_of(tokens), images, hole), tokens, images.new_zeros(())
        codes, tokens, loss = self.codebook(self.latents(images))
        return self.decode_codes(codes), tokens, loss
