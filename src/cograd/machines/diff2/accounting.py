"""What DIFF2's releases cost in privacy: zero-concentrated DP in closed form, and a second opinion.

Neighbouring data sets differ by *replacing* one record of one worker, so a clipped mean over n records has
sensitivity 2 C / n. A *noise multiplier* z is the noise's standard deviation over that sensitivity. A Gaussian
release of multiplier z is 1 / (2 z^2)-zCDP; the rho of releases add up, adaptively chosen ones too, and

    epsilon = rho + 2 sqrt(rho ln(1 / delta)),    rho = (sqrt(ln(1 / delta) + epsilon) - sqrt(ln(1 / delta)))^2.

Tools for DP-SGD usually mean adding or removing a record, where the sensitivity is half as large: their noise
multiplier for the same noise is 2 z.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np

Accounting = Literal["zcdp", "rdp", "pld"]

ORDERS = tuple(float(a) for a in (*range(2, 21), 24, 28, 32, 48, 64, 128))
"""Orders of Renyi DP at which sub-sampled releases are composed."""


def epsilon_of(rho: float, delta: float) -> float:
    """The epsilon that rho-zCDP implies at ``delta``."""
    return rho + 2 * math.sqrt(rho * math.log(1 / delta))


def rho_of(epsilon: float, delta: float) -> float:
    """The rho whose `epsilon_of` is ``epsilon``."""
    log = math.log(1 / delta)
    return (math.sqrt(log + epsilon) - math.sqrt(log)) ** 2


@dataclass(frozen=True)
class Releases:
    """``count`` Gaussian releases of one noise multiplier, of a mean over ``batch`` of ``records`` records.

    The batch is drawn without replacement and kept secret; all records where the two are equal.
    """

    count: int
    multiplier: float
    batch: int = 1
    records: int = 1

    @property
    def sampled(self) -> bool:
        return self.batch < self.records and self.count > 0

    @property
    def rho(self) -> float:
        """zCDP, without what sampling gains."""
        if self.count == 0:
            return 0.0
        return self.count / (2 * self.multiplier**2) if self.multiplier else math.inf

    def rdp(self) -> np.ndarray:
        """Renyi DP at `ORDERS`."""
        if self.sampled and self.multiplier:
            return self.count * _sampled_rdp(self.batch, self.records, self.multiplier)
        return np.array(ORDERS) * self.rho

    def event(self) -> Any:
        """As dp-accounting writes it."""
        events = _dp_accounting()
        one = events.GaussianDpEvent(self.multiplier)
        if self.sampled:
            one = events.SampledWithoutReplacementDpEvent(self.records, self.batch, one)
        return events.SelfComposedDpEvent(one, self.count)


@dataclass(frozen=True)
class PrivacySpent:
    """What a worker's records have been released through so far.

    ``exposed``: something was published without noise, so that no epsilon is finite.
    """

    releases: tuple[Releases, ...]
    delta: float
    exposed: bool = False

    @property
    def rho(self) -> float:
        """zCDP of all releases, without what sampling gains."""
        return math.inf if self.exposed else sum(r.rho for r in self.releases)

    def epsilon(self, delta: float | None = None) -> float:
        """Epsilon at ``delta`` (default: the plan's). Closed form; with sub-sampled releases (BVR-L-SGD) the
        smaller of that and Renyi DP of sampling without replacement, by dp-accounting.

        Raises ValueError for a delta outside (0, 1), ImportError if dp-accounting is needed and missing.
        """
        delta = self.delta if delta is None else delta
        if not 0 < delta < 1:
            raise ValueError(f"delta must be in (0, 1); got {delta}")
        if self.rho == 0 or math.isinf(self.rho):
            return self.rho
        bound = epsilon_of(self.rho, delta)
        return min(bound, self._sampled(delta)) if any(r.sampled for r in self.releases) else bound

    def _sampled(self, delta: float) -> float:
        from dp_accounting.rdp.rdp_privacy_accountant import compute_epsilon

        return float(compute_epsilon(ORDERS, sum(r.rdp() for r in self.releases), delta)[0])

    def second_opinion(self, method: Accounting, delta: float | None = None) -> float:
        """Epsilon of the same releases by dp-accounting alone. Needs the extra ``privacy``.

        ``zcdp``: its Renyi divergences, by the conversion that the closed form is the minimum of; ``rdp``: by
        its own, sharper conversion; ``pld``: privacy loss distributions, the tightest (full batches only). Of
        sub-sampled releases this is no independent opinion, since `epsilon` asks the same library.

        Raises ValueError for another method, and for ``pld`` where releases are sub-sampled.
        """
        if method not in ("zcdp", "rdp", "pld"):
            raise ValueError(f"method must be 'zcdp', 'rdp' or 'pld'; got {method!r}")
        delta = self.delta if delta is None else delta
        events = _dp_accounting()
        if method == "pld":
            if any(r.sampled for r in self.releases):
                raise ValueError("method 'pld' has no sampling without replacement; use 'rdp'")
            from dp_accounting.pld.pld_privacy_accountant import PLDAccountant

            # Its REPLACE_ONE doubles the shift, which here is in the sensitivity already.
            accountant = PLDAccountant(neighboring_relation=events.NeighboringRelation.ADD_OR_REMOVE_ONE)
        else:
            from dp_accounting.rdp.rdp_privacy_accountant import RdpAccountant

            accountant = RdpAccountant(neighboring_relation=events.NeighboringRelation.REPLACE_ONE)
        for releases in self.releases:
            if releases.count:
                accountant.compose(releases.event())
        if self.exposed:
            return math.inf
        if method == "zcdp":
            curve = zip(accountant.orders, accountant.rdp, strict=True)
            return float(min(r + math.log(1 / delta) / (a - 1) for a, r in curve))
        return float(accountant.get_epsilon(delta))


@lru_cache(maxsize=256)
def _sampled_rdp(batch: int, records: int, multiplier: float) -> np.ndarray:
    """Renyi DP at `ORDERS` of one Gaussian release on a batch drawn without replacement (replacing)."""
    events = _dp_accounting()
    from dp_accounting.rdp.rdp_privacy_accountant import RdpAccountant

    accountant = RdpAccountant(ORDERS, neighboring_relation=events.NeighboringRelation.REPLACE_ONE)
    one = events.GaussianDpEvent(multiplier)
    accountant.compose(events.SampledWithoutReplacementDpEvent(records, batch, one))
    return np.asarray(accountant.rdp)


def _dp_accounting() -> Any:
    try:
        import dp_accounting
    except ImportError:
        raise ImportError("this needs dp-accounting: pip install 'cograd[privacy]'") from None
    return dp_accounting
