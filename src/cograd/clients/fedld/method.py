"""FedLD as a federated method: margin control at the clients, principal gradients at the server."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cograd.clients.fedld.combining import GramRule, PrincipalGradient
from cograd.clients.fedld.margin import MarginControl, check_margin
from cograd.engines.federated.local import LocalModel
from cograd.engines.federated.protocol import (
    ClientContext,
    Content,
    Session,
    State,
    Synchronous,
    Task,
    mean_of,
    sizes_of,
)
from cograd.engines.federated.training import LocalSGD


@dataclass
class FedLD(Synchronous):
    """FedLD. Shared: 4P bytes up and 4P down a participant and round; the server holds all changes of a round.

    Args:
        local: the clients' training; the authors use momentum 0.5, weight decay 5e-4, minibatches of 50.
        margin: lambda, the weight of the margin-control penalty; 0 does without.
        on: the penalty's form, ``logits`` or ``batch_softmax`` (see `margin_penalty`).
        rule: what the server makes of the changes; None takes their mean.
        weighted: that mean is by numbers of examples. A rule's is unweighted, as published.

    An entry of the model is averaged until its first change that is not zero, as the release does: so is all of
    the first round. Without margin and rule it is FedAvg. Floating buffers are the engine's, which offers their
    mean.

    Every round with a rule reports ``step``: the length of the server's step over that of the plain mean.

    Raises ValueError for an argument out of range.
    """

    local: LocalSGD
    margin: float = 0.1
    on: str = "logits"
    rule: GramRule | None = PrincipalGradient()
    weighted: bool = False

    def __post_init__(self) -> None:
        check_margin("margin", self.margin, self.on)
        if self.rule is not None and self.weighted:
            raise ValueError("weighted must be False with a rule, whose mean is unweighted; got True")
        if self.rule is not None and self.rule.buffers != "mean":
            raise ValueError(
                f"buffers of the rule must be 'mean': a session's are the engine's; got {self.rule.buffers!r}"
            )

    def tasks(self) -> Mapping[str, Task]:
        return {"train": self.train}

    def train(self, state: State, content: Content, data: Any, ctx: ClientContext) -> tuple[State, Content]:
        """The client's round."""
        x = content["x"]
        with self._controlled(ctx.model):
            return state, {"delta": self.local.run(ctx, data, x) - x}

    @contextmanager
    def _controlled(self, model: LocalModel) -> Iterator[None]:
        """The model with the penalty in its loss."""
        plain = model.loss
        if self.margin:
            model.loss = MarginControl(plain, self.margin, self.on)
        try:
            yield
        finally:
            model.loss = plain

    def start(self, session: Session) -> State:
        server: State = {"round": 0, "x": session.initial.clone()}
        if self.rule is not None:
            server["moved"] = torch.zeros(len(session.space), dtype=torch.bool)
        return server

    def close(self, server: State, replies: Mapping[int, Content], session: Session) -> None:
        if self.rule is None:
            change = mean_of(replies, "delta", sizes_of(replies, session) if self.weighted else None)
        else:
            change = self._combined(self.rule, server, replies, session)
        server["x"] = server["x"] + change
        server["round"] += 1

    def _combined(
        self, rule: GramRule, server: State, replies: Mapping[int, Content], session: Session
    ) -> Tensor:
        change = mean = mean_of(replies, "delta")
        views, moved = session.space.views, server["moved"]
        if bool(moved.any()):
            fresh = zip(session.space, moved.tolist(), strict=True)
            averaged = [s.name for s, has_moved in fresh if not has_moved] if rule.layerwise else []
            deltas = [views(reply["delta"]) for reply in replies.values()]
            found = rule.combine(deltas, averaged, session.stream("combining", server["round"]))
            change = session.space.flatten(found)
        server["moved"] = moved | torch.tensor([bool(part.any()) for part in views(change).values()])
        if mean.any():
            session.reports["step"] = float(change.norm() / mean.norm())
        return change
