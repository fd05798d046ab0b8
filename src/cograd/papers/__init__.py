"""One file a paper: its claims, made runnable. ``find`` and ``every`` are how the rest reaches them."""

from __future__ import annotations

from difflib import get_close_matches
from importlib import import_module
from pkgutil import iter_modules

from cograd.papers._paper import Findings, Paper

__all__ = ["Findings", "Paper", "UnknownMethod", "every", "find"]


class UnknownMethod(ValueError):
    """No method of that name."""


def every() -> list[Paper]:
    """All papers, in the order of their rooms and names."""
    names = [m.name for m in iter_modules(__path__) if not m.name.startswith("_")]
    papers = [import_module(f"{__name__}.{name}").PAPER for name in names]
    return sorted(papers, key=lambda p: (p.room, p.slug))


def find(slug: str) -> Paper:
    """The paper of a slug. Raises UnknownMethod, with the nearest names."""
    known = {paper.slug: paper for paper in every()}
    if slug not in known:
        near = get_close_matches(slug, known, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are: {', '.join(known)}"
        raise UnknownMethod(f"no method {slug!r}; {hint}")
    return known[slug]
