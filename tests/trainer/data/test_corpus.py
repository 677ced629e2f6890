"""Files are cut into documents without losing a byte, found again by number, and checked."""

import errno
import os
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain_trainer.alive import Alive
from pretrain_trainer.data import cache, corpus
from pretrain_trainer.data.corpus import JSONL, PIECE, TEXT, Corpus, Kind, split_lines, split_text
from pretrain_trainer.data.errors import DataError, DataUnavailableError


def array(data: bytes) -> np.ndarray:
    return np.frombuffer(data, np.uint8)


def pieces(data: bytes) -> list[bytes]:
    starts = [*split_text(array(data)).tolist(), len(data)]
    return [data[a:b] for a, b in pairwise(starts)]


@given(lines=st.lists(st.sampled_from([b"", b"\r", b"{}", b'{"a": 1}', b"xyz\r"]), max_size=30))
def test_every_line_that_is_not_empty_starts_a_document(lines: list[bytes]) -> None:
    data = b"\n".join(lines)
    starts = split_lines(array(data)).tolist() if data else []
    found = [data[a:].split(b"\n")[0].strip() for a in starts]
    assert found == [line.strip() for line in lines if line.strip()]


def test_lines_are_found_across_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    data = b"".join(b"line %d\n" % n for n in range(100))
    expected = split_lines(array(data)).tolist()
    monkeypatch.setattr(corpus, "BLOCK", 7)
    assert split_lines(array(data)).tolist() == expected
    assert len(expected) == 100


def test_a_short_text_file_is_one_document() -> None:
    text = b"one\n\ntwo\n\n\nthree\n" * 100
    assert pieces(text) == [text]


def test_a_long_text_file_is_cut_at_the_first_blank_line_after_the_size() -> None:
    paragraph = b"word " * 200 + b"\n \r\n\n"
    found = pieces(paragraph * 60)
    assert b"".join(found) == paragraph * 60
    assert len(found) > 2
    assert all(piece.endswith(b"\n \r\n\n") for piece in found)
    assert all(PIECE < len(piece) <= PIECE + len(paragraph) for piece in found[:-1])


def test_text_without_blank_lines_is_cut_after_a_line() -> None:
    found = pieces(b"some line\n" * 10_000)
    assert all(piece.endswith(b"\n") for piece in found)
    assert all(PIECE <= len(piece) <= PIECE + 10 for piece in found[:-1])


@pytest.mark.parametrize("character", ["x", "é", "中", "😀"])
def test_text_without_lines_is_cut_between_characters(character: str) -> None:
    text = "a" + character * 50_000
    found = pieces(text.encode())
    assert len(found) > 1
    assert "".join(piece.decode() for piece in found) == text


def test_bytes_that_are_no_text_are_cut_as_well() -> None:
    assert b"".join(pieces(b"\x80" * 100_000)) == b"\x80" * 100_000


@given(
    st.lists(st.sampled_from([b"\n", b"\n\n", b"a" * 9000, "é".encode() * 5000]), max_size=25).map(
        b"".join
    )
)
def test_no_byte_is_lost_and_no_piece_too_long(data: bytes) -> None:
    found = pieces(data)
    assert b"".join(found) == data
    assert all(0 < len(piece) <= 2 * PIECE + len(data) * (b"\n\n" in piece) for piece in found)
    assert all(piece.decode() for piece in found)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three files of JSON lines, some of them in the way."""
    root = tmp_path / "data"
    (root / "deep" / "er").mkdir(parents=True)
    (root / ".hidden").mkdir()
    (root / "b.jsonl").write_bytes(b"b1\nb2\n\nb3")
    (root / "deep" / "er" / "a.jsonl").write_bytes(b"\n\na1\r\n")
    (root / "empty.jsonl").write_bytes(b"")
    (root / "notes.md").write_bytes(b"no data\n")
    (root / ".hidden" / "c.jsonl").write_bytes(b"hidden\n")
    return root


def test_every_block_read_for_the_index_is_a_sign_of_life(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "BLOCK", 4)
    signs: list[str] = []
    Corpus(str(folder), JSONL, lambda: signs.append("alive"))
    # Of the 9 bytes of b.jsonl and the 6 of a.jsonl; they are read for the digest, and to be split.
    assert len(signs) == 2 * (3 + 2)


def test_a_long_text_is_cut_with_signs_of_life(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "BLOCK", PIECE)
    signs: list[str] = []
    pieces = split_text(array(b"x" * 10 * PIECE), lambda: signs.append("alive"))
    assert len(signs) == len(pieces) > 4


def test_documents_are_numbered_by_file_name_and_place(folder: Path) -> None:
    found = Corpus(str(folder), JSONL)
    assert [found.read(n).strip() for n in range(len(found))] == [b"b1", b"b2", b"b3", b"a1"]
    assert [found.line(n) for n in range(len(found))] == [
        f"{folder}/b.jsonl:1",
        f"{folder}/b.jsonl:2",
        f"{folder}/b.jsonl:4",
        f"{folder}/deep/er/a.jsonl:3",
    ]
    found.close()


@pytest.mark.parametrize(
    ("pattern", "documents"), [("b.jsonl", 3), ("**/*.jsonl", 4), ("deep/*/a.*", 1), ("", 4)]
)
def test_a_path_is_a_file_a_folder_or_a_pattern(folder: Path, pattern: str, documents: int) -> None:
    assert len(Corpus(str(folder / pattern), JSONL)) == documents


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("absent", r"training\.dataset_path: \S+/absent doesn't exist; name a file or a folder"),
        ("deep/*.jsonl", r"training\.dataset_path: no file \*\.jsonl or \*\.ndjson in \S+"),
        ("empty.jsonl", r"empty\.jsonl: no document in 1 file; add some text"),
        ("notes.d", r"doesn't exist"),
    ],
)
def test_a_path_without_documents_is_refused(folder: Path, path: str, sentence: str) -> None:
    with pytest.raises(DataError, match=sentence):
        Corpus(str(folder / path), JSONL)


def test_a_folder_without_text_is_refused(folder: Path) -> None:
    with pytest.raises(DataError, match=r"no file \*\.txt in"):
        Corpus(str(folder), TEXT)


def test_a_file_that_cannot_be_read_is_named(folder: Path) -> None:
    found = Corpus(str(folder), JSONL)
    (folder / "b.jsonl").unlink()
    with pytest.raises(DataError, match=r"b\.jsonl: can't be read \(No such file or directory\)"):
        found.read(0)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EMFILE])
def test_storage_that_fails_for_a_moment_needs_no_person(
    folder: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def fail(*_: object) -> bytes:
        raise OSError(number, os.strerror(number))

    found = Corpus(str(folder), JSONL)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pread", fail)
        with pytest.raises(DataUnavailableError, match=r"b\.jsonl: can't be read now \("):
            found.read(0)
    found.close()
    monkeypatch.setattr(os, "open", fail)
    with pytest.raises(DataUnavailableError, match=r"b\.jsonl: can't be read now \("):
        found.read(0)


def test_a_read_that_brings_a_part_goes_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda file, size, at: pread(file, min(size, 1), at))
    assert Corpus(str(folder), JSONL).read(0) == b"b1\n"


def test_a_file_that_became_shorter_is_named_with_the_byte(folder: Path) -> None:
    found = Corpus(str(folder), JSONL)
    os.truncate(folder / "b.jsonl", 4)
    assert found.read(0) == b"b1\n"
    with pytest.raises(DataError, match=r"b\.jsonl: has 4 bytes, but had 9 when training"):
        found.read(2)


def test_the_digest_knows_names_and_content_but_not_the_place(folder: Path) -> None:
    digest = Corpus(str(folder), JSONL).digest
    moved = folder.rename(folder.with_name("moved"))
    assert Corpus(str(moved), JSONL).digest == digest
    (moved / "b.jsonl").write_bytes(b"b1\nb2\n\nbX")
    changed = Corpus(str(moved), JSONL).digest
    (moved / "b.jsonl").rename(moved / "z.jsonl")
    assert len({digest, changed, Corpus(str(moved), JSONL).digest}) == 3


def test_only_some_files_are_open_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "OPEN_FILES", 3)
    for n in range(10):
        (tmp_path / f"{n}.txt").write_text(f"text {n}")
    found = Corpus(str(tmp_path), TEXT)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        assert [found.read(n) for n in range(10)] == [b"text %d" % n for n in range(10)]
    assert len(os.listdir("/proc/self/fd")) == before + 3
    found.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_index_is_made_once_and_again_when_a_file_changes(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    index = corpus._index

    def counted(files: list[tuple[str, Path]], kind: Kind, alive: Alive) -> np.ndarray:
        made.append(len(files))
        return index(files, kind, alive)

    monkeypatch.setattr(corpus, "_index", counted)
    first, again = Corpus(str(folder), JSONL), Corpus(str(folder), JSONL)
    assert made == [3]
    assert (again.digest, len(again)) == (first.digest, len(first))
    (folder / "b.jsonl").write_bytes(b"other\n")
    assert len(Corpus(str(folder), JSONL)) == 2
    (folder / "b.jsonl").rename(folder / "c.jsonl")
    assert Corpus(str(folder), JSONL).read(0) == b"other\n"
    assert made == [3, 3, 3]


def numbers() -> np.ndarray:
    return np.arange(5, dtype=np.int64)


def test_a_damaged_cache_is_made_again(own_cache: Path) -> None:
    assert cache.cached("key", numbers).tolist() == [0, 1, 2, 3, 4]
    (file,) = own_cache.rglob("*.npy")
    for damage in [b"", b"nonsense", file.read_bytes()[:-3]]:
        file.write_bytes(damage)
        assert cache.cached("key", numbers).tolist() == [0, 1, 2, 3, 4]
        assert np.load(file).tolist() == [0, 1, 2, 3, 4]


def test_without_a_place_for_the_cache_the_array_is_made_in_memory(
    own_cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (own_cache / f"pretrain-index-{os.getuid()}").write_text("in the way")
    assert cache.cached("key", numbers).tolist() == [0, 1, 2, 3, 4]
    assert "not cached" in caplog.text


def test_a_cache_that_others_can_write_is_not_trusted(
    own_cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = own_cache / f"pretrain-index-{os.getuid()}"
    folder.mkdir()
    folder.chmod(0o777)
    assert cache.cached("key", numbers).tolist() == [0, 1, 2, 3, 4]
    assert "can be written by other users" in caplog.text
    assert not list(folder.iterdir())


def test_processes_that_ask_together_make_the_array_once(own_cache: Path) -> None:
    """Threads stand in for processes: each call takes the lock through a file of its own."""
    made = []

    def slow() -> np.ndarray:
        made.append(1)
        time.sleep(0.1)  # long enough for the others to reach the lock
        return numbers()

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: cache.cached("key", slow).tolist(), range(4)))
    assert found == [[0, 1, 2, 3, 4]] * 4
    assert len(made) == 1
