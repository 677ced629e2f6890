"""Degrees of parallelism and batch arithmetic.

Two questions are answered here, for the operator, the trainer and the command line alike: which
degree does each kind of parallelism have in a world of so many ranks, and how many sequences does a
rank see per step. Nothing else may answer them. A combination that doesn't come out even is refused
with a sentence that names the key and the values that would do.
"""

from dataclasses import dataclass
from math import isqrt, prod

from pretrain_api.config import Parallelism, Sections, Training


class MeshError(ValueError):
    """Degrees or batch sizes that don't come out even; ``key`` names the setting to change."""

    def __init__(self, key: str, message: str) -> None:
        super().__init__(f"{key}: {message}")
        self.key = key
        self.message = message


@dataclass(frozen=True, slots=True)
class Degrees:
    """Resolved degrees; none is negative. Experts share the ranks of the data dimensions."""

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


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """Sequences per step: global = local x data-parallel degree x accumulation steps."""

    global_batch_size: int
    local_batch_size: int
    accumulation_steps: int
    dp_degree: int
    streams: int


def resolve(parallelism: Parallelism, world_size: int) -> Degrees:
    """Degrees in a world of ``world_size`` ranks.

    Raises MeshError if the degrees can't fill the world exactly.
    """
    fixed = {
        "data_parallel_replicate_degree": parallelism.data_parallel_replicate_degree,
        "context_parallel_degree": parallelism.context_parallel_degree,
        "tensor_parallel_degree": parallelism.tensor_parallel_degree,
        "pipeline_parallel_degree": parallelism.pipeline_parallel_degree,
    }
    _fits(fixed, world_size)
    left = world_size // prod(fixed.values())
    shard = parallelism.data_parallel_shard_degree
    if shard not in (-1, left):
        space = (
            _ranks(left)
            if left == world_size
            else f"the {left} of {world_size} ranks that the other degrees leave"
        )
        raise MeshError(
            "parallelism.data_parallel_shard_degree",
            f"{shard} doesn't fill {space}; use -1 or {left}",
        )
    _reshard_fits(parallelism, left)
    return Degrees(
        dp_replicate=parallelism.data_parallel_replicate_degree,
        dp_shard=left,
        cp=parallelism.context_parallel_degree,
        tp=parallelism.tensor_parallel_degree,
        pp=parallelism.pipeline_parallel_degree,
        ep=parallelism.expert_parallel_degree,
        etp=parallelism.expert_tensor_parallel_degree,
    )


def batch_plan(config: Sections, world_size: int) -> BatchPlan:
    """Batch arithmetic of ``config`` in a world of ``world_size`` ranks.

    Raises MeshError if degrees, batch sizes or streams don't come out even.
    """
    return split_batch(config.training, resolve(config.parallelism, world_size).dp)


def split_batch(training: Training, dp: int) -> BatchPlan:
    """Batch arithmetic over ``dp`` ranks that see different samples.

    Raises MeshError if batch sizes or streams don't come out even.
    """
    local = training.local_batch_size
    per_pass = local * dp
    wanted = training.global_batch_size
    total = per_pass if wanted == -1 else wanted
    if total < 1 or total % per_pass:
        raise MeshError(
            "training.global_batch_size",
            f"{wanted} is no multiple of local_batch_size {local} x data-parallel degree {dp}; "
            f"use -1 or {_nearest_multiples(total, per_pass)}",
        )
    return BatchPlan(
        global_batch_size=total,
        local_batch_size=local,
        accumulation_steps=total // per_pass,
        dp_degree=dp,
        streams=_streams(training.data_streams, total, dp),
    )


def resized(training: Training, batch: BatchPlan) -> Training:
    """``training`` with batch size and streams fixed to those of ``batch``, for any other world."""
    return training.model_copy(
        update={"global_batch_size": batch.global_batch_size, "data_streams": batch.streams}
    )


def legal_replicas(config: Sections, processes: int, largest: int) -> tuple[int, ...]:
    """Numbers of workers, ascending, that can train ``config`` as ``largest`` workers would.

    Each worker has ``processes`` ranks. Batch size and streams are those of the largest size, so a
    smaller one is legal if they come out even there too, with more accumulation. Empty if the
    largest isn't legal itself.
    """

    def legal(training: Training, workers: int) -> BatchPlan | None:
        try:
            return split_batch(training, resolve(config.parallelism, workers * processes).dp)
        except MeshError:
            return None

    full = legal(config.training, largest)
    if full is None:
        return ()
    fixed = resized(config.training, full)
    return tuple(workers for workers in range(1, largest + 1) if legal(fixed, workers))


def nearest(numbers: tuple[int, ...], near: int) -> str:
    """At most eight of the numbers, those nearest, in order and with commas."""
    chosen = sorted(sorted(numbers, key=lambda n: abs(n - near))[:8])
    return ", ".join(map(str, chosen))


def _fits(fixed: dict[str, int], world_size: int) -> None:
    """The degrees other than sharding must divide the world; blame the first that doesn't."""
    left = world_size
    for key, degree in fixed.items():
        if left % degree:
            raise MeshError(
                f"parallelism.{key}",
                f"{degree} doesn't divide {_ranks(left)}; "
                f"use one of {nearest(_divisors(left), left)}",
            )
        left //= degree


def _reshard_fits(parallelism: Parallelism, shard: int) -> None:
    size = parallelism.fsdp_reshard_after_forward
    if isinstance(size, int) and shard % size:
        raise MeshError(
            "parallelism.fsdp_reshard_after_forward",
            f"{size} doesn't divide the sharding degree {shard}; "
            f"use one of {nearest(_divisors(shard), shard)}",
        )


def _streams(wanted: int | None, global_batch_size: int, dp: int) -> int:
    if wanted is None:
        return global_batch_size
    if global_batch_size % wanted or wanted % dp:
        legal = tuple(n for n in _divisors(global_batch_size) if n % dp == 0)
        raise MeshError(
            "training.data_streams",
            f"{wanted} must divide the global batch size {global_batch_size} and be a multiple of "
            f"the data-parallel degree {dp}; use one of {nearest(legal, wanted)}",
        )
    return wanted


def _divisors(number: int) -> tuple[int, ...]:
    small = [n for n in range(1, isqrt(number) + 1) if number % n == 0]
    return tuple(sorted({*small, *(number // n for n in small)}))


def _nearest_multiples(number: int, step: int) -> str:
    below = number // step * step
    return " or ".join(str(n) for n in (below, below + step) if n > 0)


def _ranks(count: int) -> str:
    return "1 rank" if count == 1 else f"{count} ranks"
