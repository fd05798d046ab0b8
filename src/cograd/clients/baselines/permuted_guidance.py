"""FedLEx with G in a random order: what is left when no entry has its own value any more.

exploration: as in FedLEx
rounds:      the values of G change places at random, within each tensor, or within the whole model where G
             was normalised as one
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cograd.clients.fedlex import FedLEx
from cograd.engines.federated.protocol import Session


@dataclass
class PermutedGuidance(FedLEx):
    """Shared: as in `FedLEx`. The order is drawn once a session, and stays when G is refreshed."""

    def shape(self, guidance: Tensor, session: Session) -> Tensor:
        draws, whole = session.stream("permuted guidance"), [slice(0, len(guidance))]
        parts = [s.slice for s in session.space] if self.scope == "tensor" else whole
        return torch.cat([guidance[p][draws.permutation(p.stop - p.start)] for p in parts])
