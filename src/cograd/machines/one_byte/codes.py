"""Codes of one projected gradient: a byte on a log scale, and the two controls that show what the scale is for.

They are codecs of `cograd.core.codecs` whose vector is a machine's S projected gradients. Decoded values come
from tables that are exact to the last bit on every platform, since replicas apply them.

A value that is not finite is sent as minus zero: it decodes to zero, and its sign says that a loss was not a
number. No difference of two losses is minus zero, so nothing is taken for that by mistake.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from decimal import Decimal, localcontext
from functools import lru_cache
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cograd.core.codecs import CodecError, Context, Dense, Encoded, Layout, State
from cograd.core.message import Payload


@dataclass(frozen=True)
class LogByte:
    """One byte a value: bit 7 is the sign, the rest is m. Zero is m = 0, else |p| = e^((m - center) / steps).

    With the defaults magnitudes go from 3.8e-4 to 2.6e3 and the relative error is at most e^(1/16) - 1 = 6.4 %.
    A magnitude takes the level that is nearest in its logarithm. Above the last level it is the last; below the
    first by more than half a step, where the grid's next point would be m = 0, it is zero.

    Raises ValueError for ``steps_per_e`` that is not positive, or levels that float32 cannot tell apart.
    """

    steps_per_e: float = 8.0
    center: int = 64
    bits: ClassVar[int] = 8

    def __post_init__(self) -> None:
        if not 0 < self.steps_per_e < math.inf:
            raise ValueError(f"steps_per_e must be a positive number; got {self.steps_per_e}")
        last = (self._count - self.center) / self.steps_per_e
        first = (1 - self.center) / self.steps_per_e
        if not (first > -87 and last < 88 and np.all(np.diff(self._levels[1 : self._count + 1]) > 0)):
            raise ValueError(
                f"levels must be distinct float32 numbers; steps_per_e={self.steps_per_e} and "
                f"center={self.center} make {self._count} of them from e^{first:g} to e^{last:g}"
            )

    @property
    def _count(self) -> int:
        """Number of magnitudes besides zero."""
        return int(2 ** (self.bits - 1) - 1)

    @property
    def _levels(self) -> NDArray[np.float32]:
        return _log_levels(self.steps_per_e, self.center, self._count)

    def encode(self, x: Tensor, layout: Layout, ctx: Context, state: State | None = None) -> Encoded:
        values = _values(x, layout)
        edges = _log_edges(self.steps_per_e, self.center, self._count)
        finite = np.isfinite(values)
        m = np.searchsorted(edges, np.where(finite, np.abs(values), 0.0), side="right")
        negative = np.where(m > 0, values < 0, ~finite | ((values == 0) & np.signbit(values)))
        codes: NDArray[np.uint8] = (m + (negative << (self.bits - 1))).astype(np.uint8)
        payload = bytearray(_packed(codes, self.bits))
        return Encoded(payload, Dense(torch.from_numpy(self._levels[codes])), state or {})

    def decode(self, payload: Payload, layout: Layout, ctx: Context) -> Dense:
        codes = _unpacked(payload, sum(layout), self.bits, self)
        return Dense(torch.from_numpy(self._levels[codes]))

    def nbytes(self, layout: Layout) -> int:
        return (sum(layout) * self.bits + 7) // 8


@dataclass(frozen=True)
class LogNibble(LogByte):
    """The same in four bits: a sign and seven magnitudes, by default e^-3 .. e^3; two values a byte."""

    steps_per_e: float = 1.0
    center: int = 4
    bits: ClassVar[int] = 4


@dataclass(frozen=True)
class LinearByte:
    """One byte a value, uniformly spaced: |p| = ``limit`` k / 127 for k in 0 .. 127.

    The default limit is the largest magnitude of `LogByte`. Raises ValueError for a limit that is not positive.
    """

    limit: float = 2634.5

    def __post_init__(self) -> None:
        if not 0 < self.limit < math.inf:
            raise ValueError(f"limit must be a positive number; got {self.limit}")

    def encode(self, x: Tensor, layout: Layout, ctx: Context, state: State | None = None) -> Encoded:
        values = _values(x, layout)
        flagged = ~np.isfinite(values) | ((values == 0) & np.signbit(values))
        k = np.clip(np.rint(np.where(flagged, 0.0, values) * (127 / self.limit)), -127, 127)
        codes = np.where(flagged, -128, k).astype(np.int8)
        return Encoded(bytearray(codes.tobytes()), Dense(self._value(codes)), state or {})

    def decode(self, payload: Payload, layout: Layout, ctx: Context) -> Dense:
        return Dense(self._value(_unpacked(payload, sum(layout), 8, self).view(np.int8)))

    def nbytes(self, layout: Layout) -> int:
        return sum(layout)

    def _value(self, codes: NDArray[np.int8]) -> Tensor:
        values = np.where(codes == -128, -0.0, codes * (self.limit / 127))
        return torch.from_numpy(values.astype(np.float32))


def _values(x: Tensor, layout: Layout) -> NDArray[np.float64]:
    if x.shape != (sum(layout),):
        raise ValueError(f"x must have shape ({sum(layout)},) for this layout; got {tuple(x.shape)}")
    return x.detach().cpu().double().numpy()


def _packed(codes: NDArray[np.uint8], bits: int) -> bytes:
    if bits == 4:
        pairs = np.pad(codes, (0, len(codes) % 2)).reshape(-1, 2)
        return bytes(pairs[:, 0] | pairs[:, 1] << 4)
    return codes.tobytes()


def _unpacked(payload: Payload, count: int, bits: int, codec: object) -> NDArray[np.uint8]:
    expected = (count * bits + 7) // 8
    if len(payload) != expected:
        raise CodecError(f"{codec!r} expects {expected} bytes for {count} values; got {len(payload)}")
    codes: NDArray[np.uint8] = np.frombuffer(payload, dtype=np.uint8)
    if bits == 4:
        codes = np.stack([codes & 15, codes >> 4], axis=1).reshape(-1).astype(np.uint8)
        if codes[count:].any():
            raise CodecError(f"{codec!r}: the half byte after the last of {count} values must be zero")
    return codes[:count]


@lru_cache
def _log_levels(steps: float, center: int, count: int) -> NDArray[np.float32]:
    """The value of every code. Decimal's exponential is correctly rounded, which a platform's is not."""
    with localcontext() as context:
        context.prec = 30
        positive = [0.0, *(float((Decimal(m - center) / Decimal(steps)).exp()) for m in range(1, count + 1))]
    levels = np.array(positive, dtype=np.float64)
    with np.errstate(over="ignore", under="ignore"):
        return np.concatenate([levels, -levels]).astype(np.float32)


@lru_cache
def _log_edges(steps: float, center: int, count: int) -> NDArray[np.float64]:
    """The magnitudes at which the code steps up: half way between two levels in the logarithm."""
    edges: NDArray[np.float64] = np.exp((np.arange(1, count + 1) - 0.5 - center) / steps)
    return edges
