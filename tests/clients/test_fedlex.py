"""FedLEx: what explorers measure, what the server makes of it, and what clients do with it."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from cograd.clients import FedCAC, FedFix, FedLEx, FedSpeed, LocalAdam, guidance_matrix, squared_travel
from cograd.clients.baselines import (
    FedAdam,
    FedAvg,
    FedPer,
    MeanGuided,
    PermutedGuidance,
    Scaffold,
    WarmStart,
)
from cograd.core.codecs import RandomK
from cograd.core.space import ParamSpace
from cograd.core.streams import stream
from cograd.data.clients import ClientData
from cograd.engines.federated import Cyclic, Everyone, LocalModel, LocalSGD, Simulation, Uniform
from cograd.engines.federated.protocol import ClientContext
from cograd.models.mlp import MLP

LOCAL = LocalSGD(lr=0.1, epochs=2, batch_size=4)
EXPLORER = LocalSGD(lr=0.1, epochs=3, batch_size=4)
N, P = 6, 5 * 8 + 8 + 8 * 2 + 2
MATRIX = stream(0, "guidance").uniform(P)


def clients(n: int = N, dtype: torch.dtype = torch.float32) -> list[ClientData]:
    found = []
    for client in range(n):
        x = (stream(3, "x", client).normal(12, 5) + client / 3).to(dtype)
        found.append(ClientData(x, (x.sum(1) > client).long(), x[:0], torch.zeros(0, dtype=torch.long)))
    return found


def net(dtype: torch.dtype = torch.float32) -> MLP:
    torch.manual_seed(1)
    return MLP(5, 8, 2).to(dtype)


def run(method: Any, rounds: int = 3, dtype: torch.dtype = torch.float32, **options: Any) -> Simulation:
    given = {"sampler": Uniform(0.5), **options}
    sim = Simulation(method, net(dtype), nn.functional.cross_entropy, clients(dtype=dtype), **given)
    sim.run(rounds)
    return sim


def context(model: LocalModel, client: int = 0) -> ClientContext:
    return ClientContext(client, 0, 0, [12] * N, model, model.theta.clone())


def local(dtype: torch.dtype = torch.float32) -> LocalModel:
    return LocalModel(net(dtype), nn.functional.cross_entropy)


def trained(how: LocalSGD, client: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Where a client gets from the initial model in round 0."""
    ctx = context(local(dtype), client)
    return how.run(ctx, clients(dtype=dtype)[client], ctx.initial).clone()


@lru_cache
def travelled(client: int, how: LocalSGD = EXPLORER) -> Tensor:
    return (local().theta - trained(how, client)).square()


# What the matrix is.

ONE = ({"w": torch.tensor([0.0, 1.0, 4.0])}, {"w": torch.tensor([0.0, 9.0, 0.0])})


def test_the_two_published_orders_by_hand() -> None:
    assert guidance_matrix(ONE)["w"].tolist() == [0, 0.625, 0.5]
    after = guidance_matrix(ONE, normalize="after_mean")["w"]
    assert after.tolist() == [0, 1, pytest.approx(0.4)]


def test_tensors_are_normalised_by_themselves_or_with_the_whole_model() -> None:
    maps = [{"a": torch.tensor([[1.0], [3.0]]), "b": torch.tensor([5.0, 9.0])}]
    one = guidance_matrix(maps)
    assert [one["a"].tolist(), one["b"].tolist()] == [[[0], [1]], [0, 1]]
    whole = guidance_matrix(maps, scope="global")
    assert [whole["a"].tolist(), whole["b"].tolist()] == [[[0], [0.25]], [0.5, 1]]


def test_where_nothing_differs_nothing_is_held_back() -> None:
    maps = [{"scale": torch.tensor([7.0]), "still": torch.zeros(3), "empty": torch.zeros(0)}]
    for scale in ("minmax", "robust"):
        found = guidance_matrix(maps, scale=scale)
        assert [found[name].tolist() for name in maps[0]] == [[1], [1, 1, 1], []]


def test_the_robust_scale_is_cut_off_at_zero_and_one() -> None:
    travel = stream(0, "travel").normal(101).square()
    low, middle, high = np.quantile(travel.numpy(), [0.25, 0.5, 0.75])
    expected = ((travel - middle) / (high - low)).clamp(0, 1)
    found = guidance_matrix([{"w": travel}], scale="robust")["w"]
    assert torch.allclose(found, expected, atol=1e-6)
    assert int((found == 0).sum()) == 51


@given(
    st.lists(st.lists(st.floats(0, 100, width=32), min_size=4, max_size=4), min_size=1, max_size=4),
    st.integers(-20, 20),
    st.sampled_from(("per_client", "after_mean")),
    st.sampled_from(("minmax", "robust")),
    st.sampled_from(("tensor", "global")),
)
def test_it_lies_in_zero_to_one_and_knows_no_unit(values, power, normalize, scale, scope) -> None:
    """Multiplied by a power of two, which rounds nothing unless it underflows."""
    maps = [{"a": torch.tensor(v[:3]), "b": torch.tensor(v[3:])} for v in values]
    maps = [{name: t * (t > 1e-20) for name, t in one.items()} for one in maps]
    rules = {"normalize": normalize, "scale": scale, "scope": scope}
    found = guidance_matrix(maps, **rules)
    assert all(bool((g >= 0).all()) and bool((g <= 1).all()) for g in found.values())
    larger = guidance_matrix([{name: t * 2.0**power for name, t in one.items()} for one in maps], **rules)
    assert all(torch.equal(found[name], larger[name]) for name in found)


def test_travel_is_the_squared_distance() -> None:
    found = squared_travel({"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([0.5, 4.0])})
    assert found["w"].tolist() == [0.25, 4]


def test_maps_that_make_no_matrix_are_refused() -> None:
    for maps, change, message in (
        ([], {}, "maps must hold at least one explorer's; got none"),
        ([{"w": torch.tensor([1.0, math.nan])}], {}, "maps must be finite; that of explorer 0"),
        ([ONE[0], {"v": torch.zeros(3)}], {}, "tensor 'w' is missing"),
        ([ONE[0], {"w": torch.zeros(2)}], {}, r"'w' must have shape \(3,\); got \(2,\)"),
        (ONE, {"normalize": "mean"}, "normalize must be one of per_client, after_mean; got 'mean'"),
        (ONE, {"scale": "max"}, "scale must be one of minmax, robust; got 'max'"),
        (ONE, {"scope": "layer"}, "scope must be one of tensor, global; got 'layer'"),
    ):
        with pytest.raises(ValueError, match=message):
            guidance_matrix(maps, **change)
    with pytest.raises(ValueError, match="before and after must hold the same tensors"):
        squared_travel({}, {})
    with pytest.raises(ValueError, match=r"'w' must have one shape; got \(1,\) and \(2,\)"):
        squared_travel({"w": torch.zeros(1)}, {"w": torch.zeros(2)})


# Exploration.


def explored(method: FedLEx, **options: Any) -> Simulation:
    """Up to the end of the first round."""
    return run(method, 1, **options)


def test_maps_are_the_clients_own_and_the_model_stays_where_it_was() -> None:
    """In a round whose steps move nothing."""
    still = FedAvg(replace(LOCAL, lr=1e-30))
    sim = explored(FedLEx(still, EXPLORER, normalize="after_mean", refresh=True))
    assert torch.equal(sim.server["maps"], torch.stack([travelled(client) for client in range(N)]))
    assert len({tuple(row.tolist()) for row in sim.server["maps"]}) == N
    assert torch.equal(sim.server["x"], net_vector())


def net_vector() -> Tensor:
    return local().theta.clone()


@pytest.mark.parametrize("normalize", ["per_client", "after_mean"])
@pytest.mark.parametrize("scale", ["minmax", "robust"])
@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_the_server_makes_what_the_function_makes(normalize: str, scale: str, scope: str) -> None:
    rules = {"normalize": normalize, "scale": scale, "scope": scope}
    sim = explored(FedLEx(FedAvg(LOCAL), EXPLORER, **rules))
    space = sim.session.space
    expected = guidance_matrix([space.views(travelled(client)) for client in range(N)], **rules)
    assert torch.allclose(sim.server["guidance"], space.flatten(expected), atol=1e-6)
    assert sim.history[0].reports["mean guidance"] == pytest.approx(float(sim.server["guidance"].mean()))
    assert sim.history[0].reports["frozen"] == float((sim.server["guidance"] == 0).float().mean())


def test_two_explorers_by_hand_through_the_server() -> None:
    for normalize, expected in (("per_client", [0, 0.625, 0.5]), ("after_mean", [0, 1, 0.4])):
        method = FedLEx(FedAvg(LOCAL), EXPLORER, normalize=normalize)
        model = nn.Module()
        model.w = nn.Parameter(torch.zeros(3))
        sim = Simulation(method, model, nn.functional.cross_entropy, clients(2))
        maps = [one["w"] for one in ONE]
        if normalize == "per_client":  # which is done where the map is
            maps = [guidance_matrix([one])["w"] for one in ONE]
        method.close(sim.server, dict(enumerate({"map": travel} for travel in maps)), sim.session)
        assert sim.server["guidance"].tolist() == pytest.approx(expected)


def test_a_fraction_explores_whoever_takes_part_in_the_rounds() -> None:
    sim = explored(FedLEx(FedAvg(LOCAL), EXPLORER, fraction=0.5, normalize="after_mean"))
    chosen = sim.method.explorers(sim.session)
    assert len(chosen) == 3
    assert chosen == sorted(set(chosen))
    expected = guidance_matrix(
        [sim.session.space.views(travelled(client)) for client in chosen], normalize="after_mean"
    )
    assert torch.allclose(sim.server["guidance"], sim.session.space.flatten(expected), atol=1e-6)
    others = {tuple(run(FedLEx(FedAvg(LOCAL), EXPLORER, fraction=0.5), 0, seed=s).method.explorers(
        run(FedAvg(LOCAL), 0, seed=s).session)) for s in range(5)}  # fmt: skip
    assert len(others) > 1


def test_who_explores_longest_stops_when_its_loss_no_longer_falls() -> None:
    """Against a loop that knows nothing of the library's training: epoch means, and the best so far."""
    how = LocalSGD(lr=1.5, epochs=40, batch_size=4)
    data, method = clients()[2], FedLEx(FedAvg(LOCAL), how, patience=2, normalize="after_mean")
    ctx = context(local(), 2)
    _, reply = method.explore({}, {"x": ctx.initial}, data, ctx)
    model, best, idle, epochs = net(), math.inf, 0, 0
    v = flat(model)
    while idle < 2 and epochs < 40:
        total = 0.0
        for rows in stream(0, "client", 2, 0, "batches", epochs).permutation(12).split(4):
            loss, g = gradient(model, v, data, rows)
            total += 4 * loss
            v = v - 1.5 * g
        epochs += 1
        idle = 0 if total / 12 < best else idle + 1
        best = min(best, total / 12)
    assert 2 < epochs < 40
    assert ctx.reports == {"exploration epochs": epochs}
    assert ctx.work == {"grad": 3 * epochs}
    assert torch.allclose(reply["map"], (flat(net()) - v).square(), atol=1e-5)


@pytest.mark.parametrize("how", [EXPLORER, LocalAdam(lr=0.01, epochs=3, batch_size=4)])
def test_without_patience_it_takes_all_its_epochs(how: LocalSGD) -> None:
    ctx = context(local())
    _, reply = FedLEx(FedAvg(LOCAL), how, normalize="after_mean").explore(
        {}, {"x": ctx.initial}, clients()[0], ctx
    )
    assert ctx.work == {"grad": 9}
    assert ctx.trained is None
    assert torch.equal(reply["map"], travelled(0, how))


class Bursting(LocalSGD):
    """Training that diverges on clients whose data say so."""

    def run(self, ctx, data, start, gradient=None):
        if ctx.client in (1, 4) or self.lr > 1:
            gradient = lambda v, x, y: torch.full_like(v, math.inf)  # noqa: E731
        return super().run(ctx, data, start, gradient)


def test_an_explorer_that_diverges_is_left_out_with_a_warning() -> None:
    method = FedLEx(FedAvg(LOCAL), Bursting(0.1, 3, 4), normalize="after_mean", refresh=True)
    with pytest.warns(RuntimeWarning, match=r"the exploration of clients \[1, 4\] diverged; they are left out"):
        sim = explored(method)
    assert sim.server["explorers"].tolist() == [0, 2, 3, 5]
    assert bool(sim.server["guidance"].isfinite().all())
    with pytest.raises(RuntimeError, match="the exploration of every explorer diverged"):
        run(FedLEx(FedAvg(LOCAL), Bursting(2.0, 3, 4)), 1)


def test_a_loss_that_overflows_ends_an_exploration() -> None:
    ctx = context(local())
    data = replace(clients()[0], x=clients()[0].x * 1e20)
    _, reply = FedLEx(FedAvg(LOCAL), LocalSGD(1e20, 50, 4)).explore({}, {"x": ctx.initial}, data, ctx)
    assert reply == {}
    assert ctx.work["grad"] < 150


# Guided rounds.

BASES = {
    "fedavg": FedAvg(LOCAL, momentum=0.9),
    "fedadam": FedAdam(replace(LOCAL, momentum=0.9, weight_decay=0.01, max_norm=0.5)),
    "scaffold": Scaffold(LOCAL),
    "fedspeed": FedSpeed(LOCAL),
    "fedper": FedPer(LOCAL),
    "fedcac": FedCAC(LOCAL),
}


WHOLE = [name for name in BASES if name not in ("fedper", "fedcac")]
"""Those that send a change of the whole model."""


@pytest.mark.parametrize(
    ("name", "form"), [(name, "gradient") for name in BASES] + [(name, "update") for name in WHOLE]
)
def test_with_ones_it_is_the_base_bit_for_bit(name: str, form: str) -> None:
    base = BASES[name]
    plain, guided = run(base), run(FedLEx(base, guidance=torch.ones(P), apply_to=form))
    assert torch.equal(plain.server["x"], guided.server["x"])
    assert plain.tally.work == guided.tally.work
    assert plain.tally.up == guided.tally.up
    for client in plain.states:
        mine = guided.states[client]
        assert all(torch.equal(value, mine[key]) for key, value in plain.states[client].items())
        assert torch.equal(
            plain.method.personal(plain.server, plain.states[client], client),
            guided.method.personal(guided.server, mine, client),
        )


@pytest.mark.parametrize("form", ["gradient", "update"])
@pytest.mark.parametrize("name", ["1.weight", "1.bias", "3.weight", "3.bias"])
def test_a_tensor_whose_guidance_is_zero_never_changes(form: str, name: str) -> None:
    guidance = {n: torch.ones_like(p) for n, p in net().named_parameters()}
    guidance[name].zero_()
    sim = run(FedLEx(FedAvg(LOCAL, momentum=0.5), guidance=guidance, apply_to=form), 5)
    start, end = (sim.session.space.views(v) for v in (sim.session.initial, sim.server["x"]))
    assert {n for n in start if torch.equal(start[n], end[n])} == {name}


def test_on_gradients_it_is_a_learning_rate_for_each_entry() -> None:
    one = LocalSGD(lr=0.3, steps=1, batch_size=12)
    sim = run(FedLEx(FedAvg(one), guidance=MATRIX), 1, sampler=Cyclic(count=1))
    model = net()
    _, g = gradient(model, flat(model), clients()[0], torch.arange(12))
    assert torch.allclose(sim.server["x"], flat(net()) - 0.3 * MATRIX * g, atol=1e-6)


def test_both_forms_are_one_for_a_single_step_and_differ_for_two() -> None:
    for steps, alike in ((1, True), (2, False)):
        ends = [
            run(FedLEx(FedAvg(LocalSGD(0.3, steps=steps, batch_size=12)), guidance=MATRIX, apply_to=form))
            for form in ("gradient", "update")
        ]
        assert torch.allclose(ends[0].server["x"], ends[1].server["x"], atol=1e-6) == alike


def test_all_of_the_gradient_form_is_the_cards_loop() -> None:
    """Guidance before the clip, weight decay after it, momentum last; FedAvg's momentum at the server."""
    how = LocalSGD(0.2, 2, 4, momentum=0.5, weight_decay=0.01, max_norm=0.3, decay=0.9)
    sim = run(FedLEx(FedAvg(how, momentum=0.9), guidance=MATRIX), 2, sampler=Everyone())
    model = net()
    w, buffer = flat(model), torch.zeros(P)
    for t in range(2):
        moves = []
        for client, data in enumerate(clients()):
            v, heavy = w, torch.zeros(P)
            for rows in order(client, t):
                g = MATRIX * gradient(model, v, data, rows)[1]
                g = g * min(1.0, 0.3 / (float(g.norm()) + 1e-6)) + 0.01 * v
                heavy = 0.5 * heavy + g
                v = v - 0.2 * 0.9**t * heavy
            moves.append(w - v)
        buffer = 0.9 * buffer + 0.1 * torch.stack(moves).mean(0)
        w = w - buffer
    assert torch.allclose(sim.server["x"], w, atol=1e-5)


def test_on_updates_local_training_is_the_bases() -> None:
    sim = run(FedLEx(FedAvg(LOCAL), guidance=MATRIX, apply_to="update"), 1, sampler=Everyone())
    moves = [trained(LOCAL, client) - net_vector() for client in range(N)]
    assert torch.allclose(sim.server["x"], net_vector() + MATRIX * torch.stack(moves).mean(0), atol=1e-6)


def test_weight_decay_moves_what_is_frozen_on_gradients_and_not_on_updates() -> None:
    how = replace(LOCAL, weight_decay=0.1)
    ends = {
        form: run(FedLEx(FedAvg(how), guidance=torch.zeros(P), apply_to=form), 1).server["x"]
        for form in ("gradient", "update")
    }
    assert torch.equal(ends["update"], net_vector())
    assert torch.allclose(ends["gradient"], net_vector() * (1 - 0.1 * 0.1) ** 6, atol=1e-6)


# Adam.


def test_adam_is_torchs() -> None:
    for decay in (0.0, 0.1):
        how = LocalAdam(lr=0.02, epochs=2, batch_size=4, beta2=0.9, weight_decay=decay)
        model, data = net(torch.float64), clients(dtype=torch.float64)[0]
        theirs = torch.optim.AdamW(model.parameters(), lr=0.02, betas=(0.9, 0.9), weight_decay=decay)
        for rows in order(0):
            theirs.zero_grad()
            nn.functional.cross_entropy(model(data.x[rows]), data.y[rows]).backward()
            theirs.step()
        assert torch.allclose(trained(how, 0, torch.float64), flat(model), atol=1e-12)


def test_adam_counts_its_gradients_and_clips() -> None:
    ctx = context(local())
    LocalAdam(lr=0.01, epochs=2, batch_size=4).run(ctx, clients()[0], ctx.initial)
    assert ctx.work == {"grad": 6}
    clipped = trained(LocalAdam(lr=0.01, eps=1.0, max_norm=1e-3), 0) - net_vector()
    free = trained(LocalAdam(lr=0.01, eps=1.0), 0) - net_vector()
    assert float(clipped.norm()) < 0.1 * float(free.norm())


def test_adam_cancels_guidance_on_gradients_and_not_on_updates() -> None:
    how = LocalAdam(lr=0.01, epochs=2, batch_size=4, eps=1e-100)
    matrix = 0.01 + 0.99 * MATRIX.double()

    def end(method: Any) -> Tensor:
        return run(method, 3, torch.float64).server["x"]

    plain = end(FedAvg(how))
    guided = end(FedLEx(FedAvg(how), guidance=matrix, adaptive="allow"))
    assert float((plain - guided).abs().max()) < 1e-6
    assert float((plain - end(FedLEx(FedAvg(how), guidance=matrix, apply_to="update"))).abs().max()) > 1e-3
    with pytest.raises(
        ValueError, match=r"apply_to must be 'update' with adaptive local training.*got 'gradient'"
    ):
        FedLEx(FedAvg(how), guidance=matrix)


# Refreshing, costs, state.


@pytest.mark.parametrize("normalize", ["per_client", "after_mean"])
def test_a_refresh_is_made_of_the_last_rounds_participants(normalize: str) -> None:
    method = FedLEx(FedAvg(LOCAL), EXPLORER, normalize=normalize, refresh=True)
    sim = run(method, 0, sampler=Cyclic(count=2))
    maps = [sim.session.space.views(travelled(client)) for client in range(N)]
    used = [guidance_matrix(maps, normalize=normalize)]
    for row in sim.rounds(3):
        mine = sim.states[row.participants[0]]["guidance"]
        assert torch.allclose(mine, sim.session.space.flatten(used[-1]), atol=1e-6)
        used.append(guidance_matrix([maps[client] for client in row.participants], normalize=normalize))
        assert row.reports["mean guidance"] == pytest.approx(float(sim.server["guidance"].mean()))
    assert not torch.allclose(sim.server["guidance"], sim.session.space.flatten(used[0]), atol=1e-3)


def test_a_refresh_of_some_explorers_stays_what_it_was() -> None:
    once = run(FedLEx(FedAvg(LOCAL), EXPLORER, fraction=0.5), 4)
    again = run(FedLEx(FedAvg(LOCAL), EXPLORER, fraction=0.5, refresh=True), 4)
    assert torch.equal(once.server["x"], again.server["x"])
    assert once.tally.down == again.tally.down
    assert "maps" not in again.server


def test_bytes_and_gradients_are_as_published() -> None:
    size, plain = 4 * P, run(FedAvg(LOCAL), 4)
    for change, explorers in (({}, 6), ({"fraction": 0.5}, 3), ({"refresh": True}, 6)):
        sim = run(FedLEx(FedAvg(LOCAL), EXPLORER, **change), 4)
        seen = {client for row in sim.history for client in row.participants}
        messages = 4 * 3 if "refresh" in change else len(seen)
        assert 3 < len(seen) <= 6
        assert sim.tally.up - plain.tally.up == explorers * size
        assert sim.tally.down - plain.tally.down == (explorers + messages) * size
        assert sim.tally.work["grad"] - plain.tally.work["grad"] == explorers * 9
        assert sim.history[0].up == explorers * size + 3 * size
        assert [row.participants for row in sim.history] == [row.participants for row in plain.history]
    assert run(FedLEx(FedAvg(LOCAL), guidance=MATRIX), 4).tally.up == plain.tally.up


def test_who_was_lost_gets_its_guidance_with_the_next_message() -> None:
    sim = run(FedLEx(FedAvg(LOCAL), guidance=MATRIX), 0, sampler=Everyone(), nonfinite="exclude")
    broken = clients()[2]
    sim.clients[2] = sim.runner.clients[2] = replace(broken, x=broken.x * math.nan)
    sim.run(1)
    assert list(sim.history[0].lost) == [2]
    assert sim.server["informed"].tolist() == [c != 2 for c in range(N)]
    sim.clients[2] = sim.runner.clients[2] = broken
    sim.run(2)
    assert sim.history[1].down - sim.history[0].down == 4 * P * (N + 1)
    assert torch.equal(sim.states[2]["guidance"], MATRIX)


def test_without_a_refresh_no_map_outlives_the_exploration() -> None:
    sim = run(FedLEx(FedAvg(LOCAL), EXPLORER))
    assert set(sim.server) == {"round", "x", "exchange", "guidance", "informed"}
    assert all(set(sim.states[client]) == {"guidance"} for client in sim.states if sim.states[client])


@pytest.mark.parametrize("refresh", [False, True])
def test_it_resumes_bit_for_bit_and_workers_change_nothing(tmp_path: Path, refresh: bool) -> None:
    method = FedLEx(FedAvg(LOCAL, momentum=0.9), EXPLORER, patience=2, refresh=refresh)
    whole = run(method, 4)
    run(method, 2).save(tmp_path / "saved")
    resumed = run(method, 0)
    resumed.load(tmp_path / "saved")
    resumed.run(4)
    assert torch.equal(whole.server["x"], resumed.server["x"])
    assert whole.history[-1].down == resumed.history[-1].down
    forked = run(method, 4, workers=2)
    forked.close()
    assert torch.equal(whole.server["x"], forked.server["x"])


def test_its_name_tells_one_matrix_from_another(tmp_path: Path) -> None:
    one, other = (FedLEx(FedAvg(LOCAL), guidance=m) for m in (MATRIX, MATRIX / 2))
    assert repr(one) != repr(other)
    assert repr(one) == repr(FedLEx(FedAvg(LOCAL), guidance=MATRIX.clone()))
    assert one == FedLEx(FedAvg(LOCAL), guidance=MATRIX.clone())
    run(one, 1).save(tmp_path / "saved")
    with pytest.raises(ValueError, match="is of another simulation: its method is"):
        run(other, 0).load(tmp_path / "saved")


@pytest.mark.parametrize("direction", ["up", "down"])
def test_a_codec_that_overshoots_cannot_push_guidance_out_of_its_range(direction: str) -> None:
    """Half of the entries, doubled."""
    sim = run(FedLEx(FedAvg(LOCAL), EXPLORER), 1, **{direction: RandomK(0.5, unbiased=True)})
    for client in sim.history[0].participants:
        values = sim.states[client]["guidance"]
        assert float(values.min()) == 0
        assert float(values.max()) == 1
        assert float(sim.server["guidance"].max()) <= 1


def test_batchnorms_statistics_do_not_see_the_exploration() -> None:
    ends = []
    for method in (FedAvg(LOCAL), FedLEx(FedAvg(LOCAL), guidance=torch.ones(40)), None):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
        size = ParamSpace.of(model).numel
        if method is None:  # explores, and is then frozen: the statistics are those of the rounds
            method = Ones(FedAvg(LOCAL), EXPLORER)
        elif isinstance(method, FedLEx):
            method = FedLEx(FedAvg(LOCAL), guidance=torch.ones(size))
        for rule in ("mean", "local"):
            sim = Simulation(method, model, nn.functional.cross_entropy, clients(), buffers=rule)
            sim.run(2)
            ends.append(sim.buffers if rule == "mean" else sim.states[0]["engine.buffers"])
            torch.manual_seed(1)
            model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    for mean, own in zip(ends[2::2], ends[3::2], strict=True):
        assert torch.equal(mean, ends[0])
        assert torch.equal(own, ends[1])


class Ones(FedLEx):
    """Explores, and guides by ones."""

    def shape(self, guidance: Tensor, session: Any) -> Tensor:
        return torch.ones_like(guidance)


# The controls.


def test_guidance_by_its_mean_is_fedavg_at_a_smaller_rate() -> None:
    sim = run(MeanGuided(FedAvg(LOCAL), EXPLORER))
    mean = float(sim.server["guidance"][0])
    explored = run(FedLEx(FedAvg(LOCAL), EXPLORER))
    assert mean == pytest.approx(float(explored.server["guidance"].mean()))
    assert torch.equal(sim.server["guidance"], torch.full((P,), mean))
    small = run(FedAvg(replace(LOCAL, lr=LOCAL.lr * mean)))
    assert torch.allclose(sim.server["x"], small.server["x"], atol=1e-6)
    assert sim.tally.down == explored.tally.down
    constant = run(FedLEx(FedAvg(LOCAL), guidance=torch.full((P,), mean)))
    assert torch.equal(sim.server["x"], constant.server["x"])


def test_a_permuted_matrix_has_the_same_values_in_other_places() -> None:
    plain = run(FedLEx(FedAvg(LOCAL), EXPLORER)).server["guidance"]
    sim = run(PermutedGuidance(FedAvg(LOCAL), EXPLORER))
    mixed = sim.server["guidance"]
    for part in (segment.slice for segment in sim.session.space):
        assert torch.equal(plain[part].sort().values, mixed[part].sort().values)
    assert not torch.equal(plain, mixed)
    given = run(PermutedGuidance(FedAvg(LOCAL), guidance=plain)).server["guidance"]
    assert torch.equal(given, mixed)
    apart = torch.arange(P) / P
    whole = run(PermutedGuidance(FedAvg(LOCAL), guidance=apart, scope="global")).server["guidance"]
    assert torch.equal(whole.sort().values, apart)
    assert float(whole[:40].max()) > float(apart[:40].max())


@pytest.mark.parametrize("control", [MeanGuided, PermutedGuidance])
def test_a_control_of_constant_guidance_is_fedlex(control: type[FedLEx]) -> None:
    constant = torch.full((P,), 0.25)
    ends = [run(kind(FedAvg(LOCAL), guidance=constant)).server["x"] for kind in (FedLEx, control)]
    assert torch.equal(*ends)


def test_a_warm_start_without_visits_is_fedavg() -> None:
    assert torch.equal(
        run(WarmStart(FedAvg(LOCAL).local, fraction=0)).server["x"], run(FedAvg(LOCAL)).server["x"]
    )


def test_a_warm_start_visits_one_client_after_another() -> None:
    warm = WarmStart(LocalSGD(1e-30), warm=LOCAL, fraction=0.5)
    sim = run(warm, 1)
    order = sim.session.stream("visits").permutation(N)
    model, v = local(), net_vector()
    for client in reversed(order[:3].tolist()):
        v = LOCAL.run(context(model, client), clients()[client], v).clone()
    assert torch.equal(sim.server["x"], v)
    size = 4 * P
    assert (sim.tally.up, sim.tally.down) == ((3 + 3) * size, (3 + 3) * size)
    assert len(sim.history[0].participants) == 3
    assert sim.tally.work["grad"] == 3 * 6 + 3
    with pytest.raises(ValueError, match=r"fraction must be in \[0, 1\]; got 1.5"):
        WarmStart(LOCAL, fraction=1.5)


# Bad input.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patience": 0}, "patience must be >= 1 or None; got 0"),
        ({"fraction": 0}, r"fraction must be in \(0, 1\]; got 0"),
        ({"fraction": 1.5}, r"fraction must be in \(0, 1\]; got 1.5"),
        ({"apply_to": "weights"}, "apply_to must be one of gradient, update; got 'weights'"),
        ({"normalize": "sum"}, "normalize must be one of per_client, after_mean; got 'sum'"),
        ({"scale": "std"}, "scale must be one of minmax, robust; got 'std'"),
        ({"scope": "layer"}, "scope must be one of tensor, global; got 'layer'"),
        ({"adaptive": "maybe"}, "adaptive must be refuse or allow; got 'maybe'"),
        ({"explorer": None}, "give either an explorer or guidance; got neither"),
        ({"guidance": MATRIX}, "give either an explorer or guidance; got both"),
        ({"explorer": None, "guidance": MATRIX, "refresh": True}, "refresh must be False with given guidance"),
        ({"explorer": None, "guidance": MATRIX * 2}, r"guidance must lie in \[0, 1\]; got values of"),
        ({"explorer": None, "guidance": MATRIX - 0.5}, r"guidance must lie in \[0, 1\]; got values of -0.4"),
        (
            {"explorer": None, "guidance": MATRIX * math.nan},
            r"guidance must lie in \[0, 1\]; got values of nan",
        ),
        ({"explorer": None, "guidance": {"w": -MATRIX}}, r"guidance of 'w' must lie in \[0, 1\]"),
        ({"base": FedLEx(FedAvg(LOCAL), EXPLORER)}, "base must be without a task 'explore'; got 'FedLEx'"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FedLEx(**{"base": FedAvg(LOCAL), "explorer": EXPLORER, **change})


def test_what_does_not_fit_the_session_is_named() -> None:
    with pytest.raises(TypeError, match=r"base must be a method of rounds \(Synchronous\); got FedFix"):
        FedLEx(FedFix.__new__(FedFix), EXPLORER)
    for method, message in (
        (
            FedLEx(FedAvg(LOCAL), EXPLORER, fraction=0.05),
            "fraction must select at least one of 6 clients; got 0.05",
        ),
        (FedLEx(FedAvg(LOCAL), guidance=MATRIX[1:]), r"guidance must have shape \(66,\); got \(65,\)"),
        (
            FedLEx(FedAvg(LOCAL), guidance={"1.weight": MATRIX[:40]}),
            "guidance must name the trainable parameters",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            run(method, 0)
    for base in (FedPer(LOCAL), FedCAC(LOCAL)):
        with pytest.raises(
            RuntimeError, match=f"apply_to must be 'gradient' where .* got 'update' with {type(base).__name__}"
        ):
            run(FedLEx(base, EXPLORER, apply_to="update"), 1)
    for change, message in (
        ({"beta2": 1.0}, r"beta2 must be in \[0, 1\); got 1.0"),
        ({"eps": 0.0}, "eps must be > 0 and finite; got 0.0"),
        ({"lr": -1.0}, "lr must be > 0 and finite; got -1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            LocalAdam(**{"lr": 0.1, **change})


# For tests that write the training out.


def order(client: int, round: int = 0) -> list[Tensor]:
    passes = [stream(0, "client", client, round, "batches", epoch).permutation(12) for epoch in range(2)]
    return [rows for permuted in passes for rows in permuted.split(4)]


def gradient(model: nn.Module, vector: Tensor, data: ClientData, rows: Tensor) -> tuple[float, Tensor]:
    at = 0
    for p in model.parameters():
        p.data = vector[at : at + p.numel()].view(p.shape).clone()
        at += p.numel()
    loss = nn.functional.cross_entropy(model(data.x[rows]), data.y[rows])
    parts = torch.autograd.grad(loss, list(model.parameters()))
    return float(loss.detach()), torch.cat([g.reshape(-1) for g in parts])


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])
