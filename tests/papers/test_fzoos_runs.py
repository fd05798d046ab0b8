"""The tasks of FZooS's paper are what they are said to be, and watching a system changes nothing."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cograd.models.mlp import MLP
from cograd.papers._fzoos_runs import (
    FZOOS,
    SCAFFOLD_1,
    ZO,
    Watched,
    attacks,
    classifiers,
    macro_f1,
    margin,
    method,
    metric_task,
    replaced,
    seen_by,
    simulation,
    synthetic,
)
from cograd.papers._fzoos_synthetic import quadratic


def test_macro_f1_is_the_mean_of_the_classes_f1():
    y = torch.tensor([0, 0, 1, 1, 2])
    predicted = torch.tensor([[0, 1, 1, 1, 0], [0, 0, 1, 1, 2]])
    # class 0: 1 of 2 predicted, 1 of 2 found; class 1: 2 of 3, 2 of 2; class 2: nothing
    assert macro_f1(predicted, y, [0, 1, 2]).tolist() == pytest.approx([(0.5 + 0.8 + 0) / 3, 1.0])


def test_every_class_is_seen_by_some_and_not_by_others():
    seen = [seen_by(client) for client in range(5)]
    counts = [sum(label in classes for classes in seen) for label in range(10)]
    assert all(len(set(classes)) == 5 for classes in seen)
    assert set(counts) == {2, 3}


def test_the_margin_is_the_labels_lead():
    torch.manual_seed(0)
    model, image = MLP(196, 4, 10), torch.rand(196)
    points = torch.rand(3, 196)
    logits = model((image + 0.1 * (2 * points - 1)).clamp(0, 1)).detach()
    for label in (0, 7):
        rest = [k for k in range(10) if k != label]
        expected = logits[:, label] - logits[:, rest].amax(1)
        assert torch.allclose(margin(model, image, label, 0.1)(points), expected.double())


def test_images_under_attack_are_not_lost_yet():
    tasks = attacks(0, 3, 0.03)
    assert len(tasks) == 3
    assert all(float(task.mean(task.start[None])) > 0 for task in tasks)
    assert len(classifiers(0)) == len(tasks[0].functions) == 5


def test_the_metric_is_that_of_a_network_with_other_parameters():
    task = metric_task(0, 0.5, steps=5)
    values = task.functions[0](torch.stack([task.start, torch.full((310,), 0.51)]))
    assert ((values > 0) & (values < 1)).all()
    # at the middle of the box the network is as it was trained
    from cograd.core.streams import seed_for, stream
    from cograd.papers._fzoos_runs import _fit, _pooled

    train, _ = _pooled(7)
    torch.manual_seed(seed_for(0, "network"))
    network = MLP(49, 5, 10)
    _fit(network, train.x.flatten(1), train.y, 5, seed_for(0, "network"))
    rows = stream(0, "clients").permutation(len(train.y))[::5]
    rows = rows[torch.isin(train.y[rows], torch.tensor(seen_by(0)))]
    predicted = network(train.x[rows]).argmax(1)
    expected = 1 - macro_f1(predicted[None], train.y[rows], seen_by(0))
    assert float(values[0]) == pytest.approx(float(expected), abs=1e-3)
    assert sum(p.numel() for p in network.parameters()) == 310
    assert isinstance(network, nn.Module)


@pytest.mark.parametrize("name", [FZOOS, ZO, SCAFFOLD_1])
def test_who_is_watched_does_the_same(name):
    task = quadratic(30, 5, 5.0, 0)
    ends, seen = [], []
    for watch in (False, True):
        system = method(name, 0.01, features=50, local_steps=2)
        if watch:
            system = replaced(system, Watched(system.gradient, 2))
        with simulation(system, task, 0) as sim:
            row = sim.run(2)[-1]
        ends.append(sim.server["x"])
        seen.append((row.work, row.reports.get("cosine")))
    assert torch.equal(*ends)
    assert seen[0][0] == seen[1][0]
    assert 0.2 < seen[1][1] <= 1


def test_a_record_holds_what_it_cost():
    cell = {
        "system": FZOOS, "seed": 0, "difference": 5.0, "lr": 0.01, "rounds": 2, "dim": 30, "steps": 2,
        "features": 50,
    }  # fmt: skip
    record = synthetic(cell, lambda text: None)
    assert record["queries"] == [10 + r * (1 + 2 + 5 + 51 + 2) for r in (1, 2)]
    assert record["gap"][0] > record["gap"][1] > 0
