"""What the trainer needs to know about any language model."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True, slots=True)
class Normal:
    """A normal distribution around zero; values beyond ``cutoff`` are drawn again."""

    std: float
    cutoff: float = float("inf")


@dataclass(frozen=True, slots=True)
class Constant:
    """The same value everywhere."""

    value: float


Distribution = Normal | Constant


class LanguageModel(nn.Module, ABC):
    """A decoder: an embedding, a dictionary of equal blocks, a norm and an output.

    The four attributes are the units in which parallelism, recomputation and compilation are put
    on. A call takes int64 tokens [batch, tokens] and returns logits [batch, tokens, vocab_size], or
    passes ``labels`` on to an output that makes a loss of them.
    """

    tok_embeddings: nn.Embedding
    layers: nn.ModuleDict
    norm: nn.RMSNorm
    output: nn.Linear

    @abstractmethod
    def distributions(self) -> dict[str, Distribution]:
        """The initial distribution of every parameter, by name."""

    @abstractmethod
    def init_buffers(self) -> None:
        """Compute every buffer in place, on whatever device it lies."""

    @abstractmethod
    def meaning(self) -> dict[str, str]:
        """What the same weights would compute differently with, by name; shapes don't tell it."""

    @abstractmethod
    def flops_per_token(self) -> int:
        """Model FLOPs of training on one token, the numerator of MFU."""
