"""Put the recorded figures of DGC into the README's table: python scripts/readme_table.py

A test keeps the README's table equal to what this writes.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from cograd.papers import find

README = Path(__file__).parent.parent / "README.md"
COLUMNS = ("accuracy, 24 epochs", "train loss", "upload a step", "at 100 Mbit/s a step")
TABLE = re.compile(r"^\| system .*?(?=\n\n)", re.MULTILINE | re.DOTALL)


def table(result: dict[str, Any]) -> str:
    """The result's main columns as Markdown."""
    rows = {(row["system"], row["metric"]): row for row in result["table"]}
    units = [rows[result["table"][0]["system"], metric]["unit"] for metric in COLUMNS]
    heads = [f"{metric}, {unit}" for metric, unit in zip(COLUMNS, units, strict=True)]
    lines = [f"| system | {' | '.join(heads)} |", "|---|" + "---:|" * len(heads)]
    for system in dict.fromkeys(row["system"] for row in result["table"]):
        cells = [f"{r['mean']:.4g} ± {r['sd']:.2g}" for r in (rows[system, metric] for metric in COLUMNS)]
        lines.append(f"| {system} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    result = find("dgc").recorded()
    assert result is not None
    text = README.read_text()
    if not TABLE.search(text):
        raise SystemExit("README.md has no table that begins with '| system '")
    README.write_text(TABLE.sub(lambda _: table(result), text))


if __name__ == "__main__":
    main()
