"""How much of what is ordered has been admitted: pacing functions, windows, and a sampler for a `DataLoader`.

With progress t = s / (full_at S) at step s of S, q0 = start M of M items, and the window's growth from 0 to 1

    linear t      quad t^2      root t^(1/2)      step floor(t)
    exp    (e^(c t) - 1) / (e^c - 1)              log 1 + ln(t + e^-c) / c

the window is q0 + (M - q0) growth, cut to an integer of 1 .. M; from t = 1 on it is everything.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Sampler

from cograd.core.checks import check
from cograd.core.streams import Stream, stream

PACINGS = ("linear", "quad", "root", "step", "exp", "log")
ORDERS = ("easy_first", "hard_first", "random")


@dataclass(frozen=True)
class Pacing:
    """How many of the ordered items are admitted.

    Args:
        rule: ``linear``, ``quad``, ``root``, ``step``, ``exp`` or ``log``.
        start: share of the items at the first step, in [0, 1]; 1 admits everything at once.
        full_at: share of the steps after which everything is admitted, > 0; above 1 the end is never reached.
        sharpness: c of ``exp`` and ``log``.
    """

    rule: str = "linear"
    start: float = 0.2
    full_at: float = 0.8
    sharpness: float = 10.0

    def __post_init__(self) -> None:
        check(
            ("rule", self.rule, f"one of {', '.join(PACINGS)}", self.rule in PACINGS),
            ("start", self.start, "in [0, 1]", 0 <= self.start <= 1),
            ("full_at", self.full_at, "> 0 and finite", 0 < self.full_at < math.inf),
            ("sharpness", self.sharpness, "> 0 and finite", 0 < self.sharpness < math.inf),
        )

    def size(self, step: int, steps: int, items: int) -> int:
        """The window g at ``step`` = 0, 1, ... of ``steps``, of ``items`` items: 1 .. items."""
        check(
            ("step", step, ">= 0", step >= 0),
            ("steps", steps, ">= 1", steps >= 1),
            ("items", items, ">= 1", items >= 1),
        )
        first, t = self.start * items, step / (self.full_at * steps)
        if t >= 1:
            return items
        return min(items, max(1, int(first + (items - first) * self._growth(t))))

    def _growth(self, t: float) -> float:
        """Of the window, at 0 <= t < 1."""
        c = self.sharpness
        if self.rule == "linear":
            return t
        if self.rule == "quad":
            return t * t
        if self.rule == "root":
            return math.sqrt(t)
        if self.rule == "step" or t == 0:
            return 0.0
        if self.rule == "exp":  # both exponentials times e^-c: none of them can overflow
            return math.exp(c * (t - 1)) * math.expm1(-c * t) / math.expm1(-c)
        return max(0.0, 1 + math.log(t + math.exp(-c)) / c)


def windows(pacing: Pacing, items: int, batch_size: int, steps: int, min_samples: int) -> list[int]:
    """The window of each pass, until the passes hold ``steps`` minibatches or more.

    A window is set once a pass, by the step at which the pass begins, and never below ``min_samples`` (or all
    items). Raises ValueError for a minibatch larger than ``items``.
    """
    if batch_size > items:
        raise ValueError(f"batch_size must be at most the number of examples, {items}; got {batch_size}")
    found: list[int] = []
    step = 0
    while step < steps:
        found.append(min(items, max(pacing.size(step, steps, items), min_samples)))
        step += math.ceil(found[-1] / batch_size)
    return found


def ranked(scores: Tensor, order: str, ties: Stream) -> Tensor:
    """Rows in the order in which they are admitted (n,), int64, on the CPU.

    ``scores`` (n,) are low where an example is easy. Equal ones come in random order, not in that of the data
    set, which may be sorted by label. Raises ValueError for NaN, which sorts arbitrarily.
    """
    shuffled = ties.permutation(len(scores))
    if order == "random":
        return shuffled
    scores = scores.detach().cpu()
    if bool(scores.isnan().any()):
        raise ValueError(f"scores must not be NaN; {int(scores.isnan().sum())} of {len(scores)} are")
    signed = scores if order == "easy_first" else -scores
    return shuffled[signed[shuffled].argsort(stable=True)]


class PacedSampler(Sampler[list[int]]):
    """A curriculum for one's own training loop: a batch sampler of a `DataLoader`.

        sampler = PacedSampler(scores, Pacing("linear", start=0.2, full_at=0.8), steps=1000, batch_size=10)
        loader = DataLoader(examples, batch_sampler=sampler)

    One run through it has ``len(sampler)`` minibatches: at least ``steps``, as the last pass is completed. Each
    pass shuffles the window and goes through it once. Another run gives the same minibatches, until
    `begin_round`.

    Args:
        scores: of all examples (n,), low where an example is easy.
        pacing: how the window grows over the steps.
        steps: planned minibatches.
        batch_size: examples of a minibatch; the last one of a pass may be smaller.
        order: ``easy_first``, ``hard_first`` or ``random``.
        min_samples: the least window.
        seed: of shuffles and of the order of ties.

    Raises ValueError for an argument out of range, and for scores that are NaN.
    """

    def __init__(
        self,
        scores: Tensor | Sequence[float],
        pacing: Pacing,
        *,
        steps: int,
        batch_size: int,
        order: str = "easy_first",
        min_samples: int = 32,
        seed: int = 0,
    ) -> None:
        check(
            ("steps", steps, ">= 1", steps >= 1),
            ("batch_size", batch_size, ">= 1", batch_size >= 1),
            ("order", order, f"one of {', '.join(ORDERS)}", order in ORDERS),
            ("min_samples", min_samples, ">= 1", min_samples >= 1),
        )
        given = torch.as_tensor(scores)
        if given.ndim != 1 or not len(given):
            raise ValueError(f"scores must be 1-D and not empty; got shape {tuple(given.shape)}")
        self.batch_size, self.order, self.seed, self.round = batch_size, order, seed, 0
        self.windows = windows(pacing, len(given), batch_size, steps, min_samples)
        self._rank(given)

    def begin_round(self, scores: Tensor | Sequence[float] | None = None) -> None:
        """Start anew, with other shuffles, and with these scores (n,) if any are given. Raises ValueError for
        another number of them."""
        self.round += 1
        given = self.scores if scores is None else torch.as_tensor(scores)
        if given.shape != self.scores.shape:
            expected = tuple(self.scores.shape)
            raise ValueError(f"scores must have shape {expected}, as before; got {tuple(given.shape)}")
        self._rank(given)

    def _rank(self, scores: Tensor) -> None:
        self.scores = scores
        self.rows = ranked(scores, self.order, stream(self.seed, "paced", self.round, "order"))

    def __len__(self) -> int:
        return sum(math.ceil(size / self.batch_size) for size in self.windows)

    def __iter__(self) -> Iterator[list[int]]:
        for number, size in enumerate(self.windows):
            shuffle = stream(self.seed, "paced", self.round, "batches", number).permutation(size)
            for batch in self.rows[:size][shuffle].split(self.batch_size):
                yield batch.tolist()
