"""When each fragment is sent (arXiv:2501.18512, Sec. 2.2). Steps count from 1: step t ends with inner update t.

Every schedule here sends fragment p at ``first[p]``, and from then on every ``period`` steps:

- *paper*: fragment p at H + floor(p H / P), then every H steps. The text and the listing of the paper differ
  by a sign and its example decides: every fragment has had H steps before its first exchange.
- *round_robin*: one fragment every R = round(H / P) steps from the start, so that the period is P R. This is
  how MaxText does it.
- *torchft*: fragment p at (p + 1) H / P less the overlap, then every H steps, received at (p + 1) H / P. One
  fragment is in flight at a time: P divides H and the overlap is below H / P.

Under the last two the first fragments are exchanged after fewer than H steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

Name = Literal["paper", "round_robin", "torchft"]
NAMES = ("paper", "round_robin", "torchft")


@dataclass(frozen=True)
class Schedule:
    """Fragment p is sent after step ``first[p]`` and every ``period`` steps from then on."""

    first: tuple[int, ...]
    period: int

    @cached_property
    def _by_residue(self) -> dict[int, int]:
        return {start % self.period: p for p, start in enumerate(self.first)}

    def due(self, step: int) -> int | None:
        """The fragment that is sent after a step; there is at most one."""
        p = self._by_residue.get(step % self.period)
        return p if p is not None and step >= self.first[p] else None

    def coming(self, step: int) -> int:
        """The fragment whose place in the cycle is next, this step included. It goes by the cycle alone, so
        that the steps before the first exchange are shared out too."""
        return min(range(len(self.first)), key=lambda p: (self.first[p] - step) % self.period)


def schedule(name: Name, sync_every: int, count: int, overlap: int) -> Schedule:
    """The schedule of a name for H = ``sync_every`` and P = ``count`` fragments.

    Raises ValueError for another name, for P > H, for an overlap outside 0 .. period - 1, and where
    *torchft* would have two fragments in flight.
    """
    if name not in NAMES:
        raise ValueError(f"schedule must be one of {', '.join(NAMES)}; got {name!r}")
    if not 1 <= count <= sync_every:
        raise ValueError(f"sync_every must be >= the number of fragments, {count}; got {sync_every}")
    stride = max(1, round(sync_every / count))
    period = count * stride if name == "round_robin" else sync_every
    limit = sync_every // count if name == "torchft" else period
    if not 0 <= overlap < limit:
        raise ValueError(f"overlap must be in 0 .. {limit - 1} for schedule {name!r}; got {overlap}")
    if name == "torchft" and sync_every % count:
        raise ValueError(f"sync_every must be a multiple of {count} fragments for torchft; got {sync_every}")
    if name == "paper":
        first = [sync_every + p * sync_every // count for p in range(count)]
    elif name == "round_robin":
        first = [(p + 1) * stride for p in range(count)]
    else:
        first = [(p + 1) * stride - overlap for p in range(count)]
    return Schedule(tuple(first), period)
