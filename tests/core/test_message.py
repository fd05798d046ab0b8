"""Schemas and frames: bitwise round trips, and every damaged, foreign or made-up input refused."""

from __future__ import annotations

import json
import struct
import tracemalloc
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cograd.core.message import Field, Frame, FrameError, Schema, SchemaError, session_id
from core.support import mutations

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool)
FIELDS = st.builds(
    Field,
    st.text(max_size=8),
    st.lists(st.integers(0, 2**40), max_size=4).map(tuple),
    st.sampled_from(DTYPES),
)
SCHEMAS = st.builds(Schema, st.lists(FIELDS, max_size=4).map(tuple), st.text(max_size=10), st.text(max_size=10))
FRAMES = st.builds(
    Frame,
    st.binary(min_size=16, max_size=16),
    st.integers(0, 2**64 - 1),
    st.integers(0, 2**32 - 1),
    st.binary(max_size=200),
    st.booleans(),
)
SESSION = session_id("tests", 1)
SCHEMA = Schema((Field("w", (3, 4)), Field("b", (4,), torch.float16)), "Float32()", "g/1")


def header(session=SESSION, round=0, sender=0, zero=0, length=0, magic=b"cgf1", kind=0) -> bytes:
    """A frame's header built here, byte by byte, from what the format says."""
    return struct.pack("<4sB3x16sQIIQ", magic, kind, session, round, sender, zero, length)


# Schema


@given(SCHEMAS)
def test_schema_round_trip_is_bitwise(schema):
    data = schema.to_bytes()
    assert Schema.from_bytes(data) == schema
    assert Schema.from_bytes(memoryview(data)).to_bytes() == data


def test_schema_bytes_are_canonical_json():
    assert SCHEMA.to_bytes() == (
        b'{"codec":"Float32()","fields":[["w",[3,4],"float32"],["b",[4],"float16"]],"generator":"g/1"}'
    )


def test_dense_bytes_count_each_dtype():
    assert SCHEMA.dense_bytes == 12 * 4 + 4 * 2
    assert Schema((), "x").dense_bytes == 0
    assert Field("scalar", ()).numel == 1


@pytest.mark.parametrize(
    "other",
    [
        replace(SCHEMA, fields=(Field("v", (3, 4)), SCHEMA.fields[1])),
        replace(SCHEMA, fields=SCHEMA.fields[::-1]),
        replace(SCHEMA, fields=SCHEMA.fields[:1]),
        replace(SCHEMA, fields=(Field("w", (4, 3)), SCHEMA.fields[1])),
        replace(SCHEMA, fields=(Field("w", (12,)), SCHEMA.fields[1])),
        replace(SCHEMA, fields=(Field("w", (3, 4), torch.bfloat16), SCHEMA.fields[1])),
        replace(SCHEMA, codec="Float16()"),
        replace(SCHEMA, generator="g/2"),
    ],
    ids=["name", "order", "fewer", "transposed", "flattened", "dtype", "codec", "generator"],
)
def test_digest_changes_with_every_ingredient(other):
    assert len({SCHEMA.digest, other.digest}) == 2
    assert len(other.digest) == 32


def test_digest_of_equal_schemas_is_equal():
    assert Schema.from_bytes(SCHEMA.to_bytes()).digest == SCHEMA.digest


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "[]",
        "{}",
        '{"codec":"a","fields":[],"generator":"g",}',
        '{"codec": "a","fields":[],"generator":"g"}',
        '{"fields":[],"codec":"a","generator":"g"}',
        '{"codec":"a","extra":1,"fields":[],"generator":"g"}',
        '{"codec":1,"fields":[],"generator":"g"}',
        '{"codec":"a","fields":[],"generator":null}',
        '{"codec":NaN,"fields":[],"generator":"g"}',
        '{"codec":' + "[" * 900 + "]" * 900 + ',"fields":[],"generator":"g"}',
        "[" * 100_000,
        '{"codec":"a","fields":[["w",[1]]],"generator":"g"}',
        '{"codec":"a","fields":["abc"],"generator":"g"}',
        '{"codec":"a","fields":[["w",[-1],"float32"]],"generator":"g"}',
        '{"codec":"a","fields":[["w",[1.0],"float32"]],"generator":"g"}',
        '{"codec":"a","fields":[["w",[true],"float32"]],"generator":"g"}',
        '{"codec":"a","fields":[["w","","float32"]],"generator":"g"}',
        '{"codec":"a","fields":[["w",[1],"float"]],"generator":"g"}',
        '{"codec":"a","fields":[["w",[1],"Tensor"]],"generator":"g"}',
        '{"codec":"a","fields":[["w",[1],"no_such"]],"generator":"g"}',
        '{"codec":"a","fields":[["w",[1],"has_mps"]],"generator":"g"}',
        '{"codec":"a","fields":[["w",[1],["float32"]]],"generator":"g"}',
        '{"codec":"a","fields":[[7,[1],"float32"]],"generator":"g"}',
    ],
)
def test_what_is_not_a_schema_is_refused(text):
    with pytest.raises(SchemaError, match="not a schema"):
        Schema.from_bytes(text.encode())


def test_fuzzed_schemas_are_refused_or_canonical():
    originals = [
        SCHEMA.to_bytes(),
        Schema((), "", "").to_bytes(),
        Schema((Field("é\0", (0,)),), "c").to_bytes(),
    ]
    accepted = 0
    for data in mutations(originals, 5000, seed=1):
        try:
            schema = Schema.from_bytes(data)
        except SchemaError:
            continue
        accepted += 1
        assert schema.to_bytes() == data
    assert accepted < 2500


@given(st.recursive(st.none() | st.booleans() | st.floats() | st.text(), st.lists, max_leaves=8))
def test_schemas_of_arbitrary_json_raise_nothing_else(value):
    for content in (value, {"codec": "a", "fields": value, "generator": "g"}, {"codec": value, "fields": []}):
        with pytest.raises(SchemaError):
            Schema.from_bytes(json.dumps(content, indent=1).encode())


# Frame


@given(FRAMES)
def test_frame_round_trip_is_bitwise(frame):
    packed = frame.pack()
    read = Frame.unpack(packed, frame.session, frame.round)
    assert replace(read, payload=bytes(read.payload)) == frame
    assert read.pack() == packed
    assert len(packed) == len(frame.payload) + Frame.OVERHEAD


def test_a_frame_adds_64_bytes_in_the_documented_order():
    packed = Frame(SESSION, 5, 3, b"abc").pack()
    assert Frame.OVERHEAD == 64
    assert packed[:48] == header(round=5, sender=3, length=3)
    assert packed[48:51] == b"abc"


def test_the_payload_is_a_view_of_what_arrived():
    packed = bytearray(Frame(SESSION, 0, 0, b"abcd").pack())
    payload = Frame.unpack(packed, SESSION).payload
    packed[48] = ord("z")
    assert bytes(payload) == b"zbcd"


@pytest.mark.parametrize("length", range(64))
def test_less_than_an_empty_frame_is_truncated(length):
    with pytest.raises(FrameError, match=f"truncated: {length} bytes, a frame has at least 64"):
        Frame.unpack(Frame(SESSION, 0, 0, b"").pack()[:length], SESSION)


def test_every_single_bit_counts():
    packed = Frame(SESSION, 1, 2, b"pay").pack()
    for bit in range(8 * len(packed)):
        altered = bytearray(packed)
        altered[bit // 8] ^= 1 << bit % 8
        with pytest.raises(FrameError):
            Frame.unpack(altered, SESSION)


def test_refusals_say_why():
    packed = Frame(SESSION, 4, 2, b"payload").pack()
    with pytest.raises(FrameError, match="70 bytes where the header announces 71"):
        Frame.unpack(packed[:-1], SESSION)
    with pytest.raises(FrameError, match="72 bytes where the header announces 71"):
        Frame.unpack(packed + b"x", SESSION)
    with pytest.raises(FrameError, match="not a cograd frame"):
        Frame.unpack(b"HTTP" + packed[4:], SESSION)
    with pytest.raises(FrameError, match=r"altered on the way.*sender says 2"):
        Frame.unpack(packed[:50] + b"X" + packed[51:], SESSION)
    with pytest.raises(FrameError, match=f"foreign: session {SESSION.hex()}, expected {bytes(16).hex()}"):
        Frame.unpack(packed, bytes(16))
    with pytest.raises(FrameError, match="round 4 from party 2, expected round 5"):
        Frame.unpack(packed, SESSION, round=5)


def test_a_frame_of_any_round_is_read_when_no_round_is_asked():
    assert Frame.unpack(Frame(SESSION, 4, 0, b"").pack(), SESSION).round == 4


def test_an_announced_exabyte_is_refused_without_allocating():
    data = header(length=2**60) + bytes(100)
    tracemalloc.start()
    try:
        with pytest.raises(FrameError, match="announces"):
            Frame.unpack(data, SESSION)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 100_000


def test_no_mutation_of_10000_is_accepted():
    originals = [
        Frame(SESSION, r, p, payload, error).pack()
        for r, p, payload, error in (
            (0, 0, b"", False),
            (0, 1, b"a", False),
            (3, 0, bytes(40), False),
            (3, 1, bytes(range(200)), False),
            (2**40, 7, b"cannot take part", True),
        )
    ]
    tried = 0
    for data in mutations(originals, 10_500, seed=2):
        if data in originals:
            continue
        tried += 1
        with pytest.raises(FrameError):
            Frame.unpack(data, SESSION)
    assert tried >= 10_000


@pytest.mark.parametrize("length", [0, 15, 17])
def test_a_session_of_another_length_is_refused(length):
    with pytest.raises(ValueError, match=f"session must be 16 bytes.*got {length}"):
        Frame(bytes(length), 0, 0, b"")


@pytest.mark.parametrize(("round", "sender"), [(-1, 0), (2**64, 0), (0, -1), (0, 2**32)])
def test_a_round_or_sender_that_does_not_fit_is_refused(round, sender):
    with pytest.raises(ValueError, match=rf"round must be in .* sender in .*; got {round}, {sender}"):
        Frame(SESSION, round, sender, b"")


def test_session_ids_are_16_bytes_and_depend_on_every_part():
    ids = {session_id("a", 1), session_id("a", 2), session_id("b", 1), session_id("a"), session_id("a1")}
    assert len(ids) == 5
    assert {len(i) for i in ids} == {16}
