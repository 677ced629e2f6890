"""One fault and the way back: inject, wait until a step was trained again, split the time."""

import time
from dataclasses import dataclass
from typing import Self

from pretrain_api.wire import Timeline, WorkerStatus
from pretrain_bench import stages
from pretrain_bench.client import BenchError
from pretrain_bench.faults import Fault, Injury, Scene, trains
from pretrain_bench.jobs import LOOK_SECONDS
from pretrain_bench.recorder import Recorder
from pretrain_bench.stages import Marks, Recovery
from pretrain_demo.job import Snapshot

RECOVERY_SECONDS = 240.0
TELL_SECONDS = 10.0  # for every worker to tell what the leader has told


@dataclass(frozen=True)
class Before:
    """The world that a fault hits."""

    generation: int
    start: tuple[int, int]  # generation and round that its ranks were started in
    step: int
    members: frozenset[str]  # names of its pods

    @classmethod
    def of(cls, job: Snapshot) -> Self:
        """From a job that trains."""
        assignment = job.status.assignment
        members = frozenset(member.pod for member in assignment.workers) if assignment else ()
        return cls(job.generation, newest_start(job), job.step, frozenset(members))


def newest_start(job: Snapshot) -> tuple[int, int]:
    """Generation and round of the newest start that the leader tells of."""
    timeline = job.leader.timeline if job.leader else None
    return (timeline.generation, timeline.round) if timeline else (0, 0)


def training(scene: Scene) -> Snapshot:
    """The job when it has trained a step since its newest start."""
    return scene.jobs.wait_heard(scene.job, trains, RECOVERY_SECONDS, "training")


def strike(scene: Scene, fault: Fault) -> tuple[Before, Injury, Snapshot]:
    """Inject a fault and wait until a step was trained after it.

    Returns:
        The world before, the fault, which is not mended yet, and the job after.
    """
    fault.prepare(scene)
    before = Before.of(training(scene))
    injury = fault.inject(scene)
    try:
        after = scene.jobs.wait_heard(
            scene.job,
            lambda job: _back(job, before, fault),
            RECOVERY_SECONDS,
            f"a step after: {fault.name}",
        )
    except BaseException:
        injury.mend()
        raise
    return before, injury, after


def _back(job: Snapshot, before: Before, fault: Fault) -> bool:
    if fault.heals:
        return job.leader is not None and job.step > before.step + 1
    return trains(job) and newest_start(job) > before.start


def measure(scene: Scene, recorder: Recorder, fault: Fault) -> Recovery:
    """One trial of a fault that needs a restart, mended at the end."""
    before, injury, after = strike(scene, fault)
    try:
        timelines = _timelines(scene, after)
        marks = _marks(before, injury, after, timelines, recorder)
    finally:
        injury.mend()
    assert marks.first_step is not None
    repeated = max(0, before.step - (after.resumed_from or 0))
    leader = after.leader
    speed = leader.progress.step_seconds if leader else None
    return Recovery(
        fault=fault.name,
        total=marks.first_step - injury.at,
        stages=marks.durations(injury.at),
        repeated=repeated,
        recompute=repeated * (speed or 0.0),
        generation=after.generation,
        step=before.step,
    )


def _marks(
    before: Before,
    injury: Injury,
    after: Snapshot,
    timelines: dict[str, Timeline],
    recorder: Recorder,
) -> Marks:
    if after.generation == before.generation:
        return stages.in_place(list(timelines.values()))
    sightings = recorder.since(injury.at)
    return stages.new_generation(injury.at, before.generation, before.members, sightings, timelines)


def _timelines(scene: Scene, after: Snapshot) -> dict[str, Timeline]:
    """What every member says about the start that the leader has told of, by pod."""
    start, deadline = newest_start(after), time.monotonic() + TELL_SECONDS
    lines: dict[str, Timeline] = {}
    for pod in Before.of(after).members:
        while not _tells_of(line := scene.jobs.ask(pod), start):
            if time.monotonic() > deadline:
                raise BenchError(f"{pod} doesn't tell about the start {start}: {line}")
            time.sleep(LOOK_SECONDS)
        assert line is not None
        assert line.timeline is not None
        lines[pod] = line.timeline
    return lines


def _tells_of(said: WorkerStatus | None, start: tuple[int, int]) -> bool:
    line = said.timeline if said else None
    return bool(line and line.trained and (line.generation, line.round) == start)


def passed(scene: Scene, step: int) -> Snapshot:
    """The job when it has trained a step that it never had trained before."""
    return scene.jobs.wait_for_step(scene.job, step + 1, RECOVERY_SECONDS)
