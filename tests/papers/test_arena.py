"""The arena: what is compared, that it ends within its budget and resumes, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from cograd.papers import _arena, _arena_machines
from cograd.papers._arena import Setting
from cograd.papers._arena_machines import SYSTEMS, tensor_bytes


@pytest.fixture
def quiet() -> Console:
    return Console(quiet=True)


def test_systems_are_compared_and_a_rerun_computes_nothing(
    tmp_path: Path, quiet: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = [s for s in SYSTEMS if s.name in ("dense all-reduce", "DGC", "single merging")]
    monkeypatch.setattr(_arena_machines, "SYSTEMS", chosen)
    setting = Setting(data="digits", model="softmax", workers=2, budget=0.01, seeds=2)
    result = _arena.compare(setting, tmp_path, quiet)
    rows = {row["system"]: row for row in result["rows"]}
    assert set(rows) == {s.name for s in chosen}
    assert result["setting"]["epochs"] == 1
    assert result["setting"]["steps"] % _arena_machines.SYNC == 0
    dense = rows["dense all-reduce"]
    assert dense["bytes"] == 4 * 650 * result["setting"]["steps"]
    assert dense["memory"] == 4 * 650
    assert dense["link_seconds"] == pytest.approx(8 * dense["bytes"] / 100e6)
    assert rows["DGC"]["bytes"] < dense["bytes"]
    assert 10 < dense["accuracy"] <= 100
    _arena.save(result, tmp_path)
    assert json.loads((tmp_path / "result.json").read_text()) == result
    assert (tmp_path / "result.png").stat().st_size > 10_000

    cells = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("cells/**/*.json")}
    monkeypatch.setattr(_arena, "_compute", lambda *_: pytest.fail("a cell was computed again"))
    assert _arena.compare(setting, tmp_path, quiet) == result
    assert cells == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("cells/**/*.json")}


def test_a_link_is_a_rate_and_perhaps_a_latency() -> None:
    assert Setting(link="100mbit").rate() == {"bandwidth": 1e8, "latency": 0.0}
    assert Setting(link="2.5Gbit@20ms").rate() == {"bandwidth": 2.5e9, "latency": 0.02}


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"workers": 1}, "workers must be >= 2; got 1"),
        ({"budget": 0}, "budget must be > 0 minutes; got 0"),
        ({"seeds": 0}, "seeds must be >= 1; got 0"),
        ({"model": "gpt"}, "model must be one of mlp, softmax; got 'gpt'"),
        ({"link": "fast"}, "link must be like 100mbit, 1gbit or 10mbit@20ms; got 'fast'"),
        ({"link": "0mbit"}, "link must be like"),
    ],
)
def test_what_cannot_be_compared_is_refused(bad: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Setting(**bad)  # type: ignore[arg-type]


def test_only_images_are_compared_and_each_worker_needs_a_batch(tmp_path: Path, quiet: Console) -> None:
    with pytest.raises(ValueError, match="data must be a set of images; tiny-shakespeare is Text"):
        _arena.compare(Setting(data="tiny-shakespeare"), tmp_path, quiet)
    with pytest.raises(ValueError, match="workers must leave each a batch of 32; got 64"):
        _arena.compare(Setting(data="digits", workers=64), tmp_path, quiet)


def test_bytes_of_a_nest_of_tensors() -> None:
    assert tensor_bytes({"a": [torch.zeros(3), (torch.zeros(2, dtype=torch.float64), "text")], 1: 2}) == 28
