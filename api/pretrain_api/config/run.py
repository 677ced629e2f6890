"""Sections about the run itself: job, checkpoint, metrics, profiling, communication."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator

from pretrain_api.schema import (
    LEAVES,
    MAX_INT,
    MAX_LIST,
    NonNegative,
    PathText,
    Positive,
    Rule,
    Section,
    Text,
    cel_mismatch,
)

StateName = Literal[
    "model", "optimizer", "lr_scheduler", "data_loader", "train_state", "ledger", "dataloader"
]


class Job(Section):
    """What the run is called and where it writes."""

    config_file: Text | None = None
    """Configuration file to start from. Only an option of the command line; always unset in a
    file."""
    dump_folder: PathText = "./outputs"
    """Folder for everything the run writes. In a cluster the operator sets it to the checkpoint
    volume."""
    description: Text = "default job"
    """What the run is about, in a line that is written to its log."""
    print_config: bool = False
    """Write the whole configuration to the log at the start."""
    custom_config_module: Text = ""
    """Python module that adds sections to the configuration. Unset adds none."""


class Checkpoint(Section):
    """When state is saved, what is kept, and what a start loads."""

    enable: bool = False
    """Save and load checkpoints. Without it a restart begins at step 0."""
    enable_ft_dataloader_checkpoints: bool = True
    """Save the data position of every replica. Only read with fault_tolerance.enable."""
    folder: PathText = "checkpoint"
    """Folder of the checkpoints, inside job.dump_folder."""
    interval: Positive = 500
    """Steps from one checkpoint to the next."""
    initial_load_path: PathText | None = None
    """Step folder of another run to start from, read while this run has no checkpoint of its own.
    Unset starts from random weights."""
    initial_load_model_only: bool = True
    """Take only the weights from initial_load_path, not optimizer, schedule and data position."""
    initial_load_in_hf: bool = False
    """Read initial_load_path, or else model.hf_assets_path, as Hugging Face safetensors."""
    initial_load_in_hf_quantized: bool = False
    """Read initial_load_path as quantized Hugging Face safetensors."""
    last_save_model_only: bool = True
    """After the last step save only the weights. Such a checkpoint can't continue training."""
    last_save_in_hf: bool = False
    """Write the last save as Hugging Face safetensors too."""
    export_dtype: Literal["float16", "bfloat16", "float32"] = "float32"
    """Number format of the weights in a last save of weights only."""
    async_mode: Literal["disabled", "async", "async_with_pinned_mem"] = "disabled"
    """Whether training goes on while a checkpoint is written."""
    keep_latest_k: NonNegative = 10
    """Number of checkpoints to keep; 0 keeps all. 1 is refused: were the only one damaged, nothing
    would be left to resume from."""
    load_step: Annotated[int, Field(ge=-1, le=MAX_INT)] = -1
    """Step to resume from; -1 is the newest good one."""
    exclude_from_loading: Annotated[
        tuple[StateName, ...], Field(strict=False, max_length=MAX_LIST)
    ] = ()
    """Parts of the state that are not loaded from the first checkpoint, but start afresh."""
    enable_first_step_checkpoint: bool = False
    """Also save after the first step, to find out early whether saving works."""
    create_seed_checkpoint: bool = False
    """Save the initial state as step 0 and exit. Needs one process and all degrees at 1."""
    load_only: bool = False
    """Load checkpoints but never save any."""

    @field_validator("exclude_from_loading")
    @classmethod
    def _one_spelling(cls, value: tuple[StateName, ...]) -> tuple[StateName, ...]:
        return tuple("data_loader" if name == "dataloader" else name for name in value)

    rules: ClassVar = (
        Rule(
            path="folder",
            cel="!has(self.folder) || (self.folder != '' && "
            + cel_mismatch(LEAVES, "self.folder")
            + ")",
            message="must be a relative path without . or .. or //",
            holds=lambda c: c.folder != "" and not LEAVES.search(c.folder),
        ),
        Rule(
            path="keep_latest_k",
            cel="!has(self.keepLatestK) || self.keepLatestK != 1",
            message="1 would leave nothing if the newest is damaged; use 0 for all or at least 2",
            holds=lambda c: c.keep_latest_k != 1,
        ),
        Rule(
            path="create_seed_checkpoint",
            cel="!(has(self.createSeedCheckpoint) && self.createSeedCheckpoint) || "
            "(has(self.enable) && self.enable && !(has(self.loadOnly) && self.loadOnly))",
            message="needs checkpoint.enable, and checkpoint.load_only off",
            holds=lambda c: not c.create_seed_checkpoint or (c.enable and not c.load_only),
        ),
    )


class Metrics(Section):
    """What is measured and how often it is reported."""

    log_freq: Positive = 10
    """Number of steps from one report of loss, speed and memory to the next."""
    enable_tensorboard: bool = False
    """Write event files for TensorBoard."""
    disable_color_printing: bool = False
    """Write logs without colours."""
    save_tb_folder: PathText = "tb"
    """Folder of the event files, inside job.dump_folder."""
    save_for_all_ranks: bool = False
    """Report from every rank, not only from the first."""
    enable_wandb: bool = False
    """Report metrics to Weights & Biases."""


class Profiling(Section):
    """Traces of the PyTorch profiler and snapshots of device memory."""

    enable_profiling: bool = False
    """Record traces of the PyTorch profiler."""
    save_traces_folder: Text = "profile_traces"
    """Folder of the traces, inside job.dump_folder."""
    profile_freq: Positive = 10
    """Number of steps from one trace to the next."""
    profiler_active: Positive = 1
    """Number of steps recorded in each trace."""
    profiler_warmup: NonNegative = 3
    """Number of steps the profiler runs without recording, before each trace."""
    enable_memory_snapshot: bool = False
    """Record snapshots of what holds device memory."""
    save_memory_snapshot_folder: Text = "memory_snapshot"
    """Folder of the snapshots, inside job.dump_folder."""


class Comm(Section):
    """Collective communication."""

    init_timeout_seconds: Positive = 300
    """Seconds a collective may take until the first step is done."""
    train_timeout_seconds: Positive = 100
    """Seconds a collective may take after the first step."""
    trace_buf_size: NonNegative = 0
    """Number of collectives the flight recorder remembers; 0 records nothing."""
    save_traces_folder: Text = "comm_traces"
    """Folder of the flight recorder's dumps, inside job.dump_folder."""
    save_traces_file_prefix: Text = "rank_"
    """Start of the file name of each dump."""


class Validation(Section):
    """Loss on held-out data."""

    enable: bool = False
    """Measure the loss on held-out data while training."""
    dataset: Text = "c4_validation"
    """Name of the dataset to validate on."""
    dataset_path: Text | None = None
    """File or folder of the dataset to validate on. Unset fetches it by name."""
    local_batch_size: Positive = 8
    """Number of sequences per rank and validation step."""
    seq_len: Positive = 2048
    """Number of tokens in a sequence."""
    freq: Positive = 10
    """Number of training steps from one validation to the next."""
    steps: Annotated[int, Field(ge=-1, le=MAX_INT)] = -1
    """Number of steps of each validation; -1 takes the whole dataset."""


class MemoryEstimation(Section):
    """Estimate of memory use without training."""

    enable: bool = False
    """Estimate the memory of a run instead of training."""
    disable_fake_mode: bool = False
    """Estimate memory with real tensors instead of fake ones."""


class FaultTolerance(Section):
    """Replicas that leave and join while others train."""

    enable: bool = False
    """Let replica groups fail one by one."""
    process_group: Literal["gloo", "nccl"] = "gloo"
    """Library for collectives between replica groups."""
    process_group_timeout_ms: Positive = 10_000
    """Milliseconds after which a collective between groups counts as failed."""
    replica_id: NonNegative = 0
    """Number of this replica group among all, from 0."""
    group_size: NonNegative = 0
    """Number of replica groups there are."""
    min_replica_size: Positive = 1
    """Number of replica groups a step needs at least."""
    semi_sync_method: Text | None = None
    """Algorithm for groups that meet only every few steps, such as diloco. Unset meets at every
    step."""


class Experimental(Section):
    """Hooks for code of one's own."""

    custom_import: Text = ""
    """Python module that is imported before the model is looked up. Unset imports none."""
    custom_args_module: Text = ""
    """Older name of job.custom_config_module. Unset adds nothing."""
