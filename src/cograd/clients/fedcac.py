"""FedCAC: every client's own model, its critical entries shared with look-alikes only (arXiv 2309.11103).

Shared between clients and server: each client's whole model and one bit an entry up, one model down that was
mixed for this client. What a client keeps is its model w_i; there is no global model that anybody uses.

An entry is *critical* to a client if it matters and has moved: with w from before and w' from after the round's
local training, tensor by tensor,

    score = |(w' - w) w'|;  critical where score >= the floor(tau numel)-th largest score of the tensor    M_i

Clients that mark the same places hold similar data. Among the N clients of a round t = 1, 2, ...

    O_ij = 1 - |M_i xor M_j| / (2 |M_i|)                                             overlap
    theta_t = mean O + t/beta (max O - mean O)                                       over all i != j
    C_i = {i} and all j with O_ij >= theta_t                                         its partners
    g = sum n_i w'_i / sum n_i;   u_i = mean of w'_j over C_i                        the latter unweighted
    w_i <- u_i where M_i is set, g elsewhere

The threshold rises with t: wide collaboration at first, at t = beta the most similar pairs alone, and nobody
after that. Overlaps are compared as fractions of whole numbers, so ties are ties: at tau = 1 all clients stay
partners for ever, which is FedAvg with equal weights. tau = 0 marks nothing: FedAvg.

Where this differs from the released code: a tensor that did not move at all has no critical entries (the
release marks all of them), and at tau = 1 entries that did not move are critical, too (the release leaves them
out). The paper leaves partial participation open. Here overlaps, g and u_i are those of the round's
participants, and a client that sleeps keeps its model; one that joins after round 1 starts from g.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from cograd.core.selection import kth_largest
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
from cograd.engines.federated.training import LocalSGD

DEAD = 1e-10
"""Where the threshold of a tensor is not above this, all scores above `ZERO` are critical: most of the tensor
is dead (as behind a ReLU that never fires), and what is alive matters."""
ZERO = 1e-20

_COLUMNS = 1 << 16
"""Entries of all masks that are compared at a time; their counts are exact in float32."""


@dataclass
class FedCAC(Synchronous):
    """FedCAC. Shared: 4P + P/8 bytes up and 4P down a participant and round, P the model's entries.

    Args:
        local: the clients' training.
        tau: critical share of every tensor, in [0, 1].
        beta: rounds until nobody collaborates on critical entries; about twice the planned rounds where there
            are groups of alike clients to be found, and small where there are none.

    The server holds the models of all participants at a time. The overlap of masks tells it whose data are
    alike. Buffers such as BatchNorm's statistics stay with the clients: run it with ``buffers="local"``.

    Raises ValueError for an argument out of range, and for a session of fewer than two clients.
    """

    local: LocalSGD
    tau: float = 0.5
    beta: int = 100

    def __post_init__(self) -> None:
        _check_tau(self.tau)
        _check_beta(self.beta)

    def tasks(self) -> Mapping[str, Task]:
        return {"train": self.train, "adopt": self.adopt}

    def train(self, state: State, content: Content, data: Any, ctx: ClientContext) -> tuple[State, Content]:
        """The first exchange: train one's own model ``w`` (numel,) and mark what is critical.

        A model that training has made non-finite is sent with nothing marked, for the engine to refuse.
        """
        before = state.get("w", content.get("w", ctx.initial))
        after = self.local.run(ctx, data, before).clone()
        space = ctx.model.space
        mask = torch.zeros(space.numel, dtype=torch.bool)
        if bool(torch.isfinite(after).all()):
            space.flatten(critical_mask(space.views(before), space.views(after), self.tau), out=mask)
        return {**state, "w": after}, {"w": after, "mask": mask}

    def adopt(self, state: State, content: Content, data: Any, ctx: ClientContext) -> tuple[State, Content]:
        """The second exchange: take the model that the server has mixed."""
        return {**state, "w": content["w"]}, {}

    def start(self, session: Session) -> State:
        if session.clients < 2:
            raise ValueError(f"FedCAC needs at least 2 clients; got {session.clients}")
        joined = torch.zeros(session.clients, dtype=torch.bool)
        return {"round": 0, "x": session.initial.clone(), "joined": joined}

    def ask(self, server: State, session: Session) -> Sequence[Send]:
        if "mixed" in server:
            active = server["active"].tolist()
            return [Send(client, "adopt", {"w": w}) for client, w in zip(active, server["mixed"], strict=True)]
        nothing: Content = {}  # clients have their models; at first, that from which everybody starts
        newcomer = {"w": server["x"]} if server["round"] else nothing
        return [
            Send(client, "train", nothing if server["joined"][client] else newcomer)
            for client in session.select(server["round"])
        ]

    def close(self, server: State, replies: Mapping[int, Content], session: Session) -> None:
        if "mixed" in server:
            del server["mixed"]
            server["round"] += 1
            return
        found = self.collaborate(
            torch.stack([reply["mask"] for reply in replies.values()]), server["round"] + 1
        )
        server["x"] = mean_of(replies, "w", sizes_of(replies, session))
        server["mixed"] = mix(replies, found.together, server["x"])
        server["active"] = torch.tensor(list(replies))
        server["joined"] = server["joined"].index_fill(0, server["active"], True)
        server["overlap"], server["together"] = found.overlap, found.together
        session.reports |= _figures(found)

    def collaborate(self, masks: Tensor, t: int) -> Collaboration:
        """Who shares critical entries with whom in round ``t``; ``masks`` (n, numel) are the participants'."""
        return collaboration(masks, t, self.beta)

    def model(self, server: State) -> Tensor:
        """The size-weighted mean g, from which newcomers start."""
        x: Tensor = server["x"]
        return x

    def personal(self, server: State, client: State, number: int) -> Tensor:
        """The client's own model; g if it has not taken part yet."""
        w: Tensor = client["w"] if "w" in client else server["x"]
        return w

    @staticmethod
    def collaborators(server: State) -> dict[int, list[int]]:
        """Each participant's partners in the last round, itself left out."""
        active = server["active"].tolist()
        rows = server["together"].tolist()
        return {
            client: [other for other, shares in zip(active, row, strict=True) if shares and other != client]
            for client, row in zip(active, rows, strict=True)
        }


@torch.no_grad()
def critical_mask(before: Mapping[str, Tensor], after: Mapping[str, Tensor], tau: float) -> dict[str, Tensor]:
    """Which entries are critical: boolean tensors by name, of the models' shapes.

    In each tensor floor(tau numel) entries have the largest scores |(after - before) after|; ties with the last
    of them are critical as well. Where that last score is next to nothing (`DEAD`), all non-zero scores are.
    With tau = 1 all entries are critical.

    Raises ValueError for a tau outside [0, 1], other names or shapes, no tensors, and scores that are not
    finite.
    """
    _check_tau(tau)
    if not before or list(before) != list(after):
        raise ValueError(
            f"before and after must hold the same tensors, at least one; got {list(before)} and {list(after)}"
        )
    masks = {}
    for name, old in before.items():
        new = after[name]
        if old.shape != new.shape:
            raise ValueError(f"{name!r} must have one shape; got {tuple(old.shape)} and {tuple(new.shape)}")
        scores = ((new - old) * new).abs()
        if not bool(torch.isfinite(scores).all()):
            raise ValueError(f"scores of {name!r} must be finite; the model before or after training is not")
        masks[name] = _largest(scores, int(tau * scores.numel()))
    return masks


def _largest(scores: Tensor, k: int) -> Tensor:
    if k in (0, scores.numel()):
        return torch.full_like(scores, k > 0, dtype=torch.bool)
    limit = kth_largest(scores.reshape(-1), k)
    return scores >= limit if limit > DEAD else scores > ZERO


def mask_overlap(masks: Sequence[Mapping[str, Tensor]] | Tensor) -> Tensor:
    """O (n, n) of n masks, given by name or as rows (n, numel): which share of i's critical entries is
    critical to j.

    Float64; 1 on the diagonal, 0 for an empty mask. Of two masks of equal size O_ij is |i and j| / |i|;
    otherwise it is not symmetric, and a large j costs i.

    Raises ValueError for fewer than two masks, or for masks of other tensors.
    """
    return collaboration(_rows(masks), 1, 1).overlap


@dataclass(frozen=True, eq=False)
class Collaboration:
    """What the masks of a round say: ``overlap`` (n, n), the ``threshold`` theta_t, and ``together`` (n, n):
    whether i takes j's critical entries into its own, true on the diagonal."""

    overlap: Tensor
    threshold: float
    together: Tensor


def collaboration(masks: Tensor, t: int, beta: int) -> Collaboration:
    """Overlaps, threshold and partners of boolean masks (n, numel) in round ``t`` = 1, 2, ...

    A client whose mask is empty takes from nobody. Neither does a single client.
    """
    _check_beta(beta)
    sizes, unlike = _differences(masks)
    n = len(masks)
    alone = torch.eye(n, dtype=torch.bool)
    overlap = 1 - unlike / (2 * sizes.clamp_min(1))[:, None].double()
    overlap[sizes == 0] = 0
    overlap[alone] = 1
    if n == 1:
        return Collaboration(overlap, 1.0, alone)
    least = unlike.masked_fill(alone, 2 * masks.shape[1]).amin(1).tolist()
    doubled = [2 * size for size in sizes.tolist()]
    # 1 - O as fractions, an empty mask being 1 away from all
    means = [Fraction(s, d * (n - 1)) if d else 1 for s, d in zip(unlike.sum(1).tolist(), doubled, strict=True)]
    mean = Fraction(sum(means), n)
    low = min(Fraction(s, d) if d else Fraction(1) for s, d in zip(least, doubled, strict=True))
    distance = mean - Fraction(t, beta) * (mean - low)
    bounds = torch.tensor([math.floor(distance * d) if d else -1 for d in doubled])
    return Collaboration(overlap, float(1 - distance), (unlike <= bounds[:, None]) | alone)


def mix(replies: Mapping[int, Content], together: Tensor, shared: Tensor) -> Tensor:
    """The models (n, numel) that go back: where ``mask`` is set, the mean ``w`` of those who are together with
    the client, and ``shared`` elsewhere."""
    clients = list(replies)
    mixed = torch.empty(len(clients), len(shared), dtype=shared.dtype)
    for row, client in enumerate(clients):
        partners = {clients[j]: replies[clients[j]] for j in together[row].nonzero()[:, 0].tolist()}
        torch.where(replies[client]["mask"], mean_of(partners, "w"), shared, out=mixed[row])
    return mixed


def _differences(masks: Tensor) -> tuple[Tensor, Tensor]:
    """Set entries of each mask (n,), and entries in which two of them differ (n, n), as int64."""
    both = torch.zeros(len(masks), len(masks), dtype=torch.int64)
    for part in masks.split(_COLUMNS, 1):
        bits = part.float()
        both += (bits @ bits.T).long()
    sizes = both.diagonal()
    return sizes, sizes[:, None] + sizes[None, :] - 2 * both


def _rows(masks: Sequence[Mapping[str, Tensor]] | Tensor) -> Tensor:
    """Masks as one boolean tensor (n, numel)."""
    if not isinstance(masks, Tensor):
        shapes = [{name: tuple(mask.shape) for name, mask in one.items()} for one in masks]
        other = next((i for i, one in enumerate(shapes) if one != shapes[0]), None)
        if other is not None:
            raise ValueError(
                f"masks must be of one model; mask 0 holds {shapes[0]}, mask {other} holds {shapes[other]}"
            )
        rows = [torch.cat([one[name].reshape(-1) for name in shapes[0]]) for one in masks]
        masks = torch.stack(rows) if rows else torch.empty(0, 0, dtype=torch.bool)
    if masks.ndim != 2 or len(masks) < 2 or masks.dtype != torch.bool:
        raise ValueError(
            f"masks must be boolean and at least 2; got {masks.dtype} of shape {tuple(masks.shape)}"
        )
    return masks


def _figures(found: Collaboration) -> dict[str, float]:
    """What goes to the history: partners of a client, overlaps of two, and the threshold."""
    n = len(found.overlap)
    apart = found.overlap[~torch.eye(n, dtype=torch.bool)]
    figures = {"collaborators": (int(found.together.sum()) - n) / n, "threshold": found.threshold}
    if n > 1:
        figures |= {"overlap": float(apart.mean()), "largest overlap": float(apart.max())}
    return figures


def _check_tau(tau: float) -> None:
    if not 0 <= tau <= 1:
        raise ValueError(f"tau must be in [0, 1]; got {tau}")


def _check_beta(beta: int) -> None:
    if isinstance(beta, bool) or not isinstance(beta, int):
        raise TypeError(f"beta must be an int; got {beta!r} of type {type(beta).__name__}")
    if beta < 1:
        raise ValueError(f"beta must be >= 1; got {beta}")
