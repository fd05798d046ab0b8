"""The agreement under any order of events: messages late, members killed, members given up.

A member here is the protocol alone on a made-up network: FIFO from each member to each other, delivered in
random order; a kill loses what the member had not sent yet, and the others hear of it after what it had.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cograd.machines.one_byte.agreement import CONTROL, Agreement, Dropped, pack, unpack
from cograd.machines.one_byte.log import Log, Round

EXAMPLES = settings(derandomize=True, database=None, deadline=None)
AGREED = json.dumps({"checkpoint": "c", "lr": 1.0}).encode()
LOST = (-1, b"")


@dataclass
class Member:
    id: int
    log: Log = field(default_factory=lambda: Log({}, 1))
    dropped: bool = False
    joined: bool = True
    asked: int = -1
    bored: int = 0
    state: Any = None
    identity: bytes = b""
    early: list[tuple[int, int, bytes]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.agreement = Agreement(
            self.id,
            ("host", self.id),
            lambda: self.log,
            self.deliver,
            self.welcome,
            lambda: self.identity,
            AGREED,
        )

    def deliver(self, entry: Round) -> None:
        for member, code in zip(entry.members, entry.codes, strict=True):
            assert code == code_of(member, len(self.log))
        self.log.append(*entry)

    def welcome(self, content: dict[str, Any], download: bool) -> bytes:
        return json.dumps(content).encode() + b"\n" + self.log.to_bytes()


def code_of(member: int, round: int) -> int:
    return (37 * member + 11 * round) % 256


class World:
    """Members, and the links between them."""

    def __init__(self, founders: int, seed: int) -> None:
        self.draw = np.random.default_rng(seed)
        self.members = {0: Member(0)}
        self.links: dict[tuple[int, int], deque[tuple[int, bytes]]] = {}
        self.dead: set[int] = set()
        for member in range(1, founders):
            self.enter(member, via=0)
            self.run(lambda m=member: self.members[m].joined)
            self.members[member].asked = -1

    def enter(self, id: int, via: int) -> None:
        self.members.setdefault(id, Member(id, joined=False)).asked = via
        request = pack("join", address=("host", id), agreed=AGREED.decode(), download=False)
        self.link(id, via).append((CONTROL, request))

    def link(self, a: int, b: int) -> deque[tuple[int, bytes]]:
        return self.links.setdefault((a, b), deque())

    def collect(self, id: int, at_most: int | None = None) -> None:
        """Put a member's outbox on the links; of a member that is being killed only the first few."""
        outbox, self.members[id].agreement.outbox = self.members[id].agreement.outbox, []
        for send in outbox[:at_most]:
            if send.to in self.dead:
                self.link(send.to, id).append(LOST)
            else:
                self.link(id, send.to).append((send.round, send.payload))

    def kill(self, id: int) -> None:
        self.collect(id, int(self.draw.integers(0, 4)))
        self.dead.add(id)
        for other in self.live():
            self.link(id, other.id).append(LOST)

    def somebody(self) -> int:
        return next(m.id for m in self.live() if m.joined)

    def live(self) -> list[Member]:
        return [m for m in self.members.values() if m.id not in self.dead and not m.dropped]

    def contribute(self, id: int) -> bool:
        """Send the bytes of the coming round, once."""
        member = self.members[id]
        round = len(member.log)
        if not member.joined or id in member.agreement._codes.get(round, {}):
            return False
        member.agreement.contribute(bytes([code_of(id, round)]))
        self.collect(id)
        return True

    def deliver(self, sender: int, to: int) -> None:
        round, payload = self.link(sender, to).popleft()
        member = self.members[to]
        if to in self.dead or member.dropped:
            return
        if member.joined:
            self.hand_over(member, sender, round, payload)
            return
        content, blob = unpack(payload) if round >= CONTROL else ({"kind": ""}, b"")
        if content["kind"] == "welcome":
            member.log = Log.from_bytes(blob)
            member.agreement.start_from(content)
            member.joined = True
            for mail in member.early:
                self.hand_over(member, *mail)
        elif content["kind"] == "try":
            self.enter(to, via=sender if content["leader"] in self.dead else content["leader"])
        else:
            member.early.append((sender, round, payload))
            if round < 0 and sender == member.asked:
                self.enter(to, via=self.somebody())

    def hand_over(self, member: Member, sender: int, round: int, payload: bytes) -> None:
        try:
            if round < 0:
                member.agreement.lost(sender)
            else:
                member.agreement.receive(sender, round, payload)
        except Dropped:
            member.dropped = True
            self.kill(member.id)
            if member.asked >= 0:  # a newcomer asks again
                del self.members[member.id]
                self.dead.discard(member.id)
                self.enter(member.id, via=self.somebody())
            return
        self.collect(member.id)

    def run(
        self, done: Callable[[], bool], contributes: bool = False, patience: str = "", steps: int = 20_000
    ) -> None:
        """Random events until ``done()``: a message arrives, a member contributes, or its patience ends, which
        may be at "any" time or after a "long" one."""
        for _ in range(steps):
            if done():
                return
            pending = [link for link, queue in self.links.items() if queue]
            live, choice = self.live(), self.draw.random()
            if (
                contributes
                and (choice < 0.2 or not pending)
                and any(self.contribute(live[i].id) for i in self.draw.permutation(len(live)))
            ):
                pass
            elif pending:
                self.deliver(*pending[int(self.draw.integers(len(pending)))])
            self.tire(live, patience)
        raise AssertionError(
            f"nothing comes of it: {[(m.id, len(m.log), m.agreement.leader) for m in self.live()]}"
        )

    def tire(self, live: list[Member], patience: str) -> None:
        """End the patience of a random member now and then, or of those for whom nothing changes for long."""
        if patience == "any" and self.draw.random() < 0.03:
            self.expire(live[int(self.draw.integers(len(live)))])
        for member in live if patience == "long" else ():
            state = (len(member.log), member.agreement._stamp, member.agreement.leader)
            member.bored = member.bored + 1 if state == member.state else 0
            member.state = state
            if member.bored > 400:
                member.bored = 0
                self.expire(member)

    def expire(self, member: Member) -> None:
        if member.joined and member.agreement.waiting:
            member.agreement.expired()
            self.collect(member.id)

    def agree(self) -> None:
        """Of any two that follow the same leader, one's log is the beginning of the other's."""
        groups: dict[Any, list[Log]] = {}
        for m in self.live():
            if m.joined and m.agreement.leader is not None:
                groups.setdefault(m.agreement._ballot, []).append(m.log)
        for logs in groups.values():
            logs.sort(key=len)
            for shorter, longer in pairwise(logs):
                assert shorter.digest() == longer.digest(len(shorter))

    def reached(self, round: int) -> bool:
        self.agree()
        return all(len(m.log) >= round for m in self.live())


@given(seed=st.integers(0, 2**32))
@settings(EXAMPLES, max_examples=40)
def test_with_no_failure_everyone_is_in_every_round(seed: int) -> None:
    world = World(4, seed)
    world.run(lambda: world.reached(8), contributes=True)
    assert all(entry.members == (0, 1, 2, 3) for entry in list(world.members[0].log)[:8])


@given(seed=st.integers(0, 2**32), victims=st.permutations(range(5)), count=st.integers(1, 3))
@settings(EXAMPLES, max_examples=150)
def test_survivors_of_crashes_agree_and_go_on(seed: int, victims: list[int], count: int) -> None:
    """The leader is a victim like any other, and may die between two of its messages."""
    world = World(5, seed)
    for i, victim in enumerate(victims[:count]):
        world.run(lambda r=2 * i + 2: world.reached(r), contributes=True)
        world.run(lambda: world.draw.random() < 0.05, contributes=True)
        world.contribute(victim)
        world.kill(victim)
    end = max(len(m.log) for m in world.live()) + 4
    world.run(lambda: world.reached(end), contributes=True)
    survivors = sorted(victims[count:])
    assert world.live()[0].log[end - 1].members == tuple(survivors)
    assert not any(m.dropped for m in world.members.values())


@given(seed=st.integers(0, 2**32), kills=st.sampled_from([(), (0,), (1,), (0, 1)]))
@settings(EXAMPLES, max_examples=100)
def test_a_newcomer_gets_in_whatever_happens_to_the_leader(seed: int, kills: tuple[int, ...]) -> None:
    world = World(4, seed)
    world.run(lambda: world.reached(3), contributes=True)
    world.enter(9, via=3)
    for victim in kills:
        world.run(lambda: world.draw.random() < 0.1, contributes=True)
        world.kill(victim)
    world.run(
        lambda: any(9 in entry.members for entry in world.members[9].log), contributes=True, patience="long"
    )
    world.run(lambda: world.reached(len(world.members[9].log)), contributes=True, patience="long")


@given(seed=st.integers(0, 2**32))
@settings(EXAMPLES, max_examples=150)
def test_impatience_splits_nobody(seed: int) -> None:
    """Patience ends at any moment, so that live members are given up: they are told, and the others agree."""
    world = World(4, seed)
    for _ in range(300):
        world.run(lambda: world.draw.random() < 0.5, contributes=True, patience="any")
        world.agree()
    end = max(len(m.log) for m in world.live()) + 3
    world.run(lambda: all(len(m.log) >= end for m in world.live()), contributes=True, patience="long")
    world.run(lambda: not any(world.links.values()))
    world.agree()
    assert len({m.agreement._ballot for m in world.live()}) == 1


def test_a_late_member_is_not_waited_for_until_it_keeps_up() -> None:
    world = World(3, 0)
    world.contribute(0)
    world.contribute(1)
    world.run(lambda: not any(world.links.values()))
    assert world.members[0].log.nbytes == 0
    world.members[0].agreement.expired()
    world.collect(0)
    world.run(lambda: world.reached(1))
    assert world.members[2].log[0].members == (0, 1)
    for id in (0, 1):
        world.contribute(id)
    world.run(lambda: world.reached(2))
    assert world.members[2].log[1].members == (0, 1)
    for id in (2, 0, 1):
        world.contribute(id)
        world.run(lambda: not any(world.links.values()))
    assert world.members[1].log[2].members == (0, 1, 2)


def test_bytes_that_did_not_come_are_fetched() -> None:
    world = World(3, 0)
    for id in (0, 1, 2):
        world.contribute(id)
    world.link(2, 1).clear()
    world.run(lambda: world.reached(1))
    assert world.members[1].log[0] == Round((0, 1, 2), bytes(code_of(m, 0) for m in range(3)))


def commits(world: World) -> list[bytes]:
    """What follows the commits that the leader has sent and nobody has received yet."""
    sent = [
        unpack(payload)
        for (a, _), queue in world.links.items()
        for r, payload in queue
        if a == 0 and r >= CONTROL
    ]
    return [blob for content, blob in sent if content["kind"] == "commit"]


def test_a_replica_that_differs_leaves_before_the_round_and_the_others_go_on() -> None:
    world = World(3, 0)
    for member in world.members.values():
        member.identity = bytes(16) if member.id != 1 else bytes(15) + b"\1"
    for id in (0, 1, 2):
        world.contribute(id)
    while not commits(world):
        world.deliver(*next(link for link, queue in world.links.items() if queue and link[1] == 0))
    assert commits(world) == [bytes(16)] * 2  # 16 bytes more than a commit
    world.run(lambda: world.reached(1))
    assert [m.dropped for m in world.members.values()] == [False, True, False]
    assert len(world.members[1].log) == 0
    for member in world.live():
        member.identity = b""
    world.run(lambda: world.reached(3), contributes=True)
    assert world.members[2].log[2].members == (0, 2)


def test_commits_of_rounds_without_a_check_carry_nothing_more() -> None:
    world = World(2, 0)
    world.contribute(1)
    world.contribute(0)
    while world.link(1, 0):
        world.deliver(1, 0)
    assert commits(world) == [b""]


@pytest.mark.parametrize(
    ("change", "address", "message"),
    [
        ({"lr": 2.0}, ("host", 7), "settings are not the group's .lr: 2.0 there, 1.0 here"),
        ({"checkpoint": "x"}, ("host", 7), "checkpoint: 'x' there, 'c' here"),
        ({}, ("elsewhere", 1), "id 1 is taken by another machine"),
    ],
)
def test_who_does_not_fit_is_refused(change: dict[str, Any], address: tuple[str, int], message: str) -> None:
    world = World(2, 0)
    leader = world.members[0].agreement
    agreed = json.dumps({**json.loads(AGREED), **change})
    leader.receive(address[1], CONTROL, pack("join", address=address, agreed=agreed, download=False))
    (send,) = leader.outbox
    assert send.address == address
    assert unpack(send.payload)[0]["kind"] == "refused"
    assert (
        message.replace(".", "(", 1) in unpack(send.payload)[0]["why"]
        or message in unpack(send.payload)[0]["why"]
    )
    assert leader.roster == [0, 1]


def test_control_of_an_unknown_kind_is_refused() -> None:
    world = World(2, 0)
    with pytest.raises(ValueError, match="member 1 sent control of kind 'shout'; there is no such kind"):
        world.members[0].agreement.receive(1, CONTROL, pack("shout"))
