"""The arena of the room `clients`: what trains one model there, one after another under equal conditions.

Every system sees the same clients, participants, minibatches and initial weights, and ends when its clients
have evaluated as many gradients as all others. Each has its own learning rate, the best of a grid of three
around its base rate on a pilot seed. Where clients answer at their own pace, they take 1 to 4 units of time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cograd import data
from cograd.clients.baselines.dp_fedavg import DPFedAvg, Privacy
from cograd.clients.baselines.fedadam import FedAdam
from cograd.clients.baselines.fedasync import FedAsync
from cograd.clients.baselines.fedavg import FedAvg
from cograd.clients.baselines.fedbuff import FedBuff
from cograd.clients.baselines.fedper import FedPer
from cograd.clients.baselines.fedrep import FedRep
from cograd.clients.baselines.fine_tuned import FineTuned
from cograd.clients.baselines.local_only import LocalOnly
from cograd.clients.baselines.mean_guided import MeanGuided
from cograd.clients.baselines.permuted_guidance import PermutedGuidance
from cograd.clients.baselines.power_of_choice import PowerOfChoice
from cograd.clients.baselines.scaffold import Scaffold
from cograd.clients.curricula import ClientCurriculum, Curriculum, DataCurriculum
from cograd.clients.fedcac import FedCAC
from cograd.clients.fedfix import Every, FedFix
from cograd.clients.fedld import FedLD
from cograd.clients.fedlex import FedLEx
from cograd.clients.fedspeed import FedSpeed, fed_dyn, fed_prox, fed_sam
from cograd.clients.hyperfl import HyperFL
from cograd.core.streams import seed_for, stream
from cograd.data.clients import Clients
from cograd.data.kinds import Images
from cograd.data.partition import Partition
from cograd.engines.federated.protocol import Method
from cograd.engines.federated.samplers import Everyone, Uniform
from cograd.engines.federated.simulation import Simulation
from cograd.engines.federated.training import LocalSGD
from cograd.engines.federated.workers import NotFinite
from cograd.models.mlp import MLP

if TYPE_CHECKING:
    from cograd.papers._lab import Cell, Record, Report

EPOCHS, BATCH = 2, 50
TESTS = 50
"""Test examples of a client, drawn in its own class mix; clients may share them."""
POINTS = 16
"""Measurements along a training."""
WORKERS = 2
EPSILON, DELTA, CLIP = 8.0, 1e-5, 1.0
RATES = (0.4, 1.0, 2.5)
"""The grid, as factors of a system's base learning rate."""
MODELS = ("mlp", "cnn")
MEASURES = ("accuracy", "personal", "before", "worst")


@dataclass(frozen=True)
class Job:
    """What a system is given: its clients' training, and how long the run is."""

    local: LocalSGD
    clients: int
    participants: int
    updates: int
    """Client updates until the gradients are spent, at one gradient a minibatch."""
    times: tuple[float, ...]


@dataclass(frozen=True)
class System:
    """One line of the comparison. ``alone``: nobody uses a global model."""

    name: str
    make: Callable[[Job], Method]
    lr: float = 0.05
    note: str = ""
    alone: bool = False
    clocked: bool = False
    """Clients answer at their own pace."""
    everyone: bool = False
    """All clients take part all the time."""


def _explored(kind: type[FedLEx]) -> Callable[[Job], Method]:
    """FedLEx or a control: a tenth of the clients explores for five epochs, at the usual learning rate."""
    return lambda job: kind(FedAvg(job.local), LocalSGD(0.05, 5, BATCH), fraction=0.1, normalize="after_mean")


def _private(job: Job) -> Method:
    rounds = -(-job.updates // job.participants)
    return DPFedAvg(job.local, privacy=Privacy(rounds, EPSILON, DELTA, CLIP))


def _client_curriculum(job: Job) -> Method:
    return Curriculum(FedAvg(job.local), clients=ClientCurriculum(updates=job.updates))


SYSTEMS = (
    System("local only", lambda job: LocalOnly(job.local), note="nothing is shared", alone=True),
    System("FedAvg", lambda job: FedAvg(job.local)),
    System("FedAvg + fine-tuning", lambda job: FineTuned(job.local)),
    System("FedProx", lambda job: fed_prox(job.local)),
    System("FedSAM", lambda job: fed_sam(job.local)),
    System("FedDyn", lambda job: fed_dyn(job.local)),
    System("SCAFFOLD", lambda job: Scaffold(job.local)),
    System("FedAdam", lambda job: FedAdam(job.local, lr=0.01)),
    System("FedPer", lambda job: FedPer(job.local), alone=True),
    System("FedRep", lambda job: FedRep(replace(job.local, epochs=1), head_epochs=EPOCHS - 1), alone=True),
    System("FedAsync", lambda job: FedAsync(job.local), clocked=True),
    System("FedBuff", lambda job: FedBuff(job.local, job.participants), clocked=True),
    System("power of choice", lambda job: PowerOfChoice(job.local, candidates=_candidates(job))),
    System("DP-FedAvg", _private, note=f"private: epsilon {EPSILON:g}, delta {DELTA:g} an example"),
    System("FedSpeed", lambda job: FedSpeed(job.local)),
    System("FedLD", lambda job: FedLD(job.local)),
    System("FedLEx", _explored(FedLEx), 1.0),
    System("lr x mean(G)", _explored(MeanGuided), 1.0, "FedLEx with one value for all entries"),
    System("permuted G", _explored(PermutedGuidance), 1.0, "FedLEx with its values in other places"),
    System("FedCAC", lambda job: FedCAC(job.local), alone=True),
    System(
        "FedFix", lambda job: FedFix(job.local, Every(1.0), job.times, importances="sizes"),
        note="every client takes part all the time", clocked=True, everyone=True,
    ),
    System("HyperFL", lambda job: HyperFL(job.local, replace(job.local, epochs=1), embedding=16, hidden=16),
           note="hypernetwork of 16 hidden units", alone=True),
    System("data curriculum", lambda job: Curriculum(FedAvg(job.local), data=DataCurriculum())),
    System("client curriculum", _client_curriculum),
)  # fmt: skip
NOT_APPLICABLE = {
    "FZooS": "is for black-box functions of some hundred variables; see `cograd run fzoos`",
    "AGLFOP": "measures fairness of any of these and trains nothing; see `cograd run aglfop`",
}


def _candidates(job: Job) -> int:
    return min(job.clients, 2 * job.participants)


@lru_cache(2)
def images(name: str) -> tuple[Images, Images]:
    """Training and test images, normalised; those of more than 28 pixels a side at half their size."""
    found = []
    for split in ("train", "test"):
        loaded = data.load(name, split)
        if not isinstance(loaded, Images):
            raise ValueError(f"data must be a set of images; {name} is {type(loaded).__name__}")
        found.append(loaded)
    moments = found[0].moments()
    train, test = (one.normalised(*moments) for one in found)
    if train.x.shape[-1] > 28:
        train, test = (replace(one, x=nn.functional.avg_pool2d(one.x, 2)) for one in (train, test))
    return train, test


@lru_cache(4)
def federation(name: str, alpha: float, clients: int, seed: int) -> Clients:
    """The clients: class mixes from a Dirichlet distribution, tests in the same mixes."""
    train, test = images(name)
    parts = data.dirichlet(train.y, clients, alpha, seed)
    rows = [_alike(train.y[part], test.y, seed, client) for client, part in enumerate(parts.parts)]
    return Clients(train, parts, test, Partition(tuple(rows), "in the clients' mixes", parts.names))


def _alike(mine: Tensor, labels: Tensor, seed: int, client: int) -> Tensor:
    """Test rows in the mix of a client's labels, ascending."""
    draws, rows = stream(seed, "own tests", client), []
    for label, count in zip(*(t.tolist() for t in mine.unique(return_counts=True)), strict=True):
        pool = (labels == label).nonzero()[:, 0]
        rows.append(pool[draws.choice(len(pool), min(len(pool), round(TESTS * count / len(mine))))])
    found = torch.cat(rows).sort().values
    return found if len(found) else (labels == mine.mode().values).nonzero()[:1, 0]


def network(model: str, train: Images) -> nn.Module:
    """One hidden layer of 64; or two 3 x 3 convolutions of 8 and 16 channels before it."""
    channels, height, width = train.x[0].shape
    if model == "mlp":
        return MLP(train.x[0].numel(), 64, len(train.classes))
    return nn.Sequential(
        nn.Conv2d(channels, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        MLP(16 * (height // 4) * (width // 4), 64, len(train.classes)),
    )  # fmt: skip


def compute(cell: Cell, report: Report) -> Record:
    """One system until its gradients are spent, measured on the way."""
    seed, system = cell["seed"], next(s for s in SYSTEMS if s.name == cell["system"])
    clients = federation(cell["data_name"], cell["alpha"], cell["clients"], seed)
    train, test = images(cell["data_name"])
    local = LocalSGD(cell["lr"], EPOCHS, BATCH)
    updates = -(-cell["gradients"] // local.length(min(clients.sizes)))
    times = tuple(float(1 + 3 * t) for t in stream(seed, "pace").uniform(len(clients)))
    job = Job(local, len(clients), cell["participants"], updates, times)
    torch.manual_seed(seed_for(seed, "init"))
    model = network(cell["model"], train)
    with Simulation(
        system.make(job), model, nn.functional.cross_entropy, clients, seed=seed, workers=WORKERS,
        sampler=Everyone() if system.everyone else Uniform(count=cell["participants"]), test=test,
        response_time=times if system.clocked else None, personal=True, every=1 << 30,
    ) as sim:  # fmt: skip
        points = list(_measured(sim, system, cell["gradients"], report))
        seconds = sim.tally.seconds
    return {name: [point[name] for point in points] for name in points[0]} | {"computing": seconds}


def _measured(sim: Simulation, system: System, gradients: int, report: Report) -> Iterator[dict[str, Any]]:
    """What is measured whenever another part of the gradients is spent; a training that diverges ends there."""
    due, before = 1, list[float]()
    while True:
        try:
            row = sim.advance()
        except NotFinite:
            row = None
        done = 1.0 if row is None else row.work.get("grad", 0.0) / gradients
        if row is not None and row.before is not None:
            before.append(row.before)
        if row is not None and done < 1 and done * POINTS < due:
            continue
        due = int(done * POINTS) + 1
        own = [a for a in sim.personal_accuracies() if a == a]
        yield {
            "round": len(sim.history),
            "gradients": sim.tally.work.get("grad", 0.0),
            "forwards": sim.tally.work.get("forward", 0.0),
            "bytes": sim.tally.up + sim.tally.down,
            "accuracy": None if system.alone else 100 * sim.accuracy(sim.method.model(sim.server)),
            "personal": 100 * fmean(own),
            "worst": 100 * fmean(sorted(own)[: max(1, len(own) // 10)]),
            "before": 100 * fmean(before) if before else None,
        }
        before.clear()
        report(f"{100 * min(done, 1):.0f} % of the gradients")
        if done >= 1:
            return
