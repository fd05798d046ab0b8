"""Sequential gradient coding: uncoded, GC, SR-SGC and M-SGC on a clock of 256 workers, and training with 16.

The clock: delays of a Gilbert-Elliott model that was fitted to a public trace, plus alpha times the scheme's
load. Each scheme's parameters are picked by `select` on a probe of 80 rounds with a seed that no recorded run
has. A sweep over alpha finds where M-SGC begins to pay.

Training: four MLPs on MNIST-5k in turn, 16 simulated workers, real gradients in float64. All coded runs must
follow plain training; dropping the slowest worker is what a practitioner would do instead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cograd.core.claim import Claim, Curve, Op, Row
from cograd.machines.gradient_coding.schemes import GC, MSGC, SRSGC, Scheme
from cograd.papers._gradient_coding_cells import (
    DROP,
    EITHER,
    FAMILY,
    GC_REP,
    M_REP,
    METHOD,
    PLAIN,
    REPEATED,
    UNCODED,
    compute,
    made,
)
from cograd.papers._paper import Findings, Paper

if TYPE_CHECKING:
    from cograd.papers._lab import Cell, Lab, Record

SYSTEMS = (*FAMILY, DROP)
CODED = (PLAIN, GC_REP, REPEATED, METHOD, EITHER)

WORKERS, JOBS, PROBE_SEED = 256, 120, 100
ALPHAS = (0.56, 1.12, 2.2, 5.0, 10.0, 20.0)
SHOWN = 5.0
"""The alpha of the table's figures that are not swept."""

# Training: schemes that must decode and retry often, and the cost of a chunk that alpha = 5 s has at n = 256.
TRAINED_WORKERS, TRAINED_JOBS, TRAINED_ALPHA = 16, 120, 5.0 * 16 / 256
TRAINED: Mapping[str, Any] = {
    UNCODED: ["Uncoded", {"n": 16}],
    PLAIN: ["GC", {"n": 16, "s": 2}],
    GC_REP: ["GC", {"n": 16, "s": 1, "code": "repetition"}],
    REPEATED: ["SRSGC", {"n": 16, "B": 2, "W": 3, "lam": 4}],
    METHOD: ["MSGC", {"n": 16, "B": 1, "W": 2, "lam": 4, "model": "bursty"}],
    EITHER: ["MSGC", {"n": 16, "B": 2, "W": 3, "lam": 6}],
    DROP: None,
}
EXTRA = (
    ("480 jobs", 0.56, (PLAIN, METHOD)),
    ("480 jobs", 1.12, (PLAIN, METHOD)),
    ("480 jobs", 5.0, (PLAIN, METHOD, UNCODED)),
    ("wait for all", 1.12, (PLAIN, REPEATED, METHOD)),
    ("impatient", 5.0, (PLAIN, GC_REP, METHOD)),
    ("bursts", 5.0, (PLAIN, GC_REP, REPEATED, METHOD, EITHER)),
)


# The cells of a scale.


def run(lab: Lab) -> Findings:
    """``full``: 256 workers, six alphas, all settings, and training of all systems with 16 workers. ``demo``:
    the standard setting at two alphas, and training. ``smoke``: 16 workers, one alpha, three schemes."""
    full = lab.scale == "full"
    n, jobs = (TRAINED_WORKERS, 60) if lab.scale == "smoke" else (WORKERS, JOBS)
    alphas = ALPHAS if full else (1.12, 5.0) if lab.scale == "demo" else (SHOWN,)
    systems = SYSTEMS if full else (UNCODED, PLAIN, METHOD)
    arms = [("standard", alpha, systems) for alpha in alphas]
    if full:
        arms += EXTRA
    timed = _clock_cells(lab, arms, n, jobs)
    trained_systems = tuple(TRAINED) if full else (UNCODED, PLAIN, METHOD)
    trained = _training_cells(lab, trained_systems, 12 if lab.scale == "smoke" else TRAINED_JOBS)
    cells = timed + trained
    runs = Runs(cells, lab.map(cells, compute), lab.seeds)
    claims = _exact_claims() + _training_claims(runs, [s for s in CODED if s in trained_systems])
    if full:
        claims += _clock_claims(runs) + _found(runs) + _quoted()
    return Findings(claims, _table(runs, systems, trained_systems, alphas), _curves(runs, systems, alphas))


def _clock_cells(
    lab: Lab, arms: Sequence[tuple[str, float, Sequence[str]]], n: int, jobs: int
) -> list[dict[str, Any]]:
    """The probe's choices, computed here, and the cells that run them."""
    keys = [(setting, alpha, system) for setting, alpha, systems in arms for system in systems]
    chosen = _choices(lab, [key for key in keys if key[2] in FAMILY], n)
    return [
        {
            "what": "clock",
            "system": system,
            "seed": seed,
            "setting": setting,
            "alpha": alpha,
            "n": n,
            "jobs": 480 if setting == "480 jobs" else jobs,
            "scheme": chosen.get((setting, alpha, system)),
        }
        for setting, alpha, system in keys
        for seed in lab.seeds
    ]


def _choices(lab: Lab, keys: Sequence[tuple[str, float, str]], n: int) -> dict[tuple[str, float, str], Any]:
    cells = [
        {"what": "choice", "system": system, "seed": PROBE_SEED, "setting": setting, "alpha": alpha, "n": n}
        for setting, alpha, system in keys
    ]
    return {key: found["scheme"] for key, found in zip(keys, lab.map(cells, compute), strict=True)}


def _training_cells(lab: Lab, systems: Sequence[str], jobs: int) -> list[dict[str, Any]]:
    return [
        {
            "what": "training",
            "system": system,
            "seed": seed,
            "alpha": TRAINED_ALPHA,
            "n": TRAINED_WORKERS,
            "jobs": jobs,
            "scheme": TRAINED[system],
        }
        for system in systems
        for seed in lab.seeds
    ]


class Runs:
    """Records by what was run; one a seed, in the order of the seeds."""

    def __init__(self, cells: Sequence[Cell], records: Sequence[Record], seeds: Sequence[int]) -> None:
        self.seeds = seeds
        self._found = {_key(c): (c, r) for c, r in zip(cells, records, strict=True)}

    def clock(self, metric: str, system: str, alpha: float, setting: str = "standard") -> list[float]:
        return [float(self._found["clock", system, setting, alpha, seed][1][metric]) for seed in self.seeds]

    def scheme(self, system: str, alpha: float, setting: str = "standard") -> Scheme:
        return made(self._found["clock", system, setting, alpha, self.seeds[0]][0])

    def ratio(self, a: str, b: str, alpha: float, setting: str = "standard") -> list[float]:
        """Time of a over time of b, seed by seed."""
        times = (self.clock("seconds_of_jobs", system, alpha, setting) for system in (a, b))
        return [x / y for x, y in zip(*times, strict=True)]

    def training(self, system: str) -> list[Record]:
        return [self._found["training", system, "", TRAINED_ALPHA, seed][1] for seed in self.seeds]


def _key(cell: Cell) -> tuple[Any, ...]:
    return cell["what"], cell["system"], cell.get("setting", ""), cell["alpha"], cell["seed"]


# Claims.

SOURCE = "arXiv:2211.13802"


def _exact_claims() -> list[Claim]:
    method, plain, repeated = MSGC(256, 1, 2, 27), GC(256, 15), SRSGC(256, 2, 3, 23)
    pairs = [(B, W) for W in range(2, 6) for B in range(1, W)]
    grid = [MSGC(n, B, W, lam) for n in (8, 16) for B, W in pairs for lam in range(n + 1)]
    gap = max(abs(s.load / s.lower_bound - 1) for s in grid if s.lam >= s.n - 1)
    least = min(s.load / s.lower_bound for s in grid)
    rows = (
        ("m-sgc", "M-SGC(256, B=1, W=2, lambda=27) has load 0.0075431", round(method.load, 7), 0.0075431),
        ("sr-sgc", "SR-SGC(256, B=2, W=3, lambda=23) has load 0.0507813", round(repeated.load, 7), 0.0507812),
        ("gc", "GC(256, s=15) has load 0.0625", plain.load, 0.0625),
        ("ratio", "An M-SGC worker computes 8.3 times less than GC's", round(plain.load / method.load, 1), 8.3),
        ("optimal", "M-SGC meets the lower bound at lambda = n - 1 and n (largest gap on a grid)", gap, 0.0),
        ("bound", "No load is below the bound (least ratio on a grid)", least, 1.0),
    )
    return [
        Claim(
            id=f"load.{key}",
            text=text,
            source=f"{SOURCE}, Sec. 3",
            kind="exact",
            values=[value],
            op="==",
            threshold=expected,
            threshold_source="the schemes' equations",
        )
        for key, text, value, expected in rows
    ]


def _training_claims(runs: Runs, coded: Sequence[str]) -> list[Claim]:
    def worst(metric: str) -> list[float]:
        """Over the coded systems, for each seed."""
        by_seed = zip(*map(runs.training, coded), strict=True)
        return [max(float(r[metric]) for r in records) for records in by_seed]

    rows = (
        (
            "gradients",
            "Every decoded gradient is the whole batch's (largest relative error)",
            "gradient_error",
            1e-9,
        ),
        ("weights", "The last weights are those of plain training (largest difference)", "weight_error", 1e-10),
        ("losses", "Loss against job is as in plain training (largest difference)", "loss_error", 1e-10),
    )
    claims = [
        Claim(
            id=f"exact.{key}",
            text=text,
            source=f"{SOURCE}, Sec. 2",
            kind="measured",
            values=worst(metric),
            op="<=",
            threshold=bound,
            threshold_source="float64 rounding, set beforehand",
        )
        for key, text, metric, bound in rows
    ]
    vectors = [r["vectors"] / r["nominal_vectors"] for r in runs.training(METHOD)]
    text = "An M-SGC worker sends W - 1 + B gradient-sized vectors a round, counted over that"
    return [
        *claims,
        Claim("traffic", text, f"{SOURCE}, Sec. 3.3", "measured", vectors, "==", 1.0, "Sec. 3.3", "x"),
    ]


REASONS = {
    "long.no-gain.1.12": "With 480 jobs the T = 3 rounds that fill M-SGC's pipeline are 0.6 % of the time, "
    "with 120 jobs 2.5 %: what is left is a gain of 1 to 2 %. The choice there is B = 2, W = 3, lambda = n: "
    "no D2, so only repeated straggling makes it wait.",
}


def _clock_claims(runs: Runs) -> list[Claim]:
    def long(alpha: float) -> list[float]:
        return runs.ratio(METHOD, PLAIN, alpha, "480 jobs")

    def less_work(alpha: float) -> list[float]:
        return [runs.scheme(PLAIN, alpha).load / runs.scheme(METHOD, alpha).load]

    at_5, long_5 = (
        [runs.ratio(METHOD, other, 5.0, setting) for other in (PLAIN, UNCODED)]
        for setting in ("standard", "480 jobs")
    )
    quarter = "M-SGC's load is at most a quarter of cyclic GC's (GC's over it)"
    nothing, cyclic = "M-SGC gains nothing on cyclic GC", "M-SGC's time over cyclic GC's"
    rows: tuple[tuple[str, str, Sequence[float], Op, float, float | None], ...] = (
        ("less-work.1.12", f"alpha = 1.12 s: {quarter}", less_work(1.12), ">=", 4.0, 8.3),
        ("less-work.2.2", f"alpha = 2.2 s: {quarter}", less_work(2.2), ">=", 4.0, 8.3),
        ("faster.gc", f"alpha = 5 s: {cyclic} (repetition beats it, see found)", at_5[0], "<=", 0.94, 0.837),
        ("faster.uncoded", "alpha = 5 s: M-SGC's time over that without coding", at_5[1], "<=", 0.80, 0.694),
        ("no-gain.0.56", f"alpha = 0.56 s: {nothing}", runs.ratio(METHOD, PLAIN, 0.56), ">=", 1.0, None),
        ("no-gain.1.12", f"alpha = 1.12 s: {nothing}", runs.ratio(METHOD, PLAIN, 1.12), ">=", 1.0, None),
        ("long.faster.gc", f"alpha = 5 s, 480 jobs: {cyclic}", long_5[0], "<=", 0.94, 0.837),
        (
            "long.faster.uncoded",
            "alpha = 5 s, 480 jobs: over that without coding",
            long_5[1],
            "<=",
            0.80,
            0.694,
        ),
        ("long.no-gain.0.56", f"alpha = 0.56 s, 480 jobs: {nothing}", long(0.56), ">=", 1.0, None),
        ("long.no-gain.1.12", f"alpha = 1.12 s, 480 jobs: {nothing}", long(1.12), ">=", 1.0, None),
    )
    return [
        Claim(
            id=key,
            text=text,
            source=f"{SOURCE}, Sec. 4",
            kind="measured",
            values=values,
            op=op,
            threshold=threshold,
            threshold_source="set beforehand, from an independent simulation of 120 jobs with other seeds",
            unit="x",
            paper_value=paper,
            reason=REASONS.get(key),
        )
        for key, text, values, op, threshold, paper in rows
    ]


def _found(runs: Runs) -> list[Claim]:
    """What was measured besides and asserts nothing: times over times."""
    rows = (
        (
            "either.1.12",
            "alpha = 1.12 s: M-SGC that accepts either model, over GC",
            EITHER,
            PLAIN,
            1.12,
            "standard",
        ),
        ("either.5", "alpha = 5 s: the same", EITHER, PLAIN, 5.0, "standard"),
        ("repetition.5", "alpha = 5 s: GC by repetition over cyclic GC", GC_REP, PLAIN, 5.0, "standard"),
        ("m-sgc-repetition.5", "alpha = 5 s: M-SGC over GC by repetition", METHOD, GC_REP, 5.0, "standard"),
        ("both-repetition.5", "alpha = 5 s: M-SGC over GC, both by repetition", M_REP, GC_REP, 5.0, "standard"),
        ("both-repetition.20", "alpha = 20 s: the same", M_REP, GC_REP, 20.0, "standard"),
        ("sr-sgc.5", "alpha = 5 s: SR-SGC over GC", REPEATED, PLAIN, 5.0, "standard"),
        ("drop.5", "alpha = 5 s: dropping the slowest 5 % (not exact) over GC", DROP, PLAIN, 5.0, "standard"),
        ("all.m-sgc", "alpha = 1.12 s, waiting for all: M-SGC over GC", METHOD, PLAIN, 1.12, "wait for all"),
        (
            "all.sr-sgc",
            "alpha = 1.12 s, waiting for all: SR-SGC over GC",
            REPEATED,
            PLAIN,
            1.12,
            "wait for all",
        ),
        ("impatient.m-sgc", "alpha = 5 s, mu = 0: M-SGC over GC", METHOD, PLAIN, 5.0, "impatient"),
        ("bursts.m-sgc", "alpha = 5 s, bursts of 2.5 rounds: M-SGC over GC", METHOD, PLAIN, 5.0, "bursts"),
        ("bursts.either", "alpha = 5 s, bursts: M-SGC, either model, over GC", EITHER, PLAIN, 5.0, "bursts"),
        ("bursts.sr-sgc", "alpha = 5 s, bursts: SR-SGC over GC", REPEATED, PLAIN, 5.0, "bursts"),
    )
    found = [
        Claim(f"found.{key}", text, f"{SOURCE}, Sec. 4", "measured", runs.ratio(a, b, alpha, setting), unit="x")
        for key, text, a, b, alpha, setting in rows
    ]
    times = (runs.clock("seconds_of_jobs", PLAIN, 5.0, setting) for setting in ("impatient", "standard"))
    text = "alpha = 5 s: GC with mu = 0 over GC with mu = 1"
    values = [a / b for a, b in zip(*times, strict=True)]
    found.append(Claim("found.impatient.gc", text, f"{SOURCE}, Sec. 4", "measured", values, unit="x"))
    text = "Training: mean relative error of a gradient without the slowest worker"
    values = [r["mean_gradient_error"] for r in runs.training(DROP)]
    return [*found, Claim("found.drop.error", text, f"{SOURCE}, Sec. 4", "measured", values)]


def _quoted() -> list[Claim]:
    rows = (
        ("m-sgc", "256 Lambda workers, 480 jobs: M-SGC takes 916 s, 16 % less than GC", 916.4),
        ("sr-sgc", "the same with SR-SGC", 1019.5),
        ("gc", "the same with GC", 1095.1),
        ("uncoded", "the same without coding", 1321.2),
    )
    return [
        Claim(f"paper.{key}", text, f"{SOURCE}, Table 1", "reported", unit="s", paper_value=v)
        for key, text, v in rows
    ]


# Table, curves, picture.


def _table(runs: Runs, systems: Sequence[str], trained: Sequence[str], alphas: Sequence[float]) -> list[Row]:
    rows: list[Row] = []
    for system in systems:
        times = {alpha: runs.clock("seconds_of_jobs", system, alpha) for alpha in alphas}
        rows += [Row(system, f"time, alpha {alpha:g}", "s", values) for alpha, values in times.items()]
        alpha = SHOWN
        rows += [
            Row(system, "load, alpha 5", "%", [100 * runs.scheme(system, alpha).load]),
            Row(
                system,
                "rounds waited out, alpha 5",
                "%",
                [100 * w for w in runs.clock("waited", system, alpha)],
            ),
            Row(system, "vectors a round, alpha 5", "", [float(runs.scheme(system, alpha).vectors)]),
        ]
    for system in trained:
        records = runs.training(system)
        rows += [
            Row(system, "gradient error", "", [r["gradient_error"] for r in records]),
            Row(system, "training time", "s", [r["wall_clock"] for r in records]),
            Row(system, "final loss", "nats", [r["losses"][-1] for r in records]),
            Row(system, "accuracy", "%", [r["accuracy"] for r in records]),
            Row(system, "straggling", "%", [100 * r["straggling"] for r in records]),
        ]
    return rows


def _curves(runs: Runs, systems: Sequence[str], alphas: Sequence[float]) -> list[Curve]:
    curves = []
    for system in systems:
        ratios = [runs.ratio(system, PLAIN, alpha) for alpha in alphas]
        loads = [[100 * runs.scheme(system, alpha).load for alpha in alphas]] * len(runs.seeds)
        by_seed = [list(column) for column in zip(*ratios, strict=True)]
        curves.append(Curve(system, "time over that of GC", "alpha, s", alphas, by_seed))
        curves.append(Curve(system, "load, %", "alpha, s", alphas, loads))
    for system in dict.fromkeys((UNCODED, PLAIN, METHOD, *systems)):
        if (records := _trained(runs, system)) is not None:
            steps = list(range(1, len(records[0]["losses"]) + 1))
            curves.append(Curve(system, "training loss", "step", steps, [r["losses"] for r in records]))
            curves.append(Curve(system, "seconds", "step", steps, [r["times"] for r in records]))
    return curves


def _trained(runs: Runs, system: str) -> list[Record] | None:
    try:
        return runs.training(system)
    except KeyError:
        return None


COLOURS = {
    UNCODED: "#444444",
    PLAIN: "#d95f02",
    GC_REP: "#f0b070",
    REPEATED: "#7a5195",
    METHOD: "#1b6ca8",
    EITHER: "#4fa3d9",
    M_REP: "#7fc8a9",
    DROP: "#999999",
}


def draw(result: dict[str, Any], path: Path) -> None:
    """The crossover over alpha, the loads that were chosen, and training loss against time."""
    from cograd.papers._plot import figure

    curves = {(c["system"], c["metric"]): c for c in result["curves"]}
    seeds, alphas = len(result["seeds"]), curves[PLAIN, "load, %"]["x"]
    title = (
        f"Sequential gradient coding: 256 workers on a clock, 16 in training, {seeds} seed{'s' * (seeds > 1)}"
    )
    with figure(path, 3, title) as (ratio, load, loss):
        for system, colour in COLOURS.items():
            style = {"color": colour, "label": system, "linestyle": "--" if system == DROP else "-"}
            if (curve := curves.get((system, "time over that of GC"))) is not None:
                ratio.plot(curve["x"], curve["mean"], marker="o", markersize=3, **style)
                low, high = (
                    [m + k * s for m, s in zip(curve["mean"], _sd(curve), strict=True)] for k in (-1, 1)
                )
                ratio.fill_between(curve["x"], low, high, color=colour, alpha=0.15, linewidth=0)
            if (curve := curves.get((system, "load, %"))) is not None:
                load.plot(curve["x"], curve["mean"], marker="o", markersize=3, **style)
            if (curve := curves.get((system, "training loss"))) is not None:
                loss.plot(curves[system, "seconds"]["mean"], curve["mean"], **style)
        ratio.axhline(1, color=COLOURS[PLAIN], linewidth=0.8)
        for axes in (ratio, load):
            axes.set(xscale="log", xlabel="alpha, s a unit of load")
            axes.set_xticks(alphas, [f"{alpha:g}" for alpha in alphas])
            axes.set_xticks([], minor=True)
        ratio.set(ylabel="time over that of GC")
        load.set(yscale="log", ylabel="load chosen, % of the data")
        loss.set(xlabel="simulated seconds (16 workers)", ylabel="training loss")
        names = {"ncols": 4, "loc": "outside lower center", "frameon": False}
        ratio.figure.legend(*ratio.get_legend_handles_labels(), **names)


def _sd(curve: Mapping[str, Any]) -> list[float]:
    return [s or 0.0 for s in curve["sd"]]


USAGE = """\
import torch
from cograd.machines import MSGC, GilbertElliott, GradientCoding, Learner, SimulatedCluster
x, y = torch.randn(512, 20), torch.randn(512, 1)  # your data
models = [torch.nn.Linear(20, 1) for _ in range(4)]  # trained in turn: a gradient may come 3 rounds late
loss = lambda model, rows: (model(x[rows]) - y[rows]).square().sum()
sgd = lambda m: torch.optim.SGD(m.parameters(), 0.1)
learners = [Learner(m, sgd(m), loss, lambda step: torch.arange(512)) for m in models]
cluster = SimulatedCluster(GilbertElliott().trace(90, 16, 0), 2.2)
run = GradientCoding(learners, MSGC(n=16, B=1, W=2, lam=3), cluster)
run.train(steps=20)  # the weights of plain training; see run.wall_clock, run.waits, run.max_load, run.bytes
"""

PAPER = Paper(
    slug="gradient-coding",
    title="Sequential Gradient Coding For Straggler Mitigation",
    authors="M. Nikhil Krishnan, MohammadReza Ebrahimi, Ashish Khisti",
    arxiv="2211.13802",
    venue="ICLR 2023",
    room="machines",
    entry="cograd.machines.GradientCoding",
    module=__name__,
    summary="workers share coded sums of gradients, so that the slow ones are not waited for",
    usage=USAGE,
    datasets=("mnist-5k",),
    seeds=5,
    run=run,
    draw=draw,
)
