"""The joint distribution of client, group, label and prediction, from counts that clients send."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

Codes: TypeAlias = Tensor | np.ndarray | Sequence[int]
"""One whole number an example."""

NAMES = {"s": "clients", "z": "groups", "y": "labels", "h": "predictions"}


@dataclass(frozen=True, eq=False)
class ClientJoint:
    """P(s, z, ...): client s, group z of the sensitive attribute, label y, prediction h.

    ``table`` is float64 and sums to 1; its axes are those of ``axes``, which is ``szh`` (disparities), ``szy``
    (the frontier of a data set) or ``szyh`` (both). Labels and predictions have one alphabet. ``count`` is how
    many examples were counted; None for probabilities. `from_predictions` and `merge` make one of data, the
    constructor one of probabilities.

    Raises ValueError for other axes or shapes, and for probabilities that are negative, not finite, or do not
    sum to 1.
    """

    table: np.ndarray
    axes: str = "szh"
    count: int | None = None

    def __post_init__(self) -> None:
        table = np.asarray(self.table, np.float64)
        if self.axes not in ("szh", "szy", "szyh"):
            raise ValueError(f"axes must be 'szh', 'szy' or 'szyh'; got {self.axes!r}")
        if table.ndim != len(self.axes) or min(table.shape) < 1:
            shape = ", ".join(NAMES[axis] for axis in self.axes)
            raise ValueError(f"table must have the shape ({shape}); got {table.shape}")
        if self.axes == "szyh" and table.shape[2] != table.shape[3]:
            raise ValueError(f"labels and predictions must be of one alphabet; got {table.shape[2:]}")
        if not np.isfinite(table).all() or table.min() < 0:
            raise ValueError(
                f"table must hold probabilities, finite and >= 0; got {table.min()} .. {table.max()}"
            )
        if abs(table.sum() - 1) > 1e-9:
            raise ValueError(f"table must sum to 1; got {table.sum():.10g}")
        object.__setattr__(self, "table", table)

    @classmethod
    def from_predictions(
        cls,
        clients: Codes,
        groups: Codes,
        predictions: Codes | None = None,
        labels: Codes | None = None,
        *,
        sizes: tuple[int, int, int] | None = None,
    ) -> ClientJoint:
        """Count examples: the n-th is of client ``clients[n]`` and group ``groups[n]``, is of class
        ``labels[n]`` and predicted to be of class ``predictions[n]``, of which one may be None.

        Codes are 0, 1, ...; ``sizes`` are how many clients, groups and classes there are, without which it is
        one more than the largest code. Raises ValueError for arguments of different lengths or none, and for
        codes that are no whole numbers of that range, TypeError for arguments without numbers.
        """
        given = {"clients": clients, "groups": groups, "labels": labels, "predictions": predictions}
        codes = {name: whole(name, value) for name, value in given.items() if value is not None}
        lengths = {name: len(value) for name, value in codes.items()}
        if len(codes) < 3:
            raise ValueError("predictions or labels must be given; got neither")
        if len(set(lengths.values())) > 1 or not lengths["clients"]:
            raise ValueError(f"arguments must be of one length >= 1; got {lengths}")
        classes = [codes[name] for name in ("labels", "predictions") if name in codes]
        if sizes is None:
            sizes = (
                1 + int(codes["clients"].max()),
                1 + int(codes["groups"].max()),
                1 + max(int(c.max()) for c in classes),
            )
        shape = (sizes[0], sizes[1], *[sizes[2]] * len(classes))
        columns = [codes["clients"], codes["groups"], *classes]
        counts = _counted(columns, shape, tuple(codes))
        axes = "sz" + "y" * ("labels" in codes) + "h" * ("predictions" in codes)
        return cls(counts / counts.sum(), axes, int(counts.sum()))

    @classmethod
    def merge(cls, counts: Sequence[Codes] | Mapping[int, Codes], axes: str | None = None) -> ClientJoint:
        """Join what clients sent: `client_counts` of each, (Z, H) or (Z, Y, H), in the order of the clients or
        by their numbers. ``axes`` tells counts (Z, Y) of labels from those of predictions, which is the
        default. A client weighs as much as it has examples.

        Raises ValueError for counts of different shapes, negative or not whole, or of no example at all.
        """
        arrays = [np.asarray(_numpy(c)) for c in (counts.values() if isinstance(counts, Mapping) else counts)]
        if not arrays or len({a.shape for a in arrays}) > 1 or arrays[0].ndim not in (2, 3):
            shapes = sorted({a.shape for a in arrays})
            raise ValueError(f"counts must be of one shape (groups, [labels,] predictions); got {shapes}")
        table = np.stack(arrays)
        if table.dtype.kind not in "iu" or table.min() < 0:
            raise ValueError(f"counts must be whole numbers >= 0; got {table.dtype}, the least {table.min()}")
        if not table.sum():
            raise ValueError("counts must be of at least one example; all are 0")
        return cls(table / table.sum(), axes or ("szh" if table.ndim == 3 else "szyh"), int(table.sum()))

    @property
    def clients(self) -> int:
        return int(self.table.shape[0])

    @property
    def groups(self) -> int:
        return int(self.table.shape[1])

    @property
    def classes(self) -> int:
        return int(self.table.shape[2])

    def over(self, axes: str) -> np.ndarray:
        """The marginal distribution of some axes, in their order: ``over("szh")``.

        Raises ValueError for an axis that was not counted.
        """
        missing = [NAMES[axis] for axis in axes if axis not in self.axes]
        if missing:
            raise ValueError(f"this needs a joint with {' and '.join(missing)}; got one of {self.axes!r}")
        rest = tuple(i for i, axis in enumerate(self.axes) if axis not in axes)
        kept = [axis for axis in self.axes if axis in axes]
        return np.asarray(self.table.sum(rest).transpose([kept.index(axis) for axis in axes]))

    @property
    def accuracy(self) -> float:
        """The share of predictions that are right."""
        return float(np.trace(self.over("yh")))

    @property
    def counts(self) -> np.ndarray:
        """The table as whole numbers. Raises ValueError for a joint that was not counted."""
        if self.count is None:
            raise ValueError("this needs a joint of counted examples; got probabilities")
        return np.asarray(np.rint(self.table * self.count).astype(np.int64))

    def __repr__(self) -> str:
        shape = " x ".join(f"{n} {NAMES[axis]}" for n, axis in zip(self.table.shape, self.axes, strict=True))
        return f"ClientJoint({shape}{'' if self.count is None else f', {self.count} examples'})"


def client_counts(
    groups: Codes,
    predictions: Codes,
    labels: Codes | None = None,
    *,
    sizes: tuple[int, int],
) -> Tensor:
    """What one client sends: how many of its examples there are of each group and prediction, int64 (Z, H), or
    of each group, label and prediction (Z, Y, H). ``sizes`` are the numbers of groups and of classes.

    For two groups and two classes that is 4 integers (32 bytes), with labels 8 (64 bytes). Raises as
    `ClientJoint.from_predictions`.
    """
    given = {"groups": groups, "labels": labels, "predictions": predictions}
    codes = {name: whole(name, value) for name, value in given.items() if value is not None}
    if len({len(value) for value in codes.values()}) > 1:
        raise ValueError(f"arguments must be of one length; got { ({n: len(v) for n, v in codes.items()}) }")
    shape = (sizes[0], *[sizes[1]] * (len(codes) - 1))
    return torch.from_numpy(_counted(list(codes.values()), shape, tuple(codes)))


def _counted(columns: Sequence[np.ndarray], shape: tuple[int, ...], names: Sequence[str]) -> np.ndarray:
    for name, column, size in zip(names, columns, shape, strict=True):
        if len(column) and not 0 <= column.min() <= column.max() < size:
            raise ValueError(f"{name} must be codes of 0 .. {size - 1}; got {column.min()} .. {column.max()}")
    flat = np.ravel_multi_index(tuple(columns), shape)
    return np.asarray(np.bincount(flat, minlength=math.prod(shape)).reshape(shape))


def _numpy(values: Any) -> Any:
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else values


def whole(name: str, values: Codes) -> np.ndarray:
    """Codes as int64. Raises TypeError where they are no numbers, ValueError where not whole or not 1-D."""
    array = np.asarray(_numpy(values))
    if array.ndim != 1:
        raise ValueError(f"{name} must be 1-D, one code an example; got shape {array.shape}")
    if array.dtype.kind not in "biuf":
        raise TypeError(f"{name} must hold whole numbers; got {array.dtype}")
    if array.dtype.kind == "f" and not (np.isfinite(array).all() and (array == np.rint(array)).all()):
        raise ValueError(f"{name} must hold whole numbers; got {array[array != np.rint(array)][:3].tolist()}")
    return array.astype(np.int64)
