"""The disparities of a federation while it trains: every so many rounds, clients send a table of counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cograd.clients.aglfop.joint import ClientJoint, Codes, client_counts, whole
from cograd.clients.aglfop.measures import FIVE, disparities
from cograd.core.checks import check
from cograd.core.space import ParamSpace
from cograd.data.clients import ClientData, Clients
from cograd.engines.federated.protocol import (
    ClientContext,
    Content,
    Event,
    Lost,
    Reply,
    Send,
    Session,
    State,
    Synchronous,
    Task,
)

COUNTS, DUE = "audit.counts", "audit.due"
"""Names in the server's state: the last tables (clients, Z, Y, H); whether an audit is next."""


@dataclass(frozen=True, eq=False)
class GroupedData(ClientData):
    """`ClientData` that says which group each example is of: ``z``, and ``test_z`` of the test examples."""

    z: Tensor
    test_z: Tensor


def with_groups(clients: Clients, groups: Codes, test_groups: Codes | None = None) -> list[GroupedData]:
    """Clients whose examples have a group: ``groups`` of all rows of the training set in its order, and
    ``test_groups`` of the test set's.

    Raises ValueError where there are fewer groups than rows, or test groups without a test set or the reverse.
    """
    if (clients.test_parts is None) != (test_groups is None):
        raise ValueError("test_groups must be given where the clients have test examples, and only there")
    z = torch.from_numpy(whole("groups", groups))
    own = _dealt("groups", z, clients.parts.parts)
    tests = [z[:0]] * len(clients)
    if clients.test_parts is not None and test_groups is not None:
        tests = _dealt(
            "test_groups", torch.from_numpy(whole("test_groups", test_groups)), clients.test_parts.parts
        )
    return [
        GroupedData(data.x, data.y, data.test_x, data.test_y, mine, tested)
        for data, mine, tested in zip(clients, own, tests, strict=True)
    ]


def _dealt(name: str, z: Tensor, parts: Sequence[Tensor]) -> list[Tensor]:
    last = max((int(part[-1]) for part in parts if len(part)), default=-1)
    if last >= len(z):
        raise ValueError(f"{name} must cover row {last}, which a client holds; got {len(z)}")
    return [z[part] for part in parts]


@dataclass
class AGLFOP(Synchronous):
    """A federated method, and what its global model tells about the group, in every row of the history.

    After a round of ``inner``, all clients are sent the new model, and each answers with how many of its
    examples there are of each group, label and prediction. Shared besides what ``inner`` shares: 4P bytes down
    and Z H^2 integers of 8 bytes up a client and audit (64 for two groups and classes), or Z H (32) without
    ``labels``. The row's reports are the disparities in bits, by the names ``global``, ``local``, ``unique``,
    ``redundant`` and ``masked``, and ``audited``, the examples counted; `joint` gives all else. Clients that do
    not answer in time are missing from the counts.

    The row of an audited round names as participants those who took part in the round of ``inner``.

    Args:
        inner: a method of rounds.
        groups, classes: how many there are, Z and H. A model with one output is a logit of class 1.
        every: rounds between audits.
        held_out: count test examples; otherwise those of the training.
        labels: count by label as well, which the frontier needs.

    Clients hold `GroupedData` (see `with_groups`), or anything with ``x``, ``y``, ``z``, or ``test_x``,
    ``test_y``, ``test_z``.
    """

    inner: Synchronous
    groups: int = 2
    classes: int = 2
    every: int = 1
    held_out: bool = True
    labels: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.inner, Synchronous):
            raise TypeError(f"inner must be a method of rounds (Synchronous); got {type(self.inner).__name__}")
        check(
            ("groups", self.groups, ">= 2", self.groups >= 2),
            ("classes", self.classes, ">= 2", self.classes >= 2),
            ("every", self.every, ">= 1", self.every >= 1),
        )
        if "audit" in self.inner.tasks():
            raise ValueError("inner must have no task named 'audit'; it has one")

    def tasks(self) -> Mapping[str, Task]:
        return {**self.inner.tasks(), "audit": self.audit}

    def audit(self, state: State, content: Content, data: Any, ctx: ClientContext) -> tuple[State, Content]:
        """The client's table of counts, int64 (Z, Y, H), or (Z, H) without labels."""
        x, y, z = (getattr(data, ("test_" if self.held_out else "") + name) for name in ("x", "y", "z"))
        predicted = decided(ctx.model.outputs(content["x"], x)) if len(y) else y
        counts = client_counts(z, predicted, y if self.labels else None, sizes=(self.groups, self.classes))
        return state, {"counts": counts}

    def start(self, session: Session) -> State:
        return {**self.inner.start(session), DUE: False}

    def ask(self, server: State, session: Session) -> Sequence[Send]:
        if not server[DUE]:
            return self.inner.ask(server, session)
        content = {"x": self.inner.model(server)}
        return [Send(client, "audit", content) for client in range(session.clients)]

    def close(self, server: State, replies: Mapping[int, Content], session: Session) -> None:
        if server[DUE]:
            self._tell(server, replies, session)
            server[DUE] = False
            server["round"] += 1
            return
        done = server["round"]
        known = session.participants
        self.inner.close(server, replies, session)
        if session.participants is known:
            session.participants = sorted({*(known or ()), *replies})
        if server["round"] > done and server["round"] % self.every == 0:
            server["round"] -= 1  # the audit is part of the round
            server[DUE] = True

    def _tell(self, server: State, replies: Mapping[int, Content], session: Session) -> None:
        tables = [reply["counts"] for reply in replies.values()]
        server[COUNTS] = torch.stack(tables)
        if not any(table.any() for table in tables):
            raise ValueError("no client has an example to count; held_out=False counts those of the training")
        joint = self.joint(server)
        found = disparities(joint)
        session.reports.update({name.rstrip("_"): getattr(found, name) for name in FIVE})
        session.reports["audited"] = float(joint.count or 0)

    def joint(self, server: State) -> ClientJoint:
        """The joint of the last audit. Raises RuntimeError before the first."""
        if COUNTS not in server:
            raise RuntimeError("there was no audit yet: run at least `every` rounds")
        return ClientJoint.merge(list(server[COUNTS]))

    # The rest is the inner method's.

    def takes(self, server: State, reply: Reply | Lost, session: Session) -> bool:
        if server[DUE]:
            return super().takes(server, reply, session)
        return self.inner.takes(server, reply, session)

    def resumed(self, server: State, session: Session, coming: Sequence[Event], sends: Sequence[Send]) -> None:
        self.inner.resumed(server, session, coming, sends)

    def shared(self, space: ParamSpace) -> ParamSpace:
        return self.inner.shared(space)

    def model(self, server: State) -> Tensor:
        return self.inner.model(server)

    def personal(self, server: State, client: State, number: int) -> Tensor:
        return self.inner.personal(server, client, number)


def decided(outputs: Tensor) -> Tensor:
    """Classes (N,) of a classifier's outputs: (N, C) scores, or (N,) or (N, 1) logits of class 1."""
    if outputs.ndim == 1 or outputs.shape[-1] == 1:
        return (outputs.reshape(len(outputs)) > 0).long()
    return outputs.argmax(-1)
