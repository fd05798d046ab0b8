"""The ledger: sums by party, round and kind of byte, budgets that refuse, and seconds in closed form."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cograd.core.ledger import ALL, WORK, Budget, BudgetExceeded, Entry, Ledger, Link

SENDS = st.lists(
    st.tuples(
        st.integers(0, 3), st.integers(0, 5), st.integers(0, 1000), st.integers(0, 64), st.integers(0, 9)
    ),
    max_size=20,
)


def filled(sends) -> Ledger:
    ledger = Ledger()
    for sender, round, payload, wrapping, schema in sends:
        ledger.send(sender, round, payload, frame=payload + wrapping + schema, schema=schema)
    return ledger


@given(SENDS)
def test_totals_are_sums_over_what_was_sent(sends):
    ledger = filled(sends)
    assert len(ledger) == len(sends)
    assert ledger.rounds() == len({r for _, r, *_ in sends})
    for party in (None, 0, 3):
        for since in (0, 2, 6):
            chosen = [s for s in sends if s[1] >= since and party in (None, s[0])]
            assert ledger.sent(party, since=since) == sum(s[2] for s in chosen)
            assert ledger.sent(party, "frame", since) == sum(s[2] + s[3] + s[4] for s in chosen)
            assert ledger.sent(party, "schema", since) == sum(s[4] for s in chosen)


def test_entries_come_back_as_they_went_in():
    ledger = Ledger()
    ledger.send(2, 7, 100, to=1, frame=164, schema=0)
    ledger.send(0, 8, 10, schema=5, copies=3)
    assert list(ledger) == [Entry(2, 1, 7, 100, 164, 0, 1), Entry(0, ALL, 8, 10, 15, 5, 3)]


def test_copies_are_counted_once_as_papers_do():
    ledger = Ledger()
    ledger.send(0, 0, 100, copies=7)
    assert ledger.sent() == 100


def test_work_is_summed_by_kind_and_party():
    ledger = Ledger()
    ledger.work(0, "grad", 32)
    ledger.work(1, "grad")
    ledger.work(0, "epsilon", 0.5)
    ledger.work(0, "epsilon", 0.25)
    assert ledger.worked("grad") == 33
    assert ledger.worked("grad", 0) == 32
    assert ledger.worked("epsilon", 0) == 0.75
    assert ledger.worked("query") == 0
    assert len(ledger) == 0


def test_numpy_sizes_are_whole_numbers_too():
    ledger = Ledger()
    ledger.send(0, 0, np.int64(5))
    assert ledger.sent() == 5


# Budgets


def test_a_message_beyond_the_budget_is_refused_and_not_recorded():
    ledger = Ledger(Budget({"payload": 100}))
    ledger.send(0, 0, 60)
    with pytest.raises(BudgetExceeded, match="party 0 has a budget of 100 payload; this would make 101"):
        ledger.send(0, 1, 41)
    assert (ledger.sent(0), len(ledger), ledger.rounds()) == (60, 1, 1)
    ledger.send(0, 1, 40)
    ledger.send(1, 1, 100)
    assert ledger.sent() == 200


def test_work_beyond_the_budget_is_refused_and_not_recorded():
    ledger = Ledger(Budget({"grad": 10}))
    ledger.work(0, "grad", 8)
    with pytest.raises(BudgetExceeded, match="party 0 has a budget of 10 grad; this would make 11"):
        ledger.work(0, "grad", 3)
    assert ledger.worked("grad", 0) == 8
    ledger.work(0, "grad", 2)
    ledger.work(0, "query", 10**9)
    ledger.send(0, 0, 10**9)


def test_a_budget_of_payload_does_not_count_wrapping():
    ledger = Ledger(Budget({"payload": 10}))
    ledger.send(0, 0, 10, frame=1000, schema=500)
    assert ledger.sent(size="frame") == 1000


@pytest.mark.parametrize("kind", ["bytes", "frame", "Grad", ""])
def test_a_budget_of_an_unknown_kind_is_refused(kind):
    with pytest.raises(ValueError, match=f"must be one of payload, grad, .*epsilon; got '{kind}'"):
        Budget({kind: 1})


@pytest.mark.parametrize("limit", [-1, math.nan])
def test_a_budget_below_zero_is_refused(limit):
    with pytest.raises(ValueError, match=f"budget of grad must be >= 0; got {limit}"):
        Budget({"grad": limit})


def test_every_unit_of_work_may_be_budgeted():
    assert Budget(dict.fromkeys(("payload", *WORK), 1)).limits["epsilon"] == 1


# Bad arguments


@pytest.mark.parametrize(
    "bad",
    [
        {"payload": -1},
        {"payload": 1.5},
        {"payload": math.nan},
        {"round": -1},
        {"round": 0.5},
        {"sender": 0.0},
        {"frame": 9},
        {"schema": -1, "frame": 20},
        {"schema": 1, "frame": 10},
        {"copies": -1},
        {"copies": 1.5},
        {"to": None},
    ],
)
def test_a_bad_message_is_refused_and_leaves_no_trace(bad):
    ledger = Ledger()
    with pytest.raises(ValueError, match="must be"):
        ledger.send(**{"sender": 0, "round": 0, "payload": 10, **bad})
    assert list(ledger) == []
    ledger.send(0, 0, 10)
    assert [e.payload for e in ledger] == [10]


def test_a_bad_message_names_its_sizes():
    with pytest.raises(ValueError, match=r"frame >= payload \+ schema; got payload=10, frame=9, schema=0"):
        Ledger().send(0, 0, 10, frame=9)
    with pytest.raises(ValueError, match=r"whole numbers; got Entry\(sender=0, to=-1, round=0, payload=1.5"):
        Ledger().send(0, 0, 1.5)


@pytest.mark.parametrize(("kind", "amount"), [("grads", 1), ("payload", 1), ("grad", -1), ("grad", math.nan)])
def test_bad_work_is_refused(kind, amount):
    ledger = Ledger()
    with pytest.raises(ValueError, match=rf"(work must be one of .* got '{kind}'|amount of .* got {amount})"):
        ledger.work(0, kind, amount)
    assert ledger.worked(kind) == 0


# Links


@pytest.mark.parametrize("parties", [2, 3, 8])
def test_an_all_gather_takes_n_minus_1_messages_of_time(parties):
    ledger = Ledger()
    for round in range(3):
        for party in range(parties):
            ledger.send(party, round, 1000, frame=1064, copies=parties - 1)
    seconds = Link(bandwidth=1e6).seconds(ledger, parties)
    assert seconds == pytest.approx(3 * 8 * (parties - 1) * 1064 / 1e6)


def test_point_to_point_is_as_slow_as_the_busiest_direction():
    ledger = Ledger()
    ledger.send(0, 0, 100, to=1)
    ledger.send(1, 0, 300, to=0)
    ledger.send(2, 0, 250, to=1)
    # party 1 receives 350 bytes, which is more than anybody else sends or receives
    assert Link(8.0).seconds(ledger, 3) == pytest.approx(350)


def test_a_broadcast_is_as_slow_as_its_sender():
    ledger = Ledger()
    ledger.send(0, 0, 100, copies=4)
    assert Link(8.0).seconds(ledger, 5) == pytest.approx(400)


def test_latency_and_half_the_jitter_are_paid_once_a_round():
    ledger = Ledger()
    for round in (0, 0, 5):
        ledger.send(0, round, 0, to=1)
    assert Link(1.0, latency=0.25, jitter=0.5).seconds(ledger, 2) == pytest.approx(2 * (0.25 + 0.25))
    assert Link(1.0, latency=1.0).seconds(Ledger(), 2) == 0


def test_one_party_alone_has_nobody_to_send_to():
    ledger = Ledger()
    ledger.send(0, 0, 100, copies=0)
    assert Link(8.0).seconds(ledger, 1) == 0


@pytest.mark.parametrize(("sender", "to"), [(2, 0), (0, 2), (-1, 0), (0, -2)])
def test_a_link_refuses_parties_that_it_does_not_join(sender, to):
    ledger = Ledger()
    ledger.send(sender, 0, 1, to=to)
    with pytest.raises(ValueError, match=rf"parties must be more .* got 2, Entry\(sender={sender}, to={to}"):
        Link(1.0).seconds(ledger, 2)


@pytest.mark.parametrize(
    "link",
    [(0,), (-1,), (math.nan,), (1, -1), (1, math.nan), (1, 0, -1), (1, 0, math.nan)],
)
def test_a_bad_link_is_refused(link):
    with pytest.raises(ValueError, match=r"bandwidth must be > 0, latency and jitter >= 0; got Link\("):
        Link(*link)
