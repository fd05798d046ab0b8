"""Disparities of a joint, what they decompose into, and how much of them is chance."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import numpy as np

from cograd.clients.aglfop.information import conditional, mutual, unique
from cograd.clients.aglfop.joint import ClientJoint
from cograd.core.checks import check
from cograd.core.streams import stream

NATS = math.log(2)
"""Nats in a bit."""

FIVE = ("global_", "local", "unique", "redundant", "masked")


@dataclass(frozen=True)
class Disparities:
    """What predictions tell about the group, in bits, or in nats where ``bits`` is False.

    ``global_`` is I(Z;H), ``local`` is I(Z;H|S), and

        global_ = unique + redundant        local = unique + masked

    ``unique`` is in the predictions alone, whatever the client; ``redundant`` is what the client tells of the
    group as well, which no client sees in its own data; ``masked`` shows inside clients alone. ``co`` is
    redundant - masked = global_ - local. Of the clients themselves: ``group_client`` I(Z;S),
    ``prediction_client`` I(H;S), and ``unique_client`` = I(Z;S) - redundant, the unique information of S about
    Z.

    ``parity_global`` is the statistical parity gap: the largest total variation distance between the
    predictions of two groups, |P(H=1|Z=1) - P(H=1|Z=0)| where both are binary. ``parity_local`` has one for
    each client, NaN for a client with fewer than two groups. ``pinsker`` bounds parity_global by the global
    disparity (lemma 1). ``gap`` is what ``unique`` may be too large by.
    """

    global_: float
    local: float
    unique: float
    redundant: float
    masked: float
    co: float
    group_client: float
    prediction_client: float
    unique_client: float
    parity_global: float
    parity_local: tuple[float, ...]
    pinsker: float
    gap: float
    bits: bool

    def to_dict(self) -> dict[str, float]:
        """All figures but the clients' own."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("parity_local", "bits")}


def disparities(joint: ClientJoint, *, bits: bool = True) -> Disparities:
    """Measure a joint that has predictions. Raises ValueError for one that has not."""
    p = joint.over("szh")
    unit = NATS if bits else 1.0
    g, local = float(mutual(p.sum(0))), float(conditional(p))
    found = unique(p)
    u = min(float(found.value), g, local)  # P itself, and the product, are among the Q
    zs, hs = float(mutual(p.sum(2))), float(mutual(p.sum(1)))
    return Disparities(
        global_=g / unit,
        local=local / unit,
        unique=u / unit,
        redundant=(g - u) / unit,
        masked=(local - u) / unit,
        co=(g - local) / unit,
        group_client=zs / unit,
        prediction_client=hs / unit,
        unique_client=(zs - (g - u)) / unit,
        parity_global=parity(p.sum(0)),
        parity_local=tuple(parity(client) for client in p),
        pinsker=pinsker(g, p.sum((0, 2))),
        gap=float(found.gap) / unit,
        bits=bits,
    )


def parity(p: np.ndarray) -> float:
    """The statistical parity gap of a joint (Z, H): see `Disparities`. NaN for fewer than two groups."""
    mass = p.sum(1)
    rates = p[mass > 0] / mass[mass > 0, None]
    if len(rates) < 2:
        return math.nan
    return float(np.abs(rates[:, None] - rates[None]).sum(2).max() / 2)


def pinsker(nats: float, groups: np.ndarray) -> float:
    """A bound on `parity` by I(Z;H) in nats and the shares P(z) of the groups (lemma 1).

    For two groups, of shares a and 1 - a, it is sqrt(I / 2) / (2 a (1 - a)), as 2 a (1 - a) times the gap is
    the total variation distance of P(z,h) from P(z) P(h). Two of more groups have at most I / (P(z) + P(z'))
    of information among themselves; the bound is the largest of all pairs. NaN for fewer than two groups.
    """
    shares = groups[groups > 0]
    if len(shares) < 2:
        return math.nan
    first, second = np.triu_indices(len(shares), 1)
    pair = shares[first] + shares[second]
    bounds = np.sqrt(nats / pair / 2) * pair**2 / (2 * shares[first] * shares[second])
    return float(bounds.max())


@dataclass(frozen=True)
class Baseline:
    """Disparities of predictions that are dealt anew, in the units of `Disparities`: what chance alone gives.

    ``draws`` holds the five numbers by name, one a draw. ``bias`` is the first-order expectation of the global
    and of the local one, (Z - 1)(H - 1) / 2n for the whole and for each client.
    """

    measured: Disparities
    draws: dict[str, np.ndarray]
    bias: tuple[float, float]

    def p_value(self, name: str) -> float:
        """How often chance gives at least as much as was measured; never below 1 / (draws + 1)."""
        above = int((self.draws[name] >= getattr(self.measured, name)).sum())
        return (above + 1) / (len(self.draws[name]) + 1)

    def mean(self, name: str) -> float:
        return float(self.draws[name].mean())

    def quantile(self, name: str, q: float) -> float:
        return float(np.quantile(self.draws[name], q))


def permutation_baseline(joint: ClientJoint, *, draws: int = 200, seed: int = 0, bits: bool = True) -> Baseline:
    """Deal the predictions to the examples at random, many times, and measure each time.

    The numbers of a small sample are too large: mutual information that is counted is never negative. Below
    some 500 examples compare what was measured with this. Raises ValueError for a joint of probabilities.
    """
    check(("draws", draws, ">= 1", draws >= 1))
    shape = joint.over("szh").shape
    counts = joint.counts.sum(2) if joint.axes == "szyh" else joint.counts
    n, source = int(counts.sum()), stream(seed, "permutation baseline")
    held, predicted = (np.repeat(np.arange(c.size), c.ravel()) for c in (counts.sum(2), counts.sum((0, 1))))
    tables = np.empty((draws, *shape))
    for table in tables:
        dealt = predicted[source.permutation(n).numpy()]
        table[:] = np.bincount(held * shape[2] + dealt, minlength=table.size).reshape(shape) / n
    unit = NATS if bits else 1.0
    g, local = mutual(tables.sum(1)), conditional(tables)
    u = np.minimum(np.minimum(unique(tables).value, g), local)
    five = dict(zip(FIVE, (g, local, u, g - u, local - u), strict=True))

    def freedom(table: np.ndarray) -> int:
        return int((np.count_nonzero(table.sum(1)) - 1) * (np.count_nonzero(table.sum(0)) - 1))

    once, each = freedom(counts.sum(0)), sum(freedom(client) for client in counts if client.any())
    return Baseline(
        disparities(joint, bits=bits),
        {name: values / unit for name, values in five.items()},
        (once / (2 * n * unit), each / (2 * n * unit)),
    )
