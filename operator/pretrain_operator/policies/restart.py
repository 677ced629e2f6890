"""Whether to start again after a failure, and how soon.

A budget counts charged failures in a sliding window and is emptied by progress, which means a newer
committed checkpoint: a step without a checkpoint is repeated and is no progress. The first failure
may have been chance, so the restart after it doesn't wait; within the window the wait then doubles.
Free restarts are not counted, but when they come thick and fast (a pod evicted as soon as it runs)
they wait as well.
"""

from dataclasses import dataclass
from datetime import datetime, timedelta

from pretrain_api.job import Recovery
from pretrain_api.status import MAX_ATTEMPTS, Attempt, JobStatus
from pretrain_operator.policies import elastic
from pretrain_operator.policies.diagnosis import Cause

FREE_AT_ONCE = 2  # free restarts without progress that don't wait
# Reasons of attempts that ended by wish, or for want of nodes: none of them counts.
UNCOUNTED = ("Suspended", elastic.RESIZED, elastic.SHRUNK, elastic.GROWN)


@dataclass(frozen=True, slots=True)
class Restart:
    """Start again, not before the given time. ``charged``: failures now counted in the window."""

    not_before: datetime
    charged: int


@dataclass(frozen=True, slots=True)
class GiveUp:
    """Fail the job."""

    reason: str
    message: str


def decide(cause: Cause, status: JobStatus, recovery: Recovery, now: datetime) -> Restart | GiveUp:
    """What to do about ``cause``."""
    if cause.final:
        return GiveUp(cause.reason, cause.message)
    charged = charged_in_window(status, recovery, now)
    if not cause.charged:
        free = len(_recent(status, recovery, now, charged=False)) + 1
        return Restart(now + backoff(recovery, free - FREE_AT_ONCE), charged)
    if charged >= recovery.max_restarts:
        return GiveUp(
            "BackoffLimitExceeded",
            f"{charged + 1} failures within {recovery.window_seconds} s without a new checkpoint, "
            f"recovery.maxRestarts is {recovery.max_restarts}; the last one: {cause.message}",
        )
    return Restart(now + backoff(recovery, charged), charged + 1)


def charged_in_window(status: JobStatus, recovery: Recovery, now: datetime) -> int:
    """Failures that count now: in the window, and no newer checkpoint since."""
    recent = _recent(status, recovery, now, charged=True)
    if len(status.attempts) < MAX_ATTEMPTS or status.attempts[0] not in recent:
        return len(recent)
    # The ledger is full of them, so older ones have been dropped: the counter remembers.
    return max(len(recent), status.restarts.charged if status.restarts else 0)


def backoff(recovery: Recovery, earlier: int) -> timedelta:
    """Wait before a restart that comes after so many other ones in the window."""
    if earlier < 1:
        return timedelta()
    doubled = recovery.backoff_seconds * 2 ** min(earlier - 1, 30)
    return timedelta(seconds=min(doubled, recovery.max_backoff_seconds))


def _recent(
    status: JobStatus, recovery: Recovery, now: datetime, *, charged: bool
) -> list[Attempt]:
    since = now - timedelta(seconds=recovery.window_seconds)
    newest = status.checkpoint.step if status.checkpoint else None
    return [
        attempt
        for attempt in status.attempts
        if attempt.charged is charged
        and attempt.reason not in UNCOUNTED
        and attempt.ended > since
        and attempt.checkpoint_step == newest
    ]
