"""SCAFFOLD (Karimireddy et al. 2020, arXiv 1910.06378) of zeroth order: control variates are estimates.

    x <- step(x, g + gamma (c - c_i)),   c = sum_i p_i c_i

    kind 1   c_i is the client's gradient at x_r, asked for with q + 1 more queries      (option I)
    kind 2   c_i is the mean of its local gradients of the round before                  (option II)

In FZooS's round (arXiv 2308.04077) these are the surrogates whose gradient is the same everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from cograd.clients.baselines.fedzo import FiniteDifferences
from cograd.clients.fzoos.oracle import Oracle
from cograd.clients.fzoos.rounds import Description, LocalGradient, ZerothOrder
from cograd.core.checks import check


@dataclass(frozen=True)
class Constant(Description):
    """A gradient (d,) that holds everywhere."""

    def size(self, dim: int) -> int:
        return dim

    def gradient(self, z: Tensor, w: Tensor, seed: int) -> Tensor:
        return w


@dataclass(frozen=True)
class PointGradient(Constant):
    """The client's gradient at the server's point."""

    def weights(self, x: Tensor, oracle: Oracle, gradient: LocalGradient) -> Tensor:
        return gradient.estimate(x, 0, oracle)


@dataclass(frozen=True)
class MeanGradient(Constant):
    """The mean of the client's local gradients, before they were corrected."""

    def weights(self, x: Tensor, oracle: Oracle, gradient: LocalGradient) -> Tensor:
        slope: Tensor = oracle.state["slope"]
        return slope


@dataclass
class ZOScaffold(ZerothOrder):
    """Shared: the model and a control variate, 8P bytes up and 8P down, a participant and round.

    Args:
        kind: 1 or 2.
    """

    gradient: LocalGradient = FiniteDifferences()
    description: Description | None = field(default=None, init=False)
    kind: int = 1

    def __post_init__(self) -> None:
        check(("kind", self.kind, "1 or 2", self.kind in (1, 2)))
        self.description = PointGradient() if self.kind == 1 else MeanGradient()
        super().__post_init__()
