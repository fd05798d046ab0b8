"""The synchronous server by itself: it takes what it asked for, once, and in the clients' order."""

from __future__ import annotations

import pytest
import torch

from cograd.clients.baselines import FedAvg
from cograd.core.space import ParamSpace
from cograd.engines.federated import After, Lost, NoReplies, Reply, Send, Session, Start, Timer
from engines.federated.support import LOCAL

SIZE = 4


def session(asked=(0, 1, 2), timeout=None) -> Session:
    space = ParamSpace({"w": (SIZE,)})
    return Session(space, torch.zeros(SIZE), [1, 2, 3], 0, lambda round: list(asked), timeout)


def begun(timeout=None):
    """A method that has asked clients 0, 1 and 2, its server and session."""
    method, its = FedAvg(LOCAL), session(timeout=timeout)
    server = method.start(its)
    actions = method.next(server, Start(), its)
    return method, server, its, actions


def reply(client: int, value: float = 1.0, round: int = 0, task: str = "train") -> Reply:
    return Reply(client, task, round, {"delta": torch.full((SIZE,), value)})


def test_it_asks_and_closes_when_all_have_answered():
    method, server, its, actions = begun()
    assert [(a.to, a.task) for a in actions] == [(0, "train"), (1, "train"), (2, "train")]
    assert len({id(a.content) for a in actions}) == 1
    for client, value in ((2, 6.0), (0, 0.0)):
        assert method.next(server, reply(client, value), its) == ()
    asked = method.next(server, reply(1, 3.0), its)
    assert [a.to for a in asked] == [0, 1, 2]
    assert server["round"] == 1
    assert server["x"].tolist() == [4.0] * SIZE  # (1 * 0 + 2 * 3 + 3 * 6) / 6


@pytest.mark.parametrize(
    "stale",
    [
        reply(0, round=1),
        reply(0, task="other"),
        reply(5),
        Lost(0, "train", 3, "gone"),
    ],
    ids=["of another round", "to another task", "of somebody not asked", "lost of another round"],
)
def test_what_it_has_not_asked_for_it_ignores(stale):
    method, server, its, _ = begun()
    assert not method.takes(server, stale, its)
    assert method.next(server, stale, its) == ()
    assert its.exchange.replies == {}
    assert len(its.exchange.asked) == 3


def test_a_reply_that_comes_twice_counts_once():
    method, server, its, _ = begun()
    for event in (reply(0, 9.0), reply(0, 0.0), reply(1, 0.0)):
        assert method.next(server, event, its) == ()
    method.next(server, reply(2, 6.0), its)
    assert server["x"].tolist() == [3.0] * SIZE


def test_it_goes_on_without_who_is_lost():
    method, server, its, _ = begun()
    method.next(server, reply(0, 1.0), its)
    method.next(server, Lost(2, "train", 0, "gone"), its)
    method.next(server, reply(1, 4.0), its)
    assert server["x"].tolist() == [3.0] * SIZE
    for client in (0, 1):
        assert method.next(server, Lost(client, "train", 1, "gone"), its) == ()
    with pytest.raises(NoReplies, match="round 1: none of the clients asked has answered"):
        method.next(server, Lost(2, "train", 1, "gone"), its)


def test_a_timeout_closes_with_the_replies_at_hand():
    method, server, its, actions = begun(timeout=2.5)
    assert actions[-1] == After(2.5, 0)
    method.next(server, reply(1, 2.0), its)
    asked = method.next(server, Timer(0), its)
    assert server["round"] == 1
    assert server["x"].tolist() == [2.0] * SIZE
    assert asked[-1] == After(2.5, 1)
    assert method.next(server, reply(0), its) == ()  # of round 0
    assert method.next(server, Timer(0), its) == ()
    assert server["round"] == 1


def test_a_timeout_without_replies_waits_for_the_first():
    method, server, its, _ = begun(timeout=1.0)
    assert method.next(server, Timer(0), its) == ()
    method.next(server, reply(2, 5.0), its)
    assert (server["round"], server["x"].tolist()) == (1, [5.0] * SIZE)


@pytest.mark.parametrize("to", [[], [1, 1]], ids=["nobody", "one twice"])
def test_whom_it_may_not_ask_is_named(to):
    class Wrong(FedAvg):
        def ask(self, server, session):
            return [Send(client, "train", {}) for client in to]

    method, its = Wrong(LOCAL), session()
    with pytest.raises(RuntimeError, match="round 0: ask must name one client or more, each once; got"):
        method.next(method.start(its), Start(), its)


def test_after_a_resumption_it_waits_for_what_is_to_be_sent():
    method, server, _, actions = begun()
    fresh = session()
    method.resumed(server, fresh, [], [a for a in actions if isinstance(a, Send)])
    for client in (0, 1):
        assert method.next(server, reply(client), fresh) == ()
    method.next(server, reply(2), fresh)
    assert server["round"] == 1
