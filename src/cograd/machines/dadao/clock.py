"""The events of all nodes and edges, as one process: n + |E| independent Poisson clocks, superposed.

The superposition of Poisson processes is a Poisson process of the summed rate whose events belong to each with
probability proportional to its rate. That is drawn in blocks, vectorised; block k is a function of (seed, k),
so that a clock can be set anywhere without drawing what came before.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from cograd.core.streams import stream
from cograd.machines.dadao.rates import GossipRates

BLOCK = 4096
"""Events drawn at once."""


class Event(NamedTuple):
    """At ``time``, a gradient of node i, or an averaging of i with j >= 0."""

    time: float
    i: int
    j: int = -1

    @property
    def kind(self) -> str:
        return "grad" if self.j < 0 else "edge"


class PoissonClock:
    """A gradient clock of rate 1 at each of n nodes, and each edge's clock."""

    def __init__(self, rates: GossipRates, seed: int = 0) -> None:
        self.rates, self.seed = rates, seed
        self._total = rates.n + rates.total
        self._shares = [np.cumsum(r) / max(r.sum(), 1e-300) for r in rates.rates]
        self._draw(0, 0.0)

    def until(self, time: float) -> Iterator[Event]:
        """The events up to a time, in order; what was yielded is over, the rest comes at the next call."""
        while True:
            while self._position < BLOCK:
                event = self._block[self._position]
                if event.time > time:
                    return
                self._position += 1
                yield event
            self._draw(self._number + 1, self._block[-1].time)

    def _draw(self, number: int, begin: float) -> None:
        """Draw a block whose first waiting time begins at ``begin``."""
        draw = stream(self.seed, "poisson clock", number).numpy
        times = begin + np.cumsum(draw.exponential(1 / self._total, BLOCK))
        which = draw.random(BLOCK) * self._total
        i, j = which.astype(int), np.full(BLOCK, -1)
        edge = which >= self.rates.n
        i[edge], j[edge] = self._edges(times[edge], which[edge] - self.rates.n).T
        columns = (times.tolist(), i.tolist(), j.tolist())
        self._block = list(map(Event._make, zip(*columns, strict=True)))
        self._number, self._begin, self._position = number, begin, 0

    def _edges(self, times: np.ndarray, which: np.ndarray) -> np.ndarray:
        """The edges (events, 2) of averagings at these times; ``which`` is uniform in [0, total)."""
        rates, ends = self.rates, np.empty((len(times), 2), dtype=np.int64)
        turn = (times / rates.period).astype(int) % len(rates.graphs)
        for k in np.unique(turn):
            at = turn == k
            chosen = np.searchsorted(self._shares[k], which[at] / rates.total, side="right")
            ends[at] = rates.graphs[k].ends[np.minimum(chosen, len(rates.rates[k]) - 1)]
        return ends

    def state_dict(self) -> dict[str, Any]:
        """Where the clock stands."""
        return {"seed": self.seed, "block": self._number, "begin": self._begin, "position": self._position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seed = int(state["seed"])
        self._draw(int(state["block"]), float(state["begin"]))
        self._position = int(state["position"])
