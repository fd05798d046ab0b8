"""The simulator beside a plain PyTorch loop and Flower's simulation engine: clients trained in a second.

    python -m bench.federated [--models mlp cnn] [--rounds 20] [--repeats 3] [--flower VENV/bin/python]

MNIST among 100 clients of 600 images; 10 of them a round train an epoch in minibatches of 32. All arms have the
same initial weights, participants and minibatches, so that accuracies after the last round are equal; they run
in turn, repeat after repeat, and a ratio is the median over the repeats of ratios within one.

- *plain* is `bench.federated_plain`: one process, torch's own optimizer, with one thread and with one a core.
- *cograd* is `Simulation` with FedAvg, without workers and with one a core.
- *stacked* trains a round's clients at once, as one batch of models (``torch.func.vmap``), in one process: the
  other engine that a simulator could have.
- *Flower* needs a Python that has ``flwr[simulation]`` and torch; clients load their examples from files.

A simulation is timed from its beginning to its end, with the start of its processes: those that cograd forks,
and those of Ray under Flower. What Flower does once they are there is shown as well: rounds after the first.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import torch
from bench.federated_plain import BATCH, LR, average, build
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap

from cograd import data
from cograd.clients.baselines import FedAvg
from cograd.core.streams import stream
from cograd.engines.federated import Clients, LocalSGD, Simulation, Uniform

CLIENTS, SHARE, SEED = 100, 0.1, 0
CORES = os.cpu_count() or 1
BARS = {"mlp": {"plain": 1.6, "Flower": 20.0}, "cnn": {"plain": 1.3, "Flower": None}}
SAME = 1e-3
"""How far accuracies may lie apart."""


@dataclass(frozen=True)
class Run:
    """Seconds from beginning to end, and the accuracy then; ``later`` are those of all rounds but the first."""

    seconds: float
    accuracy: float
    later: float | None = None


class Federation:
    """The split, and who trains on what in which order; the same for all arms."""

    def __init__(self, rounds: int) -> None:
        train, test = data.load("mnist"), data.load("mnist", "test")
        assert isinstance(train, data.Images)
        assert isinstance(test, data.Images)
        self.clients = Clients(train, data.iid(len(train), CLIENTS, SEED))
        self.test, self.rounds = test, rounds
        self.sampler = Uniform(SHARE)
        self.participants = [self.sampler(r, CLIENTS, SEED) for r in range(rounds)]
        self.orders = [
            [stream(SEED, "client", c, r, "batches", 0).permutation(len(self.clients[c])) for c in chosen]
            for r, chosen in enumerate(self.participants)
        ]

    @property
    def trained(self) -> int:
        return sum(map(len, self.participants))

    def accuracy(self, model: nn.Module) -> float:
        with torch.no_grad():
            return float((model(self.test.x).argmax(1) == self.test.y).double().mean())

    def write(self, folder: Path) -> None:
        """Everything that Flower's arm needs."""
        (folder / "participants.json").write_text(json.dumps(self.participants))
        torch.save((self.test.x, self.test.y), folder / "test.pt")
        for client, held in enumerate(self.clients):
            torch.save((held.x.clone(), held.y.clone()), folder / f"client-{client}.pt")
        for r, chosen in enumerate(self.participants):
            for client, order in zip(chosen, self.orders[r], strict=True):
                torch.save(order, folder / f"order-{r}-{client}.pt")


def plain(federation: Federation, name: str, threads: int) -> Run:
    torch.set_num_threads(threads)
    model, held = build(name), [(c.x, c.y) for c in federation.clients]
    began = time.perf_counter()
    average(model, held, federation.participants, federation.orders)
    return Run(time.perf_counter() - began, federation.accuracy(model))


def cograd(federation: Federation, name: str, workers: int) -> Run:
    torch.set_num_threads(CORES)
    method, model = FedAvg(LocalSGD(LR, batch_size=BATCH)), build(name)
    began = time.perf_counter()
    with Simulation(
        method, model, nn.functional.cross_entropy, federation.clients,
        sampler=federation.sampler, seed=SEED, workers=workers,
    ) as sim:  # fmt: skip
        sim.run(federation.rounds)
    seconds = time.perf_counter() - began
    return Run(seconds, sim.accuracy(sim.server["x"], federation.test))


def stacked(federation: Federation, name: str, threads: int) -> Run:
    """All clients of a round as one batch of models; it needs clients of one size."""
    torch.set_num_threads(threads)
    model, clients = build(name), federation.clients

    def loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(functional_call(model, parameters, (x,)), y)

    gradients = vmap(grad(loss))
    began = time.perf_counter()
    for chosen, orders in zip(federation.participants, federation.orders, strict=True):
        many, _ = stack_module_state([model] * len(chosen))
        many = {key: value.detach() for key, value in many.items()}
        for rows in zip(*(order.split(BATCH) for order in orders), strict=True):
            x = torch.stack([clients[c].x[part] for c, part in zip(chosen, rows, strict=True)])
            y = torch.stack([clients[c].y[part] for c, part in zip(chosen, rows, strict=True)])
            for key, g in gradients(many, x, y).items():
                many[key].sub_(g, alpha=LR)
        model.load_state_dict({key: value.mean(0) for key, value in many.items()})
    return Run(time.perf_counter() - began, federation.accuracy(model))


def flower(federation: Federation, name: str, python: str, folder: Path) -> Run:
    script = Path(__file__).parent / "federated_flower.py"
    environment = {**os.environ, "RAY_DEDUP_LOGS": "0", "FLWR_TELEMETRY_ENABLED": "0"}
    ran = subprocess.run(
        [python, str(script), str(folder), name, str(federation.rounds)],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    if ran.returncode:
        raise RuntimeError(f"Flower's arm ended with {ran.returncode}:\n{ran.stderr[-3000:]}")
    found = json.loads(ran.stdout.splitlines()[-1])
    return Run(found["seconds"], found["accuracy"], found["later"])


def arms(federation: Federation, name: str, python: str | None, folder: Path) -> dict[str, Callable[[], Run]]:
    counts = sorted({1, CORES})
    found: dict[str, Callable[[], Run]] = {
        f"plain, {n} threads": partial(plain, federation, name, n) for n in counts
    }
    found |= {f"stacked, {n} threads": partial(stacked, federation, name, n) for n in counts}
    found |= {f"cograd, {n} workers": partial(cograd, federation, name, n) for n in (0, CORES)}
    if python is not None:
        found["Flower"] = partial(flower, federation, name, python, folder)
    return found


def measure(rounds: int, repeats: int, models: list[str], python: str | None) -> dict[str, dict[str, object]]:
    federation, once = Federation(rounds), Federation(1)
    figures: dict[str, dict[str, object]] = {}
    with tempfile.TemporaryDirectory() as folder:
        if python is not None:
            federation.write(Path(folder))
        for name in models:
            for arm in arms(once, name, None, Path(folder)).values():
                arm()
            timed = arms(federation, name, python, Path(folder))
            runs: dict[str, list[Run]] = {arm: [] for arm in timed}
            for _ in range(repeats):
                for arm, run in timed.items():
                    runs[arm].append(run())
            figures |= {f"{name}: {key}": figure for key, figure in summary(name, runs, federation).items()}
    return figures


def summary(name: str, runs: dict[str, list[Run]], federation: Federation) -> dict[str, dict[str, object]]:
    rate = {arm: [federation.trained / run.seconds for run in ran] for arm, ran in runs.items()}
    after = federation.trained - len(federation.participants[0])
    rate |= {
        f"{arm}, after round 1": [after / run.later for run in ran if run.later is not None]
        for arm, ran in runs.items()
        if ran[0].later is not None
    }
    found: dict[str, dict[str, object]] = {
        f"{arm}, clients/s": {"value": median(values), "bar": None} for arm, values in rate.items()
    }
    fastest = f"cograd, {CORES} workers"
    for other, bar in BARS[name].items():
        matching = [rate[arm] for arm in runs if arm.startswith(other)]
        if matching:
            best = max(matching, key=median)
            ratios = [a / b for a, b in zip(rate[fastest], best, strict=True)]
            found[f"cograd / {other}"] = {"value": median(ratios), "bar": bar, "at least": True}
    accuracies = [run.accuracy for ran in runs.values() for run in ran]
    found["accuracy"] = {"value": median(accuracies), "bar": None}
    apart = max(accuracies) - min(accuracies)
    found["accuracies apart"] = {"value": apart, "bar": SAME, "at least": False}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=list(BARS), default=list(BARS))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--flower", metavar="PYTHON", help="a Python with flwr[simulation] and torch")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    figures = measure(args.rounds, args.repeats, args.models, args.flower)
    if args.json:
        json.dump(figures, sys.stdout, indent=1)
        return
    table = Table("figure", "value", "bar", "", title=f"{CORES} cores", box=None)
    for key, figure in figures.items():
        value, bar, at_least = figure["value"], figure["bar"], figure.get("at least")
        met = "" if bar is None else "met" if (value >= bar) == at_least else "missed"  # type: ignore[operator]
        table.add_row(key, f"{value:.4g}", f"{'>=' if at_least else '<='} {bar:g}" if bar else "", met)
    Console().print(table)


if __name__ == "__main__":
    main()
