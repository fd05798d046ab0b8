"""Where the workers are: simulated in this process on given delays, or real processes behind a mailbox.

A cluster runs one round: it hands out the tasks, decides by the round protocol (see `clock`) when the round
ends, and returns what had arrived by then. The training run neither knows nor cares which one it is.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from cograd.core.message import Payload
from cograd.engines.mailbox import Mailbox, PeerLost
from cograd.machines.gradient_coding.clock import Seconds, Trace, Wait, check_protocol, end_of_round
from cograd.machines.gradient_coding.codes import Mask
from cograd.machines.gradient_coding.learners import Bench
from cograd.machines.gradient_coding.schemes import MiniTask, Scheme, scheme_of


@dataclass(frozen=True)
class Orders:
    """What a round needs: its number in the whole run, the number of the scheme's first job, every busy
    worker's tasks, and the jobs whose weights no worker has yet: one that starts, and in the first round after
    a checkpoint was loaded all that are in flight."""

    number: int
    base: int
    tasks: Mapping[int, list[MiniTask]]
    fresh: Sequence[int]


@dataclass(frozen=True)
class Outcome:
    """The results that had arrived when the round ended, by worker, in the order of its tasks; how long it
    lasted in seconds, whether it was waited out, and after how many seconds each worker's result was there,
    (n,): NaN for none."""

    results: Mapping[int, Sequence[Tensor]]
    seconds: float
    waited: bool
    times: Seconds


class Cluster(Protocol):
    """n workers that do rounds of tasks."""

    n: int

    def round(self, scheme: Scheme, orders: Orders, bench: Bench) -> Outcome:
        """Run one round. ``bench`` computes tasks here, if the cluster has no workers of its own."""


class SimulatedCluster:
    """Workers in this process: delays from a trace, gradients computed here. Results of stragglers are not
    computed.

    Args:
        trace: seconds of each worker in each round; a run of more rounds than it has is refused.
        slope: seconds that a whole job's data would take longer, see `Trace.at`.
        mu, wait: of the round protocol.
    """

    def __init__(self, trace: Trace, slope: float = 0.0, mu: float = 1.0, wait: Wait = "conforming") -> None:
        check_protocol(mu, wait)
        if not slope >= 0:
            raise ValueError(f"slope must be >= 0 seconds; got {slope}")
        self.trace, self.slope, self.mu, self.wait = trace, slope, mu, wait
        self.n = trace.n

    def round(self, scheme: Scheme, orders: Orders, bench: Bench) -> Outcome:
        if orders.number >= len(self.trace.seconds):
            raise ValueError(f"the trace has {len(self.trace.seconds)} rounds; this is round {orders.number}")
        row = Trace(self.trace.seconds[orders.number : orders.number + 1], self.trace.load)
        seconds = row.at(scheme.load, self.slope)[0]
        end, waited = end_of_round(scheme, seconds, self.mu, self.wait)
        results = {
            worker: bench.answer(worker, tasks, orders.base)
            for worker, tasks in orders.tasks.items()
            if seconds[worker] <= end
        }
        times = np.full(self.n, np.nan)
        times[list(results)] = seconds[list(results)]
        return Outcome(results, end, waited, times)


# Real processes: weights of a job, tasks, the word to send a result that was held back, and the end.

WEIGHTS, WORK, RELEASE, STOP = "weights", "work", "release", "stop"


class MailboxCluster:
    """Workers in processes of their own that run `serve`; this is the master's side.

    Worker i is member i of the mailbox's session and must be known to it. What arrives after its round is
    dropped. A worker that is lost counts as a straggler for as long as the scheme allows it.

    Args:
        mailbox: the master's, with any other number.
        n: number of workers.
        mu, wait: of the round protocol, on real time; ``mu = math.inf`` waits for everybody, as a probe should.
        patience: seconds to wait for a result without which the round cannot end.
        script: instead of real time, who straggles: ``script(round)`` gives a mask of n. Those workers hold
            their result until they are told, in the order of their numbers, or until their next tasks come;
            the others are waited for. Such a run is repeatable.
    """

    def __init__(
        self,
        mailbox: Mailbox,
        n: int,
        *,
        mu: float = 1.0,
        wait: Wait = "conforming",
        patience: float = 60.0,
        script: Callable[[int], Mask] | None = None,
    ) -> None:
        check_protocol(mu, wait)
        unknown = [worker for worker in range(n) if worker not in mailbox.members]
        if unknown or mailbox.member < n:
            raise ValueError(
                f"the mailbox must know members 0 .. n - 1 = {n - 1} and be another; it is {mailbox.member} "
                f"and does not know {unknown}"
            )
        self.mailbox, self.n, self.mu, self.wait = mailbox, n, mu, wait
        self.patience, self.script = patience, script
        self.numbers = itertools.count()

    def round(self, scheme: Scheme, orders: Orders, bench: Bench) -> Outcome:
        round_ = _Round(self, scheme, orders, bench)
        round_.send_out()
        if not orders.tasks:
            return Outcome({}, 0.0, False, round_.times)
        if self.script:
            round_.receive_until(lambda: not (round_.missing & ~round_.held).any())
        else:
            round_.receive_until(lambda: bool(round_.results))
            round_.receive_for(self.mu * round_.elapsed)
        waited = not scheme.conforms(round_.missing)
        while round_.missing.any() if waited and self.wait == "all" else not scheme.conforms(round_.missing):
            round_.admit()
        return Outcome(round_.results, round_.elapsed, waited, round_.times)

    def close(self) -> None:
        """Tell the workers to leave."""
        for worker in range(self.n):
            self.try_send(worker, 0, pack({"do": STOP}))

    def try_send(self, worker: int, number: int, payload: Payload) -> None:
        """Send to a worker; one that is lost is a straggler from now on."""
        try:
            self.mailbox.send(worker, number, payload)
        except PeerLost:
            return  # `receive_until` says so if the round needs it


class _Round:
    """What was sent out for a round, and what has arrived of it.

    Its frames bear a number that the cluster never uses again, so that after a checkpoint was loaded no result
    of the round that once had the same number in the run passes for one of this.
    """

    def __init__(self, cluster: MailboxCluster, scheme: Scheme, orders: Orders, bench: Bench) -> None:
        self.cluster, self.scheme, self.orders, self.bench = cluster, scheme, orders, bench
        self.number = next(cluster.numbers)
        self.held = np.zeros(cluster.n, dtype=bool)
        if cluster.script:
            self.held |= cluster.script(orders.number)
        self.missing, self._resent = scheme.busy(), set[int]()
        self.results: dict[int, list[Tensor]] = {}
        self.times = np.full(cluster.n, np.nan)
        self._began = time.monotonic()

    @property
    def elapsed(self) -> float:
        """Seconds since it began."""
        return time.monotonic() - self._began

    def send_out(self) -> None:
        """Every worker gets the new weights, also one that has nothing to do."""
        weights = [self._weights(job) for job in self.orders.fresh]
        for worker in range(self.cluster.n):
            self._order(worker, weights)

    def _weights(self, job: int) -> bytes:
        return pack({"do": WEIGHTS, "job": job}, to_bytes(self.bench.weights(job)))

    def _order(self, worker: int, weights: Sequence[bytes]) -> None:
        tasks = [[task.job, task.item] for task in self.orders.tasks.get(worker, [])]
        order = {
            "do": WORK,
            "scheme": [type(self.scheme).__name__, self.scheme.arguments],
            "base": self.orders.base,
            "tasks": tasks,
            "hold": bool(self.held[worker]),
        }
        for payload in (*weights, pack(order)):
            self.cluster.try_send(worker, self.number, payload)

    def admit(self) -> None:
        """Wait for one more result."""
        before = len(self.results)
        waiting = np.flatnonzero(self.missing & self.held)
        if len(waiting):
            self.cluster.try_send(int(waiting[0]), self.number, pack({"do": RELEASE}))
            self.held[waiting[0]] = False
        self.receive_until(lambda: len(self.results) > before)

    def receive_until(self, enough: Callable[[], bool]) -> None:
        """Raises PeerLost if all that are missing are gone, TimeoutError if nothing came within patience."""
        while not enough():
            missing = np.flatnonzero(self.missing).tolist()
            if self.gone:
                raise PeerLost(missing[0], f"round {self.orders.number} cannot end without it")
            try:
                self._take(self.cluster.patience)
            except TimeoutError:
                raise TimeoutError(
                    f"round {self.orders.number}: no result of workers {missing} in {self.cluster.patience} s"
                ) from None

    @property
    def gone(self) -> bool:
        """Whether somebody is missing and all that are have hung up."""
        missing = np.flatnonzero(self.missing).tolist()
        return bool(missing) and set(missing) <= set(self.cluster.mailbox.lost)

    def receive_for(self, seconds: float) -> None:
        """Ends earlier if nobody is left to come, or nothing came within patience."""
        end = time.monotonic() + seconds
        while self.missing.any() and not self.gone and (left := end - time.monotonic()) > 0:
            try:
                self._take(min(left, self.cluster.patience))
            except TimeoutError:
                return

    def _take(self, timeout: float) -> None:
        mail = self.cluster.mailbox.recv(timeout)
        worker = mail.sender
        if mail.round != self.number or not (worker < self.cluster.n and self.missing[worker]):
            return  # too late
        tasks = self.orders.tasks[worker]
        if not mail.payload:  # it has started again, or was out of reach when a job began
            if worker in self._resent:
                raise ValueError(
                    f"worker {worker} holds other jobs' weights: its learners are not the master's"
                )
            self._resent.add(worker)
            self._order(worker, [self._weights(self.orders.base + task.job) for task in tasks])
            return
        self.results[worker] = self.bench.split(mail.payload, len(tasks))
        self.missing[worker] = False
        self.times[worker] = self.elapsed


def serve(mailbox: Mailbox, master: int, bench: Bench) -> None:
    """A worker: do what the master asks until it says stop or is gone.

    ``bench`` is built from the same learners, dtype and seed as the master's; the scheme comes with the orders,
    trainable weights with the jobs. A worker that lacks the weights of a job that it is asked for says so and
    gets them. Orders that newer ones have overtaken are not begun: their rounds are over.
    """
    worker = _Worker(mailbox, master, bench)
    try:
        while worker.listen():
            worker.work()
    except PeerLost:
        return


class _Worker:
    """The order that is to be done next, and the result that is held back."""

    def __init__(self, mailbox: Mailbox, master: int, bench: Bench) -> None:
        self.mailbox, self.master, self.bench = mailbox, master, bench
        self.order: tuple[int, dict[str, Any]] | None = None
        self.held: tuple[int, bytes] | None = None

    def listen(self) -> bool:
        """Wait for mail and read all that is there; whether to go on. Of several orders the last is kept."""
        timeout: float | None = None
        while True:
            try:
                mail = self.mailbox.recv(timeout, from_=self.master)
            except TimeoutError:
                return True
            timeout = 0.0
            head, body = unpack(mail.payload)
            if head["do"] == STOP:
                return False
            if head["do"] == WEIGHTS:
                self.bench.load(head["job"], from_bytes(body, self.bench.weights_dtype))
                continue
            if self.held is not None:  # told to release it, or overtaken by the next round
                self.mailbox.send(self.master, *self.held)
                self.held = None
            if head["do"] == WORK:
                self.order = mail.round, head
            elif self.order is not None:
                self.order[1]["hold"] = False

    def work(self) -> None:
        """Do the order, if there is one."""
        if self.order is None:
            return
        (number, order), self.order = self.order, None
        bench, (kind, arguments), base = self.bench, order["scheme"], order["base"]
        if (kind, arguments) != (type(bench.scheme).__name__, bench.scheme.arguments):
            bench.restart(scheme_of(kind, arguments))
        tasks = [bench.scheme.task(self.mailbox.member, job, item) for job, item in order["tasks"]]
        if not tasks:
            return
        if not all(bench.holds(base + task.job) for task in tasks):
            self.mailbox.send(self.master, number, b"")
            return
        answer = b"".join(to_bytes(vector) for vector in bench.answer(self.mailbox.member, tasks, base))
        if order["hold"]:
            self.held = number, answer
        else:
            self.mailbox.send(self.master, number, answer)


def pack(head: Mapping[str, Any], body: Payload = b"") -> bytes:
    """A JSON object, its length before it (4 bytes), and bytes behind it."""
    text = json.dumps(head).encode()
    return b"".join((len(text).to_bytes(4, "little"), text, body))


def unpack(payload: Payload) -> tuple[dict[str, Any], memoryview]:
    """Inverse of `pack`."""
    view = memoryview(payload)
    end = 4 + int.from_bytes(view[:4], "little")
    return json.loads(bytes(view[4:end])), view[end:]


def to_bytes(vector: Tensor) -> bytes:
    return vector.detach().cpu().contiguous().numpy().tobytes()


def from_bytes(data: Payload, dtype: torch.dtype) -> Tensor:
    """A vector of a dtype; its own memory."""
    return torch.frombuffer(bytearray(data), dtype=dtype)
