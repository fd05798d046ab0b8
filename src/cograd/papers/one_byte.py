"""Just One Byte: a byte, a float32 number or a whole gradient an estimate, and what fine-tuning takes.

*Digits*: softmax regression from scratch on 8 x 8 digits (650 parameters, four machines, eight estimates each a
round) by seven ways of writing what a machine measured. *Text*: SmolLM2-135M is fine-tuned by two real
processes to tell news from fiction, by one byte an estimate and by Adam. *Machines*: the same number of
estimates from one, two, four and eight machines.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import inf, isfinite
from pathlib import Path
from statistics import mean, median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cograd import data
from cograd.core.claim import Claim, Curve, Row
from cograd.core.codecs import Float32
from cograd.core.streams import seed_for, stream
from cograd.data.loading import digest
from cograd.machines.baselines.full_gradient import Backprop, FullZeroth
from cograd.machines.one_byte.codes import LinearByte, LogNibble
from cograd.machines.one_byte.optimizer import LocalPeers, OneByte
from cograd.models import smollm2
from cograd.papers import _one_byte_text as text
from cograd.papers._paper import Findings, Paper

if TYPE_CHECKING:
    from cograd.papers._lab import Cell, Lab, Record, Report

MACHINES, SAMPLES, BATCH, ROUNDS, EVERY = 4, 8, 64, 400, 20
LR, SGD_LR = 0.1, 0.5
GRID = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)
"""Wide enough that neither system is best at an end: the training digits are separable, so that SGD's training
loss falls with ever larger steps up to about 50."""
PILOT_SEEDS = (100, 101)

BYTE, FLOAT, DENSE, SGD = "one byte", "float32 scalars", "zeroth-order gradient", "SGD"
NIBBLE, LINEAR, KNOWN = "four bits, log", "linear byte, same range", "linear byte, range +-8"
DIGITS: dict[str, Callable[..., OneByte]] = {
    BYTE: OneByte,
    FLOAT: lambda *a, **k: OneByte(*a, codec=Float32(), **k),
    DENSE: FullZeroth,
    NIBBLE: lambda *a, **k: OneByte(*a, codec=LogNibble(), **k),
    LINEAR: lambda *a, **k: OneByte(*a, codec=LinearByte(), **k),
    KNOWN: lambda *a, **k: OneByte(*a, codec=LinearByte(8.0), **k),
    SGD: Backprop,
}

COUNTS = (1, 2, 4, 8)
TEXT_ROUNDS, TEXT_PILOT = 60, 100
TEXT_GRIDS = {"last block": (3e-4, 1e-3, 3e-3, 1e-2), "LoRA": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)}
"""Learning rates that the pilot seed chooses from, the same for both methods."""
TEXT_SYSTEMS = [(method, mode) for method in ("one byte", "Adam") for mode in TEXT_GRIDS]


# The digits: cells in this process.


def train(cell: Cell, report: Report) -> Record:
    """One run on the digits; the losses are of the whole training set."""
    system, seed, machines, rounds = cell["system"], cell["seed"], cell["machines"], cell["rounds"]
    sgd = system == SGD
    train_set, test_set = data.load("digits", "train"), data.load("digits", "test")
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    torch.manual_seed(seed_for(seed, "init"))
    model[1].reset_parameters()  # type: ignore[operator]
    zo = DIGITS[system](model, cell["lr"], samples=1 if sgd else SAMPLES, seed=seed)
    peers = LocalPeers(zo, machines)
    history = [_evaluate(model, train_set)[0]]
    for t in range(rounds):
        peers.step(
            lambda rows: F.cross_entropy(model(train_set.x[rows]), train_set.y[rows]),
            [_rows(seed, t, m, zo.samples, len(train_set.y)) for m in range(machines)],
        )
        if (t + 1) % EVERY == 0:
            history.append(_evaluate(model, train_set)[0])
            report(f"round {t + 1}/{rounds}, loss {history[-1]:.3f}")
    return {
        "history": history,
        "loss": history[-1],
        "accuracy": _evaluate(model, test_set)[1],
        "payload": zo.ledger.sent(0),
        "frames": zo.ledger.sent(0, "frame"),
    }


def _rows(seed: int, round: int, machine: int, samples: int, n: int) -> list[Tensor]:
    """A minibatch a sample, the same for every way of writing what it tells."""
    draws = stream(seed, "batch", round, machine)
    return [draws.choice(n, BATCH) for _ in range(samples)]


@torch.no_grad()
def _evaluate(model: nn.Module, part: data.Images) -> tuple[float, float]:
    """Mean cross-entropy, and accuracy in percent."""
    scores = model(part.x)
    return float(F.cross_entropy(scores, part.y)), 100 * float((scores.argmax(1) == part.y).float().mean())


def apply_seconds(cell: Cell, report: Report) -> Record:
    """Median time of applying a round of M machines' bytes to 100,000 parameters."""
    model = nn.Linear(1000, 100, bias=False)
    zo = OneByte(model, 1e-6, samples=SAMPLES, seed=cell["seed"])
    members = range(cell["machines"])
    payloads = [bytes([64 + m] * SAMPLES) for m in members]
    took = []
    for _ in range(7):
        began = time.perf_counter()
        zo.apply(members, payloads)
        took.append(time.perf_counter() - began)
    return {"apply": median(took)}


# What runs: the cells of a scale.


def chosen(grid: Sequence[float], losses: Callable[[float], Sequence[float]]) -> float:
    """The learning rate of the lowest mean loss on pilot seeds; never one at which the loss is not finite."""
    means = {lr: mean(losses(lr)) for lr in grid}
    return min(grid, key=lambda lr: means[lr] if isfinite(means[lr]) else inf)


def cell(system: str, seed: int, lr: float, rounds: int = ROUNDS, machines: int = MACHINES) -> dict[str, Any]:
    return {"system": system, "seed": seed, "lr": lr, "rounds": rounds, "machines": machines}


def run(lab: Lab) -> Findings:
    """``full``: all of it. ``demo``: the digits, all systems. ``smoke``: three systems for 60 rounds."""
    smoke = lab.scale == "smoke"
    systems = (BYTE, FLOAT, LINEAR) if smoke else tuple(DIGITS)
    rounds = 60 if smoke else ROUNDS
    runs = Digits(lab, systems, rounds)
    claims, table, curves = runs.claims(), runs.table(), runs.curves()
    if lab.scale == "full":
        for part in (Tuned(lab, runs), Scaling(lab), Text(lab)):
            claims += part.claims()
            table += part.table()
            curves += part.curves()
        claims += _quoted()
    return Findings(claims, table, curves)


SOURCE = "arXiv:2306.10015"
CARD = "set before the recorded run, from three calibration runs on other seeds"
BEFOREHAND = "set before the recorded run, from pilot runs on two other seeds"


class Digits:
    """The systems on the digits, at the same learning rate and from the same minibatches."""

    def __init__(self, lab: Lab, systems: Sequence[str], rounds: int) -> None:
        self.systems, self.rounds = systems, rounds
        cells = [cell(s, seed, _rate(s), rounds) for seed in lab.seeds for s in systems]
        found = zip(cells, lab.map(cells, train), strict=True)
        self.records: dict[str, list[Record]] = {s: [] for s in systems}
        for c, record in found:
            self.records[c["system"]].append(record)

    def of(self, system: str, metric: str) -> list[float]:
        return [float(r[metric]) for r in self.records[system]]

    def claims(self) -> list[Claim]:
        loss, accuracy = ({s: self.of(s, metric) for s in self.systems} for metric in ("loss", "accuracy"))
        claims = [
            Claim(
                id="digits.loss",
                text="Digits: training loss with a byte an estimate is within 1 % of that with float32",
                source=SOURCE,
                kind="measured",
                values=[100 * abs(a - b) / b for a, b in zip(loss[BYTE], loss[FLOAT], strict=True)],
                op="<=",
                threshold=1.0,
                threshold_source=CARD,
                unit="%",
            ),
        ]
        if self.rounds == ROUNDS:
            claims += self._at_full_length(loss, accuracy)
        return claims

    def _at_full_length(
        self, loss: Mapping[str, list[float]], accuracy: Mapping[str, list[float]]
    ) -> list[Claim]:
        def ratio(system: str) -> list[float]:
            return [a / b for a, b in zip(loss[system], loss[BYTE], strict=True)]

        return [
            Claim(
                id="digits.accuracy",
                text="Digits: test accuracy with a byte is within half a point of that with float32",
                source=SOURCE,
                kind="measured",
                values=[abs(a - b) for a, b in zip(accuracy[BYTE], accuracy[FLOAT], strict=True)],
                op="<=",
                threshold=0.5,
                threshold_source=CARD,
                unit="points",
            ),
            Claim(
                id="digits.learns",
                text="Digits: with a byte an estimate the test accuracy is at least 90 %",
                source=SOURCE,
                kind="measured",
                values=accuracy[BYTE],
                op=">=",
                threshold=90.0,
                threshold_source=CARD,
                unit="%",
            ),
            Claim(
                id="digits.traffic",
                text="Digits: a machine sends 4 d / S = 325 times less than with the gradient in full",
                source=f"{SOURCE}, abstract",
                kind="measured",
                values=[
                    a / b for a, b in zip(self.of(DENSE, "payload"), self.of(BYTE, "payload"), strict=True)
                ],
                op="==",
                threshold=4 * 650 / SAMPLES,
                threshold_source="arithmetic: S bytes instead of 4 d",
                unit="x",
            ),
            Claim(
                id="digits.control",
                text="Digits: a linear byte of the log byte's range ends at twice the loss or more (of a range "
                "known beforehand it does not lose: digits.known-range)",
                source="control: without it the log scale would not be tested",
                kind="measured",
                values=ratio(LINEAR),
                op=">=",
                threshold=2.0,
                threshold_source=BEFOREHAND,
                unit="x",
            ),
            Claim(
                id="digits.four-bits",
                text="Digits: loss with four bits on a log scale over that with a byte",
                source="control",
                kind="measured",
                values=ratio(NIBBLE),
                unit="x",
            ),
            Claim(
                id="digits.known-range",
                text="Digits: loss with a linear byte of a range known beforehand over that with the log byte",
                source="control",
                kind="measured",
                values=ratio(KNOWN),
                unit="x",
            ),
            Claim(
                id="digits.backprop",
                text="Digits: loss with a byte an estimate over that of SGD with backprop, as many rounds",
                source="what zeroth order costs from scratch",
                kind="measured",
                values=[1 / r for r in ratio(SGD)],
                unit="x",
            ),
        ]

    def table(self) -> list[Row]:
        rows = []
        for s in self.systems:
            sent = {k: [x / self.rounds for x in self.of(s, k)] for k in ("payload", "frames")}
            rows += [
                Row(s, "train loss", "nats", self.of(s, "loss")),
                Row(s, "accuracy", "%", self.of(s, "accuracy")),
                Row(s, "payload a machine and round", "B", sent["payload"]),
                Row(s, "with frame", "B", sent["frames"]),
            ]
        return rows

    def curves(self) -> list[Curve]:
        rounds = list(range(0, self.rounds + 1, EVERY))
        return [
            Curve(s, "digits: training loss", "round", rounds, [r["history"] for r in self.records[s]])
            for s in self.systems
        ]


def _rate(system: str) -> float:
    return SGD_LR if system == SGD else LR


class Tuned:
    """A byte and SGD, each at the learning rate of the same grid that was best on pilot seeds."""

    def __init__(self, lab: Lab, digits: Digits) -> None:
        pilots = [cell(s, seed, lr) for s in (BYTE, SGD) for lr in GRID for seed in PILOT_SEEDS]
        records = lab.map(pilots, train)

        def losses(system: str, lr: float) -> list[float]:
            found = zip(pilots, records, strict=True)
            return [float(r["loss"]) for c, r in found if (c["system"], c["lr"]) == (system, lr)]

        self.rates = {s: chosen(GRID, partial(losses, s)) for s in (BYTE, SGD)}
        cells = [cell(s, seed, lr) for s, lr in self.rates.items() for seed in lab.seeds]
        tuned = lab.map(cells, train)
        self.records = {
            s: [r for c, r in zip(cells, tuned, strict=True) if c["system"] == s] for s in self.rates
        }

    def claims(self) -> list[Claim]:
        loss = {s: [float(r["loss"]) for r in self.records[s]] for s in self.rates}
        rates = ", ".join(f"{s} {lr:g}" for s, lr in self.rates.items())
        return [
            Claim(
                id="digits.backprop-tuned",
                text="The same, each at its own best learning rate",
                source=f"learning rates of {GRID} chosen on seeds {PILOT_SEEDS}: {rates}",
                kind="measured",
                values=[a / b for a, b in zip(loss[BYTE], loss[SGD], strict=True)],
                unit="x",
            )
        ]

    def table(self) -> list[Row]:
        rows = []
        for s, lr in self.rates.items():
            rows += [
                Row(s, "best lr", "", [lr]),
                Row(s, "train loss at best lr", "nats", [float(r["loss"]) for r in self.records[s]]),
            ]
        return rows

    def curves(self) -> list[Curve]:
        return []


class Scaling:
    """As many estimates from M machines, each of the same weight (lr grows as M), and what M costs."""

    def __init__(self, lab: Lab) -> None:
        total = ROUNDS * MACHINES
        cells = [cell(BYTE, seed, LR * m / MACHINES, total // m, m) for m in COUNTS for seed in lab.seeds]
        found = lab.map(cells, train)
        self.loss = {
            m: [float(r["loss"]) for c, r in zip(cells, found, strict=True) if c["machines"] == m]
            for m in COUNTS
        }
        timing = [{"system": "apply a round", "seed": s, "machines": m} for m in COUNTS for s in lab.seeds]
        took = lab.map(timing, apply_seconds)
        self.seconds = {
            m: [float(r["apply"]) for c, r in zip(timing, took, strict=True) if c["machines"] == m]
            for m in COUNTS
        }

    def claims(self) -> list[Claim]:
        per_seed = zip(*(self.loss[m] for m in COUNTS), strict=True)
        means = ", ".join(f"{mean(self.loss[m]):.4f}" for m in COUNTS)
        spread = max(100 * (max(losses) / min(losses) - 1) for losses in self.loss.values())
        growth = zip(self.seconds[COUNTS[-1]], self.seconds[1], strict=True)
        return [
            Claim(
                id="machines.loss",
                text="As many estimates from 1, 2, 4 or 8 machines: final losses are within 1 % of each other",
                source=SOURCE,
                kind="measured",
                values=[100 * (max(losses) / min(losses) - 1) for losses in per_seed],
                op="<=",
                threshold=1.0,
                threshold_source=CARD,
                unit="%",
                reason="each number of machines draws its own directions, and draws alone move this loss by as "
                f"much: at one number of machines the seeds lie up to {spread:.1f} % apart. The means over the "
                f"seeds are {means} for {', '.join(map(str, COUNTS))} machines",
            ),
            Claim(
                id="machines.apply",
                text="Applying a round of 8 machines takes as many times longer than a round of one",
                source="every machine draws every other's directions: M S d numbers a round",
                kind="measured",
                values=[many / one for many, one in growth],
                unit="x",
            ),
        ]

    def table(self) -> list[Row]:
        rows = []
        for m in COUNTS:
            name = f"one byte, {m} machine{'s' * (m > 1)}"
            rows += [
                Row(name, "train loss, as many estimates", "nats", self.loss[m]),
                Row(name, "apply a round to 100,000 parameters", "ms", [1000 * s for s in self.seconds[m]]),
            ]
        return rows

    def curves(self) -> list[Curve]:
        runs = [[1000 * self.seconds[m][i] for m in COUNTS] for i in range(len(self.seconds[1]))]
        return [Curve(BYTE, "apply a round, ms", "machines", list(COUNTS), runs)]


class Text:
    """SmolLM2-135M on two worker processes, at the learning rates that were best on the pilot seed."""

    def __init__(self, lab: Lab) -> None:
        self.warm = False
        self.lab, self.source = lab, {"brown": digest("brown")[:16], "model": smollm2.digest()}
        self.rates = self._pilot()
        cells = [self._cell(*key, seed, lr) for seed in lab.seeds for key, lr in self.rates.items()]
        self.records: dict[tuple[str, str], list[Record]] = {key: [] for key in self.rates}
        for c, record in zip(cells, lab.map(cells, self._train), strict=True):
            self.records[c["method"], c["mode"]].append(record)
        check = {"system": "perplexity of the model", "seed": 0, **self.source}
        self.perplexity = float(lab.map([check], self._check)[0]["perplexity"])

    def _pilot(self) -> dict[tuple[str, str], float]:
        pilots = [self._cell(*key, TEXT_PILOT, lr) for key in TEXT_SYSTEMS for lr in TEXT_GRIDS[key[1]]]
        records = self.lab.map(pilots, self._train)

        def losses(key: tuple[str, str], lr: float) -> list[float]:
            found = zip(pilots, records, strict=True)
            return [
                float(r["history"][-1][1]) for c, r in found if (c["method"], c["mode"], c["lr"]) == (*key, lr)
            ]

        return {key: chosen(TEXT_GRIDS[key[1]], partial(losses, key)) for key in TEXT_SYSTEMS}

    def _cell(self, method: str, mode: str, seed: int, lr: float) -> dict[str, Any]:
        return {
            "system": f"{method}, {mode}",
            "method": method,
            "mode": mode,
            "seed": seed,
            "rounds": TEXT_ROUNDS,
            "lr": lr,
            **self.source,
        }

    def _train(self, c: Cell, report: Report) -> Record:
        def on_progress(rank: int, event: Mapping[str, Any]) -> None:
            report(f"round {event['round']}/{c['rounds']}, validation loss {event['loss']:.3f}")

        workers = self.lab.workers(text.MACHINES)
        if not self.warm:
            workers.call(f"{text.__name__}:warm")
            self.warm = True
        ranks = workers.call(f"{text.__name__}:train", dict(c), on_progress=on_progress)
        shares = zip(*(r["history"] for r in ranks), strict=True)
        return {
            **ranks[0],
            "history": [[mean(column) for column in zip(*points, strict=True)] for points in shares],
            "identical": len({r.get("fingerprint") for r in ranks}) == 1,
            "payload": max(r.get("payload", 0) for r in ranks),
        }

    def _check(self, c: Cell, report: Report) -> Record:
        return {"perplexity": self.lab.workers(text.MACHINES).call(f"{text.__name__}:perplexity")[0]}

    def _ends(self, key: tuple[str, str], at: int, what: int) -> list[float]:
        return [float(r["history"][at][what]) for r in self.records[key]]

    def claims(self) -> list[Claim]:
        claims = []
        shared = [key for key in TEXT_SYSTEMS if key[0] == "one byte"]
        for key in shared:
            tuned = f"learning rates of {TEXT_GRIDS[key[1]]} chosen on seed {TEXT_PILOT}"
            before, after = self._ends(key, 0, 1), self._ends(key, -1, 1)
            adam = self._ends(("Adam", key[1]), -1, 1)
            claims += [
                Claim(
                    id=f"text.{_slug(key[1])}",
                    text=f"SmolLM2, {key[1]}: validation loss falls by at least 10 % of its zero-shot value",
                    source=f"{SOURCE}; {tuned}",
                    kind="measured",
                    values=[100 * (1 - b / a) for a, b in zip(before, after, strict=True)],
                    op=">=",
                    threshold=10.0,
                    threshold_source="set before any run",
                    unit="%",
                ),
                Claim(
                    id=f"text.{_slug(key[1])}.adam",
                    text=f"SmolLM2, {key[1]}: the same for as many Adam steps on the same sentences",
                    source=f"baseline; {tuned}",
                    kind="measured",
                    values=[100 * (1 - b / a) for a, b in zip(before, adam, strict=True)],
                    unit="%",
                ),
            ]
        records = [r for key in shared for r in self.records[key]]
        return [
            *claims,
            Claim(
                id="text.traffic",
                text="SmolLM2: a machine sends less than 1 kB of payload in the whole run",
                source=f"{SOURCE}, abstract",
                kind="measured",
                values=[float(r["payload"]) for r in records],
                op="<=",
                threshold=999.0,
                threshold_source="set before any run",
                unit="B",
            ),
            Claim(
                id="text.replicas",
                text="SmolLM2: the two processes' trained weights are the same bits at the end of every run",
                source=SOURCE,
                kind="measured",
                values=[float(r["identical"]) for r in records],
                op="==",
                threshold=1.0,
                threshold_source="every machine applies the same bytes in the same order",
                unit="share of runs",
            ),
        ]

    def table(self) -> list[Row]:
        rows = [Row("SmolLM2-135M", "perplexity, 512 tokens of Brown news", "", [self.perplexity])]
        for key, records in self.records.items():
            name = f"SmolLM2, {key[1]}, {key[0]}"
            rows += [
                Row(name, "zero-shot loss", "nats", self._ends(key, 0, 1)),
                Row(name, "validation loss", "nats", self._ends(key, -1, 1)),
                Row(name, "zero-shot accuracy", "%", self._ends(key, 0, 2)),
                Row(name, "accuracy", "%", self._ends(key, -1, 2)),
                Row(name, "best lr", "", [self.rates[key]]),
            ]
            if key[0] == "one byte":
                rows += [
                    Row(name, "trained elements", "", [float(records[0]["elements"])]),
                    Row(name, "payload a machine", "B", [float(r["payload"]) for r in records]),
                    Row(name, "with frames", "B", [float(r["frames"]) for r in records]),
                    Row(name, "log of the run", "B", [float(r["log"]) for r in records]),
                ]
        return rows

    def curves(self) -> list[Curve]:
        return [
            Curve(
                f"{key[1]}, {key[0]}",
                "SmolLM2: validation loss",
                "round",
                [point[0] for point in records[0]["history"]],
                [[point[1] for point in r["history"]] for r in records],
            )
            for key, records in self.records.items()
        ]


def _slug(mode: str) -> str:
    return mode.lower().replace(" ", "-")


def _quoted() -> list[Claim]:
    return [
        Claim(
            id="paper.byte",
            text="One byte a gradient, whatever the model's size",
            source=f"{SOURCE}, title and abstract",
            kind="reported",
            unit="B",
            paper_value=1.0,
        )
    ]


# The picture, from the result alone.

COLOURS = {
    BYTE: "#1b6ca8",
    FLOAT: "#444444",
    DENSE: "#999999",
    NIBBLE: "#7a5195",
    LINEAR: "#d95f02",
    KNOWN: "#e7a33e",
    SGD: "#2a9d5c",
}
STYLES: dict[str, dict[str, Any]] = {
    BYTE: {"linewidth": 5, "alpha": 0.4},
    FLOAT: {"linestyle": "--"},
    KNOWN: {"linestyle": "--"},
}
"""So that curves which coincide are all seen."""
TEXT_COLOURS = {
    "last block, one byte": "#1b6ca8",
    "LoRA, one byte": "#7a5195",
    "last block, Adam": "#2a9d5c",
    "LoRA, Adam": "#94cfab",
}


def draw(result: dict[str, Any], path: Path) -> None:
    """Digits by round, fine-tuning by round, and the time to apply a round by machines."""
    from cograd.papers._plot import figure

    curves = {(c["system"], c["metric"]): c for c in result["curves"]}
    panels = 3 if any(metric.startswith("SmolLM2") for _, metric in curves) else 1
    seeds = len(result["seeds"])
    with figure(path, panels, f"Just One Byte: {seeds} seed{'s' * (seeds > 1)}") as axes:
        for system, colour in COLOURS.items():
            if (curve := curves.get((system, "digits: training loss"))) is not None:
                axes[0].plot(curve["x"], curve["mean"], color=colour, label=system, **STYLES.get(system, {}))
        axes[0].set(yscale="log", xlabel="round", ylabel="training loss", title="digits, 4 machines")
        beside = {"fontsize": "x-small", "frameon": False, "loc": "upper center", "bbox_to_anchor": (0.5, -0.2)}
        axes[0].legend(ncols=2, **beside)
        if panels == 1:
            return
        for system, colour in TEXT_COLOURS.items():
            curve = curves[system, "SmolLM2: validation loss"]
            axes[1].plot(curve["x"], curve["mean"], color=colour, label=system)
        axes[1].set(xlabel="round", ylabel="validation loss", title="SmolLM2-135M, 2 machines", ylim=(0, None))
        axes[1].legend(ncols=2, **beside)
        applied = curves[BYTE, "apply a round, ms"]
        axes[2].plot(applied["x"], applied["mean"], "o-", color=COLOURS[BYTE])
        title = f"{SAMPLES} bytes each, 100,000 parameters"
        axes[2].set(xlabel="machines", ylabel="apply a round, ms", title=title, ylim=(0, None))
        axes[2].set_xticks(applied["x"])


USAGE = """\
import torch
from cograd.engines.transport import TorchDist
from cograd.machines import OneByte

torch.distributed.init_process_group("gloo")
model, loss_fn = torch.nn.Linear(784, 10), torch.nn.CrossEntropyLoss()
zo = OneByte(model, lr=1e-3, samples=2, transport=TorchDist())  # sends 2 bytes a step
for batches in [[(torch.randn(8, 784), torch.arange(8))] * 2]:  # your loader: a minibatch a sample
    info = zo.step(lambda batch: loss_fn(model(batch[0]), batch[1]), batches)  # no backward()
"""

PAPER = Paper(
    slug="one-byte",
    title="Just One Byte (per gradient): A Note on Low-Bandwidth Decentralized Language Model Finetuning Using "
    "Shared Randomness",
    authors="Eric Zelikman, Qian Huang, Percy Liang, Nick Haber, Noah D. Goodman",
    arxiv="2306.10015",
    venue="technical note, 2023",
    room="machines",
    entry="cograd.machines.OneByte",
    module=__name__,
    summary="machines share one byte a gradient estimate and draw its direction from a common seed",
    usage=USAGE,
    datasets=("digits",),
    seeds=3,
    run=run,
    draw=draw,
)
