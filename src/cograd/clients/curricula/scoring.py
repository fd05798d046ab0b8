"""How hard an example is: its loss, its error or any figure of its outputs, under the model that judges."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TypeAlias

import torch
from torch import Tensor

from cograd.clients.curricula.pacing import ORDERS
from cograd.core.checks import check
from cograd.data.clients import ClientData
from cograd.engines.federated.local import Loss
from cograd.engines.federated.protocol import ClientContext

Score: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``score(outputs, x, y)``: a figure of each example (n,), low where it is easy."""

JUDGES = ("global", "local", "both", "expert")
SCORES = ("loss", "error")


@dataclass
class Judging(ClientContext):
    """What a client remembers for its curriculum: the model that its last local training ended with, and the
    expert's scores (n,) of its examples. None of what it has not got."""

    last: Tensor | None = None
    expert: Tensor | None = None


@dataclass(frozen=True, kw_only=True, repr=False)
class Difficulty:
    """Who judges, by what, and in which order things come.

    Args:
        order: ``easy_first`` ("curriculum"), ``hard_first`` ("anti") or ``random``, which scores nothing.
        judge: the ``global`` model, as received (s_G); the client's own last ``local`` one (s_L), and the
            global one before it has any; ``both``, the sum of the two (s_LG); or a fixed ``expert`` (s_E).
        score: ``loss``; ``error``, which is 1 where the largest output is not the target and 0 elsewhere
            (s^pred); or a function of outputs, inputs and targets.
    """

    order: str = "easy_first"
    judge: str = "global"
    score: str | Score = "loss"

    def __post_init__(self) -> None:
        known = callable(self.score) or self.score in SCORES
        check(
            ("order", self.order, f"one of {', '.join(ORDERS)}", self.order in ORDERS),
            ("judge", self.judge, f"one of {', '.join(JUDGES)}", self.judge in JUDGES),
            ("score", self.score, f"one of {', '.join(SCORES)}, or a function", known),
        )

    def __repr__(self) -> str:
        shown = (f"{f.name}={_named(getattr(self, f.name))}" for f in fields(self))
        return f"{type(self).__name__}({', '.join(shown)})"

    @property
    def remembers(self) -> bool:
        """Whether the client's last local model must be kept."""
        return self.order != "random" and self.judge in ("local", "both")

    @property
    def asks_expert(self) -> bool:
        return self.order != "random" and self.judge == "expert"

    @property
    def terms(self) -> int:
        """Figures of which a score is the sum."""
        return 2 if self.judge == "both" else 1

    def of(self, ctx: ClientContext, data: ClientData, received: Tensor) -> Tensor:
        """Scores by term (terms, n); a client without a local model has 0 as second term.

        One ``forward`` is counted for each example and judge; an expert's only when it is received.
        """
        last = expert = None
        if self.remembers or self.asks_expert:
            if not isinstance(ctx, Judging):
                raise TypeError(f"judge={self.judge!r} needs a client's memory: wrap the method in Curriculum")
            last, expert = ctx.last, ctx.expert
        if self.judge == "expert":
            if expert is None:
                raise RuntimeError(f"client {ctx.client} has not received the expert")
            return expert[None]
        if self.judge == "local":
            return self.measure(ctx, data, received if last is None else last)[None]
        first = self.measure(ctx, data, received)
        if self.judge == "global":
            return first[None]
        second = torch.zeros_like(first) if last is None else self.measure(ctx, data, last)
        return torch.stack([first, second])

    def measure(self, ctx: ClientContext, data: ClientData, vector: Tensor) -> Tensor:
        """Scores (n,) under the model at ``vector`` (numel,), in evaluation mode and without gradients.

        Raises ValueError for NaN, and for a function that gives anything but n figures.
        """
        outputs = ctx.model.outputs(vector, data.x)
        ctx.count("forward", len(data))
        with torch.no_grad():
            if callable(self.score):
                found = self.score(outputs, data.x, data.y)
            elif self.score == "error":
                found = (outputs.argmax(-1) != data.y).to(vector.dtype)
            else:
                found = losses(ctx.model.loss, outputs, data.y)
        if found.shape != (len(data),):
            raise ValueError(f"score must give {len(data)} figures; got shape {tuple(found.shape)}")
        if bool(found.isnan().any()):
            raise ValueError(f"scores of client {ctx.client} in round {ctx.round} must not be NaN; some are")
        return found


def _named(value: object) -> str:
    """A value as text that is the same in another process: a function by its name."""
    if callable(value):
        return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', repr(value))}"
    return repr(value)


def losses(loss: Loss, outputs: Tensor, targets: Tensor) -> Tensor:
    """The loss of each example (n,), from one that is the mean over a minibatch."""
    each = torch.vmap(lambda output, target: loss(output[None], target[None]))
    found: Tensor = each(outputs, targets)
    return found
