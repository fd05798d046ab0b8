"""Contents as bytes: vectors through a codec, everything else as it is.

A tensor that has as many elements as the model and a floating dtype is a *vector* and goes through the codec of
its direction. Booleans travel as bits, other tensors in their own dtype. Names, shapes and dtypes are a
`Schema`: it is paid for once a session and direction, and never travels with the payload.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from cograd.core.codecs import Codec, CodecError, Context, FixedLength, Float32, Layout, tensor_of
from cograd.core.message import Field, Payload, Schema
from cograd.engines.federated.protocol import Content, State

CODEC = "engine.codec"
"""Prefix of the names under which a codec's own state lies in a client's state."""


@dataclass(frozen=True)
class Wire:
    """One direction of a session, between parties whose vectors have this layout.

    Contents that are packed arrive as `unpack` reads them: with a codec that loses something, the receiver's
    vector is the decoded one.
    """

    layout: Layout
    codec: Codec = Float32()

    @cached_property
    def numel(self) -> int:
        return sum(self.layout)

    @cached_property
    def _fixed(self) -> int | None:
        """Bytes of an encoded vector; None if they depend on it."""
        return self.codec.nbytes(self.layout) if isinstance(self.codec, FixedLength) else None

    def schema(self, content: Content) -> Schema:
        """What the receiver must know to read it. Raises TypeError for a content that holds no tensor."""
        for name, value in content.items():
            if not isinstance(value, Tensor):
                raise TypeError(f"content {name!r} must be a tensor; got {type(value).__name__}")
        fields = tuple(Field(name, tuple(t.shape), t.dtype) for name, t in content.items())
        return Schema(fields, repr(self.codec))

    def pack(self, content: Content, ctx: Context, state: State | None = None) -> bytes:
        """The payload. Lengths of data-dependent encodings lead their field, as 4 bytes.

        What a codec remembers is taken from ``state`` and put there; without one it must remember nothing.
        """
        parts: list[bytes | bytearray] = []
        for field in self.schema(content).fields:
            tensor = content[field.name].detach()
            if self._is_vector(field):
                payload = self._encoded(field.name, tensor.reshape(-1), ctx, state)
                if self._fixed is None:
                    parts.append(len(payload).to_bytes(4, "little"))
                parts.append(payload)
            elif field.dtype == torch.bool:
                parts.append(np.packbits(tensor.cpu().numpy().reshape(-1)).tobytes())
            else:
                parts.append(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return b"".join(parts)

    def unpack(self, payload: Payload, schema: Schema, ctx: Context) -> Content:
        """Read a payload. Raises CodecError for one that no content of this schema packs to."""
        view, at, content = memoryview(payload), 0, Content()
        for field in schema.fields:
            if self._is_vector(field):
                size = self._vector_size(view, at)
                at += 4 if self._fixed is None else 0
                decoded = self.codec.decode(self._part(view, at, size), self.layout, ctx).dense()
                content[field.name] = decoded.to(field.dtype).view(field.shape)
            elif field.dtype == torch.bool:
                size = (field.numel + 7) // 8
                bits = np.frombuffer(self._part(view, at, size), np.uint8)
                flags = np.unpackbits(bits, count=field.numel).astype(bool)
                content[field.name] = torch.from_numpy(flags).view(field.shape)
            else:
                size = field.numel * field.dtype.itemsize
                content[field.name] = tensor_of(self._part(view, at, size), field.dtype).view(field.shape)
            at += size
        if at != len(view):
            raise CodecError(f"a payload of {at} bytes is expected; got {len(view)}")
        return content

    def _is_vector(self, field: Field) -> bool:
        return field.numel == self.numel and field.dtype.is_floating_point

    def _encoded(self, name: str, vector: Tensor, ctx: Context, state: State | None) -> bytearray:
        prefix = f"{CODEC}.{name}."
        own = {key.removeprefix(prefix): t for key, t in (state or {}).items() if key.startswith(prefix)}
        encoded = self.codec.encode(vector, self.layout, ctx, own)
        if encoded.state and state is None:
            raise ValueError(f"a codec that remembers must be on the uplink; got {self.codec!r} on the other")
        if state is not None:
            state.update({prefix + key: t for key, t in encoded.state.items()})
        return encoded.payload

    def _vector_size(self, view: memoryview, at: int) -> int:
        return int.from_bytes(self._part(view, at, 4), "little") if self._fixed is None else self._fixed

    @staticmethod
    def _part(view: memoryview, at: int, size: int) -> memoryview:
        """A copy of a part, laid out as torch lays out tensors: what is computed from it does not depend on
        where it lay."""
        part = view[at : at + size]
        if len(part) < size:
            raise CodecError(f"truncated: {len(view)} bytes, {at + size} are needed")
        copied = torch.empty(size, dtype=torch.uint8).numpy().data
        copied[:] = part
        return copied
