"""Time to target over slow links, system by system.

    python -m bench.slow_link [--workload mlp] [--rates 10 100 1000] [--seeds 0 1 2] [--systems dense dgc ...]

Four hosts in network namespaces train the same model with `torchrun`: ``mlp`` is an MLP of 5 million
parameters on MNIST-5k for 24 epochs, ``lm`` a GPT of 5.5 million on tiny-shakespeare for 800 steps. Quality is
measured once, on links that are not shaped; seconds a step are those of shaped steps, for each stage of a
warm-up by itself: the median of 20, or for systems that exchange now and then the mean over two whole periods.
Time to target is their sum. That 20 shaped steps give the same bits as 20 unshaped ones is checked.

``--complete`` also makes one whole shaped run a system at the first rate, to be held against that sum.
Not every kernel can delay packets (netem): what a latency (``--latency 20``, ms a message) would add to the
time to target is modelled, and shown apart. Every cell is saved under ``runs/slow-link`` and a rerun
continues. Needs root.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

from bench.slow_link.net import Network, NotPermitted, address, namespace, within
from bench.slow_link.picture import draw
from bench.slow_link.train import EPOCH, PAPER_WARMUP, PERIODIC, POWER_START, SYNC, SYSTEMS, WORKLOADS
from rich.console import Console
from rich.table import Table

HOSTS = 4
RECORDED = Path(__file__).parents[2] / "docs" / "measured"
SKIPPED, TIMED = 5, 20  # steps before, and in, a measurement
PERIODS = 2
PATIENCE = 3600
STEPS = {"mlp": 24 * EPOCH, "lm": 800}
BETTER_IS_HIGHER = {"mlp": True, "lm": False}
ROUNDS = {
    **dict.fromkeys(("dense", "fp16", "sketch"), 6),
    **dict.fromkeys(("powersgd-1", "powersgd-2", "powersgd-4"), 12),
    **dict.fromkeys(("dgc", "one-byte"), 2),
    "diloco": 6 / SYNC,
    "streaming": 0,
}
"""Messages one after another in a step: 2 (N - 1) = 6 of a ring all-reduce, of which PowerSGD needs two and
DiLoCo one a period; two collectives of an all-gather. Streaming DiLoCo's exchange runs beside the steps that
follow it."""

Record = dict[str, Any]


class Lab:
    """Cells on disk, and the runs that make them."""

    def __init__(self, workload: str, steps: int, out: Path, console: Console) -> None:
        self.workload, self.steps, self.out, self.console = workload, steps, out, console
        out.mkdir(parents=True, exist_ok=True)

    def cell(
        self, system: str, seed: int, rate: float | None, steps: int, stage: int = -1, evaluate: bool = False
    ) -> Record:
        """The record of a run; computed if it is not there yet."""
        speed = "unshaped" if rate is None else f"{rate:g}mbit"
        name = f"{self.workload}-{system}-seed{seed}-{speed}-{steps}of{self.steps}-stage{stage}"
        path = self.out / f"{name}{'-eval' * evaluate}.json"
        if not path.exists():
            self.console.print(f"{path.stem} ...", highlight=False)
            part = path.with_suffix(".part")
            arguments = ["--workload", self.workload, "--system", system, "--seed", seed, "--steps", steps]
            arguments += ["--planned", self.steps, "--stage", stage, "--out", part]
            arguments = [*map(str, arguments), *(["--evaluate"] if evaluate else [])]
            if rate is None:
                torchrun(arguments, shaped=False)
            else:
                with Network(HOSTS, rate):
                    torchrun(arguments, shaped=True)
            os.replace(part, path)
        return dict(json.loads(path.read_text()))

    def whole(self, system: str, seed: int) -> Record:
        """A whole run on links that are not shaped."""
        return self.cell(system, seed, None, self.steps, evaluate=True)

    def step_seconds(self, system: str, rate: float, stage: int) -> float:
        if system in PERIODIC:
            record = self.cell(system, 0, rate, 2 * PERIODS * SYNC, stage)
            return mean(record["seconds"][-PERIODS * SYNC :])
        return median(self.cell(system, 0, rate, SKIPPED + TIMED, stage)["seconds"][SKIPPED:])

    def dense_start(self, system: str, rate: float) -> float:
        """Seconds that PowerSGD's first steps, which are dense, take beyond those of its others."""
        if not system.startswith("powersgd"):
            return 0.0
        seconds = self.cell(system, 0, rate, SKIPPED + TIMED)["seconds"]
        return float(sum(seconds[:POWER_START]) - POWER_START * median(seconds[SKIPPED:]))

    def costs(self, system: str, rate: float) -> dict[int, float]:
        """Seconds a step of each stage of a system's warm-up."""
        return {stage: self.step_seconds(system, rate, stage) for stage in stages_of(system, self.steps)}


def torchrun(arguments: Sequence[str], shaped: bool) -> None:
    """``torchrun --nnodes=4``, one agent and one worker a host; all on this one if nothing is shaped.

    Raises RuntimeError if an agent fails.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    agents = []
    for host in range(HOSTS):
        command = [
            *(within(namespace(host)) if shaped else ()),
            *(sys.executable, "-m", "torch.distributed.run", f"--nnodes={HOSTS}", "--nproc-per-node=1"),
            *(f"--node-rank={host}", f"--master-addr={address(0) if shaped else '127.0.0.1'}"),
            *(f"--master-port={port}", "-m", "bench.slow_link.train", *arguments),
        ]
        device = "eth0" if shaped else "lo"
        environment = {**os.environ, "GLOO_SOCKET_IFNAME": device, "OMP_NUM_THREADS": "1"}
        agents.append(
            subprocess.Popen(
                command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        )
    try:
        outputs = [agent.communicate(timeout=PATIENCE)[0] for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    failed = [host for host, agent in enumerate(agents) if agent.returncode]
    if failed:
        raise RuntimeError(f"host {failed[0]} failed:\n{outputs[failed[0]][-2000:]}")


def stages_of(system: str, steps: int) -> dict[int, int]:
    """Steps that a run of ``steps`` spends in each stage of its warm-up; stage -1 where it has none."""
    if system != "dgc":
        return {-1: steps}
    spent = {stage: max(0, min(EPOCH, steps - stage * EPOCH)) for stage in range(len(PAPER_WARMUP))}
    return {**spent, len(PAPER_WARMUP): max(0, steps - len(PAPER_WARMUP) * EPOCH)}


def seconds_of(system: str, steps: int, costs: dict[int, float]) -> float:
    return sum(n * costs[stage] for stage, n in stages_of(system, steps).items())


def steps_to(quality: Sequence[float], target: float, higher: bool) -> int | None:
    """Steps until the quality after an epoch reaches the target; None if it never does."""
    reached = (value >= target if higher else value <= target for value in quality)
    return next(((epoch + 1) * EPOCH for epoch, there in enumerate(reached) if there), None)


def target_of(workload: str, final: dict[str, list[float]]) -> float:
    """mlp: half a point below dense. lm: the worst final loss of all systems but one-byte."""
    if workload == "mlp":
        return mean(final["dense"]) - 0.5
    return max(mean(values) for system, values in final.items() if system != "one-byte")


def report(lab: Lab, args: argparse.Namespace) -> Record:
    """All cells, and the rows of the table."""
    once = dict.fromkeys(args.once, args.seeds[:1])
    whole = {s: [lab.whole(s, seed) for seed in once.get(s, args.seeds)] for s in args.systems}
    final = {s: [r["quality"][-1] for r in records] for s, records in whole.items()}
    target, higher = target_of(lab.workload, final), BETTER_IS_HIGHER[lab.workload]
    rows = []
    for rate in args.rates:
        for system in args.systems:
            costs = lab.costs(system, rate)
            needed = [steps_to(record["quality"], target, higher) for record in whole[system]]
            reached = [n for n in needed if n is not None]
            there = len(reached) == len(needed)
            start = lab.dense_start(system, rate)
            times = [start + seconds_of(system, n, costs) for n in reached]
            waits = [n * args.latency / 1000 * ROUNDS[system] for n in reached]
            rows.append(
                {
                    "system": system,
                    "mbit": rate,
                    "quality": final[system],
                    "step_seconds": costs[max(costs)],
                    "run_seconds": start + seconds_of(system, lab.steps, costs),
                    "target_seconds": mean(times) if there else None,
                    "latency_seconds": mean(waits) if there else None,
                }
            )
    rate = args.rates[0]
    same = {
        system: lab.cell(system, 0, rate, TIMED)["digest"] == lab.cell(system, 0, None, TIMED)["digest"]
        for system in args.systems
    }
    found = {"rows": rows, "shaping_keeps_the_bits": same, "target": target, "workload": lab.workload}
    for system in args.complete:
        real = sum(lab.cell(system, 0, rate, lab.steps)["seconds"])
        found.setdefault("complete", {})[system] = {
            "measured": real,
            "summed": lab.dense_start(system, rate) + seconds_of(system, lab.steps, lab.costs(system, rate)),
        }
    return {**found, "latency_ms": args.latency, "steps": lab.steps, "seeds": args.seeds}


def table(found: Record) -> Table:
    unit = "accuracy, %" if found["workload"] == "mlp" else "nats a character"
    shown = Table(title=f"{found['workload']}, {found['steps']} steps; target {found['target']:.3f} {unit}")
    for column in ("system", "Mbit/s", unit, "s a step", "min a run", "min to target", "of dense", "+ latency"):
        shown.add_column(column, justify="left" if column == "system" else "right")
    dense = {row["mbit"]: row["target_seconds"] for row in found["rows"] if row["system"] == "dense"}
    for row in found["rows"]:
        target, base = row["target_seconds"], dense.get(row["mbit"])
        shown.add_row(
            row["system"],
            f"{row['mbit']:g}",
            f"{mean(row['quality']):.3f}",
            f"{row['step_seconds']:.3f}",
            f"{row['run_seconds'] / 60:.1f}",
            "never" if target is None else f"{target / 60:.2f}",
            "-" if target is None or not base else f"{target / base:.3f}",
            "-" if target is None else f"{row['latency_seconds'] / 60:.2f}",
        )
    return shown


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=WORKLOADS, default="mlp")
    parser.add_argument("--rates", type=float, nargs="+", default=[10, 100, 1000], help="Mbit/s")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--once", nargs="*", choices=SYSTEMS, default=[], help="these with the first seed only")
    parser.add_argument("--steps", type=int, help="of a whole run, if others than the workload's")
    parser.add_argument("--latency", type=float, default=20.0, help="modelled, ms a message")
    parser.add_argument("--complete", nargs="*", choices=SYSTEMS, default=[])
    parser.add_argument("--out", type=Path, default=Path("runs/slow-link"))
    parser.add_argument("--record", action="store_true", help="make it what the docs show")
    args = parser.parse_args()
    console = Console(stderr=True)
    lab = Lab(args.workload, args.steps or STEPS[args.workload], args.out, console)
    try:
        found = report(lab, args)
    except NotPermitted as error:
        console.print(str(error), style="red")
        return 3
    for folder in (args.out, *([RECORDED] if args.record else [])):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"slow-link-{args.workload}.json").write_text(json.dumps(found, indent=1) + "\n")
        draw(found, folder / f"slow-link-{args.workload}.png")
    Console().print(table(found))
    return 0 if all(found["shaping_keeps_the_bits"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
