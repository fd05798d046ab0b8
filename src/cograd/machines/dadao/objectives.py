"""Gradients of a PyTorch model on each node's data, as DADAO takes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from cograd.core.space import ParamSpace
from cograd.core.streams import stream
from cograd.machines.dadao.node import Gradient

Loss = Callable[[Tensor, Tensor], Tensor]


def module_gradients(
    model: nn.Module,
    loss: Loss,
    shards: Sequence[tuple[Tensor, Tensor]],
    *,
    ridge: float = 0.0,
    batch: int | None = None,
    seed: int = 0,
) -> list[Gradient]:
    """One gradient a node: of ``loss(model(inputs), targets) + ridge / 2 |x|^2`` over the node's shard.

    x is the vector of the model's trainable parameters in the order of ``ParamSpace.of(model)``, which also
    turns a result back into parameters (``space.views(x)``). The model itself is not changed. With ``batch``,
    each call takes that many rows of the shard, drawn with replacement from (seed, node, k). The theory asks
    for a strongly convex objective: a linear model, a convex loss, a ridge.

    Raises ValueError for ridge < 0, batch < 1, an empty shard, and inputs and targets of different lengths.
    """
    if not ridge >= 0:
        raise ValueError(f"ridge must be >= 0; got {ridge}")
    if batch is not None and batch < 1:
        raise ValueError(f"batch must be >= 1 or None; got {batch}")
    for node, (inputs, targets) in enumerate(shards):
        if not 0 < len(inputs) == len(targets):
            raise ValueError(f"shard {node} must hold rows; got {len(inputs)} inputs, {len(targets)} targets")
    space = ParamSpace.of(model)

    def of(node: int, inputs: Tensor, targets: Tensor) -> Gradient:
        def gradient(x: Tensor, k: int) -> Tensor:
            rows = slice(None) if batch is None else _draw(len(inputs), batch, seed, node, k)
            at = x.detach().clone().requires_grad_()
            value = loss(functional_call(model, space.views(at), (inputs[rows],)), targets[rows])
            return torch.autograd.grad(value, at)[0] + ridge * x

        return gradient

    return [of(node, inputs, targets) for node, (inputs, targets) in enumerate(shards)]


def _draw(rows: int, batch: int, seed: int, node: int, k: int) -> Tensor:
    return torch.from_numpy(stream(seed, "minibatch", node, k).numpy.integers(rows, size=batch))
