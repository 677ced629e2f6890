"""The core of attention, between projections: what every family shares, and parallelism replaces.

A core takes queries [batch, tokens, heads, head_dim], keys and values of as many heads or fewer,
and the document numbers of whole sequences, and returns what the queries see, shaped like them. A
model has the plain one here; :mod:`pretrain_trainer.parallel.context` has another for sequences
that are split over ranks, or whose documents must not see each other.
"""

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional

Core = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


class Documents:
    """Which document every token of a microbatch belongs to: int32 [batch, tokens], on the host.

    Tokens are those of whole sequences, even where a rank computes a part of them, and numbers
    never fall along a sequence. They decide what is computed at all, so they are read by the host.
    This is no tensor because FSDP takes every tensor a model is called with to the GPU, and reading
    them back from there would stop the host in every layer.
    """

    def __init__(self, ids: Tensor) -> None:
        self.ids = ids


def causal(query: Tensor, key: Tensor, value: Tensor, documents: Tensor | None = None) -> Tensor:
    """Every position sees itself and all before it, whatever document they belong to."""
    del documents
    mixed = functional.scaled_dot_product_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        is_causal=True,
        enable_gqa=query.shape[2] != key.shape[2],
    )
    return mixed.transpose(1, 2)
