"""AGLFOP: what local and global fairness are made of on three splits, and how far models are from the frontier.

*Adult*: income from 87 features without sex and education; the group is the sex. Two clients; splits uniform,
skewed by sex (0.9), and with synergy (0.9). FedAvg and models of each client's own (an MLP of 64, Adam, 10
rounds of 2 epochs), trained on 80 % of the rows, each at its own best learning rate of one grid, by a pilot
seed. What is measured is counted on the other 20 %. FedAvg's predictions are then relabelled in three ways, by
rules that the program finds on the training counts: fair in all the data together (by group, as for one
client), in each client, and in both. All models are placed under the frontier of their split.

*Synthetic*: the paper's data and splits (strengths 0.92 and 1, 1 % of the rows swapped), labels alone: what
bounds on the two disparities cost at the least.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from cograd.clients.aglfop import (
    ClientJoint,
    Disparities,
    Optimum,
    aglfop,
    disparities,
    frontier,
    permutation_baseline,
)
from cograd.core.claim import Claim, Curve, Row
from cograd.papers._aglfop_cells import (
    AVG,
    CLIENTS,
    LOCAL,
    ROUNDS,
    accuracy,
    cell,
    compute,
    labels_of,
)
from cograd.papers._federation import tuned
from cograd.papers._paper import Findings, Paper

if TYPE_CHECKING:
    from cograd.papers._lab import Lab, Record

SPLITS = ("uniform", "skew", "synergy")
GRID, PILOT_SEEDS, SMOKE_ROUNDS, SMOKE_RATE = (0.003, 0.01, 0.03), (100,), 3, 0.1
CARD = "pilots of the card, other seeds"
TIGHT, SYNTHETIC_EPS, ALPHA = 0.001, 0.01, 0.95
"""Bits that a relabelling may leave; the bound on synthetic data; how often its group is its label."""

GLOBALLY, LOCALLY, BOTH = "relabelled, globally fair", "relabelled, locally fair", "relabelled, fair in both"
MODELS = (AVG, LOCAL, GLOBALLY, LOCALLY, BOTH)
LOCAL_BOUNDS = (0.0, 0.005, 0.01, 0.02, 0.04, 0.07, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5)
GLOBAL_BOUNDS = (0.0, 0.001, 0.002, 0.005, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05)


@dataclass(frozen=True)
class Placed:
    """A model of one split and seed: its joint, what it tells, and the best accuracy at its disparities."""

    joint: ClientJoint
    measured: Disparities
    best: Optimum

    @classmethod
    def of(cls, joint: ClientJoint) -> Placed:
        found = disparities(joint)
        return cls(joint, found, aglfop(joint, eps_global=found.global_, eps_local=found.local))

    @property
    def beats(self) -> float:
        """Accuracy above the frontier; there must be none."""
        return self.joint.accuracy - self.best.accuracy


def _joint(record: Record, which: str) -> ClientJoint:
    return ClientJoint.merge([torch.tensor(table) for table in record[which]])


def relabelled(trained: ClientJoint, tested: ClientJoint, how: str) -> ClientJoint:
    """The predictions of ``tested``, relabelled as is best on ``trained`` for the kind of fairness.

    The rule's probabilities are taken into the joint themselves; nothing is drawn.
    """
    pooled = ClientJoint(trained.table.sum(0, keepdims=True), "szyh")
    if how == GLOBALLY:
        rule = aglfop(pooled, eps_global=TIGHT, within="client").rule.relabel
    elif how == LOCALLY:
        rule = aglfop(trained, eps_local=TIGHT, within="client").rule.relabel
    else:
        rule = aglfop(trained, eps_global=TIGHT, eps_local=TIGHT, within="client").rule.relabel
    assert rule is not None
    rule = np.where(np.isnan(rule), np.eye(tested.classes), rule)  # a group that no client had stays as it is
    rule = np.broadcast_to(rule, (tested.clients, *rule.shape[1:]))
    table = np.einsum("szyk,szkh->szyh", tested.table, rule)
    return ClientJoint(table / table.sum(), "szyh")


class Study:
    """Everything that was measured: models by split and name, one a seed."""

    def __init__(self, lab: Lab, name: str, splits: Sequence[str], rounds: int, tune: bool) -> None:
        self.lab, self.splits, self.rates = lab, splits, {}
        self.records: dict[tuple[str, str], list[Record]] = {}
        self.models: dict[tuple[str, str], list[Placed]] = {}
        for how in splits:
            for system in (AVG, LOCAL):
                rate = self._rate(cell(system, name, how, 0, 0.0, rounds)) if tune else SMOKE_RATE
                self.rates[how, system] = rate
                cells = [cell(system, name, how, seed, rate, rounds) for seed in lab.seeds]
                records = self.records[how, system] = lab.map(cells, compute)
                self.models[how, system] = [Placed.of(_joint(record, "tests")) for record in records]
            for kind in MODELS[2:]:
                self.models[how, kind] = [
                    Placed.of(relabelled(_joint(r, "trains"), _joint(r, "tests"), kind))
                    for r in self.records[how, AVG]
                ]

    def _rate(self, pilot: dict[str, Any]) -> float:
        return tuned(self.lab, compute, pilot, accuracy, grid=GRID, seeds=PILOT_SEEDS)

    def each(self, how: str, system: str, name: str) -> list[float]:
        """A measured figure, one a seed."""
        return [float(getattr(model.measured, name)) for model in self.models[how, system]]

    def ratio(self, how: str, over: str, under: str) -> list[float]:
        """Of two of FedAvg's figures, seed by seed; infinite over nothing."""
        pairs = zip(self.each(how, AVG, over), self.each(how, AVG, under), strict=True)
        return [a / b if b > 0 else math.inf for a, b in pairs]


def run(lab: Lab) -> Findings:
    """``full``: Adult on three splits, and the frontier of the synthetic data. Otherwise the synthetic data
    alone, with one small model on a split."""
    full = lab.scale == "full"
    if full:
        study = Study(lab, "adult", SPLITS, ROUNDS, tune=True)
        claims = _split_claims(study)
    else:
        study = Study(lab, "synthetic", SPLITS[2:], SMOKE_ROUNDS, tune=False)
        claims = []
    claims += _exact_claims(study) + _synthetic_claims(lab)
    return Findings(claims, _table(study), _curves(study))


# Claims


def _claim(ident: str, text: str, values: Sequence[float], op: Any, threshold: float, unit: str = "") -> Claim:
    return Claim(ident, text, "card, section 6", "measured", values, op, threshold, CARD, unit)


def _split_claims(study: Study) -> list[Claim]:
    rest = [
        max(pair)
        for pair in zip(
            study.each("uniform", AVG, "redundant"), study.each("uniform", AVG, "masked"), strict=True
        )
    ]
    return [
        _claim("uniform.unique", "uniform split: unique over global disparity",
               study.ratio("uniform", "unique", "global_"), ">=", 0.98),
        _claim("uniform.rest", "uniform split: the larger of redundant and masked", rest, "<=", 1e-3, "bits"),
        _claim("skew.redundant", "split by sex: redundant over global disparity",
               study.ratio("skew", "redundant", "global_"), ">=", 0.95),
        _claim("skew.hidden", "split by sex: it looks fair to clients; global over local",
               study.ratio("skew", "global_", "local"), ">=", 1.5),
        _claim("synergy.masked", "synergy: masked over redundant disparity",
               study.ratio("synergy", "masked", "redundant"), ">=", 3.0),
        _claim("synergy.hidden", "synergy: it looks fair to the server; local over global",
               study.ratio("synergy", "local", "global_"), ">=", 3.0),
    ]  # fmt: skip


def _exact_claims(study: Study) -> list[Claim]:
    """What must hold for every model of every split."""
    runs = [list(models) for models in zip(*study.models.values(), strict=True)]  # by seed
    above = [float(sum(model.beats > 1e-6 for model in models)) for models in runs]
    pairs = [[(m.measured.parity_global, m.measured.pinsker) for m in models] for models in runs]
    wrong = [float(sum(gap >= bound > 0 or gap > bound for gap, bound in found)) for found in pairs]
    sent = []
    for at in range(len(runs)):
        records = [study.records[how, AVG][at] for how in study.splits]
        audits = [
            (r["up"] - len(r["round"]) * CLIENTS * 4 * r["numel"]) / (len(r["round"]) * CLIENTS)
            for r in records
        ]
        sent.append(float(np.mean(audits)))
    return [
        Claim(
            "frontier", f"models above the frontier at their own disparities, of {len(runs[0])}",
            "section 4", "exact", above, "==", 0.0, "the model's own joint is feasible",
        ),
        Claim(
            "pinsker", f"models whose parity gap is not below Pinsker's bound, of {len(runs[0])}",
            "lemma 1", "exact", wrong, "==", 0.0, "lemma 1",
        ),
        Claim(
            "pinsker.tight", "the largest parity gap over its bound", "reviewers' question", "measured",
            [max(gap / bound for gap, bound in found if bound > 0) for found in pairs],
        ),
        Claim(
            "bytes", "sent by a client for an audit, labels included", "section 3", "exact", sent, "==", 64.0,
            "8 integers of 8 bytes", "bytes",
        ),
    ]  # fmt: skip


def _synthetic_claims(lab: Lab) -> list[Claim]:
    """What bounds cost at the least, where the group nearly is the label."""
    bounds = {
        "local": (math.inf, SYNTHETIC_EPS),
        "global": (SYNTHETIC_EPS, math.inf),
        "both": (SYNTHETIC_EPS,) * 2,
    }
    best: dict[tuple[str, str], list[float]] = {}
    for how in SPLITS:
        joints = [labels_of(how, ALPHA, seed) for seed in lab.seeds]
        for kind, (outer, inner) in bounds.items():
            best[how, kind] = [aglfop(j, eps_global=outer, eps_local=inner).accuracy for j in joints]

    def cost(how: str) -> list[float]:
        """Of local fairness on top of global."""
        return [a - b for a, b in zip(best[how, "global"], best[how, "both"], strict=True)]

    return [
        _claim("cheap.skew", "synthetic, 0.01 bits of local disparity: accuracy where the split hides it",
               best["skew", "local"], ">=", 0.90),
        _claim("cheap.uniform", "and where it does not", best["uniform", "local"], "<=", 0.65),
        _claim("cost.synergy", "synthetic, 0.01 bits of global disparity: what that of local costs, synergy",
               cost("synergy"), ">=", 0.03),
        _claim("cost.uniform", "uniform", cost("uniform"), "<=", 0.002),
        _claim("cost.skew", "skewed", cost("skew"), "<=", 0.002),
    ]  # fmt: skip


# Table and curves

COLUMNS = {
    "global": "global_", "local": "local", "unique": "unique", "redundant": "redundant", "masked": "masked",
}  # fmt: skip


def _table(study: Study) -> list[Row]:
    rows = []
    for (how, system), models in study.models.items():
        name = f"{system}, {how}"
        joints = [model.joint for model in models]
        rows += [
            Row(name, "accuracy", "%", [100 * joint.accuracy for joint in joints]),
            Row(name, "frontier", "%", [100 * model.best.accuracy for model in models]),
            *(Row(name, column, "bits", study.each(how, system, field)) for column, field in COLUMNS.items()),
            Row(name, "parity gap", "", study.each(how, system, "parity_global")),
            Row(name, "Pinsker's bound", "", study.each(how, system, "pinsker")),
        ]
        if system == AVG:
            for within in ("pooled", "client"):
                rows.append(Row(name, f"frontier, {within}", "%", _restricted(models, within)))
            chance = [permutation_baseline(joint, draws=50).mean("local") for joint in joints]
            rows.append(Row(name, "local by chance", "bits", chance))
        if system in (AVG, LOCAL):
            rows.append(Row(name, "learning rate", "", [study.rates[how, system]]))
    return rows


def _restricted(models: Sequence[Placed], within: str) -> list[float]:
    found = [
        aglfop(m.joint, eps_global=m.measured.global_, eps_local=m.measured.local, within=within)
        for m in models
    ]
    return [100 * optimum.accuracy for optimum in found]


def _curves(study: Study) -> list[Curve]:
    """Disparities along FedAvg's rounds, and the frontier of each split over the grid of bounds."""
    curves = []
    for how in study.splits:
        records = study.records[how, AVG]
        curves += [
            Curve(
                f"{AVG}, {how}",
                f"{column}, bits",
                "round",
                records[0]["round"],
                [r["rows"][column] for r in records],
            )
            for column in COLUMNS
        ]
        surfaces = [
            frontier(m.joint, eps_global=(*GLOBAL_BOUNDS, math.inf), eps_local=(*LOCAL_BOUNDS, math.inf))
            for m in study.models[how, AVG]
        ]
        accuracies = [100 * surface.accuracy for surface in surfaces]
        curves.append(
            Curve(f"frontier, {how}", "accuracy, %", "local, bits", LOCAL_BOUNDS,
                  [a[-1, :-1].tolist() for a in accuracies])
        )  # fmt: skip
        curves += [
            Curve(f"frontier, {how}, local {bound:g}", "accuracy, %", "global, bits", GLOBAL_BOUNDS,
                  [a[:-1, j].tolist() for a in accuracies])
            for j, bound in enumerate(LOCAL_BOUNDS)
        ]  # fmt: skip
    return curves


# The picture, from the result alone.

PARTS = {"unique": "#1b6ca8", "redundant": "#f4a259", "masked": "#8e5ea2"}
COLOURS = {"uniform": "#444444", "skew": "#d95f02", "synergy": "#8e5ea2"}
MARKS = {AVG: "o", LOCAL: "s", GLOBALLY: "^", LOCALLY: "v", BOTH: "D"}


def draw(result: dict[str, Any], path: Path) -> None:
    """The decomposition as bars, the frontiers with the models under them, and a surface."""
    from cograd.papers._plot import figure

    table = {(row["system"], row["metric"]): row["mean"] for row in result["table"]}
    curves = {(c["system"], c["metric"]): c for c in result["curves"]}
    splits = [how for how in SPLITS if (f"{AVG}, {how}", "global") in table]
    seeds = len(result["seeds"])
    where = "Adult, group = sex" if len(splits) == 3 else "synthetic data"
    title = f"Disparities and the frontier: {where}, 2 clients, {seeds} seed{'s' * (seeds > 1)}"
    with figure(path, 3, title) as axes:
        _bars(axes[0], table, splits)
        _frontiers(axes[1], table, curves, splits)
        _surface(axes[2], table, curves, splits[-1])


def _bars(ax: Any, table: dict[tuple[str, str], float], splits: Sequence[str]) -> None:
    for at, how in enumerate(splits):
        part = {name: table[f"{AVG}, {how}", name] for name in PARTS}
        for offset, second in ((-0.2, "redundant"), (0.2, "masked")):
            place = 3 * at + 2.6 * offset
            ax.bar(place, part["unique"], color=PARTS["unique"], label="unique" if at + offset < 0 else None)
            ax.bar(
                place, part[second], bottom=part["unique"], color=PARTS[second], label=None if at else second
            )
            whole = "global" if second == "redundant" else "local"
            ax.text(place, part["unique"] + part[second], whole, ha="center", va="bottom", fontsize=8)
    ax.set_xticks([3 * at for at in range(len(splits))], splits)
    ax.set(ylabel="bits", title="FedAvg: what disparity is made of")
    ax.grid(axis="x", alpha=0)
    ax.margins(y=0.25)
    ax.legend(frameon=False, fontsize=8, loc="upper left", ncols=3)


def _frontiers(
    ax: Any, table: dict[tuple[str, str], float], curves: dict[Any, Any], splits: Sequence[str]
) -> None:
    for how in splits:
        curve = curves[f"frontier, {how}", "accuracy, %"]
        ax.plot(curve["x"], curve["mean"], color=COLOURS[how], label=how)
        for system, mark in MARKS.items():
            place = table[f"{system}, {how}", "local"], table[f"{system}, {how}", "accuracy"]
            ax.plot(*place, mark, color=COLOURS[how], markersize=5)
    for system, mark in MARKS.items():
        ax.plot([], [], mark, color="#888888", markersize=5, label=system)
    ax.set(xlabel="local disparity, bits", ylabel="accuracy, %", title="frontier and models under it")
    ax.legend(frameon=False, fontsize=7, loc="lower right")


def _surface(ax: Any, table: dict[tuple[str, str], float], curves: dict[Any, Any], how: str) -> None:
    rows = [curves[f"frontier, {how}, local {bound:g}", "accuracy, %"] for bound in LOCAL_BOUNDS]
    shown = ax.contourf(
        LOCAL_BOUNDS, rows[0]["x"], np.array([row["mean"] for row in rows]).T, 12, cmap="cividis"
    )
    ax.figure.colorbar(shown, ax=ax, label="best accuracy, %")
    for system, mark in MARKS.items():
        local, whole = table[f"{system}, {how}", "local"], table[f"{system}, {how}", "global"]
        if local <= LOCAL_BOUNDS[-1] and whole <= GLOBAL_BOUNDS[-1]:
            ax.plot(local, whole, mark, color="white", markeredgecolor="black", clip_on=False)
    ax.set(
        xlabel="local disparity, bits", ylabel="global disparity, bits", title=f"frontier, {how}",
        xlim=(0, LOCAL_BOUNDS[-1]), ylim=(0, GLOBAL_BOUNDS[-1]),
    )  # fmt: skip
    ax.grid(alpha=0)


USAGE = """\
import numpy as np
from cograd.clients.aglfop import ClientJoint, aglfop, disparities
draw = np.random.default_rng(0)
client, group, label = (draw.integers(2, size=1000) for _ in range(3))
predicted = np.where(draw.random(1000) < 0.8, label, group ^ client)
joint = ClientJoint.from_predictions(client, group, predicted, label)
print(disparities(joint))  # global = unique + redundant, local = unique + masked
best = aglfop(joint, eps_global=0.01, eps_local=0.01)
print(best.accuracy - joint.accuracy)
"""

PAPER = Paper(
    slug="aglfop",
    title="Demystifying Local and Global Fairness Trade-offs in Federated Learning Using Partial Information "
    "Decomposition",
    authors="Faisal Hamman, Sanghamitra Dutta",
    arxiv="2307.11333",
    venue="ICLR 2024",
    room="clients",
    entry="cograd.clients.AGLFOP",
    module=__name__,
    summary="clients share a table of counts: what is unfair everywhere, inside clients, or between them",
    usage=USAGE,
    datasets=("adult",),
    seeds=5,
    run=run,
    draw=draw,
)
