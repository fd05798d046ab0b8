"""The runs of FZooS's paper: synthetic functions, a black-box attack, and a metric with no derivative."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cograd import data
from cograd.clients.baselines.fedzo import FedZO, FiniteDifferences
from cograd.clients.baselines.zo_fedprox import ZOFedProx
from cograd.clients.baselines.zo_scaffold import ZOScaffold
from cograd.clients.fzoos import Adam, BlackBox, FZooS, LocalGradient, Oracle, RandomFeatures, ZerothOrder
from cograd.core.streams import seed_for, stream
from cograd.core.threads import one_thread
from cograd.engines.federated.simulation import Simulation
from cograd.models.mlp import MLP
from cograd.papers._fzoos_synthetic import Function, Task, quadratic

if TYPE_CHECKING:
    from cograd.papers._lab import Cell, Record, Report

WORKERS = 2
CLIENTS, FEATURES, DIRECTIONS = 5, 2000, 20
CLASSES = 5
"""Classes that a client of the real tasks has seen, of 10: the portion 0.5."""

FZOOS, FIXED, PLAIN = "FZooS", "FZooS, correction of length 1", "GP gradient, no correction"
ZO, PRGF, SCAFFOLD_1, SCAFFOLD_2 = "FedZO", "FedZO, PRGF", "SCAFFOLD-I", "SCAFFOLD-II"
PROX, PROX_LIGHT = "FedProx, weight 1", "FedProx, weight 0.01"
DIFFERENCES = (ZO, PRGF, SCAFFOLD_1, SCAFFOLD_2, PROX, PROX_LIGHT)


def method(system: str, lr: float, *, features: int = FEATURES, **options: Any) -> ZerothOrder:
    """A system with its local step."""
    shared, options = RandomFeatures(features), {"optimizer": Adam(lr), **options}
    made: Mapping[str, Callable[[], ZerothOrder]] = {
        FZOOS: lambda: FZooS(description=shared, **options),
        FIXED: lambda: FZooS(description=shared, decay=0.0, **options),
        PLAIN: lambda: FZooS(description=None, **options),
        ZO: lambda: FedZO(FiniteDifferences(DIRECTIONS), **options),
        PRGF: lambda: FedZO(FiniteDifferences(DIRECTIONS, kind="prgf"), **options),
        SCAFFOLD_1: lambda: ZOScaffold(FiniteDifferences(DIRECTIONS), kind=1, **options),
        SCAFFOLD_2: lambda: ZOScaffold(FiniteDifferences(DIRECTIONS), kind=2, **options),
        PROX: lambda: ZOFedProx(FiniteDifferences(DIRECTIONS), prox=1.0, **options),
        PROX_LIGHT: lambda: ZOFedProx(FiniteDifferences(DIRECTIONS), prox=0.01, **options),
    }
    return made[system]()


# Synthetic functions


@dataclass(frozen=True)
class Watched(LocalGradient):
    """Another's gradients; reports their mean cosine with the true ones, which the client does not see."""

    inner: LocalGradient
    steps: int

    def estimate(self, x: Tensor, t: int, oracle: Oracle) -> Tensor:
        g = self.inner.estimate(x, t, oracle)
        if t:
            there = x.double().requires_grad_()
            (true,) = torch.autograd.grad(oracle.function.function(there[None])[0], there)  # type: ignore[attr-defined]
            found = float(nn.functional.cosine_similarity(g, true, dim=0))
            oracle.ctx.report("cosine", oracle.ctx.reports.get("cosine", 0.0) + found / self.steps)
        return g

    def finish(self, x: Tensor, oracle: Oracle) -> None:
        self.inner.finish(x, oracle)

    def survey(self, x: Tensor, spread: float, oracle: Oracle) -> None:
        self.inner.survey(x, spread, oracle)


def synthetic(cell: Cell, report: Report) -> Record:
    """One system on one quadratic: the gap to the least value after every round, and what it cost."""
    task = quadratic(cell["dim"], CLIENTS, cell["difference"], cell["seed"])
    assert task.least is not None
    system = method(
        cell["system"], cell["lr"], features=cell["features"], local_steps=cell["steps"], safeguard=True
    )
    system = replaced(system, Watched(system.gradient, cell["steps"]))
    record: Record = {"gap": [], "cosine": [], "queries": [], "up": [], "down": []}
    with simulation(system, task, cell["seed"]) as sim:
        for row in sim.rounds(cell["rounds"]):
            report(f"round {row.round}/{cell['rounds']}")
            record["gap"].append(float(task.mean(sim.server["x"][None])) - task.least)
            record["cosine"].append(row.reports["cosine"])
            record["queries"].append(row.work["query"] / CLIENTS)
            record["up"].append(row.up)
            record["down"].append(row.down)
    return record


def replaced(system: ZerothOrder, gradient: LocalGradient) -> ZerothOrder:
    """The system with another local gradient."""
    if isinstance(system, ZOScaffold):
        system.gradient = gradient
        return system
    return replace(system, gradient=gradient)


def simulation(system: ZerothOrder, task: Task, seed: int) -> Simulation:
    """A system on a task; start and functions depend on the task alone, so that systems are paired."""
    clients = [BlackBox(f, batched=True) for f in task.functions]
    return Simulation(system, task.start, None, clients, seed=seed, workers=WORKERS)


# Attack: five classifiers, each of which has seen five of the ten classes


def seen_by(client: int) -> list[int]:
    """The classes of a client; every class is seen by some clients and not by others."""
    return [(2 * client + k) % 10 for k in range(CLASSES)]


@lru_cache(2)
def _pooled(size: int) -> tuple[data.Images, data.Images]:
    """MNIST-5k at another size, for training and for test."""
    parts = []
    for split in ("train", "test"):
        images = data.load("mnist-5k", split)
        assert isinstance(images, data.Images)
        parts.append(replace(images, x=nn.functional.adaptive_avg_pool2d(images.x, size)))
    return parts[0], parts[1]


def _fit(model: nn.Module, x: Tensor, y: Tensor, steps: int, seed: int) -> None:
    """A few steps of Adam in minibatches of 64."""
    opt, draws = torch.optim.Adam(model.parameters(), lr=3e-3), stream(seed, "training")
    for _ in range(steps):
        rows = draws.permutation(len(y))[:64]
        opt.zero_grad()
        nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
        opt.step()


@lru_cache(2)
def classifiers(seed: int, steps: int = 300) -> list[MLP]:
    """The five models under attack, 196-64-10."""
    train, _ = _pooled(14)
    found = []
    with one_thread():
        for client in range(CLIENTS):
            mine = torch.isin(train.y, torch.tensor(seen_by(client)))
            torch.manual_seed(seed_for(seed, "classifier", client))
            found.append(MLP(196, 64, 10))
            _fit(found[-1], train.x[mine], train.y[mine], steps, seed_for(seed, client))
    return found


def margin(model: nn.Module, image: Tensor, label: int, radius: float) -> Function:
    """By how much the label's logit leads at perturbed images; x in [0, 1] stands for -radius .. radius."""

    @torch.no_grad()
    def of(points: Tensor) -> Tensor:
        changed = (image + radius * (2 * points.float() - 1)).clamp(0, 1)
        logits = model(changed)
        others = logits.clone()
        others[:, label] = -math.inf
        lead: Tensor = logits[:, label] - others.amax(1)
        return lead.double()

    return of


def attacks(seed: int, count: int, radius: float) -> list[Task]:
    """Images of the test set on whose label the five classifiers' mean margin is positive."""
    models, (_, test) = classifiers(seed), _pooled(14)
    found: list[Task] = []
    start = torch.full((196,), 0.5)  # no perturbation
    for row in stream(seed, "images").permutation(len(test.y)).tolist():
        image, label = test.x[row].reshape(-1), int(test.y[row])
        task = Task(tuple(margin(model, image, label, radius) for model in models), start, None)
        if float(task.mean(start[None])) > 0:
            found.append(task)
        if len(found) == count:
            break
    return found


def attack(cell: Cell, report: Report) -> Record:
    """One system on some images: what a client had been asked when the mean margin fell below 0, or None."""
    record: Record = {"queries": [], "margin": []}
    for number, task in enumerate(attacks(cell["seed"], cell["images"], cell["radius"])):
        report(f"image {number + 1}/{cell['images']}")
        system = method(cell["system"], cell["lr"], local_steps=5)
        needed = None
        with simulation(system, task, cell["seed"]) as sim:
            while needed is None and (row := sim.advance()) is not None:
                asked, left = row.work["query"] / CLIENTS, float(task.mean(sim.server["x"][None]))
                if asked > cell["budget"]:
                    break
                if left < 0:
                    needed = asked
        record["queries"].append(needed)
        record["margin"].append(left)
    return record


# Metric: 1 - macro-F1 of a small classifier, as a function of its parameters


def macro_f1(predicted: Tensor, y: Tensor, classes: Sequence[int]) -> Tensor:
    """Macro-F1 over ``classes`` of predictions (n, m) for targets (m,): (n,), float64."""
    scores = []
    for label in classes:
        mine, right = predicted == label, y == label
        hit = (mine & right).sum(1).double()
        scores.append(2 * hit / (mine.sum(1) + right.sum()).clamp_min(1))
    return torch.stack(scores).mean(0)


def metric_task(seed: int, radius: float, steps: int = 60) -> Task:
    """A 49-5-10 network after a short training, and clients that see five classes each: d = 310."""
    train, _ = _pooled(7)
    x = train.x.flatten(1)
    torch.manual_seed(seed_for(seed, "network"))
    with one_thread():
        network = MLP(49, 5, 10)
        _fit(network, x, train.y, steps, seed_for(seed, "network"))
    base = nn.utils.parameters_to_vector(network.parameters()).detach()

    def of(mine: Tensor, y: Tensor, classes: Sequence[int]) -> Function:
        def score(points: Tensor) -> Tensor:
            p = base + radius * (2 * points.float() - 1)
            w, b, v, c = p.split([245, 5, 50, 10], dim=1)
            hidden = torch.baddbmm(b[:, None], mine.expand(len(p), -1, -1), w.view(-1, 5, 49).mT).relu_()
            logits = torch.baddbmm(c[:, None], hidden, v.view(-1, 10, 5).mT)
            return 1 - macro_f1(logits.argmax(-1), y, classes)

        return score

    functions = []
    order = stream(seed, "clients").permutation(len(train.y))
    for client in range(CLIENTS):
        classes = seen_by(client)
        rows = order[client::CLIENTS]
        rows = rows[torch.isin(train.y[rows], torch.tensor(classes))]
        functions.append(of(x[rows], train.y[rows], classes))
    return Task(tuple(functions), torch.full((310,), 0.5), None)


def metric(cell: Cell, report: Report) -> Record:
    """One system on the metric: the mean of 1 - macro-F1 after every round, and what it cost."""
    task = metric_task(cell["seed"], cell["radius"])
    record: Record = {"error": [float(task.mean(task.start[None]))], "queries": [0.0], "up": [0], "down": [0]}
    with simulation(method(cell["system"], cell["lr"]), task, cell["seed"]) as sim:
        while (row := sim.advance()) is not None and row.work["query"] / CLIENTS <= cell["budget"]:
            report(f"round {row.round}")
            record["error"].append(float(task.mean(sim.server["x"][None])))
            record["queries"].append(row.work["query"] / CLIENTS)
            record["up"].append(row.up)
            record["down"].append(row.down)
    return record
