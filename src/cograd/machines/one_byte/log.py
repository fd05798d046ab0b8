"""The log of a run: who took part in each round, and their bytes. With the start it is the whole run.

A newcomer replays it, a crash is repaired from it, and a fine-tuned model ships as it: ``nbytes`` is one byte
an estimate, whatever the model's size.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, overload

from cograd.core.message import Payload

_MAGIC = b"cgob1\0"
_LENGTH = struct.Struct("<I")
_SUM = 16
_SAME, _MEMBERS = 0, 1


class LogError(ValueError):
    """Bytes that are no log, or a log that does not continue this one."""


class Round(NamedTuple):
    """One round: the members in canonical order, and the bytes of each, one after the other."""

    members: tuple[int, ...]
    codes: bytes

    def payloads(self, width: int) -> list[bytes]:
        """Each member's bytes, of which there are ``width``."""
        return [self.codes[at : at + width] for at in range(0, len(self.codes), width)]


class Log:
    """Rounds in order, behind a header that says what they belong to (JSON).

    ``width`` is the number of bytes a member sends a round.
    """

    def __init__(self, header: Mapping[str, Any], width: int) -> None:
        if width < 1:
            raise ValueError(f"width must be >= 1 byte a member and round; got {width}")
        self.header, self.width = dict(header), width
        self._rounds: list[Round] = []
        self._chain = [hashlib.blake2b(digest_size=8).digest()]

    def __len__(self) -> int:
        return len(self._rounds)

    def __iter__(self) -> Iterator[Round]:
        return iter(self._rounds)

    @overload
    def __getitem__(self, at: int) -> Round: ...
    @overload
    def __getitem__(self, at: slice) -> list[Round]: ...
    def __getitem__(self, at: int | slice) -> Round | list[Round]:
        return self._rounds[at]

    def __repr__(self) -> str:
        return f"Log({len(self)} rounds, {self.nbytes} bytes of codes, {self.digest()})"

    @property
    def nbytes(self) -> int:
        """Bytes of all codes: what the run takes to ship, besides its start and who took part."""
        return sum(len(r.codes) for r in self._rounds)

    def digest(self, rounds: int | None = None) -> str:
        """Of the first ``rounds`` rounds (of all if None): two logs agree so far if these do."""
        return self._chain[len(self) if rounds is None else rounds].hex()

    def append(self, members: tuple[int, ...], codes: Payload) -> None:
        """Add a round. Raises LogError where the bytes do not fit the members or a member comes twice."""
        if len(set(members)) != len(members) or not all(0 <= m < 2**32 for m in members):
            raise LogError(f"members must be distinct ids of 0 .. 2^32 - 1; got {members}")
        if len(codes) != self.width * len(members):
            raise LogError(f"{len(members)} members have {self.width * len(members)} bytes; got {len(codes)}")
        entry = Round(tuple(members), bytes(codes))
        packed = struct.pack(f"<I{len(members)}I", len(members), *members) + entry.codes
        self._rounds.append(entry)
        self._chain.append(hashlib.blake2b(self._chain[-1] + packed, digest_size=8).digest())

    def tail(self, start: int = 0) -> bytes:
        """Rounds from ``start`` on as bytes, for `rounds_of`."""
        out, known = bytearray(), None
        for entry in self._rounds[start:]:
            if entry.members != known:
                known = entry.members
                out += struct.pack(f"<BH{len(known)}I", _MEMBERS, len(known), *known)
            else:
                out.append(_SAME)
            out += entry.codes
        return bytes(out)

    def rounds_of(self, tail: Payload) -> Iterator[Round]:
        """Inverse of `tail`. Raises LogError for anything else."""
        data, at, members = bytes(tail), 0, None
        while at < len(data):
            tag, at = data[at], at + 1
            try:
                if tag == _MEMBERS:
                    (count,) = struct.unpack_from("<H", data, at)
                    members = struct.unpack_from(f"<{count}I", data, at + 2)
                    at += 2 + 4 * count
                elif tag != _SAME or members is None:
                    raise LogError(f"no round begins with byte {tag} at {at - 1}")
            except struct.error:
                raise LogError("the last round is cut short") from None
            end = at + self.width * len(members)
            if end > len(data):
                raise LogError("the last round is cut short")
            yield Round(members, data[at:end])
            at = end

    def to_bytes(self) -> bytes:
        """Header, rounds and a checksum."""
        head = json.dumps({"header": self.header, "width": self.width}, sort_keys=True).encode()
        body = _MAGIC + _LENGTH.pack(len(head)) + head + self.tail()
        return body + hashlib.blake2b(body, digest_size=_SUM).digest()

    @classmethod
    def from_bytes(cls, data: Payload) -> Log:
        """Inverse of `to_bytes`. Raises LogError for what was altered, cut or never a log."""
        body, checksum = bytes(data[:-_SUM]), bytes(data[-_SUM:])
        if not body.startswith(_MAGIC) or hashlib.blake2b(body, digest_size=_SUM).digest() != checksum:
            raise LogError("not a log, or altered: its beginning or its checksum does not fit")
        start = len(_MAGIC) + _LENGTH.size
        (length,) = _LENGTH.unpack_from(body, len(_MAGIC))
        head = json.loads(body[start : start + length])
        log = cls(head["header"], head["width"])
        for entry in log.rounds_of(body[start + length :]):
            log.append(*entry)
        return log

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it to a file, which takes its name only when all is written."""
        part = Path(path).with_name(Path(path).name + ".part")
        part.write_bytes(self.to_bytes())
        os.replace(part, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Log:
        """Read what `save` wrote. Raises LogError for another file."""
        return cls.from_bytes(Path(path).read_bytes())
