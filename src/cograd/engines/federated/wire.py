"""Contents as bytes: vectors through a codec, everything else as it is.

A tensor that has as many elements as the model and a floating dtype is a *vector* and goes through the codec of
its direction. Booleans travel as bits, other tensors in their own dtype. Names, shapes and dtypes are a
`Schema`: it is paid for once a session and direction, and never travels with the payload.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cograd.core.codecs import Codec, CodecError, Context, Float32, Layout, tensor_of
from cograd.core.message import Field, Payload, Schema
from cograd.engines.federated.protocol import Content


@dataclass(frozen=True)
class Wire:
    """One direction of a session, between parties whose vectors have this layout.

    Contents that are packed arrive as `unpack` reads them: with a codec that loses something, the receiver's
    vector is the decoded one.
    """

    layout: Layout
    codec: Codec = Float32()

    @property
    def numel(self) -> int:
        return sum(self.layout)

    def schema(self, content: Content) -> Schema:
        """What the receiver must know to read it."""
        fields = tuple(Field(name, tuple(t.shape), t.dtype) for name, t in content.items())
        return Schema(fields, repr(self.codec))

    def pack(self, content: Content, ctx: Context) -> bytes:
        """The payload. Lengths of data-dependent encodings lead their field, as 4 bytes."""
        parts: list[bytes | bytearray] = []
        for field in self.schema(content).fields:
            tensor = content[field.name].detach()
            if self._is_vector(field):
                payload = self.codec.encode(tensor.reshape(-1), self.layout, ctx).payload
                if not hasattr(self.codec, "nbytes"):
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
                at += 0 if hasattr(self.codec, "nbytes") else 4
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

    def _vector_size(self, view: memoryview, at: int) -> int:
        if hasattr(self.codec, "nbytes"):
            return int(self.codec.nbytes(self.layout))
        return int.from_bytes(self._part(view, at, 4), "little")

    @staticmethod
    def _part(view: memoryview, at: int, size: int) -> bytearray:
        part = view[at : at + size]
        if len(part) < size:
            raise CodecError(f"truncated: {len(view)} bytes, {at + size} are needed")
        return bytearray(part)


def clone(content: Content) -> dict[str, Tensor]:
    """A copy whose tensors are nobody else's."""
    return {name: tensor.clone() for name, tensor in content.items()}
