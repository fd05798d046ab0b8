"""Shared directions, and the two halves of a step in functions: measure along one, move along all.

A direction is z(t, m, s) in R^d with standard normal entries: iteration t, machine m, sample s. Each tensor's
share is drawn whole, in float32, from a stream of its own, keyed by (seed, t, m, s, name of the tensor). So
what a tensor gets depends on no other tensor: not on which are frozen, nor on the order they are visited in.

Every product is rounded before it is added, which a fused multiply-add would not do; thus the same bits come
out of any instruction set and device.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from cograd.core.streams import stream

Tensors: TypeAlias = Mapping[str, Tensor]

PARALLEL_FROM = 100_000
"""Elements from which on the draws are worth starting threads for."""


class Direction(NamedTuple):
    """Which direction: z is a pure function of these."""

    seed: int
    iteration: int
    machine: int
    sample: int

    def key(self, what: str) -> tuple[int | str, ...]:
        return (self.seed, "one-byte", self.iteration, self.machine, self.sample, what)

    def fill(self, name: str, out: Tensor) -> None:
        """Draw the share of tensor ``name`` into ``out`` (float32 on the CPU, contiguous)."""
        # fills in place what Stream.normal would allocate
        stream(*self.key(name)).numpy.standard_normal(dtype=np.float32, out=out.view(-1).numpy())

    def scale_draw(self) -> float:
        """xi, the direction's share of the learned perturbation scale."""
        return float(stream(*self.key("/perturbation scale")).normal(1))


class Workspace:
    """Buffers for the directions of some tensors, and, once a loss is measured, for perturbed copies of them.

    4 bytes an element of the parameters and 4 more for the copies; of float64 parameters twice that.
    """

    def __init__(self, params: Tensors) -> None:
        self.steps = {n: torch.empty_like(p, memory_format=torch.contiguous_format) for n, p in params.items()}
        others = [p.numel() for p in params.values() if not _drawn_in_place(p)]
        self._drawn = torch.empty(max(others, default=0), dtype=torch.float32)

    @cached_property
    def copies(self) -> dict[str, Tensor]:
        """Room for one perturbed copy of every tensor."""
        return {name: torch.empty_like(step) for name, step in self.steps.items()}

    def each(self, do: Callable[[str], None]) -> None:
        """Call ``do`` with every tensor's name, in as many threads as torch has where that pays: numpy draws
        outside the interpreter's lock, and no tensor's numbers depend on another's."""
        threads = min(torch.get_num_threads(), len(self.steps))
        if threads == 1 or len(self._drawn) or sum(s.numel() for s in self.steps.values()) < PARALLEL_FROM:
            for name in self.steps:
                do(name)
            return
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(do, sorted(self.steps, key=lambda name: -self.steps[name].numel())))

    def step(self, direction: Direction, name: str, factor: float) -> Tensor:
        """``factor`` z of a tensor, in its dtype and on its device. The next call for it overwrites this."""
        step = self.steps[name]
        if _drawn_in_place(step):
            direction.fill(name, step)
        else:
            drawn = self._drawn[: step.numel()].view(step.shape)
            direction.fill(name, drawn)
            step.copy_(drawn)
        return step.mul_(factor)


def _drawn_in_place(p: Tensor) -> bool:
    return p.dtype == torch.float32 and p.device.type == "cpu"


class Estimate(NamedTuple):
    """What two evaluations told: the projected gradient, and the mean of both losses."""

    projection: float
    loss: float


def spsa_estimate(
    loss: Callable[[Tensors], float],
    params: Tensors,
    direction: Direction,
    eps: float,
    *,
    factors: Mapping[str, float] | None = None,
    log_ratio: float = 0.0,
    work: Workspace | None = None,
) -> Estimate:
    """p = (loss(theta + eps z) - loss(theta - eps z)) / (2 eps), a central difference (SPSA).

    ``params`` stay as they are; ``loss`` gets perturbed copies, which the next evaluation overwrites. Per
    tensor, ``factors`` scale z. With ``log_ratio`` r the two perturbations are e^r eps and e^-r eps.
    """
    work = work if work is not None else Workspace(params)
    up, down = eps * math.exp(log_ratio), eps * math.exp(-log_ratio)

    def plus(name: str) -> None:
        step = work.step(direction, name, up * (factors[name] if factors else 1.0))
        torch.add(params[name], step, out=work.copies[name])

    def minus(name: str) -> None:
        step = work.steps[name]
        if up != down:
            step = work.step(direction, name, down * (factors[name] if factors else 1.0))
        torch.sub(params[name], step, out=work.copies[name])

    work.each(plus)
    above = loss(work.copies)
    work.each(minus)
    below = loss(work.copies)
    return Estimate((above - below) / (2 * eps), (above + below) / 2)


def apply_estimates(
    params: Tensors,
    directions: Sequence[Direction],
    values: Sequence[float],
    lr: float,
    *,
    factors: Mapping[str, float] | None = None,
    work: Workspace | None = None,
) -> None:
    """theta <- theta - lr p z for each (direction, p), in the order given, in place.

    The order is part of the result: float addition does not commute with rounding. Values of zero are skipped.
    """
    work = work if work is not None else Workspace(params)
    moves = [(d, float(p)) for d, p in zip(directions, values, strict=True) if p != 0]

    def move(name: str) -> None:
        """All of one tensor's moves, while it is in the cache."""
        theta, factor = params[name], lr * (factors[name] if factors else 1.0)
        for direction, p in moves:
            theta.sub_(work.step(direction, name, factor * p))

    work.each(move)


def probe() -> str:
    """A digest of some draws. Parties whose probes differ would draw other directions from the same keys."""
    drawn = torch.empty(4096)
    Direction(0, 0, 0, 0).fill("probe", drawn)
    return hashlib.blake2b(drawn.numpy().tobytes(), digest_size=8).hexdigest()
