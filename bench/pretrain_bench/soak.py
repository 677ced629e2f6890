"""`make soak`: hundreds of random faults in a row, and an end that shows no trace of them.

One job goes through faults drawn by weight from a seed; the next one comes soon after the job has
trained a step it never had before. At last it is suspended, and what it saves then, weights,
optimizer, data position and ledger, must be what a run has at that step that nothing happened to.
"""

import argparse
import random
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pretrain_bench.client import BenchError
from pretrain_bench.faults import CATALOGUE, Fault, Scene, suspend
from pretrain_bench.jobs import Jobs
from pretrain_bench.setup import fresh_namespace, installed
from pretrain_bench.trial import passed, strike, training
from pretrain_demo.job import Snapshot
from pretrain_demo.target import DemoError

NAMESPACE = "soak"
JOB = "battered"
REFERENCE = "undisturbed"
ENDLESS = 1_000_000  # steps
JITTER_SECONDS = 0.6  # some steps
HANG_SECONDS = 10
REFERENCE_SECONDS = 3600.0


@dataclass(frozen=True)
class Blow:
    """A fault that the job has got over."""

    number: int
    fault: str
    seconds: float  # until a step was trained that never had been before
    generation: int
    step: int

    def __str__(self) -> str:
        return (
            f"{self.number:>4} {self.fault:<30} {self.seconds:6.1f} s  "
            f"generation {self.generation:>4}  step {self.step}"
        )


def draw(rng: random.Random, count: int) -> list[Fault]:
    """So many faults, each as often as its weight says."""
    return rng.choices(CATALOGUE, weights=[fault.weight for fault in CATALOGUE], k=count)


def change(steps: int) -> dict[str, Any]:
    """What both runs change in the toy's spec."""
    return {
        "training": {"steps": steps},
        "recovery": {"maxRestarts": 1000, "hang": {"stepSeconds": HANG_SECONDS}},
    }


def blows(scene: Scene, chosen: Sequence[Fault], deadline: float) -> list[Blow]:
    """Every fault in turn, each reported as soon as it is got over.

    Raises BenchError if the job doesn't get over one, or not over all by ``deadline``.
    """
    result: list[Blow] = []
    training(scene)
    for number, fault in enumerate(chosen, 1):
        if time.monotonic() > deadline:
            raise BenchError(f"out of time after {number - 1} of {len(chosen)} faults")
        time.sleep(scene.rng.uniform(0, JITTER_SECONDS))
        before, injury, _ = strike(scene, fault)
        try:
            after = passed(scene, before.step)
            seconds = time.time() - injury.at
        finally:
            injury.mend()
        result.append(Blow(number, fault.name, seconds, after.generation, after.step))
        print(result[-1], flush=True)
    return result


def differences(jobs: Jobs, name: str, reference: str) -> list[str]:
    """What is not as in the undisturbed run, in sentences; empty if all is."""
    ours, theirs = jobs.digests(name), jobs.digests(reference)
    found = [
        f"{section}: {ours.get(section)} instead of {theirs.get(section)}"
        for section in sorted(ours.keys() | theirs.keys())
        if ours.get(section) != theirs.get(section)
    ]
    ledgers = [ledger(jobs.read(each)) for each in (name, reference)]
    if ledgers[0] != ledgers[1] or ledgers[0] is None:
        found.append(f"the ledger in the status: {ledgers[0]} instead of {ledgers[1]}")
    return found


def ledger(job: Snapshot) -> str | None:
    """Digest of all samples trained on, from the status."""
    return job.status.progress.ledger if job.status.progress else None


def summary(done: Sequence[Blow], end: Snapshot) -> str:
    """What there is to remember."""
    counts = Counter(blow.fault for blow in done)
    worst = max(done, key=lambda blow: blow.seconds)
    restarts = end.status.restarts
    lines = [
        f"{len(done)} faults in {sum(blow.seconds for blow in done):.0f} s of recovery",
        *(f"  {count:>4} {name}" for name, count in counts.most_common()),
        f"slowest: {worst.fault}, {worst.seconds:.1f} s",
        f"restarts: {restarts.to_dict() if restarts else 'none'}",
        f"end: step {end.step}, generation {end.generation}",
    ]
    return "\n".join(lines)


def soak(scene: Scene, count: int, minutes: float) -> None:
    """All faults, then a run without any to the same step, and the comparison.

    Raises BenchError with the story if the job doesn't get over a fault, or shows a trace of one.
    """
    jobs = scene.jobs
    jobs.apply(scene.job, **change(ENDLESS))
    done = blows(scene, draw(scene.rng, count), time.monotonic() + 60 * minutes)
    suspend(scene)
    end = jobs.read(scene.job)
    print(summary(done, end), flush=True)
    jobs.apply(REFERENCE, **change(end.step))
    jobs.complete(REFERENCE, REFERENCE_SECONDS)
    if found := differences(jobs, scene.job, REFERENCE):
        raise BenchError("\n".join([*found, jobs.story(scene.job)]))
    print(f"the same as {end.step} steps without faults, every digest and the ledger", flush=True)


def main(arguments: Sequence[str]) -> int:
    """Run it; a failure tells everything on stderr, with the seed to repeat it by."""
    parser = argparse.ArgumentParser(prog="pretrain_bench.soak", description=__doc__)
    parser.add_argument("--faults", type=int, default=200, help="how many (200)")
    parser.add_argument("--seed", type=int, help="picks faults, victims and moments (a new one)")
    parser.add_argument("--minutes", type=float, default=120, help="for all faults (120)")
    chosen = parser.parse_args(arguments)
    seed = chosen.seed if chosen.seed is not None else random.SystemRandom().randrange(2**31)
    print(f"seed {seed}, {chosen.faults} faults", flush=True)
    try:
        target, cluster = installed()
        with fresh_namespace(target, cluster, NAMESPACE) as jobs:
            soak(Scene(jobs, cluster, JOB, random.Random(seed)), chosen.faults, chosen.minutes)
    except (BenchError, DemoError) as error:
        print(f"error with seed {seed}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
