"""Sections about the training step: data, batch, optimizer, schedule, layout over ranks."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from pretrain_api.schema import (
    MAX_INT,
    MAX_LIST,
    Names,
    NonNegative,
    PathText,
    Positive,
    Rule,
    Section,
    Text,
)

Dataset = Literal["c4", "text", "jsonl"]
Fraction = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]


class Training(Section):
    """What is trained on, for how long, and in which precision."""

    dataset: Dataset
    """Where samples come from: c4 is streamed from Hugging Face; text and jsonl are read from
    dataset_path. The only key of the spec without a default."""
    dataset_path: PathText | None = None
    """File or folder of the samples, for datasets text and jsonl. In a folder every file of the
    kind is read, sorted by name. Unset is right for c4 only."""
    local_batch_size: Annotated[int, Field(ge=1, le=2**20)] = 8
    """Number of sequences per rank in one forward pass."""
    global_batch_size: Annotated[int, Field(ge=-1, le=2**30)] = -1
    """Number of sequences per optimizer step over all ranks; what exceeds local_batch_size times
    the data-parallel degree is accumulated. -1 is exactly that product."""
    seq_len: Annotated[int, Field(ge=1, le=2**24)] = 2048
    """Number of tokens in a sequence."""
    max_norm: Annotated[float, Field(gt=0)] = 1.0
    """Total norm that the gradients of a step are scaled down to."""
    steps: Positive = 10_000
    """Number of optimizer steps of the whole run, restarts included."""
    epochs: Positive | None = None
    """End after this many passes over the data, if steps don't end the run first. Unset repeats the
    data for ever."""
    enable_cpu_offload: bool = False
    """Keep parameters, gradients and optimizer state in the host's memory."""
    dtype: Literal["bfloat16", "float32"] = "float32"
    """Number format the parameters are kept in."""
    mixed_precision_param: Literal["bfloat16", "float32"] = "bfloat16"
    """Number format the parameters are gathered and used in."""
    mixed_precision_reduce: Literal["float32", "bfloat16"] = "float32"
    """Number format gradients are reduced in."""
    gc_freq: Positive = 50
    """Number of steps from one garbage collection of Python to the next, done by all ranks
    together."""
    gc_debug: bool = False
    """Look for reference cycles that hold tensors at every step."""
    seed: Annotated[int, Field(ge=0, le=2**53)] | None = None
    """Seed of initial weights and sample order. Unset is 0, so that a run is always repeatable."""
    deterministic: bool = False
    """Use only deterministic kernels, even where they are slower."""
    debug_moe_force_load_balance: bool = False
    """Send the same number of tokens to every expert."""
    non_finite: Literal["skip", "stop"] = "skip"
    """When loss or gradients are not finite: skip leaves the parameters alone and goes on, a
    bounded number of times in a row; stop ends the run at once."""
    data_streams: Positive | None = None
    """Number of streams that documents are packed in; must divide the global batch size. Unset is
    the global batch size. Samples depend on it, so it never changes within a run."""

    rules: ClassVar = (
        Rule(
            path="dataset_path",
            cel="!(self.dataset in ['text', 'jsonl']) || "
            "(has(self.datasetPath) && self.datasetPath != '')",
            message="is missing; datasets text and jsonl need the file or folder to read",
            holds=lambda t: t.dataset not in ("text", "jsonl") or bool(t.dataset_path),
        ),
        Rule(
            path="global_batch_size",
            cel="!has(self.globalBatchSize) || self.globalBatchSize != 0",
            message="0 sequences per step train nothing; use -1 or at least 1",
            holds=lambda t: t.global_batch_size != 0,
        ),
    )


class Optimizer(Section):
    """How gradients change parameters."""

    name: Literal["Adam", "AdamW"] = "AdamW"
    """Algorithm that updates the parameters."""
    lr: Annotated[float, Field(ge=0)] = 8e-4
    """Learning rate after warmup."""
    beta1: Decay = 0.9
    """Decay of the running mean of gradients, per step."""
    beta2: Decay = 0.95
    """Decay of the running mean of squared gradients, per step."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """Small number that keeps the division by the root of the mean of squares finite."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """Decay of parameters per step, as a multiple of the learning rate and apart from gradients."""
    implementation: Literal["for-loop", "foreach", "fused"] = "fused"
    """Whether an update is one kernel per tensor (for-loop), per group of tensors (foreach) or for
    everything (fused)."""
    early_step_in_backward: bool = False
    """Update each parameter as soon as its gradient is there."""


class LRScheduler(Section):
    """How the learning rate changes over the run."""

    warmup_steps: NonNegative = 200
    """Number of steps in which the learning rate grows linearly from zero."""
    decay_ratio: Fraction | None = None
    """Share of all steps, the last ones, in which the learning rate decays; it is constant before.
    Unset decays from the end of warmup."""
    decay_type: Literal["linear", "sqrt", "cosine"] = "linear"
    """Shape of the decay of the learning rate."""
    min_lr_factor: Fraction = 0.0
    """Learning rate at the last step, as a share of optimizer.lr."""


class Parallelism(Section):
    """How model and data are laid out over ranks; all degrees multiplied are the ranks."""

    data_parallel_replicate_degree: Positive = 1
    """Number of copies of the sharded model. More than 1 is hybrid sharding (HSDP)."""
    enable_compiled_autograd: bool = False
    """Compile the backward pass too."""
    data_parallel_shard_degree: Annotated[int, Field(ge=-1, le=MAX_INT)] = -1
    """Number of ranks each copy is sharded over (FSDP); -1 takes all that the other degrees
    leave."""
    fsdp_reshard_after_forward: Literal["default", "always", "never"] | Positive = "default"
    """Whether gathered parameters are freed after the forward pass: always, never, always but for
    pipelines (default), or a number n to keep them sharded over groups of n ranks."""
    tensor_parallel_degree: Positive = 1
    """Number of ranks each matrix is split over."""
    disable_loss_parallel: bool = False
    """With tensor parallelism: gather the logits before the loss."""
    enable_async_tensor_parallel: bool = False
    """With tensor parallelism: overlap communication with products."""
    pipeline_parallel_degree: Positive = 1
    """Number of ranks the layers are split over, in one stage or several on each."""
    module_fqns_per_model_part: (
        Annotated[tuple[Names, ...], Field(strict=False, max_length=MAX_LIST)] | None
    ) = None
    """With pipelines: the modules of each stage by name, all in the order of the model:
    tok_embeddings, layers.0 and so on, norm, output. Unset splits by cost: the FLOPs of the
    costliest stage are as few as can be."""
    pipeline_parallel_first_stage_less_layers: NonNegative | None = None
    """With pipelines: number of layers the first stage has less, in exchange for the embedding. If
    this, the same for the last stage, or pipeline_parallel_layers_per_stage is set, stages have
    equal numbers of layers instead of equal costs. Unset is then 1."""
    pipeline_parallel_last_stage_less_layers: NonNegative | None = None
    """With pipelines: number of layers the last stage has less, in exchange for the output; see
    pipeline_parallel_first_stage_less_layers. Unset is 1 where layers are counted."""
    pipeline_parallel_layers_per_stage: Positive | None = None
    """With pipelines: number of layers of each stage, which says how many stages there are. Unset
    is one stage per rank for GPipe and 1F1B and two for others."""
    pipeline_parallel_schedule: Text = "1F1B"
    """With pipelines: the order in which stages work on microbatches: GPipe, 1F1B, Interleaved1F1B,
    LoopedBFS, InterleavedZeroBubble, ZBVZeroBubble or DualPipeV."""
    pipeline_parallel_schedule_csv: Text | None = ""
    """With pipelines: file with an order of one's own, in the place of a named one: a line for each
    rank with what it does, such as 0F1 for the forward pass of microbatch 1 in stage 0, B for
    backward, I and W for backward to inputs and weights. Unset or empty is the named one."""
    pipeline_parallel_microbatch_size: Positive = 1
    """With pipelines: number of sequences in a microbatch. A local_batch_size makes at least one
    for each rank of the pipeline; with DualPipeV, for each stage."""
    context_parallel_degree: Positive = 1
    """Number of ranks each sequence is split over."""
    context_parallel_rotate_method: Literal["allgather", "alltoall"] = "allgather"
    """With context parallelism: whether keys and values of all ranks are gathered at once
    (allgather), or travel from neighbour to neighbour around a ring (alltoall), which needs less
    memory."""
    expert_parallel_degree: Positive = 1
    """Number of ranks the experts of a layer are split over."""
    expert_tensor_parallel_degree: Positive = 1
    """Number of ranks each expert is split over: 1, or all of tensor_parallel_degree."""

    rules: ClassVar = (
        Rule(
            path="data_parallel_shard_degree",
            cel="!has(self.dataParallelShardDegree) || self.dataParallelShardDegree != 0",
            message="0 ranks hold nothing; use -1 or at least 1",
            holds=lambda p: p.data_parallel_shard_degree != 0,
        ),
    )
