"""Codecs: what is kept is what is decoded, payloads have the predicted length, damaged ones are refused."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cograd.core.codecs import (
    Codec,
    CodecError,
    Context,
    Dense,
    FixedLength,
    Float16,
    Float32,
    Float64,
    Int32,
    RandomK,
    RunLength16,
    Sparse,
    Split,
    TopK,
    Uniform,
    count_for,
    density_checked,
    reduce,
    tensor_of,
)
from cograd.core.selection import Sampled
from cograd.core.streams import stream
from core.support import gaussian, mutations, same_bits

CODECS: list[Codec] = [
    Float32(),
    Float16(),
    Float64(),
    *(Uniform(bits, stochastic) for bits in (2, 4, 8, 16) for stochastic in (False, True)),
    RandomK(0.3),
    RandomK(0.3, Float16(), common=False, unbiased=True),
    RandomK(0.5, Uniform(4)),
    TopK(0.1),
    TopK(0.3, Float16(), Int32()),
    TopK(0.3, Uniform(4), RunLength16()),
    TopK(0.5, Uniform(8, stochastic=True), Int32(), Sampled(0.2)),
    Split(Float32(), TopK(0.3), 1),
    Split(Float16(), Float32(), 2),
    Split(Uniform(4), RandomK(0.5), 1),
    Split(Float32(), Float16(), 0),
]
FIXED = [c for c in CODECS if isinstance(c, FixedLength)]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
LAYOUTS = st.lists(st.integers(0, 37), max_size=5).map(tuple)
CTX = Context(seed=3, round=5, party=1)

each_codec = pytest.mark.parametrize("codec", CODECS, ids=repr)
each_bits = pytest.mark.parametrize("bits", [2, 4, 8, 16])


def spikes(n: int, positions: list[int]) -> Tensor:
    """A vector of n that is zero but for 1, 2, 3, ... at the positions."""
    x = torch.zeros(n)
    x[positions] = torch.arange(1.0, len(positions) + 1)
    return x


def top(positions: list[int], n: int, **parts: object) -> TopK:
    """A TopK that keeps exactly as many entries of n as there are positions."""
    return TopK(len(positions) / n, **parts)


# Every codec


@each_codec
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(layout=LAYOUTS, seed=st.integers(0, 1000))
def test_decoding_gives_what_is_kept_bit_for_bit(codec, dtype, layout, seed):
    x = gaussian(sum(layout), seed, dtype=dtype)
    before = x.clone()
    encoded = codec.encode(x, layout, CTX)
    decoded = codec.decode(bytes(encoded.payload), layout, CTX)
    assert type(decoded) is type(encoded.kept)
    assert same_bits(decoded.dense().to(dtype), encoded.kept.dense())
    assert decoded.dense().shape == (sum(layout),)
    assert same_bits(x, before)


@pytest.mark.parametrize("codec", FIXED, ids=repr)
@given(layout=LAYOUTS)
def test_a_fixed_length_is_known_beforehand(codec, layout):
    payload = codec.encode(gaussian(sum(layout), 1), layout, CTX).payload
    assert len(payload) == codec.nbytes(layout)


def test_which_codecs_have_a_fixed_length():
    assert {type(c) for c in FIXED} == {Float32, Float16, Float64, Uniform, RandomK}


@each_codec
def test_encoding_is_a_function_of_vector_and_context(codec):
    x, layout = gaussian(60, 2), (20, 0, 1, 39)
    assert codec.encode(x, layout, CTX).payload == codec.encode(x.clone(), layout, CTX).payload


@each_codec
@pytest.mark.parametrize("shape", [(4,), (6,), (0,), (1, 5)])
def test_a_vector_of_another_shape_is_refused(codec, shape):
    with pytest.raises(ValueError, match=r"x must have shape \(5,\) for this layout; got \(") as caught:
        codec.encode(torch.zeros(shape), (2, 3), CTX)
    assert str(shape) in str(caught.value)


@each_codec
def test_state_goes_through_untouched(codec):
    state = {"kept by someone": torch.ones(1)}
    assert codec.encode(gaussian(5, 0), (2, 3), CTX, state).state is state
    assert codec.encode(gaussian(5, 0), (2, 3), CTX).state == {}


@each_codec
def test_a_payload_of_another_length_is_refused(codec):
    layout = (1, 0, 8)
    payload = bytes(codec.encode(gaussian(9, 0), layout, CTX).payload)
    for wrong in (payload[:-1], payload + b"\0", b"\0"):
        with pytest.raises(CodecError, match="bytes"):
            codec.decode(wrong, layout, CTX)


def check_valid(decoded: Dense | Sparse, numel: int) -> None:
    if isinstance(decoded, Dense):
        assert decoded.values.shape == (numel,)
        return
    indices = decoded.indices
    assert indices.dtype == torch.int64
    assert decoded.numel == numel
    assert decoded.values.shape == indices.shape
    if len(indices):
        assert int(indices.min()) >= 0
        assert int(indices.max()) < numel
        assert bool((indices.diff() > 0).all())


@each_codec
def test_a_damaged_payload_is_refused_or_decodes_to_a_vector(codec):
    layout = (7, 0, 1, 40)
    originals = [bytes(codec.encode(gaussian(48, s), layout, CTX).payload) for s in range(4)]
    accepted = refused = 0
    for data in mutations(originals, 1200, seed=3):
        try:
            decoded = codec.decode(data, layout, CTX)
        except CodecError:
            refused += 1
            continue
        accepted += 1
        check_valid(decoded, 48)
        assert decoded.dense().shape == (48,)
    assert accepted
    assert refused


# Raw


def test_raw_bytes_are_little_endian_ieee():
    x = torch.tensor([1.0, -2.5])
    assert Float32().encode(x, (2,), CTX).payload == np.array([1, -2.5], "<f4").tobytes()
    assert Float16().encode(x, (2,), CTX).payload == np.array([1, -2.5], "<f2").tobytes()
    assert Float64().encode(x, (2,), CTX).payload == np.array([1, -2.5], "<f8").tobytes()


def test_raw_keeps_special_values_bit_for_bit():
    x = torch.tensor([math.nan, math.inf, -math.inf, -0.0, 1e-45])
    assert same_bits(Float32().decode(Float32().encode(x, (5,), CTX).payload, (5,), CTX).values, x)


def test_float16_is_lossy_and_overflows_as_it_says():
    kept = Float16().encode(torch.tensor([1.0001, 65504.0, 1e6]), (3,), CTX).kept.dense()
    assert kept.tolist() == [1.0, 65504.0, math.inf]
    assert kept.dtype == torch.float32


def test_tensor_of_shares_writable_bytes_and_copies_others():
    payload = bytearray(8)
    tensor_of(payload, torch.float32)[0] = 1
    assert payload == np.array([1, 0], "<f4").tobytes()
    fixed = bytes(8)
    tensor_of(fixed, torch.float32)[0] = 1
    assert fixed == bytes(8)
    assert tensor_of(b"", torch.float16).dtype == torch.float16


# Positions


@pytest.mark.parametrize("gap", [0, 1, 65535, 65536, 131071, 131072, 200_000])
@pytest.mark.parametrize("first", [0, 70_000])
def test_run_lengths_break_a_gap_every_65536(gap, first):
    positions = [first, first + gap + 1]
    n = positions[-1] + 10
    codec = top(positions, n)
    encoded = codec.encode(spikes(n, positions), (n,), CTX)
    slots = 2 + first // 65536 + gap // 65536
    assert len(encoded.payload) == 6 * slots
    assert encoded.kept.indices.tolist() == positions
    assert encoded.kept.values.tolist() == [1, 2]
    assert torch.equal(codec.decode(encoded.payload, (n,), CTX).dense(), spikes(n, positions))


def test_run_length_codes_written_out():
    codes, slots = RunLength16().pack(torch.tensor([3, 4, 65541, 131078]), 200_000)
    assert codes.tolist() == [3, 0, 65535, 0, 65535, 0]
    assert slots.tolist() == [0, 1, 3, 5]
    assert RunLength16().unpack(codes.tobytes(), 200_000).tolist() == [3, 4, 65540, 65541, 131077, 131078]
    codes, slots = RunLength16().pack(torch.tensor([3, 65539]), 200_000)
    assert (codes.tolist(), slots) == ([3, 65535], None)


def test_no_position_takes_no_byte():
    for indices in (RunLength16(), Int32()):
        codes, slots = indices.pack(torch.empty(0, dtype=torch.int64), 10)
        assert len(codes) == 0
        assert slots is None
        assert indices.unpack(b"", 10).tolist() == []


@given(st.sets(st.integers(0, 400_000), min_size=1, max_size=20).map(sorted))
def test_run_lengths_round_trip_with_the_slots_they_predict(positions):
    codes, slots = RunLength16().pack(torch.tensor(positions), 400_001)
    unpacked = RunLength16().unpack(codes.tobytes(), 400_001)
    found = unpacked if slots is None else unpacked[slots]
    gaps = [b - a - 1 for a, b in zip([-1, *positions[:-1]], positions, strict=True)]
    assert found.tolist() == positions
    assert len(codes) == len(positions) + sum(g // 65536 for g in gaps)


def test_int32_writes_positions_and_stops_at_2_to_31():
    codes, slots = Int32().pack(torch.tensor([0, 70_000]), 2**31)
    assert codes.tobytes() == np.array([0, 70_000], "<i4").tobytes()
    assert slots is None
    with pytest.raises(ValueError, match=rf"2\^31 elements; the vector has {2**31 + 1}: use RunLength16"):
        Int32().pack(torch.tensor([0]), 2**31 + 1)


# TopK


@pytest.mark.parametrize(
    ("numel", "density", "count"),
    [
        (1000, 0.001, 1),
        (1001, 0.001, 2),
        (3000, 0.001, 3),
        (7, 0.001, 1),
        (10, 0.25, 3),
        (10, 1.0, 10),
        (1, 0.5, 1),
        (0, 0.5, 0),
        (10**9, 0.001, 10**6),
        (61_706, 0.07, 4320),
    ],
)
def test_a_density_keeps_the_next_whole_number_and_at_least_one(numel, density, count):
    assert count_for(numel, density) == count


@pytest.mark.parametrize("layout", [(1000,), (400, 1, 0, 599), (31, 33, 936)])
@pytest.mark.parametrize("density", [0.003, 0.1, 1.0])
def test_top_k_keeps_what_torch_topk_finds_in_each_segment(layout, density):
    x = gaussian(1000, "topk")
    kept = TopK(density).encode(x, layout, CTX).kept
    expected, offset = [], 0
    for n in layout:
        k = math.ceil(n * density)
        expected += sorted((x[offset : offset + n].abs().topk(k).indices + offset).tolist())
        offset += n
    assert kept.indices.tolist() == expected
    assert torch.equal(kept.values, x[kept.indices])


@pytest.mark.parametrize(
    ("values", "value_bytes"),
    [(Float32(), lambda k: 4 * k), (Float16(), lambda k: 2 * k), (Uniform(4), lambda k: 4 + math.ceil(k / 2))],
)
@pytest.mark.parametrize("indices", [RunLength16(), Int32()])
@pytest.mark.parametrize("k", [1, 25])
def test_the_encoded_length_is_values_and_positions_and_nothing_else(values, value_bytes, indices, k):
    x = gaussian(1000, "length")
    codec = TopK(k / 1000, values, indices)
    assert len(codec.encode(x, (1000,), CTX).payload) == value_bytes(k) + indices.width * k


def test_top_k_with_a_lossy_quantiser_across_escapes():
    positions = [5, 90_000, 300_000]
    x = spikes(300_001, positions)
    for values in (Uniform(8), Uniform(8, stochastic=True), Float16()):
        encoded = top(positions, len(x), values=values).encode(x, (len(x),), CTX)
        decoded = top(positions, len(x), values=values).decode(encoded.payload, (len(x),), CTX)
        assert len(decoded.indices) == 3 + 1 + 3
        assert torch.equal(decoded.dense(), encoded.kept.dense())
        assert torch.allclose(encoded.kept.values, x[positions], atol=3 / 127)


def test_top_k_positions_out_of_range_or_order_are_refused():
    codec = TopK(0.5, indices=Int32())
    for positions in ([0, 10], [-1, 3], [3, 3], [4, 2]):
        payload = bytes(8) + np.array(positions, "<i4").tobytes()
        with pytest.raises(CodecError, match=r"positions must ascend within 0 \.\. 9"):
            codec.decode(payload, (10,), CTX)
    with pytest.raises(CodecError, match="got up to 10"):
        TopK(0.5).decode(bytes(4) + b"\x0a\0", (10,), CTX)


def test_a_small_payload_for_a_huge_layout_allocates_little():
    huge = (2**40,)
    assert TopK(0.1).decode(np.array([1], "<f4").tobytes() + b"\7\0", huge, CTX).indices.tolist() == [7]
    for codec in (Float32(), Uniform(2), RandomK(0.5), Split(Float32(), TopK(0.1), 1)):
        with pytest.raises(CodecError, match="bytes; got 5"):
            codec.decode(bytes(5), huge, CTX)


@pytest.mark.parametrize("make", [TopK, RandomK])
@pytest.mark.parametrize("density", [0, -0.1, 1.01, math.nan, math.inf])
def test_a_density_outside_zero_one_is_refused(make, density):
    with pytest.raises(ValueError, match=rf"density must be in \(0, 1\]; got {density}"):
        make(density)


def test_density_checked_returns_the_density():
    assert density_checked(1) == 1


@pytest.mark.parametrize("make", [lambda v: TopK(0.1, v), lambda v: RandomK(0.1, v), lambda v: Split(v, v, 1)])
def test_an_inner_codec_must_have_a_fixed_length(make):
    with pytest.raises(ValueError, match=r"must be a codec of fixed length; got TopK\(density=0\.2"):
        make(TopK(0.2))


# RandomK


def positions_of(codec: RandomK, ctx: Context, layout: tuple[int, ...] = (100, 0, 1, 99)) -> list[int]:
    return codec.encode(torch.ones(sum(layout)), layout, ctx).kept.indices.tolist()


def test_random_k_shares_positions_between_parties_of_a_round():
    codec = RandomK(0.1)
    assert positions_of(codec, CTX) == positions_of(codec, replace(CTX, party=9))
    assert positions_of(codec, CTX) != positions_of(codec, replace(CTX, round=6))
    assert positions_of(codec, CTX) != positions_of(codec, replace(CTX, seed=4))
    own = RandomK(0.1, common=False)
    assert positions_of(own, CTX) != positions_of(own, replace(CTX, party=9))
    assert positions_of(own, CTX) == positions_of(own, CTX)


def test_random_k_keeps_the_count_of_each_segment():
    found = positions_of(RandomK(0.1), CTX)
    assert sum(i < 100 for i in found) == 10
    assert 100 in found
    assert sum(i > 100 for i in found) == 10
    assert RandomK(0.1).nbytes((100, 0, 1, 99)) == 4 * 21


def test_common_payloads_may_be_added_as_they_are():
    codec, layout = RandomK(0.2), (50,)
    a, b = gaussian(50, "a"), gaussian(50, "b")
    coded = [codec.encode(x, layout, replace(CTX, party=p)).payload for p, x in enumerate((a, b))]
    added = (tensor_of(coded[0], torch.float32) + tensor_of(coded[1], torch.float32)).numpy().tobytes()
    expected = codec.encode(a + b, layout, CTX).kept.dense()
    assert torch.equal(codec.decode(added, layout, CTX).dense(), expected)


def test_random_k_is_unbiased_if_asked():
    x, layout, rounds = gaussian(30, "mean"), (20, 10), 4000
    total = torch.zeros(30)
    for r in range(rounds):
        RandomK(0.25, unbiased=True).encode(x, layout, Context(1, r)).kept.add_to(total)
    n_over_k = torch.tensor([20 / 5] * 20 + [10 / 3] * 10)
    standard_error = x.abs() * ((n_over_k - 1) / rounds).sqrt()
    assert bool(((total / rounds - x).abs() < 4.5 * standard_error).all())


def test_random_k_sends_values_as_they_are_unless_asked():
    x = gaussian(40, 1)
    plain = RandomK(0.25).encode(x, (40,), CTX).kept
    scaled = RandomK(0.25, unbiased=True).encode(x, (40,), CTX).kept
    assert torch.equal(plain.values, x[plain.indices])
    assert torch.equal(scaled.values, 4 * x[scaled.indices])


# Uniform


@each_bits
@given(layout=LAYOUTS, seed=st.integers(0, 1000), exponent=st.integers(-20, 20))
def test_the_nearest_step_is_within_half_a_step(bits, layout, seed, exponent):
    x = gaussian(sum(layout), seed) * 10.0**exponent
    kept = Uniform(bits).encode(x, layout, CTX).kept.dense()
    for part, coded in zip(x.split(list(layout)), kept.split(list(layout)), strict=True):
        if len(part):
            step = float(part.abs().max()) / (2 ** (bits - 1) - 1)
            # beyond a half only what float32 rounds: 2^-24 of up to 2^15 steps, a few times
            assert float((part - coded).abs().max()) <= step * 0.505


@each_bits
def test_the_largest_magnitude_is_kept_and_levels_are_whole_steps(bits):
    x = gaussian(99, "levels")
    kept = Uniform(bits).encode(x, (99,), CTX).kept.dense()
    largest = int(x.abs().argmax())
    assert float(kept[largest]) == pytest.approx(float(x[largest]), rel=1e-6)
    levels = kept / (x.abs().max() / (2 ** (bits - 1) - 1))
    assert float((levels - levels.round()).abs().max()) < 0.01


@each_bits
def test_stochastic_rounding_is_unbiased_and_within_a_step(bits):
    x, rounds, codec = gaussian(40, "stochastic"), 2000, Uniform(bits, stochastic=True)
    step = float(x.abs().max()) / (2 ** (bits - 1) - 1)
    total = torch.zeros(40, dtype=torch.float64)
    for r in range(rounds):
        kept = codec.encode(x, (40,), Context(2, r)).kept.dense()
        assert float((kept - x).abs().max()) <= step * 1.005
        total += kept
    assert float((total / rounds - x).abs().max()) < 4.5 * step / 2 / rounds**0.5 + 0.005 * step


def test_stochastic_rounding_differs_by_round_and_party():
    x, codec = gaussian(200, 1), Uniform(4, stochastic=True)
    contexts = (CTX, replace(CTX, round=6), replace(CTX, party=2), replace(CTX, seed=9))
    assert len({bytes(codec.encode(x, (200,), ctx).payload) for ctx in contexts}) == 4
    assert len({bytes(Uniform(4).encode(x, (200,), ctx).payload) for ctx in contexts}) == 1


@each_bits
@pytest.mark.parametrize("stochastic", [False, True])
def test_zeros_stay_zero(bits, stochastic):
    encoded = Uniform(bits, stochastic).encode(torch.zeros(5), (5,), CTX)
    assert encoded.kept.dense().tolist() == [0] * 5
    assert not any(encoded.payload)


def test_each_segment_has_its_own_step():
    x = torch.tensor([1000.0, 1.0, 0.01, 0.005])
    assert torch.allclose(Uniform(8).encode(x, (1, 1, 2), CTX).kept.dense(), x, rtol=0.01)


@pytest.mark.parametrize(
    ("bits", "x", "codes"),
    [
        (2, [1, -1, 0, 1, -1], bytes([0b01_00_11_01, 0b11])),
        (4, [7, -7, 1], bytes([0x97, 0x01])),
        (8, [127, -127, -1], bytes([0x7F, 0x81, 0xFF])),
        (16, [32767, -32767, -1], bytes([0xFF, 0x7F, 0x01, 0x80, 0xFF, 0xFF])),
    ],
)
def test_codes_are_packed_low_bits_first(bits, x, codes):
    payload = Uniform(bits).encode(torch.tensor(x).float(), (len(x),), CTX).payload
    assert payload == np.array([1], "<f4").tobytes() + codes


@each_bits
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_vector_that_is_not_finite_cannot_be_quantised(bits, bad):
    with pytest.raises(ValueError, match="x must be finite"):
        Uniform(bits).encode(torch.tensor([1.0, bad]), (2,), CTX)


@pytest.mark.parametrize("step", [math.nan, math.inf, -1.0])
def test_a_step_that_no_vector_has_is_refused(step):
    with pytest.raises(CodecError, match="steps must be finite and >= 0"):
        Uniform(8).decode(np.array([step], "<f4").tobytes() + b"\1", (1,), CTX)


def test_no_negative_zero_is_kept_where_a_code_holds_none():
    kept = Uniform(4).encode(torch.tensor([-0.001, 1.0]), (2,), CTX).kept.dense()
    assert same_bits(kept, torch.tensor([0.0, 1.0]))


@pytest.mark.parametrize("bits", [0, 1, 3, 32, 8.5])
def test_other_bit_widths_are_refused(bits):
    with pytest.raises(ValueError, match=f"bits must be 2, 4, 8 or 16; got {bits}"):
        Uniform(bits)


# Split


def test_split_writes_the_head_then_the_tail():
    x, layout = gaussian(12, "split"), (2, 3, 7)
    encoded = Split(Float16(), TopK(0.2), 2).encode(x, layout, CTX)
    head, tail = Float16().encode(x[:5], (2, 3), CTX), TopK(0.2).encode(x[5:], (7,), CTX)
    assert encoded.payload == head.payload + tail.payload
    assert encoded.kept.indices.tolist() == [0, 1, 2, 3, 4, *(tail.kept.indices + 5).tolist()]


def test_a_narrow_head_does_not_narrow_the_tail():
    x = torch.tensor([1.5, 1 / 3])
    decoded = Split(Float16(), Float32(), 1).decode(
        Split(Float16(), Float32(), 1).encode(x, (1, 1), CTX).payload, (1, 1), CTX
    )
    assert same_bits(decoded.dense(), x)


@pytest.mark.parametrize("segments", [0, 2, 5])
@pytest.mark.parametrize(
    "tail", [TopK(0.5), RandomK(0.5), Uniform(8), TopK(0.5, threshold=Sampled())], ids=repr
)
def test_split_may_leave_either_side_empty(segments, tail):
    x, codec = gaussian(6, 1), Split(Float32(), tail, segments)
    encoded = codec.encode(x, (2, 4), CTX)
    assert torch.equal(codec.decode(encoded.payload, (2, 4), CTX).dense(), encoded.kept.dense())
    if segments:
        assert torch.equal(encoded.kept.dense(), x)


def test_split_refuses_a_negative_number_of_segments():
    with pytest.raises(ValueError, match="segments must be >= 0; got -1"):
        Split(Float32(), Float32(), -1)


# reduce


def encoded_all(codec: Codec, vectors: list[Tensor]) -> list[bytearray]:
    return [codec.encode(x, (len(x),), Context(party=p)).payload for p, x in enumerate(vectors)]


def test_reduce_adds_in_the_order_given():
    payloads = encoded_all(Float32(), [torch.tensor([v]) for v in (1e8, 1.0, -1e8)])
    contexts = [Context(party=p) for p in range(3)]
    assert reduce(Float32(), payloads, (1,), contexts).tolist() == [0.0]
    order = [0, 2, 1]
    reordered = reduce(Float32(), [payloads[i] for i in order], (1,), [contexts[i] for i in order])
    assert reordered.tolist() == [1.0]


@pytest.mark.parametrize("codec", [Float32(), TopK(0.3), RandomK(0.3, common=False)], ids=repr)
def test_reduce_weighs_and_overwrites_out(codec):
    vectors = [gaussian(20, s) for s in range(3)]
    contexts = [Context(party=p) for p in range(3)]
    weights = [0.5, 0.0, -2.0]
    kept = [codec.encode(x, (20,), c).kept.dense() for x, c in zip(vectors, contexts, strict=True)]
    out = torch.full((20,), 7.0)
    total = reduce(codec, encoded_all(codec, vectors), (20,), contexts, weights, out)
    assert total is out
    assert torch.allclose(out, 0.5 * kept[0] - 2 * kept[2], atol=1e-6)


def test_reduce_refuses_as_many_weights_as_do_not_fit():
    payloads = encoded_all(Float32(), [torch.ones(1), torch.ones(1)])
    contexts = [Context(party=0), Context(party=1)]
    for weights in ([], [1.0], [1.0, 1.0, 1.0]):
        with pytest.raises(ValueError, match=r"shorter|longer"):
            reduce(Float32(), payloads, (1,), contexts, weights)
    with pytest.raises(ValueError, match=r"shorter|longer"):
        reduce(Float32(), payloads, (1,), contexts[:1])


def test_reduce_decodes_each_party_in_its_own_context():
    codec = RandomK(0.2, common=False)
    x = torch.ones(50)
    contexts = [Context(party=p) for p in range(4)]
    total = reduce(codec, encoded_all(codec, [x] * 4), (50,), contexts)
    expected = torch.zeros(50)
    for p in range(4):
        expected[stream(0, "random-k", 0, p).choice(50, 10)] += 1
    assert torch.equal(total, expected)


def test_decoded_vectors_add_to_any_dtype():
    total = torch.zeros(3, dtype=torch.float64)
    Dense(torch.tensor([1.0, 2.0, 3.0])).add_to(total, 2.0)
    Sparse(torch.tensor([1]), torch.tensor([1.0], dtype=torch.float16), 3).add_to(total, -1.0)
    assert total.tolist() == [2.0, 3.0, 6.0]
