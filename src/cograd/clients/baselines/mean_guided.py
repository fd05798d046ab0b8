"""FedAvg with its learning rate times mean(G): what FedLEx must beat, or its guidance is no more than small
steps.

    exploration: as in FedLEx
    rounds:      G <- mean(G), for every entry

With SGD on gradients that is the base method at learning rate lr * mean(G), entry for entry.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cograd.clients.fedlex import FedLEx
from cograd.engines.federated.protocol import Session


@dataclass
class MeanGuided(FedLEx):
    """Shared: as in `FedLEx`, so that only the values of G differ."""

    def shape(self, guidance: Tensor, session: Session) -> Tensor:
        return torch.full_like(guidance, float(guidance.mean()))
