"""Curricula: windows are pure and paced, full ones are the method underneath, and scoring is counted."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from cograd.clients import (
    ClientCurriculum,
    Curriculum,
    DataCurriculum,
    Expert,
    FedCAC,
    FedSpeed,
    PacedSampler,
    PacedSGD,
    Pacing,
)
from cograd.clients.baselines import FedAsync, FedAvg, FedPer, FedRep, LocalOnly, PowerOfChoice, Scaffold
from cograd.clients.curricula import (
    ORDERS,
    PACINGS,
    Judging,
    by_difficulty,
    difficulty_spread,
    dirichlet_by_client,
    losses,
    ranked,
    windows,
)
from cograd.clients.fedspeed import fed_prox
from cograd.core.ledger import Ledger
from cograd.core.streams import stream
from cograd.data import dirichlet, iid, shards
from cograd.data.clients import ClientData
from cograd.engines.federated import (
    ClientError,
    Cyclic,
    Everyone,
    LocalModel,
    LocalSGD,
    Simulation,
    Uniform,
)
from cograd.engines.federated.protocol import ClientContext
from cograd.models.mlp import MLP

LOCAL = LocalSGD(lr=0.1, epochs=2, batch_size=5, momentum=0.5)
PLAIN = replace(LOCAL, momentum=0.0)
SMALL = DataCurriculum(min_samples=6)
FULL = Pacing("step", start=1.0, full_at=1.0)
NUMEL = 5 * 8 + 8 + 8 * 2 + 2


def clients(n: int = 6, size: int = 20) -> list[ClientData]:
    draws = torch.Generator().manual_seed(0)
    found = []
    for client in range(n):
        x = torch.randn(size + client, 5, generator=draws) + client / 3
        found.append(ClientData(x, (x.sum(1) > client).long(), x[:3], torch.zeros(3, dtype=torch.long)))
    return found


def net() -> MLP:
    torch.manual_seed(1)
    return MLP(5, 8, 2)


def run(method, rounds=3, sampler=Uniform(0.5), **options) -> Simulation:  # noqa: B008
    options = {"loss": nn.functional.cross_entropy, **options}
    sim = Simulation(method, net(), clients=clients(), sampler=sampler, **options)
    sim.run(rounds)
    return sim


def context(client: int = 0, number: int = 0, **memory: Tensor) -> Judging:
    model = LocalModel(net(), nn.functional.cross_entropy)
    return Judging(client, number, 0, [20] * 6, model, model.theta.clone(), **memory)


# Pacing.


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(PACINGS), st.floats(0, 1), st.floats(0.05, 1), st.integers(1, 60), st.integers(1, 300))
def test_a_window_begins_at_its_start_grows_and_ends_with_everything(rule, start, full_at, steps, items):
    pacing = Pacing(rule, start, full_at)
    sizes = [pacing.size(s, steps, items) for s in range(steps + 2)]
    assert sizes[0] == max(1, int(start * items))
    assert all(a <= b for a, b in pairwise(sizes))
    assert all(1 <= size <= items for size in sizes)
    assert all(size == items for s, size in enumerate(sizes) if s > full_at * steps)


def test_pacing_functions_are_the_published_ones():
    """Against the formulas, written down as they are printed."""
    b, a, steps, items, c = 0.2, 0.8, 50, 100, 10.0
    q0 = b * items
    for s in range(40):
        t = s / (a * steps)
        expected = {
            "linear": q0 + (items - q0) / (a * steps) * s,
            "quad": q0 + (items - q0) / (a * steps) ** 2 * s**2,
            "root": q0 + (items - q0) / (a * steps) ** 0.5 * s**0.5,
            "step": q0 + items * math.floor(t),
            "exp": q0 + (items - q0) / (math.e**c - 1) * (math.exp(c * t) - 1),
            "log": q0 + (items - q0) * (1 + math.log(t + math.exp(-c)) / c),
        }
        for rule, value in expected.items():
            assert Pacing(rule, b, a).size(s, steps, items) in (int(value), int(value + 1e-9)), (rule, s)


def test_linear_is_half_way_at_half_time_and_lies_between_quad_and_root():
    for start in (0.0, 0.2, 0.5):
        quad, linear, root = (Pacing(rule, start, 0.8) for rule in ("quad", "linear", "root"))
        assert abs(linear.size(20, 50, 200) - int(200 * (1 + start) / 2)) <= 1
        for s in range(50):
            assert quad.size(s, 50, 200) <= linear.size(s, 50, 200) <= root.size(s, 50, 200)


def test_a_sharp_exponential_does_not_overflow():
    assert Pacing("exp", 0.1, 1.0, sharpness=5000.0).size(99, 100, 1000) == 100
    assert Pacing("exp", 0.1, 1.0, sharpness=5000.0).size(100, 100, 1000) == 1000


# Windows, and the order in them.


@settings(max_examples=40, deadline=None)
@given(st.integers(10, 80), st.integers(1, 10), st.integers(1, 60), st.floats(0, 1), st.integers(1, 40))
def test_passes_hold_the_steps_and_the_last_is_completed(n, batch, steps, start, least):
    found = windows(Pacing("linear", start, 0.8), n, batch, steps, least)
    lengths = [math.ceil(size / batch) for size in found]
    assert steps <= sum(lengths) < steps + lengths[-1] or lengths[-1] == 1
    assert sum(lengths[:-1]) < steps
    assert min(found) >= min(n, least)
    assert all(a <= b for a, b in pairwise(found))


@pytest.mark.parametrize("order", ORDERS)
def test_a_sampler_uses_admitted_examples_only_and_all_of_them(order):
    scores = stream(0, "scores").uniform(100)
    rank = scores.argsort().argsort()
    sampler = PacedSampler(scores, Pacing("linear", 0.2, 0.8), steps=60, batch_size=7, order=order)
    batches = iter(list(sampler))
    for size in sampler.windows:
        used = torch.tensor([row for _ in range(math.ceil(size / 7)) for row in next(batches)])
        assert len(used.unique()) == len(used) == size
        if order == "easy_first":
            assert set(rank[used].tolist()) == set(range(size))
        elif order == "hard_first":
            assert set(rank[used].tolist()) == set(range(100 - size, 100))
        elif size < 50:
            assert rank[used].max() >= size
    assert next(batches, None) is None
    assert sampler.windows[0] == 32
    assert sampler.windows[-1] == 100


def test_the_reverse_order_is_that_of_negated_scores():
    scores = stream(0, "scores").uniform(50).mul(4).floor()  # with ties
    for seed in range(3):
        there, back = (stream(seed, "ties") for _ in range(2))
        assert torch.equal(ranked(scores, "hard_first", there), ranked(-scores, "easy_first", back))


def test_equal_scores_do_not_keep_the_order_of_the_data():
    order = ranked(torch.zeros(50), "easy_first", stream(0, "ties"))
    assert not torch.equal(order, torch.arange(50))
    assert torch.equal(order.sort().values, torch.arange(50))


def test_a_sampler_serves_a_data_loader_and_begins_rounds_anew():
    x = torch.arange(50.0)
    sampler = PacedSampler(-x, Pacing(start=0.1), steps=20, batch_size=10, min_samples=5)
    loader = DataLoader(TensorDataset(x), batch_sampler=sampler)
    first = torch.cat([batch for (batch,) in loader])
    assert len(loader) == len(sampler) == len(list(loader)) >= 20
    assert set(first[:5].tolist()) == {45, 46, 47, 48, 49}
    assert torch.equal(first, torch.cat([batch for (batch,) in loader]))
    sampler.begin_round()
    again = torch.cat([batch for (batch,) in loader])
    assert not torch.equal(first, again)
    assert set(again[:5].tolist()) == {45, 46, 47, 48, 49}
    sampler.begin_round(x)
    assert set(torch.cat([batch for (batch,) in loader])[:5].tolist()) == {0, 1, 2, 3, 4}


# A client's round.


@pytest.mark.parametrize("order", ORDERS)
def test_a_clients_windows_hold_what_the_received_model_finds_easy(order):
    ctx, data = context(), clients()[0]
    local = PacedSGD(0.1, 4, 5, curriculum=DataCurriculum(order=order, min_samples=6))
    model = net()
    hard = nn.functional.cross_entropy(model(data.x), data.y, reduction="none")
    rank = hard.argsort().argsort()
    rows = list(local.rows(ctx, data))
    for size in local.windows(20):
        used = torch.cat([rows.pop(0) for _ in range(math.ceil(size / 5))])
        assert len(used.unique()) == size
        if order == "easy_first":
            assert int(rank[used].max()) == size - 1
        elif order == "hard_first":
            assert int(rank[used].min()) == 20 - size
    assert not rows


def test_steps_are_the_same_for_every_order_and_those_that_are_said():
    for local in (PLAIN, replace(PLAIN, epochs=5), replace(PLAIN, steps=7)):
        counts = set()
        for order in ORDERS:
            paced = PacedSGD.of(local, replace(SMALL, order=order))
            ctx = context()
            paced.run(ctx, clients()[0], ctx.initial)
            assert ctx.work["grad"] == paced.length(20)
            counts.add(ctx.work["grad"])
        assert len(counts) == 1
        assert counts.pop() >= local.length(20)
    assert PacedSGD.of(replace(PLAIN, steps=7), SMALL).length(20) == 7


def test_the_released_budget_has_a_step_more_an_epoch_where_the_batch_divides():
    full = DataCurriculum(pacing=FULL)
    for n, steps in ((20, 10), (21, 10)):
        budget = PacedSGD.of(PLAIN, replace(full, released_budget=True))
        assert (n // 5 + 1) * 2 == steps
        assert steps <= budget.length(n) < steps + math.ceil(n / 5)
    assert PacedSGD.of(PLAIN, replace(full, released_budget=True)).length(20) == 12  # three passes of 4
    assert PacedSGD.of(PLAIN, full).length(20) == PLAIN.length(20) == 8


@pytest.mark.parametrize("judge", ["global", "local", "both"])
@pytest.mark.parametrize("score", ["loss", "error"])
def test_scores_are_what_they_are_called(judge, score):
    data, other = clients()[0], stream(0, "other").normal(NUMEL)
    fresh = context()
    expected = []
    for vector in (fresh.initial, other):
        outputs = fresh.model.outputs(vector, data.x)
        wrong = (outputs.argmax(1) != data.y).float()
        loss = nn.functional.cross_entropy(outputs, data.y, reduction="none")
        expected.append(loss if score == "loss" else wrong)
    curriculum = DataCurriculum(judge=judge, score=score)
    first = curriculum.of(fresh, data, fresh.initial).sum(0)
    assert torch.allclose(first, expected[0])  # before the first participation
    later = curriculum.of(context(last=other), data, fresh.initial).sum(0)
    assert torch.allclose(later, {"global": expected[0], "local": expected[1], "both": sum(expected)}[judge])


def test_the_local_judge_is_the_model_that_this_client_ended_with():
    """Over the rounds of a simulation, against training written down here."""
    seen: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def noted(outputs: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs, y, reduction="none")

    method = Curriculum(FedAvg(PLAIN), DataCurriculum(judge="both", score=noted, min_samples=6))
    sim = Simulation(method, net(), nn.functional.cross_entropy, clients(), sampler=Cyclic(count=3))
    before = {0: sim.server["x"].clone()}
    for row in sim.rounds(4):
        for client in row.participants:
            seen[row.round - 1, client] = before[row.round - 1], sim.states[client]["curriculum.last"].clone()
        before[row.round] = sim.server["x"].clone()
    ends = {client: sim.states[client]["curriculum.last"] for client in range(6)}
    for client in (0, 1, 2):
        received, _ = seen[2, client]
        _, first_end = seen[0, client]
        ctx = context(client, 2, last=first_end)
        end = PacedSGD.of(PLAIN, method.data).run(ctx, clients()[client], received)
        assert torch.equal(end, ends[client])
        assert ctx.work["forward"] == 2 * (20 + client)


def test_judging_leaves_training_as_it_was():
    """In evaluation mode, and without drawing any of the numbers that batches or dropout are drawn from."""
    torch.manual_seed(1)
    module = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2))
    model = LocalModel(module, nn.functional.cross_entropy)
    ctx = Judging(0, 0, 0, [20], model, model.theta.clone(), last=model.theta + 1)
    data = clients()[0]
    model.gradient(model.theta, data.x, data.y)
    buffers, state = model.buffers, torch.random.get_rng_state()
    here = model.theta.clone()
    PacedSGD.of(PLAIN, DataCurriculum(judge="both", min_samples=6)).order(ctx, data)
    assert torch.equal(model.theta, here)
    assert torch.equal(model.buffers, buffers)
    assert torch.equal(torch.random.get_rng_state(), state)
    model.gradient(model.theta, data.x, data.y)
    assert module.training


def test_cooling_is_the_published_schedule():
    data, local = clients()[0], replace(LOCAL, weight_decay=0.01, decay=0.5)
    ctx = context(number=1)
    cur = replace(SMALL, cooling=0.3, power=0.75)
    paced = PacedSGD.of(local, cur)
    found = paced.run(ctx, data, ctx.initial).clone()
    model = net()
    opt = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.5, weight_decay=0.01)
    for s, rows in enumerate(paced.rows(context(number=1), data)):
        opt.param_groups[0]["lr"] = 0.1 * 0.5 * (1 + 0.3 * s) ** -0.75
        opt.zero_grad()
        nn.functional.cross_entropy(model(data.x[rows]), data.y[rows]).backward()
        opt.step()
    assert torch.allclose(found, torch.cat([p.detach().reshape(-1) for p in model.parameters()]), atol=1e-6)


# Special cases.


BASES = {
    "FedAvg": FedAvg(LOCAL),
    "FedProx": fed_prox(PLAIN, 0.1),
    "FedSpeed": FedSpeed(PLAIN),
    "SCAFFOLD": Scaffold(PLAIN),
    "FedPer": FedPer(LOCAL),
    "FedRep": FedRep(LOCAL, head_epochs=2),
    "FedCAC": FedCAC(LOCAL),
    "local only": LocalOnly(LOCAL),
    "PowerOfChoice": PowerOfChoice(LOCAL, candidates=4),
    "FedAsync": FedAsync(LOCAL),
}


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("order", ORDERS)
def test_a_full_window_is_the_method_underneath_bit_for_bit(name, order):
    plain = run(BASES[name])
    paced = run(Curriculum(BASES[name], DataCurriculum(order=order, pacing=FULL)))
    assert_equal(plain, paced)


def test_a_window_that_the_least_one_fills_is_the_plain_method_too():
    assert_equal(run(FedAvg(LOCAL)), run(Curriculum(FedAvg(LOCAL), DataCurriculum(min_samples=32))))


@pytest.mark.parametrize("name", ["FedAvg", "FedProx", "SCAFFOLD", "FedCAC"])
@pytest.mark.parametrize("order", ORDERS)
def test_a_full_pool_that_all_take_part_in_is_the_method_underneath(name, order):
    """Bit for bit, but for the scoring."""
    plain = run(BASES[name], sampler=Everyone())
    cc = ClientCurriculum(updates=18, order=order, pacing=FULL)
    paced = run(Curriculum(BASES[name], clients=cc), sampler=Everyone())
    scored = order != "random"
    assert torch.equal(plain.method.model(plain.server), paced.method.model(paced.server))
    assert paced.tally.down - plain.tally.down == 3 * 6 * 4 * NUMEL * scored
    assert paced.tally.up - plain.tally.up == 3 * 6 * 4 * scored
    assert paced.tally.work.pop("forward", 0) == 3 * sum(map(len, clients())) * scored
    assert paced.tally.work == plain.tally.work


def assert_equal(one: Simulation, other: Simulation) -> None:
    assert torch.equal(one.method.model(one.server), other.method.model(other.server))
    assert (one.tally.up, one.tally.down, one.tally.work) == (
        other.tally.up,
        other.tally.down,
        other.tally.work,
    )
    for client in range(6):
        a, b = one.states[client], other.states[client]
        assert a.keys() == b.keys()
        assert all(torch.equal(torch.as_tensor(a[name]), torch.as_tensor(b[name])) for name in a)
    for row, also in zip(one.history, other.history, strict=True):
        assert row.participants == also.participants


@pytest.mark.parametrize("name", ["FedAvg", "FedProx", "SCAFFOLD", "FedRep"])
def test_a_narrow_window_is_not_the_method_underneath(name):
    plain = run(BASES[name])
    found = [run(Curriculum(BASES[name], replace(SMALL, order=order))) for order in ORDERS]
    models = [sim.method.model(sim.server) for sim in (plain, *found)]
    assert all(not torch.equal(a, b) for i, a in enumerate(models) for b in models[:i])
    assert (found[0].tally.up, found[0].tally.down) == (plain.tally.up, plain.tally.down)
    passes = 2 if name == "FedRep" else 1
    assert found[0].tally.work["forward"] == passes * sum(
        20 + client for row in found[0].history for client in row.participants
    )


def test_the_reverse_curriculum_is_the_curriculum_of_negated_scores():
    def negated(outputs: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return -losses(nn.functional.cross_entropy, outputs, y)

    anti = run(Curriculum(FedAvg(LOCAL), replace(SMALL, order="hard_first")))
    easy = run(Curriculum(FedAvg(LOCAL), replace(SMALL, score=negated)))
    assert torch.equal(anti.server["x"], easy.server["x"])


def test_a_paced_sgd_takes_its_place_without_the_wrapper():
    inside = run(FedAvg(PacedSGD.of(LOCAL, SMALL)))
    assert torch.equal(inside.server["x"], run(Curriculum(FedAvg(LOCAL), SMALL)).server["x"])


def test_the_mean_is_weighted_by_examples_and_not_by_windows():
    method = Curriculum(FedAvg(LOCAL), SMALL)
    sim = run(method, rounds=1, sampler=Everyone())
    ends = []
    for client, data in enumerate(clients()):
        ctx = context(client)
        ends.append(PacedSGD.of(LOCAL, SMALL).run(ctx, data, ctx.initial).clone())
    sizes = [len(data) for data in clients()]
    mean = sum(size * end for size, end in zip(sizes, ends, strict=True)) / sum(sizes)
    assert torch.allclose(sim.server["x"], mean, atol=1e-6)


# The client curriculum.


def cc(order: str = "easy_first", updates: int = 30, **options) -> ClientCurriculum:
    return ClientCurriculum(order=order, updates=updates, **{"pacing": Pacing("linear", 0.34, 0.8), **options})


@pytest.mark.parametrize("order", ORDERS)
def test_a_pool_is_gone_through_once_and_grows_by_the_pacing(order):
    sim = Simulation(
        Curriculum(FedAvg(LOCAL), clients=cc(order)), net(), nn.functional.cross_entropy, clients(),
        sampler=Uniform(count=2), ledger=(ledger := Ledger()),
    )  # fmt: skip
    passes: list[list[int]] = []
    models = [sim.server["x"].clone()]
    begins, done, whole = list[int](), 0, True
    for row in sim.rounds(15):
        if whole:
            passes.append([])
            begins.append(row.round - 1)
        passes[-1] += row.participants
        models.append(sim.server["x"].clone())
        whole = len(passes[-1]) == row.reports["pool"]
        if whole:
            assert len(set(passes[-1])) == len(passes[-1]) == cc().pacing.size(done, 30, 6)
            done += len(passes[-1])
    assert len(passes) > 3
    if order != "random":
        for begin, members in zip(begins[:-1], passes, strict=False):
            hard = [loss_at(models[begin], data) for data in clients()]
            rank = sorted(range(6), key=hard.__getitem__, reverse=order == "hard_first")
            assert set(members) == set(rank[: len(members)])
    scorings = sum(entry.payload == 4 for entry in ledger)
    assert scorings == 6 * len(passes) * (order != "random")


def loss_at(vector: Tensor, data: ClientData) -> float:
    return float(nn.functional.cross_entropy(at(vector, data.x), data.y))


def at(vector: Tensor, x: Tensor) -> Tensor:
    return LocalModel(net(), nn.functional.cross_entropy).outputs(vector, x)


@pytest.mark.parametrize(("judge", "up"), [("global", 4), ("local", 4), ("both", 8)])
def test_scoring_costs_a_model_to_everybody_and_a_number_back(judge, up):
    full = cc(pacing=FULL, judge=judge)
    plain, scored = (
        run(method, rounds=6, sampler=Uniform(count=2))
        for method in (FedAvg(LOCAL), Curriculum(FedAvg(LOCAL), clients=full))
    )
    assert scored.tally.down - plain.tally.down == 2 * 6 * 4 * NUMEL  # two passes of three rounds
    assert scored.tally.up - plain.tally.up == 2 * 6 * up
    judges = 2 if judge == "both" else 1  # in the second pass everybody has a model of its own
    assert scored.tally.work["forward"] == (1 + judges) * sum(map(len, clients()))


def test_rounds_are_those_that_spend_the_updates():
    for updates in (7, 18, 30):
        plan = cc("random", updates=updates)
        rounds = plan.rounds(6, 4)
        sim = run(Curriculum(FedAvg(LOCAL), clients=plan), rounds=rounds, sampler=Uniform(count=4))
        spent = [len(row.participants) for row in sim.history]
        assert sum(spent) >= updates > sum(spent) - int(sim.history[-1].reports["pool"])
        assert sim.server["curriculum.at"] == 0  # the last pool is completed, and the next one there
    assert cc(pacing=FULL, updates=30).rounds(6, 2) == 15


def test_with_a_full_pool_all_train_equally_often():
    sim = run(Curriculum(FedAvg(LOCAL), clients=cc(pacing=FULL)), rounds=9, sampler=Uniform(count=2))
    often = torch.zeros(6)
    for row in sim.history:
        often[list(row.participants)] += 1
    assert torch.equal(often, torch.full((6,), 3.0))


def test_a_random_full_pool_is_the_plain_method_with_these_participants():
    sim = run(Curriculum(FedAvg(LOCAL), clients=cc("random", pacing=FULL)), rounds=5)
    groups = [list(row.participants) for row in sim.history]
    plain = run(FedAvg(LOCAL), rounds=5, sampler=lambda round, n, seed: groups[min(round, 4)])
    assert_equal_runs(plain, sim)


def assert_equal_runs(one: Simulation, other: Simulation) -> None:
    assert torch.equal(one.server["x"], other.server["x"])
    assert (one.tally.up, one.tally.down, one.tally.work) == (
        other.tally.up,
        other.tally.down,
        other.tally.work,
    )


def test_the_easiest_client_is_in_the_first_pool():
    hard = [loss_at(context().initial, data) for data in clients()]
    for order, chosen in (("easy_first", min), ("hard_first", max)):
        narrow = cc(order, pacing=Pacing("linear", 1 / 6, 0.8))
        sim = run(Curriculum(FedAvg(LOCAL), clients=narrow), rounds=1, sampler=Uniform(count=2))
        assert sim.history[0].participants == (hard.index(chosen(hard)),)


def test_who_does_not_answer_the_scoring_waits_for_the_next_one():
    def infinite(outputs: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return outputs[:, 0] * (math.inf if len(y) == 23 else 1.0)  # client 3: its answer is excluded

    method = Curriculum(FedAvg(LOCAL), clients=cc(pacing=FULL, score=infinite))
    sim = run(method, rounds=6, sampler=Uniform(count=2), nonfinite="exclude")
    assert {client for row in sim.history for client in row.participants} == {0, 1, 2, 4, 5}
    assert [set(row.lost) for row in sim.history] == [{3}, set(), set()] * 2


def test_an_expert_that_was_lost_is_sent_again():
    def infinite(outputs: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return outputs[:, 0] * (math.inf if len(y) == 23 else 1.0)

    expert = Expert(stream(0, "expert").normal(NUMEL))
    scored = cc(pacing=FULL, judge="expert", score=infinite)
    sim = run(Curriculum(FedAvg(LOCAL), clients=scored, expert=expert), rounds=6, nonfinite="exclude",
              sampler=Uniform(count=2))  # fmt: skip
    plain = run(
        Curriculum(FedAvg(LOCAL), clients=cc("random", pacing=FULL)), rounds=6, sampler=Uniform(count=2)
    )
    members = sum(len(row.participants) for row in sim.history) - sum(
        len(row.participants) for row in plain.history
    )
    models = 2 * 6 + 6 + 1 + members  # two scorings, an expert each, and client 3's once more
    assert sim.tally.down - plain.tally.down == 4 * NUMEL * models


def test_both_curricula_and_an_expert_resume_bit_for_bit(tmp_path):
    method = Curriculum(
        Scaffold(PLAIN),
        DataCurriculum(judge="both", min_samples=6),
        cc(judge="expert"),
        Expert(stream(0, "expert").normal(NUMEL)),
    )
    through = run(method, rounds=7, sampler=Uniform(count=2))
    for stop in (1, 2, 3):
        folder = tmp_path / str(stop)
        run(method, rounds=stop, sampler=Uniform(count=2)).save(folder)
        resumed = Simulation(
            method, net(), nn.functional.cross_entropy, clients(), sampler=Uniform(count=2), workers=2
        )
        resumed.load(folder)
        resumed.run(7)
        resumed.close()
        assert_equal_runs(through, resumed)


# The expert.


@pytest.mark.parametrize("base", [FedAvg(LOCAL), FedAsync(LOCAL)], ids=["FedAvg", "FedAsync"])
def test_an_expert_travels_once_to_each_client_and_is_not_the_methods_affair(base):
    expert = Expert(stream(0, "expert").normal(NUMEL))
    plain = run(base, rounds=5)
    taught = run(Curriculum(base, replace(SMALL, judge="expert"), expert=expert), rounds=5)
    seen = {client for row in taught.history for client in row.participants}
    known = set(taught.server["curriculum.taught"].nonzero()[:, 0].tolist())
    assert seen <= known
    assert taught.tally.down - plain.tally.down == 4 * NUMEL * len(known)
    assert taught.tally.up == plain.tally.up
    for client in seen:
        data = clients()[client]
        expected = nn.functional.cross_entropy(at(expert.vector, data.x), data.y, reduction="none")
        assert torch.allclose(taught.states[client]["curriculum.expert on data"], expected)


def test_experts_are_told_apart_by_what_they_are():
    a, b = (
        Curriculum(FedAvg(LOCAL), DataCurriculum(judge="expert"), None, Expert(torch.ones(3) * k))
        for k in (1, 2)
    )
    assert repr(a) != repr(b)
    assert repr(a) == repr(replace(a))
    assert "at 0x" not in repr(DataCurriculum(score=nn.functional.cross_entropy))


# Who holds what.


def test_difficulty_is_dealt_within_the_classes_and_keeps_their_counts():
    labels = torch.arange(400) % 4
    scores = stream(0, "scores").uniform(400)
    parts = dirichlet(labels, 10, 0.5, 0)
    dealt = {deal: by_difficulty(parts, labels, scores, deal, 0) for deal in ("inc", "dec", "rand")}
    for found in dealt.values():
        assert torch.equal(found.report(labels).histogram, parts.report(labels).histogram)
        assert torch.equal(torch.cat(found.parts).sort().values, torch.arange(400))
    for label in range(4):
        held = [scores[part][labels[part] == label] for part in dealt["inc"].parts]
        ends = [(float(s.min()), float(s.max())) for s in held if len(s)]
        assert all(a[1] <= b[0] for a, b in pairwise(ends))
    negated = by_difficulty(parts, labels, -scores, "inc", 0)
    assert all(torch.equal(a, b) for a, b in zip(negated.parts, dealt["dec"].parts, strict=True))
    spread = {deal: difficulty_spread(found, scores) for deal, found in dealt.items()}
    assert spread["inc"][0] > 3 * spread["rand"][0]
    assert spread["inc"][1] < spread["rand"][1]


def test_more_parts_than_clients_leave_the_rest_out():
    labels, scores = torch.arange(200) % 2, torch.arange(200.0)
    found = by_difficulty(iid(200, 20, 0), labels, scores, "inc", 0, clients=5)
    assert found.sizes == (10,) * 5
    assert max(int(part.max()) for part in found.parts) < 75


def test_spread_is_as_defined():
    parts = by_difficulty(
        iid(4, 2, 0), torch.zeros(4, dtype=torch.int64), torch.tensor([0.0, 2, 10, 14]), "inc", 0
    )
    assert difficulty_spread(parts, torch.tensor([0.0, 2, 10, 14])) == (5.5, 1.5)


def test_a_mix_a_client_has_the_balance_that_was_asked_for():
    labels = torch.arange(2000) % 10
    skewed, even = (dirichlet_by_client(labels, 20, beta, 0) for beta in (0.1, 1000.0))
    assert sum(skewed.sizes) == sum(even.sizes) == 2000
    assert min(skewed.sizes) >= 10
    report = even.report(labels)
    assert report.total_variation < 0.05 < 0.5 < skewed.report(labels).total_variation
    with pytest.raises(ValueError, match=r"min_size must be one that beta can give: in 1000 draws"):
        dirichlet_by_client(torch.arange(200) % 2, 3, 1e-7, 0, min_size=60)


# What is refused.


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Pacing("cubic"), "rule must be one of linear, quad, root, step, exp, log; got 'cubic'"),
        (lambda: Pacing(start=1.2), r"start must be in \[0, 1\]; got 1.2"),
        (lambda: Pacing(full_at=0.0), "full_at must be > 0 and finite; got 0.0"),
        (lambda: Pacing("exp", sharpness=0.0), "sharpness must be > 0 and finite; got 0.0"),
        (lambda: Pacing().size(-1, 10, 10), "step must be >= 0; got -1"),
        (lambda: Pacing().size(0, 0, 10), "steps must be >= 1; got 0"),
        (lambda: DataCurriculum(order="easy"), "order must be one of easy_first, .*; got 'easy'"),
        (lambda: DataCurriculum(judge="g"), "judge must be one of global, local, both, expert; got 'g'"),
        (lambda: DataCurriculum(score="pred"), "score must be one of loss, error, or a function; got 'pred'"),
        (lambda: DataCurriculum(min_samples=0), "min_samples must be >= 1; got 0"),
        (lambda: DataCurriculum(cooling=-1.0), "cooling must be >= 0 and finite; got -1.0"),
        (lambda: ClientCurriculum(updates=0), "updates must be >= 1; got 0"),
        (lambda: cc().rounds(6, 0), "participants must be >= 1; got 0"),
        (lambda: Curriculum(FedAvg(LOCAL)), "give data, clients or both; got neither"),
        (lambda: Curriculum(Scaffold(PLAIN), DataCurriculum(cooling=0.1)), "cooling must be 0 with SCAFFOLD"),
        (lambda: Curriculum(FedAvg(LOCAL), DataCurriculum(judge="expert")), "expert must be given where"),
        (lambda: Curriculum(FedAvg(LOCAL), SMALL, expert=Expert(torch.ones(1))), "expert must be given where"),
        (lambda: PacedSampler([1.0], Pacing(), steps=3, batch_size=2), "batch_size must be at most"),
        (lambda: PacedSampler([1.0], Pacing(), steps=0, batch_size=1), "steps must be >= 1; got 0"),
        (lambda: PacedSampler([], Pacing(), steps=1, batch_size=1), "scores must be 1-D and not empty"),
        (lambda: PacedSampler([math.nan, 1.0], Pacing(), steps=1, batch_size=1), "NaN; 1 of 2 are"),
        (lambda: by_difficulty(iid(4, 2, 0), torch.zeros(4), torch.zeros(4), "up", 0), "deal must be"),
        (lambda: by_difficulty(iid(4, 2, 0), torch.zeros(4), torch.zeros(3), "inc", 0), "cover row 3"),
        (lambda: dirichlet_by_client(torch.arange(9), 2, 0.0, 0), "beta must be > 0 and finite; got 0.0"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_methods_that_cannot_run_under_it_are_refused():
    with pytest.raises(TypeError, match="data needs a method whose local is a LocalSGD; FedAvg has PacedSGD"):
        Curriculum(FedAvg(PacedSGD.of(LOCAL, SMALL)), SMALL)
    with pytest.raises(TypeError, match="clients needs a method of plain rounds; got FedAsync"):
        Curriculum(FedAsync(LOCAL), clients=cc())
    with pytest.raises(
        RuntimeError, match=r"the method asks clients \[.*\], whom the session has not selected"
    ):
        run(Curriculum(PowerOfChoice(LOCAL, candidates=6), clients=cc("random")), sampler=Uniform(count=2))
    with pytest.raises(ValueError, match=r"expert must be a vector of the model's shape \(66,\); got \(3,\)"):
        run(Curriculum(FedAvg(LOCAL), DataCurriculum(judge="expert"), expert=Expert(torch.ones(3))))


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (FedAvg(PacedSGD.of(LOCAL, replace(SMALL, judge="local"))), "wrap the method in Curriculum"),
        (FedAvg(PacedSGD.of(replace(LOCAL, batch_size=30), SMALL)), "batch_size must be at most .* 20; got 30"),
        (
            Curriculum(FedAvg(LOCAL), replace(SMALL, score=lambda o, x, y: o)),
            r"must give 20 figures; got shape",
        ),
        (
            Curriculum(FedAvg(LOCAL), replace(SMALL, score=lambda o, x, y: o[:, 0] * math.nan)),
            "scores of client 0 in round 0 must not be NaN",
        ),
        (
            Curriculum(FedAvg(LOCAL), clients=cc(score=lambda o, x, y: o[:, 0] * math.nan)),
            "scores of client 0 in round 0 must not be NaN",
        ),
    ],
)
def test_what_a_client_cannot_do_names_the_client(method, message):
    with pytest.raises(ClientError, match=message):
        run(method, sampler=Everyone())


def test_a_context_without_memory_serves_the_global_judge():
    model = LocalModel(net(), nn.functional.cross_entropy)
    ctx = ClientContext(0, 0, 0, [20], model, model.theta.clone())
    assert DataCurriculum().of(ctx, clients()[0], ctx.initial).shape == (1, 20)


def test_label_splits_of_the_library_serve_as_well():
    labels = torch.arange(100) // 10
    found = by_difficulty(shards(labels, 10, 2, 0), labels, torch.arange(100.0), "dec", 1)
    assert found.rule == "by_difficulty(shards(shards_per_party=2, seed=0), dec)"
