"""Time: how long a round lasts, delays of workers, and a clock that runs a scheme on delays alone.

The round protocol. Let kappa be the time of the fastest worker. At (1 + mu) kappa those that have not finished
are stragglers. If the scheme's straggler model allows them, the round ends and their results are lost. Else the
master *waits out*: it admits further workers in order of arrival until the pattern is allowed. (``wait="all"``:
until all are there, as the released simulator does.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from cograd.core.streams import Key, stream
from cograd.machines.gradient_coding.codes import Mask
from cograd.machines.gradient_coding.schemes import Scheme

Seconds = NDArray[np.float64]
Wait = Literal["conforming", "all"]

NORMAL = (1.0, 1.094, 1.122, 1.157, 1.214, 1.353, 1.902, 2.0)
STRAGGLING = (2.0, 2.04, 2.09, 2.24, 2.46, 2.72, 3.29, 4.13)
QUANTILES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)
"""Time over the fastest worker's, at these quantiles, of workers that straggle and of those that do not."""


@dataclass(frozen=True, eq=False)
class Trace:
    """Seconds that every worker took in every round, (rounds, n), at a load.

    Raises ValueError unless ``seconds`` are two-dimensional, positive and finite, and load >= 0.
    """

    seconds: Seconds
    load: float = 0.0

    def __post_init__(self) -> None:
        if self.seconds.ndim != 2 or not self.seconds.size:
            raise ValueError(f"seconds must have shape (rounds, n); got {self.seconds.shape}")
        if not bool((np.isfinite(self.seconds) & (self.seconds > 0)).all()):
            raise ValueError("seconds must be positive and finite")
        if not self.load >= 0:
            raise ValueError(f"load must be >= 0; got {self.load}")

    @property
    def n(self) -> int:
        return int(self.seconds.shape[1])

    def at(self, load: float, slope: float) -> Seconds:
        """The seconds at another load, ``slope`` seconds a unit of load: never below a tenth of the
        original."""
        return np.maximum(self.seconds + slope * (load - self.load), self.seconds / 10)


@dataclass(frozen=True)
class GilbertElliott:
    """Delays of workers that straggle in bursts: each is a Markov chain of its own.

    A worker that is not straggling starts to with probability ``enter`` a round; one that is goes on with
    ``stay``. Its time is ``fastest`` seconds times a factor drawn from quantiles, of `STRAGGLING` or of
    `NORMAL`. The defaults were fitted to a public trace of 256 AWS Lambda workers without load: 5.1 % straggle,
    90 % of the bursts last one round.

    Raises ValueError unless enter and stay are in [0, 1) and fastest > 0.
    """

    enter: float = 0.048
    stay: float = 0.099
    fastest: float = 0.558

    def __post_init__(self) -> None:
        for name, value in (("enter", self.enter), ("stay", self.stay)):
            if not 0 <= value < 1:
                raise ValueError(f"{name} must be in [0, 1); got {value}")
        if not self.fastest > 0:
            raise ValueError(f"fastest must be > 0 seconds; got {self.fastest}")

    @property
    def straggling(self) -> float:
        """Share of time that a worker straggles."""
        return self.enter / (1 + self.enter - self.stay)

    def trace(self, rounds: int, n: int, *key: Key) -> Trace:
        """A draw of the stream of a key, at load 0."""
        draws = stream(*key, "gilbert-elliott").numpy
        chances = draws.random((rounds, n))
        slow = np.empty((rounds, n), dtype=bool)
        slow[0] = chances[0] < self.straggling
        for r in range(1, rounds):
            slow[r] = chances[r] < np.where(slow[r - 1], self.stay, self.enter)
        level = draws.random((rounds, n))
        factor = np.where(slow, np.interp(level, QUANTILES, STRAGGLING), np.interp(level, QUANTILES, NORMAL))
        return Trace(self.fastest * factor)


def end_of_round(scheme: Scheme, seconds: Seconds, mu: float, wait: Wait) -> tuple[float, bool]:
    """When the coming round of a scheme ends if worker i takes ``seconds[i]``, and whether it was waited out.

    With nobody late that is when the slowest has finished; if there is nothing to do, 0.
    """
    busy = scheme.busy()
    if not busy.any():
        return 0.0, False
    times = seconds[busy]
    end = min((1 + mu) * float(times.min()), float(times.max()))
    late = np.sort(times[times > end])
    if scheme.conforms(busy & (seconds > end)):
        return end, False
    if wait == "all":
        return float(late[-1]), True
    # the fewer are missing, the more conforms: the first arrival that suffices is found by halving
    low, high = 0, len(late) - 1
    while low < high:
        middle = (low + high) // 2
        if scheme.conforms(busy & (seconds > late[middle])):
            high = middle
        else:
            low = middle + 1
    return float(late[low]), True


def check_protocol(mu: float, wait: str) -> None:
    """Raise ValueError unless mu >= 0 and wait is ``conforming`` or ``all``."""
    if not mu >= 0:
        raise ValueError(f"mu must be >= 0; got {mu}")
    if wait not in ("conforming", "all"):
        raise ValueError(f"wait must be 'conforming' or 'all'; got {wait!r}")


@dataclass(frozen=True, eq=False)
class Timeline:
    """What the clock saw: seconds of each round, which rounds were waited out, who straggled (rounds, n)."""

    seconds: Seconds
    waited: Mask
    stragglers: Mask

    @property
    def total(self) -> float:
        return float(self.seconds.sum())

    @property
    def waits(self) -> int:
        return int(self.waited.sum())


def run_clock(
    scheme: Scheme,
    seconds: Seconds,
    jobs: int,
    mu: float = 1.0,
    wait: Wait = "conforming",
    *,
    at_most: float = np.inf,
) -> Timeline | None:
    """Run a scheme from its first round over ``jobs`` jobs, on delays (rounds, n) at the scheme's load.

    Gives up and returns None when it is certain to take more than ``at_most`` seconds. Raises ValueError if the
    delays are of another number of workers or of fewer rounds than ``jobs + delay``.
    """
    check_protocol(mu, wait)
    rounds = jobs + scheme.delay
    if seconds.ndim != 2 or seconds.shape[1] != scheme.n or len(seconds) < rounds:
        raise ValueError(
            f"seconds must have shape (at least jobs + delay = {rounds}, n = {scheme.n}); got {seconds.shape}"
        )
    scheme.restart(jobs)
    lasted, waited = np.zeros(rounds), np.zeros(rounds, dtype=bool)
    stragglers = np.zeros((rounds, scheme.n), dtype=bool)
    # seconds from a round on, at least: no round with a new job is shorter than its fastest worker
    fastest = np.zeros(rounds + 1)
    fastest[:jobs] = np.cumsum(seconds[:jobs].min(1)[::-1])[::-1]
    left = at_most * (1 + 1e-12)
    for r in range(rounds):
        lasted[r], waited[r] = end_of_round(scheme, seconds[r], mu, wait)
        stragglers[r] = scheme.busy() & (seconds[r] > lasted[r])
        scheme.complete(r, ~stragglers[r])
        left -= lasted[r]
        if left < fastest[r + 1]:
            return None
    return Timeline(lasted, waited, stragglers)
