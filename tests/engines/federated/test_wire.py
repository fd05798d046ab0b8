"""Contents as bytes: what arrives is what was sent, or what the codec keeps of it; nothing else is read."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cograd.core.codecs import CodecError, Context, Float16, Float32, RandomK, TopK, Uniform
from cograd.engines.federated.wire import Wire

LAYOUT = (30, 12)
CTX = Context(seed=3, round=5, party=1)
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool)


def drawn(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) * 10
    return x > 0 if dtype == torch.bool else x.abs().to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (9,), (3, 5), (0,)], ids=str)
def test_every_dtype_arrives_bit_for_bit(dtype, shape):
    wire, content = Wire(LAYOUT), {"a": drawn(dtype, shape), "b": drawn(torch.float32, (42,))}
    payload = wire.pack(content, CTX)
    found = wire.unpack(payload, wire.schema(content), CTX)
    assert list(found) == ["a", "b"]
    for name, tensor in content.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    bits = (content["a"].numel() + 7) // 8 if dtype == torch.bool else content["a"].nbytes
    assert len(payload) == bits + 4 * 42


@pytest.mark.parametrize(
    "codec", [Float16(), TopK(0.2), RandomK(0.3), Uniform(4), TopK(0.5, values=Float16())], ids=repr
)
def test_any_codec_carries_the_vector_and_nothing_else(codec):
    wire = Wire(LAYOUT, codec)
    content = {"x": drawn(torch.float32, (42,)), "size": torch.tensor(7), "other": drawn(torch.float32, (5,))}
    found = wire.unpack(wire.pack(content, CTX), wire.schema(content), CTX)
    kept = codec.encode(content["x"], LAYOUT, CTX).kept.dense()
    assert torch.equal(found["x"], kept)
    assert torch.equal(found["other"], content["other"])
    assert found["size"] == 7


@given(st.binary(max_size=300))
@settings(max_examples=200, deadline=None)
def test_a_payload_that_is_no_content_is_refused_or_read_whole(data):
    wire = Wire(LAYOUT, TopK(0.2))
    schema = wire.schema({"x": torch.zeros(42), "mask": torch.zeros(9, dtype=torch.bool)})
    try:
        found = wire.unpack(data, schema, CTX)
    except CodecError:
        return
    assert found["x"].shape == (42,)


@pytest.mark.parametrize("codec", [Float32(), TopK(0.2)], ids=repr)
def test_truncated_and_lengthened_payloads_are_refused(codec):
    wire, content = Wire(LAYOUT, codec), {"x": drawn(torch.float32, (42,)), "n": torch.tensor([1, 2])}
    payload, schema = wire.pack(content, CTX), wire.schema(content)
    for damaged in (payload[:-1], payload[:20], b"", payload + b"\0"):
        with pytest.raises(CodecError):
            wire.unpack(damaged, schema, CTX)
