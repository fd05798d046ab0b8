"""What a message of HyperFL gives away to whoever knows Phi^t, as the server does.

After one local step from Phi the gradient of Phi is what was sent, but for known factors. It consists of two
outer products (`hypernet`), and an outer product tells its factors where a bias gives one of them:

    G = g_c;    s = g_U^T g_c / |g_c|^2;    theta = U s + c;    v = g_W1^T g_b1 / |g_b1|^2

Nothing is hidden but the classifier, and the attacks on gradients of theta go on from here. If the first layer
of the extractor is linear and the batch a single example, its input is an outer product's factor, too
(`first_input`). Several local steps blur the picture: g is a sum of outer products, `Leak.share` says how
nearly it is one, and s, theta, v are then weighted means over the steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from cograd.clients.hyperfl.hypernet import HyperNet, Weights
from cograd.core.checks import check


@dataclass(frozen=True, eq=False)
class Leak:
    """What was recovered.

    ``units`` s (H,), ``theta`` (P,) the extractor, ``gradient`` G (P,) of the loss at it, ``v`` (E,) the
    embedding, or None if no hidden unit that is active has a gradient. ``share`` of the heads' gradient, in
    0 .. 1, is an outer product with G: 1 after one step.

    If the gradient was clipped, G is that much too short: its direction is what attacks match.
    """

    net: HyperNet
    units: Tensor
    theta: Tensor
    gradient: Tensor
    v: Tensor | None
    share: float

    def tensors(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The extractor's tensors and their gradients, by name."""
        return self.net.generated.views(self.theta), self.net.generated.views(self.gradient)


def leak(net: HyperNet, phi: Tensor, delta: Tensor, *, lr: float, weight_decay: float = 0.0) -> Leak:
    """Recover a client's extractor and its gradient from Phi and the change ``delta`` of it that was sent.

    Args:
        net: the hypernetwork.
        phi, delta: Phi^t and what came back.
        lr, weight_decay: of the clients; as public as the architecture. After several steps ``lr`` is best the
            sum of their rates.

    Raises ValueError for a message that says nothing: the gradient is zero.
    """
    weights, g = net.weights(phi), _gradient(net, phi, delta, lr, weight_decay)
    units = _factor(g.heads, g.offsets)
    explained = float(g.offsets.norm() * units.norm() / g.heads.norm()) ** 2
    theta = torch.addmv(weights.offsets, weights.heads, units)
    v = _factor(g.weight, g.bias) if bool(g.bias.any()) else None
    return Leak(net, units, theta, g.offsets, v, min(1.0, explained))


def directions(
    net: HyperNet, phi: Tensor, delta: Tensor, *, lr: float, weight_decay: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Directions of G (P,) and of s (H,), unit vectors, from the heads U alone: a hypernetwork without biases
    would hide nothing but their lengths.

    They are the first pair of singular vectors of the heads' gradient. Arguments and errors are those of
    `leak`.
    """
    heads = _gradient(net, phi, delta, lr, weight_decay).heads
    _, vectors = torch.linalg.eigh((heads.t() @ heads).double())  # H x H numbers rather than P x H
    units = vectors[:, -1].to(heads)
    units = units if units.sum() > 0 else -units  # as s is never negative
    gradient = heads @ units
    return gradient / gradient.norm(), units


def first_input(gradients: Mapping[str, Tensor], weight: str, bias: str) -> Tensor:
    """The one example that a linear layer saw, from its gradients by name: x (in,) = dW^T db / |db|^2.

    After a batch of several it is a combination of them with weights that sum to 1.
    Raises ValueError for a layer whose bias has no gradient.
    """
    if not bool(gradients[bias].any()):
        raise ValueError(f"bias must name a tensor with a gradient; that of {bias!r} is zero")
    return _factor(gradients[weight].flatten(1), gradients[bias])


def _gradient(net: HyperNet, phi: Tensor, delta: Tensor, lr: float, weight_decay: float) -> Weights:
    check(("lr", lr, "> 0 and finite", 0 < lr < math.inf))
    g = net.weights(delta / -lr - weight_decay * phi)
    if not bool(g.offsets.any()):
        raise ValueError("delta must hold a gradient; it is zero but for weight decay")
    return g


def _factor(outer: Tensor, left: Tensor) -> Tensor:
    """The right factor of ``left right^T``, by least squares."""
    return outer.t() @ left / left.square().sum()
