"""Who computes what in which round, which straggler patterns that survives, and what decodes a job.

A scheme is a state machine over rounds 0, 1, ...; job t starts in round t and must be decoded by the end of
round t + ``delay``. It knows arrivals and not vectors, so that the clock of an experiment with 256 workers and
a training run are driven by the same object:

    scheme.restart(jobs=480)
    while not scheme.done:
        tasks = [scheme.tasks(scheme.round, worker) for worker in range(scheme.n)]
        ...                                          the round protocol asks scheme.conforms(straggling)
        scheme.complete(scheme.round, arrived)       masks of n workers (numpy, bool)
        scheme.ready()                               {job: how it decodes}

The data of a job is cut into chunks of the relative sizes ``shares``. Results that are not coded are added up;
coded ones with the weights that `ready` gives. ``load`` is the largest share of a job's data that a worker
computes in a round, ``lower_bound`` the least that any scheme can do with against the same stragglers, and
``vectors`` the gradient-sized vectors that a worker sends in a round.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cograd.machines.gradient_coding.codes import Code, Mask, code_of, mask_of

Recipe = dict[int, dict[int, float]]
"""How a job decodes: by coded item, the weight of each worker's result."""


class DeadlineMissed(RuntimeError):
    """A job cannot be decoded at the end of its last round: the stragglers were more than the scheme's
    model."""


@dataclass(frozen=True)
class MiniTask:
    """A piece of a job for one worker in one round, answered by one gradient-sized vector.

    ``item`` tells a job's pieces apart: no worker answers the same item of a job twice. A coded task is
    answered with the code's combination of the chunks' gradients, any other with their sum.
    """

    job: int
    item: int
    chunks: tuple[int, ...]
    coded: bool


class Scheme(ABC):
    """What all schemes share: rounds, the history of stragglers, and checks.

    ``remembers`` is the number of rounds whose stragglers `conforms` looks at, with the one that is under way.
    """

    remembers = 1

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.arguments.items())})"
        )

    @property
    @abstractmethod
    def arguments(self) -> dict[str, int | str]:
        """What the scheme was made with, by name."""

    def __init__(self, n: int, delay: int, load: float, shares: NDArray[np.int64], vectors: int) -> None:
        self.n, self.delay, self.load, self.shares, self.vectors = n, delay, load, shares, vectors
        self.restart()

    @property
    def lower_bound(self) -> float:
        """Least load of any scheme against the same stragglers with the same delay."""
        return self.load

    # The run of jobs.

    def restart(self, jobs: int | None = None) -> None:
        """Begin again at round 0, for a number of jobs or (None) without end. ValueError for jobs < 1."""
        if jobs is not None and jobs < 1:
            raise ValueError(f"jobs must be >= 1 or None; got {jobs}")
        self.jobs, self.round = jobs, 0
        self.history = np.zeros((self.remembers - 1, self.n), dtype=bool)
        self._arrivals: dict[int, Mask] = {}
        self._finished: dict[int, Mask] = {}
        self._plan()

    @property
    def rounds(self) -> int | None:
        """Rounds that the jobs take, ``jobs + delay``; None without end."""
        return None if self.jobs is None else self.jobs + self.delay

    @property
    def done(self) -> bool:
        return self.round == self.rounds

    def exists(self, job: int) -> bool:
        """Whether there is a job of that number."""
        return job >= 0 and (self.jobs is None or job < self.jobs)

    @property
    def in_flight(self) -> list[int]:
        """Jobs that have begun and are not done: a later round may ask for more of them."""
        return sorted(self._arrivals)

    def _plan(self) -> None:
        """Work out, once for all workers, what the coming round asks of them."""
        return

    @abstractmethod
    def busy(self) -> Mask:
        """The workers that have something to do in the coming round (mask of n)."""

    @abstractmethod
    def tasks(self, round: int, worker: int) -> list[MiniTask]:
        """What a worker does in the coming round, in the order in which it answers."""

    @abstractmethod
    def task(self, worker: int, job: int, item: int) -> MiniTask:
        """A worker's task of a job by its item."""

    @property
    @abstractmethod
    def code(self) -> Code:
        """The code of the coded items."""

    def conforms(self, straggling: Mask) -> bool:
        """Whether the round may end without these workers' results (mask of n; idle workers do not count)."""
        straggling = mask_of("straggling", straggling, self.n) & self.busy()
        return self._conforms(np.concatenate([self.history, straggling[None]]))

    @abstractmethod
    def _conforms(self, window: Mask) -> bool:
        """The same for the stragglers of the last rounds, (rounds, n)."""

    def complete(self, round: int, arrived: Mask) -> None:
        """End the round with the results of these workers (mask of n).

        Raises DeadlineMissed, and changes nothing, if the job that is due could then not be decoded; ValueError
        for another round than the one under way.
        """
        self._check_round(round)
        arrived = mask_of("arrived", arrived, self.n)
        straggling = self.busy() & ~arrived
        after, finished = self._after(arrived)
        due = round - self.delay
        if self.exists(due) and due in after and due not in finished:
            raise DeadlineMissed(
                f"job {due} cannot be decoded at the end of round {round}: {self._lack(after[due])}"
            )
        counted = self._counted(straggling)
        self._finished = {job: after.pop(job) for job in finished}
        self._arrivals = after
        if self.remembers > 1:
            self.history = np.concatenate([self.history[1:], counted[None]])
        self.round += 1
        self._plan()

    def _counted(self, straggling: Mask) -> Mask:
        """Those of the coming round's stragglers that later rounds must reckon with."""
        return straggling

    @abstractmethod
    def _after(self, arrived: Mask) -> tuple[dict[int, Mask], list[int]]:
        """The jobs in flight at the end of this round, with what has arrived of each, (n, items), and those of
        them that can be decoded."""

    def _lack(self, arrived: Mask) -> str:
        return f"results of {arrived.sum(0).tolist()} of {self.n} workers are there, by item, for {self!r}"

    def ready(self) -> dict[int, Recipe]:
        """The jobs that the last round completed, and the weights of their coded items (none if nothing is
        coded)."""
        return {job: self._recipe(arrived) for job, arrived in self._finished.items()}

    def _recipe(self, arrived: Mask) -> Recipe:
        recipe = {}
        for item in self.coded_items:
            weights = self.code.weights(np.ascontiguousarray(arrived[:, item]))
            used = np.flatnonzero(weights).tolist()
            recipe[item] = {worker: float(weights[worker]) for worker in used}
        return recipe

    @property
    @abstractmethod
    def coded_items(self) -> range:
        """The items whose results are coded."""

    def _check_round(self, round: int) -> None:
        if self.done:
            raise ValueError(f"round must be below {self.rounds}, all jobs are done; got {round}")
        if round != self.round:
            raise ValueError(f"round must be the one under way, {self.round}; got {round}")

    # Checkpoints.

    def state_dict(self) -> dict[str, Any]:
        """Where the run is, as tensors and numbers. Take it after `ready` was used."""
        return {
            "scheme": repr(self),
            "jobs": self.jobs,
            "round": self.round,
            "history": torch.from_numpy(self.history.copy()),
            "arrivals": {job: torch.from_numpy(mask.copy()) for job, mask in self._arrivals.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue there. Raises ValueError for the state of another scheme (or number of workers)."""
        if state["scheme"] != repr(self):
            raise ValueError(f"the state is of {state['scheme']}; this is {self!r}")
        self.restart(state["jobs"])
        self.round = int(state["round"])
        self.history = state["history"].numpy().copy()
        self._arrivals = {int(job): mask.numpy().copy() for job, mask in state["arrivals"].items()}
        self._plan()


class GC(Scheme):
    """Gradient coding (Tandon et al. 2017): every job in one round, at load (s + 1) / n, without s stragglers.

    Args:
        n: workers.
        s: stragglers of a round.
        code: ``cyclic``, ``mds`` or ``repetition``, see `codes`; with repetition, a round may end when every
            group has a result.
    """

    def __init__(self, n: int, s: int, code: str = "cyclic") -> None:
        self.s, self.code_name, self._code = s, code, code_of(code, n, s)
        super().__init__(n, 0, (s + 1) / n, np.ones(n, dtype=np.int64), 1)

    @property
    def arguments(self) -> dict[str, int | str]:
        return {"n": self.n, "s": self.s, "code": self.code_name}

    @property
    def code(self) -> Code:
        return self._code

    @property
    def coded_items(self) -> range:
        return range(1 if self.s else 0)

    def busy(self) -> Mask:
        return np.ones(self.n, dtype=bool)

    def task(self, worker: int, job: int, item: int = 0) -> MiniTask:
        return MiniTask(job, 0, self.code.assignment(worker), coded=self.s > 0)

    def tasks(self, round: int, worker: int) -> list[MiniTask]:
        self._check_round(round)
        return [self.task(worker, round)]

    def _conforms(self, window: Mask) -> bool:
        return self.code.tolerates(window[-1])

    def _after(self, arrived: Mask) -> tuple[dict[int, Mask], list[int]]:
        finished = [self.round] if self.code.tolerates(~arrived) else []
        return {self.round: arrived[:, None]}, finished


class Uncoded(GC):
    """Every worker one chunk, no redundancy: all must arrive."""

    def __init__(self, n: int) -> None:
        super().__init__(n, 0)

    @property
    def arguments(self) -> dict[str, int | str]:
        return {"n": self.n}


class _Sequential(Scheme):
    """A scheme with the parameters B, W and lambda of the bursty model."""

    def __init__(
        self,
        n: int,
        B: int,
        W: int,
        lam: int,
        code: str,
        *,
        load: float,
        delay: int,
        shares: NDArray[np.int64],
        vectors: int,
    ) -> None:
        self.B, self.W, self.lam, self.code_name = B, W, lam, code
        super().__init__(n, delay, load, shares, vectors)

    @property
    def arguments(self) -> dict[str, int | str]:
        return {"n": self.n, "B": self.B, "W": self.W, "lam": self.lam, "code": self.code_name}

    @property
    def lower_bound(self) -> float:
        """(W - 1 + B) / (n (W - 1) + B (n - lambda)): of any scheme against (B, W, lambda)-bursty stragglers,
        or against (B, W + B - 1, lambda)-arbitrary ones."""
        return (self.W - 1 + self.B) / (self.n * (self.W - 1) + self.B * (self.n - self.lam))

    @staticmethod
    def _check(n: int, B: int, W: int, lam: int) -> None:
        if n < 1:
            raise ValueError(f"n must be >= 1 worker; got {n}")
        if not 1 <= B < W:
            raise ValueError(f"B must be in 1 .. W - 1 = {W - 1}; got {B}")
        if not 0 <= lam <= n:
            raise ValueError(f"lam must be in 0 .. n = {n}; got {lam}")


class SRSGC(_Sequential):
    """Selective repetition (Sec. 3.2): an (n, s)-GC whose missing results are computed again B rounds later.

    s = ceil(B lambda / (W - 1 + B)). Job t needs n - s results. If fewer arrived in round t, then in round t +
    B the first workers that gave none redo their task of job t *instead of* that of job t + B, as many as are
    lacking; for job t + B they count as not contributing. It survives stragglers that in every W rounds are
    (B, W, lambda)-bursty, where a round does not count in which nobody repeats and at most s straggle: its job
    needs no repetition. That takes in the paper's model, "bursty or at most s a round in every window".

    Results are counted, whatever the code: repetition changes the rounding of the sum, not the stragglers that
    are tolerated. Raises ValueError unless 1 <= B < W, B divides W - 1, and 0 <= lam <= n with s < n.
    """

    def __init__(self, n: int, B: int, W: int, lam: int, code: str = "cyclic") -> None:
        self._check(n, B, W, lam)
        if (W - 1) % B:
            raise ValueError(f"B must divide W - 1 = {W - 1}; got {B}")
        self.s = -(-B * lam // (W - 1 + B))
        self._code = code_of(code, n, self.s)
        self.remembers = W
        load, shares = (self.s + 1) / n, np.ones(n, dtype=np.int64)
        super().__init__(n, B, W, lam, code, load=load, delay=B, shares=shares, vectors=1)

    @property
    def code(self) -> Code:
        return self._code

    @property
    def coded_items(self) -> range:
        return range(1)

    def _plan(self) -> None:
        """The workers that redo a task of job ``round - B`` in the coming round (mask of n)."""
        self.repeating = np.zeros(self.n, dtype=bool)
        before = self._arrivals.get(self.round - self.B)
        if before is not None:
            absent = np.flatnonzero(~before[:, 0])
            self.repeating[absent[: max(0, len(absent) - self.s)]] = True

    def busy(self) -> Mask:
        return np.ones(self.n, dtype=bool) if self.exists(self.round) else self.repeating.copy()

    def task(self, worker: int, job: int, item: int = 0) -> MiniTask:
        return MiniTask(job, 0, self.code.assignment(worker), coded=True)

    def tasks(self, round: int, worker: int) -> list[MiniTask]:
        self._check_round(round)
        if self.repeating[worker]:
            return [self.task(worker, round - self.B)]
        return [self.task(worker, round)] if self.exists(round) else []

    def _conforms(self, window: Mask) -> bool:
        if not self._counted(window[-1]).any():
            return True
        return _bursty(window, self.B, self.W, lambda missing: int(missing.sum()) <= self.lam)

    def _counted(self, straggling: Mask) -> Mask:
        harmless = int(straggling.sum()) <= self.s and not self.repeating.any()
        return np.zeros_like(straggling) if harmless else straggling

    def _after(self, arrived: Mask) -> tuple[dict[int, Mask], list[int]]:
        repeating, old = self.repeating, self.round - self.B
        after = dict(self._arrivals)
        if old in after:
            after[old] = after[old] | (arrived & repeating)[:, None]
        if self.exists(self.round):
            after[self.round] = (arrived & ~repeating)[:, None]
        return after, [job for job, mask in after.items() if int(mask.sum()) >= self.n - self.s]


class MSGC(_Sequential):
    """Multiplexed sequential gradient coding (Sec. 3.3): most data is retried, a small part is coded.

    Of a job's data, D1 is n (W - 1) chunks that one worker each holds, W - 1 a worker; D2 is B groups of n
    smaller chunks under an (n, lambda) code each. In round t a worker does W - 1 + B mini-tasks of as many
    jobs: mini-task j, of job t - j, is its j-th D1 chunk for j <= W - 2. After that it is the first D1 chunk
    whose result has not arrived, if there is one, and else its coded part of D2 group j - (W - 1).

    It survives stragglers that over the W - 1 + B rounds of every job are (B, W, lambda)-bursty or
    (B, W + B - 1, lambda)-arbitrary. With the repetition code, "at most lambda distinct stragglers" becomes "no
    repetition group wholly among them". lambda = n has no D2 and no bound on distinct stragglers.

    The price is traffic: the mini-tasks of a round belong to different jobs, so a worker sends W - 1 + B
    vectors a round, not one.

    Args:
        n, B, W, lam: workers and the parameters of the straggler models.
        code: of D2's groups: ``cyclic``, ``mds`` or ``repetition``.
        model: what `conforms` allows: ``either`` of the two models, or only ``bursty`` patterns, as in the
            paper's experiments.

    Raises ValueError unless 1 <= B < W, 0 <= lam <= n and code and model are among those named.
    """

    def __init__(self, n: int, B: int, W: int, lam: int, code: str = "cyclic", model: str = "either") -> None:
        self._check(n, B, W, lam)
        if model not in ("either", "bursty"):
            raise ValueError(f"model must be 'either' or 'bursty'; got {model!r}")
        self.model = model
        self.slots = W - 1 + B
        self._code = code_of(code, n, min(lam, n - 1))
        self.remembers = self.slots
        share = 1 if lam == n else lam + 1
        first = np.full(n * (W - 1), share, dtype=np.int64)
        second = np.ones(0 if lam == n else n * B, dtype=np.int64)
        shares = np.concatenate([first, second])
        load = share * self.slots / int(shares.sum())
        super().__init__(n, B, W, lam, code, load=load, delay=W - 2 + B, shares=shares, vectors=self.slots)

    @property
    def arguments(self) -> dict[str, int | str]:
        return {**super().arguments, "model": self.model}

    @property
    def code(self) -> Code:
        return self._code

    @property
    def coded_items(self) -> range:
        return range(self.W - 1, self.W - 1 if self.lam == self.n else self.slots)

    def _plan(self) -> None:
        """The mini-tasks of the coming round, in their order: by job, what every worker does for it, an item or
        -1 for nothing, (n,)."""
        jobs = [self.round - j for j in range(self.slots)]
        self._items = {job: self._items_of(job) for job in jobs if self.exists(job)}

    def _items_of(self, job: int) -> NDArray[np.int64]:
        j = self.round - job
        if j <= self.W - 2:
            return np.full(self.n, j)
        held = self._arrivals[job][:, : self.W - 1]
        otherwise = j if j in self.coded_items else -1
        return np.where(held.all(1), otherwise, held.argmin(1))

    def busy(self) -> Mask:
        if self.lam < self.n:
            return np.ones(self.n, dtype=bool)
        return _any(np.stack(list(self._items.values())) >= 0)

    def task(self, worker: int, job: int, item: int) -> MiniTask:
        own = self.W - 1
        if item < own:
            return MiniTask(job, item, (worker * own + item,), coded=False)
        group = self.n * own + (item - own) * self.n
        return MiniTask(job, item, tuple(group + c for c in self.code.assignment(worker)), coded=True)

    def tasks(self, round: int, worker: int) -> list[MiniTask]:
        self._check_round(round)
        items = [(job, int(items[worker])) for job, items in self._items.items()]
        return [self.task(worker, job, item) for job, item in items if item >= 0]

    def _conforms(self, window: Mask) -> bool:
        if _bursty(window, self.B, self.W, self._tolerates):
            return True
        if self.model == "bursty" or bool((window.sum(0) > self.B).any()):
            return False
        return self._tolerates(_any(window))

    def _tolerates(self, distinct: Mask) -> bool:
        return self.lam == self.n or self.code.tolerates(distinct)

    def _after(self, arrived: Mask) -> tuple[dict[int, Mask], list[int]]:
        workers = np.flatnonzero(arrived)
        after = {}
        for job, planned in self._items.items():
            held = self._arrivals.get(job)
            held = np.zeros((self.n, self.slots), dtype=bool) if held is None else held.copy()
            items = planned[workers]
            held[workers[items >= 0], items[items >= 0]] = True
            after[job] = held
        due = self.round - self.delay
        return after, [due] if due in after and self._decodable(after[due]) else []

    def _decodable(self, held: Mask) -> bool:
        return bool(held[:, : self.W - 1].all()) and all(
            self.code.tolerates(~held[:, item]) for item in self.coded_items
        )


def _any(masks: Mask) -> Mask:
    """Over the first dimension."""
    over: Mask = np.logical_or.reduce(masks)
    return over


def _bursty(window: Mask, B: int, W: int, spatial: Callable[[Mask], bool]) -> bool:
    """Whether stragglers (rounds, n) are bursty: in any W rounds ``spatial`` allows the distinct ones, and
    nobody who straggles in r does so in r + B .. r + W - 1."""
    rounds = len(window)
    if not all(spatial(_any(window[first : first + W])) for first in range(max(1, rounds - W + 1))):
        return False
    return not any(
        bool((window[first] & window[second]).any())
        for first in range(rounds)
        for second in range(first + B, min(first + W, rounds))
    )


SCHEMES: Mapping[str, Callable[..., Scheme]] = {"Uncoded": Uncoded, "GC": GC, "SRSGC": SRSGC, "MSGC": MSGC}


def scheme_of(name: str, arguments: Mapping[str, int | str]) -> Scheme:
    """A scheme from its class's name and its `arguments`, as they travel to workers."""
    if name not in SCHEMES:
        raise ValueError(f"scheme must be one of {', '.join(SCHEMES)}; got {name!r}")
    return SCHEMES[name](**arguments)
