"""The local surrogate: a Gaussian process through a client's own queries, and the gradient of its mean.

With u the values scaled to [0, 1] and K = k(X, X),

    mean(x)      = y_min + (y_max - y_min) sum_j a_j k(x, X_j),    a = (K + s2 I)^-1 u
    gradient(x)  = (y_max - y_min) sum_j a_j grad_x k(x, X_j)                                  no query at all
    trace of the gradient's posterior covariance = d k''(0) - tr J' (K + s2 I)^-1 J,  J_j = grad_x k(x, X_j)

    SE           k = exp(-r^2 / 2 l^2)                   grad_x k = -k / l^2 (x - X_j)
    Matern-5/2   k = (1 + rho + rho^2 / 3) exp(-rho)     grad_x k = -5/(3 l^2) (1 + rho) exp(-rho) (x - X_j)

with r = |x - X_j| and rho = sqrt(5) r / l. Both gradients are a *slope* times the difference of the points.
Everything is in float64: K is nearly singular where points lie close together.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cograd.clients.fzoos.oracle import nearest
from cograd.core.checks import check

LENGTHSCALES = tuple(float(f"{0.1 * 10 ** (k / 2):.3g}") for k in range(7))
"""0.1 .. 100 by factors of sqrt(10), for points of a unit box."""


@dataclass(frozen=True)
class Kernel:
    """Of squared distances and a length scale: ``value`` k, ``slope`` with grad_x k = slope (x - X_j), and
    ``curvature`` k''(0) times l^2."""

    value: Callable[[Tensor, Tensor], Tensor]
    slope: Callable[[Tensor, Tensor], Tensor]
    curvature: float


def _rho(squares: Tensor, lengthscale: Tensor) -> Tensor:
    return (squares * (5 / lengthscale**2)).sqrt()


def _matern_value(squares: Tensor, lengthscale: Tensor) -> Tensor:
    rho = _rho(squares, lengthscale)
    return (1 + rho + rho * rho / 3) * (-rho).exp()


def _matern_slope(squares: Tensor, lengthscale: Tensor) -> Tensor:
    rho = _rho(squares, lengthscale)
    return (1 + rho) * (-rho).exp() * (-5 / (3 * lengthscale**2))


def _se_value(squares: Tensor, lengthscale: Tensor) -> Tensor:
    return (squares * (-0.5 / lengthscale**2)).exp()


def _se_slope(squares: Tensor, lengthscale: Tensor) -> Tensor:
    return _se_value(squares, lengthscale) * (-1 / lengthscale**2)


KERNELS = {
    "matern52": Kernel(_matern_value, _matern_slope, 5 / 3),
    "se": Kernel(_se_value, _se_slope, 1.0),
}


@dataclass(frozen=True)
class GPSurrogate:
    """Fits a `Posterior` to points and values.

    Args:
        kernel: ``matern52`` or ``se``.
        neighbours: so many of a client's queries, the nearest to where the gradient is wanted, enter a fit.
        jitter: s2, added to the diagonal of K; > 0, as points may coincide.
        lengthscales: candidates for l, in the units of the points. Each fit takes the one of the largest
            marginal likelihood; all are factorised at once. A single one is l itself.
    """

    kernel: str = "matern52"
    neighbours: int = 150
    jitter: float = 1e-6
    lengthscales: tuple[float, ...] = LENGTHSCALES

    def __post_init__(self) -> None:
        given, fine = self.lengthscales, [0 < each < math.inf for each in self.lengthscales]
        check(
            ("kernel", self.kernel, f"one of {', '.join(KERNELS)}", self.kernel in KERNELS),
            ("neighbours", self.neighbours, ">= 2", self.neighbours >= 2),
            ("jitter", self.jitter, "> 0 and finite", 0 < self.jitter < math.inf),
            ("lengthscales", given, "one or more numbers > 0", bool(fine) and all(fine)),
        )

    def near(self, x: Tensor, points: Tensor, values: Tensor) -> Posterior:
        """The posterior of the ``neighbours`` points (n, d) nearest to ``x`` (d,), and of their values (n,)."""
        rows = nearest(x, points, self.neighbours)
        return self.fit(points[rows], values[rows])

    def fit(self, points: Tensor, values: Tensor, lengthscale: float | None = None) -> Posterior:
        """The posterior of values (n,) at points (n, d), with l of the largest likelihood or as given.

        Raises ValueError for values that are not finite, another number of them, and fewer than two distinct
        points.
        """
        points, values = points.double(), values.double()
        if values.shape != points.shape[:1]:
            raise ValueError(f"values must have shape ({len(points)},); got {tuple(values.shape)}")
        if len(points) < 2 or bool((points == points[0]).all()):
            raise ValueError(f"points must hold at least 2 that differ; got {len(points)} in one place")
        if not bool(values.isfinite().all()):
            raise ValueError(f"values must be finite; got {int((~values.isfinite()).sum())} that are not")
        low, high = values.aminmax()
        scale = float(high - low)
        u = (values - low) / scale if scale > 0 else torch.zeros_like(values)
        # centred, so that squares of distances do not lose digits to the points' common offset
        centre = points.mean(0)
        away = points - centre
        gram = away @ away.T
        candidates = self.lengthscales if lengthscale is None else (lengthscale,)
        factors, weights, likelihoods = self.factorise(_squares(gram), u, candidates)
        best = int(likelihoods.argmax())
        return Posterior(
            KERNELS[self.kernel], candidates[best], float(low), scale, centre, away, gram, factors[best],
            weights[best], float(likelihoods[best]),
        )  # fmt: skip

    def factorise(
        self, squares: Tensor, u: Tensor, lengthscales: tuple[float, ...]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Cholesky factors (c, n, n) of K + s2 I, weights a (c, n), log marginal likelihoods (c,), one for each
        length scale; ``squares`` (n, n) are squared distances."""
        n, scales = len(u), torch.tensor(lengthscales, dtype=torch.float64, device=u.device)
        k = KERNELS[self.kernel].value(squares, scales[:, None, None])
        k.diagonal(dim1=-2, dim2=-1).add_(self.jitter)
        factors: Tensor = torch.linalg.cholesky(k)
        weights = torch.cholesky_solve(u.expand(len(scales), n)[:, :, None], factors)[:, :, 0]
        halves = factors.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return factors, weights, -0.5 * (weights @ u) - halves - n / 2 * math.log(2 * math.pi)


@dataclass(frozen=True, eq=False)
class Posterior:
    """A fitted surrogate. ``lengthscale`` is l, ``scale`` the range of the values, ``likelihood`` the logarithm
    of the marginal likelihood; a range of 0 gives a gradient of 0."""

    kernel: Kernel
    lengthscale: float
    offset: float
    scale: float
    centre: Tensor
    away: Tensor
    gram: Tensor
    factor: Tensor
    weights: Tensor
    likelihood: float

    def mean(self, x: Tensor) -> Tensor:
        """The posterior mean at ``x`` (d,), a float64 scalar; differentiable."""
        squares = (x.double() - self.centre - self.away).square().sum(1)
        return self.offset + self.scale * (self.kernel.value(squares, self._l) @ self.weights)

    def gradient(self, x: Tensor) -> Tensor:
        """The gradient of the posterior mean at ``x`` (d,), float64."""
        apart = (x.double() - self.centre) - self.away
        slopes = self.kernel.slope(apart.square().sum(1), self._l)
        return (slopes * self.weights) @ apart * self.scale

    def uncertainty(self, points: Tensor) -> Tensor:
        """The trace of the gradient's posterior covariance at points (m, d): (m,), in units of ``scale``
        squared.

        tr J' A J = sum_jk s_j s_k A_jk (x - X_j)'(x - X_k) needs inner products only: O(m n^2), whatever d.
        """
        x = points.double() - self.centre
        inner, lengths = x @ self.away.T, x.square().sum(1)
        squares = (lengths[:, None] - 2 * inner + self.gram.diagonal()).clamp_min_(0)
        slopes = self.kernel.slope(squares, self._l)
        inverse = torch.cholesky_inverse(self.factor)
        plain = slopes @ inverse
        known = ((slopes @ (inverse * self.gram)) * slopes).sum(1)
        known += (plain * slopes).sum(1) * lengths - 2 * (plain * slopes * inner).sum(1)
        prior = points.shape[1] * self.kernel.curvature / self.lengthscale**2
        return (prior - known).clamp_min_(0)

    @property
    def _l(self) -> Tensor:
        return torch.tensor(self.lengthscale, dtype=torch.float64, device=self.away.device)


def _squares(gram: Tensor) -> Tensor:
    lengths = gram.diagonal()
    squares = (lengths[:, None] + lengths - 2 * gram).clamp_min_(0)
    squares.fill_diagonal_(0)
    return squares
