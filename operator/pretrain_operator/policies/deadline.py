"""The time after which a job fails."""

from dataclasses import dataclass
from datetime import datetime, timedelta

from pretrain_operator.observe import Observation
from pretrain_operator.policies.restart import GiveUp


@dataclass(frozen=True, slots=True)
class Deadline:
    """When the job fails, and why."""

    at: datetime
    verdict: GiveUp


def deadlines(seen: Observation) -> list[Deadline]:
    """All deadlines that apply now, in no order."""
    seconds, start = seen.wishes.active_deadline_seconds, seen.status.start_time
    if seconds is None or start is None:
        return []
    message = f"the job ran for activeDeadlineSeconds ({seconds} s) without completing"
    at = start + timedelta(seconds=seconds)
    return [Deadline(at, GiveUp("DeadlineExceeded", message))]
