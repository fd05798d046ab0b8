"""Saving: a run that was stopped after any round goes on bit for bit; states beyond the cap lie on disk."""

from __future__ import annotations

import gc
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cograd.clients import FedSpeed
from cograd.clients.baselines import FedAvg, Scaffold
from cograd.core.codecs import Float16, TopK
from cograd.engines.federated import Bernoulli, Cyclic, Everyone, Reply
from cograd.engines.federated.store import StateStore, read, write
from engines.federated.support import (
    LOCAL,
    Faulty,
    Feedback,
    clients,
    digest,
    history,
    named,
    same,
    simulation,
)

ROUNDS = 4

# Checkpoints.


@pytest.mark.parametrize("method", [FedAvg(LOCAL, momentum=0.5), FedSpeed(LOCAL), Scaffold(LOCAL)], ids=named)
@pytest.mark.parametrize("buffers", ["local", "mean"])
def test_a_run_that_was_stopped_goes_on_bit_for_bit(tmp_path, method, buffers):
    options = {
        "kind": "norm", "buffers": buffers, "up": Feedback(), "down": Float16(), "personal": True,
        "response_time": lambda client, answers: 1 + client + answers,
    }  # fmt: skip
    whole = simulation(method, **options)
    whole.run(ROUNDS)
    for stop in range(1, ROUNDS + 1):
        first = simulation(method, **options)
        first.run(stop, checkpoint=tmp_path / str(stop), save_every=1)
        second = simulation(method, **options)
        second.run(ROUNDS, checkpoint=tmp_path / str(stop))
        assert same(whole, second)
        assert history(whole) == history(second)


def test_replies_on_their_way_are_saved(tmp_path):
    times = {"response_time": [1, 2, 3, 4, 5, 6], "timeout": 3.5, "sampler": Everyone()}
    whole = simulation(**times)
    whole.run(ROUNDS)
    first = simulation(**times)
    first.run(2)
    assert any(isinstance(event, Reply) for _, _, event in first.queue)
    first.save(tmp_path / "s")
    second = simulation(**times)
    second.load(tmp_path / "s")
    second.run(ROUNDS)
    assert same(whole, second)
    assert history(whole) == history(second)


def test_the_weights_at_the_start_are_saved(tmp_path):
    """A method may refer to them, and a resumed run may have been given others."""
    whole = simulation()
    whole.run(1)
    whole.save(tmp_path / "s")
    other = simulation()
    other.session.initial.add_(1)
    other.runner.initial.add_(1)
    other.load(tmp_path / "s")
    assert torch.equal(other.session.initial, whole.session.initial)
    assert torch.equal(other.runner.initial, whole.session.initial)


def test_loading_takes_back_what_came_after(tmp_path):
    sim = simulation(sampler=Cyclic(count=2))
    sim.run(1)
    sim.save(tmp_path / "s")
    before = [t.clone() for t in digest(sim)]
    sim.run(3)
    after = [t.clone() for t in digest(sim)]
    sim.load(tmp_path / "s")
    assert list(sim.states) == [0, 1]
    assert all(torch.equal(a, b) for a, b in zip(digest(sim), before, strict=True))
    sim.run(3)
    assert all(torch.equal(a, b) for a, b in zip(digest(sim), after, strict=True))


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"method": FedAvg(LOCAL)}, "method"),
        ({"method": FedSpeed(LOCAL, prox=0.2)}, "method"),
        ({"seed": 9}, "seed"),
        ({"data": clients(5)}, "sizes of the clients"),
        ({"up": Float16()}, "codecs"),
        ({"down": TopK(0.5)}, "codecs"),
        ({"kind": "norm", "buffers": "local"}, "model"),
        ({"sampler": Bernoulli(0.5)}, "sampler"),
        ({"timeout": 2.0}, "timeout"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_a_foreign_checkpoint_is_refused_and_names_what_differs(tmp_path, change, what):
    sim = simulation()
    sim.run(1)
    sim.save(tmp_path / "s")
    other = simulation(**change)
    before = digest(other)
    with pytest.raises(ValueError, match=f"another simulation: its {what} is .*, here "):
        other.load(tmp_path / "s")
    assert other.history == []
    assert all(torch.equal(a, b) for a, b in zip(digest(other), before, strict=True))


def test_a_sampler_that_holds_a_function_is_known_again(tmp_path):
    def everybody(round: int, clients: int, seed: int) -> list[int]:
        return list(range(clients))

    sim = simulation(sampler=everybody)
    sim.run(1)
    sim.save(tmp_path / "s")
    saved = json.loads((tmp_path / "s" / "simulation.json").read_text())
    assert not re.search("0x[0-9a-f]", saved["identity"]["sampler"])
    simulation(sampler=everybody).load(tmp_path / "s")


def test_a_saved_run_is_replaced_as_a_whole(tmp_path, monkeypatch):
    sim = simulation()
    sim.run(2, checkpoint=tmp_path / "s", save_every=1)
    assert [p.name for p in tmp_path.iterdir()] == ["s"]
    expected = json.loads((tmp_path / "s" / "simulation.json").read_text())
    sim.run(3)

    def full(*_: object, **__: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("cograd.engines.federated.saving.write", full)
    with pytest.raises(OSError, match="disk full"):
        sim.save(tmp_path / "s")
    assert json.loads((tmp_path / "s" / "simulation.json").read_text()) == expected


def test_it_is_saved_between_rounds_only(tmp_path):
    sim = simulation(sampler=Everyone(), response_time=[1, 2, 3, 4, 5, 6])
    sim.save(tmp_path / "s")  # before the first
    assert list(sim.until(3.5)) == []
    with pytest.raises(RuntimeError, match="saved between rounds"):
        sim.save(tmp_path / "s")
    sim.run(1)
    sim.save(tmp_path / "s")


def test_what_was_saved_before_an_error_goes_on_after_it(tmp_path):
    sim = simulation(Faulty(LOCAL), sampler=Everyone())
    with pytest.raises(RuntimeError, match="out of paper"):
        sim.run(3, checkpoint=tmp_path / "s", save_every=1)
    repaired = simulation(Faulty(LOCAL), sampler=Everyone())
    repaired.tasks = repaired.runner.tasks = {"train": Faulty(LOCAL, does="0").train}
    repaired.run(3, checkpoint=tmp_path / "s")
    assert [row.round for row in repaired.history] == [1, 2, 3]


# States on disk.


def test_states_beyond_the_cap_lie_on_disk_and_change_nothing():
    runs = []
    for options in ({}, {"cap": 600}, {"cap": 0}, {"cap": 600, "workers": 2}):
        sim = simulation(sampler=Cyclic(count=2), personal=True, **options)
        sim.run(6)
        runs.append(sim)
    free, *others = runs
    for capped in others:
        assert capped.states.memory <= capped.states.cap < free.states.memory
        assert capped.states.disk > 0
        assert same(free, capped)
        assert history(free) == history(capped)
        folder = capped.states._folder
        assert folder.exists()
        capped.close()
        assert not folder.exists()
        assert capped.states.disk == 0


def test_a_capped_run_is_saved_and_resumed(tmp_path):
    whole = simulation(sampler=Cyclic(count=2))
    whole.run(6)
    with simulation(sampler=Cyclic(count=2), cap=300) as first:
        first.run(3, checkpoint=tmp_path / "s", save_every=3)
    with simulation(sampler=Cyclic(count=2), cap=300) as second:
        second.run(6, checkpoint=tmp_path / "s")
        assert second.states.memory <= 300
        assert same(whole, second)


@settings(max_examples=60, deadline=None)
@given(
    cap=st.one_of(st.none(), st.integers(0, 200)),
    puts=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 12)), max_size=30),
)
def test_a_store_gives_back_what_it_was_last_given(cap, puts):
    store, expected = StateStore(cap), {}
    for client, size in puts:
        state = {
            "t": torch.arange(float(size)),
            "size": size,
            "name": f"client {client}",
            "even": size % 2 == 0,
        }
        store[client] = expected[client] = state
        assert cap is None or store.memory <= cap
        assert store[client]["size"] == size
    assert list(store) == sorted(expected)
    assert len(store) == len(expected)
    for client, state in expected.items():
        assert torch.equal(store[client]["t"], state["t"])
        assert {k: v for k, v in store[client].items() if k != "t"} == {
            k: v for k, v in state.items() if k != "t"
        }
    assert store[99] == {}
    store.close()


def test_its_folder_goes_with_the_store_but_not_with_a_copy_in_another_process():
    store = StateStore(cap=0)
    store[0] = {"t": torch.ones(3)}
    folder = store._folder
    child = os.fork()
    if not child:
        store.close()
        os._exit(0)
    os.waitpid(child, 0)
    assert store[0]["t"].tolist() == [1, 1, 1]
    del store
    gc.collect()
    assert not folder.exists()


def test_what_lay_on_disk_is_not_found_empty_after_closing():
    store = StateStore(cap=0)
    store[0] = {"t": torch.ones(3)}
    store.close()
    with pytest.raises(RuntimeError, match="the state of client 0 lay on disk, and the store is closed"):
        store[0]
    store.clear()
    assert store[0] == {}
    store[0] = {"t": torch.zeros(1)}
    assert store[0]["t"].tolist() == [0]
    store.close()


def test_tensors_that_share_storage_are_written_each_by_itself(tmp_path):
    whole = torch.arange(6.0)
    write({"whole": whole, "part": whole[2:4], "turned": whole.view(2, 3).t()}, tmp_path / "f")
    found = read(tmp_path / "f")
    assert found["part"].tolist() == [2, 3]
    assert found["turned"].tolist() == [[0, 3], [1, 4], [2, 5]]


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.uint8], ids=str
)
def test_every_dtype_is_read_as_written(tmp_path, dtype):
    state = {"t": torch.tensor([[0, 1], [2, 3]]).to(dtype), "none": torch.zeros(0, dtype=dtype)}
    write({**state, "x": 0.1, "n": 3, "yes": True, "text": "é"}, tmp_path / "f")
    found = read(tmp_path / "f")
    assert found["t"].dtype == dtype
    assert torch.equal(found["t"], state["t"])
    assert (found["x"], found["n"], found["yes"], found["text"]) == (0.1, 3, True, "é")


def test_another_safetensors_file_is_no_state(tmp_path: Path):
    from safetensors.torch import save_file

    save_file({"a": torch.ones(2)}, tmp_path / "f")
    with pytest.raises(ValueError, match="is not a state that cograd wrote"):
        read(tmp_path / "f")


def test_a_checkpoint_that_is_not_there_starts_anew(tmp_path):
    sim = simulation()
    sim.run(1, checkpoint=tmp_path / "none")
    shutil.rmtree(tmp_path / "none")
    fresh = simulation()
    fresh.run(1, checkpoint=tmp_path / "none")
    assert same(sim, fresh)
