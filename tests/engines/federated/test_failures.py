"""What goes wrong at a client is named, and changes nothing."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch

from cograd.clients.baselines import FedAvg
from cograd.engines.federated import ClientError, Everyone, NotFinite
from cograd.engines.federated.protocol import all_finite
from cograd.engines.federated.workers import Forked
from engines.federated.support import LOCAL, Faulty, digest, same, simulation


def stopped(does: str, **options):
    """A simulation whose second round failed with an error, what it was before, and the error's text."""
    sim = simulation(Faulty(LOCAL, does=does), sampler=Everyone(), **options)
    sim.run(1)
    before = [t.clone() for t in digest(sim)], vars(sim.tally) | {"seconds": 0, "work": dict(sim.tally.work)}
    with pytest.raises(ClientError) as error:
        sim.run(2)
    return sim, before, str(error.value)


def unchanged(sim, before) -> bool:
    tensors, tally = before
    same_tally = vars(sim.tally) | {"seconds": 0} == tally
    return same_tally and all(torch.equal(a, b) for a, b in zip(digest(sim), tensors, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("does", "cause"),
    [
        ("raise", "RuntimeError: out of paper"),
        ("state", "TypeError: state 'list' must be a tensor or a scalar; got list"),
        ("content", "TypeError: content 'delta' must be a tensor; got float"),
    ],
)
def test_a_task_that_fails_is_named_and_changes_nothing(workers, does, cause):
    sim, before, message = stopped(does, workers=workers)
    with sim:
        assert message.startswith("client 2, task 'train', round 1:\n")
        assert cause in message
        assert unchanged(sim, before)
        assert [float(sim.states[c]["rounds"]) for c in range(6)] == [1] * 6


@pytest.mark.parametrize("workers", [0, 2])
def test_after_a_failure_the_round_can_be_tried_again(workers):
    sim, _, _ = stopped("raise", workers=workers)
    with sim:
        sim.method.does = "0.5"  # from now on client 2 sends something harmless
        sim.run(3)
        fresh = simulation(Faulty(LOCAL, does="0.5"), sampler=Everyone())
        fresh.run(3)
        assert same(sim, fresh)
        assert vars(sim.tally) | {"seconds": 0} == vars(fresh.tally) | {"seconds": 0}


def test_a_worker_that_dies_is_named_with_its_client():
    sim, before, message = stopped("die", workers=2)
    with sim:
        assert message == "client 2, task 'train', round 1: its worker process died (signal 9)"
        assert unchanged(sim, before)
        sim.method.does = "0.5"
        sim.run(3)  # other workers take their place


def test_a_worker_that_was_killed_while_idle_is_named_too():
    with simulation(FedAvg(LOCAL), sampler=Everyone(), workers=1) as sim:
        sim.run(1)
        (process,) = sim._executor._processes
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        with pytest.raises(ClientError, match=r"client 0, task 'train', round 1: .*died \(signal 9\)"):
            sim.run(2)


def test_workers_end_with_the_simulation():
    sim = simulation(FedAvg(LOCAL), sampler=Everyone(), workers=2)
    other = simulation(FedAvg(LOCAL), sampler=Everyone(), workers=1)
    sim.run(1)
    other.run(1)  # its worker was forked while the others were there
    processes = sim._executor._processes
    began = time.monotonic()
    sim.close()
    assert time.monotonic() - began < 2
    assert all(not process.is_alive() for process in processes)
    other.run(2)
    other.close()


def test_an_interrupted_exchange_leaves_no_answers_behind(monkeypatch):
    """Answers that were still to come when it ended must not be taken for those of the next exchange."""
    straight = simulation(FedAvg(LOCAL), sampler=Everyone())
    straight.run(3)
    with simulation(FedAvg(LOCAL), sampler=Everyone(), workers=2) as sim:
        sim.run(1)
        take, calls = Forked._take, []

        def interrupted(self, pipe, job):
            calls.append(job)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return take(self, pipe, job)

        monkeypatch.setattr(Forked, "_take", interrupted)
        with pytest.raises(KeyboardInterrupt):
            sim.run(2)
        monkeypatch.undo()
        sim.run(3)
        assert same(sim, straight)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_a_reply_that_is_not_finite_is_refused(value):
    sim, before, message = stopped(value)
    expected = "the reply of client 2 to 'train' in round 1 holds NaN or infinity"
    assert message == f"{expected}; nonfinite='exclude' would leave it out"
    assert unchanged(sim, before)
    with pytest.raises(NotFinite):
        sim.run(2)


@pytest.mark.parametrize("workers", [0, 2])
def test_or_excluded_with_the_state_that_came_with_it(workers):
    with simulation(Faulty(LOCAL, does="nan"), sampler=Everyone(), nonfinite="exclude", workers=workers) as sim:
        rows = sim.run(2)
        after = sim.server["x"].clone()
        rows = sim.run(3)
    assert rows[1].lost == {2: "the reply of client 2 to 'train' in round 1 holds NaN or infinity"}
    assert [row.participants for row in rows] == [tuple(range(6)), (0, 1, 3, 4, 5), tuple(range(6))]
    assert rows[0].lost == rows[2].lost == {}
    assert [float(sim.states[c]["rounds"]) for c in range(6)] == [3, 3, 2, 3, 3, 3]
    without = simulation(FedAvg(LOCAL), sampler=lambda r, n, s: [0, 1, 3, 4, 5] if r == 1 else list(range(n)))
    without.run(2)
    assert torch.equal(after, without.server["x"])


def test_finite_is_finite_even_where_the_sum_overflows():
    large = torch.full((4,), 3e38)
    assert all_finite(
        {"x": large, "half": torch.full((9,), 6e4, dtype=torch.float16), "n": torch.ones(2).long()}
    )
    assert all_finite({"none": torch.zeros(0)})
    for value in (float("nan"), float("inf"), -float("inf")):
        assert not all_finite({"fine": large, "x": torch.tensor([1.0, value, 3e38, 3e38])})


def test_a_reply_of_another_shape_is_named():
    sim = simulation(Faulty(LOCAL, does="shape"), sampler=Everyone())
    sim.run(1)
    with pytest.raises(ValueError, match=r"'delta' of client 2 must have shape \(66,\); got \(3,\)"):
        sim.run(2)


def test_a_task_that_the_method_does_not_have_is_named():
    class Wrong(FedAvg):
        def ask(self, server, session):
            return [type(send)(send.to, "tain", send.content) for send in super().ask(server, session)]

    with pytest.raises(ClientError, match=r"client 0, task 'tain', round 0:(?s:.*)must be one of train; got"):
        simulation(Wrong(LOCAL), sampler=Everyone()).run(1)
