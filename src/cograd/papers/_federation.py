"""What the papers of federated methods have in common: one training, tuning that does not end at an edge,
scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from cograd.core.streams import seed_for
from cograd.engines.federated.protocol import Method
from cograd.engines.federated.row import Row
from cograd.engines.federated.simulation import Simulation
from cograd.engines.federated.workers import NotFinite

if TYPE_CHECKING:
    from cograd.papers._lab import Cell, Lab, Record, Report

WORKERS = 2
MEASURES = ("accuracy", "personal", "worst", "before")
EXTENSIONS = 3
"""How often a grid is continued beyond an edge at which the best value lies."""


def train(
    method: Method,
    model: Callable[[], nn.Module],
    clients: Sequence[Any],
    *,
    seed: int,
    rounds: int,
    report: Report,
    loss: Callable[..., torch.Tensor] = nn.functional.cross_entropy,
    **options: Any,
) -> Record:
    """One method on one seed: what it measured after every round.

    Initial weights depend on the seed alone, so that methods are paired. ``options`` are those of `Simulation`.
    The accuracies of a training that diverged are NaN from then on.
    """
    torch.manual_seed(seed_for(seed, "init"))
    with Simulation(method, model(), loss, clients, seed=seed, workers=WORKERS, **options) as sim:
        with suppress(NotFinite):
            sim.run(rounds, progress=lambda row: report(f"round {row.round}/{rounds}"))
        rows = sim.history
        rows += [_diverged(sim, number) for number in range(len(rows) + 1, rounds + 1)]
    record: Record = {
        "round": [row.round for row in rows],
        "up": [row.up for row in rows],
        "down": [row.down for row in rows],
        "grad": [row.work.get("grad", 0.0) for row in rows],
    }
    for name in MEASURES:
        values = [getattr(row, name) for row in rows]
        if any(value is not None for value in values):
            record[name] = [value if value is None else 100 * value for value in values]
    return record


def _diverged(sim: Simulation, number: int) -> Row:
    tally, nan = sim.tally, math.nan
    return Row(
        number, 0.0, (), tally.up, tally.down, tally.work, tally.seconds,
        accuracy=nan, personal=nan, worst=nan, before=nan,
    )  # fmt: skip


def tail(record: Record, rounds: int, name: str = "accuracy") -> float:
    """The mean of a measure over the last rounds, so that one round's luck does not decide."""
    values = [value for value in record[name] if value is not None]
    return fmean(values[-rounds:])


def rounds_to(record: Record, target: float, name: str = "accuracy") -> float:
    """The first round at which a measure has reached a target; infinity if it never does."""
    reached = (n for n, v in zip(record["round"], record[name], strict=True) if v is not None and v >= target)
    return next(reached, math.inf)


def tuned(
    lab: Lab,
    compute: Callable[[Cell, Report], Record],
    cell: Mapping[str, Any],
    score: Callable[[Record], float],
    *,
    grid: Sequence[float],
    seeds: Sequence[int],
    name: str = "lr",
) -> float:
    """The value of ``name`` with the best mean score over pilot seeds.

    While the best lies at an edge of the grid, the grid is continued there by the ratio of its last two values,
    at most `EXTENSIONS` times; every method is tuned by this rule.
    """
    values = sorted(grid)
    found: dict[float, float] = {}
    for _ in range(EXTENSIONS + 1):
        for value in values:
            if value not in found:
                records = lab.map([{**cell, name: value, "seed": seed} for seed in seeds], compute)
                scores = [score(record) for record in records]
                found[value] = fmean(scores) if all(map(math.isfinite, scores)) else -math.inf
        best = max(values, key=lambda value: found[value])
        if len(values) < 2 or best not in (values[0], values[-1]):
            break
        low = best == values[0]
        values = [_next(values[1], best), *values] if low else [*values, _next(values[-2], best)]
    return max(found, key=lambda value: found[value])


def _next(inner: float, edge: float) -> float:
    """The value beyond an edge, by the ratio of the last two, to two digits."""
    return float(f"{edge * edge / inner:.2g}")
