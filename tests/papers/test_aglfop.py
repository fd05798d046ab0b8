"""What AGLFOP's paper runs on: Adam as torch has it, the paper's splits, a smoke run and its picture."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from cograd.clients.aglfop import ClientJoint, disparities
from cograd.clients.baselines import FedAvg
from cograd.core.streams import stream
from cograd.data.clients import ClientData
from cograd.engines.federated import Simulation
from cograd.papers import find
from cograd.papers._aglfop_cells import LocalAdam, federation, labels_of, synthetic
from cograd.papers._lab import Lab
from cograd.papers._paper import assemble
from cograd.papers.aglfop import BOTH, GLOBALLY, LOCALLY, TIGHT, relabelled


def test_local_adam_is_torchs():
    x = torch.randn(24, 3, generator=torch.Generator().manual_seed(0))
    y = (x[:, 0] > 0).long()
    torch.manual_seed(0)
    ours, theirs = nn.Linear(3, 2), nn.Linear(3, 2)
    theirs.load_state_dict(ours.state_dict())
    clients = [ClientData(x, y, x[:0], y[:0])]
    local = LocalAdam(0.01, epochs=2, batch_size=10)
    sim = Simulation(FedAvg(local), ours, nn.functional.cross_entropy, clients, seed=3)
    (row,) = sim.run(1)
    assert row.work == {"grad": 6.0}
    optimizer = torch.optim.Adam(theirs.parameters(), lr=0.01)
    for epoch in range(2):
        for rows in stream(3, "client", 0, 0, "batches", epoch).permutation(24).split(10):
            optimizer.zero_grad()
            nn.functional.cross_entropy(theirs(x[rows]), y[rows]).backward()
            optimizer.step()
    expected = torch.cat([p.detach().reshape(-1) for p in theirs.parameters()])
    assert sim.server["x"] == pytest.approx(expected.numpy(), abs=1e-6)


def test_synthetic_data_are_the_papers():
    table, z = synthetic(0.95, seed=0)
    assert (len(table), int(table.y.sum())) == (1000, 500)
    assert float((z == table.y).float().mean()) == pytest.approx(0.95, abs=0.03)
    assert torch.cov(table.x[table.y == 1].T).numpy() == pytest.approx(np.array([[5, 1], [1, 5]]), abs=1)
    assert table.x[table.y == 0].mean(0).numpy() == pytest.approx(np.array([-2, -2]), abs=0.5)
    skew = labels_of("skew", 0.95, 0).over("zs")
    assert skew[1] / skew[1].sum() == pytest.approx([0.92, 0.08], abs=0.03)
    synergy = labels_of("synergy", 0.95, 0)
    assert np.trace(synergy.over("szy")[0]) == pytest.approx(synergy.over("s")[0], abs=0.01)


def test_a_federation_keeps_a_fifth_of_the_rows_for_counting():
    clients = federation("synthetic", "skew", 0)
    assert sum(map(len, clients)) == 800
    assert sum(len(client.test_y) for client in clients) == 200
    ones = [int(client.test_z.sum()) for client in clients]
    assert ones[0] / sum(ones) == pytest.approx(0.9, abs=0.01)


def test_relabelling_is_fair_where_it_should_be():
    p = np.random.default_rng(2).dirichlet(np.ones(16)).reshape(2, 2, 2, 2)
    joint = ClientJoint(p, "szyh")
    found = {kind: disparities(relabelled(joint, joint, kind)) for kind in (GLOBALLY, LOCALLY, BOTH)}
    assert found[GLOBALLY].global_ <= TIGHT + 1e-5
    assert found[LOCALLY].local <= TIGHT + 1e-5
    assert max(found[BOTH].global_, found[BOTH].local) <= TIGHT + 1e-5
    for kind in found:
        assert relabelled(joint, joint, kind).over("szy") == pytest.approx(joint.over("szy"))


def test_a_smoke_run_and_its_picture(tmp_path: Path):
    paper = find("aglfop")
    with Lab("smoke", [7], tmp_path, {}) as lab:
        result = assemble(paper, lab, paper.run(lab))
    assert result.holds
    paper.draw(json.loads(json.dumps(result.to_json())), tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000
