"""Dropping the slowest workers: what is done without a code, and what it costs in exactness.

Every worker has one chunk, and a round ends when all but s results are there; their sum is scaled up by
n / (results). Chen et al. (2016, arXiv:1604.00981) call the spare workers backups. The gradient is that of a
part of the data, which changes from round to round and leaves out the slow workers' share.
"""

from __future__ import annotations

import numpy as np

from cograd.machines.gradient_coding.codes import Code, Mask, Vector
from cograd.machines.gradient_coding.schemes import GC, Scheme


class Scaling(Code):
    """No code: chunk i on worker i; the "decoded" sum is an estimate from n - s chunks or more."""

    def assignment(self, worker: int) -> tuple[int, ...]:
        return (worker,)

    def tolerates(self, missing: Mask) -> bool:
        return int(missing.sum()) <= self.s

    @property
    def rows(self) -> Vector:
        return np.ones((self.n, 1))

    def _weights(self, arrived: bytes) -> Vector:
        there = np.frombuffer(arrived, dtype=bool)
        return np.where(there, self.n / there.sum(), 0.0)


class DropSlowest(GC):
    """Uncoded rounds that may end without s of n workers' results: load 1 / n, and not exact.

    With ``mu=0`` in the round protocol a round lasts until the (n - s)-th result. Raises ValueError unless
    n >= 1 and 0 <= s < n.
    """

    def __init__(self, n: int, s: int) -> None:
        self.s, self._code = s, Scaling(n, s)
        Scheme.__init__(self, n, 0, 1 / n, np.ones(n, dtype=np.int64), 1)

    @property
    def arguments(self) -> dict[str, int | str]:
        return {"n": self.n, "s": self.s}
