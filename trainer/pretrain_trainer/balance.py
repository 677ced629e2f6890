"""Keeping experts equally busy: counting what they were given, and moving their biases.

The choice of experts is counted where it was made, outside of what activation checkpointing
computes a second time, and only in passes that train. Once per optimizer step the counts of all
ranks are added up, so that a bias is the same on every rank and on every layout.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from pretrain_trainer.models.base import LanguageModel
from pretrain_trainer.models.moe import MoE, mixtures
from pretrain_trainer.parallel.mesh import Mesh


def count_choices(model: LanguageModel) -> None:
    """Let every block of ``model`` add up its experts' rows after each pass, in place."""
    for block in model.layers.values():
        for moe in mixtures(block):
            block.register_forward_hook(_adding(moe))


def _adding(moe: MoE) -> Any:
    def add(*_: Any) -> None:
        if torch.is_grad_enabled():
            moe.step_load.add_(moe.pass_load)

    return add


def rebalance(parts: Iterable[nn.Module], mesh: Mesh, *, learn: bool) -> None:
    """Move the biases of all experts by what was counted in this step. Collective.

    Args:
        parts: of the model, this rank's.
        mesh: of the world.
        learn: false forgets the counts of a step that was no good, and leaves biases alone.
    """
    mixed = [moe for part in parts for moe in mixtures(part)]
    if not mixed:
        return
    loads = torch.stack([moe.step_load for moe in mixed])
    if learn:
        # Ranks that split each expert have counted the same rows; in proportion nothing changes.
        for group in mesh.stage_groups():
            dist.all_reduce(loads, group=group)
    for moe, load in zip(mixed, loads, strict=True):
        if learn:
            moe.rebalance(load)
        moe.step_load.zero_()
