"""What several judges need."""

from datetime import datetime

from pretrain_api.job import PretrainJob
from pretrain_api.status import JobStatus
from pretrain_operator.actions import Notice, Plan
from pretrain_operator.observe import Observation
from pretrain_operator.report import reported

RECHECK_SECONDS = 15.0  # for what no watch reports: claims, names that are taken
STARTING_POLL_SECONDS = 1.0


def ahead(seen: Observation, status: JobStatus, *events: Notice) -> Plan:
    """A plan that is written ahead: whatever relies on it is for the next round.

    So is what changed in the spec, unless this is the first decision or the last: it counts as
    observed only then.
    """
    if seen.status.observed_generation is not None and status.completion_time is None:
        observed = {"observed_generation": seen.status.observed_generation}
        status = status.model_copy(update=observed)
    events = (*reported(seen, status), *events)
    return Plan(status=status, events=events, wake_after=0.0, write_ahead=True)


def job_of(seen: Observation) -> PretrainJob:
    """The job as its spec says. Raises ValueError if that doesn't validate."""
    if seen.job is None:
        raise ValueError("refuse() must come before whatever needs a valid spec")
    return seen.job


def seconds_until(seen: Observation, times: list[datetime]) -> float | None:
    """Seconds until the first of these times; None if there is none."""
    if not times:
        return None
    return max(0.1, (min(times) - seen.now).total_seconds())
