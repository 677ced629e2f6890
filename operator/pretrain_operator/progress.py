"""How far training is: from a worker's report to the status people read.

Numbers change all the time, so they are written at a limited :func:`pace`, sooner only if there is
other news. What is not finite is left out: JSON has no NaN.
"""

import math
from datetime import UTC, datetime
from typing import Any

from pretrain_api.status import (
    MAX_ATTEMPTS,
    CheckpointStatus,
    JobStatus,
    ProgressStatus,
    RestartsStatus,
)
from pretrain_api.wire import Phase, Progress, TerminationMessage, WorkerStatus
from pretrain_operator.observe import Observation

PROGRESS_SECONDS = 10.0  # between two writes of one job's numbers, at least
WRITES_PER_SECOND = 10.0  # of all jobs' numbers, at most
TRAINED_PHASES = (Phase.STEP, Phase.EVAL, Phase.SAVE, Phase.DONE)


def pace(jobs: int) -> float:
    """Seconds between two writes of a job's numbers, when there are so many jobs.

    A write costs the API server milliseconds, so a thousand jobs must not have one each all the
    time. Metrics are as fresh as ever.
    """
    return max(PROGRESS_SECONDS, jobs / WRITES_PER_SECOND)


def report_of_leader(seen: Observation) -> WorkerStatus | None:
    """The leader's report, if it speaks of the present generation."""
    report, assignment = seen.leader_report, seen.status.assignment
    if report is None or assignment is None or report.generation != assignment.generation:
        return None
    return report


def trains(seen: Observation) -> bool:
    """Whether the leader says that the present generation has trained a step."""
    report = report_of_leader(seen)
    return report is not None and report.phase in TRAINED_PHASES


def with_progress(status: JobStatus, progress: Progress, now: datetime) -> JobStatus:
    """Status with what a worker reported. A worker that has yet to load reports nothing."""
    if progress.steps == 0:
        return status
    news, before = progress_status(progress, now), status.progress
    if before is not None and news.model_copy(update={"updated": before.updated}) == before:
        news = before
    update: dict[str, Any] = {"progress": news}
    if progress.checkpoint is not None or progress.skipped:
        update["checkpoint"] = checkpoint_status(status, progress)
    return status.model_copy(update=update)


def with_last_words(seen: Observation, status: JobStatus, last: TerminationMessage) -> JobStatus:
    """Status with what the leader left behind: news since it was last asked."""
    status = with_progress(status, last.progress, seen.now)
    assignment = seen.status.assignment
    if assignment is None or last.generation != assignment.generation:
        return status  # its count belongs to another leader's
    return with_in_place(status, assignment.in_place_before + last.restarts_in_place)


def with_in_place(status: JobStatus, count: int) -> JobStatus:
    """Status with this many restarts in place."""
    restarts = status.restarts or RestartsStatus()
    return status.model_copy(update={"restarts": restarts.model_copy(update={"in_place": count})})


def progress_status(progress: Progress, now: datetime) -> ProgressStatus:
    """Progress in the form of the status; numbers that are not finite are left out."""
    return ProgressStatus(
        step=progress.step,
        steps=progress.steps,
        summary=f"{progress.step}/{progress.steps}",
        tokens=progress.tokens,
        loss=_number(progress.loss, 4),
        first_loss=_number(progress.first_loss, 4),
        grad_norm=_number(progress.grad_norm, 4),
        learning_rate=_number(progress.learning_rate, 10),
        tokens_per_second=_number(progress.tokens_per_second, 1),
        mfu=_number(progress.mfu * 100 if progress.mfu is not None else None, 2),
        eta=_eta(progress),
        resumed_from=progress.resumed_from,
        ledger=progress.ledger,
        updated=now,
    )


def checkpoint_status(status: JobStatus, progress: Progress) -> CheckpointStatus | None:
    """The newest committed checkpoint, and those passed over."""
    report, before = progress.checkpoint, status.checkpoint
    skipped = progress.skipped[-MAX_ATTEMPTS:]
    if report is None:
        return before.model_copy(update={"skipped": skipped}) if before else None
    return CheckpointStatus(
        step=report.step,
        time=datetime.fromtimestamp(int(report.time), UTC),
        path=report.path,
        bytes=report.bytes,
        seconds=_number(report.seconds or None, 2),
        verified=report.verified,
        skipped=skipped,
    )


def _number(value: float | None, digits: int) -> float | None:
    return round(value, digits) if value is not None and math.isfinite(value) else None


def _eta(progress: Progress) -> str | None:
    seconds = progress.step_seconds
    if not seconds or not math.isfinite(seconds):
        return None
    return duration(seconds * max(0, progress.steps - progress.step))


def duration(seconds: float) -> str:
    """Two leading units of a time span, as kubectl writes ages: 3d4h, 2h5m, 41s."""
    left = round(seconds)
    parts: list[str] = []
    for unit, size in (("d", 86_400), ("h", 3600), ("m", 60), ("s", 1)):
        amount, left = divmod(left, size)
        if amount or (unit == "s" and not parts):
            parts.append(f"{amount}{unit}")
        elif parts:
            break
    return "".join(parts[:2])


def goodput(status: JobStatus, progress: Progress, now: datetime) -> float | None:
    """Share of the time since startTime spent on steps that count, in percent.

    Steps from before the last suspension don't count, as its time doesn't either.
    """
    if status.start_time is None or not progress.step_seconds:
        return None
    elapsed = (now - status.start_time).total_seconds()
    paused = [a for a in status.attempts if a.reason == "Suspended"]
    first = (paused[-1].checkpoint_step or 0) if paused else 0
    if elapsed <= 0:
        return None
    share = (progress.step - first) * progress.step_seconds / elapsed
    return round(100 * min(max(share, 0.0), 1.0), 1)


def with_report(seen: Observation, status: JobStatus) -> JobStatus:
    """Status with the leader's report, if it has one for this generation."""
    report, assignment = report_of_leader(seen), status.assignment
    if report is None or assignment is None:
        return status
    status = with_progress(status, report.progress, seen.now)
    status = with_in_place(status, assignment.in_place_before + report.restarts_in_place)
    share = goodput(status, report.progress, seen.now)
    return status if share is None else status.model_copy(update={"goodput": share})
