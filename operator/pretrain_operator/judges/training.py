"""Who trains together: members that are gone, a first generation, the meeting, the daily round."""

from datetime import datetime, timedelta

from pretrain_api import names
from pretrain_api.estimate.plan import too_large
from pretrain_api.status import JobStatus
from pretrain_operator import children, ledger
from pretrain_operator.actions import Notice, Plan
from pretrain_operator.judges.base import STARTING_POLL_SECONDS, ahead, job_of, seconds_until
from pretrain_operator.judges.ending import fail
from pretrain_operator.observe import Observation
from pretrain_operator.policies import cleanup, deadline, diagnosis, elastic, restart, silence
from pretrain_operator.policies.restart import GiveUp
from pretrain_operator.progress import report_of_leader
from pretrain_operator.report import report
from pretrain_operator.status import healed, holds, mark, view

MIN_POLL_SECONDS, MAX_POLL_SECONDS = 2.0, 10.0


def regroup(seen: Observation) -> Plan | None:
    """A member is gone: the others stay and meet its replacement in a new generation."""
    cause = diagnosis.diagnose(seen)
    if cause is None:
        return None
    present = seen.status.assignment
    if cause.echo and not cause.final and present and present.leader is None:
        # One failure ends all agents, but pods end one by one: it stays one attempt, one charge.
        amended = ledger.without_echoes(seen, present, ledger.staying(seen))
        return ahead(seen, view(seen, amended))
    spec = job_of(seen).spec
    verdict = restart.decide(cause, seen.status, spec.recovery, seen.now)
    if isinstance(verdict, GiveUp):
        return fail(seen, verdict, cause)
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
        kept=ledger.staying(seen),
        not_before=not_before if wait > 0 else None,
    )
    said = f"{cause.message}; going on as generation {ledger.next_generation(seen)}"
    said += f" in {wait:.0f} s" if wait > 0 else ""
    status = mark(seen, status, names.RUNNING, False, cause.reason, said)
    status = mark(seen, status, names.RESTARTING, True, cause.reason, said)
    notice = Notice("Restarted", f"{cause.reason}: {said}", warning=cause.charged)
    return ahead(seen, view(seen, healed(seen, status)), notice)


def begin(seen: Observation) -> Plan | None:
    """Without members: the first generation, or the first after a suspension."""
    if seen.members:
        return None
    before, resumed = seen.status.assignment, holds(seen.status, names.SUSPENDED)
    until = before.not_before if before and not resumed else None
    if until is not None and seen.now < until:
        return _stay_away(seen, until)
    size = job_of(seen).spec.workers.replicas
    said = f"generation {ledger.next_generation(seen)} with {size} workers"
    notice = Notice("Resumed" if resumed else "TriedAgain" if before else "Created", said)
    status = seen.status.model_copy(update={"start_time": seen.status.start_time or seen.now})
    status = ledger.with_generation(
        seen, status, size=size, releases=before.releases if before else 0
    )
    status = mark(seen, status, names.SUSPENDED, False, "Resumed", said)
    status = mark(seen, status, names.RUNNING, False, "WorkersStarting", said)
    return ahead(seen, view(seen, healed(seen, status)), notice, *_warnings(seen))


def _warnings(seen: Observation) -> tuple[Notice, ...]:
    """What is worth saying before pods are there, but is no reason not to have them."""
    job = job_of(seen)
    workers = job.spec.workers
    large = too_large(
        job.run_config(),
        workers.replicas * workers.processes_per_worker,
        workers.pod_template.node_selector,
    )
    found = {"MayRunOutOfMemory": large, "GpusIdle": workers.idle_gpus}
    return tuple(Notice(reason, said, warning=True) for reason, said in found.items() if said)


def _stay_away(seen: Observation, until: datetime) -> Plan:
    """Released pods come back later. A job that is resumed, by a queue or by hand, doesn't wait."""
    return Plan(
        actions=(*children.retain(seen), *children.tidy(seen, "Released")),
        status=view(seen, healed(seen, seen.status)),
        wake_after=seconds_until(seen, [until]),
    )


def meet(seen: Observation) -> Plan | None:
    """All members have an address and the last generation is over: name the leader."""
    assignment = seen.status.assignment
    if assignment is None or assignment.leader is not None or cleanup.in_the_way(seen):
        return None
    pods = [seen.pod_of(member) for member in seen.members]
    present = [pod for pod in pods if pod and pod.alive and pod.ip]
    if len(present) < len(pods):
        return None
    status = view(seen, ledger.with_meeting(seen, assignment, present))
    return ahead(seen, status)


def converge(seen: Observation) -> Plan:
    """Everything is decided: create what is missing, tell who has not heard, clear away."""
    job = job_of(seen)
    status, news = report(seen)
    pods = children.create_pods(seen, job)
    return Plan(
        actions=(
            *children.prepare(seen, job),
            *children.retain(seen),
            *pods,
            *children.announce(seen),
            *children.tidy(seen, "Replaced"),
        ),
        status=status,
        events=news,
        wake_after=_next_look(seen, status, creating=bool(pods)),
    )


def _next_look(seen: Observation, status: JobStatus, *, creating: bool) -> float | None:
    """When something is due that no event announces: what is ``creating`` now is one's own news."""
    wakes = [*(item.at for item in deadline.deadlines(seen)), *elastic.wakes(seen)]
    if creating:
        wakes.append(seen.now + timedelta(seconds=STARTING_POLL_SECONDS))
    assignment = status.assignment
    if assignment and assignment.not_before and seen.now < assignment.not_before:
        wakes.append(assignment.not_before)
    if assignment and assignment.leader is None:
        limits = (cleanup.written_off_at(pod) for pod in cleanup.in_the_way(seen))
        wakes += [limit for limit in limits if limit]
    elif assignment:
        wakes.append(seen.now + timedelta(seconds=poll_seconds(seen)))
    return seconds_until(seen, wakes)


def poll_seconds(seen: Observation) -> float:
    """How soon to ask the leader again: about once a step, more often while it does none."""
    if not holds(seen.status, names.RUNNING) or silence.stands_still(seen):
        return STARTING_POLL_SECONDS
    found = report_of_leader(seen)
    seconds = found.progress.step_seconds if found else None
    return min(MAX_POLL_SECONDS, max(MIN_POLL_SECONDS, seconds or MAX_POLL_SECONDS))
