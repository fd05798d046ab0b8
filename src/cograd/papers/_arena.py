"""Side by side: every applicable method of a room on the same data, model, steps and seeds."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

from cograd import data
from cograd.core.stamp import stamp
from cograd.data.kinds import Images
from cograd.data.loading import readers
from cograd.papers import _arena_machines as machines
from cograd.papers._lab import Lab
from cograd.papers._plot import figure

if TYPE_CHECKING:
    from rich.console import Console

    from cograd.papers._lab import Cell, Record, Report

CALIBRATION_STEPS = 4
PILOT_SEED = 100
MAX_EPOCHS = 24
_UNITS = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}


@dataclass(frozen=True)
class Setting:
    """What is compared. ``link`` is a rate such as ``100mbit``, with ``@20ms`` for a latency; ``budget`` is in
    minutes and decides the number of epochs, never that of methods or seeds.

    Raises ValueError for an argument out of range, a data set that is not of images, or an unknown model.
    """

    data: str = "mnist-5k"
    model: str = "mlp"
    workers: int = 4
    link: str = "100mbit"
    budget: float = 20.0
    seeds: int = 3

    def __post_init__(self) -> None:
        if self.workers < 2:
            raise ValueError(f"workers must be >= 2; got {self.workers}")
        if not self.budget > 0:
            raise ValueError(f"budget must be > 0 minutes; got {self.budget}")
        if self.seeds < 1:
            raise ValueError(f"seeds must be >= 1; got {self.seeds}")
        if self.model not in machines.MODELS:
            raise ValueError(f"model must be one of {', '.join(machines.MODELS)}; got {self.model!r}")
        self.rate()

    def rate(self) -> dict[str, float]:
        """Bandwidth in bits a second, and latency in seconds."""
        found = re.fullmatch(r"(\d+(?:\.\d+)?)(kbit|mbit|gbit)(?:@(\d+(?:\.\d+)?)ms)?", self.link.lower())
        if found is None or not float(found[1]):
            raise ValueError(f"link must be like 100mbit, 1gbit or 10mbit@20ms; got {self.link!r}")
        return {"bandwidth": float(found[1]) * _UNITS[found[2]], "latency": float(found[3] or 0) / 1000}

    def records(self) -> int:
        """Records to train on."""
        loaded = data.load(self.data, "train")
        if not isinstance(loaded, Images):
            raise ValueError(f"data must be a set of images; {self.data} is {type(loaded).__name__}")
        return len(loaded.y)


def compare(setting: Setting, out: Path, console: Console) -> dict[str, Any]:
    """Run the comparison, or what of it is not in ``out`` yet; returns what is shown and saved."""
    records = setting.records()
    epoch = machines.steps_an_epoch(records, setting.workers)
    if epoch < 1:
        raise ValueError(f"workers must leave each a batch of {machines.BATCH}; got {setting.workers}")
    seeds = range(setting.seeds)
    names = {setting.data: data.digest(setting.data)}
    with Lab("full", list(seeds), out, stamp(__name__, names, *readers(setting.data)), console) as lab:
        speed = _speeds(setting, lab)
        runs = len(machines.RATES) + setting.seeds
        one = sum(speed.values()) * epoch * runs
        epochs = max(1, min(MAX_EPOCHS, int(60 * setting.budget / one)))
        console.print(
            f"{len(speed)} systems x ({len(machines.RATES)} pilots + {setting.seeds} seeds), "
            f"{epochs} epochs each: about {epochs * one / 60:.0f} min",
            highlight=False,
        )
        # Whole periods, so that the last exchange of those who train alone meanwhile comes at the end.
        steps = max(1, epochs * epoch // machines.SYNC) * machines.SYNC
        cells = _cells(setting, lab, steps)
        rows = [_row(system, found) for system, found in _by_system(cells, lab, setting).items()]
    return {
        "setting": {**vars(setting), "epochs": epochs, "steps": steps, "batch": machines.BATCH},
        "rows": rows,
        "not_applicable": dict(machines.NOT_APPLICABLE),
    }


def _cell(setting: Setting, system: str, seed: int, lr: float, steps: int) -> dict[str, Any]:
    return {
        "system": system,
        "seed": seed,
        "lr": lr,
        "steps": steps,
        "data_name": setting.data,
        "model": setting.model,
        "link": setting.rate(),
    }


def _compute(setting: Setting, lab: Lab, cell: Cell, report: Report) -> Record:
    def on_progress(rank: int, event: Mapping[str, Any]) -> None:
        report(f"step {event['step']}/{event['steps']}")

    call = lab.workers(setting.workers).call
    ranks = call(f"{machines.__name__}:train", dict(cell), on_progress=on_progress)
    return dict(ranks[0])


def _speeds(setting: Setting, lab: Lab) -> dict[str, float]:
    """Seconds a step of every system, from a few steps of each."""
    cells = [_cell(setting, s.name, PILOT_SEED, s.lr, CALIBRATION_STEPS) for s in machines.SYSTEMS]
    found = lab.map(cells, lambda cell, report: _compute(setting, lab, cell, report))
    return {c["system"]: float(r["step_seconds"]) for c, r in zip(cells, found, strict=True)}


def _cells(setting: Setting, lab: Lab, steps: int) -> list[dict[str, Any]]:
    """Every system at its best rate on every seed."""
    pilots = [
        _cell(setting, s.name, PILOT_SEED, s.lr * factor, steps)
        for s in machines.SYSTEMS
        for factor in machines.RATES
    ]
    found = lab.map(pilots, lambda cell, report: _compute(setting, lab, cell, report))
    best: dict[str, tuple[float, float]] = {}
    for cell, record in zip(pilots, found, strict=True):
        score = (float(record["accuracy"]), float(cell["lr"]))
        best[cell["system"]] = max(best.get(cell["system"], score), score, key=lambda pair: pair[0])
    return [_cell(setting, name, seed, lr, steps) for name, (_, lr) in best.items() for seed in lab.seeds]


def _by_system(cells: list[dict[str, Any]], lab: Lab, setting: Setting) -> dict[str, list[dict[str, Any]]]:
    found = lab.map(cells, lambda cell, report: _compute(setting, lab, cell, report))
    grouped: dict[str, list[dict[str, Any]]] = {}
    for cell, record in zip(cells, found, strict=True):
        grouped.setdefault(cell["system"], []).append({**record, "lr": cell["lr"]})
    return grouped


def _row(system: str, found: list[dict[str, Any]]) -> dict[str, Any]:
    accuracy = [float(r["accuracy"]) for r in found]
    chosen = next(s for s in machines.SYSTEMS if s.name == system)
    return {
        "system": system,
        "accuracy": mean(accuracy),
        "sd": stdev(accuracy) if len(accuracy) > 1 else None,
        "lr": found[0]["lr"],
        "edge": found[0]["lr"] / chosen.lr in (min(machines.RATES), max(machines.RATES)),
        "bytes": mean(float(r["bytes"]) for r in found),
        "link_seconds": mean(float(r["link_seconds"]) for r in found),
        "memory": found[0]["memory"],
        "work": found[0]["work"],
        "note": chosen.note,
    }


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Accuracy against the bytes a worker sent, on a log scale."""
    setting = result["setting"]
    title = f"{setting['data']}, {setting['workers']} workers, {setting['epochs']} epochs"
    with figure(path, 2, title) as (ax, names):
        handles: list[tuple[Any, str]] = []
        for number, row in enumerate(result["rows"]):
            marker = "osD^vP*Xhdp<>"[number % 13]
            place = (max(row["bytes"], 1), row["accuracy"])
            handles.append((ax.errorbar(*place, yerr=row["sd"], fmt=marker, capsize=2), row["system"]))
        ax.set_xscale("log")
        ax.set_xlabel("bytes that a worker sends in the whole run")
        ax.set_ylabel("test accuracy, %")
        names.axis("off")
        names.legend(*zip(*handles, strict=True), frameon=False, loc="center left")


def save(result: Mapping[str, Any], out: Path) -> None:
    """``result.json`` and ``result.png`` in ``out``."""
    (out / "result.json").write_text(json.dumps(result, indent=1))
    draw(result, out / "result.png")
