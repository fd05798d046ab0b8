"""What gradient coding adds to a round at the paper's sizes: 16 workers, s = 3, its CNN, batch 4096.

    python -m bench.gradient_coding [--threads 1] [--rounds 9]

A worker computes the gradients of its four chunks of 256 images and encodes them; the master decodes what
arrived, with weights that are cached by survivor set. A round lasts as long as a worker's gradients, the
encoding and the decoding. Figures are medians over the rounds, ratios are taken within a round.

The bars: encoding takes at most 5 % of that worker's gradient time, decoding at most 10 % of a round.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from statistics import median

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from cograd.machines.gradient_coding.codes import Code, CyclicGC, RepetitionGC
from cograd.machines.gradient_coding.learners import Bench, Learner
from cograd.machines.gradient_coding.schemes import GC

N, S, BATCH = 16, 3, 4096


def cnn() -> nn.Module:
    """The paper's network for MNIST: 269,998 parameters."""
    convolutions = [
        nn.Conv2d(1, 8, 5),
        nn.ReLU(),
        nn.Conv2d(8, 16, 5),
        nn.ReLU(),
        nn.Conv2d(16, 4, 5),
        nn.ReLU(),
    ]
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(1024, 256), nn.ReLU(), nn.Linear(256, 10))


class Round:
    """A worker with the gradients of its chunks, and a master with the results of n - s workers."""

    def __init__(self) -> None:
        draw = torch.Generator().manual_seed(0)
        x, y = torch.rand(BATCH, 1, 28, 28, generator=draw), torch.randint(10, (BATCH,), generator=draw)

        def loss(model: nn.Module, rows: Tensor) -> Tensor:
            return nn.functional.cross_entropy(model(x[rows]), y[rows], reduction="sum")

        model = cnn()
        learner = Learner(
            model, torch.optim.SGD(model.parameters(), lr=0.1), loss, lambda step: torch.arange(BATCH)
        )
        self.bench = Bench([learner], GC(N, S))
        self.parts = torch.empty(S + 1, self.bench.numel, dtype=torch.float64)
        self.code, self.repetition = CyclicGC(N, S), RepetitionGC(N, S)
        self.gradients()
        arrived = [i for i in range(N) if i not in (2, 7, 11)]
        self.results = {i: torch.randn(self.bench.numel, dtype=torch.float64, generator=draw) for i in arrived}
        self.everyone = {**self.results, **dict.fromkeys((2, 7, 11), self.results[0])}
        self.large = CyclicGC(256, 15)
        self.draws = np.random.default_rng(0)
        self.lost(self.large)

    def gradients(self) -> None:
        for row, chunk in zip(self.parts, self.code.assignment(0), strict=True):
            self.bench.gradient(0, chunk, out=row)

    def encode(self) -> None:
        self.code.encode(0, self.parts)

    def lost(self, code: Code) -> None:
        """Weights of a survivor set that was not seen before."""
        arrived = np.ones(code.n, dtype=bool)
        arrived[self.draws.choice(code.n, code.s, replace=False)] = False
        code.weights(arrived)


def seconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def measure(rounds: int) -> dict[str, dict[str, float | None]]:
    round_ = Round()
    runs: dict[str, Callable[[], object]] = {
        "gradients of 4 chunks": round_.gradients,
        "encode": round_.encode,
        "decode 13": lambda: round_.code.decode(round_.results),
        "decode 16": lambda: round_.code.decode(round_.everyone),
        "decode 13, repetition": lambda: round_.repetition.decode(round_.results),
        "weights of a new survivor set, n = 16": lambda: round_.lost(round_.code),
        "weights of a new survivor set, n = 256, s = 15": lambda: round_.lost(round_.large),
    }
    for run in runs.values():
        run()
    took: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            took[name].append(seconds(run))
    worker, coding = took["gradients of 4 chunks"], took["encode"]

    def share_of_round(decoding: list[float]) -> float:
        return median(d / (g + e + d) for g, e, d in zip(worker, coding, decoding, strict=True))

    figures: dict[str, dict[str, float | None]] = {
        f"{name}, ms": {"value": 1000 * median(times), "bar": None} for name, times in took.items()
    }
    ratio = median(e / g for e, g in zip(coding, worker, strict=True))
    figures["encode / gradients"] = {"value": ratio, "bar": 0.05}
    figures["decode 13 / round"] = {"value": share_of_round(took["decode 13"]), "bar": 0.10}
    figures["decode 16 / round"] = {"value": share_of_round(took["decode 16"]), "bar": 0.10}
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    figures = measure(args.rounds)
    if args.json:
        json.dump(figures, sys.stdout, indent=1)
        return
    title = f"Gradient coding, {N} workers, s = {S}, 269,998 parameters, {args.threads} threads"
    table = Table("figure", "measured", "bar", "", title=title, box=None)
    for name, figure in figures.items():
        value, bar = figure["value"], figure["bar"]
        met = "" if bar is None or value is None else "met" if value <= bar else "missed"
        table.add_row(name, f"{value:.3g}", f"<= {bar:g}" if bar else "", met)
    Console().print(table)


if __name__ == "__main__":
    main()
