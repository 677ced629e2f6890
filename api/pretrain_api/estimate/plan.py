"""Legal layouts of a job, ranked: those that fit first, the fastest of them first."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import log

from pretrain_api.config import Sections
from pretrain_api.estimate.gpus import GPUS, Gpu, gpu_of_product
from pretrain_api.estimate.memory import Memory, memory
from pretrain_api.estimate.speed import Speed, speed
from pretrain_api.flavors.llama3 import LlamaShape
from pretrain_api.mesh import (
    Degrees,
    batch_plan,
    blamed,
    divisors,
    largest_tensor_degree,
    resolve,
    shape_of,
)
from pretrain_api.support import support_rules

GIB = 2**30
# Of the device: CUDA and NCCL keep about this much, and the allocator can't use every gap.
CONTEXT_GIB, USABLE = 3.0, 0.95
TOLD_APART = 0.03  # share of speed below which layouts count as equally fast
DEBUG_VOCABULARY = 2048  # of flavors that take the tokenizer's
MAX_SPLIT = 16  # ranks of a sequence, and of a pipeline, that are tried
PRODUCT_LABELS = ("nvidia.com/gpu.product", "amd.com/gpu.product-name")


@dataclass(frozen=True, slots=True)
class Layout:
    """A legal layout and what it is expected to take and give."""

    degrees: Degrees
    memory: Memory
    speed: Speed
    fits: bool


def room(gpu: Gpu) -> int:
    """Bytes of a GPU that tensors can have."""
    return int((gpu.memory_gib * USABLE - CONTEXT_GIB) * GIB)


def layout(config: Sections, shape: LlamaShape, gpu: Gpu, world_size: int) -> Layout:
    """The layout a configuration asks for. Raises MeshError if it isn't legal."""
    batch = batch_plan(config, world_size)
    degrees = resolve(config.parallelism, world_size)
    each = memory(config, shape, degrees, DEBUG_VOCABULARY, batch.accumulation_steps)
    most = max(each, key=lambda one: one.peak)
    rate = speed(config, shape, degrees, gpu, DEBUG_VOCABULARY, batch.accumulation_steps)
    return Layout(degrees, most, rate, most.peak <= room(gpu))


def ranked(config: Sections, shape: LlamaShape, gpu: Gpu, world_size: int) -> list[Layout]:
    """All layouts of a job worth trying: those that fit first, then by predicted speed.

    Batch, model and everything but the degrees stay as configured. Tensor parallelism stays within
    a server. Of layouts whose speeds differ by less than the estimate can tell, the simpler is
    first.
    """
    found = [layout(one, shape, gpu, world_size) for one in _legal(config, shape, gpu, world_size)]
    return sorted(found, key=_rank)


def _rank(one: Layout) -> tuple[bool, int, int, float]:
    degrees, rate = one.degrees, one.speed.tokens_per_second
    axes = (degrees.pp, degrees.dp_replicate, degrees.cp, degrees.tp)
    return (not one.fits, -round(log(rate) / TOLD_APART), sum(n > 1 for n in axes), -rate)


def too_large(config: Sections, world_size: int, labels: dict[str, str]) -> str | None:
    """A sentence about a job that can't fit its GPUs, if it says which those are.

    Args:
        config: of the job.
        world_size: its ranks.
        labels: of the nodes it wants.
    """
    named = [name for label in PRODUCT_LABELS if (name := gpu_of_product(labels.get(label, "")))]
    shape = shape_of(config.model)
    if not named or shape is None or blamed(config, world_size) is not None:
        return None
    gpu = GPUS[named[0]]
    found = layout(config, shape, gpu, world_size)
    if found.fits:
        return None
    return (
        f"about {found.memory.peak / GIB:.0f} GiB are needed on each {named[0]}, which has room "
        f"for {room(gpu) / GIB:.0f}: training will probably run out of memory. {_advice(config)}"
    )


def _advice(config: Sections) -> str:
    """What takes less memory, cheapest first."""
    steps: list[str] = []
    if config.activation_checkpoint.mode != "full":
        steps.append("activationCheckpoint.mode full")
    if config.training.local_batch_size > 1 and config.parallelism.pipeline_parallel_degree == 1:
        steps.append("a smaller training.localBatchSize")
    steps.append("more workers or other degrees; pretrain plan lists those that fit")
    return "Try " + ", ".join(steps)


def _legal(config: Sections, shape: LlamaShape, gpu: Gpu, world_size: int) -> Iterator[Sections]:
    """Configurations that differ in their degrees alone, and that the trainer supports."""
    ranks = divisors(world_size)
    for tp in (n for n in divisors(largest_tensor_degree(shape)) if n <= gpu.per_node):
        for pp in (n for n in ranks if n <= MAX_SPLIT):
            for cp in (n for n in ranks if n <= MAX_SPLIT):
                for replicate in ranks:
                    parallelism = config.parallelism.model_copy(
                        update={
                            "tensor_parallel_degree": tp,
                            "pipeline_parallel_degree": pp,
                            "context_parallel_degree": cp,
                            "data_parallel_replicate_degree": replicate,
                            "data_parallel_shard_degree": -1,
                        }
                    )
                    changed = config.model_copy(update={"parallelism": parallelism})
                    if blamed(changed, world_size) is None and _supported(changed):
                        yield changed


def _supported(config: Sections) -> bool:
    return all(rule.holds(config) for rule in support_rules())
