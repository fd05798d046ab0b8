"""What the tests of DADAO's members run in each worker process: every job returns JSON."""

from __future__ import annotations

import io
from typing import Any

import torch

from cograd.core.ledger import Ledger
from cograd.core.message import session_id
from cograd.core.streams import stream
from cograd.engines.events import serve
from cograd.engines.mailbox import Mailbox
from cograd.engines.transport import TorchDist
from cograd.engines.worker import Context
from cograd.machines.dadao import GossipRates, Graph, Member, gossip_rates
from cograd.models.convex import LeastSquares

NODES, D = 4, 5
UNIT = 0.02
"""Seconds of a unit of time."""


def network(name: str) -> GossipRates:
    return gossip_rates({"cycle": Graph.cycle(NODES), "complete": Graph.complete(NODES)}[name])


def problem() -> LeastSquares:
    return LeastSquares.random(NODES, 20, D, 0)


def start() -> torch.Tensor:
    return stream(0, "x0").normal(NODES, D).double()


def member(rank: int, name: str, until: float, seed: int = 0, average: bool = False, **options: Any) -> Member:
    p = problem()
    constants = {"mu": p.mu, "L": p.L, "rates": network(name)}
    return Member(
        p.gradients()[rank],
        start()[rank],
        rank=rank,
        until=until,
        seed=seed,
        average=average,
        **constants,  # type: ignore[arg-type]
        **options,
    )


def run(ctx: Context, name: str, sessions: list[float]) -> dict[str, Any]:
    """One node: a session up to each of these times, with a checkpoint through a file between two."""
    log: list[Any] = []
    ledger, saved = Ledger(), None
    for number, until in enumerate(sessions):
        node = member(ctx.rank, name, until, ledger=ledger)
        if saved is not None:
            node.load_state_dict(torch.load(saved, weights_only=True))
        with Mailbox(ctx.rank, session_id("dadao test", name, number)) as mailbox:
            mailbox.introduce(TorchDist())
            torch.distributed.barrier()  # nobody writes before all know each other: `connect` forgets what came
            serve(node, mailbox, range(ctx.size), unit=UNIT, ledger=ledger)
            torch.distributed.barrier()  # nobody hangs up on one who still reads
        log += node.log
        saved = io.BytesIO()
        torch.save(node.state_dict(), saved)
        saved.seek(0)
    state = node.state_dict()
    sent = [ledger.sent(), len(ledger), ledger.worked("grad", ctx.rank)]
    return {"log": log, "state": state["state"].tolist(), "counts": state["counts"], "sent": sent}


def other_smoothness(ctx: Context, rank: int) -> dict[str, Any]:
    """One node has eight times the L of the others: what each says."""
    p = problem()
    L = 8 * p.L if ctx.rank == rank else p.L
    rates, until = network("cycle"), 30.0
    node = Member(
        p.gradients()[ctx.rank], start()[ctx.rank], rank=ctx.rank, mu=p.mu, L=L, rates=rates, until=until
    )
    said = ""
    with Mailbox(ctx.rank, session_id("dadao test, other L")) as mailbox:
        mailbox.introduce(TorchDist())
        torch.distributed.barrier()
        try:
            serve(node, mailbox, range(ctx.size), unit=UNIT)
        except (ValueError, TimeoutError) as error:
            said = str(error)
        torch.distributed.barrier()
    return {"said": said}
