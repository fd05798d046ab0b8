"""What clients hold: every row that was dealt, each once, and test rows in the shares of the training rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cograd import data
from cograd.data.clients import Clients, matching
from cograd.data.kinds import Images
from cograd.data.partition import Partition


def images(labels: list[int]) -> Images:
    """An image for each label; its one pixel is its row number."""
    rows = torch.arange(float(len(labels)))[:, None, None, None]
    return Images("made", "train", "", rows, torch.tensor(labels), ("a", "b", "c", "d"))


def partition(*parts: list[int]) -> Partition:
    rows = tuple(torch.tensor(part, dtype=torch.int64) for part in parts)
    return Partition(rows, "by hand", tuple(f"{k}" for k in range(len(parts))))


def test_each_client_holds_its_rows():
    train, test = images([0, 1, 2, 3, 0, 1]), images([2, 1, 0])
    clients = Clients(train, partition([0, 3], [1, 2, 5], [4]), test, partition([1], [], [0, 2]))
    assert len(clients) == 3
    assert clients.sizes == (2, 3, 1)
    assert [c.x.flatten().tolist() for c in clients] == [[0, 3], [1, 2, 5], [4]]
    assert [c.y.tolist() for c in clients] == [[0, 3], [1, 2, 1], [0]]
    assert [c.test_x.flatten().tolist() for c in clients] == [[1], [], [0, 2]]
    assert [len(c) for c in clients] == [2, 3, 1]
    with pytest.raises(IndexError):
        clients[3]


def test_a_client_takes_no_memory_of_its_own():
    clients = Clients(images([0, 1, 2, 3]), partition([0, 1], [2, 3]))
    assert clients[0].x.untyped_storage().data_ptr() == clients[1].x.untyped_storage().data_ptr()
    assert len(clients[0].test_y) == 0


@settings(max_examples=40, deadline=None)
@given(
    train=st.lists(st.integers(0, 3), min_size=12, max_size=80),
    test=st.lists(st.integers(0, 3), min_size=1, max_size=60),
    parties=st.integers(1, 6),
    seed=st.integers(0, 3),
)
def test_matching_is_a_partition_in_the_shares_of_the_training_set(train, test, parties, seed):
    train_y = torch.tensor([0, 1, 2, 3, *train])
    test_y = torch.tensor(test)
    parts = data.iid(len(train_y), parties, seed)
    found = matching(test_y, train_y, parts, seed)
    assert len(found) == parties
    held = torch.cat(found.parts)
    assert sorted(held.tolist()) == list(range(len(test)))
    assert all(torch.equal(part, part.sort().values) for part in found.parts)
    for label in set(test):
        there = int((test_y == label).sum())
        share = torch.tensor(
            [float((train_y[part] == label).double().mean() * len(part)) for part in parts.parts]
        )
        share = share / share.sum()
        got = torch.tensor([float((test_y[part] == label).sum()) for part in found.parts])
        # cuts are rounded cumulative shares: a client is off by less than one row at either end
        assert float((got - share * there).abs().max()) <= 1 + 1e-4
        assert not bool(got[share == 0].any())
    again = matching(test_y, train_y, parts, seed)
    assert all(torch.equal(a, b) for a, b in zip(found.parts, again.parts, strict=True))


def test_matching_on_a_skewed_split_has_the_clients_classes():
    train, test = data.load("mnist-5k"), data.load("mnist-5k", "test")
    parts = data.dirichlet(train.y, 20, 0.1, 0)
    clients = Clients(train, parts, test, matching(test.y, train.y, parts, 0))
    assert sum(len(c.test_y) for c in clients) == len(test.y)
    for client in clients:
        assert set(client.test_y.tolist()) <= set(client.y.tolist())


def test_a_class_that_no_client_has_is_refused():
    with pytest.raises(ValueError, match="classes of the training set only; 3 is held by no client"):
        matching(torch.tensor([0, 3]), torch.tensor([0, 1, 2]), partition([0, 1], [2]), 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((images([0, 1]), partition([0, 1], [])), "client 1 holds no examples"),
        ((images([0, 1]), partition([0], [1]), images([0])), "test and test_parts go together"),
        (
            (images([0, 1]), partition([0], [1]), images([0]), partition([0])),
            "test_parts must be of 2 clients, as parts is; got 1",
        ),
        ((images([0, 1]), partition([0], [2])), "parts must name rows of 0 .. 1; client 1 holds row 2"),
        (
            (Images("made", "train", "", torch.zeros(3, 1, 1, 1), torch.zeros(2), ()), partition([0], [1])),
            "x and y must be of one length; got 3 and 2",
        ),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        Clients(*arguments)
