"""Whom to ask how they are, and what it means when somebody doesn't answer."""

from collections.abc import Iterable, Mapping

from pretrain_api.status import AssignmentStatus
from pretrain_api.wire import Order, WorkerStatus
from pretrain_operator.observe import Job, Pod
from pretrain_operator.status import is_finished

STALE_SECONDS = 5.0  # without a step, a phase or any other sign of life: the world stands still


def whom_to_ask(job: Job, pods: Iterable[Pod]) -> list[Pod]:
    """The pod to ask how training goes: that of rank 0, once it has been told so."""
    assignment = _assignment(job)
    if assignment is None:
        return []
    return _alive(pods, {assignment.workers[0].uid})


def whom_else(job: Job, pods: Iterable[Pod], reports: Mapping[str, WorkerStatus]) -> list[Pod]:
    """Everybody else, if the leader's report isn't enough: nobody is to be lost unnoticed.

    ``reports`` are the answers of those in :func:`whom_to_ask`.
    """
    assignment = _assignment(job)
    if assignment is None or assignment.leader is None:
        return []  # nobody was told yet that there is a world
    leader, *others = assignment.workers
    if assignment.order is Order.NONE and _moves(reports.get(leader.pod)):
        return []
    return _alive(pods, {member.uid for member in others})


def _assignment(job: Job) -> AssignmentStatus | None:
    assignment = job.status.assignment
    if assignment is None or not assignment.workers or is_finished(job.status):
        return None
    return assignment


def _moves(report: WorkerStatus | None) -> bool:
    """Whether the leader has answered that all is well."""
    if report is None or report.waiting_for:
        return False
    return report.beat_age_seconds is None or report.beat_age_seconds <= STALE_SECONDS


def _alive(pods: Iterable[Pod], uids: set[str | None]) -> list[Pod]:
    return [pod for pod in pods if pod.uid in uids and pod.alive]
