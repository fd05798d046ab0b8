"""The hypernetwork of HyperFL: one hidden layer, and an affine head for each tensor that it generates.

    s = ReLU(W1 v + b1)                         v (E,) the embedding, s (H,) the hidden units
    theta_k = reshape(U_k s + c_k)              U_k (P_k, H), c_k (P_k,)

Phi = (W1, b1, all U_k, all c_k) lies in one vector, so that U (P, H) and c (P,) of all heads together are views
of it, and theta (P,) is one product of a matrix and a vector. With G = dL/dtheta (P,) the gradients are

    dL/dc = G;    dL/dU = G s^T;    a = (U^T G) 1[s > 0];    dL/db1 = a;    dL/dW1 = a v^T;    dL/dv = W1^T a

that is, two outer products. They are cheap to compute, and tell everything to whoever sees them (`leak`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from cograd.core.checks import check
from cograd.core.space import ParamSpace
from cograd.core.streams import Stream

INITS = ("target_scaled", "paper")


@dataclass(frozen=True, eq=False)
class HyperNet:
    """What a hypernetwork generates of a model, and what that costs.

    Args:
        model: all trainable parameters, which FedAvg would send.
        generated: those that are generated; at least one, and not all.
        embedding, hidden: E and H.

    Raises ValueError for sizes below 1, for tensors that are not the model's, and where all or none of them are
    generated.
    """

    model: ParamSpace
    generated: ParamSpace
    embedding: int = 64
    hidden: int = 128

    def __post_init__(self) -> None:
        check(
            ("embedding", self.embedding, ">= 1", self.embedding >= 1),
            ("hidden", self.hidden, ">= 1", self.hidden >= 1),
        )
        shapes = {s.name: s.shape for s in self.model}
        for segment in self.generated:
            if shapes.get(segment.name) != segment.shape:
                raise ValueError(
                    "generated must hold tensors of the model; "
                    f"{segment.name!r} of shape {segment.shape} is none"
                )
        if not 0 < len(self.generated) < len(self.model):
            raise ValueError(
                "generated must leave the classifier to its client and hold everything else; it holds "
                f"{len(self.generated)} of {len(self.model)} tensors"
            )

    @cached_property
    def own(self) -> ParamSpace:
        """The classifier: what is not generated, in the model's order."""
        generated = {s.name for s in self.generated}
        return ParamSpace({s.name: s.shape for s in self.model if s.name not in generated})

    @cached_property
    def space(self) -> ParamSpace:
        """Phi: ``hidden.weight`` (H, E), ``hidden.bias`` (H,), then ``NAME.U`` (P_k, H) of all generated
        tensors, then ``NAME.c`` (P_k,) of all of them."""
        heads = {f"{s.name}.U": (s.numel, self.hidden) for s in self.generated}
        offsets = {f"{s.name}.c": (s.numel,) for s in self.generated}
        first = {"hidden.weight": (self.hidden, self.embedding), "hidden.bias": (self.hidden,)}
        return ParamSpace({**first, **heads, **offsets})

    @property
    def numel(self) -> int:
        """E H + H + (H + 1) P."""
        return self.space.numel

    @property
    def nbytes(self) -> int:
        """Bytes of a message in float32, each way."""
        return 4 * self.numel

    @property
    def multiplier(self) -> float:
        """Bytes of a message over those of FedAvg's for the same model: nearly H + 1."""
        return self.numel / self.model.numel

    def weights(self, phi: Tensor) -> Weights:
        """Phi's parts. Raises ValueError for a vector of another length."""
        return Weights.of(phi, self.embedding, self.hidden)

    def initial(self, theta: Tensor, draws: Stream, init: str, scale: float) -> Tensor:
        """Phi before round 0.

        ``paper``: linear layers as torch makes them, uniform within 1 / sqrt(fan-in). Entries of theta then
        have a standard deviation of about a quarter in every layer, which suits none. ``target_scaled``: c is
        ``theta`` (P,), an ordinary initialisation of the generated tensors, and U is ``scale`` times the
        paper's.
        """
        check(("init", init, f"one of {', '.join(INITS)}", init in INITS))
        phi = (2 * draws.uniform(self.numel) - 1).to(theta)
        weights = self.weights(phi)
        for part in weights[:2]:
            part.div_(math.sqrt(self.embedding))
        for part in weights[2:]:
            part.div_(math.sqrt(self.hidden))
        if init == "target_scaled":
            weights.heads.mul_(scale)
            weights.offsets.copy_(theta)
        return phi


class Weights(NamedTuple):
    """Phi as the matrices and vectors it is made of: ``weight`` W1 (H, E), ``bias`` b1 (H,), ``heads`` U
    (P, H), ``offsets`` c (P,)."""

    weight: Tensor
    bias: Tensor
    heads: Tensor
    offsets: Tensor

    @classmethod
    def of(cls, phi: Tensor, embedding: int, hidden: int) -> Weights:
        """Views of a vector E H + H + (H + 1) P long."""
        first = hidden * (embedding + 1)
        generated, rest = divmod(phi.numel() - first, hidden + 1)
        if phi.ndim != 1 or generated < 1 or rest:
            raise ValueError(
                f"phi must have E H + H + (H + 1) P entries, E = {embedding} and H = {hidden}; "
                f"got shape {tuple(phi.shape)}"
            )
        weight, bias, heads, offsets = phi.split([hidden * embedding, hidden, hidden * generated, generated])
        return cls(weight.view(hidden, embedding), bias, heads.view(generated, hidden), offsets)

    def units(self, v: Tensor) -> Tensor:
        """s (H,) of an embedding."""
        return torch.addmv(self.bias, self.weight, v).relu()

    def generate(self, v: Tensor) -> Tensor:
        """theta (P,) of an embedding."""
        return torch.addmv(self.offsets, self.heads, self.units(v))

    def pullback(self, v: Tensor, gradient: Tensor) -> Pullback:
        """The gradient of Phi at an embedding, given that of theta, G (P,)."""
        s = self.units(v)
        return Pullback(gradient, s, (self.heads.t() @ gradient) * (s > 0), v)


class Pullback(NamedTuple):
    """A gradient of Phi, as the factors of its outer products: ``theta`` G (P,), ``units`` s (H,), ``inner`` a
    (H,), ``v`` (E,)."""

    theta: Tensor
    units: Tensor
    inner: Tensor
    v: Tensor

    @property
    def norm(self) -> Tensor:
        """2-norm of the whole gradient."""
        heads = self.theta.square().sum() * (1 + self.units.square().sum())
        return (heads + self.inner.square().sum() * (1 + self.v.square().sum())).sqrt()

    def into(self, out: Weights, factor: Tensor | float = 1.0) -> None:
        """Write ``factor`` times the gradient over Phi's parts."""
        theta, inner = self.theta * factor, self.inner * factor
        torch.outer(inner, self.v, out=out.weight)
        out.bias.copy_(inner)
        torch.outer(theta, self.units, out=out.heads)
        out.offsets.copy_(theta)
