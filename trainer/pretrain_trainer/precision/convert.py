"""What is done to the whole model before it is split, wrapped and compiled.

Number formats come first, because everything else works on layers as they then are.
"""

import logging
from collections.abc import Callable

import torch

from pretrain_api.config import RunConfig
from pretrain_trainer.models.base import LanguageModel
from pretrain_trainer.precision import float8, grouped, mx
from pretrain_trainer.precision.activation_checkpoint import check_names

logger = logging.getLogger(__name__)

CONVERTERS: dict[str, Callable[[LanguageModel, RunConfig, torch.device], None]] = {
    float8.CONVERTER: float8.convert,
    mx.CONVERTER: mx.convert,
    grouped.CONVERTER: grouped.convert,
}


def convert(model: LanguageModel, config: RunConfig, device: torch.device) -> None:
    """Apply ``model.converters`` in place, in their order. The model is whole and on meta.

    Raises:
        BadInputError: one of them can't be had here, or would do nothing.
    """
    check_names(model, config.activation_checkpoint)
    for name in config.model.converters:
        CONVERTERS[name](model, config, device)
    if config.model.print_after_conversion:
        logger.info("the model after conversion:\n%s", model)
