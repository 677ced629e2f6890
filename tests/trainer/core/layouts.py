"""The layouts whose numbers are compared with one process: every technique, and how they combine.

A cell is a number of ranks and what it changes in the configuration. ``CHOSEN`` holds one cell for
each technique, for every run of the tests; ``make test-matrix`` takes all of them.
"""

import os
from typing import Any, NamedTuple


class Cell(NamedTuple):
    """One layout."""

    ranks: int
    sections: dict[str, dict[str, Any]]


def cell(ranks: int, *, sections: dict[str, dict[str, Any]] | None = None, **degrees: Any) -> Cell:
    """A layout with degrees such as ``tp=2``, and changes to other sections."""
    parallelism = {KEYS.get(name, name): value for name, value in degrees.items()}
    merged = {"parallelism": parallelism, **(sections or {})}
    return Cell(ranks, merged)


KEYS = {
    "replicate": "data_parallel_replicate_degree",
    "tp": "tensor_parallel_degree",
    "cp": "context_parallel_degree",
    "rotate": "context_parallel_rotate_method",
    "pp": "pipeline_parallel_degree",
    "ep": "expert_parallel_degree",
    "etp": "expert_tensor_parallel_degree",
    "schedule": "pipeline_parallel_schedule",
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

CHOSEN = ("fsdp 2", "hsdp 2x2", "fsdp 2 x tp 2", "fsdp 2 x cp 2")

ALL = os.environ.get("PRETRAIN_TEST_MATRIX") == "all"


def picked(cells: dict[str, Cell]) -> list[str]:
    """Names of the cells to run now."""
    return [name for name in cells if ALL or name in CHOSEN]
