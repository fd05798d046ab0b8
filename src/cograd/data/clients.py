"""What each client of a federation holds: its examples, and examples of its own to test on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cograd.core.streams import stream
from cograd.data.kinds import Images, Table
from cograd.data.partition import Partition


@dataclass(frozen=True, eq=False)
class ClientData:
    """Inputs and targets of one client; ``test_x`` and ``test_y`` are empty where it has no test set."""

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor

    def __len__(self) -> int:
        return len(self.y)


class Clients(Sequence[ClientData]):
    """A data set split among clients: ``clients[k]`` is what client ``k`` holds.

    Args:
        train: what is split.
        parts: who holds what of it, from `data.dirichlet` and its kin.
        test: a test set to split as well, for accuracies on each client's own distribution.
        test_parts: who holds what of the test set.

    Each client's rows are laid out one after another, so its tensors are views. Raises ValueError for a client
    that holds nothing, for partitions of another number of clients or of rows that are not there, and for
    targets of another length.
    """

    def __init__(
        self,
        train: Images | Table,
        parts: Partition,
        test: Images | Table | None = None,
        test_parts: Partition | None = None,
    ) -> None:
        if (test is None) != (test_parts is None):
            raise ValueError("test and test_parts go together; got one of them")
        if test_parts is not None and len(test_parts) != len(parts):
            raise ValueError(f"test_parts must be of {len(parts)} clients, as parts is; got {len(test_parts)}")
        for client, part in enumerate(parts.parts):
            if not len(part):
                raise ValueError(
                    f"client {client} holds no examples ({parts.rule}); give a min_size or equal sizes"
                )
        self.parts, self.test_parts = parts, test_parts
        mine = _by_client(train, parts)
        if test is None or test_parts is None:
            none = train.x[:0], train.y[:0]
            tests = [none] * len(parts)
        else:
            tests = _by_client(test, test_parts)
        self._held = [ClientData(*held, *tested) for held, tested in zip(mine, tests, strict=True)]

    def __len__(self) -> int:
        return len(self._held)

    def __getitem__(self, client: int) -> ClientData:  # type: ignore[override]  # no slices
        return self._held[client]

    def __iter__(self) -> Iterator[ClientData]:
        return iter(self._held)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Training examples of each client."""
        return self.parts.sizes


def matching(labels: Tensor, train_labels: Tensor, parts: Partition, seed: int) -> Partition:
    """Split a test set as the training set was: each client gets rows of each class in proportion to its own.

    Every test row goes to exactly one client, classes apart: a class's rows are cut at the clients' cumulative
    shares of that class. Raises ValueError for a class of the test set that no client has.
    """
    classes, codes = torch.cat([train_labels, labels]).unique(return_inverse=True)
    mine, tested = codes[: len(train_labels)], codes[len(train_labels) :]
    counts = torch.stack([mine[part].bincount(minlength=len(classes)) for part in parts.parts])
    held: list[list[Tensor]] = [[] for _ in range(len(parts))]
    for code in tested.unique().tolist():
        label, ends = int(classes[code]), counts[:, code].cumsum(0).double()
        if not ends[-1]:
            raise ValueError(f"labels must hold classes of the training set only; {label} is held by no client")
        rows = (tested == code).nonzero()[:, 0]
        rows = rows[stream(seed, "test split", label).permutation(len(rows))]
        cuts = (ends * len(rows) / ends[-1]).round().long()[:-1]
        for client, piece in enumerate(rows.tensor_split(cuts)):
            held[client].append(piece)
    ascending = tuple(torch.cat(pieces).sort().values for pieces in held)
    return Partition(ascending, f"matching({parts.rule})", parts.names)


def _by_client(whole: Images | Table, parts: Partition) -> list[tuple[Tensor, Tensor]]:
    if len(whole.x) != len(whole.y):
        raise ValueError(f"x and y must be of one length; got {len(whole.x)} and {len(whole.y)}")
    for client, part in enumerate(parts.parts):
        if len(part) and not 0 <= int(part[0]) <= int(part[-1]) < len(whole.y):
            raise ValueError(
                f"parts must name rows of 0 .. {len(whole.y) - 1}; client {client} holds row {int(part[-1])}"
            )
    order = torch.cat(parts.parts)
    sizes = list(parts.sizes)
    return list(zip(whole.x[order].split(sizes), whole.y[order].split(sizes), strict=True))
