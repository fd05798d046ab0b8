"""The random matrices R (rows x numel) of a sketch, each given by how it is drawn and applied.

A kind is a frozen value. ``apply`` adds R x to y and ``adjoint`` writes R^T y to x, for several vectors at
once: x is (n, numel), y is (n, rows). R is never there as a whole: it is drawn again at every use from the same
stream, on the CPU, block by block, so that both directions, all parties and all devices see one matrix.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from cograd.core.streams import Stream
from cograd.machines.linear_sketch.hadamard import fwht_

BLOCK = 3 << 13
"""Columns drawn at once by the sparse kinds and for signs: what they need stays in the processor's cache, and
torch does not divide its operators on them among threads, which would then wait for each other all the time."""
TILE = 1 << 20
"""Entries of R drawn at once by the dense kinds."""


class Kind(Protocol):
    """One construction of R. ``numel`` and ``rows`` are its columns and rows."""

    @property
    def omega(self) -> float:
        """E||R^T R h||^2 / ||h||^2 - 1, the same for every h."""

    @property
    def norm(self) -> float | None:
        """A bound of R's largest singular value that holds for every draw; None where there is none."""

    def apply(self, draws: Stream, x: Tensor, y: Tensor) -> None: ...

    def adjoint(self, draws: Stream, y: Tensor, x: Tensor) -> None: ...

    def sample(self, draws: Stream) -> bytes:
        """The first of what R is drawn from, to compare generators."""


@dataclass(frozen=True)
class Dense:
    """Independent entries of variance 1/rows: Gaussian, or signs (AMS). Costs rows * numel a use."""

    numel: int
    rows: int
    gaussian: bool

    norm = None

    @property
    def omega(self) -> float:
        return (self.numel + (1 if self.gaussian else -1)) / self.rows

    def apply(self, draws: Stream, x: Tensor, y: Tensor) -> None:
        for rows, columns, tile in self._tiles(draws):
            y[:, rows] += x[:, columns] @ tile.to(x.device, x.dtype).t()
        y.mul_(self.rows**-0.5)

    def adjoint(self, draws: Stream, y: Tensor, x: Tensor) -> None:
        x.zero_()
        for rows, columns, tile in self._tiles(draws):
            x[:, columns] += y[:, rows] @ tile.to(x.device, x.dtype)
        x.mul_(self.rows**-0.5)

    def sample(self, draws: Stream) -> bytes:
        return next(self._tiles(draws))[2][:, :4096].numpy().tobytes()

    def _tiles(self, draws: Stream) -> Iterator[tuple[slice, slice, Tensor]]:
        """R as tiles of unit variance, in whole rows where one fits."""
        height, width = max(1, TILE // self.numel), min(self.numel, TILE)
        for rows in _slices(self.rows, height):
            for columns in _slices(self.numel, width):
                shape = rows.stop - rows.start, columns.stop - columns.start
                yield rows, columns, draws.normal(*shape) if self.gaussian else _signs(draws, *shape)


@dataclass(frozen=True)
class SRHT:
    """Subsampled randomised Hadamard transform: sqrt(D/rows) S (H_D / sqrt(D)) diag(signs).

    D is the power of two that numel is padded to, S draws ``rows`` of D rows without replacement. Costs
    D log2 D; the padded vector is its one temporary.
    """

    numel: int
    rows: int

    @property
    def padded(self) -> int:
        return 1 << (self.numel - 1).bit_length()

    @property
    def omega(self) -> float:
        if self.padded == 1:
            return 0.0
        return (self.numel - 1) * (self.padded - self.rows) / (self.rows * (self.padded - 1))

    @property
    def norm(self) -> float:
        return math.sqrt(self.padded / self.rows)

    def apply(self, draws: Stream, x: Tensor, y: Tensor) -> None:
        rows = self._rows(draws).to(x.device)
        work = x.new_empty(len(x), self.padded)
        work[:, self.numel :] = 0
        for columns, signs in self._flips(draws):
            work[:, columns] = _flipped(x[:, columns], signs.to(x.device))
        torch.index_select(fwht_(work), 1, rows, out=y)
        y.mul_(self.rows**-0.5)

    def adjoint(self, draws: Stream, y: Tensor, x: Tensor) -> None:
        rows = self._rows(draws).to(y.device)
        work = y.new_zeros(len(y), self.padded)
        work.index_copy_(1, rows, y * self.rows**-0.5)
        fwht_(work)
        for columns, signs in self._flips(draws):
            x[:, columns] = _flipped(work[:, columns], signs.to(x.device))

    def sample(self, draws: Stream) -> bytes:
        return self._rows(draws).numpy().tobytes() + next(self._flips(draws))[1][:4096].numpy().tobytes()

    def _rows(self, draws: Stream) -> Tensor:
        return _distinct(draws, self.padded, self.rows)

    def _flips(self, draws: Stream) -> Iterator[tuple[slice, Tensor]]:
        for columns in _slices(self.numel, BLOCK):
            yield columns, _sign_bits(draws, columns.stop - columns.start)


@dataclass(frozen=True)
class Sparse:
    """``nonzeros`` entries of +-1/sqrt(nonzeros) in distinct rows of each column; one is the count sketch.

    A random word of 32 bits is an entry's sign and its row, which is uniform but for a relative 2^-31 rows.
    Costs nonzeros * numel.
    """

    numel: int
    rows: int
    nonzeros: int

    @property
    def omega(self) -> float:
        return (self.numel - 1) / self.rows

    norm = None

    def apply(self, draws: Stream, x: Tensor, y: Tensor) -> None:
        for columns, entries in self._blocks(draws):
            for rows, signs in entries:
                part = _flipped(x[:, columns], signs.to(x.device))
                y.scatter_add_(1, rows.to(y.device).expand(len(y), -1), part)
        self._scale(y)

    def adjoint(self, draws: Stream, y: Tensor, x: Tensor) -> None:
        for columns, entries in self._blocks(draws):
            for i, (rows, signs) in enumerate(entries):
                part = y.gather(1, rows.to(y.device).expand(len(y), -1))
                part = _flipped(part, signs.to(y.device))
                if i:
                    x[:, columns] += part
                else:
                    x[:, columns] = part
        self._scale(x)

    def sample(self, draws: Stream) -> bytes:
        _, entries = next(self._blocks(draws))
        return b"".join(t[:4096].numpy().tobytes() for entry in entries for t in entry)

    def _scale(self, out: Tensor) -> None:
        if self.nonzeros > 1:
            out.mul_(self.nonzeros**-0.5)

    def _blocks(self, draws: Stream) -> Iterator[tuple[slice, list[tuple[Tensor, Tensor]]]]:
        """Blocks of columns: for each of their entries, the rows (int64) and the sign bits (int32).

        Distinct rows by Floyd's algorithm, in all columns of a block at once: a row that was taken before
        gives way to the last one of those that were open.
        """
        for columns in _slices(self.numel, BLOCK):
            entries: list[tuple[Tensor, Tensor]] = []
            for last in range(self.rows - self.nonzeros, self.rows):
                words = _words(draws, columns.stop - columns.start)
                rows = np.multiply(words >> 1, np.uint64(last + 1), dtype=np.uint64)
                rows >>= np.uint64(31)
                words <<= 31
                drawn = torch.from_numpy(rows.view(np.int64))
                for taken, _ in tuple(entries):
                    drawn.masked_fill_(drawn == taken, last)
                entries.append((drawn, torch.from_numpy(words.view(np.int32))))
            yield columns, entries


@dataclass(frozen=True)
class RandomK:
    """``rows`` coordinates drawn without replacement, times sqrt(numel/rows): a control, no real mixing."""

    numel: int
    rows: int

    @property
    def omega(self) -> float:
        return self.numel / self.rows - 1

    @property
    def norm(self) -> float:
        return math.sqrt(self.numel / self.rows)

    def apply(self, draws: Stream, x: Tensor, y: Tensor) -> None:
        torch.index_select(x, 1, _distinct(draws, self.numel, self.rows).to(x.device), out=y)
        y.mul_(self.norm)

    def adjoint(self, draws: Stream, y: Tensor, x: Tensor) -> None:
        chosen = _distinct(draws, self.numel, self.rows).to(x.device)
        x.zero_().index_copy_(1, chosen, y * self.norm)

    def sample(self, draws: Stream) -> bytes:
        return _distinct(draws, self.numel, self.rows).numpy().tobytes()


# Random bits, rows and signs.


def _slices(stop: int, size: int) -> Iterator[slice]:
    return (slice(at, min(at + size, stop)) for at in range(0, stop, size))


def _words(draws: Stream, count: int) -> np.ndarray:
    """Random words of 32 bits, as the generator makes them."""
    raw = draws.numpy.bit_generator.random_raw((count + 1) // 2)
    return np.asarray(raw).view(np.uint32)[:count]


def _sign_bits(draws: Stream, count: int) -> Tensor:
    """Random signs as int32 words that are 0 but for their top bit: 32 of them from a random word."""
    words = torch.from_numpy(_words(draws, -(-count // 32)).view(np.int32))
    shifted = words[:, None] << torch.arange(32, dtype=torch.int32)
    return shifted.bitwise_and_(-(2**31)).view(-1)[:count]


def _signs(draws: Stream, *shape: int) -> Tensor:
    """Random signs as float32 +-1."""
    count = math.prod(shape)
    bits = np.unpackbits(_words(draws, -(-count // 32)).view(np.uint8), count=count)
    return torch.from_numpy(bits).float().mul_(-2).add_(1).view(shape)


def _flipped(x: Tensor, signs: Tensor) -> Tensor:
    """x (n, m) with the sign bit of its columns flipped where ``signs`` (m,) has it: a new tensor."""
    if x.dtype == torch.float32:
        return (x.view(torch.int32) ^ signs).view(torch.float32)
    return (x.view(torch.int64) ^ (signs.long() << 32)).view(torch.float64)


def _distinct(draws: Stream, n: int, k: int) -> Tensor:
    """k distinct members of 0 .. n - 1, ascending (int64), each set equally likely; memory is O(min(k, n - k)).

    Distinct values of independent draws are a uniform set of their size, and stay one when some are dropped at
    random. Beyond a half, those that stay out are drawn instead.
    """
    if 2 * k > n:
        inside = np.ones(n, dtype=bool)
        inside[_distinct(draws, n, n - k).numpy()] = False
        return torch.from_numpy(np.flatnonzero(inside))
    found = np.empty(0, dtype=np.uint32)
    while len(found) < k:
        # draws that make k distinct ones with a little to spare: n ln(n / (n - k))
        count = math.ceil(1.01 * n * math.log(n / (n - k))) + 16 if not len(found) else k - len(found) + 16
        more = draws.numpy.integers(0, n, count, dtype=np.uint32)
        found = _unique(np.concatenate([found, more]))
    spare = len(found) - k
    if spare:
        found = np.delete(found, draws.numpy.choice(len(found), spare, replace=False, shuffle=False))
    return torch.from_numpy(found.astype(np.int64))


def _unique(values: np.ndarray) -> np.ndarray:
    values.sort()
    first = np.empty(len(values), dtype=bool)
    first[:1] = True
    np.not_equal(values[1:], values[:-1], out=first[1:])
    return np.asarray(values[first])
