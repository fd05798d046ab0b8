"""Deep Gradient Compression: dense, gradient dropping, DGC, its ablations and PowerSGD, side by side.

Four worker processes train an MLP on MNIST-5k (batch 32 a worker, momentum 0.9, weight
decay 1e-4, density 0.001, a 4-epoch warm-up) for 12 and for 24 epochs. All systems see the same batches from
the same initial weights at the same learning rate; a second comparison gives each its own best one.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cograd import data
from cograd.core.claim import Claim, Curve, Row
from cograd.core.ledger import Ledger, Link
from cograd.core.space import ParamSpace
from cograd.core.streams import seed_for
from cograd.data.partition import batches
from cograd.engines.worker import Context
from cograd.machines.baselines.gradient_dropping import GradientDropping
from cograd.machines.dgc import DGC, PAPER_WARMUP, DensityWarmup
from cograd.models import shapes
from cograd.models.mlp import MLP
from cograd.papers._paper import Findings, Paper

if TYPE_CHECKING:
    from cograd.papers._lab import Cell, Lab, Record, Report

WORKERS, BATCH, STEPS = 4, 32, 31
LR, MOMENTUM, DECAY, DENSITY = 0.1, 0.9, 1e-4, 0.001
GRID = (0.05, 0.1, 0.2)
PILOT_SEEDS = (100, 101)
LINK = Link(bandwidth=100e6)

DENSE, DROPPING, METHOD = "dense momentum SGD", "gradient dropping", "DGC"
NO_MASK, NO_WARMUP, CLIPPED = "DGC without masking", "DGC without warm-up", "DGC, clipped at 1"
POWER = {rank: f"PowerSGD, rank {rank}" for rank in (1, 2)}
SYSTEMS = (DENSE, DROPPING, METHOD, NO_MASK, NO_WARMUP, CLIPPED, *POWER.values())
COMPARED = (DENSE, DROPPING, METHOD, POWER[1])


# What runs in a worker process.


def train(ctx: Context, system: str, seed: int, epochs: int, lr: float, stage: int) -> Record:
    """Train one system; every rank returns its record, of which rank 0's has the evaluations. ``stage`` is
    the number of steps of each stage of the warm-up."""
    torch.manual_seed(seed_for(seed, "init"))
    train_set, test_set = data.load("mnist-5k", "train"), data.load("mnist-5k", "test")
    ddp = DistributedDataParallel(MLP(784, 256, 128, 10))
    link = _attach(system, ddp, lr, stage)
    history: dict[str, list[float]] = {"accuracy": [], "loss": [], "upload": []}
    for epoch in range(epochs):
        for batch in batches(len(train_set.y), WORKERS * BATCH, seed, epoch):
            mine = batch[ctx.rank * BATCH : (ctx.rank + 1) * BATCH]
            link.optimizer.zero_grad()
            nn.functional.cross_entropy(ddp(train_set.x[mine]), train_set.y[mine]).backward()
            link.optimizer.step()
        if ctx.rank == 0:
            loss, _ = _evaluate(ddp.module, train_set.x, train_set.y)
            _, accuracy = _evaluate(ddp.module, test_set.x, test_set.y)
            history["loss"].append(loss)
            history["accuracy"].append(accuracy)
            history["upload"].append(link.uploaded())
            ctx.progress(epoch=epoch + 1, accuracy=accuracy, loss=loss)
    seconds = LINK.seconds(link.ledger, WORKERS) / (epochs * STEPS)
    return {**history, "digest": _digest(ddp.module), "link_seconds_a_step": seconds}


class _Link:
    """A system on its DDP model: the optimizer to step, and what this worker has uploaded so far."""

    def __init__(self, optimizer: torch.optim.Optimizer, ledger: Ledger, uploaded: Callable[[], float]) -> None:
        self.optimizer, self.ledger, self.uploaded = optimizer, ledger, uploaded


def _attach(system: str, ddp: DistributedDataParallel, lr: float, stage: int) -> _Link:
    warmup = DensityWarmup(stage)
    exchanges: dict[str, Callable[[], DGC]] = {
        DENSE: lambda: DGC(1.0, MOMENTUM),
        DROPPING: lambda: GradientDropping(DENSITY, MOMENTUM),
        METHOD: lambda: DGC(DENSITY, MOMENTUM, warmup=warmup),
        NO_MASK: lambda: DGC(DENSITY, MOMENTUM, warmup=warmup, masking=False),
        NO_WARMUP: lambda: DGC(DENSITY, MOMENTUM),
        CLIPPED: lambda: DGC(DENSITY, MOMENTUM, warmup=warmup, clip_norm=1.0),
    }
    if system in exchanges:
        optimizer = torch.optim.SGD(ddp.parameters(), lr=lr, weight_decay=DECAY)
        attached = exchanges[system]().attach(ddp, optimizer)
        return _Link(optimizer, attached.ledger, lambda: attached.ledger.sent(0))
    return _powersgd(ddp, lr, next(rank for rank, name in POWER.items() if name == system))


def _powersgd(ddp: DistributedDataParallel, lr: float, rank: int) -> _Link:
    """PyTorch's own hook, from its second step on, with its own count of what it sends."""
    from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook

    state = PowerSGDState(None, matrix_approximation_rank=rank, start_powerSGD_iter=2, min_compression_rate=1)
    ddp.register_comm_hook(state, powerSGD_hook)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=lr, momentum=MOMENTUM, weight_decay=DECAY)
    dense = 4 * sum(p.numel() for p in ddp.parameters())
    ledger = Ledger()

    def count(*_: Any) -> None:
        factors = state.compression_stats()[2] * 4
        before = sum(e.payload for e in ledger if e.sender == 0)
        steps = len(ledger) // WORKERS
        sent = dense if steps < 2 else factors - (before - 2 * dense)
        ledger.all_reduce(steps, sent, WORKERS)

    optimizer.register_step_post_hook(count)
    return _Link(optimizer, ledger, lambda: ledger.sent(0))


@torch.no_grad()
def _evaluate(model: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Mean cross-entropy, and accuracy in percent."""
    scores = model(x)
    loss = nn.functional.cross_entropy(scores, y)
    return float(loss), 100 * float((scores.argmax(1) == y).float().mean())


def _digest(model: nn.Module) -> str:
    """Of the weights' bytes: equal on all ranks if the replicas are."""
    flat = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    return hashlib.blake2b(flat.numpy().tobytes(), digest_size=8).hexdigest()


# What runs in the parent: the cells of a scale, and what follows from their records.


def compute(cell: Cell, report: Report, lab: Lab) -> Record:
    """One training on the lab's workers."""

    def on_progress(rank: int, event: Mapping[str, Any]) -> None:
        report(f"epoch {event['epoch']}/{cell['epochs']}, {event['accuracy']:.1f} %")

    ranks = lab.workers(WORKERS).call(f"{__name__}:train", dict(cell), on_progress=on_progress)
    return {**ranks[0], "identical": len({r["digest"] for r in ranks}) == 1}


def cell(system: str, seed: int, epochs: int, lr: float = LR) -> dict[str, Any]:
    stage = STEPS if epochs > len(PAPER_WARMUP) else STEPS // 4
    return {"system": system, "seed": seed, "epochs": epochs, "lr": lr, "stage": stage}


def run(lab: Lab) -> Findings:
    """``full``: every system for 12 and 24 epochs, and the main ones at their own best learning rate.
    ``demo``: three systems for both. ``smoke``: three systems for 2 epochs, a warm-up stage a quarter
    of an epoch."""
    systems = SYSTEMS if lab.scale == "full" else (DENSE, DROPPING, METHOD)
    lengths = {"full": (12, 24), "demo": (12, 24), "smoke": (2,)}[lab.scale]
    cells = [cell(s, seed, n) for n in lengths for seed in lab.seeds for s in systems]
    tuned: dict[str, float] = {}
    if lab.scale == "full":
        pilots = [cell(s, seed, 24, lr) for s in COMPARED for lr in GRID for seed in PILOT_SEEDS]
        tuned = _best_rates(pilots, lab.map(pilots, lambda c, report: compute(c, report, lab)))
        cells += [cell(s, seed, 24, lr) for s, lr in tuned.items() if lr != LR for seed in lab.seeds]
    records = lab.map(cells, lambda c, report: compute(c, report, lab))
    runs = Runs(cells, records, lab.seeds)
    claims = _claims(runs, lengths) + (_tuned_claims(runs, tuned) if tuned else [])
    return Findings(claims, _table(runs, systems, lengths, tuned), _curves(runs, systems, lengths))


class Runs:
    """Records by (system, epochs, learning rate): one number a seed, in the order of the seeds."""

    def __init__(self, cells: Sequence[Cell], records: Sequence[Record], seeds: Sequence[int]) -> None:
        self.seeds = seeds
        self._records = {
            (c["system"], c["seed"], c["epochs"], c["lr"]): r for c, r in zip(cells, records, strict=True)
        }

    def records(self, system: str, epochs: int, lr: float = LR) -> list[Record]:
        return [self._records[system, seed, epochs, lr] for seed in self.seeds]

    def last(self, metric: str, system: str, epochs: int, lr: float = LR) -> list[float]:
        return [r[metric][-1] for r in self.records(system, epochs, lr)]

    def has(self, system: str) -> bool:
        return any(system == key[0] for key in self._records)

    def all(self) -> list[Record]:
        return list(self._records.values())


def _best_rates(pilots: Sequence[Cell], records: Sequence[Record]) -> dict[str, float]:
    """Each compared system's learning rate of the grid with the best mean test accuracy on pilot seeds."""

    def score(system: str, lr: float) -> float:
        found = zip(pilots, records, strict=True)
        return mean(float(r["accuracy"][-1]) for c, r in found if (c["system"], c["lr"]) == (system, lr))

    return {system: max(GRID, key=lambda lr: score(system, lr)) for system in COMPARED}


def _paired(op: Callable[[float, float], float], a: Sequence[float], b: Sequence[float]) -> list[float]:
    return [op(x, y) for x, y in zip(a, b, strict=True)]


def _minus(a: Sequence[float], b: Sequence[float]) -> list[float]:
    return _paired(lambda x, y: x - y, a, b)


def _over(a: Sequence[float], b: Sequence[float]) -> list[float]:
    return _paired(lambda x, y: x / y if y else math.inf, a, b)


SOURCE = "arXiv:1712.01887"
BEFOREHAND = "set before the recorded run, from pilot runs on two other seeds"


def _claims(runs: Runs, lengths: Sequence[int]) -> list[Claim]:
    claims = [*_exact_claims(), _replicas(runs)]
    if 24 in lengths:
        claims += _no_loss(runs)
        claims += _gap(runs)
        claims += _bytes(runs)
    return claims + _quoted()


def _exact_claims() -> list[Claim]:
    """The tables' gradient sizes, from shapes and the encoding alone."""
    claims = []
    models = {
        "resnet50": ("ResNet-50", shapes.resnet50(), 276.7, 277.0, "Table 3"),
        "alexnet": ("AlexNet", shapes.alexnet(), 597.7, 597.0, "Table 3"),
        "ptb-lstm": ("PTB LSTM", shapes.ptb_lstm(), 461.8, 462.0, "Table 4"),
    }
    for key, (name, of, ratio, printed, table) in models.items():
        claims.append(
            Claim(
                id=f"bytes.{key}",
                text=f"{name}: the upload is {ratio} times smaller than the gradient",
                source=f"{SOURCE}, {table}",
                kind="exact",
                values=[round(DGC(DENSITY).upload(of).nominal_ratio, 1)],
                op="==",
                threshold=ratio,
                threshold_source=f"Sec. 5's encoding on the model's shapes (the paper prints {printed:.0f})",
                unit="x",
                paper_value=printed,
            )
        )
    return claims


def _replicas(runs: Runs) -> Claim:
    return Claim(
        id="replicas",
        text="The four workers' weights are the same bits at the end of every run",
        source="synchronous SGD: all add the same payloads in the same order",
        kind="measured",
        values=[mean(float(r["identical"]) for r in runs.all())],
        op="==",
        threshold=1.0,
        threshold_source="synchronous SGD: all add the same payloads in the same order",
        unit="share of runs",
    )


def _no_loss(runs: Runs) -> list[Claim]:
    accuracy = {s: runs.last("accuracy", s, 24) for s in (DENSE, METHOD)}
    loss = {s: runs.last("loss", s, 24) for s in (DENSE, DROPPING, METHOD)}
    return [
        Claim(
            id="no-loss.accuracy",
            text="24 epochs: DGC's test accuracy is within half a point of dense",
            source=f"{SOURCE}, Tables 2-4",
            kind="measured",
            values=_minus(accuracy[DENSE], accuracy[METHOD]),
            op="<=",
            threshold=0.5,
            threshold_source=BEFOREHAND,
            unit="points",
            paper_value=93.75 - 93.87,
        ),
        Claim(
            id="no-loss.train-loss",
            text="24 epochs: DGC's training loss is at most 1.2 times dense's",
            source=f"{SOURCE}, Sec. 4.2",
            kind="measured",
            values=_over(loss[METHOD], loss[DENSE]),
            op="<=",
            threshold=1.2,
            threshold_source=BEFOREHAND,
            unit="x",
        ),
        Claim(
            id="no-loss.dropping-pays",
            text="24 epochs: gradient dropping's training loss is at least 1.5 times dense's",
            source=f"{SOURCE}, Sec. 3",
            kind="measured",
            values=_over(loss[DROPPING], loss[DENSE]),
            op=">=",
            threshold=1.5,
            threshold_source=BEFOREHAND,
            unit="x",
        ),
    ]


def _gap(runs: Runs) -> list[Claim]:
    accuracy = {s: runs.last("accuracy", s, 12) for s in (DENSE, DROPPING, METHOD)}
    gap = _minus(accuracy[DENSE], accuracy[DROPPING])
    closed = _minus(accuracy[METHOD], accuracy[DROPPING])
    claims = [
        Claim(
            id="gap.dropping",
            text="12 epochs: gradient dropping loses at least 1.5 points of accuracy to dense",
            source=f"{SOURCE}, Table 2",
            kind="measured",
            values=gap,
            op=">=",
            threshold=1.5,
            threshold_source=BEFOREHAND,
            unit="points",
            paper_value=1.0,
        ),
        Claim(
            id="gap.closed",
            text="12 epochs: DGC wins back at least half of that (what it wins back less half the gap)",
            source=f"{SOURCE}, Table 2",
            kind="measured",
            values=_minus(closed, [g / 2 for g in gap]),
            op=">=",
            threshold=0.0,
            threshold_source=BEFOREHAND,
            unit="points",
            paper_value=93.87 - 92.75 - 0.5,
        ),
    ]
    for name, system, text in (
        ("masking", NO_MASK, "12 epochs: what masking gains in accuracy (negative: it costs)"),
        ("warm-up", NO_WARMUP, "12 epochs: what the density warm-up gains in accuracy"),
    ):
        if runs.has(system):
            values = _minus(accuracy[METHOD], runs.last("accuracy", system, 12))
            claims.append(
                Claim(f"ablation.{name}", text, f"{SOURCE}, Sec. 3", "measured", values, unit="points")
            )
    return claims


def _bytes(runs: Runs) -> list[Claim]:
    space = ParamSpace.of(MLP(784, 256, 128, 10))
    biases = 4 * sum(s.numel for s in space if len(s.shape) == 1)
    dense = 4 * space.numel

    def after_warmup(record: Record) -> float:
        """Bytes a step after the 4 epochs of warm-up."""
        upload = record["upload"]
        return float(upload[-1] - upload[3]) / (STEPS * (len(upload) - 4))

    records = runs.records(METHOD, 24)
    compressed = [(dense - biases) / (after_warmup(r) - biases) for r in records]
    claims = [
        Claim(
            id="ratio.compressed",
            text="After warm-up the upload of the compressed tensors is at least 600 times smaller",
            source=f"{SOURCE}, Sec. 4",
            kind="measured",
            values=compressed,
            op=">=",
            threshold=600.0,
            threshold_source=BEFOREHAND,
            unit="x",
            paper_value=608.0,
        ),
        Claim(
            id="ratio.after-warmup",
            text="The same with the dense biases",
            source=f"{SOURCE}, Sec. 4",
            kind="measured",
            values=[dense / after_warmup(r) for r in records],
            unit="x",
        ),
    ]
    for epochs in (12, 24):
        whole = [dense * STEPS * epochs / u for u in runs.last("upload", METHOD, epochs)]
        text = f"Whole run of {epochs} epochs, the warm-up's 4 included"
        claims.append(Claim(f"ratio.whole-{epochs}", text, f"{SOURCE}, Sec. 4", "measured", whole, unit="x"))
    return claims


def _quoted() -> list[Claim]:
    rows = (
        ("cifar10", "ResNet-110 on CIFAR-10, 4 workers: DGC 93.87 %, dense 93.75 %", "Table 2", 93.87, "%"),
        ("imagenet", "ResNet-50 on ImageNet: DGC 76.15 %, dense 75.96 % top-1", "Table 3", 76.15, "%"),
        ("ptb", "2 x 1500 LSTM on PTB: DGC 72.24, dense 72.30 perplexity", "Table 4", 72.24, "perplexity"),
    )
    return [
        Claim(f"paper.{key}", text, f"{SOURCE}, {table}", "reported", unit=unit, paper_value=value)
        for key, text, table, value, unit in rows
    ]


def _tuned_claims(runs: Runs, tuned: Mapping[str, float]) -> list[Claim]:
    best = {s: runs.last("accuracy", s, 24, lr) for s, lr in tuned.items()}
    rates = ", ".join(f"{s} {lr:g}" for s, lr in tuned.items())
    source = f"learning rates of {GRID} chosen on seeds {PILOT_SEEDS}: {rates}"
    return [
        Claim(
            id=f"tuned.{key}",
            text=f"24 epochs, each at its own best learning rate: accuracy of dense less that of {system}",
            source=source,
            kind="measured",
            values=_minus(best[DENSE], best[system]),
            unit="points",
        )
        for key, system in (("dgc", METHOD), ("dropping", DROPPING), ("powersgd", POWER[1]))
    ]


def _table(runs: Runs, systems: Sequence[str], lengths: Sequence[int], tuned: Mapping[str, float]) -> list[Row]:
    rows = []
    for system in systems:
        rows += [Row(system, f"accuracy, {n} epochs", "%", runs.last("accuracy", system, n)) for n in lengths]
        n = max(lengths)
        upload = [u / (STEPS * n) / 1024 for u in runs.last("upload", system, n)]
        seconds = [1000 * r["link_seconds_a_step"] for r in runs.records(system, n)]
        rows += [
            Row(system, "train loss", "nats", runs.last("loss", system, n)),
            Row(system, "upload a step", "KiB", upload),
            Row(system, "at 100 Mbit/s a step", "ms", seconds),
        ]
        if system in tuned:
            lr = tuned[system]
            rows += [
                Row(system, "best lr", "", [lr]),
                Row(system, "accuracy at best lr", "%", runs.last("accuracy", system, n, lr)),
            ]
    return rows


def _curves(runs: Runs, systems: Sequence[str], lengths: Sequence[int]) -> list[Curve]:
    curves = []
    n = max(lengths)
    epochs = list(range(1, n + 1))
    for system in systems:
        records = runs.records(system, n)
        steps = [[u - v for u, v in zip(r["upload"], [0, *r["upload"]], strict=False)] for r in records]
        for metric, values in (
            ("training loss", [r["loss"] for r in records]),
            ("test accuracy, %", [r["accuracy"] for r in records]),
            ("upload so far, MiB", [[u / 2**20 for u in r["upload"]] for r in records]),
            ("upload a step, KiB", [[u / STEPS / 1024 for u in s] for s in steps]),
        ):
            curves.append(Curve(system, metric, "epoch", epochs, values))
    return curves


# The picture, from the result alone.

COLOURS = {DENSE: "#444444", DROPPING: "#d95f02", METHOD: "#1b6ca8", POWER[1]: "#7a5195", POWER[2]: "#bc91d0"}


def draw(result: dict[str, Any], path: Path) -> None:
    """Training loss, accuracy against bytes, and bytes a step."""
    from cograd.papers._plot import figure

    curves = {(c["system"], c["metric"]): c for c in result["curves"]}
    systems = [s for s in COLOURS if (s, "training loss") in curves]
    seeds = len(result["seeds"])
    with figure(path, 3, f"DGC on MNIST-5k: 4 workers, {seeds} seed{'s' * (seeds > 1)}") as (loss, cost, step):
        for system in systems:
            style = {"color": COLOURS[system], "label": system}
            falling, accuracy = curves[system, "training loss"], curves[system, "test accuracy, %"]
            so_far, each = curves[system, "upload so far, MiB"], curves[system, "upload a step, KiB"]
            loss.plot(falling["x"], falling["mean"], **style)
            cost.plot(so_far["mean"], accuracy["mean"], **style)
            step.plot(each["x"], each["mean"], drawstyle="steps-mid", **style)
        loss.set(yscale="log", xlabel="epoch", ylabel="training loss")
        cost.set(xscale="log", xlabel="uploaded by one worker, MiB", ylabel="test accuracy, %")
        if cost.get_ylim()[1] > 92:
            cost.set_ylim(bottom=80)  # where the systems differ
        step.set(yscale="log", xlabel="epoch", ylabel="upload a step, KiB")
        names = {"ncols": len(systems), "loc": "outside lower center", "frameon": False}
        loss.figure.legend(*loss.get_legend_handles_labels(), **names)


USAGE = """\
import torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
from cograd.machines import DGC, DensityWarmup

dist.init_process_group("gloo")
model = DDP(torch.nn.Linear(784, 10))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)  # DGC brings the momentum
dgc = DGC(density=0.001, momentum=0.9, warmup=DensityWarmup(steps_per_stage=31)).attach(model, optimizer)
# ... your training loop, unchanged; dgc.ledger counts the bytes, dgc.state_dict() goes into the checkpoint
"""

PAPER = Paper(
    slug="dgc",
    title="Deep Gradient Compression: Reducing the Communication Bandwidth for Distributed Training",
    authors="Yujun Lin, Song Han, Huizi Mao, Yu Wang, William J. Dally",
    arxiv="1712.01887",
    venue="ICLR 2018",
    room="machines",
    entry="cograd.machines.DGC",
    module=__name__,
    summary="workers share the 0.1 % of the gradient that matters now, and keep the rest for later",
    usage=USAGE,
    datasets=("mnist-5k",),
    seeds=5,
    run=run,
    draw=draw,
)
