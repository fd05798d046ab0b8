"""Where a paper's run happens: cells that are saved when done, worker processes, progress with time left."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from cograd.engines.launch import Workers

Cell = Mapping[str, Any]
Record = dict[str, Any]


class Lab:
    """One run of a paper at a scale, over seeds.

    A *cell* is a dict that says all about one training (system, seed, settings). `map` computes the cells that
    are not in ``out`` yet, saves each when it is done, and returns all their records, so an interrupted run
    continues where it stopped. Cells of other code or data are kept apart by the stamp.
    """

    def __init__(
        self,
        scale: str,
        seeds: Sequence[int],
        out: Path,
        stamp: Mapping[str, Any],
        console: Console | None = None,
    ) -> None:
        self.scale, self.seeds, self.out, self.stamp = scale, list(seeds), out, dict(stamp)
        self.console = console or Console(stderr=True)
        digest = hashlib.blake2b(json.dumps(self.stamp, sort_keys=True).encode(), digest_size=4)
        self._cells = out / "cells" / digest.hexdigest()
        self._workers: Workers | None = None
        self._seconds: dict[Path, float] = {}

    def __enter__(self) -> Lab:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._workers is not None:
            self._workers.close()

    def workers(self, count: int) -> Workers:
        """Worker processes, started at the first call and reused by every system of the run."""
        if self._workers is None:
            self.console.print(f"starting {count} worker processes ...", highlight=False)
            self._workers = Workers(count, threads=1)
        return self._workers

    def map(self, cells: Sequence[Cell], compute: Callable[[Cell, Report], Record]) -> list[Record]:
        """Records of all cells in their order; ``compute(cell, report)`` is called for the missing ones.

        ``report(text)`` shows what a cell is at.
        """
        done = {path: record for path in map(self._path, cells) if (record := self._load(path)) is not None}
        todo = [cell for cell in cells if self._path(cell) not in done]
        with _Progress(self.console, len(cells), len(cells) - len(todo)) as progress:
            for cell in todo:
                label = f"{cell['system']}, seed {cell['seed']}"
                began = time.monotonic()
                record = compute(cell, partial(progress.note, label))
                record = {**record, "seconds": time.monotonic() - began}
                self._save(self._path(cell), record)
                done[self._path(cell)] = record
                progress.advance(label)
        self._seconds |= {path: record["seconds"] for path, record in done.items()}
        return [done[self._path(cell)] for cell in cells]

    @property
    def seconds(self) -> float:
        """Time that the cells of this run took, whenever they were computed."""
        return sum(self._seconds.values())

    def _path(self, cell: Cell) -> Path:
        text = json.dumps(cell, sort_keys=True)
        key = hashlib.blake2b(text.encode(), digest_size=4).hexdigest()
        name = re.sub(r"[^\w.]+", "-", f"{cell['system']}-{cell['seed']}-{key}")
        return self._cells / f"{name}.json"

    def _load(self, path: Path) -> Record | None:
        try:
            return dict(json.loads(path.read_text()))
        except (FileNotFoundError, ValueError):  # ValueError: the run was cut off as it wrote the file
            return None

    def _save(self, path: Path, record: Record) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_text(json.dumps(record))
        os.replace(part, path)


Report = Callable[[str], None]


class _Progress:
    """A bar with time left on a terminal; a line a cell elsewhere."""

    def __init__(self, console: Console, total: int, done: int) -> None:
        self.console, self.total, self.start, self.done = console, total, done, done
        self.began = time.monotonic()
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self.task = self.bar.add_task("", total=total, completed=done, left="")

    def __enter__(self) -> _Progress:
        if self.done:
            self.console.print(f"{self.done} of {self.total} cells are there already", highlight=False)
        self.bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.stop()

    def note(self, label: str, text: str) -> None:
        self.bar.update(self.task, description=f"{label}: {text}")

    def advance(self, label: str) -> None:
        self.done += 1
        elapsed = time.monotonic() - self.began
        left = elapsed / (self.done - self.start) * (self.total - self.done)
        self.bar.update(self.task, completed=self.done, left=f"about {_duration(left)} left")
        if not self.console.is_terminal:
            self.console.print(
                f"[{self.done}/{self.total}] {label} done, about {_duration(left)} left",
                highlight=False,
                markup=False,
            )


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"
