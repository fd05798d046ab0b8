"""Claims: verdicts are computed from numbers, and a result is JSON that its schema accepts."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import jsonschema
import pytest
import torch

from cograd.core.claim import SCHEMA_VERSION, Claim, Curve, Result, Row, environment, result_schema

CLAIM = Claim("c", "it is better", "Table 1", "measured", (0.5, 1.0, 1.5), ">=", 0.9, "the card", unit="points")
STAMP = {"files": {"core/claim": "00"}, "data": {"mnist": "11"}, "torch": "2.6.0"}


def result(**changes) -> Result:
    parts = {
        "paper": "dgc",
        "scale": "smoke",
        "seeds": [0, 1],
        "claims": [CLAIM, Claim("r", "quoted", "abstract", "reported", paper_value=3.0)],
        "table": [Row("DGC", "accuracy", "%", [90.0, 92.0]), Row("SGD", "accuracy", "%", [91.0])],
        "curves": [Curve("DGC", "loss", "step", [0, 1], [[1.0, 0.5], [2.0, 0.25]])],
        "stamp": STAMP,
        "seconds": 1.234,
    }
    return Result(**{**parts, **changes})


def check_schema(r: Result) -> dict:
    """The result's JSON as it comes back from a file, held against the schema."""
    text = json.dumps(r.to_json(), allow_nan=False)
    content = json.loads(text)
    jsonschema.Draft202012Validator(result_schema()).validate(content)
    return content


@pytest.mark.parametrize(
    ("op", "threshold", "holds"),
    [
        (">=", 1.0, True),
        (">=", 1.001, False),
        ("<=", 1.0, True),
        ("<=", 0.999, False),
        ("==", 1.0, True),
        ("==", 1.0000001, False),
    ],
)
def test_holds_compares_the_mean_with_the_threshold(op, threshold, holds):
    claim = replace(CLAIM, op=op, threshold=threshold)
    assert claim.holds is holds
    assert claim.verdict == ("holds" if holds else "does not hold")


def test_measured_is_the_mean_of_paired_differences():
    method, baseline = (91.0, 94.0, 88.0), (90.0, 90.0, 87.0)
    claim = replace(CLAIM, values=[m - b for m, b in zip(method, baseline, strict=True)])
    assert claim.measured == 2.0
    assert claim.sd == pytest.approx(math.sqrt(3))


def test_one_value_has_no_spread_and_none_no_mean():
    assert replace(CLAIM, values=(2.0,)).sd is None
    quoted = Claim("r", "quoted", "abstract", "reported")
    assert (quoted.measured, quoted.sd, quoted.holds, quoted.verdict) == (None, None, None, "reported")


def test_without_an_op_nothing_is_asserted():
    claim = replace(CLAIM, op=None)
    assert (claim.measured, claim.holds, claim.verdict) == (1.0, None, "reported")


@pytest.mark.parametrize("values", [(math.nan, 1.0), (math.inf, 1.0), (-math.inf, 1.0), (math.inf, -math.inf)])
@pytest.mark.parametrize("op", ["<=", ">=", "=="])
def test_what_is_not_finite_does_not_hold(values, op):
    claim = replace(CLAIM, values=values, op=op)
    assert claim.holds is False
    assert math.isnan(claim.sd)
    content = claim.to_json()
    assert (content["measured"], content["sd"], content["n"]) == (None, None, 2)


@pytest.mark.parametrize("missing", [{"values": ()}, {"threshold": None}, {"threshold_source": None}])
def test_an_assertion_needs_numbers_and_a_sourced_threshold(missing):
    with pytest.raises(ValueError, match="claim 'c' asserts >=: it needs values, a threshold and where"):
        replace(CLAIM, **missing)


def test_a_reported_claim_cannot_assert():
    with pytest.raises(ValueError, match="claim 'c' is reported only and cannot assert >="):
        replace(CLAIM, kind="reported")


@pytest.mark.parametrize(
    ("bad", "got"), [({"kind": "guess"}, "'guess', '>='"), ({"op": ">"}, "'measured', '>'")]
)
def test_an_unknown_kind_or_op_is_refused(bad, got):
    with pytest.raises(ValueError, match=f"exact, measured, reported and op None or one of .*; got {got}"):
        replace(CLAIM, **bad)


def test_a_result_holds_when_no_assertion_fails():
    failed = replace(CLAIM, threshold=2.0)
    assert result().holds
    assert not result(claims=[CLAIM, failed]).holds
    assert result(claims=[]).holds


def test_a_results_json_follows_its_schema():
    content = check_schema(result())
    assert content["schema"] == SCHEMA_VERSION
    assert content["seconds"] == 1.2
    assert content["environment"] == environment()
    assert content["environment"]["torch"] == torch.__version__
    assert content["claims"][0] == {
        "id": "c",
        "text": "it is better",
        "source": "Table 1",
        "kind": "measured",
        "unit": "points",
        "paper_value": None,
        "measured": 1.0,
        "sd": 0.5,
        "n": 3,
        "op": ">=",
        "threshold": 0.9,
        "threshold_source": "the card",
        "holds": True,
        "reason": None,
    }
    assert content["table"][0] == {
        "system": "DGC",
        "metric": "accuracy",
        "unit": "%",
        "mean": 91.0,
        "sd": 1.41421,
        "n": 2,
    }
    assert content["table"][1]["sd"] is None
    assert content["curves"][0]["mean"] == [1.5, 0.375]
    assert content["curves"][0]["sd"] == [0.707107, 0.176777]


def test_numbers_that_json_cannot_hold_become_null():
    content = check_schema(
        result(
            claims=[replace(CLAIM, values=(math.nan, 1.0), threshold=math.inf, paper_value=math.nan)],
            table=[Row("a", "m", "", [math.inf, 1.0]), Row("b", "m", "", [math.nan])],
            curves=[Curve("a", "m", "x", [0, 1, 2], [[math.nan, 1.0, 2.0], [1.0, math.inf, 2.0]])],
        )
    )
    claim = content["claims"][0]
    assert [claim[k] for k in ("measured", "sd", "threshold", "paper_value", "holds")] == [None] * 4 + [False]
    assert [(row["mean"], row["sd"]) for row in content["table"]] == [(None, None), (None, None)]
    assert content["curves"][0]["mean"] == [None, None, 2.0]
    assert content["curves"][0]["sd"] == [None, None, 0.0]


def test_measured_keeps_six_digits_and_a_threshold_all_of_them():
    content = replace(CLAIM, values=(1 / 3,), threshold=0.123456789).to_json()
    assert (content["measured"], content["threshold"]) == (0.333333, 0.123456789)


@pytest.mark.parametrize(
    "change",
    [{"scale": "huge"}, {"seeds": []}, {"stamp": {}}, {"seconds": -1.0}, {"paper": 3}],
)
def test_the_schema_refuses_what_is_no_result(change):
    with pytest.raises(jsonschema.ValidationError):
        check_schema(result(**change))


def test_a_curve_refuses_runs_of_different_length():
    with pytest.raises(ValueError, match="shorter"):
        Curve("a", "m", "x", [0, 1], [[1.0, 2.0], [1.0]]).to_json()


def test_the_schema_itself_is_valid_and_closed():
    schema = result_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    assert set(schema["required"]) == set(schema["properties"])
    assert schema["additionalProperties"] is False
