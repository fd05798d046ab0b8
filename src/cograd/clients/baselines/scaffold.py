"""SCAFFOLD (Karimireddy et al. 2020, arXiv 1910.06378, algorithm 1, option II): drift corrected by control
variates.

    client: v <- v - lr (grad f_i(v) - c_i + c),  K times
            c_i+ = c_i - c + (x - v) / (K lr);  send v - x and c_i+ - c_i
    server: x <- x + server_lr * mean(v_i - x),  c <- c + |S|/N * mean(c_i+ - c_i)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cograd.engines.federated.protocol import (
    ClientContext,
    Content,
    Send,
    Session,
    State,
    Synchronous,
    Task,
    mean_of,
)
from cograd.engines.federated.training import LocalSGD


@dataclass
class Scaffold(Synchronous):
    """Shared: change of the model and of the control variate, 8P bytes up, and both, 8P bytes down, a round.

    Args:
        local: the clients' training; plain SGD, as the control variate is a mean of gradients.
        lr: server learning rate.
    """

    local: LocalSGD
    lr: float = 1.0

    def __post_init__(self) -> None:
        if self.local.momentum:
            raise ValueError(f"local must have no momentum with SCAFFOLD; got {self.local.momentum}")
        if not self.lr > 0:
            raise ValueError(f"lr must be > 0; got {self.lr}")

    def tasks(self) -> Mapping[str, Task]:
        return {"train": self.train}

    def train(self, state: State, content: Content, data: Any, ctx: ClientContext) -> tuple[State, Content]:
        """The client's round; its state is its control variate ``c``."""
        x, c = content["x"], content["c"]
        own = state.get("c", torch.zeros_like(x))
        correction = c - own
        steps = self.local.length(len(data))

        def corrected(v: Tensor, xb: Tensor, yb: Tensor) -> Tensor:
            ctx.count("grad", 1)
            return ctx.model.gradient(v, xb, yb).add_(correction)

        delta = self.local.run(ctx, data, x, corrected) - x
        change = delta.mul(-1 / (steps * self.local.rate(ctx.round))).sub_(c)
        return {**state, "c": own + change}, {"delta": delta, "change": change}

    def start(self, session: Session) -> State:
        return {"round": 0, "x": session.initial.clone(), "c": torch.zeros_like(session.initial)}

    def ask(self, server: State, session: Session) -> Sequence[Send]:
        content = {"x": server["x"], "c": server["c"]}
        return [Send(client, "train", content) for client in session.select(server["round"])]

    def close(self, server: State, replies: Mapping[int, Content], session: Session) -> None:
        server["x"] = server["x"].add(mean_of(replies, "delta"), alpha=self.lr)
        share = len(replies) / session.clients
        server["c"] = server["c"].add(mean_of(replies, "change"), alpha=share)
        server["round"] += 1
