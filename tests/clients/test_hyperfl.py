"""HyperFL: its gradients are autograd's, a special case is FedRep, and messages hide the classifier alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, vmap

from cograd.clients import HyperFL
from cograd.clients.baselines import FedRep
from cograd.clients.hyperfl import (
    HyperNet,
    adapt,
    block_adapters,
    directions,
    first_input,
    leak,
    stage_adapters,
)
from cograd.clients.hyperfl.hypernet import Weights
from cograd.core.codecs import Float64
from cograd.core.space import ParamSpace
from cograd.core.streams import stream
from cograd.data.clients import ClientData
from cograd.engines.federated import ClientError, Cyclic, LocalModel, LocalSGD, Session, Simulation
from cograd.engines.federated.protocol import ClientContext, Content, State

E, H = 5, 7
HEAVY = LocalSGD(lr=0.05, epochs=2, batch_size=8, momentum=0.5, weight_decay=5e-3, max_norm=0.5)
ONE = LocalSGD(lr=0.05, batch_size=100)
CONV = ("0", "3")


def conv_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.LeakyReLU(), nn.Flatten(), nn.Linear(48, 6), nn.LeakyReLU(), nn.Linear(6, 3)
    ).double()


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.ReLU(), nn.Linear(8, 3)).double()


def some(client: int, n: int | None = None) -> ClientData:
    n = 15 + 5 * client if n is None else n
    x, y = stream(3, "images", client).uniform(n, 1, 6, 6).double(), torch.arange(n) % 3
    return ClientData(x, y, x[:6], y[:6])


CLIENTS = [some(client) for client in range(3)]


@dataclass
class Watched(HyperFL):
    """HyperFL that keeps what the server gets, and the Phi it went out from."""

    seen: list[dict[int, Content]] = field(default_factory=list, repr=False)
    sent: list[Tensor] = field(default_factory=list, repr=False)

    def close(self, server: State, replies: Mapping[int, Content], session: Session) -> None:
        self.seen.append(dict(replies))
        self.sent.append(server["x"].clone())
        super().close(server, replies, session)


def simulated(
    method: Any, clients: Sequence[ClientData] = CLIENTS, model: Callable[[], nn.Module] = conv_net,
    loss: Any = nn.functional.cross_entropy, **options: Any,
) -> Simulation:  # fmt: skip
    return Simulation(method, model(), loss, clients, up=Float64(), down=Float64(), **options)


def small(local: LocalSGD = HEAVY, kind: type[HyperFL] = HyperFL, **given: Any) -> HyperFL:
    return kind(local, **{"head": replace(HEAVY, epochs=1), "embedding": E, "hidden": H, **given})


def context(sim: Simulation, client: int = 0) -> ClientContext:
    sim.local.at(sim.session.initial)
    return ClientContext(client, 0, 0, sim.session.sizes, sim.local, sim.session.initial)


# The hypernetwork


def test_the_pullback_is_autograd_through_the_generated_model() -> None:
    model, data = conv_net(), some(0)
    net = small().hypernet(ParamSpace.of(model))
    phi = net.initial(torch.randn(net.generated.numel).double(), stream(0, "phi"), "paper", 0.0)
    v = stream(0, "v").normal(E).double()
    for tensor in (phi, v):
        tensor.requires_grad_()
    theta = net.weights(phi).generate(v)
    logits = functional_call(model, dict(net.generated.views(theta)), (data.x,))
    loss = nn.functional.cross_entropy(logits, data.y)
    g, by_phi, by_v = torch.autograd.grad(loss, (theta, phi, v))
    assert {s.name for s in net.generated} == {"0.weight", "0.bias", "3.weight", "3.bias"}

    with torch.no_grad():
        pulled = net.weights(phi).pullback(v, g)
        ours = torch.empty_like(phi)
        pulled.into(net.weights(ours))
        assert float((ours - by_phi).abs().max()) <= 1e-10
        assert float((net.weights(phi).weight.t() @ pulled.inner - by_v).abs().max()) <= 1e-10
        assert float((pulled.norm - by_phi.norm()).abs()) <= 1e-10
    assert 0 < int((pulled.units > 0).sum()) < H


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 6), st.integers(0, 10**6))
def test_its_parts_cover_phi_and_norms_are_those_of_the_whole(e: int, h: int, p: int, seed: int) -> None:
    draws = stream(seed, "parts")
    phi, v, g = draws.normal(e * h + h + (h + 1) * p), draws.normal(e), draws.normal(p)
    weights = Weights.of(phi, e, h)
    assert torch.equal(torch.cat([part.reshape(-1) for part in weights]), phi)
    out = torch.full_like(phi, math.nan)
    pulled = weights.pullback(v, g)
    pulled.into(Weights.of(out, e, h), 0.5)
    assert torch.allclose(out.norm(), 0.5 * pulled.norm, rtol=1e-5)


def papers_net(channels: Sequence[int], image: int, classes: int) -> ParamSpace:
    shapes, side = {}, image
    for i, (inputs, outputs, kernel, padding) in enumerate(zip(channels, channels[1:], (5, 5, 3), (0, 1, 1))):  # noqa: B905
        shapes |= {f"conv{i}.weight": (outputs, inputs, kernel, kernel), f"conv{i}.bias": (outputs,)}
        side = (side + 2 * padding - kernel + 1) // 2
    flat = channels[-1] * side * side
    shapes |= {"fc.weight": (128, flat), "fc.bias": (128,)}
    return ParamSpace({**shapes, "classifier.weight": (classes, 128), "classifier.bias": (classes,)})


@pytest.mark.parametrize(
    ("space", "generated", "numel", "multiplier"),
    [
        (papers_net((1, 16, 32), 28, 62), 115_776, 14_943_424, 120.7),
        (papers_net((3, 16, 32, 64), 32, 10), 106_400, 13_733_920, 127.5),
    ],
)
def test_its_size_is_the_papers(space: ParamSpace, generated: int, numel: int, multiplier: float) -> None:
    net = HyperFL().hypernet(space)
    assert (net.generated.numel, net.numel, net.nbytes) == (generated, numel, 4 * numel)
    assert net.multiplier == pytest.approx(multiplier, abs=0.05)
    assert HyperFL().multiplier(space) == net.multiplier


def test_initialisations() -> None:
    sim = simulated(small())
    theta = sim.session.initial[: -(6 * 3 + 3)]
    scaled = small().hypernet(sim.session.space).weights(sim.server["x"])
    assert torch.equal(scaled.offsets, theta)
    paper = small().hypernet(sim.session.space).weights(simulated(small(init="paper")).server["x"])
    assert torch.allclose(scaled.heads, 0.05 * paper.heads)
    assert torch.equal(scaled.weight, paper.weight)
    for part, fan_in in zip(paper, (E, E, H, H), strict=True):
        bound = 1 / math.sqrt(fan_in)
        assert 0.7 * bound < float(part.abs().max()) <= bound


# The client


def test_with_dead_units_it_is_fedrep() -> None:
    """W1 = 0 and b1 < 0 give s = 0: theta = c, whose gradient is the extractor's."""
    sim = simulated(small())
    net = small().hypernet(sim.session.space)
    weights = net.weights(sim.server["x"])
    weights.weight.zero_()
    weights.bias.fill_(-1)
    weights.heads.zero_()
    sim.run(3)
    rep = simulated(FedRep(HEAVY, weighted=True, head_epochs=1))
    rep.run(3)
    found = net.weights(sim.server["x"])
    assert float((found.offsets - rep.server["x"]).abs().max()) <= 1e-7
    assert not found.heads.any()
    for client in range(3):
        assert float((sim.states[client]["h"] - rep.states[client]["h"]).abs().max()) <= 1e-7
    assert sim.tally.work == rep.tally.work


def test_theta_is_generated_anew_at_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    method = small()
    sim = simulated(method)
    ctx, net = context(sim), method.hypernet(sim.session.space)
    theirs = torch.arange(net.generated.numel)
    phi, v, w = sim.server["x"].clone(), torch.ones(E).double(), sim.local.theta
    w[theirs] = net.weights(phi).generate(v)
    walk, plain = [], sim.local.gradient

    def watched(at: Tensor, x: Tensor, y: Tensor) -> Tensor:
        assert torch.equal(at[theirs], net.weights(phi.clone()).generate(v.clone()))
        walk.append(at[theirs].clone())
        return plain(at, x, y)

    monkeypatch.setattr(sim.local, "gradient", watched)
    method.fit_hypernet(ctx, CLIENTS[0], w, theirs, phi, v)
    assert len(walk) == HEAVY.length(15)
    assert all(bool((a != b).any()) for a, b in pairwise(walk))
    assert torch.equal(w[theirs], net.weights(phi).generate(v))


def test_phase_one_trains_the_classifier_alone_and_phase_two_leaves_it(monkeypatch: pytest.MonkeyPatch) -> None:
    sim = simulated(small())
    points, plain = [], sim.local.gradient

    def watched(v: Tensor, x: Tensor, y: Tensor) -> Tensor:
        points.append(v.clone())
        return plain(v, x, y)

    monkeypatch.setattr(sim.local, "gradient", watched)
    sim.run(1)
    body, head = torch.stack(points[:6]).split([len(points[0]) - 21, 21], 1)  # client 0: 2 and 4 steps
    assert (body[:3] == body[0]).all()
    assert (head[2:] == head[2]).all()
    assert bool((head[0] != head[1]).any())
    assert bool((head[1] != head[2]).any())


def test_the_gradients_of_phi_and_of_the_embedding_are_clipped_apart() -> None:
    local = replace(ONE, max_norm=50.0)
    method = small(local, Watched, init="paper")

    def loud(outputs: Tensor, targets: Tensor) -> Tensor:
        return 1e6 * nn.functional.cross_entropy(outputs, targets)

    sim = simulated(method, [some(0)], loss=loud)
    sim.run(1)
    drawn = ClientContext(0, 0, 0, [15], sim.local, sim.session.initial).stream("embedding").normal(E)
    assert float(method.seen[0][0]["delta"].norm()) / local.lr == pytest.approx(50, abs=1e-3)
    assert float((sim.states[0]["v"] - drawn).norm()) / local.lr == pytest.approx(50, abs=1e-3)


def test_every_client_draws_an_embedding_of_its_own_and_keeps_it_while_it_sleeps() -> None:
    sim = simulated(small(), sampler=Cyclic(count=1))
    sim.run(2)
    assert "v" not in sim.states[2]
    first = sim.states[0]["v"].clone(), sim.states[0]["h"].clone()
    sim.run(3)
    vs = [sim.states[client]["v"] for client in range(3)]
    assert min(float((vs[a] - vs[b]).norm()) for a, b in ((0, 1), (0, 2), (1, 2))) > 0.1
    assert torch.equal(sim.states[0]["v"], first[0])
    assert torch.equal(sim.states[0]["h"], first[1])


def test_secret_embeddings_do_not_follow_from_the_seed() -> None:
    drawn = []
    for secret in (False, False, True, True):
        sim = simulated(small(secret=secret), CLIENTS[:1])
        sim.run(1)
        drawn.append(sim.states[0]["v"])
    assert torch.equal(drawn[0], drawn[1])
    assert float((drawn[2] - drawn[3]).norm()) > 0.1
    assert float((drawn[2] - drawn[0]).norm()) > 0.1


def test_models_before_and_after_aggregation_are_generated_from_phi_as_it_is() -> None:
    method = small(kind=Watched)
    sim = simulated(method, personal=True)
    (row,) = sim.run(1)
    mine = method.hypernet(sim.session.space)

    def right(client: int, phi: Tensor) -> float:
        state, data = sim.states[client], CLIENTS[client]
        vector = torch.cat([mine.weights(phi).generate(state["v"]), state["h"]])
        return sim.local.correct(vector, data.test_x, data.test_y) / len(data.test_y)

    before = [right(i, method.sent[0] + method.seen[0][i]["delta"]) for i in range(3)]
    after = [right(i, sim.server["x"]) for i in range(3)]
    assert row.before == pytest.approx(sum(before) / 3)
    assert row.personal == pytest.approx(sum(after) / 3)
    assert torch.equal(method.model(sim.server)[-21:], sim.session.initial[-21:])


# The server and the wire


def test_the_server_weighs_by_examples_and_those_who_sleep_change_nothing() -> None:
    clients = [some(0, 100), some(1, 300), some(2, 50)]
    method = small(replace(HEAVY, batch_size=50), Watched)
    sim = simulated(method, clients, sampler=lambda round, clients, seed: [0, 1])
    sim.run(1)
    one, two = (method.sent[0] + method.seen[0][i]["delta"] for i in (0, 1))
    assert torch.allclose(sim.server["x"], 0.25 * one + 0.75 * two, atol=1e-14)
    assert sim.states[2] == {}


def test_the_message_is_phi_and_nothing_else() -> None:
    method = small(kind=Watched)
    sim = Simulation(method, conv_net().float(), nn.functional.cross_entropy, [
        ClientData(c.x.float(), c.y, c.test_x.float(), c.test_y) for c in CLIENTS
    ])  # fmt: skip
    sim.run(1)
    p = 3 * 9 + 3 + 48 * 6 + 6
    numel = E * H + H + (H + 1) * p
    heads = [f"{layer}.{kind}" for layer in CONV for kind in ("weight", "bias")]
    assert [s.name for s in method.shared(sim.session.space)] == [
        "hidden.weight", "hidden.bias", *(f"{name}.U" for name in heads), *(f"{name}.c" for name in heads)
    ]  # fmt: skip
    assert sim.tally.up == sim.tally.down == 3 * 4 * numel
    assert sim.tally.up / (3 * 4 * sim.session.space.numel) == method.multiplier(sim.session.space)
    for client, reply in method.seen[0].items():
        assert list(reply) == ["delta"]
        state = sim.states[client]
        theta = method.personal(sim.server, state, client)[:p]
        for own in (state["v"], state["h"], theta):
            assert own.untyped_storage().data_ptr() != reply["delta"].untyped_storage().data_ptr()
            windows = reply["delta"].unfold(0, len(own), 1)
            assert not bool((windows == own).all(1).any())


def test_what_the_client_returns_shares_no_storage_with_what_it_keeps() -> None:
    method = small()
    sim = simulated(method)
    state, reply = method.train({}, {"x": sim.server["x"]}, CLIENTS[0], context(sim))
    places = {t.untyped_storage().data_ptr() for t in (*state.values(), sim.local.theta, sim.server["x"])}
    assert reply["delta"].untyped_storage().data_ptr() not in places


def test_a_saved_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    whole = simulated(small(), sampler=Cyclic(count=2))
    whole.run(4)
    parts = simulated(small(), sampler=Cyclic(count=2))
    parts.run(2, checkpoint=tmp_path)
    resumed = simulated(small(), sampler=Cyclic(count=2))
    resumed.run(4, checkpoint=tmp_path)
    assert torch.equal(resumed.server["x"], whole.server["x"])
    assert all(torch.equal(resumed.states[i]["v"], whole.states[i]["v"]) for i in range(3))


# What a message gives away


def close(found: Tensor, true: Tensor, tolerance: float = 1e-6) -> bool:
    return float((found - true).norm()) <= tolerance * float(true.norm())


@pytest.mark.parametrize("max_norm", [None, 1e-2])
@pytest.mark.parametrize("init", ["paper", "target_scaled"])
def test_one_step_tells_extractor_gradient_and_embedding(init: str, max_norm: float | None) -> None:
    """From Phi and the message alone; what is compared is computed by the clients, apart."""
    local = replace(ONE, weight_decay=5e-4, max_norm=max_norm, momentum=0.5)
    method = small(local, Watched, init=init)
    sim = simulated(method)
    sim.run(1)
    net, units = method.hypernet(sim.session.space), []
    for client, reply in method.seen[0].items():
        found = leak(net, method.sent[0], reply["delta"], lr=local.lr, weight_decay=local.weight_decay)
        v = context(sim, client).stream("embedding").normal(E).double()
        weights = net.weights(method.sent[0])
        whole = torch.cat([weights.generate(v), sim.states[client]["h"]])
        g = sim.local.gradient(whole, CLIENTS[client].x, CLIENTS[client].y)[: net.generated.numel].clone()
        clipped = found.gradient.norm() / g.norm()
        assert clipped <= 1 if max_norm else clipped == pytest.approx(1)
        assert close(found.units, weights.units(v))
        assert close(found.theta, weights.generate(v))
        assert close(found.gradient, clipped * g)
        assert found.v is not None
        assert close(found.v, v)
        assert found.share == pytest.approx(1)
        towards, along = directions(net, method.sent[0], reply["delta"], lr=local.lr, weight_decay=5e-4)
        assert float((towards * g).sum().abs() / g.norm()) == pytest.approx(1, abs=1e-6)
        assert close(along, weights.units(v) / weights.units(v).norm())
        units.append(found.units)
    assert min(float((units[a] - units[b]).norm()) for a, b in ((0, 1), (0, 2), (1, 2))) > 1e-2


def test_one_example_before_a_linear_layer_is_read_off_the_message() -> None:
    one = some(5, 1)
    method = small(ONE, Watched)
    sim = simulated(method, [one], mlp)
    sim.run(1)
    net = method.hypernet(sim.session.space)
    _, gradients = leak(net, method.sent[0], method.seen[0][0]["delta"], lr=ONE.lr).tensors()
    x = first_input(gradients, "1.weight", "1.bias")
    psnr = -10 * math.log10(float((x - one.x.flatten()).square().mean()))
    assert psnr > 60


def test_more_steps_blur_the_leak_a_little() -> None:
    for epochs, share, error in ((5, 0.98, 0.1), (60, 0.9, 0.2)):
        local = LocalSGD(lr=0.02, epochs=epochs, batch_size=100, momentum=0.5, weight_decay=5e-4)
        method = small(local, Watched)
        sim = simulated(method, CLIENTS[:1])
        sim.run(1)
        net = method.hypernet(sim.session.space)
        found = leak(net, method.sent[0], method.seen[0][0]["delta"], lr=epochs * local.lr, weight_decay=5e-4)
        v = context(sim).stream("embedding").normal(E).double()
        assert share < found.share < 1
        assert close(found.units, net.weights(method.sent[0]).units(v), error)


def test_the_classifier_is_not_in_the_message() -> None:
    """Two clients that differ in it alone send the same, where no gradient reaches the extractor."""
    sent = []
    for shift in (0.0, 1.0):
        method = small(replace(HEAVY, max_norm=None))
        sim = simulated(method, CLIENTS[:1], lambda: nn.Sequential(mlp()[:3], Deaf(), nn.Linear(8, 3).double()))
        v = torch.ones(E).double()
        _, reply = method.train({"v": v, "h": torch.full((27,), shift).double()}, {"x": sim.server["x"]}, CLIENTS[0], context(sim))  # fmt: skip  # noqa: E501
        sent.append(reply["delta"])
        with pytest.raises(ValueError, match="delta must hold a gradient; it is zero but for weight decay"):
            leak(method.hypernet(sim.session.space), sim.server["x"], torch.zeros_like(reply["delta"]), lr=0.1)
    assert torch.equal(*sent)
    assert bool(sent[0].any())  # weight decay


class Deaf(nn.Module):
    """Features from which no gradient comes back."""

    def forward(self, x: Tensor) -> Tensor:
        return 0 * x


def test_what_is_observable_is_what_is_sent() -> None:
    for local in (ONE, replace(HEAVY, batch_size=100, epochs=3, max_norm=0.05)):
        method = small(local, Watched, head=replace(local, lr=0.3, epochs=2))
        sim = simulated(method, CLIENTS[:2])
        sim.run(2)
        before = sim.states[1]["v"], sim.states[1]["h"]
        params, sent = dict(zip(("v", "h"), (t.clone() for t in before), strict=True)), sim.server["x"]
        sim.run(3)
        ctx = replace(context(sim, 1), round=2)
        replay = method.observable(params, (CLIENTS[1].x, CLIENTS[1].y), ctx, {"x": sent})
        assert list(replay) == ["delta"]
        assert torch.allclose(replay["delta"], method.seen[2][1]["delta"], atol=1e-12)


def test_the_observable_is_differentiable_leaves_the_model_alone_and_maps() -> None:
    method = small(LocalSGD(0.05, steps=2, batch_size=9))
    sim = simulated(method)
    ctx, public = context(sim), {"x": sim.server["x"]}
    params = {"v": torch.ones(E).double(), "h": sim.session.initial[-21:]}
    batch = some(0, 2)
    kept = sim.local.theta.clone(), sim.local.module.training

    def seen(x: Tensor) -> Tensor:
        return method.observable(params, (x, batch.y), ctx, public)["delta"][::17]

    assert torch.autograd.gradcheck(seen, batch.x.clone().requires_grad_())
    many = vmap(seen)(torch.stack([batch.x, batch.x.flip(0)]))
    assert torch.allclose(many[1], seen(batch.x.flip(0)))
    assert torch.equal(sim.local.theta, kept[0])
    assert sim.local.module.training == kept[1]
    with pytest.raises(ValueError, match="batch must hold at most 8 examples, one minibatch; got 9"):
        method.observable(params, (CLIENTS[0].x[:9], CLIENTS[0].y[:9]), ctx, public)


# HyperFL-LPM


class Block(nn.Module):
    """A transformer's block of the ViT kind, without attention."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, u: Tensor) -> Tensor:
        return u + self.mlp(self.norm(u)).relu()


class Vit(nn.Module):
    def __init__(self, width: int = 32, depth: int = 2) -> None:
        super().__init__()
        self.patches = nn.Linear(9, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        u = self.patches(x.unfold(2, 3, 3).unfold(3, 3, 3).reshape(len(x), 4, 9))
        for block in self.blocks:
            u = block(u)
        return u.mean(1)


class Resnet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer1, self.layer2 = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer2(self.layer1(x).relu()).relu().mean((2, 3))


def vit() -> nn.Module:
    torch.manual_seed(0)
    backbone = adapt(Vit(), block_adapters({f"blocks.{i}": 32 for i in range(2)}))
    return nn.ModuleDict({"backbone": backbone, "head": nn.Linear(32, 3)})


def resnet() -> nn.Module:
    torch.manual_seed(0)
    backbone = adapt(Resnet(), stage_adapters({"layer1": 4, "layer2": 6}))
    return nn.ModuleDict({"backbone": backbone, "neck": nn.Linear(6, 5), "head": nn.Linear(5, 3)})


class Chain(nn.Module):
    """The modules of a dictionary one after another."""

    def __init__(self, parts: nn.Module) -> None:
        super().__init__()
        self.parts = parts

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts.values():  # type: ignore[operator]
            x = part(x)
        return x


BLOCK = ("down.weight", "down.bias", "up.weight", "up.bias", "norm.weight", "norm.bias")
STAGE = ("before.weight", "before.bias", "conv.weight", "after.weight", "after.bias")


@pytest.mark.parametrize(
    ("build", "private", "expected", "numel"),
    [
        (vit, ("parts.head",), [f"blocks.{i}.1.{t}" for i in range(2) for t in BLOCK], 2 * (128 + 2 + 3 * 32)),
        (resnet, ("parts.neck", "parts.head"), [f"layer{i}.1.{t}" for i in (1, 2) for t in STAGE], 52 + 4 * 10),
    ],
)  # fmt: skip
def test_adapters_are_generated_and_the_backbone_is_frozen(
    build: Callable[[], nn.Module], private: tuple[str, ...], expected: list[str], numel: int
) -> None:
    model = Chain(build())
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen
    method = small(private=private, init="paper")
    net = method.hypernet(ParamSpace.of(model))
    assert [s.name for s in net.generated] == [f"parts.backbone.{name}" for name in expected]
    assert net.generated.numel == numel
    assert {s.name.rpartition(".")[0] for s in net.own} == set(private)
    data = [ClientData(c.x.float(), c.y, c.test_x.float(), c.test_y) for c in CLIENTS]
    sim = Simulation(method, model, nn.functional.cross_entropy, data, buffers="local")
    sim.run(2)
    assert sim.tally.up == 2 * 3 * net.nbytes
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)
    assert bool((sim.states[0]["h"] != sim.session.initial[-len(sim.states[0]["h"]) :]).all())
    state = sim.states[0]
    outputs = [
        sim.local.outputs(method.personal(sim.server, {**state, "v": v}, 0), data[0].x)
        for v in (state["v"], -state["v"])
    ]
    assert float((outputs[0] - outputs[1]).abs().max()) > 1e-3


def test_an_adapter_computes_what_the_paper_says() -> None:
    torch.manual_seed(0)
    (block,) = block_adapters({"b": 32}).values()
    u = torch.randn(4, 3, 32)
    z = block.norm(block.up(torch.relu(block.down(u))))  # type: ignore[operator]
    assert torch.equal(block(u), u + z)
    assert block.down.weight.shape == (2, 32)  # type: ignore[union-attr]
    (stage,) = stage_adapters({"s": 4}).values()
    x = torch.randn(8, 4, 3, 3)
    y = stage(x)
    before = nn.functional.batch_norm(x, None, None, training=True)
    mixed = x + torch.einsum("oi,bihw->bohw", stage.conv.weight[:, :, 0, 0], before)  # type: ignore[index,union-attr]
    assert torch.allclose(y, nn.functional.batch_norm(mixed, None, None, training=True), atol=1e-5)


def test_adapters_for_modules_that_are_not_there_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"adapters must name submodules of the backbone \(layer1, layer2\); got"
    ):
        adapt(Resnet(), stage_adapters({"layer3": 4}))
    with pytest.raises(ValueError, match="adapters must name one submodule or more; got none"):
        adapt(Resnet(), {})
    with pytest.raises(
        ValueError, match=r"adapters must not lie inside one another; got 'blocks\.0' and 'blocks'"
    ):
        adapt(Vit(), block_adapters({"blocks": 32, "blocks.0": 32}))
    with pytest.raises(ValueError, match=r"reduction must be in 1 \.\. width = 8; got 16"):
        block_adapters({"b": 8})
    with pytest.raises(ValueError, match="width must be >= 1; got 0"):
        stage_adapters({"s": 0})


# What is refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embedding": 0}, "embedding must be >= 1; got 0"),
        ({"hidden": 0}, "hidden must be >= 1; got 0"),
        ({"init": "zero"}, "init must be one of target_scaled, paper; got 'zero'"),
        ({"scale": -1.0}, "scale must be >= 0 and finite; got -1.0"),
        ({"scale": math.nan}, "scale must be >= 0 and finite; got nan"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HyperFL(**change)


@pytest.mark.parametrize(
    ("private", "message"),
    [
        (0, "generated must leave the classifier to its client and hold everything else; it holds 6 of 6"),
        (3, "private must leave something to generate; got 3"),
        (("6",), "private must name layers or tensors of the model"),
    ],
)
def test_a_classifier_that_is_nothing_everything_or_not_there_is_refused(private: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        simulated(small(private=private))


def test_a_classifier_tied_to_the_extractor_is_refused() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 36), nn.Linear(36, 36)).double()
    model[2].weight = model[1].weight
    sim = simulated(small(private=("2",)), CLIENTS, lambda: model)
    with pytest.raises(
        ClientError, match=r"private must share no tensor with the rest .* '2.weight' and '1.weight'"
    ):
        sim.run(1)


def test_a_hypernetwork_of_other_sizes_is_refused() -> None:
    space = ParamSpace({"a": (3,), "b": (2,)})
    with pytest.raises(
        ValueError, match=r"generated must hold tensors of the model; 'a' of shape \(4,\) is none"
    ):
        HyperNet(space, ParamSpace({"a": (4,)}))
    with pytest.raises(ValueError, match="embedding must be >= 1; got 0"):
        HyperNet(space, ParamSpace({"a": (3,)}), embedding=0)
    net = HyperNet(space, ParamSpace({"a": (3,)}), 2, 2)
    with pytest.raises(
        ValueError, match=r"phi must have E H \+ H \+ \(H \+ 1\) P entries, E = 2 and H = 2; got"
    ):
        net.weights(torch.zeros(net.numel - 1))
    with pytest.raises(ValueError, match="lr must be > 0 and finite; got 0"):
        leak(net, torch.zeros(net.numel), torch.ones(net.numel), lr=0)
    with pytest.raises(ValueError, match="bias must name a tensor with a gradient; that of 'b' is zero"):
        first_input({"a": torch.zeros(2, 3), "b": torch.zeros(2)}, "a", "b")


def test_the_model_is_a_local_model_for_any_loss() -> None:
    """Its pieces work outside a simulation, as in a loop of one's own."""
    method, data = small(), CLIENTS[0]
    local = LocalModel(conv_net(), nn.functional.cross_entropy)
    net = method.hypernet(local.space)
    phi = net.initial(local.theta[: net.generated.numel], stream(0, "phi"), "target_scaled", 0.05)
    ctx = ClientContext(0, 0, 0, [len(data)], local, local.theta.clone())
    state, reply = method.train({}, {"x": phi}, data, ctx)
    assert reply["delta"].shape == phi.shape
    assert set(state) == {"v", "h"}
