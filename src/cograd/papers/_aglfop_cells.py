"""What one cell of AGLFOP's paper computes: a federation on a split of a data set, and its clients' counts."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cograd import data
from cograd.clients.aglfop import AGLFOP, ClientJoint, GroupedData, client_counts, split, with_groups
from cograd.clients.aglfop.federated import COUNTS, decided
from cograd.clients.baselines.fedavg import FedAvg
from cograd.clients.baselines.local_only import LocalOnly
from cograd.core.streams import seed_for, stream
from cograd.data.clients import ClientData, Clients
from cograd.data.kinds import Table
from cograd.engines.federated.protocol import ClientContext
from cograd.engines.federated.simulation import Simulation
from cograd.engines.federated.training import Gradient, LocalSGD
from cograd.models.mlp import MLP

if TYPE_CHECKING:
    from cograd.papers._lab import Cell, Record, Report

AVG, LOCAL = "FedAvg", "local only"
ROUNDS, EPOCHS, BATCH, WIDTH, CLIENTS = 10, 2, 1000, 64, 2
TRAIN = 0.8
STRENGTH = {"uniform": 0.0, "skew": 0.9, "synergy": 0.9}
PAPERS_STRENGTH = {"uniform": 0.0, "skew": 0.92, "synergy": 1.0}
SWAPPED = 0.01
"""Of the released code, as the paper's strengths."""


@dataclass(frozen=True)
class LocalAdam(LocalSGD):
    """Adam (arXiv 1412.6980) with its usual constants, its moments zero at the start of every round."""

    def run(
        self, ctx: ClientContext, data: ClientData, start: Tensor, gradient: Gradient | None = None
    ) -> Tensor:
        first, second, steps = torch.zeros_like(start), torch.zeros_like(start), 0

        def direction(v: Tensor, x: Tensor, y: Tensor) -> Tensor:
            nonlocal steps
            steps += 1
            ctx.count("grad", 1)
            g = (gradient or ctx.model.gradient)(v, x, y)
            first.mul_(0.9).add_(g, alpha=0.1)
            second.mul_(0.999).addcmul_(g, g, value=0.001)
            scale = second.div(1 - 0.999**steps).sqrt_().add_(1e-8)
            return first.div(1 - 0.9**steps).div_(scale)

        return super().run(ctx, data, start, direction)


@lru_cache(1)
def adult() -> tuple[Table, Tensor]:
    """Features without sex and education (87 columns), and the sex."""
    table = data.load("adult")
    assert isinstance(table, Table)
    return table.without("sex", "education"), table.sensitive["sex"]


def synthetic(alpha: float, seed: int) -> tuple[Table, Tensor]:
    """The paper's synthetic data: 500 examples of each class, in two dimensions, and a group that agrees with
    the class with probability ``alpha``."""
    draws = stream(seed, "synthetic").numpy
    positive = draws.multivariate_normal([2, 2], [[5, 1], [1, 5]], 500)
    negative = draws.multivariate_normal([-2, -2], [[10, 1], [1, 3]], 500)
    x = torch.from_numpy(positive).float(), torch.from_numpy(negative).float()
    y = torch.tensor([1, 0]).repeat_interleave(500)
    agree = torch.from_numpy(draws.random(1000)) < alpha
    table = Table("synthetic", "train", "", torch.cat(x), ("x0", "x1"), y, ("0", "1"), {}, {})
    return table, torch.where(agree, y, 1 - y)


def labels_of(how: str, alpha: float, seed: int) -> ClientJoint:
    """The synthetic data as the paper splits it: client, group and label."""
    table, z = synthetic(alpha, seed)
    parts = split(z, table.y, how, strength=PAPERS_STRENGTH[how], swapped=SWAPPED, seed=seed)
    clients = torch.empty(len(z), dtype=torch.int64)
    for client, rows in enumerate(parts.parts):
        clients[rows] = client
    return ClientJoint.from_predictions(clients, z, labels=table.y)


def federation(name: str, how: str, seed: int) -> list[GroupedData]:
    """The clients of a split: 80 % of the rows for training, the others to be counted, both dealt alike."""
    table, z = adult() if name == "adult" else synthetic(0.95, seed)
    order = stream(seed, "split").permutation(len(z))
    rows = order.tensor_split([int(TRAIN * len(z))])
    train, test = (replace(table, x=table.x[r], y=table.y[r]) for r in rows)
    groups = [z[r] for r in rows]
    parts = [
        split(z, half.y, how, strength=STRENGTH[how], clients=CLIENTS, seed=seed_for(seed, part))
        for z, half, part in zip(groups, (train, test), ("train", "test"), strict=True)
    ]
    return with_groups(Clients(train, parts[0], test, parts[1]), *groups)


def compute(cell: Cell, report: Report) -> Record:
    """Train one system on one split and seed.

    ``tests`` and ``trains`` are the counts (client, group, label, prediction) of the last round, by what each
    client uses: the global model, or its own. ``rows`` has FedAvg's audits.
    """
    clients = federation(cell["data"], cell["split"], cell["seed"])
    local = LocalAdam(cell["lr"], EPOCHS, min(BATCH, len(clients[0]) // 2))
    inner = FedAvg(local) if cell["system"] == AVG else LocalOnly(local)
    method = AGLFOP(inner) if cell["system"] == AVG else inner
    torch.manual_seed(seed_for(cell["seed"], "init"))
    width = clients[0].x.shape[1]
    model = MLP(width, WIDTH, 2) if cell["data"] == "adult" else nn.Linear(width, 2)
    with Simulation(method, model, nn.functional.cross_entropy, clients, seed=cell["seed"]) as sim:
        sim.run(cell["rounds"], progress=lambda row: report(f"round {row.round}/{cell['rounds']}"))
        tests, trains = (torch.stack(list(_counts(sim, held_out))) for held_out in (True, False))
        record: Record = {
            "tests": tests.tolist(),
            "trains": trains.tolist(),
            "round": [row.round for row in sim.history],
            "numel": sim.local.space.numel,
            "up": sim.tally.up,
        }
        if cell["system"] == AVG:
            assert torch.equal(tests, sim.server[COUNTS])
            record["rows"] = {
                name: [row.reports[name] for row in sim.history]
                for name in ("global", "local", "unique", "redundant", "masked")
            }
    return record


def _counts(sim: Simulation, held_out: bool) -> Iterator[Tensor]:
    for client, held in enumerate(sim.clients):
        vector = sim.method.personal(sim.server, sim.states[client], client)
        x, y, z = (held.test_x, held.test_y, held.test_z) if held_out else (held.x, held.y, held.z)
        yield client_counts(z, decided(sim.local.outputs(vector, x)), y, sizes=(2, 2))


def accuracy(record: Record) -> float:
    """On the held-out examples, in percent."""
    joint = ClientJoint.merge([torch.tensor(table) for table in record["tests"]])
    return 100 * joint.accuracy if joint.count else math.nan


def cell(system: str, name: str, how: str, seed: int, lr: float, rounds: int) -> dict[str, Any]:
    return {"system": system, "data": name, "split": how, "seed": seed, "lr": lr, "rounds": rounds}
