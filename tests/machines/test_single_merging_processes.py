"""Single merging on torch.distributed: four gloo processes, started once."""

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
        return self.workers.call(f"single_merging_jobs:{job}", args)


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent))
        with Workers(4, threads=1) as workers:
            yield Pool(workers)


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize(
    "variant",
    ["random", "random, two peers", "pairwise", "ring", "left", "exponential+random", "matrix", "none"],
)
def test_gossip_between_processes_is_the_simulations_bit_for_bit(
    pool: Pool, variant: str, normalised: bool
) -> None:
    for rank in pool("equal_to_simulation", variant=variant, normalised=normalised, engine="loop"):
        assert rank["bits"] == rank["simulated"]
        assert rank["same ledger"]


@pytest.mark.parametrize("variant", ["single merge", "FedAvg", "linear"])
def test_dense_rounds_agree_up_to_the_order_of_the_sum(pool: Pool, variant: str) -> None:
    ranks = pool("equal_to_simulation", variant=variant, normalised=True, engine="loop")
    assert all(rank["away"] < 1e-8 for rank in ranks)
    assert all(rank["same ledger"] for rank in ranks)


def test_the_final_merge_leaves_the_same_bits_on_all_ranks(pool: Pool) -> None:
    ranks = pool("equal_to_simulation", variant="single merge", normalised=False, engine="batched")
    assert len({rank["bits"] for rank in ranks}) == 1
    assert all(rank["away"] < 1e-8 for rank in ranks)


def test_fedavg_sends_a_ring_every_round_and_none_sends_nothing(pool: Pool) -> None:
    fedavg = pool("equal_to_simulation", variant="FedAvg", normalised=False, engine="loop")[0]
    assert fedavg["sent"] == 8 * 2 * 3 * 8 * fedavg["numel"]
    assert pool("equal_to_simulation", variant="none", normalised=False, engine="loop")[0]["sent"] == 0


def test_a_message_carries_parameters_of_any_type(pool: Pool) -> None:
    for rank in pool("pulled_types"):
        assert rank["same"] == [True] * 6
    ranks = pool("mixed_types")
    assert ranks[0]["pulled"] == 4 * (2 * 63 + 8 * 20 + 4 * 18)
    assert ranks[0]["merged"] == 2 * 3 * (4 * 63 + 8 * 20 + 4 * 18)  # bfloat16 is added up in float32
    assert len({rank["bits"] for rank in ranks}) == 1


def test_the_merged_model_has_the_statistics_of_all_ranks_batches(pool: Pool) -> None:
    ranks = pool("batch_norm")
    assert len({rank["bits"] for rank in ranks}) == 1
    for rank in ranks:
        assert rank["away"] < 1e-12
        assert rank["unchanged"]
        assert rank["batches"] == 1 + 2 + 3 + 4
        assert rank["sent"] == 2 * 3 * (rank["size"] + 8 * 60 + 8)


def test_gossip_after_training_brings_the_nodes_together_and_a_merge_makes_them_one(pool: Pool) -> None:
    ranks = pool("ends_in_gossip")
    spread = ranks[0]["spread"]
    assert spread == sorted(spread, reverse=True)
    assert len({rank["bits"] for rank in ranks}) == 1
    assert ranks[0]["rounds"] == 8 + 3 + 1


def test_a_checkpoint_through_a_file_continues_bit_for_bit(pool: Pool) -> None:
    for rank in pool("resumed"):
        assert rank["whole"] == rank["resumed"]
        assert rank["said"] == "ValueError: the state's members is 5; this run has 4"


def test_all_ranks_name_the_rank_that_diverged_before_a_dense_round(pool: Pool) -> None:
    for rank, found in enumerate(pool("diverged", dense=True)):
        assert found["said"] == "Diverged: cannot average: rank 2: '0.weight' holds NaN or infinity"
        assert found["again"].startswith("RuntimeError: round 0 was refused, load a checkpoint on all ranks")
        assert found["finite"] == (rank != 2)
        assert found["all"] == 4  # nobody has been averaged


def test_those_who_would_hear_a_diverged_rank_name_it(pool: Pool) -> None:
    for rank, found in enumerate(pool("diverged", dense=False)):
        if rank in (2, 3):
            assert found["said"] == "Diverged: cannot average: rank 2: '0.weight' holds NaN or infinity"
        else:
            assert found["said"] == "nothing was raised"
        assert found["finite"] == (rank != 2)


def test_all_ranks_name_the_rank_without_calibration_batches(pool: Pool) -> None:
    for rank in pool("empty_loader_on_rank_1"):
        assert rank["said"].startswith("ValueError: rank 1: loader must give at least one batch")


def test_all_ranks_refuse_other_settings_on_one(pool: Pool) -> None:
    said = [rank["said"] for rank in pool("other_settings_on_rank_3")]
    assert all(text.startswith("SchemaError: rank ") for text in said)
    assert "rank 3 has another model or other settings than rank 0" in said[0]
    assert "seed=1" in said[0]
    assert "seed=9" in said[0]


@pytest.mark.parametrize(
    ("what", "named"), [("frozen", "frozen 0.bias "), ("statistics", "1.running_mean torch.float64 (30,)")]
)
def test_all_ranks_refuse_what_differs_beside_the_trainable_parameters(
    pool: Pool, what: str, named: str
) -> None:
    said = [rank["said"] for rank in pool("other_model_on_rank_3", what=what)]
    assert all(text.startswith("SchemaError: rank ") for text in said)
    assert all(named in text for text in said)


def test_two_ranks_that_hear_each_other_post_both_messages_as_one(pool: Pool) -> None:
    """On NCCL a receive that is posted before the send to the same rank blocks it."""
    rounds = [posted for rank in pool("posts") for posted in rank]
    assert rounds
    assert all(posted == ["irecv", "isend"] for posted in rounds)


def test_what_cannot_work_is_refused(pool: Pool) -> None:
    said = pool("refused")[0]
    assert said["ddp"].startswith("TypeError: the model must not be in DistributedDataParallel")
    assert said["fsdp"].startswith("TypeError: FSDP is not supported")
    assert said["dtensor"].startswith("TypeError: DTensor is not supported: parameter '0.weight'")
    assert said["peers"].endswith("peers must be in 0 .. members - 1 = 3; got 5.0")
    assert said["steps"].endswith("local_steps must be a whole number >= 1; got 0")
    assert said["over"].startswith("RuntimeError: the schedule's 1 rounds are over: detach()")
    assert said["unchanged"] == "True"
    assert said["detached"] == "True"
