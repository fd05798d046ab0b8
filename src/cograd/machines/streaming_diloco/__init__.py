"""Streaming DiLoCo (arXiv:2501.18512), in the order of its paper.

- `fragments`: which parameters are synchronised together (Sec. 2.2);
- `schedule`: when each of them is (Sec. 2.2);
- `e3m0`: how outer gradients are written in four bits (Sec. 2.4);
- `outer`: the outer parameters and their optimizer (Eq. 1-2);
- `method`: sending, receiving tau steps later, mixing (Algorithm 2, Eq. 3), around a training loop;
- `utilisation`: what a link makes of it: the compute-utilisation simulator (Sec. 3.4).
"""

from cograd.machines.streaming_diloco.e3m0 import E3M0
from cograd.machines.streaming_diloco.fragments import groups, transformer, whole
from cograd.machines.streaming_diloco.method import ReplicasApart, StreamingDiLoCo
from cograd.machines.streaming_diloco.outer import nesterov

__all__ = ["E3M0", "ReplicasApart", "StreamingDiLoCo", "groups", "nesterov", "transformer", "whole"]
