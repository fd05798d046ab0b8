"""Claims and results: what a paper says, what was measured, and whether it holds - computed, never typed in."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from statistics import mean, stdev
from typing import Any, Literal

import torch

SCHEMA_VERSION = "cograd-result/1"

Kind = Literal["exact", "measured", "reported"]
Op = Literal["<=", ">=", "=="]

_KINDS = ("exact", "measured", "reported")
_OPS = {"<=": lambda a, b: a <= b, ">=": lambda a, b: a >= b, "==": lambda a, b: a == b}


@dataclass(frozen=True)
class Claim:
    """One checkable sentence. A conjunction is several claims whose ids share a prefix.

    ``values`` holds one number a seed: a paired difference or ratio (method and baseline on the same seed), so
    that `measured`, their mean, is what ``op`` compares with ``threshold``. ``op`` None means that the claim is
    reported and asserts nothing. ``kind`` *exact* is arithmetic, *measured* comes from runs here, *reported*
    only quotes the paper. ``reason`` says why a claim does not hold.

    Raises ValueError for an unknown kind or op and for an assertion without numbers, threshold or
    threshold_source.
    """

    id: str
    text: str
    source: str
    kind: Kind
    values: Sequence[float] = ()
    op: Op | None = None
    threshold: float | None = None
    threshold_source: str | None = None
    unit: str = ""
    paper_value: float | None = None
    reason: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in _KINDS or self.op not in (None, *_OPS):
            raise ValueError(
                f"claim {self.id!r}: kind must be one of {', '.join(_KINDS)} and op None or one of "
                f"{', '.join(_OPS)}; got {self.kind!r}, {self.op!r}"
            )
        if self.op is not None and (not self.values or self.threshold is None or self.threshold_source is None):
            raise ValueError(
                f"claim {self.id!r} asserts {self.op}: it needs values, a threshold and where that is from"
            )
        if self.kind == "reported" and self.op is not None:
            raise ValueError(f"claim {self.id!r} is reported only and cannot assert {self.op}")

    @property
    def measured(self) -> float | None:
        """Mean of the values; None if there are none."""
        return mean(self.values) if self.values else None

    @property
    def sd(self) -> float | None:
        """Sample standard deviation of the values; None for fewer than two."""
        return _sd(self.values)

    @property
    def holds(self) -> bool | None:
        """None where nothing is asserted. A value that is not finite does not hold."""
        if self.op is None or self.threshold is None or self.measured is None:
            return None
        return math.isfinite(self.measured) and _OPS[self.op](self.measured, self.threshold)

    @property
    def verdict(self) -> str:
        """``holds``, ``does not hold`` or ``reported``."""
        return {True: "holds", False: "does not hold", None: "reported"}[self.holds]

    def to_json(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "text": self.text,
            "source": self.source,
            "kind": self.kind,
            "unit": self.unit,
            "paper_value": _finite(self.paper_value),
            "measured": _number(self.measured),
            "sd": _number(self.sd),
            "n": len(self.values),
            "op": self.op,
            "threshold": _finite(self.threshold),
            "threshold_source": self.threshold_source,
            "holds": self.holds,
            "reason": self.reason,
        }


@dataclass(frozen=True)
class Row:
    """One cell of a result's table: a metric of a system over seeds."""

    system: str
    metric: str
    unit: str
    values: Sequence[float]

    def to_json(self) -> dict[str, Any]:
        return {
            "system": self.system,
            "metric": self.metric,
            "unit": self.unit,
            "mean": _number(mean(self.values)),
            "sd": _number(_sd(self.values)),
            "n": len(self.values),
        }


@dataclass(frozen=True)
class Curve:
    """A metric of a system along x: ``runs`` holds one list of values a seed."""

    system: str
    metric: str
    x_label: str
    x: Sequence[float]
    runs: Sequence[Sequence[float]]

    def to_json(self) -> dict[str, Any]:
        columns = list(zip(*self.runs, strict=True))
        return {
            "system": self.system,
            "metric": self.metric,
            "x_label": self.x_label,
            "x": list(self.x),
            "mean": [_number(mean(c)) for c in columns],
            "sd": [_number(_sd(c)) for c in columns],
        }


@dataclass(frozen=True)
class Result:
    """What one run of a paper found. ``to_json`` follows the schema in ``core/result.schema.json``."""

    paper: str
    scale: str
    seeds: Sequence[int]
    claims: Sequence[Claim]
    table: Sequence[Row]
    curves: Sequence[Curve]
    stamp: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def holds(self) -> bool:
        """Whether every claim that asserts something holds."""
        return all(c.holds is not False for c in self.claims)

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA_VERSION,
            "paper": self.paper,
            "scale": self.scale,
            "seeds": list(self.seeds),
            "claims": [c.to_json() for c in self.claims],
            "table": [r.to_json() for r in self.table],
            "curves": [c.to_json() for c in self.curves],
            "environment": environment(),
            "stamp": dict(self.stamp),
            "seconds": round(self.seconds, 1),
        }


def _number(x: float | None) -> float | None:
    """A number as JSON can hold it: six significant digits, None where it is not finite."""
    return float(f"{x:.6g}") if x is not None and math.isfinite(x) else None


def _finite(x: float | None) -> float | None:
    """A number that was given, all its digits, as JSON can hold it."""
    return x if x is not None and math.isfinite(x) else None


def _sd(values: Sequence[float]) -> float | None:
    """Standard deviation; None for a single value, NaN where one is not finite (`stdev` raises there)."""
    if len(values) < 2:
        return None
    return stdev(values) if all(map(math.isfinite, values)) else math.nan


def environment() -> dict[str, Any]:
    """What the numbers were measured on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def result_schema() -> dict[str, Any]:
    """The JSON Schema of a result file."""
    text = resources.files("cograd.core").joinpath("result.schema.json").read_text(encoding="utf-8")
    return dict(json.loads(text))
