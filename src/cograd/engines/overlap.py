"""Exchanges that run while their parties go on computing: started now, awaited later.

`AsyncTorchDist` is torch.distributed, `InProcess` is a number of parties in one process that take turns, and
`AsyncAlone` is a group of one. A method's code is the same on each, and so are its numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from cograd.core.codecs import tensor_of
from cograd.core.message import Payload
from cograd.engines.transport import Alone, TorchDist


class Pending(Protocol):
    """An exchange under way."""

    def wait(self) -> list[Payload]:
        """Everyone's bytes in rank order; blocks until they are here. May be called again."""


class Overlapping(Protocol):
    """A fixed group of parties, 0 .. members - 1, of which this is ``rank``."""

    rank: int
    members: int

    def all_gather_bytes(self, data: Payload) -> list[Payload]:
        """Everyone's bytes, those of this party included; in rank order where all are known at once."""

    def start(self, data: Payload) -> Pending:
        """Begin to send ``data`` to all, who begin the same exchange with as many bytes. Parties start their
        exchanges in the same order."""

    def in_step(self, send: Callable[[], None], receive: Callable[[], None]) -> None:
        """Run ``send``, then ``receive``; every party calls this once a step. Where parties take turns, all
        of them send before any receives."""


class AsyncAlone(Alone):
    """A group of one."""

    def start(self, data: Payload) -> Pending:
        return Arrived([data])

    def in_step(self, send: Callable[[], None], receive: Callable[[], None]) -> None:
        send()
        receive()


class Arrived:
    """An exchange that is over."""

    def __init__(self, payloads: list[Payload]) -> None:
        self.payloads = payloads

    def wait(self) -> list[Payload]:
        return self.payloads


class AsyncTorchDist(TorchDist):
    """torch.distributed with exchanges in the background (``async_op``), gloo or NCCL.

    All parties' messages of an exchange must have the same length. Use a group of its own where the default
    group has other collectives under way: they are matched by order.
    """

    def start(self, data: Payload) -> Pending:
        message = tensor_of(data, torch.uint8).to(self.device)
        everyone = torch.empty(self.members, len(message), dtype=torch.uint8, device=self.device)
        work = dist.all_gather(list(everyone), message, self.group, async_op=True)
        return _Gathering(work, message, everyone)

    def in_step(self, send: Callable[[], None], receive: Callable[[], None]) -> None:
        send()
        receive()


class _Gathering:
    """A collective of torch.distributed; holds what it reads and writes until it is over."""

    def __init__(self, work: dist.Work, message: Tensor, everyone: Tensor) -> None:
        self._work, self._message, self._everyone = work, message, everyone
        self._payloads: list[Payload] | None = None

    def wait(self) -> list[Payload]:
        if self._payloads is None:
            self._work.wait()
            self._payloads = [row.numpy().data for row in self._everyone.cpu()]
        return self._payloads


class InProcess:
    """One of several parties in this process: ``links = InProcess.group(4)``.

    The parties take turns in one thread. What they do in a step happens when the last of them has reached it
    (see `in_step`), so that an ordinary loop over the parties, one step of each after another, is the same
    as that many processes.
    """

    def __init__(self, rank: int, members: int, board: _Board) -> None:
        self.rank, self.members, self._board = rank, members, board
        self._begun = self._joined = 0

    @classmethod
    def group(cls, members: int) -> list[InProcess]:
        """The links of all parties of a group. Raises ValueError for fewer than one."""
        if members < 1:
            raise ValueError(f"members must be >= 1; got {members}")
        board = _Board(members)
        return [cls(rank, members, board) for rank in range(members)]

    def all_gather_bytes(self, data: Payload) -> list[Payload]:
        """The bytes of this party and of those that came before it: the last one sees all."""
        self._joined += 1
        known = self._board.messages.setdefault(-self._joined, {})
        known[self.rank] = data
        return [known[rank] for rank in sorted(known)]

    def start(self, data: Payload) -> Pending:
        number, self._begun = self._begun, self._begun + 1
        self._board.messages.setdefault(number, {})[self.rank] = data
        return _Posted(self._board, number)

    def in_step(self, send: Callable[[], None], receive: Callable[[], None]) -> None:
        waiting = self._board.waiting
        if self.rank in waiting:
            raise RuntimeError(
                f"replica {self.rank} is a step ahead of {sorted(set(range(self.members)) - set(waiting))}: "
                "replicas in one process take steps in turn"
            )
        waiting[self.rank] = (send, receive)
        if len(waiting) == self.members:
            turns = [waiting[rank] for rank in range(self.members)]
            waiting.clear()
            for send, _ in turns:
                send()
            for _, receive in turns:
                receive()


class _Board:
    """Where parties in one process leave their messages: by number of the exchange, then by rank."""

    def __init__(self, members: int) -> None:
        self.members = members
        self.messages: dict[int, dict[int, Payload]] = {}
        self.waiting: dict[int, tuple[Callable[[], None], Callable[[], None]]] = {}
        self._readers: dict[int, int] = {}

    def read(self, number: int) -> list[Payload]:
        posted = self.messages[number]
        missing = sorted(set(range(self.members)) - set(posted))
        if missing:
            raise RuntimeError(f"replicas {missing} have not sent their part of exchange {number}")
        self._readers[number] = self._readers.get(number, 0) + 1
        if self._readers[number] == self.members:
            del self.messages[number], self._readers[number]
        return [posted[rank] for rank in range(self.members)]


class _Posted:
    """An exchange over the board."""

    def __init__(self, board: _Board, number: int) -> None:
        self._board, self._number = board, number
        self._payloads: list[Payload] | None = None

    def wait(self) -> list[Payload]:
        if self._payloads is None:
            self._payloads = self._board.read(self._number)
        return self._payloads


def overlapping(transport: Overlapping | TorchDist | None) -> Overlapping:
    """The transport with exchanges in the background. Without one: torch.distributed's default group if it is
    initialised, otherwise a group of one."""
    if transport is None:
        return AsyncTorchDist() if dist.is_initialized() else AsyncAlone()
    if isinstance(transport, TorchDist) and not isinstance(transport, AsyncTorchDist):
        return AsyncTorchDist(transport.group)
    return transport
