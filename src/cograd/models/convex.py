"""Strongly convex problems spread over n nodes: what decentralized methods are measured on.

Node i holds rows A_i (m, d) and targets; the sum of its own objectives f_i is minimised at ``solution``. Each
problem knows its constants, gives gradients of one node (closures) or of all nodes at once, and float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from cograd.core.streams import stream

NEWTON = 100
"""Steps after which Newton's method ends at the latest."""


class LeastSquares:
    """f_i(x) = mean over the node's rows of (a x - b)^2.

    ``rows`` (n, m, d) and ``targets`` (n, m). mu and L are the smallest and largest eigenvalue of any node's
    Hessian (2/m) A_i^T A_i. Raises ValueError if that is singular for some node.
    """

    def __init__(self, rows: Tensor, targets: Tensor) -> None:
        self.rows, self.targets = rows.double(), targets.double()
        m = rows.shape[1]
        self.hessians = 2 / m * self.rows.mT @ self.rows
        self.linear = 2 / m * (self.rows.mT @ self.targets[..., None]).squeeze(-1)
        eigenvalues = torch.linalg.eigvalsh(self.hessians)
        self.mu, self.L = float(eigenvalues.min()), float(eigenvalues.max())
        if not self.mu > 1e-12 * self.L:
            raise ValueError("rows must give every node a Hessian of full rank; some node's is singular")
        self.solution = torch.linalg.solve(self.hessians.sum(0), self.linear.sum(0))

    @classmethod
    def random(cls, n: int, m: int, d: int, seed: int, spread: float = 1.0) -> LeastSquares:
        """Normal rows, coefficients uniform in [0, 100), noise 10; another draw and slope at each
        node, slopes uniform in [0.01, 5).

        Columns are divided by factors from 1 to ``spread``, which multiplies L / mu by about its square.
        """
        draw = stream(seed, "least squares", n, m, d).numpy
        rows = draw.standard_normal((n, m, d)) / np.geomspace(1, spread, d)
        targets = (rows @ (100 * draw.random((n, d, 1)))).squeeze(-1) + 10 * draw.standard_normal((n, m))
        slopes = draw.uniform(0.01, 5, (n, 1))
        return cls(torch.from_numpy(rows), torch.from_numpy(slopes * targets))

    def gradients(self) -> list[Callable[[Tensor, int], Tensor]]:
        """Each node's full gradient as a function of (x, k); k does not matter."""
        return [_affine(h, b) for h, b in zip(self.hessians, self.linear, strict=True)]

    def minibatches(self, size: int, seed: int) -> list[Callable[[Tensor, int], Tensor]]:
        """Each node's gradient over ``size`` of its rows, drawn with replacement for its k-th call."""

        def of(node: int, a: Tensor, b: Tensor) -> Callable[[Tensor, int], Tensor]:
            def gradient(x: Tensor, k: int) -> Tensor:
                draw = stream(seed, "minibatch", node, k).numpy
                batch = torch.from_numpy(draw.integers(len(b), size=size))
                return 2 / size * a[batch].mT @ (a[batch] @ x - b[batch])

            return gradient

        return [of(i, a, b) for i, (a, b) in enumerate(zip(self.rows, self.targets, strict=True))]

    def gradient(self, x: Tensor) -> Tensor:
        """Every node's gradient at its own row of x (n, d)."""
        return (self.hessians @ x[..., None]).squeeze(-1) - self.linear

    def conjugate(self, y: Tensor, nodes: Sequence[int] | slice = slice(None)) -> Tensor:
        """The nodes' gradients of their convex conjugates, each at its row of y: the x at which a node's
        gradient is that row."""
        x: Tensor = torch.linalg.solve(self.hessians[nodes], y + self.linear[nodes])
        return x


class RidgeLogistic:
    """f_i(x) = mean over the node's rows of log(1 + exp(-b a x)) + ridge / 2 |x|^2, labels b of -1 and 1.

    ``rows`` and ``labels`` hold one tensor (m_i, d) or (m_i,) a node; the m_i may differ. mu = ridge, L =
    ridge + the largest eigenvalue of any A_i^T A_i / (4 m_i). Raises ValueError for ridge <= 0 or other labels.
    """

    def __init__(self, rows: Sequence[Tensor], labels: Sequence[Tensor], ridge: float) -> None:
        if not ridge > 0:
            raise ValueError(f"ridge must be > 0; got {ridge}")
        if any(not torch.isin(b, torch.tensor([-1, 1])).all() for b in labels):
            raise ValueError("labels must be -1 or 1")
        self.ridge, sizes = ridge, torch.tensor([len(b) for b in labels])
        signed = [a.double() * b.double()[:, None] for a, b in zip(rows, labels, strict=True)]
        self.signed = torch.nn.utils.rnn.pad_sequence(signed, batch_first=True)  # rows of zeros at the end
        within = torch.arange(int(sizes.max())) < sizes[:, None]
        self.weights = within.double() / sizes[:, None]
        gram = self.signed.mT @ self.signed / sizes[:, None, None]
        self.mu, self.L = ridge, ridge + float(torch.linalg.eigvalsh(gram).max()) / 4
        self.solution = self._newton()

    def gradients(self) -> list[Callable[[Tensor, int], Tensor]]:
        """Each node's full gradient as a function of (x, k); k does not matter."""
        return [_logistic(a, w, self.ridge) for a, w in zip(self.signed, self.weights, strict=True)]

    def gradient(self, x: Tensor) -> Tensor:
        """Every node's gradient at its own row of x (n, d)."""
        slope = self.weights * torch.sigmoid(-(self.signed @ x[..., None]).squeeze(-1))
        return self.ridge * x - (slope[:, None] @ self.signed).squeeze(1)

    def _newton(self) -> Tensor:
        """The minimiser of the sum, to machine precision. Started at 0, where the ridge keeps steps short."""
        n, _, d = self.signed.shape
        x = torch.zeros(d, dtype=torch.float64)
        for _ in range(NEWTON):
            p = torch.sigmoid(self.signed @ x)
            hessian = n * self.ridge * torch.eye(d, dtype=torch.float64)
            hessian += torch.einsum("nm,nmi,nmj->ij", self.weights * p * (1 - p), self.signed, self.signed)
            step = torch.linalg.solve(hessian, self.gradient(x.expand(n, d)).sum(0))
            x = x - step
            if float(step.norm()) <= 1e-13 * (1 + float(x.norm())):
                break
        return x


def _affine(h: Tensor, b: Tensor) -> Callable[[Tensor, int], Tensor]:
    return lambda x, k: torch.mv(h, x) - b


def _logistic(a: Tensor, w: Tensor, ridge: float) -> Callable[[Tensor, int], Tensor]:
    return lambda x, k: ridge * x - (w * torch.sigmoid(-(a @ x))) @ a
