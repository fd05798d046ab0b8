"""Random numbers that every party can draw again: a stream is a pure function of its key.

``stream(seed, "round", 3, "party", 1)`` gives the same numbers on every machine and device. The key tuple is
hashed with BLAKE2b into the 128-bit key of a Philox counter generator, so distinct keys do not collide as
32-bit seeds do; floats are drawn as float32 on the CPU and then moved.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

GENERATOR = "blake2b-philox4x64/1"
"""Id of this construction; a `Schema` names it, so that parties with another one are refused."""

Key: TypeAlias = int | str | bytes


def _encode(part: Key) -> bytes:
    """One part of a key as bytes, with its type and length, so that no two tuples read the same."""
    if isinstance(part, bool) or not isinstance(part, int | str | bytes):
        raise TypeError(f"a stream's key holds int, str and bytes; got {part!r} of type {type(part).__name__}")
    if isinstance(part, int):
        tag, raw = b"i", part.to_bytes((part.bit_length() + 8) // 8, "little", signed=True)
    elif isinstance(part, str):
        tag, raw = b"s", part.encode()
    else:
        tag, raw = b"b", part
    return tag + struct.pack("<Q", len(raw)) + raw


class Stream:
    """Numbers drawn in order from the generator of one key. Make it with `stream`."""

    def __init__(self, key: tuple[Key, ...]) -> None:
        digest = hashlib.blake2b(b"".join(map(_encode, key)), digest_size=16).digest()
        self.numpy = np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))

    def normal(self, *shape: int, device: torch.device | str = "cpu") -> Tensor:
        """Standard normal float32 values."""
        return torch.from_numpy(self.numpy.standard_normal(shape, dtype=np.float32)).to(device)

    def uniform(self, *shape: int, device: torch.device | str = "cpu") -> Tensor:
        """Uniform float32 values in [0, 1)."""
        return torch.from_numpy(self.numpy.random(shape, dtype=np.float32)).to(device)

    def integer(self, high: int) -> int:
        """One integer of 0 .. high - 1."""
        return int(self.numpy.integers(high))

    def permutation(self, n: int) -> Tensor:
        """A random order of 0 .. n - 1 (int64)."""
        return torch.from_numpy(self.numpy.permutation(n))

    def choice(self, n: int, k: int) -> Tensor:
        """k distinct members of 0 .. n - 1, ascending (int64)."""
        if not 0 <= k <= n:
            raise ValueError(f"k must be in 0 .. n = {n}; got {k}")
        return torch.from_numpy(np.sort(self.numpy.choice(n, size=k, replace=False, shuffle=False)))

    def dirichlet(self, alpha: float | Sequence[float], k: int | None = None) -> np.ndarray:
        """One draw from Dirichlet(alpha): k symmetric parts, or one part for each entry of alpha (float64)."""
        return self.numpy.dirichlet([alpha] * (k or 0) if isinstance(alpha, int | float) else list(alpha))


def stream(*key: Key) -> Stream:
    """The stream of a key: the run's seed first, then whatever tells this draw from every other."""
    if not key:
        raise ValueError("a stream needs a key: pass at least the run's seed")
    return Stream(key)


def seed_for(*key: Key) -> int:
    """A 63-bit seed of a key, for a library that wants one integer (`torch.manual_seed`)."""
    return int(stream(*key).numpy.integers(2**63))
