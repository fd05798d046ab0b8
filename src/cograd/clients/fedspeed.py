"""FedSpeed: prox-corrected local steps with perturbed gradients (arXiv 2302.10429, algorithm 1).

Shared between clients and server: one vector up and one down a round, as in FedAvg. What each client keeps to
itself is a *dual* vector g_hat_i: it cancels the bias of the proximal pull, so that many local steps do not
drift to the client's own optimum. With mu = 1/lambda, the pull toward the received x:

    K local steps:  g1 = grad f_i(v; B);  g2 = grad f_i(v + rho g1; B)         same minibatch B    (eq. 4, 5)
                    v <- v - lr ((1 - alpha) g1 + alpha g2 - g_hat_i + mu (v - x) + wd v)
    at the end:     g_hat_i <- g_hat_i - mu (v - x)

The dual is kept as h_i = -g_hat_i / mu, the sum of the client's moves so far. Two server rules are published:

    "all" (the released code)    h_bar <- h_bar + (1/N) sum_S (v_i - x);  x <- x + mean_S (v_i - x) + h_bar
    "active" (the paper's text)  x <- mean_S (v_i + h_i)

They are one rule if all clients take part. Otherwise the active duals alone are a noisy stand-in for the mean
of all, and "active" falls below FedAvg, which is why "all" is the default.

Special cases: mu = 0 is FedAvg (alpha = 0) or FedSAM (alpha = 1); a dual that is held at zero, FedProx; alpha
= 0 with "all", FedDyn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
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

RULES = ("all", "active")
TINY = 1e-7
"""Added to the gradient's norm before dividing by it, as in the released code."""


@dataclass
class FedSpeed(Synchronous):
    """FedSpeed. Shared: 4P bytes up and 4P down a participant and round.

    Args:
        local: the clients' training. Clipping (``max_norm``) applies to the quasi-gradient alone, before the
            dual, the pull and weight decay are added: the released code clips some of them with it, which
            leaves a spurious pull whenever the clip bites. Momentum is refused, as the dual is a sum of plain
            steps.
        prox: mu, the pull toward the received model; the paper's lambda is 1/mu.
        rho: radius of the ascent step.
        alpha: share of the gradient at the ascended point, in [0, 1].
        rule: of the server, ``all`` or ``active``.
        normalize: the ascent has length ``rho`` instead of ``rho`` times the gradient's norm.
        dual: whether clients keep one; without, the pull is FedProx's.
    """

    local: LocalSGD
    prox: float = 0.1
    rho: float = 0.1
    alpha: float = 1.0
    rule: str = "all"
    normalize: bool = True
    dual: bool = True

    def __post_init__(self) -> None:
        if self.local.momentum:
            raise ValueError(f"local must have no momentum with FedSpeed; got {self.local.momentum}")
        for name, value, allowed, fine in (
            ("prox", self.prox, ">= 0", self.prox >= 0),
            ("rho", self.rho, ">= 0", self.rho >= 0),
            ("alpha", self.alpha, "in [0, 1]", 0 <= self.alpha <= 1),
            ("rule", self.rule, f"one of {', '.join(RULES)}", self.rule in RULES),
        ):
            if not fine:
                raise ValueError(f"{name} must be {allowed}; got {value!r}")
        self._plain = replace(self.local, max_norm=None)

    @property
    def corrected(self) -> bool:
        """Whether there is a dual: it is undefined without a pull."""
        return self.dual and self.prox > 0

    def tasks(self) -> Mapping[str, Task]:
        return {"train": self.train}

    def train(self, state: State, content: Content, data: Any, ctx: ClientContext) -> tuple[State, Content]:
        """The client's round. Its state is ``h`` = -g_hat / mu (numel,)."""
        x = content["x"]
        target = x  # the pull is mu (v - x) - g_hat = mu (v - (x - h))
        if self.corrected:
            h = state.get("h", torch.zeros_like(x))
            target = x - h

        def direction(v: Tensor, xb: Tensor, yb: Tensor) -> Tensor:
            g = self.quasi_gradient(v, xb, yb, ctx)
            if self.local.max_norm is not None:
                g.mul_((self.local.max_norm / (g.norm() + 1e-6)).clamp_max_(1.0))
            return g.add_(v - target, alpha=self.prox) if self.prox else g

        delta = self._plain.run(ctx, data, x, direction) - x
        if not self.corrected:
            return state, {"delta": delta}
        h = h + delta
        return {**state, "h": h}, {"delta": delta + h if self.rule == "active" else delta}

    def quasi_gradient(self, v: Tensor, xb: Tensor, yb: Tensor, ctx: ClientContext) -> Tensor:
        """(1 - alpha) g1 + alpha g2 (eq. 5); one gradient if the second has no weight or no distance."""
        model = ctx.model
        g1 = model.gradient(v, xb, yb)
        if not (self.alpha and self.rho):
            ctx.count("grad", 1)
            return g1
        ctx.count("grad", 2)
        g1 = g1.clone()
        here = v.clone()
        ascent = self.rho / (float(g1.norm()) + TINY) if self.normalize else self.rho
        g2 = model.gradient(here.add(g1, alpha=ascent), xb, yb, track=False)
        model.at(here)
        return g2.mul_(self.alpha).add_(g1, alpha=1 - self.alpha) if self.alpha < 1 else g2

    def start(self, session: Session) -> State:
        return {"round": 0, "x": session.initial.clone(), "h": torch.zeros_like(session.initial)}

    def ask(self, server: State, session: Session) -> Sequence[Send]:
        content = {"x": server["x"]}
        return [Send(client, "train", content) for client in session.select(server["round"])]

    def close(self, server: State, replies: Mapping[int, Content], session: Session) -> None:
        change = mean_of(replies, "delta")
        x = server["x"] + change
        if self.corrected and self.rule == "all":
            server["h"] = server["h"].add(change, alpha=len(replies) / session.clients)
            x += server["h"]
        server["x"] = x
        server["round"] += 1

    def model(self, server: State) -> Tensor:
        x: Tensor = server["x"]
        return x


def fed_prox(local: LocalSGD, prox: float = 0.1) -> FedSpeed:
    """FedProx (arXiv 1812.06127): the pull alone; client means unweighted, as in FedSpeed."""
    return FedSpeed(local, prox, rho=0.0, alpha=0.0, dual=False)


def fed_sam(local: LocalSGD, rho: float = 0.1) -> FedSpeed:
    """FedSAM (arXiv 2206.02618): the gradient at the ascended point alone."""
    return FedSpeed(local, prox=0.0, rho=rho, alpha=1.0)


def fed_dyn(local: LocalSGD, prox: float = 0.1) -> FedSpeed:
    """FedDyn (arXiv 2111.04263): pull and dual, plain gradients, the mean of all duals at the server."""
    return FedSpeed(local, prox, rho=0.0, alpha=0.0)
