"""The command line as its user meets it: output, files, exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from typer.testing import CliRunner

from cograd import cli, papers
from cograd.core.claim import Claim, Curve, Row, result_schema
from cograd.papers import Findings, Paper, find
from cograd.papers._lab import Lab

runner = CliRunner()


def cograd(*args: str) -> Any:
    return runner.invoke(cli.app, list(args))


def fake(monkeypatch: pytest.MonkeyPatch, measured: float, reason: str | None = None) -> None:
    """The one method there is: it claims that its number is at most 1."""

    def run(lab: Lab) -> Findings:
        cells = [{"system": "it", "seed": seed} for seed in lab.seeds]
        values = [r["value"] for r in lab.map(cells, lambda cell, report: {"value": measured})]
        claim = Claim("c", "It is small", "Sec. 1", "measured", values, "<=", 1.0, "card", "m", reason=reason)
        return Findings([claim], [Row("it", "size", "m", values)], [Curve("it", "size", "t", [0], [values])])

    def draw(result: dict[str, Any], path: Path) -> None:
        path.write_bytes(b"picture")

    paper = replace(find("dgc"), slug="fake", run=run, draw=draw)
    monkeypatch.setattr(papers, "every", lambda: [paper])


def test_run_writes_result_and_picture_and_ends_with_0_if_the_claims_hold(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake(monkeypatch, 0.5)
    done = cograd("run", "fake", "--seeds", "3", "--out", str(tmp_path), "--json", str(tmp_path / "also.json"))
    assert done.exit_code == 0
    assert "holds" in done.stdout
    result = json.loads((tmp_path / "result.json").read_text())
    jsonschema.validate(result, result_schema())
    assert json.loads((tmp_path / "also.json").read_text()) == result
    assert result["claims"][0] | {"measured": 0.5, "sd": 0.0, "n": 3, "holds": True} == result["claims"][0]
    assert (tmp_path / "result.png").read_bytes() == b"picture"


def test_run_ends_with_3_if_a_claim_does_not_hold(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake(monkeypatch, 2.0, "it is large here")
    done = cograd("run", "fake", "--out", str(tmp_path))
    assert done.exit_code == 3
    assert "does not hold" in done.stdout
    assert "it is large here" in done.stdout


def test_json_goes_to_stdout_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake(monkeypatch, 0.5)
    done = cograd("run", "fake", "--out", str(tmp_path), "--json", "-")
    assert json.loads(done.stdout)["paper"] == "fake"


def test_usage_errors_end_with_2(monkeypatch: pytest.MonkeyPatch) -> None:
    unknown = cograd("run", "dcg")
    assert unknown.exit_code == 2
    assert "no method 'dcg'; did you mean dgc" in unknown.stderr
    assert cograd("run", "dgc", "--scale", "half").exit_code == 2
    assert cograd("run", "dgc", "--seeds", "-1").exit_code == 2
    assert cograd("launch", "-n", "0", "x.py").exit_code == 2
    few = cograd("run", "dgc", "--record", "--seeds", "2")
    assert few.exit_code == 2
    assert "at least 3 seeds; got full, 2" in few.stderr


def test_errors_end_with_1_and_their_text(monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["cograd", "launch", "no-such-script.py"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    assert "no script 'no-such-script.py'" in capfd.readouterr().err


def test_list_and_show_and_version() -> None:
    assert "dgc" in cograd("list").stdout
    listed = {paper["slug"]: paper for paper in json.loads(cograd("list", "--json").stdout)}
    assert listed["dgc"]["entry"] == "cograd.machines.DGC"
    shown = cograd("show", "dgc").stdout
    assert "arXiv:1712.01887" in shown
    assert "DensityWarmup(" in shown
    assert cograd("--version").stdout.strip() == "0.1.0"


def test_show_says_where_the_picture_is() -> None:
    assert "dgc.png" in cograd("show", "dgc").stdout


def test_status_has_one_row_a_method() -> None:
    rows = json.loads(cograd("status", "--json").stdout)
    assert {"slug", "room", "recorded", "claims", "holds", "stale"} <= set(rows[0])
    assert "dgc" in cograd("status").stdout


def test_status_names_the_file_that_made_a_result_stale_and_the_claim_without_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    paper = find("dgc")
    result = paper.recorded()
    assert result is not None
    result["stamp"]["files"]["core/codecs"] = "another"
    result["claims"][0] |= {"holds": False, "reason": None}
    monkeypatch.setattr(Paper, "recorded", lambda self: result)
    (row,) = (row for row in json.loads(cograd("status", "--json").stdout) if row["slug"] == "dgc")
    assert "core/codecs changed" in row["stale"]
    assert row["unexplained"] == [result["claims"][0]["id"]]


def test_launch_runs_a_script_and_hands_on_its_arguments(tmp_path: Path) -> None:
    script = tmp_path / "say.py"
    script.write_text("import os, sys; print('rank', os.environ['RANK'], *sys.argv[1:])")
    command = [sys.executable, "-m", "cograd.cli", "launch", "-n", "2", str(script), "--lr", "0.1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == ["rank 0 --lr 0.1", "rank 1 --lr 0.1"]


def test_smoke_of_dgc_trains_four_real_workers(tmp_path: Path) -> None:
    done = cograd("run", "dgc", "--scale", "smoke", "--out", str(tmp_path))
    assert done.exit_code == 0, done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    jsonschema.validate(result, result_schema())
    assert result["seconds"] < 60
    upload = {r["system"]: r["mean"] for r in result["table"] if r["metric"] == "upload a step"}
    assert upload["dense momentum SGD"] == pytest.approx(4 * 235146 / 1024, rel=1e-4)
    assert upload["gradient dropping"] < upload["DGC"] < upload["dense momentum SGD"] / 10
    assert (tmp_path / "result.png").stat().st_size > 10_000
