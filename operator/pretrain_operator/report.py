"""Status and Events of a job that is under way."""

from pretrain_api import names
from pretrain_api.status import JobStatus
from pretrain_operator.actions import Notice
from pretrain_operator.observe import Observation
from pretrain_operator.policies import elastic
from pretrain_operator.progress import report_of_leader, with_report
from pretrain_operator.status import (
    STARTING_REASONS,
    condition_of,
    healed,
    holds,
    mark,
    training_state,
    view,
)

HUNG = "Hung"  # the reason of a failure that nobody but a watchdog noticed


def report(seen: Observation) -> tuple[JobStatus, tuple[Notice, ...]]:
    """Status and news while the job is under way."""
    value, reason, message = training_state(seen)
    lacking = elastic.shortage(seen) if value else None
    if lacking and not message.endswith(lacking):
        message = f"{message}, {lacking}"
    status = healed(seen, with_report(seen, seen.status))
    status = mark(seen, status, names.SUSPENDED, False, "Resumed")
    # While restarting, the reason of the restart says more than that workers are starting.
    if value or reason not in STARTING_REASONS or not holds(status, names.RESTARTING):
        status = mark(seen, status, names.RUNNING, value, reason, message)
    if value:
        status = mark(seen, status, names.RESTARTING, False, reason, message)
    status = view(seen, status)
    news = list(reported(seen, status))
    if value and not holds(seen.status, names.RUNNING):
        news.append(Notice("Training", message))
    elif not value and reason not in STARTING_REASONS:
        warning = Notice(reason, message, warning=True)
        news += unless_said(seen, names.RUNNING, warning, reason)
    return status, tuple(news)


def reported(seen: Observation, status: JobStatus) -> tuple[Notice, ...]:
    """News from workers that are about to be written down for the first time with ``status``."""
    before, after = seen.status.progress, status.progress
    news: list[Notice] = []
    resumed = after.resumed_from if after else None
    if resumed is not None and (before is None or before.resumed_from != resumed):
        news.append(Notice("ResumedFrom", f"checkpoint of step {resumed}"))
    skipped = status.checkpoint.skipped if status.checkpoint else ()
    known = seen.status.checkpoint.skipped if seen.status.checkpoint else ()
    news += [
        Notice("CheckpointSkipped", f"step {item.step}: {item.reason}", warning=True)
        for item in skipped
        if item not in known
    ]
    news += _restarted_in_place(seen, status)
    return tuple(news)


def _restarted_in_place(seen: Observation, status: JobStatus) -> list[Notice]:
    """What the leader says of the newest restart, if the status is about to count one more."""
    before = seen.status.restarts.in_place if seen.status.restarts else 0
    more = (status.restarts.in_place if status.restarts else 0) - before
    leader = report_of_leader(seen)
    if more < 1 or leader is None:
        return []
    what = "ranks were started again in their pods" + (f", {more} times" if more > 1 else "")
    failure = leader.last_failure
    if failure is None:
        return [Notice("RestartedInPlace", what)]
    who = "" if failure.rank is None else f"rank {failure.rank}: "
    why = f"{who}{failure.reason}: {failure.message}".strip().removesuffix(":")
    hung = failure.reason == HUNG
    return [Notice("RestartedInPlace", f"{what}; {why}", warning=hung)]


def unless_said(
    seen: Observation, kind: str, notice: Notice, reason: str | None = None
) -> tuple[Notice, ...]:
    """The notice, unless the condition says the same already."""
    before = condition_of(seen.status, kind)
    if before is None:
        return (notice,)
    said = before.reason == reason if reason else before.status == "True"
    return () if said else (notice,)
