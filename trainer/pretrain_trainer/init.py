"""Initial parameters that are the same on every layout, at a cost that scales with the shard.

Drawing a whole parameter and keeping one's shard is simple, but every rank of an 8B run would draw
eight billion numbers. Drawing just the shard from the rank's own generator is fast, but another
world size then means another model. So each parameter is cut into blocks along dimension 0, each
block has a generator of its own, keyed by (seed, parameter name, block), and a rank draws only the
blocks its shard touches. A block is about 16,000 numbers: small against a shard, large against the
cost of seeding a generator.
"""

from math import ceil, prod

import torch
from torch import Tensor, nn

from pretrain_trainer import rng
from pretrain_trainer.alive import Alive, unwatched
from pretrain_trainer.models.base import Constant, Distribution, LanguageModel, Normal
from pretrain_trainer.parallel.layout import Placement, placement_of

BLOCK_ELEMENTS = 2**14


@torch.no_grad()
def initialise(
    model: LanguageModel, seed: int, device: torch.device, alive: Alive = unwatched
) -> int:
    """Fill this rank's shard of every parameter, and all buffers, in place.

    Args:
        model: materialised, sharded or not.
        seed: the run's seed.
        device: where numbers are drawn; results are equal between devices of one kind. Shards may
            live elsewhere, as they do under CPU offload.
        alive: called for every parameter.

    Returns:
        How many numbers this rank drew.
    """
    distributions = model.distributions()
    drawn = 0
    for name, parameter in model.named_parameters():
        drawn += _fill(placement_of(parameter), distributions[name], (seed, name), device)
        alive()
    model.init_buffers()
    return drawn


def _fill(
    placement: Placement, distribution: Distribution, key: tuple[object, ...], device: torch.device
) -> int:
    """Fill one shard; returns how many numbers were drawn."""
    if isinstance(distribution, Constant):
        placement.local.fill_(distribution.value)
        return 0
    rows, *columns = placement.owned
    _, *inner = placement.shape
    if len(inner) > 1:  # a stack, such as of experts: each is drawn as if it were alone
        return sum(
            _fill(Placement(part, tuple(inner), tuple(columns)), distribution, (*key, i), device)
            for i, part in enumerate(placement.local, start=rows.start)
        )
    row_elements = prod(inner)
    height = max(1, BLOCK_ELEMENTS // row_elements)
    drawn = 0
    for block in range(rows.start // height, ceil(rows.stop / height)):
        top, bottom = block * height, min((block + 1) * height, placement.shape[0])
        shape = (bottom - top, *inner)
        values = _draw(distribution, shape, rng.generator(device, *key, block))
        first, last = max(top, rows.start), min(bottom, rows.stop)
        mine = values[first - top : last - top][(slice(None), *columns)]
        placement.local[first - rows.start : last - rows.start].copy_(mine)
        drawn += values.numel()
    return drawn


def _draw(distribution: Normal, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """float32 values of ``shape``; always float32, so that a bfloat16 model starts as its twin."""
    values = torch.empty(shape, dtype=torch.float32, device=generator.device)
    std, cutoff = distribution.std, distribution.cutoff
    if cutoff == float("inf"):
        return values.normal_(0.0, std, generator=generator)
    return nn.init.trunc_normal_(values, 0.0, std, -cutoff, cutoff, generator=generator)
