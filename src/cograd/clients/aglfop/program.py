"""AGLFOP: the best accuracy that any predictor can have at given bounds on both disparities.

With P(s,z,y) fixed and the joint r(s,z,y,h) of a randomised predictor as unknown,

    max  sum_{s,z,y} r(s,z,y,y)     sum_h r(s,z,y,h) = P(s,z,y),   r >= 0
    s.t. I(Z;H)   = sum relent(q(z,h),   P(z) q(h))       <= eps_global      q(z,h)   = sum_{s,y} r
         I(Z;H|S) = sum relent(q(s,z,h), P(z|s) q(s,h))   <= eps_local       q(s,z,h) = sum_y r

where relent(a, b) = a ln(a / b) is jointly convex, and all else is linear: one global optimum. A bound of 0 is
no relative entropy but the linear q(z,h) = P(z) q(h), and infinity no constraint, so that neither is
degenerate. Cells with P(s,z,y) = 0 are left out. The program is built once for a surface; the bounds are its
parameters.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from cograd.clients.aglfop.information import conditional, mutual
from cograd.clients.aglfop.joint import ClientJoint, Codes, whole
from cograd.clients.aglfop.measures import NATS, Disparities, disparities
from cograd.core.checks import check
from cograd.core.streams import stream

SOLVERS = ("clarabel", "slsqp")
WITHIN = (None, "pooled", "client")
FEASIBLE = 1e-6
"""Nats by which a solution may exceed a bound before it is refused."""

_CLARABEL = {
    **dict.fromkeys(("tol_gap_abs", "tol_gap_rel", "tol_feas"), 1e-8),
    **dict.fromkeys(("reduced_tol_gap_abs", "reduced_tol_gap_rel", "reduced_tol_feas"), 1e-6),
}
"""The second row is what it may fall back to, as it must for bounds near 0; beyond it, it fails."""


@dataclass(frozen=True, eq=False)
class Rule:
    """A randomised predictor: ``table`` is P(h | s, z, y), NaN where the data has no such client, group and
    label. Where it is made of a given classifier client by client, ``relabel`` is P(h | s, z, h') for its
    prediction h': that one needs no labels and can be used on new examples.
    """

    table: np.ndarray
    relabel: np.ndarray | None = None

    def draw(self, clients: Codes, groups: Codes, labels: Codes, *, seed: int = 0) -> Tensor:
        """Predictions (int64) for examples whose labels are known. Raises ValueError for one of a client, group
        and label that the rule has not seen."""
        return _drawn(
            self.table, (whole("clients", clients), whole("groups", groups), whole("labels", labels)), seed
        )

    def post_process(self, clients: Codes, groups: Codes, predictions: Codes, *, seed: int = 0) -> Tensor:
        """The classifier's predictions, dealt anew (int64). Raises ValueError for a rule that is not made of a
        classifier (``within="client"``), and for a client and group that it has not seen."""
        if self.relabel is None:
            raise ValueError("this rule needs labels; aglfop(..., within='client') makes one that does not")
        codes = whole("clients", clients), whole("groups", groups), whole("predictions", predictions)
        return _drawn(self.relabel, codes, seed)


def _drawn(table: np.ndarray, codes: tuple[np.ndarray, ...], seed: int) -> Tensor:
    *shape, _ = table.shape
    for name, column, size in zip(("clients", "groups", "classes"), codes, shape, strict=True):
        if len(column) and not 0 <= column.min() <= column.max() < size:
            raise ValueError(f"{name} must be codes of 0 .. {size - 1}; got {column.min()} .. {column.max()}")
    rows = table[codes]
    if np.isnan(rows).any():
        at = int(np.isnan(rows).any(1).argmax())
        raise ValueError(f"the rule has not seen client, group and class {tuple(int(c[at]) for c in codes)}")
    draws = stream(seed, "post-processing").numpy.random(len(rows))
    return torch.from_numpy((draws[:, None] > rows.cumsum(1)[:, :-1]).sum(1))


@dataclass(frozen=True, eq=False)
class Optimum:
    """A point of the frontier: the bounds (in bits, or nats), the accuracy, and a predictor that has it.

    ``joint`` is that predictor's (S, Z, Y, H). The accuracy is unique, the predictor need not be: its
    disparities are one optimum's.
    """

    eps_global: float
    eps_local: float
    accuracy: float
    joint: ClientJoint
    rule: Rule
    bits: bool

    @cached_property
    def disparities(self) -> Disparities:
        return disparities(self.joint, bits=self.bits)


def aglfop(
    joint: ClientJoint,
    *,
    eps_global: float = math.inf,
    eps_local: float = math.inf,
    within: str | None = None,
    solver: str = "clarabel",
    bits: bool = True,
) -> Optimum:
    """The most accurate predictor with I(Z;H) <= eps_global and I(Z;H|S) <= eps_local.

    Args:
        joint: with labels.
        eps_global, eps_local: bounds in bits (nats if ``bits`` is False), >= 0; infinity for none.
        within: None allows any predictor, which may know the label. The others allow what can be made of the
            classifier that ``joint`` has the predictions of. ``pooled``: in each group, its rates P(h|z,y) over
            all clients are such as some relabelling of the predictions by group gives; for two classes, (FPR,
            TPR) lies in the quadrilateral of (0,0), (1,1), the classifier's point and that of its opposite.
            ``client``: it is a relabelling by client and group, which can be put to use. Neither contains the
            other.
        solver: ``clarabel``, by cvxpy (``cograd[convex]``); or ``slsqp``, by SciPy, which needs no cone solver,
            is slower, and is exact to about 1e-5.

    Raises ValueError for a bound < 0 and a joint without labels, or without predictions where ``within`` asks
    for them; ImportError where the solver is not installed; RuntimeError where it does not solve the program.
    """
    return _program(joint, within, solver).solve(eps_global, eps_local, bits)


@dataclass(frozen=True, eq=False)
class Surface:
    """The frontier over a grid: ``points[i][j]`` is the optimum at ``eps_global[i]``, ``eps_local[j]``."""

    eps_global: tuple[float, ...]
    eps_local: tuple[float, ...]
    points: tuple[tuple[Optimum, ...], ...]
    bits: bool

    @property
    def accuracy(self) -> np.ndarray:
        """(global bounds, local bounds)."""
        return np.array([[point.accuracy for point in row] for row in self.points])

    def draw(self, path: Path, models: dict[str, ClientJoint] | None = None) -> None:
        """A picture (PNG) of the accuracies, with models placed at their disparities, of which the accuracy is
        written beside them. Bounds that are not finite are left out."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        rows = [i for i, eps in enumerate(self.eps_global) if math.isfinite(eps)]
        columns = [j for j, eps in enumerate(self.eps_local) if math.isfinite(eps)]
        x, y = (np.array(eps)[kept] for eps, kept in ((self.eps_local, columns), (self.eps_global, rows)))
        if len(x) < 2 or len(y) < 2:
            raise ValueError(f"a picture needs two finite bounds of each kind; got {x.tolist()}, {y.tolist()}")
        unit = "bits" if self.bits else "nats"
        figure = Figure(figsize=(5.6, 4.2), dpi=130, layout="constrained")
        FigureCanvasAgg(figure)
        ax = figure.add_subplot()
        levels = ax.contourf(x, y, self.accuracy[np.ix_(rows, columns)], 14, cmap="viridis")
        figure.colorbar(levels, label="best accuracy")
        ax.set(xlabel=f"local disparity allowed, {unit}", ylabel=f"global disparity allowed, {unit}")
        for name, joint in (models or {}).items():
            found = disparities(joint, bits=self.bits)
            ax.plot(found.local, found.global_, "o", color="white", markeredgecolor="black")
            label = f"{name}: {joint.accuracy:.3f}"
            ax.annotate(label, (found.local, found.global_), (6, 6), textcoords="offset points", color="white")
        figure.savefig(path, metadata={"Software": None})


def frontier(
    joint: ClientJoint,
    *,
    eps_global: Sequence[float] | np.ndarray,
    eps_local: Sequence[float] | np.ndarray,
    within: str | None = None,
    solver: str = "clarabel",
    bits: bool = True,
) -> Surface:
    """The optimum at every pair of bounds; arguments as of `aglfop`."""
    program = _program(joint, within, solver)
    outer, inner = (tuple(float(eps) for eps in bounds) for bounds in (eps_global, eps_local))
    check(
        ("eps_global", outer, "one bound or more", bool(outer)),
        ("eps_local", inner, "one bound or more", bool(inner)),
    )
    points = tuple(tuple(program.solve(g, own, bits) for own in inner) for g in outer)
    return Surface(outer, inner, points, bits)


def _program(joint: ClientJoint, within: str | None, solver: str) -> _Program:
    check(
        ("within", within, "None, 'pooled' or 'client'", within in WITHIN),
        ("solver", solver, f"one of {', '.join(SOLVERS)}", solver in SOLVERS),
    )
    return (_Cone if solver == "clarabel" else _Smooth)(joint, within)


Solution: TypeAlias = tuple[np.ndarray, np.ndarray | None]


class _Program:
    """What both solvers share: the linear maps, and the checks of a solution.

    Unknowns x are r (cells, H) for the ``cells`` of (s,z,y) with P > 0, and after them the relabelling T (S or
    1, Z, H', H) where there is one; all flat. ``equal`` x = ``right``.
    """

    def __init__(self, joint: ClientJoint, within: str | None) -> None:
        self.p, self.within = joint.over("szy"), within
        self.cells = np.argwhere(self.p > 0)
        self.mass = self.p[tuple(self.cells.T)]
        self.classes = joint.classes
        self.model = None if within is None else joint.over("szyh")
        held = {None: 0, "pooled": 1, "client": joint.clients}[within]
        self.shape = (held, joint.groups, self.classes, self.classes)
        self.r_size = len(self.cells) * self.classes
        self.size = self.r_size + math.prod(self.shape)
        self.equal, self.right = self._equalities()
        self.error = np.zeros(self.size)
        self.error[: self.r_size] = (self.cells[:, 2:] != np.arange(self.classes)).ravel()

    def _equalities(self) -> tuple[np.ndarray, np.ndarray]:
        """sum_h r = P(s,z,y); and for a relabelling, sum_h T = 1 and r's sums, over s if pooled, are
        sum_h' P(.,z,y,h') T(.,z,h',h)."""
        h, count = self.classes, len(self.cells)
        r = np.eye(count * h, self.size).reshape(count, h, self.size)
        rows, right = [r.sum(1)], [self.mass]
        if self.model is not None:
            t = np.eye(self.size)[self.r_size :].reshape(*self.shape, self.size)
            rows.append(t.sum(3).reshape(-1, self.size))
            right.append(np.ones(len(rows[-1])))
            made = np.zeros((self.shape[0], *self.p.shape[1:], h, self.size))
            client = self.cells[:, 0] if self.within == "client" else 0 * self.cells[:, 0]
            np.add.at(made, (client, *self.cells[:, 1:].T), r)
            model = self.model if self.within == "client" else self.model.sum(0, keepdims=True)
            made -= np.einsum("szyk,szkhx->szyhx", model, t)
            rows.append(made[..., :-1, :].reshape(-1, self.size))  # the last class follows from the sums
            right.append(np.zeros(len(rows[-1])))
        equal = np.concatenate(rows)
        kept = np.abs(equal).sum(1) > 0
        return equal[kept], np.concatenate(right)[kept]

    def joints(self, per_client: bool) -> tuple[np.ndarray, np.ndarray]:
        """Maps of x to q and to the product that relative entropy compares it with: (z, h), or (s, z, h)."""
        h, count = self.classes, len(self.cells)
        at = self.cells[:, :2] if per_client else self.cells[:, 1:2]
        shape = self.p.shape[:2] if per_client else self.p.shape[1:2]
        q = np.zeros((*shape, h, self.size))
        np.add.at(q, tuple(at.T), np.eye(count * h, self.size).reshape(count, h, self.size))
        mass = self.p.sum(2) if per_client else self.p.sum((0, 2))
        share = mass / np.maximum(mass.sum(-1, keepdims=True), np.finfo(float).tiny)
        product = share[..., None, None] * q.sum(-3, keepdims=True)
        live = np.broadcast_to((mass > 0)[..., None], q.shape[:-1]).ravel()
        return q.reshape(-1, self.size)[live], product.reshape(-1, self.size)[live]

    @cached_property
    def maps(self) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
        """Of the global and of the local disparity."""
        return self.joints(False), self.joints(True)

    def solve(self, eps_global: float, eps_local: float, bits: bool) -> Optimum:
        check(
            ("eps_global", eps_global, ">= 0", eps_global >= 0),
            ("eps_local", eps_local, ">= 0", eps_local >= 0),
        )
        unit = NATS if bits else 1.0
        bounds = eps_global * unit, eps_local * unit
        r, t = self._cleaned(self.solution(bounds))
        for name, bound, found in zip(
            ("global", "local"), bounds, (mutual(r.sum((0, 2))), conditional(r.sum(2))), strict=True
        ):
            if found > bound + FEASIBLE:
                raise RuntimeError(
                    f"{type(self).__name__}: {name} disparity {found:.3g} nats, allowed {bound:.3g}"
                )
        table = np.divide(r, self.p[..., None], out=np.full_like(r, math.nan), where=self.p[..., None] > 0)
        accuracy = float(np.einsum("szyy->", r))
        return Optimum(eps_global, eps_local, accuracy, ClientJoint(r, "szyh"), Rule(table, t), bits)

    def _cleaned(self, x: np.ndarray) -> Solution:
        """r (S, Z, Y, H) and T as exact distributions: solvers keep sums and signs to their tolerance."""
        r = np.zeros((*self.p.shape, self.classes))
        found = x[: self.r_size].reshape(-1, self.classes).clip(0)
        r[tuple(self.cells.T)] = found * (self.mass / found.sum(1))[:, None]
        if self.within != "client":
            return r, None
        assert self.model is not None
        t = x[self.r_size :].reshape(self.shape).clip(0)
        t /= t.sum(3, keepdims=True)
        r = np.einsum("szyk,szkh->szyh", self.model, t)
        t[self.model.sum(2) == 0] = math.nan
        return r, t

    def solution(self, bounds: tuple[float, float]) -> np.ndarray:
        raise NotImplementedError


class _Cone(_Program):
    """By cvxpy and CLARABEL."""

    def __init__(self, joint: ClientJoint, within: str | None) -> None:
        super().__init__(joint, within)
        try:
            self.cp = import_module("cvxpy")
        except ImportError as error:
            raise ImportError(
                "solver 'clarabel' needs cvxpy: pip install 'cograd[convex]'; or say solver='slsqp'"
            ) from error
        self.x = self.cp.Variable(self.size, nonneg=True)
        self.bounds = [self.cp.Parameter(nonneg=True) for _ in range(2)]
        self.problems: dict[tuple[str, ...], Any] = {}

    def solution(self, bounds: tuple[float, float]) -> np.ndarray:
        kinds = tuple("none" if math.isinf(b) else "bound" if b > 0 else "zero" for b in bounds)
        if kinds not in self.problems:
            self.problems[kinds] = self._built(kinds)
        for parameter, bound in zip(self.bounds, bounds, strict=True):
            parameter.value = bound if math.isfinite(bound) else 0.0
        problem = self.problems[kinds]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Solution may be inaccurate")  # to 1e-6, which is enough
            problem.solve(solver=self.cp.CLARABEL, **_CLARABEL)
        if problem.status not in (self.cp.OPTIMAL, self.cp.OPTIMAL_INACCURATE) or self.x.value is None:
            raise RuntimeError(f"CLARABEL ended as {problem.status!r} at bounds of {bounds} nats")
        return np.asarray(self.x.value)

    def _built(self, kinds: tuple[str, ...]) -> Any:
        cp, x = self.cp, self.x
        constraints = [self.equal @ x == self.right]
        for kind, (q, product), bound in zip(kinds, self.maps, self.bounds, strict=True):
            if kind == "zero":
                constraints.append((q - product) @ x == 0)
            if kind == "bound":
                constraints.append(cp.sum(cp.rel_entr(q @ x, product @ x)) <= bound)
        return cp.Problem(cp.Minimize(self.error @ x), constraints)


class _Smooth(_Program):
    """By SciPy's SLSQP, from r = P(s,z,y) P(h), which no disparity forbids."""

    def __init__(self, joint: ClientJoint, within: str | None) -> None:
        super().__init__(joint, within)
        try:
            self.optimize = import_module("scipy.optimize")
        except ImportError as error:
            raise ImportError("solver 'slsqp' needs scipy: pip install scipy") from error

    def solution(self, bounds: tuple[float, float]) -> np.ndarray:
        equal, right = [self.equal], [self.right]
        smooth: list[dict[str, Any]] = []
        for bound, (q, product) in zip(bounds, self.maps, strict=True):
            if bound == 0:
                equal.append(q - product)
                right.append(np.zeros(len(q)))
            elif math.isfinite(bound):
                smooth.append({"type": "ineq", **_below(q, product, bound)})
        matrix, aim = _independent(np.concatenate(equal), np.concatenate(right))
        linear = {"type": "eq", "fun": lambda x: matrix @ x - aim, "jac": lambda x: matrix}
        found = self.optimize.minimize(
            lambda x: self.error @ x, self.start(), jac=lambda x: self.error, method="SLSQP",
            bounds=[(0, None)] * self.size, constraints=[linear, *smooth],
            options={"maxiter": 2000, "ftol": 1e-10},
        )  # fmt: skip
        if not found.success:
            raise RuntimeError(f"SLSQP ended with {found.message!r} at bounds of {bounds} nats")
        return np.asarray(found.x)

    def start(self) -> np.ndarray:
        """Predictions that tell nothing: every class with the same probability, whatever the example."""
        h = self.classes
        return np.concatenate([np.repeat(self.mass, h) / h, np.full(math.prod(self.shape), 1 / h)])


def _below(q: np.ndarray, product: np.ndarray, bound: float) -> dict[str, Callable[[np.ndarray], Any]]:
    """bound - sum relent(q x, product x) >= 0 and its gradient, kept finite at cells that are 0."""
    tiny = 1e-12

    def parts(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        a, b = np.maximum(q @ x, tiny), np.maximum(product @ x, tiny)
        return a, b, np.log(a / b)

    def value(x: np.ndarray) -> float:
        a, _, log = parts(x)
        return bound - float((a * log).sum())

    def slope(x: np.ndarray) -> np.ndarray:
        a, b, log = parts(x)
        return np.asarray(-((log + 1) @ q - (a / b) @ product))

    return {"fun": value, "jac": slope}


def _independent(matrix: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Equations that say the same and are independent, as SLSQP wants them."""
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    kept = s > 1e-10 * s[0]
    return vt[kept], (u.T @ right)[kept] / s[kept]
