"""The one place that composes what is done to a model before it trains.

Order matters. Recomputation wraps a block's mathematics, the compiler sees a block with its
recomputation, and sharding, which talks between blocks, stays outside of both. Only then does the
model get memory, so that no rank ever holds more than its shard.
"""

import torch
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
    model.to_empty(device="cpu" if config.training.enable_cpu_offload else device)
