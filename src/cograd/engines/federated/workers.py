"""Running client tasks: in this process, or in worker processes that were forked from it.

Both go through `Runner`, one thread each, so that the numbers do not depend on how many there are.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import pickle
import queue
import signal
import threading
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cograd.core.codecs import Context
from cograd.core.message import Schema
from cograd.core.streams import seed_for
from cograd.core.threads import one_thread
from cograd.engines.federated.local import LocalModel
from cograd.engines.federated.protocol import ClientContext, Content, State, Task
from cograd.engines.federated.wire import Wire

ENGINE = "engine."
"""Prefix of what the engine keeps in a client's state: tasks do not see it."""
BUFFER_RULES = ("refuse", "local", "mean")
BUFFERS = "engine.buffers"
"""Name under which the engine keeps a client's buffers in its state, and sends averaged ones."""


class ClientError(RuntimeError):
    """A client's task failed; the message names client, task and round, and holds the traceback."""


class NotFinite(ClientError):
    """A client's reply holds NaN or infinity."""


@dataclass(frozen=True)
class Job:
    """One task to run. ``key`` identifies the content, which several jobs may share."""

    client: int
    task: str
    round: int
    key: int
    schema: Schema
    payload: bytes
    state: State


@dataclass(frozen=True)
class Done:
    """What a task left: the reply as it travels, the client's new state, work, figures."""

    client: int
    task: str
    round: int
    schema: Schema
    payload: bytes
    state: State
    work: Mapping[str, float] = field(default_factory=dict)
    reports: Mapping[str, float] = field(default_factory=dict)
    error: str | None = None


@dataclass
class Runner:
    """What is needed to run any client's task.

    ``buffers`` says what happens to a module's floating buffers: ``local`` keeps each client's own, ``mean``
    sends them and has them averaged. ``before`` measures the trained vector on the client's own test examples.
    """

    tasks: Mapping[str, Task]
    clients: Sequence[Any]
    sizes: Sequence[int]
    model: LocalModel
    initial: Tensor
    up: Wire
    down: Wire
    seed: int
    buffers: str = "refuse"
    before: bool = False

    def __post_init__(self) -> None:
        self.fresh_buffers = self.model.buffers

    def run(self, job: Job) -> Done:
        """Run a task. What it raises is in the answer."""
        try:
            return self._run(job)
        except Exception:
            text = f"client {job.client}, task {job.task!r}, round {job.round}:\n{traceback.format_exc()}"
            return Done(job.client, job.task, job.round, job.schema, b"", {}, error=text)

    def _run(self, job: Job) -> Done:
        if job.task not in self.tasks:
            raise ValueError(f"task must be one of {', '.join(self.tasks)}; got {job.task!r}")
        content = self.down.unpack(job.payload, job.schema, Context(self.seed, job.round, len(self.clients)))
        content = {name: tensor.to(self.model.theta.device) for name, tensor in content.items()}
        own = self._copied(job.state)
        ctx = ClientContext(job.client, job.round, self.seed, self.sizes, self.model, self.initial)
        kept = {name: own.pop(name) for name in list(own) if name.startswith(ENGINE)}
        self._prepare(kept, content, job)
        state, reply = self.tasks[job.task](own, content, self.clients[job.client], ctx)
        state, reply = self._checked(state), dict(reply)
        if ctx.trained is not None:
            self._keep_buffers(kept, reply)
            self._measure(ctx, job)
        schema = self.up.schema(reply)
        payload = self.up.pack(reply, Context(self.seed, job.round, job.client), kept)
        return Done(
            job.client, job.task, job.round, schema, payload, {**state, **kept}, ctx.work, ctx.reports
        )  # fmt: skip

    def _copied(self, state: State) -> State:
        """A copy on the model's device: a task may change what it is given, and may fail after that."""
        device = self.model.theta.device
        return {n: t.to(device, copy=True) if isinstance(t, Tensor) else t for n, t in state.items()}

    def _prepare(self, kept: State, content: Content, job: Job) -> None:
        """Whatever a task could find left over from another is set: vector, buffers, torch's random numbers."""
        self.model.at(self.initial)
        self.model.restart()
        if self.buffers == "local" and self.fresh_buffers is not None:
            self.model.buffers = kept.get(BUFFERS, self.fresh_buffers)
        elif self.buffers == "mean":
            self.model.buffers = content.pop(BUFFERS)
        number = seed_for(self.seed, "client", job.client, job.round, job.task)
        torch.default_generator.manual_seed(number)  # torch.manual_seed looks for devices, each time anew
        if self.model.theta.is_cuda:
            torch.cuda.manual_seed(number)

    def _checked(self, state: State) -> State:
        """The state that stays with the client; what lies in the model's own storage is copied."""
        found = {}
        for name, value in state.items():
            if not isinstance(value, Tensor | bool | int | float | str):
                raise TypeError(f"state {name!r} must be a tensor or a scalar; got {type(value).__name__}")
            found[name] = value.clone() if isinstance(value, Tensor) and self.model.owns(value) else value
        return found

    def _keep_buffers(self, kept: State, reply: Content) -> None:
        buffers = self.model.buffers
        if buffers is not None:
            (kept if self.buffers == "local" else reply)[BUFFERS] = buffers

    def _measure(self, ctx: ClientContext, job: Job) -> None:
        tested = getattr(self.clients[job.client], "test_y", None)
        if self.before and ctx.trained is not None and tested is not None and len(tested):
            data = self.clients[job.client]
            ctx.report("before", self.model.correct(ctx.trained, data.test_x, data.test_y) / len(tested))


def mean_buffers(kept: Mapping[int, Tensor], sizes: Sequence[int]) -> Tensor:
    """The mean of clients' buffers, each weighted by its number of examples."""
    parts = [kept[client] * float(sizes[client]) for client in sorted(kept)]
    return torch.stack(parts).sum(0) / float(sum(sizes[client] for client in kept))


@contextmanager
def isolated() -> Iterator[None]:
    """One thread for torch, and its random state as it was afterwards."""
    random = torch.random.get_rng_state()
    with one_thread():
        try:
            yield
        finally:
            torch.random.set_rng_state(random)


class Here:
    """Tasks run one after another in this process."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner

    def run(self, jobs: Sequence[Job]) -> list[Done]:
        """The jobs' answers, in their order."""
        return [self.runner.run(job) for job in jobs]

    def close(self) -> None:
        """Nothing is held."""


class Forked:
    """Tasks run in ``count`` processes forked from this one; each gets the next job when it is done with one.

    What a runner holds (examples, model) is shared with the workers as it was when they were forked. Raises
    ClientError, naming the client, if a worker dies; they must not be used after an error of any kind.
    """

    def __init__(self, runner: Runner, count: int) -> None:
        context = multiprocessing.get_context("fork")
        self._pipes: list[Any] = []
        self._processes: list[Any] = []
        self._batch = 0
        for _ in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(runner, theirs, [ours, *self._pipes]), daemon=True)
            with warnings.catch_warnings():  # torch's threads wait for work: they hold no locks
                warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
                process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, jobs: Sequence[Job]) -> list[Done]:
        """The jobs' answers, in their order."""
        self._batch += 1
        found: dict[int, Done] = {}
        waiting = list(enumerate(jobs))[::-1]
        busy: dict[Any, list[int]] = {pipe: [] for pipe in self._pipes}
        known: dict[Any, set[int]] = {pipe: set() for pipe in self._pipes}
        for _ in range(2):  # one job to work on and one to go on with
            for pipe in self._pipes:
                self._give(pipe, waiting, busy[pipe], known[pipe])
        while len(found) < len(jobs):
            ready: list[Any] = multiprocessing.connection.wait([pipe for pipe in self._pipes if busy[pipe]])
            for pipe in ready:
                number = busy[pipe].pop(0)
                found[number] = self._take(pipe, jobs[number])
                self._give(pipe, waiting, busy[pipe], known[pipe])
        return [found[number] for number in range(len(jobs))]

    def close(self) -> None:
        """End the workers; they hold nothing that is needed."""
        for process in self._processes:
            process.kill()
        for process, pipe in zip(self._processes, self._pipes, strict=True):
            process.join()
            pipe.close()

    def _give(self, pipe: Any, waiting: list[tuple[int, Job]], busy: list[int], known: set[int]) -> None:
        """Send the next job; a content that the worker knows by its key is not sent again."""
        if not waiting:
            return
        number, job = waiting.pop()
        payload = None if job.key in known else job.payload
        known.add(job.key)
        busy.append(number)
        record = (
            self._batch, job.client, job.task, job.round, job.key, job.schema, payload, plain(job.state)
        )  # fmt: skip
        with suppress(OSError):  # if the worker is dead, `_take` finds out, and with which job
            pipe.send_bytes(pickle.dumps(record, protocol=5))

    def _take(self, pipe: Any, job: Job) -> Done:
        try:
            schema, payload, state, work, reports, error = pickle.loads(pipe.recv_bytes())
        except (EOFError, OSError):
            raise self._died(pipe, job) from None
        return Done(job.client, job.task, job.round, schema, payload, tensors(state), work, reports, error)

    def _died(self, pipe: Any, job: Job) -> ClientError:
        process = self._processes[self._pipes.index(pipe)]
        process.join(5)
        code = process.exitcode
        how = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
        return ClientError(
            f"client {job.client}, task {job.task!r}, round {job.round}: its worker process died ({how})"
        )


def _serve(runner: Runner, pipe: Any, others: Sequence[Any]) -> None:
    """A worker's life: jobs from the pipe until its other end is closed."""
    for other in others:
        other.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    contents: dict[int, bytes] = {}
    current = 0
    jobs: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(pipe, jobs), daemon=True).start()
    while (received := jobs.get()) is not None:
        batch, client, task, round, key, schema, payload, state = pickle.loads(received)
        if batch != current:
            current, contents = batch, {}
        if payload is not None:
            contents[key] = payload
        done = runner.run(Job(client, task, round, key, schema, contents[key], tensors(state)))
        answer = (done.schema, done.payload, plain(done.state), done.work, done.reports, done.error)
        pipe.send_bytes(pickle.dumps(answer, protocol=5))
    os._exit(0)


def _receive(pipe: Any, jobs: queue.SimpleQueue[bytes | None]) -> None:
    """Take jobs from the pipe as they come: its other end must never wait until this process has answered."""
    try:
        while True:
            jobs.put(pipe.recv_bytes())
    except (EOFError, OSError):
        jobs.put(None)


def plain(state: State) -> dict[str, Any]:
    """A state whose tensors are arrays of bytes with dtype and shape: quick to pickle, of any dtype."""
    return {
        name: (value.dtype, tuple(value.shape), value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        if isinstance(value, Tensor)
        else value
        for name, value in state.items()
    }


def tensors(state: Mapping[str, Any]) -> State:
    """Inverse of `plain`."""
    return {
        name: torch.from_numpy(np.require(value[2], requirements="W")).view(value[0]).view(value[1])
        if isinstance(value, tuple)
        else value
        for name, value in state.items()
    }
