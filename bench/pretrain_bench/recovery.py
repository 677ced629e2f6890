"""`make bench-recovery`: how many seconds each fault costs, and where they go.

One job goes through every fault of the catalogue again and again. A fault comes at a random moment
between two steps, and the next one only after the job has trained a step it never had before.
"""

import argparse
import random
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from pretrain_bench import faults, machine, report
from pretrain_bench.client import BenchError
from pretrain_bench.faults import CATALOGUE, Fault, Scene
from pretrain_bench.jobs import Jobs
from pretrain_bench.recorder import Recorder
from pretrain_bench.setup import fresh_namespace, installed
from pretrain_bench.stages import Recovery
from pretrain_bench.trial import measure, passed, training
from pretrain_demo.target import DemoError, repository

NAMESPACE = "bench-recovery"
JOB = "toy"
STEPS = 1_000_000  # more than any run of this takes
HANG_SECONDS = 10  # the deadline of a step that the frozen rank is found by
SLOW_SECONDS = 60.0  # a recovery that took longer is worth its logs
JITTER_SECONDS = 1.0  # some steps
PAGE = "docs/benchmarks.md"
MARKER = "recovery"


def options(arguments: Sequence[str]) -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(prog="pretrain_bench.recovery", description=__doc__)
    parser.add_argument("--repeats", type=int, default=5, help="of each fault (5)")
    parser.add_argument("--fault", action="append", choices=[f.name for f in measured()])
    parser.add_argument("--seed", type=int, default=0, help="picks victims and moments (0)")
    parser.add_argument("--write", action="store_true", help=f"put the tables into {PAGE}")
    return parser.parse_args(arguments)


def measured() -> list[Fault]:
    """The faults that cost a restart."""
    return [fault for fault in CATALOGUE if not fault.heals]


def run(jobs: Jobs, scene: Scene, chosen: Sequence[Fault], count: int) -> dict[str, list[Recovery]]:
    """Every fault ``count`` times, in turn, so that a drift of the machine hits all alike."""
    jobs.apply(
        JOB,
        training={"steps": STEPS},
        recovery={"maxRestarts": 1000, "hang": {"stepSeconds": HANG_SECONDS}},
    )
    training(scene)
    recoveries: dict[str, list[Recovery]] = {fault.name: [] for fault in chosen}
    with Recorder(jobs, JOB) as recorder:
        for repeat in range(count):
            for fault in chosen:
                time.sleep(scene.rng.uniform(0, JITTER_SECONDS))
                recovery = measure(scene, recorder, fault)
                recoveries[fault.name].append(recovery)
                print(line(repeat, recovery), flush=True)
                if recovery.total > SLOW_SECONDS:
                    print(jobs.story(JOB), flush=True)
                passed(scene, recovery.step)
    return recoveries


def line(repeat: int, recovery: Recovery) -> str:
    """One trial for the log."""
    parts = ", ".join(
        f"{stage} {report.seconds(value)}"
        for stage, value in recovery.stages.items()
        if value is not None
    )
    return f"{repeat + 1:>3} {recovery.fault:<30} {recovery.total:6.2f} s: {parts}"


def tables(recoveries: dict[str, list[Recovery]], command: str) -> str:
    """What goes into the page."""
    aims = {fault.name: fault.aim_seconds for fault in faults.CATALOGUE}
    return (
        f"`{command}` on {machine.describe()}. Seconds; the stages are medians.\n\n"
        f"{report.summary(recoveries, aims)}\n"
        f"All repeats:\n\n{report.repeats(recoveries)}"
    )


def main(arguments: Sequence[str]) -> int:
    """Measure, print, and write the page if asked to; a failure is told on stderr."""
    chosen = options(arguments)
    try:
        target, cluster = installed()
        with fresh_namespace(target, cluster, NAMESPACE) as jobs:
            scene = Scene(jobs, cluster, JOB, random.Random(chosen.seed))
            picked = [f for f in measured() if chosen.fault is None or f.name in chosen.fault]
            recoveries = run(jobs, scene, picked, chosen.repeats)
    except (BenchError, DemoError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    command = f"python -m pretrain_bench.recovery {shlex.join(arguments)}".rstrip()
    text = tables(recoveries, command)
    print(text)
    if chosen.write:
        page: Path = repository() / PAGE
        page.write_text(report.replace_between(page.read_text(), MARKER, text))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
