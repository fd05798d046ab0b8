"""The README says what was recorded, and its lines are those that the docs show."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from cograd.papers import find

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_its_table_is_the_recorded_result() -> None:
    spec = importlib.util.spec_from_file_location("readme_table", ROOT / "scripts" / "readme_table.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    result = find("dgc").recorded()
    assert result is not None
    assert script.table(result) in README
    assert f"over {len(result['seeds'])} seeds" in README


def test_its_ten_lines_are_the_usage_of_dgc() -> None:
    assert find("dgc").usage in README


def test_what_it_links_to_is_there() -> None:
    assert (ROOT / "src/cograd/results/dgc.png").is_file()
    assert (ROOT / "NOTICE").is_file()
