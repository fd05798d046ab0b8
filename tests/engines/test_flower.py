"""A real SuperLink and SuperNodes on loopback: the simulator's numbers, and a node that dies."""

import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from cograd import data
from cograd.clients import FedCAC, FedSpeed
from cograd.clients.baselines import FedAvg
from cograd.engines.federated import Clients, LocalSGD, Simulation
from cograd.engines.flower import Federation, Server, client_app
from cograd.models.mlp import MLP

pytest.importorskip("flwr")

EXAMPLE = Path(__file__).parents[2] / "examples" / "flower"
CLIENTS, ROUNDS, PATIENCE = 2, 2, 240
APP = """
from dataclasses import replace
from safetensors.torch import save_file
from cograd.engines.flower import client_app, server_app
from cograd_flower.app import build as example

def build(context):
    federation = example(context)
    def note(row, state):
        federation.on_round(row, state)
        save_file({"x": state["x"]}, f"{context.run_config['history']}.safetensors")
    return replace(federation, on_round=note)

client = client_app(build)
server = server_app(build)
"""


class Deployment:
    """A SuperLink and ``CLIENTS`` SuperNodes of this test, and a home for Flower's own files."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        bin = Path(sys.executable).parent
        self.environment = {
            **os.environ,
            "FLWR_HOME": str(folder / "home"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "PATH": f"{bin}{os.pathsep}{os.environ['PATH']}",
        }
        (folder / "home").mkdir()
        connection = f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "127.0.0.1:{self.port}"\n'
        (folder / "home" / "config.toml").write_text(f"{connection}insecure = true\n")
        self.link = self.start(
            "flower-superlink", "--insecure", f"--port={self.port}", "--disable-runtime-dependency-installation"
        )
        self.reachable()
        self.nodes = [
            self.start(
                *("flower-supernode", "--insecure", f"--superlink=127.0.0.1:{self.port}"),
                *(f"--port={free_port()}", "--node-config", f"partition-id={number}"),
            )
            for number in range(CLIENTS)
        ]

    def start(self, name: str, *arguments: str) -> subprocess.Popen[bytes]:
        with (self.folder / f"{name}-{time.monotonic_ns()}.log").open("wb") as log:
            return subprocess.Popen(
                [name, *arguments], env=self.environment, stdout=log, stderr=log, start_new_session=True
            )

    def reachable(self) -> None:
        """Return when the SuperLink takes connections."""
        until = time.monotonic() + PATIENCE
        while self.link.poll() is None and time.monotonic() < until:
            with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1):
                return
            select.select([], [], [], 0.2)
        raise AssertionError(f"no SuperLink at port {self.port}: {self.logs()}")

    def run(self, app: Path, then=lambda line: None, **config: object) -> tuple[list[dict[str, object]], str]:
        """``flwr run``: the server's history, and what it logged; ``then`` sees each line at once."""
        history = self.folder / f"{config['method']}-{time.monotonic_ns()}.jsonl"
        given = {**config, "history": str(history), "clients": CLIENTS}
        command = ["flwr", "run", str(app), "here", "--stream", "--run-config"]
        text = " ".join(f"{k}={v!r}" for k, v in given.items())
        output = ""
        with subprocess.Popen(
            ["timeout", str(PATIENCE), *command, text],
            env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        ) as running:  # fmt: skip
            for line in running.stdout:
                output += line
                then(line)
        assert history.exists(), output + self.logs()
        self.saved = Path(f"{history}.safetensors")
        return [json.loads(line) for line in history.read_text().splitlines()], output

    def logs(self) -> str:
        return "\n".join(file.read_text(errors="replace")[-3000:] for file in self.folder.glob("*.log"))

    def close(self) -> None:
        for process in (*self.nodes, self.link):
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def deployment(tmp_path_factory):
    found = Deployment(tmp_path_factory.mktemp("flower"))
    yield found
    found.close()


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    """The example, with a component that also saves the model."""
    folder = tmp_path_factory.mktemp("app")
    for file in EXAMPLE.rglob("*.*"):
        if "__pycache__" not in file.parts:
            target = folder / file.relative_to(EXAMPLE)
            target.parent.mkdir(exist_ok=True)
            target.write_text(file.read_text().replace("cograd_flower.app:", "cograd_flower.saving:"))
    (folder / "cograd_flower" / "saving.py").write_text(APP)
    return folder


def simulated(method) -> Simulation:
    train, test = data.load("mnist-5k"), data.load("mnist-5k", "test")
    torch.manual_seed(0)
    sim = Simulation(
        method(LocalSGD(lr=0.1, epochs=1, batch_size=20)),
        MLP(784, 32, 10),
        nn.functional.cross_entropy,
        Clients(train, data.dirichlet(train.y, CLIENTS, 0.3, 0)),
        test=test,
    )
    sim.run(ROUNDS)
    return sim


@pytest.mark.parametrize(("name", "method"), [("fedavg", FedAvg), ("fedcac", FedCAC), ("fedspeed", FedSpeed)])
def test_a_federation_gets_the_simulators_numbers(deployment, app, name, method):
    rows, _ = deployment.run(app, method=name, rounds=ROUNDS)
    sim = simulated(method)
    assert [row["round"] for row in rows] == [1, 2]
    for row, expected in zip(rows, sim.history, strict=True):
        assert row["accuracy"] == pytest.approx(expected.accuracy, abs=1e-6)
        assert (row["up"], row["down"], row["work"]) == (expected.up, expected.down, expected.work)
        assert row["reports"] == pytest.approx(dict(expected.reports))
    assert torch.allclose(load_file(deployment.saved)["x"], sim.server["x"], rtol=0, atol=1e-6)


def test_a_node_that_dies_in_a_round_does_not_end_the_training(deployment, app):
    """The round closes at its timeout with the replies at hand, and the log names the node."""

    def kill(line: str) -> None:
        if "round 1 of 2" in line:
            os.killpg(deployment.nodes[1].pid, signal.SIGKILL)

    rows, output = deployment.run(app, kill, method="fedavg", rounds=2, timeout=5.0)
    assert rows[1]["participants"] == [0]
    assert re.search(r"round 1: client 1 \(node \d+\) did not answer in time", output)


class Loopback:
    """A grid in this process: node 10 + k is client k. A reply is there when ``ready(client, round)`` says
    so."""

    def __init__(self, federation, ready=lambda client, round: True) -> None:
        from flwr.app import Context, RecordDict

        self.app, self.ready = client_app(lambda context: federation), ready
        self.contexts = {
            10 + k: Context(0, 10 + k, {"partition-id": k}, RecordDict(), {}) for k in range(federation.clients)
        }
        self.answers = {}

    def get_node_ids(self):
        return list(self.contexts)

    def push_messages(self, messages):
        ids = []
        for message in messages:
            ids.append(f"{len(self.answers)}")
            message.metadata.__dict__["_message_id"] = ids[-1]
            node, group = message.metadata.dst_node_id, message.metadata.group_id
            self.answers[ids[-1]] = node - 10, group, self.app(message, self.contexts[node])
        return ids

    def pull_messages(self, ids):
        return [self.answers[i][2] for i in ids if self.ready(*self.answers[i][:2])]


@pytest.fixture
def run_of_flower(monkeypatch):
    """What Flower knows of a run in a process that it has started."""
    from flwr.supercore.task_identity import TaskIdentity

    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


def federation(**options) -> Federation:
    train = data.load("mnist-5k")
    held = Clients(train, data.dirichlet(train.y, CLIENTS, 0.3, 0))

    def model() -> MLP:
        torch.manual_seed(0)
        return MLP(784, 4, 10)

    given = {"clients": CLIENTS, "rounds": 2, **options}
    return Federation(
        FedAvg(LocalSGD(lr=0.1, steps=1)), model, nn.functional.cross_entropy, lambda k: held[k], **given
    )


@pytest.mark.usefixtures("run_of_flower")
def test_a_reply_that_comes_a_round_late_is_no_participation():
    """Client 1 is silent until the second round, when it answers the first one."""
    now = [0]
    late = federation(timeout=0.2, rounds=3, on_round=lambda row, state: now.__setitem__(0, row.round))
    grid = Loopback(late, lambda client, group: client == 0 or not group or int(group) < now[0])
    rows = Server(late, grid).run()
    assert [row.participants for row in rows] == [(0,)] * 3
    assert all(list(row.lost) == [1] for row in rows)


@pytest.mark.usefixtures("run_of_flower")
def test_the_timeout_of_an_exchange_that_is_over_blames_nobody(monkeypatch):
    """The first exchange takes no time, and its timer comes while the second one waits for client 1."""
    clock = [0.0]
    monkeypatch.setattr("cograd.engines.flower.time.monotonic", lambda: clock[0])
    monkeypatch.setattr(
        "cograd.engines.flower.time.sleep", lambda seconds: clock.__setitem__(0, clock[0] + seconds)
    )
    slow = federation(timeout=1.0)

    def ready(client: int, group: str) -> bool:
        return clock[0] >= {"0": 0.5, "1": 1.4 * client}.get(group, 0.0)

    rows = Server(slow, Loopback(slow, ready)).run()
    assert [row.participants for row in rows] == [(0, 1)] * 2
    assert [dict(row.lost) for row in rows] == [{}, {}]


@pytest.mark.usefixtures("run_of_flower")
@pytest.mark.parametrize("rule", ["local", "mean"])
def test_running_statistics_are_the_simulators(rule):
    train, test = data.load("mnist-5k"), data.load("mnist-5k", "test")
    held = Clients(train, data.dirichlet(train.y, CLIENTS, 0.3, 0))

    def model() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(784, 8), nn.BatchNorm1d(8), nn.Linear(8, 10))

    method, loss = FedAvg(LocalSGD(lr=0.1, steps=3)), nn.functional.cross_entropy
    given = Federation(
        method, model, loss, lambda k: held[k], clients=CLIENTS, rounds=2, buffers=rule, test=lambda: test
    )
    rows = Server(given, Loopback(given)).run()
    sim = Simulation(method, model(), loss, held, buffers=rule, test=test)
    expected = sim.run(2)
    assert [(r.accuracy, r.up, r.down) for r in rows] == [(r.accuracy, r.up, r.down) for r in expected]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"clients": 0}, "clients must be >= 1; got 0"),
        ({"rounds": 0}, "rounds must be >= 1; got 0"),
        ({"timeout": 0}, "timeout must be > 0 or None; got 0"),
        ({"buffers": "sum"}, "buffers must be refuse, local or mean; got 'sum'"),
    ],
)
def test_arguments_out_of_range_are_named(change, message):
    arguments = {"clients": 2, "rounds": 1, **change}
    with pytest.raises(ValueError, match=message):
        Federation(
            FedAvg(LocalSGD(0.1)), lambda: MLP(4, 2), nn.functional.cross_entropy, lambda k: None, **arguments
        )
