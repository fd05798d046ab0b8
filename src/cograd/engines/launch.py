"""Real worker processes on one machine: start them, watch them, and say which one failed and why.

``launch("train.py", workers=4)`` runs a script that was written for ``torchrun``, unchanged.
``Workers(4)`` is a pool that starts once and then runs functions by name, ``"module:qualname"``, with JSON
arguments and results: start-up is mostly the import of torch in every process, so a pool is the way to run
many short things.

Every worker beats a heart into a pipe that the parent watches. A worker that raises, is killed by a signal,
leaves early or stops responding ends the whole run with a ``WorkerError`` that names it, within seconds
(``stall_after`` seconds for one that stops responding). When one worker dies, its peers fail in their
collectives soon after; the parent waits a moment for all of the news and then names the cause and not an
echo of it. No process is left behind: workers and whatever they started are ended with the run, and a worker
whose parent has vanished ends itself.

The processes are this module's children, each in a process group of its own, running
``cograd.engines.worker``; the messages are described there. The rendezvous store lives in the parent, as
torchrun's does, on a port that the system picked: there is no race for a free port.

POSIX only. On Windows, ``launch`` and ``Workers`` raise OSError.
"""

from __future__ import annotations

import enum
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore  # type: ignore[attr-defined]  # it is, but torch does not say so

TICK = 0.2  # seconds between two looks at the workers, when nothing is heard
NEWS = 1.5  # seconds from the first sign of trouble to the verdict: the cause may be heard of last
FAREWELL = 2.0  # seconds between SIGTERM and SIGKILL
MISSED = 3.5  # a worker this many seconds without a heartbeat is suspect, once its peers fail
BUSY = 2.5  # times stall_after: the patience with a silent worker that is visibly at work

STATES = {"R": "running", "S": "sleeping", "D": "waiting for a disk", "T": "stopped", "Z": "dead"}

Progress = Callable[[int, dict[str, Any]], None]


class WorkerError(RuntimeError):
    """A worker failed, and with it the run. ``rank``, ``pid`` and ``reason`` say which one and why."""

    def __init__(self, rank: int, pid: int, reason: str) -> None:
        super().__init__(f"worker of rank {rank} (pid {pid}) {reason}")
        self.rank = rank
        self.pid = pid
        self.reason = reason


def launch(
    script: str | os.PathLike[str],
    args: Sequence[str] = (),
    workers: int = 4,
    *,
    module: bool = False,
    stall_after: float = 10.0,
    env: Mapping[str, str] | None = None,
) -> None:
    """Run ``script args...`` in ``workers`` processes with torchrun's environment; return when all are done.

    With ``module``, ``script`` is the name of a module to run, as with ``python -m``. ``env`` adds to this
    process's environment. Workers write to this process's stdout and stderr; their stdin is empty.

    Raises WorkerError when a worker fails, FileNotFoundError when there is no such script, ValueError for
    fewer than one worker. A worker that exits with code 0 before the others is no failure in itself; it is
    named when its peers then fail in a collective.
    """
    if not module and not Path(script).is_file():
        raise FileNotFoundError(f"no script {os.fspath(script)!r} (from {os.getcwd()})")
    crew = _Crew(workers, threads=None, stall_after=stall_after, env=env, ends_by_exit=True)
    with crew.ended_on_error():
        crew.start({"script": os.fspath(script), "args": list(args), "module": module})
        crew.watch()
    crew.end()


class Workers:
    """``size`` worker processes, started once, that run functions by name until the pool is closed.

    ``threads`` is the number of threads torch uses in each worker (default: the cores shared out evenly).
    The constructor does not wait for the workers: the first call does. ``pids`` are the processes, in rank
    order. After a WorkerError the pool has ended.
    """

    def __init__(self, size: int, *, threads: int | None = None, stall_after: float = 10.0) -> None:
        self._crew = _Crew(size, threads=threads, stall_after=stall_after, env=None, ends_by_exit=False)
        self._open = True
        with self._crew.ended_on_error():
            self._crew.start({})
        self.pids = [worker.process.pid for worker in self._crew.workers]

    def call(
        self, function: str, args: Mapping[str, Any] | None = None, *, on_progress: Progress | None = None
    ) -> list[Any]:
        """Run ``module:qualname`` as ``function(ctx, **args)`` on every rank; the results in rank order.

        ``ctx`` is a ``cograd.engines.worker.Context``: ``rank``, ``size`` and ``progress(**event)``, which
        calls ``on_progress(rank, event)`` here. The default process group (gloo) is initialised; a collective
        that some rank has not joined after 20 s fails. Arguments, events and results pass through JSON, so
        that tuples come out as lists. The module must be importable from this process's ``sys.path``.

        Whatever the function raises comes back as a WorkerError and ends the pool, as does an exception of
        ``on_progress`` or a KeyboardInterrupt.
        """
        module, _, qualname = function.partition(":")
        if not module or not qualname:
            raise ValueError(f"function must be named 'module:qualname', not {function!r}")
        if not self._open:
            raise RuntimeError("this pool of workers has ended")
        request = {"function": function, "args": dict(args or {})}
        json.dumps(request)  # arguments that JSON cannot hold are refused before any worker hears of them
        try:
            with self._crew.ended_on_error():
                self._crew.send(request)
                self._crew.watch(on_progress)
        except BaseException:
            self._open = False
            raise
        return [worker.result for worker in self._crew.workers]

    def close(self) -> None:
        """Let the workers leave, and end those that do not."""
        if self._open:
            self._open = False
            self._crew.end(politely=True)

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


class _Blame(enum.IntEnum):
    """What a worker may have done to the others, from the surest cause to the mere effect."""

    KILLED = 0
    STALLED = 1
    FAILED = 2  # raised, or exited with a code: the earliest is the cause
    SILENT = 3  # no heartbeat of late, and its peers' collective failed
    LEFT = 4  # done in good order, and its peers' collective failed
    ABSENT = 5  # the only one still at work, and its peers' collective failed
    ECHO = 6  # its own collective failed
    NONE = 7


@dataclass
class _Worker:
    """What the parent knows of one worker."""

    rank: int
    process: subprocess.Popen[bytes]
    reports: int  # the end of its pipe that we read
    unread: bytes = b""  # the beginning of a line whose end has not come
    unsent: bytes = b""  # what its stdin has not taken yet
    silence: float = 0.0  # seconds since it was last heard
    code: int | None = None  # exit code, negative for a signal
    error: dict[str, Any] | None = None
    result: Any = None
    finished: bool = False  # did what was asked: returned a result, or ran its script to the end
    since: float = field(default_factory=time.monotonic)  # when it finished or exited


class _Crew:
    """The processes of one run, and the supervision that ``launch`` and ``Workers`` share."""

    def __init__(
        self,
        size: int,
        *,
        threads: int | None,
        stall_after: float,
        env: Mapping[str, str] | None,
        ends_by_exit: bool,
    ) -> None:
        if os.name != "posix":
            raise OSError("worker processes need POSIX process groups and pipes: on Windows, use WSL")
        if size < 1:
            raise ValueError(f"workers must be at least 1, not {size}")
        self._stall_after = stall_after
        self._ends_by_exit = ends_by_exit
        self._selector = selectors.DefaultSelector()
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._env = {**os.environ, **(env or {})}
        self._env.update(_torchrun(size, self._store.port))
        if threads is not None:
            self._env["OMP_NUM_THREADS"] = str(threads)
        self._env.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // size)))
        self._size = size
        self.workers: list[_Worker] = []

    def start(self, job: dict[str, Any]) -> None:
        """Start all processes and send each the job."""
        pythonpath = self._env.get("PYTHONPATH")
        root = str(Path(__file__).parents[2])  # where the workers find cograd, however this process did
        self._env["PYTHONPATH"] = root if pythonpath is None else os.pathsep.join([root, pythonpath])
        for rank in range(self._size):
            ours, theirs = os.pipe()
            try:
                process = subprocess.Popen(
                    [sys.executable, "-P", "-u", "-m", "cograd.engines.worker", str(theirs)],
                    bufsize=0,
                    env={**self._env, "RANK": str(rank), "LOCAL_RANK": str(rank), "ROLE_RANK": str(rank)},
                    stdin=subprocess.PIPE,
                    pass_fds=(theirs,),
                    # A group and not a session: should this process be killed while a worker is stopped,
                    # the kernel wakes the orphaned group, and the worker finds out.
                    process_group=0,
                )
            except BaseException:
                os.close(ours)
                raise
            finally:
                os.close(theirs)
            worker = _Worker(rank, process, ours)
            for fd in (ours, _stdin(worker)):
                os.set_blocking(fd, False)
            self.workers.append(worker)
            self._selector.register(ours, selectors.EVENT_READ, worker)
        self.send({**job, "path": sys.path, "pythonpath": pythonpath})

    def send(self, message: dict[str, Any]) -> None:
        """Give every worker something to do."""
        line = json.dumps(message).encode() + b"\n"
        for worker in self.workers:
            worker.finished, worker.result, worker.silence = False, None, 0.0
            if not worker.unsent:
                self._selector.register(_stdin(worker), selectors.EVENT_WRITE, worker)
            worker.unsent += line
            self._push(worker)

    def _push(self, worker: _Worker) -> None:
        """Write what its stdin takes now. It may take nothing: a stopped worker must not stop us."""
        try:
            worker.unsent = worker.unsent[os.write(_stdin(worker), worker.unsent) :]
        except BlockingIOError:
            return
        except BrokenPipeError:  # it is dead: watch() will see that, and say how it died
            worker.unsent = b""
        if not worker.unsent:
            self._selector.unregister(_stdin(worker))

    def watch(self, on_progress: Progress | None = None) -> None:
        """Return when every worker has finished; raise the WorkerError of the one that keeps it from that."""
        verdict_at: float | None = None
        looked = time.monotonic()
        while not all(worker.finished for worker in self.workers):
            ready = self._selector.select(TICK)
            # Time in which this process itself did not look (a slow callback, a suspended machine) is not
            # the workers' silence.
            now = time.monotonic()
            for worker in self.workers:
                worker.silence += min(now - looked, 2 * TICK)
            looked = now
            for key, _ in ready:
                if key.events == selectors.EVENT_WRITE:
                    self._push(key.data)
                else:
                    self._listen(key.data, on_progress)
            for worker in self.workers:
                self._bury(worker, on_progress)
            if not any(self._in_trouble(worker) for worker in self.workers):
                verdict_at = None
                continue
            verdict_at = verdict_at or now + NEWS
            ended = all(w.finished or w.error or w.code is not None for w in self.workers)
            if ended or now >= verdict_at:
                raise self._verdict()

    def _listen(self, worker: _Worker, on_progress: Progress | None) -> bool:
        """Read what a worker has written; False if there was nothing."""
        try:
            data = os.read(worker.reports, 1 << 16)
        except BlockingIOError:
            return False
        if not data:
            self._selector.unregister(worker.reports)
            return False
        worker.silence = 0.0
        *lines, worker.unread = (worker.unread + data).split(b"\n")
        for line in lines:
            message = json.loads(line)
            match message["kind"]:
                case "progress" if on_progress is not None:
                    on_progress(worker.rank, message["event"])
                case "result":
                    worker.result, worker.finished, worker.since = message["value"], True, time.monotonic()
                case "error":
                    worker.error = message
        return True

    def _bury(self, worker: _Worker, on_progress: Progress | None) -> None:
        """If a worker has just exited: hear its last words, and end the processes it left behind."""
        if worker.code is not None or worker.process.poll() is None:
            return
        worker.code, worker.since = worker.process.returncode, time.monotonic()
        _signal_group(worker, signal.SIGKILL)
        if worker.reports in self._selector.get_map():
            while self._listen(worker, on_progress):
                pass
        if self._ends_by_exit and worker.code == 0:
            worker.finished = True

    def _in_trouble(self, worker: _Worker) -> bool:
        if worker.finished:
            return False
        return worker.error is not None or worker.code is not None or self._stalled(worker)

    def _stalled(self, worker: _Worker) -> bool:
        """Silent for too long.

        One long call into C may hold the interpreter, and with it the heart: loading torch from a cold disk
        is one. A silent process that runs, or waits for a disk, is therefore given more time.
        """
        if worker.code is not None or worker.silence < self._stall_after:
            return False
        return _state(worker) not in ("R", "D") or worker.silence >= BUSY * self._stall_after

    def _verdict(self) -> WorkerError:
        """Of all that went wrong, what went wrong first."""
        echoes = [w.error | {"rank": w.rank} for w in self.workers if w.error and w.error["consequence"]]
        echo = min(echoes, key=lambda error: error["time"], default=None)
        accounts = [(*self._account(worker, echo), worker) for worker in self.workers]
        _, _, reason, culprit = min(accounts, key=lambda account: account[:2])
        return WorkerError(culprit.rank, culprit.process.pid, reason)

    def _account(self, worker: _Worker, echo: dict[str, Any] | None) -> tuple[_Blame, float, str]:
        """How a worker may be to blame: how surely, since when, and what to say of it.

        ``echo`` is the first report of a collective that failed because some other worker did.
        """
        error, code = worker.error, worker.code
        at_work = [w.rank for w in self.workers if not w.finished and w.error is None and w.code is None]
        heard = f"rank {echo['rank']} failed with {echo['type']}: {echo['message']}" if echo else ""

        if error is not None and not error["consequence"]:
            reason = f"raised {error['type']}: {error['message']}\n{error['trace']}"
            return _Blame.FAILED, error["time"], reason
        if error is not None:
            reason = f"failed in a collective with {error['type']}: {error['message']}"
            reason += f" (still at work elsewhere: ranks {at_work})" if at_work else ""
            return _Blame.ECHO, error["time"], f"{reason}\n{error['trace']}"
        if code is not None and code < 0:
            # Some back ends answer a peer's failure with an abort; no other signal is an answer to that.
            blame = _Blame.FAILED if code == -signal.SIGABRT else _Blame.KILLED
            return blame, worker.since, f"was killed by {_signal_name(-code)}"
        if worker.finished:
            left = "returned" if code is None else f"exited with code {code}"
            return _Blame.LEFT, worker.since, f"{left} while its peers were in a collective: {heard}"
        if code is not None:
            return _Blame.FAILED, worker.since, f"exited with code {code}" + (" early" if code == 0 else "")
        stalled = self._stalled(worker)
        if stalled or (echo and worker.silence >= MISSED):
            state = _state(worker)
            reason = f"stopped responding for {worker.silence:.0f} s"
            reason += f" (process state {state}: {STATES.get(state, 'unknown')})"
            return _Blame.STALLED if stalled else _Blame.SILENT, 0.0, reason
        if at_work == [worker.rank]:
            return _Blame.ABSENT, 0.0, f"was elsewhere while its peers waited in a collective: {heard}"
        return _Blame.NONE, 0.0, "was at work"

    @contextmanager
    def ended_on_error(self) -> Iterator[None]:
        """Whatever is raised inside, be it a KeyboardInterrupt, leaves no process behind."""
        try:
            yield
        except BaseException:
            self.end()
            raise

    def end(self, politely: bool = False) -> None:
        """End every worker and whatever it started. ``politely`` lets idle ones leave by themselves first."""
        try:
            for worker in self.workers:
                assert worker.process.stdin is not None
                worker.process.stdin.close()
            if politely:
                self._wait()
            for worker in self.workers:
                if worker.process.returncode is None:
                    _signal_group(worker, signal.SIGTERM)
                    _signal_group(worker, signal.SIGCONT)  # a stopped process does not hear the other
            self._wait()
        finally:  # also when a second Ctrl-C cuts the patience short
            for worker in self.workers:
                if worker.process.returncode is None:
                    _signal_group(worker, signal.SIGKILL)
                    worker.process.wait()
                os.close(worker.reports)
            self._selector.close()

    def _wait(self) -> None:
        deadline = time.monotonic() + FAREWELL
        for worker in self.workers:
            if worker.process.returncode is None:
                with suppress(subprocess.TimeoutExpired):
                    worker.process.wait(max(0.0, deadline - time.monotonic()))
                    _signal_group(worker, signal.SIGKILL)  # what it left behind


def _torchrun(size: int, port: int) -> dict[str, str]:
    """What torchrun tells all workers of one machine."""
    return {
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "ROLE_WORLD_SIZE": str(size),
        "GROUP_RANK": "0",
        "GROUP_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # rank 0 connects to the store and does not open it
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_MAX_RESTARTS": "0",
        "TORCHELASTIC_RUN_ID": "cograd",
    }


def _stdin(worker: _Worker) -> int:
    assert worker.process.stdin is not None
    return worker.process.stdin.fileno()


def _signal_group(worker: _Worker, number: signal.Signals) -> None:
    # macOS answers EPERM for a group of which only a zombie is left.
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(worker.process.pid, number)


def _signal_name(number: int) -> str:
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = f"signal {number}"
    if number == signal.SIGKILL:
        name += " (when nobody sent it, the kernel did: the machine ran out of memory)"
    return name


def _state(worker: _Worker) -> str:
    """The letter for the state of a process, as ``ps`` prints it."""
    try:
        stat = Path(f"/proc/{worker.process.pid}/stat").read_text()
        return stat.rpartition(")")[2].split()[0]
    except OSError:  # macOS has no /proc
        command = ["ps", "-o", "state=", "-p", str(worker.process.pid)]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()[:1]
