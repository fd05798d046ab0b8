"""A federation on MNIST-5k, split by a Dirichlet distribution: what server and clients agree on.

flwr run examples/flower                                        # the default SuperLink of your Flower set-up
flwr run examples/flower --run-config "method='fedavg' rounds=5"
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from flwr.app import Context

from cograd import data
from cograd.clients import FedCAC, FedSpeed
from cograd.clients.baselines import FedAvg
from cograd.engines.federated import ClientData, Clients, LocalSGD, Row, State
from cograd.engines.flower import Federation, client_app, server_app
from cograd.models.mlp import MLP

LOCAL = LocalSGD(lr=0.1, epochs=1, batch_size=20)
METHODS = {"fedavg": FedAvg, "fedcac": FedCAC, "fedspeed": FedSpeed}


def model() -> MLP:
    torch.manual_seed(0)
    return MLP(784, 32, 10)


def build(context: Context) -> Federation:
    """The federation of a run's configuration."""
    config = context.run_config
    clients, seed = int(config["clients"]), int(config["seed"])

    def load(partition: int) -> ClientData:
        train = data.load("mnist-5k")
        return Clients(train, data.dirichlet(train.y, clients, 0.3, seed))[partition]

    def note(row: Row, state: State) -> None:
        if config["history"]:
            with Path(str(config["history"])).open("a") as file:
                file.write(json.dumps({**row.to_json(), "norm": float(state["x"].double().norm())}) + "\n")

    return Federation(
        METHODS[str(config["method"])](LOCAL),
        model,
        torch.nn.functional.cross_entropy,
        load,
        clients=clients,
        rounds=int(config["rounds"]),
        seed=seed,
        timeout=float(config["timeout"]) or None,
        test=lambda: data.load("mnist-5k", "test"),
        on_round=note,
    )


client = client_app(build)
server = server_app(build)
