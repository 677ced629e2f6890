"""MXFP8 for the grouped products of experts, by torchao.

An expert's product with its own tokens is one of a group that a single kernel computes. torchao
replaces the products inside of ``torch._grouped_mm`` by wrapping the weights it is called with, and
fills every expert's tokens up to a whole block. Its kernel for float8 can't do that yet (0.18), so
there is no float8 for experts.

This is a prototype, in torchao's own words.
"""

import logging
from typing import Any

import torch
from torch import nn

from pretrain_api.config import RunConfig
from pretrain_trainer.errors import BadInputError
from pretrain_trainer.models.base import LanguageModel
from pretrain_trainer.precision.layers import require_whole_reshard
from pretrain_trainer.precision.mx import EMULATED, require_hardware

logger = logging.getLogger(__name__)

CONVERTER = "quantize.grouped_mm.mx"


def convert(model: LanguageModel, config: RunConfig, device: torch.device) -> None:
    """Let experts multiply in MXFP8, in place. The model is whole and on meta.

    Raises:
        BadInputError: the hardware can't, no experts are named, training isn't in bfloat16, or
            weights are kept in part.
    """
    options = config.quantize.grouped_mm.mx
    emulate = options.recipe_name == EMULATED
    if not emulate:
        require_hardware(device, CONVERTER)
    require_whole_reshard(config, CONVERTER)
    if config.training.mixed_precision_param != "bfloat16":
        raise BadInputError(
            f"training.mixed_precision_param: the products of {CONVERTER} are in bfloat16; set it "
            "to bfloat16"
        )
    from pretrain_trainer.precision import ao_prototype as ao

    how = ao.MXFP8TrainingOpConfig(
        kernel_preference=ao.KernelPreference.EMULATED if emulate else ao.KernelPreference.AUTO,
        pad_token_groups_for_grouped_mm=True,
    )
    wrap(model, options.fqns, how)


def wrap(model: nn.Module, parts: tuple[str, ...], how: Any) -> None:
    """Wrap the experts' weights whose names contain one of ``parts``; the names stay.

    Raises:
        BadInputError: a part names no experts, or there is none.
    """
    from pretrain_trainer.precision import ao_prototype as ao

    # A weight per expert makes three dimensions, which no other parameter has.
    known = [name for name, weight in model.named_parameters() if weight.dim() == 3]
    idle = [part for part in parts if not any(part in name for name in known)]
    if idle or not parts:
        have = f"experts have names like {known[0]}" if known else "this model has none"
        raise BadInputError(
            f"{CONVERTER}.fqns: {', '.join(idle) or 'an empty list'} names no experts; {have}"
        )
    chosen = [name for name in known if any(part in name for part in parts)]
    for name in chosen:
        owner, _, own = name.rpartition(".")
        module = model.get_submodule(owner)
        weight = module.get_parameter(own)
        wrapped = ao.MXFP8TrainingWeightWrapperTensor(weight.data, how)
        setattr(module, own, nn.Parameter(wrapped, weight.requires_grad))
    logger.info("%s: %d weights of experts", CONVERTER, len(chosen))
