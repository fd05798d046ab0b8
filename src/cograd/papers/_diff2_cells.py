"""What one cell of DIFF2's paper computes: settings of a problem, run side by side or by `Diff2` itself."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from cograd import data
from cograd.core.streams import seed_for, stream
from cograd.machines.diff2 import BVRLocalSGD, Diff2, Diff2Plan, GDRoutine
from cograd.machines.diff2.routines import Routine
from cograd.papers._diff2_runs import (
    Problem,
    Regression,
    Softplus,
    Trace,
    Valley,
    descend,
    noise_of_diff2,
    stream_noise,
)

if TYPE_CHECKING:
    from cograd.papers._lab import Cell, Record, Report

DELTA = 1e-5
DP_GD, METHOD, LOCAL, UNSTABLE = "DP-GD", "DIFF2", "DIFF2, BVR-L-SGD", "DIFF2, unstable"
PER_MESSAGE = {DP_GD: "DP-GD, per message", METHOD: "DIFF2, per message"}
FRACTIONS = {10: "DIFF2, T = R/10", 3: "DIFF2, T = R/3", 1: "DIFF2, T = R"}

# What is varied.

Setting = tuple[float, ...]
"""Rounds, restart interval, step size, clip, diff_clip; of BVR-L-SGD also local steps, their batch and clip."""


@dataclass(frozen=True)
class Grid:
    """Settings that all systems are tuned over. DP-GD has no restart interval and no diff_clip; the local
    choices are BVR-L-SGD's."""

    rounds: Sequence[int]
    lrs: Sequence[float]
    clips: Sequence[float]
    diff_clips: Sequence[float]
    parts: Sequence[int] = (30, 10, 3, 1)
    """Of the rounds, of which the restart interval is one."""
    steps: Sequence[int] = ()
    batches: Sequence[int] = ()
    local_clips: Sequence[float] = ()
    capped: bool = False
    """The most rounds are all that there may be, for every system."""

    def settings(self, system: str) -> list[Setting]:
        if system in (DP_GD, PER_MESSAGE[DP_GD]):
            return [(r, 1, lr, c, c) for r, lr, c in product(self.rounds, self.lrs, self.clips)]
        blocks = dict.fromkeys((r, max(2, r // part)) for r, part in product(self.rounds, self.parts))
        local = product(self.steps, self.batches, self.local_clips) if system == LOCAL else [()]
        found = product(blocks, self.lrs, self.clips, self.diff_clips, local)
        return [(*block, lr, c, d, *more) for block, lr, c, d, more in found]

    def open_ends(self, setting: Setting) -> list[str]:
        """What of a setting is the least or the most of the grid, though there is more beyond it.

        There is nothing beyond one local step less than two, a restart interval of 1 (DP-GD) or of all rounds,
        the cap on rounds, and the only value of a kind.
        """
        rounds, every, lr, clip, diff_clip, *local = setting
        chosen = {"lr": (lr, self.lrs), "clip": (clip, self.clips)}
        if every > 1:
            chosen["diff_clip"] = (diff_clip, self.diff_clips)
        if local:
            chosen["local clip"] = (local[2], self.local_clips)
        found = [n for n, (v, of) in chosen.items() if len(of) > 1 and v in (min(of), max(of))]
        if rounds == min(self.rounds) > 2 or (rounds == max(self.rounds) and not self.capped):
            found.append("rounds")
        if every == rounds // max(self.parts) > 2:
            found.append("restart interval")
        if local and local[0] == max(self.steps):
            found.append("local steps")
        if local and local[1] in (min(self.batches), max(self.batches)):
            found.append("local batch")
        return found


SIZES, BOUNDS, DIMENSION = (3_000, 10_000, 30_000, 100_000), (20.0, 5.0), 50
ROUNDS = (10, 30, 100, 300, 1000, 3000)
WIDTHS, EPSILONS, REGRESSION_RECORDS = (3.0, 10.0), (3.0, 1.0), (1000,) * 4
REGRESSION = Grid(
    rounds=(2, 3, 5, 10, 30, 100),
    lrs=(0.1, 0.3, 0.6, 1.0, 1.5, 3.0, 6.0),
    clips=(1.0, 2.0, 5.0, 10.0, 20.0, 40.0, 80.0),
    diff_clips=(0.3, 1.0, 3.0, 6.0, 12.0),
    parts=(10, 3, 1),
)
LOCAL_GRID = Grid(
    rounds=(2, 3, 5, 10),
    lrs=(0.03, 0.05, 0.1, 0.2, 0.5),
    clips=(5.0, 10.0, 20.0),
    diff_clips=(1.0, 3.0, 12.0),
    parts=(10, 3, 1),
    steps=(2, 4, 8, 16),
    batches=(8, 32, 128),
    local_clips=(0.3, 1.0, 3.0),
)
ADULT_EPSILONS, ADULT_WORKERS, ADULT_TRAIN = (3.0, 5.0), 10, 26_040
ADULT = Grid(
    rounds=(50, 150, 500),
    lrs=(0.03, 0.1, 0.3, 1.0, 3.0),
    clips=(0.5, 1.0, 2.0, 3.0, 5.0, 8.0),
    diff_clips=(0.1, 0.3, 1.0, 3.0, 10.0, 30.0),
    parts=(250, 100, 30, 10, 1),
    capped=True,
)
ADULT_CEILING = 0.073
"""Four fifths of the loss of the best constant output, 0.0913. Where nothing has been learned, gradients vanish
too, and look as if they had been descended."""


def rate_grid(bound: float, rounds: Sequence[int] = ROUNDS) -> Grid:
    """Of the valley, where the clips are the known constants G and L = 1. The card caps the rounds."""
    return Grid(rounds, (0.01, 0.03, 0.1, 0.3, 1.0, 3.0), (bound,), (1.0,), capped=True)


@dataclass(frozen=True)
class Task:
    """A problem, the sizes of its workers and its budget."""

    problem: Problem
    records: Sequence[int]
    epsilon: float
    release: str = "aggregate"

    def plan(self, setting: Setting, seed: int) -> Diff2Plan:
        rounds, every, lr, clip, diff_clip, *local = setting
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the card's delta is 1e-5 for every n, 1e5 included
            return Diff2Plan(
                rounds=int(rounds),
                restart_every=int(every),
                epsilon=self.epsilon,
                delta=DELTA,
                clip=clip,
                diff_clip=diff_clip,
                records=self.records,
                routine=_routine(lr, *local),
                release=self.release,  # type: ignore[arg-type]  # one of the two
                seed=seed,
            )


def _routine(lr: float, steps: float = 1, batch: float = 1, clip: float = 1.0) -> Routine:
    return BVRLocalSGD(lr, int(batch), int(steps), clip) if steps > 1 else GDRoutine(lr)


def task_of(cell: Cell) -> Task:
    seed, part = cell["seed"], cell["part"]
    if part == "rate":
        workers = 10 if cell["system"] in PER_MESSAGE.values() else 1
        release = "message" if workers > 1 else "aggregate"
        centre = stream(seed, "centre").normal(DIMENSION)
        return Task(Valley(centre), [cell["n"] // workers] * workers, 3.0, release)
    if part == "regression":
        features, targets = regression(seed, cell["width"])
        return Task(Regression(features, targets), REGRESSION_RECORDS, cell["epsilon"])
    return Task(
        adult(seed, cell.get("share", 1)), [ADULT_TRAIN // ADULT_WORKERS] * ADULT_WORKERS, cell["epsilon"]
    )


def regression(seed: int, width: float) -> tuple[Tensor, Tensor]:
    """4000 records of six standard normal features; a truth of norm 1, uniform noise of +- ``width``."""
    draw = stream(seed, "regression")
    features, truth = draw.normal(4000, 6), draw.normal(6)
    return features, features @ (truth / truth.norm()) + width * (2 * draw.uniform(4000) - 1)


def network(seed: int, width: int) -> nn.Sequential:
    torch.manual_seed(seed_for(seed, "init"))
    return nn.Sequential(nn.Linear(width, 10), nn.Softplus(), nn.Linear(10, 1))


def adult(seed: int, share: int = 1) -> Softplus:
    """80 % of Adult for training, the rest for tests. Tuning sees one record in ``share`` of both, with the
    noise that is right for all of them."""
    table = data.load("adult")
    order, labels = stream(seed, "split").permutation(len(table.y)), table.y.float()
    train, test = order[:ADULT_TRAIN:share], order[ADULT_TRAIN::share]
    weights = network(seed, table.x.shape[1]).parameters()
    return Softplus(
        table.x[train],
        labels[train],
        table.x[test],
        labels[test],
        nn.utils.parameters_to_vector(weights).detach(),
    )


def compute(cell: Cell, report: Report) -> Record:
    """Mean and last squared gradient norm, and last losses, of every setting of the cell."""
    if cell["part"] == "replay":
        return replay(cell)
    task, settings = task_of(cell), [tuple(s) for s in cell["settings"]]
    numel = len(task.problem.start)
    noise = stream_noise(numel, cell["seed"], "diff2 runs")
    found: dict[int, Record] = {}
    for kind in sorted({_kind(s) for s in settings}):
        report(f"{kind[0]} rounds")
        places = [i for i, s in enumerate(settings) if _kind(s) == kind]
        for batch in (places[i : i + cell["batch"]] for i in range(0, len(places), cell["batch"])):
            plans = [task.plan(settings[i], cell["seed"]) for i in batch]
            trace = descend(task.problem, plans, noise, cell["looks"])
            found |= {i: _summary(trace, row) for row, i in enumerate(batch)}
    return {"runs": [found[i] for i in range(len(settings))]}


def _kind(setting: Setting) -> Setting:
    """What settings that run side by side have in common: rounds, local steps and their batch."""
    return (setting[0], *setting[5:7])


def _summary(trace: Trace, row: int) -> Record:
    """Of one run. Numbers that are not finite become 1e30, as JSON and a minimum can take them."""
    square = trace.square[row].nan_to_num(1e30, 1e30)
    losses = {name: values[row].nan_to_num(1e30, 1e30) for name, values in trace.losses.items()}
    last = {name: float(values[-1]) for name, values in losses.items()}
    history = {"at": trace.at, "squares": square.tolist(), "losses": losses["loss"].tolist()}
    return {"mean": float(square.mean()), "last": float(square[-1]), **last, **history}


def cost(plan: Diff2Plan) -> tuple[float, int]:
    """Gradient evaluations a record, and vectors that are sent, of a whole run."""
    further = plan.rounds * plan.routine.local_releases
    evaluations = plan.restarts() + 2 * plan.differences()
    sent = 2 * plan.rounds * (plan.workers + (further > 0))
    return evaluations + 2 * further * plan.routine.local_batch / sum(plan.records), sent


def replay(cell: Cell) -> Record:
    """`Diff2` with per-record gradients by torch.func, against the same run among those side by side."""
    seed, setting = cell["seed"], tuple(cell["setting"])
    task = task_of({**cell, "part": cell["of"]})
    features, targets = task.problem.features, task.problem.targets  # type: ignore[attr-defined]
    model: nn.Module = nn.Linear(6, 1, bias=False) if cell["of"] == "regression" else network(seed, 105)
    with torch.no_grad():
        nn.utils.vector_to_parameters(task.problem.start.clone(), model.parameters())
    plan = task.plan(setting, seed)
    size = plan.records[0]
    workers = [(features[i : i + size], targets[i : i + size]) for i in range(0, len(targets), size)]
    diff2 = Diff2(model, squared, workers, plan)
    for _ in range(plan.rounds):
        diff2.step()
    noise = noise_of_diff2(plan, diff2.space.numel)
    trace = descend(task.problem, [plan], noise, looks=1)
    moved = float((trace.x[0] - task.problem.start).norm())
    evaluations, sent = cost(plan)
    work = sum(diff2.ledger.worked("grad", worker) for worker in range(plan.workers))
    return {
        "far": float((trace.x[0] - diff2.x).norm()) / moved,
        "bytes": diff2.ledger.sent() / (sent * diff2.space.numel * diff2.x.element_size()),
        "evaluations": work / (evaluations * len(targets)),
        "epsilon": diff2.spent().epsilon(),
        "local": plan.routine.local_releases,
    }


def squared(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return torch.square(model(x).squeeze(-1) - y) / 2
