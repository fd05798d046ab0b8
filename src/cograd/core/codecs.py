"""Codecs: a vector becomes payload bytes, and what the receiver will decode is known to the sender.

A codec is a frozen value. Its methods take the vector's *layout* (elements of each segment, in order) and a
`Context`, because both ends know them:

    encode(x, layout, ctx, state) -> Encoded(payload, kept, state)
    decode(payload, layout, ctx)  -> Dense | Sparse
    reduce(payloads, layout, ctxs, weights) -> the weighted sum, added in the order given

``kept`` is what the receiver will decode, so that error feedback and masking need no second pass. A codec
whose payload has the same length for every vector also has ``nbytes(layout)``; one whose length depends on
the data must encode to know. Codecs nest: ``TopK(0.001, values=Float16(), indices=RunLength16())``.

``decode`` raises `CodecError` for a payload that no vector of this layout encodes to; it never unpickles and
allocates nothing that the payload's length does not justify (a `Sparse` grows only when it is added to a
vector).
"""

from __future__ import annotations

import math
import sys
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, TypeAlias, cast, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from cograd.core.message import Payload
from cograd.core.selection import Exact, Threshold
from cograd.core.streams import stream

if sys.byteorder != "little":
    raise ImportError("cograd's payloads are little-endian and this machine is not; it is not supported")

Layout: TypeAlias = tuple[int, ...]
State: TypeAlias = dict[str, Tensor]


class CodecError(ValueError):
    """A payload that this codec cannot have written for this layout."""


@dataclass(frozen=True)
class Context:
    """Where in the session a message stands; shared randomness is keyed by it."""

    seed: int = 0
    round: int = 0
    party: int = 0


@dataclass(frozen=True)
class Dense:
    """A decoded vector, all of it."""

    values: Tensor

    def add_to(self, vector: Tensor, weight: float = 1.0) -> None:
        vector.add_(self.values.to(vector.device), alpha=weight)

    def dense(self) -> Tensor:
        return self.values


@dataclass(frozen=True)
class Sparse:
    """A decoded vector of ``numel`` elements that is zero but at ``indices`` (int64, each at most once)."""

    indices: Tensor
    values: Tensor
    numel: int

    def add_to(self, vector: Tensor, weight: float = 1.0) -> None:
        values = self.values.to(vector.device, vector.dtype)
        vector.index_add_(0, self.indices.to(vector.device), values, alpha=weight)

    def dense(self) -> Tensor:
        vector = self.values.new_zeros(self.numel)
        self.add_to(vector)
        return vector


Decoded: TypeAlias = Dense | Sparse


@dataclass(frozen=True)
class Encoded:
    """What `encode` gives: the payload, what the receiver will decode from it, and the codec's state after."""

    payload: bytearray
    kept: Decoded
    state: State = field(default_factory=dict)


class Codec(Protocol):
    """The last stage of what a party sends. See the module's docstring."""

    def encode(self, x: Tensor, layout: Layout, ctx: Context, state: State | None = None) -> Encoded: ...

    def decode(self, payload: Payload, layout: Layout, ctx: Context) -> Decoded: ...


@runtime_checkable
class FixedLength(Codec, Protocol):
    """A codec whose payload length depends on the layout alone."""

    def nbytes(self, layout: Layout) -> int: ...


def reduce(
    codec: Codec,
    payloads: Sequence[Payload],
    layout: Layout,
    ctxs: Sequence[Context],
    weights: Sequence[float] | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """The weighted sum of what payloads decode to, added in the order given, so that every party that adds
    in the same order gets the same bits. ``out`` (numel,) is overwritten if given. The decoders' common
    default; a codec that is linear may add coded payloads instead."""
    total = out.zero_() if out is not None else torch.zeros(sum(layout))
    weights = [1.0] * len(payloads) if weights is None else weights
    for payload, ctx, weight in zip(payloads, ctxs, weights, strict=True):
        codec.decode(payload, layout, ctx).add_to(total, weight)
    return total


def tensor_of(payload: Payload, dtype: torch.dtype) -> Tensor:
    """The payload's bytes as a tensor, without a copy where it is writable."""
    if memoryview(payload).readonly:
        payload = bytearray(payload)
    if not len(payload):
        return torch.empty(0, dtype=dtype)
    return torch.frombuffer(payload, dtype=dtype)


def _checked(x: Tensor, layout: Layout) -> Tensor:
    if x.shape != (sum(layout),):
        raise ValueError(f"x must have shape ({sum(layout)},) for this layout; got {tuple(x.shape)}")
    return x


@dataclass(frozen=True)
class _Raw:
    """Every element as it is, in a stated dtype."""

    dtype: ClassVar[torch.dtype]

    def encode(self, x: Tensor, layout: Layout, ctx: Context, state: State | None = None) -> Encoded:
        payload = bytearray(self.nbytes(layout))
        wire = tensor_of(payload, self.dtype)
        wire.copy_(_checked(x, layout))
        kept = x if x.dtype == self.dtype else wire.to(x.device, x.dtype)
        return Encoded(payload, Dense(kept), state or {})

    def decode(self, payload: Payload, layout: Layout, ctx: Context) -> Dense:
        if len(payload) != self.nbytes(layout):
            raise CodecError(f"{self!r} expects {self.nbytes(layout)} bytes; got {len(payload)}")
        return Dense(tensor_of(payload, self.dtype))

    def nbytes(self, layout: Layout) -> int:
        return sum(layout) * self.dtype.itemsize


@dataclass(frozen=True)
class Float32(_Raw):
    """4 bytes an element."""

    dtype = torch.float32


@dataclass(frozen=True)
class Float16(_Raw):
    """2 bytes an element; lossy for wider input, and overflows to infinity beyond 65504."""

    dtype = torch.float16


@dataclass(frozen=True)
class Float64(_Raw):
    """8 bytes an element."""

    dtype = torch.float64


class Indices(Protocol):
    """How a sparse codec writes ascending positions. ``width`` is bytes a slot."""

    @property
    def width(self) -> int: ...

    def pack(self, indices: Tensor, numel: int) -> tuple[np.ndarray[Any, Any], Tensor | None]:
        """Positions -> (one code a slot, the slot of each position or None where they are the same)."""

    def unpack(self, codes: Payload, numel: int) -> Tensor:
        """Codes -> the position of every slot (int64, ascending)."""


@dataclass(frozen=True)
class RunLength16:
    """16-bit counts of the zeros since the previous slot (arXiv:1712.01887, Sec. 5).

    A run of more than 65535 zeros is broken by escape slots (run 65535, value 0), each of which covers 65536
    positions: 65535 zeros and its own.
    """

    width = 2

    def pack(self, indices: Tensor, numel: int) -> tuple[np.ndarray[Any, Any], Tensor | None]:
        gaps = torch.diff(indices, prepend=indices.new_tensor([-1])) - 1
        if not len(gaps) or int(gaps.max()) < 65536:
            return gaps.numpy().astype("<u2"), None
        escapes = gaps >> 16
        slots = torch.cumsum(escapes + 1, 0) - 1
        codes = np.full(int(slots[-1]) + 1, 65535, dtype="<u2")
        codes[slots.numpy()] = (gaps & 65535).numpy()
        return codes, slots

    def unpack(self, codes: Payload, numel: int) -> Tensor:
        runs = torch.from_numpy(np.frombuffer(codes, dtype="<u2").astype(np.int64))
        return torch.cumsum(runs + 1, 0) - 1


@dataclass(frozen=True)
class Int32:
    """The position itself, in 4 bytes."""

    width = 4

    def pack(self, indices: Tensor, numel: int) -> tuple[np.ndarray[Any, Any], Tensor | None]:
        if numel > 2**31:
            raise ValueError(f"Int32 indices reach 2^31 elements; the vector has {numel}: use RunLength16()")
        return indices.numpy().astype("<i4"), None

    def unpack(self, codes: Payload, numel: int) -> Tensor:
        return torch.from_numpy(np.frombuffer(codes, dtype="<i4").astype(np.int64))


def density_checked(density: float) -> float:
    """``density`` if it lies in (0, 1]; raises ValueError otherwise (NaN included)."""
    if not 0 < density <= 1:
        raise ValueError(f"density must be in (0, 1]; got {density}")
    return density


def count_for(numel: int, density: float) -> int:
    """Entries that a density keeps of ``numel``: the next whole number up, and at least one."""
    # a product such as 0.001 * 3000 may come out a hair above the whole number that is meant
    return min(numel, max(1, math.ceil(numel * density - 1e-9 * numel * density)))


@dataclass(frozen=True)
class TopK:
    """The entries of largest magnitude of each segment, with their positions in the whole vector.

    ``density`` in (0, 1] is the share of each segment that is kept (at least one entry). ``threshold`` says
    how they are found: `Exact()`, or `Sampled()` from a small sample of each segment, which may keep fewer,
    down to 0.8 of that count, and never keeps more. ``values`` and ``indices`` say how they are written.
    The payload has no header: values, then indices, and the number of slots follows from its length.
    """

    density: float
    values: FixedLength = Float32()
    indices: Indices = RunLength16()
    threshold: Threshold = Exact()

    def __post_init__(self) -> None:
        density_checked(self.density)
        if not isinstance(self.values, FixedLength):
            raise ValueError(f"values must be a codec of fixed length; got {self.values!r}")

    def encode(self, x: Tensor, layout: Layout, ctx: Context, state: State | None = None) -> Encoded:
        counts = [count_for(n, self.density) if n else 0 for n in layout]
        indices = self.threshold.select(_checked(x, layout), layout, counts, ctx.seed, ctx.round, ctx.party)
        values = x[indices]
        codes, slots = self.indices.pack(indices.cpu(), len(x))
        written = values
        if slots is not None:
            written = values.new_zeros(len(codes))
            written[slots.to(values.device)] = values
        coded = self.values.encode(written, (len(codes),), ctx)
        kept = coded.kept.dense()
        if slots is not None:
            kept = kept[slots.to(kept.device)]
        coded.payload.extend(codes.tobytes())
        return Encoded(coded.payload, Sparse(indices, kept, len(x)), state or {})

    def decode(self, payload: Payload, layout: Layout, ctx: Context) -> Sparse:
        view, numel = memoryview(payload), sum(layout)
        slots = bisect_left(range(len(view) + 1), len(view), key=self._size)
        if self._size(slots) != len(view):
            raise CodecError(f"no number of entries takes {len(view)} bytes in {self!r}")
        split = len(view) - slots * self.indices.width
        values = self.values.decode(view[:split], (slots,), ctx).dense()
        indices = self.indices.unpack(view[split:], numel)
        if slots and (int(indices[0]) < 0 or int(indices[-1]) >= numel or not _ascending(indices)):
            raise CodecError(f"positions must ascend within 0 .. {numel - 1}; got up to {int(indices.max())}")
        return Sparse(indices, values, numel)

    def _size(self, slots: int) -> int:
        return self.values.nbytes((slots,)) + slots * self.indices.width


def _ascending(indices: Tensor) -> bool:
    return bool((indices[1:] > indices[:-1]).all())


@dataclass(frozen=True)
class RandomK:
    """Entries at positions drawn from the shared stream: only values travel.

    Each segment keeps ``density`` of its entries (at least one). Positions depend on seed and round, and on
    the party unless ``common`` is true, in which case payloads of a round may be added as they are.
    ``unbiased`` multiplies what is kept by n/k, so that the expectation is the vector itself.
    """

    density: float
    values: FixedLength = Float32()
    common: bool = True
    unbiased: bool = False

    def __post_init__(self) -> None:
        density_checked(self.density)
        if not isinstance(self.values, FixedLength):
            raise ValueError(f"values must be a codec of fixed length; got {self.values!r}")

    def encode(self, x: Tensor, layout: Layout, ctx: Context, state: State | None = None) -> Encoded:
        indices, scale = self._positions(layout, ctx)
        values = _checked(x, layout)[indices.to(x.device)]
        if self.unbiased:
            values = values * scale.to(values.device, values.dtype)
        coded = self.values.encode(values, self._counts(layout), ctx)
        return Encoded(coded.payload, Sparse(indices.to(x.device), coded.kept.dense(), len(x)), state or {})

    def decode(self, payload: Payload, layout: Layout, ctx: Context) -> Sparse:
        values = self.values.decode(payload, self._counts(layout), ctx).dense()
        return Sparse(self._positions(layout, ctx)[0], values, sum(layout))

    def nbytes(self, layout: Layout) -> int:
        return self.values.nbytes(self._counts(layout))

    def _counts(self, layout: Layout) -> Layout:
        return tuple(count_for(n, self.density) if n else 0 for n in layout)

    def _positions(self, layout: Layout, ctx: Context) -> tuple[Tensor, Tensor]:
        draws = stream(ctx.seed, "random-k", ctx.round, -1 if self.common else ctx.party)
        offset, parts, scales = 0, [torch.empty(0, dtype=torch.int64)], [torch.empty(0)]
        for n, k in zip(layout, self._counts(layout), strict=True):
            parts.append(draws.choice(n, k) + offset)
            scales.append(torch.full((k,), n / max(k, 1)))
            offset += n
        return torch.cat(parts), torch.cat(scales)


@dataclass(frozen=True)
class Uniform:
    """Uniform quantiser: each segment is divided into steps of max|x| / (2^(bits-1) - 1), rounded to them.

    ``bits`` is 2, 4, 8 or 16. ``stochastic`` rounds up with the probability of the remainder, drawn from the
    stream of (seed, round, party), so that the expectation is the vector itself; otherwise to the nearest.
    The payload is one float32 step a segment, then the codes packed, least significant bits first.
    """

    bits: int
    stochastic: bool = False

    def __post_init__(self) -> None:
        if self.bits not in (2, 4, 8, 16):
            raise ValueError(f"bits must be 2, 4, 8 or 16; got {self.bits}")

    def encode(self, x: Tensor, layout: Layout, ctx: Context, state: State | None = None) -> Encoded:
        top = 2 ** (self.bits - 1) - 1
        vector = _checked(x, layout).detach().float().cpu()
        maxima = [float(p.abs().max()) if len(p) else 0.0 for p in torch.split(vector, list(layout))]
        steps = torch.tensor([m / top for m in maxima], dtype=torch.float32)
        if not bool(torch.isfinite(steps).all()):
            raise ValueError("x must be finite to be quantised; it holds NaN or infinity")
        per_entry = self._per_entry(steps, layout)
        levels = vector / torch.where(per_entry > 0, per_entry, 1.0)
        if self.stochastic:
            levels = (levels + stream(ctx.seed, "uniform", ctx.round, ctx.party).uniform(len(x))).floor()
        levels = levels.round().clamp(-top, top) + 0.0  # no -0, which a code cannot hold
        payload = bytearray(steps.numpy().astype("<f4").tobytes() + self._pack(levels))
        return Encoded(payload, Dense((levels * per_entry).to(x.device, x.dtype)), state or {})

    def decode(self, payload: Payload, layout: Layout, ctx: Context) -> Dense:
        if len(payload) != self.nbytes(layout):
            raise CodecError(f"{self!r} expects {self.nbytes(layout)} bytes; got {len(payload)}")
        view, head = memoryview(payload), 4 * len(layout)
        steps = torch.from_numpy(np.frombuffer(view[:head], dtype="<f4").copy())
        if not bool((steps.isfinite() & (steps >= 0)).all()):
            raise CodecError(f"steps must be finite and >= 0; got {float(steps.min())} .. {float(steps.max())}")
        return Dense(self._unpack(view[head:], sum(layout)) * self._per_entry(steps, layout))

    def nbytes(self, layout: Layout) -> int:
        return 4 * len(layout) + math.ceil(sum(layout) * self.bits / 8)

    @staticmethod
    def _per_entry(steps: Tensor, layout: Layout) -> Tensor:
        return torch.repeat_interleave(steps, torch.tensor(layout, dtype=torch.int64))

    def _pack(self, levels: Tensor) -> bytes:
        if self.bits == 16:
            return levels.numpy().astype("<i2").tobytes()
        per_byte, mask = 8 // self.bits, 2**self.bits - 1
        codes = levels.to(torch.int16).numpy() & mask
        codes = np.pad(codes, (0, -len(codes) % per_byte)).reshape(-1, per_byte)
        shifts = np.arange(per_byte) * self.bits
        return cast(bytes, (codes << shifts).sum(1).astype(np.uint8).tobytes())

    def _unpack(self, packed: Payload, numel: int) -> Tensor:
        if self.bits == 16:
            return torch.from_numpy(np.frombuffer(packed, dtype="<i2").astype(np.float32))
        per_byte, mask, sign = 8 // self.bits, 2**self.bits - 1, 2 ** (self.bits - 1)
        shifts = np.arange(per_byte) * self.bits
        codes = (np.frombuffer(packed, dtype=np.uint8)[:, None] >> shifts & mask).reshape(-1)[:numel]
        return torch.from_numpy(((codes ^ sign).astype(np.int16) - sign).astype(np.float32))


@dataclass(frozen=True)
class Split:
    """The first ``segments`` segments in the codec ``head``, the others in ``tail``, one after the other."""

    head: FixedLength
    tail: Codec
    segments: int

    def __post_init__(self) -> None:
        if not isinstance(self.head, FixedLength):
            raise ValueError(f"head must be a codec of fixed length; got {self.head!r}")
        if self.segments < 0:
            raise ValueError(f"segments must be >= 0; got {self.segments}")

    def encode(self, x: Tensor, layout: Layout, ctx: Context, state: State | None = None) -> Encoded:
        front, back = layout[: self.segments], layout[self.segments :]
        size = sum(front)
        head = self.head.encode(_checked(x, layout)[:size], front, ctx)
        tail = self.tail.encode(x[size:], back, ctx, state)
        head.payload.extend(tail.payload)
        return Encoded(head.payload, _joined(head.kept.dense(), tail.kept), tail.state)

    def decode(self, payload: Payload, layout: Layout, ctx: Context) -> Decoded:
        front, back = layout[: self.segments], layout[self.segments :]
        view, length = memoryview(payload), self.head.nbytes(front)
        if len(view) < length:
            raise CodecError(f"{self!r} expects at least {length} bytes; got {len(view)}")
        head = self.head.decode(view[:length], front, ctx).dense()
        return _joined(head, self.tail.decode(view[length:], back, ctx))


def _joined(head: Tensor, tail: Decoded) -> Decoded:
    if isinstance(tail, Dense):
        return Dense(torch.cat([head, tail.values.to(head.device)]))
    front = torch.arange(len(head), device=tail.indices.device)
    indices = torch.cat([front, tail.indices + len(head)])
    return Sparse(indices, torch.cat([head.to(tail.values.device), tail.values]), len(head) + tail.numel)
