"""What DIFF2 does with the private gradient estimate of a round: one step, or many on one worker."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from cograd.core.streams import stream

Output = Literal["last", "random"]


class Local(Protocol):
    """The selected worker's private access to its own records."""

    def difference(self, now: Tensor, before: Tensor, step: int) -> Tensor:
        """Clipped mean of gradient differences on a fresh batch, with noise; zeros where now is before."""


class Routine(Protocol):
    """From the iterate and the gradient estimate of a round to the next iterate."""

    @property
    def lr(self) -> float: ...

    @property
    def local_releases(self) -> int:
        """Private releases that one selected worker makes in a round, beyond the round's message."""

    @property
    def local_batch(self) -> int:
        """Records that each of them is over."""

    @property
    def local_clip(self) -> float:
        """Clipping norm of a local difference, per unit of distance."""

    def move(self, x: Tensor, v: Tensor, local: Local, key: tuple[int, int]) -> Tensor:
        """The next iterate. ``key``: the public (seed, round)."""


@dataclass(frozen=True)
class GDRoutine:
    """GD-Routine: x - lr v. Raises ValueError unless 0 < lr < inf."""

    lr: float

    local_releases = 0
    local_batch = 1
    local_clip = 1.0

    def __post_init__(self) -> None:
        _lr_checked(self.lr)

    def move(self, x: Tensor, v: Tensor, local: Local, key: tuple[int, int]) -> Tensor:
        return x.sub(v, alpha=self.lr)


@dataclass(frozen=True)
class BVRLocalSGD:
    """BVR-L-SGD-Routine: one worker, drawn anew each round, takes ``steps`` bias-variance reduced local steps.

    The first is along v; before each later one v is corrected by the clipped, noised mean difference of
    gradients over ``batch_size`` of the worker's records (drawn without replacement).

    Args:
        lr: step size, > 0.
        batch_size: records of a local difference, >= 1.
        steps: K >= 1; 1 is `GDRoutine`.
        diff_clip: C_3 > 0: a record's local difference is clipped at C_3 times the distance of the points.
        output: the last local iterate, or the ``random`` one of the nonconvex theory (uniform over 1 .. K).

    Raises ValueError for an argument out of range.
    """

    lr: float
    batch_size: int
    steps: int
    diff_clip: float
    output: Output = "last"

    def __post_init__(self) -> None:
        _lr_checked(self.lr)
        for name in ("batch_size", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1; got {getattr(self, name)}")
        if not self.diff_clip > 0:
            raise ValueError(f"diff_clip must be > 0; got {self.diff_clip}")
        output_checked(self.output)

    @property
    def local_releases(self) -> int:
        return self.steps - 1

    @property
    def local_batch(self) -> int:
        return self.batch_size

    @property
    def local_clip(self) -> float:
        return self.diff_clip

    def move(self, x: Tensor, v: Tensor, local: Local, key: tuple[int, int]) -> Tensor:
        before, now, w = x, x.sub(v, alpha=self.lr), v
        for step in range(1, self._steps(key)):
            w = w + local.difference(now, before, step)
            before, now = now, now.sub(w, alpha=self.lr)
        return now

    def _steps(self, key: tuple[int, int]) -> int:
        """Steps to take in a round: the random iterate is public, so what comes after it need not be made."""
        if self.output == "last":
            return self.steps
        return 1 + stream(key[0], "diff2", "local output", key[1]).integer(self.steps)


def _lr_checked(lr: float) -> None:
    if not 0 < lr < math.inf:
        raise ValueError(f"lr must be a positive number; got {lr}")


def output_checked(output: str) -> None:
    if output not in ("last", "random"):
        raise ValueError(f"output must be 'last' or 'random'; got {output!r}")
