"""A minimal gradient-matching attack: recover an input from what was shared of its gradient.

The attacker knows the weights, R and y = R grad l(w; x*), and minimises ||R grad l(w; x) - y||^2 over x from
random starts, by gradients through the gradient. The label is known, or optimised too. What is matched may as
well be a de-sketch R^T y in the space of gradients, by its direction; or the update of several local steps,
through which the gradients then go.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cograd.core.streams import stream

Distance = Callable[[Tensor, Tensor], Tensor]
"""Of an observation from what was seen: zero where they match."""


def squared(observed: Tensor, seen: Tensor) -> Tensor:
    return (observed - seen).square().sum() / seen.square().sum()


def cosine(observed: Tensor, seen: Tensor) -> Tensor:
    """One minus the cosine, as half the squared distance of directions, which loses no digits near a match."""
    between: Tensor = observed / observed.norm() - seen / seen.norm()
    return between.square().sum() / 2


@dataclass(frozen=True)
class Guess:
    """What the attack found: inputs, their distance, and the labels' probabilities unless they were known."""

    x: Tensor
    distance: float
    labels: Tensor | None = None


def match(
    observe: Callable[..., Tensor],
    seen: Tensor,
    shape: tuple[int, ...],
    *,
    seed: int,
    classes: int | None = None,
    distance: Distance = squared,
    restarts: int = 2,
    steps: int = 400,
) -> Guess:
    """The input (``shape``, examples first) whose observation comes closest to ``seen``.

    ``observe`` is what is shared of an input, differentiable twice; with ``classes``, of an input and of the
    probabilities (examples, classes) of its labels, which are then unknown too. Each restart is one run of
    L-BFGS with a strong Wolfe line search, of ``steps`` iterations at most, from N(0.5, 0.1^2) noise and labels
    of about equal probability.
    """
    found = []
    for restart in range(restarts):
        draws = stream(seed, "attack", restart)
        unknown = [(0.5 + 0.1 * draws.normal(*shape)).to(seen.dtype)]
        if classes is not None:
            unknown.append(0.1 * draws.normal(shape[0], classes).to(seen.dtype))

        def value(x: Tensor, *logits: Tensor) -> Tensor:
            return distance(observe(x, *(part.softmax(-1) for part in logits)), seen)

        last = _minimised(value, unknown, steps)
        x, *labels = (part.detach() for part in unknown)
        found.append(Guess(x, last, labels[0].softmax(-1) if labels else None))
    return min(found, key=lambda guess: guess.distance)


def _minimised(function: Callable[..., Tensor], unknown: Sequence[Tensor], steps: int) -> float:
    """Minimise over ``unknown``, in place; returns the last value."""
    for part in unknown:
        part.requires_grad_()
    optimizer = torch.optim.LBFGS(
        unknown,
        max_iter=steps,
        history_size=50,
        tolerance_grad=1e-14,
        tolerance_change=1e-18,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = function(*unknown)
        value.backward()
        return value

    optimizer.step(closure)
    return float(function(*unknown).detach())
