"""What the worker processes of test_gradient_coding_processes.py run: rank 0 is the master, the others work."""

from __future__ import annotations

import hashlib
import io
import math
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cograd.core.message import session_id
from cograd.core.streams import stream
from cograd.engines.mailbox import Mailbox, PeerLost
from cograd.engines.transport import TorchDist
from cograd.engines.worker import Context
from cograd.machines.gradient_coding.choice import select
from cograd.machines.gradient_coding.clock import Trace
from cograd.machines.gradient_coding.clusters import MailboxCluster, SimulatedCluster, serve
from cograd.machines.gradient_coding.codes import Mask
from cograd.machines.gradient_coding.learners import Bench, Learner
from cograd.machines.gradient_coding.schemes import GC, MSGC, MiniTask, Scheme, Uncoded, scheme_of
from cograd.machines.gradient_coding.training import GradientCoding

MODELS, STEPS, N = 3, 5, 4
X = stream(0, "x").normal(96, 6)
Y = stream(0, "y").normal(96, 3)


def loss(model: nn.Module, rows: Tensor) -> Tensor:
    return (model(X[rows]) - Y[rows]).square().sum()


def learners() -> list[Learner]:
    made = []
    for index in range(MODELS):
        torch.manual_seed(index)
        model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.2), nn.Tanh(), nn.Linear(8, 3))
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        made.append(Learner(model, optimizer, loss, lambda step: torch.roll(torch.arange(96), step)[:64]))
    return made


def bits(made: list[Learner]) -> str:
    flat = torch.cat([p.detach().reshape(-1) for learner in made for p in learner.model.parameters()])
    return hashlib.blake2b(flat.numpy().tobytes(), digest_size=8).hexdigest()


def scripted(scheme: Scheme, rounds: int) -> list[Mask]:
    """Stragglers of each round: half of the rounds have two, more than some of the schemes allow."""
    draws = stream(1, "script").numpy
    return [draws.permutation(scheme.n) < (2 if draws.random() < 0.5 else 0) for _ in range(rounds)]


def as_delays(script: list[Mask]) -> Trace:
    """The same stragglers on the clock: later in the order of their numbers, as a release admits them."""
    late = np.stack(script) * (3.0 + np.arange(len(script[0])))
    return Trace(1.0 + late)


def simulated(scheme: Scheme) -> dict[str, Any]:
    made = learners()
    run = GradientCoding(made, scheme, SimulatedCluster(as_delays(scripted(scheme, 60))))
    run.train(STEPS)
    return {"bits": bits(made), "waits": run.waits, "bytes": run.bytes}


def meet(ctx: Context) -> Mailbox:
    """A mailbox of a new session: worker i is rank i + 1, the master is member N."""
    meet.session += 1  # type: ignore[attr-defined]
    mailbox = Mailbox((ctx.rank - 1) % ctx.size, session_id("gradient-coding", meet.session))  # type: ignore[attr-defined]
    transport = TorchDist()
    mailbox.introduce(transport)
    transport.all_gather_bytes(b"")  # nobody writes before all know each other: `connect` forgets what came
    return mailbox


meet.session = 0  # type: ignore[attr-defined]


def work(mailbox: Mailbox) -> dict[str, Any]:
    """A worker: its bench begins with another scheme than the master's, which comes with the orders."""
    serve(mailbox, N, Bench(learners(), GC(N, 0)))
    return {}


def same_as_simulation(ctx: Context, scheme: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Train on real workers whose stragglers are scripted, and in a simulation with the same ones."""
    with meet(ctx) as mailbox:
        if ctx.rank:
            return work(mailbox)
        made, chosen = learners(), scheme_of(scheme, arguments)
        script = scripted(chosen, 60)
        cluster = MailboxCluster(mailbox, N, script=lambda r: script[r])
        run = GradientCoding(made, chosen, cluster)
        run.train(STEPS)
        cluster.close()
    real = {"bits": bits(made), "waits": run.waits, "bytes": run.bytes}
    return {"real": real, "simulated": simulated(scheme_of(scheme, arguments)), "stale": run.round}


def resumed(ctx: Context, scheme: str, arguments: dict[str, Any], stop: int) -> dict[str, Any]:
    """Train for some rounds, save, begin anew with other workers and a new master, load, train to the end."""
    chosen = scheme_of(scheme, arguments)
    script, saved, made = scripted(chosen, 60), io.BytesIO(), learners()
    for resuming in (False, True):
        with meet(ctx) as mailbox:
            if ctx.rank:
                work(mailbox)
                continue
            made = learners()
            cluster = MailboxCluster(mailbox, N, script=lambda r: script[r])
            run = GradientCoding(made, scheme_of(scheme, arguments), cluster)
            if resuming:
                saved.seek(0)
                run.load_state_dict(torch.load(saved))
            else:
                run.start(STEPS)
            while not run.done and (resuming or run.round < stop):
                run.step()
            torch.save(run.state_dict(), saved)
            flying = len(run.scheme.in_flight)
            cluster.close()
        if not resuming:
            in_flight = flying
    if ctx.rank:
        return {}
    return {"bits": bits(made), "simulated": simulated(chosen)["bits"], "in_flight": in_flight}


class Crash(Exception):
    """Of a worker, in the middle of a task."""


class Mortal(Bench):
    """A worker's bench that fails at its answer number ``at``."""

    def __init__(self, at: int) -> None:
        super().__init__(learners(), GC(N, 0))
        self.left = at

    def answer(self, worker: int, tasks: Sequence[MiniTask], base: int) -> list[Tensor]:
        self.left -= 1
        if self.left < 0:
            raise Crash
        return super().answer(worker, tasks, base)


def restarted(ctx: Context) -> dict[str, Any]:
    """Worker 1 fails in round 4, where it is a straggler, and starts again with initial weights."""
    chosen = MSGC(N, 1, 3, 2)
    script = [np.arange(N) == (1 if r == 4 else -1) for r in range(60)]
    with meet(ctx) as mailbox:
        if ctx.rank - 1 == 1:
            try:
                serve(mailbox, N, Mortal(4))
            except Crash:
                return {**work(mailbox), "crashed": True}
        elif ctx.rank:
            return work(mailbox)
        made = learners()
        cluster = MailboxCluster(mailbox, N, script=lambda r: script[r])
        run = GradientCoding(made, chosen, cluster)
        run.train(STEPS)
        cluster.close()
    same = learners()
    GradientCoding(same, MSGC(N, 1, 3, 2), SimulatedCluster(as_delays(script))).train(STEPS)
    return {"bits": bits(made), "simulated": bits(same), "waits": run.waits}


def probed(ctx: Context) -> dict[str, Any]:
    """Workers of which one is slow: a probe without coding, one at another load, and a choice."""
    with meet(ctx) as mailbox:
        if ctx.rank:
            made = learners()
            for learner in made:
                learner.loss = slow_loss if ctx.rank == 3 else loss
            serve(mailbox, N, Bench(made, GC(N, 0)))
            return {}
        cluster = MailboxCluster(mailbox, N)
        run = GradientCoding(learners(), Uncoded(N), cluster)
        run.train(4)
        probe = run.trace()
        cluster.mu = math.inf
        run.train(1, GC(N, 1))
        more = run.trace()
        cluster.close()
    choice = select(probe, 0.0, MODELS - 1, ("uncoded", "gc"))
    means = probe.seconds.mean(0).tolist()
    return {
        "shapes": [probe.seconds.shape, more.seconds.shape],
        "loads": [probe.load, more.load],
        "means": means,
        "chosen": repr(choice.scheme),
    }


def slow_loss(model: nn.Module, rows: Tensor) -> Tensor:
    time.sleep(0.2)
    return loss(model, rows)


def on_real_time(ctx: Context) -> dict[str, Any]:
    """No script: the clock is real, so which results are used is not known, but the weights are those of
    uncoded training."""
    with meet(ctx) as mailbox:
        if ctx.rank:
            return work(mailbox)
        made, uncoded = learners(), learners()
        cluster = MailboxCluster(mailbox, N)
        run = GradientCoding(made, GC(N, 2), cluster)
        run.train(STEPS)
        run.train(1, scheme_of("MSGC", {"n": N, "B": 1, "W": 2, "lam": 2}))
        cluster.close()
    reference = GradientCoding(uncoded, GC(N, 2), SimulatedCluster(Trace(np.ones((60, N)))))
    reference.train(STEPS)
    reference.train(1, scheme_of("MSGC", {"n": N, "B": 1, "W": 2, "lam": 2}))
    pairs = zip(made, uncoded, strict=True)
    error = max(
        float((p - q).abs().max())
        for a, b in pairs
        for p, q in zip(a.model.parameters(), b.model.parameters(), strict=True)
    )
    return {"error": error, "seconds": run.wall_clock}


def losing_workers(ctx: Context, dying: int) -> dict[str, Any]:
    """Workers 0 .. dying - 1 hang up at once."""
    with meet(ctx) as mailbox:
        transport = TorchDist()
        if ctx.rank:
            if ctx.rank - 1 < dying:
                mailbox.send(N, 99, b"")  # so that the master has a connection to lose
                mailbox.close()
            transport.all_gather_bytes(b"")
            return work(mailbox) if ctx.rank - 1 >= dying else {}
        transport.all_gather_bytes(b"")
        made = learners()
        cluster = MailboxCluster(mailbox, N, patience=20.0)
        run = GradientCoding(made, GC(N, 1), cluster)
        said = ""
        try:
            run.train(2)
        except PeerLost as error:
            said = str(error)
        cluster.close()
        return {"said": said, "updates": run.updates}


def refused(ctx: Context) -> dict[str, Any]:
    """A mailbox that is not the master's, and a payload of another size."""
    with meet(ctx) as mailbox:
        if ctx.rank:
            return {}
        said = []
        for make in (
            lambda: MailboxCluster(mailbox, N + 1),
            lambda: Bench(learners(), GC(N, 1)).split(b"1234", 1),
        ):
            try:
                make()
            except ValueError as error:
                said.append(str(error))
        return {"said": said}
