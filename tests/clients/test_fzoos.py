"""FZooS: surrogates have the gradients that they should, and what is asked and sent is as published."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cograd.clients import FZooS
from cograd.clients.baselines import FedZO, FiniteDifferences, ZOFedProx, ZOScaffold
from cograd.clients.baselines.zo_scaffold import PointGradient
from cograd.clients.fzoos import (
    SGD,
    Active,
    Adam,
    BlackBox,
    GPSurrogate,
    Oracle,
    RandomFeatures,
    TrajectoryGradient,
    ZerothOrder,
)
from cograd.clients.fzoos.gp import KERNELS
from cograd.core.codecs import Float64
from cograd.core.streams import stream
from cograd.engines.federated import ClientError, Cyclic, NotFinite, Simulation
from cograd.engines.federated.local import LocalModel
from cograd.engines.federated.protocol import ClientContext
from cograd.papers._fzoos_synthetic import ackley, levy, quadratic

FEW = Active(local=2, local_candidates=6, server=4, server_candidates=8, initial=3)
SMALL: dict[str, Any] = {
    "gradient": TrajectoryGradient(active=FEW),
    "description": RandomFeatures(40),
    "local_steps": 3,
}
DIM = 6
START = torch.full((DIM,), 0.4)


def bowl(centre: float):
    return lambda x: float(((x - centre) ** 2).sum())


def boxes(centres=(0.2, 0.5, 0.9), function=bowl) -> list[BlackBox]:
    return [BlackBox(function(c)) for c in centres]


def simulated(method, rounds=2, clients=None, dtype=torch.float32, **options) -> Simulation:
    exact = {"up": Float64(), "down": Float64()} if dtype == torch.float64 else {}
    x0 = torch.full((DIM,), 0.4, dtype=dtype)
    sim = Simulation(method, x0, None, boxes() if clients is None else clients, **{**exact, **options})
    sim.run(rounds)
    return sim


def context(client=0, round=0, dim=DIM, sizes=(1, 1), dtype=torch.float64) -> ClientContext:
    x = torch.full((dim,), 0.4, dtype=dtype)
    model = LocalModel.of(x, None)
    return ClientContext(client, round, 0, sizes, model, model.theta.clone())


def cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a, b, dim=0))


# The local surrogate.


@pytest.mark.parametrize("kernel", list(KERNELS))
@pytest.mark.parametrize("where", ["inside", "at 0", "at a query"])
def test_the_gradient_is_that_of_the_posterior_mean(kernel, where):
    draws = stream(0, "points", kernel)
    points = draws.uniform(25, 4).double()
    values = torch.sin(5 * points).sum(1) + 3
    found = GPSurrogate(kernel, lengthscales=(0.5,)).fit(points, values)
    x = {"inside": draws.uniform(4).double(), "at 0": torch.zeros(4).double(), "at a query": points[3]}[where]
    g = found.gradient(x)
    if where != "at a query":  # autograd of a square root is NaN there
        there = x.clone().requires_grad_()
        (by_autograd,) = torch.autograd.grad(found.mean(there), there)
        assert torch.allclose(g, by_autograd, rtol=1e-8, atol=1e-8)
    step = 1e-5 * torch.eye(4, dtype=torch.float64)
    differences = torch.stack([(found.mean(x + e) - found.mean(x - e)) / 2e-5 for e in step])
    assert torch.allclose(g, differences, atol=1e-5)


@pytest.mark.parametrize("kernel", list(KERNELS))
def test_the_posterior_mean_goes_through_the_queries(kernel):
    points = stream(1, "points").uniform(12, 3).double()
    values = 100 + points.square().sum(1)
    found = GPSurrogate(kernel, lengthscales=(0.5,)).fit(points, values)
    at = torch.stack([found.mean(x) for x in points])
    assert torch.allclose(at, values, atol=1e-4)


def test_a_linear_function_has_its_gradient():
    draws = stream(2, "linear")
    slope = draws.normal(8).double()
    points = 0.5 + 0.02 * draws.normal(20, 8).double()
    g = GPSurrogate(jitter=1e-10).fit(points, points @ slope).gradient(points.mean(0))
    assert cosine(g, slope) > 0.999
    assert torch.allclose(g, slope, atol=0.1)


def test_a_quadratic_function_has_its_gradient():
    draws = stream(3, "quadratic")
    root = draws.normal(5, 5).double()
    hessian, x = root @ root.T, draws.uniform(5).double()
    points = x + 0.1 * draws.normal(60, 5).double()
    values = 0.5 * ((points @ hessian) * points).sum(1)
    assert cosine(GPSurrogate().fit(points, values).gradient(x), hessian @ x) > 0.99


@pytest.mark.parametrize("kernel", list(KERNELS))
def test_uncertainty_is_the_trace_of_the_posterior_covariance(kernel):
    """Against the definition, Jacobian by Jacobian, with k'' by autograd."""
    draws = stream(4, "uncertainty")
    points, candidates = draws.uniform(9, 3).double(), draws.uniform(4, 3).double()
    surrogate = GPSurrogate(kernel, lengthscales=(0.7,))
    found = surrogate.fit(points, points.sum(1))
    value, scale = KERNELS[kernel].value, torch.tensor(0.7, dtype=torch.float64)
    k = value(torch.cdist(points, points).square(), scale) + 1e-6 * torch.eye(9, dtype=torch.float64)
    for x, known in zip(candidates, found.uncertainty(candidates), strict=True):
        jacobian = torch.autograd.functional.jacobian(lambda z: value((z - points).square().sum(1), scale), x)
        # k(x, x') near x = x' is 1 - curvature / (2 l^2) |x - x'|^2: that is what k''(0) is
        prior = 3 * KERNELS[kernel].curvature / 0.7**2
        direct = prior - torch.trace(jacobian.T @ torch.linalg.solve(k, jacobian))
        assert float(known) == pytest.approx(float(direct), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("kernel", list(KERNELS))
def test_the_curvature_is_that_of_the_kernel_at_0(kernel):
    r = torch.tensor(1e-3, dtype=torch.float64)
    one = torch.tensor(1.0, dtype=torch.float64)
    second = 2 * (1 - KERNELS[kernel].value(r**2, one)) / r**2
    assert float(second) == pytest.approx(KERNELS[kernel].curvature, rel=1e-2)


def test_the_length_scale_is_that_of_the_largest_likelihood_and_all_are_tried_at_once():
    points = stream(5, "likelihood").uniform(30, 2).double()
    values = torch.sin(9 * points[:, 0]) + points[:, 1]
    grid = (0.03, 0.1, 0.3, 1.0, 3.0)
    found = GPSurrogate(lengthscales=grid).fit(points, values)
    u = (values - values.min()) / (values.max() - values.min())
    singly = {}
    for scale in grid:
        k = KERNELS["matern52"].value(torch.cdist(points, points).square(), torch.tensor(scale).double())
        k += 1e-6 * torch.eye(30, dtype=torch.float64)
        normal = torch.distributions.MultivariateNormal(torch.zeros(30).double(), k)
        singly[scale] = float(normal.log_prob(u))
    assert found.lengthscale == max(singly, key=lambda scale: singly[scale])
    assert found.likelihood == pytest.approx(singly[found.lengthscale], rel=1e-6)
    alone = GPSurrogate(lengthscales=(found.lengthscale,)).fit(points, values)
    x = torch.tensor([0.3, 0.6]).double()
    assert torch.allclose(alone.gradient(x), found.gradient(x), rtol=1e-9)


def test_equal_values_have_no_gradient():
    points = stream(6, "flat").uniform(5, 3).double()
    flat = torch.full((5,), 2.5).double()
    assert GPSurrogate().fit(points, flat).gradient(points[0]).tolist() == [0, 0, 0]
    assert not RandomFeatures(30).fit(points, flat, 0).any()


@settings(max_examples=20, deadline=None)
@given(scale=st.floats(1e-3, 1e3), shift=st.floats(-1e3, 1e3))
def test_values_may_be_in_any_unit(scale, shift):
    points = stream(7, "units").uniform(12, 3).double()
    values, x = torch.sin(3 * points).sum(1), torch.full((3,), 0.5).double()
    one, other = (GPSurrogate().fit(points, y).gradient(x) for y in (values, scale * values + shift))
    assert torch.allclose(other, scale * one, rtol=1e-3, atol=1e-3 * scale)
    seen = RandomFeatures(300)
    one, other = (seen.gradient(x, seen.fit(points, y, 0), 0) for y in (values, scale * values + shift))
    assert torch.allclose(other, scale * one, rtol=1e-3, atol=1e-3 * scale)


def test_only_the_nearest_queries_enter():
    points = stream(8, "near").uniform(40, 3).double()
    values, x = points.square().sum(1), torch.full((3,), 0.5).double()
    order = (points - x).square().sum(1).argsort()[:10]
    found = GPSurrogate(neighbours=10).near(x, points, values).gradient(x)
    assert torch.allclose(found, GPSurrogate().fit(points[order], values[order]).gradient(x), rtol=1e-6)


def test_queries_in_one_place_are_refused():
    points = torch.ones(5, 3)
    for fit in (GPSurrogate().fit, lambda x, y: RandomFeatures(9).fit(x, y, 0)):
        with pytest.raises(ValueError, match="points must hold at least 2 that differ; got 5 in one place"):
            fit(points, torch.arange(5))
        with pytest.raises(ValueError, match="at least 2 that differ; got 0"):
            fit(points[:0], torch.zeros(0))
    with pytest.raises(ValueError, match="values must be finite; got 1 that are not"):
        GPSurrogate().fit(torch.eye(3), torch.tensor([0, math.nan, 1]))
    with pytest.raises(ValueError, match=r"values must have shape \(3,\); got \(2,\)"):
        GPSurrogate().fit(torch.eye(3), torch.zeros(2))


# The surrogate that travels.


def test_features_estimate_the_kernel():
    x, y = stream(9, "pair").uniform(2, 5).double()
    features = RandomFeatures(50, lengthscale=0.8)
    seen = []
    for seed in range(200):
        phi = features.features(torch.stack([x, y]), seed)
        seen.append(float(phi[0] @ phi[1]))
    expected = math.exp(-float((x - y).square().sum()) / (2 * 0.8**2))
    off = torch.tensor(seen).double()
    assert abs(float(off.mean()) - expected) < 4 * float(off.std()) / math.sqrt(200)


def test_the_gradient_of_weights_is_that_of_their_function():
    draws = stream(10, "weights")
    features, w, z = RandomFeatures(70, lengthscale=0.6), draws.normal(70).double(), draws.uniform(4).double()
    there = z.clone().requires_grad_()
    (expected,) = torch.autograd.grad(_phi(features, there, 3) @ w, there)
    assert torch.allclose(features.gradient(z, w, 3), expected, atol=1e-12)


def _phi(features: RandomFeatures, x: Tensor, seed: int) -> Tensor:
    """phi by the formula, from W and b as they are drawn."""
    draws = stream(seed, "random Fourier features")
    w = draws.normal(len(x), features.count).double() / features.lengthscale
    b = 2 * math.pi * draws.uniform(features.count).double()
    return math.sqrt(2 / features.count) * torch.cos(w.T @ x + b)


def test_the_gradient_of_mean_weights_is_the_mean_of_gradients():
    draws = stream(11, "mean")
    features, z = RandomFeatures(50), draws.uniform(4).double()
    w = draws.normal(3, 50).double()
    mean = torch.stack([features.gradient(z, each, 0) for each in w]).mean(0)
    assert torch.allclose(features.gradient(z, w.mean(0), 0), mean, atol=1e-14)


def test_with_many_features_it_is_the_exact_posterior():
    """Mean and gradient of random features against the Gaussian process with the same kernel and ridge."""
    draws = stream(12, "posterior")
    points, x = draws.uniform(12, 2).double(), draws.uniform(2).double()
    values = torch.sin(4 * points).sum(1)
    exact = GPSurrogate("se", jitter=1e-2, lengthscales=(0.5,)).fit(points, values)
    off = []
    for count in (400, 40_000):
        features = RandomFeatures(count, 0.5, ridge=1e-2)
        w = features.fit(points, values, 0)
        off.append(float((features.gradient(x, w, 0) - exact.gradient(x)).norm()))
        mean = float(values.min() + features.features(x[None], 0)[0] @ w)
    assert off[1] < 0.05 * float(exact.gradient(x).norm())
    assert off[1] < 0.5 * off[0]
    assert mean == pytest.approx(float(exact.mean(x)), abs=0.03)


def test_features_of_another_seed_count_or_scale_have_another_name():
    features = RandomFeatures(30)
    names = [features.name(4, 0), features.name(4, 1), features.name(5, 0), RandomFeatures(31).name(4, 0)]
    names.append(replace(features, lengthscale=2.0).name(4, 0))
    assert len(set(names)) == 5
    assert RandomFeatures(30, ridge=1.0).name(4, 0) == names[0]


def test_a_client_and_a_server_with_other_features_refuse_each_other():
    sim = simulated(FZooS(**SMALL), 1)
    method, session, name = sim.method, sim.session, RandomFeatures(40).name(DIM, 0)
    server = {**sim.server, "stage": "survey"}
    replies = {0: {name: torch.zeros(40)}, 2: {"w:of another seed": torch.zeros(40)}}
    with pytest.raises(ValueError, match=f"client 2 must describe functions as {name}.*got w:of another seed"):
        method.close(server, replies, session)
    with pytest.raises(ValueError, match=r"the server must describe functions as .*got w:other"):
        method.walk({}, {"w:other": torch.zeros(40)}, boxes()[0], context(dtype=torch.float32))


def test_clients_that_agree_are_not_corrected():
    """G - g_i is exactly 0 where all say the same, so the walk is the one without a correction."""
    method = FZooS(**SMALL)
    box, ctx = BlackBox(bowl(0.3)), context()
    state, _ = method.walk({}, {method.description.name(DIM, 0): torch.zeros(40)}, box, ctx)
    state, said = method.survey(state, {"x": state["end"]}, box, ctx)
    (w,) = said.values()
    assert w.abs().max() > 0
    walks = [
        replace(method, gamma=gamma).walk(dict(state), said, box, context(round=1))[1]["x"]
        for gamma in (0.0, 1.0, 5.0)
    ]
    assert torch.equal(walks[0], walks[1])
    assert torch.equal(walks[0], walks[2])
    other = method.walk(dict(state), {method.description.name(DIM, 0): 2 * w}, box, context(round=1))[1]["x"]
    assert not torch.equal(walks[0], other)


# The round: what is asked, what is sent.


@pytest.mark.parametrize("safeguard", [False, True])
@pytest.mark.parametrize(("steps", "rounds"), [(1, 2), (3, 3)])
def test_queries_are_as_published(safeguard, steps, rounds):
    """N (10 + R (1 + T + 5 (T - 1) + 51)), and 2 N R with the safeguard; no other call."""
    method = FZooS(description=RandomFeatures(30), local_steps=steps, safeguard=safeguard)
    clients = boxes()
    sim = simulated(method, rounds, clients)
    expected = 10 + rounds * (1 + steps + 5 * (steps - 1) + 51 + 2 * safeguard)
    assert method.queries(rounds) == expected
    assert [box.calls for box in clients] == [expected] * 3
    assert sim.tally.work == {"query": 3 * expected}
    assert sim.history[-1].work["query"] == 3 * expected


def test_without_description_a_client_asks_only_on_its_way():
    method = FZooS(description=None, local_steps=4)
    sim = simulated(method, 2)
    assert sim.tally.work["query"] == 3 * (10 + 2 * (1 + 4 + 15)) == 3 * method.queries(2)
    assert sim.tally.up == sim.tally.down == 3 * 2 * 4 * DIM


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bytes_are_as_published(dtype):
    """(d + M) numbers up and as many down, a client and round."""
    sim = simulated(FZooS(**SMALL), 3, dtype=dtype)
    each = (DIM + 40) * dtype.itemsize
    assert [(row.up, row.down) for row in sim.history] == [(3 * r * each, 3 * r * each) for r in (1, 2, 3)]


def test_the_safeguard_costs_a_point_down_and_two_numbers_up():
    sim = simulated(FZooS(**SMALL, safeguard=True), 2)
    assert sim.tally.down == 3 * 2 * 4 * (DIM + 40 + DIM)
    assert sim.tally.up == 3 * 2 * (4 * (DIM + 40) + 16)


def test_the_round_is_the_cards():
    """Against the algorithm written out: surrogate gradients, exploration, survey, correction."""
    method = FZooS(**SMALL, optimizer=SGD(0.02), server_lr=0.7)
    sim = simulated(method, 2, dtype=torch.float64)
    functions = [bowl(c) for c in (0.2, 0.5, 0.9)]
    x, w = torch.full((DIM,), 0.4).double(), torch.zeros(40).double()
    own = [None] * 3
    known = [([], []) for _ in functions]
    scales = [0.0] * 3
    features, surrogate = method.description, GPSurrogate()

    def cube(client, round, key, count, at, radius):
        draws = stream(0, "client", client, round, *key).uniform(count, DIM).double()
        return (at + radius * (2 * draws - 1)).clamp(0, 1)

    for r in range(2):
        ends = []
        for i, f in enumerate(functions):
            points, values = known[i]

            def ask(at, points=points, values=values, f=f):
                points.extend(at)
                values.extend(f(p) for p in at)

            def posterior(scale=None, points=points, values=values):
                return surrogate.fit(torch.stack(points), torch.tensor(values).double(), scale)

            v = x
            if not r:
                ask(cube(i, r, ["initial"], 3, v, 0.01))
            ask([v])
            for t in (1, 2, 3):
                if t > 1:
                    near = cube(i, r, ["candidates", t], 6, v, 0.01)
                    ask(near[posterior(scales[i]).uncertainty(near).topk(2).indices])
                found = posterior()
                scales[i] = found.lengthscale
                g = found.gradient(v)
                if r:
                    g = g + 1 / t * (features.gradient(v, w, 0) - features.gradient(v, own[i], 0))
                v = (v - 0.02 * g).clamp(0, 1)
                ask([v])
            ends.append(v)
        x = x - 0.7 * torch.stack([x - end for end in ends]).mean(0)
        for i, f in enumerate(functions):
            points, values = known[i]
            points.append(x)
            values.append(f(x))
            near = cube(i, r, ["candidates", 0], 8, x, float((x - ends[i]).abs().mean()) / 2)
            all_points, all_values = torch.stack(points), torch.tensor(values).double()
            unsure = surrogate.fit(all_points, all_values, scales[i]).uncertainty(near).topk(4).indices
            points.extend(near[unsure])
            values.extend(f(p) for p in near[unsure])
            own[i] = features.fit(torch.stack(points), torch.tensor(values).double(), 0)
        w = torch.stack(own).mean(0)
    assert torch.allclose(sim.server["x"], x, atol=1e-9)
    assert torch.allclose(sim.server["w"], w, rtol=1e-4, atol=1e-5 * float(w.abs().max()))
    z = torch.full((DIM,), 0.45).double()
    assert torch.allclose(method.global_gradient(sim.server, z), features.gradient(z, w, 0), rtol=1e-3)


def test_points_and_queries_stay_in_the_box():
    asked = []

    def far(x: Tensor) -> float:
        asked.append(x.clone())
        return float(x.sum())  # the least value lies in a corner

    method = FZooS(**SMALL, optimizer=SGD(1.0))
    sim = simulated(method, 2, [BlackBox(far)])
    seen = torch.stack(asked)
    assert seen.min() == 0
    assert seen.max() <= 1
    assert sim.server["x"].abs().max() < 1e-3
    assert simulated(replace(method, bounds=None), 2, [BlackBox(far)]).server["x"].max() < -0.5


def test_it_finds_the_mean_of_centres():
    method = FZooS(description=RandomFeatures(400), local_steps=5)
    sim = simulated(method, 15)
    assert torch.allclose(sim.server["x"], torch.full((DIM,), 1.6 / 3), atol=0.02)


def test_weights_are_the_clients_sizes():
    heavy = [BlackBox(bowl(0.2), weight=3), BlackBox(bowl(0.8))]
    sim = simulated(FZooS(**SMALL), 1, heavy)
    ends = [sim.states[client]["end"] for client in range(2)]
    assert torch.allclose(sim.server["x"], (3 * ends[0] + ends[1]) / 4, atol=1e-6)
    said = [sim.states[client]["w"] for client in range(2)]
    assert torch.allclose(sim.server["w"], (3 * said[0] + said[1]) / 4, atol=1e-6)


def test_the_safeguard_discards_what_is_no_better():
    peak = [BlackBox(lambda x: -float(((x - 0.4) ** 2).sum()))]  # 0.4 is the start, where -f is least
    kept = simulated(FedZO(gradient=FiniteDifferences(2), optimizer=SGD(0.1), safeguard=True), 3, peak)
    assert kept.history[-1].reports["taken"] == 1.0

    class Up(FiniteDifferences):
        def estimate(self, x, t, oracle):
            return -super().estimate(x, t, oracle)

    up = simulated(FedZO(gradient=Up(2), safeguard=True), 3)
    assert torch.equal(up.server["x"], torch.full((DIM,), 0.4))
    assert [row.reports["taken"] for row in up.history] == [0.0] * 3


def test_whoever_sleeps_gets_the_point_when_it_comes_back():
    sim = simulated(FZooS(**SMALL), 1, sampler=Cyclic(count=1))
    assert sim.tally.down == 4 * (DIM + 40)
    sim.run(3)
    assert sim.tally.down == 3 * 4 * (DIM + 40) + 2 * 4 * DIM  # clients 1 and 2 lack x_r
    assert all(sim.states[client]["w"].abs().max() > 0 for client in range(3))
    assert torch.equal(sim.states[2]["x"], sim.server["x"])
    assert torch.equal(sim.server["w"], sim.states[2]["w"])


def test_a_value_that_is_not_finite_is_counted_and_dropped():
    def torn(x: Tensor) -> float:
        return math.nan if x[0] > 0.4 else float((x - 0.2).square().sum())

    sim = simulated(FZooS(**SMALL), 2, [BlackBox(torn)])
    state = sim.states[0]
    assert state["values"].isfinite().all()
    assert len(state["values"]) < sim.tally.work["query"] == sim.method.queries(2)
    with pytest.raises(ClientError, match="must be finite at its client's point; got nan"):
        simulated(FedZO(gradient=FiniteDifferences(2)), 1, [BlackBox(lambda x: math.nan)])
    pole = BlackBox(lambda x: math.inf if torch.equal(x, START) else float(x[0]))
    with pytest.raises(NotFinite):
        simulated(FZooS(**SMALL, safeguard=True), 1, [pole])


def test_a_trajectory_can_be_cut():
    whole = simulated(FZooS(**SMALL), 2)
    cut = simulated(FZooS(**{**SMALL, "gradient": TrajectoryGradient(active=FEW, keep=7)}), 2)
    assert len(whole.states[0]["values"]) == whole.method.queries(2)
    assert len(cut.states[0]["values"]) == len(cut.states[0]["points"]) == 7


def test_the_nearest_of_a_trajectory():
    ctx = context(dim=2)
    oracle = Oracle(BlackBox(lambda x: float(x[0])), {}, ctx, None)
    oracle.query(torch.tensor([[0.125, 0.0], [0.875, 0.0], [0.375, 0.0], [0.5, 0.0]]).double(), remember=True)
    oracle.query(torch.tensor([[0.45, 0.0]]).double())
    points, values = oracle.nearest(torch.tensor([0.5, 0.0]).double(), 2)
    assert sorted(values.tolist()) == [0.375, 0.5]
    assert points.shape == (2, 2)
    assert ctx.work == {"query": 5}


def test_workers_and_checkpoints_change_nothing(tmp_path: Path):
    straight = simulated(FZooS(**SMALL, safeguard=True), 3)
    with Simulation(FZooS(**SMALL, safeguard=True), START, None, boxes(), workers=2) as forked:
        forked.run(2, checkpoint=tmp_path / "saved")
    resumed = Simulation(FZooS(**SMALL, safeguard=True), START, None, boxes())
    resumed.run(3, checkpoint=tmp_path / "saved")
    assert torch.equal(resumed.server["x"], straight.server["x"])
    assert torch.equal(resumed.server["w"], straight.server["w"])
    assert resumed.tally.work == straight.tally.work


def test_batched_functions_are_the_same():
    one = simulated(FZooS(**SMALL), 1)
    batched = [BlackBox(lambda x, c=c: ((x - c) ** 2).sum(1), batched=True) for c in (0.2, 0.5, 0.9)]
    assert torch.allclose(simulated(FZooS(**SMALL), 1, batched).server["x"], one.server["x"], atol=1e-4)
    with pytest.raises(ValueError, match=r"must return 3 values for 3 points; got shape \(1,\)"):
        BlackBox(lambda x: x[:1, 0], batched=True)(torch.zeros(3, 2))


# Baselines: the same round, with finite differences.


class Fixed(FiniteDifferences):
    """Differences along the axes."""

    def draw(self, dim: int, t: int, oracle: Oracle) -> Tensor:
        return torch.eye(dim, dtype=torch.float64)


FD = FiniteDifferences(directions=4)


def test_without_correction_and_surrogate_it_is_fedzo_bit_for_bit():
    reference = simulated(FedZO(gradient=Fixed(), local_steps=3), 4)
    for method in (
        FZooS(gradient=Fixed(), description=None, local_steps=3),
        FZooS(gradient=Fixed(), description=PointGradient(), gamma=0.0, local_steps=3),
        ZOFedProx(gradient=Fixed(), prox=0.0, local_steps=3),
    ):
        assert torch.equal(simulated(method, 4).server["x"], reference.server["x"])


@pytest.mark.parametrize("kind", [1, 2])
def test_with_constant_surrogates_it_is_scaffold_bit_for_bit(kind):
    reference = simulated(ZOScaffold(gradient=FD, kind=kind, local_steps=3), 4)
    method = FZooS(gradient=FD, description=reference.method.description, gamma=1.0, decay=0.0, local_steps=3)
    assert torch.equal(simulated(method, 4).server["x"], reference.server["x"])


@pytest.mark.parametrize(
    "method",
    [
        FedZO(gradient=FD, local_steps=3),
        ZOFedProx(gradient=FD, local_steps=3, prox=0.3),
        ZOScaffold(gradient=FD, local_steps=3, kind=1),
        ZOScaffold(gradient=FD, local_steps=3, kind=2),
    ],
    ids=["FedZO", "FedProx", "SCAFFOLD-I", "SCAFFOLD-II"],
)
def test_baselines_are_the_cards_loops(method):
    """Against loops that know nothing of the library's rounds, with torch's Adam."""
    rounds, centres, functions = 3, (0.2, 0.5, 0.9), [bowl(c) for c in (0.2, 0.5, 0.9)]
    sim = simulated(method, rounds, dtype=torch.float64)
    x, control, controls = torch.full((DIM,), 0.4).double(), None, {}
    for r in range(rounds):
        ends, means = [], []
        for i, f in enumerate(functions):
            v = x.clone().requires_grad_()
            opt = torch.optim.Adam([v], lr=0.01)
            seen = []
            for t in (1, 2, 3):
                g = differences(f, v.detach(), i, r, t)
                seen.append(g)
                if isinstance(method, ZOFedProx):
                    g = g + 0.3 * (v.detach() - x)
                elif control is not None:
                    g = g + control - controls[i]
                v.grad = g
                opt.step()
                v.data.clamp_(0, 1)
            ends.append(v.detach())
            means.append(torch.stack(seen).mean(0))
        x = torch.stack(ends).mean(0)
        if isinstance(method, ZOScaffold):
            if method.kind == 1:
                means = [differences(f, x, i, r, 0) for i, f in enumerate(functions)]
            controls, control = dict(enumerate(means)), torch.stack(means).mean(0)
    assert torch.allclose(sim.server["x"], x, atol=1e-10)
    extra = 5 if isinstance(method, ZOScaffold) and method.kind == 1 else 0
    assert sim.tally.work["query"] == rounds * len(centres) * (3 * 5 + extra)


def differences(f, x: Tensor, client: int, round: int, t: int) -> Tensor:
    """RGF with Gram-Schmidt in a loop, as published."""
    rows, base = [], f(x)
    for u in stream(0, "client", client, round, "directions", t).normal(4, DIM).double():
        for other in rows:
            u = u - (u @ other) * other
        rows.append(u / u.norm())
    return torch.stack([(f(x + 0.01 * u) - base) / 0.01 * u for u in rows]).mean(0)


def test_all_directions_give_the_gradient():
    """With d orthonormal directions of a linear function; the mean of them is 1/d of it."""
    slope = stream(20, "slope").normal(DIM).double()
    oracle = Oracle(BlackBox(lambda x: float(x @ slope)), {}, context(), (0.0, 1.0))
    g = FiniteDifferences(DIM).estimate(torch.full((DIM,), 0.5).double(), 1, oracle)
    assert torch.allclose(g, slope / DIM, atol=1e-10)
    assert oracle.ctx.work == {"query": DIM + 1}


def test_directions_on_the_sphere_give_the_gradient_on_average():
    slope = stream(20, "slope").normal(DIM).double()
    oracle = Oracle(BlackBox(lambda x: float(x @ slope)), {}, context(), None)
    g = FiniteDifferences(20_000, kind="sphere").estimate(torch.full((DIM,), 0.5).double(), 1, oracle)
    assert cosine(g, slope) > 0.999
    assert torch.allclose(g, slope, atol=0.1)


def test_the_prior_is_a_direction_of_its_own():
    prior = stream(21, "prior").normal(DIM).double()
    fd, ctx = FiniteDifferences(3, kind="prgf"), context()
    before = fd.draw(DIM, 1, Oracle(boxes()[0], {}, ctx, None))
    along = fd.draw(DIM, 1, Oracle(boxes()[0], {"update": prior}, ctx, None))
    for rows in (before, along):
        assert rows.shape == (4, DIM)
        assert torch.allclose(rows @ rows.T, torch.eye(4).double(), atol=1e-12)
    assert torch.allclose(along[0], prior / prior.norm())
    sim = simulated(FedZO(gradient=fd, local_steps=2), 2)
    assert sim.tally.work["query"] == 3 * 2 * 2 * 5
    assert sim.states[0]["update"].norm() > 0


@pytest.mark.parametrize(
    ("method", "sent"), [(FedZO(gradient=FD), 1), (ZOFedProx(gradient=FD), 1), (ZOScaffold(gradient=FD), 2)]
)
def test_bytes_of_the_baselines(method, sent):
    sim = simulated(method, 2)
    assert sim.tally.up == sim.tally.down == 3 * 2 * sent * 4 * DIM


def test_adam_is_torchs():
    draws = stream(22, "adam")
    x = draws.normal(5).double()
    step, v = Adam(0.03, (0.8, 0.95), 1e-6).start(), x.clone().requires_grad_()
    opt = torch.optim.Adam([v], lr=0.03, betas=(0.8, 0.95), eps=1e-6)
    for _ in range(6):
        g = draws.normal(5).double()
        v.grad = g.clone()
        opt.step()
        x = step(x, g)
    assert torch.allclose(x, v.detach(), atol=1e-12)


# What is refused.


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FZooS(gamma=-1), "gamma must be >= 0 and finite; got -1"),
        (lambda: FZooS(decay=math.nan), "decay must be >= 0 and finite; got nan"),
        (lambda: FZooS(local_steps=0), "local_steps must be >= 1; got 0"),
        (lambda: FZooS(server_lr=0), "server_lr must be > 0 and finite; got 0"),
        (lambda: FZooS(gradient=GPSurrogate()), "gradient must be a LocalGradient; got GPSurrogate"),
        (lambda: FZooS(description=3), "description must be a Description or None; got 3"),
        (lambda: FZooS(bounds=(1, 1)), r"bounds must be None or a box.*; got \(1, 1\)"),
        (lambda: FZooS(bounds=lambda x: x), "bounds must be None or a box"),
        (lambda: RandomFeatures(0), "count must be >= 1; got 0"),
        (lambda: RandomFeatures(lengthscale=0), "lengthscale must be > 0 and finite; got 0"),
        (lambda: RandomFeatures(ridge=0), "ridge must be > 0 and finite; got 0"),
        (lambda: RandomFeatures(points=1), "points must be >= 2; got 1"),
        (lambda: GPSurrogate("rbf"), "kernel must be one of matern52, se; got 'rbf'"),
        (lambda: GPSurrogate(jitter=0), "jitter must be > 0 and finite; got 0"),
        (lambda: GPSurrogate(neighbours=1), "neighbours must be >= 2; got 1"),
        (lambda: GPSurrogate(lengthscales=()), r"lengthscales must be one or more numbers > 0; got \(\)"),
        (lambda: GPSurrogate(lengthscales=(1, -1)), "lengthscales must be one or more numbers > 0"),
        (lambda: Active(local=9, local_candidates=8), r"local must be in 0 \.\. 8; got 9"),
        (lambda: Active(server=-1), r"server must be in 0 \.\. 200; got -1"),
        (lambda: Active(initial=0), "initial must be >= 1; got 0"),
        (lambda: Active(radius=0), "radius must be > 0 and finite; got 0"),
        (lambda: TrajectoryGradient(keep=1), "keep must be >= 2 or None; got 1"),
        (lambda: FiniteDifferences(0), "directions must be >= 1; got 0"),
        (lambda: FiniteDifferences(width=0), "width must be > 0 and finite; got 0"),
        (lambda: FiniteDifferences(kind="spsa"), "kind must be one of rgf, prgf, sphere; got 'spsa'"),
        (lambda: ZOScaffold(kind=3), "kind must be 1 or 2; got 3"),
        (lambda: ZOFedProx(prox=-1), "prox must be >= 0 and finite; got -1"),
        (lambda: Adam(0), "lr must be > 0 and finite; got 0"),
        (lambda: Adam(betas=(1.0, 0.9)), "betas must be two numbers in"),
        (lambda: SGD(-1), "lr must be > 0 and finite; got -1"),
        (lambda: BlackBox(bowl(0), weight=0), "weight must be >= 1; got 0"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_bad_starts_and_directions_are_named():
    with pytest.raises(ValueError, match=r"the start must lie in bounds \(0.5, 1.0\); got values of 0.4"):
        simulated(FZooS(**SMALL, bounds=(0.5, 1.0)))
    with pytest.raises(ClientError, match="directions must be <= 6 in 6 dimensions; got 7"):
        simulated(FedZO(gradient=FiniteDifferences(7)))
    with pytest.raises(ClientError, match="directions must be <= 5 in 6 dimensions; got 6"):
        simulated(FedZO(gradient=FiniteDifferences(6, kind="prgf")))
    with pytest.raises(ValueError, match="description must be given for a global gradient; got None"):
        FedZO().global_gradient({}, torch.zeros(2))
    with pytest.raises(TypeError, match="gradient must be a TrajectoryGradient; got FiniteDifferences"):
        FZooS(gradient=FD).queries(1)


def test_the_repr_says_all():
    method = FZooS(**SMALL)
    assert "RandomFeatures(count=40" in repr(method)
    assert " at 0x" not in repr(method)
    assert repr(ZOScaffold(kind=1)) != repr(ZOScaffold(kind=2))
    assert isinstance(method, ZerothOrder)


# The synthetic tasks of the paper.


@pytest.mark.parametrize("difference", [0.0, 0.5, 5.0])
@pytest.mark.parametrize("clients", [1, 5])
def test_the_least_value_of_the_quadratic_is_known(difference, clients):
    task = quadratic(30, clients, difference, seed=1)
    best = torch.full((1, 30), 9.5 / 20).double()
    assert float(task.mean(best)) == pytest.approx(task.least, abs=1e-12)
    assert task.least == -0.025 + 0.1 / 30
    around = best + 0.05 * stream(23, "around").normal(20, 30).double()
    assert (task.mean(around) > task.least).all()
    together = stream(24, "other").uniform(3, 30)
    assert torch.allclose(task.mean(together), quadratic(30, 1, 0.0, 0).mean(together), atol=1e-12)


@pytest.mark.parametrize(("make", "best"), [(ackley, 0.5), (levy, None)])
def test_without_differences_the_other_tasks_are_the_textbooks(make, best):
    task = make(7, 3, 0.0, seed=1)
    at = torch.full((1, 7), 0.5) if best is not None else torch.full((1, 7), 1.0)
    # Ackley is 0 at z = 0; Levy is 0 where 0.1 z = 1
    assert float(task.mean(at)) == pytest.approx(0, abs=1e-9)
    assert (make(7, 3, 1.0, 1).mean(stream(25, "x").uniform(4, 7)) > 0).all()
