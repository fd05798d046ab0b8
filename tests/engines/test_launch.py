"""Real processes: what they compute, how each way to fail is named, and that none is left behind."""

import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

import cograd
from cograd.engines.launch import WorkerError, Workers, _Crew, _Worker, launch
from cograd.engines.worker import _tell

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs POSIX processes")

# Announces itself on a FIFO that it and its own child keep open: the reader meets the end of the file when,
# and only when, all of them are gone.
ANNOUNCE = """
import os, signal, subprocess, sys
rank = int(os.environ["RANK"])
fifo = os.open(sys.argv[1], os.O_WRONLY)
os.set_inheritable(fifo, True)
subprocess.Popen(["sleep", "600"], close_fds=False)
os.write(fifo, b"%d %d\\n" % (rank, os.getpid()))
"""
WAIT = ANNOUNCE + "signal.pause()\n"
SUPERVISE = """
import sys
from cograd.engines.launch import WorkerError, Workers, _Crew, _Worker, launch
try:
    launch(sys.argv[1], sys.argv[2:], workers=2)
except KeyboardInterrupt:
    sys.exit(130)
"""


class Fifo:
    """The reading end of the FIFO that announced workers hold."""

    def __init__(self, path):
        os.mkfifo(path)
        self.path = str(path)
        self._fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)

    def _read(self):
        assert select.select([self._fd], [], [], 30)[0], "nothing came through the FIFO"
        return os.read(self._fd, 4096)

    def pids(self, workers):
        text = b""
        while text.count(b"\n") < workers:
            text += self._read()
        return {int(rank): int(pid) for rank, pid in (line.split() for line in text.splitlines())}

    def wait_for_end(self):
        while self._read():
            pass

    def close(self):
        os.close(self._fd)


@pytest.fixture
def fifo(tmp_path):
    fifo = Fifo(tmp_path / "fifo")
    yield fifo
    fifo.close()


@pytest.fixture
def script(tmp_path):
    def write(text, name="script.py"):
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


@pytest.fixture
def supervisor(script):
    """Another process that launches a script; the test plays with its life."""
    processes = []

    def start(text, *args):
        command = [sys.executable, script(SUPERVISE, "supervise.py"), script(text), *args]
        path = os.pathsep.join([str(Path(cograd.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
        env = {**os.environ, "PYTHONPATH": path}
        processes.append(subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate()


@contextmanager
def failing(rank, match):
    """The block raises the WorkerError of a rank, in less than 30 s."""
    start = time.monotonic()
    with pytest.raises(WorkerError, match=match) as info:
        yield info
    assert time.monotonic() - start < 30
    assert info.value.rank == rank
    assert f"rank {rank} (pid {info.value.pid})" in str(info.value)


def assert_gone(pids):
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.fixture(scope="module")
def pool():
    """For calls that succeed; a failing call ends its pool."""
    with Workers(3, threads=1) as workers:
        yield workers
    assert_gone(workers.pids)


@pytest.fixture
def doomed():
    with Workers(4, threads=1, stall_after=3.0) as workers:
        yield workers
    assert_gone(workers.pids)


# Scripts


def test_a_script_for_torchrun_runs_unchanged(script, tmp_path):
    path = script("""
import json, os, sys, torch, torch.distributed as dist
import neighbour
dist.init_process_group("gloo")
x = torch.tensor([float(os.environ["RANK"])])
dist.all_reduce(x)
names = ["LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "OMP_NUM_THREADS", "EXTRA"]
found = {name: os.environ[name] for name in names}
found |= {"sum": x.item(), "argv": sys.argv, "name": __name__, "path": os.environ.get("PYTHONPATH")}
found["elastic"] = dist.is_torchelastic_launched()
open(f"{sys.argv[1]}/{dist.get_rank()}.json", "w").write(json.dumps(found))
dist.destroy_process_group()
""")
    script("", "neighbour.py")
    launch(path, [str(tmp_path)], workers=2, env={"EXTRA": "yes", "OMP_NUM_THREADS": "1"})
    for rank in range(2):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == {
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "OMP_NUM_THREADS": "1",
            "EXTRA": "yes",
            "sum": 1.0,
            "argv": [str(path), str(tmp_path)],
            "name": "__main__",
            "path": os.environ.get("PYTHONPATH"),
            "elastic": True,
        }


def test_a_module_runs_from_the_current_directory(script, tmp_path, monkeypatch):
    script("import sys; open(sys.argv[1], 'w').write(__name__)", "as_module.py")
    monkeypatch.chdir(tmp_path)
    launch("as_module", ["out"], workers=1, module=True)
    assert Path("out").read_text() == "__main__"


def test_threads_are_the_cores_shared_out(script, tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    path = script("import os, sys; open(sys.argv[1], 'a').write(os.environ['OMP_NUM_THREADS'])")
    launch(path, [str(tmp_path / "out")], workers=2)
    assert (tmp_path / "out").read_text() == "33"


def test_the_rank_that_raises_is_named_and_not_its_peers(script, capfd):
    path = script("""
import torch, torch.distributed as dist
dist.init_process_group("gloo")
dist.barrier()
if dist.get_rank() == 2:
    raise ValueError("a bad batch")
dist.all_reduce(torch.ones(1))
""")
    with failing(2, "raised ValueError: a bad batch") as info:
        launch(path, workers=4)
    assert f'File "{path}", line 6' in info.value.reason
    assert "runpy" not in info.value.reason
    assert capfd.readouterr().err.count("ValueError: a bad batch") == 1


def test_the_rank_that_leaves_its_peers_in_a_collective_is_named(script):
    path = script("""
import sys, torch, torch.distributed as dist
dist.init_process_group("gloo")
dist.barrier()
if dist.get_rank() == 1:
    sys.exit()
dist.all_reduce(torch.ones(1))
""")
    with failing(1, "exited with code 0 while its peers were in a collective: rank [02] failed with"):
        launch(path, workers=3)


def test_an_exit_code_ends_the_run_and_grandchildren(script, fifo):
    path = script(ANNOUNCE + "if rank == 1: sys.exit(3)\nsignal.pause()\n")
    with failing(1, "exited with code 3"):
        launch(path, [fifo.path], workers=2)
    fifo.wait_for_end()


def test_workers_that_ignore_sigterm_are_ended(script, fifo):
    stubborn = ANNOUNCE + "if rank == 1: sys.exit(3)\n"
    stubborn = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + stubborn
    with failing(1, "exited with code 3"):
        launch(script(stubborn + "while True: signal.pause()\n"), [fifo.path], workers=2)
    fifo.wait_for_end()


def test_no_worker_outlives_a_killed_parent(supervisor, fifo):
    parent = supervisor(WAIT, fifo.path)
    pids = fifo.pids(2)
    os.kill(pids[1], signal.SIGSTOP)  # not even one that is stopped
    parent.kill()
    fifo.wait_for_end()


def test_keyboard_interrupt_is_quiet(supervisor, fifo):
    parent = supervisor(WAIT, fifo.path)
    fifo.pids(2)
    parent.send_signal(signal.SIGINT)
    fifo.wait_for_end()
    assert parent.communicate(timeout=30)[1] == ""
    assert parent.returncode == 130


def test_bad_arguments_are_refused_before_anything_starts(tmp_path, script):
    with pytest.raises(FileNotFoundError, match=r"no script '.*missing\.py'"):
        launch(tmp_path / "missing.py")
    with pytest.raises(ValueError, match="at least 1, not 0"):
        launch(script(""), workers=0)
    with pytest.raises(ValueError, match="at least 1, not -2"):
        Workers(-2)


# Pools


def test_a_pool_is_reused(pool):
    first = pool.call("engines.launch_jobs:total", {"value": 1})
    again = pool.call("engines.launch_jobs:total", {"value": 10})
    assert [result["rank"] for result in first] == [0, 1, 2]
    assert [result["pid"] for result in first] == [result["pid"] for result in again] == pool.pids
    assert [result["sum"] for result in first] == [6.0] * 3
    assert [result["sum"] for result in again] == [33.0] * 3
    assert [result["threads"] for result in first] == [1] * 3


def test_arguments_may_be_larger_than_a_pipe(pool):
    assert pool.call("engines.launch_jobs:length", {"text": "x" * 1_000_000}) == [1_000_000] * 3


def test_progress_arrives_in_order(pool):
    events = []
    on_progress = lambda rank, event: events.append((rank, event))  # noqa: E731
    assert pool.call("engines.launch_jobs:count", {"upto": 500}, on_progress=on_progress) == [None] * 3
    for rank in range(3):
        assert [e for r, e in events if r == rank] == [{"step": s, "rank": rank} for s in range(500)]


def test_a_call_that_cannot_be_sent_does_not_end_the_pool(pool):
    with pytest.raises(ValueError, match="must be named 'module:qualname', not 'print'"):
        pool.call("print")
    with pytest.raises(TypeError, match="not JSON serializable"):
        pool.call("engines.launch_jobs:length", {"text": b""})
    assert pool.call("engines.launch_jobs:length", {"text": "four"}) == [4] * 3


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("raise", "raised ValueError: a bad batch\n(.|\n)*launch_jobs.py"),
        ("exit", "exited with code 0 early"),
        (signal.SIGKILL, "was killed by SIGKILL .*out of memory"),
        (signal.SIGSTOP, r"stopped responding for \d+ s \(process state T: stopped\)"),
    ],
)
def test_the_rank_that_fails_its_peers_is_named(doomed, how, reason):
    arrived = set()

    def on_progress(rank, event):
        arrived.add(rank)
        if len(arrived) == 4 and isinstance(how, signal.Signals):
            os.kill(doomed.pids[2], how)

    with failing(2, reason) as info:
        doomed.call("engines.launch_jobs:meet", {"absent": 2, "how": how}, on_progress=on_progress)
    assert info.value.pid == doomed.pids[2]
    assert_gone(doomed.pids)
    with pytest.raises(RuntimeError, match="has ended"):
        doomed.call("engines.launch_jobs:length", {"text": ""})


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        ("engines.launch_jobs:missing", "no function 'engines.launch_jobs:missing'"),
        ("no_such_module:f", "no function 'no_such_module:f': No module named 'no_such_module'"),
        ("engines.launch_jobs:unserialisable", "launch_jobs:unserialisable returned what JSON cannot hold"),
    ],
)
def test_a_function_that_cannot_serve_is_named(function, reason):
    with Workers(1, threads=1) as workers, failing(0, reason):
        workers.call(function)


def test_a_worker_that_died_between_calls_is_named():
    with Workers(2, threads=1) as workers:
        workers.call("engines.launch_jobs:length", {"text": ""})
        os.kill(workers.pids[1], signal.SIGTERM)
        with failing(1, "was killed by SIGTERM"):
            workers.call("engines.launch_jobs:total", {"value": 0})


def test_an_exception_of_the_callback_ends_the_pool():
    def on_progress(rank, event):
        raise KeyError("mine")

    with Workers(1, threads=1) as workers, pytest.raises(KeyError, match="mine"):
        workers.call("engines.launch_jobs:count", {"upto": 2}, on_progress=on_progress)
    assert_gone(workers.pids)


def test_what_was_raised_first_decides_whether_an_error_is_an_echo():
    echo = RuntimeError("[/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:4711")
    assert _tell(echo) == (echo, True)

    wrapped = KeyError("step failed")
    wrapped.__cause__ = echo
    assert _tell(wrapped) == (wrapped, True)

    cause = ValueError("a bad batch")
    cleanup = RuntimeError("[/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 5000ms")
    cleanup.__context__ = cause
    assert _tell(cleanup) == (cause, False)
    assert _tell(RuntimeError("shape mismatch"))[1] is False


def _worker(rank, *, error=None, consequence=False, time=0.0, **known):
    if error is not None:
        told = {"type": error, "message": "", "trace": "", "time": time, "consequence": consequence}
        return _Worker(rank, SimpleNamespace(pid=os.getpid()), -1, error=told, **known)
    return _Worker(rank, SimpleNamespace(pid=os.getpid()), -1, since=time, **known)


def _echo(rank, time):
    return _worker(rank, error="RuntimeError", consequence=True, time=time)


@pytest.mark.parametrize(
    ("workers", "rank", "reason"),
    [
        ([_echo(0, 1), _worker(1, error="ValueError", time=2), _echo(2, 3)], 1, "raised ValueError"),
        ([_worker(0, error="KeyError", time=2), _worker(1, error="ValueError", time=1)], 1, "ValueError"),
        ([_worker(0, error="KeyError", time=1), _worker(1, code=-9, time=2)], 1, "killed by SIGKILL"),
        ([_worker(0, error="KeyError", time=1), _worker(1, code=-6, time=2)], 0, "raised KeyError"),
        ([_worker(0, error="KeyError", time=1), _worker(1, silence=11.0)], 1, "stopped responding for 11 s"),
        ([_echo(0, 1), _worker(1, silence=5.0), _worker(2)], 1, "stopped responding for 5 s"),
        (
            [_echo(0, 1), _worker(1, finished=True, code=0), _worker(2)],
            1,
            "exited with code 0 while its peers",
        ),
        ([_echo(0, 1), _worker(1, finished=True), _echo(2, 2)], 1, "returned while .* rank 0 failed"),
        ([_echo(0, 2), _worker(1), _echo(2, 1)], 1, "was elsewhere while .* rank 2 failed"),
        ([_worker(0), _echo(1, 2), _worker(2)], 1, r"still at work elsewhere: ranks \[0, 2\]"),
    ],
)
def test_the_cause_is_told_from_its_effects(workers, rank, reason, monkeypatch):
    monkeypatch.setattr("cograd.engines.launch._state", lambda worker: "S")
    crew = _Crew(len(workers), threads=None, stall_after=10.0, env=None, ends_by_exit=True)
    crew.workers = workers
    verdict = crew._verdict()
    assert verdict.rank == rank
    assert re.search(reason, verdict.reason)
