"""Clients that disagree: client i wants the model to be c_i, L_i = |x - c_i|^2 / 2."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cograd.core.codecs import Float64
from cograd.core.streams import stream
from cograd.data.clients import ClientData
from cograd.engines.federated import Method, Row, Simulation

DIM = 3


class Point(nn.Module):
    """A model whose output for any input is its parameter."""

    def __init__(self, start: Tensor | None = None) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.zeros(DIM, dtype=torch.float64) if start is None else start.clone())

    def forward(self, inputs: Tensor) -> Tensor:
        return self.x.expand(len(inputs), -1)


def half_square(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().sum(-1).mean() / 2


def centres(clients: int, seed: int = 0) -> Tensor:
    return 2 * stream(seed, "centres").normal(clients, DIM).double()


def clients_at(centres: Tensor, copies: Sequence[int] | None = None) -> list[ClientData]:
    """One client a centre, which it holds once or as often as ``copies`` says."""
    empty = torch.zeros(0, DIM, dtype=torch.float64)
    counts = copies or [1] * len(centres)
    held = [c.expand(n, -1) for c, n in zip(centres, counts, strict=True)]
    return [ClientData(torch.zeros(len(y), 1), y, empty, empty) for y in held]


def simulation(
    method: Method, clients: Sequence[ClientData], *, start: Tensor | None = None, **options: Any
) -> Simulation:
    codecs = {"up": Float64(), "down": Float64()}
    return Simulation(method, Point(start), half_square, clients, **{**codecs, **options})


def trajectory(method: Method, clients: Sequence[ClientData], rounds: int, **options: Any) -> Tensor:
    """The model after every round (rounds, DIM)."""
    sim = simulation(method, clients, **options)
    return torch.stack([sim.method.model(sim.server).clone() for _ in sim.rounds(rounds)])


def until(
    method: Method, clients: Sequence[ClientData], time: float, **options: Any
) -> tuple[Simulation, list[Row], Tensor]:
    """A run up to a time: the simulation, its rows, the model after every round."""
    sim = simulation(method, clients, **options)
    rows, models = [], []
    for row in sim.until(time):
        rows.append(row)
        models.append(sim.method.model(sim.server).clone())
    return sim, rows, torch.stack(models)
