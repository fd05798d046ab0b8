"""A model's parameters as one ordered vector: the space in which parties meet.

Parties that exchange vectors must agree what each coordinate means. A `ParamSpace` fixes that once: named
segments in a fixed order, a tied tensor only once, and a digest that parties compare when they join.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch
from torch import Tensor, nn

from cograd.core.message import Field, Schema

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Segment:
    """One tensor's place in the vector: elements ``offset`` up to ``offset + numel``."""

    name: str
    shape: Shape
    offset: int

    @cached_property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def slice(self) -> slice:
        return slice(self.offset, self.offset + self.numel)


class ParamSpace:
    """Ordered, named segments of one flat vector.

    ``ParamSpace.of(model)`` takes the trainable parameters in the order of ``named_parameters()``, a tied
    tensor once under its first name; ``include(name, parameter)`` narrows that. A mapping of names to shapes
    is enough where no model is at hand (byte accounting). Buffers are not part of the space.

    Raises ValueError for an empty space and for a shape with a negative size.
    """

    def __init__(self, shapes: Mapping[str, Iterable[int]]) -> None:
        segments, offset = [], 0
        for name, given in shapes.items():
            shape = tuple(int(n) for n in given)
            if any(n < 0 for n in shape):
                raise ValueError(f"shape of {name!r} must have no negative size; got {shape}")
            segments.append(Segment(name, shape, offset))
            offset += segments[-1].numel
        if not segments:
            raise ValueError("a ParamSpace needs at least one tensor; got none (are all parameters frozen?)")
        self.segments: tuple[Segment, ...] = tuple(segments)
        self.numel = offset
        self._by_name = {s.name: s for s in segments}

    @classmethod
    def of(cls, model: nn.Module, include: Callable[[str, nn.Parameter], bool] | None = None) -> ParamSpace:
        """The space of a model's trainable parameters."""
        chosen = {n: p.shape for n, p in trainable(model).items() if include is None or include(n, p)}
        return cls(chosen)

    def __len__(self) -> int:
        return len(self.segments)

    def __iter__(self) -> Iterator[Segment]:
        return iter(self.segments)

    def __getitem__(self, name: str) -> Segment:
        return self._by_name[name]

    def __repr__(self) -> str:
        return f"ParamSpace({len(self)} tensors, {self.numel:,} elements, {self.digest[:8]})"

    @cached_property
    def layout(self) -> tuple[int, ...]:
        """Elements of each segment: what a codec needs to know of the space."""
        return tuple(s.numel for s in self.segments)

    @cached_property
    def digest(self) -> str:
        """Hash of names, order and shapes. Parties whose digests differ do not share a space."""
        text = json.dumps([[s.name, s.shape] for s in self.segments])
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def schema(self, codec: object, dtype: torch.dtype = torch.float32) -> Schema:
        """The agreement under which this space's vectors travel in the given codec."""
        return Schema(tuple(Field(s.name, s.shape, dtype) for s in self.segments), codec=repr(codec))

    def reordered(self, first: Callable[[Segment], bool]) -> ParamSpace:
        """The same tensors, those for which ``first`` holds at the front, otherwise in this order."""
        ordered = sorted(self.segments, key=lambda s: not first(s))
        return ParamSpace({s.name: s.shape for s in ordered})

    def zeros(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(self.numel, device=device, dtype=dtype)

    def flatten(self, tensors: Mapping[str, Tensor], out: Tensor | None = None) -> Tensor:
        """Tensors by name -> the vector (numel,). Raises ValueError for a missing name or another shape."""
        first = next(iter(tensors.values()), None)
        if out is None:
            like = first if first is not None else torch.empty(0)
            out = torch.empty(self.numel, device=like.device, dtype=like.dtype)
        for s in self.segments:
            tensor = tensors.get(s.name)
            if tensor is None:
                raise ValueError(f"tensor {s.name!r} is missing; the space holds {len(self)} tensors")
            if tuple(tensor.shape) != s.shape:
                raise ValueError(f"{s.name!r} must have shape {s.shape}; got {tuple(tensor.shape)}")
            out[s.slice].copy_(tensor.detach().reshape(-1))
        return out

    def views(self, vector: Tensor) -> dict[str, Tensor]:
        """The vector's segments by name, each with its tensor's shape and the vector's storage."""
        if vector.shape != (self.numel,):
            raise ValueError(f"vector must have shape ({self.numel},); got {tuple(vector.shape)}")
        return {s.name: vector[s.slice].view(s.shape) for s in self.segments}


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """A model's parameters that ask for a gradient, by first name, tied ones once."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}
