"""From a stream of documents to windows of tokens.

A stream's documents, each between the tokenizer's begin and end tokens, make one endless row of
tokens, which is cut into windows of ``seq_len + 1``. The first ``seq_len`` tokens of a window are
the input, the last ``seq_len`` the labels. Windows don't overlap, so one token in ``seq_len + 1``
is never predicted: torchtitan cuts the same way, and a token belongs to exactly one sample. A
window may hold several documents; positions start again at 0 in each, and document ids let
attention stay inside one.

How far a stream is fits in two numbers, its cursor: the document whose turn it is, and how many of
its tokens are used up. Packing never sees other streams, so a cursor means the same on every
layout.
"""

import hashlib
from collections import deque
from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from pretrain_trainer.alive import Alive, unwatched
from pretrain_trainer.data.errors import DataError
from pretrain_trainer.data.sources import Document

IGNORED = -100  # label without a loss, torch's default for cross entropy
# Documents tokenized at once, so that the tokenizer can use several cores. A stream starts with one
# and doubles: the first step after a restart is waited for, and needs few documents of each stream.
LARGEST_BATCH = 16

Tokens = NDArray[np.int64]


class Cursor(NamedTuple):
    """Where a stream goes on: tokens used up of its ``ordinal``-th document."""

    ordinal: int = 0
    offset: int = 0


class Piece(NamedTuple):
    """Part of a document in a window: ``length`` tokens from ``offset`` on."""

    identity: int
    offset: int
    length: int


class Window(NamedTuple):
    """``seq_len + 1`` tokens, int64; those after the pieces' end are padding."""

    tokens: Tokens
    pieces: tuple[Piece, ...]


class Sample(NamedTuple):
    """What a model is fed: tokens and labels are int64, the others int32, all of ``seq_len``."""

    tokens: Tokens
    labels: Tokens
    positions: NDArray[np.int32]
    document_ids: NDArray[np.int32]


class Encoder(Protocol):
    """What packing needs of a tokenizer."""

    @property
    def eos_id(self) -> int:
        """The token that ends a document; padding is made of it."""
        ...

    def encode_batch(self, texts: list[str]) -> list[Tokens]:
        """Token ids of each text, begin and end tokens included; never empty."""
        ...


class Packer:
    """Cuts one stream into windows."""

    def __init__(
        self,
        documents: Iterator[Document],
        encoder: Encoder,
        seq_len: int,
        cursor: Cursor,
        moved: Alive = unwatched,
    ) -> None:
        """``documents`` start with the one the cursor points at.

        ``moved`` is called whenever some of them are tokenized.
        """
        self._documents = documents
        self._encoder = encoder
        self._length = seq_len + 1
        self._cursor = cursor
        self._moved = moved
        self._batch = 1
        self._ready: deque[tuple[Document, Tokens]] = deque()

    @property
    def cursor(self) -> Cursor:
        """What the next window starts with."""
        return self._cursor

    def next_window(self) -> Window:
        """The next window; padded where the stream ends, and all padding after that."""
        tokens = np.full(self._length, self._encoder.eos_id, np.int64)
        pieces: list[Piece] = []
        filled = 0
        while filled < self._length and not self.ended():
            piece, taken = self._take(self._length - filled)
            tokens[filled : filled + len(taken)] = taken
            filled += len(taken)
            pieces.append(piece)
        return Window(tokens, tuple(pieces))

    def ended(self) -> bool:
        """Whether no token is left; looks one batch of documents ahead."""
        if not self._ready:
            batch = list(islice(self._documents, self._batch))
            self._batch = min(2 * self._batch, LARGEST_BATCH)
            encoded = self._encoder.encode_batch([document.text for document in batch])
            self._ready.extend(zip(batch, encoded, strict=True))
            self._moved()
        return not self._ready

    def _take(self, most: int) -> tuple[Piece, Tokens]:
        """Use up to ``most`` tokens of the document whose turn it is."""
        document, tokens = self._ready[0]
        offset = self._cursor.offset
        if offset >= len(tokens):
            raise DataError(
                f"document {document.ordinal} of this stream has {len(tokens)} tokens, but the "
                f"checkpoint stopped after {offset}; the data or the tokenizer has changed"
            )
        taken = tokens[offset : offset + most]
        piece = Piece(document.identity, offset, len(taken))
        if offset + len(taken) == len(tokens):
            self._ready.popleft()
            self._cursor = Cursor(document.ordinal + 1)
        else:
            self._cursor = Cursor(document.ordinal, offset + len(taken))
        return piece, taken


def sample(window: Window) -> Sample:
    """Input, labels, positions and document numbers (counted in the window) of a window.

    Positions count from the first token that is in the window, so they stay below ``seq_len``.
    """
    size = len(window.tokens)
    filled = sum(piece.length for piece in window.pieces)
    lengths = [piece.length for piece in window.pieces] + [size - filled]
    starts = np.cumsum([0, *lengths[:-1]])
    positions = np.arange(size) - np.repeat(starts, lengths)
    documents = np.repeat(np.arange(len(lengths)), lengths)
    labels = window.tokens[1:].copy()
    labels[max(filled - 1, 0) :] = IGNORED
    return Sample(
        window.tokens[:-1], labels, positions[:-1].astype(np.int32), documents[:-1].astype(np.int32)
    )


def sample_hash(window: Window) -> int:
    """63 bits that stand for what is in a window; 0 for one that is all padding.

    They cover which tokens of which documents there are, not where the window is in its batch: the
    sum over a step's windows is the same on every layout.
    """
    if not window.pieces:
        return 0
    data = np.array(window.pieces, dtype="<i8").tobytes()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") >> 1
