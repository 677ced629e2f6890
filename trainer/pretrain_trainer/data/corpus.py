"""Documents in local files, each within reach by its number.

One pass over the files notes where every document starts: eight bytes a document, kept in a cache
file and mapped into memory, so that the ranks of a machine share one copy and a restarted rank
doesn't read the data again. Documents themselves are read when their turn comes.

What is a document?

- In JSON lines, each line that isn't empty.
- In plain text, a file; one longer than 16 KiB is cut, at the first blank line after that, into
  several. So a folder of articles keeps its articles, and one book is enough to train on: its
  pieces can be shuffled and shared out. Whoever wants other borders writes JSON lines.
"""

import glob
import hashlib
import os
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pretrain_trainer.alive import Alive, unwatched
from pretrain_trainer.data.cache import cached
from pretrain_trainer.data.errors import DataError, unread

PIECE = 16 * 1024  # bytes of a text file that make a document
BLOCK = 16 * 2**20  # bytes scanned at a time
OPEN_FILES = 128  # kept open for reading

Starts = NDArray[np.int64]
Bytes = NDArray[np.uint8]
Splitter = Callable[[Bytes, Alive], Starts]

_BLANK_LINES = re.compile(rb"\n(?:[ \t\r]*\n)+")
_NEWLINE, _RETURN = 10, 13


@dataclass(frozen=True, slots=True)
class Kind:
    """A format: the endings of its files, and the rule that finds documents in one."""

    name: str
    endings: tuple[str, ...]
    split: Splitter


class Corpus:
    """Random access to the documents of some files, in the order of the files' names.

    ``digest`` is a hash of the files' names and content: it tells whether two runs saw the same
    data, wherever the files lie.
    """

    def __init__(self, path: str, kind: Kind, alive: Alive = unwatched) -> None:
        """Find and index the files of ``kind`` at ``path``: a file, a folder, or a glob pattern.

        ``alive`` is called while they are read.

        Raises DataError if there are none, one can't be read, or they hold no document.
        """
        found = find_files(path, kind.endings)
        self.files = [file for _, file in found]
        status = [_status(file) for file in self.files]
        self._sizes = [known.st_size for known in status]
        # One array, so that one file can hold it: digest, documents in each file, starts.
        words = cached(_key(found, status, kind), lambda: _index(found, kind, alive))
        self.digest = words[:2].tobytes().hex()
        self._firsts = np.cumsum([0, *words[2 : 2 + len(found)]])
        self._starts = words[2 + len(found) :]
        self._open: OrderedDict[int, int] = OrderedDict()
        if not len(self):
            raise DataError(f"{path}: no document in {_count(self.files)}; add some text")

    def __len__(self) -> int:
        return int(self._firsts[-1])

    def read(self, document: int) -> bytes:
        """The bytes of a document; raises DataError if its file has become shorter since."""
        file, start, end = self._span(document)
        descriptor = self._descriptor(file)
        data = b""
        with _readable(self.files[file]):  # which may give less than is asked for
            while more := os.pread(descriptor, end - start - len(data), start + len(data)):
                data += more
        if len(data) < end - start:
            raise DataError(
                f"{self.files[file]}: has {os.fstat(descriptor).st_size} bytes, but had "
                f"{self._sizes[file]} when training started; restore the file"
            )
        return data

    def line(self, document: int) -> str:
        """Where a document starts, as ``file:line``, for messages."""
        file, start, _ = self._span(document)
        with self.files[file].open("rb") as stream:
            newlines = sum(block.count(b"\n") for block in _blocks(stream.read, start))
        return f"{self.files[file]}:{newlines + 1}"

    def _span(self, document: int) -> tuple[int, int, int]:
        """File, first byte and end of a document."""
        file = int(np.searchsorted(self._firsts, document, side="right")) - 1
        following = document + 1
        last = following == self._firsts[file + 1]
        end = self._sizes[file] if last else int(self._starts[following])
        return file, int(self._starts[document]), end

    def _descriptor(self, file: int) -> int:
        """An open descriptor; the one unused for longest is closed when there are too many."""
        if file not in self._open:
            if len(self._open) == OPEN_FILES:
                os.close(self._open.popitem(last=False)[1])
            self._open[file] = _open(self.files[file])
        self._open.move_to_end(file)
        return self._open[file]

    def close(self) -> None:
        """Close all files."""
        while self._open:
            os.close(self._open.popitem()[1])


def find_files(path: str, endings: tuple[str, ...]) -> list[tuple[str, Path]]:
    """Files at ``path`` with their names relative to it, sorted by name.

    A folder is searched to any depth for files with one of the ``endings``, hidden ones left out;
    a file or a glob pattern names its files outright. Raises DataError if nothing is found.
    """
    root = Path(path)
    if root.is_file():
        return [(root.name, root)]
    if root.is_dir():
        files = [file for file in root.rglob("*") if file.suffix in endings and file.is_file()]
    elif glob.has_magic(path):
        files = [Path(match) for match in glob.glob(path, recursive=True) if os.path.isfile(match)]
        root = Path(os.path.commonpath([file.parent for file in files])) if files else root
    else:
        raise DataError(f"training.dataset_path: {path} doesn't exist; name a file or a folder")
    named = [(file.relative_to(root).as_posix(), file) for file in files]
    visible = sorted(
        pair for pair in named if not any(p.startswith(".") for p in Path(pair[0]).parts)
    )
    if not visible:
        wanted = " or ".join(f"*{ending}" for ending in endings)
        raise DataError(
            f"training.dataset_path: no file {wanted} in {path}; name one that has some"
        )
    return visible


def split_lines(data: Bytes, alive: Alive = unwatched) -> Starts:
    """Where each line starts that isn't empty."""
    found = [_filled_lines(data, np.zeros(min(1, len(data)), np.int64))]
    for at in range(0, len(data), BLOCK):
        starts = np.flatnonzero(data[at : at + BLOCK] == _NEWLINE) + at + 1
        found.append(_filled_lines(data, starts[starts < len(data)]))
        alive()
    return np.concatenate(found)


def _filled_lines(data: Bytes, starts: Starts) -> Starts:
    """Those of the lines at ``starts`` that hold more than the end of a line."""
    first = data[starts]
    last = starts + 1 == len(data)
    second = np.where(last, _NEWLINE, data[np.where(last, starts, starts + 1)])
    return starts[(first != _NEWLINE) & ((first != _RETURN) | (second != _NEWLINE))]


def split_text(data: Bytes, alive: Alive = unwatched) -> Starts:
    """Where each piece starts: at 0, and where :func:`_next_piece` says."""
    view, starts, start, told = data.data, [], 0, 0
    while start < len(data):
        starts.append(start)
        start = _next_piece(view, start)
        if start - told >= BLOCK:
            alive()
            told = start
    return np.array(starts, np.int64)


def _next_piece(view: memoryview, start: int) -> int:
    """After a blank line if there is one in reach, else after a line, else between characters."""
    least, most = start + PIECE, min(start + 2 * PIECE, len(view))
    window = bytes(view[least:most])
    if blank := _BLANK_LINES.search(window):
        return least + blank.end()
    if most == len(view):
        return most
    if newline := window.find(b"\n") + 1:
        return least + newline
    # Bytes 0b10xxxxxx continue a UTF-8 character, which has at most four bytes.
    return most - next((back for back in range(4) if view[most - back] & 0xC0 != 0x80), 0)


TEXT = Kind("text", (".txt",), split_text)
JSONL = Kind("jsonl", (".jsonl", ".ndjson"), split_lines)


def _key(files: list[tuple[str, Path]], status: list[os.stat_result], kind: Kind) -> str:
    """Changes whenever the index might: with names, places, sizes and times of the files."""
    lines = [
        f"{name} {path.absolute()} {known.st_ino} {known.st_size} {known.st_mtime_ns}"
        for (name, path), known in zip(files, status, strict=True)
    ]
    return "\n".join([f"index 1 {kind.name}", *lines])


def _index(files: list[tuple[str, Path]], kind: Kind, alive: Alive) -> Starts:
    """Two words of digest, then documents in each file, then where each document starts."""
    digest = hashlib.blake2b(digest_size=16)
    starts = []
    for name, path in files:
        data = _map(path)
        digest.update(f"{len(data)} {name}\n".encode(errors="surrogateescape"))
        for at in range(0, len(data), BLOCK):
            digest.update(data[at : at + BLOCK].data)
            alive()
        starts.append(kind.split(data, alive))
    counts = np.array([len(found) for found in starts], np.int64)
    return np.concatenate([np.frombuffer(digest.digest(), np.int64), counts, *starts])


def _map(path: Path) -> Bytes:
    if _status(path).st_size == 0:  # can't be mapped
        return np.zeros(0, np.uint8)
    with _readable(path):
        return np.memmap(path, dtype=np.uint8, mode="r")


def _status(path: Path) -> os.stat_result:
    with _readable(path):
        return path.stat()


def _open(path: Path) -> int:
    with _readable(path):
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise unread(str(path), error, "mend the file") from error


def _blocks(read: Callable[[int], bytes], size: int) -> Iterator[bytes]:
    while size > 0 and (block := read(min(size, BLOCK))):
        size -= len(block)
        yield block


def _count(files: list[Path]) -> str:
    return "1 file" if len(files) == 1 else f"{len(files)} files"
