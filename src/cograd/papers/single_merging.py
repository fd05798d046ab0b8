"""A single merge: decentralized nodes that hardly ever talk, and one average at the end, against FedAvg.

Sixteen nodes train an MLP (196-64-64-10) on MNIST-5k pooled to 14 x 14, each on 256 fixed samples of its own
class mix (Dirichlet 0.1), with AdamW 1e-3, weight decay 5e-4, batch 32, 10 local steps a round, 100 rounds, from
shared and from per-node initial weights. All systems of a seed see the same data and batches. A second part
merges a BatchNorm ConvNet on CIFAR-5k with and without re-estimated statistics.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from cograd import data
from cograd.core.streams import stream
from cograd.data.partition import batches
from cograd.machines.single_merging.measures import descent_term
from cograd.machines.single_merging.merging import merge, recalibrated, shared, statistics, write
from cograd.machines.single_merging.mixing import Mixing
from cograd.machines.single_merging.sampling import class_weighted
from cograd.machines.single_merging.schedule import Schedule
from cograd.machines.single_merging.trainer import DecentralizedTrainer, replicas
from cograd.models.mlp import MLP

if TYPE_CHECKING:
    from cograd.papers._lab import Cell, Record, Report

NODES, ALPHA, SAMPLES, BATCH, LOCAL_STEPS, ROUNDS = 16, 0.1, 256, 32, 10, 100
LR, DECAY, PEERS = 1e-3, 5e-4, 0.2
GRID = (3e-4, 1e-3, 3e-3)
PILOT_SEEDS = (100, 101)
LOOKS = 20
"""Evaluations in a run."""

Init = Literal["shared", "per-node"]
INITS: tuple[Init, ...] = ("shared", "per-node")

SINGLE, PAIRWISE, ALONE, FEDAVG = "single merge", "single merge, pairwise", "no communication", "FedAvg"
WINDOWS = {start: f"window at {start} %" for start in (0, 22, 45, 67, 90)}
FIRST, LAST = WINDOWS[0], WINDOWS[90]
CONVNET = "BatchNorm ConvNet"
SYSTEMS = (SINGLE, PAIRWISE, ALONE, FEDAVG, *WINDOWS.values())


# One training.


def schedule(system: str, rounds: int) -> Schedule:
    """The rounds of a system. Those that end in a merge have it done by `train`, after a look at the nodes."""
    if system == FEDAVG:
        return Schedule.every_round(rounds)
    for start, name in WINDOWS.items():
        if name == system:
            return Schedule.window(rounds, rounds * start // 100, rounds // 10, PEERS)
    return Schedule.truncate(rounds, rounds - 1, 0.0 if system == ALONE else PEERS, 0.0)


def train(cell: Cell, report: Report) -> Record:
    """One system on one seed: accuracy of the nodes and of their average along the way, and messages."""
    nodes, rounds, seed = cell["nodes"], cell["rounds"], cell["seed"]
    train_x, train_y, test_x, test_y = _pooled()
    held = class_weighted(train_y, nodes, SAMPLES, ALPHA, seed)
    trainer = DecentralizedTrainer(
        replicas(lambda: MLP(196, 64, 64, 10), nodes, init=cell["init"], seed=seed),
        lambda p: torch.optim.AdamW(p, cell["lr"], weight_decay=DECAY),
        nn.functional.cross_entropy,
        schedule=schedule(cell["system"], rounds),
        mixing=Mixing("pairwise" if cell["system"] == PAIRWISE else "random", seed=seed),
        local_steps=LOCAL_STEPS,
    )
    history: dict[str, list[float]] = {"local": [], "merged": [], "consensus": [], "messages": [], "term": []}
    every = max(1, rounds // LOOKS)
    for step, batch in enumerate(_batches(nodes, seed, rounds * LOCAL_STEPS), 1):
        rows = held.gather(1, batch)
        trainer.step(train_x[rows], train_y[rows])
        if step % (every * LOCAL_STEPS) == 0:
            history["local"].append(_accuracy(trainer.outputs(test_x), test_y))
            history["merged"].append(_accuracy(_outputs(trainer.merged(), test_x), test_y))
            history["consensus"].append(trainer.consensus_error())
            history["messages"].append(_messages(trainer))
            if cell["terms"]:
                term = descent_term(trainer.models, train_x, train_y, nn.functional.cross_entropy, cell["lr"])
                history["term"].append(term.alignment)
            report(f"round {trainer.round}/{rounds}, nodes {history['local'][-1]:.1f} %")
    return {
        **history,
        **(_endings(trainer, test_x, test_y) if cell["system"] in (SINGLE, PAIRWISE, ALONE) else {}),
    }


def _endings(trainer: DecentralizedTrainer, test_x: Tensor, test_y: Tensor) -> Record:
    """Ways to end a run, each from its last local step: gossip rounds on a fixed graph, or the global merge."""
    end = trainer.state_dict()
    found: Record = {}
    for graph in ("ring", "exponential"):
        for rounds in (1, 5):
            trainer.load_state_dict(end)
            trainer.gossip(rounds, Mixing(graph))
            found[f"{graph} x {rounds}"] = _accuracy(trainer.outputs(test_x), test_y)
    trainer.load_state_dict(end)
    before = _messages(trainer)
    trainer.merge()
    merged = _accuracy(trainer.outputs(test_x), test_y)
    return {"gossip": found, "after merge": merged, "merge messages": _messages(trainer) - before}


def _pooled() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """MNIST-5k averaged over 2 x 2 pixels: training and test images (N, 1, 14, 14) and labels."""
    sets = [data.load("mnist-5k", split) for split in ("train", "test")]
    (train_x, train_y), (test_x, test_y) = ((nn.functional.avg_pool2d(s.x, 2), s.y) for s in sets)
    return train_x, train_y, test_x, test_y


def _batches(nodes: int, seed: int, steps: int) -> Iterator[Tensor]:
    """Each node's next rows of its samples: (nodes, BATCH), epoch after epoch."""
    for epoch in range(-(-steps // (SAMPLES // BATCH))):
        orders = [batches(SAMPLES, BATCH, seed * 1000 + node, epoch) for node in range(nodes)]
        for batch in zip(*orders, strict=True):
            if steps == 0:
                return
            steps -= 1
            yield torch.stack(batch)


@torch.no_grad()
def _outputs(model: nn.Module, x: Tensor) -> Tensor:
    outputs: Tensor = model.eval()(x)
    return outputs


def _accuracy(outputs: Tensor, y: Tensor) -> float:
    """Percent, over all nodes where the outputs are of several."""
    return 100 * float((outputs.argmax(-1) == y).float().mean())


def _messages(trainer: DecentralizedTrainer) -> float:
    """Bytes so far, in models."""
    return trainer.ledger.sent() / trainer.size


# BatchNorm.


class ConvNet(nn.Sequential):
    """Three convolutions with BatchNorm, pooled to one pixel: (B, 3, 32, 32) -> (B, 10)."""

    def __init__(self) -> None:
        layers: list[nn.Module] = []
        for n_in, n_out in ((3, 16), (16, 32), (32, 64)):
            layers += [nn.Conv2d(n_in, n_out, 3, padding=1), nn.BatchNorm2d(n_out), nn.ReLU(), nn.MaxPool2d(2)]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def train_convnet(cell: Cell, report: Report) -> Record:
    """A single merge of ConvNets on CIFAR-5k: test accuracy with each way to get the merged statistics."""
    nodes, rounds, seed = cell["nodes"], cell["rounds"], cell["seed"]
    train_set, test_set = data.load("cifar-5k", "train"), data.load("cifar-5k", "test")
    moments = train_set.moments()
    train_x, test_x = train_set.normalised(*moments).x, test_set.normalised(*moments).x
    held = class_weighted(train_set.y, nodes, SAMPLES, ALPHA, seed)
    models = replicas(ConvNet, nodes, init=cell["init"], seed=seed)
    trainer = DecentralizedTrainer(
        models,
        lambda p: torch.optim.AdamW(p, cell["lr"], weight_decay=DECAY),
        nn.functional.cross_entropy,
        schedule=Schedule.truncate(rounds, rounds - 1, PEERS, 0.0),
        mixing=Mixing(seed=seed),
        local_steps=LOCAL_STEPS,
        engine="loop",
    )
    for step, batch in enumerate(_batches(nodes, seed, rounds * LOCAL_STEPS), 1):
        rows = held.gather(1, batch)
        trainer.step(train_x[rows], train_set.y[rows])
        if step % LOCAL_STEPS == 0:
            report(f"round {trainer.round}/{rounds}")
    averaged, own, estimated = (merge(models) for _ in range(3))
    write(statistics(own), statistics(models[0]))
    order = stream(seed, "calibration").permutation(len(train_x))
    recalibrated(estimated, train_x[order].split(128))
    found = {"averaged": averaged, "node 0": own, "re-estimated": estimated}
    accuracy = {name: _accuracy(_outputs(model, test_x), test_set.y) for name, model in found.items()}
    return {
        **accuracy,
        "local": _accuracy(trainer.outputs(test_x), test_set.y),
        "tensors": len(shared(models[0])),
    }
