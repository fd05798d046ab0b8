"""A small decoder-only transformer for next-token prediction."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class GPT(nn.Module):
    """Tokens (B, T), int64, T <= context -> logits (B, T, vocabulary).

    Pre-norm blocks (LayerNorm, causal attention with normalised queries and keys, GELU), learned positions, no
    biases, no dropout. The output layer is a matrix of its own, or the embedding itself if ``tied``. Weights
    are normal with standard deviation 0.02, those that write to the residual stream less by sqrt(2 blocks).

    12 width^2 parameters a block and the embeddings: ``GPT(65, width=256, blocks=6, heads=4, context=128)``
    has 4.8 M. Raises ValueError for a size below 1 or a width that heads do not divide.
    """

    def __init__(
        self,
        vocabulary: int,
        *,
        width: int = 64,
        blocks: int = 6,
        heads: int = 4,
        context: int = 64,
        tied: bool = False,
    ) -> None:
        if min(vocabulary, width, blocks, heads, context) < 1 or width % heads:
            raise ValueError(
                "sizes must be >= 1 and width a multiple of heads; got "
                f"vocabulary={vocabulary}, width={width}, blocks={blocks}, heads={heads}, context={context}"
            )
        super().__init__()
        self.context = context
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(blocks))
        self.norm = _norm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                residual = name.endswith("out.weight")
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * blocks) if residual else 0.02)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


class Block(nn.Module):
    """Attention, then a two-layer perceptron four times as wide: x (B, T, width) -> the same shape."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = _norm(width), _norm(width)
        self.query_norm, self.key_norm = _norm(width // heads), _norm(width // heads)
        self.attention_in = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.mlp_in = nn.Linear(width, 4 * width, bias=False)
        self.mlp_out = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self._attention(self.attention_norm(x))
        hidden: Tensor = self.mlp_in(self.mlp_norm(x))
        return x + self.mlp_out(F.gelu(hidden))  # type: ignore[no-any-return]

    def _attention(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.attention_in(x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(self.query_norm(q), self.key_norm(k), v, is_causal=True)
        return self.attention_out(mixed.transpose(1, 2).reshape(batch, length, width))  # type: ignore[no-any-return]


def _norm(width: int) -> nn.LayerNorm:
    return nn.LayerNorm(width, bias=False)


def next_token_loss(logits: Tensor, targets: Tensor, z: float = 1e-4) -> Tensor:
    """Mean cross-entropy, plus ``z`` times the mean squared log-partition (z-loss), which keeps logits from
    drifting. ``logits`` (..., vocabulary), ``targets`` (...), int64; z = 0 is plain cross-entropy."""
    partition = torch.logsumexp(logits, -1)
    chosen = logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return (partition - chosen).mean() + z * partition.square().mean()
