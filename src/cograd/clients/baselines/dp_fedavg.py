"""DP-FedAvg: FedAvg whose clients train by DP-SGD (Abadi et al. 2016, arXiv 1607.00133, algorithm 1).

    client: v <- x; in each of K steps every example is drawn with probability q = B / n by itself, and
            v <- v - lr (sum_j min(1, C / |g_j|) g_j + N(0, (sigma C)^2)) / B        g_j of one example each
            send v - x
    server: as FedAvg

sigma is the least with which K steps in each of the planned rounds are (epsilon, delta)-differentially private
for each example of the client that holds it, examples being added or removed; what the server does with the
messages changes nothing about that. With epsilon infinite and nothing clipped it is FedAvg on minibatches of
random size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap

from cograd.clients.baselines.fedavg import FedAvg
from cograd.core.checks import check
from cograd.data.clients import ClientData
from cograd.engines.federated.local import LocalModel
from cograd.engines.federated.protocol import ClientContext, Content, State
from cograd.engines.federated.training import LocalSGD

ORDERS = (*range(2, 65), 80, 96, 128, 192, 256, 512)
"""Orders of Renyi DP at which steps are composed; at those between, sampled noise is slow to account for."""
TINY = 1e-30
"""Norms are not divided by if they are below: a gradient of zero stays what it is."""


@dataclass(frozen=True)
class Privacy:
    """How private each example of each client is to be, and for how long.

    Args:
        rounds: in which a client may take part; it refuses any after them, as epsilon would be spent.
        epsilon, delta: of all these rounds together; an infinite epsilon adds no noise.
        clip: C, the 2-norm that one example's gradient has at most.

    Noise comes from the session's seed, for experiments that can be repeated: it hides nothing from whoever
    knows the seed. Needs the extra ``privacy`` to find sigma.
    """

    rounds: int
    epsilon: float = 4.0
    delta: float = 1e-5
    clip: float = 0.04

    def __post_init__(self) -> None:
        check(
            ("rounds", self.rounds, ">= 1", self.rounds >= 1),
            ("epsilon", self.epsilon, "> 0", self.epsilon > 0),
            ("delta", self.delta, "in (0, 1)", 0 < self.delta < 1),
            ("clip", self.clip, "> 0", self.clip > 0),
        )

    def multiplier(self, rate: float, steps: int) -> float:
        """sigma for ``steps`` steps in all, in which an example is drawn with probability ``rate``."""
        if math.isinf(self.epsilon):
            return 0.0
        return _multiplier(self.epsilon, self.delta, rate, steps)

    def run(
        self, local: LocalSGD, ctx: ClientContext, data: Any, start: Tensor, noised: Tensor | None = None,
        *, alone: bool = False,
    ) -> Tensor:  # fmt: skip
        """Train from ``start`` (numel,), as `LocalSGD.run` does.

        Only the entries ``noised`` (bool, numel) are clipped and noised, all of them by default. The others are
        trained on the same examples by plain gradients, or, with ``alone``, stay as they are.
        """
        if ctx.round >= self.rounds:
            raise ValueError(f"rounds must cover all rounds of the session; {self.rounds} are planned")
        if ctx.model.buffers is not None:
            raise ValueError("model must have no running statistics: they mix examples, and are not private")
        rate = min(1.0, local.batch_size / len(data))
        sigma = self.multiplier(rate, self.rounds * local.length(len(data)))
        draws = ctx.stream("privacy", "noise")
        part = torch.ones_like(start, dtype=torch.bool) if noised is None else noised.to(start.device)
        decayed = (part if alone else torch.ones_like(part)) * local.weight_decay

        def gradient(v: Tensor, x: Tensor, y: Tensor) -> Tensor:
            ctx.count("grad", 1)
            rows = per_example(ctx.model, v, x, y)
            plain = torch.zeros_like(v) if alone else rows.sum(0).masked_fill_(part, 0.0)
            rows.mul_(part)
            total: Tensor = plain + rows.t() @ (self.clip / rows.norm(dim=1).clamp_min(TINY)).clamp_max(1.0)
            if sigma:
                total += draws.normal(len(v)).to(v) * part * (sigma * self.clip)
            return total.div_(local.batch_size).addcmul_(v, decayed)

        was = ctx.model.module.training
        ctx.model.module.train()
        try:
            return Poisson(**{**vars(local), "weight_decay": 0.0}).run(ctx, data, start, gradient)
        finally:
            ctx.model.module.train(was)


@dataclass(frozen=True)
class Poisson(LocalSGD):
    """LocalSGD that draws each example for each minibatch by itself: what the accounting of DP-SGD assumes."""

    def batches(self, ctx: ClientContext, data: ClientData) -> Iterator[tuple[Tensor, Tensor]]:
        n, draws = len(data), ctx.stream("privacy", "examples")
        for _ in range(self.length(n)):
            taken = (draws.uniform(n) < self.batch_size / n).to(data.x.device)
            yield data.x[taken], data.y[taken]


@dataclass
class DPFedAvg(FedAvg):
    """Shared: as FedAvg. ``local`` without ``max_norm``: examples are clipped by themselves, by ``privacy``."""

    privacy: Privacy = field(kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_clip(self.local)

    def train(self, state: State, content: Content, data: Any, ctx: ClientContext) -> tuple[State, Content]:
        x = content["x"]
        return state, {"delta": self.privacy.run(self.local, ctx, data, x) - x}


def per_example(model: LocalModel, v: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Gradients (examples, numel) at ``v`` of the loss of each example by itself."""
    if not len(x):
        return v.new_zeros(0, len(v))

    def loss(weights: dict[str, Tensor], one: Tensor, target: Tensor) -> Tensor:
        return model.loss(functional_call(model.module, weights, (one[None],)), target[None])

    rows = vmap(grad(loss), (None, 0, 0), randomness="different")(model.space.views(v), x, y)
    return torch.cat([rows[s.name].reshape(len(x), -1) for s in model.space], 1)


def refuse_clip(local: LocalSGD) -> None:
    """Raise ValueError for a training that would clip what has been clipped and noised already."""
    if local.max_norm is not None:
        raise ValueError(f"local must have no max_norm: privacy clips; got {local.max_norm}")


@lru_cache(256)
def _multiplier(epsilon: float, delta: float, rate: float, steps: int) -> float:
    try:
        import dp_accounting
        from dp_accounting.rdp.rdp_privacy_accountant import RdpAccountant
    except ImportError:
        raise ImportError("this needs dp-accounting: pip install 'cograd[privacy]'") from None

    def event(sigma: float) -> Any:
        one = dp_accounting.GaussianDpEvent(sigma)
        return dp_accounting.SelfComposedDpEvent(dp_accounting.PoissonSampledDpEvent(rate, one), steps)

    guess = dp_accounting.LowerEndpointAndGuess(0.0, 1.0)
    accountant = partial(RdpAccountant, ORDERS)
    return float(dp_accounting.calibrate_dp_mechanism(accountant, event, epsilon, delta, guess, tol=1e-3))
