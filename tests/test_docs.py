"""The documentation is true: its snippets run and print what the pages say, and every method gets a page.

Every ```python fence of docs runs in a namespace and a folder of its own, unless it is fenced as ```python
no-run. A process group of one is there only for fences below one that makes it, on the same page. A ```text
fence that follows a fence directly is what it must print.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import FileStore  # type: ignore[attr-defined]  # it is, but torch does not say so

from cograd import papers
from cograd.core.claim import Claim, Result, Row
from cograd.papers import Paper

DOCS = Path(__file__).parent.parent / "docs"
FENCE = re.compile(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```$)?", re.MULTILINE | re.DOTALL)
PAPERS = papers.every()


def _snippets() -> Iterator[Any]:
    for page in sorted(DOCS.rglob("*.md")):
        text, grouped = page.read_text(), False
        for fence in FENCE.finditer(text):
            makes_group = "init_process_group" in fence[1]
            line = text[: fence.start()].count("\n") + 2
            code = "\n" * (line - 1) + fence[1]  # so that a traceback shows the page's line
            yield pytest.param(page, code, fence[2], grouped and not makes_group, id=f"{page.name}:{line}")
            grouped = grouped or makes_group


def _run(code: str, file: str) -> str:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, file, "exec"), {"__name__": "__main__"})
    return printed.getvalue()


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A folder of its own, and the environment of a single worker; ends the process group that was made."""
    monkeypatch.chdir(tmp_path)
    # port 0: the store of rank 0 takes a free one, and nobody else has to know it
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "0")):
        monkeypatch.setenv(name, value)
    torch.manual_seed(0)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.parametrize(("page", "code", "expected", "grouped"), list(_snippets()))
@pytest.mark.usefixtures("alone")
def test_a_snippet_runs_and_prints_what_the_page_says(
    page: Path, code: str, expected: str | None, grouped: bool, tmp_path: Path
) -> None:
    if grouped:
        store = FileStore(str(tmp_path / "store"), 1)
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    printed = _run(code, str(page))
    if expected is not None:
        assert printed == expected


def test_there_are_snippets_to_run() -> None:
    assert len(list(_snippets())) > 20


@pytest.mark.parametrize("paper", PAPERS, ids=lambda paper: paper.slug)
@pytest.mark.usefixtures("alone")
def test_a_papers_usage_is_short_and_runs(paper: Paper) -> None:
    assert len(paper.usage.splitlines()) <= 10
    _run(paper.usage, f"{paper.slug} usage")


# The site and its hook.


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site: a warning fails the build."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(DOCS.parent / "src")}
    built = subprocess.run(command, cwd=DOCS.parent, env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return folder


def test_every_method_has_a_page_in_the_navigation(site: Path) -> None:
    start = (site / "index.html").read_text()
    for paper in PAPERS:
        page = (site / "methods" / f"{paper.slug}.html").read_text()
        assert ("No result is recorded" in page) == (paper.recorded() is None)
        assert re.search(rf'<a href="methods/{paper.slug}\.html" class="md-nav__link', start)


def test_every_mark_of_a_page_is_filled(site: Path) -> None:
    for page in site.rglob("*.html"):
        assert "<!-- generated" not in page.read_text()


def test_pages_fetch_nothing_from_elsewhere(site: Path) -> None:
    fetched = re.compile(r"<(?:script|link|img|iframe)\b[^>]*(?:src|href)=\"?(?:https?:)?//[^>]*>")
    for page in site.rglob("*.html"):
        assert fetched.findall(page.read_text()) == []


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    from importlib.util import module_from_spec, spec_from_file_location

    spec = spec_from_file_location("docs_hooks", DOCS / "_hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("paper", PAPERS, ids=lambda paper: paper.slug)
def test_a_page_without_a_result_says_so(hooks: ModuleType, paper: Paper) -> None:
    text = hooks.method_page(paper, None)
    assert "No result is recorded" in text
    assert paper.usage.rstrip() in text
    assert f"::: {hooks._entry(paper).__module__}." in text


def _result(paper: Paper) -> dict[str, Any]:
    assertion: dict[str, Any] = {"op": ">=", "threshold": 2.0, "threshold_source": "pilot | seeds"}
    return Result(
        paper=paper.slug,
        scale="full",
        seeds=[0, 1, 2],
        claims=[
            Claim("a", "it is <more>", "Table 1", "measured", [3.0, 4.0, 5.0], **assertion, unit="x"),
            Claim("b", "it is more", "Table 2", "measured", [1.0, 1.0, 1.0], **assertion, reason="too short"),
            Claim("c", "it is said", "Table 3", "reported", paper_value=93.9),
        ],
        table=[Row("dense", "loss", "nats", [0.1, 0.2, 0.3]), Row("dense", "best lr", "", [0.1])],
        curves=[],
        seconds=61.5,
    ).to_json()


def test_a_recorded_result_is_shown_with_verdicts_and_spread(hooks: ModuleType) -> None:
    paper = PAPERS[0]
    text = hooks.method_page(paper, _result(paper))
    assert (
        "| holds | it is &lt;more&gt;<br>*Table 1* | 4 ± 1 x (n = 3) | &gt;= 2<br>*pilot \\| seeds* |" in text
    )
    assert "| **does not hold** | it is more<br>*Table 2*<br>too short |" in text
    assert "| reported | it is said<br>*Table 3* | - | - | 93.9 |" in text
    assert "| dense | 0.2 ± 0.1 | 0.1 (n = 1) |" in text
    assert "seeds 0, 1, 2; 61.5 s" in text


def test_tables_keep_their_columns(hooks: ModuleType) -> None:
    for name in ("methods", "data-sets"):
        rows = hooks.GENERATED[name]().splitlines()
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) == 1
