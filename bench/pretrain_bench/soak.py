"""`make soak`: hundreds of random faults in a row, and an end that shows no trace of them.

One job goes through faults drawn by weight from a seed; the next one comes soon after the job has
trained a step it never had before. In the end its weights, optimizer, data position and ledger must
be those of a run that nothing happened to, which is made once per build and kept.
"""

import argparse
import hashlib
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pretrain_api import names
from pretrain_bench.client import ApiError, BenchError
from pretrain_bench.faults import CATALOGUE, SYSTEM_NAMESPACE, Fault, Scene
from pretrain_bench.jobs import SPEC, Jobs, merged
from pretrain_bench.setup import installed, namespace
from pretrain_bench.trial import passed, strike, training
from pretrain_demo.job import Snapshot
from pretrain_demo.target import DemoError

NAMESPACE = "soak"
JOB = "battered"
STEPS_PER_FAULT = 6  # new steps trained from one fault to the next, with room to spare
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


def spec(count: int) -> dict[str, Any]:
    """What both runs change in the toy's spec."""
    return {
        "training": {"steps": STEPS_PER_FAULT * count + 20},
        "recovery": {"maxRestarts": 1000, "hang": {"stepSeconds": HANG_SECONDS}},
    }


def undisturbed(jobs: Jobs, change: dict[str, Any]) -> str:
    """Name of a complete run without faults, made unless there is one of this image and spec."""
    where = f"/apis/apps/v1/namespaces/{SYSTEM_NAMESPACE}/deployments/pretrain-operator"
    operator = jobs.client.get(where)["spec"]["template"]["spec"]["containers"][0]
    image = [each for each in operator["env"] if each["name"].endswith("TRAINER_IMAGE")]
    build = json.dumps([merged(SPEC, change), image], sort_keys=True)
    name = f"undisturbed-{hashlib.sha256(build.encode()).hexdigest()[:8]}"
    try:
        jobs.read(name)
    except ApiError as error:
        if error.status != 404:
            raise
        jobs.apply(name, **change)
    jobs.complete(name, REFERENCE_SECONDS)
    return name


def blows(scene: Scene, chosen: Sequence[Fault], deadline: float) -> list[Blow]:
    """Every fault in turn, each reported as soon as it is got over.

    Raises BenchError if the job ends too early, or doesn't get over one by ``deadline``.
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
        f"end: step {end.step} of {end.steps}, generation {end.generation}",
    ]
    return "\n".join(lines)


def soak(scene: Scene, count: int, minutes: float) -> None:
    """All faults, the end, and the comparison. Raises BenchError with the story."""
    jobs, change = scene.jobs, spec(count)
    reference = undisturbed(jobs, change)
    jobs.kubectl("delete", names.PLURAL, scene.job, "--ignore-not-found", "--timeout=120s")
    jobs.apply(scene.job, **change)
    done = blows(scene, draw(scene.rng, count), time.monotonic() + 60 * minutes)
    end = jobs.complete(scene.job, REFERENCE_SECONDS)
    print(summary(done, end), flush=True)
    if found := differences(jobs, scene.job, reference):
        raise BenchError("\n".join([*found, jobs.story(scene.job)]))
    print(f"the same end as {reference}: every section's digest and the ledger", flush=True)


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
        jobs = namespace(target, cluster, NAMESPACE)
        soak(Scene(jobs, cluster, JOB, random.Random(seed)), chosen.faults, chosen.minutes)
    except (BenchError, DemoError) as error:
        print(f"error with seed {seed}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
