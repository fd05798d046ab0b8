"""DGC on DistributedDataParallel: four gloo processes, started once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cograd.engines.launch import Workers


class Pool:
    def __init__(self, workers: Workers) -> None:
        self.workers = workers

    def __call__(self, job: str, **args: Any) -> list[Any]:
        return self.workers.call(f"dgc_jobs:{job}", args)


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent))
        with Workers(4, threads=1) as workers:
            yield Pool(workers)


def same_bits(ranks: list[dict[str, Any]]) -> bool:
    return len({rank["bits"] for rank in ranks}) == 1


@pytest.mark.parametrize("variant", ["plain", "warm-up", "clipped", "nesterov", "half values", "dropping"])
def test_replicas_are_the_same_bits_and_those_of_a_simulation(pool: Pool, variant: str) -> None:
    ranks = pool("equal_to_simulation", variant=variant, steps=100)
    assert same_bits(ranks)
    assert ranks[0]["bits"] == ranks[0]["simulated"]
    assert all(rank["sent"] == ranks[0]["sent"] for rank in ranks)


def test_messages_of_any_size_arrive_whole(pool: Pool) -> None:
    sizes = [
        [0, 0, 0, 0],
        [5, 0, 9, 1],
        [200, 3, 0, 4000],
        [4100, 4200, 17, 0],
        [10_000, 1, 1, 1],
        [3, 2, 1, 0],
    ]
    for received in pool("gathered", sizes=sizes):
        assert received == [[True] * 4] * len(sizes)


def test_clipping_waits_for_the_last_of_several_buckets(pool: Pool) -> None:
    ranks = pool("many_buckets")
    assert ranks[0]["buckets"] >= 3
    assert same_bits(ranks)
    assert ranks[0]["bits"] == ranks[0]["simulated"]


def test_dense_stage_is_counted_once_as_payload_and_as_a_ring_on_the_wire(pool: Pool) -> None:
    ranks = pool("dense_stage")
    assert same_bits(ranks)
    assert ranks[0]["dense"] == 5
    assert ranks[0]["frame"] == pytest.approx(2 * 3 / 4, abs=1e-3)


def test_accumulation_under_no_sync_is_the_larger_batch(pool: Pool) -> None:
    parts, whole = (pool("accumulation", whole=flag)[0]["weights"] for flag in (False, True))
    torch.testing.assert_close(torch.tensor(parts), torch.tensor(whole), atol=1e-6, rtol=0)


def test_a_loss_scale_changes_no_bit_and_overflow_skips_the_step_everywhere(pool: Pool) -> None:
    with_scaler = pool("scaled", scaler=True, overflow_at=5, autocast=False)
    without = pool("scaled", scaler=False, overflow_at=5, autocast=False)
    assert same_bits(with_scaler)
    assert with_scaler[0]["bits"] == without[0]["bits"]
    assert {rank["scale"] for rank in with_scaler} == {2.0**9}
    assert with_scaler[0]["round"] == 11


def test_autocast_with_a_scaler_keeps_replicas_together(pool: Pool) -> None:
    assert same_bits(pool("scaled", scaler=True, overflow_at=-1, autocast=True))


def test_bfloat16_parameters_train_with_float32_state(pool: Pool) -> None:
    ranks = pool("half_weights")
    assert same_bits(ranks)
    assert ranks[0]["state"] == ["torch.float32"]
    assert sum(ranks[0]["losses"][-4:]) < 0.8 * sum(ranks[0]["losses"][:4])


def test_parameters_that_nobody_used_still_get_what_is_due_to_them(pool: Pool) -> None:
    ranks = pool("unused")
    assert same_bits(ranks)
    assert ranks[0]["bits"] == ranks[0]["simulated"]


def test_a_checkpoint_through_a_file_continues_bit_for_bit(pool: Pool) -> None:
    assert all(rank["whole"] == rank["resumed"] for rank in pool("resumed"))


@pytest.mark.parametrize("dense", [False, True])
def test_all_ranks_name_the_rank_whose_gradient_is_not_finite(pool: Pool, dense: bool) -> None:
    for rank in pool("not_finite_on_rank_2", dense=dense):
        assert rank["said"] == "GradientError: rank 2: step 3: the gradient of '0.weight' holds NaN or infinity"
        assert rank["nothing lost"]
        assert rank["round"] == 3


@pytest.mark.parametrize("dense", [False, True])
def test_all_ranks_name_the_rank_and_the_parameters_without_gradient(pool: Pool, dense: bool) -> None:
    for rank in pool("missing_on_rank_1", dense=dense):
        assert rank["said"].startswith("GradientError: rank 1: step 0: no gradient came for ")
        assert "'extra.weight'" in rank["said"]
        assert "find_unused_parameters=True" in rank["said"]


def test_all_ranks_refuse_other_settings_on_one(pool: Pool) -> None:
    said = [rank["said"] for rank in pool("other_settings_on_rank_3")]
    assert all(text.startswith("SchemaError: rank ") for text in said)
    assert "rank 3 has another model or other settings than rank 0" in said[0]
    assert "0.02" in said[0]
    assert "0.03" in said[0]


def test_what_cannot_work_is_refused_before_training(pool: Pool) -> None:
    said = pool("refused")[0]
    assert said["fsdp"].startswith("TypeError: FSDP is not supported")
    assert said["dtensor"].startswith("TypeError: DTensor is not supported: parameter '0.weight'")
    assert said["bare"] == "TypeError: the model must be wrapped in DistributedDataParallel; got Sequential"
    assert said["sparse"].startswith("GradientError: module '0' makes sparse gradients")
    assert said["momentum"].endswith("SGD has momentum=0.9")
    assert "Adam has betas=" in said["adam"]
    assert "maximize=True" in said["maximize"]
    assert said["partial"].endswith("'0.weight', '0.bias' missing")


def test_without_a_process_group_the_error_says_what_to_do() -> None:
    from cograd.engines.transport import TorchDist

    with pytest.raises(RuntimeError, match=r"init_process_group\(\) first.*torchrun or `cograd launch`"):
        TorchDist()
