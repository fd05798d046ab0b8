"""The picture of what the slow-link lab found: minutes to the target, by system and rate."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cograd.papers._plot import figure

COLOURS = ("#1b6ca8", "#2a9d8f", "#f4a259", "#e76f51")


def draw(found: Mapping[str, Any], path: Path) -> None:
    """Bars on a log scale; a system that does not reach the target has none."""
    rates = sorted({row["mbit"] for row in found["rows"]})
    systems = list(dict.fromkeys(row["system"] for row in found["rows"]))
    unit = "% accuracy" if found["workload"] == "mlp" else "nats"
    title = f"minutes to {found['target']:.3g} {unit}, 4 hosts"
    with figure(path, 2, title) as (ax, spare):
        spare.remove()
        ax.set_position([0.1, 0.2, 0.85, 0.65])
        width = 0.8 / len(rates)
        for number, rate in enumerate(rates):
            minutes = {r["system"]: r["target_seconds"] for r in found["rows"] if r["mbit"] == rate}
            places = [i + (number - (len(rates) - 1) / 2) * width for i in range(len(systems))]
            heights = [(minutes[s] or 0) / 60 for s in systems]
            ax.bar(places, heights, width, color=COLOURS[number % 4], label=f"{rate:g} Mbit/s")
        ax.set_yscale("log")
        ax.set_xticks(range(len(systems)), systems, rotation=30, ha="right")
        ax.set_ylabel("minutes to target")
        ax.legend(frameon=False)
