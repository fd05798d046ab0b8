"""What the tests of the linear sketch on DDP run in each worker process: every job returns JSON."""

from __future__ import annotations

import hashlib
import io
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cograd.engines.ddp import Attachment
from cograd.engines.simulate import Simulation
from cograd.engines.worker import Context
from cograd.machines import LinearSketch

VARIANTS: dict[str, dict[str, Any]] = {
    "srht": {"kind": "srht"},
    "momentum": {"kind": "countsketch", "momentum": 0.9, "nesterov": True},
    "sparse": {"kind": "sparse", "nonzeros": 3},
    "gaussian": {"kind": "gaussian"},
}


def model() -> nn.Module:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 3)).double()


def batch(step: int, rank: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1000 * step + rank)
    x = torch.randn(8, 20, generator=draw, dtype=torch.float64)
    return x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long()


def loss_of(net: nn.Module, b: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(net(b[0]), b[1])


def attach(sketch: LinearSketch, net: nn.Module | None = None) -> tuple[Any, torch.optim.Optimizer, Attachment]:
    ddp = DistributedDataParallel(model() if net is None else net)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.02, weight_decay=1e-3)
    return ddp, optimizer, sketch.attach(ddp, optimizer)


def train(ddp: nn.Module, optimizer: torch.optim.Optimizer, rank: int, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        loss_of(ddp, batch(step, rank)).backward()
        optimizer.step()


def flat(net: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in net.parameters()])


def bits(net: nn.Module) -> str:
    return hashlib.blake2b(flat(net).numpy().tobytes()).hexdigest()


def against_simulation(ctx: Context, variant: str) -> dict[str, Any]:
    """Real processes and one process, from the same data."""
    ddp, optimizer, attached = attach(LinearSketch(60, **VARIANTS[variant]))
    train(ddp, optimizer, ctx.rank, range(20))
    off = 0.0
    if not ctx.rank:
        net = model()
        exchanges = [LinearSketch(60, **VARIANTS[variant]) for _ in range(ctx.size)]
        sim = Simulation(net, torch.optim.SGD(net.parameters(), lr=0.02, weight_decay=1e-3), exchanges)
        for step in range(20):
            sim.step(lambda b: loss_of(net, b), [batch(step, rank) for rank in range(ctx.size)])
        off = float((flat(net) - flat(ddp)).abs().max())
    sent = {e.payload for e in attached.ledger if not e.schema}
    return {"bits": bits(ddp), "off": off, "sent": sorted(sent)}


def resumed(ctx: Context) -> dict[str, Any]:
    """15 steps at once, and 6 + 9 with one checkpoint through a file between."""
    ddp, optimizer, _ = attach(LinearSketch(60, momentum=0.9))
    train(ddp, optimizer, ctx.rank, range(15))
    first, first_optimizer, attached = attach(LinearSketch(60, momentum=0.9))
    train(first, first_optimizer, ctx.rank, range(6))
    file = io.BytesIO()
    torch.save({"model": first.module.state_dict(), "sketch": attached.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    net = model()
    net.load_state_dict(saved["model"])
    second, second_optimizer, again = attach(LinearSketch(60, momentum=0.9), net)
    again.load_state_dict(saved["sketch"])
    train(second, second_optimizer, ctx.rank, range(6, 15))
    return {"whole": bits(ddp), "resumed": bits(second)}


def said(run: Any) -> str:
    try:
        run()
    except Exception as error:  # the test reads its type and text
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def another_seed_on_rank_3(ctx: Context) -> dict[str, Any]:
    return {"said": said(lambda: attach(LinearSketch(60, seed=7 if ctx.rank == 3 else 0)))}


def not_finite_on_rank_2(ctx: Context) -> dict[str, Any]:
    sketch = LinearSketch(60, momentum=0.9)
    ddp, optimizer, _ = attach(sketch)
    train(ddp, optimizer, ctx.rank, range(3))
    weights, velocity = bits(ddp), sketch.state["momentum"].clone()
    x, y = batch(3, ctx.rank)
    text = said(lambda: loss_of(ddp, (x * float("nan") if ctx.rank == 2 else x, y)).backward())
    same = bits(ddp) == weights and torch.equal(sketch.state["momentum"], velocity)
    return {"said": text, "nothing changed": same, "round": sketch.round}
