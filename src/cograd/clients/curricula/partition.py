"""How alike clients are in difficulty, set by how a data set is split, and measured.

A split by labels says how many examples of each class a client holds, and not which. `by_difficulty` decides
that: easy ones to the first clients, hard ones first, or at random.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from cograd.core.checks import check
from cograd.core.streams import stream
from cograd.data.partition import ATTEMPTS, Partition

DEALS = ("inc", "dec", "rand")


def by_difficulty(
    parts: Partition, labels: Tensor, scores: Tensor, deal: str, seed: int, *, clients: int | None = None
) -> Partition:
    """The rows of a partition dealt anew by difficulty; class counts of every client stay what they are.

    Within each class, ``inc`` gives the rows of lowest score to the first clients ("low consistency" of
    difficulty across clients), ``dec`` those of highest, ``rand`` any ("high consistency"). Ties are in random
    order. With ``clients``, only so many of the parts are kept, the first ones: of P parts for N clients each
    holds 1/P of the data.

    Raises ValueError for another deal, and for scores or labels that do not cover all rows.
    """
    kept = len(parts) if clients is None else clients
    last = max((int(part[-1]) for part in parts.parts if len(part)), default=-1)
    check(
        ("deal", deal, f"one of {', '.join(DEALS)}", deal in DEALS),
        ("clients", kept, f"in 1 .. {len(parts)}", 1 <= kept <= len(parts)),
    )
    if scores.shape != labels.shape or scores.ndim != 1 or len(scores) <= last:
        raise ValueError(
            f"labels and scores must be 1-D and cover row {last}; "
            f"got shapes {tuple(labels.shape)} and {tuple(scores.shape)}"
        )
    if bool(scores.isnan().any()):
        raise ValueError("scores must not be NaN; some are")
    held: list[list[Tensor]] = [[] for _ in parts.parts]
    everyone = torch.cat(parts.parts)
    for label in labels[everyone].unique().tolist():
        rows = everyone[labels[everyone] == label]
        rows = rows[stream(seed, "difficulty", int(label)).permutation(len(rows))]
        if deal != "rand":
            rows = rows[(scores[rows] if deal == "inc" else -scores[rows]).argsort(stable=True)]
        counts = [int((labels[part] == label).sum()) for part in parts.parts]
        for mine, piece in zip(held, rows.split(counts), strict=True):
            mine.append(piece)
    dealt = tuple(torch.cat(pieces).sort().values for pieces in held[:kept])
    return Partition(dealt, f"by_difficulty({parts.rule}, {deal})", parts.names[:kept])


def difficulty_spread(parts: Partition, scores: Tensor) -> tuple[float, float]:
    """Inter- and intra-partition difficulty: the standard deviation over clients of their mean score, and the
    mean over clients of the standard deviation of their scores (both with divisor n)."""
    of = [scores[part].double() for part in parts.parts]
    means = torch.stack([mine.mean() for mine in of])
    within = torch.stack([mine.std(correction=0) for mine in of])
    return float(means.std(correction=0)), float(within.mean())


def dirichlet_by_client(
    labels: Tensor, parties: int, beta: float, seed: int, *, min_size: int = 10
) -> Partition:
    """The Dirichlet split of the released code: a mix drawn for each *client*, then normalised by class.

    With K classes of shares p, a client draws from Dir(beta K p); a class is divided in proportion to what the
    clients drew of it. All draws are repeated until every client has at least ``min_size`` rows. With balanced
    classes beta is what `cograd.data.dirichlet` calls alpha.

    Raises ValueError for an argument out of range, and when `ATTEMPTS` draws all leave a client short.
    """
    check(
        ("parties", parties, f"in 1 .. {len(labels)}", 1 <= parties <= len(labels)),
        ("beta", beta, "> 0 and finite", 0 < beta < float("inf")),
        ("min_size", min_size, f"in 0 .. {len(labels) // parties}", 0 <= min_size <= len(labels) // parties),
    )
    classes, codes = labels.unique(return_inverse=True)
    totals = codes.bincount(minlength=len(classes)).numpy()
    concentration = (beta * len(classes) * totals / totals.sum()).tolist()
    draws = stream(seed, "dirichlet by client")
    for _ in range(ATTEMPTS):
        mixes = np.stack([draws.dirichlet(concentration) for _ in range(parties)])
        if not bool((mixes.sum(0) > 0).all()):
            continue
        cuts = np.rint(np.cumsum(mixes / mixes.sum(0), axis=0) * totals).astype(np.int64)
        cuts[-1] = totals
        counts = np.diff(cuts, axis=0, prepend=0)
        if int(counts.sum(1).min()) >= min_size:
            break
    else:
        raise ValueError(
            f"min_size must be one that beta can give: in {ATTEMPTS} draws with beta={beta:g} some of the "
            f"{parties} clients always had fewer than {min_size} rows"
        )
    held: list[list[Tensor]] = [[] for _ in range(parties)]
    for code in range(len(classes)):
        rows = (codes == code).nonzero()[:, 0]
        rows = rows[draws.permutation(len(rows))]
        for mine, piece in zip(held, rows.split(counts[:, code].tolist()), strict=True):
            mine.append(piece)
    parts = tuple(torch.cat(pieces).sort().values for pieces in held)
    rule = f"dirichlet_by_client(beta={beta:g}, seed={seed})"
    return Partition(parts, rule, tuple(map(str, range(parties))))
