"""torch.compile for what runs most: every block, and the loss.

Blocks are compiled one by one, as whole graphs. Equal blocks share one compilation, so its time
doesn't grow with depth, and FSDP's gathering between blocks stays outside of the graphs.
"""

from collections.abc import Callable
from typing import TypeVar

import torch

from pretrain_api.config import Compile
from pretrain_trainer.models.base import LanguageModel

Function = TypeVar("Function", bound=Callable[..., object])


def compile_blocks(model: LanguageModel, config: Compile) -> None:
    """Compile the blocks of ``model`` in place, if ``config`` names them."""
    if config.enable and "model" in config.components:
        for block in model.layers.values():
            block.forward = torch.compile(block.forward, backend=config.backend, fullgraph=True)


def compile_loss(loss: Function, config: Compile) -> Function:
    """The loss, compiled if ``config`` names it."""
    if config.enable and "loss" in config.components:
        return torch.compile(loss, backend=config.backend)  # pyright: ignore[reportReturnType]  # same call signature
    return loss
