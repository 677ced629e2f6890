"""A bound on tokens per second: work divided by what the hardware could do at its best.

Compute is the model's FLOPs with causal attention counted half, as kernels skip what is masked, and
what activation checkpointing does again, at :data:`EFFICIENCY` of the peak. To it is added what
can't hide behind it: tensor parallelism's collectives between products, the part of FSDP's traffic
and of context parallelism's that takes longer than the compute beside it, the reduction over
replicas, the optimizer's pass over its state, and the time a pipeline idles. Collectives are rings
(each rank sends (n-1)/n of the bytes), and cost their bytes alone. Input, checkpoints and slow
ranks cost nothing here, so real runs are slower; what it is for is telling layouts apart.
"""

from dataclasses import dataclass

from pretrain_api.config import ActivationCheckpoint, Sections
from pretrain_api.estimate.gpus import Gpu
from pretrain_api.estimate.memory import BYTES, block_tensors, embedding_tensors, head_tensors
from pretrain_api.flavors.llama3 import LlamaShape
from pretrain_api.mesh import SPLIT_BACKWARD, Degrees, stage_count

# Of the peak, over all products of a step; chosen so that torchtitan's published runs of 8B on 8
# H100 (6,667 tokens/s each) and 70B on 256 (597) come out within a fifth.
EFFICIENCY = 0.43
OPTIMIZER_COPIES = 7  # read parameter, gradient and two moments, write all but the gradient
BLOCK_COLLECTIVES = 10  # of the stream over tensor-parallel ranks: 4 forward, 6 backward
ZERO_BUBBLE = 3  # times less idling where gradients of weights fill it
GIGA, TERA = 1e9, 1e12


@dataclass(frozen=True, slots=True)
class Speed:
    """Seconds of one optimizer step by what they are spent on, and what that makes."""

    compute: float
    tensor: float
    sharding: float
    context: float
    optimizer: float
    bubble: float
    tokens_per_second: float  # of one rank: the step's tokens over its seconds and all ranks
    mfu: float  # with attention counted in full, as torchtitan and the trainer's metrics do

    @property
    def seconds(self) -> float:
        """Of the whole step."""
        return (
            self.compute + self.tensor + self.sharding + self.context + self.optimizer + self.bubble
        )


def speed(
    config: Sections,
    shape: LlamaShape,
    degrees: Degrees,
    gpu: Gpu,
    vocab_size: int,
    accumulation: int = 1,
) -> Speed:
    """Estimate a step; arguments as those of :func:`pretrain_api.estimate.memory.memory`."""
    training, vocab = config.training, shape.vocab_size or vocab_size
    block = sum(t.whole(1) for t in block_tensors(shape))
    ends = (*embedding_tensors(shape, vocab), *head_tensors(shape, vocab))
    parameters = block * shape.n_layers + sum(t.whole(1) for t in ends)
    used = parameters - vocab * shape.dim
    attention = 12 * shape.n_layers * shape.n_heads * shape.head_dim * training.seq_len
    same = degrees.cp * degrees.tp * degrees.pp  # ranks that see the same samples
    # Of one step: those of a data-parallel rank, of which each of these ranks does its share.
    tokens = training.local_batch_size * accumulation * training.seq_len
    again = _again(config.activation_checkpoint)
    flops = (6 + 2 * again) * used + (1 + again / 3) * attention / 2
    compute = flops * tokens / same / (gpu.peak_tflops * TERA * EFFICIENCY)

    width, reduced = BYTES[training.mixed_precision_param], BYTES[training.mixed_precision_reduce]
    layers = shape.n_layers / degrees.pp
    stream = width * shape.dim * tokens / degrees.cp
    tensor = _ring(BLOCK_COLLECTIVES * layers * stream, degrees.tp, degrees.tp, gpu)
    if config.parallelism.enable_async_tensor_parallel:
        tensor /= 2

    held = parameters / degrees.tp / degrees.pp
    often = accumulation if degrees.pp == 1 else 1
    gathers = 2 if degrees.pp == 1 else 1
    span = degrees.fsdp * degrees.tp  # ranks from the first to the last of a group
    traffic = _ring(gathers * often * width * held, degrees.fsdp, span, gpu)
    traffic += _ring(reduced * held, degrees.fsdp, span, gpu)
    replicas = _ring(
        2 * reduced * held / degrees.fsdp,
        degrees.dp_replicate,
        span * degrees.dp_replicate,
        gpu,
    )
    keys = 2 * width * shape.n_kv_heads * shape.head_dim * tokens / degrees.tp
    travel = _ring(3 * layers * keys, degrees.cp, degrees.cp * degrees.tp, gpu)

    optimizer = (
        OPTIMIZER_COPIES * BYTES[training.dtype] * held / degrees.fsdp / (gpu.memory_gbs * GIGA)
    )
    busy = compute + tensor
    bubble = busy * _bubble(config, shape, degrees)
    sharding = max(0.0, traffic - compute) + replicas
    context = max(0.0, travel - compute * attention / (12 * used + attention))
    seconds = busy + bubble + sharding + context + optimizer
    rate = tokens / same / seconds
    return Speed(
        compute=compute,
        tensor=tensor,
        sharding=sharding,
        context=context,
        optimizer=optimizer,
        bubble=bubble,
        tokens_per_second=rate,
        mfu=rate * (6 * used + attention) / (gpu.peak_tflops * TERA),
    )


def _again(config: ActivationCheckpoint) -> float:
    """Share of the forward pass that is computed twice."""
    match config.mode, config.selective_ac_option:
        case "full", _:
            return 1.0
        case "selective", "op":
            return 0.5
        case "selective", every:
            return 1 / int(every)
        case "memory_budget", _:
            return (1 - config.memory_budget) / 2
        case _:
            return 0.0


def _ring(size: float, ranks: int, span: int, gpu: Gpu) -> float:
    """Seconds of collectives of ``size`` bytes in all; ``span`` ranks lie from first to last."""
    bandwidth = gpu.link_gbs if span <= gpu.per_node else gpu.network_gbs
    return size * (ranks - 1) / ranks / (bandwidth * GIGA)


def _bubble(config: Sections, shape: LlamaShape, degrees: Degrees) -> float:
    """Idle time of a pipeline as a share of the busy time: (ranks - 1) / (stages x microbatches).

    Narayanan et al., *Efficient Large-Scale Language Model Training on GPU Clusters* (2021).
    """
    parallelism = config.parallelism
    if degrees.pp == 1:
        return 0.0
    stages = (stage_count(parallelism, shape.n_layers) or degrees.pp) / degrees.pp
    microbatches = config.training.local_batch_size // parallelism.pipeline_parallel_microbatch_size
    idle = (degrees.pp - 1) / (stages * microbatches)
    fills = config.activation_checkpoint.mode == "none" and not config.compile.enable
    zero = parallelism.pipeline_parallel_schedule in SPLIT_BACKWARD
    return idle / ZERO_BUBBLE if zero and fills else idle
