"""Continuized dual acceleration (Even, Berthier, Bach, Flammarion, Gaillard, Hendrikx, Massoulié, Taylor 2021,
arXiv:2106.07644, Appendix H): asynchronous, gradients coupled to averagings.

At every event of an edge both ends take a gradient of their convex conjugate and exchange it. Two vectors
of each node flow towards each other between events.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from cograd.core.streams import stream
from cograd.machines.dadao.graph import Graph, resistances, spectral

BLOCK = 4096


class Continuized:
    """The method from the dual point 0, edges drawn uniformly at the total rate 1.

    Args:
        conjugate: ``conjugate(y, nodes)``: gradients of f_i^* of those nodes, each at its row of y.
        d: size of a row.
        mu, L: strong convexity and smoothness, each the worst over the nodes.
        graph: of n >= 2 nodes.
        seed: of the clock.

    With p the edges' probabilities, r_e the effective resistance of e under them and r their maximum, the flow
    has the rate eta = sqrt(mu lambda_2[p] / (2 L r)). ``gradients`` and ``activations`` count gradients
    of nodes and uses of edges, each of which is two messages of d numbers.
    """

    def __init__(
        self,
        conjugate: Callable[[Tensor, Sequence[int] | slice], Tensor],
        d: int,
        *,
        mu: float,
        L: float,
        graph: Graph,
        seed: int = 0,
    ) -> None:
        self.conjugate, self.graph, self.seed = conjugate, graph, seed
        shares = np.full(len(graph.edges), 1 / len(graph.edges))
        chi1, chi2 = spectral(graph, shares)
        worst = 2 * chi2
        self.eta = math.sqrt(mu / (2 * L * chi1 * worst))
        self.steps = mu / 2 * resistances(graph.laplacian(shares), graph.ends) / worst
        self.step_t = math.sqrt(L * mu * chi1 / (2 * worst))
        self.state = torch.zeros(graph.n, 2, d, dtype=torch.float64)
        self.times = np.zeros(graph.n)
        self.now, self.gradients, self.activations = 0.0, 0, 0

    def step(self) -> None:
        """One event."""
        position = self.activations % BLOCK
        if position == 0:
            draw = stream(self.seed, "continuized", self.activations // BLOCK).numpy
            self._waits, self._edges = (
                draw.exponential(1.0, BLOCK),
                draw.integers(len(self.graph.edges), size=BLOCK),
            )
        self.now += self._waits[position]
        edge = self._edges[position]
        pair = list(self.graph.edges[edge])
        y = self._flowed(pair)
        of_i, of_j = self.conjugate(y[:, 0], pair)
        gap = of_i - of_j
        moves = torch.stack([self.steps[edge] * gap, self.step_t * gap])
        y[0] -= moves
        y[1] += moves
        self.state[pair], self.times[pair] = y, self.now
        self.gradients += 2
        self.activations += 1

    @property
    def x(self) -> Tensor:
        """Where the nodes are now (n, d)."""
        everyone = list(range(self.graph.n))
        return self.conjugate(self._flowed(everyone)[:, 0], everyone)

    def _flowed(self, nodes: list[int]) -> Tensor:
        """Both vectors of these nodes at the present time (nodes, 2, d), a copy."""
        fading = torch.from_numpy(np.exp(-2 * self.eta * (self.now - self.times[nodes])))[:, None, None]
        state = self.state[nodes]
        mean = state.mean(1, keepdim=True)
        return mean + fading * (state - mean)
