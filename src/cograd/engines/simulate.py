"""Data-parallel workers in one process: the same exchange, the same numbers, no process group.

For trying a method in a notebook, for experiments with more workers than there are cores, and as the
reference that real processes are compared with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cograd.core.ledger import Ledger
from cograd.core.space import ParamSpace, trainable
from cograd.engines.exchange import Exchange, GradientError, norm_of, not_finite, weight_decay


class Simulation:
    """N workers that train one model: every worker sees the same weights and its own batch.

    Args:
        model: the model; all workers are at the same weights, so one copy serves.
        optimizer: plain SGD over its parameters; weight decay gets the momentum that coupled decay has.
        exchanges: one a worker, for example ``[DGC() for _ in range(4)]``.
        ledger: counts the messages; a new one if not given.

    Buffers (BatchNorm statistics) are updated by one worker after another.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        exchanges: Sequence[Exchange],
        ledger: Ledger | None = None,
    ) -> None:
        if not exchanges:
            raise ValueError("exchanges must hold one exchange a worker; got none")
        self.model, self.optimizer, self.exchanges = model, optimizer, list(exchanges)
        self.ledger = ledger if ledger is not None else Ledger()
        self.parameters = trainable(model)
        first = next(iter(self.parameters.values()))
        state = torch.float64 if first.dtype == torch.float64 else torch.float32
        for party, exchange in enumerate(self.exchanges):
            exchange.bind(ParamSpace.of(model), len(self.exchanges), party, first.device, state)
        self._decay = self.exchanges[0].space.zeros(first.device, state)

    def step(self, loss: Callable[[Any], Tensor], batches: Sequence[Any]) -> list[float]:
        """One step: ``loss(batch)`` of every worker's batch, exchange, optimizer. Returns the losses.

        Raises GradientError, with weights and state as they were, if a gradient is sparse or not finite.
        """
        if len(batches) != len(self.exchanges):
            raise ValueError(f"batches must hold one batch a worker, {len(self.exchanges)}; got {len(batches)}")
        losses, gradients = [], []
        for batch in batches:
            value = loss(batch)
            grads = torch.autograd.grad(value, list(self.parameters.values()), materialize_grads=True)
            losses.append(float(value.detach()))
            gradients.append(dict(zip(self.parameters, grads, strict=True)))
        for party, grads_of in enumerate(gradients):
            sparse = next((name for name, g in grads_of.items() if g.layout != torch.strided), None)
            if sparse is not None:
                raise GradientError(
                    f"worker {party}: the gradient of {sparse!r} is sparse, which is not supported"
                )
            bad = not_finite(grads_of)
            if bad is not None:
                raise GradientError(f"worker {party}: the gradient of {bad!r} holds NaN or infinity")
        update = self._exchange(gradients)
        self._apply(update)
        return losses

    def _exchange(self, gradients: list[dict[str, Tensor]]) -> Tensor:
        members = len(self.exchanges)
        dense, step = self.exchanges[0].dense, self.exchanges[0].round
        for exchange, grads in zip(self.exchanges, gradients, strict=True):
            scale = exchange.scale(norm_of(exchange.space, grads) / members) / members
            for name, gradient in grads.items():
                exchange.feed(name, gradient, scale)
        if dense:
            total = self.exchanges[0].collect().clone()
            for exchange in self.exchanges[1:]:
                total += exchange.collect()
            size = total.numel() * total.element_size()
            self.ledger.all_reduce(step, size, members)
            updates = [exchange.reduced(total.clone()) for exchange in self.exchanges]
            return updates[0]
        payloads = [exchange.encode() for exchange in self.exchanges]
        for party, payload in enumerate(payloads):
            self.ledger.send(party, step, len(payload), copies=members - 1)
        updates = [exchange.decode(payloads) for exchange in self.exchanges]
        return updates[0]

    def _apply(self, update: Tensor) -> None:
        lead = self.exchanges[0]
        names = {id(p): name for name, p in self.parameters.items()}
        weight_decay(lead, update, self._decay, self.optimizer, names)
        for name, value in lead.space.views(update).items():
            self.parameters[name].grad = value.to(self.parameters[name].dtype)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
