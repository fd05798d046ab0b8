"""DIFF2 in one process: the card's exact properties, its accounting, and bad input."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call

from cograd.core.ledger import Budget, BudgetExceeded, Ledger
from cograd.core.streams import stream
from cograd.engines.exchange import GradientError
from cograd.machines import BVRLocalSGD, Diff2, Diff2Plan, GDRoutine
from cograd.machines.diff2.accounting import PrivacySpent, Releases, epsilon_of, rho_of
from cograd.machines.diff2.clipping import Mean, PerRecord, clip_
from cograd.machines.diff2.noise import SecureNoise, StreamNoise

F64 = torch.float64
Records = tuple[Tensor, Tensor]


def squared(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return (model(x).squeeze(-1) - y).square() / 2


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5), nn.Softplus(), nn.Linear(5, 1)).double()


def data(sizes: list[int], seed: int = 0) -> list[Records]:
    draw = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(n, 4, dtype=F64, generator=draw), torch.randn(n, dtype=F64, generator=draw)) for n in sizes
    ]


def plan(**changes: Any) -> Diff2Plan:
    """A private plan for three workers, changed where a test says so."""
    chosen: dict[str, Any] = {
        "rounds": 12,
        "restart_every": 4,
        "epsilon": 3.0,
        "delta": 1e-3,
        "clip": 1.0,
        "diff_clip": 2.0,
        "records": [30, 40, 50],
        "routine": GDRoutine(0.1),
        "release": "aggregate",
    }
    return Diff2Plan(**{**chosen, **changes})


def exact(**changes: Any) -> Diff2Plan:
    """The same without noise and clipping."""
    return plan(**{"epsilon": math.inf, "clip": math.inf, "diff_clip": math.inf, **changes})


@pytest.fixture(autouse=True)
def _unstable_plans_are_fine_here() -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"plan\.stability")
        yield


def made(of: Diff2Plan, **options: Any) -> Diff2:
    return Diff2(net(), squared, data(list(of.records)), of, **options)


def ran(diff2: Diff2, rounds: int | None = None) -> Diff2:
    for _ in range(diff2.plan.rounds if rounds is None else rounds):
        diff2.step()
    return diff2


def full_gradient(diff2: Diff2, x: Tensor, workers: list[Records]) -> Tensor:
    """f's gradient by autograd, f the mean over workers of the mean over records."""
    weights = {n: v.clone().requires_grad_() for n, v in diff2.space.views(x).items()}
    model = diff2.per_record.model
    losses = [(functional_call(model, weights, (a,)).squeeze(-1) - b).square().mean() / 2 for a, b in workers]
    value = torch.stack(losses).mean()
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(value, list(weights.values()))])


# 1, 2: what it is without noise, and with T = 1.


@pytest.mark.parametrize("restart_every", [1, 4, 100])
@pytest.mark.parametrize("cache", [False, True])
def test_without_noise_and_clipping_it_is_gradient_descent(restart_every: int, cache: bool) -> None:
    of = exact(restart_every=restart_every)
    workers = data(list(of.records))
    diff2 = Diff2(net(), squared, workers, of, cache=cache, chunk=7)
    x = diff2.x.clone()
    for _ in range(of.rounds):
        gradient = full_gradient(diff2, x, workers)
        diff2.step()
        torch.testing.assert_close(diff2.v, gradient, rtol=1e-9, atol=1e-12)
        x = x - 0.1 * gradient
        torch.testing.assert_close(diff2.x, x, rtol=1e-9, atol=1e-12)
    assert torch.equal(nn.utils.parameters_to_vector(diff2.per_record.model.parameters()).detach(), diff2.x)


@pytest.mark.parametrize("release", ["aggregate", "message"])
def test_restarting_every_round_is_dp_gd_bit_for_bit(release: str) -> None:
    of = plan(restart_every=1, release=release)
    diff2, workers = ran(made(of)), data(list(of.records))
    reference = PerRecord(net(), squared)
    x = nn.utils.parameters_to_vector(net().parameters()).detach()
    z = math.sqrt(of.rounds / (2 * rho_of(3.0, 1e-3) * (1 - 1e-9)))
    for round in range(of.rounds):
        messages = []
        for worker, records in enumerate(workers):
            gradients = reference.rows(records, x)
            clip_(gradients, of.clip)
            n = len(records[0])
            sigma = 2 * z / n if release == "message" else math.sqrt(3) * 2 * z / (30 * 3)
            noise = stream(0, "diff2", "noise", round, worker).normal(len(x)).double()
            messages.append((gradients.sum(0) / n).add_(noise, alpha=sigma))
        x = x.sub(((messages[0] + messages[1]) + messages[2]) / 3, alpha=0.1)
    assert torch.equal(diff2.x, x)


def test_kinds_of_rounds() -> None:
    kinds = [made(plan()).plan.kind(r) for r in range(6)]
    assert kinds == ["full", "difference", "difference", "difference", "full", "difference"]
    assert [info.kind for info in (made(plan(rounds=2, restart_every=1)).step() for _ in range(2))] == [
        "full"
    ] * 2
    assert (plan(restart_every=12).restarts(), plan(restart_every=99).restarts()) == (1, 1)
    assert plan(restart_every=99).restart_every == 12
    assert (plan(restart_every=5).restarts(), plan(restart_every=5).differences()) == (3, 9)


def test_a_restart_drops_the_estimate_of_the_block_before() -> None:
    diff2 = ran(made(plan()), 4)
    other = ran(made(plan()), 4)
    other.v += 1e3
    diff2.step()
    other.step()
    assert torch.equal(diff2.v, other.v)


# 3: sensitivity.


class Dot(nn.Module):
    """<w, a>: with a loss linear in it, a record's gradient is whatever the record says."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(size, dtype=F64))

    def forward(self, a: Tensor) -> Tensor:
        return a @ self.w


def linear(model: nn.Module, a: Tensor) -> Tensor:
    return model(a)  # type: ignore[no-any-return]


def quadratic(model: nn.Module, a: Tensor, b: Tensor) -> Tensor:
    """Gradient <w, a> b + ...: its difference between w and 0 is <w, a> b + <w, b> a."""
    return model(a) * model(b)


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 6), clip=st.floats(0.01, 10), seed=st.integers(0, 10**6))
def test_replacing_a_record_moves_a_mean_by_at_most_two_clips_over_n(n: int, clip: float, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(n, 3, dtype=F64, generator=draw) * 10 for _ in range(2))
    other = [t.clone() for t in (a, b)]
    for t in other:
        t[-1] = torch.randn(3, dtype=F64, generator=draw) * 100
    now, before = (torch.randn(3, dtype=F64, generator=draw) for _ in range(2))
    per_record, radius = PerRecord(Dot(3), quadratic), clip * float((now - before).norm())
    change = per_record.mean((a, b), now, clip).vector - per_record.mean(other, now, clip).vector
    assert float(change.norm()) <= 2 * clip / n * (1 + 1e-9)
    one, two = (per_record.difference(records, now, before, radius).vector for records in ((a, b), other))
    assert float((one - two).norm()) <= 2 * radius / n * (1 + 1e-9)


def test_an_adversary_attains_the_bounds() -> None:
    per_record, e = PerRecord(Dot(3), linear), torch.tensor([1.0, 0, 0], dtype=F64)
    rest = torch.randn(4, 3, dtype=F64)
    pair = [per_record.mean([torch.cat([rest, s * e[None]])], torch.zeros_like(e), 0.5).vector for s in (9, -9)]
    assert float((pair[0] - pair[1]).norm()) >= 0.99 * 2 * 0.5 / 5
    per_record = PerRecord(Dot(3), quadratic)
    for_difference = [
        per_record.difference((10 * e[None], 10 * s * e[None]), e, 0 * e, 0.5).vector for s in (1, -1)
    ]
    assert float((for_difference[0] - for_difference[1]).norm()) >= 0.99 * 2 * 0.5


def test_clipping_the_two_gradients_apart_breaks_the_bound_of_a_difference() -> None:
    """A gradient that turns round between two near points: each is within the clip, their difference is not."""
    e, step = torch.tensor([1.0, 0, 0], dtype=F64), 1e-3
    per_record, radius = PerRecord(Dot(3), quadratic), 2.0 * 2 * step

    def apart(a: Tensor, b: Tensor) -> Tensor:
        now, before = (per_record.mean((a, b), w, 2.0).vector for w in (step * e, -step * e))
        return now - before

    records = [(1e4 * e[None], 1e4 * s * e[None]) for s in (1, -1)]
    assert float((apart(*records[0]) - apart(*records[1])).norm()) > 100 * 2 * radius
    jointly = [per_record.difference(r, step * e, -step * e, radius).vector for r in records]
    assert float((jointly[0] - jointly[1]).norm()) <= 2 * radius * (1 + 1e-9)


# 4, 6, 7: noise.


class Wide(Dot):
    def __init__(self) -> None:
        super().__init__(200_000)
        with torch.no_grad():
            self.w[:4] = 1.0


def flat(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """A gradient of zero in every coordinate, whatever the weights."""
    return 0 * model(torch.zeros(1, 200_000, dtype=F64))


@pytest.mark.parametrize("release", ["aggregate", "message"])
def test_noise_with_zero_gradients_is_what_the_plan_says(release: str) -> None:
    of = plan(rounds=2, restart_every=2, release=release)
    diff2 = Diff2(Wide(), flat, data(list(of.records)), of)
    first = diff2.step()
    v, three_errors = diff2.v.clone(), 3 / math.sqrt(2 * 200_000)
    assert float(v.std()) == pytest.approx(of.sigma1, rel=three_errors)
    second = diff2.step()
    assert (first.distance, second.distance) == (0.0, first.step_norm)
    assert float((diff2.v - v).std()) == pytest.approx(of.sigma2 * second.distance, rel=three_errors)


@pytest.mark.parametrize("release", ["aggregate", "message"])
def test_noise_is_the_cards_formula(release: str) -> None:
    of, rho = plan(release=release), rho_of(3.0, 1e-3)
    z1, z2 = math.sqrt(3 / rho), math.sqrt(9 / rho)
    if release == "message":
        assert of.worker_sigma1(1) == pytest.approx(2 * z1 / 40)
        assert of.worker_sigma2(2) == pytest.approx(2 * 2 * z2 / 50)
        assert of.sigma2 == pytest.approx(math.sqrt(sum((2 * 2 * z2 / n) ** 2 for n in (30, 40, 50))) / 3)
    else:
        assert of.sigma1 == pytest.approx(2 * z1 / (30 * 3))
        assert of.worker_sigma2(0) == of.worker_sigma2(2) == pytest.approx(math.sqrt(3) * of.sigma2)
    even = plan(records=[40, 40, 40], release=release)
    assert even.sigma1 * (1 if release == "aggregate" else 1 / math.sqrt(3)) == pytest.approx(2 * z1 / 120)


def test_the_estimate_is_unbiased_and_its_variance_adds_up_over_the_block() -> None:
    """Given the path of x: the mean of v is the gradient, its variance that of all noises since the restart."""
    of = plan(rounds=3, restart_every=3, clip=1e3, diff_clip=1e3, epsilon=50.0, release="message")
    workers = data(list(of.records))
    path = ran(Diff2(net(), squared, workers, exact(rounds=3, restart_every=3)))
    points = [path.before, path.x]
    truth = full_gradient(path, points[1], workers)
    variance = (of.sigma1**2 + (of.sigma2 * float((points[1] - points[0]).norm())) ** 2) * torch.ones_like(
        truth
    )

    diff2 = Diff2(net(), squared, workers, of)
    for name in ("mean", "difference"):
        setattr(diff2.per_record, name, once(getattr(diff2.per_record, name)))

    def estimate(seed: int) -> Tensor:
        diff2.noise, diff2.round = StreamNoise(seed), 0
        diff2.x = diff2.before = points[0].clone()
        diff2.step()
        diff2.before, diff2.x = points[0].clone(), points[1].clone()
        diff2.step()
        return diff2.v

    runs = torch.stack([estimate(seed) for seed in range(2000)])
    assert float(((runs.mean(0) - truth) / (variance / len(runs)).sqrt()).abs().max()) < 4
    ratio = float((runs - truth).square().mean() / variance.mean())
    assert ratio == pytest.approx(1, abs=4 * math.sqrt(2 / runs.numel()))


def once(compute: Callable[..., Mean]) -> Callable[..., Mean]:
    """Each worker's first clipped mean, again and again: at the same points it does not depend on the seed."""
    known: dict[int, Mean] = {}

    def found(records: Records, *args: Any) -> Mean:
        if id(records) not in known:
            known[id(records)] = compute(records, *args)
        return known[id(records)]._replace(vector=known[id(records)].vector.clone())

    return found


def test_at_rest_nothing_is_added() -> None:
    """D = 0: no difference and no noise, instead of 0 / 0."""
    diff2 = ran(made(plan()), 1)
    diff2.before = diff2.x.clone()
    v = diff2.v.clone()
    assert diff2.step().distance == 0
    assert torch.equal(diff2.v, v)


# 5: accounting.


def test_budgets_of_the_card() -> None:
    assert rho_of(3, 1e-5) == pytest.approx(0.17348, abs=5e-6)
    assert rho_of(5, 1e-5) == pytest.approx(0.44962, abs=5e-6)


@settings(max_examples=60, deadline=None)
@given(epsilon=st.floats(0.01, 50), delta=st.floats(1e-12, 0.1))
def test_rho_and_epsilon_are_inverse(epsilon: float, delta: float) -> None:
    assert epsilon_of(rho_of(epsilon, delta), delta) == pytest.approx(epsilon)


@pytest.mark.parametrize("epsilon", [1.0, 3.0, 5.0])
@pytest.mark.parametrize("restart_every", [1, 7, 300])
def test_dp_accounting_agrees(epsilon: float, restart_every: int) -> None:
    of = plan(rounds=300, restart_every=restart_every, epsilon=epsilon, delta=1e-5)
    spent = of.spent()
    assert spent.epsilon() == pytest.approx(epsilon, rel=1e-8)
    assert spent.epsilon() <= epsilon
    assert spent.second_opinion("zcdp") == pytest.approx(epsilon, abs=1e-2)
    assert spent.second_opinion("pld") <= spent.second_opinion("rdp") <= epsilon
    assert spent.second_opinion("pld") > 0.7 * epsilon


def test_rho_adds_up_and_falls_with_the_square_of_the_noise() -> None:
    one, two = Releases(3, 2.0), Releases(5, 7.0)
    assert PrivacySpent((one, two), 1e-5).rho == pytest.approx(one.rho + two.rho)
    assert one.rho == 3 / 8
    twice = PrivacySpent((Releases(3, 4.0), Releases(5, 14.0)), 1e-5)
    assert twice.rho == pytest.approx(PrivacySpent((one, two), 1e-5).rho / 4)


def test_epsilon_depends_on_rounds_alone() -> None:
    """Not on the data, so not on D; in message mode not on the number of workers either."""
    one, many = plan(records=[30], release="message"), plan(records=[30] * 9, release="message")
    assert one.multipliers == many.multipliers
    assert one.spent(7).epsilon() == many.spent(7, 5).epsilon()
    assert one.worker_sigma2(0) == many.worker_sigma2(3)


def test_the_budget_is_spent_round_by_round_and_kept() -> None:
    ledger = Ledger(Budget({"epsilon": 3.0}))
    diff2 = made(plan(), ledger=ledger)
    seen = [0.0]
    for _ in range(12):
        diff2.step()
        seen.append(ledger.worked("epsilon", 1))
        assert seen[-1] == pytest.approx(diff2.spent(1).epsilon())
    assert seen == sorted(seen)
    assert seen[-1] == pytest.approx(3.0)
    assert ledger.worked("grad", 2) == 50 * (3 * 1 + 9 * 2)
    with pytest.raises(RuntimeError, match="all 12 rounds of the plan are done"):
        diff2.step()


def test_a_round_that_the_budget_does_not_pay_for_changes_nothing() -> None:
    diff2 = made(plan(), ledger=Ledger(Budget({"epsilon": 2.0})))
    with pytest.raises(BudgetExceeded, match="budget of 2 epsilon"):
        ran(diff2)
    x, round = diff2.x.clone(), diff2.round
    with pytest.raises(BudgetExceeded):
        diff2.step()
    assert torch.equal(diff2.x, x)
    assert diff2.round == round < 12
    assert diff2.spent().epsilon() <= 2.0


def test_reporting_the_clipped_share_ends_the_privacy() -> None:
    assert made(plan()).step().clipped is None
    diff2 = made(plan(clip=1e-9, diff_clip=1e9), report_clipped=True)
    assert diff2.spent().epsilon() == 0
    assert diff2.step().clipped == 1.0
    assert diff2.step().clipped == 0.0
    assert diff2.spent().epsilon() == diff2.ledger.worked("epsilon", 0) == math.inf
    assert diff2.spent().second_opinion("rdp") == math.inf


def test_without_privacy_epsilon_is_infinite() -> None:
    diff2 = ran(made(exact()), 2)
    assert diff2.spent().epsilon() == math.inf
    assert (exact().sigma1, exact().sigma2, exact().stability(50)) == (0, 0, 0)


def test_stability_is_the_growth_of_the_noise() -> None:
    of = plan()
    assert of.stability(31) == pytest.approx(4 * 31 * (0.1 * of.sigma2) ** 2)
    assert of.stability(31, lr=0.2) == pytest.approx(4 * of.stability(31))
    explosive = plan(diff_clip=1e3)
    warnings.simplefilter("always")
    with pytest.warns(UserWarning, match=r"plan\.stability is .* above 1"):
        made(explosive)


def test_sampling_is_accounted_for_by_the_rounds_a_worker_is_selected_in() -> None:
    of = plan(routine=BVRLocalSGD(0.1, 10, 4, 2.0), delta=1e-3)
    counts = of.selections()
    assert counts == tuple(sum(of.selected(r) == w for r in range(12)) for w in range(3))
    assert sum(counts) == 12
    for worker, count in enumerate(counts):
        spent = of.spent(worker=worker)
        local = spent.releases[2]
        assert (local.count, local.batch, local.records) == (3 * count, 10, of.records[worker])
        assert spent.epsilon() <= 3.0
        assert spent.epsilon() < epsilon_of(spent.rho, 1e-3)
        assert spent.second_opinion("rdp") == pytest.approx(spent.epsilon(), rel=2e-2)
    assert max(of.spent(worker=w).epsilon() for w in range(3)) > 2.95
    assert of.sigma3 == pytest.approx(2 * 2.0 * of.multipliers[2] / 10)
    rho = rho_of(3.0, 1e-3) / 3
    assert of.spent().releases[0].rho == pytest.approx(rho)
    assert of.spent().releases[1].rho == pytest.approx(rho)
    with pytest.raises(ValueError, match="no sampling without replacement"):
        of.spent().second_opinion("pld")


def test_a_batch_of_everything_gains_nothing() -> None:
    whole, most = Releases(5, 3.0, 40, 40), Releases(5, 3.0, 39, 40)
    assert not whole.sampled
    assert PrivacySpent((whole,), 1e-5).epsilon() == epsilon_of(5 / 18, 1e-5)
    assert PrivacySpent((most,), 1e-5).epsilon() <= epsilon_of(5 / 18, 1e-5)


def test_without_dp_accounting_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(ImportError, match=r"pip install 'cograd\[privacy\]'"):
        plan().spent().second_opinion("rdp")
    assert plan().spent().epsilon() == pytest.approx(3.0)


# 8: BVR-L-SGD.


def test_one_local_step_is_gd() -> None:
    bvr = ran(made(plan(routine=BVRLocalSGD(0.1, 10, 1, 1.0))))
    assert torch.equal(bvr.x, ran(made(plan())).x)


def test_full_batches_without_noise_are_k_gradient_steps() -> None:
    bvr = exact(rounds=3, restart_every=2, records=[40], routine=BVRLocalSGD(0.1, 40, 5, math.inf))
    gd = exact(rounds=15, restart_every=1, records=[40])
    torch.testing.assert_close(ran(made(bvr)).x, ran(made(gd)).x, rtol=1e-9, atol=1e-12)


def test_local_steps_are_the_cards_recursion() -> None:
    of = plan(routine=BVRLocalSGD(0.1, 10, 4, 2.0), rounds=2)
    diff2, workers = ran(made(of), 1), data(list(of.records))
    before, worker = diff2.x.clone(), of.selected(1)
    diff2.step()
    reference, w, u = PerRecord(net(), squared), diff2.v, [before, before - 0.1 * diff2.v]
    for step in (1, 2, 3):
        rows = StreamNoise(0).batch(of.records[worker], 10, 1, worker, step)
        assert len(set(rows.tolist())) == 10
        distance = float((u[-1] - u[-2]).norm())
        gradients = reference.rows([t[rows] for t in workers[worker]], u[-1])
        gradients -= reference.rows([t[rows] for t in workers[worker]], u[-2])
        clip_(gradients, 2.0 * distance)
        noise = StreamNoise(0).normal(len(w), 1, worker, step).double()
        w = w + gradients.mean(0) + of.sigma3 * distance * noise
        u.append(u[-1] - 0.1 * w)
    torch.testing.assert_close(diff2.x, u[-1], rtol=1e-9, atol=1e-12)


def test_a_random_local_iterate_is_one_of_the_path() -> None:
    last, random = (BVRLocalSGD(0.1, 10, 6, 2.0, output) for output in ("last", "random"))  # type: ignore[arg-type]
    steps = [random._steps((0, round)) for round in range(200)]
    assert set(steps) == set(range(1, 7))
    assert last._steps((0, 0)) == 6
    of = plan(routine=random, rounds=1)
    same = plan(routine=BVRLocalSGD(0.1, 10, steps[0], 2.0), rounds=1)
    assert torch.equal(ran(made(of)).v, ran(made(same)).v)


# 9: clipped means.


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 9),
    chunk=st.integers(1, 9),
    clip=st.floats(0.01, 100),
    scale=st.floats(0.1, 10),
    seed=st.integers(0, 10**6),
)
def test_clipped_mean(n: int, chunk: int, clip: float, scale: float, seed: int) -> None:
    a = torch.randn(n, 3, dtype=F64, generator=torch.Generator().manual_seed(seed))
    a[0] = 0
    per_record, x = PerRecord(Dot(3), linear, chunk), torch.zeros(3, dtype=F64)
    norms = a.norm(dim=1)
    factors = torch.where(norms > clip, clip / norms, 1.0)
    found = per_record.mean([a], x, clip)
    torch.testing.assert_close(found.vector, (factors[:, None] * a).mean(0))
    assert found.clipped == int((norms > clip).sum())
    torch.testing.assert_close(per_record.mean([a], x, float(norms.max()) * (1 + 1e-9)).vector, a.mean(0))
    scaled = per_record.mean([scale * a], x, scale * clip)
    torch.testing.assert_close(scaled.vector, scale * found.vector)


def test_a_clip_is_over_the_whole_vector() -> None:
    model, (records,) = net(), data([9])
    gradients = PerRecord(model, squared).rows(
        records, nn.utils.parameters_to_vector(model.parameters()).detach()
    )
    assert gradients.shape == (9, 31)
    for i, row in enumerate(gradients):
        loss = squared(model, records[0][i : i + 1], records[1][i : i + 1])
        expected = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss.sum(), list(model.parameters()))])
        torch.testing.assert_close(row, expected)
    clip_(gradients, 0.01)
    assert float(gradients.norm(dim=1).max()) == pytest.approx(0.01)


def test_a_radius_of_zero_gives_zero() -> None:
    rows = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    assert clip_(rows, 0.0) == 1
    assert torch.equal(rows, torch.zeros(2, 2))


def test_tied_and_frozen_parameters() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(4, 4, bias=False).double() for _ in range(3))
            self.b.weight = self.a.weight
            self.c.weight.requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.b(self.a(x).tanh())).sum(1)  # type: ignore[no-any-return]

    torch.manual_seed(0)
    model, (records,) = Tied(), data([5])
    x = model.a.weight.detach().reshape(-1).clone()
    mean = PerRecord(model, squared).mean(records, x, math.inf).vector
    loss = squared(model, *records).mean()
    torch.testing.assert_close(mean, torch.autograd.grad(loss, model.a.weight)[0].reshape(-1))


# 10 and what else a user sees.


@pytest.mark.parametrize("steps", [1, 4])
def test_bytes_are_two_vectors_a_worker_and_round_and_two_more_for_local_steps(steps: int) -> None:
    local = BVRLocalSGD(0.1, 10, steps, 2.0)
    diff2 = made(plan(rounds=5, routine=local))
    infos = [diff2.step() for _ in range(5)]
    vector, rounds, workers = 31 * 8, 5, 3
    expected = 2 * rounds * workers * vector + (2 * rounds * vector if steps > 1 else 0)
    assert diff2.ledger.sent() == expected == sum(info.bytes for info in infos)
    assert diff2.ledger.sent(0) >= rounds * vector


def test_the_cache_halves_the_evaluations_and_changes_no_bit() -> None:
    plain, cached = ran(made(plan())), ran(made(plan(), cache=True))
    assert torch.equal(plain.x, cached.x)
    assert cached.ledger.worked("grad", 0) == 30 * 12
    assert plain.ledger.worked("grad", 0) == 30 * (3 + 2 * 9)


@pytest.mark.parametrize("output", ["last", "random"])
def test_the_result_is_the_chosen_iterate(output: str) -> None:
    of = plan(output=output, seed=3)
    chosen = of.output_round
    assert (chosen == 12) == (output == "last")
    diff2 = ran(made(of), chosen - 1)
    with pytest.raises(
        RuntimeError, match=f"the result is the iterate of round {chosen}; this is {chosen - 1}"
    ):
        diff2.result()
    diff2.step()
    x = diff2.x.clone()
    ran(diff2, 12 - chosen)
    assert torch.equal(torch.cat([t.reshape(-1) for t in diff2.result().values()]), x)
    assert {plan(output="random", seed=s).output_round for s in range(200)} == set(range(1, 13))


def test_narrow_weights_have_wide_state() -> None:
    model = net().bfloat16()
    workers = [(x.bfloat16(), y.bfloat16()) for x, y in data([30, 40, 50])]
    diff2 = ran(Diff2(model, squared, workers, plan()), 5)
    assert diff2.v.dtype == diff2.x.dtype == torch.float32
    assert torch.equal(nn.utils.parameters_to_vector(model.parameters()).detach(), diff2.x.bfloat16())


def test_a_moving_target_is_followed() -> None:
    """It learns: the loss of a private run on easy data falls to a tenth."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 4, dtype=F64, generator=draw)
    y = x @ torch.tensor([1.0, -1, 0.5, 0], dtype=F64)
    model = nn.Linear(4, 1).double()
    with torch.no_grad():
        model.weight.zero_()
        model.bias.zero_()
    workers = [(x[:2000], y[:2000]), (x[2000:], y[2000:])]
    of = plan(rounds=40, restart_every=20, records=[2000, 2000], clip=5.0, diff_clip=10.0, delta=1e-5)
    before = float(squared(model, x, y).mean().detach())
    ran(Diff2(model, squared, workers, of))
    assert float(squared(model, x, y).mean().detach()) < before / 10


# Noise sources.


def test_secure_noise_is_standard_normal_and_never_the_same() -> None:
    noise = SecureNoise()
    values = noise.normal(200_000)
    assert values.dtype == F64
    assert float(values.mean()) == pytest.approx(0, abs=5 / math.sqrt(200_000))
    assert float(values.std()) == pytest.approx(1, abs=5 / math.sqrt(400_000))
    assert float((values.abs() > 1.96).double().mean()) == pytest.approx(
        0.05, abs=5 * math.sqrt(0.0475 / 200_000)
    )
    assert not torch.equal(values, noise.normal(200_000))
    assert noise.normal(3).shape == (3,)
    batch = noise.batch(50, 20)
    assert batch.tolist() == sorted(set(batch.tolist()))
    assert len(batch) == 20
    assert int(batch.max()) < 50


def test_secure_runs_differ_and_stream_runs_do_not() -> None:
    assert torch.equal(ran(made(plan()), 2).x, ran(made(plan()), 2).x)
    one, two = (ran(made(plan(), noise="secure"), 2) for _ in range(2))
    assert not torch.equal(one.x, two.x)
    assert not torch.equal(ran(made(plan()), 2).x, ran(made(plan(seed=1)), 2).x)


# Checkpoints.


@pytest.mark.parametrize("routine", [GDRoutine(0.1), BVRLocalSGD(0.1, 10, 3, 2.0)])
@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("stop", [3, 6])
def test_a_checkpoint_continues_bit_for_bit(routine: Any, cache: bool, stop: int) -> None:
    of = plan(routine=routine, output="random", seed=5)
    whole, first = ran(made(of, cache=cache)), ran(made(of, cache=cache), stop)
    second = made(of, cache=cache, ledger=Ledger())
    second.load_state_dict(first.state_dict())
    assert torch.equal(nn.utils.parameters_to_vector(second.per_record.model.parameters()).detach(), first.x)
    ran(second, 12 - stop)
    for key, value in whole.state_dict().items():
        other = second.state_dict()[key]
        same = (
            value == other
            if not isinstance(value, dict)
            else all(torch.equal(value[n], other[n]) for n in value)
        )
        assert same, key
    assert second.ledger.worked("epsilon", 0) == pytest.approx(whole.ledger.worked("epsilon", 0))


def test_foreign_state_is_refused_and_changes_nothing() -> None:
    diff2 = ran(made(plan()), 2)
    state, x = diff2.state_dict(), diff2.x.clone()
    with pytest.raises(ValueError, match="another plan"):
        made(plan(records=[30, 40])).load_state_dict(state)
    with pytest.raises(ValueError, match="another plan"):
        made(plan(epsilon=2.0)).load_state_dict(state)
    with pytest.raises(ValueError, match="other parameters"):
        diff2.load_state_dict({**state, "space": "none"})
    assert torch.equal(diff2.x, x)


# Bad input.


def refused_model(*layers: nn.Module) -> Callable[[], PerRecord]:
    return lambda: PerRecord(nn.Sequential(nn.Linear(4, 4), *layers), squared)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (lambda: plan(rounds=0), "rounds must be >= 1; got 0"),
        (lambda: plan(restart_every=0), "restart_every must be >= 1; got 0"),
        (lambda: plan(epsilon=0.0), r"epsilon must be > 0 \(inf: not private\); got 0"),
        (lambda: plan(epsilon=float("nan")), "epsilon must be > 0"),
        (lambda: plan(delta=0.0), r"delta must be in \(0, 1\); got 0"),
        (lambda: plan(delta=1.0), r"delta must be in \(0, 1\); got 1"),
        (lambda: plan(clip=0.0), "^clip must be > 0; got 0"),
        (lambda: plan(diff_clip=-1.0), "^diff_clip must be > 0; got -1"),
        (lambda: plan(clip=math.inf), "clip must be finite where epsilon is; got inf"),
        (lambda: plan(records=[]), r"records must hold a number >= 1 for each worker; got \(\)"),
        (lambda: plan(records=[3, 0]), r"records must hold a number >= 1 for each worker; got \(3, 0\)"),
        (lambda: plan(release="both"), "release must be 'aggregate' or 'message'; got 'both'"),
        (lambda: plan(output="best"), "output must be 'last' or 'random'; got 'best'"),
        (lambda: plan(routine=BVRLocalSGD(0.1, 31, 2, 1.0)), "batch_size must be at most .* 30; got 31"),
        (lambda: plan(routine=BVRLocalSGD(0.1, 3, 2, math.inf)), "diff_clip of the routine must be finite"),
        (lambda: GDRoutine(0.0), "lr must be a positive number; got 0"),
        (lambda: GDRoutine(math.inf), "lr must be a positive number; got inf"),
        (lambda: BVRLocalSGD(-1.0, 1, 1, 1.0), "lr must be a positive number; got -1"),
        (lambda: BVRLocalSGD(0.1, 0, 1, 1.0), "batch_size must be >= 1; got 0"),
        (lambda: BVRLocalSGD(0.1, 1, 0, 1.0), "steps must be >= 1; got 0"),
        (lambda: BVRLocalSGD(0.1, 1, 1, 0.0), "diff_clip must be > 0; got 0"),
        (lambda: BVRLocalSGD(0.1, 1, 1, 1.0, "best"), "output must be 'last' or 'random'; got 'best'"),  # type: ignore[arg-type]
        (lambda: made(plan(), noise="quiet"), "noise must be 'stream' or 'secure'; got 'quiet'"),
        (lambda: made(plan(), chunk=0), "chunk must be >= 1 or None; got 0"),
        (lambda: Diff2(net(), squared, data([30, 40]), plan()), "records of 3 workers here; got 2"),
        (
            lambda: Diff2(net(), squared, data([30, 40, 49]), plan()),
            r"worker 2 must have the plan's 50 .*\[49\]",
        ),
        (lambda: plan().spent().epsilon(0.0), r"delta must be in \(0, 1\); got 0"),
        (lambda: plan().spent().second_opinion("gdp"), "method must be 'zcdp', 'rdp' or 'pld'; got 'gdp'"),  # type: ignore[arg-type]
        (refused_model(nn.BatchNorm1d(4)), "no BatchNorm1d here, module '1': BatchNorm mixes records"),
        (refused_model(nn.SyncBatchNorm(4)), "no SyncBatchNorm here, module '1'"),
        (refused_model(nn.InstanceNorm1d(4, track_running_stats=True)), "no InstanceNorm1d here, module '1'"),
        (refused_model(nn.Dropout(0.1)), "no Dropout here, module '1': .*call eval"),
        (lambda: PerRecord(nn.Embedding(9, 4, sparse=True), squared), "no Embedding here, module ''"),
    ],
)
def test_bad_arguments_are_named(bad: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bad()


def test_dropout_that_is_off_and_norms_of_one_record_are_taken() -> None:
    PerRecord(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1)).eval(), squared)
    PerRecord(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Dropout(0.0)), squared)


def test_a_delta_that_would_allow_to_publish_a_record_is_warned_of() -> None:
    with pytest.warns(UserWarning, match="delta = 0.01 is not below 1 / .number of records. = 0.00833"):
        plan(delta=0.01)


class Centred(nn.Module):
    """A batch normalisation written by hand: no module gives it away."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 1).double()

    def forward(self, x: Tensor) -> Tensor:
        h = self.linear(x)
        return h - h.mean(0)  # type: ignore[no-any-return]


def test_losses_that_are_not_of_one_record_are_refused() -> None:
    with pytest.raises(ValueError, match="must treat records one by one"):
        Diff2(Centred(), squared, data([30, 40, 50]), plan())
    with pytest.raises(ValueError, match=r"loss must give one number for one record; got .* shape \(1, 5\)"):
        Diff2(net()[:1], lambda model, x, y: model(x), data([30, 40, 50]), plan())


@pytest.mark.parametrize("cache", [False, True])
def test_a_gradient_that_is_not_finite_is_refused_and_changes_nothing(cache: bool) -> None:
    workers = data([30, 40, 50])
    diff2, whole = (Diff2(net(), squared, workers, plan(), cache=cache) for _ in range(2))
    ran(whole)
    ran(diff2, 2)
    state = diff2.state_dict()
    clean = workers[1][0].clone()
    workers[1][0][7] = float("nan")
    with pytest.raises(
        GradientError, match="worker 1: round 2: the gradient of a record holds NaN or infinity"
    ):
        diff2.step()
    assert all(torch.equal(state["x"][n], t) for n, t in diff2.state_dict()["x"].items())
    assert diff2.round == 2
    workers[1][0].copy_(clean)
    ran(diff2, 10)
    assert torch.equal(diff2.x, whole.x)
    assert diff2.ledger.worked("epsilon", 0) == pytest.approx(3.0)
