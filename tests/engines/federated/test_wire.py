"""Contents as bytes: what arrives is what was sent, or what the codec keeps of it; nothing else is read."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cograd.core.codecs import (
    CodecError,
    Context,
    FixedLength,
    Float16,
    Float32,
    Float64,
    Int32,
    RandomK,
    Split,
    TopK,
    Uniform,
)
from cograd.engines.federated.wire import Wire
from core.support import bits, same_bits

LAYOUT = (30, 12)
CTX = Context(seed=3, round=5, party=1)
DTYPES = (
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16,
    torch.int8, torch.uint8, torch.bool, torch.complex64,
)  # fmt: skip
CODECS = [
    Float32(), Float16(), Float64(), TopK(0.2), TopK(0.5, values=Float16()), TopK(0.3, indices=Int32()),
    RandomK(0.3), Uniform(4), Uniform(16, stochastic=True), Split(Float16(), TopK(0.5), 1),
    Split(Float32(), Float16(), 1),
]  # fmt: skip
each_codec = pytest.mark.parametrize("codec", CODECS, ids=repr)


def drawn(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) * 10
    return x > 0 if dtype == torch.bool else x.abs().to(dtype)


def content() -> dict[str, torch.Tensor]:
    """A vector among other things; the last is as long, but of whole numbers."""
    return {
        "flags": drawn(torch.bool, (3, 7)),
        "x": drawn(torch.float32, (42,)),
        "n": torch.tensor([1, 2]),
        "counts": torch.arange(42),
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (9,), (3, 5), (0,), (2, 0, 3)], ids=str)
def test_every_dtype_arrives_bit_for_bit(dtype, shape):
    wire, sent = Wire(LAYOUT), {"a": drawn(dtype, shape), "b": drawn(torch.float32, (42,))}
    payload = wire.pack(sent, CTX)
    found = wire.unpack(payload, wire.schema(sent), CTX)
    assert list(found) == ["a", "b"]
    assert all(same_bits(found[name], tensor) for name, tensor in sent.items())
    size = (sent["a"].numel() + 7) // 8 if dtype == torch.bool else sent["a"].nbytes
    assert len(payload) == size + 4 * 42


@settings(deadline=None)
@given(st.lists(st.booleans(), max_size=70))
def test_booleans_travel_as_bits(flags):
    wire, sent = Wire(LAYOUT), {"flags": torch.tensor(flags, dtype=torch.bool)}
    payload = wire.pack(sent, CTX)
    assert len(payload) == (len(flags) + 7) // 8
    assert wire.unpack(payload, wire.schema(sent), CTX)["flags"].tolist() == flags


def test_what_is_not_a_number_arrives_as_it_was():
    sent = {"x": torch.tensor([float("nan"), float("inf"), -0.0] * 14), "y": torch.tensor([float("-inf")])}
    wire = Wire(LAYOUT)
    found = wire.unpack(wire.pack(sent, CTX), wire.schema(sent), CTX)
    assert all(torch.equal(bits(found[name]), bits(sent[name])) for name in sent)


def test_views_and_leaves_are_sent_as_they_are_seen():
    wire = Wire(LAYOUT)
    turned = torch.arange(12.0).view(3, 4).t()
    sent = {"turned": turned, "leaf": torch.nn.Parameter(torch.ones(5)), "x": torch.arange(84.0)[::2]}
    found = wire.unpack(wire.pack(sent, CTX), wire.schema(sent), CTX)
    assert found["turned"].tolist() == turned.tolist()
    assert not found["leaf"].requires_grad
    assert found["x"].tolist() == list(range(0, 84, 2))


@each_codec
def test_any_codec_carries_the_vector_and_nothing_else(codec):
    wire, sent = Wire(LAYOUT, codec), content()
    payload = wire.pack(sent, CTX)
    found = wire.unpack(payload, wire.schema(sent), CTX)
    assert torch.equal(found["x"], codec.encode(sent["x"], LAYOUT, CTX).kept.dense())
    for name in ("flags", "n", "counts"):
        assert same_bits(found[name], sent[name])
    rest = 3 + 2 * 8 + 42 * 8
    if isinstance(codec, FixedLength):
        assert len(payload) == rest + codec.nbytes(LAYOUT)
    else:
        assert len(payload) == rest + 4 + len(codec.encode(sent["x"], LAYOUT, CTX).payload)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_vector_keeps_its_dtype_and_shape(dtype):
    wire, sent = Wire(LAYOUT, Float64()), {"x": drawn(dtype, (6, 7))}
    found = wire.unpack(wire.pack(sent, CTX), wire.schema(sent), CTX)
    assert same_bits(found["x"], sent["x"])


def test_tensors_arrive_where_torch_would_put_them():
    """Sums over a vector may depend on how it is aligned; they must not depend on what came before it."""
    for length in range(1, 20):
        sent = {"before": torch.zeros(length, dtype=torch.uint8), "x": torch.zeros(42), "y": torch.zeros(9)}
        wire = Wire(LAYOUT)
        found = wire.unpack(wire.pack(sent, CTX), wire.schema(sent), CTX)
        assert found["x"].data_ptr() % 64 == found["y"].data_ptr() % 64 == 0


@each_codec
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_truncated_and_lengthened_payloads_are_refused(codec, data):
    wire, sent = Wire(LAYOUT, codec), content()
    payload, schema = wire.pack(sent, CTX), wire.schema(sent)
    cut = data.draw(st.integers(0, len(payload) - 1), "cut")
    more = data.draw(st.binary(min_size=1, max_size=50), "more")
    for damaged in (payload[:cut], payload + more):
        with pytest.raises(CodecError):
            wire.unpack(damaged, schema, CTX)


@each_codec
@settings(max_examples=60, deadline=None)
@given(noise=st.binary(max_size=300))
def test_a_payload_that_is_no_content_is_refused_or_read_whole(codec, noise):
    wire = Wire(LAYOUT, codec)
    schema = wire.schema({"x": torch.zeros(42), "mask": torch.zeros(9, dtype=torch.bool)})
    try:
        found = wire.unpack(noise, schema, CTX)
    except CodecError:
        return
    assert found["x"].shape == (42,)
    assert found["mask"].shape == (9,)


def test_a_content_of_no_tensors_is_refused_by_name():
    with pytest.raises(TypeError, match="content 'n' must be a tensor; got int"):
        Wire(LAYOUT).pack({"n": 3}, CTX)


def test_an_empty_content_is_empty():
    wire = Wire(LAYOUT)
    assert wire.pack({}, CTX) == b""
    assert wire.unpack(b"", wire.schema({}), CTX) == {}
    with pytest.raises(CodecError, match="a payload of 0 bytes is expected; got 1"):
        wire.unpack(b"x", wire.schema({}), CTX)
