"""The operator's memory: who is a member of which generation, and how past ones ended.

Everything here changes the status and nothing else; :mod:`plan` writes it ahead of whatever relies
on it.
"""

from datetime import datetime

from pretrain_api import names
from pretrain_api.status import (
    MAX_ATTEMPTS,
    AssignmentStatus,
    Attempt,
    JobStatus,
    Member,
    RestartsStatus,
)
from pretrain_operator.observe import Observation, Pod
from pretrain_operator.policies.diagnosis import Cause
from pretrain_operator.progress import report_of_leader, with_progress, with_report
from pretrain_operator.resources import pod_name

MAX_REASONS = 32


def with_attempt(seen: Observation, cause: Cause) -> JobStatus:
    """Status with the present generation in the ledger of attempts."""
    status = with_report(seen, seen.status)
    for pod in seen.pods:
        if pod.exit and pod.exit.message and _led(seen, pod):
            status = with_progress(status, pod.exit.message.progress, seen.now)
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
) -> JobStatus:
    """Status with the next generation: the kept members, new ones in the other places."""
    generation = next_generation(seen)
    assignment = AssignmentStatus(
        generation=generation,
        nonce=seen.nonce,
        in_place_before=_in_place_before(status, kept),
        workers=_places(seen, generation, size, kept),
        created=seen.now,
        not_before=not_before,
    )
    return status.model_copy(update={"assignment": assignment})


def without_echoes(
    seen: Observation, assignment: AssignmentStatus, kept: tuple[Member, ...]
) -> JobStatus:
    """Status with the same generation, which nobody has been told of yet: only ``kept`` stay."""
    workers = _places(seen, assignment.generation, len(assignment.workers), kept)
    before = _in_place_before(seen.status, kept)
    amended = assignment.model_copy(update={"workers": workers, "in_place_before": before})
    return seen.status.model_copy(update={"assignment": amended})


def _places(
    seen: Observation, generation: int, size: int, kept: tuple[Member, ...]
) -> tuple[Member, ...]:
    """The kept members in their places, and new ones in the others."""
    stay = {member.index: member for member in kept}
    return tuple(
        stay.get(index)
        or Member(index=index, created_in=generation, pod=pod_name(seen.name, index, generation))
        for index in range(size)
    )


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
        }
    )
    return seen.status.model_copy(update={"assignment": told})


def _host(address: str) -> str:
    return f"[{address}]" if ":" in address else address


def _in_place_before(status: JobStatus, kept: tuple[Member, ...]) -> int:
    """Restarts in place that the leader's own count doesn't include.

    A pod counts for as long as it lives: one that leads again goes on from where it was, whether or
    not it answers just now, and a new one begins at zero.
    """
    if status.assignment and any(member.index == 0 for member in kept):
        return status.assignment.in_place_before
    return status.restarts.in_place if status.restarts else 0


def without_members(status: JobStatus) -> JobStatus:
    """Status in which nobody is a member; the number of the generation stays."""
    if status.assignment is None:
        return status
    alone = status.assignment.model_copy(update={"workers": (), "leader": None})
    return status.model_copy(update={"assignment": alone})


def next_generation(seen: Observation) -> int:
    """Above all that was ever used, even if the status was lost and only pods are left."""
    used = seen.status.assignment.generation if seen.status.assignment else 0
    return max([used, *(pod.created_in for pod in seen.pods)]) + 1


def _step_seconds(seen: Observation) -> float | None:
    """Duration of a step: from the leader's report, or from what it left behind."""
    report = report_of_leader(seen)
    if report is not None:
        return report.progress.step_seconds
    messages = [pod.exit.message for pod in seen.pods if pod.exit and _led(seen, pod)]
    return next((m.progress.step_seconds for m in messages if m), None)
