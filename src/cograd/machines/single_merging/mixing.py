"""Who averages with whom: mixing matrices, drawn again by every party from the seed and the round.

Row k of a matrix W says what node k becomes: theta_k <- sum_l W[k, l] theta_l. Rows sum to 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cograd.core.streams import stream

GRAPHS = ("ring", "left", "exponential", "complete")
TOPOLOGIES = ("random", "pairwise", *GRAPHS, *(f"{graph}+random" for graph in GRAPHS), "none", "matrix")

Rows = dict[int, list[tuple[int, float]]]
"""The rows of a matrix that change their node: the node's own weight first, then its peers' in order."""

TOLERANCE = 1e-6


@dataclass(frozen=True)
class Mixing:
    """Mixing matrices of a topology. Peers and oneself always have the same weight, but for ``matrix``.

    - ``random``: each node pulls from peers that it draws itself, so rows are independent, and a round keeps
      the mean of the nodes only in expectation (the official code's choice). r peers are floor(r), and one
      more with probability r - floor(r).
    - ``pairwise``: random symmetric matching. Each matched pair takes its mean, so W is doubly stochastic and
      the mean of the nodes stays. A node is matched with probability r; above 1, r is floor(r) disjoint perfect
      matchings and a share of one more, with weights 1 / (1 + the larger degree of the two).
    - ``ring``: both neighbours; ``left``: the one before; ``exponential``: those at distance 1, 2, 4, ...
      ahead; ``complete``: everyone. These use all their neighbours; with ``+random`` (``ring+random``) each
      node draws r of them.
    - ``none``: no peers.
    - ``matrix``: one's own (see `of`).

    Where a schedule asks for all other nodes, a round is the average of all, whatever the topology.
    ``seed`` is of the draws, which every party repeats. Raises ValueError for an unknown topology.
    """

    topology: str = "random"
    seed: int = 0
    matrix: tuple[tuple[float, ...], ...] | None = None

    def __post_init__(self) -> None:
        if self.topology not in TOPOLOGIES:
            raise ValueError(f"topology must be one of {', '.join(TOPOLOGIES)}; got {self.topology!r}")
        if (self.topology == "matrix") != (self.matrix is not None):
            raise ValueError(f"matrix goes with topology 'matrix' (see Mixing.of); got {self.topology!r}")

    @classmethod
    def of(cls, matrix: Tensor | Sequence[Sequence[float]]) -> Mixing:
        """The same matrix (m, m) in every round that is not dense.

        Raises ValueError unless it is square, finite, of no negative entry, and every row sums to 1 (1e-6).
        """
        w = torch.as_tensor(matrix, dtype=torch.float64)
        if w.ndim != 2 or w.shape[0] != w.shape[1]:
            raise ValueError(f"matrix must be square; got shape {tuple(w.shape)}")
        if not bool(torch.isfinite(w).all()) or bool((w < 0).any()):
            raise ValueError("matrix must hold finite numbers >= 0 only")
        off = (w.sum(1) - 1).abs()
        if float(off.max()) > TOLERANCE:
            row = int(off.argmax())
            raise ValueError(f"matrix rows must sum to 1; row {row} sums to {float(w[row].sum()):.9g}")
        return cls("matrix", matrix=tuple(map(tuple, w.tolist())))

    def check(self, peers: float | None, members: int) -> None:
        """Raise ValueError unless a round of ``members`` nodes with ``peers`` peers each is possible."""
        if members < 2:
            raise ValueError(f"members must be at least 2 nodes; got {members}")
        if self.matrix is not None and len(self.matrix) != members:
            raise ValueError(f"matrix must be of the {members} nodes; got one of {len(self.matrix)}")
        chooses = self.topology in ("random", "pairwise") or self.topology.endswith("+random")
        if peers is None:
            if chooses:
                raise ValueError(f"peers must be a number for topology {self.topology!r}; got None")
            return
        if not 0 <= peers <= members - 1:
            raise ValueError(f"peers must be in 0 .. members - 1 = {members - 1}; got {peers}")
        if peers in (0, members - 1):
            return
        if not chooses:
            raise ValueError(
                f"peers must be None (all neighbours), 0 or {members - 1} for topology {self.topology!r}; got "
                f"{peers}" + (f": use '{self.topology}+random' to draw them" if self.topology in GRAPHS else "")
            )
        if peers > (degree := self._degree(members)):
            raise ValueError(f"peers must be <= {degree}, the neighbours in {self.topology!r}; got {peers}")

    def dense(self, peers: float | None, members: int) -> bool:
        """Whether such a round is the average of all nodes."""
        return peers == members - 1 or (peers is None and self.topology == "complete")

    def weights(self, peers: float | None, members: int, round: int) -> np.ndarray:
        """The matrix W (members, members), float64, of a round. Raises ValueError as `check` does."""
        self.check(peers, members)
        if self.dense(peers, members):
            return np.full((members, members), 1 / members)
        if peers == 0 or self.topology == "none":
            return np.eye(members)
        if self.matrix is not None:
            return np.array(self.matrix)
        if self.topology == "pairwise":
            assert peers is not None
            return _metropolis(self._matched(peers, members, round))
        neighbours = _neighbours(self.topology.removesuffix("+random"), members)
        if peers is not None:
            neighbours = self._drawn(neighbours, peers, round)
        linked = neighbours | np.eye(members, dtype=bool)
        uniform: np.ndarray = linked / linked.sum(1, keepdims=True)
        return uniform

    def rows(self, peers: float | None, members: int, round: int) -> Rows:
        """The rows that change their node: nodes that hear nobody are left out."""
        return rows_of(self.weights(peers, members, round))

    def quality(self, peers: float | None, members: int) -> float:
        """Mixing quality p in [0, 1]: E |W Theta - bar|^2 <= (1 - p) |Theta - bar|^2, bar the mean before.

        The largest such p, from the expectation of W^T W. For ``random`` and ``pairwise`` the two sides are
        equal for every Theta: with r <= 1 both have p = r m / (2 (m - 1)). Raises ValueError for a pairwise
        topology with more than one peer and a fraction of one, or an odd number of nodes, which has no closed
        form here: average `contraction` over draws.
        """
        self.check(peers, members)
        if self.dense(peers, members):
            return 1.0
        if peers == 0 or self.topology == "none":
            return 0.0
        if self.matrix is not None:
            w = np.array(self.matrix)
            return _quality(w.T @ w)
        if self.topology == "pairwise":
            assert peers is not None
            return _pairwise_quality(peers, members)
        neighbours = _neighbours(self.topology.removesuffix("+random"), members)
        return _quality(_second_moment(neighbours, peers))

    def _degree(self, members: int) -> int:
        if self.topology == "pairwise":
            return members - 1
        return int(_neighbours(self.topology.removesuffix("+random"), members).sum(1).max())

    def _drawn(self, neighbours: np.ndarray, peers: float, round: int) -> np.ndarray:
        """Of each row's neighbours, floor(r) and perhaps one more, all choices alike."""
        draws = stream(self.seed, "mixing", round).numpy
        whole = math.floor(peers)
        count = whole + (draws.random(len(neighbours)) < peers - whole)
        order = np.where(neighbours, draws.random(neighbours.shape), np.inf)
        rank = order.argsort(axis=1, kind="stable").argsort(axis=1, kind="stable")
        chosen: np.ndarray = rank < count[:, None]
        return chosen

    def _matched(self, peers: float, members: int, round: int) -> np.ndarray:
        """Symmetric links of edge-disjoint matchings of the nodes in random order (the circle method)."""
        draws = stream(self.seed, "mixing", round).numpy
        nodes = draws.permutation(members)
        seats = members + members % 2  # whoever meets the empty seat is left out
        matchings = _matchings(peers, members)
        whole = math.floor(matchings)
        linked = np.zeros((members, members), dtype=bool)
        for turn in range(math.ceil(matchings)):
            circle = [0, *(1 + (turn + np.arange(seats - 1)) % (seats - 1)).tolist()]
            kept = draws.random(seats // 2) < (1 if turn < whole else matchings - whole)
            for i in kept.nonzero()[0].tolist():
                a, b = circle[i], circle[seats - 1 - i]
                if max(a, b) < members:
                    linked[nodes[a], nodes[b]] = linked[nodes[b], nodes[a]] = True
        return linked


def rows_of(weights: np.ndarray) -> Rows:
    """The rows of W (m, m) that are not the identity's."""
    rows: Rows = {}
    for node, row in enumerate(weights.tolist()):
        peers = [(peer, weight) for peer, weight in enumerate(row) if weight and peer != node]
        if peers:
            rows[node] = [(node, row[node]), *peers]
    return rows


def contraction(weights: np.ndarray, points: Tensor) -> float:
    """|W Theta - bar|^2 / |Theta - bar|^2 of one matrix for points Theta (m, P), bar their mean before."""
    theta = points.double()
    bar = theta.mean(0)
    after = torch.from_numpy(weights) @ theta
    return float((after - bar).square().sum() / (theta - bar).square().sum())


def _neighbours(graph: str, members: int) -> np.ndarray:
    """Whom a node may hear in a graph: (members, members) bool, without oneself."""
    ahead = {
        "random": range(1, members),
        "complete": range(1, members),
        "ring": (1, members - 1),
        "left": (members - 1,),
        "exponential": [d for d in range(1, members) if d & (d - 1) == 0],
    }[graph]
    linked = np.zeros((members, members), dtype=bool)
    nodes = np.arange(members)
    for distance in ahead:
        linked[nodes, (nodes + distance) % members] = True
    return linked


def _metropolis(linked: np.ndarray) -> np.ndarray:
    """Symmetric links -> a symmetric W, doubly stochastic: 1 / (1 + the larger degree) for each link."""
    degree = linked.sum(1)
    weights: np.ndarray = linked / (1 + np.maximum(degree[:, None], degree))
    weights[np.diag_indices_from(weights)] = 1 - weights.sum(1)
    return weights


def _matchings(peers: float, members: int) -> float:
    """How many matchings give a node so many peers; an odd number of nodes leaves one out of each."""
    return peers * members / (members - 1) if members % 2 else peers


def _second_moment(neighbours: np.ndarray, peers: float | None) -> np.ndarray:
    """E[W^T W] where each row has uniform weights on itself and ``peers`` of its neighbours (None: all)."""
    moment = np.zeros(neighbours.shape)
    for node, row in enumerate(neighbours):
        around, own = row.astype(float), np.eye(len(row))[node]
        degree = int(around.sum())
        count = degree if peers is None else peers
        whole = math.floor(count)
        for n, chance in ((whole, 1 - (count - whole)), (whole + 1, count - whole)):
            if chance:
                both = n * (n - 1) / (degree * (degree - 1)) if degree > 1 else 0.0
                one = n / degree
                pairs = both * np.outer(around, around) + (one - both) * np.diag(around)
                cross = one * (np.outer(own, around) + np.outer(around, own))
                moment += chance * (np.outer(own, own) + cross + pairs) / (n + 1) ** 2
    return moment


def _quality(moment: np.ndarray) -> float:
    """1 - the largest eigenvalue of E[W^T W] on vectors of mean zero, and not below 0."""
    centre = np.eye(len(moment)) - 1 / len(moment)
    return max(0.0, 1 - float(np.linalg.eigvalsh(centre @ moment @ centre)[-1]))


def _pairwise_quality(peers: float, members: int) -> float:
    """A matched pair loses |theta_i - theta_j|^2 / 2; for d matchings |W|_F^2 = m / (d + 1) gives the rest."""
    if _matchings(peers, members) <= 1:
        return peers * members / (2 * (members - 1))
    if members % 2 or peers != math.floor(peers):
        raise ValueError(
            "peers must be at most one matching's, or a whole number of an even number of nodes; got "
            f"peers={peers}, members={members}: average contraction() over draws"
        )
    return 1 - (members / (peers + 1) - 1) / (members - 1)
