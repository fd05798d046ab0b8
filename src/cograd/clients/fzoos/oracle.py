"""Functions that can be asked for values and for nothing else, and what has been asked so far."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cograd.core.checks import check
from cograd.engines.federated.protocol import ClientContext, State

Bounds = tuple[float, float]
"""A box: the least and the largest value of every coordinate."""


@dataclass
class BlackBox:
    """What a client of a zeroth-order method holds: a plain function of a point, asked for values alone.

    Args:
        function: takes a point (d,) and returns a number; it may be noisy and need not be differentiable.
        weight: how much it counts in the mean that all clients minimise; the engine calls it the client's size.
        batched: the function takes points (n, d) and returns values (n,) instead.

    ``calls`` counts the points at which it was asked in this process. The engine's count, ``query`` in the
    ledger and in `Row.work`, holds for worker processes and other machines as well.
    """

    function: Callable[[Tensor], Tensor | float]
    weight: int = 1
    batched: bool = False
    calls: int = field(default=0, compare=False)

    def __post_init__(self) -> None:
        check(("weight", self.weight, ">= 1", self.weight >= 1))

    def __len__(self) -> int:
        return self.weight

    def __call__(self, points: Tensor) -> Tensor:
        """Values (n,), float64, at points (n, d). Raises ValueError if the function returns another shape."""
        self.calls += len(points)
        if self.batched:
            values = torch.as_tensor(self.function(points), device=points.device).detach().double()
        else:
            values = torch.tensor([float(self.function(x)) for x in points], dtype=torch.float64)
        if values.shape != points.shape[:1]:
            raise ValueError(
                f"function must return {len(points)} values for {len(points)} points; "
                f"got shape {tuple(values.shape)}"
            )
        return values.to(points.device)


class Oracle:
    """A client's function during one task: every query is counted, and those to be remembered are kept.

    Queries outside the box are asked at the nearest point of it, so that the function is never called out of
    its domain; a difference across the boundary is that of a function which is constant beyond.

    The *trajectory*, all points (n, d) that were remembered and their values (n,), comes from the client's
    state and goes back there with `into`. A value that is not finite is counted and dropped.
    """

    def __init__(
        self, function: Callable[[Tensor], Tensor], state: State, ctx: ClientContext, bounds: Bounds | None
    ) -> None:
        self.function, self.ctx, self.bounds = function, ctx, bounds
        self.state: State = {name: state[name] for name in state if name not in ("points", "values")}
        empty = ctx.initial.new_empty(0, len(ctx.initial))
        self._points: Tensor = state.get("points", empty)
        self._values: Tensor = state.get("values", empty.new_empty(0, dtype=torch.float64))
        self._count = len(self._values)

    @property
    def points(self) -> Tensor:
        return self._points[: self._count]

    @property
    def values(self) -> Tensor:
        return self._values[: self._count]

    def project(self, points: Tensor) -> Tensor:
        """The nearest points of the box."""
        return points if self.bounds is None else points.clamp(*self.bounds)

    def query(self, points: Tensor, remember: bool = False) -> Tensor:
        """Values (n,), float64, at points (n, d)."""
        points = self.project(points)
        self.ctx.count("query", len(points))
        values = self.function(points)
        if remember:
            self._remember(points, values)
        return values

    def nearest(self, x: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The ``count`` remembered points nearest to ``x`` (or all there are) and their values, float64."""
        rows = nearest(x, self.points, count)
        return self.points[rows].double(), self.values[rows]

    def uniform(self, x: Tensor, radius: float, count: int, *key: int | str) -> Tensor:
        """Points (count, d) uniform in the cube ``x`` +- ``radius``, cut to the box."""
        draws = self.ctx.stream(*key).uniform(count, len(x), device=x.device).to(x.dtype)
        return self.project(x + radius * (2 * draws - 1))

    def forget(self, keep: int | None) -> None:
        """Keep the latest ``keep`` queries of the trajectory; None keeps all."""
        if keep is not None and self._count > keep:
            self._points, self._values = self.points[-keep:], self.values[-keep:]
            self._count = keep

    def into(self) -> State:
        """The client's state with the trajectory."""
        if not self._count:
            return self.state
        return {**self.state, "points": self.points.clone(), "values": self.values.clone()}

    def _remember(self, points: Tensor, values: Tensor) -> None:
        fine = values.isfinite()
        if not bool(fine.all()):
            points, values = points[fine], values[fine]
        end = self._count + len(values)
        if end > len(self._values):  # room for as many again, so that adding is cheap on average
            grown = max(64, 2 * end)
            self._points = _grown(self.points, grown)
            self._values = _grown(self.values, grown)
        self._points[self._count : end] = points
        self._values[self._count : end] = values
        self._count = end


def nearest(x: Tensor, points: Tensor, count: int) -> Tensor | slice:
    """Rows of the ``count`` points (n, d) nearest to ``x`` (d,); all where there are no more."""
    if len(points) <= count:
        return slice(None)
    return (points - x).square_().sum(1).topk(count, largest=False).indices


def _grown(rows: Tensor, size: int) -> Tensor:
    larger = rows.new_empty(size, *rows.shape[1:])
    larger[: len(rows)] = rows
    return larger


def check_bounds(bounds: Bounds | None) -> None:
    """Raise ValueError for what is no box."""
    fine = bounds is None or (
        isinstance(bounds, tuple)
        and len(bounds) == 2
        and all(isinstance(b, int | float) and math.isfinite(b) for b in bounds)
        and bounds[0] < bounds[1]
    )
    check(("bounds", bounds, "None or a box: two finite numbers (low, high), low < high", fine))
