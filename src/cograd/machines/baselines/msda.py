"""MSDA (Scaman, Bach, Bubeck, Lee, Massoulié 2017, arXiv:1702.08704, Algorithm 2): dual acceleration, Chebyshev
gossip.

It needs the gradient of every f_i's convex conjugate, which least squares have in closed form: an oracle that
the primal methods do without.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from cograd.machines.dadao.graph import Graph


class MSDA:
    """MSDA from the dual point 0.

    Args:
        conjugate: every node's gradient of f_i^* at its own row, (n, d) -> (n, d).
        d: size of a row.
        mu, L: strong convexity and smoothness, each the worst over the nodes.
        graph: gossips floor(1 / sqrt(lambda_2 / lambda_max)) times a round.

    ``x`` (n, d) is where the nodes are; ``gradients`` and ``activations`` count gradients of nodes and uses of
    edges, each of which is two messages of d numbers.
    """

    def __init__(
        self, conjugate: Callable[[Tensor], Tensor], d: int, *, mu: float, L: float, graph: Graph
    ) -> None:
        self.conjugate, self.graph = conjugate, graph
        gamma = 1 / graph.condition
        self.repeats = rounds(graph)
        c1 = ((1 - math.sqrt(gamma)) / (1 + math.sqrt(gamma))) ** self.repeats
        self.step_size = mu * (1 + c1**2) / (1 + c1) ** 2
        root = (1 + c1) * math.sqrt(L / mu)
        self.momentum = (root - 1 + c1) / (root + 1 - c1)
        self._gossip = _chebyshev(graph, gamma, self.repeats)
        self.y = self.previous = torch.zeros(graph.n, d, dtype=torch.float64)
        self.x = conjugate(self.y)
        self.gradients, self.activations = graph.n, 0

    def step(self) -> None:
        """One round."""
        following = self.y - self.step_size * (self._gossip @ self.x)
        self.y = following + self.momentum * (following - self.previous)
        self.previous = following
        self.x = self.conjugate(self.y)
        self.gradients += self.graph.n
        self.activations += self.repeats * len(self.graph.edges)


def rounds(graph: Graph) -> int:
    """Gossips a round: floor(1 / sqrt(lambda_2 / lambda_max)), up to rounding below a whole number."""
    return int(math.sqrt(graph.condition) + 1e-9)


def _chebyshev(graph: Graph, gamma: float, repeats: int) -> Tensor:
    """The matrix of the accelerated gossip: I - T_K(c2 (I - c3 W)) / T_K(c2), T_K Chebyshev's polynomial."""
    one, laplacian = np.eye(graph.n), graph.laplacian()
    if gamma > 1 - 1e-9:  # a complete graph: one gossip averages exactly
        return torch.from_numpy(laplacian / graph.n)
    largest = np.linalg.eigvalsh(laplacian)[-1]
    c2 = (1 + gamma) / (1 - gamma)
    matrix = c2 * (one - 2 / ((1 + gamma) * largest) * laplacian)
    before, now, a_before, a_now = one, matrix, 1.0, c2
    for _ in range(1, repeats):
        before, now = now, 2 * matrix @ now - before
        a_before, a_now = a_now, 2 * c2 * a_now - a_before
    return torch.from_numpy(one - now / a_now)
