"""A multilayer perceptron for small images."""

from __future__ import annotations

from itertools import pairwise

from torch import nn


class MLP(nn.Sequential):
    """Flatten, then linear layers of the given widths with ReLU between: (B, ...) -> (B, widths[-1]).

    ``MLP(784, 256, 128, 10)`` has 235,146 parameters.
    """

    def __init__(self, *widths: int) -> None:
        if len(widths) < 2 or min(widths) < 1:
            raise ValueError(f"widths must be two or more sizes >= 1; got {widths}")
        layers: list[nn.Module] = [nn.Flatten()]
        for n_in, n_out in pairwise(widths):
            layers += [nn.Linear(n_in, n_out), nn.ReLU()]
        super().__init__(*layers[:-1])
