"""Local training alone: what every personalised method has to beat. No message carries anything.

client: w_i <- some epochs of SGD on its own examples, from w_i
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from cograd.engines.federated.protocol import ClientContext, Content, Send, Session, State, Synchronous, Task
from cograd.engines.federated.training import LocalSGD


@dataclass
class LocalOnly(Synchronous):
    """Shared: nothing; all clients start from the same model. ``local`` is the clients' training."""

    local: LocalSGD

    def tasks(self) -> Mapping[str, Task]:
        return {"train": self.train}

    def train(self, state: State, content: Content, data: Any, ctx: ClientContext) -> tuple[State, Content]:
        """The client's round; its state is its model ``w`` (numel,)."""
        return {**state, "w": self.local.run(ctx, data, state.get("w", ctx.initial)).clone()}, {}

    def start(self, session: Session) -> State:
        return {"round": 0, "x": session.initial.clone()}

    def ask(self, server: State, session: Session) -> Sequence[Send]:
        nothing: Content = {}
        return [Send(client, "train", nothing) for client in session.select(server["round"])]

    def close(self, server: State, replies: Mapping[int, Content], session: Session) -> None:
        server["round"] += 1

    def personal(self, server: State, client: State, number: int) -> Tensor:
        w: Tensor = client["w"] if "w" in client else server["x"]
        return w
