"""The contract between operator and worker pods.

Down goes an :class:`Assignment`: the operator writes it as JSON into an annotation of the pod, the
kubelet projects it into a file. Up come two documents: :class:`WorkerStatus`, which the operator
reads over HTTP while the job runs, and :class:`TerminationMessage`, which the pod leaves behind and
from which alone the end of a job is decided. All are small, versionless within one release, and
tolerant: an unknown field from a newer peer is ignored, a missing one has a default.
"""

from bisect import bisect_left
from enum import IntEnum, StrEnum
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

TERMINATION_MESSAGE_LIMIT = 4096  # bytes; what Kubernetes keeps of a termination message


class Wire(BaseModel):
    """Base of every document on the wire: camelCase in JSON, frozen, tolerant of newer peers."""

    model_config = ConfigDict(
        alias_generator=to_camel, populate_by_name=True, frozen=True, extra="ignore"
    )

    def to_json(self) -> str:
        """The document as it travels: camelCase, without empty fields."""
        return self.model_dump_json(by_alias=True, exclude_none=True)


class Order(StrEnum):
    """What the operator wants a running worker to do at the next step boundary."""

    NONE = "none"
    SAVE = "save"  # save a checkpoint and go on
    PAUSE = "pause"  # save a checkpoint and stop the ranks; the pod waits for its next generation
    DRAIN = "drain"  # save a checkpoint and exit with ExitCode.PREEMPTED
    STOP = "stop"  # exit without saving


class ExitCode(IntEnum):
    """Exit codes with a meaning; every other non-zero code is a failure within the budget."""

    OK = 0  # done, together with Result.COMPLETE in the termination message
    CONFIG = 78  # the configuration, data or tokenizer is wrong: never retried
    DO_NOT_RETRY = 93  # the trainer knows that another attempt can't help
    PREEMPTED = 143  # saved and left on request (128 + SIGTERM): free of charge


class Phase(StrEnum):
    """Where a rank is. Each phase may go without a sign of life for a time of its own."""

    WAITING = "waiting"  # for an assignment or for peers
    STARTING = "starting"  # process group, mesh, model
    LOAD = "load"  # reading a checkpoint
    FIRST_STEP = "firstStep"  # the first step after a start, compilation included
    DATA = "data"  # waiting for the samples of the next step
    STEP = "step"
    EVAL = "eval"
    SAVE = "save"
    DONE = "done"  # trained to the end and saved: the completion marker


class Result(StrEnum):
    """How a worker ended."""

    COMPLETE = "complete"
    PREEMPTED = "preempted"
    CONFIG = "config"
    FAILED = "failed"


class HangDeadlines(Wire):
    """Seconds without a sign of life after which a phase counts as hung; None is the default."""

    starting: float | None = None
    load: float | None = None
    first_step: float | None = None
    data: float | None = None
    step: float | None = None
    save: float | None = None


class Assignment(Wire):
    """The place of one pod in one generation of the world.

    ``generation`` grows with every change of membership; a worker ignores anything older than what
    it has seen. ``leader`` is ``host:port`` of the meeting point, in the pod of rank 0. ``rank`` is
    None for a pod that has no place in this generation and should wait. ``nonce`` is the word
    without which nobody joins the meeting; whoever may read the pod knows it. ``saved_step`` is the
    step of a checkpoint that was committed before. Within one generation only ``orders`` and
    ``hang`` change.
    """

    generation: Annotated[int, Field(ge=1)]
    rank: Annotated[int, Field(ge=0)] | None = None
    size: Annotated[int, Field(ge=1)]
    leader: str
    nonce: str
    saved_step: int | None = None
    orders: Order = Order.NONE
    hang: HangDeadlines | None = None


class CheckpointReport(Wire):
    """The newest committed checkpoint, and those passed over because they were damaged."""

    step: int
    time: float  # seconds since the epoch, when it was committed
    path: str  # relative to the checkpoint volume
    bytes: int
    seconds: float = 0.0  # how long training stood still for it
    verified: str = "local"  # who read it back: "local" or "remote"


class SkippedCheckpoint(Wire):
    """A checkpoint that was not loaded, and the sentence that says why."""

    step: Annotated[int, Field(description="Step of the checkpoint that was passed over.")]
    reason: Annotated[str, Field(description="Why the checkpoint was passed over, in a sentence.")]


class Progress(Wire):
    """How far training is; published by global rank 0 after every logged step."""

    step: int = 0
    steps: int = 0
    tokens: int = 0  # trained so far, over all restarts
    loss: float | None = None
    first_loss: float | None = None  # loss of step 1, kept across restarts
    grad_norm: float | None = None
    learning_rate: float | None = None
    tokens_per_second: float | None = None
    mfu: float | None = None  # fraction, torchtitan's formula
    step_seconds: float | None = None
    data_wait_seconds: float | None = None  # waiting for data, of the last step
    resumed_from: int | None = None  # step of the checkpoint this process started from
    checkpoint: CheckpointReport | None = None
    skipped: tuple[SkippedCheckpoint, ...] = ()
    ledger: str | None = None  # hex; chained digest of the sample ids of every step so far


class Failure(Wire):
    """The first rank that failed, which is the cause; later failures are its echo."""

    rank: int | None = None  # global rank
    exit_code: int | None = None
    signal: str | None = None  # e.g. "SIGKILL"
    # RankFailed, PeerLost, Hung, OOMKilled, Config, DoNotRetry, Launcher
    reason: str = "RankFailed"
    message: str = ""  # the exception's last line, or the tail of the log


class Timeline(Wire):
    """When the newest start of a worker's ranks passed each stage; seconds since the epoch.

    A stage that was not reached yet, or is left out of this start, is None.
    """

    generation: int = 0
    round: int = 0
    stopped: float | None = None  # the ranks of the round before were found dead, or told to stop
    joined: float | None = None  # no rank ran any more: this agent asked for the round
    started: float | None = None  # all agents had met: ranks were told to start
    load: float | None = None  # the slowest local rank began to read a checkpoint
    first_step: float | None = None  # the slowest local rank began its first step
    trained: float | None = None  # and ended it


class WorkerStatus(Wire):
    """What ``GET /status`` of a worker answers."""

    generation: int = 0
    round: int = 0
    rank: int | None = None
    phase: Phase = Phase.WAITING
    step: int = 0
    beat_age_seconds: float | None = None  # since the slowest local rank last reported
    restarts_in_place: int = 0
    failures_without_progress: int = 0
    progress: Progress = Progress()
    last_failure: Failure | None = None
    draining: bool = False
    warm: bool = False  # ranks can be started at once
    paused: bool = False  # ranks saved and left on an order to pause
    # The leader's word: agents yet to join the next round, or not heard in the running one for 5 s.
    waiting_for: tuple[int, ...] = ()
    waiting_seconds: float | None = None  # since the first of the others joined, or their last word
    timeline: Timeline | None = None


class TerminationMessage(Wire):
    """What a worker leaves in its termination message: the one record the end is decided from."""

    result: Result
    generation: int = 0
    rank: int | None = None
    exit_code: int = 0
    progress: Progress = Progress()
    restarts_in_place: int = 0
    failure: Failure | None = None

    def to_bytes(self) -> bytes:
        """JSON of at most 4096 bytes: a message that Kubernetes has to cut would not parse.

        Of the failure's text the end is kept, as much as fits. Where dropping all of it is not
        enough, the list of skipped checkpoints goes first, and the text gets the room. Characters
        that JSON escapes count as what they become, so the fitting length is searched.
        """
        data = self.to_json().encode()
        if len(data) <= TERMINATION_MESSAGE_LIMIT:
            return data
        if self.progress.skipped and (self.failure is None or not self._fits("")):
            progress = self.progress.model_copy(update={"skipped": ()})
            return self.model_copy(update={"progress": progress}).to_bytes()
        if self.failure is None:
            return data
        text = self.failure.message
        start = bisect_left(range(len(text)), True, key=lambda start: self._fits(text[start:]))
        return self._with_message(text[start:]).to_json().encode()

    def _fits(self, message: str) -> bool:
        return len(self._with_message(message).to_json().encode()) <= TERMINATION_MESSAGE_LIMIT

    def _with_message(self, message: str) -> Self:
        assert self.failure is not None
        failure = self.failure.model_copy(update={"message": message})
        return self.model_copy(update={"failure": failure})
