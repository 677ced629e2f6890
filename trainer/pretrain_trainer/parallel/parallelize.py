"""The one place that composes what is done to a model before it trains.

Order matters. Recomputation wraps a block's mathematics, the compiler sees a block with its
recomputation, and sharding, which talks between blocks, stays outside of both. Only then does the
model get memory, so that no rank ever holds more than its shard.
"""

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from pretrain_api.config import RunConfig
from pretrain_trainer.models.base import LanguageModel
from pretrain_trainer.parallel import fsdp
from pretrain_trainer.precision.activation_checkpoint import checkpoint_activations
from pretrain_trainer.precision.compile import compile_blocks


def parallelize(
    model: LanguageModel, config: RunConfig, mesh: DeviceMesh, device: torch.device
) -> None:
    """Turn a meta model into this rank's part of one to train, in place; values are undefined."""
    checkpoint_activations(model, config.activation_checkpoint)
    compile_blocks(model, config.compile)
    fsdp.shard(model, config, mesh)
    give_memory(model, device, offload=config.training.enable_cpu_offload)


def give_memory(model: nn.Module, device: torch.device, *, offload: bool) -> None:
    """Replace meta tensors by uninitialised ones; offloading moves parameters, never buffers."""
    model.to_empty(device="cpu" if offload else device)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
