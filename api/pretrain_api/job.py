"""PretrainJob: the custom resource users write.

The training part of the spec is RunConfig's sections, same models and same keys, in camelCase; what
remains is what Kubernetes must know: workers, volumes, recovery and lifetime. What may change while
a job exists is said by transition rules: lifetime and recovery always, scheduling only while
suspended, training and volumes never (create a new job and adopt the checkpoint).
"""

from typing import Annotated, Any, ClassVar, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, StringConstraints, model_validator
from pydantic.alias_generators import to_camel

from pretrain_api import names
from pretrain_api.config import RunConfig, Sections
from pretrain_api.job_rules import SPEC_RULES, SPEC_TRANSITIONS
from pretrain_api.mesh import batch_plan, legal_replicas, resized
from pretrain_api.pod import DNS_LABEL, DnsName, PodTemplate, Quantity, Resources, one_of
from pretrain_api.schema import (
    LEAVES,
    MAX_TEXT,
    NonNegative,
    PathText,
    Positive,
    Rule,
    Section,
    cel_mismatch,
    or_else,
)
from pretrain_api.status import JobStatus

AccessMode = Literal["ReadWriteOnce", "ReadWriteMany", "ReadWriteOncePod"]


GPU: Final = "nvidia.com/gpu"


def _default(value: JsonValue) -> dict[str, JsonValue]:
    """A default the API server fills in, because its scale subresource or our rules read it."""
    return {"x-kubernetes-default": value}


def _enough_gpus(limit: str | int | None, processes: int) -> bool:
    """Whether a limit is missing, or a whole number of GPUs that is enough."""
    text = str(limit)
    return limit is None or (text.isdecimal() and len(text) <= 6 and int(text) >= processes)


class Workers(Section):
    """The pods that train. Each runs processesPerWorker ranks."""

    replicas: Annotated[int, Field(ge=1, le=4096, json_schema_extra=_default(1))] = 1
    """Number of workers to train with. May change while the job runs if maxReplicas is set."""
    min_replicas: Annotated[int, Field(ge=1, le=4096)] | None = None
    """Fewest workers to train with while nodes for the others are missing. Unset waits for all."""
    max_replicas: Annotated[int, Field(ge=1, le=4096)] | None = None
    """Most workers replicas may ever ask for. Batch size and data streams are those of this size,
    whatever the size is now. Unset is replicas, which then never changes."""
    processes_per_worker: Annotated[int, Field(ge=1, le=256, json_schema_extra=_default(1))] = 1
    """Ranks in each worker; one per GPU where there are GPUs."""
    image: Annotated[str, StringConstraints(min_length=1, max_length=MAX_TEXT)] | None = None
    """Image of the trainer, by tag or digest. Unset is the operator's default."""
    resources: Resources = Resources()
    """CPU, memory and devices of each worker."""
    pod_template: PodTemplate = PodTemplate()
    """Scheduling, environment and further volumes of the workers' pods. Changes only while the job
    is suspended."""

    rules: ClassVar = (
        Rule(
            path="min_replicas",
            cel="!has(self.minReplicas) || self.minReplicas <= self.replicas",
            message="must not be more than replicas",
            holds=lambda w: w.min_replicas is None or w.min_replicas <= w.replicas,
        ),
        Rule(
            path="max_replicas",
            cel="!has(self.maxReplicas) || self.maxReplicas >= self.replicas",
            message="must not be less than replicas",
            holds=lambda w: w.max_replicas is None or w.max_replicas >= w.replicas,
        ),
        Rule(
            path="pod_template.labels",
            cel=f"!(has(self.podTemplate) && has(self.podTemplate.labels) && '{names.LABEL_QUEUE}' "
            "in self.podTemplate.labels) || ((!has(self.minReplicas) || self.minReplicas == "
            "self.replicas) && (!has(self.maxReplicas) || self.maxReplicas == self.replicas))",
            message=f"{names.LABEL_QUEUE} puts the pods into a group that can't change its size; "
            "remove minReplicas and maxReplicas, or the label",
            holds=lambda w: names.LABEL_QUEUE not in w.pod_template.labels or not w.is_elastic,
        ),
        Rule(
            path="processes_per_worker",
            cel=f"!(has(self.resources) && has(self.resources.limits) && '{GPU}' in "
            f"self.resources.limits) || (string(self.resources.limits['{GPU}']).matches("
            f"'^[0-9]{{1,6}}$') && int(string(self.resources.limits['{GPU}'])) >= "
            "self.processesPerWorker)",
            message=f"every process needs a GPU of its own; {GPU} in resources.limits must be a "
            "whole number that is not less",
            holds=lambda w: _enough_gpus(w.resources.limits.get(GPU), w.processes_per_worker),
        ),
    )

    @property
    def idle_gpus(self) -> str | None:
        """A sentence about GPUs that no process would use; None if there are none."""
        limit = str(self.resources.limits.get(GPU, 0))
        spare = int(limit) - self.processes_per_worker if limit.isdecimal() else 0
        if spare <= 0:
            return None
        return (
            f"each worker has {limit} GPUs by resources.limits for processesPerWorker "
            f"{self.processes_per_worker}, one GPU each, so {spare} of them do nothing"
        )

    @property
    def is_elastic(self) -> bool:
        """Whether there may be more or fewer workers than now."""
        return self.min_size < self.replicas or self.max_size > self.replicas

    @property
    def max_size(self) -> int:
        """The most workers there can be."""
        return self.max_replicas or self.replicas

    @property
    def min_size(self) -> int:
        """The fewest workers that train while nodes for the others are missing."""
        return self.min_replicas or self.replicas


class ClaimTemplate(Section):
    """A claim the operator creates for the job."""

    storage: Quantity
    """Size of the volume in bytes, usually with a unit, such as 100Gi."""
    storage_class_name: Annotated[str, StringConstraints(max_length=253)] | None = None
    """StorageClass that makes the volume. Unset is the cluster's default."""
    access_modes: Annotated[tuple[AccessMode, ...], Field(strict=False, max_length=3)] = ()
    """How the volume may be mounted. Unset is ReadWriteMany for several workers and ReadWriteOnce
    for one."""

    rules: ClassVar = (
        Rule(
            path="storage",
            cel="string(self.storage).matches('[1-9]')",
            message="must be more than nothing, such as 100Gi",
            holds=lambda c: any(digit in "123456789" for digit in str(c.storage)),
        ),
    )


class CheckpointVolume(Section):
    """Where checkpoints and everything else the run writes are kept."""

    claim_template: ClaimTemplate | None = None
    """A PersistentVolumeClaim to create for this job. Set either this or claimName."""
    claim_name: DnsName | None = None
    """Name of a PersistentVolumeClaim that exists in the job's namespace. Set either this or
    claimTemplate."""
    sub_path: PathText = ""
    """Folder within the volume to write to. Unset is its root."""
    retention: Literal["Retain", "Delete"] = "Retain"
    """What becomes of a created claim when the job is deleted: it is kept, or deleted with all
    checkpoints."""

    rules: ClassVar = (
        one_of("claim_template", "claim_name"),
        Rule(
            path="sub_path",
            cel=f"!has(self.subPath) || {cel_mismatch(LEAVES, 'self.subPath')}",
            message="must be a relative path without . or .. or //",
            holds=lambda v: not LEAVES.search(v.sub_path),
        ),
        Rule(
            path="retention",
            cel="!(has(self.claimName) && has(self.retention) && self.retention == 'Delete')",
            message="Delete is for a claim the job creates; a claim named by claimName is kept",
            holds=lambda v: v.claim_name is None or v.retention == "Retain",
        ),
    )


class Volumes(Section):
    """Volumes with a meaning for training."""

    checkpoint: CheckpointVolume | None = None
    """Where checkpoints and everything else the run writes are kept."""


class Hang(Section):
    """Seconds a phase may last without a sign of life before the ranks are started again."""

    starting_seconds: Positive = 600
    """Seconds in which process group, mesh and model must be built."""
    load_seconds: Positive = 1800
    """Seconds a checkpoint that is loaded may show no progress."""
    first_step_seconds: Positive = 1800
    """Seconds the first step after a start may take, compilation included."""
    data_seconds: Positive = 1800
    """Seconds a rank may wait for samples."""
    step_seconds: Positive | None = None
    """Seconds a step may take. Unset is ten times the median step, at least 60."""
    save_seconds: Positive = 1800
    """Seconds a checkpoint that is saved may show no progress."""


class Recovery(Section):
    """How often work is started again after failures, and how soon."""

    max_restarts: NonNegative = 10
    """Number of failures within windowSeconds that are put up with; one more and the job fails.
    Preemptions are free."""
    window_seconds: Positive = 3600
    """Seconds for which a failure counts. A new checkpoint forgives all."""
    backoff_seconds: Annotated[int, Field(ge=0, le=86_400)] = 5
    """Seconds to wait before the second restart in the window; doubles with every further failure.
    The first restart doesn't wait."""
    max_backoff_seconds: Annotated[int, Field(ge=0, le=86_400)] = 300
    """Most seconds to wait before a restart."""
    grow_snooze_seconds: Annotated[int, Field(ge=0, le=86_400)] = 60
    """Seconds for which a job that trains with fewer workers than it should stays as it is before
    it seeks nodes for the others; doubles with every attempt that fails."""
    hang: Hang = Hang()
    """How long ranks may give no sign of life, phase by phase, before they are started again."""

    rules: ClassVar = (
        Rule(
            path="max_backoff_seconds",
            cel=f"{or_else('backoff_seconds', '5')} <= {or_else('max_backoff_seconds', '300')}",
            message="must not be less than backoffSeconds",
            holds=lambda r: r.backoff_seconds <= r.max_backoff_seconds,
        ),
    )


class JobSpec(Sections):
    """What to train and with which workers."""

    workers: Annotated[Workers, Field(json_schema_extra=_default({}))] = Workers()
    """The pods that train: how many, of what size, and where."""
    volumes: Volumes = Volumes()
    """Where the workers write."""
    recovery: Recovery = Recovery()
    """How often and how soon work is started again after failures."""
    suspend: Annotated[bool, Field(json_schema_extra=_default(False))] = False
    """Save, stop and free the workers. Training goes on where it was when set back to false."""
    managed_by: (
        Annotated[str, StringConstraints(pattern=r"^[a-z0-9.-]+/[A-Za-z0-9._/-]+$", max_length=63)]
        | None
    ) = None
    """Controller in charge of the job. Unset is this operator, pretrain.dev/pretrain-operator; with
    any other name, such as kueue.x-k8s.io/multikueue, it leaves the job alone."""
    active_deadline_seconds: Positive | None = None
    """Seconds after status.startTime at which the job fails if it still runs. Unset is no limit."""
    scheduling_timeout_seconds: Positive | None = None
    """Seconds the workers may wait for nodes. Those that have one are then released with the rest,
    so that two jobs don't block each other, and all are tried again later, after 30 s at first and
    10 minutes at last. With minReplicas the job starts smaller before that. Unset waits for ever.
    Time a queue holds them back doesn't count."""
    ttl_seconds_after_finished: NonNegative | None = None
    """Seconds after its end at which the job is deleted. Unset keeps it."""

    rules: ClassVar = (*Sections.rules, *SPEC_RULES)
    transitions: ClassVar = SPEC_TRANSITIONS

    @property
    def world_size(self) -> int:
        """Ranks at the largest size."""
        return self.workers.max_size * self.workers.processes_per_worker

    @property
    def legal_replicas(self) -> tuple[int, ...]:
        """All numbers of workers that could train it, ascending; empty if the largest can't."""
        return legal_replicas(self, self.workers.processes_per_worker, self.workers.max_size)


class ObjectMeta(BaseModel):
    """The parts of an object's metadata that matter here."""

    model_config = ConfigDict(
        alias_generator=to_camel, populate_by_name=True, frozen=True, extra="ignore"
    )

    name: Annotated[str, Field(max_length=names.MAX_JOB_NAME, pattern=DNS_LABEL)] = ""
    namespace: str | None = None
    uid: str | None = None
    generation: int | None = None
    resource_version: str | None = None
    creation_timestamp: str | None = None
    deletion_timestamp: str | None = None
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}


class PretrainJob(BaseModel):
    """The whole object, as the API server stores it."""

    model_config = ConfigDict(
        alias_generator=to_camel, populate_by_name=True, frozen=True, extra="forbid"
    )

    api_version: Literal["pretrain.dev/v1alpha1"] = names.API_VERSION
    kind: Literal["PretrainJob"] = names.KIND
    metadata: ObjectMeta = ObjectMeta()
    spec: JobSpec
    status: JobStatus = JobStatus()

    @model_validator(mode="after")
    def _has_one_size_in_a_queue(self) -> Self:
        if names.LABEL_QUEUE in self.metadata.labels and self.spec.workers.is_elastic:
            raise ValueError(
                f"metadata.labels: {names.LABEL_QUEUE} puts the pods into a group that can't "
                "change its size; remove workers.minReplicas and workers.maxReplicas, or the label"
            )
        return self

    @property
    def queue(self) -> str | None:
        """The queue of Kueue that admits its workers, if it is in one."""
        inner = self.spec.workers.pod_template.labels.get(names.LABEL_QUEUE)
        return inner or self.metadata.labels.get(names.LABEL_QUEUE)

    def run_config(
        self, output_dir: str = names.OUTPUT_DIR, sample_dir: str = names.SAMPLE_DIR
    ) -> RunConfig:
        """The configuration its trainer processes read, complete with all defaults.

        Batch size and data streams are those of the full size, whatever size the world has later:
        accumulation makes up for missing ranks, and samples stay the same.

        ``output_dir`` is where the checkpoint volume is mounted; it becomes job.dump_folder. The
        sub path is not part of it: the operator mounts that folder of the volume alone.
        ``sample_dir`` holds the tokenizer used if the job names none.
        """
        plan = batch_plan(self.spec, self.spec.world_size)
        sections: dict[str, Any] = {
            name: getattr(self.spec, name) for name in Sections.model_fields
        }
        sections["training"] = resized(self.spec.training, plan)
        sections["job"] = self.spec.job.model_copy(update={"dump_folder": output_dir})
        if "hf_assets_path" not in self.spec.model.model_fields_set:
            tokenizer = {"hf_assets_path": f"{sample_dir}/tokenizer"}
            sections["model"] = self.spec.model.model_copy(update=tokenizer)
        return RunConfig(**sections)
