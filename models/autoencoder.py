"""The convolutional autoencoder of a VQGAN (Esser et al. 2021, arXiv:2012.09841): its settings, encoders and decoder.

Shapes: b batch, c channels, H W pixels, g = H / downsampling factor (the token grid's side).
"""

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from models.settings import Settings

Widths = Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(strict=False, min_length=1, max_length=16)]
Levels = Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(strict=False)]
Channels = Annotated[tuple[float, float, float], Field(strict=False)]


class EncoderConfig(Settings):
    """`conv` is the lab's stack of ResBlocks; `patch` maps every patch alone, so no token sees its neighbours."""

    kind: Literal["conv", "patch"] = Field(description="the lab's stack of ResBlocks, or every patch by itself")
    stem: int = Field(ge=1, description="width after the first convolution")
    widths: Widths = Field(description="width of each level (conv) or of the blocks (patch: one value)")
    blocks: int = Field(ge=1, le=1000, description="ResBlocks a level, or MLP blocks of the patch encoder")
    downsample_after: Levels = Field((), description="levels followed by a halving of the resolution (conv)")


class DecoderConfig(Settings):
    """Convolution, ResBlock, attention, ResBlock, then levels of ResBlocks with an upsampling after some."""

    widths: Widths = Field(description="width of each level; the first is the middle's width too")
    blocks: int = Field(ge=1, le=1000, description="ResBlocks a level")
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

    image_size: int = Field(64, ge=4, description="side of an image in pixels")
    latent: int = Field(ge=1, description="width between encoder and quant_conv")
    norm_groups: int = Field(32, ge=1, description="groups of GroupNorm")
    attention_resolution: int = Field(16, ge=1, description="side at which attention follows each ResBlock")
    mean: Channels = Field((0.5, 0.5, 0.5), description="of the channels in [0, 1], taken away from an image")
    std: Channels = Field((0.5, 0.5, 0.5), description="of the channels, by which it is divided then")
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


def _level(blocks: int, width: int, target: int, side: int, config: VQGANConfig) -> list[nn.Module]:
    """Residual blocks from `width` to `target` channels on maps of `side`, with attention where the config says so."""
    layers: list[nn.Module] = []
    for entry in (width, *[target] * (blocks - 1)):
        layers.append(ResBlock(entry, target, config.norm_groups))
        if side == config.attention_resolution:
            layers.append(NonLocalBlock(target, config.norm_groups))
    return layers


class ConvEncoder(nn.Module):
    """images (b, 3, H, W), normalised -> latents (b, latent, g, g); the lab's layout, keys included."""

    def __init__(self, config: VQGANConfig):
        super().__init__()
        encoder, groups = config.encoder, config.norm_groups
        width, side = encoder.stem, config.image_size
        layers: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1)]
        for level, target in enumerate(encoder.widths):
            layers += _level(encoder.blocks, width, target, side, config)
            width = target
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
            layers += _level(decoder.blocks, width, target, side, config)
            width = target
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
