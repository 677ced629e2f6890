"""Forward and backward of one local batch: what a step asks of a model, wherever its parts are."""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from pretrain_trainer.models.attention import Documents
from pretrain_trainer.models.base import LanguageModel
from pretrain_trainer.parallel.fsdp import sync_gradients


class Inputs(NamedTuple):
    """What a model is called with; T = positions of a sequence that this rank computes."""

    tokens: Tensor  # int64 [batch, T]
    labels: Tensor  # int64 [batch, T]
    positions: Tensor  # int64 [T], in the whole sequence
    document_ids: Tensor  # int32 [batch, tokens of whole sequences], on the host


class Engine(Protocol):
    """Adds to the gradients of this rank's parts of the model."""

    def __call__(self, inputs: Inputs, step_tokens: int, *, last: bool) -> Tensor:
        """Forward and backward. Collective, among the ranks that share the model.

        Args:
            inputs: the same on all ranks of a pipeline and of a tensor-parallel group.
            step_tokens: positive; the sum of losses is divided by it.
            last: no more batches follow in this step, so gradients are reduced.

        Returns:
            The loss, float32 scalar, detached; zero on ranks that don't have the output.
        """
        ...


@dataclass(frozen=True, slots=True)
class Whole:
    """A model that is all on this rank, as far as layers go."""

    model: LanguageModel

    def __call__(self, inputs: Inputs, step_tokens: int, *, last: bool) -> Tensor:
        """See :class:`Engine`."""
        sync_gradients(self.model, last)
        documents = Documents(inputs.document_ids)
        sums = self.model(inputs.tokens, inputs.positions, inputs.labels, documents)
        loss = sums / step_tokens
        loss.backward()
        return loss.detach()
