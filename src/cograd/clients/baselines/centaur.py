"""CENTAUR (Shen et al. 2023, arXiv 2309.05505): first each client's head, then what all share, with noise.

    client: some epochs of SGD on h_i alone; then x by noisy, clipped gradients as in DP-FedAvg, h_i fixed;
            keep h_i, send the change of x
    server: x <- x + mean of the changes, unweighted

FedRep with DP-SGD in its second phase. What epsilon covers is as in PPSGD.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from cograd.clients.baselines.dp_fedavg import Privacy, refuse_clip
from cograd.clients.baselines.fedrep import FedRep
from cograd.engines.federated.protocol import ClientContext


@dataclass
class CENTAUR(FedRep):
    """Shared: as FedPer. ``head_lr`` is the head's learning rate; None takes ``local``'s."""

    head_epochs: int = 1
    head_lr: float | None = None
    privacy: Privacy = field(kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_clip(self.local)

    def fit(self, ctx: ClientContext, data: Any, start: Tensor, mine: Tensor) -> Tensor:
        if self.head_epochs and bool(mine.any()):
            lr = self.local.lr if self.head_lr is None else self.head_lr
            head = replace(self.local, lr=lr, epochs=self.head_epochs, steps=None)
            start = self._part(head, ctx, data, start, mine)
        return self.privacy.run(self.local, ctx, data, start, ~mine, alone=True)
