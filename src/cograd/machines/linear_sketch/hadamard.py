"""The Walsh-Hadamard transform in place, as butterflies: additions only, in one fixed order.

The result is the same bits on every machine, device and number of threads, which a product with a Hadamard
matrix would not promise; and tiles that stay in the processor's cache make it about as fast as an FFT.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

TILE = 1 << 17
"""Elements a tile: two of float32 make 1 MB, half a core's second-level cache."""


def fwht_(x: Tensor) -> Tensor:
    """Each row of ``x`` (n, D), contiguous, times the Hadamard matrix H_D of +-1 (not normalised), in place.

    D is a power of two. Costs D log2 D additions a row, and two temporary tiles a thread.
    """
    size = x.shape[1]
    if size & (size - 1) or not size:
        raise ValueError(f"rows must have a power of two of elements; got {size}")
    rows: Any = x.numpy() if x.device.type == "cpu" else x
    if size > TILE:
        for row in rows:
            _in_two_passes(row)
        return x
    height = max(1, TILE // size)
    for at in range(0, len(rows), height):
        tile = rows[at : at + height]
        tile[...] = _butterflies(tile, _empty_like(tile), size)
    return x


def _in_two_passes(x: Any) -> None:
    """One long row as a matrix: first the butterflies between its rows, then those within each row."""
    size = len(x)
    outer = 1 << (size.bit_length() - 1) // 2
    inner = size // outer
    matrix, width, height = x.reshape(outer, inner), TILE // outer, TILE // inner

    def columns(starts: Sequence[int]) -> None:
        first, second = _pair(x, outer, width)
        for at in starts:
            first[...] = matrix[:, at : at + width]
            matrix[:, at : at + width] = _butterflies(first, second, outer, width)

    def rows(starts: Sequence[int]) -> None:
        first, second = _pair(x, inner, height)
        for at in starts:  # transposed, so that neighbours in memory never meet
            first[...] = matrix[at : at + height].T
            matrix[at : at + height] = _butterflies(first, second, inner, height).T

    _shared_out(columns, range(0, inner, width))
    _shared_out(rows, range(0, outer, height))


def _shared_out(work: Callable[[Sequence[int]], None], starts: range) -> None:
    """Do the tiles of a pass on as many threads as torch may use.

    A thread takes whole tiles: operators that divide a tile among threads would wait for each other at every
    stage, thousands of times, which a busy machine does not forgive.
    """
    threads = torch.get_num_threads()
    if threads == 1:
        work(starts)
        return
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, [starts[i::threads] for i in range(threads)]))


def _butterflies(x: Any, other: Any, size: int, columns: int = 1) -> Any:
    """All log2(size) stages along an axis of ``size`` elements with ``columns`` behind it, the widest first.

    ``x`` and ``other`` (both numpy's, or both torch's) take turns; the one that holds the result is returned.
    """
    add, subtract = (np.add, np.subtract) if isinstance(x, np.ndarray) else (torch.add, torch.sub)
    half = size // 2
    while half:
        source, target = (t.reshape(-1, 2, half * columns) for t in (x, other))
        add(source[:, 0], source[:, 1], out=target[:, 0])
        subtract(source[:, 0], source[:, 1], out=target[:, 1])
        x, other, half = other, x, half // 2
    return x


def _pair(like: Any, *shape: int) -> tuple[Any, Any]:
    if isinstance(like, np.ndarray):
        return np.empty(shape, like.dtype), np.empty(shape, like.dtype)
    return like.new_empty(shape), like.new_empty(shape)


def _empty_like(x: Any) -> Any:
    return np.empty_like(x) if isinstance(x, np.ndarray) else torch.empty_like(x)
