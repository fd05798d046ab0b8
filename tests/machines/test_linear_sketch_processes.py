"""The linear sketch on DistributedDataParallel: four gloo processes, started once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cograd.engines.launch import Workers

Pool = Callable[..., list[Any]]


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent))
        with Workers(4, threads=1) as workers:
            yield lambda job, **args: workers.call(f"linear_sketch_jobs:{job}", args)


@pytest.mark.parametrize("variant", ["srht", "momentum", "sparse", "gaussian"])
def test_replicas_are_the_same_bits_and_follow_the_simulation(pool: Pool, variant: str) -> None:
    """gloo adds in another order than one process does, so the two agree to rounding."""
    ranks = pool("against_simulation", variant=variant)
    assert len({rank["bits"] for rank in ranks}) == 1
    assert ranks[0]["off"] < 1e-12
    assert ranks[0]["sent"] == [60 * 8]


def test_a_checkpoint_through_a_file_continues_bit_for_bit(pool: Pool) -> None:
    assert all(rank["whole"] == rank["resumed"] for rank in pool("resumed"))


def test_all_ranks_refuse_another_seed_on_one(pool: Pool) -> None:
    texts = [rank["said"] for rank in pool("another_seed_on_rank_3")]
    assert all(text.startswith("SchemaError: rank ") for text in texts)
    assert "rank 3 has another model or other settings than rank 0" in texts[0]
    assert "seed=7" in texts[0]


def test_all_ranks_name_the_rank_whose_gradient_is_not_finite(pool: Pool) -> None:
    for rank in pool("not_finite_on_rank_2"):
        assert rank["said"] == "GradientError: rank 2: step 3: the gradient of '0.weight' holds NaN or infinity"
        assert rank["nothing changed"]
        assert rank["round"] == 3
