"""E3M0 (arXiv:2501.18512, Sec. 2.4): a number in four bits, a sign and three bits of exponent, no mantissa.

The paper names the format and leaves the scaling open. Here each tensor (or block of it) has one exponent e,
that of its largest magnitude rounded in log2, and an entry of magnitude a 2^e becomes the nearest of 2^e,
2^(e-1), ..., 2^(e-6) in ratio, or zero where a < 2^(-6.5). What is not flushed to zero is within a factor
sqrt(2) of what it was. Code 0 is zero, 1 .. 7 are the powers of two in ascending order, and 8 is added for a
negative one: 15 of the 16 codes.

Rounding to powers of two needs no logarithm: it is an addition to the bits of a float32 and a shift.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from cograd.core.codecs import CodecError, Context, Dense, Encoded, Layout, State
from cograd.core.message import Payload
from cograd.core.streams import stream

Array: TypeAlias = np.ndarray[Any, Any]

LOWEST, HIGHEST = -120, 127
"""Range of the scale e. A tensor below 2^LOWEST is zero, so that 2^(e-6) is never a subnormal number."""

_ZEROS = -128  # the scale of a tensor whose entries are all zero
_BIAS, _MANTISSA, _MAGNITUDE = 127, 23, np.uint32(0x7FFFFFFF)  # of a float32: see IEEE 754
_TILE = 1 << 16
# added to a float32's bits, these carry into the exponent: from a mantissa of sqrt(2) on, or from any but 1
_NEAREST = np.uint32(0x800000 - 0x3504F4)
_UPWARD = np.uint32(0x7FFFFF)


@dataclass(frozen=True)
class E3M0:
    """Four bits an entry and one byte a scale.

    Payload: a signed byte a scale, then two codes a byte, the first in the low half: ceil(n / 2) bytes for n
    entries, plus the scales. ``block`` is how many entries of a tensor share a scale; None, the default, is
    all of them. Encoding is in float32.

    With ``stochastic`` an entry goes to one of the two neighbours that enclose it (zero is one of them), with
    the probability that makes it unbiased, and e is rounded up. It draws from the stream of (seed, round,
    party).

    ``encode`` raises ValueError for NaN, infinity and magnitudes that e = 127 cannot stand for.
    """

    block: int | None = None
    stochastic: bool = False

    def __post_init__(self) -> None:
        if self.block is not None and self.block < 1:
            raise ValueError(f"block must be >= 1, or None for one scale a tensor; got {self.block}")

    def encode(self, x: Tensor, layout: Layout, ctx: Context, state: State | None = None) -> Encoded:
        if x.shape != (sum(layout),):
            raise ValueError(f"x must have shape ({sum(layout)},) for this layout; got {tuple(x.shape)}")
        lengths = self._lengths(layout)
        bits = np.ascontiguousarray(x.detach().to("cpu", torch.float32).numpy()).view(np.uint32)
        scales = self._scales(bits & _MAGNITUDE, lengths)
        uniform = None
        if self.stochastic:
            uniform = stream(ctx.seed, "e3m0", ctx.round, ctx.party).uniform(len(x)).numpy()
        payload = bytearray(np.where(scales < LOWEST, _ZEROS, scales).astype(np.int8).tobytes())
        each = np.repeat(scales.astype(np.int16), lengths)
        for start in range(0, len(x), _TILE):  # a tile's temporaries stay in the processor's cache
            tile = slice(start, start + _TILE)
            payload += _packed(_codes(bits[tile], each[tile], None if uniform is None else uniform[tile]))
        return Encoded(payload, Dense(self._values(payload, lengths).to(x.device, x.dtype)), state or {})

    def decode(self, payload: Payload, layout: Layout, ctx: Context) -> Dense:
        if len(payload) != self.nbytes(layout):
            raise CodecError(f"{self!r} expects {self.nbytes(layout)} bytes; got {len(payload)}")
        return Dense(self._values(payload, self._lengths(layout)))

    def nbytes(self, layout: Layout) -> int:
        return len(self._lengths(layout)) + math.ceil(sum(layout) / 2)

    def _lengths(self, layout: Layout) -> Array:
        """Entries under each scale."""
        if self.block is None:
            return np.array([n for n in layout if n], dtype=np.int64)
        parts = [min(self.block, n - at) for n in layout for at in range(0, n, self.block)]
        return np.array(parts, dtype=np.int64)

    def _scales(self, magnitude: Array, lengths: Array) -> Array:
        """e of every scale (int32): the exponent of its largest magnitude, rounded to nearest or upwards."""
        if not len(lengths):
            return np.empty(0, dtype=np.int32)
        largest = np.maximum.reduceat(magnitude, np.cumsum(lengths) - lengths)
        scales = _exponent(largest + (_UPWARD if self.stochastic else _NEAREST))
        if int(scales.max()) > HIGHEST:
            raise ValueError("x must be finite and below 2^127 to be written in E3M0; it holds other values")
        return scales

    def _values(self, payload: Payload, lengths: Array) -> Tensor:
        view, numel = memoryview(payload), int(lengths.sum())
        scales = np.frombuffer(view[: len(lengths)], dtype=np.int8).astype(np.int32)
        packed = np.frombuffer(view[len(lengths) :], dtype=np.uint8)
        used = np.bincount(packed, minlength=256)
        if used[_FOREIGN].any() or (numel % 2 and packed[-1] >> 4):
            raise CodecError(f"{self!r} has no negative zero and ends in zeros; the payload is not its own")
        if bool(((scales < LOWEST) & (scales != _ZEROS)).any()):
            raise CodecError(f"scales must be {_ZEROS} or in {LOWEST} .. {HIGHEST}; got {int(scales.min())}")
        values = _TABLE[packed].reshape(-1)[:numel]
        values *= np.repeat(np.where(scales == _ZEROS, np.float32(0), _power(scales)), lengths)
        return torch.from_numpy(values)


def _codes(bits: Array, scales: Array, uniform: Array | None) -> Array:
    """The code of each entry (uint8); ``uniform`` is a draw from [0, 1) each, for stochastic rounding."""
    magnitude = bits & _MAGNITUDE
    if uniform is None:
        ranks = _exponent(magnitude + _NEAREST) - scales + 7
    else:
        # the mantissa is the share of the way to the next power of two
        ranks = _exponent(magnitude + (uniform * 2**_MANTISSA).astype(np.uint32)) - scales + 7
        least = _power(scales - 6)
        raised = uniform * least < magnitude.view(np.float32)
        ranks = np.where(magnitude < least.view(np.uint32), raised, ranks)
    ranks[scales < LOWEST] = 0
    ranks = np.clip(ranks, 0, 7).astype(np.uint8)
    codes: Array = ranks | (bits >> np.uint32(28) & np.uint32(8)).astype(np.uint8) * (ranks > 0)
    return codes


def _exponent(bits: Array) -> Array:
    """The exponent of float32 bits without a sign (int32)."""
    exponents: Array = (bits >> np.uint32(_MANTISSA)).astype(np.int32)
    return exponents - _BIAS


def _power(exponents: Array) -> Array:
    """2 to the exponents (float32); 2^-126 for what is below the normal numbers."""
    return ((np.maximum(exponents, -126) + _BIAS).astype(np.uint32) << np.uint32(_MANTISSA)).view(np.float32)


def _packed(codes: Array) -> bytes:
    even = np.pad(codes, (0, len(codes) % 2))
    return bytes(even[::2] | even[1::2] << 4)


def _pairs() -> Array:
    """What the two codes of a byte stand for at e = 0: (256, 2), float32."""
    powers = np.concatenate([[0.0], 2.0 ** np.arange(-6, 1)])
    each = np.concatenate([powers, -powers]).astype(np.float32)
    byte = np.arange(256)
    return np.stack([each[byte & 15], each[byte >> 4]], 1)


_TABLE = _pairs()
_FOREIGN = np.array([(b & 15) == 8 or b >> 4 == 8 for b in range(256)])  # bytes with a negative zero
