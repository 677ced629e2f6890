"""The arithmetic of :mod:`pretrain_api.mesh` as rules over the spec of a PretrainJob.

Each of its sentences is tied to the CEL that refuses the same specs at the API server. Degrees,
batch and streams are judged at the largest size, maxReplicas; then the other sizes the spec names
must come out even with that very batch.
"""

import re
from collections.abc import Callable
from typing import Any

from pretrain_api import mesh
from pretrain_api.flavors import llama3
from pretrain_api.flavors.llama3 import LlamaShape
from pretrain_api.schema import Rule, optional, or_else

LARGEST = or_else("workers.max_replicas", "self.workers.replicas")
WORLD = f"({LARGEST} * self.workers.processesPerWorker)"
_WORKERS = "workers (maxReplicas or replicas) x processesPerWorker"


def _key(name: str, default: str) -> str:
    return or_else(f"parallelism.{name}", default)


def _table(number: Callable[[LlamaShape], int]) -> str:
    """What is known of llama3 by flavor; 0 for other families, of which nothing is known."""
    entries = ", ".join(f"'{name}': {number(shape)}" for name, shape in llama3.FLAVORS.items())
    return f"(known ? {{{entries}}}[flavor] : 0)"


def _names(choose: Callable[[mesh.Schedule], bool]) -> str:
    """Whether the schedule is one of some, and not from a file."""
    chosen = [name for name, schedule in mesh.SCHEDULES.items() if choose(schedule)]
    return f"(!csv && schedule in {chosen})"


_RESHARD = optional("parallelism.fsdp_reshard_after_forward")
_STREAMS = optional("training.data_streams")
_MODULES = optional("parallelism.module_fqns_per_model_part")
_EACH = optional("parallelism.pipeline_parallel_layers_per_stage")

# Names that rules may use, each after those it uses itself. CEL has no variables, but a list of one
# can be quantified over.
_VARIABLES = {
    "world": WORLD,
    "ranks": "world",  # at the size that is judged, if it is another
    "replicate": _key("data_parallel_replicate_degree", "1"),
    "shard": _key("data_parallel_shard_degree", "-1"),
    "cp": _key("context_parallel_degree", "1"),
    "tp": _key("tensor_parallel_degree", "1"),
    "pp": _key("pipeline_parallel_degree", "1"),
    "ep": _key("expert_parallel_degree", "1"),
    "etp": _key("expert_tensor_parallel_degree", "1"),
    "same": "cp * tp * pp",  # ranks that see the same samples
    "others": "replicate * same",
    "fills": "ranks % others == 0",
    "left": "ranks / others",  # ranks each copy is sharded over, without those of a sequence
    "local": or_else("training.local_batch_size", "8"),
    "wanted": or_else("training.global_batch_size", "-1"),
    "batch": "(wanted == -1 ? local * (world / same) : wanted)",
    "even": "(wanted == 0 || !fills || batch % (local * (ranks / same)) == 0)",
    "seq": or_else("training.seq_len", "2048"),
    "flavor": or_else("model.flavor", "'debugmodel'"),
    "known": f"{or_else('model.name', repr('llama3'))} == 'llama3' && "
    f"flavor in {list(llama3.FLAVORS)}",
    "heads": _table(mesh.largest_tensor_degree),
    "layers": _table(lambda shape: shape.n_layers),
    "experts": _table(mesh.expert_count),
    "schedule": _key("pipeline_parallel_schedule", "'1F1B'"),
    "csv": f"{_key('pipeline_parallel_schedule_csv', repr(''))} != ''",
    "first": _key("pipeline_parallel_first_stage_less_layers", "1"),
    "last": _key("pipeline_parallel_last_stage_less_layers", "1"),
    "single": _names(lambda schedule: schedule.most == 1),
    # 0 where it can't be known without the number of layers or the file of the schedule.
    "stages": f"({_MODULES[0]} ? {_MODULES[1]}.size() : "
    f"!{_EACH[0]} ? (csv ? 0 : pp * (single ? 1 : 2)) : "
    f"known ? (layers + first + last + {_EACH[1]} - 1) / {_EACH[1]} : 0)",
    "dealt": f"pp > 1 && known && stages > 0 && !{_MODULES[0]}",  # layers, over stages
    "size": _key("pipeline_parallel_microbatch_size", "1"),
    "microbatches": "local / size",
}


def _cel(text: str, ranks: str = "world") -> str:
    """The expression with every name it uses given its value; ``ranks`` as another expression."""
    for name, value in reversed((_VARIABLES | {"ranks": ranks}).items()):
        if re.search(rf"(?<![.\w']){name}\b(?!')", text):
            text = f"[{value}].all({name}, {text})"
    return text


_RESHARD_FITS = (
    f"(!{_RESHARD[0]} || type({_RESHARD[1]}) != int || "
    f"(tp * pp * ep == 1 && (left * cp) % {_RESHARD[1]} == 0))"
)
_EXPERTS_FIT = "(left * cp * (etp == 1 ? tp : 1)) % ep == 0"
_STAGES_FIT = (
    f"(single ? stages == pp : {_names(lambda schedule: schedule.most == 2)} ? stages == 2 * pp : "
    "stages % pp == 0 && stages >= pp * (csv ? 1 : 2))"
)
_COMPILED = (
    f"({or_else('compile.enable', 'false')} && "
    f"'model' in {or_else('compile.components', repr(['model', 'loss']))})"
)


def _absent(keys: tuple[str, ...]) -> str:
    """Whether none of these keys is given, so that a rule about them holds.

    The API server evaluates every rule at every write of a job, its status included. Most jobs use
    few kinds of parallelism, and the arithmetic of a rule costs fifty times this question.
    """
    return " && ".join(f"!{optional(key)[0]}" for key in keys)


def _rule(path: str, cel: str, message: str, *, of: tuple[str, ...] = ()) -> Rule:
    """A rule that is broken when the arithmetic blames ``path``.

    It assumes that the rules before it hold: where they don't, it is silent. It holds where none of
    the keys ``of`` is given, by default ``path`` alone.
    """

    def holds(spec: Any) -> bool:
        return mesh.blamed(spec, spec.world_size) != path

    def explain(spec: Any) -> str:
        try:
            mesh.batch_plan(spec, spec.world_size)
        except mesh.MeshError as error:
            return error.message
        return message

    cel = f"({_absent(of or (path,))}) || {_cel(cel)}"
    return Rule(path=path, cel=cel, message=message, holds=holds, explain=explain)


_CUT = ("parallelism.context_parallel_degree", "parallelism.tensor_parallel_degree")
_STAGES = ("parallelism.pipeline_parallel_degree",)

_DEGREES = (
    _rule(
        "parallelism.data_parallel_replicate_degree",
        "world % replicate == 0",
        f"must divide the number of ranks, {_WORKERS}",
    ),
    _rule(
        "parallelism.context_parallel_degree",
        "world % (replicate * cp) == 0",
        f"must divide the number of ranks, {_WORKERS}, that the other degrees leave",
    ),
    _rule(
        "parallelism.tensor_parallel_degree",
        "world % (replicate * cp * tp) == 0 && (!known || heads % tp == 0)",
        f"must divide the number of ranks, {_WORKERS}, that the other degrees leave, and the "
        "model's heads of keys and values",
    ),
    _rule(
        "parallelism.pipeline_parallel_degree",
        "fills && (!dealt || stages <= layers)",
        f"must divide the number of ranks, {_WORKERS}, that the other degrees leave, and make no "
        "more stages than there are layers",
    ),
    _rule(
        "parallelism.data_parallel_shard_degree",
        "!fills || shard in [-1, 0] || shard == left",
        f"must be -1, or times the other degrees be the number of ranks, {_WORKERS}",
    ),
    _rule(
        "parallelism.fsdp_reshard_after_forward",
        f"!fills || {_RESHARD_FITS}",
        "must divide the number of ranks each copy is sharded over, and can't be a number beside "
        "tensor, pipeline or expert parallelism",
    ),
    _rule(
        "parallelism.expert_tensor_parallel_degree",
        "etp == 1 || (etp == tp && (!known || experts > 0))",
        "must be 1 or tensorParallelDegree, and 1 for a model without experts",
    ),
    _rule(
        "parallelism.expert_parallel_degree",
        "ep == 1 || ((!known || (experts > 0 && experts % ep == 0)) && "
        f"(!fills || {_EXPERTS_FIT}))",
        "must divide the model's experts, and the number of ranks each copy is sharded over, times "
        "tensorParallelDegree if expertTensorParallelDegree is 1; 1 for a model without experts",
    ),
    _rule(
        "parallelism.enable_async_tensor_parallel",
        f"!{_key('enable_async_tensor_parallel', 'false')} || (tp > 1 && {_COMPILED})",
        "needs a tensorParallelDegree above 1, and compile.enable with model in compile.components",
    ),
    _rule(
        "training.seq_len",
        "seq % (cp * tp) == 0 && (cp == 1 || seq % (cp * 2) == 0)",
        "must be a multiple of contextParallelDegree x tensorParallelDegree, and of twice a "
        "contextParallelDegree above 1",
        of=_CUT,
    ),
)
_PIPELINE = (
    _rule(
        "parallelism.pipeline_parallel_schedule",
        f"pp == 1 || csv || schedule in {list(mesh.SCHEDULES)}",
        f"must be one of {', '.join(mesh.SCHEDULES)}",
        of=_STAGES,
    ),
    _rule(
        "parallelism.module_fqns_per_model_part",
        f"pp == 1 || !{_MODULES[0]} || {_STAGES_FIT}",
        "must name the modules of as many stages as the schedule wants on each rank of the "
        "pipeline, times pipelineParallelDegree",
        of=_STAGES,
    ),
    _rule(
        "parallelism.pipeline_parallel_layers_per_stage",
        f"pp == 1 || {_MODULES[0]} || !{_EACH[0]} || !known || {_STAGES_FIT}",
        "must make as many stages as the schedule wants on each rank of the pipeline",
        of=_STAGES,
    ),
    _rule(
        "parallelism.pipeline_parallel_first_stage_less_layers",
        "!dealt || first <= (layers + first + last) / stages",
        "must not be more than the layers of a stage",
        of=_STAGES,
    ),
    _rule(
        "parallelism.pipeline_parallel_last_stage_less_layers",
        "!dealt || last <= (layers + first + last) / stages",
        "must not be more than the layers of a stage",
        of=_STAGES,
    ),
    _rule(
        "parallelism.pipeline_parallel_microbatch_size",
        "pp == 1 || local % size == 0",
        "must divide localBatchSize",
        of=_STAGES,
    ),
    _rule(
        "training.local_batch_size",
        "pp == 1 || local % size != 0 || ("
        f"microbatches >= ({_names(lambda s: s.a_microbatch_per_stage)} && stages > 0 ? "
        "stages : pp) && "
        f"(!{_names(lambda s: s.even_rounds)} || microbatches % (microbatches / pp) == 0))",
        "must make as many microbatches, of pipelineParallelMicrobatchSize, as the schedule needs: "
        "one for each rank of the pipeline, or for each stage, and some in even rounds",
        of=_STAGES,
    ),
)
_BATCHES = (
    _rule(
        "training.global_batch_size",
        "even",
        f"must be -1 or a multiple of localBatchSize x the data-parallel ranks of {_WORKERS}",
    ),
    _rule(
        "training.data_streams",
        f"!{_STREAMS[0]} || !fills || !even || "
        f"(batch % {_STREAMS[1]} == 0 && {_STREAMS[1]} % (ranks / same) == 0)",
        "must divide the global batch size and be a multiple of the number of data-parallel ranks",
    ),
)


def _size_rule(field: str) -> Rule:
    """A number of workers besides the largest must come out even with the same batch."""
    here, size = optional(f"workers.{field}")
    differs = optional("workers.max_replicas")[0] if field == "replicas" else here
    ranks = f"({size} * self.workers.processesPerWorker)"
    fits = (
        "fills",
        "(shard in [-1, 0] || shard == left)",
        _RESHARD_FITS,
        _EXPERTS_FIT,
        "even",
        f"(!{_STREAMS[0]} || {_STREAMS[1]} % (ranks / same) == 0)",
    )

    def holds(spec: Any) -> bool:
        size = getattr(spec.workers, field)
        if size in (None, spec.workers.max_size):
            return True
        # What doesn't come out even at the largest size is blamed above.
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
        cel=f"!{differs} || {_cel(' && '.join(fits), ranks)}",
        message="is a size at which the degrees, or the batch and the streams of the largest size, "
        "don't come out even",
        holds=holds,
        explain=explain,
    )


MESH_RULES = (
    *_DEGREES,
    *_PIPELINE,
    *_BATCHES,
    _size_rule("replicas"),
    _size_rule("min_replicas"),
)
