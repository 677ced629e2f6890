"""Attention of some queries to some keys, with what is needed to put the pieces together.

torch's public attention returns no log-sum-exp, so the operators below it are called, forward and
backward. Both know groups of query heads that share keys and values. Pieces are described as tiles:
rectangles of queries times keys without any mask inside, or squares below their diagonal. So no
mask is ever stored or multiplied by, and a document that is left out costs nothing.

On a CPU each tile is a call. On a GPU all tiles are one call of the flash kernel for sequences of
different lengths, packed along one axis. The GPU's path has not been run: no GPU was there when it
was written. It calls the operators as torch's own ``torch.nn.attention.varlen`` does.
"""

from collections.abc import Iterable
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

aten = torch.ops.aten


class Tile(NamedTuple):
    """Queries that see keys, of some sequences of a batch: all of them, or causally a square."""

    rows: slice  # of the batch
    queries: slice  # positions
    keys: slice


class Seen(NamedTuple):
    """What a tile's queries see of its keys alone."""

    out: Tensor  # [rows, queries, heads, head_dim]
    lse: Tensor  # [rows, heads, queries]: logarithm of the sum of exponentials, float32 or wider


class Gradients(NamedTuple):
    """A tile's part of three gradients, each shaped as the tile's part of the tensor."""

    query: Tensor
    key: Tensor
    value: Tensor


def attend(
    query: Tensor, key: Tensor, value: Tensor, tiles: list[Tile], *, causal: bool
) -> list[Seen]:
    """Attention within each tile.

    Args:
        query: [batch, tokens, heads, head_dim]; on a GPU float16 or bfloat16.
        key: [batch, other tokens, groups, head_dim], where groups divide heads.
        value: like ``key``.
        tiles: none of them empty.
        causal: tiles are squares, of which the part above the diagonal is left out.
    """
    if not tiles:
        return []
    if query.device.type == "cuda":
        return _attend_packed(query, key, value, tiles, causal)
    return [_attend_tile(query, key, value, tile, causal) for tile in tiles]


def attend_backward(
    out_grad: Tensor,
    inputs: tuple[Tensor, Tensor, Tensor],
    outputs: tuple[Tensor, Tensor],
    tiles: list[Tile],
    *,
    causal: bool,
) -> list[Gradients]:
    """Gradients that come from each tile.

    The probabilities are recomputed from the log-sum-exp over *all* keys that a query sees, so
    gradients of tiles add up (algorithm 2 of Dao, "FlashAttention-2", arXiv:2307.08691).

    Args:
        out_grad: [batch, tokens, heads, head_dim].
        inputs: query, key and value, as in :func:`attend`.
        outputs: out, shaped like query, and lse [batch, heads, tokens], over all keys.
        tiles: as in :func:`attend`.
        causal: as in :func:`attend`.
    """
    if not tiles:
        return []
    if out_grad.device.type == "cuda":
        return _packed_backward(out_grad, inputs, outputs, tiles, causal)
    return [_tile_backward(out_grad, inputs, outputs, tile, causal) for tile in tiles]


def _attend_tile(query: Tensor, key: Tensor, value: Tensor, tile: Tile, causal: bool) -> Seen:
    rows, queries, keys = tile
    parts = (query[rows, queries], key[rows, keys], value[rows, keys])
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
        *(part.transpose(1, 2) for part in parts), 0.0, causal
    )
    return Seen(out.transpose(1, 2), lse)


def _tile_backward(
    out_grad: Tensor,
    inputs: tuple[Tensor, Tensor, Tensor],
    outputs: tuple[Tensor, Tensor],
    tile: Tile,
    causal: bool,
) -> Gradients:
    rows, queries, keys = tile
    (query, key, value), (out, lse) = inputs, outputs
    parts = (
        out_grad[rows, queries], query[rows, queries], key[rows, keys], value[rows, keys],
        out[rows, queries],
    )  # fmt: skip
    found = aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *(part.transpose(1, 2) for part in parts), lse[rows, :, queries], 0.0, causal
    )
    return Gradients(*(gradient.transpose(1, 2) for gradient in found))


class _Lengths(NamedTuple):
    """One axis of packed sequences, as the flash kernel wants to know it."""

    ends: Tensor  # int32 [sequences + 1], from 0
    longest: int


def _attend_packed(
    query: Tensor, key: Tensor, value: Tensor, tiles: list[Tile], causal: bool
) -> list[Seen]:
    (queries, q_lengths), (keys, k_lengths) = _sides(query, key, tiles)
    out, lse, *_ = aten._flash_attention_forward(
        _pack(query, queries), _pack(key, keys), _pack(value, keys),
        q_lengths.ends, k_lengths.ends, q_lengths.longest, k_lengths.longest,
        0.0, causal, False,
    )  # fmt: skip
    # The kernel's log-sum-exp is [heads, packed queries].
    outs, lses = _unpack(out, query, queries), _unpack(lse.T, query, queries)
    return [Seen(o, s.transpose(1, 2)) for o, s in zip(outs, lses, strict=True)]


def _packed_backward(
    out_grad: Tensor,
    inputs: tuple[Tensor, Tensor, Tensor],
    outputs: tuple[Tensor, Tensor],
    tiles: list[Tile],
    causal: bool,
) -> list[Gradients]:
    (query, key, value), (out, lse) = inputs, outputs
    (queries, q_lengths), (keys, k_lengths) = _sides(query, key, tiles)
    found = aten._flash_attention_backward(
        _pack(out_grad, queries), _pack(query, queries), _pack(key, keys), _pack(value, keys),
        _pack(out, queries), _pack(lse.transpose(1, 2), queries).T.contiguous(),
        q_lengths.ends, k_lengths.ends, q_lengths.longest, k_lengths.longest,
        0.0, causal,
        torch.zeros(2, dtype=torch.uint64, device=query.device),  # of a dropout that isn't there
        torch.empty(0, device=query.device),
    )  # fmt: skip
    sides = ((query, queries), (key, keys), (value, keys))
    parts = (_unpack(packed, *side) for packed, side in zip(found, sides, strict=True))
    return [Gradients(*of_tile) for of_tile in zip(*parts, strict=True)]


Side = list[tuple[slice, slice]]  # rows and positions of every tile


def _sides(query: Tensor, key: Tensor, tiles: list[Tile]) -> tuple[tuple[Side, _Lengths], ...]:
    queries = [(tile.rows, tile.queries) for tile in tiles]
    keys = [(tile.rows, tile.keys) for tile in tiles]
    return (queries, _lengths(query, queries)), (keys, _lengths(key, keys))


def _sizes(tensor: Tensor, side: Side) -> Iterable[tuple[int, int]]:
    """Sequences and positions of every tile."""
    for rows, positions in side:
        yield len(range(*rows.indices(tensor.shape[0]))), positions.stop - positions.start


def _lengths(tensor: Tensor, side: Side) -> _Lengths:
    each = [size for rows, size in _sizes(tensor, side) for _ in range(rows)]
    ends = torch.tensor([0, *accumulate(each)], dtype=torch.int32)
    return _Lengths(ends.to(tensor.device, non_blocking=True), max(each))


def _pack(tensor: Tensor, side: Side) -> Tensor:
    """[batch, positions, ...] to [packed positions, ...]."""
    parts = [tensor[part].flatten(0, 1) for part in side]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _unpack(packed: Tensor, like: Tensor, side: Side) -> list[Tensor]:
    """The inverse: of every tile [rows, positions, ...], cut as ``like`` was."""
    sizes = list(_sizes(like, side))
    parts = packed.split([rows * positions for rows, positions in sizes])
    return [part.unflatten(0, size) for part, size in zip(parts, sizes, strict=True)]
