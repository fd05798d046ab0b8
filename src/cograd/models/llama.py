"""A Llama-style language model: RMSNorm, rotary positions, grouped-query attention, SwiGLU, tied embeddings."""

from __future__ import annotations

import copy
from collections.abc import Iterable
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
    """Token ids (B, T) -> logits (B, T, vocabulary). Positions count from the left, so pad on the right."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.blocks))
        self.norm = nn.RMSNorm(config.width, config.norm_eps)

    def forward(self, ids: Tensor) -> Tensor:
        return F.linear(self.norm(self.prefix(ids, len(self.blocks))), self.embedding.weight)

    def prefix(self, ids: Tensor, blocks: int) -> Tensor:
        """The hidden states (B, T, width) that enter block ``blocks``; to be kept if only later ones change."""
        return through(self.blocks[:blocks], self.embedding(ids), self.config)


class LlamaEnd(nn.Module):
    """A copy of a model from block ``first`` on, for training the end alone: `Llama.prefix` up to there (B, T,
    width) -> logits (B, len(tokens)) of some tokens after the last position. The output words do not train with
    it."""

    def __init__(self, model: Llama, first: int, tokens: Tensor) -> None:
        super().__init__()
        self.config = model.config
        self.blocks = copy.deepcopy(model.blocks[first:])
        self.norm = copy.deepcopy(model.norm)
        self.register_buffer("words", model.embedding.weight.detach()[tokens].clone())
        self.words: Tensor

    def forward(self, hidden: Tensor) -> Tensor:
        return F.linear(self.norm(through(self.blocks, hidden, self.config)[:, -1]), self.words)


def through(blocks: Iterable[nn.Module], hidden: Tensor, config: LlamaConfig) -> Tensor:
    """Hidden states (B, T, width) after some blocks."""
    angles = rotations(hidden.shape[1], config, hidden)
    for block in blocks:
        hidden = block(hidden, angles)
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


def add_lora(blocks: Iterable[nn.Module], rank: int, alpha: float, seed: int) -> None:
    """Freeze blocks and give the query and value projections of each an update of low rank."""
    draw = torch.Generator().manual_seed(seed)
    for block in blocks:
        block.requires_grad_(False)
        attention = block.get_submodule("attention")
        for name in ("q", "v"):
            layer = attention.get_submodule(name)
            if not isinstance(layer, nn.Linear):
                raise ValueError(f"blocks must be without updates; {name!r} is a {type(layer).__name__}")
            setattr(attention, name, LoRA(layer, rank, alpha, draw))


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
