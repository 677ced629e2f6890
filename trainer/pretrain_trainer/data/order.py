"""Which document comes when: a shuffle that is a formula.

Every epoch visits all documents in an order of its own. Nothing is stored for it: a keyed
permutation maps a position to a document. It is a Feistel network, which is a bijection whatever
its round function does, over the smallest domain of 4^k numbers that holds all documents; a result
outside the data set is put through the network again until it falls inside (cycle walking), which
keeps it a bijection and takes less than four rounds on average.

The order of all epochs, one after the other, is dealt out to a fixed number of streams like cards:
stream s takes positions s, s + S, s + 2S and so on. Ranks own streams, so the order never depends
on how many ranks there are. Because dealing goes on across epochs, no stream is ever more than one
document ahead of another, and a data set may have fewer documents than there are streams.

The trade-off against a shuffled index on disk: a few microseconds of arithmetic per document buy a
state of one integer and no memory that grows with the data set.
"""

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

ROUNDS = 6  # four make a good permutation of a large domain; small ones profit from two more

Integers = NDArray[np.int64]
Words = NDArray[np.uint64]


class Place(NamedTuple):
    """One document's turn: ``document`` is its index in the data set, ``epoch`` counts from 0."""

    epoch: int
    document: int


@dataclass(frozen=True, slots=True)
class Order:
    """The order of a data set of ``documents`` documents; ``epochs`` None repeats it for ever."""

    documents: int
    streams: int
    seed: int
    epochs: int | None = None

    def places(self, stream: int, first: int, count: int) -> list[Place]:
        """Places number ``first`` to ``first + count - 1`` of a stream; fewer where it ends."""
        positions = stream + self.streams * np.arange(first, first + count, dtype=np.int64)
        if self.epochs is not None:
            positions = positions[positions < self.epochs * self.documents]
        epochs, within = np.divmod(positions, self.documents)
        chosen = np.empty_like(within)
        for epoch in set(epochs.tolist()):  # numpy's own function for this is slow to import
            here = epochs == epoch
            chosen[here] = permute(within[here], self.documents, self.seed, epoch)
        return [Place(*pair) for pair in zip(epochs.tolist(), chosen.tolist(), strict=True)]


def permute(positions: Integers, size: int, seed: int, epoch: int) -> Integers:
    """Map positions in [0, size) one-to-one onto [0, size); int64, any shape, not changed."""
    bits = max(1, ((size - 1).bit_length() + 1) // 2)
    keys = _round_keys(seed, epoch)
    values = _feistel(positions.astype(np.uint64), keys, bits)
    outside = values >= size
    while outside.any():
        values[outside] = _feistel(values[outside], keys, bits)
        outside = values >= size
    return values.astype(np.int64)


def _feistel(values: Words, keys: Words, bits: int) -> Words:
    """One pass over the domain of 2 * ``bits`` bits; halves swap, one changed by the other."""
    half = np.uint64(bits)
    mask = np.uint64((1 << bits) - 1)
    left, right = values >> half, values & mask
    for key in keys:
        left, right = right, left ^ (_mix(right + key) & mask)
    return (left << half) | right


def _mix(words: Words) -> Words:
    """A well-known 64-bit finalizer: every bit of the input reaches every bit of the output."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


@lru_cache(maxsize=8)
def _round_keys(seed: int, epoch: int) -> Words:
    name = f"{seed}/{epoch}".encode()
    digest = hashlib.blake2b(name, digest_size=8 * ROUNDS, person=b"document order").digest()
    return np.frombuffer(digest, dtype="<u8").astype(np.uint64)
