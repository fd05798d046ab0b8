"""Streams: pure functions of their key, distinct for distinct keys, the same numbers today as when written."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cograd.core.streams import GENERATOR, seed_for, stream

KEY_PARTS = st.one_of(st.integers(-(2**70), 2**70), st.text(max_size=4), st.binary(max_size=4))
KEYS = st.lists(KEY_PARTS, min_size=1, max_size=4).map(tuple)


def first_bits(*key: int | str | bytes) -> int:
    return int(stream(*key).numpy.bit_generator.random_raw())


def test_golden_values_notice_a_change_of_generator():
    draws = stream(7, "golden", 3)
    assert draws.normal(4).tolist() == [
        0.6717367172241211,
        0.2787872552871704,
        0.07947826385498047,
        0.6446781754493713,
    ]
    assert draws.uniform(4).tolist() == [
        0.9934461712837219,
        0.16693812608718872,
        0.6220017671585083,
        0.7802167534828186,
    ]
    assert draws.integer(1000) == 283
    assert draws.choice(20, 5).tolist() == [7, 9, 14, 17, 18]
    assert draws.permutation(6).tolist() == [1, 5, 0, 2, 4, 3]
    assert draws.dirichlet(0.5, 3).tolist() == [0.6938187368831271, 0.009718834051965655, 0.29646242906490716]
    assert seed_for(7, "x") == 7891528711926185918
    assert GENERATOR == "blake2b-philox4x64/1"


@given(KEYS)
def test_the_same_key_gives_the_same_numbers(key):
    assert torch.equal(stream(*key).normal(5), stream(*key).normal(5))


@given(KEYS, KEYS)
def test_distinct_keys_give_distinct_streams(a, b):
    assert (first_bits(*a) == first_bits(*b)) == (a == b)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ((1, "a"), ("1a",)),
        ((1, 23), (12, 3)),
        ((1, 2), ("12",)),
        ((1,), ("1",)),
        (("a",), (b"a",)),
        (("ab", "c"), ("a", "bc")),
        (("a", ""), ("a",)),
        ((0,), (0, 0)),
        ((-1,), (255,)),
        ((-1,), (1,)),
        ((2**32,), (0,)),
        ((2**64 + 5,), (5,)),
        ((1, 2), (2, 1)),
    ],
)
def test_keys_that_read_alike_do_not_collide(a, b):
    assert first_bits(*a) != first_bits(*b)


def test_100000_keys_have_no_collision():
    firsts = {first_bits(seed, "round", r) for seed in range(100) for r in range(1000)}
    assert len(firsts) == 100_000


def test_what_others_draw_in_between_changes_nothing():
    alone = stream(3, "a")
    expected = torch.cat([alone.normal(3), alone.uniform(3)])
    mine, other = stream(3, "a"), stream(3, "b")
    other.permutation(10)
    first = mine.normal(3)
    other.normal(100)
    torch.manual_seed(0)
    torch.randn(3)
    np.random.default_rng(0).normal()
    assert torch.equal(torch.cat([first, mine.uniform(3)]), expected)


def test_floats_are_float32_of_the_asked_shape():
    draws = stream(1)
    for drawn in (draws.normal(2, 3), draws.uniform(2, 3)):
        assert drawn.dtype == torch.float32
        assert drawn.shape == (2, 3)
    assert draws.normal().shape == ()


def test_uniform_lies_in_zero_one_and_normal_is_standard():
    u, z = stream(5).uniform(200_000), stream(6).normal(200_000)
    assert 0 <= float(u.min()) <= float(u.max()) < 1
    # five standard errors
    assert abs(float(u.mean()) - 0.5) < 5 * (1 / 12 / 200_000) ** 0.5
    assert abs(float(z.mean())) < 5 * 200_000**-0.5
    assert abs(float(z.var()) - 1) < 5 * (2 / 200_000) ** 0.5


@given(st.integers(0, 50), st.integers(0, 50))
def test_choice_is_ascending_and_distinct(n, k):
    if k > n:
        with pytest.raises(ValueError, match=rf"k must be in 0 \.\. n = {n}; got {k}"):
            stream(1).choice(n, k)
        return
    chosen = stream(n, k).choice(n, k)
    assert chosen.dtype == torch.int64
    assert chosen.tolist() == sorted(set(chosen.tolist()))
    assert len(chosen) == k
    assert all(0 <= i < n for i in chosen.tolist())


def test_choice_refuses_a_negative_count():
    with pytest.raises(ValueError, match=r"got -1"):
        stream(1).choice(5, -1)


def test_every_member_is_chosen_equally_often():
    draws = stream("choice")
    counts = torch.zeros(10)
    for _ in range(4000):
        counts[draws.choice(10, 3)] += 1
    # 4000 draws of probability 0.3: standard deviation 29
    assert float((counts - 1200).abs().max()) < 5 * 29


def test_permutation_and_integer_cover_their_range():
    draws = stream(2)
    assert sorted(draws.permutation(100).tolist()) == list(range(100))
    assert draws.permutation(3).dtype == torch.int64
    assert {draws.integer(4) for _ in range(200)} == {0, 1, 2, 3}


def test_dirichlet_takes_one_alpha_or_one_each():
    symmetric = stream(9).dirichlet(2.0, 4)
    assert symmetric.dtype == np.float64
    assert symmetric.sum() == pytest.approx(1)
    assert np.array_equal(symmetric, stream(9).dirichlet([2.0, 2.0, 2.0, 2.0]))


def test_seed_for_fits_63_bits_and_depends_on_the_key():
    seeds = {seed_for(s, "x") for s in range(1000)}
    assert len(seeds) == 1000
    assert all(0 <= s < 2**63 for s in seeds)


@pytest.mark.parametrize("part", [True, False, 1.0, None, (1, 2), np.int64(3), torch.tensor(3)])
def test_a_key_of_another_type_is_refused_by_name(part):
    with pytest.raises(TypeError, match=rf"holds int, str and bytes; got .*{type(part).__name__}"):
        stream(1, part)


def test_an_empty_key_is_refused():
    with pytest.raises(ValueError, match="needs a key"):
        stream()
