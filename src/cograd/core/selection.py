"""Finding the entries of largest magnitude in each segment of a vector, without sorting it.

Two thresholds: `Exact` finds the top k of every segment; `Sampled` estimates the k-th magnitude from a strided
sample (arXiv:1712.01887, Sec. 5) and may return fewer than k. Both look only into blocks whose maximum reaches
the threshold, so that one pass over the vector serves every threshold that is tried.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from cograd.core.streams import stream

BLOCK = 32
UNDER = 0.8
"""A sampled threshold that finds fewer than this share of k entries is given up for an exact search."""


class Threshold(Protocol):
    """How a sparse codec finds what to keep."""

    def select(
        self, x: Tensor, layout: tuple[int, ...], counts: list[int], seed: int, round: int, party: int
    ) -> Tensor:
        """Ascending positions (int64) in the whole vector: at most ``counts[j]`` of segment j."""


@dataclass(frozen=True)
class Exact:
    """The ``counts[j]`` entries of largest magnitude of each segment; ties go to the lower position."""

    def select(
        self, x: Tensor, layout: tuple[int, ...], counts: list[int], seed: int, round: int, party: int
    ) -> Tensor:
        parts, offset = [_none(x)], 0
        for part, k in zip(torch.split(x, list(layout)), counts, strict=True):
            parts.append(exact(part, k) + offset)
            offset += len(part)
        return torch.cat(parts)


@dataclass(frozen=True)
class Sampled:
    """A threshold from about ``ratio`` of each segment's entries, sampled at a stride from a random start.

    The number found lies in [0.8 k, k]. Where more pass the threshold, the largest k of them are kept. Where
    fewer do, the segment is searched exactly: the paper's code lowers the threshold by 0.8 until enough pass
    and then keeps the largest k of those, which is the exact top k too but for the rare threshold that lands
    between. Segments of fewer than ``exact_below`` entries are searched exactly, which takes no longer there.
    ``ratio`` = 1 is `Exact` throughout.

    The start is drawn from the stream of (seed, round, party), so a run can be repeated bit for bit.
    """

    ratio: float = 0.01
    exact_below: int = 1 << 22

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= 1:
            raise ValueError(f"ratio must be in (0, 1]; got {self.ratio}")

    def select(
        self, x: Tensor, layout: tuple[int, ...], counts: list[int], seed: int, round: int, party: int
    ) -> Tensor:
        starts = stream(seed, "sampled-threshold", round, party)
        parts, offset = [_none(x)], 0
        for part, k in zip(torch.split(x, list(layout)), counts, strict=True):
            n = len(part)
            stride = sample_stride(n, k / n, self.ratio) if n >= self.exact_below else 1
            found = exact(part, k) if stride == 1 else sampled(part, k, stride, starts.integer(stride))
            parts.append(found + offset)
            offset += n
        return torch.cat(parts)


def sample_stride(numel: int, density: float, ratio: float) -> int:
    """The stride that samples max(ratio n, 2 / density) entries; odd, so that it does not lock onto one
    channel. 1 where the sample would be everything."""
    wanted = max(math.ceil(ratio * numel), math.ceil(2 / density))
    if wanted >= numel:
        return 1
    stride = 32 * math.ceil(numel / wanted / 32) + 1
    while stride > 1 and numel // stride < wanted:
        stride -= 8
    return max(stride, 1)


def sampled(x: Tensor, k: int, stride: int, start: int) -> Tensor:
    """Positions of about the k largest magnitudes, from a threshold estimated on ``x[start::stride]``."""
    sample = x[start::stride].abs()
    rank = min(len(sample), math.ceil(len(sample) * k / len(x)))
    threshold = kth_largest(sample, rank)
    blocks = Blocks(x)
    found = blocks.reaching(threshold)
    if len(found) < UNDER * k:
        return exact(x, k, blocks)
    return found if len(found) <= k else found[largest(x[found].abs(), k)]


def exact(x: Tensor, k: int, blocks: Blocks | None = None) -> Tensor:
    """Positions of the k largest magnitudes, ascending; ties go to the lower position."""
    if k == 0:
        return _none(x)
    blocks = blocks or Blocks(x)
    if k > len(blocks.maxima) // 2:
        return largest(x.abs(), k)
    # The k-th largest block maximum is reached by at least k entries, so no entry of the top k lies below it.
    found = blocks.reaching(kth_largest(blocks.maxima, k))
    return found[largest(x[found].abs(), k)]


def _none(x: Tensor) -> Tensor:
    return torch.empty(0, dtype=torch.int64, device=x.device)


def largest(magnitudes: Tensor, k: int) -> Tensor:
    """Ascending positions of the k largest entries; ties go to the lower position."""
    if k >= len(magnitudes):
        return torch.arange(len(magnitudes), device=magnitudes.device)
    values, kth = _array(magnitudes), _array(kth_largest(magnitudes, k))
    found = _where(values >= kth)
    surplus = len(found) - k
    if surplus:
        tied = _where(values[found] == kth)
        keep = torch.ones(len(found), dtype=torch.bool, device=magnitudes.device)
        keep[tied[len(tied) - surplus :]] = False
        found = found[_array(keep)]
    return torch.as_tensor(found)


def kth_largest(values: Tensor, k: int) -> Tensor:
    """The k-th largest value (0-d). NumPy partitions with vector instructions, several times as fast as
    `torch.topk` on a CPU."""
    array = _array(values)
    if isinstance(array, Tensor):
        return values.topk(k, sorted=False).values.min()
    at = len(array) - k
    return torch.from_numpy(np.partition(array, at)[at : at + 1])[0]


def positions(mask: Tensor) -> Tensor:
    """Ascending positions (int64) where a one-dimensional mask is true."""
    return torch.as_tensor(_where(_array(mask)))


class Blocks:
    """Maxima of |x| over strided blocks of 32, and the entries that reach a threshold.

    Block j holds x[j], x[j + m], x[j + 2m], ... with m = n // 32: reducing over the rows of a (32, m) view
    runs at memory speed, where `nonzero` over all of x takes ten times as long.
    """

    def __init__(self, x: Tensor) -> None:
        self.x = x
        self.columns = len(x) // BLOCK
        self.body = x[: BLOCK * self.columns].view(BLOCK, self.columns)
        self.tail = x[BLOCK * self.columns :]

    @cached_property
    def maxima(self) -> Tensor:
        if not self.columns:
            return self.x.new_empty(0)
        return torch.maximum(self.body.amax(0), self.body.amin(0).neg_())

    def reaching(self, threshold: Tensor) -> Tensor:
        """Ascending positions where |x| >= threshold."""
        limit = _array(threshold)
        columns = _where(_array(self.maxima) >= limit)
        if len(columns) > self.columns // 2:
            return positions(self.x.abs() >= threshold)
        candidates = self.body.index_select(1, torch.as_tensor(columns)).abs_()
        hits = _where(_array(candidates).reshape(-1) >= limit)
        rows = hits // max(len(columns), 1)
        found = torch.as_tensor(rows * self.columns + columns[hits - rows * len(columns)])
        if not len(self.tail):
            return found
        return torch.cat([found, positions(self.tail.abs() >= threshold) + BLOCK * self.columns])


def _array(x: Tensor) -> Any:
    """A CPU tensor as a NumPy array, whose calls on the small arrays here cost a fraction of torch's."""
    return x if x.device.type != "cpu" or x.dtype == torch.bfloat16 else x.numpy()


def _where(mask: Any) -> Any:
    return mask.nonzero().squeeze(1) if isinstance(mask, Tensor) else np.flatnonzero(mask)
