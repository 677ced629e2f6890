"""Whom to ask how they are, and what it means when somebody doesn't answer.

Silence alone means nothing: the fault may lie between the operator and the worker, and training go
on. A silent member is lost only if its world stands still without it, on the word of somebody else
of that world, or if its node is lost as well. What was lost by mistake costs a restart and no more:
the fence keeps it from committing anything.
"""

from collections.abc import Iterable, Mapping

from pretrain_api.status import AssignmentStatus, Member
from pretrain_api.wire import Order, Phase, WorkerStatus
from pretrain_operator.observe import SILENT_SECONDS, Job, Observation, Pod

STALE_SECONDS = 5.0  # without a step, a phase or any other sign of life: the world stands still
NODE_LOST, UNREACHABLE = "NodeLost", "Unreachable"


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
    if assignment is None or not assignment.workers or job.status.completion_time is not None:
        return None
    return assignment


def _moves(report: WorkerStatus | None) -> bool:
    """Whether the leader has answered that all is well."""
    return report is not None and not report.waiting_for and not _is_stale(report)


def lost(seen: Observation) -> dict[str, str]:
    """Members that are taken for lost though their pods seem to run: reason by pod name."""
    found: dict[str, str] = {}
    for member in seen.members if seen.silent else ():
        pod = seen.pod_of(member)
        if pod is None or not pod.alive or seen.silent.get(pod.name, 0.0) < SILENT_SECONDS:
            continue
        if pod.node in seen.lost_nodes:
            found[pod.name] = NODE_LOST
        elif _stands_still_without(seen, member):
            found[pod.name] = UNREACHABLE
    return found


def stands_still(seen: Observation) -> bool:
    """Whether something is about to be decided that only the next answers can tell."""
    if seen.silent:
        return True
    report = seen.leader_report
    return report is not None and not _moves(report)


def _stands_still_without(seen: Observation, silent: Member) -> bool:
    """Whether others of its world say that they wait for it, or can't go on for another reason."""
    assignment = seen.status.assignment
    if assignment is None or assignment.leader is None:
        return False
    for member in seen.members:
        said = seen.reports.get(member.pod)
        if member is silent or said is None or said.generation != assignment.generation:
            continue
        if silent.index in said.waiting_for or _is_stale(said):
            return True
        if silent.index == 0 and said.phase is Phase.WAITING:
            return True  # without the leader nobody can tell for whom it waits
    return False


def _is_stale(report: WorkerStatus) -> bool:
    """Whether its ranks stand still, by what steps and saves took so far."""
    if report.paused:
        return True
    if report.beat_age_seconds is None or report.phase is Phase.DONE:
        return False
    progress = report.progress
    usual = 0.0
    if report.phase in (Phase.STEP, Phase.DATA):
        usual = 3 * (progress.step_seconds or 0.0)
    elif report.phase is Phase.SAVE and progress.checkpoint:
        usual = 2 * progress.checkpoint.seconds
    return report.beat_age_seconds >= max(STALE_SECONDS, usual)


def _alive(pods: Iterable[Pod], uids: set[str | None]) -> list[Pod]:
    return [pod for pod in pods if pod.uid in uids and pod.alive]
