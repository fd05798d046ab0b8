"""What Just One Byte (arXiv:2306.10015) is compared with: the same rounds with a message as long as the model.

`FullZeroth` sends the sum of p z over a machine's samples, the released code's ``send_full_grad``; `Backprop`
sends the sum of its minibatches' gradients, the code's ``normal``. Both send float32 in the order of the
parameter space and divide by n as `OneByte` does. They keep no log.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cograd.core.codecs import Float32
from cograd.core.message import Payload
from cograd.machines.one_byte.optimizer import Closure, OneByte, Own


class FullZeroth(OneByte):
    """`OneByte` whose machines send their zeroth-order gradient in full: 4 d bytes. Arguments as there, but for
    ``gamma``: the perturbation size is learned from each estimate's p, which a sum does not tell.

    Samples whose loss is not finite are left out of the sum. Raises ValueError for a sum that is not finite.
    """

    replayable = False

    def __init__(self, model: nn.Module, lr: float, **options: Any) -> None:
        if options.get("gamma"):
            raise ValueError(
                f"gamma must be 0 for {type(self).__name__}, whose messages do not tell each estimate's p; "
                f"got {options['gamma']}"
            )
        super().__init__(model, lr, **options)

    @property
    def width(self) -> int:
        return 4 * self.space.numel

    def estimate(self, closure: Closure, batches: Sequence[Any], machine: int) -> Own:
        projections, losses = self._measure(closure, batches, machine)
        total = self.space.zeros()
        views, factors = self.space.views(total), self._factors()
        flagged = []
        for s, (direction, p) in enumerate(zip(self._directions(machine), projections.tolist(), strict=True)):
            if p - p != 0:
                flagged.append(s)
                continue
            for name, view in views.items():
                view.add_(self._work.step(direction, name, p * (factors[name] if factors else 1.0)).cpu())
        self.ledger.work(machine, "draw", self.samples * self.space.numel)
        return Own(self._coded(total, machine), tuple(losses), tuple(flagged))

    def _coded(self, total: Tensor, machine: int) -> Payload:
        if not bool(torch.isfinite(total).all()):
            raise ValueError(f"machine {machine}: a gradient of round {self.round} is not finite")
        return Float32().encode(total, self.space.layout, self._context(0)).payload

    def _move(self, members: Sequence[int], payloads: Sequence[Payload]) -> None:
        rate = self.lr / self._norm(self.samples * len(members))
        for member, payload in zip(members, payloads, strict=True):
            gradient = Float32().decode(payload, self.space.layout, self._context(member)).dense()
            for name, view in self.space.views(gradient).items():
                theta = self._params[name].data
                theta.sub_(view.to(theta.device, theta.dtype).mul_(rate))


class Backprop(FullZeroth):
    """Ordinary gradients, averaged: what zeroth order is measured by. The closure is differentiated instead of
    run under inference mode; eval mode stays, so that both see the same loss."""

    def estimate(self, closure: Closure, batches: Sequence[Any], machine: int) -> Own:
        total, losses = self.space.zeros(), []
        if len(batches) != self.samples:
            raise ValueError(f"batches must hold one minibatch a sample, {self.samples}; got {len(batches)}")
        with self._measuring():
            for batch in batches:
                with torch.enable_grad():
                    loss = closure(batch)
                    grads = torch.autograd.grad(loss, list(self._params.values()), materialize_grads=True)
                total += self.space.flatten(dict(zip(self._params, grads, strict=True))).cpu()
                losses.append(float(loss.detach()))
        self.ledger.work(machine, "grad", self.samples)
        return Own(self._coded(total, machine), tuple(losses))
