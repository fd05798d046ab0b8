"""Side by side: every applicable federated method on the same clients, at equal gradient evaluations."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from cograd import data
from cograd.core.stamp import stamp
from cograd.data.loading import readers
from cograd.papers import _arena_clients as arena
from cograd.papers._lab import Lab
from cograd.papers._plot import figure

if TYPE_CHECKING:
    from rich.console import Console

    from cograd.papers._lab import Record

CALIBRATION_ROUNDS, MAX_ROUNDS = 2, 400
PILOT_SEED = 100
TARGET = 0.95
"""Of FedAvg's accuracy on the clients' own tests: what rounds and bytes are counted to."""


@dataclass(frozen=True)
class Setting:
    """What is compared. ``alpha`` is of the Dirichlet split, ``participation`` the share of clients in a round,
    ``budget`` in minutes: it decides the number of rounds, never that of methods or seeds.

    Raises ValueError for an argument out of range or an unknown model.
    """

    data: str = "cifar10"
    model: str = "mlp"
    alpha: float = 0.1
    clients: int = 100
    participation: float = 0.1
    budget: float = 20.0
    seeds: int = 3

    def __post_init__(self) -> None:
        if self.model not in arena.MODELS:
            raise ValueError(f"model must be one of {', '.join(arena.MODELS)}; got {self.model!r}")
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"alpha must be > 0 and finite; got {self.alpha}")
        if self.clients < 2:
            raise ValueError(f"clients must be >= 2; got {self.clients}")
        if not 0 < self.participation <= 1 or self.participants < 2:
            raise ValueError(
                f"participation must be in (0, 1] and select at least 2 of {self.clients} clients; "
                f"got {self.participation}"
            )
        if not self.budget > 0:
            raise ValueError(f"budget must be > 0 minutes; got {self.budget}")
        if self.seeds < 1:
            raise ValueError(f"seeds must be >= 1; got {self.seeds}")

    @property
    def participants(self) -> int:
        """Clients of a round."""
        return int(self.participation * self.clients + 1e-9)

    def cell(self, system: str, seed: int, lr: float, gradients: int) -> dict[str, Any]:
        return {
            "system": system,
            "seed": seed,
            "lr": lr,
            "gradients": gradients,
            "data_name": self.data,
            "model": self.model,
            "alpha": self.alpha,
            "clients": self.clients,
            "participants": self.participants,
        }


def compare(setting: Setting, out: Path, console: Console) -> dict[str, Any]:
    """Run the comparison, or what of it is not in ``out`` yet; returns what is shown and saved."""
    train, _ = arena.images(setting.data)
    each = len(train.y) // setting.clients
    if each < arena.BATCH // 5:
        raise ValueError(f"clients must leave each {arena.BATCH // 5} examples; got {setting.clients}")
    a_round = setting.participants * arena.EPOCHS * math.ceil(each / arena.BATCH)
    seeds = list(range(setting.seeds))
    names = {setting.data: data.digest(setting.data)}
    with Lab("full", seeds, out, stamp(__name__, names, *readers(setting.data)), console) as lab:
        cells = [setting.cell(s.name, PILOT_SEED, s.lr, a_round * CALIBRATION_ROUNDS) for s in arena.SYSTEMS]
        one = sum(record["seconds"] for record in lab.map(cells, arena.compute)) / CALIBRATION_ROUNDS
        runs = len(arena.RATES) + setting.seeds
        rounds = max(1, min(MAX_ROUNDS, int(60 * setting.budget / (one * runs))))
        console.print(
            f"{len(arena.SYSTEMS)} systems x ({len(arena.RATES)} pilots + {setting.seeds} seeds), the "
            f"gradients of {rounds} rounds of FedAvg each: at most {rounds * one * runs / 60:.0f} min",
            highlight=False,
        )
        records = _records(setting, lab, a_round * rounds)
    parts = arena.federation(setting.data, setting.alpha, setting.clients, 0).parts
    target = TARGET * fmean(r["personal"][-1] for r in records["FedAvg"])
    return {
        "setting": {**vars(setting), "rounds": rounds, "epochs": arena.EPOCHS, "batch": arena.BATCH},
        "target": target,
        "rows": [_row(system, records[system.name], target) for system in arena.SYSTEMS],
        "split": parts.report(train.y).histogram.tolist(),
        "not_applicable": dict(arena.NOT_APPLICABLE),
    }


def _records(setting: Setting, lab: Lab, gradients: int) -> dict[str, list[Record]]:
    """Of every system at its best rate, a seed each; and that rate."""
    pilots = [
        setting.cell(s.name, PILOT_SEED, s.lr * factor, gradients)
        for s in arena.SYSTEMS
        for factor in arena.RATES
    ]
    best: dict[str, tuple[float, float]] = {}
    for cell, record in zip(pilots, lab.map(pilots, arena.compute), strict=True):
        score = record["personal"][-1], float(cell["lr"])
        best[cell["system"]] = max(best.get(cell["system"], score), score, key=lambda pair: pair[0])
    cells = [setting.cell(name, seed, lr, gradients) for name, (_, lr) in best.items() for seed in lab.seeds]
    found: dict[str, list[Record]] = {}
    for cell, record in zip(cells, lab.map(cells, arena.compute), strict=True):
        found.setdefault(cell["system"], []).append({**record, "lr": cell["lr"]})
    return found


def _row(system: arena.System, records: Sequence[Record], target: float) -> dict[str, Any]:
    last = {name: [r[name][-1] for r in records] for name in arena.MEASURES}
    reached = [_reached(record, target) for record in records]
    factor = records[0]["lr"] / system.lr
    shortest = min(len(r["personal"]) for r in records)
    return {
        "system": system.name,
        **{name: None if None in values else fmean(values) for name, values in last.items()},
        "sd": stdev(last["personal"]) if len(records) > 1 else None,
        "lr": records[0]["lr"],
        "edge": any(math.isclose(factor, end) for end in (min(arena.RATES), max(arena.RATES))),
        "target_rounds": _mean([r and r[0] for r in reached]),
        "target_bytes": _mean([r and r[1] for r in reached]),
        "bytes": fmean(r["bytes"][-1] for r in records),
        "gradients": fmean(r["gradients"][-1] for r in records),
        "forwards": fmean(r["forwards"][-1] for r in records),
        "seconds": fmean(r["computing"] for r in records),
        "curve": {
            name: [fmean(r[name][i] for r in records) for i in range(shortest)]
            for name in ("gradients", "bytes", "personal")
        },
        "note": system.note,
    }


def _reached(record: Record, target: float) -> tuple[float, float] | None:
    """Rounds and bytes when the target is first reached; None if never."""
    triples = zip(record["round"], record["bytes"], record["personal"], strict=True)
    return next(((float(n), float(sent)) for n, sent, own in triples if own >= target), None)


def _mean(values: Sequence[float | None]) -> float | None:
    """The mean if there is one for every seed."""
    there = [value for value in values if value is not None]
    return fmean(there) if len(there) == len(values) else None


def draw(result: Mapping[str, Any], path: Path) -> None:
    """The split, the clients' accuracy along the work, and against what was sent."""
    setting, rows = result["setting"], result["rows"]
    title = (
        f"{setting['data']}, {setting['clients']} clients, Dirichlet {setting['alpha']:g}, "
        f"{100 * setting['participation']:g} % a round, {setting['seeds']} seeds"
    )
    with figure(path, 4, title) as (split, along, sent, names):
        split.imshow(
            list(zip(*result["split"], strict=True)), aspect="auto", cmap="Greys", interpolation="none"
        )
        split.grid(visible=False)
        split.set(xlabel="client", ylabel="class", title="examples of the first seed")
        handles = []
        for number, row in enumerate(rows):
            look = {"color": f"C{number % 10}", "linestyle": ("-", "--", ":")[number // 10 % 3]}
            (line,) = along.plot(row["curve"]["gradients"], row["curve"]["personal"], **look)
            sent.plot(max(row["bytes"], 1) / 1e6, row["personal"], "os^"[number // 10 % 3], color=look["color"])
            line.set_marker("os^"[number // 10 % 3])
            line.set_markersize(3)
            handles.append((line, row["system"]))
        along.set(xlabel="gradients evaluated", ylabel="accuracy on clients' own tests, %")
        sent.set(xscale="log", xlabel="MB sent by all, both ways")
        names.axis("off")
        names.legend(*zip(*handles, strict=True), frameon=False, loc="center left", fontsize=7, ncols=2)


def save(result: Mapping[str, Any], out: Path) -> None:
    """``result.json`` and ``result.png`` in ``out``."""
    (out / "result.json").write_text(json.dumps(result, indent=1))
    draw(result, out / "result.png")
