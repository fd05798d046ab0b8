"""PCGrad (Yu et al. 2020, arXiv 2001.06782, algorithm 1): conflicts are projected away, pair by pair.

    for each i:  g_i' <- g_i;  for the others j in random order:
                 if g_i' . g_j < 0:  g_i' <- g_i' - (g_i' . g_j / |g_j|^2) g_j
    the mean of the g_i'

Where nobody is in conflict it is the mean. FedGH (arXiv 2309.06692) projects clients' changes so, and the
released code of FedLD has a server rule of this kind.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cograd.clients.fedld.combining import GramRule
from cograd.core.streams import Stream


@dataclass(frozen=True)
class PCGrad(GramRule):
    """A rule for `FedLD`, or for any matrix of gradients; the original divides by nothing, which is the sum."""

    def weights(self, grams: Tensor, draws: Stream) -> Tensor:
        entries, rows, _ = grams.shape
        parts = torch.eye(rows, dtype=grams.dtype).repeat(entries, 1, 1)  # g_i' = sum_m parts[i, m] g_m
        squares = grams.diagonal(dim1=-2, dim2=-1)
        orders = [[j for j in draws.permutation(rows).tolist() if j != i] for i in range(rows)]
        for others in zip(*orders, strict=True):
            j = torch.tensor(others)
            dots = (parts * grams[:, j]).sum(-1)  # g_i' . g_j(i)
            share = torch.where(dots < 0, dots / squares[:, j], 0.0)
            parts[:, torch.arange(rows), j] -= share
        return parts.mean(1)
