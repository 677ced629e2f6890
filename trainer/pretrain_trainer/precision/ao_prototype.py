"""What microscaling formats and experts need of torchao: prototypes, in its own words.

Imported inside functions, and never by the fork server: importing it looks for Triton, and where
there is a GPU that makes a CUDA context, which would spoil every fork.
"""

from pretrain_trainer.precision.quiet import quiet

with quiet():
    from torchao.prototype.moe_training.config import MXFP8TrainingOpConfig
    from torchao.prototype.moe_training.mxfp8_linear import mx_mm
    from torchao.prototype.moe_training.tensor import MXFP8TrainingWeightWrapperTensor
    from torchao.prototype.mx_formats.config import (
        MXFP8Dim0CastKernelChoice,
        MXFP8Dim1CastKernelChoice,
        ScaleCalculationMode,
    )
    from torchao.quantization.quantize_.common.kernel_preference import KernelPreference

__all__ = [
    "KernelPreference",
    "MXFP8Dim0CastKernelChoice",
    "MXFP8Dim1CastKernelChoice",
    "MXFP8TrainingOpConfig",
    "MXFP8TrainingWeightWrapperTensor",
    "ScaleCalculationMode",
    "mx_mm",
]
