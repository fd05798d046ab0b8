"""What passes between parties: an agreed schema, an anonymous payload, and the frame around it.

A `Schema` is agreed once a session; after that only payload bytes travel. On a transport each payload is
wrapped in a `Frame`, and reading a frame is what refuses input that is truncated, altered or not of this
session. Nothing here unpickles, and nothing is allocated beyond the bytes that arrived.
"""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any, TypeAlias

import torch

from cograd.core.streams import GENERATOR

Payload: TypeAlias = bytes | bytearray | memoryview


class FrameError(ValueError):
    """A frame was refused: truncated, altered, of another session, or not a frame at all."""


class SchemaError(ValueError):
    """A schema was refused: it cannot be read, or it is not the one that was agreed."""


@dataclass(frozen=True)
class Field:
    """One named tensor of a message."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32

    @property
    def numel(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class Schema:
    """What the parties of a session agree on: tensors in order, the codec, the generator of shared randomness.

    ``digest`` identifies it; parties compare digests when they join. ``dense_bytes`` is the size of the
    tensors as they are, the numerator of every compression ratio.
    """

    fields: tuple[Field, ...]
    codec: str
    generator: str = GENERATOR

    @cached_property
    def digest(self) -> str:
        return hashlib.blake2b(self.to_bytes(), digest_size=16).hexdigest()

    @property
    def dense_bytes(self) -> int:
        return sum(f.numel * f.dtype.itemsize for f in self.fields)

    def to_bytes(self) -> bytes:
        """The schema itself as bytes (canonical JSON): what a session pays once to set itself up."""
        fields = [[f.name, list(f.shape), str(f.dtype).removeprefix("torch.")] for f in self.fields]
        content = {"codec": self.codec, "fields": fields, "generator": self.generator}
        return json.dumps(content, separators=(",", ":"), sort_keys=True).encode()

    @classmethod
    def from_bytes(cls, data: Payload) -> Schema:
        """Inverse of `to_bytes`. Raises SchemaError for anything else."""
        try:
            content = json.loads(bytes(data))
            fields = tuple(_field(*entry) for entry in content["fields"])
            codec, generator = content["codec"], content["generator"]
            if not isinstance(codec, str) or not isinstance(generator, str):
                raise ValueError(f"codec and generator are text; got {type(codec)}, {type(generator)}")
            schema = cls(fields, codec, generator)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise SchemaError(f"not a schema: {error}") from None
        if schema.to_bytes() != bytes(data):
            raise SchemaError("not a schema in canonical form")
        return schema


# a table, since `getattr(torch, text)` would let text from elsewhere import and warn
_DTYPES = {str(d).removeprefix("torch."): d for d in vars(torch).values() if isinstance(d, torch.dtype)}


def _field(name: Any, shape: Any, dtype: Any) -> Field:
    if not isinstance(name, str) or dtype not in _DTYPES:
        raise ValueError(f"a field is a name, a shape and a dtype; got {name!r}, {dtype!r}")
    if not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError(f"the shape of {name!r} must hold sizes; got {shape!r}")
    return Field(name, tuple(shape), _DTYPES[dtype])


_HEADER = struct.Struct("<4sB3x16sQIIQ")  # magic, kind, session, round, sender, zero, payload length
_MAGIC = b"cgf1"
_SUM = 16


@dataclass(frozen=True)
class Frame:
    """A payload on its way: ``session`` (16 bytes), ``round`` and ``sender`` say what it belongs to.

    ``error`` marks a frame whose payload is a message for people: the sender cannot take part, and why.
    """

    session: bytes
    round: int
    sender: int
    payload: Payload
    error: bool = False

    HEAD = _HEADER.size
    """Bytes at a frame's beginning that tell its length; see `length_of`."""
    OVERHEAD = _HEADER.size + _SUM
    """Bytes that a frame adds to its payload."""

    def __post_init__(self) -> None:
        if len(self.session) != 16:
            raise ValueError(f"session must be 16 bytes (see session_id); got {len(self.session)}")
        if not 0 <= self.round < 2**64 or not 0 <= self.sender < 2**32:
            raise ValueError(
                f"round must be in 0 .. 2^64 - 1 and sender in 0 .. 2^32 - 1; got {self.round}, {self.sender}"
            )

    def pack(self) -> bytes:
        """Header, payload and checksum as bytes: inverse of `unpack`."""
        head = _HEADER.pack(
            _MAGIC, int(self.error), self.session, self.round, self.sender, 0, len(self.payload)
        )
        return b"".join((head, self.payload, _checksum(head, self.payload)))

    @classmethod
    def length_of(cls, head: Payload) -> int:
        """Bytes of the whole frame that begins with ``head`` (`HEAD` bytes). Raises FrameError if none does."""
        magic, kind, _, _, _, zero, length = _HEADER.unpack(head)
        if magic != _MAGIC or zero or kind > 1:
            raise FrameError("not a cograd frame")
        return cls.OVERHEAD + int(length)

    @classmethod
    def unpack(cls, data: Payload, session: bytes, round: int | None = None) -> Frame:
        """Read a frame of this session (and round, if given). Raises FrameError for anything else.

        The payload is a view of ``data``, not a copy.
        """
        view = memoryview(data)
        if len(view) < cls.OVERHEAD:
            raise FrameError(f"truncated: {len(view)} bytes, a frame has at least {cls.OVERHEAD}")
        head = view[: _HEADER.size]
        magic, kind, its_session, its_round, sender, zero, length = _HEADER.unpack(head)
        if magic != _MAGIC or zero or kind > 1:
            raise FrameError("not a cograd frame")
        if len(view) != cls.OVERHEAD + length:
            raise FrameError(f"{len(view)} bytes where the header announces {cls.OVERHEAD + length}")
        payload = view[_HEADER.size : _HEADER.size + length]
        if bytes(view[_HEADER.size + length :]) != _checksum(head, payload):
            raise FrameError(f"altered on the way: the checksum does not fit (sender says {sender})")
        if its_session != session:
            raise FrameError(f"foreign: session {its_session.hex()}, expected {session.hex()}")
        if round is not None and its_round != round:
            raise FrameError(f"round {its_round} from party {sender}, expected round {round}")
        return cls(its_session, its_round, sender, payload, bool(kind))


def _checksum(head: Payload, payload: Payload) -> bytes:
    digest = hashlib.blake2b(head, digest_size=_SUM)
    digest.update(payload)
    return digest.digest()


def session_id(*parts: str | int) -> bytes:
    """The 16-byte id of a session, from what its parties agree on (schema digest, run name, ...)."""
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).digest()
