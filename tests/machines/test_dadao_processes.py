"""DADAO's nodes as actors: on a virtual clock with slow links, and in four real processes."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cograd.core.ledger import Ledger
from cograd.core.streams import stream
from cograd.engines.events import Net, Virtual
from cograd.engines.launch import Workers
from cograd.machines import DADAO, Graph, gossip_rates
from cograd.machines.dadao import Constants, Event, GossipRates, Member, merged
from cograd.machines.dadao.member import OVERHEAD, Entry
from cograd.models.convex import LeastSquares
from machines import dadao_jobs as jobs


@pytest.fixture(scope="module")
def pool() -> Iterator[Workers]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent))
        with Workers(jobs.NODES, threads=1) as workers:
            yield workers


def replayed(name: str, logs: list[list[Entry]]) -> DADAO:
    problem = jobs.problem()
    run = DADAO(problem.gradients(), jobs.start(), mu=problem.mu, L=problem.L, rates=jobs.network(name))
    for event in merged(logs):
        run.step(event)
    return run


@pytest.mark.parametrize("sessions", [[30.0], [12.0, 25.0]])
@pytest.mark.parametrize("name", ["cycle", "complete"])
def test_processes_do_what_one_process_does_with_the_same_events(
    pool: Workers, name: str, sessions: list[float]
) -> None:
    ranks = pool.call("dadao_jobs:run", {"name": name, "sessions": sessions})
    logs = [[Entry(*entry) for entry in rank["log"]] for rank in ranks]
    run = replayed(name, logs)
    assert torch.equal(run._state, torch.tensor([rank["state"] for rank in ranks], dtype=torch.float64))
    assert [[n.time, n.events, n.gradients] for n in run.nodes] == [rank["counts"] for rank in ranks]
    assert run.gradients > 40
    assert run.activations > 40
    # Every byte: two vectors and what surrounds them a meeting, a byte of farewell an edge and session.
    farewells = len(sessions) * len(jobs.network(name).graphs[0].edges)
    sent = sum(rank["sent"][0] for rank in ranks)
    assert sent == run.activations * (2 * 8 * jobs.D + OVERHEAD) + farewells
    assert sum(rank["sent"][1] for rank in ranks) == 3 * run.activations + farewells
    assert [rank["sent"][2] for rank in ranks] == [node.gradients for node in run.nodes]


def test_processes_refuse_a_neighbour_with_another_smoothness(pool: Workers) -> None:
    said = [rank["said"] for rank in pool.call("dadao_jobs:other_smoothness", {"rank": 2})]
    assert "has another graph, other rates, constants (mu, L) or another dtype than node 2" in said[2]
    neighbours = [s for s in (said[1], said[3]) if s.startswith("node 2 has another graph")]
    assert neighbours  # the one that met it first; the others wait for somebody who has left
    assert all(said)


def members(graph: Graph, until: float, seed: int, d: int = 3) -> tuple[list[Member], LeastSquares]:
    problem, x0 = LeastSquares.random(graph.n, 10, d, seed), stream(seed, "x0").normal(graph.n, d).double()
    rates = gossip_rates(graph)
    options = {"mu": problem.mu, "L": problem.L, "rates": rates, "until": until, "seed": seed}
    nodes = [
        Member(g, x, rank=i, patience=1e9, **options)  # type: ignore[arg-type]
        for i, (g, x) in enumerate(zip(problem.gradients(), x0, strict=True))
    ]
    return nodes, problem


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(2, 9), st.integers(0, 10**6), st.floats(0, 3))
def test_no_links_however_slow_block_it_and_every_order_is_replayed(n: int, seed: int, slow: float) -> None:
    graph = Graph.random_geometric(n, 0.6, seed)
    nodes, problem = members(graph, 15.0, seed)
    draw, ledger = stream(seed, "delays"), Ledger()
    clock = Virtual(nodes, delay=lambda a, b, size: slow * float(draw.numpy.random()), ledger=ledger)
    clock.run(until=1000.0)
    assert all(net.stopped for net in clock._nets)
    events = merged([node.log for node in nodes])
    x0 = stream(seed, "x0").normal(n, 3).double()
    run = DADAO(problem.gradients(), x0, mu=problem.mu, L=problem.L, rates=gossip_rates(graph))
    for event in events:
        run.step(event)
    assert torch.equal(run._state, torch.stack([node._state for node in nodes]))
    assert run.activations + run.gradients == len(events)
    assert ledger.sent() == run.activations * (2 * 8 * 3 + OVERHEAD) + len(graph.edges)


def test_on_fast_links_the_events_come_at_their_rates_and_the_error_falls() -> None:
    graph = Graph.grid(3, 3)
    nodes, problem = members(graph, 150.0, 1)
    Virtual(nodes).run()
    events = merged([node.log for node in nodes])
    edges, rate = sum(e.kind == "edge" for e in events), gossip_rates(graph).total
    assert abs(edges / (150 * rate) - 1) < 4 / edges**0.5
    assert abs((len(events) - edges) / (150 * 9) - 1) < 4 / (len(events) - edges) ** 0.5
    for node in nodes:
        torch.testing.assert_close(node._state[0], problem.solution, rtol=0.02, atol=2.0)


class Mortal:
    """A node that does nothing any more from a time on."""

    def __init__(self, node: Member, death: float) -> None:
        self.node, self.death = node, death

    def start(self, net: Net) -> None:
        self.node.start(net)

    def receive(self, net: Net, sender: int, payload: Any) -> None:
        if net.now < self.death:
            self.node.receive(net, sender, payload)

    def timer(self, net: Net, key: Any) -> None:
        if net.now < self.death:
            self.node.timer(net, key)


@pytest.mark.parametrize("name", ["cycle", "complete"])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("death", [0.0, 12.3, 49.5])
@pytest.mark.parametrize("dead", range(4))
def test_a_dead_neighbour_that_is_waited_for_is_named(dead: int, death: float, seed: int, name: str) -> None:
    nodes: list[Any] = [jobs.member(rank, name, 50.0, seed, patience=5.0) for rank in range(4)]
    nodes[dead] = Mortal(nodes[dead], death)
    clock = Virtual(nodes, delay=lambda sender, to, size: 0.01)
    said = ""
    try:
        clock.run()
    except TimeoutError as error:
        said = str(error)
    living = [rank for rank in range(4) if rank != dead]
    if said:  # it, or one that waits for it
        waited = int(said.split()[1])
        assert "for 5 units of time" in said
        assert waited == dead or nodes[waited]._busy or dead in nodes[waited]._heard
        assert clock.now < 50.0 + 5.0 + 2.0
    else:  # nobody needed it any more
        assert all(clock._nets[rank].stopped for rank in living)
        assert death > 40
    if death < 40:
        assert said


def test_who_is_waited_for_is_said_in_the_middle_and_at_the_end() -> None:
    for dead, death, said in (
        (3, 0.0, r"node 3 has not answered node \d"),
        (0, 0.0, "node 0 has not told node"),
    ):
        nodes: list[Any] = [jobs.member(rank, "cycle", 20.0, patience=5.0) for rank in range(4)]
        nodes[dead] = Mortal(nodes[dead], death)
        with pytest.raises(TimeoutError, match=said):
            Virtual(nodes).run()


def test_one_that_ends_later_is_waited_for_as_long_as_it_asks() -> None:
    nodes = [jobs.member(rank, "cycle", 60.0 if rank == 0 else 8.0, patience=20.0) for rank in range(4)]
    clock = Virtual(nodes)
    clock.run()
    assert all(net.stopped for net in clock._nets)


def with_other(name: str) -> Member:
    """Node 0 of the cycle, one of whose settings is not that of the others."""
    p = jobs.problem()
    graph = Graph.cycle(4)
    given: dict[str, Any] = {"mu": p.mu, "L": p.L, "rates": gossip_rates(graph)}
    x0 = jobs.start()[0]
    if name == "dtype":
        x0 = torch.cat([x0, x0]).float()  # as many bytes
    elif name == "rates":
        given["rates"] = gossip_rates(graph, 2 * given["rates"].rates[0])
    elif name == "graph":
        given["rates"] = gossip_rates(Graph.complete(4))
    elif name == "constants":
        given["constants"] = replace(Constants.of(p.mu, p.L, given["rates"].chi1), beta_t=0.0)
    else:
        given[name] *= 8.0 if name == "L" else 0.5
    return Member(p.gradients()[0], x0, rank=0, until=50.0, **given)


@pytest.mark.parametrize("name", ["L", "mu", "rates", "graph", "constants", "dtype"])
def test_members_with_other_settings_refuse_each_other(name: str) -> None:
    nodes = [with_other(name), *(jobs.member(rank, "cycle", 50.0) for rank in range(1, 4))]
    with pytest.raises(
        ValueError, match=r"node \d has another graph, other rates, constants \(mu, L\) or another"
    ):
        Virtual(nodes).run()


@pytest.mark.parametrize("name", ["L", "mu", "rates", "graph", "constants"])
def test_a_state_of_a_run_with_other_settings_is_refused(name: str) -> None:
    node, before = jobs.member(0, "cycle", 1.0), jobs.member(0, "cycle", 1.0).state_dict()
    with pytest.raises(ValueError, match="a run with another graph, other rates, constants or another dtype"):
        node.load_state_dict(with_other(name).state_dict())
    assert torch.equal(node.state_dict()["state"], before["state"])


def test_the_refused_one_is_told_why(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = with_other("L"), jobs.member(1, "cycle", 50.0)
    clock = Virtual([one, other, jobs.member(2, "cycle", 50.0), jobs.member(3, "cycle", 50.0)])
    sent = []
    monkeypatch.setattr(clock, "_at", lambda when, rank, sender, what: sent.append((rank, sender, what)))
    for net, node in zip(clock._nets, clock.actors, strict=True):
        node.start(net)
    ask = struct.pack("<Bd8s", 0, 0.5, one._setting)
    with pytest.raises(ValueError, match=r"node 0 has another graph, .* than node 1"):
        other.receive(clock._nets[1], 0, ask)
    answer = next(what for rank, sender, what in sent if (rank, sender) == (0, 1))
    with pytest.raises(ValueError, match=r"node 1 has another graph, .* than node 0"):
        one.receive(clock._nets[0], 1, answer)


def test_the_last_bits_of_the_settings_do_not_matter() -> None:
    p, rates = jobs.problem(), jobs.network("cycle")
    near = GossipRates(rates.graphs, (rates.rates[0] * (1 + 2e-16 * np.arange(4)),))
    made = [
        Member(p.gradients()[0], jobs.start()[0], rank=0, mu=p.mu, L=p.L, rates=r, until=1.0)
        for r in (rates, near)
    ]
    assert made[0]._setting == made[1]._setting


def test_gradients_are_counted() -> None:
    ledger = Ledger()
    nodes = [jobs.member(rank, "cycle", 10.0, ledger=ledger) for rank in range(4)]
    Virtual(nodes, ledger=ledger).run()
    assert [ledger.worked("grad", rank) for rank in range(4)] == [node.node.gradients for node in nodes]
    assert ledger.sent() > 0


def test_members_that_have_stopped_may_go_on() -> None:
    nodes = [jobs.member(rank, "cycle", 8.0) for rank in range(4)]
    Virtual(nodes).run()
    first = sum(len(node.log) for node in nodes)
    for node in nodes:
        node.until = 20.0
    Virtual(nodes, delay=lambda a, b, size: 0.1).run()
    assert sum(len(node.log) for node in nodes) > 1.5 * first
    run = replayed("cycle", [node.log for node in nodes])
    assert torch.equal(run._state, torch.stack([node._state for node in nodes]))


def test_the_running_mean_is_the_simulations() -> None:
    nodes = [jobs.member(rank, "cycle", 20.0, average=True) for rank in range(4)]
    Virtual(nodes).run()
    problem = jobs.problem()
    options = {"mu": problem.mu, "L": problem.L, "rates": jobs.network("cycle"), "average": True}
    run = DADAO(problem.gradients(), jobs.start(), **options)  # type: ignore[arg-type]
    for event in merged([node.log for node in nodes]):
        run.step(event)
    means = torch.stack([node.state_dict()["average"] for node in nodes])
    assert torch.equal(run.averages, means)


def test_logs_that_contradict_each_other_are_refused() -> None:
    meeting = Entry(1.0, "edge", 1)
    with pytest.raises(ValueError, match=r"nodes 0 and 1 do not both tell of Event\(time=1\.0, i=0, j=1\)"):
        merged([[meeting], []])
    with pytest.raises(ValueError, match=r"node 0: an event at 1\.0 follows one at 1\.0"):
        merged([[meeting, Entry(1.0, "grad", -1)], [Entry(1.0, "edge", 0)]])
    assert merged([[meeting], [Entry(1.0, "edge", 0), Entry(2.0, "grad", -1)]]) == [Event(1, 0, 1), Event(2, 1)]


def test_what_a_member_cannot_be_is_refused() -> None:
    problem, rates = jobs.problem(), jobs.network("cycle")
    options: dict[str, Any] = {"mu": problem.mu, "L": problem.L, "until": 1.0}
    gradient, x0 = problem.gradients()[0], jobs.start()[0]
    with pytest.raises(ValueError, match=r"rank must be a node of the graph, 0 \.\. 3; got 4"):
        Member(gradient, x0, rank=4, rates=rates, **options)
    with pytest.raises(ValueError, match="one graph for processes; got 2 graphs"):
        Member(gradient, x0, rank=0, rates=gossip_rates([Graph.cycle(4), Graph.path(4)]), **options)
    with pytest.raises(ValueError, match=r"x0 must be a vector on the CPU; got shape \(1, 5\)"):
        Member(gradient, x0[None], rank=0, rates=rates, **options)
    with pytest.raises(ValueError, match="patience must be > 0 units of time; got 0"):
        Member(gradient, x0, rank=0, rates=rates, patience=0, **options)
    with pytest.raises(TypeError, match="x0 must be float32 or float64"):
        Member(gradient, x0.half(), rank=0, rates=rates, **options)
    with pytest.raises(ValueError, match=r"4 members and this one as 1; got 4 and 0"):
        Virtual([jobs.member(rank, "cycle", 1.0) for rank in (1, 1, 2, 3)]).run()


def test_a_members_state_is_not_anothers_and_not_taken_in_the_middle() -> None:
    one, other = (jobs.member(rank, "cycle", 1.0) for rank in range(2))
    with pytest.raises(ValueError, match="the state is of rank 0; here it is 1"):
        other.load_state_dict(one.state_dict())
    with pytest.raises(ValueError, match="the state is of members 5; here it is 4"):
        one.load_state_dict({**one.state_dict(), "members": 5})
    with pytest.raises(ValueError, match=r"must be of shape \(6, 5\)"):
        one.load_state_dict({**one.state_dict(), "state": torch.zeros(6, 4)})
    with pytest.raises(ValueError, match=r"in torch\.float64, .* got \(6, 5\) in torch\.float32"):
        one.load_state_dict({**one.state_dict(), "state": torch.zeros(6, 5)})
    nodes = [jobs.member(rank, "cycle", 100.0, patience=1e9) for rank in range(4)]
    Virtual(nodes, delay=lambda a, b, size: 50.0).run(until=40.0)
    busy = next(node for node in nodes if node._busy)
    with pytest.raises(RuntimeError, match=f"node {busy.rank} is in the middle of an averaging"):
        busy.state_dict()


def test_a_message_that_nobody_asked_for_is_refused() -> None:
    nodes = [jobs.member(rank, "cycle", 5.0) for rank in range(4)]
    clock = Virtual(nodes)
    clock.run(until=0.0)
    with pytest.raises(ValueError, match="message of kind 2 from node 1, which was not asked for it"):
        nodes[0].receive(clock._nets[0], 1, b"\2" + bytes(40))
