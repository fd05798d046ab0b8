"""All nodes in one process on one clock: to try the method with, and to check processes by."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from cograd.core.ledger import Ledger
from cograd.machines.dadao.clock import Event, PoissonClock
from cograd.machines.dadao.node import Constants, Flow, Gradient, Node, check_state, touchable
from cograd.machines.dadao.rates import GossipRates


class DADAO:
    """Accelerated decentralized asynchronous optimization of sum_i f_i over a network, simulated.

    Args:
        gradients: one a node: ``gradient(x, k)`` is node i's gradient at x (d,), of all its data or of a
            minibatch; see `Gradient`.
        x0: where the nodes begin: (n, d), or (d,) for all; float32 or float64, on any device.
        mu, L: strong convexity and smoothness, each the worst over the nodes. Too small a mu or too large an L
            is safe and slow; the reverse may diverge.
        rates: the edges' gossip rates; see `gossip_rates`.
        seed: of the Poisson clocks.
        average: keep each node's running mean of x, the read-out for minibatch gradients.
        constants: others than the paper's, for ablations.
        ledger: counts a ``grad`` of work a gradient and one message each way an averaging, with the unit of
            time as the round; a new one if not given.

    One unit of time is one gradient a node in expectation. Memory: (n, 6, d) numbers.

    Raises ValueError for mu <= 0, L < mu, another number of gradients or rows of x0 than the rates have nodes,
    and float32 with L / mu > 1e4; TypeError for half precision.
    """

    def __init__(
        self,
        gradients: Sequence[Gradient],
        x0: Tensor,
        *,
        mu: float,
        L: float,
        rates: GossipRates,
        seed: int = 0,
        average: bool = False,
        constants: Constants | None = None,
        ledger: Ledger | None = None,
    ) -> None:
        n = rates.n
        if len(gradients) != n:
            raise ValueError(f"gradients must hold one for each of the graph's {n} nodes; got {len(gradients)}")
        if x0.dim() not in (1, 2) or (x0.dim() == 2 and len(x0) != n):
            raise ValueError(f"x0 must have shape (d,) or ({n}, d); got {tuple(x0.shape)}")
        self.constants = constants if constants is not None else Constants.of(mu, L, rates.chi1)
        check_state(x0, mu, L)
        self.rates, self.flow = rates, Flow(self.constants)
        self.clock = PoissonClock(rates, seed)
        self.ledger = ledger if ledger is not None else Ledger()
        rows = x0.detach().expand(n, -1) if x0.dim() == 1 else x0.detach()
        self._state = torch.stack([Node.fresh(x) for x in rows])
        self._average = torch.zeros_like(self._state[:, 0]) if average else None
        kept = self._average if self._average is not None else [None] * n
        self.nodes = [
            Node(s, g, self.constants, self.flow, a)
            for s, g, a in zip(self._state, gradients, kept, strict=True)
        ]
        self.now, self.activations = 0.0, 0
        setting = repr((rates.digest, self.constants))
        self._setting = hashlib.blake2b(setting.encode(), digest_size=16).hexdigest()
        self._message = self._state[0, 0].nbytes

    def __repr__(self) -> str:
        n, _, d = self._state.shape
        return f"DADAO({n} nodes, {d} parameters, {self.rates.total:.4g} averagings a unit, now={self.now:.4g})"

    def events(self, until: float) -> Iterator[Event]:
        """The clocks' next events up to a time; give each to `step`."""
        return self.clock.until(until)

    def step(self, event: Event) -> None:
        """One gradient or one averaging. Raises ValueError for an event before the node's last one."""
        time, i, j = event
        a = self.nodes[i]
        if j < 0:
            a.advance(time)
            self.ledger.work(i, "grad")
            a.on_gradient(time)
        else:
            b = self.nodes[j]
            of_a, of_b = a.message(time), b.message(time)
            self.ledger.send(i, int(time), self._message, to=j)
            self.ledger.send(j, int(time), self._message, to=i)
            a.on_message(time, of_b)
            b.on_message(time, of_a)
            self.activations += 1
        self.now = max(self.now, time)

    def run(self, until: float) -> None:
        """All events up to a time."""
        for event in self.events(until):
            self.step(event)
        self.now = max(self.now, until)

    @property
    def gradients(self) -> int:
        """Gradients taken so far, by all nodes."""
        return sum(node.gradients for node in self.nodes)

    def states(self) -> Tensor:
        """All six vectors of all nodes, flowed to now: (n, 6, d), a copy. The nodes themselves stay as they
        are, so that looking changes no bit of a run."""
        flowed = self._state.clone()
        for node, state in zip(self.nodes, touchable(flowed), strict=True):
            self.flow(state, self.now - node.time)
        return flowed

    def sync(self) -> Tensor:
        """x of all nodes, flowed to now (n, d)."""
        return self.states()[:, 0]

    @property
    def averages(self) -> Tensor:
        """Each node's mean of x over its events so far (n, d). Raises ValueError without ``average=True``."""
        if self._average is None:
            raise ValueError("no averages are kept: make the run with average=True")
        return self._average.clone()

    def state_dict(self) -> dict[str, Any]:
        """Everything but the objectives and the ledger; a run that loads it goes on bit for bit."""
        return {
            "state": self._state.clone(),
            "average": self._average.clone() if self._average is not None else None,
            "nodes": [(node.time, node.events, node.gradients) for node in self.nodes],
            "now": self.now,
            "activations": self.activations,
            "setting": self._setting,
            "clock": self.clock.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`. Raises ValueError for a state of another number of nodes (z is shared out
        among them: it cannot be split anew), size, dtype, graph, rates or constants, or with and without
        averages."""
        theirs, ours = state["state"], self._state
        if theirs.shape != ours.shape or theirs.dtype != ours.dtype:
            raise ValueError(
                f"the state is of (nodes, 6, d) = {tuple(theirs.shape)} in {theirs.dtype}; "
                f"this run has {tuple(ours.shape)} in {ours.dtype}"
            )
        if state["setting"] != self._setting:
            raise ValueError("the state is of a run with another graph, other rates or other constants")
        if (state["average"] is None) != (self._average is None):
            raise ValueError("the state and this run must both be with average=True or both without")
        self._state.copy_(theirs)
        if self._average is not None:
            self._average.copy_(state["average"])
        for node, (time, events, gradients) in zip(self.nodes, state["nodes"], strict=True):
            node.time, node.events, node.gradients = float(time), int(events), int(gradients)
        self.now, self.activations = float(state["now"]), int(state["activations"])
        self.clock.load_state_dict(state["clock"])
