"""Federated averaging as one would write it in PyTorch alone: what `bench.federated` compares with.

Needs nothing but torch, so that Flower's clients run the same training in an environment of their own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

BATCH, LR = 32, 0.1


def build(name: str) -> nn.Module:
    """``mlp`` has 79,510 parameters; ``cnn``, with two convolutions, 44,426."""
    torch.manual_seed(0)
    if name == "mlp":
        return nn.Sequential(nn.Flatten(), nn.Linear(784, 100), nn.ReLU(), nn.Linear(100, 10))
    return nn.Sequential(
        nn.Conv2d(1, 6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(256, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10),
    )  # fmt: skip


def train(model: nn.Module, x: Tensor, y: Tensor, order: Tensor) -> None:
    """One client's epoch, its examples in this order."""
    optimizer = torch.optim.SGD(model.parameters(), LR)
    for rows in order.split(BATCH):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()


def average(
    model: nn.Module,
    clients: Sequence[tuple[Tensor, Tensor]],
    participants: Sequence[Sequence[int]],
    orders: Sequence[Sequence[Tensor]],
) -> None:
    """Federated averaging of equal clients; ``orders[r][k]`` is that of the k-th participant of round r."""
    parameters = list(model.parameters())
    received = [p.detach().clone() for p in parameters]
    for chosen, order in zip(participants, orders, strict=True):
        total = [torch.zeros_like(x) for x in received]
        for client, rows in zip(chosen, order, strict=True):
            with torch.no_grad():
                for p, x in zip(parameters, received, strict=True):
                    p.copy_(x)
            train(model, *clients[client], rows)
            with torch.no_grad():
                for t, p in zip(total, parameters, strict=True):
                    t.add_(p)
        received = [t / len(chosen) for t in total]
    with torch.no_grad():
        for p, x in zip(parameters, received, strict=True):
            p.copy_(x)
