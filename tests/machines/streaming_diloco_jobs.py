"""What the tests of Streaming DiLoCo run, in one process and in several: every job returns JSON."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cograd.core.codecs import Float32
from cograd.engines.overlap import InProcess
from cograd.engines.worker import Context
from cograd.machines import E3M0, StreamingDiLoCo
from cograd.machines.streaming_diloco import groups, nesterov

PARTS = groups({"first": "0.*", "middle": "2.*", "last": "4.*"})
SWAPPED = {"first": ["0.weight", "2.bias"], "middle": ["2.weight", "0.bias"], "last": ["4.weight", "4.bias"]}
"""The biases of `PARTS` exchanged, which are of one shape: only names tell."""
TURNED = {"first": ["0.bias", "0.weight"], "middle": ["2.weight", "2.bias"], "last": ["4.weight", "4.bias"]}
"""`PARTS` with the first fragment's parameters in the other order."""

VARIANTS: dict[str, dict[str, Any]] = {
    "fp4": {"sync_every": 20},
    "fp32": {"codec": Float32()},
    "blocks": {"codec": E3M0(block=16), "alpha": 0.25, "overlap": 3},
    "stochastic": {"codec": E3M0(stochastic=True), "overlap": 0, "alpha": 0.0},
    "round robin": {"schedule": "round_robin"},
    "torchft": {"schedule": "torchft", "codec": Float32(), "sync_every": 12},
    "frozen": {"freeze_others": True, "flush": True},
}


def small(seed: int = 7) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3))


def narrow() -> nn.Sequential:
    """The names of `small` with other shapes."""
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 3))


def inner_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)


def batch(step: int, rank: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1000 * step + rank)
    x = torch.randn(6, 8, generator=draw)
    return x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long()


def inner_step(model: nn.Module, inner: torch.optim.Optimizer, step: int, rank: int) -> None:
    x, y = batch(step, rank)
    inner.zero_grad()
    nn.functional.cross_entropy(model(x).float(), y).backward()
    inner.step()


def make(model: nn.Module, inner: torch.optim.Optimizer, **options: Any) -> StreamingDiLoCo:
    return StreamingDiLoCo(model, inner, **{"fragments": PARTS, "sync_every": 10, **options})


class Together:
    """M replicas in this process, from the same weights; ``overlap`` may be one for each."""

    def __init__(
        self,
        members: int = 2,
        overlap: int | Sequence[int] = 1,
        optimizer: Callable[[nn.Module], torch.optim.Optimizer] = inner_of,
        model: Callable[[], nn.Module] = small,
        **options: Any,
    ) -> None:
        taus = [overlap] * members if isinstance(overlap, int) else overlap
        self.models = [model() for _ in range(members)]
        self.inners = [optimizer(m) for m in self.models]
        self.replicas = [
            make(m, inner, overlap=tau, transport=link, **options)
            for m, inner, tau, link in zip(
                self.models, self.inners, taus, InProcess.group(members), strict=True
            )
        ]

    def train(self, steps: range, watch: Callable[[int], None] = lambda step: None) -> Together:
        with ExitStack() as stack:
            for replica in self.replicas:
                stack.enter_context(replica)
            for step in steps:
                for rank, (model, inner) in enumerate(zip(self.models, self.inners, strict=True)):
                    inner_step(model, inner, step, rank)
                watch(step)
        return self

    def theta(self, rank: int = 0) -> Tensor:
        return flat(self.models[rank])


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()]).clone()


def bits(tensor: Tensor) -> str:
    return hashlib.blake2b(tensor.numpy().tobytes()).hexdigest()


def on_processes(ctx: Context, variant: str, steps: int, overlaps: list[int]) -> dict[str, Any]:
    """One replica of several processes, and the same replicas in one process."""
    options = {"overlap": overlaps[ctx.rank], **VARIANTS[variant]}
    model = small()
    inner = inner_of(model)
    with make(model, inner, **options) as diloco:
        for step in range(steps):
            inner_step(model, inner, step, ctx.rank)
    options.pop("overlap")
    tau: Any = VARIANTS[variant].get("overlap", overlaps)
    here = Together(ctx.size, tau, **options).train(range(steps))
    same = here.replicas[ctx.rank]
    return {
        "g": diloco.fingerprint(),
        "theta": bits(flat(model)),
        "g in one process": same.fingerprint(),
        "theta in one process": bits(here.theta(ctx.rank)),
        "received": [f.received for f in diloco.fragments],
        "sent": diloco.ledger.sent(ctx.rank),
        "sent in one process": same.ledger.sent(ctx.rank),
    }


def resumed(ctx: Context, overlaps: list[int]) -> dict[str, Any]:
    """40 steps at once, and 21 + 19 with a checkpoint through a file between, exchanges in flight."""

    def run(model: nn.Module, inner: torch.optim.Optimizer, diloco: StreamingDiLoCo, steps: range) -> None:
        with diloco:
            for step in steps:
                inner_step(model, inner, step, ctx.rank)

    def new() -> tuple[nn.Module, torch.optim.Optimizer, StreamingDiLoCo]:
        model = small()
        inner = inner_of(model)
        return model, inner, make(model, inner, overlap=overlaps[ctx.rank])

    whole = new()
    run(*whole, range(40))
    model, inner, diloco = new()
    run(model, inner, diloco, range(21))
    file = io.BytesIO()
    state = {"model": model.state_dict(), "inner": inner.state_dict(), "diloco": diloco.state_dict()}
    torch.save(state, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = new()
    again[0].load_state_dict(saved["model"])
    again[1].load_state_dict(saved["inner"])
    again[2].load_state_dict(saved["diloco"])
    run(*again, range(21, 40))
    return {
        "in flight": len(saved["diloco"]["in_flight"]),
        "whole": [bits(flat(whole[0])), whole[2].fingerprint()],
        "resumed": [bits(flat(again[0])), again[2].fingerprint()],
    }


def raised(run: Callable[[], Any]) -> str:
    try:
        run()
    except Exception as error:  # the test reads its type and text
        return f"{type(error).__name__}: {error}"
    return ""


def other_on_rank_1(ctx: Context) -> dict[str, str]:
    def enter(model: nn.Module, **options: Any) -> str:
        diloco = make(model, inner_of(model), **options)
        return raised(diloco.__enter__)

    second = ctx.rank == 1
    return {
        "shape": enter(narrow() if second else small()),
        "order": enter(small(), fragments=TURNED if second else PARTS),
        "same shapes": enter(small(), fragments=SWAPPED if second else PARTS),
        "alpha": enter(small(), alpha=0.25 if second else 0.5),
        "weights": enter(small(8 if second else 7)),
        "fragments": enter(small(), fragments=PARTS if second else groups({"a": "0.*", "b": ["2.*", "4.*"]})),
        "overlap": enter(small(), overlap=2 if second else 5),
    }


def not_finite_on_rank_1(ctx: Context, exact: bool) -> dict[str, Any]:
    model = small()
    inner = inner_of(model)
    diloco = make(model, inner, **({"codec": Float32()} if exact else {}), overlap=1)
    said, kept = "", ("", "")
    with diloco:
        for step in range(13):
            if step == 9 and ctx.rank == 1:
                with torch.no_grad():
                    model[0].weight[0, 0] = torch.nan
            if step == 10:
                kept = (diloco.fingerprint(), "")
            said += raised(lambda step=step: inner_step(model, inner, step, ctx.rank))
    return {"said": said, "same": diloco.fingerprint() == kept[0], "received": diloco.fragments[0].received}


def drifted_on_rank_1(ctx: Context) -> str:
    model = small()
    inner = inner_of(model)
    with make(model, inner) as diloco:
        for step in range(9):
            inner_step(model, inner, step, ctx.rank)
        if ctx.rank == 1:
            diloco.fragments[0].vector[3] += 1e-6
        return raised(lambda: [inner_step(model, inner, step, ctx.rank) for step in (9, 10)])


def data_parallel(ctx: Context) -> float:
    """H = 1, SGD inside, plain averaging outside, against the mean gradient: the largest difference."""
    model, other = small().double(), small().double()
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    with make(
        model,
        inner,
        fragments=lambda m: {"all": [n for n, _ in m.named_parameters()]},
        sync_every=1,
        overlap=0,
        alpha=0.0,
        outer=nesterov(1.0, 0.0),
        codec=Float32(),
    ):
        for step in range(5):
            x, y = batch(step, ctx.rank)
            inner.zero_grad()
            nn.functional.cross_entropy(model(x.double()), y).backward()
            inner.step()
            other.zero_grad()
            nn.functional.cross_entropy(other(x.double()), y).backward()
            for p in other.parameters():
                dist.all_reduce(p.grad)
                p.data.add_(p.grad, alpha=-0.1 / ctx.size)
    return float((flat(model) - flat(other)).abs().max())
