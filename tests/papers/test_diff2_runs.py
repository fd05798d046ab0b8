"""The runs side by side of DIFF2's paper are those of `Diff2`."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cograd.core.streams import stream
from cograd.machines import BVRLocalSGD, Diff2, Diff2Plan, GDRoutine
from cograd.machines.diff2.clipping import PerRecord
from cograd.papers._diff2_cells import LOCAL, METHOD, Grid, cost
from cograd.papers._diff2_runs import Regression, Softplus, Valley, descend, noise_of_diff2, stream_noise
from cograd.papers.diff2 import _slope


def squared(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return torch.square(model(x).squeeze(-1) - y) / 2


def problem(kind: str) -> tuple[nn.Module, Any]:
    draw = stream(0, kind)
    x, y = draw.normal(60, 6), draw.normal(60)
    torch.manual_seed(0)
    if kind == "regression":
        model: nn.Module = nn.Linear(6, 1, bias=False)
        nn.init.zeros_(model.weight)  # type: ignore[arg-type]
        return model, Regression(x, y)
    model = nn.Sequential(nn.Linear(6, 10), nn.Softplus(), nn.Linear(10, 1))
    start = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    return model, Softplus(x, y, x[:5], y[:5], start)


def plan(**changes: Any) -> Diff2Plan:
    chosen = {"rounds": 7, "restart_every": 3, "epsilon": 20.0, "delta": 1e-3, "clip": 1.0, "diff_clip": 1.0}
    chosen |= {"records": [20, 20, 20], "routine": GDRoutine(0.1), "release": "aggregate"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Diff2Plan(**{**chosen, **changes})


@pytest.mark.parametrize("kind", ["regression", "softplus"])
@pytest.mark.parametrize("clip", [0.3, math.inf])
def test_clipped_means_are_those_of_per_record_gradients(kind: str, clip: float) -> None:
    model, of = problem(kind)
    per_record, records = PerRecord(model, squared), (of.features, of.targets)
    draw = stream(1, "points")
    now, before = (of.start + 0.3 * draw.normal(2, len(of.start)) for _ in range(2))
    forms = [of.form(x) for x in (now, before)]
    change = tuple(a - b for a, b in zip(*forms, strict=True))
    radius = torch.full((2,), clip)
    for run in range(2):
        expected = per_record.mean(records, now[run], clip).vector
        torch.testing.assert_close(of.clipped_mean(forms[0], radius)[run], expected, rtol=1e-4, atol=1e-6)
        expected = per_record.difference(records, now[run], before[run], clip).vector
        torch.testing.assert_close(of.clipped_mean(change, radius)[run], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["regression", "softplus"])
@pytest.mark.filterwarnings("ignore:plan.stability")
def test_runs_side_by_side_are_those_of_diff2(kind: str) -> None:
    """Plans of other intervals, steps and clips in one batch; each is a run of its own."""
    plans = [
        plan(),
        plan(restart_every=1, clip=2.0),
        plan(restart_every=7, routine=GDRoutine(0.3), diff_clip=0.5),
    ]
    model, of = problem(kind)
    trace = descend(of, plans, noise_of_diff2(plans[0], len(of.start)), looks=7)
    assert trace.at == [1, 2, 3, 4, 5, 6, 7]
    for run, one in enumerate(plans):
        model, of = problem(kind)
        workers = [(of.features[i : i + 20], of.targets[i : i + 20]) for i in (0, 20, 40)]
        diff2 = Diff2(model, squared, workers, one)
        for look in range(7):
            diff2.step()
            loss = squared(model, of.features, of.targets).mean()
            square = (
                PerRecord(model, squared).mean((of.features, of.targets), diff2.x, math.inf).vector.square()
            )
            torch.testing.assert_close(trace.square[run, look], square.sum(), rtol=1e-3, atol=1e-6)
            if kind == "softplus":
                torch.testing.assert_close(trace.losses["loss"][run, look], loss.detach(), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(trace.x[run], diff2.x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["regression", "softplus"])
@pytest.mark.filterwarnings("ignore:plan.stability")
def test_local_steps_side_by_side_are_those_of_diff2_and_cost_what_it_counts(kind: str) -> None:
    routines = [BVRLocalSGD(0.1, 8, 4, 2.0), BVRLocalSGD(0.2, 8, 4, 0.5)]
    plans = [plan(routine=routines[0], seed=3), plan(routine=routines[1], restart_every=2, clip=0.5, seed=3)]
    _, of = problem(kind)
    trace = descend(of, plans, noise_of_diff2(plans[0], len(of.start)), looks=1)
    for run, one in enumerate(plans):
        model, of = problem(kind)
        workers = [(of.features[i : i + 20], of.targets[i : i + 20]) for i in (0, 20, 40)]
        diff2 = Diff2(model, squared, workers, one)
        for _ in range(one.rounds):
            diff2.step()
        torch.testing.assert_close(trace.x[run], diff2.x, rtol=1e-4, atol=1e-5)
        evaluations, sent = cost(one)
        assert diff2.ledger.sent() == 4 * sent * diff2.space.numel
        assert sum(diff2.ledger.worked("grad", w) for w in range(3)) == pytest.approx(60 * evaluations)


def test_the_valley_is_its_formula_and_smooth() -> None:
    valley = Valley(stream(0, "centre").normal(5))
    x = torch.linspace(-1, 1, 5).requires_grad_()
    value = valley.losses(x[None])["loss"]
    torch.testing.assert_close(torch.autograd.grad(value.sum(), x)[0], valley.form(x.detach()[None])[0][0])
    curvature = torch.autograd.functional.hessian(lambda x: valley.losses(x[None])["loss"].sum(), valley.centre)
    assert float(curvature.diagonal().max()) == pytest.approx(1.02)


def test_a_rounds_noise_depends_on_the_round_alone() -> None:
    one, two = (stream_noise(4, 3, "x") for _ in range(2))
    one(0)
    assert torch.equal(one(1), two(1))


def test_the_loss_of_a_regression_is_counted_from_its_minimum() -> None:
    _, of = problem("regression")
    best = torch.linalg.lstsq(of.features, of.targets[:, None]).solution.T
    assert float(of.losses(best)["loss"]) == pytest.approx(0, abs=1e-6)


def test_a_grid_and_a_slope() -> None:
    grid = Grid((10, 30), (0.1,), (1.0,), (2.0, 3.0), (10, 3, 1), (4, 8), (16,), (5.0,))
    assert grid.settings("DP-GD") == [(10, 1, 0.1, 1.0, 1.0), (30, 1, 0.1, 1.0, 1.0)]
    found = grid.settings(METHOD)
    assert {s[:2] for s in found} == {(10, 2), (10, 3), (10, 10), (30, 3), (30, 10), (30, 30)}
    assert len(found) == len(set(found)) == 12
    local = grid.settings(LOCAL)
    assert {s[:5] for s in local} == set(found)
    assert {s[5:] for s in local} == {(4, 16, 5.0), (8, 16, 5.0)}
    assert _slope([1.0, 2.0, 3.0], [2.0, 4.0, 6.0]) == pytest.approx(2)


@pytest.mark.parametrize(
    ("setting", "ends"),
    [
        ((30, 1, 0.3, 2.0, 2.0), []),
        ((30, 1, 0.1, 4.0, 4.0), ["lr", "clip"]),
        ((30, 10, 0.3, 2.0, 8.0), ["diff_clip"]),
        ((10, 10, 0.3, 2.0, 6.0), ["rounds"]),
        ((100, 100, 0.3, 2.0, 6.0), ["rounds"]),
        ((30, 3, 0.3, 2.0, 6.0), ["restart interval"]),
        ((30, 10, 0.3, 2.0, 6.0, 2, 32, 5.0), []),
        ((30, 10, 0.3, 2.0, 6.0, 8, 64, 9.0), ["local clip", "local steps", "local batch"]),
    ],
)
def test_ends_of_a_grid_are_open_where_there_is_more(setting: Any, ends: list[str]) -> None:
    grid = Grid((10, 30, 100), (0.1, 0.3, 1.0), (1.0, 2.0, 4.0), (4.0, 6.0, 8.0), (10, 1))
    grid = replace(grid, steps=(2, 4, 8), batches=(16, 32, 64), local_clips=(3.0, 5.0, 9.0))
    assert grid.open_ends(setting) == ends
    capped = replace(grid, capped=True).open_ends(setting)
    assert capped == [end for end in ends if end != "rounds" or setting[0] == 10]
