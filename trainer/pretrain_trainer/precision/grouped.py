"""Low precision for the grouped products of experts, by torchao.

An expert's product with its own tokens is one of a group that a single kernel computes, and torchao
has such kernels for two formats: float8 with a scale for each row (Hopper) and MXFP8 (Blackwell).
It replaces the products inside of ``torch._grouped_mm`` by wrapping the weights it is called with.

These are prototypes, in torchao's own words, and have no emulation to test them with.
"""

import logging
from typing import Any

import torch
from torch import nn

from pretrain_api.config import RunConfig
from pretrain_trainer.errors import BadInputError
from pretrain_trainer.models.base import LanguageModel
from pretrain_trainer.precision.layers import require_capability

logger = logging.getLogger(__name__)

FLOAT8 = "quantize.grouped_mm.float8"
MX = "quantize.grouped_mm.mx"


def convert_float8(model: LanguageModel, config: RunConfig, device: torch.device) -> None:
    """Let experts multiply in float8, in place. The model is whole and on meta.

    Raises:
        BadInputError: the hardware can't, or no experts are named.
    """
    require_capability(device, (9, 0), FLOAT8, "remove it from the list")
    from pretrain_trainer.precision import ao_prototype as ao

    how = ao.Float8TrainingOpConfig(pad_token_groups_for_grouped_mm=True)
    wrap(
        model,
        config.quantize.grouped_mm.float8.fqns,
        FLOAT8,
        ao.Float8TrainingWeightWrapperTensor,
        how,
    )


def convert_mx(model: LanguageModel, config: RunConfig, device: torch.device) -> None:
    """Let experts multiply in MXFP8, in place. The model is whole and on meta.

    Raises:
        BadInputError: the hardware can't, or no experts are named.
    """
    require_capability(device, (10, 0), MX, "remove it from the list")
    from pretrain_trainer.precision import ao_prototype as ao

    how = ao.MXFP8TrainingOpConfig(pad_token_groups_for_grouped_mm=True)
    wrap(model, config.quantize.grouped_mm.mx.fqns, MX, ao.MXFP8TrainingWeightWrapperTensor, how)


def wrap(model: nn.Module, parts: tuple[str, ...], key: str, wrapper: Any, how: Any) -> None:
    """Wrap the experts' weights whose names contain one of ``parts``; the names stay.

    Raises:
        BadInputError: a part names no experts, or there is none.
    """
    # A weight per expert makes three dimensions, which no other parameter has.
    known = [name for name, weight in model.named_parameters() if weight.dim() == 3]
    idle = [part for part in parts if not any(part in name for name in known)]
    if idle or not parts:
        have = f"experts have names like {known[0]}" if known else "this model has none"
        raise BadInputError(
            f"{key}.fqns: {', '.join(idle) or 'an empty list'} names no experts; {have}"
        )
    chosen = [name for name in known if any(part in name for part in parts)]
    for name in chosen:
        owner, _, own = name.rpartition(".")
        module = model.get_submodule(owner)
        weight = module.get_parameter(own)
        setattr(module, own, nn.Parameter(wrapper(weight.data, how), weight.requires_grad))
    logger.info("%s: %d weights of experts", key, len(chosen))
