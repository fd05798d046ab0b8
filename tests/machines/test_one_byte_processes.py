"""Just One Byte in real processes: a fixed group over gloo, and a free one that is joined and left."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cograd.engines.launch import Workers
from machines import one_byte_jobs as jobs

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def pool() -> Iterator[Any]:
    with Workers(3, threads=1) as workers:
        yield lambda job, **args: workers.call(f"machines.one_byte_jobs:{job}", args)


@pytest.mark.parametrize("variant", list(jobs.VARIANTS))
def test_replicas_are_the_same_bits_and_those_of_a_simulation(pool: Any, variant: str) -> None:
    rounds = 50 if variant == "plain" else 12
    ranks = pool("equal_to_simulation", variant=variant, rounds=rounds)
    assert len({rank["bits"] for rank in ranks}) == 1
    assert ranks[0]["bits"] == ranks[0]["simulated"]
    elements = sum(p.numel() for p in jobs.small().parameters())
    width = {"nibbles": 2, "float32": 16, "full zeroth order": 4 * elements, "backprop": 4 * elements}
    for rank in ranks:
        assert rank["wire"] == [width.get(variant, jobs.SAMPLES)]
        assert rank["sent"] == [rounds * width.get(variant, jobs.SAMPLES)] * 3
        assert all(rank["grads"])
    if variant == "plain":
        assert len({str(rank["losses"]) for rank in ranks}) == 3  # everyone has its own data


def test_a_million_parameters_send_a_byte_an_estimate(pool: Any) -> None:
    ranks = pool("wide")
    assert [rank["sent"] for rank in ranks] == [6, 6, 6]
    assert len({rank["bits"] for rank in ranks}) == 1


@pytest.mark.parametrize("victim", [0, 1])
def test_one_flipped_bit_is_found_before_the_next_step_and_the_step_pays_nothing_for_it(
    pool: Any, victim: int
) -> None:
    ranks = pool("flipped", victim=victim, check_every=4)
    others = "0, 2" if victim else "1, 2"
    for rank in ranks:
        said = rank["said"]
        assert said["text"].startswith(
            f"after 4 rounds the weights of rank {victim} are not those of ranks {others}: let"
        )
        assert (list(said["ranks"]), said["round"]) == ([victim], 4)
        assert said["sent"] == 3 * 4 * jobs.SAMPLES
        assert rank["payload"] == [[t, jobs.SAMPLES] for t in range(8)]
        assert [tuple(c) for c in rank["checks"]] == [(4, 16, 2)] * 6  # found, and again once it is repaired
    assert len({rank["bits"] for rank in ranks}) == 1


def test_without_checks_replicas_differ_unseen(pool: Any) -> None:
    ranks = pool("flipped", victim=1, check_every=0)
    assert [rank["said"] for rank in ranks] == [{}] * 3
    assert [rank["checks"] for rank in ranks] == [[]] * 3
    assert len({rank["bits"] for rank in ranks}) == 2


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("check_every", "another check_every: 0 there, 64 here"),
        ("lr", "another lr: 0.03 there, 0.02 here"),
        ("weights", "another start of the trainable parameters"),
        ("frozen", "another frozen part of the model"),
        ("shapes", "another list of trainable parameters"),
    ],
)
def test_machines_that_differ_are_refused_by_all(pool: Any, what: str, message: str) -> None:
    said = pool("other_on_rank_1", what=what)
    assert all(text.startswith("SchemaError: rank ") for text in said)
    assert message in said[0]


class Machine:
    """A process that is one member, and what it says."""

    def __init__(self, member: int, **job: Any) -> None:
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "one_byte_jobs.py"), json.dumps({"member": member, **job})],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=env,
        )
        self.member, self.heard = member, b""

    def hear(self, what: str, within: float = 60) -> Any:
        """The value of the next event of that name."""
        assert self.process.stdout is not None
        end = time.monotonic() + within
        with selectors.DefaultSelector() as ready:
            ready.register(self.process.stdout, selectors.EVENT_READ)
            while time.monotonic() < end:
                line, newline, rest = self.heard.partition(b"\n")
                if newline:
                    self.heard, event = rest, json.loads(line)
                    if what in event:
                        return event if len(event) > 1 else event[what]
                    continue
                assert ready.select(end - time.monotonic()), f"machine {self.member} said nothing in time"
                more = os.read(self.process.stdout.fileno(), 1 << 16)
                assert more, f"machine {self.member} has ended"
                self.heard += more
        raise AssertionError(f"machine {self.member} did not say {what!r} in time")

    def tell(self, what: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(what).encode() + b"\n")
        self.process.stdin.flush()

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


def test_machines_join_and_die_and_the_rest_agree_with_a_simulation_of_what_was_agreed() -> None:
    """Three machines; a fourth joins at round 30 by replay; one is killed at round 40, the leader at round 50;
    a fifth joins at round 55 by download."""
    meet = {0: 3, 30: 4, 55: 3}
    halts = {2: 40, 0: 50}
    machines = [Machine(m, rounds=60, meet=meet, halt=halts.get(m), download=m == 4) for m in range(5)]
    try:
        first, *others = machines
        start = first.hear("address")
        first.tell({})
        for machine in others[:2]:
            machine.hear("address")
            machine.tell({0: start})
            assert machine.hear("joined") == 0
        newcomer, downloader = others[2:]
        address_of_3 = newcomer.hear("address")
        while first.hear("waiting") != 30:
            pass
        newcomer.tell({0: start})
        assert newcomer.hear("joined") == 30
        for victim in (machines[2], first):
            assert victim.hear("halted") == halts[victim.member]
            os.kill(victim.process.pid, signal.SIGKILL)
        while newcomer.hear("waiting") != 55:
            pass
        downloader.hear("address")
        downloader.tell({3: address_of_3})
        assert downloader.hear("joined") == 55
        ends = [machine.hear("bits") for machine in (machines[1], newcomer, downloader)]
    finally:
        for machine in machines:
            machine.end()
    assert len({end["bits"] for end in ends}) == 1
    assert ends[0]["log"] == ends[1]["log"] == ends[2]["log"]
    assert ends[0]["members"] == [1, 3, 4]
    members = [tuple(entry[0]) for entry in ends[0]["log"]]
    assert members[:30] == [(0, 1, 2)] * 30
    assert members[30:40] == [(0, 1, 2, 3)] * 10
    assert members[40:50] == [(0, 1, 3)] * 10
    assert members[50:55] == [(1, 3)] * 5
    assert members[55:] == [(1, 3, 4)] * 5
    assert ends[0]["payload"] == [[t, jobs.SAMPLES] for t in range(60)]
    assert ends[1]["payload"] == [[t, jobs.SAMPLES] for t in range(30, 60)]
    assert_simulation_agrees(ends[0]["log"], ends[0]["bits"])


def assert_simulation_agrees(log: list[Any], bits: str) -> None:
    """Every byte measured again in one process, from the sets that were agreed."""
    torch.set_num_threads(1)
    model = jobs.small()
    zo = jobs.optimizer(model)
    for t, (members, codes) in enumerate(log):
        payloads = [bytes(zo.estimate(jobs.loss_of(model), jobs.batches(t, m), m).payload) for m in members]
        assert b"".join(payloads).hex() == codes
        zo.apply(members, payloads)
    assert zo.fingerprint() == bits
