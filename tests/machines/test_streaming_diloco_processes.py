"""Streaming DiLoCo on torch.distributed: three gloo processes, started once."""

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
        return self.workers.call(f"streaming_diloco_jobs:{job}", args)


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent))
        with Workers(3, threads=1) as workers:
            yield Pool(workers)


def test_outer_parameters_are_the_same_bits_after_200_steps_whatever_each_overlap(pool: Pool) -> None:
    ranks = pool("on_processes", variant="fp4", steps=219, overlaps=[1, 5, 3])
    assert len({rank["g"] for rank in ranks}) == 1
    assert len({rank["theta"] for rank in ranks}) == 3
    for rank in ranks:
        assert rank["theta"] == rank["theta in one process"]
        assert rank["g"] == rank["g in one process"]
        assert rank["sent"] == rank["sent in one process"] > 0
        assert rank["received"] == [10, 10, 10]


@pytest.mark.parametrize("variant", ["fp32", "blocks", "stochastic", "round robin", "torchft", "frozen"])
def test_processes_and_one_process_give_the_same_bits(pool: Pool, variant: str) -> None:
    ranks = pool("on_processes", variant=variant, steps=34, overlaps=[1, 1, 1])
    assert len({rank["g"] for rank in ranks}) == 1
    for rank in ranks:
        assert rank["theta"] == rank["theta in one process"]
        assert rank["g"] == rank["g in one process"]


def test_a_checkpoint_with_exchanges_in_flight_continues_bit_for_bit(pool: Pool) -> None:
    ranks = pool("resumed", overlaps=[1, 5, 9])
    assert [rank["in flight"] for rank in ranks] == [0, 1, 3]
    assert all(rank["whole"] == rank["resumed"] for rank in ranks)


def test_replicas_that_differ_are_refused_on_entry_and_overlap_may_differ(pool: Pool) -> None:
    for rank, said in enumerate(pool("other_on_rank_1")):
        there, here = ("0.5", "0.25") if rank == 1 else ("0.25", "0.5")
        other = 0 if rank == 1 else 1
        assert said["alpha"] == (
            f"SchemaError: replica {other} has other alpha than replica {rank}: {there} there, {here} here"
        )
        assert said["weights"].startswith(f"SchemaError: replica {other} has other initial weights")
        assert "has other fragments than replica" in said["fragments"]
        for case, usual, others in (
            ("shape", '["0.weight", [16, 8]]', '["0.weight", [12, 8]]'),
            ("order", '["0.weight", [16, 8]]', '["0.bias", [16]]'),
            ("same shapes", '["0.bias", [16]]', '["2.bias", [16]]'),
        ):
            there, here = (usual, others) if rank == 1 else (others, usual)
            assert said[case] == (
                f"SchemaError: replica {other} has other parameters than replica {rank}: "
                f"{there} there, {here} here"
            )
        assert said["overlap"] == ""


@pytest.mark.parametrize("exact", [False, True])
def test_all_replicas_name_the_one_whose_outer_gradient_is_not_finite(pool: Pool, exact: bool) -> None:
    for rank in pool("not_finite_on_rank_1", exact=exact):
        assert rank["said"] == (
            "GradientError: replica 1: step 10, fragment 'first': no outer gradient to send: "
            "it holds NaN or infinity"
        )
        assert rank["same"]
        assert rank["received"] == 0


def test_outer_parameters_that_drifted_are_found_at_the_next_exchange(pool: Pool) -> None:
    for said in pool("drifted_on_rank_1"):
        assert said == (
            "ReplicasApart: step 10, fragment 'first': "
            "the outer parameters of replica 1 are not those of replica 0"
        )


def test_averaging_after_every_sgd_step_is_data_parallel_sgd(pool: Pool) -> None:
    assert max(pool("data_parallel")) < 1e-6
