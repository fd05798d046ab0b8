"""How a data set is split among parties, and how far apart the split sets them.

A partition is a pure function of its arguments: it draws from ``stream(seed, "partition", ...)``, so every
party can compute it and find its own part.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cograd.core.streams import Stream, stream

ATTEMPTS = 1000
"""Draws of an unequal Dirichlet split before `dirichlet` gives up on its ``min_size``."""

_FITTING_ROUNDS = 1000
_ROWS_SHOWN = 20
_CLASSES_SHOWN = 12


@dataclass(frozen=True, eq=False)
class Partition:
    """Who holds what: ``parts[k]`` are the row indices of party ``k`` (int64, ascending), each row once.

    ``rule`` says how it was made, and ``names[k]`` what party ``k`` is called.
    """

    parts: tuple[Tensor, ...]
    rule: str
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.parts)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Rows of each party."""
        return tuple(len(part) for part in self.parts)

    def report(self, labels: Tensor) -> Heterogeneity:
        """How the parties' classes differ, by the labels (1-D, integer) of the rows that were split.

        Raises TypeError or ValueError for other labels, or fewer of them than the rows that are held.
        """
        classes, codes = _classes(labels)
        last = max((int(part[-1]) for part in self.parts if len(part)), default=-1)
        if last >= len(codes):
            raise ValueError(f"labels must cover row {last}, which a party holds; got {len(codes)} labels")
        histogram = torch.stack([codes[part].bincount(minlength=len(classes)) for part in self.parts])
        return _heterogeneity(self, classes, histogram)


@dataclass(frozen=True, eq=False)
class Heterogeneity:
    """How far the parties' class mixes are from the mix of all they hold together.

    ``histogram`` is parties x classes (int64). The means are over the parties that hold anything, each
    counting once: ``total_variation`` in 0 .. 1 and ``jensen_shannon`` in bits, 0 .. 1. ``effective_classes``
    (parties, float64) is exp of the entropy of a party's mix: 1 for one class, and 0 for an empty party.
    """

    rule: str
    names: tuple[str, ...]
    classes: tuple[int, ...]
    sizes: tuple[int, ...]
    histogram: Tensor
    total_variation: float
    jensen_shannon: float
    effective_classes: Tensor

    def __str__(self) -> str:
        held = [k for k, size in enumerate(self.sizes) if size]
        mean = float(self.effective_classes[held].mean()) if held else 0.0
        lines = [
            f"{self.rule}: {len(self.sizes)} parties of {min(self.sizes)} to {max(self.sizes)} rows",
            f"to the global mix: total variation {self.total_variation:.3f}, "
            f"Jensen-Shannon {self.jensen_shannon:.3f} bits; {mean:.1f} effective classes a party "
            f"of {len(self.classes)}",
        ]
        shown = self.classes if len(self.classes) <= _CLASSES_SHOWN else ()
        names = [name if len(name) <= 24 else f"{name[:21]}..." for name in self.names[:_ROWS_SHOWN]]
        width = max(5, *map(len, names))
        cell = max(5, len(str(max(self.sizes))), *(len(str(label)) for label in shown)) + 1
        heads = "".join(f"{label:>{cell}}" for label in shown)
        lines.append(f"{'party':<{width}} {'rows':>{cell}} {'eff.':>6}{heads}")
        for k, name in enumerate(names):
            counts = "".join(f"{count:>{cell}}" for count in self.histogram[k].tolist()) if shown else ""
            lines.append(
                f"{name:<{width}} {self.sizes[k]:>{cell}} {float(self.effective_classes[k]):>6.1f}{counts}"
            )
        if len(self.sizes) > _ROWS_SHOWN:
            lines.append(f"... {len(self.sizes) - _ROWS_SHOWN} more")
        return "\n".join(lines)


def iid(n: int, parties: int, seed: int) -> Partition:
    """Rows 0 .. n - 1 dealt at random; sizes differ by at most one, and the first parties get the extra rows.

    Raises TypeError or ValueError unless n >= 1 and parties is in 1 .. n.
    """
    _whole("n", n, 1)
    _whole("parties", parties, 1, n)
    order = stream(seed, "partition", "iid").permutation(n)
    return _partition(order.tensor_split(parties), f"iid(seed={seed})")


def dirichlet(
    labels: Tensor, parties: int, alpha: float, seed: int, *, equal: bool = True, min_size: int = 1
) -> Partition:
    """Class mixes drawn from a symmetric Dirichlet distribution, with ``alpha`` for each of its entries.

    With ``equal``, a party has n // parties rows, and the first n % parties have one more; every row is
    held. Each party's class mix is drawn from Dir(alpha) over the classes. Such mixes together ask for more
    of some classes than there is, so the counts are the matrix nearest to them (in relative entropy, by
    iterative proportional fitting) whose sums are the parties' sizes and the classes' sizes, rounded. Where
    alpha is so small that a mix is one class, parties that drew the same class share what there is of it.

    Without it, each class is divided among the parties by one draw of Dir(alpha) over the parties (the
    classical split), and all draws are repeated until every party has at least ``min_size`` rows.

    Raises TypeError or ValueError unless labels are 1-D and integer, parties is in 1 .. n, alpha is positive
    and finite and parties * min_size <= n; and ValueError when `ATTEMPTS` draws all leave a party short.
    """
    classes, codes = _classes(labels)
    n = len(codes)
    _whole("parties", parties, 1, n)
    _whole("min_size", min_size, 0, n // parties)
    if isinstance(alpha, bool) or not isinstance(alpha, int | float):
        raise TypeError(f"alpha must be a number; got {alpha!r} of type {type(alpha).__name__}")
    if not 0 < alpha < math.inf:
        raise ValueError(f"alpha must be positive and finite; got {alpha}")
    draws = stream(seed, "partition", "dirichlet", "equal" if equal else "unequal")
    totals = codes.bincount(minlength=len(classes)).numpy()
    if equal:
        counts = _equal_counts(draws, totals, parties, alpha)
    else:
        counts = _unequal_counts(draws, totals, parties, alpha, min_size)
    parts: list[list[Tensor]] = [[] for _ in range(parties)]
    for label in range(len(classes)):
        rows = (codes == label).nonzero()[:, 0]
        rows = rows[draws.permutation(len(rows))]
        cuts = counts[:, label].cumsum()[:-1].tolist()
        for party, piece in zip(parts, rows.tensor_split(cuts), strict=True):
            party.append(piece)
    rule = f"dirichlet(alpha={alpha:g}, {'equal' if equal else 'unequal'} sizes, seed={seed})"
    return _partition([torch.cat(part) for part in parts], rule)


def shards(labels: Tensor, parties: int, shards_per_party: int, seed: int) -> Partition:
    """Rows sorted by label, cut into parties * shards_per_party runs, and so many runs dealt to each party.

    The pathological split of McMahan et al. (2017, arXiv 1602.05629, section 3): few classes a party. Runs
    differ in length by at most one; which rows of a class share a run is random.

    Raises TypeError or ValueError unless labels are 1-D and integer, both counts are at least 1 and there
    are at most n shards.
    """
    _, codes = _classes(labels)
    n = len(codes)
    _whole("parties", parties, 1, n)
    _whole("shards_per_party", shards_per_party, 1, n // parties)
    draws = stream(seed, "partition", "shards")
    order = draws.permutation(n)
    runs = order[codes[order].sort(stable=True).indices].tensor_split(parties * shards_per_party)
    dealt = draws.permutation(len(runs)).view(parties, shards_per_party).tolist()
    return _partition(
        [torch.cat([runs[run] for run in hand]) for hand in dealt],
        f"shards(shards_per_party={shards_per_party}, seed={seed})",
    )


def by_source(sources: Sequence[str | int] | Tensor, parties: int | None = None) -> Partition:
    """One party for each source, in sorted order; or the sources grouped into so many parties.

    Grouped, each source in turn, the largest first, joins the party with the fewest rows. Nothing is drawn.
    ``sources[i]`` is where row ``i`` comes from: a genre, a writer, a site.

    Raises ValueError for no rows, or unless parties is in 1 .. the number of sources.
    """
    rows: dict[Any, list[int]] = {}  # str or int: mypy has no word for "all one or all the other"
    for i, source in enumerate(sources.tolist() if isinstance(sources, Tensor) else sources):
        rows.setdefault(source, []).append(i)
    if not rows:
        raise ValueError("sources must name the source of at least one row; got none")
    groups = [[source] for source in sorted(rows)]
    if parties is not None:
        _whole("parties", parties, 1, len(rows))
        by_size = sorted(sorted(rows), key=lambda source: len(rows[source]), reverse=True)
        groups, held = [[] for _ in range(parties)], [0] * parties
        for source in by_size:
            smallest = held.index(min(held))
            groups[smallest].append(source)
            held[smallest] += len(rows[source])
    return _partition(
        [torch.tensor([i for source in group for i in rows[source]]) for group in groups],
        f"by_source({len(rows)} sources)",
        tuple("+".join(map(str, group)) for group in groups),
    )


def batches(n: int, batch_size: int, seed: int, epoch: int, *, drop_last: bool = True) -> Iterator[Tensor]:
    """An epoch's shuffled mini-batches of rows 0 .. n - 1: index tensors (int64) of ``batch_size`` each.

    A pure function of its arguments; a party with rows ``part`` indexes ``part[batch]`` and gives a seed of
    its own. The last n % batch_size rows are left out, or with ``drop_last=False`` make a smaller batch.

    Raises TypeError or ValueError unless n >= 1, epoch >= 0, batch_size >= 1 and, with drop_last, <= n.
    """
    _whole("n", n, 1)
    _whole("batch_size", batch_size, 1, n if drop_last else None)
    _whole("epoch", epoch, 0)
    order = stream(seed, "batches", epoch).permutation(n)
    stop = n - n % batch_size if drop_last else n
    return (order[start : start + batch_size] for start in range(0, stop, batch_size))


def _partition(parts: Sequence[Tensor], rule: str, names: tuple[str, ...] | None = None) -> Partition:
    ascending = tuple(part.sort().values for part in parts)
    return Partition(ascending, rule, names or tuple(map(str, range(len(ascending)))))


def _whole(name: str, value: int, low: int, high: int | None = None) -> None:
    """Refuse what is not an int of low .. high."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int; got {value!r} of type {type(value).__name__}")
    if value < low or (high is not None and value > high):
        allowed = f"at least {low}" if high is None else f"in {low} .. {high}"
        raise ValueError(f"{name} must be {allowed}; got {value}")


def _classes(labels: Tensor) -> tuple[tuple[int, ...], Tensor]:
    """The distinct labels, ascending, and for each row the index of its label among them."""
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels must be a tensor; got {type(labels).__name__}")
    if labels.dtype == torch.bool or labels.is_floating_point() or labels.is_complex():
        raise TypeError(f"labels must be of an integer type; got {labels.dtype}")
    if labels.ndim != 1 or len(labels) == 0:
        raise ValueError(f"labels must be 1-D and not empty; got shape {tuple(labels.shape)}")
    classes, codes = np.unique(labels.cpu().numpy(), return_inverse=True)
    return tuple(classes.tolist()), torch.from_numpy(codes.astype(np.int64))


def _equal_counts(draws: Stream, totals: np.ndarray, parties: int, alpha: float) -> np.ndarray:
    """Rows of each class for each party (parties x classes), with equal party sizes and all rows dealt."""
    n = int(totals.sum())
    sizes = np.array([n // parties + (party < n % parties) for party in range(parties)])
    mixes = np.stack([draws.dirichlet(alpha, len(totals)) for _ in range(parties)])
    return _rounded(_fitted(mixes, sizes, totals), sizes, totals)


def _fitted(matrix: np.ndarray, row_sums: np.ndarray, column_sums: np.ndarray) -> np.ndarray:
    """The matrix scaled by rows and columns until its sums are those given, or nearly and none above.

    Its zeros become tiny: for a very small alpha the drawn classes alone may not be able to fill the sums.
    """
    matrix = np.maximum(matrix, 1e-12)
    for _ in range(_FITTING_ROUNDS):
        matrix *= (row_sums / matrix.sum(1))[:, None]
        matrix *= column_sums / matrix.sum(0)
        if np.abs(matrix.sum(1) - row_sums).max() < 1e-3:
            break
    matrix *= np.minimum(1, row_sums / matrix.sum(1))[:, None]
    return matrix


def _rounded(matrix: np.ndarray, row_sums: np.ndarray, column_sums: np.ndarray) -> np.ndarray:
    """Whole numbers near the matrix with exactly these sums; the matrix's own must not be above them.

    Rounded down first. What rows and columns then lack is one total, and is given where the fraction cut off
    was largest, one at a time, and at last wherever a row and a column both still lack.
    """
    counts = np.floor(matrix + 1e-9).astype(np.int64)
    rows, columns = row_sums - counts.sum(1), column_sums - counts.sum(0)
    largest_first = np.argsort(counts - matrix, axis=None, kind="stable")
    for step in (1, int(row_sums.max())):
        for cell in largest_first.tolist():
            row, column = divmod(cell, len(column_sums))
            given = min(step, rows[row], columns[column])
            counts[row, column] += given
            rows[row] -= given
            columns[column] -= given
    return counts


def _unequal_counts(draws: Stream, totals: np.ndarray, parties: int, alpha: float, min_size: int) -> np.ndarray:
    """Rows of each class for each party (parties x classes), each class divided by its own draw."""
    counts: np.ndarray
    for _ in range(ATTEMPTS):
        shares = np.stack([draws.dirichlet(alpha, parties) for _ in totals], axis=1)
        # Cutting at rounded cumulative shares keeps every class's sum; the last cut is pinned against
        # float error in the sum of the shares.
        cuts = np.rint(np.cumsum(shares, axis=0) * totals).astype(np.int64)
        cuts[-1] = totals
        counts = np.diff(cuts, axis=0, prepend=0)
        if int(counts.sum(1).min()) >= min_size:
            return counts
    raise ValueError(
        f"min_size must be one that alpha can give: in {ATTEMPTS} draws with alpha={alpha:g} some of the "
        f"{parties} parties always had fewer than {min_size} rows; raise alpha, lower it or use equal=True"
    )


def _heterogeneity(partition: Partition, classes: tuple[int, ...], histogram: Tensor) -> Heterogeneity:
    counts = histogram.double()
    everyone = counts.sum(0) / counts.sum().clamp_min(1)
    mixes = counts / counts.sum(1, keepdim=True).clamp_min(1)
    held = histogram.sum(1) > 0
    middle = (mixes + everyone) / 2
    shannon = _entropy(middle) - (_entropy(mixes) + _entropy(everyone)) / 2
    variation = (mixes - everyone).abs().sum(1) / 2
    some = bool(held.any())
    return Heterogeneity(
        rule=partition.rule,
        names=partition.names,
        classes=classes,
        sizes=partition.sizes,
        histogram=histogram,
        total_variation=float(variation[held].mean()) if some else 0.0,
        jensen_shannon=max(0.0, float(shannon[held].mean()) / math.log(2)) if some else 0.0,
        effective_classes=torch.where(held, _entropy(mixes).exp(), 0.0),
    )


def _entropy(mixes: Tensor) -> Tensor:
    """Entropy of the last dimension, in nats."""
    nats: Tensor = torch.special.entr(mixes).sum(-1)
    return nats
