"""The training that runs on every host: an ordinary DDP script under torchrun, one system a run.

Rank 0 writes a JSON object: seconds of every step, digest of the weights, and, where epochs were asked for,
the test accuracy after each.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from cograd import data
from cograd.core.streams import seed_for
from cograd.data.partition import batches
from cograd.machines.dgc import DGC, PAPER_WARMUP, DensityWarmup
from cograd.models.mlp import MLP

BATCH, LR, MOMENTUM, DECAY = 32, 0.1, 0.9, 1e-4
DENSITY = 0.001
STEPS = 31  # of an epoch: 4,000 images, 128 a step
WIDTHS = (784, 2048, 1664, 10)  # 5.03 million parameters

Attach = Callable[[DistributedDataParallel, int], torch.optim.Optimizer]


def _sgd(ddp: DistributedDataParallel) -> torch.optim.SGD:
    return torch.optim.SGD(ddp.parameters(), lr=LR, momentum=MOMENTUM, weight_decay=DECAY)


def _dense(ddp: DistributedDataParallel, stage: int) -> torch.optim.Optimizer:
    return _sgd(ddp)


def _fp16(ddp: DistributedDataParallel, stage: int) -> torch.optim.Optimizer:
    ddp.register_comm_hook(None, default_hooks.fp16_compress_hook)
    return _sgd(ddp)


def _power(rank: int) -> Attach:
    def attach(ddp: DistributedDataParallel, stage: int) -> torch.optim.Optimizer:
        state = PowerSGDState(None, rank, start_powerSGD_iter=2, min_compression_rate=1)
        ddp.register_comm_hook(state, powerSGD_hook)
        return _sgd(ddp)

    return attach


def _dgc(ddp: DistributedDataParallel, stage: int) -> torch.optim.Optimizer:
    """``stage`` -1 trains with the warm-up; another one stays at that stage's density, to be timed."""
    optimizer = torch.optim.SGD(ddp.parameters(), lr=LR, weight_decay=DECAY)
    densities = (*PAPER_WARMUP, DENSITY)
    dgc = DGC(DENSITY, MOMENTUM, warmup=DensityWarmup(STEPS)) if stage < 0 else DGC(densities[stage], MOMENTUM)
    dgc.attach(ddp, optimizer)
    return optimizer


SYSTEMS: dict[str, Attach] = {
    "dense": _dense,
    "fp16": _fp16,
    **{f"powersgd-{rank}": _power(rank) for rank in (1, 2, 4)},
    "dgc": _dgc,
}


def train(system: str, seed: int, steps: int, stage: int, evaluate: bool) -> dict[str, object]:
    """``steps`` steps of one system; the record of this rank."""
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(seed_for(seed, "init"))
    train_set, test_set = data.load("mnist-5k", "train"), data.load("mnist-5k", "test")
    ddp = DistributedDataParallel(MLP(*WIDTHS))
    optimizer = SYSTEMS[system](ddp, stage)
    seconds, accuracy = list[float](), list[float]()
    for epoch in range(-(-steps // STEPS)):
        for batch in batches(len(train_set.y), size * BATCH, seed, epoch):
            if len(seconds) == steps:
                break
            began = time.monotonic()
            mine = batch[rank * BATCH : (rank + 1) * BATCH]
            optimizer.zero_grad()
            nn.functional.cross_entropy(ddp(train_set.x[mine]), train_set.y[mine]).backward()
            optimizer.step()
            seconds.append(time.monotonic() - began)
        if evaluate and rank == 0:
            with torch.no_grad():
                right = ddp.module(test_set.x).argmax(1) == test_set.y
            accuracy.append(100 * float(right.float().mean()))
    flat = torch.cat([p.detach().reshape(-1) for p in ddp.module.parameters()])
    digest = hashlib.blake2b(flat.numpy().tobytes(), digest_size=8).hexdigest()
    return {"seconds": seconds, "accuracy": accuracy, "digest": digest, "parameters": flat.numel()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--system", choices=SYSTEMS, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--stage", type=int, default=-1)
    parser.add_argument("--evaluate", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    record = train(args.system, args.seed, args.steps, args.stage, args.evaluate)
    if dist.get_rank() == 0:
        args.out.write_text(json.dumps(record))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
