"""The guidance matrix: from squared travel to one multiplier in [0, 1] an entry, and its use on gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Self

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from cograd.core.checks import check
from cograd.core.space import ParamSpace, trainable

ORDERS = ("per_client", "after_mean")
SCALES = ("minmax", "robust")
SCOPES = ("tensor", "global")

ADAPTIVE = (
    torch.optim.Adam, torch.optim.AdamW, torch.optim.Adamax, torch.optim.NAdam, torch.optim.RAdam,
    torch.optim.SparseAdam, torch.optim.RMSprop, torch.optim.Adagrad, torch.optim.Adadelta, torch.optim.Rprop,
)  # fmt: skip
"""Optimizers whose step does not change when an entry's gradients are all multiplied by one positive number."""


@torch.no_grad()
def squared_travel(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An explorer's map: (before - after)^2 by name. Raises ValueError for other names or shapes."""
    if not before or list(before) != list(after):
        raise ValueError(
            f"before and after must hold the same tensors, at least one; got {list(before)} and {list(after)}"
        )
    travel = {}
    for name, old in before.items():
        new = after[name]
        if old.shape != new.shape:
            raise ValueError(f"{name!r} must have one shape; got {tuple(old.shape)} and {tuple(new.shape)}")
        travel[name] = (old - new).square()
    return travel


@torch.no_grad()
def guidance_matrix(
    maps: Sequence[Mapping[str, Tensor]],
    *,
    normalize: str = "per_client",
    scale: str = "minmax",
    scope: str = "tensor",
) -> dict[str, Tensor]:
    """G by name, of the explorers' maps of `squared_travel`.

    ``normalize``, ``scale`` and ``scope`` are as in `FedLEx`. Multiplying all maps by a positive number changes
    nothing. Raises ValueError without maps, for maps of other names or shapes, and for values that are not
    finite: leave such explorers out.
    """
    check_normalisation(normalize, scale, scope)
    if not maps:
        raise ValueError("maps must hold at least one explorer's; got none")
    space = ParamSpace({name: travel.shape for name, travel in maps[0].items()})
    vectors = [space.flatten(one) for one in maps]
    for explorer, vector in enumerate(vectors):
        if not bool(vector.isfinite().all()):
            raise ValueError(f"maps must be finite; that of explorer {explorer} holds NaN or infinity")
    if normalize == "per_client":
        vectors = [normalised(vector, space, scale, scope) for vector in vectors]
    mean = torch.stack(vectors).mean(0)
    return space.views(mean if normalize == "per_client" else normalised(mean, space, scale, scope))


def normalised(travel: Tensor, space: ParamSpace, scale: str, scope: str) -> Tensor:
    """N(D): a vector (numel,) brought to [0, 1], over one tensor at a time or over all of it.

    ``minmax``: (D - min) / (max - min). ``robust``: (D - median) / (upper - lower quartile), cut off at 0 and
    1: negative multipliers, as in the released code, would climb. Where the divisor is 0, as for a tensor of
    one entry, there is nothing to tell apart, and G is 1.
    """
    found = torch.empty_like(travel)
    parts = [segment.slice for segment in space] if scope == "tensor" else [slice(None)]
    for part in parts:
        found[part] = _block(travel[part], scale)
    return found


def _block(travel: Tensor, scale: str) -> Tensor:
    if not travel.numel():
        return travel
    if scale == "minmax":
        low, high = travel.aminmax()
        origin, spread = low, high - low
    else:
        ordered = travel.sort().values
        origin, spread = _quantile(ordered, 0.5), _quantile(ordered, 0.75) - _quantile(ordered, 0.25)
    if not spread > 0:
        return torch.ones_like(travel)
    return travel.sub(origin).div_(spread).clamp_(0, 1)


def _quantile(ordered: Tensor, q: float) -> Tensor:
    """By linear interpolation, as `torch.quantile`, which takes no more than 16 million elements."""
    at = q * (len(ordered) - 1)
    low = int(at)
    return torch.lerp(ordered[low], ordered[min(low + 1, len(ordered) - 1)], at - low)


def check_normalisation(normalize: str, scale: str, scope: str) -> None:
    """Refuse what is not one of the rules."""
    check(
        ("normalize", normalize, f"one of {', '.join(ORDERS)}", normalize in ORDERS),
        ("scale", scale, f"one of {', '.join(SCALES)}", scale in SCALES),
        ("scope", scope, f"one of {', '.join(SCOPES)}", scope in SCOPES),
    )


def check_range(name: str, values: Tensor) -> None:
    """Refuse multipliers outside [0, 1]: they would freeze, climb or overshoot unasked."""
    if values.numel():
        low, high = (float(v) for v in values.aminmax())  # NaN if there is one
        if not 0 <= low <= high <= 1:
            raise ValueError(f"{name} must lie in [0, 1]; got values of {low:g} .. {high:g}")


class ScaledGradients:
    """A model whose gradients are multiplied by G: what `scale_gradients` returns.

    Ends with ``remove()``, or as a context manager.
    """

    def __init__(self, model: nn.Module, guidance: Mapping[str, Tensor]) -> None:
        self._parameters = trainable(model)
        self._guidance: dict[str, Tensor] = {}
        self.update(guidance)
        self._hooks = [p.register_hook(self._hook(name)) for name, p in self._parameters.items()]

    def update(self, guidance: Mapping[str, Tensor]) -> None:
        """Guide by another G from the next backward pass on, as after a refresh."""
        names = list(self._parameters)
        if sorted(guidance) != sorted(names):
            raise ValueError(f"guidance must name the trainable parameters {names}; got {list(guidance)}")
        taken = {}
        for name, p in self._parameters.items():
            given = guidance[name]
            if given.shape != p.shape:
                raise ValueError(
                    f"guidance of {name!r} must have shape {tuple(p.shape)}; got {tuple(given.shape)}"
                )
            check_range(f"guidance of {name!r}", given)
            taken[name] = given.detach().to(p, copy=True)
        self._guidance = taken

    def remove(self) -> None:
        """Leave gradients as they are from now on."""
        for hook in self._hooks:
            hook.remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def _hook(self, name: str) -> Callable[[Tensor], Tensor]:
        return lambda gradient: gradient * self._guidance[name]


def scale_gradients(
    model: nn.Module, guidance: Mapping[str, Tensor], optimizer: Optimizer | None = None
) -> ScaledGradients:
    """Multiply a model's gradients by G in every backward pass: FedLEx's ``gradient`` form, in any loop.

        handle = scale_gradients(model, G, optimizer)
        ...                                              # train as ever
        handle.remove()

    Each backward pass is scaled before it is added to ``.grad``, so that accumulated gradients are scaled once,
    and clipping after it sees what is scaled. Costs one product and one copy of G, on the model's device.

    Args:
        model: its trainable parameters are guided.
        guidance: G by the names of these parameters, each of the parameter's shape, in [0, 1].
        optimizer: what will step, to be refused if it is adaptive; None does not check.

    Raises ValueError for missing or unknown names, other shapes, values outside [0, 1] or NaN, and for an
    adaptive optimizer such as Adam, whose steps do not change when gradients are scaled by entry.
    """
    if isinstance(optimizer, ADAPTIVE):
        raise ValueError(
            f"optimizer must not be adaptive: {type(optimizer).__name__} divides by the gradients' size and "
            "cancels G; take SGD, or multiply the update by G at the end of local training"
        )
    return ScaledGradients(model, guidance)
