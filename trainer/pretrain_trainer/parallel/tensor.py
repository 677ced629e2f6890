"""Tensor parallelism: every matrix of a block is split over ranks, and so is the stream between.

A block's first products are split by column, so each rank computes some heads or some features of
the feed-forward layer, and the last ones by row, so their results are parts of a sum. Between
blocks the stream is split by position (sequence parallelism): summing the parts and splitting them
is one reduce-scatter, and norms work on a rank's own positions only. Before the next products the
positions are gathered. The embedding is split by vocabulary and feeds the stream in the same way;
what the output does with its split is told in :mod:`pretrain_trainer.parallel.head`.

Modules are found by their names, which are torchtitan's in every family.
"""

import warnings
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from pretrain_api.config import RunConfig
from pretrain_trainer.errors import BadInputError
from pretrain_trainer.models.base import LanguageModel

POSITIONS = 1  # dimension of the stream, [batch, tokens, dim]

FORWARD = ("feed_forward", "moe.shared_experts")
COLUMNS = (
    *("attention.wq", "attention.wk", "attention.wv"),
    *(f"{name}.{matrix}" for name in FORWARD for matrix in ("w1", "w3")),
)
ROWS = ("attention.wo", *(f"{name}.w2" for name in FORWARD))
NORMS = ("attention_norm", "ffn_norm")


def split(model: LanguageModel, config: RunConfig, tp: DeviceMesh) -> None:
    """Split the matrices of ``model`` in place.

    Raises:
        BadInputError: asynchronous tensor parallelism is asked for where it can't be.
    """
    if config.parallelism.enable_async_tensor_parallel:
        overlap(tp)
    for block in model.layers.values():
        parallelize_module(block, tp, block_plan(block))
    if model.tok_embeddings is not None:
        embedding = RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(POSITIONS))
        parallelize_module(model.tok_embeddings, tp, embedding)
        model.tok_embeddings.register_forward_hook(_arrived)
    if model.norm is not None:
        parallelize_module(model.norm, tp, SequenceParallel())
    if model.output is not None:
        # Only the weight: what is done with it is the head's business, in one piece with the loss.
        weight = distribute_tensor(model.output.weight, tp, [Shard(0)])
        model.output.weight = nn.Parameter(weight)
    # About changing a unit's output in place, which nothing here does.
    warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module .* returned a view tensor")


def _arrived(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    """The stream, once its collective is done.

    Torch hands out a tensor that waits when it is first used. A compiled block used as the first
    loses the gradient of such an input (torch 2.15): the embedding would never learn.
    """
    return cast(Tensor, _Arrived.apply(output))


class _Arrived(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.wait() if isinstance(x, AsyncCollectiveTensor) else x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


def block_plan(block: nn.Module) -> dict[str, ParallelStyle]:
    """How each module of a block is split, by name.

    A mixture of experts is given the rank's own positions; what becomes of them, beside the experts
    that all of them go to, is told in :mod:`pretrain_trainer.parallel.expert`.
    """
    gathered = {"input_layouts": (Shard(POSITIONS),), "desired_input_layouts": (Replicate(),)}
    plan = {
        "attention": PrepareModuleInput(
            input_layouts=(Shard(POSITIONS), None), desired_input_layouts=(Replicate(), None)
        ),
        "feed_forward": PrepareModuleInput(**gathered),
        "moe": PrepareModuleInput(
            input_layouts=(Shard(POSITIONS),),
            desired_input_layouts=(Shard(POSITIONS),),
            use_local_output=True,
        ),
        "moe.shared_experts": PrepareModuleInput(**gathered),
        **{name: ColwiseParallel() for name in COLUMNS},
        **{name: RowwiseParallel(output_layouts=Shard(POSITIONS)) for name in ROWS},
        **{name: SequenceParallel() for name in NORMS},
    }
    there = {name for name, _ in block.named_modules()}
    return {name: style for name, style in plan.items() if name in there}


def overlap(tp: DeviceMesh) -> None:
    """Let the compiler cut products into pieces that travel while the next is computed.

    Raises:
        BadInputError: without GPUs.
    """
    if tp.device_type != "cuda":
        raise BadInputError(
            "parallelism.enable_async_tensor_parallel: needs GPUs, because ranks write into each "
            "other's memory; use false"
        )
    from torch._inductor import config as inductor
    from torch.distributed._symmetric_memory import enable_symm_mem_for_group

    inductor._micro_pipeline_tp = True
    enable_symm_mem_for_group(tp.get_group().group_name)
