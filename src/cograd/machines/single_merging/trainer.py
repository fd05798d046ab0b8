"""m nodes in one process, stepped together: the simulation of decentralized training."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from cograd.core.ledger import Ledger
from cograd.core.streams import seed_for
from cograd.machines.single_merging import merging
from cograd.machines.single_merging.merging import (
    State,
    average,
    check_alike,
    check_finite,
    recalibrated,
    shared,
)
from cograd.machines.single_merging.mixing import Mixing
from cograd.machines.single_merging.schedule import Schedule

ELEMENTWISE = (
    torch.optim.SGD,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.Adamax,
    torch.optim.Adagrad,
    torch.optim.Adadelta,
    torch.optim.RMSprop,
)
"""Optimizers that treat every element alone, so that one may step the stacked tensors of all nodes."""


def replicas(
    build: Callable[[], nn.Module], nodes: int, *, init: Literal["shared", "per-node"] = "shared", seed: int = 0
) -> list[nn.Module]:
    """Models for ``nodes`` nodes, from the same initial weights or from weights of their own.

    Torch's global generator is seeded for each ``build()`` and is afterwards as it was. Raises ValueError for
    fewer than two nodes or another ``init``.
    """
    if nodes < 2:
        raise ValueError(f"nodes must be >= 2; got {nodes}")
    if init not in ("shared", "per-node"):
        raise ValueError(f"init must be 'shared' or 'per-node'; got {init!r}")
    models = []
    with torch.random.fork_rng(devices=[]):
        for node in range(nodes):
            torch.manual_seed(seed_for(seed, "init", node if init == "per-node" else 0))
            models.append(build())
    return models


class DecentralizedTrainer:
    """Decentralized training of m nodes in one process, with the rounds of a schedule.

    Each `step` is one local step of every node on its own batch; after every ``local_steps`` of them comes a
    round. Optimizer states never travel, and are left as they are by a round.

    Args:
        models: one a node (see `replicas`). With ``engine="loop"`` they are trained in place, else copied.
        optimizer: makes an optimizer of parameters, ``lambda p: torch.optim.AdamW(p, lr=1e-3)``.
        loss: (output, target) -> the mean loss of a batch.
        schedule: peers by round; its rounds times ``local_steps`` are the steps of the run.
        mixing: the topology.
        local_steps: H, local steps a round.
        engine: ``batched`` steps stacked parameters (m, ...) with vmap, for which the optimizer must be
            elementwise; ``loop`` steps one module after another. The two agree up to the order in which
            products add up, unless layers are random (dropout draws other numbers); rounds are the same code.
        ledger: counts the messages; a new one if not given.

    Memory: every node's parameters, gradients and optimizer state, and a copy of the nodes a round changes.

    Raises ValueError for fewer than two nodes, different architectures, or a schedule that the topology cannot
    follow.
    """

    def __init__(
        self,
        models: Sequence[nn.Module],
        optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
        loss: Callable[[Tensor, Tensor], Tensor],
        *,
        schedule: Schedule,
        mixing: Mixing | None = None,
        local_steps: int = 1,
        engine: Literal["batched", "loop"] = "batched",
        ledger: Ledger | None = None,
    ) -> None:
        mixing = mixing if mixing is not None else Mixing()
        self.space = check_alike(models)
        check_plan(schedule, mixing, local_steps, len(models))
        self.nodes, self.schedule, self.mixing, self.local_steps = len(models), schedule, mixing, local_steps
        self.ledger = ledger if ledger is not None else Ledger()
        if engine not in ("batched", "loop"):
            raise ValueError(f"engine must be 'batched' or 'loop'; got {engine!r}")
        self.engine: _Batched | _Loop = (_Batched if engine == "batched" else _Loop)(models, optimizer, loss)
        self.size = merging.nbytes(self.engine.states[0])
        self.steps = 0
        self.round = 0
        """Rounds of communication so far, those of `gossip` and `merge` included."""
        self._trained = 0

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        """One local step of every node on x (m, B, ...), y (m, B, ...), and the round if it is due.

        Returns the losses (m,). Raises RuntimeError after the schedule's last round, with nothing changed.
        `Diverged` comes out of a round when a node that takes part in it holds NaN or infinity: the local step
        is done, no node has been averaged, and the round is tried again at the next call.
        """
        for name, batch in (("x", x), ("y", y)):
            if len(batch) != self.nodes:
                raise ValueError(f"{name} must hold a batch for each of {self.nodes} nodes; got {len(batch)}")
        self._round_if_due()
        if self.steps == self.schedule.rounds * self.local_steps:
            raise RuntimeError(f"the schedule's {self.schedule.rounds} rounds are over")
        losses = self.engine.step(x, y)
        self.steps += 1
        self._round_if_due()
        return losses

    def _round_if_due(self) -> None:
        if self._trained < self.steps // self.local_steps:
            self._communicate(self.mixing, self.schedule.peers(self._trained, self.nodes))
            self._trained += 1

    def _communicate(self, mixing: Mixing, peers: float | None) -> None:
        states = self.engine.states
        if mixing.dense(peers, self.nodes):
            check_finite(dict(enumerate(states)))
            merging.mix_all(states)
            merging.count_average(self.ledger, self.nodes, self.round, merging.vector_sizes(states[0]))
        else:
            rows = mixing.rows(peers, self.nodes, self.round)
            check_finite({node: states[node] for row in rows.values() for node, _ in row})
            merging.mix(states, rows)
            merging.count_pulls(self.ledger, rows, self.round, self.size)
        self.round += 1

    def gossip(self, rounds: int, mixing: Mixing, peers: float | None = None) -> None:
        """Rounds of communication without training, as after the last step in place of a global merge."""
        mixing.check(peers, self.nodes)
        for _ in range(rounds):
            self._communicate(mixing, peers)

    def merge(self) -> None:
        """A dense round now: every node becomes the average of all."""
        self.gossip(1, Mixing("complete"))

    # What an observer sees. Nothing here is counted, and no node changes.

    def node(self, node: int) -> nn.Module:
        """A copy of a node's model."""
        return self.engine.node(node)

    @property
    def models(self) -> list[nn.Module]:
        """Copies of all nodes' models."""
        return [self.node(k) for k in range(self.nodes)]

    def merged(self, recalibrate: Iterable[Any] | None = None) -> nn.Module:
        """The counterfactual merged model: the average of all nodes, which stay as they are (see `merge`)."""
        states = self.engine.states
        check_finite(dict(enumerate(states)))
        model = self.node(0)
        merging.write(shared(model), {n: average([state[n] for state in states]) for n in states[0]})
        if recalibrate is not None:
            recalibrated(model, recalibrate)
        return model

    def outputs(self, x: Tensor) -> Tensor:
        """Every node's output (m, N, ...) on the same inputs (N, ...), in evaluation mode."""
        return self.engine.outputs(x)

    def consensus_error(self) -> float:
        """Xi^2 = (1/m) sum_k |theta_k - theta_bar|^2 over the trainable parameters."""
        total = 0.0
        for segment in self.space:
            points = torch.stack([state[segment.name] for state in self.engine.states]).double()
            total += float((points - points.mean(0)).square().sum())
        return total / self.nodes

    def state_dict(self) -> dict[str, Any]:
        """Everything that the run goes on from but the data: models, optimizers, the count of steps."""
        return {
            "steps": self.steps,
            "trained": self._trained,
            "round": self.round,
            "plan": self._plan(),
            **self.engine.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`, bit for bit. Raises ValueError for a state of other settings, another
        model or another number of nodes: a matrix of m nodes has no meaning for others (merge first)."""
        if state["plan"] != self._plan():
            raise ValueError(f"the state is of another run: {state['plan']}; this one is {self._plan()}")
        self.engine.load_state_dict(state)
        self.steps, self._trained, self.round = state["steps"], state["trained"], state["round"]

    def _plan(self) -> str:
        how = "batched" if isinstance(self.engine, _Batched) else "loop"
        return f"{self.nodes} nodes, {how}, {plan(self.schedule, self.mixing, self.local_steps, self.space)}"


def check_plan(schedule: Schedule, mixing: Mixing, local_steps: int, members: int) -> None:
    """Refuse a schedule that a topology cannot follow among so many nodes."""
    if isinstance(local_steps, bool) or not isinstance(local_steps, int) or local_steps < 1:
        raise ValueError(f"local_steps must be a whole number >= 1; got {local_steps!r}")
    for peers in {schedule.peers(t, members) for t in range(schedule.rounds)}:
        mixing.check(peers, members)


def plan(schedule: Schedule, mixing: Mixing, local_steps: int, space: Any) -> str:
    """What parties of a run must agree on, in words."""
    return f"{schedule}, {mixing}, local_steps={local_steps}, model {space.digest}"


class _Loop:
    """Nodes stepped one after another, as ordinary modules."""

    def __init__(
        self, models: Sequence[nn.Module], optimizer: Callable[..., Any], loss: Callable[..., Tensor]
    ) -> None:
        self.models, self.loss = list(models), loss
        self.optimizers = [optimizer([p for p in m.parameters() if p.requires_grad]) for m in models]
        self.states: list[State] = [shared(model) for model in models]

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        losses = []
        for node, (model, optimizer) in enumerate(zip(self.models, self.optimizers, strict=True)):
            optimizer.zero_grad()
            value = self.loss(model(x[node]), y[node])
            value.backward()
            optimizer.step()
            losses.append(value.detach())
        return torch.stack(losses)

    @torch.no_grad()
    def outputs(self, x: Tensor) -> Tensor:
        found = []
        for model in self.models:
            modes = [(module, module.training) for module in model.modules()]
            found.append(model.eval()(x))
            for module, mode in modes:
                module.training = mode
        return torch.stack(found)

    def node(self, node: int) -> nn.Module:
        return copy.deepcopy(self.models[node])

    def state_dict(self) -> dict[str, Any]:
        states = [{k: v.clone() for k, v in m.state_dict().items()} for m in self.models]
        return {"models": states, "optimizers": [copy.deepcopy(o.state_dict()) for o in self.optimizers]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for model, saved in zip(self.models, state["models"], strict=True):
            model.load_state_dict(saved)
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(copy.deepcopy(saved))


class _Batched:
    """Nodes stepped together: one functional model, parameters and buffers stacked over nodes."""

    def __init__(
        self, models: Sequence[nn.Module], optimizer: Callable[..., Any], loss: Callable[..., Tensor]
    ) -> None:
        parameters, self.buffers = stack_module_state(list(models))
        self.parameters: dict[str, nn.Parameter] = {
            name: nn.Parameter(t.detach(), requires_grad=t.requires_grad) for name, t in parameters.items()
        }
        self.optimizer = optimizer([p for p in self.parameters.values() if p.requires_grad])
        if type(self.optimizer) not in ELEMENTWISE:
            raise ValueError(
                f"optimizer must be one of {', '.join(o.__name__ for o in ELEMENTWISE)} for engine='batched', "
                f"which treat every element alone; got {type(self.optimizer).__name__}: use engine='loop'"
            )
        self.template = copy.deepcopy(models[0]).train()
        names = list(shared(models[0]))
        self.states: list[State] = [
            {name: self._tensor(name)[node] for name in names} for node in range(len(models))
        ]

        def value(parameters: Any, buffers: Any, x: Tensor, y: Tensor) -> Tensor:
            return loss(functional_call(self.template, (parameters, buffers), (x,)), y)

        def output(parameters: Any, buffers: Any, x: Tensor) -> Tensor:
            return functional_call(self.template, (parameters, buffers), (x,))  # type: ignore[no-any-return]

        self._values = vmap(value, randomness="different")
        self._outputs = vmap(output, in_dims=(0, 0, None), randomness="different")

    def _tensor(self, name: str) -> Tensor:
        return self.parameters[name].detach() if name in self.parameters else self.buffers[name]

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        self.optimizer.zero_grad()
        losses = self._values(self.parameters, self.buffers, x, y)
        losses.sum().backward()  # a node's loss has no gradient in another node's parameters
        self.optimizer.step()
        return losses.detach()

    @torch.no_grad()
    def outputs(self, x: Tensor) -> Tensor:
        self.template.eval()
        found: Tensor = self._outputs(self.parameters, self.buffers, x)
        self.template.train()
        return found

    def node(self, node: int) -> nn.Module:
        model = copy.deepcopy(self.template)
        with torch.no_grad():
            for name, tensor in (*model.named_parameters(), *model.named_buffers()):
                tensor.copy_(self._tensor(name)[node])
        return model

    def state_dict(self) -> dict[str, Any]:
        stacked = {n: self._tensor(n).clone() for n in (*self.parameters, *self.buffers)}
        return {"models": stacked, "optimizers": copy.deepcopy(self.optimizer.state_dict())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, saved in state["models"].items():
            self._tensor(name).copy_(saved)
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizers"]))
