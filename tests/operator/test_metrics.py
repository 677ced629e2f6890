"""Metrics: what is counted once, and what goes with a job or with the Lease."""

from datetime import UTC, datetime

from pretrain_api.status import JobPhase, JobStatus, RestartsStatus
from pretrain_api.wire import Timeline
from pretrain_operator.metrics import Metrics

JOB = ("default", "llama")
LABELS = {"namespace": "default", "job": "llama"}


def recoveries(metrics: Metrics) -> tuple[float, float]:
    """How many were observed, and their seconds."""
    name = "pretrain_job_recovery_seconds"
    values = (metrics.registry.get_sample_value(f"{name}_{each}") for each in ("count", "sum"))
    count, total = values
    return count or 0.0, total or 0.0


def test_ends_of_jobs_are_counted_from_nought() -> None:
    metrics = Metrics()

    def ended() -> dict[str, float | None]:
        shown = metrics.registry.get_sample_value
        phases = ("Complete", "Failed")
        return {each: shown("pretrain_jobs_finished_total", {"phase": each}) for each in phases}

    # There before the first job ends, or `increase` would not see that one.
    assert ended() == {"Complete": 0, "Failed": 0}
    over = JobStatus(phase=JobPhase.FAILED, completion_time=datetime(2026, 1, 1, tzinfo=UTC))
    metrics.count_restarts(JobStatus(phase=JobPhase.RUNNING), over)
    metrics.count_restarts(over, over)
    assert ended() == {"Complete": 0, "Failed": 1}


def timeline(number: int, trained: float | None, stopped: float | None = 100.0) -> Timeline:
    return Timeline(generation=1, round=number, stopped=stopped, trained=trained)


def test_a_recovery_is_observed_once_when_it_trains_again() -> None:
    metrics = Metrics()
    metrics.record_start(*JOB, timeline(0, 90.0, stopped=None))
    for trained in (None, None, 102.5, 102.5):
        metrics.record_start(*JOB, timeline(1, trained))
    assert recoveries(metrics) == (1, 2.5)
    metrics.record_start(*JOB, timeline(2, 99.0))  # clocks of workers may be set back
    assert recoveries(metrics) == (2, 2.5)


def test_a_first_start_is_no_recovery_and_an_old_one_is_not_observed_again() -> None:
    metrics = Metrics()
    metrics.record_start(*JOB, timeline(0, None, stopped=None))
    metrics.record_start(*JOB, timeline(0, 90.0, stopped=None))
    assert recoveries(metrics) == (0, 0)
    after_a_restart_of_the_operator = Metrics()
    after_a_restart_of_the_operator.record_start(*JOB, timeline(3, 101.0))
    assert recoveries(after_a_restart_of_the_operator) == (0, 0)


def test_jobs_are_shown_by_who_leads() -> None:
    metrics = Metrics()
    shown = metrics.registry.get_sample_value
    restarts = RestartsStatus(total=1, in_place=3)
    metrics.lead(True)
    metrics.record(*JOB, JobStatus(phase=JobPhase.RUNNING, restarts=restarts))
    assert shown("pretrain_job_restarts_in_place", LABELS) == 3
    assert shown("pretrain_jobs", {"phase": "Running"}) == 1
    metrics.lead(False)
    assert shown("pretrain_operator_leader") == 0
    assert shown("pretrain_job_restarts_in_place", LABELS) is None
    assert shown("pretrain_jobs", {"phase": "Running"}) == 0
    assert metrics.lead(False) == set()
    # Nothing may happen to them any more: who leads again has to look at them.
    assert metrics.lead(True) == {JOB}
    assert metrics.lead(True) == set()
