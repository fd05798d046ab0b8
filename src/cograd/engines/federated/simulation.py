"""Federated clients in one process: deterministic, measured, resumable.

    sim = Simulation(FedAvg(LocalSGD(lr=0.1)), model, loss, clients, sampler=Uniform(0.1), test=test)
    for row in sim.rounds(60):
        print(row.round, row.accuracy, row.up, row.down)

The same seed gives the same numbers whatever the number of worker processes: server and clients run on one
thread each, a client draws from its own streams, and replies are taken in the order of the clients' numbers.
"""

from __future__ import annotations

import heapq
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from torch import Tensor, nn

from cograd.core.codecs import Codec, Context, Float32
from cograd.core.ledger import Ledger
from cograd.core.message import Frame, Schema
from cograd.engines.federated import saving
from cograd.engines.federated.local import LocalModel, Loss
from cograd.engines.federated.protocol import (
    Action,
    After,
    Event,
    Lost,
    Method,
    Reply,
    Send,
    Session,
    Start,
    Timer,
    all_finite,
)
from cograd.engines.federated.row import Row
from cograd.engines.federated.samplers import Everyone, Sampler, drawn
from cograd.engines.federated.store import StateStore
from cograd.engines.federated.wire import Wire
from cograd.engines.federated.workers import (
    BUFFER_RULES,
    BUFFERS,
    ClientError,
    Done,
    Forked,
    Here,
    Job,
    NotFinite,
    Runner,
    isolated,
    mean_buffers,
)

TICKS = 10**9
"""Ticks of the clock in a unit of time. Times are whole ticks, so that equal times are equal."""

NONFINITE_RULES = ("refuse", "exclude")


@dataclass
class Tally:
    """Counters of a simulation; all of them are saved with it."""

    answers: list[int]
    order: int = 0
    ticks: int = 0
    started: bool = False
    up: int = 0
    down: int = 0
    work: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0


class Simulation:
    """One method on one model and one set of clients.

    Args:
        method: what is simulated.
        model: a module, whose trainable parameters are what is shared; it belongs to the simulation from then
            on. Or a vector, for methods that need no module.
        loss: mean loss of outputs and targets; None with a vector.
        clients: what each client holds, for example `Clients`; every entry must have a length > 0.
        sampler: who takes part in a round.
        seed: of everything that is drawn.
        workers: processes forked to run clients; 0 runs them in this one, None takes one a core.
        up, down: codecs of the vectors that clients send and receive.
        buffers: what becomes of floating buffers such as BatchNorm's statistics: ``refuse`` a model that has
            any, keep them ``local``, or send them along and take their size-weighted ``mean``.
        nonfinite: ``refuse`` raises `NotFinite` for a reply that holds NaN or infinity; ``exclude`` leaves it
            and the state that came with it out, and names the client in the row.
        response_time: how long client i takes to answer, in any unit: a sequence, or a function of the client
            and of how often it has answered before. None: no time passes.
        timeout: how long an exchange waits for replies in that unit; later ones are dropped.
        test: examples with ``x`` and ``y`` for the global model's accuracy.
        every: rounds between measurements of accuracy.
        personal: also measure each client's model on its own test examples, before and after aggregation.
        cap: bytes of client state that stay in memory; the rest lies on disk meanwhile.
        ledger: counts messages and work; client i is party i, the server party ``len(clients)``.

    Raises ValueError for an argument out of range, an empty client, or buffers that are refused.
    """

    def __init__(
        self,
        method: Method,
        model: nn.Module | Tensor,
        loss: Loss | None,
        clients: Sequence[Any],
        *,
        sampler: Sampler = Everyone(),
        seed: int = 0,
        workers: int | None = 0,
        up: Codec = Float32(),
        down: Codec = Float32(),
        buffers: str = "refuse",
        nonfinite: str = "refuse",
        response_time: Sequence[float] | Callable[[int, int], float] | None = None,
        timeout: float | None = None,
        test: Any = None,
        every: int = 1,
        personal: bool = False,
        cap: int | None = None,
        ledger: Ledger | None = None,
    ) -> None:
        sizes = _sizes(clients)
        _one_of("buffers", buffers, BUFFER_RULES)
        _one_of("nonfinite", nonfinite, NONFINITE_RULES)
        if every < 1:
            raise ValueError(f"every must be >= 1; got {every}")
        if timeout is not None and not timeout > 0:
            raise ValueError(f"timeout must be > 0 or None; got {timeout}")
        if workers is not None and workers < 0:
            raise ValueError(f"workers must be >= 0 or None; got {workers}")
        if personal and not any(len(getattr(data, "test_y", ())) for data in clients):
            raise ValueError("personal must be False where no client has test examples; got True")
        self.method, self.clients, self.test, self.every, self.personal = method, clients, test, every, personal
        self.local = LocalModel.of(model, loss)
        kept = self.local.buffers
        if kept is not None and buffers == "refuse":
            raise ValueError(
                f"the model has {kept.numel()} floating buffers (BatchNorm's statistics?); "
                "say buffers='local' to keep each client's own or buffers='mean' to average them"
            )
        self.ledger = ledger if ledger is not None else Ledger()
        self.states = StateStore(cap)
        self.buffers = kept if buffers == "mean" else None
        self._nonfinite, self._response = nonfinite, _response_times(response_time, len(clients))
        self.sampler = sampler
        drawn(sampler, 0, len(clients), seed)  # a participation that selects nobody is refused here
        space, initial = self.local.space, self.local.theta.clone()
        self.session = Session(
            space, initial.cpu(), sizes, seed, lambda round: drawn(sampler, round, len(clients), seed), timeout
        )
        layout = method.shared(space).layout
        self.runner = Runner(
            method.tasks(), clients, sizes, self.local, initial, Wire(layout, up), Wire(layout, down),
            seed, buffers if kept is not None else "refuse", personal,
        )  # fmt: skip
        self._workers = _processes(workers, self.local)
        self._executor: Here | Forked | None = None
        self.server = method.start(self.session)
        self.history: list[Row] = []
        self.queue: list[tuple[int, int, Event]] = []
        self.sends: list[Send] = []
        self.tally = Tally([0] * len(clients))
        self._schemas: set[str] = set()
        self.between_rounds = True
        self._new_row()

    def save(self, folder: Path) -> None:
        """Write all that is needed to go on (see `saving.save`)."""
        saving.save(self, folder)

    def load(self, folder: Path) -> None:
        """Continue from what `save` wrote (see `saving.load`)."""
        self._new_row()
        saving.load(self, folder)

    # Running

    def run(
        self, rounds: int, *, progress: Callable[[Row], None] | None = None,
        checkpoint: Path | None = None, save_every: int = 10,
    ) -> list[Row]:  # fmt: skip
        """Run until ``rounds`` rounds are done, in all; returns the whole history.

        With ``checkpoint`` the run is saved there every ``save_every`` rounds and at the end, and continues
        from there if something is saved. ``progress`` is called after every round.
        """
        if checkpoint is not None and (checkpoint / "simulation.json").exists() and not self.tally.started:
            self.load(checkpoint)
        for row in self.rounds(rounds):
            if progress is not None:
                progress(row)
            if checkpoint is not None and (row.round % save_every == 0 or row.round >= rounds):
                self.save(checkpoint)
        return self.history

    def rounds(self, count: int) -> Iterator[Row]:
        """Rounds one after another until ``count`` of them are done in all."""
        while len(self.history) < count and (row := self.advance()) is not None:
            yield row

    def until(self, time: float) -> Iterator[Row]:
        """Rounds that end at or before a time of the session's clock."""
        while (row := self.advance(round(time * TICKS))) is not None:
            yield row

    def advance(self, limit: float = math.inf) -> Row | None:
        """Run to the end of the next round; None if nothing is left to happen up to the tick ``limit``."""
        began = time.monotonic()
        with isolated():
            try:
                ended = self._advance(limit)
            finally:
                self.tally.seconds += time.monotonic() - began
            return self._row() if ended else None

    def _advance(self, limit: float) -> bool:
        """Whether a round has ended."""
        if not self.tally.started:
            self.tally.started = True
            self._do(self.method.next(self.server, Start(), self.session))
        done = self.server["round"]
        while True:
            self._ask()
            if not self.queue or self.queue[0][0] > limit:
                return False
            self.between_rounds = False
            self.tally.ticks, _, event = heapq.heappop(self.queue)
            self.tell_time()
            if isinstance(event, Reply) and not self._arrived(event):
                continue
            self._do(self.method.next(self.server, event, self.session))
            if self.server["round"] != done:
                self._average_buffers()
                self.between_rounds = True
                return True

    def close(self) -> None:
        """End the worker processes and remove client states from disk."""
        self._dismiss()
        self.states.close()

    def __enter__(self) -> Simulation:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # One step of the clock

    def _do(self, actions: Sequence[Action]) -> None:
        """Take note of what is to be done: clients are asked when the clock goes on."""
        for action in actions:
            if isinstance(action, After):
                self._at(action.delay, Timer(action.key))
        self.sends += [action for action in actions if isinstance(action, Send)]

    def tell_time(self) -> None:
        """Set the session's time to the clock's."""
        self.session.now = self.tally.ticks / TICKS

    def _at(self, delay: float, event: Event) -> None:
        ticks = self.tally.ticks + round(delay * TICKS)
        heapq.heappush(self.queue, (ticks, self.tally.order, event))
        self.tally.order += 1

    def _ask(self) -> None:
        """Have all clients that are to be asked do their tasks, and their replies on the way.

        What fails raises before anything is counted or kept; the same can be tried again.
        """
        if not self.sends:
            return
        try:
            jobs, results, events = self._run()
        except BaseException:  # an answer that is still to come must not be taken for that of a later job
            self._dismiss()
            raise
        self.between_rounds = False
        for job, done, event in zip(jobs, results, events, strict=True):
            self._account(job, done)
            if isinstance(event, Reply):
                self.states[done.client] = done.state
            else:
                self._lost[event.client] = event.reason
            self._at(self._response(done.client, self.tally.answers[done.client]), event)
            self.tally.answers[done.client] += 1
        self.sends = []

    def _jobs(self, sends: Sequence[Send]) -> list[Job]:
        packed: dict[int, tuple[Schema, bytes]] = {}
        jobs, number, wire = [], self.server["round"], self.runner.down
        if len({send.to for send in sends}) < len(sends):
            to = [send.to for send in sends]
            raise RuntimeError(f"round {number}: a client may be asked one thing at a time; asked are {to}")
        context = Context(self.session.seed, number, len(self.clients))
        for send in sends:
            key = id(send.content)
            if key not in packed:
                content = send.content if self.buffers is None else {**send.content, BUFFERS: self.buffers}
                packed[key] = wire.schema(content), wire.pack(content, context)
            jobs.append(Job(send.to, send.task, number, key, *packed[key], self.states[send.to]))
        return jobs

    def _run(self) -> tuple[list[Job], list[Done], list[Reply | Lost]]:
        """Pack what is to be sent, run the tasks, unpack the answers."""
        if self._executor is None:
            self._executor = Forked(self.runner, self._workers) if self._workers else Here(self.runner)
        jobs = self._jobs(self.sends)
        results = self._executor.run(jobs)
        failed = next((done.error for done in results if done.error is not None), None)
        if failed is not None:
            raise ClientError(failed)
        return jobs, results, [self._event(done) for done in results]

    def _dismiss(self) -> None:
        if self._executor is not None:
            self._executor.close()
            self._executor = None

    def _event(self, done: Done) -> Reply | Lost:
        """What the server gets to see of an answer."""
        context = Context(self.session.seed, done.round, done.client)
        content = self.runner.up.unpack(done.payload, done.schema, context)
        if all_finite(content):
            return Reply(done.client, done.task, done.round, content)
        what = f"the reply of client {done.client} to {done.task!r} in round {done.round} holds NaN or infinity"
        if self._nonfinite == "refuse":
            raise NotFinite(f"{what}; nonfinite='exclude' would leave it out")
        return Lost(done.client, done.task, done.round, what)

    def _account(self, job: Job, done: Done) -> None:
        """Count a message there and back, and the work between."""
        server = len(self.clients)
        self._count(server, job.client, job.round, job.schema, len(job.payload))
        self._count(job.client, server, job.round, done.schema, len(done.payload))
        self.tally.down += len(job.payload)
        self.tally.up += len(done.payload)
        for kind, amount in done.work.items():
            self.ledger.work(job.client, kind, amount)
            self.tally.work[kind] = self.tally.work.get(kind, 0.0) + amount
        for name, value in done.reports.items():
            self._reports.setdefault(name, []).append(value)

    def _arrived(self, event: Reply) -> bool:
        """Whether a reply has come in time; then its client has taken part."""
        if not self.method.takes(self.server, event, self.session):
            return False
        self._participants.add(event.client)
        kept = event.content.pop(BUFFERS, None)
        if kept is not None:
            self._new_buffers[event.client] = kept
        return True

    def _average_buffers(self) -> None:
        if self._new_buffers:
            self.buffers = mean_buffers(self._new_buffers, self.session.sizes)

    def _count(self, sender: int, to: int, number: int, schema: Schema, payload: int) -> None:
        first = f"{sender == len(self.clients)} {schema.digest}"
        described = 0 if first in self._schemas else len(schema.to_bytes())
        self._schemas.add(first)
        self.ledger.send(
            sender, number, payload, to=to, frame=payload + described + Frame.OVERHEAD, schema=described
        )

    # Measuring

    def accuracy(self, vector: Tensor, test: Any = None) -> float:
        """The share of a test set that the model at ``vector`` classifies rightly."""
        examples = test if test is not None else self.test
        with isolated():
            self._evaluation_buffers()
            return self.local.correct(vector, examples.x, examples.y) / len(examples.y)

    def personal_accuracies(self) -> list[float]:
        """Each client's share right on its own test examples, by its model after aggregation; NaN without
        any."""
        found = []
        with isolated():
            for client, data in enumerate(self.clients):
                state = self.states[client]
                self._evaluation_buffers(state)
                vector = self.method.personal(self.server, state, client)
                right = self.local.correct(vector, data.test_x, data.test_y) if len(data.test_y) else math.nan
                found.append(right / max(1, len(data.test_y)))
        return found

    def _evaluation_buffers(self, state: Mapping[str, Any] | None = None) -> None:
        """Set the averaged buffers, or a client's own; the initial ones where nobody has any yet."""
        fresh = self.runner.fresh_buffers
        if fresh is not None:
            own = fresh if state is None else state.get(BUFFERS, fresh)
            self.local.buffers = own if self.buffers is None else self.buffers

    def _row(self) -> Row:
        number = self.server["round"]
        measured: dict[str, Any] = {}
        if number % self.every == 0:
            if self.test is not None:
                measured["accuracy"] = self.accuracy(self.method.model(self.server))
            if self.personal:
                found = sorted(x for x in self.personal_accuracies() if not math.isnan(x))
                measured["personal"] = fmean(found)
                measured["worst"] = fmean(found[: max(1, len(found) // 10)])
        reports = {name: fmean(values) for name, values in self._reports.items()}
        named = self.session.participants
        row = Row(
            round=number,
            time=self.session.now,
            participants=tuple(sorted(self._participants if named is None else named)),
            up=self.tally.up,
            down=self.tally.down,
            work=dict(self.tally.work),
            seconds=self.tally.seconds,
            before=reports.pop("before", None),
            reports={**reports, **{name: float(value) for name, value in self.session.reports.items()}},
            lost=self._lost,
            **measured,
        )
        self.history.append(row)
        self._new_row()
        return row

    def _new_row(self) -> None:
        self._participants: set[int] = set()
        self._reports: dict[str, list[float]] = {}
        self._lost: dict[int, str] = {}
        self._new_buffers: dict[int, Tensor] = {}
        self.session.reports.clear()
        self.session.participants = None


def _sizes(clients: Sequence[Any]) -> list[int]:
    if not len(clients):
        raise ValueError("clients must hold at least one client; got none")
    sizes = [len(data) for data in clients]
    empty = next((client for client, size in enumerate(sizes) if not size), None)
    if empty is not None:
        raise ValueError(f"client {empty} holds no examples; every client must hold at least one")
    return sizes


def _processes(workers: int | None, model: LocalModel) -> int:
    """How many processes to fork. Raises ValueError for a model on a GPU, which forked processes cannot use."""
    forkable = hasattr(os, "fork") and model.theta.device.type == "cpu"
    if workers and model.theta.device.type != "cpu":
        raise ValueError(f"workers must be 0 or None for a model on {model.theta.device}; got {workers}")
    return (os.cpu_count() or 1 if workers is None else workers) if forkable else 0


def _one_of(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")


def _response_times(
    given: Sequence[float] | Callable[[int, int], float] | None, clients: int
) -> Callable[[int, int], float]:
    if given is None:
        return lambda client, answers: 0.0
    if callable(given):
        return given
    if len(given) != clients or not all(0 < t < math.inf for t in given):
        raise ValueError(f"response_time must hold {clients} times > 0; got {list(given)}")
    times = list(given)
    return lambda client, answers: times[client]
