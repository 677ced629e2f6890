"""The end of a job: complete, failed or out of time, and what is cleared away after it."""

from datetime import datetime

from pretrain_api import names
from pretrain_api.status import JobStatus
from pretrain_operator import children, ledger
from pretrain_operator.actions import Action, Delete, Notice, Plan
from pretrain_operator.cluster import Kind
from pretrain_operator.judges.base import ahead, seconds_until
from pretrain_operator.observe import Observation
from pretrain_operator.policies import cleanup, deadline, diagnosis
from pretrain_operator.policies.diagnosis import Cause
from pretrain_operator.policies.restart import GiveUp
from pretrain_operator.progress import with_last_words
from pretrain_operator.status import holds, is_finished, mark, view


def clear_up(seen: Observation) -> Plan | None:
    """A finished job is never touched again; its leftovers go, and in time the job itself."""
    if not is_finished(seen.status):
        return None
    completed = holds(seen.status, names.COMPLETE)  # by the generation that holds the root
    # Before the job itself is deleted, and what it owns with it.
    actions: list[Action] = [*children.retain(seen)]
    wakes: list[datetime] = []
    leftovers = cleanup.leftovers(seen.pods)
    linger = cleanup.linger_until(seen.status, completed=completed)
    if leftovers and linger and seen.now < linger:
        wakes.append(linger)
    else:
        actions += [children.delete_pod(pod, "JobFinished") for pod in leftovers]
    actions += children.free_quota(seen)
    actions += [children.force_delete(p) for p in cleanup.out_of_reach(seen, fenced=completed)]
    expires = cleanup.expires_at(seen.status, seen.job.spec) if seen.job else None
    if expires and seen.now < expires:
        wakes.append(expires)
    elif expires:
        actions.append(Delete(Kind.JOB, seen.name, seen.uid, "TTLExpired"))
    return Plan(actions=tuple(actions), wake_after=seconds_until(seen, wakes))


def complete(seen: Observation) -> Plan | None:
    """Done when the leader's termination message says so, whoever was awake to see it."""
    leader = diagnosis.finished_leader(seen)
    if leader is None or leader.exit is None or leader.exit.message is None:
        return None
    status = with_last_words(seen, seen.status, leader.exit.message)
    said = f"trained to the end, step {status.progress.step if status.progress else 0}"
    status = _finish(seen, status, names.COMPLETE, "Completed", said)
    return ahead(seen, status, Notice("Completed", said))


def expire(seen: Observation) -> Plan | None:
    """Deadlines of the job and of finding nodes. A suspended job has none."""
    due = [d for d in deadline.deadlines(seen) if d.at <= seen.now]
    if not due or seen.wishes.suspend:
        return None
    return fail(seen, min(due, key=lambda item: item.at).verdict)


def fail(seen: Observation, verdict: GiveUp, cause: Cause | None = None) -> Plan:
    """The job fails; ``cause`` is what ended the present generation, if something did."""
    status = ledger.with_attempt(seen, cause) if cause else seen.status
    status = _finish(seen, status, names.FAILED, verdict.reason, verdict.message)
    return ahead(seen, status, Notice(verdict.reason, verdict.message, warning=True))


def _finish(seen: Observation, status: JobStatus, kind: str, reason: str, said: str) -> JobStatus:
    status = mark(seen, status, kind, True, reason, said)
    for other in (names.RUNNING, names.RESTARTING, names.SUSPENDED):
        status = mark(seen, status, other, False, reason, said)
    status = view(seen, status.model_copy(update={"completion_time": seen.now}))
    # What still runs is about to go, and nobody writes this status any more.
    workers = status.workers and status.workers.model_copy(update={"active": 0})
    return status.model_copy(update={"workers": workers, "replicas": 0})
