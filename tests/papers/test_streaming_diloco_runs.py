"""How Streaming DiLoCo's paper tunes the one rate of each system, and what it says of a sign."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from cograd.papers.streaming_diloco import FP4, FROZEN, LADDERS, PARALLEL, PILOT_SEED, UNEVEN, _pilots, _sign


class Pretended:
    """A lab whose pilots end at a known loss."""

    def __init__(self, loss: Callable[[str, float], float]) -> None:
        self.loss, self.asked = loss, list[tuple[str, float]]()

    def map(self, cells: Sequence[dict[str, Any]], compute: Any) -> list[dict[str, float]]:
        assert {c["seed"] for c in cells} == {PILOT_SEED}
        self.asked += [(c["system"], c["rate"]) for c in cells]
        return [{"pilot_loss": self.loss(c["system"], c["rate"])} for c in cells]


def test_while_the_best_rate_is_at_an_edge_the_next_one_outwards_is_tried() -> None:
    best = {PARALLEL: 3e-3, FROZEN: 0.1, FP4: 1.0}
    lab = Pretended(lambda system, rate: abs(math.log(rate / best.get(system, 0.4))))
    pilots = _pilots(lab)  # type: ignore[arg-type]
    assert sorted(pilots[PARALLEL]) == [1.5e-3, 3e-3, 6e-3]
    assert sorted(pilots[FROZEN]) == [0.05, 0.1, 0.2, 0.4, 0.7]
    assert sorted(pilots[FP4]) == [0.2, 0.4, 0.7, 1.0, 1.4]
    assert len(lab.asked) == len(set(lab.asked))
    assert set(pilots) == set(LADDERS)
    assert UNEVEN not in pilots


@pytest.mark.parametrize("direction", [-1, 1])
def test_the_ladder_ends_and_a_loss_that_is_not_finite_is_the_worst(direction: int) -> None:
    pilots = _pilots(Pretended(lambda _, rate: direction * rate))  # type: ignore[arg-type]
    for system, losses in pilots.items():
        assert min(losses, key=losses.__getitem__) == LADDERS[system][min(direction, 0)]
    middle = _pilots(Pretended(lambda _, rate: math.nan if rate > 0.4 else -rate))  # type: ignore[arg-type]
    assert sorted(middle[FP4]) == [0.2, 0.4, 0.7]


def test_where_the_seeds_do_not_tell_a_sign_the_claim_says_so() -> None:
    assert _sign("a", "Worse", "Fig. 1", [0.9, 1.0, 1.1]).text == "Worse"
    told = " (too close to 0 for 3 seeds to tell the sign)"
    assert _sign("a", "Worse", "Fig. 1", [-0.5, 0.3, 0.9]).text == f"Worse{told}"
    assert _sign("a", "Worse", "Fig. 1", [-0.9, 0.3, 0.5]).text == f"Worse{told}"
    assert _sign("a", "Worse", "Fig. 1", [1.0]).holds
