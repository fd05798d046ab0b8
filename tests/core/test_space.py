"""The parameter space: order, tied tensors once, a digest of all of it, and views that share storage."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from cograd.core.codecs import Float16
from cograd.core.message import Field, Schema
from cograd.core.space import ParamSpace, trainable
from core.support import gaussian

SHAPES = st.dictionaries(
    st.text(max_size=5), st.lists(st.integers(0, 4), max_size=3).map(tuple), min_size=1, max_size=5
)


class Tied(nn.Module):
    """A language model's ends: one matrix that embeds and decodes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 3)
        self.norm = nn.BatchNorm1d(3)
        self.head = nn.Linear(3, 6)
        self.head.weight = self.embed.weight


def test_parameters_in_order_tied_ones_once_and_no_buffers():
    space = ParamSpace.of(Tied())
    assert [(s.name, s.shape, s.offset) for s in space] == [
        ("embed.weight", (6, 3), 0),
        ("norm.weight", (3,), 18),
        ("norm.bias", (3,), 21),
        ("head.bias", (6,), 24),
    ]
    assert (len(space), space.numel, space.layout) == (4, 30, (18, 3, 3, 6))
    assert space["norm.bias"].slice == slice(21, 24)
    assert repr(space) == f"ParamSpace(4 tensors, 30 elements, {space.digest[:8]})"


def test_frozen_parameters_are_left_out():
    model = Tied()
    model.norm.requires_grad_(False)
    assert [s.name for s in ParamSpace.of(model)] == ["embed.weight", "head.bias"]
    assert list(trainable(model)) == ["embed.weight", "head.bias"]
    assert trainable(model)["embed.weight"] is model.head.weight


def test_include_narrows_by_name_and_parameter():
    space = ParamSpace.of(Tied(), include=lambda name, p: p.ndim == 1 and name != "head.bias")
    assert [s.name for s in space] == ["norm.weight", "norm.bias"]


@given(SHAPES)
def test_offsets_follow_sizes(shapes):
    space = ParamSpace(shapes)
    offset = 0
    for segment, (name, shape) in zip(space, shapes.items(), strict=True):
        assert (segment.name, segment.shape, segment.offset) == (name, shape, offset)
        offset += torch.empty(shape).numel()
    assert space.numel == sum(space.layout) == offset
    assert space.zeros().shape == (offset,)


@given(SHAPES)
def test_flatten_and_views_are_inverse(shapes):
    space = ParamSpace(shapes)
    vector = gaussian(space.numel, "space")
    views = space.views(vector)
    assert [(name, tuple(v.shape)) for name, v in views.items()] == list(shapes.items())
    assert torch.equal(space.flatten(views), vector)


def test_views_share_the_vectors_storage_and_flatten_copies():
    space = ParamSpace({"a": (2, 2), "b": ()})
    vector = space.zeros()
    space.views(vector)["a"][1, 0] = 5
    space.views(vector)["b"].fill_(7)
    assert vector.tolist() == [0, 0, 5, 0, 7]
    flat = space.flatten(space.views(vector))
    flat.zero_()
    assert vector.tolist() == [0, 0, 5, 0, 7]


def test_flatten_reads_by_name_and_layout_and_fills_out():
    space = ParamSpace({"a": (2, 2), "b": (1,)})
    tensors = {
        "extra": torch.zeros(9),
        "b": torch.tensor([9.0]),
        "a": torch.tensor([[1.0, 2.0], [3.0, 4.0]]).t(),
    }
    out = torch.zeros(5, dtype=torch.float64)
    assert space.flatten(tensors, out) is out
    assert out.tolist() == [1, 3, 2, 4, 9]


def test_flatten_takes_the_dtype_of_its_tensors_and_no_graph():
    model = Tied().double()
    vector = ParamSpace.of(model).flatten(dict(model.named_parameters()))
    assert vector.dtype == torch.float64
    assert not vector.requires_grad
    assert ParamSpace.of(model).zeros(dtype=torch.bfloat16).dtype == torch.bfloat16


BASE = {"a": (2, 3), "b": (4,)}


@pytest.mark.parametrize(
    "other",
    [
        {"b": (4,), "a": (2, 3)},
        {"a": (3, 2), "b": (4,)},
        {"a": (6,), "b": (4,)},
        {"a": (2, 3), "c": (4,)},
        {"a": (2, 3)},
        {"a": (2, 3), "b": (4,), "c": ()},
    ],
    ids=["order", "transposed", "flattened", "name", "fewer", "more"],
)
def test_digest_changes_with_order_shape_and_name(other):
    assert ParamSpace(BASE).digest != ParamSpace(other).digest


def test_digest_does_not_depend_on_how_shapes_are_given():
    assert ParamSpace(BASE).digest == ParamSpace({"a": torch.Size([2, 3]), "b": [4]}).digest
    assert ParamSpace.of(Tied()).digest == ParamSpace.of(Tied()).digest


def test_the_schema_names_every_segment_and_the_codec():
    fields = (Field("a", (2, 3), torch.float16), Field("b", (4,), torch.float16))
    assert ParamSpace(BASE).schema(Float16(), torch.float16) == Schema(fields, "Float16()")


def test_reordered_is_stable_and_starts_anew():
    space = ParamSpace({"w2": (2, 2), "b9": (2,), "w1": (3, 2), "b2": (3,)})
    reordered = space.reordered(lambda s: len(s.shape) == 1)
    assert [(s.name, s.offset) for s in reordered] == [("b9", 0), ("b2", 2), ("w2", 5), ("w1", 9)]
    assert reordered.reordered(lambda s: False).digest == reordered.digest
    assert space.reordered(lambda s: True).digest == space.digest


def test_errors_name_what_is_wrong():
    space = ParamSpace(BASE)
    good = {"a": torch.zeros(2, 3), "b": torch.zeros(4)}
    with pytest.raises(ValueError, match="tensor 'b' is missing; the space holds 2 tensors"):
        space.flatten({"a": good["a"]})
    with pytest.raises(ValueError, match="'a' is missing"):
        space.flatten({})
    with pytest.raises(ValueError, match=r"'a' must have shape \(2, 3\); got \(3, 2\)"):
        space.flatten({**good, "a": torch.zeros(3, 2)})
    with pytest.raises(ValueError, match=r"vector must have shape \(10,\); got \(11,\)"):
        space.views(torch.zeros(11))
    with pytest.raises(ValueError, match=r"vector must have shape \(10,\); got \(2, 5\)"):
        space.views(torch.zeros(2, 5))
    with pytest.raises(ValueError, match=r"shape of 'x' must have no negative size; got \(2, -1\)"):
        ParamSpace({"x": (2, -1)})


def test_an_empty_space_is_refused():
    with pytest.raises(ValueError, match="needs at least one tensor; got none"):
        ParamSpace({})
    with pytest.raises(ValueError, match="are all parameters frozen"):
        ParamSpace.of(nn.Linear(2, 2).requires_grad_(False))
