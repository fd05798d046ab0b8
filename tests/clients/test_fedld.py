"""FedLD: its closed forms, its invariances, its special cases, and the parts of the loss."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from cograd.clients import FedLD, MarginControl, PrincipalGradient, loss_decomposition
from cograd.clients.baselines import FedAvg, PCGrad
from cograd.clients.fedld import GramRule, loss_parts, margin_penalty
from cograd.core.codecs import Float64
from cograd.core.streams import stream
from cograd.data.clients import ClientData
from cograd.engines.federated import Cyclic, Everyone, LocalSGD, Simulation, Uniform
from cograd.models.mlp import MLP

LOCAL = LocalSGD(lr=0.1, epochs=2, batch_size=4, momentum=0.5, weight_decay=5e-4)
LOSS = nn.functional.cross_entropy
SMALL = settings(max_examples=40, deadline=None, derandomize=True)
SEEDS = st.integers(0, 10**6)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return stream(seed, "test").normal(*shape).double()


def released(rows: Tensor, k: int) -> Tensor:
    """The published arithmetic, loop by loop: projections, rescaled. Right where nothing is zero."""
    values, e = torch.linalg.eigh(rows @ rows.T / len(rows))
    values, u = values.flip(0), (rows.T @ e.flip(1)).T
    total = torch.zeros(rows.shape[1], dtype=rows.dtype)
    for row in rows:
        for j in range(k):
            w = u[j]
            if sum(float(other @ w) >= 0 for other in rows) < sum(float(other @ w) < 0 for other in rows):
                w = -w
            projection = (row @ w) / (w @ w) * w
            total += projection * values[j] / values.sum() * row.norm() / projection.norm()
    return total / len(rows)


# The rule.


@SMALL
@given(seed=SEEDS, clients=st.integers(1, 7), k=st.sampled_from([0.2, 0.4, 0.8, 1.0]))
def test_it_is_the_published_arithmetic(seed, clients, k):
    rows = normal(clients, 9, seed=seed)
    rule = PrincipalGradient(k)
    assert torch.allclose(rule(rows), released(rows, rule.count(clients)), atol=1e-9)


@pytest.mark.parametrize("k", [0.2, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("layerwise", [True, False])
def test_what_all_agree_on_is_done(k, layerwise):
    g = normal(50).float()
    for copies in (1, 2, 5):
        assert torch.allclose(PrincipalGradient(k, layerwise=layerwise)(g.expand(copies, -1)), g, atol=1e-6)
    assert torch.equal(PrincipalGradient(k)(g[None]), g)


def test_orthogonal_clients_do_not_see_each_other():
    rows = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    assert torch.allclose(PrincipalGradient(1.0)(rows), torch.tensor([0.8, 0.1, 0.0]))
    assert torch.allclose(PrincipalGradient(0.5)(rows), torch.tensor([0.8, 0.0, 0.0]))
    assert bool(released(rows, 2).isnan().any())
    turn = torch.linalg.qr(normal(3, 3)).Q.float()  # right angles but for rounding
    turned = PrincipalGradient(1.0)(rows @ turn)
    assert torch.allclose(turned, torch.tensor([0.8, 0.1, 0.0]) @ turn, atol=1e-6)


@pytest.mark.parametrize("c", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("k", [0.5, 1.0])
def test_opposed_clients_give_their_mean(c, k):
    g = normal(20)
    rows = torch.stack([g, -c * g])
    assert torch.allclose(PrincipalGradient(k)(rows), rows.mean(0), atol=1e-12)


@SMALL
@given(seed=SEEDS, clients=st.integers(2, 6), k=st.sampled_from([0.4, 0.8, 1.0]))
def test_order_basis_and_scale_commute_and_the_step_is_no_longer_than_the_longest(seed, clients, k):
    rows, rule = normal(clients, 8, seed=seed), PrincipalGradient(k)
    found = rule(rows)
    order = stream(seed, "order").permutation(clients)
    assert torch.allclose(rule(rows[order]), found, atol=1e-9)
    turn = torch.linalg.qr(normal(8, 8, seed=seed + 1)).Q
    assert torch.allclose(rule(rows @ turn), found @ turn, atol=1e-9)
    for scale in (1e-30, 7.0, 1e30):
        assert torch.allclose(rule(scale * rows) / scale, found, atol=1e-9)
    norms = rows.norm(dim=1)
    assert float(found.norm()) <= float(norms.max()) * (1 + 1e-12)
    energy = rule.directions(rows).energy
    assert float(found.norm()) <= float(norms.mean() * energy.square().sum().sqrt()) * (1 + 1e-12)


@SMALL
@given(seed=SEEDS, clients=st.integers(1, 6))
def test_flipping_any_direction_changes_nothing(seed, clients):
    """So calibrating by majority has no effect: the published formula, with any signs of the directions."""
    rows, rule = normal(clients, 7, seed=seed), PrincipalGradient(0.8)
    directions = rule.directions(rows)
    flips = stream(seed, "flips").uniform(len(directions.units), 1).double().sub(0.5).sign()
    for units in (directions.units, flips * directions.units):
        share = torch.sign(rows @ units.T) * directions.energy * rows.norm(dim=1, keepdim=True)
        assert torch.allclose(share.mean(0) @ units, rule(rows), atol=1e-9)


def test_directions_are_unit_orthogonal_and_on_the_side_of_the_majority():
    rows = normal(7, 30)
    found = PrincipalGradient(0.8).directions(rows)
    assert found.units.shape == (5, 30)
    assert torch.allclose(found.units @ found.units.T, torch.eye(5).double(), atol=1e-10)
    assert bool(((rows @ found.units.T >= 0).sum(0) * 2 >= 7).all())
    values = torch.linalg.svdvals(rows).square()
    assert torch.allclose(found.energy, (values / values.sum())[:5])


def test_all_directions_are_not_the_mean():
    rows = normal(4, 12)
    assert not torch.allclose(PrincipalGradient(1.0)(rows), rows.mean(0), atol=1e-2)


def test_the_count_of_directions():
    counts = {(k, n): PrincipalGradient(k).count(n) for k in (0.1, 0.29, 0.8, 1.0) for n in (1, 5, 100)}
    assert counts == {
        (0.1, 1): 1, (0.1, 5): 1, (0.1, 100): 10, (0.29, 1): 1, (0.29, 5): 1, (0.29, 100): 29,
        (0.8, 1): 1, (0.8, 5): 4, (0.8, 100): 80, (1.0, 1): 1, (1.0, 5): 5, (1.0, 100): 100,
    }  # fmt: skip
    assert [PrincipalGradient(0.1, min_directions=3).count(n) for n in (2, 5, 50)] == [2, 3, 5]


def test_what_divides_by_zero_in_the_release_is_finite():
    g, h = normal(2, 6)
    rule = PrincipalGradient(1.0)
    assert rule(torch.zeros(3, 6)).tolist() == [0] * 6
    assert torch.allclose(rule(torch.stack([g, g])), g)
    assert torch.allclose(rule(torch.stack([g, torch.zeros(6).double()])), g / 2)
    twice = rule(torch.stack([g, g, h]))  # rank 2 of 3
    assert bool(twice.isfinite().all())
    assert torch.allclose(twice, PrincipalGradient(0.7)(torch.stack([g, g, h])), atol=1e-9)
    more = normal(5, 2)  # more clients than numbers
    assert torch.allclose(rule(more), PrincipalGradient(0.4)(more), atol=1e-9)
    assert torch.allclose(rule(more[:, :1]), more[:, :1].mean(0))
    assert rule(torch.zeros(3, 0)).shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_it_keeps_the_dtype(dtype):
    rows = normal(4, 300).to(dtype)
    found = PrincipalGradient()(rows)
    assert found.dtype == dtype
    exact = PrincipalGradient()(rows.double())
    assert torch.allclose(found.double(), exact, atol=0.01 if dtype == torch.bfloat16 else 1e-6)


def test_long_rows_are_summed_in_pieces(monkeypatch):
    rows = normal(4, 1000)
    found = PrincipalGradient()(rows)
    monkeypatch.setattr("cograd.clients.fedld.combining._COLUMNS", 7)
    assert torch.allclose(PrincipalGradient()(rows), found, atol=1e-12)


# Models of several entries.


def models(clients: int = 4, seed: int = 0) -> list[dict[str, Tensor]]:
    shapes = {"weight": (3, 4), "bias": (4,), "scale": (1,), "running_var": (4,)}
    return [
        {
            **{name: normal(*shape, seed=seed + 10 * i + j) for j, (name, shape) in enumerate(shapes.items())},
            "num_batches_tracked": torch.tensor(i + i // 3),
        }
        for i in range(clients)
    ]


def column(deltas: list[dict[str, Tensor]], *names: str) -> Tensor:
    return torch.stack([torch.cat([delta[name].reshape(-1).double() for name in names]) for delta in deltas])


def test_each_entry_has_directions_of_its_own():
    deltas, rule = models(), PrincipalGradient(0.5)
    found = rule(deltas, buffers=["running_var"])
    assert list(found) == list(deltas[0])
    for name in ("weight", "bias"):
        assert torch.allclose(found[name].reshape(-1), rule(column(deltas, name)))
        assert found[name].shape == deltas[0][name].shape
    for name in ("scale", "running_var"):
        assert torch.allclose(found[name], column(deltas, name).mean(0))
    assert found["num_batches_tracked"].dtype == torch.int64
    assert int(found["num_batches_tracked"]) == 2  # 0, 1, 2, 4


def test_buffers_by_the_rule_if_that_is_asked_for():
    deltas, rule = models(), PrincipalGradient(0.5, buffers="principal")
    found = rule(deltas, buffers=["running_var"])["running_var"]
    assert torch.allclose(found, rule(column(deltas, "running_var")))
    assert not torch.allclose(found, column(deltas, "running_var").mean(0), atol=1e-3)


def test_one_long_vector_if_not_layerwise():
    deltas, rule = models(), PrincipalGradient(0.5, layerwise=False)
    found = rule(deltas, buffers=["running_var"])
    names = ("weight", "bias", "scale")
    whole = torch.cat([found[name].reshape(-1) for name in names])
    assert torch.allclose(whole, PrincipalGradient(0.5)(column(deltas, *names)))
    assert torch.allclose(found["running_var"], column(deltas, "running_var").mean(0))
    ones = [{"a": torch.tensor([float(i)])} for i in range(3)]
    assert rule(ones)["a"].tolist() == [1.0]


@pytest.mark.parametrize("layerwise", [True, False])
def test_rescaling_gives_the_length_of_the_mean_and_no_other_direction(layerwise):
    deltas = models()
    plain = PrincipalGradient(0.8, layerwise=layerwise)(deltas)
    scaled = PrincipalGradient(0.8, layerwise=layerwise, rescale="mean_norm")(deltas)
    groups = [["weight"], ["bias"]] if layerwise else [["weight", "bias", "scale", "running_var"]]
    for names in groups:
        a, b = (torch.cat([found[name].reshape(-1) for name in names]) for found in (plain, scaled))
        assert float(nn.functional.cosine_similarity(a, b, 0)) == pytest.approx(1)
        assert float(b.norm()) == pytest.approx(float(column(deltas, *names).mean(0).norm()))
    still = PrincipalGradient(rescale="mean_norm")
    assert still(torch.zeros(2, 3)).tolist() == [0, 0, 0]
    g = normal(3)
    assert still(torch.stack([g, -g])).norm() < 1e-12


@pytest.mark.parametrize(
    ("deltas", "message"),
    [
        ([], "deltas must be of at least one client; got none"),
        ([{"a": torch.zeros(2)}, {"b": torch.zeros(2)}], r"'a' of client 1 is missing, that of client 0"),
        ([{"a": torch.zeros(2)}, {"a": torch.zeros(3)}], r"'a' of client 1 is \(\(3,\), .*client 0 \(\(2,\)"),
        ([{"a": torch.zeros(2)}, {"a": torch.zeros(2).double()}], "'a' of client 1 is .*float64"),
        (
            [{"a": torch.zeros(2)}] * 2 + [{"a": torch.tensor([0.0, math.nan])}],
            "deltas must be finite; 'a' of client 2 holds NaN or infinity",
        ),
        (torch.tensor([[1.0], [math.inf]]), "of client 1 holds NaN or infinity"),
        (torch.zeros(3), r"deltas must be floats \(K, P\); got torch.float32 of shape \(3,\)"),
        (torch.zeros(3, 2, dtype=torch.int64), r"deltas must be floats \(K, P\); got torch.int64"),
        (torch.zeros(0, 2), "deltas must be of at least one client; got none"),
    ],
)
def test_bad_changes_are_refused(deltas, message):
    with pytest.raises(ValueError, match=message):
        PrincipalGradient()(deltas)


def test_bad_arguments_are_named():
    for change, message in (
        ({"k": 0.0}, r"k must be in \(0, 1\]; got 0.0"),
        ({"k": 1.1}, r"k must be in \(0, 1\]; got 1.1"),
        ({"k": math.nan}, r"k must be in \(0, 1\]; got nan"),
        ({"min_directions": 0}, "min_directions must be >= 1; got 0"),
        ({"rescale": "mean"}, "rescale must be None or 'mean_norm'; got 'mean'"),
        ({"buffers": "local"}, "buffers must be one of mean, principal; got 'local'"),
    ):
        with pytest.raises(ValueError, match=message):
            PrincipalGradient(**change)
    for change, message in (
        ({"margin": -0.1}, "margin must be >= 0 and finite; got -0.1"),
        ({"margin": math.inf}, "margin must be >= 0 and finite; got inf"),
        ({"on": "softmax"}, "on must be one of logits, batch_softmax; got 'softmax'"),
        ({"weighted": True}, "weighted must be False with a rule"),
        ({"rule": PrincipalGradient(buffers="principal")}, "buffers of the rule must be 'mean'"),
    ):
        with pytest.raises(ValueError, match=message):
            FedLD(LOCAL, **change)
    with pytest.raises(ValueError, match=r"buffers must name entries \(weight, .*; got 'mean'"):
        PrincipalGradient()(models(), buffers=["mean"])
    with pytest.raises(ValueError, match=r"deltas must be floats \(K, P\)"):
        PrincipalGradient().directions(torch.zeros(3))


# The margin.


def test_values_of_the_penalty():
    z = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    assert float(margin_penalty(z)) == pytest.approx(math.log(26) / 2)
    assert float(margin_penalty(z.reshape(1, 4))) == pytest.approx(math.log(26))
    for b, c in ((1, 2), (50, 10), (7, 3)):
        uniform, sure = torch.full((b, c), 5.0), 1e4 * torch.eye(c)[torch.arange(b) % c]
        assert float(margin_penalty(uniform, "batch_softmax")) == pytest.approx(math.log(1 + b / c))
        assert float(margin_penalty(sure, "batch_softmax")) == pytest.approx(math.log(1 + b))


def test_gradients_of_the_penalty():
    z = normal(5, 3).requires_grad_()
    for form in ("logits", "batch_softmax"):
        assert torch.autograd.gradcheck(lambda x, form=form: margin_penalty(x, form), z)
    (released,) = torch.autograd.grad(margin_penalty(z, "batch_softmax"), z)
    p = torch.softmax(z, 1)
    size = p.square().sum(1, keepdim=True)
    assert torch.allclose(released, 2 / (1 + size.sum()) * p * (p - size))
    assert float(released.sum(1).abs().max()) < 1e-12
    (paper,) = torch.autograd.grad(margin_penalty(z), z)
    assert torch.allclose(paper, 2 * z / (1 + z.square().sum(1, keepdim=True)) / 5)
    assert float(paper.sum(1).abs().max()) > 1e-2


def test_the_released_form_does_not_see_a_shift_and_sees_the_batch():
    z = normal(6, 4)
    assert torch.allclose(margin_penalty(z + 7, "batch_softmax"), margin_penalty(z, "batch_softmax"))
    assert not torch.allclose(margin_penalty(z + 7), margin_penalty(z))
    twice = torch.cat([z, z])
    assert torch.allclose(margin_penalty(twice), margin_penalty(z))
    assert float(margin_penalty(twice, "batch_softmax")) > float(margin_penalty(z, "batch_softmax")) + 0.3


@pytest.mark.parametrize("form", ["logits", "batch_softmax"])
def test_the_wrapped_loss(form):
    z, y = normal(6, 4), torch.arange(6) % 4
    loss = MarginControl(nn.CrossEntropyLoss(), 0.3, form)
    assert torch.allclose(loss(z, y), LOSS(z, y) + 0.3 * margin_penalty(z, form))
    assert torch.equal(MarginControl(LOSS, 0.0, form)(z, y), LOSS(z, y))
    assert f"weight=0.3, on='{form}'" in repr(loss)
    for change, message in (
        ({"weight": -1}, "weight must be >= 0 and finite; got -1"),
        ({"on": "probabilities"}, "on must be one of logits, batch_softmax; got 'probabilities'"),
    ):
        with pytest.raises(ValueError, match=message):
            MarginControl(LOSS, **change)
    with pytest.raises(ValueError, match=r"outputs must have shape \(B, C, ...\); got \(4,\)"):
        loss(z[0], y[0])


# The method.


def clients(n: int = 5, dtype: torch.dtype = torch.float32) -> list[ClientData]:
    found = []
    for client in range(n):
        size = 8 + 4 * client
        x = (stream(client, "x").normal(size, 5) + client / 3).to(dtype)
        found.append(ClientData(x, (x.sum(1) > client).long(), x[:0], torch.zeros(0, dtype=torch.long)))
    return found


def net(dtype: torch.dtype = torch.float32) -> MLP:
    torch.manual_seed(1)
    return MLP(5, 8, 2).to(dtype)


def run(method, rounds: int = 3, **options) -> Simulation:
    sim = Simulation(method, net(), LOSS, clients(), **{"sampler": Everyone(), **options})
    sim.run(rounds)
    return sim


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("on", ["logits", "batch_softmax"])
def test_without_margin_and_rule_it_is_fedavg_bit_for_bit(weighted, on):
    ours = run(FedLD(LOCAL, margin=0.0, on=on, rule=None, weighted=weighted), sampler=Uniform(0.6))
    theirs = run(FedAvg(LOCAL, weighted=weighted), sampler=Uniform(0.6))
    assert torch.equal(ours.server["x"], theirs.server["x"])
    assert ours.tally.work == theirs.tally.work
    assert set(ours.server) == set(theirs.server)


@pytest.mark.parametrize("layerwise", [True, False])
def test_the_first_round_is_unweighted_fedavg_bit_for_bit_and_the_second_is_not(layerwise):
    rule = PrincipalGradient(layerwise=layerwise)
    for rounds, same in ((1, True), (2, False)):
        ours = run(FedLD(LOCAL, margin=0.0, rule=rule), rounds)
        assert torch.equal(ours.server["x"], run(FedAvg(LOCAL, weighted=False), rounds).server["x"]) is same
    assert ours.history[0].reports["step"] == 1.0
    assert ours.history[1].reports["step"] < 1.0


def test_with_a_margin_it_is_fedavg_on_another_loss():
    for on in ("logits", "batch_softmax"):
        ours = run(FedLD(LOCAL, margin=0.2, on=on, rule=None))
        theirs = Simulation(FedAvg(LOCAL, weighted=False), net(), MarginControl(LOSS, 0.2, on), clients())
        theirs.run(3)
        assert torch.equal(ours.server["x"], theirs.server["x"])
        assert ours.local.loss is LOSS


@pytest.mark.parametrize("layerwise", [True, False])
def test_all_of_it_is_the_cards_loop(layerwise):
    """Against loops that know neither the library's training nor its rule."""
    method = FedLD(LOCAL, margin=0.2, rule=PrincipalGradient(0.8, layerwise=layerwise))
    data = clients(dtype=torch.float64)
    sim = Simulation(method, net(torch.float64), LOSS, data, up=Float64(), down=Float64())
    sim.run(3)
    model = net(torch.float64)
    x = [p.detach().clone() for p in model.parameters()]
    for t in range(3):
        deltas = []
        for client, held in enumerate(data):
            for p, value in zip(model.parameters(), x, strict=True):
                p.data = value.clone()
            opt = torch.optim.SGD(model.parameters(), 0.1, momentum=0.5, weight_decay=5e-4)
            for epoch in range(2):
                order = stream(0, "client", client, t, "batches", epoch).permutation(len(held))
                for rows in order.split(4):
                    opt.zero_grad()
                    z = model(held.x[rows])
                    (LOSS(z, held.y[rows]) + 0.2 * torch.log(1 + (z**2).sum(1)).mean()).backward()
                    opt.step()
            deltas.append([p.detach() - value for p, value in zip(model.parameters(), x, strict=True)])
        entries = [torch.stack([part.reshape(-1) for part in parts]) for parts in zip(*deltas, strict=True)]
        if not layerwise:
            entries = [torch.cat(entries, 1)]
        changes = [rows.mean(0) if t == 0 else released(rows, 4) for rows in entries]
        parts = torch.cat(changes).split([value.numel() for value in x])
        x = [value + part.view(value.shape) for value, part in zip(x, parts, strict=True)]
    assert torch.allclose(sim.server["x"], torch.cat([value.reshape(-1) for value in x]), atol=1e-8)


class Late(nn.Module):
    """Outputs a + x b: clients whose input is zero do not move b."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.zeros(2).double()), nn.Parameter(torch.zeros(2).double())

    def forward(self, x: Tensor) -> Tensor:
        return self.a + x * self.b


def half_square(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().sum() / 2


@pytest.mark.parametrize("layerwise", [True, False])
def test_an_entry_is_averaged_until_it_has_moved(layerwise):
    """Clients 0 and 1 move a alone, in the first round; 2 and 3 move a and b alike, in the second."""
    none, targets = torch.zeros(0), torch.tensor([[1.0, 0.5], [0.2, 2.0], [1.0, 0.3], [-0.2, 2.0]]).double()
    inputs = torch.tensor([0.0, 0.0, 1.0, 1.0]).double().reshape(4, 1, 1)
    data = [ClientData(x, t[None], none, none) for x, t in zip(inputs, targets, strict=True)]
    rule = PrincipalGradient(1.0, layerwise=layerwise)
    method = FedLD(LocalSGD(0.1, batch_size=1), margin=0.0, rule=rule)
    options = {"up": Float64(), "down": Float64(), "sampler": Cyclic(count=2)}
    sim = Simulation(method, Late(), half_square, data, **options)
    sim.run(1)
    a = sim.server["x"][:2].clone()
    assert torch.allclose(a, 0.1 * targets[:2].mean(0))
    assert sim.server["moved"].tolist() == [True, False]
    sim.run(2)
    rows = 0.1 * (targets[2:] - a)
    moved = sim.server["x"] - torch.cat([a, torch.zeros(2)])
    assert torch.allclose(moved[:2], rule(rows))  # both halves of the rows being equal, so are the weights
    assert torch.allclose(moved[2:], rows.mean(0) if layerwise else rule(rows))
    assert not torch.allclose(rule(rows), rows.mean(0), atol=1e-3)
    assert sim.server["moved"].tolist() == [True, True]


def test_one_participant_is_followed_and_some_may_sleep():
    ours = run(FedLD(LOCAL, margin=0.0), 4, sampler=Cyclic(count=1))
    theirs = run(FedAvg(LOCAL), 4, sampler=Cyclic(count=1))
    assert torch.allclose(ours.server["x"], theirs.server["x"], atol=1e-6)
    some = run(FedLD(LOCAL, rule=PrincipalGradient(0.1)), 4, sampler=Uniform(0.4))
    assert bool(some.server["x"].isfinite().all())
    assert some.server["x"].ne(some.session.initial).any()


@pytest.mark.parametrize("method", [FedLD(LOCAL), FedLD(LOCAL, rule=PCGrad())])
def test_bytes_work_and_state(method):
    sim = run(method)
    size = 4 * sim.session.space.numel
    assert sim.tally.up == sim.tally.down == 3 * 5 * size
    assert sim.tally.work["grad"] == 3 * 2 * sum(math.ceil(len(c) / 4) for c in clients())
    assert all(sim.states[client] == {} for client in sim.states)
    assert {name: value.nbytes for name, value in sim.server.items() if isinstance(value, Tensor)} == {
        "x": size,
        "moved": 4,
    }


@pytest.mark.parametrize("rule", [PrincipalGradient(), PCGrad()])
def test_a_saved_run_goes_on_as_if_nothing_had_happened(rule, tmp_path):
    method = FedLD(LOCAL, rule=rule)
    whole = run(method, 4)
    run(method, 2).save(tmp_path)
    resumed = Simulation(method, net(), LOSS, clients())
    resumed.load(tmp_path)
    resumed.run(4)
    assert torch.equal(resumed.server["x"], whole.server["x"])


def test_batchnorm_goes_with_the_mean_of_its_statistics():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    sim = Simulation(FedLD(LOCAL), model, LOSS, clients(), buffers="mean")
    sim.run(3)
    assert bool((sim.buffers[4:] > 0).all())


# The parts of the loss.


def test_the_parts_add_up_to_the_loss_of_the_aggregated_model():
    data, local = clients(3), [MLP(5, 8, 2) for _ in range(3)]
    merged = MLP(5, 8, 2)
    merged[1].train(False)
    for model in (merged, *local):
        model.requires_grad_(False)
    batches = [[(c.x[:4], c.y[:4]), (c.x[4:], c.y[4:])] for c in data]
    parts = loss_decomposition(merged, local, batches, LOSS)
    everything = torch.cat([c.x for c in data]), torch.cat([c.y for c in data])
    assert parts.total == pytest.approx(float(LOSS(merged(everything[0]), everything[1])), abs=1e-6)
    n = sum(len(c) for c in data)
    own = sum(len(c) / n * float(LOSS(w(c.x), c.y)) for w, c in zip(local, data, strict=True))
    all_of_it = sum(
        len(c) / n * float(LOSS(w(everything[0]), everything[1])) for w, c in zip(local, data, strict=True)
    )
    assert parts.local == pytest.approx(own, abs=1e-6)
    assert parts.shift == pytest.approx(all_of_it - own, abs=1e-6)
    assert parts.aggregation == pytest.approx(parts.total - all_of_it, abs=1e-6)
    again = loss_decomposition(merged, local, data, LOSS)
    assert (again.local, again.shift) == pytest.approx((parts.local, parts.shift), abs=1e-6)
    assert [merged.training, merged[1].training, local[0].training] == [True, False, True]


def test_one_client_has_no_shift_and_no_aggregation():
    model = MLP(5, 8, 2)
    parts = loss_decomposition(model, [model], clients(1), LOSS)
    assert parts.shift == parts.aggregation == 0
    assert parts.local > 0


def test_bad_parts_are_refused():
    data, model = clients(2), MLP(5, 8, 2)
    with pytest.raises(ValueError, match="local_models must be 2, as clients are; got 1"):
        loss_decomposition(model, [model], data, LOSS)
    with pytest.raises(ValueError, match="clients must hold at least one example each; client 1 holds none"):
        loss_decomposition(model, [model, model], [data[0], []], LOSS)
    with pytest.raises(ValueError, match=r"losses must have shapes \(2, 2\) and \(2,\).*got \(2, 3\)"):
        loss_parts(torch.zeros(2, 3), torch.zeros(2), [1, 1])
    with pytest.raises(ValueError, match=r"sizes must be > 0; got \[1, 0\]"):
        loss_parts(torch.zeros(2, 2), torch.zeros(2), [1, 0])


# PCGrad.


def pcgrad(rows: Tensor, orders: list[list[int]]) -> Tensor:
    """The definition, loop by loop."""
    found = []
    for i, order in enumerate(orders):
        g = rows[i].clone()
        for j in order:
            if j != i and float(g @ rows[j]) < 0:
                g -= (g @ rows[j]) / (rows[j] @ rows[j]) * rows[j]
        found.append(g)
    return torch.stack(found).mean(0)


@SMALL
@given(seed=SEEDS, clients=st.integers(1, 6))
def test_pcgrad_is_its_definition(seed, clients):
    rows = normal(clients, 5, seed=seed)
    draws = stream(seed, "orders")
    orders = [draws.permutation(clients).tolist() for _ in range(clients)]
    assert torch.allclose(PCGrad()(rows, draws=stream(seed, "orders")), pcgrad(rows, orders), atol=1e-9)


def test_pcgrad_leaves_those_who_agree_and_frees_two_of_their_conflict():
    alike = torch.tensor([[1.0, 0.2, 0.0], [1.0, 0.0, 0.3], [0.5, 0.1, 0.0]])
    assert torch.allclose(PCGrad()(alike), alike.mean(0))
    one, other = torch.tensor([1.0, 0.0]), torch.tensor([-1.0, 1.0])
    found = PCGrad()(torch.stack([one, other]))
    assert torch.allclose(found, torch.tensor([0.5, 0.5 + 0.5]) / 2 + torch.tensor([0.0, 0.25]))
    assert float(found @ one) >= 0
    assert float(found @ other) >= 0
    assert PCGrad()(torch.zeros(3, 2)).tolist() == [0, 0]
    assert isinstance(PCGrad(), GramRule)
