"""`load`, `digest` and `names`: the data sets by name."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files as package_files
from importlib.resources.abc import Traversable
from typing import Literal, overload

import torch

from cograd.data import files
from cograd.data.catalogue import CATALOGUE, GraphName, ImagesName, Source, TableName, TextName
from cograd.data.images import as_dtype
from cograd.data.kinds import DataSet, Graph, Images, Problem, Records, Sentence, Table, Tagged, Text


@dataclass(frozen=True)
class Info:
    """One line about a data set; ``embedded`` says that it ships inside the package."""

    name: str
    description: str
    licence: str
    splits: tuple[str, ...]
    embedded: bool


def names() -> tuple[Info, ...]:
    """Every data set that `load` knows, the embedded ones first."""
    return tuple(
        Info(name, source.description, source.licence, source.splits, source.embedded)
        for name, source in CATALOGUE.items()
    )


@overload
def load(name: ImagesName, split: str | None = None, *, dtype: torch.dtype | None = None) -> Images: ...
@overload
def load(name: TextName, split: str | None = None) -> Text: ...
@overload
def load(name: TableName, split: str | None = None) -> Table: ...
@overload
def load(name: GraphName, split: str | None = None) -> Graph: ...
@overload
def load(name: Literal["gsm8k"], split: str | None = None) -> Records[Problem]: ...
@overload
def load(name: Literal["sst2"], split: str | None = None) -> Records[Sentence]: ...
@overload
def load(name: Literal["brown"], split: str | None = None) -> Records[Tagged]: ...
@overload
def load(name: str, split: str | None = None, *, dtype: torch.dtype | None = None) -> DataSet: ...
def load(name: str, split: str | None = None, *, dtype: torch.dtype | None = None) -> DataSet:
    """Load a data set by name.

    ``split`` is one of the set's splits (see `names`); None takes the first, which is ``train`` where there
    is one. ``dtype`` is for images only: a floating type gives pixels in [0, 1] (float32 by default), and
    torch.uint8 gives them as 0 .. 255.

    An embedded set is read from the package. Any other is looked up in ``$COGRAD_DATA/<folder>``, then in the
    user cache, and else downloaded from its official home into that cache. Decoded image sets are kept there
    too, so that a second load is quick.

    Raises ValueError for an unknown name or split or a dtype that does not fit, `DataUnavailable` when the
    files are not on this machine and cannot be downloaded, `DataDamaged` when a file is not as it should be.
    """
    source = _source(name)
    if split is None:
        split = source.splits[0]
    elif split not in source.splits:
        raise ValueError(f"split of {name} must be {' or '.join(map(repr, source.splits))}; got {split!r}")
    if dtype is not None and source.kind is not Images:
        raise ValueError(f"dtype is for images; {name} is {source.kind.__name__}")
    found = _files(name, source)
    data = source.read(files.Origin(name, split, _checked_digest(name, source, found), found))
    if isinstance(data, Images):
        return replace(data, x=as_dtype(data, dtype or torch.float32))
    return data


def digest(name: str) -> str:
    """The digest that `load` gives the set, from its files' bytes alone. Raises as `load` does."""
    source = _source(name)
    return _checked_digest(name, source, _files(name, source))


def readers(*names: str) -> tuple[str, ...]:
    """The modules whose code reads these sets, for a result's stamp."""
    return tuple(dict.fromkeys(_source(name).read.__module__ for name in names))


def _source(name: str) -> Source:
    if name in CATALOGUE:
        return CATALOGUE[name]
    near = difflib.get_close_matches(str(name).lower(), CATALOGUE, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    raise ValueError(f"no data set {name!r}{hint} There are {', '.join(CATALOGUE)}.")


def _files(name: str, source: Source) -> Mapping[str, Traversable]:
    return files.embedded(source.files) if source.embedded else files.locate(name, source.files)


def _checked_digest(name: str, source: Source, found: Mapping[str, Traversable]) -> str:
    """The digest of the files; that of an embedded set must be the one recorded when it was made."""
    value = files.digest(found)
    if source.embedded and value != _recorded()[name]:
        raise files.DataDamaged(f"the files of {name} inside the package are not those it was made with")
    return value


@cache
def _recorded() -> dict[str, str]:
    record: dict[str, str] = json.loads(
        (package_files("cograd.data") / "embedded" / "digests.json").read_text()
    )
    return record
