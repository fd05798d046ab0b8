"""Just One Byte in one process: the card's exact properties, and bad input."""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from cograd.core.codecs import CodecError, Context, FixedLength, Float16, Float32, TopK
from cograd.core.message import Frame, FrameError, SchemaError, session_id
from cograd.core.streams import stream
from cograd.engines.mailbox import Mailbox
from cograd.machines.baselines import Backprop, FullZeroth
from cograd.machines.one_byte import (
    Diverged,
    LinearByte,
    LocalPeers,
    Log,
    LogByte,
    LogError,
    LogNibble,
    OneByte,
)
from cograd.machines.one_byte.agreement import CONTROL, Dropped, Refused, pack
from cograd.machines.one_byte.group import Group
from cograd.machines.one_byte.log import Round
from cograd.machines.one_byte.noise import Direction, Workspace, apply_estimates, spsa_estimate
from machines.one_byte_jobs import SAMPLES, batches, flip_a_bit, loss_of, optimizer, small

EXAMPLES = settings(derandomize=True, database=None, deadline=None, max_examples=60)
CTX = Context()
DIRECTION = Direction(3, 1, 4, 1)


def encoded(codec: Any, *values: float) -> bytes:
    return bytes(codec.encode(torch.tensor(values, dtype=torch.float64), (len(values),), CTX).payload)


def decoded(codec: Any, payload: bytes, count: int | None = None) -> Tensor:
    return codec.decode(payload, (count or len(payload),), CTX).dense()


# The byte.


@pytest.mark.parametrize("codec", [LogByte(), LogByte(16.0, 64), LinearByte(), LinearByte(3.0)])
def test_all_256_codes_decode_to_distinct_values_but_for_the_two_zeros_and_encode_back(codec: Any) -> None:
    codes = bytes(range(256))
    values = decoded(codec, codes)
    assert len(set(values.tolist())) == 255  # 0.0 == -0.0
    assert sorted(i for i, v in enumerate(values.tolist()) if v == 0) == [0, 128]
    assert bytes(codec.encode(values, (256,), CTX).payload) == codes


def test_all_codes_of_four_bits_encode_back() -> None:
    codes = bytes(range(256))
    values = decoded(LogNibble(), codes, 512)
    assert len(set(values[::2][:16].tolist())) == 15
    assert bytes(LogNibble().encode(values, (512,), CTX).payload) == codes


def test_the_byte_is_a_sign_and_a_seventh_power_of_two_levels_eight_a_factor_of_e() -> None:
    values = decoded(LogByte(), bytes([0, 1, 64, 65, 127, 128 + 64]))
    expected = [0.0, math.exp(-63 / 8), 1.0, math.exp(1 / 8), math.exp(63 / 8), -1.0]
    assert values.tolist() == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize(("codec", "error"), [(LogByte(), math.exp(1 / 16)), (LogByte(16.0), math.exp(1 / 32))])
def test_relative_error_is_at_most_half_a_step(codec: LogByte, error: float) -> None:
    low, high = (float(decoded(codec, bytes([m]))) for m in (1, 127))
    grid = torch.exp(torch.linspace(math.log(low), math.log(high), 5000, dtype=torch.float64))
    for sign in (1, -1):
        got = decoded(codec, bytes(codec.encode(sign * grid, (5000,), CTX).payload)).double()
        assert bool((got * sign > 0).all())
        assert float((got / (sign * grid)).log().abs().max()) <= math.log(error) + 1e-6


@pytest.mark.parametrize("codec", [LogByte(), LogNibble(), LinearByte(5.0)])
@EXAMPLES
@given(pair=st.tuples(st.floats(-1e4, 1e4), st.floats(-1e4, 1e4)))
def test_codes_are_monotone(codec: Any, pair: tuple[float, float]) -> None:
    low, high = decoded(codec, encoded(codec, *sorted(pair)), 2).tolist()
    assert low <= high


def test_outside_its_range_a_magnitude_takes_the_nearest_level_in_the_logarithm() -> None:
    codec, first = LogByte(), math.exp(-63 / 8)
    half = math.exp(-1 / 16)
    assert encoded(codec, 1e30, -1e30) == bytes([127, 255])
    assert encoded(codec, first * half * 1.001, -first * half * 1.001) == bytes([1, 129])
    assert encoded(codec, first * half * 0.999, -first * half * 0.999, 0.0) == bytes([0, 0, 0])


@pytest.mark.parametrize("codec", [LogByte(), LinearByte()])
def test_what_is_not_finite_is_a_zero_that_can_be_told(codec: Any) -> None:
    payload = encoded(codec, math.nan, math.inf, -math.inf, 0.0)
    assert payload == bytes([128, 128, 128, 0])
    assert decoded(codec, payload).tolist() == [0, 0, 0, 0]
    assert np.signbit(decoded(codec, payload).numpy()).tolist() == [True, True, True, False]


@pytest.mark.parametrize("codec", [LogByte(), LogNibble(), LinearByte()])
@EXAMPLES
@given(values=st.lists(st.floats(width=32), min_size=1, max_size=9))
def test_kept_is_what_is_decoded_and_the_length_is_known(codec: Any, values: list[float]) -> None:
    x = torch.tensor(values)
    coded = codec.encode(x, (len(values),), CTX)
    assert isinstance(codec, FixedLength)
    assert len(coded.payload) == codec.nbytes((len(values),))
    assert torch.equal(coded.kept.dense(), decoded(codec, bytes(coded.payload), len(values)))


def test_payloads_of_another_length_are_refused() -> None:
    with pytest.raises(CodecError, match="expects 3 bytes for 3 values; got 2"):
        LogByte().decode(b"ab", (3,), CTX)
    with pytest.raises(CodecError, match="half byte after the last of 3"):
        LogNibble().decode(b"\x11\x11", (3,), CTX)


# Directions and the two halves of a step.


def tensors(**shapes: tuple[int, ...]) -> dict[str, Tensor]:
    return {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}


def test_directions_are_unbiased_on_a_quadratic() -> None:
    """Central differences are exact there, so the mean of p z is the gradient."""
    d, n = 6, 20_000
    draw = torch.Generator().manual_seed(0)
    root = torch.randn(d, d, generator=draw, dtype=torch.float64)
    hessian, linear = root @ root.T, torch.randn(d, generator=draw, dtype=torch.float64)
    theta = {"w": torch.randn(d, generator=draw, dtype=torch.float64)}
    work, moved = Workspace(theta), []

    def loss(at: Any) -> float:
        return float(at["w"] @ hessian @ at["w"] / 2 + linear @ at["w"])

    for s in range(n):
        direction = Direction(0, 0, 0, s)
        p = spsa_estimate(loss, theta, direction, 0.1, work=work).projection
        step = {"w": torch.zeros(d, dtype=torch.float64)}
        apply_estimates(step, [direction], [p], 1.0, work=work)
        moved.append(-step["w"])
    estimates = torch.stack(moved)
    error = (estimates.mean(0) - (hessian @ theta["w"] + linear)) / (estimates.std(0) / n**0.5)
    assert float(error.abs().max()) < 4


def test_second_moment_on_a_linear_loss_is_d_plus_two() -> None:
    d, n = 20, 20_000
    gradient = torch.ones(d)
    z = torch.empty(d)
    squares = []
    for s in range(n):
        Direction(1, 2, 3, s).fill("w", z)
        squares.append(float(gradient @ z) ** 2 * float(z @ z))
    assert np.mean(squares) / d == pytest.approx(d + 2, rel=0.03)


def test_neighbouring_directions_are_uncorrelated() -> None:
    d = 20_000
    near = [Direction(0, t, m, s) for t in (1, 10) for m in (0, 1, 12) for s in (0, 1, 23)]
    drawn = torch.empty(len(near), d)
    for direction, row in zip(near, drawn, strict=True):
        direction.fill("w", row)
    correlation = torch.corrcoef(drawn) - torch.eye(len(near))
    assert float(correlation.abs().max()) < 5 / d**0.5


def test_no_two_directions_share_a_generators_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 32-bit seeds some would, at so many."""
    keys: set[int] = set()
    monkeypatch.setattr(np.random, "Philox", lambda key: keys.add(key))
    monkeypatch.setattr(np.random, "Generator", lambda philox: None)
    for t, m, s in itertools.product(range(100), range(100), range(20)):
        stream(*Direction(0, t, m, s).key("w"))
    assert len(keys) == 200_000


def test_the_reference_codes_colliding_identifiers_do_not_collide() -> None:
    """Decimal digits put one after the other make (1, 1, "23") and (10, 12, "3") the same seed there."""
    a, b = torch.empty(100), torch.empty(100)
    Direction(0, 1, 1, 23).fill("w", a)
    Direction(0, 10, 12, 3).fill("w", b)
    assert not torch.equal(a, b)


def test_a_tensors_direction_does_not_depend_on_what_else_is_trained() -> None:
    moves = []
    for frozen in (False, True):
        model = small()
        model[0].requires_grad_(not frozen)
        zo = optimizer(model)
        before = model[3].weight.detach().clone()
        zo.apply([0], [LogByte().encode(torch.ones(SAMPLES), (SAMPLES,), CTX).payload])
        moves.append(model[3].weight.detach() - before)
    assert torch.equal(*moves)
    assert float(moves[0].abs().max()) > 0


def test_float64_parameters_move_along_the_same_direction() -> None:
    single, double = tensors(w=(4, 3)), tensors(w=(4, 3))
    single["w"] = single["w"].float()
    for params in (single, double):
        apply_estimates(params, [Direction(0, 0, 0, 0)], [1.0], 1.0)
    torch.testing.assert_close(single["w"].double(), double["w"], rtol=1e-6, atol=0)


def test_threads_change_no_bit() -> None:
    def moved(threads: int) -> list[Tensor]:
        torch.set_num_threads(threads)
        params = {f"w{i}": torch.ones(300, 100 + i) for i in range(5)}
        work = Workspace(params)
        spsa_estimate(lambda at: float(at["w3"].sum()), params, DIRECTION, 0.1, work=work)
        apply_estimates(params, [DIRECTION, DIRECTION], [0.3, -0.7], 0.1, work=work)
        return [*params.values(), *work.copies.values()]

    threads = torch.get_num_threads()
    try:
        assert all(torch.equal(a, b) for a, b in zip(moved(1), moved(4), strict=True))
    finally:
        torch.set_num_threads(threads)


# The optimizer.


def trained(rounds: int = 10, members: int = 3, **options: Any) -> tuple[OneByte, nn.Module]:
    model = small()
    zo = optimizer(model, **options)
    peers = LocalPeers(zo, members)
    for t in range(zo.round, rounds):
        peers.step(loss_of(model), [batches(t, m) for m in range(members)])
    return zo, model


def test_measuring_leaves_every_bit_in_place_and_makes_no_gradient() -> None:
    model = small().train()
    model[2].eval()
    zo = optimizer(model)
    pointers = [p.data_ptr() for p in model.parameters()]
    before = zo.fingerprint()
    seen = []

    def closure(b: Any) -> Tensor:
        seen.append((torch.is_inference_mode_enabled(), model.training))
        return loss_of(model)(b)  # type: ignore[no-any-return]

    zo.estimate(closure, batches(0, 0), 0)
    assert zo.fingerprint() == before
    assert [p.data_ptr() for p in model.parameters()] == pointers
    assert seen == [(True, False)] * (2 * SAMPLES)
    assert [m.training for m in model] == [True, True, False, True]
    zo.step(loss_of(model), batches(0, 0))
    assert all(p.grad is None for p in model.parameters())
    assert [p.data_ptr() for p in model.parameters()] == pointers


def test_a_closure_that_fails_leaves_everything_as_it_was() -> None:
    model = small().train()
    zo = optimizer(model)
    before = zo.fingerprint()
    with pytest.raises(ZeroDivisionError):
        zo.step(lambda b: 1 / 0, batches(0, 0))  # type: ignore[arg-type, return-value]
    assert (zo.fingerprint(), zo.round, len(zo.log), model.training) == (before, 0, 0, True)


def test_memory_beyond_the_model_is_two_copies_of_what_is_trained() -> None:
    model = nn.Sequential(nn.Linear(300, 300), nn.Linear(300, 10))
    model[0].requires_grad_(False)
    zo = OneByte(model, lr=0.1, samples=1)
    zo.step(lambda x: model(x).square().mean(), [torch.ones(2, 300)])
    buffers = [*zo._work.steps.values(), *zo._work.copies.values()]
    assert sum(b.numel() for b in buffers) == 2 * zo.space.numel == 2 * 3010


def test_the_order_of_application_is_part_of_the_result() -> None:
    zo, other = optimizer(small()), optimizer(small())
    payloads = {m: bytes(zo.estimate(loss_of(zo.model), batches(0, m), m).payload) for m in range(3)}
    zo.apply([0, 1, 2], [payloads[m] for m in (0, 1, 2)])
    other.apply([2, 1, 0], [payloads[m] for m in (2, 1, 0)])
    assert zo.fingerprint() != other.fingerprint()
    for a, b in zip(zo._params.values(), other._params.values(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


def test_the_sender_applies_what_it_sent_and_not_what_it_measured() -> None:
    """The update is the functional one from decoded bytes, to the bit."""
    model = small()
    zo = optimizer(model)
    payload = bytes(zo.estimate(loss_of(model), batches(0, 0), 0).payload)
    expected = {n: p.detach().clone() for n, p in model.named_parameters()}
    values = decoded(LogByte(), payload).tolist()
    apply_estimates(expected, [Direction(5, 0, 0, s) for s in range(SAMPLES)], values, 0.02 / SAMPLES)
    zo.step(loss_of(model), batches(0, 0))
    assert all(torch.equal(p, expected[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize(("average", "norm"), [("mean", 12.0), ("sqrt", math.sqrt(12.0))])
def test_the_step_is_divided_by_the_number_of_estimates_or_its_root(average: str, norm: float) -> None:
    model = nn.Linear(3, 1, bias=False).double()
    zo = OneByte(model, lr=0.5, samples=4, average=average, codec=Float32())
    before = model.weight.detach().clone()
    payload = Float32().encode(torch.arange(1.0, 5.0), (4,), CTX).payload
    zo.apply([7, 1, 4], [payload] * 3)
    expected = torch.zeros(1, 3)
    z = torch.empty(1, 3)
    for m in (7, 1, 4):
        for s in range(4):
            Direction(0, 0, m, s).fill("weight", z)
            expected += 0.5 / norm * (s + 1) * z
    torch.testing.assert_close(before - model.weight.detach(), expected.double(), atol=1e-6, rtol=0)


def test_a_loss_that_is_not_finite_is_zero_for_everyone_and_flagged() -> None:
    model = small()
    zo = optimizer(model)
    b = batches(0, 0)
    b[1][0][0, 0] = math.nan
    b[2][0][:] = math.inf
    own = zo.estimate(loss_of(model), b, 0)
    assert own.flagged == (1, 2)
    assert [own.payload[s] for s in (1, 2)] == [128, 128]
    zo.apply([0], [own.payload])
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


@pytest.mark.parametrize(("codec", "size"), [(Float16(), 1e6), (Float32(), 1e40)])
def test_an_estimate_that_the_codec_cannot_write_is_zero_for_everyone_and_flagged(
    codec: FixedLength, size: float
) -> None:
    model = nn.Linear(3, 1, bias=False).double()
    zo = OneByte(model, lr=0.1, samples=4, codec=codec)
    own = zo.estimate(lambda factor: factor * model.weight.sum(), [1.0, size, 1.0, -size], 0)
    assert own.flagged == (1, 3)
    told = decoded(codec, bytes(own.payload), 4)
    assert [v == 0 for v in told.tolist()] == [False, True, False, True]
    zo.apply([0], [own.payload])
    assert bool(torch.isfinite(model.weight).all())


def test_variance_scaling_gives_each_tensor_its_share() -> None:
    """Standard deviation over the root mean square of all, which is not multiplied up from tensor to tensor."""
    model = nn.Sequential(nn.Linear(40, 30, bias=False), nn.Linear(30, 20, bias=False))
    for layer, deviation in zip(model, (3.0, 4.0), strict=True):
        nn.init.normal_(layer.weight, std=deviation, generator=torch.Generator().manual_seed(0))
    zo = OneByte(model, lr=1.0, samples=1, variance_scaling=True)
    factors = zo._factors()
    assert factors is not None
    assert factors["0.weight"] == pytest.approx(3 / math.sqrt(12.5), rel=0.05)
    assert factors["1.weight"] == pytest.approx(4 / math.sqrt(12.5), rel=0.05)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    zo.apply([0], [encoded(LogByte(), 1.0)])
    z = torch.empty(20, 30)
    Direction(0, 0, 0, 0).fill("1.weight", z)
    moved = before["1.weight"] - model[1].weight.detach()
    torch.testing.assert_close(moved, factors["1.weight"] * z, atol=1e-5, rtol=0)


def test_the_perturbation_scale_is_learned_from_its_own_draws() -> None:
    model = nn.Linear(2, 1, bias=False)
    sizes = []
    zo = OneByte(model, lr=0.1, eps=0.5, samples=1, gamma=0.3, seed=9)
    start = model.weight.detach().clone()

    def closure(_: Any) -> Tensor:
        sizes.append(float((model.weight - start).norm()))
        return model.weight.sum()

    own = zo.estimate(closure, [0], 0)
    direction = Direction(9, 0, 0, 0)
    z, xi = torch.empty(1, 2), direction.scale_draw()
    direction.fill("weight", z)
    expected = [0.5 * math.exp(sign * 0.3 * xi) * float(z.norm()) for sign in (1, -1)]
    assert sizes == pytest.approx(expected, rel=1e-4)
    zo.apply([0], [own.payload])
    p = float(decoded(LogByte(), bytes(own.payload)))
    assert zo.log_eps == pytest.approx(math.log(0.5) - 0.1 * p * 0.3 * xi)


def test_tied_weights_are_perturbed_once_and_buffers_not_at_all() -> None:
    model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.BatchNorm1d(6), nn.Linear(6, 6, bias=False))
    model[2].weight = model[0].weight
    zo = OneByte(model, lr=0.1, samples=1)
    assert [s.name for s in zo.space] == ["0.weight", "1.weight", "1.bias"]
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    zo.step(lambda x: model(x).square().mean(), [torch.ones(3, 6)])
    assert model[2].weight is model[0].weight
    assert all(torch.equal(b, buffers[n]) for n, b in model.named_buffers())


def test_training_lowers_the_loss_at_one_byte_a_sample() -> None:
    model = small()
    zo = optimizer(model)
    peers = LocalPeers(zo, 3)
    losses = [
        np.mean([i.loss for i in peers.step(loss_of(model), [batches(t, m) for m in range(3)])])
        for t in range(150)
    ]
    assert np.mean(losses[-10:]) < 0.85 * np.mean(losses[:10])
    assert [zo.ledger.sent(m) for m in range(3)] == [150 * SAMPLES] * 3
    assert zo.log.nbytes == 150 * SAMPLES * 3
    assert zo.ledger.worked("forward", 0) == 150 * 2 * SAMPLES


def test_info_tells_what_a_round_did() -> None:
    model = small()
    zo = optimizer(model)
    info = zo.step(loss_of(model), batches(0, 0))
    assert (info.round, info.bytes_sent, info.estimates, info.members, info.flagged) == (0, 4, 4, (0,), ())
    assert 0 < info.loss < 3


class Pair:
    """A group of this machine, rank 0, and another that says of itself what ``other`` says."""

    rank, members = 0, 2

    def __init__(self, other: Callable[[bytes], bytes]) -> None:
        self.other = other

    def all_gather_bytes(self, data: Any) -> list[Any]:
        try:
            frame = Frame.unpack(data, bytes(data[8:24]))
        except FrameError:
            return [data, data]  # settings
        return [data, Frame(frame.session, frame.round, 1, self.other(bytes(frame.payload))).pack()]

    def all_reduce(self, vector: Tensor) -> None:
        raise NotImplementedError


def test_of_two_machines_neither_is_said_to_be_right() -> None:
    zo = optimizer(small(), transport=Pair(lambda identity: bytes(16)))
    with pytest.raises(Diverged, match="after 0 rounds the weights of rank 1 are not those of rank 0: let one"):
        zo.compare()


def test_replicas_are_compared_every_64_rounds_and_a_machine_alone_is_not() -> None:
    model, checks = nn.Linear(2, 1), []

    def told(payload: bytes) -> bytes:
        if len(payload) == 16:
            checks.append(zo.round)
        return payload

    zo = OneByte(model, lr=1e-3, samples=1, transport=Pair(told))
    alone = OneByte(model, lr=1e-3, samples=1)
    for _ in range(130):
        zo.step(lambda x: model(x).square().mean(), [torch.ones(3, 2)])
        alone.step(lambda x: model(x).square().mean(), [torch.ones(3, 2)])
    assert checks == [64, 128]
    assert zo.ledger.sent() == 2 * 130
    assert zo.ledger.sent(size="frame") - zo.ledger.sent(size="schema") == 2 * (
        130 * (1 + Frame.OVERHEAD) + 2 * (16 + Frame.OVERHEAD)
    )
    assert len(alone.ledger) == 130 + 1  # the settings


def test_the_learned_perturbation_size_is_part_of_a_replicas_identity() -> None:
    zo = optimizer(small(), gamma=0.1)
    before = zo.identity()
    zo.log_eps = math.nextafter(zo.log_eps, 0)
    assert len(before) == 16
    assert zo.identity() != before


# The log.


def test_replay_from_the_start_gives_the_same_bits_through_a_file(tmp_path: Path) -> None:
    zo, _ = trained(12, gamma=0.1, variance_scaling=True)
    zo.log.save(tmp_path / "run.log")
    assert [p.name for p in tmp_path.iterdir()] == ["run.log"]
    log = Log.load(tmp_path / "run.log")
    other = optimizer(small(), gamma=0.1, variance_scaling=True)
    other.replay(log, until=7)
    assert other.round == 7
    other.replay(log)
    assert other.fingerprint() == zo.fingerprint()
    assert other.log_eps == zo.log_eps
    assert other.log.digest() == zo.log.digest()


@pytest.mark.parametrize("download", [False, True])
def test_a_machine_that_joins_at_round_30_equals_the_others_at_round_31(download: bool) -> None:
    zo, model = trained(30, 2)
    newcomer = optimizer(small())
    if download:
        nn.init.zeros_(newcomer.model[0].weight)  # type: ignore[index]
        newcomer = optimizer(newcomer.model)
        newcomer.load_weights(zo.weights(), zo.log, zo.log_eps)
    else:
        newcomer.replay(zo.log)
    assert newcomer.fingerprint() == zo.fingerprint()
    payloads = [bytes(zo.estimate(loss_of(model), batches(30, m), m).payload) for m in (0, 1)]
    payloads.append(bytes(newcomer.estimate(loss_of(newcomer.model), batches(30, 2), 2).payload))
    for one in (zo, newcomer):
        one.apply([0, 1, 2], payloads)
    assert newcomer.fingerprint() == zo.fingerprint()


def test_the_log_is_one_byte_an_estimate_and_a_short_header(tmp_path: Path) -> None:
    zo, _ = trained(40, 3)
    assert zo.log.nbytes == 40 * 3 * SAMPLES
    assert len(zo.log.to_bytes()) < zo.log.nbytes + 40 + 1200


@EXAMPLES
@given(
    rounds=st.lists(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=5, unique=True), max_size=8),
    start=st.integers(0, 8),
)
def test_logs_of_any_members_survive_as_bytes(rounds: list[list[int]], start: int) -> None:
    log = Log({"seed": 1}, 2)
    for members in rounds:
        log.append(tuple(members), bytes(2 * len(members)))
    again = Log.from_bytes(log.to_bytes())
    assert (list(again), again.header, again.digest()) == (list(log), log.header, log.digest())
    assert list(log.rounds_of(log.tail(start))) == log[start:]


def test_damaged_logs_are_refused() -> None:
    log = Log({}, 2)
    log.append((1, 2), b"abcd")
    log.append((1, 2), b"efgh")
    data = log.to_bytes()
    for at in range(len(data)):
        damaged = bytearray(data)
        damaged[at] ^= 4
        with pytest.raises(LogError):
            Log.from_bytes(damaged)
    for end in range(len(data)):
        with pytest.raises(LogError):
            Log.from_bytes(data[:end])
    tail = log.tail()
    for end in (1, 2, 5, len(tail) - 1):
        with pytest.raises(LogError):
            list(log.rounds_of(tail[:end]))
    with pytest.raises(LogError, match="no round begins with byte 9"):
        list(log.rounds_of(b"\x09"))
    with pytest.raises(LogError, match="members must be distinct"):
        log.append((1, 1), b"abcd")
    with pytest.raises(LogError, match="2 members have 4 bytes; got 3"):
        log.append((1, 2), b"abc")


def test_foreign_logs_are_refused_and_change_nothing() -> None:
    zo, _ = trained(3)
    log = zo.log
    for options, message in (
        ({"lr": 0.5}, "another lr: 0.02 there, 0.5 here"),
        ({"seed": 6}, "another seed"),
        ({"codec": LogByte(16.0)}, "another codec"),
    ):
        other = optimizer(small(), **options)
        before = other.fingerprint()
        with pytest.raises(SchemaError, match=message):
            other.replay(log)
        assert other.fingerprint() == before
    moved = small()
    moved[0].bias.data.add_(1)
    with pytest.raises(SchemaError, match="another start of the trainable parameters"):
        optimizer(moved).replay(log)
    ahead, _ = trained(2)
    ahead.apply([9], [bytes(SAMPLES)])
    with pytest.raises(ValueError, match="does not continue this machine's own: they differ before round 3"):
        ahead.replay(log)
    with pytest.raises(ValueError, match=r"until must be in 0 \.\. 3"):
        optimizer(small()).replay(log, until=4)
    with pytest.raises(ValueError, match=r"weights must have \d+ bytes; got 3"):
        optimizer(small()).load_weights(b"abc", log, 0.0)
    with pytest.raises(TypeError, match="FullZeroth keeps no log"):
        optimizer(small(), FullZeroth).replay(log)


@pytest.mark.parametrize("gamma", [0.0, 0.2])
def test_a_checkpoint_continues_bit_for_bit(gamma: float, tmp_path: Path) -> None:
    whole, _ = trained(20, gamma=gamma)
    first, model = trained(9, gamma=gamma)
    torch.save({"model": model.state_dict(), "zo": first.state_dict()}, tmp_path / "checkpoint.pt")
    saved = torch.load(tmp_path / "checkpoint.pt")
    fresh = small()
    zo = optimizer(fresh, gamma=gamma)
    with pytest.raises(ValueError, match="weights are not those of round 9"):
        zo.load_state_dict(saved["zo"])
    assert zo.round == 0
    fresh.load_state_dict(saved["model"])
    zo.load_state_dict(saved["zo"])
    peers = LocalPeers(zo, 3)
    for t in range(9, 20):
        peers.step(loss_of(fresh), [batches(t, m) for m in range(3)])
    assert zo.fingerprint() == whole.fingerprint()
    assert zo.log.digest() == whole.log.digest()
    with pytest.raises(SchemaError, match="the state has another lr"):
        optimizer(fresh, lr=0.1).load_state_dict(saved["zo"])


def test_another_number_of_machines_goes_on_from_a_checkpoint_and_from_its_log() -> None:
    first, model = trained(5, 3)
    zo = optimizer(model)
    zo.load_state_dict(first.state_dict())
    LocalPeers(zo, [0, 7]).step(loss_of(model), [batches(5, m) for m in (0, 7)])
    assert [entry.members for entry in zo.log[4:]] == [(0, 1, 2), (0, 7)]
    other = optimizer(small())
    other.replay(zo.log)
    assert other.fingerprint() == zo.fingerprint()


# The baselines.


def test_full_zeroth_order_moves_as_float32_scalars_do_and_sends_the_model() -> None:
    full, dense_model = trained(5, kind=FullZeroth)
    scalars, model = trained(5, codec=Float32())
    for a, b in zip(dense_model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
    assert full.ledger.sent(0) == 5 * 4 * full.space.numel
    assert scalars.ledger.sent(0) == 5 * 4 * SAMPLES


def test_backprop_is_sgd_on_the_mean_loss() -> None:
    _, model = trained(5, kind=Backprop)
    reference = small().eval()
    sgd = torch.optim.SGD(reference.parameters(), lr=0.02)
    for t in range(5):
        sgd.zero_grad()
        losses = [loss_of(reference)(b) for m in range(3) for b in batches(t, m)]
        torch.stack(losses).mean().backward()
        sgd.step()
    for a, b in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)
    assert all(p.grad is None for p in model.parameters())


def test_a_zeroth_order_gradient_that_float32_cannot_hold_is_refused() -> None:
    model = nn.Linear(3, 1, bias=False).double()
    zo = FullZeroth(model, lr=0.1, samples=1)
    with pytest.raises(ValueError, match="machine 0: a gradient of round 0 is not finite"):
        zo.step(lambda factor: factor * model.weight.sum(), [1e40])


@pytest.mark.parametrize("kind", [FullZeroth, Backprop])
def test_baselines_do_not_pass_on_what_is_not_finite(kind: type[OneByte]) -> None:
    zo = optimizer(small(), kind)
    b = batches(0, 0)
    b[1][0][0, 0] = math.nan
    before = zo.fingerprint()
    if kind is Backprop:
        with pytest.raises(ValueError, match="machine 0: a gradient of round 0 is not finite"):
            zo.step(loss_of(zo.model), b)
        assert zo.fingerprint() == before
    else:
        assert zo.step(loss_of(zo.model), b).flagged == (1,)
        assert all(bool(torch.isfinite(p).all()) for p in zo.model.parameters())


# Groups over sockets, with members in threads (processes: test_one_byte_processes.py).


def grouped(mailbox: Mailbox, peers: dict[int, Any] | None, check_every: int = 64, **options: Any) -> Group:
    zo = optimizer(small(), check_every=check_every)
    return Group.join(zo, mailbox, peers, **options) if peers else Group(zo, mailbox, patience=5)


def run_rounds(group: Group, until: int) -> None:
    while group.round < until:
        group.step(loss_of(group.zo.model), batches(group.round, group.mailbox.member))


SESSION = session_id("one-byte threads")


@pytest.mark.parametrize("download", [False, True])
def test_a_group_of_two_over_sockets(download: bool) -> None:
    with Mailbox(5, SESSION) as a, Mailbox(2, SESSION) as b:
        first = grouped(a, None)
        run_rounds(first, 3)
        found: list[Group] = []

        def second() -> None:
            found.append(grouped(b, {5: a.address}, download=download, patience=5))
            run_rounds(found[0], 8)

        thread = threading.Thread(target=second)
        thread.start()
        first.wait_for(2, timeout=10)
        run_rounds(first, 8)
        thread.join(10)
        assert first.zo.fingerprint() == found[0].zo.fingerprint()
        assert [entry.members for entry in first.zo.log] == [(5,)] * 3 + [(5, 2)] * 5
        assert first.members == (5, 2)
        assert found[0].leader == 5
        sent = [e for e in first.zo.ledger if e.payload]
        assert [(e.payload, e.copies) for e in sent if e.round >= 3] == [(SAMPLES, 1)] * 5


def test_a_member_with_a_flipped_bit_leaves_and_comes_back_by_download() -> None:
    with Mailbox(5, SESSION) as a, Mailbox(2, SESSION) as b:
        first = grouped(a, None, check_every=4)
        said: list[str] = []
        found: list[Group] = []

        def second() -> None:
            group = grouped(b, {5: a.address}, check_every=4, patience=5)
            run_rounds(group, 2)
            flip_a_bit(group.zo.model)
            with pytest.raises(Dropped) as caught:
                run_rounds(group, 8)
            said.append(str(caught.value))
            assert group.zo.round == 4
            assert group.peers == {5: a.address}
            found.append(Group.join(group.zo, b, group.peers, download=True, patience=5))
            run_rounds(found[0], 8)

        thread = threading.Thread(target=second)
        thread.start()
        first.wait_for(2, timeout=10)
        run_rounds(first, 8)
        thread.join(10)
        assert said == [
            "machine 2's weights are not those of its leader before round 4: join again with download=True"
        ]
        assert first.zo.fingerprint() == found[0].zo.fingerprint()
        assert first.zo.log.digest() == found[0].zo.log.digest()
        assert [entry.members for entry in first.zo.log] == [(5, 2)] * 8
        for group in (first, found[0]):
            sent = [(e.round, e.payload) for e in group.zo.ledger if e.payload]
            assert sent == [(t, SAMPLES) for t in range(8)]


def test_a_newcomer_that_does_not_fit_is_told_why() -> None:
    with Mailbox(0, SESSION) as a, Mailbox(1, SESSION) as b:
        first = grouped(a, None)
        said: list[str] = []

        def try_in() -> None:
            with pytest.raises(Refused) as caught:
                Group.join(optimizer(small(), lr=0.5), b, {0: a.address}, timeout=10)
            said.append(str(caught.value))

        thread = threading.Thread(target=try_in)
        thread.start()
        while thread.is_alive():
            first._drain()
            thread.join(0.01)
        assert said == ["its model or settings are not the group's (lr: 0.5 there, 0.02 here)"]
        assert first.members == (0,)


def test_nobody_answering_is_a_timeout() -> None:
    refused = pytest.raises(TimeoutError, match=r"no member of \[0\] let machine 1 in")
    with Mailbox(0, SESSION) as a, Mailbox(1, SESSION) as b, refused:
        Group.join(optimizer(small()), b, {0: a.address}, timeout=0.05)


def test_a_member_that_was_given_up_hears_of_it() -> None:
    with Mailbox(0, SESSION) as a, Mailbox(1, SESSION) as b:
        group = grouped(b, None)
        a.connect(1, b.address)
        group._agreement.addresses[0] = a.address
        a.send(1, CONTROL, pack("outside", stamp=[1, 0, 1], ballot=None))
        with pytest.raises(Dropped, match="gone on without machine 1: join again"):
            group.wait_for(2, timeout=5)


# Bad input.


def half() -> nn.Module:
    return nn.Linear(3, 3).half()


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (lambda: optimizer(small(), lr=0.0), "lr must be a positive number; got 0"),
        (lambda: optimizer(small(), lr=math.nan), "lr must be a positive number; got nan"),
        (lambda: optimizer(small(), eps=0.0), "eps must be a positive number; got 0"),
        (lambda: optimizer(small(), eps=-1.0), "eps must be a positive number; got -1"),
        (lambda: optimizer(small(), samples=0), "samples must be >= 1; got 0"),
        (lambda: optimizer(small(), average="sum"), "average must be 'mean' or 'sqrt'; got 'sum'"),
        (lambda: optimizer(small(), gamma=-0.1), "gamma must be >= 0; got -0.1"),
        (lambda: optimizer(small(), check_every=-1), "check_every must be >= 0 rounds, 0 for never; got -1"),
        (lambda: optimizer(small(), FullZeroth, gamma=0.1), "gamma must be 0 for FullZeroth.* got 0.1"),
        (lambda: optimizer(small(), Backprop, gamma=0.1), "gamma must be 0 for Backprop"),
        (lambda: optimizer(small(), codec=TopK(0.1)), "codec must be one of fixed length; got TopK"),
        (lambda: optimizer(small().requires_grad_(False)), "at least one tensor"),
        (lambda: optimizer(small()).step(loss_of(small()), []), "one minibatch a sample, 4; got 0"),
        (lambda: optimizer(small()).apply([0], [b"abc"]), "member 0 must have 4 bytes; got 3"),
        (lambda: optimizer(small()).apply([0, 0], [b"abcd"] * 2), r"members must be distinct; got \(0, 0\)"),
        (lambda: optimizer(small()).apply([0, 1], [b"abcd"]), "payloads must be one a member, 2; got 1"),
        (lambda: LocalPeers(optimizer(small()), [1, 1]), r"distinct ids, or a number >= 1; got \[1, 1\]"),
        (lambda: LocalPeers(optimizer(small()), 0), "distinct ids, or a number >= 1; got 0"),
        (lambda: LocalPeers(optimizer(small()), 2).step(loss_of(small()), [[]]), "those of 2 machines; got 1"),
        (lambda: LogByte(0.0), "steps_per_e must be a positive number; got 0"),
        (lambda: LogByte(math.inf), "steps_per_e must be a positive number; got inf"),
        (lambda: LogByte(1e12), "levels must be distinct float32 numbers"),
        (lambda: LogByte(0.5, 0), "levels must be distinct float32 numbers"),
        (lambda: LinearByte(0.0), "limit must be a positive number; got 0"),
        (lambda: Log({}, 0), "width must be >= 1"),
    ],
)
def test_bad_arguments_are_named(bad: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bad()


def test_half_precision_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match=r"float32 or float64.*'weight' is torch.float16: keep it in float32"):
        OneByte(half(), lr=0.1)
    model = small()
    zo = optimizer(model)
    with pytest.raises(TypeError, match="float32 or float64 scalar tensor; got torch"):
        zo.step(lambda b: F.cross_entropy(model(b[0]), b[1]).bfloat16(), batches(0, 0))
    with pytest.raises(TypeError, match=r"scalar tensor; got 3\.0"):
        zo.step(lambda b: 3.0, batches(0, 0))  # type: ignore[arg-type, return-value]


def test_frozen_weights_may_be_in_half_precision() -> None:
    model = nn.Sequential(nn.Linear(12, 20).bfloat16().requires_grad_(False), nn.Linear(20, 3))
    zo = optimizer(model)
    zo.step(lambda b: F.cross_entropy(model[1](model[0](b[0].bfloat16()).float()), b[1]), batches(0, 0))
    assert zo.round == 1


def test_a_group_brings_its_own_transport_and_patience() -> None:
    with Mailbox(0, SESSION) as mailbox:
        with pytest.raises(ValueError, match="zo must be a OneByte that keeps a log"):
            Group(optimizer(small(), FullZeroth), mailbox)
        with pytest.raises(ValueError, match="patience must be a positive number of seconds; got 0"):
            Group(optimizer(small()), mailbox, patience=0)


def test_a_rounds_payloads_are_the_members_shares() -> None:
    assert Round((4, 2), b"abcdef").payloads(3) == [b"abc", b"def"]
