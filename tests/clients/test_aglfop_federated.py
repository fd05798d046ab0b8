"""AGLFOP in a simulation: the audit leaves the training as it is, costs 8 integers, and says the truth."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import nn

from cograd.clients import AGLFOP, FedCAC
from cograd.clients.aglfop import ClientJoint, aglfop, disparities, split, with_groups
from cograd.clients.aglfop.federated import GroupedData, decided
from cograd.clients.baselines import FedAsync, FedAvg, LocalOnly
from cograd.data.clients import Clients
from cograd.data.kinds import Table
from cograd.data.partition import iid
from cograd.engines.federated import LocalSGD, Simulation, Uniform
from cograd.models.mlp import MLP

LOCAL, P = LocalSGD(lr=0.1, batch_size=10), 5 * 4 + 4 + 4 * 2 + 2
FIVE = ("global", "local", "unique", "redundant", "masked")


def data(n: int, seed: int) -> tuple[Table, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 5, generator=draw)
    z = (x[:, 0] > 0).long()
    y = (x[:, :2].sum(1) > 0).long()
    return Table("drawn", "train", "", x, tuple("abcde"), y, ("0", "1"), {}, {}), z


def clients(n: int = 3, how: str = "synergy") -> list[GroupedData]:
    (train, z), (test, test_z) = data(90, 0), data(150, 1)
    parts, test_parts = (split(g, d.y, how, clients=n) for d, g in ((train, z), (test, test_z)))
    return with_groups(Clients(train, parts, test, test_parts), z, test_z)


def simulation(method, held=None, **options) -> Simulation:
    torch.manual_seed(1)
    return Simulation(method, MLP(5, 4, 2), nn.functional.cross_entropy, held or clients(), **options)


def joint_of(sim: Simulation, held_out: bool = True) -> ClientJoint:
    columns: dict[str, list[torch.Tensor]] = {"clients": [], "groups": [], "predictions": [], "labels": []}
    for k, held in enumerate(sim.clients):
        x, y, z = (held.test_x, held.test_y, held.test_z) if held_out else (held.x, held.y, held.z)
        found = torch.full_like(y, k), z, sim.local.outputs(sim.method.model(sim.server), x).argmax(1), y
        for column, values in zip(columns.values(), found, strict=True):
            column.append(values)
    return ClientJoint.from_predictions(**{name: torch.cat(parts) for name, parts in columns.items()})


@pytest.mark.parametrize("inner", [FedAvg(LOCAL), FedCAC(LOCAL)], ids=["FedAvg", "two exchanges a round"])
def test_the_training_is_as_without_it(inner):
    plain, audited = simulation(inner), simulation(AGLFOP(inner))
    plain.run(3)
    audited.run(3)
    assert torch.equal(inner.model(plain.server), audited.method.model(audited.server))
    assert [row.round for row in audited.history] == [1, 2, 3]
    assert [row.participants for row in audited.history] == [row.participants for row in plain.history]
    assert [row.work for row in audited.history] == [row.work for row in plain.history]


def test_every_row_holds_what_a_count_of_all_predictions_says():
    sim = simulation(AGLFOP(FedAvg(LOCAL)))
    for row in sim.rounds(3):
        expected = joint_of(sim)
        found = disparities(expected)
        assert row.reports["audited"] == expected.count == 150
        figures = [found.global_, found.local, found.unique, found.redundant, found.masked]
        assert [row.reports[name] for name in FIVE] == figures
        assert row.reports["global"] == pytest.approx(row.reports["unique"] + row.reports["redundant"])
    joint = sim.method.joint(sim.server)
    assert (joint.table == expected.table).all()
    best = aglfop(joint, eps_global=found.global_, eps_local=found.local)
    assert joint.accuracy <= best.accuracy + 1e-6


@pytest.mark.parametrize(("labels", "integers"), [(True, 8), (False, 4)])
def test_bytes_are_the_integers_and_one_model_more(labels, integers):
    plain, audited = simulation(FedAvg(LOCAL)), simulation(AGLFOP(FedAvg(LOCAL), labels=labels, every=2))
    plain.run(4)
    audited.run(4)
    for one, other in zip(plain.history, audited.history, strict=True):
        audits = other.round // 2
        assert other.up - one.up == audits * 3 * 8 * integers
        assert other.down - one.down == audits * 3 * 4 * P
        assert ("masked" in other.reports) == (other.round % 2 == 0)
    assert audited.method.joint(audited.server).axes == ("szyh" if labels else "szh")


def test_all_clients_are_counted_whoever_trains():
    sim = simulation(AGLFOP(FedAvg(LOCAL)), sampler=Uniform(count=1))
    rows = sim.run(3)
    assert [len(row.participants) for row in rows] == [1, 1, 1]
    assert {row.reports["audited"] for row in rows} == {150.0}


def test_examples_of_the_training_can_be_counted():
    sim = simulation(AGLFOP(FedAvg(LOCAL), held_out=False))
    sim.run(1)
    assert (sim.method.joint(sim.server).table == joint_of(sim, held_out=False).table).all()
    assert sim.history[-1].reports["audited"] == 90


def test_a_client_without_examples_to_count_has_none():
    held = clients()
    none = {name: getattr(held[0], name)[:0] for name in ("test_x", "test_y", "test_z")}
    sim = simulation(AGLFOP(FedAvg(LOCAL)), [replace(held[0], **none), *held[1:]])
    (row,) = sim.run(1)
    assert row.reports["audited"] == sum(len(h.test_y) for h in held[1:])
    empty = simulation(AGLFOP(FedAvg(LOCAL)), [replace(h, **none) for h in held])
    with pytest.raises(ValueError, match="no client has an example to count; held_out=False counts"):
        empty.run(1)


def test_a_resumed_run_is_the_run_that_was_never_stopped(tmp_path: Path):
    method = AGLFOP(FedAvg(LOCAL), every=2)
    sim = simulation(method)
    sim.run(2)
    sim.save(tmp_path / "saved")
    sim.run(4)
    other = simulation(AGLFOP(FedAvg(LOCAL), every=2))
    other.run(4, checkpoint=tmp_path / "saved")
    assert other.history == [
        replace(row, seconds=o.seconds) for row, o in zip(sim.history, other.history, strict=True)
    ]
    assert torch.equal(sim.server["audit.counts"], other.server["audit.counts"])
    with pytest.raises(ValueError, match="of another simulation: its method"):
        simulation(AGLFOP(FedAvg(LOCAL))).load(tmp_path / "saved")


def test_late_clients_are_missing_from_the_counts():
    sim = simulation(AGLFOP(FedAvg(LOCAL)), response_time=[1, 1, 9], timeout=3)
    (row,) = sim.run(1)
    assert row.participants == (0, 1)
    assert row.reports["audited"] == sum(len(h.test_y) for h in sim.clients[:2])


def test_worker_processes_count_alike():
    one, two = (simulation(AGLFOP(FedAvg(LOCAL)), workers=n) for n in (0, 2))
    with two:
        assert [r.reports for r in one.run(2)] == [r.reports for r in two.run(2)]


def test_own_models_stay_the_clients():
    plain, audited = (
        simulation(LocalOnly(LOCAL), personal=True),
        simulation(AGLFOP(LocalOnly(LOCAL)), personal=True),
    )
    assert [r.personal for r in plain.run(2)] == [r.personal for r in audited.run(2)]


def test_one_output_is_a_logit():
    assert decided(torch.tensor([[-1.0], [2.0]])).tolist() == [0, 1]
    assert decided(torch.tensor([-1.0, 2.0])).tolist() == [0, 1]
    assert decided(torch.tensor([[0.0, 1.0, -1.0]])).tolist() == [1]


def test_groups_go_where_the_rows_go():
    held = clients()
    (train, z), (_, test_z) = data(90, 0), data(150, 1)
    assert torch.equal(torch.cat([h.z for h in held]).sort().values, z.sort().values)
    for h in held:
        assert torch.equal(h.z, (h.x[:, 0] > 0).long())
        assert torch.equal(h.test_z, (h.test_x[:, 0] > 0).long())
    alone = with_groups(Clients(train, iid(90, 2, 0)), z)
    assert [len(h.test_z) for h in alone] == [0, 0]
    with pytest.raises(ValueError, match="groups must cover row 89, which a client holds; got 89"):
        with_groups(Clients(train, iid(90, 2, 0)), z[:-1])
    with pytest.raises(ValueError, match="test_groups must be given where the clients have test examples"):
        with_groups(Clients(train, iid(90, 2, 0)), z, test_z)


@dataclass
class Named(FedAvg):
    """A method whose task has the name of ours."""

    def tasks(self):
        return {"audit": self.train}


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: AGLFOP(FedAvg(LOCAL), groups=1), ValueError, "groups must be >= 2; got 1"),
        (lambda: AGLFOP(FedAvg(LOCAL), classes=0), ValueError, "classes must be >= 2; got 0"),
        (lambda: AGLFOP(FedAvg(LOCAL), every=0), ValueError, "every must be >= 1; got 0"),
        (lambda: AGLFOP(FedAsync(LOCAL)), TypeError, "inner must be a method of rounds"),
        (lambda: AGLFOP(Named(LOCAL)), ValueError, "inner must have no task named 'audit'"),
        (lambda: AGLFOP(FedAvg(LOCAL)).joint({}), RuntimeError, "there was no audit yet"),
    ],
)
def test_bad_arguments_are_refused(make, error, text):
    with pytest.raises(error, match=text):
        make()
