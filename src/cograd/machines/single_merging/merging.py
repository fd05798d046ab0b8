"""What of a model is shared, how nodes are averaged, and the merged model with its BatchNorm statistics.

Three classes of state, as in the official code. *Averaged*: trainable floating parameters. *Re-estimated* for a
merged model, and averaged along in gossip: running means and variances of BatchNorm. *Local*: everything else
(other buffers, integer counters, optimizer state, random numbers).
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cograd.core.ledger import Ledger
from cograd.core.space import ParamSpace, trainable
from cograd.machines.single_merging.mixing import TOLERANCE, Rows

State = Mapping[str, Tensor]
"""A node's shared tensors by name, sharing the storage of its model."""

CALIBRATION_BATCHES = 32


class Diverged(ValueError):
    """A node holds NaN or infinity: averaging would spread it. ``nodes`` are the nodes; nothing has changed."""

    def __init__(self, found: Mapping[int, str], kind: str = "node") -> None:
        self.nodes = sorted(found)
        told = "; ".join(f"{kind} {node}: {found[node]!r} holds NaN or infinity" for node in self.nodes)
        super().__init__(f"cannot average: {told}")


def shared(model: nn.Module) -> dict[str, Tensor]:
    """What of a model travels: trainable parameters and BatchNorm's running statistics, tied tensors once.

    Raises ValueError for a trainable tensor that is not of a real floating type.
    """
    parameters = trainable(model)
    odd = next((name for name, p in parameters.items() if not p.is_floating_point()), None)
    if odd is not None:
        raise ValueError(f"trainable tensors must be floating point; {odd!r} is {parameters[odd].dtype}")
    return {name: p.detach() for name, p in parameters.items()} | statistics(model)


def statistics(model: nn.Module) -> dict[str, Tensor]:
    """The running means and variances of a model's BatchNorm layers."""
    found = {}
    for prefix, layer in _batch_norms(model).items():
        for kind in ("running_mean", "running_var"):
            found[f"{prefix}.{kind}".lstrip(".")] = getattr(layer, kind)
    return found


def check_alike(models: Sequence[nn.Module]) -> ParamSpace:
    """The space of models of one architecture.

    Raises ValueError for fewer than two, for shared tensors that differ in name, shape or dtype, and for
    frozen parameters that differ: those are not averaged.
    """
    if len(models) < 2:
        raise ValueError(f"models must be at least 2 nodes' models; got {len(models)}")
    first = shared(models[0])
    frozen = {n: p for n, p in models[0].named_parameters() if not p.requires_grad}
    for node, model in enumerate(models[1:], 1):
        state = shared(model)
        if [(n, t.shape, t.dtype) for n, t in state.items()] != [
            (n, t.shape, t.dtype) for n, t in first.items()
        ]:
            raise ValueError(f"models must be of one architecture; that of node {node} differs from node 0's")
        for name, parameter in model.named_parameters():
            if name in frozen and not torch.equal(parameter, frozen[name]):
                raise ValueError(
                    f"frozen parameters must be the same on all nodes; {name!r} of node {node} is not"
                )
    return ParamSpace.of(models[0])


def description(model: nn.Module) -> str:
    """What `check_alike` compares, in words: shared tensors by name, type and shape, and frozen parameters by a
    hash of their values."""
    travels = [f"{name} {t.dtype} {tuple(t.shape)}" for name, t in shared(model).items()]
    frozen = [f"{n} {_hash(p.detach())}" for n, p in model.named_parameters() if not p.requires_grad]
    return f"shared {'; '.join(travels)}, frozen {'; '.join(frozen) or 'none'}"


def _hash(tensor: Tensor) -> str:
    values = tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.blake2b(values.tobytes(), digest_size=8).hexdigest()


def check_finite(states: Mapping[int, State]) -> None:
    """Raise `Diverged` naming every node that holds NaN or infinity."""
    found = {node: name for node, state in states.items() if (name := not_finite(state)) is not None}
    if found:
        raise Diverged(found)


def not_finite(state: State) -> str | None:
    """The first tensor that holds NaN or infinity."""
    return next((name for name, t in state.items() if not bool(torch.isfinite(t).all())), None)


def wide(dtype: torch.dtype) -> torch.dtype:
    """What tensors of a dtype are added up in: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


@torch.no_grad()
def combine(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """sum_i weights[i] tensors[i], added in this order in float32 or wider: a new tensor of that type."""
    total = tensors[0].to(wide(tensors[0].dtype)) * weights[0]
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        total.add_(tensor.to(total.dtype), alpha=weight)
    return total


@torch.no_grad()
def average(tensors: Sequence[Tensor], weights: Sequence[float] | None = None) -> Tensor:
    """The mean in float32 or wider, or the weighted sum."""
    return combine(tensors, weights) if weights else combine(tensors, [1.0] * len(tensors)).div_(len(tensors))


@torch.no_grad()
def mix(states: Sequence[State], rows: Rows) -> None:
    """One gossip round: every row is computed from what all nodes held before it, and written after that."""
    mixed = {
        node: {n: combine([states[i][n] for i, _ in row], [w for _, w in row]) for n in states[node]}
        for node, row in rows.items()
    }
    for node, tensors in mixed.items():
        write(states[node], tensors)


@torch.no_grad()
def mix_all(states: Sequence[State]) -> None:
    """A dense round: every node becomes the mean of all."""
    for name in states[0]:
        mean = average([state[name] for state in states])
        for state in states:
            state[name].copy_(mean)


@torch.no_grad()
def write(state: State, tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        state[name].copy_(tensor)


def merge(
    models: Sequence[nn.Module],
    weights: Sequence[float] | None = None,
    recalibrate: Iterable[Any] | None = None,
) -> nn.Module:
    """The average of nodes' models, as a new model; the nodes stay as they are.

    ``weights`` (one a node, >= 0, of sum 1) default to 1/m. BatchNorm's running statistics are averaged too;
    with ``recalibrate``, a loader of inputs or of tuples that begin with them, they are estimated anew (see
    `recalibrated`), without which deep BatchNorm networks drop to chance. Other buffers are the first model's.

    Raises ValueError for fewer than two models, other architectures, bad weights; `Diverged` for NaN.
    """
    check_alike(models)
    if weights is not None:
        _check_simplex(weights, len(models))
    states = [shared(model) for model in models]
    check_finite(dict(enumerate(states)))
    merged = copy.deepcopy(models[0])
    write(shared(merged), {n: average([state[n] for state in states], weights) for n in states[0]})
    if recalibrate is not None:
        recalibrated(merged, recalibrate)
    return merged


@torch.no_grad()
def recalibrated(model: nn.Module, loader: Iterable[Any], batches: int = CALIBRATION_BATCHES) -> int:
    """Estimate BatchNorm statistics anew, in place: the plain mean over at most so many batches.

    Only BatchNorm is in training mode meanwhile, so dropout is off. ``num_batches_tracked`` becomes the number
    of batches, which is returned. A model without BatchNorm is not run. Raises ValueError for an empty loader.
    """
    layers = list(_batch_norms(model).values())
    if not layers:
        return 0
    inputs = islice(loader, batches)
    first = next(inputs, None)
    if first is None:
        raise ValueError(
            "loader must give at least one batch to estimate BatchNorm statistics from; it was empty"
        )
    with _estimating(model, layers):
        for batch in chain([first], inputs):
            model(batch[0] if isinstance(batch, list | tuple) else batch)
        return int(layers[0].num_batches_tracked)  # type: ignore[arg-type]


@contextmanager
def _estimating(model: nn.Module, layers: Sequence[_BatchNorm]) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    momenta = [layer.momentum for layer in layers]
    model.eval()
    for layer in layers:
        layer.train()
        layer.reset_running_stats()
        layer.momentum = None  # a cumulative mean
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum


def _batch_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    layers = {n: m for n, m in model.named_modules() if isinstance(m, _BatchNorm)}
    return {name: layer for name, layer in layers.items() if layer.running_mean is not None}


def _check_simplex(weights: Sequence[float], nodes: int) -> None:
    if len(weights) != nodes:
        raise ValueError(f"weights must be one for each of {nodes} models; got {len(weights)}")
    if not all(0 <= w < math.inf for w in weights) or abs(sum(weights) - 1) > TOLERANCE:
        raise ValueError(f"weights must be >= 0 and sum to 1; got {list(weights)}")


# What a round costs.


def count_pulls(ledger: Ledger, rows: Rows, round: int, size: int) -> None:
    """One message of ``size`` bytes for every peer in an active row."""
    for node, row in rows.items():
        for peer, _ in row[1:]:
            ledger.send(peer, round, size, to=node)


def count_average(ledger: Ledger, members: int, round: int, sizes: Sequence[tuple[int, int]]) -> None:
    """A ring all-reduce of vectors (elements, bytes each): 2 (m - 1) times their bytes over all nodes.

    A node passes on every chunk but one in each half; chunks are of n // m elements, the first n % m of one
    more.
    """
    for node in range(members):
        sent = sum(
            each * (2 * n - sum(n // members + ((node + ahead) % members < n % members) for ahead in (1, 2)))
            for n, each in sizes
        )
        ledger.send(node, round, sent)


def vector_sizes(state: State) -> list[tuple[int, int]]:
    """The vectors that a dense round adds up: elements and bytes each, by the type of the sum."""
    totals: dict[torch.dtype, int] = {}
    for t in state.values():
        totals[wide(t.dtype)] = totals.get(wide(t.dtype), 0) + t.numel()
    return [(n, dtype.itemsize) for dtype, n in totals.items()]


def nbytes(state: State) -> int:
    """Bytes of one model on the wire."""
    return sum(t.numel() * t.element_size() for t in state.values())
