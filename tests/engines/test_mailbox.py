"""Mailboxes: frames between members over real sockets, and what happens when members go or send nonsense."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress

import pytest

from cograd.core.message import Frame, session_id
from cograd.engines.mailbox import Mail, Mailbox, PeerLost
from cograd.engines.transport import Alone

SESSION = session_id("mailbox test")


@pytest.fixture
def two():
    with Mailbox(0, SESSION) as a, Mailbox(7, SESSION) as b:
        a.connect(7, b.address)
        b.connect(0, a.address)
        yield a, b


def test_mail_arrives_in_order_with_its_sender_and_round(two):
    a, b = two
    for round in range(50):
        a.send(7, round, bytes([round]) * round)
    assert [b.recv(5) for _ in range(50)] == [Mail(0, n, bytes([n]) * n) for n in range(50)]
    assert a.members == b.members == (0, 7)
    assert a.address_of(7) == b.address


def test_a_large_frame_arrives_whole(two):
    a, b = two
    payload = bytes(range(256)) * 20_000
    thread = threading.Thread(target=a.send, args=(7, 3, payload))
    thread.start()
    assert bytes(b.recv(10).payload) == payload
    thread.join()


def test_mail_of_one_member_can_be_asked_for(two):
    a, b = two
    b.send(7, 0, b"to myself")
    a.send(7, 1, b"first")
    a.send(7, 2, b"second")
    assert b.recv(5, from_=0).round == 1
    assert b.recv(5).sender == 7
    assert b.recv(5).round == 2


def test_no_mail_is_a_timeout(two):
    with pytest.raises(TimeoutError, match=r"no mail from 7 in 0\.01 s"):
        two[0].recv(0.01, from_=7)


def test_a_member_that_hangs_up_is_lost_after_its_mail_was_read(two):
    a, b = two
    a.send(7, 0, b"last words")
    a.close()
    assert b.recv(5, from_=0).payload == b"last words"
    with pytest.raises(PeerLost, match="member 0 is lost: it hung up") as caught:
        b.recv(5, from_=0)
    assert caught.value.member == 0
    assert b.lost == (0,)
    with pytest.raises(PeerLost, match="member 0 is lost"):
        b.send(0, 1, b"are you there?")


def test_a_member_that_comes_back_is_not_lost(two):
    a, b = two
    b.send(0, 0, b"")
    a.recv(5)
    b.close()
    with pytest.raises(PeerLost):
        a.recv(5, from_=7)
    with Mailbox(7, SESSION) as again:
        a.connect(7, again.address)
        assert a.lost == ()
        a.send(7, 1, b"hello")
        assert again.recv(5).payload == b"hello"


def test_what_is_no_frame_of_the_session_is_refused_and_harms_nobody(two):
    a, b = two
    altered = bytearray(Frame(SESSION, 0, 3, b"text").pack())
    altered[-20] ^= 1
    huge = bytearray(Frame(SESSION, 0, 3, b"text").pack())
    huge[40:48] = (2**40).to_bytes(8, "little")
    foreign = Frame(session_id("another"), 0, 3, b"text").pack()
    for nonsense in (b"GET / HTTP/1.1\r\n" * 5, bytes(altered), bytes(huge), foreign):
        with socket.create_connection(b.address) as stranger:
            stranger.sendall(nonsense)
            stranger.settimeout(5)
            with suppress(ConnectionResetError):
                assert stranger.recv(1) == b""
    assert b.refused == 4
    a.send(7, 0, b"still here")
    assert b.recv(5).payload == b"still here"


def test_a_forgotten_member_is_unknown(two):
    a, b = two
    b.send(0, 0, b"x")
    b.send(0, 1, b"y")
    assert a.recv(5).round == 0
    a.forget(7)
    assert a.members == (0,)
    with pytest.raises(ValueError, match=r"to must be one of the members \(0,\); got 7"):
        a.send(7, 0, b"")


def test_introducing_a_group_of_one_knows_nobody(two):
    a, _ = two
    a.forget(7)
    a.introduce(Alone())
    assert a.members == (0,)


def test_bad_arguments_are_refused(two):
    with pytest.raises(ValueError, match="member must be >= 0; got -1"):
        Mailbox(-1, SESSION)
    with pytest.raises(ValueError, match="session must be 16 bytes"):
        Mailbox(0, b"short")
    with pytest.raises(ValueError, match="member must be another than this one, 0; got 0"):
        two[0].connect(0, ("127.0.0.1", 1))
