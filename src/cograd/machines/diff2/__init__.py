"""DIFF2 (arXiv:2302.03884): workers share noisy gradient *differences*, which need less noise than gradients.

P workers minimise f(x) = (1/P) sum_p (1/n_p) sum_z l(x, z) over their private records z, by rounds that are
differentially private. Noisy gradient descent (DP-GD) pays for every round with noise in proportion to the
gradient's clipping norm. DIFF2 pays that once in T rounds (a *restart*); in between, each worker sends how its
gradient has changed since the last point:

    D   = |x_{r-1} - x_{r-2}|                                                  public
    d_p = ClippedMean({grad l(x_{r-1}, z) - grad l(x_{r-2}, z)}, C_2 D) + N(0, (sigma_2 D)^2 I)
    v_r = v_{r-1} + (1/P) sum_p d_p,        in a restart  v_r = (1/P) sum_p (ClippedMean({grad l}, C_1) + N)
    x_r = Routine(x_{r-1}, v_r)                  one gradient step, or K local ones on one worker (BVR-L-SGD)

A difference of a smooth loss shrinks with the step, and its clipping norm and noise with it. For smooth
nonconvex f with d parameters the squared gradient norm reaches O~(d^(2/3) / (n epsilon)^(4/3)), where DP-GD
reaches O~(sqrt(d) / (n epsilon)) (Theorem 4.3). With T = 1 this is DP-GD.

    plan = Diff2Plan(rounds=300, restart_every=100, epsilon=3.0, delta=1e-5, clip=1.0, diff_clip=5.0,
                     records=[len(y) for _, y in workers], routine=GDRoutine(lr=0.3), release="aggregate")
    diff2 = Diff2(model, lambda model, x, y: mse_loss(model(x), y), workers, plan)
    for _ in range(plan.rounds):
        diff2.step()

What is protected is one record of one worker, by replacement. Tuning on the private records, and looking at
losses that were computed from them, is not accounted for.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cograd.core.codecs import tensor_of
from cograd.core.ledger import Ledger
from cograd.core.message import Frame, Payload, SchemaError, session_id
from cograd.core.space import trainable
from cograd.engines.exchange import GradientError
from cograd.engines.transport import Transport
from cograd.machines.diff2.accounting import PrivacySpent
from cograd.machines.diff2.clipping import Loss, PerRecord, Records
from cograd.machines.diff2.noise import NoiseKind, noise_of
from cograd.machines.diff2.plan import Diff2Plan, Kind
from cograd.machines.diff2.routines import BVRLocalSGD, GDRoutine

__all__ = ["BVRLocalSGD", "Diff2", "Diff2Plan", "GDRoutine", "PrivacySpent", "Round"]


class Round(NamedTuple):
    """What a step did. ``distance`` is D (0 in a restart), ``step_norm`` |x_r - x_{r-1}|, ``bytes`` the payload
    of all messages; ``clipped`` the share of this process's records that were clipped, if that is reported."""

    kind: Kind
    distance: float
    step_norm: float
    bytes: int
    clipped: float | None


class Diff2:
    """Differentially private optimisation by gradient differences, of a model and a loss of one record.

    All P workers in this process, or with ``transport`` (`TorchDist`) one a process: then every process stands
    in for the server, too, and takes the same step. With ``release="aggregate"`` messages are summed by an
    all-reduce, with ``"message"`` everyone gathers them. `TorchDist` itself is no secure aggregation: whoever
    can read a process's traffic is to be trusted in the aggregate model. With noise from the stream, both ways
    of running draw the same noise.

    The model's weights are written after every step; where they are narrower than float32, iterates and v are
    still kept in float32.

    Args:
        model: its trainable parameters are what is optimised; they start as they are (with a transport, as
            they are on rank 0). See `PerRecord` for what is refused.
        loss: ``loss(model, *record)`` of one record, whose tensors have a first dimension of 1.
        workers: each worker's records, tensors of one row a record; with a transport, this rank's alone.
        plan: rounds, noise and routine.
        transport: reaches the other workers.
        noise: ``stream`` (reproducible from the plan's seed: for experiments, protects nobody) or ``secure``
            (the operating system's generator).
        chunk: records whose gradients are held at once; default: about 4 million elements (16 MB in float32).
        cache: keep every record's gradient for the next difference: half the gradient evaluations, and
            n_p numel elements of memory a worker.
        report_clipped: measure how many records were clipped. That number is published without noise: epsilon
            is infinite from then on.
        ledger: counts messages between the workers 0 .. P - 1 and the server P, per-record gradients
            (``grad``) and each worker's epsilon. A budget of epsilon is checked before a round's releases.

    Warns where the plan is unstable (`Diff2Plan.stability` above 1). Raises ValueError for records that do not
    fit the plan and for models or losses that mix records; SchemaError if other ranks have another model or
    plan.

    Each process holds x, the point before and v (12 bytes a parameter), besides what `PerRecord` needs.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        workers: Sequence[Records],
        plan: Diff2Plan,
        *,
        transport: Transport | None = None,
        noise: NoiseKind = "stream",
        chunk: int | None = None,
        cache: bool = False,
        report_clipped: bool = False,
        ledger: Ledger | None = None,
    ) -> None:
        self.plan, self.transport, self.cache, self.report_clipped = plan, transport, cache, report_clipped
        self.noise, self.ledger = noise_of(noise, plan.seed), ledger if ledger is not None else Ledger()
        self.per_record = PerRecord(model, loss, chunk)
        self.space = self.per_record.space
        self.records = self._placed(workers)
        for records in self.records.values():
            self.per_record.check(records)
        self._weights = trainable(model)
        first = next(iter(self._weights.values()))
        dtype = torch.promote_types(first.dtype, torch.float32)
        self.x = self.space.flatten(dict(self._weights), out=self.space.zeros(first.device, dtype))
        self.session = self._agree(noise)
        self.before, self.v, self.round = self.x.clone(), torch.zeros_like(self.x), 0
        self._result: Tensor | None = None
        self._charged = [0.0] * plan.workers
        self._kept: dict[int, Tensor] = {}
        stability = plan.stability(self.space.numel)
        if stability > 1:
            warnings.warn(
                f"plan.stability is {stability:.3g}, above 1: noise feeds on itself between restarts; take a "
                "smaller lr or restart_every, or fewer rounds",
                stacklevel=2,
            )

    def _placed(self, workers: Sequence[Records]) -> dict[int, Records]:
        """The records of this process by worker."""
        here = range(self.plan.workers)
        if self.transport is not None:
            if self.transport.members != self.plan.workers:
                raise ValueError(
                    f"plan must be for as many workers as there are ranks, {self.transport.members}; "
                    f"got one for {self.plan.workers}"
                )
            here = range(self.transport.rank, self.transport.rank + 1)
        if len(workers) != len(here):
            raise ValueError(f"workers must hold the records of {len(here)} workers here; got {len(workers)}")
        placed = dict(zip(here, workers, strict=True))
        for worker, records in placed.items():
            sizes = {len(t) for t in records}
            if sizes != {self.plan.records[worker]}:
                raise ValueError(
                    f"workers: every tensor of worker {worker} must have the plan's "
                    f"{self.plan.records[worker]} rows; got {sorted(sizes)}"
                )
        return placed

    def _agree(self, noise: NoiseKind) -> bytes:
        """Compare plan and model with the other ranks, and start from rank 0's weights."""
        schema = self.space.schema((self.plan, noise), self.x.dtype)
        session = session_id(schema.digest, self.plan.workers)
        if self.transport is None:
            return session
        mine = schema.to_bytes()
        for rank, theirs in enumerate(self.transport.all_gather_bytes(mine)):
            if bytes(theirs) != mine:
                raise SchemaError(
                    f"rank {rank} has another model or plan than rank {self.transport.rank}: "
                    f"{bytes(theirs).decode()} there, {mine.decode()} here"
                )
            self.ledger.send(rank, 0, 0, schema=len(mine), copies=self.plan.workers - 1)
        weights = _bytes(self.x) if self.transport.rank == 0 else b""
        self._take(self.transport.all_gather_bytes(weights)[0], self.x)
        self._write()
        return session

    # A round.

    def step(self) -> Round:
        """The next round. Raises RuntimeError after the plan's last one, BudgetExceeded before a round that
        the ledger's budget does not pay for, GradientError (on all ranks, with the iterate as it was) where a
        gradient is not finite; a step that is tried again is not charged again."""
        plan, kind = self.plan, self.plan.kind(self.round)
        if self.round == plan.rounds:
            raise RuntimeError(f"all {plan.rounds} rounds of the plan are done; further ones are not paid for")
        self._charge()
        clipped = [0, 0]  # records that were clipped, and all that could have been
        distance = 0.0 if kind == "full" else _distance(self.x, self.before)
        average = self._average(lambda worker: self._message(worker, kind, distance, clipped))
        v = average if kind == "full" else self.v + average
        x = self._move(v, clipped)
        step_norm, size = _distance(x, self.x), self._count_bytes()
        self.before, self.x, self.v = self.x, x, v
        self.round += 1
        if self.round == plan.output_round:
            self._result = x
        self._write()
        share = clipped[0] / max(1, clipped[1]) if self.report_clipped else None
        return Round(kind, distance, step_norm, size, share)

    def _message(self, worker: int, kind: Kind, distance: float, clipped: list[int]) -> Tensor:
        """d_p: the clipped mean of a worker's gradients, or of their differences, with its noise."""
        plan, records = self.plan, self.records[worker]
        if kind == "full":
            keep = self._kept.get(worker)
            if self.cache and keep is None:
                keep = self._kept[worker] = self.x.new_empty(plan.records[worker], self.space.numel)
            mean = self.per_record.mean(records, self.x, plan.clip, keep)
            sigma, evaluations = plan.worker_sigma1(worker), 1
        elif distance == 0:
            return torch.zeros_like(self.x)
        else:
            keep = self._before(worker) if self.cache else None
            mean = self.per_record.difference(records, self.x, self.before, plan.diff_clip * distance, keep)
            sigma, evaluations = plan.worker_sigma2(worker) * distance, 1 if self.cache else 2
        self.ledger.work(worker, "grad", evaluations * plan.records[worker])
        clipped[0] += mean.clipped
        clipped[1] += plan.records[worker]
        return self._noised(mean.vector, sigma, self.round, worker)

    def _before(self, worker: int) -> Tensor:
        """Cached gradients at the point before; computed where a run was resumed."""
        if worker not in self._kept:
            keep = self.x.new_empty(self.plan.records[worker], self.space.numel)
            self.per_record.mean(self.records[worker], self.before, math.inf, keep)
            self.ledger.work(worker, "grad", self.plan.records[worker])
            self._kept[worker] = keep
        return self._kept[worker]

    def _noised(self, vector: Tensor, sigma: float, *key: int) -> Tensor:
        if sigma == 0:
            return vector
        return vector.add_(self.noise.normal(vector.numel(), *key).to(vector), alpha=sigma)

    def _average(self, message: Callable[[int], Tensor]) -> Tensor:
        """(1/P) sum_p of the workers' messages, added in worker order; by all-reduce if nobody may see one."""
        workers = range(self.plan.workers)
        if self.transport is None:
            total = self._named(lambda: message(0), 0)
            for worker in workers[1:]:
                total += self._named(lambda: message(worker), worker)  # noqa: B023  # called at once
        elif self.plan.release == "aggregate":
            total = self._gather(lambda: message(self._rank), shown=False)[1]
            self.transport.all_reduce(total)
        else:
            payloads, mine = self._gather(lambda: message(self._rank))
            total = torch.zeros_like(mine)
            for worker, payload in enumerate(payloads):
                part = self._take(payload, torch.empty_like(mine))
                total = part if worker == 0 else total.add_(part)
        return total.div_(self.plan.workers)

    def _move(self, v: Tensor, clipped: list[int]) -> Tensor:
        """x_r: the routine, on the worker that the round selects if it needs records."""
        plan, key = self.plan, (self.plan.seed, self.round)
        if not plan.routine.local_releases:
            return plan.routine.move(self.x, v, _Nothing(), key)
        worker = plan.selected(self.round)

        def run() -> Tensor:
            return plan.routine.move(self.x, v, _Selected(self, worker, clipped), key)

        if self.transport is None:
            return self._named(run, worker)
        payloads, x = self._gather(run if self._rank == worker else lambda: self.x, shown=self._rank == worker)
        return self._take(payloads[worker], torch.empty_like(x))

    # Reaching the others.

    @property
    def _rank(self) -> int:
        assert self.transport is not None
        return self.transport.rank

    def _gather(self, make: Callable[[], Tensor], shown: bool = True) -> tuple[list[Payload], Tensor]:
        """Everyone's vectors as bytes (none where it is not ``shown``), and this rank's; GradientError on all
        ranks if one cannot make its own."""
        assert self.transport is not None
        error, mine = "", self.x
        try:
            mine = make()
        except GradientError as refused:
            error = str(refused)
        payload = error.encode() if error else _bytes(mine) if shown else b""
        frame = Frame(self.session, self.round, self._rank, payload, error=bool(error))
        frames = [
            Frame.unpack(data, self.session, self.round)
            for data in self.transport.all_gather_bytes(frame.pack())
        ]
        for frame in frames:
            if frame.error:
                raise GradientError(self._where(frame.sender, bytes(frame.payload).decode()))
        return [frame.payload for frame in frames], mine

    def _named(self, make: Callable[[], Tensor], worker: int) -> Tensor:
        try:
            return make()
        except GradientError as refused:
            raise GradientError(self._where(worker, str(refused))) from None

    def _where(self, worker: int, why: str) -> str:
        self._kept.clear()  # caches may be of the failed round by now
        return f"worker {worker}: round {self.round}: {why}"

    def _take(self, payload: Payload, out: Tensor) -> Tensor:
        return out.copy_(tensor_of(payload, out.dtype))

    def _write(self) -> None:
        with torch.no_grad():
            for name, view in self.space.views(self.x).items():
                self._weights[name].copy_(view)

    # What it costs.

    def _count_bytes(self) -> int:
        """The round's messages as the protocol with a server (party P) sends them; their payload in bytes."""
        size, server = self.x.numel() * self.x.element_size(), self.plan.workers
        for worker in range(server):
            self.ledger.send(server, self.round, size, to=worker)
            self.ledger.send(worker, self.round, size, to=server)
        if not self.plan.routine.local_releases:
            return 2 * server * size
        selected = self.plan.selected(self.round)
        self.ledger.send(server, self.round, size, to=selected)
        self.ledger.send(selected, self.round, size, to=server)
        return 2 * (server + 1) * size

    def _charge(self) -> None:
        """Each worker's epsilon after the coming round, to the ledger, less what this object has charged."""
        for worker in range(self.plan.workers):
            due = self._spent(self.round + 1, worker).epsilon() - self._charged[worker]
            if due > 0:
                self.ledger.work(worker, "epsilon", due)
                self._charged[worker] += due

    def spent(self, worker: int | None = None) -> PrivacySpent:
        """What has been released of a worker's records so far; default: of the worker it has cost most."""
        if worker is not None:
            return self._spent(self.round, worker)
        return max((self._spent(self.round, w) for w in range(self.plan.workers)), key=lambda s: s.epsilon())

    def _spent(self, rounds: int, worker: int) -> PrivacySpent:
        exposed = self.report_clipped and rounds > 0
        return dataclasses.replace(self.plan.spent(rounds, worker), exposed=exposed)

    # Results and checkpoints.

    def result(self) -> dict[str, Tensor]:
        """The parameters that the plan puts out: the last iterate, or the randomly chosen one.

        Raises RuntimeError before the round of that iterate.
        """
        if self._result is None:
            raise RuntimeError(
                f"the result is the iterate of round {self.plan.output_round}; this is {self.round}"
            )
        return {name: view.clone() for name, view in self.space.views(self._result).items()}

    def state_dict(self) -> dict[str, Any]:
        """Iterates, gradient estimate and round: the same on every rank, and all of it released already.

        A run that is resumed from an older state releases the rounds since then again: with noise from the
        stream the same bits, with secure noise others, which no accountant here knows of.
        """
        vectors = {"x": self.x, "before": self.before, "v": self.v}
        if self._result is not None:
            vectors["result"] = self._result
        return {
            "round": self.round,
            "plan": self._plan_digest(),
            "space": self.space.digest,
            **{key: {n: t.clone() for n, t in self.space.views(x).items()} for key, x in vectors.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`, bit for bit, in one process or in many, whichever saved it. The ledger is
        charged for what was spent before with the next round.

        Raises ValueError for the state of another model or plan: so too for one of another number of workers,
        since what was released is accounted for under its plan.
        """
        if state["space"] != self.space.digest:
            raise ValueError("the state is of a model with other parameters (names, order or shapes differ)")
        if state["plan"] != self._plan_digest():
            raise ValueError("the state is of another plan (rounds, privacy, clips, workers, routine or seed)")
        for vector, key in ((self.x, "x"), (self.before, "before"), (self.v, "v")):
            self.space.flatten(state[key], out=vector)
        self._result = (
            self.space.flatten(state["result"], torch.empty_like(self.x)) if "result" in state else None
        )
        self.round = int(state["round"])
        self._kept.clear()
        self._write()

    def _plan_digest(self) -> str:
        return hashlib.blake2b(repr(self.plan).encode(), digest_size=16).hexdigest()


class _Nothing:
    """The access to records of a routine that needs none."""

    def difference(self, now: Tensor, before: Tensor, step: int) -> Tensor:
        raise AssertionError("a routine without local releases asked for one")


class _Selected:
    """The selected worker's access to its own records."""

    def __init__(self, diff2: Diff2, worker: int, clipped: list[int]) -> None:
        self.diff2, self.worker, self.clipped = diff2, worker, clipped

    def difference(self, now: Tensor, before: Tensor, step: int) -> Tensor:
        diff2, plan, routine = self.diff2, self.diff2.plan, self.diff2.plan.routine
        distance, size = _distance(now, before), routine.local_batch
        if distance == 0:
            return torch.zeros_like(now)
        rows = diff2.noise.batch(plan.records[self.worker], size, diff2.round, self.worker, step)
        batch = [t[rows.to(t.device)] for t in diff2.records[self.worker]]
        mean = diff2.per_record.difference(batch, now, before, routine.local_clip * distance)
        diff2.ledger.work(self.worker, "grad", 2 * size)
        self.clipped[0] += mean.clipped
        self.clipped[1] += size
        return diff2._noised(mean.vector, plan.sigma3 * distance, diff2.round, self.worker, step)


def _distance(a: Tensor, b: Tensor) -> float:
    return float(torch.linalg.vector_norm(a - b))


def _bytes(vector: Tensor) -> Payload:
    return vector.contiguous().cpu().numpy().data.cast("B")
