"""What a paper's file provides, and what its run brings back."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cograd import data
from cograd.core.claim import Claim, Curve, Result, Row
from cograd.core.stamp import stale, stamp
from cograd.data.loading import readers

if TYPE_CHECKING:
    from cograd.papers._lab import Lab


@dataclass(frozen=True)
class Findings:
    """Claims, table and curves of a run."""

    claims: Sequence[Claim]
    table: Sequence[Row]
    curves: Sequence[Curve]


@dataclass(frozen=True)
class Paper:
    """A paper's entry: citation, where its method is, and how its claims are run.

    ``run(lab)`` trains what ``lab.scale`` and ``lab.seeds`` ask for and returns findings; ``draw(result,
    path)`` makes the picture from the result's JSON alone. ``usage`` is a script of at most ten lines that
    starts under ``cograd launch`` or in one process, as the docs show it.
    """

    slug: str
    title: str
    authors: str
    arxiv: str
    venue: str
    room: str
    entry: str
    module: str
    summary: str
    usage: str
    datasets: Sequence[str]
    seeds: int
    run: Callable[[Lab], Findings]
    draw: Callable[[dict[str, Any], Path], None]

    @property
    def citation(self) -> str:
        return f"{self.authors}: {self.title}. {self.venue}. arXiv:{self.arxiv}"

    def stamp(self) -> dict[str, Any]:
        """The stamp of this paper's code and data as they are now."""
        return stamp(self.module, {name: data.digest(name) for name in self.datasets}, *readers(*self.datasets))

    def recorded(self) -> dict[str, Any] | None:
        """The result that ships with the package."""
        file = self.recorded_file("json")
        return json.loads(file.read_text()) if file.is_file() else None

    def recorded_file(self, suffix: str) -> Traversable:
        """Where the recorded result (``json``) or its picture (``png``) is, if there is one."""
        return resources.files("cograd").joinpath("results", f"{self.slug}.{suffix}")

    def status(self) -> dict[str, Any]:
        """Whether a result is recorded, how many claims it asserts and whether all hold (None without a
        result), which of those that do not are unexplained, and what made it stale."""
        result = self.recorded()
        asserted = [c for c in result["claims"] if c["holds"] is not None] if result else []
        return {
            "slug": self.slug,
            "room": self.room,
            "recorded": result is not None,
            "claims": len(asserted),
            "holds": all(c["holds"] for c in asserted) if result else None,
            "held": sum(c["holds"] for c in asserted),
            "unexplained": [c["id"] for c in asserted if not c["holds"] and not c["reason"]],
            "stale": stale(result["stamp"], self.stamp()) if result else [],
        }


def assemble(paper: Paper, lab: Lab, findings: Findings) -> Result:
    """The result of a run."""
    return Result(
        paper=paper.slug,
        scale=lab.scale,
        seeds=lab.seeds,
        claims=findings.claims,
        table=findings.table,
        curves=findings.curves,
        stamp=lab.stamp,
        seconds=lab.seconds,
    )
