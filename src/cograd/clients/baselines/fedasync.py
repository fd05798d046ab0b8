"""FedAsync (Xie et al. 2019, arXiv 1903.03934, algorithm 1): each answer is mixed into the model at once.

    client: v <- received x, SGD on f_i(v) + prox/2 |v - x|^2, send v
    server: x <- (1 - a) x + a v,  a = mix (staleness + 1)^-exponent

The *model* is mixed in, not its change: a stale one pulls the server back to where it was. With one client it
is FedAvg with lr = mix.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from cograd.clients.baselines._concurrent import Concurrent
from cograd.core.checks import check
from cograd.engines.federated.protocol import ClientContext, Content, State
from cograd.engines.federated.training import LocalSGD


@dataclass
class FedAsync(Concurrent):
    """Shared: 4P bytes down and 4P bytes up a participation.

    Args:
        local: the clients' training.
        mix: what a fresh model counts, in (0, 1].
        exponent: of the polynomial discount for staleness; 0 does without.
        prox: pull toward the received model.
    """

    local: LocalSGD
    mix: float = 0.6
    exponent: float = 0.5
    prox: float = 0.005

    def __post_init__(self) -> None:
        check(
            ("mix", self.mix, "in (0, 1]", 0 < self.mix <= 1),
            ("exponent", self.exponent, ">= 0", self.exponent >= 0),
            ("prox", self.prox, ">= 0", self.prox >= 0),
        )

    def train(self, state: State, content: Content, data: Any, ctx: ClientContext) -> tuple[State, Content]:
        x = content["x"]

        def pulled(v: Tensor, xb: Tensor, yb: Tensor) -> Tensor:
            ctx.count("grad", 1)
            return ctx.model.gradient(v, xb, yb).add_(v - x, alpha=self.prox)

        return state, {"v": self.local.run(ctx, data, x, pulled if self.prox else None).clone()}

    def take(self, server: State, vector: Tensor, staleness: int) -> None:
        share = self.mix * (staleness + 1) ** -self.exponent
        server["x"] = server["x"].add(vector - server["x"], alpha=share)
        server["round"] += 1
