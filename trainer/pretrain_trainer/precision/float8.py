"""Float8 for the products of linear layers, by torchao.

A converted layer keeps its weight as it was, name, dtype and shape, and casts weight, input and
gradient to eight bits just before each product. So a checkpoint doesn't know about float8: a run in
bfloat16 goes on from one in float8 and the other way round.

Casting needs a scale, the largest number that occurs: of a whole tensor (recipe tensorwise, the
fastest), or of every row (rowwise, more exact). A weight's scale is always that of the whole
weight, however it is sharded; an input's is that of what a rank has, so losses depend on how many
sequences go through at once, in the last digits.

With the float8 all-gather a shard is cast before it travels, which halves the traffic. Its scale is
agreed on first, for each weight on its own or, precomputed, for all at once after the optimizer's
step. A unit travels as bytes where it has other dtypes as well, which ours all have (norms), and
that is why this works over gloo too, which knows no float8.
"""

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from pretrain_api.config import RunConfig
from pretrain_trainer.engine import Engine, Inputs
from pretrain_trainer.errors import BadInputError
from pretrain_trainer.models.base import LanguageModel
from pretrain_trainer.precision.layers import (
    choose,
    require_capability,
    require_whole_reshard,
)

logger = logging.getLogger(__name__)

CONVERTER = "quantize.linear.float8"
SMALL = "auto_filter_small_kn"  # an entry of filter_fqns that is no name
MULTIPLE = 16  # of both sizes of what a rank has of a weight, which the kernels ask for
CAPABILITY = (8, 9)  # the first with float8 products


def convert(model: LanguageModel, config: RunConfig, device: torch.device) -> None:
    """Let the linear layers of blocks compute in float8, in place. The model is whole and on meta.

    Raises:
        BadInputError: the hardware has no float8 or not for so many tokens, no layer is left to
            convert, or the float8 all-gather can't be had with what else is asked for.
    """
    from pretrain_trainer.precision import ao

    options = config.quantize.linear.float8
    recipe = options.recipe_name or "tensorwise"
    if not options.emulate:
        instead = f"set {CONVERTER}.emulate to compute the same numbers slowly"
        require_capability(device, CAPABILITY, CONVERTER, instead)
        require_multiple_of_tokens(config, recipe)
    if options.enable_fsdp_float8_all_gather:
        require_whole_reshard(config, f"{CONVERTER}.enable_fsdp_float8_all_gather")
        if config.training.enable_cpu_offload and scales_are_computed_ahead(config):
            raise BadInputError(
                "training.enable_cpu_offload: scales of weights that are computed ahead don't "
                f"travel to the GPU; remove {CONVERTER}.enable_fsdp_float8_all_gather"
            )
    settings = dataclasses.replace(
        ao.Float8LinearConfig.from_recipe_name(recipe),
        enable_fsdp_float8_all_gather=options.enable_fsdp_float8_all_gather,
        emulate=options.emulate,
    )
    large = ao.auto_filter(recipe, []) if SMALL in options.filter_fqns else lambda *_: True
    chosen = choose(
        model,
        tuple(part for part in options.filter_fqns if part != SMALL),
        MULTIPLE if options.emulate else MULTIPLE * config.parallelism.tensor_parallel_degree,
        f"{CONVERTER}.filter_fqns",
        large,
    )
    ao.convert_to_float8_training(
        model.layers,
        config=settings,
        module_filter_fn=lambda _, name: f"layers.{name}" in chosen,
    )
    if recipe != "tensorwise":
        # Recomputed in another precision than before, a row's scale is another one, and a product
        # may overflow to NaN (pytorch/pytorch#150859).
        from torch._inductor import config as inductor

        inductor.emulate_precision_casts = True
    logger.info("float8 %s: %d linear layers", recipe, len(chosen))


def require_multiple_of_tokens(config: RunConfig, recipe: str) -> None:
    """Raise BadInputError if gradients of weights are sums over tokens that no kernel takes."""
    if recipe == "rowwise_with_gw_hp":
        return  # they are in high precision
    split = config.parallelism
    pipelined = split.pipeline_parallel_degree > 1
    batch = (
        split.pipeline_parallel_microbatch_size if pipelined else config.training.local_batch_size
    )
    tokens = batch * config.training.seq_len // split.context_parallel_degree
    if tokens % MULTIPLE:
        raise BadInputError(
            f"training.seq_len: {tokens} tokens go through a layer at once, and float8 needs a "
            f"multiple of {MULTIPLE}; choose another length, or recipe_name rowwise_with_gw_hp"
        )


def scales_are_computed_ahead(config: RunConfig) -> bool:
    """Whether scales of all weights are computed together, for the float8 all-gather."""
    options = config.quantize.linear.float8
    # Computed one by one, a scale is that of what a rank of tensor parallelism has of the weight.
    split = config.parallelism.tensor_parallel_degree > 1
    return options.enable_fsdp_float8_all_gather and (
        options.precompute_float8_dynamic_scale_for_fsdp or split
    )


def precompute_scales(
    parts: Sequence[nn.Module], engine: Engine, optimizer: torch.optim.Optimizer, config: RunConfig
) -> Engine:
    """Have the scales of all weights computed together, where the configuration asks for it.

    That is after each step of ``optimizer``, and before the first use of the engine that is
    returned, so that a run that was resumed has the same scales as one that went on.
    """
    if not (CONVERTER in config.model.converters and scales_are_computed_ahead(config)):
        return engine
    from pretrain_trainer.precision import ao

    def compute(*_: object) -> None:
        for part in parts:
            ao.precompute_float8_dynamic_scale_for_fsdp(part)

    optimizer.register_step_post_hook(compute)
    return _Scaled(engine, compute)


@dataclasses.dataclass(slots=True)
class _Scaled:
    """An engine that computes scales before its first use.

    A hook on the model would come too late where a pipeline gathers weights ahead of their use.
    """

    engine: Engine
    compute: Callable[[], None]
    done: bool = False

    def __call__(self, inputs: Inputs, step_tokens: int, *, last: bool) -> Tensor:
        if not self.done:
            self.compute()
            self.done = True
        return self.engine(inputs, step_tokens, last=last)


def eight_bit_flops(model: nn.Module) -> int:
    """FLOPs of training on one token that are computed in eight bits, at twice the speed.

    Emulated layers have none: they compute in the model's own precision.
    """
    weights = (
        2 * count * module.weight.numel()
        for module in model.modules()
        if (count := _eight_bit_products(module)) and isinstance(module, nn.Linear)
    )
    return sum(weights)


def _eight_bit_products(module: nn.Module) -> int:
    """How many of a layer's three products (output, both gradients) are in eight bits."""
    config: Any = getattr(module, "config", None)  # torchao's, or of our microscaling layer
    if not isinstance(module, nn.Linear) or config is None or config.emulate:
        return 0
    operand = getattr(config, "cast_config_input_for_grad_weight", None)
    return 2 if operand is not None and operand.scaling_type.name == "DISABLED" else 3


def plain(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, in the same memory, without what torchao wraps around some of them.

    The float8 all-gather hides its casting in the type of a weight. On disk a type is a pickle of
    torchao's, and the next run may have another, so checkpoints are made of what is inside.
    """
    return {name: _plain(tensor) for name, tensor in state.items()}


@torch.no_grad()
def _plain(tensor: Tensor) -> Tensor:
    if not isinstance(tensor, DTensor):
        return _inside(tensor)
    local = tensor.to_local()
    inside = _inside(local)
    if inside is local:
        return tensor
    return DTensor.from_local(
        inside,
        tensor.device_mesh,
        tensor.placements,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )


def _inside(tensor: Tensor) -> Tensor:
    if not is_traceable_wrapper_subclass(tensor):
        return tensor
    (name, *_), _ = tensor.__tensor_flatten__()
    return cast(Tensor, getattr(tensor, name))
