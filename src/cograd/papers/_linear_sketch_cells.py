"""What the cells of the linear sketch's record compute: problems, training runs, attacks, private training."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from cograd import data
from cograd.core.codecs import Context
from cograd.core.streams import seed_for, stream
from cograd.engines.simulate import Simulation
from cograd.machines.baselines.fetchsgd import FetchSGD
from cograd.machines.linear_sketch.federated import SketchedFedAvg
from cograd.machines.linear_sketch.privacy import GaussianDP
from cograd.machines.linear_sketch.sketch import Sketch
from cograd.papers._gradient_matching import match

L2 = 0.01
CLIENTS = 10
TARGET = 0.01
"""Share of the initial gap to the optimum at which a run has arrived."""
DIVERGED = 4.0

WORDS, BAG = 400, 3
"""The spiky problem: vocabulary, and words in a bag."""
NEXT = (",", ".", ":", ";", "the", "and", "to", "i")


# Convex problems: softmax regression with an l2 term.


@dataclass(frozen=True)
class Problem:
    """Softmax regression on x (n, features), y: smoothness L, loss at zero and at the optimum."""

    x: Tensor
    y: Tensor
    classes: int
    smoothness: float
    start: float
    optimum: float

    def model(self) -> nn.Linear:
        model = nn.Linear(self.x.shape[1], self.classes)
        with torch.no_grad():
            model.weight.zero_()
            model.bias.zero_()
        return model

    def clients(self) -> list[tuple[Tensor, Tensor]]:
        """Label-sorted shards of one size: about a class a client."""
        order = self.y.sort(stable=True).indices
        size = len(order) // CLIENTS
        return [(self.x[rows], self.y[rows]) for rows in order[: size * CLIENTS].split(size)]

    @torch.no_grad()
    def gap(self, model: nn.Linear) -> float:
        """What is left of the initial gap to the optimum: 1 at the start."""
        fit = nn.functional.cross_entropy(model(self.x), self.y)
        penalty = L2 / 2 * (model.weight.square().sum() + model.bias.square().sum())
        return (float(fit + penalty) - self.optimum) / (self.start - self.optimum)


@lru_cache
def problem(name: str) -> Problem:
    """``digits``: 1,400 images, 650 parameters. ``words``: the next of 9 classes of words from the 3 before."""
    x, y, classes = _digits() if name == "digits" else _words()
    wide = torch.cat([x, torch.ones(len(x), 1)], 1).double()
    # the Hessian of softmax regression is at most half the second moment of its inputs
    smoothness = float(torch.linalg.eigvalsh(wide.t() @ wide / len(x))[-1]) / 2 + L2
    weights = torch.zeros(classes, wide.shape[1], dtype=torch.float64, requires_grad=True)

    def loss() -> Tensor:
        fit = nn.functional.cross_entropy(wide @ weights.t(), y)
        return fit + L2 / 2 * weights.square().sum()

    optimizer = torch.optim.LBFGS(
        [weights], max_iter=2000, tolerance_grad=1e-10, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(closure)  # type: ignore[arg-type]  # torch wants a float and takes a tensor
    return Problem(x, y, classes, smoothness, math.log(classes), float(loss().detach()))


def _digits() -> tuple[Tensor, Tensor, int]:
    train = data.load("digits", "train")
    return train.x.flatten(1), train.y, 10


def _words() -> tuple[Tensor, Tensor, int]:
    """Counts of the three words before, over the most frequent words (Zipf); the bag's embeddings add up."""
    text = data.load("tiny-shakespeare", "train")
    words = re.findall(r"[a-z']+|[.,:;!?]", "".join(text.vocabulary[t] for t in text.tokens[:60_000]).lower())
    frequent: dict[str, int] = {}
    for word in words:
        frequent[word] = frequent.get(word, 0) + 1
    ranked = sorted(frequent, key=lambda w: (-frequent[w], w))[:WORDS]
    rank = {word: i for i, word in enumerate(ranked)}
    x = torch.zeros(len(words) - BAG, WORDS)
    y = torch.empty(len(words) - BAG, dtype=torch.int64)
    for i in range(BAG, len(words)):
        for word in words[i - BAG : i]:
            if word in rank:
                x[i - BAG, rank[word]] += 1
        y[i - BAG] = NEXT.index(words[i]) if words[i] in NEXT else len(NEXT)
    return x, y, len(NEXT) + 1


def descend(
    system: str, seed: int, problem_name: str, rows: int, step: float, local_steps: int, limit: int, redraw: bool
) -> dict[str, Any]:
    """Run a system until 1 % of the gap is left, it diverged, or ``limit`` rounds: rounds and the gap by round.

    ``step`` is in units of 1/L; of FetchSGD's momentum and k see `FETCH`. ``rounds`` is None if the target was
    not reached. Floats are numbers that a client uploads in a round.
    """
    task = problem(problem_name)
    lr = step / task.smoothness
    model, advance, floats = _system(task, system, seed, rows, lr, local_steps, redraw)
    gaps = [1.0]
    while gaps[-1] > TARGET and len(gaps) <= limit:
        advance()
        gaps.append(task.gap(model))
        if not gaps[-1] < DIVERGED:
            break
    arrived = gaps[-1] <= TARGET
    return {
        "rounds": len(gaps) - 1 if arrived else None,
        "floats": floats,
        "gaps": [g if math.isfinite(g) else None for g in _thinned(gaps)],
        "last": gaps[-1] if math.isfinite(gaps[-1]) else None,
    }


def _system(
    task: Problem, system: str, seed: int, rows: int, lr: float, local_steps: int, redraw: bool
) -> tuple[nn.Linear, Callable[[], object], int]:
    """A model, what advances it by a round, and the numbers a client sends in one."""
    model = task.model()
    numel = sum(p.numel() for p in model.parameters())
    if system == "fetchsgd":
        return _fetch(task, model, seed, rows, lr)
    sketch = None if system == "dense" else Sketch(numel, rows, system, seed=seed)
    if sketch is not None and not redraw:
        sketch = _Frozen(numel, rows, system, seed=seed)
    federated = SketchedFedAvg(
        model,
        task.clients(),
        nn.functional.cross_entropy,
        sketch=sketch,
        lr=lr,
        local_steps=local_steps,
        weight_decay=L2,
    )
    return model, federated.round, numel if sketch is None else sketch.rows


class _Frozen(Sketch):
    """The ablation: R_0 for ever."""

    def _use(self, vector: Tensor, round: int, transposed: bool) -> Tensor:
        return super()._use(vector, 0, transposed)


FETCH_TABLES = 5
FETCH = {"k": (6, 32), "momentum": (0.0, 0.9)}


def _fetch(
    task: Problem, model: nn.Linear, seed: int, rows: int, lr: float
) -> tuple[nn.Linear, Callable[[], object], int]:
    """FetchSGD's tables are linear too, so one worker with all clients' examples stands for their sum."""
    raise NotImplementedError


def _thinned(gaps: Sequence[float], points: int = 200) -> list[float]:
    return list(gaps)
