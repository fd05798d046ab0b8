"""AGLFOP's frontier: closed forms at its ends, monotone and concave between, and above every model."""

from __future__ import annotations

import math
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import linprog

from cograd.clients.aglfop import ClientJoint, aglfop, disparities, frontier


def labelled(seed: int, shape: tuple[int, int, int, int] = (2, 2, 2, 2), alpha: float = 1.0) -> ClientJoint:
    p = np.random.default_rng(seed).dirichlet(np.full(math.prod(shape), alpha)).reshape(shape)
    return ClientJoint(p, "szyh")


def cost(mass: np.ndarray, mu: np.ndarray) -> float:
    """min_p sum_z mass_z |mu_z - p|."""
    return min(float(mass @ np.abs(mu - p)) for p in mu)


def globally_fair(p: np.ndarray) -> float:
    """The best accuracy at I(Z;H) = 0, of P(s,z,y) with binary y."""
    zy = p.sum(0)
    return 1 - cost(zy.sum(1), zy[:, 1] / zy.sum(1))


def locally_fair(p: np.ndarray) -> float:
    """At I(Z;H|S) = 0."""
    return 1 - sum(cost(client.sum(1), client[:, 1] / client.sum(1)) for client in p)


def fair_in_both(p: np.ndarray) -> float:
    """At both 0, binary z: clients accept with rates p_s, and the groups in all with equal ones."""
    clients = len(p)
    mass, mu = p.sum(2), p[..., 1] / p.sum(2)
    objective = np.r_[np.zeros(clients), mass.ravel()]  # rates, then |mu_sz - p_s| from above
    above, right = [], []
    for s in range(clients):
        for z in (0, 1):
            for sign in (1, -1):
                row = np.zeros(3 * clients)
                row[s], row[clients + 2 * s + z] = -sign, -1
                above.append(row)
                right.append(-sign * mu[s, z])
    share = mass / mass.sum(0)
    equal = np.r_[share[:, 1] - share[:, 0], np.zeros(2 * clients)][None]
    found = linprog(objective, above, right, equal, [0], bounds=[(0, 1)] * clients + [(0, None)] * 2 * clients)
    return 1 - found.fun


CLOSED = {
    "global": (0.0, math.inf, globally_fair),
    "local": (math.inf, 0.0, locally_fair),
    "both": (0.0, 0.0, fair_in_both),
    "neither": (math.inf, math.inf, lambda p: 1.0),
}


@pytest.mark.parametrize("kind", CLOSED)
@pytest.mark.parametrize("shape", [(2, 2, 2, 2), (4, 2, 2, 2)])
@pytest.mark.parametrize("solver", ["clarabel", "slsqp"])
def test_closed_forms(kind, shape, solver):
    outer, inner, form = CLOSED[kind]
    for seed in range(2):
        joint = labelled(seed, shape)
        found = aglfop(joint, eps_global=outer, eps_local=inner, solver=solver)
        assert found.accuracy == pytest.approx(form(joint.over("szy")), abs=1e-6)


def test_bounds_near_zero_come_near_the_closed_forms():
    for seed in range(3):
        joint = labelled(seed)
        for outer, inner, form in CLOSED.values():
            bounds = {"eps_global": outer or 1e-9, "eps_local": inner or 1e-9}
            assert aglfop(joint, **bounds).accuracy == pytest.approx(form(joint.over("szy")), abs=2e-4)


def test_labels_that_are_fair_enough_cost_nothing():
    joint = labelled(1)
    own = disparities(ClientJoint(joint.over("szy"), "szh"))
    at = aglfop(joint, eps_global=own.global_ + 1e-6, eps_local=own.local + 1e-6)
    assert at.accuracy == pytest.approx(1, abs=1e-6)
    assert aglfop(joint, eps_global=own.global_ / 2).accuracy < 0.999


def test_it_is_monotone_and_concave():
    bounds = np.linspace(0, 0.3, 7)
    a = frontier(labelled(1), eps_global=bounds, eps_local=bounds).accuracy
    assert (np.diff(a, axis=0) >= -1e-6).all()
    assert (np.diff(a, axis=1) >= -1e-6).all()
    for i, j in ((1, 0), (0, 1), (1, 1), (1, -1)):  # midpoints along rows, columns and diagonals
        for x in range(1, 6):
            for y in range(1, 6):
                assert a[x, y] >= (a[x - i, y - j] + a[x + i, y + j]) / 2 - 1e-6


@pytest.mark.parametrize("within", [None, "pooled", "client"])
@pytest.mark.parametrize("shape", [(2, 2, 2, 2), (3, 3, 3, 3)])
def test_no_model_is_above_it(within, shape):
    for seed in range(6):
        joint = labelled(seed, shape, alpha=0.5)
        own = disparities(joint)
        found = aglfop(joint, eps_global=own.global_, eps_local=own.local, within=within)
        assert joint.accuracy <= found.accuracy + 1e-6
        assert found.disparities.global_ <= own.global_ + 1e-5
        assert found.disparities.local <= own.local + 1e-5
        assert found.joint.over("szy") == pytest.approx(joint.over("szy"), abs=1e-12)
        free = aglfop(joint, eps_global=own.global_, eps_local=own.local)
        assert found.accuracy <= free.accuracy + 1e-6


@pytest.mark.parametrize("within", [None, "pooled", "client"])
def test_the_two_solvers_agree(within):
    for seed in range(2):
        joint = labelled(seed)
        own = disparities(joint)
        for share in (0.0, 0.3, 1.0):
            bounds = {"eps_global": share * own.global_, "eps_local": share * own.local}
            one, other = (aglfop(joint, **bounds, within=within, solver=s) for s in ("clarabel", "slsqp"))
            assert one.accuracy == pytest.approx(other.accuracy, abs=1e-5)


def test_cells_without_mass_are_left_out():
    p = labelled(2).table.copy()
    p[0, 1], p[1, 0, 1] = 0, 0
    joint = ClientJoint(p / p.sum(), "szyh")
    found = aglfop(joint, eps_global=0.02, eps_local=0.01)
    assert np.isnan(found.rule.table[0, 1]).all()
    assert found.rule.table[0, 0].sum(1) == pytest.approx([1, 1])
    assert found.accuracy == pytest.approx(
        aglfop(joint, eps_global=0.02, eps_local=0.01, solver="slsqp").accuracy, abs=1e-5
    )


def test_bits_are_nats_over_ln_2():
    joint = labelled(3)
    bits = aglfop(joint, eps_global=0.02, eps_local=0.03)
    nats = aglfop(joint, eps_global=0.02 * math.log(2), eps_local=0.03 * math.log(2), bits=False)
    assert bits.accuracy == pytest.approx(nats.accuracy, abs=1e-9)
    assert bits.disparities.global_ * math.log(2) == pytest.approx(nats.disparities.global_, abs=1e-9)


# What can be made of a classifier.


def rates(joint: ClientJoint, z: int) -> np.ndarray:
    """(FPR, TPR) of a group over all clients."""
    zyh = joint.over("zyh")[z]
    return zyh[:, 1] / zyh.sum(1)


@pytest.mark.parametrize("opposite", [False, True])
def test_pooled_rates_stay_in_the_quadrilateral(opposite):
    """Of (0,0), (1,1), the classifier's point and its opposite, whether it is better than chance or worse."""
    for seed in range(4):
        joint = labelled(seed)
        joint = ClientJoint(joint.table[..., ::-1], "szyh") if opposite else joint
        found = aglfop(joint, eps_global=0.01, eps_local=0.05, within="pooled")
        for z in (0, 1):
            corners = np.stack([rates(joint, z), 1 - rates(joint, z)], 1)
            mix = np.linalg.solve(corners, rates(found.joint, z))
            assert (mix >= -1e-6).all()
            assert (mix <= 1 + 1e-6).all()
        both = aglfop(
            ClientJoint(joint.table[..., ::-1], "szyh"), eps_global=0.01, eps_local=0.05, within="pooled"
        )
        assert both.accuracy == pytest.approx(found.accuracy, abs=1e-6)


def test_a_classifier_that_is_right_can_become_any_predictor_and_a_constant_one_none():
    data = labelled(0).over("szy")
    right = ClientJoint(data[..., None] * np.eye(2), "szyh")
    for within in ("pooled", "client"):
        found = aglfop(right, within=within)
        assert found.accuracy == pytest.approx(1, abs=1e-7)
    constant = ClientJoint(data[..., None] * np.array([1, 0]), "szyh")
    majority = data.max(2).sum()
    assert aglfop(constant, within="client").accuracy == pytest.approx(majority, abs=1e-7)
    assert aglfop(right, eps_local=0, within="client").accuracy <= aglfop(right, eps_local=0).accuracy + 1e-7


def test_a_rule_of_a_classifier_is_put_to_use():
    joint = labelled(5)
    found = aglfop(joint, eps_global=0.01, eps_local=0.02, within="client")
    made = np.einsum("szyk,szkh->szyh", joint.table, found.rule.relabel)
    assert found.joint.table == pytest.approx(made, abs=1e-12)
    n = 60_000
    cells = np.random.default_rng(0).choice(16, n, p=joint.table.ravel())
    s, z, y, h = (torch.from_numpy(c) for c in np.unravel_index(cells, (2, 2, 2, 2)))
    new = found.rule.post_process(s, z, h, seed=1)
    assert torch.equal(new, found.rule.post_process(s, z, h, seed=1))
    seen = ClientJoint.from_predictions(s, z, new, y)
    assert np.abs(seen.table - found.joint.table).max() < 0.01
    assert disparities(seen).global_ < 0.02 < disparities(joint).global_
    drawn = found.rule.draw(s, z, y)
    assert ClientJoint.from_predictions(s, z, drawn, y).accuracy == pytest.approx(found.accuracy, abs=0.01)


def test_rules_refuse_what_they_do_not_know():
    p = labelled(0).table.copy()
    p[0, 1] = 0
    joint = ClientJoint(p / p.sum(), "szyh")
    free, made = aglfop(joint, eps_local=0.1), aglfop(joint, eps_local=0.1, within="client")
    with pytest.raises(ValueError, match=r"has not seen client, group and class \(0, 1, 1\)"):
        free.rule.draw([1, 0], [0, 1], [0, 1])
    with pytest.raises(ValueError, match=r"has not seen client, group and class \(0, 1, 0\)"):
        made.rule.post_process([0], [1], [0])
    with pytest.raises(ValueError, match=r"this rule needs labels; aglfop\(\.\.\., within='client'\)"):
        free.rule.post_process([0], [0], [0])
    with pytest.raises(ValueError, match=r"clients must be codes of 0 \.\. 1; got 2 \.\. 2"):
        free.rule.draw([2], [0], [0])


# The surface, and what is refused.


def test_a_surface_is_its_points_and_has_a_picture(tmp_path: Path):
    joint = labelled(4)
    outer, inner = (0.0, 0.02, math.inf), (0.01, 0.1)
    surface = frontier(joint, eps_global=outer, eps_local=inner)
    for i, g in enumerate(outer):
        for j, own in enumerate(inner):
            alone = aglfop(joint, eps_global=g, eps_local=own)
            assert surface.accuracy[i, j] == pytest.approx(alone.accuracy, abs=1e-7)
            assert (surface.points[i][j].eps_global, surface.points[i][j].eps_local) == (g, own)
    surface.draw(tmp_path / "surface.png", {"model": joint})
    assert (tmp_path / "surface.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match="a picture needs two finite bounds of each kind"):
        frontier(joint, eps_global=[0.1], eps_local=inner).draw(tmp_path / "none.png")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"eps_global": -0.1}, "eps_global must be >= 0; got -0.1"),
        ({"eps_local": math.nan}, "eps_local must be >= 0; got nan"),
        ({"within": "server"}, "within must be None, 'pooled' or 'client'; got 'server'"),
        ({"solver": "scs"}, "solver must be one of clarabel, slsqp; got 'scs'"),
    ],
)
def test_bad_arguments_are_refused(change, text):
    with pytest.raises(ValueError, match=text):
        aglfop(labelled(0), **change)


def test_what_a_joint_lacks_is_named():
    with pytest.raises(ValueError, match="this needs a joint with labels; got one of 'szh'"):
        aglfop(ClientJoint(np.full((2, 2, 2), 0.125)))
    with pytest.raises(ValueError, match="this needs a joint with predictions; got one of 'szy'"):
        aglfop(ClientJoint(np.full((2, 2, 2), 0.125), "szy"), within="client")
    with pytest.raises(ValueError, match="eps_local must be one bound or more"):
        frontier(labelled(0), eps_global=[0.1], eps_local=[])


@pytest.mark.parametrize(
    ("solver", "missing", "named"), [("clarabel", "cvxpy", "convex"), ("slsqp", "scipy", "scipy")]
)
def test_a_solver_that_is_not_installed_is_not_replaced(monkeypatch, solver, missing, named):
    def absent(name):
        if name.startswith(missing):
            raise ImportError(name)
        return import_module(name)

    monkeypatch.setattr("cograd.clients.aglfop.program.import_module", absent)
    with pytest.raises(ImportError, match=rf"solver '{solver}' needs {missing}.*{named}"):
        aglfop(labelled(0), solver=solver)
