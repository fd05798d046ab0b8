"""FedProx (Li et al. 2020, arXiv 1812.06127) of zeroth order: its correction is a pull to the received point.

    x <- step(x, g + prox (x - x_r))

As in FZooS's comparison (arXiv 2308.04077), where prox is 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from cograd.clients.baselines.fedzo import FedZO
from cograd.core.checks import check


@dataclass
class ZOFedProx(FedZO):
    """Shared: as in `FedZO`, which it is with ``prox`` = 0.

    Args:
        prox: weight of the pull.
    """

    prox: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check(("prox", self.prox, ">= 0 and finite", 0 <= self.prox < math.inf))

    def corrected(self, g: Tensor, x: Tensor, t: int, start: Tensor, apart: Tensor | None, seed: int) -> Tensor:
        g = super().corrected(g, x, t, start, apart, seed)
        return g + self.prox * (x - start) if self.prox else g
