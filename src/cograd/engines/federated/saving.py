"""Saving a simulation, and going on from what was saved."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from cograd.engines.federated.protocol import Event, Lost, Reply, Send, Timer
from cograd.engines.federated.row import Row
from cograd.engines.federated.store import read, write
from cograd.engines.federated.workers import BUFFERS

INITIAL = "engine.initial"
"""Name of the vector that all were given at the start."""

if TYPE_CHECKING:
    from cograd.engines.federated.simulation import Simulation


def save(sim: Simulation, folder: Path) -> None:
    """Write server, clients, messages on their way and history.

    What was saved there before is replaced when everything is written. Raises RuntimeError in the middle of a
    round, whose replies so far are not saved.
    """
    if not sim.between_rounds:
        raise RuntimeError("a simulation is saved between rounds; this one is in the middle of one")
    part, old = folder.with_name(f"{folder.name}.part"), folder.with_name(f"{folder.name}.old")
    shutil.rmtree(part, ignore_errors=True)
    (part / "clients").mkdir(parents=True)
    write(sim.server, part / "server.safetensors")
    for client in sim.states:
        write(sim.states[client], part / "clients" / f"{client}.safetensors")
    contents = {INITIAL: sim.session.initial}
    if sim.buffers is not None:
        contents[BUFFERS] = sim.buffers
    saved = {
        "identity": identity(sim),
        "queue": _queue(sim, contents),
        "sends": _sends(sim, contents),
        "history": [row.to_json() for row in sim.history],
        "tally": vars(sim.tally),
    }
    write(contents, part / "contents.safetensors")
    (part / "simulation.json").write_text(json.dumps(saved))
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(part, folder)
    shutil.rmtree(old, ignore_errors=True)


def _queue(sim: Simulation, contents: dict[str, Tensor]) -> list[Any]:
    """The events to come, in order; their tensors are put into ``contents``."""
    events = []
    for number, (when, order, event) in enumerate(sorted(sim.queue, key=lambda entry: entry[:2])):
        content = event.content if isinstance(event, Reply) else {}
        events.append([when, order, type(event).__name__, _scalars(event), list(content)])
        contents |= {f"{number}.{name}": tensor for name, tensor in content.items()}
    return events


def _sends(sim: Simulation, contents: dict[str, Tensor]) -> list[Any]:
    """The messages to be sent; a content that several share is put into ``contents`` once."""
    unique = {id(send.content): send.content for send in sim.sends}
    for number, content in enumerate(unique.values()):
        contents |= {f"send.{number}.{name}": tensor for name, tensor in content.items()}
    numbers = {key: number for number, key in enumerate(unique)}
    return [[send.to, send.task, numbers[id(send.content)], list(send.content)] for send in sim.sends]


def load(sim: Simulation, folder: Path) -> None:
    """Continue from what `save` wrote: the rounds that follow are bit for bit those of a run never stopped.

    The ledger is not saved: it counts what comes after. Raises ValueError where it was written by a simulation
    of another method, model, seed, sampler, set of clients or settings, and names what differs.
    """
    saved = json.loads((folder / "simulation.json").read_text())
    for name, mine in identity(sim).items():
        its = saved["identity"].get(name)
        if its != mine:
            raise ValueError(f"{folder} is of another simulation: its {name} is {its!r}, here {mine!r}")
    sim.server = read(folder / "server.safetensors")
    sim.states.clear()
    for file in sorted((folder / "clients").iterdir(), key=lambda f: int(f.stem)):
        sim.states[int(file.stem)] = read(file)
    contents = read(folder / "contents.safetensors")
    sim.session.initial.copy_(contents[INITIAL])
    sim.runner.initial.copy_(contents[INITIAL])
    sim.buffers = contents.get(BUFFERS, sim.buffers)
    sim.queue = [
        (when, order, _event(kind, scalars, {name: contents[f"{number}.{name}"] for name in names}))
        for number, (when, order, kind, scalars, names) in enumerate(saved["queue"])
    ]
    sent = {
        number: {n: contents[f"send.{number}.{n}"] for n in names} for _, _, number, names in saved["sends"]
    }
    sim.sends = [Send(to, task, sent[number]) for to, task, number, _ in saved["sends"]]
    for name, value in saved["tally"].items():
        setattr(sim.tally, name, value)
    sim.history = [Row.from_json(row) for row in saved["history"]]
    sim.between_rounds = True
    sim.tell_time()
    sim.method.resumed(sim.server, sim.session, [event for _, _, event in sim.queue], sim.sends)


def identity(sim: Simulation) -> dict[str, Any]:
    """What a saved run must share with one that goes on from it."""
    sizes = hashlib.blake2b(repr(list(sim.session.sizes)).encode(), digest_size=8).hexdigest()
    return {
        "method": repr(sim.method),
        "model": sim.local.space.digest,
        "sizes of the clients": sizes,
        "seed": sim.session.seed,
        "sampler": re.sub(r" at 0x[0-9a-f]+", "", repr(sim.sampler)),  # where a function lies changes
        "codecs": f"{sim.runner.up.codec!r}, {sim.runner.down.codec!r}",
        "buffers": sim.runner.buffers,
        "timeout": sim.session.timeout,
    }


def _scalars(event: Event) -> dict[str, Any]:
    return {name: value for name, value in vars(event).items() if name != "content"}


def _event(kind: str, scalars: Mapping[str, Any], content: dict[str, Tensor]) -> Event:
    """An event as it was saved; JSON made a list of a timer's key that was a tuple."""
    if kind == "Reply":
        return Reply(**scalars, content=content)
    if kind == "Lost":
        return Lost(**scalars)
    key = scalars["key"]
    return Timer(tuple(key) if isinstance(key, list) else key)
