"""Power-of-choice (Cho, Wang, Joshi 2020, arXiv 2010.01243, section 4): clients with the highest losses train.

    server: d candidates, drawn without replacement in proportion to their n_i;  ask each for its loss at x
            the m of them with the highest loss train as in FedAvg, and count alike in the mean

m is the number of clients that the session's sampler draws for the round. With d = m all candidates train, and
with d = m = N it is FedAvg with equal weights. Three ways to know a loss:

    full   over all of a client's examples           pi_pow-d
    batch  over one random minibatch                 pi_cpow-d
    stale  the mean of the minibatch losses of its last training, and infinite before: no question asked
                                                     pi_rpow-d
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cograd.clients.baselines.fedavg import FedAvg
from cograd.core.checks import check
from cograd.engines.federated.protocol import ClientContext, Content, Send, Session, State, Task

LOSSES = ("full", "batch", "stale")


@dataclass
class PowerOfChoice(FedAvg):
    """Shared: as FedAvg; the model, 4P bytes down, and a loss, 4 up, for each candidate, unless ``stale``,
    where each participant's loss is 4 bytes more.

    Args:
        local, lr, momentum, weighted: as in `FedAvg`; equal weights are the paper's.
        candidates: d, at least the participants of a round.
        loss: ``full``, ``batch`` or ``stale``.
    """

    weighted: bool = False
    candidates: int = 2
    loss: str = "full"

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            ("candidates", self.candidates, ">= 1", self.candidates >= 1),
            ("loss", self.loss, f"one of {', '.join(LOSSES)}", self.loss in LOSSES),
        )

    def tasks(self) -> Mapping[str, Task]:
        return {"train": self.train, "loss": self.measure}

    def measure(self, state: State, content: Content, data: Any, ctx: ClientContext) -> tuple[State, Content]:
        """A candidate's loss at the received model."""
        n = len(data)
        count = n if self.loss == "full" else min(n, self.local.batch_size)
        rows = ctx.stream("candidate").choice(n, count).to(data.x.device)
        ctx.count("forward", count)
        found = ctx.model.mean_loss(content["x"], data.x[rows], data.y[rows])
        return state, {"loss": torch.tensor([found])}

    def train(self, state: State, content: Content, data: Any, ctx: ClientContext) -> tuple[State, Content]:
        if self.loss != "stale":
            return super().train(state, content, data, ctx)
        x, seen = content["x"], list[Tensor]()

        def noted(v: Tensor, xb: Tensor, yb: Tensor) -> Tensor:
            ctx.count("grad", 1)
            g = ctx.model.gradient(v, xb, yb)
            seen.append(ctx.model.last_loss)
            return g

        delta = self.local.run(ctx, data, x, noted) - x
        return state, {"delta": delta, "loss": torch.stack(seen).mean().float()[None]}

    def start(self, session: Session) -> State:
        if not len(session.select(0)) <= self.candidates <= session.clients:
            allowed = f"{len(session.select(0))} .. {session.clients}"
            raise ValueError(f"candidates must be in {allowed}; got {self.candidates}")
        server = super().start(session)
        if self.loss == "stale":
            server["losses"] = torch.full((session.clients,), math.inf)
        return server

    def ask(self, server: State, session: Session) -> Sequence[Send]:
        content = {"x": server["x"]}
        if "chosen" in server:
            return [Send(client, "train", content) for client in server["chosen"].tolist()]
        sizes = torch.tensor(session.sizes, dtype=torch.float64)
        draws = session.stream("candidates", server["round"]).numpy
        among = draws.choice(len(sizes), self.candidates, replace=False, p=(sizes / sizes.sum()).numpy())
        if self.loss != "stale":
            return [Send(client, "loss", content) for client in sorted(among.tolist())]
        self._choose(server, {client: float(server["losses"][client]) for client in among.tolist()}, session)
        return self.ask(server, session)

    def close(self, server: State, replies: Mapping[int, Content], session: Session) -> None:
        if "chosen" not in server:
            self._choose(server, {client: float(reply["loss"]) for client, reply in replies.items()}, session)
            return
        del server["chosen"]
        session.participants = list(replies)
        if self.loss == "stale":
            for client, reply in replies.items():
                server["losses"][client] = reply["loss"][0]
        super().close(server, replies, session)

    def _choose(self, server: State, losses: Mapping[int, float], session: Session) -> None:
        """The candidates of the highest losses; of equal ones any."""
        count = len(session.select(server["round"]))
        among = torch.tensor(sorted(losses))
        among = among[session.stream("ties", server["round"]).permutation(len(among))]
        found = torch.tensor([losses[client] for client in among.tolist()])
        server["chosen"] = among[found.argsort(descending=True, stable=True)[:count]].sort().values
