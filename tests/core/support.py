"""What several tests of core share: vectors, bit comparison, and ways to damage bytes."""

from __future__ import annotations

import random
from collections.abc import Iterator

import torch
from torch import Tensor

from cograd.core.streams import stream


def gaussian(n: int, *key: int | str, dtype: torch.dtype = torch.float32) -> Tensor:
    """n normal values of a key, in a dtype."""
    return stream("tests", *key).normal(n).to(dtype)


def cauchy(n: int, *key: int | str) -> Tensor:
    """n Cauchy values: no variance, so a few entries are larger than all the others together."""
    draws = stream("tests", *key)
    return draws.normal(n) / draws.normal(n).abs().clamp_min(1e-6)


def bits(x: Tensor) -> Tensor:
    """A tensor's bytes, so that -0 and 0 differ and NaN equals itself."""
    return x.detach().reshape(-1, 1).view(torch.uint8)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def mutations(originals: list[bytes], count: int, seed: int) -> Iterator[bytes]:
    """``count`` damaged versions of some byte strings, of each of `_KINDS` in turn."""
    rng = random.Random(seed)
    for i in range(count):
        data = bytearray(rng.choice(originals))
        kind = _KINDS[i % len(_KINDS)]
        at = rng.randrange(len(data)) if data else 0
        if kind == "flip" and data:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == "change" and data:
            for _ in range(rng.randint(1, 4)):
                data[rng.randrange(len(data))] = rng.randrange(256)
        elif kind == "cut":
            del data[at:]
        elif kind == "cut the front":
            del data[: at + 1]
        elif kind == "extend":
            data += rng.randbytes(rng.randint(1, 20))
        elif kind == "insert":
            data[at:at] = rng.randbytes(rng.randint(1, 8))
        elif kind == "splice":
            other = rng.choice(originals)
            data = data[:at] + bytearray(other[rng.randint(0, len(other)) :])
        elif kind == "zero":
            end = min(len(data), at + rng.randint(1, 16))
            data[at:end] = bytes(end - at)
        else:
            data = bytearray(rng.randbytes(rng.randint(0, 120)))
        yield bytes(data)


_KINDS = ("flip", "change", "cut", "cut the front", "extend", "insert", "splice", "zero", "noise")
