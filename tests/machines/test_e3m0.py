"""E3M0: four bits an entry, nearest in ratio, and what a decoder refuses; top-k with a bitmap beside it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cograd.core.codecs import CodecError, Context, FixedLength
from cograd.machines import E3M0
from cograd.machines.baselines import BitmapTopK

CTX = Context()
NUMBERS = st.floats(width=32, min_value=-(2.0**100), max_value=2.0**100, allow_subnormal=False)


def there_and_back(x: Tensor, codec: E3M0 = E3M0(), layout: tuple[int, ...] | None = None) -> Tensor:  # noqa: B008
    layout = layout or (len(x),)
    coded = codec.encode(x, layout, CTX)
    decoded = codec.decode(coded.payload, layout, CTX).values
    assert len(coded.payload) == codec.nbytes(layout)
    assert torch.equal(decoded, coded.kept.dense())
    return decoded


@given(st.lists(NUMBERS, min_size=1, max_size=40), st.sampled_from([None, 1, 3, 8]))
def test_it_is_idempotent_odd_and_within_a_factor_sqrt_2(values: list[float], block: int | None) -> None:
    x, codec = torch.tensor(values), E3M0(block)
    y = there_and_back(x, codec)
    assert torch.equal(there_and_back(y, codec), y)
    assert torch.equal(there_and_back(-x, codec), -y)
    for part, out in zip(x.split(block or len(x)), y.split(block or len(x)), strict=True):
        largest = float(part.abs().max())
        assert len(out.unique()) <= 15
        if largest < 2.0**-119:
            continue
        scale = 2.0 ** round(math.log2(largest))
        ratio = (out / part)[part.abs() / scale >= 2**-6.5]
        assert bool(((ratio >= 0.5**0.5 - 1e-6) & (ratio <= 2**0.5 + 1e-6)).all())
        assert bool((out[part.abs() / scale < 2**-6.5] == 0).all())


@given(st.lists(st.floats(-1e5, 1e5, width=32), min_size=1, max_size=20), st.integers(-60, 60))
def test_powers_of_two_pass_through(values: list[float], power: int) -> None:
    x = torch.tensor(values).masked_fill_(torch.tensor(values).abs() < 1e-10, 0)
    assert torch.equal(there_and_back(x * 2.0**power), there_and_back(x) * 2.0**power)


def test_it_rounds_to_the_power_that_the_logarithm_rounds_to() -> None:
    x = torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    e = round(math.log2(float(x.abs().max())))
    k = torch.log2(x.abs().double() / 2.0**e).round().clamp(max=0)
    reference = torch.where(x.abs() / 2.0**e < 2**-6.5, 0.0, x.sign() * 2.0 ** (k + e))
    assert torch.equal(there_and_back(x), reference.float())


def test_each_tensor_and_each_block_has_a_scale_of_its_own() -> None:
    x = torch.tensor([1.0, 0.5, 1e-8, 1e3, 1e3])
    assert there_and_back(x, layout=(2, 1, 2))[2] != 0
    assert there_and_back(x, layout=(5,))[2] == 0
    assert there_and_back(x, E3M0(2), layout=(3, 2))[2] != 0
    assert E3M0().nbytes((2, 1, 2)) == 3 + 3
    assert E3M0(2).nbytes((3, 0, 2)) == 3 + 3
    assert E3M0(256).nbytes((1000,)) == 4 + 500


def test_zeros_stay_zeros_and_nothing_is_still_something() -> None:
    assert torch.equal(there_and_back(torch.zeros(7)), torch.zeros(7))
    assert torch.equal(there_and_back(torch.tensor([1e-38, -1e-38])), torch.zeros(2))
    assert there_and_back(torch.empty(0), layout=(0, 0)).shape == (0,)


def test_stochastic_rounding_is_unbiased_and_repeatable() -> None:
    x = torch.tensor([1.0, 0.7, -0.3, 0.011, 0.001, -0.0004]).repeat(40_000)
    codec = E3M0(stochastic=True)
    y = there_and_back(x, codec)
    assert len(y.unique()) <= 15
    mean = y.view(-1, 6).mean(0)
    spread = y.view(-1, 6).std(0) / 40_000**0.5
    assert bool(((mean - x[:6]).abs() <= 5 * spread + 1e-9).all())
    assert torch.equal(there_and_back(x, codec), y)
    other = codec.encode(x, (len(x),), Context(party=1))
    assert other.payload != codec.encode(x, (len(x),), CTX).payload


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 3e38])
@pytest.mark.parametrize("stochastic", [False, True])
def test_what_is_not_finite_or_too_large_is_refused(bad: float, stochastic: bool) -> None:
    with pytest.raises(ValueError, match=r"x must be finite and below 2\^127"):
        E3M0(stochastic=stochastic).encode(torch.tensor([1.0, bad, 0.0]), (3,), CTX)


@pytest.mark.parametrize("stochastic", [False, True])
def test_the_largest_scale_is_written(stochastic: bool) -> None:
    x = torch.tensor([2.0**127, 1.0])
    assert torch.equal(there_and_back(x, E3M0(stochastic=stochastic)), torch.tensor([2.0**127, 0.0]))


def test_a_foreign_payload_is_refused() -> None:
    codec = E3M0()
    payload = codec.encode(torch.tensor([1.0, -1.0, 0.5]), (3,), CTX).payload
    with pytest.raises(CodecError, match="expects 3 bytes; got 2"):
        codec.decode(payload[:2], (3,), CTX)
    for at, value in ((1, 0x08), (1, 0x80), (2, 0x11)):
        with pytest.raises(CodecError, match="not its own"):
            codec.decode(bytearray([*payload[:at], value, *payload[at + 1 :]]), (3,), CTX)
    with pytest.raises(CodecError, match=r"scales must be -128 or in -120 .. 127; got -121"):
        codec.decode(bytearray([135, *payload[1:]]), (3,), CTX)


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="block must be >= 1, or None for one scale a tensor; got 0"):
        E3M0(block=0)
    with pytest.raises(ValueError, match=r"x must have shape \(3,\) for this layout; got \(2,\)"):
        E3M0().encode(torch.zeros(2), (3,), CTX)


@settings(max_examples=30)
@given(st.integers(1, 200), st.integers(0, 2**31))
def test_bitmap_top_k_sends_the_largest_in_four_bits_an_entry(n: int, seed: int) -> None:
    x = torch.randn(n, generator=torch.Generator().manual_seed(seed)).half().float()
    codec, layout = BitmapTopK(3 / 16), (n,)
    assert isinstance(codec, FixedLength)
    coded = codec.encode(x, layout, CTX)
    decoded = codec.decode(coded.payload, layout, CTX).dense()
    assert len(coded.payload) == codec.nbytes(layout) <= n / 2 + 3
    k = math.ceil(n * 3 / 16)
    assert torch.equal(decoded.abs().sort().values[-k:], x.abs().sort().values[-k:])
    assert int((decoded != 0).sum()) <= k
    assert torch.equal(decoded, coded.kept.dense())


def test_bitmap_top_k_refuses_a_foreign_payload() -> None:
    codec = BitmapTopK(0.25)
    payload = codec.encode(torch.arange(8.0), (8,), CTX).payload
    with pytest.raises(CodecError, match="expects 5 bytes"):
        codec.decode(payload[:3], (8,), CTX)
    with pytest.raises(CodecError, match="must mark 2 of 8 entries; it marks 3"):
        codec.decode(bytearray([7, *payload[1:]]), (8,), CTX)
