"""Functions that clients disagree on, with a known mean: the synthetic tasks of FZooS (arXiv 2308.04077).

Points lie in [0, 1]^d and stand for z = 20 x - 10. Client i has coefficients 1 + C (Dir(1/N, .., 1/N)_i - 1/N)
in each dimension, which average to exactly 1 over the clients: C is how much the clients disagree.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cograd.core.checks import check
from cograd.core.streams import Stream, stream

Function = Callable[[Tensor], Tensor]
"""Values (n,) at points (n, d), float64 and differentiable."""


@dataclass(frozen=True, eq=False)
class Task:
    """One function a client, a start (d,), and the least value of their mean (None where it is not known)."""

    functions: tuple[Function, ...]
    start: Tensor
    least: float | None

    def mean(self, points: Tensor) -> Tensor:
        """The mean of the functions at points (n, d): (n,)."""
        return torch.stack([f(points) for f in self.functions]).mean(0)


def quadratic(dim: int, clients: int, difference: float, seed: int) -> Task:
    """f_i = (0.1 / d) (sum c_i z^2 + sum c'_i z + 1); the mean's least value is -0.025 + 0.1/d, at z = -0.5."""
    draws = _draws(dim, clients, difference, seed)
    squares, slopes = (1 + _disagreement(draws, dim, clients, difference) for _ in range(2))

    def of(a: Tensor, b: Tensor) -> Function:
        return lambda points: 0.1 / dim * (_z(points).square() @ a + _z(points) @ b + 1)

    functions = tuple(of(a, b) for a, b in zip(squares, slopes, strict=True))
    return Task(functions, draws.uniform(dim), -0.025 + 0.1 / dim)


def ackley(dim: int, clients: int, difference: float, seed: int) -> Task:
    """Ackley's function of c_i (z - o_i), with scales c_i about 0.1 and centres o_i about 0."""

    def at(z: Tensor) -> Tensor:
        hill = -20 * torch.exp(-0.2 / math.sqrt(dim) * z.norm(dim=-1))
        return hill - torch.exp(torch.cos(math.pi * z).mean(-1)) + 20 + math.e

    return _shifted(at, dim, clients, difference, seed)


def levy(dim: int, clients: int, difference: float, seed: int) -> Task:
    """Levy's function of c_i (z - o_i), with scales c_i about 0.1 and centres o_i about 0."""

    def at(z: Tensor) -> Tensor:
        w = 1 + (z - 1) / 4
        first, inner, last = w[..., 0], w[..., 1:-1], w[..., -1]
        middle = (inner - 1).square() * (1 + 10 * torch.sin(math.pi * inner + 1).square())
        end = (last - 1).square() * (1 + torch.sin(2 * math.pi * last).square())
        return torch.sin(math.pi * first).square() + middle.sum(-1) + end

    return _shifted(at, dim, clients, difference, seed)


def _shifted(at: Function, dim: int, clients: int, difference: float, seed: int) -> Task:
    draws = _draws(dim, clients, difference, seed)
    scales = 0.1 + _disagreement(draws, dim, clients, difference)
    centres = _disagreement(draws, dim, clients, difference)

    def of(scale: Tensor, centre: Tensor) -> Function:
        return lambda points: at(scale * (_z(points) - centre))

    functions = tuple(of(scale, centre) for scale, centre in zip(scales, centres, strict=True))
    return Task(functions, draws.uniform(dim), None)


def _draws(dim: int, clients: int, difference: float, seed: int) -> Stream:
    check(
        ("dim", dim, ">= 2", dim >= 2),
        ("clients", clients, ">= 1", clients >= 1),
        ("difference", difference, ">= 0", difference >= 0),
    )
    return stream(seed, "synthetic")


def _disagreement(draws: Stream, dim: int, clients: int, difference: float) -> Tensor:
    """C (Dir - 1/N) for each client (N, d): 0 on average."""
    parts = draws.numpy.dirichlet([1 / clients] * clients, size=dim)
    return difference * (torch.from_numpy(parts.T.copy()) - 1 / clients)


def _z(points: Tensor) -> Tensor:
    return 20 * points.double() - 10
