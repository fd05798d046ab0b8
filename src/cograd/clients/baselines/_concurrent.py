"""What asynchronous servers of the literature share: each answer is taken as it comes, and another client
starts.

So many clients work at once as the session's sampler selects for round 0. When one of them answers, an idle
one, drawn uniformly, gets the current model. A client that has already had this very model waits for the next:
from the same model it would compute the same again.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cograd.engines.federated.protocol import (
    Action,
    After,
    ClientContext,
    Content,
    Event,
    Lost,
    Method,
    NoReplies,
    Reply,
    Send,
    Session,
    Start,
    State,
    Task,
    Timer,
)

SETTLE = "settle"
"""Key of the timer that comes when all answers of this very time are in."""


class Concurrent(Method):
    """The server's state: ``origin[i]``, the round whose model client i got last, or -1; ``busy`` and ``held``
    say who works and whose answer waits its turn, as ``held.i``; ``starts`` counts draws."""

    def tasks(self) -> Mapping[str, Task]:
        return {"train": self.train}

    @abstractmethod
    def train(self, state: State, content: Content, data: Any, ctx: ClientContext) -> tuple[State, Content]:
        """The client's training; its content is one vector."""

    @abstractmethod
    def take(self, server: State, vector: Tensor, staleness: int) -> None:
        """Take one answer into the state; adds 1 to ``round`` if the model has changed."""

    def start(self, session: Session) -> State:
        if session.timeout is not None:
            raise ValueError(f"timeout must be None: no answer is waited for; got {session.timeout}")
        clients = session.clients
        return {
            "round": 0,
            "x": session.initial.clone(),
            "slots": len(session.select(0)),
            "starts": 0,
            "settling": False,
            "origin": torch.full((clients,), -1),
            "busy": torch.zeros(clients, dtype=torch.bool),
            "held": torch.zeros(clients, dtype=torch.bool),
        }

    def next(self, server: State, event: Event, session: Session) -> Sequence[Action]:
        if isinstance(event, Start):
            return self._send(server, session.select(0))
        if isinstance(event, Timer):
            server["settling"] = False
            return self._process(server, session)
        if isinstance(event, Reply):
            server["held"][event.client] = True
            server[f"held.{event.client}"] = next(iter(event.content.values()))
        elif isinstance(event, Lost):
            server["busy"][event.client] = False
        return self._settle(server)

    def _process(self, server: State, session: Session) -> list[Action]:
        """Take answers in the order of the clients, up to one that changes the model; fill free slots."""
        done, sends = server["round"], list[Send]()
        for client in server["held"].nonzero()[:, 0].tolist():
            server["held"][client] = server["busy"][client] = False
            staleness = server["round"] - int(server["origin"][client])
            self.take(server, server.pop(f"held.{client}"), staleness)
            session.reports["staleness"] = float(staleness)
            session.participants = [*(session.participants or ()), client]
            sends += self._fill(server, session)
            if server["round"] != done:
                break
        if not sends and not server["held"].any():
            sends += self._fill(server, session)
        if not server["busy"].any():
            raise NoReplies(f"round {server['round']}: none of the clients asked has answered")
        return [*(self._settle(server) if server["held"].any() else ()), *sends]

    def _settle(self, server: State) -> list[Action]:
        if server["settling"]:
            return []
        server["settling"] = True
        return [After(0.0, SETTLE)]

    def _fill(self, server: State, session: Session) -> list[Send]:
        """Start idle clients until all slots are taken."""
        idle = (~server["busy"] & (server["origin"] != server["round"])).nonzero()[:, 0]
        free = min(server["slots"] - int(server["busy"].sum()), len(idle))
        if free < 1:
            return []
        drawn = session.stream("next", server["starts"]).choice(len(idle), free)
        return self._send(server, idle[drawn].tolist())

    def _send(self, server: State, clients: Sequence[int]) -> list[Send]:
        server["starts"] += 1
        server["busy"][clients] = True
        server["origin"][clients] = server["round"]
        content = {"x": server["x"]}
        return [Send(client, "train", content) for client in clients]
