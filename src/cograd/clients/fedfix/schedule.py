"""When the server aggregates, and whose work: a pure function of the response times.

Times are whole ticks, `TICKS` to a unit, as on the simulator's clock. A period is rounded up to a tick, so that
a client whose response time is a multiple of it answers in time, whatever floats make of either.
"""

from __future__ import annotations

import heapq
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from cograd.engines.federated.simulation import TICKS

HORIZON = 1000
"""Slowest response times over which the gaps of a buffer are measured."""

Answer: TypeAlias = tuple[int, int, int]
"""The tick at which a client answers, its number, the round whose model it trained from."""


def response_times(scenario: str, clients: int) -> list[float]:
    """Response times of the paper's scenario F-x: evenly spaced from 1 (client 0) to 1 - x/100 (the last).

    ``F-0`` has all equal. Raises ValueError for another name, and unless x is in [0, 100).
    """
    named = re.fullmatch(r"F-(\d+(?:\.\d+)?)", scenario)
    if named is None or not float(named[1]) < 100:
        raise ValueError(f"scenario must be F-x with x in [0, 100), such as F-80; got {scenario!r}")
    if clients < 1:
        raise ValueError(f"clients must be >= 1; got {clients}")
    faster = float(named[1]) / 100
    return [1 - i / max(1, clients - 1) * faster for i in range(clients)]


def in_ticks(times: Sequence[float]) -> list[int]:
    """Response times in ticks. Raises ValueError for none of them, and for one that is not at least a tick."""
    if not len(times):
        raise ValueError("times must hold the response time of at least one client; got none")
    for client, time in enumerate(times):
        if not 1 / TICKS <= time < math.inf:
            raise ValueError(f"times must be > 0 and finite; client {client} has {time}")
    return [round(time * TICKS) for time in times]


@dataclass(frozen=True)
class Every:
    """Aggregate every ``period`` units of time whatever has come: FedFix."""

    period: float

    def __post_init__(self) -> None:
        if not 1 / TICKS <= self.period < math.inf:
            raise ValueError(f"period must be > 0 and finite; got {self.period}")

    @property
    def ticks(self) -> int:
        """The period in ticks, rounded up; a float's error above a tick does not count."""
        return math.ceil(self.period * TICKS * (1 - 1e-15))

    def check(self, clients: int) -> None:
        """Any number of clients will do."""

    def gaps(self, times: Sequence[float]) -> list[float]:
        """Aggregations from each client's participation to its next, 1 / f_i."""
        return [float(-(-tau // self.ticks)) for tau in in_ticks(times)]

    def size(self, gaps: Sequence[float]) -> float:
        """Clients of an aggregation, in the mean."""
        return sum(1 / gap for gap in gaps)

    def take(self, waiting: list[Answer], number: int) -> tuple[int, list[Answer]]:
        """When aggregation ``number`` is, and what it takes from a heap of answers."""
        due, taken = (number + 1) * self.ticks, []
        while waiting and waiting[0][0] <= due:
            taken.append(heapq.heappop(waiting))
        return due, taken


@dataclass(frozen=True)
class Arrivals:
    """Aggregate when ``count`` clients have answered; None waits for all of them.

    Answers that come at the same time are taken in the order of the clients' numbers. One is asynchronous
    FedAvg, all is FedAvg, anything between is a buffer as in FedBuff.
    """

    count: int | None = None

    def __post_init__(self) -> None:
        if self.count is not None and self.count < 1:
            raise ValueError(f"count must be >= 1 or None; got {self.count}")

    def check(self, clients: int) -> None:
        """Raises ValueError if the count is above the number of clients."""
        if self.count is not None and self.count > clients:
            raise ValueError(f"count must be at most the number of clients, {clients}; got {self.count}")

    def gaps(self, times: Sequence[float]) -> list[float]:
        """Aggregations from each client's participation to its next, 1 / f_i.

        In closed form for one client and for all; otherwise measured over `HORIZON` of the slowest response
        times, from a client's first participation to its last.
        """
        ticks = in_ticks(times)
        self.check(len(ticks))
        if self.count in (None, len(ticks)):
            return [1.0] * len(ticks)
        if self.count == 1:
            rate = math.fsum(1 / tau for tau in ticks)
            return [tau * rate for tau in ticks]
        taken: list[list[int]] = [[] for _ in ticks]
        for number, (when, answers) in enumerate(aggregations(self, ticks)):
            if when > HORIZON * max(ticks):
                break
            for _, client, _ in answers:
                taken[client].append(number)
        return [(numbers[-1] - numbers[0]) / (len(numbers) - 1) for numbers in taken]

    def size(self, gaps: Sequence[float]) -> float:
        """Clients of an aggregation."""
        return float(len(gaps) if self.count is None else self.count)

    def take(self, waiting: list[Answer], number: int) -> tuple[int, list[Answer]]:
        """When aggregation ``number`` is, and what it takes from a heap of answers."""
        taken = [heapq.heappop(waiting) for _ in range(self.count or len(waiting))]
        return taken[-1][0], taken


Scheme: TypeAlias = Every | Arrivals


@dataclass(frozen=True)
class Aggregation:
    """One aggregation: ``clients`` take part, each with work from the model of the round in ``origins``."""

    time: float
    clients: tuple[int, ...]
    origins: tuple[int, ...]


@dataclass(frozen=True)
class Schedule:
    """All aggregations of ``clients`` clients up to some time."""

    clients: int
    aggregations: tuple[Aggregation, ...]

    def __len__(self) -> int:
        return len(self.aggregations)

    @property
    def participations(self) -> list[int]:
        """How often each client took part."""
        counts = [0] * self.clients
        for aggregation in self.aggregations:
            for client in aggregation.clients:
                counts[client] += 1
        return counts

    @property
    def frequencies(self) -> list[float]:
        """The share of aggregations in which each client took part, f_i."""
        return [count / max(1, len(self)) for count in self.participations]

    @property
    def staleness(self) -> int:
        """The largest number of aggregations that any work had missed when it was taken."""
        return max(
            (number - min(a.origins) for number, a in enumerate(self.aggregations) if a.origins), default=0
        )


def schedule(scheme: Scheme, times: Sequence[float], until: float) -> Schedule:
    """What a scheme does with these response times up to a time. An aggregation that finds nobody is listed,
    too: it counts."""
    scheme.check(len(times))
    found = []
    for when, answers in aggregations(scheme, in_ticks(times)):
        if when > round(until * TICKS):
            break
        clients = tuple(client for _, client, _ in answers)
        origins = tuple(origin for _, _, origin in answers)
        found.append(Aggregation(when / TICKS, clients, origins))
    return Schedule(len(times), tuple(found))


def aggregations(scheme: Scheme, ticks: Sequence[int]) -> Iterator[tuple[int, list[Answer]]]:
    """Aggregations without end, as tick and answers in the order of the clients."""
    waiting = [(tau, client, 0) for client, tau in enumerate(ticks)]
    heapq.heapify(waiting)
    number = 0
    while True:
        when, taken = scheme.take(waiting, number)
        number += 1
        yield when, sorted(taken, key=lambda answer: answer[1])
        for _, client, _ in taken:
            heapq.heappush(waiting, (when + ticks[client], client, number))


def surrogate(weights: Sequence[float], gaps: Sequence[float]) -> list[float]:
    """The importances of the loss that is really minimised: proportional to f_i d_i, and of sum 1."""
    applied = [weight / gap for weight, gap in zip(weights, gaps, strict=True)]
    return [each / math.fsum(applied) for each in applied]
