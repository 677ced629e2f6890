"""What the trainer needs to know about any language model."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
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

    It may also be a part of a model, which other parts complete: blocks are missing, while those
    that are there keep their keys, and each of the other attributes may be None. A part without
    embedding takes the stream, [batch, tokens, dim], and one without output returns it.
    """

    tok_embeddings: nn.Embedding | None
    layers: nn.ModuleDict
    norm: nn.RMSNorm | None
    output: nn.Linear | None

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
    def costs(self) -> dict[str, int]:
        """Model FLOPs of training on one token, of each unit by name, in the order of the model."""

    def flops_per_token(self) -> int:
        """Model FLOPs of training on one token, the numerator of MFU."""
        return sum(self.costs().values())


def named_parameters(parts: Iterable[nn.Module]) -> Iterator[tuple[str, nn.Parameter]]:
    """Of all parts of a model. Names are those of the whole model, so none comes twice."""
    for part in parts:
        yield from part.named_parameters()
