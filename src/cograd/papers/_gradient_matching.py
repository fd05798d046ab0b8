"""A minimal gradient-matching attack: recover an input from what was shared of its gradient.

The attacker knows the weights, R, the label and y = R grad l(w; x*), and minimises ||R grad l(w; x) - y||^2
over x from random starts, by gradients through the gradient.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cograd.core.streams import stream


def match(
    observe: Callable[[Tensor], Tensor],
    seen: Tensor,
    shape: tuple[int, ...],
    *,
    seed: int,
    restarts: int = 2,
    steps: int = 400,
) -> tuple[Tensor, float]:
    """The input (``shape``) whose observation comes closest to ``seen``, and that relative squared distance.

    ``observe`` is what is shared of an input, differentiable twice. Each restart is one run of L-BFGS with a
    strong Wolfe line search, of ``steps`` iterations at most, from N(0.5, 0.1^2) noise.
    """
    size = float(seen.square().sum())

    def distance(x: Tensor) -> Tensor:
        return (observe(x) - seen).square().sum() / size

    found = []
    for restart in range(restarts):
        start = (0.5 + 0.1 * stream(seed, "attack", restart).normal(*shape)).to(seen.dtype)
        x = _minimised(distance, start.requires_grad_(), steps)
        found.append((float(distance(x).detach()), x.detach()))
    best, guess = min(found, key=lambda pair: pair[0])
    return guess, best


def _minimised(function: Callable[[Tensor], Tensor], x: Tensor, steps: int) -> Tensor:
    optimizer = torch.optim.LBFGS(
        [x],
        max_iter=steps,
        history_size=50,
        tolerance_grad=1e-14,
        tolerance_change=1e-18,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = function(x)
        value.backward()
        return value

    optimizer.step(closure)
    return x
