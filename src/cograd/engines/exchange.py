"""What a method of `cograd.machines` is to the engine that runs it.

An engine (DistributedDataParallel, or a simulation in one process) owns gradients and transport; an `Exchange`
owns what happens to a gradient between the two. Each step:

    scale = exchange.scale(norm)               local clipping, if the method does it
    exchange.feed(name, gradient, scale)       for every parameter
    payload = exchange.encode()                then the engine gathers everyone's payloads, in party order
    update = exchange.decode(payloads)         what each parameter's gradient becomes

A step may be *dense* instead (``exchange.dense`` is true before it): then `collect` gives the vector that the
engine sums over the parties, and `reduced` takes that sum.

Gradients are fed as their party's share of the sum: an engine multiplies each by 1/N. Until `decode` or
`reduced` returns nothing that was sent is forgotten, so a failed exchange loses no gradient.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from cograd.core.message import Payload, Schema
from cograd.core.space import ParamSpace


class GradientError(ValueError):
    """A gradient that no method may use: not finite, sparse, or missing.

    It changes nothing where it is, and no weights anywhere. Other parties may have taken their own gradients of
    that step into their residuals, and will send them later.
    """


class Exchange(Protocol):
    """One party's end of a gradient exchange; see the module's docstring."""

    space: ParamSpace
    round: int
    momentum: float
    nesterov: bool

    def bind(
        self, space: ParamSpace, members: int, party: int, device: torch.device | str, dtype: torch.dtype
    ) -> None:
        """Take part as ``party`` of ``members`` with the parameters of ``space``; allocates state."""

    @property
    def schema(self) -> Schema:
        """What all parties must agree on."""

    @property
    def dense(self) -> bool:
        """Whether the coming step is summed as it is."""

    def scale(self, norm: float) -> float:
        """Factor for this party's gradient, given its L2 norm."""

    def feed(self, name: str, gradient: Tensor, scale: float) -> None:
        """Take in ``scale * gradient``, one parameter's share of the sum."""

    def encode(self) -> Payload:
        """The payload of this step."""

    def decode(self, payloads: Sequence[Payload]) -> Tensor:
        """Everyone's payloads in party order -> the update (numel,), in the order of ``self.space``."""

    def collect(self) -> Tensor:
        """Dense step: the vector to be summed over the parties, in place."""

    def reduced(self, total: Tensor) -> Tensor:
        """Dense step: that sum -> the update."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def weight_decay(
    exchange: Exchange,
    update: Tensor,
    velocity: Tensor,
    optimizer: torch.optim.Optimizer,
    names: Mapping[int, str],
) -> None:
    """Give a momentum-free optimizer's ``decay * weight`` the momentum that coupled weight decay has.

    The velocity of the decay alone is d <- m d + decay w, the same on every party. The optimizer will add
    ``decay * w`` itself, so the rest is added to the update: m d of the step before (with Nesterov, of this
    one). By linearity the sum is `torch.optim.SGD(momentum=m, weight_decay=decay)`. ``names`` are those of the
    exchange's parameters by id.
    """
    if exchange.momentum == 0:
        return
    for group in optimizer.param_groups:
        for parameter in group["params"] if group.get("weight_decay") else ():
            if id(parameter) in names:
                segment = exchange.space[names[id(parameter)]]
                part, due = (v[segment.slice].view(segment.shape) for v in (update, velocity))
                if not exchange.nesterov:
                    part.add_(due, alpha=exchange.momentum)
                due.mul_(exchange.momentum).add_(parameter.detach(), alpha=group["weight_decay"])
                if exchange.nesterov:
                    part.add_(due, alpha=exchange.momentum)


def norm_of(space: ParamSpace, gradients: dict[str, Tensor]) -> float:
    """L2 norm of all gradients together, in float32 or wider, added in the space's order on every engine."""
    norms = [
        torch.linalg.vector_norm(g, dtype=torch.promote_types(g.dtype, torch.float32))
        for g in (gradients[segment.name] for segment in space)
    ]
    return float(torch.linalg.vector_norm(torch.stack(norms)))


def not_finite(gradients: dict[str, Tensor]) -> str | None:
    """The name of the first gradient that holds NaN or infinity."""
    return next((name for name, g in gradients.items() if not bool(torch.isfinite(g).all())), None)
