"""Per-record gradients of a model, clipped over the whole parameter vector and averaged.

    ClippedMean({g_i}, C) = (1/n) sum_i min(1, C / |g_i|) g_i

A record's gradient is computed with the record alone (`torch.func`, vectorised over records), so that replacing
a record changes one term of the mean, by at most 2 C / n. A *difference* of a record's gradients at two points
is formed first and clipped as one vector: clipping both and subtracting has no such bound.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils._pytree import tree_leaves

from cograd.core.space import ParamSpace, trainable
from cograd.engines.exchange import GradientError

Records: TypeAlias = Sequence[Tensor]
"""A worker's records: tensors with one row a record, for example (x, y)."""

Loss: TypeAlias = Callable[..., Tensor]
"""``loss(model, *record)`` -> a tensor of one number; a record's tensors have a first dimension of 1."""

ELEMENTS = 1 << 22
"""Gradient elements of a chunk of records, where no chunk is asked for: 16 MB in float32."""


def clip_(gradients: Tensor, radius: float) -> int:
    """Scale each row (in place) to a norm of at most ``radius``; how many rows were longer.

    A row of zeros stays, and with a radius of 0 every row becomes zero. Raises GradientError if a row is not
    finite.
    """
    norms = torch.linalg.vector_norm(gradients, dim=1)
    if not bool(torch.isfinite(norms).all()):
        raise GradientError("the gradient of a record holds NaN or infinity")
    longer = norms > radius
    count = int(longer.sum())
    if count:
        gradients.mul_(torch.where(longer, radius / norms, 1.0).unsqueeze(1))
    return count


class Mean(NamedTuple):
    """A clipped mean (numel,), and how many records were clipped."""

    vector: Tensor
    clipped: int


class PerRecord:
    """Clipped means of a model's per-record gradients.

    Memory: gradients of ``chunk`` records at a time, each of them ``numel`` elements, three times (as autograd
    leaves them, as rows, and at the other point for a difference), and what the model keeps for the chunk's
    backward pass.

    Raises ValueError for a chunk below 1, and by name for a model whose loss of one record is no function of
    that record and the parameters alone: BatchNorm, running statistics, active dropout, sparse embeddings.
    """

    def __init__(self, model: nn.Module, loss: Loss, chunk: int | None = None) -> None:
        if chunk is not None and chunk < 1:
            raise ValueError(f"chunk must be >= 1 or None; got {chunk}")
        _refuse_modules(model)
        self.model, self.loss, self.space = model, loss, ParamSpace.of(model)
        self.chunk = chunk or max(1, ELEMENTS // self.space.numel)
        self.dtypes = {name: p.dtype for name, p in trainable(model).items()}
        self._rows = vmap(grad(self._loss), in_dims=(None, 0), randomness="error")

    def check(self, records: Records) -> None:
        """Raises ValueError if the loss is not one number a record, or if the model's output for a record
        depends on which other one is in its batch (looked at on the first two records)."""
        alone, both = self._outputs(records, 1), self._outputs(records, 2)
        if len(records[0]) < 2:
            return
        for one, two in zip(alone, both, strict=False):
            comparable = one.dim() and one.shape[0] == 1 and two.shape == (2, *one.shape[1:])
            if comparable and not torch.allclose(two[:1].float(), one.float(), rtol=1e-2, atol=1e-4):
                raise ValueError(
                    "the model must treat records one by one; its output for a record changes with the "
                    "other records of the batch"
                )

    @torch.no_grad()
    def _outputs(self, records: Records, count: int) -> list[Tensor]:
        """What the model puts out for the first records in one batch."""
        seen: list[Any] = []

        def model(*args: Any, **kwargs: Any) -> Any:
            seen.append(self.model(*args, **kwargs))
            return seen[-1]

        loss = self.loss(model, *(t[:count] for t in records))
        if count == 1:
            _one_number(loss)
        return [leaf for leaf in tree_leaves(seen) if isinstance(leaf, Tensor)]

    def _loss(self, weights: dict[str, Tensor], record: tuple[Tensor, ...]) -> Tensor:
        def model(*args: Any, **kwargs: Any) -> Any:
            return functional_call(self.model, weights, args, kwargs)

        return _one_number(self.loss(model, *(t.unsqueeze(0) for t in record)))

    def rows(self, records: Records, x: Tensor) -> Tensor:
        """Gradients at the point x (numel,) of all the records, one a row, in x's dtype."""
        weights = {name: view.to(self.dtypes[name]) for name, view in self.space.views(x).items()}
        gradients = self._rows(weights, tuple(records))
        return torch.cat([gradients[s.name].reshape(-1, s.numel).to(x.dtype) for s in self.space], dim=1)

    def mean(self, records: Records, x: Tensor, radius: float, keep: Tensor | None = None) -> Mean:
        """Clipped mean of the gradients at x; ``keep`` (records, numel) takes them as they were."""

        def rows(part: slice) -> Tensor:
            found = self.rows([t[part] for t in records], x)
            if keep is not None:
                keep[part] = found
            return found

        return self._mean(records, x, radius, rows)

    def difference(
        self, records: Records, now: Tensor, before: Tensor, radius: float, keep: Tensor | None = None
    ) -> Mean:
        """Clipped mean of the differences, gradient at ``now`` less gradient at ``before``. With ``keep``,
        what it holds are those at ``before``, and it takes those at ``now``."""

        def rows(part: slice) -> Tensor:
            chunk = [t[part] for t in records]
            found = self.rows(chunk, now)
            if keep is None:
                return found.sub_(self.rows(chunk, before))
            difference = found - keep[part]
            keep[part] = found
            return difference

        return self._mean(records, now, radius, rows)

    def _mean(self, records: Records, x: Tensor, radius: float, rows: Callable[[slice], Tensor]) -> Mean:
        total, clipped = torch.zeros_like(x), 0
        for part in self._parts(len(records[0])):
            gradients = rows(part)
            clipped += clip_(gradients, radius)
            total += gradients.sum(0)
        return Mean(total.div_(len(records[0])), clipped)

    def _parts(self, count: int) -> Iterator[slice]:
        return (slice(start, start + self.chunk) for start in range(0, count, self.chunk))


def _one_number(loss: Tensor) -> Tensor:
    if loss.numel() != 1:
        raise ValueError(f"loss must give one number for one record; got a tensor of shape {tuple(loss.shape)}")
    return loss.reshape(())


def _refuse_modules(model: nn.Module) -> None:
    for name, module in model.named_modules():
        kind = type(module).__name__
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            why = "BatchNorm mixes records and keeps statistics of them; use GroupNorm or LayerNorm"
        elif isinstance(module, nn.modules.instancenorm._InstanceNorm) and module.track_running_stats:
            why = "it keeps statistics of records; pass track_running_stats=False"
        elif isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0 and module.training:
            why = "the two gradients of a difference must see the same function; call eval() on it, or p=0"
        elif isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse:
            why = "per-record gradients are dense; pass sparse=False"
        else:
            continue
        raise ValueError(f"model must have no {kind} here, module {name!r}: {why}")
