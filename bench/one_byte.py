"""Just One Byte beside PyPI's ``mezo`` 0.0.1, the package that does the same with four bytes.

    pip install mezo==0.0.1
    python -m bench.one_byte [--rounds 20]

Both take one zeroth-order estimate on a model of one matrix and move along its direction. Measured: bytes
sent for an estimate, how far the two evaluations leave the weights from where they were, milliseconds, and
whether the direction that is applied is the one that was measured: its correlation with it. ``mezo`` draws a
matrix whole to perturb it and, if it has more than 100,000 elements, row by row to update it; PyTorch's normal
numbers are the same either way only where a row's length is a multiple of 16.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from cograd.core.codecs import Context
from cograd.machines.one_byte.codes import LogByte
from cograd.machines.one_byte.noise import Direction
from cograd.machines.one_byte.optimizer import OneByte

SHAPES = ((400, 300), (512, 256), (100, 300))
EPS, LR = 1e-3, 1e-3


def matrix(shape: tuple[int, int]) -> tuple[nn.Linear, Tensor]:
    """A layer with weights (rows, columns), and what a linear loss multiplies them by."""
    torch.manual_seed(0)
    return nn.Linear(shape[1], shape[0], bias=False), torch.randn(shape)


def correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])


def ours(shape: tuple[int, int], rounds: int) -> dict[str, float]:
    model, slope = matrix(shape)
    zo = OneByte(model, LR, eps=EPS, samples=1)
    before = model.weight.detach().clone()
    own = zo.estimate(lambda _: (model.weight * slope).sum(), [None], 0)
    drift = float((model.weight.detach() - before).abs().max())
    zo.apply([0], [own.payload])
    z = torch.empty(shape)
    Direction(0, 0, 0, 0).fill("weight", z)
    p = float(LogByte().decode(own.payload, (1,), Context()).dense())
    moved = (before - model.weight.detach()) / (LR * p)
    took = []
    for _ in range(rounds):
        began = time.perf_counter()
        zo.step(lambda _: (model.weight * slope).sum(), [None])
        took.append(time.perf_counter() - began)
    return {
        "bytes": len(own.payload),
        "drift": drift,
        "correlation": correlation(moved, z),
        "ms": 1e3 * median(took),
    }


def theirs(shape: tuple[int, int], rounds: int) -> dict[str, float]:
    from mezo import mezo  # type: ignore[import-not-found]

    model, slope = matrix(shape)

    def loss(model: nn.Module, _: Any) -> Tensor:
        return (model.weight * slope).sum()

    before = model.weight.detach().clone()
    for sign in (1, -2, 1):
        mezo.perturb_parameters([model.weight], sign * EPS, 7)
    drift = float((model.weight.detach() - before).abs().max())
    z = torch.randn(shape, generator=torch.Generator().manual_seed(7))
    before = model.weight.detach().clone()
    p = float(mezo.update(model, None, loss, epsilon=EPS, learning_rate=LR, random_seed=7))
    moved = (before - model.weight.detach()) / (LR * p)
    took = []
    for seed in range(rounds):
        began = time.perf_counter()
        mezo.update(model, None, loss, epsilon=EPS, learning_rate=LR, random_seed=seed)
        took.append(time.perf_counter() - began)
    return {"bytes": 4, "drift": drift, "correlation": correlation(moved, z), "ms": 1e3 * median(took)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    figures = {}
    for shape in SHAPES:
        name = f"{shape[0]} x {shape[1]}"
        figures[f"cograd, {name}"] = ours(shape, args.rounds)
        figures[f"mezo, {name}"] = theirs(shape, args.rounds)
    if args.json:
        json.dump(figures, sys.stdout, indent=1)
        return
    table = Table("system, shape", "bytes", "drift", "applied along what was measured", "ms a step", box=None)
    for name, f in figures.items():
        table.add_row(name, f"{f['bytes']}", f"{f['drift']:.1e}", f"{f['correlation']:.3f}", f"{f['ms']:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
