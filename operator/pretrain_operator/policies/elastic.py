"""How many workers train together: what the spec asks for, and what the nodes have room for.

The size that is wanted is spec.workers.replicas, always. A world is smaller only while nodes are
missing, never below minReplicas and never of a size at which the batch doesn't come out even. It
gets larger in two steps, so that training goes on while nobody knows whether there is room:
candidates start beside it, and only when they are ready to train is everybody told to pause.
"""

import hashlib
from dataclasses import dataclass
from datetime import datetime, timedelta

from pretrain_api.job import JobSpec
from pretrain_api.status import MAX_MESSAGE, Member
from pretrain_operator.observe import Observation, Pod
from pretrain_operator.policies import cleanup
from pretrain_operator.policies.diagnosis import Cause

UNSCHEDULABLE_SECONDS = 10  # the scheduler's no counts then: nodes may just be about to be free
MAX_SNOOZE_SECONDS = 3600
MIN_RELEASE_SECONDS, MAX_RELEASE_SECONDS = 30, 600
GATED = "SchedulingGated"  # held back by a queue: no node was looked for yet

RESIZED, SHRUNK, GROWN = "Resized", "Shrunk", "Grown"


@dataclass(frozen=True, slots=True)
class World:
    """Who trains together next, and why."""

    size: int
    kept: tuple[Member, ...]
    cause: Cause


@dataclass(frozen=True, slots=True)
class Setback:
    """Why candidates don't join."""

    message: str


# --- sizes ----------------------------------------------------------------------------------------


def wanted(seen: Observation) -> int:
    """Workers the spec asks for; as many as there are while it doesn't validate."""
    return seen.job.spec.workers.replicas if seen.job else len(seen.members)


def largest_legal(spec: JobSpec, at_least: int, at_most: int) -> int | None:
    """The largest size within these bounds that can train, if there is one."""
    fitting = [size for size in spec.legal_replicas if at_least <= size <= at_most]
    return max(fitting, default=None)


def target_size(seen: Observation) -> int:
    """Workers of the generation that follows a pause: as many as are ready, and wanted."""
    size, most = len(seen.members), wanted(seen)
    if seen.job is None or most <= size:
        return most
    return largest_legal(seen.job.spec, size, min(most, size + len(ready(seen)))) or size


def next_world(seen: Observation) -> World:
    """The generation that follows a pause: the members, in their order, and ready candidates."""
    size, before = target_size(seen), len(seen.members)
    members = tuple(
        each for each in seen.members if (pod := seen.pod_of(each)) is not None and pod.alive
    )
    assignment = seen.status.assignment
    # Only a world for which there was no room is told when to grow.
    returned = size > before and assignment is not None and assignment.grow_after is not None
    cause = Cause(GROWN if returned else RESIZED, f"from {before} to {size} workers")
    return World(size, (*members, *ready(seen))[:size], cause)


# --- waiting for nodes ----------------------------------------------------------------------------


def unplaced(seen: Observation) -> list[Pod]:
    """Pods of members and candidates for which the scheduler found no node.

    None while a queue holds one back, or while pods of the last generation still leave: they may
    sit on the very nodes.
    """
    assignment = seen.status.assignment
    if assignment and assignment.leader is None and cleanup.in_the_way(seen):
        return []
    pods = [pod for pod in _pods(seen, (*seen.members, *seen.candidates)) if pod.node is None]
    if any(pod.trouble and pod.trouble.reason == GATED for pod in pods):
        return []
    return [pod for pod in pods if pod.trouble]


def waiting_since(seen: Observation) -> datetime | None:
    """Since when pods find no node, as far as that was noted."""
    return seen.status.assignment.unplaced if seen.status.assignment else None


def _waited(seen: Observation, seconds: float) -> bool:
    since = waiting_since(seen)
    return since is not None and seen.now >= since + timedelta(seconds=seconds)


def smaller_world(seen: Observation, spec: JobSpec) -> World | None:
    """The largest world of those members that have a node, if some have been refused for long.

    Only of a generation that doesn't train yet: it was tried at full size, after a loss or at the
    start.
    """
    assignment = seen.status.assignment
    if assignment is None or assignment.leader is not None:
        return None
    refused = [pod for pod in unplaced(seen) if pod.name in {m.pod for m in seen.members}]
    placed = [m for m in seen.members if (pod := seen.pod_of(m)) and pod.alive and pod.node]
    if not refused or len(placed) + len(refused) < len(seen.members):
        return None  # somebody's pod has yet to be seen, or to be judged by the scheduler
    size = largest_legal(spec, spec.workers.min_size, len(placed))
    if size is None or size >= len(seen.members) or not _waited(seen, UNSCHEDULABLE_SECONDS):
        return None
    lacking = f"{len(refused)} of {len(seen.members)} workers find no node: {_words(refused)}"
    return World(size, tuple(placed[:size]), Cause(SHRUNK, lacking[:MAX_MESSAGE]))


def release_at(seen: Observation, spec: JobSpec) -> datetime | None:
    """When the pods of a generation that doesn't start are released together."""
    seconds, since, assignment = (
        spec.scheduling_timeout_seconds,
        waiting_since(seen),
        seen.status.assignment,
    )
    if seconds is None or since is None or assignment is None or assignment.leader is not None:
        return None
    if spec.workers.min_size < len(seen.members):
        seconds = max(seconds, UNSCHEDULABLE_SECONDS)  # it may yet go on with fewer
    return since + timedelta(seconds=seconds)


def released(seen: Observation, wait: float) -> str:
    """The sentence about a release."""
    refused = unplaced(seen)
    return (
        f"{len(refused)} of {len(seen.members)} workers found no node within "
        f"schedulingTimeoutSeconds: {_words(refused)}; all are released and tried again in "
        f"{wait:.0f} s"
    )


def release_seconds(uid: str, releases: int) -> float:
    """How long released pods stay away after so many ``releases`` before this one.

    Doubles, and differs from job to job and from time to time: two jobs that blocked each other
    don't meet again.
    """
    longest = min(MAX_RELEASE_SECONDS, 2 * MIN_RELEASE_SECONDS * 2 ** min(releases, 10))
    digest = hashlib.sha256(f"{uid}/{releases}".encode()).digest()
    share = int.from_bytes(digest[:4]) / 2**32
    return round(longest / 2 * (1 + share), 1)


def _words(pods: list[Pod]) -> str:
    said = (pod.trouble.message for pod in pods if pod.trouble and pod.trouble.message)
    return next(said, "the scheduler doesn't say why")


def _pods(seen: Observation, members: tuple[Member, ...]) -> list[Pod]:
    """Pods of these that are there and have not ended."""
    return [pod for member in members if (pod := seen.pod_of(member)) and pod.alive]


# --- growing --------------------------------------------------------------------------------------


def ready(seen: Observation) -> tuple[Member, ...]:
    """Candidates that could train at once."""
    pods = ((each, seen.pod_of(each)) for each in seen.candidates)
    return tuple(each for each, pod in pods if pod and pod.alive and pod.ready and pod.ip)


def candidates_due(seen: Observation) -> int:
    """How many candidates there should be beside the members now."""
    assignment = seen.status.assignment
    if assignment is None:
        return 0
    lacking = max(0, wanted(seen) - len(seen.members))
    snoozes = assignment.grow_after is not None and seen.now < assignment.grow_after
    return 0 if snoozes else lacking


def can_grow(seen: Observation, spec: JobSpec) -> bool:
    """Whether ready candidates are worth a pause: all are, or no more will be for now."""
    ones, size = ready(seen), len(seen.members)
    if not ones or largest_legal(spec, size + 1, size + len(ones)) is None:
        return False
    others = _pods(seen, tuple(each for each in seen.candidates if each not in ones))
    if len(ones) == len(seen.candidates):
        return True
    if len(ones) + len(others) < len(seen.candidates):
        return False  # somebody's pod has yet to be seen
    return _waited(seen, UNSCHEDULABLE_SECONDS) and all(pod in unplaced(seen) for pod in others)


def setback(seen: Observation, spec: JobSpec) -> Setback | None:
    """What is wrong with the candidates: one ended, or they hold nodes that are too few."""
    for each in seen.candidates:
        pod = seen.pod_of(each)
        if pod is not None and not pod.alive:
            why = f": {pod.message}" if pod.message else ""
            return Setback(f"candidate {pod.name} ended before it could join{why}"[:MAX_MESSAGE])
    seconds, refused = spec.scheduling_timeout_seconds, unplaced(seen)
    holding = len(_pods(seen, seen.candidates)) > len(refused)
    if seconds is None or not refused or not holding or not _waited(seen, seconds):
        return None
    message = (
        f"{len(refused)} of {len(seen.candidates)} candidates found no node within {seconds} s"
    )
    return Setback(f"{message}: {_words(refused)}"[:MAX_MESSAGE])


def snooze(spec: JobSpec, setbacks: int = 0) -> timedelta:
    """How long to leave a world as it is after a change of size, or so many setbacks."""
    once = spec.recovery.grow_snooze_seconds
    longest = max(once, MAX_SNOOZE_SECONDS)
    return timedelta(seconds=min(once * 2 ** min(setbacks, 16), longest))


# --- what people and the clock should know --------------------------------------------------------


def shortage(seen: Observation) -> str | None:
    """That fewer workers train than are wanted, and why; None if there are enough.

    Without numbers that change all the time: the words are those of the moment it shrank.
    """
    size = len(seen.members)
    if seen.job is None or size >= wanted(seen):
        return None
    shrunk = (each for each in reversed(seen.status.attempts) if each.reason == SHRUNK)
    why = next((each.message for each in shrunk), "the others are about to join")
    return f"with {size} of {wanted(seen)} workers: {why}"


def wakes(seen: Observation) -> list[datetime]:
    """Times to come at which waiting for nodes, or sleeping before growing, is over."""
    assignment = seen.status.assignment
    if seen.job is None or assignment is None:
        return []
    times = [assignment.grow_after if wanted(seen) > len(seen.members) else None]
    if since := waiting_since(seen):
        if seen.candidates or seen.job.spec.workers.min_size < len(seen.members):
            times.append(since + timedelta(seconds=UNSCHEDULABLE_SECONDS))
        if seconds := seen.job.spec.scheduling_timeout_seconds:
            times.append(since + timedelta(seconds=seconds))
    return [at for at in times if at and at > seen.now]
