"""Coded training on real processes: a master and four workers, started once, over TCP mailboxes.

Stragglers are scripted: a worker holds its result until it is told or overtaken, so nothing depends on time.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cograd.engines.launch import Workers


class Pool:
    def __init__(self, workers: Workers) -> None:
        self.workers = workers

    def __call__(self, job: str, **args: Any) -> dict[str, Any]:
        """What the master, rank 0, returns."""
        result: dict[str, Any] = self.workers.call(f"gradient_coding_jobs:{job}", args)[0]
        return result


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent))
        with Workers(5, threads=1) as workers:
            yield Pool(workers)


@pytest.mark.parametrize(
    ("scheme", "arguments"),
    [
        ("Uncoded", {"n": 4}),
        ("GC", {"n": 4, "s": 1, "code": "cyclic"}),
        ("GC", {"n": 4, "s": 1, "code": "repetition"}),
        ("SRSGC", {"n": 4, "B": 1, "W": 2, "lam": 2}),
        ("MSGC", {"n": 4, "B": 1, "W": 2, "lam": 2}),
        ("MSGC", {"n": 4, "B": 1, "W": 3, "lam": 4}),
    ],
)
def test_real_workers_and_a_simulation_with_the_same_survivors_give_the_same_bits(
    pool: Pool, scheme: str, arguments: dict[str, Any]
) -> None:
    found = pool("same_as_simulation", scheme=scheme, arguments=arguments)
    assert found["real"] == found["simulated"]
    assert found["real"]["waits"] > 0


@pytest.mark.parametrize(
    ("scheme", "arguments", "stop", "in_flight"),
    [
        ("MSGC", {"n": 4, "B": 1, "W": 3, "lam": 2}, 6, 2),
        ("SRSGC", {"n": 4, "B": 1, "W": 2, "lam": 2}, 5, 1),
        ("GC", {"n": 4, "s": 1}, 5, 0),
    ],
)
def test_new_workers_get_the_weights_of_all_jobs_in_flight(
    pool: Pool, scheme: str, arguments: dict[str, Any], stop: int, in_flight: int
) -> None:
    found = pool("resumed", scheme=scheme, arguments=arguments, stop=stop)
    assert found["in_flight"] == in_flight
    assert found["bits"] == found["simulated"]


def test_a_worker_that_fails_and_starts_again_asks_for_the_weights_that_it_lacks(pool: Pool) -> None:
    ranks = pool.workers.call("gradient_coding_jobs:restarted", {})
    assert ranks[0]["bits"] == ranks[0]["simulated"]
    assert ranks[0]["waits"] == 0
    assert [rank.get("crashed", False) for rank in ranks] == [False, False, True, False, False]


def test_a_probe_of_real_workers_is_what_select_takes(pool: Pool) -> None:
    found = pool("probed")
    assert found["shapes"] == [[12, 4], [3, 4]]
    assert found["loads"] == [0.25, 0.5]
    assert max(found["means"]) == found["means"][2] > 0.2
    assert found["chosen"].startswith("GC(n=4, s=")


def test_on_real_time_the_weights_are_those_of_uncoded_training(pool: Pool) -> None:
    found = pool("on_real_time")
    assert found["error"] < 1e-6  # float32 weights; rounding of decoded float64 sums
    assert found["seconds"] > 0


def test_a_lost_worker_is_a_straggler_for_as_long_as_the_code_allows(pool: Pool) -> None:
    assert pool("losing_workers", dying=1) == {"said": "", "updates": 6}
    two = pool("losing_workers", dying=2)
    assert two["said"].startswith("member ")
    assert "round 0 cannot end without it" in two["said"]
    assert two["updates"] == 0


def test_what_cannot_work_is_refused(pool: Pool) -> None:
    said = pool("refused")["said"]
    assert said[0].startswith("the mailbox must know members 0 .. n - 1 = 4 and be another; it is 4")
    assert said[1] == "1 vectors of 83 torch.float64 are 664 bytes; got 4"
