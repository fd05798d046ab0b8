"""Fragments (arXiv:2501.18512, Sec. 2.2 and 3.3.1): which parameters are synchronised together.

A fragment is a named group of parameters. A rule makes the fragments of a model; `transformer` is the paper's,
`whole` is DiLoCo's, `groups` is any other. A parameter that is used in several places has one name, the first,
and is in one fragment. Buffers are in none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Literal, TypeAlias

from torch import nn

from cograd.core.space import trainable

Fragments: TypeAlias = Mapping[str, Sequence[str]]
"""Names of parameters by fragment, in the order in which the fragments are synchronised."""

Rule: TypeAlias = Callable[[nn.Module], Fragments]

REST = "rest"
"""The fragment of what `transformer` and `groups` have not placed: embeddings, final norm, head."""


def whole(model: nn.Module) -> Fragments:
    """One fragment that holds everything: DiLoCo."""
    return {"all": list(trainable(model))}


def transformer(
    blocks: Iterable[nn.Module], size: int = 3, pattern: Literal["strided", "sequential"] = "strided"
) -> Rule:
    """Groups of ``size`` blocks, and one fragment for all that is outside the blocks.

    With L blocks there are G = ceil(L / size) groups. *strided*: block l is in group l mod G; *sequential*: in
    group l // size. The groups come first, the rest last. Raises ValueError for no block, a size below 1 or
    another pattern.
    """
    blocks = list(blocks)
    if not blocks or size < 1 or pattern not in ("strided", "sequential"):
        raise ValueError(
            "transformer needs at least one block, size >= 1 and pattern 'strided' or 'sequential'; "
            f"got {len(blocks)} blocks, size={size}, pattern={pattern!r}"
        )
    count = -(-len(blocks) // size)
    group_of = {
        id(parameter): i % count if pattern == "strided" else i // size
        for i, block in reversed(list(enumerate(blocks)))  # a parameter that blocks share is the first one's
        for parameter in block.parameters()
    }

    def rule(model: nn.Module) -> Fragments:
        parts: dict[str, list[str]] = {f"blocks {i}": [] for i in range(count)}
        parts[REST] = []
        for name, parameter in trainable(model).items():
            group = group_of.get(id(parameter))
            parts[REST if group is None else f"blocks {group}"].append(name)
        return {label: names for label, names in parts.items() if names}

    return rule


def groups(patterns: Mapping[str, str | Sequence[str]]) -> Rule:
    """Fragments by name: ``groups({"body": "layers.*", "ends": ["embed.*", "head.*"]})``.

    Patterns are those of `fnmatch`. What no pattern matches forms the fragment ``rest``, which comes last. A
    pattern that matches nothing, or a parameter that two fragments match, is refused when the rule is applied.
    """

    def rule(model: nn.Module) -> Fragments:
        names = list(trainable(model))
        parts: dict[str, list[str]] = {}
        for label, given in patterns.items():
            wanted = [given] if isinstance(given, str) else list(given)
            parts[label] = [n for n in names if any(fnmatchcase(n, pattern) for pattern in wanted)]
            idle = [pattern for pattern in wanted if not any(fnmatchcase(n, pattern) for n in names)]
            if idle:
                raise ValueError(f"patterns of fragment {label!r} must match a parameter; {idle[0]!r} does not")
        placed = {n for part in parts.values() for n in part}
        rest = [n for n in names if n not in placed]
        return {**parts, REST: [*parts.get(REST, []), *rest]} if rest else parts

    return rule


def partition(model: nn.Module, fragments: Fragments | Rule) -> dict[str, tuple[str, ...]]:
    """The fragments of a model, checked: every trainable parameter in exactly one, none empty.

    Raises ValueError, naming the parameter or the fragment.
    """
    given = fragments(model) if callable(fragments) else fragments
    names, seen = list(trainable(model)), dict[str, str]()
    for label, part in given.items():
        if not part:
            raise ValueError(f"fragment {label!r} must hold at least one parameter; it is empty")
        for name in part:
            if name not in names:
                raise ValueError(f"fragment {label!r} holds {name!r}, which is no trainable parameter")
            if name in seen:
                raise ValueError(
                    f"parameter {name!r} must be in one fragment; it is in {seen[name]!r} and {label!r}"
                )
            seen[name] = label
    left_out = [name for name in names if name not in seen]
    if left_out:
        raise ValueError(f"every trainable parameter must be in a fragment; {left_out[0]!r} is in none")
    return {label: tuple(part) for label, part in given.items()}
