"""What the cells of the linear sketch's record compute: problems, training runs, attacks, private training."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
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
from cograd.papers._gradient_matching import cosine, match, squared

L2 = 0.01
CLIENTS = 10
DIVERGED = 4.0
"""Gap, over that at the start, at which a run is given up."""

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

    optimizer.step(closure)
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
    system: str,
    seed: int,
    problem_name: str,
    rows: int,
    step: float,
    local_steps: int,
    limit: int,
    target: float,
    redraw: bool,
    fetch: Mapping[str, Any],
) -> dict[str, Any]:
    """Run a system until the share ``target`` of the gap is left, it diverged, or ``limit`` rounds.

    ``system`` is ``dense``, ``fetchsgd`` (with ``fetch`` as its arguments) or a sketch's kind; ``step`` is in
    units of 1/L. ``rounds`` is None if the target was not reached, ``floats`` what a client uploads in a round,
    ``gaps`` the share of the gap that is left after 0, 1, ... rounds.
    """
    task = problem(problem_name)
    lr = step / task.smoothness
    model = task.model()
    numel = sum(p.numel() for p in model.parameters())
    if system == "fetchsgd":
        advance = _fetch(task, model, seed, rows, lr, **fetch)
    else:
        kind = Sketch if redraw else _Frozen
        sketch = None if system == "dense" else kind(numel, rows, system, seed=seed)
        advance = SketchedFedAvg(
            model,
            task.clients(),
            nn.functional.cross_entropy,
            sketch=sketch,
            lr=lr,
            local_steps=local_steps,
            weight_decay=L2,
        ).round
    gaps = [1.0]
    while gaps[-1] > target and len(gaps) <= limit and gaps[-1] < DIVERGED:
        advance()
        gaps.append(min(task.gap(model), 1e9))
    return {
        "rounds": len(gaps) - 1 if gaps[-1] <= target else None,
        "floats": numel if system == "dense" else rows,
        "gaps": [float(f"{gap:.4g}") for gap in gaps],
    }


class _Frozen(Sketch):
    """The ablation: R_0 for ever."""

    def _use(self, vector: Tensor, round: int, transposed: bool) -> Tensor:
        return super()._use(vector, 0, transposed)


def _fetch(
    task: Problem, model: nn.Linear, seed: int, rows: int, lr: float, tables: int, **options: Any
) -> Callable[[], object]:
    """Its tables add up too: one worker with the examples of all clients stands for their sum."""
    inputs, targets = (torch.cat(parts) for parts in zip(*task.clients(), strict=True))
    exchange = FetchSGD(rows // tables, tables=tables, seed=seed, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, weight_decay=L2)
    simulation = Simulation(model, optimizer, [exchange])

    def loss(batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    return lambda: simulation.step(loss, [(inputs, targets)])


# The attack.


ATTACKED_LR = 0.1
"""Of the victim's local steps; what it sends after one of them only scales with it."""


def attack(
    seed: int,
    rows: int | None,
    noise: float,
    restarts: int,
    local_steps: int = 1,
    desketched: bool = False,
    label_known: bool = True,
) -> dict[str, Any]:
    """Recover a digit from the sketched update of an MLP 64-64-10 (4,810 parameters), R Gaussian.

    The update is that of ``local_steps`` on one image; one of them is its gradient. ``rows`` None is the update
    itself. ``noise`` is the noise's norm over that of what was sent. What is matched is the sketch by squared
    distance, or, ``desketched``, R^T times it by cosine: what a defender audits who sees the aggregate. Returns
    the mean squared error of the recovered image, whether the label is right, and the data's variance.
    """
    torch.manual_seed(seed_for(seed, "attack"))
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10)).double()
    train = data.load("digits", "train")
    images = train.x.flatten(1).double()
    one = stream(seed, "attack", "victim").integer(len(images))
    x, y = images[one : one + 1], train.y[one : one + 1]
    plain = SketchedFedAvg(
        model, [(x, y)], nn.functional.cross_entropy, sketch=None, lr=ATTACKED_LR, local_steps=local_steps
    )
    params = {name: p.detach() for name, p in model.named_parameters()}
    matrix = None
    if rows is not None:  # drawn once, since an attack uses one R hundreds of times
        sketch = Sketch(plain.space.numel, rows, "gaussian", seed=seed)
        matrix = sketch.T(torch.eye(rows, dtype=torch.float64), round=0)

    def observe(guess: Tensor, label: Tensor = y) -> Tensor:
        update = plain.observable(params, (guess, label), Context(seed))["sketch"]
        return update if matrix is None else matrix @ update

    def decoded(sent: Tensor) -> Tensor:
        return sent if matrix is None or not desketched else matrix.t() @ sent

    seen = observe(x).detach()
    if noise:
        direction = stream(seed, "attack", "noise").normal(len(seen)).double()
        seen = seen + noise * seen.norm() * direction / direction.norm()
    guess = match(
        lambda *unknown: decoded(observe(*unknown)),
        decoded(seen),
        (1, 64),
        seed=seed,
        classes=None if label_known else 10,
        distance=cosine if desketched else squared,
        restarts=restarts,
    )
    return {
        "mse": float((guess.x - x).square().mean()),
        "distance": guess.distance,
        "label": guess.labels is None or bool((guess.labels.argmax(1) == y).all()),
        "variance": float(images.var(0, correction=0).mean()),
    }


# Private training.

TEST = 114
PRIVATE_CLIENTS, PRIVATE_ROUNDS, CLIP, DELTA = 5, 60, 1.0, 1e-4


def private(
    system: str, seed: int, epsilon: float | None, rows: int, lr: float, noise_in: str
) -> dict[str, Any]:
    """Logistic regression on breast-cancer, 5 clients, 60 full-batch rounds: test accuracy in percent.

    ``epsilon`` (None: no noise) at delta 1e-4 for each client's examples; gradients are clipped at 1 always.
    """
    table = data.load("breast-cancer", "all")
    order = stream(seed, "breast-cancer", "split").permutation(len(table.y))
    train, test = order[TEST:], order[:TEST]
    clients = [(table.x[part], table.y[part]) for part in train.split(len(train) // PRIVATE_CLIENTS)]
    model = nn.Linear(table.x.shape[1], 1)
    with torch.no_grad():
        model.weight.zero_()
        model.bias.zero_()
    numel = sum(p.numel() for p in model.parameters())
    privacy = _privacy(math.inf if epsilon is None else epsilon, noise_in)
    federated = SketchedFedAvg(
        model,
        clients,
        lambda out, y: nn.functional.binary_cross_entropy_with_logits(out[..., 0], y.to(out.dtype)),
        sketch=None if system == "dense" else Sketch(numel, rows, system, seed=seed),
        lr=lr,
        privacy=privacy,
        noise_key=seed,
    )
    for _ in range(PRIVATE_ROUNDS):
        federated.round()
    with torch.no_grad():
        right = (model(table.x[test])[:, 0] > 0).long() == table.y[test]
    spent = federated.epsilon
    return {
        "accuracy": 100 * float(right.float().mean()),
        "epsilon": spent if math.isfinite(spent) else None,
        "noise": privacy.noise_multiplier,
    }


def _privacy(epsilon: float, noise_in: str) -> GaussianDP:
    where: Any = noise_in
    return GaussianDP(CLIP, _noise(epsilon), DELTA, noise_in=where)


@lru_cache
def _noise(epsilon: float) -> float:
    return GaussianDP.for_epsilon(epsilon, PRIVATE_ROUNDS, clip=CLIP, delta=DELTA).noise_multiplier
