"""DP-FedAvg and its personalised kin: clipped one by one, as noisy as promised, and what they are without."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cograd.clients.baselines import CENTAUR, PPSGD, DPFedAvg, FedAvg, FedPer, FedRep, Privacy
from cograd.clients.baselines.dp_fedavg import Poisson, per_example
from cograd.core.codecs import Float64
from cograd.core.streams import stream
from cograd.data.clients import ClientData
from cograd.engines.federated import ClientError, LocalModel, LocalSGD, Simulation
from cograd.engines.federated.protocol import ClientContext

LOCAL = LocalSGD(lr=0.1, epochs=2, batch_size=8, momentum=0.5, weight_decay=1e-2)
OPEN = Privacy(rounds=3, epsilon=math.inf, clip=1e6)
HEAD = 4 * 3 + 3


def some(client: int, n: int | None = None) -> ClientData:
    n = 16 + 8 * client if n is None else n
    x, y = stream(7, "private", client).normal(n, 1, 5, 5).double(), torch.arange(n) % 3
    return ClientData(x, y, x[:4], y[:4])


CLIENTS = [some(client) for client in range(2)]


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(18, 4), nn.Tanh(), nn.Linear(4, 3)).double()  # fmt: skip  # noqa: E501


def simulated(method: Any, rounds: int = 3, clients: Any = CLIENTS, **options: Any) -> Simulation:
    sim = Simulation(
        method, net(), nn.functional.cross_entropy, clients, up=Float64(), down=Float64(), **options
    )
    sim.run(rounds)
    return sim


def alike(one: Simulation, other: Simulation) -> bool:
    pairs = [[s.method.personal(s.server, s.states[k], k) for s in (one, other)] for k in range(len(CLIENTS))]
    return all(torch.allclose(a, b, atol=1e-12) for a, b in pairs)


# Special cases: without noise and clip the methods are those they are built on, on examples drawn one by one.


def test_without_noise_it_is_fedavg_on_minibatches_of_random_size() -> None:
    private = simulated(DPFedAvg(LOCAL, privacy=OPEN))

    class Scaled(FedAvg):
        """The sum over a minibatch divided by its expected size."""

        def train(self, state: Any, content: Any, data: Any, ctx: ClientContext) -> Any:
            def gradient(v: Tensor, x: Tensor, y: Tensor) -> Tensor:
                ctx.count("grad", 1)
                return ctx.model.gradient(v, x, y).mul_(len(x) / 8)

            return state, {
                "delta": Poisson(**vars(LOCAL)).run(ctx, data, content["x"], gradient) - content["x"]
            }

    plain = simulated(Scaled(LOCAL))
    assert alike(private, plain)
    assert private.tally.work == plain.tally.work


def test_full_batches_make_the_special_cases_exact() -> None:
    """With one minibatch that holds everything nothing is drawn."""
    data = [some(0, 16), some(1, 16)]
    local = replace(LOCAL, batch_size=16)
    for private, plain in (
        (DPFedAvg(local, privacy=OPEN), FedAvg(local)),
        (PPSGD(local, privacy=OPEN), FedPer(local)),
        (CENTAUR(local, head_epochs=2, privacy=OPEN), FedRep(local, head_epochs=2)),
        (PPSGD(local, private=0, privacy=OPEN), DPFedAvg(local, privacy=OPEN)),
    ):
        assert alike(simulated(private, clients=data), simulated(plain, clients=data))


def test_centaurs_head_has_a_rate_of_its_own() -> None:
    slow, fast = (simulated(CENTAUR(LOCAL, head_lr=lr, privacy=OPEN), 1) for lr in (None, 0.2))
    moved = [s.states[0]["h"] - s.session.initial[-HEAD:] for s in (slow, fast)]
    assert float(moved[1].norm()) > 1.2 * float(moved[0].norm())


# Clipping and noise


def test_gradients_of_single_examples_are_those_of_a_loop() -> None:
    model, data = LocalModel(net(), nn.functional.cross_entropy), some(0, 5)
    rows = per_example(model, model.theta, data.x, data.y)
    for row, x, y in zip(rows, data.x, data.y, strict=True):
        assert torch.allclose(row, model.gradient(model.theta, x[None], y[None]), atol=1e-12)
    assert per_example(model, model.theta, data.x[:0], data.y[:0]).shape == (0, len(model.theta))


def test_every_example_counts_for_at_most_the_clip() -> None:
    """One step on all examples: replacing one moves the sum by what it is clipped to, whatever it holds."""
    clip, local = 0.01, LocalSGD(lr=1.0, batch_size=16)
    one = some(0, 16)
    loud = ClientData(one.x.clone(), one.y, one.test_x, one.test_y)
    loud.x[0] *= 1e4
    ends = [
        simulated(DPFedAvg(local, privacy=replace(OPEN, clip=clip)), 1, [data]).server["x"]
        for data in (one, loud)
    ]
    rows = per_example(model := LocalModel(net(), nn.functional.cross_entropy), model.theta, one.x, one.y)
    expected = (rows * (clip / rows.norm(dim=1)).clamp_max(1.0)[:, None]).sum(0) / 16
    assert torch.allclose(model.theta - ends[0], expected, atol=1e-12)
    assert 0 < float((ends[0] - ends[1]).norm()) <= 2 * clip / 16 + 1e-12


@pytest.mark.parametrize("method", [DPFedAvg, PPSGD, CENTAUR])
def test_noise_has_the_promised_size_and_spares_what_is_private(method: Any) -> None:
    privacy = Privacy(rounds=1, epsilon=1.0, clip=1e-3)
    local = LocalSGD(lr=1.0, steps=40, batch_size=8)
    options: dict[str, Any] = {} if method is DPFedAvg else {"private": 1}
    if method is CENTAUR:
        options["head_epochs"] = 1
    silent, loud = (
        simulated(method(local, privacy=p, **options), 1, [some(0, 64)])
        for p in (replace(privacy, epsilon=math.inf), privacy)
    )
    sigma = privacy.multiplier(8 / 64, 40)
    drift = loud.server["x"] - silent.server["x"]  # gradients this short hardly move the model
    assert float(drift.std()) == pytest.approx(math.sqrt(40) * sigma * 1e-3 / 8, rel=0.15)
    if method is CENTAUR:
        assert torch.equal(loud.states[0]["h"], silent.states[0]["h"])


def test_sigma_is_the_least_that_keeps_the_promise() -> None:
    accounting = pytest.importorskip("dp_accounting")
    from dp_accounting.pld.pld_privacy_accountant import PLDAccountant
    from dp_accounting.rdp.rdp_privacy_accountant import RdpAccountant

    privacy = Privacy(rounds=40)
    sigma = privacy.multiplier(20 / 120, 40 * 18)

    def spent(accountant: Any, sigma: float) -> float:
        step = accounting.PoissonSampledDpEvent(20 / 120, accounting.GaussianDpEvent(sigma))
        return float(accountant().compose(step, 40 * 18).get_epsilon(1e-5))

    whole = [float(order) for order in range(2, 257)]
    assert spent(lambda: RdpAccountant(whole), sigma) <= 4.0
    assert spent(lambda: RdpAccountant(whole), 0.99 * sigma) > 4.0
    assert spent(PLDAccountant, sigma) <= 4.0
    assert Privacy(rounds=1, epsilon=8.0).multiplier(0.5, 10) < Privacy(rounds=1).multiplier(0.5, 10)
    assert Privacy(rounds=1, epsilon=math.inf).multiplier(0.5, 10) == 0


def test_sigma_covers_all_rounds_and_each_client_its_own_sampling(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def watched(self: Privacy, rate: float, steps: int) -> float:
        asked.append((rate, steps))
        return 0.0

    monkeypatch.setattr(Privacy, "multiplier", watched)
    simulated(DPFedAvg(LOCAL, privacy=Privacy(rounds=5)), 1, [some(0, 16), some(1, 20), some(2, 4)])
    assert asked == [(0.5, 5 * 4), (0.4, 5 * 6), (1.0, 5 * 2)]


def test_examples_are_drawn_one_by_one() -> None:
    local = Poisson(lr=0.1, steps=2000, batch_size=5)
    model = LocalModel(net(), nn.functional.cross_entropy)
    data = some(0, 20)
    ctx = ClientContext(0, 0, 0, [20], model, model.theta.clone())
    sizes = torch.tensor([len(y) for _, y in local.batches(ctx, data)]).double()
    assert float(sizes.mean()) == pytest.approx(5, abs=0.15)
    assert float(sizes.var()) == pytest.approx(20 * 0.25 * 0.75, rel=0.1)


def test_dropout_is_drawn_for_each_example_and_evaluation_is_without() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(25, 3)).double()
    sim = Simulation(
        DPFedAvg(LOCAL, privacy=OPEN), model, nn.functional.cross_entropy, CLIENTS, test=CLIENTS[0],
        up=Float64(), down=Float64(),
    )  # fmt: skip
    accuracies = [row.accuracy for row in sim.run(2)]
    assert accuracies[-1] == sim.accuracy(sim.server["x"]) == sim.accuracy(sim.server["x"])
    rows = per_example(
        sim.local, sim.local.theta, CLIENTS[0].x[:1].repeat(2, 1, 1, 1), CLIENTS[0].y[:1].repeat(2)
    )
    assert torch.equal(rows[0], rows[1])  # in evaluation mode, as it was left


# What is refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rounds": 0}, "rounds must be >= 1; got 0"),
        ({"epsilon": 0.0}, "epsilon must be > 0; got 0.0"),
        ({"delta": 1.0}, r"delta must be in \(0, 1\); got 1.0"),
        ({"clip": 0.0}, "clip must be > 0; got 0.0"),
    ],
)
def test_bad_privacy_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Privacy(**{"rounds": 3, **change})


@pytest.mark.parametrize("method", [DPFedAvg, PPSGD, CENTAUR])
def test_a_second_clip_and_rounds_beyond_the_plan_are_refused(method: Any) -> None:
    with pytest.raises(ValueError, match=r"local must have no max_norm: privacy clips; got 1\.0"):
        method(replace(LOCAL, max_norm=1.0), privacy=OPEN)
    with pytest.raises(ClientError, match="rounds must cover all rounds of the session; 3 are planned"):
        simulated(method(LOCAL, privacy=OPEN), 4)


def test_running_statistics_are_refused() -> None:
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(25), nn.Linear(25, 3)).double()
    sim = Simulation(DPFedAvg(LOCAL, privacy=OPEN), model, nn.functional.cross_entropy, CLIENTS, buffers="mean")
    with pytest.raises(ClientError, match="model must have no running statistics"):
        sim.run(1)


def test_without_dp_accounting_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(ImportError, match=r"pip install 'cograd\[privacy\]'"):
        Privacy(rounds=1, epsilon=3.21).multiplier(0.5, 10)
