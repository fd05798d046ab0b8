"""What the tests of DIFF2 over torch.distributed run in each worker process: every job returns JSON."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from cograd.core.ledger import Ledger
from cograd.engines.transport import TorchDist
from cograd.engines.worker import Context
from cograd.machines import BVRLocalSGD, Diff2, Diff2Plan, GDRoutine

SIZES = [30, 40, 50]
ROUNDS = 10

VARIANTS: dict[str, dict[str, Any]] = {
    "message": {"release": "message"},
    "aggregate": {"release": "aggregate"},
    "local": {"release": "message", "routine": BVRLocalSGD(0.1, 10, 3, 2.0)},
    "local, aggregate": {"release": "aggregate", "routine": BVRLocalSGD(0.1, 10, 3, 2.0, "random")},
}


def squared(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return (model(x).squeeze(-1) - y).square() / 2


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5), nn.Softplus(), nn.Linear(5, 1))


def records(worker: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(worker)
    return torch.randn(SIZES[worker], 4, generator=draw), torch.randn(SIZES[worker], generator=draw)


def plan(**changes: Any) -> Diff2Plan:
    chosen = {
        "rounds": ROUNDS,
        "restart_every": 4,
        "epsilon": 5.0,
        "delta": 1e-3,
        "clip": 1.0,
        "diff_clip": 1.0,
    }
    chosen |= {"records": SIZES, "routine": GDRoutine(0.1), "release": "message"}
    return Diff2Plan(**{**chosen, **changes})


def here(variant: str, **options: Any) -> Diff2:
    """All workers in one process."""
    return Diff2(net(), squared, [records(w) for w in range(3)], plan(**VARIANTS[variant]), **options)


def there(ctx: Context, of: Diff2Plan, seed: int = 0, **options: Any) -> Diff2:
    """This rank's worker, the others in their processes."""
    return Diff2(net(seed), squared, [records(ctx.rank)], of, transport=TorchDist(), **options)


def bits(x: Tensor) -> str:
    return hashlib.blake2b(x.numpy().tobytes()).hexdigest()


def messages(ledger: Ledger) -> list[list[int]]:
    return [[e.sender, e.to, e.round, e.payload] for e in ledger if e.payload]


def equal_to_one_process(ctx: Context, variant: str, cache: bool) -> dict[str, Any]:
    """Iterates and messages of real processes, that start from other weights than rank 0's, and of one."""
    one, many = here(variant), there(ctx, plan(**VARIANTS[variant]), seed=ctx.rank, cache=cache)
    far = 0.0
    for _ in range(ROUNDS):
        one.step()
        many.step()
        far = max(far, float((one.x - many.x).norm() / one.x.norm()))
    return {
        "bits": bits(many.x),
        "one": bits(one.x),
        "far": far,
        "model": bits(nn.utils.parameters_to_vector(many.per_record.model.parameters()).detach()),
        "same messages": messages(one.ledger) == messages(many.ledger),
        "epsilon": [many.spent(w).epsilon() == one.spent(w).epsilon() for w in range(3)],
        "evaluations": [many.ledger.worked("grad", w) for w in range(3)],
    }


def resumed(ctx: Context, variant: str) -> dict[str, Any]:
    """A run that moves: three rounds in processes, three in one process, the rest in processes again."""
    of = plan(**VARIANTS[variant])
    whole, first = there(ctx, of), there(ctx, of)
    for _ in range(ROUNDS):
        whole.step()
    for _ in range(3):
        first.step()
    middle, last = here(variant), there(ctx, of)
    middle.load_state_dict(first.state_dict())
    for _ in range(3):
        middle.step()
    last.load_state_dict(middle.state_dict())
    for _ in range(ROUNDS - 6):
        last.step()
    return {"whole": bits(whole.x), "resumed": bits(last.x)}


def raised(run: Callable[[], Any]) -> str:
    try:
        run()
    except Exception as error:  # the test reads its type and text
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def not_finite_on_rank_1(ctx: Context, variant: str) -> dict[str, Any]:
    """Rank 1's record turns bad after two rounds, and well again."""
    whole, diff2 = (there(ctx, plan(**VARIANTS[variant])) for _ in range(2))
    for _ in range(ROUNDS):
        whole.step()
    for _ in range(2):
        diff2.step()
    before, x = bits(diff2.x), diff2.records[ctx.rank][0]
    clean = x.clone()
    if ctx.rank == 1:
        x[3] = float("inf")
    said = raised(diff2.step)
    same = bits(diff2.x) == before
    x.copy_(clean)
    for _ in range(ROUNDS - 2):
        diff2.step()
    return {"said": said, "same": same, "recovers": bits(diff2.x) == bits(whole.x)}


def other_plan_on_rank_2(ctx: Context) -> dict[str, Any]:
    return {"said": raised(lambda: there(ctx, plan(clip=2.0 if ctx.rank == 2 else 1.0)))}


def refused(ctx: Context) -> dict[str, str]:
    """What one rank's arguments give away before anything is exchanged."""
    mine = records(ctx.rank)
    return {
        "ranks": raised(lambda: there(ctx, plan(records=[30, 40]))),
        "all": raised(lambda: Diff2(net(), squared, [mine] * 3, plan(), transport=TorchDist())),
    }


def secure(ctx: Context) -> dict[str, Any]:
    """Noise that no seed gives away: ranks still take the same steps."""
    diff2 = there(ctx, plan(), noise="secure")
    for _ in range(3):
        diff2.step()
    return {"bits": bits(diff2.x)}
