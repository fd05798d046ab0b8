"""The surrogate that travels: weights of random Fourier features, which everybody can differentiate anywhere.

    phi(x) = sqrt(2/M) cos(W'x + b),   W (d, M) normal with variance 1/l^2,  b (M,) uniform in [0, 2 pi]
    w_i    = range_i Phi' (Phi Phi' + s2 I)^-1 u_i                       of client i, in units of its function
    gradient(z; w) = -sqrt(2/M) W (w * sin(W'z + b))                     linear in w

phi(x).phi(y) estimates exp(-|x - y|^2 / 2 l^2). W and b are drawn from the session's seed and never travel; the
gradient of a mean of functions is that of the mean of their weights.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from cograd.clients.fzoos.oracle import Oracle
from cograd.clients.fzoos.rounds import Description, LocalGradient
from cograd.core.checks import check
from cograd.core.streams import stream


@dataclass(frozen=True)
class RandomFeatures(Description):
    """Random-feature weights as what clients share: M floats.

    Args:
        count: M. The error of gradients falls like 1/sqrt(M).
        lengthscale: l of the SE kernel, in the units of the points; one for all clients.
        ridge: s2; > 0, as M > n features interpolate, and near-duplicate points would make them explode.
        points: so many of a client's queries, the nearest to the server's point, enter its weights.

    W takes 8 d M bytes in every process.
    """

    count: int = 10_000
    lengthscale: float = 1.0
    ridge: float = 1e-6
    points: int = 500

    def __post_init__(self) -> None:
        check(
            ("count", self.count, ">= 1", self.count >= 1),
            ("lengthscale", self.lengthscale, "> 0 and finite", 0 < self.lengthscale < math.inf),
            ("ridge", self.ridge, "> 0 and finite", 0 < self.ridge < math.inf),
            ("points", self.points, ">= 2", self.points >= 2),
        )

    def size(self, dim: int) -> int:
        return self.count

    def name(self, dim: int, seed: int) -> str:
        """``w:`` and a hash of W and b. Names are in the schema, not in the payload: the check that all use the
        same features costs no byte a round."""
        return f"w:{_digest(seed, dim, self.count, self.lengthscale)}"

    def features(self, x: Tensor, seed: int) -> Tensor:
        """phi (n, M) of points (n, d), float64."""
        w, b = _draws(seed, x.shape[1], self.count, str(x.device))
        return torch.addmm(b, x.double() / self.lengthscale, w).cos_().mul_(math.sqrt(2 / self.count))

    def fit(self, points: Tensor, values: Tensor, seed: int) -> Tensor:
        """w (M,), float64, of values (n,) at points (n, d); 0 where all values are equal.

        Raises ValueError for fewer than two distinct points.
        """
        if len(points) < 2 or bool((points == points[0]).all()):
            raise ValueError(f"points must hold at least 2 that differ; got {len(points)} in one place")
        low, high = values.aminmax()
        if high == low:
            return torch.zeros(self.count, dtype=torch.float64, device=points.device)
        phi = self.features(points, seed)
        gram = phi @ phi.T
        gram.diagonal().add_(self.ridge)
        dual = torch.cholesky_solve((values - low)[:, None].double(), torch.linalg.cholesky(gram))[:, 0]
        return dual @ phi

    def weights(self, x: Tensor, oracle: Oracle, gradient: LocalGradient) -> Tensor:
        return self.fit(*oracle.nearest(x, self.points), oracle.ctx.seed)

    def gradient(self, z: Tensor, w: Tensor, seed: int) -> Tensor:
        """The gradient of phi(z).w at ``z`` (d,), float64."""
        draws, b = _draws(seed, len(z), self.count, str(z.device))
        phases = torch.addmv(b, draws.T, z.double() / self.lengthscale)
        return draws @ (phases.sin_() * w) * (-math.sqrt(2 / self.count) / self.lengthscale)


@lru_cache(4)
def _draws(seed: int, dim: int, count: int, device: str) -> tuple[Tensor, Tensor]:
    """W of length scale 1 (d, M) and b (M,), float64."""
    draws = stream(seed, "random Fourier features")
    w = draws.normal(dim, count).double()
    return w.to(device), (2 * math.pi * draws.uniform(count).double()).to(device)


@lru_cache(16)
def _digest(seed: int, dim: int, count: int, lengthscale: float) -> str:
    w, b = _draws(seed, dim, count, "cpu")
    digest = hashlib.blake2b(repr(lengthscale).encode(), digest_size=8)
    for tensor in (w, b):
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()
