"""A Llama-style language model: RMSNorm, rotary positions, grouped-query attention, SwiGLU, tied embeddings."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes. Raises ValueError where heads do not divide the width, or key-value heads the heads."""

    vocabulary: int
    width: int
    blocks: int
    heads: int
    kv_heads: int
    hidden: int
    rope_base: float = 10_000.0
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.width % self.heads or self.heads % self.kv_heads or self.head_width % 2:
            raise ValueError(
                f"heads must divide width into even parts, and kv_heads heads; got width={self.width}, "
                f"heads={self.heads}, kv_heads={self.kv_heads}"
            )

    @property
    def head_width(self) -> int:
        return self.width // self.heads


class Llama(nn.Module):
    """Token ids (B, T) -> logits (B, T, vocabulary). Positions count from the left, so pad on the right.

    ``forward`` is ``head(tail(prefix(ids, n), n))`` for any n: the blocks before n, the blocks from n on, and
    the output. Where only late blocks change, what the prefix gives may be kept.
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.blocks))
        self.norm = nn.RMSNorm(config.width, config.norm_eps)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.tail(self.prefix(ids, 0), 0))

    def prefix(self, ids: Tensor, blocks: int) -> Tensor:
        """The hidden states (B, T, width) that enter block ``blocks``."""
        hidden: Tensor = self.embedding(ids)
        return self._through(hidden, range(blocks))

    def tail(self, hidden: Tensor, blocks: int) -> Tensor:
        """From there through the remaining blocks and the last norm."""
        return self.norm(self._through(hidden, range(blocks, len(self.blocks))))  # type: ignore[no-any-return]

    def head(self, hidden: Tensor, tokens: Tensor | None = None) -> Tensor:
        """Logits of all tokens, or of some: (..., width) -> (..., vocabulary or len(tokens))."""
        weight = self.embedding.weight if tokens is None else self.embedding.weight[tokens]
        return F.linear(hidden, weight)

    def _through(self, hidden: Tensor, which: range) -> Tensor:
        angles = rotations(hidden.shape[1], self.config, hidden)
        for i in which:
            hidden = self.blocks[i](hidden, angles)
        return hidden


class Block(nn.Module):
    """Attention and SwiGLU, each behind a norm and added to what came in."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.width, config.norm_eps)
        self.attention = Attention(config)
        self.feed_norm = nn.RMSNorm(config.width, config.norm_eps)
        self.feed = SwiGLU(config.width, config.hidden)

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.attention(self.attention_norm(x), angles)
        return x + self.feed(self.feed_norm(x))  # type: ignore[no-any-return]


class Attention(nn.Module):
    """Causal self-attention; each key-value head serves heads / kv_heads queries."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.heads, config.kv_heads
        narrow = config.kv_heads * config.head_width
        self.q = nn.Linear(config.width, config.width, bias=False)
        self.k = nn.Linear(config.width, narrow, bias=False)
        self.v = nn.Linear(config.width, narrow, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        def split(projected: Tensor, heads: int) -> Tensor:
            parts: Tensor = projected.unflatten(-1, (heads, -1))
            return parts.transpose(1, 2)

        q, k, v = split(self.q(x), self.heads), split(self.k(x), self.kv_heads), split(self.v(x), self.kv_heads)
        q, k = rotate(q, angles), rotate(k, angles)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.heads != self.kv_heads)
        return self.out(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))  # type: ignore[no-any-return]


class LoRA(nn.Module):
    """y = base(x) + (alpha / rank) x A^T B^T: a frozen layer and a trainable update of low rank.

    A (rank, in) starts Gaussian of variance 1 / in and B (out, rank) at zero, so the layer starts as it was.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float, draw: torch.Generator) -> None:
        super().__init__()
        if rank < 1:
            raise ValueError(f"rank must be >= 1; got {rank}")
        self.base, self.scale = base.requires_grad_(False), alpha / rank
        start = torch.randn(rank, base.in_features, generator=draw) / base.in_features**0.5
        self.a = nn.Parameter(start.to(base.weight.device))
        self.b = nn.Parameter(torch.zeros(base.out_features, rank, device=base.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        update = F.linear(F.linear(x, self.a.to(x.dtype)), self.b.to(x.dtype))
        return torch.add(self.base(x), update, alpha=self.scale)


def add_lora(model: Llama, rank: int, alpha: float, seed: int, first: int = 0) -> None:
    """Freeze the model and give the query and value projections of blocks ``first`` .. last an update each."""
    model.requires_grad_(False)
    draw = torch.Generator().manual_seed(seed)
    for i in range(first, len(model.blocks)):
        for name in ("q", "v"):
            layer = model.get_submodule(f"blocks.{i}.attention.{name}")
            assert isinstance(layer, nn.Linear), "it has an update already"
            model.set_submodule(f"blocks.{i}.attention.{name}", LoRA(layer, rank, alpha, draw))


def rotations(length: int, config: LlamaConfig, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines of rotary positions: (length, head_width / 2) each."""
    steps = torch.arange(0, config.head_width, 2, device=like.device, dtype=torch.float32)
    frequencies = config.rope_base ** (-steps / config.head_width)
    angles = torch.arange(length, device=like.device, dtype=torch.float32)[:, None] * frequencies
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def rotate(x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Turn each pair of entries (i, i + half) of every head by its position's angle: (B, heads, T, width)."""
    cos, sin = angles
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)
