"""One node of decentralized training on torch.distributed, around an ordinary training loop."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from cograd.core.ledger import Ledger
from cograd.core.message import SchemaError
from cograd.core.space import ParamSpace
from cograd.engines.transport import TorchDist
from cograd.machines.single_merging import merging
from cograd.machines.single_merging.merging import (
    Diverged,
    State,
    combine,
    not_finite,
    shared,
    statistics,
    wide,
)
from cograd.machines.single_merging.mixing import Mixing, Rows
from cograd.machines.single_merging.schedule import Schedule
from cograd.machines.single_merging.trainer import check_plan, plan


class SingleMerging:
    """Decentralized training of this process's model, with the rounds of a schedule.

    After every ``local_steps`` steps of the optimizer comes a round: this node sends its model to those that
    drew it, takes the models of those that it drew, and becomes their weighted mean. A dense round is an
    all-reduce. Every rank draws the same matrix, so nothing is asked and only drawn models travel.

        merging = SingleMerging(model, optimizer, schedule=Schedule.single_merge(rounds=100), local_steps=10)

    Args:
        model: an ordinary module, on every rank of the same architecture. Nothing is broadcast: for a shared
            start, seed all ranks alike.
        optimizer: its step is what is counted. None: call `advance` once a step (with a GradScaler, which
            leaves out steps on some ranks and not on others, that is the way).
        schedule: peers by round; the default single merge's last round is the only dense one.
        mixing: the topology.
        local_steps: H, optimizer steps a round.
        transport: the group; the default process group if not given.
        ledger: counts every rank's messages; a new one if not given.

    What travels are trainable parameters and BatchNorm's running statistics; after the final merge,
    `recalibrate` estimates those anew. Optimizer state stays here. A group of one trains alone. With NCCL every
    rank's current CUDA device must be its own (``torch.cuda.set_device``).

    Memory in a round: the message, one more for each peer drawn, and the sum in float32 or wider.

    Raises TypeError for DDP, FSDP and DTensor parameters; ValueError for a schedule that the topology cannot
    follow; SchemaError if the ranks' models or settings differ. `Diverged` comes out of ``optimizer.step()``
    where a node of the round holds NaN or infinity: on that rank and those that would have averaged it, and in
    a dense round on all, before they have changed a weight.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        schedule: Schedule,
        mixing: Mixing | None = None,
        local_steps: int = 1,
        transport: TorchDist | None = None,
        ledger: Ledger | None = None,
    ) -> None:
        _check_model(model)
        mixing = mixing if mixing is not None else Mixing()
        self.transport = transport if transport is not None else TorchDist()
        self.rank, self.members = self.transport.rank, self.transport.members
        if self.members > 1:
            check_plan(schedule, mixing, local_steps, self.members)
        self.model, self.schedule, self.mixing, self.local_steps = model, schedule, mixing, local_steps
        self.ledger = ledger if ledger is not None else Ledger()
        self.space = ParamSpace.of(model)
        self._state = shared(model)
        self._wire = _Wire(self._state, self.transport.device)
        self.steps = 0
        self.round = 0
        """Rounds of communication so far, those of `gossip` and `merge` included."""
        self._refused: Diverged | None = None
        self._agree()
        self._hooks = []
        if optimizer is not None:
            self._hooks.append(optimizer.register_step_pre_hook(lambda *_: self._check_open()))
            self._hooks.append(optimizer.register_step_post_hook(lambda *_: self.advance()))

    def advance(self) -> None:
        """Count one local step, and communicate if a round is due. The hook on the optimizer calls it."""
        self._check_open()
        self.steps += 1
        if self.steps % self.local_steps == 0 and self.members > 1:
            self._communicate(
                self.mixing, self.schedule.peers(self.steps // self.local_steps - 1, self.members)
            )

    def detach(self) -> None:
        """Take the hooks off the optimizer, to train on without further rounds."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def gossip(self, rounds: int, mixing: Mixing, peers: float | None = None) -> None:
        """Rounds of communication without training, as after the last step in place of a global merge."""
        if self.members > 1:
            mixing.check(peers, self.members)
            for _ in range(rounds):
                self._communicate(mixing, peers)

    def merge(self) -> None:
        """A dense round now: every node becomes the average of all."""
        self.gossip(1, Mixing("complete"))

    def merged(self, loader: Iterable[Any] | None = None) -> nn.Module:
        """The average of all nodes as a new model, the same on every rank; training goes on unchanged.

        It costs a dense round. With ``loader``, BatchNorm is re-estimated as `recalibrate` does.
        """
        model = copy.deepcopy(self.model)
        if self.members > 1:
            self._average(shared(model))
            self.round += 1
        if loader is not None:
            self.recalibrate(loader, model)
        return model

    def recalibrate(self, loader: Iterable[Any], model: nn.Module | None = None) -> int:
        """Estimate BatchNorm statistics anew after a merge, on every rank's own batches together.

        Each rank runs at most 32 batches of its loader; the statistics are their mean over all ranks' batches.
        Returns the number of batches of all ranks. All ranks call it, and all raise ValueError if the loader of
        one is empty.
        """
        model = self.model if model is None else model
        used = torch.tensor([float(self._recalibrated_here(model, loader))], dtype=torch.float64)
        found = statistics(model)
        if not found or self.members == 1:
            return int(used)
        sums = {name: t.to(wide(t.dtype)) * float(used) for name, t in found.items()}
        self._sum(sums)
        total = int(self._all_reduced(used))
        merging.count_average(self.ledger, self.members, self.round, [*merging.vector_sizes(found), (1, 8)])
        self.round += 1
        merging.write(found, {name: t / total for name, t in sums.items()})
        for name, buffer in model.named_buffers():
            if name.endswith("num_batches_tracked"):
                buffer.fill_(total)
        return total

    def _recalibrated_here(self, model: nn.Module, loader: Iterable[Any]) -> int:
        """The batches used on this rank, after all ranks have said that they had some."""
        used, refusal = 0, ""
        try:
            used = merging.recalibrated(model, loader)
        except ValueError as error:
            refusal = str(error)
        for rank, said in enumerate(self.transport.all_gather_bytes(refusal.encode())):
            if len(said):
                raise ValueError(f"rank {rank}: {bytes(said).decode()}")
        return used

    # One round.

    def _communicate(self, mixing: Mixing, peers: float | None) -> None:
        if mixing.dense(peers, self.members):
            self._average(self._state)
        else:
            self._pull(mixing.rows(peers, self.members, self.round))
        self.round += 1

    @torch.no_grad()
    def _pull(self, rows: Rows) -> None:
        """Point-to-point messages for the active rows only; written when all have come."""
        mine = rows.get(self.rank, [])
        receivers = [node for node, row in rows.items() if any(peer == self.rank for peer, _ in row[1:])]
        merging.count_pulls(self.ledger, rows, self.round, self._wire.size)
        received = {peer: self._wire.empty() for peer, _ in mine[1:]}
        message = self._wire.packed(self._state) if receivers else None
        self._exchange(received, {} if message is None else dict.fromkeys(receivers, message))
        states = {peer: self._wire.views(buffer) for peer, buffer in received.items()}
        if mine or receivers:
            self._check_finite({self.rank: self._state, **states})
        if mine:
            sources = [self._state, *(states[peer] for peer, _ in mine[1:])]
            weights = [weight for _, weight in mine]
            merging.write(
                self._state,
                {
                    name: combine([source[name].to(own.device) for source in sources], weights)
                    for name, own in self._state.items()
                },
            )

    def _exchange(self, received: dict[int, Tensor], sent: dict[int, Tensor]) -> None:
        """Point-to-point messages by rank, all posted as one: on NCCL two ranks that draw each other would
        wait for ever if each posted its receive first."""
        group = self.transport.group
        assert group is not None
        operations = [
            dist.P2POp(post, buffer, dist.get_global_rank(group, peer), group, self.round % 2**31)
            for post, buffers in ((dist.irecv, received), (dist.isend, sent))
            for peer, buffer in buffers.items()
        ]
        for work in dist.batch_isend_irecv(operations) if operations else ():
            work.wait()

    def _average(self, state: State) -> None:
        """Replace a state by its mean over all ranks, after all have said that theirs is finite."""
        bad = not_finite(state)
        said = self.transport.all_gather_bytes((bad or "").encode())
        found = {rank: bytes(name).decode() for rank, name in enumerate(said) if len(name)}
        if found:
            self._refuse(Diverged(found, "rank"))
        sums = {name: t.to(wide(t.dtype), copy=True) for name, t in state.items()}
        self._sum(sums)
        merging.count_average(self.ledger, self.members, self.round, merging.vector_sizes(state))
        merging.write(state, {name: t.div_(self.members) for name, t in sums.items()})

    def _sum(self, tensors: dict[str, Tensor]) -> None:
        """Sum over the ranks, in place, one vector for each dtype, in the same order on all ranks."""
        for dtype in dict.fromkeys(t.dtype for t in tensors.values()):
            chosen = [t for t in tensors.values() if t.dtype == dtype]
            vector = self._all_reduced(torch.cat([t.reshape(-1) for t in chosen]))
            for t, part in zip(chosen, vector.split([t.numel() for t in chosen]), strict=True):
                t.copy_(part.view(t.shape))

    def _all_reduced(self, vector: Tensor) -> Tensor:
        vector = vector.to(self.transport.device)
        self.transport.all_reduce(vector)
        return vector

    def _check_finite(self, states: dict[int, State]) -> None:
        found = {rank: name for rank, state in states.items() if (name := not_finite(state)) is not None}
        if found:
            self._refuse(Diverged(found, "rank"))

    def _refuse(self, error: Diverged) -> None:
        self._refused = error
        raise error

    def _check_open(self) -> None:
        if self._refused is not None:
            raise RuntimeError(
                f"round {self.round} was refused, load a checkpoint on all ranks: {self._refused}"
            )
        if self.steps == self.schedule.rounds * self.local_steps:
            raise RuntimeError(
                f"the schedule's {self.schedule.rounds} rounds are over: detach() to train on without rounds"
            )

    # Agreement and checkpoints.

    def _agree(self) -> None:
        """Compare model and settings with the other ranks: also what is not in the space of parameters, the
        BatchNorm statistics that travel and the frozen parameters that do not."""
        held = f"{self._plan()}, {merging.description(self.model)}"
        schema = self.space.schema(held, next(iter(self._state.values())).dtype)
        mine = schema.to_bytes()
        for rank, theirs in enumerate(self.transport.all_gather_bytes(mine)):
            if bytes(theirs) != mine:
                raise SchemaError(
                    f"rank {rank} has another model or other settings than rank {self.rank}: "
                    f"{_first_difference(mine.decode(), bytes(theirs).decode())}"
                )
            if self.members > 1:
                self.ledger.send(rank, 0, 0, schema=len(mine), copies=self.members - 1)

    def _plan(self) -> str:
        return plan(self.schedule, self.mixing, self.local_steps, self.space)

    def state_dict(self) -> dict[str, Any]:
        """How far this rank is. Model and optimizer are saved beside it; matrices are drawn again by round."""
        return {
            "steps": self.steps,
            "round": self.round,
            "members": self.members,
            "rank": self.rank,
            "plan": self._plan(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`, bit for bit with the saved model and optimizer. Raises ValueError for a
        state of other settings, another rank or another number of ranks (a matrix of m nodes has no meaning for
        others: merge first, then start a new run)."""
        for what in ("members", "rank", "plan"):
            if state[what] != (mine := self.state_dict()[what]):
                raise ValueError(f"the state's {what} is {state[what]}; this run has {mine}")
        self.steps, self.round, self._refused = state["steps"], state["round"], None


class _Wire:
    """A model's shared tensors as one message of bytes: those of wide types first, so that all are aligned."""

    def __init__(self, state: State, device: str) -> None:
        self.device = device
        self.places: dict[str, tuple[int, int, torch.dtype, torch.Size]] = {}
        self.size = 0
        for name, t in sorted(state.items(), key=lambda item: -item[1].element_size()):
            end = self.size + t.numel() * t.element_size()
            self.places[name] = (self.size, end, t.dtype, t.shape)
            self.size = end

    def empty(self) -> Tensor:
        return torch.empty(self.size, dtype=torch.uint8, device=self.device)

    def packed(self, state: State) -> Tensor:
        message = self.empty()
        merging.write(self.views(message), state)
        return message

    def views(self, message: Tensor) -> dict[str, Tensor]:
        return {
            name: message[start:end].view(dtype).view(shape)
            for name, (start, end, dtype, shape) in self.places.items()
        }


def _check_model(model: nn.Module) -> None:
    if isinstance(model, DistributedDataParallel):
        raise TypeError("the model must not be in DistributedDataParallel: nodes train alone between rounds")
    if isinstance(model, FullyShardedDataParallel | FSDPModule):
        raise TypeError("FSDP is not supported: every node holds a whole model of its own")
    spread = next((name for name, p in model.named_parameters() if isinstance(p, DTensor)), None)
    if spread is not None:
        raise TypeError(f"DTensor is not supported: parameter {spread!r}")


def _first_difference(mine: str, theirs: str) -> str:
    """Both texts around where they part."""
    at = next(
        (i for i, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b), min(len(mine), len(theirs))
    )
    start = max(0, at - 40)
    return f"...{mine[start : at + 60]}... here, ...{theirs[start : at + 60]}... there"
