"""Many vectors made into one, by weights that depend on their inner products alone.

Principal-gradient aggregation, separately for every entry (tensor of the model) of d numbers, with the K
changes delta_i as rows of D (K, d):

    H = D D^T / K = E diag(lambda_1 >= ... >= lambda_K) E^T
    u_j = D^T e_j                         principal directions; |u_j|^2 = K lambda_j
    delta_i' = sum_{j <= k} sign(delta_i . u_j) (lambda_j / sum lambda) |delta_i| u_j / |u_j|
    delta = mean of delta_i'

Each change is turned into the k leading directions, in each of which it keeps its length times the direction's
share of the energy. That |delta| <= max |delta_i| is therefore a bound which is met only if all agree: the step
shrinks where they do not.

The release projects delta_i on u_j and scales the projection so; its length cancels, and its sign is what is
left. It also turns each u_j to the side of the majority, which cancels too. `PrincipalGradient.directions` does
so, where directions are looked at.

As u_j is a combination of the rows, so is delta. Its weights are had from D D^T alone: nothing of the model's
size is made but that matrix's products and the result, and the eigenproblems of all entries are one batch.

Where this differs from the release, which divides by what may be zero: an entry that nobody changed stays; a
direction without length is left out, whose weight would be nothing; a change at right angles to a direction has
sign 0; one client's change is taken as it is, however small k.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import overload

import torch
from torch import Tensor

from cograd.core.checks import check
from cograd.core.streams import Stream, stream
from cograd.engines.federated.protocol import Content, all_finite, mean_of, sum_of

BUFFERS = ("mean", "principal")
RESCALES = (None, "mean_norm")

RANK = 1e-12
"""Directions whose energy is not above this times the leading one's have no length: rounding, in rows that
depend on one another."""
ANGLE = 1e-6
"""Cosines up to this are those of a right angle: what float32 leaves of one."""

_COLUMNS = 1 << 16
"""Columns of all rows that are in double precision at a time."""


@dataclass(frozen=True)
class GramRule(ABC):
    """A rule that makes one vector of K by weights that depend on their inner products: say `weights`.

    Call it with a matrix (K, P), one entry, whose rows are anything that is to be combined: changes of clients,
    gradients of tasks or machines. Or with a list of K dicts of tensors of the same names and shapes, each name
    being an entry. The result is a vector (P,), or a dict. Inner products are summed in double precision.

    Entries of one number are averaged, and so are tensors that are not floating, and rounded.

    Args:
        layerwise: each entry has weights of its own; otherwise all are one long vector.
        buffers: what becomes of floating buffers: the ``mean``, or the rule as for all else, ``principal``. The
            rule has no respect for signs: a variance may become negative by it.
    """

    layerwise: bool = field(default=True, kw_only=True)
    buffers: str = field(default="mean", kw_only=True)

    def __post_init__(self) -> None:
        check(("buffers", self.buffers, f"one of {', '.join(BUFFERS)}", self.buffers in BUFFERS))

    @abstractmethod
    def weights(self, grams: Tensor, draws: Stream) -> Tensor:
        """Weights (L, K) of the rows, from inner products (L, K, K), both float64, one matrix an entry.

        ``draws`` are random numbers, for rules that need some.
        """

    @overload
    def __call__(
        self, deltas: Tensor, buffers: Collection[str] = (), draws: Stream | None = None
    ) -> Tensor: ...

    @overload
    def __call__(
        self,
        deltas: Sequence[Mapping[str, Tensor]],
        buffers: Collection[str] = (),
        draws: Stream | None = None,
    ) -> Content: ...

    def __call__(
        self,
        deltas: Tensor | Sequence[Mapping[str, Tensor]],
        buffers: Collection[str] = (),
        draws: Stream | None = None,
    ) -> Tensor | Content:
        """Combine a matrix (K, P) or dicts. ``buffers`` names entries of dicts that are buffers.

        Raises ValueError for no rows, rows of other names, shapes or dtypes, values that are not finite (naming
        the client), names in ``buffers`` that are none, and a matrix that is not one of floats.
        """
        if isinstance(deltas, Tensor):
            return self.combine(_rows(deltas), (), draws)["deltas"]
        return self.combine(deltas, buffers if self.buffers == "mean" else (), draws)

    @torch.no_grad()
    def combine(
        self, deltas: Sequence[Mapping[str, Tensor]], averaged: Collection[str], draws: Stream | None = None
    ) -> Content:
        """The dicts, combined; entries in ``averaged`` by their mean whatever the rule."""
        first = _alike(deltas, averaged)
        rows = {client: dict(delta) for client, delta in enumerate(deltas)}
        names = [n for n, t in first.items() if n not in averaged and t.is_floating_point()]
        if self.layerwise:
            names = [name for name in names if first[name].numel() > 1]
        elif sum(first[name].numel() for name in names) == 1:
            names = []
        weights = self._weights(rows, names, stream(0, "combining") if draws is None else draws)
        return {
            name: sum_of(rows, name, dict(enumerate(weights[name]))) if name in weights else _mean(rows, name)
            for name in first
        }

    def _weights(
        self, rows: Mapping[int, Content], names: Sequence[str], draws: Stream
    ) -> dict[str, list[float]]:
        if not names:
            return {}
        grams = torch.stack([gram([row[name] for row in rows.values()]) for name in names])
        if not self.layerwise:
            grams = grams.sum(0, keepdim=True)
        found = self.weights(grams, draws)
        return dict(zip(names, found.expand(len(names), -1).tolist(), strict=True))


@dataclass(frozen=True)
class PrincipalGradient(GramRule):
    """FedLD's rule at the server. Weights are not unique where energies of directions are equal.

    Args:
        k: share of the directions that are kept, floor(k K) of them, in (0, 1]; all of them is not the mean.
        min_directions: at least so many, where there are so many.
        rescale: ``mean_norm`` gives the result the length of the plain mean, which is no part of the paper;
            None leaves it.
    """

    k: float = 0.8
    min_directions: int = 1
    rescale: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            ("k", self.k, "in (0, 1]", 0 < self.k <= 1),
            ("min_directions", self.min_directions, ">= 1", self.min_directions >= 1),
            ("rescale", self.rescale, "None or 'mean_norm'", self.rescale in RESCALES),
        )

    def count(self, rows: int) -> int:
        """Directions that are kept of ``rows`` changes."""
        return min(rows, max(self.min_directions, int(self.k * rows + 1e-9)))

    def weights(self, grams: Tensor, draws: Stream) -> Tensor:
        energy, e, lengths = self._principal(grams)
        rows = grams.shape[-1]
        norms = grams.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()
        reach = e * lengths[:, None]  # delta_i . u_j / |u_j|
        signs = torch.where(reach.abs() > ANGLE * norms[..., None], reach.sign(), 0.0)
        steps = (signs * norms[..., None]).mean(1) * energy  # along the unit direction
        weights = (e * (steps / lengths.masked_fill(lengths == 0, 1))[:, None]).sum(-1)
        if self.rescale is not None:
            mean = torch.full_like(weights, 1 / rows)
            ratio = _length(mean, grams) / _length(weights, grams)
            weights = weights * torch.where(ratio.isfinite(), ratio, 1.0)[:, None]
        return torch.where((norms == 0).all(-1, keepdim=True), 1 / rows, weights)

    @torch.no_grad()
    def directions(self, deltas: Tensor) -> Directions:
        """The directions that are kept of a matrix (K, P), each on the side of the majority of its rows."""
        _alike(_rows(deltas), ())
        energy, e, lengths = (t[0] for t in self._principal(gram(list(deltas))[None]))
        kept = lengths > 0
        e = e[:, kept]
        e = torch.where((e >= 0).sum(0) < (e < 0).sum(0), -e, e)  # delta_i . u_j has the sign of e_j[i]
        units = (e / lengths[kept]).T.to(deltas) @ deltas
        return Directions(energy[kept], units)

    def _principal(self, grams: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of the leading directions: shares of the energy (L, k), eigenvectors (L, K, k), |u_j| (L, k)."""
        k = self.count(grams.shape[-1])
        values, e = torch.linalg.eigh(grams)  # K lambda_j, ascending
        values, e = values.flip(-1)[:, :k], e.flip(-1)[..., :k]
        values = torch.where(values > RANK * values[:, :1], values, 0.0)
        total = grams.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True)
        return values / total.masked_fill(total == 0, 1), e, values.sqrt()


@dataclass(frozen=True, eq=False)
class Directions:
    """Principal directions, leading one first: shares ``energy`` (k,) of all energy, float64, and vectors
    ``units`` (k, P) of length 1."""

    energy: Tensor
    units: Tensor


def gram(rows: Sequence[Tensor]) -> Tensor:
    """Inner products (K, K) of K tensors of one shape, float64, on the CPU."""
    total = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=rows[0].device)
    for parts in zip(*(row.reshape(-1).split(_COLUMNS) for row in rows), strict=True):
        block = torch.stack(parts).double()
        total.addmm_(block, block.T)
    return total.cpu()


def _length(weights: Tensor, grams: Tensor) -> Tensor:
    """Lengths (L,) of the rows' combinations."""
    return torch.einsum("li,lij,lj->l", weights, grams, weights).clamp_min(0).sqrt()


def _mean(rows: Mapping[int, Content], name: str) -> Tensor:
    dtype = rows[0][name].dtype
    if dtype.is_floating_point:
        return mean_of(rows, name)
    return mean_of({client: {name: row[name].double()} for client, row in rows.items()}, name).round().to(dtype)


def _rows(deltas: Tensor) -> list[Content]:
    if deltas.ndim != 2 or not deltas.is_floating_point():
        raise ValueError(f"deltas must be floats (K, P); got {deltas.dtype} of shape {tuple(deltas.shape)}")
    return [{"deltas": row} for row in deltas]


def _alike(deltas: Sequence[Mapping[str, Tensor]], averaged: Collection[str]) -> Mapping[str, Tensor]:
    """The first of dicts that are of one kind and finite."""
    if not len(deltas):
        raise ValueError("deltas must be of at least one client; got none")
    first = deltas[0]
    kinds = {name: (tuple(t.shape), t.dtype) for name, t in first.items()}
    for client, delta in enumerate(deltas):
        found = {name: (tuple(t.shape), t.dtype) for name, t in delta.items()}
        other = next((n for n in [*kinds, *found] if kinds.get(n) != found.get(n)), None)
        if other is not None:
            raise ValueError(
                f"deltas must hold the same tensors; {other!r} of client {client} is "
                f"{found.get(other, 'missing')}, that of client 0 {kinds.get(other, 'missing')}"
            )
        if not all_finite(dict(delta)):
            name = next(n for n, t in delta.items() if not bool(t.isfinite().all()))
            raise ValueError(f"deltas must be finite; {name!r} of client {client} holds NaN or infinity")
    unknown = next((name for name in averaged if name not in kinds), None)
    if unknown is not None:
        raise ValueError(f"buffers must name entries ({', '.join(kinds)}); got {unknown!r}")
    return first
