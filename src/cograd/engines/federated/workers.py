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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cograd.core.codecs import Context
from cograd.core.message import Schema
from cograd.core.streams import seed_for
from cograd.engines.federated.local import LocalModel
from cograd.engines.federated.protocol import ClientContext, State, Task
from cograd.engines.federated.wire import Wire

BUFFERS = "engine.buffers"
"""Name under which the engine keeps a client's buffers in its state, and sends averaged ones."""


class ClientError(RuntimeError):
    """A client's task failed; the message names client, task and round, and holds the traceback."""


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
        try:
            return self._run(job)
        except Exception:
            text = f"client {job.client}, task {job.task!r}, round {job.round}:\n{traceback.format_exc()}"
            return Done(job.client, job.task, job.round, job.schema, b"", {}, error=text)

    def _run(self, job: Job) -> Done:
        content = self.down.unpack(job.payload, job.schema, Context(self.seed, job.round, len(self.clients)))
        ctx = ClientContext(job.client, job.round, self.seed, self.sizes, self.model, self.initial)
        state = dict(job.state)
        self._set_buffers(state, content)
        _seed(seed_for(self.seed, "client", job.client, job.round, job.task))
        state, reply = self.tasks[job.task](state, content, self.clients[job.client], ctx)
        if ctx.trained is not None:
            self._keep_buffers(state, reply)
            self._measure(ctx, job)
        schema = self.up.schema(reply)
        payload = self.up.pack(reply, Context(self.seed, job.round, job.client))
        return Done(job.client, job.task, job.round, schema, payload, state, ctx.work, ctx.reports)

    def _set_buffers(self, state: State, content: dict[str, Tensor]) -> None:
        if self.buffers == "local" and self.fresh_buffers is not None:
            self.model.buffers = state.get(BUFFERS, self.fresh_buffers)
        elif self.buffers == "mean":
            self.model.buffers = content.pop(BUFFERS)

    def _keep_buffers(self, state: State, reply: dict[str, Tensor]) -> None:
        kept = self.model.buffers
        if kept is None:
            return
        if self.buffers == "local":
            state[BUFFERS] = kept
        else:
            reply[BUFFERS] = kept

    def _measure(self, ctx: ClientContext, job: Job) -> None:
        tested = getattr(self.clients[job.client], "test_y", None)
        if self.before and ctx.trained is not None and tested is not None and len(tested):
            data = self.clients[job.client]
            ctx.report("before", self.model.correct(ctx.trained, data.test_x, data.test_y) / len(tested))


def _seed(seed: int) -> None:
    """`torch.manual_seed`, which where CUDA sleeps formats and keeps a traceback at every call."""
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread for torch, and its random state as it was afterwards."""
    threads, random = torch.get_num_threads(), torch.random.get_rng_state()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.random.set_rng_state(random)


class Here:
    """Tasks run one after another in this process."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner

    def run(self, jobs: Sequence[Job]) -> list[Done]:
        with one_thread():
            return [self.runner.run(job) for job in jobs]

    def close(self) -> None:
        """Nothing is held."""


class Forked:
    """Tasks run in ``count`` processes forked from this one; each gets the next job when it is done with one.

    What a runner holds (examples, model) is shared with the workers as it was when they were forked. Raises
    ClientError, naming the client, if a worker dies.
    """

    def __init__(self, runner: Runner, count: int) -> None:
        context = multiprocessing.get_context("fork")
        self._pipes: list[Any] = []
        self._processes: list[Any] = []
        for _ in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(runner, theirs, [ours, *self._pipes]), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, jobs: Sequence[Job]) -> list[Done]:
        found: dict[int, Done] = {}
        waiting = list(enumerate(jobs))[::-1]
        busy: dict[Any, list[int]] = {pipe: [] for pipe in self._pipes}
        known: dict[Any, set[int]] = {pipe: set() for pipe in self._pipes}
        for _ in range(2):  # one job to work on and one to go on with
            for pipe in self._pipes:
                self._give(pipe, waiting, busy, known, jobs)
        while len(found) < len(jobs):
            ready: list[Any] = multiprocessing.connection.wait([pipe for pipe in self._pipes if busy[pipe]])
            for pipe in ready:
                number = busy[pipe].pop(0)
                found[number] = self._take(pipe, jobs[number])
                self._give(pipe, waiting, busy, known, jobs)
        return [found[number] for number in range(len(jobs))]

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()

    def _give(
        self,
        pipe: Any,
        waiting: list[tuple[int, Job]],
        busy: dict[Any, list[int]],
        known: dict[Any, set[int]],
        jobs: Sequence[Job],
    ) -> None:
        if not waiting:
            return
        number, job = waiting.pop()
        payload = None if job.key in known[pipe] else job.payload
        known[pipe].add(job.key)
        first = not busy[pipe] and len(known[pipe]) == 1
        busy[pipe].append(number)
        record = (job.client, job.task, job.round, job.key, job.schema, payload, plain(job.state), first)
        try:
            pipe.send_bytes(pickle.dumps(record, protocol=5))
        except OSError:
            raise self._died(pipe, job) from None

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
        return ClientError(f"a worker process died ({how}) with client {job.client}, task {job.task!r}")


def _serve(runner: Runner, pipe: Any, others: Sequence[Any]) -> None:
    """A worker's life: jobs from the pipe until its other end is closed."""
    for other in others:
        other.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    contents: dict[int, bytes] = {}
    jobs: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(pipe, jobs), daemon=True).start()
    while (received := jobs.get()) is not None:
        record = pickle.loads(received)
        client, task, round, key, schema, payload, state, first = record
        if first:
            contents.clear()
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
        name: (value.dtype, tuple(value.shape), value.contiguous().reshape(-1).view(torch.uint8).numpy())
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
