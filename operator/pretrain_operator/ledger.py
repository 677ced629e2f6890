"""The operator's memory: who is a member of which generation, and how past ones ended.

Everything here changes the status and nothing else; :mod:`plan` writes it ahead of whatever relies
on it.
"""

from datetime import datetime, timedelta

from pretrain_api import names
from pretrain_api.status import (
    MAX_ATTEMPTS,
    AssignmentStatus,
    Attempt,
    JobStatus,
    Member,
    RestartsStatus,
)
from pretrain_api.wire import Order
from pretrain_operator.observe import Observation, Pod
from pretrain_operator.policies import cleanup
from pretrain_operator.policies.diagnosis import Cause, gone
from pretrain_operator.progress import report_of_leader, with_last_words, with_report
from pretrain_operator.resources import pod_name

MAX_REASONS = 32


def with_attempt(seen: Observation, cause: Cause) -> JobStatus:
    """Status with the present generation in the ledger of attempts."""
    status = with_report(seen, seen.status)
    for pod in seen.pods:
        if pod.exit and pod.exit.message and _led(seen, pod):
            status = with_last_words(seen, status, pod.exit.message)
    attempts = _bounded((*status.attempts, _attempt(seen, status, cause)))
    return status.model_copy(update={"attempts": attempts})


def _bounded(attempts: tuple[Attempt, ...]) -> tuple[Attempt, ...]:
    """The ledger within its bound. Free attempts go first: the budget counts the charged ones."""
    if len(attempts) <= MAX_ATTEMPTS:
        return attempts
    *earlier, _ = attempts
    out = next((each for each in earlier if not each.charged), attempts[0])
    return tuple(each for each in attempts if each is not out)


def with_restart(status: JobStatus, cause: Cause, charged: int) -> JobStatus:
    """Status with a restart counted; ``charged`` is what now counts in the window."""
    before = status.restarts or RestartsStatus()
    reasons = dict(before.by_reason)
    # The word may come from a container runtime: the number of different ones is bounded.
    reason = cause.reason if cause.reason in reasons or len(reasons) < MAX_REASONS else "Other"
    reasons[reason] = reasons.get(reason, 0) + 1
    update = {"total": before.total + 1, "charged": charged, "by_reason": reasons}
    return status.model_copy(update={"restarts": before.model_copy(update=update)})


def with_order(seen: Observation, status: JobStatus, order: Order, seconds: float) -> JobStatus:
    """Status with an order to all members, who are waited for so many ``seconds`` at most.

    Raises ValueError if nobody is a member.
    """
    if status.assignment is None or not status.assignment.workers:
        raise ValueError(f"nobody is a member who could be ordered to {order}")
    until = seen.now + timedelta(seconds=seconds)
    update = {"order": order, "ordered": seen.now, "until": until}
    return status.model_copy(update={"assignment": status.assignment.model_copy(update=update)})


def with_candidates(seen: Observation, status: JobStatus, count: int) -> JobStatus:
    """Status with this many candidates: those there are, and new ones in the places after them."""
    if status.assignment is None:
        return status
    generation, size = next_generation(seen), len(status.assignment.workers)
    before = status.assignment.candidates[:count]
    added = range(size + len(before), size + count)
    after = (*before, *(_new_member(seen, generation, index) for index in added))
    changed = status.assignment.model_copy(update={"candidates": after})
    return status.model_copy(update={"assignment": changed})


def _led(seen: Observation, pod: Pod) -> bool:
    message = pod.exit.message if pod.exit else None
    assignment = seen.status.assignment
    if message is None or assignment is None or message.generation != assignment.generation:
        return False
    return bool(seen.members) and seen.members[0].pod == pod.name


def _attempt(seen: Observation, status: JobStatus, cause: Cause) -> Attempt:
    assignment, progress = status.assignment, status.progress
    kept = status.checkpoint.step if status.checkpoint else None
    step = progress.step if progress else None
    return Attempt(
        generation=assignment.generation if assignment else 0,
        started=assignment.announced if assignment else None,
        ended=seen.now,
        reason=cause.reason,
        message=cause.message,
        start_step=progress.resumed_from if progress else None,
        step=step,
        checkpoint_step=kept,
        lost_seconds=_lost_seconds(seen, step, kept),
        pod=cause.pod,
        node=cause.node,
        rank=cause.rank,
        exit_code=cause.exit_code,
        signal=cause.signal,
        charged=cause.charged,
    )


def _lost_seconds(seen: Observation, step: int | None, kept: int | None) -> float | None:
    seconds = _step_seconds(seen)
    if seconds is None or step is None:
        return None
    return round(max(0, step - (kept or 0)) * seconds, 1)


def with_generation(
    seen: Observation,
    status: JobStatus,
    *,
    size: int,
    kept: tuple[Member, ...] = (),
    not_before: datetime | None = None,
    grow_after: datetime | None = None,
    releases: int = 0,
) -> JobStatus:
    """Status with the next generation: the kept members, new ones in the other places.

    Candidates may be among those kept; the others are dropped, and so is the order in force.
    """
    generation = next_generation(seen)
    workers = _places(seen, generation, size, kept)
    assignment = AssignmentStatus(
        generation=generation,
        nonce=seen.nonce,
        in_place_before=_in_place_before(seen, status, workers[0]),
        workers=workers,
        created=seen.now,
        saved_step=status.checkpoint.step if status.checkpoint else None,
        not_before=not_before,
        grow_after=grow_after,
        releases=releases,
        written_off=_written_off(seen),
    )
    return status.model_copy(update={"assignment": assignment})


def _written_off(seen: Observation) -> tuple[str, ...]:
    return tuple(sorted(cleanup.written_off(seen)))


def without_echoes(
    seen: Observation, assignment: AssignmentStatus, kept: tuple[Member, ...]
) -> JobStatus:
    """Status with the same generation, which nobody has been told of yet: only ``kept`` stay."""
    workers = _places(seen, assignment.generation, len(assignment.workers), kept)
    before = _in_place_before(seen, seen.status, workers[0])
    lost = {"written_off": _written_off(seen)}
    amended = assignment.model_copy(update={"workers": workers, "in_place_before": before} | lost)
    return seen.status.model_copy(update={"assignment": amended})


def _places(
    seen: Observation, generation: int, size: int, kept: tuple[Member, ...]
) -> tuple[Member, ...]:
    """The kept members in their places, and new ones in the others.

    Who has a place that is no more, or is taken, gets the lowest that is free: its pod keeps its
    name, which tells only what it was made for. That pod could not be made again under its name, so
    who has none doesn't move. If there are more than places, the first stay.
    """
    stay: dict[int, Member] = {}
    moving: list[Member] = []
    for member in kept[:size]:
        if member.index < size and member.index not in stay:
            stay[member.index] = member
        else:
            moving.append(member)
    free = (index for index in range(size) if index not in stay)
    there = ((member, pod) for member in moving if (pod := seen.pod_of(member)))
    for index, (member, pod) in zip(free, there, strict=False):
        stay[index] = member.model_copy(update={"index": index, "uid": pod.uid})
    return tuple(stay.get(index) or _new_member(seen, generation, index) for index in range(size))


def _new_member(seen: Observation, generation: int, index: int) -> Member:
    return Member(index=index, created_in=generation, pod=pod_name(seen.name, index, generation))


def staying(seen: Observation) -> tuple[Member, ...]:
    """Members that are not gone, and after them candidates whose pods are there."""
    left = gone(seen)
    members = (member for member in seen.members if member not in left)
    pods = ((each, seen.pod_of(each)) for each in seen.candidates)
    return (*members, *(each for each, pod in pods if pod and pod.alive))


def with_meeting(seen: Observation, assignment: AssignmentStatus, pods: list[Pod]) -> JobStatus:
    """Status with members fixed to these pods (by index) and the first of them as leader."""
    workers = tuple(
        member.model_copy(update={"uid": pod.uid, "node": pod.node, "ip": pod.ip})
        for member, pod in zip(seen.members, pods, strict=True)
    )
    told = assignment.model_copy(
        update={
            "leader": f"{_host(pods[0].ip or '')}:{names.MEETING_PORT}",
            "workers": workers,
            "announced": seen.now,
            "written_off": _written_off(seen),  # whoever isn't waited for from now on
        }
    )
    return seen.status.model_copy(update={"assignment": told})


def _host(address: str) -> str:
    return f"[{address}]" if ":" in address else address


def _in_place_before(seen: Observation, status: JobStatus, leader: Member) -> int:
    """Restarts in place that the count of the next leader doesn't include.

    A pod counts for as long as it lives: one that leads again goes on from where it was, whether or
    not it answers just now, and a new one begins at zero. One that led not so far has counted those
    since it came; how many, it says itself, or the age it shares with the leader before.
    """
    counted = status.restarts.in_place if status.restarts else 0
    if status.assignment is None or not status.assignment.workers:
        return counted
    before = status.assignment.workers[0]
    if leader.pod == before.pod or leader.created_in == before.created_in:
        return status.assignment.in_place_before
    report = seen.reports.get(leader.pod)
    return max(0, counted - report.restarts_in_place) if report else counted


def without_members(seen: Observation, status: JobStatus) -> JobStatus:
    """Status in which nobody is a member; the number of the generation stays."""
    if status.assignment is None:
        return status
    nobody = {"workers": (), "candidates": (), "leader": None}
    free = {"order": Order.NONE, "ordered": None, "until": None}
    lost = {"written_off": _written_off(seen)}
    alone = status.assignment.model_copy(update=nobody | free | lost)
    return status.model_copy(update={"assignment": alone})


def next_generation(seen: Observation) -> int:
    """Above all that was ever used, even if the status was lost and only pods are left."""
    used = seen.status.assignment.generation if seen.status.assignment else 0
    made = (each.created_in for each in (*seen.pods, *seen.candidates))
    return max([used, *made]) + 1


def _step_seconds(seen: Observation) -> float | None:
    """Duration of a step: from the leader's report, or from what it left behind."""
    report = report_of_leader(seen)
    if report is not None:
        return report.progress.step_seconds
    messages = [pod.exit.message for pod in seen.pods if pod.exit and _led(seen, pod)]
    return next((m.progress.step_seconds for m in messages if m), None)
