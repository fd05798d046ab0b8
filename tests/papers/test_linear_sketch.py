"""What the linear sketch's record computes: the attack's threshold, problems, private training, its picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from cograd.core.claim import Result
from cograd.papers import _linear_sketch_cells as cells
from cograd.papers import find, linear_sketch
from cograd.papers._gradient_matching import cosine, match
from cograd.papers._lab import Lab


def test_the_attack_recovers_from_the_gradient_and_from_twice_the_pixels_and_not_below() -> None:
    """128 rows for 64 pixels, and 32."""
    assert cells.attack(0, None, 0.0, 1)["mse"] < 1e-8
    assert cells.attack(0, 128, 0.0, 1)["mse"] < 1e-8
    assert cells.attack(0, 32, 0.0, 1)["mse"] > 0.03


@pytest.mark.parametrize(
    "variant",
    [
        {"desketched": True},
        {"label_known": False},
        {"local_steps": 3},
        {"desketched": True, "local_steps": 2},
    ],
)
def test_every_variant_of_the_attack_recovers_from_twice_the_pixels(variant: dict[str, Any]) -> None:
    record = cells.attack(0, 128, 0.0, 1, **variant)
    assert record["mse"] < 1e-8
    assert record["label"]


def test_the_variants_fail_below_the_pixels() -> None:
    for variant in ({"desketched": True}, {"local_steps": 3}):
        assert cells.attack(0, 32, 0.0, 1, **variant)["mse"] > 0.03


MATRIX = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
HIDDEN = torch.tensor([[0.1, 0.9, 0.4, 0.6]], dtype=torch.float64)


def test_the_attack_solves_a_linear_problem() -> None:
    guess = match(lambda v: MATRIX @ v[0], MATRIX @ HIDDEN[0], (1, 4), seed=0)
    torch.testing.assert_close(guess.x, HIDDEN, atol=1e-9, rtol=0)
    assert guess.distance < 1e-18
    assert guess.labels is None


def test_by_cosine_the_attack_finds_the_direction() -> None:
    """A length would tell nothing: what is seen is ten times what an input of that size gives."""
    guess = match(lambda v: MATRIX @ v[0], 10 * MATRIX @ HIDDEN[0], (1, 4), seed=0, distance=cosine)
    assert float(torch.cosine_similarity(guess.x, HIDDEN)) == pytest.approx(1, abs=1e-12)
    assert guess.distance < 1e-18
    assert float((guess.x - 10 * HIDDEN).abs().max()) > 1  # which squared distance would find
    one = torch.tensor([1.0, 0.0]), torch.tensor([3.0, 4.0])
    assert float(cosine(*one)) == pytest.approx(1 - 3 / 5)


def test_the_attack_finds_labels_that_it_does_not_know() -> None:
    """Gradients of softmax regression with intercept, of two inputs one by one, of class 2 and 0."""
    weights = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    inputs = torch.cat([HIDDEN, HIDDEN.flip(1)])

    def observe(x: Tensor, labels: Tensor) -> Tensor:
        wide = torch.cat([x, torch.ones(2, 1, dtype=x.dtype)], 1)
        slopes = (wide @ weights.t()).softmax(1) - labels
        return (slopes.unsqueeze(2) * wide.unsqueeze(1)).flatten()

    truth = torch.eye(3, dtype=torch.float64)[[2, 0]]
    guess = match(observe, observe(inputs, truth), (2, 4), seed=0, classes=3)
    torch.testing.assert_close(guess.x, inputs, atol=1e-4, rtol=0)
    assert guess.labels is not None
    assert guess.labels.shape == (2, 3)
    assert guess.labels.argmax(1).tolist() == [2, 0]
    torch.testing.assert_close(guess.labels.sum(1), torch.ones(2, dtype=torch.float64))


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
    for part in (
        "theory.",
        "floats.tuned.",
        "floats.sketch-tuned-gd-not.",
        "spiky.",
        "local.5.",
        "attack.",
        "private.1.",
        "redraw",
        "bytes",
    ):
        assert any(id.startswith(part) for id in ids)
    assert {f"attack.{id}" for id in linear_sketch.VARIANTS} < set(ids)
    assert all(claim.reason is None or claim.holds is False for claim in findings.claims)
    rows = {(row.system, row.metric): row.values for row in findings.table}
    assert list(rows["SRHT, b = 65", "best step"]) == [2.0]
    result = Result("linear-sketch", "full", [0, 1, 2], findings.claims, findings.table, findings.curves)
    paper.draw(result.to_json(), tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000
