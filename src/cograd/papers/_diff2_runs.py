"""Many DIFF2 runs at once, for tuning: the same recursion as `Diff2`, with a batch dimension over settings.

A problem gives the gradients of its records at many points in a compressed form that is linear in them, so that
a difference of two forms is the form of the difference, and norms and clipped means follow from it without a
gradient being written out. ``papers/diff2.py`` checks a run of these against `Diff2` itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import softplus

from cograd.core.streams import stream
from cograd.machines.diff2.noise import StreamNoise
from cograd.machines.diff2.plan import Diff2Plan

Form = tuple[Tensor, ...]
"""Per-record gradients of all runs, compressed: tensors (runs, ...)."""

Noise = Callable[[int], Tensor]
"""Standard normal values (numel,) of a round, the same for all runs of a batch."""


class Problem(Protocol):
    """A function to minimise from private records, at many points at once."""

    @property
    def start(self) -> Tensor:
        """x_0 (numel,)."""

    def form(self, x: Tensor) -> Form:
        """Of the gradients at the points x (runs, numel)."""

    def clipped_mean(self, form: Form, radius: Tensor) -> Tensor:
        """Clipped means (runs, numel), radius (runs,)."""

    def losses(self, x: Tensor) -> dict[str, Tensor]:
        """Losses by name at the points x (runs, numel): each (runs,)."""

    def part(self, rows: Tensor) -> Problem:
        """The problem of these records alone, for its forms and clipped means."""


@dataclass(frozen=True)
class Valley:
    """F(x) = sum_j h_j u_j^2 / (1 + u_j^2) + 0.01 |x|^2 with u = x - c and h_j = 0.5 / sqrt(j).

    Smooth (L = 1) and nonconvex. Of its records only a bound on their gradients is known, so that nothing is
    clipped and only the noise calibrated to the bound matters.
    """

    centre: Tensor

    @property
    def start(self) -> Tensor:
        return torch.zeros_like(self.centre)

    @property
    def heights(self) -> Tensor:
        return 0.5 / torch.arange(1, len(self.centre) + 1).sqrt()

    def form(self, x: Tensor) -> Form:
        u = x - self.centre
        return ((2 * self.heights) * u / (1 + u.square()).square() + 0.02 * x,)

    def clipped_mean(self, form: Form, radius: Tensor) -> Tensor:
        return form[0]

    def losses(self, x: Tensor) -> dict[str, Tensor]:
        square = (x - self.centre).square()
        return {"loss": (self.heights * square / (1 + square)).sum(1) + 0.01 * x.square().sum(1)}

    def part(self, rows: Tensor) -> Valley:
        return self


@dataclass(frozen=True)
class Regression:
    """Linear least squares, (1/2) (<x_i, w> - y_i)^2; a record's gradient is its residual times x_i.

    Its loss is counted from the minimum.
    """

    features: Tensor
    targets: Tensor

    @property
    def start(self) -> Tensor:
        return self.features.new_zeros(self.features.shape[1])

    def form(self, x: Tensor) -> Form:
        return (torch.addmm(-self.targets, x, self.features.T),)

    def clipped_mean(self, form: Form, radius: Tensor) -> Tensor:
        (residuals,) = form
        norms = residuals.abs() * self.features.norm(dim=1)
        return (residuals * _factors(norms, radius)) @ self.features / len(self.targets)

    def losses(self, x: Tensor) -> dict[str, Tensor]:
        return {"loss": self.form(x)[0].square().mean(1) / 2 - self._minimum}

    def part(self, rows: Tensor) -> Regression:
        return Regression(self.features[rows], self.targets[rows])

    @cached_property
    def _minimum(self) -> Tensor:
        best = torch.linalg.lstsq(self.features, self.targets[:, None]).solution.T
        return self.form(best)[0].square().mean() / 2


@dataclass(frozen=True)
class Softplus:
    """A hidden layer of softplus units, one output, squared loss (1/2) (f(x_i) - y_i)^2.

    A point is the flat vector of ``Sequential(Linear(F, H), Softplus(), Linear(H, 1))``. The form: each
    record's error (runs, n), the error times the hidden values, and the error at the hidden layer (runs, H, n).
    """

    features: Tensor
    targets: Tensor
    test_features: Tensor
    test_targets: Tensor
    start: Tensor
    hidden: int = 10

    @cached_property
    def _transposed(self) -> Tensor:
        return self.features.T.contiguous()

    @cached_property
    def _weights(self) -> Tensor:
        """1 + |x_i|^2: a record's squared gradient norm in W_1 and b_1, over that at the hidden layer."""
        return 1 + self.features.square().sum(1)

    def _parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """W_1 (runs H, F), b_1 (runs H, 1), w_2 (runs, 1, H), b_2 (runs, 1)."""
        width, hidden = self.features.shape[1], self.hidden
        first, bias, second, last = x.split([hidden * width, hidden, hidden, 1], dim=1)
        return first.reshape(-1, width), bias.reshape(-1, 1), second[:, None], last

    def form(self, x: Tensor) -> Form:
        first, bias, second, last = self._parts(x)
        before = torch.addmm(bias, first, self._transposed).view(len(x), self.hidden, -1)
        after = softplus(before)
        errors = torch.bmm(second, after).squeeze(1) + last - self.targets
        slopes = before.sigmoid_().mul_(second.transpose(1, 2)).mul_(errors[:, None])
        return errors, after.mul_(errors[:, None]), slopes

    def clipped_mean(self, form: Form, radius: Tensor) -> Tensor:
        errors, outer, inner = form
        square = outer.square().sum(1) + errors.square() + inner.square().sum(1) * self._weights
        factors = _factors(square.sqrt(), radius)
        scaled, (runs, count) = inner * factors[:, None], errors.shape
        parts = (
            (scaled.view(-1, count) @ self.features).view(runs, -1),
            scaled.sum(2),
            torch.bmm(outer, factors[:, :, None]).squeeze(2),
            (factors * errors).sum(1, keepdim=True),
        )
        return torch.cat(parts, dim=1) / count

    def losses(self, x: Tensor) -> dict[str, Tensor]:
        first, bias, second, last = self._parts(x)
        losses = {}
        for name, features, targets in (
            ("loss", self.features, self.targets),
            ("test loss", self.test_features, self.test_targets),
        ):
            after = softplus(torch.addmm(bias, first, features.T)).view(len(x), self.hidden, -1)
            losses[name] = (torch.bmm(second, after).squeeze(1) + last - targets).square().mean(1) / 2
        return losses

    def part(self, rows: Tensor) -> Softplus:
        return replace(self, features=self.features[rows], targets=self.targets[rows])


def _factors(norms: Tensor, radius: Tensor) -> Tensor:
    """min(1, C / |g|) of every record (runs, n)."""
    return (radius[:, None] / norms.clamp_min(1e-30)).clamp_max(1.0)


@dataclass
class Trace:
    """What every run was like after the rounds ``at``: squared norm of the exact gradient, and losses by name,
    each (runs, len(at)). ``x`` (runs, numel) is where they ended."""

    at: list[int]
    square: Tensor
    losses: dict[str, Tensor]
    x: Tensor


def descend(problem: Problem, plans: Sequence[Diff2Plan], noise: Noise, looks: int) -> Trace:
    """Run plans of the same number of rounds side by side, each with equal workers, so that the mean over
    workers is the mean over records. They have the same number of local releases, over batches of one size. The
    runs are looked at about ``looks`` times, evenly, the end included."""
    rounds, column = plans[0].rounds, problem.start.new_tensor
    routine, clip = _Routine(problem, plans), column([p.clip for p in plans])
    diff_clip = column([p.diff_clip for p in plans])
    sigma1, sigma2 = column([p.sigma1 for p in plans]), column([p.sigma2 for p in plans])
    every = torch.tensor([p.restart_every for p in plans])
    at = sorted({*range(rounds, 0, -max(1, rounds // looks))})
    x = problem.start.repeat(len(plans), 1)
    x_before, v, form_before = x, torch.zeros_like(x), problem.form(x)
    seen: list[dict[str, Tensor]] = []
    for round in range(rounds):
        form, unit = problem.form(x), noise(round)
        if round in at:
            seen.append(_look(problem, x, form))
        distance = (x - x_before).norm(dim=1)
        restart = round % every == 0
        for rows, full in ((restart, True), (~restart, False)):
            if not rows.any():
                continue
            now, before = (_select(f, rows) for f in (form, form_before))
            if full:
                mean = problem.clipped_mean(now, clip[rows])
                v[rows] = mean + sigma1[rows, None] * unit
            else:
                change = tuple(a - b for a, b in zip(now, before, strict=True))
                mean = problem.clipped_mean(change, (diff_clip * distance)[rows])
                v[rows] += mean + (sigma2 * distance)[rows, None] * unit
        form_before, x_before, x = form, x, routine.move(x, v, round)
    seen.append(_look(problem, x, problem.form(x)))
    columns = {name: torch.stack([look[name] for look in seen], dim=1) for name in seen[0]}
    return Trace(at, columns.pop("square"), columns, x)


class _Routine:
    """The plans' routine side by side. Local steps have `Diff2`'s own draws, those of the first plan's seed,
    which selects the same worker for all."""

    def __init__(self, problem: Problem, plans: Sequence[Diff2Plan]) -> None:
        self.problem, self.plan, column = problem, plans[0], problem.start.new_tensor
        self.lr = column([p.routine.lr for p in plans])[:, None]
        self.clip = column([p.routine.local_clip for p in plans])
        self.sigma = column([p.sigma3 for p in plans])
        self.draws = StreamNoise(self.plan.seed)

    def move(self, x: Tensor, v: Tensor, round: int) -> Tensor:
        """The next points (runs, numel) of the points x and the gradient estimates v."""
        before, now, w = x, x - self.lr * v, v
        local = self.plan.routine
        worker = self.plan.selected(round) if local.local_releases else 0
        for step in range(1, local.local_releases + 1):
            rows = self.draws.batch(self.plan.records[worker], local.local_batch, round, worker, step)
            part = self.problem.part(sum(self.plan.records[:worker]) + rows)
            distance = (now - before).norm(dim=1)
            change = tuple(a - b for a, b in zip(part.form(now), part.form(before), strict=True))
            unit = self.draws.normal(x.shape[1], round, worker, step)
            w = w + part.clipped_mean(change, self.clip * distance) + (self.sigma * distance)[:, None] * unit
            before, now = now, now - self.lr * w
        return now


def _select(form: Form, rows: Tensor) -> Form:
    return form if rows.all() else tuple(t[rows] for t in form)


def _look(problem: Problem, x: Tensor, form: Form) -> dict[str, Tensor]:
    unclipped = x.new_full((len(x),), math.inf)
    return {"square": problem.clipped_mean(form, unclipped).square().sum(1), **problem.losses(x)}


def stream_noise(numel: int, *key: int | str) -> Noise:
    """Noise of a key: a round's values depend on the key and the round alone."""
    return lambda round: stream(*key, round).normal(numel)


def noise_of_diff2(plan: Diff2Plan, numel: int) -> Noise:
    """What `Diff2` adds with noise from the stream, over its standard deviation: equal workers' shares."""

    def noise(round: int) -> Tensor:
        shares = [stream(plan.seed, "diff2", "noise", round, w).normal(numel) for w in range(plan.workers)]
        return torch.stack(shares).sum(0) / math.sqrt(plan.workers)

    return noise
