"""FedAvg from a model that one client after another has trained (cyclical weight transfer, Chang et al. 2018,
doi 10.1093/jamia/ocy017): what the first released code of FedLEx does in the place of exploration.

    before the rounds: x <- some epochs of training from x on the data of each visited client in turn
    rounds:            those of FedAvg
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cograd.clients.baselines.fedavg import FedAvg
from cograd.core.checks import check
from cograd.engines.federated.protocol import ClientContext, Content, Send, Session, State, Task
from cograd.engines.federated.training import LocalSGD


@dataclass
class WarmStart(FedAvg):
    """Shared: as in FedAvg, and before it the model there and back for every visit, 4P bytes each.

    Args:
        local, lr, momentum, weighted: as in `FedAvg`.
        warm: training of a visited client; None takes ``local``.
        fraction: of all clients that are visited, rounded, in a random order; with 0 it is FedAvg.
    """

    warm: LocalSGD | None = None
    fraction: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check(("fraction", self.fraction, "in [0, 1]", 0 <= self.fraction <= 1))

    def tasks(self) -> Mapping[str, Task]:
        return {"warm": self.visit, **super().tasks()}

    def visit(self, state: State, content: Content, data: Any, ctx: ClientContext) -> tuple[State, Content]:
        """Train the travelling model."""
        trained = (self.warm or self.local).run(ctx, data, content["x"])
        return state, {"x": trained.clone()}

    def start(self, session: Session) -> State:
        return {**super().start(session), "visits": round(self.fraction * session.clients)}

    def ask(self, server: State, session: Session) -> Sequence[Send]:
        if not server["visits"]:
            return super().ask(server, session)
        order = session.stream("visits").permutation(session.clients)
        return [Send(int(order[server["visits"] - 1]), "warm", {"x": server["x"]})]

    def close(self, server: State, replies: Mapping[int, Content], session: Session) -> None:
        if not server["visits"]:
            super().close(server, replies, session)
            if server["round"] == 1:
                session.participants = list(replies)  # the visited have answered, too
            return
        (reply,) = replies.values()
        server["x"] = reply["x"]
        server["visits"] -= 1
