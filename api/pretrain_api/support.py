"""What isn't built yet, as a table.

The whole vocabulary is understood, so a file written for torchtitan is read without complaint about
unknown keys. But a key must never be silently without effect: a key of a feature that isn't built
is accepted at the value that leaves the feature off, and refused at any other. Keys that only
refine a feature (the folder of its traces, its interval) are left alone: with the feature off they
have no meaning here, as they have none there.

Building a feature removes its lines, and a test fails for any key that is in neither table and
that no code reads.
"""

import json
from dataclasses import dataclass
from typing import Any

from pretrain_api.schema import Rule, value_at


@dataclass(frozen=True, slots=True)
class Unbuilt:
    """A key that must stay at one of its inactive values; the first is the one to name."""

    path: str
    inactive: tuple[Any, ...]
    instead: str | None = None  # what to do, if it isn't leaving the key alone
    observes: bool = False  # shows what happens, so that without it training is the same


UNBUILT = (
    Unbuilt("job.config_file", (None,), "it is an option of the command line; remove it"),
    Unbuilt("job.custom_config_module", ("",)),
    Unbuilt("profiling.enable_profiling", (False,), observes=True),
    Unbuilt("profiling.enable_memory_snapshot", (False,), observes=True),
    Unbuilt("metrics.enable_tensorboard", (False,), observes=True),
    Unbuilt("metrics.enable_wandb", (False,), observes=True),
    Unbuilt("metrics.disable_color_printing", (False,), observes=True),
    Unbuilt("metrics.save_for_all_ranks", (False,), observes=True),
    Unbuilt("model.tokenizer_path", (None,), "use model.hf_assets_path"),
    Unbuilt("optimizer.name", ("AdamW",)),
    Unbuilt("optimizer.early_step_in_backward", (False,)),
    Unbuilt("training.gc_debug", (False,)),
    Unbuilt("parallelism.enable_compiled_autograd", (False,)),
    Unbuilt("checkpoint.initial_load_in_hf", (False,)),
    Unbuilt("checkpoint.initial_load_in_hf_quantized", (False,)),
    Unbuilt("checkpoint.last_save_in_hf", (False,)),
    Unbuilt("checkpoint.async_mode", ("disabled",)),
    Unbuilt("comm.trace_buf_size", (0,), observes=True),
    Unbuilt("validation.enable", (False,)),
    Unbuilt("memory_estimation.enable", (False,)),
    Unbuilt("fault_tolerance.enable", (False,)),
    Unbuilt("fault_tolerance.semi_sync_method", (None,)),
    Unbuilt("experimental.custom_import", ("",)),
    Unbuilt("experimental.custom_args_module", ("",)),
)

# Keys without a meaning of their own: they say how a feature works that is off.
REFINEMENTS = frozenset({
    "checkpoint.enable_ft_dataloader_checkpoints",
    "comm.save_traces_file_prefix",
    "comm.save_traces_folder",
    "fault_tolerance.group_size",
    "fault_tolerance.min_replica_size",
    "fault_tolerance.process_group",
    "fault_tolerance.process_group_timeout_ms",
    "fault_tolerance.replica_id",
    "memory_estimation.disable_fake_mode",
    "metrics.save_tb_folder",
    "profiling.profile_freq",
    "profiling.profiler_active",
    "profiling.profiler_warmup",
    "profiling.save_memory_snapshot_folder",
    "profiling.save_traces_folder",
    "quantize.grouped_mm.float8.fqns",
    "validation.dataset",
    "validation.dataset_path",
    "validation.freq",
    "validation.local_batch_size",
    "validation.seq_len",
    "validation.steps",
})  # fmt: skip


def support_rules() -> tuple[Rule, ...]:
    """The table as rules of the model that holds all sections."""
    return tuple(_rule(entry) for entry in UNBUILT)


def _rule(entry: Unbuilt) -> Rule:
    advice = entry.instead or f"leave it at {_literal(entry.inactive[0])}"
    return Rule(
        kind="unsupported",
        path=entry.path,
        cel=_cel(entry),
        alone=True,
        message=f"this value is not supported yet; {advice}",
        holds=lambda sections: value_at(sections, entry.path) in entry.inactive,
        explain=lambda sections: (
            f"{_literal(value_at(sections, entry.path))} is not supported yet; {advice}"
        ),
    )


def _cel(entry: Unbuilt) -> str:
    """Asked only of a value that is there; one that must not be is wrong whatever it is."""
    if entry.inactive == (None,):
        return "false"
    return f"self in [{', '.join(_literal(value) for value in entry.inactive)}]"


def _literal(value: Any) -> str:
    """The value as JSON, which is also how YAML and CEL write it."""
    return json.dumps(value)
