"""A single merge: decentralized nodes that hardly ever talk, and one average at the end, against FedAvg.

Sixteen nodes train an MLP (196-64-64-10) on MNIST-5k, pooled to 14 x 14 and normalised. Each has 256 fixed
samples of its own class mix (Dirichlet 0.1) and AdamW 1e-3 with weight decay 5e-4 and batch 32; a round is 10
local steps, and there are 100 rounds, from shared and from per-node initial weights. All systems of a seed see
the same data and batches. A second part merges BatchNorm ConvNets on CIFAR-5k with and without re-estimated
statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from cograd import data
from cograd.core.claim import Claim, Curve, Op, Row
from cograd.core.streams import stream
from cograd.core.threads import one_thread
from cograd.data.partition import batches
from cograd.machines.single_merging.measures import descent_term
from cograd.machines.single_merging.merging import merge, recalibrated, statistics, write
from cograd.machines.single_merging.mixing import Mixing
from cograd.machines.single_merging.sampling import class_weighted
from cograd.machines.single_merging.schedule import Schedule
from cograd.machines.single_merging.trainer import DecentralizedTrainer, replicas
from cograd.models.mlp import MLP
from cograd.papers._paper import Findings, Paper

if TYPE_CHECKING:
    from cograd.papers._lab import Cell, Lab, Record, Report

NODES, ALPHA, SAMPLES, BATCH, LOCAL_STEPS, ROUNDS = 16, 0.1, 256, 32, 10, 100
LR, DECAY, PEERS = 1e-3, 5e-4, 0.2
GRID = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
PILOT_SEEDS = (100, 101)
EVERY = 5
"""Rounds between evaluations."""
TERM_ROWS = 500
"""Training images on which every fourth evaluation measures the descent lemma's term."""

Init = Literal["shared", "per-node"]
INITS: tuple[Init, ...] = ("shared", "per-node")

SINGLE, PAIRWISE, ALONE, FEDAVG = "single merge", "single merge, pairwise", "no communication", "FedAvg"
WINDOWS = {start: f"window at {start} %" for start in (0, 22, 45, 67, 90)}
FIRST, LAST = WINDOWS[0], WINDOWS[90]
CONVNET = "BatchNorm ConvNet"
CONV_NODES, CONV_ROUNDS = 8, 30
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
    train_x, train_y, test_x, test_y = _pooled("mnist-5k")
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
    for step, batch in enumerate(_batches(nodes, seed, rounds * LOCAL_STEPS), 1):
        rows = held.gather(1, batch)
        trainer.step(train_x[rows], train_y[rows])
        if step % (EVERY * LOCAL_STEPS) == 0:
            history["local"].append(_accuracy(trainer.outputs(test_x), test_y))
            history["merged"].append(_accuracy(_outputs(trainer.merged(), test_x), test_y))
            history["consensus"].append(trainer.consensus_error())
            history["messages"].append(_messages(trainer))
            if cell["system"] == SINGLE and len(history["local"]) % 4 == 0:
                history["term"].append(_alignment(trainer, train_x[:TERM_ROWS], train_y[:TERM_ROWS]))
            report(f"round {trainer.round}/{rounds}, nodes {history['local'][-1]:.1f} %")
    return {
        **history,
        **(_endings(trainer, test_x, test_y) if cell["system"] in (SINGLE, PAIRWISE, ALONE) else {}),
    }


def _alignment(trainer: DecentralizedTrainer, x: Tensor, y: Tensor) -> float:
    """grad L . grad Tr(H Gamma): U_t without its step size (AdamW has none that is the theory's)."""
    return descent_term(trainer.models, x, y, nn.functional.cross_entropy, lr=0.0, smoothness=0.0).alignment


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


@lru_cache(2)
def _pooled(name: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A set averaged over 2 x 2 pixels and normalised: training and test images (N, C, H/2, W/2), labels."""
    train_set, test_set = data.load(name, "train"), data.load(name, "test")
    assert isinstance(train_set, data.Images)
    assert isinstance(test_set, data.Images)
    pooled = [replace(s, x=nn.functional.avg_pool2d(s.x, 2)) for s in (train_set, test_set)]
    train_x, test_x = (s.normalised(*pooled[0].moments()).x for s in pooled)
    return train_x, train_set.y, test_x, test_set.y


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
    """Six convolutions with BatchNorm, pooled to one pixel: (B, 3, 16, 16) -> (B, 10)."""

    def __init__(self) -> None:
        layers: list[nn.Module] = []
        for n_in, n_out, pool in ((3, 16, 0), (16, 16, 1), (16, 32, 0), (32, 32, 1), (32, 32, 0), (32, 32, 0)):
            layers += [nn.Conv2d(n_in, n_out, 3, padding=1, bias=False), nn.BatchNorm2d(n_out), nn.ReLU()]
            layers += [nn.MaxPool2d(2)] * pool
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


def train_convnet(cell: Cell, report: Report) -> Record:
    """A single merge of ConvNets on CIFAR-5k: test accuracy with each way to get the merged statistics."""
    nodes, rounds, seed = cell["nodes"], cell["rounds"], cell["seed"]
    train_x, train_y, test_x, test_y = _pooled("cifar-5k")
    held = class_weighted(train_y, nodes, SAMPLES, ALPHA, seed)
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
        trainer.step(train_x[rows], train_y[rows])
        if step % LOCAL_STEPS == 0:
            report(f"round {trainer.round}/{rounds}")
    averaged, own, estimated = (merge(models) for _ in range(3))
    write(statistics(own), statistics(models[0]))
    order = stream(seed, "calibration").permutation(len(train_x))
    recalibrated(estimated, train_x[order].split(128))
    found = {"averaged": averaged, "node 0": own, "re-estimated": estimated}
    accuracy = {name: _accuracy(_outputs(model, test_x), test_y) for name, model in found.items()}
    return {**accuracy, "local": _accuracy(trainer.outputs(test_x), test_y)}


# The cells of a scale, and what follows from their records.


def compute(cell: Cell, report: Report) -> Record:
    if cell["system"] == CONVNET:
        return train_convnet(cell, report)
    with one_thread():
        return train(cell, report)


def cell(system: str, seed: int, init: Init, nodes: int, rounds: int, lr: float = LR) -> dict[str, Any]:
    return {"system": system, "seed": seed, "init": init, "nodes": nodes, "rounds": rounds, "lr": lr}


def run(lab: Lab) -> Findings:
    """``full``: every system from both initialisations, the main ones also at their own best learning rate, and
    the ConvNets. ``smoke``: 4 nodes for 20 rounds from per-node weights, of which nothing is claimed but what
    is exact."""
    full = lab.scale == "full"
    nodes, rounds = (NODES, ROUNDS) if full else (4, 20)
    inits = INITS if full else INITS[1:]
    systems = SYSTEMS if full else (SINGLE, ALONE, FEDAVG, FIRST, LAST)
    cells = [cell(s, seed, i, nodes, rounds) for i in inits for seed in lab.seeds for s in systems]
    tuned: dict[tuple[str, Init], float] = {}
    if full:
        compared = [(s, i) for i in INITS for s in (SINGLE, FEDAVG)]
        pilots = [
            cell(s, seed, i, nodes, rounds, lr) for s, i in compared for lr in GRID for seed in PILOT_SEEDS
        ]
        tuned = _best_rates(pilots, lab.map(pilots, compute), compared)
        cells += [
            cell(s, seed, i, nodes, rounds, lr)
            for (s, i), lr in tuned.items()
            if lr != LR
            for seed in lab.seeds
        ]
        cells += [cell(CONVNET, seed, i, CONV_NODES, CONV_ROUNDS) for i in INITS for seed in lab.seeds]
    runs = Runs(cells, lab.map(cells, compute), lab.seeds)
    claims = [*_exact(runs, nodes), *(c for i in inits for c in _measured(runs, i, asserted=full))]
    if full:
        claims += [c for i in INITS for c in (*_tuned(runs, i, tuned), *_batch_norm(runs, i))]
        claims += _quoted()
    table, curves = _table(runs, systems, inits, tuned), _curves(runs, systems, inits, rounds)
    return Findings(_explained(claims), table, curves)


class Runs:
    """Records by (system, initialisation, learning rate): one number a seed, in the order of the seeds."""

    def __init__(self, cells: Sequence[Cell], records: Sequence[Record], seeds: Sequence[int]) -> None:
        self.seeds = seeds
        self._records = {
            (c["system"], c["init"], c["seed"], c["lr"]): r for c, r in zip(cells, records, strict=True)
        }

    def records(self, system: str, init: Init, lr: float = LR) -> list[Record]:
        return [self._records[system, init, seed, lr] for seed in self.seeds]

    def last(self, metric: str, system: str, init: Init, lr: float = LR) -> list[float]:
        return [float(r[metric][-1]) for r in self.records(system, init, lr)]

    def spent(self, system: str, init: Init) -> list[float]:
        """Models sent in the whole run, the merge at its end included."""
        return [r["messages"][-1] + r.get("merge messages", 0.0) for r in self.records(system, init)]

    def has(self, system: str) -> bool:
        return any(system == key[0] for key in self._records)


def _best_rates(
    pilots: Sequence[Cell], records: Sequence[Record], compared: Sequence[tuple[str, Init]]
) -> dict[tuple[str, Init], float]:
    """Each system's learning rate of the grid with the best mean merged accuracy on the pilot seeds."""

    def score(system: str, init: Init, lr: float) -> float:
        found = zip(pilots, records, strict=True)
        return mean(
            float(r["merged"][-1]) for c, r in found if (c["system"], c["init"], c["lr"]) == (system, init, lr)
        )

    return {(s, i): max(GRID, key=lambda lr: score(s, i, lr)) for s, i in compared}


def _paired(op: Callable[[float, float], float], a: Sequence[float], b: Sequence[float]) -> list[float]:
    return [op(x, y) for x, y in zip(a, b, strict=True)]


def _minus(a: Sequence[float], b: Sequence[float]) -> list[float]:
    return _paired(lambda x, y: x - y, a, b)


def _over(a: Sequence[float], b: Sequence[float]) -> list[float]:
    return _paired(lambda x, y: x / y if y else float("inf"), a, b)


SOURCE = "arXiv:2507.06542"
BEFOREHAND = "set before the recorded run, from pilot runs on two other seeds"
EXPECTED = "set before any run here, from an independent implementation's pilot runs of the same setting"


def _exact(runs: Runs, nodes: int) -> list[Claim]:
    single = sum(Schedule.single_merge(rounds).dense_rounds(NODES) == 1 for rounds in range(1, 2001))
    merges = [float(r["merge messages"]) for r in runs.records(SINGLE, "per-node")]
    return [
        Claim(
            id="exact.one-dense-round",
            text="single_merge(T) has exactly one dense round, for every T of 1 .. 2000",
            source=f"{SOURCE}, Sec. 4.3",
            kind="exact",
            values=[float(single)],
            op="==",
            threshold=2000.0,
            threshold_source="the definition, counted in whole rounds",
            unit="schedules",
        ),
        Claim(
            id="exact.merge-bytes",
            text="The merge sends 2 (m - 1) models in total",
            source=f"{SOURCE}, Sec. 4.3: O(m R P T + 2 m P)",
            kind="exact",
            values=merges,
            op="==",
            threshold=2.0 * (nodes - 1),
            threshold_source="a ring all-reduce",
            unit="models",
        ),
    ]


def _measured(runs: Runs, init: Init, *, asserted: bool) -> list[Claim]:
    """Claims (1) to (5) from one initialisation. A single merge is judged by its last local step's models."""
    start = f"{init} initial weights"
    claims: list[Claim] = []

    def claim(
        id: str,
        text: str,
        values: Sequence[float],
        source: str,
        op: Op | None = None,
        threshold: float | None = None,
        unit: str = "points",
        threshold_source: str = EXPECTED,
    ) -> None:
        claimed = op is not None and asserted
        claims.append(
            Claim(
                id=f"{id}.{init}",
                text=f"{start}: {text}",
                source=f"{SOURCE}, {source}",
                kind="measured",
                values=values,
                op=op if claimed else None,
                threshold=threshold if claimed else None,
                threshold_source=threshold_source if claimed else None,
                unit=unit,
            )
        )

    alone, fedavg = runs.last("merged", ALONE, init), runs.last("local", FEDAVG, init)
    for system, key in ((SINGLE, ""), (PAIRWISE, ".pairwise")):
        if not runs.has(system):
            continue
        local, merged = runs.last("local", system, init), runs.last("merged", system, init)
        fraction = _over(_minus(merged, local), _minus(fedavg, local))
        saved = _over(runs.spent(FEDAVG, init), runs.spent(system, init))
        name = "" if system == SINGLE else ", pairwise matching"
        claim(
            f"merge{key}",
            f"what one merge gains over the nodes{name}",
            _minus(merged, local),
            "Fig. 1",
            ">=",
            20,
        )
        claim(
            f"contact{key}",
            f"merged model with R = 0.2 less that without communication{name}",
            _minus(merged, alone),
            "Fig. 2c",
            ">=",
            30,
        )
        claim(
            f"recovered{key}",
            f"share of the way from the nodes to FedAvg that the merge makes{name}",
            fraction,
            "Fig. 1",
            ">=",
            0.7,
            "",
        )
        claim(f"cost{key}", f"FedAvg's messages over its own{name}", saved, "Sec. 4.3", ">=", 7, "x")
    claim(
        "mergeable",
        "share of the evaluations in which the merged model is better than the nodes, R = 0.2",
        [
            mean(float(m > v) for m, v in zip(r["merged"], r["local"], strict=True))
            for r in runs.records(SINGLE, init)
        ],
        "Fig. 1",
        unit="",
    )
    claim(
        "zero",
        "accuracy of the merged model without communication, its best in the run",
        [max(r["merged"]) for r in runs.records(ALONE, init)],
        "Fig. 2c",
        unit="%",
    )
    terms = [r["term"] for r in runs.records(SINGLE, init)]
    claim(
        "sharpening",
        "share of the evaluations in which grad L . grad Tr(H Gamma) is negative, R = 0.2",
        [mean(float(v < 0) for v in of) for of in terms],
        "Theorem 1",
        unit="",
    )
    _windows(runs, init, fedavg, claim)
    _gossip(runs, init, claim)
    return claims


def _windows(runs: Runs, init: Init, fedavg: Sequence[float], claim: Callable[..., None]) -> None:
    last, first = runs.last("local", LAST, init), runs.last("local", FIRST, init)
    claim(
        "window",
        "nodes' accuracy with a dense window in the last tenth less that with one in the first",
        _minus(last, first),
        "Fig. 2a",
        ">=",
        25,
    )
    claim(
        "window.budget",
        "messages of the last window over those of the first",
        _over(runs.spent(LAST, init), runs.spent(FIRST, init)),
        "Fig. 2a",
        unit="x",
    )
    claim("window.fedavg", "last window less FedAvg", _minus(last, fedavg), "Fig. 2a", ">=", -5)
    claim(
        "window.cost",
        "FedAvg's messages over those of the last window",
        _over(runs.spent(FEDAVG, init), runs.spent(LAST, init)),
        "Sec. 4.3",
        ">=",
        4.5,
        "x",
        BEFOREHAND,
    )
    if all(runs.has(name) for name in WINDOWS.values()):
        curves = zip(*(runs.last("local", name, init) for name in WINDOWS.values()), strict=True)
        claim(
            "window.order",
            "share of neighbouring windows of which the later one is better",
            [mean(float(b > a) for a, b in pairwise(curve)) for curve in curves],
            "Fig. 2a, 2b",
            ">=",
            1,
            "",
            "the paper: monotonically",
        )


def _gossip(runs: Runs, init: Init, claim: Callable[..., None]) -> None:
    """Fig. C.6: a few gossip rounds in place of the global merge, as a share of what the merge gains."""
    records = runs.records(SINGLE, init)

    def share(graph: str, rounds: int) -> list[float]:
        nodes = [float(r["local"][-1]) for r in records]
        ended = [float(r["gossip"][f"{graph} x {rounds}"]) for r in records]
        return _over(_minus(ended, nodes), _minus([float(r["after merge"]) for r in records], nodes))

    for graph in ("ring", "exponential"):
        one, five = share(graph, 1), share(graph, 5)
        bound = (">=", 0.5, "", BEFOREHAND) if graph == "exponential" else (None, None, "", "")
        claim(
            f"gossip.{graph}.1",
            f"share of the merge's gain by one round on the {graph} graph",
            one,
            "Fig. C.6",
            *bound,
        )
        claim(f"gossip.{graph}.5", f"the same by five rounds on the {graph} graph", five, "Fig. C.6", unit="")
        claim(
            f"gossip.{graph}.more",
            f"what the four further rounds on the {graph} graph add to that share",
            _minus(five, one),
            "Fig. C.6",
            ">=",
            0,
            "",
            "the paper's order",
        )


def _tuned(runs: Runs, init: Init, tuned: Mapping[tuple[str, Init], float]) -> list[Claim]:
    single, fedavg = (tuned[s, init] for s in (SINGLE, FEDAVG))
    rates = f"{SINGLE} {single:g}, {FEDAVG} {fedavg:g}"
    local, merged = (runs.last(metric, SINGLE, init, single) for metric in ("local", "merged"))
    best = runs.last("local", FEDAVG, init, fedavg)
    source = f"learning rates of {GRID} chosen on seeds {PILOT_SEEDS}: {rates}"
    return [
        Claim(
            id=f"tuned.{key}.{init}",
            text=f"{init} initial weights, each at its own best learning rate: {text}",
            source=source,
            kind="measured",
            values=values,
            unit=unit,
        )
        for key, text, values, unit in (
            ("recovered", "share of the way to FedAvg", _over(_minus(merged, local), _minus(best, local)), ""),
            ("gap", "FedAvg less the merged model", _minus(best, merged), "points"),
        )
    ]


def _batch_norm(runs: Runs, init: Init) -> list[Claim]:
    """Node 0's statistics in the merged model are what a merge of the parameters alone would leave."""
    records = runs.records(CONVNET, init)
    estimated = [float(r["re-estimated"]) for r in records]

    def gain(key: str, named: str, asserted: bool) -> Claim:
        return Claim(
            id=f"batch-norm.{key.replace(' ', '-')}.{init}",
            text=f"{init} initial weights, merged {CONVNET}: what re-estimated statistics gain over {named}",
            source=f"{SOURCE}, merged model of the official code",
            kind="measured",
            values=_minus(estimated, [float(r[key]) for r in records]),
            op=">=" if asserted else None,
            threshold=5.0 if asserted else None,
            threshold_source="set before any recorded run, from a pilot run on seed 101" if asserted else None,
            unit="points",
        )

    return [gain("node 0", "node 0's", True), gain("averaged", "averaged ones", False)]


def _quoted() -> list[Claim]:
    rows = (
        ("headline", "32 nodes, Tiny ImageNet, R = 0.2: after one merge on par with FedAdamW", "Fig. 1"),
        ("zero", "without communication the merged model's accuracy is nearly zero throughout", "Fig. 2c"),
        ("windows", "CIFAR-100, 16 nodes: late dense windows beat early ones monotonically", "Fig. 2a, 2b"),
    )
    return [Claim(f"paper.{key}", text, f"{SOURCE}, {figure}", "reported") for key, text, figure in rows]


def _explained(claims: Sequence[Claim]) -> list[Claim]:
    """With the reason found, where a claim did not hold in the recorded run."""
    return [
        replace(
            c,
            reason={
                "window.order.shared": (
                    "Nodes differ by less than a point for windows at 22, 45 and 67 %, and by 2 to 3 from "
                    "seed to "
                    "seed; only the last window, after which nobody is alone for long, stands out."
                ),
                "window.order.per-node": (
                    "Nodes differ by less than a point for windows at 22, 45 and 67 %, and by 2 to 3 from "
                    "seed to "
                    "seed; only the last window, after which nobody is alone for long, stands out."
                ),
                "batch-norm.node-0.per-node": (
                    "There is little to gain: nodes that began at weights of their own merge into a network "
                    "near "
                    "chance, 13.8 % with statistics re-estimated and 10.0 % with node 0's (a node alone: "
                    "17.6 %)."
                ),
            }.get(c.id),
        )
        if c.holds is False
        else c
        for c in claims
    ]


def _table(
    runs: Runs, systems: Sequence[str], inits: Sequence[Init], tuned: Mapping[tuple[str, Init], float]
) -> list[Row]:
    rows = []
    for init in inits:
        for system in systems:
            name = f"{system}, {init}"
            rows += [
                Row(name, "nodes", "%", runs.last("local", system, init)),
                Row(name, "merged", "%", runs.last("merged", system, init)),
                Row(name, "messages", "models", runs.spent(system, init)),
                Row(name, "consensus error", "", runs.last("consensus", system, init)),
            ]
            if (system, init) in tuned:
                lr = tuned[system, init]
                rows.append(Row(name, "best lr", "", [lr]))
                rows.append(Row(name, "merged at best lr", "%", runs.last("merged", system, init, lr)))
        if runs.has(CONVNET):
            records, name = runs.records(CONVNET, init), f"{CONVNET}, {init}"
            rows.append(Row(name, "nodes", "%", [float(r["local"]) for r in records]))
            for key in ("averaged", "node 0", "re-estimated"):
                rows.append(Row(name, f"merged, statistics {key}", "%", [float(r[key]) for r in records]))
    return rows


def _curves(runs: Runs, systems: Sequence[str], inits: Sequence[Init], rounds: int) -> list[Curve]:
    curves = []
    x = list(range(EVERY, rounds + 1, EVERY))
    for init in inits:
        for system in systems:
            records, name = runs.records(system, init), f"{system}, {init}"
            for metric, key in (("nodes, %", "local"), ("merged, %", "merged"), ("messages", "messages")):
                curves.append(Curve(name, metric, "round", x, [r[key] for r in records]))
        if all(runs.has(name) for name in WINDOWS.values()):
            ends = zip(*(runs.last("local", name, init) for name in WINDOWS.values()), strict=True)
            curves.append(
                Curve(f"windows, {init}", "nodes, %", "start of the window, %", list(WINDOWS), list(ends))
            )
    return curves


# The picture, from the result alone.

COLOURS = {SINGLE: "#1b6ca8", ALONE: "#d95f02", FEDAVG: "#444444"}
STYLES = {"shared": "-", "per-node": "--"}
WINDOW_COLOUR = "#2a9d5c"


def draw(result: dict[str, Any], path: Path) -> None:
    """Nodes and their average along the run, accuracy against messages, and where the window lies."""
    from cograd.papers._plot import figure

    curves = {(c["system"], c["metric"]): c for c in result["curves"]}
    inits = [i for i in INITS if (f"{SINGLE}, {i}", "nodes, %") in curves]
    windows = [i for i in inits if (f"windows, {i}", "nodes, %") in curves]
    seeds = len(result["seeds"])
    title = (
        f"Single merging on MNIST-5k, {seeds} seed{'s' * (seeds > 1)}: nodes (dotted) and their average (solid)"
    )
    with figure(path, len(inits) + 1 + bool(windows), title) as axes:
        for ax, init in zip(axes, inits, strict=False):
            for system, colour in COLOURS.items():
                nodes, merged = (curves[f"{system}, {init}", m] for m in ("nodes, %", "merged, %"))
                ax.plot(merged["x"], merged["mean"], color=colour, label=system)
                ax.plot(nodes["x"], nodes["mean"], ":", color=colour)
            ax.set(xlabel="round", ylabel="test accuracy, %", title=f"{init} initial weights", ylim=(0, 100))
        axes[0].legend(frameon=False, fontsize=8, loc="lower right")
        _draw_costs(axes[len(inits)], curves, inits)
        if windows:
            _draw_windows(axes[-1], curves, windows)


def _draw_costs(ax: Any, curves: Mapping[tuple[str, str], Any], inits: Sequence[Init]) -> None:
    """Average of the nodes against models sent, and where each window ends."""
    for init in inits:
        named = init == inits[0]
        for system in (SINGLE, FEDAVG):
            sent, merged = (curves[f"{system}, {init}", m] for m in ("messages", "merged, %"))
            style = {"color": COLOURS[system], "label": system if named else None}
            ax.plot(sent["mean"], merged["mean"], STYLES[init], **style)
        for system, mark, name in ((FIRST, "v", "first"), (LAST, "^", "last")):
            sent, nodes = (curves[f"{system}, {init}", m] for m in ("messages", "nodes, %"))
            style = {
                "color": WINDOW_COLOUR,
                "markerfacecolor": WINDOW_COLOUR if STYLES[init] == "-" else "white",
            }
            label = f"window, {name} tenth" if named else None
            ax.plot(sent["mean"][-1], nodes["mean"][-1], mark, label=label, **style)
    ax.set(xscale="log", xlabel="models sent by all nodes", ylabel="test accuracy, %")
    ax.set(ylim=(0, 125), yticks=range(0, 101, 20), title="against messages (dashed: per-node)")
    ax.legend(frameon=False, fontsize=8, ncols=2, loc="upper left")


def _draw_windows(ax: Any, curves: Mapping[tuple[str, str], Any], inits: Sequence[Init]) -> None:
    for init in inits:
        curve = curves[f"windows, {init}", "nodes, %"]
        style = {"color": WINDOW_COLOUR, "capsize": 2, "label": init}
        ax.errorbar(curve["x"], curve["mean"], curve["sd"], fmt="o" + STYLES[init], **style)
    ax.set(xlabel="start of the dense window, % of the run", ylabel="nodes' accuracy at the end, %")
    ax.set(ylim=(0, 100), title="a dense tenth of the run")
    ax.legend(frameon=False, fontsize=8, loc="upper left")


USAGE = """\
import torch, torch.distributed as dist
from cograd.machines import Schedule, SingleMerging

dist.init_process_group("gloo")
model = torch.nn.Linear(784, 10)  # not in DistributedDataParallel: nodes train alone between rounds
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
schedule = Schedule.single_merge(rounds=100, low=0.2)  # one peer in a fifth of the rounds, all in the last
merging = SingleMerging(model, optimizer, schedule=schedule, local_steps=10)
# ... your training loop, unchanged, for 1000 steps; merging.recalibrate(loader) if there is BatchNorm
"""

PAPER = Paper(
    slug="single-merging",
    title="On the Surprising Effectiveness of a Single Global Merging in Decentralized Learning",
    authors="Tongtian Zhu, Tianyu Zhang, Mingze Wang, Zhanpeng Zhou, Can Wang",
    arxiv="2507.06542",
    venue="ICLR 2026",
    room="machines",
    entry="cograd.machines.SingleMerging",
    module=__name__,
    summary="decentralized nodes share their models late, and once with everyone",
    usage=USAGE,
    datasets=("mnist-5k", "cifar-5k"),
    seeds=5,
    run=run,
    draw=draw,
)
