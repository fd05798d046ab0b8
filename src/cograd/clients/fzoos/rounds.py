"""The round that all corrected zeroth-order methods share; they differ in two parts that are put into it.

    client i, from x_r:  T local steps   x <- project(step(x, g + gamma_t (G(x) - g_i(x))))
    server:              x_{r+1} = x_r - eta sum_i p_i (x_r - x_i)
    client i, at x_{r+1}:  describes its function by a vector w_i;  server: w = sum_i p_i w_i

``g`` comes from a `LocalGradient`, which may query the function. What a client says of its function is
a `Description`: a vector from which G = gradient(x; w) and g_i = gradient(x; w_i) can be had at any point. As
it is linear in the vector, the correction is gradient(x; w - w_i): exactly 0 where all say the same. There is
none before a client has said anything.

An exchange ``walk`` brings the clients' points, an exchange ``survey`` their descriptions. The new point
travels with the survey and w with the next walk, so that a round costs a client d and m floats each way, d
being the point's length and m the description's. Without a description there is no survey.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cograd.clients.fzoos.optimizers import Adam, LocalOptimizer
from cograd.clients.fzoos.oracle import Bounds, Oracle, check_bounds
from cograd.core.checks import check
from cograd.engines.federated.protocol import (
    ClientContext,
    Content,
    Send,
    Session,
    State,
    Synchronous,
    Task,
    mean_of,
    sizes_of,
)


class LocalGradient(ABC):
    """How a client estimates the gradient of its own function. It has no state but the client's."""

    @abstractmethod
    def estimate(self, x: Tensor, t: int, oracle: Oracle) -> Tensor:
        """The gradient (d,), float64, at ``x`` before local step ``t`` = 1 .. T; 0 at the server's point."""

    def finish(self, x: Tensor, oracle: Oracle) -> None:  # noqa: B027  # most have nothing to do
        """The local steps have ended at ``x``."""

    def survey(self, x: Tensor, spread: float, oracle: Oracle) -> None:  # noqa: B027  # most have nothing to do
        """Get to know the function around the server's point ``x``, which is ``spread`` away from where the
        client had ended (mean absolute difference of a coordinate)."""


class Description(ABC):
    """What clients say of their functions: one vector, in which `gradient` is linear."""

    def name(self, dim: int, seed: int) -> str:
        """The name under which it travels; parties with another name do not understand each other."""
        return "w"

    @abstractmethod
    def size(self, dim: int) -> int:
        """The vector's length."""

    @abstractmethod
    def weights(self, x: Tensor, oracle: Oracle, gradient: LocalGradient) -> Tensor:
        """The vector of the client behind ``oracle``, at the server's point ``x`` (d,)."""

    @abstractmethod
    def gradient(self, z: Tensor, w: Tensor, seed: int) -> Tensor:
        """The gradient (d,) at ``z`` (d,) of a function of which ``w`` is said."""


@dataclass
class ZerothOrder(Synchronous):
    """Federated optimisation of a mean of functions that give values alone, each with its client.

    Run it with a point (d,) for the model, None for the loss, and a `BlackBox` for each client: ``Simulation(
    method, x0, None, [BlackBox(f) for f in functions])``. A client's size is its function's weight p_i.

    Args:
        gradient: how clients estimate their gradients.
        description: what they say of their functions; None corrects nothing.
        gamma, decay: the correction's length is ``gamma * t ** -decay`` at local step t = 1, 2, ...
        local_steps: T.
        optimizer: of the local steps, fresh every round.
        server_lr: eta.
        bounds: the box (low, high) in which points lie and functions are asked; None for no box.
        safeguard: a round's new point is discarded unless the clients' mean value is less there. It takes an
            exchange ``judge``: 2 queries, the point down and two float64 numbers up a client and round.

    Raises ValueError for an argument out of range and a start outside the box.
    """

    gradient: LocalGradient
    description: Description | None = None
    gamma: float = 1.0
    decay: float = 0.0
    local_steps: int = 10
    optimizer: LocalOptimizer = Adam()
    server_lr: float = 1.0
    bounds: Bounds | None = (0.0, 1.0)
    safeguard: bool = False

    def __post_init__(self) -> None:
        check(
            ("gradient", self.gradient, "a LocalGradient", isinstance(self.gradient, LocalGradient)),
            (
                "description",
                self.description,
                "a Description or None",
                isinstance(self.description, Description | None),
            ),
            ("gamma", self.gamma, ">= 0 and finite", 0 <= self.gamma < math.inf),
            ("decay", self.decay, ">= 0 and finite", 0 <= self.decay < math.inf),
            ("local_steps", self.local_steps, ">= 1", self.local_steps >= 1),
            ("server_lr", self.server_lr, "> 0 and finite", 0 < self.server_lr < math.inf),
        )
        check_bounds(self.bounds)

    # Clients

    def tasks(self) -> Mapping[str, Task]:
        return {"walk": self.walk, "judge": self.judge, "survey": self.survey}

    def walk(self, state: State, content: Content, data: Any, ctx: ClientContext) -> tuple[State, Content]:
        """T local steps from the server's point, which has come along or with the last survey.

        A client's state is its ``trajectory`` (see `Oracle`), the server's point ``x``, its own ``end``, its
        description ``w``, the mean ``slope`` of the round's estimates, and its last ``update``.
        """
        start: Tensor = content["x"] if "x" in content else state.get("x", ctx.initial)
        oracle = Oracle(data, state, ctx, self.bounds)
        apart = self._apart(state, content, ctx)
        step, x = self.optimizer.start(), start
        slope = torch.zeros_like(x, dtype=torch.float64)
        for t in range(1, self.local_steps + 1):
            g = self.gradient.estimate(x, t, oracle)
            slope += g
            before, x = x, oracle.project(step(x, self.corrected(g, x, t, start, apart, ctx.seed).to(x.dtype)))
            oracle.state["update"] = x - before
        self.gradient.finish(x, oracle)
        oracle.state |= {"x": start, "end": x, "slope": slope / self.local_steps}
        return oracle.into(), {"x": x}

    def corrected(self, g: Tensor, x: Tensor, t: int, start: Tensor, apart: Tensor | None, seed: int) -> Tensor:
        """The direction of local step ``t`` at ``x``; ``apart`` is w - w_i."""
        length: float = self.gamma * t**-self.decay
        if apart is None or self.description is None or not length:
            return g
        return g + length * self.description.gradient(x, apart, seed)

    def judge(self, state: State, content: Content, data: Any, ctx: ClientContext) -> tuple[State, Content]:
        """The function's values at the server's point and at the one that might follow."""
        both = torch.stack([state["x"], content["x"]])
        return state, {"values": Oracle(data, {}, ctx, self.bounds).query(both)}

    def survey(self, state: State, content: Content, data: Any, ctx: ClientContext) -> tuple[State, Content]:
        """Describe the function at the server's new point."""
        assert self.description is not None
        x = content["x"]
        oracle = Oracle(data, state, ctx, self.bounds)
        self.gradient.survey(x, float((x - state["end"]).abs().mean()), oracle)
        w = self.description.weights(x, oracle, self.gradient).to(x.dtype)
        oracle.state |= {"x": x, "w": w}
        return oracle.into(), {self.description.name(len(x), ctx.seed): w}

    def _apart(self, state: State, content: Content, ctx: ClientContext) -> Tensor | None:
        """w - w_i, float64; None where nothing is shared, or the client has not said anything yet."""
        if self.description is None:
            return None
        w = _under(self.description.name(len(ctx.initial), ctx.seed), content, "the server")
        return w.double() - state["w"].double() if "w" in state else None

    # Server

    def start(self, session: Session) -> State:
        x = session.initial.clone()
        if self.bounds is not None and not bool(((x >= self.bounds[0]) & (x <= self.bounds[1])).all()):
            raise ValueError(
                f"the start must lie in bounds {self.bounds}; "
                f"got values of {float(x.min())} .. {float(x.max())}"
            )
        server: State = {"round": 0, "x": x, "stage": "walk", "seed": session.seed}
        if self.description is not None:  # all have the start, and nobody has said anything
            server["w"] = x.new_zeros(self.description.size(len(x)))
            server["there"] = torch.ones(session.clients, dtype=torch.bool)
        return server

    def ask(self, server: State, session: Session) -> Sequence[Send]:
        if server["stage"] != "walk":
            content = {"x": server["x" if server["stage"] == "survey" else "next"]}
            return [Send(client, server["stage"], content) for client in server["active"].tolist()]
        whole = {"x": server["x"]}
        if self.description is None:
            return [Send(client, "walk", whole) for client in session.select(server["round"])]
        brief = {self.description.name(len(server["x"]), session.seed): server["w"]}
        whole |= brief
        return [
            Send(client, "walk", brief if server["there"][client] else whole)
            for client in session.select(server["round"])
        ]

    def close(self, server: State, replies: Mapping[int, Content], session: Session) -> None:
        stage, weights = server["stage"], sizes_of(replies, session)
        if stage == "walk":
            server["active"] = torch.tensor(list(replies))
            mean = mean_of(replies, "x", weights)
            x = server["x"].add(mean - server["x"], alpha=self.server_lr)
            server["next"] = x if self.bounds is None else x.clamp_(*self.bounds)
        elif stage == "judge":
            old, new = mean_of(replies, "values", weights).tolist()
            session.reports["taken"] = float(new < old)
            if not new < old:
                server["next"] = server["x"]
        else:
            assert self.description is not None
            name = self.description.name(len(server["x"]), session.seed)
            said = {client: {"w": _under(name, reply, f"client {client}")} for client, reply in replies.items()}
            server["w"] = mean_of(said, "w", weights)
            server["there"] = torch.zeros_like(server["there"]).index_fill(0, torch.tensor(list(replies)), True)
        self._advance(server)

    def _advance(self, server: State) -> None:
        """Go to the round's next exchange, or to the next round."""
        stages = [
            "walk",
            *(["judge"] if self.safeguard else []),
            *(["survey"] if self.description else []),
            "walk",
        ]
        stage = server["stage"] = stages[stages.index(server["stage"]) + 1]
        if stage != "judge" and "next" in server:
            server["x"] = server.pop("next")
        if stage == "walk":
            server["round"] += 1

    def global_gradient(self, server: State, z: Tensor) -> Tensor:
        """The gradient of the mean function at ``z`` (d,), float64, by what the clients have said of theirs.

        Raises ValueError where nothing is shared."""
        if self.description is None:
            raise ValueError("description must be given for a global gradient; got None")
        return self.description.gradient(z, server["w"].double(), server["seed"])


def _under(name: str, content: Content, who: str) -> Tensor:
    """What a party says of its function. Raises ValueError for one that says it in other terms."""
    if name not in content:
        others = ", ".join(key for key in content if key != "x") or "nothing"
        raise ValueError(
            f"{who} must describe functions as {name}, with the same seed, number of features and length scale "
            f"as here; got {others}"
        )
    return content[name]
