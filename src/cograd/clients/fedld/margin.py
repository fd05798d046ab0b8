"""Margin control: a price on large outputs, so that a model does not grow sure by shortcuts.

    "logits"          log(1 + |z_b|^2), the mean over the examples b of a minibatch     as in the paper
    "batch_softmax"   log(1 + |P|_F^2), P = softmax(z) of the whole minibatch           as released

The released form lies between log(1 + B/C) and log(1 + B) for B examples of C classes: it depends on the
minibatch's size, and hardly moves once predictions are sure. It does not see what is added to all logits of an
example, and the paper's form does.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from cograd.core.checks import check
from cograd.engines.federated.local import Loss

FORMS = ("logits", "batch_softmax")


def margin_penalty(outputs: Tensor, on: str = "logits") -> Tensor:
    """The penalty of a minibatch's outputs (B, C, ...), classes along dimension 1: a scalar.

    Raises ValueError for an unknown form, and for outputs of fewer than two dimensions.
    """
    check(("on", on, f"one of {', '.join(FORMS)}", on in FORMS))
    if outputs.ndim < 2:
        raise ValueError(f"outputs must have shape (B, C, ...); got {tuple(outputs.shape)}")
    if on == "logits":
        return outputs.flatten(1).square().sum(1).log1p().mean()
    return torch.softmax(outputs, 1).square().sum().log1p()


class MarginControl(nn.Module):
    """A loss with the penalty added: ``MarginControl(nn.CrossEntropyLoss(), 0.1)(outputs, targets)``.

    Args:
        loss: of outputs and targets, a scalar; a module or a function.
        weight: lambda, of the penalty.
        on: ``logits`` or ``batch_softmax``.

    Raises ValueError for a weight that is negative or not finite, and for an unknown form.
    """

    def __init__(self, loss: Loss, weight: float = 0.1, on: str = "logits") -> None:
        super().__init__()
        check_margin("weight", weight, on)
        self.loss, self.weight, self.on = loss, weight, on

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        loss = self.loss(outputs, targets)
        return loss + self.weight * margin_penalty(outputs, self.on) if self.weight else loss

    def extra_repr(self) -> str:
        return f"weight={self.weight}, on={self.on!r}"


def check_margin(name: str, weight: float, on: str) -> None:
    """Refuse a weight, called ``name``, or a form that is out of range."""
    check(
        (name, weight, ">= 0 and finite", 0 <= weight < math.inf),
        ("on", on, f"one of {', '.join(FORMS)}", on in FORMS),
    )
