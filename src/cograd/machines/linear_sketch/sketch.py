"""The operator: sketch R_t x, de-sketch R_t^T y, and what the two together cost in accuracy."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cograd.core.streams import Stream, stream
from cograd.machines.linear_sketch.kinds import SRHT, Dense, Kind, RandomK, Sparse

KINDS = ("gaussian", "ams", "srht", "countsketch", "sparse", "random-k")


class Sketch:
    """R_t of ``rows`` x ``numel`` for every round t: ``sketch(x, round=t)`` and ``sketch.T(y, round=t)``.

    R_t is a function of (seed, kind, t) alone, the same on every party and device, and must be: derive neither
    seed nor round from data. E[R_t^T R_t] = I, so ``sketch.T(sketch(x, t), t)`` is an unbiased estimate of x.

    ====================  =========================================  ============  =======================
    kind                  R                                          cost          omega
    ====================  =========================================  ============  =======================
    ``gaussian``          iid N(0, 1/b)                              b d           (d + 1) / b
    ``ams``               iid +-1/sqrt(b)                            b d           (d - 1) / b
    ``srht``              subsampled randomised Hadamard transform   D log D       (d-1)(D-b) / (b(D-1))
    ``countsketch``       one +-1 a column                           d             (d - 1) / b
    ``sparse``            s of +-1/sqrt(s) a column, distinct rows   s d           (d - 1) / b
    ``random-k``          sqrt(d/b) on b coordinates (a control)     b             d / b - 1
    ====================  =========================================  ============  =======================

    (b = ``rows``, d = ``numel``, D = the power of two from d up.) The de-sketch of the last four kinds is the
    same bits everywhere. That of the dense kinds is a matrix product, whose last bits may differ between unlike
    machines.

    Memory besides input and result: one vector of D for ``srht``, O(b) to draw its rows, O(1) otherwise.

    Args:
        numel: d, elements of the vector.
        rows: b, numbers that travel, in 1 .. numel.
        kind: see above.
        seed: of the run; all parties have the same.
        nonzeros: s of ``sparse`` (4 if not given), in 1 .. rows; only there.

    Raises ValueError at construction for an argument out of range.
    """

    def __init__(
        self, numel: int, rows: int, kind: str = "srht", *, seed: int = 0, nonzeros: int | None = None
    ) -> None:
        if not 1 <= numel < 2**31:
            raise ValueError(f"numel must be in 1 .. 2^31 - 1; got {numel}")
        if not 1 <= rows <= numel:
            raise ValueError(f"rows must be in 1 .. numel = {numel}; got {rows}")
        kind_checked(kind, nonzeros)
        self.numel, self.rows, self.kind, self.seed = numel, rows, kind, seed
        self.nonzeros = nonzeros
        self._kind = _kind(kind, numel, rows, nonzeros)

    def __repr__(self) -> str:
        extra = f", nonzeros={self.nonzeros}" if self.nonzeros is not None else ""
        return f"Sketch({self.numel}, {self.rows}, {self.kind!r}, seed={self.seed}{extra})"

    def __call__(self, x: Tensor, round: int) -> Tensor:
        """Sketch: x (..., numel) -> R x (..., rows), in float64 for float64 x and float32 otherwise.

        Differentiable in x, any number of times. Raises ValueError for another shape, or NaN or infinity.
        """
        return _linear(self._checked("x", x, self.numel), self, round, False)

    def T(self, y: Tensor, round: int) -> Tensor:
        """De-sketch: y (..., rows) -> R^T y (..., numel); dtype, derivatives and errors as for the sketch."""
        return _linear(self._checked("y", y, self.rows), self, round, True)

    @property
    def omega(self) -> float:
        """E||R^T R h||^2 / ||h||^2 - 1: the variance that sketching adds, relative to the signal."""
        return self._kind.omega

    @property
    def norm(self) -> float | None:
        """Bound of ||R|| in every draw: sqrt(D/b) for ``srht``, sqrt(d/b) for ``random-k``, else None."""
        return self._kind.norm

    @property
    def nbytes(self) -> int:
        """Bytes of a sketch in float32: 4 rows, in each direction."""
        return 4 * self.rows

    def suggest_lr(self, smoothness: float, local_steps: int = 1) -> float:
        """1 / ((1 + omega) L K): the largest step for which theory promises descent at any spectrum.

        With g the gradient of an L-smooth f, E f(w - lr R^T R g) <= f(w) - lr ||g||^2 + lr^2 L (1 + omega)
        ||g||^2 / 2, which this lr minimises. Rounds grow by 1 + omega over gradient descent at 1/L, so that
        traffic never falls below its; where the spectrum decays, 10 to 100 times this step is often stable, and
        that is where sketching pays. Raises ValueError unless smoothness > 0 and local_steps >= 1.
        """
        if not 0 < smoothness < math.inf:
            raise ValueError(f"smoothness must be a positive number; got {smoothness}")
        if local_steps < 1:
            raise ValueError(f"local_steps must be >= 1; got {local_steps}")
        return 1 / ((1 + self.omega) * smoothness * local_steps)

    def digest(self, round: int) -> str:
        """64 bits of a hash of what R_round is drawn from (its beginning): equal where parties share it."""
        return hashlib.blake2b(self._kind.sample(self._draws(round)), digest_size=8).hexdigest()

    def _draws(self, round: int) -> Stream:
        if round < 0:
            raise ValueError(f"round must be >= 0; got {round}")
        return stream(self.seed, "linear-sketch", self.kind, round)

    def _checked(self, name: str, vector: Tensor, size: int) -> Tensor:
        if vector.ndim < 1 or vector.shape[-1] != size:
            raise ValueError(f"{name} must have shape (..., {size}); got {tuple(vector.shape)}")
        if not vector.is_floating_point():
            raise ValueError(f"{name} must be floating point; got {vector.dtype}")
        if not math.isfinite(vector.detach().sum()) and not bool(vector.isfinite().all()):
            raise ValueError(f"{name} must be finite; it holds NaN or infinity")
        return vector if vector.dtype == torch.float64 else vector.float()

    def _use(self, vector: Tensor, round: int, transposed: bool) -> Tensor:
        """R or R^T times every vector of the last axis."""
        lead = vector.shape[:-1]
        vectors = vector.reshape(-1, vector.shape[-1]).contiguous()
        size = self.numel if transposed else self.rows
        if transposed:
            out = vectors.new_empty(len(vectors), size)
            self._kind.adjoint(self._draws(round), vectors, out)
        else:
            out = vectors.new_zeros(len(vectors), size)
            self._kind.apply(self._draws(round), vectors, out)
        return out.view(*lead, size)


class _Linear(torch.autograd.Function):
    """R or R^T to autograd: the derivative of the one is the other."""

    @staticmethod
    def forward(vector: Tensor, sketch: Sketch, round: int, transposed: bool) -> Tensor:
        return sketch._use(vector, round, transposed)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.sketch, ctx.round, ctx.transposed = inputs

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _linear(grad[0], ctx.sketch, ctx.round, not ctx.transposed), None, None, None


def _linear(vector: Tensor, sketch: Sketch, round: int, transposed: bool) -> Tensor:
    if not (vector.requires_grad and torch.is_grad_enabled()):
        return sketch._use(vector, round, transposed)
    result: Tensor = _Linear.apply(vector, sketch, round, transposed)  # type: ignore[no-untyped-call]
    return result


def settings_of(sketch: Sketch | None) -> dict[str, Any]:
    """What a checkpoint says of its sketch: its arguments, and R_0's digest, which tells another generator."""
    return {"sketch": repr(sketch), "R_0": None if sketch is None else sketch.digest(0)}


def refuse_other(state: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Raise ValueError, naming the first difference, for a state that was saved with other ``settings``."""
    for name, mine in settings.items():
        if state[name] != mine:
            raise ValueError(f"the state's {name} is {state[name]}; this run's is {mine}")


def kind_checked(kind: str, nonzeros: int | None) -> None:
    """Raise ValueError for an unknown kind, or for ``nonzeros`` where the kind has none."""
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}; got {kind!r}")
    if nonzeros is not None and kind != "sparse":
        raise ValueError(f"nonzeros is of kind 'sparse' only; got {nonzeros} with kind {kind!r}")


def _kind(kind: str, numel: int, rows: int, nonzeros: int | None) -> Kind:
    if kind in ("gaussian", "ams"):
        return Dense(numel, rows, gaussian=kind == "gaussian")
    if kind == "srht":
        return SRHT(numel, rows)
    if kind == "random-k":
        return RandomK(numel, rows)
    count = 1 if kind == "countsketch" else 4 if nonzeros is None else nonzeros
    if not 1 <= count <= rows:
        raise ValueError(f"nonzeros must be in 1 .. rows = {rows}; got {count}")
    return Sparse(numel, rows, count)
