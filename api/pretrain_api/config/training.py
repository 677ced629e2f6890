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
    dataset_path. The only key without a default."""
    dataset_path: PathText | None = None
    """File or folder of the samples. In a folder every file of the kind is read, sorted by name."""
    local_batch_size: Annotated[int, Field(ge=1, le=2**20)] = 8
    """Sequences per rank in one forward pass."""
    global_batch_size: Annotated[int, Field(ge=-1, le=2**30)] = -1
    """Sequences per optimizer step over all ranks; what exceeds local_batch_size times the
    data-parallel degree is accumulated. -1 is exactly that product."""
    seq_len: Annotated[int, Field(ge=1, le=2**24)] = 2048
    """Tokens per sequence."""
    max_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradients are scaled down to this total norm."""
    steps: Positive = 10_000
    """Optimizer steps of the whole run, restarts included."""
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
    """Steps from one garbage collection of Python to the next, done by all ranks together."""
    gc_debug: bool = False
    """Look for reference cycles that hold tensors at every step."""
    seed: Annotated[int, Field(ge=0, le=2**53)] | None = None
    """Seed of initial weights and sample order. Unset is 0: a run is always repeatable."""
    deterministic: bool = False
    """Use only deterministic kernels, even where they are slower."""
    debug_moe_force_load_balance: bool = False
    """Send the same number of tokens to every expert."""
    non_finite: Literal["skip", "stop"] = "skip"
    """When loss or gradients are not finite: skip leaves the parameters alone and goes on, a
    bounded number of times in a row; stop ends the run at once."""
    data_streams: Positive | None = None
    """Streams documents are packed in. Must divide the global batch size, which is the default.
    Samples depend on it, so it never changes within a run."""

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
    """Algorithm."""
    lr: Annotated[float, Field(ge=0)] = 8e-4
    """Learning rate after warmup."""
    beta1: Decay = 0.9
    """Decay of the mean of gradients."""
    beta2: Decay = 0.95
    """Decay of the mean of squared gradients."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """Keeps the division by the root of the second mean finite."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """Decoupled decay of parameters, per step and learning rate."""
    implementation: Literal["for-loop", "foreach", "fused"] = "fused"
    """One kernel per tensor, per group of tensors, or for everything."""
    early_step_in_backward: bool = False
    """Update each parameter as soon as its gradient is there."""


class LRScheduler(Section):
    """How the learning rate changes over the run."""

    warmup_steps: NonNegative = 200
    """Steps of linear growth from zero."""
    decay_ratio: Fraction | None = None
    """Share of all steps spent on the decay at the end; the rate is constant before it. Unset
    decays from the end of warmup."""
    decay_type: Literal["linear", "sqrt", "cosine"] = "linear"
    """Shape of the decay."""
    min_lr_factor: Fraction = 0.0
    """Learning rate at the last step, as a share of optimizer.lr."""


class Parallelism(Section):
    """How model and data are laid out over ranks; all degrees multiplied are the ranks."""

    data_parallel_replicate_degree: Positive = 1
    """Copies of the sharded model. More than 1 is hybrid sharding (HSDP)."""
    enable_compiled_autograd: bool = False
    """Compile the backward pass."""
    data_parallel_shard_degree: Annotated[int, Field(ge=-1, le=MAX_INT)] = -1
    """Ranks each copy is sharded over (FSDP); -1 takes all that the other degrees leave."""
    fsdp_reshard_after_forward: Literal["default", "always", "never"] | Positive = "default"
    """Whether gathered parameters are freed after the forward pass: always, never, always but for
    pipelines (default), or a number n to keep them sharded over groups of n ranks."""
    tensor_parallel_degree: Positive = 1
    """Ranks each matrix is split over."""
    disable_loss_parallel: bool = False
    """With tensor parallelism: gather the logits before the loss."""
    enable_async_tensor_parallel: bool = False
    """With tensor parallelism: overlap communication with products."""
    pipeline_parallel_degree: Positive = 1
    """Stages the layers are split over."""
    module_fqns_per_model_part: (
        Annotated[tuple[Names, ...], Field(strict=False, max_length=MAX_LIST)] | None
    ) = None
    """With pipelines: the modules of each stage."""
    pipeline_parallel_first_stage_less_layers: NonNegative = 1
    """With pipelines: layers the first stage has less, in exchange for the embedding."""
    pipeline_parallel_last_stage_less_layers: NonNegative = 1
    """With pipelines: layers the last stage has less, in exchange for the output."""
    pipeline_parallel_layers_per_stage: Positive | None = None
    """With pipelines: layers per stage."""
    pipeline_parallel_schedule: Text = "1F1B"
    """With pipelines: order of microbatches."""
    pipeline_parallel_schedule_csv: Text | None = ""
    """With pipelines: file with an order of one's own."""
    pipeline_parallel_microbatch_size: Positive = 1
    """With pipelines: sequences per microbatch."""
    context_parallel_degree: Positive = 1
    """Ranks each sequence is split over."""
    context_parallel_rotate_method: Literal["allgather", "alltoall"] = "allgather"
    """With context parallelism: how keys and values travel."""
    expert_parallel_degree: Positive = 1
    """Ranks the experts of a layer are split over."""
    expert_tensor_parallel_degree: Positive = 1
    """Ranks each expert is split over."""

    rules: ClassVar = (
        Rule(
            path="data_parallel_shard_degree",
            cel="!has(self.dataParallelShardDegree) || self.dataParallelShardDegree != 0",
            message="0 ranks hold nothing; use -1 or at least 1",
            holds=lambda p: p.data_parallel_shard_degree != 0,
        ),
    )
