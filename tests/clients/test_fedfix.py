"""FedFix: one recursion, its special cases, where it converges, and bad input."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clients.quadratics import DIM, centres, clients_at, simulation, trajectory, until
from cograd import data
from cograd.clients import FedFix
from cograd.clients.baselines import FedAvg
from cograd.clients.fedfix import (
    Aggregation,
    Arrivals,
    Every,
    async_fed_avg,
    centralized_sgd,
    fed_avg,
    fed_buff,
    response_times,
    schedule,
)
from cograd.clients.fedfix.schedule import Scheme
from cograd.engines.federated import Clients, LocalSGD, NoReplies, Session, Simulation, State, Uniform

F80 = response_times("F-80", 10)
CENTRES = centres(10)
CLIENTS = clients_at(CENTRES)
SCHEMES: list[Scheme] = [Every(0.5), Every(0.2), Every(0.07), Arrivals(1), Arrivals(3), Arrivals()]
slow_weights = pytest.mark.filterwarnings("ignore:lr times the largest weight:RuntimeWarning")


@dataclass
class Logged(FedFix):
    """FedFix that notes what it aggregates."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.log: list[Aggregation] = []

    def _aggregate(self, server: State, session: Session) -> list[Any]:
        taken = self._take(server)
        origins = tuple(server["origin"][taken].tolist())
        self.log.append(Aggregation(session.now, tuple(taken), origins))
        return super()._aggregate(server, session)


@slow_weights
@pytest.mark.parametrize("scheme", SCHEMES, ids=repr)
@pytest.mark.parametrize("scenario", ["F-80", "F-0"])
def test_the_simulation_follows_the_schedule(scheme: Scheme, scenario: str) -> None:
    times = response_times(scenario, 5)
    method = Logged(LocalSGD(0.1, steps=1), scheme, times)
    _, rows, _ = until(method, clients_at(CENTRES[:5]), 6, response_time=times)
    expected = schedule(scheme, times, 6).aggregations
    assert tuple(method.log) == expected
    assert [row.participants for row in rows] == [a.clients for a in expected]
    assert [row.time for row in rows] == [a.time for a in expected]


# Special cases


def mnist(clients: int = 4) -> Clients:
    whole = data.load("mnist-5k", "train")
    return Clients(whole, data.dirichlet(whole.y[:600], clients, 0.3, seed=1, equal=False))


def weights_after(method: Any, rounds: int, times: list[float]) -> Tensor:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    sim = Simulation(method, model, nn.functional.cross_entropy, mnist(), seed=3, response_time=times)
    return torch.stack([method.model(sim.server).clone() for _ in sim.rounds(rounds)])


@pytest.mark.parametrize("importances", ["uniform", "sizes"])
def test_waiting_for_all_is_fedavg_bit_for_bit(importances: str) -> None:
    local, times = LocalSGD(0.1, steps=4, batch_size=20, momentum=0.9), response_times("F-80", 4)
    plain = weights_after(FedAvg(local, lr=0.7, weighted=importances == "sizes"), 3, times)
    for scheme in (Arrivals(), Arrivals(4), Every(1.0), Every(1.7)):
        for known in (times, None):
            fix = FedFix(local, scheme, known, importances=importances, lr=0.7)
            assert torch.equal(plain, weights_after(fix, 3, times))


@pytest.mark.parametrize("period", [0.5, 0.2])
def test_equal_times_make_fedfix_fedavg_with_a_larger_server_step(period: float) -> None:
    times, every = [1.0] * 10, math.ceil(1 / period)
    local = LocalSGD(0.01, steps=3)
    stepped = trajectory(FedFix(local, Every(period), times), CLIENTS, 4 * every, response_time=times)
    larger = trajectory(FedAvg(local, lr=float(every)), CLIENTS, 4)
    torch.testing.assert_close(stepped[every - 1 :: every], larger, rtol=1e-12, atol=1e-14)
    assert not stepped[: every - 1].any()


def test_centralized_sgd_is_gradient_descent_on_the_federated_loss() -> None:
    found = trajectory(centralized_sgd(0.1, 8, F80), CLIENTS, 20, response_time=F80)
    expected = torch.stack([(1 - 0.9**n) * CENTRES.mean(0) for n in range(1, 21)])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("scheme", [Every(0.5), Every(2.0), Arrivals(1), Arrivals()], ids=repr)
@pytest.mark.parametrize("times", [[0.5], None])
def test_one_client_is_plain_sgd_under_any_scheme(scheme: Scheme, times: list[float] | None) -> None:
    local, only = LocalSGD(0.1, steps=2), clients_at(CENTRES[:1])
    found = trajectory(FedFix(local, scheme, times, lr=0.5), only, 10, response_time=[0.5])
    shrink = 1 - 0.5 * (1 - 0.9**2)
    expected = torch.stack([(1 - shrink**n) * CENTRES[0] for n in range(1, 11)])
    torch.testing.assert_close(found, expected)


def test_the_change_is_relative_to_the_model_received() -> None:
    """Two clients, one slow: its change is that of the first model, not a pull back to it."""
    times, local = [1.0, 0.25], LocalSGD(0.5, steps=1)
    clients = clients_at(CENTRES[:2])
    x = torch.zeros(DIM, dtype=torch.float64)
    models = [x]
    for n in range(4):
        step = 0.5 * 0.5 * (CENTRES[1] - models[-1])  # p_1 = 1/2, at once
        if n == 3:
            step = step + 4 * 0.5 * 0.5 * (CENTRES[0] - models[0])  # p_0 = 1/2, four aggregations apart
        models.append(models[-1] + step)
    found = trajectory(FedFix(local, Every(0.25), times), clients, 4, response_time=times)
    torch.testing.assert_close(found, torch.stack(models[1:]))


# Where it converges


def late(models: Tensor) -> Tensor:
    return models[len(models) // 2 :]


def test_unbiased_weights_reach_the_optimum_and_identical_ones_their_surrogate() -> None:
    times, centre = response_times("F-80", 5), CENTRES[:5]
    clients, optimum, local = clients_at(centre), centre.mean(0), LocalSGD(0.05, steps=1)
    _, _, fixed = until(FedFix(local, Every(0.5), times), clients, 120, response_time=times)
    assert (late(fixed).mean(0) - optimum).norm() < 0.02
    for method in (
        async_fed_avg(local, times, weighting="identical"),
        fed_buff(local, 2, times, weighting="identical"),
    ):
        _, rows, models = until(method, clients, 60, response_time=times)
        surrogate = torch.tensor(method.surrogate([1] * 5), dtype=torch.float64) @ centre
        mean = late(models).mean(0)
        assert (mean - surrogate).norm() < 0.02
        assert (mean - optimum).norm() > 0.3
        assert rows[-1].reports["bias"] > 0.1


@slow_weights
def test_fedfix_is_steadier_than_single_arrivals() -> None:
    local = LocalSGD(1 - 0.995**10, steps=1)  # the very change that ten steps of 0.005 make on a quadratic
    spread = {}
    for name, method, time in (
        ("avg", fed_avg(local, F80), 60),
        ("fix", FedFix(local, Every(0.5), F80), 80),
        ("async", async_fed_avg(local, F80), 30),
    ):
        start = CENTRES.mean(0)  # where all of them end, so that only what stays is measured
        _, _, models = until(method, CLIENTS, time, response_time=F80, start=start)
        spread[name] = float(late(models).std(0).norm())
    assert spread["avg"] < 1e-6
    assert spread["fix"] <= spread["async"] / 5


@slow_weights
@pytest.mark.parametrize("scheme", [Every(0.5), Arrivals(1), Arrivals(4)], ids=repr)
def test_measured_weights_come_to_the_known_ones(scheme: Scheme) -> None:
    times, p = response_times("F-80", 5), [0.4, 0.1, 0.2, 0.1, 0.2]
    local, clients = LocalSGD(0.02, steps=1), clients_at(CENTRES[:5])
    known = FedFix(local, scheme, times, importances=p)
    measured = FedFix(local, scheme, importances=p)
    sim, rows, _ = until(measured, clients, 40, response_time=times)
    assert measured.applied(sim.server) == pytest.approx(p, abs=0.03)
    assert rows[-1].reports["bias"] < 0.04
    assert known.surrogate([1] * 5) == pytest.approx(p, abs=1e-3)
    identical = FedFix(local, scheme, weighting="identical")
    sim, _, _ = until(identical, clients, 40, response_time=times)
    expected = FedFix(local, scheme, times, weighting="identical").surrogate([1] * 5)
    assert identical.applied(sim.server) == pytest.approx(expected, abs=0.03)


def test_random_times_are_measured_too() -> None:
    clients, p = clients_at(CENTRES[:3]), [0.5, 0.25, 0.25]
    method = FedFix(LocalSGD(0.02, steps=1), Every(0.5), importances=p)

    def drawn(client: int, answers: int) -> float:
        return (0.3, 0.9, 1.4)[client] * (1 + (answers * 7 % 5) / 5)

    sim, _, _ = until(method, clients, 80, response_time=drawn)
    assert method.applied(sim.server) == pytest.approx(p, abs=0.02)


def test_weights_of_each_kind() -> None:
    local, sizes = LocalSGD(0.1), [1, 3]
    assert FedFix(local, Every(0.5), [1.0, 0.5]).weights(sizes) == [1.0, 0.5]
    assert FedFix(local, Every(0.5), [1.0, 0.5], importances="sizes").weights(sizes) == [0.5, 0.75]
    assert FedFix(local, Every(0.5), [1.0, 0.5], "identical").weights(sizes) == pytest.approx([1 / 1.5] * 2)
    assert async_fed_avg(local, [1.0, 0.5], weighting="identical").weights(sizes) == [1.0, 1.0]
    assert fed_buff(local, 2, [1.0, 0.5], weighting="identical").weights(sizes) == [0.5, 0.5]
    given = FedFix(local, Every(0.5), [1.0, 0.5], [0.2, 0.8])
    assert given.weights(sizes) == [0.2, 0.8]
    assert given.surrogate(sizes) == pytest.approx([0.1 / 0.9, 0.8 / 0.9])


def test_given_weights_are_applied_as_they_are() -> None:
    local = LocalSGD(0.1, steps=1)
    method = FedFix(local, Arrivals(), weighting=[0.0, 0.5, 1.0])
    found = trajectory(method, clients_at(CENTRES[:3]), 1)
    torch.testing.assert_close(found[0], 0.1 * (0.5 * CENTRES[1] + CENTRES[2]))


# Figures, bytes, resuming


@slow_weights
@pytest.mark.parametrize("scheme", [Every(0.5), Arrivals(1), Arrivals(3), Arrivals()], ids=repr)
def test_bytes_are_a_model_each_way_a_participation(scheme: Scheme) -> None:
    times = response_times("F-80", 5)
    sim, rows, _ = until(FedFix(LocalSGD(0.1), scheme, times), clients_at(CENTRES[:5]), 6, response_time=times)
    plan = schedule(scheme, times, 6)
    assert sim.server["taken"].tolist() == plan.participations
    done = 0
    for row, aggregation in zip(rows, plan.aggregations, strict=True):
        done += len(aggregation.clients)
        begun = done + 5 - len(aggregation.clients)  # and those that are still at work
        assert row.up == row.down == begun * DIM * 8
        assert row.work["grad"] == begun
        if aggregation.clients:
            stale = [row.round - 1 - origin for origin in aggregation.origins]
            assert row.reports["stalest"] == max(stale)
            assert row.reports["staleness"] == pytest.approx(sum(stale) / len(stale))


@slow_weights
@pytest.mark.parametrize("times", [F80, None], ids=["known", "measured"])
@pytest.mark.parametrize("scheme", [Every(0.2), Arrivals(1), Arrivals(3), Arrivals(5)], ids=repr)
def test_a_run_resumes_with_messages_on_their_way(
    scheme: Scheme, times: list[float] | None, tmp_path: Path
) -> None:
    def begun() -> Simulation:
        return simulation(FedFix(LocalSGD(0.1, steps=2), scheme, times), CLIENTS, response_time=F80)

    whole = begun()
    rows = whole.run(25)
    first = begun()
    first.run(9)
    assert len(first.queue) >= 4
    first.save(tmp_path / "saved")
    second = begun()
    second.load(tmp_path / "saved")
    again = second.run(25)
    assert torch.equal(second.server["x"], whole.server["x"])
    assert [_timeless(row) for row in again] == [_timeless(row) for row in rows]


def _timeless(row: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(row).items() if name != "seconds"}


def test_answers_that_wait_their_turn_survive_a_checkpoint(tmp_path: Path) -> None:
    """At equal times the first of ten single arrivals leaves nine waiting in the server's state."""

    def begun() -> Simulation:
        return simulation(async_fed_avg(LocalSGD(0.1), [1.0] * 10), CLIENTS, response_time=[1.0] * 10)

    first = begun()
    first.run(1)
    assert sum(name.startswith("delta.") for name in first.server) == 9
    first.save(tmp_path / "saved")
    second = begun()
    second.load(tmp_path / "saved")
    second.run(15)
    whole = begun()
    whole.run(15)
    assert torch.equal(second.server["x"], whole.server["x"])


def test_a_checkpoint_of_another_scheme_is_refused(tmp_path: Path) -> None:
    local = LocalSGD(0.1)
    first = simulation(FedFix(local, Every(0.5), F80), CLIENTS, response_time=F80)
    first.run(2)
    first.save(tmp_path / "saved")
    other = simulation(FedFix(local, Every(0.2), F80), CLIENTS, response_time=F80)
    with pytest.raises(ValueError, match="its method is"):
        other.load(tmp_path / "saved")


def test_workers_give_the_same_numbers() -> None:
    method = FedFix(LocalSGD(0.1, steps=2), Every(0.2), F80)
    alone = trajectory(method, CLIENTS, 12, response_time=F80)
    with simulation(method, CLIENTS, response_time=F80, workers=2) as sim:
        forked = torch.stack([method.model(sim.server).clone() for _ in sim.rounds(12)])
    assert torch.equal(alone, forked)


# Lost answers and bad input


def spoiled(count: int) -> list[Any]:
    bad = CENTRES[:4].clone()
    bad[:count] = math.nan
    return clients_at(bad)


@pytest.mark.parametrize("scheme", [Every(0.5), Arrivals(1), Arrivals(2), Arrivals()], ids=repr)
def test_a_client_whose_answers_are_lost_stops_nobody(scheme: Scheme) -> None:
    times = response_times("F-0", 4)
    method = FedFix(LocalSGD(0.1, steps=1), scheme, times)
    sim, rows, models = until(method, spoiled(1), 5, response_time=times, nonfinite="exclude")
    assert sim.server["taken"].tolist()[0] == 0
    assert min(sim.server["taken"].tolist()[1:]) >= 2
    assert torch.isfinite(models).all()
    assert any(0 in row.lost for row in rows)


def test_nobody_s_answers_are_waited_for_in_vain() -> None:
    method = FedFix(LocalSGD(0.1, steps=1), Arrivals(2), [1.0] * 4)
    with pytest.raises(NoReplies, match="round 0: the answers of all clients were lost"):
        until(method, spoiled(4), 5, response_time=[1.0] * 4, nonfinite="exclude")


def test_bad_arguments_are_named() -> None:
    local = LocalSGD(0.1)
    for lr in (0, -1, math.inf, math.nan):
        with pytest.raises(ValueError, match="lr must be > 0 and finite"):
            FedFix(local, lr=lr)
    with pytest.raises(ValueError, match="client 1 has -1"):
        FedFix(local, Every(1), [1, -1])
    with pytest.raises(ValueError, match="count must be at most the number of clients, 2; got 3"):
        fed_buff(local, 3, [1.0, 1.0])
    with pytest.raises(
        ValueError, match="weighting must be one of unbiased, identical, or numbers; got 'fair'"
    ):
        FedFix(local, weighting="fair")
    with pytest.raises(ValueError, match=r"importances must sum to 1; their sum is 1\.1"):
        FedFix(local, importances=[0.5, 0.6])
    with pytest.raises(ValueError, match="importances must be finite, >= 0 and not all 0"):
        FedFix(local, importances=[1.5, -0.5])
    with pytest.raises(ValueError, match="weighting must be finite, >= 0 and not all 0"):
        FedFix(local, weighting=[0.0, 0.0])
    with pytest.raises(ValueError, match="times must be given"):
        FedFix(local).weights([1, 1])


def test_what_does_not_fit_the_session_is_refused_when_it_starts() -> None:
    local = LocalSGD(0.1)
    with pytest.raises(ValueError, match="count must be at most the number of clients, 10; got 11"):
        simulation(fed_buff(local, 11), CLIENTS)
    for name in ("times", "weighting", "importances"):
        with pytest.raises(ValueError, match=f"{name} must hold one number a client, 10; got 2"):
            simulation(FedFix(local, **{name: [0.5, 0.5]}), CLIENTS)
    with pytest.raises(ValueError, match="timeout must be None"):
        simulation(FedFix(local), CLIENTS, timeout=1.0)
    with pytest.raises(ValueError, match="sampler must select all 10 clients"):
        simulation(FedFix(local), CLIENTS, sampler=Uniform(0.5))


def test_a_weight_that_overshoots_is_warned_of() -> None:
    with pytest.warns(RuntimeWarning, match=r"lr times the largest weight is 2\.13; above 2"):
        simulation(async_fed_avg(LocalSGD(0.1), F80), CLIENTS)
    with pytest.warns(RuntimeWarning, match="largest weight is 3"):
        simulation(FedFix(LocalSGD(0.1), weighting=[3.0] + [0.0] * 9), CLIENTS)
