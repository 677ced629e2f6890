"""Windows use every token once and in order, and a cursor goes on exactly where it was taken."""

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain_trainer.data.errors import DataError
from pretrain_trainer.data.packing import (
    IGNORED,
    Cursor,
    Packer,
    Piece,
    Tokens,
    Window,
    sample,
    sample_hash,
)
from pretrain_trainer.data.sources import Document

EOS = 0


class Letters:
    """One token a letter, its code point, and EOS at the end."""

    eos_id = EOS

    def encode_batch(self, texts: list[str]) -> list[Tokens]:
        return [np.array([*map(ord, text), EOS], np.int64) for text in texts]


def stream(texts: list[str], first: int = 0) -> Iterator[Document]:
    return (Document(i, 1000 + i, text) for i, text in enumerate(texts) if i >= first)


def packer(texts: list[str], seq_len: int, cursor: Cursor | None = None) -> Packer:
    cursor = cursor or Cursor()
    return Packer(stream(texts, cursor.ordinal), Letters(), seq_len, cursor)


def row(texts: list[str]) -> list[int]:
    return [token for tokens in Letters().encode_batch(texts) for token in tokens.tolist()]


def named(texts: list[str], piece: Piece) -> list[int]:
    """The tokens a piece says it is made of."""
    return row([texts[piece.identity - 1000]])[piece.offset : piece.offset + piece.length]


documents = st.lists(st.text("abc", max_size=40), min_size=1, max_size=60)
lengths = st.integers(1, 50)


@given(texts=documents, seq_len=lengths)
def test_windows_are_the_row_of_tokens_cut_without_overlap(texts: list[str], seq_len: int) -> None:
    packing = packer(texts, seq_len)
    tokens: list[int] = []
    while not packing.ended():
        window = packing.next_window()
        used = sum(piece.length for piece in window.pieces)
        assert used == seq_len + 1 or packing.ended()
        assert window.tokens.shape == (seq_len + 1,)
        assert (window.tokens[used:] == EOS).all()
        assert window.tokens[:used].tolist() == [t for p in window.pieces for t in named(texts, p)]
        tokens += window.tokens[:used].tolist()
    assert tokens == row(texts)
    assert packing.cursor == Cursor(len(texts))


@given(texts=documents, seq_len=lengths)
def test_any_cursor_goes_on_exactly(texts: list[str], seq_len: int) -> None:
    whole = packer(texts, seq_len)
    cursors, windows = [whole.cursor], []
    while not whole.ended():
        windows.append(whole.next_window())
        cursors.append(whole.cursor)
    for step, cursor in enumerate(cursors):
        resumed = packer(texts, seq_len, cursor)
        for expected, after in zip(windows[step:], cursors[step + 1 :], strict=True):
            window = resumed.next_window()
            assert window.tokens.tolist() == expected.tokens.tolist()
            assert window.pieces == expected.pieces
            assert resumed.cursor == after
        assert resumed.ended()


def test_a_window_after_the_end_is_all_padding() -> None:
    packing = packer(["ab"], 8)
    packing.next_window()
    assert packing.ended()
    padding = packing.next_window()
    assert padding.pieces == ()
    assert (sample(padding).labels == IGNORED).all()
    assert sample_hash(padding) == 0


def test_labels_positions_and_documents() -> None:
    window = packer(["ab", "c", "de"], 6).next_window()
    found = sample(window)
    a, b, c, d, e = map(ord, "abcde")
    assert found.tokens.tolist() == [a, b, EOS, c, EOS, d]
    assert found.labels.tolist() == [b, EOS, c, EOS, d, e]
    assert found.positions.tolist() == [0, 1, 2, 0, 1, 0]
    assert found.document_ids.tolist() == [0, 0, 0, 1, 1, 2]
    assert [array.dtype for array in found] == [np.int64, np.int64, np.int32, np.int32]


def test_padding_is_a_document_of_its_own_without_labels() -> None:
    found = sample(packer(["ab"], 6).next_window())
    a, b = map(ord, "ab")
    assert found.tokens.tolist() == [a, b, EOS, EOS, EOS, EOS]
    assert found.labels.tolist() == [b, EOS, *[IGNORED] * 4]
    assert found.positions.tolist() == [0, 1, 2, 0, 1, 2]
    assert found.document_ids.tolist() == [0, 0, 0, 1, 1, 1]


@given(texts=documents, seq_len=lengths)
def test_positions_restart_with_each_document_and_fit_the_window(
    texts: list[str], seq_len: int
) -> None:
    packing = packer(texts, seq_len)
    while not packing.ended():
        found = sample(packing.next_window())
        assert found.positions[0] == 0
        assert found.positions.max() < seq_len
        same = np.diff(found.document_ids) == 0
        assert (np.diff(found.positions)[same] == 1).all()
        assert (found.positions[1:][~same] == 0).all()
        assert (np.diff(found.document_ids) >= 0).all()


def window_of(*pieces: Piece) -> Window:
    return Window(np.zeros(9, np.int64), pieces)


def test_the_hash_tells_documents_offsets_and_lengths_apart() -> None:
    windows = [
        window_of(Piece(1, 0, 9)),
        window_of(Piece(2, 0, 9)),
        window_of(Piece(1, 9, 9)),
        window_of(Piece(1, 0, 4), Piece(2, 0, 5)),
        window_of(Piece(1, 0, 5), Piece(2, 0, 4)),
        window_of(Piece(2, 0, 4), Piece(1, 0, 5)),
    ]
    hashes = [sample_hash(window) for window in windows]
    assert len(set(hashes)) == len(windows)
    assert all(0 <= value < 2**63 for value in hashes)


def test_the_hash_never_changes_between_releases() -> None:
    assert sample_hash(window_of(Piece(3, 4, 5))) == 5539832205564120243


def test_a_cursor_behind_the_end_of_its_document_is_refused() -> None:
    with pytest.raises(DataError, match=r"document 0 .* has 3 tokens, .* stopped after 7"):
        packer(["ab"], 4, Cursor(0, 7)).next_window()
