"""The three parts of the global loss, measured (see `cograd.clients.fedld`)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cograd.data.clients import ClientData
from cograd.engines.federated.local import Loss

Batches = Iterable[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class LossParts:
    """``local``: of local models on their own data; ``shift``: what they lose on all others' data; and
    ``aggregation``: what the aggregated model has more than they have there."""

    local: float
    shift: float
    aggregation: float

    @property
    def total(self) -> float:
        """The global loss of the aggregated model."""
        return self.local + self.shift + self.aggregation


def loss_parts(of_local: Tensor, of_global: Tensor, sizes: Sequence[float]) -> LossParts:
    """The parts, from mean losses on each client's data.

    Args:
        of_local: (K, K), at [i, j] the loss of local model i on the data of client j.
        of_global: (K,), that of the aggregated model.
        sizes: examples of each client.

    Raises ValueError for other shapes, and for sizes that are not all positive.
    """
    clients = len(sizes)
    if of_local.shape != (clients, clients) or of_global.shape != (clients,):
        raise ValueError(
            f"losses must have shapes {(clients, clients)} and {(clients,)}, as there are {clients} sizes; "
            f"got {tuple(of_local.shape)} and {tuple(of_global.shape)}"
        )
    if not all(n > 0 for n in sizes):
        raise ValueError(f"sizes must be > 0; got {list(sizes)}")
    p = torch.tensor(sizes, dtype=torch.float64)
    p /= p.sum()
    everywhere = of_local.double() @ p
    local = p @ of_local.double().diagonal()
    merged = of_global.double() @ p
    return LossParts(float(local), float(p @ everywhere - local), float(merged - p @ everywhere))


@torch.no_grad()
def loss_decomposition(
    global_model: nn.Module,
    local_models: Sequence[nn.Module],
    clients: Sequence[Batches | ClientData],
    loss: Loss,
) -> LossParts:
    """The parts of a round: ``local_models[i]`` is what client i trained, ``clients[i]`` its data.

    Data are iterables of minibatches (inputs, targets), such as a DataLoader, each gone through once; or what
    `Clients` holds. ``loss`` is the mean over a minibatch. Models are evaluated, and left in the mode in which
    they were. It takes K (K + 1) passes over a client's data, and somebody who may see all of them: it is a
    measurement and no part of the training.

    Raises ValueError for another number of models than clients, and for a client without data.
    """
    if len(local_models) != len(clients):
        raise ValueError(f"local_models must be {len(clients)}, as clients are; got {len(local_models)}")
    models = [*local_models, global_model]
    sums, sizes = torch.zeros(len(models), len(clients), dtype=torch.float64), [0] * len(clients)
    with ExitStack() as stack:
        for model in models:
            stack.enter_context(_evaluated(model))
        for client, held in enumerate(clients):
            for x, y in [(held.x, held.y)] if isinstance(held, ClientData) else held:
                sizes[client] += len(y)
                for i, model in enumerate(models):
                    sums[i, client] += float(loss(model(x), y)) * len(y)
    empty = next((client for client, n in enumerate(sizes) if not n), None)
    if empty is not None:
        raise ValueError(f"clients must hold at least one example each; client {empty} holds none")
    means = sums / torch.tensor(sizes)
    return loss_parts(means[:-1], means[-1], sizes)


@contextmanager
def _evaluated(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
