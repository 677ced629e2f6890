"""Degrees of parallelism and batch arithmetic: one description of the mesh for everybody.

Two questions are answered here, for the operator, the trainer and the command line alike: which
degree does each kind of parallelism have in a world of so many ranks, and how many sequences does a
rank see per step. Nothing else may answer them. A combination that can't be is refused with a
sentence that names the key, the rule, and values that would do: each of them was tried with
everything else in the configuration. Where no value of the key alone helps, whole layouts are
named.

Rules are generators, one file per topic, that yield what is broken; each assumes that the rules
before it hold, so only the first counts.
"""

from collections.abc import Callable, Iterator
from itertools import product
from math import log2

from pretrain_api.config import Parallelism, Sections, Training
from pretrain_api.mesh.batch import BatchPlan, batch_of, batch_rules, resized
from pretrain_api.mesh.degrees import (
    Degrees,
    degree_rules,
    degrees_of,
    divisors,
    smallest_world,
)
from pretrain_api.mesh.layout import expert_count, largest_tensor_degree, layout_rules, shape_of
from pretrain_api.mesh.pipeline import (
    SCHEDULES,
    SPLIT_BACKWARD,
    Schedule,
    counts_layers,
    schedule_of,
    stage_count,
    stage_layers,
    stages_of_rank,
)
from pretrain_api.mesh.refusal import Broken, MeshError, Value, nearest, offer

__all__ = [
    "SCHEDULES",
    "SPLIT_BACKWARD",
    "BatchPlan",
    "Degrees",
    "MeshError",
    "Schedule",
    "batch_plan",
    "blamed",
    "counts_layers",
    "divisors",
    "expert_count",
    "largest_tensor_degree",
    "legal_replicas",
    "nearest",
    "nearest_layouts",
    "resized",
    "resolve",
    "schedule_of",
    "shape_of",
    "smallest_world",
    "split_batch",
    "stage_count",
    "stage_layers",
    "stages_of_rank",
]

_AXES = ("pipeline", "data_parallel_replicate", "context", "tensor")
_DEGREES = (
    "pipeline_parallel_degree",
    "data_parallel_replicate_degree",
    "context_parallel_degree",
    "tensor_parallel_degree",
)
_TRIED = 5  # degrees per axis, in the search for a whole layout
_NAMED = 3  # layouts


def resolve(parallelism: Parallelism, world_size: int) -> Degrees:
    """Degrees in a world of ``world_size`` ranks.

    Raises MeshError if the degrees can't fill the world exactly. Whether model and batch fit them
    is for :func:`batch_plan` to say.
    """
    broken = next(degree_rules(parallelism, world_size), None)
    if broken is None:
        return degrees_of(parallelism, world_size)

    def blame(value: Value) -> str | None:
        changed = parallelism.model_copy(update={broken.key.split(".")[1]: value})
        left = next(degree_rules(changed, world_size), None)
        return left.key if left else None

    raise _refusal(broken, blame)


def batch_plan(config: Sections, world_size: int) -> BatchPlan:
    """Batch arithmetic of ``config`` in a world of ``world_size`` ranks.

    Raises MeshError if degrees, batch sizes or streams don't come out even, or if the model can't
    be laid out so.
    """
    broken = next(_rules(config, world_size), None)
    if broken is None:
        return batch_of(config.training, degrees_of(config.parallelism, world_size).dp)

    def blame(value: Value) -> str | None:
        return blamed(_with(config, broken.key, value), world_size)

    raise _refusal(broken, blame, lambda: nearest_layouts(config, world_size))


def blamed(config: Sections, world_size: int) -> str | None:
    """The key :func:`batch_plan` would blame, without looking for advice; None if all is legal."""
    broken = next(_rules(config, world_size), None)
    return broken.key if broken else None


def split_batch(training: Training, dp: int) -> BatchPlan:
    """Batch arithmetic over ``dp`` ranks that see different samples.

    Raises MeshError if batch sizes or streams don't come out even.
    """
    broken = next(batch_rules(training, dp), None)
    if broken is not None:
        raise _refusal(broken, lambda value: None)
    return batch_of(training, dp)


def legal_replicas(config: Sections, processes: int, largest: int) -> tuple[int, ...]:
    """Numbers of workers, ascending, that can train ``config`` as ``largest`` workers would.

    Each worker has ``processes`` ranks. Batch size and streams are those of the largest size, so a
    smaller one is legal if they come out even there too, with more accumulation. Empty if the
    largest isn't legal itself.
    """
    if blamed(config, largest * processes) is not None:
        return ()
    parallelism = config.parallelism
    full = batch_of(config.training, degrees_of(parallelism, largest * processes).dp)
    fixed = resized(config.training, full)

    def legal(workers: int) -> bool:
        return next(_rules_of_size(parallelism, fixed, workers * processes), None) is None

    return tuple(workers for workers in range(1, largest + 1) if legal(workers))


def nearest_layouts(config: Sections, world_size: int) -> tuple[Degrees, ...]:
    """Legal layouts whose degrees differ least from those of ``config``, nearest first.

    Sharding takes what the others leave. Empty if nothing near is legal.
    """
    now = [getattr(config.parallelism, name) for name in _DEGREES]

    def distance(degrees: tuple[int, ...]) -> float:
        return sum(abs(log2(a / b)) for a, b in zip(degrees, now, strict=True))

    tried = [
        sorted(divisors(world_size), key=lambda n, at=at: abs(log2(n / at)))[:_TRIED] for at in now
    ]
    found: list[Degrees] = []
    for degrees in sorted(product(*tried), key=distance):
        changed = config.parallelism.model_copy(
            update={**dict(zip(_DEGREES, degrees, strict=True)), "data_parallel_shard_degree": -1}
        )
        if blamed(config.model_copy(update={"parallelism": changed}), world_size) is None:
            found.append(degrees_of(changed, world_size))
            if len(found) == _NAMED:
                break
    return tuple(found)


def _rules(config: Sections, world_size: int) -> Iterator[Broken]:
    """All broken rules; only the first is to be relied on."""
    yield from degree_rules(config.parallelism, world_size)
    yield from layout_rules(config)
    yield from batch_rules(config.training, degrees_of(config.parallelism, world_size).dp)


def _rules_of_size(
    parallelism: Parallelism, training: Training, world_size: int
) -> Iterator[Broken]:
    """Those of all rules that depend on the number of ranks."""
    yield from degree_rules(parallelism, world_size)
    yield from batch_rules(training, degrees_of(parallelism, world_size).dp)


def _with(config: Sections, key: str, value: Value) -> Sections:
    section, name = key.split(".")
    changed = getattr(config, section).model_copy(update={name: value})
    return config.model_copy(update={section: changed})


def _refusal(
    broken: Broken,
    blame: Callable[[Value], str | None],
    layouts: Callable[[], tuple[Degrees, ...]] = tuple,
) -> MeshError:
    """The error, with what would do: values of the key, or whole layouts, or else a hint.

    ``blame`` names what would be wrong with another value of the key. Where nothing would do,
    because something else is wrong as well, values are offered that this key isn't blamed for.
    """
    blames = {value: blame(value) for value in broken.values}
    good = tuple(value for value, key in blames.items() if key is None)
    if good:
        advice = offer(good, broken.near)
    elif broken.otherwise:
        advice = broken.otherwise
    elif found := layouts():
        advice = "legal layouts near it: " + "; ".join(map(_told, found))
    else:
        better = tuple(value for value, key in blames.items() if key != broken.key)
        advice = offer(better or broken.values, broken.near)
    return MeshError(broken.key, f"{broken.wrong}; {advice}")


def _told(degrees: Degrees) -> str:
    sizes = (degrees.pp, degrees.dp_replicate, degrees.cp, degrees.tp)
    parts = [f"{name} {n}" for name, n in zip(_AXES, sizes, strict=True) if n > 1]
    return ", ".join([*parts, f"data_parallel_shard {degrees.dp_shard}"])
