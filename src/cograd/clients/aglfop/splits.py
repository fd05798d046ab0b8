"""Splits of a data set in which local and global disparity agree, or the one hides from the other."""

from __future__ import annotations

import numpy as np
import torch

from cograd.clients.aglfop.joint import Codes, whole
from cograd.core.checks import check
from cograd.core.streams import stream
from cograd.data.partition import Partition

SPLITS = ("uniform", "skew", "synergy")


def split(
    groups: Codes,
    labels: Codes,
    how: str,
    *,
    strength: float = 0.9,
    clients: int = 2,
    swapped: float = 0.0,
    seed: int = 0,
) -> Partition:
    """Deal examples to clients by their group and label.

    - ``uniform``: at random; client and group are independent, and disparity is unique.
    - ``skew``: by the group. ``strength`` of each group goes to its home clients, so that the client tells the
      group, and disparity is redundant. With two clients and groups, client 0 has that share of group 1.
    - ``synergy``: by whether group and label agree. ``strength`` of the examples with z = y goes to the even
      clients, of those with z != y to the odd ones: inside a client the group tells the label, and disparity is
      masked.

    What does not go home is dealt to the other clients, each in equal parts. Shares are exact up to rounding in
    every cell of group and label; which examples go where is random. At last a share ``swapped`` of the
    smallest client's number of examples is passed on by every client to the next, as the released code does
    with 0.01.

    Raises ValueError for another ``how``, fewer clients than the split tells apart, numbers out of range, and
    groups and labels of different lengths; and where a client would hold nothing.
    """
    z, y = whole("groups", groups), whole("labels", labels)
    homes = {"uniform": np.zeros_like(z), "skew": z, "synergy": (z != y).astype(np.int64)}
    check(
        ("how", how, f"one of {', '.join(SPLITS)}", how in SPLITS),
        ("strength", strength, "in [0, 1]", 0 <= strength <= 1),
        ("swapped", swapped, "in [0, 1)", 0 <= swapped < 1),
        ("clients", clients, ">= 1", clients >= 1),
        ("labels", len(y), f"as many as groups, {len(z)}, and >= 1", len(y) == len(z) >= 1),
        ("groups", int(z.min(initial=0)), ">= 0", z.min(initial=0) >= 0),
    )
    home = homes[how]
    if how == "skew":
        home = home.max() - home
    kinds = int(home.max()) + 1 if how != "synergy" else 2
    if kinds > 1:
        check(("clients", clients, f">= {kinds}, the homes of {how!r}", clients >= kinds))
    draws = stream(seed, "partition", how).numpy
    holder = np.empty(len(z), np.int64)
    for kind, label in sorted(set(zip(home.tolist(), y.tolist(), strict=True))):
        rows = draws.permutation(np.flatnonzero((home == kind) & (y == label)))
        ours = np.arange(clients)[np.arange(clients) % kinds == kind]
        others = np.setdiff1d(np.arange(clients), ours)
        staying = round(strength * len(rows)) if len(others) else len(rows)
        for who, dealt in ((ours, rows[:staying]), (others, rows[staying:])):
            if len(dealt):
                order = draws.permutation(who)  # who gets the odd ones is not always the same client
                holder[dealt] = order[np.arange(len(dealt)) % len(order)]
    parts = [np.flatnonzero(holder == client) for client in range(clients)]
    if empty := [client for client, part in enumerate(parts) if not len(part)]:
        raise ValueError(f"clients must be fewer for {len(z)} examples; client {empty[0]} would hold none")
    if moving := int(swapped * min(map(len, parts))):
        leaving = [draws.choice(part, moving, replace=False) for part in parts]
        for client, rows in enumerate(leaving):
            holder[rows] = (client + 1) % clients
        parts = [np.flatnonzero(holder == client) for client in range(clients)]
    strong = "" if how == "uniform" else f"strength={strength:g}, "
    also = f"swapped={swapped:g}, " if swapped else ""
    rule = f"{how}({strong}{also}seed={seed})"
    return Partition(tuple(map(torch.from_numpy, parts)), rule, tuple(map(str, range(clients))))
