"""A row of the history is of its own round: bytes, work, figures, participants."""

from __future__ import annotations

from clients.quadratics import DIM, centres, clients_at, simulation
from cograd.clients.baselines import FedAvg
from cograd.engines.federated import LocalSGD, Uniform


def test_a_row_holds_what_was_sent_and_done_up_to_its_round() -> None:
    sim = simulation(FedAvg(LocalSGD(0.1, steps=3)), clients_at(centres(6)), sampler=Uniform(count=2), seed=4)
    for row in sim.rounds(4):
        assert row.up == row.down == row.round * 2 * DIM * 8
        assert row.work == {"grad": row.round * 2 * 3}
        assert row.participants == tuple(sim.session.select(row.round - 1))
