"""Choosing a scheme's parameters from a probe: some rounds of delays, and what a unit of load costs (Sec.
4)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cograd.machines.gradient_coding.clock import Trace, Wait, check_protocol, run_clock
from cograd.machines.gradient_coding.schemes import GC, MSGC, SRSGC, Scheme, Uncoded

WINDOW = 9
"""Longest W that is tried for selective repetition."""

SPREAD = 16
"""Of the candidates in order of load, one in so many is tried first."""


def fit_slope(loads: Sequence[float], seconds: Sequence[float]) -> tuple[float, float]:
    """The line runtime = base + slope * load by least squares, from mean runtimes at some loads: (base, slope).

    Raises ValueError for fewer than two different loads.
    """
    if len(set(loads)) < 2 or len(loads) != len(seconds):
        raise ValueError(f"two different loads or more are needed, with a time each; got {loads}, {seconds}")
    slope, base = np.polyfit(loads, seconds, 1)
    return float(base), float(slope)


def _uncoded(n: int, max_delay: int) -> Iterator[Scheme]:
    yield Uncoded(n)


def _gc(n: int, max_delay: int) -> Iterator[Scheme]:
    return (GC(n, s) for s in range(n))


def _repetition(n: int, max_delay: int) -> Iterator[Scheme]:
    return (GC(n, s, "repetition") for s in range(n) if n % (s + 1) == 0)


def _sr_sgc(n: int, max_delay: int) -> Iterator[Scheme]:
    for B in range(1, max_delay + 1):
        for W in range(B + 1, WINDOW + 1, B):
            yield from (SRSGC(n, B, W, lam) for lam in range(n + 1))


def _pairs(max_delay: int) -> Iterator[tuple[int, int]]:
    """B and W of M-SGC with W - 2 + B <= max_delay."""
    return ((B, W) for W in range(2, max_delay + 2) for B in range(1, W) if max_delay >= W - 2 + B)


def _m_sgc(n: int, max_delay: int) -> Iterator[Scheme]:
    for (B, W), lam in itertools.product(_pairs(max_delay), range(n + 1)):
        yield MSGC(n, B, W, lam)


def _m_sgc_bursty(n: int, max_delay: int) -> Iterator[Scheme]:
    for (B, W), lam in itertools.product(_pairs(max_delay), range(n + 1)):
        yield MSGC(n, B, W, lam, model="bursty")


def _m_sgc_repetition(n: int, max_delay: int) -> Iterator[Scheme]:
    for (B, W), lam in itertools.product(_pairs(max_delay), range(n)):
        if n % (lam + 1) == 0:
            yield MSGC(n, B, W, lam, "repetition")


FAMILIES: Mapping[str, Callable[[int, int], Iterator[Scheme]]] = {
    "uncoded": _uncoded,
    "gc": _gc,
    "gc-rep": _repetition,
    "sr-sgc": _sr_sgc,
    "m-sgc": _m_sgc,
    "m-sgc-bursty": _m_sgc_bursty,
    "m-sgc-rep": _m_sgc_repetition,
}
"""All schemes of a kind on n workers whose delay is at most ``max_delay``."""


@dataclass(frozen=True)
class Choice:
    """The scheme with the least time on the probe, that time, and the best of each family."""

    scheme: Scheme
    seconds: float
    families: Mapping[str, tuple[Scheme, float]]


def select(
    trace: Trace,
    slope: float,
    max_delay: int,
    schemes: Sequence[str] = ("gc", "sr-sgc", "m-sgc"),
    *,
    mu: float = 1.0,
    wait: Wait = "conforming",
) -> Choice:
    """Simulate every candidate on a probe's delays, moved to its load; take the fastest.

    ``slope`` is in seconds a unit of load, see `fit_slope`. ``max_delay`` is at most M - 1 for M models in
    turn. Raises ValueError for a family that is not in `FAMILIES`, a probe of max_delay rounds or fewer, or a
    negative slope or delay.
    """
    check_protocol(mu, wait)
    unknown = [name for name in schemes if name not in FAMILIES]
    if unknown or not schemes:
        raise ValueError(f"schemes must be some of {', '.join(FAMILIES)}; got {list(schemes)}")
    if not slope >= 0 or max_delay < 0:
        raise ValueError(f"slope and max_delay must be >= 0; got {slope}, {max_delay}")
    jobs = len(trace.seconds) - max_delay
    if jobs < 1:
        raise ValueError(
            f"the probe must have more than max_delay = {max_delay} rounds; got {len(trace.seconds)}"
        )
    families = {}
    for name in schemes:
        candidates = sorted(FAMILIES[name](trace.n, max_delay), key=lambda s: s.load)
        best: tuple[Scheme, float] | None = None
        for scheme in (*candidates[::SPREAD], *candidates):  # a good one early makes the others give up early
            limit = best[1] if best else np.inf
            timeline = run_clock(scheme, trace.at(scheme.load, slope), jobs, mu, wait, at_most=limit)
            if timeline is not None and (timeline.total, scheme.load) < (
                limit,
                best[0].load if best else np.inf,
            ):
                best = scheme, timeline.total
        if best is not None:
            families[name] = best
    if not families:
        raise ValueError(f"no scheme of {list(schemes)} has a delay of at most {max_delay}")
    scheme, seconds = min(families.values(), key=lambda found: found[1])
    return Choice(scheme, seconds, families)
