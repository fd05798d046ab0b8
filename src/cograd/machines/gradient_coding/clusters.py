"""Where the workers are: simulated in this process on given delays, or real processes behind a mailbox.

A cluster runs one round: it hands out the tasks, decides by the round protocol (see `clock`) when the round
ends, and returns what had arrived by then. The training run neither knows nor cares which one it is.
"""

from __future__ import annotations

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
from cograd.machines.gradient_coding.clock import Trace, Wait, check_protocol, end_of_round
from cograd.machines.gradient_coding.codes import Mask
from cograd.machines.gradient_coding.learners import Bench
from cograd.machines.gradient_coding.schemes import MiniTask, Scheme, scheme_of


@dataclass(frozen=True)
class Orders:
    """What a round needs: its number in the whole run, the number of the scheme's first job, every busy
    worker's tasks, and the job that starts with its model's weights (numel,), if one does."""

    number: int
    base: int
    tasks: Mapping[int, list[MiniTask]]
    fresh: tuple[int, Tensor] | None


@dataclass(frozen=True)
class Outcome:
    """The results that had arrived when the round ended, by worker, in the order of its tasks; how long it
    lasted in seconds, and whether it was waited out."""

    results: Mapping[int, Sequence[Tensor]]
    seconds: float
    waited: bool


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
        return Outcome(results, end, waited)


# Real processes.

STOP, RELEASE, WORK = "stop", "release", "work"


class MailboxCluster:
    """Workers in processes of their own that run `serve`; this is the master's side.

    Worker i is member i of the mailbox's session and must be known to it. What arrives after its round is
    dropped. A worker that is lost counts as a straggler for as long as the scheme allows it.

    Args:
        mailbox: the master's, with any other number.
        n: number of workers.
        mu, wait: of the round protocol, on real time.
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

    def round(self, scheme: Scheme, orders: Orders, bench: Bench) -> Outcome:
        began = time.monotonic()
        held = self.script(orders.number) if self.script else np.zeros(self.n, dtype=bool)
        self._send_out(scheme, orders, held)
        round_ = _Round(self, scheme, orders, bench)
        if not orders.tasks:
            return Outcome({}, 0.0, False)
        if self.script:
            round_.receive_until(lambda: not (round_.missing & ~held).any())
        else:
            round_.receive_until(lambda: bool(round_.results))
            round_.receive_for(self.mu * (time.monotonic() - began))
        waited = not scheme.conforms(round_.missing)
        while round_.missing.any() if waited and self.wait == "all" else not scheme.conforms(round_.missing):
            self._admit(round_, held, orders.number)
        return Outcome(round_.results, time.monotonic() - began, waited)

    def close(self) -> None:
        """Tell the workers to leave."""
        for worker in range(self.n):
            self._try_send(worker, 0, pack({"do": STOP}))

    def _send_out(self, scheme: Scheme, orders: Orders, held: Mask) -> None:
        """Every worker gets the new weights, also one that has nothing to do."""
        fresh, body = (None, b"") if orders.fresh is None else (orders.fresh[0], to_bytes(orders.fresh[1]))
        kind = [type(scheme).__name__, scheme.arguments]
        head = {"do": WORK, "scheme": kind, "base": orders.base, "fresh": fresh}
        for worker in range(self.n):
            tasks = [[task.job, task.item] for task in orders.tasks.get(worker, [])]
            order = {**head, "tasks": tasks, "hold": bool(held[worker])}
            self._try_send(worker, orders.number, pack(order, body))

    def _admit(self, round_: _Round, held: Mask, number: int) -> None:
        """Wait for one more result."""
        before = len(round_.results)
        waiting = np.flatnonzero(round_.missing & held)
        if len(waiting):
            self._try_send(int(waiting[0]), number, pack({"do": RELEASE}))
        round_.receive_until(lambda: len(round_.results) > before)

    def _try_send(self, worker: int, number: int, payload: Payload) -> None:
        try:
            self.mailbox.send(worker, number, payload)
        except PeerLost:
            return  # a straggler from now on; `receive_until` says so if the round needs it


class _Round:
    """What has arrived of a round."""

    def __init__(self, cluster: MailboxCluster, scheme: Scheme, orders: Orders, bench: Bench) -> None:
        self.cluster, self.orders, self.bench = cluster, orders, bench
        self.results: dict[int, list[Tensor]] = {}
        self.missing = scheme.busy()

    def receive_until(self, enough: Callable[[], bool]) -> None:
        """Raises PeerLost if all that are missing are gone, TimeoutError if nothing came within patience."""
        while not enough():
            missing = np.flatnonzero(self.missing).tolist()
            if missing and set(missing) <= set(self.cluster.mailbox.lost):
                raise PeerLost(missing[0], f"round {self.orders.number} cannot end without it")
            try:
                self._take(self.cluster.patience)
            except TimeoutError:
                raise TimeoutError(
                    f"round {self.orders.number}: no result of workers {missing} in {self.cluster.patience} s"
                ) from None

    def receive_for(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while self.missing.any() and (left := end - time.monotonic()) > 0:
            try:
                self._take(left)
            except TimeoutError:
                return

    def _take(self, timeout: float) -> None:
        mail = self.cluster.mailbox.recv(timeout)
        if mail.round != self.orders.number or not (mail.sender < self.cluster.n and self.missing[mail.sender]):
            return  # too late
        self.results[mail.sender] = self.bench.split(mail.payload, len(self.orders.tasks[mail.sender]))
        self.missing[mail.sender] = False


def serve(mailbox: Mailbox, master: int, bench: Bench) -> None:
    """A worker: do what the master asks until it says stop or is gone. ``bench`` is built from the same
    learners, dtype and seed as the master's; the scheme comes with the orders."""
    held: tuple[int, bytes] | None = None
    while True:
        try:
            mail = mailbox.recv(None, from_=master)
        except PeerLost:
            return
        order, body = unpack(mail.payload)
        if order["do"] == STOP:
            return
        if held is not None:  # told to release it, or overtaken by the next round
            mailbox.send(master, *held)
            held = None
        if order["do"] == RELEASE:
            continue
        kind, arguments = order["scheme"]
        if (kind, arguments) != (type(bench.scheme).__name__, bench.scheme.arguments):
            bench.restart(scheme_of(kind, arguments))
        if order["fresh"] is not None:
            bench.load(order["fresh"], from_bytes(body, bench.weights_dtype))
        tasks = [bench.scheme.task(mailbox.member, job, item) for job, item in order["tasks"]]
        if not tasks:
            continue
        answer = b"".join(to_bytes(vector) for vector in bench.answer(mailbox.member, tasks, order["base"]))
        if order["hold"]:
            held = mail.round, answer
        else:
            mailbox.send(master, mail.round, answer)


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
