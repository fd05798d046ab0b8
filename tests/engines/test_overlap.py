"""Exchanges under way, in one process and alone; on torch.distributed they are tested with Streaming DiLoCo."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from cograd.engines.overlap import AsyncAlone, InProcess, overlapping


def test_everyone_reads_everyones_bytes_in_rank_order_and_then_they_are_gone() -> None:
    links = InProcess.group(3)
    pending = [link.start(bytes([link.rank])) for link in reversed(links)]
    second = [link.start(b"x") for link in links]
    assert [p.wait() for p in pending] == [[b"\0", b"\1", b"\2"]] * 3
    assert [p.wait() for p in pending] == [[b"\0", b"\1", b"\2"]] * 3
    assert [p.wait() for p in second] == [[b"x"] * 3] * 3
    assert links[0]._board.messages == {}


def test_waiting_for_what_was_not_sent_names_who_is_late() -> None:
    links = InProcess.group(3)
    pending = links[1].start(b"x")
    with pytest.raises(RuntimeError, match=r"replicas \[0, 2\] have not sent their part of exchange 0"):
        pending.wait()


def test_all_send_before_any_receives() -> None:
    links, said = InProcess.group(2), list[str]()
    for link in links:
        link.in_step(
            lambda r=link.rank: said.append(f"send {r}"), lambda r=link.rank: said.append(f"receive {r}")
        )
    assert said == ["send 0", "send 1", "receive 0", "receive 1"]


def test_joining_compares_with_those_that_came_before() -> None:
    links = InProcess.group(2)
    assert links[1].all_gather_bytes(b"b") == [b"b"]
    assert links[0].all_gather_bytes(b"a") == [b"a", b"b"]
    assert links[0].all_gather_bytes(b"c") == [b"c"]


def test_without_a_group_a_party_is_alone() -> None:
    assert not dist.is_initialized()
    alone = overlapping(None)
    assert isinstance(alone, AsyncAlone)
    assert alone.start(b"x").wait() == [b"x"]
