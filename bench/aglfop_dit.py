"""The part of `bench.aglfop` that needs dit: decompositions, and SLSQP with a decomposition in its constraints.

Reads the task as JSON from standard input and writes what was found; imports nothing of cograd.
"""

from __future__ import annotations

import itertools
import json
import sys
import time

import dit
import numpy as np
from scipy.optimize import minimize

CELLS = ["".join(cell) for cell in itertools.product("01", repeat=3)]


def unique_information(p: np.ndarray) -> float:
    """Of the prediction about the group with respect to the client, in bits; p is P(s,z,h)."""
    kept = [(cell, mass) for cell, mass in zip(CELLS, p.ravel(), strict=True) if mass > 1e-12]
    names, masses = zip(*kept, strict=True)
    whole = sum(masses)
    joint = dit.Distribution(list(names), [mass / whole for mass in masses])
    return float(dit.pid.PID_BROJA(joint, [[0], [2]], [1]).get_pi(((2,),)))


def information(p: np.ndarray) -> float:
    """I(A;B) of a joint (A, B) in bits."""
    product = p.sum(1, keepdims=True) * p.sum(0)
    some = p > 1e-15
    return float((p[some] * np.log2(p[some] / product[some])).sum())


def decompositions(joints: np.ndarray) -> tuple[list[float], list[float]]:
    values, took = [], []
    for p in joints:
        began = time.perf_counter()
        values.append(unique_information(p))
        took.append(time.perf_counter() - began)
    return values, took


class Point:
    """A point of the frontier: unknowns are the 16 entries of P(s,z,y,h)."""

    def __init__(self, data: np.ndarray, eps: float) -> None:
        self.data, self.eps, self.calls = data, eps, 0

    def parts(self, x: np.ndarray) -> tuple[float, float, float]:
        """Unique, redundant and masked disparity."""
        self.calls += 1
        p = np.clip(x, 1e-9, None).reshape(2, 2, 2, 2).sum(2)
        p = p / p.sum()
        u = unique_information(p)
        own = sum(client.sum() * information(client / client.sum()) for client in p)
        return u, information(p.sum(0)) - u, own - u

    def global_(self, x: np.ndarray) -> float:
        u, redundant, _ = self.parts(x)
        return self.eps - (u + redundant)

    def local(self, x: np.ndarray) -> float:
        u, _, masked = self.parts(x)
        return self.eps - (u + masked)

    def solve(self) -> float:
        wrong = np.tile([0.0, 1.0, 1.0, 0.0], 4)
        sums = np.kron(np.eye(8), [1.0, 1.0])
        found = minimize(
            lambda x: wrong @ x, np.random.default_rng(0).random(16), method="SLSQP", bounds=[(0, 1)] * 16,
            constraints=[
                {"type": "eq", "fun": lambda x: sums @ x - self.data.ravel()},
                {"type": "ineq", "fun": self.global_},
                {"type": "ineq", "fun": self.local},
            ],
        )  # fmt: skip
        return 1 - float(found.fun)


def main() -> None:
    task = json.load(sys.stdin)
    values, took = decompositions(np.array(task["joints"]))
    point = Point(np.array(task["data"]), task["eps"])
    began = time.perf_counter()
    accuracy = point.solve()
    found = {
        "unique": values,
        "seconds": took,
        "slsqp accuracy": accuracy,
        "slsqp seconds": time.perf_counter() - began,
        "slsqp decompositions": point.calls,
    }
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
