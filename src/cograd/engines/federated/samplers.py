"""Who takes part in a round: a pure function of the seed and the round."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from cograd.core.streams import stream


class Sampler(Protocol):
    """``sampler(round, clients, seed)``: numbers of the clients drawn, ascending and at least one.

    A server asks for the next round when one is over, so that one round more is drawn than is run.
    """

    def __call__(self, round: int, clients: int, seed: int) -> list[int]: ...


def drawn(sampler: Sampler, round: int, clients: int, seed: int) -> list[int]:
    """Who takes part in a round. Raises ValueError for a sampler that selects nobody, or not as it should."""
    chosen = sampler(round, clients, seed)
    if not chosen:
        raise ValueError(f"sampler must select at least one client; {sampler!r} selects none in round {round}")
    if sorted(set(chosen)) != chosen or not 0 <= chosen[0] <= chosen[-1] < clients:
        raise ValueError(
            f"sampler must give numbers of 0 .. {clients - 1}, ascending, each once; "
            f"{sampler!r} gives {chosen} in round {round}"
        )
    return chosen


def _count(fraction: float | None, count: int | None, clients: int) -> int:
    if (fraction is None) == (count is None):
        raise ValueError(f"give either fraction or count; got fraction={fraction}, count={count}")
    if fraction is not None and not 0 <= fraction <= 1:
        raise ValueError(f"fraction must be in (0, 1]; got {fraction}")
    number = count if count is not None else int((fraction or 0.0) * clients + 1e-9)
    if not 1 <= number <= clients:
        raise ValueError(
            f"participation must select 1 .. {clients} of {clients} clients; "
            f"{f'fraction={fraction}' if count is None else f'count={count}'} selects {number}"
        )
    return number


@dataclass(frozen=True)
class Uniform:
    """So many clients without replacement, all sets equally likely: ``Uniform(0.1)`` or
    ``Uniform(count=10)``."""

    fraction: float | None = None
    count: int | None = None

    def __call__(self, round: int, clients: int, seed: int) -> list[int]:
        number = _count(self.fraction, self.count, clients)
        return [int(i) for i in stream(seed, "participation", round).choice(clients, number)]


@dataclass(frozen=True)
class Everyone:
    """Full participation."""

    def __call__(self, round: int, clients: int, seed: int) -> list[int]:
        return list(range(clients))


@dataclass(frozen=True)
class Bernoulli:
    """Each client by itself with probability ``p``; drawn again while nobody is selected."""

    p: float

    def __post_init__(self) -> None:
        if not 0 < self.p <= 1:
            raise ValueError(f"p must be in (0, 1]; got {self.p}")

    def __call__(self, round: int, clients: int, seed: int) -> list[int]:
        draws = stream(seed, "participation", round)
        while True:
            chosen = (draws.uniform(clients) < self.p).nonzero()[:, 0].tolist()
            if chosen:
                return [int(i) for i in chosen]


@dataclass(frozen=True)
class Cyclic:
    """The clients in turn, so many a round, whatever the seed; after n / count rounds all have taken part."""

    fraction: float | None = None
    count: int | None = None

    def __call__(self, round: int, clients: int, seed: int) -> list[int]:
        number = _count(self.fraction, self.count, clients)
        return sorted((round * number + k) % clients for k in range(number))


@dataclass(frozen=True)
class Available:
    """At most ``count`` of the clients for which ``available(client, round)`` holds, drawn uniformly.

    Raises ValueError for a round in which nobody is available.
    """

    available: Callable[[int, int], bool]
    count: int

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"count must be >= 1; got {self.count}")

    def __call__(self, round: int, clients: int, seed: int) -> list[int]:
        there = [client for client in range(clients) if self.available(client, round)]
        if not there:
            raise ValueError(f"available must hold for at least one client; it holds for none in round {round}")
        chosen = stream(seed, "participation", round).choice(len(there), min(self.count, len(there)))
        return [there[int(i)] for i in chosen]
