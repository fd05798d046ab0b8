"""Sequential gradient coding (arXiv:2211.13802): workers compute a little more, and nobody waits for the slow.

A master trains models on n workers, some of which straggle in any round. *Gradient coding* gives each worker s
+ 1 of n chunks of the data instead of one; each answers with one combination of its chunks' gradients, and any
n - s answers give the full gradient, exactly. That costs s + 1 times the work, in every round.

With M models trained in turn, the gradient of job t (step t // M of model t mod M) may come T <= M - 1 rounds
late without any loss of exactness, and coding over *time* is cheaper, because stragglers come in short bursts:

- `GC` (Sec. 3.1): load (s + 1) / n, T = 0;
- `SRSGC` (Sec. 3.2): what is missing of a job is computed again B rounds later; T = B;
- `MSGC` (Sec. 3.3): most of the data is retried and only a small part coded, W - 1 + B mini-tasks of as many
  jobs in every round. Its load is near the least possible; T = W - 2 + B.

In each round the master waits until (1 + mu) times the fastest worker's time, and longer only if those still
missing are more than the scheme's straggler model allows. Which scheme with which parameters is fastest depends
on the delays: `select` picks them from a probe.

    learners = [Learner(model, optimizer, loss, batch) for model, optimizer in four]
    run = GradientCoding(learners, MSGC(n=16, B=1, W=2, lam=3), SimulatedCluster(trace))
    run.train(steps=30)

Every model's weights are those of uncoded training, to rounding: only the wall clock differs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cograd.core.ledger import Ledger
from cograd.engines.exchange import GradientError
from cograd.machines.gradient_coding.clock import Seconds, Trace
from cograd.machines.gradient_coding.clusters import Cluster, Orders
from cograd.machines.gradient_coding.codes import combine
from cograd.machines.gradient_coding.learners import Bench, Learner
from cograd.machines.gradient_coding.schemes import MiniTask, Recipe, Scheme


class GradientCoding:
    """The master's training run: M models in turn, their gradients from a cluster under a scheme.

    Args:
        learners: the models, see `Learner`. Job t is step t // M of model t mod M.
        scheme: who computes what; its delay is at most M - 1.
        cluster: a `SimulatedCluster` or a `MailboxCluster` of the scheme's n workers.
        dtype: of what workers send: float64, or float32 for half the traffic (see `codes` for what is lost).
        seed: of the random numbers in the learners' losses.
        ledger: counts messages and samples; a new one if not given. The master is party n. The results of
            stragglers count as sent.
        on_gradient: called with each job and its decoded sum (numel,), float64, before its model's step.

    ``wall_clock`` in seconds, ``waits`` (rounds that were waited out), ``max_load`` (largest share of a job's
    samples that a worker touched in a round) and ``updates`` (jobs done) tell how it went. A retry needs the
    weights that its job began with: as T <= M - 1, a model has at most one job in flight and keeps them until
    that is done. Memory: for each job in flight, one vector for what is summed and one for each coded result
    (float64 and ``dtype``, numel each); 8 n bytes a round for `trace`.

    Raises ValueError for a scheme with a delay above M - 1, which would use stale gradients, or of another
    number of workers than the cluster has; and what `Bench` raises.
    """

    def __init__(
        self,
        learners: Sequence[Learner],
        scheme: Scheme,
        cluster: Cluster,
        *,
        dtype: torch.dtype = torch.float64,
        seed: int = 0,
        ledger: Ledger | None = None,
        on_gradient: Callable[[int, Tensor], None] | None = None,
    ) -> None:
        self.on_gradient = on_gradient
        self.bench = Bench(learners, scheme, dtype, seed)
        self.cluster, self.ledger = cluster, ledger if ledger is not None else Ledger()
        self.round, self.waits, self.updates = 0, 0, 0
        self.wall_clock, self.max_load = 0.0, 0.0
        self._decoder = Decoder(self.bench.numel)
        self._check(scheme)
        self.scheme = scheme
        self.scheme_jobs, self._base, self._idle = 0, 0, True
        self._loaded, self._times = False, list[Seconds]()

    def _check(self, scheme: Scheme) -> None:
        models = len(self.bench.learners)
        if scheme.delay > models - 1:
            raise ValueError(
                f"the delay of {scheme!r} is {scheme.delay} rounds; with {models} models in turn it must be at "
                f"most {models - 1}, or a model would go on with a gradient still missing"
            )
        if scheme.n != self.cluster.n:
            raise ValueError(f"scheme must be one of the cluster's {self.cluster.n} workers; got {scheme!r}")

    # Training.

    def start(self, steps: int, scheme: Scheme | None = None) -> None:
        """Begin ``steps`` steps of every model, from here on with another scheme if one is given (as after a
        probe without coding). Raises ValueError while jobs are in flight or for steps < 1."""
        if not self.done:
            raise ValueError(
                f"start must wait until all jobs are done; {self.scheme!r} is in round {self.scheme.round}"
            )
        if steps < 1:
            raise ValueError(f"steps must be >= 1; got {steps}")
        if scheme is not None:
            self._check(scheme)
            self.scheme = scheme
        self._base += 0 if self._idle else self.scheme_jobs
        self.bench.restart(self.scheme)
        self.scheme_jobs = steps * len(self.bench.learners)
        self.scheme.restart(self.scheme_jobs)
        self._idle = False
        self._times.clear()

    @property
    def done(self) -> bool:
        """Whether all jobs that were started are done."""
        return self._idle or self.scheme.done

    def train(self, steps: int, scheme: Scheme | None = None) -> None:
        """``steps`` steps of every model: `start` and all its rounds."""
        self.start(steps, scheme)
        while not self.done:
            self.step()

    def step(self) -> list[int]:
        """One round; the jobs whose models were updated (job t: step t // M of model t mod M).

        Raises GradientError, before that model's step, for a decoded gradient with NaN or infinity.
        """
        if self.done:
            raise ValueError("no jobs are left: call start(steps) or train(steps)")
        self.bench.refuse_mixing()
        orders = self._orders()
        outcome = self.cluster.round(self.scheme, orders, self.bench)
        arrived = self.scheme.busy()
        arrived[:] = False
        arrived[list(outcome.results)] = True
        self.scheme.complete(self.scheme.round, arrived)
        for worker in sorted(outcome.results):
            self._decoder.add(worker, orders.tasks[worker], outcome.results[worker])
        self._count(orders)
        self._loaded = False
        if outcome.results:
            self._times.append(outcome.times)
        self.round += 1
        self.wall_clock += outcome.seconds
        self.waits += outcome.waited
        return [self._update(job, recipe) for job, recipe in self.scheme.ready().items()]

    def _orders(self) -> Orders:
        scheme, tasks = self.scheme, {}
        for worker in scheme.busy().nonzero()[0].tolist():
            tasks[worker] = scheme.tasks(scheme.round, worker)
        fresh = scheme.in_flight if self._loaded else []
        if scheme.exists(scheme.round):
            fresh = [*fresh, scheme.round]
        return Orders(self.round, self._base, tasks, [self._base + job for job in fresh])

    def _update(self, job: int, recipe: Recipe) -> int:
        total = self._decoder.gradient(job, recipe)
        if not bool(torch.isfinite(total).all()):
            raise GradientError(f"job {self._base + job}: the decoded gradient holds NaN or infinity")
        if self.on_gradient is not None:
            self.on_gradient(self._base + job, total)
        self.bench.step(self._base + job, total)
        self.updates += 1
        return self._base + job

    def _count(self, orders: Orders) -> None:
        """Messages and samples of a round."""
        master, numel = self.scheme.n, self.bench.numel
        for _ in orders.fresh:
            size = numel * self.bench.weights_dtype.itemsize
            self.ledger.send(master, self.round, size, copies=self.scheme.n)
        for worker, tasks in orders.tasks.items():
            self.ledger.send(worker, self.round, len(tasks) * numel * self.bench.dtype.itemsize, to=master)
            samples = [(self.bench.samples(task, self._base), self._size(task)) for task in tasks]
            self.ledger.work(worker, "grad", sum(count for count, _ in samples))
            self.max_load = max(self.max_load, sum(count / size for count, size in samples))

    def _size(self, task: MiniTask) -> int:
        return sum(map(len, self.bench.chunks(self._base + task.job)))

    def trace(self) -> Trace:
        """Every worker's seconds in every round since `start` or since a checkpoint was loaded, at the scheme's
        load: a probe for `select`.

        Raises ValueError if there was no round, or one that ended without a worker: its time is not known.
        Probe with `Uncoded`, or let the cluster wait for everybody (``mu = math.inf``).
        """
        seconds = np.array(self._times).reshape(-1, self.scheme.n)
        unknown = np.flatnonzero(np.isnan(seconds).any(1)).tolist()
        if unknown or not len(seconds):
            raise ValueError(
                "a trace needs every worker's time in one round or more; round(s) "
                f"{unknown} of {len(seconds)} ended without somebody's result"
            )
        return Trace(seconds, self.scheme.load)

    @property
    def bytes(self) -> int:
        """Payload of all messages, a broadcast counted once."""
        return self.ledger.sent()

    # Checkpoints.

    def state_dict(self) -> dict[str, Any]:
        """Everything that a run needs to go on bit for bit, between two rounds: models, optimizers, the
        scheme's progress and what has arrived of the jobs in flight. The ledger is not part of it."""
        return {
            "learners": [
                {"model": learner.model.state_dict(), "optimizer": learner.optimizer.state_dict()}
                for learner in self.bench.learners
            ],
            "scheme": self.scheme.state_dict(),
            "decoder": self._decoder.state_dict(),
            "counters": {name: getattr(self, name) for name in _COUNTERS},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue there, with the same learners and scheme.

        Raises ValueError, and changes nothing, for the state of another scheme (another number of workers is
        one: a code is of n workers; finish the jobs in flight and start with another scheme) or number of
        models.
        """
        if len(state["learners"]) != len(self.bench.learners):
            raise ValueError(
                f"the state is of {len(state['learners'])} models; this run has {len(self.bench.learners)}"
            )
        self.scheme.load_state_dict(state["scheme"])
        for learner, saved in zip(self.bench.learners, state["learners"], strict=True):
            learner.model.load_state_dict(saved["model"])
            learner.optimizer.load_state_dict(saved["optimizer"])
        self._decoder.load_state_dict(state["decoder"])
        for name in _COUNTERS:
            setattr(self, name, state["counters"][name])
        self.bench.restart(self.scheme)
        self._loaded = True
        self._times.clear()


_COUNTERS = ("round", "waits", "updates", "wall_clock", "max_load", "scheme_jobs", "_base", "_idle")


class Decoder:
    """What has arrived of the jobs in flight: results that are not coded are added up at once, coded ones wait
    for their weights."""

    def __init__(self, numel: int) -> None:
        self.numel = numel
        self._plain: dict[int, Tensor] = {}
        self._coded: dict[int, dict[int, dict[int, Tensor]]] = {}

    def add(self, worker: int, tasks: Sequence[MiniTask], vectors: Sequence[Tensor]) -> None:
        """A worker's answers to its tasks, in their order. Workers are added in ascending order, so that the
        sums have the same bits whoever was first."""
        for task, vector in zip(tasks, vectors, strict=True):
            if task.coded:
                self._coded.setdefault(task.job, {}).setdefault(task.item, {})[worker] = vector
            elif task.job in self._plain:
                self._plain[task.job] += vector
            else:
                self._plain[task.job] = vector.to(torch.float64, copy=True)

    def gradient(self, job: int, recipe: Recipe) -> Tensor:
        """The sum of a job's gradients (numel,), float64; what is held of the job is dropped."""
        coded, total = self._coded.pop(job, {}), self._plain.pop(job, None)
        for item, weights in recipe.items():
            total = combine([coded[item][worker] for worker in weights], list(weights.values()), total)
        assert total is not None
        return total

    def state_dict(self) -> dict[str, Any]:
        return {
            "plain": {job: total.clone() for job, total in self._plain.items()},
            "coded": {job: {i: dict(held) for i, held in items.items()} for job, items in self._coded.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._plain = {job: total.clone() for job, total in state["plain"].items()}
        self._coded = {
            job: {i: dict(held) for i, held in items.items()} for job, items in state["coded"].items()
        }
