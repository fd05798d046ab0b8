"""FedAdam and its kin (Reddi et al. 2021, arXiv 2003.00295, algorithm 2): the server takes adaptive steps.

    client: as in FedAvg
    server: m <- momentum m + (1 - momentum) change;  x <- x + lr m / (sqrt(v) + tau), where with c = change^2
            adam     v <- beta2 v + (1 - beta2) c
            yogi     v <- v - (1 - beta2) c sign(v - c)
            adagrad  v <- v + c

from m = 0 and v = tau^2, without bias correction. If v never moves (beta2 = 1), it is FedAvg with momentum and
lr / (2 tau).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from cograd.clients.baselines.fedavg import FedAvg
from cograd.core.checks import check
from cograd.engines.federated.protocol import State

RULES = ("adam", "yogi", "adagrad")


@dataclass
class FedAdam(FedAvg):
    """Shared: as in FedAvg.

    Args:
        local, lr, weighted: as in `FedAvg`.
        momentum: the first moment's.
        beta2: the second moment's, in [0, 1].
        tau: floor of the divisor, its degree of adaptivity.
        rule: ``adam``, ``yogi`` or ``adagrad``.
    """

    lr: float = 0.03
    momentum: float = 0.9
    weighted: bool = True
    beta2: float = 0.99
    tau: float = 1e-3
    rule: str = "adam"

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            ("beta2", self.beta2, "in [0, 1]", 0 <= self.beta2 <= 1),
            ("tau", self.tau, "> 0 and finite", 0 < self.tau < math.inf),
            ("rule", self.rule, f"one of {', '.join(RULES)}", self.rule in RULES),
        )

    def step(self, server: State, change: Tensor) -> None:
        v = self._second(server.get("v", torch.full_like(change, self.tau**2)), change.square())
        m = change.mul_(1 - self.momentum).add_(server.get("m", torch.zeros_like(v)), alpha=self.momentum)
        server["m"], server["v"] = m, v
        server["x"] = server["x"].add(m / v.sqrt().add_(self.tau), alpha=self.lr)
        server["round"] += 1

    def _second(self, v: Tensor, square: Tensor) -> Tensor:
        if self.rule == "adagrad":
            return v + square
        if self.rule == "yogi":
            return v.sub(square * (v - square).sign(), alpha=1 - self.beta2)
        return v.mul(self.beta2).add_(square, alpha=1 - self.beta2)
