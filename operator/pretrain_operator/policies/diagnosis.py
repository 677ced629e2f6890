"""Why a generation ended: which member went first, whose fault it was, and whether it may go on.

When one worker dies the others fail soon after, because a collective lost its peer. The first to go
is the cause, the rest is echo, also where it is seen rounds later: what a worker that was kept says
about a generation that is over has been judged with that generation. What the cluster did
(preemption, a drained or lost node, a deleted pod) is free; a failure of the program is charged;
wrong configuration is final at once.
"""

from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta

from pretrain_api.status import MAX_MESSAGE, Member
from pretrain_api.wire import ExitCode, Result
from pretrain_operator.observe import Exit, Observation, Pod
from pretrain_operator.policies import silence
from pretrain_operator.resources import pod_name

# Reasons the kubelet puts on a pod that it stopped, or never started, for the node's sake. Evicted
# is none: it is also said of a pod that outgrew its own limits; if the node was short of something,
# the condition DisruptionTarget is there as well.
FREE_POD_REASONS = (
    "NodeLost", "NodeShutdown", "Preempting", "Shutdown", "Terminated",
    "NodeAffinity", "TopologyAffinityError", "UnexpectedAdmissionError",
)  # fmt: skip
FREE_POD_PREFIX = "OutOf"  # OutOfcpu, OutOfmemory, OutOfpods, OutOfnvidia.com/gpu
# What kubelet and container runtime say of a container that was gone when they came back.
LOST_TRACK = (("ContainerStatusUnknown", 137), ("Unknown", 255))
FINAL_CODES = {ExitCode.CONFIG: "InvalidConfiguration", ExitCode.DO_NOT_RETRY: "DoNotRetry"}
BEGINNING = datetime.min.replace(tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Cause:
    """What ended a generation, in the terms of the attempt ledger."""

    reason: str
    message: str
    charged: bool = False
    final: bool = False
    at: datetime = BEGINNING
    pod: str | None = None
    node: str | None = None
    rank: int | None = None
    exit_code: int | None = None
    signal: str | None = None
    echo: bool = False  # of a failure that ended an earlier generation


def finished_well(pod: Pod | None) -> bool:
    """The worker trained to the end: exit code 0 and the completion marker."""
    if pod is None or pod.exit is None or pod.exit.message is None:
        return False
    return pod.exit.code == ExitCode.OK and pod.exit.message.result is Result.COMPLETE


def gone(seen: Observation) -> list[Member]:
    """Members that will not train any more. One whose pod was never seen is yet to be created."""
    lost = silence.lost(seen)
    pods = ((member, seen.pod_of(member)) for member in seen.members)
    return [
        member
        for member, pod in pods
        if (member.uid is not None if pod is None else not pod.alive or pod.name in lost)
    ]


def diagnose(seen: Observation) -> Cause | None:
    """The cause, if the present generation has lost a member; None while all is well.

    A worker that finished well is no loss by itself: the others are about to finish too, unless
    they are to start again, or wait for it.
    """
    causes = [
        _cause(seen, member, seen.pod_of(member))
        for member in gone(seen)
        if not finished_well(seen.pod_of(member)) or _is_missed(seen, member)
    ]
    first = min(causes, key=lambda c: (not c.final, c.echo, c.at), default=None)
    # Whoever has been judged already isn't judged again.
    return replace(first, charged=False) if first and first.echo and not first.final else first


def _is_missed(seen: Observation, member: Member) -> bool:
    """Whether others start another round or generation, which needs all members.

    The leader's last word must not be on its way: it would end the job.
    """
    assignment, report = seen.status.assignment, seen.leader_report
    if assignment is None or assignment.leader is None:
        return True
    if report is None or report.generation != assignment.generation:
        return False
    return member.index in report.waiting_for


def _is_echo(seen: Observation, member: Member, pod: Pod) -> bool:
    """A member that was kept, and failed in a generation it had been told of before this one.

    A pod that was never told of any generation says 0, which is older than itself: no echo.
    """
    said, assignment = pod.exit.message if pod.exit else None, seen.status.assignment
    if said is None or assignment is None:
        return False
    return member.created_in <= said.generation < assignment.generation


def _cause(seen: Observation, member: Member, pod: Pod | None) -> Cause:
    if pod is None:
        message = f"pod {member.pod} of worker {member.index} is gone"
        return Cause("PodDeleted", message, pod=member.pod, node=member.node)
    if pod.alive:
        return _lost(seen, pod)
    if finished_well(pod):
        return _finished_alone(pod)
    final = _final(pod)
    if final is not None:
        return final
    return _taken(seen, pod) or replace(_failed(pod), echo=_is_echo(seen, member, pod))


def _lost(seen: Observation, pod: Pod) -> Cause:
    """A member that runs as far as the cluster knows."""
    reason, seconds = silence.lost(seen)[pod.name], seen.silent[pod.name]
    why = {
        silence.NODE_LOST: f"its node {pod.node} isn't ready",
        silence.UNREACHABLE: "its world stands still",
    }
    message = f"worker {pod.index} ({pod.name}) has not answered for {seconds:.0f} s and"
    at = seen.now - timedelta(seconds=seconds)
    return Cause(reason, f"{message} {why[reason]}", at=at, pod=pod.name, node=pod.node)


def _finished_alone(pod: Pod) -> Cause:
    message = f"worker {pod.index} ({pod.name}) had trained to the end when others had to try again"
    at = (pod.exit.finished if pod.exit else None) or BEGINNING
    return Cause("FinishedAlone", message, at=at, pod=pod.name, node=pod.node, exit_code=0)


def _final(pod: Pod) -> Cause | None:
    if pod.exit is None or pod.exit.code not in FINAL_CODES:
        return None
    reason = FINAL_CODES[ExitCode(pod.exit.code)]
    return _from_exit(pod, pod.exit, reason, charged=True, final=True)


def _taken(seen: Observation, pod: Pod) -> Cause | None:
    """The cluster took the worker away."""
    at = pod.deleted_at or (pod.exit.finished if pod.exit else None) or BEGINNING
    reason: str | None = pod.disruption
    if reason is None and pod.leaving:
        reason = silence.NODE_LOST if pod.node in seen.lost_nodes else "PodDeleted"
    if reason is None and _is_nodes_doing(pod.reason):
        reason = pod.reason
    if reason is None and is_preempted(pod.exit):
        reason = "Preempted"
    if reason is None and _is_lost_track_of(pod.exit):
        reason = "ContainerLost"
    if reason is None:
        return None
    message = _message(f"worker {pod.index} ({pod.name}) was taken away: {reason}", pod.message)
    code = pod.exit.code if pod.exit else None
    return Cause(reason, message, at=at, pod=pod.name, node=pod.node, exit_code=code)


def _is_nodes_doing(reason: str) -> bool:
    return reason in FREE_POD_REASONS or reason.startswith(FREE_POD_PREFIX)


def _is_lost_track_of(ended: Exit | None) -> bool:
    """The node's word for a container it knows no end of, as after the node was started anew."""
    if ended is None or ended.message is not None:
        return False
    return (ended.reason, ended.code) in LOST_TRACK


def is_preempted(ended: Exit | None) -> bool:
    """By the agent's own word. The exit code alone may be anybody's; a pod that leaves is free."""
    if ended is None or ended.message is None:
        return False
    return ended.message.result is Result.PREEMPTED


def _message(what: str, why: str) -> str:
    """Both in one sentence; of a reason that is too long the end, where a log says what it was."""
    room = MAX_MESSAGE - len(what) - 2
    return f"{what}: {why.strip()[-room:]}" if why.strip() else what


def _failed(pod: Pod) -> Cause:
    if pod.exit is None:
        message = f"worker {pod.index} ({pod.name}) failed before its container ended"
        message = _message(message, pod.message)
        return Cause(pod.reason or "PodFailed", message, charged=True, pod=pod.name, node=pod.node)
    return _from_exit(pod, pod.exit, pod.reason or _reason(pod.exit), charged=True)


def _reason(ended: Exit) -> str:
    """One word: the agent's if it left one, else what the container's end says."""
    if ended.message is not None and ended.message.failure is not None:
        return ended.message.failure.reason
    if ended.code == ExitCode.OK:
        return "NoCompletionMarker"  # it left without having trained to the end
    if ended.reason not in ("", "Error", "Completed"):
        return ended.reason  # such as OOMKilled or ContainerCannotRun
    return "WorkerFailed"


def _from_exit(pod: Pod, ended: Exit, reason: str, *, charged: bool, final: bool = False) -> Cause:
    failure = ended.message.failure if ended.message else None
    said = failure.message if failure else ended.text or pod.message
    message = f"worker {pod.index} ({pod.name}) exited with {ended.code}"
    return Cause(
        reason=reason,
        message=_message(message, said),
        charged=charged,
        final=final,
        at=ended.finished or BEGINNING,
        pod=pod.name,
        node=pod.node,
        rank=failure.rank if failure else None,
        exit_code=ended.code if failure is None or failure.exit_code is None else failure.exit_code,
        signal=failure.signal if failure else None,
    )


def finished_leader(seen: Observation) -> Pod | None:
    """The pod that led a world to the end. It decides alone, whatever became of the others.

    Any generation counts: the final checkpoint was committed, which a fenced-out worker can't do.
    But only a pod as the operator makes them: its word ends the job.
    """
    for pod in seen.pods:
        message = pod.exit.message if pod.exit else None
        ours = pod.name == pod_name(seen.name, pod.index, pod.created_in)
        if ours and message is not None and finished_well(pod):
            rank = pod.index if message.rank is None else message.rank
            if rank == 0:
                return pod
    return None
