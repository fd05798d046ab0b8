"""The plan of a DIFF2 run: rounds of each kind, and the noise that makes them (epsilon, delta)-private."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal

from cograd.core.streams import stream
from cograd.machines.diff2.accounting import PrivacySpent, Releases, rho_of
from cograd.machines.diff2.routines import Output, Routine, output_checked

Release = Literal["aggregate", "message"]
Kind = Literal["full", "difference"]


@dataclass(frozen=True)
class Diff2Plan:
    """Rounds, clipping norms and calibrated noise of `Diff2`, fixed before any record is looked at.

    ``release`` is what an attacker sees of a round:

    - ``aggregate``: the average alone, because the sum is trusted or by secure aggregation. Each worker adds
      its share of the noise; all of them must take part.
    - ``message``: every worker's message, as a curious server does. The average is noisier by about sqrt(P).

    The budget rho (zCDP) is split evenly between restarts and differences, and where the routine makes local
    releases, a third goes to each. The noise multiplier of the local releases is then the smallest that keeps
    every worker within epsilon, given the (public) rounds in which it is selected.

    Args:
        rounds: R >= 1.
        restart_every: T >= 1; a full gradient is released every T rounds. 1 is DP-GD; more than R is R.
        epsilon: > 0; ``inf`` adds no noise and is not private.
        delta: in (0, 1). A warning where it is not below 1 / (number of records).
        clip: C_1, norm at which a record's gradient is clipped.
        diff_clip: C_2, norm at which its gradient difference is clipped, per unit of distance of the points.
        records: number of records of each worker, in worker order. Public.
        routine: `GDRoutine` or `BVRLocalSGD`.
        release: see above; there is no default, since it decides what is protected.
        output: the last iterate, or the ``random`` one of the theory (uniform over the rounds).
        seed: public; selects workers and the random iterate, and is the seed of noise that is not secure.

    A clip may be ``inf`` only without privacy. Raises ValueError for an argument out of range, ImportError if
    local releases need dp-accounting and it is missing.
    """

    rounds: int
    restart_every: int
    epsilon: float
    delta: float
    clip: float
    diff_clip: float
    records: Sequence[int]
    routine: Routine
    release: Release
    output: Output = "last"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("rounds", "restart_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1; got {getattr(self, name)}")
        if not self.epsilon > 0:
            raise ValueError(f"epsilon must be > 0 (inf: not private); got {self.epsilon}")
        if not 0 < self.delta < 1:
            raise ValueError(f"delta must be in (0, 1); got {self.delta}")
        if self.release not in ("aggregate", "message"):
            raise ValueError(f"release must be 'aggregate' or 'message'; got {self.release!r}")
        output_checked(self.output)
        object.__setattr__(self, "restart_every", min(self.restart_every, self.rounds))
        object.__setattr__(self, "records", tuple(int(n) for n in self.records))
        self._check_records()
        self._check_clips()

    def _check_records(self) -> None:
        if not self.records or min(self.records) < 1:
            raise ValueError(f"records must hold a number >= 1 for each worker; got {self.records}")
        if self.routine.local_batch > min(self.records):
            raise ValueError(
                f"batch_size must be at most the records of every worker, {min(self.records)}; "
                f"got {self.routine.local_batch}"
            )
        if self.delta >= 1 / sum(self.records):
            warnings.warn(
                f"delta = {self.delta:g} is not below 1 / (number of records) = {1 / sum(self.records):.3g}: "
                "it would allow to publish a record now and then",
                stacklevel=4,
            )

    def _check_clips(self) -> None:
        clips = {"clip": self.clip, "diff_clip": self.diff_clip, "diff_clip of the routine": 1.0}
        if self.routine.local_releases:
            clips["diff_clip of the routine"] = self.routine.local_clip
        for name, value in clips.items():
            if not value > 0:
                raise ValueError(f"{name} must be > 0; got {value}")
            if math.isinf(value) and self.private:
                raise ValueError(f"{name} must be finite where epsilon is; got {value}")

    @property
    def private(self) -> bool:
        return math.isfinite(self.epsilon)

    @property
    def workers(self) -> int:
        """P."""
        return len(self.records)

    # Rounds.

    def kind(self, round: int) -> Kind:
        """What round 0, 1, ... releases."""
        return "full" if round % self.restart_every == 0 else "difference"

    def restarts(self, rounds: int | None = None) -> int:
        """K_1: full gradients released in the first ``rounds`` rounds (default: all)."""
        return -(-(self.rounds if rounds is None else rounds) // self.restart_every)

    def differences(self, rounds: int | None = None) -> int:
        """K_2: differences released in the first ``rounds`` rounds (default: all)."""
        return (self.rounds if rounds is None else rounds) - self.restarts(rounds)

    def selected(self, round: int) -> int:
        """p_r: the worker that a local routine runs on in a round, uniform and public."""
        return stream(self.seed, "diff2", "worker", round).integer(self.workers)

    def selections(self, rounds: int | None = None) -> tuple[int, ...]:
        """In how many of the first ``rounds`` rounds (default: all) each worker is selected."""
        chosen = self._chosen[: self.rounds if rounds is None else rounds]
        return tuple(chosen.count(worker) for worker in range(self.workers))

    @cached_property
    def _chosen(self) -> tuple[int, ...]:
        return tuple(self.selected(round) for round in range(self.rounds))

    @cached_property
    def output_round(self) -> int:
        """The round after which the iterate is the result: R, or uniform over 1 .. R."""
        if self.output == "last":
            return self.rounds
        return 1 + stream(self.seed, "diff2", "output").integer(self.rounds)

    # Calibration.

    @cached_property
    def multipliers(self) -> tuple[float, float, float]:
        """z_1, z_2, z_3: noise over sensitivity of a restart, a difference and a local release."""
        if not self.private:
            return (0.0, 0.0, 0.0)
        full, difference = self._full_batch
        return (full, difference, self._local_multiplier if self.routine.local_releases else 0.0)

    @property
    def _share_of_rho(self) -> float:
        """What each kind of release may spend. A hair (1e-9) of rho is left, so that no rounding in a sum of
        epsilons exceeds the budget."""
        kinds = 1 + (self.differences() > 0) + (self.routine.local_releases > 0)
        return rho_of(self.epsilon, self.delta) * (1 - 1e-9) / kinds

    @property
    def _full_batch(self) -> tuple[float, float]:
        rho = self._share_of_rho
        return math.sqrt(self.restarts() / rho / 2), math.sqrt(self.differences() / rho / 2)

    @property
    def _local_multiplier(self) -> float:
        """The smallest z_3 (to 1.4 %) with which no worker exceeds epsilon."""
        others = self._share_of_rho * (1 + (self.differences() > 0))
        most: dict[int, int] = {}  # of workers with as many records, the one selected most spends most
        for records, rounds in zip(self.records, self.selections(), strict=True):
            most[records] = max(most.get(records, 0), rounds * self.routine.local_releases)
        local = tuple(most.items())
        return _smallest_local(self.epsilon, self.delta, others, self.routine.local_batch, local)

    def spent(self, rounds: int | None = None, worker: int = 0) -> PrivacySpent:
        """What the first ``rounds`` rounds (default: all) release of a worker's records.

        With `GDRoutine` that is the same for every worker, and for every number of workers.
        """
        return self._spent(self.rounds if rounds is None else rounds, worker, self.multipliers[2])

    def _spent(self, rounds: int, worker: int, local: float) -> PrivacySpent:
        full, difference = self._full_batch if self.private else (0.0, 0.0)
        releases = [Releases(self.restarts(rounds), full), Releases(self.differences(rounds), difference)]
        if self.routine.local_releases:
            count = self.selections(rounds)[worker] * self.routine.local_releases
            releases.append(Releases(count, local, self.routine.local_batch, self.records[worker]))
        return PrivacySpent(tuple(releases), self.delta)

    # Noise, as standard deviations.

    def worker_sigma1(self, worker: int) -> float:
        """Noise that a worker adds to its message of a restart."""
        return self._share(self.clip, self.multipliers[0], worker)

    def worker_sigma2(self, worker: int) -> float:
        """Noise that a worker adds to its message of a difference, per unit of distance."""
        return self._share(self.diff_clip, self.multipliers[1], worker)

    def _share(self, clip: float, multiplier: float, worker: int) -> float:
        if not self.private:
            return 0.0
        if self.release == "message":
            return 2 * clip * multiplier / self.records[worker]
        # The average's sensitivity is that of the smallest worker's message over P.
        return math.sqrt(self.workers) * 2 * clip * multiplier / (min(self.records) * self.workers)

    @property
    def sigma1(self) -> float:
        """Noise of a restart in v."""
        return self._average(self.worker_sigma1(w) for w in range(self.workers))

    @property
    def sigma2(self) -> float:
        """Noise of a difference in v, per unit of distance."""
        return self._average(self.worker_sigma2(w) for w in range(self.workers))

    @property
    def sigma3(self) -> float:
        """Noise of a local release, per unit of distance."""
        return (
            2 * self.routine.local_clip * self.multipliers[2] / self.routine.local_batch
            if self.private
            else 0.0
        )

    def _average(self, sigmas: Iterable[float]) -> float:
        return math.hypot(*sigmas) / self.workers

    def stability(self, numel: int, lr: float | None = None) -> float:
        """T d (lr sigma_2)^2 for d = ``numel`` parameters (default ``lr``: the routine's); keep it below 1.

        A step's length is lr |v|, and the noise of the next difference is proportional to it: v's second
        moment grows by a factor 1 + d (lr sigma_2)^2 in every round until the next restart. With a local
        routine, the larger of that and the same for its K - 1 local releases.
        """
        lr = self.routine.lr if lr is None else lr
        outer = self.restart_every * numel * (lr * self.sigma2) ** 2
        return max(outer, self.routine.local_releases * numel * (lr * self.sigma3) ** 2)


@lru_cache(maxsize=1024)
def _smallest_local(
    epsilon: float, delta: float, others: float, batch: int, local: tuple[tuple[int, int], ...]
) -> float:
    """The smallest multiplier with which no worker exceeds epsilon, where its full-batch releases spend the rho
    ``others``. ``local``: a worker's records and how many releases over ``batch`` of them it makes."""
    whole = Releases(1, math.sqrt(1 / (2 * others)))
    low, high = -2.0, 14.0  # of log2: epsilon falls as the multiplier grows
    while high - low > 0.02:
        middle = (low + high) / 2
        releases = (Releases(count, 2.0**middle, batch, records) for records, count in local)
        spent = max(PrivacySpent((whole, one), delta).epsilon() for one in releases)
        low, high = (low, middle) if spent <= epsilon else (middle, high)
    return float(2.0**high)
