"""How parties reach each other. Method code sees only this; each engine brings its own."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from cograd.core.codecs import tensor_of
from cograd.core.message import Payload


class Transport(Protocol):
    """A fixed group of parties, 0 .. members - 1, of which this is ``rank``."""

    @property
    def rank(self) -> int: ...

    @property
    def members(self) -> int: ...

    def all_gather_bytes(self, data: Payload) -> list[Payload]:
        """Everyone's bytes, in rank order; lengths may differ."""

    def all_reduce(self, vector: Tensor) -> None:
        """Replace the vector by its sum over the parties: the same bits on all of them."""


class Alone:
    """A group of one, for a run without a process group."""

    rank, members = 0, 1

    def all_gather_bytes(self, data: Payload) -> list[Payload]:
        return [data]

    def all_reduce(self, vector: Tensor) -> None:
        """The sum over one party is the vector."""


class TorchDist:
    """torch.distributed: gloo or NCCL, the default group unless one is given.

    Bytes travel as uint8 tensors padded to the longest, after an exchange of lengths. On NCCL they go through
    the current CUDA device.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        if not dist.is_initialized():
            raise RuntimeError(
                "no process group: call torch.distributed.init_process_group() first, "
                "and start the script with torchrun or `cograd launch`"
            )
        self.group = group if group is not None else dist.group.WORLD
        self.rank, self.members = dist.get_rank(self.group), dist.get_world_size(self.group)
        self.device = "cuda" if dist.get_backend(self.group) == "nccl" else "cpu"

    def all_gather_bytes(self, data: Payload) -> list[Payload]:
        sizes = torch.empty(self.members, 1, dtype=torch.int64, device=self.device)
        dist.all_gather(list(sizes), torch.tensor([len(data)], device=self.device), self.group)
        lengths = sizes[:, 0].tolist()
        longest = max(lengths)
        padded = torch.empty(longest, dtype=torch.uint8, device=self.device)
        padded[: len(data)] = tensor_of(data, torch.uint8)
        everyone = torch.empty(self.members, longest, dtype=torch.uint8, device=self.device)
        dist.all_gather(list(everyone), padded, self.group)
        return [row[:n].numpy().data for row, n in zip(everyone.cpu(), lengths, strict=True)]

    def all_reduce(self, vector: Tensor) -> None:
        dist.all_reduce(vector, group=self.group)
