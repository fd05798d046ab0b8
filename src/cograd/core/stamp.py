"""The stamp of a result: what code and data it speaks for, file by file.

A result is stale when something that it was made by has changed. The stamp hashes the syntax tree (without
docstrings, other bare strings, comments and positions) of every cograd module that the paper's file imports,
directly or not, so that a reformatted or better documented file makes nothing stale and a changed constant
does.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator, Mapping
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch


def stamp(module: str, data: Mapping[str, str], *readers: str) -> dict[str, Any]:
    """The stamp of ``module`` now: hash by file of its import closure and that of the modules that read its
    data, digest by data set, torch's version."""
    files = {name: _hash(path) for name, path in sorted(closure(module, *readers).items())}
    return {"files": files, "data": dict(data), "torch": torch.__version__.split("+")[0]}


def stale(recorded: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """What made a recorded stamp stale, in words; empty if nothing did."""
    causes = []
    for part in ("files", "data"):
        then, now = recorded.get(part, {}), current[part]
        for name in sorted({*then, *now}):
            if then.get(name) != now.get(name):
                what = "is new" if name not in then else "is gone" if name not in now else "changed"
                causes.append(f"{name} {what}")
    if recorded.get("torch") != current["torch"]:
        causes.append(f"torch {recorded.get('torch')} -> {current['torch']}")
    return causes


def closure(*modules: str) -> dict[str, Path]:
    """The modules of cograd that ``modules`` import, directly or not, themselves included: file by short name.

    A package counts where something is imported from it, not where it merely lies on the way to a module:
    otherwise every new method would make its room's results stale. For the same reason a registry, a module
    that says ``__registry__ = True`` because it only lists others, is left out, with what only it imports.
    """
    for module in modules:
        if _source(module) is None:
            raise ValueError(f"module must be one that can be imported; got {module!r}")
    package = modules[0].partition(".")[0]
    todo, found = list(modules), dict[str, Path]()
    while todo:
        name = todo.pop()
        path = _source(name)
        if path is None or name in found or _is_registry(path):
            continue
        found[name] = path
        todo += [n for n in _imports(path, name) if n.partition(".")[0] == package]
    return {"/".join(n.split(".")[1:] or [package]): p for n, p in found.items()}


@lru_cache(maxsize=512)
def _is_registry(path: Path) -> bool:
    return any(
        isinstance(node, ast.Assign)
        and any(isinstance(t, ast.Name) and t.id == "__registry__" for t in node.targets)
        for node in ast.parse(path.read_bytes()).body
    )


@lru_cache(maxsize=512)
def _source(name: str) -> Path | None:
    """The source file of a module; None for what is not a module (a name inside one)."""
    try:
        spec = find_spec(name) if name else None
    except ModuleNotFoundError:
        return None
    return Path(spec.origin) if spec and spec.origin else None


def _imports(path: Path, name: str) -> Iterator[str]:
    """Modules imported anywhere in a file, functions included; `from a import b` is a.b if that is a module."""
    here = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = here.split(".")
                base = ".".join([*parts[: len(parts) - node.level + 1], *filter(None, [node.module])])
            names = [f"{base}.{alias.name}" for alias in node.names]
            yield from (name if _source(name) else base for name in names)


def _hash(path: Path) -> str:
    tree = _canonical(ast.parse(path.read_bytes()))
    return hashlib.blake2b(tree.encode(), digest_size=8).hexdigest()


def _canonical(node: Any) -> str:
    """A syntax tree as text that does not depend on Python's version: empty fields are left out, since
    versions differ in which ones they have, and so are parts that do nothing."""
    if isinstance(node, ast.AST):
        fields = ((k, _without_idle(node, v)) for k, v in ast.iter_fields(node))
        kept = (f"{k}={_canonical(v)}" for k, v in fields if v is not None and v != [])
        return f"{type(node).__name__}({', '.join(kept)})"
    if isinstance(node, list):
        return f"[{', '.join(map(_canonical, node))}]"
    return repr(node)


def _without_idle(parent: ast.AST, value: Any) -> Any:
    return [node for node in value if not _is_idle(parent, node)] if isinstance(value, list) else value


def _is_idle(parent: ast.AST, node: Any) -> bool:
    """Whether a part decides no number: a statement that is a string and nothing else (a docstring, the text
    that documents a constant), the empty piece that Python 3.12 adds to some f-strings, or the ``reason=`` that
    explains a claim, which is written after the run that it explains."""
    if isinstance(node, ast.keyword):
        return node.arg == "reason"
    text = node.value if isinstance(node, ast.Expr) else node
    if not isinstance(text, ast.Constant) or not isinstance(text.value, str):
        return False
    return text is not node or (isinstance(parent, ast.JoinedStr) and not text.value)
