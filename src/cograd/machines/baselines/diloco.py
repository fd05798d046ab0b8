"""DiLoCo (arXiv:2311.08105) and local averaging: Streaming DiLoCo's special cases that it is compared with."""

from __future__ import annotations

import torch
from torch import nn

from cograd.core.codecs import Float32
from cograd.core.ledger import Ledger
from cograd.engines.overlap import Overlapping
from cograd.engines.transport import TorchDist
from cograd.machines.streaming_diloco.fragments import whole
from cograd.machines.streaming_diloco.method import StreamingDiLoCo
from cograd.machines.streaming_diloco.outer import PAPER_OUTER, Outer, nesterov


class DiLoCo(StreamingDiLoCo):
    """Every H = ``sync_every`` steps all parameters at once, in float32, while everyone waits.

    Arguments as for `StreamingDiLoCo`. ``alpha`` above 0 keeps a share of the replica's own weights, which
    DiLoCo does not.
    """

    def __init__(
        self,
        model: nn.Module,
        inner: torch.optim.Optimizer,
        *,
        sync_every: int = 100,
        outer: Outer = PAPER_OUTER,
        alpha: float = 0.0,
        transport: Overlapping | TorchDist | None = None,
        ledger: Ledger | None = None,
    ) -> None:
        super().__init__(
            model,
            inner,
            fragments=whole,
            sync_every=sync_every,
            outer=outer,
            overlap=0,
            alpha=alpha,
            codec=Float32(),
            transport=transport,
            ledger=ledger,
        )


class LocalAveraging(DiLoCo):
    """Every H steps all weights become their mean over the replicas: DiLoCo whose outer step is all the way."""

    def __init__(
        self,
        model: nn.Module,
        inner: torch.optim.Optimizer,
        *,
        sync_every: int = 100,
        transport: Overlapping | TorchDist | None = None,
        ledger: Ledger | None = None,
    ) -> None:
        outer = nesterov(lr=1.0, momentum=0.0)
        super().__init__(model, inner, sync_every=sync_every, outer=outer, transport=transport, ledger=ledger)
