"""Where DIFF2's noise and secret batches come from."""

from __future__ import annotations

import os
import random
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from cograd.core.streams import Key, stream

NoiseKind = Literal["stream", "secure"]


class Noise(Protocol):
    """Standard normal vectors and random batches, each for a key."""

    def normal(self, numel: int, *key: Key) -> Tensor: ...

    def batch(self, records: int, size: int, *key: Key) -> Tensor: ...


class StreamNoise:
    """Noise that is a function of (seed, key): reproducible, and known to whoever knows the seed.

    For experiments. It protects nobody: the seed takes the noise off again.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def normal(self, numel: int, *key: Key) -> Tensor:
        """Standard normal float32 values (numel,)."""
        return stream(self.seed, "diff2", "noise", *key).normal(numel)

    def batch(self, records: int, size: int, *key: Key) -> Tensor:
        """``size`` distinct members of 0 .. records - 1, ascending (int64)."""
        return stream(self.seed, "diff2", "batch", *key).choice(records, size)


class SecureNoise:
    """Noise from the operating system's cryptographic generator, for deployments.

    A floating-point normal by one Box-Muller pair betrays in its low bits which values it could not have been;
    each value here is half the sum of four such normals, which makes undoing it infeasible (Holohan & Braghin,
    arXiv:2107.10138). A run with it cannot be repeated bit by bit.
    """

    def normal(self, numel: int, *key: Key) -> Tensor:
        """Standard normal float64 values (numel,)."""
        radius, angle = (_uniform(2 * numel) for _ in range(2))
        pairs = np.sqrt(-2 * np.log(radius)) * np.stack([np.cos(2 * np.pi * angle), np.sin(2 * np.pi * angle)])
        return torch.from_numpy(pairs.reshape(4, numel).sum(0) / 2)

    def batch(self, records: int, size: int, *key: Key) -> Tensor:
        """``size`` distinct members of 0 .. records - 1, ascending (int64)."""
        return torch.tensor(sorted(random.SystemRandom().sample(range(records), size)))


def _uniform(count: int) -> np.ndarray:
    """Uniform float64 in the open interval (0, 1)."""
    bits = np.frombuffer(os.urandom(8 * count), dtype=np.uint64)
    return ((bits >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52


def noise_of(kind: NoiseKind, seed: int) -> Noise:
    if kind not in ("stream", "secure"):
        raise ValueError(f"noise must be 'stream' or 'secure'; got {kind!r}")
    return StreamNoise(seed) if kind == "stream" else SecureNoise()
