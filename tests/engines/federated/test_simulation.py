"""The simulator: deterministic, whatever runs where and answers when; it counts and measures what there is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

from cograd.clients import FedSpeed
from cograd.clients.baselines import FedAvg, Scaffold
from cograd.core.codecs import Float16, Float64, RandomK, Split, TopK, Uniform
from cograd.core.ledger import Ledger
from cograd.data.clients import ClientData
from cograd.engines.federated import Available, Everyone, LocalSGD, NoReplies, Send, Simulation, Synchronous
from cograd.engines.federated import Uniform as Share
from cograd.engines.federated.protocol import mean_of
from engines.federated.support import LOCAL, Feedback, clients, digest, history, named, net, same, simulation

NOTHING = ClientData(torch.zeros(0, 5), torch.zeros(0), torch.zeros(0), torch.zeros(0))

# Determinism.


@pytest.mark.parametrize("method", [FedAvg(LOCAL), FedSpeed(LOCAL), Scaffold(LOCAL)], ids=named)
@pytest.mark.parametrize("kind", ["plain", "dropout"])
def test_the_number_of_workers_changes_nothing(method, kind):
    runs = []
    for workers in (0, 1, 2):
        with simulation(method, kind=kind, workers=workers) as sim:
            sim.run(3)
            runs.append(sim)
    assert same(runs[0], runs[1])
    assert same(runs[0], runs[2])
    assert history(runs[0]) == history(runs[2])
    with simulation(method, kind=kind, seed=1) as other:
        other.run(3)
    assert not torch.equal(other.server["x"], runs[0].server["x"])


@pytest.mark.parametrize("buffers", ["local", "mean"])
@pytest.mark.parametrize("momentum", [0.1, None])  # None: batches are counted, and the count must not be shared
def test_nor_do_they_with_buffers(buffers, momentum):
    def model() -> nn.Module:
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8, momentum=momentum), nn.Linear(8, 2))

    runs = []
    for workers in (0, 2):
        options = {"sampler": Share(0.5), "buffers": buffers, "workers": workers, "personal": True}
        with Simulation(FedSpeed(LOCAL), model(), nn.functional.cross_entropy, clients(), **options) as sim:
            sim.run(3)
            runs.append(sim)
    assert same(*runs)
    assert history(runs[0]) == history(runs[1])


@pytest.mark.parametrize("method", [FedAvg(LOCAL), FedSpeed(LOCAL), Scaffold(LOCAL)], ids=named)
def test_nor_does_the_order_in_which_replies_come(method):
    plain = simulation(method)
    plain.run(3)
    for times in ([6, 5, 4, 3, 2, 1], lambda client, answers: 1 + (7 * client + 3 * answers) % 5):
        late = simulation(method, response_time=times)
        late.run(3)
        assert same(plain, late)
        assert late.history[-1].time > plain.history[-1].time == 0


def test_one_method_may_serve_two_simulations_at_a_time():
    method = FedSpeed(LOCAL)
    alone = simulation(method)
    alone.run(3)
    one, other = simulation(method), simulation(method, seed=5)
    for _ in range(3):
        one.advance()
        other.advance()
    assert same(one, alone)


def test_what_the_caller_had_set_is_left_alone():
    threads = torch.get_num_threads()
    torch.manual_seed(5)
    expected = torch.rand(3)
    sim = simulation(kind="dropout")
    torch.manual_seed(5)
    sim.run(1)
    assert torch.equal(torch.rand(3), expected)
    assert torch.get_num_threads() == threads


def test_server_and_clients_run_on_one_thread():
    """Sums of long vectors would depend on how many there are, and small ones take longer on several."""
    threads = []

    class Counting(FedAvg):
        def train(self, state, content, data, ctx):
            threads.append(torch.get_num_threads())
            return super().train(state, content, data, ctx)

        def close(self, server, replies, session):
            threads.append(torch.get_num_threads())
            super().close(server, replies, session)

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        simulation(Counting(LOCAL)).run(2)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert threads == [1] * 8


def test_a_task_finds_the_model_as_it_was_at_the_start():
    @dataclass
    class Curious(FedAvg):
        def train(self, state, content, data, ctx):
            found = ctx.model.theta.clone()
            return {"found": found, "random": torch.rand(3)}, super().train(state, content, data, ctx)[1]

    sim = simulation(Curious(LOCAL), sampler=Everyone(), test=clients(1)[0])
    sim.run(2)
    assert all(torch.equal(sim.states[c]["found"], sim.session.initial) for c in range(6))
    assert len({tuple(sim.states[c]["random"].tolist()) for c in range(6)}) == 6


def test_a_state_that_is_the_model_itself_is_copied():
    @dataclass
    class Careless(FedAvg):
        def train(self, state, content, data, ctx):
            v = self.local.run(ctx, data, content["x"])
            return {"v": v, "view": v[:3]}, {"delta": v - content["x"]}

    here, there = simulation(Careless(LOCAL)), simulation(Careless(LOCAL), workers=2)
    with there:
        here.run(2)
        there.run(2)
    assert same(here, there)
    first, second, *_ = list(here.states)
    assert not torch.equal(here.states[first]["v"], here.states[second]["v"])


# Codecs.


@pytest.mark.parametrize(
    "codec",
    [
        Float16(), Float64(), TopK(0.3), TopK(0.5, values=Float16()), RandomK(0.3), Uniform(8),
        Uniform(4, stochastic=True), Split(Float16(), TopK(0.5), 1),
    ],
    ids=repr,
)  # fmt: skip
@pytest.mark.parametrize("where", ["up", "down"])
def test_any_codec_sits_on_either_link(codec, where):
    sim = simulation(FedSpeed(LOCAL), **{where: codec})
    sim.run(2)
    plain = simulation(FedSpeed(LOCAL))
    plain.run(2)
    assert bool(sim.server["x"].isfinite().all())
    assert (getattr(sim.tally, where) < getattr(plain.tally, where)) is not isinstance(codec, Float64)
    other = "down" if where == "up" else "up"
    assert getattr(sim.tally, other) == getattr(plain.tally, other)


def test_a_codec_on_the_uplink_may_remember():
    """What a client's codec has left out so far is in its state."""
    runs = []
    for workers in (0, 2):
        with simulation(FedAvg(LOCAL), up=Feedback(), workers=workers) as sim:
            sim.run(4)
            runs.append(sim)
    assert same(*runs)
    lost = [runs[0].states[client]["engine.codec.delta.lost"] for client in runs[0].states]
    assert all(float(t.norm()) > 0 for t in lost)
    with pytest.raises(ValueError, match="a codec that remembers must be on the uplink"):
        simulation(FedAvg(LOCAL), down=Feedback()).run(1)


# Methods of several exchanges.


@dataclass
class TwoExchanges(Synchronous):
    """A round asks the clients for a number each, then tells them the sum and asks again."""

    log: ClassVar[list[dict[int, float]]] = []

    def tasks(self):
        return {"first": self.first, "second": self.second}

    def first(self, state, content, data, ctx):
        return {"n": state.get("n", 0) + 1}, {"a": torch.tensor(float(ctx.client))}

    def second(self, state, content, data, ctx):
        return state, {"b": content["sum"] + state["n"]}

    def start(self, session):
        return {"round": 0, "x": session.initial.clone(), "stage": 0, "sum": 0.0}

    def ask(self, server, session):
        task = ("first", "second")[server["stage"]]
        return [Send(c, task, {"sum": torch.tensor(server["sum"])}) for c in session.select(server["round"])]

    def close(self, server, replies, session):
        if server["stage"] == 0:
            server["sum"] = sum(float(content["a"]) for content in replies.values())
        else:
            self.log.append({client: float(content["b"]) for client, content in replies.items()})
            server["round"] += 1
        server["stage"] = 1 - server["stage"]

    def model(self, server):
        return server["x"]


def test_a_round_may_hold_two_exchanges():
    sim = simulation(TwoExchanges(), sampler=Everyone(), response_time=[1, 2, 3, 4, 5, 6])
    TwoExchanges.log.clear()
    rows = sim.run(2)
    assert TwoExchanges.log == [dict.fromkeys(range(6), 15.0 + n) for n in (1, 2)]
    assert [row.time for row in rows] == [12, 24]
    assert rows[0].participants == (0, 1, 2, 3, 4, 5)


# Counting and measuring.


def test_bytes_and_work_are_those_of_the_rounds_that_were_made():
    ledger = Ledger()
    sim = simulation(FedAvg(LOCAL), sampler=Everyone(), ledger=ledger)
    rows = sim.run(2)
    size = 4 * sim.session.space.numel
    assert [(row.up, row.down) for row in rows] == [(6 * size, 6 * size), (12 * size, 12 * size)]
    assert rows[0].work["grad"] == sum(LOCAL.length(len(c)) for c in clients())
    assert rows[1].work["grad"] == 2 * rows[0].work["grad"]
    assert ledger.sent() == 24 * size
    assert ledger.worked("grad", 3) == 2 * LOCAL.length(16)
    assert rows[0].participants == (0, 1, 2, 3, 4, 5)


def test_a_row_is_of_its_own_round():
    sim = simulation(FedAvg(LocalSGD(0.1, steps=3)), sampler=Share(count=2), seed=4)
    size = 4 * sim.session.space.numel
    for row in sim.rounds(4):
        assert row.up == row.down == row.round * 2 * size
        assert row.work == {"grad": row.round * 2 * 3}
        assert row.participants == tuple(sim.session.select(row.round - 1))


def test_accuracies_are_the_shares_of_right_answers():
    test = clients(1, 30)[0]
    sim = simulation(FedAvg(LOCAL), sampler=Everyone(), test=test, personal=True, every=2)
    first, second = sim.run(2)
    assert first.accuracy is first.personal is first.worst is None
    sim.local.at(sim.server["x"])

    def right(x: torch.Tensor, y: torch.Tensor) -> float:
        return float((sim.local.module(x).argmax(1) == y).double().mean())

    own = sorted(right(c.test_x, c.test_y) for c in clients())
    assert second.personal == pytest.approx(sum(own) / 6)
    assert second.worst == own[0]  # the worst tenth of six is one
    assert second.accuracy == right(test.x, test.y)
    assert 0 <= second.before <= 1


def test_a_clients_report_is_in_its_rounds_row():
    @dataclass
    class Reporting(FedAvg):
        def train(self, state, content, data, ctx):
            ctx.report("client", torch.tensor(float(ctx.client)))  # a number, in the end
            return super().train(state, content, data, ctx)

        def close(self, server, replies, session):
            session.reports["asked"] = torch.tensor(len(replies))
            super().close(server, replies, session)

    rows = simulation(Reporting(LOCAL), sampler=Everyone()).run(2)
    assert [row.reports for row in rows] == [{"client": 2.5, "asked": 6}] * 2
    assert all(type(value) is float for value in rows[0].reports.values())


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
    assert mean.tally.up - local.tally.up == mean.tally.down - local.tally.down == 6 * 16 * 4


def test_a_task_does_not_see_what_the_engine_keeps():
    @dataclass
    class Forgetful(FedAvg):
        def train(self, state, content, data, ctx):
            assert state == {}
            return {}, super().train(state, content, data, ctx)[1]

    sim = simulation(Forgetful(LOCAL), kind="norm", buffers="local", up=Feedback(), sampler=Everyone())
    sim.run(2)
    assert list(sim.states[0]) == ["engine.buffers", "engine.codec.delta.lost"]


# The clock.


def test_rounds_until_a_time():
    sim = simulation(FedAvg(LOCAL), sampler=Everyone(), response_time=[1, 1, 1, 1, 1, 2.5])
    assert [row.time for row in sim.until(5.0)] == [2.5, 5.0]
    assert [row.time for row in sim.until(6.0)] == []
    assert [row.time for row in sim.until(7.5)] == [7.5]
    straight = simulation(FedAvg(LOCAL), sampler=Everyone())
    straight.run(3)
    assert torch.equal(sim.server["x"], straight.server["x"])


def test_late_replies_are_dropped_and_count_nowhere():
    sim = simulation(
        FedAvg(LOCAL), sampler=Everyone(), kind="norm", buffers="mean",
        response_time=[1, 1, 1, 1, 1, 9], timeout=2.0,
    )  # fmt: skip
    rows = sim.run(6)  # the reply of client 5 to round 0 comes in the time of round 4
    assert [row.participants for row in rows] == [(0, 1, 2, 3, 4)] * 6
    assert [row.time for row in rows] == [2, 4, 6, 8, 10, 12]
    without = simulation(FedAvg(LOCAL), clients()[:5], kind="norm", buffers="mean", sampler=Everyone())
    without.run(6)
    assert torch.equal(sim.server["x"], without.server["x"])
    assert torch.equal(sim.buffers, without.buffers)


def test_an_exchange_that_nobody_answers_in_time_goes_on_with_the_first_reply():
    sim = simulation(FedAvg(LOCAL), sampler=Everyone(), response_time=[6, 5, 6, 6, 6, 6], timeout=2.0)
    (row,) = sim.run(1)
    assert (row.participants, row.time) == ((1,), 5.0)


def test_a_round_without_any_reply_is_an_error():
    broken = simulation(Alone(LOCAL, lr=1.0), nonfinite="exclude", sampler=Everyone())
    with pytest.raises(NoReplies, match="round 0: none of the clients asked has answered"):
        broken.run(1)


class Alone(FedAvg):
    """FedAvg of clients that all diverge."""

    def train(self, state, content, data, ctx):
        return state, {"delta": content["x"] * math.inf}


# Arguments.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": []}, "clients must hold at least one client; got none"),
        ({"data": [*clients(2), NOTHING]}, "client 2 holds no examples"),
        ({"buffers": "maybe"}, "buffers must be one of refuse, local, mean; got 'maybe'"),
        ({"nonfinite": "ignore"}, "nonfinite must be one of refuse, exclude; got 'ignore'"),
        ({"every": 0}, "every must be >= 1; got 0"),
        ({"timeout": 0}, "timeout must be > 0 or None; got 0"),
        ({"workers": -1}, "workers must be >= 0 or None; got -1"),
        ({"cap": -1}, "cap must be >= 0 bytes or None; got -1"),
        ({"response_time": [1.0]}, "response_time must hold 6 times > 0"),
        ({"response_time": [1.0, 1, 1, 1, 1, 0]}, "response_time must hold 6 times > 0"),
        ({"sampler": Available(lambda c, r: False, 2)}, "holds for none in round 0"),
        ({"sampler": lambda round, clients, seed: []}, "sampler must select at least one client"),
        (
            {"personal": True, "data": [ClientData(c.x, c.y, c.x[:0], c.y[:0]) for c in clients()]},
            "personal must be False where no client has test examples",
        ),
    ],
)
def test_bad_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        simulation(**change)


def test_a_bare_vector_has_no_loss():
    with pytest.raises(TypeError, match="a module and its loss, or a vector and None"):
        Simulation(FedAvg(LOCAL), torch.zeros(3), nn.functional.mse_loss, clients())


def test_a_client_does_one_thing_at_a_time():
    """Its second task would not see the state that the first one left."""

    class Greedy(FedAvg):
        def next(self, server, event, session):
            return [Send(client, "train", {"x": server["x"]}) for client in (1, 2, 1)]

    with pytest.raises(RuntimeError, match=r"a client may be asked one thing at a time; asked are \[1, 2, 1\]"):
        simulation(Greedy(LOCAL)).run(1)


def test_a_methods_means_name_who_sent_another_shape():
    with pytest.raises(ValueError, match=r"'d' of client 4 must have shape \(3,\); got \(2,\)"):
        mean_of({1: {"d": torch.ones(3)}, 4: {"d": torch.ones(2)}}, "d")
    with pytest.raises(ValueError, match="weights must be given for at least one client"):
        mean_of({}, "d")
    weights = {1: 1.0, 4: 3.0}
    assert mean_of({1: {"d": torch.zeros(2)}, 4: {"d": torch.ones(2)}}, "d", weights).tolist() == [0.75] * 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_model_on_a_gpu_runs_in_this_process():
    on_gpu = net().cuda()
    data = [ClientData(*(t.cuda() for t in vars(c).values())) for c in clients()]
    sim = Simulation(FedSpeed(LOCAL), on_gpu, nn.functional.cross_entropy, data, sampler=Share(0.5))
    sim.run(2)
    expected = simulation()
    expected.run(2)
    pairs = zip(digest(sim), digest(expected), strict=True)
    assert all(torch.allclose(a.cpu(), b, atol=1e-4) for a, b in pairs)
    with pytest.raises(ValueError, match="workers must be 0 or None for a model on cuda"):
        Simulation(FedSpeed(LOCAL), on_gpu, nn.functional.cross_entropy, data, workers=2)


def test_local_training_without_examples_of_its_own():
    """Methods may train on something else than a client's tensors: only a length is asked for."""

    class Held:
        def __len__(self) -> int:
            return 3

    @dataclass
    class Constant(FedAvg):
        def train(self, state, content, data, ctx):
            return state, {"delta": torch.full_like(content["x"], len(data))}

    sim = Simulation(Constant(LocalSGD(1.0)), torch.zeros(4), None, [Held(), Held()])
    sim.run(2)
    assert sim.server["x"].tolist() == [6.0] * 4
