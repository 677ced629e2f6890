"""Which layers of a model a number format is for, and whether the hardware has that format.

Only layers of blocks are converted, without the routers of experts. The output layer is one piece
with the loss, in which it stays in the model's own precision; most recipes leave it there anyway,
because it is the layer whose rounding shows most.
"""

from collections.abc import Callable

import torch
from torch import nn

from pretrain_api.config import RunConfig
from pretrain_trainer.errors import BadInputError
from pretrain_trainer.models.base import LanguageModel

ROUTER = ".router.gate"  # whose choice among experts must not depend on how numbers are rounded

Choice = Callable[[nn.Linear, str], bool]


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """All linear layers by name."""
    found = ((name, module) for name, module in model.named_modules())
    return {name: module for name, module in found if isinstance(module, nn.Linear)}


def choose(
    model: LanguageModel, filters: tuple[str, ...], multiple: int, key: str, fits: Choice
) -> dict[str, nn.Linear]:
    """The layers of blocks that are to be converted, by name.

    Args:
        model: whole, not split yet.
        filters: layers are left alone whose names contain one of these.
        multiple: of numbers; layers with other sizes are left alone, the hardware has no kernels.
        key: of the filters, for the message.
        fits: what else a layer must satisfy.

    Raises:
        BadInputError: a filter names nothing, or nothing is left to convert.
    """
    known = linears(model)
    require_names(filters, known, key)
    chosen = {
        name: layer
        for name, layer in known.items()
        if name.startswith("layers.")
        and not name.endswith(ROUTER)
        and not any(part in name for part in filters)
        and layer.in_features % multiple == 0
        and layer.out_features % multiple == 0
        and fits(layer, name)
    }
    if not chosen:
        raise BadInputError(
            f"{key}: no layer is left to convert; layers are left alone that are named here or "
            f"whose sizes are no multiples of {multiple}, so name fewer or empty model.converters"
        )
    return chosen


def require_names(parts: tuple[str, ...], known: dict[str, nn.Linear], key: str) -> None:
    """Raise BadInputError for the first part that no name contains: it would do nothing."""
    for part in parts:
        if not any(part in name for name in known):
            raise BadInputError(
                f"{key}: no linear layer of this model has {part!r} in its name; remove it, or "
                f"name layers as in {next(iter(known))}"
            )


def require_whole_reshard(config: RunConfig, key: str) -> None:
    """Raise BadInputError where weights are cast as they are gathered, and gathered from a part.

    FSDP keeps shards of a part of the ranks as bytes that know nothing of their casting.
    """
    if isinstance(config.parallelism.fsdp_reshard_after_forward, int):
        raise BadInputError(
            "parallelism.fsdp_reshard_after_forward: a number of ranks can't be combined with "
            f"{key}; set it to default, always or never"
        )


def require_capability(
    device: torch.device, least: tuple[int, int], converter: str, instead: str
) -> None:
    """Raise BadInputError unless ``device`` is a GPU of at least this compute capability."""
    have = "no GPU"
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability >= least:
            return
        name = torch.cuda.get_device_name(device)
        have = f"{name}, of {'.'.join(map(str, capability))}"
    raise BadInputError(
        f"model.converters: {converter} needs a GPU of compute capability "
        f"{'.'.join(map(str, least))} or newer and there is {have}; {instead}"
    )
