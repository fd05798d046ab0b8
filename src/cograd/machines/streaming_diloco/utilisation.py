"""The compute-utilisation simulator (arXiv:2501.18512, Sec. 3.4): how fast a link a method needs.

A training step of L layers is a graph of 4L - 1 nodes: for each layer forward, backward for the activations
(not for the first layer), backward for the weights, and the reduction of its gradient or outer gradient. The
device computes one node after another, each in a third of its layer's share of the step time. The link carries
one reduction after another, each from the end of its layer's backward for the weights, and the forward of
that layer waits for it: in the next step, or with an overlap of tau in the one tau steps later. Utilisation is
the time spent computing over all time.

How the paper's simulator orders nodes and what a reduction costs on its link is not stated; here a reduction
takes the parameters' bits once over the bandwidth, and the layers are of equal size.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass


@dataclass(frozen=True)
class Model:
    """What is trained: ``parameters``, ``layers``, and ``step_time``, the seconds a step computes."""

    parameters: float
    layers: int
    step_time: float

    def __post_init__(self) -> None:
        if self.layers < 1 or not (self.parameters > 0 and self.step_time > 0):
            raise ValueError(f"parameters, layers and step_time must be positive; got {self}")


@dataclass(frozen=True)
class Traffic:
    """What a method sends: each of ``fragments`` strided groups of layers every ``sync_every`` steps, at
    ``bits`` a parameter, with ``overlap`` steps to arrive. The defaults are data-parallel in bfloat16."""

    bits: float = 16
    sync_every: int = 1
    fragments: int = 1
    overlap: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.fragments <= self.sync_every or not self.bits > 0 or self.overlap < 0:
            raise ValueError(f"1 <= fragments <= sync_every, bits > 0 and overlap >= 0 are needed; got {self}")


def utilisation(model: Model, traffic: Traffic, gbit_per_second: float, cycles: int = 2) -> float:
    """The share of time spent computing, in (0, 1], over ``cycles`` times the steps between two exchanges."""
    if not gbit_per_second > 0:
        raise ValueError(f"gbit_per_second must be > 0; got {gbit_per_second}")
    layers, node = model.layers, model.step_time / (3 * model.layers)
    reduction = model.parameters / layers * traffic.bits / (gbit_per_second * 1e9)
    due: dict[int, dict[int, float]] = defaultdict(dict)  # by step, then by layer: when its reduction is over
    steps = max(cycles * traffic.sync_every, 20)
    clock = link = 0.0
    for step in range(1, steps + 1):
        awaited = due.pop(step, {})
        for layer in range(layers):
            clock = max(clock, awaited.get(layer, 0.0)) + node
        sent = _sent(step, layers, traffic)
        for layer in reversed(range(layers)):
            clock += node
            if layer in sent:
                link = max(link, clock) + reduction
                due[step + 1 + traffic.overlap][layer] = link
            clock += node if layer else 0.0
    # the next steps would wait for what is under way beyond the time that they may overlap it with
    rest = max(
        (t - (at - steps - 1) * model.step_time for at, of in due.items() for t in of.values()), default=0.0
    )
    compute = steps * node * (3 * layers - 1)
    return compute / max(clock, rest)


def _sent(step: int, layers: int, traffic: Traffic) -> frozenset[int]:
    """The layers whose fragment is sent in a step."""
    phases = {p * traffic.sync_every // traffic.fragments: p for p in range(traffic.fragments)}
    p = phases.get(step % traffic.sync_every)
    return frozenset() if p is None else frozenset(range(p, layers, traffic.fragments))


def bandwidth_for(target: float, model: Model, traffic: Traffic) -> float:
    """The bandwidth in Gbit/s at which ``target`` utilisation is reached, to within 1 %."""
    if not 0 < target < 1:
        raise ValueError(f"target must be in (0, 1); got {target}")
    low, high = 1e-3, 1e5
    while high / low > 1.01:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if utilisation(model, traffic, middle) >= target else (middle, high)
    return high
