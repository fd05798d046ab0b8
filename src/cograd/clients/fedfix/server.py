"""The recursion: clients train all the time, the server takes their changes when its scheme says so."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cograd.clients.fedfix.schedule import Arrivals, Every, Scheme, surrogate
from cograd.engines.federated.protocol import (
    Action,
    After,
    ClientContext,
    Content,
    Event,
    Lost,
    Method,
    NoReplies,
    Reply,
    Send,
    Session,
    Start,
    State,
    Task,
    Timer,
    sum_of,
)
from cograd.engines.federated.simulation import TICKS
from cograd.engines.federated.training import LocalSGD

SETTLE, DUE = "settle", "due"
"""Keys of timers: all that comes at this time is in; a period is over."""

STABLE = 2.0
"""A single change that counts more than this overshoots any quadratic's minimum that it pointed to."""


@dataclass
class FedFix(Method):
    """Aggregation with stochastic weights. Shared: 4P bytes up and 4P bytes down a participation.

    Every client takes part all the time, so the session's sampler must select all, and it has no timeout: a
    scheme is what decides how long to wait. A client whose answer is lost gets the next model.

    Args:
        local: the clients' training, from the model that each received.
        scheme: when to aggregate, `Every` or `Arrivals`.
        times: response time of each client, in the unit of the session's clock, for weights that are known
            beforehand. None measures: client i then counts as having a gap 1 / f_i of (aggregations so far) /
            (participations so far), which is right in the long run whatever the times are, random ones too.
        weighting: ``unbiased``, d_i = p_i / f_i; ``identical``, all d_i = 1 / E|S_n|; or the d_i themselves.
        importances: p_i: ``uniform``, ``sizes`` (in proportion to the clients' numbers of examples), or one
            number >= 0 a client, of sum 1.
        lr: server learning rate. Warns where lr * max_i d_i is above `STABLE`.

    Raises ValueError for arguments out of range, when the session starts for those that depend on it.
    """

    local: LocalSGD
    scheme: Scheme = Every(0.5)
    times: Sequence[float] | None = None
    weighting: str | Sequence[float] = "unbiased"
    importances: str | Sequence[float] = "uniform"
    lr: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr must be > 0 and finite; got {self.lr}")
        self.times = None if self.times is None else tuple(self.times)
        self._gaps = None if self.times is None else self.scheme.gaps(self.times)
        self.weighting = _named_or_numbers("weighting", self.weighting, ("unbiased", "identical"))
        self.importances = _named_or_numbers("importances", self.importances, ("uniform", "sizes"))
        if not isinstance(self.importances, str) and not math.isclose(sum(self.importances), 1, abs_tol=1e-6):
            raise ValueError(f"importances must sum to 1; their sum is {sum(self.importances)}")

    # Weights

    def weights(self, sizes: Sequence[int]) -> list[float]:
        """The weights d_i of clients with so many examples. Raises ValueError where they are measured."""
        if not isinstance(self.weighting, str):
            return list(self.weighting)
        gaps = self._known_gaps()
        raw, scale = self._weights(range(len(gaps)), gaps, self.scheme.size(gaps), sizes)
        return [raw[client] / scale for client in raw]

    def surrogate(self, sizes: Sequence[int]) -> list[float]:
        """The importances of the loss that is really minimised. Raises ValueError without times."""
        return surrogate(self.weights(sizes), self._known_gaps())

    def applied(self, server: State) -> list[float]:
        """The importances of the loss that a run has minimised so far: the mean weights applied, of sum 1."""
        total: Tensor = server["applied"]
        return (total / total.sum().clamp(min=torch.finfo(total.dtype).tiny)).tolist()

    def _known_gaps(self) -> list[float]:
        if self._gaps is None:
            raise ValueError("times must be given to know this beforehand; got None")
        return self._gaps

    def _importances(self, sizes: Sequence[int]) -> list[float]:
        """In proportion to the p_i, but whole numbers where they can be."""
        if isinstance(self.importances, str):
            return [1.0 if self.importances == "uniform" else float(size) for size in sizes]
        return list(self.importances)

    def _weights(
        self, taken: Sequence[int], gaps: Sequence[float], size: float, sizes: Sequence[int]
    ) -> tuple[dict[int, float], float]:
        """Weights of clients, and by what their sum is divided: apart, so that FedAvg is met bit for bit."""
        if self.weighting == "unbiased":
            shares = self._importances(sizes)
            return {client: shares[client] * gaps[client] for client in taken}, math.fsum(shares)
        if self.weighting == "identical":
            return dict.fromkeys(taken, 1.0), size
        return {client: float(self.weighting[client]) for client in taken}, 1.0

    def _weights_now(
        self, server: State, taken: Sequence[int], session: Session
    ) -> tuple[dict[int, float], float]:
        """Weights of an aggregation; without times by what has been counted, this aggregation included."""
        if self._gaps is not None:
            return self._weights(taken, self._gaps, self.scheme.size(self._gaps), session.sizes)
        aggregations = server["round"] + 1
        gaps = (aggregations / server["taken"].clamp(min=1)).tolist()
        size = float(server["taken"].sum()) / aggregations
        if isinstance(self.scheme, Arrivals):
            size = self.scheme.size(gaps)
        return self._weights(taken, gaps, size, session.sizes)

    # Clients

    def tasks(self) -> Mapping[str, Task]:
        return {"train": self.train}

    def train(self, state: State, content: Content, data: Any, ctx: ClientContext) -> tuple[State, Content]:
        """What a client has changed in the model that it received."""
        x = content["x"]
        return state, {"delta": self.local.run(ctx, data, x) - x}

    # Server

    def start(self, session: Session) -> State:
        """Besides the model x: ``origin[i]``, the round whose model client i's waiting answer is from,
        ``arrived[i]``, its tick, or -1; ``lost``; ``taken``, how often each took part; ``applied``, the sum of
        each one's weights. Changes that wait are there as ``delta.i``."""
        self._check(session)
        clients = session.clients
        return {
            "round": 0,
            "x": session.initial.clone(),
            "began": _tick(session),
            "settling": False,
            "arrived": torch.full((clients,), -1),
            "origin": torch.zeros(clients, dtype=torch.int64),
            "lost": torch.zeros(clients, dtype=torch.bool),
            "taken": torch.zeros(clients, dtype=torch.int64),
            "applied": torch.zeros(clients, dtype=torch.float64),
        }

    def _check(self, session: Session) -> None:
        clients = session.clients
        self.scheme.check(clients)
        for name, given in (
            ("times", self.times), ("weighting", self.weighting), ("importances", self.importances),
        ):  # fmt: skip
            if given is not None and not isinstance(given, str) and len(given) != clients:
                raise ValueError(f"{name} must hold one number a client, {clients}; got {len(given)}")
        if session.timeout is not None:
            raise ValueError(f"timeout must be None with FedFix, whose scheme decides; got {session.timeout}")
        if len(session.select(0)) != clients:
            raise ValueError(
                f"sampler must select all {clients} clients, which work all the time; "
                f"it selects {len(session.select(0))}"
            )
        if self._gaps is not None or not isinstance(self.weighting, str):
            largest = self.lr * max(self.weights(session.sizes))
            if largest > STABLE:
                warnings.warn(
                    f"lr times the largest weight is {largest:.3g}; above {STABLE:g} one change overshoots",
                    RuntimeWarning,
                    stacklevel=3,
                )

    def next(self, server: State, event: Event, session: Session) -> Sequence[Action]:
        if isinstance(event, Start):
            content = {"x": server["x"]}
            everyone = [Send(client, "train", content) for client in range(session.clients)]
            return [*self._due(server, session), *everyone]
        if isinstance(event, Timer):
            if event.key == DUE:
                return [After(0.0, SETTLE)]
            server["settling"] = False
            return self._aggregate(server, session)
        if isinstance(event, Lost):
            server["lost"][event.client] = True
        else:
            self._keep(server, event, session)
        return self._settle(server)

    @staticmethod
    def _keep(server: State, event: Reply, session: Session) -> None:
        server["arrived"][event.client] = _tick(session)
        server["origin"][event.client] = event.round
        server[f"delta.{event.client}"] = event.content["delta"]

    def _due(self, server: State, session: Session) -> list[Action]:
        """The timer of the next period, counted from the start, so that it does not drift."""
        if not isinstance(self.scheme, Every):
            return []
        due = server["began"] + (server["round"] + 1) * self.scheme.ticks
        return [After(max(0, due - _tick(session)) / TICKS, DUE)]

    def _settle(self, server: State) -> list[Action]:
        """Aggregate when all that comes at this very time is in, if enough has come."""
        if server["settling"] or not isinstance(self.scheme, Arrivals):
            return []
        working = len(server["lost"]) - int(server["lost"].sum())
        if not working:
            raise NoReplies(f"round {server['round']}: the answers of all clients were lost")
        if int((server["arrived"] >= 0).sum()) < min(self.scheme.count or working, working):
            return []
        server["settling"] = True
        return [After(0.0, SETTLE)]

    def _aggregate(self, server: State, session: Session) -> list[Action]:
        taken = self._take(server)
        server["taken"][taken] += 1
        weights, scale = self._weights_now(server, taken, session)
        if taken:
            deltas = {client: {"delta": server.pop(f"delta.{client}")} for client in taken}
            server["x"] = server["x"].add(sum_of(deltas, "delta", weights).div_(scale), alpha=self.lr)
        for client in taken:
            server["applied"][client] += weights[client] / scale
        self._report(server, taken, sum(weights.values()) / scale, session)
        server["round"] += 1
        server["arrived"][taken] = -1
        idle = sorted({*taken, *server["lost"].nonzero()[:, 0].tolist()})
        server["lost"].zero_()
        content = {"x": server["x"]}
        sends = [Send(client, "train", content) for client in idle]
        return [*self._due(server, session), *self._settle(server), *sends]

    def _take(self, server: State) -> list[int]:
        """The clients of this aggregation, ascending: all that wait, or the earliest, by number in a tie."""
        arrived: list[int] = server["arrived"].tolist()
        waiting = sorted((when, client) for client, when in enumerate(arrived) if when >= 0)
        count = self.scheme.count if isinstance(self.scheme, Arrivals) else None
        return sorted(client for _, client in waiting[:count])

    def _report(self, server: State, taken: Sequence[int], weight: float, session: Session) -> None:
        """Figures of the aggregation: staleness in aggregations, the weights' sum, and how far the mean weights
        so far are from the importances (total variation)."""
        session.participants = taken
        if not taken:
            return
        staleness = server["round"] - server["origin"][taken]
        shares = self._importances(session.sizes)
        bias = sum(abs(a - p / sum(shares)) for a, p in zip(self.applied(server), shares, strict=True)) / 2
        session.reports |= {
            "staleness": float(staleness.double().mean()),
            "stalest": float(staleness.max()),
            "weight": weight,
            "bias": bias,
        }


def _tick(session: Session) -> int:
    return round(session.now * TICKS)


def _named_or_numbers(name: str, given: str | Sequence[float], names: Sequence[str]) -> str | tuple[float, ...]:
    if isinstance(given, str):
        if given not in names:
            raise ValueError(f"{name} must be one of {', '.join(names)}, or numbers; got {given!r}")
        return given
    numbers = tuple(float(each) for each in given)
    if not all(0 <= each < math.inf for each in numbers) or not sum(numbers) > 0:
        raise ValueError(f"{name} must be finite, >= 0 and not all 0; got {list(numbers)}")
    return numbers


def fed_avg(local: LocalSGD, times: Sequence[float] | None = None, **options: Any) -> FedFix:
    """FedAvg: wait for all. ``options`` are those of `FedFix`."""
    return FedFix(local, Arrivals(), times, **options)


def async_fed_avg(local: LocalSGD, times: Sequence[float] | None = None, **options: Any) -> FedFix:
    """Asynchronous FedAvg: aggregate at each answer. ``options`` are those of `FedFix`."""
    return FedFix(local, Arrivals(1), times, **options)


def fed_buff(local: LocalSGD, count: int, times: Sequence[float] | None = None, **options: Any) -> FedFix:
    """FedBuff as this paper has it, without a discount for staleness: aggregate when ``count`` have answered.
    ``options`` are those of `FedFix`."""
    return FedFix(local, Arrivals(count), times, **options)


def centralized_sgd(lr: float, batch_size: int, times: Sequence[float] | None = None, **options: Any) -> FedFix:
    """Minibatch SGD on the federated loss: all clients, one step each. ``options`` are those of `FedFix`."""
    return FedFix(LocalSGD(lr, batch_size=batch_size, steps=1), Arrivals(), times, **options)
