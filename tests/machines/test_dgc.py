"""DGC in one process: the card's exact properties, and bad input."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from cograd.core import transforms
from cograd.core.codecs import Context, Float16, Float64, Int32, count_for
from cograd.core.space import ParamSpace
from cograd.engines.exchange import GradientError
from cograd.engines.simulate import Simulation
from cograd.machines import DGC, DensityWarmup
from cograd.machines.baselines import GradientDropping
from cograd.models import shapes

F64 = torch.float64


def alone(dgc: DGC, shape: tuple[int, ...] = (30, 20), members: int = 1) -> DGC:
    dgc.bind(ParamSpace({"w": shape}), members, 0, dtype=F64)
    return dgc


def sparse_step(dgc: DGC, gradient: Tensor) -> Tensor:
    """One step through the sparse path whatever the density, for a lone worker."""
    segment = dgc.space["w"]
    transforms.run(dgc.local, gradient, dgc.state, segment.offset)
    return dgc.decode([dgc.encode()]).clone()


def gradients(steps: int, numel: int, seed: int = 0) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(numel, dtype=F64, generator=draw) for _ in range(steps)]


def sgd(start: Tensor, grads: list[Tensor], momentum: float, nesterov: bool) -> Tensor:
    weight = nn.Parameter(start.clone())
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=momentum, nesterov=nesterov)
    for g in grads:
        weight.grad = g.clone()
        optimizer.step()
    return weight.detach()


@pytest.mark.parametrize("nesterov", [False, True])
def test_dense_limit_without_masking_is_momentum_sgd_bit_for_bit(nesterov: bool) -> None:
    dgc = alone(DGC(1.0, 0.9, nesterov=nesterov, masking=False, sample_ratio=1.0, values=Float64()))
    grads, w = gradients(50, 600), torch.ones(600, dtype=F64)
    for g in grads:
        w.add_(sparse_step(dgc, g), alpha=-0.1)
    assert torch.equal(w, sgd(torch.ones(600, dtype=F64), grads, 0.9, nesterov))


def test_dense_limit_with_masking_is_plain_sgd_bit_for_bit() -> None:
    dgc = alone(DGC(1.0, 0.9, masking=True, sample_ratio=1.0, values=Float64()))
    grads, w = gradients(50, 600), torch.ones(600, dtype=F64)
    for g in grads:
        w.add_(sparse_step(dgc, g), alpha=-0.1)
    assert torch.equal(w, sgd(torch.ones(600, dtype=F64), grads, 0.0, False))


@pytest.mark.parametrize("nesterov", [False, True])
def test_density_one_takes_the_dense_path_and_is_momentum_sgd_despite_masking(nesterov: bool) -> None:
    dgc = alone(DGC(1.0, 0.9, nesterov=nesterov))
    grads, w = gradients(50, 600), torch.ones(600, dtype=F64)
    for g in grads:
        assert dgc.dense
        dgc.feed("w", g, 1.0)
        w.add_(dgc.reduced(dgc.collect()), alpha=-0.1)
    assert torch.equal(w, sgd(torch.ones(600, dtype=F64), grads, 0.9, nesterov))


@pytest.mark.parametrize("masking", [False, True])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("values", [Float64(), Float16()])
def test_what_was_sent_and_what_is_kept_is_everything(masking: bool, nesterov: bool, values: object) -> None:
    """Conservation: sent so far + v = the sum of all velocities, elementwise, at every step."""
    dgc = alone(DGC(0.05, 0.9, masking=masking, nesterov=nesterov, values=values))  # type: ignore[arg-type]
    sent, owed = torch.zeros(600, dtype=F64), torch.zeros(600, dtype=F64)
    for g in gradients(40, 600):
        u = dgc.state["momentum"].clone()
        owed += 0.9 * (u + g) + g if nesterov else 0.9 * u + g
        sent += sparse_step(dgc, g)
        torch.testing.assert_close(sent + dgc.state["residual"], owed, atol=1e-12, rtol=0)


def constant_gradient(dgc: DGC, steps: int) -> float:
    """What has been sent of a constant gradient of 1 by step T if nothing was sent before."""
    dgc = alone(dgc, (1, 1))
    for _ in range(steps):
        transforms.run(dgc.local, torch.ones(1, dtype=F64), dgc.state)
    return float(dgc.decode([dgc.encode()]))


@pytest.mark.parametrize("steps", [1, 7, 1000])
def test_constant_gradient_closed_form(steps: int) -> None:
    m = 0.9
    expected = steps / (1 - m) - m * (1 - m**steps) / (1 - m) ** 2
    assert constant_gradient(DGC(0.5, m, masking=False, values=Float64()), steps) == pytest.approx(expected)


@pytest.mark.parametrize("steps", [1, 7, 1000])
def test_constant_gradient_under_gradient_dropping_is_the_gradients_sum(steps: int) -> None:
    dropping = GradientDropping(0.5, 0.9)
    assert constant_gradient(dropping, steps) == pytest.approx(float(steps))


def test_gradient_dropping_applies_the_momentum_after_the_sum() -> None:
    dropping = alone(GradientDropping(0.2, 0.9, sample_ratio=1.0))
    velocity, residual = torch.zeros(600, dtype=F64), torch.zeros(600, dtype=F64)
    for g in gradients(20, 600):
        residual += g
        top = residual.abs().topk(count_for(600, 0.2)).indices
        velocity *= 0.9
        velocity[top] += residual[top].float().double()
        residual[top] -= residual[top].float().double()
        torch.testing.assert_close(sparse_step(dropping, g), velocity, atol=1e-12, rtol=0)


def test_sample_ratio_one_sends_the_top_k_of_each_tensor() -> None:
    space = ParamSpace({"a": (200, 50), "bias": (50,), "b": (33, 7)})
    dgc = DGC(0.01, sample_ratio=1.0)
    dgc.bind(space, 1, 0)
    draw = torch.Generator().manual_seed(1)
    grads = {s.name: torch.randn(s.shape, generator=draw) for s in space}
    for name, g in grads.items():
        dgc.feed(name, g, 1.0)
    update = dgc.space.views(dgc.decode([dgc.encode()]))
    for name in ("a", "b"):
        top = grads[name].reshape(-1).abs().topk(count_for(grads[name].numel(), 0.01)).indices
        assert set(update[name].reshape(-1).nonzero().squeeze(1).tolist()) == set(top.tolist())
    assert torch.equal(update["bias"], grads["bias"])


def test_masking_zeroes_u_where_v_was_sent_and_nowhere_else() -> None:
    dgc = alone(DGC(0.05, 0.9, values=Float64()))
    for g in gradients(3, 600):
        transforms.run(dgc.local, g, dgc.state)
        before = dgc.state["momentum"].clone()
        sent = dgc.decode([dgc.encode()]) != 0
        assert int(sent.sum()) == 30
        assert bool((dgc.state["momentum"][sent] == 0).all())
        assert bool((dgc.state["residual"][sent] == 0).all())
        assert torch.equal(dgc.state["momentum"][~sent], before[~sent])


def test_four_epoch_warmup_is_the_papers() -> None:
    dgc = DGC(0.001, warmup=DensityWarmup(steps_per_stage=10))
    epochs = [dgc.density_at(10 * e) for e in range(7)]
    assert epochs == [0.25, 0.0625, 0.015625, 0.004, 0.001, 0.001, 0.001]
    assert [dgc.density_at(s) for s in (9, 10, 39, 40)] == [0.25, 0.0625, 0.004, 0.001]


@pytest.mark.parametrize(
    ("model", "ratio"), [(shapes.resnet50(), 276.7), (shapes.alexnet(), 597.7), (shapes.ptb_lstm(), 461.8)]
)
def test_byte_accounting_gives_the_papers_ratios(model: shapes.Shapes, ratio: float) -> None:
    assert round(DGC(0.001).upload(model).nominal_ratio, 1) == ratio


def test_byte_accounting_is_what_is_sent() -> None:
    space = ParamSpace({"a": (300, 40), "bias": (40,), "b": (10, 10)})
    dgc = DGC(0.01, sample_ratio=1.0)
    dgc.bind(space, 1, 0)
    for s in space:
        dgc.feed(s.name, torch.randn(s.shape, generator=torch.Generator().manual_seed(0)), 1.0)
    upload = dgc.upload(space)
    assert len(dgc.encode()) == upload.payload == 6 * (120 + 1) + 4 * 40
    assert upload.dense == 4 * (12000 + 40 + 100)


def test_small_tensors_travel_dense_if_asked() -> None:
    upload = DGC(0.01, min_numel=200).upload({"a": (300, 40), "b": (10, 10)})
    assert upload.payload == 6 * 120 + 400


@pytest.mark.parametrize("members", [1, 4])
def test_local_clipping_scales_the_threshold_by_the_root_of_n(members: int) -> None:
    dgc = DGC(clip_norm=2.0)
    dgc.bind(ParamSpace({"w": (4, 4)}), members, 0)
    threshold = 2.0 / math.sqrt(members)
    assert dgc.scale(threshold / 2) == 1.0
    assert dgc.scale(10 * threshold) == pytest.approx(0.1)


def test_dense_steps_clip_the_sum() -> None:
    dgc = alone(DGC(1.0, 0.0, clip_norm=2.0), members=4)
    assert dgc.scale(100.0) == 1.0
    assert float(dgc.reduced(torch.full((600,), 5.0, dtype=F64)).norm()) == pytest.approx(2.0)


def loss_of(model: nn.Module) -> object:
    return lambda batch: nn.functional.mse_loss(model(batch[0]), batch[1])


def simulation(exchanges: list[DGC], decay: float = 0.0, lr: float = 0.05) -> Simulation:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    return Simulation(model, torch.optim.SGD(model.parameters(), lr=lr, weight_decay=decay), exchanges)


def batches(steps: int, workers: int) -> list[list[tuple[Tensor, Tensor]]]:
    draw = torch.Generator().manual_seed(5)

    def batch() -> tuple[Tensor, Tensor]:
        return torch.randn(4, 6, generator=draw, dtype=F64), torch.randn(4, 3, generator=draw, dtype=F64)

    return [[batch() for _ in range(workers)] for _ in range(steps)]


def trained(sim: Simulation, steps: list[list[tuple[Tensor, Tensor]]]) -> Tensor:
    for step in steps:
        sim.step(loss_of(sim.model), step)  # type: ignore[arg-type]
    return nn.utils.parameters_to_vector(sim.model.parameters()).detach()


def reference(
    steps: list[list[tuple[Tensor, Tensor]]], decay: float, nesterov: bool, lr: float = 0.05
) -> Tensor:
    """One process, all workers' samples in one batch, torch's own momentum SGD."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9, nesterov=nesterov, weight_decay=decay)
    for step in steps:
        x, y = (torch.cat(parts) for parts in zip(*step, strict=True))
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
    return nn.utils.parameters_to_vector(model.parameters()).detach()


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("workers", [1, 3, 4])
def test_dense_workers_with_weight_decay_are_momentum_sgd(nesterov: bool, workers: int) -> None:
    steps = batches(30, workers)
    got = trained(simulation([DGC(1.0, nesterov=nesterov) for _ in range(workers)], decay=0.01), steps)
    torch.testing.assert_close(got, reference(steps, 0.01, nesterov), atol=1e-12, rtol=0)


def everything(nesterov: bool, warmup: DensityWarmup | None = None) -> DGC:
    """The sparse path with every entry sent."""
    return DGC(0.999999, nesterov=nesterov, masking=False, warmup=warmup, sample_ratio=1.0, values=Float64())


@pytest.mark.parametrize("nesterov", [False, True])
def test_weight_decay_has_its_momentum_on_the_sparse_path_too(nesterov: bool) -> None:
    """Sending (almost) everything without masking is momentum SGD, decay included."""
    steps = batches(30, 3)
    workers = [everything(nesterov) for _ in range(3)]
    got = trained(simulation(workers, decay=0.01), steps)
    torch.testing.assert_close(got, reference(steps, 0.01, nesterov), atol=1e-12, rtol=0)


@pytest.mark.parametrize("nesterov", [False, True])
def test_hand_over_from_dense_to_sparse_keeps_the_velocity(nesterov: bool) -> None:
    """After 10 dense steps the sparse path, with everything sent and no masking, goes on as momentum SGD."""
    steps = batches(30, 3)
    warmup = DensityWarmup(10, stages=(1.0,))
    workers = [everything(nesterov, warmup) for _ in range(3)]
    got = trained(simulation(workers), steps)
    torch.testing.assert_close(got, reference(steps, 0.0, nesterov), atol=1e-12, rtol=0)


def test_gradient_dropping_hands_over_its_velocity_too() -> None:
    steps = batches(30, 3)
    warmup = DensityWarmup(10, stages=(1.0,))
    workers = [GradientDropping(0.999999, warmup=warmup, sample_ratio=1.0) for _ in range(3)]
    got = trained(simulation(list(workers)), steps)
    torch.testing.assert_close(got, reference(steps, 0.0, False), atol=1e-6, rtol=0)


def test_a_checkpoint_continues_bit_for_bit() -> None:
    steps = batches(20, 2)
    sim = simulation([DGC(0.1, warmup=DensityWarmup(4)) for _ in range(2)])
    whole = trained(sim, steps)
    first = simulation([DGC(0.1, warmup=DensityWarmup(4)) for _ in range(2)])
    trained(first, steps[:9])
    second = simulation([DGC(0.1, warmup=DensityWarmup(4)) for _ in range(2)])
    second.model.load_state_dict(first.model.state_dict())
    for new, old in zip(second.exchanges, first.exchanges, strict=True):
        new.load_state_dict(old.state_dict())
    assert torch.equal(trained(second, steps[9:]), whole)


def test_dropping_the_residual_changes_the_run() -> None:
    """So that the test above cannot pass with an empty checkpoint."""
    steps = batches(20, 2)
    whole = trained(simulation([DGC(0.1) for _ in range(2)]), steps)
    first = simulation([DGC(0.1) for _ in range(2)])
    trained(first, steps[:9])
    first.exchanges[1].state["residual"].zero_()  # type: ignore[attr-defined]
    assert not torch.equal(trained(first, steps[9:]), whole)


@pytest.mark.parametrize("members", [1, 2, 5])
def test_resharding_keeps_the_sums(members: int) -> None:
    sim = simulation([DGC(0.1) for _ in range(3)])
    trained(sim, batches(8, 3))
    old = [{**e.state_dict(), "decay": None} for e in sim.exchanges]
    new = DGC.reshard(old, members)
    assert new[-1]["decay"] is None
    assert [s["party"] for s in new] == list(range(members))
    for slot in ("momentum", "residual"):
        for name in ("0.weight", "2.weight"):
            before, after = (sum(s[slot][name] for s in states) for states in (old, new))
            torch.testing.assert_close(after, before, atol=1e-12, rtol=0)
    assert torch.equal(new[0]["momentum"]["0.bias"], old[0]["momentum"]["0.bias"])
    wider = simulation([DGC(0.1) for _ in range(members)])
    for exchange, state in zip(wider.exchanges, new, strict=True):
        exchange.load_state_dict(state)
    trained(wider, batches(2, members))


def test_foreign_state_is_refused() -> None:
    one = alone(DGC(0.1), members=2)
    state = one.state_dict()
    with pytest.raises(ValueError, match=r"2 workers, this run has 1.*reshard"):
        alone(DGC(0.1)).load_state_dict(state)
    with pytest.raises(ValueError, match="worker 1; this is worker 0"):
        alone(DGC(0.1), members=2).load_state_dict({**state, "party": 1})
    with pytest.raises(ValueError, match="other parameters"):
        alone(DGC(0.1), (20, 30), members=2).load_state_dict(state)
    with pytest.raises(ValueError, match="each once"):
        DGC.reshard([state, state], 4)
    with pytest.raises(ValueError, match="members must be >= 1; got 0"):
        DGC.reshard([state], 0)
    with pytest.raises(ValueError, match="different steps"):
        DGC.reshard([state, {**state, "party": 1, "round": 7}], 4)


def test_indices_may_be_written_in_full() -> None:
    dgc = alone(DGC(0.05, indices=Int32(), values=Float64()))
    update = sparse_step(dgc, gradients(1, 600)[0])
    assert len(update.nonzero()) == 30
    assert dgc.upload(dgc.space).payload == 30 * 12


def test_a_gradient_that_is_not_finite_is_refused_and_changes_nothing() -> None:
    sim = simulation([DGC(0.1) for _ in range(2)])
    steps = batches(4, 2)
    trained(sim, steps[:3])
    weights = nn.utils.parameters_to_vector(sim.model.parameters()).detach().clone()
    states = [{k: v.clone() for k, v in e.state.items()} for e in sim.exchanges]  # type: ignore[attr-defined]
    good, (x, y) = steps[3]
    with pytest.raises(GradientError, match=r"worker 1: the gradient of '0.weight' holds NaN or infinity"):
        sim.step(loss_of(sim.model), [good, (x * float("nan"), y)])  # type: ignore[arg-type]
    assert torch.equal(nn.utils.parameters_to_vector(sim.model.parameters()), weights)
    for exchange, state in zip(sim.exchanges, states, strict=True):
        assert all(torch.equal(exchange.state[k], v) for k, v in state.items())  # type: ignore[attr-defined]


def test_sparse_gradients_are_refused_by_name() -> None:
    model = nn.Embedding(10, 4, sparse=True)
    sim = Simulation(model, torch.optim.SGD(model.parameters(), lr=0.1), [DGC(0.1)])
    with pytest.raises(GradientError, match="worker 0: the gradient of 'weight' is sparse"):
        sim.step(lambda batch: model(batch).sum(), [torch.tensor([1, 2])])


def test_a_failed_exchange_forgets_nothing() -> None:
    """Encoding alone clears neither v nor u: the payload can be made again."""
    dgc = alone(DGC(0.05, values=Float64()))
    transforms.run(dgc.local, gradients(1, 600)[0], dgc.state)
    residual = dgc.state["residual"].clone()
    payload = bytes(dgc.encode())
    assert torch.equal(dgc.state["residual"], residual)
    assert bytes(dgc.encode()) == payload


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (lambda: DGC(0.0), r"density must be in \(0, 1\]; got 0"),
        (lambda: DGC(1.5), r"density must be in \(0, 1\]; got 1.5"),
        (lambda: DGC(float("nan")), r"density must be in \(0, 1\]; got nan"),
        (lambda: DGC(momentum=1.0), r"momentum must be in \[0, 1\); got 1"),
        (lambda: DGC(momentum=-0.1), r"momentum must be in \[0, 1\); got -0.1"),
        (lambda: DGC(clip_norm=0.0), "clip_norm must be a positive number or None; got 0"),
        (lambda: DGC(min_numel=-1), "min_numel must be >= 0; got -1"),
        (lambda: DGC(sample_ratio=0.0), r"ratio must be in \(0, 1\]; got 0"),
        (lambda: DensityWarmup(0), "steps_per_stage must be >= 1; got 0"),
        (lambda: DensityWarmup(5, (0.5, 2.0)), r"density must be in \(0, 1\]; got 2"),
        (lambda: DensityWarmup(5, (0.5, 1.0)), "cannot return to density 1"),
        (lambda: DGC(1.0, warmup=DensityWarmup(5)), "density 1 after a warm-up that was sparse"),
        (
            lambda: DGC().bind(ParamSpace({"w": (2, 2)}), 4, 4),
            "members - 1 = 3; got 4",
        ),
        (lambda: Simulation(nn.Linear(2, 2), torch.optim.SGD([torch.zeros(1)]), []), "exchanges must hold one"),
        (lambda: simulation([DGC()]).step(lambda b: b, []), "one batch a worker, 1; got 0"),
        (lambda: alone(DGC(0.1), members=2).decode([b""]), "payloads of all 2 parties are needed; got 1"),
    ],
)
def test_bad_arguments_are_named(bad: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bad()  # type: ignore[operator]


def test_the_samples_start_is_drawn_by_seed_round_and_party() -> None:
    dgc = DGC(seed=3)
    dgc.bind(ParamSpace({"w": (2, 2)}), 4, 2)
    assert dgc._context(1) == Context(3, 0, 1)
