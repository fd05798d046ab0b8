"""A node in a process of its own: real Poisson timers, exchanges over a network, a log that can be replayed.

A `Member` is an actor (`cograd.engines.events`): it runs on real sockets with ``serve`` and on a virtual clock
with ``Virtual``. Its gradients and averagings are the calls of `Node` that the simulation makes, so the
members' logs, merged into one list of events, give the same bits in a `DADAO` of the same objectives.

An averaging of the edge (i, j), i < j, is started by i and takes three messages:

1. ``ASK`` i -> j: i is busy from now on and has had no event after its time;
2. ``ACCEPT`` j -> i, when j is free: the event's time t, not before either's last event, and y_j + z_j at t;
3. ``TELL`` i -> j: y_i + z_i at t. Both have moved, both are free.

The first two bear a digest of graph, rates, constants and dtype: nodes that differ in them would drift apart
without an error, so they refuse each other.

A busy node queues what comes. Whoever waits for an ACCEPT waits for a larger id, and whoever waits for a TELL
waits for a node that answers at once: no circle of waiting, hence no deadlock.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections import deque
from collections.abc import Sequence
from dataclasses import astuple
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cograd.core.ledger import Ledger
from cograd.core.message import Payload
from cograd.core.streams import stream
from cograd.engines.events import Net
from cograd.machines.dadao.clock import Event
from cograd.machines.dadao.node import Constants, Flow, Gradient, Node, check_state
from cograd.machines.dadao.rates import GossipRates

ASK, ACCEPT, TELL, DONE = range(4)

_KIND, _TIMED = struct.Struct("<B"), struct.Struct("<Bd8s")
_GRADIENT, _END, _CHECK = "gradient", "end", "check"

OVERHEAD = 2 * _TIMED.size + _KIND.size
"""Bytes that an averaging's messages hold besides the two vectors: kind, time and digest, twice, and a kind."""


class Entry(NamedTuple):
    """One event in a node's log; ``peer`` is -1 for a gradient."""

    time: float
    kind: str
    peer: int


class Member:
    """One node of a network of processes.

    Args:
        gradient: of this node's objective; see `Gradient`.
        x0: (d,), on the CPU.
        rank: this node's number in the rates' graph.
        mu, L, rates, average, constants: as in `DADAO`; the same at every member.
        until: the unit of time at which it ends. It stops when the neighbours that may still ask are done too.
        seed: of its timers.
        patience: units of time after which a neighbour that is waited for counts as lost.
        ledger: counts a ``grad`` of work a gradient; give the engine (`serve`, `Virtual`) the same one, which
            counts the messages there.

    ``log`` has its events in order. Raises ValueError as `DADAO` does, for a rank that is not in the graph, for
    rates of several graphs and patience <= 0. While running: ValueError for a neighbour with another graph,
    other rates, constants or dtype, and TimeoutError that names a neighbour which does not answer, or does not
    end (it may itself be waiting for another one). One that nobody waits for is not missed.
    """

    def __init__(
        self,
        gradient: Gradient,
        x0: Tensor,
        *,
        rank: int,
        mu: float,
        L: float,
        rates: GossipRates,
        until: float,
        seed: int = 0,
        average: bool = False,
        constants: Constants | None = None,
        patience: float = 30.0,
        ledger: Ledger | None = None,
    ) -> None:
        if not 0 <= rank < rates.n:
            raise ValueError(f"rank must be a node of the graph, 0 .. {rates.n - 1}; got {rank}")
        if len(rates.graphs) > 1:
            raise ValueError(f"rates must be of one graph for processes; got {len(rates.graphs)} graphs")
        if x0.dim() != 1 or x0.device.type != "cpu":
            raise ValueError(f"x0 must be a vector on the CPU; got shape {tuple(x0.shape)} on {x0.device}")
        if not patience > 0:
            raise ValueError(f"patience must be > 0 units of time; got {patience}")
        constants = constants if constants is not None else Constants.of(mu, L, rates.chi1)
        check_state(x0, mu, L)
        self._state = Node.fresh(x0.detach())
        self._average = torch.zeros_like(self._state[0]) if average else None
        self.node = Node(self._state, gradient, constants, Flow(constants), self._average)
        self.rank, self.rates, self.until, self.seed, self.patience = rank, rates, until, seed, patience
        self.ledger = ledger if ledger is not None else Ledger()
        self.log: list[Entry] = []
        self.session = 0
        self._setting = _setting(rates, constants, x0.dtype)
        pairs = list(zip(rates.graphs[0].edges, rates.rates[0].tolist(), strict=True))
        self._above = {j: rate for (i, j), rate in pairs if i == rank}
        self._below = {i for (i, j), _ in pairs if j == rank}

    # The actor's three faces.

    def start(self, net: Net) -> None:
        if net.members != self.rates.n or net.rank != self.rank:
            raise ValueError(
                f"the session must have the graph's {self.rates.n} members and this one as {self.rank}; "
                f"got {net.members} and {net.rank}"
            )
        self._draw = stream(self.seed, "member", self.rank, self.session).numpy
        self._ahead = self.node.time  # of the clock that starts at 0 in every session
        self._jobs: deque[tuple[Any, float]] = deque()
        self._busy: tuple[int, int, float, float] | None = None  # what for, with whom, event's time, since
        self._heard = dict.fromkeys(self._below, 0.0)  # of those who may still ask, when they last did
        self._over, self._left = False, math.inf
        net.after(min(self.patience, 1.0), _CHECK)
        self._arm(net, _GRADIENT)
        for peer in self._above:
            self._arm(net, peer)
        net.after(max(0.0, self.until - self._time(net)), _END)

    def timer(self, net: Net, key: Any) -> None:
        if key == _CHECK:
            self._check_patience(net)
            net.after(min(self.patience, 1.0), _CHECK)
        elif key == _END:
            self._over = True
        elif not self._over:
            self._arm(net, key)
            self._jobs.append((key, 0.0))
        self._work(net)

    def receive(self, net: Net, sender: int, payload: Payload) -> None:
        kind = payload[0]
        if kind in (ASK, ACCEPT):
            self._compare(net, sender, payload)
        if kind == DONE:
            self._heard.pop(sender, None)
        elif kind == ASK:
            self._heard[sender] = net.now
            self._jobs.append(((ASK, sender), _TIMED.unpack(payload)[1]))
        elif self._busy is None or self._busy[:2] != ({ACCEPT: ASK, TELL: ACCEPT}.get(kind), sender):
            raise ValueError(f"message of kind {kind} from node {sender}, which was not asked for it")
        elif kind == ACCEPT:
            time, theirs = _TIMED.unpack_from(payload)[1], self._vector(payload, _TIMED.size)
            net.send(sender, _KIND.pack(TELL) + self.node.message(time).tobytes())
            self._meet(time, sender, theirs)
        else:
            self._meet(self._busy[2], sender, self._vector(payload, _KIND.size))
        self._work(net)

    def _compare(self, net: Net, sender: int, payload: Payload) -> None:
        kind, time, theirs = _TIMED.unpack_from(payload)
        if theirs != self._setting:
            if kind == ASK:  # so that the other one says it too
                net.send(sender, _TIMED.pack(ACCEPT, time, self._setting))
            raise ValueError(
                f"node {sender} has another graph, other rates, constants (mu, L) or another dtype than node "
                f"{self.rank}: all nodes must be given the same"
            )

    # What it does when it is free.

    def _work(self, net: Net) -> None:
        while self._jobs and self._busy is None:
            job, not_before = self._jobs.popleft()
            time = max(self._time(net), not_before)
            if isinstance(job, tuple):
                self._busy = (ACCEPT, job[1], time, net.now)
                net.send(job[1], _TIMED.pack(ACCEPT, time, self._setting) + self.node.message(time).tobytes())
            elif self._over:
                continue  # an own event that came too late
            elif job == _GRADIENT:
                self.ledger.work(self.rank, "grad")
                self.node.on_gradient(time)
                self.log.append(Entry(time, "grad", -1))
            else:
                self._busy = (ASK, job, time, net.now)
                net.send(job, _TIMED.pack(ASK, time, self._setting))
        if self._over and self._busy is None:
            self._leave(net)

    def _meet(self, time: float, peer: int, theirs: np.ndarray) -> None:
        self.node.on_message(time, theirs)
        self.log.append(Entry(time, "edge", peer))
        self._busy = None

    def _leave(self, net: Net) -> None:
        """Say once that no more will be asked, and stop when the same is known of all who may ask."""
        if self._left == math.inf:
            self._left = net.now
            for peer in self._above:
                net.send(peer, _KIND.pack(DONE))
        if not self._heard:
            self.session += 1
            net.stop()

    def _arm(self, net: Net, key: Any) -> None:
        rate = 1.0 if key == _GRADIENT else self._above[key]
        if rate > 0:
            net.after(self._draw.exponential(1 / rate), key)

    def _time(self, net: Net) -> float:
        """This node's clock: real time, set forward where a neighbour's clock was ahead, and always after its
        last event."""
        time = net.now + self._ahead
        if time <= self.node.time:
            self._ahead = self.node.time - net.now
            time = math.nextafter(self.node.time, math.inf)
        return time

    def _check_patience(self, net: Net) -> None:
        if self._busy is not None and net.now - self._busy[3] >= self.patience:
            raise TimeoutError(
                f"node {self._busy[1]} has not answered node {self.rank} for {self.patience:g} units of time"
            )
        for peer, heard in self._heard.items():
            if net.now - max(heard, self._left) >= self.patience:
                raise TimeoutError(
                    f"node {peer} has not told node {self.rank} for {self.patience:g} units of time that it is "
                    "done"
                )

    def _vector(self, payload: Payload, offset: int) -> np.ndarray:
        vector = np.frombuffer(payload, self.node.x.dtype, offset=offset)
        if vector.shape != self.node.x.shape:
            raise ValueError(f"a message must hold {len(self.node.x)} numbers; got {len(vector)}")
        return vector

    # Between sessions.

    def state_dict(self) -> dict[str, Any]:
        """The node's state; all members', taken when all have stopped, belong together.

        Raises RuntimeError in the middle of an averaging, of which the neighbour may have done its half.
        """
        if getattr(self, "_busy", None) is not None:
            raise RuntimeError(f"node {self.rank} is in the middle of an averaging; wait until it has stopped")
        return {
            "rank": self.rank,
            "members": self.rates.n,
            "state": self._state.clone(),
            "average": self._average.clone() if self._average is not None else None,
            "counts": (self.node.time, self.node.events, self.node.gradients),
            "session": self.session,
            "setting": self._setting.hex(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict` in a new session. Raises ValueError for another node's state, one of
        another number of members (z is shared out among them), another size or dtype, or a run with another
        graph, rates or constants."""
        for name, here in (("rank", self.rank), ("members", self.rates.n)):
            if state[name] != here:
                raise ValueError(f"the state is of {name} {state[name]}; here it is {here}")
        theirs, ours = state["state"], self._state
        averages = state["average"] is not None, self._average is not None
        if (theirs.shape, theirs.dtype) != (ours.shape, ours.dtype) or averages[0] != averages[1]:
            raise ValueError(
                f"the state must be of shape {tuple(ours.shape)} in {ours.dtype}, with averages in both or in "
                f"neither; got {tuple(theirs.shape)} in {theirs.dtype}"
            )
        if state["setting"] != self._setting.hex():
            raise ValueError(
                "the state is of a run with another graph, other rates, constants or another dtype"
            )
        self._state.copy_(theirs)
        if self._average is not None:
            self._average.copy_(state["average"])
        time, events, gradients = state["counts"]
        self.node.time, self.node.events, self.node.gradients = float(time), int(events), int(gradients)
        self.session = int(state["session"])


def _setting(rates: GossipRates, constants: Constants, dtype: torch.dtype) -> bytes:
    """8 bytes of what neighbours must have in common. Numbers count to nine digits: machines may differ in the
    last bits of the eigenvalues that they come from."""
    graph = rates.graphs[0]
    numbers = [f"{number:.9g}" for number in (*rates.rates[0].tolist(), *astuple(constants))]
    return hashlib.blake2b(repr((graph.n, graph.edges, numbers, dtype)).encode(), digest_size=8).digest()


def merged(logs: Sequence[Sequence[Entry]]) -> list[Event]:
    """The members' logs, in the order of their ranks, as one list of events for `DADAO.step`.

    Raises ValueError if two members do not tell the same of an averaging, or one's times do not increase.
    """
    events: list[Event] = []
    told: dict[Event, int] = {}
    for rank, log in enumerate(logs):
        last = -math.inf
        for time, kind, peer in log:
            if time <= last:
                raise ValueError(f"node {rank}: an event at {time} follows one at {last}")
            last = time
            if kind == "grad":
                events.append(Event(time, rank))
            else:
                event = Event(time, min(rank, peer), max(rank, peer))
                told[event] = told.get(event, 0) + 1
    for event, times in told.items():
        if times != 2:
            raise ValueError(f"nodes {event.i} and {event.j} do not both tell of {event}")
    return sorted([*events, *told])
