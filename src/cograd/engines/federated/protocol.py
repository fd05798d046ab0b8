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
        self.work[kind] = self.work.get(kind, 0.0) + float(amount)

    def report(self, name: str, value: float) -> None:
        """Hand a figure to the history, such as the loss of the local training."""
        self.reports[name] = float(value)


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
class Exchange:
    """What a synchronous server waits for: the task of each client asked, and the replies so far."""

    asked: dict[int, str] = field(default_factory=dict)
    replies: dict[int, Content] = field(default_factory=dict)
    late: bool = False


@dataclass
class Session:
    """What a server knows of the session: all of it is the same in a resumed run.

    ``select(round)`` are the clients that the session's sampler draws for a round, ascending. ``now`` is the
    engine's time. ``timeout`` is how long an exchange waits for replies; None waits for all of them.
    Figures in ``reports`` go to the history with the round in which they were put there; so do
    ``participants``, which a method sets where they are not just those who have answered since the last round.
    ``exchange`` is `Synchronous`'s own.
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
    exchange: Exchange = field(default_factory=Exchange)

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

    def takes(self, server: State, reply: Reply, session: Session) -> bool:
        """Whether a reply still counts, or comes too late; an engine drops those that do not."""
        return True

    def shared(self, space: ParamSpace) -> ParamSpace:
        """The part of the model whose vectors travel: codecs apply to tensors with as many elements."""
        return space

    def resumed(  # noqa: B027  # most have nothing to do
        self, server: State, session: Session, coming: Sequence[Event], sends: Sequence[Send]
    ) -> None:
        """The session goes on from a saved state: these events are still to come, these messages to be sent."""

    def model(self, server: State) -> Tensor:
        """The global model (numel,), which the server would hand out: ``x`` of its state, unless a method keeps
        it elsewhere."""
        x: Tensor = server["x"]
        return x

    def personal(self, server: State, client: State, number: int) -> Tensor:
        """The model that client ``number`` uses after aggregation; the global one unless a method
        personalises."""
        return self.model(server)


class Synchronous(Method):
    """A method of rounds, each of one exchange or more: all that are asked answer, then the server goes on.

    A subclass says what is asked of whom (`ask`) and what becomes of the replies (`close`), which it gets in
    the order of the clients' numbers whatever the order in which they came. The exchanges of one round are told
    apart by their tasks. When the session's timeout has passed, an exchange goes on with the replies at hand,
    or with the first one if there is none. Replies are kept by the session and not by the state: an engine
    saves only between exchanges.
    """

    def ask(self, server: State, session: Session) -> Sequence[Send]:
        """The messages of the next exchange: at least one, and at most one a client. Unless a method asks
        something else, all participants of the round are to ``train`` from ``x``."""
        content = {"x": server["x"]}
        return [Send(client, "train", content) for client in session.select(server["round"])]

    @abstractmethod
    def close(self, server: State, replies: Mapping[int, Content], session: Session) -> None:
        """Take the replies of an exchange into ``server``; the last exchange of a round adds 1 to ``round``."""

    def next(self, server: State, event: Event, session: Session) -> Sequence[Action]:
        if isinstance(event, Start):
            return self._open(server, session)
        exchange = session.exchange
        if isinstance(event, Reply | Lost):
            if not self.takes(server, event, session):
                return ()
            if isinstance(event, Reply):
                exchange.replies[event.client] = event.content
            else:
                del exchange.asked[event.client]
        if isinstance(event, Timer) and event.key == server.get("exchange", 0):
            exchange.late = True
        if len(exchange.replies) < len(exchange.asked) and not (exchange.late and exchange.replies):
            return ()
        if not exchange.replies:
            raise NoReplies(f"round {server['round']}: none of the clients asked has answered")
        replies = {client: exchange.replies[client] for client in sorted(exchange.replies)}
        session.exchange = Exchange()
        self.close(server, replies, session)
        server["exchange"] = server.get("exchange", 0) + 1
        return self._open(server, session)

    def takes(self, server: State, reply: Reply | Lost, session: Session) -> bool:
        return reply.round == server["round"] and session.exchange.asked.get(reply.client) == reply.task

    def resumed(self, server: State, session: Session, coming: Sequence[Event], sends: Sequence[Send]) -> None:
        session.exchange = Exchange({send.to: send.task for send in sends})

    def _open(self, server: State, session: Session) -> Sequence[Action]:
        sends = list(self.ask(server, session))
        asked = {send.to: send.task for send in sends}
        if not sends or len(asked) < len(sends):
            to = [send.to for send in sends]
            raise RuntimeError(
                f"round {server['round']}: ask must name one client or more, each once; got {to}"
            )
        session.exchange = Exchange(asked)
        if session.timeout is None:
            return sends
        return [*sends, After(session.timeout, server.get("exchange", 0))]


def mean_of(replies: Mapping[int, Content], name: str, weights: Mapping[int, float] | None = None) -> Tensor:
    """The mean of a tensor of the replies, added in the order of the clients; ``weights`` need not sum to 1.

    Raises ValueError for a tensor of another shape than the first client's, naming the client.
    """
    weights = dict.fromkeys(replies, 1.0) if weights is None else weights
    scale = sum((weights[client] for client in replies), 0.0)
    if not scale > 0:
        raise ValueError(
            f"weights must be given for at least one client, and sum to more than 0; got {dict(weights)}"
        )
    return sum_of(replies, name, weights).div_(scale)


def sum_of(replies: Mapping[int, Content], name: str, weights: Mapping[int, float]) -> Tensor:
    """The sum of weights times a tensor of the replies, of which there must be one at least, added in the order
    of the clients.

    Raises ValueError for a tensor of another shape than the first client's, naming the client.
    """
    (first, content), *others = replies.items()
    total = content[name] * weights[first]
    for client, content in others:
        tensor = content[name]
        if tensor.shape != total.shape:
            raise ValueError(
                f"{name!r} of client {client} must have shape {tuple(total.shape)}; got {tuple(tensor.shape)}"
            )
        total.add_(tensor, alpha=weights[client])
    return total


def sizes_of(replies: Mapping[int, Content], session: Session) -> dict[int, float]:
    """The number of examples of each client that answered: FedAvg's weights."""
    return {client: float(session.sizes[client]) for client in replies}


def all_finite(content: Content) -> bool:
    """Whether no floating tensor holds NaN or infinity."""
    return all(_finite(t) for t in content.values() if t.is_floating_point())


def _finite(tensor: Tensor) -> bool:
    # a finite sum has finite terms, and is had sooner; finite terms may still overflow
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())
