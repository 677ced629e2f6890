"""The one place that composes what is done to a model, or to a part of one, before it trains.

Order matters. Splitting matrices changes what a block computes on this rank, recomputation wraps
the result, the compiler sees both, and sharding, which talks between blocks, stays outside. Only
then does the model get memory, so that no rank ever holds more than its shard.
"""

import torch
from torch import nn

from pretrain_api.config import RunConfig
from pretrain_trainer.balance import count_choices
from pretrain_trainer.models.base import LanguageModel
from pretrain_trainer.parallel import context, expert, fsdp, tensor
from pretrain_trainer.parallel.head import fuse_loss
from pretrain_trainer.parallel.mesh import Mesh
from pretrain_trainer.precision.activation_checkpoint import checkpoint_activations
from pretrain_trainer.precision.compile import compile_blocks


def parallelize(model: LanguageModel, config: RunConfig, mesh: Mesh, device: torch.device) -> None:
    """Turn a meta model into this rank's share of one to train, in place; values are undefined."""
    context.split(model, config, mesh)
    if mesh.tp is not None:
        tensor.split(model, config, mesh.tp)
    expert.split(model, config, mesh)
    count_choices(model)
    if model.output is not None:
        fuse_loss(model.output, config, mesh.tp)
    checkpoint_activations(model, config.activation_checkpoint)
    compile_blocks(model, config.compile, whole=mesh.degrees.ep == 1)
    fsdp.shard(model, config, mesh)
    give_memory(model, device, offload=config.training.enable_cpu_offload)


def give_memory(model: nn.Module, device: torch.device, *, offload: bool) -> None:
    """Replace meta tensors by uninitialised ones; offloading moves parameters, never buffers."""
    model.to_empty(device="cpu" if offload else device)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
