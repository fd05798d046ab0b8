"""Every paper: its entry exists, its usage is short, and what is recorded is well formed and explained."""

from __future__ import annotations

from importlib import import_module

import jsonschema
import pytest

from cograd.core.claim import result_schema
from cograd.papers import Paper, UnknownMethod, every, find

PAPERS = pytest.mark.parametrize("paper", every(), ids=lambda paper: paper.slug)


@PAPERS
def test_its_entry_is_exported_by_its_room(paper: Paper) -> None:
    module, _, name = paper.entry.rpartition(".")
    assert module == f"cograd.{paper.room}"
    assert name in import_module(module).__all__
    assert len(paper.usage.strip().splitlines()) <= 10
    assert paper.arxiv in paper.citation


@PAPERS
def test_what_is_recorded_follows_the_schema_and_explains_what_does_not_hold(paper: Paper) -> None:
    result = paper.recorded()
    if result is None:
        pytest.skip(f"{paper.slug} has no record yet")
    jsonschema.validate(result, result_schema())
    assert result["scale"] == "full"
    assert len(result["seeds"]) >= 3
    assert paper.recorded_file("png").is_file()
    assert [c["id"] for c in result["claims"] if c["holds"] is False and not c["reason"]] == []


def test_an_unknown_method_is_met_with_the_nearest() -> None:
    with pytest.raises(UnknownMethod, match="no method 'dcg'; did you mean dgc"):
        find("dcg")
    with pytest.raises(UnknownMethod, match=r"there are: .*dgc"):
        find("zzzzzz")
