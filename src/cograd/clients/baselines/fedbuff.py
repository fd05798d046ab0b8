"""FedBuff (Nguyen et al. 2022, arXiv 2106.06639, algorithm 1): changes are summed in a buffer of K.

    client: v <- received x, SGD, send v - x
    server: sum <- sum + (1 + staleness)^-exponent (v - x);  after K of them  x <- x + lr sum / K

The sum is divided by K, not by the sum of the discounts. One change a buffer without discount is asynchronous
FedAvg (`cograd.clients.fedfix.async_fed_avg` with identical weights); all clients, all equally fast, FedAvg.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from cograd.clients.baselines._concurrent import Concurrent
from cograd.core.checks import check
from cograd.engines.federated.protocol import ClientContext, Content, Session, State
from cograd.engines.federated.training import LocalSGD


@dataclass
class FedBuff(Concurrent):
    """Shared: 4P bytes down and 4P bytes up a participation.

    Args:
        local: the clients' training.
        size: K, changes a buffer; at most the number of clients.
        exponent: of the discount for staleness, 1 / sqrt(1 + staleness); 0 does without.
        lr: server learning rate.
    """

    local: LocalSGD
    size: int = 10
    exponent: float = 0.5
    lr: float = 1.0

    def __post_init__(self) -> None:
        check(
            ("size", self.size, ">= 1", self.size >= 1),
            ("exponent", self.exponent, ">= 0", self.exponent >= 0),
            ("lr", self.lr, "> 0", self.lr > 0),
        )

    def start(self, session: Session) -> State:
        if self.size > session.clients:
            raise ValueError(f"size must be at most the number of clients, {session.clients}; got {self.size}")
        return {**super().start(session), "filled": 0}

    def train(self, state: State, content: Content, data: Any, ctx: ClientContext) -> tuple[State, Content]:
        x = content["x"]
        return state, {"delta": self.local.run(ctx, data, x) - x}

    def take(self, server: State, vector: Tensor, staleness: int) -> None:
        discount = (1 + staleness) ** -self.exponent
        if server["filled"]:
            server["sum"].add_(vector, alpha=discount)
        else:
            server["sum"] = vector * discount
        server["filled"] += 1
        if server["filled"] == self.size:
            server["x"] = server["x"].add(server.pop("sum").div_(self.size), alpha=self.lr)
            server["filled"] = 0
            server["round"] += 1
