"""What `load` returns: one small frozen dataclass for each shape that data comes in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

Row = TypeVar("Row", bound=tuple[object, ...])


@dataclass(frozen=True, eq=False)
class DataSet:
    """What every data set carries.

    ``digest`` is the hexadecimal BLAKE2b-256 of the source: of the file's bytes where the set is one file, of
    its files' digests in catalogue order where it is several. It is the same for every split of a set.
    """

    name: str
    split: str
    digest: str


@dataclass(frozen=True, eq=False, repr=False)
class Images(DataSet):
    """Labelled images: ``x`` is N x C x H x W, floats in [0, 1] or uint8 of 0 .. 255; ``y`` is N, int64."""

    x: Tensor
    y: Tensor
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.y)

    def __repr__(self) -> str:
        return f"Images({self.name}/{self.split}: {_shape(self.x)}, {len(self.classes)} classes)"

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each channel, both of shape C. Raises TypeError on uint8 images."""
        self._floats()
        # A channel at a time: the standard deviation of a full set at once would copy it several times.
        channels = [self.x[:, c] for c in range(self.x.shape[1])]
        mean = torch.stack([c.mean() for c in channels])
        return mean, torch.stack([c.std(correction=0) for c in channels])

    def normalised(self, mean: Tensor, std: Tensor) -> Images:
        """These images with each channel shifted by ``mean`` and divided by ``std`` (both of shape C).

        A test set takes the moments of its training set: ``test.normalised(*train.moments())``.
        Raises TypeError on uint8 images, ValueError for another shape or a std that is not positive.
        """
        self._floats()
        channels = self.x.shape[1]
        for what, value in (("mean", mean), ("std", std)):
            if value.shape != (channels,):
                raise ValueError(f"{what} must have shape ({channels},); got {tuple(value.shape)}")
        if not bool((std > 0).all()):
            raise ValueError(f"std must be positive in every channel; got {std.tolist()}")
        return replace(self, x=(self.x - mean[:, None, None]) / std[:, None, None])

    def _floats(self) -> None:
        if not self.x.is_floating_point():
            raise TypeError(f"x must be floating point here; got {self.x.dtype}: load with dtype=torch.float32")


@dataclass(frozen=True, eq=False, repr=False)
class Text(DataSet):
    """One long text as tokens: ``tokens`` is N, int64, and token ``i`` stands for ``vocabulary[i]``."""

    tokens: Tensor
    vocabulary: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.tokens)

    def __repr__(self) -> str:
        return f"Text({self.name}/{self.split}: {len(self)} tokens of {len(self.vocabulary)})"

    def encode(self, text: str) -> Tensor:
        """The tokens (int64) of a text. Raises ValueError for a character outside the vocabulary."""
        unknown = sorted(set(text) - set(self._ids))
        if unknown:
            raise ValueError(f"text has characters outside the vocabulary of {self.name}: {unknown}")
        return torch.tensor([self._ids[character] for character in text], dtype=torch.int64)

    def decode(self, tokens: Tensor) -> str:
        """The text of 1-D tokens."""
        return "".join(self.vocabulary[i] for i in tokens.tolist())

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {character: i for i, character in enumerate(self.vocabulary)}


@dataclass(frozen=True, eq=False, repr=False)
class Table(DataSet):
    """Rows of numbers: ``x`` is N x F, float32, column ``j`` named ``features[j]``; ``y`` is N, int64.

    A one-hot column is named ``column=value``. ``sensitive[column]`` is N, int64, an index into
    ``groups[column]``; those columns are among the features too, and `without` takes them out.
    """

    x: Tensor
    features: tuple[str, ...]
    y: Tensor
    classes: tuple[str, ...]
    sensitive: dict[str, Tensor]
    groups: dict[str, tuple[str, ...]]

    def __len__(self) -> int:
        return len(self.y)

    def __repr__(self) -> str:
        sensitive = f", sensitive: {', '.join(self.sensitive)}" if self.sensitive else ""
        return f"Table({self.name}/{self.split}: {_shape(self.x)}, {len(self.classes)} classes{sensitive})"

    def without(self, *columns: str) -> Table:
        """This table less the features of these columns of the source (``"sex"`` drops ``sex=...``).

        Raises ValueError for a column that it has not.
        """
        source = [feature.split("=")[0] for feature in self.features]
        for column in columns:
            if column not in source:
                raise ValueError(
                    f"no column {column!r} in {self.name}; it has {', '.join(dict.fromkeys(source))}"
                )
        keep = [j for j, column in enumerate(source) if column not in columns]
        return replace(self, x=self.x[:, keep], features=tuple(self.features[j] for j in keep))


@dataclass(frozen=True, eq=False, repr=False)
class Graph(DataSet):
    """A graph whose nodes have features and a class.

    ``x`` is N x F, float32; ``y`` is N, int64, -1 for a node with no class; ``edges`` is 2 x E, int64, both
    directions of every edge, without repeats and loops, in ascending order. ``train``, ``val`` and ``test``
    are int64 node indices.
    """

    x: Tensor
    y: Tensor
    edges: Tensor
    n_classes: int
    train: Tensor
    val: Tensor
    test: Tensor

    def __len__(self) -> int:
        return len(self.y)

    def __repr__(self) -> str:
        return (
            f"Graph({self.name}/{self.split}: {_shape(self.x)}, {self.edges.shape[1]} directed edges, "
            f"{self.n_classes} classes, {len(self.train)}/{len(self.val)}/{len(self.test)} nodes)"
        )


class Problem(NamedTuple):
    """A word problem; ``answer`` is the worked solution and ``final`` the number it ends in."""

    question: str
    answer: str
    final: int


class Sentence(NamedTuple):
    """A sentence and its class."""

    sentence: str
    label: int


class Tagged(NamedTuple):
    """A sentence with a part-of-speech tag for each token, and the genre and file of its text."""

    tokens: tuple[str, ...]
    tags: tuple[str, ...]
    genre: str
    file: str


@dataclass(frozen=True, eq=False, repr=False)
class Records(DataSet, Generic[Row]):
    """Rows that are not tensors: `Problem`, `Sentence` or `Tagged`, in the order of the source."""

    rows: Sequence[Row]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __getitem__(self, i: int) -> Row:
        return self.rows[i]

    def __repr__(self) -> str:
        kind = type(self.rows[0]).__name__ if self.rows else "nothing"
        return f"Records({self.name}/{self.split}: {len(self)} x {kind})"


def _shape(x: Tensor) -> str:
    return f"{' x '.join(map(str, x.shape))} {str(x.dtype).removeprefix('torch.')}"
