"""Bytes a rank needs, by component, in closed form.

Parameters, gradients and optimizer state are counted exactly, tensor by tensor. Activations are
what autograd keeps of a block of this repository's Llama, found by following its forward pass:
with ``t`` tokens of a microbatch on this rank, ``n`` tensor-parallel ranks, ``d`` features of the
stream, ``k`` of keys, ``f`` of the feed-forward layer and ``h`` heads, in bytes at two per number:

    stream and its norm, twice      2 x (2td/n + 2td)   the norm's output is gathered for products
    queries, keys, values, mixed    (4td + 4tk)/n       and 4th/n for attention's log-sum-exp
    feed-forward layer              8tf/n               two products, the gate, what it lets through

Korthikanti et al., *Reducing Activation Recomputation in Large Transformer Models* (2022), count
the older architecture in the same way. The compiler keeps less than this, never more.
"""

from dataclasses import dataclass
from math import ceil, prod

from pretrain_api.config import ActivationCheckpoint, Sections
from pretrain_api.flavors.llama3 import LlamaShape
from pretrain_api.mesh import (
    Degrees,
    counts_layers,
    schedule_of,
    stage_count,
    stage_layers,
    stages_of_rank,
)
from pretrain_api.split import balanced

BYTES = {"float32": 4, "bfloat16": 2}
PORTION_BYTES = 2**30  # of float32 logits that the trainer's head makes at once
PORTION_COPIES = 12  # bytes per logit: three in float32, or two and two in bfloat16
SPLIT_COPIES = 16  # with the loss of a split vocabulary: another in float32
MOMENTS = 2  # of Adam


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of one rank.

    Components don't all have their most at once; ``peak`` is the largest sum at any one time.
    """

    parameters: int
    gradients: int
    optimizer: int
    activations: int  # those kept for the backward pass, and what a block's takes
    logits: int
    buffers: int  # parameters gathered and gradients reduced
    peak: int
    kept: int  # activations between forward and backward pass


@dataclass(frozen=True, slots=True)
class Tensor:
    """A parameter: its shape, and which dimension tensor parallelism splits, if any."""

    shape: tuple[int, ...]
    split: int | None = None

    def whole(self, tp: int) -> int:
        """Elements of a rank's part before sharding; of the first rank, which has most."""
        return prod(ceil(n / tp) if axis == self.split else n for axis, n in enumerate(self.shape))

    def sharded(self, tp: int, fsdp: int) -> int:
        """Elements of a rank's shard along dimension 0; of the first rank, which has most."""
        rows = ceil(self.shape[0] / tp) if self.split == 0 else self.shape[0]
        return ceil(rows / fsdp) * (self.whole(tp) // rows)


def block_tensors(shape: LlamaShape) -> tuple[Tensor, ...]:
    """Parameters of one block."""
    d, f = shape.dim, shape.hidden_dim
    queries, keys = shape.n_heads * shape.head_dim, shape.n_kv_heads * shape.head_dim
    columns = [Tensor((n, d), 0) for n in (queries, keys, keys, f, f)]
    return (*columns, Tensor((d, queries), 1), Tensor((d, f), 1), Tensor((d,)), Tensor((d,)))


def embedding_tensors(shape: LlamaShape, vocab_size: int) -> tuple[Tensor, ...]:
    """Parameters before the first block."""
    return (Tensor((vocab_size, shape.dim), 0),)


def head_tensors(shape: LlamaShape, vocab_size: int) -> tuple[Tensor, ...]:
    """Parameters after the last block."""
    return (Tensor((shape.dim,)), Tensor((vocab_size, shape.dim), 0))


@dataclass(frozen=True, slots=True)
class Part:
    """What one rank of a pipeline holds, and how much of it is on its way at once."""

    layers: int
    has_embedding: bool
    has_head: bool
    passes: float  # of all its layers, whose activations are kept at the same time


def parts(config: Sections, shape: LlamaShape, vocab: int) -> tuple[Part, ...]:
    """The rank's part of the model, for every rank of the pipeline."""
    parallelism = config.parallelism
    degree = parallelism.pipeline_parallel_degree
    if degree == 1:
        return (Part(shape.n_layers, True, True, 1),)
    # What a file of an order holds only the trainer reads; two stages each are a guess.
    count = stage_count(parallelism, shape.n_layers) or 2 * degree
    layers = _layers(config, shape, vocab, count)
    microbatches = config.training.local_batch_size // parallelism.pipeline_parallel_microbatch_size
    found: list[Part] = []
    for rank in range(degree):
        own = stages_of_rank(parallelism, count, rank)
        passes = in_flight(config, rank, len(own), microbatches) / len(own)
        held = sum(layers[stage] for stage in own)
        found.append(Part(held, 0 in own, count - 1 in own, passes))
    return tuple(found)


def _layers(config: Sections, shape: LlamaShape, vocab: int, count: int) -> tuple[int, ...]:
    """Layers in each stage of a pipeline, as the trainer cuts it: by hand, by layers or by cost."""
    parallelism = config.parallelism
    if parallelism.module_fqns_per_model_part is not None:
        named = parallelism.module_fqns_per_model_part
        return tuple(sum(name.startswith("layers.") for name in stage) for stage in named)
    if counts_layers(parallelism):
        return stage_layers(parallelism, count, shape.n_layers)
    block = 6 * sum(t.whole(1) for t in block_tensors(shape))
    attention = 12 * shape.n_heads * shape.head_dim * config.training.seq_len
    head = 6 * sum(t.whole(1) for t in head_tensors(shape, vocab))
    first, *between, last = balanced([0, *[block + attention] * shape.n_layers, head], count)
    return (first - 1, *between, last - 1)


def in_flight(config: Sections, rank: int, stages: int, microbatches: int) -> int:
    """Pairs of stage and microbatch whose activations a rank of a pipeline keeps at most.

    From the warm-up of torch's schedules: 1F1B runs ahead by the ranks behind it; interleaved
    schedules by a round for every further stage and twice the ranks behind; those in a V keep as
    much as 1F1B on its first rank; the others keep everything.
    """
    parallelism = config.parallelism
    degree, everything = parallelism.pipeline_parallel_degree, stages * microbatches
    name = parallelism.pipeline_parallel_schedule
    if parallelism.pipeline_parallel_schedule_csv or name in ("GPipe", "LoopedBFS"):
        return everything
    if name == "1F1B":
        return degree - rank
    if schedule_of(parallelism).in_v:
        return min(everything, 2 * degree)
    ahead = (stages - 1) * degree + 2 * (degree - 1 - rank) + 1
    return min(everything, ahead)


def memory(
    config: Sections, shape: LlamaShape, degrees: Degrees, vocab_size: int, accumulation: int = 1
) -> tuple[Memory, ...]:
    """Bytes of a rank, for each place in the pipeline; one if there is none.

    Args:
        config: training, parallelism and activation checkpointing of the run.
        shape: of the model.
        degrees: of the mesh; they must be legal.
        vocab_size: of the tokenizer, where the shape has none of its own.
        accumulation: forward passes per optimizer step.
    """
    vocab = shape.vocab_size or vocab_size
    return tuple(
        _rank(config, shape, degrees, vocab, accumulation, part)
        for part in parts(config, shape, vocab)
    )


def _rank(
    config: Sections, shape: LlamaShape, degrees: Degrees, vocab: int, accumulation: int, part: Part
) -> Memory:
    training, tp = config.training, degrees.tp
    block = block_tensors(shape)
    outer = (embedding_tensors(shape, vocab) if part.has_embedding else ()) + (
        head_tensors(shape, vocab) if part.has_head else ()
    )
    held = block * part.layers + outer
    state = BYTES[training.dtype]
    used, reduced = (
        BYTES[training.mixed_precision_param],
        BYTES[training.mixed_precision_reduce],
    )
    parameters = state * sum(tensor.sharded(tp, degrees.fsdp) for tensor in held)
    optimizer = MOMENTS * parameters + 4 * len(held)  # and a step count beside each
    piped = degrees.pp > 1
    sequences = (
        config.parallelism.pipeline_parallel_microbatch_size if piped else training.local_batch_size
    )
    tokens = sequences * training.seq_len // degrees.cp

    ac = config.activation_checkpoint
    everything = block_activations(shape, tokens, tp, used)
    stream = used * tokens * shape.dim // tp
    blocks = [_saved(ac, n, shape, tokens, tp, used) for n in range(1, part.layers + 1)]
    saved = int(sum(blocks) * part.passes) + stream * part.has_head
    again = everything - min(blocks, default=everything)
    # Gradients of the stream, twice where they are parts of a sum, and of the feed-forward layer.
    gathered = (2 if tp > 1 else 1) * shape.dim
    working = again + used * tokens * (gathered + 3 * shape.hidden_dim // tp)

    block_size = sum(tensor.whole(tp) for tensor in block)
    first = sum(t.whole(tp) for t in embedding_tensors(shape, vocab)) * part.has_embedding
    last = sum(t.whole(tp) for t in head_tensors(shape, vocab)) * part.has_head
    # A block gathered, the next one on its way, and the gradients of the last one being reduced.
    passing = (2 * used + reduced) * block_size
    # A block's gradients come as its activations go.
    backward = max(working, used * block_size)
    whole = sum(tensor.whole(tp) for tensor in held)
    unsharded = 0
    if accumulation > 1 or piped:
        unsharded += reduced * whole  # gradients add up before they are sharded
    if piped and config.parallelism.fsdp_reshard_after_forward in ("default", "never"):
        unsharded += used * whole
    logits = _head(shape, vocab, tokens, tp) if part.has_head else 0
    # DTensor computes the gradient of a split embedding for the whole vocabulary, then adds up.
    unsplit = used * vocab * shape.dim * part.has_embedding if tp > 1 else 0
    ends = 2 * used * max(first, last)

    offload = training.enable_cpu_offload
    resident = 0 if offload else parameters + optimizer
    gradients = 0 if offload else parameters
    moments = (
        resident + saved + logits + ends,  # the loss
        resident + saved + backward + passing,  # the last block's backward pass
        resident + gradients + backward + passing,  # the first's
        resident + gradients + (used + reduced) * first + unsplit,  # the embedding's
    )
    return Memory(
        parameters=0 if offload else parameters,
        gradients=gradients,
        optimizer=0 if offload else optimizer,
        activations=saved + working,
        logits=logits,
        buffers=max(passing, ends) + unsharded,
        peak=max(moments) + unsharded,
        kept=saved + used * (last + tokens * shape.dim) * part.has_head,  # the head's gradients
    )


def block_activations(shape: LlamaShape, tokens: int, tp: int, width: int = 2) -> int:
    """Bytes that autograd keeps of one block without recomputation; see the module's text.

    Args:
        shape: of the model.
        tokens: of one rank's microbatch, before tensor parallelism splits them.
        tp: tensor-parallel ranks.
        width: bytes of a number.
    """
    keys = shape.n_kv_heads * shape.head_dim
    stream = 2 * width * tokens * shape.dim // tp + 2 * width * tokens * shape.dim
    attention = width * tokens * 2 * (shape.dim + keys) // tp + 4 * tokens * shape.n_heads // tp
    return stream + attention + 4 * width * tokens * shape.hidden_dim // tp


def _saved(
    config: ActivationCheckpoint, number: int, shape: LlamaShape, tokens: int, tp: int, width: int
) -> int:
    """Bytes kept of the block of this number, from 1, until its backward pass."""
    everything = block_activations(shape, tokens, tp, width)
    entry = width * tokens * shape.dim // tp
    match config.mode, config.selective_ac_option:
        case "full", _:
            return entry
        case "selective", "op":
            return entry + _costly(shape, tokens, tp, width)
        case "selective", every:
            return entry if number % int(every) == 0 else everything
        case "memory_budget", _:
            return entry + int(config.memory_budget * (everything - entry))
        case _:
            return everything


def _costly(shape: LlamaShape, tokens: int, tp: int, width: int) -> int:
    """What selective checkpointing keeps by operator.

    That is attention, sums over ranks and every second product: queries, values, the gate and the
    last, whose result is a part of a sum and so as wide as the stream is before it is split.
    """
    keys = shape.n_kv_heads * shape.head_dim
    split = 2 * shape.dim + keys + shape.hidden_dim
    sums = 2 * shape.dim if tp > 1 else 0
    return (
        width * tokens * (split + sums) // tp
        + width * tokens * shape.dim
        + 4 * tokens * shape.n_heads // tp
    )


def _head(shape: LlamaShape, vocab: int, tokens: int, tp: int) -> int:
    """Bytes of the last portion of logits with its gradients, and of the head's input and weight.

    The input is whole beside its gradients of the portions before. The gradient of the weight is
    added up in float32, and each portion's comes in bfloat16.
    """
    own = ceil(vocab / tp)
    portions = ceil(tokens * own * 4 / PORTION_BYTES)
    positions = ceil(tokens / portions)
    copies = PORTION_COPIES if tp == 1 else SPLIT_COPIES
    ends = 2 * (2 * tokens - positions) * shape.dim
    return copies * positions * own + 6 * own * shape.dim + ends
