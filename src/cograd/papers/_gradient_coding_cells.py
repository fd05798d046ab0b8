"""What a cell of the gradient-coding paper computes: a choice of parameters, a run of the clock, a training."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from cograd import data
from cograd.core.streams import seed_for
from cograd.data.partition import batches
from cograd.machines.baselines.drop_slowest import DropSlowest
from cograd.machines.gradient_coding.choice import select
from cograd.machines.gradient_coding.clock import GilbertElliott, Trace, Wait, run_clock
from cograd.machines.gradient_coding.clusters import SimulatedCluster
from cograd.machines.gradient_coding.learners import Learner
from cograd.machines.gradient_coding.schemes import Scheme, scheme_of
from cograd.machines.gradient_coding.training import GradientCoding
from cograd.models.mlp import MLP

if TYPE_CHECKING:
    from cograd.papers._lab import Cell, Record, Report

UNCODED, PLAIN, REPEATED, METHOD = "uncoded", "GC", "SR-SGC", "M-SGC"
EITHER, GC_REP, M_REP, DROP = (
    "M-SGC, either model",
    "GC, repetition",
    "M-SGC, repetition",
    "drop the slowest 5 %",
)
FAMILY = {
    UNCODED: "uncoded",
    PLAIN: "gc",
    GC_REP: "gc-rep",
    REPEATED: "sr-sgc",
    METHOD: "m-sgc-bursty",
    EITHER: "m-sgc",
    M_REP: "m-sgc-rep",
}

MODELS, BATCH = 4, 512
PROBE = 80

# The round protocol and the delays of each setting: mu, when a wait is over, the share of time that a worker
# straggles, and the probability that it goes on straggling.
SETTINGS: Mapping[str, tuple[float, Wait, float, float]] = {
    "standard": (1.0, "conforming", GilbertElliott().straggling, GilbertElliott().stay),
    "480 jobs": (1.0, "conforming", GilbertElliott().straggling, GilbertElliott().stay),
    "wait for all": (1.0, "all", GilbertElliott().straggling, GilbertElliott().stay),
    "impatient": (0.0, "conforming", GilbertElliott().straggling, GilbertElliott().stay),
    "bursts": (1.0, "conforming", GilbertElliott().straggling, 0.6),
    "training": (1.0, "conforming", 0.12, GilbertElliott().stay),
}


def delays(setting: str, rounds: int, n: int, seed: int) -> Trace:
    """Delays of a seed."""
    _, _, share, stay = SETTINGS[setting]
    return GilbertElliott(share * (1 - stay) / (1 - share), stay).trace(rounds, n, seed)


def choose(cell: Cell) -> Record:
    """The parameters of one scheme with the least time on the probe."""
    mu, wait, _, _ = SETTINGS[cell["setting"]]
    trace = delays(cell["setting"], PROBE, cell["n"], cell["seed"])
    choice = select(trace, cell["alpha"], MODELS - 1, (FAMILY[cell["system"]],), mu=mu, wait=wait)
    return {"scheme": [type(choice.scheme).__name__, choice.scheme.arguments], "probe": choice.seconds}


def clock(cell: Cell) -> Record:
    """Seconds of all jobs, the share of rounds that were waited out and the share of stragglers."""
    mu, wait, _, _ = SETTINGS[cell["setting"]]
    scheme = made(cell)
    mu = 0.0 if isinstance(scheme, DropSlowest) else mu
    trace = delays(cell["setting"], cell["jobs"] + MODELS - 1, cell["n"], cell["seed"])
    timeline = run_clock(scheme, trace.at(scheme.load, cell["alpha"]), cell["jobs"], mu, wait)
    assert timeline is not None
    waited = timeline.waits / len(timeline.seconds)
    return {
        "seconds_of_jobs": timeline.total,
        "waited": waited,
        "straggling": float(timeline.stragglers.mean()),
    }


def made(cell: Cell) -> Scheme:
    """The scheme of a cell."""
    if cell["scheme"] is None:
        return DropSlowest(cell["n"], -(-cell["n"] // 20))
    name, arguments = cell["scheme"]
    return scheme_of(name, arguments)


def train(cell: Cell, report: Report) -> Record:
    """Train four models on simulated workers; how far gradients, weights and losses are from plain training."""
    scheme, jobs = made(cell), cell["jobs"]
    trace = delays("training", jobs + MODELS, scheme.n, cell["seed"])
    mu = 0.0 if isinstance(scheme, DropSlowest) else 1.0
    cluster = SimulatedCluster(trace, cell["alpha"], mu)
    students, plain = learners(cell["seed"]), learners(cell["seed"])
    errors: list[float] = []

    def compare(job: int, total: Tensor) -> None:
        """With the gradient of the whole batch at the same weights."""
        whole = _gradient(students[job % MODELS], job // MODELS)
        errors.append(float((total - whole).abs().max() / whole.abs().max()))

    run = GradientCoding(students, scheme, cluster, on_gradient=compare)
    run.start(jobs // MODELS)
    losses, seconds = [0.0] * jobs, [0.0] * jobs
    while not run.done:
        for job in run.step():
            losses[job], seconds[job] = _loss(students[job % MODELS].model), run.wall_clock
        report(f"round {run.round} of {scheme.rounds}")
    plain_losses = [_plain_step(plain[job % MODELS], job // MODELS) for job in range(jobs)]
    timeline = run_clock(made(cell), trace.at(scheme.load, cell["alpha"]), jobs, mu)
    assert timeline is not None
    uploads = [e.payload / run.bench.numel / 8 for e in run.ledger if e.sender == 0 and e.round == jobs // 2]
    return {
        "gradient_error": max(errors),
        "mean_gradient_error": float(np.mean(errors)),
        "weight_error": max(map(_distance, students, plain)),
        "loss_error": max(abs(a - b) for a, b in zip(losses, plain_losses, strict=True)),
        "losses": [float(np.mean(losses[k : k + MODELS])) for k in range(0, jobs, MODELS)],
        "times": [float(np.max(seconds[k : k + MODELS])) for k in range(0, jobs, MODELS)],
        "accuracy": float(np.mean([_accuracy(student.model) for student in students])),
        "wall_clock": run.wall_clock,
        "vectors": uploads[0],
        "load": run.max_load,
        "nominal_load": scheme.load,
        "nominal_vectors": scheme.vectors,
        "straggling": float(timeline.stragglers.mean()),
    }


@cache
def images(split: str) -> tuple[Tensor, Tensor]:
    """MNIST-5k in float64, and its labels."""
    loaded = data.load("mnist-5k", split)
    return loaded.x.double(), loaded.y


def learners(seed: int) -> list[Learner]:
    """Four MLPs with initial weights and batches of their own."""
    x, y = images("train")

    def loss(model: nn.Module, rows: Tensor) -> Tensor:
        return nn.functional.cross_entropy(model(x[rows]), y[rows], reduction="sum")

    def batch(index: int, step: int) -> Tensor:
        each = len(y) // BATCH
        return list(batches(len(y), BATCH, seed_for(seed, "batches", index), step // each))[step % each]

    students = []
    for index in range(MODELS):
        torch.manual_seed(seed_for(seed, "init", index))
        model = MLP(784, 32, 10).double()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        students.append(Learner(model, optimizer, loss, lambda step, index=index: batch(index, step)))  # type: ignore[misc]
    return students


def _gradient(learner: Learner, step: int) -> Tensor:
    loss = learner.loss(learner.model, learner.batch(step))
    return nn.utils.parameters_to_vector(torch.autograd.grad(loss, list(learner.model.parameters())))


def _plain_step(learner: Learner, step: int) -> float:
    """One step without cluster or code; the loss after it."""
    rows = learner.batch(step)
    learner.optimizer.zero_grad()
    (learner.loss(learner.model, rows) / len(rows)).backward()
    learner.optimizer.step()
    return _loss(learner.model)


@torch.no_grad()
def _loss(model: nn.Module) -> float:
    """Mean cross-entropy on the first 500 training images."""
    x, y = images("train")
    return float(nn.functional.cross_entropy(model(x[:500]), y[:500]))


@torch.no_grad()
def _accuracy(model: nn.Module) -> float:
    x, y = images("test")
    return 100 * float((model(x).argmax(1) == y).double().mean())


def _distance(a: Learner, b: Learner) -> float:
    pairs = zip(a.model.parameters(), b.model.parameters(), strict=True)
    return max(float((p - q).detach().abs().max()) for p, q in pairs)


def compute(cell: Cell, report: Report) -> Record:
    if cell["what"] == "choice":
        return choose(cell)
    return clock(cell) if cell["what"] == "clock" else train(cell, report)
