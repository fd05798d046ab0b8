"""What the tests of single merging on torch.distributed run in each worker process: every job returns JSON."""

from __future__ import annotations

import copy
import hashlib
import io
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cograd.core.streams import stream
from cograd.engines.worker import Context
from cograd.machines.single_merging import (
    DecentralizedTrainer,
    Mixing,
    Schedule,
    SingleMerging,
    merge,
    replicas,
)

LOCAL_STEPS, ROUNDS = 3, 8
MATRIX = [[0.5, 0.25, 0.25, 0], [0, 1, 0, 0], [0.1, 0.2, 0.3, 0.4], [0, 0, 0.7, 0.3]]

VARIANTS: dict[str, tuple[Mixing, Schedule]] = {
    "random": (Mixing(seed=3), Schedule.fixed(ROUNDS, 0.6)),
    "random, two peers": (Mixing(seed=3), Schedule.fixed(ROUNDS, 2.0)),
    "pairwise": (Mixing("pairwise", seed=3), Schedule.fixed(ROUNDS, 0.8)),
    "ring": (Mixing("ring"), Schedule.fixed(ROUNDS, None)),
    "left": (Mixing("left"), Schedule.fixed(ROUNDS, None)),
    "exponential+random": (Mixing("exponential+random", seed=3), Schedule.fixed(ROUNDS, 1.5)),
    "matrix": (Mixing.of(MATRIX), Schedule.fixed(ROUNDS, None)),
    "none": (Mixing("none"), Schedule.fixed(ROUNDS, None)),
    "single merge": (Mixing(seed=3), Schedule.single_merge(ROUNDS, 0.6)),
    "FedAvg": (Mixing(), Schedule.every_round(ROUNDS)),
    "linear": (Mixing("pairwise", seed=3), Schedule.linear(ROUNDS, 0.0)),
}


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 3)).double()


def normed() -> nn.Module:
    return nn.Sequential(nn.Linear(20, 30), nn.BatchNorm1d(30), nn.ReLU(), nn.Linear(30, 3)).double()


def mixed() -> nn.Module:
    """Parameters of three types: a message must keep each aligned."""
    return nn.Sequential(nn.Linear(20, 3).bfloat16(), nn.Linear(3, 5).double(), nn.Linear(5, 3))


def models_of(ctx: Context, build: Callable[[], nn.Module] = small) -> list[nn.Module]:
    return replicas(build, ctx.size, init="per-node", seed=7)


def batch(step: int, rank: int) -> tuple[Tensor, Tensor]:
    x = stream(1, "batch", step, rank).normal(8, 20).double()
    return x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long()


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.01, weight_decay=5e-4)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, rank: int, steps: range) -> None:
    for step in steps:
        x, y = batch(step, rank)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


def bits(model: nn.Module) -> str:
    flat = torch.cat([v.double().reshape(-1) for v in model.state_dict().values()])
    return hashlib.blake2b(flat.numpy().tobytes()).hexdigest()


def flat(model: nn.Module) -> list[float]:
    return [float(v) for p in model.state_dict().values() for v in p.double().reshape(-1)]


def attach(
    ctx: Context, build: Callable[[], nn.Module] = small, variant: str = "single merge"
) -> tuple[nn.Module, torch.optim.Optimizer, SingleMerging]:
    model = models_of(ctx, build)[ctx.rank]
    optimizer = adamw(model.parameters())
    mixing, schedule = VARIANTS[variant]
    attached = SingleMerging(model, optimizer, schedule=schedule, mixing=mixing, local_steps=LOCAL_STEPS)
    return model, optimizer, attached


def equal_to_simulation(ctx: Context, variant: str, normalised: bool, engine: str) -> dict[str, Any]:
    """Real processes and one process, from the same data."""
    build = normed if normalised else small
    model, optimizer, attached = attach(ctx, build, variant)
    train(model, optimizer, ctx.rank, range(ROUNDS * LOCAL_STEPS))
    mixing, schedule = VARIANTS[variant]
    sim = DecentralizedTrainer(
        models_of(ctx, build),
        adamw,
        nn.functional.cross_entropy,
        schedule=schedule,
        mixing=mixing,
        local_steps=LOCAL_STEPS,
        engine=engine,  # type: ignore[arg-type]
    )
    for step in range(ROUNDS * LOCAL_STEPS):
        batches = [batch(step, rank) for rank in range(ctx.size)]
        sim.step(torch.stack([x for x, _ in batches]), torch.stack([y for _, y in batches]))
    node = sim.node(ctx.rank)
    away = max(abs(a - b) for a, b in zip(flat(model), flat(node), strict=True))
    entries = [list(e) for e in attached.ledger if not e.schema]
    return {
        "bits": bits(model),
        "simulated": bits(node),
        "away": away,
        "same ledger": entries == [list(e) for e in sim.ledger],
        "sent": attached.ledger.sent(),
        "numel": attached.space.numel,
    }


def mixed_types(ctx: Context) -> dict[str, Any]:
    """Bytes of one round of a graph and of one merge, of a model with parameters of three types."""
    model = models_of(ctx, mixed)[ctx.rank]
    attached = SingleMerging(model, schedule=Schedule.fixed(1, None), mixing=Mixing("left"))
    attached.advance()
    pulled = attached.ledger.sent()
    attached.merge()
    return {"pulled": pulled, "merged": attached.ledger.sent() - pulled, "bits": bits(model)}


def pulled_types(ctx: Context) -> dict[str, Any]:
    """A round of parameters of three types, against its arithmetic."""
    models = models_of(ctx, mixed)
    model = copy.deepcopy(models[ctx.rank])
    SingleMerging(model, schedule=Schedule.fixed(1, None), mixing=Mixing("left")).advance()
    pairs = zip(models[ctx.rank].parameters(), models[(ctx.rank - 1) % ctx.size].parameters(), strict=True)
    same = []
    for out, (a, b) in zip(model.parameters(), pairs, strict=True):
        wide = torch.promote_types(out.dtype, torch.float32)
        same.append(torch.equal(out, (a.to(wide) * 0.5 + b.to(wide) * 0.5).to(out.dtype)))
    return {"same": same}


def batch_norm(ctx: Context) -> dict[str, Any]:
    """`merged` with every rank's own loader, against `merge` with all of them; and what it leaves."""
    model, optimizer, attached = attach(ctx, normed)
    train(model, optimizer, ctx.rank, range(LOCAL_STEPS * 4))
    before = bits(model)

    def loader(rank: int) -> list[tuple[Tensor, Tensor]]:
        return [batch(500 + i, rank) for i in range(rank + 1)]

    states: list[Any] = [None] * ctx.size
    torch.distributed.all_gather_object(states, model.state_dict())
    everyone = [copy.deepcopy(model) for _ in range(ctx.size)]
    for m, state in zip(everyone, states, strict=True):
        m.load_state_dict(state)
    merged = attached.merged(loader(ctx.rank))
    expected = merge(everyone, recalibrate=[b for rank in range(ctx.size) for b in loader(rank)])
    away = max(abs(a - b) for a, b in zip(flat(merged), flat(expected), strict=True))
    return {
        "away": away,
        "bits": bits(merged),
        "unchanged": bits(model) == before,
        "batches": int(merged[1].num_batches_tracked),  # type: ignore[index]
        "sent": attached.ledger.sent(since=4),
        "size": 8 * (attached.space.numel + 60),
    }


def ends_in_gossip(ctx: Context) -> dict[str, Any]:
    """Training without communication, then pure gossip over the ring, then the merge."""
    model, optimizer, attached = attach(ctx, variant="none")
    train(model, optimizer, ctx.rank, range(ROUNDS * LOCAL_STEPS))
    spread = []
    for _ in range(3):
        states: list[Any] = [None] * ctx.size
        torch.distributed.all_gather_object(states, flat(model))
        points = torch.tensor(states)
        spread.append(float((points - points.mean(0)).square().sum()))
        attached.gossip(1, Mixing("ring"))
    attached.merge()
    return {"spread": spread, "bits": bits(model), "rounds": attached.round}


def resumed(ctx: Context) -> dict[str, Any]:
    """A run at once, and one with a checkpoint through a file in the middle of a round."""
    model, optimizer, _ = attach(ctx)
    train(model, optimizer, ctx.rank, range(ROUNDS * LOCAL_STEPS))
    first, first_optimizer, attached = attach(ctx)
    train(first, first_optimizer, ctx.rank, range(10))
    file = io.BytesIO()
    saved = {"model": first.state_dict(), "optimizer": first_optimizer.state_dict(), "m": attached.state_dict()}
    torch.save(saved, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    second, second_optimizer, again = attach(ctx)
    second.load_state_dict(saved["model"])
    second_optimizer.load_state_dict(saved["optimizer"])
    again.load_state_dict(saved["m"])
    train(second, second_optimizer, ctx.rank, range(10, ROUNDS * LOCAL_STEPS))
    wrong = {**saved["m"], "members": 5}
    return {"whole": bits(model), "resumed": bits(second), "said": raised(lambda: again.load_state_dict(wrong))}


def raised(run: Callable[[], Any]) -> str:
    try:
        run()
    except Exception as error:  # the test reads its type and text
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def diverged(ctx: Context, dense: bool) -> dict[str, Any]:
    """Rank 2 holds NaN when a round is due: in the left graph, rank 3 would hear it."""
    model, optimizer, attached = attach(ctx, variant="FedAvg" if dense else "left")
    train(model, optimizer, ctx.rank, range(LOCAL_STEPS - 1))
    x, y = batch(LOCAL_STEPS - 1, ctx.rank)
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()
    if ctx.rank == 2:
        model[0].weight.grad[3] = torch.nan  # type: ignore[index, union-attr]
    said = raised(optimizer.step)
    again = "" if said.startswith("nothing") else raised(optimizer.step)
    states: list[Any] = [None] * ctx.size
    torch.distributed.all_gather_object(states, bits(model))
    return {
        "said": said,
        "again": again,
        "round": attached.round,
        "finite": finite(model),
        "all": len(set(states)),
    }


def finite(model: nn.Module) -> bool:
    return all(bool(torch.isfinite(p).all()) for p in model.parameters())


def empty_loader_on_rank_1(ctx: Context) -> dict[str, Any]:
    _, _, attached = attach(ctx, normed)
    return {"said": raised(lambda: attached.recalibrate([] if ctx.rank == 1 else [batch(0, ctx.rank)]))}


def other_settings_on_rank_3(ctx: Context) -> dict[str, Any]:
    model = models_of(ctx)[ctx.rank]
    mixing = Mixing(seed=9 if ctx.rank == 3 else 1)
    return {"said": raised(lambda: SingleMerging(model, schedule=Schedule.single_merge(5), mixing=mixing))}


def other_model_on_rank_3(ctx: Context, what: str) -> dict[str, Any]:
    """The trainable parameters are the same on all ranks; what else there is, is not."""
    model = models_of(ctx, normed)[0]
    if what == "frozen":
        model[0].bias.requires_grad_(False)  # type: ignore[union-attr]
        with torch.no_grad():
            model[0].bias[7] += ctx.rank == 3  # type: ignore[index, operator]
    elif ctx.rank == 3:
        model[1] = nn.BatchNorm1d(30, track_running_stats=False).double()  # type: ignore[index]
    return {"said": raised(lambda: SingleMerging(model, schedule=Schedule.single_merge(5)))}


def posts(ctx: Context) -> list[list[str]]:
    """The messages of each rank's rounds of pairwise matching, by the call that posted them."""
    _, optimizer, attached = attach(ctx, variant="pairwise")
    seen: list[list[str]] = []
    batch_of = torch.distributed.batch_isend_irecv

    def spied(operations: Any) -> Any:
        seen.append([operation.op.__name__ for operation in operations])
        return batch_of(operations)

    torch.distributed.batch_isend_irecv = spied
    try:
        train(attached.model, optimizer, ctx.rank, range(ROUNDS * LOCAL_STEPS))
    finally:
        torch.distributed.batch_isend_irecv = batch_of
    return seen


def refused(ctx: Context) -> dict[str, str]:
    """What is not taken, before any training; and what happens after the last round."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate, distribute_tensor

    mesh = init_device_mesh("cpu", (ctx.size,))
    sharded = small()
    fully_shard(sharded, mesh=mesh)
    spread = small()
    spread[0].weight = nn.Parameter(distribute_tensor(spread[0].weight.data, mesh, [Replicate()]))  # type: ignore[index]
    schedule = Schedule.single_merge(1)

    def on(model: nn.Module, **options: Any) -> str:
        return raised(lambda: SingleMerging(model, **{"schedule": schedule, **options}))

    model = small()
    optimizer = adamw(model.parameters())
    attached = SingleMerging(model, optimizer, schedule=schedule)
    train(model, optimizer, ctx.rank, range(1))
    before = bits(model)
    over = raised(lambda: train(model, optimizer, ctx.rank, range(1, 2)))
    unchanged = bits(model) == before
    attached.detach()
    train(model, optimizer, ctx.rank, range(1, 2))
    return {
        "ddp": on(DistributedDataParallel(small())),
        "fsdp": on(sharded),
        "dtensor": on(spread),
        "peers": on(small(), schedule=Schedule.fixed(2, 5.0)),
        "steps": on(small(), local_steps=0),
        "over": over,
        "unchanged": str(unchanged),
        "detached": str(bits(model) != before),
    }
