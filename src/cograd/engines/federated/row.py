"""What the history of a simulation holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Row:
    """What one round (or aggregation) was: cumulative bytes, work and seconds, and accuracies where measured.

    ``up`` and ``down`` are payload bytes of all clients since the start. ``accuracy`` is the global model's on
    the test set; over the clients' own test sets ``personal`` is the mean after aggregation, ``worst`` the mean
    of the worst tenth, ``before`` that of the participants right after their training.
    """

    round: int
    time: float
    participants: tuple[int, ...]
    up: int
    down: int
    work: Mapping[str, float]
    seconds: float
    accuracy: float | None = None
    personal: float | None = None
    worst: float | None = None
    before: float | None = None
    reports: Mapping[str, float] = field(default_factory=dict)
    lost: Mapping[int, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "lost": list(self.lost.items())}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Row:
        """Inverse of `to_json`."""
        lost = {int(client): why for client, why in row["lost"]}
        return cls(**{**row, "participants": tuple(row["participants"]), "lost": lost})
