"""The clients' arena: equal gradients, its budget, resuming, the split, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from cograd.papers import _arena_clients, _compare_clients
from cograd.papers._arena_clients import EPOCHS, RATES, SYSTEMS, Job, compute, federation, images
from cograd.papers._compare_clients import Setting, compare, save

SMALL: dict[str, Any] = {"data": "digits", "clients": 10, "participation": 0.3}


@pytest.fixture
def quiet() -> Console:
    return Console(quiet=True)


def _only(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    monkeypatch.setattr(_arena_clients, "SYSTEMS", [s for s in SYSTEMS if s.name in names])


def test_methods_are_compared_and_a_rerun_computes_nothing(
    tmp_path: Path, quiet: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    _only(monkeypatch, "local only", "FedAvg", "FedSAM")
    monkeypatch.setattr(_compare_clients, "MAX_ROUNDS", 6)
    setting = Setting(**SMALL, budget=5, seeds=2)
    result = compare(setting, tmp_path, quiet)
    rows = {row["system"]: row for row in result["rows"]}
    assert list(rows) == ["local only", "FedAvg", "FedSAM"]
    assert result["setting"]["rounds"] == 6
    planned = 6 * 3 * EPOCHS * 3  # 140 examples a client are three minibatches
    assert all(planned <= row["gradients"] < planned * 1.4 for row in rows.values())
    assert rows["local only"]["bytes"] == 0
    assert rows["local only"]["accuracy"] is None
    assert rows["FedAvg"]["bytes"] == 6 * 3 * 2 * 4 * 4810
    assert rows["FedAvg"]["target_rounds"] <= 6
    assert rows["FedAvg"]["lr"] in [0.05 * factor for factor in RATES]
    assert rows["FedAvg"]["personal"] > 100 / 10
    assert sum(map(sum, result["split"])) == 1400
    save(result, tmp_path)
    assert json.loads((tmp_path / "result.json").read_text()) == result
    assert (tmp_path / "result.png").stat().st_size > 10_000

    monkeypatch.setattr(_arena_clients, "compute", lambda *_: pytest.fail("a cell was computed again"))
    assert compare(setting, tmp_path, quiet) == result


@pytest.mark.parametrize("system", [s.name for s in SYSTEMS])
def test_every_system_runs(system: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_arena_clients, "WORKERS", 0)
    lr = next(s.lr for s in SYSTEMS if s.name == system)
    cell = Setting(**SMALL).cell(system, 0, lr, 20)
    record = compute(cell, lambda text: None)
    assert record["gradients"][-1] >= 20
    assert 0 < record["personal"][-1] <= 100
    assert record["worst"][-1] <= record["personal"][-1]


def test_a_training_that_diverges_ends_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_arena_clients, "WORKERS", 0)
    record = compute(Setting(**SMALL).cell("FedAvg", 0, 1e30, 1000), lambda text: None)
    assert record["gradients"][-1] < 1000
    assert len(record["personal"]) == 1


def test_a_clients_tests_have_its_own_mix() -> None:
    clients, (train, test) = federation("digits", 0.1, 10, 0), images("digits")
    assert sum(clients.sizes) == len(train.y)
    for held in clients:
        assert set(held.test_y.tolist()) <= set(held.y.tolist())
        major = held.y.mode().values
        share = (held.y == major).double().mean()
        available = int((test.y == major).sum())
        assert int((held.test_y == major).sum()) == min(available, round(50 * float(share)))


def test_a_curriculum_plans_with_the_updates_that_the_gradients_allow() -> None:
    system = next(s for s in SYSTEMS if s.name == "client curriculum")
    job = Job(_arena_clients.LocalSGD(0.1), 10, 3, 40, (1.0,) * 10)
    assert "updates=40" in repr(system.make(job))


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"model": "gpt"}, "model must be one of mlp, cnn; got 'gpt'"),
        ({"alpha": 0.0}, "alpha must be > 0 and finite; got 0.0"),
        ({"clients": 1}, "clients must be >= 2; got 1"),
        ({"participation": 0.01}, "participation must be in .* at least 2 of 100 clients; got 0.01"),
        ({"participation": 1.5}, "participation must be in"),
        ({"budget": 0.0}, "budget must be > 0 minutes; got 0.0"),
        ({"seeds": 0}, "seeds must be >= 1; got 0"),
    ],
)
def test_what_cannot_be_compared_is_refused(bad: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Setting(**bad)


def test_only_images_are_compared_and_each_client_needs_some(tmp_path: Path, quiet: Console) -> None:
    with pytest.raises(ValueError, match="data must be a set of images; tiny-shakespeare is Text"):
        compare(Setting(data="tiny-shakespeare"), tmp_path, quiet)
    with pytest.raises(ValueError, match="clients must leave each 10 examples; got 1000"):
        compare(Setting(data="digits", clients=1000), tmp_path, quiet)


def test_images_of_photographs_are_halved() -> None:
    train, _ = images("cifar-5k")
    assert train.x.shape[1:] == torch.Size((3, 16, 16))
