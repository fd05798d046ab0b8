"""FedZO (Fang et al. 2022, arXiv 2201.09531): federated averaging of zeroth-order steps.

    g = c sum_u (f(x + mu u) - f(x)) / mu u      over q directions u: 1 query for f(x), and one each

    sphere   uniform on the unit sphere, independent       c = d / q           the paper's, eq. 3
    rgf      Gaussian, then orthonormal                    c = 1 / q
    prgf     the same and the client's last update         c = 1 / (q + 1)     (arXiv 1906.06919)

In FZooS's round (arXiv 2308.04077) it is the one without a correction.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cograd.clients.fzoos.oracle import Oracle
from cograd.clients.fzoos.rounds import LocalGradient, ZerothOrder
from cograd.core.checks import check

KINDS = ("rgf", "prgf", "sphere")


@dataclass(frozen=True)
class FiniteDifferences(LocalGradient):
    """Gradients from differences along random directions; nothing is remembered.

    Args:
        directions: q.
        width: mu, in the units of the points.
        kind: ``rgf``, ``prgf`` or ``sphere``. Before the first update ``prgf`` draws a direction in its place.

    Raises ValueError for more orthonormal directions than dimensions and for a value at ``x`` that is not
    finite. A direction in which the value is not finite counts as one without a slope.
    """

    directions: int = 20
    width: float = 0.01
    kind: str = "rgf"

    def __post_init__(self) -> None:
        check(
            ("directions", self.directions, ">= 1", self.directions >= 1),
            ("width", self.width, "> 0 and finite", 0 < self.width < math.inf),
            ("kind", self.kind, f"one of {', '.join(KINDS)}", self.kind in KINDS),
        )

    def estimate(self, x: Tensor, t: int, oracle: Oracle) -> Tensor:
        along = self.draw(len(x), t, oracle)
        points = torch.cat([x[None], x + self.width * along.to(x.dtype)])
        values = oracle.query(points)
        base = float(values[0])
        if not math.isfinite(base):
            raise ValueError(f"the function must be finite at its client's point; got {base}")
        slopes = ((values[1:] - base) / self.width).nan_to_num_(0.0, 0.0, 0.0)
        g: Tensor = slopes @ along
        return g * ((len(x) if self.kind == "sphere" else 1) / len(along))

    def draw(self, dim: int, t: int, oracle: Oracle) -> Tensor:
        """The directions of step ``t``, rows of length 1, float64."""
        count, last = self.directions, oracle.state.get("update") if self.kind == "prgf" else None
        extra = self.kind == "prgf" and (last is None or not bool(last.any()))
        drawn = oracle.ctx.stream("directions", t).normal(count + extra, dim, device=oracle.ctx.initial.device)
        rows = drawn.double()
        if self.kind == "sphere":
            return nn.functional.normalize(rows)
        if last is not None and not extra:  # the prior comes first, so that it stays as it is
            rows = torch.cat([last.double()[None], rows])
        if len(rows) > dim:
            raise ValueError(
                f"directions must be <= {dim - len(rows) + count} in {dim} dimensions; got {count}"
            )
        q, r = torch.linalg.qr(rows.T)
        columns: Tensor = q * r.diagonal().sign()  # as Gram and Schmidt have them
        return columns.T


@dataclass
class FedZO(ZerothOrder):
    """Shared: the model up and down, 8P bytes a participant and round. Queries: T (q + 1)."""

    gradient: LocalGradient = FiniteDifferences()
