"""Status of a PretrainJob: what the operator writes and people read.

The status is output, so its models are tolerant: an unknown field (written by a newer operator, or
by a user with an editor) is ignored, a missing one has a default. Nothing here changes faster than
the operator's progress interval, and every list has a bound.
"""

from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

from pretrain_api.wire import Order, SkippedCheckpoint

MAX_ATTEMPTS = 20  # entries kept of the attempt ledger, newest last
MAX_MESSAGE = 1024  # characters of a message that comes from a worker


class Tolerant(BaseModel):
    """Base of everything in the status."""

    model_config = ConfigDict(
        alias_generator=to_camel,
        populate_by_name=True,
        frozen=True,
        extra="ignore",
        use_attribute_docstrings=True,
    )

    def to_dict(self) -> dict[str, Any]:
        """CamelCase JSON types without empty fields, as the API server takes them."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)


class JobPhase(StrEnum):
    """One word for people; programs read the conditions."""

    PENDING = "Pending"  # waiting for admission, volumes, nodes or images
    STARTING = "Starting"  # pods exist, no step yet
    RUNNING = "Running"
    RESTARTING = "Restarting"
    SUSPENDED = "Suspended"
    COMPLETE = "Complete"
    FAILED = "Failed"


class Condition(Tolerant):
    """A condition in the form all Kubernetes tools know."""

    type: Annotated[str, Field(max_length=316)]
    """Kind of condition, such as Running."""
    status: Literal["True", "False", "Unknown"]
    """Whether it holds."""
    reason: Annotated[str, Field(max_length=1024)]
    """Why, in one CamelCase word."""
    message: Annotated[str, Field(max_length=32768)] = ""
    """Why, in a sentence."""
    last_transition_time: datetime
    """When status last changed."""
    observed_generation: int | None = None
    """metadata.generation the condition was judged from."""


class WorkersStatus(Tolerant):
    """How many workers there are."""

    desired: int = 0
    """Workers the spec asks for."""
    active: int = 0
    """Pods that exist and have not ended."""
    ready: int = 0
    """Pods that take part in training."""
    succeeded: int = 0
    """Pods that ended well."""
    summary: str | None = None
    """Ready and desired, as in 2/2."""


class Member(Tolerant):
    """One worker of the current generation."""

    index: int
    """Number of the worker; also its rank among the workers."""
    created_in: int
    """Generation its pod was created in; part of the pod's name."""
    pod: str
    """Name of its pod."""
    uid: str | None = None
    """UID of that pod, once it exists. A pod of the same name with another UID is not a member."""
    node: str | None = None
    """Node of that pod."""
    ip: str | None = None
    """Address of that pod."""


class AssignmentStatus(Tolerant):
    """Who trains together; written before any pod is created or told."""

    generation: int = 0
    """Grows with every change of membership."""
    nonce: str = ""
    """Secret of this generation: opens the meeting point and every changing endpoint of a worker.
    """
    leader: str | None = None
    """host:port where the workers meet, once the leader has an address."""
    workers: Annotated[tuple[Member, ...], Field(max_length=4096)] = ()
    """The members, by index."""
    created: datetime | None = None
    """When this generation was decided."""
    not_before: datetime | None = None
    """When its missing pods may be created: the wait after a failure."""
    announced: datetime | None = None
    """When its members were told about each other."""
    in_place_before: int = 0
    """Restarts within pods that the leader's own count doesn't include."""
    order: Order = Order.NONE
    """What all members were told to do: pause before a change of size, drain before suspension."""
    ordered: datetime | None = None
    """When they were told."""
    until: datetime | None = None
    """When they are no longer waited for."""
    candidates: Annotated[tuple[Member, ...], Field(max_length=4096)] = ()
    """Workers that start beside the members, to join a larger world once they are ready."""
    written_off: Annotated[tuple[str, ...], Field(max_length=4096)] = ()
    """UIDs of pods that were lost with their node: fenced out, and no longer waited for."""
    unplaced: datetime | None = None
    """Since when members or candidates find no node, though no queue holds them back."""
    grow_after: datetime | None = None
    """When candidates are sought for the workers that are missing; not before."""
    setbacks: int = 0
    """How often candidates were given up since this generation began."""
    releases: int = 0
    """How often pods were released for want of nodes since workers last met."""


class ProgressStatus(Tolerant):
    """How far training is."""

    step: int = 0
    """Optimizer steps done."""
    steps: int = 0
    """Optimizer steps in all."""
    summary: str | None = None
    """Both, as in 120/1000."""
    tokens: int = 0
    """Tokens trained on, over all restarts."""
    loss: float | None = None
    """Loss of the last reported step."""
    first_loss: float | None = None
    """Loss of the first step."""
    grad_norm: float | None = None
    """Norm of the gradients of the last reported step, before scaling."""
    learning_rate: float | None = None
    """Learning rate of the last reported step."""
    tokens_per_second: float | None = None
    """Speed over all ranks."""
    mfu: float | None = None
    """Model FLOPs utilization in percent."""
    eta: str | None = None
    """Time left at this speed, as in 2h5m."""
    resumed_from: int | None = None
    """Step of the checkpoint the present run started from."""
    ledger: str | None = None
    """Digest of all samples trained on so far, hexadecimal."""
    updated: datetime | None = None
    """When this was read from the leader."""


class CheckpointStatus(Tolerant):
    """The newest committed checkpoint."""

    step: int
    """Step after which it was saved."""
    time: datetime
    """When it was committed."""
    path: str
    """Folder, relative to the root of the volume."""
    bytes: int = 0
    """Size over all files."""
    seconds: float | None = None
    """How long training stood still for it."""
    verified: str = "local"
    """Who read it back: local (the writer) or remote (another client of the file system)."""
    skipped: Annotated[tuple[SkippedCheckpoint, ...], Field(max_length=MAX_ATTEMPTS)] = ()
    """Checkpoints passed over at the last start because they were damaged."""


class RestartsStatus(Tolerant):
    """Restarts, counted apart by what they cost and why."""

    total: int = 0
    """Restarts of the world or of a pod, whatever the reason."""
    in_place: int = 0
    """Restarts of the processes within their pods."""
    charged: int = 0
    """Restarts that count against recovery.maxRestarts in the present window."""
    by_reason: Annotated[dict[str, int], Field(max_length=64)] = {}
    """Restarts of the world or of a pod by reason."""


class Attempt(Tolerant):
    """How one generation ended."""

    generation: int
    """Its generation."""
    started: datetime | None = None
    """When its pods were told to start."""
    ended: datetime
    """When the operator saw it end."""
    reason: str
    """Why it ended, in one CamelCase word."""
    message: Annotated[str, Field(max_length=MAX_MESSAGE)] = ""
    """Why it ended, in a sentence."""
    start_step: int | None = None
    """Step of the checkpoint it started from."""
    step: int | None = None
    """Last step it reported."""
    checkpoint_step: int | None = None
    """Step of the newest checkpoint at its end; the next attempt starts there."""
    lost_seconds: float | None = None
    """Time spent on steps that no checkpoint kept."""
    pod: str | None = None
    """Pod that ended it."""
    node: str | None = None
    """Node of that pod."""
    rank: int | None = None
    """Global rank that failed first."""
    exit_code: int | None = None
    """Exit code of that rank or pod."""
    signal: str | None = None
    """Signal that ended it, as in SIGKILL."""
    charged: bool = False
    """Whether it counts against recovery.maxRestarts."""


class JobStatus(Tolerant):
    """Everything the operator knows about a job."""

    observed_generation: int | None = None
    """metadata.generation this status was judged from."""
    phase: JobPhase | None = None
    """One word for people."""
    conditions: Annotated[tuple[Condition, ...], Field(max_length=32)] = ()
    """Suspended, Running, Restarting, Complete, Failed and others, by type."""
    start_time: datetime | None = None
    """When the job first got its workers; reset by suspension."""
    completion_time: datetime | None = None
    """When it completed or failed."""
    replicas: int | None = None
    """Workers that exist, for kubectl scale and autoscalers."""
    selector: str | None = None
    """Label selector of the workers, for kubectl scale and autoscalers."""
    workers: WorkersStatus | None = None
    """How many workers there are."""
    assignment: AssignmentStatus | None = None
    """Who trains together."""
    progress: ProgressStatus | None = None
    """How far training is."""
    checkpoint: CheckpointStatus | None = None
    """The newest committed checkpoint."""
    restarts: RestartsStatus | None = None
    """How often and why work was started again."""
    attempts: Annotated[tuple[Attempt, ...], Field(max_length=MAX_ATTEMPTS)] = ()
    """How past generations ended, newest last."""
    goodput: float | None = None
    """Share of the time since startTime spent on steps that count, in percent."""
