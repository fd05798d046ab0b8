"""The training that runs on every host: an ordinary script under torchrun, one system a run.

Rank 0 writes a JSON object: seconds of every step, digest of the weights, and, where it was
asked for, the quality after every 31: test accuracy (mlp) or validation loss (lm).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from cograd import data
from cograd.core.streams import seed_for, stream
from cograd.data.partition import batches
from cograd.engines.transport import TorchDist
from cograd.machines.baselines.diloco import DiLoCo
from cograd.machines.dgc import DGC, PAPER_WARMUP, DensityWarmup
from cograd.machines.linear_sketch import LinearSketch
from cograd.machines.one_byte.optimizer import OneByte
from cograd.machines.streaming_diloco.fragments import transformer
from cograd.machines.streaming_diloco.method import StreamingDiLoCo
from cograd.machines.streaming_diloco.outer import nesterov
from cograd.models.gpt import GPT, next_token_loss
from cograd.models.mlp import MLP

MOMENTUM, DENSITY, SYNC, SAMPLES = 0.9, 0.001, 20, 4
POWER_START = 2
"""Steps before PowerSGD compresses."""
EPOCH = 31  # steps between evaluations: an epoch of mnist-5k


class Mnist:
    """MNIST-5k, 32 images a worker, an MLP of 5.03 million parameters; SGD."""

    lr, decay, batch = 0.1, 1e-4, 32

    def __init__(self) -> None:
        self.train, self.test = data.load("mnist-5k", "train"), data.load("mnist-5k", "test")

    def model(self) -> nn.Module:
        return MLP(784, 2048, 1664, 10)

    def batches(self, seed: int, rank: int, workers: int) -> Iterator[tuple[Tensor, Tensor]]:
        for epoch in range(10**9):
            for rows in batches(len(self.train.y), workers * self.batch, seed, epoch):
                mine = rows[rank * self.batch : (rank + 1) * self.batch]
                yield self.train.x[mine], self.train.y[mine]

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    def optimizer(self, model: nn.Module, momentum: float = MOMENTUM) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=self.lr, momentum=momentum, weight_decay=self.decay)

    def schedule(self, optimizer: torch.optim.Optimizer, step: int, steps: int) -> None:
        """The learning rate is constant."""

    def quality(self, model: nn.Module) -> float:
        return 100 * float((model(self.test.x).argmax(1) == self.test.y).float().mean())


class Shakespeare:
    """tiny-shakespeare by characters, 4 x 32 a worker, a GPT of 5.5 million parameters; AdamW with warm-up and
    cosine, gradients clipped at 1."""

    lr, batch, context = 1e-3, 4, 32

    def __init__(self) -> None:
        self.train, self.val = data.load("tiny-shakespeare", "train"), data.load("tiny-shakespeare", "val")

    def model(self) -> nn.Module:
        return GPT(len(self.train.vocabulary), width=256, blocks=7, heads=4, context=self.context)

    def batches(self, seed: int, rank: int, workers: int) -> Iterator[tuple[Tensor, Tensor]]:
        windows = torch.arange(self.context + 1)
        for step in range(10**9):
            draw = stream(seed, "slow link", step, rank)
            starts = torch.from_numpy(draw.numpy.integers(len(self.train) - self.context - 1, size=self.batch))
            rows = self.train.tokens[starts[:, None] + windows]
            yield rows[:, :-1], rows[:, 1:]

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return next_token_loss(model(batch[0]), batch[1])

    def optimizer(self, model: nn.Module, momentum: float = MOMENTUM) -> torch.optim.Optimizer:
        if momentum == 0:  # methods that bring the momentum themselves train with SGD
            return torch.optim.SGD(model.parameters(), lr=0.3)
        return torch.optim.AdamW(
            model.parameters(), lr=self.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True
        )

    def schedule(self, optimizer: torch.optim.Optimizer, step: int, steps: int) -> None:
        for group in optimizer.param_groups:
            group.setdefault("base", group["lr"])
            warm = min(1.0, (step + 1) / 50)
            group["lr"] = group["base"] * warm * (0.1 + 0.45 * (1 + math.cos(math.pi * step / max(steps, 1))))

    def quality(self, model: nn.Module) -> float:
        """Nats a character of the first 16,384 of the validation text."""
        tokens = self.val.tokens[: 16384 + 1]
        x, y = (t.reshape(-1, self.context) for t in (tokens[:-1], tokens[1:]))
        return float(next_token_loss(model(x), y, z=0.0))


Workload = Mnist | Shakespeare
WORKLOADS: dict[str, Callable[[], Workload]] = {"mlp": Mnist, "lm": Shakespeare}


@dataclass
class Running:
    """A system at work on this host."""

    model: nn.Module
    optimizer: torch.optim.Optimizer | None
    step: Callable[[Any], None]
    weights: Callable[[], AbstractContextManager[Any]] = nullcontext


Start = Callable[[nn.Module, Workload, int], Running]


def _descend(model: nn.Module, load: Workload, optimizer: torch.optim.Optimizer) -> Callable[[Any], None]:
    clip = isinstance(load, Shakespeare)

    def step(batch: Any) -> None:
        optimizer.zero_grad()
        load.loss(model, batch).backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def _ddp(register: Callable[[DistributedDataParallel], None], bucket_mb: int | None = None) -> Start:
    def start(model: nn.Module, load: Workload, stage: int) -> Running:
        ddp = DistributedDataParallel(model, bucket_cap_mb=bucket_mb)
        register(ddp)
        optimizer = load.optimizer(ddp)
        return Running(model, optimizer, _descend(ddp, load, optimizer))

    return start


def _power(rank: int) -> Start:
    """One bucket: the hook starts collectives from callbacks, whose order among several buckets differs from
    rank to rank under gloo, which then aborts."""

    def register(ddp: DistributedDataParallel) -> None:
        state = PowerSGDState(None, rank, start_powerSGD_iter=POWER_START, min_compression_rate=1)
        ddp.register_comm_hook(state, powerSGD_hook)

    return _ddp(register, bucket_mb=64)


def _exchange(make: Callable[[int], DGC | LinearSketch]) -> Start:
    def start(model: nn.Module, load: Workload, stage: int) -> Running:
        ddp = DistributedDataParallel(model)
        optimizer = load.optimizer(ddp, momentum=0.0)
        make(stage).attach(ddp, optimizer)
        return Running(model, optimizer, _descend(ddp, load, optimizer))

    return start


def _dgc(stage: int) -> DGC:
    """``stage`` -1 trains with the warm-up; another one stays at that stage's density, to be timed."""
    if stage < 0:
        return DGC(DENSITY, MOMENTUM, warmup=DensityWarmup(EPOCH))
    return DGC((*PAPER_WARMUP, DENSITY)[stage], MOMENTUM)


def _local(make: Callable[[nn.Module, torch.optim.Optimizer], StreamingDiLoCo]) -> Start:
    def start(model: nn.Module, load: Workload, stage: int) -> Running:
        optimizer = load.optimizer(model)
        diloco = make(model, optimizer)
        diloco.__enter__()
        return Running(model, optimizer, _descend(model, load, optimizer), diloco.outer_weights)

    return start


def _streaming(model: nn.Module, optimizer: torch.optim.Optimizer) -> StreamingDiLoCo:
    if isinstance(model, GPT):
        fragments: Any = transformer(model.blocks)
    else:
        layers = dict[str, list[str]]()
        for name, _ in model.named_parameters():
            layers.setdefault(name.rpartition(".")[0], []).append(name)
        fragments = layers
    return StreamingDiLoCo(model, optimizer, fragments=fragments, sync_every=SYNC, outer=nesterov(0.4))


def _one_byte(model: nn.Module, load: Workload, stage: int) -> Running:
    rate = 65 / sum(p.numel() for p in model.parameters())  # the largest usable one goes as 1 / d
    zo = OneByte(model, rate, samples=SAMPLES, transport=TorchDist())

    def step(batch: tuple[Tensor, Tensor]) -> None:
        parts = zip(*(part.chunk(SAMPLES) for part in batch), strict=True)
        zo.step(lambda part: load.loss(model, part), list(parts))

    return Running(model, None, step)


SYSTEMS: dict[str, Start] = {
    "dense": _ddp(lambda ddp: None),
    "fp16": _ddp(lambda ddp: ddp.register_comm_hook(None, default_hooks.fp16_compress_hook)),
    **{f"powersgd-{rank}": _power(rank) for rank in (1, 2, 4)},
    "dgc": _exchange(_dgc),
    "sketch": _exchange(lambda stage: LinearSketch(None, "countsketch", momentum=MOMENTUM)),
    "diloco": _local(lambda m, o: DiLoCo(m, o, sync_every=SYNC, outer=nesterov(0.2))),
    "streaming": _local(_streaming),
    "one-byte": _one_byte,
}
PERIODIC = ("diloco", "streaming")
"""Systems whose steps are not alike: the time of a step is the mean over whole periods of `SYNC` steps."""


def train(
    workload: str, system: str, seed: int, steps: int, stage: int, evaluate: bool, planned: int
) -> dict[str, object]:
    """``steps`` steps of one system, of a run of ``planned``; the record of this rank."""
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(seed_for(seed, "init"))
    load = WORKLOADS[workload]()
    model = load.model()
    running = SYSTEMS[system](model, load, stage)
    seconds, quality = list[float](), list[float]()
    for step, batch in enumerate(load.batches(seed, rank, size)):
        if step == steps:
            break
        if running.optimizer is not None:
            load.schedule(running.optimizer, step, planned)
        began = time.monotonic()
        running.step(batch)
        seconds.append(time.monotonic() - began)
        if evaluate and (step + 1) % EPOCH == 0 and rank == 0:
            with running.weights(), torch.no_grad():
                quality.append(load.quality(model))
    with running.weights():
        flat = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    digest = hashlib.blake2b(flat.numpy().tobytes(), digest_size=8).hexdigest()
    return {"seconds": seconds, "quality": quality, "digest": digest, "parameters": flat.numel()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workload", choices=WORKLOADS, default="mlp")
    parser.add_argument("--system", choices=SYSTEMS, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--planned", type=int, required=True)
    parser.add_argument("--stage", type=int, default=-1)
    parser.add_argument("--evaluate", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    record = train(args.workload, args.system, args.seed, args.steps, args.stage, args.evaluate, args.planned)
    if dist.get_rank() == 0:
        args.out.write_text(json.dumps(record))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
