"""Parties that react to events: on a virtual clock in one process, or on real time over a `Mailbox`.

An `Actor` is told that it starts, that a message came, or that a time it asked for has come; it answers
through its `Net`. The same actor runs on

- `Virtual`: any number of parties in this process, on SimPy's clock, which jumps from event to event; how long
  a message takes is a function, so stragglers and slow links can be had without having them;
- `serve`: one party in this process, real seconds, the others behind a mailbox.
"""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Protocol

import simpy

from cograd.core.ledger import Ledger
from cograd.core.message import Frame, Payload
from cograd.engines.mailbox import Mailbox


class Net(Protocol):
    """What an actor can do. Times are in the actor's units (see `serve`)."""

    rank: int
    members: int

    @property
    def now(self) -> float:
        """Time since the start."""

    def send(self, to: int, payload: Payload) -> None:
        """Send to another party."""

    def after(self, delay: float, key: Hashable = None) -> None:
        """Have ``timer(net, key)`` called when ``delay`` has passed. Raises ValueError if it is negative."""

    def stop(self) -> None:
        """Take part no longer: what comes later is dropped."""


class Actor(Protocol):
    """One party."""

    def start(self, net: Net) -> None:
        """The session begins."""

    def receive(self, net: Net, sender: int, payload: Payload) -> None:
        """A message came."""

    def timer(self, net: Net, key: Any) -> None:
        """A time that was asked for has come."""


class Virtual:
    """All parties in this process on one virtual clock.

    ``delay(sender, to, nbytes)`` says how long a message takes, zero if not given; messages of equal arrival
    time are handed over in the order in which they were sent. ``ledger`` counts messages, each as a round of
    its sender's. Nothing depends on real time: two runs are the same.
    """

    def __init__(
        self,
        actors: Sequence[Actor],
        *,
        delay: Callable[[int, int, int], float] | None = None,
        ledger: Ledger | None = None,
    ) -> None:
        if not actors:
            raise ValueError("actors must hold one actor a party; got none")
        self.actors, self.delay, self.ledger = list(actors), delay, ledger if ledger is not None else Ledger()
        self.now, self.events = 0.0, 0
        self._nets = [_VirtualNet(self, rank) for rank in range(len(actors))]
        self._clock = simpy.Environment()
        self._started = False

    def run(self, until: float = math.inf) -> float:
        """Handle events up to time ``until``, or until all have stopped or nothing is left to happen. Returns
        the time. May be called again to go on."""
        if not self._started:
            self._started = True
            for net, actor in zip(self._nets, self.actors, strict=True):
                actor.start(net)
        clock = self._clock
        while clock.peek() <= until and math.isfinite(clock.peek()):
            clock.step()
        if math.isfinite(until):
            self.now = max(self.now, until)
        return self.now

    def _at(self, when: float, rank: int, sender: int, what: Any) -> None:
        event = self._clock.timeout(max(0.0, when - self._clock.now), (when, rank, sender, what))
        event.callbacks.append(self._happen)

    def _happen(self, event: simpy.Event) -> None:
        happened: Any = event.value
        self.now, rank, sender, what = happened
        net = self._nets[rank]
        if net.stopped:
            return
        self.events += 1
        if sender < 0:
            self.actors[rank].timer(net, what)
        else:
            self.actors[rank].receive(net, sender, what)


class _VirtualNet:
    """A party's hands on the virtual clock."""

    def __init__(self, clock: Virtual, rank: int) -> None:
        self._clock, self.rank, self.members = clock, rank, len(clock.actors)
        self.stopped, self._sent = False, 0

    @property
    def now(self) -> float:
        return self._clock.now

    def send(self, to: int, payload: Payload) -> None:
        _check_party(to, self.rank, self.members)
        clock, size = self._clock, len(payload)
        clock.ledger.send(self.rank, self._sent, size, to=to, frame=size + Frame.OVERHEAD)
        self._sent += 1
        delay = clock.delay(self.rank, to, size) if clock.delay else 0.0
        clock._at(clock.now + delay, to, self.rank, bytes(payload))

    def after(self, delay: float, key: Hashable = None) -> None:
        _check_delay(delay)
        self._clock._at(self._clock.now + delay, self.rank, -1, key)

    def stop(self) -> None:
        self.stopped = True


def serve(
    actor: Actor,
    mailbox: Mailbox,
    parties: Sequence[int],
    *,
    until: float = math.inf,
    unit: float = 1.0,
    patience: float = 20.0,
    ledger: Ledger | None = None,
) -> None:
    """Run one party for real until it stops or time ``until`` has come.

    ``parties`` are the mailbox's members in the order of their ranks, ``unit`` the seconds that a unit of the
    actor's time takes. Raises TimeoutError when nothing has happened for ``patience`` seconds and no timer is
    due, and PeerLost where the actor sends to a party that is gone.
    """
    net = _RealNet(mailbox, parties, unit, ledger if ledger is not None else Ledger())
    actor.start(net)
    while not net.stopped:
        due = min(net.timers[0][0] if net.timers else math.inf, until)
        wait = (due - net.now) * unit
        if wait <= 0:
            if due >= until:
                return
            actor.timer(net, heapq.heappop(net.timers)[2])
            continue
        try:
            mail = mailbox.recv(min(wait, patience))
        except TimeoutError:
            if wait > patience:
                raise
            continue
        actor.receive(net, net.rank_of[mail.sender], mail.payload)


class _RealNet:
    """A party's hands on the mailbox and the machine's clock."""

    def __init__(self, mailbox: Mailbox, parties: Sequence[int], unit: float, ledger: Ledger) -> None:
        if mailbox.member not in parties or len(set(parties)) < len(parties):
            raise ValueError(f"parties must hold each member once, {mailbox.member} too; got {list(parties)}")
        self._mailbox, self._parties, self._unit, self._ledger = mailbox, list(parties), unit, ledger
        self.rank, self.members = self._parties.index(mailbox.member), len(parties)
        self.rank_of = {member: rank for rank, member in enumerate(parties)}
        self.timers: list[tuple[float, int, Any]] = []
        self.stopped, self._sent, self._asked = False, 0, 0
        self._began = time.monotonic()

    @property
    def now(self) -> float:
        return (time.monotonic() - self._began) / self._unit

    def send(self, to: int, payload: Payload) -> None:
        _check_party(to, self.rank, self.members)
        self._mailbox.send(self._parties[to], self._sent, payload)
        self._ledger.send(self.rank, self._sent, len(payload), to=to, frame=len(payload) + Frame.OVERHEAD)
        self._sent += 1

    def after(self, delay: float, key: Hashable = None) -> None:
        _check_delay(delay)
        self._asked += 1
        heapq.heappush(self.timers, (self.now + delay, self._asked, key))

    def stop(self) -> None:
        self.stopped = True


def _check_party(to: int, rank: int, members: int) -> None:
    if not 0 <= to < members or to == rank:
        raise ValueError(f"to must be another party in 0 .. {members - 1}; got {to}")


def _check_delay(delay: float) -> None:
    if not delay >= 0:
        raise ValueError(f"delay must be >= 0; got {delay}")
