"""What the tests of DGC on DDP run in each worker process: every job returns JSON."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cograd.core.codecs import Float16
from cograd.engines.ddp import Attachment
from cograd.engines.simulate import Simulation
from cograd.engines.transport import TorchDist
from cograd.engines.worker import Context
from cograd.machines import DGC, DensityWarmup
from cograd.machines.baselines import GradientDropping

WORKERS = 4

VARIANTS: dict[str, Callable[[], DGC]] = {
    "plain": lambda: DGC(0.02),
    "warm-up": lambda: DGC(0.02, warmup=DensityWarmup(10)),
    "clipped": lambda: DGC(0.02, clip_norm=0.3),
    "nesterov": lambda: DGC(0.02, nesterov=True, masking=False),
    "half values": lambda: DGC(0.02, values=Float16()),
    "dropping": lambda: GradientDropping(0.02),
}


def small() -> nn.Module:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(20, 60), nn.ReLU(), nn.Linear(60, 40), nn.ReLU(), nn.Linear(40, 3))


def wide() -> nn.Module:
    """Large enough for three buckets of 1 MB."""
    torch.manual_seed(7)
    square = [nn.Linear(600, 600), nn.ReLU(), nn.Linear(600, 600), nn.ReLU()]
    return nn.Sequential(nn.Linear(20, 600), nn.ReLU(), *square, nn.Linear(600, 3))


class TwoHeads(nn.Module):
    """Uses one head in even steps and the other in odd ones."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.body, self.step = nn.Linear(20, 30), 0
        self.heads = nn.ModuleList([nn.Linear(30, 3), nn.Linear(30, 3)])

    def forward(self, x: Tensor) -> Tensor:
        return self.heads[self.step % 2](self.body(x).relu())  # type: ignore[no-any-return]


def batch(step: int, rank: int, size: int = 8) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1000 * step + rank)
    x = torch.randn(size, 20, generator=draw)
    return x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long()


def loss_of(model: nn.Module, b: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(b[0]).float(), b[1])


def attach(
    model: nn.Module, dgc: DGC, decay: float = 1e-3, bucket_mb: float = 25, **options: Any
) -> tuple[DistributedDataParallel, torch.optim.Optimizer, Attachment]:
    unused = options.pop("find_unused_parameters", False)
    ddp = DistributedDataParallel(model, bucket_cap_mb=bucket_mb, find_unused_parameters=unused)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.05, weight_decay=decay)
    return ddp, optimizer, dgc.attach(ddp, optimizer, **options)


def train(
    ddp: DistributedDataParallel, optimizer: torch.optim.Optimizer, rank: int, steps: range
) -> list[float]:
    losses = []
    for step in steps:
        optimizer.zero_grad()
        loss = loss_of(ddp, batch(step, rank))
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def bits(model: nn.Module) -> str:
    flat = torch.cat([p.detach().float().reshape(-1) for p in model.parameters()])
    return hashlib.blake2b(flat.numpy().tobytes()).hexdigest()


def simulated(model: nn.Module, exchanges: list[DGC], steps: int, decay: float = 1e-3) -> str:
    sim = Simulation(model, torch.optim.SGD(model.parameters(), lr=0.05, weight_decay=decay), exchanges)
    for step in range(steps):
        if isinstance(model, TwoHeads):
            model.step = step
        sim.step(lambda b: loss_of(model, b), [batch(step, rank) for rank in range(len(exchanges))])
    return bits(model)


def equal_to_simulation(ctx: Context, variant: str, steps: int) -> dict[str, Any]:
    """Real processes and one process, from the same data: the bits of the weights."""
    ddp, optimizer, attached = attach(small(), VARIANTS[variant]())
    train(ddp, optimizer, ctx.rank, range(steps))
    reference = (
        simulated(small(), [VARIANTS[variant]() for _ in range(ctx.size)], steps) if not ctx.rank else ""
    )
    sent = [attached.ledger.sent(party) for party in range(ctx.size)]
    return {"bits": bits(ddp), "simulated": reference, "sent": sent}


def many_buckets(ctx: Context) -> dict[str, Any]:
    """Clipping needs the whole gradient, which comes in several buckets."""
    ddp, optimizer, attached = attach(wide(), DGC(0.01, clip_norm=0.3), bucket_mb=1)
    seen = []
    take = attached.take

    def counting(bucket: Any) -> Any:
        seen.append(bucket.index())
        return take(bucket)

    attached.take = counting  # type: ignore[method-assign]
    train(ddp, optimizer, ctx.rank, range(6))
    reference = (
        simulated(wide(), [DGC(0.01, clip_norm=0.3) for _ in range(ctx.size)], 6) if not ctx.rank else ""
    )
    return {"bits": bits(ddp), "simulated": reference, "buckets": max(seen) + 1}


def gathered(ctx: Context, sizes: list[list[int]]) -> list[list[bool]]:
    """Messages of every rank's size in each round, as everyone received them."""
    transport = TorchDist()

    def message(round: int, rank: int) -> bytes:
        return bytes((7 * rank + round + i) % 251 for i in range(sizes[round][rank]))

    correct = []
    for round in range(len(sizes)):
        received = transport.all_gather_bytes(message(round, ctx.rank))
        correct.append([bytes(m) == message(round, rank) for rank, m in enumerate(received)])
    return correct


def dense_stage(ctx: Context) -> dict[str, Any]:
    """Dense warm-up over an all-reduce, then sparse: replicas stay the same bits."""
    dgc = DGC(0.02, warmup=DensityWarmup(5, (1.0, 0.25)))
    ddp, optimizer, attached = attach(small(), dgc)
    losses = train(ddp, optimizer, ctx.rank, range(15))
    size = 4 * sum(p.numel() for p in ddp.parameters())
    dense = [e for e in attached.ledger if e.sender == 0 and e.payload == size]
    return {"bits": bits(ddp), "dense": len(dense), "frame": dense[0].frame / size, "losses": losses}


def accumulation(ctx: Context, whole: bool) -> dict[str, Any]:
    """Two micro-batches under no_sync, or one batch of both."""
    ddp, optimizer, _ = attach(small().double(), DGC(0.02))
    for step in range(5):
        optimizer.zero_grad()
        (x1, y1), (x2, y2) = batch(2 * step, ctx.rank), batch(2 * step + 1, ctx.rank)
        if whole:
            x, y = torch.cat([x1, x2]).double(), torch.cat([y1, y2])
            nn.functional.cross_entropy(ddp(x), y).backward()
        else:
            for x, y, context in ((x1, y1, ddp.no_sync()), (x2, y2, nullcontext())):
                with context:
                    (nn.functional.cross_entropy(ddp(x.double()), y) / 2).backward()
        optimizer.step()
    return {"weights": torch.cat([p.detach().reshape(-1) for p in ddp.parameters()]).tolist()}


def scaled(ctx: Context, scaler: bool, overflow_at: int, autocast: bool) -> dict[str, Any]:
    """Training under a GradScaler; rank 2's loss may overflow in one step, which all ranks then skip."""
    grad_scaler = torch.amp.GradScaler("cpu", enabled=scaler, init_scale=2.0**10, growth_interval=10**6)
    ddp, optimizer, attached = attach(small(), DGC(0.02, clip_norm=0.3), scaler=grad_scaler if scaler else None)
    for step in range(12):
        if not scaler and step == overflow_at:
            continue
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = loss_of(ddp, batch(step, ctx.rank))
        if step == overflow_at and ctx.rank == 2:
            loss = loss * float("inf")
        grad_scaler.scale(loss).backward()
        grad_scaler.step(optimizer)
        grad_scaler.update()
    scale = grad_scaler.get_scale() if scaler else 0.0
    return {"bits": bits(ddp), "scale": scale, "round": attached.exchange.round}


def half_weights(ctx: Context) -> dict[str, Any]:
    """bfloat16 parameters: state is float32."""
    ddp, optimizer, attached = attach(small().bfloat16(), DGC(0.05))
    losses = []
    for step in range(40):
        optimizer.zero_grad()
        x, y = batch(step % 4, ctx.rank)
        loss = nn.functional.cross_entropy(ddp(x.bfloat16()).float(), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    dtypes = {str(v.dtype) for v in attached.exchange.state.values()}  # type: ignore[attr-defined]
    return {"bits": bits(ddp), "losses": losses, "state": sorted(dtypes)}


def unused(ctx: Context) -> dict[str, Any]:
    """Heads used in turn: what is due to the idle one still reaches it."""
    model = TwoHeads()
    ddp, optimizer, _ = attach(model, DGC(0.1), decay=0.0, find_unused_parameters=True)
    for step in range(12):
        model.step = step
        optimizer.zero_grad()
        loss_of(ddp, batch(step, ctx.rank)).backward()
        optimizer.step()
    reference = ""
    if not ctx.rank:
        reference = simulated(TwoHeads(), [DGC(0.1) for _ in range(ctx.size)], 12, decay=0.0)
    return {"bits": bits(ddp), "simulated": reference}


def resumed(ctx: Context) -> dict[str, Any]:
    """20 steps at once, and 9 + 11 with a checkpoint through a file between."""
    ddp, optimizer, _ = attach(small(), DGC(0.02, warmup=DensityWarmup(4)))
    train(ddp, optimizer, ctx.rank, range(20))
    first, first_optimizer, attached = attach(small(), DGC(0.02, warmup=DensityWarmup(4)))
    train(first, first_optimizer, ctx.rank, range(9))
    file = io.BytesIO()
    torch.save({"model": first.module.state_dict(), "dgc": attached.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    model = small()
    model.load_state_dict(saved["model"])
    second, second_optimizer, again = attach(model, DGC(0.02, warmup=DensityWarmup(4)))
    again.load_state_dict(saved["dgc"])
    train(second, second_optimizer, ctx.rank, range(9, 20))
    return {"whole": bits(ddp), "resumed": bits(second)}


def raised(run: Callable[[], Any]) -> str:
    try:
        run()
    except Exception as error:  # the test reads its type and text
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def not_finite_on_rank_2(ctx: Context, dense: bool) -> dict[str, Any]:
    dgc = DGC(1.0) if dense else DGC(0.02)
    ddp, optimizer, attached = attach(small(), dgc)
    train(ddp, optimizer, ctx.rank, range(3))
    state = {k: v.clone() for k, v in dgc.state.items()}
    weights = bits(ddp)
    x, y = batch(3, ctx.rank)
    optimizer.zero_grad()
    said = raised(lambda: loss_of(ddp, (x * float("nan") if ctx.rank == 2 else x, y)).backward())
    same = bits(ddp) == weights and (
        ctx.rank != 2 or all(torch.equal(dgc.state[k], v) for k, v in state.items())
    )
    return {"said": said, "nothing lost": same, "round": attached.exchange.round}


def missing_on_rank_1(ctx: Context, dense: bool) -> dict[str, Any]:
    """Rank 1 does not use a head that the others use, and DDP was not told that this may happen."""
    ddp, optimizer, _ = attach(Branch(), DGC(1.0) if dense else DGC(0.1), decay=0.0)
    ddp.module.skip = ctx.rank == 1

    def step() -> None:
        loss_of(ddp, batch(0, ctx.rank)).backward()
        optimizer.step()

    return {"said": raised(step)}


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.first, self.extra, self.last = nn.Linear(20, 30), nn.Linear(30, 30), nn.Linear(30, 3)
        self.skip = False

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).relu()
        return self.last(h if self.skip else self.extra(h))  # type: ignore[no-any-return]


def other_settings_on_rank_3(ctx: Context) -> dict[str, Any]:
    return {"said": raised(lambda: attach(small(), DGC(0.03 if ctx.rank == 3 else 0.02)))}


def refused(ctx: Context) -> dict[str, str]:
    """What attach() will not take, before any training."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate, distribute_tensor

    mesh = init_device_mesh("cpu", (ctx.size,))
    ddp = DistributedDataParallel(small())
    sharded = small()
    fully_shard(sharded, mesh=mesh)
    spread = small()
    spread[0].weight = nn.Parameter(distribute_tensor(spread[0].weight.data, mesh, [Replicate()]))
    embedding = DistributedDataParallel(nn.Sequential(nn.Embedding(10, 4, sparse=True), nn.Linear(4, 3)))

    def on(model: nn.Module, make: Callable[[Any], torch.optim.Optimizer]) -> str:
        optimizer = make(list(model.parameters()))
        return raised(lambda: DGC(0.02).attach(model, optimizer))  # type: ignore[arg-type]

    def plain(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=0.1)

    return {
        "fsdp": on(sharded, plain),
        "dtensor": on(spread, plain),
        "bare": on(small(), plain),
        "sparse": on(embedding, plain),
        "momentum": on(ddp, lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)),
        "adam": on(ddp, lambda p: torch.optim.Adam(p)),
        "maximize": on(ddp, lambda p: torch.optim.SGD(p, lr=0.1, maximize=True)),
        "partial": on(ddp, lambda p: torch.optim.SGD(p[2:], lr=0.1)),
    }
