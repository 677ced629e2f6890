"""Times after which a job fails: its own deadline, and that of finding nodes for its workers."""

from dataclasses import dataclass
from datetime import datetime, timedelta

from pretrain_api.job import JobSpec
from pretrain_operator.observe import Observation
from pretrain_operator.policies.restart import GiveUp


@dataclass(frozen=True, slots=True)
class Deadline:
    """When the job fails, and why."""

    at: datetime
    verdict: GiveUp


def deadlines(seen: Observation) -> list[Deadline]:
    """All deadlines that apply now, in no order."""
    return [*_active(seen), *(_scheduling(seen, seen.job.spec) if seen.job else ())]


def _active(seen: Observation) -> list[Deadline]:
    seconds, start = seen.wishes.active_deadline_seconds, seen.status.start_time
    if seconds is None or start is None:
        return []
    message = f"the job ran for activeDeadlineSeconds ({seconds} s) without completing"
    at = start + timedelta(seconds=seconds)
    return [Deadline(at, GiveUp("DeadlineExceeded", message))]


def _scheduling(seen: Observation, spec: JobSpec) -> list[Deadline]:
    seconds = spec.scheduling_timeout_seconds
    if seconds is None:
        return []
    found: list[Deadline] = []
    for pod in (seen.pod_of(member) for member in seen.members):
        if pod is None or not pod.alive or pod.node is not None:
            continue
        why = f": {pod.trouble.message}" if pod.trouble and pod.trouble.message else ""
        message = f"pod {pod.name} found no node within {seconds} s{why}"
        at = pod.created + timedelta(seconds=seconds)
        found.append(Deadline(at, GiveUp("SchedulingTimeout", message)))
    return found
