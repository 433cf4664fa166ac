"""The bidirectional transformer of MaskGIT (Chang et al., arXiv 2202.04200): tokens, some hidden -> logits for each.

Shapes: b batch, n tokens (a square grid in row-major order), d width, h heads, k codes, e codebook width,
s selected tokens. Ids 0..k-1 are codes; id k, `mask_id`, stands for a hidden token and is an input only: the
embedding has k+1 rows, the head k columns.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from models.checkpoint import build
from models.settings import Settings

INIT_SD = 0.02  # of every weight matrix and embedding, as in BERT and MaskGIT
NORM_EPS = 1e-5
# RoFormer turns by 10000^(-2i/d), made for rows of hundreds of words; on a grid 16 tokens wide half of those angles
# would hardly move. 100 is the base of axial rotary positions in vision transformers (Heo et al., arXiv 2403.13298).
ROTARY_BASE = 100.0


class TransformerConfig(Settings):
    """The options of a `Transformer`."""

    codes: int = Field(1024, ge=2, description="codes k in the VQGAN's codebook")
    tokens: int = Field(256, ge=1, description="tokens n of an image, a square number")
    width: int = Field(ge=1, description="width d of a token, a multiple of heads")
    depth: int = Field(ge=1, le=1000, description="number of blocks")
    heads: int = Field(ge=1, description="attention heads h of a block")
    mlp_width: int = Field(ge=1, description="hidden width of a block's MLP")
    dropout: float = Field(ge=0, lt=1, description="dropout on the embedding and on what a block adds")
    attention_dropout: float = Field(ge=0, lt=1, description="dropout on the attention weights")
    norm: Literal["pre", "post"] = Field(description="LayerNorm before each sublayer, or after its sum (BERT, the lab)")
    positions: Literal["learned", "rotary"] = Field(
        description="a learned vector a position, or queries and keys turned by row and column (RoFormer)"
    )
    tied: bool = Field(description="the output head shares the input embedding's first k rows")
    position_bias: bool = Field(description="a bias on the logits per (position, id) as in MaskGIT, else per id")
    attention_bias: bool = Field(False, description="biases in the query, key, value and output projections")

    @model_validator(mode="after")
    def _fits(self):
        if self.width % self.heads:
            raise ValueError(f"width {self.width}: expected a multiple of heads ({self.heads})")
        if self.positions == "rotary" and (self.width // self.heads) % 4:
            raise ValueError(
                f"positions rotary: expected width / heads to be a multiple of 4, "
                f"found {self.width} / {self.heads} = {self.width // self.heads}"
            )
        if math.isqrt(self.tokens) ** 2 != self.tokens:
            raise ValueError(f"tokens {self.tokens}: expected a square number such as 256")
        return self


class Rotary(nn.Module):
    """Turns queries and keys by their token's place, so that q . k depends on row and column differences only.

    Pair i of a head's dimensions, (i, i + d/2), is a point in the plane, turned by frequency x row for the first half
    of the pairs and by frequency x column for the second: RoFormer (Su et al., arXiv 2104.09864, section 3.2.2) on two
    axes.
    """

    def __init__(self, side: int, head_width: int):
        super().__init__()
        frequencies = ROTARY_BASE ** -(torch.arange(0, head_width, 4) / head_width)  # (d/4,)
        places = torch.arange(side)
        rows, columns = places.repeat_interleave(side), places.repeat(side)  # (n,) each
        angles = torch.cat([torch.outer(rows, frequencies), torch.outer(columns, frequencies)], dim=1)  # (n, d/2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., n, d of one head) -> the same shape and lengths, each token turned by its place."""
        first, second = x.chunk(2, dim=-1)  # (..., n, d/2)
        return torch.cat([first * self.cos - second * self.sin, second * self.cos + first * self.sin], dim=-1)


class Dropout(nn.Dropout):
    """nn.Dropout (Srivastava et al. 2014), with cheaper draws on a CPU: 16 random bits an element.

    There torch's own draws take longer than the attention's products. `p` is rounded down to a multiple of 2^-16.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and self.p and x.device.type == "cpu") or torch.compiler.is_compiling():
            return super().forward(x)
        words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        draws = words.view(torch.int16)[: x.numel()].view(x.shape)  # uniform in -2^15..2^15 - 1
        count = int(self.p * 2**16)  # of the 2^16 values that drop
        return x.masked_fill(draws < count - 2**15, 0.0) * (2**16 / (2**16 - count))


class MultiHeadAttention(nn.Module):
    """Self-attention of every token to every token: softmax(q k^T / sqrt(d/h)) v (Vaswani et al., arXiv 1706.03762)."""

    def __init__(self, width: int, heads: int, dropout: float, bias: bool = False):
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width, bias=bias)
        self.key = nn.Linear(width, width, bias=bias)
        self.value = nn.Linear(width, width, bias=bias)
        self.output = nn.Linear(width, width, bias=bias)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, rotary: Rotary | None = None, select: Tensor | None = None) -> Tensor:
        """x (b, n, d) -> (b, n, d), or (s, d) where `select` (b, n) is True; `rotary` turns queries and keys only."""
        scale = (x.shape[-1] // self.heads) ** -0.5
        query = self._split(self.query(x) * scale)  # (b*h, n, d/h); scaled here, n/(d/h) times fewer products
        key = self._split(self.key(x))  #             (b*h, n, d/h)
        value = self._split(self.value(x))  #         (b*h, n, d/h)
        if rotary is not None:
            query, key = rotary(query), rotary(key)
        scores = torch.bmm(query, key.transpose(1, 2))  # (b*h, n, n)
        weights = self.dropout(scores.softmax(dim=-1))  # (b*h, n, n)
        mixed = self._merge(torch.bmm(weights, value))  # (b, n, d)
        return self.output(mixed if select is None else mixed[select])

    def _split(self, x: Tensor) -> Tensor:
        """(b, n, d) -> (b*h, n, d/h), contiguous: one batched product then serves all heads of all images."""
        b, n, d = x.shape
        return x.view(b, n, self.heads, d // self.heads).transpose(1, 2).reshape(b * self.heads, n, d // self.heads)

    def _merge(self, x: Tensor) -> Tensor:
        """(b*h, n, d/h) -> (b, n, d), the inverse of `_split`."""
        bh, n, d = x.shape
        return x.view(bh // self.heads, self.heads, n, d).transpose(1, 2).reshape(bh // self.heads, n, self.heads * d)


class MLP(nn.Sequential):
    """Linear, GELU, linear on each token: (..., d) -> (..., d)."""

    def __init__(self, width: int, hidden_width: int):
        super().__init__(nn.Linear(width, hidden_width), nn.GELU(), nn.Linear(hidden_width, width))


class Block(nn.Module):
    """Attention, then MLP, each added to its input; LayerNorm before them (pre) or after the sums (post)."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.post_norm = config.norm == "post"
        self.attention = MultiHeadAttention(
            config.width, config.heads, config.attention_dropout, bias=config.attention_bias
        )
        self.attention_norm = nn.LayerNorm(config.width, eps=NORM_EPS)
        self.mlp = MLP(config.width, config.mlp_width)
        self.mlp_norm = nn.LayerNorm(config.width, eps=NORM_EPS)
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Tensor, rotary: Rotary | None = None, select: Tensor | None = None) -> Tensor:
        """x (b, n, d) -> (b, n, d), or (s, d) where `select` (b, n) is True: the others are attended to, no more."""
        kept = x if select is None else x[select]
        if self.post_norm:
            x = self.attention_norm(kept + self.dropout(self.attention(x, rotary, select)))
            return self.mlp_norm(x + self.dropout(self.mlp(x)))
        x = kept + self.dropout(self.attention(self.attention_norm(x), rotary, select))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class Transformer(nn.Module):
    """Logits over the codes for every token, each token seeing all the others (MaskGIT, section 3.1).

    Post-norm follows BERT: LayerNorm on the embedding, none after the last block. Pre-norm has it the other way round.
    The head is BERT's: linear, GELU, LayerNorm, projection to the codes, bias.
    """

    Config = TransformerConfig

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.config = config
        learned, pre_norm = config.positions == "learned", config.norm == "pre"
        self.embedding = nn.Embedding(config.codes + 1, config.width)
        self.positions = nn.Parameter(torch.empty(config.tokens, config.width)) if learned else None
        self.rotary = None if learned else Rotary(math.isqrt(config.tokens), config.width // config.heads)
        self.input_norm = nn.Identity() if pre_norm else nn.LayerNorm(config.width, eps=NORM_EPS)
        self.dropout = Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.output_norm = nn.LayerNorm(config.width, eps=NORM_EPS) if pre_norm else nn.Identity()
        self.head = nn.Sequential(
            nn.Linear(config.width, config.width), nn.GELU(), nn.LayerNorm(config.width, eps=NORM_EPS)
        )
        self.projection = None if config.tied else nn.Parameter(torch.empty(config.codes, config.width))
        self.bias = nn.Parameter(torch.empty((config.tokens, config.codes) if config.position_bias else config.codes))
        self._init_weights()

    @classmethod
    def load(cls, path, config=None) -> "Transformer":
        """The frozen transformer in the weights file `path`; `config`: see `models.base.build`, which also raises."""
        return build(cls, path, config, section="transformer")

    @property
    def mask_id(self) -> int:
        """The id k of a hidden token: an input, never an output."""
        return self.config.codes

    @property
    def output_codes(self) -> Tensor:
        """(k, d): the vectors that a token's features are compared with to give its logits."""
        return self.embedding.weight[: self.mask_id] if self.projection is None else self.projection

    def forward(self, tokens: Tensor, select: Tensor | None = None) -> Tensor:
        """tokens (b, n) ids in 0..k, k where hidden -> logits (b, n, k).

        With `select` (b, n) bool: logits (s, k) of the True tokens only, in row-major order; they equal
        `forward(tokens)[select]` and spare most of the last block and the head for the rest, as when the loss reads
        hidden tokens only.
        Raises ValueError on a wrong shape; an id outside 0..k raises IndexError on the CPU.
        """
        self._check(tokens, select)
        x = self.embedding(tokens)  #                        (b, n, d)
        if self.positions is not None:
            x = x + self.positions  #                        (b, n, d)
        x = self.dropout(self.input_norm(x))  #              (b, n, d)
        for block in self.blocks[:-1]:
            x = block(x, self.rotary)  #                     (b, n, d)
        x = self.blocks[-1](x, self.rotary, select)  #       (b, n, d) or (s, d)
        bias = self.bias  #                                  (k,) or (n, k)
        if select is not None and self.config.position_bias:
            bias = F.embedding(torch.where(select)[1], bias)  # (s, k)
        return F.linear(self.head(self.output_norm(x)), self.output_codes) + bias  # (b, n, k) or (s, k)

    def of_hidden(self, tokens: Tensor) -> Tensor:
        """tokens (b, n) -> logits (m, k) of the hidden ones, in row-major order: what `decoding.sample` asks for."""
        return self(tokens, select=tokens == self.mask_id)

    @torch.no_grad()
    def init_from_codes(self, codes: Tensor, generator: torch.Generator) -> None:
        """Starts the embedding of the codes, and the output head, from the codebook `codes` (k, e).

        A random projection e -> d with orthonormal rows (columns, where e > d) keeps the angles between the codes
        (nearly, where e > d); their root mean square becomes the usual initial standard deviation. The mask id's row
        stays as it is. `generator` is a CPU generator. Raises ValueError on a wrong shape, or on codes that are all
        zero or not finite.
        """
        k, d = self.mask_id, self.config.width
        if codes.ndim != 2 or len(codes) != k:
            raise ValueError(f"codes: expected shape ({k}, e), found {tuple(codes.shape)}")
        codes = codes.detach().float().cpu()
        size = codes.square().mean().sqrt()
        if not 0 < size < math.inf:
            raise ValueError(f"codes: expected finite vectors that are not all zero, found root mean square {size:g}")
        e = codes.shape[1]
        basis = torch.linalg.qr(torch.randn(max(d, e), min(d, e), generator=generator)).Q  # orthonormal columns
        vectors = codes @ (basis.T if e <= d else basis)  # (k, d)
        vectors *= INIT_SD / vectors.square().mean().sqrt()
        self.embedding.weight[:k] = vectors
        if self.projection is not None:
            self.projection.copy_(vectors)

    def _check(self, tokens: Tensor, select: Tensor | None) -> None:
        if tokens.ndim != 2 or tokens.shape[1] != self.config.tokens:
            raise ValueError(f"tokens: expected shape (b, {self.config.tokens}), found {tuple(tokens.shape)}")
        if select is not None and (select.dtype != torch.bool or select.shape != tokens.shape):
            raise ValueError(
                f"select: expected bool of shape {tuple(tokens.shape)}, found {select.dtype} of {tuple(select.shape)}"
            )

    @torch.no_grad()
    def _init_weights(self) -> None:
        """Truncated normal (two standard deviations) for matrices and embeddings, zeros for biases."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.ndim > 1:  # LayerNorm's scale, a vector, keeps its ones
                nn.init.trunc_normal_(parameter, std=INIT_SD, a=-2 * INIT_SD, b=2 * INIT_SD)
        if self.config.norm == "pre":  # 2 * depth sums: keeps the stream's variance from growing with depth (GPT-2)
            for block in self.blocks:
                for last in (block.attention.output, block.mlp[-1]):
                    last.weight.mul_((2 * self.config.depth) ** -0.5)
