"""Refusing arguments that are out of range."""

from __future__ import annotations


def check(*conditions: tuple[str, object, str, bool]) -> None:
    """Raise ValueError for the first of the conditions (name, value, what is allowed, whether it is)."""
    for name, value, allowed, fine in conditions:
        if not fine:
            raise ValueError(f"{name} must be {allowed}; got {value!r}")
