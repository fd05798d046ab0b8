"""FedSpeed: its special cases are the methods it is made of, its duals are gradients, and it does not drift."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from cograd.clients import FedSpeed
from cograd.clients.baselines import FedAvg, Scaffold
from cograd.clients.fedspeed import fed_dyn, fed_prox, fed_sam
from cograd.core.streams import stream
from cograd.data.clients import ClientData
from cograd.engines.federated import Cyclic, Everyone, LocalModel, LocalSGD, Simulation, Uniform
from cograd.engines.federated.protocol import ClientContext
from cograd.models.mlp import MLP

LOCAL = LocalSGD(lr=0.1, epochs=2, batch_size=4)


def clients(n: int = 6) -> list[ClientData]:
    draws = torch.Generator().manual_seed(0)
    found = []
    for client in range(n):
        x = torch.randn(12, 5, generator=draws) + client / 3
        found.append(ClientData(x, (x.sum(1) > client).long(), x[:0], torch.zeros(0, dtype=torch.long)))
    return found


def run(method, rounds=3, sampler=Uniform(0.5), **options) -> Simulation:  # noqa: B008
    torch.manual_seed(1)
    sim = Simulation(method, MLP(5, 8, 2), nn.functional.cross_entropy, clients(), sampler=sampler, **options)
    sim.run(rounds)
    return sim


# Special cases.


def test_without_pull_and_ascent_it_is_fedavg_bit_for_bit():
    speed = run(FedSpeed(LOCAL, prox=0.0, alpha=0.0))
    average = run(FedAvg(LOCAL, weighted=False))
    assert torch.equal(speed.server["x"], average.server["x"])
    assert speed.tally.work == average.tally.work


def test_without_pull_it_is_fedsam():
    """Against a loop that knows nothing of the library's training."""
    sim = run(fed_sam(LOCAL, rho=0.1), rounds=1, sampler=Everyone())
    torch.manual_seed(1)
    model = MLP(5, 8, 2)
    start = [p.detach().clone() for p in model.parameters()]
    ends = []
    for client, data in enumerate(clients()):
        for p, s in zip(model.parameters(), start, strict=True):
            p.data = s.clone()
        for rows in order(client):
            first = grads(model, data, rows)
            norm = math.sqrt(sum(float(g.square().sum()) for g in first))
            here = [p.detach().clone() for p in model.parameters()]
            for p, g in zip(model.parameters(), first, strict=True):
                p.data = p.data + 0.1 / norm * g
            second = grads(model, data, rows)
            for p, h, g in zip(model.parameters(), here, second, strict=True):
                p.data = h - 0.1 * g
        ends.append(flat(model))
    assert torch.allclose(sim.server["x"], torch.stack(ends).mean(0), atol=1e-6)


def test_without_ascent_it_is_feddyn_under_partial_participation():
    """Against FedDyn as its paper has it: h <- h - mu/N sum (theta_i - theta), theta <- mean theta_i - h/mu."""
    mu, rounds, n = 0.2, 5, 6
    sim = run(fed_dyn(LOCAL, prox=mu), rounds, Cyclic(count=2))
    torch.manual_seed(1)
    model = MLP(5, 8, 2)
    theta = flat(model)
    h, dual = torch.zeros_like(theta), [torch.zeros_like(theta) for _ in range(n)]
    for t in range(rounds):
        ends = {}
        for client in Cyclic(count=2)(t, n, 0):
            data, v = clients()[client], theta.clone()
            for rows in order(client, t):
                unflatten(model, v)
                g = torch.cat([x.reshape(-1) for x in grads(model, data, rows)])
                v = v - 0.1 * (g - dual[client] + mu * (v - theta))
            dual[client] = dual[client] - mu * (v - theta)
            ends[client] = v
        h = h - mu / n * sum(v - theta for v in ends.values())
        theta = torch.stack(list(ends.values())).mean(0) - h / mu
    assert torch.allclose(sim.server["x"], theta, atol=1e-5)


def test_without_dual_it_is_fedprox():
    sim = run(fed_prox(LOCAL, prox=0.3), rounds=1, sampler=Everyone())
    torch.manual_seed(1)
    model = MLP(5, 8, 2)
    start, ends = flat(model), []
    for client, data in enumerate(clients()):
        v = start.clone()
        for rows in order(client):
            unflatten(model, v)
            v = v - 0.1 * (torch.cat([x.reshape(-1) for x in grads(model, data, rows)]) + 0.3 * (v - start))
        ends.append(v)
    assert torch.allclose(sim.server["x"], torch.stack(ends).mean(0), atol=1e-6)
    assert all("h" not in sim.states[c] for c in sim.states)


def test_the_two_server_rules_are_one_if_everybody_takes_part_and_differ_otherwise():
    everyone = [run(FedSpeed(LOCAL, rule=rule), sampler=Everyone()).server["x"] for rule in ("all", "active")]
    assert torch.allclose(*everyone, atol=1e-6)
    some = [run(FedSpeed(LOCAL, rule=rule), 2, Cyclic(count=2)).server["x"] for rule in ("all", "active")]
    assert float((some[0] - some[1]).norm()) > 1e-3


# Quadratics, where everything is known.

A = torch.tensor([[[4.0, 0.0], [0.0, 1.0]], [[1.0, 0.3], [0.3, 3.0]]], dtype=torch.float64)
B = torch.tensor([[1.0, -2.0], [-3.0, 2.0]], dtype=torch.float64)
OPTIMUM = torch.tensor([0.274736, 0.754395], dtype=torch.float64)


class Point(nn.Module):
    """A point whose loss on client i is (x - b_i)' A_i (x - b_i) / 2; the target is the client's number."""

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.zeros(2, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.x.expand(len(x), 2)


def quadratic(outputs: Tensor, targets: Tensor) -> Tensor:
    away = outputs[0] - B[targets[0]]
    return away @ A[targets[0]] @ away / 2


def on_quadratics(method, rounds: int) -> Simulation:
    none = torch.zeros(0)
    data = [ClientData(torch.zeros(1, 1), torch.tensor([client]), none, none) for client in range(2)]
    sim = Simulation(method, Point(), quadratic, data)
    sim.run(rounds)
    return sim


@pytest.mark.parametrize("mu", [0.5, 1.0, 5.0])
def test_it_reaches_the_common_optimum(mu):
    """And its duals the gradients there, which cancel."""
    sim = on_quadratics(FedSpeed(LocalSGD(lr=0.05, steps=20), prox=mu, rho=0.0, alpha=0.0), 90)
    assert float((sim.server["x"] - OPTIMUM).abs().max()) < 1e-5
    duals = [-mu * sim.states[client]["h"] for client in range(2)]
    assert float(sum(duals).norm()) < 1e-5
    for client, dual in enumerate(duals):
        assert torch.allclose(dual, A[client] @ (sim.server["x"] - B[client]), atol=1e-4)


def test_fedavg_drifts_to_where_its_local_steps_cancel():
    """In closed form: K steps of client i take x to b_i + (I - lr A_i)^K (x - b_i)."""
    sim = on_quadratics(FedAvg(LocalSGD(lr=0.05, steps=20)), 40)
    left = torch.eye(2, dtype=torch.float64) - torch.linalg.matrix_power(torch.eye(2) - 0.05 * A, 20)
    fixed = torch.linalg.solve(left.sum(0), (left @ B[:, :, None]).sum(0)[:, 0])
    assert torch.allclose(sim.server["x"], fixed, atol=1e-6)
    assert float((fixed - OPTIMUM).abs().max()) == pytest.approx(0.784, abs=1e-3)


def test_a_dual_is_the_gradient_where_local_training_comes_to_rest():
    sim = on_quadratics(FedSpeed(LocalSGD(lr=0.05, steps=500), prox=0.5, rho=0.0, alpha=0.0), 1)
    for client in range(2):
        moved = sim.states[client]["h"]  # from zero
        assert torch.allclose(-0.5 * moved, A[client] @ (moved - B[client]), atol=1e-5)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_the_quasi_gradient_of_a_quadratic_is_known(normalize, alpha):
    method = FedSpeed(LocalSGD(lr=0.1), rho=0.2, alpha=alpha, normalize=normalize)
    model = LocalModel(Point(), quadratic)
    ctx = ClientContext(0, 0, 0, [1, 1], model, model.theta.clone())
    v = torch.tensor([0.7, -0.4], dtype=torch.float64)
    g1 = A[0] @ (v - B[0])
    rho = 0.2 / (float(g1.norm()) + 1e-7) if normalize else 0.2
    found = method.quasi_gradient(v, torch.zeros(1, 1), torch.tensor([0]), ctx)
    assert torch.allclose(found, (torch.eye(2, dtype=torch.float64) + alpha * rho * A[0]) @ g1)
    assert torch.equal(model.theta, v)
    assert ctx.work == {"grad": 2}


def test_a_gradient_of_zero_gives_no_ascent_and_no_nan():
    method = FedSpeed(LocalSGD(lr=0.1))
    model = LocalModel(Point(), quadratic)
    ctx = ClientContext(0, 0, 0, [1, 1], model, model.theta.clone())
    assert method.quasi_gradient(B[0].clone(), torch.zeros(1, 1), torch.tensor([0]), ctx).tolist() == [0, 0]


# Costs and state.


@pytest.mark.parametrize("rule", ["all", "active"])
@pytest.mark.parametrize(
    ("alpha", "rho", "passes"), [(1.0, 0.1, 2), (0.5, 0.1, 2), (0.0, 0.1, 1), (1.0, 0.0, 1)]
)
def test_bytes_and_gradients_are_as_published(rule, alpha, rho, passes):
    sim = run(FedSpeed(LOCAL, rule=rule, alpha=alpha, rho=rho))
    size = 4 * sim.session.space.numel
    assert sim.tally.up == sim.tally.down == 3 * 3 * size
    assert sim.tally.work["grad"] == passes * 3 * 3 * 2 * 3
    assert [sim.states[c]["h"].nbytes for c in sim.states] == [size] * len(sim.states)


def test_who_sleeps_keeps_its_dual():
    torch.manual_seed(1)
    sim = Simulation(
        FedSpeed(LOCAL), MLP(5, 8, 2), nn.functional.cross_entropy, clients(), sampler=Cyclic(count=3)
    )
    sim.run(1)
    before = sim.states[0]["h"].clone()
    sim.run(2)
    assert torch.equal(sim.states[0]["h"], before)


def test_the_clip_spares_pull_and_dual():
    """Far from its anchor a client's pull is not clipped with the gradient."""
    local = LocalSGD(lr=0.1, steps=1, max_norm=1e-9)
    method = FedSpeed(local, prox=0.5, alpha=0.0)
    model = LocalModel(Point(), quadratic)
    ctx = ClientContext(0, 0, 0, [1, 1], model, model.theta.clone())
    data = ClientData(torch.zeros(1, 1), torch.tensor([0]), torch.zeros(0), torch.zeros(0))
    h = torch.tensor([2.0, -1.0], dtype=torch.float64)
    _, reply = method.train({"h": h}, {"x": torch.zeros(2, dtype=torch.float64)}, data, ctx)
    assert torch.allclose(reply["delta"], -0.1 * 0.5 * h, atol=1e-8)


def test_batchnorm_sees_each_minibatch_once():
    """The pass at the ascended point leaves the running statistics alone."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    data, options, one = clients(1), {"buffers": "local"}, LocalSGD(0.1, steps=1)
    ascending = Simulation(FedSpeed(one), model, nn.functional.cross_entropy, data, **options)
    ascending.run(1)
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    plain = Simulation(FedAvg(one), model, nn.functional.cross_entropy, data, **options)
    plain.run(1)
    assert torch.equal(ascending.states[0]["engine.buffers"], plain.states[0]["engine.buffers"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prox": -0.1}, "prox must be >= 0 and finite; got -0.1"),
        ({"rho": -1}, "rho must be >= 0 and finite; got -1"),
        ({"alpha": 1.5}, r"alpha must be in \[0, 1\]; got 1.5"),
        ({"alpha": -0.5}, r"alpha must be in \[0, 1\]; got -0.5"),
        ({"rule": "some"}, "rule must be one of all, active; got 'some'"),
        ({"local": LocalSGD(0.1, momentum=0.9)}, "local must have no momentum with FedSpeed; got 0.9"),
    ],
)
def test_bad_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        FedSpeed(**{"local": LOCAL, **change})


# The baselines that come with it.


def test_scaffold_with_one_client_is_sgd_and_its_variates_sum_up():
    local = LocalSGD(lr=0.05, steps=20)
    sim = on_quadratics(Scaffold(local), 60)
    assert float((sim.server["x"] - OPTIMUM).abs().max()) < 1e-5
    some = run(Scaffold(LOCAL), 4, Cyclic(count=2))
    mean = sum(some.states[c]["c"] for c in some.states) / 6
    assert torch.allclose(some.server["c"], mean, atol=1e-6)
    with pytest.raises(ValueError, match="no momentum with SCAFFOLD"):
        Scaffold(LocalSGD(0.1, momentum=0.5))


def test_fedavg_weighs_by_examples_and_its_momentum_is_a_mean():
    plain, heavy = run(FedAvg(LOCAL), 1, Everyone()), run(FedAvg(LOCAL, momentum=0.9), 1, Everyone())
    first = plain.server["x"] - plain.session.initial
    assert torch.allclose(heavy.server["x"] - heavy.session.initial, 0.1 * first, atol=1e-6)
    for change, message in (({"lr": 0}, "lr must be > 0"), ({"momentum": 1}, r"momentum must be in \[0, 1\)")):
        with pytest.raises(ValueError, match=message):
            FedAvg(LOCAL, **change)


# For tests that write the training out.


def order(client: int, round: int = 0) -> list[Tensor]:
    passes = [stream(0, "client", client, round, "batches", epoch).permutation(12) for epoch in range(2)]
    return [rows for permuted in passes for rows in permuted.split(4)]


def grads(model: nn.Module, data: ClientData, rows: Tensor) -> list[Tensor]:
    loss = nn.functional.cross_entropy(model(data.x[rows]), data.y[rows])
    return list(torch.autograd.grad(loss, list(model.parameters())))


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def unflatten(model: nn.Module, vector: Tensor) -> None:
    at = 0
    for p in model.parameters():
        p.data = vector[at : at + p.numel()].view(p.shape).clone()
        at += p.numel()
