"""The guidance matrix as a hook on any model: what it scales, what it leaves, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cograd.clients import FedLEx, guidance_matrix, scale_gradients, squared_travel
from cograd.clients.baselines import FedAvg
from cograd.core.streams import stream
from cograd.data.clients import ClientData
from cograd.engines.federated import LocalSGD, Simulation
from cograd.models.mlp import MLP

X, Y = stream(0, "x").normal(12, 5), torch.arange(12) % 2


def net() -> MLP:
    torch.manual_seed(1)
    return MLP(5, 8, 2)


def some(model: nn.Module) -> dict[str, Tensor]:
    return {name: stream(1, name).uniform(*p.shape) for name, p in model.named_parameters()}


def backward(model: nn.Module, rows: slice = slice(None)) -> None:
    nn.functional.cross_entropy(model(X[rows]), Y[rows]).backward()


def grads(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_gradients_are_scaled_until_it_is_removed() -> None:
    model = net()
    backward(model)
    plain, guidance = grads(model), some(model)
    for again in range(2):
        model.zero_grad()
        with scale_gradients(model, guidance):
            backward(model)
        assert all(torch.equal(g, guidance[n] * plain[n]) for n, g in grads(model).items()), again
        model.zero_grad()
        backward(model)
        assert all(torch.equal(g, plain[n]) for n, g in grads(model).items())


def test_accumulated_gradients_are_scaled_once() -> None:
    model = net()
    guidance = some(model)
    for rows in (slice(0, 6), slice(6, 12)):
        backward(model, rows)
    plain = grads(model)
    model.zero_grad()
    handle = scale_gradients(model, guidance)
    for rows in (slice(0, 6), slice(6, 12)):
        backward(model, rows)
    assert all(torch.allclose(g, guidance[n] * plain[n], atol=1e-7) for n, g in grads(model).items())
    handle.remove()


def test_a_parameter_used_twice_is_scaled_once() -> None:
    tied = nn.Linear(3, 3, bias=False)
    x = torch.eye(3)
    tied(tied(x)).sum().backward()
    plain = tied.weight.grad.clone()
    tied.zero_grad()
    guidance = {"weight": torch.full((3, 3), 0.5)}
    scale_gradients(tied, guidance)
    tied(tied(x)).sum().backward()
    assert torch.equal(tied.weight.grad, 0.5 * plain)


def test_a_refreshed_matrix_holds_from_the_next_pass_on() -> None:
    model = net()
    handle = scale_gradients(model, some(model))
    handle.update({name: torch.zeros_like(p) for name, p in model.named_parameters()})
    backward(model)
    assert not any(g.any() for g in grads(model).values())


def test_it_keeps_its_own_copy_and_leaves_frozen_parameters_alone() -> None:
    model = net()
    model[1].bias.requires_grad_(False)
    guidance = {name: g for name, g in some(model).items() if name != "1.bias"}
    scale_gradients(model, guidance)
    for g in guidance.values():
        g.zero_()
    backward(model)
    assert all(g.any() for g in grads(model).values())
    assert model[1].bias.grad is None


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_loop_of_ones_own_is_the_simulated_client(momentum: float) -> None:
    model = net()
    guidance = some(model)
    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=momentum)
    handle = scale_gradients(model, guidance, opt)
    for epoch in range(2):
        for rows in stream(0, "client", 0, 0, "batches", epoch).permutation(12).split(4):
            opt.zero_grad()
            nn.functional.cross_entropy(model(X[rows]), Y[rows]).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            opt.step()
    handle.remove()
    how = LocalSGD(0.1, epochs=2, batch_size=4, momentum=momentum, max_norm=0.05)
    data = [ClientData(X, Y, X[:0], Y[:0])]
    sim = Simulation(FedLEx(FedAvg(how), guidance=guidance), net(), nn.functional.cross_entropy, data)
    sim.run(1)
    mine = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    assert torch.allclose(sim.server["x"], mine, atol=1e-6)


def test_before_adam_it_does_nothing() -> None:
    """Why an adaptive optimizer is refused."""
    ends = []
    for guided in (False, True):
        model = net().double()
        opt = torch.optim.Adam(model.parameters(), lr=0.01, eps=1e-100)
        if guided:
            scale_gradients(model, {name: 0.01 + 0.99 * g for name, g in some(model).items()})
        for _ in range(10):
            opt.zero_grad()
            nn.functional.cross_entropy(model(X.double()), Y).backward()
            opt.step()
        ends.append(torch.cat([p.detach().reshape(-1) for p in model.parameters()]))
    assert float((ends[0] - ends[1]).abs().max()) < 1e-6


def test_exploring_by_hand() -> None:
    start, maps = net(), []
    for rows in (slice(0, 6), slice(6, 12)):
        model = net()
        opt = torch.optim.SGD(model.parameters(), lr=0.5)
        for _ in range(3):
            opt.zero_grad()
            backward(model, rows)
            opt.step()
        maps.append(squared_travel(dict(start.named_parameters()), dict(model.named_parameters())))
    guidance = guidance_matrix(maps)
    assert not any(g.requires_grad for g in guidance.values())
    with scale_gradients(start, guidance):
        backward(start)
    assert int((start[1].weight.grad == 0).sum()) < start[1].weight.numel()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"1.bias": None}, r"guidance must name the trainable parameters \['1.weight', .*\]; got"),
        ({"other": torch.zeros(1)}, "guidance must name the trainable parameters"),
        ({"1.bias": torch.zeros(3)}, r"guidance of '1.bias' must have shape \(8,\); got \(3,\)"),
        ({"1.bias": torch.full((8,), 1.5)}, r"guidance of '1.bias' must lie in \[0, 1\]; got values of 1.5"),
        ({"1.bias": torch.full((8,), -0.5)}, r"guidance of '1.bias' must lie in \[0, 1\]; got values of -0.5"),
        (
            {"1.bias": torch.full((8,), torch.nan)},
            r"guidance of '1.bias' must lie in \[0, 1\]; got values of nan",
        ),
    ],
)
def test_bad_guidance_is_named(change: dict[str, Any], message: str) -> None:
    model = net()
    guidance = {name: g for name, g in {**some(model), **change}.items() if g is not None}
    with pytest.raises(ValueError, match=message):
        scale_gradients(model, guidance)
    backward(model)
    before = grads(model)
    model.zero_grad()
    handle = scale_gradients(model, {name: torch.ones_like(p) for name, p in model.named_parameters()})
    with pytest.raises(ValueError, match=message):
        handle.update(guidance)
    backward(model)
    assert all(torch.equal(g, before[n]) for n, g in grads(model).items())


@pytest.mark.parametrize(
    "kind", [torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop, torch.optim.Adagrad]
)
def test_adaptive_optimizers_are_refused(kind: Any) -> None:
    model = net()
    with pytest.raises(ValueError, match=f"optimizer must not be adaptive: {kind.__name__} divides"):
        scale_gradients(model, some(model), kind(model.parameters(), lr=0.1))
