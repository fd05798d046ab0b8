"""Single merging in one process: the card's exact properties, and bad input."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from cograd.core.streams import stream
from cograd.machines import DecentralizedTrainer, Mixing, Schedule
from cograd.machines.single_merging import (
    Diverged,
    class_weighted,
    consensus_error,
    contraction,
    descent_term,
    merge,
    mergeability,
    recalibrated,
    replicas,
)
from cograd.machines.single_merging.merging import count_average, mix, shared
from cograd.machines.single_merging.mixing import rows_of
from cograd.machines.single_merging.trainer import ELEMENTWISE

F64 = torch.float64
CHOOSING = ("random", "pairwise", "ring+random", "left+random", "exponential+random", "complete+random")
GRAPHS = ("ring", "left", "exponential", "complete")


# Schedules.


def test_a_single_merge_has_exactly_one_dense_round_the_last() -> None:
    for rounds in range(1, 2001):
        schedule = Schedule.single_merge(rounds)
        dense = [t for t in range(rounds) if schedule.peers(t, 16) == 15]
        assert dense == [rounds - 1]


def test_dense_rounds_are_whole_numbers() -> None:
    assert Schedule.truncate(300, 296, 0.2).dense_rounds(32) == 4
    assert Schedule.every_round(7).dense_rounds(4) == 7
    assert Schedule.fixed(7, 0.2).dense_rounds(4) == 0
    assert Schedule.window(100, 0, 10, 0.2).dense_rounds(16) == 10
    assert Schedule.window(100, 0, 10, 0.2, final_merge=True).dense_rounds(16) == 11
    assert Schedule.window(100, 90, 10, 0.2, final_merge=True).dense_rounds(16) == 10


def peers(schedule: Schedule, members: int = 5) -> list[float | None]:
    return [schedule.peers(t, members) for t in range(schedule.rounds)]


def test_ramps_follow_their_formula_and_end_at_high() -> None:
    assert peers(Schedule.linear(4, 0.0)) == [1.0, 2.0, 3.0, 4.0]
    assert peers(Schedule.linear(4, 2.0, 1.0)) == [1.75, 1.5, 1.25, 1.0]
    cosine = peers(Schedule.cosine(4, 0.0))
    assert cosine == pytest.approx([2 - 2 * math.cos(math.pi * p) for p in (0.25, 0.5, 0.75, 1)])
    slow = peers(Schedule.slow_decrease(4, 4.0, 1.0))
    assert slow[:3] == pytest.approx([1 + 3 * math.exp(-10 * p) for p in (0.25, 0.5, 0.75)])
    assert slow[3] == 1.0
    assert peers(Schedule.window(5, 1, 2, 0.2, 3.0)) == [0.2, 3.0, 3.0, 0.2, 0.2]
    assert peers(Schedule.truncate(3, 1, None)) == [None, 4.0, 4.0]


# Mixing matrices.


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 12), st.sampled_from(CHOOSING), st.floats(0, 1), st.integers(0, 10**6))
def test_rows_sum_to_one_and_weigh_all_they_hear_alike(
    members: int, topology: str, share: float, round: int
) -> None:
    mixing = Mixing(topology, seed=4)
    r = share * 0.6  # pairwise: one matching, of an odd number of nodes too
    w = mixing.weights(r, members, round)
    assert np.abs(w.sum(1) - 1).max() < 1e-12
    assert (np.diag(w) > 0).all()
    for row in w:
        assert len(set(row[row > 0].tolist())) == 1
    assert np.array_equal(w, mixing.weights(r, members, round))


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 11), st.floats(0, 1), st.integers(0, 10**6))
def test_pairwise_matrices_are_symmetric_and_keep_the_mean_for_any_number_of_peers(
    members: int, share: float, round: int
) -> None:
    w = Mixing("pairwise", seed=1).weights(share * (members - 1), members, round)
    assert np.array_equal(w, w.T)
    assert np.abs(w.sum(0) - 1).max() < 1e-12
    assert (w >= -1e-12).all()


def test_pull_rows_do_not_keep_the_mean() -> None:
    sums = [Mixing(seed=1).weights(1.0, 8, t).sum(0) for t in range(5)]
    assert any(np.abs(s - 1).max() > 0.1 for s in sums)


@pytest.mark.parametrize("members", [2, 3, 16])
def test_the_ends_are_the_identity_and_the_mean(members: int) -> None:
    for topology in (*CHOOSING, *GRAPHS, "none"):
        assert np.array_equal(Mixing(topology).weights(0.0, members, 0), np.eye(members))
        mean = Mixing(topology).weights(float(members - 1), members, 0)
        assert np.array_equal(mean, np.full((members, members), 1 / members))
    assert np.array_equal(Mixing("complete").weights(None, members, 0), mean)
    theta = torch.randn(members, 5, dtype=F64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        torch.from_numpy(mean) @ theta, theta.mean(0).expand(members, 5), atol=1e-14, rtol=0
    )


def test_graphs_are_those_of_the_official_code() -> None:
    assert Mixing("ring").weights(None, 5, 0)[0].tolist() == [1 / 3, 1 / 3, 0, 0, 1 / 3]
    assert Mixing("left").weights(None, 4, 0)[0].tolist() == [0.5, 0, 0, 0.5]
    exponential = Mixing("exponential").weights(None, 8, 0)
    assert exponential[0].tolist() == [0.25, 0.25, 0.25, 0, 0.25, 0, 0, 0]
    assert exponential[3].tolist() == np.roll(exponential[0], 3).tolist()
    assert Mixing("ring").weights(None, 2, 0).tolist() == [[0.5, 0.5], [0.5, 0.5]]


@pytest.mark.parametrize("r", [0.2, 1.0, 2.3])
def test_random_rows_have_r_peers_in_the_mean_and_no_favourites(r: float) -> None:
    members, rounds = 50, 2000
    counts, heard = np.zeros(members * rounds), np.zeros((members, members))
    for t in range(rounds):
        linked = Mixing(seed=3).weights(r, members, t) > 0
        np.fill_diagonal(linked, False)
        counts[t * members : (t + 1) * members] = linked.sum(1)
        heard += linked
    fraction = r - math.floor(r)
    error = math.sqrt(fraction * (1 - fraction) / len(counts))
    assert abs(counts.mean() - r) <= 3 * error + 1e-12
    off = heard[~np.eye(members, dtype=bool)]
    expected = rounds * r / (members - 1)
    chi_squared = ((off - expected) ** 2 / (expected * (1 - r / (members - 1)))).sum()
    assert abs(chi_squared - len(off)) < 4 * math.sqrt(2 * len(off))


def test_random_on_a_graph_hears_neighbours_only() -> None:
    graph = Mixing("exponential").weights(None, 16, 0) > 0
    heard = sum((Mixing("exponential+random").weights(1.5, 16, t) > 0).astype(int) for t in range(300))
    assert np.array_equal(heard > 0, graph)


def test_a_round_is_drawn_by_seed_and_round() -> None:
    first = Mixing(seed=1).weights(1.0, 16, 5)
    assert not np.array_equal(first, Mixing(seed=1).weights(1.0, 16, 6))
    assert not np.array_equal(first, Mixing(seed=2).weights(1.0, 16, 5))


def test_rows_leave_out_the_nodes_that_hear_nobody() -> None:
    w = np.array([[1, 0, 0], [0.5, 0.25, 0.25], [0, 0.5, 0.5]])
    assert rows_of(w) == {1: [(1, 0.25), (0, 0.5), (2, 0.25)], 2: [(2, 0.5), (1, 0.5)]}


def points(members: int, width: int = 7) -> list[dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(2)
    return [{"w": torch.randn(width, dtype=F64, generator=draw)} for _ in range(members)]


def test_a_round_is_the_dense_product_and_not_a_sweep_in_place() -> None:
    w = np.array([[0.5, 0.5, 0], [0.25, 0.25, 0.5], [0.4, 0.3, 0.3]])
    states = points(3)
    theta = torch.stack([s["w"] for s in states])
    sweep = theta.clone()
    for k in range(3):
        sweep[k] = torch.from_numpy(w[k]) @ sweep
    mix(states, rows_of(w))
    mixed = torch.stack([s["w"] for s in states])
    torch.testing.assert_close(mixed, torch.from_numpy(w) @ theta, atol=1e-15, rtol=0)
    assert float((mixed - sweep).abs().max()) > 0.1


@pytest.mark.parametrize("members", [6, 7])
@pytest.mark.parametrize(("topology", "r"), [("pairwise", 0.2), ("random", 0.2), ("random", 2.3)])
def test_contraction_has_its_closed_form(members: int, topology: str, r: float) -> None:
    theta = torch.stack([s["w"] for s in points(members)])
    mixing = Mixing(topology, seed=5)
    found = np.array([contraction(mixing.weights(r, members, t), theta) for t in range(4000)])
    p = mixing.quality(r, members)
    if r <= 1:
        assert p == pytest.approx(r * members / (2 * (members - 1)))
    assert abs(found.mean() - (1 - p)) < 3 * found.std() / math.sqrt(len(found))


def test_a_matched_pair_loses_half_its_disagreement() -> None:
    theta = torch.stack([s["w"] for s in points(4)])
    w = np.eye(4)
    w[np.ix_([0, 2], [0, 2])] = 0.5
    spread = float((theta - theta.mean(0)).square().sum())
    lost = float((theta[0] - theta[2]).square().sum() / 2)
    assert contraction(w, theta) == pytest.approx(1 - lost / spread)


@pytest.mark.parametrize("peers", [1.0, 2.0, 5.0])
def test_quality_of_whole_matchings_is_that_of_their_matrices(peers: float) -> None:
    theta = torch.stack([s["w"] for s in points(6)])
    found = np.array([contraction(Mixing("pairwise").weights(peers, 6, t), theta) for t in range(2000)])
    expected = 1 - Mixing("pairwise").quality(peers, 6)
    assert abs(found.mean() - expected) < 3 * found.std() / math.sqrt(len(found)) + 1e-12


def test_quality_of_a_graph_bounds_every_contraction_and_is_reached() -> None:
    for mixing in (
        Mixing("ring"),
        Mixing("exponential"),
        Mixing.of([[0.5, 0.5, 0], [0, 1, 0], [0.3, 0.3, 0.4]]),
    ):
        m = len(mixing.matrix) if mixing.matrix else 6
        w = mixing.weights(None, m, 0)
        centre = np.eye(m) - 1 / m
        worst = np.linalg.svd(w @ centre)[2][0]
        assert contraction(w, torch.from_numpy(worst)[:, None]) == pytest.approx(1 - mixing.quality(None, m))
        assert contraction(w, torch.stack([s["w"] for s in points(m)])) <= 1 - mixing.quality(None, m) + 1e-12
    assert Mixing().quality(0.0, 4) == 0.0
    assert Mixing().quality(3.0, 4) == 1.0


# Training.


def build() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def normed() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).double()


def batch(step: int, nodes: int, size: int = 4) -> tuple[Tensor, Tensor]:
    draw = stream(9, "batch", step)
    x = draw.normal(nodes, size, 6).double()
    return x, (x[..., 0] > 0).long() + (x[..., 1] > 0).long()


def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def adamw(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.01, weight_decay=5e-4)


def trainer(
    schedule: Schedule,
    nodes: int = 4,
    make: Callable[[], nn.Module] = build,
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] = adamw,
    init: Any = "per-node",
    **options: Any,
) -> DecentralizedTrainer:
    models = replicas(make, nodes, init=init, seed=3)
    return DecentralizedTrainer(models, optimizer, nn.functional.cross_entropy, schedule=schedule, **options)


def run(t: DecentralizedTrainer, steps: int, start: int = 0, size: int = 4) -> DecentralizedTrainer:
    for step in range(start, start + steps):
        t.step(*batch(step, t.nodes, size))
    return t


def weights(t: DecentralizedTrainer) -> Tensor:
    return torch.stack([torch.cat([v.reshape(-1) for v in m.state_dict().values()]) for m in t.models])


@pytest.mark.parametrize("make", [build, normed])
@pytest.mark.parametrize("optimizer", [sgd, adamw])
@pytest.mark.parametrize("mixing", [Mixing(seed=2), Mixing("pairwise", seed=2)])
def test_the_batched_engine_is_the_loop(make: Any, optimizer: Any, mixing: Mixing) -> None:
    options = {"make": make, "optimizer": optimizer, "mixing": mixing, "local_steps": 2}
    runs = [
        run(trainer(Schedule.single_merge(8, 0.6), engine=e, **options), 16)  # type: ignore[arg-type]
        for e in ("batched", "loop")
    ]
    torch.testing.assert_close(weights(runs[0]), weights(runs[1]), atol=1e-8, rtol=0)
    x, _ = batch(99, 1)
    torch.testing.assert_close(runs[0].outputs(x[0]), runs[1].outputs(x[0]), atol=1e-8, rtol=0)
    assert list(runs[0].ledger) == list(runs[1].ledger)


def test_averaging_every_step_of_plain_sgd_is_sgd_on_the_whole_batch() -> None:
    t = run(trainer(Schedule.every_round(30), optimizer=sgd, init="shared"), 30)
    model = replicas(build, 2, seed=3)[0]
    optimizer = sgd(list(model.parameters()))
    for step in range(30):
        x, y = batch(step, 4)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x.flatten(0, 1)), y.flatten()).backward()
        optimizer.step()
    for node in t.models:
        for mine, theirs in zip(node.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=0)


def test_averaging_every_round_is_fedavg() -> None:
    t = run(trainer(Schedule.every_round(5), optimizer=sgd, init="shared", local_steps=6), 30)
    model = replicas(build, 2, seed=3)[0]
    for round in range(5):
        clients = [copy.deepcopy(model) for _ in range(4)]
        for node, client in enumerate(clients):
            optimizer = sgd(list(client.parameters()))
            for step in range(6):
                x, y = batch(6 * round + step, 4)
                optimizer.zero_grad()
                nn.functional.cross_entropy(client(x[node]), y[node]).backward()
                optimizer.step()
        averages = [torch.stack(p).mean(0) for p in zip(*(c.parameters() for c in clients), strict=True)]
        for parameter, value in zip(model.parameters(), averages, strict=True):
            parameter.data.copy_(value)
    for mine, theirs in zip(t.node(2).parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=0)


def test_the_single_merge_is_the_counterfactual_model_of_the_run_without_it() -> None:
    merged = run(trainer(Schedule.single_merge(6), local_steps=2), 12)
    without = run(trainer(Schedule.truncate(6, 5, 0.2, 0.0), local_steps=2), 12)
    expected = without.merged().state_dict()
    for node in merged.models:
        assert all(torch.equal(v, expected[k]) for k, v in node.state_dict().items())
    without.merge()
    assert torch.equal(weights(without), weights(merged))


@pytest.mark.parametrize("engine", ["batched", "loop"])
def test_looking_changes_no_node_and_no_random_number(engine: str) -> None:
    t = run(trainer(Schedule.single_merge(10), make=normed, engine=engine), 5)
    before = weights(t).clone()
    optimizers = copy.deepcopy(t.state_dict()["optimizers"])
    random, messages = torch.get_rng_state(), len(t.ledger)
    x, _ = batch(50, 1)
    t.merged(recalibrate=[x[0]])
    t.outputs(x[0])
    t.consensus_error()
    descent_term(t.models, *(b[0] for b in batch(51, 1)), nn.functional.cross_entropy, 0.1)
    assert torch.equal(weights(t), before)
    assert torch.equal(torch.get_rng_state(), random)
    assert str(t.state_dict()["optimizers"]) == str(optimizers)
    assert len(t.ledger) == messages
    reference = run(trainer(Schedule.single_merge(10), make=normed, engine=engine), 10)
    assert torch.equal(weights(run(t, 5, 5)), weights(reference))


def test_consensus_error_is_the_mean_square_distance() -> None:
    t = run(trainer(Schedule.fixed(5, 0.0)), 5)
    theta = weights(t)
    expected = float((theta - theta.mean(0)).square().sum() / 4)
    assert t.consensus_error() == pytest.approx(expected)
    assert consensus_error(t.models) == pytest.approx(expected)
    t.merge()
    assert t.consensus_error() == pytest.approx(0, abs=1e-25)


def test_gossip_at_the_end_comes_nearer_to_the_merge_with_every_round() -> None:
    t = run(trainer(Schedule.fixed(5, 0.0)), 5)
    errors = [t.consensus_error()]
    for _ in range(3):
        t.gossip(1, Mixing("ring"))
        errors.append(t.consensus_error())
    assert errors == sorted(errors, reverse=True)
    assert t.round == 8
    mean = weights(run(trainer(Schedule.fixed(5, 0.0)), 5)).mean(0)
    torch.testing.assert_close(weights(t).mean(0), mean, atol=1e-14, rtol=0)


# The ledger.


@pytest.mark.parametrize("topology", ["random", "pairwise"])
def test_messages_are_the_active_rows_and_a_merge_is_a_ring(topology: str) -> None:
    mixing = Mixing(topology, seed=7)
    t = run(trainer(Schedule.single_merge(20, 0.4), mixing=mixing), 20)
    size = 8 * (6 * 8 + 8 + 8 * 3 + 3)
    active = [len(mixing.rows(0.4, 4, r)) for r in range(19)]
    assert t.ledger.sent() == size * sum(active) + 2 * 3 * size
    assert sum(e.to != -1 for e in t.ledger) == sum(active)
    assert {e.payload for e in t.ledger if e.to != -1} == {size}


def test_without_communication_nothing_is_counted() -> None:
    assert len(run(trainer(Schedule.fixed(5, 0.0)), 5).ledger) == 0


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 9), st.integers(0, 100))
def test_the_rings_shares_add_up(members: int, numel: int) -> None:
    from cograd.core.ledger import Ledger

    ledger = Ledger()
    count_average(ledger, members, 0, [(numel, 4), (3, 8)])
    assert ledger.sent() == 2 * (members - 1) * (4 * numel + 24)
    parts = [ledger.sent(k) for k in range(members)]
    assert max(parts) - min(parts) <= 2 * 12


def test_half_precision_travels_as_it_is_and_is_added_up_in_float32() -> None:
    def half() -> nn.Module:
        return nn.Linear(6, 3).bfloat16()

    def loss(out: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(out.float(), y)

    models = replicas(half, 3, init="per-node")
    start = torch.stack([m.weight.detach().clone() for m in models])  # type: ignore[union-attr]
    t = DecentralizedTrainer(models, sgd, loss, schedule=Schedule.fixed(1, 0.0))
    t.gossip(1, Mixing("left"))
    assert t.ledger.sent() == 3 * 2 * 21
    t = DecentralizedTrainer(models, sgd, loss, schedule=Schedule.fixed(1, 0.0))
    t.merge()
    assert t.ledger.sent() == 2 * 2 * 4 * 21
    exact = start.double().mean(0)
    assert torch.equal(t.node(1).weight, exact.float().bfloat16())  # type: ignore[arg-type]


# Merging.


def quadratic(members: int) -> tuple[list[nn.Module], Tensor, Callable[[nn.Module], float]]:
    draw = torch.Generator().manual_seed(1)
    a = torch.randn(6, 6, dtype=F64, generator=draw)
    a = a @ a.T
    centre = torch.randn(6, dtype=F64, generator=draw)
    models = replicas(lambda: nn.Linear(6, 1, bias=False).double(), members, init="per-node")

    def loss(model: nn.Module) -> float:
        d = model.weight[0].detach() - centre  # type: ignore[index, operator]
        return float(d @ a @ d / 2)

    return models, a, loss


def test_the_jensen_gap_of_a_quadratic_is_half_the_trace() -> None:
    models, a, loss = quadratic(5)
    theta = torch.stack([m.weight[0].detach() for m in models])  # type: ignore[index]
    away = theta - theta.mean(0)
    gamma = away.T @ away / 5
    assert mergeability(models, loss) == pytest.approx(float((a @ gamma).trace()) / 2)
    assert consensus_error(models) == pytest.approx(float(gamma.trace()))


def test_a_convex_loss_is_always_mergeable() -> None:
    x, y = (b[0] for b in batch(0, 1, 64))
    for seed in range(5):
        models = replicas(lambda: nn.Linear(6, 3).double(), 4, init="per-node", seed=seed)
        gap = mergeability(models, lambda m: float(nn.functional.cross_entropy(m(x), y).detach()))
        assert gap > 0


def test_weights_of_a_merge() -> None:
    models = replicas(build, 3, init="per-node")
    before = [copy.deepcopy(m.state_dict()) for m in models]
    merged = merge(models, [0.5, 0.25, 0.25]).state_dict()
    for name, value in merged.items():
        expected = 0.5 * before[0][name] + 0.25 * before[1][name] + 0.25 * before[2][name]
        torch.testing.assert_close(value, expected, atol=1e-15, rtol=0)
    assert all(
        torch.equal(v, b[k]) for m, b in zip(models, before, strict=True) for k, v in m.state_dict().items()
    )


def deep() -> nn.Module:
    parts = [nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.5), nn.Linear(6, 5), nn.BatchNorm1d(5)]
    return nn.Sequential(*parts).double()


def loader(batches: int = 7) -> list[tuple[Tensor, Tensor]]:
    return [(2 + x[0], y[0]) for x, y in (batch(i, 1, 16) for i in range(batches))]


def test_re_estimated_statistics_are_the_means_over_the_batches() -> None:
    model = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 3)).double().train()
    assert recalibrated(model, loader()) == 7
    means = torch.stack([x.mean(0) for x, _ in loader()]).mean(0)
    variances = torch.stack([x.var(0) for x, _ in loader()]).mean(0)
    torch.testing.assert_close(model[0].running_mean, means, atol=1e-6, rtol=0)
    torch.testing.assert_close(model[0].running_var, variances, atol=1e-6, rtol=0)
    assert int(model[0].num_batches_tracked) == 7
    assert model[0].momentum == 0.1
    assert all(module.training for module in model.modules())


def test_re_estimation_is_update_bn_with_dropout_off_and_at_most_32_batches() -> None:
    torch.manual_seed(0)
    model = deep()
    reference = copy.deepcopy(model)
    reference[3] = nn.Identity()
    assert recalibrated(model.eval(), iter(loader(40))) == 32
    torch.optim.swa_utils.update_bn(loader(32), reference)
    for layer in (1, 5):
        torch.testing.assert_close(model[layer].running_mean, reference[layer].running_mean)
        torch.testing.assert_close(model[layer].running_var, reference[layer].running_var)
    assert not any(module.training for module in model.modules())


def test_a_merge_averages_statistics_or_estimates_them_and_copies_counters() -> None:
    models = replicas(deep, 3, init="per-node")
    for k, model in enumerate(models):
        for x, _ in loader(k + 1):
            model(x)
    means = torch.stack([m[1].running_mean for m in models]).mean(0)  # type: ignore[index]
    plain = merge(models)
    torch.testing.assert_close(plain[1].running_mean, means)  # type: ignore[index]
    assert int(plain[1].num_batches_tracked) == 1  # type: ignore[index]
    estimated = merge(models, recalibrate=loader())
    assert int(estimated[1].num_batches_tracked) == 7  # type: ignore[index]
    assert recalibrated(plain, loader()) == 7
    assert torch.equal(plain[1].running_var, estimated[1].running_var)  # type: ignore[index]


def test_what_travels_is_the_trainable_parameters_and_the_running_statistics() -> None:
    model = deep()
    model[0].weight.requires_grad_(False)
    names = [n for n in model.state_dict() if "num_batches" not in n and n != "0.weight"]
    assert sorted(shared(model)) == sorted(names)
    assert recalibrated(build(), []) == 0


def test_gossip_mixes_running_statistics_and_leaves_counters() -> None:
    t = run(trainer(Schedule.fixed(4, 0.0), make=normed), 4)
    means = torch.stack([m[1].running_mean for m in t.models])  # type: ignore[index]
    t.gossip(1, Mixing("left"))
    torch.testing.assert_close(t.node(1)[1].running_mean, (means[0] + means[1]) / 2)  # type: ignore[index]
    assert int(t.node(1)[1].num_batches_tracked) == 4  # type: ignore[index]


# The term of the descent lemma.


class Quartic(nn.Module):
    """Loss sum_i a_i w_i^4: Hessian diag(12 a w^2), and its trace's gradient 24 a w Gamma_ii."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(5, dtype=F64))

    def forward(self, a: Tensor) -> Tensor:
        return (a * self.w**4).sum()


@pytest.mark.parametrize("smoothness", [None, 30.0])
def test_the_descent_term_of_a_quartic_in_closed_form(smoothness: float | None) -> None:
    models = replicas(Quartic, 4, init="per-node")
    a = torch.tensor([1.0, 2.0, 0.5, 3.0, 1.5], dtype=F64)
    theta = torch.stack([m.w.detach() for m in models])  # type: ignore[union-attr]
    w, gamma = theta.mean(0), (theta - theta.mean(0)).square().mean(0)
    term = descent_term(models, a, a, lambda out, _: out, 0.3, smoothness)
    alignment = float((4 * a * w**3 * 24 * a * w * gamma).sum())
    largest = float((12 * a * w**2).max()) if smoothness is None else smoothness
    assert term.trace == pytest.approx(float((12 * a * w**2 * gamma).sum()))
    assert term.alignment == pytest.approx(alignment)
    assert term.smoothness == pytest.approx(largest, rel=1e-3)
    assert term.value == pytest.approx((0.3 * largest - 1) / 2 * alignment, rel=5e-3)


def test_the_descent_term_of_a_quadratic_is_zero() -> None:
    models = replicas(lambda: nn.Linear(6, 1).double(), 3, init="per-node")
    x, y = (b[0] for b in batch(0, 1))
    term = descent_term(models, x, y, lambda out, y: nn.functional.mse_loss(out[:, 0], y.double()), 0.1)
    assert term.alignment == pytest.approx(0, abs=1e-12)
    assert term.trace > 0


# Data.


def test_nodes_hold_rows_by_their_own_class_weights() -> None:
    labels = torch.arange(1000) % 10
    held = class_weighted(labels, 30, 100, 0.1, seed=1)
    assert held.shape == (30, 100)
    assert all(len(row.unique()) == 100 for row in held)
    share = torch.stack([labels[row].bincount(minlength=10).max() / 100 for row in held]).mean()
    assert float(share) > 0.5
    assert torch.equal(held, class_weighted(labels, 30, 100, 0.1, seed=1))


def test_resampling_draws_anew_from_the_same_class_weights() -> None:
    labels = torch.cat([torch.zeros(900), torch.ones(100)]).long()
    first, second = (class_weighted(labels, 20, 400, 1.0, 1, draw=r) for r in (0, 1))
    assert not torch.equal(first, second)
    mixes = [labels[rows].float().mean(1) for rows in (first, second)]
    assert float((mixes[0] - mixes[1]).abs().max()) < 0.15
    assert float(mixes[0].std()) > 0.05
    assert class_weighted(labels[:5], 1, 50, 1.0, 1, draw=0).shape == (1, 50)


# Checkpoints.


@pytest.mark.parametrize("engine", ["batched", "loop"])
def test_a_checkpoint_continues_bit_for_bit(engine: str, tmp_path: Any) -> None:
    options = {"engine": engine, "make": normed, "mixing": Mixing(seed=5), "local_steps": 3}
    whole = run(trainer(Schedule.single_merge(6, 0.5), **options), 18)  # type: ignore[arg-type]
    first = run(trainer(Schedule.single_merge(6, 0.5), **options), 8)  # type: ignore[arg-type]
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = trainer(Schedule.single_merge(6, 0.5), **options)  # type: ignore[arg-type]
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    run(second, 10, 8)
    assert torch.equal(weights(second), weights(whole))
    run(first, 10, 8)
    assert torch.equal(weights(first), weights(whole))


def test_foreign_state_is_refused() -> None:
    state = trainer(Schedule.single_merge(6)).state_dict()
    for other in (
        trainer(Schedule.single_merge(6), nodes=3),
        trainer(Schedule.single_merge(7)),
        trainer(Schedule.single_merge(6), engine="loop"),
        trainer(Schedule.single_merge(6), mixing=Mixing(seed=1)),
        trainer(Schedule.single_merge(6), local_steps=2),
        trainer(Schedule.single_merge(6), make=lambda: nn.Linear(6, 3).double()),
    ):
        before = weights(other)
        with pytest.raises(ValueError, match="the state is of another run"):
            other.load_state_dict(state)
        assert torch.equal(weights(other), before)


# Bad input.


@pytest.mark.parametrize("engine", ["batched", "loop"])
def test_a_diverged_node_is_named_and_nothing_is_averaged(engine: str) -> None:
    t = run(trainer(Schedule.single_merge(6), engine=engine, local_steps=2), 11)
    t.engine.states[2]["2.bias"][1] = math.nan
    with pytest.raises(Diverged, match=r"node 2: '.*' holds NaN or infinity") as caught:
        t.step(*batch(11, 4))
    assert caught.value.nodes == [2]
    assert t.round == 5
    after = weights(t)
    with pytest.raises(Diverged):
        t.step(*batch(12, 4))
    assert torch.equal(weights(t).nan_to_num(), after.nan_to_num())
    assert len({e.round for e in t.ledger if e.to == -1}) == 0
    t.engine.states[2]["2.bias"][1] = 0.0
    for name, value in t.engine.states[2].items():
        value.copy_(t.engine.states[1][name])
    with pytest.raises(RuntimeError, match="6 rounds are over"):
        t.step(*batch(12, 4))
    assert t.round == 6  # the round that was due has been done


def test_a_diverged_node_that_nobody_hears_spoils_no_round() -> None:
    t = trainer(Schedule.fixed(3, 0.0))
    t.engine.states[2]["2.bias"][1] = math.nan
    run(t, 2)
    finite = [bool(torch.isfinite(row).all()) for row in weights(t)]
    assert finite == [True, True, False, True]
    with pytest.raises(Diverged):
        t.merged()


def complex_model() -> nn.Module:
    model = nn.Linear(2, 2)
    model.phase = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    return model


def frozen_apart() -> list[nn.Module]:
    models = replicas(build, 2, init="per-node")
    for model in models:
        model[0].weight.requires_grad_(False)  # type: ignore[index, union-attr, operator]
    return models


def nan_model() -> list[nn.Module]:
    models = replicas(build, 3)
    models[1][2].weight.data[0, 0] = math.inf  # type: ignore[index, union-attr]
    return models


TWO = [[0.5, 0.5], [0.5, 0.5]]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (lambda: Schedule.single_merge(0), "rounds must be >= 1; got 0"),
        (lambda: Schedule.single_merge(2.5), "rounds must be a whole number; got 2.5"),
        (lambda: Schedule.fixed(3, -0.1), "low must be a number of peers >= 0, or None; got -0.1"),
        (lambda: Schedule.fixed(3, math.nan), "low must be a number of peers >= 0, or None; got nan"),
        (lambda: Schedule.linear(3, 0.2, math.inf), "high must be a number of peers"),
        (lambda: Schedule.linear(3, None), "low must be a number of peers for a linear schedule; got None"),
        (lambda: Schedule.truncate(3, 3, 0.2), r"start must be in 0 \.\. 2; got 3"),
        (lambda: Schedule.window(10, 5, 6, 0.2), r"width must be in 1 \.\. 5; got 6"),
        (lambda: Schedule("slow_grow", 3, 0.2), "kind must be one of fixed, .*; got 'slow_grow'"),
        (lambda: Schedule.fixed(3, 0.2).peers(3, 4), r"round must be in 0 \.\. 2; got 3"),
        (lambda: Mixing("star"), "topology must be one of random, .*; got 'star'"),
        (lambda: Mixing("matrix"), "matrix goes with topology 'matrix'"),
        (lambda: Mixing.of([[0.5, 0.4], [0.5, 0.5]]), "rows must sum to 1; row 0 sums to 0.9"),
        (lambda: Mixing.of([[0.5, 0.5]]), r"matrix must be square; got shape \(1, 2\)"),
        (lambda: Mixing.of([[1.5, -0.5], [0, 1]]), "matrix must hold finite numbers >= 0"),
        (lambda: Mixing.of([[math.nan, 1], [0, 1]]), "matrix must hold finite numbers >= 0"),
        (lambda: Mixing.of(TWO).check(None, 3), "matrix must be of the 3 nodes; got one of 2"),
        (lambda: Mixing().check(0.2, 1), "members must be at least 2 nodes; got 1"),
        (lambda: Mixing().check(4.0, 4), "peers must be in 0 .. members - 1 = 3; got 4.0"),
        (lambda: Mixing().check(-1.0, 4), "peers must be in 0 .. members - 1 = 3; got -1.0"),
        (lambda: Mixing().check(None, 4), "peers must be a number for topology 'random'; got None"),
        (lambda: Mixing("ring").check(0.2, 8), r"got 0.2: use 'ring\+random' to draw them"),
        (lambda: Mixing("ring+random").check(3.0, 8), r"peers must be <= 2, the neighbours in 'ring\+random'"),
        (lambda: Mixing("pairwise").quality(1.5, 6), "peers must be at most one matching's"),
        (lambda: trainer(Schedule.fixed(3, 5.0)), "peers must be in 0 .. members - 1 = 3; got 5.0"),
        (
            lambda: trainer(Schedule.fixed(3, 0.2), local_steps=0),
            "local_steps must be a whole number >= 1; got 0",
        ),
        (
            lambda: trainer(Schedule.fixed(3, 0.2), engine="fast"),
            "engine must be 'batched' or 'loop'; got 'fast'",
        ),
        (lambda: trainer(Schedule.fixed(3, 0.2), nodes=1), "nodes must be >= 2; got 1"),
        (lambda: trainer(Schedule.fixed(3, 0.2), init="random"), "init must be 'shared' or 'per-node'"),
        (
            lambda: trainer(Schedule.fixed(3, 0.2), optimizer=torch.optim.LBFGS),
            "optimizer must be one of SGD, .*got LBFGS: use engine='loop'",
        ),
        (
            lambda: trainer(Schedule.fixed(3, 0.2)).step(*batch(0, 3)),
            "x must hold a batch for each of 4 nodes; got 3",
        ),
        (lambda: merge([build()]), "models must be at least 2 nodes' models; got 1"),
        (lambda: merge([build(), normed()]), "that of node 1 differs from node 0's"),
        (lambda: merge([complex_model()] * 2), "must be floating point; 'phase' is torch.complex64"),
        (
            lambda: merge(frozen_apart()),
            "frozen parameters must be the same on all nodes; '0.weight' of node 1",
        ),
        (lambda: merge(nan_model()), "node 1: '2.weight' holds NaN or infinity"),
        (lambda: merge([build()] * 2, [1.0]), "weights must be one for each of 2 models; got 1"),
        (lambda: merge([build()] * 2, [0.5, 0.4]), r"weights must be >= 0 and sum to 1; got \[0.5, 0.4\]"),
        (lambda: merge([build()] * 2, [1.5, -0.5]), r"weights must be >= 0 and sum to 1"),
        (lambda: recalibrated(normed(), []), "loader must give at least one batch"),
        (
            lambda: class_weighted(torch.zeros(3), 2, 2, 0.1, 0),
            "labels must be 1-D integers; got torch.float32",
        ),
        (lambda: class_weighted(torch.arange(3), 0, 2, 0.1, 0), "nodes must be >= 1; got 0"),
        (lambda: class_weighted(torch.arange(3), 2, 4, 0.1, 0), r"samples must be in 1 .. 3 rows; got 4"),
        (lambda: class_weighted(torch.arange(3), 2, 2, 0.0, 0), "alpha must be positive and finite; got 0"),
    ],
)
def test_bad_arguments_are_named(bad: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bad()


def test_an_empty_loader_leaves_the_statistics() -> None:
    model = normed()
    model(batch(0, 1)[0][0])
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="at least one batch"):
        merge([model, copy.deepcopy(model)], recalibrate=[])
    with pytest.raises(ValueError, match="at least one batch"):
        recalibrated(model, iter(()))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_after_the_last_round_no_step_is_taken() -> None:
    t = run(trainer(Schedule.single_merge(2)), 2)
    before = weights(t)
    with pytest.raises(RuntimeError, match="the schedule's 2 rounds are over"):
        t.step(*batch(2, 4))
    assert torch.equal(weights(t), before)


@pytest.mark.parametrize("optimizer", ELEMENTWISE, ids=lambda optimizer: optimizer.__name__)
def test_one_optimizer_of_stacked_nodes_is_one_a_node(optimizer: Any) -> None:
    runs = [
        run(trainer(Schedule.fixed(5, 0.5), optimizer=lambda p: optimizer(p, lr=0.02), engine=e), 5)
        for e in ("batched", "loop")
    ]
    torch.testing.assert_close(weights(runs[0]), weights(runs[1]), atol=1e-9, rtol=0)
