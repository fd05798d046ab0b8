"""FedLEx against FedAvg, and against the controls that tell guidance from a smaller step.

MNIST-5k, standardised, among 10 clients, of which 2 take part in a round; an MLP (784-100-10), 5 local epochs
in minibatches of 350, server momentum 0.9, learning rates falling by 1 % a round, 100 rounds. Explorers are all
clients, for 50 epochs. Accuracy is that of the global model, averaged over the last 20 rounds: with two classes
a client single rounds jump by ten points.

- *two classes a client* (two shards each) and *Dirichlet 0.2*: every system has its own best learning rate of
  one grid, found on a pilot seed. The form on updates is slowed by G only after local training: it has FedAvg's
  rate there, and its own best server learning rate, and so has a FedAvg beside it.
- *a large step*: learning rate 1 for all.
- *Adam*: clients train as the authors' do, at one rate for all, which is slower: 150 rounds.

The controls are FedAvg with its rate times mean(G), FedLEx with G permuted, FedAvg for as many rounds more as
the exploration costs gradients, and a warm start: what the released code does in the place of exploration, at
the same cost. All systems of a seed see the same participants, minibatches and initial weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch

from cograd import data
from cograd.clients.baselines.fedavg import FedAvg
from cograd.clients.baselines.mean_guided import MeanGuided
from cograd.clients.baselines.permuted_guidance import PermutedGuidance
from cograd.clients.baselines.warm_start import WarmStart
from cograd.clients.fedlex import FedLEx, LocalAdam
from cograd.core.claim import Claim, Curve, Row
from cograd.core.streams import seed_for
from cograd.data.clients import Clients
from cograd.engines.federated.protocol import Method
from cograd.engines.federated.samplers import Uniform
from cograd.engines.federated.simulation import Simulation
from cograd.engines.federated.training import LocalSGD
from cograd.models.mlp import MLP
from cograd.papers._federation import tail, train, tuned
from cograd.papers._paper import Findings, Paper

if TYPE_CHECKING:
    from cograd.papers._lab import Cell, Lab, Record, Report

CLIENTS, PARTICIPANTS, EPOCHS, BATCH, DECAY, MOMENTUM = 10, 2, 5, 350, 0.99, 0.9
EXPLORATION, EXPLORER_RATE, ALPHA, WIDTHS = 50, 0.1, 0.2, (784, 100, 10)
ROUNDS, ADAM_ROUNDS, LAST, SMOKE_ROUNDS, SMOKE_EXPLORATION = 100, 150, 20, 8, 5
GRID, SCALES, PILOT_SEEDS = (0.1, 0.3, 1.0), (1.0, 4.0, 16.0), (100,)
LARGE, ADAM_RATE = 1.0, 1e-3
CARD = "pilots of the card, other seeds"

AVG, LEX, PER_CLIENT, PICTURE = "FedAvg", "FedLEx", "FedLEx, maps per client", "FedLEx, on updates"
GLOBAL, REFRESHED = "FedLEx, one scale for all tensors", "FedLEx, refreshed"
SCALED, PERMUTED = "FedAvg, lr x mean(G)", "FedLEx, G permuted"
SERVER = "FedAvg, server rate tuned"
LONGER, WARM = "FedAvg, more rounds", "FedAvg, warm start"
MAP = "exploration"

SHARDS, DIRICHLET, BIG, ADAM = "two classes", "dirichlet", "lr 1", "Adam"
SYSTEMS = {
    SHARDS: (
        AVG,
        SERVER,
        LEX,
        PER_CLIENT,
        PICTURE,
        GLOBAL,
        REFRESHED,
        SCALED,
        PERMUTED,
        LONGER,
        WARM,
    ),
    DIRICHLET: (AVG, LEX, SCALED, PERMUTED),
    BIG: (AVG, LEX, SCALED, PERMUTED),
    ADAM: (AVG, LEX, PER_CLIENT, PICTURE, WARM),
}
"""What runs in which setting."""
AT_SERVER = (SERVER, PICTURE)
"""Systems that have FedAvg's learning rate and whose server rate is tuned."""
PREFIX = {SHARDS: "", DIRICHLET: "Dirichlet: ", BIG: "lr 1: ", ADAM: "Adam: "}
"""What the names of systems begin with in tables and curves."""


def method(cell: Cell) -> Method:
    """A system of the comparison. G is made as the released code makes it, unless a name says otherwise."""
    adam = cell["setting"] == ADAM
    local: LocalSGD = LocalSGD(cell["lr"], EPOCHS, BATCH, decay=DECAY)
    explorer = LocalSGD(EXPLORER_RATE, cell["exploration"], BATCH)
    if adam:
        local = LocalAdam(cell["lr"], EPOCHS, BATCH, decay=DECAY)
        explorer = LocalAdam(ADAM_RATE, cell["exploration"], BATCH)
    base = FedAvg(local, cell["scale"], MOMENTUM)
    rules: dict[str, Any] = {"normalize": "after_mean", "adaptive": "allow" if adam else "refuse"}
    made: dict[str, Callable[[], Method]] = {
        AVG: lambda: base,
        SERVER: lambda: base,
        LONGER: lambda: base,
        WARM: lambda: WarmStart(local, cell["scale"], MOMENTUM, warm=explorer),
        LEX: lambda: FedLEx(base, explorer, **rules),
        PER_CLIENT: lambda: FedLEx(base, explorer, **{**rules, "normalize": "per_client"}),
        PICTURE: lambda: FedLEx(base, explorer, normalize="per_client", apply_to="update"),
        GLOBAL: lambda: FedLEx(base, explorer, scope="global", **rules),
        REFRESHED: lambda: FedLEx(base, explorer, refresh=True, **rules),
        SCALED: lambda: MeanGuided(base, explorer, **rules),
        PERMUTED: lambda: PermutedGuidance(base, explorer, **rules),
    }
    return made[cell["system"]]()


@lru_cache(4)
def _federation(split: str, seed: int) -> tuple[Clients, data.Images]:
    whole, test = data.load("mnist-5k", "train"), data.load("mnist-5k", "test")
    assert isinstance(whole, data.Images)
    assert isinstance(test, data.Images)
    moments = whole.moments()
    whole, test = whole.normalised(*moments), test.normalised(*moments)
    if split == DIRICHLET:
        return Clients(whole, data.dirichlet(whole.y, CLIENTS, ALPHA, seed)), test
    return Clients(whole, data.shards(whole.y, CLIENTS, 2, seed)), test


def compute(cell: Cell, report: Report) -> Record:
    """One system on one seed."""
    clients, test = _federation(cell["setting"], cell["seed"])
    if cell["system"] == MAP:
        return survey(cell, clients)
    return train(
        method(cell), lambda: MLP(*WIDTHS), clients, seed=cell["seed"], rounds=cell["rounds"], report=report,
        sampler=Uniform(count=PARTICIPANTS), test=test,
    )  # fmt: skip


STILL = 1e-30
"""A learning rate at which no weight moves."""


def survey(cell: Cell, clients: Clients) -> Record:
    """What an exploration finds, and what it costs: one round of FedLEx in which nobody moves."""
    still = FedAvg(LocalSGD(STILL, EPOCHS, BATCH))
    explorer = LocalSGD(EXPLORER_RATE, cell["exploration"], BATCH)
    one = FedLEx(still, explorer, normalize="after_mean", refresh=True)
    torch.manual_seed(seed_for(cell["seed"], "init"))
    with Simulation(one, MLP(*WIDTHS), torch.nn.functional.cross_entropy, clients, seed=cell["seed"]) as sim:
        (row,) = sim.run(1)
        guidance, maps = sim.server["guidance"], sim.server["maps"]
        return {
            "low": float(guidance.min()),
            "high": float(guidance.max()),
            "mean": float(guidance.mean()),
            "median": float(guidance.median()),
            "frozen": 100 * float((guidance == 0).double().mean()),
            "moved": float((sim.server["x"] - sim.session.initial).abs().max()),
            "up": row.up,
            "down": row.down,
            "guessed": _guessed(sim, maps, clients),
        }


def _guessed(sim: Simulation, maps: torch.Tensor, clients: Clients) -> float:
    """How many of a client's classes are those whose output weights travelled farthest, in percent."""
    right = []
    for client, row in zip(clients, maps, strict=True):
        last = sim.session.space.views(row)[sim.session.space.segments[-2].name]
        held = set(client.y.tolist())
        right.append(len(held & set(last.sum(1).topk(len(held)).indices.tolist())) / len(held))
    return 100 * fmean(right)


# The run


@dataclass
class Runs:
    """The records of one setting by system, and the rates at which they ran."""

    setting: str
    records: dict[str, list[Record]]
    rates: dict[str, tuple[float, float]]

    def scores(self, system: str) -> list[float]:
        return [tail(record, LAST) for record in self.records[system]]

    def lead(self, one: str, other: str) -> list[float]:
        """Paired differences in accuracy."""
        return [a - b for a, b in zip(self.scores(one), self.scores(other), strict=True)]

    def best(self, systems: Sequence[str]) -> str:
        """The system with the best mean accuracy."""
        return max(systems, key=lambda system: fmean(self.scores(system)))


def _cell(lab: Lab, setting: str, system: str, seed: int, lr: float, scale: float = 1.0) -> dict[str, Any]:
    rounds, exploration = ADAM_ROUNDS if setting == ADAM else ROUNDS, EXPLORATION
    if lab.scale == "smoke":
        rounds, exploration = SMOKE_ROUNDS, SMOKE_EXPLORATION
    if system == LONGER:
        rounds += _rounds_of_exploration(exploration)
    return {
        "system": system, "setting": setting, "seed": seed, "lr": lr, "scale": scale, "rounds": rounds,
        "exploration": exploration,
    }  # fmt: skip


def _rounds_of_exploration(exploration: int) -> int:
    """Rounds that cost as many epochs of a client as the exploration does."""
    return CLIENTS * exploration // (PARTICIPANTS * EPOCHS)


def run(lab: Lab) -> Findings:
    """Tune, train all systems on all seeds, and check the claims."""
    maps = lab.map([_cell(lab, SHARDS, MAP, seed, EXPLORER_RATE) for seed in lab.seeds], compute)
    if lab.scale == "smoke":
        runs = _trained(lab, SHARDS, (AVG, LEX), dict.fromkeys((AVG, LEX), (LARGE, 1.0)))
        return Findings(_smoke_claims(runs, maps), _table([runs], maps), _curves([runs]))
    settings = {setting: _setting(lab, setting) for setting in SYSTEMS}
    return Findings(
        _claims(settings, maps), _table(list(settings.values()), maps), _curves(list(settings.values()))
    )


def _trained(lab: Lab, setting: str, systems: Sequence[str], rates: Mapping[str, tuple[float, float]]) -> Runs:
    records = {
        system: lab.map([_cell(lab, setting, system, seed, *rates[system]) for seed in lab.seeds], compute)
        for system in systems
    }
    return Runs(setting, records, dict(rates))


def _setting(lab: Lab, setting: str) -> Runs:
    """The systems of a setting at their rates (of clients, of the server)."""
    systems = SYSTEMS[setting]
    fixed = {BIG: LARGE, ADAM: ADAM_RATE}.get(setting)
    rates: dict[str, tuple[float, float]] = {}
    for system in systems:
        if system == LONGER:
            rates[system] = rates[AVG]
        elif system in AT_SERVER:
            lr = rates[AVG][0]
            rates[system] = lr, _tuned(lab, _cell(lab, setting, system, 0, lr), "scale", SCALES)
        elif fixed is not None:
            rates[system] = fixed, 1.0
        else:
            rates[system] = _tuned(lab, _cell(lab, setting, system, 0, 0.0), "lr", GRID), 1.0
    return _trained(lab, setting, systems, rates)


def _tuned(lab: Lab, cell: Cell, name: str, grid: Sequence[float]) -> float:
    return tuned(lab, compute, cell, lambda r: tail(r, LAST), grid=grid, seeds=PILOT_SEEDS, name=name)


# Claims


def _no_gain(runs: Runs, one: str, other: str) -> str:
    """Why one is not ahead of the other, in the figures of the controls."""
    figures = ", ".join(
        f"{system} {fmean(runs.scores(system)):.1f} %" for system in (other, one, SCALED, PERMUTED)
    )
    return (
        f"What G does is to shorten steps, and tuning the learning rate does that as well. All at their best "
        f"rates: {figures}."
    )


def _exact(maps: Sequence[Record]) -> list[Claim]:
    numel = sum((inputs + 1) * outputs for inputs, outputs in pairwise(WIDTHS))
    tensors = 2 * (len(WIDTHS) - 1)

    def exact(ident: str, text: str, values: list[float], op: Any, threshold: float, rule: str) -> Claim:
        return Claim(ident, text, "card, section 2", "exact", values, op, threshold, rule, "")

    each = 4 * numel * CLIENTS
    return [
        exact("range.low", "the least entry of G", [m["low"] for m in maps], "==", 0.0, "min-max rule"),
        exact("range.high", "the largest entry of G", [m["high"] for m in maps], "==", 1.0, "min-max rule"),
        exact("frozen", "entries of G that are 0, over one a tensor",
              [m["frozen"] / 100 * numel / tensors for m in maps], ">=", 1.0, "min-max rule"),
        exact("alias", "how far exploring moves the server's model", [m["moved"] for m in maps], "==", 0.0,
              "explorers train copies"),
        exact("bytes.up", "bytes up of exploration and one round of all, over two models a client",
              [m["up"] / (2 * each) for m in maps], "==", 1.0, "4P a map, 4P a change"),
        exact("bytes.down", "bytes down, over three models a client",
              [m["down"] / (3 * each) for m in maps], "==", 1.0, "4P to explore, 4P + 4P for the round and G"),
    ]  # fmt: skip


def _smoke_claims(runs: Runs, maps: Sequence[Record]) -> list[Claim]:
    return [
        Claim(
            "smoke", "FedLEx is ahead of FedAvg at a learning rate that is too large, after 8 rounds",
            "card, section 6", "measured", runs.lead(LEX, AVG), ">=", 5.0, "pilots, other seeds", "points",
        ),
        *_exact(maps),
    ]  # fmt: skip


def _claims(settings: Mapping[str, Runs], maps: Sequence[Record]) -> list[Claim]:
    shards, mixed, big, adam = (settings[name] for name in SYSTEMS)

    def lead(
        ident: str, text: str, runs: Runs, one: str, other: str, by: float | None = None,
        source: str = "abstract", threshold: str = CARD, reason: str | None = None,
    ) -> Claim:  # fmt: skip
        values = runs.lead(one, other)
        if by is None:
            return Claim(ident, text, source, "measured", values, unit="points")
        return Claim(
            ident, text, source, "measured", values, ">=", by, threshold, "points",
            reason=reason if fmean(values) < by else None,
        )  # fmt: skip

    forms = (LEX, PER_CLIENT, PICTURE, REFRESHED)
    best, rival = shards.best(forms), shards.best((AVG, SERVER, SCALED, PERMUTED))
    ours = "the paper's sentence: more accurate"
    return [
        lead("gain.gradient", "tuned, FedLEx on gradients is more accurate than FedAvg", shards, LEX, AVG, 0.0,
             threshold=ours, reason=_no_gain(shards, LEX, AVG)),
        lead("gain.update", "and FedLEx on updates than FedAvg with a tuned server rate", shards, PICTURE,
             SERVER, 0.0, threshold=ours, reason=_no_gain(shards, PICTURE, SERVER)),
        lead("gain.dirichlet", "and with Dirichlet 0.2 FedLEx on gradients than FedAvg", mixed, LEX, AVG, 0.0,
             threshold=ours, reason=_no_gain(mixed, LEX, AVG)),
        lead("control.all", f"the best form ({best}) over the best of FedAvg and the controls ({rival})",
             shards, best, rival),
        lead("control.scaled", "FedLEx over FedAvg with lr x mean(G), both tuned", shards, LEX, SCALED),
        lead("control.permuted", "FedLEx over FedLEx with G permuted, both tuned", shards, LEX, PERMUTED),
        lead("control.longer", "FedLEx over FedAvg with the exploration's gradients spent on rounds",
             shards, LEX, LONGER),
        lead("control.warm", "FedLEx over a warm start by as much training", shards, LEX, WARM),
        lead("large", "at a learning rate of 1 FedLEx is far more accurate than FedAvg", big, LEX, AVG, 30.0,
             "card, section 6"),
        lead("large.scaled", "and so is FedAvg with lr x mean(G): it is the smaller step", big, SCALED, AVG,
             30.0, "card, section 6"),
        lead("large.lead", "there, FedLEx over FedAvg with lr x mean(G)", big, LEX, SCALED),
        lead("large.permuted", "there, FedLEx over FedLEx with G permuted", big, LEX, PERMUTED),
        Claim(
            "adam.cancels", "with Adam on gradients, how far two different G are apart", "card, section 4",
            "measured", [abs(a) for a in adam.lead(LEX, PER_CLIENT)], "<=", 1.0, CARD, "points",
        ),
        lead("adam.gain", "with Adam on gradients, FedLEx over FedAvg", adam, LEX, AVG),
        lead("adam.warm", "with Adam, the released code's warm start is more accurate than FedAvg",
             adam, WARM, AVG, 2.0, "card, section 4"),
        lead("adam.warm.lead", "and than FedLEx as described", adam, WARM, LEX, 0.0, "card, section 4"),
        *_exact(maps),
        Claim("leak", "classes of a client that its map gives away", "card, section 4", "measured",
              [m["guessed"] for m in maps], unit="%"),
    ]  # fmt: skip


def _table(settings: Sequence[Runs], maps: Sequence[Record]) -> list[Row]:
    rows = []
    for runs in settings:
        for system, records in runs.records.items():
            name = PREFIX[runs.setting] + system
            rows += [
                Row(name, "accuracy", "%", runs.scores(system)),
                Row(name, "sent by all", "MB", [(r["up"][-1] + r["down"][-1]) / 1e6 for r in records]),
                Row(name, "gradients", "1000", [r["grad"][-1] / 1e3 for r in records]),
                Row(name, "learning rate", "", [runs.rates[system][0]]),
                *([Row(name, "server rate", "", [runs.rates[system][1]])] if system in AT_SERVER else []),
            ]
    return [
        *rows,
        Row(MAP, "mean of G", "", [m["mean"] for m in maps]),
        Row(MAP, "median of G", "", [m["median"] for m in maps]),
        Row(MAP, "frozen", "%", [m["frozen"] for m in maps]),
    ]


def _curves(settings: Sequence[Runs]) -> list[Curve]:
    return [
        Curve(
            PREFIX[runs.setting] + system, "accuracy, %", "round", records[0]["round"],
            [record["accuracy"] for record in records],
        )
        for runs in settings
        for system, records in runs.records.items()
    ]  # fmt: skip


# The picture, from the result alone.

COLOURS = {
    AVG: "#bbbbbb", LEX: "#1b6ca8", PICTURE: "#8fbfe0", SCALED: "#d95f02", PERMUTED: "#8a6fb0", WARM: "#2a9d8f",
}  # fmt: skip
TITLES = {SHARDS: "two classes a client", BIG: "a large step: lr 1", ADAM: "local training by Adam"}


def draw(result: dict[str, Any], path: Path) -> None:
    """Accuracy along the rounds: tuned, at a large step, and with Adam."""
    from cograd.papers._plot import figure

    curves = {c["system"]: c for c in result["curves"]}
    panels = [setting for setting in TITLES if PREFIX[setting] + AVG in curves]
    seeds = len(result["seeds"])
    with figure(path, len(panels), f"FedLEx on MNIST-5k, {seeds} seed{'s' * (seeds > 1)}") as axes:
        for ax, setting in zip(axes, panels, strict=True):
            for system, colour in COLOURS.items():
                if (curve := curves.get(PREFIX[setting] + system)) is not None:
                    width = 4 if system == AVG else 1.5  # with Adam, FedLEx lies on it
                    ax.plot(curve["x"], _smooth(curve["mean"]), color=colour, linewidth=width, label=system)
            ax.set(xlabel="round", ylabel="test accuracy, %", title=TITLES[setting], ylim=(0, 100))
            ax.legend(frameon=False, fontsize=7, loc="lower right")


def _smooth(values: Sequence[float], span: int = 5) -> list[float]:
    """Running means: single rounds jump with who takes part in them."""
    return [fmean(values[max(0, i - span + 1) : i + 1]) for i in range(len(values))]


USAGE = """\
import torch
from cograd import data
from cograd.clients import FedLEx
from cograd.clients.baselines import FedAvg
from cograd.engines.federated import Clients, LocalSGD, Simulation, Uniform
train = data.load("mnist-5k")
clients = Clients(train, data.shards(train.y, parties=10, shards_per_party=2, seed=0))
model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 10))
method = FedLEx(FedAvg(LocalSGD(lr=1.0, epochs=5)), explorer=LocalSGD(lr=0.1, epochs=10), patience=3)
print(Simulation(method, model, torch.nn.CrossEntropyLoss(), clients, sampler=Uniform(0.2)).run(3)[-1])
"""

PAPER = Paper(
    slug="fedlex",
    title="Federated Loss Exploration for Improved Convergence on Non-IID Data",
    authors="Christian Interno, Markus Olhofer, Yaochu Jin, Barbara Hammer",
    arxiv="2506.18640",
    venue="IJCNN 2024",
    room="clients",
    entry="cograd.clients.FedLEx",
    module=__name__,
    summary="a few clients explore first, and how far each weight travelled guides everybody's steps",
    usage=USAGE,
    datasets=("mnist-5k",),
    seeds=3,
    run=run,
    draw=draw,
)
