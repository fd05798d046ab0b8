"""What tests of the federated engine share: small clients, small nets, and what a simulation left."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from cograd.clients import FedSpeed
from cograd.clients.baselines import FedAvg
from cograd.core.codecs import Context, Dense, Encoded, Float32, Layout
from cograd.data.clients import ClientData
from cograd.engines.federated import LocalSGD, Method, Simulation, Uniform

LOCAL = LocalSGD(lr=0.1, epochs=2, batch_size=4)


def clients(n: int = 6, size: int = 10) -> list[ClientData]:
    """Clients of 10, 12, ... examples of 5 features in two classes; 4 of them are also for testing."""
    draws = torch.Generator().manual_seed(0)
    found = []
    for client in range(n):
        x = torch.randn(size + 2 * client, 5, generator=draws) + client / n
        y = (x.sum(1) > client / 2).long()
        found.append(ClientData(x, y, x[:4], y[:4]))
    return found


def net(kind: str = "plain") -> nn.Module:
    torch.manual_seed(1)
    middle = {"plain": [], "norm": [nn.BatchNorm1d(8)], "dropout": [nn.Dropout(0.5)]}[kind]
    return nn.Sequential(nn.Linear(5, 8), *middle, nn.ReLU(), nn.Linear(8, 2))


def simulation(method: Method | None = None, data=None, kind="plain", **options) -> Simulation:
    given = {"sampler": Uniform(0.5), **options}
    method = FedSpeed(LOCAL) if method is None else method
    return Simulation(
        method, net(kind), nn.functional.cross_entropy, clients() if data is None else data, **given
    )


def named(method: Method) -> str:
    return type(method).__name__


def digest(sim: Simulation) -> list[Tensor]:
    """All tensors that a run has left: the server's, and the clients'."""
    states = [sim.server, *(sim.states[client] for client in sim.states)]
    return [t for state in states for _, t in sorted(state.items()) if isinstance(t, Tensor)]


def same(one: Simulation, other: Simulation) -> bool:
    pairs = zip(digest(one), digest(other), strict=True)
    return all(torch.equal(a, b) for a, b in pairs) and one.tally.up == other.tally.up


def history(sim: Simulation) -> list[dict[str, object]]:
    """The rows, without what a clock on the wall says."""
    return [{**vars(row), "seconds": 0} for row in sim.history]


@dataclass
class Faulty(FedAvg):
    """FedAvg whose client 2 does something else in round 1; its clients count their rounds."""

    does: str = "raise"

    def train(self, state, content, data, ctx):
        rounds = state.setdefault("rounds", torch.zeros(1)).add_(1)  # in place, so that a copy is needed
        state, reply = super().train({**state, "rounds": rounds}, content, data, ctx)
        if ctx.client == 2 and ctx.round == 1:
            if self.does == "raise":
                raise RuntimeError("out of paper")
            if self.does == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.does == "shape":
                return state, {"delta": torch.zeros(3)}
            if self.does == "state":
                return {"list": [1]}, reply
            if self.does == "content":
                return state, {"delta": 1.0}
            reply["delta"][3] = float(self.does)
        return state, reply


@dataclass(frozen=True)
class Feedback:
    """A codec that remembers: signs times the mean magnitude, and what is lost is added the next time."""

    inner: Float32 = field(default_factory=Float32)

    def encode(self, x: Tensor, layout: Layout, ctx: Context, state=None) -> Encoded:
        whole = x + (state or {}).get("lost", torch.zeros_like(x))
        kept = whole.sign() * whole.abs().mean()
        coded = self.inner.encode(kept, layout, ctx)
        return Encoded(coded.payload, coded.kept, {"lost": whole - kept})

    def decode(self, payload, layout: Layout, ctx: Context) -> Dense:
        return self.inner.decode(payload, layout, ctx)

    def nbytes(self, layout: Layout) -> int:
        return self.inner.nbytes(layout)
