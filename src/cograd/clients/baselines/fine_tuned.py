"""FedAvg + fine-tuning: FedAvg's global model, trained a little more by each client for itself.

    client: w_i <- x, some epochs of SGD on its own examples: the model that it uses
            and the round of FedAvg, from x

Fine-tuning begins at the model that a round hands out anyway, so that it costs no message; the personal model
after round t is therefore that of x_{t-1}. If it is the same training as FedAvg's, it costs no work either.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from cograd.clients.baselines.fedavg import FedAvg
from cograd.engines.federated.protocol import ClientContext, Content, State
from cograd.engines.federated.training import LocalSGD


@dataclass
class FineTuned(FedAvg):
    """Shared: as FedAvg. ``tuning`` is the fine-tuning; None takes FedAvg's local training for it."""

    tuning: LocalSGD | None = None

    def train(self, state: State, content: Content, data: Any, ctx: ClientContext) -> tuple[State, Content]:
        """The client's round; its state is its fine-tuned model ``w`` (numel,)."""
        x = content["x"]
        w = None if self.tuning is None else self.tuning.run(ctx, data, x).clone()
        trained = self.local.run(ctx, data, x)
        return {**state, "w": trained.clone() if w is None else w}, {"delta": trained - x}

    def personal(self, server: State, client: State, number: int) -> Tensor:
        """The client's fine-tuned model; the global one if it has not taken part yet."""
        w: Tensor = client["w"] if "w" in client else server["x"]
        return w
