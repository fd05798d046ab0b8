"""FedFix's schedules: a pure function of response times, the same by events and by ticks."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cograd.clients.fedfix import Aggregation, Arrivals, Every, response_times, schedule, surrogate
from cograd.clients.fedfix.schedule import Scheme
from cograd.engines.federated.simulation import TICKS

F80 = response_times("F-80", 10)
SCHEMES: list[Scheme] = [Every(0.5), Every(0.2), Every(0.07), Arrivals(1), Arrivals(3), Arrivals()]


def by_ticks(scheme: Scheme, times: list[int], until: int) -> list[Aggregation]:
    """The definition, one tick after another: who is back, and is it time?"""
    back, origin, found = dict(enumerate(times)), [0] * len(times), []
    for now in range(1, until + 1):
        while True:
            here = sorted((when, client) for client, when in back.items() if when <= now)
            if isinstance(scheme, Every):
                if now < (len(found) + 1) * round(scheme.period * TICKS):
                    break
            elif len(here) < (scheme.count or len(times)):
                break
            else:
                here = here[: scheme.count]
            taken = sorted(client for _, client in here)
            found.append(Aggregation(now / TICKS, tuple(taken), tuple(origin[i] for i in taken)))
            for client in taken:
                origin[client] = len(found)
                back[client] = now + times[client]
    return found


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=6),
    st.one_of(
        st.integers(1, 40).map(lambda p: Every(p / TICKS)), st.integers(0, 6).map(lambda c: Arrivals(c or None))
    ),
)
def test_events_and_ticks_agree_on_every_aggregation(ticks: list[int], scheme: Scheme) -> None:
    if isinstance(scheme, Arrivals) and (scheme.count or 0) > len(ticks):
        return
    found = schedule(scheme, [t / TICKS for t in ticks], 200 / TICKS)
    assert list(found.aggregations) == by_ticks(scheme, ticks, 200)


@pytest.mark.parametrize("scheme", [*SCHEMES, Arrivals(5)], ids=repr)
def test_mean_weights_are_the_importances_over_2000_units(scheme: Scheme) -> None:
    times = F80 if scheme != Arrivals(1) else response_times("F-80", 5)  # all of 2000 units, but fewer clients
    gaps, found = scheme.gaps(times), schedule(scheme, times, 2000)
    p = 1 / len(times)
    for gap, frequency in zip(gaps, found.frequencies, strict=True):
        assert abs(p * gap * frequency - p) <= 1e-3


@pytest.mark.parametrize("period", [0.5, 0.2, 0.8, 1 / 3, 0.1, 0.7])
@pytest.mark.parametrize("clients", [2, 4, 10, 20])
def test_fedfix_is_exactly_unbiased_over_a_common_multiple(period: float, clients: int) -> None:
    """On integer ticks: compared as floats, the fastest client of F-80 at a period of 0.2 comes late."""
    times = response_times("F-80", clients)
    gaps = [int(gap) for gap in Every(period).gaps(times)]
    assert gaps == [math.ceil(tau / period - 1e-9) for tau in times]
    cycle = math.lcm(*gaps)
    counts = schedule(Every(period), times, (2 * cycle + 0.5) * period).participations
    assert [2 * cycle // gap for gap in gaps] == counts


def test_multiples_of_a_period_that_no_tick_meets_are_in_time() -> None:
    assert Every(1 / 3).gaps([1 / 3, 2 / 3, 1.0]) == [1, 2, 3]
    assert Every(10 / 11 / 10).gaps([k / 11 for k in range(1, 12)]) == list(range(1, 12))
    assert Every(0.29).gaps([0.29]) == [1]


def test_half_a_period_splits_the_clients_as_the_card_says() -> None:
    found = schedule(Every(0.5), F80, 100)
    assert found.frequencies == [0.5] * 6 + [1.0] * 4
    assert found.staleness == 1


@pytest.mark.parametrize(
    ("scheme", "scenario", "until", "staleness"),
    [
        (Every(0.5), "F-80", 40, 1),
        (Every(0.2), "F-80", 40, 4),
        (Arrivals(), "F-80", 40, 0),
        (Arrivals(1), "F-0", 40, 9),
        (Arrivals(1), "F-80", 2000, 25),
    ],
)
def test_staleness(scheme: Scheme, scenario: str, until: float, staleness: int) -> None:
    assert schedule(scheme, response_times(scenario, 10), until).staleness == staleness


def test_aggregations_of_the_card_s_40_units() -> None:
    schemes = (Arrivals(), Every(0.5), Every(0.2), Arrivals(5), Arrivals(1))
    assert [len(schedule(scheme, F80, 40)) for scheme in schemes] == [40, 80, 200, 136, 846]


def test_the_order_of_ties_is_that_of_the_numbers() -> None:
    found = schedule(Arrivals(1), [1.0] * 4, 3)
    assert [a.clients for a in found.aggregations] == [(i,) for i in range(4)] * 3


def test_a_period_too_short_for_anyone_finds_nobody() -> None:
    found = schedule(Every(0.25), [1.0, 0.5], 1)
    assert [a.clients for a in found.aggregations] == [(), (1,), (), (0, 1)]
    assert [a.origins for a in found.aggregations] == [(), (0,), (), (0, 2)]
    assert found.frequencies == [0.25, 0.5]


def test_weights_of_the_literature() -> None:
    assert Arrivals(1).gaps([1.0] * 10) == pytest.approx([10.0] * 10)
    unbiased = [gap / 10 for gap in Arrivals(1).gaps(F80)]
    assert (unbiased[9], unbiased[0]) == pytest.approx((0.43, 2.13), abs=0.005)
    assert Arrivals().gaps(F80) == Arrivals(10).gaps(F80) == Every(1.0).gaps(F80) == [1.0] * 10
    rates = [1 / tau for tau in F80]
    assert surrogate([1.0] * 10, Arrivals(1).gaps(F80)) == pytest.approx([r / sum(rates) for r in rates])


def test_short_periods_tend_to_the_weights_of_single_arrivals() -> None:
    short, single = Every(1e-4).gaps(F80), Arrivals(1).gaps(F80)
    ratios = [a / b for a, b in zip(short, single, strict=True)]
    assert max(ratios) / min(ratios) < 1.001


def test_scenarios() -> None:
    assert response_times("F-0", 3) == [1.0, 1.0, 1.0]
    assert response_times("F-80", 5) == pytest.approx([1, 0.8, 0.6, 0.4, 0.2])
    assert response_times("F-50", 1) == [1.0]


@pytest.mark.parametrize("scenario", ["F-100", "F80", "F--1", "G-80", "F-80 "])
def test_other_scenarios_are_refused(scenario: str) -> None:
    with pytest.raises(ValueError, match="scenario must be F-x"):
        response_times(scenario, 10)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="clients must be >= 1; got 0"):
        response_times("F-0", 0)
    for period in (0, -1, math.inf, math.nan):
        with pytest.raises(ValueError, match="period must be > 0 and finite"):
            Every(period)
    with pytest.raises(ValueError, match="count must be >= 1 or None; got 0"):
        Arrivals(0)
    with pytest.raises(ValueError, match="count must be at most the number of clients, 2; got 3"):
        schedule(Arrivals(3), [1.0, 1.0], 1)
    for bad in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="times must be > 0 and finite; client 1 has"):
            schedule(Every(1), [1.0, bad], 1)
    with pytest.raises(ValueError, match="times must hold the response time of at least one client"):
        schedule(Every(1), [], 1)
