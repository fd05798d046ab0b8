"""Iterative sketching federated learning: K local steps a client, b numbers up and b down a round.

    client c:  u_0 = w;  u_k = u_{k-1} - lr grad f_c(u_{k-1});  delta_c = u_K - u_0;  sends y_c = R_t delta_c
    server:    ybar_t = server_lr sum_c p_c y_c                broadcasts ybar_t, and logs it
    client:    w <- w + R_t^T ybar_t                           (the paper applies it when round t + 1 begins)

K = 1 and server_lr = 1 is sketched gradient descent. All clients stay at the same w, a running sum of R_t^T
ybar_t: who missed rounds replays them from the log.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from cograd.core.codecs import Context
from cograd.core.ledger import Ledger
from cograd.core.space import ParamSpace, trainable
from cograd.core.streams import Stream, stream
from cograd.machines.linear_sketch.privacy import GaussianDP, clipped_sum
from cograd.machines.linear_sketch.sketch import Sketch, refuse_other, settings_of

Loss = Callable[[Tensor, Tensor], Tensor]
Examples = tuple[Tensor, Tensor]


class SketchServer:
    """The server: it averages sketches (rows,) and logs what it broadcasts; nothing here has d elements.

    The log takes ``rows`` numbers a round. ``shares`` are the clients' weights p_c, which sum to 1.
    """

    def __init__(self, shares: Tensor, lr: float) -> None:
        self.shares, self.lr = shares, lr
        self.log: list[Tensor] = []

    def average(self, sketches: Tensor) -> Tensor:
        """All clients' sketches (clients, rows) of a round -> the broadcast (rows,)."""
        if sketches.shape[0] != len(self.shares):
            raise ValueError(f"sketches of all {len(self.shares)} clients are needed; got {sketches.shape[0]}")
        broadcast = self.lr * (self.shares.to(sketches) @ sketches)
        self.log.append(broadcast)
        return broadcast


class SketchedFedAvg:
    """Federated averaging over sketches, all clients in this process.

    Shared with the server: R_t delta_c, b numbers a client and round; with the clients: their weighted mean.

    Args:
        model: gives the initial weights and the forward pass; its parameters follow ``weights`` after each
            round. It must have no buffers.
        clients: (inputs, targets) of each client.
        loss: (outputs, targets) -> the mean loss. It runs under `torch.func.vmap`.
        sketch: R_t over the model's parameters; None sends delta_c itself, which is FedAvg.
        lr: of a local step.
        local_steps: K.
        server_lr: factor of the mean.
        shares: p_c >= 0 of the clients, by default their shares of the examples; scaled to sum to 1.
        batch_size: examples of a local step, drawn without replacement; None takes all of a client's.
        weight_decay: l2 coefficient, added to every local gradient.
        privacy: clip and noise; ``batch_size`` must then be None (`GaussianDP` samples).
        seed: of the batches.
        noise_key: what the clients' noise and private samples are drawn from: a secret, from the operating
            system unless given. A guarantee holds only while nobody else knows it.
        ledger: counts messages (the server is party N) and gradients.

    Clients with the same number of examples train as one stack: memory is their number times d. Raises
    ValueError at construction for an argument out of range or a sketch of another size.
    """

    def __init__(
        self,
        model: nn.Module,
        clients: Sequence[Examples],
        loss: Loss,
        *,
        sketch: Sketch | None,
        lr: float,
        local_steps: int = 1,
        server_lr: float = 1.0,
        shares: Sequence[float] | None = None,
        batch_size: int | None = None,
        weight_decay: float = 0.0,
        privacy: GaussianDP | None = None,
        seed: int = 0,
        noise_key: int | None = None,
        ledger: Ledger | None = None,
    ) -> None:
        self.space = ParamSpace.of(model)
        sizes = _sizes(clients)
        for name, value in (("lr", lr), ("server_lr", server_lr)):
            if not 0 < value < math.inf:
                raise ValueError(f"{name} must be a positive number; got {value}")
        if local_steps < 1:
            raise ValueError(f"local_steps must be >= 1; got {local_steps}")
        if not 0 <= weight_decay < math.inf:
            raise ValueError(f"weight_decay must be a number >= 0; got {weight_decay}")
        if batch_size is not None and not 1 <= batch_size <= min(sizes):
            raise ValueError(
                f"batch_size must be in 1 .. {min(sizes)}, the smallest client's; got {batch_size}"
            )
        if sketch is not None and sketch.numel != self.space.numel:
            raise ValueError(f"sketch must be of {self.space.numel} elements, the model's; got {sketch.numel}")
        if any(True for _ in model.buffers()):
            raise ValueError("model must have no buffers (BatchNorm statistics): they are not exchanged")
        if privacy is not None:
            _check_privacy(privacy, sketch, local_steps, batch_size)
        self.model, self.clients, self.loss, self.sketch = model, list(clients), loss, sketch
        self.lr, self.local_steps, self.batch_size, self.weight_decay = (
            lr,
            local_steps,
            batch_size,
            weight_decay,
        )
        self.privacy, self.seed, self.rounds = privacy, seed, 0
        self.noise_key = secrets.randbits(128) if noise_key is None else noise_key
        self.ledger = ledger if ledger is not None else Ledger()
        self.server = SketchServer(_shares(shares, sizes), server_lr)
        self.weights = self.space.flatten(trainable(model))
        self._gradient = grad(self._loss_at)
        self._groups = {n: [c for c, size in enumerate(sizes) if size == n] for n in sorted(set(sizes))}
        self._stacks = {
            n: tuple(torch.stack([self.clients[c][i] for c in group]) for i in (0, 1))
            for n, group in self._groups.items()
        }

    @property
    def epsilon(self) -> float:
        """Spent so far by every client, at the privacy's delta; infinite without privacy."""
        return self.privacy.epsilon(self.rounds * self.local_steps) if self.privacy else math.inf

    def round(self) -> Tensor:
        """One round of all clients; returns the broadcast (rows,), or the mean update (d,) without a sketch."""
        sketches = self._send(self._local_updates())
        broadcast = self.server.average(sketches)
        self._count(broadcast)
        self.weights = self.applied(self.weights, self.rounds)
        self.rounds += 1
        self._show()
        return broadcast

    def applied(self, weights: Tensor, round: int) -> Tensor:
        """Weights at the beginning of a logged round -> those at its end."""
        broadcast = self.server.log[round]
        return weights + (broadcast if self.sketch is None else self.sketch.T(broadcast, round))

    def replay(self, weights: Tensor, since: int) -> Tensor:
        """Catch up: weights at the beginning of round ``since`` -> the current ones, bit for bit.

        What a client needs for it are the broadcasts it missed, ``rows`` numbers each.
        """
        if not 0 <= since <= self.rounds:
            raise ValueError(f"since must be in 0 .. {self.rounds}, the rounds so far; got {since}")
        for round in range(since, self.rounds):
            weights = self.applied(weights, round)
        return weights

    def observable(self, params: Mapping[str, Tensor], batch: Examples, ctx: Context) -> dict[str, Tensor]:
        """What whoever reads a client's message sees of a batch, differentiable in the batch: without noise.

        ``ctx.round`` tells R. The local steps all use this batch.
        """
        start = self.space.flatten(params)
        weights = start
        for _ in range(self.local_steps):
            weights = weights - self.lr * (self._gradient(weights, *batch) + self.weight_decay * weights)
        delta = weights - start
        return {"sketch": delta if self.sketch is None else self.sketch(delta, ctx.round)}

    # What the clients do.

    def _loss_at(self, weights: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
        params = {s.name: weights[s.slice].view(s.shape) for s in self.space}
        return self.loss(functional_call(self.model, params, (inputs,)), targets)

    def _local_updates(self) -> Tensor:
        """delta_c of all clients: (clients, d)."""
        deltas = self.weights.new_empty(len(self.clients), self.space.numel)
        for size, group in self._groups.items():
            local = self.weights.expand(len(group), -1)
            for step in range(self.local_steps):
                gradients = self._gradients(local, size, group, step)
                local = local - self.lr * gradients.add_(local, alpha=self.weight_decay)
            deltas[group] = local - self.weights
        return deltas

    def _gradients(self, local: Tensor, size: int, group: list[int], step: int) -> Tensor:
        """Gradients of a group's clients at their local weights: (group, d)."""
        if self.privacy is not None:
            return torch.stack([self._private(w, c, step) for w, c in zip(local, group, strict=True)])
        inputs, targets = self._stacks[size]
        if self.batch_size is not None:
            draws = [stream(self.seed, "local-batch", self.rounds, step, c) for c in group]
            rows = torch.stack([d.choice(size, self.batch_size) for d in draws]).to(inputs.device)
            which = torch.arange(len(group), device=inputs.device)[:, None]
            inputs, targets = inputs[which, rows], targets[which, rows]
        for client in group:
            self.ledger.work(client, "grad", inputs.shape[1])
        gradients: Tensor = vmap(self._gradient)(local, inputs, targets)
        return gradients

    def _private(self, weights: Tensor, client: int, step: int) -> Tensor:
        """A client's clipped mean gradient, noised unless the noise is added to the sketch."""
        assert self.privacy is not None
        inputs, targets = self.clients[client]
        expected = self.privacy.sampling_rate * len(inputs)
        draws = self._secret(client, step)
        if self.privacy.sampling_rate < 1:
            taken = (draws.uniform(len(inputs)) < self.privacy.sampling_rate).to(inputs.device)
            inputs, targets = inputs[taken], targets[taken]
        self.ledger.work(client, "grad", len(inputs))
        total = torch.zeros_like(weights)
        if len(inputs):
            each = vmap(self._gradient, (None, 0, 0))(weights, inputs[:, None], targets[:, None])
            total = clipped_sum(each, self.privacy.clip)
        if self.privacy.noise_in == "gradient":
            total += self._noise(draws, len(total), self.privacy.clip).to(total)
        return total / expected

    def _send(self, deltas: Tensor) -> Tensor:
        """Sketches of all clients: (clients, rows), with noise where it belongs to the sketch."""
        if self.sketch is None:
            return deltas
        sketches = self.sketch(deltas, self.rounds)
        if self.privacy is not None and self.privacy.noise_in == "sketch":
            assert self.sketch.norm is not None
            for client, (inputs, _) in enumerate(self.clients):
                reach = self.lr * self.privacy.clip * self.sketch.norm
                noise = self._noise(self._secret(client, self.local_steps), self.sketch.rows, reach)
                sketches[client] += (noise / (self.privacy.sampling_rate * len(inputs))).to(sketches)
        return sketches

    def _secret(self, client: int, step: int) -> Stream:
        return stream(self.noise_key, "private", self.rounds, client, step)

    def _noise(self, draws: Stream, size: int, sensitivity: float) -> Tensor:
        assert self.privacy is not None
        return draws.normal(size) * (self.privacy.noise_multiplier * sensitivity)

    def _count(self, broadcast: Tensor) -> None:
        size, server = broadcast.numel() * broadcast.element_size(), len(self.clients)
        for client in range(len(self.clients)):
            self.ledger.send(client, self.rounds, size, to=server)
        for client in range(len(self.clients)):
            self.ledger.send(server, self.rounds, size, to=client)

    def _show(self) -> None:
        views = self.space.views(self.weights)
        with torch.no_grad():
            for name, parameter in trainable(self.model).items():
                parameter.copy_(views[name])

    # What must be in a checkpoint.

    def state_dict(self) -> dict[str, Any]:
        """Weights, rounds, the log and the secret noise key: keep it as safe as the data."""
        return {
            "space": self.space.digest,
            "rounds": self.rounds,
            "weights": self.weights.clone(),
            "log": [broadcast.clone() for broadcast in self.server.log],
            "noise_key": self.noise_key,
            **self._settings,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`, bit for bit.

        Clients keep nothing of their own, so without privacy there may be another number of them. Epsilon is
        of rounds times local steps under one mechanism on one client's examples, and the log is of one R: so
        ValueError is raised, and nothing changed, for a state of another model, sketch, privacy or number of
        local steps, and with privacy for one of clients of other sizes.
        """
        if state["space"] != self.space.digest:
            raise ValueError("the state is of a model with other parameters (names, order or shapes differ)")
        refuse_other(state, self._settings)
        self.rounds, self.noise_key = int(state["rounds"]), state["noise_key"]
        self.weights = state["weights"].to(self.weights).clone()
        self.server.log = [broadcast.clone() for broadcast in state["log"]]
        self._show()

    @property
    def _settings(self) -> dict[str, Any]:
        """What a state must share with the run that continues from it."""
        sizes = None if self.privacy is None else [len(inputs) for inputs, _ in self.clients]
        return {
            **settings_of(self.sketch),
            "privacy": repr(self.privacy),
            "local_steps": self.local_steps,
            "private_sizes": sizes,
        }


def _sizes(clients: Sequence[Examples]) -> list[int]:
    if not clients:
        raise ValueError("clients must hold the (inputs, targets) of at least one client; got none")
    for c, (inputs, targets) in enumerate(clients):
        if not len(inputs) or len(inputs) != len(targets):
            raise ValueError(
                f"clients must hold as many inputs as targets, at least one; client {c} has {len(inputs)} and "
                f"{len(targets)}"
            )
        if inputs.is_floating_point() and not bool(inputs.isfinite().all()):
            raise ValueError(f"clients must hold finite inputs; those of client {c} hold NaN or infinity")
    return [len(inputs) for inputs, _ in clients]


def _shares(shares: Sequence[float] | None, sizes: Sequence[int]) -> Tensor:
    given = torch.tensor(list(sizes) if shares is None else list(shares), dtype=torch.float64)
    if len(given) != len(sizes) or not bool((given >= 0).all()) or not 0 < float(given.sum()) < math.inf:
        raise ValueError(
            f"shares must be {len(sizes)} numbers >= 0 with a positive sum, one a client; got {shares}"
        )
    return given / given.sum()


def _check_privacy(privacy: GaussianDP, sketch: Sketch | None, steps: int, batch_size: int | None) -> None:
    if batch_size is not None:
        raise ValueError(f"batch_size must be None with privacy, which samples by itself; got {batch_size}")
    if privacy.noise_in == "sketch":
        if sketch is None or sketch.norm is None:
            kind = None if sketch is None else sketch.kind
            raise ValueError(f"noise_in 'sketch' needs a sketch of kind srht or random-k; got {kind}")
        if steps != 1:
            raise ValueError(f"noise_in 'sketch' allows local_steps 1 only; got {steps}")
