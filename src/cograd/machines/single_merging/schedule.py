"""When nodes communicate, and with how many: the schedules r(t) of the paper, counted in whole rounds."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

Kind = Literal["fixed", "linear", "cosine", "slow_decrease", "truncate", "window"]

DECAY = 10.0
"""Rate of ``slow_decrease``, per whole run."""


@dataclass(frozen=True)
class Schedule:
    """Peers per node in round t = 0 .. rounds - 1. Made by its constructors: `single_merge`, `fixed`, ...

    ``low`` is the number of peers that a node hears in an ordinary round. It may be fractional: 0.2 is one
    peer with probability 0.2. None stands for all neighbours that the topology gives, and is what a topology
    without a random choice needs. ``high`` is the number that the schedule goes to; None stands for all others,
    which makes a round *dense*: all nodes take the average of all. ``start`` and ``width`` are rounds. Which
    rounds are dense is decided by whole numbers and never by comparing a fraction of the run.

    Raises ValueError for a number out of range.
    """

    kind: Kind
    rounds: int
    low: float | None
    high: float | None = None
    start: int = 0
    width: int = 0
    final_merge: bool = True

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind must be one of {', '.join(get_args(Kind))}; got {self.kind!r}")
        _whole("rounds", self.rounds, 1, None)
        for name, value in (("low", self.low), ("high", self.high)):
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"{name} must be a number of peers >= 0, or None; got {value}")
        if self.kind in ("linear", "cosine", "slow_decrease") and self.low is None:
            raise ValueError(f"low must be a number of peers for a {self.kind} schedule; got None")
        if self.kind == "truncate":
            _whole("start", self.start, 0, self.rounds - 1)
        if self.kind == "window":
            _whole("start", self.start, 0, self.rounds - 1)
            _whole("width", self.width, 1, self.rounds - self.start)

    @classmethod
    def single_merge(cls, rounds: int, low: float | None = 0.2) -> Schedule:
        """The paper's: ``low`` in every round but the last, which is the only dense one."""
        return cls.truncate(rounds, rounds - 1, low)

    @classmethod
    def fixed(cls, rounds: int, peers: float | None) -> Schedule:
        """The same number of peers in every round."""
        return cls("fixed", rounds, peers)

    @classmethod
    def every_round(cls, rounds: int) -> Schedule:
        """Dense in every round: federated averaging."""
        return cls.truncate(rounds, 0, 0.0)

    @classmethod
    def truncate(cls, rounds: int, start: int, low: float | None, high: float | None = None) -> Schedule:
        """``low`` before round ``start``, ``high`` from it on."""
        return cls("truncate", rounds, low, high, start)

    @classmethod
    def window(
        cls,
        rounds: int,
        start: int,
        width: int,
        low: float | None,
        high: float | None = None,
        *,
        final_merge: bool = False,
    ) -> Schedule:
        """``high`` in the ``width`` rounds from ``start`` on, ``low`` in the others. With ``final_merge`` the
        last round is at ``high`` too, as in the official code."""
        return cls("window", rounds, low, high, start, width, final_merge)

    @classmethod
    def linear(cls, rounds: int, low: float, high: float | None = None) -> Schedule:
        """From ``low`` to ``high`` in a line; the last round is at ``high``."""
        return cls("linear", rounds, low, high)

    @classmethod
    def cosine(cls, rounds: int, low: float, high: float | None = None) -> Schedule:
        """From ``low`` to ``high`` along half a cosine wave; the last round is at ``high``."""
        return cls("cosine", rounds, low, high)

    @classmethod
    def slow_decrease(cls, rounds: int, low: float, high: float | None = None) -> Schedule:
        """high + (low - high) exp(-10 p): near ``high`` after a third of the run; the last is at ``high``."""
        return cls("slow_decrease", rounds, low, high)

    def peers(self, round: int, members: int) -> float | None:
        """Peers per node in a round among ``members`` nodes; None for all that the topology gives.

        Raises ValueError for a round that the schedule does not have.
        """
        _whole("round", round, 0, self.rounds - 1)
        low, high = self.low, float(members - 1) if self.high is None else self.high
        last = round == self.rounds - 1
        if self.kind == "fixed":
            return low
        if self.kind == "truncate":
            return low if round < self.start else high
        if self.kind == "window":
            inside = self.start <= round < self.start + self.width
            return high if inside or (last and self.final_merge) else low
        assert low is not None
        return high if last else self._ramp(low, high, (round + 1) / self.rounds)

    def _ramp(self, low: float, high: float, progress: float) -> float:
        left = {
            "linear": 1 - progress,
            "cosine": (1 + math.cos(math.pi * progress)) / 2,
            "slow_decrease": math.exp(-DECAY * progress),
        }[self.kind]
        return high + (low - high) * left

    def dense_rounds(self, members: int) -> int:
        """Rounds in which every node hears all others."""
        return sum(self.peers(t, members) == members - 1 for t in range(self.rounds))


def _whole(name: str, value: int, low: int, high: int | None) -> None:
    """Refuse what is not an int of low .. high."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} must be a whole number; got {value!r}")
    if value < low or (high is not None and value > high):
        allowed = f">= {low}" if high is None else f"in {low} .. {high}"
        raise ValueError(f"{name} must be {allowed}; got {value}")
