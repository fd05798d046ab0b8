"""Transforms: torch's own momentum bit for bit, and a chain that does not depend on how a vector is cut."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from cograd.core import transforms
from cograd.core.transforms import Accumulate, Momentum, init, run
from core.support import gaussian, same_bits

N = 500
CHAINS = {
    "momentum": (Momentum(0.9),),
    "nesterov": (Momentum(0.9, nesterov=True),),
    "dgc": (Momentum(0.9), Accumulate()),
    "nesterov dgc": (Momentum(0.7, nesterov=True), Accumulate()),
    "two": (Momentum(0.9), Momentum(0.5, slot="second"), Accumulate("sum")),
}
each_chain = pytest.mark.parametrize("chain", CHAINS.values(), ids=CHAINS)


def steps(chain, count=3, cuts=(0, N), dtype=torch.float32, **how):
    """The state, and what came out, after ``count`` vectors that were fed in the given slices."""
    state, out = init(chain, N, dtype=dtype), torch.zeros(N, dtype=dtype)
    for step in range(count):
        x = gaussian(N, "transforms", step, dtype=dtype)
        for start, end in pairwise(cuts):
            run(chain, x[start:end], state, at=start, out=out[start:end], **how)
    return state, out


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("m", [0.9, 0.5])
def test_momentum_is_torchs_sgd_bit_for_bit(nesterov, m):
    parameter = torch.nn.Parameter(torch.zeros(N, dtype=torch.float64))
    mine = torch.zeros(N, dtype=torch.float64)
    sgd = torch.optim.SGD([parameter], lr=0.1, momentum=m, nesterov=nesterov)
    chain = (Momentum(m, nesterov),)
    state, update = init(chain, N, dtype=torch.float64), torch.zeros(N, dtype=torch.float64)
    for step in range(50):
        gradient = gaussian(N, "sgd", step, dtype=torch.float64)
        parameter.grad = gradient.clone()
        sgd.step()
        run(chain, gradient, state, out=update)
        mine.add_(update, alpha=-0.1)
        assert same_bits(mine, parameter.detach())
    velocity = sgd.state[parameter]["momentum_buffer"]
    assert same_bits(state["momentum"], velocity * m if nesterov else velocity)


def test_momentum_zero_is_the_gradient_itself():
    _, out = steps((Momentum(0.0),), count=3)
    assert torch.equal(out, gaussian(N, "transforms", 2))


def test_accumulate_sums_what_came_in():
    state, out = steps((Accumulate(),), count=4)
    total = sum((gaussian(N, "transforms", s) for s in range(4)), torch.zeros(N))
    assert same_bits(out, total)
    assert same_bits(state["residual"], total)


def test_a_chain_feeds_each_stage_the_one_before():
    state, _ = steps((Momentum(0.5), Accumulate()), count=2)
    a, b = gaussian(N, "transforms", 0), gaussian(N, "transforms", 1)
    assert torch.equal(state["momentum"], 0.5 * a + b)
    assert torch.equal(state["residual"], a + (0.5 * a + b))


@each_chain
@pytest.mark.parametrize("tile", [1, 7, 64, N - 1, N])
def test_the_result_does_not_depend_on_the_tile(chain, tile, monkeypatch):
    expected_state, expected = steps(chain)
    monkeypatch.setattr(transforms, "TILE", tile)
    state, out = steps(chain)
    assert same_bits(out, expected)
    assert all(same_bits(state[slot], expected_state[slot]) for slot in expected_state)


@each_chain
@pytest.mark.parametrize("cuts", [(0, 1, N), (0, 100, 100, 333, N)])
def test_the_result_does_not_depend_on_slices(chain, cuts, monkeypatch):
    expected_state, expected = steps(chain)
    monkeypatch.setattr(transforms, "TILE", 64)
    state, out = steps(chain, cuts=cuts)
    assert same_bits(out, expected)
    assert all(same_bits(state[slot], expected_state[slot]) for slot in expected_state)


def test_a_slice_leaves_the_rest_of_the_state_alone():
    state = init((Accumulate(),), 10)
    run((Accumulate(),), torch.ones(3), state, at=4)
    assert state["residual"].tolist() == [0, 0, 0, 0, 1, 1, 1, 0, 0, 0]


def test_scale_multiplies_what_comes_in_and_leaves_it_as_it_was():
    x = gaussian(N, "scale")
    before, out, state = x.clone(), torch.empty(N), init((Accumulate(),), N)
    run((Accumulate(),), x, state, scale=0.25, out=out)
    assert same_bits(out, before * 0.25)
    assert same_bits(x, before)


def test_out_may_be_the_vector_itself():
    x = gaussian(N, "in place")
    state = init((Momentum(0.9, nesterov=True),), N)
    expected = x + 0.9 * x
    run((Momentum(0.9, nesterov=True),), x, state, out=x)
    assert torch.allclose(x, expected)


def test_a_gradient_of_any_shape_is_taken_and_given_back():
    x = gaussian(12, "shape").view(3, 4)
    state = init((Momentum(0.5),), 12)
    expected = x.clone()
    run((Momentum(0.5),), x, state, out=x)
    assert same_bits(x, expected)
    run((Momentum(0.5),), expected.t(), state)
    assert torch.equal(state["momentum"], expected.reshape(-1) * 0.5 + expected.t().reshape(-1))


def test_half_precision_input_is_summed_in_the_states_dtype():
    x = gaussian(N, "half", dtype=torch.bfloat16)
    state = init((Accumulate(),), N)
    out = torch.empty(N, dtype=torch.bfloat16)
    for _ in range(3):
        run((Accumulate(),), x, state, scale=1 / 3, out=out)
    exact = x.float() * (1 / 3)
    assert same_bits(state["residual"], exact + exact + exact)
    assert same_bits(out, state["residual"].to(torch.bfloat16))


def test_an_empty_chain_copies():
    x, out = gaussian(N, "copy"), torch.empty(N)
    run((), x, {}, scale=2.0, out=out)
    assert same_bits(out, 2 * x)


def test_init_names_every_slot_with_zeros_of_the_asked_kind():
    state = init(CHAINS["two"], 5, dtype=torch.float64)
    assert list(state) == ["momentum", "second", "sum"]
    assert all(v.dtype == torch.float64 and v.tolist() == [0] * 5 for v in state.values())


@pytest.mark.parametrize("m", [-0.1, 1.0, 1.5, float("nan")])
def test_momentum_outside_zero_one_is_refused(m):
    with pytest.raises(ValueError, match=rf"momentum must be in \[0, 1\); got {m}"):
        Momentum(m)
