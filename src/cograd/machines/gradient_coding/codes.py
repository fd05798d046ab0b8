"""Gradient codes: n chunks on n workers, each chunk on s + 1 of them; any n - s results give the full sum.

Worker i sends l_i = sum_j C[i, j] g_j over its s + 1 chunks, one vector of a gradient's size. The receiver
finds weights a with C_A^T a = 1 over the rows A that arrived; then sum_i a_i l_i = sum_j g_j, exactly.

With all rows there is the solution a0 of least norm, and every other one is a0 + N z for N (n, s) an
orthonormal basis of the left null space of C. The least-squares solution on the survivors alone is therefore
the least z with N z = -a0 on the missing rows: a system of at most s equations, whatever n is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, lru_cache
from math import gcd

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cograd.core.streams import stream

Mask = NDArray[np.bool_]
Vector = NDArray[np.float64]

RESIDUAL = 1e-6
"""Largest |C_A^T a - 1| that counts as decoded; rounding leaves 1e-14 to 1e-8, depending on the code."""

CACHED = 1024
"""Survivor sets whose weights are kept (8 n bytes each)."""


class NotDecodable(ValueError):
    """The results at hand do not determine the sum."""


class Code(ABC):
    """An (n, s) gradient code with n chunks.

    Raises ValueError unless n >= 1 and 0 <= s < n.
    """

    def __init__(self, n: int, s: int) -> None:
        if n < 1:
            raise ValueError(f"n must be >= 1 worker; got {n}")
        if not 0 <= s < n:
            raise ValueError(f"s must be in 0 .. n - 1 = {n - 1} stragglers; got {s}")
        self.n, self.s = n, s
        self._cached_weights = lru_cache(CACHED)(self._weights)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(n={self.n}, s={self.s})"

    @abstractmethod
    def assignment(self, worker: int) -> tuple[int, ...]:
        """The s + 1 chunks of a worker, in the order in which `encode` takes their gradients."""

    @abstractmethod
    def tolerates(self, missing: Mask) -> bool:
        """Whether the sum can be had without the results of these workers (a mask of n)."""

    @property
    @abstractmethod
    def rows(self) -> Vector:
        """Coefficients (n, s + 1), float64: row i belongs to worker i's chunks in the order of `assignment`."""

    @abstractmethod
    def _weights(self, arrived: bytes) -> Vector:
        """Decoding weights (n,) of a survivor mask's bytes; zero where nothing is used."""

    @cached_property
    def matrix(self) -> Vector:
        """C (n, n), float64."""
        matrix = np.zeros((self.n, self.n))
        for worker in range(self.n):
            matrix[worker, list(self.assignment(worker))] = self.rows[worker]
        return matrix

    def coefficients(self, worker: int, dtype: torch.dtype = torch.float64) -> Tensor:
        """The s + 1 coefficients of a worker."""
        return torch.from_numpy(self.rows[worker]).to(dtype)

    def encode(self, worker: int, parts: Tensor) -> Tensor:
        """The gradients of a worker's chunks (s + 1, d) -> the vector it sends (d,).

        Raises ValueError for another number of parts and TypeError unless they are float32 or float64: a
        random code's coefficients reach 1e3 and half precision leaves nothing of the sum.
        """
        if parts.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"parts must be float32 or float64; got {parts.dtype}")
        chunks = len(self.assignment(worker))
        if parts.ndim != 2 or len(parts) != chunks:
            raise ValueError(f"parts must have shape ({chunks} chunks, d); got {tuple(parts.shape)}")
        return self.coefficients(worker, parts.dtype).to(parts.device) @ parts

    def weights(self, arrived: Mask) -> Vector:
        """Weights (n,) that make the arrived results the sum: zero for the others. Cached by survivor set.

        Raises NotDecodable if there are none, naming how many results are missing.
        """
        arrived = mask_of("arrived", arrived, self.n)
        if not self.tolerates(~arrived):
            raise NotDecodable(self._lack(arrived))
        weights: Vector = self._cached_weights(arrived.tobytes())
        return weights

    def _lack(self, arrived: Mask) -> str:
        return (
            f"{int(arrived.sum())} results of {self.n} workers; {self!r} needs at least {self.n - self.s}: "
            f"missing are {np.flatnonzero(~arrived).tolist()}"
        )

    def decode(self, results: Mapping[int, Tensor]) -> Tensor:
        """What arrived, by worker -> the sum of all chunks' gradients, in float64.

        Raises NotDecodable if too little arrived, ValueError for a worker that there is not.
        """
        unknown = [worker for worker in results if not 0 <= worker < self.n]
        if unknown:
            raise ValueError(f"workers must be in 0 .. n - 1 = {self.n - 1}; got {unknown}")
        arrived = np.zeros(self.n, dtype=bool)
        arrived[list(results)] = True
        weights = self.weights(arrived)
        used = np.flatnonzero(weights).tolist()
        return combine([results[worker] for worker in used], weights[used].tolist())


def combine(vectors: Sequence[Tensor], weights: Sequence[float], out: Tensor | None = None) -> Tensor:
    """Add the weighted sum of vectors to ``out`` (default: float64 zeros), in their order and in place."""
    if out is None:
        out = torch.zeros_like(vectors[0], dtype=torch.float64)
    for vector, weight in zip(vectors, weights, strict=True):
        out.add_(vector, alpha=weight)
    return out


def mask_of(name: str, mask: Mask, n: int) -> Mask:
    """A mask of n workers; TypeError or ValueError for anything else."""
    if not isinstance(mask, np.ndarray) or mask.dtype != bool:
        raise TypeError(f"{name} must be a numpy array of bool; got {type(mask).__name__}")
    if mask.shape != (n,):
        raise ValueError(f"{name} must have shape ({n},); got {mask.shape}")
    return mask


class _Circulant(Code):
    """Worker i holds chunks i .. i + s (mod n); any s workers may be missing."""

    def assignment(self, worker: int) -> tuple[int, ...]:
        return tuple((worker + k) % self.n for k in range(self.s + 1))

    def tolerates(self, missing: Mask) -> bool:
        return int(missing.sum()) <= self.s

    @cached_property
    def null(self) -> tuple[Vector, Vector]:
        """a0 (n,), the least weights with all results, and N (n, s), the left null space of C."""
        u, sizes, v = np.linalg.svd(self.matrix.T)
        rank = self.n - self.s
        start = v[:rank].T @ (u[:, :rank].sum(0) / sizes[:rank])
        return start, v[rank:].T

    def _weights(self, arrived: bytes) -> Vector:
        missing = ~np.frombuffer(arrived, dtype=bool)
        start, null = self.null
        weights: Vector = start
        if missing.any():
            weights = start + null @ np.linalg.lstsq(null[missing], -start[missing], rcond=None)[0]
            weights[missing] = 0
        error = float(np.abs(self.matrix.T @ weights - 1).max())
        if not error <= RESIDUAL:
            raise NotDecodable(
                f"{self!r} is too ill-conditioned without workers {np.flatnonzero(missing).tolist()}: "
                f"the weights leave an error of {error:.1e}, at most {RESIDUAL:.0e} is allowed"
            )
        weights.setflags(write=False)
        return weights


class CyclicGC(_Circulant):
    """The cyclic code of Tandon et al. (2017, Algorithm 2): random, every (n, s).

    H (s, n) is Gaussian with H 1 = 0, and every row of C is in its null space: C[i, i] = 1 and
    C[i, S] = -H[:, S]^-1 H[:, i] on the other chunks S of worker i. The draw is a function of ``seed``, so that
    every party has the same code.

    Its coefficients reach 1e3 at n = 256, and weights 1e4 to 1e5. A decoded sum is right to about 1e-9 in
    float64, to 1e-3 if what was sent is float32. Where (s + 1) divides n, `RepetitionGC` has no such error;
    where n - s is odd and n is not large, `CyclicMDS` has hardly any.
    """

    def __init__(self, n: int, s: int, seed: int = 0) -> None:
        super().__init__(n, s)
        self.seed = seed

    def __repr__(self) -> str:
        return f"CyclicGC(n={self.n}, s={self.s}, seed={self.seed})"

    @cached_property
    def rows(self) -> Vector:
        n, s = self.n, self.s
        if s in (0, n - 1):  # the plain sum of one chunk, or of all: C is I, or all ones
            return np.ones((n, s + 1))
        h = stream(self.seed, "gradient-coding", "cyclic", n, s).numpy.standard_normal((s, n))
        h[:, -1] = -h[:, :-1].sum(1)
        others = (np.arange(n)[:, None] + np.arange(1, s + 1)) % n
        solved = np.linalg.solve(h[:, others].transpose(1, 0, 2), h.T[:, :, None])[:, :, 0]
        return np.concatenate([np.ones((n, 1)), -solved], axis=1)


class CyclicMDS(_Circulant):
    """The cyclic MDS code of Raviv et al. (arXiv:1707.03858): all rows are shifts of one polynomial.

    Its zeros are s of the n-th roots of unity, in arithmetic progression (which makes any s results
    dispensable), without 1 (so that the sum is in the code) and closed under conjugation (so that all is real).
    The last two need n - s odd: otherwise ValueError; take s + 1 or another code.

    The step of the progression is free among the units of Z_n. The usual 1 puts the zeros side by side, and
    the loss of neighbouring workers then cannot be decoded at n = 256; here it is the step for which the worst
    of some losses, of neighbours and random ones, is conditioned best. Decoded sums are right to 1e-13 at
    n = 32, a hundred times better than with `CyclicGC`; at n = 256 the worst losses are as bad for both.
    """

    def __init__(self, n: int, s: int) -> None:
        super().__init__(n, s)
        if (n - s) % 2 == 0:
            raise ValueError(
                f"n - s must be odd for real coefficients; got n={n}, s={s}: take s={s + 1}, "
                "or CyclicGC, which has no such restriction"
            )

    @cached_property
    def rows(self) -> Vector:
        polynomial = np.ones(1, dtype=complex)
        for zero in _spread(np.exp(2j * np.pi * self._zeros(self.step) / self.n)):
            polynomial = np.convolve(polynomial, [1, -zero])
        coefficients = polynomial.real / np.abs(polynomial.real).max()
        return np.tile(coefficients, (self.n, 1))

    @cached_property
    def step(self) -> int:
        """Of the zeros' arithmetic progression."""
        units = [c for c in range(1, self.n // 2 + 1) if gcd(c, self.n) == 1]
        draws = stream("gradient-coding", "mds", self.n, self.s)
        losses = np.stack([np.arange(self.s), *(draws.choice(self.n, self.s).numpy() for _ in range(64))])

        def conditioning(c: int) -> float:
            return float(np.linalg.svd(self._basis(c)[losses], compute_uv=False)[:, -1].min())

        return max(units, key=conditioning) if self.s and units else 1

    def _zeros(self, c: int) -> NDArray[np.int64]:
        """Exponents r of the zeros exp(2 pi i r / n): symmetric about n / 2, ``c`` apart."""
        n, s = self.n, self.s
        middle = n // 2 if n % 2 == 0 else c * (n + 1) // 2
        first = -(s - 1) // 2 if n % 2 == 0 else -(s // 2)
        zeros: NDArray[np.int64] = (middle + c * np.arange(first, first + s)) % n
        return zeros

    def _basis(self, c: int) -> Vector:
        """The left null space of the code with step ``c``: the Fourier vectors of its zeros, made real."""
        places = np.arange(self.n)
        columns = []
        for zero in self._zeros(c).tolist():
            if 2 * zero == self.n:
                columns.append(np.where(places % 2 == 0, 1.0, -1.0) / np.sqrt(self.n))
            elif 2 * zero < self.n:
                angle = 2 * np.pi * zero / self.n * places
                columns += [f(angle) * np.sqrt(2 / self.n) for f in (np.cos, np.sin)]
        return np.stack(columns, axis=1) if columns else np.zeros((self.n, 0))

    @cached_property
    def null(self) -> tuple[Vector, Vector]:
        return np.full(self.n, 1 / self.rows[0].sum()), self._basis(self.step)


def _spread(zeros: NDArray[np.complex128]) -> list[complex]:
    """The zeros in Leja's order, each far from those before: their product loses no digits on the way."""
    left, ordered = zeros.tolist(), []
    distance = np.ones(len(left))
    while left:
        at = int(distance.argmax())
        ordered.append(left.pop(at))
        distance = np.delete(distance, at) * np.abs(np.array(left) - ordered[-1])
    return ordered


class RepetitionGC(Code):
    """Fractional repetition: n / (s + 1) groups, whose members hold the same chunks and send their plain sum.

    One result of each group is enough, so it survives more than any s losses; and it decodes to rounding.
    Raises ValueError unless (s + 1) divides n.
    """

    def __init__(self, n: int, s: int) -> None:
        super().__init__(n, s)
        if n % (s + 1):
            raise ValueError(f"s + 1 must divide n = {n}; got s = {s}")

    def assignment(self, worker: int) -> tuple[int, ...]:
        first = worker - worker % (self.s + 1)
        return tuple(range(first, first + self.s + 1))

    def tolerates(self, missing: Mask) -> bool:
        return not bool(missing.reshape(-1, self.s + 1).all(1).any())

    @cached_property
    def rows(self) -> Vector:
        return np.ones((self.n, self.s + 1))

    def _lack(self, arrived: Mask) -> str:
        groups = np.flatnonzero(~arrived.reshape(-1, self.s + 1).any(1)).tolist()
        return f"no result of repetition group(s) {groups}; {self!r} needs one of each"

    def _weights(self, arrived: bytes) -> Vector:
        groups = np.frombuffer(arrived, dtype=bool).reshape(-1, self.s + 1)
        weights = np.zeros(self.n)
        weights[np.arange(0, self.n, self.s + 1) + groups.argmax(1)] = 1
        weights.setflags(write=False)
        return weights


CODES: Mapping[str, Callable[[int, int], Code]] = {
    "cyclic": CyclicGC,
    "mds": CyclicMDS,
    "repetition": RepetitionGC,
}
"""Codes by the name that a scheme takes."""


def code_of(name: str, n: int, s: int) -> Code:
    """An (n, s) code by name. Raises ValueError for a name that is not in `CODES`."""
    if name not in CODES:
        raise ValueError(f"code must be one of {', '.join(CODES)}; got {name!r}")
    return CODES[name](n, s)
