"""Whom to ask: the leader as a rule, everybody when its word isn't enough."""

from datetime import UTC, datetime

import pytest

from pretrain_api import names
from pretrain_api.status import AssignmentStatus, Condition, JobStatus, Member
from pretrain_api.wire import Order, Phase, Progress, WorkerStatus
from pretrain_operator.observe import Job, Pod, parse_job
from pretrain_operator.policies.silence import whom_else, whom_to_ask
from pretrain_operator.testing import job_body

NAMES = ("llama-0-1", "llama-1-1")
PODS = [
    Pod(name, f"uid-{name}", index, 1, datetime.now(UTC), phase="Running", ip="10.0.0.1")
    for index, name in enumerate(NAMES)
]


def job(order: Order = Order.NONE, leader: str | None = "10.0.0.1:1", *, over: bool = False) -> Job:
    members = [Member(index=pod.index, created_in=1, pod=pod.name, uid=pod.uid) for pod in PODS]
    assignment = AssignmentStatus(generation=1, leader=leader, workers=tuple(members), order=order)
    now = datetime.now(UTC)
    complete = Condition(
        type=names.COMPLETE, status="True", reason="Done", last_transition_time=now
    )
    found = JobStatus(assignment=assignment)
    if over:
        found = found.model_copy(update={"conditions": (complete,), "completion_time": now})
    body = job_body() | {"status": found.to_dict()}
    return parse_job(body)


def asked(job: Job, report: WorkerStatus | None = None) -> list[str]:
    return [pod.name for pod in whom_else(job, PODS, {NAMES[0]: report} if report else {})]


def test_the_leader_is_asked() -> None:
    assert [pod.name for pod in whom_to_ask(job(), PODS)] == [NAMES[0]]


@pytest.mark.parametrize("age", [None, 0.5, 4.9])
def test_nobody_else_is_asked_while_the_leader_sees_steps(age: float | None) -> None:
    assert asked(job(), WorkerStatus(phase=Phase.STEP, beat_age_seconds=age)) == []


def test_everybody_is_asked_when_the_leaders_word_is_not_enough() -> None:
    others = [NAMES[1]]
    slow = Progress(step_seconds=20.0)
    assert asked(job(), WorkerStatus(phase=Phase.STEP, beat_age_seconds=59.0, progress=slow)) == []
    assert asked(job()) == others
    assert asked(job(), WorkerStatus(beat_age_seconds=5.1)) == others
    assert asked(job(), WorkerStatus(waiting_for=(1,))) == others
    assert asked(job(Order.PAUSE), WorkerStatus(beat_age_seconds=0.1)) == others


def test_before_anybody_was_told_only_the_leader_is_asked_and_afterwards_nobody() -> None:
    assert asked(job(leader=None)) == []
    assert whom_to_ask(job(over=True), PODS) == []
    assert asked(job(over=True)) == []
