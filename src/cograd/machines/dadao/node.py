"""One node: its six vectors, how they flow between events, and what the two kinds of events do to them.

The node never sees another one: it flows, takes a gradient of its own objective, and exchanges one vector with
a neighbour. Everything is local, so the same code runs under a simulated clock and in a process of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

Gradient: TypeAlias = Callable[[Tensor, int], Tensor]
"""``gradient(x, k)``: a node's gradient at x (d,), which it must not change; k = 0, 1, ... counts its calls, so
that a minibatch can be drawn as a function of k and a resumed run draws the same ones."""

DTYPES = (torch.float32, torch.float64)
FLOAT32_LIMIT = 1e4
"""The largest L / mu for which float32 state is taken."""


@dataclass(frozen=True)
class Constants:
    """Constants of the flow and of the jumps; `of` gives the paper's. A name ending in _t has a tilde there.

    ``beta_t = 0`` or ``gamma_t = 0`` (`dataclasses.replace`) switch the acceleration of the averaging or of the
    gradients off.
    """

    nu: float
    eta: float
    alpha: float
    alpha_t: float
    theta: float
    gamma: float
    gamma_t: float
    delta: float
    delta_t: float
    beta: float
    beta_t: float

    @classmethod
    def of(cls, mu: float, L: float, chi1: float) -> Constants:
        """From strong convexity mu and smoothness L, each the worst of all nodes, and chi_1 of the *rate*
        Laplacian. Raises ValueError unless 0 < mu <= L < infinity."""
        if not 0 < mu < math.inf:
            raise ValueError(f"mu must be a positive number; got {mu}")
        if not mu <= L < math.inf:
            raise ValueError(f"L must be a number >= mu = {mu}; got {L}")
        nu = mu / 2
        s = math.sqrt(nu / L)
        return cls(
            nu=nu,
            eta=s / 8,
            alpha=s / 4,
            alpha_t=s / 8,
            theta=1 / (2 * s),
            gamma=1 / (4 * L),
            gamma_t=1 / (4 * math.sqrt(L * nu)),
            delta=s / 4,
            delta_t=1.0,
            beta=0.5,
            beta_t=2 * chi1 / s,
        )

    @property
    def drift(self) -> np.ndarray:
        """A of the flow d/dt s = A s, on the rows x, x~, y, y~, z, z~ (6, 6)."""
        a = np.zeros((6, 6))
        a[0, :2] = -self.eta, self.eta
        a[1, :2] = self.eta, -self.eta
        a[2, 2:4] = -self.alpha, self.alpha
        a[3, 1:5] = -self.theta * self.nu, -self.theta, 0, -self.theta
        a[4, 4:] = -self.alpha, self.alpha
        a[5, 4:] = self.alpha_t, -self.alpha_t
        return a


class Flow:
    """expm(A h) in closed form: A has eigenvalues 0 (twice), -2 eta, -(alpha + alpha~) and a complex pair.

    ``expm(A h) = B0 + e^(-2 eta h) B1 + e^(-(alpha + alpha~) h) B2 + e^(-alpha h / 2) (cos(w h) B3 + sin(w h)
    B4)`` with constant matrices, from the eigenvectors. float64 whatever the state's dtype.
    """

    def __init__(self, c: Constants) -> None:
        mean_x, mean_z = np.zeros(6), np.zeros(6)  # what the flow keeps of a state
        mean_x[:2] = 0.5
        mean_z[4:] = np.array([c.alpha_t, c.alpha]) / (c.alpha + c.alpha_t)
        e = np.eye(6)
        half_x, gap_z = e[0] - mean_x, e[4] - mean_z
        fast_x, fast_z = 2 * c.eta, c.alpha + c.alpha_t
        forced_x, forced_z = _forced(c, fast_x), _forced(c, fast_z)
        still = np.outer([1, 1, -c.nu, -c.nu, 0, 0], mean_x) + np.outer([0, 0, -1, -1, 1, 1], mean_z)
        along_x = np.outer([1, -1, *(-c.nu * forced_x), 0, 0], half_x)
        along_z = np.outer([0, 0, *forced_z, 1, -c.alpha_t / c.alpha], gap_z)
        swing = e - still - along_x - along_z
        w = math.sqrt(c.alpha * c.theta - c.alpha**2 / 4)
        turn = (c.drift + c.alpha / 2 * e) @ swing / w
        self._basis = np.stack([still, along_x, along_z, swing, turn]).reshape(5, 36)
        self._fast_x, self._fast_z, self._slow, self._w = fast_x, fast_z, c.alpha / 2, w
        self._weights = np.ones(5)
        self._matrix = np.empty((6, 6))

    def matrix(self, h: float) -> np.ndarray:
        """expm(A h), float64 (6, 6); the array is this object's and is overwritten by the next call."""
        weights, fading = self._weights, math.exp(-self._slow * h)
        weights[1] = math.exp(-self._fast_x * h)
        weights[2] = math.exp(-self._fast_z * h)
        weights[3] = fading * math.cos(self._w * h)
        weights[4] = fading * math.sin(self._w * h)
        np.dot(weights, self._basis, out=self._matrix.reshape(36))
        return self._matrix

    def __call__(self, state: Any, h: float) -> None:
        """Let the state (6, d), a numpy array or a tensor, flow for h in place."""
        if isinstance(state, Tensor):
            state.copy_(torch.as_tensor(self.matrix(h), dtype=state.dtype, device=state.device) @ state)
        else:
            state[...] = self.matrix(h) @ state


def _forced(c: Constants, rate: float) -> np.ndarray:
    """(y, y~) that follow a force nu x~ + z = e^(-rate t)."""
    k = -c.theta / (c.theta - rate + rate**2 / c.alpha)
    return np.array([k, k * (1 - rate / c.alpha)])


class Node:
    """A node of the network.

    Args:
        state: (6, d), the rows x, x~, y, y~, z, z~; float32 or float64; changed in place. `fresh` makes one.
        gradient: of its own objective.
        constants, flow: the network's.
        average: keep the running mean of x over the node's own events, for gradients of minibatches.

    ``time`` is that of its last event; the rows are as they were then (lazy flow). On the CPU the rows are
    numpy views of ``state``, which cost less a touch than tensors do. Memory: 6 d numbers, 7 d with
    ``average``.
    """

    def __init__(
        self, state: Tensor, gradient: Gradient, constants: Constants, flow: Flow, average: Tensor | None = None
    ) -> None:
        self.gradient, self.constants, self.flow = gradient, constants, flow
        self.time, self.events, self.gradients = 0.0, 0, 0
        self.point = state[0]
        self.state = touchable(state)
        self.x, self.x_t, self.y, self.y_t, self.z, self.z_t = self.state
        self.average = touchable(average) if average is not None else None

    @staticmethod
    def fresh(x0: Tensor) -> Tensor:
        """The first state at x0 (d,): everything but x is zero."""
        state = torch.zeros((6, *x0.shape), dtype=x0.dtype, device=x0.device)
        state[0] = x0
        return state

    def advance(self, time: float) -> None:
        """Flow to a time. Raises ValueError for one that is past."""
        if time < self.time:
            raise ValueError(f"time must be >= that of the node's last event, {self.time}; got {time}")
        if time > self.time:
            self.flow(self.state, time - self.time)
            self.time = time

    def on_gradient(self, time: float) -> None:
        """A gradient event: x and x~ descend, y~ moves by the same vector.

        Raises FloatingPointError if the gradient is not finite, ValueError if its shape is wrong; the node has
        then flowed to ``time`` and is otherwise unchanged.
        """
        self.advance(time)
        c = self.constants
        g = self._gradient() - c.nu * self.x - self.y_t
        self.x -= c.gamma * g
        self.x_t -= c.gamma_t * g
        self.y_t += (c.delta + c.delta_t) * g
        self.gradients += 1
        self._count()

    def message(self, time: float) -> Any:
        """What the node tells a neighbour at an edge event: y + z (d,) at that time."""
        self.advance(time)
        return self.y + self.z

    def on_message(self, time: float, theirs: Any) -> None:
        """An edge event, given the neighbour's message of the same time: z and z~ move towards agreement.

        The neighbour moves by the exact negative, so that the sums of z and of z~ over the nodes stay zero.
        """
        self.advance(time)
        gap = self.y + self.z - theirs
        self.z -= self.constants.beta * gap
        self.z_t -= self.constants.beta_t * gap
        self._count()

    def _gradient(self) -> Any:
        found = self.gradient(self.point, self.gradients)
        if found.shape != self.point.shape:
            raise ValueError(f"gradient must have shape {tuple(self.point.shape)}; got {tuple(found.shape)}")
        g = touchable(found.detach())
        if not math.isfinite(g @ g):
            raise FloatingPointError(
                f"gradient {self.gradients} is not finite at time {self.time:g}: is L too small, mu too large?"
            )
        return g

    def _count(self) -> None:
        self.events += 1
        if self.average is not None:
            self.average += (self.x - self.average) / self.events


def touchable(x: Tensor) -> Any:
    """The tensor as what its device is fastest at for short vectors: numpy on the CPU, the tensor elsewhere."""
    return x.numpy() if x.device.type == "cpu" else x


def check_state(x0: Tensor, mu: float, L: float) -> None:
    """Raise TypeError for a dtype the flow cannot have, ValueError for float32 at a large L / mu."""
    if x0.dtype not in DTYPES:
        raise TypeError(f"x0 must be float32 or float64 (the flow needs that precision); got {x0.dtype}")
    if x0.dtype == torch.float32 and L / mu > FLOAT32_LIMIT:
        raise ValueError(f"x0 must be float64 where L / mu > {FLOAT32_LIMIT:g}; got float32 at {L / mu:g}")
