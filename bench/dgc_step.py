"""One DGC step on ResNet-50's parameters against its floor, and its parts against the obvious way.

    python -m bench.dgc_step [--threads 2] [--rounds 15]

The floor of a step is the time in which the machine can copy memory for 20 bytes a parameter: read g, read
and write u and v. Everything is measured in turn, round after round, and a figure is the median over the
rounds of a ratio taken within one round, so that a machine whose speed drifts does not favour anybody.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from statistics import median

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from cograd.core.codecs import Context, count_for, reduce
from cograd.core.selection import Exact, Sampled
from cograd.core.space import ParamSpace
from cograd.machines import DGC
from cograd.models.shapes import resnet50

DENSITY = 0.001


class Step:
    """A worker's DGC state after some steps on Gaussian gradients."""

    def __init__(self) -> None:
        self.space = ParamSpace(resnet50())
        draw = torch.Generator().manual_seed(0)
        self.gradients = {s.name: torch.randn(s.shape, generator=draw) for s in self.space}
        self.dgc = DGC(DENSITY)
        self.dgc.bind(self.space, 4, 0)
        for _ in range(5):
            self.dgc.decode([self.payload()] * 4)
        self.dgc.decode([self.payload()] * 4)
        self.sent = self.payload()
        self.residual = self.dgc.state["residual"][self.dgc.head :].clone()
        self.layout = self.dgc.space.layout[self.dgc.dense_segments :]
        self.counts = [count_for(n, DENSITY) for n in self.layout]
        self.source = torch.randn(self.space.numel, generator=draw)
        self.target = torch.empty_like(self.source)

    def payload(self) -> bytearray:
        self.accumulate()
        return bytearray(self.dgc.encode())

    def copy(self) -> None:
        self.target.copy_(self.source)

    def accumulate(self) -> None:
        for name, gradient in self.gradients.items():
            self.dgc.feed(name, gradient, 0.25)

    def encode(self) -> None:
        self.dgc.encode()

    def whole(self) -> None:
        """Accumulate, select, encode, mask: what a worker computes between backward and the network."""
        self.accumulate()
        self.dgc.encode()
        self.dgc._forget_sent()

    def decode(self) -> None:
        codec, contexts = self.dgc._split(), [Context()] * 4
        reduce(codec, [self.sent] * 4, self.dgc.space.layout, contexts, out=self.dgc.update)

    def select(self, threshold: Sampled | Exact) -> Tensor:
        return threshold.select(self.residual, self.layout, self.counts, 0, 0, 0)

    def topk(self) -> None:
        for part, k in zip(torch.split(self.residual, list(self.layout)), self.counts, strict=True):
            part.abs().topk(k, sorted=False)


def seconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def measure(rounds: int) -> dict[str, dict[str, float | None]]:
    step = Step()
    runs: dict[str, Callable[[], object]] = {
        "copy": step.copy,
        "accumulate": step.accumulate,
        "encode": step.encode,
        "step": step.whole,
        "decode 4": step.decode,
        "select, sampled": lambda: step.select(Sampled()),
        "select, exact": lambda: step.select(Exact()),
        "torch.topk": step.topk,
    }
    for run in runs.values():
        run()
    took: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            took[name].append(seconds(run))
    floor = [c * 20 / 8 for c in took["copy"]]

    def ratio(a: list[float], b: list[float]) -> float:
        return median(x / y for x, y in zip(a, b, strict=True))

    figures: dict[str, dict[str, float | None]] = {
        f"{name}, ms": {"value": 1000 * median(times), "bar": None} for name, times in took.items()
    }
    figures["floor, ms"] = {"value": 1000 * median(floor), "bar": None}
    figures["step / floor"] = {"value": ratio(took["step"], floor), "bar": 2.5}
    figures["torch.topk / sampled"] = {"value": ratio(took["torch.topk"], took["select, sampled"]), "bar": 6.0}
    figures["torch.topk / exact"] = {"value": ratio(took["torch.topk"], took["select, exact"]), "bar": None}
    figures["decode 4 / encode"] = {"value": ratio(took["decode 4"], took["encode"]), "bar": 1.0}
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    figures = measure(args.rounds)
    if args.json:
        json.dump(figures, sys.stdout, indent=1)
        return
    table = Table(
        "figure", "value", "bar", "", title=f"DGC on ResNet-50's shapes, {args.threads} threads", box=None
    )
    for name, figure in figures.items():
        value, bar = figure["value"], figure["bar"]
        at_least = "topk" in name
        met = "" if bar is None or value is None else "met" if (value >= bar) == at_least else "missed"
        table.add_row(name, f"{value:.3g}", f"{'>=' if at_least else '<='} {bar:g}" if bar else "", met)
    Console().print(table)


if __name__ == "__main__":
    main()
