"""The command line: ``cograd list | show | run | demo | status | launch``."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from cograd import __version__

if TYPE_CHECKING:
    from cograd.papers._paper import Paper

EXIT_FAILED, EXIT_USAGE, EXIT_DOES_NOT_HOLD = 1, 2, 3
MIN_RECORDED_SEEDS = 3
PADDING = 2  # what a column of a table without lines takes beyond its text

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Published methods of gradient and weight sharing: their claims, made runnable, and their costs.",
)
out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Slug = Annotated[str, typer.Argument(help="The method's short name, as `cograd list` shows it.")]


class Scale(StrEnum):
    smoke = "smoke"
    full = "full"


def main() -> None:
    """Entry point: 0 done; 1 error; 2 usage; 3 a claim does not hold."""
    try:
        app()
    except KeyboardInterrupt:
        err.print("interrupted; what was finished is saved, and the same command continues")
        sys.exit(130)
    except Exception as error:  # an error's text is for users; its trace is for who asks for it
        _fail(error)


@app.callback(invoke_without_command=True)
def version(
    show: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if show:
        out.print(__version__)
        raise typer.Exit


@app.command("list")
def list_methods(as_json: Json = False) -> None:
    """Every method: its room, and what it shares."""
    from cograd.papers import every

    papers = every()
    if as_json:
        keys = ("slug", "title", "room", "entry", "arxiv", "venue", "summary")
        _print_json([{key: getattr(paper, key) for key in keys} for paper in papers])
        return
    table = Table("method", "room", "use", "what is shared", box=None)
    for paper in papers:
        table.add_row(f"[bold]{paper.slug}[/]", paper.room, paper.entry, paper.summary)
    out.print(table)


@app.command()
def show(slug: Slug) -> None:
    """A method's claims, its recorded figures, how to use it, and where its picture is."""
    paper = _find(slug)
    out.print(f"[bold]{paper.slug}[/]: {paper.summary}\n{paper.citation}\n")
    result = paper.recorded()
    if result is None:
        out.print("No result is recorded.\n")
    else:
        _print_result(result)
        out.print(f"picture: {paper.recorded_file('png')}\n", soft_wrap=True)
    out.print("[bold]how to use it[/]")
    out.print(escape(paper.usage), soft_wrap=True)


@app.command()
def run(
    slug: Slug,
    scale: Annotated[Scale, typer.Option(help="smoke: does it run (seconds); full: do its claims hold.")] = (
        Scale.full
    ),
    seeds: Annotated[int, typer.Option(min=0, help="Number of seeds; 0 is the paper's own number.")] = 0,
    to: Annotated[Path | None, typer.Option("--out", help="Folder for cells, result and picture.")] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write the result there; - is stdout.")
    ] = None,
    record: Annotated[
        bool, typer.Option("--record", help="Make it the result that the package ships.")
    ] = False,
) -> None:
    """Run a paper's claims. A rerun continues where the last one stopped."""
    paper = _find(slug)
    count = seeds or (paper.seeds if scale is Scale.full else 1)
    if record and (scale is not Scale.full or count < MIN_RECORDED_SEEDS):
        _usage(
            f"--record needs --scale full and at least {MIN_RECORDED_SEEDS} seeds; got {scale.value}, {count}"
        )
    result, holds = _run(paper, scale.value, count, to or Path("runs") / f"{slug}-{scale.value}", json_file)
    if record:
        folder = Path(str(paper.recorded_file("json"))).parent
        for suffix in ("json", "png"):
            shutil.copy(result.with_suffix(f".{suffix}"), folder / f"{slug}.{suffix}")
        err.print(f"recorded in {folder}", soft_wrap=True)
    if not holds:
        raise typer.Exit(EXIT_DOES_NOT_HOLD)


@app.command()
def demo(
    to: Annotated[Path, typer.Option("--out", help="Folder for result and picture.")] = Path("runs/demo"),
) -> None:
    """Four workers train one network over a counted link: dense, gradient dropping, DGC. One seed."""
    err.print(
        "[bold]cograd demo[/]: four worker processes, one MLP, real MNIST images, every byte counted.\n"
        "Dense SGD, naive gradient dropping and Deep Gradient Compression, 12 and 24 epochs, [bold]one seed[/] "
        "(a look, not evidence: `cograd run dgc` has the seeds)."
    )
    _run(_find("dgc"), "demo", 1, to, None)


compare = typer.Typer(
    no_args_is_help=True, help="Every applicable method of a room under equal conditions. A rerun continues."
)
app.add_typer(compare, name="compare")

Budget = Annotated[float, typer.Option(help="Minutes; fewer means shorter runs, never fewer methods or seeds.")]
Seeds = Annotated[int, typer.Option(help="Number of seeds.")]
Images = Annotated[str, typer.Option(help="A data set of images.")]
Folder = Annotated[Path | None, typer.Option("--out", help="Folder for cells, result and picture.")]


@compare.command("machines")
def compare_machines(
    data: Images = "mnist-5k",
    model: Annotated[str, typer.Option(help="mlp or softmax.")] = "mlp",
    workers: Annotated[int, typer.Option(help="Worker processes.")] = 4,
    link: Annotated[str, typer.Option(help="Each worker's link, such as 100mbit or 10mbit@20ms.")] = "100mbit",
    budget: Budget = 20.0,
    seeds: Seeds = 3,
    to: Folder = None,
) -> None:
    """Machines on one model: accuracy, bytes, seconds on a link, memory, work, on the same data and steps."""
    from cograd.papers import _arena

    result = _compared(
        _arena, lambda: _arena.Setting(data, model, workers, link, budget, seeds), "machines", to
    )
    rows = []
    for row in result["rows"]:
        sent = row["bytes"] / 1000
        sizes = (f"{sent:,.{0 if sent >= 1000 else 1}f}", f"{row['link_seconds']:,.2f}")
        rows.append((_spread(row, "accuracy"), *sizes, f"{row['memory'] / 1000:,.0f}", row["work"]))
    _print_compared(result, ("accuracy, %", "kB sent", "link, s", "kept, kB", "work"), rows)


@compare.command("clients")
def compare_clients(
    data: Images = "cifar10",
    model: Annotated[str, typer.Option(help="mlp or cnn.")] = "mlp",
    alpha: Annotated[float, typer.Option(help="Of the Dirichlet split; small is heterogeneous.")] = 0.1,
    clients: Annotated[int, typer.Option(help="Number of clients.")] = 100,
    participation: Annotated[float, typer.Option(help="Share of the clients in a round.")] = 0.1,
    budget: Budget = 20.0,
    seeds: Seeds = 3,
    to: Folder = None,
) -> None:
    """Federated clients: accuracy of the global model and on clients' own tests, rounds and bytes, at equal
    gradient evaluations."""
    from cograd.papers import _compare_clients as arena

    setting = lambda: arena.Setting(data, model, alpha, clients, participation, budget, seeds)  # noqa: E731
    result = _compared(arena, setting, "clients", to)
    columns = ("global, %", "own, %", "before", "worst", "rounds", "MB")
    rows = [
        (
            _number(row["accuracy"], 1),
            _spread(row, "personal"),
            _number(row["before"], 1),
            _number(row["worst"], 1),
            _number(row["target_rounds"], 0),
            _number(row["target_bytes"] and row["target_bytes"] / 1e6, 1),
        )
        for row in result["rows"]
    ]
    _print_compared(result, columns, rows)
    out.print(
        "own: clients' own tests, after aggregation; before: right after local training; worst: the worst "
        f"tenth of the clients; rounds and MB, both ways, until own is {result['target']:.1f} %",
        highlight=False,
        soft_wrap=True,
    )


def _compared(arena: Any, setting: Callable[[], Any], room: str, to: Path | None) -> dict[str, Any]:
    """Compare, and save what was found."""
    folder = to or Path("runs") / f"compare-{room}"
    try:
        result: dict[str, Any] = arena.compare(setting(), folder, err)
    except ValueError as error:
        _usage(str(error))
    arena.save(result, folder)
    err.print(f"result {folder / 'result.json'}, picture {folder / 'result.png'}", soft_wrap=True)
    return result


def _spread(row: dict[str, Any], name: str) -> str:
    return f"{row[name]:.1f}" + ("" if row["sd"] is None else f" \u00b1 {row['sd']:.1f}")


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _print_compared(result: dict[str, Any], columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    heads = [Column("system", no_wrap=True), *(Column(c, justify="right", no_wrap=True) for c in columns)]
    table = Table(*heads, box=None, pad_edge=False)
    for row, figures in zip(result["rows"], rows, strict=True):
        table.add_row(row["system"], *figures)
    out.print(table)
    if ends := [row["system"] for row in result["rows"] if row["edge"]]:
        text = f"best learning rate at an end of the grid: {'; '.join(ends)}"
        out.print(text, highlight=False, soft_wrap=True)
    for row in result["rows"]:
        if row["note"]:
            out.print(f"{row['system']}: {row['note']}", highlight=False, soft_wrap=True)
    for name, why in result["not_applicable"].items():
        out.print(f"{name} is not compared: it {why}", highlight=False, soft_wrap=True)


@app.command()
def status(as_json: Json = False) -> None:
    """For every method: is a result recorded, do its claims hold, does it speak for the code as it is."""
    from cograd.papers import every

    rows = [_status(paper) for paper in every()]
    if as_json:
        _print_json(rows)
        return
    table = Table("method", "room", "result", "claims that hold", "stale because of", box=None)
    for row in rows:
        held = f"{row['held']} of {row['claims']}" if row["recorded"] else "-"
        if row["unexplained"]:
            held += f" [red](unexplained: {', '.join(row['unexplained'])})[/]"
        causes = [*row["stale"][:3], *(["..."] if len(row["stale"]) > 3 else [])]
        recorded = "recorded" if row["recorded"] else "none"
        table.add_row(f"[bold]{row['slug']}[/]", row["room"], recorded, held, ", ".join(causes) or "-")
    out.print(table)


def _status(paper: Paper) -> dict[str, Any]:
    """A method's status; that its data are not here is a cause of staleness like another."""
    from cograd.data import DataUnavailable

    try:
        return paper.status()
    except DataUnavailable:
        nothing: dict[str, Any] = {"claims": 0, "holds": None, "held": 0, "unexplained": []}
        causes = {"recorded": paper.recorded() is not None, "stale": ["its data are not on this machine"]}
        return {"slug": paper.slug, "room": paper.room, **nothing, **causes}


@app.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
def launch(
    script: Annotated[str, typer.Argument(help="The script, as torchrun would start it.")],
    args: Annotated[list[str] | None, typer.Argument(help="Its arguments.")] = None,
    workers: Annotated[int, typer.Option("--workers", "-n", min=1, help="Number of processes.")] = 4,
    module: Annotated[bool, typer.Option("--module", "-m", help="SCRIPT is a module's name.")] = False,
) -> None:
    """Run a training script in worker processes on this machine; a dead worker is named within 30 s."""
    from cograd.engines.launch import launch as start

    start(script, args or [], workers, module=module)


def _run(paper: Any, scale: str, seeds: int, folder: Path, json_file: Path | None) -> tuple[Path, bool]:
    from cograd.papers._lab import Lab
    from cograd.papers._paper import assemble

    with Lab(scale, range(seeds), folder, paper.stamp(), err) as lab:
        findings = paper.run(lab)
    result = assemble(paper, lab, findings)
    content = result.to_json()
    file = folder / "result.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, indent=1) + "\n"
    file.write_text(text)
    picture = file.with_suffix(".png")
    paper.draw(content, picture)
    if json_file is not None and str(json_file) == "-":
        sys.stdout.write(text)
    else:
        if json_file is not None:
            json_file.write_text(text)
        _print_result(content)
    err.print(f"result {file}, picture {picture}, {result.seconds:.0f} s of computing", soft_wrap=True)
    return file, result.holds


def _print_result(result: dict[str, Any]) -> None:
    """Table and claims of a result's JSON."""
    seeds = len(result["seeds"])
    title = f"{result['paper']}, {result['scale']}, {seeds} seed{'s' * (seeds > 1)}"
    for table in _system_tables(result["table"]):
        table.title, title = title, ""
        out.print(table)
    claims = Table("verdict", "claim", "measured", "asserted", "paper", box=None, title="claims")
    for claim in result["claims"]:
        verdict = {True: "[green]holds[/]", False: "[red]does not hold[/]", None: "reported"}[claim["holds"]]
        unit = f" {claim['unit']}" if claim["unit"] else ""
        text = escape(claim["text"])
        if claim["holds"] is False:
            text += f"\n[dim]{escape(claim['reason'] or 'no reason given yet')}[/]"
        claims.add_row(
            verdict,
            text,
            f"{_figure(claim, 'measured')}{unit}" if claim["measured"] is not None else "-",
            f"{claim['op']} {claim['threshold']:g}" if claim["op"] else "-",
            f"{claim['paper_value']:g}" if claim["paper_value"] is not None else "-",
        )
    out.print(claims)


def _system_tables(rows: list[dict[str, Any]]) -> Iterator[Table]:
    """A row a system and a column a metric; as many tables as it takes to fit the terminal's width."""
    systems = list(dict.fromkeys(row["system"] for row in rows))
    cells = {(row["system"], row["metric"]): row for row in rows}
    groups: list[list[tuple[str, list[str], int]]] = []
    room = 0
    for metric, unit in dict.fromkeys((row["metric"], row["unit"]) for row in rows):
        head = f"{metric}, {unit}" if unit else metric
        figures = [_figure(cells.get((system, metric))) for system in systems]
        width = max(map(len, [*head.split(), *figures]))
        if width + PADDING > room:
            groups.append([])
            room = out.width - max(map(len, systems)) - PADDING
        groups[-1].append((head, figures, width))
        room -= width + PADDING
    for group in groups:
        table = Table(Column("", no_wrap=True), box=None)
        for head, _, width in group:
            table.add_column(head, justify="right", width=width)
        for i, system in enumerate(systems):
            table.add_row(system, *(figures[i] for _, figures, _ in group))
        yield table


def _figure(row: dict[str, Any] | None, key: str = "mean") -> str:
    if row is None or row[key] is None:
        return "-"
    deviation = f"±{row['sd']:.2g}" if row["sd"] else ""
    return f"{row[key]:.4g}{deviation}"


def _find(slug: str) -> Any:
    from cograd.papers import UnknownMethod, find

    try:
        return find(slug)
    except UnknownMethod as error:
        _usage(str(error))


def _usage(message: str) -> NoReturn:
    err.print(f"[red]usage:[/] {escape(message)}", soft_wrap=True)
    raise typer.Exit(EXIT_USAGE)


def _fail(error: Exception) -> NoReturn:
    err.print(f"[red]error:[/] {escape(str(error) or type(error).__name__)}", soft_wrap=True)
    sys.exit(EXIT_FAILED)


def _print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=1) + "\n")


if __name__ == "__main__":
    main()
