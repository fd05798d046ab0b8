"""FetchSGD (Rothchild et al. 2020, arXiv:2007.07682): count sketches, heavy hitters, error feedback.

What users know as sketched SGD. Every party sends ``tables`` count sketches of its gradient, with the same
hashes in every round. On their sum S, a momentum and an error live in the tables (Algorithm 1):

    U <- m U + S;   E <- E + U;   update = TopK(median over tables of E);   E <- E - S(update)

The estimate by median and top-k is biased; the error's table gives back later what it left out. The learning
rate multiplies the update instead of U, which is the same for a constant one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from cograd.core.codecs import tensor_of
from cograd.core.message import Payload, Schema
from cograd.core.space import ParamSpace
from cograd.engines.ddp import Attachment
from cograd.machines.linear_sketch.sketch import Sketch, refuse_other


class FetchSGD:
    """Exchange of count sketches; the sum is decoded to ``k`` entries by every party alike.

    Args:
        columns: of each table.
        k: entries of an update.
        tables: independent count sketches; 4 * tables * columns bytes are sent.
        momentum: m, in [0, 1), within the sketch.
        masking: also zero the cells of U that the update touches, as the authors' code does (momentum factor
            masking); and those of E, instead of subtracting the update's sketch.
        seed: of the hashes.

    State a party: two sets of tables, and the gradient (4 bytes a parameter).
    """

    nesterov = False
    dense = True

    def __init__(
        self,
        columns: int,
        k: int,
        *,
        tables: int = 5,
        momentum: float = 0.9,
        masking: bool = False,
        seed: int = 0,
    ) -> None:
        for name, value in (("columns", columns), ("k", k), ("tables", tables)):
            if value < 1:
                raise ValueError(f"{name} must be >= 1; got {value}")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must be in [0, 1); got {momentum}")
        self.columns, self.k, self.tables, self.masking, self.seed = columns, k, tables, masking, seed
        self.rho, self.round = momentum, 0
        self.momentum = 0.0  # to the engine: weight decay gets no momentum of its own

    def __repr__(self) -> str:
        return (
            f"FetchSGD(columns={self.columns}, k={self.k}, tables={self.tables}, momentum={self.rho}, "
            f"masking={self.masking}, seed={self.seed})"
        )

    def bind(
        self,
        space: ParamSpace,
        members: int,
        party: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if self.k > space.numel:
            raise ValueError(f"k must be in 1 .. numel = {space.numel}; got {self.k}")
        self.sketch = Sketch(space.numel, self.columns, "countsketch", seed=self.seed)
        self.space, self.members, self.party = space, members, party
        self.vector = space.zeros(device, dtype)
        shape = self.tables, self.columns
        self.state = {slot: torch.zeros(shape, device=device, dtype=dtype) for slot in ("momentum", "error")}

    @property
    def schema(self) -> Schema:
        return self.space.schema(self)

    def scale(self, norm: float) -> float:
        return 1.0

    def feed(self, name: str, gradient: Tensor, scale: float) -> None:
        torch.mul(gradient.reshape(-1), scale, out=self.vector[self.space[name].slice])

    def collect(self) -> Tensor:
        return self._tables(self.vector).view(-1)

    def reduced(self, total: Tensor) -> Tensor:
        u, e = self.state["momentum"], self.state["error"]
        u.mul_(self.rho).add_(total.view(u.shape))
        e.add_(u)
        estimate = torch.stack([self.sketch.T(row, i) for i, row in enumerate(e)]).median(0).values
        top = estimate.abs().topk(self.k).indices
        self.vector = torch.zeros_like(estimate).index_copy_(0, top, estimate[top])
        sent = self._tables(self.vector)
        if self.masking:
            e.masked_fill_(sent != 0, 0)
            u.masked_fill_(sent != 0, 0)
        else:
            e.sub_(sent)
        self.round += 1
        return self.vector

    def encode(self) -> Payload:
        return bytearray(self.collect().cpu().numpy().tobytes())

    def decode(self, payloads: Sequence[Payload]) -> Tensor:
        sums = [tensor_of(payload, self.vector.dtype).to(self.vector.device) for payload in payloads]
        return self.reduced(torch.stack(sums).sum(0))

    def _tables(self, vector: Tensor) -> Tensor:
        """Table i is the count sketch of draw i, the same in every round."""
        return torch.stack([self.sketch(vector, i) for i in range(self.tables)])

    def attach(self, ddp: DistributedDataParallel, optimizer: torch.optim.Optimizer) -> Attachment:
        return Attachment(self, ddp, optimizer)

    def state_dict(self) -> dict[str, Any]:
        """Round and tables: the same on every party."""
        return {
            "round": self.round,
            "space": self.space.digest,
            "settings": repr(self),
            **{k: v.clone() for k, v in self.state.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["space"] != self.space.digest:
            raise ValueError("the state is of a model with other parameters (names, order or shapes differ)")
        refuse_other(state, {"settings": repr(self)})
        self.round = int(state["round"])
        for slot, tables in self.state.items():
            tables.copy_(state[slot])
