"""Communication graphs, and the two spectral quantities that decide how often their edges must be used.

Of a weighted Laplacian Lam = sum over the edges of w_ij (e_i - e_j)(e_i - e_j)^T:

- chi_1 = 1 / lambda_2(Lam), the inverse *spectral gap*: how slowly averaging spreads through the graph;
- chi_2 = half the largest *effective resistance* of an edge, (e_i - e_j)^T Lam^+ (e_i - e_j): how much hangs on
  a single edge. Always chi_2 <= chi_1.

Everything here is float64 numpy on n x n matrices.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from cograd.core.streams import stream

Edge = tuple[int, int]
NOTHING = 1e-12
"""A share of the largest eigenvalue below which lambda_2 counts as zero."""


@dataclass(frozen=True)
class Graph:
    """An undirected connected graph of nodes 0 .. n - 1; an edge is kept as (i, j) with i < j.

    A networkx graph with such nodes is ``Graph(len(G), tuple(G.edges))``. Raises ValueError for fewer than one
    node, a self-loop, an edge given twice or to a node that is not there, and a graph that is not connected.
    """

    n: int
    edges: tuple[Edge, ...]

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"n must be >= 1; got {self.n}")
        pairs = [(min(e), max(e)) for e in ((int(i), int(j)) for i, j in self.edges)]
        for i, j in pairs:
            if not 0 <= i < j < self.n:
                raise ValueError(f"edges must join two different nodes of 0 .. {self.n - 1}; got ({i}, {j})")
        if len(set(pairs)) < len(pairs):
            twice = next(e for k, e in enumerate(pairs) if e in pairs[:k])
            raise ValueError(f"edges must be given once each; got {twice} twice")
        object.__setattr__(self, "edges", tuple(pairs))
        parts = components(self.n, pairs)
        if len(parts) > 1:
            raise ValueError(f"the graph must be connected; nodes {parts[1][:5]} are not reached from node 0")

    def __repr__(self) -> str:
        return f"Graph({self.n} nodes, {len(self.edges)} edges)"

    @cached_property
    def ends(self) -> np.ndarray:
        """The edges as an array (edges, 2)."""
        return np.array(self.edges, dtype=np.int64).reshape(-1, 2)

    def laplacian(self, weights: Sequence[float] | np.ndarray | None = None) -> np.ndarray:
        """The Laplacian (n, n) with a weight for each edge; without weights each counts 1."""
        w = np.ones(len(self.edges)) if weights is None else np.asarray(weights, dtype=np.float64)
        lam = np.zeros((self.n, self.n))
        i, j = self.ends.T
        lam[i, j] = lam[j, i] = -w
        lam[np.diag_indices(self.n)] = -lam.sum(1)
        return lam

    @cached_property
    def condition(self) -> float:
        """lambda_max / lambda_2 of the unweighted Laplacian: the chi of synchronous gossip; 1 for one node."""
        values = np.linalg.eigvalsh(self.laplacian())
        return float(values[-1] / values[1]) if self.n > 1 else 1.0

    @classmethod
    def star(cls, n: int) -> Graph:
        """Node 0 joined to all others."""
        return cls(n, tuple((0, i) for i in range(1, n)))

    @classmethod
    def path(cls, n: int) -> Graph:
        return cls(n, tuple((i, i + 1) for i in range(n - 1)))

    @classmethod
    def cycle(cls, n: int) -> Graph:
        """A path of n >= 3 nodes, closed."""
        return cls(n, tuple((i, (i + 1) % n) for i in range(n)))

    @classmethod
    def complete(cls, n: int) -> Graph:
        return cls(n, tuple(itertools.combinations(range(n), 2)))

    @classmethod
    def grid(cls, rows: int, columns: int) -> Graph:
        """Each node joined to its right and lower neighbour."""
        at = np.arange(rows * columns).reshape(rows, columns)
        right = zip(at[:, :-1].ravel().tolist(), at[:, 1:].ravel().tolist(), strict=True)
        down = zip(at[:-1].ravel().tolist(), at[1:].ravel().tolist(), strict=True)
        return cls(rows * columns, (*right, *down))

    @classmethod
    def barbell(cls, m: int) -> Graph:
        """Two complete graphs of m nodes, joined by one edge, the bridge."""
        left = tuple(itertools.combinations(range(m), 2))
        right = tuple(itertools.combinations(range(m, 2 * m), 2))
        return cls(2 * m, (*left, (m - 1, m), *right))

    @classmethod
    def random_geometric(cls, n: int, radius: float, seed: int = 0) -> Graph:
        """n uniform points of the unit square, joined when closer than ``radius``.

        Where that leaves several components, a random node of each is joined to one of the next (the paper's
        rule).
        """
        draw = stream(seed, "random geometric graph", n)
        points = draw.numpy.random((n, 2))
        distance = np.linalg.norm(points[:, None] - points[None], axis=-1)
        edges = [(i, j) for i, j in itertools.combinations(range(n), 2) if distance[i, j] <= radius]
        parts = components(n, edges)
        for here, there in itertools.pairwise(parts):
            edges.append((here[draw.integer(len(here))], there[draw.integer(len(there))]))
        return cls(n, tuple(edges))


def components(n: int, edges: Sequence[Edge]) -> list[list[int]]:
    """The connected components, each ascending, in the order of their smallest nodes."""
    root = list(range(n))

    def find(i: int) -> int:
        while root[i] != i:
            root[i] = root[root[i]]
            i = root[i]
        return i

    for i, j in edges:
        a, b = find(i), find(j)
        root[max(a, b)] = min(a, b)
    parts: dict[int, list[int]] = {}
    for i in range(n):
        parts.setdefault(find(i), []).append(i)
    return list(parts.values())


def resistances(laplacian: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Effective resistance of each edge (i, j) of ``ends`` (edges, 2) in a connected weighted graph."""
    n = len(laplacian)
    inverse = np.linalg.inv(laplacian + 1 / n)  # equals Lam^+ on every e_i - e_j
    i, j = ends.T
    return np.asarray(inverse[i, i] + inverse[j, j] - 2 * inverse[i, j])


def spectral(graph: Graph, weights: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """chi_1 and chi_2 of a graph under edge weights; an edge of weight 0 is not there. (0, 0) for one node.

    Raises ValueError if the edges of positive weight do not connect the graph.
    """
    if graph.n == 1:
        return 0.0, 0.0
    w = np.asarray(weights, dtype=np.float64)
    laplacian = graph.laplacian(w)
    values = np.linalg.eigvalsh(laplacian)
    if values[1] <= NOTHING * values[-1]:
        raise ValueError("the edges of positive rate must connect the graph; lambda_2 of their Laplacian is 0")
    return float(1 / values[1]), float(resistances(laplacian, graph.ends[w > 0]).max() / 2)
