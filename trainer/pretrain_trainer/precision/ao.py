"""What float8 needs of torchao, in a module that is imported only where it is needed.

Importing torchao takes seconds and asks torch whether there is a GPU, so whoever has no use for it
leaves it alone: this module is imported inside functions, and by the fork server of a run that
uses it, which does it once for all ranks. The rest of torchao is in :mod:`ao_prototype`, because
importing that goes on to use the GPU.
"""

from pretrain_trainer.precision.quiet import quiet

with quiet():
    from torchao.float8 import (
        Float8LinearConfig,
        convert_to_float8_training,
        precompute_float8_dynamic_scale_for_fsdp,
    )
    from torchao.float8.float8_linear import Float8Linear
    from torchao.float8.float8_linear_utils import _auto_filter_for_recipe as auto_filter

__all__ = [
    "Float8Linear",
    "Float8LinearConfig",
    "auto_filter",
    "convert_to_float8_training",
    "precompute_float8_dynamic_scale_for_fsdp",
]
