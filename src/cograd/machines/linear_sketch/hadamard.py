"""The Walsh-Hadamard transform in place, as butterflies: additions only, in one fixed order.

The result is the same bits on every machine, device and number of threads, which a product with a Hadamard
matrix would not promise; and tiles that stay in the processor's cache make it about as fast as an FFT.
"""

from __future__ import annotations

import torch
from torch import Tensor

TILE = 1 << 18
"""Elements a tile: two of float32 make 2 MB, about a core's second-level cache."""


def fwht_(x: Tensor) -> Tensor:
    """Each row of ``x`` (n, D), contiguous, times the Hadamard matrix H_D of +-1 (not normalised), in place.

    D is a power of two. Costs D log2 D additions a row, and a temporary of `TILE` elements at most.
    """
    size = x.shape[1]
    if size & (size - 1) or not size:
        raise ValueError(f"rows must have a power of two of elements; got {size}")
    if size > TILE:
        for row in x:
            _in_two_passes(row)
        return x
    for tile in x.split(max(1, TILE // size)):
        done = _butterflies(tile, torch.empty_like(tile), size)
        if done is not tile:
            tile.copy_(done)
    return x


def _in_two_passes(x: Tensor) -> None:
    """One long row as a matrix: first the butterflies between its rows, then those within each row."""
    outer = 1 << (x.numel().bit_length() - 1) // 2
    inner = x.numel() // outer
    matrix, width, height = x.view(outer, inner), TILE // outer, TILE // inner
    first, second = x.new_empty(TILE), x.new_empty(TILE)
    for columns in matrix.split(width, 1):
        tile = first.view(outer, width)
        tile.copy_(columns)
        columns.copy_(_butterflies(tile, second.view(outer, width), outer, width))
    for rows in matrix.split(height):
        tile = first.view(inner, height)  # transposed, so that neighbours in memory never meet
        tile.copy_(rows.t())
        rows.copy_(_butterflies(tile, second.view(inner, height), inner, height).t())


def _butterflies(x: Tensor, other: Tensor, size: int, columns: int = 1) -> Tensor:
    """All log2(size) stages along an axis of ``size`` elements with ``columns`` behind it, the widest first.

    ``x`` and ``other`` take turns; the one that holds the result is returned.
    """
    half = size // 2
    while half:
        source, target = (t.view(-1, 2, half * columns) for t in (x, other))
        torch.add(source[:, 0], source[:, 1], out=target[:, 0])
        torch.sub(source[:, 0], source[:, 1], out=target[:, 1])
        x, other, half = other, x, half // 2
    return x
