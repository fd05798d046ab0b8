"""FedPer (Arivazhagan et al. 2019, arXiv 1912.00818, algorithms 1 and 2): last layers stay with the clients.

    client: (x, h_i), some epochs of SGD on both parts, keep h_i, send the change of the base x
    server: x <- x + sum_i p_i (change_i),  p_i = n_i / sum n_i

With nothing private it is FedAvg, with everything private it is local training alone. Private normalisation
layers make it FedBN (arXiv 2102.07623).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cograd.clients.baselines.fedavg import FedAvg
from cograd.core.space import ParamSpace, Segment
from cograd.engines.federated.protocol import ClientContext, Content, Session, State


@dataclass
class FedPer(FedAvg):
    """Shared: the change of the base, 4 bytes an entry up, and the base down, a round.

    Args:
        private: what stays with a client: so many layers, counted from the last, or names of layers or tensors
            (``("head", "norm1.weight")``). A layer is a module with parameters of its own.

    Raises ValueError for more layers than there are, and for a name that is none.
    """

    private: int | tuple[str, ...] = 1

    def shared(self, space: ParamSpace) -> ParamSpace:
        mine = _private(space, self.private)
        return ParamSpace({s.name: s.shape for s in space if s.name not in mine} or {"nothing": (0,)})

    def train(self, state: State, content: Content, data: Any, ctx: ClientContext) -> tuple[State, Content]:
        """The client's round; its state is ``h``, its private entries in the model's order."""
        mine = self.entries(ctx.model.space)
        x = content["x"]
        start = ctx.initial.clone()
        start[~mine] = x
        if "h" in state:
            start[mine] = state["h"]
        v = self.fit(ctx, data, start, mine)
        return {**state, "h": v[mine]}, {"delta": v[~mine] - x}

    def fit(self, ctx: ClientContext, data: Any, start: Tensor, mine: Tensor) -> Tensor:
        """The local training of the whole model (numel,) of which ``mine`` (numel,) is private."""
        return self.local.run(ctx, data, start)

    def entries(self, space: ParamSpace) -> Tensor:
        """Which entries of the model are private: bool (numel,)."""
        mine = _private(space, self.private)
        found = torch.zeros(space.numel, dtype=torch.bool)
        for s in space:
            found[s.slice] = s.name in mine
        return found

    def start(self, session: Session) -> State:
        mine = self.entries(session.space)
        return {"round": 0, "x": session.initial[~mine], "start": session.initial.clone(), "mine": mine}

    def model(self, server: State) -> Tensor:
        """The base with the private part from which everybody started."""
        return self.personal(server, {}, 0)

    def personal(self, server: State, client: State, number: int) -> Tensor:
        """The base with the client's own private part."""
        whole: Tensor = server["start"].clone()
        whole[~server["mine"]] = server["x"]
        if "h" in client:
            whole[server["mine"]] = client["h"]
        return whole


def _private(space: ParamSpace, given: int | tuple[str, ...]) -> set[str]:
    """Names of the private tensors."""
    layers: dict[str, list[Segment]] = {}
    for segment in space:
        layers.setdefault(segment.name.rpartition(".")[0], []).append(segment)
    if isinstance(given, int):
        if not 0 <= given <= len(layers):
            raise ValueError(f"private must be in 0 .. {len(layers)} layers; got {given}")
        kept = list(layers.values())[len(layers) - given :]
        return {segment.name for layer in kept for segment in layer}
    found: set[str] = set()
    for name in given:
        named = {s.name for s in space if s.name == name or s.name.startswith(f"{name}.")}
        if not named:
            raise ValueError(
                f"private must name layers or tensors of the model ({', '.join(layers)}); got {name!r}"
            )
        found |= named
    return found
