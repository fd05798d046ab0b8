"""Which machines' bytes a round uses, when machines join, are late, and die: messages in, messages out.

No sockets and no clock here; `group` brings both, and the tests bring their own, with every order of events.

*A round.* Every member sends its bytes to all others. The leader waits for the bytes of the members that it
counts on, or for its patience to end, and sends everyone a *commit*: the round's members, in the order in which
they joined. Whoever holds a commit and all its bytes applies them; whoever lacks bytes fetches them from the
leader. So all apply the same set, and the log of rounds is the same everywhere but for its length. A member
that missed a round is a member still, but the leader does not wait for it until its bytes come nearly in time.

*Replicas are compared.* In rounds in which that is due, the commit carries the leader's `identity`, a digest of
its weights as they are before the round. A member whose own is another leaves, and joins again by download. The
leader's weights count, as somebody's must.

*Joining.* A newcomer asks any member, is sent on to the leader, and gets the list of members and the log (or
the weights). It takes part as soon as it has caught up.

*The leader dies.* The first of the others in joining order that still lives takes over, in three steps: it asks
all members for their log (which promises it that they take no more commits of an older leader), brings
everybody up to the longest one, and leads. A round that any survivor applied is in that log; one that none
applied is decided anew. Ballots (number, id) order leaders that compete.

*Assumed*: machines stop when they fail (no lies), and a link delivers in order what it delivers. A machine that
was only slow and has been given up is told so as soon as it speaks again, and must join anew; it may have
applied a round that the group decided otherwise. Not assumed is agreement across a network split in two: each
half would go on by itself.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from cograd.core.message import Payload
from cograd.machines.one_byte.log import Log, Round

CONTROL = 1 << 63
"""Frames of this round number and above carry control messages; the others bytes of their round."""

TO_NEWCOMERS = ("welcome", "try", "refused")
"""Kinds of control messages that answer a machine that wants to join."""
_AMONG_MEMBERS = ("hello", "commit", "fetch", "bytes", "roster", "ask", "have", "lead")

Address = tuple[str, int]


class Dropped(ConnectionError):
    """The group has gone on without this machine, or this one's weights are not the leader's: it must join
    again, by download."""


class Refused(ConnectionError):
    """The group does not take this machine: its id is taken, or its model or settings are others."""


class Send(NamedTuple):
    """A message to be sent: bytes of a round, or control if ``round`` is at least `CONTROL`."""

    to: int
    round: int
    payload: bytes
    address: Address | None = None
    """Where to, if not to the member of that id but to a machine that wants to be it."""


Stamp = tuple[int, int, int]


class _Commit(NamedTuple):
    """What the leader decided of a round: its members, and the leader's identity before it, if that is due."""

    members: tuple[int, ...]
    identity: bytes


class _Have(NamedTuple):
    """A member's log: how long it is, its digest, and what the one who asked lacks of it."""

    round: int
    digest: str
    tail: bytes


class Agreement:
    """One member's part in the agreement.

    ``log`` holds the rounds applied so far; ``deliver(round)`` must apply the next one and append it to
    ``log``. ``welcome(content, download)`` packs what a newcomer gets. ``identity()`` is a digest of the
    weights where machines are to compare theirs before the coming round, and empty elsewhere. Messages to be
    sent collect in ``outbox``.
    """

    def __init__(
        self,
        me: int,
        address: Address,
        log: Callable[[], Log],
        deliver: Callable[[Round], None],
        welcome: Callable[[dict[str, Any], bool], bytes],
        identity: Callable[[], bytes],
        agreed: bytes,
    ) -> None:
        self.me, self._log, self._deliver, self._welcome, self._agreed = me, log, deliver, welcome, agreed
        self._identity = identity
        self.roster: list[int] = [me]
        self.addresses: dict[int, Address] = {me: address}
        self.leader: int | None = me
        self.outbox: list[Send] = []
        self._gone: set[int] = set()
        self._former: set[int] = set()
        self._late: set[int] = set()
        self._ballot, self._version = (0, me), 0
        self._codes: dict[int, dict[int, bytes]] = {}
        self._ahead: dict[int, _Commit] = {}
        self._fetched: tuple[int, int] | None = None
        self._asked: dict[int, _Have | None] = {}
        self._waiting: dict[int, dict[str, Any]] = {}

    @property
    def round(self) -> int:
        """The round that is to be decided next."""
        return len(self._log())

    @property
    def electing(self) -> bool:
        """Whether this member is asking the others for their logs, to lead them."""
        return self.leader is None and self._ballot[1] == self.me

    @property
    def decided(self) -> bool:
        """Whether the commit of the coming round is here already, so that measuring for it would be in vain."""
        return self.round in self._ahead

    # What this member does.

    def contribute(self, codes: Payload) -> None:
        """Send this member's bytes of the coming round to everyone."""
        round, codes = self.round, bytes(codes)
        self._codes.setdefault(round, {})[self.me] = codes
        self.outbox += [Send(to, round, codes) for to in self._others()]
        self._progress()

    @property
    def waiting(self) -> bool:
        """Whether others are due to send something, so that patience with them may end."""
        return self.electing or self.decided or self.me in self._codes.get(self.round, {})

    def expired(self) -> None:
        """Patience is at its end: go on with what there is."""
        if self.electing:
            self._gone |= {m for m, answer in self._asked.items() if answer is None}
            self._conclude()
        elif self.leader == self.me:
            self._late |= set(self._expected()) - set(self._codes[self.round])
            self._propose()
            self._progress()
        else:
            self._elect()

    def lost(self, member: int) -> None:
        """A member's connection ended; what it sent before has been handled."""
        self._waiting.pop(member, None)
        if member not in self.roster or member in self._gone or member == self.me:
            return
        self._gone.add(member)
        if self.electing:
            self._conclude()
        elif self.leader == self.me:
            self._progress()
        else:
            head = self.leader if self.leader is not None else self._ballot[1]
            if head in self._gone and self._alive()[0] == self.me:
                self._elect()

    # What comes in.

    def receive(self, sender: int, round: int, payload: Payload) -> None:
        """Handle a message. Raises `Dropped` if it says that the group has gone on without this member, or with
        other weights."""
        if round < CONTROL:
            if self._stranger(sender):
                return
            if round >= self.round:
                self._codes.setdefault(round, {})[sender] = bytes(payload)
            if round >= self.round - 1:
                self._late.discard(sender)
            self._progress()
            return
        content, blob = unpack(payload)
        kind = content["kind"]
        if kind == "join":
            self._join(sender, content)
        elif kind == "outside":
            self._on_outside(sender, content)
        elif kind in _AMONG_MEMBERS:
            if not self._stranger(sender, content.get("ballot")):
                getattr(self, f"_on_{kind}")(sender, content, blob)
        elif kind not in TO_NEWCOMERS:
            raise ValueError(f"member {sender} sent control of kind {kind!r}; there is no such kind")

    def _stranger(self, sender: int, ballot: list[int] | None = None) -> bool:
        """Whether a sender is not in the group; it is told. One that was never heard of may be new and known
        to the leader alone, so that only the leader can say so of it, and nobody follows it."""
        certain = ballot is not None or sender in self._former or self.leader == self.me
        if sender in self.roster or not certain:
            return False
        self._say(sender, "outside", stamp=self._stamp, ballot=ballot)
        return True

    def _on_outside(self, sender: int, content: Mapping[str, Any]) -> None:
        """A member goes on without this one. Of two that go on without each other the higher stamp stays."""
        asked = self.electing and content["ballot"] == list(self._ballot)
        if asked or tuple(content["stamp"]) > self._stamp:
            raise Dropped(f"the group has gone on without machine {self.me}: join again")
        if sender in self._former:
            self._say(sender, "outside", stamp=self._stamp, ballot=None)

    # A round.

    def _progress(self) -> None:
        """Apply what is decided, and decide what can be."""
        while True:
            round = self.round
            self._codes = {r: c for r, c in self._codes.items() if r >= round}
            commit, codes = self._ahead.get(round), self._codes.get(round, {})
            if commit is not None:
                missing = [m for m in commit.members if m not in codes]
                if not missing:
                    self._compare(commit)
                    self._apply(commit.members, codes)
                    continue
                if self.leader is not None and self._fetched != (round, self.leader):
                    self._fetched = (round, self.leader)
                    self._say(self.leader, "fetch", round=round, members=missing)
            elif self.leader == self.me and self.me in codes and set(self._expected()) <= set(codes):
                self._propose()
                continue
            return

    def _expected(self) -> list[int]:
        """Whose bytes the leader waits for."""
        return [m for m in self._alive() if m not in self._late]

    def _propose(self) -> None:
        round, codes = self.round, self._codes[self.round]
        members = tuple(m for m in self.roster if m in codes)
        others = self._others()
        identity = self._identity() if others else b""
        for to in others:
            self._say(to, "commit", identity, ballot=self._ballot, round=round, members=members)
        self._apply(members, codes)
        if self._gone & set(self.roster):
            self._enrol()

    def _compare(self, commit: _Commit) -> None:
        """A replica that something has changed goes no further."""
        if commit.identity and commit.identity != self._identity():
            raise Dropped(
                f"machine {self.me}'s weights are not those of its leader before round {self.round}: "
                "join again with download=True"
            )

    def _apply(self, members: tuple[int, ...], codes: Mapping[int, bytes]) -> None:
        self._ahead.pop(self.round, None)
        self._deliver(Round(members, b"".join(codes[m] for m in members)))

    def _on_hello(self, sender: int, content: dict[str, Any], blob: bytes) -> None:
        """A connection was opened, whose end will be noticed."""

    def _on_commit(self, sender: int, content: dict[str, Any], blob: bytes) -> None:
        if tuple(content["ballot"]) == self._ballot and sender == self.leader:
            if content["round"] >= self.round:
                self._ahead[content["round"]] = _Commit(tuple(content["members"]), blob)
            self._progress()

    def _on_fetch(self, sender: int, content: dict[str, Any], blob: bytes) -> None:
        round, log = content["round"], self._log()
        if round < len(log):
            held = dict(zip(log[round].members, log[round].payloads(log.width), strict=True))
        else:
            held = self._codes.get(round, {})
        bytes_of = {m: held[m].hex() for m in content["members"] if m in held}
        self._say(sender, "bytes", round=round, codes=bytes_of)

    def _on_bytes(self, sender: int, content: dict[str, Any], blob: bytes) -> None:
        if content["round"] >= self.round:
            held = self._codes.setdefault(content["round"], {})
            for member, codes in content["codes"].items():
                held.setdefault(int(member), bytes.fromhex(codes))
        self._progress()

    # Who takes part.

    def _join(self, sender: int, content: dict[str, Any]) -> None:
        address = (content["address"][0], content["address"][1])
        if self.leader is None or (self.leader != self.me and self.leader in self._gone):
            self._waiting[sender] = content  # until somebody leads
            if self.electing and sender in self._asked and self.addresses.get(sender) == address:
                self._gone.add(sender)  # it never got its welcome
                self._conclude()
        elif self.leader != self.me:
            self.addresses.setdefault(sender, address)
            self._say(sender, "try", leader=self.leader, address=self.addresses[self.leader])
        else:
            self._admit(sender, address, content)

    def _admit(self, sender: int, address: Address, content: dict[str, Any]) -> None:
        known = sender in self.roster and sender not in self._gone
        why = self._objection(content)
        if known and self.addresses[sender] != address:
            why = f"id {sender} is taken by another machine"
        if why is not None:
            self.outbox.append(Send(sender, CONTROL, pack("refused", why=why), address))
            return
        self.addresses[sender] = address
        self._gone.discard(sender)
        self._former.discard(sender)
        self.roster = [*(m for m in self.roster if m != sender), sender]
        if self.me in self._codes.get(self.round, {}):
            self._late.add(sender)  # it need not be waited for in the middle of a round
        self._enrol()
        welcome = {"kind": "welcome", **self._members()}
        self.outbox.append(Send(sender, CONTROL, self._welcome(welcome, content["download"])))

    def _objection(self, content: Mapping[str, Any]) -> str | None:
        """Why a newcomer's model and settings do not fit, if so; with a download its weights do not matter."""
        theirs, ours = json.loads(content["agreed"]), json.loads(self._agreed)
        if content["download"]:
            theirs["checkpoint"] = ours["checkpoint"]
        other = [k for k in sorted({*theirs, *ours}) if theirs.get(k) != ours.get(k)]
        shown = ", ".join(f"{k}: {theirs.get(k)!r} there, {ours.get(k)!r} here" for k in other)
        return f"its model or settings are not the group's ({shown})" if other else None

    def _members(self) -> dict[str, Any]:
        return {
            "stamp": self._stamp,
            "roster": [(m, *self.addresses[m]) for m in self.roster],
            "leader": self.leader,
        }

    def _enrol(self) -> None:
        """The leader tells who is in the group now; the lost ones no longer are."""
        self._version += 1
        self._dismiss()
        for to in self._others():
            self._say(to, "roster", **self._members())

    def _dismiss(self) -> None:
        """Remove those who seem lost, and tell them in case they are not."""
        for member in sorted(self._gone):
            self._say(member, "outside", stamp=self._stamp, ballot=None)
        self._forget(self._gone)

    def _forget(self, members: Iterable[int]) -> None:
        left = set(members) - {self.me}
        self.roster = [m for m in self.roster if m not in left]
        self._former |= left
        self._late -= left
        self._gone -= left

    def _on_roster(self, sender: int, content: dict[str, Any], blob: bytes) -> None:
        stamp = tuple(content["stamp"])
        if sender == self.leader and stamp[:2] == self._ballot and stamp[2] > self._version:
            self._take_roster(content)

    def _take_roster(self, content: Mapping[str, Any]) -> None:
        *ballot, self._version = content["stamp"]
        self._ballot = (ballot[0], ballot[1])
        entries = {m: (host, port) for m, host, port in content["roster"]}
        new = [
            m for m, a in entries.items() if m != self.me and (m not in self.roster or self.addresses[m] != a)
        ]
        self._forget(set(self.roster) - set(entries))
        self._former -= set(entries)
        self._gone &= set(entries)
        self._gone -= set(new)
        self.roster = list(entries)
        self.addresses |= {m: a for m, a in entries.items() if m != self.me}
        self.leader = content["leader"]
        for member in new:
            self._say(member, "hello")

    def start_from(self, content: Mapping[str, Any]) -> None:
        """Begin where a welcome says."""
        self.roster = []
        self._take_roster(content)

    @property
    def _stamp(self) -> Stamp:
        return (*self._ballot, self._version)

    # A leader is lost.

    def _alive(self) -> list[int]:
        return [m for m in self.roster if m not in self._gone]

    def _others(self) -> list[int]:
        return [m for m in self._alive() if m != self.me]

    def _elect(self) -> None:
        """Ask every member for its log, under a ballot higher than any heard of."""
        self._promise((self._ballot[0] + 1, self.me))
        self._asked = dict.fromkeys(self._others())
        for to in self._others():
            self._say(to, "ask", ballot=self._ballot, round=self.round, digest=self._log().digest())
        self._conclude()

    def _promise(self, ballot: tuple[int, int]) -> None:
        self._ballot, self._version, self.leader = ballot, 0, None
        self._ahead.clear()
        self._fetched = None

    def _on_ask(self, sender: int, content: dict[str, Any], blob: bytes) -> None:
        ballot = (content["ballot"][0], content["ballot"][1])
        if ballot > self._ballot:
            self._promise(ballot)
            self._asked = {}
            log, theirs = self._log(), content["round"]
            longer = len(log) > theirs
            fits = not longer or log.digest(theirs) == content["digest"]
            tail = log.tail(theirs) if longer and fits else b""
            self._say(sender, "have", tail, ballot=ballot, round=len(log), digest=log.digest(), fits=fits)

    def _on_have(self, sender: int, content: dict[str, Any], blob: bytes) -> None:
        if self.electing and tuple(content["ballot"]) == self._ballot and sender in self._asked:
            if content["fits"]:
                self._asked[sender] = _Have(content["round"], content["digest"], blob)
            else:
                self._gone.add(sender)
            self._conclude()

    def _conclude(self) -> None:
        """Once all that live have answered: bring everybody up to the longest log, and lead."""
        if any(have is None and m not in self._gone for m, have in self._asked.items()):
            return
        haves = {m: have for m, have in self._asked.items() if have is not None and m not in self._gone}
        longest = max(haves.values(), key=lambda have: have.round, default=None)
        if longest is not None and longest.round > self.round:
            for entry in self._log().rounds_of(longest.tail):
                self._deliver(entry)
        # those that had been given up and went on by themselves for a while
        self._gone |= {m for m, have in haves.items() if self._log().digest(have.round) != have.digest}
        self.leader, self._version, self._asked = self.me, 1, {}
        self._dismiss()
        for member in self._others():
            self._say(member, "lead", self._log().tail(haves[member].round), **self._members())
        waiting, self._waiting = self._waiting, {}
        for sender, content in waiting.items():
            self._join(sender, content)
        self._progress()

    def _on_lead(self, sender: int, content: dict[str, Any], blob: bytes) -> None:
        stamp = tuple(content["stamp"])
        if stamp[:2] != self._ballot or self.leader is not None:
            return
        for entry in self._log().rounds_of(blob):
            self._deliver(entry)
        self._take_roster(content)
        for newcomer, request in self._waiting.items():
            self._join(newcomer, request)
        self._waiting = {}
        self._progress()

    def _say(self, to: int, kind: str, blob: bytes = b"", **content: Any) -> None:
        self.outbox.append(Send(to, CONTROL, pack(kind, blob, **content)))


def pack(kind: str, blob: bytes = b"", **content: Any) -> bytes:
    """A control message: one line of JSON, and what follows it."""
    return json.dumps({"kind": kind, **content}).encode() + b"\n" + blob


def unpack(payload: Payload) -> tuple[dict[str, Any], bytes]:
    """Inverse of `pack`."""
    head, _, blob = bytes(payload).partition(b"\n")
    return dict(json.loads(head)), blob
