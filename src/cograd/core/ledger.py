"""The ledger: every message and every unit of work of a run, what a link makes of it, and budgets.

Bytes are kept apart: *payload* is what a method needs to say and what papers quote; *frame* adds what a
transport needs (header, checksum); *schema* is paid once a session. A message to many receivers is one entry
with ``copies``: payload counts it once, as papers do, and `Link` multiplies.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

ALL = -1
"""Receiver of a message that goes to every other party."""

WORK = ("grad", "forward", "query", "draw", "token", "rollout", "epsilon")
"""Units of work that may be counted."""


class Entry(NamedTuple):
    """One message. Sizes in bytes; ``copies`` is the number of receivers."""

    sender: int
    to: int
    round: int
    payload: int
    frame: int
    schema: int
    copies: int


class BudgetExceeded(RuntimeError):
    """A budget does not allow the next message or piece of work."""


@dataclass(frozen=True)
class Budget:
    """What one party may use, by kind: ``payload`` (bytes it sends) or a unit of work.

    ``Budget({"payload": 10**6, "grad": 500})``. Raises ValueError for an unknown kind or a negative limit.
    """

    limits: Mapping[str, float]

    def __post_init__(self) -> None:
        for kind, limit in self.limits.items():
            if kind not in ("payload", *WORK):
                raise ValueError(f"budget kind must be one of payload, {', '.join(WORK)}; got {kind!r}")
            if not limit >= 0:
                raise ValueError(f"budget of {kind} must be >= 0; got {limit}")


@dataclass
class Ledger:
    """Messages and work of a run, per party. With a budget, `send` and `work` refuse what would exceed it."""

    budget: Budget | None = None
    _columns: tuple[array[Any], ...] = field(
        default_factory=lambda: tuple(array("q") for _ in Entry._fields), repr=False
    )
    _work: Counter[tuple[int, str]] = field(default_factory=Counter, repr=False)
    _sent: Counter[int] = field(default_factory=Counter, repr=False)

    def send(
        self,
        sender: int,
        round: int,
        payload: int,
        *,
        to: int = ALL,
        frame: int | None = None,
        schema: int = 0,
        copies: int = 1,
    ) -> None:
        """Record one message. ``frame`` is all that travels, and defaults to payload and schema."""
        frame = payload + schema if frame is None else frame
        entry = Entry(sender, to, round, payload, frame, schema, copies)
        if not all(hasattr(n, "__index__") for n in entry):
            raise ValueError(f"parties, round and sizes must be whole numbers; got {entry}")
        if min(payload, schema, round, copies) < 0 or frame < payload + schema:
            raise ValueError(
                f"sizes must be >= 0 and frame >= payload + schema; got payload={payload}, frame={frame}, "
                f"schema={schema}, round={round}, copies={copies}"
            )
        self._charge(sender, "payload", self._sent[sender] + payload)
        self._sent[sender] += payload
        for column, value in zip(self._columns, entry, strict=True):
            column.append(value)

    def all_reduce(self, round: int, payload: int, members: int) -> None:
        """Record a ring all-reduce of ``payload`` bytes a party, of which 2 (N-1)/N travel as frames."""
        for party in range(members):
            self.send(party, round, payload, frame=max(payload, 2 * (members - 1) * payload // members))

    def work(self, party: int, kind: str, amount: float = 1) -> None:
        """Record work of a party, for example ``work(0, "grad", batch_size)``."""
        if kind not in WORK:
            raise ValueError(f"work must be one of {', '.join(WORK)}; got {kind!r}")
        if not amount >= 0:
            raise ValueError(f"amount of {kind} must be >= 0; got {amount}")
        self._charge(party, kind, self._work[party, kind] + amount)
        self._work[party, kind] += amount  # type: ignore[assignment]  # epsilon is a float

    def _charge(self, party: int, kind: str, total: float) -> None:
        limit = self.budget.limits.get(kind) if self.budget else None
        if limit is not None and total > limit:
            raise BudgetExceeded(f"party {party} has a budget of {limit:g} {kind}; this would make {total:g}")

    def __len__(self) -> int:
        return len(self._columns[0])

    def __iter__(self) -> Iterator[Entry]:
        return map(Entry._make, zip(*self._columns, strict=True))

    def sent(self, party: int | None = None, size: str = "payload", since: int = 0) -> int:
        """Bytes sent (``payload``, ``frame`` or ``schema``) by a party, or by all, in rounds >= ``since``."""
        return sum(getattr(e, size) for e in self if e.round >= since and (party is None or e.sender == party))

    def worked(self, kind: str, party: int | None = None) -> float:
        """Work of a kind done by a party, or by all."""
        return sum(v for (p, k), v in self._work.items() if k == kind and (party is None or p == party))

    def rounds(self) -> int:
        """Number of distinct rounds in which something was sent."""
        return len(set(self._columns[2]))


@dataclass(frozen=True)
class Link:
    """A full-duplex link that every party has to a common switch.

    ``bandwidth`` in bits a second and direction, ``latency`` and ``jitter`` in seconds a message (jitter is
    added as its mean: half of it). Raises ValueError unless bandwidth > 0 and the others >= 0.
    """

    bandwidth: float
    latency: float = 0.0
    jitter: float = 0.0

    def __post_init__(self) -> None:
        if not self.bandwidth > 0 or not (self.latency >= 0 and self.jitter >= 0):
            raise ValueError(f"bandwidth must be > 0, latency and jitter >= 0; got {self}")

    def seconds(self, ledger: Ledger, parties: int) -> float:
        """Time the run's messages take: rounds one after another; in a round each party sends and receives
        its bytes at once in both directions, and the slowest one ends it."""
        load: dict[int, list[list[float]]] = {}
        for e in ledger:
            if not 0 <= e.sender < parties or not (e.to == ALL or 0 <= e.to < parties):
                raise ValueError(f"parties must be more than every party of the ledger; got {parties}, {e}")
            out, inn = load.setdefault(e.round, [[0.0] * parties, [0.0] * parties])
            out[e.sender] += e.frame * e.copies
            receivers = [p for p in range(parties) if p != e.sender] if e.to == ALL else [e.to]
            for p in receivers:
                inn[p] += e.frame * e.copies / len(receivers)
        wait = self.latency + self.jitter / 2
        return sum(
            wait + 8 * max(max(pair) for pair in zip(out, inn, strict=True)) / self.bandwidth
            for out, inn in load.values()
        )
