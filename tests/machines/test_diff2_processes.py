"""DIFF2 over torch.distributed: three gloo processes, started once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cograd.engines.launch import Workers


class Pool:
    def __init__(self, workers: Workers) -> None:
        self.workers = workers

    def __call__(self, job: str, **args: Any) -> list[Any]:
        return self.workers.call(f"diff2_jobs:{job}", args)


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent))
        with Workers(3, threads=1) as workers:
            yield Pool(workers)


@pytest.mark.parametrize("variant", ["message", "aggregate", "local", "local, aggregate"])
def test_processes_and_one_process_take_the_same_steps(pool: Pool, variant: str) -> None:
    """By gathered messages to the bit; an all-reduce adds in an order of its own."""
    ranks = pool("equal_to_one_process", variant=variant, cache=variant == "aggregate")
    assert len({rank["bits"] for rank in ranks}) == 1
    for rank in ranks:
        if "aggregate" in variant:
            assert rank["far"] < 1e-6
        else:
            assert rank["bits"] == rank["one"]
        assert rank["model"] == rank["bits"]
        assert rank["same messages"]
        assert all(rank["epsilon"])


def test_each_process_counts_its_own_evaluations(pool: Pool) -> None:
    ranks = pool("equal_to_one_process", variant="message", cache=False)
    for index, rank in enumerate(ranks):
        of_all = [n * (3 + 2 * 7) for n in (30, 40, 50)]
        assert rank["evaluations"] == [n if i == index else 0 for i, n in enumerate(of_all)]


@pytest.mark.parametrize("variant", ["message", "local"])
def test_a_checkpoint_moves_between_processes_and_one_process_bit_for_bit(pool: Pool, variant: str) -> None:
    assert all(rank["whole"] == rank["resumed"] for rank in pool("resumed", variant=variant))


@pytest.mark.parametrize("variant", ["message", "aggregate", "local"])
def test_all_ranks_name_the_worker_whose_gradient_is_not_finite(pool: Pool, variant: str) -> None:
    for rank in pool("not_finite_on_rank_1", variant=variant):
        assert (
            rank["said"] == "GradientError: worker 1: round 2: the gradient of a record holds NaN or infinity"
        )
        assert rank["same"]
        assert rank["recovers"]


def test_all_ranks_refuse_another_plan_on_one(pool: Pool) -> None:
    said = [rank["said"] for rank in pool("other_plan_on_rank_2")]
    assert all(text.startswith("SchemaError: rank ") for text in said)
    assert "rank 2 has another model or plan than rank 0" in said[0]
    assert "clip=2.0" in said[0]


def test_what_cannot_work_is_refused(pool: Pool) -> None:
    for said in pool("refused"):
        assert (
            said["ranks"] == "ValueError: plan must be for as many workers as there are ranks, 3; got one for 2"
        )
        assert said["all"] == "ValueError: workers must hold the records of 1 workers here; got 3"


def test_secure_noise_keeps_ranks_together(pool: Pool) -> None:
    assert len({rank["bits"] for rank in pool("secure")}) == 1
