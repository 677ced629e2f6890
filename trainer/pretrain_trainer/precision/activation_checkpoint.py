"""Activation checkpointing: recompute in the backward pass what was not kept.

``full`` keeps only each block's input. ``selective`` with a number does that for every n-th block
and keeps everything in the others. ``selective`` with ``op`` keeps, in every block, the results
that are costly to compute (attention, collectives, every second matrix product) and recomputes the
cheap ones.

A block's forward method is wrapped, not the block: parameter names stay what they are, so nothing
else needs to know.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    SelectiveCheckpointContext,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from pretrain_api.config import ActivationCheckpoint
from pretrain_trainer.models.base import LanguageModel

aten = torch.ops.aten
MATMUL = aten.mm.default
COSTLY = frozenset(
    (
        aten._scaled_dot_product_cudnn_attention.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        torch.ops._c10d_functional.reduce_scatter_tensor.default,
    )
)


def checkpoint_activations(model: LanguageModel, config: ActivationCheckpoint) -> None:
    """Wrap the blocks of ``model`` in place, as ``config`` says."""
    for number, block in enumerate(model.layers.values(), start=1):
        match config.mode, config.selective_ac_option:
            case "full", _:
                _recompute(block, config.early_stop)
            case "selective", "op":
                _recompute(block, config.early_stop, context_fn=keep_costly)
            case "selective", every if number % int(every) == 0:
                _recompute(block, config.early_stop)
            case _:
                pass  # mode none, or a block between two n-th ones: keep everything


def keep_costly() -> tuple[Any, Any]:
    """Contexts of one forward pass and its recomputation that keep costly results."""
    return create_selective_checkpoint_contexts(_KeepCostly())


class _KeepCostly:
    """Policy of one pass: counts products, separately for forward pass and recomputation."""

    def __init__(self) -> None:
        self.products = {False: 0, True: 0}

    def __call__(
        self, context: SelectiveCheckpointContext, op: Any, *args: Any, **kwargs: Any
    ) -> CheckpointPolicy:
        keep = op in COSTLY
        if op == MATMUL:
            self.products[context.is_recompute] += 1
            keep = self.products[context.is_recompute] % 2 == 1
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


def _recompute(block: nn.Module, early_stop: bool, **options: Callable[..., Any]) -> None:
    forward: Callable[..., Tensor] = block.forward
    # Llama has no dropout, and a model that had would draw by name: no state to put back.
    run = partial(
        checkpoint, use_reentrant=False, preserve_rng_state=False, early_stop=early_stop, **options
    )

    def recomputed(x: Tensor, rope: Tensor) -> Tensor:
        return run(forward, x, rope)

    block.forward = recomputed
