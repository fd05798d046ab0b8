"""How often each edge averages: uniform rates, and the rates of least total (arXiv:2208.00779, Sec. 3).

The rate Laplacian Lam of edge rates lambda_ij must satisfy chi_1[Lam] chi_2[Lam] <= 1/2. Scaling the rates by c
divides the product by c^2, so any shape of rates can be made admissible, and is cheapest, at exactly 1/2.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib import import_module
from typing import Any

import numpy as np

from cograd.machines.dadao.graph import Graph, spectral

SLACK = 1e-9
"""How far above 1/2 rounding may leave the product."""

_TOLERANCES = {"tol_gap_abs": 1e-7, "tol_gap_rel": 1e-7, "tol_feas": 1e-7}
_UNUSED = 1e-6  # a share of the largest rate: what an interior-point solver leaves of a zero


@dataclass(frozen=True, eq=False)
class GossipRates:
    """Gossip rates of one graph, or of several that take turns. Make them with `gossip_rates`.

    ``rates[k][e]`` is the expected number of activations of edge e of graph k in a unit of time, in which each
    node takes one gradient in expectation. With several graphs, graph ``floor(t / period) mod K`` is there at
    time t. ``chi1`` and ``chi2`` are the worst over the graphs. Raises ValueError for a negative or not finite
    rate, rates that do not connect their graph, chi1 chi2 > 1/2, and graphs of different nodes or totals.
    """

    graphs: tuple[Graph, ...]
    rates: tuple[np.ndarray, ...]
    period: float = math.inf

    def __post_init__(self) -> None:
        for graph, rates in zip(self.graphs, self.rates, strict=True):
            _checked(graph, rates)
        totals = [float(r.sum()) for r in self.rates]
        if len({g.n for g in self.graphs}) > 1 or max(totals) - min(totals) > SLACK * max(totals):
            raise ValueError(f"graphs that take turns need the same nodes and one total rate; got {totals}")
        if not self.period > 0:
            raise ValueError(f"period must be > 0; got {self.period}")
        if self.product > 0.5 + SLACK:
            raise ValueError(
                f"rates are too low: chi_1 chi_2 must be <= 1/2; got {self.product:.6g}. "
                f"Multiplied by {math.sqrt(2 * self.product):.6g} they are admissible (rescale=True does that)"
            )

    @property
    def n(self) -> int:
        return self.graphs[0].n

    @cached_property
    def _chis(self) -> tuple[float, float]:
        pairs = [spectral(g, r) for g, r in zip(self.graphs, self.rates, strict=True)]
        return max(a for a, _ in pairs), max(b for _, b in pairs)

    @property
    def chi1(self) -> float:
        return self._chis[0]

    @property
    def chi2(self) -> float:
        return self._chis[1]

    @cached_property
    def digest(self) -> str:
        """Of graphs, rates and period: what parties of a network must have in common."""
        parts = [(g.n, g.edges, r.tolist()) for g, r in zip(self.graphs, self.rates, strict=True)]
        return hashlib.blake2b(repr((parts, self.period)).encode(), digest_size=16).hexdigest()

    @property
    def product(self) -> float:
        return self.chi1 * self.chi2

    @property
    def total(self) -> float:
        """Expected edge activations in a unit of time; the same for all graphs."""
        return float(self.rates[0].sum())

    def at(self, time: float) -> int:
        """The number of the graph that is there at a time."""
        return int(time / self.period) % len(self.graphs)


def gossip_rates(
    graph: Graph | Sequence[Graph],
    method: str | Sequence[float] | np.ndarray = "uniform",
    *,
    rescale: bool = False,
) -> GossipRates:
    """Admissible gossip rates of a graph.

    ``method`` "uniform": one rate for all edges, with chi_1 chi_2 = 1/2. "sdp": the rates of least total (an
    exact convex program; needs cvxpy, the extra ``convex``). Or the rates themselves, one for each edge, which
    ``rescale`` scales to chi_1 chi_2 = 1/2 first. Several graphs on the same nodes (uniform only) take turns,
    each for 1 / chi_1[P], where P are the edges' probabilities, and use one total, that of the worst chi_1 and
    chi_2 over them (Sec. 4).

    Raises ValueError for an unknown method and for rates that are not admissible; ImportError without cvxpy.
    """
    graphs = (graph,) if isinstance(graph, Graph) else tuple(graph)
    if not graphs or len({g.n for g in graphs}) > 1:
        raise ValueError(f"graph must be one graph or several on the same nodes; got {graphs}")
    if not isinstance(method, str):
        return _given(graphs, np.array(method, dtype=np.float64), rescale)
    if method == "uniform":
        return _uniform(graphs)
    if method != "sdp":
        raise ValueError(f"method must be 'uniform', 'sdp' or the rates themselves; got {method!r}")
    if len(graphs) > 1:
        raise ValueError(f"several graphs need method 'uniform'; got {method!r}")
    return _scaled(graphs[0], np.array(_least_total(graphs[0])))


def _checked(graph: Graph, rates: np.ndarray) -> None:
    if rates.shape != (len(graph.edges),):
        raise ValueError(f"rates must hold one for each of {len(graph.edges)} edges; got {rates.shape}")
    wrong = ~((rates >= 0) & np.isfinite(rates))
    if wrong.any():
        e = int(wrong.argmax())
        raise ValueError(f"rates must be finite and >= 0; edge {graph.edges[e]} has {rates[e]}")


def _given(graphs: tuple[Graph, ...], rates: np.ndarray, rescale: bool) -> GossipRates:
    if len(graphs) > 1:
        raise ValueError("several graphs need method 'uniform'; got rates")
    return _scaled(graphs[0], rates) if rescale else GossipRates(graphs, (rates,))


def _uniform(graphs: tuple[Graph, ...]) -> GossipRates:
    """lambda_tot = sqrt(2 chi_1[P] chi_2[P]) of the edges' probabilities P = Laplacian / |E|."""
    shares = [np.full(len(g.edges), 1 / max(len(g.edges), 1)) for g in graphs]
    pairs = [spectral(g, p) for g, p in zip(graphs, shares, strict=True)]
    chi1, chi2 = max(a for a, _ in pairs), max(b for _, b in pairs)
    total = math.sqrt(2 * chi1 * chi2)
    period = 1 / chi1 if len(graphs) > 1 else math.inf
    return GossipRates(graphs, tuple(total * p for p in shares), period)


def _scaled(graph: Graph, rates: np.ndarray) -> GossipRates:
    """Rates of this shape whose product is exactly 1/2."""
    _checked(graph, rates)
    chi1, chi2 = spectral(graph, rates)
    return GossipRates((graph,), (rates * math.sqrt(2 * chi1 * chi2),))


@lru_cache(maxsize=64)
def _least_total(graph: Graph) -> tuple[float, ...]:
    """The shape of the rates of least total with chi_1 chi_2 <= 1/2.

    The condition says that every edge's resistance is at most lambda_2: convex <= concave, so the program is
    exact. It is solved on the space orthogonal to (1, ..., 1), where Lam has an inverse. With X >= Lam^-1 (a
    Schur complement) the resistances are bounded by the linear b^T X b, so one semidefinite constraint serves
    all edges.
    """
    cp = _cvxpy()
    if not graph.edges:
        return ()
    n, m = graph.n, len(graph.edges)
    i, j = graph.ends.T
    basis = _orthogonal_to_ones(n)
    b = (basis[i] - basis[j]).T
    # In units of the uniform solution: rates of its mean, lambda_2 and resistances of its lambda_2.
    uniform = gossip_rates(graph)
    unit = uniform.total / m * uniform.chi1
    rate, gap = cp.Variable(m, nonneg=True), cp.Variable()
    inverse = cp.Variable((n - 1, n - 1), symmetric=True)
    lam, one = b @ cp.diag(rate) @ b.T, np.eye(n - 1)
    schur = cp.bmat([[inverse, one], [one, lam * (uniform.total / m / uniform.chi1)]])
    resistance = cp.sum(cp.multiply(b, inverse @ b), axis=0)
    problem = cp.Problem(cp.Minimize(cp.sum(rate)), [lam * unit >> gap * one, schur >> 0, resistance <= gap])
    problem.solve(solver=cp.CLARABEL, **_TOLERANCES)
    if problem.status != cp.OPTIMAL or rate.value is None:
        raise RuntimeError(f"the program for the rates of {graph} ended as {problem.status!r}")
    found = np.clip(rate.value, 0, None)
    found[found < _UNUSED * found.max()] = 0
    return tuple(found.tolist())


def _cvxpy() -> Any:
    try:
        return import_module("cvxpy")
    except ImportError as error:
        raise ImportError("method 'sdp' needs cvxpy: pip install 'cograd[convex]'") from error


def _orthogonal_to_ones(n: int) -> np.ndarray:
    """An orthonormal basis (n, n - 1) of what is orthogonal to (1, ..., 1)."""
    return np.linalg.qr(np.column_stack([np.ones(n), np.eye(n)[:, : n - 1]]))[0][:, 1:]
