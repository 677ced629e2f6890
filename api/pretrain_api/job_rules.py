"""Rules over the whole spec of a PretrainJob: arithmetic, volumes, and what may change.

The arithmetic lives in :mod:`pretrain_api.mesh`. Here each of its sentences is tied to the CEL that
refuses the same specs at the API server. Degrees, batch and streams are judged at the largest size,
maxReplicas; then the other sizes the spec names must come out even with that very batch.
"""

from typing import Any

from pretrain_api import mesh
from pretrain_api.schema import Rule, Transition, aliases, optional, or_else

_LARGEST = or_else("workers.max_replicas", "self.workers.replicas")
_WORLD = f"({_LARGEST} * self.workers.processesPerWorker)"
_REPLICATE = or_else("parallelism.data_parallel_replicate_degree", "1")
_SHARD = or_else("parallelism.data_parallel_shard_degree", "-1")
_RESHARD = optional("parallelism.fsdp_reshard_after_forward")
_LOCAL = or_else("training.local_batch_size", "8")
_GLOBAL = or_else("training.global_batch_size", "-1")
_STREAMS = optional("training.data_streams")
_SEED = or_else("checkpoint.create_seed_checkpoint", "false")
_CHECKPOINT = or_else("checkpoint.enable", "false")
_MODES = optional("volumes.checkpoint.claim_template.access_modes")

# With the other degrees at 1, which the table of unbuilt features sees to, every rank is a
# data-parallel one. A rule assumes that the rules before it hold.
_REPLICATE_FITS = f"{_WORLD} % {_REPLICATE} == 0"
_BATCH = f"({_GLOBAL} == -1 ? {_LOCAL} * {_WORLD} : {_GLOBAL})"
_BATCH_FITS = f"{_BATCH} % ({_LOCAL} * {_WORLD}) == 0"
_WORKERS = "workers (maxReplicas or replicas) x processesPerWorker"


def _mesh_error(spec: Any) -> mesh.MeshError | None:
    try:
        mesh.batch_plan(spec, spec.world_size)
    except mesh.MeshError as error:
        return error
    return None


def _mesh_rule(path: str, cel: str, message: str) -> Rule:
    """A rule that is broken when the arithmetic blames ``path``."""

    def holds(spec: Any) -> bool:
        error = _mesh_error(spec)
        return error is None or error.key != path

    def explain(spec: Any) -> str:
        error = _mesh_error(spec)
        return error.message if error else message

    return Rule(path=path, cel=cel, message=message, holds=holds, explain=explain)


def _size_rule(field: str) -> Rule:
    """A number of workers besides the largest must come out even with the same batch."""
    here, size = optional(f"workers.{field}")
    world = f"({size} * self.workers.processesPerWorker)"
    even = (
        f"{world} % {_REPLICATE} == 0",
        f"({_SHARD} in [-1, 0] || {_SHARD} * {_REPLICATE} == {world})",
        f"(!{_RESHARD[0]} || type({_RESHARD[1]}) != int || "
        f"({world} / {_REPLICATE}) % {_RESHARD[1]} == 0)",
        f"({_GLOBAL} == 0 || {_BATCH} % ({_LOCAL} * {world}) == 0)",
        f"(!{_STREAMS[0]} || {_STREAMS[1]} % {world} == 0)",
    )

    def holds(spec: Any) -> bool:
        size = getattr(spec.workers, field)
        if size in (None, spec.workers.max_size):
            return True
        # A batch that doesn't come out even at the largest size is blamed above.
        return not spec.legal_replicas or size in spec.legal_replicas

    def explain(spec: Any) -> str:
        size = getattr(spec.workers, field)
        workers = "1 worker" if size == 1 else f"{size} workers"
        return (
            f"{workers} can't share the batch and the degrees of {spec.workers.max_size}; "
            f"use one of {mesh.nearest(spec.legal_replicas, size)}"
        )

    return Rule(
        path=f"workers.{field}",
        cel=f"!{here} || ({' && '.join(even)})",
        message="is a size at which the degrees, or the batch and the streams of the largest size, "
        "don't come out even",
        holds=holds,
        explain=explain,
    )


def _volume_is_shared(spec: Any) -> bool:
    """Whether the checkpoint volume can be mounted by all workers."""
    volume = spec.volumes.checkpoint
    template = volume.claim_template if volume else None
    modes = template.access_modes if template else ()
    return not modes or spec.workers.max_size == 1 or "ReadWriteMany" in modes


MESH_RULES = (
    _mesh_rule(
        "parallelism.data_parallel_replicate_degree",
        _REPLICATE_FITS,
        f"must divide the number of ranks, {_WORKERS}",
    ),
    _mesh_rule(
        "parallelism.data_parallel_shard_degree",
        f"!({_REPLICATE_FITS}) || {_SHARD} in [-1, 0] || {_SHARD} * {_REPLICATE} == {_WORLD}",
        f"must be -1, or times dataParallelReplicateDegree be the number of ranks, {_WORKERS}",
    ),
    _mesh_rule(
        "parallelism.fsdp_reshard_after_forward",
        f"!({_REPLICATE_FITS}) || !{_RESHARD[0]} || type({_RESHARD[1]}) != int || "
        f"({_WORLD} / {_REPLICATE}) % {_RESHARD[1]} == 0",
        "must divide the number of ranks each copy is sharded over",
    ),
    _mesh_rule(
        "training.global_batch_size",
        f"{_GLOBAL} == 0 || {_BATCH_FITS}",
        f"must be -1 or a multiple of localBatchSize x the number of ranks, {_WORKERS}",
    ),
    _mesh_rule(
        "training.data_streams",
        f"!{_STREAMS[0]} || !({_BATCH_FITS}) || "
        f"({_BATCH} % {_STREAMS[1]} == 0 && {_STREAMS[1]} % {_WORLD} == 0)",
        "must divide the global batch size and be a multiple of the number of ranks",
    ),
)

SPEC_RULES = (
    *MESH_RULES,
    _size_rule("replicas"),
    _size_rule("min_replicas"),
    Rule(
        path="checkpoint.create_seed_checkpoint",
        cel=f"!{_SEED} || {_WORLD} == 1",
        message="needs exactly one process: 1 worker and workers.processesPerWorker 1",
        holds=lambda spec: not spec.checkpoint.create_seed_checkpoint or spec.world_size == 1,
    ),
    Rule(
        path="volumes.checkpoint",
        cel=f"!{_CHECKPOINT} || {optional('volumes.checkpoint')[0]}",
        message="is missing but checkpoint.enable is on; add a claimTemplate with a storage size, "
        "or the claimName of a claim that exists",
        holds=lambda spec: not spec.checkpoint.enable or spec.volumes.checkpoint is not None,
    ),
    Rule(
        path="volumes.checkpoint.claim_template.access_modes",
        cel=f"!{_MODES[0]} || {_MODES[1]}.size() == 0 || {_LARGEST} == 1 || "
        f"'ReadWriteMany' in {_MODES[1]}",
        message="several workers write to the volume; add ReadWriteMany or use 1 worker with more "
        "processes",
        holds=_volume_is_shared,
    ),
    Rule(
        path="job.dump_folder",
        cel=f"!{optional('job.dump_folder')[0]}",
        message="is where the operator mounts the checkpoint volume; remove it, and use "
        "volumes.checkpoint.subPath for a folder within the volume",
        holds=lambda spec: "dump_folder" not in spec.job.model_fields_set,
    ),
)

_TRAINING = (
    "job", "model", "training", "parallelism", "optimizer", "lr_scheduler", "checkpoint",
    "activation_checkpoint", "compile", "quantize", "metrics", "profiling", "comm", "validation",
    "memory_estimation", "fault_tolerance", "experimental",
)  # fmt: skip
_VOLUME = ("claim_template", "claim_name", "sub_path")
_WHILE_SUSPENDED = ("image", "resources", "pod_template")


def _same(path: str) -> str:
    """CEL: the value at a path is what it was, or still missing."""
    here, value = optional(path)
    old = ".".join(["oldSelf", *aliases(path)])
    before = here.replace("self.", "oldSelf.")
    return f"{here} == {before} && (!{here} || {value} == {old})"


SPEC_TRANSITIONS = (
    *(
        Transition(
            _same(section),
            f"{aliases(section)[0]} never changes; create a new job, with "
            "checkpoint.initialLoadPath to go on from this one",
        )
        for section in _TRAINING
    ),
    *(
        Transition(
            _same(f"volumes.checkpoint.{field}"),
            f"volumes.checkpoint.{aliases(field)[0]} never changes; create a new job",
        )
        for field in _VOLUME
    ),
    *(
        Transition(
            f"oldSelf.suspend || ({_same(f'workers.{field}')})",
            f"workers.{aliases(field)[0]} changes only while the job is suspended; "
            "set suspend to true first",
        )
        for field in _WHILE_SUSPENDED
    ),
    Transition(
        "self.workers.processesPerWorker == oldSelf.workers.processesPerWorker",
        "workers.processesPerWorker never changes; create a new job",
    ),
    *(
        Transition(
            _same(f"workers.{field}"),
            f"workers.{aliases(field)[0]} never changes; create a new job",
        )
        for field in ("min_replicas", "max_replicas")
    ),
    Transition(
        "self.workers.replicas == oldSelf.workers.replicas || has(oldSelf.workers.maxReplicas)",
        "workers.replicas changes only if workers.maxReplicas is set, which fixes the batch; "
        "create a new job with it",
    ),
    Transition(_same("managed_by"), "managedBy never changes; create a new job"),
)
