"""The layouts whose numbers are compared with one process: every technique, and how they combine.

A cell is a number of ranks and what it changes in the configuration. ``CHOSEN`` holds one cell for
each technique, for every run of the tests; ``make test-matrix`` takes all of them.
"""

import os
from pathlib import Path
from typing import Any, NamedTuple


class Cell(NamedTuple):
    """One layout; its sections say of which model."""

    ranks: int
    sections: dict[str, dict[str, Any]]


def cell(
    ranks: int,
    *,
    sections: dict[str, dict[str, Any]] | None = None,
    flavor: str = "tiny",
    **degrees: Any,
) -> Cell:
    """A layout of llama3 with degrees such as ``tp=2``, and changes to other sections."""
    parallelism = {KEYS.get(name, name): value for name, value in degrees.items()}
    changed = sections or {}
    model = {"name": "llama3", "flavor": flavor, **changed.get("model", {})}
    return Cell(ranks, {"parallelism": parallelism, **changed, "model": model})


def alone(cell: Cell) -> Cell:
    """One process with the model of a cell."""
    return Cell(1, {"model": cell.sections["model"]})


def mixture(ranks: int, **options: Any) -> Cell:
    """A layout of the model with experts."""
    return cell(ranks, flavor="tiny_moe", **options)


def pipeline(
    ranks: int,
    schedule: str = "1F1B",
    *,
    local: int = 2,
    sections: dict[str, dict[str, Any]] | None = None,
    **degrees: Any,
) -> Cell:
    """A layout with a pipeline, and so many sequences in a local batch."""
    changed = {"training": {"local_batch_size": local}, **(sections or {})}
    return cell(ranks, sections=changed, **{"pp": 2, "schedule": schedule, **degrees})


KEYS = {
    "replicate": "data_parallel_replicate_degree",
    "tp": "tensor_parallel_degree",
    "cp": "context_parallel_degree",
    "rotate": "context_parallel_rotate_method",
    "pp": "pipeline_parallel_degree",
    "ep": "expert_parallel_degree",
    "etp": "expert_tensor_parallel_degree",
    "schedule": "pipeline_parallel_schedule",
    "csv": "pipeline_parallel_schedule_csv",
    "by_hand": "module_fqns_per_model_part",
    "layers_per_stage": "pipeline_parallel_layers_per_stage",
    "microbatch": "pipeline_parallel_microbatch_size",
    "reshard": "fsdp_reshard_after_forward",
}


def recompute(mode: str, option: str = "2") -> dict[str, dict[str, Any]]:
    """Activation checkpointing of a kind."""
    return {"activation_checkpoint": {"mode": mode, "selective_ac_option": option}}


COMPILE: dict[str, dict[str, Any]] = {"compile": {"enable": True}}
BLOCK_CAUSAL: dict[str, dict[str, Any]] = {"model": {"attn_mask_type": "block_causal"}}

LLAMA: dict[str, Cell] = {
    "fsdp 2": cell(2),
    "ddp 2": cell(2, replicate=2),
    "hsdp 2x2": cell(4, replicate=2),
    "fsdp 4, reshard over 2": cell(4, reshard=2),
    "tp 2": cell(2, tp=2),
    "tp 2, whole logits": cell(2, tp=2, disable_loss_parallel=True),
    "fsdp 2 x tp 2": cell(4, tp=2),
    "hsdp 2x2 x tp 2": cell(8, replicate=2, tp=2),
    "fsdp 2, full ac": cell(2, sections=recompute("full")),
    "fsdp 2, selective ac": cell(2, sections=recompute("selective", "op")),
    "tp 2, full ac": cell(2, tp=2, sections=recompute("full")),
    "tp 2, selective ac": cell(2, tp=2, sections=recompute("selective", "op")),
    "fsdp 2, compile": cell(2, sections=COMPILE),
    "tp 2, compile": cell(2, tp=2, sections=COMPILE),
    "fsdp 2 x tp 2, compile, selective ac": cell(
        4, tp=2, sections=COMPILE | recompute("selective", "op")
    ),
    "cp 2, allgather": cell(2, cp=2, rotate="allgather"),
    "cp 2, alltoall": cell(2, cp=2, rotate="alltoall"),
    "cp 4": cell(4, cp=4, rotate="alltoall"),
    "fsdp 2 x cp 2": cell(4, cp=2),
    "tp 2 x cp 2": cell(4, tp=2, cp=2, rotate="alltoall"),
    "fsdp 2, block causal": cell(2, sections=BLOCK_CAUSAL),
    "cp 2, block causal": cell(2, cp=2, sections=BLOCK_CAUSAL),
    "tp 2 x cp 2, block causal": cell(4, tp=2, cp=2, rotate="alltoall", sections=BLOCK_CAUSAL),
    "cp 2, full ac": cell(2, cp=2, sections=recompute("full")),
    "cp 2, selective ac": cell(2, cp=2, rotate="alltoall", sections=recompute("selective", "op")),
    "cp 2, compile, selective ac": cell(2, cp=2, sections=COMPILE | recompute("selective", "op")),
}

SELECTIVE = recompute("selective", "op")
SCHEDULE = str(Path(__file__).with_name("schedule.csv"))

PIPELINES: dict[str, Cell] = {
    "pp 2, 1F1B": pipeline(2),
    "pp 2, GPipe": pipeline(2, "GPipe"),
    "pp 2, GPipe, microbatches of 2": pipeline(2, "GPipe", local=4, microbatch=2),
    "pp 2, Interleaved1F1B": pipeline(2, "Interleaved1F1B", flavor="tiny8"),
    "pp 2, LoopedBFS": pipeline(2, "LoopedBFS", flavor="tiny8"),
    "pp 2, InterleavedZeroBubble": pipeline(2, "InterleavedZeroBubble", flavor="tiny8"),
    "pp 2, ZBVZeroBubble": pipeline(2, "ZBVZeroBubble", flavor="tiny8"),
    "pp 2, DualPipeV": pipeline(2, "DualPipeV", local=4, flavor="tiny8"),
    "pp 2, from a file": pipeline(2, csv=SCHEDULE),
    "pp 2, by hand": pipeline(
        2, by_hand=(("tok_embeddings", "layers.0", "layers.1"), ("norm", "output"))
    ),
    "pp 2, embedding alone": pipeline(
        2, by_hand=(("tok_embeddings",), ("layers.0", "layers.1", "norm", "output"))
    ),
    "pp 2, Interleaved1F1B, layers counted": pipeline(
        2, "Interleaved1F1B", layers_per_stage=3, flavor="tiny8"
    ),
    "pp 2, full ac": pipeline(2, sections=recompute("full")),
    "pp 2, selective ac": pipeline(2, sections=SELECTIVE),
    "pp 2, ZBVZeroBubble, selective ac": pipeline(
        2, "ZBVZeroBubble", sections=SELECTIVE, flavor="tiny8"
    ),
    "pp 2, InterleavedZeroBubble, always": pipeline(
        2, "InterleavedZeroBubble", reshard="always", flavor="tiny8"
    ),
    "pp 2, compile": pipeline(2, sections=COMPILE),
    "pp 2, ZBVZeroBubble, compile": pipeline(2, "ZBVZeroBubble", sections=COMPILE, flavor="tiny8"),
    "pp 4, 1F1B": pipeline(4, pp=4, local=4, flavor="tiny8"),
    "pp 4, ZBVZeroBubble": pipeline(4, "ZBVZeroBubble", pp=4, local=4, flavor="tiny8"),
    "fsdp 2 x pp 2": pipeline(4),
    "fsdp 2 x pp 2, always": pipeline(4, reshard="always"),
    "fsdp 2 x pp 2, InterleavedZeroBubble": pipeline(4, "InterleavedZeroBubble", flavor="tiny8"),
    "fsdp 2 x pp 2, DualPipeV": pipeline(4, "DualPipeV", local=4, flavor="tiny8"),
    "tp 2 x pp 2": pipeline(4, tp=2),
    "tp 2 x pp 2, embedding alone": pipeline(
        4, tp=2, by_hand=(("tok_embeddings",), ("layers.0", "layers.1", "norm", "output"))
    ),
    "tp 2 x pp 2, ZBVZeroBubble": pipeline(4, "ZBVZeroBubble", tp=2, flavor="tiny8"),
    "tp 2 x pp 2, selective ac": pipeline(4, tp=2, sections=SELECTIVE),
    "cp 2 x pp 2": pipeline(4, cp=2, rotate="alltoall"),
    "cp 2 x pp 2, ZBVZeroBubble, block causal": pipeline(
        4, "ZBVZeroBubble", cp=2, sections=BLOCK_CAUSAL, flavor="tiny8"
    ),
    "tp 2 x cp 2 x pp 2": pipeline(8, tp=2, cp=2),
    "hsdp 2x2 x pp 2": pipeline(8, replicate=2),
    "fsdp 2 x tp 2 x cp 2 x pp 2": pipeline(16, tp=2, cp=2),
}
LLAMA |= PIPELINES

MOE: dict[str, Cell] = {
    "moe: fsdp 2": mixture(2),
    "moe: tp 2, splitting experts": mixture(2, tp=2),
    "moe: ep 2": mixture(2, ep=2),
    "moe: ep 4": mixture(4, ep=4),
    "moe: ep 2 x fsdp 2": mixture(4, ep=2),
    "moe: ep 2 x fsdp 4": mixture(8, ep=2),
    "moe: hsdp 2x2 x ep 2": mixture(4, replicate=2, ep=2),
    "moe: ep 2 out of tp 2": mixture(2, tp=2, ep=2),
    "moe: ep 2 out of tp 2 x fsdp 2": mixture(4, tp=2, ep=2),
    "moe: ep 4 out of tp 2 x fsdp 2": mixture(4, tp=2, ep=4),
    "moe: ep 2 x etp 2": mixture(4, tp=2, etp=2, ep=2),
    "moe: ep 2 x etp 2 x fsdp 2": mixture(8, tp=2, etp=2, ep=2),
    "moe: ep 2, full ac": mixture(2, ep=2, sections=recompute("full")),
    "moe: ep 2, selective ac": mixture(2, ep=2, sections=recompute("selective", "op")),
    "moe: ep 2 out of tp 2, full ac": mixture(2, tp=2, ep=2, sections=recompute("full")),
    "moe: fsdp 2, compile": mixture(2, sections=COMPILE),
    "moe: ep 2, compile": mixture(2, ep=2, sections=COMPILE),
    "moe: ep 2 out of cp 2": mixture(2, cp=2, ep=2),
    "moe: ep 2 x pp 2": mixture(4, pp=2, ep=2, sections={"training": {"local_batch_size": 2}}),
}
LLAMA |= MOE

CHOSEN = (
    *("fsdp 2", "hsdp 2x2", "fsdp 2 x tp 2", "fsdp 2 x cp 2"),
    *("pp 2, ZBVZeroBubble", "moe: ep 2 x fsdp 2"),
)

ALL = os.environ.get("PRETRAIN_TEST_MATRIX") == "all"


def picked(cells: dict[str, Cell]) -> list[str]:
    """Names of the cells to run now."""
    return [name for name in cells if ALL or name in CHOSEN]
