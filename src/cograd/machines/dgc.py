"""Deep Gradient Compression (arXiv:1712.01887): workers share the 0.1 % of the gradient that matters now.

Each worker of synchronous data-parallel SGD adds its gradient to a local velocity u and the velocity to a
local residual v. It sends the entries of v whose magnitude is in their tensor's top ``density`` and keeps the
rest for later; everyone adds up everyone's entries in the same order. What makes this lossless where plain
gradient dropping is not:

- *momentum correction* (Eq. 6-7): what accumulates is the velocity, not the gradient, u <- m u + g, v <- v + u;
- *local gradient clipping* (Sec. 3.2) by thr N^(-1/2), before accumulation;
- *momentum factor masking* (Sec. 3.3): v and u become zero where v was sent, so stale momentum does not;
- *warm-up* (Sec. 3.3): density falls from 25 % to its final value over the first epochs.

Tensors of at most one dimension (biases, norm scales) travel dense, with the momentum applied after the sum. A
stage of density 1 is ordinary momentum SGD over an all-reduce; its velocity becomes the workers' u when
sparsification begins. Payload: each sent entry as a 32-bit value and a 16-bit count of the zeros before it.

    dgc = DGC(density=0.001, momentum=0.9, warmup=DensityWarmup(steps_per_stage=len(loader)))
    attached = dgc.attach(ddp_model, torch.optim.SGD(ddp_model.parameters(), lr=0.1, weight_decay=1e-4))

The training loop stays as it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.nn.parallel import DistributedDataParallel

from cograd.core import transforms
from cograd.core.codecs import (
    Context,
    Encoded,
    FixedLength,
    Float32,
    Float64,
    Indices,
    RunLength16,
    Sparse,
    Split,
    TopK,
    count_for,
    density_checked,
    reduce,
)
from cograd.core.ledger import Ledger
from cograd.core.message import Payload, Schema
from cograd.core.selection import Sampled
from cograd.core.space import ParamSpace, Segment
from cograd.core.transforms import Accumulate, Momentum, Transform
from cograd.engines.ddp import Attachment

PAPER_WARMUP = (0.25, 0.0625, 0.015625, 0.004)
"""Densities of the warm-up's stages (Sec. 3.3): sparsity 75, 93.75, 98.4375, 99.6 %."""


@dataclass(frozen=True)
class DensityWarmup:
    """Density by step: each stage for ``steps_per_stage`` steps, never below the final density.

    With the paper's four stages and a stage of one epoch this is its 4-epoch warm-up. Raises ValueError for
    ``steps_per_stage`` < 1, a density outside (0, 1], or one that returns to 1 after sparsification began.
    """

    steps_per_stage: int
    stages: tuple[float, ...] = PAPER_WARMUP

    def __post_init__(self) -> None:
        if self.steps_per_stage < 1:
            raise ValueError(f"steps_per_stage must be >= 1; got {self.steps_per_stage}")
        for before, after in zip((1.0, *self.stages), map(density_checked, self.stages), strict=False):
            if after == 1 and before < 1:
                raise ValueError(f"stages cannot return to density 1 once below it; got {self.stages}")

    def density(self, step: int, final: float) -> float:
        """The density of step 0, 1, ..."""
        stage = step // self.steps_per_stage
        return max(self.stages[stage], final) if stage < len(self.stages) else final


@dataclass(frozen=True)
class Upload:
    """Bytes that a worker uploads in one step, and what the dense gradient would take.

    ``payload`` is with whole numbers of entries, as sent; ``nominal`` with ``density * numel`` of each tensor,
    not rounded up to a whole entry, as the paper's tables count.
    """

    dense: int
    payload: int
    nominal: float

    @property
    def ratio(self) -> float:
        """Dense bytes over sent bytes."""
        return self.dense / self.payload

    @property
    def nominal_ratio(self) -> float:
        """The same by the paper's count."""
        return self.dense / self.nominal


class DGC:
    """Deep Gradient Compression for data-parallel SGD.

    Args:
        density: share of each compressed tensor's entries that is sent, in (0, 1]; 1 is dense momentum SGD.
        momentum: m of the velocity, in [0, 1). The optimizer itself must have none.
        nesterov: u <- m (u + g), v <- v + u + g (Appendix B).
        masking: momentum factor masking.
        warmup: density by step before the final one.
        clip_norm: the threshold that a dense run would clip the *summed* gradient's L2 norm with; each worker
            clips its share by ``clip_norm / sqrt(N)``. Dense steps clip the sum by ``clip_norm``.
        sample_ratio: share of a tensor sampled to estimate its threshold. Tensors below 2^22 entries are
            searched exactly, which takes no longer there (see `Sampled`); 1 searches all of them so.
        min_numel: tensors with fewer elements travel dense, as those of one dimension do.
        values: how sent values are written; with ``Float16()`` the rounding error stays in v.
        indices: how positions are written: ``RunLength16()`` as in the paper, or ``Int32()``.
        seed: of the samples' starting points.

    State a worker: u and v in float32 (8 bytes a parameter) and the update (4); another 4 where the optimizer
    has weight decay.

    Raises ValueError at construction for an argument out of range.
    """

    def __init__(
        self,
        density: float = 0.001,
        momentum: float = 0.9,
        *,
        nesterov: bool = False,
        masking: bool = True,
        warmup: DensityWarmup | None = None,
        clip_norm: float | None = None,
        sample_ratio: float = 0.01,
        min_numel: int = 0,
        values: FixedLength = Float32(),
        indices: Indices = RunLength16(),
        seed: int = 0,
    ) -> None:
        if clip_norm is not None and not 0 < clip_norm < math.inf:
            raise ValueError(f"clip_norm must be a positive number or None; got {clip_norm}")
        if min_numel < 0:
            raise ValueError(f"min_numel must be >= 0; got {min_numel}")
        if warmup and density == 1 and min(warmup.stages) < 1:
            raise ValueError("density 1 after a warm-up that was sparse: residuals would be dropped")
        self.codec = TopK(density, values, indices, Sampled(sample_ratio))
        self.velocity = Momentum(momentum, nesterov)
        self.momentum, self.nesterov, self.masking = momentum, nesterov, masking
        self.density, self.warmup, self.clip_norm = density, warmup, clip_norm
        self.min_numel, self.seed, self.round = min_numel, seed, 0

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.codec!r}, momentum={self.momentum}, nesterov={self.nesterov}, "
            f"masking={self.masking}, warmup={self.warmup}, clip_norm={self.clip_norm}, "
            f"min_numel={self.min_numel}, seed={self.seed})"
        )

    # What a step does to a gradient before it is coded, and to the sum after it was decoded.

    @property
    def local(self) -> tuple[Transform, ...]:
        """Step 3: the velocity accumulates on each worker (momentum correction)."""
        return (self.velocity, Accumulate())

    def after(self, update: Tensor) -> None:
        """Step 4: the dense head of the sum gets the global momentum; the rest has had its own."""
        self._apply_velocity(update[: self.head])

    # The exchange, in the order of a step.

    def bind(
        self,
        space: ParamSpace,
        members: int,
        party: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if not 0 <= party < members:
            raise ValueError(f"party must be in 0 .. members - 1 = {members - 1}; got {party}")
        self.space = space.reordered(lambda s: not self.compresses(s))
        self.members, self.party = members, party
        dense = [s for s in self.space if not self.compresses(s)]
        self.dense_segments, self.head = len(dense), sum(s.numel for s in dense)
        self.state = transforms.init((self.velocity, Accumulate()), self.space.numel, device, dtype)
        self.update = self.space.zeros(device, dtype)
        self._sent: Encoded | None = None

    def compresses(self, segment: Segment) -> bool:
        """Whether a tensor is sparsified: two dimensions or more, and not below ``min_numel``."""
        return len(segment.shape) > 1 and segment.numel >= self.min_numel

    def density_at(self, step: int) -> float:
        return self.warmup.density(step, self.density) if self.warmup else self.density

    @property
    def schema(self) -> Schema:
        return self.space.schema(self)

    @property
    def dense(self) -> bool:
        return self.density_at(self.round) == 1

    def scale(self, norm: float) -> float:
        if self.clip_norm is None or self.dense:
            return 1.0
        return min(1.0, self.clip_norm / math.sqrt(self.members) / max(norm, 1e-30))

    def feed(self, name: str, gradient: Tensor, scale: float) -> None:
        segment = self.space[name]
        if self.dense:
            self._store(self.update, segment, gradient, scale)
        elif segment.offset < self.head:
            self._store(self.state["residual"], segment, gradient, scale)
        else:
            transforms.run(self.local, gradient, self.state, segment.offset, scale)

    def encode(self) -> Payload:
        self._sent = self._split().encode(self.state["residual"], self.space.layout, self._context(self.party))
        return self._sent.payload

    def decode(self, payloads: Sequence[Payload]) -> Tensor:
        if len(payloads) != self.members:
            raise ValueError(f"payloads of all {self.members} parties are needed; got {len(payloads)}")
        contexts = [self._context(party) for party in range(self.members)]
        update = reduce(self._split(), payloads, self.space.layout, contexts, out=self.update)
        self._forget_sent()
        self.after(update)
        self.round += 1
        return update

    def collect(self) -> Tensor:
        return self.update

    def reduced(self, total: Tensor) -> Tensor:
        if self.clip_norm is not None:
            total.mul_(min(1.0, self.clip_norm / max(float(total.norm()), 1e-30)))
        self._apply_velocity(total)
        self.round += 1
        if not self.dense:
            self._hand_over()
        return total

    def _hand_over(self) -> None:
        """Every worker's u so far is the velocity of the sum; from here on the sum of the u's must be."""
        self.state["momentum"][self.head :] /= self.members

    def _forget_sent(self) -> None:
        assert self._sent is not None
        kept = self._sent.kept
        assert isinstance(kept, Sparse)
        indices, values = kept.indices[self.head :], kept.values[self.head :]
        self.state["residual"].index_add_(0, indices, values, alpha=-1)
        if self.masking:
            self.state["momentum"].index_fill_(0, indices, 0)
        self._sent = None

    def _apply_velocity(self, update: Tensor) -> None:
        transforms.run((self.velocity,), update, {"momentum": self.state["momentum"]}, out=update)

    def _store(self, vector: Tensor, segment: Segment, gradient: Tensor, scale: float) -> None:
        torch.mul(gradient.reshape(-1), scale, out=vector[segment.slice])

    def _split(self) -> Split:
        tail = replace(self.codec, density=self.density_at(self.round))
        return Split(_AS_IT_IS[self.update.dtype], tail, self.dense_segments)

    def _context(self, party: int) -> Context:
        return Context(self.seed, self.round, party)

    # What a user calls.

    def attach(
        self,
        ddp: DistributedDataParallel,
        optimizer: torch.optim.Optimizer,
        *,
        scaler: GradScaler | None = None,
        ledger: Ledger | None = None,
    ) -> Attachment:
        """Compress what this DDP model exchanges; see `Attachment` for what is checked and what is refused."""
        return Attachment(self, ddp, optimizer, scaler=scaler, ledger=ledger)

    def upload(self, shapes: ParamSpace | Mapping[str, Iterable[int]]) -> Upload:
        """Bytes a worker uploads in a step at final density, from shapes (exact counts, no escape)."""
        space = shapes if isinstance(shapes, ParamSpace) else ParamSpace(shapes)
        entry = self.codec.values.nbytes((1,)) + self.codec.indices.width
        compressed = [s.numel for s in space if self.compresses(s)]
        rest = 4 * (space.numel - sum(compressed))
        return Upload(
            dense=4 * space.numel,
            payload=rest + sum(entry * count_for(n, self.density) for n in compressed),
            nominal=rest + entry * self.density * sum(compressed),
        )

    def _replicated(self) -> list[str]:
        """Tensors whose velocity is the same on every worker, because it follows the sum."""
        return [s.name for s in self.space if s.offset < self.head or self.dense]

    def residual_norm(self) -> float:
        """L2 norm of what this worker has not sent yet."""
        return float(self.state["residual"][self.head :].norm())

    def state_dict(self) -> dict[str, Any]:
        """This worker's state: velocities, residuals and the step. Every worker saves its own."""
        tensors = {
            slot: {n: v.clone() for n, v in self.space.views(x).items()} for slot, x in self.state.items()
        }
        return {
            "round": self.round,
            "members": self.members,
            "party": self.party,
            "space": self.space.digest,
            "replicated": self._replicated(),
            **tensors,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`. Raises ValueError for another worker's state, another model's, or
        one of another number of workers (see `reshard`)."""
        if state["space"] != self.space.digest:
            raise ValueError("the state is of a model with other parameters (names, order or shapes differ)")
        if state["members"] != self.members:
            raise ValueError(
                f"the state is of {state['members']} workers, this run has {self.members}: "
                "convert it with DGC.reshard"
            )
        if state["party"] != self.party:
            raise ValueError(f"the state is of worker {state['party']}; this is worker {self.party}")
        self.round = int(state["round"])
        for slot, vector in self.state.items():
            self.space.flatten(state[slot], out=vector)

    @staticmethod
    def reshard(states: Sequence[Mapping[str, Any]], members: int) -> list[dict[str, Any]]:
        """The states of all workers of a run -> states for another number of workers.

        Takes what `state_dict` of the exchange or of its attachment gave. The rule: what the workers owe the
        model together stays the same. Each new worker gets the mean share, sum / ``members``, of velocities
        and of residuals; a dense tensor's velocity is global and stays as it is. Raises ValueError if the
        states are not of one run's workers, each once.
        """
        if members < 1:
            raise ValueError(f"members must be >= 1; got {members}")
        if sorted(s["party"] for s in states) != list(range(states[0]["members"])):
            raise ValueError(
                f"states of all {states[0]['members']} workers are needed, each once; "
                f"got those of {[s['party'] for s in states]}"
            )
        if len({(s["round"], s["space"]) for s in states}) != 1:
            raise ValueError("the states are of different steps or models")
        first = dict(states[0])
        shares: dict[str, Any] = {}
        for slot in ("momentum", "residual"):
            totals = {n: sum((s[slot][n] for s in states[1:]), first[slot][n]) for n in first[slot]}
            shares[slot] = {n: total / members for n, total in totals.items()}
        for name in first["replicated"]:
            shares["momentum"][name] = first["momentum"][name]
        return [{**first, **shares, "members": members, "party": party} for party in range(members)]


_AS_IT_IS: dict[torch.dtype, FixedLength] = {torch.float32: Float32(), torch.float64: Float64()}
