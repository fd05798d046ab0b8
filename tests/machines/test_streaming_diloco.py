"""Streaming DiLoCo in one process: the card's exact properties, special cases, and bad input."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cograd.core.codecs import Float16, Float32, TopK
from cograd.core.ledger import Ledger
from cograd.engines.overlap import AsyncAlone, InProcess, overlapping
from cograd.engines.transport import Alone
from cograd.machines import E3M0, StreamingDiLoCo
from cograd.machines.baselines import BitmapTopK, DiLoCo, LocalAveraging
from cograd.machines.streaming_diloco import groups, nesterov, transformer, whole
from cograd.machines.streaming_diloco.fragments import partition
from cograd.machines.streaming_diloco.schedule import schedule
from cograd.machines.streaming_diloco.utilisation import Model, Traffic, bandwidth_for, utilisation
from cograd.models import GPT
from machines.streaming_diloco_jobs import (
    PARTS,
    SWAPPED,
    Together,
    batch,
    flat,
    inner_of,
    inner_step,
    make,
    narrow,
    small,
)

FP32: dict[str, Any] = {"codec": Float32()}


def local(rank: int, steps: int) -> Tensor:
    """A replica that nobody talks to."""
    model = small()
    inner = inner_of(model)
    for step in range(steps):
        inner_step(model, inner, step, rank)
    return flat(model)


# Special cases.


def diloco_by_hand(members: int, every: int, steps: int, lr: float, mu: float) -> tuple[Tensor, list[Tensor]]:
    """DiLoCo in twenty lines, nothing shared with the library: outer parameters and replicas."""
    models = [small() for _ in range(members)]
    inners = [inner_of(m) for m in models]
    g = [p.detach().clone() for p in models[0].parameters()]
    v = [torch.zeros_like(p) for p in g]
    for step in range(steps):
        for rank in range(members):
            inner_step(models[rank], inners[rank], step, rank)
        if (step + 1) % every:
            continue
        for i in range(len(g)):
            delta = torch.zeros_like(g[i])
            for model in models:
                delta += g[i] - list(model.parameters())[i].detach()
            delta /= members
            v[i] = mu * v[i] + delta
            g[i] = g[i].add(delta.add(v[i], alpha=mu), alpha=-lr)
            for model in models:
                list(model.parameters())[i].data.copy_(g[i])
    return torch.cat([p.reshape(-1) for p in g]), [flat(m) for m in models]


def replicas_of(kind: type[DiLoCo], members: int, every: int, steps: int, **options: Any) -> list[nn.Module]:
    models = [small() for _ in range(members)]
    inners = [inner_of(m) for m in models]
    links = InProcess.group(members)
    dilocos = [
        kind(m, o, sync_every=every, transport=link, **options)
        for m, o, link in zip(models, inners, links, strict=True)
    ]
    for diloco in dilocos:
        diloco.__enter__()
    for step in range(steps):
        for rank in range(members):
            inner_step(models[rank], inners[rank], step, rank)
    return models


@pytest.mark.parametrize("members", [1, 2, 3])
def test_one_fragment_without_overlap_mixing_and_quantising_is_diloco(members: int) -> None:
    g, replicas = diloco_by_hand(members, 7, 21, 0.4, 0.9)
    models = replicas_of(DiLoCo, members, 7, 21, outer=nesterov(0.4, 0.9))
    for rank, model in enumerate(models):
        assert torch.equal(flat(model), replicas[rank])
        assert torch.equal(flat(model), g)


def test_local_averaging_makes_every_replica_the_mean() -> None:
    models = replicas_of(LocalAveraging, 3, 8, 8)
    mean = sum(local(rank, 8) for rank in range(3)) / 3
    for model in models:
        torch.testing.assert_close(flat(model), mean, atol=1e-6, rtol=0)


def test_a_replica_alone_is_lookahead() -> None:
    model = small()
    inner = inner_of(model)
    reference, other = small(), small()
    fast = inner_of(reference)
    with make(
        model, inner, fragments=whole, sync_every=5, overlap=0, alpha=0.0, outer=nesterov(0.5, 0.0)
    ) as diloco:
        assert diloco.codec == Float32()
        for step in range(15):
            inner_step(model, inner, step, 0)
            inner_step(reference, fast, step, 0)
            if step % 5 == 4:
                with torch.no_grad():
                    for slow, p in zip(other.parameters(), reference.parameters(), strict=True):
                        slow.add_(p - slow, alpha=0.5)
                        p.copy_(slow)
    torch.testing.assert_close(flat(model), flat(reference), atol=1e-6, rtol=0)
    assert diloco.bits_per_parameter == 0


def test_with_alpha_1_theta_is_purely_local_and_g_still_moves() -> None:
    two = Together(alpha=1.0).train(range(25))
    for rank in range(2):
        assert torch.equal(two.theta(rank), local(rank, 25))
    assert two.replicas[0].fragments[0].received == 2
    assert not torch.equal(two.replicas[0].fragments[0].vector, flat(small())[: 8 * 16 + 16])


# What happens when.


def test_nothing_reaches_theta_until_the_receive_step() -> None:
    seen: dict[int, Tensor] = {}
    two = Together(overlap=3, alpha=0.5)
    two.train(range(14), lambda step: seen.update({step + 1: two.theta()}))
    for step in (10, 11, 12):  # sent after step 10, received after step 13
        assert torch.equal(seen[step], local(0, step))
    first = 8 * 16 + 16
    assert not torch.equal(seen[13][:first], local(0, 13)[:first])
    assert torch.equal(seen[13][first:], local(0, 13)[first:])


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5])
def test_the_mix_is_alpha_theta_plus_the_rest_of_g(alpha: float) -> None:
    seen: dict[int, Tensor] = {}
    two = Together(overlap=2, alpha=alpha, sync_every=10, fragments=whole)
    two.train(range(12), lambda step: seen.update({step + 1: two.theta()}))
    g = two.replicas[0].fragments[0].vector
    expected = alpha * local(0, 12) + (1 - alpha) * g
    torch.testing.assert_close(seen[12], expected, atol=1e-7, rtol=0)


def test_the_outer_gradient_is_measured_from_g_and_not_from_the_mixed_weights() -> None:
    """Two exchanges by hand: Delta of the second is g - theta, with g as the first left it."""
    lr, start = 0.5, flat(small())
    thetas: dict[int, list[Tensor]] = {}
    two = Together(overlap=0, alpha=0.5, fragments=whole, outer=nesterov(lr, 0.0), **FP32)
    sent: dict[int, list[Tensor]] = {}
    for replica in two.replicas:
        send = replica._send

        def spy(p: int, send: Callable[[int], None] = send, replica: StreamingDiLoCo = replica) -> None:
            sent.setdefault(replica.step, []).append(flat(replica.model))
            send(p)

        replica._send = spy  # type: ignore[method-assign]
    two.train(range(20), lambda step: thetas.update({step + 1: [two.theta(0), two.theta(1)]}))
    g = start
    for step in (10, 20):
        g = g - lr * (g - sum(sent[step]) / 2)
        torch.testing.assert_close(thetas[step][0], (sent[step][0] + g) / 2, atol=1e-6, rtol=0)
    torch.testing.assert_close(two.replicas[0].fragments[0].vector, g, atol=1e-6, rtol=0)


def test_each_fragments_momentum_moves_only_with_that_fragment() -> None:
    outers: dict[int, list[Tensor]] = {}
    two = Together(overlap=0)

    def watch(step: int) -> None:
        last = two.replicas[0].fragments[2]
        state = [s["momentum_buffer"].clone() for s in last.optimizer.state.values()]
        outers[step + 1] = [*state, last.vector.clone()]

    two.train(range(26), watch)
    # the last fragment is exchanged after steps 16 and 26, the others after 10, 13, 20, 23
    assert all(torch.equal(a, b) for a, b in zip(outers[16], outers[25], strict=True))
    assert not torch.equal(outers[25][-1], outers[26][-1])


def test_inner_state_stays_with_the_replica() -> None:
    two = Together(overlap=0, alpha=0.0, fragments=whole).train(range(10))
    alone = small()
    inner = inner_of(alone)
    for step in range(10):
        inner_step(alone, inner, step, 0)
    for mine, other in zip(two.inners[0].state.values(), inner.state.values(), strict=True):
        assert torch.equal(mine["exp_avg"], other["exp_avg"])


@pytest.mark.parametrize(
    ("every", "count", "name", "first", "period"),
    [
        (100, 2, "paper", (100, 150), 100),
        (100, 9, "paper", (100, 111, 122, 133, 144, 155, 166, 177, 188), 100),
        (100, 9, "round_robin", (11, 22, 33, 44, 55, 66, 77, 88, 99), 99),
        (12, 3, "torchft", (3, 7, 11), 12),
    ],
)
def test_schedule(every: int, count: int, name: Any, first: tuple[int, ...], period: int) -> None:
    plan = schedule(name, every, count, 1)
    assert (plan.first, plan.period) == (first, period)
    sent = {p: [t for t in range(1, 5 * every) if plan.due(t) == p] for p in range(count)}
    for p, steps in sent.items():
        assert steps == list(range(first[p], 5 * every, period))
    assert sum(map(len, sent.values())) == len({t for steps in sent.values() for t in steps})


def test_the_papers_example_of_two_fragments() -> None:
    plan = schedule("paper", 100, 2, 1)
    assert [t for t in range(1, 400) if plan.due(t) == 0] == [100, 200, 300]
    assert [t for t in range(1, 400) if plan.due(t) == 1] == [150, 250, 350]


def test_freezing_the_others_moves_one_fragment_at_a_time() -> None:
    seen = {0: flat(small())}
    two = Together(freeze_others=True, fragments=groups({"a": "0.*", "b": ["2.*", "4.*"]}), overlap=0)
    two.train(range(20), lambda step: seen.update({step + 1: two.theta()}))
    size = 8 * 16 + 16
    for step in range(1, 10):  # before anything is exchanged
        moved = seen[step] != seen[step - 1]
        first = step >= 6  # steps 1 to 5 are the other fragment's
        assert bool(moved[:size].any()) == first
        assert bool(moved[size:].any()) != first


# Bytes.


def test_bits_are_four_for_each_completed_exchange_and_the_peak_is_the_largest_fragment() -> None:
    ledger = Ledger()
    two = Together(fragments=PARTS, ledger=ledger).train(range(60))
    replica = two.replicas[0]
    sizes = [f.space.numel for f in replica.fragments]
    sends = [sum(replica.schedule.due(t) == p for t in range(1, 61)) for p in range(3)]
    assert sends == [6, 5, 5]
    scales = 2  # each fragment is a weight and a bias
    payload = sum(k * (-(-n // 2) + scales) for k, n in zip(sends, sizes, strict=True))
    assert ledger.sent(0) == ledger.sent(1) == payload
    assert replica.bits_per_parameter == pytest.approx(8 * payload / sum(sizes))
    assert replica.peak_bytes == max(-(-n // 2) + scales for n in sizes)
    assert {e.copies for e in ledger} == {1}
    assert ledger.sent(0, "schema") > 0


def test_equal_bits_for_top_k_and_e3m0() -> None:
    sizes = [f.space.layout for f in Together().replicas[0].fragments]
    for layout in sizes:
        assert abs(BitmapTopK(3 / 16).nbytes(layout) - E3M0().nbytes(layout)) <= 4


# Fragments.


def test_a_transformers_fragments_hold_every_parameter_once() -> None:
    model = GPT(11, width=8, blocks=6, heads=2, context=4)
    parts = partition(model, transformer(model.blocks, size=3))
    assert list(parts) == ["blocks 0", "blocks 1", "rest"]
    assert sorted(n for names in parts.values() for n in names) == sorted(
        n for n, _ in model.named_parameters()
    )
    assert {n.split(".")[1] for n in parts["blocks 1"]} == {"1", "3", "5"}
    assert set(parts["rest"]) == {"tokens.weight", "positions.weight", "norm.weight", "head.weight"}


@pytest.mark.parametrize(("pattern", "second"), [("strided", {1, 9, 17}), ("sequential", {3, 4, 5})])
def test_24_layers_make_8_groups(pattern: Any, second: set[int]) -> None:
    model = nn.ModuleList(nn.Linear(1, 1) for _ in range(24))
    parts = partition(model, transformer(model, pattern=pattern))
    assert len(parts) == 8
    assert {int(n.split(".")[0]) for n in parts["blocks 1"]} == second


def test_tied_weights_are_in_one_fragment() -> None:
    model = GPT(11, width=8, blocks=3, heads=2, context=4, tied=True)
    parts = partition(model, transformer(model.blocks))
    assert parts["rest"] == ("tokens.weight", "positions.weight", "norm.weight")
    model.blocks[2].mlp_in = model.blocks[0].mlp_in
    parts = partition(model, transformer(model.blocks, size=1))
    assert "blocks.0.mlp_in.weight" in parts["blocks 0"]
    assert not any("mlp_in" in n for n in parts["blocks 2"])


def test_frozen_parameters_are_in_no_fragment() -> None:
    model = small()
    model[2].weight.requires_grad_(False)
    assert partition(model, PARTS)["middle"] == ("2.bias",)


def test_groups_put_what_is_left_into_the_rest() -> None:
    parts = partition(small(), groups({"ends": ["0.*", "4.*"]}))
    assert parts == {"ends": ("0.weight", "0.bias", "4.weight", "4.bias"), "rest": ("2.weight", "2.bias")}


# Evaluating, ending, keeping.


def test_outer_weights_are_in_the_model_only_inside_the_block() -> None:
    two = Together().train(range(15))
    replica, theta = two.replicas[0], two.theta()
    with replica.outer_weights() as model:
        assert model is two.models[0]
        g = flat(model)
        with pytest.raises(RuntimeError, match="holds its outer weights already"), replica.outer_weights():
            pass
    assert torch.equal(two.theta(), theta)
    assert not torch.equal(g, theta)
    assert torch.equal(flat(replica.outer_model()), g)
    assert torch.equal(torch.cat([f.vector for f in replica.fragments]), g)
    with replica, replica.outer_weights(), pytest.raises(RuntimeError, match=r"leave outer_weights\(\) before"):
        two.inners[0].step()


def test_flush_exchanges_everything_once_more() -> None:
    late = Together(overlap=5).train(range(13))
    assert [f.received for f in late.replicas[0].fragments] == [0, 0, 0]
    flushed = Together(overlap=5, flush=True).train(range(13))
    assert [f.received for f in flushed.replicas[0].fragments] == [2, 2, 1]
    assert flushed.replicas[0].fingerprint() == flushed.replicas[1].fingerprint()


@pytest.mark.parametrize("overlap", [0, 4, (1, 9)])
def test_a_checkpoint_continues_bit_for_bit(overlap: Any) -> None:
    options: dict[str, Any] = {"overlap": overlap, "codec": E3M0(stochastic=True)}
    at_once = Together(**options).train(range(45))
    before = Together(**options).train(range(24))
    state = copy.deepcopy([r.state_dict() for r in before.replicas])
    after = Together(**options)
    for rank in range(2):
        after.models[rank].load_state_dict(before.models[rank].state_dict())
        after.inners[rank].load_state_dict(before.inners[rank].state_dict())
        after.replicas[rank].load_state_dict(state[rank])
    after.train(range(24, 45))
    for rank in range(2):
        assert torch.equal(after.theta(rank), at_once.theta(rank))
        assert after.replicas[rank].fingerprint() == at_once.replicas[rank].fingerprint()


def test_another_number_of_replicas_goes_on_from_any_replicas_state() -> None:
    two = Together(overlap=4).train(range(21))
    assert len(two.replicas[0].state_dict()["in_flight"]) == 1
    four = Together(4, overlap=4)
    for rank in range(4):
        four.models[rank].load_state_dict(two.models[rank % 2].state_dict())
        four.inners[rank].load_state_dict(copy.deepcopy(two.inners[rank % 2].state_dict()))
        four.replicas[rank].load_state_dict(two.replicas[rank % 2].state_dict())
    steps_of_two = two.train(range(21, 24)).replicas[0].fingerprint()
    four.train(range(21, 24))
    assert {r.fingerprint() for r in four.replicas} == {steps_of_two}
    four.train(range(24, 40))
    assert len({r.fingerprint() for r in four.replicas}) == 1


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_a_replica_alone_and_several_go_on_from_each_other_with_one_exact_codec(
    before: int, after: int
) -> None:
    old = Together(before, overlap=4, **FP32).train(range(21))
    state = old.replicas[0].state_dict()
    assert len(state["in_flight"][0]["payloads"]) == before
    new = Together(after, overlap=4, **FP32)
    for rank in range(after):
        new.models[rank].load_state_dict(old.models[0].state_dict())
        new.inners[rank].load_state_dict(copy.deepcopy(old.inners[0].state_dict()))
        new.replicas[rank].load_state_dict(state)
    arrived = old.train(range(21, 24)).replicas[0].fingerprint()
    new.train(range(21, 24))
    assert {r.fingerprint() for r in new.replicas} == {arrived}
    new.train(range(24, 40))
    assert len({r.fingerprint() for r in new.replicas}) == 1


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_the_default_codecs_of_one_replica_and_of_several_are_told_apart_by_name(
    before: int, after: int
) -> None:
    state, new = Together(before).replicas[0].state_dict(), Together(after).replicas[0]
    codecs = {1: "Float32()", 2: "E3M0(block=None, stochastic=False)"}
    with pytest.raises(ValueError) as refused:
        new.load_state_dict(state)
    assert str(refused.value) == (
        f'the state must be of this run\'s codec, "{codecs[after]}"; it is of "{codecs[before]}" (the '
        "default is exact for a replica alone and E3M0() for several: to go on from one to several, or the "
        "reverse, give codec=Float32() throughout)"
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"alpha": 0.25}, "the state must be of this run's alpha, 0.5; it is of 0.25"),
        ({"model": narrow}, r'of this run\'s parameters, \["0.weight", \[16, 8\]\]; it is of .*\[12, 8\]'),
        ({"fragments": SWAPPED}, r'of this run\'s parameters, \["0.bias", \[16\]\]; it is of \["2.bias", \[16'),
        ({"fragments": whole}, r'of this run\'s fragments, \["first", 2\]; it is of \["all", 6\]'),
        ({"outer": nesterov(0.3)}, r"of this run's outer, \[.*'lr': 0.4.*\]; it is of \[.*'lr': 0.3"),
    ],
)
def test_a_state_of_other_settings_is_refused_by_name_and_changes_nothing(
    options: dict[str, Any], said: str
) -> None:
    one, other = Together(), Together(**options).train(range(12))
    before = one.replicas[0].fingerprint()
    with pytest.raises(ValueError, match=said) as refused:
        one.replicas[0].load_state_dict(other.replicas[0].state_dict())
    assert "codec" not in str(refused.value)
    assert one.replicas[0].fingerprint() == before
    assert one.replicas[0].step == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_state_that_was_loaded_onto_the_gpu_goes_on() -> None:
    two = Together(overlap=4).train(range(21))
    file = io.BytesIO()
    torch.save(two.replicas[0].state_dict(), file)
    file.seek(0)
    state = torch.load(file, map_location="cuda", weights_only=True)
    for replica in two.replicas:
        replica.load_state_dict(state)
    two.train(range(21, 24))
    assert [r.fragments[0].received for r in two.replicas] == [2, 2]


def test_bfloat16_weights_have_outer_parameters_in_float32() -> None:
    def half() -> nn.Module:
        return small().bfloat16()

    two = Together(model=half)
    for replica in two.replicas:
        assert {f.vector.dtype for f in replica.fragments} == {torch.float32}
    with two.replicas[0], two.replicas[1]:
        for step in range(15):
            for rank in range(2):
                x, y = batch(step, rank)
                two.inners[rank].zero_grad()
                nn.functional.cross_entropy(two.models[rank](x.bfloat16()).float(), y).backward()
                two.inners[rank].step()
    assert two.replicas[0].fingerprint() == two.replicas[1].fingerprint()
    assert two.replicas[0].fragments[0].received == 1


# Bad input.


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"sync_every": 2}, "sync_every must be >= the number of fragments, 3; got 2"),
        ({"overlap": 10}, "overlap must be in 0 .. 9 for schedule 'paper'; got 10"),
        ({"overlap": -1}, "overlap must be in 0 .. 9"),
        ({"alpha": 1.5}, r"alpha must be in \[0, 1\]; got 1.5"),
        ({"alpha": float("nan")}, "alpha must be in"),
        ({"schedule": "random"}, "schedule must be one of paper, round_robin, torchft; got 'random'"),
        ({"schedule": "torchft", "overlap": 3}, "overlap must be in 0 .. 2 for schedule 'torchft'; got 3"),
        ({"schedule": "torchft"}, "sync_every must be a multiple of 3 fragments for torchft; got 10"),
        ({"schedule": "round_robin", "overlap": 9}, "overlap must be in 0 .. 8"),
        ({"codec": TopK(0.1)}, "codec must be one of fixed length"),
        ({"codec": E3M0()}, r"codec must be Float32\(\) for a replica alone, .* got E3M0"),
        ({"codec": Float16()}, "for a replica alone"),
        (
            {"fragments": {"a": ["0.weight"]}},
            "every trainable parameter must be in a fragment; '0.bias' is in none",
        ),
        (
            {"fragments": {"a": ["0.weight"], "b": ["0.weight"]}},
            "'0.weight' must be in one fragment; it is in 'a' and",
        ),
        ({"fragments": {"a": ["nowhere"]}}, "fragment 'a' holds 'nowhere', which is no trainable parameter"),
        ({"fragments": {"a": []}}, "fragment 'a' must hold at least one parameter"),
        (
            {"fragments": groups({"a": "7.*"})},
            r"patterns of fragment 'a' must match a parameter; '7\.\*' does not",
        ),
    ],
)
def test_what_cannot_be_is_refused_with_the_value_and_what_is_allowed(
    options: dict[str, Any], said: str
) -> None:
    model = small()
    before = flat(model)
    with pytest.raises(ValueError, match=said):
        make(model, inner_of(model), **options)
    assert torch.equal(flat(model), before)


def test_running_statistics_are_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4))
    with pytest.raises(ValueError, match="'1' is a BatchNorm1d that has"):
        make(model, inner_of(model), fragments=whole)
    make(nn.Sequential(nn.Linear(8, 4), nn.LayerNorm(4)), inner_of(model), fragments=whole)


@pytest.mark.parametrize("bad", [{"size": 0}, {"pattern": "random"}])
def test_a_transformer_rule_refuses(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="transformer needs at least one block, size >= 1 and pattern"):
        transformer([nn.Linear(1, 1)], **bad)
    with pytest.raises(ValueError, match="got 0 blocks"):
        transformer([])


def test_replicas_in_one_process_that_differ_are_refused() -> None:
    links = InProcess.group(2)
    models = [small(), small()]
    first, second = (
        make(m, inner_of(m), transport=link, alpha=alpha)
        for m, link, alpha in zip(models, links, (0.5, 0.25), strict=True)
    )
    first.__enter__()
    with pytest.raises(ValueError, match=r"replica 0 has other alpha than replica 1: 0.5 there, 0.25 here"):
        second.__enter__()
    with pytest.raises(RuntimeError, match="at work already"):
        first.__enter__()


def test_replicas_in_one_process_take_turns() -> None:
    two = Together()
    with two.replicas[0], two.replicas[1]:
        inner_step(two.models[0], two.inners[0], 0, 0)
        with pytest.raises(RuntimeError, match=r"replica 0 is a step ahead of \[1\]"):
            inner_step(two.models[0], two.inners[0], 1, 0)
    with pytest.raises(ValueError, match="members must be >= 1; got 0"):
        InProcess.group(0)


def test_a_transport_may_be_left_out_or_be_one_of_turns() -> None:
    assert isinstance(overlapping(None), AsyncAlone)
    assert isinstance(AsyncAlone(), Alone)
    link = InProcess.group(1)[0]
    assert overlapping(link) is link


def test_an_error_in_the_block_removes_the_hooks() -> None:
    model = small()
    inner = inner_of(model)
    diloco = make(model, inner)
    with pytest.raises(KeyError), diloco:
        raise KeyError
    inner_step(model, inner, 0, 0)
    assert diloco.step == 0


# The simulator.


def test_the_simulator_agrees_with_the_closed_form_and_with_table_4() -> None:
    model = Model(1e9, 24, 0.1)
    compute, exposed = 100 * 0.1, 16 / 1.4
    assert utilisation(model, Traffic(16, 100), 1.4) == pytest.approx(compute / (compute + exposed), abs=0.01)
    for traffic, paper in ((Traffic(), 222), (Traffic(16, 100), 23), (Traffic(4, 100, 8, 1), 2.0)):
        assert 0.5 <= bandwidth_for(0.95, model, traffic) / paper <= 2
    assert utilisation(model, Traffic(4, 100, 8, 1), 1e4) == pytest.approx(1)


def test_the_simulator_refuses() -> None:
    model = Model(1e9, 24, 0.1)
    for wrong in (lambda: Model(1e9, 0, 0.1), lambda: Model(0, 1, 0.1), lambda: Model(1e9, 1, 0)):
        with pytest.raises(ValueError, match="parameters, layers and step_time must be positive"):
            wrong()
    for bad in ({"fragments": 2}, {"bits": 0}, {"overlap": -1}):
        with pytest.raises(ValueError, match="1 <= fragments <= sync_every"):
            Traffic(**bad)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="gbit_per_second must be > 0; got 0"):
        utilisation(model, Traffic(), 0)
    with pytest.raises(ValueError, match=r"target must be in \(0, 1\); got 1"):
        bandwidth_for(1, model, Traffic())
