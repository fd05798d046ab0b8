"""Cells are computed once, saved when done, and continued; progress goes to the console."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from cograd.papers._lab import Cell, Lab, Record, Report

STAMP = {"files": {"a": "1"}, "data": {}, "torch": "2"}
CELLS = [{"system": "a/b c", "seed": seed, "lr": 0.1} for seed in range(3)]


class Counting:
    """Computes a cell by counting; fails at one seed if asked."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.seeds: list[int] = []
        self.fails_at = fails_at

    def __call__(self, cell: Cell, report: Report) -> Record:
        if cell["seed"] == self.fails_at:
            raise KeyboardInterrupt
        report("half way")
        self.seeds.append(cell["seed"])
        return {"value": 10 * cell["seed"]}


def lab(out: Path, stamp: dict[str, object] = STAMP) -> tuple[Lab, io.StringIO]:
    text = io.StringIO()
    return Lab("smoke", range(3), out, stamp, Console(file=text)), text


def values(records: list[Record]) -> list[int]:
    return [record["value"] for record in records]


def test_a_rerun_computes_nothing_and_says_so(tmp_path: Path) -> None:
    first, again = Counting(), Counting()
    one, text = lab(tmp_path)
    assert values(one.map(CELLS, first)) == [0, 10, 20]
    assert "[3/3] a/b c, seed 2 done" in text.getvalue()
    two, text = lab(tmp_path)
    assert values(two.map(CELLS, again)) == [0, 10, 20]
    assert (first.seeds, again.seeds) == ([0, 1, 2], [])
    assert "3 of 3 cells are there already" in text.getvalue()
    assert two.seconds == one.seconds > 0


def test_an_interrupted_run_continues_where_it_stopped(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        lab(tmp_path)[0].map(CELLS, Counting(fails_at=2))
    rest = Counting()
    assert len(lab(tmp_path)[0].map(CELLS, rest)) == 3
    assert rest.seeds == [2]


def test_a_half_written_cell_is_computed_again(tmp_path: Path) -> None:
    lab(tmp_path)[0].map(CELLS, Counting())
    next(tmp_path.rglob("*-1-*.json")).write_text('{"value": 1')
    rest = Counting()
    assert values(lab(tmp_path)[0].map(CELLS, rest)) == [0, 10, 20]
    assert rest.seeds == [1]


def test_cells_of_other_settings_or_other_code_are_not_taken(tmp_path: Path) -> None:
    lab(tmp_path)[0].map(CELLS, Counting())
    other = Counting()
    lab(tmp_path)[0].map([{**c, "lr": 0.2} for c in CELLS], other)
    lab(tmp_path, {**STAMP, "torch": "3"})[0].map(CELLS, other)
    assert other.seeds == [0, 1, 2, 0, 1, 2]


def test_a_terminal_shows_a_bar_with_the_time_left(tmp_path: Path) -> None:
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=120)
    Lab("smoke", range(3), tmp_path, STAMP, console).map(CELLS, Counting())
    assert "left" in text.getvalue()
    assert "3/3" in text.getvalue()
