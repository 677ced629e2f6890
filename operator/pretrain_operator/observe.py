"""From the cluster to one frozen :class:`Observation`: everything a decision may depend on.

Pods come from a cache that follows their watch. The job itself is read afresh, or is what the last
write of this operator made of it (:mod:`recall`): its status is the operator's memory.
Claim, ConfigMap and network policy are read only when something has to be created, the spec has
changed, or nobody trains: a job in full swing costs one question to its leader per round.

A cache may lag. It can make a pod look missing that is there: creating it again is refused
harmlessly, and before a member is called lost it is asked for by name. It can make a pod look alive
that has failed: so is one that no longer belongs, before it is deleted and its logs with it.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any, cast

from pydantic import ValidationError

from pretrain_api import names
from pretrain_api.job import JobSpec, ObjectMeta, PretrainJob
from pretrain_api.status import JobStatus, Member
from pretrain_api.wire import TerminationMessage, WorkerStatus
from pretrain_operator.border import read_termination_message
from pretrain_operator.cluster import Body, Cluster, Kind, NotFoundError, RefusedError
from pretrain_operator.resources import claim_name, config_name, own_claim_name, policy_name
from pretrain_operator.resources.podgroup import holds_quota
from pretrain_operator.settings import Settings

Json = Mapping[str, Any]

LONGEST_GRACE = 10**8  # seconds; whatever else is in a pod, dates can be reckoned with this
SILENT_SECONDS = 10.0  # without an answer after which a worker may be lost
TERMINAL_PHASES = ("Succeeded", "Failed")


@dataclass(frozen=True, slots=True)
class Exit:
    """How the trainer container of a pod ended."""

    code: int
    reason: str = ""  # the container runtime's word: Completed, Error, OOMKilled
    finished: datetime | None = None
    message: TerminationMessage | None = None
    text: str = ""  # the termination message if it isn't ours


@dataclass(frozen=True, slots=True)
class Trouble:
    """Why a pod does not start: no node, no image, a missing Secret."""

    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class Pod:
    """A worker pod of this very job (by UID), reduced to what decisions need."""

    name: str
    uid: str
    index: int
    created_in: int
    created: datetime
    version: str = ""
    owners: tuple[str, ...] = ()  # UIDs
    phase: str = "Pending"
    reason: str = ""  # of the pod itself, such as Evicted
    message: str = ""  # the sentence that goes with it
    node: str | None = None
    ip: str | None = None
    grace_seconds: int = 30  # from SIGTERM to SIGKILL
    holds_quota: bool = False  # of a queue, even once it has ended
    ready: bool = False
    assignment: str | None = None
    reminded: datetime | None = None
    kill_at: datetime | None = None  # set once it is being deleted
    deleted_at: datetime | None = None
    disruption: str | None = None  # reason of the DisruptionTarget condition
    trouble: Trouble | None = None
    exit: Exit | None = None

    @property
    def over(self) -> bool:
        """None of its processes runs any more."""
        return self.phase in TERMINAL_PHASES

    @property
    def leaving(self) -> bool:
        """It is being deleted; its ranks may be saving."""
        return self.kill_at is not None

    @property
    def alive(self) -> bool:
        """It trains, or is about to."""
        return not self.over and not self.leaving


@dataclass(frozen=True, slots=True)
class Claim:
    """The claim of the checkpoint volume."""

    name: str
    uid: str
    resource_version: str
    phase: str
    access_modes: tuple[str, ...]
    leaving: bool = False
    job_uid: str | None = None  # label: the job it was made for
    owners: tuple[Body, ...] = ()  # owner references; with the job's own it is deleted with the job


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What pods need beside themselves: what of it is there, and whose it is."""

    claim: Claim | None = None
    config_is_ours: bool | None = None  # whether the ConfigMap of that name is; None if none is
    policy_is_ours: bool | None = None  # the same of the network policy


@dataclass(frozen=True, slots=True)
class Wishes:
    """What holds whether or not the rest of the spec validates, read from it as it is stored.

    A job whose spec has become invalid can still be suspended, run out of time and keep its claim.
    """

    managed_by: str | None = None
    suspend: bool = False
    active_deadline_seconds: int | None = None
    retention: str | None = None  # of the claim made for the job; None if none is made


@dataclass(frozen=True, slots=True)
class Observation:
    """One moment of one job. Frozen, complete, and all that :func:`plan.plan` ever sees."""

    meta: ObjectMeta
    job: PretrainJob | None  # None if the stored object doesn't validate
    problems: tuple[str, ...]  # the sentences that say why
    status: JobStatus
    now: datetime
    nonce: str  # fresh and secret; used if this round starts a new generation
    image: str  # trainer image for jobs that name none
    pods: tuple[Pod, ...] = ()
    surroundings: Surroundings | None = None  # None: not looked at, nothing is to be created
    lost_nodes: frozenset[str] = frozenset()
    reports: Mapping[str, WorkerStatus] = field(default_factory=dict[str, WorkerStatus])
    silent: Mapping[str, float] = field(default_factory=dict[str, float])  # seconds, by pod name
    worker_peers: tuple[Body, ...] = ()  # network policy peers that may read workers' status
    wishes: Wishes = Wishes()

    @property
    def uid(self) -> str:
        """UID of the job."""
        return self.meta.uid or ""

    @property
    def name(self) -> str:
        """Name of the job."""
        return self.meta.name

    @property
    def namespace(self) -> str:
        """Namespace of the job and all its children."""
        return self.meta.namespace or "default"

    @property
    def members(self) -> tuple[Member, ...]:
        """Who trains together in the present generation."""
        return self.status.assignment.workers if self.status.assignment else ()

    @property
    def candidates(self) -> tuple[Member, ...]:
        """Who starts beside the members to join a larger world."""
        return self.status.assignment.candidates if self.status.assignment else ()

    def pod_of(self, member: Member) -> Pod | None:
        """The member's own pod, not another one that took its name."""
        for pod in self.pods:
            if pod.name == member.pod and member.uid in (None, pod.uid):
                return pod
        return None

    @property
    def leader_report(self) -> WorkerStatus | None:
        """What the worker of rank 0 answered, in whatever generation it is."""
        return self.reports.get(self.members[0].pod) if self.members else None


@dataclass(frozen=True, slots=True)
class Job:
    """The stored object, parsed as far as it goes."""

    meta: ObjectMeta
    job: PretrainJob | None
    problems: tuple[str, ...]
    status: JobStatus
    wishes: Wishes


def parse_job(body: Json, spec: JobSpec | None = None) -> Job:
    """Parse a stored PretrainJob; an invalid spec becomes ``problems``, one sentence each.

    ``spec`` is what its spec was parsed to before, in the same generation of the object.

    Raises pydantic.ValidationError if metadata or status are broken: the schema at the API server
    keeps both whole, and guessing at the operator's own memory would be worse than stopping.
    """
    meta = ObjectMeta.model_validate(body.get("metadata", {}))
    status = JobStatus.model_validate(body.get("status") or {})
    try:
        stored = {key: body[key] for key in ("apiVersion", "kind", "spec") if key in body}
        stored |= {"spec": spec} if spec else {}
        job = PretrainJob.model_validate(stored | {"metadata": body.get("metadata", {})})
        problems = ()
    except ValidationError as error:
        job, problems = None, tuple(_sentence(item) for item in error.errors())
    if too_long := _name_problem(meta.name):
        job, problems = None, (too_long, *problems)
    return Job(meta, job, problems, status, parse_wishes(_part(body, "spec")))


def parse_wishes(spec: Json) -> Wishes:
    """The wishes in a stored spec; what is not understood is not wished for."""
    seconds = spec.get("activeDeadlineSeconds")
    volume = _part(spec, "volumes", "checkpoint")
    retention = volume.get("retention", "Retain") if volume.get("claimTemplate") else None
    return Wishes(
        managed_by=spec.get("managedBy"),
        suspend=spec.get("suspend") is True,
        active_deadline_seconds=seconds if type(seconds) is int and seconds > 0 else None,
        retention=retention if retention in ("Retain", "Delete") else None,
    )


def _name_problem(name: str) -> str | None:
    if len(name) <= names.MAX_JOB_NAME:
        return None
    return f"metadata.name: {name!r} has {len(name)} characters; use at most {names.MAX_JOB_NAME}"


def _sentence(item: Any) -> str:
    where = ".".join(str(part) for part in item["loc"])
    message = str(item["msg"]).removeprefix("Value error, ")
    return f"{where}: {message}" if where else message


def parse_pod(body: Json) -> Pod | None:
    """Reduce a pod; None if its labels don't say which worker it is (then it isn't ours)."""
    meta, labels = _part(body, "metadata"), _part(body, "metadata", "labels")
    try:
        index = int(labels[names.LABEL_WORKER])
        created_in = int(labels[names.LABEL_GENERATION])
    except (KeyError, ValueError):
        return None
    status = _part(body, "status")
    conditions = _conditions(body)
    container = _container(status)
    kill_at = _time(meta.get("deletionTimestamp"))
    grace = timedelta(seconds=_grace(meta.get("deletionGracePeriodSeconds") or 0))
    disruption = conditions.get("DisruptionTarget", {})
    return Pod(
        name=meta["name"],
        uid=meta["uid"],
        index=index,
        created_in=created_in,
        created=_time(meta.get("creationTimestamp")) or datetime.fromtimestamp(0, UTC),
        version=meta.get("resourceVersion") or "",
        owners=tuple(_owners(body)),
        phase=status.get("phase", "Pending"),
        reason=status.get("reason") or "",
        message=status.get("message") or "",
        node=_part(body, "spec").get("nodeName"),
        ip=status.get("podIP"),
        grace_seconds=_grace(_part(body, "spec").get("terminationGracePeriodSeconds") or 30),
        ready=conditions.get("Ready", {}).get("status") == "True",
        holds_quota=holds_quota(labels, _part(meta, "annotations")),
        assignment=_part(meta, "annotations").get(names.ANNOTATION_ASSIGNMENT),
        reminded=_time_or_none(_part(meta, "annotations").get(names.ANNOTATION_REMINDED)),
        kill_at=kill_at,
        deleted_at=kill_at - grace if kill_at else None,
        disruption=disruption.get("reason") if disruption.get("status") == "True" else None,
        trouble=_trouble(conditions, container),
        exit=_exit(container),
    )


def _grace(seconds: int) -> int:
    return max(0, min(int(seconds), LONGEST_GRACE))


def with_metadata(pod: Pod, meta: Json) -> Pod:
    """The pod with what its metadata says in a later version of it."""
    later = parse_pod({"metadata": meta})
    if later is None:
        return pod
    changes = {name: getattr(later, name) for name in _OF_METADATA}
    return replace(pod, **changes)


_OF_METADATA = (
    "version", "owners", "holds_quota", "assignment", "reminded", "kill_at", "deleted_at",
)  # fmt: skip


def belongs(body: Json, job_uid: str) -> bool:
    """Whether a child was made for this very job, not for another one of the same name.

    The owner reference says so. A label may have been copied with the rest of a manifest.
    """
    return job_uid in _owners(body)


def _owners(body: Json) -> list[str]:
    owners = cast(Iterable[Json], _part(body, "metadata").get("ownerReferences") or ())
    return [str(owner.get("uid")) for owner in owners]


def label_of(body: Json, key: str) -> str | None:
    """A label of an object."""
    return _part(body, "metadata", "labels").get(key)


def _part(body: Json, *path: str) -> Json:
    """A mapping inside; empty where something on the way is missing or null."""
    for key in path:
        body = cast(Json, body.get(key) or {})
    return body


def _conditions(body: Json) -> dict[str, Json]:
    found = cast(Iterable[Json], _part(body, "status").get("conditions") or ())
    return {item["type"]: item for item in found}


def _container(status: Json) -> Json:
    for container in cast(Iterable[Json], status.get("containerStatuses") or ()):
        if container.get("name") == names.CONTAINER:
            return _part(container, "state")
    return {}


def _trouble(conditions: Json, container: Json) -> Trouble | None:
    scheduled = conditions.get("PodScheduled", {})
    if scheduled.get("status") == "False":
        return Trouble(scheduled.get("reason", "Unschedulable"), scheduled.get("message", ""))
    waiting = _part(container, "waiting")
    if waiting.get("reason") in (None, "", "ContainerCreating", "PodInitializing"):
        return None
    # The kubelet says one of the two by turns, and means the same.
    reason = "ImagePullBackOff" if waiting["reason"] == "ErrImagePull" else waiting["reason"]
    return Trouble(reason, waiting.get("message", ""))


def _exit(container: Json) -> Exit | None:
    ended = container.get("terminated")
    if not ended:
        return None
    text = ended.get("message") or ""
    message = read_termination_message(text)
    return Exit(
        code=int(ended.get("exitCode", 0)),
        reason=ended.get("reason") or "",
        finished=_time(ended.get("finishedAt")),
        message=message,
        text="" if message else text,
    )


def parse_claim(body: Json) -> Claim:
    """Reduce a claim."""
    meta = _part(body, "metadata")
    return Claim(
        name=meta["name"],
        uid=meta["uid"],
        resource_version=meta["resourceVersion"],
        phase=_part(body, "status").get("phase", "Pending"),
        access_modes=tuple(_part(body, "spec").get("accessModes") or ()),
        leaving=bool(meta.get("deletionTimestamp")),
        job_uid=label_of(body, names.LABEL_JOB_UID),
        owners=tuple(meta.get("ownerReferences") or ()),
    )


def _time(text: str | None) -> datetime | None:
    return datetime.fromisoformat(text.replace("Z", "+00:00")) if text else None


def _time_or_none(text: str | None) -> datetime | None:
    """A time that a user may have edited. Without a time zone it can't be compared: it is none."""
    try:
        found = _time(text)
    except ValueError:
        return None
    return found if found and found.tzinfo else None


async def gather_pods(cluster: Cluster, job: Job, cached: Iterable[Pod]) -> tuple[Pod, ...]:
    """The job's pods by index and age, as the cache has them.

    Asked for are members with a UID that it lacks, and running pods without a place in the present
    generation: these are about to be deleted, unless they have ended and are kept for a look.
    """
    uid, namespace = job.meta.uid or "", job.meta.namespace or "default"
    pods = {pod.name: pod for pod in cached if uid in pod.owners}
    present = job.status.assignment
    members = present.workers if present else ()
    missing = {each.pod for each in members if each.uid and each.pod not in pods}
    placed = {each.pod for each in (*members, *(present.candidates if present else ()))}
    for name in missing | {pod.name for pod in pods.values() if pod.alive} - placed:
        body = await _find(cluster, Kind.POD, namespace, name)
        pods.pop(name, None)
        if body is not None and belongs(body, uid) and (pod := parse_pod(body)):
            pods[name] = pod
    return tuple(sorted(pods.values(), key=lambda pod: (pod.index, pod.created_in)))


async def gather_surroundings(
    cluster: Cluster, job: Job, pods: tuple[Pod, ...], *, again: bool = False
) -> Surroundings | None:
    """Claim, ConfigMap and network policy, if something is to be created or the spec changed.

    Of a job without a valid spec, for which nothing is created, only the claim made for it. Of one
    that never had a pod too: its ConfigMap and policy are created without a look, unless that was
    tried before and is tried ``again``.
    """
    if not _needs_surroundings(job, pods):
        return None
    namespace, uid = job.meta.namespace or "default", job.meta.uid or ""
    wanted = own_claim_name(job.meta.name) if job.wishes.retention else None
    if job.job is not None:
        wanted = claim_name(job.job)
    claim = await _find(cluster, Kind.CLAIM, namespace, wanted) if wanted else None
    if job.job is None:
        return Surroundings(claim=parse_claim(claim)) if claim else None
    assignment = job.status.assignment
    begun = assignment is not None and (again or pods or assignment.generation > 1)
    if not begun or not _members(job):  # members are to be decided first
        return Surroundings(claim=parse_claim(claim) if claim else None)
    config = await _find(cluster, Kind.CONFIG_MAP, namespace, config_name(job.meta.name))
    policy = await _find(cluster, Kind.NETWORK_POLICY, namespace, policy_name(job.meta.name))
    return Surroundings(
        claim=parse_claim(claim) if claim else None,
        config_is_ours=belongs(config, uid) if config else None,
        policy_is_ours=belongs(policy, uid) if policy else None,
    )


def _needs_surroundings(job: Job, pods: tuple[Pod, ...]) -> bool:
    members, known = _members(job), {pod.name for pod in pods}
    changed = job.status.observed_generation != job.meta.generation
    finished = job.status.completion_time is not None  # rounds are rare then, and its last ones
    return finished or changed or not members or any(member.pod not in known for member in members)


def _members(job: Job) -> tuple[Member, ...]:
    return job.status.assignment.workers if job.status.assignment else ()


async def gather_lost_nodes(
    cluster: Cluster, pods: Iterable[Pod], silent: Mapping[str, float]
) -> frozenset[str]:
    """Nodes of leaving or silent pods that aren't ready. Without the right to read nodes: none."""
    lost: set[str] = set()
    for node in {pod.node for pod in pods if pod.node and _in_doubt(pod, silent)}:
        try:
            body = await _find(cluster, Kind.NODE, "", node)
        except RefusedError:
            return frozenset()
        if body is None or not _is_ready(body):
            lost.add(node)
    return frozenset(lost)


def _in_doubt(pod: Pod, silent: Mapping[str, float]) -> bool:
    is_silent = silent.get(pod.name, 0.0) >= SILENT_SECONDS
    return not pod.over and (pod.leaving or is_silent)


def _is_ready(node: Json) -> bool:
    return _conditions(node).get("Ready", {}).get("status") == "True"


async def _find(cluster: Cluster, kind: Kind, namespace: str, name: str) -> Body | None:
    try:
        return await cluster.get(kind, namespace, name)
    except NotFoundError:
        return None


async def gather(
    cluster: Cluster,
    job: Job,
    pods: tuple[Pod, ...],
    *,
    settings: Settings,
    now: datetime,
    nonce: str,
    reports: Mapping[str, WorkerStatus],
    silent: Mapping[str, float],
    again: bool,
) -> Observation:
    """Everything about a job in one observation; ``again`` if the last round over it failed.

    Raises ClusterError if a read fails.
    """
    return Observation(
        meta=job.meta,
        job=job.job,
        problems=job.problems,
        status=job.status,
        wishes=job.wishes,
        now=now,
        nonce=nonce,
        image=settings.trainer_image,
        pods=pods,
        surroundings=await gather_surroundings(cluster, job, pods, again=again),
        lost_nodes=await gather_lost_nodes(cluster, pods, silent),
        reports=reports,
        silent=silent,
        worker_peers=settings.worker_peers,
    )
