"""Microscaling formats (MXFP8) for the products of linear layers, by torchao.

Thirty-two neighbouring numbers share a scale that is a power of two. Blackwell GPUs multiply such
numbers; elsewhere they can only be emulated. As with float8, a weight stays what it was and is cast
before each product, so checkpoints don't know about it.

torchao has the arithmetic and no layer around it any more, so the layer is here. It has no
gradients through products in NVFP4, sixteen numbers to a scale: those are for inference, and for
training that imitates inference.
"""

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pretrain_api.config import RunConfig
from pretrain_trainer.errors import BadInputError
from pretrain_trainer.models.base import LanguageModel
from pretrain_trainer.precision.layers import choose, require_capability

logger = logging.getLogger(__name__)

CONVERTER = "quantize.linear.mx"
BLOCK = 32  # numbers that share a scale
CAPABILITY = (10, 0)  # Blackwell
EMULATED = "mxfp8_emulated"
NO_NVFP4 = "torchao has NVFP4 for inference only, on GPUs of compute capability 10.0 or newer"
ROUNDING = {EMULATED: "RCEIL", "mxfp8_cublas": "FLOOR", "mxfp8_cublas_rceil": "RCEIL"}


@dataclass(frozen=True, slots=True)
class Format:
    """How numbers are cast: torchao's names, and whether products are emulated."""

    rounding: str
    kernel: str  # of the cast along dimension 1
    emulate: bool


def convert(model: LanguageModel, config: RunConfig, device: torch.device) -> None:
    """Let the linear layers of blocks compute in MXFP8, in place. The model is whole and on meta.

    Raises:
        BadInputError: the hardware has no MXFP8, or no layer is left to convert.
    """
    options = config.quantize.linear.mx
    rounding = ROUNDING.get(options.recipe_name)
    if rounding is None:
        raise BadInputError(
            f"{CONVERTER}.recipe_name: there is no {options.recipe_name!r}, only "
            f"{', '.join(ROUNDING)}; {NO_NVFP4}"
        )
    emulate = options.recipe_name == EMULATED
    if not emulate:
        require_hardware(device, CONVERTER)
    chosen = choose(
        model,
        options.filter_fqns,
        # A block of numbers lies on one rank.
        BLOCK * config.parallelism.tensor_parallel_degree,
        f"{CONVERTER}.filter_fqns",
        lambda *_: True,
    )
    # Emulation is torch's own arithmetic, in one direction as in the other.
    kernel = "torch" if emulate else options.mxfp8_dim1_cast_kernel_choice
    for layer in chosen.values():
        layer.__class__ = MXLinear  # same parameters, another product
        layer.config = Format(rounding, kernel, emulate)  # pyright: ignore[reportArgumentType]  # no module
    logger.info("%s: %d linear layers", options.recipe_name, len(chosen))


def require_hardware(device: torch.device, converter: str) -> None:
    """Raise BadInputError unless ``device`` multiplies in MXFP8."""
    instead = f"set {converter}.recipe_name to {EMULATED} to compute the same numbers slowly"
    require_capability(device, CAPABILITY, converter, instead)


class MXLinear(nn.Linear):
    """A linear layer without bias that multiplies in MXFP8."""

    config: Format

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # torch's name for it
        """[..., in_features] to [..., out_features], in the input's dtype."""
        return multiply(input, self.weight, self.config)

    def extra_repr(self) -> str:
        """Sizes and format."""
        return f"{super().extra_repr()}, {self.config}"


def multiply(x: Tensor, weight: Tensor, how: Format) -> Tensor:
    """``x @ weight.T`` with both, and later their gradients, cast to MXFP8."""
    from pretrain_trainer.precision import ao_prototype as ao

    dtypes = [torch.float8_e4m3fn] * 3  # of input, weight and gradient
    arguments: list[Any] = [
        ao.KernelPreference.EMULATED if how.emulate else ao.KernelPreference.AUTO,
        ao.MXFP8Dim0CastKernelChoice.TORCH if how.emulate else ao.MXFP8Dim0CastKernelChoice.TRITON,
        ao.MXFP8Dim1CastKernelChoice(how.kernel),
        ao.ScaleCalculationMode[how.rounding],
        False,  # gradients of weights in the model's own precision
    ]
    return ao.mx_mm.apply(x, weight, *dtypes, BLOCK, *arguments)
