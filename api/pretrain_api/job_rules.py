"""Rules over the whole spec of a PretrainJob: the mesh, volumes, and what may change."""

from typing import Any

from pretrain_api.mesh_rules import LARGEST, MESH_RULES, WORLD
from pretrain_api.schema import Rule, Transition, aliases, optional, or_else

_SEED = or_else("checkpoint.create_seed_checkpoint", "false")
_CHECKPOINT = or_else("checkpoint.enable", "false")
_MODES = optional("volumes.checkpoint.claim_template.access_modes")


def _volume_is_shared(spec: Any) -> bool:
    """Whether the checkpoint volume can be mounted by all workers."""
    volume = spec.volumes.checkpoint
    template = volume.claim_template if volume else None
    modes = template.access_modes if template else ()
    return not modes or spec.workers.max_size == 1 or "ReadWriteMany" in modes


SPEC_RULES = (
    *MESH_RULES,
    Rule(
        path="checkpoint.create_seed_checkpoint",
        cel=f"!{_SEED} || {WORLD} == 1",
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
        cel=f"!{_MODES[0]} || {_MODES[1]}.size() == 0 || {LARGEST} == 1 || "
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
