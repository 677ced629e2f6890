"""Activation checkpointing: recompute in the backward pass what was not kept.

``full`` keeps only each block's input. ``selective`` with a number does that for every n-th block
and keeps everything in the others. ``selective`` with ``op`` keeps, in every block, the results
that are costly to compute (attention, collectives, every second matrix product) and recomputes the
cheap ones; products of layers that the configuration names are recomputed always, and not counted.
``memory_budget`` does nothing here: the compiler plans it
(:func:`pretrain_trainer.precision.compile.plan_memory`).

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
from pretrain_trainer.parallel.context import SPLIT_ATTENTION
from pretrain_trainer.precision.layers import linears, require_names

aten = torch.ops.aten
# Of the two operands the second is the weight, [in, out]; compiled float8 has a product of its own.
MATMULS = frozenset((aten.mm.default, aten._scaled_mm.default))
COSTLY = frozenset(
    (
        aten._scaled_dot_product_cudnn_attention.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        torch.ops._c10d_functional.reduce_scatter_tensor.default,
        torch.ops._c10d_functional.all_to_all_single.default,
        aten.max.default,  # one number, for which float8 reads a whole tensor
        SPLIT_ATTENTION,
    )
)


DEFAULT_NAMES = frozenset(ActivationCheckpoint().per_op_sac_force_recompute_mm_shapes_by_fqns)

Shapes = frozenset[tuple[int, ...]]


def check_names(model: LanguageModel, config: ActivationCheckpoint) -> None:
    """Raise BadInputError for layers to recompute that ``model``, still whole, doesn't have.

    The key's default names the router of experts, which other models simply lack.
    """
    names = config.per_op_sac_force_recompute_mm_shapes_by_fqns
    require_names(
        tuple(name for name in names if name not in DEFAULT_NAMES),
        linears(model),
        "activation_checkpoint.per_op_sac_force_recompute_mm_shapes_by_fqns",
    )


def checkpoint_activations(model: LanguageModel, config: ActivationCheckpoint) -> None:
    """Wrap the blocks of ``model`` in place, as ``config`` says."""
    cheap = recomputed_shapes(model, config.per_op_sac_force_recompute_mm_shapes_by_fqns)
    for key, block in model.layers.items():
        number = int(key) + 1  # in the whole model, of which this may be a part
        match config.mode, config.selective_ac_option:
            case "full", _:
                _recompute(block, config.early_stop)
            case "selective", "op":
                _recompute(block, config.early_stop, context_fn=partial(keep_costly, cheap))
            case "selective", every if number % int(every) == 0:
                _recompute(block, config.early_stop)
            case _:
                pass  # mode none, or a block between two n-th ones: keep everything


def recomputed_shapes(model: LanguageModel, names: tuple[str, ...]) -> Shapes:
    """Shapes [in, out] of the linear layers whose names contain one of ``names``."""
    return frozenset(
        (layer.in_features, layer.out_features)
        for name, layer in linears(model).items()
        if any(part in name for part in names)
    )


def keep_costly(cheap: Shapes = frozenset()) -> tuple[Any, Any]:
    """Contexts of one forward pass and its recomputation that keep costly results.

    Products with a weight of one of the ``cheap`` shapes are recomputed whatever they cost.
    """
    return create_selective_checkpoint_contexts(_KeepCostly(cheap))


class _KeepCostly:
    """Policy of one pass: counts products, separately for forward pass and recomputation."""

    def __init__(self, cheap: Shapes) -> None:
        self.cheap = cheap
        self.products = {False: 0, True: 0}

    def __call__(
        self, context: SelectiveCheckpointContext, op: Any, *args: Any, **kwargs: Any
    ) -> CheckpointPolicy:
        keep = op in COSTLY
        if op in MATMULS and tuple(args[1].shape) not in self.cheap:
            self.products[context.is_recompute] += 1
            keep = self.products[context.is_recompute] % 2 == 1
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


def _recompute(block: nn.Module, early_stop: bool, **options: Callable[..., Any]) -> None:
    forward: Callable[..., Tensor] = block.forward
    # Llama has no dropout, and a model that had would draw by name: no state to put back.
    run = partial(
        checkpoint, use_reentrant=False, preserve_rng_state=False, early_stop=early_stop, **options
    )

    def recomputed(*inputs: Tensor | None) -> Tensor:
        return run(forward, *inputs)

    block.forward = recomputed
