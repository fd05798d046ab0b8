"""ADOM+ (Kovalev, Gasanov, Gasnikov, Richtarik 2021, arXiv:2106.04469): synchronous accelerated primal gossip.

Every round each node takes one gradient and the graph gossips once, with I - W, W = Laplacian / lambda_max; or,
with *multi-consensus*, ceil(chi ln 2) times in a row, which makes chi = lambda_max / lambda_2 effectively 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from cograd.machines.dadao.graph import Graph


class ADOMPlus:
    """ADOM+ from x0, with y, z and m zero.

    Args:
        gradient: every node's gradient at its own row, (n, d) -> (n, d).
        x0: (n, d), float64.
        mu, L: strong convexity and smoothness, each the worst over the nodes.
        graphs: one graph, or several that take turns at every gossip; chi is the worst of them.
        multi_consensus: gossip ceil(chi ln 2) times a round.

    ``x`` (n, d) is where the nodes are; ``gradients`` and ``activations`` count gradients of nodes and uses of
    edges, each of which is two messages of d numbers.
    """

    def __init__(
        self,
        gradient: Callable[[Tensor], Tensor],
        x0: Tensor,
        *,
        mu: float,
        L: float,
        graphs: Graph | Sequence[Graph],
        multi_consensus: bool = False,
    ) -> None:
        self.gradient, self.graphs = gradient, (graphs,) if isinstance(graphs, Graph) else tuple(graphs)
        chi = max(g.condition for g in self.graphs)
        self.repeats = max(1, gossips(chi)) if multi_consensus else 1
        chi = 2.0 if self.repeats > 1 else chi
        self._mixings = [_mixing(g) for g in self.graphs]
        self._products: dict[int, Tensor] = {}
        self.x, self.y, self.z, self.m = x0.clone(), *(torch.zeros_like(x0) for _ in range(3))
        self.x_f, self.y_f, self.z_f = self.x, self.y, self.z
        self.tau2 = math.sqrt(mu / L)
        self.tau1 = 1 / (1 / self.tau2 + 0.5)
        self.sigma2 = self.tau2 / (16 * chi)
        self.sigma1 = 1 / (1 / self.sigma2 + 0.5)
        self.eta, self.alpha, self.beta, self.nu = 1 / (L * self.tau2), mu / 2, 1 / (2 * L), mu / 2
        self.theta = self.nu / (4 * self.sigma2)
        self.gamma = self.nu / (14 * self.sigma2 * chi**2)
        self.delta, self.zeta = 1 / (17 * L), 0.5
        self.gradients, self.activations, self._turn = 0, 0, 0

    def step(self) -> None:
        """One round (Algorithm 2). The next x and y depend on each other linearly: solved for y first."""
        eta, alpha, theta, beta, nu = self.eta, self.alpha, self.theta, self.beta, self.nu
        x_g = self.tau1 * self.x + (1 - self.tau1) * self.x_f
        y_g = self.sigma1 * self.y + (1 - self.sigma1) * self.y_f
        z_g = self.sigma1 * self.z + (1 - self.sigma1) * self.z_f
        force = self.gradient(x_g) - nu * x_g
        ahead = (self.x + eta * alpha * x_g - eta * force) / (1 + eta * alpha)  # the next x less its part in y
        y = self.y + theta * (beta * force - (y_g + z_g) / nu - ahead)
        y = y / (1 + theta * beta + theta * eta / (1 + eta * alpha))
        x = ahead + eta / (1 + eta * alpha) * y
        gossip = self._gossip()
        pull = self.gamma / nu * (y_g + z_g) + self.m
        pulled = gossip @ pull
        z = self.z + self.gamma * self.delta * (z_g - self.z) - pulled
        self.x_f = x_g + self.tau2 * (x - self.x)
        self.y_f = y_g + self.sigma2 * (y - self.y)
        self.z_f = z_g - self.zeta * (gossip @ (y_g + z_g))
        self.x, self.y, self.z, self.m = x, y, z, pull - pulled
        self.gradients += len(x)

    def _gossip(self) -> Tensor:
        """The next W (n, n): I less the product of what the round's gossips do."""
        turns = [(self._turn + k) % len(self.graphs) for k in range(self.repeats)]
        self.activations += sum(len(self.graphs[k].edges) for k in turns)
        if turns[0] not in self._products:
            product = torch.eye(len(self.x), dtype=torch.float64)
            for k in turns:
                product = self._mixings[k] @ product
            self._products[turns[0]] = torch.eye(len(self.x), dtype=torch.float64) - product
        self._turn += self.repeats
        return self._products[turns[0]]


def gossips(chi: float) -> int:
    """Gossips that make a condition number chi effectively 2: ceil(chi ln 2)."""
    return math.ceil(chi * math.log(2))


def _mixing(graph: Graph) -> Tensor:
    laplacian = graph.laplacian()
    largest = np.linalg.eigvalsh(laplacian)[-1] if graph.n > 1 else 1.0
    return torch.from_numpy(np.eye(graph.n) - laplacian / largest)
