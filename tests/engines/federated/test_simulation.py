"""The simulator: deterministic, resumable, honest about what went wrong."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from cograd.clients import FedSpeed
from cograd.clients.baselines import FedAvg, Scaffold
from cograd.core.codecs import Float16, TopK, Uniform
from cograd.core.streams import stream
from cograd.data.clients import ClientData
from cograd.engines.federated import (
    Available,
    Bernoulli,
    ClientError,
    Cyclic,
    Everyone,
    LocalSGD,
    NoReplies,
    Simulation,
)
from cograd.engines.federated import (
    Uniform as Share,
)
from cograd.engines.federated.protocol import Lost, Reply, Session, Start, Timer
from cograd.engines.federated.store import StateStore, read, write

LOCAL = LocalSGD(lr=0.1, epochs=2, batch_size=4)
NOTHING = ClientData(torch.zeros(0, 5), torch.zeros(0), torch.zeros(0), torch.zeros(0))


def clients(n: int = 6, size: int = 10) -> list[ClientData]:
    draws = torch.Generator().manual_seed(0)
    found = []
    for client in range(n):
        x = torch.randn(size + 2 * client, 5, generator=draws) + client / n
        y = (x.sum(1) > client / 2).long()
        found.append(ClientData(x, y, x[:4], y[:4]))
    return found


def net(kind: str = "plain") -> nn.Module:
    torch.manual_seed(1)
    middle = {"plain": [], "norm": [nn.BatchNorm1d(8)], "dropout": [nn.Dropout(0.5)]}[kind]
    return nn.Sequential(nn.Linear(5, 8), *middle, nn.ReLU(), nn.Linear(8, 2))


def simulation(method=None, data=None, kind="plain", **options) -> Simulation:
    given = {"sampler": Share(0.5), **options}
    method = FedSpeed(LOCAL) if method is None else method
    return Simulation(
        method, net(kind), nn.functional.cross_entropy, clients() if data is None else data, **given
    )


def named(method) -> str:
    return type(method).__name__


def digest(sim: Simulation) -> list[Tensor]:
    states = (sorted(sim.states[client].items()) for client in sim.states)
    return [sim.server["x"], *(t for state in states for _, t in state if isinstance(t, Tensor))]


def same(one: Simulation, other: Simulation) -> bool:
    pairs = zip(digest(one), digest(other), strict=True)
    return all(torch.equal(a, b) for a, b in pairs) and one.tally.up == other.tally.up


# Determinism.


@pytest.mark.parametrize(
    "method", [FedAvg(LOCAL), FedSpeed(LOCAL), Scaffold(LOCAL)], ids=lambda m: type(m).__name__
)
@pytest.mark.parametrize("kind", ["plain", "dropout"])
def test_the_number_of_workers_changes_nothing(method, kind):
    runs = []
    for workers in (0, 1, 2):
        with simulation(method, kind=kind, workers=workers) as sim:
            sim.run(3)
            runs.append(sim)
    assert same(runs[0], runs[1])
    assert same(runs[0], runs[2])
    with simulation(method, kind=kind, seed=1) as other:
        other.run(3)
    assert not torch.equal(other.server["x"], runs[0].server["x"])


def test_nor_does_the_order_in_which_replies_come():
    plain, late = simulation(FedAvg(LOCAL)), simulation(FedAvg(LOCAL), response_time=[6, 5, 4, 3, 2, 1])
    plain.run(3)
    late.run(3)
    assert torch.equal(plain.server["x"], late.server["x"])
    assert late.history[-1].time > plain.history[-1].time == 0


def test_memory_of_the_caller_is_left_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    threads = torch.get_num_threads()
    simulation().run(1)
    assert torch.get_num_threads() == threads
    net()
    torch.manual_seed(5)
    assert torch.equal(torch.rand(3), expected)


# Codecs.


@pytest.mark.parametrize("codec", [Float16(), TopK(0.3), Uniform(8)], ids=repr)
@pytest.mark.parametrize("where", ["up", "down"])
def test_any_codec_sits_on_either_link(codec, where):
    sim = simulation(FedAvg(LOCAL), **{where: codec})
    sim.run(2)
    plain = simulation(FedAvg(LOCAL))
    plain.run(2)
    assert getattr(sim.tally, where) < getattr(plain.tally, where)
    other = "down" if where == "up" else "up"
    assert getattr(sim.tally, other) == getattr(plain.tally, other)


def test_bytes_and_work_are_those_of_the_rounds_that_were_made():
    sim = simulation(FedAvg(LOCAL), sampler=Everyone())
    rows = sim.run(2)
    size = 4 * sim.session.space.numel
    assert [(row.up, row.down) for row in rows] == [(6 * size, 6 * size), (12 * size, 12 * size)]
    assert rows[0].work["grad"] == sum(LOCAL.length(len(c)) for c in clients())
    assert sim.ledger.sent() == 24 * size
    assert rows[0].participants == (0, 1, 2, 3, 4, 5)


# Saving.


@pytest.mark.parametrize(
    "method", [FedAvg(LOCAL, momentum=0.5), FedSpeed(LOCAL), Scaffold(LOCAL)], ids=lambda m: type(m).__name__
)
@pytest.mark.parametrize("buffers", ["local", "mean"])
def test_a_run_that_was_stopped_goes_on_bit_for_bit(tmp_path, method, buffers):
    options = {"kind": "norm", "buffers": buffers, "up": Float16(), "personal": True}
    whole = simulation(method, **options)
    whole.run(4)
    for stop in (1, 3):
        first = simulation(method, **options)
        first.run(stop, checkpoint=tmp_path / str(stop), save_every=1)
        second = simulation(method, **options)
        second.run(4, checkpoint=tmp_path / str(stop))
        assert same(whole, second)
        for mine, theirs in zip(whole.history, second.history, strict=True):
            assert {**vars(mine), "seconds": 0} == {**vars(theirs), "seconds": 0}


def test_a_run_with_messages_on_their_way_goes_on_bit_for_bit(tmp_path):
    times = {"response_time": [1, 2, 3, 4, 5, 6], "timeout": 3.5, "sampler": Everyone()}
    whole = simulation(**times)
    whole.run(4)
    first = simulation(**times)
    first.run(2)
    assert any(isinstance(event, Reply) for _, _, event in first.queue)
    first.save(tmp_path / "s")
    second = simulation(**times)
    second.load(tmp_path / "s")
    second.run(4)
    assert same(whole, second)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"method": FedAvg(LOCAL)}, "method"),
        ({"seed": 9}, "seed"),
        ({"data": clients(5)}, "sizes of the clients"),
        ({"up": Float16()}, "codecs"),
        ({"kind": "norm", "buffers": "local"}, "model"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_a_foreign_checkpoint_is_refused(tmp_path, change, what):
    sim = simulation()
    sim.run(1)
    sim.save(tmp_path / "s")
    with pytest.raises(ValueError, match=f"another simulation: its {what} is"):
        simulation(**change).load(tmp_path / "s")


def test_states_beyond_the_cap_lie_on_disk_and_change_nothing(tmp_path):
    free, capped = simulation(sampler=Cyclic(count=2)), simulation(sampler=Cyclic(count=2), cap=600)
    free.run(6)
    capped.run(6)
    assert capped.states.memory <= 600 < free.states.memory
    assert capped.states.disk > 0
    assert same(free, capped)
    folder = capped.states._folder
    assert folder.exists()
    capped.close()
    assert not folder.exists()


def test_a_store_gives_back_what_it_was_given(tmp_path):
    store = StateStore(cap=0)
    store[3] = {"h": torch.arange(4.0), "n": 2, "name": "x"}
    assert store.memory == 0
    assert torch.equal(store[3]["h"], torch.arange(4.0))
    assert (store[3]["n"], store[3]["name"], store[5], list(store)) == (2, "x", {}, [3])
    store[3] = {"h": torch.zeros(2)}
    assert store[3]["h"].tolist() == [0, 0]
    store.close()
    write({"a": torch.ones(2), "k": True}, tmp_path / "f.safetensors")
    assert read(tmp_path / "f.safetensors")["k"] is True
    with pytest.raises(ValueError, match="cap must be >= 0"):
        StateStore(cap=-1)


# Buffers.


def test_buffers_are_refused_local_or_averaged():
    with pytest.raises(ValueError, match=r"16 floating buffers.*buffers='local'.*buffers='mean'"):
        simulation(kind="norm")
    local = simulation(FedAvg(LOCAL), kind="norm", buffers="local", sampler=Everyone())
    local.run(1)
    own = [local.states[c]["engine.buffers"] for c in range(6)]
    assert not torch.equal(own[0], own[1])
    mean = simulation(FedAvg(LOCAL), kind="norm", buffers="mean", sampler=Everyone())
    mean.run(1)
    sizes = torch.tensor([float(len(c)) for c in clients()])
    expected = (torch.stack(own) * (sizes / sizes.sum())[:, None]).sum(0)
    assert torch.allclose(mean.buffers, expected, atol=1e-6)
    assert mean.tally.up - local.tally.up == 6 * 16 * 4


# What goes wrong.


@dataclass
class Faulty(FedAvg):
    """FedAvg whose client 2 does something else from round 1 on."""

    does: str = "raise"

    def train(self, state, content, data, ctx):
        state, reply = super().train({**state, "rounds": state.get("rounds", 0) + 1}, content, data, ctx)
        if ctx.client == 2 and ctx.round == 1:
            if self.does == "raise":
                raise RuntimeError("out of paper")
            if self.does == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            reply["delta"][3] = float("nan")
        return state, reply


@pytest.mark.parametrize("workers", [0, 2])
def test_a_task_that_raises_is_named_and_changes_nothing(workers):
    with simulation(Faulty(LOCAL), sampler=Everyone(), workers=workers) as sim:
        sim.run(1)
        before = [t.clone() for t in digest(sim)]
        with pytest.raises(ClientError, match=r"(?s)client 2, task 'train', round 1:.*out of paper"):
            sim.run(2)
        assert all(torch.equal(a, b) for a, b in zip(before, digest(sim), strict=True))
        assert [sim.states[c]["rounds"] for c in range(6)] == [1] * 6


def test_a_worker_that_dies_is_named():
    sim = simulation(Faulty(LOCAL, does="die"), sampler=Everyone(), workers=2)
    sim.run(1)
    message = r"client 2, task 'train', round 1: its worker process died \(signal 9\)"
    with pytest.raises(ClientError, match=message):
        sim.run(2)
    sim.close()


def test_a_reply_that_is_not_finite_is_refused_or_excluded_and_never_averaged():
    sim = simulation(Faulty(LOCAL, does="nan"), sampler=Everyone())
    with pytest.raises(ClientError, match="client 2 to 'train' in round 1 holds NaN or infinity"):
        sim.run(2)
    sim = simulation(Faulty(LOCAL, does="nan"), sampler=Everyone(), nonfinite="exclude")
    rows = sim.run(3)
    assert "client 2" in rows[1].lost[2]
    assert rows[1].participants == (0, 1, 3, 4, 5)
    assert rows[2].participants == (0, 1, 2, 3, 4, 5)
    assert bool(sim.server["x"].isfinite().all())
    assert sim.states[2]["rounds"] == 2


def test_late_replies_are_dropped_and_an_exchange_without_any_goes_on_with_the_first():
    sim = simulation(FedAvg(LOCAL), sampler=Everyone(), response_time=[1, 1, 1, 1, 1, 9], timeout=2.0)
    rows = sim.run(2)
    assert [row.participants for row in rows] == [(0, 1, 2, 3, 4)] * 2
    assert [row.time for row in rows] == [2.0, 4.0]
    sim = simulation(FedAvg(LOCAL), sampler=Everyone(), response_time=[5, 6, 6, 6, 6, 6], timeout=2.0)
    assert sim.run(1)[0].participants == (0,)


def test_the_server_ignores_replies_of_older_rounds_and_says_when_nobody_is_left():
    method = FedAvg(LOCAL)
    sim = simulation(method)
    session: Session = sim.session
    server = method.start(session)
    session.timeout = 1.0
    asked = [a.to for a in method.next(server, Start(), session) if hasattr(a, "to")]
    delta = {"delta": torch.ones_like(sim.session.initial)}
    assert method.next(server, Reply(asked[0], "train", 0, dict(delta)), session) == ()
    method.next(server, Timer(0), session)
    assert server["round"] == 1
    assert method.next(server, Reply(asked[1], "train", 0, dict(delta)), session) == ()
    assert server["round"] == 1
    *others, last = session.select(1)
    for client in others:
        assert method.next(server, Lost(client, "train", 1, "gone"), session) == ()
    with pytest.raises(NoReplies, match="round 1"):
        method.next(server, Lost(last, "train", 1, "gone"), session)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": []}, "at least one client; got none"),
({"data": [*clients(2), NOTHING]}, "client 2 holds no examples"),
        ({"buffers": "maybe"}, "buffers must be one of refuse, local, mean; got 'maybe'"),
        ({"nonfinite": "ignore"}, "nonfinite must be one of refuse, exclude; got 'ignore'"),
        ({"every": 0}, "every must be >= 1; got 0"),
        ({"timeout": 0}, "timeout must be > 0 or None; got 0"),
        ({"workers": -1}, "workers must be >= 0 or None; got -1"),
        ({"response_time": [1.0]}, "response_time must hold 6 times > 0"),
        ({"sampler": Share(0.1)}, "fraction=0.1 selects 0"),
        ({"sampler": Share(count=7)}, "count=7 selects 7"),
        ({"sampler": Share()}, "give either fraction or count"),
        ({"sampler": Available(lambda c, r: False, 2)}, "holds for none in round 0"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        simulation(**change)


def test_a_bare_vector_has_no_loss():
    with pytest.raises(TypeError, match="a module and its loss, or a vector and None"):
        Simulation(FedAvg(LOCAL), torch.zeros(3), nn.functional.mse_loss, clients())


# Samplers.


def test_samplers_draw_what_they_say():
    assert Share(0.5)(3, 10, 0) == Share(0.5)(3, 10, 0) != Share(0.5)(4, 10, 0)
    assert len(Share(count=4)(0, 10, 0)) == 4
    assert Everyone()(0, 3, 0) == [0, 1, 2]
    assert [Cyclic(count=2)(r, 5, 0) for r in range(3)] == [[0, 1], [2, 3], [0, 4]]
    assert all(Bernoulli(0.01)(r, 5, 0) for r in range(50))
    share = sum(len(Bernoulli(0.3)(r, 100, 0)) for r in range(100)) / 10_000
    assert share == pytest.approx(0.3, abs=0.02)
    found: Mapping[int, list[int]] = {r: Available(lambda c, r: c % 2 == r % 2, 2)(r, 6, 0) for r in range(4)}
    assert all(len(drawn) == 2 and all(c % 2 == r % 2 for c in drawn) for r, drawn in found.items())
    with pytest.raises(ValueError, match=r"p must be in \(0, 1\]; got 0"):
        Bernoulli(0)


def test_local_sgd_names_bad_arguments():
    for name, value in (
        ("lr", 0),
        ("epochs", 0),
        ("batch_size", 0),
        ("steps", 0),
        ("momentum", 1.0),
        ("decay", 0),
    ):
        with pytest.raises(ValueError, match=f"{name} must be"):
            LocalSGD(**{"lr": 0.1, name: value})


def test_local_sgd_is_torchs_sgd():
    data = clients(1, 11)[0]
    local = LocalSGD(lr=0.1, epochs=3, batch_size=4, momentum=0.9, weight_decay=0.01)
    sim = simulation(FedAvg(local), [data], sampler=Everyone())
    sim.run(1)
    reference = net()
    optimizer = torch.optim.SGD(reference.parameters(), 0.1, momentum=0.9, weight_decay=0.01)
    for epoch in range(3):
        for rows in stream(0, "client", 0, 0, "batches", epoch).permutation(11).split(4):
            optimizer.zero_grad()
            nn.functional.cross_entropy(reference(data.x[rows]), data.y[rows]).backward()
            optimizer.step()
    expected = torch.cat([p.detach().reshape(-1) for p in reference.parameters()])
    assert torch.allclose(sim.server["x"], expected, atol=1e-6)


def test_a_saved_run_is_replaced_as_a_whole(tmp_path: Path):
    sim = simulation()
    sim.run(2, checkpoint=tmp_path / "s", save_every=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s"]
