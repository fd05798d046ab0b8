"""Power-of-choice: who has the highest loss trains, and with every client a candidate and a participant it is
FedAvg."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cograd.clients.baselines import FedAvg, PowerOfChoice
from cograd.clients.baselines.power_of_choice import LOSSES
from cograd.data.clients import ClientData
from cograd.engines.federated import Everyone, LocalModel, LocalSGD, Simulation, Uniform

LOCAL = LocalSGD(lr=0.1, epochs=2, batch_size=5)
NUMEL = 5 * 2 + 2


def clients(n: int = 6) -> list[ClientData]:
    draws = torch.Generator().manual_seed(0)
    found = []
    for client in range(n):
        x = torch.randn(10 + client, 5, generator=draws) + client / 3
        found.append(ClientData(x, (x.sum(1) > client).long(), x[:0], torch.zeros(0, dtype=torch.long)))
    return found


def net() -> nn.Module:
    torch.manual_seed(1)
    return nn.Linear(5, 2)


def simulation(method, count: int | None = 2) -> Simulation:
    sampler = Everyone() if count is None else Uniform(count=count)
    return Simulation(method, net(), nn.functional.cross_entropy, clients(), sampler=sampler)


def loss(vector: torch.Tensor, client: int) -> float:
    data = clients()[client]
    return LocalModel(net(), nn.functional.cross_entropy).mean_loss(vector, data.x, data.y)


@pytest.mark.parametrize("rule", LOSSES)
def test_with_all_clients_it_is_fedavg_of_equal_weights(rule):
    plain, chosen = (
        simulation(m, None)
        for m in (FedAvg(LOCAL, weighted=False), PowerOfChoice(LOCAL, candidates=6, loss=rule))
    )
    plain.run(3)
    chosen.run(3)
    assert torch.equal(plain.server["x"], chosen.server["x"])


def test_the_highest_losses_of_all_candidates_are_chosen():
    sim = simulation(PowerOfChoice(LOCAL, candidates=6))
    for number in range(4):
        x = sim.server["x"].clone()
        hardest = sorted(range(6), key=lambda client: -loss(x, client))[:2]
        (row,) = sim.rounds(number + 1)
        assert row.participants == tuple(sorted(hardest))
        assert row.down == (number + 1) * (6 + 2) * 4 * NUMEL
        assert row.up == (number + 1) * (6 * 4 + 2 * 4 * NUMEL)
    assert sim.history[-1].work["forward"] == 4 * sum(map(len, clients()))


def test_as_many_candidates_as_participants_all_train():
    """Then it is FedAvg over these draws, larger clients more often."""
    sim = simulation(PowerOfChoice(LOCAL, candidates=2))
    sim.run(5)
    groups = [list(row.participants) for row in sim.history]
    plain = Simulation(
        FedAvg(LOCAL, weighted=False), net(), nn.functional.cross_entropy, clients(),
        sampler=lambda round, n, seed: groups[min(round, 4)],
    )  # fmt: skip
    plain.run(5)
    assert torch.equal(sim.server["x"], plain.server["x"])
    assert len(set(map(tuple, groups))) > 1


def test_a_minibatch_may_stand_for_all_examples():
    sim = simulation(PowerOfChoice(LOCAL, candidates=4, loss="batch"))
    sim.run(2)
    assert sim.history[-1].work["forward"] == 2 * 4 * 5


def test_stale_losses_cost_four_bytes_and_newcomers_come_first():
    sim = simulation(PowerOfChoice(LOCAL, candidates=6, loss="stale"))
    sim.run(3)
    seen = [client for row in sim.history for client in row.participants]
    assert sorted(seen) == list(range(6))
    assert sim.history[-1].down == 3 * 2 * 4 * NUMEL
    assert sim.history[-1].up == 3 * 2 * (4 * NUMEL + 4)
    assert "forward" not in sim.history[-1].work
    known = sim.server["losses"].clone()
    (row,) = sim.rounds(4)
    assert row.participants == tuple(sorted(known.topk(2).indices.tolist()))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PowerOfChoice(LOCAL, candidates=0), "candidates must be >= 1; got 0"),
        (lambda: PowerOfChoice(LOCAL, loss="last"), "loss must be one of full, batch, stale; got 'last'"),
        (lambda: simulation(PowerOfChoice(LOCAL, candidates=1)), r"candidates must be in 2 \.\. 6; got 1"),
        (lambda: simulation(PowerOfChoice(LOCAL, candidates=7)), r"candidates must be in 2 \.\. 6; got 7"),
    ],
)
def test_bad_input_is_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()
