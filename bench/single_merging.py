"""The merged model against PyTorch's own averaging, and nodes stepped together against one after another.

    python -m bench.single_merging [--nodes 16] [--rounds 9]

`torch.optim.swa_utils.AveragedModel` with `update_bn` is what a user would merge with; its values must be those
of `merge`. A figure is the median over the rounds of times taken in turn, so that a machine whose speed drifts
does not favour anybody.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from statistics import median

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, update_bn

from cograd.machines import DecentralizedTrainer, Schedule
from cograd.machines.single_merging import merge, replicas
from cograd.models.mlp import MLP


def convnet() -> nn.Module:
    layers: list[nn.Module] = []
    for n_in, n_out in ((3, 32), (32, 64), (64, 128)):
        layers += [nn.Conv2d(n_in, n_out, 3, padding=1), nn.BatchNorm2d(n_out), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))


def swa(models: list[nn.Module], loader: list[Tensor]) -> nn.Module:
    averaged = AveragedModel(models[0], avg_fn=lambda mean, new, count: mean + (new - mean) / (count + 1))
    for model in models:
        averaged.update_parameters(model)
    update_bn(loader, averaged)
    return averaged.module


def trainer(nodes: int, engine: str) -> DecentralizedTrainer:
    return DecentralizedTrainer(
        replicas(lambda: MLP(196, 64, 64, 10), nodes),
        lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
        nn.functional.cross_entropy,
        schedule=Schedule.fixed(10**6, 0.2),
        local_steps=10,
        engine=engine,  # type: ignore[arg-type]
    )


def seconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def away(a: nn.Module, b: nn.Module) -> float:
    """The largest difference of two models' parameters and statistics."""
    states = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return max(float((x.double() - y.double()).abs().max()) for x, y in states)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--nodes", type=int, default=16)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    models = replicas(convnet, args.nodes, init="per-node")
    loader = [torch.randn(64, 3, 16, 16) for _ in range(8)]
    x, y = torch.randn(args.nodes, 32, 196), torch.randint(10, (args.nodes, 32))
    batched, loop = trainer(args.nodes, "batched"), trainer(args.nodes, "loop")
    runs: dict[str, Callable[[], object]] = {
        "merge, 8 calibration batches": lambda: merge(models, recalibrate=loader),
        "AveragedModel + update_bn": lambda: swa(models, loader),
        "merge": lambda: merge(models),
        "AveragedModel": lambda: swa(models, []),
        "local step, batched": lambda: batched.step(x, y),
        "local step, loop": lambda: loop.step(x, y),
    }
    took: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(args.rounds + 1):
        for name, run in runs.items():
            took[name].append(seconds(run))
    table = Table("", "ms", title=f"single merging, {args.nodes} nodes, {args.threads} threads", box=None)
    for name, times in took.items():
        table.add_row(name, f"{1000 * median(times[1:]):.3g}")
    console = Console()
    console.print(table)
    same = away(merge(models, recalibrate=loader), swa(copy.deepcopy(models), loader))
    console.print(f"largest difference of the two merged models: {same:.2g}")


if __name__ == "__main__":
    main()
