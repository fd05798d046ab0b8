"""FedLD taken apart: margin control and principal gradients, each alone and both, against FedAvg.

MNIST-5k, normalised as in the released code, among 5 clients that all take part; an MLP (784-100-10), 1 local
epoch in minibatches of 50, momentum 0.5, weight decay 5e-4, 40 rounds. Each class is divided among the clients
by a draw of Dirichlet(0.1), and, in a milder regime, Dirichlet(1).

Every system runs at the learning rate of the card's pilots, 0.05, so that server rules are compared at equal
nominal steps. Those of the main claims run at their own best rate of one grid as well, found on a pilot seed.
Accuracy is that of the global model, averaged over the last 10 rounds; all systems of a seed see the same
minibatches and initial weights. The parts of the loss are those of the training data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cograd import data
from cograd.clients.baselines.fedavg import FedAvg
from cograd.clients.baselines.pcgrad import PCGrad
from cograd.clients.fedld import FedLD, LossParts, PrincipalGradient, loss_parts
from cograd.core.claim import Claim, Curve, Op, Row
from cograd.data.clients import Clients
from cograd.engines.federated.local import LocalModel
from cograd.engines.federated.protocol import Content, Session, State
from cograd.engines.federated.training import LocalSGD
from cograd.models.mlp import MLP
from cograd.papers._federation import tail, train, tuned
from cograd.papers._paper import Findings, Paper

if TYPE_CHECKING:
    from cograd.papers._lab import Cell, Lab, Record, Report

CLIENTS, LEAST, SKEWED, MILD = 5, 20, 0.1, 1.0
WIDTHS, BATCH, MOMENTUM, WEIGHT_DECAY, RATE = (784, 100, 10), 50, 0.5, 5e-4, 0.05
ROUNDS, SMOKE_ROUNDS, LAST, EVERY = 40, 6, 10, 5
GRID, PILOT_SEEDS = (0.02, 0.05, 0.12), (100,)
CARD = "pilots of the card, other seeds"

AVG, EQUAL, LOGITS, BATCHED = "FedAvg", "FedAvg, unweighted", "margin", "margin, batch softmax"
PRINCIPAL, NARROW, WHOLE = "principal", "principal, k 0.4", "principal, whole vector"
BOTH, BOTH_BATCHED = "FedLD", "FedLD, batch softmax"
RESCALED, BOTH_RESCALED, PROJECTED = "principal, rescaled", "FedLD, rescaled", "PCGrad"
BASELINE = "FedAvg of the baselines"
SETTINGS: dict[str, dict[str, Any]] = {
    AVG: {"margin": 0.0, "rule": None, "weighted": True},
    EQUAL: {"margin": 0.0, "rule": None},
    LOGITS: {"rule": None, "weighted": True},
    BATCHED: {"on": "batch_softmax", "rule": None, "weighted": True},
    PRINCIPAL: {"margin": 0.0},
    NARROW: {"margin": 0.0, "rule": PrincipalGradient(0.4)},
    WHOLE: {"margin": 0.0, "rule": PrincipalGradient(layerwise=False)},
    RESCALED: {"margin": 0.0, "rule": PrincipalGradient(rescale="mean_norm")},
    PROJECTED: {"margin": 0.0, "rule": PCGrad()},
    BOTH: {},
    BOTH_BATCHED: {"on": "batch_softmax"},
    BOTH_RESCALED: {"rule": PrincipalGradient(rescale="mean_norm")},
}
TUNED = (AVG, EQUAL, LOGITS, BATCHED, PRINCIPAL, RESCALED, PROJECTED, BOTH)
MILDER = (AVG, EQUAL, LOGITS, PRINCIPAL, RESCALED, BOTH)


@lru_cache(4)
def federation(alpha: float, seed: int) -> tuple[Clients, data.Images]:
    """The clients, and the test set."""
    whole, test = data.load("mnist-5k", "train"), data.load("mnist-5k", "test")
    assert isinstance(whole, data.Images)
    assert isinstance(test, data.Images)
    parts = data.dirichlet(whole.y, CLIENTS, alpha, seed, equal=False, min_size=LEAST)
    moments = whole.moments()
    return Clients(whole.normalised(*moments), parts), test.normalised(*moments)


class Observer:
    """Sees all data and all changes of a round: the parts of the loss, and what the rule does."""

    def __init__(self, clients: Clients) -> None:
        self.clients, self.model = clients, LocalModel(MLP(*WIDTHS), nn.functional.cross_entropy)
        self.x, self.y = (torch.cat([getattr(held, name) for held in clients]) for name in ("x", "y"))

    def parts(self, x: Tensor, local: Sequence[Tensor]) -> LossParts:
        of = [self._losses(w) for w in local]
        return loss_parts(torch.tensor(of), torch.tensor(self._losses(x)), self.clients.sizes)

    def _losses(self, w: Tensor) -> list[float]:
        return [self.model.mean_loss(w, held.x, held.y) for held in self.clients]

    def untelescoped(self, x: Tensor) -> float:
        """The loss of all training examples at once."""
        return self.model.mean_loss(x, self.x, self.y)

    def mechanics(self, deltas: Sequence[Tensor], session: Session) -> dict[str, float]:
        """What the rule does with a round's changes, as errors relative to their length."""
        rule, first = PrincipalGradient(), deltas[0]
        rows = torch.stack(list(deltas))
        found, size = rule(rows), float(rows.norm(dim=1).max())
        opposed = torch.stack([first, -0.5 * first])
        entries = [torch.stack([d[s.slice] for d in deltas]) for s in session.space]
        return {
            "identical": float((rule(first.expand(len(deltas), -1)) - first).norm() / first.norm()),
            "opposed": float((rule(opposed) - opposed.mean(0)).norm() / first.norm()),
            "permuted": float((rule(rows.flip(0)) - found).norm()) / size,
            "scaled": float((rule(rows * 3) / 3 - found).norm()) / size,
            "bound": max(float(rule(e).norm() / e.norm(dim=1).max()) for e in entries),
        }


@dataclass
class Traced(FedLD):
    """FedLD that notes the parts of the loss every few rounds, and the length of its steps in every round."""

    observer: Observer | None = field(default=None, repr=False)
    trace: dict[str, list[float]] = field(default_factory=dict, repr=False)

    def close(self, server: State, replies: Mapping[int, Content], session: Session) -> None:
        before = server["x"]
        super().close(server, replies, session)
        if "step" in session.reports:
            self._note(step=session.reports["step"])
        if self.observer is None or server["round"] % EVERY:
            return
        deltas = [reply["delta"] for reply in replies.values()]
        found = self.observer.parts(server["x"], [before + delta for delta in deltas])
        whole = self.observer.untelescoped(server["x"])
        self._note(at=server["round"], **vars(found), gap=abs(found.total - whole))
        if isinstance(self.rule, PrincipalGradient):
            self._note(**self.observer.mechanics(deltas, session))

    def _note(self, **figures: float) -> None:
        for name, value in figures.items():
            self.trace.setdefault(name, []).append(value)


def compute(cell: Cell, report: Report) -> Record:
    """One system on one split and seed."""
    clients, test = federation(cell["alpha"], cell["seed"])
    local = LocalSGD(cell["lr"], 1, BATCH, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    options: dict[str, Any] = {"seed": cell["seed"], "rounds": cell["rounds"], "report": report, "test": test}
    if cell["system"] == BASELINE:
        return train(FedAvg(local), lambda: MLP(*WIDTHS), clients, **options)
    observer = Observer(clients) if cell["parts"] else None
    method = Traced(local, **SETTINGS[cell["system"]], observer=observer)
    record = train(method, lambda: MLP(*WIDTHS), clients, **options)
    return {**record, **method.trace}


# The run


def _cell(lab: Lab, system: str, alpha: float, seed: int, lr: float, parts: bool = True) -> dict[str, Any]:
    rounds = SMOKE_ROUNDS if lab.scale == "smoke" else ROUNDS
    return {"system": system, "alpha": alpha, "seed": seed, "lr": lr, "rounds": rounds, "parts": parts}


class Runs:
    """The records of systems on a split, at one learning rate or at the own one of each."""

    def __init__(self, lab: Lab, alpha: float, rates: Mapping[str, float]) -> None:
        self.rates = rates
        self.records = {
            system: lab.map([_cell(lab, system, alpha, seed, lr) for seed in lab.seeds], compute)
            for system, lr in rates.items()
        }

    def scores(self, system: str) -> list[float]:
        return self.each(system, lambda record: tail(record, LAST))

    def lead(self, one: str, other: str) -> list[float]:
        """Paired differences in accuracy."""
        return [a - b for a, b in zip(self.scores(one), self.scores(other), strict=True)]

    def each(self, system: str, figure: Callable[[Record], float]) -> list[float]:
        return [figure(record) for record in self.records[system]]

    def change(self, one: str, other: str, name: str) -> list[float]:
        """Paired differences of a part of the loss in the last round."""
        pairs = zip(self.records[one], self.records[other], strict=True)
        return [a[name][-1] - b[name][-1] for a, b in pairs]


def run(lab: Lab) -> Findings:
    """Train all systems on all seeds, tune, and check the claims."""
    if lab.scale == "smoke":
        same = Runs(lab, SKEWED, dict.fromkeys((EQUAL, PRINCIPAL, BOTH), RATE))
        return Findings([*_smoke_claims(same), *_mechanics(same)], _table(same, ""), _curves(same, ""))
    same = Runs(lab, SKEWED, dict.fromkeys(SETTINGS, RATE))
    own = Runs(lab, SKEWED, {system: _rate(lab, system, SKEWED) for system in TUNED})
    mild = Runs(lab, MILD, {system: _rate(lab, system, MILD) for system in MILDER})
    baseline = lab.map([_cell(lab, BASELINE, SKEWED, seed, RATE, False) for seed in lab.seeds], compute)
    return Findings(
        [*_claims(same, own, mild), *_mechanics(same), _is_fedavg(same, baseline)],
        [*_table(same, ""), *_table(own, OWN), *_table(mild, MILD_NAME)],
        [*_curves(same, ""), *_curves(own, OWN), *_curves(mild, MILD_NAME)],
    )


OWN, MILD_NAME = "own rate: ", "Dirichlet 1: "
"""What the names of systems begin with where they do not run at the common rate on the skewed split."""


def _rate(lab: Lab, system: str, alpha: float) -> float:
    cell = _cell(lab, system, alpha, 0, 0.0, parts=False)
    return tuned(lab, compute, cell, lambda r: tail(r, LAST), grid=GRID, seeds=PILOT_SEEDS)


def _smoke_claims(runs: Runs) -> list[Claim]:
    return [
        Claim(
            f"smoke.{name}", f"{system} learns in {SMOKE_ROUNDS} rounds", "card, section 6", "measured",
            runs.each(system, lambda record: record["accuracy"][-1]), ">=", 50.0, "card, section 6", "%",
        )
        for name, system in (("fedavg", EQUAL), ("fedld", BOTH))
    ]  # fmt: skip


STEP_SIZE = (
    "the common rate is below the best of FedAvg, which at its own makes up most of the difference: the gain "
    "at the common one is for the greater part one of step size"
)


def _claims(same: Runs, own: Runs, mild: Runs) -> list[Claim]:
    def lead(
        ident: str, text: str, one: str, other: str, op: Op | None = None, by: float | None = None,
        runs: Runs = same, reason: str | None = None,
    ) -> Claim:  # fmt: skip
        source, values = "card, section 6", runs.lead(one, other)
        if op is None:
            return Claim(ident, text, source, "measured", values, unit="points")
        claim = Claim(ident, text, source, "measured", values, op, by, CARD, "points")
        return claim if claim.holds else replace(claim, reason=reason)

    def part(ident: str, text: str, one: str, other: str, name: str) -> Claim:
        return Claim(ident, text, "the decomposition", "measured", same.change(one, other, name), unit="nats")

    return [
        lead("margin.logits", "margin control on logits makes FedAvg more accurate", LOGITS, AVG, ">=", 0.5),
        lead("margin.own", "and with each at its own rate", LOGITS, AVG, ">=", 0.5, own, STEP_SIZE),
        lead("margin.released.most", "the released form is no better than FedAvg", BATCHED, AVG, "<=", 0.5),
        lead("margin.released.least", "and no worse", BATCHED, AVG, ">=", -0.5),
        lead("principal.mean", "principal gradients over the mean, at equal nominal step", PRINCIPAL, EQUAL),
        lead("principal.rescaled", "rescaled to the length of the mean, they win back accuracy",
             RESCALED, PRINCIPAL, ">=", 1.0),
        lead("principal.rest", "rescaled over the mean: the directions alone", RESCALED, EQUAL),
        lead("principal.own", "principal gradients over the mean, each at its own rate", PRINCIPAL, EQUAL,
             runs=own),
        lead("principal.fewer", "k 0.4 over 0.8", NARROW, PRINCIPAL),
        lead("principal.whole", "one vector over layer by layer", WHOLE, PRINCIPAL),
        lead("pcgrad", "pairwise projection over the mean, each at its own rate", PROJECTED, EQUAL, runs=own),
        lead("fedld", "FedLD over FedAvg, at equal nominal step", BOTH, AVG),
        lead("fedld.own", "FedLD over FedAvg, each at its own rate", BOTH, AVG, runs=own),
        lead("mild.margin", "milder: margin over FedAvg, each at its own rate", LOGITS, AVG, runs=mild),
        lead("mild.principal", "milder: principal over the mean, likewise", PRINCIPAL, EQUAL, runs=mild),
        lead("mild.fedld", "milder: FedLD over FedAvg, likewise", BOTH, AVG, runs=mild),
        part("parts.shift", "shift loss of margin control over FedAvg's", LOGITS, AVG, "shift"),
        part("parts.aggregation", "aggregation loss of principal gradients over the mean's",
             PRINCIPAL, EQUAL, "aggregation"),
        Claim("step", "length of the principal step over the mean's, last 10 rounds", "card, section 2",
              "measured", same.each(PRINCIPAL, lambda r: fmean(r["step"][-LAST:]))),
    ]  # fmt: skip


def _mechanics(runs: Runs) -> list[Claim]:
    """What must be so, on the changes that the clients of these runs made."""

    def most(name: str, system: str = BOTH) -> list[float]:
        return runs.each(system, lambda record: max(record[name]))

    def exact(ident: str, text: str, values: Sequence[float], limit: float, why: str, op: Op = "<=") -> Claim:
        return Claim(ident, text, "card, section 5", "exact", values, op, limit, why, "")

    numel = sum((inputs + 1) * outputs for inputs, outputs in pairwise(WIDTHS))
    sent = runs.each(BOTH, lambda r: (r["up"][-1] + r["down"][-1]) / (r["round"][-1] * CLIENTS * 8 * numel))
    first = [
        abs(a["accuracy"][0] - b["accuracy"][0])
        for a, b in zip(runs.records[PRINCIPAL], runs.records[EQUAL], strict=True)
    ]
    rounding = "float32 rounding"
    return [
        exact("mechanics.identical", "if all clients agree, their change is made", most("identical"), 1e-6,
              rounding),
        exact("mechanics.opposed", "if two oppose one another, it is their mean", most("opposed"), 1e-6,
              rounding),
        exact("mechanics.order", "the order of the clients is nothing", most("permuted"), 1e-5, rounding),
        exact("mechanics.scale", "three times the changes, three times the step", most("scaled"), 1e-6,
              rounding),
        exact("mechanics.bound", "an entry's step over its longest change, the most", most("bound"), 1 + 1e-6,
              "|delta| <= max |delta_i|"),
        exact("mechanics.first", "round 1 is that of unweighted FedAvg: difference in accuracy", first, 0.0,
              "definition", "=="),
        exact("mechanics.parts", "the parts of the loss over the loss of all examples: difference",
              most("gap"), 1e-5, rounding),
        exact("mechanics.bytes", "bytes of a client and round over two models", sent, 1.0, "4P up, 4P down",
              "=="),
    ]  # fmt: skip


def _is_fedavg(runs: Runs, baseline: Sequence[Record]) -> Claim:
    pairs = zip(runs.records[AVG], baseline, strict=True)
    gaps = [max(abs(a - b) for a, b in zip(r["accuracy"], s["accuracy"], strict=True)) for r, s in pairs]
    return Claim(
        "mechanics.fedavg", "without margin and rule it is FedAvg: difference in accuracy, the most",
        "card, section 5", "exact", gaps, "==", 0.0, "definition", "points",
    )  # fmt: skip


def _table(runs: Runs, prefix: str) -> list[Row]:
    rows = []
    for system, records in runs.records.items():
        rows += [
            Row(prefix + system, "accuracy", "%", runs.scores(system)),
            *(Row(prefix + system, f"{name} loss", "nats", [r[name][-1] for r in records]) for name in PARTS),
            *_steps(prefix, system, records),
            Row(prefix + system, "sent by all", "MB", [r["up"][-1] / 1e6 for r in records]),
            Row(prefix + system, "learning rate", "", [runs.rates[system]]),
        ]
    return rows


def _steps(prefix: str, system: str, records: Sequence[Record]) -> list[Row]:
    steps = [fmean(record["step"][-LAST:]) for record in records if "step" in record]
    return [Row(prefix + system, "step over the mean's", "", steps)] if steps else []


PARTS = ("local", "shift", "aggregation")


def _curves(runs: Runs, prefix: str) -> list[Curve]:
    curves = []
    for system, records in runs.records.items():
        curves.append(
            Curve(prefix + system, ACCURACY, "round", records[0]["round"], [r["accuracy"] for r in records])
        )
        if not prefix:
            curves += [
                Curve(system, f"{name} loss", "round", records[0]["at"], [r[name] for r in records])
                for name in PARTS
            ]
    return curves


ACCURACY = "accuracy, %"


# The picture, from the result alone.

COLOURS = {
    LOGITS: "#1b6ca8", BATCHED: "#8fbfe0", AVG: "#444444", EQUAL: "#aaaaaa", PROJECTED: "#8a6fb0",
    PRINCIPAL: "#d95f02", RESCALED: "#f4a259", BOTH: "#2a9d8f",
}  # fmt: skip


def draw(result: dict[str, Any], path: Path) -> None:
    """Accuracy along the rounds, the parts of the loss, and what a rate of one's own changes."""
    from cograd.papers._plot import figure

    curves = {(c["system"], c["metric"]): c for c in result["curves"]}
    table = {(row["system"], row["metric"]): row for row in result["table"]}
    seeds, full = len(result["seeds"]), (OWN + AVG, "accuracy") in table
    shown = [system for system in COLOURS if (system, ACCURACY) in curves]
    title = f"FedLD on MNIST-5k, {CLIENTS} clients, {seeds} seed{'s' * (seeds > 1)}"
    with figure(path, 3 if full else 2, title) as axes:
        for system in shown:
            curve = curves[system, ACCURACY]
            axes[0].plot(curve["x"], curve["mean"], color=COLOURS[system], label=system)
        axes[0].set(xlabel="round", ylabel="test accuracy, %", title=f"Dirichlet {SKEWED}, rate {RATE}")
        axes[0].set_ylim(bottom=60 if full else None)
        axes[0].legend(frameon=False, fontsize=7, loc="lower right")
        _bars(axes[1], shown, table)
        if full:
            _dots(axes[2], table)


def _bars(ax: Any, systems: Sequence[str], table: Mapping[tuple[str, str], Any]) -> None:
    for place, (name, colour) in enumerate(zip(PARTS, ("#2a9d8f", "#1b6ca8", "#d95f02"), strict=True)):
        heights = [table[system, f"{name} loss"]["mean"] for system in systems]
        at = [i + 0.27 * (place - 1) for i in range(len(systems))]
        ax.barh(at, heights, 0.25, color=colour, label=name)
    ax.set_yticks(range(len(systems)), systems, fontsize=7)
    ax.invert_yaxis()
    ax.set(xlabel="part of the training loss, nats", title="after the last round")
    _legend_below(ax)


def _dots(ax: Any, table: Mapping[tuple[str, str], Any]) -> None:
    groups = (
        ("", "#444444", f"rate {RATE}"),
        (OWN, "#1b6ca8", "own rate"),
        (MILD_NAME, "#d95f02", "Dirichlet 1"),
    )
    for place, (prefix, colour, label) in enumerate(groups):
        for i, system in enumerate(TUNED):
            row = table.get((prefix + system, "accuracy"))
            if row is not None:
                ax.errorbar(
                    row["mean"], i + 0.2 * (place - 1), xerr=row["sd"] or 0, fmt="o", ms=4, color=colour,
                    label=label if i == 0 else None,
                )  # fmt: skip
    ax.set_yticks(range(len(TUNED)), TUNED, fontsize=7)
    ax.invert_yaxis()
    ax.set(xlabel="test accuracy, %", title="and at their own rates")
    _legend_below(ax)


def _legend_below(ax: Any) -> None:
    ax.legend(frameon=False, fontsize=7, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.15))


USAGE = """\
import torch
from cograd import data
from cograd.clients import FedLD, PrincipalGradient
from cograd.engines.federated import Clients, LocalSGD, Simulation
train, test = data.load("mnist-5k"), data.load("mnist-5k", "test")
clients = Clients(train, data.dirichlet(train.y, parties=5, alpha=0.1, seed=0))
model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 10))
local = LocalSGD(lr=0.05, batch_size=50, momentum=0.5)
method = FedLD(local, margin=0.1, rule=PrincipalGradient(0.8))
print(Simulation(method, model, torch.nn.functional.cross_entropy, clients, test=test).run(rounds=3)[-1])
"""

PAPER = Paper(
    slug="fedld",
    title="Tackling Data Heterogeneity in Federated Learning via Loss Decomposition",
    authors="Shuang Zeng, Pengxin Guo, Shuai Wang, Jianbo Wang, Yuyin Zhou, Liangqiong Qu",
    arxiv="2408.12300",
    venue="MICCAI 2024",
    room="clients",
    entry="cograd.clients.FedLD",
    module=__name__,
    summary="clients shun sureness, and the server walks along the principal directions of what they changed",
    usage=USAGE,
    datasets=("mnist-5k",),
    seeds=5,
    run=run,
    draw=draw,
)
