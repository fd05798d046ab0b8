"""FZooS: gradients of the trajectory's surrogate, corrected by surrogates of random features."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from cograd.clients.fzoos.features import RandomFeatures
from cograd.clients.fzoos.gp import GPSurrogate, Posterior
from cograd.clients.fzoos.oracle import Oracle
from cograd.clients.fzoos.rounds import Description, LocalGradient, ZerothOrder
from cograd.core.checks import check


@dataclass(frozen=True)
class Active:
    """Active queries: of random candidates, those at which the surrogate's gradient is least certain.

    Args:
        local, local_candidates, radius: after each local step but the last, so many of so many candidates
            uniform in the cube x +- radius.
        server, server_candidates: at the server's new point, in a cube of half the mean absolute coordinate
            difference to the client's own point (``radius`` where there is no difference).
        initial: queries uniform in x_0 +- radius, once.
    """

    local: int = 5
    local_candidates: int = 100
    radius: float = 0.01
    server: int = 50
    server_candidates: int = 200
    initial: int = 10

    def __post_init__(self) -> None:
        local, server = self.local_candidates, self.server_candidates
        check(
            ("local", self.local, f"in 0 .. {local}", 0 <= self.local <= local),
            ("radius", self.radius, "> 0 and finite", 0 < self.radius < math.inf),
            ("server", self.server, f"in 0 .. {server}", 0 <= self.server <= server),
            ("initial", self.initial, ">= 1", self.initial >= 1),
        )


@dataclass(frozen=True)
class TrajectoryGradient(LocalGradient):
    """The gradient of the posterior mean through all that a client has ever asked: no query for itself.

    Args:
        surrogate: what is fitted, anew at every step.
        active: what else is asked.
        keep: queries that a client remembers, the latest; None keeps all. The trajectory takes 4 (d + 2) bytes
            a query in single precision.
    """

    surrogate: GPSurrogate = GPSurrogate()
    active: Active = Active()
    keep: int | None = None

    def __post_init__(self) -> None:
        check(("keep", self.keep, ">= 2 or None", self.keep is None or self.keep >= 2))

    def estimate(self, x: Tensor, t: int, oracle: Oracle) -> Tensor:
        if not len(oracle.values):
            start = oracle.uniform(x, self.active.radius, self.active.initial, "initial")
            oracle.query(start, remember=True)
        oracle.query(x[None], remember=True)
        if t > 1:
            self._explore(x, self.active.radius, self.active.local, self.active.local_candidates, oracle, t)
        found = self.posterior(x, oracle)
        oracle.state["lengthscale"] = found.lengthscale
        return found.gradient(x)

    def finish(self, x: Tensor, oracle: Oracle) -> None:
        oracle.query(x[None], remember=True)
        oracle.forget(self.keep)

    def survey(self, x: Tensor, spread: float, oracle: Oracle) -> None:
        oracle.query(x[None], remember=True)
        radius = spread / 2 or self.active.radius
        self._explore(x, radius, self.active.server, self.active.server_candidates, oracle, 0)
        oracle.forget(self.keep)

    def posterior(self, x: Tensor, oracle: Oracle, lengthscale: float | None = None) -> Posterior:
        """The surrogate of the queries nearest to ``x``."""
        return self.surrogate.fit(*oracle.nearest(x, self.surrogate.neighbours), lengthscale)

    def _explore(self, x: Tensor, radius: float, count: int, candidates: int, oracle: Oracle, t: int) -> None:
        """Ask where the gradient is least certain. Certainty depends on where was asked and not on what came of
        it: the length scale is that of the last fit."""
        if not count:
            return
        points = oracle.uniform(x, radius, candidates, "candidates", t)
        known = self.posterior(x, oracle, oracle.state.get("lengthscale"))
        oracle.query(points[known.uncertainty(points).topk(count).indices], remember=True)


@dataclass
class FZooS(ZerothOrder):
    """FZooS. Shared: d + M floats up and d + M down a client and round, M the number of random features.

    The first M floats that a client receives are zeros. A client asks its function 10 times once and 1 + T +
    5 (T - 1) + 1 + 50 times a round (2 more with the safeguard), whatever d is.

    Args:
        gradient: of the local surrogate; see `TrajectoryGradient`.
        description: the random features; see `RandomFeatures`. None leaves correction and survey out.

    The others are `ZerothOrder`'s. The correction's length is 1/t.
    """

    gradient: LocalGradient = TrajectoryGradient()
    description: Description | None = RandomFeatures()
    decay: float = 1.0

    def queries(self, rounds: int) -> int:
        """What a client asks in so many rounds, for `TrajectoryGradient` and functions that are finite."""
        if not isinstance(self.gradient, TrajectoryGradient):
            raise TypeError(f"gradient must be a TrajectoryGradient; got {type(self.gradient).__name__}")
        active, steps = self.gradient.active, self.local_steps
        local = 1 + steps + active.local * (steps - 1)
        survey = 1 + active.server if self.description is not None else 0
        return active.initial + rounds * (local + survey + 2 * self.safeguard)
