"""Which pods have had their time, and when a finished job has.

A failed pod is worth a look (`kubectl logs`), so the newest of each worker stays until the job is
deleted. Pods that ended well, or left when told to, say nothing more than the status does.
"""

from collections.abc import Iterable
from datetime import datetime, timedelta

from pretrain_api.job import JobSpec
from pretrain_api.status import JobStatus
from pretrain_operator.observe import Observation, Pod
from pretrain_operator.policies import silence
from pretrain_operator.policies.diagnosis import is_preempted
from pretrain_operator.progress import trains

LINGER_SECONDS = 30  # after the leader finished, for the others to finish by themselves


def strays(seen: Observation) -> list[Pod]:
    """Running pods without a place in the present generation, and no candidate's.

    Lost ones only when the scheduler has judged all others: while they count, it spreads these away
    from nodes that may be dead, and nothing waits for the end of a lost one.
    """
    others = _members(seen)
    if _are_to_be_placed(seen):
        others |= written_off(seen)
    return [pod for pod in seen.pods if pod.uid not in others and pod.alive]


def _are_to_be_placed(seen: Observation) -> bool:
    """Whether a pod of the present generation has no node yet, and was not refused one."""
    pods = [seen.pod_of(each) for each in (*seen.members, *seen.candidates)]
    return any(pod is None or (pod.node is None and pod.trouble is None) for pod in pods)


def exhibits_to_drop(seen: Observation) -> list[Pod]:
    """Ended pods of past generations, but the newest failed one of each worker.

    Without members that one goes as well if it keeps a queue's quota, which nobody uses then.
    """
    mine = _members(seen)
    past = [p for p in seen.pods if p.uid not in mine and p.over and not p.leaving]
    failed = (pod for pod in past if pod.phase == "Failed" and not is_preempted(pod.exit))
    newest = {pod.index: pod.uid for pod in sorted(failed, key=_age)}
    idle = not seen.members
    return [p for p in past if newest.get(p.index) != p.uid or (idle and p.holds_quota)]


def _age(pod: Pod) -> int:
    return pod.created_in


def _members(seen: Observation) -> set[str]:
    known = (seen.pod_of(each) for each in (*seen.members, *seen.candidates))
    return {pod.uid for pod in known if pod is not None}


def in_the_way(seen: Observation) -> list[Pod]:
    """Pods of an older generation whose ranks may still run, perhaps saving: wait for them.

    A pod that was lost, or one that outlived the time at which it would be killed, is not waited
    for: it is fenced out of the checkpoints, and nobody can tell whether it lives.
    """
    mine, lost = _members(seen), written_off(seen)
    return [
        pod
        for pod in seen.pods
        if pod.uid not in mine | lost and not pod.over and not _has_had_its_time(seen, pod)
    ]


WRITE_OFF_SECONDS = 10


def written_off_at(pod: Pod) -> datetime | None:
    """When a leaving pod is no longer waited for."""
    return pod.kill_at + timedelta(seconds=WRITE_OFF_SECONDS) if pod.kill_at else None


def _has_had_its_time(seen: Observation, pod: Pod) -> bool:
    limit = written_off_at(pod)
    return limit is not None and seen.now >= limit


def written_off(seen: Observation) -> set[str]:
    """UIDs of the pods that were lost: those noted as such, and those that are by now.

    It is noted with the generation that does without them, because a node may come and go.
    """
    assignment, lost = seen.status.assignment, silence.lost(seen)
    noted = set(assignment.written_off) if assignment else set[str]()
    return {
        pod.uid
        for pod in seen.pods
        if pod.uid in noted
        or pod.name in lost
        or (pod.leaving and not pod.over and pod.node in seen.lost_nodes)
    }


def lost_nodes(seen: Observation) -> list[str]:
    """Nodes on which pods were lost, for as long as these pods are there."""
    lost = written_off(seen)
    return sorted({pod.node for pod in seen.pods if pod.node and pod.uid in lost})


def out_of_reach(seen: Observation, *, fenced: bool | None = None) -> list[Pod]:
    """Pods that nobody will stop and that can do no harm: their objects may go.

    They were told to leave, their node is lost or their time is over, and a newer generation holds
    the checkpoint root (``fenced``; unless said otherwise, when the present one trains).
    """
    if not (trains(seen) if fenced is None else fenced):
        return []
    mine, lost = _members(seen), written_off(seen)
    return [
        pod
        for pod in seen.pods
        if pod.leaving
        and not pod.over
        and pod.uid not in mine
        and pod.uid in lost
        and (pod.node in seen.lost_nodes or _has_had_its_time(seen, pod))
    ]


def leftovers(pods: Iterable[Pod]) -> list[Pod]:
    """Pods of a finished job that still run."""
    return [pod for pod in pods if pod.alive]


def linger_until(status: JobStatus, *, completed: bool) -> datetime | None:
    """When the leftovers of a finished job are deleted."""
    if status.completion_time is None:
        return None
    return status.completion_time + timedelta(seconds=LINGER_SECONDS if completed else 0)


def expires_at(status: JobStatus, spec: JobSpec) -> datetime | None:
    """When a finished job is deleted."""
    ttl = spec.ttl_seconds_after_finished
    if ttl is None or status.completion_time is None:
        return None
    return status.completion_time + timedelta(seconds=ttl)
