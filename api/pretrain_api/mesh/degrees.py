"""How many ranks each kind of parallelism takes, and the rules by which they fill a world."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import isqrt, prod

from pretrain_api.config import Parallelism
from pretrain_api.mesh.refusal import Broken


@dataclass(frozen=True, slots=True)
class Degrees:
    """Resolved degrees; none is negative. Experts share the ranks of the data dimensions.

    The axes of the mesh, outermost first: pp, dp_replicate, dp_shard, cp, tp.
    """

    dp_replicate: int
    dp_shard: int
    cp: int = 1
    tp: int = 1
    pp: int = 1
    ep: int = 1
    etp: int = 1

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return self.dp_replicate * self.dp_shard * self.cp * self.tp * self.pp

    @property
    def dp(self) -> int:
        """Ranks that see different samples."""
        return self.dp_replicate * self.dp_shard

    @property
    def fsdp(self) -> int:
        """Ranks a parameter outside of experts is sharded over.

        Those of a sequence are among them, because they hold the same weights.
        """
        return self.dp_shard * self.cp


def degrees_of(parallelism: Parallelism, world_size: int) -> Degrees:
    """Degrees in a world they fill exactly; what -1 stands for is what the others leave."""
    others = prod(_outer(parallelism).values())
    return Degrees(
        dp_replicate=parallelism.data_parallel_replicate_degree,
        dp_shard=world_size // others,
        cp=parallelism.context_parallel_degree,
        tp=parallelism.tensor_parallel_degree,
        pp=parallelism.pipeline_parallel_degree,
        ep=parallelism.expert_parallel_degree,
        etp=parallelism.expert_tensor_parallel_degree,
    )


def degree_rules(parallelism: Parallelism, world_size: int) -> Iterator[Broken]:
    """Broken rules about ranks alone; each assumes that those before it hold."""
    left = world_size
    for key, degree in _outer(parallelism).items():
        if left % degree:
            wrong = f"{degree} doesn't divide {_ranks(left)}"
            yield Broken(f"parallelism.{key}", wrong, divisors(left), near=left)
            return
        left //= degree
    shard = parallelism.data_parallel_shard_degree
    if shard not in (-1, left):
        space = (
            _ranks(left)
            if left == world_size
            else f"the {left} of {world_size} ranks that the other degrees leave"
        )
        wrong = f"{shard} doesn't fill {space}"
        yield Broken("parallelism.data_parallel_shard_degree", wrong, (-1, left))
        return
    degrees = degrees_of(parallelism, world_size)
    yield from _reshard(parallelism, degrees)
    yield from _experts(degrees)


def smallest_world(parallelism: Parallelism) -> int:
    """The fewest ranks that keep the rules about ranks: what doesn't fit there fits nowhere."""
    shard = parallelism.data_parallel_shard_degree
    others = prod(_outer(parallelism).values())
    if shard != -1:
        return others * shard
    # Both ask for a multiple of their own, so this many are enough.
    groups = parallelism.fsdp_reshard_after_forward
    most = parallelism.expert_parallel_degree * (groups if isinstance(groups, int) else 1)
    for candidate in divisors(most):
        if next(degree_rules(parallelism, others * candidate), None) is None:
            return others * candidate
    return others


def divisors(number: int) -> tuple[int, ...]:
    """All of them, ascending."""
    small = [n for n in range(1, isqrt(number) + 1) if number % n == 0]
    return tuple(sorted({*small, *(number // n for n in small)}))


def _outer(parallelism: Parallelism) -> dict[str, int]:
    """The degrees that are always given, by key; sharding takes the rest."""
    return {
        "data_parallel_replicate_degree": parallelism.data_parallel_replicate_degree,
        "context_parallel_degree": parallelism.context_parallel_degree,
        "tensor_parallel_degree": parallelism.tensor_parallel_degree,
        "pipeline_parallel_degree": parallelism.pipeline_parallel_degree,
    }


def _reshard(parallelism: Parallelism, degrees: Degrees) -> Iterator[Broken]:
    key = "parallelism.fsdp_reshard_after_forward"
    size = parallelism.fsdp_reshard_after_forward
    if not isinstance(size, int):
        return
    if degrees.tp * degrees.pp * degrees.ep > 1:
        # torch 2.15 makes the groups by a call in which all ranks must take part with the same
        # groups; with these, every rank knows but its own, and they wait for each other for ever.
        wrong = f"{size} ranks can't be grouped beside tensor, pipeline or expert parallelism"
        yield Broken(key, wrong, ("default", "always", "never"))
    elif degrees.fsdp % size:
        wrong = f"{size} doesn't divide the sharding degree {degrees.fsdp}"
        if degrees.cp > 1:
            wrong += f" ({degrees.dp_shard} x context_parallel_degree {degrees.cp})"
        yield Broken(key, wrong, divisors(degrees.fsdp), near=degrees.fsdp)


def _experts(degrees: Degrees) -> Iterator[Broken]:
    """Experts are split over ranks of dp_shard and cp; tp lends its own unless it splits each."""
    if degrees.etp not in (1, degrees.tp):
        wrong = f"{degrees.etp} is neither 1 nor tensor_parallel_degree {degrees.tp}"
        key = "parallelism.expert_tensor_parallel_degree"
        yield Broken(key, wrong, tuple(sorted({1, degrees.tp})), near=degrees.etp)
        return
    lent = degrees.tp if degrees.etp == 1 else 1
    room = degrees.fsdp * lent
    if room % degrees.ep:
        wrong = (
            f"{degrees.ep} doesn't divide the {_ranks(room)} experts can be split over "
            f"(data-parallel shard {degrees.dp_shard} x context {degrees.cp} x tensor {lent})"
        )
        yield Broken("parallelism.expert_parallel_degree", wrong, divisors(room), near=degrees.ep)


def _ranks(count: int) -> str:
    return "1 rank" if count == 1 else f"{count} ranks"
