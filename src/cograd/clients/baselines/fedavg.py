"""FedAvg (McMahan et al. 2017, arXiv 1602.05629, algorithm 1): the mean of locally trained models.

    client: v <- x, some epochs of SGD on its own examples, send v - x
    server: x <- x + lr * sum_i p_i (v_i - x),  p_i = n_i / sum n_i  (or 1/|S| if unweighted)

Its special cases here: ``server_momentum`` (FedAvgM), and FedProx, FedSAM, FedDyn as settings of `FedSpeed`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from cograd.engines.federated.protocol import (
    ClientContext,
    Content,
    Session,
    State,
    Synchronous,
    Task,
    mean_of,
    sizes_of,
)
from cograd.engines.federated.training import LocalSGD


@dataclass
class FedAvg(Synchronous):
    """Shared: each participant's change of the model, 4P bytes up and the model, 4P bytes down, a round.

    Args:
        local: the clients' training.
        lr: server learning rate.
        momentum: of the server, as an exponential mean: d <- momentum d + (1 - momentum) * mean change.
        weighted: by the clients' numbers of examples; otherwise all participants count alike.
    """

    local: LocalSGD
    lr: float = 1.0
    momentum: float = 0.0
    weighted: bool = True

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise ValueError(f"lr must be > 0; got {self.lr}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be in [0, 1); got {self.momentum}")

    def tasks(self) -> Mapping[str, Task]:
        return {"train": self.train}

    def train(self, state: State, content: Content, data: Any, ctx: ClientContext) -> tuple[State, Content]:
        """The client's round."""
        x = content["x"]
        return state, {"delta": self.local.run(ctx, data, x) - x}

    def start(self, session: Session) -> State:
        return {"round": 0, "x": session.initial.clone()}

    def close(self, server: State, replies: Mapping[int, Content], session: Session) -> None:
        self.step(server, mean_of(replies, "delta", sizes_of(replies, session) if self.weighted else None))

    def step(self, server: State, change: Tensor) -> None:
        """Take the mean change of a round into the model."""
        if self.momentum:
            change = change.mul_(1 - self.momentum)
            if "velocity" in server:
                change.add_(server["velocity"], alpha=self.momentum)
            server["velocity"] = change
        server["x"] = server["x"].add(change, alpha=self.lr)
        server["round"] += 1
