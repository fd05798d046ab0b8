"""Time to target accuracy over slow links, system by system.

    python -m bench.slow_link [--rates 10 100 1000] [--seeds 0 1 2] [--systems dense dgc ...] [--epochs 24]

Four hosts in network namespaces train the same MLP (5 million parameters, MNIST-5k) with `torchrun`. Steps to
target are counted once, on links that are not shaped; seconds a step are the median of shaped steps, for each
stage of a warm-up by itself; time to target is their sum. That 20 shaped steps give the same bits as 20
unshaped ones is checked. Every cell is saved under ``runs/slow-link`` and a rerun continues. Needs root.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

from bench.slow_link.net import Network, NotPermitted, address, namespace, within
from bench.slow_link.train import PAPER_WARMUP, STEPS, SYSTEMS
from rich.console import Console
from rich.table import Table

HOSTS = 4
SKIPPED, TIMED = 5, 20  # steps before, and in, a measurement
PATIENCE = 3600

Record = dict[str, Any]


class Lab:
    """Cells on disk, and the runs that make them."""

    def __init__(self, out: Path, console: Console) -> None:
        self.out, self.console = out, console
        out.mkdir(parents=True, exist_ok=True)

    def cell(
        self, system: str, seed: int, rate: float | None, steps: int, stage: int = -1, evaluate: bool = False
    ) -> Record:
        """The record of a run; computed if it is not there yet."""
        speed = "unshaped" if rate is None else f"{rate:g}mbit"
        path = self.out / f"{system}-seed{seed}-{speed}-{steps}steps-stage{stage}{'-eval' * evaluate}.json"
        if not path.exists():
            self.console.print(f"{path.stem} ...", highlight=False)
            part = path.with_suffix(".part")
            arguments = ["--system", system, "--seed", seed, "--steps", steps, "--stage", stage, "--out", part]
            with Network(HOSTS, rate):
                torchrun([*map(str, arguments), *(["--evaluate"] if evaluate else [])])
            os.replace(part, path)
        return dict(json.loads(path.read_text()))


def torchrun(arguments: Sequence[str]) -> None:
    """``torchrun --nnodes=4``, one agent and one worker a host. Raises RuntimeError if one fails."""
    agents = []
    for host in range(HOSTS):
        command = [
            *within(namespace(host)),
            *(sys.executable, "-m", "torch.distributed.run", f"--nnodes={HOSTS}", "--nproc-per-node=1"),
            *(f"--node-rank={host}", f"--master-addr={address(0)}", "--master-port=29400"),
            *("-m", "bench.slow_link.train", *arguments),
        ]
        environment = {**os.environ, "GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1"}
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


def seconds_a_step(lab: Lab, system: str, rate: float, stage: int) -> float:
    return median(lab.cell(system, 0, rate, SKIPPED + TIMED, stage)["seconds"][SKIPPED:])


def stages_of(system: str, steps: int) -> dict[int, int]:
    """Steps that a run of ``steps`` spends in each stage of its warm-up; stage -1 where it has none."""
    if system != "dgc":
        return {-1: steps}
    spent = {stage: max(0, min(STEPS, steps - stage * STEPS)) for stage in range(len(PAPER_WARMUP))}
    return {**spent, len(PAPER_WARMUP): max(0, steps - len(PAPER_WARMUP) * STEPS)}


def steps_to(accuracy: Sequence[float], target: float) -> int | None:
    """Steps until the accuracy after an epoch is at the target; None if it never is."""
    return next(((epoch + 1) * STEPS for epoch, value in enumerate(accuracy) if value >= target), None)


def report(lab: Lab, args: argparse.Namespace) -> Record:
    """All cells, and the rows of the table."""
    steps = args.epochs * STEPS
    trained = {s: [lab.cell(s, seed, None, steps, evaluate=True) for seed in args.seeds] for s in args.systems}
    final = {s: mean(r["accuracy"][-1] for r in records) for s, records in trained.items()}
    rows = []
    for system in args.systems:
        for rate in args.rates:
            cost = {stage: seconds_a_step(lab, system, rate, stage) for stage in stages_of(system, steps)}
            whole = sum(n * cost[stage] for stage, n in stages_of(system, steps).items())
            times = []
            for record in trained[system]:
                needed = steps_to(record["accuracy"], args.target)
                if needed is not None:
                    times.append(sum(n * cost[stage] for stage, n in stages_of(system, needed).items()))
            rows.append(
                {
                    "system": system,
                    "mbit": rate,
                    "accuracy": final[system],
                    "step_seconds": cost[max(cost)],
                    "run_seconds": whole,
                    "target_seconds": mean(times) if len(times) == len(args.seeds) else None,
                }
            )
    rate = args.rates[0]
    same = {
        system: lab.cell(system, 0, rate, TIMED)["digest"] == lab.cell(system, 0, None, TIMED)["digest"]
        for system in args.systems
    }
    return {"rows": rows, "shaping_keeps_the_bits": same, "target": args.target, "epochs": args.epochs}


def table(found: Record) -> Table:
    shown = Table(title=f"{found['epochs']} epochs; time to {found['target']:g} % test accuracy")
    for column in ("system", "Mbit/s", "accuracy", "s a step", "min a run", "min to target"):
        shown.add_column(column, justify="left" if column == "system" else "right")
    for row in found["rows"]:
        target = row["target_seconds"]
        shown.add_row(
            row["system"],
            f"{row['mbit']:g}",
            f"{row['accuracy']:.2f}",
            f"{row['step_seconds']:.3f}",
            f"{row['run_seconds'] / 60:.1f}",
            "never" if target is None else f"{target / 60:.1f}",
        )
    return shown


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", type=float, nargs="+", default=[10, 100, 1000], help="Mbit/s")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--epochs", type=int, default=24)
    parser.add_argument("--target", type=float, default=94.0, help="test accuracy, percent")
    parser.add_argument("--out", type=Path, default=Path("runs/slow-link"))
    args = parser.parse_args()
    console = Console(stderr=True)
    try:
        found = report(Lab(args.out, console), args)
    except NotPermitted as error:
        console.print(str(error), style="red")
        return 3
    (args.out / "found.json").write_text(json.dumps(found, indent=1))
    Console().print(table(found))
    return 0 if all(found["shaping_keeps_the_bits"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
