"""Streaming DiLoCo (arXiv:2501.18512): replicas train alone and share a fragment of their weights at a time.

M replicas train the same model on their own data with their own inner optimizer. All of them hold the same
outer parameters g. Each fragment p of the model is exchanged every H steps, in its turn (Algorithm 2):

- *send* (step t): every replica sends the outer gradient g_p - theta_p, in four bits an entry, and goes on
  training (Sec. 2.4: E3M0, added up in float32);
- *receive* (step t + tau): everyone adds up everyone's, in rank order, Delta_p = (1/M) sum; an outer optimizer
  (SGD with Nesterov momentum) takes g_p a step along Delta_p, the same on all replicas (Eq. 1-2);
- *mix*: theta_p <- alpha theta_p + (1 - alpha) g_p, since theta_p has moved on meanwhile (Eq. 3).

Against one all-reduce of everything every H steps (DiLoCo, arXiv:2311.08105) the peak falls to the largest
fragment, an exchange may take tau steps without anyone waiting, and 4/H bits a parameter and step are sent.
What to evaluate and to keep is g (`outer_weights`); the replicas' weights are worse.

    with StreamingDiLoCo(model, inner, fragments=transformer(model.blocks), sync_every=100) as diloco:
        for batch in loader:
            loss(model, batch).backward(); inner.step(); inner.zero_grad()
        with diloco.outer_weights():
            evaluate(model)

Special cases: one fragment, tau = 0, alpha = 0 and no quantisation is DiLoCo; with plain SGD of rate 1 as
outer optimizer that is local averaging (FedAvg); with H = 1 and SGD as inner optimizer too it is data-parallel
SGD; one replica alone is Lookahead. alpha = 1 lets no exchange reach theta.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from cograd.core.codecs import Context, FixedLength, Float32, Float64, reduce, tensor_of
from cograd.core.ledger import Ledger
from cograd.core.message import Field, Frame, Payload, Schema, SchemaError, session_id
from cograd.core.space import trainable
from cograd.engines.exchange import GradientError
from cograd.engines.overlap import Overlapping, Pending, overlapping
from cograd.engines.transport import TorchDist
from cograd.machines.streaming_diloco import schedule as schedules
from cograd.machines.streaming_diloco.e3m0 import E3M0
from cograd.machines.streaming_diloco.fragments import Fragments, Rule, partition
from cograd.machines.streaming_diloco.outer import PAPER_OUTER, Outer, OuterFragment

_CHECKSUM = 8  # bytes of g's checksum before each payload
_SAME_CODEC = (
    " (the default is exact for a replica alone and E3M0() for several: to go on from one to several, or the "
    "reverse, give codec=Float32() throughout)"
)


class ReplicasApart(RuntimeError):
    """The outer parameters of two replicas differ, which they never may: g itself is never sent."""


@dataclass
class _Exchange:
    """A fragment on its way. ``number`` counts all exchanges of the run."""

    number: int
    fragment: int
    step: int
    pending: Pending | None
    payloads: list[Payload] | None = None


class StreamingDiLoCo:
    """Streaming DiLoCo around an ordinary training loop: a context manager that follows ``inner.step()``.

    Args:
        model: this replica's model. All replicas start from the same weights.
        inner: its optimizer, any. Its state stays with the replica and is never averaged or reset.
        fragments: names of parameters by fragment, or a rule such as ``transformer(model.blocks)``.
        sync_every: H, the steps between two exchanges of a fragment.
        outer: makes a fragment's outer optimizer from its outer parameters; see `nesterov`.
        overlap: tau, the steps from sending to receiving, below H. It may differ between replicas.
        alpha: share of the replica's own weights in the mix, in [0, 1].
        codec: how outer gradients are written, of fixed length. The default is E3M0, and for a replica alone,
            which has nobody to send to, float32.
        schedule: ``paper``, ``round_robin`` or ``torchft``; see `schedule`.
        freeze_others: train only the fragment that is exchanged next (as FedPart does; the paper's ablation).
        flush: exchange every fragment once more when the block ends. Otherwise g stays as old as it is.
        transport: who the replicas are: torch.distributed's default group if there is one, otherwise a replica
            alone; ``InProcess.group(M)`` for M replicas in this process.
        ledger: counts what this replica sends; a new one if not given.
        seed: of stochastic rounding.

    Every message carries a checksum of the g it was measured from, so replicas that have drifted apart are
    found at the next exchange. State: g and the outer optimizer's (with Nesterov 8 bytes a parameter in all),
    and the fragments in flight. On torch.distributed exchanges are gathered in host memory; on NCCL they go
    through the current device.

    A step that the inner optimizer skips (GradScaler) is not counted; replicas must take as many.

    Raises ValueError for an argument out of range, a parameter in no fragment or in two, and a codec that
    quantises for nobody; TypeError for DTensor parameters (FSDP); SchemaError on entering the block where
    replicas differ in model, settings, step or initial weights. GradientError out of ``inner.step()``, on all
    replicas, if some replica's outer gradient is not finite; g and theta are as before.
    """

    def __init__(
        self,
        model: nn.Module,
        inner: torch.optim.Optimizer,
        *,
        fragments: Fragments | Rule,
        sync_every: int = 100,
        outer: Outer = PAPER_OUTER,
        overlap: int = 1,
        alpha: float = 0.5,
        codec: FixedLength | None = None,
        schedule: schedules.Name = "paper",
        freeze_others: bool = False,
        flush: bool = False,
        transport: Overlapping | TorchDist | None = None,
        ledger: Ledger | None = None,
        seed: int = 0,
    ) -> None:
        _check_model(model)
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha must be in [0, 1]; got {alpha}")
        self.model, self.inner = model, inner
        self.parameters = trainable(model)
        parts = partition(model, fragments)
        self.schedule = schedules.schedule(schedule, sync_every, len(parts), overlap)
        self.transport = overlapping(transport)
        self.codec = _codec(codec, self.transport.members, {p.dtype for p in self.parameters.values()})
        self.fragments = [
            OuterFragment(name, {n: self.parameters[n] for n in names}, outer) for name, names in parts.items()
        ]
        self.sync_every, self.overlap, self.alpha = sync_every, overlap, alpha
        self.freeze_others, self.flush_at_end, self.seed = freeze_others, flush, seed
        self.ledger = ledger if ledger is not None else Ledger()
        self.step, self.exchanges = 0, 0
        self._in_flight: deque[_Exchange] = deque()
        self._session = session_id(self.schema.digest, self.transport.members)
        self._hooks: list[Any] = []
        self._swapped = False

    @property
    def schema(self) -> Schema:
        """What all replicas agree on. The overlap is not part of it."""
        fields = [Field(s.name, s.shape) for fragment in self.fragments for s in fragment.space]
        return Schema(tuple(fields), codec=json.dumps(self._settings))

    @property
    def _settings(self) -> dict[str, Any]:
        return {
            "parameters": [[s.name, list(s.shape)] for f in self.fragments for s in f.space],
            "fragments": [[f.name, len(f.space)] for f in self.fragments],
            "schedule": [list(self.schedule.first), self.schedule.period],
            "codec": repr(self.codec),
            "outer": [[type(f.optimizer).__name__, repr(f.optimizer.defaults)] for f in self.fragments],
            "alpha": self.alpha,
            "freeze_others": self.freeze_others,
            "flush": self.flush_at_end,
            "seed": self.seed,
        }

    def _agree(self) -> None:
        """Compare with the other replicas: parameters, settings, the step, and at the start the weights."""
        weights = [f.checksum() for f in self.fragments] if self.step == 0 else None
        mine = {**self._settings, "step": self.step, "initial weights": weights}
        message = json.dumps({"rank": self.transport.rank, **mine}).encode()
        for other in self.transport.all_gather_bytes(message):
            theirs = json.loads(bytes(other))
            differs = _differs(theirs, mine)
            if differs is not None:
                key, there, here = differs
                raise SchemaError(
                    f"replica {theirs['rank']} has other {key} than replica {self.transport.rank}: "
                    f"{there} there, {here} here"
                )
        if self.transport.members > 1:
            copies = self.transport.members - 1
            self.ledger.send(self.transport.rank, 0, 0, schema=len(message), copies=copies)

    # The training loop's side.

    def __enter__(self) -> StreamingDiLoCo:
        if self._hooks:
            raise RuntimeError("this StreamingDiLoCo is at work already")
        self._agree()
        self._hooks = [
            self.inner.register_step_pre_hook(self._before_step),
            self.inner.register_step_post_hook(self._after_step),
        ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if kind is not None:
            return
        if self.flush_at_end:
            self.flush()
        for exchange in self._in_flight:
            if exchange.pending is not None:
                exchange.pending.wait()  # it stays in flight, and the process group may end

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if self._swapped:
            raise RuntimeError("the model holds its outer weights: leave outer_weights() before inner.step()")
        if self.freeze_others:
            chosen = self.schedule.coming(self.step + 1)
            for p, fragment in enumerate(self.fragments):
                for parameter in fragment.inner.values() if p != chosen else ():
                    parameter.grad = None  # optimizers leave alone what has no gradient

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self.step += 1
        self.transport.in_step(self._send_due, self._receive_due)

    def flush(self) -> None:
        """Receive what is in flight, and exchange every fragment as it is now. All replicas must call it, at
        the same step; replicas in one process do it when the last has called."""
        self.transport.in_step(self._send_all, self._receive_all)

    @contextmanager
    def outer_weights(self) -> Iterator[nn.Module]:
        """The model with its outer parameters in place of the replica's, to evaluate or to save."""
        if self._swapped:
            raise RuntimeError("the model holds its outer weights already")
        kept = {name: p.detach().clone() for name, p in self.parameters.items()}
        self._swapped = True
        try:
            for fragment in self.fragments:
                fragment.mix(0)
            yield self.model
        finally:
            with torch.no_grad():
                for name, value in kept.items():
                    self.parameters[name].copy_(value)
            self._swapped = False

    def outer_model(self) -> nn.Module:
        """A copy of the model at the outer parameters."""
        with self.outer_weights():
            return copy.deepcopy(self.model)

    # One exchange.

    def _send_due(self) -> None:
        p = self.schedule.due(self.step)
        if p is not None:
            self._send(p)

    def _send_all(self) -> None:
        self._receive_all()
        for p in range(len(self.fragments)):
            self._send(p)

    def _receive_due(self) -> None:
        while self._in_flight and self._in_flight[0].step + self.overlap <= self.step:
            self._receive(self._in_flight.popleft())

    def _receive_all(self) -> None:
        while self._in_flight:
            self._receive(self._in_flight.popleft())

    def _send(self, p: int) -> None:
        fragment, number = self.fragments[p], self.exchanges
        length = self.codec.nbytes(fragment.space.layout)
        message, failed = self._message(fragment, length)
        frame = Frame(self._session, number, self.transport.rank, message, error=failed)
        pending = self.transport.start(frame.pack())
        self._in_flight.append(_Exchange(number, p, self.step, pending))
        self.exchanges += 1
        if self.transport.members > 1:
            copies, size = self.transport.members - 1, len(message) + Frame.OVERHEAD
            self.ledger.send(self.transport.rank, self.step, length, frame=size, copies=copies)

    def _message(self, fragment: OuterFragment, length: int) -> tuple[bytes, bool]:
        """Checksum and payload; where the outer gradient cannot be written, the reason in as many bytes."""
        difference = fragment.difference()
        context = Context(self.seed, self.exchanges, self.transport.rank)
        try:
            if not bool(torch.isfinite(difference).all()):
                raise ValueError("it holds NaN or infinity")
            payload = self.codec.encode(difference, fragment.space.layout, context).payload
        except ValueError as error:
            return str(error).encode().ljust(_CHECKSUM + length)[: _CHECKSUM + length], True
        return fragment.checksum().to_bytes(_CHECKSUM, "little", signed=True) + payload, False

    def _receive(self, exchange: _Exchange) -> None:
        fragment = self.fragments[exchange.fragment]
        payloads = self._read(exchange)
        contexts = [Context(self.seed, exchange.number, rank) for rank in range(len(payloads))]
        total = torch.empty_like(fragment.vector)
        reduce(self.codec, payloads, fragment.space.layout, contexts, out=total)
        fragment.update(total.div_(len(payloads)))
        fragment.mix(self.alpha)

    def _read(self, exchange: _Exchange) -> list[Payload]:
        """Everyone's payloads in rank order, checked. What was read can be read again."""
        if exchange.payloads is not None:
            return exchange.payloads
        assert exchange.pending is not None
        frames = [Frame.unpack(data, self._session, exchange.number) for data in exchange.pending.wait()]
        where = f"step {exchange.step}, fragment {self.fragments[exchange.fragment].name!r}"
        for frame in frames:
            if frame.error:
                why = bytes(frame.payload).decode(errors="replace").rstrip()
                raise GradientError(f"replica {frame.sender}: {where}: no outer gradient to send: {why}")
        sums = [bytes(frame.payload[:_CHECKSUM]) for frame in frames]
        apart = next((frame.sender for frame, s in zip(frames, sums, strict=True) if s != sums[0]), None)
        if apart is not None:
            raise ReplicasApart(f"{where}: the outer parameters of replica {apart} are not those of replica 0")
        exchange.payloads = [frame.payload[_CHECKSUM:] for frame in frames]
        return exchange.payloads

    # What it cost, and what must be in a checkpoint.

    @property
    def bits_per_parameter(self) -> float:
        """Bits that this replica has sent so far, to one other, for each parameter of the model."""
        numel = sum(fragment.space.numel for fragment in self.fragments)
        return 8 * self.ledger.sent(self.transport.rank) / numel

    @property
    def peak_bytes(self) -> int:
        """The largest message that this replica has sent."""
        return max((e.payload for e in self.ledger if e.sender == self.transport.rank), default=0)

    def fingerprint(self) -> str:
        """Hash of g: equal on all replicas that have received the same exchanges."""
        digest = hashlib.blake2b(digest_size=16)
        for fragment in self.fragments:
            digest.update(fragment.vector.cpu().numpy().data)
        return digest.hexdigest()

    def state_dict(self) -> dict[str, Any]:
        """Outer parameters, outer optimizers, the step, and what is in flight, which is waited for.

        It is taken at the same step on all replicas. The replica's own weights and inner optimizer are the
        user's to save beside it.
        """
        in_flight = [
            {
                "number": exchange.number,
                "fragment": exchange.fragment,
                "step": exchange.step,
                "payloads": [tensor_of(p, torch.uint8).clone() for p in self._read(exchange)],
            }
            for exchange in self._in_flight
        ]
        return {
            "settings": self._settings,
            "step": self.step,
            "exchanges": self.exchanges,
            "fragments": [fragment.state_dict() for fragment in self.fragments],
            "in_flight": in_flight,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`, bit for bit, once weights and inner optimizer are loaded too.

        Make the StreamingDiLoCo first and load the replica's weights after: it starts from g = theta.

        Another number of replicas: what is in the state is common to all of them, so any old replica's serves
        any new one; what was in flight is the mean over those who sent it. A replica that is new takes weights
        and inner optimizer of an old one. The codec is one of the settings: a run that is to go on with one
        replica instead of several, or the reverse, has ``codec=Float32()`` on both sides, since the default
        quantises for several only. Raises ValueError, naming what differs, for a state of another model or
        other settings.
        """
        differs = _differs(state["settings"], self._settings)
        if differs is not None:
            key, there, here = differs
            raise ValueError(
                f"the state must be of this run's {key}, {here}; it is of {there}"
                f"{_SAME_CODEC if key == 'codec' else ''}"
            )
        for fragment, saved in zip(self.fragments, state["fragments"], strict=True):
            fragment.load_state_dict(saved)
        self.step, self.exchanges = int(state["step"]), int(state["exchanges"])
        self._in_flight = deque(
            _Exchange(
                e["number"], e["fragment"], e["step"], None, [p.cpu().numpy().data for p in e["payloads"]]
            )
            for e in state["in_flight"]
        )


def _codec(codec: FixedLength | None, members: int, dtypes: set[torch.dtype]) -> FixedLength:
    exact: FixedLength = Float64() if dtypes == {torch.float64} else Float32()
    if codec is None:
        return E3M0() if members > 1 else exact
    if not isinstance(codec, FixedLength):
        raise ValueError(f"codec must be one of fixed length (with nbytes); got {codec!r}")
    if members == 1 and codec not in (Float32(), Float64()):
        raise ValueError(f"codec must be Float32() for a replica alone, which sends nothing; got {codec!r}")
    return codec


def _check_model(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            raise TypeError(f"DTensor (FSDP) is not supported: parameter {name!r} is one")
    for name, module in model.named_modules():
        if getattr(module, "running_mean", None) is not None:
            raise ValueError(
                f"model must have no running statistics, which no exchange covers; {name!r} is a "
                f"{type(module).__name__} that has: use LayerNorm, GroupNorm or track_running_stats=False"
            )


def _differs(theirs: Mapping[str, Any], mine: Mapping[str, Any]) -> tuple[str, str, str] | None:
    """The first key whose values differ, and both values in short: of two lists, where they first differ."""
    for key, here in mine.items():
        there = theirs[key]
        if there == here:
            continue
        if isinstance(there, list) and isinstance(here, list):
            there, here = next((a, b) for a, b in zip_longest(there, here) if a != b)
        return key, _short(there), _short(here)
    return None


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 200 else f"{text[:200]} ..."
