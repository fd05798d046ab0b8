"""Local training by Adam (Kingma and Ba 2015, arXiv 1412.6980, algorithm 1), which FedLEx's authors use."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from cograd.core.checks import check
from cograd.engines.federated.protocol import ClientContext
from cograd.engines.federated.training import Gradient, LocalSGD, clip


@dataclass(frozen=True)
class LocalAdam(LocalSGD):
    """Adam over a client's own examples, with fresh moments every round; minibatches are those of `LocalSGD`.

    Args:
        lr, epochs, batch_size, steps, decay, max_norm: as in `LocalSGD`.
        momentum: of the first moment, Adam's beta1.
        beta2: of the second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled, as in AdamW: v <- v - lr weight_decay v before the step.

    Its step does not change when an entry's gradients are all multiplied by one positive number, up to ``eps``.
    """

    adaptive: ClassVar[bool] = True

    momentum: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            ("beta2", self.beta2, "in [0, 1)", 0 <= self.beta2 < 1),
            ("eps", self.eps, "> 0 and finite", 0 < self.eps < math.inf),
        )

    def run(self, ctx: ClientContext, data: Any, start: Tensor, gradient: Gradient | None = None) -> Tensor:
        model, lr, step = ctx.model, self.rate(ctx.round), 0
        v = model.at(start)
        first, second = torch.zeros_like(v), torch.zeros_like(v)
        for step, (x, y) in enumerate(self.batches(ctx, data), 1):
            g = model.gradient(v, x, y) if gradient is None else gradient(v, x, y)
            self.adapt(v, g, lr, first, second, step)
        if gradient is None:
            ctx.count("grad", step)
        ctx.trained = v
        return v

    def adapt(self, v: Tensor, g: Tensor, lr: float, first: Tensor, second: Tensor, step: int) -> None:
        """Step number ``step`` (from 1) of ``v`` in place, and of the moments; may overwrite ``g``."""
        clip(g, self.max_norm)
        if self.weight_decay:
            v.mul_(1 - lr * self.weight_decay)
        first.lerp_(g, 1 - self.momentum)
        second.mul_(self.beta2).addcmul_(g, g, value=1 - self.beta2)
        size = second.sqrt().div_(math.sqrt(1 - self.beta2**step)).add_(self.eps)
        v.addcdiv_(first, size, value=-lr / (1 - self.momentum**step))
