"""FedCAC against personalised baselines: with hidden groups among the clients, and without.

CIFAR-5k at 16 x 16 pixels, 20 clients, an MLP (768-64-10), 5 local epochs in minibatches of 20, 25 rounds.

- *groups*: four hidden groups of five clients; a group's clients hold 20 images of each of its three classes.
  A client tests on 150 images of these classes; test images of clients overlap, and nobody trains on them.
- *Dirichlet*: 100 images a client, class mixes from Dirichlet(0.1), tests in the same mixes. There is no group
  to be found; the table says what happens then.

Every system has its own best learning rate of one grid, found on a pilot seed; all systems of a seed see the
same minibatches and initial weights. Accuracy is the mean over clients of their own models on their own test
images, after aggregation, over the last 5 rounds.
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
from cograd.clients.baselines.fedper import FedPer
from cograd.clients.baselines.fedrep import FedRep
from cograd.clients.baselines.fine_tuned import FineTuned
from cograd.clients.baselines.local_only import LocalOnly
from cograd.clients.fedcac import Collaboration, FedCAC
from cograd.core.claim import Claim, Curve, Row
from cograd.core.streams import stream
from cograd.data.clients import Clients, matching
from cograd.data.partition import Partition
from cograd.engines.federated.protocol import Content, Method, Session, State
from cograd.engines.federated.training import LocalSGD
from cograd.models.mlp import MLP
from cograd.papers._federation import tail, train, tuned
from cograd.papers._paper import Findings, Paper

if TYPE_CHECKING:
    from cograd.papers._lab import Cell, Lab, Record, Report

GROUPS = ((0, 1, 8), (2, 3, 9), (4, 5, 6), (7, 0, 9))
PER_CLASS, TEST_PER_CLASS, ALPHA, MIXED = 20, 50, 0.1, 100
EPOCHS, BATCH, WIDTHS = 5, 20, (768, 64, 10)
ROUNDS, LAST, SMOKE_ROUNDS, SMOKE_CLIENTS = 25, 5, 5, 8
CLIENTS = 20
GRID, PILOT_SEEDS = (0.02, 0.05, 0.12), (100,)
CARD = "pilots of the card, other seeds"
FOUND = 7
"""The round from which on the groups are to be found."""

CAC = "FedCAC, beta {}".format
LOCAL, AVG, TUNED, PER, REP = "local only", "FedAvg", "FedAvg + fine-tuning", "FedPer", "FedRep"
ALONE, ORACLE = "FedCAC, no partners", "FedAvg in the true groups"
BETAS = (15, 25, 50)
MAIN = CAC(50)
SYSTEMS = {
    "groups": (LOCAL, AVG, TUNED, PER, REP, ALONE, *map(CAC, BETAS), ORACLE),
    "dirichlet": (LOCAL, AVG, TUNED, PER, REP, ALONE, CAC(15), CAC(30)),
}


@dataclass
class Traced(FedCAC):
    """FedCAC that notes who collaborates with whom, given the true groups of its clients."""

    groups: tuple[int, ...] = ()
    trace: list[dict[str, float]] = field(default_factory=list, repr=False)

    def close(self, server: State, replies: Mapping[int, Content], session: Session) -> None:
        training = "mixed" not in server
        super().close(server, replies, session)
        if training:
            self.trace.append(self.figures(server, replies))

    def figures(self, server: State, replies: Mapping[int, Content]) -> dict[str, float]:
        n = len(self.groups)
        alike = torch.tensor(self.groups)[:, None] == torch.tensor(self.groups)
        apart = ~torch.eye(n, dtype=torch.bool)
        partners, overlap = server["together"] & apart, server["overlap"]
        inside, across = overlap[alike & apart], overlap[~alike]
        masks = torch.stack([reply["mask"] for reply in replies.values()])
        return {
            "partners": int(partners.sum()) / n,
            "strangers": int((partners & ~alike).sum()) / n,
            "told apart": float((inside[:, None] > across).double().mean()) if len(across) else 1.0,
            "unmixed": int((server["mixed"] != server["x"])[~masks].sum()),
        }


@dataclass
class Alone(Traced):
    """The control: the mask without the collaboration; critical entries stay as they were trained."""

    def collaborate(self, masks: Tensor, t: int) -> Collaboration:
        return replace(super().collaborate(masks, t), together=torch.eye(len(masks), dtype=torch.bool))


@dataclass
class Oracle(Traced):
    """FedAvg inside the true groups: all is critical (tau 1) and shared there."""

    def collaborate(self, masks: Tensor, t: int) -> Collaboration:
        alike = torch.tensor(self.groups)[:, None] == torch.tensor(self.groups)
        return replace(super().collaborate(masks, t), together=alike)


def method(system: str, local: LocalSGD, groups: tuple[int, ...]) -> Method:
    """A system of the comparison."""
    if system.startswith(CAC("")):
        return Traced(local, beta=int(system.rpartition(" ")[2]), groups=groups)
    made: dict[str, Callable[[], Method]] = {
        LOCAL: lambda: LocalOnly(local),
        AVG: lambda: FedAvg(local),
        TUNED: lambda: FineTuned(local),
        PER: lambda: FedPer(local),
        REP: lambda: FedRep(replace(local, epochs=1), head_epochs=EPOCHS - 1),
        ALONE: lambda: Alone(local, groups=groups),
        ORACLE: lambda: Oracle(local, tau=1.0, groups=groups),
    }
    return made[system]()


# Who holds what


@lru_cache(1)
def _images() -> tuple[data.Images, int]:
    """CIFAR-5k, its training images first, at half the size; and how many of them are for training."""
    parts = [data.load("cifar-5k", "train"), data.load("cifar-5k", "test")]
    first, second = (part for part in parts if isinstance(part, data.Images))
    moments = first.moments()
    x = torch.cat([nn.functional.avg_pool2d(part.normalised(*moments).x, 2) for part in (first, second)])
    return replace(first, x=x, y=torch.cat([first.y, second.y])), len(first)


def grouped(y: Tensor, trainable: int, clients: int, seed: int) -> tuple[Partition, Partition]:
    """Training and test rows of clients in hidden groups, one group after another.

    No row is anybody's for training and for a test. Training rows are held once, test rows by several.
    """
    draws, size = stream(seed, "hidden groups"), clients // len(GROUPS)
    rows = {label: (y == label).nonzero()[:, 0] for group in GROUPS for label in group}
    pools = {label: found[found < trainable] for label, found in rows.items()}
    pools = {label: pool[draws.permutation(len(pool))] for label, pool in pools.items()}
    taken = dict.fromkeys(rows, 0)
    held, tested = [], []
    for client in range(clients):
        mine = []
        for label in GROUPS[client // size]:
            mine.append(pools[label][taken[label] : taken[label] + PER_CLASS])
            taken[label] += PER_CLASS
        held.append(torch.cat(mine).sort().values)
    spare = {
        label: torch.cat([pools[label][taken[label] :], found[found >= trainable]])
        for label, found in rows.items()
    }
    for client in range(clients):
        mine = [
            spare[label][draws.choice(len(spare[label]), TEST_PER_CLASS)] for label in GROUPS[client // size]
        ]
        tested.append(torch.cat(mine).sort().values)
    names = tuple(map(str, range(clients)))
    return Partition(tuple(held), "hidden groups", names), Partition(tuple(tested), "hidden groups", names)


@lru_cache(4)
def federation(split: str, clients: int, seed: int) -> Clients:
    """The clients of a split."""
    images, trainable = _images()
    if split == "groups":
        held, tested = grouped(images.y, trainable, clients, seed)
        return Clients(images, held, images, tested)
    order = stream(seed, "mixed").permutation(len(images))
    ours = [
        replace(images, x=images.x[r], y=images.y[r])
        for r in order.split([clients * MIXED, len(order) - clients * MIXED])
    ]
    held = data.dirichlet(ours[0].y, clients, ALPHA, seed)
    return Clients(ours[0], held, ours[1], matching(ours[1].y, ours[0].y, held, seed))


def compute(cell: Cell, report: Report) -> Record:
    """One system on one split and seed."""
    clients = federation(cell["split"], cell["clients"], cell["seed"])
    size = cell["clients"] // len(GROUPS)
    groups = tuple(k // size if cell["split"] == "groups" else k for k in range(cell["clients"]))
    system = method(cell["system"], LocalSGD(cell["lr"], EPOCHS, BATCH), groups)
    record = train(
        system, lambda: MLP(*WIDTHS), clients, seed=cell["seed"], rounds=cell["rounds"], report=report,
        personal=True,
    )  # fmt: skip
    record["clients"] = len(clients)
    if isinstance(system, Traced):
        record |= {name: [figures[name] for figures in system.trace] for name in system.trace[0]}
    return record


# The run


class Runs:
    """The records of a split by system."""

    def __init__(self, lab: Lab, split: str, systems: Sequence[str], rates: Mapping[str, float]) -> None:
        self.systems, self.rates = systems, rates
        self.records = {
            system: lab.map([_cell(lab, split, system, seed, rates[system]) for seed in lab.seeds], compute)
            for system in systems
        }

    def scores(self, system: str, name: str = "personal") -> list[float]:
        return [tail(record, LAST, name) for record in self.records[system]]

    def lead(self, one: str, other: str) -> list[float]:
        """Paired differences in accuracy."""
        return [a - b for a, b in zip(self.scores(one), self.scores(other), strict=True)]

    def each(self, system: str, figure: Callable[[Record], float]) -> list[float]:
        return [figure(record) for record in self.records[system]]


def _cell(lab: Lab, split: str, system: str, seed: int, lr: float) -> dict[str, Any]:
    smoke = lab.scale == "smoke"
    return {
        "system": system, "split": split, "seed": seed, "lr": lr,
        "rounds": SMOKE_ROUNDS if smoke else ROUNDS, "clients": SMOKE_CLIENTS if smoke else CLIENTS,
    }  # fmt: skip


def run(lab: Lab) -> Findings:
    """Tune, train all systems on all seeds, and check the claims."""
    if lab.scale == "smoke":
        systems = (AVG, MAIN)
        runs = Runs(lab, "groups", systems, dict.fromkeys(systems, 0.05))
        return Findings(_smoke_claims(runs), _table(runs, ""), _curves(runs, ""))
    groups, mixed = (
        Runs(lab, split, systems, {system: _rate(lab, split, system) for system in systems})
        for split, systems in SYSTEMS.items()
    )
    return Findings(
        _claims(groups, mixed),
        [*_table(groups, ""), *_table(mixed, MIXED_NAME)],
        [*_curves(groups, ""), *_curves(mixed, MIXED_NAME)],
    )


MIXED_NAME = "Dirichlet: "
"""What the names of systems begin with on the split without groups."""


def _rate(lab: Lab, split: str, system: str) -> float:
    cell = _cell(lab, split, system, 0, 0.0)
    return tuned(lab, compute, cell, lambda r: tail(r, LAST, "personal"), grid=GRID, seeds=PILOT_SEEDS)


def _smoke_claims(runs: Runs) -> list[Claim]:
    return [
        Claim(
            "smoke", "FedCAC's own models are better than FedAvg's in 5 rounds", "card, section 6", "measured",
            runs.lead(MAIN, AVG), ">=", 0.0, "card, section 6", "points",
        ),
        *_exact(runs),
    ]  # fmt: skip


def _exact(runs: Runs) -> list[Claim]:
    numel = sum((inputs + 1) * outputs for inputs, outputs in pairwise(WIDTHS))

    def bytes_over_formula(record: Record) -> float:
        each: float = (record["up"][-1] + record["down"][-1]) / (record["round"][-1] * record["clients"])
        return each / (4 * numel + (numel + 7) // 8 + 4 * numel)

    return [
        Claim(
            "mixing", "uncritical entries that differ from the global mean after mixing", "algorithm 1",
            "exact", runs.each(MAIN, lambda record: max(record["unmixed"])), "==", 0.0, "mixing rule", "",
        ),
        Claim(
            "bytes", "bytes of a client and round, over two models and a bit an entry", "section 3",
            "exact", runs.each(MAIN, bytes_over_formula), "==", 1.0, "4P + P/8 up, 4P down", "",
        ),
    ]  # fmt: skip


def _claims(groups: Runs, mixed: Runs) -> list[Claim]:
    def lead(
        ident: str, text: str, other: str, by: float | None = None, runs: Runs = groups, one: str = MAIN,
        reason: str | None = None,
    ) -> Claim:  # fmt: skip
        values = runs.lead(one, other)
        if by is None:
            return Claim(ident, text, "table 1", "measured", values, unit="points")
        return Claim(
            ident, text, "table 1", "measured", values, ">=", by, CARD, "points",
            reason=reason if fmean(values) < by else None,
        )  # fmt: skip

    return [
        lead("accuracy.fedper", "clients' models are more accurate than FedPer's", PER, 2.0),
        lead("accuracy.local", "and than local training", LOCAL, 4.0),
        lead("collaboration", "and than without partners: it is the collaboration, not the mask", ALONE, 3.0),
        Claim(
            "groups", f"partners from the own hidden group, the least share from round {FOUND} on (beta 25)",
            "section 3", "measured", groups.each(CAC(25), _precision), ">=", 0.95, CARD, "",
            reason="The groups are found some rounds later than on the pilots: in rounds 7 to 10 four of five "
            "seeds have 0.1 to 0.7 strangers among a client's 4 to 5 partners, and from round 11 on none has "
            "any.",
        ),
        Claim(
            "end", "partners of a client after round beta (15), the most", "section 3", "exact",
            groups.each(CAC(15), lambda record: max(record["partners"][15:])), "==", 0.0, "threshold rule", "",
        ),
        *_exact(groups),
        lead("fine-tuning", "over FedAvg + fine-tuning", TUNED),
        lead("fedrep", "over FedRep", REP),
        lead("oracle", "over FedAvg inside the true groups", ORACLE),
        Claim(
            "leak", "a pair of one group overlaps more in round 1 than a pair of two groups",
            "card, section 4", "measured", groups.each(MAIN, lambda record: 100 * record["told apart"][0]),
            unit="%",
        ),
        lead("dirichlet.fedper", "without groups: over FedPer (beta 15)", PER, None, mixed, CAC(15)),
        lead("dirichlet.alone", "without groups: over no partners (beta 15)", ALONE, None, mixed, CAC(15)),
        lead("dirichlet.beta", "without groups: beta 30 over beta 15", CAC(15), None, mixed, CAC(30)),
    ]  # fmt: skip


def _precision(record: Record) -> float:
    """The least share of partners from one's own group, over the rounds in which anybody has one."""
    pairs = zip(record["partners"][FOUND - 1 :], record["strangers"][FOUND - 1 :], strict=True)
    shares: list[float] = [1 - strangers / partners for partners, strangers in pairs if partners]
    return min(shares)


def _table(runs: Runs, prefix: str) -> list[Row]:
    rows = []
    for system in runs.systems:
        records = runs.records[system]
        rows += [
            Row(prefix + system, "accuracy after", "%", runs.scores(system)),
            Row(prefix + system, "accuracy before", "%", runs.scores(system, "before")),
            Row(prefix + system, "worst tenth", "%", runs.scores(system, "worst")),
            Row(prefix + system, "sent by all", "MB", [(r["up"][-1] + r["down"][-1]) / 1e6 for r in records]),
            Row(prefix + system, "gradients", "1000", [r["grad"][-1] / 1e3 for r in records]),
            Row(prefix + system, "learning rate", "", [runs.rates[system]]),
        ]
    return rows


def _curves(runs: Runs, prefix: str) -> list[Curve]:
    curves = []
    for system, records in runs.records.items():
        rounds = records[0]["round"]
        curves.append(Curve(prefix + system, ACCURACY, "round", rounds, [r["personal"] for r in records]))
        if system.startswith(CAC("")):
            curves += [
                Curve(prefix + system, name, "round", rounds, [r[key] for r in records])
                for name, key in ((PARTNERS, "partners"), (STRANGERS, "strangers"))
                if not prefix or key == "partners"
            ]
    return curves


ACCURACY, PARTNERS, STRANGERS = "accuracy, %", "partners of a client", "partners of other groups"


# The picture, from the result alone.

COLOURS = {
    MAIN: "#1b6ca8", CAC(25): "#5b9bd0", CAC(30): "#5b9bd0", CAC(15): "#a9cbe8", ALONE: "#8a6fb0",
    ORACLE: "#2a9d8f", PER: "#d95f02", REP: "#f4a259", TUNED: "#888888", AVG: "#444444", LOCAL: "#bbbbbb",
}  # fmt: skip


def draw(result: dict[str, Any], path: Path) -> None:
    """Accuracy with hidden groups, who collaborates there, and accuracy without groups."""
    from cograd.papers._plot import figure

    curves = {(c["system"], c["metric"]): c for c in result["curves"]}
    panels = 3 if (MIXED_NAME + LOCAL, ACCURACY) in curves else 2
    seeds = len(result["seeds"])
    with figure(path, panels, f"FedCAC on CIFAR-5k, {seeds} seed{'s' * (seeds > 1)}") as axes:
        for ax, prefix, title in zip(
            axes[::2], ("", MIXED_NAME), ("hidden groups", "Dirichlet 0.1"), strict=False
        ):
            for system, colour in COLOURS.items():
                if (curve := curves.get((prefix + system, ACCURACY))) is not None:
                    ax.plot(curve["x"], curve["mean"], color=colour, label=system)
            ax.set(xlabel="round", ylabel="accuracy of clients' own models, %", title=title)
            ax.legend(frameon=False, fontsize=7, loc="lower right", ncols=2)
        for beta in BETAS:
            for name, style in ((PARTNERS, "-"), (STRANGERS, ":")):
                if (curve := curves.get((CAC(beta), name))) is not None:
                    label = f"beta {beta}" + (", of other groups" if name == STRANGERS else "")
                    axes[1].plot(curve["x"], curve["mean"], style, color=COLOURS[CAC(beta)], label=label)
        axes[1].set(xlabel="round", ylabel="partners of a client", title="who collaborates")
        axes[1].legend(frameon=False, fontsize=7)


USAGE = """\
import torch
from cograd import data
from cograd.clients import FedCAC
from cograd.engines.federated import Clients, LocalSGD, Simulation, matching
train, test = data.load("mnist-5k"), data.load("mnist-5k", "test")
parts = data.dirichlet(train.y, parties=20, alpha=0.1, seed=0)
clients = Clients(train, parts, test, matching(test.y, train.y, parts, seed=0))
model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 10))
method = FedCAC(LocalSGD(lr=0.1, epochs=2, batch_size=20), tau=0.5, beta=6)
print(Simulation(method, model, torch.nn.functional.cross_entropy, clients, personal=True).run(3)[-1])
"""

PAPER = Paper(
    slug="fedcac",
    title="Bold but Cautious: Unlocking the Potential of Personalized Federated Learning through Cautiously "
    "Aggressive Collaboration",
    authors="Xinghao Wu, Xuefeng Liu, Jianwei Niu, Guogang Zhu, Shaojie Tang",
    arxiv="2309.11103",
    venue="ICCV 2023",
    room="clients",
    entry="cograd.clients.FedCAC",
    module=__name__,
    summary="clients share what is critical to them with look-alikes only, and the rest with everybody",
    usage=USAGE,
    datasets=("cifar-5k",),
    seeds=5,
    run=run,
    draw=draw,
)
