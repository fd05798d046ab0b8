"""Machines that join and leave while the training goes on: `OneByte` over TCP, without a fixed process group.

    with Mailbox(member=3, session=session_id("my run"), host="10.0.0.4") as mailbox:
        group = Group.join(zo, mailbox, {0: ("10.0.0.1", 4000)})
        while group.round < 1000:
            try:
                group.step(loss, batches(group.round))
            except Dropped:  # it was too slow, or its weights had changed
                group = Group.join(zo, mailbox, group.peers, download=True)

The first machine founds the group with ``Group(zo, mailbox)``. Which machines' bytes a round uses is agreed,
see `cograd.machines.one_byte.agreement`, which also states what failures it bears.
"""

from __future__ import annotations

import json
import math
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from cograd.core.message import Frame
from cograd.engines.mailbox import Address, Mail, Mailbox, PeerLost
from cograd.machines.one_byte.agreement import CONTROL, TO_NEWCOMERS, Agreement, Refused, Send, pack, unpack
from cograd.machines.one_byte.log import Log, Round
from cograd.machines.one_byte.optimizer import Closure, Info, OneByte

TICK = 0.02
"""Seconds between two looks at who is lost, when no mail comes."""


class Group:
    """This machine's membership in a group that trains one model.

    Args:
        zo: this machine's optimizer, made without a transport.
        mailbox: its end of the session. Its ``member`` is the machine's id, for good; it keys the directions.
        patience: seconds that the leader waits for bytes after its own are sent, and half of what the others
            wait for the leader. Choose it above the time between two steps of the slowest machine: a member
            that is slower misses rounds, and a leader that is slower is given up.

    Making one founds a group of one; `join` enters a group. ``members`` are the ids in joining order.
    """

    def __init__(self, zo: OneByte, mailbox: Mailbox, *, patience: float = 30.0) -> None:
        if zo.transport.members != 1 or not zo.replayable:
            raise ValueError("zo must be a OneByte that keeps a log and has no transport of its own")
        if not 0 < patience < math.inf:
            raise ValueError(f"patience must be a positive number of seconds; got {patience}")
        self.zo, self.mailbox, self.patience = zo, mailbox, patience
        self._early: list[Mail] = []
        self._agreement = Agreement(
            mailbox.member,
            mailbox.address,
            lambda: zo.log,
            self._deliver,
            self._pack_welcome,
            lambda: zo.identity() if zo.check_due else b"",
            zo.agreement(),
        )

    @classmethod
    def join(
        cls,
        zo: OneByte,
        mailbox: Mailbox,
        peers: Mapping[int, Address],
        *,
        download: bool = False,
        patience: float = 30.0,
        timeout: float = 60.0,
    ) -> Group:
        """Enter a group through any members whose addresses are known, tried in the order given.

        The model must be at the run's start, and the log is replayed; with ``download`` it may be anywhere (the
        frozen part must be the group's) and takes over the weights. A machine that was `Dropped` comes back by
        download, with the ``peers`` of its old membership.

        Raises `Refused` if the id is taken or model or settings differ, TimeoutError if nobody lets it in
        within ``timeout`` seconds.
        """
        group = cls(zo, mailbox, patience=patience)
        content, blob = group._ask_to_join(dict(peers), download, time.monotonic() + timeout)
        log = Log.from_bytes(blob[: content["log"]])
        if download:
            zo.load_weights(blob[content["log"] :], log, content["log_eps"])
        else:
            zo.replay(log)
        group._agreement.start_from(content)
        for mail in group._early:
            group._agreement.receive(mail.sender, mail.round, mail.payload)
        group._flush()
        return group

    @property
    def round(self) -> int:
        """Rounds applied so far."""
        return self.zo.round

    @property
    def members(self) -> tuple[int, ...]:
        """Ids of those who are in the group, as far as this machine knows, in joining order."""
        return tuple(self._agreement.roster)

    @property
    def peers(self) -> dict[int, Address]:
        """Where the other members listen, for `join`."""
        addresses = self._agreement.addresses
        return {member: addresses[member] for member in self.members if member != self.mailbox.member}

    @property
    def leader(self) -> int | None:
        """Who decides rounds; None while that is being settled."""
        return self._agreement.leader

    def step(self, closure: Closure, batches: Sequence[Any]) -> Info:
        """Take part in the coming round, as `OneByte.step`, and return when it is applied.

        A machine that was late applies every round that has been decided meanwhile, so the number of rounds may
        grow by more than one: let ``round`` drive the loop. Every ``check_every`` rounds of the optimizer this
        machine compares its weights with the leader's before it applies the round; the digest travels in the
        leader's commit, 16 bytes. Raises `Dropped` if they differ, or if the group has gone on without this
        machine.
        """
        self._drain()
        me, round = self.mailbox.member, self.round
        own = None
        if not self._agreement.decided:
            own = self.zo.estimate(closure, batches, me)
            self._agreement.contribute(own.payload)
        self._wait(lambda: self.round > round)
        members = self.zo.log[round].members
        return replace(self.zo.info(own, members), round=round)

    def wait_for(self, count: int, timeout: float) -> None:
        """Serve the group until it has ``count`` members. Raises TimeoutError after ``timeout`` seconds."""
        self._wait(lambda: len(self.members) >= count, time.monotonic() + timeout)

    # Mail in and out.

    def _drain(self) -> None:
        """Handle all that has come."""
        while True:
            try:
                mail = self.mailbox.recv(0)
            except TimeoutError:
                self._look_for_losses()
                self._flush()
                return
            self._agreement.receive(mail.sender, mail.round, mail.payload)

    def _wait(self, done: Callable[[], bool], end: float = math.inf) -> None:
        """Handle mail until ``done()``."""
        seen, patient_until = None, math.inf
        while True:
            self._flush()
            if done():
                return
            now = time.monotonic()
            if now >= end:
                raise TimeoutError(f"members are {self.members}; it took too long to wait for more")
            state = (self.round, self.leader, self._agreement.electing, self._agreement.waiting)
            if state != seen:
                waits = 1 if self.leader == self.mailbox.member or self._agreement.electing else 2
                seen, patient_until = state, now + waits * self.patience
            elif now >= patient_until and self._agreement.waiting:
                self._agreement.expired()
                seen = None
                continue
            try:
                mail = self.mailbox.recv(TICK)
            except TimeoutError:
                self._look_for_losses()
            else:
                self._agreement.receive(mail.sender, mail.round, mail.payload)

    def _look_for_losses(self) -> None:
        """Called when no mail is left, so that what a lost member sent has been handled."""
        for member in self.mailbox.lost:
            self._agreement.lost(member)

    def _flush(self) -> None:
        """Send what is due, and count it: bytes of a round as payload, once a round."""
        ledger, me = self.zo.ledger, self.mailbox.member
        due, self._agreement.outbox = self._agreement.outbox, []
        codes = [send for send in due if send.round < CONTROL]
        for send in due:
            self._send(send)
            if send.round >= CONTROL:
                ledger.send(me, self.round, 0, to=send.to, frame=len(send.payload) + Frame.OVERHEAD)
        if codes:
            size = len(codes[0].payload)
            ledger.send(me, codes[0].round, size, frame=size + Frame.OVERHEAD, copies=len(codes))

    def _send(self, send: Send) -> None:
        try:
            if send.address is not None:
                frame = Frame(self.mailbox.session, send.round, self.mailbox.member, send.payload)
                with socket.create_connection(send.address, timeout=self.mailbox.patience) as stranger:
                    stranger.sendall(frame.pack())
                return
            self._know(send.to, self._agreement.addresses[send.to])
            self.mailbox.send(send.to, send.round, send.payload)
        except (PeerLost, OSError):
            return  # the mailbox lists it as lost

    def _know(self, member: int, address: Address) -> None:
        if member not in self.mailbox.members or self.mailbox.address_of(member) != address:
            self.mailbox.connect(member, address)

    def _deliver(self, entry: Round) -> None:
        self.zo.apply(entry.members, entry.payloads(self.zo.width))

    # Joining.

    def _pack_welcome(self, content: dict[str, Any], download: bool) -> bytes:
        log = self.zo.log.to_bytes()
        content |= {"log": len(log), "log_eps": self.zo.log_eps}
        return json.dumps(content).encode() + b"\n" + log + (self.zo.weights() if download else b"")

    def _ask_to_join(
        self, peers: dict[int, Address], download: bool, end: float
    ) -> tuple[dict[str, Any], bytes]:
        """Ask one peer after another until a leader says welcome."""
        request = pack(
            "join", address=self.mailbox.address, agreed=self.zo.agreement().decode(), download=download
        )
        turn = 0
        while time.monotonic() < end:
            asked = list(peers)[turn % len(peers)]
            turn += 1
            try:
                self._know(asked, peers[asked])
                self.mailbox.send(asked, CONTROL, request)
                content, blob = self._answer(asked, end)
            except PeerLost:
                continue
            except TimeoutError:
                break
            if content["kind"] == "welcome":
                return content, blob
            if content["kind"] == "refused":
                raise Refused(content["why"])
            host, port = content["address"]
            others = {m: a for m, a in peers.items() if m != content["leader"]}
            peers, turn = {int(content["leader"]): (host, port), **others}, 0
        raise TimeoutError(f"no member of {sorted(peers)} let machine {self.mailbox.member} in")

    def _answer(self, asked: int, end: float) -> tuple[dict[str, Any], bytes]:
        """A member's answer to a request to join; what else comes from it meanwhile is kept for later."""
        while True:
            mail = self.mailbox.recv(max(0.0, end - time.monotonic()), from_=asked)
            if mail.round >= CONTROL:
                content, blob = unpack(mail.payload)
                if content["kind"] in TO_NEWCOMERS:
                    return content, blob
            self._early.append(mail)
