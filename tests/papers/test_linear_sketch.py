"""What the linear sketch's record computes: the attack's threshold, problems, private training, its picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from cograd.core.claim import Result
from cograd.papers import _linear_sketch_cells as cells
from cograd.papers import find, linear_sketch
from cograd.papers._gradient_matching import match
from cograd.papers._lab import Lab


def test_the_attack_recovers_from_the_gradient_and_from_twice_the_pixels_and_not_below() -> None:
    """128 rows for 64 pixels, and 32."""
    assert cells.attack(0, None, 0.0, 1)["mse"] < 1e-8
    assert cells.attack(0, 128, 0.0, 1)["mse"] < 1e-8
    assert cells.attack(0, 32, 0.0, 1)["mse"] > 0.03


def test_the_attack_solves_a_linear_problem() -> None:
    matrix = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = torch.tensor([0.1, 0.9, 0.4, 0.6], dtype=torch.float64)
    guess, distance = match(lambda v: matrix @ v, matrix @ x, (4,), seed=0)
    torch.testing.assert_close(guess, x, atol=1e-9, rtol=0)
    assert distance < 1e-18


@pytest.mark.parametrize("name", ["digits", "words"])
def test_the_optimum_is_one(name: str) -> None:
    """Gradient descent from zero comes nearer to it at every step and never below."""
    problem = cells.problem(name)
    record = cells.descend("dense", 0, name, 0, 1.0, 1, 12, 0.0, True, {})
    assert record["gaps"][0] == 1
    assert all(0 < b < a for a, b in zip(record["gaps"], record["gaps"][1:], strict=False))
    assert problem.smoothness > 0
    sizes = {len(y) for _, y in problem.clients()}
    assert len(sizes) == 1
    held = [len(y.unique()) for _, y in problem.clients()]
    assert sum(held) <= problem.classes + 9  # label-sorted shards: a class is cut at their borders only


def test_a_run_that_diverges_is_given_up() -> None:
    record = cells.descend("countsketch", 0, "digits", 16, 16.0, 1, 50, 0.01, True, {})
    assert record["rounds"] is None
    assert len(record["gaps"]) < 50
    assert linear_sketch.rounds(record) == float("inf")


def test_private_training_keeps_its_epsilon() -> None:
    record = cells.private("srht", 0, 4.0, 16, 0.5, "gradient")
    assert 3.9 < record["epsilon"] <= 4
    assert record["accuracy"] > 60
    in_sketch = cells.private("srht", 0, 4.0, 16, 0.5, "sketch")
    assert in_sketch["epsilon"] == record["epsilon"]
    assert cells.private("dense", 0, None, 16, 0.5, "gradient")["epsilon"] is None


def test_every_part_makes_claims_and_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole of ``full`` with made-up records."""

    def record(cell: Any, report: Any) -> dict[str, Any]:
        if cell["part"] == "attack":
            return {"mse": 0.05 if cell["rows"] == 48 or cell["noise"] == 1 else 1e-12}
        if cell["part"] == "private":
            return {"accuracy": 95.0 - cell["lr"]}
        better = abs(cell["step"] - 2.0)
        return {"rounds": 100 + int(10 * better), "floats": cell["rows"] or 650, "gaps": [1.0, 0.5, 0.01]}

    monkeypatch.setattr(linear_sketch, "compute", record)
    paper = find("linear-sketch")
    with Lab("full", [0, 1, 2], tmp_path, {}, Console(quiet=True)) as lab:
        findings = paper.run(lab)
    ids = [claim.id for claim in findings.claims]
    assert len(ids) == len(set(ids))
    for part in ("theory.", "floats.tuned.", "spiky.", "local.5.", "attack.", "private.1.", "redraw", "bytes"):
        assert any(id.startswith(part) for id in ids)
    rows = {(row.system, row.metric): row.values for row in findings.table}
    assert list(rows["SRHT, b = 65", "best step"]) == [2.0]
    result = Result("linear-sketch", "full", [0, 1, 2], findings.claims, findings.table, findings.curves)
    paper.draw(result.to_json(), tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000
