"""Flower's arm of `bench.federated`: its simulation engine and FedAvg, around the plain loop's training.

    python federated_flower.py FOLDER MODEL ROUNDS

in an environment with torch and ``flwr[simulation]``; started by `bench.federated`, which has written the
clients' examples, participants and orders to the folder. Prints one line of JSON: seconds of the whole
simulation, and of its rounds after the first, by when Ray and its actors have started.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
os.environ["PYTHONPATH"] = str(Path(__file__).parent)  # for Ray's actors

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

from federated_plain import build, train

FOLDER, MODEL, ROUNDS = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
CLIENTS = 100


def client_app(folder: Path, name: str) -> ClientApp:
    app = ClientApp()

    @app.train()
    def fit(message: Message, context: Context) -> Message:
        torch.set_num_threads(1)
        model = build(name)
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        config = message.content["config"]
        x, y = torch.load(folder / f"client-{config['client']}.pt")
        train(model, x, y, torch.load(folder / f"order-{config['round']}-{config['client']}.pt"))
        answer = {"arrays": ArrayRecord(model.state_dict()), "metrics": MetricRecord({"num-examples": len(y)})}
        return Message(content=RecordDict(answer), reply_to=message)

    return app


class Given(FedAvg):
    """FedAvg whose participants are given: the node that is drawn trains as the client it is told to be."""

    def __init__(self, participants: list[list[int]], **options: Any) -> None:
        super().__init__(**options)
        self.participants = participants
        self.began: list[float] = []

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        self.began.append(time.perf_counter())
        messages = super().configure_train(server_round, arrays, config, grid)
        chosen = self.participants[server_round - 1]
        for message, client in zip(messages, chosen, strict=True):
            told = ConfigRecord({"round": server_round - 1, "client": client})
            content = RecordDict({"arrays": arrays, "config": told})
            node, kind = message.metadata.dst_node_id, message.metadata.message_type
            yield Message(content=content, message_type=kind, dst_node_id=node)


def main() -> None:
    participants = json.loads((FOLDER / "participants.json").read_text())
    server, found = ServerApp(), {}

    @server.main()
    def run(grid: Grid, context: Context) -> None:
        strategy = Given(participants, fraction_train=0.1, fraction_evaluate=0.0)
        start = ArrayRecord(build(MODEL).state_dict())
        result = strategy.start(grid, start, num_rounds=ROUNDS)
        found["later"] = time.perf_counter() - strategy.began[1]
        model = build(MODEL)
        model.load_state_dict(result.arrays.to_torch_state_dict())
        x, y = torch.load(FOLDER / "test.pt")
        with torch.no_grad():
            found["accuracy"] = float((model(x).argmax(1) == y).double().mean())

    resources = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
    began = time.perf_counter()
    run_simulation(server, client_app(FOLDER, MODEL), CLIENTS, backend_config=resources)
    found["seconds"] = time.perf_counter() - began
    print(json.dumps(found))


if __name__ == "__main__":
    main()
