"""FedRep (Collins et al. 2021, arXiv 2102.07078, algorithm 1): first each client's head, then what all share.

    client: some epochs of SGD on h_i alone with the received x fixed; then some on x alone with h_i fixed;
            keep h_i, send the change of x
    server: x <- x + mean of the changes, unweighted

With nothing private it is FedAvg with equal weights, with everything private local training of the head's
epochs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from cograd.clients.baselines.fedper import FedPer
from cograd.engines.federated.protocol import ClientContext
from cograd.engines.federated.training import LocalSGD, clip


@dataclass
class FedRep(FedPer):
    """Shared: as FedPer.

    Args:
        local: training of the shared part, and of the private one but for its length.
        head_epochs: of the private part, before.
    """

    weighted: bool = False
    head_epochs: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.head_epochs < 0:
            raise ValueError(f"head_epochs must be >= 0; got {self.head_epochs}")

    def fit(self, ctx: ClientContext, data: Any, start: Tensor, mine: Tensor) -> Tensor:
        if self.head_epochs and bool(mine.any()):
            head = replace(self.local, epochs=self.head_epochs, steps=None)
            start = self._part(head, ctx, data, start, mine)
        return self._part(self.local, ctx, data, start, ~mine) if not bool(mine.all()) else start

    @staticmethod
    def _part(local: LocalSGD, ctx: ClientContext, data: Any, start: Tensor, part: Tensor) -> Tensor:
        """Train the entries of ``part`` alone. Clipping and weight decay see no others."""

        def gradient(v: Tensor, x: Tensor, y: Tensor) -> Tensor:
            ctx.count("grad", 1)
            g = ctx.model.gradient(v, x, y).mul_(part)
            clip(g, local.max_norm)
            return g.add_(v * part, alpha=local.weight_decay) if local.weight_decay else g

        return replace(local, max_norm=None, weight_decay=0.0).run(ctx, data, start, gradient)
