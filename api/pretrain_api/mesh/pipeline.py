"""Pipelines: how layers become stages, stages go to ranks, and what a schedule needs.

Stages are cut by cost (:mod:`pretrain_api.split`) unless a key about layers per stage is set. Then
the arithmetic is torchtitan's: the embedding counts as some layers of the first stage and the
output as some of the last (``pipeline_parallel_first_stage_less_layers`` and ``..._last_...``), and
layers are dealt out evenly over stages, early ones taking what doesn't come out even. What each
schedule asks of stages and microbatches is what torch's class of that name checks, or what would
leave its ranks waiting for each other for ever. With fewer microbatches than ranks some ranks would
never work at the same time: fewer ranks would be as fast, so no schedule takes them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from types import MappingProxyType

from pretrain_api.config import Parallelism
from pretrain_api.mesh.degrees import divisors
from pretrain_api.mesh.refusal import Broken


@dataclass(frozen=True, slots=True)
class Schedule:
    """What an order of microbatches asks for.

    Attributes:
        fewest: stages per rank, at least.
        most: stages per rank, at most; None for any number.
        a_microbatch_per_stage: it takes as many microbatches as there are stages, at least; the
            others, as many as there are ranks.
        even_rounds: microbatches come in rounds of about one per rank, which must be equal.
        in_v: a rank has its stages from both ends, so that the last one meets the first.
    """

    fewest: int = 2
    most: int | None = None
    a_microbatch_per_stage: bool = False
    even_rounds: bool = False
    in_v: bool = False


SCHEDULES = MappingProxyType({
    "GPipe": Schedule(fewest=1, most=1),
    "1F1B": Schedule(fewest=1, most=1),
    "Interleaved1F1B": Schedule(even_rounds=True),
    "LoopedBFS": Schedule(),
    "InterleavedZeroBubble": Schedule(even_rounds=True),
    "ZBVZeroBubble": Schedule(most=2, in_v=True),
    "DualPipeV": Schedule(most=2, a_microbatch_per_stage=True, in_v=True),
})  # fmt: skip
# Those that compute gradients of weights when there is nothing better to do.
SPLIT_BACKWARD = frozenset({"InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV"})
MAX_LAYERS = 512  # per stage, in what is offered
FROM_FILE = Schedule(fewest=1)  # an order of one's own, which only the trainer reads


def schedule_of(parallelism: Parallelism) -> Schedule:
    """What the chosen schedule asks for. Raises KeyError for an unknown name."""
    if parallelism.pipeline_parallel_schedule_csv:
        return FROM_FILE
    return SCHEDULES[parallelism.pipeline_parallel_schedule]


def stage_count(parallelism: Parallelism, n_layers: int | None) -> int | None:
    """Stages of the whole pipeline.

    None if that takes the number of layers, which is unknown, or the file of the schedule.
    """
    degree = parallelism.pipeline_parallel_degree
    if degree == 1:
        return 1
    if parallelism.module_fqns_per_model_part is not None:
        return len(parallelism.module_fqns_per_model_part)
    if parallelism.pipeline_parallel_layers_per_stage is not None:
        if n_layers is None:
            return None
        return -(
            -_weighted(parallelism, n_layers) // parallelism.pipeline_parallel_layers_per_stage
        )
    if parallelism.pipeline_parallel_schedule_csv:
        return None
    single = schedule_of(parallelism).most == 1
    return degree if single else 2 * degree


def counts_layers(parallelism: Parallelism) -> bool:
    """Whether stages are to have equal numbers of layers rather than equal costs."""
    keys = (
        parallelism.pipeline_parallel_layers_per_stage,
        parallelism.pipeline_parallel_first_stage_less_layers,
        parallelism.pipeline_parallel_last_stage_less_layers,
    )
    return keys != (None, None, None)


def stage_layers(parallelism: Parallelism, count: int, n_layers: int) -> tuple[int, ...]:
    """Layers in each stage where they are counted, in order; they add up to ``n_layers``.

    For a layout that keeps the rules of this module and names no modules of its own.
    """
    each, left = divmod(_weighted(parallelism, n_layers), count)
    layers = [each + (stage < left) for stage in range(count)]
    layers[0] -= _less(parallelism, "first")
    layers[-1] -= _less(parallelism, "last")
    return tuple(layers)


def stages_of_rank(parallelism: Parallelism, count: int, rank: int) -> tuple[int, ...]:
    """Numbers of the stages of one rank of the pipeline, in the order data flows.

    Stages go round the ranks, or there and back for a schedule in the form of a V.
    """
    degree = parallelism.pipeline_parallel_degree
    if degree > 1 and schedule_of(parallelism).in_v:
        return (rank, count - 1 - rank)
    return tuple(range(rank, count, degree))


def pipeline_rules(
    parallelism: Parallelism, local_batch_size: int, n_layers: int | None
) -> Iterator[Broken]:
    """Broken rules about pipelines; each assumes that those before it hold."""
    if parallelism.pipeline_parallel_degree == 1:
        return
    name = parallelism.pipeline_parallel_schedule
    if not parallelism.pipeline_parallel_schedule_csv and name not in SCHEDULES:
        wrong = f"there is no schedule {name}"
        yield Broken("parallelism.pipeline_parallel_schedule", wrong, tuple(SCHEDULES))
        return
    count = stage_count(parallelism, n_layers)
    if count is not None:
        yield from _stages(parallelism, count)
        if n_layers is not None and parallelism.module_fqns_per_model_part is None:
            yield from _layers(parallelism, count, n_layers)
    yield from _microbatches(parallelism, local_batch_size, count)


def _stages(parallelism: Parallelism, count: int) -> Iterator[Broken]:
    """Every rank has as many stages as the schedule can handle."""
    degree, schedule = parallelism.pipeline_parallel_degree, schedule_of(parallelism)
    per_rank, over = divmod(count, degree)
    legal = not over and schedule.fewest <= per_rank and per_rank <= (schedule.most or per_rank)
    if legal:
        return
    wanted = {1: "exactly 1 stage", 2: "exactly 2 stages"}.get(
        schedule.most or 0,
        "as many stages" if schedule.fewest == 1 else "at least 2 stages, as many",
    )
    wanted = f"{_name(parallelism)} wants {wanted} on each of {degree} ranks"
    if parallelism.module_fqns_per_model_part is not None:
        stages = schedule.most or max(schedule.fewest, count // degree)
        yield Broken(
            "parallelism.module_fqns_per_model_part",
            f"these are the modules of {count} stages, but {wanted}",
            otherwise=f"name the modules of {stages * degree} stages, or leave it out",
        )
        return
    yield Broken(
        "parallelism.pipeline_parallel_layers_per_stage",
        f"{parallelism.pipeline_parallel_layers_per_stage} makes {count} stages, but {wanted}",
        tuple(range(1, MAX_LAYERS)),
        near=parallelism.pipeline_parallel_layers_per_stage or 1,
        otherwise="leave it out",
    )


def _layers(parallelism: Parallelism, count: int, n_layers: int) -> Iterator[Broken]:
    """Every stage has a layer, or the embedding or output it has in their place."""
    if count > n_layers:
        per_rank = count // parallelism.pipeline_parallel_degree
        yield Broken(
            "parallelism.pipeline_parallel_degree",
            f"{parallelism.pipeline_parallel_degree} makes {count} stages of {n_layers} layers",
            tuple(range(1, n_layers // per_rank + 1)),
            near=parallelism.pipeline_parallel_degree,
        )
        return
    each = _weighted(parallelism, n_layers) // count
    for place in ("first", "last"):
        name, less = f"pipeline_parallel_{place}_stage_less_layers", _less(parallelism, place)
        if less > each:
            wrong = f"{less} is more than the {each} layers of a stage"
            yield Broken(f"parallelism.{name}", wrong, tuple(range(n_layers + 1)), near=less)


def _microbatches(parallelism: Parallelism, local: int, count: int | None) -> Iterator[Broken]:
    size, schedule = parallelism.pipeline_parallel_microbatch_size, schedule_of(parallelism)
    if local % size:
        wrong = f"{size} doesn't divide local_batch_size {local}"
        key = "parallelism.pipeline_parallel_microbatch_size"
        yield Broken(key, wrong, divisors(local), near=size)
        return
    number, key = local // size, "training.local_batch_size"
    told = f"{local} in microbatches of {size} makes {number}"
    # Up to twice the ranks, every number of microbatches is one or two even rounds.
    candidates = tuple(
        n * size for n in _around(number, count or parallelism.pipeline_parallel_degree)
    )
    least, of = parallelism.pipeline_parallel_degree, "ranks"
    if schedule.a_microbatch_per_stage and count is not None:
        least, of = count, "stages"
    if number < least:
        wrong = f"{told}, but {_name(parallelism)} needs one for each of {least} {of}"
        yield Broken(key, wrong, candidates, near=local)
    elif schedule.even_rounds and not _even(number, parallelism.pipeline_parallel_degree):
        wrong = (
            f"{told}, which {_name(parallelism)} can't deal out in even rounds over "
            f"{parallelism.pipeline_parallel_degree} ranks"
        )
        yield Broken(key, wrong, candidates, near=local)


def _name(parallelism: Parallelism) -> str:
    """What to call the schedule in a sentence."""
    from_file = parallelism.pipeline_parallel_schedule_csv
    return "the schedule of the file" if from_file else parallelism.pipeline_parallel_schedule


def _even(microbatches: int, ranks: int) -> bool:
    """Whether rounds of one microbatch per rank, or more, are equally long."""
    return microbatches % (microbatches // ranks) == 0


def _around(number: int, stages: int) -> tuple[int, ...]:
    """Numbers of microbatches to try: the multiples of stages next to one, and its neighbours."""
    multiple = number // stages * stages
    near = {multiple, multiple + stages, *range(max(1, number - stages), number + stages)}
    return tuple(sorted(n for n in near if n > 0))


def _weighted(parallelism: Parallelism, n_layers: int) -> int:
    """Layers, counting embedding and output as the layers they stand for."""
    return n_layers + _less(parallelism, "first") + _less(parallelism, "last")


def _less(parallelism: Parallelism, place: str) -> int:
    """Layers that the embedding (first) or the output (last) stands for."""
    less: int | None = getattr(parallelism, f"pipeline_parallel_{place}_stage_less_layers")
    return 1 if less is None else less
