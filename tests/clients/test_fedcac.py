"""FedCAC: masks, overlaps, the threshold's line, who collaborates, what is mixed, and what is sent."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from cograd import data
from cograd.clients import FedCAC, critical_mask, mask_overlap
from cograd.clients.baselines import FedAvg, LocalOnly
from cograd.clients.fedcac import Collaboration, collaboration
from cograd.core.codecs import Float16
from cograd.core.streams import stream
from cograd.data.clients import ClientData
from cograd.engines.federated import ClientError, Cyclic, LocalSGD, Simulation
from cograd.engines.federated.protocol import Content, Session, State, mean_of, sizes_of
from cograd.engines.federated.workers import BUFFERS

LOCAL = LocalSGD(lr=0.1, epochs=1, batch_size=8)
P = 12 * 8 + 8 + 8 * 3 + 3


def net(**layers: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    middle = list(layers.values())
    return nn.Sequential(nn.Linear(12, 8), *middle, nn.ReLU(), nn.Linear(8, 3))


def some(client: int, n: int = 20, labels: int = 3) -> ClientData:
    draws = stream(7, "fedcac data", client)
    x, y = draws.normal(n, 12), torch.arange(n) % labels
    return ClientData(x, y, x[:6], y[:6])


FOUR = [some(client) for client in range(4)]
SKEWED = [some(client, 10 + 5 * client) for client in range(4)]


@dataclass
class Watched(FedCAC):
    """Keeps what went through the server."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.seen: list[tuple[dict[int, Content], Tensor, Tensor, Collaboration]] = []

    def collaborate(self, masks: Tensor, t: int) -> Collaboration:
        self.last = super().collaborate(masks, t)
        return self.last

    def close(self, server: State, replies: Mapping[int, Content], session: Session) -> None:
        first = "mixed" not in server
        super().close(server, replies, session)
        if first:
            self.seen.append((dict(replies), server["x"], server["mixed"], self.last))


def simulated(method: Any, clients: Any = FOUR, rounds: int = 3, **options: Any) -> Simulation:
    sim = Simulation(method, net(), nn.functional.cross_entropy, clients, **options)
    sim.run(rounds)
    return sim


def own(sim: Simulation) -> list[Tensor]:
    return [sim.method.personal(sim.server, sim.states[client], client) for client in range(len(sim.clients))]


# Masks


def moved(*changes: list[float]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Models whose entries end at 1, so that scores are the changes' magnitudes."""
    after = {str(i): torch.ones(len(change)) for i, change in enumerate(changes)}
    before = {str(i): torch.ones(len(change)) - torch.tensor(change) for i, change in enumerate(changes)}
    return before, after


def test_the_largest_scores_of_every_tensor_are_critical() -> None:
    before, after = moved([0.1, -0.4, 0.3, 0.2], [5.0, 1.0, -9.0])
    masks = critical_mask(before, after, tau=0.5)
    assert masks["0"].tolist() == [False, True, True, False]
    assert masks["1"].tolist() == [False, False, True]  # floor(0.5 * 3) = 1


def test_the_score_takes_the_value_after_training() -> None:
    before, after = {"w": torch.tensor([4.0, 1.0])}, {"w": torch.tensor([0.5, 3.0])}
    assert critical_mask(before, after, 0.5)["w"].tolist() == [False, True]  # 1.75 < 6, but 14 > 2 with the old


def test_ties_with_the_last_critical_score_are_critical() -> None:
    masks = critical_mask(*moved([0.5, 0.25, -0.25, 0.25]), tau=0.5)
    assert masks["0"].tolist() == [True, True, True, True]


def test_masks_of_modules_own_parameters() -> None:
    one, other = nn.Linear(4, 3), nn.Linear(4, 3)
    masks = critical_mask(dict(one.named_parameters()), dict(other.named_parameters()), tau=0.5)
    assert {name: int(mask.sum()) for name, mask in masks.items()} == {"weight": 6, "bias": 1}


def test_no_entry_of_a_scalar_is_critical_below_one_and_all_are_at_one() -> None:
    before, after = moved([1.0], [1.0, 2.0])
    assert not critical_mask(before, after, 0.99)["0"].any()
    assert all(mask.all() for mask in critical_mask(before, after, 1.0).values())
    assert not any(mask.any() for mask in critical_mask(before, after, 0.0).values())


def test_of_a_mostly_dead_tensor_everything_that_moved_is_critical() -> None:
    masks = critical_mask(*moved([0.0, 0.0, 0.5, 0.0], [0.0, 0.0]), tau=0.5)
    assert masks["0"].tolist() == [False, False, True, False]
    assert masks["1"].tolist() == [False, False]  # nothing moved: nothing is critical
    assert all(mask.all() for mask in critical_mask(*moved([0.0, 0.5], [0.0]), tau=1.0).values())


@given(st.integers(0, 2**32), st.floats(0, 1))
@settings(max_examples=25, deadline=None)
def test_a_mask_of_distinct_scores_holds_the_floor_of_tau_of_each_tensor(seed: int, tau: float) -> None:
    draws = stream(seed, "scores")
    sizes = (60, 7, 1)
    changes = [(draws.permutation(n) + 1.0) / 64 for n in sizes]
    masks = critical_mask(*moved(*[c.tolist() for c in changes]), tau=tau)
    assert [int(m.sum()) for m in masks.values()] == [int(tau * n) for n in sizes]
    for change, mask in zip(changes, masks.values(), strict=True):
        if mask.any() and not mask.all():
            assert change[mask].min() > change[~mask].max()


def test_the_learning_rate_does_not_change_a_mask() -> None:
    draws = stream(3, "rates")
    after, change = draws.normal(40), draws.normal(40)
    masks = [critical_mask({"w": after - rate * change}, {"w": after}, 0.4)["w"] for rate in (0.25, 0.5)]
    assert torch.equal(*masks)


# Overlap and threshold


def test_overlap_of_equal_masks_is_the_share_of_common_entries() -> None:
    draws = stream(0, "masks")
    masks = torch.zeros(5, 200, dtype=torch.bool)
    for row in masks:
        row[draws.choice(200, 60)] = True
    overlap = mask_overlap(masks)
    common = (masks[:, None] & masks[None]).sum(2)
    assert torch.equal(overlap, overlap.T)
    assert torch.allclose(overlap, common.double() / 60, atol=1e-12, rtol=0)
    assert torch.equal(overlap.diagonal(), torch.ones(5).double())


def test_overlap_of_random_masks_is_tau_on_average() -> None:
    tau, draws = 0.3, stream(1, "masks")
    masks = torch.zeros(12, 4000, dtype=torch.bool)
    for row in masks:
        row[draws.choice(4000, int(tau * 4000))] = True
    apart = mask_overlap(masks)[~torch.eye(12, dtype=torch.bool)]
    assert abs(float(apart.mean()) - tau) < 0.005


def test_overlap_of_unequal_masks_is_not_symmetric_and_an_empty_one_has_none() -> None:
    masks = [{"w": torch.tensor(bits)} for bits in ([True, True, False], [True, False, False], [False] * 3)]
    assert mask_overlap(masks).tolist() == [[1.0, 0.75, 0.5], [0.5, 1.0, 0.5], [0.0, 0.0, 1.0]]


def random_masks(n: int = 6) -> Tensor:
    return stream(n, "random masks").uniform(n, 500) < 0.4


def test_the_threshold_is_a_line_from_near_the_mean_to_the_maximum() -> None:
    masks = random_masks()
    apart = mask_overlap(masks)[~torch.eye(6, dtype=torch.bool)]
    mean, most = float(apart.mean()), float(apart.max())
    for t in (1, 4, 10, 11):
        expected = mean + t / 10 * (most - mean)
        assert collaboration(masks, t, 10).threshold == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("beta", [1, 7, 10])
def test_at_beta_only_the_most_similar_collaborate_and_after_it_nobody(beta: int) -> None:
    masks = random_masks()
    overlap = mask_overlap(masks).fill_diagonal_(0)
    alone = torch.eye(6, dtype=torch.bool)
    assert torch.equal(collaboration(masks, beta, beta).together, (overlap == overlap.max()) | alone)
    for t in (beta + 1, beta + 2, 10 * beta):
        assert torch.equal(collaboration(masks, t, beta).together, alone)


def test_partners_are_those_at_or_above_the_threshold() -> None:
    masks = random_masks(9)
    for t in range(1, 20):
        found = collaboration(masks, t, 20)
        apart = (found.overlap - found.threshold).abs() > 1e-9
        assert torch.equal(found.together[apart], (found.overlap >= found.threshold)[apart])


def test_pairs_that_overlap_equally_stay_together_for_ever() -> None:
    masks = torch.zeros(7, 49, dtype=torch.bool)
    for i, row in enumerate(masks):  # any two share entry 0 and nothing else, of 3: an overlap of 1/3
        row[[0, 1 + 2 * i, 2 + 2 * i]] = True
    for t in (1, 3, 1000):
        assert collaboration(masks, t, 3).together.all()


# Rounds


def test_what_a_client_gets_is_its_partners_mean_where_critical_and_the_global_mean_elsewhere() -> None:
    method = Watched(LOCAL, tau=0.5, beta=6)
    sim = simulated(method, SKEWED)
    assert len(method.seen) == 3
    for replies, shared, mixed, found in method.seen:
        assert torch.equal(shared, mean_of(replies, "w", {c: float(len(SKEWED[c])) for c in replies}))
        for client, reply in replies.items():
            partners = {j: replies[j] for j in replies if found.together[client, j]}
            assert torch.equal(mixed[client][~reply["mask"]], shared[~reply["mask"]])
            assert torch.equal(mixed[client][reply["mask"]], mean_of(partners, "w")[reply["mask"]])
    assert all(torch.equal(w, row) for w, row in zip(own(sim), method.seen[-1][2], strict=True))
    together = method.seen[-1][3].together
    assert method.collaborators(sim.server) == {
        i: [j for j in range(4) if together[i, j] and j != i] for i in range(4)
    }
    assert 0 < len([j for partners in method.collaborators(sim.server).values() for j in partners]) < 12


def test_the_mask_of_a_round_is_that_of_its_change() -> None:
    method = Watched(LOCAL, tau=0.5)
    space = simulated(method, rounds=2).session.space
    (_, _, received, _), (replies, _, _, _) = method.seen
    for client, reply in replies.items():
        masks = critical_mask(space.views(received[client]), space.views(reply["w"]), 0.5)
        assert torch.equal(reply["mask"], torch.cat([mask.reshape(-1) for mask in masks.values()]))


def test_the_clients_of_a_hidden_group_find_each_other() -> None:
    @dataclass(frozen=True)
    class InOrder(LocalSGD):
        """The same minibatches for clients with the same examples."""

        def batches(self, ctx: Any, data: ClientData) -> Iterator[tuple[Tensor, Tensor]]:
            yield from zip(data.x.split(5), data.y.split(5), strict=True)

    groups = [0, 1, 0, 1, 1, 0]
    method = Watched(InOrder(lr=0.1), tau=0.5, beta=1000)
    sim = simulated(method, [some(group) for group in groups], rounds=1)
    same = torch.tensor(groups)[:, None] == torch.tensor(groups)
    replies, _, mixed, found = method.seen[0]
    assert torch.equal(found.overlap == 1, same)
    assert torch.equal(found.together, same)
    for i, j in ((0, 2), (0, 5), (1, 3), (1, 4)):
        assert torch.equal(replies[i]["mask"], replies[j]["mask"])
        assert torch.equal(mixed[i], mixed[j])
    both = replies[0]["mask"] & replies[1]["mask"]
    assert both.any()
    assert not (mixed[0] == mixed[1])[both].any()
    assert sim.history[0].reports["collaborators"] == 2


def test_with_everything_critical_it_is_fedavg_with_equal_weights_for_ever() -> None:
    everything = simulated(FedCAC(LOCAL, tau=1.0, beta=2), SKEWED, rounds=5)
    average = simulated(FedAvg(LOCAL, weighted=False), SKEWED, rounds=5)
    for w in own(everything):
        assert torch.equal(w, own(everything)[0])
        assert torch.allclose(w, average.server["x"], atol=1e-6, rtol=0)
    assert everything.history[-1].reports["collaborators"] == 3


def test_with_everything_critical_a_round_is_the_mean_to_1e_7() -> None:
    method = Watched(LOCAL, tau=1.0, beta=2)
    simulated(method, rounds=4)
    for replies, shared, mixed, _ in method.seen:  # equal sizes: the global mean is the mean of all partners
        mean = torch.stack([reply["w"].double() for reply in replies.values()]).mean(0)
        assert (mixed.double() - mean).abs().max() <= 1e-7
        assert (mixed - shared).abs().max() <= 1e-7


def test_with_nothing_critical_it_is_fedavg() -> None:
    nothing = simulated(FedCAC(LOCAL, tau=0.0, beta=2), SKEWED, rounds=4)
    average = simulated(FedAvg(LOCAL), SKEWED, rounds=4)
    for w in own(nothing):
        assert torch.equal(w, nothing.server["x"])
        assert torch.allclose(w, average.server["x"], atol=1e-6, rtol=0)
    assert nothing.history[-1].reports["collaborators"] == 0


def test_beta_1_leaves_everybody_alone_from_the_second_round_on() -> None:
    sim = simulated(FedCAC(LOCAL, beta=1), rounds=3)
    partners = [row.reports["collaborators"] for row in sim.history]
    assert 0 < partners[0] <= 1
    assert partners[1:] == [0, 0]


def test_alone_the_critical_entries_are_local_and_the_others_global() -> None:
    method = Watched(LOCAL, beta=1)
    simulated(method, rounds=3)
    replies, shared, mixed, _ = method.seen[-1]
    for client, reply in replies.items():
        assert torch.equal(mixed[client], torch.where(reply["mask"], reply["w"], shared))


# Bytes, participation, engine


def test_a_round_costs_4p_and_a_bit_an_entry_up_and_4p_down_each() -> None:
    sim = simulated(FedCAC(LOCAL), rounds=3)
    assert P % 8  # the last byte is not full
    for row in sim.history:
        assert row.up == row.round * 4 * (4 * P + (P + 7) // 8)
        assert row.down == row.round * 4 * 4 * P
    assert sum(entry.payload for entry in sim.ledger) == sim.history[-1].up + sim.history[-1].down


def test_before_and_after_aggregation_and_the_worst_are_measured() -> None:
    sim = simulated(FedCAC(LOCAL), personal=True, rounds=2)
    method = Watched(LOCAL)
    simulated(method, rounds=2)
    replies, _, mixed, _ = method.seen[-1]
    trained = [sim.local.correct(replies[c]["w"], FOUR[c].test_x, FOUR[c].test_y) / 6 for c in range(4)]
    after = sorted(sim.local.correct(mixed[c], FOUR[c].test_x, FOUR[c].test_y) / 6 for c in range(4))
    row = sim.history[-1]
    assert row.before == pytest.approx(sum(trained) / 4)
    assert row.personal == pytest.approx(sum(after) / 4)
    assert row.worst == pytest.approx(after[0])


def test_a_client_that_sleeps_keeps_its_model_and_a_newcomer_starts_from_the_global_one() -> None:
    method = Watched(LocalSGD(lr=0.1, batch_size=20), tau=0.5)
    sim = simulated(method, rounds=1, sampler=Cyclic(count=2))
    first, start = own(sim)[0], sim.server["x"]
    assert torch.equal(own(sim)[3], start)
    sim.run(2)
    assert torch.equal(own(sim)[0], first)
    replies, shared, _, _ = method.seen[1]
    assert list(replies) == [2, 3]
    assert torch.equal(shared, mean_of(replies, "w", sizes_of(replies, sim.session)))
    gradient = sim.local.gradient(start, FOUR[2].x, FOUR[2].y)
    assert torch.allclose(replies[2]["w"], start - 0.1 * gradient, atol=1e-6)
    assert sim.history[-1].down == (2 + 2 + 2) * 4 * P  # two models, and g for two newcomers


def test_a_single_participant_is_alone() -> None:
    local = simulated(LocalOnly(LOCAL), rounds=4, sampler=Cyclic(count=1))
    sim = simulated(FedCAC(LOCAL), rounds=1, sampler=Cyclic(count=1))
    assert torch.allclose(own(sim)[0], own(local)[0], atol=1e-7, rtol=1e-6)
    assert sim.history[0].reports["collaborators"] == 0


def test_a_client_that_answered_too_late_goes_on_from_its_own_model() -> None:
    def time(client: int, answers: int) -> float:
        return 9.0 if client == 0 and answers == 0 else 0.1

    method = Watched(LOCAL)
    simulated(method, rounds=2, response_time=time, timeout=1.0)
    assert [list(replies) for replies, _, _, _ in method.seen] == [[1, 2, 3], [0, 1, 2, 3]]
    assert torch.equal(method.seen[1][0][0]["w"], own(simulated(LocalOnly(LOCAL), rounds=2))[0])


@pytest.mark.parametrize("stop", [1, 2])
def test_a_resumed_run_is_bit_for_bit_the_same(tmp_path: Path, stop: int) -> None:
    whole = simulated(FedCAC(LOCAL, beta=5), rounds=4)
    stopped = Simulation(FedCAC(LOCAL, beta=5), net(), nn.functional.cross_entropy, FOUR)
    stopped.run(stop, checkpoint=tmp_path / "run")
    resumed = Simulation(FedCAC(LOCAL, beta=5), net(), nn.functional.cross_entropy, FOUR)
    resumed.run(4, checkpoint=tmp_path / "run")
    assert all(torch.equal(a, b) for a, b in zip(own(whole), own(resumed), strict=True))
    assert [row.reports for row in whole.history] == [row.reports for row in resumed.history]
    assert torch.equal(whole.server["overlap"], resumed.server["overlap"])


def test_the_number_of_workers_changes_nothing() -> None:
    with simulated(FedCAC(LOCAL), rounds=2, workers=2) as two:
        none = simulated(FedCAC(LOCAL), rounds=2)
        assert all(torch.equal(a, b) for a, b in zip(own(two), own(none), strict=True))


def test_models_may_travel_in_half_precision() -> None:
    sim = simulated(FedCAC(LOCAL), rounds=2, up=Float16(), down=Float16())
    assert sim.history[-1].up == 2 * 4 * (2 * P + (P + 7) // 8)
    full = simulated(FedCAC(LOCAL), rounds=2)
    assert all(torch.allclose(a, b, atol=5e-3) for a, b in zip(own(sim), own(full), strict=True))


def test_statistics_of_batch_normalisation_stay_with_their_client() -> None:
    def run(method: Any) -> Simulation:
        model = net(norm=nn.BatchNorm1d(8))
        sim = Simulation(method, model, nn.functional.cross_entropy, FOUR, buffers="local", personal=True)
        sim.run(2)
        return sim

    sim, average = run(FedCAC(LOCAL, tau=0.0)), run(FedAvg(LOCAL))
    assert sim.local.space.numel == P + 16
    kept = [sim.states[client][BUFFERS] for client in range(4)]
    assert len({tuple(buffers.tolist()) for buffers in kept}) == 4
    for client in range(4):  # aggregation has not touched them: they are what FedAvg's clients have
        assert torch.allclose(kept[client], average.states[client][BUFFERS], atol=1e-6)
        assert torch.allclose(own(sim)[client], average.server["x"], atol=1e-6)


# Bad input


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        ({"tau": 1.5}, ValueError, r"tau must be in \[0, 1\]; got 1.5"),
        ({"tau": -0.1}, ValueError, "tau must be"),
        ({"tau": float("nan")}, ValueError, "tau must be"),
        ({"beta": 0}, ValueError, "beta must be >= 1; got 0"),
        ({"beta": 2.5}, TypeError, "beta must be an int; got 2.5"),
    ],
)
def test_settings_out_of_range_are_refused(
    settings: dict[str, Any], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        FedCAC(LOCAL, **settings)


def test_a_single_client_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 clients; got 1"):
        simulated(FedCAC(LOCAL), FOUR[:1])


def test_other_parameter_lists_are_refused() -> None:
    one, other = {"w": torch.ones(2)}, {"v": torch.ones(2)}
    for before, after in ((one, other), (one, {**one, **other}), ({}, {})):
        with pytest.raises(ValueError, match="must hold the same tensors"):
            critical_mask(before, after, 0.5)
    with pytest.raises(ValueError, match=r"'w' must have one shape; got \(2,\) and \(3,\)"):
        critical_mask(one, {"w": torch.ones(3)}, 0.5)
    masks = [{"w": torch.ones(2, dtype=torch.bool)}, {"v": torch.ones(2, dtype=torch.bool)}]
    with pytest.raises(ValueError, match="mask 1 holds"):
        mask_overlap(masks)
    for wrong in (masks[:1], [], torch.ones(2, 3), torch.ones(4, dtype=torch.bool)):
        with pytest.raises(ValueError, match="must be boolean and at least 2"):
            mask_overlap(wrong)


def test_scores_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="scores of 'w' must be finite"):
        critical_mask({"w": torch.ones(2)}, {"w": torch.tensor([1.0, float("nan")])}, 0.5)


def test_a_client_whose_training_fails_is_named_or_left_out_and_never_averaged_in() -> None:
    broken = [*FOUR[:3], ClientData(FOUR[3].x * float("inf"), FOUR[3].y, FOUR[3].test_x, FOUR[3].test_y)]
    with pytest.raises(ClientError, match="client 3 to 'train' in round 0 holds NaN"):
        simulated(FedCAC(LOCAL), broken)
    method = Watched(LOCAL)
    sim = simulated(method, broken, rounds=2, nonfinite="exclude")
    assert all(list(row.lost) == [3] for row in sim.history)
    assert all(list(replies) == [0, 1, 2] for replies, _, _, _ in method.seen)
    assert torch.isfinite(sim.server["x"]).all()


def test_it_is_better_than_fedavg_where_clients_hold_two_labels_each() -> None:
    whole = data.load("mnist-5k")
    assert isinstance(whole, data.Images)
    x = nn.functional.avg_pool2d(whole.x, 2)
    parts = data.shards(whole.y, 8, 2, seed=0).parts
    clients = [ClientData(x[p[::10]], whole.y[p[::10]], x[p[1::10]], whole.y[p[1::10]]) for p in parts]
    local = LocalSGD(lr=0.2, epochs=2, batch_size=10)
    scores = []
    for method in (FedCAC(local, beta=10), FedAvg(local)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(196, 16), nn.ReLU(), nn.Linear(16, 10))
        sim = Simulation(method, model, nn.functional.cross_entropy, clients, personal=True)
        scores.append(sim.run(4)[-1].personal or 0.0)
    assert scores[0] > scores[1] + 0.05
