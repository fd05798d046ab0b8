"""FedLEx's phases in the federated protocol: exploration, and the rounds of a base method under guidance."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cograd.clients.fedlex.guidance import check_normalisation, check_range, normalised
from cograd.core.checks import check
from cograd.core.space import ParamSpace
from cograd.engines.federated.local import LocalModel
from cograd.engines.federated.protocol import (
    ClientContext,
    Content,
    Send,
    Session,
    State,
    Synchronous,
    Task,
    mean_of,
)
from cograd.engines.federated.training import LocalSGD

FORMS = ("gradient", "update")
EXPLORE, GUIDANCE = "explore", "guidance"


@dataclass
class FedLEx(Synchronous):
    """FedLEx around a base method. Shared, beside the base's messages: an explorer gets the model and sends its
    map, 4P bytes each; every client gets G, 4P bytes, once, or whenever it has changed.

        FedLEx(FedAvg(LocalSGD(lr=1.0, epochs=5)), LocalSGD(lr=0.1, epochs=20), patience=5, fraction=0.3)

    Args:
        base: any method of rounds whose clients train by ``ctx.model.gradient``, such as FedAvg and its kin.
        explorer: the training of the explorers, its ``epochs`` the most they take; None where ``guidance`` is
            given.
        patience: an explorer stops when so many epochs have passed since its mean training loss was at its
            lowest; None never.
        fraction: of all clients that explore, rounded; drawn uniformly, whoever the session's sampler selects.
        normalize: ``per_client``: explorers send normalised maps, and G is their mean, which could be a secure
            sum. ``after_mean``: they send their travel, and its mean is normalised.
        scale: ``minmax``, or ``robust`` (median and quartiles).
        scope: what is normalised together, each ``tensor``, or all of the model (``global``).
        apply_to: ``gradient`` multiplies each gradient that a client of the base computes, before the clip;
            ``update`` multiplies what its task sends as ``delta``.
        refresh: after every round G is that of the round's participants, if all clients were asked to explore;
            otherwise it stays that of all explorers. The server then keeps all maps.
        adaptive: ``refuse`` the ``gradient`` form with adaptive local training, which cancels G; or ``allow``.
        guidance: G that is known already, by name or as one vector (numel,), in [0, 1]; nobody explores then.

    Weight decay of `LocalSGD` is not guided in the ``gradient`` form, so that entries with G = 0 still decay;
    in the ``update`` form all movement is. Buffers such as BatchNorm's statistics are never guided, and those
    of an exploration are dropped. Codecs see maps and G as they see models; what a client receives is cut off
    at 0 and 1.

    An explorer whose training diverges sends no map and is left out with a warning.

    Raises TypeError for a base that does not go in rounds; ValueError for an argument out of range, for a
    ``fraction`` that selects nobody, and for G of another shape or outside [0, 1]; RuntimeError if every
    explorer diverges.
    """

    base: Synchronous
    explorer: LocalSGD | None = None
    patience: int | None = None
    fraction: float = 1.0
    normalize: str = "per_client"
    scale: str = "minmax"
    scope: str = "tensor"
    apply_to: str = "gradient"
    refresh: bool = False
    adaptive: str = "refuse"
    guidance: Tensor | Mapping[str, Tensor] | None = field(default=None, repr=False, compare=False)
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        if not isinstance(self.base, Synchronous):
            raise TypeError(f"base must be a method of rounds (Synchronous); got {type(self.base).__name__}")
        check(
            ("patience", self.patience, ">= 1 or None", self.patience is None or self.patience >= 1),
            ("fraction", self.fraction, "in (0, 1]", 0 < self.fraction <= 1),
            ("apply_to", self.apply_to, f"one of {', '.join(FORMS)}", self.apply_to in FORMS),
            ("adaptive", self.adaptive, "refuse or allow", self.adaptive in ("refuse", "allow")),
            ("base", type(self.base).__name__, f"without a task {EXPLORE!r}", EXPLORE not in self.base.tasks()),
        )
        check_normalisation(self.normalize, self.scale, self.scope)
        if (self.explorer is None) == (self.guidance is None):
            given = "neither" if self.explorer is None else "both"
            raise ValueError(f"give either an explorer or guidance; got {given}")
        if self.refresh and self.guidance is not None:
            raise ValueError("refresh must be False with given guidance, which has no maps; got True")
        if self.apply_to == "gradient" and self.adaptive == "refuse" and self._adapts():
            raise ValueError(
                "apply_to must be 'update' with adaptive local training, whose steps divide by the gradients' "
                "size and cancel G; got 'gradient' (adaptive='allow' takes it all the same)"
            )
        self.digest = _checked(self.guidance)

    def _adapts(self) -> bool:
        return bool(getattr(getattr(self.base, "local", None), "adaptive", False))

    # Clients

    def tasks(self) -> Mapping[str, Task]:
        guided = {name: partial(self.guided, name, task) for name, task in self.base.tasks().items()}
        return guided if self.explorer is None else {EXPLORE: self.explore, **guided}

    def explore(self, state: State, content: Content, data: Any, ctx: ClientContext) -> tuple[State, Content]:
        """The first exchange: train from the received model and send how far each entry travelled, squared, or
        nothing if the training diverged. Leaves the client's state alone."""
        assert self.explorer is not None
        start, watch = content["x"], _Watch(ctx, len(data), self.patience)
        with suppress(_Enough):  # the model's vector is then where it stopped
            self.explorer.run(ctx, data, start, watch)
        ctx.trained = None  # buffers and accuracies are those of the rounds
        ctx.report("exploration epochs", watch.epochs)
        travel = (ctx.model.theta - start).square_()
        if watch.diverged or not bool(travel.isfinite().all()):
            return state, {}
        if self.normalize == "per_client":
            travel = normalised(travel, ctx.model.space, self.scale, self.scope)
        return state, {"map": travel}

    def guided(
        self, name: str, task: Task, state: State, content: Content, data: Any, ctx: ClientContext
    ) -> tuple[State, Content]:
        """A task of the base under guidance; the client's state holds ``guidance`` (numel,) besides."""
        state, content = dict(state), dict(content)
        kept = state.pop(GUIDANCE, None)
        received = content.pop(GUIDANCE, None)
        guidance = kept if received is None else received.clamp_(0, 1)
        if self.apply_to == "gradient":
            ctx.model = _Guided(ctx.model, guidance)
        state, reply = task(state, content, data, ctx)
        if self.apply_to == "update":
            reply = self._scaled(name, reply, guidance)
        return {**state, GUIDANCE: guidance}, reply

    def _scaled(self, name: str, reply: Content, guidance: Tensor) -> Content:
        if "delta" in reply and reply["delta"].shape == guidance.shape:
            return {**reply, "delta": reply["delta"] * guidance}
        if name == "train":
            raise ValueError(
                f"apply_to must be 'gradient' where 'train' does not send a whole model's change as 'delta'; "
                f"got 'update' with {type(self.base).__name__}"
            )
        return reply

    # The server

    def start(self, session: Session) -> State:
        server = self.base.start(session)
        server["informed"] = torch.zeros(session.clients, dtype=torch.bool)
        if self.guidance is not None:
            self._adopt(server, _vector(self.guidance, session), session)
        elif not round(self.fraction * session.clients):
            raise ValueError(
                f"fraction must select at least one of {session.clients} clients; got {self.fraction}"
            )
        return server

    def explorers(self, session: Session) -> list[int]:
        """The clients that explore, ascending."""
        count = round(self.fraction * session.clients)
        chosen: list[int] = session.stream("explorers").choice(session.clients, count).tolist()
        return chosen

    def ask(self, server: State, session: Session) -> Sequence[Send]:
        if GUIDANCE not in server:
            content = {"x": session.initial}
            return [Send(client, EXPLORE, content) for client in self.explorers(session)]
        extended: dict[int, Content] = {}  # contents that are one object stay one
        sends = []
        for send in self.base.ask(server, session):
            if not server["informed"][send.to]:
                content = extended.setdefault(id(send.content), {**send.content, GUIDANCE: server[GUIDANCE]})
                send = Send(send.to, send.task, content)
            sends.append(send)
        return sends

    def close(self, server: State, replies: Mapping[int, Content], session: Session) -> None:
        if GUIDANCE not in server:
            self._conclude(server, replies, session)
            return
        server["informed"] = server["informed"].index_fill(0, torch.tensor(list(replies)), True)
        before = server["round"]
        self.base.close(server, replies, session)
        if server["round"] == before:
            return
        if before == 0 and session.participants is None:
            session.participants = list(replies)  # explorers have answered, too
        if "maps" in server:
            self._refresh(server, replies, session)

    def shape(self, guidance: Tensor, session: Session) -> Tensor:
        """G (numel,) as clients get it: as explored. Controls put something else in its place."""
        return guidance

    def _conclude(self, server: State, replies: Mapping[int, Content], session: Session) -> None:
        """Make G of the explorers' maps."""
        lost = [client for client, reply in replies.items() if "map" not in reply]
        found = {client: reply for client, reply in replies.items() if "map" in reply}
        if not found:
            raise RuntimeError(
                f"the exploration of every explorer diverged ({lost}); lower the explorer's learning rate"
            )
        if lost:
            warnings.warn(
                f"the exploration of clients {lost} diverged; they are left out", RuntimeWarning, stacklevel=2
            )
        if self.refresh and self.fraction == 1:
            server["maps"] = torch.stack([reply["map"] for reply in found.values()])
            server["explorers"] = torch.tensor(list(found))
        self._adopt(server, self._combined(found, session.space), session)

    def _refresh(self, server: State, replies: Mapping[int, Content], session: Session) -> None:
        """G of the participants from the next round on; it stays where none of them has a map."""
        explorers: list[int] = server["explorers"].tolist()
        maps = {
            client: {"map": row}
            for client, row in zip(explorers, server["maps"], strict=True)
            if client in replies
        }
        if maps:
            self._adopt(server, self._combined(maps, session.space), session)

    def _combined(self, maps: Mapping[int, Content], space: ParamSpace) -> Tensor:
        mean = mean_of(maps, "map")
        if self.normalize == "after_mean":
            return normalised(mean, space, self.scale, self.scope)
        return mean.clamp_(0, 1)  # of a codec that overshoots

    def _adopt(self, server: State, guidance: Tensor, session: Session) -> None:
        """Take a G into the server's state: nobody has it yet."""
        server[GUIDANCE] = guidance = self.shape(guidance, session)
        server["informed"] = torch.zeros(session.clients, dtype=torch.bool)
        session.reports["mean guidance"] = float(guidance.mean())
        session.reports["frozen"] = float((guidance == 0).float().mean())

    # What is the base's

    def shared(self, space: ParamSpace) -> ParamSpace:
        return self.base.shared(space)

    def model(self, server: State) -> Tensor:
        return self.base.model(server)

    def personal(self, server: State, client: State, number: int) -> Tensor:
        return self.base.personal(server, client, number)


class _Guided(LocalModel):
    """A local model whose gradients are multiplied by G. It shares all attributes with the one it is made of:
    what either sets, both know."""

    __slots__ = ("_guidance",)

    def __init__(self, model: LocalModel, guidance: Tensor) -> None:
        self.__dict__ = model.__dict__
        self._guidance = guidance

    def gradient(self, vector: Tensor, x: Tensor, y: Tensor, *, track: bool = True) -> Tensor:
        return super().gradient(vector, x, y, track=track).mul_(self._guidance)


class _Enough(Exception):
    """An explorer has trained enough."""


class _Watch:
    """The gradient that an explorer trains by: it counts epochs, and raises `_Enough` after the last one.

    An epoch's loss is the mean over its examples, as they were trained on.
    """

    def __init__(self, ctx: ClientContext, size: int, patience: int | None) -> None:
        self.ctx, self.size, self.patience = ctx, size, patience
        self.epochs = self.seen = self.idle = 0
        self.best, self.total = math.inf, torch.zeros((), device=ctx.model.theta.device)
        self.over = self.diverged = False

    def __call__(self, v: Tensor, x: Tensor, y: Tensor) -> Tensor:
        if self.over:
            raise _Enough
        model = self.ctx.model
        g = model.gradient(v, x, y)
        self.ctx.count("grad", 1)
        self.total += model.last_loss * len(y)
        self.seen += len(y)
        if self.seen == self.size:
            self._end(float(self.total) / self.size)
        return g

    def _end(self, loss: float) -> None:
        """The end of an epoch, whose last step is still to come."""
        self.epochs += 1
        self.seen, self.total = 0, torch.zeros_like(self.total)
        self.idle = 0 if loss < self.best else self.idle + 1
        self.best = min(self.best, loss)
        self.diverged = not math.isfinite(loss)
        self.over = self.diverged or self.idle == self.patience


def _checked(guidance: Tensor | Mapping[str, Tensor] | None) -> str:
    """What tells a given G from another in a method's repr. Raises ValueError for one outside [0, 1]."""
    if guidance is None:
        return ""
    given = {"": guidance} if isinstance(guidance, Tensor) else guidance
    digest = hashlib.blake2b(digest_size=8)
    for name, values in given.items():
        check_range(f"guidance of {name!r}" if name else "guidance", values)
        digest.update(name.encode() + b"\0" + values.detach().cpu().contiguous().double().numpy().tobytes())
    return digest.hexdigest()


def _vector(guidance: Tensor | Mapping[str, Tensor], session: Session) -> Tensor:
    """A given G as a vector like the model's."""
    space, like = session.space, session.initial
    if isinstance(guidance, Tensor):
        if guidance.shape != (space.numel,):
            raise ValueError(f"guidance must have shape ({space.numel},); got {tuple(guidance.shape)}")
        return guidance.detach().to(like, copy=True)
    known = [segment.name for segment in space]
    if sorted(guidance) != sorted(known):
        raise ValueError(f"guidance must name the trainable parameters {known}; got {list(guidance)}")
    return space.flatten(guidance).to(like)
