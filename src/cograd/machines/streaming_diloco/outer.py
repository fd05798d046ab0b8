"""The outer parameters of a fragment and their optimizer: the state that all replicas hold in common."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from cograd.core.space import ParamSpace

Outer: TypeAlias = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
"""Makes the outer optimizer of one fragment from its outer parameters."""


def nesterov(lr: float = 0.4, momentum: float = 0.9) -> Outer:
    """The paper's outer optimizer, v <- mu v + Delta, g <- g - lr (Delta + mu v). Momentum 0 is plain SGD."""
    return lambda parameters: torch.optim.SGD(parameters, lr=lr, momentum=momentum, nesterov=momentum > 0)


PAPER_OUTER = nesterov()
"""Rate 0.4, as the paper tuned it, and DiLoCo's momentum of 0.9."""


class OuterFragment:
    """g of one fragment, one vector in float32 (float64 for a model in float64), and its own optimizer.

    An optimizer of its own, since a step of one fragment must not let the momentum of the others decay.
    """

    def __init__(self, name: str, inner: Mapping[str, nn.Parameter], outer: Outer) -> None:
        self.name, self.inner = name, dict(inner)
        self.space = ParamSpace({n: p.shape for n, p in inner.items()})
        first = next(iter(inner.values()))
        wide = all(p.dtype == torch.float64 for p in inner.values())
        self.vector = self.space.zeros(first.device, torch.float64 if wide else torch.float32)
        self.space.flatten(self.inner, out=self.vector)
        self.views = self.space.views(self.vector)
        self.parameters = [nn.Parameter(view) for view in self.views.values()]
        self.optimizer = outer(self.parameters)
        self.received = 0

    @torch.no_grad()
    def difference(self) -> Tensor:
        """The outer gradient of this replica, g - theta (numel,). It is measured from g and never from what
        was mixed into theta, which would count earlier exchanges twice."""
        difference = torch.empty_like(self.vector)
        for name, view in self.space.views(difference).items():
            torch.sub(self.views[name], self.inner[name].detach().to(view.dtype), out=view)
        return difference

    def update(self, delta: Tensor) -> None:
        """One outer step with the mean outer gradient (numel,)."""
        for parameter, gradient in zip(self.parameters, self.space.views(delta).values(), strict=True):
            parameter.grad = gradient
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.received += 1

    @torch.no_grad()
    def mix(self, alpha: float) -> None:
        """theta <- alpha theta + (1 - alpha) g."""
        if alpha == 1:
            return
        for name, parameter in self.inner.items():
            view = self.views[name]
            parameter.copy_(view if alpha == 0 else torch.lerp(view, parameter.to(view.dtype), alpha))

    def checksum(self) -> int:
        """Sum of g's words: memory-bound, and different for replicas that have drifted apart."""
        words = torch.int64 if self.vector.dtype == torch.float64 else torch.int32
        return int(self.vector.view(words).sum(dtype=torch.int64))

    def state_dict(self) -> dict[str, Any]:
        return {
            "parameters": {name: view.clone() for name, view in self.views.items()},
            "optimizer": copy.deepcopy(self.optimizer.state_dict()),
            "received": self.received,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.space.flatten(state["parameters"], out=self.vector)
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))  # it would keep the tensors
        self.received = int(state["received"])
