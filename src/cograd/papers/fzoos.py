"""FZooS against finite differences: few queries for much of the gradient, at the price of bytes.

Three tasks, five clients each. *Synthetic*: quadratics in 100 dimensions on which clients agree nearly (C =
0.5) or hardly (C = 5), 10 local steps, 20 rounds, the safeguard on for all; what is measured is the gap to the
known least value. Every system runs with the published local step 0.01 and with its own best one of one grid,
found on pilot seeds. *Attack*: images of MNIST-5k at 14 x 14 against five classifiers that have seen five
classes each, 5 local steps; an image is lost when the mean margin of its label falls below 0. *Metric*: 1 -
macro-F1 of a network of 310 parameters at 7 x 7, piecewise constant, 10 local steps. The last two run without
the safeguard and compare at equal queries.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from cograd.clients.fzoos import FZooS
from cograd.core.claim import Claim, Curve, Op, Row
from cograd.papers._federation import tuned
from cograd.papers._fzoos_runs import (
    CLIENTS,
    DIFFERENCES,
    FEATURES,
    FIXED,
    FZOOS,
    PLAIN,
    PRGF,
    PROX,
    PROX_LIGHT,
    SCAFFOLD_1,
    SCAFFOLD_2,
    ZO,
    attack,
    metric,
    synthetic,
)
from cograd.papers._paper import Findings, Paper

if TYPE_CHECKING:
    from cograd.papers._lab import Lab, Record

CARD, EXACT = "card, section 7", "card, section 6"
PILOT_SEEDS = (100, 101)
PUBLISHED = 0.01
"""The local step of the released code."""

ALIKE, APART = 0.5, 5.0
ROUNDS, EARLY = 20, 10
GRID = (0.005, 0.007, 0.01, 0.014, 0.02, 0.028)
SYSTEMS = (FZOOS, FIXED, PLAIN, *DIFFERENCES)

REAL = (FZOOS, ZO, SCAFFOLD_1, SCAFFOLD_2)
BUDGET, EQUAL = 1300, 600
"""Queries a client: after which an image is given up, and where success is compared (from the pilot)."""
ATTACK = {"task": "attack", "images": 10, "radius": 0.03, "budget": BUDGET}
ATTACK_GRID = (0.025, 0.05, 0.1)
METRIC = {"task": "metric", "radius": 0.5, "budget": 2200}
METRIC_GRID = (0.005, 0.01, 0.02)


STEPS = (
    "the published step is too short for the baselines: with 0.014 to 0.02 SCAFFOLD is 8 to 15 times nearer "
    "after 10 rounds than with 0.01, while FZooS has then come to the floor that its step sets"
)
"""Why the lead is less where each system has its own step."""


class Synthetic:
    """The records on quadratics of one difference C, with the published step and with one's own."""

    def __init__(self, lab: Lab, difference: float) -> None:
        self.rates = {system: _rate(lab, system, difference) for system in SYSTEMS if system != FIXED}
        self.rates[FIXED] = self.rates[FZOOS]
        self.published = {s: self._records(lab, s, difference, PUBLISHED) for s in SYSTEMS}
        self.own = {s: self._records(lab, s, difference, self.rates[s]) for s in SYSTEMS}

    @staticmethod
    def _records(lab: Lab, system: str, difference: float, lr: float) -> list[Record]:
        return lab.map([_cell(system, seed, difference, lr) for seed in lab.seeds], synthetic)


def _cell(system: str, seed: int, difference: float, lr: float, rounds: int = ROUNDS) -> dict[str, Any]:
    return {
        "task": "quadratic", "system": system, "seed": seed, "difference": difference, "lr": lr,
        "rounds": rounds, "dim": 100, "steps": 10, "features": FEATURES,
    }  # fmt: skip


def _rate(lab: Lab, system: str, difference: float) -> float:
    cell = _cell(system, 0, difference, 0.0, EARLY)
    score: Callable[[Record], float] = lambda record: -math.log10(record["gap"][-1])  # noqa: E731
    return tuned(lab, synthetic, cell, score, grid=GRID, seeds=PILOT_SEEDS)


class Real:
    """The records of the attack and of the metric."""

    def __init__(self, lab: Lab) -> None:
        pilot = PILOT_SEEDS[:1]
        self.rates: dict[tuple[str, str], float] = {}
        self.attack: dict[str, list[Record]] = {}
        self.metric: dict[str, list[Record]] = {}
        for system in REAL:
            cell = {**ATTACK, "system": system}
            lr = tuned(lab, attack, cell, lambda r: -fmean(_needed(r)), grid=ATTACK_GRID, seeds=pilot)
            self.rates["attack", system] = lr
            self.attack[system] = lab.map([{**cell, "lr": lr, "seed": seed} for seed in lab.seeds], attack)
            cell = {**METRIC, "system": system}
            lr = tuned(lab, metric, cell, lambda r: -float(r["error"][-1]), grid=METRIC_GRID, seeds=pilot)
            self.rates["metric", system] = lr
            self.metric[system] = lab.map([{**cell, "lr": lr, "seed": seed} for seed in lab.seeds], metric)


def _needed(record: Record) -> list[float]:
    """Queries until an image was lost; the budget where it was not."""
    return [BUDGET if n is None else n for n in record["queries"]]


def _success(record: Record, queries: float = EQUAL) -> float:
    """The share of images lost within so many queries."""
    return fmean(n is not None and n <= queries for n in record["queries"])


def run(lab: Lab) -> Findings:
    """Tune, run all systems on all seeds, and check the claims."""
    if lab.scale == "smoke":
        return _smoke(lab)
    synthetics = {difference: Synthetic(lab, difference) for difference in (APART, ALIKE)}
    real = Real(lab)
    claims = [*_synthetic_claims(synthetics), *_real_claims(real), *_exact_claims(synthetics[APART], real)]
    return Findings(claims, [*_synthetic_table(synthetics), *_real_table(real)], _curves(synthetics, real))


def _smoke(lab: Lab) -> Findings:
    small = {"dim": 30, "steps": 5, "rounds": 6, "features": 500}
    found = {
        system: lab.map([{**_cell(system, seed, APART, PUBLISHED), **small} for seed in lab.seeds], synthetic)
        for system in (FZOOS, ZO)
    }
    claims = [
        Claim(
            "smoke", "gap of FZooS over FedZO's, 6 rounds in 30 dimensions", CARD, "measured",
            _ratios(found[FZOOS], found[ZO], 6), "<=", 1.0, CARD,
        ),
        *_ledgers(found[FZOOS], 30, 5, 500),
    ]  # fmt: skip
    table = [Row(system, "gap", "", _gaps(records, 6)) for system, records in found.items()]
    return Findings(claims, table, [_gap_curve(system, records) for system, records in found.items()])


# Claims


def _gaps(records: Sequence[Record], rounds: int) -> list[float]:
    return [record["gap"][rounds - 1] for record in records]


def _ratios(one: Sequence[Record], other: Sequence[Record], rounds: int) -> list[float]:
    """Paired ratios of gaps."""
    return [a / b for a, b in zip(_gaps(one, rounds), _gaps(other, rounds), strict=True)]


def _over_best(records: Mapping[str, list[Record]], rounds: int) -> list[float]:
    """FZooS's gap over that of the seed's best system of finite differences."""
    others = zip(*(_gaps(records[system], rounds) for system in DIFFERENCES), strict=True)
    return [gap / min(other) for gap, other in zip(_gaps(records[FZOOS], rounds), others, strict=True)]


def _synthetic_claims(found: Mapping[float, Synthetic]) -> list[Claim]:
    apart, alike = found[APART], found[ALIKE]

    def claim(
        ident: str, text: str, values: Sequence[float], op: Op | None = None, by: float | None = None,
        reason: str | None = None,
    ) -> Claim:  # fmt: skip
        source = CARD if op else None
        made = Claim(
            ident, text, "figures of the synthetic functions", "measured", values, op, by, source, reason=reason
        )
        return replace(made, reason=None) if made.holds else made

    asked = [record["queries"][EARLY - 1] for record in apart.published[FZOOS]]
    least = min(apart.published[system][0]["queries"][EARLY - 1] for system in DIFFERENCES)
    cosines = [
        fmean(one["cosine"]) / fmean(other["cosine"])
        for one, other in zip(apart.published[FZOOS], apart.published[ZO], strict=True)
    ]
    return [
        claim("lead", "C = 5, 10 rounds, step 0.01: gap of FZooS over that of the best finite differences",
              _over_best(apart.published, EARLY), "<=", 0.2),
        claim("lead.queries", "and its queries over theirs", [n / least for n in asked], "<=", 0.55),
        claim("lead.own", "and each with its own best step", _over_best(apart.own, EARLY), "<=", 0.2, STEPS),
        claim("lead.late", "after 20 rounds, step 0.01: a fixed step of Adam is the floor of all",
              _over_best(apart.published, ROUNDS)),
        claim("lead.late.own", "and each with the step that was its best at 10", _over_best(apart.own, ROUNDS)),
        claim("correction", "C = 5, 10 rounds, step 0.01: gap of FZooS over that without correction",
              _ratios(apart.published[FZOOS], apart.published[PLAIN], EARLY), "<=", 0.1),
        claim("correction.own", "and each with its own best step",
              _ratios(apart.own[FZOOS], apart.own[PLAIN], EARLY), "<=", 0.1),
        claim("correction.alike", "C = 0.5: the same, at most twice",
              _ratios(alike.published[FZOOS], alike.published[PLAIN], EARLY), "<=", 2.0),
        claim("correction.alike.less", "and at least half",
              _ratios(alike.published[FZOOS], alike.published[PLAIN], EARLY), ">=", 0.5),
        claim("correction.length", "C = 5, 10 rounds, step 0.01: gap with a correction of length 1 over 1/t",
              _ratios(apart.published[FIXED], apart.published[FZOOS], EARLY)),
        claim("cosine", "C = 5: cosine of the surrogate's gradient with the true one, over 20 differences'",
              cosines, ">=", 1.5),
    ]  # fmt: skip


def _real_claims(real: Real) -> list[Claim]:
    lead = [100 * (_success(a) - _success(b)) for a, b in zip(real.attack[FZOOS], real.attack[ZO], strict=True)]
    needed = [
        fmean(_needed(a)) / fmean(_needed(b)) for a, b in zip(real.attack[FZOOS], real.attack[ZO], strict=True)
    ]
    best = zip(*([r["error"][-1] for r in real.metric[s]] for s in REAL if s != FZOOS), strict=True)
    errors = [100 * (r["error"][-1] - min(other)) for r, other in zip(real.metric[FZOOS], best, strict=True)]
    return [
        Claim(
            "attack", f"images lost within {EQUAL} queries a client: FZooS over FedZO", "figures of the attack",
            "measured", lead, ">=", 10.0, CARD, "points",
        ),
        Claim(
            "attack.queries", f"queries that an image takes ({BUDGET} at most), over FedZO",
            "figures of the attack", "measured", needed,
        ),
        Claim(
            "metric", f"1 - macro-F1 after {METRIC['budget']} queries a client: FZooS less the best finite "
            "differences", "figures of the metric", "measured", errors, unit="points",
        ),
    ]  # fmt: skip


def _exact_claims(apart: Synthetic, real: Real) -> list[Claim]:
    records = real.metric[FZOOS]
    each = 4 * CLIENTS * (310 + FEATURES)
    sent = [(r["up"][-1] + r["down"][-1]) / (2 * each * (len(r["up"]) - 1)) for r in records]
    return [
        Claim(
            "bytes", "metric: bytes of FZooS over 2 N R (d + M) 4", "section 3", "exact", sent, "==", 1.0, EXACT
        ),
        *_ledgers(apart.published[FZOOS], 100, 10, FEATURES),
        Claim(
            "price", "C = 5: bytes of FZooS over FedZO's, a round with the safeguard", "not in the paper",
            "exact",
            [_sent(a) / _sent(b) for a, b in zip(apart.published[FZOOS], apart.published[ZO], strict=True)],
        ),
    ]  # fmt: skip


def _sent(record: Record) -> float:
    return float(record["up"][-1] + record["down"][-1])


def _ledgers(records: Sequence[Record], dim: int, steps: int, features: int) -> list[Claim]:
    """Queries and bytes with the safeguard, over their formulas."""
    rounds = len(records[0]["gap"])
    queries = FZooS(local_steps=steps, safeguard=True).queries(rounds)
    sent = CLIENTS * rounds * (2 * 4 * (dim + features) + 4 * dim + 16)
    return [
        Claim(
            "queries", "queries of a client over 10 + R (1 + T + 5 (T - 1) + 51 + 2)", "section 3", "exact",
            [record["queries"][-1] / queries for record in records], "==", 1.0, EXACT,
        ),
        Claim(
            "bytes.safeguard", "bytes with the safeguard over N R (8 (d + M) + 4 d + 16)", "section 3", "exact",
            [_sent(record) / sent for record in records], "==", 1.0, EXACT,
        ),
    ]  # fmt: skip


# Table, curves, picture


def _synthetic_table(found: Mapping[float, Synthetic]) -> list[Row]:
    rows = []
    for difference, runs in found.items():
        for system in SYSTEMS:
            name, published, own = _at(system, difference), runs.published[system], runs.own[system]
            rows += [
                *(Row(name, f"gap, {n} rounds", "step 0.01", _gaps(published, n)) for n in (5, EARLY, ROUNDS)),
                *(Row(name, f"gap, {n} rounds", "own step", _gaps(own, n)) for n in (EARLY, ROUNDS)),
                Row(name, "own step", "", [runs.rates[system]]),
                Row(name, "cosine with the true gradient", "", [fmean(r["cosine"]) for r in published]),
                Row(name, "queries", "a client and round", [r["queries"][-1] / ROUNDS for r in published]),
                Row(name, "sent by all", "kB a round", [_sent(r) / ROUNDS / 1e3 for r in published]),
            ]
    return rows


def _real_table(real: Real) -> list[Row]:
    rows = []
    for system in REAL:
        rows += [
            Row(f"{system}, attack", f"lost in {EQUAL} queries", "%",
                [100 * _success(r) for r in real.attack[system]]),
            Row(f"{system}, attack", "queries", "an image and client",
                [fmean(_needed(r)) for r in real.attack[system]]),
            Row(f"{system}, attack", "own step", "", [real.rates["attack", system]]),
            Row(f"{system}, metric", "1 - macro-F1", "%", [100 * r["error"][-1] for r in real.metric[system]]),
            Row(f"{system}, metric", "own step", "", [real.rates["metric", system]]),
        ]  # fmt: skip
    return rows


def _at(system: str, difference: float) -> str:
    return f"{system}, C = {difference:g}"


GAP, LOST, ERROR, QUERIES = "gap", "images lost, %", "1 - macro-F1, %", "queries of a client"


def _gap_curve(system: str, records: Sequence[Record]) -> Curve:
    return Curve(system, GAP, QUERIES, records[0]["queries"], [r["gap"] for r in records])


def _curves(found: Mapping[float, Synthetic], real: Real) -> list[Curve]:
    curves = [
        _gap_curve(_at(system, difference), runs.own[system])
        for difference, runs in found.items()
        for system in SYSTEMS
    ]
    budgets = list(range(0, BUDGET + 1, 50))
    for system in REAL:
        lost = [[100 * _success(r, n) for n in budgets] for r in real.attack[system]]
        curves.append(Curve(f"{system}, attack", LOST, QUERIES, budgets, lost))
        errors = [[100 * e for e in r["error"]] for r in real.metric[system]]
        curves.append(Curve(f"{system}, metric", ERROR, QUERIES, real.metric[system][0]["queries"], errors))
    return curves


# The picture, from the result alone.

COLOURS = {
    FZOOS: "#1b6ca8", FIXED: "#8fbfe0", PLAIN: "#8a6fb0", ZO: "#444444", PRGF: "#888888", SCAFFOLD_1: "#d95f02",
    SCAFFOLD_2: "#f4a259", PROX: "#cccccc", PROX_LIGHT: "#2a9d8f",
}  # fmt: skip


def draw(result: dict[str, Any], path: Path) -> None:
    """Along the queries of a client: the gap of both quadratics, images lost, and the metric."""
    from cograd.papers._plot import figure

    curves = {curve["system"]: curve for curve in result["curves"]}
    full = _at(FZOOS, APART) in curves
    panels = [
        (f", C = {APART:g}", "clients disagree (C = 5)", GAP),
        (f", C = {ALIKE:g}", "clients agree (C = 0.5)", GAP),
        (", attack", "attack on five classifiers", LOST), (", metric", "a metric, d = 310", ERROR),
    ] if full else [("", "30 dimensions, C = 5", GAP)]  # fmt: skip
    seeds = len(result["seeds"])
    title = f"FZooS: five clients that give values alone, {seeds} seed{'s' * (seeds > 1)}"
    with figure(path, len(panels), title) as axes:
        for ax, (suffix, what, metric) in zip(axes, panels, strict=True):
            for system, colour in COLOURS.items():
                if (curve := curves.get(system + suffix)) is not None:
                    width = 2.2 if system == FZOOS else 1.2
                    ax.plot(curve["x"], curve["mean"], color=colour, label=system, linewidth=width)
            ax.set(xlabel=QUERIES, ylabel=metric, title=what, yscale="log" if metric == GAP else "linear")
        for ax in axes[::2]:  # two panels after one another show the same systems
            ax.legend(frameon=False, fontsize=6)


USAGE = """\
import torch
from cograd.clients import FZooS
from cograd.clients.fzoos import BlackBox, RandomFeatures
from cograd.engines.federated import Simulation
centres = (0.2, 0.5, 0.9)
clients = [BlackBox(lambda x, c=c: float((x - c).square().sum())) for c in centres]
sim = Simulation(FZooS(description=RandomFeatures(500)), torch.full((20,), 0.4), None, clients)
row = sim.run(rounds=5)[-1]
print(sim.server["x"].mean(), row.work, row.up, row.down)
"""

PAPER = Paper(
    slug="fzoos",
    title="Federated Zeroth-Order Optimization using Trajectory-Informed Surrogate Gradients",
    authors="Yao Shu, Xiaoqiang Lin, Zhongxiang Dai, Bryan Kian Hsiang Low",
    arxiv="2308.04077",
    venue="preprint, 2023",
    room="clients",
    entry="cograd.clients.FZooS",
    module=__name__,
    summary="clients share surrogates of functions that give values alone, and correct one another's gradients",
    usage=USAGE,
    datasets=("mnist-5k",),
    seeds=3,
    run=run,
    draw=draw,
)
