"""Streaming DiLoCo beside torchft's, on torchft's schedule and without quantisation: numbers and time a step.

    python -m bench.torchft_diloco [--rounds 3] [--json]

Two worker processes over gloo, a GPT of 0.3 M parameters in three fragments, H = 12, tau = 2, alpha = 0.5,
AdamW inside and SGD with Nesterov momentum outside. Both start from the same weights and see the same batches.
After 3 H steps the replicas' and the outer parameters are compared. Both are trained in turn, and the time of
every step is taken. Needs torchft 0.2 (``pip install torchft``), which brings a lighthouse and a manager; both
run on a CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from cograd.core.codecs import Float32
from cograd.engines.launch import Workers
from cograd.engines.worker import Context
from cograd.machines import StreamingDiLoCo
from cograd.machines.streaming_diloco import nesterov, transformer
from cograd.models import GPT
from cograd.models.gpt import next_token_loss

WORKERS, H, TAU, ALPHA = 2, 12, 2, 0.5
COMPARED = 3 * H
OUTER_LR, MOMENTUM = 0.4, 0.9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="how often each is trained, in turn")
    parser.add_argument("--json", action="store_true", help="print figures as JSON")
    options = parser.parse_args()
    from torchft._torchft import LighthouseServer

    lighthouse = LighthouseServer(bind="127.0.0.1:0", min_replicas=WORKERS, join_timeout_ms=1000)
    found: dict[str, list[dict[str, Any]]] = {"cograd": [], "torchft": []}
    try:
        with Workers(WORKERS, threads=1) as workers:
            for number in range(options.rounds):
                for name in found:
                    args = {"name": name, "lighthouse": lighthouse.address(), "number": number}
                    found[name].append(workers.call("bench.torchft_diloco:train", args)[0])
    finally:
        lighthouse.shutdown()
    figures = compare(found)
    if options.json:
        json.dump(figures, sys.stdout, indent=1)
    else:
        show(figures)


def compare(found: dict[str, list[dict[str, Any]]]) -> dict[str, float]:
    """Largest differences after 3 H steps, and medians of the steps' times in milliseconds: on the wall, which
    says little on a busy machine, and of the process's threads on the processor."""
    ours, theirs = found["cograd"][0], found["torchft"][0]
    figures = {
        f"largest difference of {what}": float(
            (torch.tensor(ours[what]) - torch.tensor(theirs[what])).abs().max()
        )
        for what in ("theta", "g")
    }
    for clock in ("wall", "cpu"):
        pairs = zip(found["cograd"], found["torchft"], strict=True)
        ratios = [median(a[clock][H:]) / median(b[clock][H:]) for a, b in pairs]
        figures[f"{clock}: cograd over torchft, median over rounds"] = median(ratios)
        for name, runs in found.items():
            every = [step for run in runs for step in run[clock][H:]]
            receiving = [step for run in runs for step in run[clock][H + 3 :: H // 3]]
            figures[f"{clock}: {name}, median step"] = median(every)
            figures[f"{clock}: {name}, median receiving step"] = median(receiving)
    return figures


def show(figures: dict[str, float]) -> None:
    table = Table("figure", "value", title=f"Streaming DiLoCo, {WORKERS} processes, {torch.__version__}")
    for name, value in figures.items():
        table.add_row(name, f"{value:.3g}" + (" ms" if name.endswith("step") else ""))
    Console().print(table)


# What runs in a worker process.


def train(ctx: Context, name: str, lighthouse: str, number: int) -> dict[str, Any]:
    """One training: theta and g after 3 H steps, and the time of each step of 6 H."""
    torch.manual_seed(0)
    model = GPT(65, width=64, blocks=6, heads=4, context=32)
    inner = torch.optim.AdamW(model.parameters(), lr=1e-3)
    kept, times = {}, {"wall": [], "cpu": []}
    with _attached(name, ctx, model, inner, lighthouse, number) as outer:
        for step in range(2 * COMPARED):
            batch = _batch(step, ctx.rank)
            wall, cpu = time.perf_counter(), time.process_time()
            next_token_loss(model(batch[:, :-1]), batch[:, 1:]).backward()
            inner.step()
            inner.zero_grad()
            times["wall"].append(1000 * (time.perf_counter() - wall))
            times["cpu"].append(1000 * (time.process_time() - cpu))
            if step + 1 == COMPARED:
                kept = {"theta": _flat(list(model.parameters())), "g": _flat(outer())}
    return {**kept, **times}


def _flat(tensors: list[Tensor]) -> list[float]:
    return torch.cat([t.detach().reshape(-1) for t in tensors]).tolist()


def _batch(step: int, rank: int) -> Tensor:
    draw = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randint(65, (8, 33), generator=draw)


@contextmanager
def _attached(
    name: str, ctx: Context, model: GPT, inner: torch.optim.Optimizer, lighthouse: str, number: int
) -> Iterator[Callable[[], list[Tensor]]]:
    """The method around the loop; gives a function that returns g, fragment by fragment."""
    if name == "cograd":
        with StreamingDiLoCo(
            model,
            inner,
            fragments=transformer(model.blocks),
            sync_every=H,
            overlap=TAU,
            alpha=ALPHA,
            codec=Float32(),
            outer=nesterov(OUTER_LR, MOMENTUM),
            schedule="torchft",
        ) as diloco:
            yield lambda: [fragment.vector for fragment in diloco.fragments]
        return
    with _torchft(ctx, model, inner, lighthouse, number) as theirs:
        yield lambda: [t for f in theirs._fragments for t in f.original_parameters.values()]


@contextmanager
def _torchft(
    ctx: Context, model: GPT, inner: torch.optim.Optimizer, lighthouse: str, number: int
) -> Iterator[Any]:
    """torchft's DiLoCo over its own gloo group: fragments are modules with the same parameters in order."""
    from torch.distributed import TCPStore
    from torchft.local_sgd import DiLoCo
    from torchft.manager import Manager
    from torchft.process_group import ProcessGroupGloo

    os.environ.pop("TORCHFT_MANAGER_PORT", None)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    manager = Manager(
        pg=ProcessGroupGloo(timeout=timedelta(seconds=30)),
        min_replica_size=WORKERS,
        use_async_quorum=False,
        load_state_dict=lambda state: None,
        state_dict=dict,
        replica_id=f"replica-{number}-{ctx.rank}",
        store_addr="127.0.0.1",
        store_port=store.port,
        rank=0,
        world_size=1,
        lighthouse_addr=lighthouse,
        hostname="127.0.0.1",
        init_sync=False,
    )
    groups = [nn.ModuleList(list(model.blocks)[i::2]) for i in range(2)]
    fragments = [*groups, nn.ModuleList([model.tokens, model.positions, model.norm, model.head])]
    outers = [torch.optim.SGD(f.parameters(), lr=OUTER_LR, momentum=MOMENTUM, nesterov=True) for f in fragments]
    try:
        with DiLoCo(
            manager,
            fragments,
            inner,
            outers,
            sync_every=H,
            fragment_sync_delay=TAU,
            fragment_update_alpha=ALPHA,
        ) as diloco:
            yield diloco
    finally:
        manager.shutdown(wait=False)


if __name__ == "__main__":
    main()
