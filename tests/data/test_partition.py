"""Partitions: every row once, the promised sizes, class mixes as drawn, and reports equal to closed forms."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cograd import data

BALANCED = torch.arange(2000) % 10
IID_7_2_0 = [[0, 1, 2, 6], [3, 4, 5]]
DIRICHLET_4 = [
    [110, 16, 26, 28, 5, 113, 17, 73, 9, 103],
    [2, 94, 9, 93, 52, 7, 169, 29, 6, 39],
    [4, 17, 50, 75, 142, 69, 7, 75, 60, 1],
    [84, 73, 115, 4, 1, 11, 7, 23, 125, 57],
]


@st.composite
def labels_and_parties(draw: st.DrawFn) -> tuple[Tensor, int]:
    labels = draw(st.lists(st.integers(-3, 6), min_size=1, max_size=120))
    return torch.tensor(labels), draw(st.integers(1, len(labels)))


def covers_once(partition: data.Partition, n: int) -> bool:
    return torch.cat(partition.parts).sort().values.tolist() == list(range(n))


def ascending(partition: data.Partition) -> bool:
    return all(part.dtype == torch.int64 and bool((part.diff() > 0).all()) for part in partition.parts)


@given(labels_and_parties(), st.sampled_from([1e-4, 0.1, 1.0, 50.0]), st.integers(0, 2**40))
@settings(max_examples=80, deadline=None, derandomize=True)
def test_every_row_goes_to_exactly_one_party(case: tuple[Tensor, int], alpha: float, seed: int) -> None:
    labels, parties = case
    n = len(labels)
    even = [n // parties + (k < n % parties) for k in range(parties)]
    for partition in (data.iid(n, parties, seed), data.dirichlet(labels, parties, alpha, seed)):
        assert list(partition.sizes) == even
        assert covers_once(partition, n)
        assert ascending(partition)
    for partition in (
        data.dirichlet(labels, parties, alpha, seed, equal=False, min_size=0),
        data.shards(labels, parties, n // parties, seed),
        data.by_source(labels),
        data.by_source(labels, len(labels.unique())),
    ):
        assert covers_once(partition, n)
        assert ascending(partition)


@pytest.mark.parametrize(
    "make",
    [
        lambda seed: data.iid(2000, 7, seed),
        lambda seed: data.dirichlet(BALANCED, 7, 0.5, seed),
        lambda seed: data.dirichlet(BALANCED, 7, 0.5, seed, equal=False),
        lambda seed: data.shards(BALANCED, 7, 3, seed),
    ],
)
def test_a_partition_is_a_function_of_its_seed(make: Callable[[int], data.Partition]) -> None:
    first, again, other = make(3).parts, make(3).parts, make(4).parts
    assert all(map(torch.equal, first, again))
    assert not all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_the_draws_of_iid_are_pinned() -> None:
    """Recorded once: a change here changes every federated result on record."""
    assert [part.tolist() for part in data.iid(7, 2, 0).parts] == IID_7_2_0
    assert data.dirichlet(BALANCED, 4, 0.3, 0).report(BALANCED).histogram.tolist() == DIRICHLET_4


@pytest.mark.parametrize("equal", [True, False])
@pytest.mark.parametrize("alpha", [0.1, 0.3, 1.0, 10.0])
def test_dirichlet_mixes_are_as_far_from_uniform_as_drawn(alpha: float, equal: bool) -> None:
    drawn = np.random.default_rng(0).dirichlet([alpha] * 10, 20_000)
    expected = np.abs(drawn - 0.1).sum(1).mean() / 2
    reports = [data.dirichlet(BALANCED, 20, alpha, seed, equal=equal).report(BALANCED) for seed in range(10)]
    assert np.mean([report.total_variation for report in reports]) == pytest.approx(expected, rel=0.08)


def test_equal_dirichlet_keeps_its_mixes_on_unbalanced_classes() -> None:
    labels = torch.cat([torch.zeros(900), torch.ones(90), torch.full((10,), 2)]).long()
    partition = data.dirichlet(labels, 4, 1.0, 0)
    assert partition.sizes == (250,) * 4
    assert partition.report(labels).histogram.sum(0).tolist() == [900, 90, 10]


def test_unequal_dirichlet_respects_min_size_or_says_that_it_cannot() -> None:
    assert min(data.dirichlet(BALANCED, 10, 0.2, 0, equal=False, min_size=40).sizes) >= 40
    with pytest.raises(ValueError, match=r"min_size must be .* alpha=0.01 .* 50 parties"):
        data.dirichlet(BALANCED, 50, 0.01, 0, equal=False, min_size=10)


@pytest.mark.parametrize("per_party", [1, 2, 5])
def test_shards_give_a_party_no_more_classes_than_shards(per_party: int) -> None:
    labels = BALANCED[torch.randperm(2000, generator=torch.Generator().manual_seed(0))]
    report = data.shards(labels, 20, per_party, 0).report(labels)
    assert ((report.histogram > 0).sum(1) <= per_party).all()
    assert set(report.sizes) == {100}


def test_sources_stay_whole_and_groups_are_balanced() -> None:
    sources = ["news"] * 50 + ["humor"] * 20 + ["lore"] * 20 + ["romance"] * 12
    apart = data.by_source(sources)
    assert apart.names == ("humor", "lore", "news", "romance")
    assert apart.sizes == (20, 20, 50, 12)
    grouped = data.by_source(sources, 2)
    assert grouped.names == ("news", "humor+lore+romance")
    assert grouped.sizes == (50, 52)


def test_report_of_parties_with_one_class_each_is_the_closed_form() -> None:
    labels = torch.tensor([5] * 10 + [-2] * 10)
    report = data.by_source(labels).report(labels)
    assert report.classes == (-2, 5)
    assert report.histogram.tolist() == [[10, 0], [0, 10]]
    assert report.total_variation == pytest.approx(0.5)
    # KL((1, 0) || (3/4, 1/4)) and KL((1/2, 1/2) || (3/4, 1/4)), halved and summed, in bits
    expected = (math.log2(4 / 3) + (math.log2(2 / 3) + math.log2(2)) / 2) / 2
    assert report.jensen_shannon == pytest.approx(expected)
    assert report.effective_classes.tolist() == [1.0, 1.0]


def test_report_of_identical_mixes_is_zero() -> None:
    labels = torch.arange(40) % 4
    report = data.by_source(torch.arange(40) // 20).report(labels)
    assert report.total_variation == 0
    assert report.jensen_shannon == pytest.approx(0, abs=1e-12)
    assert report.effective_classes.tolist() == pytest.approx([4, 4])


def test_report_leaves_empty_parties_out_of_its_means() -> None:
    labels = torch.tensor([0] * 10 + [1] * 10)
    parts = (torch.arange(10), torch.arange(10, 20), torch.arange(0))
    report = data.Partition(parts, "by hand", ("a", "b", "c")).report(labels)
    assert report.total_variation == pytest.approx(0.5)
    assert report.effective_classes.tolist() == [1, 1, 0]


def test_report_reads_in_a_terminal() -> None:
    text = str(data.dirichlet(BALANCED, 30, 0.3, 0).report(BALANCED))
    assert "dirichlet(alpha=0.3, equal sizes, seed=0): 30 parties of 66 to 67 rows" in text
    assert text.endswith("... 10 more")
    assert max(map(len, text.splitlines())) <= 110


@given(st.integers(1, 60), st.integers(1, 60), st.integers(0, 5), st.booleans())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_batches_cover_an_epoch(n: int, batch_size: int, epoch: int, drop_last: bool) -> None:
    if drop_last and batch_size > n:
        with pytest.raises(ValueError, match=f"batch_size must be in 1 .. {n}; got {batch_size}"):
            data.batches(n, batch_size, 0, epoch)
        return
    got = list(data.batches(n, batch_size, 0, epoch, drop_last=drop_last))
    rows = torch.cat(got).tolist()
    assert len(set(rows)) == len(rows) == (n - n % batch_size if drop_last else n)
    assert {len(batch) for batch in got[:-1]} <= {batch_size}
    assert set(rows) <= set(range(n))


def test_batches_are_a_function_of_seed_and_epoch() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        return torch.cat(list(data.batches(100, 10, seed, epoch))).tolist()

    assert order(1, 2) == order(1, 2)
    assert len({tuple(order(*key)) for key in [(1, 2), (1, 3), (2, 2)]}) == 3


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: data.iid(0, 1, 0), ValueError, "n must be at least 1; got 0"),
        (lambda: data.iid(5, 6, 0), ValueError, "parties must be in 1 .. 5; got 6"),
        (lambda: data.iid(5, 0, 0), ValueError, "parties must be in 1 .. 5; got 0"),
        (lambda: data.iid(5, 2.0, 0), TypeError, "parties must be an int; got 2.0 of type float"),
        (lambda: data.iid(5, True, 0), TypeError, "parties must be an int; got True"),
        (lambda: data.dirichlet(BALANCED, 2001, 1.0, 0), ValueError, "parties must be in 1 .. 2000"),
        (lambda: data.dirichlet(BALANCED, 2, 0.0, 0), ValueError, "alpha must be positive and finite; got 0"),
        (lambda: data.dirichlet(BALANCED, 2, -1, 0), ValueError, "alpha must be positive and finite; got -1"),
        (lambda: data.dirichlet(BALANCED, 2, math.nan, 0), ValueError, "alpha must be .*; got nan"),
        (lambda: data.dirichlet(BALANCED, 2, math.inf, 0), ValueError, "alpha must be .*; got inf"),
        (lambda: data.dirichlet(BALANCED, 2, "1", 0), TypeError, "alpha must be a number; got '1'"),
        (
            lambda: data.dirichlet(BALANCED, 10, 1.0, 0, min_size=201),
            ValueError,
            "min_size must be in 0 .. 200; got 201",
        ),
        (lambda: data.dirichlet(BALANCED.float(), 2, 1.0, 0), TypeError, "labels must be .* integer"),
        (lambda: data.dirichlet(BALANCED > 3, 2, 1.0, 0), TypeError, "labels must be .* integer"),
        (lambda: data.dirichlet([0, 1], 2, 1.0, 0), TypeError, "labels must be a tensor; got list"),
        (lambda: data.dirichlet(BALANCED.view(2, -1), 2, 1.0, 0), ValueError, "labels must be 1-D"),
        (lambda: data.dirichlet(BALANCED[:0], 2, 1.0, 0), ValueError, "labels must be 1-D and not empty"),
        (
            lambda: data.shards(BALANCED, 100, 21, 0),
            ValueError,
            "shards_per_party must be in 1 .. 20; got 21",
        ),
        (lambda: data.by_source([]), ValueError, "sources must name"),
        (lambda: data.by_source(["a", "b"], 3), ValueError, "parties must be in 1 .. 2; got 3"),
        (lambda: data.batches(10, 0, 0, 0), ValueError, "batch_size must be in 1 .. 10; got 0"),
        (lambda: data.batches(10, 5, 0, -1), ValueError, "epoch must be at least 0; got -1"),
        (lambda: data.iid(9, 3, 0).report(BALANCED[:8]), ValueError, "labels must cover row 8"),
    ],
)
def test_bad_arguments_are_refused_by_name(
    call: Callable[[], object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        call()
