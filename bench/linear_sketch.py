"""Sketching 25 million coordinates with a fresh R each round, against what the machine can do.

    python -m bench.linear_sketch [--threads 2] [--rounds 7] [--json]

The count sketch is held against one ``torch.randint`` and one ``index_add_`` of that size: what drawing rows
and adding up costs at least in plain torch. It may take twice the time. The SRHT is held against
``torch.fft.rfft`` at its padded size D: it may take twice the time and make one temporary of size D.
Everything is measured in turn, round after round, and a figure is the median over the rounds of a ratio taken
within one round. Memory is what the process grew by at its peak, over what it holds afterwards, in vectors of
D: the one that is allowed, and what drawing the rows takes. Whole ones count as temporaries.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from cograd.machines import Sketch

NUMEL, ROWS = 25_000_000, 2_500_000
TIME, TEMPORARIES = 2.0, 1
"""The bars: over the floor's time; vectors of D."""


class Work:
    """A vector, its sketches, and a counter that gives every use of a sketch a round of its own."""

    def __init__(self) -> None:
        draw = torch.Generator().manual_seed(0)
        self.x = torch.randn(NUMEL, generator=draw)
        self.padded = torch.randn(1 << (NUMEL - 1).bit_length(), generator=draw)
        self.y = torch.randn(ROWS, generator=draw)
        self.total = torch.zeros(ROWS)
        self.rounds = count()
        self.count_sketch = Sketch(NUMEL, ROWS, "countsketch")
        self.srht = Sketch(NUMEL, ROWS, "srht")

    def floor(self) -> None:
        self.total.index_add_(0, torch.randint(ROWS, (NUMEL,)), self.x)

    def rfft(self) -> Tensor:
        return torch.fft.rfft(self.padded)


def seconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def grown(run: Callable[[], Tensor]) -> float | None:
    """Peak of memory during a run over that before it and its result, in bytes; None where not known."""
    status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not clear.exists():
        return None

    def peak() -> int:
        return next(1024 * int(line.split()[1]) for line in status.open() if line.startswith("VmHWM"))

    clear.write_text("5")
    before = peak()
    result = run()
    return peak() - before - result.numel() * result.element_size()


def measure(rounds: int) -> dict[str, dict[str, float | None]]:
    work = Work()
    runs: dict[str, Callable[[], object]] = {
        "randint + index_add_": work.floor,
        "count sketch": lambda: work.count_sketch(work.x, next(work.rounds)),
        "count de-sketch": lambda: work.count_sketch.T(work.y, next(work.rounds)),
        "rfft": work.rfft,
        "SRHT": lambda: work.srht(work.x, next(work.rounds)),
        "SRHT transposed": lambda: work.srht.T(work.y, next(work.rounds)),
    }
    for run in runs.values():
        run()
    took: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            took[name].append(seconds(run))

    def ratio(a: str, b: str) -> float:
        return median(x / y for x, y in zip(took[a], took[b], strict=True))

    figures: dict[str, dict[str, float | None]] = {
        f"{name}, ms": {"value": 1000 * median(times), "bar": None} for name, times in took.items()
    }
    for name, floor in (
        ("count sketch", "randint + index_add_"),
        ("count de-sketch", "randint + index_add_"),
        ("SRHT", "rfft"),
        ("SRHT transposed", "rfft"),
    ):
        figures[f"{name} / {floor}"] = {"value": ratio(name, floor), "bar": TIME}
    one = work.padded.numel() * work.padded.element_size()
    for name, use in (
        ("SRHT", lambda: work.srht(work.x, next(work.rounds))),
        ("SRHT transposed", lambda: work.srht.T(work.y, next(work.rounds))),
    ):
        extra = grown(use)
        value = None if extra is None else extra / one
        figures[f"memory of the {name} / D"] = {"value": value, "bar": None}
        whole = None if value is None else int(value + 0.01)  # the system counts whole pages
        figures[f"temporaries of size D, {name}"] = {"value": whole, "bar": TEMPORARIES}
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    figures = measure(args.rounds)
    if args.json:
        json.dump(figures, sys.stdout, indent=1)
        return
    title = f"Sketches of {NUMEL:,} to {ROWS:,}, {args.threads} threads"
    table = Table("figure", "measured", "bar", "", title=title, box=None)
    for name, figure in figures.items():
        value, bar = figure["value"], figure["bar"]
        met = "" if bar is None or value is None else "met" if value <= bar else "missed"
        shown = "unknown" if value is None else f"{value:.3g}"
        table.add_row(name, shown, f"<= {bar:g}" if bar else "", met)
    Console().print(table)


if __name__ == "__main__":
    main()
