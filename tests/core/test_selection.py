"""Selection: exactly the top k with ties to the lower position, and sampled thresholds within their bounds."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cograd.core.selection import BLOCK, UNDER, Blocks, Exact, Sampled, exact, largest, sample_stride, sampled
from core.support import cauchy, gaussian

N = 10**6
SAMPLED = Sampled(0.01, exact_below=0)
INTEGERS = st.lists(st.integers(-3, 3), max_size=150).map(lambda v: torch.tensor(v, dtype=torch.float32))


def top_positions(x: Tensor, k: int) -> list[int]:
    """The reference: a stable sort by descending magnitude, so that ties go to the lower position."""
    return sorted(torch.sort(x.abs(), descending=True, stable=True).indices[:k].tolist())


def select(threshold: Exact | Sampled, x: Tensor, k: int, seed: int = 0, round: int = 0) -> Tensor:
    return threshold.select(x, (len(x),), [k], seed, round, 0)


# Exact


@given(INTEGERS, st.integers(0, 160))
def test_ties_go_to_the_lower_position(x, k):
    k = min(k, len(x))
    assert exact(x, k).tolist() == top_positions(x, k)
    if k:
        assert largest(x.abs(), k).tolist() == top_positions(x, k)


@pytest.mark.parametrize("n", [*range(1, 36), 63, 64, 65, 1000, 1023, 1055, 5000])
@pytest.mark.parametrize("k", [1, 2, 7])
def test_exact_is_topk_at_every_length(n, k):
    x = gaussian(n, "exact", n)
    k = min(n, k)
    assert exact(x, k).tolist() == sorted(x.abs().topk(k).indices.tolist())


@pytest.mark.parametrize("remainder", [1, 5, 31])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_may_lie_in_the_tail(remainder, sign):
    n = BLOCK * 40 + remainder
    x = gaussian(n, "tail")
    k = min(remainder, 5)
    x[-k:] = sign * (10 + torch.arange(k))
    assert exact(x, k).tolist() == list(range(n - k, n))
    assert exact(x, k + 1).tolist() == top_positions(x, k + 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("k", [1, 10, 31, 32, 300, 1999, 2000])
def test_exact_in_every_dtype(dtype, k):
    x = gaussian(2000, "dtypes", dtype=dtype)
    assert exact(x, k).tolist() == top_positions(x, k)


@pytest.mark.parametrize("value", [0.0, 1.0, -2.0])
@pytest.mark.parametrize("threshold", [Exact(), Sampled(0.05)])
def test_a_constant_tensor_gives_its_first_entries(value, threshold):
    x = torch.full((3000,), value)
    assert select(threshold, x, 60).tolist() == list(range(60))


def test_heavy_ties_over_blocks():
    x = (gaussian(10_000, "ties") * 2).round()
    for k in (1, 50, 500, 5000):
        assert exact(x, k).tolist() == top_positions(x, k)


def test_positions_are_of_the_whole_vector():
    x = torch.tensor([1.0, 5.0, 0.0, 9.0, 2.0, 7.0])
    for threshold in (Exact(), Sampled(1.0)):
        found = threshold.select(x, (2, 0, 3, 1), [1, 0, 2, 1], 0, 0, 0)
        assert found.tolist() == [1, 3, 4, 5]
        assert found.dtype == torch.int64


@pytest.mark.parametrize("threshold", [Exact(), Sampled()])
def test_no_segment_and_no_count_find_nothing(threshold):
    assert threshold.select(torch.empty(0), (), [], 0, 0, 0).dtype == torch.int64
    assert threshold.select(gaussian(50, 1), (50,), [0], 0, 0, 0).tolist() == []


@pytest.mark.parametrize("threshold", [Exact(), Sampled()])
def test_as_many_counts_as_segments(threshold):
    with pytest.raises(ValueError, match=r"shorter|longer"):
        threshold.select(torch.zeros(4), (2, 2), [1], 0, 0, 0)


# Blocks


@pytest.mark.parametrize("n", [0, 5, 31, 32, 100, 3217])
@pytest.mark.parametrize("threshold", [0.0, 0.5, 2.0, 99.0])
def test_blocks_find_what_a_plain_search_finds(n, threshold):
    x = gaussian(n, "blocks")
    found = Blocks(x).reaching(torch.tensor(threshold))
    assert found.tolist() == (x.abs() >= threshold).nonzero().squeeze(1).tolist()


def test_block_maxima_are_of_magnitudes_and_leave_the_vector_alone():
    x = gaussian(32 * 7 + 3, "maxima")
    before = x.clone()
    assert torch.equal(Blocks(x).maxima, x[: 32 * 7].view(32, 7).abs().amax(0))
    assert torch.equal(x, before)


# Sampled


@pytest.mark.parametrize("draw", [gaussian, cauchy])
@pytest.mark.parametrize("seed", range(4))
def test_a_sampled_threshold_finds_between_four_fifths_and_all_of_k(draw, seed):
    x, k = draw(N, "sampled", seed), N // 1000
    for round in range(3):
        found = select(SAMPLED, x, k, seed, round)
        assert UNDER * k <= len(found) <= k
        assert found.tolist() == sorted(x.abs().topk(len(found)).indices.tolist())


def test_the_sample_start_depends_on_seed_round_and_party_alone():
    x, k = gaussian(100_000, "start"), 1000

    def positions(seed: int, round: int, party: int) -> tuple[int, ...]:
        return tuple(SAMPLED.select(x, (len(x),), [k], seed, round, party).tolist())

    assert positions(1, 2, 3) == positions(1, 2, 3)
    for vary in (lambda i: (i, 2, 3), lambda i: (1, i, 3), lambda i: (1, 2, i)):
        assert len({positions(*vary(i)) for i in range(10)}) > 1


@given(st.lists(st.integers(0, 90), max_size=4), st.integers(0, 5))
def test_a_ratio_of_one_is_exact(layout, seed):
    x = gaussian(sum(layout), "ratio", seed)
    counts = [math.ceil(n * 0.1) for n in layout]
    arguments = (x, tuple(layout), counts, seed, 0, 0)
    assert torch.equal(Sampled(1.0).select(*arguments), Exact().select(*arguments))


@pytest.mark.parametrize("n", [5, 40, 2000])
def test_two_expected_entries_or_fewer_are_searched_exactly(n):
    x = gaussian(n, "small")
    for k in (1, 2):
        assert select(SAMPLED, x, k).tolist() == top_positions(x, k)


@given(INTEGERS, st.integers(1, 150), st.integers(2, 40), st.integers(0, 39))
def test_a_sampled_search_never_finds_more_than_k(x, k, stride, start):
    if not len(x):
        return
    k, stride = min(k, len(x)), min(stride, len(x))
    found = sampled(x, k, stride, start % stride).tolist()
    assert len(found) <= k
    assert found == sorted(set(found))
    if len(found) == k:
        assert found == top_positions(x, k)


def test_a_threshold_that_finds_too_few_gives_way_to_an_exact_search():
    # every sampled entry is 5 and the others are 1: the sample says 5, which only a ninth reaches
    x = torch.ones(900)
    x[::9] = 5.0
    assert len(sampled(x, 450, 9, 0)) == 450
    assert sampled(x, 450, 9, 0).tolist() == top_positions(x, 450)


def test_segments_below_the_limit_are_searched_exactly():
    x, k = gaussian(5000, "below"), 50
    assert select(Sampled(0.01, exact_below=5001), x, k).tolist() == top_positions(x, k)


@given(
    st.integers(1, 3_000_000),
    st.floats(1e-4, 1, exclude_min=True),
    st.floats(1e-3, 1, exclude_min=True),
)
def test_the_stride_is_odd_and_samples_enough(numel, density, ratio):
    stride = sample_stride(numel, density, ratio)
    wanted = max(math.ceil(ratio * numel), math.ceil(2 / density))
    assert stride % 2 == 1
    assert stride == 1 or numel // stride >= wanted


@pytest.mark.parametrize(
    ("numel", "density", "ratio", "stride"),
    [(N, 0.001, 0.01, 97), (N, 0.001, 1.0, 1), (2000, 0.001, 0.01, 1), (100_000, 0.001, 0.01, 49)],
)
def test_strides_worked_out_by_hand(numel, density, ratio, stride):
    assert sample_stride(numel, density, ratio) == stride


@pytest.mark.parametrize("ratio", [0, -1, 1.5, math.nan])
def test_a_ratio_outside_zero_one_is_refused(ratio):
    with pytest.raises(ValueError, match=rf"ratio must be in \(0, 1\]; got {ratio}"):
        Sampled(ratio)
