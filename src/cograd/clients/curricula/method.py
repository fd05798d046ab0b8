"""A method under a curriculum: what its clients see, and whom its server asks."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cograd.clients.baselines.scaffold import Scaffold
from cograd.clients.curricula.local import DataCurriculum, PacedSGD
from cograd.clients.curricula.pacing import Pacing, ranked
from cograd.clients.curricula.scoring import Difficulty, Judging
from cograd.core.checks import check
from cograd.core.space import ParamSpace
from cograd.engines.federated.protocol import (
    Action,
    ClientContext,
    Content,
    Event,
    Lost,
    Method,
    Reply,
    Send,
    Session,
    State,
    Synchronous,
    Task,
)
from cograd.engines.federated.training import LocalSGD

OWN = "curriculum."
"""Prefix of what a curriculum keeps in states and sends: the method underneath does not see it."""
LAST, EXPERT = OWN + "last", OWN + "expert"
EXPERT_ON = {"data": OWN + "expert on data", "clients": OWN + "expert on clients"}
POOL, AT, UPDATES, TAUGHT = OWN + "pool", OWN + "at", OWN + "updates", OWN + "taught"


@dataclass(frozen=True, kw_only=True, repr=False)
class ClientCurriculum(Difficulty):
    """Which clients may be drawn when.

    The session's sampler says how many take part in a round, and the curriculum who: the pool is gone through
    without replacement, and then clients are scored again.

    Args:
        updates: the planned client updates, which is rounds times participants: what pacing is measured by.
        order, judge, score: see `Difficulty`; a client's score is the mean of its examples'.
        pacing: how the pool grows over the updates.
    """

    updates: int
    pacing: Pacing = Pacing("linear", start=0.4, full_at=0.2)

    def __post_init__(self) -> None:
        super().__post_init__()
        check(("updates", self.updates, ">= 1", self.updates >= 1))

    def rounds(self, clients: int, participants: int) -> int:
        """Rounds until the planned updates are done, the last pool being completed.

        They are more than updates / participants where a pool is no multiple of the participants: its last
        group is smaller.
        """
        check(
            ("clients", clients, ">= 1", clients >= 1),
            ("participants", participants, ">= 1", participants >= 1),
        )
        rounds = done = 0
        while done < self.updates:
            pool = self.pacing.size(done, self.updates, clients)
            rounds, done = rounds + math.ceil(pool / participants), done + pool
        return rounds


@dataclass(frozen=True, eq=False)
class Expert:
    """A model that judges examples: the vector (numel,) of one with the clients' architecture, trained before.

    The server sends it once to every client that is asked something; the client keeps its scores.
    """

    vector: Tensor

    def __repr__(self) -> str:
        content = self.vector.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return f"Expert({hashlib.blake2b(content, digest_size=8).hexdigest()})"


@dataclass
class Curriculum(Synchronous):
    """A federated method under a data curriculum, a client curriculum, or both.

    Shared: what the method shares. A client curriculum adds 4P bytes down to each of the N clients and 4 up
    (8 with ``judge="both"``) for every time that the pool was gone through, unless its order is random. An
    expert adds 4P down, once a client. Work: a ``forward`` for each example and judge.

    Args:
        method: what runs under it. With ``data``, a dataclass whose ``local`` is a `LocalSGD`. With
            ``clients``, a `Synchronous` one that asks those whom the session selects.
        data: which examples a client sees when; None is plain training.
        clients: which clients may be drawn when; None leaves that to the session's sampler.
        expert: who judges where ``judge="expert"``.

    The server's state and the clients' are the method's, and entries that begin with ``curriculum.``. Clients
    whose answer to the scoring is missing wait for the next one.

    Raises TypeError or ValueError for a method that cannot run under it, without any curriculum, for an expert
    that nobody asks or that is missing, and for SCAFFOLD with ``cooling``: its control variate is made for one
    learning rate.
    """

    method: Method
    data: DataCurriculum | None = None
    clients: ClientCurriculum | None = None
    expert: Expert | None = None

    def __post_init__(self) -> None:
        parts = [part for part in (self.data, self.clients) if part is not None]
        if not parts:
            raise ValueError("give data, clients or both; got neither")
        if any(part.asks_expert for part in parts) != (self.expert is not None):
            raise ValueError(f"expert must be given where judge is 'expert', only there; got {self.expert!r}")
        if self.clients is not None and type(self.method).next is not Synchronous.next:
            raise TypeError(f"clients needs a method of plain rounds; got {type(self.method).__name__}")
        self._remembers = any(part.remembers for part in parts)
        self._inner = self.method if self.data is None else _paced(self.method, self.data)
        if self.clients is not None and "score" in self._inner.tasks():
            raise ValueError(
                f"method must have no task 'score' of its own; {type(self.method).__name__} has one"
            )

    # Clients

    def tasks(self) -> Mapping[str, Task]:
        found = {name: self._judging(task) for name, task in self._inner.tasks().items()}
        return found if self.clients is None else {**found, "score": self.score}

    def score(self, state: State, content: Content, data: Any, ctx: ClientContext) -> tuple[State, Content]:
        """The scoring of a client curriculum: the mean score of the client's examples, by term (1 or 2,)."""
        assert self.clients is not None
        kept = self._kept(state, content, data, ctx)
        judging = _with_memory(ctx, kept, "clients")
        terms = self.clients.of(judging, data, content["x"])
        return {**state, **kept}, {"scores": terms.mean(1).float()}

    def _judging(self, task: Task) -> Task:
        """A task of the method, with the client's memory at hand."""

        def judged(state: State, content: Content, data: Any, ctx: ClientContext) -> tuple[State, Content]:
            kept = self._kept(state, content, data, ctx)
            judging = _with_memory(ctx, kept, "data")
            state, reply = task(state, content, data, judging)
            ctx.trained = judging.trained
            if ctx.trained is not None and self._remembers:
                kept[LAST] = ctx.trained.clone()
            return {**state, **kept}, reply

        return judged

    def _kept(self, state: State, content: Content, data: Any, ctx: ClientContext) -> State:
        """What a client remembers for its curriculum, taken out of its state and of the message."""
        kept = {name: state.pop(name) for name in list(state) if name.startswith(OWN)}
        expert = content.pop(EXPERT, None)
        if expert is not None:
            for name, part in (("data", self.data), ("clients", self.clients)):
                if part is not None and part.asks_expert:
                    kept[EXPERT_ON[name]] = part.measure(ctx, data, expert)
        return kept

    # Server

    def start(self, session: Session) -> State:
        server = self._inner.start(session)
        if self.clients is not None:
            server |= {POOL: torch.zeros(0, dtype=torch.int64), AT: 0, UPDATES: 0}
        if self.expert is not None:
            expected, got = tuple(session.initial.shape), tuple(self.expert.vector.shape)
            if got != expected:
                raise ValueError(f"expert must be a vector of the model's shape {expected}; got {got}")
            server[TAUGHT] = torch.zeros(session.clients, dtype=torch.bool)
        return server

    def next(self, server: State, event: Event, session: Session) -> Sequence[Action]:
        if isinstance(event, Lost) and self.expert is not None:
            server[TAUGHT][event.client] = False
        following = self._inner.next if self.clients is None else super().next
        actions = following(server, event, session)
        return actions if self.expert is None else self._teach(server, actions, self.expert)

    def _teach(self, server: State, actions: Sequence[Action], expert: Expert) -> list[Action]:
        """Add the expert to messages to those who have not got it; equal contents stay one object."""
        taught: dict[int, Content] = {}
        found: list[Action] = []
        for action in actions:
            if isinstance(action, Send) and not server[TAUGHT][action.to]:
                server[TAUGHT][action.to] = True
                content = action.content
                action = replace(
                    action, content=taught.setdefault(id(content), {**content, EXPERT: expert.vector})
                )
            found.append(action)
        return found

    def ask(self, server: State, session: Session) -> Sequence[Send]:
        assert isinstance(self._inner, Synchronous)
        assert self.clients is not None
        if server[AT] >= len(server[POOL]):
            if self.clients.order != "random":
                content = {"x": self.model(server)}
                return [Send(client, "score", content) for client in range(session.clients)]
            self._admit(server, dict.fromkeys(range(session.clients), 0.0), session)
        group = self._group(server, session)
        with _selecting(session, group):
            sends = self._inner.ask(server, session)
        strangers = sorted({send.to for send in sends} - set(group))
        if strangers:
            raise RuntimeError(f"the method asks clients {strangers}, whom the session has not selected")
        return sends

    def close(self, server: State, replies: Mapping[int, Content], session: Session) -> None:
        assert isinstance(self._inner, Synchronous)
        if server[AT] >= len(server[POOL]):
            self._admit(server, {c: float(r["scores"].sum()) for c, r in replies.items()}, session)
            return
        group, done = self._group(server, session), server["round"]
        with _selecting(session, group):
            self._inner.close(server, replies, session)
        if server["round"] != done:
            server[AT] += len(group)
            server[UPDATES] += len(group)
            session.reports["pool"] = float(len(server[POOL]))
            if session.participants is None:  # those who were only scored have not taken part
                session.participants = list(replies)

    def _admit(self, server: State, scores: Mapping[int, float], session: Session) -> None:
        """Set the pool: the first g(u) clients by score, shuffled."""
        assert self.clients is not None
        u = server[UPDATES]
        draws = session.stream("curriculum", u)
        order = ranked(torch.tensor(list(scores.values())), self.clients.order, draws)
        size = self.clients.pacing.size(u, self.clients.updates, session.clients)
        pool = torch.tensor(list(scores))[order[:size]]
        server[POOL], server[AT] = pool[draws.permutation(len(pool))], 0

    def _group(self, server: State, session: Session) -> list[int]:
        """The participants of this round: as many of the pool as the sampler draws, ascending."""
        count = len(session.select(server["round"]))
        return sorted(server[POOL][server[AT] : server[AT] + count].tolist())

    # What is the method's

    def takes(self, server: State, reply: Reply | Lost, session: Session) -> bool:
        if self.clients is not None:
            return super().takes(server, reply, session)
        return self._inner.takes(server, reply, session)  # type: ignore[arg-type]  # `Synchronous` gives it both

    def resumed(self, server: State, session: Session, coming: Sequence[Event], sends: Sequence[Send]) -> None:
        if self.clients is not None:
            super().resumed(server, session, coming, sends)
        else:
            self._inner.resumed(server, session, coming, sends)

    def shared(self, space: ParamSpace) -> ParamSpace:
        return self._inner.shared(space)

    def model(self, server: State) -> Tensor:
        return self._inner.model(server)

    def personal(self, server: State, client: State, number: int) -> Tensor:
        return self._inner.personal(server, client, number)


def _paced(method: Method, curriculum: DataCurriculum) -> Method:
    """The method with its clients' training under a data curriculum."""
    local = getattr(method, "local", None)
    if not is_dataclass(method) or type(local) is not LocalSGD:
        raise TypeError(
            f"data needs a method whose local is a LocalSGD; {type(method).__name__} has {type(local).__name__}"
        )
    if isinstance(method, Scaffold) and curriculum.cooling:
        raise ValueError(f"cooling must be 0 with SCAFFOLD; got {curriculum.cooling}")
    return replace(method, local=PacedSGD.of(local, curriculum))


def _with_memory(ctx: ClientContext, kept: State, name: str) -> Judging:
    return Judging(**vars(ctx), last=kept.get(LAST), expert=kept.get(EXPERT_ON[name]))


@contextmanager
def _selecting(session: Session, group: list[int]) -> Iterator[None]:
    """The session selects these clients."""
    before = session.select
    session.select = lambda round: list(group)
    try:
        yield
    finally:
        session.select = before
