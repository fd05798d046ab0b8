"""The arena of the room `machines`: what trains one model there, one after another under equal conditions.

Every system sees the same batches from the same initial weights; each has its own learning rate, the best of a
grid of three around its base rate on a pilot seed. Where a method has its own idea of a step (a round of
differences, a unit of time) it gets as many gradients of records as the others.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from cograd import data
from cograd.core.ledger import Ledger, Link
from cograd.core.streams import seed_for
from cograd.data.kinds import Images
from cograd.data.partition import batches
from cograd.engines.transport import TorchDist
from cograd.engines.worker import Context
from cograd.machines.baselines.diloco import DiLoCo, LocalAveraging
from cograd.machines.baselines.gradient_dropping import GradientDropping
from cograd.machines.dgc import DGC, DensityWarmup
from cograd.machines.diff2 import Diff2, Diff2Plan, GDRoutine
from cograd.machines.gradient_coding.clock import GilbertElliott
from cograd.machines.gradient_coding.clusters import SimulatedCluster
from cograd.machines.gradient_coding.learners import Learner
from cograd.machines.gradient_coding.schemes import GC
from cograd.machines.gradient_coding.training import GradientCoding
from cograd.machines.linear_sketch import LinearSketch
from cograd.machines.one_byte.optimizer import OneByte
from cograd.machines.single_merging.attachment import SingleMerging
from cograd.machines.single_merging.schedule import Schedule
from cograd.machines.streaming_diloco.fragments import Fragments
from cograd.machines.streaming_diloco.method import StreamingDiLoCo
from cograd.machines.streaming_diloco.outer import nesterov
from cograd.models.mlp import MLP

BATCH = 32  # of each worker
MOMENTUM, DECAY = 0.9, 1e-4
SYNC = 16  # steps between exchanges of the methods that train alone meanwhile
SAMPLES = 8  # estimates of a step of one byte
EPSILON, DELTA = 8.0, 1e-5
RATES = (0.5, 1.0, 2.0)
"""The grid, as factors of a system's base learning rate."""


@dataclass(frozen=True)
class Job:
    """What a system is given: the training data, where it is in the run, and how long the run is."""

    train: Images
    lr: float
    steps: int
    epoch: int
    """Steps of an epoch."""
    rank: int
    workers: int


@dataclass
class Run:
    """A system at work: ``step(rows)`` takes the rows of all workers' batches; within ``weights()`` the model
    holds what is to be evaluated. ``kept`` is what the method keeps besides the weights and their gradient."""

    step: Callable[[Tensor], None]
    ledger: Ledger
    kept: Callable[[], Any]
    weights: Callable[[], AbstractContextManager[Any]] = nullcontext
    work: tuple[str, float] = ("grad", BATCH)


@dataclass(frozen=True)
class System:
    """One line of the comparison."""

    name: str
    lr: float
    start: Callable[[nn.Module, Job], Run]
    note: str = ""
    only: frozenset[str] = field(default_factory=frozenset)
    """Models that it can train; all if empty."""


# Systems that DistributedDataParallel carries.


def _loss(model: nn.Module, job: Job, rows: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(job.train.x[rows]), job.train.y[rows])


def _mine(job: Job, rows: Tensor) -> Tensor:
    return rows[job.rank * BATCH : (job.rank + 1) * BATCH]


def _sgd(model: nn.Module, job: Job, momentum: float = MOMENTUM) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=job.lr, momentum=momentum, weight_decay=DECAY)


def _descend(model: nn.Module, job: Job, optimizer: torch.optim.Optimizer) -> Callable[[Tensor], None]:
    def step(rows: Tensor) -> None:
        optimizer.zero_grad()
        _loss(model, job, _mine(job, rows)).backward()
        optimizer.step()

    return step


def _hooked(itemsize: int, hook: Callable[..., Any] | None) -> Callable[[nn.Module, Job], Run]:
    """PyTorch's own all-reduce, of ``itemsize`` bytes an entry."""

    def start(model: nn.Module, job: Job) -> Run:
        ddp, ledger = DistributedDataParallel(model), Ledger()
        if hook is not None:
            ddp.register_comm_hook(None, hook)
        optimizer = _sgd(ddp, job)
        size = itemsize * sum(p.numel() for p in model.parameters())
        optimizer.register_step_post_hook(
            lambda *_: ledger.all_reduce(len(ledger) // job.workers, size, job.workers)
        )
        return Run(_descend(ddp, job, optimizer), ledger, lambda: optimizer.state)

    return start


def _power(model: nn.Module, job: Job) -> Run:
    ddp, ledger, dense = (
        DistributedDataParallel(model),
        Ledger(),
        4 * sum(p.numel() for p in model.parameters()),
    )
    state = PowerSGDState(None, 2, start_powerSGD_iter=2, min_compression_rate=1)
    ddp.register_comm_hook(state, powerSGD_hook)
    optimizer, counted = _sgd(ddp, job), [0]

    def count(*_: Any) -> None:
        step, factors = len(ledger) // job.workers, 4 * state.compression_stats()[2]
        sent = dense if step < 2 else factors - counted[0]
        counted[0] += sent if step >= 2 else 0
        ledger.all_reduce(step, sent, job.workers)

    optimizer.register_step_post_hook(count)
    memories = (state.error_dict, state.p_memory_dict, state.q_memory_dict)
    return Run(_descend(ddp, job, optimizer), ledger, lambda: [optimizer.state, *memories])


def _exchanged(make: Callable[[Job], DGC | LinearSketch]) -> Callable[[nn.Module, Job], Run]:
    def start(model: nn.Module, job: Job) -> Run:
        ddp = DistributedDataParallel(model)
        optimizer = _sgd(ddp, job, momentum=0.0)
        attached = make(job).attach(ddp, optimizer)
        return Run(_descend(ddp, job, optimizer), attached.ledger, attached.state_dict)

    return start


def _warmup(job: Job) -> DensityWarmup:
    """The paper's four epochs, or a sixth of a run that is shorter than 24."""
    return DensityWarmup(max(1, min(job.epoch, job.steps // 24)))


# Systems whose workers train alone between exchanges.


def _layers(model: nn.Module) -> Fragments:
    """A fragment a layer: a weight and its bias."""
    names = [name for name, _ in model.named_parameters()]
    layers = dict[str, list[str]]()
    for name in names:
        layers.setdefault(name.rpartition(".")[0], []).append(name)
    return layers


def _local(
    make: Callable[[nn.Module, torch.optim.Optimizer], StreamingDiLoCo],
) -> Callable[[nn.Module, Job], Run]:
    def start(model: nn.Module, job: Job) -> Run:
        optimizer = _sgd(model, job)
        diloco = make(model, optimizer)
        diloco.__enter__()
        kept = lambda: [optimizer.state, diloco.state_dict()]  # noqa: E731
        return Run(_descend(model, job, optimizer), diloco.ledger, kept, diloco.outer_weights)

    return start


def _merging(model: nn.Module, job: Job) -> Run:
    optimizer = _sgd(model, job)
    local = min(SYNC, job.steps)
    schedule = Schedule.single_merge(rounds=job.steps // local, low=0.2)
    merging = SingleMerging(model, optimizer, schedule=schedule, local_steps=local)
    return Run(_descend(model, job, optimizer), merging.ledger, lambda: optimizer.state)


# Systems that do something else than descend along a batch's gradient.


def _one_byte(model: nn.Module, job: Job) -> Run:
    zo = OneByte(model, job.lr, samples=SAMPLES, transport=TorchDist())

    def step(rows: Tensor) -> None:
        zo.step(lambda part: _loss(model, job, part), _mine(job, rows).chunk(SAMPLES))

    return Run(
        step, zo.ledger, lambda: [p.detach() for p in model.parameters()] * 2, work=("forward", 2 * BATCH)
    )


def _coding(model: nn.Module, job: Job) -> Run:
    """The master's run with workers on a clock: every rank simulates the same one, so nothing travels here."""
    rows_of: list[Tensor] = []

    def loss(module: nn.Module, rows: Tensor) -> Tensor:
        return nn.functional.cross_entropy(module(job.train.x[rows]), job.train.y[rows], reduction="sum")

    learner = Learner(model, _sgd(model, job), loss, lambda step: rows_of[0])
    cluster = SimulatedCluster(GilbertElliott().trace(job.steps + 1, job.workers, 0), 1.0)
    run = GradientCoding([learner], GC(job.workers, 1), cluster, dtype=torch.float32)

    def step(rows: Tensor) -> None:
        rows_of[:] = [rows]
        run.train(1)

    return Run(step, run.ledger, lambda: learner.optimizer.state, work=("grad", 2 * BATCH))


def _diff2(model: nn.Module, job: Job) -> Run:
    """A round an epoch, as a round takes the gradient of every record."""
    n = len(job.train.y) // job.workers
    mine = slice(job.rank * n, (job.rank + 1) * n)
    rounds = max(1, job.steps // job.epoch)
    plan = Diff2Plan(
        rounds=rounds,
        restart_every=max(1, rounds // 3),
        epsilon=EPSILON,
        delta=DELTA,
        clip=1.0,
        diff_clip=1.0,
        records=[n] * job.workers,
        routine=GDRoutine(job.lr),
        release="aggregate",
    )

    def loss(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(module(x), y)

    diff2 = Diff2(model, loss, [(job.train.x[mine], job.train.y[mine])], plan, transport=TorchDist())
    taken = [0]

    def step(rows: Tensor) -> None:
        taken[0] += 1
        if (taken[0] % job.epoch == 0 or job.steps < job.epoch) and diff2.round < rounds:
            diff2.step()

    return Run(step, diff2.ledger, lambda: [p.detach() for p in model.parameters()] * 3)


SYSTEMS = (
    System("dense all-reduce", 0.1, _hooked(4, None)),
    System("fp16 all-reduce", 0.1, _hooked(2, default_hooks.fp16_compress_hook)),
    System("PowerSGD, rank 2", 0.1, _power),
    System("gradient dropping", 0.1, _exchanged(lambda job: GradientDropping(0.001, MOMENTUM))),
    System("DGC", 0.1, _exchanged(lambda job: DGC(0.001, MOMENTUM, warmup=_warmup(job)))),
    System(
        "linear sketch, d/10",
        0.02,
        _exchanged(lambda job: LinearSketch(None, "countsketch", momentum=MOMENTUM)),
    ),
    System("local averaging", 0.1, _local(lambda m, o: LocalAveraging(m, o, sync_every=SYNC))),
    System("DiLoCo", 0.1, _local(lambda m, o: DiLoCo(m, o, sync_every=SYNC, outer=nesterov(0.4)))),
    System(
        "Streaming DiLoCo, FP4",
        0.1,
        _local(lambda m, o: StreamingDiLoCo(m, o, fragments=_layers(m), sync_every=SYNC, outer=nesterov(0.4))),
    ),
    System("single merging", 0.1, _merging),
    System("one byte", 3e-4, _one_byte, "zeroth order"),
    System("gradient coding, s = 1", 0.1, _coding, "tolerates a straggler"),
    System("DIFF2", 0.5, _diff2, f"private: epsilon {EPSILON:g}, delta {DELTA:g}"),
)
NOT_APPLICABLE = {"DADAO": "needs a strongly convex objective; see `cograd run dadao`"}

MODELS: Mapping[str, tuple[int, ...]] = {"mlp": (256, 128), "softmax": ()}


def steps_an_epoch(records: int, workers: int) -> int:
    return records // (workers * BATCH)


def train(
    ctx: Context,
    system: str,
    seed: int,
    lr: float,
    steps: int,
    data_name: str,
    model: str,
    link: Mapping[str, float],
) -> dict[str, Any]:
    """Runs in every worker: one system for so many steps. Rank 0's record is the one that counts."""
    chosen = next(s for s in SYSTEMS if s.name == system)
    train_set, test_set = data.load(data_name, "train"), data.load(data_name, "test")
    assert isinstance(train_set, Images)
    assert isinstance(test_set, Images)
    torch.manual_seed(seed_for(seed, "init"))
    net = MLP(train_set.x[0].numel(), *MODELS[model], len(train_set.classes))
    epoch = steps_an_epoch(len(train_set.y), ctx.size)
    job = Job(train_set, lr, steps, epoch, ctx.rank, ctx.size)
    run = chosen.start(net, job)
    began = time.monotonic()
    for number, rows in enumerate(_rows(len(train_set.y), ctx.size, seed, steps)):
        run.step(rows)
        if ctx.rank == 0 and number % epoch == 0:
            ctx.progress(step=number + 1, steps=steps)
    seconds = time.monotonic() - began
    with run.weights(), torch.no_grad():
        scores = net(test_set.x)
    parties = 1 + max((e.sender for e in run.ledger), default=ctx.size - 1)
    kind, amount = run.work
    return {
        "accuracy": 100 * float((scores.argmax(1) == test_set.y).float().mean()),
        "bytes": run.ledger.sent(0),
        "link_seconds": Link(**link).seconds(run.ledger, max(parties, ctx.size) + 1),
        "memory": tensor_bytes(run.kept()),
        "work": f"{amount * steps:,.0f} {kind}",
        "step_seconds": seconds / steps,
    }


def _rows(records: int, workers: int, seed: int, steps: int) -> Iterable[Tensor]:
    taken = 0
    for epoch in range(steps):
        for rows in batches(records, workers * BATCH, seed, epoch):
            if taken == steps:
                return
            taken += 1
            yield rows


def tensor_bytes(kept: Any) -> int:
    """Bytes of all tensors in a nest of containers."""
    if isinstance(kept, Tensor):
        return kept.numel() * kept.element_size()
    if isinstance(kept, Mapping):
        return sum(map(tensor_bytes, kept.values()))
    if isinstance(kept, list | tuple):
        return sum(map(tensor_bytes, kept))
    return 0
