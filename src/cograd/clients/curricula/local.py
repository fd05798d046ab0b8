"""The data curriculum: in each of its rounds a client goes through its examples in a growing window."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from itertools import islice

import torch
from torch import Tensor

from cograd.clients.curricula.pacing import Pacing, ranked, windows
from cograd.clients.curricula.scoring import Difficulty
from cograd.core.checks import check
from cograd.data.clients import ClientData
from cograd.engines.federated.protocol import ClientContext
from cograd.engines.federated.training import Gradient, LocalSGD


@dataclass(frozen=True, kw_only=True, repr=False)
class DataCurriculum(Difficulty):
    """Which of its examples a client sees when, within one round.

    They are scored at the start of every round, at the model from which its training starts; nothing is scored
    where the window is everything from the start.

    Args:
        order, judge, score: see `Difficulty`.
        pacing: how the window grows over the round's steps.
        min_samples: the least window.
        released_budget: the round has floor(n / batch_size) + 1 steps an epoch, as in the released code, which
            is one more than a pass where the batch size divides n. Without, it has as many as plain training.
        cooling, power: local step s = 0, 1, ... has the learning rate lr (1 + cooling s)^-power, anew every
            round. The released code cools by 0.001.
    """

    pacing: Pacing = Pacing()
    min_samples: int = 32
    released_budget: bool = False
    cooling: float = 0.0
    power: float = 0.75

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            ("min_samples", self.min_samples, ">= 1", self.min_samples >= 1),
            ("cooling", self.cooling, ">= 0 and finite", 0 <= self.cooling < math.inf),
            ("power", self.power, ">= 0 and finite", 0 <= self.power < math.inf),
        )


@dataclass(frozen=True)
class PacedSGD(LocalSGD):
    """`LocalSGD` under a data curriculum: it takes its place in any method whose clients train by one.

    A round has at least as many steps as plain training, and completes its last pass. Exactly ``steps`` are
    done where these are given. With a window of everything the minibatches are those of `LocalSGD`. Scores by
    a client's own model or by an expert need `Curriculum` around the method.

    Raises ValueError for a client of fewer examples than a minibatch.
    """

    curriculum: DataCurriculum = DataCurriculum()

    @classmethod
    def of(cls, local: LocalSGD, curriculum: DataCurriculum) -> PacedSGD:
        """The same training under a curriculum."""
        return cls(**{f.name: getattr(local, f.name) for f in fields(LocalSGD)}, curriculum=curriculum)

    def windows(self, n: int) -> list[int]:
        """Examples in the window of each pass of a round."""
        cur = self.curriculum
        extra = cur.released_budget and self.steps is None
        steps = self.epochs * (n // self.batch_size + 1) if extra else super().length(n)
        return windows(cur.pacing, n, self.batch_size, steps, cur.min_samples)

    def length(self, n: int) -> int:
        """Local steps of a client with ``n`` examples."""
        if self.steps is not None:
            return self.steps
        return sum(math.ceil(size / self.batch_size) for size in self.windows(n))

    def batches(self, ctx: ClientContext, data: ClientData) -> Iterator[tuple[Tensor, Tensor]]:
        """The round's minibatches; the model's ``theta`` is where training starts."""
        for rows in islice(self.rows(ctx, data), self.length(len(data))):
            at = rows.to(data.x.device)
            yield data.x.index_select(0, at), data.y.index_select(0, at)

    def rows(self, ctx: ClientContext, data: ClientData) -> Iterator[Tensor]:
        """The rows of each minibatch of all passes."""
        sizes = self.windows(len(data))
        order = self.order(ctx, data) if sizes[0] < len(data) else torch.arange(len(data))
        for number, size in enumerate(sizes):
            window = order[:size].sort().values  # the whole of it is 0 .. n - 1, as in plain training
            yield from window[ctx.stream("batches", number).permutation(size)].split(self.batch_size)

    def order(self, ctx: ClientContext, data: ClientData) -> Tensor:
        """The client's rows, as they are admitted (n,)."""
        cur = self.curriculum
        scores = torch.zeros(len(data))
        if cur.order != "random":
            here = ctx.model.theta.clone()  # judging moves theta
            scores = cur.of(ctx, data, here).sum(0)
            ctx.model.at(here)
        return ranked(scores, cur.order, ctx.stream("curriculum"))

    def run(
        self, ctx: ClientContext, data: ClientData, start: Tensor, gradient: Gradient | None = None
    ) -> Tensor:
        """As `LocalSGD.run`, with the learning rate cooled step by step."""
        cur, model = self.curriculum, ctx.model
        v = model.at(start)
        buffer = torch.zeros_like(v) if self.momentum else None
        for s, (x, y) in enumerate(self.batches(ctx, data)):
            if gradient is None:
                ctx.count("grad", 1)
            g = model.gradient(v, x, y) if gradient is None else gradient(v, x, y)
            self.step(v, g, self.rate(ctx.round) * (1 + cur.cooling * s) ** -cur.power, buffer)
        ctx.trained = v
        return v
