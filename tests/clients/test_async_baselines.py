"""FedAsync, FedBuff with its discount, FedAdam: their special cases are equalities."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from clients.quadratics import DIM, centres, clients_at, simulation, trajectory, until
from cograd.clients.baselines import FedAdam, FedAsync, FedAvg, FedBuff
from cograd.clients.fedfix import Arrivals, async_fed_avg, response_times, schedule
from cograd.engines.federated import LocalSGD, Method, NoReplies, Simulation, Uniform

F80 = response_times("F-80", 10)
CENTRES = centres(10)
CLIENTS = clients_at(CENTRES)
LOCAL = LocalSGD(0.1, steps=2, momentum=0.5)


def equal(one: Method, other: Method, rounds: int = 30, **options: Any) -> bool:
    return torch.equal(
        trajectory(one, CLIENTS, rounds, **options), trajectory(other, CLIENTS, rounds, **options)
    )


# FedBuff


@pytest.mark.parametrize("scenario", ["F-80", "F-0"])
def test_fedbuff_of_one_without_discount_is_asynchronous_fedavg(scenario: str) -> None:
    times = response_times(scenario, 10)
    plain = async_fed_avg(LOCAL, times, weighting="identical", lr=0.5)
    assert equal(FedBuff(LOCAL, size=1, exponent=0.0, lr=0.5), plain, response_time=times)
    assert not equal(FedBuff(LOCAL, size=1, exponent=0.5, lr=0.5), plain, response_time=times)


@pytest.mark.parametrize("exponent", [0.0, 0.5])
@pytest.mark.parametrize("times", [[1.0] * 10, None])
def test_fedbuff_of_all_is_fedavg_where_nobody_is_late(exponent: float, times: list[float] | None) -> None:
    plain = FedAvg(LOCAL, lr=0.7, weighted=False)
    assert equal(FedBuff(LOCAL, 10, exponent, lr=0.7), plain, 5, response_time=times)


def test_a_late_change_is_discounted_and_divided_by_the_size() -> None:
    """Client 1 is four times as fast: it fills two buffers before the other's first change comes."""
    times, clients = [1.0, 0.24], clients_at(CENTRES[:2])
    method = FedBuff(LocalSGD(0.5, steps=1), size=1, exponent=1.0)
    found = trajectory(method, clients, 5, response_time=times)
    x = [torch.zeros(DIM, dtype=torch.float64)]
    for _ in range(4):
        x.append(x[-1] + 0.5 * (CENTRES[1] - x[-1]))
    x.append(x[-1] + 0.5 * (CENTRES[0] - x[0]) / 5)  # it missed 4
    torch.testing.assert_close(found, torch.stack(x[1:]))


def test_a_client_starts_again_before_the_buffer_is_full_if_there_is_a_newer_model() -> None:
    """From a model that it has had already, it would compute the same again."""
    times, clients = [1.0, 0.45, 0.45], clients_at(CENTRES[:3])
    sim, rows, _ = until(FedBuff(LocalSGD(0.5, steps=1), 2, 0.0), clients, 1.0, response_time=times)
    assert [(row.time, row.participants) for row in rows] == [(0.45, (1, 2)), (0.9, (1, 2))]
    assert sim.server["filled"] == 1
    assert sim.server["origin"].tolist() == [2, 2, 2]
    assert sim.server["busy"].all()
    sim = simulation(FedBuff(LocalSGD(0.5, steps=1), 3, 0.0), clients, response_time=times)
    assert not list(sim.until(0.9))
    assert sim.server["busy"].tolist() == [True, False, False]


# FedAsync


@pytest.mark.parametrize("exponent", [0.0, 0.5])
def test_fedasync_with_one_client_is_fedavg(exponent: float) -> None:
    only = clients_at(CENTRES[:1])
    mixed = trajectory(FedAsync(LOCAL, 0.6, exponent, prox=0.0), only, 10, response_time=[0.3])
    torch.testing.assert_close(mixed, trajectory(FedAvg(LOCAL, lr=0.6), only, 10), rtol=1e-14, atol=0)


def test_fedasync_with_all_of_a_fresh_model_takes_it() -> None:
    method = FedAsync(LocalSGD(1.0, steps=1), mix=1.0, exponent=0.0, prox=0.0)
    found = trajectory(method, CLIENTS, 20, response_time=F80)
    plan = schedule(Arrivals(1), F80, 3).aggregations[:20]
    torch.testing.assert_close(found, torch.stack([CENTRES[a.clients[0]] for a in plan]))


def test_fedasync_discounts_by_staleness_and_pulls_toward_what_was_received() -> None:
    times, clients = [1.0, 0.24], clients_at(CENTRES[:2])
    method = FedAsync(LocalSGD(0.5, steps=2), mix=0.8, exponent=0.5, prox=0.2)
    found = trajectory(method, clients, 5, response_time=times)

    def trained(x: torch.Tensor, centre: torch.Tensor) -> torch.Tensor:
        v = x
        for _ in range(2):
            v = v - 0.5 * (v - centre + 0.2 * (v - x))
        return v

    x = [torch.zeros(DIM, dtype=torch.float64)]
    for _ in range(4):
        x.append(0.2 * x[-1] + 0.8 * trained(x[-1], CENTRES[1]))
    share = 0.8 * 5**-0.5
    x.append((1 - share) * x[-1] + share * trained(x[0], CENTRES[0]))
    torch.testing.assert_close(found, torch.stack(x[1:]))


# Both


@pytest.mark.parametrize("method", [FedAsync(LOCAL), FedBuff(LOCAL, 3)], ids=repr)
def test_so_many_work_at_once_as_the_sampler_selects(method: Method) -> None:
    sim, rows, _ = until(method, CLIENTS, 8, response_time=F80, sampler=Uniform(count=4))
    assert int(sim.server["busy"].sum()) == 4
    assert len({client for row in rows for client in row.participants}) == 10
    assert sim.tally.down == sim.tally.up == DIM * 8 * sum(sim.tally.answers)


@pytest.mark.parametrize("method", [FedAsync(LOCAL), FedBuff(LOCAL, 3)], ids=repr)
@pytest.mark.parametrize("times", [F80, [1.0] * 10], ids=["F-80", "F-0"])
def test_a_run_resumes_with_messages_on_their_way(method: Method, times: list[float], tmp_path: Path) -> None:
    def begun() -> Simulation:
        return simulation(method, CLIENTS, response_time=times, sampler=Uniform(count=6))

    whole, first, second = begun(), begun(), begun()
    whole.run(25)
    first.run(8)
    first.save(tmp_path / "saved")
    second.load(tmp_path / "saved")
    second.run(25)
    assert torch.equal(second.server["x"], whole.server["x"])
    assert [row.participants for row in second.history] == [row.participants for row in whole.history]


@pytest.mark.parametrize("method", [FedAsync(LOCAL), FedBuff(LOCAL, 2)], ids=repr)
def test_lost_answers_stop_nobody_else(method: Method) -> None:
    bad = CENTRES[:4].clone()
    bad[0] = math.nan
    _, rows, models = until(method, clients_at(bad), 6, response_time=[1.0, 0.9, 0.8, 0.7], nonfinite="exclude")
    assert len(rows) > 8
    assert torch.isfinite(models).all()
    with pytest.raises(NoReplies, match="none of the clients asked has answered"):
        until(method, clients_at(bad * math.nan), 6, response_time=[1.0] * 4, nonfinite="exclude")


# FedAdam


def test_fedadam_whose_second_moment_never_moves_is_fedavg_with_momentum() -> None:
    for momentum in (0.0, 0.9):
        still = FedAdam(LOCAL, lr=0.3, momentum=momentum, beta2=1.0, tau=0.5)
        assert equal(still, FedAvg(LOCAL, lr=0.3, momentum=momentum), 10)


@pytest.mark.parametrize("rule", ["adam", "yogi", "adagrad"])
def test_fedadam_is_its_algorithm(rule: str) -> None:
    method = FedAdam(LocalSGD(0.1, steps=1), lr=0.2, momentum=0.8, beta2=0.95, tau=0.01, rule=rule)
    x, m, v = np.zeros(DIM), np.zeros(DIM), np.full(DIM, 1e-4)
    expected = []
    for _ in range(20):
        change = 0.1 * (CENTRES.mean(0).numpy() - x)
        c = change**2
        m = 0.8 * m + 0.2 * change
        v = {"adam": 0.95 * v + 0.05 * c, "yogi": v - 0.05 * c * np.sign(v - c), "adagrad": v + c}[rule]
        x = x + 0.2 * m / (np.sqrt(v) + 0.01)
        expected.append(x)
    np.testing.assert_allclose(trajectory(method, CLIENTS, 20).numpy(), expected, rtol=1e-10)


def test_bad_arguments_are_named() -> None:
    for make, match in (
        (lambda: FedAsync(LOCAL, mix=0.0), r"mix must be in \(0, 1\]; got 0.0"),
        (lambda: FedAsync(LOCAL, mix=1.1), r"mix must be in \(0, 1\]; got 1.1"),
        (lambda: FedAsync(LOCAL, exponent=-1), "exponent must be >= 0; got -1"),
        (lambda: FedAsync(LOCAL, prox=-1), "prox must be >= 0; got -1"),
        (lambda: FedBuff(LOCAL, size=0), "size must be >= 1; got 0"),
        (lambda: FedBuff(LOCAL, lr=0), "lr must be > 0; got 0"),
        (
            lambda: simulation(FedBuff(LOCAL, size=11), CLIENTS),
            "size must be at most the number of clients",
        ),
        (lambda: simulation(FedAsync(LOCAL), CLIENTS, timeout=1.0), "timeout must be None"),
        (lambda: FedAdam(LOCAL, beta2=1.5), r"beta2 must be in \[0, 1\]; got 1.5"),
        (lambda: FedAdam(LOCAL, tau=0.0), "tau must be > 0 and finite; got 0.0"),
        (lambda: FedAdam(LOCAL, rule="lion"), "rule must be one of adam, yogi, adagrad; got 'lion'"),
    ):
        with pytest.raises(ValueError, match=match):
            make()
