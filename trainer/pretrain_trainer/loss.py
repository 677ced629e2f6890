"""The loss: mean cross entropy over every valid token of the whole step.

A step is many microbatches on many ranks, and padding or document ends can leave them with unequal
numbers of valid tokens. A mean of means would weigh tokens by the company they keep. So a
microbatch's loss is a sum, divided by the valid tokens of the whole step, which are counted before
the first forward pass; gradients are then added, over microbatches and over ranks.
"""

from torch import Tensor
from torch.nn import functional

IGNORED = -100  # label of a position without a target


def cross_entropy_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum over valid positions, float32 scalar.

    Args:
        logits: [..., vocab_size]; taken to float32 here.
        labels: int64 [...]; IGNORED where there is no target.
    """
    return functional.cross_entropy(
        logits.flatten(0, -2).float(), labels.flatten(), reduction="sum", ignore_index=IGNORED
    )


def valid_tokens(labels: Tensor) -> int:
    """Positions with a target."""
    return int((labels != IGNORED).sum())
