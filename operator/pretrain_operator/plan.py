"""The decision: one observation in, one plan out. No clock, no randomness, no I/O.

The status is the operator's memory. Whatever later steps rely on (who is a member, how many
failures were charged) is *written ahead*: such a plan changes the status and does nothing else, and
the next round, which has read it back, creates, tells and deletes. A crash between any two writes
therefore finds either the old decision or the new one, and plans the same again.

:data:`CHECKLIST`, at the end, is the whole decision in order; the first item with an answer wins.
"""

from collections.abc import Callable
from datetime import datetime, timedelta

from pretrain_api import names
from pretrain_api.job import PretrainJob
from pretrain_api.status import JobStatus
from pretrain_operator import children, ledger
from pretrain_operator.actions import Action, Delete, Notice, Plan
from pretrain_operator.cluster import Kind
from pretrain_operator.observe import Observation
from pretrain_operator.policies import cleanup, deadline, diagnosis, restart, volume
from pretrain_operator.policies.diagnosis import Cause
from pretrain_operator.policies.restart import GiveUp
from pretrain_operator.progress import report_of_leader, with_progress
from pretrain_operator.report import report, unless_said
from pretrain_operator.status import INVALID, healed, holds, is_finished, judged, mark, view

CONTROLLER = "pretrain.dev/pretrain-operator"  # spec.managedBy of jobs that are ours
RECHECK_SECONDS = 15.0  # for what no watch reports: claims, names that are taken
STARTING_POLL_SECONDS = 1.0
MIN_POLL_SECONDS, MAX_POLL_SECONDS = 2.0, 10.0


def plan(seen: Observation) -> Plan:
    """Decide what to do about one job."""
    if seen.meta.deletion_timestamp or seen.wishes.managed_by not in (None, CONTROLLER):
        return Plan()  # the garbage collector's, or another controller's
    for judge in CHECKLIST:
        verdict = judge(seen)
        if verdict is not None:
            return verdict
    return Plan()


# --- the end ------------------------------------------------------------------------------------


def clear_up(seen: Observation) -> Plan | None:
    """A finished job is never touched again; its leftovers go, and in time the job itself."""
    if not is_finished(seen.status):
        return None
    # Before the job itself is deleted, and what it owns with it.
    actions: list[Action] = [*children.retain(seen)]
    wakes: list[datetime] = []
    leftovers = cleanup.leftovers(seen.pods)
    linger = cleanup.linger_until(seen.status, completed=holds(seen.status, names.COMPLETE))
    if leftovers and linger and seen.now < linger:
        wakes.append(linger)
    else:
        actions += [children.delete_pod(pod, "JobFinished") for pod in leftovers]
    expires = cleanup.expires_at(seen.status, seen.job.spec) if seen.job else None
    if expires and seen.now < expires:
        wakes.append(expires)
    elif expires:
        actions.append(Delete(Kind.JOB, seen.name, seen.uid, "TTLExpired"))
    return Plan(actions=tuple(actions), wake_after=_seconds_until(seen, wakes))


def complete(seen: Observation) -> Plan | None:
    """Done when the leader's termination message says so, whoever was awake to see it."""
    leader = diagnosis.finished_leader(seen)
    if leader is None or leader.exit is None or leader.exit.message is None:
        return None
    status = with_progress(seen.status, leader.exit.message.progress, seen.now)
    said = f"trained to the end, step {status.progress.step if status.progress else 0}"
    status = _finish(seen, status, names.COMPLETE, "Completed", said)
    return _ahead(status, Notice("Completed", said))


def _fail(seen: Observation, verdict: GiveUp, cause: Cause | None = None) -> Plan:
    status = ledger.with_attempt(seen, cause) if cause else seen.status
    status = _finish(seen, status, names.FAILED, verdict.reason, verdict.message)
    return _ahead(status, Notice(verdict.reason, verdict.message, warning=True))


def _finish(seen: Observation, status: JobStatus, kind: str, reason: str, said: str) -> JobStatus:
    status = mark(seen, status, kind, True, reason, said)
    for other in (names.RUNNING, names.RESTARTING, names.SUSPENDED):
        status = mark(seen, status, other, False, reason, said)
    status = status.model_copy(update={"completion_time": seen.now})
    return view(seen, status, throttle=False)


# --- what keeps it from running -----------------------------------------------------------------


def refuse(seen: Observation) -> Plan | None:
    """A spec that doesn't validate gets no pods, and says why until it is mended.

    Workers that train already are left alone: they go by the configuration they started with.
    """
    if not seen.problems:
        return None
    status = judged(seen, seen.status)
    status = mark(seen, status, names.RUNNING, False, INVALID, "; ".join(seen.problems))
    status = mark(seen, status, names.SUSPENDED, False, "Resumed")
    return Plan(
        actions=children.retain(seen),
        status=view(seen, status),
        events=_complaint(seen),
        wake_after=_seconds_until(seen, [item.at for item in deadline.deadlines(seen)]),
    )


def _complaint(seen: Observation) -> tuple[Notice, ...]:
    if not seen.problems:
        return ()
    warning = Notice(INVALID, "; ".join(seen.problems), warning=True)
    return unless_said(seen, names.FAILED, warning)


def suspend(seen: Observation) -> Plan | None:
    """Suspended: no member, so that every pod is a stray, is told to leave, and saves."""
    if not seen.wishes.suspend:
        return None
    notice = Notice("Suspended", "workers save and leave; training goes on when resumed")
    if seen.members:
        status = ledger.with_attempt(seen, Cause("Suspended", "spec.suspend was set"))
        status = _suspended(seen, ledger.without_members(status))
        return _ahead(status, notice, *_complaint(seen))
    return Plan(
        actions=(*children.retain(seen), *children.tidy(seen, "Suspended")),
        status=_suspended(seen, seen.status),
        events=(*unless_said(seen, names.SUSPENDED, notice), *_complaint(seen)),
    )


def _suspended(seen: Observation, status: JobStatus) -> JobStatus:
    status = status.model_copy(update={"start_time": None})
    status = mark(seen, status, names.SUSPENDED, True, "Suspended", "spec.suspend is set")
    for other in (names.RUNNING, names.RESTARTING):
        status = mark(seen, status, other, False, "Suspended", "spec.suspend is set")
    return view(seen, judged(seen, status))


def expire(seen: Observation) -> Plan | None:
    """Deadlines of the job and of finding nodes."""
    due = [d for d in deadline.deadlines(seen) if d.at <= seen.now]
    if not due:
        return None
    return _fail(seen, min(due, key=lambda item: item.at).verdict)


def hold(seen: Observation) -> Plan | None:
    """No new worker while its volume can't be used; those that train are left alone."""
    around = seen.surroundings
    found = volume.obstacle(seen, _job(seen), around) if around else None
    if found is None or (all(seen.pod_of(member) for member in seen.members) and seen.members):
        return None
    status = mark(seen, seen.status, names.RUNNING, False, found.reason, found.message)
    warning = Notice(found.reason, found.message, warning=True)
    return Plan(
        actions=(*children.retain(seen), *children.tidy(seen, found.reason)),
        status=view(seen, healed(seen, status)),
        events=unless_said(seen, names.RUNNING, warning, found.reason),
        wake_after=RECHECK_SECONDS,
    )


# --- who trains together ------------------------------------------------------------------------


def regroup(seen: Observation) -> Plan | None:
    """A member is gone: the others stay and meet its replacement in a new generation."""
    cause = diagnosis.diagnose(seen)
    if cause is None:
        return None
    kept = tuple(member for member in seen.members if not diagnosis.is_gone(seen, member))
    present = seen.status.assignment
    if cause.echo and not cause.final and present and present.leader is None:
        # One failure ends all agents, but pods end one by one: it stays one attempt, one charge.
        return _ahead(view(seen, ledger.without_echoes(seen, present, kept), throttle=False))
    spec = _job(seen).spec
    verdict = restart.decide(cause, seen.status, spec.recovery, seen.now)
    if isinstance(verdict, GiveUp):
        return _fail(seen, verdict, cause)
    # A free loss during the wait after a failure doesn't cut it short.
    waiting = present.not_before if present and present.leader is None else None
    not_before = max(verdict.not_before, waiting or seen.now)
    wait = (not_before - seen.now).total_seconds()
    status = ledger.with_attempt(seen, cause)
    status = ledger.with_restart(status, cause, verdict.charged)
    status = ledger.with_generation(
        seen,
        status,
        size=spec.workers.replicas,
        kept=kept,
        not_before=not_before if wait > 0 else None,
    )
    said = f"{cause.message}; going on as generation {ledger.next_generation(seen)}"
    said += f" in {wait:.0f} s" if wait > 0 else ""
    status = mark(seen, status, names.RUNNING, False, cause.reason, said)
    status = mark(seen, status, names.RESTARTING, True, cause.reason, said)
    notice = Notice("Restarted", f"{cause.reason}: {said}", warning=cause.charged)
    return _ahead(view(seen, healed(seen, status), throttle=False), notice)


def begin(seen: Observation) -> Plan | None:
    """Without members: the first generation, or the first after a suspension."""
    if seen.members:
        return None
    size = _job(seen).spec.workers.replicas
    said = f"generation {ledger.next_generation(seen)} with {size} workers"
    notice = Notice("Resumed" if seen.status.assignment else "Created", said)
    status = seen.status.model_copy(update={"start_time": seen.status.start_time or seen.now})
    status = ledger.with_generation(seen, status, size=size)
    status = mark(seen, status, names.SUSPENDED, False, "Resumed", said)
    status = mark(seen, status, names.RUNNING, False, "WorkersStarting", said)
    return _ahead(view(seen, healed(seen, status), throttle=False), notice)


def meet(seen: Observation) -> Plan | None:
    """All members have an address and the last generation is over: name the leader."""
    assignment = seen.status.assignment
    if assignment is None or assignment.leader is not None or cleanup.in_the_way(seen):
        return None
    pods = [seen.pod_of(member) for member in seen.members]
    present = [pod for pod in pods if pod and pod.alive and pod.ip]
    if len(present) < len(pods):
        return None
    status = ledger.with_meeting(seen, assignment, present)
    said = f"generation {assignment.generation}: {len(present)} workers meet at {present[0].name}"
    return _ahead(status, Notice("WorkersReady", said))


def converge(seen: Observation) -> Plan:
    """Everything is decided: create what is missing, tell who has not heard, clear away."""
    job = _job(seen)
    status, news = report(seen)
    return Plan(
        actions=(
            *children.prepare(seen, job),
            *children.retain(seen),
            *children.create_pods(seen, job),
            *children.announce(seen),
            *children.tidy(seen, "Replaced"),
        ),
        status=status,
        events=news,
        wake_after=_next_look(seen, status),
    )


# --- small things -------------------------------------------------------------------------------


def _ahead(status: JobStatus, *events: Notice) -> Plan:
    return Plan(status=status, events=events, wake_after=0.0, write_ahead=True)


def _job(seen: Observation) -> PretrainJob:
    if seen.job is None:
        raise ValueError("refuse() must come before whatever needs a valid spec")
    return seen.job


def _next_look(seen: Observation, status: JobStatus) -> float | None:
    """When something is due that no event announces."""
    wakes = [item.at for item in deadline.deadlines(seen)]
    assignment = status.assignment
    if assignment and assignment.not_before and seen.now < assignment.not_before:
        wakes.append(assignment.not_before)
    if assignment and assignment.leader is None:
        limits = (cleanup.written_off_at(pod) for pod in cleanup.in_the_way(seen))
        wakes += [limit for limit in limits if limit]
    elif assignment:
        wakes.append(seen.now + timedelta(seconds=poll_seconds(seen)))
    return _seconds_until(seen, wakes)


def poll_seconds(seen: Observation) -> float:
    """How soon to ask the leader again: about once a step, more often while it starts."""
    if not holds(seen.status, names.RUNNING):
        return STARTING_POLL_SECONDS
    found = report_of_leader(seen)
    seconds = found.progress.step_seconds if found else None
    return min(MAX_POLL_SECONDS, max(MIN_POLL_SECONDS, seconds or MAX_POLL_SECONDS))


def _seconds_until(seen: Observation, times: list[datetime]) -> float | None:
    if not times:
        return None
    return max(0.1, (min(times) - seen.now).total_seconds())


CHECKLIST: tuple[Callable[[Observation], Plan | None], ...] = (
    clear_up,  # finished: nothing but cleaning up
    complete,  # the leader left the completion marker
    suspend,  # by wish
    expire,  # out of time
    refuse,  # the spec doesn't validate; below this line it does
    regroup,  # a member is gone: restart or give up
    hold,  # the volume can't be used
    begin,  # nobody is a member yet
    meet,  # all are there: name the leader
    converge,  # make it so, and report
)
