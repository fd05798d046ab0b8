"""The linear sketch in one process: the operator's exact properties, the exchange, the federated variant."""

from __future__ import annotations

import io
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from cograd import data
from cograd.core.codecs import Context
from cograd.core.ledger import Ledger
from cograd.core.space import ParamSpace
from cograd.core.streams import stream
from cograd.engines.exchange import GradientError
from cograd.engines.simulate import Simulation
from cograd.machines import GaussianDP, LinearSketch, Sketch, SketchedFedAvg
from cograd.machines.baselines import FetchSGD
from cograd.machines.linear_sketch import hadamard
from cograd.machines.linear_sketch.federated import SketchServer
from cograd.machines.linear_sketch.kinds import _distinct
from cograd.machines.linear_sketch.sketch import KINDS

F64 = torch.float64
EVERY_KIND = pytest.mark.parametrize("kind", KINDS)


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


# The operator.


@EVERY_KIND
def test_sketch_and_desketch_are_unbiased(kind: str) -> None:
    sketch, h, draws = Sketch(64, 16, kind), numbers(64), 2500
    estimates = torch.stack([sketch.T(sketch(h, t), t) for t in range(draws)])
    error = (estimates.mean(0) - h) / (estimates.std(0) / math.sqrt(draws)).clamp_min(1e-12)
    assert float(error.abs().max()) < 5


@EVERY_KIND
def test_the_second_moment_is_its_closed_form(kind: str) -> None:
    """d = 6, b = 4, D = 8: four distinct values, for h = e_1, ones and a random one."""
    expected = {"gaussian": 2.75, "srht": 12 / 7, "random-k": 1.5}.get(kind, 2.25)
    sketch, draws, n = Sketch(6, 4, kind), stream(0, "moments"), 8000
    h = torch.stack([torch.eye(6)[0], torch.ones(6), numbers(6).float()]).double()
    matrices = torch.zeros(n, 6, 4, dtype=F64)
    for r in matrices:
        sketch._kind.apply(draws, torch.eye(6, dtype=F64), r)  # row i of r is R e_i
    estimates = torch.einsum("nij,nkj,hk->nhi", matrices, matrices, h)
    moments = estimates.square().sum(2).mean(0) / h.square().sum(1)
    assert 1 + sketch.omega == pytest.approx(expected)
    torch.testing.assert_close(moments, torch.full((3,), expected, dtype=F64), rtol=0.03, atol=0)


@given(st.sampled_from(KINDS), st.integers(1, 300), st.data())
@settings(max_examples=60, deadline=None)
def test_desketch_is_the_adjoint(kind: str, numel: int, draw: st.DataObject) -> None:
    rows = draw.draw(st.integers(1, numel))
    nonzeros = draw.draw(st.integers(1, rows)) if kind == "sparse" else None
    if kind == "sparse":
        nonzeros = min(rows, nonzeros or 1)
    sketch = Sketch(numel, rows, kind, seed=draw.draw(st.integers(0, 99)), nonzeros=nonzeros)
    x, y = numbers(2, numel, seed=1), numbers(2, rows, seed=2)
    left, right = (sketch(x, 5) * y).sum(1), (x * sketch.T(y, 5)).sum(1)
    scale = x.norm(dim=1) * y.norm(dim=1) * (numel / rows) ** 0.5
    assert float(((left - right) / scale).abs().max()) < 1e-12


@pytest.mark.parametrize("kind", ["srht", "countsketch", "sparse", "random-k"])
def test_desketch_is_the_adjoint_across_blocks(kind: str) -> None:
    """More columns than a block holds, and a transform in two passes."""
    sketch = Sketch(300_001, 2000, kind)
    x, y = numbers(300_001), numbers(2000)
    assert float(sketch(x, 1) @ y) == pytest.approx(float(x @ sketch.T(y, 1)), abs=1e-8)


def test_dense_kinds_draw_the_same_matrix_in_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cograd.machines.linear_sketch.kinds.TILE", 64)  # tiles of 64 entries of 150 columns
    for kind in ("gaussian", "ams"):
        sketch = Sketch(150, 7, kind)
        matrix = sketch.T(torch.eye(7, dtype=F64), 3)
        torch.testing.assert_close(sketch(torch.eye(150, dtype=F64), 3), matrix.t(), atol=1e-12, rtol=0)
        assert len(matrix.unique()) == (2 if kind == "ams" else 1050)


@EVERY_KIND
def test_entries_are_what_the_kind_says(kind: str) -> None:
    sketch = Sketch(40, 12, kind)
    matrix = sketch(torch.eye(40, dtype=F64), 2)  # row i is column i of R
    nonzero = (matrix != 0).sum(1)
    if kind in ("countsketch", "sparse"):
        s = 1 if kind == "countsketch" else 4
        assert bool((nonzero == s).all())
        torch.testing.assert_close(matrix[matrix != 0].abs(), torch.full((40 * s,), s**-0.5, dtype=F64))
    elif kind == "random-k":
        assert sorted(nonzero.tolist()) == [0] * 28 + [1] * 12
    else:
        assert bool((nonzero == 12).all())
    if kind in ("ams", "srht"):
        torch.testing.assert_close(matrix.abs(), torch.full((40, 12), 12**-0.5, dtype=F64))


@EVERY_KIND
def test_the_mean_of_sketches_is_the_sketch_of_the_mean(kind: str) -> None:
    sketch, x = Sketch(100, 20, kind), numbers(8, 100)
    torch.testing.assert_close(sketch(x, 4).mean(0), sketch(x.mean(0), 4), atol=1e-12, rtol=0)


def test_an_srht_with_as_many_rows_as_columns_loses_nothing() -> None:
    sketch, x = Sketch(64, 64, "srht"), numbers(64)
    assert sketch.omega == 0
    torch.testing.assert_close(sketch.T(sketch(x, 9), 9), x, atol=1e-12, rtol=0)


@EVERY_KIND
def test_the_bound_of_the_norm_holds_and_is_tight_without_padding(kind: str) -> None:
    sketch = Sketch(64, 16, kind)
    norm = float(torch.linalg.matrix_norm(sketch(torch.eye(64, dtype=F64), 0), 2))
    if kind in ("srht", "random-k"):
        assert norm == pytest.approx(sketch.norm)
        padded = Sketch(50, 16, kind)
        assert float(torch.linalg.matrix_norm(padded(torch.eye(50, dtype=F64), 0), 2)) <= padded.norm + 1e-9
    else:
        assert sketch.norm is None


DIGESTS = {
    "gaussian": "472950f5e50a1979",
    "ams": "01eda23b85d7703c",
    "srht": "8da90e7b7cf56bc6",
    "countsketch": "ef885119be196d6e",
    "sparse": "f0d1435a7cb47652",
    "random-k": "1c6bfd2580e3596f",
}


@EVERY_KIND
def test_r_is_the_same_on_every_machine(kind: str) -> None:
    """Known digests: they may change only together with the generator's id."""
    assert Sketch(1000, 100, kind, seed=7).digest(3) == DIGESTS[kind]


@EVERY_KIND
def test_r_depends_on_seed_and_round_and_nothing_else(kind: str) -> None:
    sketch, x = Sketch(1000, 100, kind, seed=1), numbers(1000)
    once = sketch(x, 2)
    sketch(x, 3)
    assert torch.equal(sketch(x, 2), once)
    assert torch.equal(Sketch(1000, 100, kind, seed=1)(x, 2), once)
    for other in (sketch(x, 3), Sketch(1000, 100, kind, seed=2)(x, 2)):
        assert not torch.equal(other, once)
    assert len({sketch.digest(2), sketch.digest(3), Sketch(1000, 100, kind, seed=2).digest(2)}) == 3


@pytest.mark.parametrize("kind", ["srht", "countsketch", "sparse", "random-k"])
def test_the_number_of_threads_changes_no_bit_of_the_desketch(kind: str) -> None:
    """That of the dense kinds is a matrix product, as the docstring says."""
    sketch, y = Sketch(300_000, 3000, kind), numbers(3000, dtype=torch.float32)
    threads = torch.get_num_threads()
    alone = sketch.T(y, 0)
    torch.set_num_threads(2)
    try:
        assert torch.equal(sketch.T(y, 0), alone)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@EVERY_KIND
def test_a_gpu_has_the_same_r(kind: str) -> None:
    sketch, x = Sketch(3000, 300, kind), numbers(3000)
    torch.testing.assert_close(sketch(x.cuda(), 1).cpu(), sketch(x, 1))
    y = sketch(x, 1)
    torch.testing.assert_close(sketch.T(y.cuda(), 1).cpu(), sketch.T(y, 1))


@EVERY_KIND
def test_both_directions_have_second_derivatives(kind: str) -> None:
    sketch = Sketch(12, 5, kind)
    x, y = numbers(12).requires_grad_(), numbers(5).requires_grad_()
    assert torch.autograd.gradcheck(lambda v: sketch(v, 1), (x,))
    assert torch.autograd.gradcheck(lambda v: sketch.T(v, 1), (y,))
    assert torch.autograd.gradgradcheck(lambda v: sketch(v.sin(), 1).square(), (x,))


def test_half_precision_is_sketched_in_float32() -> None:
    x = numbers(100).half()
    assert Sketch(100, 10)(x, 0).dtype == torch.float32
    assert torch.equal(Sketch(100, 10)(x, 0), Sketch(100, 10)(x.float(), 0))


def test_leading_axes_are_kept() -> None:
    sketch = Sketch(10, 3)
    assert sketch(numbers(2, 5, 10), 0).shape == (2, 5, 3)
    assert sketch.T(numbers(2, 5, 3), 0).shape == (2, 5, 10)


class Sizes(TorchDispatchMode):
    """Elements of every new tensor that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.made[storage.data_ptr()] = storage.nbytes() // tensor.element_size()
        return out


def test_an_srht_makes_one_vector_of_the_padded_size() -> None:
    sketch, x = Sketch(600_000, 1000), numbers(600_000, dtype=torch.float32)
    y = sketch(x, 0)
    for use, given_, out in ((sketch, x, 1000), (sketch.T, y, 600_000)):
        with Sizes() as sizes:
            use(given_, 0)
        made = sorted(n for ptr, n in sizes.made.items() if ptr != given_.untyped_storage().data_ptr())
        assert made[-1] == 2**20
        assert [n for n in made[:-1] if n > 2**17] == ([out] if out > 2**17 else [])


def test_a_large_transform_is_the_small_ones_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    x = numbers(2, 4096, dtype=torch.float32)
    whole = hadamard.fwht_(x.clone())
    monkeypatch.setattr(hadamard, "TILE", 1024)
    assert torch.equal(hadamard.fwht_(x.clone()), whole)
    monkeypatch.setattr(hadamard, "TILE", 512)
    assert torch.equal(hadamard.fwht_(x.clone()), whole)


@pytest.mark.parametrize("size", [1, 2, 8, 64])
def test_the_transform_is_the_hadamard_matrix(size: int) -> None:
    matrix = torch.ones(1, 1, dtype=F64)
    while len(matrix) < size:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=F64), matrix)
    torch.testing.assert_close(hadamard.fwht_(torch.eye(size, dtype=F64)), matrix, atol=0, rtol=0)


def test_a_transform_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="power of two of elements; got 6"):
        hadamard.fwht_(torch.zeros(1, 6))


@pytest.mark.parametrize(("n", "k"), [(10, 3), (10, 7), (5, 5), (1, 1), (1000, 499)])
def test_distinct_rows_are_distinct_and_equally_likely(n: int, k: int) -> None:
    draws, times = stream(0, "distinct", n, k), 400
    counts = torch.zeros(n)
    for _ in range(times):
        chosen = _distinct(draws, n, k)
        assert len(chosen) == k == len(chosen.unique())
        assert torch.equal(chosen, chosen.sort().values)
        counts[chosen] += 1
    p = k / n
    assert float((counts / times - p).abs().max()) <= 5 * math.sqrt(p * (1 - p) / times) + 1e-9


def test_the_suggested_step_and_the_bytes() -> None:
    sketch = Sketch(650, 65, "countsketch")
    assert sketch.omega == pytest.approx(649 / 65)
    assert sketch.suggest_lr(2.0) == pytest.approx(1 / ((1 + 649 / 65) * 2))
    assert sketch.suggest_lr(2.0, local_steps=5) == pytest.approx(sketch.suggest_lr(2.0) / 5)
    assert sketch.nbytes == 260


# The theory's rate, and the stall without fresh draws.


@pytest.mark.parametrize("kind", ["srht", "countsketch"])
def test_the_guaranteed_step_costs_one_plus_omega_rounds(kind: str) -> None:
    """A quadratic of condition 100 in a random basis, from a start to which all directions contribute alike."""
    basis, eigenvalues = torch.linalg.qr(numbers(60, 60)).Q, torch.logspace(0, -2, 60, dtype=F64)
    hessian = basis * eigenvalues @ basis.t()

    def rounds(advance: Any) -> int:
        w, t = basis @ eigenvalues.rsqrt(), 0
        goal = 1e-2 * float(w @ hessian @ w)
        while float(w @ hessian @ w) > goal:
            w, t = advance(w, t), t + 1
        return t

    dense, ratios = rounds(lambda w, t: w - hessian @ w), []
    for seed in range(3):
        sketch = Sketch(60, 15, kind, seed=seed)
        lr = sketch.suggest_lr(1.0)
        ratios.append(rounds(lambda w, t: w - lr * sketch.T(sketch(hessian @ w, t), t)) / dense)  # noqa: B023
    assert sum(ratios) / 3 == pytest.approx(1 + sketch.omega, rel=0.1)


def digits_gap(sketch: LinearSketch, rounds: int, step: float) -> float:
    """Share of the loss's fall that is missing after training softmax regression on digits."""
    train = data.load("digits", "train")
    x, y = train.x.flatten(1), train.y
    model = nn.Linear(64, 10)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    simulation = Simulation(model, torch.optim.SGD(model.parameters(), lr=1.0, weight_decay=0.01), [sketch])
    for group in simulation.optimizer.param_groups:
        group["lr"] = step * sketch.suggest_lr(5.72)
    for _ in range(rounds):
        simulation.step(lambda _: nn.functional.cross_entropy(model(x), y), [None])
    penalty = 0.005 * (model.weight.square().sum() + model.bias.square().sum())
    value = float((nn.functional.cross_entropy(model(x), y) + penalty).detach())
    return (value - 0.748361) / (math.log(10) - 0.748361)


def test_a_frozen_r_stalls_where_fresh_ones_do_not() -> None:
    fresh, fixed = (
        digits_gap(LinearSketch(65, "countsketch", redraw=redraw), 400, 16.0) for redraw in (True, False)
    )
    assert fresh < 0.01
    assert fixed > 10 * fresh
    assert fixed > 0.3


# The exchange, simulated.


def loss_of(model: nn.Module) -> Any:
    return lambda batch: nn.functional.mse_loss(model(batch[0]), batch[1])


def simulation(workers: int, decay: float = 0.0, **options: Any) -> Simulation:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    exchanges = [LinearSketch(options.pop("rows", 20), **options) for _ in range(workers)]
    return Simulation(model, torch.optim.SGD(model.parameters(), lr=0.05, weight_decay=decay), exchanges)


def batches(steps: int, workers: int) -> list[list[tuple[Tensor, Tensor]]]:
    return [
        [(numbers(4, 6, seed=9 * s + w), numbers(4, 3, seed=9 * s + w + 5)) for w in range(workers)]
        for s in range(steps)
    ]


def trained(sim: Simulation, steps: list[list[tuple[Tensor, Tensor]]]) -> Tensor:
    for step in steps:
        sim.step(loss_of(sim.model), step)
    return nn.utils.parameters_to_vector(sim.model.parameters()).detach()


@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum_acts_on_the_desketched_gradient(nesterov: bool) -> None:
    """The reference: torch's SGD, with momentum and decay, fed with R^T R of the mean gradient."""
    steps = batches(15, 3)
    sim = simulation(3, decay=0.01, momentum=0.9, nesterov=nesterov, kind="countsketch", seed=4)
    got = trained(sim, steps)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, 0.9, nesterov=nesterov, weight_decay=0.01)
    sketch = Sketch(83, 20, "countsketch", seed=4)
    for t, step in enumerate(steps):
        x, y = (torch.cat(parts) for parts in zip(*step, strict=True))
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        flat = torch.cat([p.grad.reshape(-1) for p in model.parameters()])  # type: ignore[union-attr]
        nn.utils.vector_to_parameters(sketch.T(sketch(flat, t), t), [p.grad for p in model.parameters()])
        optimizer.step()
    torch.testing.assert_close(
        got, nn.utils.parameters_to_vector(model.parameters()).detach(), atol=1e-12, rtol=0
    )


def test_gathered_bytes_give_the_same_update_as_a_sum() -> None:
    space = ParamSpace({"w": (30, 20)})
    parties = [LinearSketch(60, seed=1) for _ in range(3)]
    for party, exchange in enumerate(parties):
        exchange.bind(space, 3, party)
        exchange.feed("w", numbers(30, 20, seed=party), 1 / 3)
    payloads = [exchange.encode() for exchange in parties]
    assert [len(p) for p in payloads] == [240] * 3
    total = sum((exchange.collect() for exchange in parties[1:]), parties[0].collect())
    assert torch.equal(parties[0].decode(payloads), parties[1].reduced(total))


def test_a_step_costs_four_bytes_a_row() -> None:
    torch.manual_seed(0)
    model = nn.Linear(20, 5)
    sim = Simulation(model, torch.optim.SGD(model.parameters(), lr=0.1), [LinearSketch() for _ in range(4)])
    sim.step(loss_of(model), [(torch.ones(2, 20), torch.ones(2, 5))] * 4)
    assert [e.payload for e in sim.ledger] == [4 * 11] * 4  # a tenth of 105, rounded up


def test_a_checkpoint_continues_bit_for_bit_with_any_number_of_workers() -> None:
    steps = batches(16, 2)
    whole = trained(simulation(2, momentum=0.9), steps)
    first = simulation(2, momentum=0.9)
    trained(first, steps[:7])
    state = first.exchanges[0].state_dict()
    second = simulation(2, momentum=0.9)
    second.model.load_state_dict(first.model.state_dict())
    for exchange in second.exchanges:
        exchange.load_state_dict(state)
    assert torch.equal(trained(second, steps[7:]), whole)
    wider = simulation(5, momentum=0.9)
    for exchange in wider.exchanges:
        exchange.load_state_dict(state)
    trained(wider, batches(2, 5))


def test_losing_the_round_or_the_velocity_changes_the_run() -> None:
    steps = batches(16, 2)
    whole = trained(simulation(2, momentum=0.9), steps)
    for spoil in ("round", "velocity"):
        sim = simulation(2, momentum=0.9)
        trained(sim, steps[:7])
        for exchange in sim.exchanges:
            if spoil == "round":
                exchange.round = 0
            else:
                exchange.state["momentum"].zero_()  # type: ignore[attr-defined]
        assert not torch.equal(trained(sim, steps[7:]), whole)


def test_foreign_state_is_refused() -> None:
    plain, moving, other = LinearSketch(4), LinearSketch(4, momentum=0.9), LinearSketch(4)
    plain.bind(ParamSpace({"w": (3, 4)}), 1, 0)
    moving.bind(ParamSpace({"w": (3, 4)}), 1, 0)
    other.bind(ParamSpace({"w": (4, 3)}), 1, 0)
    with pytest.raises(ValueError, match="other parameters"):
        other.load_state_dict(plain.state_dict())
    with pytest.raises(ValueError, match=r"the state has no velocity, and this run's momentum is 0\.9"):
        moving.load_state_dict(plain.state_dict())
    with pytest.raises(ValueError, match=r"the state has a velocity, and this run's momentum is 0\.0"):
        plain.load_state_dict(moving.state_dict())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": 5}, r"the state's sketch is Sketch\(12, 4, 'srht', seed=0\); this run's is Sketch\(12, 5, "),
        ({"kind": "countsketch"}, "this run's is Sketch.12, 4, 'countsketch', seed=0"),
        ({"kind": "sparse", "nonzeros": 2}, "this run's is Sketch.12, 4, 'sparse', seed=0, nonzeros=2"),
        ({"seed": 3}, "this run's is Sketch.12, 4, 'srht', seed=3"),
        ({"redraw": False}, "the state's redraw is True; this run's is False"),
    ],
)
def test_a_state_of_another_r_is_refused(options: dict[str, Any], message: str) -> None:
    one, other = bound(rows=4, momentum=0.9), bound(**{"rows": 4, "momentum": 0.9, **options})
    one.feed("w", numbers(3, 4).float(), 1.0)
    one.reduced(one.collect())
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(one.state_dict())
    assert other.round == 0
    assert not bool(other.state["momentum"].any())


def test_parties_compare_r_and_not_only_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = LinearSketch(4), LinearSketch(4)
    one.bind(ParamSpace({"w": (3, 4)}), 1, 0)
    two.bind(ParamSpace({"w": (3, 4)}), 1, 0)
    assert one.schema.digest == two.schema.digest
    monkeypatch.setattr(two.sketch, "digest", lambda round: "0" * 16)  # another generator
    assert one.schema.digest != two.schema.digest


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    sim, steps = simulation(2, momentum=0.9), batches(3, 2)
    before = trained(sim, steps[:2])
    good, (x, y) = steps[2]
    with pytest.raises(GradientError, match=r"worker 1: the gradient of '0.weight' holds NaN or infinity"):
        sim.step(loss_of(sim.model), [good, (x * float("nan"), y)])
    assert torch.equal(nn.utils.parameters_to_vector(sim.model.parameters()).detach(), before)
    assert [e.round for e in sim.exchanges] == [2, 2]


# The federated variant.


def examples(client: int, size: int = 12, features: int = 7) -> tuple[Tensor, Tensor]:
    return numbers(size, features, seed=client), numbers(size, 8, seed=100 + client)


def federated(sketch: Sketch | None, clients: int = 3, sizes: Any = None, **options: Any) -> SketchedFedAvg:
    torch.manual_seed(1)
    model = nn.Linear(7, 8).double()  # 64 parameters
    given_ = [examples(c, n) for c, n in enumerate(sizes or [12] * clients)]
    options = {"lr": 0.1, "local_steps": 3, "noise_key": 5, **options}
    return SketchedFedAvg(model, given_, nn.functional.mse_loss, sketch=sketch, **options)


def after(fed: SketchedFedAvg, rounds: int) -> Tensor:
    for _ in range(rounds):
        fed.round()
    return fed.weights


@pytest.mark.parametrize("sizes", [[12, 12, 12], [12, 5, 7, 5]])
def test_without_loss_it_is_federated_averaging(sizes: list[int]) -> None:
    """SRHT with b = D = d; the reference trains client by client with torch's SGD."""
    got = after(federated(Sketch(64, 64), sizes=sizes, server_lr=0.7, weight_decay=0.1), 4)
    torch.manual_seed(1)
    model = nn.Linear(7, 8).double()
    for _ in range(4):
        start = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
        mean = torch.zeros(64, dtype=F64)
        for c, n in enumerate(sizes):
            nn.utils.vector_to_parameters(start.clone(), model.parameters())
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
            x, y = examples(c, n)
            for _ in range(3):
                optimizer.zero_grad()
                nn.functional.mse_loss(model(x), y).backward()
                optimizer.step()
            mean += n / sum(sizes) * (nn.utils.parameters_to_vector(model.parameters()).detach() - start)
        nn.utils.vector_to_parameters(start + 0.7 * mean, model.parameters())
    expected = nn.utils.parameters_to_vector(model.parameters()).detach()
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)


def test_one_local_step_is_the_exchanges_descent() -> None:
    """K = 1 with equal clients, and data-parallel workers with the same seed: the same trajectory."""
    fed = federated(Sketch(64, 16, "sparse", seed=3), local_steps=1)
    torch.manual_seed(1)
    model = nn.Linear(7, 8).double()
    workers = [LinearSketch(16, "sparse", seed=3) for _ in range(3)]
    sim = Simulation(model, torch.optim.SGD(model.parameters(), lr=0.1), workers)
    got = after(fed, 5)
    torch.testing.assert_close(trained(sim, [[examples(c) for c in range(3)]] * 5), got, atol=1e-12, rtol=0)


def test_the_model_follows_and_shares_weigh() -> None:
    fed = federated(None, shares=[0, 2, 2])
    fed.round()
    assert torch.equal(nn.utils.parameters_to_vector(fed.model.parameters()).detach(), fed.weights)
    other = federated(None, clients=3, shares=[5, 1, 1])
    other.round()
    assert not torch.equal(other.weights, fed.weights)
    assert fed.server.shares.tolist() == [0, 0.5, 0.5]


def test_the_server_holds_nothing_of_the_models_size() -> None:
    numel, rows = 1000, 30
    server = SketchServer(torch.ones(4, dtype=F64) / 4, 1.0)
    with Sizes() as sizes:
        for t in range(5):
            server.average(numbers(4, rows, seed=t))
    assert max(sizes.made.values()) <= 4 * rows < numel
    with pytest.raises(ValueError, match="sketches of all 4 clients are needed; got 3"):
        server.average(numbers(3, rows))


@EVERY_KIND
def test_who_missed_rounds_replays_them(kind: str) -> None:
    fed = federated(Sketch(64, 16, kind))
    start = fed.weights
    early = after(fed, 2)
    late = after(fed, 4)
    assert torch.equal(fed.replay(start, 0), late)
    assert torch.equal(fed.replay(early, 2), late)
    assert torch.equal(fed.replay(late, 6), late)
    with pytest.raises(ValueError, match=r"since must be in 0 .. 6, the rounds so far; got 7"):
        fed.replay(late, 7)


def test_a_round_costs_four_bytes_a_row_up_and_down() -> None:
    torch.manual_seed(0)
    ledger, clients = Ledger(), [(torch.ones(4, 7), torch.ones(4, 8))] * 3
    fed = SketchedFedAvg(
        nn.Linear(7, 8),
        clients,
        nn.functional.mse_loss,
        sketch=Sketch(64, 16),
        lr=0.1,
        local_steps=2,
        ledger=ledger,
    )
    after(fed, 5)
    up = [ledger.sent(client) for client in range(3)]
    down = [sum(e.payload for e in ledger if e.to == client) for client in range(3)]
    assert up == down == [5 * 4 * 16] * 3
    assert ledger.worked("grad", 0) == 5 * 2 * 4


def test_minibatches_are_drawn_by_round_step_and_client() -> None:
    one, two = (federated(Sketch(64, 16), batch_size=4, seed=seed) for seed in (0, 1))
    assert not torch.equal(after(one, 2), after(two, 2))
    assert torch.equal(after(federated(Sketch(64, 16), batch_size=4), 2), one.weights)
    assert one.ledger.worked("grad", 0) == 2 * 3 * 4
    everything = federated(Sketch(64, 16), batch_size=12)
    torch.testing.assert_close(after(everything, 2), after(federated(Sketch(64, 16)), 2), atol=1e-12, rtol=0)


@pytest.mark.parametrize("local_steps", [1, 3])
def test_what_an_observer_sees_is_the_message(local_steps: int) -> None:
    fed = federated(Sketch(64, 16, "gaussian"), clients=1, local_steps=local_steps, weight_decay=0.1)
    params = {n: p.detach().clone() for n, p in fed.model.named_parameters()}
    x, y = examples(0)
    x.requires_grad_()
    seen = fed.observable(params, (x, y), Context(round=0))["sketch"]
    torch.testing.assert_close(seen.detach(), fed.round(), atol=1e-12, rtol=0)
    seen.square().sum().backward()
    assert x.grad is not None
    assert bool(x.grad.any())


def test_a_federated_checkpoint_continues_bit_for_bit() -> None:
    privacy = GaussianDP(1.0, 0.5, 1e-5, sampling_rate=0.5)
    for options in ({}, {"privacy": privacy}, {"batch_size": 4}):
        whole = after(federated(Sketch(64, 16), **options), 7)
        first = federated(Sketch(64, 16), **options)
        after(first, 3)
        second = federated(Sketch(64, 16), **{**options, "noise_key": 99})
        second.load_state_dict(first.state_dict())
        assert torch.equal(after(second, 4), whole)
        assert torch.equal(second.replay(federated(None).weights, 0), whole)


def test_foreign_federated_state_is_refused() -> None:
    fed = federated(Sketch(64, 16))
    after(fed, 1)
    model = nn.Linear(7, 4)
    other = SketchedFedAvg(
        model, [(torch.ones(2, 7), torch.ones(2, 4))], nn.functional.mse_loss, sketch=None, lr=1
    )
    with pytest.raises(ValueError, match="other parameters"):
        other.load_state_dict(fed.state_dict())
    federated(Sketch(64, 16), clients=5).load_state_dict(fed.state_dict())


@pytest.mark.parametrize(
    ("sketch", "message"),
    [
        (
            Sketch(64, 8),
            r"the state's sketch is Sketch\(64, 16, 'srht', seed=0\); this run's is Sketch\(64, 8, ",
        ),
        (Sketch(64, 16, "countsketch"), "this run's is Sketch.64, 16, 'countsketch', seed=0"),
        (Sketch(64, 16, "sparse"), "this run's is Sketch.64, 16, 'sparse', seed=0"),
        (Sketch(64, 16, seed=1), "this run's is Sketch.64, 16, 'srht', seed=1"),
        (None, "this run's is None"),
    ],
)
def test_a_log_of_another_sketch_is_refused(sketch: Sketch | None, message: str) -> None:
    """Replayed with another R, it would lead elsewhere."""
    fed, other = federated(Sketch(64, 16)), federated(sketch)
    after(fed, 2)
    before = after(other, 1)
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(fed.state_dict())
    assert other.rounds == 1
    assert torch.equal(other.weights, before)
    assert torch.equal(other.replay(federated(None).weights, 0), before)


def test_a_log_of_another_generator_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    fed, sketch = federated(Sketch(64, 16)), Sketch(64, 16)
    monkeypatch.setattr(sketch, "digest", lambda round: "0" * 16)
    with pytest.raises(ValueError, match=r"the state's R_0 is [0-9a-f]{16}; this run's is 0000000000000000"):
        federated(sketch).load_state_dict(fed.state_dict())


STATED = GaussianDP(1.0, 5.0, 1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"privacy": None}, r"the state's privacy is GaussianDP\(.*noise_multiplier=5.0.*; this run's is None"),
        ({"privacy": GaussianDP(1.0, 50.0, 1e-5)}, "this run's is .*noise_multiplier=50.0"),
        ({"privacy": GaussianDP(2.0, 5.0, 1e-5)}, "this run's is .*clip=2.0"),
        ({"privacy": GaussianDP(1.0, 5.0, 1e-6)}, "this run's is .*delta=1e-06"),
        ({"privacy": GaussianDP(1.0, 5.0, 1e-5, sampling_rate=0.5)}, "this run's is .*sampling_rate=0.5"),
        ({"privacy": STATED, "local_steps": 1}, "the state's local_steps is 3; this run's is 1"),
        (
            {"privacy": STATED, "sizes": [12, 6, 12]},
            r"the state's private_sizes is \[12, 12, 12\]; this run's is \[12, 6, 12\]",
        ),
        ({"privacy": STATED, "clients": 2}, r"this run's is \[12, 12\]"),
    ],
)
def test_a_state_under_another_guarantee_is_refused(options: dict[str, Any], message: str) -> None:
    """Else what was spent under little noise would be reported as if under much."""
    spent, other = federated(Sketch(64, 16), privacy=STATED), federated(Sketch(64, 16), **options)
    after(spent, 4)
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(spent.state_dict())
    assert other.rounds == 0
    same = federated(Sketch(64, 16), privacy=GaussianDP(1.0, 5.0, 1e-5))
    same.load_state_dict(spent.state_dict())
    assert same.epsilon == spent.epsilon > 0


def test_what_was_not_private_becomes_private_by_no_checkpoint() -> None:
    fed = federated(Sketch(64, 16))
    after(fed, 4)
    with pytest.raises(ValueError, match="the state's privacy is None; this run's is GaussianDP"):
        federated(Sketch(64, 16), privacy=STATED).load_state_dict(fed.state_dict())


def test_a_checkpoint_is_of_plain_values() -> None:
    """So that torch.load reads it with weights_only."""
    file = io.BytesIO()
    fed = federated(Sketch(64, 16), privacy=STATED)
    after(fed, 2)
    torch.save(fed.state_dict(), file)
    file.seek(0)
    again = federated(Sketch(64, 16), privacy=STATED, noise_key=99)
    again.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(after(again, 1), after(fed, 1))


# Privacy.


def renyi(orders: list[float], z: float, q: float) -> list[float]:
    """RDP of the sampled Gaussian mechanism (Mironov et al. 2019, Eq. 6), at whole orders where q < 1."""
    if q == 1:
        return [a / (2 * z * z) for a in orders]
    values = []
    for a in map(int, orders):
        terms = [
            math.lgamma(a + 1)
            - math.lgamma(k + 1)
            - math.lgamma(a - k + 1)
            + k * math.log(q)
            + (a - k) * math.log1p(-q)
            + k * (k - 1) / (2 * z * z)
            for k in range(a + 1)
        ]
        top = max(terms)
        values.append((top + math.log(sum(math.exp(t - top) for t in terms))) / (a - 1))
    return values


@pytest.mark.parametrize(
    ("z", "q", "steps"), [(5.0, 1.0, 10), (30.0, 1.0, 60), (2.0, 0.05, 100), (1.5, 0.01, 500)]
)
def test_epsilon_is_the_reference_accountants(z: float, q: float, steps: int) -> None:
    from dp_accounting.rdp import RdpAccountant

    delta = 1e-6
    orders = [a for a in RdpAccountant()._orders if q == 1 or a == int(a)]
    reference = min(
        steps * r + math.log1p(-1 / a) - math.log(delta * a) / (a - 1)
        for a, r in zip(orders, renyi(orders, z, q), strict=True)
    )
    assert GaussianDP(1.0, z, delta, sampling_rate=q).epsilon(steps) == pytest.approx(reference, abs=1e-6)


def test_sketching_changes_no_guarantee() -> None:
    privacy = GaussianDP(1.0, 2.0, 1e-5, sampling_rate=0.5)
    spent = []
    for sketch in (None, Sketch(64, 16), Sketch(64, 16, "countsketch")):
        fed = federated(sketch, privacy=privacy)
        after(fed, 4)
        spent.append(fed.epsilon)
    assert spent[0] == spent[1] == spent[2] == privacy.epsilon(12)
    assert federated(None).epsilon == math.inf
    assert GaussianDP(1.0, 0.0, 1e-5).epsilon(1) == math.inf
    assert privacy.epsilon(0) == 0


def test_noise_for_an_epsilon_is_enough_and_no_more() -> None:
    found = GaussianDP.for_epsilon(2.0, 50, clip=0.5, delta=1e-5)
    assert 1.99 < found.epsilon(50) <= 2.0
    assert GaussianDP.for_epsilon(math.inf, 50, clip=0.5, delta=1e-5).noise_multiplier == 0


def test_per_example_gradients_are_clipped_and_the_noise_has_the_stated_size() -> None:
    quiet = federated(None, local_steps=1, privacy=GaussianDP(0.3, 0.0, 1e-5))
    noisy = federated(None, local_steps=1, privacy=GaussianDP(0.3, 40.0, 1e-5))
    start = quiet.weights
    x, y = examples(0)
    model = nn.Linear(7, 8).double()
    nn.utils.vector_to_parameters(start.clone(), model.parameters())
    total = torch.zeros(64, dtype=F64)
    for i in range(12):
        model.zero_grad()
        nn.functional.mse_loss(model(x[i : i + 1]), y[i : i + 1]).backward()
        g = torch.cat([p.grad.reshape(-1) for p in model.parameters()])  # type: ignore[union-attr]
        total += g * min(1.0, 0.3 / float(g.norm()))
    one = quiet._local_updates()[0]
    torch.testing.assert_close(one, -0.1 * total / 12, atol=1e-12, rtol=0)
    noise = (noisy._local_updates() - quiet._local_updates()) / 0.1 * 12
    assert float(noise.std()) == pytest.approx(40 * 0.3, rel=0.2)
    assert not torch.equal(noise[0], noise[1])


def test_noise_in_the_sketch_has_the_sketchs_sensitivity() -> None:
    sketch = Sketch(64, 16)
    one = {"local_steps": 1}
    quiet = federated(sketch, privacy=GaussianDP(0.3, 0.0, 1e-5, noise_in="sketch"), **one)
    noisy = federated(sketch, privacy=GaussianDP(0.3, 50.0, 1e-5, noise_in="sketch"), **one)
    deltas = quiet._local_updates()
    assert torch.equal(noisy._local_updates(), deltas)
    noise = (noisy._send(deltas) - quiet._send(deltas)) / 0.1 * 12
    assert float(noise.std()) == pytest.approx(50 * 0.3 * 2, rel=0.3)  # sqrt(D / b) = 2


def test_private_samples_follow_the_rate_and_may_be_empty() -> None:
    rare = federated(Sketch(64, 16), privacy=GaussianDP(1.0, 0.0, 1e-5, sampling_rate=0.02))
    after(rare, 10)
    assert 0 < rare.ledger.worked("grad") < 60  # 22 of 1080 are expected
    assert bool(rare.weights.isfinite().all())


def test_without_a_key_the_noise_is_nobodys() -> None:
    privacy = GaussianDP(1.0, 1.0, 1e-5)
    one, two = (federated(None, privacy=privacy, noise_key=None) for _ in range(2))
    assert not torch.equal(after(one, 1), after(two, 1))


# FetchSGD.


def test_fetchsgd_loses_nothing_it_has_not_sent() -> None:
    """With no momentum: error + sketch of all updates = sketch of all gradients."""
    fetch = FetchSGD(40, 5, tables=3, momentum=0.0)
    fetch.bind(ParamSpace({"w": (20, 10)}), 1, 0, dtype=F64)
    gradients = [numbers(20, 10, seed=s) for s in range(6)]
    updates = torch.zeros(200, dtype=F64)
    for g in gradients:
        fetch.feed("w", g, 1.0)
        update = fetch.reduced(fetch.collect())
        assert int((update != 0).sum()) == 5
        updates += update
    owed = fetch._tables(torch.stack(gradients).sum(0).view(-1))
    torch.testing.assert_close(fetch.state["error"] + fetch._tables(updates), owed, atol=1e-12, rtol=0)


def test_fetchsgd_finds_the_heavy_hitters() -> None:
    fetch = FetchSGD(60, 3)
    fetch.bind(ParamSpace({"w": (500,)}), 1, 0)
    gradient = 0.01 * numbers(500).float()
    gradient[[7, 100, 499]] = torch.tensor([5.0, -4.0, 3.0])
    fetch.feed("w", gradient, 1.0)
    update = fetch.decode([fetch.encode()])
    assert update.nonzero().squeeze(1).tolist() == [7, 100, 499]
    torch.testing.assert_close(update[[7, 100, 499]], gradient[[7, 100, 499]], atol=0.1, rtol=0)


def test_fetchsgd_masking_and_checkpoint() -> None:
    def run(fetch: FetchSGD, steps: range) -> Tensor:
        for s in steps:
            fetch.feed("w", numbers(200, seed=s).float(), 1.0)
            update = fetch.reduced(fetch.collect())
        return update

    def fresh() -> FetchSGD:
        fetch = FetchSGD(40, 5, masking=True)
        fetch.bind(ParamSpace({"w": (200,)}), 1, 0)
        return fetch

    first, second, whole = fresh(), fresh(), fresh()
    expected = run(whole, range(6))
    update = run(first, range(3))
    sent = first._tables(update) != 0
    assert bool((first.state["momentum"][sent] == 0).all())
    second.load_state_dict(first.state_dict())
    assert torch.equal(run(second, range(3, 6)), expected)
    other = FetchSGD(40, 5, masking=True, seed=1)
    other.bind(ParamSpace({"w": (200,)}), 1, 0)
    with pytest.raises(
        ValueError, match=r"the state's settings is FetchSGD\(.*seed=0\); this run's is .*seed=1"
    ):
        other.load_state_dict(first.state_dict())


# Bad input.


def bound(**options: Any) -> LinearSketch:
    exchange = LinearSketch(**options)
    exchange.bind(ParamSpace({"w": (3, 4)}), 2, 0)
    return exchange


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (lambda: Sketch(0, 1), r"numel must be in 1 .. 2\^31 - 1; got 0"),
        (lambda: Sketch(2**31, 1), r"numel must be in 1 .. 2\^31 - 1; got 2147483648"),
        (lambda: Sketch(10, 0), "rows must be in 1 .. numel = 10; got 0"),
        (lambda: Sketch(10, 11), "rows must be in 1 .. numel = 10; got 11"),
        (lambda: Sketch(10, 2, "fourier"), "kind must be one of gaussian, .*; got 'fourier'"),
        (
            lambda: Sketch(10, 2, "srht", nonzeros=2),
            "nonzeros is of kind 'sparse' only; got 2 with kind 'srht'",
        ),
        (lambda: Sketch(10, 2, "sparse"), "nonzeros must be in 1 .. rows = 2; got 4"),
        (lambda: Sketch(10, 2, "sparse", nonzeros=0), "nonzeros must be in 1 .. rows = 2; got 0"),
        (lambda: Sketch(10, 2)(torch.ones(9), 0), r"x must have shape \(..., 10\); got \(9,\)"),
        (lambda: Sketch(10, 2).T(torch.ones(3), 0), r"y must have shape \(..., 2\); got \(3,\)"),
        (
            lambda: Sketch(10, 2)(torch.ones(10, dtype=torch.int64), 0),
            "x must be floating point; got torch.int64",
        ),
        (
            lambda: Sketch(10, 2)(torch.full((10,), float("nan")), 0),
            "x must be finite; it holds NaN or infinity",
        ),
        (lambda: Sketch(10, 2).T(torch.tensor([1.0, float("inf")]), 0), "y must be finite; it holds NaN"),
        (lambda: Sketch(10, 2)(torch.ones(10), -1), "round must be >= 0; got -1"),
        (lambda: Sketch(10, 2).suggest_lr(0.0), "smoothness must be a positive number; got 0"),
        (lambda: Sketch(10, 2).suggest_lr(1.0, 0), "local_steps must be >= 1; got 0"),
        (lambda: LinearSketch(0), "rows must be >= 1 or None .*; got 0"),
        (lambda: LinearSketch(4, "dct"), "kind must be one of .*; got 'dct'"),
        (lambda: LinearSketch(4, nonzeros=2), "nonzeros is of kind 'sparse' only"),
        (lambda: LinearSketch(momentum=1.0), r"momentum must be in \[0, 1\); got 1"),
        (lambda: bound(rows=13), "rows must be in 1 .. numel = 12; got 13"),
        (lambda: LinearSketch(2).bind(ParamSpace({"w": (2, 2)}), 2, 2), "members - 1 = 1; got 2"),
        (lambda: bound(rows=2).decode([b""]), "payloads of all 2 parties are needed; got 1"),
        (lambda: federated(Sketch(60, 6)), "sketch must be of 64 elements, the model's; got 60"),
        (lambda: federated(None, lr=0.0), "lr must be a positive number; got 0"),
        (lambda: federated(None, server_lr=-1.0), "server_lr must be a positive number; got -1"),
        (lambda: federated(None, local_steps=0), "local_steps must be >= 1; got 0"),
        (lambda: federated(None, weight_decay=-1.0), "weight_decay must be a number >= 0; got -1"),
        (lambda: federated(None, batch_size=13), "batch_size must be in 1 .. 12, .*; got 13"),
        (lambda: federated(None, shares=[1, 2]), r"shares must be 3 numbers >= 0 .*; got \[1, 2\]"),
        (lambda: federated(None, shares=[0, 0, 0]), "shares must be 3 numbers"),
        (lambda: federated(None, shares=[1, -1, 1]), "shares must be 3 numbers"),
        (
            lambda: federated(None, batch_size=4, privacy=GaussianDP(1.0, 1.0, 1e-5)),
            "batch_size must be None with privacy, .*; got 4",
        ),
        (
            lambda: federated(
                Sketch(64, 16, "ams"), privacy=GaussianDP(1.0, 1.0, 1e-5, noise_in="sketch"), local_steps=1
            ),
            "needs a sketch of kind srht or random-k; got ams",
        ),
        (
            lambda: federated(Sketch(64, 16), privacy=GaussianDP(1.0, 1.0, 1e-5, noise_in="sketch")),
            "noise_in 'sketch' allows local_steps 1 only; got 3",
        ),
        (
            lambda: SketchedFedAvg(nn.Linear(1, 1), [], nn.functional.mse_loss, sketch=None, lr=1),
            "at least one client; got none",
        ),
        (
            lambda: SketchedFedAvg(
                nn.Linear(1, 1),
                [(torch.ones(2, 1), torch.ones(3, 1))],
                nn.functional.mse_loss,
                sketch=None,
                lr=1,
            ),
            "client 0 has 2 and 3",
        ),
        (
            lambda: SketchedFedAvg(
                nn.Linear(1, 1),
                [(torch.ones(1, 1) / 0, torch.ones(1))],
                nn.functional.mse_loss,
                sketch=None,
                lr=1,
            ),
            "those of client 0 hold NaN or infinity",
        ),
        (
            lambda: SketchedFedAvg(
                nn.BatchNorm1d(2),
                [(torch.ones(2, 2), torch.ones(2))],
                nn.functional.mse_loss,
                sketch=None,
                lr=1,
            ),
            "model must have no buffers",
        ),
        (lambda: GaussianDP(0.0, 1.0, 1e-5), "clip must be a positive number; got 0"),
        (lambda: GaussianDP(1.0, -1.0, 1e-5), "noise_multiplier must be a number >= 0; got -1"),
        (lambda: GaussianDP(1.0, 1.0, 0.0), r"delta must be in \(0, 1\); got 0"),
        (lambda: GaussianDP(1.0, 1.0, 1e-5, sampling_rate=0.0), r"sampling_rate must be in \(0, 1\]; got 0"),
        (
            lambda: GaussianDP(1.0, 1.0, 1e-5, noise_in="loss"),
            "noise_in must be gradient or sketch; got 'loss'",
        ),  # type: ignore[arg-type]
        (lambda: GaussianDP(1.0, 1.0, 1e-5).epsilon(-1), "steps must be >= 0; got -1"),
        (lambda: GaussianDP.for_epsilon(0.0, 1, clip=1.0, delta=1e-5), "epsilon must be > 0; got 0"),
        (lambda: FetchSGD(0, 1), "columns must be >= 1; got 0"),
        (lambda: FetchSGD(4, 0), "k must be >= 1; got 0"),
        (lambda: FetchSGD(4, 1, momentum=1.0), r"momentum must be in \[0, 1\); got 1"),
        (lambda: FetchSGD(4, 13).bind(ParamSpace({"w": (3, 4)}), 1, 0), "k must be in 1 .. numel = 12; got 13"),
    ],
)
def test_bad_arguments_are_named(bad: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bad()


def test_accounting_without_its_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "dp_accounting", None)
    with pytest.raises(ImportError, match=r"pip install 'cograd\[privacy\]'"):
        GaussianDP(1.0, 1.0, 1e-5).epsilon(1)
