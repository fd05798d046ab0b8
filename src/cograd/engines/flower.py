"""Federated methods on Flower: the same tasks and the same server, on SuperLink and SuperNodes.

    def build(context):                                  # on the server and on every client
        return Federation(FedSpeed(LocalSGD(lr=0.1)), make_model, loss, load_client, clients=10, rounds=60)

    client = client_app(build)
    server = server_app(build)

A client's tasks become actions of its `ClientApp`, its state lies in Flower's ``Context.state``, payloads
travel as opaque bytes in frames of the session, and random numbers are keyed by the partition id: with the
same seed the numbers are those of the simulator. Needs ``cograd[federated]``.
"""

from __future__ import annotations

import heapq
import json
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import count
from statistics import fmean
from typing import TYPE_CHECKING, Any

from safetensors.torch import load as tensors_of
from safetensors.torch import save as bytes_of
from torch import Tensor, nn

from cograd.core.checks import check
from cograd.core.codecs import Codec, Context, Float32
from cograd.core.message import Frame, Schema, session_id
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
    State,
    Timer,
    all_finite,
)
from cograd.engines.federated.row import Row
from cograd.engines.federated.samplers import Everyone, Sampler, drawn
from cograd.engines.federated.store import parts
from cograd.engines.federated.wire import Wire
from cograd.engines.federated.workers import BUFFER_RULES, BUFFERS, Job, Runner, isolated, mean_buffers

if TYPE_CHECKING:
    from flwr.app import Context as FlowerContext
    from flwr.app import Message
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp

RECORD = "cograd"
"""Name of the one record of every message, and of a client's state in its context."""
POLL = 0.05
"""Seconds between looks for replies."""


@dataclass(frozen=True)
class Federation:
    """What the server and all clients agree on. The names are those of `Simulation`.

    Args:
        method: the federated method.
        model: makes the module, with the same initial weights wherever it is called.
        loss: mean loss of outputs and targets.
        data: what a client holds, by its partition id; called on the client only.
        clients: how many there are: partition ids 0 .. clients - 1, one SuperNode each.
        rounds: after which the server ends.
        timeout: seconds after which an exchange goes on with the replies at hand; None waits for all.
        patience: seconds that the server waits for all clients to join.
        test: makes the examples of the global model's accuracy; called on the server only.
        on_round: called on the server after each round with its row and the server's state.
    """

    method: Method
    model: Callable[[], nn.Module]
    loss: Loss
    data: Callable[[int], Any]
    clients: int
    rounds: int
    sampler: Sampler = Everyone()
    seed: int = 0
    up: Codec = Float32()
    down: Codec = Float32()
    buffers: str = "refuse"
    timeout: float | None = None
    patience: float = 120.0
    test: Callable[[], Any] | None = None
    on_round: Callable[[Row, State], None] | None = None

    def __post_init__(self) -> None:
        check(
            ("clients", self.clients, ">= 1", self.clients >= 1),
            ("rounds", self.rounds, ">= 1", self.rounds >= 1),
            ("timeout", self.timeout, "> 0 or None", self.timeout is None or self.timeout > 0),
            ("patience", self.patience, "> 0", self.patience > 0),
            ("buffers", self.buffers, "refuse, local or mean", self.buffers in BUFFER_RULES),
        )

    def local(self) -> LocalModel:
        """The model as a function of a vector. Raises ValueError for buffers that are refused."""
        model = LocalModel(self.model(), self.loss)
        if self.buffers == "refuse" and model.buffers is not None:
            raise ValueError(
                "the model has floating buffers (BatchNorm's statistics?); "
                "say buffers='local' to keep each client's own or buffers='mean' to average them"
            )
        return model

    def session(self, model: LocalModel) -> bytes:
        """Id of the session: parties that were configured otherwise are refused by their frames."""
        codecs = f"{self.up!r} {self.down!r} {self.buffers}"
        return session_id("flower", repr(self.method), model.space.digest, codecs, self.seed, self.clients)


Build = Callable[["FlowerContext"], Federation]


def client_app(build: Build) -> ClientApp:
    """The `ClientApp` of a federation: one action a task. ``partition-id`` in the node's config numbers the
    client."""
    flower = _flower()
    app: ClientApp = flower.ClientApp()
    party = _Party(build)

    @app.query("hello")
    def hello(message: Message, context: FlowerContext) -> Message:
        number, runner, _ = party.of(context)
        record = flower.ConfigRecord({"client": number, "size": len(runner.clients[number])})
        reply: Message = flower.Message(flower.RecordDict({RECORD: record}), reply_to=message)
        return reply

    @app.train("task")
    def task(message: Message, context: FlowerContext) -> Message:
        record = party.run(message, context)
        reply: Message = flower.Message(flower.RecordDict({RECORD: record}), reply_to=message)
        return reply

    return app


def server_app(build: Build) -> ServerApp:
    """The `ServerApp` of a federation."""
    app: ServerApp = _flower().ServerApp()

    @app.main()
    def main(grid: Grid, context: FlowerContext) -> None:
        with isolated():
            Server(build(context), grid).run()

    return app


class _One(Sequence[Any]):
    """The examples of one client, under its number."""

    def __init__(self, number: int, data: Any, clients: int) -> None:
        self.number, self.data, self.clients = number, data, clients

    def __len__(self) -> int:
        return self.clients

    def __getitem__(self, client: Any) -> Any:
        if client != self.number:
            raise IndexError(f"this node is client {self.number}; it was asked for client {client}")
        return self.data


class _Party:
    """A client's side: the runner, made once a process, and its state in Flower's context."""

    def __init__(self, build: Build) -> None:
        self._build = build
        self._made: dict[int, tuple[Runner, bytes]] = {}

    def of(self, context: FlowerContext) -> tuple[int, Runner, bytes]:
        """Number, runner and session of the client whose context it is."""
        given = context.node_config.get("partition-id")
        if given is None:
            raise ValueError("a SuperNode needs its number: --node-config 'partition-id=0'")
        number = int(given)
        if number not in self._made:
            federation = self._build(context)
            if not 0 <= number < federation.clients:
                raise ValueError(f"partition-id must be in 0 .. {federation.clients - 1}; got {number}")
            model = federation.local()
            layout = federation.method.shared(model.space).layout
            runner = Runner(
                federation.method.tasks(),
                _One(number, federation.data(number), federation.clients),
                [],
                model,
                model.theta.clone(),
                Wire(layout, federation.up),
                Wire(layout, federation.down),
                federation.seed,
                federation.buffers if model.buffers is not None else "refuse",
            )
            self._made[number] = runner, federation.session(model)
        return number, *self._made[number]

    def run(self, message: Message, context: FlowerContext) -> Any:
        """Run the task of a message; returns the record of the reply. The state changes only if all went
        well."""
        flower = _flower()
        number, runner, session = self.of(context)
        record: Any = message.content[RECORD]
        frame = Frame.unpack(record["frame"], session)
        runner.sizes = json.loads(record["sizes"])
        schema = Schema.from_bytes(record["schema"])
        job = Job(number, record["task"], frame.round, 0, schema, bytes(frame.payload), _state(context))
        with isolated():
            done = runner.run(job)
        if done.error is not None:
            raise RuntimeError(done.error)
        context.state[RECORD] = flower.ConfigRecord(_packed(done.state))
        reply = Frame(session, frame.round, number, done.payload).pack()
        figures = json.dumps({"work": dict(done.work), "reports": dict(done.reports)})
        return flower.ConfigRecord({"frame": reply, "schema": done.schema.to_bytes(), "figures": figures})


def _state(context: FlowerContext) -> State:
    record: Any = context.state.get(RECORD)
    if record is None:
        return {}
    return {**tensors_of(record["tensors"]), **json.loads(record["scalars"])}


def _packed(state: State) -> dict[str, Any]:
    tensors, scalars = parts(state)
    return {"tensors": bytes_of(tensors), "scalars": scalars}


@dataclass
class Server:
    """The server's side: the method's state machine, fed with what Flower's grid brings."""

    federation: Federation
    grid: Grid
    nodes: dict[int, int] = field(default_factory=dict)
    sizes: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.flower = _flower()
        self.model = self.federation.local()
        self.id = self.federation.session(self.model)
        layout = self.federation.method.shared(self.model.space).layout
        self.up, self.down = Wire(layout, self.federation.up), Wire(layout, self.federation.down)
        self.pending: dict[str, tuple[int, str, int]] = {}
        self.timers: list[tuple[float, int, Any]] = []
        self.order = count()
        self.greeted: set[int] = set()
        self.test = self.federation.test() if self.federation.test is not None else None
        self.history: list[Row] = []
        self.buffers = self.model.buffers if self.federation.buffers == "mean" else None
        self.sent = {"up": 0, "down": 0}
        self.work: dict[str, float] = {}
        self.began = time.monotonic()
        self._fresh()

    def run(self) -> list[Row]:
        """All rounds; returns the history. Raises TimeoutError if the clients do not all join in time."""
        federation = self.federation
        self.join()
        sizes = [self.sizes[client] for client in range(federation.clients)]
        self.session = Session(
            self.model.space,
            self.model.theta.clone(),
            sizes,
            federation.seed,
            lambda round: drawn(federation.sampler, round, federation.clients, federation.seed),
            federation.timeout,
        )
        self.state = federation.method.start(self.session)
        self.tell(Start())
        while self.state["round"] < federation.rounds:
            if not self.look():
                time.sleep(POLL)
        return self.history

    # Events

    def look(self) -> bool:
        """Take what has come or is due; False if there was nothing."""
        self.session.now = time.monotonic() - self.began
        found = False
        for message in self.grid.pull_messages(list(self.pending)) if self.pending else ():
            known = self.pending.pop(message.metadata.reply_to_message_id, None)
            if known is not None:
                found = True
                self.tell(self.received(message, *known))
        while self.timers and self.timers[0][0] <= self.session.now:
            found = True
            key = heapq.heappop(self.timers)[2]
            if key == self.state.get("exchange", 0):
                self.missing()
            self.tell(Timer(key))
        return found

    def tell(self, event: Event) -> None:
        """Tell the method of an event and do what it answers."""
        done = self.state["round"]
        if isinstance(event, Reply):
            if not self.federation.method.takes(self.state, event, self.session):
                return
            self.participants.add(event.client)
            kept = event.content.pop(BUFFERS, None)
            if kept is not None:
                self.kept[event.client] = kept
        if isinstance(event, Lost):
            self.lost[event.client] = event.reason
            self.flower.log(logging.WARNING, "%s", event.reason)
        actions = self.federation.method.next(self.state, event, self.session)
        if self.state["round"] > done:
            self.average_buffers()
            self.row()
        if self.state["round"] < self.federation.rounds:
            self.do(actions)

    def do(self, actions: Iterable[Action]) -> None:
        messages, about = [], []
        for action in actions:
            if isinstance(action, After):
                due = time.monotonic() - self.began + action.delay
                heapq.heappush(self.timers, (due, next(self.order), action.key))
            elif isinstance(action, Send):
                messages.append(self.message(action))
                about.append((action.to, action.task, self.state["round"]))
        if messages:
            ids = self.grid.push_messages(messages)
            self.pending |= dict(zip(ids, about, strict=True))

    def message(self, send: Send) -> Message:
        federation, number = self.federation, self.state["round"]
        sent = send.content if self.buffers is None else {**send.content, BUFFERS: self.buffers}
        payload = self.down.pack(sent, Context(federation.seed, number, federation.clients))
        self.sent["down"] += len(payload)
        record = self.flower.ConfigRecord(
            {
                "frame": Frame(self.id, number, federation.clients, payload).pack(),
                "schema": self.down.schema(sent).to_bytes(),
                "task": send.task,
                "sizes": json.dumps(list(self.session.sizes)),
            }
        )
        content = self.flower.RecordDict({RECORD: record})
        node, group = self.nodes[send.to], str(number)
        message: Message = self.flower.Message(content, node, "train.task", group_id=group)
        return message

    def received(self, message: Message, client: int, task: str, number: int) -> Event:
        """What a reply says; `Lost` for an error, or for one that is not finite."""
        node = self.nodes[client]
        if message.has_error():
            reason = f"round {number}: client {client} (node {node}) failed: {message.error.reason}"
            return Lost(client, task, number, reason)
        record: Any = message.content[RECORD]
        frame = Frame.unpack(record["frame"], self.id, number)
        self.sent["up"] += len(frame.payload)
        figures = json.loads(record["figures"])
        for kind, amount in figures["work"].items():
            self.work[kind] = self.work.get(kind, 0.0) + amount
        for name, value in figures["reports"].items():
            self.reports.setdefault(name, []).append(value)
        context = Context(self.federation.seed, number, client)
        content = self.up.unpack(frame.payload, Schema.from_bytes(record["schema"]), context)
        if not all_finite(content):
            reason = f"round {number}: the reply of client {client} (node {node}) holds NaN or infinity"
            return Lost(client, task, number, reason)
        return Reply(client, task, number, content)

    def average_buffers(self) -> None:
        """Take the size-weighted mean of the round's buffers."""
        if self.kept:
            self.buffers = mean_buffers(self.kept, self.session.sizes)

    def missing(self) -> None:
        """Name those who have not answered this round when its time is up."""
        for client, _, number in self.pending.values():
            if number == self.state["round"]:
                reason = f"round {number}: client {client} (node {self.nodes[client]}) did not answer in time"
                self.lost[client] = reason
                self.flower.log(logging.WARNING, "%s", reason)

    # Members and history

    def join(self) -> None:
        """Wait until every client has said which node it is and how many examples it holds."""
        until = time.monotonic() + self.federation.patience
        waiting: list[str] = []
        while len(self.nodes) < self.federation.clients:
            if time.monotonic() > until:
                absent = [c for c in range(self.federation.clients) if c not in self.nodes]
                raise TimeoutError(f"clients {absent} have not joined in {self.federation.patience:g} s")
            new = [node for node in self.grid.get_node_ids() if node not in self.greeted]
            self.greeted.update(new)
            hello = [self.flower.Message(self.flower.RecordDict(), node, "query.hello") for node in new]
            waiting += self.grid.push_messages(hello) if hello else []
            for message in self.grid.pull_messages(waiting) if waiting else ():
                waiting.remove(message.metadata.reply_to_message_id)
                self.greet(message)
            time.sleep(POLL)

    def greet(self, message: Message) -> None:
        """Take a client in. Raises RuntimeError if it cannot take part, or if its number is taken."""
        node = message.metadata.src_node_id
        if message.has_error():
            raise RuntimeError(f"node {node} cannot take part: {message.error.reason}")
        record: Any = message.content[RECORD]
        client, size = int(record["client"]), int(record["size"])
        if client in self.nodes:
            raise RuntimeError(f"nodes {self.nodes[client]} and {node} both have partition-id {client}")
        if size < 1:
            raise RuntimeError(f"client {client} (node {node}) holds no examples")
        self.nodes[client], self.sizes[client] = node, size

    def row(self) -> None:
        federation, number = self.federation, self.state["round"]
        accuracy = None
        if self.test is not None:
            if self.buffers is not None:
                self.model.buffers = self.buffers
            right = self.model.correct(federation.method.model(self.state), self.test.x, self.test.y)
            accuracy = right / len(self.test.y)
        named, found = self.session.participants, {n: fmean(values) for n, values in self.reports.items()}
        row = Row(
            round=number,
            time=self.session.now,
            participants=tuple(sorted(self.participants if named is None else named)),
            up=self.sent["up"],
            down=self.sent["down"],
            work=dict(self.work),
            seconds=time.monotonic() - self.began,
            accuracy=accuracy,
            reports={**found, **{name: float(value) for name, value in self.session.reports.items()}},
            lost=self.lost,
        )
        self.history.append(row)
        self._fresh()
        self.session.reports.clear()
        self.session.participants = None
        shown = "" if accuracy is None else f", accuracy {100 * accuracy:.2f} %"
        self.flower.log(logging.INFO, "round %d of %d%s", number, federation.rounds, shown)
        if federation.on_round is not None:
            federation.on_round(row, self.state)

    def _fresh(self) -> None:
        self.participants: set[int] = set()
        self.lost: dict[int, str] = {}
        self.kept: dict[int, Tensor] = {}
        self.reports: dict[str, list[float]] = {}


@dataclass(frozen=True)
class _Flower:
    """What is used of Flower."""

    ClientApp: Any
    ServerApp: Any
    Message: Any
    RecordDict: Any
    ConfigRecord: Any
    log: Callable[..., None]


def _flower() -> _Flower:
    try:
        from flwr.app import ConfigRecord, Message, RecordDict
        from flwr.clientapp import ClientApp
        from flwr.common.logger import log
        from flwr.serverapp import ServerApp
    except ImportError as error:
        raise ImportError("Flower is not installed; pip install 'cograd[federated]'") from error
    return _Flower(ClientApp, ServerApp, Message, RecordDict, ConfigRecord, log)
