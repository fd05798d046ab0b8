"""AGLFOP: the decomposition against closed forms, brute force and its own certificate; what counts say."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cograd.clients.aglfop import (
    ClientJoint,
    client_counts,
    disparities,
    permutation_baseline,
    pinsker,
    split,
)
from cograd.clients.aglfop.information import TOLERANCE, conditional, mutual, unique


def draws(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def joints(shape: tuple[int, ...], count: int, seed: int = 0, alpha: float = 1.0) -> np.ndarray:
    """Random joints (count, S, Z, H); a small alpha makes nearly deterministic ones."""
    return draws(seed).dirichlet(np.full(math.prod(shape), alpha), count).reshape(count, *shape)


def of(p: np.ndarray) -> tuple[float, float, float]:
    d = disparities(ClientJoint(p))
    return d.unique, d.redundant, d.masked


def deterministic(rule, s_given_z=None) -> np.ndarray:
    """P(s,z,h) of fair coins S and Z and h = rule(s, z); or S by P(s|z)."""
    p = np.zeros((2, 2, 2))
    for s in (0, 1):
        for z in (0, 1):
            p[s, z, rule(s, z)] += 0.25 if s_given_z is None else 0.5 * s_given_z[z][s]
    return p


# The decomposition.


@pytest.mark.parametrize(
    ("p", "expected"),
    [
        (deterministic(lambda s, z: z), (1, 0, 0)),
        (deterministic(lambda s, z: z, [[1, 0], [0, 1]]), (0, 1, 0)),
        (deterministic(lambda s, z: z ^ s), (0, 0, 1)),
    ],
    ids=["unique", "redundant", "masked"],
)
def test_the_three_canonical_examples(p, expected):
    assert of(p) == pytest.approx(expected, abs=1e-8)


def test_a_group_that_is_the_and_of_client_and_prediction():
    p = np.zeros((2, 2, 2))
    for s in (0, 1):
        for h in (0, 1):
            p[s, s & h, h] = 0.25
    information = 0.25 * math.log2(4 / 2) + 0.5 * math.log2(4 / 3) + 0.25 * math.log2(2 / 3)
    assert of(p) == pytest.approx((0, information, 0.5), abs=1e-8)
    assert information == pytest.approx(0.3113, abs=1e-4)


@pytest.mark.parametrize(
    ("shape", "alpha"), [((2, 2, 2), 1), ((2, 2, 2), 0.1), ((5, 2, 2), 1), ((3, 3, 4), 1), ((2, 4, 3), 0.3)]
)
def test_identities_and_the_certificate_of_many_joints(shape, alpha):
    p = joints(shape, 300, alpha=alpha)
    g, local, group_client = mutual(p.sum(1)), conditional(p), mutual(p.sum(3))
    found = unique(p)
    assert (found.gap <= TOLERANCE).all()
    redundant, masked = g - found.value, local - found.value
    assert redundant.min() >= -1e-9
    assert masked.min() >= -1e-9
    assert (redundant <= group_client + 1e-9).all()
    assert found.joint.min() >= 0
    assert np.abs(found.joint.sum(1) - p.sum(1)).max() < 1e-11
    assert np.abs(found.joint.sum(3) - p.sum(3)).max() < 1e-11
    assert np.abs(conditional(found.joint) - found.value).max() < 1e-15


def test_zeros_anywhere_are_left_out():
    source = draws(3)
    p = joints((3, 3, 3), 300, seed=1) * (source.random((300, 3, 3, 3)) < 0.4)
    p = p[p.sum((1, 2, 3)) > 0]
    p /= p.sum((1, 2, 3), keepdims=True)
    found = unique(p)
    assert (found.gap <= TOLERANCE).all()
    assert (np.minimum(mutual(p.sum(1)), conditional(p)) - found.value).min() >= -1e-9


def brute_force(p: np.ndarray, n: int = 400) -> float:
    """The least I_Q(Z;H|S) on a grid over the two free parameters of two clients, in nats."""
    sz, zh = p.sum(2), p.sum(0)
    axes = [np.linspace(max(0, sz[0, z] - zh[z, 0]), min(sz[0, z], zh[z, 1]), n) for z in (0, 1)]
    q = np.zeros((n, n, 2, 2, 2))
    q[..., 0, :, 1] = np.stack(np.meshgrid(*axes, indexing="ij"), -1)
    q[..., 0, :, 0] = sz[0] - q[..., 0, :, 1]
    q[..., 1, :, 1] = zh[:, 1] - q[..., 0, :, 1]
    q[..., 1, :, 0] = sz[1] - q[..., 1, :, 1]
    return float(conditional(q.clip(0)).min())


@pytest.mark.parametrize("alpha", [1.0, 0.3])
def test_against_brute_force(alpha):
    for p in joints((2, 2, 2), 6, seed=2, alpha=alpha):
        value, best = float(unique(p).value), brute_force(p)
        assert value <= best + 1e-9
        assert value == pytest.approx(best, abs=1e-4)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.tuples(st.integers(2, 4), st.integers(2, 3), st.integers(2, 3)))
def test_names_do_not_matter_and_neither_does_a_client_in_two(seed, shape):
    (p,) = joints(shape, 1, seed=seed)
    expected = of(p)
    source = draws(seed)
    renamed = p[np.ix_(*(source.permutation(n) for n in shape))]
    assert of(renamed) == pytest.approx(expected, abs=1e-8)
    share = source.random()
    halves = np.concatenate([p[:1] * share, p[:1] * (1 - share), p[1:]])
    assert of(halves) == pytest.approx(expected, abs=1e-8)


def test_a_joint_does_not_depend_on_its_batch():
    p = joints((2, 2, 2), 50)
    together, alone = unique(p).value, [float(unique(one).value) for one in p]
    assert together == pytest.approx(alone, abs=1e-12)


def test_a_hundred_clients():
    (p,) = joints((100, 2, 2), 1)
    d = disparities(ClientJoint(p))
    assert d.gap < 2 * TOLERANCE
    assert d.unique <= min(d.global_, d.local)


def test_what_is_not_solved_is_refused(monkeypatch):
    monkeypatch.setattr("cograd.clients.aglfop.information._ITERATIONS", 5)
    with pytest.raises(RuntimeError, match=r"unique information is known to .* nats only after 5 iterations"):
        unique(joints((2, 2, 2), 1)[0])


# What the measures imply.


def test_a_group_that_is_independent_of_the_client_has_nothing_redundant():
    for p in joints((3, 2, 2), 20):
        s, z = p.sum((1, 2)), p.sum((0, 2))
        q = p / p.sum(2, keepdims=True) * (s[:, None] * z)[..., None]
        d = disparities(ClientJoint(q))
        assert d.redundant == pytest.approx(0, abs=1e-9)
        assert d.global_ <= d.local + 1e-9


def test_a_group_that_the_client_tells_nothing_of_beyond_the_prediction_has_nothing_masked():
    for p in joints((3, 2, 2), 20):
        zh, sh = p.sum(0), p.sum(1)
        q = np.einsum("zh,sh->szh", zh, sh / sh.sum(0))
        d = disparities(ClientJoint(q))
        assert d.masked == pytest.approx(0, abs=1e-9)
        assert d.global_ >= d.local - 1e-9


def test_neither_fairness_implies_the_other():
    locally = disparities(ClientJoint(deterministic(lambda s, z: s, [[0.9, 0.1], [0.2, 0.8]])))
    assert locally.local == pytest.approx(0, abs=1e-12)
    assert locally.global_ == pytest.approx(locally.redundant) != pytest.approx(0, abs=0.1)
    globally = disparities(ClientJoint(deterministic(lambda s, z: z ^ s)))
    assert globally.global_ == pytest.approx(0, abs=1e-12)
    assert globally.local == pytest.approx(globally.masked) == pytest.approx(1)


def test_figures_of_a_joint_by_hand():
    p = np.array([[[0.1, 0.2], [0.15, 0.05]], [[0.3, 0.05], [0.05, 0.1]]])
    d = disparities(ClientJoint(p))
    rates = p.sum(0)[:, 1] / p.sum((0, 2))
    assert d.parity_global == pytest.approx(abs(rates[1] - rates[0]))
    assert d.parity_local == pytest.approx([abs(0.05 / 0.2 - 0.2 / 0.3), abs(0.1 / 0.15 - 0.05 / 0.35)])
    zh = p.sum(0)
    expected = sum(
        zh[z, h] * math.log2(zh[z, h] / (zh[z].sum() * zh[:, h].sum())) for z in (0, 1) for h in (0, 1)
    )
    assert d.global_ == pytest.approx(expected)
    assert d.co == pytest.approx(d.redundant - d.masked)
    assert d.unique_client == pytest.approx(d.group_client - d.redundant)
    nats = disparities(ClientJoint(p), bits=False)
    for name, value in d.to_dict().items():
        factor = 1 if name in ("parity_global", "pinsker") else math.log(2)
        assert getattr(nats, name) == pytest.approx(value * factor)


@pytest.mark.parametrize("shape", [(2, 2, 2), (2, 2, 3), (3, 4, 3)])
def test_the_parity_gap_stays_below_pinskers_bound(shape):
    for p in joints(shape, 100, alpha=0.5):
        d = disparities(ClientJoint(p))
        assert 0 < d.parity_global < d.pinsker
    shares = np.array([0.3, 0.7])
    assert pinsker(0.02, shares) == pytest.approx(math.sqrt(0.01) / (2 * 0.3 * 0.7))


def test_a_client_without_one_of_the_groups_has_no_parity_gap():
    p = np.array([[[0.2, 0.3], [0.0, 0.0]], [[0.1, 0.1], [0.2, 0.1]]])
    d = disparities(ClientJoint(p))
    assert math.isnan(d.parity_local[0])
    assert math.isfinite(d.parity_local[1])
    alone = p.sum((0, 1)) * np.ones((1, 1, 1))
    assert math.isnan(disparities(ClientJoint(alone)).pinsker)
    assert disparities(ClientJoint(alone)).global_ == 0


# Counts.


def table(n: int = 200, seed: int = 0, sizes: tuple[int, int, int] = (3, 2, 2)) -> dict[str, np.ndarray]:
    source = draws(seed)
    names = ("clients", "groups", "predictions", "labels")
    return {name: source.integers(size, size=n) for name, size in zip(names, (*sizes, sizes[-1]), strict=True)}


def test_what_clients_send_is_the_joint_of_all_predictions():
    data = table()
    whole = ClientJoint.from_predictions(**data)
    sent = []
    for client in range(3):
        mine = {k: torch.from_numpy(v[data["clients"] == client]) for k, v in data.items() if k != "clients"}
        sent.append(client_counts(**mine, sizes=(2, 2)))
        assert sent[-1].dtype == torch.int64
        assert sent[-1].numel() * sent[-1].element_size() == 64
    merged = ClientJoint.merge(sent)
    assert np.array_equal(merged.table, whole.table)
    assert merged.count == whole.count == 200
    assert merged.accuracy == pytest.approx((data["labels"] == data["predictions"]).mean())
    without = client_counts(mine["groups"], mine["predictions"], sizes=(2, 2))
    assert without.numel() * without.element_size() == 32
    assert torch.equal(without, sent[-1].sum(1))
    assert np.array_equal(ClientJoint.merge(dict(enumerate(sent))).counts, torch.stack(sent).numpy())


def test_tensors_arrays_and_lists_are_one():
    data = table()
    expected = ClientJoint.from_predictions(**data)
    for make in (
        torch.from_numpy,
        lambda a: a.tolist(),
        lambda a: a.astype(np.float32),
        lambda a: a.astype(np.uint8),
    ):
        found = ClientJoint.from_predictions(**{name: make(values) for name, values in data.items()})
        assert np.array_equal(found.table, expected.table)


def test_sizes_make_room_for_what_did_not_occur():
    joint = ClientJoint.from_predictions([0, 0], [0, 1], [0, 1], sizes=(4, 2, 3))
    assert joint.over("szh").shape == (4, 2, 3)
    assert repr(joint) == "ClientJoint(4 clients x 2 groups x 3 predictions, 2 examples)"
    assert disparities(joint).global_ == pytest.approx(1)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"groups": [0, 1]}, ValueError, "of one length >= 1; got {'clients': 200, 'groups': 2"),
        ({"groups": np.full(200, 0.5)}, ValueError, r"groups must hold whole numbers; got \[0.5"),
        ({"predictions": np.full(200, math.nan)}, ValueError, "predictions must hold whole numbers; got"),
        ({"labels": np.array(["a"] * 200)}, TypeError, "labels must hold whole numbers; got <U1"),
        ({"clients": np.zeros((200, 1))}, ValueError, r"clients must be 1-D.*\(200, 1\)"),
        ({"sizes": (3, 1, 2)}, ValueError, "groups must be codes of 0 .. 0; got 0 .. 1"),
        ({"clients": np.full(200, -1)}, ValueError, r"clients must be codes of 0 .. -1|got -1 .. -1"),
        ({"predictions": None, "labels": None}, ValueError, "predictions or labels must be given"),
    ],
)
def test_predictions_that_cannot_be_counted_are_refused(change, error, text):
    with pytest.raises(error, match=text):
        ClientJoint.from_predictions(**{**table(), **change})


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: ClientJoint(np.full((2, 2, 2), 0.2)), "table must sum to 1; got 1.6"),
        (lambda: ClientJoint(np.full((2, 2), 0.25)), r"shape \(clients, groups, predictions\); got \(2, 2\)"),
        (lambda: ClientJoint(np.array([[[1.5, -0.5]]])), r"finite and >= 0; got -0.5 .. 1.5"),
        (lambda: ClientJoint(np.full((2, 2, 2), math.nan)), "table must hold probabilities"),
        (lambda: ClientJoint(np.full((2, 2, 2), 0.125), "zsh"), "axes must be .*; got 'zsh'"),
        (lambda: ClientJoint(np.full((1, 2, 2, 3), 1 / 12), "szyh"), r"one alphabet; got \(2, 3\)"),
        (lambda: ClientJoint(np.full((2, 2, 2), 0.125)).accuracy, "this needs a joint with labels"),
        (lambda: ClientJoint(np.full((2, 2, 2), 0.125)).counts, "joint of counted examples"),
        (lambda: ClientJoint.merge([]), "counts must be of one shape"),
        (lambda: ClientJoint.merge([np.eye(2, dtype=int), np.eye(3, dtype=int)]), "must be of one shape"),
        (lambda: ClientJoint.merge([np.eye(2)]), "whole numbers >= 0; got float64"),
        (lambda: ClientJoint.merge([-np.eye(2, dtype=int)]), "whole numbers >= 0; got int64, the least -1"),
        (lambda: ClientJoint.merge([np.zeros((2, 2), int)]), "of at least one example"),
        (lambda: client_counts([0, 1], [0], sizes=(2, 2)), "of one length; got"),
        (lambda: disparities(ClientJoint(np.full((2, 2, 2), 0.125), "szy")), "joint with predictions"),
    ],
)  # fmt: skip
def test_joints_that_are_none_are_refused(make, text):
    with pytest.raises(ValueError, match=text):
        make()


# Chance.


def test_chance_alone_gives_what_its_bias_says():
    data = table(120, seed=4, sizes=(2, 2, 2))
    joint = ClientJoint.from_predictions(data["clients"], data["groups"], data["predictions"])
    found = permutation_baseline(joint, draws=300, seed=1)
    for name, expected in zip(("global_", "local"), found.bias, strict=True):
        assert found.mean(name) == pytest.approx(expected, rel=0.25)
    assert found.bias == pytest.approx((1 / (240 * math.log(2)), 2 / (240 * math.log(2))))
    assert found.p_value("global_") > 0.05
    assert found.measured.global_ < found.quantile("global_", 0.99)
    for one, other in (("redundant", "global_"), ("masked", "local")):
        assert (found.draws["unique"] + found.draws[one]) == pytest.approx(found.draws[other])
    again = permutation_baseline(joint, draws=300, seed=1)
    assert np.array_equal(again.draws["masked"], found.draws["masked"])


def test_what_is_more_than_chance_is_told_from_it():
    data = table(120, seed=4, sizes=(2, 2, 2))
    joint = ClientJoint.from_predictions(data["clients"], data["groups"], data["groups"], data["labels"])
    found = permutation_baseline(joint, draws=99, bits=False)
    assert found.p_value("global_") == 0.01
    assert found.p_value("unique") == 0.01
    assert not found.measured.bits
    with pytest.raises(ValueError, match="draws must be >= 1; got 0"):
        permutation_baseline(joint, draws=0)
    with pytest.raises(ValueError, match="joint of counted examples"):
        permutation_baseline(ClientJoint(np.full((2, 2, 2), 0.125)))


# Splits.


def shares(parts, of_what: np.ndarray, value: int) -> list[float]:
    return [float((of_what[part.numpy()] == value).sum() / (of_what == value).sum()) for part in parts.parts]


def test_splits_deal_exact_shares():
    data = table(4000)
    z, y = data["groups"], data["labels"]
    assert shares(split(z, y, "skew"), z, 1) == pytest.approx([0.9, 0.1], abs=1e-3)
    assert shares(split(z, y, "skew"), z, 0) == pytest.approx([0.1, 0.9], abs=1e-3)
    apart = (z != y).astype(int)
    assert shares(split(z, y, "synergy", strength=0.8), apart, 0) == pytest.approx([0.8, 0.2], abs=1e-3)
    full = split(z, y, "synergy", strength=1.0)
    assert shares(full, apart, 1) == [0, 1]
    four = split(z, y, "skew", clients=4, strength=0.8)
    assert shares(four, z, 1) == pytest.approx([0.4, 0.1, 0.4, 0.1], abs=2e-3)
    even = split(z, y, "uniform", clients=3)
    assert max(even.sizes) - min(even.sizes) <= 4
    for parts in (full, four, even):
        assert torch.equal(torch.cat(parts.parts).sort().values, torch.arange(4000))
        assert all(torch.equal(part, part.sort().values) for part in parts.parts)
    assert full.rule == "synergy(strength=1, seed=0)"


def test_disparity_of_labels_is_what_the_split_makes_it():
    data = table(4000)
    z = data["groups"]
    y = np.where(draws(1).random(4000) < 0.8, z, 1 - z)
    kinds = {}
    for how in ("uniform", "skew", "synergy"):
        client = np.empty(4000, int)
        for k, part in enumerate(split(z, y, how, strength=0.95).parts):
            client[part.numpy()] = k
        d = disparities(ClientJoint.from_predictions(client, z, y))
        kinds[how] = d.unique, d.redundant, d.masked
    assert np.argmax(kinds["uniform"]) == 0
    assert kinds["skew"][1] > 5 * kinds["uniform"][1]
    assert kinds["synergy"][2] > 5 * kinds["uniform"][2]


def test_swapped_rows_change_hands_and_sizes_stay():
    data = table(1000)
    plain = split(data["groups"], data["labels"], "skew")
    moved = split(data["groups"], data["labels"], "skew", swapped=0.02)
    assert plain.sizes == moved.sizes
    stayed = np.intersect1d(plain.parts[0].numpy(), moved.parts[0].numpy())
    assert len(stayed) == plain.sizes[0] - int(0.02 * min(plain.sizes))
    again = split(data["groups"], data["labels"], "skew", swapped=0.02)
    assert all(torch.equal(a, b) for a, b in zip(again.parts, moved.parts, strict=True))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"how": "iid"}, "how must be one of uniform, skew, synergy; got 'iid'"),
        ({"strength": 1.5}, r"strength must be in \[0, 1\]; got 1.5"),
        ({"swapped": 1.0}, r"swapped must be in \[0, 1\); got 1.0"),
        ({"clients": 1}, "clients must be >= 2, the homes of 'skew'; got 1"),
        ({"clients": 0, "how": "uniform"}, "clients must be >= 1; got 0"),
        ({"labels": [0]}, "labels must be as many as groups, 3"),
        ({"groups": [-1, 0, 1]}, "groups must be >= 0; got -1"),
        ({"clients": 9, "how": "uniform"}, "clients must be fewer for 3 examples"),
    ],
)
def test_bad_splits_are_refused(change, text):
    arguments = {"groups": [0, 1, 1], "labels": [0, 1, 0], "how": "skew", **change}
    how = arguments.pop("how")
    with pytest.raises(ValueError, match=text):
        split(arguments.pop("groups"), arguments.pop("labels"), how, **arguments)
