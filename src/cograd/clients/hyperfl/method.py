"""HyperFL's rounds: two phases of local training at the client, a weighted mean at the server."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad

from cograd.clients.baselines.fedper import FedPer
from cograd.clients.hyperfl.hypernet import INITS, HyperNet, Weights
from cograd.core.checks import check
from cograd.core.space import ParamSpace
from cograd.core.streams import stream
from cograd.engines.federated.protocol import (
    ClientContext,
    Content,
    Session,
    State,
    Synchronous,
    Task,
    mean_of,
    sizes_of,
)
from cograd.engines.federated.training import LocalSGD

LOCAL = LocalSGD(lr=0.02, epochs=5, batch_size=50, momentum=0.5, weight_decay=5e-4, max_norm=50.0)
"""The paper's training of hypernetwork and embedding, for its small convolutional networks."""
HEAD = LocalSGD(lr=0.1, epochs=1, batch_size=50, momentum=0.5, weight_decay=5e-4)
"""The paper's training of the classifier."""


@dataclass
class HyperFL(Synchronous):
    """HyperFL. Shared: 4 (E H + H + (H + 1) P) bytes up and as many down a participant and round, P the entries
    that are generated: about H + 1 times what FedAvg sends (`multiplier`).

    Args:
        local: phase 2, hypernetwork and embedding; ``max_norm`` clips their gradients apart from each other.
        head: phase 1, the classifier.
        private: the classifier: so many layers, counted from the last, or names of layers or tensors, as in
            `FedPer`. All other trainable parameters are generated: of a model with a frozen backbone, those of
            its adapters (HyperFL-LPM).
        embedding, hidden: E and H.
        init: of Phi, ``target_scaled`` or ``paper`` (see `HyperNet.initial`).
        scale: of the heads with ``target_scaled``.
        secret: draw embeddings from the operating system's random numbers. Otherwise they follow from the
            session's seed, so that runs can be repeated; on real nodes the server knows that seed.

    The state of a client is its embedding ``v`` (E,) and its classifier ``h``, in the model's order. There is
    no global model: `model` is what v = 0 generates, with the initial classifier. Momentum starts anew in each
    phase of each round.

    Raises ValueError for an argument out of range, and in a session for a classifier that is nothing,
    everything, or tied to what is generated.
    """

    local: LocalSGD = LOCAL
    head: LocalSGD = HEAD
    private: int | tuple[str, ...] = 1
    embedding: int = 64
    hidden: int = 128
    init: str = "target_scaled"
    scale: float = 0.05
    secret: bool = False

    def __post_init__(self) -> None:
        check(
            ("embedding", self.embedding, ">= 1", self.embedding >= 1),
            ("hidden", self.hidden, ">= 1", self.hidden >= 1),
            ("init", self.init, f"one of {', '.join(INITS)}", self.init in INITS),
            ("scale", self.scale, ">= 0 and finite", 0 <= self.scale < math.inf),
        )
        self._unclipped = replace(self.local, max_norm=None)

    def hypernet(self, space: ParamSpace) -> HyperNet:
        """The hypernetwork of a model."""
        generated = FedPer(self.local, private=self.private).shared(space)
        if generated.numel == 0:
            raise ValueError(f"private must leave something to generate; got {self.private!r}")
        return HyperNet(space, generated, self.embedding, self.hidden)

    def multiplier(self, space: ParamSpace) -> float:
        """Bytes of a message over those of FedAvg's for the same model."""
        return self.hypernet(space).multiplier

    def shared(self, space: ParamSpace) -> ParamSpace:
        return self.hypernet(space).space

    def tasks(self) -> Mapping[str, Task]:
        return {"train": self.train}

    # The client

    def train(self, state: State, content: Content, data: Any, ctx: ClientContext) -> tuple[State, Content]:
        """The client's round: its state is ``v`` and ``h``, its reply the change of Phi."""
        mine = self.entries(ctx.model.space)
        if "v" not in state:
            _refuse_tied(ctx.model.module, self.hypernet(ctx.model.space))
            draws = stream(secrets.randbits(128)) if self.secret else ctx.stream("embedding")
            state = {**state, "v": draws.normal(self.embedding).to(ctx.initial), "h": ctx.initial[mine]}
        v, phi = state["v"], content["x"].clone()
        parts = ~mine, mine
        theirs, own = (part.nonzero()[:, 0] for part in parts)
        w = ctx.model.theta
        w[own], w[theirs] = state["h"], self._weights(phi).generate(v)
        self.fit_head(ctx, data, w, own)
        self.fit_hypernet(ctx, data, w, theirs, phi, v)
        ctx.trained = w
        return {**state, "v": v, "h": w[own]}, {"delta": phi.sub_(content["x"])}

    def fit_head(self, ctx: ClientContext, data: Any, w: Tensor, own: Tensor) -> None:
        """Phase 1: train the entries ``own`` of the model ``w`` (numel,) in place, the generated ones fixed."""
        h, lr = w[own], self.head.rate(ctx.round)
        buffer = torch.zeros_like(h) if self.head.momentum else None
        for x, y in self.head.batches(ctx, data):
            self.head.step(h, ctx.model.gradient(w, x, y)[own], lr, buffer)
            w[own] = h
            ctx.count("grad", 1)

    def fit_hypernet(
        self, ctx: ClientContext, data: Any, w: Tensor, generated: Tensor, phi: Tensor, v: Tensor
    ) -> None:
        """Phase 2: train ``phi`` and ``v`` together, in place; the model ``w`` is generated anew after every
        step, the classifier stays."""
        weights, lr = self._weights(phi), self.local.rate(ctx.round)
        g = torch.empty_like(phi)
        slots = self._weights(g)
        buffers = [torch.zeros_like(t) if self.local.momentum else None for t in (phi, v)]
        for x, y in self.local.batches(ctx, data):
            pulled = weights.pullback(v, ctx.model.gradient(w, x, y)[generated])
            pulled.into(slots, _shrink(pulled.norm, self.local.max_norm))
            dv = weights.weight.t() @ pulled.inner
            dv.mul_(_shrink(dv.norm(), self.local.max_norm))
            self._unclipped.step(phi, g, lr, buffers[0])
            self._unclipped.step(v, dv, lr, buffers[1])
            w[generated] = weights.generate(v)
            ctx.count("grad", 1)

    def observable(
        self, params: Mapping[str, Tensor], batch: tuple[Tensor, Tensor], ctx: ClientContext, public: Content
    ) -> dict[str, Tensor]:
        """The reply of a client that holds just this batch: ``delta``, the change of Phi.

        Args:
            params: what is the client's own, ``v`` and ``h``; an attacker puts its guess there.
            batch: inputs and targets, at most a minibatch of them.
            ctx: names the round and holds the model; its state is left as it is.
            public: what everybody knows, ``x``, which is Phi before the round.

        Differentiable in the inputs, in ``params`` and in ``public``, and `torch.func.vmap` works on it. Raises
        ValueError for more examples than a minibatch holds.
        """
        x, y = batch
        size = min(self.local.batch_size, self.head.batch_size)
        if len(x) > size:
            raise ValueError(f"batch must hold at most {size} examples, one minibatch; got {len(x)}")
        loss = _loss(ctx, self.hypernet(ctx.model.space), x, y)

        phi, v = public["x"], params["v"]
        theta = self._weights(phi).generate(v)
        by_head = grad(lambda h: loss(theta, h))
        (h,) = _replay(self.head, ctx, len(x), [params["h"]], lambda h: (by_head(h),))
        by_phi = grad(lambda phi, v: loss(self._weights(phi).generate(v), h), (0, 1))
        phi, v = _replay(self.local, ctx, len(x), [phi, v], by_phi)
        return {"delta": phi - public["x"]}

    # The server

    def start(self, session: Session) -> State:
        net, mine = self.hypernet(session.space), self.entries(session.space)
        draws = session.stream("hypernetwork")
        phi = net.initial(session.initial[~mine], draws, self.init, self.scale)
        return {"round": 0, "x": phi, "start": session.initial.clone(), "mine": mine}

    def close(self, server: State, replies: Mapping[int, Content], session: Session) -> None:
        server["x"] = server["x"] + mean_of(replies, "delta", sizes_of(replies, session))
        server["round"] += 1

    def model(self, server: State) -> Tensor:
        """What v = 0 generates, with the initial classifier."""
        return self.personal(server, {}, 0)

    def personal(self, server: State, client: State, number: int) -> Tensor:
        """What the averaged Phi generates from the client's embedding, with its classifier; `model` for a
        client that has not taken part yet, as it has neither."""
        whole: Tensor = server["start"].clone()
        v = client.get("v", server["x"].new_zeros(self.embedding))
        whole[~server["mine"]] = self._weights(server["x"]).generate(v)
        if "h" in client:
            whole[server["mine"]] = client["h"]
        return whole

    def entries(self, space: ParamSpace) -> Tensor:
        """Which entries of the model are the classifier: bool (numel,)."""
        return FedPer(self.local, private=self.private).entries(space)

    def _weights(self, phi: Tensor) -> Weights:
        return Weights.of(phi, self.embedding, self.hidden)


def _shrink(norm: Tensor, max_norm: float | None) -> Tensor | float:
    """What a gradient of this norm is multiplied with."""
    return 1.0 if max_norm is None else (max_norm / (norm + 1e-6)).clamp(max=1.0)


def _replay(
    local: LocalSGD,
    ctx: ClientContext,
    n: int,
    at: list[Tensor],
    gradients: Callable[..., tuple[Tensor, ...]],
) -> list[Tensor]:
    """`LocalSGD` on one minibatch of ``n`` examples without changing anything in place, each tensor of ``at``
    clipped by itself."""
    lr = local.rate(ctx.round)
    buffers = [torch.zeros_like(t) for t in at]
    for _ in range(local.length(n)):
        for i, g in enumerate(gradients(*at)):
            decayed = g * _shrink(g.norm(), local.max_norm) + local.weight_decay * at[i]
            buffers[i] = local.momentum * buffers[i] + decayed
        at = [t - lr * buffer for t, buffer in zip(at, buffers, strict=True)]
    return at


def _loss(ctx: ClientContext, net: HyperNet, x: Tensor, y: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """The mean loss of a batch as a function of theta (P,) and of the classifier."""
    module = ctx.model.module

    def loss(theta: Tensor, h: Tensor) -> Tensor:
        buffers = {name: b.clone() for name, b in module.named_buffers()}
        weights = {**buffers, **net.generated.views(theta), **net.own.views(h)}
        was = module.training
        module.train()
        try:
            return ctx.model.loss(functional_call(module, weights, (x,)), y)
        finally:
            module.train(was)

    return loss


def _refuse_tied(module: nn.Module, net: HyperNet) -> None:
    """Raise ValueError for a tensor of the classifier that is, by another name, one of those generated."""
    private = {s.name.rpartition(".")[0] for s in net.own}
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for first, *others in names.values():
        inside = first.rpartition(".")[0] in private
        other = next((name for name in others if (name.rpartition(".")[0] in private) != inside), None)
        if other is not None:
            raise ValueError(
                f"private must share no tensor with the rest of the model; {other!r} and {first!r} are one"
            )
