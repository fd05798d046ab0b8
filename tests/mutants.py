"""Do the tests of core notice when core is wrong? Twenty mistakes, each of which must fail a test.

    python tests/mutants.py [number ...]

from the repository's root. It works on a copy of `src` and `tests` in a temporary folder. First the tests must
pass as they are; then each mistake is put in and the tests of its module run until one fails. Exit status 1 if
a mistake survives.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Mutant:
    """One mistake: in ``module`` of core, ``old`` becomes ``new``; ``why`` says what that would break."""

    module: str
    old: str
    new: str
    why: str


MUTANTS = (
    Mutant(
        "streams",
        'return tag + struct.pack("<Q", len(raw)) + raw',
        "return tag + raw",
        "parts without their length: keys that read alike share their numbers",
    ),
    Mutant(
        "streams",
        "np.sort(self.numpy.choice(n, size=k, replace=False, shuffle=False))",
        "self.numpy.choice(n, size=k, replace=False, shuffle=False)",
        "drawn positions are no longer ascending",
    ),
    Mutant(
        "message",
        "hashlib.blake2b(head, digest_size=_SUM)",
        "hashlib.blake2b(digest_size=_SUM)",
        "the checksum leaves out the header: another sender or round goes unnoticed",
    ),
    Mutant(
        "message",
        "if len(view) != cls.OVERHEAD + length:",
        "if len(view) < cls.OVERHEAD + length:",
        "bytes after the frame are not noticed as such",
    ),
    Mutant(
        "message",
        "if schema.to_bytes() != bytes(data):",
        "if False:",
        "one schema has many byte forms, so that equal schemas differ in digest",
    ),
    Mutant(
        "codecs",
        "escapes = gaps >> 16",
        "escapes = gaps // 65535",
        "a gap of 65535 zeros or a multiple gets an escape too many",
    ),
    Mutant(
        "codecs",
        "levels = levels.round().clamp(-top, top) + 0.0",
        "levels = levels.round().clamp(-top, top)",
        "the sender keeps -0 where the receiver decodes 0",
    ),
    Mutant(
        "codecs",
        "ctx.round, -1 if self.common else ctx.party)",
        "ctx.round, ctx.party)",
        "parties that add coded payloads add different positions",
    ),
    Mutant(
        "codecs",
        " or not _ascending(indices)",
        "",
        "a damaged payload may name one position twice",
    ),
    Mutant(
        "codecs",
        "torch.full((k,), n / max(k, 1))",
        "torch.full((k,), 1 / self.density)",
        "biased where density n is no whole number",
    ),
    Mutant(
        "selection",
        "keep[tied[len(tied) - surplus :]] = False",
        "keep[tied[:surplus]] = False",
        "ties go to the higher position",
    ),
    Mutant(
        "selection",
        "torch.maximum(self.body.amax(0), self.body.amin(0).neg_())",
        "self.body.amax(0)",
        "large negative entries are overlooked",
    ),
    Mutant(
        "selection",
        "return found if len(found) <= k else found[largest(x[found].abs(), k)]",
        "return found",
        "a sampled threshold keeps more than k",
    ),
    Mutant(
        "transforms",
        "place = slice(at + start, at + start + len(tile))",
        "place = slice(at, at + len(tile))",
        "every tile uses the state of the first",
    ),
    Mutant(
        "transforms",
        "u.add_(x)\n        update = x.add(u, alpha=self.m)",
        "update = x.add(u, alpha=self.m)\n        u.add_(x)",
        "Nesterov looks ahead with the velocity of a step ago",
    ),
    Mutant(
        "ledger",
        'self._charge(sender, "payload", self._sent[sender] + payload)\n        self._sent[sender] += payload',
        'self._sent[sender] += payload\n        self._charge(sender, "payload", self._sent[sender])',
        "a refused message uses up the budget",
    ),
    Mutant(
        "ledger",
        "inn[p] += e.frame * e.copies / len(receivers)",
        "inn[p] += e.frame * e.copies",
        "an all-gather takes n - 1 times as long as it does",
    ),
    Mutant(
        "space",
        "[[s.name, s.shape] for s in self.segments]",
        "[[s.name, s.numel] for s in self.segments]",
        "parties with transposed matrices think that they share a space",
    ),
    Mutant(
        "claim",
        "return math.isfinite(self.measured) and _OPS[self.op](self.measured, self.threshold)",
        "return _OPS[self.op](self.measured, self.threshold)",
        "a run that diverged to -inf proves that the loss is small",
    ),
    Mutant(
        "stamp",
        "name if _source(name) else base",
        "base",
        "a module imported from its package does not count",
    ),
)


def passes(root: Path, *tests: str) -> bool:
    """Whether these test files pass there; raises RuntimeError if pytest could not run them."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1):
        raise RuntimeError(f"pytest ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.returncode == 0


def survives(root: Path, mutant: Mutant) -> bool:
    """Put the mistake in, run its module's tests, take it out again."""
    source = root / "src" / "cograd" / "core" / f"{mutant.module}.py"
    original = source.read_text(encoding="utf-8")
    if original.count(mutant.old) != 1:
        raise RuntimeError(
            f"{mutant.module}.py must hold once: {mutant.old!r}; it does {original.count(mutant.old)}"
        )
    source.write_text(original.replace(mutant.old, mutant.new), encoding="utf-8")
    try:
        return passes(root, f"tests/core/test_{mutant.module}.py")
    finally:
        source.write_text(original, encoding="utf-8")


def main(numbers: list[int]) -> int:
    repository = Path(__file__).parents[1]
    table = Table("number", "module", "verdict", "seconds", "what would be wrong", title="Mutants of core")
    survivors = 0
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for name in ("src", "tests"):
            shutil.copytree(repository / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(repository / "pyproject.toml", root)
        if not passes(root, "tests/core"):
            print("the tests of core fail as they are: nothing to learn from mutants")
            return 1
        for number, mutant in enumerate(MUTANTS, 1):
            if numbers and number not in numbers:
                continue
            start = time.perf_counter()
            survived = survives(root, mutant)
            survivors += survived
            verdict = "[red]survived" if survived else "killed"
            table.add_row(str(number), mutant.module, verdict, f"{time.perf_counter() - start:.1f}", mutant.why)
    Console().print(table)
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main([int(n) for n in sys.argv[1:]]))
