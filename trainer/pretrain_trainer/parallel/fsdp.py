"""Fully sharded data parallelism: FSDP2 over one dimension, or hybrid over two.

Each block is a unit: its parameters are gathered just before it runs and freed after. The embedding
is a unit, and norm and output together are another, because they run back to back. The root takes
what is left, which is nothing, but starts the prefetching. Of a part of a pipeline the units that
are there are sharded.

Two choices differ from FSDP2's defaults. Gradients are summed, not averaged: the loss is already
divided by the number of tokens in the whole step, which rank counts can't tell. And inputs of units
are not cast: tokens are integers, the stream has the parameters' dtype from the embedding on, and
the rotary table must stay float32.
"""

from typing import cast

import torch
from torch import nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)

from pretrain_api.config import RunConfig, Training
from pretrain_trainer.models.base import LanguageModel
from pretrain_trainer.parallel.expert import shard_placement
from pretrain_trainer.parallel.mesh import Mesh


def shard(model: LanguageModel, config: RunConfig, mesh: Mesh) -> None:
    """Shard ``model`` in place, from its blocks up."""
    options = {
        "mesh": mesh.fsdp,
        "mp_policy": mixed_precision(config.training),
        "offload_policy": offload(config.training, mesh.dense.device_type),
    }
    policy = config.parallelism.fsdp_reshard_after_forward
    reshard = reshard_after_forward(policy, pipelined=mesh.pp is not None)
    if model.tok_embeddings is not None:
        fully_shard(model.tok_embeddings, **options, reshard_after_forward=reshard)
    for block in model.layers.values():
        where = shard_placement(block, config, mesh)
        fully_shard(block, **options, reshard_after_forward=reshard, shard_placement_fn=where)
    # The backward pass begins with these: what the forward pass gathered last is needed first.
    ends: list[nn.Module] = [module for module in (model.norm, model.output) if module is not None]
    if ends:
        fully_shard(ends, **options, reshard_after_forward=policy == "always")
    fully_shard(model, **options)
    sum_gradients(model)


def reshard_after_forward(policy: str | int, *, pipelined: bool) -> bool | int:
    """FSDP2's form of the key.

    "default" frees parameters, but not in a pipeline: it would gather them for every microbatch.
    """
    if isinstance(policy, int):
        return policy
    return policy == "always" or (policy == "default" and not pipelined)


def mixed_precision(training: Training) -> MixedPrecisionPolicy:
    """Parameters are gathered and gradients reduced in the configured dtypes."""
    return MixedPrecisionPolicy(
        param_dtype=getattr(torch, training.mixed_precision_param),
        reduce_dtype=getattr(torch, training.mixed_precision_reduce),
        cast_forward_inputs=False,
    )


def offload(training: Training, device_type: str) -> OffloadPolicy:
    """Where shards live between uses; pinned memory only means something beside an accelerator."""
    if not training.enable_cpu_offload:
        return OffloadPolicy()
    return CPUOffloadPolicy(pin_memory=device_type != "cpu")


def sum_gradients(model: nn.Module) -> None:
    """Reduce gradients by plain sums, on every backend and in every unit."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def sync_gradients(model: nn.Module, enabled: bool) -> None:
    """Whether the next backward pass reduces gradients or keeps adding them up locally."""
    cast(FSDPModule, model).set_requires_gradient_sync(enabled)
