"""What a federated method is: client tasks, and a server that reacts to events.

A *task* is ``task(state, content, data, ctx) -> (state, content)``: what one client does with a message. Its
state is named tensors and scalars that stay with the client; nothing else outlives the call. A *server* is
told of events (`Start`, `Reply`, `Timer`) and answers with actions (`Send`, `After`). It keeps what it must
remember in a state of the same kind, so that every engine can save it.

Most methods go in rounds and extend `Synchronous`, which knows two questions: what is asked of whom (`ask`),
and what the replies make of the server's state (`close`). A round may hold several such exchanges.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

from cograd.core.space import ParamSpace
from cograd.core.streams import Stream, stream
from cograd.engines.federated.local import LocalModel

Content: TypeAlias = dict[str, Tensor]
"""What a message says: named tensors. Vectors of the model's length may travel through a codec."""

State: TypeAlias = dict[str, Any]
"""What a client or a server remembers: named tensors, and scalars (int, float, bool, str)."""


@dataclass
class ClientContext:
    """What a task may use besides its arguments.

    ``model`` computes losses and gradients at vectors, ``initial`` is the vector that all were given at the
    start, ``sizes`` the number of examples of every client. ``trained`` is for the engine: a task that trains
    leaves there the vector it ended with, so that accuracy before aggregation can be measured.
    """

    client: int
    round: int
    seed: int
    sizes: Sequence[int]
    model: LocalModel
    initial: Tensor
    work: dict[str, float] = field(default_factory=dict)
    reports: dict[str, float] = field(default_factory=dict)
    trained: Tensor | None = None

    def stream(self, *key: int | str) -> Stream:
        """Random numbers of this client, round and key; the same wherever and whenever it runs."""
        return stream(self.seed, "client", self.client, self.round, *key)

    def count(self, kind: str, amount: float) -> None:
        """Count work, in the ledger's units: ``grad`` is one gradient of one minibatch."""
        self.work[kind] = self.work.get(kind, 0.0) + amount

    def report(self, name: str, value: float) -> None:
        """Hand a figure to the history, such as the loss of the local training."""
        self.reports[name] = value


Task: TypeAlias = Callable[[State, Content, Any, ClientContext], tuple[State, Content]]


@dataclass(frozen=True)
class Start:
    """The session begins."""


@dataclass(frozen=True)
class Reply:
    """What came back from a client: ``round`` is that of the message it answers."""

    client: int
    task: str
    round: int
    content: Content


@dataclass(frozen=True)
class Timer:
    """A time that was asked for with `After` has come."""

    key: Hashable


@dataclass(frozen=True)
class Lost:
    """A client that was asked will not answer this message: its node died, or its reply was excluded."""

    client: int
    task: str
    round: int
    reason: str


Event: TypeAlias = Start | Reply | Timer | Lost


@dataclass(frozen=True)
class Send:
    """Have a client run a task. Contents that are one object are packed once for all receivers."""

    to: int
    task: str
    content: Content


@dataclass(frozen=True)
class After:
    """Have a `Timer` with this key come when ``delay`` has passed, in the session's units of time."""

    delay: float
    key: Hashable


Action: TypeAlias = Send | After


@dataclass
class Session:
    """What a server knows of the session: all of it is the same in a resumed run.

    ``select(round)`` are the clients that the session's sampler draws for a round, ascending. ``now`` is the
    engine's time. ``timeout`` is how long an exchange waits for replies; None waits for all of them.
    Figures in ``reports`` go to the history with the round in which they were put there; so do
    ``participants``, which a method sets where they are not just those who have answered since the last round.
    """

    space: ParamSpace
    initial: Tensor
    sizes: Sequence[int]
    seed: int
    select: Callable[[int], list[int]]
    timeout: float | None = None
    now: float = 0.0
    reports: dict[str, float] = field(default_factory=dict)
    participants: Sequence[int] | None = None

    @property
    def clients(self) -> int:
        return len(self.sizes)

    def stream(self, *key: int | str) -> Stream:
        """Random numbers of the server."""
        return stream(self.seed, "server", *key)


class NoReplies(RuntimeError):
    """An exchange ended, and nobody had answered."""


class Method(ABC):
    """A federated method: tasks by name, and the server's state machine.

    The server's state holds ``round``, the number of rounds (or aggregations) that are done; an engine counts,
    measures and saves whenever it grows.
    """

    @abstractmethod
    def tasks(self) -> Mapping[str, Task]:
        """The client's tasks by name."""

    @abstractmethod
    def start(self, session: Session) -> State:
        """The server's state before round 0, with ``round`` 0."""

    @abstractmethod
    def next(self, server: State, event: Event, session: Session) -> Sequence[Action]:
        """React to an event; changes ``server`` in place."""

    def shared(self, space: ParamSpace) -> ParamSpace:
        """The part of the model whose vectors travel: codecs apply to tensors with as many elements."""
        return space

    def resumed(  # noqa: B027  # most have nothing to do
        self, server: State, session: Session, on_the_way: Sequence[Event]
    ) -> None:
        """The session goes on from a saved state; ``on_the_way`` are the events that are still to come."""

    @abstractmethod
    def model(self, server: State) -> Tensor:
        """The global model (numel,): what the server would hand out."""

    def personal(self, server: State, client: State, number: int) -> Tensor:
        """The model that client ``number`` uses after aggregation; the global one unless a method
        personalises."""
        return self.model(server)


class Synchronous(Method):
    """A method of rounds, each of one exchange or more: all that are asked answer, then the server goes on.

    A subclass says what is asked of whom (`ask`) and what becomes of the replies (`close`), which it gets in
    the order of the clients' numbers whatever the order in which they came. Replies are kept by the instance
    and not by the state: an engine saves only between exchanges.
    """

    _replies: dict[int, Content]
    _asked: dict[int, str]

    @abstractmethod
    def ask(self, server: State, session: Session) -> Sequence[Send]:
        """The messages of the next exchange; at most one a client."""

    @abstractmethod
    def close(self, server: State, replies: Mapping[int, Content], session: Session) -> None:
        """Take the replies of an exchange into ``server``; the last exchange of a round adds 1 to ``round``."""

    def next(self, server: State, event: Event, session: Session) -> Sequence[Action]:
        if isinstance(event, Start):
            return self._open(server, session)
        if isinstance(event, Reply | Lost):
            if event.round != server["round"] or self._asked.get(event.client) != event.task:
                return ()  # too late: its exchange is over
            if isinstance(event, Reply):
                self._replies[event.client] = event.content
            else:
                del self._asked[event.client]
        if len(self._replies) < len(self._asked) and not self._late(event, server):
            return ()
        if not self._replies:
            raise NoReplies(f"round {server['round']}: none of the clients asked has answered")
        replies = {client: self._replies[client] for client in sorted(self._replies)}
        self._replies, self._asked = {}, {}
        self.close(server, replies, session)
        server["exchange"] = server.get("exchange", 0) + 1
        return self._open(server, session)

    def resumed(self, server: State, session: Session, on_the_way: Sequence[Event]) -> None:
        self._replies = {}
        self._asked = {e.client: e.task for e in on_the_way if isinstance(e, Reply | Lost)}

    def _open(self, server: State, session: Session) -> Sequence[Action]:
        sends = list(self.ask(server, session))
        self._replies, self._asked = {}, {send.to: send.task for send in sends}
        if session.timeout is None:
            return sends
        return [*sends, After(session.timeout, server.get("exchange", 0))]

    @staticmethod
    def _late(event: Event, server: State) -> bool:
        return isinstance(event, Timer) and event.key == server.get("exchange", 0)


def mean_of(replies: Mapping[int, Content], name: str, weights: Mapping[int, float] | None = None) -> Tensor:
    """The mean of a tensor of the replies, added in the order of the clients; ``weights`` need not sum to 1."""
    total, scale = None, 0.0
    for client, content in replies.items():
        weight = 1.0 if weights is None else weights[client]
        scale += weight
        if total is None:
            total = content[name] * weight
        else:
            total.add_(content[name], alpha=weight)
    if total is None or not scale > 0:
        raise ValueError(
            f"weights must be given for at least one client, and sum to more than 0; got {weights}"
        )
    return total.div_(scale)


def sizes_of(replies: Mapping[int, Content], session: Session) -> dict[int, float]:
    """The number of examples of each client that answered: FedAvg's weights."""
    return {client: float(session.sizes[client]) for client in replies}


def all_finite(content: Content) -> bool:
    return all(bool(torch.isfinite(t).all()) for t in content.values() if t.is_floating_point())
