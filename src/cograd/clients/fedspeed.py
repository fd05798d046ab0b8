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

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from cograd.core.checks import check
from cograd.engines.federated.protocol import (
    ClientContext,
    Content,
    Session,
    State,
    Synchronous,
    Task,
    mean_of,
)
from cograd.engines.federated.training import LocalSGD, clip

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
        _check(self.prox, self.rho, self.alpha)
        if self.rule not in RULES:
            raise ValueError(f"rule must be one of {', '.join(RULES)}; got {self.rule!r}")
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
            clip(g, self.local.max_norm)
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
        theta, here = model.theta, model.theta.clone()
        if self.alpha < 1:
            g1 = g1.clone()
        theta.add_(g1, alpha=self.rho / (float(g1.norm()) + TINY) if self.normalize else self.rho)
        g2 = model.gradient(theta, xb, yb, track=False)
        theta.copy_(here)
        return g2.mul_(self.alpha).add_(g1, alpha=1 - self.alpha) if self.alpha < 1 else g2

    def start(self, session: Session) -> State:
        server: State = {"round": 0, "x": session.initial.clone()}
        if self.corrected and self.rule == "all":
            server["h"] = torch.zeros_like(session.initial)  # the mean of all clients' h
        return server

    def close(self, server: State, replies: Mapping[int, Content], session: Session) -> None:
        change = mean_of(replies, "delta")
        x = server["x"] + change
        if "h" in server:
            server["h"] = server["h"].add(change, alpha=len(replies) / session.clients)
            x += server["h"]
        server["x"] = x
        server["round"] += 1


class ProxCorrectedSAM(Optimizer):
    """FedSpeed's client as an optimizer, for a training loop of one's own.

        opt.begin_round(received.parameters())
        for x, y in batches:
            loss = opt.step(closure)
        delta = opt.end_round()

    ``closure`` computes the loss, calls ``backward`` and returns it, as for `torch.optim.LBFGS`; a step calls
    it twice, on the same minibatch, or once if ``alpha`` or ``rho`` is 0. The dual is kept in the optimizer's
    state as ``h`` of each parameter, from round to round and in `state_dict`.

    Args:
        params: parameters, or groups of them with an ``lr`` and ``weight_decay`` of their own; norms are over
            all of them.
        lr: learning rate, which schedulers may change.
        prox, rho, alpha, normalize: as in `FedSpeed`.
        weight_decay, max_norm: as in `LocalSGD`, with FedSpeed's order: the clip spares pull and dual.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        prox: float = 0.1,
        rho: float = 0.1,
        alpha: float = 1.0,
        *,
        normalize: bool = True,
        weight_decay: float = 0.0,
        max_norm: float | None = None,
    ) -> None:
        _check(prox, rho, alpha)
        LocalSGD(lr, weight_decay=weight_decay, max_norm=max_norm)  # refuses what is out of range
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self.prox, self.rho, self.alpha, self.normalize, self.max_norm = prox, rho, alpha, normalize, max_norm

    @torch.no_grad()
    def begin_round(self, anchor: Iterable[Tensor] | None = None) -> None:
        """Start from the received model, given as tensors in the order of the parameters; None is the model as
        it is. Raises ValueError for tensors of other shapes or another number."""
        parameters = self._parameters()
        received = [p.clone() for p in (parameters if anchor is None else anchor)]
        shapes, expected = [tuple(t.shape) for t in received], [tuple(p.shape) for p in parameters]
        if shapes != expected:
            raise ValueError(f"anchor must have the parameters' shapes {expected}; got {shapes}")
        for p, x in zip(parameters, received, strict=True):
            p.copy_(x)
            self.state[p]["anchor"] = x

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor]) -> Tensor:  # type: ignore[override]  # it must be given
        """One local step; returns the loss before it."""
        parameters = self._parameters(in_round=True)
        loss, g = self._gradient(closure, parameters)
        if self.alpha and self.rho:
            here = [p.clone() for p in parameters]
            ascent = self.rho / (_norm(g) + TINY) if self.normalize else self.rho
            torch._foreach_add_(parameters, g, alpha=ascent)
            _, g2 = self._gradient(closure, parameters)
            torch._foreach_copy_(parameters, here)
            g = [b.mul_(self.alpha).add_(a, alpha=1 - self.alpha) for a, b in zip(g, g2, strict=True)]
        if self.max_norm is not None:
            torch._foreach_mul_(g, min(1.0, self.max_norm / (_norm(g) + 1e-6)))
        of = iter(g)
        for group in self.param_groups:
            for p in group["params"]:
                direction = next(of)
                direction.add_(p - self._target(p), alpha=self.prox).add_(p, alpha=group["weight_decay"])
                p.sub_(direction, alpha=group["lr"])
        return loss

    @torch.no_grad()
    def end_round(self) -> list[Tensor]:
        """The change of each parameter since `begin_round`, to be sent; takes it into the dual."""
        changes = []
        for p in self._parameters(in_round=True):
            state = self.state[p]
            changes.append(p - state.pop("anchor"))
            if self.prox:
                state["h"] = state["h"] + changes[-1] if "h" in state else changes[-1].clone()
        return changes

    def _parameters(self, in_round: bool = False) -> list[Tensor]:
        parameters = [p for group in self.param_groups for p in group["params"]]
        if in_round and not all("anchor" in self.state[p] for p in parameters):
            raise RuntimeError("begin_round must come before step and end_round")
        return parameters

    def _gradient(
        self, closure: Callable[[], Tensor], parameters: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        self.zero_grad()
        with torch.enable_grad():
            loss = closure()
        if all(p.grad is None for p in parameters):
            raise RuntimeError("closure must call backward on the loss; no parameter has a gradient")
        found = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters]
        return loss.detach(), found

    def _target(self, p: Tensor) -> Tensor:
        """What a parameter is pulled to: pull and dual together are mu (v - (x - h))."""
        state = self.state[p]
        anchor: Tensor = state["anchor"]
        return anchor - state["h"] if "h" in state else anchor


def _norm(tensors: Sequence[Tensor]) -> float:
    return float(torch.cat([t.reshape(-1) for t in tensors]).norm())


def _check(prox: float, rho: float, alpha: float) -> None:
    check(
        ("prox", prox, ">= 0 and finite", 0 <= prox < math.inf),
        ("rho", rho, ">= 0 and finite", 0 <= rho < math.inf),
        ("alpha", alpha, "in [0, 1]", 0 <= alpha <= 1),
    )


def fed_prox(local: LocalSGD, prox: float = 0.1) -> FedSpeed:
    """FedProx (arXiv 1812.06127): the pull alone; client means unweighted, as in FedSpeed."""
    return FedSpeed(local, prox, rho=0.0, alpha=0.0, dual=False)


def fed_sam(local: LocalSGD, rho: float = 0.1) -> FedSpeed:
    """FedSAM (arXiv 2206.02618): the gradient at the ascended point alone."""
    return FedSpeed(local, prox=0.0, rho=rho, alpha=1.0)


def fed_dyn(local: LocalSGD, prox: float = 0.1) -> FedSpeed:
    """FedDyn (arXiv 2111.04263): pull and dual, plain gradients, the mean of all duals at the server."""
    return FedSpeed(local, prox, rho=0.0, alpha=0.0)
