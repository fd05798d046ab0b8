"""A client's computing: a model as a function of one flat vector."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from cograd.core.space import ParamSpace, trainable

Loss = Callable[[Tensor, Tensor], Tensor]

_EVALUATION = 2048
"""Examples of a forward pass that measures."""


class LocalModel:
    """Losses and gradients of a module at any vector of its space.

    The module's trainable parameters become views of one vector, ``theta``, and their gradients of another; the
    module is the engine's from then on. ``loss(outputs, targets)`` is the mean over a minibatch. Training at
    ``theta`` itself copies nothing: ``v = model.at(x)`` sets it, ``model.gradient(v, xb, yb)`` reads it, and
    ``v.sub_(...)`` moves it.

    Floating buffers that training moves (BatchNorm's running statistics) are not part of the space: `buffers`
    reads and sets them. Other buffers (its count of minibatches) begin anew with every task: `restart`.

    Raises ValueError for trainable parameters of several dtypes or devices.
    """

    def __init__(self, module: nn.Module, loss: Loss) -> None:
        self.module, self.loss = module, loss
        self.space = ParamSpace.of(module)
        parameters = trainable(module)
        kinds = {(p.dtype, p.device) for p in parameters.values()}
        if len(kinds) > 1:
            found = ", ".join(sorted(f"{dtype} on {device}" for dtype, device in kinds))
            raise ValueError(f"trainable parameters must be of one dtype, on one device; got {found}")
        (dtype, device), *_ = kinds
        self.theta = self.space.zeros(device, dtype)
        self.space.flatten({name: p.detach() for name, p in parameters.items()}, out=self.theta)
        self._gradient = torch.zeros_like(self.theta)
        views, slots = self.space.views(self.theta), self.space.views(self._gradient)
        for name, p in parameters.items():
            p.data = views[name]
            p.grad = slots[name]
        self._buffers = [b for b in module.buffers() if b.is_floating_point()]
        self._counters = [(b, b.clone()) for b in module.buffers() if not b.is_floating_point()]
        self._training: bool | None = None
        self._one = torch.ones((), dtype=dtype, device=device)
        self.last_loss = torch.tensor(float("nan"))

    @classmethod
    def of(cls, model: nn.Module | Tensor, loss: Loss | None) -> LocalModel:
        """A module and its loss; or a bare vector (numel,), which has no outputs and no loss."""
        if isinstance(model, nn.Module) and loss is not None:
            return cls(model, loss)
        if isinstance(model, Tensor) and model.ndim == 1 and loss is None:
            return cls(_Point(model), _no_loss)
        raise TypeError(
            f"give a module and its loss, or a vector and None; got {type(model).__name__} and {loss!r}"
        )

    def at(self, vector: Tensor) -> Tensor:
        """``theta``, set to ``vector``."""
        if vector is not self.theta:
            self.theta.copy_(vector)
        return self.theta

    def gradient(self, vector: Tensor, x: Tensor, y: Tensor, *, track: bool = True) -> Tensor:
        """The gradient of the mean loss at ``vector`` (numel,): a buffer that the next call overwrites.

        Leaves ``theta`` at ``vector``, and the loss in ``last_loss``. Without ``track`` the floating buffers
        stay as they are, as for a second look at the same minibatch.
        """
        kept = None if track else self.buffers
        self.at(vector)
        self._mode(training=True)
        self._gradient.zero_()
        loss = self.loss(self.module(x), y)
        # torch would make this 1 anew each time, which takes a small model a twentieth of its time
        loss.backward(self._one if loss.dtype == self._one.dtype and not loss.ndim else None)
        self.last_loss = loss.detach()
        if kept is not None:
            self.buffers = kept
        return self._gradient

    @torch.no_grad()
    def outputs(self, vector: Tensor, x: Tensor) -> Tensor:
        """The module's outputs at ``vector``, in evaluation mode."""
        self.at(vector)
        self._mode(training=False)
        return torch.cat([self.module(part) for part in x.split(_EVALUATION)])

    def mean_loss(self, vector: Tensor, x: Tensor, y: Tensor) -> float:
        """The mean loss at ``vector`` in evaluation mode."""
        return float(self.loss(self.outputs(vector, x), y))

    def correct(self, vector: Tensor, x: Tensor, y: Tensor) -> int:
        """How many of the examples are classified rightly."""
        return int((self.outputs(vector, x).argmax(-1) == y).sum())

    def restart(self) -> None:
        """Set buffers that are not floating as they were at first."""
        for buffer, first in self._counters:
            buffer.copy_(first)

    def owns(self, tensor: Tensor) -> bool:
        """Whether a tensor lies in the storage of ``theta`` or of its gradient, which the next call changes."""
        place = tensor.untyped_storage().data_ptr()
        return place in (self.theta.untyped_storage().data_ptr(), self._gradient.untyped_storage().data_ptr())

    def _mode(self, training: bool) -> None:
        # asking every module at every minibatch would cost a small model a tenth of its time
        if self._training is not training:
            self.module.train(training)
            self._training = training

    @property
    def buffers(self) -> Tensor | None:
        """Floating buffers as one vector; None where the module has none."""
        return torch.cat([b.reshape(-1) for b in self._buffers]) if self._buffers else None

    @buffers.setter
    def buffers(self, vector: Tensor) -> None:
        parts = vector.split([b.numel() for b in self._buffers])
        for buffer, part in zip(self._buffers, parts, strict=True):
            buffer.copy_(part.view(buffer.shape))


class _Point(nn.Module):
    """A vector as a module."""

    def __init__(self, vector: Tensor) -> None:
        super().__init__()
        self.x = nn.Parameter(vector.clone())


def _no_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    raise TypeError("this session is on a bare vector: there is no loss")
