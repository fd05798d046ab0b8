"""Actors on the virtual clock and on real sockets: order, times, counts, and the same numbers on both."""

from __future__ import annotations

import threading

import pytest

from cograd.core.ledger import Ledger
from cograd.core.message import Frame, session_id
from cograd.engines.events import Net, Virtual, serve
from cograd.engines.mailbox import Mailbox

SESSION = session_id("events test")


class Relay:
    """Passes a number round the ring, adding its rank, until it is large enough; keeps a log."""

    def __init__(self, limit: int = 20) -> None:
        self.limit, self.log = limit, list[tuple[str, float, int]]()

    def start(self, net: Net) -> None:
        if net.rank == 0:
            net.after(1.0, "go")

    def timer(self, net: Net, key: object) -> None:
        self.log.append((str(key), net.now, 0))
        net.send(1, b"\0")

    def receive(self, net: Net, sender: int, payload) -> None:
        value = payload[0] + net.rank
        self.log.append(("got", net.now, value))
        net.send((net.rank + 1) % net.members, bytes([value]))
        if value >= self.limit:
            net.stop()


def values(relay: Relay) -> list[int]:
    return [value for kind, _, value in relay.log if kind == "got"]


def test_messages_take_their_time():
    relays = [Relay() for _ in range(3)]
    clock = Virtual(relays, delay=lambda sender, to, nbytes: 0.5 + sender + nbytes)
    assert clock.run(until=2.0) == 2.0
    assert relays[0].log == [("go", 1.0, 0)]
    clock.run()
    assert relays[1].log[0] == ("got", 2.5, 1)
    assert relays[2].log[0] == ("got", 5.0, 3)
    assert relays[0].log[1] == ("got", 8.5, 3)


def test_the_ledger_counts_every_message():
    ledger = Ledger()
    clock = Virtual([Relay() for _ in range(3)], ledger=ledger)
    clock.run()
    assert ledger.sent() == len(ledger)
    assert ledger.sent(size="frame") == len(ledger) * (1 + Frame.OVERHEAD)
    assert clock.events >= len(ledger) - 3


def test_equal_times_keep_the_order_of_sending_and_two_runs_are_the_same():
    class Burst:
        def __init__(self) -> None:
            self.got = list[int]()

        def start(self, net: Net) -> None:
            for n in range(5) if net.rank == 0 else ():
                net.send(1, bytes([n]))

        def timer(self, net: Net, key: object) -> None: ...

        def receive(self, net: Net, sender: int, payload) -> None:
            self.got.append(payload[0])

    runs = []
    for _ in range(2):
        bursts = [Burst(), Burst()]
        Virtual(bursts).run()
        runs.append(bursts[1].got)
    assert runs == [[0, 1, 2, 3, 4]] * 2


def test_the_same_actors_over_sockets_get_the_same_numbers():
    simulated = [Relay() for _ in range(3)]
    Virtual(simulated).run()
    real = [Relay() for _ in range(3)]
    boxes = [Mailbox(10 + rank, SESSION) for rank in range(3)]
    for box in boxes:
        for other in boxes:
            if other is not box:
                box.connect(other.member, other.address)
    threads = [
        threading.Thread(target=serve, args=(relay, box, (10, 11, 12)), kwargs={"until": 300, "unit": 0.01})
        for relay, box in zip(real, boxes, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    for box in boxes:
        box.close()
    assert [values(r) for r in real] == [values(r) for r in simulated]
    assert real[0].log[0][1] >= 1.0, "a timer does not come early"


def test_waiting_for_nothing_ends_with_a_timeout():
    class Idle(Relay):
        def start(self, net: Net) -> None: ...

    with Mailbox(0, SESSION) as box, pytest.raises(TimeoutError, match="no mail"):
        serve(Idle(), box, (0,), patience=0.01)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="actors must hold one actor a party; got none"):
        Virtual([])
    net = Virtual([Relay(), Relay()])._nets[0]
    with pytest.raises(ValueError, match=r"to must be another party in 0 \.\. 1; got 0"):
        net.send(0, b"")
    with pytest.raises(ValueError, match="delay must be >= 0; got -1"):
        net.after(-1.0)
    with Mailbox(0, SESSION) as box, pytest.raises(ValueError, match="parties must hold each member once"):
        serve(Relay(), box, (1, 2))
