"""FedSpeed: its special cases are the methods it is made of, its duals are gradients, and it does not drift."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from cograd.clients import FedSpeed, ProxCorrectedSAM
from cograd.clients.baselines import FedAvg, Scaffold
from cograd.clients.fedspeed import RULES, fed_dyn, fed_prox, fed_sam
from cograd.core.codecs import Float64
from cograd.core.streams import stream
from cograd.data.clients import ClientData
from cograd.engines.federated import Cyclic, Everyone, LocalModel, LocalSGD, Simulation, Uniform
from cograd.engines.federated.protocol import ClientContext
from cograd.models.mlp import MLP

LOCAL = LocalSGD(lr=0.1, epochs=2, batch_size=4)


def clients(n: int = 6, dtype: torch.dtype = torch.float32) -> list[ClientData]:
    draws = torch.Generator().manual_seed(0)
    found = []
    for client in range(n):
        x = (torch.randn(12, 5, generator=draws) + client / 3).to(dtype)
        found.append(ClientData(x, (x.sum(1) > client).long(), x[:0], torch.zeros(0, dtype=torch.long)))
    return found


def net(dtype: torch.dtype = torch.float32) -> MLP:
    torch.manual_seed(1)
    return MLP(5, 8, 2).to(dtype)


def run(method, rounds=3, sampler=Uniform(0.5), **options) -> Simulation:  # noqa: B008
    sim = Simulation(method, net(), nn.functional.cross_entropy, clients(), sampler=sampler, **options)
    sim.run(rounds)
    return sim


def run_exact(method, rounds=3, sampler=Uniform(0.5)) -> Simulation:  # noqa: B008
    """In double precision, on the wire as well: for equalities of what is computed in another order."""
    sim = Simulation(
        method, net(torch.float64), nn.functional.cross_entropy, clients(dtype=torch.float64),
        sampler=sampler, up=Float64(), down=Float64(),
    )  # fmt: skip
    sim.run(rounds)
    return sim


# Special cases.


def test_without_pull_and_ascent_it_is_fedavg_bit_for_bit():
    speed = run(FedSpeed(LOCAL, prox=0.0, alpha=0.0))
    average = run(FedAvg(LOCAL, weighted=False))
    assert torch.equal(speed.server["x"], average.server["x"])
    assert speed.tally.work == average.tally.work


def test_without_pull_nobody_keeps_a_dual():
    for method in (FedSpeed(LOCAL, prox=0.0), FedSpeed(LOCAL, dual=False)):
        sim = run(method)
        assert set(sim.server) == {"round", "x", "exchange"}
        assert all(sim.states[client] == {} for client in sim.states)


def test_without_pull_it_is_fedsam():
    """Against a loop that knows nothing of the library's training."""
    sim = run_exact(fed_sam(LOCAL, rho=0.1), 2, Everyone())
    model = net(torch.float64)
    x = flat(model)
    for t in range(2):
        ends = []
        for client, data in enumerate(clients(dtype=torch.float64)):
            v = x.clone()
            for rows in order(client, t):
                first = gradient(model, v, data, rows)
                norm = math.sqrt(sum(float(g) ** 2 for g in first))
                v = v - 0.1 * gradient(model, v + 0.1 / (norm + 1e-7) * first, data, rows)
            ends.append(v)
        x = torch.stack(ends).mean(0)
    assert torch.allclose(sim.server["x"], x, atol=1e-12)


def test_without_ascent_it_is_feddyn_under_partial_participation():
    """Against FedDyn as published: h <- h - mu/N sum (theta_i - theta), theta <- mean theta_i - h/mu."""
    mu, rounds, n = 0.2, 5, 6
    sim = run_exact(fed_dyn(LOCAL, prox=mu), rounds, Cyclic(count=2))
    model = net(torch.float64)
    theta = flat(model)
    h, dual = torch.zeros_like(theta), [torch.zeros_like(theta) for _ in range(n)]
    for t in range(rounds):
        ends = {}
        for client in Cyclic(count=2)(t, n, 0):
            data, v = clients(dtype=torch.float64)[client], theta.clone()
            for rows in order(client, t):
                v = v - 0.1 * (gradient(model, v, data, rows) - dual[client] + mu * (v - theta))
            dual[client] = dual[client] - mu * (v - theta)
            ends[client] = v
        h = h - mu / n * sum(v - theta for v in ends.values())
        theta = torch.stack(list(ends.values())).mean(0) - h / mu
    assert torch.allclose(sim.server["x"], theta, atol=1e-12)
    assert torch.allclose(sim.server["h"], -h / mu, atol=1e-12)
    assert torch.allclose(sim.server["h"], sum(sim.states[c]["h"] for c in sim.states) / n, atol=1e-12)


def test_without_dual_it_is_fedprox():
    sim = run_exact(fed_prox(LOCAL, prox=0.3), 1, Everyone())
    model = net(torch.float64)
    start, ends = flat(model), []
    for client, data in enumerate(clients(dtype=torch.float64)):
        v = start.clone()
        for rows in order(client):
            v = v - 0.1 * (gradient(model, v, data, rows) + 0.3 * (v - start))
        ends.append(v)
    assert torch.allclose(sim.server["x"], torch.stack(ends).mean(0), atol=1e-12)


def test_all_of_it_is_the_cards_loop():
    """Pull, dual, mixed gradient, clip, weight decay and decay of the rate, in one round after another."""
    local = LocalSGD(lr=0.1, epochs=2, batch_size=4, weight_decay=0.01, decay=0.9, max_norm=0.5)
    sim = run_exact(FedSpeed(local, prox=0.2, rho=0.3, alpha=0.7), 3, Cyclic(count=4))
    model, n = net(torch.float64), 6
    x = flat(model)
    h_bar, g_hat = torch.zeros_like(x), [torch.zeros_like(x) for _ in range(n)]
    for t in range(3):
        chosen, moves = Cyclic(count=4)(t, n, 0), []
        for client in chosen:
            data, v = clients(dtype=torch.float64)[client], x.clone()
            for rows in order(client, t):
                g1 = gradient(model, v, data, rows)
                g2 = gradient(model, v + 0.3 / (g1.norm() + 1e-7) * g1, data, rows)
                g = 0.3 * g1 + 0.7 * g2
                g = g * min(1.0, 0.5 / (float(g.norm()) + 1e-6))
                v = v - 0.1 * 0.9**t * (g - g_hat[client] + 0.2 * (v - x) + 0.01 * v)
            g_hat[client] = g_hat[client] - 0.2 * (v - x)
            moves.append(v - x)
        h_bar = h_bar + sum(moves) / n
        x = x + sum(moves) / len(moves) + h_bar
    assert torch.allclose(sim.server["x"], x, atol=1e-12)
    for client in range(n):
        assert torch.allclose(-0.2 * sim.states[client]["h"], g_hat[client], atol=1e-12)


def test_the_two_server_rules_are_one_if_everybody_takes_part_and_differ_otherwise():
    everyone = [run_exact(FedSpeed(LOCAL, rule=rule), 4, Everyone()).server["x"] for rule in RULES]
    assert torch.allclose(*everyone, atol=1e-12)
    some = [run(FedSpeed(LOCAL, rule=rule), 2, Cyclic(count=2)).server["x"] for rule in RULES]
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
    sim = Simulation(method, Point(), quadratic, data, up=Float64(), down=Float64())
    sim.run(rounds)
    return sim


@pytest.mark.parametrize(("mu", "rounds"), [(0.1, 400), (0.5, 100), (1.0, 100), (5.0, 100)])
def test_it_reaches_the_common_optimum(mu, rounds):
    """The card's instance; the duals there are the gradients, which cancel."""
    sim = on_quadratics(FedSpeed(LocalSGD(lr=0.05, steps=20), prox=mu, rho=0.0, alpha=0.0), rounds)
    optimum = torch.linalg.solve(A.sum(0), (A @ B[:, :, None]).sum(0)[:, 0])
    assert torch.allclose(optimum, torch.tensor([0.274736, 0.754395], dtype=torch.float64), atol=1e-6)
    assert float((sim.server["x"] - optimum).norm()) < 1e-8
    duals = [-mu * sim.states[client]["h"] for client in range(2)]
    assert float(sum(duals).norm()) < 1e-7
    for client, dual in enumerate(duals):
        assert torch.allclose(dual, A[client] @ (sim.server["x"] - B[client]), atol=1e-6)


def test_fedavg_drifts_to_where_its_local_steps_cancel():
    """In closed form: K steps of client i take x to b_i + (I - lr A_i)^K (x - b_i)."""
    sim = on_quadratics(FedAvg(LocalSGD(lr=0.05, steps=20)), 60)
    eye = torch.eye(2, dtype=torch.float64)
    left = eye - torch.linalg.matrix_power(eye - 0.05 * A, 20)
    fixed = torch.linalg.solve(left.sum(0), (left @ B[:, :, None]).sum(0)[:, 0])
    assert torch.allclose(sim.server["x"], fixed, atol=1e-10)
    assert float((fixed - OPTIMUM).abs().max()) == pytest.approx(0.784, abs=1e-3)


@pytest.mark.parametrize("mu", [0.5, 2.0])
def test_a_dual_is_the_gradient_where_local_training_comes_to_rest(mu):
    sim = on_quadratics(FedSpeed(LocalSGD(lr=0.05, steps=600), prox=mu, rho=0.0, alpha=0.0), 1)
    for client in range(2):
        moved = sim.states[client]["h"]  # from zero
        assert float(moved.norm()) > 0.1
        assert torch.allclose(-mu * moved, A[client] @ (moved - B[client]), atol=1e-8)


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


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("alpha", "rho", "passes"), [(1.0, 0.1, 2), (0.5, 0.1, 2), (0.0, 0.1, 1), (1.0, 0.0, 1)]
)
def test_bytes_and_gradients_are_as_published(rule, alpha, rho, passes):
    sim = run(FedSpeed(LOCAL, rule=rule, alpha=alpha, rho=rho))
    size = 4 * sim.session.space.numel
    assert sim.tally.up == sim.tally.down == 3 * 3 * size
    assert sim.tally.work["grad"] == passes * 3 * 3 * 2 * 3
    assert [sim.states[c]["h"].nbytes for c in sim.states] == [size] * len(sim.states)
    kept = sum(value.nbytes for value in sim.server.values() if isinstance(value, Tensor))
    assert kept == (2 if rule == "all" else 1) * size


def test_the_module_is_called_once_more_only_for_an_ascent():
    for alpha, passes in ((0.0, 1), (0.5, 2)):
        model, calls = net(), []
        model.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        Simulation(FedSpeed(LOCAL, alpha=alpha), model, nn.functional.cross_entropy, clients(1)).run(1)
        assert len(calls) == passes * 2 * 3


def test_who_sleeps_keeps_its_dual():
    sim = run(FedSpeed(LOCAL), 1, Cyclic(count=3))
    kept, before = sim.states[0]["h"], sim.states[0]["h"].clone()
    sim.run(2)
    assert sim.states[0]["h"] is kept
    assert torch.equal(kept, before)
    sim.run(3)
    assert not torch.equal(sim.states[0]["h"], before)


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
        ({"prox": math.inf}, "prox must be >= 0 and finite; got inf"),
        ({"prox": math.nan}, "prox must be >= 0 and finite; got nan"),
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


def test_batchnorm_is_refused_unless_its_statistics_have_a_rule():
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4))
    with pytest.raises(ValueError, match="the model has 8 floating buffers"):
        Simulation(FedSpeed(LOCAL), model, nn.functional.cross_entropy, clients())


# The client without the simulator.


def optimizer(model: nn.Module, **change) -> ProxCorrectedSAM:
    given = {"lr": 0.1, "prox": 0.2, "rho": 0.3, "alpha": 0.7, "weight_decay": 0.01, "max_norm": 0.5, **change}
    return ProxCorrectedSAM(model.parameters(), **given)


def closure(model: nn.Module, data: ClientData, rows: Tensor):
    def compute() -> Tensor:
        loss = nn.functional.cross_entropy(model(data.x[rows]), data.y[rows])
        loss.backward()
        return loss

    return compute


@pytest.mark.parametrize("alpha", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("normalize", [True, False])
def test_the_optimizer_is_the_simulated_client(alpha, normalize):
    """Three rounds of one client; the server's rule is written out."""
    local = LocalSGD(0.1, epochs=2, batch_size=4, weight_decay=0.01, max_norm=0.5)
    method = FedSpeed(local, prox=0.2, rho=0.3, alpha=alpha, normalize=normalize)
    data = clients(1, torch.float64)
    sim = Simulation(
        method, net(torch.float64), nn.functional.cross_entropy, data, up=Float64(), down=Float64()
    )
    sim.run(3)
    model = net(torch.float64)
    opt = optimizer(model, alpha=alpha, normalize=normalize)
    x, h_bar = [p.detach().clone() for p in model.parameters()], None
    for t in range(3):
        opt.begin_round(x)
        for rows in order(0, t):
            opt.step(closure(model, data[0], rows))
        delta = opt.end_round()
        h_bar = delta if h_bar is None else [a + b for a, b in zip(h_bar, delta, strict=True)]
        x = [a + b + c for a, b, c in zip(x, delta, h_bar, strict=True)]
    assert torch.allclose(torch.cat([t.reshape(-1) for t in x]), sim.server["x"], atol=1e-12)
    h = torch.cat([opt.state[p]["h"].reshape(-1) for p in model.parameters()])
    assert torch.allclose(h, sim.states[0]["h"], atol=1e-12)


def test_it_returns_the_loss_before_the_step_and_leaves_no_trace_of_the_ascent():
    model, data = net(), clients(1)[0]
    rows = torch.arange(12)
    opt = ProxCorrectedSAM(model.parameters(), lr=1e-12, rho=5.0)
    opt.begin_round()
    before, start = closure(model, data, rows)(), flat(model)
    assert torch.equal(opt.step(closure(model, data, rows)), before)
    assert torch.allclose(flat(model), start)


def test_its_state_goes_on_in_the_middle_of_a_round():
    data, ends = clients(1)[0], []
    for interrupted in (False, True):
        model = net()
        opt = optimizer(model)
        for t in range(2):
            opt.begin_round(net().parameters())
            for step, rows in enumerate(order(0, t)):
                if interrupted and (t, step) == (1, 2):
                    weights, state = model.state_dict(), opt.state_dict()
                    model = MLP(5, 8, 2)
                    model.load_state_dict(weights)
                    opt = optimizer(model)
                    opt.load_state_dict(state)
                opt.step(closure(model, data, rows))
            delta = opt.end_round()
        ends.append(torch.cat([t.reshape(-1) for t in delta]))
    assert torch.equal(*ends)


def test_schedulers_and_groups_set_its_rates():
    model, data = net(), clients(1)[0]
    groups = [{"params": model[1].parameters(), "lr": 0.0}, {"params": model[3].parameters()}]
    opt = ProxCorrectedSAM(groups, lr=0.1)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(opt, 0.5)
    start = [p.detach().clone() for p in model.parameters()]
    opt.begin_round()
    opt.step(closure(model, data, torch.arange(12)))
    scheduler.step()
    assert [group["lr"] for group in opt.param_groups] == [0.0, 0.05]
    moved = [not torch.equal(p, s) for p, s in zip(model.parameters(), start, strict=True)]
    assert moved == [False, False, True, True]


def test_what_is_not_used_is_pulled_all_the_same():
    model, data = net(), clients(1)[0]
    other = nn.Parameter(torch.ones(3))
    opt = ProxCorrectedSAM([*model.parameters(), other], lr=0.1, prox=0.5)
    opt.begin_round()
    opt.step(closure(model, data, torch.arange(12)))
    opt.end_round()
    assert other.tolist() == [1, 1, 1]
    opt.state[other]["h"] = torch.ones(3)
    opt.begin_round()
    opt.step(closure(model, data, torch.arange(12)))
    assert torch.allclose(other, torch.full((3,), 0.95))


def test_its_misuse_is_named():
    model, data = net(), clients(1)[0]
    opt = optimizer(model)
    with pytest.raises(RuntimeError, match="begin_round must come before step and end_round"):
        opt.step(closure(model, data, torch.arange(4)))
    with pytest.raises(RuntimeError, match="begin_round must come before step and end_round"):
        opt.end_round()
    with pytest.raises(
        ValueError, match=r"anchor must have the parameters' shapes \[\(8, 5\), .*; got \[\(3,\)\]"
    ):
        opt.begin_round([torch.zeros(3)])
    opt.begin_round()
    with pytest.raises(RuntimeError, match="closure must call backward on the loss"):
        opt.step(lambda: torch.zeros(()))
    for change, message in (
        ({"prox": -1.0}, "prox must be >= 0 and finite; got -1.0"),
        ({"alpha": 2}, r"alpha must be in \[0, 1\]; got 2"),
        ({"lr": 0.0}, "lr must be > 0 and finite; got 0.0"),
        ({"max_norm": 0.0}, "max_norm must be > 0 or None; got 0.0"),
    ):
        with pytest.raises(ValueError, match=message):
            optimizer(model, **change)


# The baselines that come with it.


def test_scaffold_with_one_client_is_sgd_and_its_variates_sum_up():
    local = LocalSGD(lr=0.05, steps=20)
    sim = on_quadratics(Scaffold(local), 60)
    assert float((sim.server["x"] - OPTIMUM).abs().max()) < 1e-5
    some = run(Scaffold(LOCAL), 4, Cyclic(count=2))
    mean = sum(some.states[c]["c"] for c in some.states) / 6
    assert torch.allclose(some.server["c"], mean, atol=1e-6)
    size = 4 * some.session.space.numel
    assert some.tally.up == some.tally.down == 4 * 2 * 2 * size
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


def gradient(model: nn.Module, vector: Tensor, data: ClientData, rows: Tensor) -> Tensor:
    at = 0
    for p in model.parameters():
        p.data = vector[at : at + p.numel()].view(p.shape).clone()
        at += p.numel()
    loss = nn.functional.cross_entropy(model(data.x[rows]), data.y[rows])
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(model.parameters()))])


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])
