"""Codes, schemes and training in one process: the card's exact properties, and bad input."""

from __future__ import annotations

import copy
import itertools
import math
import threading
import time
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from cograd.core.message import session_id
from cograd.core.streams import stream
from cograd.engines.exchange import GradientError
from cograd.engines.mailbox import Mailbox
from cograd.machines import (
    GC,
    MSGC,
    SRSGC,
    CyclicGC,
    CyclicMDS,
    GilbertElliott,
    GradientCoding,
    Learner,
    MailboxCluster,
    RepetitionGC,
    SimulatedCluster,
    Trace,
    Uncoded,
    select,
)
from cograd.machines.baselines import DropSlowest
from cograd.machines.gradient_coding.choice import fit_slope
from cograd.machines.gradient_coding.clock import end_of_round, run_clock
from cograd.machines.gradient_coding.clusters import pack, serve, to_bytes
from cograd.machines.gradient_coding.codes import Code, Mask, NotDecodable
from cograd.machines.gradient_coding.learners import Bench
from cograd.machines.gradient_coding.schemes import DeadlineMissed, Scheme
from cograd.machines.gradient_coding.training import Decoder

F64 = torch.float64
D = 7  # entries of a gradient, where its meaning does not matter


def mask(n: int, *members: int) -> Mask:
    return np.isin(np.arange(n), members)


# Codes.


def encoded(code: Code, parts: Tensor) -> dict[int, Tensor]:
    return {i: code.encode(i, parts[list(code.assignment(i))]) for i in range(code.n)}


def random_parts(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, D, dtype=F64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "code",
    [CyclicGC(8, 2), CyclicGC(6, 0), CyclicGC(6, 5), RepetitionGC(9, 2), CyclicMDS(8, 3), CyclicMDS(9, 4)],
    ids=repr,
)
def test_any_n_minus_s_or_more_survivors_give_the_sum(code: Code) -> None:
    parts = random_parts(code.n)
    sent = encoded(code, parts)
    for lost in range(code.s + 1):
        for missing in itertools.combinations(range(code.n), lost):
            decoded = code.decode({i: v for i, v in sent.items() if i not in missing})
            torch.testing.assert_close(decoded, parts.sum(0), atol=1e-9, rtol=0)


@pytest.mark.parametrize("code", [CyclicGC(8, 2), CyclicMDS(8, 3)], ids=repr)
def test_one_survivor_fewer_is_refused(code: Code) -> None:
    sent = encoded(code, random_parts(code.n))
    for missing in itertools.combinations(range(code.n), code.s + 1):
        with pytest.raises(NotDecodable, match=f"needs at least {code.n - code.s}: missing are"):
            code.decode({i: v for i, v in sent.items() if i not in missing})


def test_repetition_is_refused_exactly_when_a_group_is_missing() -> None:
    code, parts = RepetitionGC(6, 1), random_parts(6)
    sent = encoded(code, parts)
    for lost in range(7):
        for missing in itertools.combinations(range(6), lost):
            results = {i: v for i, v in sent.items() if i not in missing}
            if any({2 * k, 2 * k + 1} <= set(missing) for k in range(3)):
                with pytest.raises(NotDecodable, match=r"no result of repetition group\(s\)"):
                    code.decode(results)
            else:
                torch.testing.assert_close(code.decode(results), parts.sum(0), atol=1e-14, rtol=0)


@pytest.mark.parametrize("code", [CyclicGC(12, 4), CyclicMDS(12, 5)], ids=repr)
def test_weights_are_the_least_squares_solution_on_all_survivors(code: Code) -> None:
    for missing in [(), (3,), (0, 5), (1, 2, 3, 4)]:
        arrived = ~mask(12, *missing)
        kept = np.flatnonzero(arrived)
        least = np.linalg.lstsq(code.matrix[kept].T, np.ones(12), rcond=None)[0]
        np.testing.assert_allclose(code.weights(arrived)[kept], least, atol=1e-10)
        assert code.weights(arrived) is code.weights(arrived.copy())


def test_a_code_is_the_same_on_every_party_and_another_for_another_seed() -> None:
    assert np.array_equal(CyclicGC(9, 3).matrix, CyclicGC(9, 3).matrix)
    assert not np.array_equal(CyclicGC(9, 3).matrix, CyclicGC(9, 3, seed=1).matrix)


def test_every_chunk_is_on_s_plus_one_workers() -> None:
    for code in (CyclicGC(8, 3), RepetitionGC(8, 3), CyclicMDS(8, 3)):
        held = [chunk for i in range(8) for chunk in code.assignment(i)]
        assert sorted(held) == sorted(list(range(8)) * 4)


@pytest.mark.parametrize(("make", "bound"), [(CyclicGC, 1e-7), (CyclicMDS, 1e-6), (RepetitionGC, 1e-13)])
def test_256_workers_decode_after_random_and_neighbouring_losses(
    make: Callable[[int, int], Code], bound: float
) -> None:
    code, parts = make(256, 15), random_parts(256)
    sent, total = encoded(code, parts), parts.sum(0)
    draws = stream(0, "losses")
    for missing in [range(40, 55), *(draws.choice(256, 15).tolist() for _ in range(10))]:
        decoded = code.decode({i: v for i, v in sent.items() if i not in set(missing)})
        assert float((decoded - total).abs().max() / total.abs().max()) < bound


def test_a_survivor_set_that_rounding_cannot_decode_is_refused() -> None:
    code = CyclicMDS(256, 27)
    code.step = 1  # type: ignore[misc]  # the usual choice of zeros, side by side
    with pytest.raises(NotDecodable, match=r"too ill-conditioned without workers \[0, 1, .*at most 1e-06"):
        code.weights(np.arange(256) >= 27)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: CyclicGC(0, 0), "n must be >= 1 worker; got 0"),
        (lambda: CyclicGC(4, 4), "s must be in 0 .. n - 1 = 3 stragglers; got 4"),
        (lambda: RepetitionGC(8, 2), r"s \+ 1 must divide n = 8; got s = 2"),
        (lambda: CyclicMDS(8, 2), "n - s must be odd for real coefficients; got n=8, s=2: take s=3"),
        (lambda: GC(8, 2, "turbo"), "code must be one of cyclic, mds, repetition; got 'turbo'"),
        (lambda: GC(8, 8), "s must be in 0 .. n - 1 = 7 stragglers; got 8"),
        (lambda: MSGC(0, 1, 2, 0), "n must be >= 1 worker; got 0"),
        (lambda: MSGC(8, 2, 2, 3), "B must be in 1 .. W - 1 = 1; got 2"),
        (lambda: MSGC(8, 0, 2, 3), "B must be in 1 .. W - 1 = 1; got 0"),
        (lambda: MSGC(8, 1, 2, 9), "lam must be in 0 .. n = 8; got 9"),
        (lambda: MSGC(8, 1, 2, 3, model="any"), "model must be 'either' or 'bursty'; got 'any'"),
        (lambda: SRSGC(8, 2, 4, 3), "B must divide W - 1 = 3; got 2"),
        (lambda: SRSGC(1, 1, 2, 1), "s must be in 0 .. n - 1 = 0 stragglers; got 1"),
        (lambda: Uncoded(4).restart(0), "jobs must be >= 1 or None; got 0"),
        (lambda: GilbertElliott(stay=1.0), r"stay must be in \[0, 1\); got 1.0"),
        (lambda: GilbertElliott(fastest=0.0), "fastest must be > 0 seconds; got 0.0"),
        (lambda: Trace(np.ones(3)), r"seconds must have shape \(rounds, n\); got \(3,\)"),
        (lambda: Trace(np.zeros((2, 3))), "seconds must be positive and finite"),
        (lambda: Trace(np.ones((2, 3)), -1), "load must be >= 0; got -1"),
        (lambda: SimulatedCluster(Trace(np.ones((2, 3))), slope=-1.0), "slope must be >= 0 seconds; got -1.0"),
        (lambda: SimulatedCluster(Trace(np.ones((2, 3))), mu=-1.0), "mu must be >= 0; got -1.0"),
        (
            lambda: SimulatedCluster(Trace(np.ones((2, 3))), wait="none"),  # type: ignore[arg-type]
            "wait must be 'conforming' or 'all'; got 'none'",
        ),
        (lambda: select(Trace(np.ones((9, 3))), 1.0, 3, ("cg",)), r"schemes must be some of .*; got \['cg'\]"),
        (lambda: select(Trace(np.ones((3, 3))), 1.0, 3), "the probe must have more than max_delay = 3 rounds"),
        (lambda: select(Trace(np.ones((9, 3))), -1.0, 3), "slope and max_delay must be >= 0; got -1.0, 3"),
        (lambda: select(Trace(np.ones((9, 3))), 1.0, 0, ("m-sgc",)), "has a delay of at most 0"),
        (lambda: fit_slope([0.5, 0.5], [1.0, 2.0]), "two different loads or more are needed"),
        (
            lambda: run_clock(Uncoded(3), np.ones((4, 3)), 5),
            r"at least jobs \+ delay = 5, n = 3\); got \(4, 3\)",
        ),
    ],
)
def test_bad_input_is_refused_by_name(make: Callable[[], object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()


def test_bad_vectors_and_masks_are_refused() -> None:
    code = CyclicGC(4, 1)
    with pytest.raises(ValueError, match=r"parts must have shape \(2 chunks, d\); got \(3, 7\)"):
        code.encode(0, torch.zeros(3, D))
    with pytest.raises(TypeError, match=r"parts must be float32 or float64; got torch\.float16"):
        code.encode(0, torch.zeros(2, D, dtype=torch.float16))
    with pytest.raises(ValueError, match=r"workers must be in 0 \.\. n - 1 = 3; got \[4\]"):
        code.decode({4: torch.zeros(D)})
    scheme = GC(4, 1)
    with pytest.raises(TypeError, match="straggling must be a numpy array of bool; got list"):
        scheme.conforms([True] * 4)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"arrived must have shape \(4,\); got \(3,\)"):
        scheme.complete(0, np.ones(3, dtype=bool))
    with pytest.raises(ValueError, match="round must be the one under way, 0; got 1"):
        scheme.complete(1, np.ones(4, dtype=bool))
    scheme.restart(1)
    scheme.complete(0, np.ones(4, dtype=bool))
    with pytest.raises(ValueError, match="round must be below 1, all jobs are done; got 1"):
        scheme.tasks(1, 0)


# Schemes: every job decodes by its deadline, to the true gradient.

PATTERNS = [(4, 1, 2, 2), (8, 1, 2, 3), (8, 2, 3, 3), (8, 2, 4, 5), (8, 1, 4, 7), (6, 3, 4, 2)]
JOBS = 20


def gradients(scheme: Scheme, jobs: int = JOBS) -> Tensor:
    """A gradient for each job and chunk."""
    draw = torch.Generator().manual_seed(3)
    return torch.randn(jobs, len(scheme.shares), D, dtype=F64, generator=draw)


def play(
    scheme: Scheme, parts: Tensor, stragglers: Callable[[int], Mask], jobs: int = JOBS
) -> tuple[float, float]:
    """Run a scheme on given stragglers, decoding real vectors; the worst error and the straggling share."""
    scheme.restart(jobs)
    decoder, worst, decoded, busy, late = Decoder(D), 0.0, [], 0, 0
    while not scheme.done:
        straggling = stragglers(scheme.round) & scheme.busy()
        busy, late = busy + int(scheme.busy().sum()), late + int(straggling.sum())
        tasks = {i: scheme.tasks(scheme.round, i) for i in np.flatnonzero(~straggling).tolist()}
        r = scheme.round
        scheme.complete(r, ~straggling)
        for worker, given_ in tasks.items():
            vectors = []
            for task in given_:
                chosen = parts[task.job, list(task.chunks)]
                vectors.append(scheme.code.encode(worker, chosen) if task.coded else chosen.sum(0))
            decoder.add(worker, given_, vectors)
        for job, recipe in scheme.ready().items():
            assert job <= r <= job + scheme.delay
            decoded.append(job)
            worst = max(worst, float((decoder.gradient(job, recipe) - parts[job].sum(0)).abs().max()))
    assert sorted(decoded) == list(range(jobs))
    assert decoder.state_dict() == {"plain": {}, "coded": {}}
    return worst, late / busy


def conforming(scheme: Scheme, seed: int, chance: float = 0.5) -> Callable[[int], Mask]:
    """Random stragglers, each admitted if the pattern still conforms: close to as many as the model allows."""
    draws = stream(seed, "stragglers").numpy

    def of(round_: int) -> Mask:
        straggling = np.zeros(scheme.n, dtype=bool)
        for worker in draws.permutation(scheme.n).tolist():
            if draws.random() < chance:
                straggling[worker] = True
                straggling[worker] = scheme.conforms(straggling)
        return straggling

    return of


def model_window(scheme: MSGC, kind: str) -> Callable[[Mask], bool]:
    """The two straggler models as the paper states them, on all rounds so far: written out here once more."""
    B, W, lam = scheme.B, scheme.W, scheme.lam

    def bursty(rounds: Mask) -> bool:
        for start in range(len(rounds)):
            if rounds[start : start + W].any(0).sum() > lam:
                return False
            for later in range(start + B, min(start + W, len(rounds))):
                if (rounds[start] & rounds[later]).any():
                    return False
        return True

    def arbitrary(rounds: Mask) -> bool:
        for start in range(len(rounds)):
            window = rounds[start : start + W + B - 1]
            if window.any(0).sum() > lam or window.sum(0).max() > B:
                return False
        return True

    return bursty if kind == "bursty" else arbitrary


def of_model(scheme: MSGC, kind: str, seed: int) -> Mask:
    """Random stragglers of a model over all rounds, (rounds, n), and without the scheme's own check."""
    draws, allowed = stream(seed, kind).numpy, model_window(scheme, kind)
    rounds = np.zeros((JOBS + scheme.delay, scheme.n), dtype=bool)
    for r in range(len(rounds)):
        for worker in draws.permutation(scheme.n).tolist():
            if draws.random() < 0.6:
                rounds[r, worker] = True
                rounds[r, worker] = allowed(rounds[max(0, r - 9) : r + 1])
    return rounds


@pytest.mark.parametrize("kind", ["bursty", "arbitrary"])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_m_sgc_decodes_every_job_in_time_under_both_models(pattern: tuple[int, ...], kind: str) -> None:
    scheme = MSGC(*pattern)
    parts, shares = gradients(scheme), []
    for seed in range(5):
        rounds = of_model(scheme, kind, seed)
        error, share = play(scheme, parts, lambda r, rounds=rounds: rounds[r])  # type: ignore[misc]
        assert error < 1e-9
        shares.append(share)
    assert np.mean(shares) > 0.05


@pytest.mark.parametrize("kind", ["bursty", "arbitrary"])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_m_sgc_accepts_what_its_models_allow(pattern: tuple[int, ...], kind: str) -> None:
    scheme = MSGC(*pattern)
    for seed in range(3):
        rounds = of_model(scheme, kind, seed)
        scheme.restart(JOBS)
        for r, straggling in enumerate(rounds):
            assert scheme.conforms(straggling)
            scheme.complete(r, ~straggling)


@pytest.mark.parametrize("parameters", [(8, 1, 2, 4), (8, 1, 4, 6), (8, 2, 3, 5), (9, 3, 4, 7)], ids=str)
def test_selective_repetition_accepts_the_papers_model(parameters: tuple[int, ...]) -> None:
    """In every window of W rounds: bursty, or at most s stragglers a round. Written out here once more."""
    scheme = SRSGC(*parameters)
    _, B, W, lam = parameters

    def allowed(window: Mask) -> bool:
        if window.sum(1).max() <= scheme.s:
            return True
        pairs = itertools.combinations(range(len(window)), 2)
        again = any((window[a] & window[b]).any() for a, b in pairs if B <= b - a < W)
        return not again and window.any(0).sum() <= lam

    for seed in range(6):
        draws = stream(seed, "model").numpy
        scheme.restart(JOBS)
        history = np.zeros((W - 1, scheme.n), dtype=bool)
        for r in range(scheme.rounds or 0):
            straggling = np.zeros(scheme.n, dtype=bool)
            for worker in draws.permutation(scheme.n).tolist():
                straggling[worker] = scheme.busy()[worker] and draws.random() < 0.4
                straggling[worker] &= allowed(np.concatenate([history, straggling[None]]))
            assert scheme.conforms(straggling)
            scheme.complete(r, ~straggling)
            history = np.concatenate([history[1:], straggling[None]])


SCHEMES = [
    *(MSGC(*pattern) for pattern in PATTERNS),
    MSGC(6, 2, 3, 6),
    MSGC(8, 2, 3, 3, model="bursty"),
    MSGC(8, 2, 3, 3, "repetition"),
    MSGC(8, 1, 2, 1, "repetition"),
    SRSGC(8, 1, 2, 4),
    SRSGC(8, 1, 4, 6),
    SRSGC(8, 2, 3, 5),
    SRSGC(9, 3, 4, 7),
    SRSGC(8, 2, 5, 6),
    SRSGC(8, 2, 3, 6, "repetition"),
    GC(8, 3),
    GC(8, 3, "repetition"),
    GC(8, 3, "mds"),
]


@pytest.mark.parametrize("scheme", SCHEMES, ids=repr)
def test_what_conforms_decodes_in_time(scheme: Scheme) -> None:
    parts = gradients(scheme)
    runs = [play(scheme, parts, conforming(scheme, seed)) for seed in range(8)]
    assert max(error for error, _ in runs) < 1e-9
    assert np.mean([share for _, share in runs]) > 0.05


@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_scheme_survives_any_pattern_that_it_accepts(data: st.DataObject) -> None:
    n = data.draw(st.integers(2, 5), "n")
    W = data.draw(st.integers(2, 5), "W")
    B = data.draw(st.integers(1, W - 1), "B")
    lam = data.draw(st.integers(0, n), "lam")
    repeats = (W - 1) % B == 0 and -(-B * lam // (W - 1 + B)) < n and data.draw(st.booleans(), "SR")
    scheme = SRSGC(n, B, W, lam) if repeats else MSGC(n, B, W, lam)
    patterns = data.draw(st.lists(st.integers(0, 2**n - 1), min_size=12, max_size=12), "stragglers")
    scheme.restart(12 - scheme.delay if scheme.delay < 12 else 1)
    for r in range(scheme.rounds or 0):
        straggling = np.array([patterns[r % 12] >> i & 1 for i in range(n)], dtype=bool)
        while not scheme.conforms(straggling):
            straggling[int(straggling.argmax())] = False
        scheme.complete(r, ~straggling)


def test_a_miss_changes_nothing_and_names_the_job() -> None:
    scheme = GC(4, 1)
    with pytest.raises(
        DeadlineMissed, match=r"job 0 cannot be decoded at the end of round 0: results of \[2\] of 4"
    ):
        scheme.complete(0, mask(4, 0, 1))
    scheme.complete(0, mask(4, 0, 1, 2))
    assert list(scheme.ready()) == [0]


@pytest.mark.parametrize("pattern", [(8, 1, 2, 3), (8, 2, 3, 3), (6, 3, 4, 2)], ids=str)
def test_one_more_than_lambda_absent_from_a_group_is_too_much(pattern: tuple[int, ...]) -> None:
    n, _, W, lam = pattern
    for extra in (0, 1):
        scheme = MSGC(*pattern)
        scheme.restart(6)
        absent = mask(n, *range(lam + extra))

        def run(scheme: MSGC = scheme, absent: Mask = absent, start: int = 2 + W - 1) -> None:
            for r in range(scheme.rounds or 0):
                straggling = absent if r == start else np.zeros(scheme.n, dtype=bool)
                if r != start:
                    assert scheme.conforms(straggling)
                scheme.complete(r, ~straggling)

        if extra:
            with pytest.raises(DeadlineMissed, match="job "):
                run()
        else:
            run()


def test_one_straggle_more_than_b_in_a_jobs_rounds_is_too_much() -> None:
    for times, missed in ((2, False), (3, True)):
        scheme = MSGC(6, 2, 3, 6)  # four rounds a job, of which two must succeed
        scheme.restart(8)
        late = {3, 4, 5} if times == 3 else {3, 5}

        def run(scheme: MSGC = scheme, late: set[int] = late) -> None:
            for r in range(scheme.rounds or 0):
                scheme.complete(r, ~mask(6, 2) if r in late else np.ones(6, dtype=bool))

        if missed:
            with pytest.raises(DeadlineMissed):
                run()
        else:
            run()


@pytest.mark.parametrize("parameters", [(8, 1, 2, 4), (8, 2, 3, 5)], ids=str)
def test_selective_repetition_is_tight(parameters: tuple[int, ...]) -> None:
    """lambda + 1 stragglers of which more than s straggle again when they repeat."""
    scheme = SRSGC(*parameters)
    scheme.restart(8)
    late, first = mask(8, *range(2 * scheme.s + 1)), 2
    while scheme.round < first + scheme.B:
        scheme.complete(scheme.round, ~late if scheme.round == first else np.ones(8, dtype=bool))
    with pytest.raises(DeadlineMissed, match=f"job {first} cannot"):
        scheme.complete(scheme.round, ~late)


def test_without_stragglers_nothing_is_repeated_and_the_tail_is_skipped() -> None:
    scheme = SRSGC(8, 2, 3, 5)
    scheme.restart(6)
    for r in range(8):
        jobs = [task.job for worker in range(8) for task in scheme.tasks(r, worker)]
        assert jobs == ([r] * 8 if r < 6 else [])
        assert scheme.busy().all() == (r < 6)
        scheme.complete(r, np.ones(8, dtype=bool))
        assert list(scheme.ready()) == ([r] if r < 6 else [])


def test_selective_repetition_by_hand() -> None:
    """n = 4, B = 1, W = 2, lambda = 2: s = 1, so a job needs three results. Six rounds."""
    scheme = SRSGC(4, 1, 2, 2)
    assert scheme.s == 1
    scheme.restart(5)
    #        stragglers  jobs of workers 0..3 in the round  ready at its end
    rounds = [
        ({0, 1}, [0, 0, 0, 0], []),  # two results: one short
        (
            set(),
            [0, 1, 1, 1],
            [0, 1],
        ),  # worker 0 repeats and gives nothing to job 1, for which three are enough
        ({2}, [2, 2, 2, 2], [2]),  # s = 1 is survived at once
        (set(), [3, 3, 3, 3], [3]),
        ({1, 3}, [4, 4, 4, 4], []),
        (set(), [None, 4, None, None], [4]),  # the tail: only the repetition
    ]
    for r, (late, jobs, ready) in enumerate(rounds):
        tasks = [scheme.tasks(r, worker) for worker in range(4)]
        assert [given_[0].job if given_ else None for given_ in tasks] == jobs
        assert scheme.conforms(mask(4, *late))
        assert not scheme.conforms(mask(4, 0, 1, 2))
        scheme.complete(r, ~mask(4, *late))
        assert sorted(scheme.ready()) == ready
    assert scheme.done


def test_m_sgc_retries_the_first_missing_chunk_before_its_coded_part() -> None:
    scheme = MSGC(4, 2, 3, 2)  # D1 items 0 and 1, groups 2 and 3
    scheme.restart(10)
    items = []
    for r in range(6):
        items.append([(task.job, task.item) for task in scheme.tasks(r, 1)])
        scheme.complete(r, ~mask(4, 1) if r in (2, 3) else np.ones(4, dtype=bool))
    of_job_2 = [item for round_ in items for job, item in round_ if job == 2]
    assert of_job_2 == [0, 1, 0, 1]  # straggled at 0 and 1, then repeats both: no coded part is left
    of_job_1 = [item for round_ in items for job, item in round_ if job == 1]
    assert of_job_1 == [0, 1, 1, 1]  # lost 1 and its first repetition
    of_job_0 = [item for round_ in items for job, item in round_ if job == 0]
    assert of_job_0 == [0, 1, 2, 3]  # the coded parts, that were lost


# Loads.


def test_loads_of_the_paper() -> None:
    assert MSGC(256, 1, 2, 27).load == pytest.approx(0.0075431, abs=1e-7)
    assert SRSGC(256, 2, 3, 23).s == 12
    assert SRSGC(256, 2, 3, 23).load == 0.05078125
    assert GC(256, 15).load == 16 / 256
    assert Uncoded(256).load == 1 / 256


def test_loads_meet_the_bound_at_lambda_0_and_at_the_last_two_and_are_above_it_elsewhere() -> None:
    for n, W in itertools.product((4, 9, 16), range(2, 7)):
        for B, lam in itertools.product(range(1, W), range(n + 1)):
            scheme = MSGC(n, B, W, lam)
            assert scheme.load >= scheme.lower_bound
            assert (scheme.load == scheme.lower_bound) == (lam in (0, n - 1, n))
            if (W - 1) % B == 0:
                assert SRSGC(n, B, W, lam).load >= SRSGC(n, B, W, lam).lower_bound


def test_chunks_have_the_papers_sizes() -> None:
    for n, B, W, lam in [*PATTERNS, (6, 2, 3, 6)]:
        scheme = MSGC(n, B, W, lam)
        z = n * (B + (W - 1) * (lam + 1)) if lam < n else n * (W - 1)
        sizes = [Fraction(int(share), z) for share in scheme.shares]
        assert sum(sizes) == 1
        assert len(sizes) == n * (W - 1) + (n * B if lam < n else 0)


@pytest.mark.parametrize("scheme", SCHEMES, ids=repr)
def test_the_load_is_the_share_of_samples_that_the_busiest_worker_touches(scheme: Scheme) -> None:
    scheme.restart(12)
    total, most, stragglers = int(scheme.shares.sum()), 0, conforming(scheme, 0)
    while not scheme.done:
        for worker in range(scheme.n):
            tasks = scheme.tasks(scheme.round, worker)
            most = max(most, sum(int(scheme.shares[list(task.chunks)].sum()) for task in tasks))
            assert len(tasks) <= scheme.vectors
        scheme.complete(scheme.round, ~stragglers(scheme.round))
    assert most / total == scheme.load


# The clock.


def test_a_round_ends_between_the_tolerance_and_the_slowest() -> None:
    trace = GilbertElliott().trace(40, 32, 0)
    for scheme in (GC(32, 3), MSGC(32, 1, 2, 4), SRSGC(32, 2, 3, 5), Uncoded(32)):
        for mu in (0.0, 1.0):
            timeline = run_clock(scheme, trace.seconds, 30, mu)
            assert timeline is not None
            for lasted, seconds in zip(timeline.seconds, trace.seconds, strict=False):
                slowest = float(seconds.max())
                assert lasted == 0 or min((1 + mu) * float(seconds.min()), slowest) <= lasted <= slowest


def test_with_no_straggler_a_round_lasts_as_long_as_the_slowest() -> None:
    seconds = np.array([1.0, 1.5, 1.25, 1.75])
    assert end_of_round(GC(4, 1), seconds, 1.0, "conforming") == (1.75, False)


def test_waiting_out_admits_arrivals_in_order_until_the_pattern_conforms() -> None:
    seconds = np.array([1.0, 5.0, 3.0, 4.0, 2.5, 1.0])
    assert end_of_round(GC(6, 2), seconds, 1.0, "conforming") == (3.0, True)
    assert end_of_round(GC(6, 2), seconds, 1.0, "all") == (5.0, True)
    assert end_of_round(GC(6, 4), seconds, 1.0, "conforming") == (2.0, False)
    assert end_of_round(GC(6, 1), seconds, 0.0, "conforming") == (4.0, True)


def test_the_clocks_halving_finds_the_first_arrival_that_suffices() -> None:
    trace = GilbertElliott(enter=0.3, stay=0.4).trace(30, 8, 1)
    for scheme in SCHEMES:
        if scheme.n != 8:
            continue
        scheme.restart(25)
        for r, seconds in enumerate(trace.seconds[: scheme.rounds]):
            end, _ = end_of_round(scheme, seconds, 1.0, "conforming")
            busy = scheme.busy()
            if busy.any():
                start = min(2 * seconds[busy].min(), seconds[busy].max())
                ends = [start, *sorted(seconds[busy & (seconds > start)])]
                assert end == next(t for t in ends if scheme.conforms(busy & (seconds > t)))
            scheme.complete(r, ~(busy & (seconds > end)))


def test_the_delay_model_straggles_as_often_and_as_long_as_the_trace() -> None:
    trace = GilbertElliott().trace(2000, 64, 5)
    slow = trace.seconds > 2 * 0.558
    assert slow.mean() == pytest.approx(GilbertElliott().straggling, rel=0.05)
    assert slow[1:][slow[:-1]].mean() == pytest.approx(0.099, abs=0.01)
    assert np.median(trace.seconds[~slow]) == pytest.approx(0.558 * 1.157, rel=0.01)
    np.testing.assert_array_equal(trace.seconds, GilbertElliott().trace(2000, 64, 5).seconds)


def test_select_takes_the_candidate_with_the_least_time_on_the_probe() -> None:
    trace, slope = GilbertElliott(enter=0.15).trace(30, 8, 2), 4.0
    choice = select(trace, slope, 3, ("uncoded", "gc", "sr-sgc", "m-sgc"))
    by_hand: dict[str, float] = {}
    candidates: list[tuple[str, Scheme]] = [("gc", GC(8, s)) for s in range(8)]
    candidates += [
        ("m-sgc", MSGC(8, B, W, lam)) for B, W in [(1, 2), (1, 3), (1, 4), (2, 3)] for lam in range(9)
    ]
    for family, scheme in candidates:
        timeline = run_clock(scheme, trace.at(scheme.load, slope), 27)
        assert timeline is not None
        by_hand[family] = min(by_hand.get(family, np.inf), timeline.total)
    assert {family: choice.families[family][1] for family in by_hand} == by_hand
    assert choice.seconds == min(seconds for _, seconds in choice.families.values())
    assert choice.scheme.delay <= 3


def test_slope_and_load_of_a_probe() -> None:
    base, slope = fit_slope([0.0, 0.25, 0.5, 1.0], [0.6 + 2.2 * x for x in (0.0, 0.25, 0.5, 1.0)])
    assert (base, slope) == (pytest.approx(0.6), pytest.approx(2.2))
    trace = Trace(np.full((2, 3), 1.0), load=0.5)
    np.testing.assert_allclose(trace.at(0.25, 2.0), 0.5)
    np.testing.assert_allclose(trace.at(0.0, 2.0), 0.1)


# Training.

N, M, SAMPLES = 8, 4, 80
X = torch.randn(SAMPLES, 6, dtype=F64, generator=torch.Generator().manual_seed(1))
Y = torch.randn(SAMPLES, 3, dtype=F64, generator=torch.Generator().manual_seed(2))


def squares(model: nn.Module, rows: Tensor) -> Tensor:
    return (model(X[rows]) - Y[rows]).square().sum()


def rows_of(step: int) -> Tensor:
    return torch.roll(torch.arange(SAMPLES), step)[: SAMPLES - 16]


def learners(count: int = M, dropout: bool = False, adam: bool = False) -> list[Learner]:
    made = []
    for index in range(count):
        torch.manual_seed(index)
        model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Dropout(0.4 * dropout), nn.Linear(5, 3)).double()
        optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
        if adam:
            optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        made.append(Learner(model, optimizer, squares, rows_of))
    return made


def weights(made: list[Learner]) -> Tensor:
    return torch.stack([nn.utils.parameters_to_vector(m.model.parameters()).detach() for m in made])


def bursts(rounds: int = 80, n: int = N, seed: int = 0) -> SimulatedCluster:
    return SimulatedCluster(GilbertElliott(enter=0.15, stay=0.3).trace(rounds, n, seed))


def reference(steps: int, **options: bool) -> Tensor:
    """Every model alone on its whole batches."""
    made = learners(**options)
    for learner in made:
        for step in range(steps):
            rows = learner.batch(step)
            learner.optimizer.zero_grad()
            (learner.loss(learner.model, rows) / len(rows)).backward()
            learner.optimizer.step()
    return weights(made)


TRAINED = [GC(N, 2), GC(N, 3, "repetition"), SRSGC(N, 2, 3, 4), MSGC(N, 1, 2, 3), MSGC(N, 2, 3, 8), Uncoded(N)]


@pytest.mark.parametrize("adam", [False, True])
@pytest.mark.parametrize("scheme", TRAINED, ids=repr)
def test_training_follows_uncoded_sgd(scheme: Scheme, adam: bool) -> None:
    made = learners(adam=adam)
    run = GradientCoding(made, scheme, bursts())
    run.train(8)  # 32 jobs
    torch.testing.assert_close(weights(made), reference(8, adam=adam), atol=1e-10, rtol=0)
    assert run.updates == 32
    assert run.round == 32 + scheme.delay
    assert run.waits <= run.round


def test_stragglers_are_not_a_few_where_training_is_compared() -> None:
    slow = run_clock(MSGC(N, 1, 2, 3), bursts().trace.seconds, 32)
    assert slow is not None
    assert slow.stragglers.mean() > 0.05


def test_the_ledger_counts_vectors_and_the_samples_that_were_touched() -> None:
    touched = [0]

    def counting(model: nn.Module, rows: Tensor) -> Tensor:
        touched[0] += len(rows)
        return squares(model, rows)

    for scheme in (GC(N, 3), SRSGC(N, 2, 3, 4), MSGC(N, 1, 2, 3), MSGC(N, 2, 3, 7)):
        total = int(scheme.shares.sum())
        made = learners()
        for learner in made:
            learner.loss, learner.batch = counting, lambda step, total=total: torch.arange(total) % SAMPLES  # type: ignore[misc]
        run = GradientCoding(made, scheme, SimulatedCluster(Trace(np.ones((60, N)))))
        touched[0] = 0
        run.train(4)
        assert touched[0] == run.ledger.worked("grad")
        assert run.max_load == pytest.approx(scheme.load, abs=1e-15)
        numel = run.bench.numel
        uploads = [e.payload for e in run.ledger if e.sender == 3 and scheme.delay <= e.round < 16]
        assert set(uploads) == {scheme.vectors * numel * 8}
        broadcasts = [e for e in run.ledger if e.sender == N]
        assert len(broadcasts) == 16
        assert {(e.payload, e.copies) for e in broadcasts} == {(numel * 8, N)}
        assert run.bytes == run.ledger.sent()


def test_dropout_is_the_same_on_every_worker_and_leaves_other_draws_alone() -> None:
    trained = []
    for seed in (0, 1):
        made = learners(dropout=True)
        torch.manual_seed(7)
        GradientCoding(made, GC(N, 3), bursts(seed=seed), seed=5).train(5)
        trained.append((weights(made), torch.rand(1)))
    torch.testing.assert_close(trained[0][0], trained[1][0], atol=1e-10, rtol=0)
    torch.manual_seed(7)
    assert trained[0][1] == trained[1][1] == torch.rand(1)
    other = learners(dropout=True)
    GradientCoding(other, GC(N, 3), bursts(), seed=6).train(5)
    assert not torch.allclose(weights(other), trained[0][0], atol=1e-6)


def test_chunks_of_unequal_size_still_add_up() -> None:
    made = learners()
    for learner in made:
        learner.batch = lambda step: torch.arange(33 + step)
    run = GradientCoding(made, MSGC(N, 1, 2, 3), bursts())
    run.train(3)
    again = learners()
    for learner in again:
        for step in range(3):
            rows = torch.arange(33 + step)
            learner.optimizer.zero_grad()
            (squares(learner.model, rows) / len(rows)).backward()
            learner.optimizer.step()
    torch.testing.assert_close(weights(made), weights(again), atol=1e-12, rtol=0)


def test_float32_on_the_wire_halves_the_traffic_and_costs_digits() -> None:
    made, narrow = learners(), learners()
    wide = GradientCoding(made, GC(N, 3), bursts())
    wide.train(3)
    run = GradientCoding(narrow, GC(N, 3), bursts(), dtype=torch.float32)
    run.train(3)
    assert run.ledger.sent(0) * 2 == wide.ledger.sent(0)
    error = float((weights(narrow) - weights(made)).abs().max())
    assert 1e-10 < error < 1e-3


@pytest.mark.parametrize("scheme", TRAINED, ids=repr)
@pytest.mark.parametrize("stop", [1, 7])
def test_a_run_continues_from_a_file_bit_for_bit(scheme: Scheme, stop: int, tmp_path: object) -> None:
    whole = learners(adam=True)
    GradientCoding(whole, scheme, bursts()).train(4)
    first = learners(adam=True)
    run = GradientCoding(first, scheme, bursts())
    run.start(4)
    for _ in range(stop):
        run.step()
    torch.save(run.state_dict(), f"{tmp_path}/state.pt")
    rest = learners(adam=True)
    other = GradientCoding(rest, copy.deepcopy(scheme), bursts())
    other.load_state_dict(torch.load(f"{tmp_path}/state.pt"))
    while not other.done:
        other.step()
    assert torch.equal(weights(whole), weights(rest))
    assert other.round == 16 + scheme.delay


def test_the_state_of_another_scheme_or_number_of_models_is_refused() -> None:
    run = GradientCoding(learners(), GC(N, 2), bursts())
    run.train(1)
    before = weights(run.bench.learners)
    other = GradientCoding(learners(), GC(N, 3), bursts())
    other.train(2)
    with pytest.raises(ValueError, match=r"the state is of GC\(n=8, s=3, .*; this is GC\(n=8, s=2"):
        run.load_state_dict(other.state_dict())
    few = GradientCoding(learners(2), GC(N, 2), bursts())
    with pytest.raises(ValueError, match="the state is of 2 models; this run has 4"):
        run.load_state_dict(few.state_dict())
    assert torch.equal(weights(run.bench.learners), before)


def test_training_may_switch_the_scheme_once_all_jobs_are_done() -> None:
    made = learners()
    run = GradientCoding(made, Uncoded(N), bursts())
    run.train(2)
    run.train(3, MSGC(N, 1, 2, 3))
    run.start(3, GC(N, 2))
    run.step()
    with pytest.raises(ValueError, match=r"start must wait until all jobs are done; GC\(n=8, .* is in round 1"):
        run.start(1)
    while not run.done:
        run.step()
    torch.testing.assert_close(weights(made), reference(8), atol=1e-10, rtol=0)
    with pytest.raises(ValueError, match="no jobs are left"):
        run.step()


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_a_decoded_sum_becomes_a_gradient_of_the_parameters_dtype(dtype: torch.dtype) -> None:
    x, y = X.to(dtype), Y.to(dtype)
    made, plain = learners(), learners()
    for learner in (*made, *plain):
        learner.model.to(dtype)
        learner.loss = lambda model, rows: (model(x[rows]) - y[rows]).square().sum()
    GradientCoding(made, GC(N, 2), bursts()).train(2)
    for learner in plain:
        for step in range(2):
            learner.optimizer.zero_grad()
            (learner.loss(learner.model, rows_of(step)) / len(rows_of(step))).backward()
            learner.optimizer.step()
    assert weights(made).dtype == dtype
    torch.testing.assert_close(weights(made), weights(plain), atol=1e-5 if dtype != F64 else 1e-12, rtol=0)


class Threads:
    """A master's mailbox, and workers that serve in threads of this process."""

    def __init__(self, benches: list[Bench]) -> None:
        n = len(benches)
        self.boxes = [Mailbox(member, session_id("threads")) for member in range(n + 1)]
        for box, other in itertools.permutations(self.boxes, 2):
            box.connect(other.member, other.address)
        self.master = self.boxes[n]
        self._threads = [
            threading.Thread(target=serve, args=(box, n, bench), daemon=True)
            for box, bench in zip(self.boxes, benches, strict=False)
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> Threads:
        return self

    def __exit__(self, *_: object) -> None:
        for box in reversed(self.boxes):
            box.close()
        for thread in self._threads:
            thread.join(10)
            assert not thread.is_alive()


def test_a_slow_worker_skips_orders_that_were_overtaken_and_keeps_their_weights() -> None:
    made, scheme = learners(), GC(1, 0)
    bench = Bench(made, scheme)
    order = {"do": "work", "scheme": ["GC", scheme.arguments], "base": 0, "hold": False}
    with Threads([Bench(learners(), scheme)]) as found:
        for job in range(3):
            found.master.send(0, job, pack({"do": "weights", "job": job}, to_bytes(bench.weights(job) + job)))
            found.master.send(0, job, pack({**order, "tasks": [[job, 0]]}))
        while len(found.boxes[0]._mail) < 6:  # all are there before it begins
            time.sleep(0.01)
        found.start()
        mail = found.master.recv(10)
        assert mail.round == 2
        found.master.send(0, 3, pack({**order, "tasks": [[0, 0]]}))  # of a job whose order it skipped
        again = found.master.recv(10)
        assert again.round == 3
        bench.load(0, bench.weights(0))
        (expected,) = bench.answer(0, [scheme.task(0, 0)], 0)
        torch.testing.assert_close(bench.split(again.payload, 1)[0], expected, atol=1e-12, rtol=0)
        with pytest.raises(TimeoutError):
            found.master.recv(0.1)


def test_a_worker_without_a_jobs_weights_says_so() -> None:
    made, scheme = learners(), GC(1, 0)
    bench = Bench(made, scheme)
    order = {"do": "work", "scheme": ["GC", scheme.arguments], "base": 0, "hold": False}
    with Threads([Bench(learners(), scheme)]) as found:
        found.start()
        found.master.send(0, 7, pack({**order, "tasks": [[0, 0]]}))
        assert bytes(found.master.recv(10).payload) == b""
        for job in (0, M):  # M is the next one of the same model: the weights of job 0 are gone
            found.master.send(0, 8, pack({"do": "weights", "job": job}, to_bytes(bench.weights(job))))
        found.master.send(0, 9, pack({**order, "tasks": [[0, 0]]}))
        mail = found.master.recv(10)
        assert (mail.round, bytes(mail.payload)) == (9, b"")


def test_a_worker_with_another_number_of_models_is_refused() -> None:
    with Threads([Bench(learners(2), MSGC(1, 1, 2, 0))]) as found:
        found.start()
        run = GradientCoding(learners(3), MSGC(1, 1, 3, 0), MailboxCluster(found.master, 1))
        with pytest.raises(ValueError, match="worker 0 holds other jobs' weights: its learners are not the"):
            run.train(2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_models_on_a_gpu_train_with_workers_behind_mailboxes() -> None:
    def on_gpu() -> list[Learner]:
        x, y = X.cuda(), Y.cuda()
        made = learners()
        for learner in made:
            learner.model.cuda()
            learner.optimizer = torch.optim.SGD(learner.model.parameters(), lr=0.02, momentum=0.9)
            learner.loss = lambda model, rows: (model(x[rows]) - y[rows]).square().sum()
        return made

    made = on_gpu()
    with Threads([Bench(on_gpu(), GC(2, 1)) for _ in range(2)]) as found:
        found.start()
        cluster = MailboxCluster(found.master, 2)
        GradientCoding(made, GC(2, 1), cluster).train(2)
        cluster.close()
    torch.testing.assert_close(weights(made).cpu(), reference(2), atol=1e-10, rtol=0)


def test_the_times_of_a_probe_are_the_traces() -> None:
    trace = GilbertElliott(enter=0.15).trace(40, N, 0)
    run = GradientCoding(learners(), Uncoded(N), SimulatedCluster(trace, 2.0))
    with pytest.raises(ValueError, match=r"in one round or more; round\(s\) \[\] of 0 ended"):
        run.trace()
    run.train(5)
    probe = run.trace()
    assert probe.load == 1 / N
    np.testing.assert_allclose(probe.seconds, trace.at(1 / N, 2.0)[:20])
    assert select(probe, 2.0, 3).scheme.delay <= 3
    run.cluster.mu = 0.0  # type: ignore[attr-defined]
    run.train(3, GC(N, 2))
    with pytest.raises(ValueError, match=r"round\(s\) \[.*\d.*\] of 12 ended without somebody's result"):
        run.trace()
    run.cluster.mu = math.inf  # type: ignore[attr-defined]
    run.train(2)
    np.testing.assert_allclose(run.trace().seconds, trace.at(3 / N, 2.0)[32:])


def with_module(module: nn.Module) -> list[Learner]:
    made = learners()
    made[2].model.add_module("norm", module.double())
    return made


def test_what_cannot_be_exact_is_refused() -> None:
    def make(made: list[Learner], scheme: Scheme = TRAINED[3]) -> GradientCoding:
        return GradientCoding(made, scheme, bursts())

    with pytest.raises(ValueError, match=r"model 2: 'norm' \(BatchNorm1d\) is in training mode"):
        make(with_module(nn.BatchNorm1d(3, affine=False)))
    with pytest.raises(ValueError, match=r"\(InstanceNorm1d\) is in training mode"):
        make(with_module(nn.InstanceNorm1d(3, track_running_stats=True)))
    run = make(with_module(nn.BatchNorm1d(3, affine=False).eval()))
    run.train(1)
    run.bench.learners[2].model.train()
    with pytest.raises(ValueError, match=r"call \.eval"):
        run.train(1)
    with pytest.raises(ValueError, match="is 2 rounds; with 2 models in turn it must be at most 1"):
        make(learners(2), SRSGC(N, 2, 3, 4))
    with pytest.raises(ValueError, match=r"one of the cluster's 8 workers; got GC\(n=4"):
        make(learners(), GC(4, 1))
    with pytest.raises(ValueError, match="learners must hold at least one; got none"):
        make([])
    with pytest.raises(TypeError, match=r"dtype must be torch\.float32 or torch\.float64; got torch\.bfloat16"):
        GradientCoding(learners(), GC(N, 1), bursts(), dtype=torch.bfloat16)
    mixed = learners()
    mixed[1].model.float()
    with pytest.raises(ValueError, match="all parameters must be of one dtype"):
        make(mixed)
    small = learners()
    small[0] = Learner(nn.Linear(6, 3).double(), small[0].optimizer, squares, rows_of)
    with pytest.raises(ValueError, match=r"models must be of one size; got \[21, 53, 53, 53\]"):
        make(small)
    with pytest.raises(ValueError, match="steps must be >= 1; got 0"):
        make(learners()).train(0)
    with pytest.raises(ValueError, match="the trace has 3 rounds; this is round 3"):
        GradientCoding(learners(), GC(N, 1), bursts(3)).train(1)


def test_fewer_samples_than_chunks_are_refused() -> None:
    made = learners()
    made[0].batch = lambda step: torch.arange(15)
    with pytest.raises(ValueError, match=r"one sample a chunk or more, 16 for MSGC.*rows of shape \(15,\)"):
        GradientCoding(made, MSGC(N, 1, 2, 3), bursts()).train(1)


def test_dropping_the_slowest_ends_rounds_early_and_is_not_exact() -> None:
    scheme, errors = DropSlowest(N, 1), []
    made, trace = learners(), GilbertElliott().trace(20, N, 0)

    def compare(job: int, total: Tensor) -> None:
        learner = made[job % M]
        loss = learner.loss(learner.model, learner.batch(job // M))
        whole = nn.utils.parameters_to_vector(torch.autograd.grad(loss, list(learner.model.parameters())))
        errors.append(float((total - whole).norm() / whole.norm()))

    run = GradientCoding(made, scheme, SimulatedCluster(trace, mu=0.0), on_gradient=compare)
    run.train(4)
    assert run.wall_clock == pytest.approx(float(np.sort(trace.seconds[:16], axis=1)[:, N - 2].sum()))
    assert min(errors) > 1e-3
    assert run.max_load == scheme.load == 1 / N
    complete = run_clock(scheme, np.ones((3, N)), 3)
    assert complete is not None
    assert scheme.ready() == {2: {0: dict.fromkeys(range(N), 1.0)}}


def test_a_gradient_that_is_not_finite_stops_the_run_before_the_step() -> None:
    made = learners()
    made[1].loss = lambda model, rows: squares(model, rows) * float("nan")
    before = weights(made)
    run = GradientCoding(made, GC(N, 1), bursts())
    run.start(1)
    assert run.step() == [0]
    with pytest.raises(GradientError, match="job 1: the decoded gradient holds NaN or infinity"):
        run.step()
    assert torch.equal(weights(made)[1], before[1])
