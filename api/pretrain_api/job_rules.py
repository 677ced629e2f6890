"""Rules over the whole spec of a PretrainJob: arithmetic, volumes, and what may change.

The arithmetic lives in :mod:`pretrain_api.mesh`. Here each of its sentences is tied to the CEL that
refuses the same specs at the API server.
"""

from typing import Any

from pretrain_api import mesh
from pretrain_api.schema import Rule, Transition, aliases, optional, or_else

_WORLD = "(self.workers.replicas * self.workers.processesPerWorker)"
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
        "must divide the number of ranks, workers.replicas x workers.processesPerWorker",
    ),
    _mesh_rule(
        "parallelism.data_parallel_shard_degree",
        f"!({_REPLICATE_FITS}) || {_SHARD} in [-1, 0] || {_SHARD} * {_REPLICATE} == {_WORLD}",
        "must be -1, or times dataParallelReplicateDegree be the number of ranks, "
        "workers.replicas x workers.processesPerWorker",
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
        "must be -1 or a multiple of localBatchSize x the number of ranks, "
        "workers.replicas x workers.processesPerWorker",
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
    Rule(
        path="checkpoint.create_seed_checkpoint",
        cel=f"!{_SEED} || {_WORLD} == 1",
        message="needs exactly one process: workers.replicas 1 and workers.processesPerWorker 1",
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
        cel=f"!{_MODES[0]} || {_MODES[1]}.size() == 0 || self.workers.replicas == 1 || "
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
    Transition(
        "self.workers.replicas == oldSelf.workers.replicas",
        "workers.replicas can't change yet; create a new job of another size",
    ),
    Transition(_same("managed_by"), "managedBy never changes; create a new job"),
)
