"""Status of a PretrainJob: what the operator writes and people read.

The status is output, so its models are tolerant: an unknown field (written by a newer operator, or
by a user with an editor) is ignored, a missing one has a default. Every list has a bound, and what
changes all the time is written at the operator's pace.
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
    """Kind of condition: Suspended, Running, Restarting, Complete, Failed and others."""
    status: Literal["True", "False", "Unknown"]
    """Whether the condition holds."""
    reason: Annotated[str, Field(max_length=1024)]
    """Why the condition holds or doesn't, in one CamelCase word for programs."""
    message: Annotated[str, Field(max_length=32768)] = ""
    """Why the condition holds or doesn't, in a sentence for people."""
    last_transition_time: datetime
    """When the condition's status last changed."""
    observed_generation: int | None = None
    """The metadata.generation of the spec that the condition was judged from."""


class WorkersStatus(Tolerant):
    """How many workers there are."""

    desired: int = 0
    """Number of workers the spec asks for."""
    active: int = 0
    """Number of pods that exist and have not ended."""
    ready: int = 0
    """Number of pods that take part in training."""
    succeeded: int = 0
    """Number of pods that ended well."""
    summary: str | None = None
    """Ready and desired workers, as in 2/2."""


class Member(Tolerant):
    """One worker of the current generation."""

    index: int
    """Number of the worker; also its rank among the workers."""
    created_in: int
    """Generation in which the worker's pod was created; part of the pod's name."""
    pod: str
    """Name of the worker's pod."""
    uid: str | None = None
    """UID of the worker's pod, once it exists. A pod of the same name with another UID is not a
    member."""
    node: str | None = None
    """Node that the worker's pod runs on."""
    ip: str | None = None
    """IP address of the worker's pod."""


class AssignmentStatus(Tolerant):
    """Who trains together; written before any pod is created or told."""

    generation: int = 0
    """Number of the present membership; grows with every change of it."""
    nonce: str = ""
    """Word of this generation, without which nobody joins its meeting."""
    leader: str | None = None
    """Where the workers meet, as host:port, once the leader has an address."""
    workers: Annotated[tuple[Member, ...], Field(max_length=4096)] = ()
    """Members of the present generation, by index."""
    created: datetime | None = None
    """When the present generation was decided."""
    saved_step: int | None = None
    """Optimizer step of the newest checkpoint at that time."""
    not_before: datetime | None = None
    """When missing pods may be created: the end of the wait after a failure."""
    announced: datetime | None = None
    """When the members were told about each other."""
    in_place_before: int = 0
    """Number of restarts within pods that the leader's own count doesn't include."""
    order: Order = Order.NONE
    """What all members were told to do last: pause before a change of size, drain before
    suspension."""
    ordered: datetime | None = None
    """When the members were told the order."""
    until: datetime | None = None
    """When members that have not followed the order are no longer waited for."""
    candidates: Annotated[tuple[Member, ...], Field(max_length=4096)] = ()
    """Workers that start beside the members, to join a larger world once they are ready."""
    written_off: Annotated[tuple[str, ...], Field(max_length=4096)] = ()
    """UIDs of pods that were lost with their node: fenced out, and no longer waited for."""
    unplaced: datetime | None = None
    """Since when members or candidates find no node, though no queue holds them back."""
    grow_after: datetime | None = None
    """When candidates for the workers that are missing are sought at the earliest."""
    setbacks: int = 0
    """Number of times candidates were given up since this generation began."""
    releases: int = 0
    """Number of times pods were released for want of nodes since workers last met."""


class ProgressStatus(Tolerant):
    """How far training is."""

    step: int = 0
    """Number of optimizer steps done."""
    steps: int = 0
    """Number of optimizer steps the run has in all."""
    summary: str | None = None
    """Steps done and in all, as in 120/1000."""
    tokens: int = 0
    """Number of tokens trained on, over all restarts."""
    loss: float | None = None
    """Loss of the last reported step."""
    first_loss: float | None = None
    """Loss of the very first step, to compare the present one with."""
    grad_norm: float | None = None
    """Norm of the gradients of the last reported step, before scaling."""
    learning_rate: float | None = None
    """Learning rate of the last reported step."""
    tokens_per_second: float | None = None
    """Tokens trained on per second, over all ranks."""
    mfu: float | None = None
    """Model FLOPs utilization: share of the hardware's peak that training uses, in percent."""
    eta: str | None = None
    """Time left at the present speed, as in 2h5m."""
    resumed_from: int | None = None
    """Step of the checkpoint the present run started from."""
    ledger: str | None = None
    """Digest of all samples trained on so far, hexadecimal."""
    updated: datetime | None = None
    """When progress was read from the leader."""


class CheckpointStatus(Tolerant):
    """The newest committed checkpoint."""

    step: int
    """Optimizer step after which the checkpoint was saved."""
    time: datetime
    """When the checkpoint was committed."""
    path: str
    """Folder of the checkpoint, relative to the root of the volume."""
    bytes: int = 0
    """Size of the checkpoint over all files, in bytes."""
    seconds: float | None = None
    """Seconds for which training stood still for the save."""
    verified: str = "local"
    """Who read the checkpoint back: local (the writer) or remote (another client of the file
    system)."""
    skipped: Annotated[tuple[SkippedCheckpoint, ...], Field(max_length=MAX_ATTEMPTS)] = ()
    """Checkpoints passed over at the last start because they were damaged."""


class RestartsStatus(Tolerant):
    """Restarts, counted apart by what they cost and why."""

    total: int = 0
    """Number of restarts of the world or of a pod, whatever the reason."""
    in_place: int = 0
    """Number of restarts of processes within their pods."""
    charged: int = 0
    """Number of restarts that count against recovery.maxRestarts in the present window."""
    by_reason: Annotated[dict[str, int], Field(max_length=64)] = {}
    """Number of restarts of the world or of a pod, by reason."""


class Attempt(Tolerant):
    """How one generation ended."""

    generation: int
    """Number of the generation that ended."""
    started: datetime | None = None
    """When the pods of the attempt were told to start."""
    ended: datetime
    """When the operator saw the attempt end."""
    reason: str
    """Why the attempt ended, in one CamelCase word for programs."""
    message: Annotated[str, Field(max_length=MAX_MESSAGE)] = ""
    """Why the attempt ended, in a sentence for people."""
    start_step: int | None = None
    """Step of the checkpoint that the attempt started from."""
    step: int | None = None
    """Last step that the attempt reported."""
    checkpoint_step: int | None = None
    """Step of the newest checkpoint when the attempt ended; the next one starts there."""
    lost_seconds: float | None = None
    """Seconds spent on steps that no checkpoint kept."""
    pod: str | None = None
    """Name of the pod whose failure or loss ended the attempt."""
    node: str | None = None
    """Node of the pod that ended the attempt."""
    rank: int | None = None
    """Global number of the rank that failed first."""
    exit_code: int | None = None
    """Exit code of the rank or pod that ended the attempt."""
    signal: str | None = None
    """Signal that ended the rank or pod, as in SIGKILL."""
    charged: bool = False
    """Whether the attempt counts against recovery.maxRestarts."""


class JobStatus(Tolerant):
    """Everything the operator knows about a job."""

    observed_generation: int | None = None
    """The metadata.generation of the spec that this status was judged from."""
    phase: JobPhase | None = None
    """State of the job in one word for people; programs read conditions."""
    conditions: Annotated[tuple[Condition, ...], Field(max_length=32)] = ()
    """What holds of the job now, and why: Suspended, Running, Restarting, Complete, Failed and
    others, by type."""
    start_time: datetime | None = None
    """When the job first got its workers; reset by suspension."""
    completion_time: datetime | None = None
    """When the job completed or failed."""
    replicas: int | None = None
    """Number of workers that exist, for kubectl scale and autoscalers."""
    selector: str | None = None
    """Label selector of the workers, for kubectl scale and autoscalers."""
    workers: WorkersStatus | None = None
    """How many workers there are."""
    assignment: AssignmentStatus | None = None
    """Which pods train together. The operator's memory; not meant for others."""
    progress: ProgressStatus | None = None
    """How far training is, how fast, and how well it learns."""
    checkpoint: CheckpointStatus | None = None
    """The newest committed checkpoint."""
    restarts: RestartsStatus | None = None
    """How often and why work was started again."""
    attempts: Annotated[tuple[Attempt, ...], Field(max_length=MAX_ATTEMPTS)] = ()
    """How past generations ended, newest last."""
    goodput: float | None = None
    """Share of the time since startTime that was spent on steps that count, in percent."""
