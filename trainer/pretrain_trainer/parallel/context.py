"""Context parallelism: ranks share a sequence, and with it the memory and work of attention.

Outside of attention a token never looks at another, so each rank simply computes its own positions.
In attention keys and values travel. ``allgather`` collects those of all ranks at once; ``alltoall``
(torchtitan's name for it) hands them from neighbour to neighbour around a ring
(:mod:`pretrain_trainer.parallel.line`). What queries see of each part is computed on its own and
merged by its log-sum-exp, exactly as over all keys at once (Liu et al., "Ring Attention with
Blockwise Transformers", arXiv:2310.01889). The backward pass makes the same round and brings
gradients of keys and values home.

A late position sees more than an early one. The sequence is cut into twice as many chunks as there
are ranks, and rank i takes chunk i and the i-th from the end: all do the same work, and whatever a
mask would leave out is never computed.

With ``model.attn_mask_type: block_causal`` documents that share a sequence don't see each other.
They are contiguous, so at most one goes on from one chunk into a later one: there again whole
rectangles are seen or left out. Rotary positions stay those of the sequence, as in torchtitan; they
are relative, so where a document lies in its sequence makes no difference but rounding.

Attention is one operator to torch: recomputation can keep its results, and the compiler passes it
over.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from pretrain_api.config import RunConfig
from pretrain_trainer.data.loader import Microbatch
from pretrain_trainer.errors import BadInputError
from pretrain_trainer.models.base import LanguageModel
from pretrain_trainer.parallel.kernels import Seen, Tile, attend, attend_backward
from pretrain_trainer.parallel.line import Line, line_of, wide
from pretrain_trainer.parallel.mesh import Mesh


class Part(NamedTuple):
    """What one rank computes of a microbatch; T = positions of a sequence it owns."""

    tokens: Tensor  # int64 [B, T]
    labels: Tensor  # int64 [B, T]
    positions: Tensor  # int64 [T], in the whole sequence


def own_part(microbatch: Microbatch, mesh: Mesh) -> Part:
    """This rank's part of a microbatch, on the host; all of it if sequences are whole."""
    tokens, labels = microbatch.tokens, microbatch.labels
    positions = torch.arange(tokens.shape[1])
    place = (mesh.degrees.cp, mesh.at.cp)
    return Part(*(own_chunks(whole, *place) for whole in (tokens, labels, positions)))


def own_chunks(whole: Tensor, degree: int, rank: int) -> Tensor:
    """What ``rank`` of ``degree`` owns of sequences: [..., tokens] to [..., tokens / degree].

    One chunk from the front and its mirror image from the back; the length must be a multiple of
    twice the degree, which pretrain_api.mesh sees to. A single rank owns all.
    """
    if degree == 1:
        return whole
    chunks = whole.unflatten(-1, (2 * degree, -1))
    return torch.cat((chunks[..., rank, :], chunks[..., -1 - rank, :]), dim=-1)


def split(model: LanguageModel, config: RunConfig, mesh: Mesh) -> None:
    """Give the blocks of ``model`` the core of attention that ``config`` needs, in place.

    Raises:
        BadInputError: GPUs have no kernel for the configured number format.
    """
    within = config.model.attn_mask_type == "block_causal"
    if mesh.cp is None and not within:
        return
    kind = config.training.mixed_precision_param
    if mesh.dense.device_type == "cuda" and kind == "float32":
        raise BadInputError(
            "training.mixed_precision_param: attention over split sequences or within documents "
            "has no float32 kernel on GPUs; use bfloat16"
        )
    core = partial(
        attend_split,
        group="" if mesh.cp is None else mesh.cp.group_name,
        rotates=config.parallelism.context_parallel_rotate_method == "alltoall",
        within=within,
    )
    for block in model.layers.values():
        cast(Any, block).attention.core = core


def attend_split(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    documents: Tensor | None,
    *,
    group: str,
    rotates: bool,
    within: bool,
) -> Tensor:
    """A core of attention (see :mod:`pretrain_trainer.models.attention`). Collective.

    Args:
        query: of this rank's positions, [batch, tokens, heads, head_dim].
        key: the same positions, [batch, tokens, groups, head_dim].
        value: like ``key``.
        documents: int32 [batch, tokens of whole sequences], on the host; needed if ``within``.
        group: name of the ranks that share the sequences; empty for this one alone.
        rotates: around a ring, or all at once.
        within: only within documents.
    """
    if within and documents is None:
        raise ValueError("attention within documents needs to know them")
    out, _ = split_attention(query, key, value, documents if within else None, group, rotates)
    return out


# What queries see of another rank's keys.


class Region(NamedTuple):
    """Of this rank's queries and another's keys those that may see each other."""

    queries: slice
    keys: slice
    causal: bool


def region(rank: int, other: int, length: int) -> Region:
    """What ``rank`` sees of ``other``, both with ``length`` positions in two chunks.

    Of an earlier rank its first chunk, of a later one everything from the last chunk: its two
    chunks lie between this one's.
    """
    whole, half = slice(0, length), length // 2
    if other == rank:
        return Region(whole, whole, causal=True)
    if other < rank:
        return Region(whole, slice(0, half), causal=False)
    return Region(slice(half, length), whole, causal=False)


def tiles_of(seen: Region, own: Tensor | None, others: Tensor | None) -> list[Tile]:
    """The tiles of a region: within documents, if they are given.

    Args:
        seen: the region.
        own: document numbers of this rank's positions, [batch, length], ascending in each row.
        others: the same of the other rank.
    """
    if own is None or others is None:
        return [Tile(slice(None), seen.queries, seen.keys)]
    if seen.causal:
        ends = torch.ones_like(own, dtype=torch.bool)  # of rows, and where the next is another
        ends[:, :-1] = own.diff() != 0
        last = (ends.flatten().nonzero().flatten() + 1).tolist()
        return [Tile(slice(None), seen.queries, seen.keys, tuple(last))]
    found = (
        _crossing(seen, row, mine, theirs)
        for row, (mine, theirs) in enumerate(zip(own, others, strict=True))
    )
    return [tile for tile in found if tile is not None]


def _crossing(seen: Region, row: int, own: Tensor, others: Tensor) -> Tile | None:
    """All keys precede all queries, so the only document to have both is that of the last key."""
    start, stop = seen.queries.start, seen.keys.stop
    last = others[stop - 1]
    queries = int((own[seen.queries] == last).sum())
    keys = int((others[seen.keys] == last).sum())
    if queries == 0:
        return None
    return Tile(slice(row, row + 1), slice(start, start + queries), slice(stop - keys, stop))


@dataclass(frozen=True, slots=True)
class Sight:
    """What this rank sees of each: a function from another's rank to tiles."""

    line: Line
    length: int  # positions of a rank
    documents: Tensor | None  # int32 [batch, tokens of whole sequences], on the host

    def __call__(self, other: int) -> tuple[list[Tile], bool]:
        """Tiles of this rank's queries and another's keys, and whether they are causal."""
        seen = region(self.line.rank, other, self.length)
        return tiles_of(seen, self._ids(self.line.rank), self._ids(other)), seen.causal

    def _ids(self, rank: int) -> Tensor | None:
        if self.documents is None:
            return None
        return own_chunks(self.documents, self.line.degree, rank)


# The attention itself.


def forward(
    query: Tensor, key: Tensor, value: Tensor, documents: Tensor | None, line: Line
) -> tuple[Tensor, Tensor]:
    """Attention over all ranks' keys. Collective.

    Args:
        query: as in :func:`attend_split`.
        key: as there.
        value: as there.
        documents: None for attention across documents.
        line: the ranks.

    Returns:
        What the queries see, shaped and typed like them; and their log-sum-exp over all keys,
        [batch, heads, tokens], in float32 or wider.
    """
    sight = Sight(line, query.shape[1], documents)

    def look(other: int, part: Tensor) -> list[tuple[Tile, Seen]]:
        tiles, causal = sight(other)
        keys, values = part.split((key.shape[-1], value.shape[-1]), dim=-1)
        return list(zip(tiles, attend(query, keys, values, tiles, causal=causal), strict=True))

    visits = line.visit(torch.cat((key, value), dim=-1))
    ((_, own),) = look(*next(visits))  # one tile, which is all of it
    out, lse = own.out.to(wide(query.dtype)), own.lse
    for visit in visits:
        for tile, seen in look(*visit):
            merge(out[tile.rows, tile.queries], lse[tile.rows, :, tile.queries], *seen)
    return out.to(query.dtype).contiguous(), lse.contiguous()


def merge(out: Tensor, lse: Tensor, more_out: Tensor, more_lse: Tensor) -> None:
    """Add to ``out`` and ``lse``, in place, what the same queries see of further keys.

    Softmax over both sets of keys is the mean of the two results, weighted by the sums of
    exponentials.
    """
    total = torch.logaddexp(lse, more_lse)
    out.mul_(_weights(lse - total)).add_(more_out * _weights(more_lse - total))
    lse.copy_(total)


def _weights(logarithms: Tensor) -> Tensor:
    """[batch, heads, tokens] of logarithms to factors of [batch, tokens, heads, head_dim]."""
    return logarithms.exp().transpose(1, 2).unsqueeze(-1)


def backward(
    out_grad: Tensor,
    inputs: tuple[Tensor, Tensor, Tensor],
    outputs: tuple[Tensor, Tensor],
    documents: Tensor | None,
    line: Line,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, from all ranks' queries. Collective.

    Args:
        out_grad: gradient of the output, shaped like it.
        inputs: query, key and value of :func:`forward`.
        outputs: what it returned.
        documents: as there.
        line: as there.
    """
    query, key, value = inputs
    sizes = (key.shape[-1], value.shape[-1])
    sight = Sight(line, query.shape[1], documents)
    query_grad = torch.zeros_like(query, dtype=wide(query.dtype))

    def fill(other: int, part: Tensor, grads: Tensor) -> None:
        tiles, causal = sight(other)
        keys, values = part.split(sizes, dim=-1)
        key_grad, value_grad = grads.split(sizes, dim=-1)
        found = attend_backward(out_grad, (query, keys, values), outputs, tiles, causal=causal)
        for tile, more in zip(tiles, found, strict=True):
            query_grad[tile.rows, tile.queries] += more.query
            key_grad[tile.rows, tile.keys] += more.key
            value_grad[tile.rows, tile.keys] += more.value

    grads = line.collect(torch.cat((key, value), dim=-1), fill)
    key_grad, value_grad = grads.to(key.dtype).split(sizes, dim=-1)
    return query_grad.to(query.dtype), key_grad.contiguous(), value_grad.contiguous()


@torch.library.custom_op("pretrain::split_attention", mutates_args=())
def split_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    documents: Tensor | None,
    group: str,
    rotates: bool,
) -> tuple[Tensor, Tensor]:
    """:func:`forward` as an operator; ``group`` and ``rotates`` as in :func:`attend_split`."""
    return forward(query, key, value, documents, line_of(group, rotates))


@torch.library.custom_op("pretrain::split_attention_backward", mutates_args=())
def split_attention_backward(
    out_grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    documents: Tensor | None,
    group: str,
    rotates: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`backward` as an operator."""
    line = line_of(group, rotates)
    return backward(out_grad.contiguous(), (query, key, value), (out, lse), documents, line)


@split_attention.register_fake
def _(query: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    batch, tokens, heads, _size = query.shape
    lse = query.new_empty((batch, heads, tokens), dtype=wide(query.dtype))
    return query.new_empty(query.shape), lse


@split_attention_backward.register_fake
def _(_: Tensor, query: Tensor, key: Tensor, value: Tensor, *__: Any) -> tuple[Tensor, ...]:
    return tuple(tensor.new_empty(tensor.shape) for tensor in (query, key, value))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, documents, group, rotates = inputs
    ctx.save_for_backward(*tensors, *output, documents)
    ctx.how = (group, rotates)


def _gradients(ctx: Any, out_grad: Tensor, _lse_grad: Tensor) -> tuple[Tensor | None, ...]:
    found = split_attention_backward(out_grad, *ctx.saved_tensors, *ctx.how)
    return (*found, None, None, None)


split_attention.register_autograd(_gradients, setup_context=_keep)

SPLIT_ATTENTION = torch.ops.pretrain.split_attention.default  # as policies of recomputation see it
