"""Cora and Citeseer in the Planetoid files, which are pickles of Python 2 and are read as untrusted input.

Six of the eight files hold a numpy array or a scipy CSR matrix and one a dict of lists. `_Reader` admits the
few names those need and nothing else; a CSR matrix comes in as a bare holder of its attributes, so scipy is
not needed.
"""

from __future__ import annotations

import io
import pickle
from collections import defaultdict
from typing import Any

import numpy as np
import torch

from cograd.data.files import Origin
from cograd.data.kinds import Graph

PARTS = ("x", "y", "tx", "ty", "allx", "ally", "graph", "test.index")
VALIDATION = 500
"""Nodes after the labelled ones that the benchmark validates on."""


class _Csr:
    """Stands in for scipy's csr_matrix: the pickle sets ``data``, ``indices``, ``indptr`` and ``_shape``."""

    data: np.ndarray
    indices: np.ndarray
    indptr: np.ndarray
    _shape: tuple[int, int]

    def dense(self) -> np.ndarray:
        """The matrix in full, float32. Raises ValueError when its parts do not fit together."""
        rows, columns = (int(n) for n in self._shape)
        counts = np.diff(self.indptr)
        if len(counts) != rows or counts.min(initial=0) < 0 or int(counts.sum()) != len(self.indices):
            raise ValueError("the row pointers do not fit the matrix")
        matrix = np.zeros((rows, columns), dtype=np.float32)
        np.add.at(matrix, (np.repeat(np.arange(rows), counts), self.indices), self.data)
        return matrix


_ADMITTED: dict[tuple[str, str], Any] = {
    # numpy's own name of this function moved between versions; an array tells where it is now.
    ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("scipy.sparse.csr", "csr_matrix"): _Csr,
    ("collections", "defaultdict"): defaultdict,
    ("__builtin__", "list"): list,
}


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ADMITTED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"a Planetoid file has no business with {module}.{name}") from None


def planetoid(origin: Origin) -> Graph:
    """The graph with the benchmark's fixed nodes: the labelled ones train, 500 validate, 1,000 test.

    The features are as stored (bag of words, 0 or 1). The test nodes come in a random order in ``tx``; here
    each is at its own index. Citeseer's 15 nodes that no file describes have zero features and class -1.
    """
    x, tx, allx = (_matrix(origin, part) for part in ("x", "tx", "allx"))
    y, ty, ally = (_matrix(origin, part) for part in ("y", "ty", "ally"))
    with origin.reading(f"ind.{origin.name}.test.index") as raw:
        test = np.array(raw.split(), dtype=np.int64)
        if len(test) != len(tx) or len(test) != len(ty) or test.min() < len(allx) or len(ally) != len(allx):
            raise ValueError("the test nodes do not fit the features and classes")
    n = int(test.max()) + 1
    validated = min(len(x) + VALIDATION, len(allx))
    features = np.zeros((n, allx.shape[1]), dtype=np.float32)
    classes = np.full(n, -1, dtype=np.int64)
    features[: len(allx)], features[test] = allx, tx
    classes[: len(allx)], classes[test] = ally.argmax(1), ty.argmax(1)
    return Graph(
        origin.name,
        origin.split,
        origin.digest,
        x=torch.from_numpy(features),
        y=torch.from_numpy(classes),
        edges=_edges(origin, n),
        n_classes=y.shape[1],
        train=torch.arange(len(x)),
        val=torch.arange(len(x), validated),
        test=torch.from_numpy(np.sort(test)),
    )


def _unpickle(raw: bytes) -> Any:
    return _Reader(io.BytesIO(raw), encoding="latin1").load()


def _matrix(origin: Origin, part: str) -> np.ndarray:
    with origin.reading(f"ind.{origin.name}.{part}") as raw:
        value = _unpickle(raw)
        matrix = value.dense() if isinstance(value, _Csr) else value
        if not isinstance(matrix, np.ndarray) or matrix.ndim != 2 or matrix.dtype.kind not in "iuf":
            raise ValueError("it must hold a matrix of numbers")
        return matrix


def _edges(origin: Origin, n: int) -> torch.Tensor:
    with origin.reading(f"ind.{origin.name}.graph") as raw:
        neighbours = _unpickle(raw)
        pairs = np.array([(u, v) for u, near in neighbours.items() for v in near], dtype=np.int64)
        pairs = pairs[pairs[:, 0] != pairs[:, 1]]
        pairs = np.unique(np.concatenate([pairs, pairs[:, ::-1]]), axis=0)
        if pairs.min() < 0 or pairs.max() >= n:
            raise ValueError(f"nodes must be in 0 .. {n - 1}")
    return torch.from_numpy(pairs.T.copy())
