"""PPSGD (Bietti et al. 2022, arXiv 2202.05318): local and shared weights trained at once, the shared ones with
noise.

    client: (x, h_i); in each step x moves by a noisy, clipped gradient as in DP-FedAvg, h_i by a plain one of
            the same examples; keep h_i, send the change of x
    server: as FedAvg

With nothing private it is DP-FedAvg. The paper clips and hides whole clients; here, as in the comparisons of
the literature, single examples. The noise then hides an example's own gradients in x; through h_i, which learns
without noise, it also acts on those of other examples, which the accounting does not cover. Take epsilon for a
measure of the noise.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from cograd.clients.baselines.dp_fedavg import Privacy, refuse_clip
from cograd.clients.baselines.fedper import FedPer
from cograd.engines.federated.protocol import ClientContext


@dataclass
class PPSGD(FedPer):
    """Shared: as FedPer."""

    privacy: Privacy = field(kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_clip(self.local)

    def fit(self, ctx: ClientContext, data: Any, start: Tensor, mine: Tensor) -> Tensor:
        return self.privacy.run(self.local, ctx, data, start, ~mine)
