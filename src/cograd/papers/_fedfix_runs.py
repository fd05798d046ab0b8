"""FedFix's runs: logistic regression on MNIST-5k, and quadratics whose clients disagree."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cograd import data
from cograd.clients.baselines.fedasync import FedAsync
from cograd.clients.baselines.fedavg import FedAvg
from cograd.clients.baselines.fedbuff import FedBuff
from cograd.clients.fedfix import Every, FedFix, async_fed_avg, fed_avg, fed_buff, response_times
from cograd.core.codecs import Float64
from cograd.core.streams import seed_for, stream
from cograd.data.clients import ClientData, Clients
from cograd.engines.federated.protocol import Method
from cograd.engines.federated.simulation import Simulation
from cograd.engines.federated.training import LocalSGD

if TYPE_CHECKING:
    from cograd.papers._lab import Cell, Record, Report

CLIENTS, F80, F0 = 10, "F-80", "F-0"
Times = Sequence[float]

FIX, FIX_2, AVG, BUFF, ASYNC = "FedFix 0.5", "FedFix 0.2", "FedAvg", "FedBuff 5", "AsyncFedAvg"
BUFF_SAME, ASYNC_SAME = "FedBuff 5, identical", "AsyncFedAvg, identical"
DISCOUNT, MIXED = "FedBuff 5, discounted", "FedAsync"
FIX_ALL, BUFF_ALL, PLAIN = "FedFix 1", "FedBuff 10", "FedAvg of the baselines"
METHODS: dict[str, Callable[[LocalSGD, Times], Method]] = {
    FIX: lambda local, times: FedFix(local, Every(0.5), times),
    FIX_2: lambda local, times: FedFix(local, Every(0.2), times),
    AVG: fed_avg,
    BUFF: lambda local, times: fed_buff(local, 5, times),
    ASYNC: async_fed_avg,
    BUFF_SAME: lambda local, times: fed_buff(local, 5, times, weighting="identical"),
    ASYNC_SAME: lambda local, times: async_fed_avg(local, times, weighting="identical"),
    DISCOUNT: lambda local, times: FedBuff(local, 5),
    MIXED: lambda local, times: FedAsync(local),
    FIX_ALL: lambda local, times: FedFix(local, Every(1.0), times),
    BUFF_ALL: lambda local, times: fed_buff(local, CLIENTS, times),
    PLAIN: lambda local, times: FedAvg(local, weighted=False),
}


def _simulation(system: str, scenario: str, local: LocalSGD, *args: Any, **options: Any) -> Simulation:
    times = response_times(scenario, CLIENTS)
    with warnings.catch_warnings():  # AsyncFedAvg's weights are what is looked at here
        warnings.filterwarnings("ignore", "lr times the largest weight", RuntimeWarning)
        return Simulation(METHODS[system](local, times), *args, response_time=times, **options)


# MNIST-5k: what a run costs in time and how steady it is.

ROWS, ALPHA, STEPS, BATCH, UNTIL = 1500, 0.1, 5, 16, 40


@lru_cache(4)
def _federation(seed: int) -> tuple[Clients, data.Images, data.Images]:
    """150 images of 14 x 14 a client; what all hold; the test set."""
    small = []
    for split in ("train", "test"):
        whole = data.load("mnist-5k", split)
        assert isinstance(whole, data.Images)
        small.append(replace(whole, x=nn.functional.avg_pool2d(whole.x, 2)))
    train, test = small
    rows = stream(seed, "rows").choice(len(train), ROWS)
    train = replace(train, x=train.x[rows], y=train.y[rows])
    return Clients(train, data.dirichlet(train.y, CLIENTS, ALPHA, seed)), train, test


def images(cell: Cell, report: Report) -> Record:
    """One system on one seed: the training loss after every aggregation."""
    clients, train, test = _federation(cell["seed"])
    torch.manual_seed(seed_for(cell["seed"], "init"))
    model = nn.Sequential(nn.Flatten(), nn.Linear(196, 10))
    local = LocalSGD(cell["lr"], batch_size=BATCH, steps=STEPS)
    loss = nn.functional.cross_entropy
    record: Record = {"time": [], "loss": [], "up": []}
    with _simulation(cell["system"], cell["scenario"], local, model, loss, clients, seed=cell["seed"]) as sim:
        record["first"] = sim.local.mean_loss(sim.session.initial, train.x, train.y)
        for row in sim.until(cell["until"]):
            vector = sim.method.model(sim.server)
            record["time"].append(row.time)
            record["loss"].append(sim.local.mean_loss(vector, train.x, train.y))
            record["up"].append(row.up)
            report(f"time {row.time:.1f}/{cell['until']}")
        record["accuracy"] = 100 * sim.accuracy(sim.method.model(sim.server), test)
        record["parameters"] = sim.local.space.numel
    return record


def tail(record: Record) -> float:
    """The mean loss over the aggregations of the last quarter of the time."""
    return fmean(_last(record))


def unrest(record: Record) -> float:
    """The standard deviation of the loss over the last quarter."""
    return stdev(_last(record))


def _last(record: Record) -> list[float]:
    start = record["time"][-1] * 3 / 4
    return [loss for time, loss in zip(record["time"], record["loss"], strict=True) if time > start]


def time_to(record: Record, target: float) -> float:
    """When the loss is first at a target or below; infinity if never."""
    reached = (t for t, loss in zip(record["time"], record["loss"], strict=True) if loss <= target)
    return next(reached, math.inf)


def at_times(record: Record, times: Sequence[float]) -> list[float]:
    """The loss of the model that there is at each of these ascending times."""
    found, known = [], list(zip(record["time"], record["loss"], strict=True))
    last, k = record["first"], 0
    for time in times:
        while k < len(known) and known[k][0] <= time:
            last = known[k][1]
            k += 1
        found.append(last)
    return found


# Quadratics: client i wants the model to be c_i, so a wrong weight ends at a wrong place.

DIM, SPREAD, RATE = 10, 3.0, 0.005


class _Point(nn.Module):
    """A model whose output for any input is its parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.zeros(DIM, dtype=torch.float64))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.x.expand(len(inputs), -1)


def _half_square(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().sum(-1).mean() / 2


def quadratics(cell: Cell, report: Report) -> Record:
    """One system on one draw of the c_i, standard normal times `SPREAD`: how far the mean of the second half of
    the run is from the two optima, and how far the model strays from that mean."""
    centres = SPREAD * stream(cell["seed"], "centres").normal(CLIENTS, DIM).double()
    none = torch.zeros(0, DIM)
    clients = [ClientData(torch.zeros(1, 1), c[None], none, none) for c in centres]
    local = LocalSGD(cell["lr"], steps=cell["steps"])
    codecs = {"up": Float64(), "down": Float64()}
    sim = _simulation(cell["system"], F80, local, _Point(), _half_square, clients, **codecs)
    models = []
    for row in sim.until(cell["until"]):
        models.append(sim.method.model(sim.server))
        report(f"time {row.time:.1f}/{cell['until']}")
    late = torch.stack(models[len(models) // 2 :])
    assert isinstance(sim.method, FedFix)
    aim = torch.tensor(sim.method.surrogate([1] * CLIENTS), dtype=torch.float64) @ centres
    return {
        "surrogate": float((late.mean(0) - aim).norm()),
        "optimum": float((late.mean(0) - centres.mean(0)).norm()),
        "stray": float(late.std(0).norm()),
    }
