"""Attaching a gradient exchange to DistributedDataParallel and the optimizer of an ordinary training loop.

`Attachment` registers itself as the model's communication hook. DDP hands over one bucket at a time; the
attachment holds them until the last one has come, then exchanges one message for the whole step. State is
keyed by parameter name, so DDP may rebuild its buckets as it likes.

Any party that cannot go on (a gradient is not finite, or did not come) tells the others within the exchange,
so that all of them raise the same error naming that party, instead of waiting for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from cograd.core.ledger import Ledger
from cograd.core.message import Frame, Payload, SchemaError, session_id
from cograd.core.space import ParamSpace, trainable
from cograd.engines.exchange import Exchange, GradientError, norm_of, not_finite, weight_decay
from cograd.engines.transport import TorchDist

if TYPE_CHECKING:
    from torch._C._distributed_c10d import GradBucket


class Attachment:
    """An exchange at work on a DDP model.

    Works with ``no_sync`` accumulation, autocast with a GradScaler (pass it as ``scaler``: gradients are
    unscaled before anything else, and a step that overflows anywhere is skipped everywhere without touching
    state), bfloat16 parameters (state is float32), ``find_unused_parameters`` (a parameter that no party used
    still gets what is due to it) and weight decay of the optimizer (which gets the momentum it has in
    `torch.optim.SGD`). BatchNorm statistics are DDP's business, as ever.

    ``ledger`` counts every party's messages. A dense step counts the gradient once as payload and the ring
    all-reduce's 2 (N-1)/N of it as frame.

    Raises TypeError for FSDP, DTensor parameters or a model that is not DDP; ValueError for an optimizer with
    momentum or adaptive state of its own or whose parameters are not the model's; SchemaError if the parties'
    models or settings differ. `GradientError` comes out of ``backward()`` or ``optimizer.step()``.
    """

    def __init__(
        self,
        exchange: Exchange,
        ddp: DistributedDataParallel,
        optimizer: torch.optim.Optimizer,
        *,
        scaler: GradScaler | None = None,
        ledger: Ledger | None = None,
    ) -> None:
        _check_model(ddp)
        _check_optimizer(optimizer, ddp)
        self.exchange, self.scaler, self.ledger = exchange, scaler, ledger if ledger is not None else Ledger()
        self.transport = TorchDist(ddp.process_group)
        self.parameters = trainable(ddp.module)
        self._names = {id(p): name for name, p in self.parameters.items()}
        space = ParamSpace.of(ddp.module)
        device = next(iter(self.parameters.values())).device
        dtypes = {p.dtype for p in self.parameters.values()}
        state = torch.float64 if dtypes == {torch.float64} else torch.float32
        exchange.bind(space, self.transport.members, self.transport.rank, device, state)
        self.session = self._agree()
        self._optimizer = optimizer
        self._decay = exchange.space.zeros(device, state) if any(_decays(optimizer)) else None
        self._buckets: list[tuple[GradBucket, torch.futures.Future[Tensor]]] = []
        self._fills_unused = bool(ddp.find_unused_parameters)
        self._exchanged = False
        ddp.register_comm_hook(self, _hook)
        optimizer.register_step_pre_hook(self._before_step)

    def _agree(self) -> bytes:
        """Compare schemas with the other parties; the session's id follows from what was agreed."""
        schema = self.exchange.schema
        mine = schema.to_bytes()
        for rank, theirs in enumerate(self.transport.all_gather_bytes(mine)):
            if bytes(theirs) != mine:
                raise SchemaError(
                    f"rank {rank} has another model or other settings than rank {self.transport.rank}: "
                    f"{_difference(mine, bytes(theirs))}"
                )
            self.ledger.send(rank, 0, 0, schema=len(mine), copies=self.transport.members - 1)
        return session_id(schema.digest, self.transport.members)

    # One step: DDP's buckets come in, the exchange happens with the last one, the optimizer follows.

    def take(self, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        future: torch.futures.Future[Tensor] = torch.futures.Future()
        self._buckets.append((bucket, future))
        if bucket.is_last():
            buckets, self._buckets = self._buckets, []
            self._exchange(buckets)
        return future

    def _exchange(self, buckets: list[tuple[GradBucket, torch.futures.Future[Tensor]]]) -> None:
        arrived: dict[str, Tensor] = {}
        for bucket, _ in buckets:
            for parameter, gradient in zip(bucket.parameters(), bucket.gradients(), strict=True):
                arrived[self._names[id(parameter)]] = gradient
        gradients = {name: arrived[name] for name in self.parameters}
        loss_scale = self.scaler.get_scale() if self.scaler is not None else 1.0
        update = self._update(gradients, loss_scale)
        if update is None:
            for gradient in gradients.values():
                gradient.fill_(torch.inf)  # what the scaler looks for: it skips the step
        else:
            self._add_decay(update)
            self._last = self.exchange.space.views(update)
            for name, gradient in gradients.items():
                torch.mul(self._last[name], loss_scale, out=gradient)
        for bucket, future in buckets:
            future.set_result(bucket.buffer())
        self._exchanged = True

    def _update(self, gradients: dict[str, Tensor], loss_scale: float) -> Tensor | None:
        """Local gradients -> the update; None where some party's gradients overflowed under the scaler."""
        exchange, members = self.exchange, self.transport.members
        share = 1 / (members * loss_scale)
        norm = norm_of(exchange.space, gradients) * share
        bad = None if math.isfinite(norm) else not_finite(gradients)
        if bad is not None and self.scaler is None:
            self._refuse(f"the gradient of {bad!r} holds NaN or infinity")
        if self.scaler is not None:
            votes = self._gather(b"\1" if bad is not None else b"\0", counted=False)
            if any(bytes(vote) == b"\1" for vote in votes):
                return None
        scale = share * exchange.scale(norm)
        dense = exchange.dense
        if dense and self.scaler is None:
            self._gather(b"", counted=False)  # nobody may be alone in the all-reduce
        for name, gradient in gradients.items():
            exchange.feed(name, gradient, scale)
        if not dense:
            return exchange.decode(self._gather(exchange.encode()))
        total = exchange.collect()
        size = total.numel() * total.element_size()
        self.ledger.all_reduce(exchange.round, size, members)
        self.transport.all_reduce(total)
        return exchange.reduced(total)

    def _gather(self, payload: Payload, counted: bool = True) -> list[Payload]:
        """Everyone's payloads of this round; raises GradientError if some party sent a refusal instead."""
        frame = Frame(self.session, self.exchange.round, self.transport.rank, payload)
        frames = self._read(self.transport.all_gather_bytes(frame.pack()))
        if counted:
            for f in frames:
                size = len(f.payload)
                self.ledger.send(
                    f.sender, f.round, size, frame=size + Frame.OVERHEAD, copies=self.transport.members - 1
                )
        return [f.payload for f in frames]

    def _read(self, packed: list[Payload]) -> list[Frame]:
        frames = [Frame.unpack(data, self.session, self.exchange.round) for data in packed]
        for frame in frames:
            if frame.error:
                raise GradientError(f"rank {frame.sender}: {bytes(frame.payload).decode()}")
        return frames

    def _refuse(self, why: str) -> None:
        """Tell every party that this one cannot take part in the step. All of them raise GradientError."""
        message = f"step {self.exchange.round}: {why}"
        frame = Frame(self.session, self.exchange.round, self.transport.rank, message.encode(), error=True)
        self._read(self.transport.all_gather_bytes(frame.pack()))

    def _add_decay(self, update: Tensor) -> None:
        if self._decay is not None:
            weight_decay(self.exchange, update, self._decay, self._optimizer, self._names)

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if not self._exchanged:
            arrived = {self._names[id(p)] for bucket, _ in self._buckets for p in bucket.parameters()}
            missing = [name for name in self.parameters if name not in arrived]
            self._buckets = []
            self._refuse(
                f"no gradient came for {_some(missing)} before optimizer.step(); if the model does not use "
                "every parameter on every rank, pass find_unused_parameters=True to DDP"
            )
        self._exchanged = False
        if self._fills_unused:
            # DDP leaves .grad alone where no rank used a parameter, but earlier gradients may be due to it.
            for name, parameter in self.parameters.items():
                due = self._last[name]
                if (parameter.grad is None or not parameter.grad.any()) and due.any():
                    parameter.grad = due.to(parameter.dtype, copy=True)

    # What must be in a checkpoint, one a rank.

    def state_dict(self) -> dict[str, Any]:
        """The exchange's state, and the decay's velocity by parameter where there is one."""
        decay = None
        if self._decay is not None:
            decay = {n: v.clone() for n, v in self.exchange.space.views(self._decay).items()}
        return {**self.exchange.state_dict(), "decay": decay}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`, bit for bit. Raises ValueError where it does not fit this run."""
        if (state["decay"] is None) != (self._decay is None):
            raise ValueError(
                "the state was saved with another weight_decay setting (zero or not) than this run's"
            )
        self.exchange.load_state_dict(state)
        if self._decay is not None:
            self.exchange.space.flatten(state["decay"], out=self._decay)


def _hook(attachment, bucket):  # type: ignore[no-untyped-def]  # DDP refuses annotations given as strings
    return attachment.take(bucket)


def _check_model(model: nn.Module) -> None:
    kinds = {type(m).__name__ for m in model.modules()}
    if kinds & {"FullyShardedDataParallel"} or any(k.startswith("FSDP") for k in kinds):
        raise TypeError(
            "FSDP is not supported: its gradients are reduce-scattered, and no rank sees a whole one; use DDP"
        )
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            raise TypeError(
                f"DTensor is not supported: parameter {name!r} is sharded or replicated by one; use DDP"
            )
    if not isinstance(model, DistributedDataParallel):
        raise TypeError(f"the model must be wrapped in DistributedDataParallel; got {type(model).__name__}")
    for name, module in model.module.named_modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse:
            raise GradientError(
                f"module {name!r} makes sparse gradients, which are not supported: pass sparse=False"
            )


def _check_optimizer(optimizer: torch.optim.Optimizer, ddp: DistributedDataParallel) -> None:
    for group in optimizer.param_groups:
        own = [key for key in ("momentum", "betas", "alpha", "rho", "lr_decay") if group.get(key)]
        if own:
            raise ValueError(
                f"the optimizer must be plain SGD, the exchange brings the momentum; "
                f"{type(optimizer).__name__} has {own[0]}={group[own[0]]}"
            )
        if group.get("maximize"):
            raise ValueError("an optimizer with maximize=True is not supported; negate the loss")
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    left_out = [name for name, p in trainable(ddp.module).items() if id(p) not in known]
    if left_out:
        raise ValueError(f"the optimizer does not hold every trainable parameter: {_some(left_out)} missing")


def _decays(optimizer: torch.optim.Optimizer) -> list[bool]:
    return [bool(group.get("weight_decay")) for group in optimizer.param_groups]


def _some(names: list[str]) -> str:
    shown = ", ".join(map(repr, names[:5]))
    return f"{shown} and {len(names) - 5} more" if len(names) > 5 else shown


def _difference(mine: bytes, theirs: bytes) -> str:
    at = next(
        (i for i, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b), min(len(mine), len(theirs))
    )
    around: Callable[[bytes], str] = lambda text: repr(text[max(0, at - 40) : at + 40].decode(errors="replace"))  # noqa: E731
    return f"{around(mine)} here, {around(theirs)} there"
