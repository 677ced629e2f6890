"""Conditions and phase: what people and programs wait for.

A condition keeps its transition time while its status stays the same. The phase is derived from the
conditions here and nowhere else.
"""

from dataclasses import replace
from datetime import datetime, timedelta
from typing import Literal

from pretrain_api import names
from pretrain_api.status import Condition, JobPhase, JobStatus, RestartsStatus, WorkersStatus
from pretrain_operator.observe import Observation, Pod
from pretrain_operator.policies.diagnosis import finished_well
from pretrain_operator.progress import report_of_leader, trains

INVALID = "Invalid"  # the one reason of Failed that heals
STARTING_REASONS = ("WorkersStarting", "WorldStarting")
# A leader that can't be asked (a network policy, a mesh) must not look like one that doesn't train.
LEADER_SILENCE = timedelta(seconds=60)
NUMBERS = ("phase", "workers", "replicas", "progress", "goodput", "checkpoint")
MAX_CONDITION = 32_768  # characters of a condition's message that the API takes


def condition_of(status: JobStatus, kind: str) -> Condition | None:
    """The condition of that type, if it was ever set."""
    return next((c for c in status.conditions if c.type == kind), None)


def holds(status: JobStatus, kind: str) -> bool:
    """Whether a condition is set and true."""
    found = condition_of(status, kind)
    return found is not None and found.status == "True"


def is_finished(status: JobStatus) -> bool:
    """Complete, or failed for good. An invalid spec can be mended, so it is not the end."""
    failed = condition_of(status, names.FAILED)
    for_good = failed is not None and failed.status == "True" and failed.reason != INVALID
    return holds(status, names.COMPLETE) or for_good


def with_condition(
    status: JobStatus,
    kind: str,
    value: bool,
    reason: str,
    message: str = "",
    *,
    now: datetime,
    generation: int | None,
) -> JobStatus:
    """Status with one condition set.

    One that was never true is not added as false, but for Running, which everybody looks for.
    """
    before = condition_of(status, kind)
    if before is None and not value and kind != names.RUNNING:
        return status
    word: Literal["True", "False"] = "True" if value else "False"
    same = before is not None and before.status == word
    after = Condition(
        type=kind,
        status=word,
        reason=reason,
        message=message[:MAX_CONDITION],
        last_transition_time=before.last_transition_time if before and same else now,
        observed_generation=generation,
    )
    others = tuple(c for c in status.conditions if c.type != kind)
    ordered = tuple(sorted((*others, after), key=lambda condition: condition.type))
    return status.model_copy(update={"conditions": ordered})


def phase_of(status: JobStatus, seen: Observation) -> JobPhase:
    """One word for people."""
    for kind, phase in (
        (names.COMPLETE, JobPhase.COMPLETE),
        (names.FAILED, JobPhase.FAILED),
        (names.SUSPENDED, JobPhase.SUSPENDED),
        (names.RESTARTING, JobPhase.RESTARTING),
        (names.RUNNING, JobPhase.RUNNING),
    ):
        if holds(status, kind):
            return phase
    pods = [seen.pod_of(member) for member in seen.members]
    placed = [pod for pod in pods if pod and pod.alive and pod.node and not pod.trouble]
    return JobPhase.STARTING if pods and len(placed) == len(pods) else JobPhase.PENDING


def workers_status(seen: Observation, desired: int) -> WorkersStatus:
    """How many workers there are."""
    pods = [pod for pod in (seen.pod_of(member) for member in seen.members) if pod]
    # One that trained to the end still counts: a complete job shows 2/2, not how fast pods went.
    ready = sum((pod.alive and pod.ready) or finished_well(pod) for pod in pods)
    return WorkersStatus(
        desired=desired,
        active=sum(not pod.over for pod in seen.pods),
        ready=ready,
        succeeded=sum(finished_well(pod) for pod in pods),
        summary=f"{ready}/{desired}",
    )


def training_state(seen: Observation) -> tuple[bool, str, str]:
    """Whether the workers train: value, reason and message of the Running condition."""
    pods = [seen.pod_of(member) for member in seen.members]
    for pod in pods:
        if pod is not None and pod.alive and pod.trouble is not None:
            return False, pod.trouble.reason, f"pod {pod.name}: {pod.trouble.message}"
    ready = [pod for pod in pods if pod and (pod.ready or finished_well(pod))]
    assignment = seen.status.assignment
    if assignment is None or assignment.leader is None or len(ready) < len(pods) or not pods:
        return False, "WorkersStarting", f"{len(ready)} of {len(pods)} workers are ready"
    report = report_of_leader(seen)
    before = condition_of(seen.status, names.RUNNING)
    if before and before.status == "True" and report is None:
        return True, before.reason, before.message
    if (before and before.status == "True") or trains(seen):
        return True, "Training", f"generation {assignment.generation} trains"
    if report is not None:
        return False, "WorldStarting", f"the leader is in phase {report.phase}"
    if assignment.announced and seen.now - assignment.announced < LEADER_SILENCE:
        return False, "WorldStarting", "the leader has not reported yet"
    return True, "LeaderSilent", "all workers are ready, but the leader's status can't be read"


def is_minor(before: JobStatus, after: JobStatus) -> bool:
    """Whether only numbers, the phase and the wording of conditions are new."""
    judgements = [[(c.type, c.status) for c in status.conditions] for status in (before, after)]
    if before == after or judgements[0] != judgements[1]:
        return False
    numbers = {name: getattr(before, name) for name in (*NUMBERS, "conditions")}
    return after.model_copy(update=numbers) == before


def sizes(pods: tuple[Pod, ...]) -> int:
    """Workers that exist, for kubectl scale."""
    return sum(not pod.over for pod in pods)


def mark(
    seen: Observation, status: JobStatus, kind: str, value: bool, reason: str, message: str = ""
) -> JobStatus:
    """:func:`with_condition` as of this observation."""
    generation = seen.meta.generation
    return with_condition(status, kind, value, reason, message, now=seen.now, generation=generation)


def healed(seen: Observation, status: JobStatus) -> JobStatus:
    """Status of a job whose spec was invalid and is not any more; others stay as they are."""
    return mark(seen, status, names.FAILED, False, "Valid", "the spec was corrected")


def judged(seen: Observation, status: JobStatus) -> JobStatus:
    """Status that says whether the spec is valid."""
    if not seen.problems:
        return healed(seen, status)
    return mark(seen, status, names.FAILED, True, INVALID, "; ".join(seen.problems))


def view(seen: Observation, status: JobStatus) -> JobStatus:
    """Status with everything that follows from pods and conditions."""
    # Members of the status being built: a plan that changes them shows their pods at once.
    built = replace(seen, status=status)
    desired = seen.job.spec.workers.replicas if seen.job else len(seen.members)
    return status.model_copy(
        update={
            "observed_generation": seen.meta.generation,
            "phase": phase_of(status, built),
            "workers": workers_status(built, desired),
            "replicas": sizes(seen.pods),
            "selector": f"{names.LABEL_JOB_UID}={seen.uid}",
            "restarts": status.restarts or RestartsStatus(),
        }
    )
