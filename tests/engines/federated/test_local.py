"""A model as a function of a vector, and the local training on it: torch's own numbers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cograd.core.streams import stream
from cograd.data.clients import ClientData
from cograd.engines.federated import ClientContext, LocalModel, LocalSGD
from engines.federated.support import clients, net

CROSS = nn.functional.cross_entropy


def context(model: LocalModel, client: int = 0, round: int = 0, seed: int = 0) -> ClientContext:
    return ClientContext(client, round, seed, [1], model, model.theta.clone())


# The model.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_its_gradient_is_autograds_at_any_vector(dtype):
    model, data = LocalModel(net().to(dtype), CROSS), clients(1)[0]
    x, y = data.x.to(dtype), data.y
    vector = stream("v").normal(model.space.numel).to(dtype)
    found = model.gradient(vector, x, y).clone()
    reference = net().to(dtype)
    with torch.no_grad():
        for p, value in zip(reference.parameters(), model.space.views(vector).values(), strict=True):
            p.copy_(value)
    loss = CROSS(reference(x), y)
    expected = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(reference.parameters()))])
    assert torch.equal(found, expected)
    assert torch.equal(model.last_loss, loss.detach())
    assert torch.equal(model.theta, vector)
    assert model.gradient(vector, x, y).data_ptr() == model.gradient(vector, x, y).data_ptr()


def test_a_parameter_that_is_not_used_has_a_gradient_of_zero():
    model = LocalModel(nn.ModuleDict({"used": nn.Linear(5, 2), "other": nn.Linear(5, 2)}), CROSS)
    model.module.forward = model.module["used"].forward
    data = clients(1)[0]
    for _ in range(2):
        g = model.space.views(model.gradient(model.theta, data.x, data.y))
        assert not g["other.weight"].any()
        assert g["used.weight"].any()


def test_tied_parameters_are_one_and_frozen_ones_are_none():
    module = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 2))
    module[1].weight = module[0].weight
    module[2].bias.requires_grad_(False)
    frozen = module[2].bias.clone()
    model, data = LocalModel(module, CROSS), clients(1)[0]
    assert model.space.numel == 25 + 5 + 5 + 10
    model.at(torch.zeros(45)).add_(1)
    assert module[1].weight.tolist() == [[1.0] * 5] * 5
    model.gradient(model.theta, data.x, data.y)
    assert torch.equal(module[2].bias, frozen)


def test_parameters_of_several_dtypes_are_refused():
    module = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 2).double())
    message = "must be of one dtype, on one device; got torch.float32 on cpu, torch.float64 on cpu"
    with pytest.raises(ValueError, match=message):
        LocalModel(module, CROSS)


def test_a_loss_that_is_no_number_is_refused():
    model, data = LocalModel(net(), lambda outputs, targets: outputs[:, 0]), clients(1)[0]
    with pytest.raises(RuntimeError, match="scalar"):
        model.gradient(model.theta, data.x, data.y)


def test_a_loss_in_another_dtype_is_fine():
    model, data = LocalModel(net(), lambda outputs, targets: CROSS(outputs.double(), targets)), clients(1)[0]
    plain = LocalModel(net(), CROSS)
    g = model.gradient(model.theta, data.x, data.y)
    assert torch.allclose(g, plain.gradient(plain.theta, data.x, data.y), atol=1e-6)


def test_it_measures_in_evaluation_mode_and_trains_in_training_mode():
    model, data = LocalModel(net("dropout"), CROSS), clients(1)[0]
    measured = model.mean_loss(model.theta, data.x, data.y)
    assert measured == model.mean_loss(model.theta, data.x, data.y)
    torch.manual_seed(0)
    g = model.gradient(model.theta, data.x, data.y).clone()
    assert not torch.equal(g, model.gradient(model.theta, data.x, data.y))
    assert model.mean_loss(model.theta, data.x, data.y) == measured
    assert not model.module.training


def test_outputs_of_many_examples_are_those_of_one_pass():
    model = LocalModel(net(), CROSS)
    x = stream("x").normal(5000, 5)
    with torch.no_grad():
        assert torch.allclose(model.outputs(model.theta, x), model.module(x), atol=1e-6)


def test_a_second_look_leaves_floating_buffers_alone():
    model, data = LocalModel(net("norm"), CROSS), clients(1)[0]
    before = model.buffers
    model.gradient(model.theta, data.x, data.y, track=False)
    assert torch.equal(model.buffers, before)
    model.gradient(model.theta, data.x, data.y)
    assert not torch.equal(model.buffers, before)
    model.buffers = before
    assert torch.equal(model.buffers, before)


def test_counters_begin_anew():
    model, data = LocalModel(net("norm"), CROSS), clients(1)[0]
    model.gradient(model.theta, data.x, data.y)
    assert int(model.module[1].num_batches_tracked) == 1
    model.restart()
    assert int(model.module[1].num_batches_tracked) == 0


def test_a_bare_vector_has_a_space_and_no_loss():
    model = LocalModel.of(torch.arange(3.0), None)
    assert model.theta.tolist() == [0, 1, 2]
    assert model.buffers is None
    with pytest.raises(NotImplementedError):
        model.gradient(model.theta, torch.zeros(1), torch.zeros(1))


# Local training.


@pytest.mark.parametrize("max_norm", [None, 0.5])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_local_sgd_is_torchs_sgd(momentum, max_norm):
    data = clients(1, 11)[0]
    local = LocalSGD(lr=0.1, epochs=3, batch_size=4, momentum=momentum, weight_decay=0.01, max_norm=max_norm)
    model = LocalModel(net(), CROSS)
    ctx = context(model)
    found = local.run(ctx, data, model.theta.clone())
    reference = net()
    optimizer = torch.optim.SGD(reference.parameters(), 0.1, momentum=momentum, weight_decay=0.01)
    for epoch in range(3):
        for rows in stream(0, "client", 0, 0, "batches", epoch).permutation(11).split(4):
            optimizer.zero_grad()
            CROSS(reference(data.x[rows]), data.y[rows]).backward()
            if max_norm is not None:
                nn.utils.clip_grad_norm_(reference.parameters(), max_norm)
            optimizer.step()
    expected = torch.cat([p.detach().reshape(-1) for p in reference.parameters()])
    assert torch.allclose(found, expected, atol=1e-6)
    assert ctx.work == {"grad": 9}
    assert ctx.trained is found


def test_minibatches_are_passes_over_all_examples_and_the_same_for_every_method():
    data = ClientData(torch.arange(11.0)[:, None], torch.arange(11), torch.zeros(0), torch.zeros(0))
    model = LocalModel(net(), CROSS)
    local = LocalSGD(0.1, epochs=2, batch_size=4)
    drawn = [y.tolist() for _, y in local.batches(context(model), data)]
    assert [len(rows) for rows in drawn] == [4, 4, 3, 4, 4, 3]
    for half in (drawn[:3], drawn[3:]):
        assert sorted(row for rows in half for row in rows) == list(range(11))
    assert drawn[:3] != drawn[3:]
    again = LocalSGD(0.9, epochs=2, batch_size=4, momentum=0.5).batches(context(model), data)
    assert [y.tolist() for _, y in again] == drawn
    for other in (context(model, client=1), context(model, round=1), context(model, seed=1)):
        assert [y.tolist() for _, y in local.batches(other, data)] != drawn


@pytest.mark.parametrize(("steps", "sizes"), [(1, [4]), (4, [4, 4, 3, 4]), (6, [4, 4, 3, 4, 4, 3])])
def test_a_number_of_steps_begins_passes_as_needed(steps, sizes):
    data = clients(1, 11)[0]
    local = LocalSGD(0.1, batch_size=4, steps=steps)
    assert local.length(11) == steps
    found = [len(y) for _, y in local.batches(context(LocalModel(net(), CROSS)), data)]
    assert found == sizes


def test_the_rate_decays_by_rounds():
    assert LocalSGD(0.5, decay=0.9).rate(3) == pytest.approx(0.5 * 0.9**3)


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("lr", 0, "> 0 and finite"),
        ("lr", float("inf"), "> 0 and finite"),
        ("lr", float("nan"), "> 0 and finite"),
        ("epochs", 0, ">= 1"),
        ("batch_size", 0, ">= 1"),
        ("steps", 0, ">= 1 or None"),
        ("momentum", 1.0, r"in \[0, 1\)"),
        ("weight_decay", -1, ">= 0"),
        ("decay", 0, r"in \(0, 1\]"),
        ("max_norm", 0, "> 0 or None"),
    ],
)
def test_local_sgd_names_bad_arguments(name, value, allowed):
    with pytest.raises(ValueError, match=f"{name} must be {allowed}; got {value}"):
        LocalSGD(**{"lr": 0.1, name: value})
