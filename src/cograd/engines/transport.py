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

    Bytes travel as uint8 tensors, each behind its length, padded to a capacity that all ranks know: a little
    more than the longest message so far. A message that does not fit has its rest sent in a second collective;
    as sizes hardly change from step to step, one is the rule. On NCCL they go through the current CUDA device.
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
        self._capacity = 0

    def all_gather_bytes(self, data: Payload) -> list[Payload]:
        length = torch.tensor([len(data)], dtype=torch.int64)
        message = torch.cat([length.view(torch.uint8), tensor_of(data, torch.uint8)])
        rows = self._gather(message, _HEAD + self._capacity)
        lengths = [int.from_bytes(row[:_HEAD].numpy().tobytes(), "little") for row in rows]
        longest = max(lengths)
        if longest > self._capacity:
            rest = self._gather(message[_HEAD + self._capacity :], longest - self._capacity)
            rows = torch.cat([rows, rest], 1)
        self._capacity = longest + longest // 16 + 64
        return [row[_HEAD : _HEAD + n].numpy().data for row, n in zip(rows, lengths, strict=True)]

    def _gather(self, message: Tensor, size: int) -> Tensor:
        """Everyone's first ``size`` bytes, padded where there are fewer: (members, size) on the CPU."""
        padded = torch.zeros(size, dtype=torch.uint8, device=self.device)
        padded[: len(message)] = message[:size]
        everyone = torch.empty(self.members, size, dtype=torch.uint8, device=self.device)
        dist.all_gather(list(everyone), padded, self.group)
        return everyone.cpu()

    def all_reduce(self, vector: Tensor) -> None:
        dist.all_reduce(vector, group=self.group)


_HEAD = 8  # bytes of a message's length
