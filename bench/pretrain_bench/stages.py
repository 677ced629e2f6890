"""Splits a recovery into its stages, from what the cluster showed and what workers said. Pure.

Every moment is in seconds since the epoch on one machine's clock. A stage begins where the one
before it ended; a stage that a recovery doesn't have, or that nobody could see, is None, and its
time is in the next one.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pretrain_api.status import JobStatus
from pretrain_api.wire import Timeline
from pretrain_bench.recorder import Sighting

STAGES = ("detect", "decide", "schedule", "start", "meet", "load", "first step")

Pod = Mapping[str, Any]


@dataclass(frozen=True)
class Recovery:
    """One fault and the way back.

    Attributes:
        fault: its name.
        total: seconds from the fault to the end of the first step after it.
        stages: seconds of each stage in STAGES.
        repeated: steps that were trained a second time.
        recompute: seconds these took, at the speed of the last step.
        generation: generation of the world that the way back ended in.
        step: step that was reached before the fault.
    """

    fault: str
    total: float
    stages: Mapping[str, float | None]
    repeated: int
    recompute: float
    generation: int
    step: int


@dataclass(frozen=True)
class Marks:
    """When each stage ended, as far as seen."""

    detect: float | None = None
    decide: float | None = None
    schedule: float | None = None
    start: float | None = None
    meet: float | None = None
    load: float | None = None
    first_step: float | None = None

    def durations(self, begin: float) -> dict[str, float | None]:
        """Seconds of each stage. A stage that ended before its predecessor took no time."""
        result: dict[str, float | None] = {}
        for stage in STAGES:
            end = getattr(self, stage.replace(" ", "_"))
            result[stage] = None if end is None else max(0.0, end - begin)
            begin = begin if end is None else max(begin, end)
        return result


def in_place(timelines: Sequence[Timeline]) -> Marks:
    """Marks of a restart within pods: found dead, all down, all met, loaded, trained.

    Args:
        timelines: of all workers, each of its newest start.
    """
    return Marks(
        detect=_first(line.stopped for line in timelines),
        decide=_last(line.joined for line in timelines),
        meet=_last(line.started for line in timelines),
        load=_last(line.first_step for line in timelines),
        first_step=_last(line.trained for line in timelines),
    )


def new_generation(
    injected: float,
    generation: int,
    members: Collection[str],
    sightings: Sequence[Sighting],
    timelines: Mapping[str, Timeline],
) -> Marks:
    """Marks of a recovery through a new generation of the world.

    Args:
        injected: when the fault happened.
        generation: of the world before it.
        members: names of that world's pods.
        sightings: what the cluster showed since.
        timelines: of the members of the new generation, by name of the pod.
    """
    decided = _decided(generation, sightings)
    noticed = _noticed(members, sightings, decided)
    fresh = [name for name in timelines if _created_after(name, injected, sightings)]
    lines = list(timelines.values())
    return Marks(
        detect=decided if noticed is None else noticed,
        decide=None if noticed is None else decided,
        schedule=_last(_bound(name, sightings) for name in fresh),
        start=_last(timelines[name].joined for name in fresh),
        meet=_last(line.started for line in lines),
        load=_last(line.first_step for line in lines),
        first_step=_last(line.trained for line in lines),
    )


def _first(moments: Iterable[float | None]) -> float | None:
    return min((moment for moment in moments if moment is not None), default=None)


def _last(moments: Iterable[float | None]) -> float | None:
    return max((moment for moment in moments if moment is not None), default=None)


def _decided(generation: int, sightings: Sequence[Sighting]) -> float | None:
    """When a newer generation was first seen in the status."""
    return _first(
        sight.at
        for sight in sightings
        if sight.kind == "job" and generation_of(sight.body) > generation
    )


def generation_of(job: Mapping[str, Any]) -> int:
    """Generation in the status of a job."""
    assignment = JobStatus.model_validate(job.get("status") or {}).assignment
    return assignment.generation if assignment else 0


def _noticed(
    members: Collection[str], sightings: Sequence[Sighting], decided: float | None
) -> float | None:
    """When a member was first seen to be over, unless the operator knew without that."""
    over = _first(
        sight.at
        for sight in sightings
        if sight.kind == "pod" and sight.name in members and (sight.deleted or _over(sight))
    )
    return None if over is None or decided is None or over > decided else over


def _over(sight: Sighting) -> bool:
    status: Pod = sight.body.get("status") or {}
    containers = status.get("containerStatuses") or ()
    ended = any("terminated" in (each.get("state") or {}) for each in containers)
    return ended or status.get("phase") in ("Failed", "Succeeded")


def _created_after(name: str, injected: float, sightings: Sequence[Sighting]) -> bool:
    """Whether a pod was made since the fault: it was seen without a node."""
    return any(
        sight.name == name and not sight.body["spec"].get("nodeName")
        for sight in sightings
        if sight.kind == "pod" and sight.at >= injected
    )


def _bound(name: str, sightings: Sequence[Sighting]) -> float | None:
    """When a pod was first seen with a node."""
    return _first(
        sight.at
        for sight in sightings
        if sight.kind == "pod" and sight.name == name and sight.body["spec"].get("nodeName")
    )
