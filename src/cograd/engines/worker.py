"""The child side of ``cograd.engines.launch``: what runs inside one worker process.

``python -m cograd.engines.worker <fd>`` is started by the parent and by nobody else. It reads its job
from stdin, one JSON object a line, and writes what happens to the pipe ``<fd>``, one JSON object a line:

    {"kind": "beat"}                                        every second: this process still runs
    {"kind": "progress", "event": {...}}                    a function said how far it is
    {"kind": "result", "value": ...}                        a function returned
    {"kind": "error", "type", "message", "trace", "time",   something was raised; ``consequence`` marks a
     "consequence"}                                         collective that failed because a peer had

The first line of stdin is the job. A job with a ``script`` is run as ``__main__``; any other is followed by
calls, ``{"function": "module:qualname", "args": {...}}``, until stdin ends. Nothing is pickled.

Nothing heavy is imported here: the heart must beat before torch is loaded.
"""

from __future__ import annotations

import importlib
import json
import operator
import os
import re
import runpy
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import Any, TextIO

BEAT = 1.0  # seconds between heartbeats
COLLECTIVE_TIMEOUT = 20.0  # a pool's collective that a rank never joins fails after this many seconds
TRACE_LINES = 20  # of a traceback, the end that is reported

# How torch.distributed words the failure of a collective: gloo and NCCL raise bare RuntimeErrors.
_COLLECTIVE = re.compile(
    r"gloo/|NCCL|Connection (closed|reset|refused)|Broken pipe|Timed out waiting|wait timeout", re.I
)
_COLLECTIVE_TYPES = {"DistError", "DistBackendError", "DistNetworkError", "DistStoreError"}


class Reports:
    """The pipe to the parent. Lines of the main thread and of the heartbeat never interleave."""

    def __init__(self, fd: int) -> None:
        os.set_inheritable(fd, False)  # programs that the script starts must not hold the pipe open
        self._fd = fd
        self._lock = threading.Lock()

    def send(self, kind: str, **body: Any) -> None:
        line = json.dumps({"kind": kind, **body}).encode() + b"\n"
        with self._lock:
            while line:
                line = line[os.write(self._fd, line) :]

    def beat(self, parent: int) -> None:
        """Beat for ever; when the parent is gone, end this process and everything it started.

        Asking for the parent's id is surer than waiting for a broken pipe: a process that the parent
        forked may hold the other end. A beat is skipped, not waited for, while the pipe is full (the
        parent of an idle pool does not read) or while the main thread is writing.
        """
        while True:
            writable = select.select([], [self._fd], [], 0)[1]
            if writable and self._lock.acquire(blocking=False):
                try:
                    os.write(self._fd, b'{"kind": "beat"}\n')
                except BrokenPipeError:
                    break
                finally:
                    self._lock.release()
            time.sleep(BEAT)
            if os.getppid() != parent:
                break
        os.killpg(os.getpgrp(), signal.SIGKILL)

    def error(self, error: BaseException) -> bool:
        """Report an exception; True if it only tells that a collective failed."""
        told, consequence = _tell(error)
        lines = "".join(traceback.format_exception(told)).rstrip().splitlines()
        self.send(
            "error",
            type=type(told).__name__,
            message=str(told),
            trace="\n".join(lines[-TRACE_LINES:]),
            time=time.monotonic(),  # one clock for all processes of a machine
            consequence=consequence,
        )
        return consequence


@dataclass(frozen=True)
class Context:
    """What a function called on a pool knows about where it runs. Its process group is initialised."""

    rank: int
    size: int
    _reports: Reports

    def progress(self, **event: Any) -> None:
        """Hand an event (JSON) to the parent's ``on_progress(rank, event)``."""
        self._reports.send("progress", event=event)


def _tell(error: BaseException) -> tuple[BaseException, bool]:
    """The exception of a chain that tells most, and whether it is a mere consequence.

    What was raised first decides. A collective that failed and was wrapped in the script's own exception is
    still a consequence; a ValueError whose clean-up then ran into a collective is still a ValueError.
    """
    chain = [error]
    while True:
        last = chain[-1]
        inner = last.__cause__ or (None if last.__suppress_context__ else last.__context__)
        if inner is None or inner in chain:
            break
        chain.append(inner)
    if _collective(chain[-1]):
        return error, True
    return next(link for link in chain if not _collective(link)), False


def _collective(error: BaseException) -> bool:
    if type(error).__name__ in _COLLECTIVE_TYPES:
        return True
    return type(error) is RuntimeError and _COLLECTIVE.search(str(error)) is not None


def run_script(job: dict[str, Any], reports: Reports) -> None:
    """Run a script, or a module, as ``python script.py args`` would."""
    script = job["script"]
    sys.argv[:] = [script, *job["args"]]
    sys.path.insert(0, os.getcwd() if job["module"] else os.path.dirname(os.path.realpath(script)))
    try:
        if job["module"]:
            runpy.run_module(script, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(script, run_name="__main__")
    except SystemExit:
        raise
    except BaseException as error:
        error.__traceback__ = _from_script(error.__traceback__)
        consequence = reports.error(error)
        if not consequence:  # one cause is worth a traceback; its echoes in every peer are not
            sys.excepthook(type(error), error, error.__traceback__)
        sys.exit(1)


def serve(control: TextIO, reports: Reports) -> None:
    """Join the pool's process group, then answer calls until the parent closes stdin."""
    try:
        import torch.distributed as dist

        dist.init_process_group("gloo", timeout=timedelta(seconds=COLLECTIVE_TIMEOUT))
        context = Context(dist.get_rank(), dist.get_world_size(), reports)
        for line in control:
            call = json.loads(line)
            value = _resolve(call["function"])(context, **call["args"])
            try:
                reports.send("result", value=value)
            except (TypeError, ValueError) as error:
                raise TypeError(f"{call['function']} returned what JSON cannot hold: {error}") from None
        dist.destroy_process_group()
    except BaseException as error:
        error.__traceback__ = _from_script(error.__traceback__)
        reports.error(error)
        # Without the clean-up of an interpreter: it may wait for peers, and they wait for these sockets
        # to close.
        os._exit(1)


def _resolve(name: str) -> Callable[..., Any]:
    module, _, qualname = name.partition(":")
    try:
        function: Callable[..., Any] = operator.attrgetter(qualname)(importlib.import_module(module))
    except (ModuleNotFoundError, AttributeError) as error:
        raise LookupError(f"no function {name!r}: {error}") from error
    return function


def _from_script(trace: TracebackType | None) -> TracebackType | None:
    """A traceback without the frames of this file and of runpy that lead to the user's code."""
    while trace is not None and trace.tb_frame.f_globals.get("__name__") in (__name__, "runpy"):
        trace = trace.tb_next
    return trace


def main() -> None:
    reports = Reports(int(sys.argv[1]))
    threading.Thread(target=reports.beat, args=(os.getppid(),), daemon=True).start()
    # Stdin brings the job; the user's code must not read it, and finds an empty stdin instead.
    control = os.fdopen(os.dup(0))
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)

    line = control.readline()
    if not line:  # the parent went away before it sent a job
        return
    job = json.loads(line)
    sys.path[:] = job["path"]
    if job["pythonpath"] is None:  # the parent set it to have this module found
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = job["pythonpath"]
    if "script" in job:
        run_script(job, reports)
    else:
        serve(control, reports)


if __name__ == "__main__":
    # As cograd.engines.worker and not as __main__, which is the script's own name.
    from cograd.engines import worker

    worker.main()
