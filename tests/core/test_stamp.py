"""Stamps: the closure of a file's imports, and a hash that changes with code and with nothing else."""

from __future__ import annotations

import ast
import itertools
import sys
from pathlib import Path

import pytest
import torch

from cograd.core.stamp import _canonical, closure, stale, stamp

_NUMBERS = itertools.count()


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Writes an importable package of the given files and returns its name, another one each time."""
    monkeypatch.syspath_prepend(str(tmp_path))
    made = []

    def write(files: dict[str, str] | None = None, **more: str) -> str:
        name = f"stamped{next(_NUMBERS)}"
        made.append(name)
        for path, text in {"__init__": "", **(files or {}), **more}.items():
            file = tmp_path / name / f"{path}.py"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text.replace("PACKAGE", name), encoding="utf-8")
        return name

    yield write
    for module in [m for m in sys.modules if m.partition(".")[0] in made]:
        del sys.modules[module]


@pytest.fixture
def hash_of(package):
    """The hash that a module of the given text has."""

    def compute(text: str) -> str:
        name = package(m=text)
        return stamp(f"{name}.m", {})["files"]["m"]

    return compute


# Closure


def test_imports_are_followed_in_every_form(package):
    name = package(
        a="import PACKAGE.plain\nfrom PACKAGE import member\nfrom PACKAGE.direct import value\nimport math",
        plain="from . import sibling",
        sibling="",
        member="",
        direct="value = 1",
        unused="",
    )
    found = closure(f"{name}.a")
    assert set(found) == {"a", "plain", "sibling", "member", "direct"}
    assert all(isinstance(path, Path) and path.exists() for path in found.values())


def test_imports_inside_functions_and_branches_count(package):
    name = package(
        a="def f():\n    if True:\n        from .late import x\n        return x\n"
        "try:\n    import PACKAGE.maybe\nexcept ImportError:\n    pass",
        late="x = 1",
        maybe="",
    )
    assert set(closure(f"{name}.a")) == {"a", "late", "maybe"}


def test_packages_count_where_something_is_imported_from_them_and_not_on_the_way(package):
    name = package(
        {
            "__init__": "from PACKAGE import unrelated",
            "unrelated": "",
            "way/__init__": "from .unrelated import thing",
            "way/unrelated": "thing = 1",
            "way/leaf": "from PACKAGE.room import thing",
            "room/__init__": "from .inner import thing",
            "room/inner": "thing = 1",
            "room/other": "",
        }
    )
    assert set(closure(f"{name}.way.leaf")) == {"way/leaf", "room", "room/inner"}


def test_a_circle_of_imports_ends(package):
    name = package(a="def f():\n    import PACKAGE.b", b="import PACKAGE.a")
    assert set(closure(f"{name}.b")) == {"a", "b"}


def test_other_packages_are_left_out(package):
    other = package(m="")
    name = package(a=f"import {other}.m\nimport torch\nimport json\nfrom {other} import *")
    assert set(closure(f"{name}.a")) == {"a"}


def test_the_closure_of_core_is_core():
    found = closure("cograd.core.codecs")
    assert set(found) == {"core/codecs", "core/message", "core/selection", "core/streams"}


@pytest.mark.parametrize("module", ["cograd.no_such", "no_such_package.at_all", "cograd.core.codecs.TopK", ""])
def test_a_module_that_does_not_exist_is_refused(module):
    with pytest.raises(ValueError, match=f"module must be one that can be imported; got '{module}'"):
        stamp(module, {})


def test_a_registry_is_left_out_with_what_only_it_imports(package):
    name = package(
        a="import PACKAGE.registry\nimport PACKAGE.used",
        registry="import PACKAGE.listed\nimport PACKAGE.used\n__registry__ = True",
        listed="",
        used="",
    )
    assert set(closure(f"{name}.a")) == {"a", "used"}
    assert set(closure(f"{name}.a", f"{name}.listed")) == {"a", "used", "listed"}


# Hash

CODE = '''
"""Module."""

RATE = 0.1
"""What it is."""


class A:
    """Class."""

    def f(self, x):
        """Method."""
        return {**x, "rate": RATE}


async def g(a, *, b=None):
    """Coroutine."""
    for i in range(3):
        pass
    else:
        return f"{a:>{b}}", [i for i in a if i]
'''


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"""Module."""', ""),
        ('"""Module."""', '"""Another\n\nlonger text: été."""'),
        ('"""What it is."""', '"""What it really is."""'),
        ('    """Class."""\n', ""),
        ('"""Method."""', "'''Does it.'''"),
        ('    """Coroutine."""\n', ""),
        ("RATE = 0.1", "RATE = 0.1  # tuned\n# by hand"),
        ("RATE = 0.1", "\n\nRATE   =  (0.10)"),
        ('{**x, "rate": RATE}', "{\n            **x,\n            'rate': RATE,\n        }"),
    ],
)
def test_text_and_format_leave_the_hash_as_it_is(hash_of, old, new):
    assert CODE.count(old) == 1
    assert hash_of(CODE.replace(old, new)) == hash_of(CODE)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("RATE = 0.1", "RATE = 0.2"),
        ("RATE = 0.1", "RATE: float = 0.1"),
        ("RATE = 0.1", "RATE = 1"),
        ("RATE = 0.1", "RATE = '0.1'"),
        ('"rate": RATE', '"rate": -RATE'),
        ("b=None", "b=0"),
        ("*, b=None", "b=None"),
        ("range(3)", "range(4)"),
        ("async def", "def"),
        ('return {**x, "rate": RATE}', 'yield {**x, "rate": RATE}'),
        ("if i]", "if not i]"),
        ("class A:", "class A(dict):"),
    ],
)
def test_a_change_of_code_changes_the_hash(hash_of, old, new):
    assert CODE.count(old) == 1
    assert hash_of(CODE.replace(old, new)) != hash_of(CODE)


def test_a_string_that_does_something_counts(hash_of):
    assert hash_of("x = 'a'") != hash_of("x = 'b'")
    assert hash_of("print('a')") != hash_of("print('b')")
    assert hash_of("x = [1]") != hash_of("x = [1, 1]")
    assert hash_of("x = None") != hash_of("x = ...")
    assert hash_of("x = 1") != hash_of("x = 1.0") != hash_of("x = True")


def test_fields_that_only_some_python_versions_have_do_not_count(hash_of, monkeypatch):
    before = hash_of(CODE)
    fields = (*ast.FunctionDef._fields, "field_of_a_later_python")
    monkeypatch.setattr(ast.FunctionDef, "_fields", fields)
    monkeypatch.setattr(ast.FunctionDef, "field_of_a_later_python", [], raising=False)
    assert hash_of(CODE) == before
    monkeypatch.setattr(ast.FunctionDef, "field_of_a_later_python", None)
    assert hash_of(CODE) == before


def test_the_empty_piece_that_python_3_12_adds_to_an_f_string_does_not_count():
    tree = ast.parse("f'{a:>{b}}', ['']")
    before = _canonical(tree)
    spec = next(n.format_spec for n in ast.walk(tree) if isinstance(n, ast.FormattedValue) and n.format_spec)
    spec.values.append(ast.Constant(""))
    assert _canonical(tree) == before
    assert _canonical(ast.parse("f'{a:>{b}}', []")) != before


def test_a_known_hash_does_not_drift(hash_of):
    # results that are recorded hold such hashes: a change here makes every one of them stale
    assert hash_of(CODE) == "1e8a7ebd66822ef7"


def test_the_reason_of_a_claim_is_not_hashed(hash_of):
    plain = hash_of("c = Claim(1, threshold=2)")
    assert hash_of("c = Claim(1, threshold=2, reason='noise')") == plain
    assert hash_of("c = Claim(1, threshold=3)") != plain


# Stamp and stale


def test_a_stamp_names_files_data_and_torch(package):
    name = package(a="from PACKAGE import b", b="")
    made = stamp(f"{name}.a", {"mnist": "digest"})
    assert set(made["files"]) == {"a", "b"}
    assert all(len(h) == 16 for h in made["files"].values())
    assert made["data"] == {"mnist": "digest"}
    assert made["torch"] == torch.__version__.split("+")[0]
    assert stale(made, stamp(f"{name}.a", {"mnist": "digest"})) == []


def test_stale_names_the_file_that_changed(package, tmp_path):
    name = package(a="from PACKAGE import b", b="RATE = 1")
    before = stamp(f"{name}.a", {})
    (tmp_path / name / "b.py").write_text("# faster\nRATE = 1\n")
    assert stale(before, stamp(f"{name}.a", {})) == []
    (tmp_path / name / "b.py").write_text("RATE = 2\n")
    assert stale(before, stamp(f"{name}.a", {})) == ["b changed"]


def test_stale_says_what_is_new_gone_or_changed():
    then = {"files": {"a": "1", "b": "1"}, "data": {"mnist": "1"}, "torch": "2.6.0"}
    now = {"files": {"b": "2", "c": "1"}, "data": {}, "torch": "2.7.0"}
    assert stale(then, now) == ["a is gone", "b changed", "c is new", "mnist is gone", "torch 2.6.0 -> 2.7.0"]
    assert stale({}, {"files": {"a": "1"}, "data": {}, "torch": "2.7.0"}) == ["a is new", "torch None -> 2.7.0"]
    assert stale(then, then) == []
