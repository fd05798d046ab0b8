"""DADAO in one process: the card's exact properties, its rate, resume, and bad input."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from cograd.core.ledger import Budget, BudgetExceeded, Ledger
from cograd.core.space import ParamSpace
from cograd.core.streams import stream
from cograd.machines import DADAO, Graph, gossip_rates
from cograd.machines.dadao import Constants, Event, Flow, GossipRates, Node, PoissonClock, module_gradients
from cograd.machines.dadao.graph import resistances, spectral
from cograd.models.convex import LeastSquares, RidgeLogistic

F64 = torch.float64
SETTINGS = partial(settings, deadline=None, derandomize=True)
GRAPHS = {
    "star": Graph.star(16),
    "cycle": Graph.cycle(16),
    "grid": Graph.grid(4, 4),
    "barbell": Graph.barbell(8),
    "geometric": Graph.random_geometric(20, 0.4),
}


def start(n: int, d: int = 5, seed: int = 0) -> Tensor:
    return stream(seed, "x0").normal(n, d).double()


def least_squares(n: int = 16, seed: int = 0) -> LeastSquares:
    return LeastSquares.random(n, 40, 5, seed)


def dadao(graph: Graph, problem: LeastSquares | None = None, **options: object) -> DADAO:
    p = problem if problem is not None else least_squares(graph.n)
    given = {"rates": gossip_rates(graph), "mu": p.mu, "L": p.L, **options}
    return DADAO(p.gradients(), start(graph.n), **given)  # type: ignore[arg-type]


def error(x: Tensor, solution: Tensor) -> float:
    return float((x - solution).square().sum(1).mean())


# The node: flow and jumps.


def drift(mu: float, L: float) -> Tensor:
    """The flow's matrix from the constants of the paper, written out."""
    nu = mu / 2
    s = math.sqrt(nu / L)
    eta, alpha, alpha_t, theta = s / 8, s / 4, s / 8, 1 / (2 * s)
    return torch.tensor(
        [
            [-eta, eta, 0, 0, 0, 0],
            [eta, -eta, 0, 0, 0, 0],
            [0, 0, -alpha, alpha, 0, 0],
            [0, -theta * nu, -theta, 0, -theta, 0],
            [0, 0, 0, 0, -alpha, alpha],
            [0, 0, 0, 0, alpha_t, -alpha_t],
        ],
        dtype=F64,
    )


@pytest.mark.parametrize("kappa", [1.0, 6.0, 100.0, 1e4])
def test_the_flow_is_the_matrix_exponential(kappa: float) -> None:
    flow = Flow(Constants.of(0.5, 0.5 * kappa, 3.0))
    for h in (1e-6, 0.01, 0.3, 2.0, 40.0):
        expected = torch.linalg.matrix_exp(drift(0.5, 0.5 * kappa) * h)
        torch.testing.assert_close(torch.from_numpy(flow.matrix(h)), expected, rtol=1e-9, atol=1e-10)


@SETTINGS(max_examples=60)
@given(st.floats(0, 20), st.floats(0, 20), st.floats(1, 1e4))
def test_flows_compose(h1: float, h2: float, kappa: float) -> None:
    flow = Flow(Constants.of(1.0, kappa, 3.0))
    parts = flow.matrix(h1).copy() @ flow.matrix(h2)
    np.testing.assert_allclose(parts, flow.matrix(h1 + h2), rtol=1e-10, atol=1e-10)


def test_a_tensor_flows_as_an_array_does() -> None:
    flow, state = Flow(Constants.of(1.0, 6.0, 3.0)), start(6)
    array = state.numpy().copy()
    flow(array, 0.7)
    flow(state, 0.7)
    torch.testing.assert_close(state, torch.from_numpy(array), rtol=1e-14, atol=1e-14)


def test_the_constants_are_the_papers() -> None:
    c = Constants.of(2.0, 9.0, 5.0)
    s = math.sqrt(1 / 9)
    assert (c.nu, c.eta, c.alpha, c.alpha_t, c.theta) == (1.0, s / 8, s / 4, s / 8, 1 / (2 * s))
    assert (c.gamma, c.gamma_t, c.delta, c.delta_t) == (1 / 36, 1 / (4 * 3.0), s / 4, 1.0)
    assert (c.beta, c.beta_t) == (0.5, pytest.approx(2 * 5 * 3))


def test_the_jumps_use_what_was_there_before_them() -> None:
    state, c = torch.stack([start(1)[0] * k for k in range(1, 7)]), Constants.of(1.0, 6.0, 3.0)
    x, x_t, _, y_t, _, _ = state.clone()
    node = Node(state, lambda x, k: 3 * x + k, c, Flow(c))
    node.on_gradient(0.0)
    g = 3 * x - c.nu * x - y_t
    torch.testing.assert_close(state[0], x - c.gamma * g)
    torch.testing.assert_close(state[1], x_t - c.gamma_t * g)
    torch.testing.assert_close(state[3], y_t + (c.delta + 1) * g)
    _, _, y, _, z, z_t = state.clone()
    theirs = start(1, seed=1)[0]
    node.on_message(0.0, theirs.numpy())
    torch.testing.assert_close(state[4], z - 0.5 * (y + z - theirs))
    torch.testing.assert_close(state[5], z_t - c.beta_t * (y + z - theirs))


@SETTINGS(max_examples=8)
@given(st.sampled_from(sorted(GRAPHS)), st.integers(0, 1000))
def test_the_optimum_is_a_fixed_point_of_every_flow_and_event(name: str, seed: int) -> None:
    problem = least_squares(GRAPHS[name].n, seed)
    run = dadao(GRAPHS[name], problem, seed=seed)
    x = problem.solution.expand(GRAPHS[name].n, -1)
    slope = problem.gradient(x)
    rest = torch.stack([x, x, *[slope - problem.mu / 2 * x] * 2, -slope, -slope], 1)
    run.load_state_dict({**run.state_dict(), "state": rest})
    run.run(until=10.0)
    assert run.activations > 100
    scale = float(rest.abs().max())
    torch.testing.assert_close(run.states(), rest, rtol=0, atol=1e-9 * scale)


@pytest.mark.parametrize("name", sorted(GRAPHS))
def test_z_and_its_momentum_sum_to_zero_at_any_time(name: str) -> None:
    run = dadao(GRAPHS[name])
    for until in (3.0, 11.0, 23.0):
        run.run(until)
        z = run.states()[:, 4:]
        assert float(z.sum(0).abs().max()) < 1e-9 * float(z.abs().max())


def test_stopping_to_look_changes_nothing_and_flowing_in_parts_only_rounding() -> None:
    whole, looked, parts = (dadao(GRAPHS["grid"]) for _ in range(3))
    whole.run(20.0)
    for until in range(1, 21):
        looked.run(until)
        looked.sync()
    for event in parts.events(20.0):
        for node in parts.nodes:
            node.advance(max(node.time, event.time - 1e-3))
        parts.step(event)
    parts.now = 20.0
    assert torch.equal(looked.states(), whole.states())
    torch.testing.assert_close(parts.states(), whole.states(), rtol=1e-10, atol=1e-8)


# Graphs and rates.


def total(graph: Graph) -> float:
    return gossip_rates(graph).total


def test_total_rates_in_closed_form() -> None:
    for n in (3, 5, 16, 300):
        assert total(Graph.star(n)) == pytest.approx(n - 1, rel=1e-9)
    for n in (3, 8, 40):
        share = np.full(n * (n - 1) // 2, 2 / (n * (n - 1)))
        assert spectral(Graph.complete(n), share) == pytest.approx(((n - 1) / 2, (n - 1) / 2))
        assert total(Graph.complete(n)) == pytest.approx((n - 1) / math.sqrt(2))
    assert total(Graph.cycle(16)) == pytest.approx(39.7045, abs=1e-4)
    assert total(GRAPHS["grid"]) == pytest.approx(26.25, abs=0.01)
    assert total(GRAPHS["barbell"]) == pytest.approx(126.1, abs=0.06)


@SETTINGS(max_examples=30)
@given(st.integers(2, 12), st.data())
def test_resistances_are_the_pseudoinverses_and_chi2_is_at_most_chi1(n: int, data: st.DataObject) -> None:
    graph = Graph.random_geometric(n, data.draw(st.floats(0.05, 1)), data.draw(st.integers(0, 99)))
    m = len(graph.edges)
    weights = np.array(data.draw(st.lists(st.floats(0.1, 5), min_size=m, max_size=m)))
    laplacian = graph.laplacian(weights)
    inverse = np.linalg.pinv(laplacian)
    ends = [np.eye(n)[i] - np.eye(n)[j] for i, j in graph.edges]
    np.testing.assert_allclose(resistances(laplacian, graph.ends), [e @ inverse @ e for e in ends], rtol=1e-8)
    chi1, chi2 = spectral(graph, weights)
    assert 0 < chi2 <= chi1 * (1 + 1e-9)
    half = spectral(graph, weights / 2)
    assert half[0] * half[1] == pytest.approx(4 * chi1 * chi2)


@pytest.mark.parametrize(
    "graph", [Graph.star(16), Graph.cycle(16), Graph.path(16)], ids=["star", "cycle", "path"]
)
def test_uniform_rates_are_of_least_total_on_star_cycle_and_path(graph: Graph) -> None:
    best = gossip_rates(graph, "sdp")
    np.testing.assert_allclose(best.rates[0], gossip_rates(graph).rates[0], rtol=1e-4)
    assert best.product == pytest.approx(0.5, abs=1e-9)


def test_rates_of_least_total_on_grid_and_barbell() -> None:
    grid, barbell = gossip_rates(GRAPHS["grid"], "sdp"), gossip_rates(GRAPHS["barbell"], "sdp")
    assert grid.total == pytest.approx(24.89, abs=0.01)
    assert barbell.total == pytest.approx(32.9, abs=0.05)
    assert total(GRAPHS["barbell"]) / barbell.total == pytest.approx(3.83, abs=0.01)
    bridge = GRAPHS["barbell"].edges.index((7, 8))
    assert barbell.rates[0][bridge] == barbell.rates[0].max() == pytest.approx(6.77, abs=0.01)
    assert barbell.rates[0].min() == pytest.approx(0.22, abs=0.005)
    assert grid.product == pytest.approx(0.5, abs=1e-9)
    assert barbell.product == pytest.approx(0.5, abs=1e-9)


@SETTINGS(max_examples=40)
@given(
    st.sampled_from(["grid", "barbell", "geometric"]), st.integers(0, 10**6), st.sampled_from([0.02, 0.3, 2.0])
)
def test_no_other_rates_are_cheaper_than_the_programs(name: str, seed: int, spread: float) -> None:
    best = gossip_rates(GRAPHS[name], "sdp")
    noise = stream(seed).numpy.standard_normal(len(best.rates[0]))
    other = gossip_rates(GRAPHS[name], (best.rates[0] + 1e-3) * np.exp(spread * noise), rescale=True)
    assert other.total >= best.total * (1 - 1e-6)


@SETTINGS(max_examples=12)
@given(st.integers(2, 16), st.floats(0.25, 0.6), st.integers(0, 10**6))
def test_the_program_is_solved_on_any_graph(n: int, radius: float, seed: int) -> None:
    graph = Graph.random_geometric(n, radius, seed)
    best = gossip_rates(graph, "sdp")
    assert best.product == pytest.approx(0.5, abs=1e-9)
    assert best.total <= total(graph) * (1 + 1e-6)


def test_a_geometric_graph_is_joined_up_where_it_falls_apart() -> None:
    graph = Graph.random_geometric(30, 0.1, seed=3)
    assert len(graph.edges) >= 29
    assert graph == Graph.random_geometric(30, 0.1, seed=3)
    assert graph != Graph.random_geometric(30, 0.1, seed=4)


# The clock.


def test_events_come_at_their_rates() -> None:
    rates = gossip_rates(GRAPHS["barbell"], "sdp")
    events = list(PoissonClock(rates, seed=1).until(500.0))
    times = np.array([e.time for e in events])
    assert (np.diff(times) > 0).all()
    grads = np.bincount([e.i for e in events if e.kind == "grad"], minlength=16)
    edges = [(e.i, e.j) for e in events if e.kind == "edge"]
    for count, mean in ((grads.sum(), 16 * 500), (len(edges), rates.total * 500)):
        assert abs(count / mean - 1) < 4 / math.sqrt(count)
    expected = rates.rates[0] * 500
    counts = np.array([edges.count(e) for e in rates.graphs[0].edges])
    chi_squared = ((counts - expected) ** 2 / expected).sum() + ((grads - 500) ** 2 / 500).sum()
    assert chi_squared < 73 + 4 * math.sqrt(2 * 73)


def test_a_clock_goes_on_from_where_it_stood() -> None:
    rates = gossip_rates(GRAPHS["barbell"])
    whole = list(PoissonClock(rates, seed=2).until(70.0))
    first, second = PoissonClock(rates, seed=2), PoissonClock(rates, seed=9)
    head = list(first.until(41.0))
    second.load_state_dict(first.state_dict())
    assert head + list(second.until(70.0)) == whole
    assert len(whole) > 2 * 4096
    assert whole != list(PoissonClock(rates, seed=3).until(70.0))


def test_graphs_that_take_turns_use_the_edges_of_the_one_that_is_there() -> None:
    graphs = [Graph.random_geometric(12, 0.3, seed) for seed in range(5)]
    rates = gossip_rates(graphs)
    shares = [spectral(g, np.full(len(g.edges), 1 / len(g.edges))) for g in graphs]
    chi1, chi2 = (max(s[k] for s in shares) for k in (0, 1))
    assert rates.total == pytest.approx(math.sqrt(2 * chi1 * chi2))
    assert rates.period == pytest.approx(1 / chi1)
    assert rates.product == pytest.approx(0.5)
    used: set[int] = set()
    for event in PoissonClock(rates).until(3.0):
        k = int(event.time * chi1) % 5
        if event.kind == "edge":
            assert (event.i, event.j) in graphs[k].edges
            used.add(k)
    assert used == set(range(5))


# Runs.


def slope(run: DADAO, problem: LeastSquares, until: float = 120.0) -> float:
    """Of -log mean_i |x_i - x*|^2 against time, fitted to the second half of a run."""
    times = np.linspace(until / 2, until, 40)
    values = []
    for t in times:
        run.run(t)
        values.append(math.log(error(run.sync(), problem.solution)))
    return -float(np.polyfit(times, values, 1)[0])


def promised(problem: LeastSquares) -> float:
    return math.sqrt(problem.mu / problem.L) / (8 * math.sqrt(2))


@pytest.mark.parametrize("name", sorted(GRAPHS))
def test_the_error_falls_at_the_promised_rate(name: str) -> None:
    problem = least_squares(GRAPHS[name].n)
    assert slope(dadao(GRAPHS[name], problem), problem) >= promised(problem)


@pytest.mark.parametrize("switched_off", ["beta_t", "gamma_t"])
def test_without_either_acceleration_it_does_not(switched_off: str) -> None:
    graph, problem = GRAPHS["star"], LeastSquares.random(16, 40, 5, 0, spread=6.0)
    assert problem.L / problem.mu > 32  # below that plain gradient steps keep the promise
    constants = Constants.of(problem.mu, problem.L, gossip_rates(graph).chi1)
    assert slope(dadao(graph, problem), problem, 400.0) >= promised(problem)
    run = dadao(graph, problem, constants=replace(constants, **{switched_off: 0.0}))
    assert slope(run, problem, 400.0) < promised(problem)


def test_a_single_node_is_an_accelerated_method_of_its_own() -> None:
    problem = least_squares(1)
    run = dadao(Graph(1, ()), problem)
    assert slope(run, problem, 200.0) >= promised(problem)
    assert run.activations == 0
    assert len(run.ledger) == 0


def test_without_averagings_every_node_finds_its_own_minimiser() -> None:
    problem = least_squares()
    run = dadao(GRAPHS["star"], problem)
    for event in run.events(400.0):
        if event.kind == "grad":
            run.step(event)
    own = problem.conjugate(torch.zeros(16, 5, dtype=F64))
    assert error(run.sync(), problem.solution) > 1
    torch.testing.assert_close(run.sync(), own, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_the_ledger_has_every_byte_and_gradient(dtype: torch.dtype) -> None:
    p = least_squares()
    gradients = [lambda x, k, g=g: g(x.double(), k).to(x.dtype) for g in p.gradients()]
    rates = gossip_rates(GRAPHS["grid"])
    run = DADAO(gradients, start(16).to(dtype), mu=p.mu, L=p.L, rates=rates)
    run.run(60.0)
    assert run.ledger.sent() == 2 * 5 * dtype.itemsize * run.activations
    assert run.ledger.worked("grad") == run.gradients
    assert abs(run.gradients / (16 * 60) - 1) < 4 / math.sqrt(run.gradients)
    assert abs(run.activations / (rates.total * 60) - 1) < 4 / math.sqrt(run.activations)
    assert run.ledger.rounds() <= 60


def test_a_budget_stops_the_run_before_the_event() -> None:
    run = dadao(GRAPHS["grid"], ledger=Ledger(Budget({"payload": 400})))
    with pytest.raises(BudgetExceeded, match="budget of 400 payload"):
        run.run(100.0)
    assert max(run.ledger.sent(party) for party in range(16)) == 400


def test_single_precision_follows_double() -> None:
    p = least_squares()
    gradients = [lambda x, k, g=g: g(x.double(), k).float() for g in p.gradients()]
    single = DADAO(gradients, start(16).float(), mu=p.mu, L=p.L, rates=gossip_rates(GRAPHS["grid"]))
    double = dadao(GRAPHS["grid"], p)
    single.run(50.0)
    double.run(50.0)
    assert single.sync().dtype == torch.float32
    torch.testing.assert_close(single.sync().double(), double.sync(), rtol=1e-4, atol=1e-2)


def test_graphs_that_take_turns_converge() -> None:
    graphs = [Graph.random_geometric(10, 0.4, seed) for seed in range(6)]
    problem = least_squares(10)
    run = DADAO(problem.gradients(), start(10), mu=problem.mu, L=problem.L, rates=gossip_rates(graphs))
    assert slope(run, problem) >= promised(problem)


def test_minibatches_and_the_mean_over_a_nodes_events() -> None:
    problem = least_squares()
    options = {"rates": gossip_rates(GRAPHS["star"]), "mu": problem.mu, "L": problem.L, "average": True}
    run = DADAO(problem.minibatches(4, seed=1), start(16), **options)  # type: ignore[arg-type]
    sums, counts = torch.zeros(16, 5, dtype=F64), [0] * 16
    for event in run.events(150.0):
        run.step(event)
        for i in (event.i, event.j)[: 1 + (event.j >= 0)]:
            sums[i] += run.nodes[i].point
            counts[i] += 1
    torch.testing.assert_close(run.averages, sums / torch.tensor(counts)[:, None], rtol=1e-9, atol=1e-9)
    first = error(start(16), problem.solution)
    assert error(run.averages, problem.solution) < 0.02 * first


def test_a_models_gradients_train_it() -> None:
    problem, rates = least_squares(4), gossip_rates(Graph.path(4))
    model = nn.Linear(5, 1, bias=False, dtype=F64)
    before = model.weight.detach().clone()
    shards = [(a, b[:, None]) for a, b in zip(problem.rows, problem.targets, strict=True)]
    gradients = module_gradients(model, nn.functional.mse_loss, shards)
    space, x = ParamSpace.of(model), start(4)
    for mine, exact in zip(gradients, problem.gradients(), strict=True):
        torch.testing.assert_close(mine(x[0], 0), exact(x[0], 0))
    run = DADAO(gradients, x, mu=problem.mu, L=problem.L, rates=rates)
    run.run(250.0)
    found = space.views(run.sync()[2])["weight"]
    torch.testing.assert_close(found[0], problem.solution, rtol=1e-3, atol=1e-3)
    assert torch.equal(model.weight, before)


def test_a_models_minibatches_are_a_function_of_node_and_call() -> None:
    problem = least_squares(2)
    model = nn.Linear(5, 1, dtype=F64)
    shards = [(a, b[:, None]) for a, b in zip(problem.rows, problem.targets, strict=True)]
    one, two = (module_gradients(model, nn.functional.mse_loss, shards, batch=8, seed=3) for _ in range(2))
    x = start(1, 6)[0]
    assert torch.equal(one[1](x, 7), two[1](x, 7))
    assert not torch.equal(one[1](x, 7), one[1](x, 8))
    ridge = module_gradients(model, nn.functional.mse_loss, shards, ridge=0.5)
    plain = module_gradients(model, nn.functional.mse_loss, shards)
    torch.testing.assert_close(ridge[0](x, 0), plain[0](x, 0) + 0.5 * x)


def test_a_step_may_change_the_order_of_no_nodes_events() -> None:
    run = dadao(GRAPHS["star"])
    run.step(Event(1.0, 3))
    run.step(Event(0.5, 4))
    with pytest.raises(ValueError, match=r"time must be >= that of the node's last event, 1\.0; got 0\.9"):
        run.step(Event(0.9, 0, 3))


# Resume.


@pytest.mark.parametrize("average", [False, True])
def test_a_checkpoint_through_a_file_continues_bit_for_bit(average: bool) -> None:
    problem, graph = least_squares(), GRAPHS["barbell"]

    def fresh(seed: int) -> DADAO:
        rates = gossip_rates(graph)
        options = {"mu": problem.mu, "L": problem.L, "rates": rates, "average": average}
        return DADAO(problem.minibatches(4, seed=1), start(16), seed=seed, **options)  # type: ignore[arg-type]

    whole, first, second = fresh(0), fresh(0), fresh(5)
    whole.run(40.0)
    first.run(20.3)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    second.run(40.0)
    assert torch.equal(second.states(), whole.states())
    assert (second.gradients, second.activations) == (whole.gradients, whole.activations)
    if average:
        assert torch.equal(second.averages, whole.averages)


def test_a_state_of_another_run_is_refused() -> None:
    run = dadao(GRAPHS["star"])
    with pytest.raises(ValueError, match=r"state is of \(nodes, 6, d\) = \(20, 6, 5\)"):
        run.load_state_dict(dadao(GRAPHS["geometric"]).state_dict())
    with pytest.raises(ValueError, match="another graph, other rates or other constants"):
        run.load_state_dict(dadao(GRAPHS["grid"]).state_dict())
    with pytest.raises(ValueError, match="both be with average=True or both without"):
        run.load_state_dict(dadao(GRAPHS["star"], average=True).state_dict())


# Bad input.


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Graph(4, ((0, 1), (2, 3))), r"connected; nodes \[2, 3\] are not reached from node 0"),
        (lambda: Graph(2, ((0, 0), (0, 1))), r"two different nodes of 0 \.\. 1; got \(0, 0\)"),
        (lambda: Graph(2, ((0, 5),)), r"two different nodes of 0 \.\. 1; got \(0, 5\)"),
        (lambda: Graph(2, ((0, 1), (1, 0))), r"once each; got \(0, 1\) twice"),
        (lambda: Graph(0, ()), "n must be >= 1; got 0"),
        (lambda: gossip_rates(Graph.star(4), "best"), "method must be 'uniform', 'sdp' or the rates"),
        (lambda: gossip_rates([Graph.star(4)] * 2, "sdp"), "several graphs need method 'uniform'"),
        (lambda: gossip_rates([Graph.star(4), Graph.star(5)]), "several on the same nodes"),
        (lambda: gossip_rates(Graph.star(4), [1, 1]), r"one for each of 3 edges; got \(2,\)"),
        (lambda: gossip_rates(Graph.star(4), [1, -2, 1]), r"edge \(0, 2\) has -2\.0"),
        (lambda: gossip_rates(Graph.star(4), [1, math.nan, 1]), r"edge \(0, 2\) has nan"),
        (lambda: gossip_rates(Graph.star(4), [1, 0, 1]), "positive rate must connect the graph"),
        (lambda: gossip_rates(Graph.star(4), [0.5] * 3), r"<= 1/2; got 2\. Multiplied by 2 they are"),
        (lambda: turns([1.0] * 3, [2.0] * 3, 1.0), r"one total rate; got \[3\.0, 6\.0\]"),
        (lambda: turns([1.0] * 3, [1.0] * 3, 0.0), "period must be > 0; got 0.0"),
        (lambda: dadao(Graph.star(4), mu=0.0), "mu must be a positive number; got 0"),
        (lambda: dadao(Graph.star(4), mu=2.0, L=1.0), "L must be a number >= mu = 2.0; got 1.0"),
        (lambda: dadao(Graph.star(4), L=math.inf), "L must be a number >= mu"),
        (lambda: dadao(Graph.star(4), least_squares(5)), "one for each of the graph's 4 nodes; got 5"),
        (lambda: on(torch.zeros(3, 5)), r"x0 must have shape \(d,\) or \(4, d\); got \(3, 5\)"),
        (lambda: on(torch.zeros(4, 5), kappa=2e4), "must be float64 where L / mu > 10000; got float32"),
        (lambda: module_gradients(nn.Linear(2, 1), nn.functional.mse_loss, [], ridge=-1), "ridge must be >= 0"),
        (lambda: module_gradients(nn.Linear(2, 1), nn.functional.mse_loss, [], batch=0), "batch must be >= 1"),
        (lambda: module_gradients(nn.Linear(2, 1), nn.functional.mse_loss, [EMPTY]), "shard 0 must hold rows"),
        (lambda: LeastSquares(torch.zeros(2, 3, 4), torch.zeros(2, 3)), "Hessian of full rank"),
        (lambda: RidgeLogistic([torch.ones(2, 2)], [torch.ones(2)], 0.0), "ridge must be > 0; got 0"),
        (lambda: RidgeLogistic([torch.ones(2, 2)], [torch.zeros(2)], 1.0), "labels must be -1 or 1"),
    ],
)
def test_bad_arguments_are_refused(make: Callable[[], object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()


def turns(first: list[float], second: list[float], period: float) -> GossipRates:
    return GossipRates((Graph.star(4),) * 2, (np.array(first), np.array(second)), period)


EMPTY = (torch.zeros(0, 2), torch.zeros(0, 1))


def on(x0: Tensor, kappa: float = 5.0) -> DADAO:
    return DADAO([lambda x, k: x] * 4, x0, mu=1.0, L=kappa, rates=gossip_rates(Graph.star(4)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64])
def test_half_precision_is_refused(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match="x0 must be float32 or float64"):
        on(torch.zeros(4, 5, dtype=dtype))


def test_rates_that_are_too_low_are_scaled_if_asked() -> None:
    rates = gossip_rates(Graph.star(4), [0.5] * 3, rescale=True)
    np.testing.assert_allclose(rates.rates[0], 1.0)
    assert gossip_rates(Graph.star(4), [2.0] * 3).product == pytest.approx(1 / 8)


def test_a_gradient_that_is_no_number_or_has_another_shape_changes_nothing() -> None:
    for bad, kind, said in (
        (lambda x, k: x / 0, FloatingPointError, r"gradient 0 is not finite at time 1: is L too small"),
        (lambda x, k: x[:2], ValueError, r"gradient must have shape \(5,\); got \(2,\)"),
    ):
        run = DADAO([bad] * 4, start(4), mu=1.0, L=5.0, rates=gossip_rates(Graph.star(4)))
        before = run.states()
        with pytest.raises(kind, match=said):
            run.step(Event(1.0, 2))
        still = run.nodes[2]
        expected = before[2].clone()
        run.flow(expected, 1.0)
        torch.testing.assert_close(run._state[2], expected)
        assert (still.events, still.gradients) == (0, 0)


def test_without_cvxpy_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    from cograd.machines.dadao import rates

    def missing(name: str) -> object:
        raise ImportError(name)

    monkeypatch.setattr(rates, "import_module", missing)
    with pytest.raises(ImportError, match=r"pip install 'cograd\[convex\]'"):
        gossip_rates(Graph.star(7), "sdp")


def test_averages_must_be_asked_for() -> None:
    with pytest.raises(ValueError, match="no averages are kept: make the run with average=True"):
        _ = dadao(GRAPHS["star"]).averages


def test_the_logistic_problem_knows_its_gradient_and_its_optimum() -> None:
    draw = stream(0, "logistic").numpy
    rows = [torch.from_numpy(draw.standard_normal((m, 3))) for m in (7, 9, 8)]
    labels = [torch.from_numpy(np.sign(draw.standard_normal(len(r)))) for r in rows]
    problem = RidgeLogistic(rows, labels, 0.1)
    x = start(3, 3).requires_grad_()
    loss = sum(
        nn.functional.softplus(-b * (a @ x[i])).mean() + 0.05 * x[i].square().sum()
        for i, (a, b) in enumerate(zip(rows, labels, strict=True))
    )
    loss.backward()  # type: ignore[union-attr]
    torch.testing.assert_close(problem.gradient(x.detach()), x.grad)
    ones = torch.stack([g(xi, 0) for g, xi in zip(problem.gradients(), x.detach(), strict=True)])
    torch.testing.assert_close(ones, problem.gradient(x.detach()))
    at = problem.solution.expand(3, 3)
    assert float(problem.gradient(at).sum(0).norm()) < 1e-12
    run = DADAO(problem.gradients(), start(3, 3), mu=problem.mu, L=problem.L, rates=gossip_rates(Graph.path(3)))
    run.run(400.0)
    assert error(run.sync(), problem.solution) < 1e-10
