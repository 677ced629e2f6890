"""The objects that make a decision so: what to create, whom to tell, what to clear away.

Everything is derived from the status as it was read back, never from a decision of the same round.
"""

from datetime import timedelta

from pretrain_api import names
from pretrain_api.job import Hang, PretrainJob
from pretrain_api.status import Member
from pretrain_api.wire import Assignment, HangDeadlines, Order
from pretrain_operator.actions import Action, Create, Delete, Patch
from pretrain_operator.border import read_assignment
from pretrain_operator.cluster import Kind
from pretrain_operator.observe import Observation, Pod
from pretrain_operator.policies import cleanup
from pretrain_operator.resources import (
    avoiding,
    build_claim,
    build_config,
    build_pod,
    build_policy,
    grace_seconds,
)
from pretrain_operator.resources.podgroup import NEVER_REPLACED
from pretrain_operator.resources.volumes import owners_for

REMIND_AFTER = timedelta(seconds=5)  # the file in the pod usually follows within a third of one
REMIND_AGAIN = timedelta(seconds=30)  # who was reminded may be saving, for as long as that takes


def prepare(seen: Observation, job: PretrainJob) -> list[Action]:
    """ConfigMap, network policy and claim."""
    around = seen.surroundings
    if around is None:
        return []
    actions: list[Action] = []
    if around.config_is_ours is None:
        actions.append(Create(Kind.CONFIG_MAP, build_config(job), "ConfigMissing"))
    if around.policy_is_ours is None:
        policy = build_policy(job, seen.worker_peers)
        actions.append(Create(Kind.NETWORK_POLICY, policy, "PolicyMissing"))
    template = job.spec.volumes.checkpoint and job.spec.volumes.checkpoint.claim_template
    if template and around.claim is None:
        actions.append(Create(Kind.CLAIM, build_claim(job), "ClaimMissing"))
    return actions


def retain(seen: Observation) -> tuple[Action, ...]:
    """Have the owner of the claim made for the job follow ``retention``, at any time.

    It must not wait until the job goes on: checkpoints are lost with a job that is deleted before.
    """
    claim = seen.surroundings.claim if seen.surroundings else None
    if claim is None or seen.wishes.retention is None or claim.job_uid != seen.uid:
        return ()
    owned = any(owner.get("uid") == seen.uid for owner in claim.owners)
    if owned == (seen.wishes.retention == "Delete"):
        return ()
    owners = owners_for(seen.meta, seen.wishes.retention, claim.owners)
    this = {"uid": claim.uid, "resourceVersion": claim.resource_version}
    patch = {"metadata": {**this, "ownerReferences": owners or None}}
    return (Patch(Kind.CLAIM, claim.name, patch, "RetentionChanged"),)


def create_pods(seen: Observation, job: PretrainJob) -> list[Action]:
    """Pods of members and candidates that have none, once the wait after a failure is over."""
    assignment = seen.status.assignment
    if assignment and assignment.not_before and seen.now < assignment.not_before:
        return []
    kept, report = seen.status.checkpoint, seen.leader_report
    step = report.progress.step_seconds if report else None
    grace = grace_seconds(job, kept.seconds if kept else None, step)
    lost = cleanup.lost_nodes(seen)
    return [
        Create(
            Kind.POD,
            avoiding(build_pod(job, member.index, member.created_in, seen.image, grace), lost),
            "MemberMissing",
        )
        for member in (*seen.members, *seen.candidates)
        if seen.pod_of(member) is None
    ]


def announce(seen: Observation) -> list[Action]:
    """Tell every member its place and orders; the kubelet makes a file in the pod of it."""
    actions: list[Action] = []
    for member in seen.members:
        pod, word = seen.pod_of(member), assignment_for(seen, member)
        if pod is None or pod.over or word is None:
            continue
        if pod.assignment != word:
            actions.append(_annotate(pod, names.ANNOTATION_ASSIGNMENT, word, "Assigned"))
        elif _reminder_is_due(seen, pod):
            # Now and then a kubelet passes over a change of annotations, and looks again only after
            # a minute or more. Any other change makes it look at once.
            time = seen.now.isoformat()
            actions.append(_annotate(pod, names.ANNOTATION_REMINDED, time, "Reminded"))
    return actions


def _annotate(pod: Pod, key: str, value: str, reason: str) -> Patch:
    patch = {"metadata": {"uid": pod.uid, "annotations": {key: value}}}
    return Patch(Kind.POD, pod.name, patch, reason)


def _reminder_is_due(seen: Observation, pod: Pod) -> bool:
    """Whether a worker says, some seconds after it was told, that it has heard nothing of it."""
    assignment, said = seen.status.assignment, seen.reports.get(pod.name)
    if assignment is None or said is None:
        return False
    ordered = assignment.order in (Order.PAUSE, Order.DRAIN)
    obeys = said.draining or said.paused
    if said.generation >= assignment.generation and (obeys or not ordered):
        return False
    told = max((at for at in (assignment.announced, assignment.ordered) if at), default=seen.now)
    if pod.reminded is not None and pod.reminded > told:
        return seen.now - pod.reminded >= REMIND_AGAIN
    return seen.now - told >= REMIND_AFTER


def assignment_for(seen: Observation, member: Member) -> str | None:
    """The annotation of one member, or None while the generation has no leader yet."""
    assignment = seen.status.assignment
    if assignment is None or assignment.leader is None:
        return None
    return Assignment(
        generation=assignment.generation,
        rank=member.index,
        size=len(assignment.workers),
        leader=assignment.leader,
        nonce=assignment.nonce,
        saved_step=assignment.saved_step,
        orders=assignment.order,
        hang=_hang_deadlines(seen, member),
    ).to_json()


def _hang_deadlines(seen: Observation, member: Member) -> HangDeadlines | None:
    """What the user set of recovery.hang; while the spec is invalid, what the member was told."""
    if seen.job is None:
        pod = seen.pod_of(member)
        told = read_assignment(pod.assignment) if pod and pod.assignment else None
        return told.hang if told else None
    chosen, usual = seen.job.spec.recovery.hang, Hang()
    changed = {
        name.removesuffix("_seconds"): getattr(chosen, name)
        for name in Hang.model_fields
        if getattr(chosen, name) != getattr(usual, name)
    }
    return HangDeadlines(**changed) if changed else None


def tidy(seen: Observation, reason: str) -> tuple[Action, ...]:
    """Send away who has no place any more, and drop what nobody will look at."""
    return (
        *(delete_pod(pod, reason) for pod in cleanup.strays(seen)),
        *(delete_pod(pod, "Superseded") for pod in cleanup.exhibits_to_drop(seen)),
        *(force_delete(pod) for pod in cleanup.out_of_reach(seen)),
    )


def free_quota(seen: Observation) -> list[Action]:
    """Tell the queue that ended pods won't be replaced."""
    return [
        Patch(
            Kind.POD,
            pod.name,
            {"metadata": {"uid": pod.uid, "annotations": NEVER_REPLACED}},
            "JobFinished",
        )
        for pod in seen.pods
        if pod.over and pod.holds_quota and not pod.leaving
    ]


def force_delete(pod: Pod) -> Delete:
    """Delete the object of a pod whose node doesn't answer."""
    return Delete(Kind.POD, pod.name, pod.uid, "OutOfReach", grace_seconds=0)


def delete_pod(pod: Pod, reason: str) -> Delete:
    """Delete exactly this pod; its trainer saves and leaves."""
    return Delete(Kind.POD, pod.name, pod.uid, reason)
