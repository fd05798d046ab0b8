"""Linear sketch and de-sketch (arXiv:2210.08371): parties share R x, and get the mean back as R^T (R x).

With a shared random matrix R_t of b rows, drawn anew each round, a party sends b numbers R_t x instead of its
gradient or local update x of d. Sketches add up, so plain all-reduce sums them, or a server that never holds a
vector of d; everyone applies R_t^T to the mean. E[R_t^T R_t] = I: what comes out is unbiased, with omega times
the signal's energy in variance, about d/b (`Sketch` has the table).

- `Sketch`: the operator in six kinds; ``omega``, the guaranteed step ``suggest_lr``, a digest to compare R_t;
- `LinearSketch`: one local step on DDP (sketched distributed gradient descent);
- `SketchedFedAvg`: K local steps of many clients and a server (the paper's main algorithm), with
  `GaussianDP`: noise in the gradients makes it private, and sketching afterwards costs no privacy.

Sketching alone hides nothing: who knows R can match sketched gradients and recover the input.

The method that others call SketchedSGD or FetchSGD is another one (count sketch, heavy hitters, error feedback;
see `cograd.machines.baselines.FetchSGD`). This one is linear and unbiased and keeps no residual.

    sketch = LinearSketch(rows=4096, kind="srht", momentum=0.9)
    attached = sketch.attach(ddp_model, torch.optim.SGD(ddp_model.parameters(), lr=0.1))
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.nn.parallel import DistributedDataParallel

from cograd.core import transforms
from cograd.core.codecs import tensor_of
from cograd.core.ledger import Ledger
from cograd.core.message import Payload, Schema
from cograd.core.space import ParamSpace
from cograd.core.transforms import Momentum
from cograd.engines.ddp import Attachment
from cograd.machines.linear_sketch.federated import SketchedFedAvg
from cograd.machines.linear_sketch.privacy import GaussianDP
from cograd.machines.linear_sketch.sketch import Sketch, kind_checked, refuse_other, settings_of


class LinearSketch:
    """Sketched data-parallel SGD: the sum of the workers' gradients travels as a sketch of ``rows`` numbers.

    Each step all parties all-reduce R_t g and use R_t^T of the sum as the gradient. Momentum acts on that
    estimate, the same on every worker; it cannot act on sketches, since R_t changes each round.

    Args:
        rows: b; by default a tenth of the model's parameters, rounded up.
        kind: of the sketch: see `Sketch`.
        momentum: of the de-sketched gradient, in [0, 1). The optimizer itself must have none.
        nesterov: Nesterov's form of it.
        nonzeros: of kind ``sparse``.
        redraw: false keeps R_0 for ever (an ablation): all updates then lie in R_0's row space of b
            dimensions, and training stalls at its best point.
        seed: of R; the same on all workers, which compare settings and a digest of R_0 when they join.

    State a worker: the gradient, in whose place the update comes (4 bytes a parameter), and the velocity where
    there is momentum (4). It is the same on all workers and does not depend on their number, so a checkpoint
    fits any number of them.

    Raises ValueError at construction for an argument out of range, and at `bind` or `attach` for ``rows``
    above the model's parameters.
    """

    dense = True
    """Every step is a sum: of sketches."""

    def __init__(
        self,
        rows: int | None = None,
        kind: str = "srht",
        *,
        momentum: float = 0.0,
        nesterov: bool = False,
        nonzeros: int | None = None,
        redraw: bool = True,
        seed: int = 0,
    ) -> None:
        if rows is not None and rows < 1:
            raise ValueError(f"rows must be >= 1 or None (a tenth of the parameters); got {rows}")
        kind_checked(kind, nonzeros)
        self.velocity = Momentum(momentum, nesterov)
        self.rows, self.kind, self.nonzeros, self.seed = rows, kind, nonzeros, seed
        self.momentum, self.nesterov, self.redraw, self.round = momentum, nesterov, redraw, 0

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(rows={self.rows}, kind={self.kind!r}, momentum={self.momentum}, "
            f"nesterov={self.nesterov}, nonzeros={self.nonzeros}, redraw={self.redraw}, seed={self.seed})"
        )

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
        rows = -(-space.numel // 10) if self.rows is None else self.rows
        self.sketch = Sketch(space.numel, rows, self.kind, seed=self.seed, nonzeros=self.nonzeros)
        self.space, self.members, self.party = space, members, party
        self.vector = space.zeros(device, dtype)
        self.state = transforms.init((self.velocity,), space.numel, device, dtype) if self.momentum else {}

    @property
    def schema(self) -> Schema:
        return self.space.schema(f"{self!r}, R_0 {self.sketch.digest(0)}")

    def scale(self, norm: float) -> float:
        return 1.0

    def feed(self, name: str, gradient: Tensor, scale: float) -> None:
        torch.mul(gradient.reshape(-1), scale, out=self.vector[self.space[name].slice])

    def collect(self) -> Tensor:
        """This party's sketch (rows,), to be summed over the parties."""
        return self.sketch(self.vector, self._draw)

    def reduced(self, total: Tensor) -> Tensor:
        """The sum of the sketches -> the update (numel,)."""
        update = self.sketch.T(total, self._draw)
        if self.momentum:
            transforms.run((self.velocity,), update, self.state, out=update)
        self.vector = update
        self.round += 1
        return update

    def encode(self) -> Payload:
        """The sketch as bytes, for an engine that gathers instead of reducing."""
        return bytearray(self.collect().cpu().numpy().tobytes())

    def decode(self, payloads: Sequence[Payload]) -> Tensor:
        if len(payloads) != self.members:
            raise ValueError(f"payloads of all {self.members} parties are needed; got {len(payloads)}")
        sketches = [tensor_of(payload, self.vector.dtype).to(self.vector.device) for payload in payloads]
        total = sketches[0].clone()
        for sketch in sketches[1:]:
            total += sketch
        return self.reduced(total)

    @property
    def _draw(self) -> int:
        return self.round if self.redraw else 0

    # What a user calls.

    def attach(
        self,
        ddp: DistributedDataParallel,
        optimizer: torch.optim.Optimizer,
        *,
        scaler: GradScaler | None = None,
        ledger: Ledger | None = None,
    ) -> Attachment:
        """Sketch what this DDP model exchanges; see `Attachment` for what is checked and what is refused."""
        return Attachment(self, ddp, optimizer, scaler=scaler, ledger=ledger)

    def suggest_lr(self, smoothness: float) -> float:
        """The guaranteed step for an L-smooth loss, once attached; see `Sketch.suggest_lr`."""
        return self.sketch.suggest_lr(smoothness)

    def state_dict(self) -> dict[str, Any]:
        """The round and the velocity by parameter: the same on every worker."""
        views = {slot: self.space.views(x).items() for slot, x in self.state.items()}
        velocity = {slot: {n: v.clone() for n, v in tensors} for slot, tensors in views.items()}
        return {"round": self.round, "space": self.space.digest, "state": velocity, **self._settings}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`, bit for bit, with any number of workers. Raises ValueError, and changes
        nothing, for the state of another model, of a run with another sketch (rows, kind, seed) or ``redraw``,
        or of one with momentum where this one has none, and the other way round."""
        if state["space"] != self.space.digest:
            raise ValueError("the state is of a model with other parameters (names, order or shapes differ)")
        refuse_other(state, self._settings)
        if set(state["state"]) != set(self.state):
            raise ValueError(
                f"the state has {'a' if state['state'] else 'no'} velocity, and this run's momentum is "
                f"{self.momentum}"
            )
        self.round = int(state["round"])
        for slot, vector in self.state.items():
            self.space.flatten(state["state"][slot], out=vector)

    @property
    def _settings(self) -> dict[str, Any]:
        """What a state must share with the run that continues from it."""
        return {**settings_of(self.sketch), "redraw": self.redraw}


__all__ = ["GaussianDP", "LinearSketch", "Sketch", "SketchedFedAvg"]
