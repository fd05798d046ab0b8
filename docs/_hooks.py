"""What the site takes from the code at build time: a page for every method, and tables on other pages.

MkDocs calls `on_files` and `on_page_markdown` (``hooks:`` in mkdocs.yml). A page of the documentation that
holds a line ``<!-- generated: NAME -->`` gets what ``GENERATED[NAME]()`` returns in its place.
"""

from __future__ import annotations

import inspect
import json
import re
import tomllib
from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from pathlib import Path
from statistics import fmean
from typing import Any

import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from cograd import cli, data, papers
from cograd.papers import Paper

ROOT = Path(__file__).parent.parent
MEASURED = ROOT / "docs" / "measured"
MARK = re.compile(r"^<!-- generated: ([\w-]+) -->$", re.MULTILINE)
VERDICTS = {True: "holds", False: "**does not hold**", None: "reported"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the methods' pages and pictures, and put them in the navigation by room."""
    files.append(File.generated(config, "methods/index.md", content=methods_page()))
    rooms: dict[str, list[str]] = {}
    for paper in papers.every():
        page = f"methods/{paper.slug}.md"
        files.append(File.generated(config, page, content=method_page(paper, paper.recorded())))
        rooms.setdefault(paper.room, []).append(page)
        picture = Path(str(paper.recorded_file("png")))
        if picture.is_file():
            files.append(File.generated(config, f"methods/{paper.slug}.png", abs_src_path=str(picture)))
    section = next(entry["Methods"] for entry in config.nav or [] if "Methods" in entry)
    section[:] = ["methods/index.md", *({room.capitalize(): pages} for room, pages in rooms.items())]
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Replace the marks of a page."""

    def fill(mark: re.Match[str]) -> str:
        if mark[1] not in GENERATED:
            raise PluginError(f"{page.file.src_uri}: nothing generates {mark[1]!r}; see GENERATED in _hooks.py")
        return GENERATED[mark[1]]()

    return MARK.sub(fill, markdown)


# The pages of the methods.


def methods_page() -> str:
    return (
        "# Methods\n\nEvery published method that is in the library today, by room. A claim is one checkable "
        "sentence of the paper; its verdict is computed from a recorded run, and a claim that does not hold "
        f"stays in the table with the reason.\n\n{methods_table('')}\n"
    )


def methods_table(folder: str = "methods/") -> str:
    """All methods, with links to their pages from where ``folder`` leads to them."""
    rows = []
    for paper in papers.every():
        name = paper.entry.rpartition(".")[2]
        rows.append(
            (
                f"[{name}]({folder}{paper.slug}.md)",
                paper.room,
                _cell(paper.summary),
                f"arXiv:{paper.arxiv}, {paper.venue}",
                _held(paper.recorded()),
            )
        )
    return _table(("method", "room", "what is shared", "paper", "recorded claims"), rows)


def _held(result: dict[str, Any] | None) -> str:
    if result is None:
        return "no result recorded"
    asserted = [claim["holds"] for claim in result["claims"] if claim["holds"] is not None]
    return f"{sum(asserted)} of {len(asserted)} hold"


def method_page(paper: Paper, result: dict[str, Any] | None) -> str:
    """A method's page from its module's docstring, its paper's entry and its recorded result."""
    entry = _entry(paper)
    module = _module(entry)
    sections = [
        f"# {entry.__name__}",
        f"{paper.summary[:1].upper()}{paper.summary[1:]}.",
        f"{paper.authors}: *{paper.title}*. {paper.venue}. "
        f"[arXiv:{paper.arxiv}](https://arxiv.org/abs/{paper.arxiv})",
        "## The method",
        inspect.getdoc(module) or "",
        "## Use",
        f"```python\n{paper.usage.rstrip()}\n```",
        STARTS[paper.room],
        "## Recorded result",
        no_result(paper) if result is None else recorded(paper, result),
        "## Run it again",
        rerun(paper),
        "## Reference",
        *(_directive(thing) for thing in (entry, *_others(module, entry))),
    ]
    return "\n\n".join(sections) + "\n"


STARTS = {
    "machines": "Start it with `cograd launch -n 4 train.py`, or with `torchrun` on several machines: see the "
    "[start page](../index.md#start-on-one-machine).",
    "clients": "It runs in one process. On real nodes the same method runs in a "
    "[Flower federation](../reference/clients.md#flower).",
}
"""How a room's scripts are started."""


def _entry(paper: Paper) -> type:
    room, _, name = paper.entry.rpartition(".")
    entry: type = getattr(import_module(room), name)
    return entry


def _module(entry: type) -> Any:
    """The method's file, or its package where it is large: what lies right below the room."""
    return import_module(".".join(entry.__module__.split(".")[:3]))


def _others(module: Any, entry: type) -> list[Any]:
    """The public classes and functions that a method's module defines besides its entry, or that its package
    takes from its own files, in source order."""
    defined = [
        thing
        for name, thing in vars(module).items()
        if not name.startswith("_")
        and (inspect.isclass(thing) or inspect.isfunction(thing))
        and f"{thing.__module__}.".startswith(f"{module.__name__}.")
        and thing is not entry
    ]
    return sorted(defined, key=lambda thing: (thing.__module__, inspect.getsourcelines(thing)[1]))


def _directive(thing: Any) -> str:
    return f"::: {thing.__module__}.{thing.__qualname__}"


def no_result(paper: Paper) -> str:
    return (
        f"No result is recorded for this method. `cograd run {paper.slug} --record` makes one; "
        f"`cograd run {paper.slug} --scale smoke` shows in seconds whether it runs."
    )


def recorded(paper: Paper, result: dict[str, Any]) -> str:
    """Picture, claims and figures of a result's JSON."""
    parts = []
    if Path(str(paper.recorded_file("png"))).is_file():
        parts.append(f"[![Curves of {paper.slug}]({paper.slug}.png)]({paper.slug}.png)")
    parts += ["### Claims", claims_table(result["claims"]), "### Figures", figures_table(result)]
    env = result["environment"]
    parts.append(
        f"Scale {result['scale']}; seeds {', '.join(map(str, result['seeds']))}; {result['seconds']:g} s. "
        f"Python {env['python']}, torch {env['torch']}, {env['platform']}, {env['threads']} threads, "
        f"{'GPU ' + env['cuda'] if env['cuda'] else 'no GPU'}. `cograd status` says whether the code or the "
        "data has changed since."
    )
    return "\n\n".join(parts)


def claims_table(claims: Sequence[dict[str, Any]]) -> str:
    rows = []
    for claim in claims:
        unit = f" {claim['unit']}" if claim["unit"] else ""
        text = f"{_cell(claim['text'])}<br>*{_cell(claim['source'])}*"
        if claim["reason"]:
            text += f"<br>{_cell(claim['reason'])}"
        elif claim["holds"] is False:
            text += "<br>no reason is given yet"
        measured, asserted = "-", "-"
        if claim["measured"] is not None:
            measured = _cell(f"{_figure(claim, 'measured')}{unit} (n = {claim['n']})")
        if claim["op"]:
            asserted = _cell(f"{claim['op']} {claim['threshold']:g}") + (
                f"<br>*{_cell(claim['threshold_source'])}*"
            )
        paper_value = f"{claim['paper_value']:g}" if claim["paper_value"] is not None else "-"
        rows.append((VERDICTS[claim["holds"]], text, measured, asserted, paper_value))
    return _table(("verdict", "claim, source", "measured", "asserted", "paper"), rows, right=())


def figures_table(result: dict[str, Any]) -> str:
    """One row a system, one column a metric: mean ± sd over the seeds."""
    table, seeds = result["table"], len(result["seeds"])
    units = {row["metric"]: row["unit"] for row in table}
    cells = {(row["system"], row["metric"]): row for row in table}

    def figure(system: str, metric: str) -> str:
        row = cells.get((system, metric))
        if row is None or row["mean"] is None:
            return "-"
        return _figure(row, "mean") + (f" (n = {row['n']})" if row["n"] != seeds else "")

    heads = ["system", *(_cell(f"{m}, {unit}" if unit else m) for m, unit in units.items())]
    rows = [
        (_cell(system), *(figure(system, metric) for metric in units))
        for system in dict.fromkeys(row["system"] for row in table)
    ]
    spread = "mean ± standard deviation" if any(row["sd"] is not None for row in table) else "one value each"
    note = f"{spread.capitalize()}, n = {seeds} seed{'s' * (seeds > 1)} where no other number is given."
    return f"{note}\n\n{_table(heads, rows, right=range(1, len(heads)))}"


def rerun(paper: Paper) -> str:
    return (
        f"```sh\ncograd run {paper.slug}                 # full, {paper.seeds} seeds\n"
        f"cograd run {paper.slug} --scale smoke   # does it run: seconds\n```\n\n"
        f"Results and picture go to `runs/{paper.slug}-full/`. Every finished training is saved there, so the "
        "same command continues an interrupted run. Exit code 0: every asserted claim holds; 3: one does not; "
        "1: an error; 2: usage. See [the command line](../cli.md). "
        f"Data: {', '.join(f'`{name}`' for name in paper.datasets) or 'none'} ([data sets](../data.md))."
    )


# What other pages leave to the code.


def house() -> str:
    """The floors of pyproject.toml's import contract, top first, each room in its own words."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    layers = project["tool"]["importlinter"]["contracts"][0]["layers"]
    rooms = [name.strip() for layer in layers for name in layer.split("|")]
    floors = [" and ".join(f"`{name.strip()}`" for name in layer.split("|")) for layer in layers]
    lines = []
    for name in reversed(rooms):
        doc = inspect.getdoc(import_module(f"cograd.{name}")) or ""
        lines.append(f"- `cograd.{name}`: {doc.splitlines()[0] if doc else ''}")
    return "\n".join(lines) + f"\n\nFloors, top first: {', then '.join(floors)}."


def data_table() -> str:
    rows = [
        (f"`{info.name}`", _cell(info.description), ", ".join(info.splits), _cell(info.licence))
        for info in data.names()
    ]
    return _table(("name", "what it is", "splits", "terms"), rows)


def first_lines() -> str:
    return f"```python\n{papers.find('dgc').usage.rstrip()}\n```"


def commands() -> str:
    """Every command with its arguments and options, as the program declares them."""
    group: Any = typer.main.get_command(cli.app)
    parts = []
    named = [
        (f"{name} {sub}".strip(), command)
        for name, one in group.commands.items()
        for sub, command in getattr(one, "commands", {"": one}).items()
    ]
    for name, command in named:
        arguments = [p for p in command.params if p.param_type_name == "argument"]
        words = " ".join(_word(p) for p in arguments)
        parts.append(f"### cograd {name}\n\n`cograd {name} [options]{' ' + words if words else ''}`\n")
        parts.append(f"{command.help}\n")
        rows = [
            (f"`{_word(p)}`" if p in arguments else _flags(p), _cell(p.help or ""), _default(p))
            for p in command.params
            if p.name != "help"
        ]
        if rows:
            parts.append(_table(("argument or option", "meaning", "default"), rows) + "\n")
    return "\n".join(parts)


def _word(parameter: Any) -> str:
    name = parameter.name.upper() + ("..." if parameter.nargs == -1 else "")
    return name if parameter.required else f"[{name}]"


def _flags(parameter: Any) -> str:
    return ", ".join(f"`{flag}`" for flag in sorted(parameter.opts, key=len, reverse=True))


def _default(parameter: Any) -> str:
    shown = parameter.default is not None and parameter.default is not False
    if not shown or parameter.required or callable(parameter.default):
        return ""
    return f"`{getattr(parameter.default, 'value', parameter.default)}`"


# What was measured for the whole room.


def slow_link(workload: str, unit: str, digits: int) -> str:
    """The table of `bench/slow_link`: minutes to target, and what of dense's that is."""
    found = json.loads((MEASURED / f"slow-link-{workload}.json").read_text())
    dense = {row["mbit"]: row["target_seconds"] for row in found["rows"] if row["system"] == "dense"}
    rows = []
    for row in found["rows"]:
        took = row["target_seconds"]
        to_target = ("never", "-", "-")
        if took is not None:
            latency = f"{row['latency_seconds'] / 60:.2f}"
            to_target = (f"{took / 60:.2f}", f"{took / dense[row['mbit']]:.3f}", latency)
        quality = f"{fmean(row['quality']):.{digits}f} (n = {len(row['quality'])})"
        costs = (f"{row['step_seconds']:.3f}", f"{row['run_seconds'] / 60:.1f}")
        rows.append((row["system"], f"{row['mbit']:g}", quality, *costs, *to_target))
    heads = ("system", "Mbit/s", f"in the end, {unit}", "s a step", "min a run", "min to target", "of dense's")
    latency = f"+ {found['latency_ms']:g} ms latency (modelled), min"
    whole = [
        f"{system} {run['measured'] / 60:.2f} min in one go, {run['summed'] / 60:.2f} by the sum"
        for system, run in found.get("complete", {}).items()
    ]
    checked = f"\n\nWhole runs on the shaped link, as a check: {'; '.join(whole)}." if whole else ""
    target = f"Target: {found['target']:.{digits}f} {unit}, {found['steps']} steps in all."
    return f"{target}\n\n{_table((*heads, latency), rows, range(1, 8))}{checked}"


def arena_machines() -> str:
    """The table of `cograd compare machines`."""
    found = json.loads((MEASURED / "arena-machines.json").read_text())
    setting = found["setting"]
    rows = [
        (
            row["system"],
            f"{row['accuracy']:.2f}" + (f" \u00b1 {row['sd']:.2f}" if row["sd"] is not None else ""),
            f"{row['bytes'] / 1000:,.1f}",
            f"{row['link_seconds']:.2f}",
            f"{row['memory'] / 1000:,.0f}",
            row["work"],
            f"{row['lr']:g}" + ("*" if row["edge"] else ""),
            row["note"],
        )
        for row in found["rows"]
    ]
    heads = (
        "system",
        "accuracy, %",
        "kB sent",
        f"s at {setting['link']}",
        "kept, kB",
        "work of a worker",
        "lr",
        "",
    )
    left_out = "; ".join(f"{name} is not in it: it {why}" for name, why in found["not_applicable"].items())
    about = (
        f"{setting['epochs']} epochs, {setting['seeds']} seeds; * at an end of the grid of rates. {left_out}."
    )
    return f"{_table(heads, rows, range(1, 7))}\n\n{about}"


GENERATED: dict[str, Callable[[], str]] = {
    "arena-machines": arena_machines,
    "slow-link-mlp": lambda: slow_link("mlp", "% accuracy", 2),
    "slow-link-lm": lambda: slow_link("lm", "nats a character", 3),
    "methods": methods_table,
    "house": house,
    "data-sets": data_table,
    "first-lines": first_lines,
    "commands": commands,
}


# Markdown.


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]], right: Iterable[int] = ()) -> str:
    right = set(right)
    rule = ["--:" if i in right else "---" for i in range(len(heads))]
    return "\n".join(f"| {' | '.join(row)} |" for row in (heads, rule, *rows))


def _cell(text: str) -> str:
    """Text as it stands in a table's cell: nothing in it is markup, a column's end or a line's."""
    text = re.sub(r"([\\`*_\[\]|])", r"\\\1", " ".join(text.split()))
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _figure(row: dict[str, Any], key: str) -> str:
    return f"{row[key]:.4g}" + (f" ± {row['sd']:.2g}" if row["sd"] is not None else "")
