"""Transforms: what a party does to a vector before it is coded, as small stages with state that chain.

A transform is a frozen value; its state is a dict of tensors that the caller owns. ``apply`` is given state as
a donation and may change it in place, the vector too. The transforms here are *elementwise*: element i of the
result depends on element i of the vector and of the state alone, so a chain may be applied to any slice of a
vector, and `run` applies it tile by tile: each tile stays in the processor's cache through all stages, which
makes a chain of n stages cost about one pass over memory rather than n.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

TILE = 1 << 18
"""Elements a tile: with three float32 vectors, 3 MB, about what a core's second-level cache holds."""


class Transform(Protocol):
    """One stage. ``slots`` names the state vectors it needs, each as long as the vector."""

    @property
    def slots(self) -> tuple[str, ...]: ...

    def apply(self, x: Tensor, state: dict[str, Tensor]) -> Tensor:
        """The transformed vector; may be a tensor of ``state``, which the next stage then must not change."""


@dataclass(frozen=True)
class Momentum:
    """Velocity of a gradient: u <- m u + g, out u; Nesterov: u <- m (u + g), out u + g.

    With Nesterov the state holds m times the velocity of `torch.optim.SGD`; both forms give that optimizer's
    update bit for bit. ``slot`` names the state vector. Raises ValueError unless 0 <= m < 1.
    """

    m: float
    nesterov: bool = False
    slot: str = "momentum"

    def __post_init__(self) -> None:
        if not 0 <= self.m < 1:
            raise ValueError(f"momentum must be in [0, 1); got {self.m}")

    @property
    def slots(self) -> tuple[str, ...]:
        return (self.slot,)

    def apply(self, x: Tensor, state: dict[str, Tensor]) -> Tensor:
        u = state[self.slot]
        if not self.nesterov:
            return u.mul_(self.m).add_(x)
        u.add_(x)
        update = x.add(u, alpha=self.m)
        u.mul_(self.m)
        return update


@dataclass(frozen=True)
class Accumulate:
    """What has not been sent yet: v <- v + x, out v. The sender subtracts from v what it sends."""

    slot: str = "residual"

    @property
    def slots(self) -> tuple[str, ...]:
        return (self.slot,)

    def apply(self, x: Tensor, state: dict[str, Tensor]) -> Tensor:
        return state[self.slot].add_(x)


def init(
    chain: Sequence[Transform],
    numel: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """The chain's state for a vector of ``numel`` elements: zeros under every slot's name."""
    return {slot: torch.zeros(numel, device=device, dtype=dtype) for stage in chain for slot in stage.slots}


def run(
    chain: Sequence[Transform],
    x: Tensor,
    state: dict[str, Tensor],
    at: int = 0,
    scale: float = 1.0,
    out: Tensor | None = None,
) -> None:
    """Apply a chain to ``scale * x``, a slice that starts at element ``at`` of the state's vectors.

    What comes out is in the state that the last stage left, and in ``out`` (as long as ``x``, and may be
    ``x``) if given, contiguous. ``x`` may have another floating dtype than the state.
    """
    x = x.reshape(-1)
    out = out.view(-1) if out is not None else None
    dtype = next(iter(state.values())).dtype if state else x.dtype
    for start in range(0, len(x), TILE):
        tile = x[start : start + TILE].to(dtype)
        if scale != 1.0:
            tile = tile * scale
        place = slice(at + start, at + start + len(tile))
        part = {slot: vector[place] for slot, vector in state.items()}
        for stage in chain:
            tile = stage.apply(tile, part)
        if out is not None:
            out[start : start + len(tile)].copy_(tile)
