"""Just One Byte (arXiv:2306.10015): machines share one byte an estimate and draw its direction themselves.

Each machine holds the same weights theta and its own data. In round t machine m takes S minibatches; for sample
s it draws z(t, m, s) ~ N(0, I) from the shared seed, measures two losses and keeps one number,

    p(m, s) = (loss(theta + eps z) - loss(theta - eps z)) / (2 eps),

whose byte code is all that it sends. Everyone draws everyone's z again and applies

    theta <- theta - (lr / n) decode(c(m, s)) z(t, m, s)        for m by join order, then s,

n being the number of estimates collected (its root with ``average="sqrt"``). The sender applies the decoded
value too, and the canonical order fixes every rounding, so that replicas stay the same bits. Traffic is S bytes
a machine and round whatever the model's size; there is no backward pass. What a round costs instead is 2 S
forward passes and S d + M S d normal draws on each machine (d trainable elements, M machines). Replicas are
compared before every 64th round, which takes 16 bytes a machine beside the steps' payload.

    zo = OneByte(model, lr=1e-3, samples=8, transport=TorchDist())
    for batches in loader:                                     # S minibatches a step
        info = zo.step(lambda b: loss_fn(model(b.x), b.y), batches)

Machines of a fixed group meet in a `Transport`; `LocalPeers` plays them all in one process;
`cograd.machines.one_byte.group.Group` is for machines that join and leave.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from statistics import fmean
from typing import Any, ClassVar, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

import cograd
from cograd.core.codecs import Context, FixedLength, tensor_of
from cograd.core.ledger import Ledger
from cograd.core.message import Frame, Payload, SchemaError, session_id
from cograd.core.space import ParamSpace, trainable
from cograd.core.streams import GENERATOR
from cograd.engines.transport import Alone, Transport
from cograd.machines.one_byte.codes import LogByte
from cograd.machines.one_byte.log import Log
from cograd.machines.one_byte.noise import (
    Direction,
    Tensors,
    Workspace,
    apply_estimates,
    probe,
    spsa_estimate,
)

Closure: TypeAlias = Callable[[Any], Tensor]


class Diverged(RuntimeError):
    """Replicas are no longer the same bits. ``ranks`` are those whose weights are not those of most."""

    def __init__(self, round: int, ranks: Sequence[int], others: Sequence[int]) -> None:
        super().__init__(
            f"after {round} rounds the weights of {_ranks(ranks)} are not those of {_ranks(others)}: let one "
            "side take over the other's weights(), log and log_eps by load_weights, or go back to a checkpoint"
        )
        self.ranks = tuple(ranks)


@dataclass(frozen=True)
class Own:
    """What one machine contributes to a round: the payload it sends, the mean loss of each of its samples, and
    which samples were flagged: a loss was not finite, or the codec cannot write the estimate."""

    payload: Payload
    losses: tuple[float, ...]
    flagged: tuple[int, ...] = ()


@dataclass(frozen=True)
class Info:
    """What a round did. ``loss`` is the mean over this machine's samples (NaN if it contributed none),
    ``bytes_sent`` its payload, ``estimates`` the number collected from all ``members``."""

    round: int
    loss: float
    bytes_sent: int
    estimates: int
    members: tuple[int, ...]
    flagged: tuple[int, ...] = ()


class OneByte:
    """Zeroth-order optimizer whose machines exchange one byte an estimate.

    Args:
        model: its parameters that ask for a gradient are trained, though no gradient is ever made. Freeze the
            rest with ``requires_grad_(False)`` (LoRA, last block, low-bit base weights).
        lr: eta. With ``average="mean"`` the largest usable one goes as n / d.
        eps: size of the perturbation.
        samples: S, estimates a machine and round.
        average: "mean" divides lr by n, "sqrt" by its root, so that more machines make larger steps.
        codec: how the S projected gradients are written; `LogByte` is the method. Any fixed-length codec will
            do: ``Float32()`` is what uncompressed sharing sends.
        seed: of the directions.
        gamma: scale of the learned perturbation size: the two evaluations use e^(+-gamma xi) eps, xi ~ N(0, 1)
            of the direction, and log eps moves by -(lr / n) p gamma xi. 0 is off.
        variance_scaling: a tensor's share of z is multiplied by its standard deviation over the root mean
            square of all of them. A tensor whose entries are all the same then never moves.
        include: narrows what is trained, by name and parameter.
        transport: the group of machines; a group of one if not given. Machines compare models and settings.
        check_every: rounds from one comparison of the replicas to the next; 0 is never. It costs a digest of
            the trainable weights, and 16 bytes a machine, which the ledger has in a frame without payload.
        ledger: counts messages, forward passes and draws.

    ``step`` leaves the model's parameters where they are in memory. Memory beyond the model: 8 bytes a
    trainable element (a perturbed copy and a direction, so that each own z is drawn once and theta is never
    written before the update), and the log, one byte an estimate.

    Raises ValueError for an argument out of range or a model with nothing to train, TypeError for trainable
    parameters in half precision, SchemaError where another machine's model or settings differ.
    """

    replayable: ClassVar[bool] = True

    def __init__(
        self,
        model: nn.Module,
        lr: float,
        *,
        eps: float = 1e-3,
        samples: int = 8,
        average: str = "mean",
        codec: FixedLength = LogByte(),
        seed: int = 0,
        gamma: float = 0.0,
        variance_scaling: bool = False,
        include: Callable[[str, nn.Parameter], bool] | None = None,
        transport: Transport | None = None,
        check_every: int = 64,
        ledger: Ledger | None = None,
    ) -> None:
        for name, value in (("lr", lr), ("eps", eps)):
            if not 0 < value < math.inf:
                raise ValueError(f"{name} must be a positive number; got {value}")
        if samples < 1:
            raise ValueError(f"samples must be >= 1; got {samples}")
        if average not in ("mean", "sqrt"):
            raise ValueError(f"average must be 'mean' or 'sqrt'; got {average!r}")
        if not 0 <= gamma < math.inf:
            raise ValueError(f"gamma must be >= 0; got {gamma}")
        if check_every < 0:
            raise ValueError(f"check_every must be >= 0 rounds, 0 for never; got {check_every}")
        if not isinstance(codec, FixedLength):
            raise ValueError(f"codec must be one of fixed length; got {codec!r}")
        self.model, self.lr, self.eps, self.samples, self.average = model, lr, eps, samples, average
        self.codec, self.seed, self.gamma, self.variance_scaling = codec, seed, gamma, variance_scaling
        self.check_every = check_every
        self.space = ParamSpace.of(model, include)
        self._params = {s.name: trainable(model)[s.name] for s in self.space}
        for name, p in self._params.items():
            if p.dtype not in (torch.float32, torch.float64):
                raise TypeError(
                    f"trainable parameters must be float32 or float64, in which a step of lr p z is not lost; "
                    f"{name!r} is {p.dtype}: keep it in float32 and only frozen weights in half precision"
                )
        self.transport = transport if transport is not None else Alone()
        self.ledger = ledger if ledger is not None else Ledger()
        self.round, self.log_eps = 0, math.log(eps)
        self._work = Workspace(self._theta())
        self.log = Log({**self._settings(), "checkpoint": self.fingerprint()}, self.width)
        self._session = self._agree()

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(lr={self.lr}, eps={self.eps}, samples={self.samples}, "
            f"average={self.average!r}, codec={self.codec!r}, seed={self.seed}, gamma={self.gamma}, "
            f"variance_scaling={self.variance_scaling}; {self.space.numel:,} trainable elements)"
        )

    @property
    def width(self) -> int:
        """Payload bytes of one machine and round."""
        return self.codec.nbytes((self.samples,))

    # A round, in its order.

    def step(self, closure: Closure, batches: Sequence[Any]) -> Info:
        """One round of the group: ``closure(batch)`` is the loss of one of the S minibatches.

        Every machine calls it. The model is in eval mode meanwhile, and the closure runs under
        ``torch.inference_mode``; it must return a float32 or float64 scalar, the same for the same batch. A
        loss that is not finite makes its estimate zero for everyone. Every ``check_every`` rounds it compares
        the replicas first.

        Raises ValueError for another number of batches than ``samples``, TypeError for a loss in half
        precision, `Diverged` on every machine, before anything is measured, if the replicas differ.
        """
        if self.check_due and self.transport.members > 1:
            self.compare()
        me = self.transport.rank
        own = self.estimate(closure, batches, me)
        payloads = self._gather(own.payload)
        members = tuple(range(self.transport.members))
        self.apply(members, payloads)
        return self.info(own, members)

    def estimate(self, closure: Closure, batches: Sequence[Any], machine: int) -> Own:
        """Measure the S projected gradients of a machine and code them; the parameters stay as they are."""
        projections, losses = self._measure(closure, batches, machine)
        payload, finite = self._encode(torch.from_numpy(projections), machine)
        return Own(payload, tuple(losses), tuple((~finite).nonzero().flatten().tolist()))

    def apply(self, members: Sequence[int], payloads: Sequence[Payload]) -> None:
        """Apply everyone's codes, members in canonical order (by join), and write them to the log.

        Raises ValueError, with nothing changed, for payloads of another length or a member that comes twice.
        """
        self._check_payloads(members, payloads)
        self._move(members, payloads)
        if self.replayable:
            self.log.append(tuple(members), b"".join(payloads))
        self.round += 1

    def info(self, own: Own | None, members: Sequence[int]) -> Info:
        """Of the round that was applied last; ``own`` None if this machine did not contribute."""
        return Info(
            round=self.round - 1,
            loss=fmean(own.losses) if own else math.nan,
            bytes_sent=len(own.payload) if own else 0,
            estimates=self.samples * len(members),
            members=tuple(members),
            flagged=own.flagged if own else (),
        )

    def _measure(
        self, closure: Closure, batches: Sequence[Any], machine: int
    ) -> tuple[np.ndarray[Any, Any], list[float]]:
        if len(batches) != self.samples:
            raise ValueError(f"batches must hold one minibatch a sample, {self.samples}; got {len(batches)}")
        factors, eps = self._factors(), math.exp(self.log_eps)
        found = []
        with self._measuring():
            for direction, batch in zip(self._directions(machine), batches, strict=True):
                found.append(
                    spsa_estimate(
                        partial(self._loss, closure, batch),
                        self._theta_before,
                        direction,
                        eps,
                        factors=factors,
                        log_ratio=self.gamma * direction.scale_draw() if self.gamma else 0.0,
                        work=self._work,
                    )
                )
        self.ledger.work(machine, "forward", 2 * self.samples)
        self.ledger.work(machine, "draw", self.samples * self.space.numel * (2 if self.gamma else 1))
        return np.array([e.projection for e in found]), [e.loss for e in found]

    def _encode(self, projections: Tensor, machine: int) -> tuple[Payload, Tensor]:
        """Their code, and which are numbers in it: neither a loss that is not finite nor a number that is too
        large for the codec may reach the others."""
        layout, context = (self.samples,), self._context(machine)
        finite = projections.isfinite()
        coded = self.codec.encode(torch.where(finite, projections, -0.0), layout, context)  # -0.0: see codes
        kept = coded.kept.dense().isfinite()
        if not bool(kept.all()):
            finite &= kept
            coded = self.codec.encode(torch.where(finite, projections, -0.0), layout, context)
        return coded.payload, finite

    def _move(self, members: Sequence[int], payloads: Sequence[Payload]) -> None:
        values: list[float] = []
        for member, payload in zip(members, payloads, strict=True):
            decoded = self.codec.decode(payload, (self.samples,), self._context(member))
            values += decoded.dense().tolist()
        directions = [d for member in members for d in self._directions(member)]
        rate = self.lr / self._norm(len(values))
        apply_estimates(self._theta(), directions, values, rate, factors=self._factors(), work=self._work)
        if self.gamma:
            for direction, p in zip(directions, values, strict=True):
                self.log_eps -= rate * p * self.gamma * direction.scale_draw()
        self.ledger.work(self.transport.rank, "draw", self.space.numel * sum(p != 0 for p in values))

    def _directions(self, machine: int) -> list[Direction]:
        return [Direction(self.seed, self.round, machine, s) for s in range(self.samples)]

    def _norm(self, estimates: int) -> float:
        return float(estimates) if self.average == "mean" else math.sqrt(estimates)

    def _factors(self) -> Mapping[str, float] | None:
        """Variance scaling: of every tensor its standard deviation over the root mean square of all."""
        if not self.variance_scaling:
            return None
        deviations = {n: float(np.std(t.cpu().double().numpy())) for n, t in self._theta().items()}
        middle = math.sqrt(fmean(d * d for d in deviations.values()))
        if middle == 0:
            raise ValueError(
                "variance_scaling needs a tensor whose entries differ; all trainable ones are constant"
            )
        # rounded, so that the last bits of a sum that machines may add up in another order do not matter
        return {n: float(f"{d / middle:.5g}") for n, d in deviations.items()}

    def _theta(self) -> dict[str, Tensor]:
        return {name: p.data for name, p in self._params.items()}

    @contextmanager
    def _measuring(self) -> Iterator[None]:
        """Eval mode, and the parameters back in place at the end, whatever happens."""
        modes = [(m, m.training) for m in self.model.modules()]
        self._theta_before = self._theta()
        self.model.eval()
        try:
            yield
        finally:
            for name, p in self._params.items():
                p.data = self._theta_before[name]
            for module, training in modes:
                module.training = training

    def _loss(self, closure: Closure, batch: Any, tensors: Tensors) -> float:
        for name, p in self._params.items():
            p.data = tensors[name]
        with torch.inference_mode():
            loss = closure(batch)
        if (
            not isinstance(loss, Tensor)
            or loss.numel() != 1
            or loss.dtype not in (torch.float32, torch.float64)
        ):
            what = f"{loss.dtype} of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
            raise TypeError(
                f"closure must return a float32 or float64 scalar tensor; got {what}: at eps = {self.eps} a "
                "difference of losses in half precision has no digits left"
            )
        return float(loss)

    def _context(self, machine: int) -> Context:
        return Context(self.seed, self.round, machine)

    def _check_payloads(self, members: Sequence[int], payloads: Sequence[Payload]) -> None:
        if len(members) != len(payloads) or not members:
            raise ValueError(f"payloads must be one a member, {len(members)}; got {len(payloads)}")
        if len(set(members)) != len(members):
            raise ValueError(f"members must be distinct; got {tuple(members)}")
        for member, payload in zip(members, payloads, strict=True):
            if len(payload) != self.width:
                raise ValueError(
                    f"the payload of member {member} must have {self.width} bytes; got {len(payload)}"
                )

    # The group.

    def _settings(self) -> dict[str, Any]:
        """What all machines must have in common, and the versions that the run was made with."""
        return {
            "method": type(self).__name__,
            "lr": self.lr,
            "eps": self.eps,
            "samples": self.samples,
            "average": self.average,
            "codec": repr(self.codec),
            "seed": self.seed,
            "gamma": self.gamma,
            "variance_scaling": self.variance_scaling,
            "parameters": self.space.digest,
            "frozen": self._frozen_digest(),
            "draws": probe(),
            "generator": GENERATOR,
            "versions": {"cograd": cograd.__version__, "torch": torch.__version__, "numpy": np.__version__},
        }

    def _agree(self) -> bytes:
        """Compare settings and models with the other machines; the session's id follows from them."""
        mine = self.agreement()
        for rank, theirs in enumerate(self.transport.all_gather_bytes(mine)):
            refuse_other(json.loads(bytes(theirs)), self._terms(), f"rank {rank}")
            self.ledger.send(rank, 0, 0, schema=len(mine), copies=self.transport.members - 1)
        return session_id(mine.decode(), self.transport.members)

    def agreement(self) -> bytes:
        """Settings, model and start of the run as bytes: what machines compare when they meet."""
        return json.dumps(self._terms(), sort_keys=True).encode()

    def _terms(self) -> dict[str, Any]:
        """What a log must fit, and what machines that meet must have in common besides."""
        told = {key: value for key, value in self.log.header.items() if key != "versions"}
        return {**told, "check_every": self.check_every}

    def _gather(self, message: Payload, *, check: bool = False) -> list[Payload]:
        """Everyone's message. What a check says is no payload of a step."""
        frame = Frame(self._session, self.round, self.transport.rank, message)
        packed = self.transport.all_gather_bytes(frame.pack())
        frames = [Frame.unpack(data, self._session, self.round) for data in packed]
        for f in frames:
            size = len(f.payload)
            self.ledger.send(
                f.sender,
                f.round,
                0 if check else size,
                frame=size + Frame.OVERHEAD,
                copies=self.transport.members - 1,
            )
        return [f.payload for f in frames]

    # Identity, repair and checkpoints.

    @property
    def check_due(self) -> bool:
        """Whether replicas are to be compared before the coming round."""
        return self.check_every > 0 and self.round > 0 and self.round % self.check_every == 0

    def compare(self) -> None:
        """Compare this machine's `identity` with the others': 16 bytes from each. Every machine calls it.

        Raises `Diverged` on all of them, with the ranks that differ from most; from rank 0's side on a tie.
        """
        told = [bytes(identity) for identity in self._gather(self.identity(), check=True)]
        usual = max(told, key=told.count)
        ranks = [rank for rank, identity in enumerate(told) if identity != usual]
        if ranks:
            raise Diverged(self.round, ranks, [rank for rank in range(len(told)) if rank not in ranks])

    def identity(self) -> bytes:
        """16 bytes that are the same on all machines whose weights and perturbation size are."""
        known = self.fingerprint().encode() + struct.pack("<d", self.log_eps)
        return hashlib.blake2b(known, digest_size=16).digest()

    def fingerprint(self) -> str:
        """Digest of the trainable parameters' bytes: replicas are the same if these are."""
        return _digest((name, p.data) for name, p in self._params.items())

    def _frozen_digest(self) -> str:
        """Of everything else in the model, which replicas must have in common too."""
        trained = {id(p) for p in self._params.values()}
        everything = chain(self.model.named_parameters(), self.model.named_buffers())
        return _digest((name, t.data) for name, t in everything if id(t) not in trained)

    def replay(self, log: Log, until: int | None = None) -> None:
        """Apply the rounds of a log that this machine has not applied yet, up to ``until`` (all if None).

        The model must be where it was after `round` rounds of the log: at round 0, its start. Raises
        SchemaError for a log of other settings, another model or another start, ValueError for one that does
        not continue this machine's own, or an ``until`` that it does not reach.
        """
        if not self.replayable:
            raise TypeError(f"{type(self).__name__} keeps no log: its messages are as long as the model")
        refuse_other(log.header, self.log.header, "the log")
        end = len(log) if until is None else until
        if not self.round <= end <= len(log):
            raise ValueError(
                f"until must be in {self.round} .. {len(log)}, the log's rounds that are new here; got {end}"
            )
        if log.digest(self.round) != self.log.digest():
            raise ValueError(
                f"the log does not continue this machine's own: they differ before round {self.round}"
            )
        for entry in log[self.round : end]:
            self.apply(entry.members, entry.payloads(self.width))

    def weights(self) -> bytes:
        """The trainable parameters as bytes: what a machine that joins by download is sent."""
        return b"".join(bytes(_raw(p.data)) for p in self._params.values())

    def load_weights(self, weights: Payload, log: Log, log_eps: float) -> None:
        """Take over another machine's `weights`, its log and its ``log_eps``, instead of replaying the log.

        The start of the run becomes that of the log. Raises SchemaError for a log of other settings or another
        model, ValueError for weights of another length; nothing changes then.
        """
        header = {**log.header, "checkpoint": self.log.header["checkpoint"]}
        refuse_other(header, self.log.header, "the log")
        sizes = [p.numel() * p.element_size() for p in self._params.values()]
        if len(weights) != sum(sizes):
            raise ValueError(f"weights must have {sum(sizes)} bytes; got {len(weights)}")
        at = 0
        for p, size in zip(self._params.values(), sizes, strict=True):
            part = tensor_of(memoryview(weights)[at : at + size], p.dtype)
            p.data.copy_(part.view(p.shape))
            at += size
        self.log = Log(log.header, log.width)
        for entry in log:
            self.log.append(*entry)
        self.round, self.log_eps = len(log), log_eps

    def state_dict(self) -> dict[str, Any]:
        """Round, log and perturbation size. The weights are the model's: save its state with it.

        It is the same on every machine, and a group of any size may go on from it: the log says who took part.
        """
        return {
            "round": self.round,
            "log_eps": self.log_eps,
            "log": self.log.to_bytes(),
            "fingerprint": self.fingerprint(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`, bit for bit. Load the model's weights first.

        Raises SchemaError for a state of other settings or another model, ValueError for weights that are not
        those it was saved with; nothing changes then.
        """
        log = Log.from_bytes(state["log"])
        header = {**log.header, "checkpoint": self.log.header["checkpoint"]}
        refuse_other(header, self.log.header, "the state")
        if state["fingerprint"] != self.fingerprint():
            raise ValueError(
                f"the model's weights are not those of round {state['round']}, when the state was saved: "
                "load the model's own state first"
            )
        self.log, self.round, self.log_eps = log, int(state["round"]), float(state["log_eps"])


class LocalPeers:
    """M machines in this process, for trying things out and as the reference of real processes.

    One model serves, since replicas are the same bits. ``members`` are the machines' ids in the order in which
    they joined; a number stands for 0 .. M - 1. Raises ValueError for ids that are not distinct, or none.
    """

    def __init__(self, zo: OneByte, members: int | Sequence[int]) -> None:
        ids = tuple(range(members)) if isinstance(members, int) else tuple(members)
        if not ids or len(set(ids)) != len(ids):
            raise ValueError(f"members must be distinct ids, or a number >= 1; got {members}")
        self.zo, self.members = zo, ids

    def step(self, closure: Closure, batches: Sequence[Sequence[Any]]) -> list[Info]:
        """One round: ``batches[i]`` holds the minibatches of ``members[i]``. Returns what each machine saw."""
        if len(batches) != len(self.members):
            raise ValueError(f"batches must hold those of {len(self.members)} machines; got {len(batches)}")
        zo = self.zo
        owns = [zo.estimate(closure, b, m) for m, b in zip(self.members, batches, strict=True)]
        for member, own in zip(self.members, owns, strict=True):
            size = len(own.payload)
            zo.ledger.send(member, zo.round, size, frame=size + Frame.OVERHEAD, copies=len(self.members) - 1)
        zo.apply(self.members, [own.payload for own in owns])
        return [zo.info(own, self.members) for own in owns]


def refuse_other(theirs: Mapping[str, Any], ours: Mapping[str, Any], who: str) -> None:
    """Raise SchemaError, naming what differs, unless two headers agree in all but versions."""
    for key in [*ours, *sorted(theirs.keys() - ours.keys())]:
        if key != "versions" and theirs.get(key) != ours.get(key):
            raise SchemaError(
                f"{who} has another {_WORDS.get(key, key)}: {theirs.get(key)!r} there, {ours.get(key)!r} here"
            )


_WORDS = {
    "parameters": "list of trainable parameters (digest of names, order and shapes)",
    "frozen": "frozen part of the model (digest of parameters and buffers)",
    "checkpoint": "start of the trainable parameters (digest)",
    "draws": "generator of normal numbers (digest of its draws; another version of numpy?)",
}


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"


def _digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    state = hashlib.blake2b(digest_size=16)
    for name, tensor in tensors:
        state.update(name.encode())
        state.update(_raw(tensor))
    return state.hexdigest()


def _raw(tensor: Tensor) -> memoryview:
    """A tensor's elements as bytes, in logical order."""
    flat = tensor.detach().cpu().contiguous().view(-1)
    return memoryview(flat.view(torch.uint8).numpy().data) if flat.numel() else memoryview(b"")
