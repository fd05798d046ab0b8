"""Optimizers of local steps: fresh at the start of every round, plain functions of point and gradient."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from cograd.core.checks import check

Step = Callable[[Tensor, Tensor], Tensor]
"""``step(x, g)``: the next point."""


class LocalOptimizer(Protocol):
    """``start()`` gives the steps of one round, which share their state."""

    def start(self) -> Step: ...


@dataclass(frozen=True)
class Adam:
    """Adam (arXiv 1412.6980) with bias correction, as `torch.optim.Adam`."""

    lr: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def __post_init__(self) -> None:
        check(
            ("lr", self.lr, "> 0 and finite", 0 < self.lr < math.inf),
            ("betas", self.betas, "two numbers in [0, 1)", all(0 <= beta < 1 for beta in self.betas)),
            ("eps", self.eps, "> 0", self.eps > 0),
        )

    def start(self) -> Step:
        (first, second), t = self.betas, 0
        m = v = torch.zeros(())

        def step(x: Tensor, g: Tensor) -> Tensor:
            nonlocal t, m, v
            t += 1
            m = first * m + (1 - first) * g
            v = second * v + (1 - second) * g * g
            return x - self.lr / (1 - first**t) * m / ((v / (1 - second**t)).sqrt() + self.eps)

        return step


@dataclass(frozen=True)
class SGD:
    """x - lr g."""

    lr: float = 0.01

    def __post_init__(self) -> None:
        check(("lr", self.lr, "> 0 and finite", 0 < self.lr < math.inf))

    def start(self) -> Step:
        return lambda x, g: x - self.lr * g
