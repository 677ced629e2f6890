"""Which units of a model make which stage of a pipeline, and cutting them out.

Units are the embedding, each block, the norm and the output, by the names of their modules. Unless
the configuration says otherwise they are split by cost, that is by the FLOPs that a token takes in
each: so the embedding weighs nothing, and the output of a large vocabulary as much as some blocks.
Names and keys of what a part keeps are those of the whole model. So initial values, checkpoints and
everything else that goes by names needs not know of stages.
"""

import copy
from collections.abc import Sequence
from itertools import accumulate, pairwise, zip_longest

from pretrain_api.config import Parallelism
from pretrain_api.mesh import counts_layers, stage_layers
from pretrain_api.split import balanced
from pretrain_trainer.errors import BadInputError
from pretrain_trainer.models.base import LanguageModel

Stages = tuple[tuple[str, ...], ...]  # names of units, by stage

BY_HAND = "parallelism.module_fqns_per_model_part"


def split(model: LanguageModel, parallelism: Parallelism, count: int) -> Stages:
    """Units of each of ``count`` stages, in order: every unit once, no stage empty.

    Raises:
        BadInputError: what is named by hand is not the model, or there are more stages than units.
    """
    if parallelism.module_fqns_per_model_part is not None:
        return by_hand(tuple(model.costs()), parallelism.module_fqns_per_model_part)
    if counts_layers(parallelism):
        layers = stage_layers(parallelism, count, len(model.layers))
        return by_layers(tuple(model.costs()), layers)
    return by_cost(model.costs(), count)


def by_cost(costs: dict[str, int], count: int) -> Stages:
    """The split whose costliest stage costs least; the norm stays with the output it is for.

    Args:
        costs: of all units, in order.
        count: of stages.
    """
    *front, norm, output = costs
    pieces = [*((name,) for name in front), (norm, output)]
    if count > len(pieces):
        raise BadInputError(
            f"parallelism.pipeline_parallel_degree: {count} stages can't share a model that comes "
            f"in {len(pieces)} pieces; use fewer"
        )
    sizes = balanced([sum(costs[name] for name in piece) for piece in pieces], count)
    return _dealt(pieces, sizes)


def by_layers(names: Sequence[str], layers: Sequence[int]) -> Stages:
    """So many layers in each stage; the embedding goes into the first and the rest into the last.

    Args:
        names: of all units, in order.
        layers: in each stage; they add up to those of the model.
    """
    embedding, *blocks, norm, output = names
    stages = [list(stage) for stage in _dealt([(name,) for name in blocks], layers)]
    stages[0].insert(0, embedding)
    stages[-1] += norm, output
    return tuple(map(tuple, stages))


def by_hand(names: Sequence[str], stages: Stages) -> Stages:
    """What the user named, if it is the model.

    Args:
        names: of all units, in order.
        stages: what was named.

    Raises:
        BadInputError: a unit is missing, unknown, named twice or in another place than in the
            model, or a stage is empty.
    """
    if () in stages:
        raise BadInputError(f"{BY_HAND}: part {stages.index(())} is empty; name its modules")
    named = [name for stage in stages for name in stage]
    for place, (wanted, found) in enumerate(zip_longest(names, named)):
        if wanted != found:
            before = f"after {named[place - 1]}" if place else "first"
            raise BadInputError(
                f"{BY_HAND}: all parts together are to name every module once and in the order of "
                f"the model, but {before} comes {found or 'nothing'} instead of "
                f"{wanted or 'nothing'}"
            )
    return stages


def cut(model: LanguageModel, names: Sequence[str]) -> LanguageModel:
    """A copy of a meta model that has only the named units.

    Raises:
        BadInputError: embedding and output are one matrix.
    """
    embedding, output = model.tok_embeddings, model.output
    if embedding is not None and output is not None and embedding.weight is output.weight:
        raise BadInputError(
            "parallelism.pipeline_parallel_degree: embedding and output of this model are one "
            "matrix, which can't be in the first and in the last stage; use 1"
        )
    part = copy.deepcopy(model)
    for name in ("tok_embeddings", "norm", "output"):
        if name not in names:
            setattr(part, name, None)
    for key in list(part.layers):
        if f"layers.{key}" not in names:
            del part.layers[key]
    return part


def _dealt(pieces: Sequence[tuple[str, ...]], sizes: Sequence[int]) -> Stages:
    edges = pairwise(accumulate(sizes, initial=0))
    return tuple(tuple(name for piece in pieces[a:b] for name in piece) for a, b in edges)
