"""Information between groups, predictions and clients, and its decomposition; all of it in nats.

Arrays are float64 and may have leading dimensions, one joint distribution for each. Their last axes are the
client s, the group z, and the prediction h.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

Array = np.ndarray

TOLERANCE = 1e-10
"""Nats by which a unique information may exceed the least one."""

_ITERATIONS = 200
_TO_BOUNDARY = 0.995
_DOWN, _NEAR = 0.1, 3.0
_ROUNDING, _REFINEMENTS = 1e-13, 3


def mutual(p: Array) -> Array:
    """I(A;B) of joints (..., A, B)."""
    return np.asarray(_divergence(p, p.sum(-1, keepdims=True) * p.sum(-2, keepdims=True)).sum((-2, -1)))


def conditional(p: Array) -> Array:
    """I(A;B|S) = sum_s P(s) I(A;B|S=s) of joints (..., S, A, B)."""
    mass = p.sum((-2, -1), keepdims=True)
    independent = p.sum(-1, keepdims=True) * p.sum(-2, keepdims=True)
    product = np.divide(independent, mass, out=np.zeros_like(independent), where=mass > 0)
    return np.asarray(_divergence(p, product).sum((-3, -2, -1)))


def _divergence(p: Array, q: Array) -> Array:
    """p ln(p / q), 0 where p is 0."""
    some = p > 0
    ratio = np.divide(p, q, out=np.ones_like(p), where=some)
    terms: Array = p * np.log(ratio)
    return terms


@dataclass(frozen=True)
class Unique:
    """Unique information ``value`` (...), the joints ``joint`` (..., S, Z, H) that have it, and a bound ``gap``
    on what it may be too large by."""

    value: Array
    joint: Array
    gap: Array


def unique(p: Array, tolerance: float = TOLERANCE) -> Unique:
    """The unique information of H about Z with respect to S (BROJA, arXiv 1311.2852) of joints (..., S, Z, H).

    The least I_Q(Z;H|S) over all Q with Q(z,h) = P(z,h) and Q(s,z) = P(s,z). With P(z|s) fixed this is

        min  sum q ln(q / Q(s,h))    q(s,z,.) sums to P(s,z),  q(.,z,h) sums to P(z,h),  q >= 0

    a convex program whose feasible set is, for each z, the couplings of s and h. It is solved by a primal-dual
    interior-point method, all joints at once. A Newton system has a block of Z + H unknowns for each client and
    a block of Z H joins them: time grows in proportion to the clients. Cells that must be 0 (an empty group of
    a client, a prediction that a group never gets) are left out. For any multipliers b(z,h) of the second
    constraint,

        value - least  <=  sum_{s,z} ( sum_h q (ln(q / Q) + b) - P(s,z) min_h (ln(q / Q) + b) ),

    which is the gap that ends the iteration and is returned. Raises RuntimeError where it stays above 100 times
    the tolerance.
    """
    *leading, clients, groups, predictions = p.shape
    flat = np.asarray(p, float).reshape(-1, clients, groups, predictions)
    joint, gap = np.empty_like(flat), np.full(len(flat), np.inf)
    todo = np.arange(len(flat))
    walk = _Walk(flat.sum(3), flat.sum(1))
    for _ in range(_ITERATIONS):
        joint[todo], gap[todo] = walk.q, walk.gap
        going = walk.gap > tolerance
        if not going.any():
            break
        todo = todo[going]
        walk.keep(going)
        walk.step()
    if len(gap) and gap.max() > 100 * tolerance:
        raise RuntimeError(
            f"unique information is known to {gap.max():.1g} nats only after {_ITERATIONS} iterations; "
            f"tolerance must be larger than {tolerance:.1g} for this joint"
        )
    value = conditional(joint).reshape(leading)
    return Unique(np.maximum(value, 0.0), joint.reshape(p.shape), gap.reshape(leading))


class _Walk:
    """The iterates of `unique`: ``q`` (B, S, Z, H) is feasible, ``w`` >= 0 its multipliers, ``b`` (B, Z, H)
    those of the column sums.

    A Newton step solves (diag((1 + w) / q) - 1 1^T / Q) dq = -(r + a + b), where the matrix acts along z and r
    is the gradient less mu / q. Its inverse is diag(t) + t t^T / c with t = q / (1 + w) and c = sum_z t w, and
    no digits are lost in these, though the matrix is singular in the limit. With e(s,h) = t^T (r + a + b) / c
    as unknowns besides a(s,z) and b(z,h), the system is symmetric and quasi-definite.
    """

    def __init__(self, sz: Array, zh: Array) -> None:
        self.sz, self.zh = sz, zh
        mass, product = zh.sum(2)[:, None, :, None], sz[..., None] * zh[:, None]
        self.q = np.divide(product, mass, out=np.zeros_like(product), where=mass > 0)
        self.live = self.q > 0
        self.w = np.where(self.live, 1.0, 0.0)
        self.b = np.zeros_like(zh)
        self.free = (zh > 0) & (np.arange(zh.shape[2]) != zh.argmax(2)[..., None])  # one b of each z may be 0
        self._look()

    def keep(self, which: Array) -> None:
        if not which.all():
            for name, value in vars(self).items():
                setattr(self, name, value[which])

    def _look(self) -> None:
        """The gradient ln(q / Q(s,h)) and the certified gap."""
        total = self.q.sum(2, keepdims=True)
        self.gradient = np.log(np.divide(self.q, total, out=np.ones_like(self.q), where=self.live))
        priced = self.gradient + self.b[:, None]
        least = np.where(self.live, priced, np.inf).min(3)
        least[self.sz == 0] = 0
        self.gap = (self.q * priced).sum((1, 2, 3)) - (self.sz * least).sum((1, 2))

    def step(self) -> None:
        """A step toward less complementarity, or to the centre for as long as the gap is far above it."""
        q, w, live = self.q, self.w, self.live
        held = (q * w).sum((1, 2, 3))
        centre = np.where(self.gap <= _NEAR * held, _DOWN, 1.0) * held / live.sum((1, 2, 3))
        target = np.divide(centre[:, None, None, None], q, out=np.zeros_like(q), where=live)
        move, self.b = self._newton(self.gradient - target)
        stiff = np.divide(w, q, out=np.zeros_like(q), where=live)
        turn = np.where(live, target - w - stiff * move, 0.0)
        self.q = q + self._length(q, move) * move
        self.w = w + self._length(w, turn) * turn
        self._look()

    def _newton(self, r: Array) -> tuple[Array, Array]:
        """The move of ``q``, and ``b``; refined while rounding shows in the sums that the move should keep."""
        inverse = np.divide(1, self.q, out=np.zeros_like(self.q), where=self.live)
        total = self.q.sum(2, keepdims=True)
        total = np.divide(1, total, out=np.zeros_like(total), where=total > 0)
        rows, columns = self.q.sum(3) - self.sz, self.q.sum(1) - self.zh
        move, a, b = self._solve(r, rows, columns)
        for _ in range(_REFINEMENTS):
            rows, columns = (self.q + move).sum(3) - self.sz, (self.q + move).sum(1) - self.zh
            if max(np.abs(rows).max(), np.abs(columns).max()) < _ROUNDING:
                break
            bent = (1 + self.w) * inverse * move - total * move.sum(2, keepdims=True)
            left = np.where(self.live, r + a[..., None] + b[:, None] + bent, 0.0)
            more = self._solve(left, rows, columns)
            move, a, b = move + more[0], a + more[1], b + more[2]
        return move, b

    def _solve(self, r: Array, rows: Array, columns: Array) -> tuple[Array, Array, Array]:
        """The move that takes away these excesses of the sums over h (B, S, Z) and s (B, Z, H), a, and b.

        Each client's a and e are eliminated, then b is solved for.
        """
        batch, clients, groups, predictions = r.shape
        z, h, n = np.arange(groups), np.arange(predictions), groups * predictions
        t = self.q / (1 + self.w)
        held, soft, pull = t.sum(3), (t * self.w).sum(2), t * r
        block = np.zeros((batch, clients, groups + predictions, groups + predictions))
        block[:, :, z, z] = np.where(held > 0, held, 1.0)
        block[:, :, groups + h, groups + h] = -np.where(soft > 0, soft, 1.0)
        block[:, :, :groups, groups:] = t
        block[:, :, groups:, :groups] = np.swapaxes(t, 2, 3)
        known = np.zeros((batch, clients, groups + predictions, groups, predictions))
        known[:, :, z, z] = t
        known[:, :, groups + h, :, h] = np.moveaxis(t, 3, 0)
        coupling = known.reshape(batch, clients, -1, n)
        right = np.concatenate([rows - pull.sum(3), -pull.sum(2)], 2)[..., None]
        solved = np.linalg.solve(block, np.concatenate([coupling, right], 3))
        inner = np.swapaxes(coupling, 2, 3) @ solved
        joined = -inner[..., :n].sum(1)
        joined[:, np.arange(n), np.arange(n)] += t.sum(1).reshape(batch, n)
        asked = (columns - pull.sum(1)).reshape(batch, n) - inner[..., n].sum(1)
        b = _solved(joined, asked, self.free.reshape(batch, n))
        own = solved[..., n] - (solved[..., :n] @ b[:, None, :, None])[..., 0]
        b = b.reshape(batch, groups, predictions)
        a, e = own[:, :, :groups], own[:, :, None, groups:]
        return -t * (r + a[..., None] + e + b[:, None]), a, b

    def _length(self, at: Array, move: Array) -> Array:
        """How far a move may go, of each joint: to just before the first cell that would be 0."""
        down = move < 0
        ratio = np.divide(at, -move, out=np.full_like(at, np.inf), where=down).min((1, 2, 3))
        return np.asarray(np.minimum(1.0, _TO_BOUNDARY * ratio))[:, None, None, None]


def _solved(matrices: Array, right: Array, free: Array) -> Array:
    """Solutions of symmetric positive systems in their free coordinates, zeros elsewhere."""
    n = right.shape[1]
    diagonal = matrices[:, np.arange(n), np.arange(n)]
    scale = np.where(free, 1 / np.sqrt(np.where(free, diagonal, 1.0)), 0.0)
    scaled = matrices * scale[:, :, None] * scale[:, None]
    scaled[:, np.arange(n), np.arange(n)] = 1.0
    return np.asarray(scale * np.linalg.solve(scaled, (scale * right)[..., None])[..., 0])
