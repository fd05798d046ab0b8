"""What the tests of Just One Byte run in other processes: jobs of a pool, and the program of a free member.

As a program (``python one_byte_jobs.py '<json>'``) it is one machine of a group that others join and leave. It
writes one JSON object a line to stdout and waits on stdin where the test wants it to.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cograd.core.codecs import Float32
from cograd.core.message import Frame, session_id
from cograd.core.streams import seed_for, stream
from cograd.engines.mailbox import Mailbox
from cograd.engines.transport import TorchDist
from cograd.engines.worker import Context
from cograd.machines.baselines.full_gradient import Backprop, FullZeroth
from cograd.machines.one_byte import Diverged, LocalPeers, LogNibble, OneByte
from cograd.machines.one_byte.group import Group

SAMPLES = 4

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "root": {"average": "sqrt", "lr": 0.002},
    "learned scale": {"gamma": 0.1},
    "variance scaling": {"variance_scaling": True},
    "float32": {"codec": Float32()},
    "nibbles": {"codec": LogNibble()},
    "full zeroth order": {"kind": FullZeroth},
    "backprop": {"kind": Backprop},
}


def small() -> nn.Module:
    torch.manual_seed(seed_for(3, "init"))
    return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Dropout(0.5), nn.Linear(20, 3))


def optimizer(model: nn.Module, kind: type[OneByte] = OneByte, **options: Any) -> OneByte:
    return kind(model, **{"lr": 0.02, "samples": SAMPLES, "seed": 5, **options})


def batch(round: int, machine: int, sample: int) -> tuple[Tensor, Tensor]:
    x = stream(1, "data", round, machine, sample).normal(8, 12)
    return x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long()


def batches(round: int, machine: int) -> list[tuple[Tensor, Tensor]]:
    return [batch(round, machine, s) for s in range(SAMPLES)]


def loss_of(model: nn.Module) -> Any:
    return lambda b: F.cross_entropy(model(b[0]), b[1])


def simulated(variant: str, members: Sequence[int], rounds: int) -> str:
    model = small()
    zo = optimizer(model, **VARIANTS[variant])
    peers = LocalPeers(zo, members)
    for t in range(rounds):
        peers.step(loss_of(model), [batches(t, m) for m in members])
    return zo.fingerprint()


# Jobs of a pool: a fixed group over torch.distributed.


def equal_to_simulation(ctx: Context, variant: str, rounds: int) -> dict[str, Any]:
    """Real processes and one process, from the same data; and what travelled, measured on the wire."""
    transport = TorchDist()
    model = small()
    zo = optimizer(model, transport=transport, **VARIANTS[variant])
    gather, wire = transport.all_gather_bytes, []

    def counting(data: Any) -> Any:
        wire.append(len(data) - Frame.OVERHEAD)
        return gather(data)

    transport.all_gather_bytes = counting  # type: ignore[method-assign]
    losses = [zo.step(loss_of(model), batches(t, ctx.rank)).loss for t in range(rounds)]
    reference = simulated(variant, range(ctx.size), rounds) if ctx.rank == 0 else ""
    return {
        "bits": zo.fingerprint(),
        "simulated": reference,
        "wire": sorted(set(wire)),
        "sent": [zo.ledger.sent(m) for m in range(ctx.size)],
        "grads": [p.grad is None for p in model.parameters()],
        "losses": losses,
    }


def wide(ctx: Context) -> dict[str, Any]:
    """A million parameters send as much as few."""
    torch.manual_seed(0)
    model = nn.Linear(1000, 1000)
    zo = OneByte(model, lr=1e-6, samples=3, transport=TorchDist())
    x = torch.ones(2, 1000)
    for _ in range(2):
        zo.step(lambda _: model(x).square().mean(), [0, 1, 2])
    return {"sent": zo.ledger.sent(ctx.rank), "bits": zo.fingerprint()}


def flip_a_bit(model: nn.Module) -> None:
    """One in the middle of a trained weight's mantissa, which no update rounds away."""
    model[3].weight.data.view(torch.int32)[1, 7] ^= 1 << 12  # type: ignore[index, operator, union-attr]


def flipped(ctx: Context, victim: int, check_every: int) -> dict[str, Any]:
    """Eight rounds, in which a bit of one machine's weights flips after two; who hears of it takes over the
    weights of a machine that is not at fault."""
    transport, model = TorchDist(), small()
    zo = optimizer(model, transport=transport, check_every=check_every)
    said = {}
    while zo.round < 8:
        if zo.round == 2 and ctx.rank == victim:
            flip_a_bit(model)
        try:
            zo.step(loss_of(model), batches(zo.round, ctx.rank))
        except Diverged as error:
            said = {"text": str(error), "ranks": error.ranks, "round": zo.round, "sent": zo.ledger.sent()}
            weights = transport.all_gather_bytes(zo.weights())
            if ctx.rank in error.ranks:
                zo.load_weights(weights[0 if victim else 1], zo.log, zo.log_eps)
    checks = [(e.round, e.frame - Frame.OVERHEAD, e.copies) for e in zo.ledger if not e.payload + e.schema]
    return {
        "said": said,
        "bits": zo.fingerprint(),
        "payload": [[e.round, e.payload] for e in zo.ledger if e.sender == ctx.rank and e.payload],
        "checks": checks,
    }


def other_on_rank_1(ctx: Context, what: str) -> str:
    model = small()
    changes: dict[str, Any] = {"lr": 0.03, "check_every": 0}
    options = {what: changes[what]} if what in changes and ctx.rank == 1 else {}
    if what == "weights" and ctx.rank == 1:
        model[0].weight.data[0, 0] += 1e-6
    if what == "frozen":
        model[0].requires_grad_(False)
        model[0].bias.data[0] += 1e-6 * ctx.rank
    if what == "shapes" and ctx.rank == 1:
        model = nn.Linear(12, 3)
    try:
        optimizer(model, transport=TorchDist(), **options)
    except ValueError as error:
        return f"{type(error).__name__}: {error}"
    return ""


# The program of a free member.


def main(job: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    me = job["member"]
    model = small()
    if job.get("download"):
        model[0].weight.data.zero_()
    zo = optimizer(model)
    with Mailbox(me, session_id("one-byte test")) as mailbox:
        say(address=mailbox.address)
        peers = json.loads(sys.stdin.readline())
        if peers:
            known = {int(m): tuple(a) for m, a in peers.items()}
            group = Group.join(zo, mailbox, known, download=bool(job.get("download")), patience=20)
        else:
            group = Group(zo, mailbox, patience=20)
        say(joined=group.round)
        while group.round < job["rounds"]:
            count = job["meet"].get(str(group.round))
            if count is not None:
                say(waiting=group.round)
                group.wait_for(count, timeout=60)
            if job.get("halt") == group.round:
                say(halted=group.round)
                sys.stdin.readline()
            group.step(loss_of(model), batches(group.round, me))
        log = [[list(entry.members), entry.codes.hex()] for entry in zo.log]
        payload = [[e.round, e.payload] for e in zo.ledger if e.sender == me and e.payload]
        say(bits=zo.fingerprint(), log=log, payload=payload, members=group.members)
        sys.stdin.readline()


def say(**event: Any) -> None:
    print(json.dumps(event), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
