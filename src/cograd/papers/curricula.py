"""Curricula on skewed and on balanced labels: of samples within a round, of clients along the rounds.

CIFAR-5k at 16 x 16 pixels among 40 clients of 100 images, 8 of them a round, an MLP (768-64-10), minibatches of
10, momentum 0.9, 40 rounds of 50 local steps each (4 epochs by the released code's count), or as many client
updates where a client curriculum makes rounds of fewer clients. Three federations:

- *two labels*: each client holds two runs of the images sorted by label; all systems.
- *balanced*: the same images dealt at random; the control, for what the paper's title asks.
- *MNIST*: two labels of MNIST-5k, where an easy task leaves less to order.

FedAvg is here the same training with a window of everything: as many steps as with a curriculum. Orders are
compared twice: at one learning rate, as in the paper (0.01), and every system at its own best of one grid,
found on a pilot seed. Who judges (s_L, s_LG, errors, an expert) is compared at 0.01. All systems of a seed see
the same initial weights; those without a client curriculum have the same participants. Accuracy is the global
model's on the test set, over the last 10 rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import accumulate, pairwise
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from cograd import data
from cograd.clients.baselines.fedavg import FedAvg
from cograd.clients.baselines.power_of_choice import PowerOfChoice
from cograd.clients.baselines.scaffold import Scaffold
from cograd.clients.curricula import ClientCurriculum, Curriculum, DataCurriculum, Expert, PacedSGD, Pacing
from cograd.core.claim import Claim, Curve, Row
from cograd.core.streams import seed_for
from cograd.data.clients import Clients
from cograd.engines.federated.local import LocalModel
from cograd.engines.federated.protocol import ClientContext, Content, Session, State
from cograd.engines.federated.samplers import Everyone, Uniform
from cograd.engines.federated.simulation import Simulation
from cograd.engines.federated.training import LocalSGD
from cograd.models.mlp import MLP
from cograd.papers._federation import tail, train, tuned
from cograd.papers._paper import Findings, Paper

if TYPE_CHECKING:
    from cograd.papers._lab import Cell, Lab, Record, Report

CLIENTS, SIZE, PARTICIPATION, LABELS = 40, 100, 0.2, 2
EPOCHS, BATCH, MOMENTUM, WEIGHT_DECAY, COOLING = 4, 10, 0.9, 5e-4, 1e-3
ROUNDS, LAST, SMOKE_ROUNDS, SMOKE_LAST, SMOKE_CLIENTS = 40, 10, 8, 3, 20
HIDDEN, CANDIDATES = 64, 16
GRID, STEADY_GRID, PILOT_SEEDS = (0.001, 0.003, 0.01), (0.01, 0.03, 0.1), (100,)
RATE = 0.01
EXPERT_EPOCHS, EXPERT_BATCH, EXPERT_RATE, SMOOTHING = 10, 64, 0.01, 0.1
EARLY = 15
"""Rounds in which the pool of the client curriculum is narrow."""
CARD = "pilot of the card, other seeds"
PILOT = "half of what a pilot found, another seed"

PACING = Pacing("linear", start=0.2, full_at=0.8)
WINDOW = DataCurriculum(pacing=PACING, released_budget=True, cooling=COOLING)
WHOLE = replace(WINDOW, order="random", pacing=Pacing("step", start=1.0, full_at=1.0))
EASY_FIRST, HARD_FIRST, ANY = (replace(WINDOW, order=order) for order in ("easy_first", "hard_first", "random"))

PLAIN, EASY, HARD, RANDOM = "FedAvg", "easy samples first", "hard samples first", "random samples, same window"
CLIENT, CLIENT_HARD = "easy clients first", "hard clients first"
BOTH, CHOICE = "easy samples and clients first", "power-of-choice"
BY_LOCAL, BY_BOTH, BY_ERROR, BY_EXPERT = (
    f"{EASY}, by {judge}" for judge in ("s_L", "s_LG", "errors", "expert")
)
SCAFFOLD, SCAFFOLD_EASY = "SCAFFOLD", "SCAFFOLD, easy samples first"
ORDERS = (PLAIN, EASY, RANDOM, HARD)
JUDGES = (BY_LOCAL, BY_BOTH, BY_ERROR, BY_EXPERT)


@dataclass(frozen=True)
class Setting:
    """A split, its systems, and whether each has its own best learning rate, or all have `RATE`."""

    split: str
    systems: tuple[str, ...]
    tuned: bool
    prefix: str


SETTINGS = {
    "card": Setting("two labels", (*ORDERS, *JUDGES), False, "rate 0.01: "),
    "card, balanced": Setting("balanced", ORDERS, False, "balanced, rate 0.01: "),
    "tuned": Setting(
        "two labels", (*ORDERS, CLIENT, CLIENT_HARD, BOTH, CHOICE, SCAFFOLD, SCAFFOLD_EASY), True, ""
    ),
    "balanced": Setting("balanced", (PLAIN, EASY), True, "balanced: "),
    "mnist": Setting("mnist", (PLAIN, EASY), True, "MNIST: "),
}
SMOKE = Setting("two labels", (EASY, HARD, CLIENT), False, "")


@dataclass
class Traced(FedAvg):
    """FedAvg that notes who took part in each round, and the mean length of their changes."""

    members: list[list[int]] = field(default_factory=list, repr=False)
    moves: list[float] = field(default_factory=list, repr=False)

    def close(self, server: State, replies: Mapping[int, Content], session: Session) -> None:
        self.members.append(list(replies))
        self.moves.append(fmean(float(reply["delta"].norm()) for reply in replies.values()))
        super().close(server, replies, session)


def method(system: str, lr: float, updates: int, expert: Expert | None) -> Curriculum:
    """A system of the comparison; ``updates`` are its planned client updates."""
    local = LocalSGD(lr, EPOCHS, BATCH, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    plain = replace(local, momentum=0.0)
    pool = ClientCurriculum(updates=updates, pacing=PACING)
    hard = replace(pool, order="hard_first")
    # SCAFFOLD's control variate is made for one learning rate
    steady, steady_easy = (replace(cur, cooling=0.0) for cur in (WHOLE, EASY_FIRST))
    made: dict[str, Callable[[], Curriculum]] = {
        PLAIN: lambda: Curriculum(Traced(local), WHOLE),
        EASY: lambda: Curriculum(Traced(local), EASY_FIRST),
        RANDOM: lambda: Curriculum(Traced(local), ANY),
        HARD: lambda: Curriculum(Traced(local), HARD_FIRST),
        CLIENT: lambda: Curriculum(Traced(local), WHOLE, pool),
        CLIENT_HARD: lambda: Curriculum(Traced(local), WHOLE, hard),
        BOTH: lambda: Curriculum(Traced(local), EASY_FIRST, pool),
        CHOICE: lambda: Curriculum(PowerOfChoice(local, candidates=CANDIDATES), WHOLE),
        SCAFFOLD: lambda: Curriculum(Scaffold(plain), steady),
        SCAFFOLD_EASY: lambda: Curriculum(Scaffold(plain), steady_easy),
        BY_LOCAL: lambda: Curriculum(Traced(local), replace(EASY_FIRST, judge="local")),
        BY_BOTH: lambda: Curriculum(Traced(local), replace(EASY_FIRST, judge="both")),
        BY_ERROR: lambda: Curriculum(Traced(local), replace(EASY_FIRST, score="error")),
        BY_EXPERT: lambda: Curriculum(Traced(local), replace(EASY_FIRST, judge="expert"), expert=expert),
    }
    return made[system]()


# Who holds what


@lru_cache(2)
def _images(name: str) -> tuple[data.Images, data.Images]:
    """Training and test images, normalised; photographs at half the size."""
    parts = [data.load(name, part) for part in ("train", "test")]
    first, second = (part for part in parts if isinstance(part, data.Images))
    moments = first.moments()
    first, second = first.normalised(*moments), second.normalised(*moments)
    if name == "mnist-5k":
        return first, second
    first, second = (replace(part, x=nn.functional.avg_pool2d(part.x, 2)) for part in (first, second))
    return first, second


def _whole(split: str, clients: int) -> data.Images:
    """All that the clients hold."""
    images, _ = _images("mnist-5k" if split == "mnist" else "cifar-5k")
    return replace(images, x=images.x[: clients * SIZE], y=images.y[: clients * SIZE])


@lru_cache(4)
def federation(split: str, clients: int, seed: int) -> tuple[Clients, data.Images]:
    """The clients of a split, and the test images."""
    whole = _whole(split, clients)
    if split == "balanced":
        parts = data.iid(len(whole), clients, seed)
    else:
        parts = data.shards(whole.y, clients, LABELS, seed)
    return Clients(whole, parts), _images("mnist-5k" if split == "mnist" else "cifar-5k")[1]


def model(split: str) -> MLP:
    return MLP(784 if split == "mnist" else 768, HIDDEN, 10)


@lru_cache(4)
def trained_expert(split: str, clients: int, seed: int) -> Expert:
    """The clients' model, trained on all their data together."""
    whole = _whole(split, clients)
    alone = Clients(whole, data.iid(len(whole), 1, seed))
    local = LocalSGD(EXPERT_RATE, EXPERT_EPOCHS, EXPERT_BATCH, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    torch.manual_seed(seed_for(seed, "expert"))
    smooth = nn.CrossEntropyLoss(label_smoothing=SMOOTHING)
    with Simulation(FedAvg(local), model(split), smooth, alone, sampler=Everyone(), seed=seed) as sim:
        sim.run(1)
        return Expert(sim.server["x"].clone())


def compute(cell: Cell, report: Report) -> Record:
    """One system on one split and seed."""
    split, clients, seed, system = cell["split"], cell["clients"], cell["seed"], cell["system"]
    held, test = federation(split, clients, seed)
    sampler = Uniform(PARTICIPATION)
    members = len(sampler(0, clients, seed))
    expert = trained_expert(split, clients, seed) if system == BY_EXPERT else None
    chosen = method(system, cell["lr"], cell["rounds"] * members, expert)
    rounds = cell["rounds"] if chosen.clients is None else chosen.clients.rounds(clients, members)
    record = train(
        chosen, lambda: model(split), held, seed=seed, rounds=rounds, report=report, sampler=sampler, test=test
    )
    record |= {"clients": clients, "pure": purity(held, split, seed)}
    took_part = [members] * rounds
    if isinstance(chosen.method, Traced):
        took_part = [len(group) for group in chosen.method.members]
        record["moves"] = chosen.method.moves
        record["labels"] = [
            len(torch.cat([held[client].y for client in group]).unique()) for group in chosen.method.members
        ]
    record["updates"] = list(accumulate(took_part))
    return record


def purity(held: Clients, split: str, seed: int) -> float:
    """The share of the minibatch entries of a client's round whose rank is inside the window of their pass."""
    torch.manual_seed(seed_for(seed, "init"))
    local = LocalModel(model(split), nn.functional.cross_entropy)
    ctx = ClientContext(0, 0, seed, held.sizes, local, local.theta.clone())
    paced = PacedSGD(RATE, EPOCHS, BATCH, curriculum=EASY_FIRST)
    outputs = local.outputs(ctx.initial, held[0].x)
    rank = nn.functional.cross_entropy(outputs, held[0].y, reduction="none").argsort().argsort()
    rows = torch.cat(list(paced.rows(ctx, held[0])))
    allowed = torch.cat([torch.full((size,), size) for size in paced.windows(len(held[0]))])
    return float((rank[rows] < allowed).double().mean())


# The run


class Runs:
    """The records of a setting by system."""

    def __init__(self, lab: Lab, setting: Setting) -> None:
        self.systems, self.prefix = setting.systems, setting.prefix
        self.last = SMOKE_LAST if lab.scale == "smoke" else LAST
        self.rates = {system: _rate(lab, setting, system) for system in self.systems}
        self.records = {
            system: lab.map([_cell(lab, setting, system, seed, rate) for seed in lab.seeds], compute)
            for system, rate in self.rates.items()
        }

    def scores(self, system: str) -> list[float]:
        return [tail(record, self.last) for record in self.records[system]]

    def lead(self, one: str, other: str) -> list[float]:
        """Paired differences in accuracy."""
        return [a - b for a, b in zip(self.scores(one), self.scores(other), strict=True)]

    def each(self, system: str, figure: Callable[[Record], float]) -> list[float]:
        return [figure(record) for record in self.records[system]]

    def ratio(self, one: str, other: str, figure: Callable[[Record], float]) -> list[float]:
        return [a / b for a, b in zip(self.each(one, figure), self.each(other, figure), strict=True)]


def _cell(lab: Lab, setting: Setting, system: str, seed: int, lr: float) -> dict[str, Any]:
    smoke = lab.scale == "smoke"
    return {
        "system": system, "split": setting.split, "seed": seed, "lr": lr,
        "rounds": SMOKE_ROUNDS if smoke else ROUNDS, "clients": SMOKE_CLIENTS if smoke else CLIENTS,
    }  # fmt: skip


def _rate(lab: Lab, setting: Setting, system: str) -> float:
    """A system's learning rate; SCAFFOLD's grid is that of the others over 1 - momentum, as it has none."""
    if not setting.tuned:
        return RATE
    grid = STEADY_GRID if system in (SCAFFOLD, SCAFFOLD_EASY) else GRID
    cell = _cell(lab, setting, system, 0, 0.0)
    return tuned(lab, compute, cell, lambda r: tail(r, LAST), grid=grid, seeds=PILOT_SEEDS)


def run(lab: Lab) -> Findings:
    """Tune, train all systems on all seeds, and check the claims."""
    if lab.scale == "smoke":
        runs = Runs(lab, SMOKE)
        return Findings(_smoke_claims(runs), _table(runs), _curves(runs))
    settings = {name: Runs(lab, setting) for name, setting in SETTINGS.items()}
    return Findings(
        [*_card_claims(settings), *_claims(settings)],
        [row for runs in settings.values() for row in _table(runs)],
        [curve for runs in settings.values() for curve in _curves(runs)],
    )


def _smoke_claims(runs: Runs) -> list[Claim]:
    return [
        Claim(
            "smoke", "easy first does not fall behind hard first in 8 rounds", "card, section 6", "measured",
            runs.lead(EASY, HARD), ">=", -2.0, "card, section 6", "points",
        ),
        *_exact(runs, HARD),
    ]  # fmt: skip


def _exact(runs: Runs, other: str) -> list[Claim]:
    return [
        Claim(
            "purity", "entries of a client's minibatches that the window of their pass admits", "algorithm",
            "exact", runs.each(EASY, lambda record: 100 * record["pure"]), "==", 100.0, "window rule", "%",
        ),
        Claim(
            "steps", f"gradients of easy first over those of {other}", "section 4", "exact",
            runs.ratio(EASY, other, lambda record: record["grad"][-1]), "==", 1.0, "S is the same", "",
        ),
        Claim(
            "bytes.data", f"bytes of easy first over those of {other}", "section 4", "exact",
            runs.ratio(EASY, other, lambda record: record["up"][-1] + record["down"][-1]), "==", 1.0,
            "scored with what was received", "",
        ),
        Claim(
            "bytes.clients", "bytes up with the client curriculum over updates and a score a client and pass",
            "card, section 2", "exact", runs.each(CLIENT, _over_formula), "==", 1.0, "4P N down, 4 N up", "",
        ),
    ]  # fmt: skip


def _over_formula(record: Record) -> float:
    """Bytes up over what they must be, given the passes that the bytes down tell."""
    model_bytes = 4 * sum((inputs + 1) * outputs for inputs, outputs in pairwise((768, HIDDEN, 10)))
    updates = record["updates"][-1]
    passes = (record["down"][-1] / model_bytes - updates) / record["clients"]
    over: float = record["up"][-1] / (model_bytes * updates + 4 * record["clients"] * round(passes))
    return over if passes == round(passes) else 0.0


SKEWED_FIGURE, BALANCED_FIGURE = "figures, CIFAR-10, 2 labels a client", "figures, CIFAR-10, IID"
BALANCED_REASON = (
    "On balanced labels the window does what a smaller learning rate does: clients' changes are shorter (see "
    "moves.balanced). That gives the lead at one rate of 0.01; at FedAvg's own best rate nothing is left of it."
)
CLIENT_REASON = (
    "Easy clients are those whose labels the model favours at the time: a narrow pool holds fewer labels than "
    "as many clients drawn at random (see clients.labels), and the model is trained on those alone."
)


def _lead(
    ident: str, text: str, values: Sequence[float], by: float | None = None, threshold: str = CARD, *,
    paper: float | None = None, source: str = SKEWED_FIGURE, reason: str | None = None,
) -> Claim:  # fmt: skip
    """A paired difference in accuracy: at least ``by``, or only reported."""
    if by is None:
        return Claim(ident, text, source, "measured", values, unit="points", paper_value=paper)
    return Claim(
        ident, text, source, "measured", values, ">=", by, threshold, "points", paper_value=paper,
        reason=reason if fmean(values) < by else None,
    )  # fmt: skip


def _card_claims(settings: Mapping[str, Runs]) -> list[Claim]:
    """What the paper compares: one learning rate for all orders."""
    skewed, balanced = settings["card"], settings["card, balanced"]
    gains = skewed.lead(EASY, PLAIN), balanced.lead(EASY, PLAIN)
    judged = (("s_L", BY_LOCAL, -4.39), ("s_LG", BY_BOTH, 0.12), ("errors", BY_ERROR, -0.80),
              ("expert", BY_EXPERT, None))  # fmt: skip
    return [
        _lead("order", "two labels, rate 0.01: easy samples first over hard ones", skewed.lead(EASY, HARD), 5.0,
              paper=13.3),
        _lead("order.random", "and over the same window in random order", skewed.lead(EASY, RANDOM), 1.5,
              paper=7.0),
        _lead("skew", "what easy first gains over FedAvg with two labels, over that with balanced ones",
              [a - b for a, b in zip(*gains, strict=True)], 2.0, paper=1.1),
        _lead("gain", "two labels, rate 0.01: easy samples first over FedAvg", gains[0], paper=6.1),
        _lead("balanced", "balanced labels, rate 0.01: easy samples first over FedAvg", gains[1], paper=5.0,
              source=BALANCED_FIGURE),
        *(
            Claim(
                f"moves.{name}", f"{name} labels: length of a client's change, easy samples first, same rate",
                "not in the paper", "measured",
                runs.ratio(EASY, PLAIN, lambda record: fmean(record["moves"])), unit="of FedAvg's",
            )
            for name, runs in (("two", skewed), ("balanced", balanced))
        ),
        *(_lead(f"judge.{name}", f"judged by {name} over s_G", skewed.lead(system, EASY), paper=paper)
          for name, system, paper in judged),
    ]  # fmt: skip


def _claims(settings: Mapping[str, Runs]) -> list[Claim]:
    """What is left where every system has its own best learning rate."""
    skewed, balanced, mnist = settings["tuned"], settings["balanced"], settings["mnist"]

    def labels(record: Record) -> float:
        return fmean(record["labels"][:EARLY])

    return [
        _lead("tuned.order", "two labels, own best rates: easy samples first over hard ones",
              skewed.lead(EASY, HARD), 2.5, PILOT),
        _lead("tuned.random", "and over the same window in random order", skewed.lead(EASY, RANDOM), 1.5),
        _lead("tuned.gain", "and over FedAvg", skewed.lead(EASY, PLAIN), 1.5, PILOT),
        _lead("tuned.balanced", "balanced labels, own best rates: easy samples first over FedAvg, too",
              balanced.lead(EASY, PLAIN), 1.0, "a fifth of the paper's gain", paper=5.0, source=BALANCED_FIGURE,
              reason=BALANCED_REASON),
        _lead("clients.both", "two labels: the client curriculum on top of the data curriculum costs at most 1",
              skewed.lead(BOTH, EASY), -1.0, paper=1.7, source="ablation, Dirichlet 0.2", reason=CLIENT_REASON),
        _lead("clients", "client curriculum alone over FedAvg", skewed.lead(CLIENT, PLAIN), paper=2.1,
              source="ablation, Dirichlet 0.2"),
        _lead("clients.order", "easy clients first over hard ones", skewed.lead(CLIENT, CLIENT_HARD), paper=5.5,
              source="figures, CIFAR-10, Dirichlet 0.05"),
        _lead("clients.choice", "easy clients first over power-of-choice", skewed.lead(CLIENT, CHOICE)),
        Claim(
            "clients.labels", f"labels in a round, easy clients first over FedAvg, first {EARLY} rounds",
            "not in the paper", "measured", skewed.ratio(CLIENT, PLAIN, labels), unit="of FedAvg's",
        ),
        *_exact(skewed, PLAIN),
        _lead("scaffold", "SCAFFOLD: easy samples first over plain", skewed.lead(SCAFFOLD_EASY, SCAFFOLD)),
        _lead("mnist", "MNIST, two labels: easy samples first over FedAvg", mnist.lead(EASY, PLAIN), paper=-0.3,
              source="figures, Fashion-MNIST, Dirichlet 0.05"),
    ]  # fmt: skip


def _table(runs: Runs) -> list[Row]:
    rows = []
    for system in runs.systems:
        records = runs.records[system]
        rows += [
            Row(runs.prefix + system, "accuracy", "%", runs.scores(system)),
            Row(
                runs.prefix + system,
                "sent by all",
                "MB",
                [(r["up"][-1] + r["down"][-1]) / 1e6 for r in records],
            ),
            Row(runs.prefix + system, "gradients", "1000", [r["grad"][-1] / 1e3 for r in records]),
            Row(runs.prefix + system, "learning rate", "", [runs.rates[system]]),
        ]
    return rows


def _curves(runs: Runs) -> list[Curve]:
    return [
        Curve(
            runs.prefix + system,
            ACCURACY,
            "client updates",
            records[0]["updates"],
            [r["accuracy"] for r in records],
        )
        for system, records in runs.records.items()
    ]


ACCURACY = "accuracy, %"


# The picture, from the result alone.

SAMPLES = {PLAIN: "#444444", EASY: "#1b6ca8", RANDOM: "#aaaaaa", HARD: "#d95f02"}
WHO = {
    PLAIN: "#444444", EASY: "#1b6ca8", BOTH: "#5b9bd0", CLIENT: "#2a9d8f", CLIENT_HARD: "#f4a259",
    CHOICE: "#8a6fb0", SCAFFOLD: "#aaaaaa",
}  # fmt: skip
PANELS = (
    ("two labels a client, rate 0.01", SETTINGS["card"].prefix, SAMPLES),
    ("balanced labels, rate 0.01", SETTINGS["card, balanced"].prefix, SAMPLES),
    ("two labels a client, own best rates", "", WHO),
)


def draw(result: dict[str, Any], path: Path) -> None:
    """Accuracy along the training: orders of samples on two splits, and orders of clients."""
    from cograd.papers._plot import figure

    curves = {c["system"]: c for c in result["curves"]}
    panels = [panel for panel in PANELS if sum(panel[1] + system in curves for system in panel[2]) > 1]
    seeds = len(result["seeds"])
    with figure(path, len(panels), f"Curricula on CIFAR-5k, {seeds} seed{'s' * (seeds > 1)}") as axes:
        for ax, (title, prefix, colours) in zip(axes, panels, strict=True):
            for system, colour in colours.items():
                if (curve := curves.get(prefix + system)) is not None:
                    ax.plot(curve["x"], _smooth(curve["mean"]), color=colour, label=system)
            ax.set(xlabel="client updates", title=title)
            ax.legend(frameon=False, fontsize=8, loc="lower right")
        axes[0].set(ylabel="test accuracy of the global model, %")


def _smooth(values: Sequence[float], span: int = 5) -> list[float]:
    """Running means: single rounds jump with who takes part in them."""
    return [fmean(values[max(0, i - span + 1) : i + 1]) for i in range(len(values))]


USAGE = """\
import torch
from cograd import data
from cograd.clients import Curriculum, DataCurriculum
from cograd.clients.baselines import FedAvg
from cograd.engines.federated import Clients, LocalSGD, Simulation, Uniform
train, test = data.load("mnist-5k"), data.load("mnist-5k", "test")
clients = Clients(train, data.shards(train.y, parties=40, shards_per_party=2, seed=0))
model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 10))
method, loss = Curriculum(FedAvg(LocalSGD(0.01, 4, 10)), DataCurriculum()), torch.nn.functional.cross_entropy
print(Simulation(method, model, loss, clients, sampler=Uniform(0.2), test=test).run(rounds=3)[-1])
"""

PAPER = Paper(
    slug="curricula",
    title="When Do Curricula Work in Federated Learning?",
    authors="Saeed Vahidian, Sreevatsank Kadaveru, Woonjoon Baek, Weijia Wang, Vyacheslav Kungurtsev, "
    "Chen Chen, Mubarak Shah, Bill Lin",
    arxiv="2212.12712",
    venue="ICCV 2023",
    room="clients",
    entry="cograd.clients.Curriculum",
    module=__name__,
    summary="clients share rounds in which each goes from its easy examples to all of them",
    usage=USAGE,
    datasets=("cifar-5k", "mnist-5k"),
    seeds=3,
    run=run,
    draw=draw,
)
