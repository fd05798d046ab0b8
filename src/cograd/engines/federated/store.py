"""Client states: in memory up to a cap, beyond it on disk."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from cograd.engines.federated.protocol import State


class StateStore:
    """A mapping of client number -> state, of which at most ``cap`` bytes stay in memory (None: all of it).

    Those used last stay; others lie as one file a client in a temporary folder, which goes with the store, or
    sooner by `close`. A client that was never stored has an empty state.
    """

    def __init__(self, cap: int | None = None) -> None:
        if cap is not None and cap < 0:
            raise ValueError(f"cap must be >= 0 bytes or None; got {cap}")
        self.cap = cap
        self._memory: OrderedDict[int, tuple[State, int]] = OrderedDict()
        self._held = 0
        self._folder: Path | None = None
        self._remove: Callable[[], object] | None = None
        self._files: dict[int, int] = {}

    def __getitem__(self, client: int) -> State:
        if client in self._memory:
            self._memory.move_to_end(client)
            return self._memory[client][0]
        if client not in self._files:
            return {}
        if self._folder is None:
            raise RuntimeError(f"the state of client {client} lay on disk, and the store is closed")
        return read(self._path(client))

    def __setitem__(self, client: int, state: State) -> None:
        size = _size(state)
        self._held += size - (self._memory.pop(client, ({}, 0))[1])
        self._memory[client] = (state, size)
        while self.cap is not None and self._held > self.cap and self._memory:
            oldest, (out, freed) = self._memory.popitem(last=False)
            write(out, self._path(oldest))
            self._files[oldest] = self._path(oldest).stat().st_size
            self._held -= freed

    def __iter__(self) -> Iterator[int]:
        return iter(sorted({*self._memory, *self._files}))

    def __len__(self) -> int:
        return len({*self._memory, *self._files})

    @property
    def memory(self) -> int:
        """Bytes of state in memory."""
        return self._held

    @property
    def disk(self) -> int:
        """Bytes on disk."""
        return sum(self._files.values()) if self._folder is not None else 0

    def clear(self) -> None:
        """Forget all states."""
        self.close()
        self._memory, self._files, self._held = OrderedDict(), {}, 0

    def close(self) -> None:
        """Remove what lies on disk; it cannot be read any more."""
        if self._remove is not None:
            self._remove()
        self._folder = self._remove = None

    def _path(self, client: int) -> Path:
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="cograd-clients-"))
            self._remove = weakref.finalize(self, _remove, self._folder, os.getpid())
        return self._folder / f"{client}.safetensors"


def _remove(folder: Path, owner: int) -> None:
    if os.getpid() == owner:  # a forked process may end with a copy of the store
        shutil.rmtree(folder, ignore_errors=True)


def write(state: State, path: Path) -> None:
    """A state as one safetensors file; scalars are in its metadata."""
    tensors, scalars = parts(state)
    save_file(tensors, path, metadata={"scalars": scalars})


def parts(state: State) -> tuple[dict[str, Tensor], str]:
    """A state's tensors, as safetensors takes them, and its scalars as JSON."""
    # copies: safetensors refuses tensors that share storage
    tensors = {
        name: value.detach().clone(memory_format=torch.contiguous_format)
        for name, value in state.items()
        if isinstance(value, Tensor)
    }
    scalars = {name: value for name, value in state.items() if not isinstance(value, Tensor)}
    return tensors, json.dumps(scalars)


def read(path: Path) -> State:
    """Inverse of `write`. Raises ValueError for another file."""
    with safe_open(path, framework="pt") as file:
        scalars = (file.metadata() or {}).get("scalars")
        if scalars is None:
            raise ValueError(f"{path} is not a state that cograd wrote")
        state: dict[str, Any] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return {**state, **json.loads(scalars)}


def _size(state: State) -> int:
    return sum(value.nbytes if isinstance(value, Tensor) else 8 for value in state.values())
