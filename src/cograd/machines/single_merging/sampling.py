"""Non-IID data of nodes: one Dirichlet draw of class weights for each node, and rows drawn by those weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cograd.core.streams import stream


def class_weighted(
    labels: Tensor, nodes: int, samples: int, alpha: float, seed: int, *, draw: int | None = None
) -> Tensor:
    """Row indices (nodes, samples), int64, of what each node holds.

    A node's class weights are one draw of Dir(alpha) over the classes, and a row is drawn in proportion to its
    class's weight, so that large classes count for more. Nodes may hold the same row. ``draw`` None is data
    *fixed* on the node, each row at most once there; a number is that round's fresh draw (*resample*), with
    replacement, from the same class weights.

    Raises ValueError unless labels are 1-D integers, ``nodes`` and ``samples`` >= 1, alpha is positive and, for
    fixed data, ``samples`` is at most the number of rows.
    """
    if labels.ndim != 1 or labels.is_floating_point():
        raise ValueError(f"labels must be 1-D integers; got {labels.dtype} of shape {tuple(labels.shape)}")
    if nodes < 1:
        raise ValueError(f"nodes must be >= 1; got {nodes}")
    if samples < 1 or (draw is None and samples > len(labels)):
        raise ValueError(f"samples must be in 1 .. {len(labels)} rows; got {samples}")
    if not 0 < alpha < math.inf:
        raise ValueError(f"alpha must be positive and finite; got {alpha}")
    classes, codes = labels.unique(return_inverse=True)
    held = []
    for node in range(nodes):
        mix = stream(seed, "class-weights", node).dirichlet(alpha, len(classes))
        row = torch.from_numpy(mix)[codes].clamp_min(1e-300).numpy()
        rows = stream(seed, "samples", node, -1 if draw is None else draw).numpy
        chosen = rows.choice(len(labels), samples, replace=draw is not None, p=row / row.sum())
        held.append(torch.from_numpy(chosen))
    return torch.stack(held)
