"""The linear sketch: what it saves, where it does not, what it leaks, and what privacy costs with it.

A. Softmax regression on digits (650 parameters, l2 0.01), 10 clients of label-sorted shards, full batch:
   rounds and floats until 1 % of the initial gap to the optimum is left, with the step that theory guarantees,
   and with each system's own best one. The same on a bag of words, whose gradient is spiky.
B. 5 and 10 local steps, until 10 % is left (client drift holds federated averaging above 1 % here).
C. Gradient matching against sketches of an MLP's gradient on one digit: the sketches themselves, their
   de-sketch, with the label unknown, and through local steps.
D. Differentially private logistic regression on breast-cancer, with sketches and without.

The systems of a comparison have one grid of steps, in units of 1/L, and choose from it on pilot seeds. FetchSGD
is best at smaller steps and chooses k, momentum and masking too: its grid is coarser and reaches lower.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import mean
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from cograd.core.claim import Claim, Curve, Kind, Op, Row
from cograd.machines.linear_sketch.sketch import Sketch
from cograd.papers._linear_sketch_cells import attack, descend, private
from cograd.papers._paper import Findings, Paper

if TYPE_CHECKING:
    from cograd.papers._lab import Cell, Lab, Record, Report

PILOT_SEEDS = (100, 101)
GRID = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 10.0, 12.0, 16.0)
"""Steps in units of 1/L."""
LOW = (0.02, 0.05, 0.1, 0.2, 0.5)
"""Smaller ones, for systems whose best step is not inside the grid."""
FETCH = {
    "step": (*LOW, 1.0, 2.0),
    "k": (1, 2, 8, 32, 128),
    "momentum": (0.0, 0.9),
    "masking": (False, True),
}
"""FetchSGD's grid."""
GUARANTEED = 1.9
"""The step of gradient descent that the card calibrates with: near the largest that theory allows."""
ONE_TUNED = f"sketch tuned, gradient descent not (at {GUARANTEED}/L)"
D, ROWS, FEW, HALF, WIDE = 650, 65, 16, 325, 3609

NAMES = {
    "dense": "gradient descent",
    "srht": "SRHT",
    "countsketch": "count sketch",
    "ams": "AMS",
    "gaussian": "Gaussian",
    "random-k": "random-k",
}
SKETCHES = ("srht", "countsketch", "ams", "random-k")
ATTACKED = (None, 481, 120, 64, 48, 24)
NOISES = (0.01, 0.1, 1.0)
VARIANTS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "desketched": ("matching the direction of R^T R g (cosine)", {"desketched": True}),
    "label": ("label optimised too", {"label_known": False}),
    "local-steps": ("update of 5 local steps", {"local_steps": 5}),
}
EPSILONS = (1.0, 4.0, None)
PRIVATE = {
    "no sketch": ("dense", "gradient"),
    "SRHT, b = 16 of 31": ("srht", "gradient"),
    "count sketch, b = 16 of 31": ("countsketch", "gradient"),
    "SRHT, noise in the sketch": ("srht", "sketch"),
}
RATES = (0.02, 0.05, 0.1, 0.25, 0.5, 1.0)
LOCAL = (5, 10)


# The cells: a dict says all about one of them.


def run_of(
    system: str,
    seed: int,
    step: float,
    *,
    problem: str = "digits",
    rows: int = ROWS,
    local_steps: int = 1,
    limit: int = 400,
    target: float = 0.01,
    redraw: bool = True,
    fetch: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, Any]:
    return {
        "part": "descend",
        "system": system,
        "seed": seed,
        "problem_name": problem,
        "rows": 0 if system == "dense" else rows,
        "step": step,
        "local_steps": local_steps,
        "limit": limit,
        "target": target,
        "redraw": redraw,
        "fetch": dict(fetch),
    }


def attack_of(
    seed: int, rows: int | None, noise: float = 0.0, restarts: int = 2, **variant: Any
) -> dict[str, Any]:
    return {
        "part": "attack",
        "system": "attack",
        "seed": seed,
        "rows": rows,
        "noise": noise,
        "restarts": restarts,
        **variant,
    }


def private_of(
    system: str, seed: int, epsilon: float | None, lr: float, noise_in: str = "gradient"
) -> dict[str, Any]:
    return {
        "part": "private",
        "system": system,
        "seed": seed,
        "epsilon": epsilon,
        "rows": 16,
        "lr": lr,
        "noise_in": noise_in,
    }


def compute(cell: Cell, report: Report) -> Record:
    arguments = {key: value for key, value in cell.items() if key != "part"}
    if cell["part"] == "attack":
        del arguments["system"]
        return attack(**arguments)
    return descend(**arguments) if cell["part"] == "descend" else private(**arguments)


class Runs:
    """Computes cells by need, and finds each setting's best step on the pilot seeds."""

    def __init__(self, lab: Lab) -> None:
        self.lab, self.seeds = lab, lab.seeds
        self.tuned: dict[str, dict[str, Any]] = {}

    def of(self, make: Callable[[int], dict[str, Any]]) -> list[Record]:
        """The records of all seeds."""
        return self.lab.map([make(seed) for seed in self.seeds], compute)

    def best(
        self, key: str, options: Sequence[dict[str, Any]], score: Callable[[Record], float]
    ) -> list[Record]:
        """The records with the option (step and others) that scores lowest over the pilot seeds."""
        if key not in self.tuned:
            pilots = [{**option, "seed": seed} for option in options for seed in PILOT_SEEDS]
            scores = [score(record) for record in self.lab.map(pilots, compute)]
            means = [mean(scores[i : i + len(PILOT_SEEDS)]) for i in range(0, len(scores), len(PILOT_SEEDS))]
            self.tuned[key] = dict(options[means.index(min(means))])
        return self.of(lambda seed: {**self.tuned[key], "seed": seed})

    def at(self, key: str) -> float:
        """The step that was chosen."""
        option = self.tuned[key]
        return float(option["step"] if "step" in option else option["lr"])


def rounds(record: Record) -> float:
    """Rounds to the target; infinite for a run that did not arrive."""
    return float("inf") if record["rounds"] is None else float(record["rounds"])


def _nearest(record: Record) -> float:
    """Rounds for a run that arrived, and for others how far they still were."""
    return float(record["rounds"] or 1e6 * (1 + record["gaps"][-1]))


def floats(records: Sequence[Record]) -> list[float]:
    """Numbers that a client uploads until the target; infinite where it was not reached."""
    return [r["rounds"] * r["floats"] if r["rounds"] is not None else float("inf") for r in records]


def over(a: Sequence[float], b: Sequence[float]) -> list[float]:
    return [x / y for x, y in zip(a, b, strict=True)]


# What runs at which scale.


def run(lab: Lab) -> Findings:
    """``full``: all parts. ``smoke`` and ``demo``: A with one sketch at its best step, and two attacks."""
    runs = Runs(lab)
    if lab.scale != "full":
        return _short(runs)
    parts = [_theory(runs), _savings(runs), _spiky(runs), _local(runs), _leak(runs), _privacy(runs)]
    claims, table, curves = ([x for part in parts for x in getattr(part, name)] for name in _FIELDS)
    return Findings(claims, table, curves)


_FIELDS = ("claims", "table", "curves")


def _short(runs: Runs) -> Findings:
    dense = runs.of(lambda seed: run_of("dense", seed, GUARANTEED))
    sketched = runs.of(lambda seed: run_of("srht", seed, 8.0))
    open_, closed = (runs.of(lambda seed, b=b: attack_of(seed, b, restarts=1)) for b in (120, 48))  # type: ignore[misc]
    claims = [
        _claim(
            "floats.sketch-tuned-gd-not.srht.65",
            f"SRHT, b = 65: floats to the target over gradient descent's; {ONE_TUNED}",
            over(floats(sketched), floats(dense)),
            "<=",
            0.15,
        ),
        *_leak_claims([r["mse"] for r in open_], [r["mse"] for r in closed]),
    ]
    table = [
        Row(NAMES[s], "rounds", "", [rounds(r) for r in found])
        for s, found in (("dense", dense), ("srht", sketched))
    ]
    return Findings(claims, table, [_fall(NAMES["dense"], dense), _fall(f"{NAMES['srht']}, b = 65", sketched)])


SOURCE = "arXiv:2210.08371"
CARD = "set before the recorded run, from calibration runs of this problem"
PILOTS = "set before the recorded run, from pilot runs on two other seeds"


def _claim(
    id: str,
    text: str,
    values: Sequence[float],
    op: Op | None = None,
    threshold: float | None = None,
    *,
    set_by: str = CARD,
    unit: str = "x",
    source: str = SOURCE,
    kind: Kind = "measured",
    reason: str | None = None,
) -> Claim:
    """``reason`` is kept where the claim does not hold."""
    where = set_by if op else None
    claim = Claim(id, text, source, kind, list(values), op, threshold, where, unit, reason=reason)
    return claim if claim.holds is False else replace(claim, reason=None)


# A: the guaranteed step, the best step, and what redrawing R is for.


def _theory(runs: Runs) -> Findings:
    """With 1 / ((1 + omega) L) rounds grow by 1 + omega, and nothing is saved."""
    dense = [rounds(r) for r in runs.of(lambda seed: run_of("dense", seed, 1.0))]
    claims, table = [], [Row(NAMES["dense"], "rounds at the guaranteed step", "", dense)]
    for kind in ("srht", "countsketch", "random-k"):
        grown = 1 + Sketch(D, ROWS, kind).omega
        records = runs.of(lambda seed, kind=kind, g=grown: run_of(kind, seed, 1 / g, limit=6000))  # type: ignore[misc]
        ratio = over([rounds(r) for r in records], dense)
        claims += [
            _claim(
                f"theory.rounds.{kind}",
                f"{NAMES[kind]}, b = 65, step 1/((1+omega)L): rounds over those at 1/L are 1 + omega = "
                f"{grown:.2f} within 10 % (relative deviation)",
                [abs(r / grown - 1) for r in ratio],
                "<=",
                0.10,
                unit="",
            ),
            _claim(
                f"theory.traffic.{kind}",
                f"{NAMES[kind]}, b = 65, step 1/((1+omega)L): floats to the target over gradient descent's",
                [r * ROWS / D for r in ratio],
                ">=",
                1.0,
                set_by="arithmetic: b (1 + omega) >= d",
            ),
        ]
        table.append(Row(NAMES[kind], "rounds at the guaranteed step", "", [rounds(r) for r in records]))
    grown = 1 + Sketch(D, ROWS, "countsketch").omega
    fresh, fixed = (
        runs.of(lambda seed, r=redraw: run_of("countsketch", seed, 16 / grown, target=0.0, redraw=r))  # type: ignore[misc]
        for redraw in (True, False)
    )
    claims.append(
        _claim(
            "redraw",
            "Count sketch, b = 65: the gap after 400 rounds with R frozen over that with R redrawn each round",
            over([r["gaps"][-1] for r in fixed], [r["gaps"][-1] for r in fresh]),
            ">=",
            10.0,
        )
    )
    claims.append(
        _claim(
            "bytes",
            "A sketch of 65 rows takes 4 b = 260 bytes up and 260 down a client and round",
            [float(Sketch(D, ROWS).nbytes)],
            "==",
            260.0,
            set_by="arithmetic",
            unit="bytes",
            kind="exact",
        )
    )
    return Findings(claims, table, [_fall("count sketch, R frozen", fixed, 400)])


BEST_STEP = (
    "the card's gradient descent was tuned up to 1.9/L only. L is half the second moment of the inputs, which "
    "bounds the curvature at any weights; with 10 classes it is a tenth of that moment at zero weights, or a "
    "fifth of L. On the grid of the sketches gradient descent is best at 10/L, five times faster than at "
    "1.9/L. The sketches gain less from large steps, since their variance grows with the step. Against "
    "gradient descent that is not tuned the claim holds (floats.sketch-tuned-gd-not)"
)


def _savings(runs: Runs) -> Findings:
    """Every system at its own best step of one grid."""
    dense = runs.best("dense", [run_of("dense", 0, s) for s in GRID], rounds)
    guaranteed = runs.of(lambda seed: run_of("dense", seed, GUARANTEED))
    claims: list[Claim] = []
    table = [
        Row(NAMES["dense"], "best step", "1/L", [runs.at("dense")]),
        Row(NAMES["dense"], "rounds at the best step", "", [rounds(r) for r in dense]),
        Row(NAMES["dense"], "floats at the best step", "", floats(dense)),
    ]
    curves = [_fall(NAMES["dense"], dense)]
    for rows, threshold in ((ROWS, 0.15), (FEW, 0.08)):
        for kind in SKETCHES:
            name, key = f"{NAMES[kind]}, b = {rows}", f"{kind}.{rows}"
            found = runs.best(key, [run_of(kind, 0, s, rows=rows) for s in GRID], rounds)
            asserted = kind != "random-k"
            claims += [
                _claim(
                    f"floats.tuned.{key}",
                    f"{name}: floats to the target over gradient descent's, each at its own best step",
                    over(floats(found), floats(dense)),
                    "<=" if asserted else None,
                    threshold if asserted else None,
                    reason=BEST_STEP if asserted else None,
                ),
                _claim(
                    f"floats.sketch-tuned-gd-not.{key}",
                    f"{name}: floats to the target over gradient descent's; {ONE_TUNED}",
                    over(floats(found), floats(guaranteed)),
                    "<=" if asserted else None,
                    threshold if asserted else None,
                ),
            ]
            table += [
                Row(name, "best step", "1/L", [runs.at(key)]),
                Row(name, "rounds at the best step", "", [rounds(r) for r in found]),
                Row(name, "floats at the best step", "", floats(found)),
            ]
            curves.append(_fall(name, found))
    for rows in (ROWS, HALF):
        name = f"FetchSGD, {rows} cells"
        options = [
            run_of(
                "fetchsgd", 0, step, rows=rows, fetch={"tables": 5, "k": k, "momentum": m, "masking": masking}
            )
            for step, k, m, masking in product(*FETCH.values())
        ]
        fetch = runs.best(f"fetchsgd.{rows}", options, _nearest)
        chosen = runs.tuned[f"fetchsgd.{rows}"]
        claims.append(
            _claim(
                f"fetchsgd.{rows}",
                f"{name} (5 tables), tuned: share of the gap that is left at 1 % or after 400 rounds",
                [r["gaps"][-1] for r in fetch],
                unit="",
            )
        )
        table += [
            Row(name, "best step", "1/L", [chosen["step"]]),
            Row(name, "best k", "", [chosen["fetch"]["k"]]),
            Row(name, "best momentum", "", [chosen["fetch"]["momentum"]]),
            Row(name, "masks (1) or subtracts (0)", "", [float(chosen["fetch"]["masking"])]),
            Row(name, "gap at the end", "", [r["gaps"][-1] for r in fetch]),
        ]
        curves.append(_fall(name, fetch))
    return Findings(claims, table, curves)


def _spiky(runs: Runs) -> Findings:
    """A bag of words: the gradient's energy is in the rows of frequent words, and random-k misses them."""
    found = {
        kind: runs.best(
            f"words.{kind}",
            [run_of(kind, 0, s, problem="words", rows=WIDE // 10, limit=200) for s in (*LOW[3:], *GRID[:7])],
            rounds,
        )
        for kind in ("dense", "srht", "countsketch", "random-k")
    }
    random = [rounds(r) for r in found["random-k"]]
    claims = [
        _claim(
            f"spiky.{kind}",
            f"Bag of words, b = d/10: rounds of random-k over those of the {NAMES[kind]}, each tuned",
            over(random, [rounds(r) for r in found[kind]]),
            ">=",
            SPIKY,
            set_by=PILOTS,
        )
        for kind in ("srht", "countsketch")
    ]
    table = [
        row
        for kind, records in found.items()
        for row in (
            Row(NAMES[kind], "bag of words: best step", "1/L", [runs.at(f"words.{kind}")]),
            Row(NAMES[kind], "bag of words: rounds", "", [rounds(r) for r in records]),
        )
    ]
    return Findings(claims, table, [])


SPIKY = 1.5


# B: local steps.


def _local(runs: Runs) -> Findings:
    claims, table = [], []
    for steps in LOCAL:
        found = {
            kind: runs.best(
                f"local.{steps}.{kind}",
                [run_of(kind, 0, s, local_steps=steps, limit=150, target=0.1) for s in (*LOW[1:], *GRID[:4])],
                rounds,
            )
            for kind in ("dense", "srht", "countsketch")
        }
        averaging = [rounds(r) for r in found["dense"]]
        claims += [
            _claim(
                f"local.{steps}.{kind}",
                f"{steps} local steps, to 10 % of the gap: rounds of sketched federated averaging "
                f"({NAMES[kind]}, b = 65) over those of federated averaging, each tuned",
                over([rounds(r) for r in found[kind]], averaging),
                "<=",
                LOCAL_ROUNDS,
                set_by=PILOTS,
            )
            for kind in ("srht", "countsketch")
        ]
        for kind, records in found.items():
            name = "federated averaging" if kind == "dense" else NAMES[kind]
            table += [
                Row(name, f"{steps} local steps: best step", "1/L", [runs.at(f"local.{steps}.{kind}")]),
                Row(name, f"{steps} local steps: rounds to 10 %", "", [rounds(r) for r in records]),
                Row(name, f"{steps} local steps: floats to 10 %", "", floats(records)),
            ]
    return Findings(claims, table, [])


LOCAL_ROUNDS = 1.25


# C: what a sketch leaks.


def _leak(runs: Runs) -> Findings:
    by_rows = {b: [r["mse"] for r in runs.of(lambda seed, b=b: attack_of(seed, b))] for b in ATTACKED}  # type: ignore[misc]
    noisy = {n: [r["mse"] for r in runs.of(lambda seed, n=n: attack_of(seed, 481, n))] for n in NOISES}  # type: ignore[misc]
    claims = [
        *_leak_claims(by_rows[120], by_rows[48]),
        _claim(
            "attack.gradient",
            "The same attack on the gradient itself (R = I): mean squared error of the image",
            by_rows[None],
            "<=",
            1e-8,
            unit="",
        ),
        _claim(
            "attack.noise",
            "b = 481 with noise of the signal's norm: mean squared error of the image",
            noisy[1.0],
            ">=",
            0.03,
            unit="",
        ),
    ]
    table = [
        Row("attack", f"error, {'no sketch' if b is None else f'b = {b}'}", "", errors)
        for b, errors in by_rows.items()
    ]
    table += [Row("attack", f"error, b = 481, noise {n:g}", "", errors) for n, errors in noisy.items()]
    for id, (shown, variant) in VARIANTS.items():
        found = {
            b: runs.of(lambda seed, b=b, v=variant: attack_of(seed, b, **v))  # type: ignore[misc]
            for b in (120, 48)
        }
        claims.append(
            _claim(
                f"attack.{id}",
                f"The attack on 120 rows, {shown}: mean squared error of the digit",
                [r["mse"] for r in found[120]],
                "<=",
                1e-8,
                set_by=PILOTS,
                unit="",
            )
        )
        table += [Row("attack", f"error, b = {b}, {shown}", "", [r["mse"] for r in found[b]]) for b in found]
    sizes = [b for b in ATTACKED if b is not None][::-1]
    each = [[max(by_rows[b][i], 1e-20) for b in sizes] for i in range(len(runs.seeds))]
    curve = Curve("attack", "error of the recovered image", "rows b", sizes, each)
    return Findings(claims, table, [curve])


def _leak_claims(open_: Sequence[float], closed: Sequence[float]) -> list[Claim]:
    return [
        _claim(
            "attack.succeeds",
            "Gradient matching on a sketch of 120 rows (40x smaller): mean squared error of the digit",
            open_,
            "<=",
            1e-8,
            unit="",
        ),
        _claim(
            "attack.fails",
            "On a sketch of 48 rows, fewer than the 64 pixels: mean squared error (variance of the data: 0.07)",
            closed,
            ">=",
            0.03,
            unit="",
        ),
    ]


# D: privacy with sketches and without.


COARSE = (
    "three seeds do not tell it from 2 points: a test set has 114 records, one of which is 0.88 points, and "
    "the standard error of the difference is 1 point or more"
)


def _privacy(runs: Runs) -> Findings:
    claims, table = [], []
    for epsilon in EPSILONS:
        shown = "infinite epsilon" if epsilon is None else f"epsilon {epsilon:g}"
        found: dict[str, list[float]] = {}
        for arm, (kind, noise_in) in PRIVATE.items():
            options = [private_of(kind, 0, epsilon, lr, noise_in) for lr in RATES]
            key = f"private.{shown}.{arm}"
            found[arm] = [r["accuracy"] for r in runs.best(key, options, lambda r: -float(r["accuracy"]))]
            table.append(Row(arm, f"accuracy, {shown}", "%", found[arm]))
            table.append(Row(arm, f"step, {shown}", "", [runs.at(key)]))
        for short, arm in zip(("srht", "countsketch", "noise-in-sketch"), list(PRIVATE)[1:], strict=True):
            asserted = PRIVATE[arm][1] == "gradient"
            claims.append(
                _claim(
                    f"private.{'inf' if epsilon is None else f'{epsilon:g}'}.{short}",
                    f"{shown.capitalize()}: test accuracy without a sketch less that with it ({arm})",
                    [a - b for a, b in zip(found["no sketch"], found[arm], strict=True)],
                    "<=" if asserted else None,
                    2.0 if asserted else None,
                    unit="points",
                    reason=COARSE,
                )
            )
    return Findings(claims, table, [])


# Curves and picture.


def _fall(system: str, records: Sequence[Record], points: int = 160) -> Curve:
    """The gap against what a client has uploaded; a run that arrived stays where it is."""
    longest = max(len(r["gaps"]) for r in records)
    at = sorted({round(i * (longest - 1) / (points - 1)) for i in range(points)})
    values = [[r["gaps"][min(i, len(r["gaps"]) - 1)] for i in at] for r in records]
    uploaded = [i * records[0]["floats"] for i in at]
    return Curve(system, "gap to the optimum", "floats uploaded by a client", uploaded, values)


COLOURS: Mapping[str, str] = {
    "gradient descent": "#444444",
    "SRHT, b = 65": "#1b6ca8",
    "SRHT, b = 16": "#7fb2d9",
    "count sketch, b = 65": "#2a9d8f",
    "random-k, b = 65": "#e9a03b",
    "FetchSGD, 65 cells": "#7a5195",
    "FetchSGD, 325 cells": "#bc91d0",
    "count sketch, R frozen": "#d95f02",
}


def draw(result: dict[str, Any], path: Path) -> None:
    """The gap against floats sent, the attack's error against b, and accuracy against epsilon."""
    from cograd.papers._plot import figure

    curves = {(c["system"], c["metric"]): c for c in result["curves"]}
    table = {(r["system"], r["metric"]): r["mean"] for r in result["table"]}
    leak = curves.get(("attack", "error of the recovered image"))
    seeds = len(result["seeds"])
    title = f"Linear sketch on digits and breast-cancer, {seeds} seed{'s' * (seeds > 1)}"
    with figure(path, 3 if leak else 1, title) as axes:
        fall = axes[0]
        for system, colour in COLOURS.items():
            curve = curves.get((system, "gap to the optimum"))
            if curve:
                fall.plot(curve["x"], curve["mean"], color=colour, label=system)
        fall.set(
            xscale="log", yscale="log", xlabel="floats uploaded by a client", ylabel="gap, share of the start's"
        )
        fall.set_xlim(left=60)
        fall.set_ylim(bottom=0.003, top=2)
        fall.legend(fontsize=6, loc="lower left")
        if not leak:
            return
        axes[1].plot(leak["x"], leak["mean"], "o-", color="#1b6ca8")
        axes[1].axvline(64, color="#888888", linestyle=":", label="pixels of the image")
        axes[1].axhline(0.073, color="#d95f02", linestyle=":", label="variance of the data")
        axes[1].set(
            xscale="log", yscale="log", xlabel="rows b of the sketch", ylabel="error of the recovered image"
        )
        axes[1].minorticks_off()
        axes[1].set_xticks(leak["x"], [f"{rows:g}" for rows in leak["x"]])
        axes[1].legend(fontsize=7)
        levels = ("epsilon 1", "epsilon 4", "infinite epsilon")
        colours = ("#444444", "#1b6ca8", "#2a9d8f")
        for i, (name, colour) in enumerate(zip(PRIVATE, colours, strict=False)):
            heights = [table[name, f"accuracy, {level}"] for level in levels]
            axes[2].bar([x + 0.27 * (i - 1) for x in range(3)], heights, 0.25, color=colour, label=name)
        axes[2].set_xticks(range(3), ["1", "4", "infinite"])
        axes[2].set(xlabel="epsilon", ylabel="test accuracy, %", ylim=(75, 105))
        axes[2].legend(fontsize=7, loc="upper left")


USAGE = """\
import torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
from cograd.machines import LinearSketch

dist.init_process_group("gloo")
model = DDP(torch.nn.Linear(784, 10))
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)  # start near sketch.exchange.suggest_lr(L)
sketch = LinearSketch(rows=785, kind="srht", momentum=0.9).attach(model, optimizer)
# ... your training loop, unchanged; 4 * rows bytes a step are all-reduced, sketch.ledger counts them
"""

PAPER = Paper(
    slug="linear-sketch",
    title="Sketching for First Order Method: Efficient Algorithm for Low-Bandwidth Channel and Vulnerability",
    authors="Zhao Song, Yitan Wang, Zheng Yu, Lichen Zhang",
    arxiv="2210.08371",
    venue="ICML 2023",
    room="machines",
    entry="cograd.machines.LinearSketch",
    module=__name__,
    summary="workers share a random linear sketch of the gradient, which sums to an unbiased estimate",
    usage=USAGE,
    datasets=("digits", "tiny-shakespeare", "breast-cancer"),
    seeds=3,
    run=run,
    draw=draw,
)
