"""The local training that most federated methods share: minibatch SGD on one flat vector."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, count, islice

import torch
from torch import Tensor

from cograd.core.checks import check
from cograd.data.clients import ClientData
from cograd.engines.federated.protocol import ClientContext

Gradient = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``gradient(v, x, y)``: what stands for the gradient at ``v`` on a minibatch; it may be changed in place."""


@dataclass(frozen=True)
class LocalSGD:
    """SGD over a client's own examples, anew every round.

    Args:
        lr: learning rate of round 0; ``decay`` multiplies it each round.
        epochs: passes over the client's examples; or so many ``steps``, passes being begun as needed.
        batch_size: examples of a minibatch; the last one of a pass may be smaller.
        momentum: heavy ball, its buffer zero at the start of every round.
        weight_decay: ``weight_decay * v`` added to the gradient, after clipping.
        max_norm: the gradient is scaled down to this 2-norm; None leaves it.
    """

    lr: float
    epochs: int = 1
    batch_size: int = 32
    steps: int | None = None
    momentum: float = 0.0
    weight_decay: float = 0.0
    decay: float = 1.0
    max_norm: float | None = None

    def __post_init__(self) -> None:
        check(
            ("lr", self.lr, "> 0 and finite", 0 < self.lr < math.inf),
            ("epochs", self.epochs, ">= 1", self.epochs >= 1),
            ("batch_size", self.batch_size, ">= 1", self.batch_size >= 1),
            ("steps", self.steps, ">= 1 or None", self.steps is None or self.steps >= 1),
            ("momentum", self.momentum, "in [0, 1)", 0 <= self.momentum < 1),
            ("weight_decay", self.weight_decay, ">= 0", self.weight_decay >= 0),
            ("decay", self.decay, "in (0, 1]", 0 < self.decay <= 1),
            ("max_norm", self.max_norm, "> 0 or None", self.max_norm is None or self.max_norm > 0),
        )

    def rate(self, round: int) -> float:
        """The learning rate of a round."""
        return self.lr * self.decay**round

    def length(self, n: int) -> int:
        """Local steps of a client with ``n`` examples."""
        return self.steps if self.steps is not None else self.epochs * math.ceil(n / self.batch_size)

    def batches(self, ctx: ClientContext, data: ClientData) -> Iterator[tuple[Tensor, Tensor]]:
        """The round's minibatches: the same for every method with this client, round and seed."""
        n = len(data)
        orders = (ctx.stream("batches", epoch).permutation(n) for epoch in count())
        minibatches = chain.from_iterable(order.split(self.batch_size) for order in orders)
        for rows in islice(minibatches, self.length(n)):
            at = rows.to(data.x.device)
            yield data.x.index_select(0, at), data.y.index_select(0, at)

    def run(
        self, ctx: ClientContext, data: ClientData, start: Tensor, gradient: Gradient | None = None
    ) -> Tensor:
        """Train from ``start`` (numel,); returns where it ended, in the model's own storage: copy it to keep
        it.

        ``gradient`` replaces the plain one and must count its own work (``ctx.count("grad", ...)``).
        """
        model, lr = ctx.model, self.rate(ctx.round)
        v = model.at(start)
        buffer = torch.zeros_like(v) if self.momentum else None
        steps = 0
        for x, y in self.batches(ctx, data):
            g = model.gradient(v, x, y) if gradient is None else gradient(v, x, y)
            self.step(v, g, lr, buffer)
            steps += 1
        if gradient is None:
            ctx.count("grad", steps)
        ctx.trained = v
        return v

    def step(self, v: Tensor, g: Tensor, lr: float, buffer: Tensor | None = None) -> None:
        """One update of ``v`` in place; overwrites ``g``."""
        clip(g, self.max_norm)
        if self.weight_decay:
            g.add_(v, alpha=self.weight_decay)
        if buffer is not None:
            g = buffer.mul_(self.momentum).add_(g)
        v.sub_(g, alpha=lr)


def clip(g: Tensor, max_norm: float | None) -> None:
    """Scale ``g`` down in place to a 2-norm of at most ``max_norm``; None leaves it."""
    if max_norm is not None:
        g.mul_((max_norm / (g.norm() + 1e-6)).clamp_max_(1.0))
