"""What DADAO is compared with: each finds the optimum, counts what it uses, and is the published recursion."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from cograd.core.streams import stream
from cograd.machines.baselines import MSDA, ADOMPlus, Continuized
from cograd.machines.baselines.adom_plus import gossips
from cograd.machines.baselines.msda import rounds
from cograd.machines.dadao import Graph, gossip_rates
from cograd.models.convex import LeastSquares

PROBLEM = LeastSquares.random(16, 40, 5, 0)
X0 = stream(0, "x0").normal(16, 5).double()
GRAPHS = [Graph.star(16), Graph.grid(4, 4), Graph.barbell(8), Graph.complete(16)]
CONSTANTS = {"mu": PROBLEM.mu, "L": PROBLEM.L}


def error(x: Tensor) -> float:
    return float((x - PROBLEM.solution).square().sum(1).mean())


def test_edges_a_round_on_the_star_of_300_nodes_are_the_official_notebooks() -> None:
    star = Graph.star(300)
    edges = len(star.edges)
    assert edges * rounds(star) == 5083
    assert edges * gossips(star.condition) == 62192
    assert round(gossip_rates(star).total) == edges == 299


@pytest.mark.parametrize("n", [16, 64, 300])
def test_msdas_rounds_on_a_star_are_the_root_of_n(n: int) -> None:
    assert rounds(Graph.star(n)) == math.isqrt(n)


@pytest.mark.parametrize("graph", GRAPHS, ids=repr)
@pytest.mark.parametrize("several", [False, True])
def test_adom_plus_finds_the_optimum_and_counts_its_edges(graph: Graph, several: bool) -> None:
    method = ADOMPlus(PROBLEM.gradient, X0, graphs=graph, multi_consensus=several, **CONSTANTS)
    steps = 300 if several else 300 + 100 * math.ceil(graph.condition)
    for _ in range(steps):
        method.step()
    assert error(method.x) < 1e-5 * error(X0)
    repeats = max(1, gossips(graph.condition)) if several else 1
    assert method.activations == steps * repeats * len(graph.edges)
    assert method.gradients == 16 * steps


def test_adom_plus_solves_its_implicit_step() -> None:
    """x and y of the next round satisfy the two equations that define them."""
    method = ADOMPlus(PROBLEM.gradient, X0, graphs=GRAPHS[0], **CONSTANTS)
    for _ in range(3):
        x, y, x_f, y_f, z, z_f = method.x, method.y, method.x_f, method.y_f, method.z, method.z_f
        x_g = method.tau1 * x + (1 - method.tau1) * x_f
        y_g, z_g = (method.sigma1 * a + (1 - method.sigma1) * b for a, b in ((y, y_f), (z, z_f)))
        method.step()
        force = PROBLEM.gradient(x_g) - method.nu * x_g
        right = x + method.eta * method.alpha * (x_g - method.x) - method.eta * (force - method.y)
        torch.testing.assert_close(method.x, right)
        right = y + method.theta * method.beta * (force - method.y)
        right = right - method.theta * ((y_g + z_g) / method.nu + method.x)
        torch.testing.assert_close(method.y, right)
    assert float(method.z.sum(0).abs().max()) < 1e-9 * float(method.z.abs().max())


def test_adom_plus_on_graphs_that_take_turns() -> None:
    graphs = [Graph.random_geometric(16, 0.35, seed) for seed in range(4)]
    method = ADOMPlus(PROBLEM.gradient, X0, graphs=graphs, multi_consensus=True, **CONSTANTS)
    for _ in range(300):
        method.step()
    repeats = gossips(max(g.condition for g in graphs))
    assert error(method.x) < 1e-5 * error(X0)
    used = [len(graphs[k % 4].edges) for k in range(300 * repeats)]
    assert method.activations == sum(used)


@pytest.mark.parametrize("graph", GRAPHS, ids=repr)
def test_msda_finds_the_optimum_and_counts_its_edges(graph: Graph) -> None:
    method = MSDA(PROBLEM.conjugate, 5, graph=graph, **CONSTANTS)
    for _ in range(80):
        method.step()
    assert error(method.x) < 1e-8 * error(X0)
    assert method.activations == 80 * rounds(graph) * len(graph.edges)
    assert method.gradients == 16 * 81


def test_chebyshevs_gossip_keeps_the_mean_and_shrinks_the_rest() -> None:
    graph = Graph.grid(4, 4)
    gossip = MSDA(PROBLEM.conjugate, 5, graph=graph, **CONSTANTS)._gossip.numpy()
    np.testing.assert_allclose(gossip.sum(0), 0, atol=1e-12)
    values = np.linalg.eigvalsh(gossip)[1:]
    c1 = (1 - graph.condition**-0.5) / (1 + graph.condition**-0.5)
    bound = 2 * c1 ** rounds(graph) / (1 + c1 ** (2 * rounds(graph)))
    assert np.abs(1 - values).max() <= bound + 1e-12


@pytest.mark.parametrize("graph", GRAPHS[:3], ids=repr)
def test_continuized_finds_the_optimum_keeps_the_sum_and_counts(graph: Graph) -> None:
    method = Continuized(PROBLEM.conjugate, 5, graph=graph, seed=1, **CONSTANTS)
    before = error(method.x)
    for _ in range(700 if graph is not GRAPHS[2] else 2000):
        method.step()
    assert error(method.x) < 1e-4 * before
    assert method.gradients == 2 * method.activations
    everything = method._flowed(list(range(16)))
    assert float(everything.sum(0).abs().max()) < 1e-9 * float(everything.abs().max())


def test_the_optimum_is_a_fixed_point_of_all_of_them() -> None:
    slope = PROBLEM.gradient(PROBLEM.solution.expand(16, -1))
    graph, at = GRAPHS[1], PROBLEM.solution.expand(16, -1)
    msda = MSDA(PROBLEM.conjugate, 5, graph=graph, **CONSTANTS)
    msda.y = msda.previous = slope
    msda.x = PROBLEM.conjugate(slope)
    continuized = Continuized(PROBLEM.conjugate, 5, graph=graph, **CONSTANTS)
    continuized.state = torch.stack([slope, slope], 1)
    adom = ADOMPlus(PROBLEM.gradient, at, graphs=graph, **CONSTANTS)
    adom.y = adom.y_f = slope - adom.nu * at
    adom.z = adom.z_f = -slope
    for _ in range(20):
        for method in (msda, continuized, adom):
            method.step()
            torch.testing.assert_close(method.x, at, rtol=1e-8, atol=1e-8)
