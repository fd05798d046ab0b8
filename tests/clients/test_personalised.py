"""The personalised baselines: what stays where, and the special cases in which they are one another."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cograd.clients.baselines import FedAvg, FedPer, FedRep, FineTuned, LocalOnly
from cograd.core.streams import stream
from cograd.data.clients import ClientData
from cograd.engines.federated import Cyclic, LocalSGD, Simulation

HEAVY = LocalSGD(lr=0.1, epochs=2, batch_size=8, momentum=0.9, weight_decay=1e-2, max_norm=0.5)
HEAD = 8 * 3 + 3
P = 12 * 8 + 8 + HEAD


def some(client: int) -> ClientData:
    n = 15 + 5 * client
    draws = stream(11, "personal data", client)
    x, y = draws.normal(n, 12), torch.arange(n) % 3
    return ClientData(x, y, x[:6], y[:6])


CLIENTS = [some(client) for client in range(3)]


def simulated(method: Any, rounds: int = 3, **options: Any) -> Simulation:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))
    sim = Simulation(method, model, nn.functional.cross_entropy, CLIENTS, **options)
    sim.run(rounds)
    return sim


def own(sim: Simulation) -> list[Tensor]:
    return [sim.method.personal(sim.server, sim.states[k], k) for k in range(len(CLIENTS))]


def alike(one: Simulation, other: Simulation) -> bool:
    return all(torch.equal(a, b) for a, b in zip(own(one), own(other), strict=True))


# Special cases


@pytest.mark.parametrize("weighted", [True, False])
def test_with_nothing_private_fedper_is_fedavg(weighted: bool) -> None:
    for private in (0, ()):
        sim = simulated(FedPer(HEAVY, weighted=weighted, private=private))
        assert alike(sim, simulated(FedAvg(HEAVY, weighted=weighted)))


@pytest.mark.parametrize("private", [2, ("0", "2")])
def test_with_everything_private_fedper_is_local_training(private: Any) -> None:
    sim = simulated(FedPer(HEAVY, private=private))
    assert alike(sim, simulated(LocalOnly(HEAVY)))
    assert (sim.tally.up, sim.tally.down) == (0, 0)


def test_with_nothing_private_fedrep_is_fedavg_with_equal_weights() -> None:
    assert alike(simulated(FedRep(HEAVY, private=0)), simulated(FedAvg(HEAVY, weighted=False)))


def test_with_everything_private_fedrep_trains_for_the_heads_epochs() -> None:
    expected = simulated(LocalOnly(replace(HEAVY, epochs=3)))
    assert alike(simulated(FedRep(HEAVY, private=2, head_epochs=3)), expected)


def test_fine_tuning_leaves_fedavg_as_it_is_and_begins_where_a_round_does() -> None:
    average = simulated(FedAvg(HEAVY))
    for tuning in (None, HEAVY, LocalSGD(lr=0.05, epochs=3)):
        sim = simulated(FineTuned(HEAVY, tuning=tuning))
        assert torch.equal(sim.server["x"], average.server["x"])
        assert (sim.tally.up, sim.tally.down) == (average.tally.up, average.tally.down)
    assert alike(simulated(FineTuned(HEAVY)), simulated(FineTuned(HEAVY, tuning=HEAVY)))
    first = simulated(FineTuned(HEAVY, tuning=LocalSGD(lr=0.05, epochs=3)), rounds=1)
    assert alike(first, simulated(LocalOnly(LocalSGD(lr=0.05, epochs=3)), rounds=1))


def test_fine_tuned_models_are_those_before_aggregation_and_counted_as_work_only_if_extra() -> None:
    sim = simulated(FineTuned(HEAVY), personal=True)
    for row, plain in zip(sim.history, simulated(FedAvg(HEAVY), personal=True).history, strict=True):
        assert row.personal == pytest.approx(plain.before)
        assert row.work == plain.work
    extra = simulated(FineTuned(HEAVY, tuning=HEAVY))
    assert extra.tally.work["grad"] == 2 * sim.tally.work["grad"]


# What is trained, kept and sent


def test_local_training_goes_on_from_the_clients_own_model_and_sends_nothing() -> None:
    sim = simulated(LocalOnly(LocalSGD(lr=0.1, batch_size=100)), rounds=2)
    v = sim.session.initial.clone()
    for _ in range(2):
        v -= 0.1 * sim.local.gradient(v, CLIENTS[1].x, CLIENTS[1].y)
    assert torch.allclose(own(sim)[1], v, atol=1e-6)
    assert (sim.tally.up, sim.tally.down) == (0, 0)


@pytest.mark.parametrize("method", [FedPer(HEAVY), FedRep(HEAVY)])
def test_heads_differ_and_the_base_is_one_and_all_that_travels(method: FedPer) -> None:
    sim = simulated(method)
    models = torch.stack(own(sim))
    assert (models[:, : P - HEAD] == sim.server["x"]).all()
    assert not (models[0, P - HEAD :] == models[1, P - HEAD :]).any()
    assert sim.tally.up == sim.tally.down == 3 * 3 * 4 * (P - HEAD)
    assert torch.equal(sim.method.model(sim.server)[P - HEAD :], sim.session.initial[P - HEAD :])


@pytest.mark.parametrize("method", [FedPer(HEAVY), FedRep(HEAVY)])
def test_a_client_that_sleeps_keeps_its_head(method: FedPer) -> None:
    sim = simulated(method, rounds=1, sampler=Cyclic(count=1))
    before = own(sim)[0]
    sim.run(2)
    after = own(sim)[0]
    assert torch.equal(before[P - HEAD :], after[P - HEAD :])
    assert not torch.equal(before[: P - HEAD], after[: P - HEAD])


def test_fedrep_trains_one_part_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    sim = simulated(FedRep(replace(HEAVY, epochs=1), head_epochs=2), rounds=0)
    points: list[Tensor] = []
    plain = sim.local.gradient

    def watched(v: Tensor, x: Tensor, y: Tensor) -> Tensor:
        points.append(v.clone())
        return plain(v, x, y)

    monkeypatch.setattr(sim.local, "gradient", watched)
    sim.run(1)
    walk = torch.stack(points[:6])  # client 0: 2 epochs of 2 steps on the head, 1 on the base
    base, head = walk[:, : P - HEAD], walk[:, P - HEAD :]
    assert (base[:5] == base[0]).all()
    assert (head[4:] == head[4]).all()
    assert all((head[i] != head[i + 1]).any() for i in range(4))
    assert (base[4] != base[5]).any()
    assert torch.equal(own(sim)[0][P - HEAD :], head[4])


def test_fedrep_counts_the_gradients_of_both_phases() -> None:
    sim = simulated(FedRep(replace(HEAVY, epochs=1), head_epochs=4), rounds=2)
    steps = sum(-(-len(client) // 8) for client in CLIENTS)
    assert sim.tally.work["grad"] == 2 * 5 * steps


def test_a_resumed_run_is_bit_for_bit_the_same(tmp_path: Path) -> None:
    for name, method in (("per", FedPer(HEAVY)), ("tuned", FineTuned(HEAVY)), ("local", LocalOnly(HEAVY))):
        simulated(method, rounds=2).save(tmp_path / name)
        resumed = simulated(method, rounds=0)
        resumed.load(tmp_path / name)
        resumed.run(3)
        assert alike(resumed, simulated(method))


def test_private_parts_go_by_layer_or_tensor_and_bad_ones_are_refused() -> None:
    sim = simulated(FedPer(HEAVY, private=("2.bias", "0")), rounds=1)
    assert sim.server["mine"].sum() == 12 * 8 + 8 + 3
    with pytest.raises(ValueError, match=r"private must be in 0 .. 2 layers; got 3"):
        simulated(FedPer(HEAVY, private=3))
    with pytest.raises(
        ValueError, match=r"private must name layers or tensors of the model \(0, 2\); got 'head'"
    ):
        simulated(FedPer(HEAVY, private=("head",)))
    with pytest.raises(ValueError, match="head_epochs must be >= 0; got -1"):
        FedRep(HEAVY, head_epochs=-1)
