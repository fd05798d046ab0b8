"""Frames between processes over TCP, among members that come and go.

For methods whose parties do not march in step: a member asks whom it likes, may be late, join or die. Every
member listens at an address; a connection is dialled at the first message to a member and carries one
direction. Frames (`cograd.core.message.Frame`) refuse what was damaged or belongs to another session.

    mailbox = Mailbox(member=0, session=session_id("my run"))
    mailbox.connect(1, ("10.0.0.2", 4000))
    mailbox.send(1, round=0, payload=b"...")
    mail = mailbox.recv(timeout=5)
"""

from __future__ import annotations

import json
import selectors
import socket
import threading
import time
from collections import deque
from dataclasses import dataclass
from types import TracebackType

from cograd.core.message import Frame, FrameError, Payload
from cograd.engines.transport import Transport

Address = tuple[str, int]


@dataclass(frozen=True)
class Mail:
    """What one member sent another."""

    sender: int
    round: int
    payload: Payload


class PeerLost(ConnectionError):
    """A member cannot be reached, or its connection ended."""

    def __init__(self, member: int, why: str) -> None:
        super().__init__(f"member {member} is lost: {why}")
        self.member = member


class Mailbox:
    """A member's end of the session.

    Args:
        member: this member's id, for good; a number that no other member has.
        session: 16 bytes that all members share; see `cograd.core.message.session_id`.
        host, port: where to listen; port 0 takes a free one. ``address`` is what others connect to.
        patience: seconds that a dial or a send may take before the peer counts as lost.
        limit: bytes of the longest frame taken.

    ``refused`` counts connections that were closed because what came was no frame of this session. `send` and
    `recv` are for one thread; receiving goes on in the background.
    """

    def __init__(
        self,
        member: int,
        session: bytes,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        patience: float = 10.0,
        limit: int = 2**31,
    ) -> None:
        if member < 0:
            raise ValueError(f"member must be >= 0; got {member}")
        if len(session) != 16:
            raise ValueError(f"session must be 16 bytes (see session_id); got {len(session)}")
        self.member, self.session, self.patience, self.limit = member, session, patience, limit
        self.refused = 0
        self._server = socket.create_server((host, port))
        self.address: Address = self._server.getsockname()[:2]
        self._addresses: dict[int, Address] = {}
        self._out: dict[int, socket.socket] = {}
        self._mail: deque[Mail] = deque()
        self._lost: dict[int, str] = {}
        self._news = threading.Condition()
        self._wake, self._woken = socket.socketpair()
        self._reader = threading.Thread(target=self._read_all, name=f"mailbox {member}", daemon=True)
        self._reader.start()

    def __enter__(self) -> Mailbox:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # Who is there.

    @property
    def members(self) -> tuple[int, ...]:
        """This member and all that it knows an address of, ascending."""
        return tuple(sorted({self.member, *self._addresses}))

    @property
    def lost(self) -> tuple[int, ...]:
        """Members whose connection ended, or that could not be reached, since they were last connected."""
        with self._news:
            return tuple(sorted(self._lost))

    def address_of(self, member: int) -> Address:
        """Where a known member listens."""
        return self.address if member == self.member else self._addresses[member]

    def connect(self, member: int, address: Address) -> None:
        """Make a member known; it is dialled when something is sent to it."""
        if member == self.member:
            raise ValueError(f"member must be another than this one, {self.member}; got {member}")
        self.forget(member)
        self._addresses[member] = (address[0], int(address[1]))

    def introduce(self, transport: Transport) -> None:
        """Make the members of a process group known to each other: every one calls this at the same time."""
        everyone = transport.all_gather_bytes(json.dumps([self.member, *self.address]).encode())
        for member, host, port in (json.loads(bytes(entry)) for entry in everyone):
            if member != self.member:
                self.connect(member, (host, port))

    def forget(self, member: int) -> None:
        """Drop a member: its address, its connection, and mail of it that was not read."""
        self._addresses.pop(member, None)
        self._hang_up(member)
        with self._news:
            self._lost.pop(member, None)
            self._mail = deque(mail for mail in self._mail if mail.sender != member)

    # Mail.

    def send(self, to: int, round: int, payload: Payload) -> None:
        """Send a frame. Raises ValueError for an unknown member, PeerLost for one that cannot be reached.

        A frame may be lost without an error if its receiver dies before it reads it.
        """
        if to == self.member:
            with self._news:
                self._mail.append(Mail(to, round, bytes(payload)))
            return
        if to not in self._addresses:
            raise ValueError(f"to must be one of the members {self.members}; got {to}")
        packed = Frame(self.session, round, self.member, payload).pack()
        try:
            if to not in self._out:
                self._out[to] = socket.create_connection(self._addresses[to], timeout=self.patience)
                self._out[to].setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._out[to].sendall(packed)
        except OSError as error:
            self._hang_up(to)
            with self._news:
                self._lost[to] = str(error)
            raise PeerLost(to, str(error)) from None

    def recv(self, timeout: float | None, from_: int | None = None) -> Mail:
        """The next mail, or the next one from a member; ``timeout`` in seconds, None waits for ever.

        Raises TimeoutError if none came, PeerLost if ``from_`` has hung up and nothing of it is left to read.
        """
        end = None if timeout is None else time.monotonic() + timeout
        with self._news:
            while True:
                for i, mail in enumerate(self._mail):
                    if from_ is None or mail.sender == from_:
                        del self._mail[i]
                        return mail
                if from_ is not None and from_ in self._lost:
                    raise PeerLost(from_, self._lost[from_])
                left = None if end is None else end - time.monotonic()
                if (left is not None and left <= 0) or not self._news.wait(left):
                    raise TimeoutError(f"no mail{'' if from_ is None else f' from {from_}'} in {timeout} s")

    def close(self) -> None:
        """Hang up and stop listening. Mail that was not read is dropped."""
        self._wake.close()
        self._reader.join()
        for member in list(self._out):
            self._hang_up(member)

    def _hang_up(self, member: int) -> None:
        if member in self._out:
            self._out.pop(member).close()

    # The thread that accepts connections and reads frames.

    def _read_all(self) -> None:
        with selectors.DefaultSelector() as ready, self._server, self._woken:
            ready.register(self._server, selectors.EVENT_READ)
            ready.register(self._woken, selectors.EVENT_READ)
            while True:
                for key, _ in ready.select():
                    if key.fileobj is self._woken:
                        for open_key in list(ready.get_map().values()):
                            if isinstance(open_key.data, _Inbound):
                                open_key.data.socket.close()
                        return
                    if key.fileobj is self._server:
                        inbound = _Inbound(self._server.accept()[0])
                        ready.register(inbound.socket, selectors.EVENT_READ, inbound)
                    elif not self._take(key.data):
                        ready.unregister(key.fileobj)
                        key.data.socket.close()

    def _take(self, inbound: _Inbound) -> bool:
        """Read what has come on a connection; whether it stays open."""
        try:
            frame = inbound.read(self.session, self.limit)
        except FrameError:
            self.refused += 1
            return False
        except OSError as error:
            if inbound.sender is not None:
                with self._news:
                    self._lost[inbound.sender] = str(error) or "it hung up"
                    self._news.notify_all()
            return False
        if frame is not None:
            inbound.sender = frame.sender
            with self._news:
                self._lost.pop(frame.sender, None)
                self._mail.append(Mail(frame.sender, frame.round, frame.payload))
                self._news.notify_all()
        return True


class _Inbound:
    """A connection that another member dialled, and the frame that is coming in on it."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self.socket = connection
        self.sender: int | None = None
        self._buffer, self._filled = bytearray(Frame.HEAD), 0

    def read(self, session: bytes, limit: int) -> Frame | None:
        """Read once; the frame if that completed one. Raises ConnectionError at the end of the connection,
        FrameError for what is no frame of the session."""
        try:
            count = self.socket.recv_into(memoryview(self._buffer)[self._filled :])
        except BlockingIOError:
            return None
        if count == 0:
            raise ConnectionError("it hung up")
        self._filled += count
        if self._filled < len(self._buffer):
            return None
        if self._filled == Frame.HEAD:
            length = Frame.length_of(self._buffer)
            if length > limit:
                raise FrameError(f"a frame of {length} bytes; at most {limit} are taken")
            self._buffer = self._buffer.ljust(length, b"\0")
            return None
        whole, self._buffer, self._filled = self._buffer, bytearray(Frame.HEAD), 0
        return Frame.unpack(whole, session)
