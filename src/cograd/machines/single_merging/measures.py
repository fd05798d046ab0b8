"""What the paper measures: consensus error, mergeability, and the term of its descent lemma."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from cograd.core.space import ParamSpace, trainable
from cograd.core.streams import stream
from cograd.machines.single_merging.merging import average, check_alike, merge

Loss = Callable[[Tensor, Tensor], Tensor]
"""(model output, target) -> a scalar."""

POWER_STEPS = 20


def consensus_error(models: Sequence[nn.Module]) -> float:
    """Xi^2 = (1/m) sum_k |theta_k - theta_bar|^2 = Tr Gamma, over the trainable parameters."""
    _, away = _apart(models)
    return float(away.double().square().sum() / len(models))


def mergeability(models: Sequence[nn.Module], loss: Callable[[nn.Module], float]) -> float:
    """mean_k L(theta_k) - L(theta_bar): not negative where the nodes are mergeable by uniform weights.

    For a quadratic L with Hessian A it is Tr(A Gamma) / 2, the Jensen gap. Models with BatchNorm are compared
    with averaged statistics.
    """
    return sum(loss(model) for model in models) / len(models) - loss(merge(models))


@dataclass(frozen=True)
class DescentTerm:
    """U_t and what it is made of, at theta_bar.

    ``trace`` is Tr(H Gamma), ``alignment`` is grad L . grad Tr(H Gamma), which progressive sharpening makes
    negative along a descent, ``smoothness`` is L_2 and ``value`` is U_t without its O(Xi^3):
    (eta L_2 - 1) / 2 times the alignment. Negative values speed up the merged model's descent.
    """

    trace: float
    alignment: float
    smoothness: float
    value: float


def descent_term(
    models: Sequence[nn.Module], x: Tensor, y: Tensor, loss: Loss, lr: float, smoothness: float | None = None
) -> DescentTerm:
    """U_t of Theorem 1 on the loss over (x, y), exact, by differentiating Hessian-vector products.

    ``smoothness`` L_2 defaults to the largest Hessian eigenvalue in size at theta_bar, by power iteration.
    Cost: a few backward passes over (x, y) for each node. BatchNorm is in evaluation mode.
    """
    space, away = _apart(models)
    merged = merge(models).eval()
    theta = space.flatten(trainable(merged)).requires_grad_()
    value = loss(functional_call(merged, space.views(theta), (x,)), y)
    gradient = _derivative(value, theta)

    def product(vector: Tensor) -> Tensor:
        """The Hessian times a vector."""
        return _derivative(gradient @ vector, theta)

    trace, sharpening = 0.0, torch.zeros_like(away[0])
    for vector in away:
        curvature = product(vector) @ vector
        trace += float(curvature.detach())
        sharpening += _derivative(curvature, theta).detach()
    alignment = float(gradient.detach() @ sharpening) / len(models)
    if smoothness is None:
        smoothness = _largest_eigenvalue(lambda v: product(v).detach(), away[0])
    return DescentTerm(trace / len(models), alignment, smoothness, (lr * smoothness - 1) / 2 * alignment)


def _derivative(value: Tensor, of: Tensor) -> Tensor:
    """The gradient of a scalar, itself differentiable; zero where the scalar does not depend on ``of``."""
    if not value.requires_grad:
        return torch.zeros_like(of)
    return torch.autograd.grad(value, of, create_graph=True, materialize_grads=True)[0]


def _largest_eigenvalue(product: Callable[[Tensor], Tensor], like: Tensor) -> float:
    """Of a symmetric operator, the eigenvalue largest in size, by power iteration; its absolute value."""
    vector = stream(0, "power-iteration").normal(len(like), device=like.device).to(like.dtype)
    for _ in range(POWER_STEPS):
        vector = product(vector / vector.norm())
    return float(vector.norm())


def _apart(models: Sequence[nn.Module]) -> tuple[ParamSpace, Tensor]:
    """The space, and each node's parameters less the mean: (m, P)."""
    space = check_alike(models)
    points = torch.stack([space.flatten(trainable(model)) for model in models])
    return space, points - average(list(points)).to(points.dtype)
