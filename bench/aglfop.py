"""Partial information decomposition and AGLFOP's frontier: how exact, how long, and beside ``dit``.

    python -m bench.aglfop [--joints 1000] [--dit VENV/bin/python] [--dit-joints 1000] [--json]

Random joints of two clients, groups and predictions, uniform on the simplex. Accuracy comes first: the largest
violation of R >= 0 and M >= 0, and the certified gap of the unique information, over all joints; then the time
of a joint alone, and in one batch. The frontier's figure is the time of a point of a 10 x 10 grid.

With a Python that has dit 2.3, its PID_BROJA decomposes the same joints in a process of its own: how far what
it returns is above the least unique information, how often a part is negative, and its time. There a point of
the frontier is also solved as the released code does it: SLSQP from a random start, with finite differences,
and a whole decomposition at every evaluation of a constraint.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from cograd.clients.aglfop import ClientJoint, aglfop, frontier
from cograd.clients.aglfop.information import conditional, mutual, unique

BITS = 1 / math.log(2)
EPS = 0.02
SLACK = 1e-9
"""Bits by which a part may be below zero."""


def joints(count: int) -> np.ndarray:
    return np.random.default_rng(0).dirichlet(np.ones(8), count).reshape(count, 2, 2, 2)


def data() -> np.ndarray:
    """P(s,z,y) for the frontier."""
    return np.random.default_rng(1).dirichlet(np.ones(8)).reshape(2, 2, 2)


def seconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def measure(count: int) -> dict[str, float]:
    p = joints(count)
    unique(p[:10])
    together = seconds(lambda: unique(p))
    alone = median(seconds(lambda one=one: unique(one)) for one in p[:200])
    found = unique(p)
    parts = np.stack([mutual(p.sum(1)) - found.value, conditional(p) - found.value])
    bounds, joint = np.linspace(0, 0.1, 10), ClientJoint(data(), "szy")
    grid = seconds(lambda: frontier(joint, eps_global=bounds, eps_local=bounds))
    figures = {
        "joints": float(count),
        "largest violation of R, M >= 0, bits": BITS * max(0.0, -float(parts.min())),
        "largest certified gap of U, bits": BITS * float(found.gap.max()),
        "a joint alone, ms": 1e3 * alone,
        "a joint in a batch, ms": 1e3 * together / count,
        "a point of a 10 x 10 frontier, ms": 1e3 * grid / 100,
    }
    for solver in ("clarabel", "slsqp"):
        run = lambda solver=solver: aglfop(joint, eps_global=EPS, eps_local=EPS, solver=solver)  # noqa: E731
        figures[f"accuracy at ({EPS}, {EPS}), {solver}"] = run().accuracy
        figures[f"one point, {solver}, ms"] = 1e3 * median(seconds(run) for _ in range(5))
    return figures


def beside_dit(python: str, count: int) -> dict[str, float]:
    p = joints(count)
    task = {"joints": p.tolist(), "data": data().tolist(), "eps": EPS}
    ran = subprocess.run(
        [python, str(Path(__file__).with_name("aglfop_dit.py"))],
        input=json.dumps(task), capture_output=True, text=True, check=True,
    )  # fmt: skip
    its: dict[str, Any] = json.loads(ran.stdout)
    value = np.array(its["unique"])
    g, local, least = (BITS * a for a in (mutual(p.sum(1)), conditional(p), unique(p).value))
    parts = np.stack([g - value, local - value])
    return {
        "dit: joints": float(count),
        "dit: largest violation of R, M >= 0, bits": max(0.0, -float(parts.min())),
        "dit: joints with R or M < -1e-9": float((parts.min(0) < -SLACK).sum()),
        "dit: largest U above the least, bits": float((value - least).max()),
        "dit: joints with U above the least by 1e-5": float((value - least > 1e-5).sum()),
        "dit: largest U below ours, bits": float((least - value).max()),
        "dit: a joint alone, ms": 1e3 * median(its["seconds"]),
        "dit: a point of the frontier by SLSQP with PID, s": its["slsqp seconds"],
        "dit: decompositions for it": its["slsqp decompositions"],
        f"dit: its accuracy at ({EPS}, {EPS})": its["slsqp accuracy"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--joints", type=int, default=1000)
    parser.add_argument("--dit", help="a Python that has dit 2.3")
    parser.add_argument("--dit-joints", type=int, default=1000)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    figures = measure(args.joints)
    if args.dit:
        figures |= beside_dit(args.dit, args.dit_joints)
    if args.json:
        json.dump(figures, sys.stdout, indent=1)
        return
    table = Table("figure", "measured", title="AGLFOP, one thread", box=None)
    for name, value in figures.items():
        table.add_row(name, f"{value:.6g}")
    Console().print(table)


if __name__ == "__main__":
    main()
