"""Samplers: pure functions of seed and round, and what they draw is what they say."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cograd.engines.federated import Available, Bernoulli, Cyclic, Everyone, Uniform
from cograd.engines.federated.samplers import drawn

ROUNDS, SEEDS = st.integers(0, 50), st.integers(0, 5)
SAMPLERS = [
    Uniform(0.3),
    Uniform(count=4),
    Everyone(),
    Bernoulli(0.05),
    Bernoulli(1.0),
    Cyclic(0.3),
    Cyclic(count=7),
    Available(lambda client, round: (client + round) % 3 > 0, 4),
]


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda s: repr(s).split(" at ")[0])
@given(round=ROUNDS, seed=SEEDS, clients=st.integers(10, 40))
def test_they_draw_the_same_again_ascending_and_somebody(sampler, round, seed, clients):
    chosen = drawn(sampler, round, clients, seed)
    assert chosen == sampler(round, clients, seed)
    assert chosen == sorted(set(chosen))
    assert chosen
    assert 0 <= chosen[0] <= chosen[-1] < clients


def test_uniform_draws_so_many_each_as_often_as_any_other():
    assert all(len(Uniform(0.3)(r, 10, 0)) == len(Uniform(count=3)(r, 10, 0)) == 3 for r in range(20))
    counts = [0] * 10
    for round in range(1000):
        for client in Uniform(count=3)(round, 10, 0):
            counts[client] += 1
    assert all(240 < count < 360 for count in counts)  # 300, give or take four standard deviations
    assert Uniform(0.29)(0, 100, 0) == Uniform(count=29)(0, 100, 0)  # 0.29 * 100 is a hair below 29


def test_seeds_and_rounds_draw_differently():
    assert Uniform(0.5)(3, 10, 0) != Uniform(0.5)(4, 10, 0)
    assert Uniform(0.5)(3, 10, 0) != Uniform(0.5)(3, 10, 1)


def test_everyone_is_everyone():
    assert Everyone()(7, 4, 1) == [0, 1, 2, 3]


def test_bernoulli_draws_each_by_itself_and_again_while_there_is_nobody():
    share = sum(len(Bernoulli(0.3)(r, 100, 0)) for r in range(100)) / 10_000
    assert share == pytest.approx(0.3, abs=0.02)
    assert all(Bernoulli(0.01)(r, 5, 0) for r in range(50))


def test_cyclic_takes_them_in_turn():
    assert [Cyclic(count=2)(r, 5, 0) for r in range(3)] == [[0, 1], [2, 3], [0, 4]]
    assert Cyclic(count=2)(1, 5, 0) == Cyclic(count=2)(1, 5, 9)
    taken = [client for round in range(10) for client in Cyclic(0.1)(round, 100, 0)]
    assert sorted(taken) == list(range(100))


def test_available_takes_no_more_than_there_are():
    evens = Available(lambda client, round: client % 2 == round % 2, 2)
    for round in range(4):
        chosen = evens(round, 6, 0)
        assert len(chosen) == 2
        assert all(client % 2 == round % 2 for client in chosen)
    assert Available(lambda client, round: client < 2, 5)(0, 6, 0) == [0, 1]
    with pytest.raises(ValueError, match="it holds for none in round 3"):
        Available(lambda client, round: round < 3, 2)(3, 6, 0)


@pytest.mark.parametrize(
    ("sampler", "message"),
    [
        (Uniform(0.01), "participation must select 1 .. 10 of 10 clients; fraction=0.01 selects 0"),
        (Uniform(count=0), "count=0 selects 0"),
        (Uniform(count=11), "count=11 selects 11"),
        (Uniform(1.5), r"fraction must be in \(0, 1\]; got 1.5"),
        (Uniform(float("nan")), r"fraction must be in \(0, 1\]; got nan"),
        (Uniform(), "give either fraction or count; got fraction=None, count=None"),
        (Uniform(0.5, 3), "give either fraction or count; got fraction=0.5, count=3"),
        (Cyclic(0.0), "fraction=0.0 selects 0"),
        (Cyclic(count=11), "count=11 selects 11"),
        (
            lambda round, clients, seed: [],
            "sampler must select at least one client; .* selects none in round 0",
        ),
        (lambda round, clients, seed: [1, 1], r"each once; .* gives \[1, 1\] in round 0"),
        (lambda round, clients, seed: [2, 1], "ascending"),
        (lambda round, clients, seed: [10], r"sampler must give numbers of 0 .. 9"),
        (lambda round, clients, seed: [-1], r"sampler must give numbers of 0 .. 9"),
    ],
)
def test_what_selects_nobody_or_wrongly_is_refused(sampler, message):
    with pytest.raises(ValueError, match=message):
        drawn(sampler, 0, 10, 0)


@pytest.mark.parametrize("p", [0, -0.1, 1.1, float("nan")])
def test_bernoulli_refuses_what_is_no_probability(p):
    with pytest.raises(ValueError, match=r"p must be in \(0, 1\]; got"):
        Bernoulli(p)


def test_available_refuses_to_draw_nobody():
    with pytest.raises(ValueError, match="count must be >= 1; got 0"):
        Available(lambda client, round: True, 0)
