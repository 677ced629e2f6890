"""Attention of some queries to some keys, with what is needed to put the pieces together.

torch's public attention returns no log-sum-exp, so the operators below it are called, forward and
backward. Both know groups of query heads that share keys and values. Pieces are described as tiles:
rectangles of queries times keys without any mask inside, or squares below their diagonal, one or
many along it. So no mask is ever stored or multiplied by, and a document that is left out costs
nothing.

On a CPU each rectangle or square is a call. On a GPU all of them are one call of the flash kernel
for sequences of different lengths, packed along one axis. The GPU's path has not been run: no GPU
was there when it was written. It calls the operators as torch's own ``torch.nn.attention.varlen``
does.
"""

from collections.abc import Iterator
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

aten = torch.ops.aten


class Tile(NamedTuple):
    """Queries that see keys, of some sequences of a batch: all of them, or causally a square.

    ``ends`` cuts the square into smaller ones along its diagonal: where each ends, if rows are laid
    end to end. Without it every row is one.
    """

    rows: slice  # of the batch
    queries: slice  # positions
    keys: slice
    ends: tuple[int, ...] = ()


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
    parts = (query[tile.rows, tile.queries], key[tile.rows, tile.keys], value[tile.rows, tile.keys])
    found = [
        aten._scaled_dot_product_flash_attention_for_cpu(
            *(part.transpose(1, 2) for part in square), 0.0, causal
        )
        for square in _squares(parts, tile.ends)
    ]
    rows = parts[0].shape[0]
    out = _laid(rows, [out.transpose(1, 2) for out, _ in found])
    return Seen(out, _laid(rows, [lse.transpose(1, 2) for _, lse in found]).transpose(1, 2))


def _tile_backward(
    out_grad: Tensor,
    inputs: tuple[Tensor, Tensor, Tensor],
    outputs: tuple[Tensor, Tensor],
    tile: Tile,
    causal: bool,
) -> Gradients:
    (query, key, value), (out, lse) = inputs, outputs
    queries, keys = (tile.rows, tile.queries), (tile.rows, tile.keys)
    parts = (
        out_grad[queries], query[queries], key[keys], value[keys],
        out[queries], lse.transpose(1, 2)[queries],
    )  # fmt: skip
    found = [
        aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *(part.transpose(1, 2) for part in square), 0.0, causal
        )
        for square in _squares(parts, tile.ends)
    ]
    rows = parts[0].shape[0]
    return Gradients(
        *(_laid(rows, [g.transpose(1, 2) for g in of]) for of in zip(*found, strict=True))
    )


def _squares(parts: tuple[Tensor, ...], ends: tuple[int, ...]) -> Iterator[tuple[Tensor, ...]]:
    """Of tensors [rows, positions, ...] every square's [1, positions, ...]; all if not cut."""
    if not ends:
        yield parts
        return
    laid = [part.flatten(0, 1)[None] for part in parts]
    for start, end in pairwise((0, *ends)):
        yield tuple(part[:, start:end] for part in laid)


def _laid(rows: int, squares: list[Tensor]) -> Tensor:
    """The inverse: [rows, positions, ...]."""
    if len(squares) == 1 and squares[0].shape[0] == rows:
        return squares[0]
    return torch.cat(squares, dim=1)[0].unflatten(0, (rows, -1))


class _Side(NamedTuple):
    """One axis of all tiles, packed: queries, or keys."""

    where: list[tuple[slice, slice]]  # rows and positions of every tile
    shapes: list[tuple[int, int]]  # their numbers
    ends: Tensor  # int32 [sequences + 1], from 0, as the flash kernel wants to know it
    longest: int

    def pack(self, tensor: Tensor) -> Tensor:
        """[batch, positions, ...] to [packed positions, ...]."""
        parts = [tensor[part].flatten(0, 1) for part in self.where]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def unpack(self, packed: Tensor) -> list[Tensor]:
        """The inverse: of every tile [rows, positions, ...]."""
        parts = packed.split([rows * positions for rows, positions in self.shapes])
        return [part.unflatten(0, shape) for part, shape in zip(parts, self.shapes, strict=True)]


def _sides(query: Tensor, key: Tensor, tiles: list[Tile]) -> tuple[_Side, _Side]:
    cuts = [tile.ends for tile in tiles]
    queries = _side(query, [(tile.rows, tile.queries) for tile in tiles], cuts)
    return queries, _side(key, [(tile.rows, tile.keys) for tile in tiles], cuts)


def _side(tensor: Tensor, where: list[tuple[slice, slice]], cuts: list[tuple[int, ...]]) -> _Side:
    batch, positions = tensor.shape[:2]
    shapes = [(len(range(batch)[rows]), len(range(positions)[places])) for rows, places in where]
    lengths = [
        length
        for (rows, size), ends in zip(shapes, cuts, strict=True)
        for length in ([b - a for a, b in pairwise((0, *ends))] if ends else [size] * rows)
    ]
    ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    return _Side(where, shapes, ends.to(tensor.device, non_blocking=True), max(lengths))


def _attend_packed(
    query: Tensor, key: Tensor, value: Tensor, tiles: list[Tile], causal: bool
) -> list[Seen]:
    queries, keys = _sides(query, key, tiles)
    out, lse, *_ = aten._flash_attention_forward(
        queries.pack(query), keys.pack(key), keys.pack(value),
        queries.ends, keys.ends, queries.longest, keys.longest,
        0.0, causal, False,
    )  # fmt: skip
    # The kernel's log-sum-exp is [heads, packed queries].
    found = zip(queries.unpack(out), queries.unpack(lse.T), strict=True)
    return [Seen(of_tile, its_lse.transpose(1, 2)) for of_tile, its_lse in found]


def _packed_backward(
    out_grad: Tensor,
    inputs: tuple[Tensor, Tensor, Tensor],
    outputs: tuple[Tensor, Tensor],
    tiles: list[Tile],
    causal: bool,
) -> list[Gradients]:
    (query, key, value), (out, lse) = inputs, outputs
    queries, keys = _sides(query, key, tiles)
    query_grad, key_grad, value_grad = aten._flash_attention_backward(
        queries.pack(out_grad), queries.pack(query), keys.pack(key), keys.pack(value),
        queries.pack(out), queries.pack(lse.transpose(1, 2)).T.contiguous(),
        queries.ends, keys.ends, queries.longest, keys.longest,
        0.0, causal,
        torch.zeros(2, dtype=torch.uint64, device=query.device),  # of a dropout that isn't there
        torch.empty(0, device=query.device),
    )  # fmt: skip
    found = (queries.unpack(query_grad), keys.unpack(key_grad), keys.unpack(value_grad))
    return [Gradients(*of_tile) for of_tile in zip(*found, strict=True)]
