"""Bytes that reach the disk, and bytes that can be trusted.

Writing: a :class:`ChunkWriter` cuts a file into chunks of 16 MiB. While one thread hands a chunk to
the kernel another one digests it, so digests cost no extra time where the storage is the slower of
the two. A file counts only after it was synced.

Reading: a :class:`VerifiedFile` hands out bytes only of chunks whose digest it has just checked, in
its own memory. There is no moment between check and use in which somebody could swap the file.

The digest is BLAKE2b cut to 256 bits. Of the strong digests in hashlib it has the best worst case:
about 430 MB/s and thread on a server core without SHA instructions, where SHA-256 does 240 MB/s.
SHA instructions, where a core has them, should turn that round (not measured). CRC-like sums are
faster still and can be forged.

Every system call that changes something is spelled ``os.<call>`` here and in :mod:`.root`, so that
tests can count, interrupt and replay them.
"""

import hashlib
import os
import stat
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Final, NamedTuple, TypeVar

from pretrain_trainer.alive import Alive, unwatched
from pretrain_trainer.errors import LASTING

from .errors import DamagedError, UnreadableError

T = TypeVar("T")

CHUNK_BYTES: Final = 16 << 20

# Digests run in threads beside the copying; more than this finds no free memory bandwidth.
_THREADS = min(4, os.cpu_count() or 1)

_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class FileDigest(NamedTuple):
    """Length of a file in bytes and the hex digests of its chunks, in order."""

    bytes: int
    chunks: list[str]


def digest(data: bytes | bytearray | memoryview) -> str:
    """The digest used throughout: 64 hex digits of BLAKE2b-256."""
    return hashlib.blake2b(data, digest_size=32).hexdigest()


def unread(what: str, error: OSError) -> DamagedError:
    """The error for something that could not be read: whether it is to blame, or the storage."""
    kind = DamagedError if error.errno in LASTING else UnreadableError
    return kind(f"{what}: {error.strerror or error}")


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_durably(path: Path, data: bytes) -> None:
    """Put ``data`` into ``path`` so that a crash leaves the old content or the new, never a mix."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.unlink(missing_ok=True)  # of an earlier crash
    handle = os.open(temporary, _CREATE, 0o644)
    try:
        _write_all(handle, memoryview(data))
        os.fsync(handle)
    finally:
        os.close(handle)
    os.replace(temporary, path)
    sync_folder(path.parent)


class ChunkWriter:
    """A new file, written once from front to back, synced and digested when it is closed.

    It is the ``write``/``flush`` kind of object that torch.save accepts. ``failure`` is the error
    that the storage answered with, if it did.

    Args:
        path: of the file, which must not exist.
        chunk_bytes: how much is written, and digested, at once.
        alive: called for every chunk.

    Raises:
        OSError: the file exists, or the storage failed; then nothing about the file is certain.
    """

    def __init__(
        self, path: Path, chunk_bytes: int = CHUNK_BYTES, alive: Alive = unwatched
    ) -> None:
        self._handle = os.open(path, _CREATE, 0o644)
        self._buffer = bytearray(chunk_bytes)
        self._fill = 0
        self._alive = alive
        self._digests: list[str] = []
        self.failure: OSError | None = None
        self._beside = ThreadPoolExecutor(1, "digest")

    def __enter__(self) -> "ChunkWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._beside.shutdown()
        os.close(self._handle)

    def tell(self) -> int:
        """Bytes taken so far."""
        return len(self._digests) * len(self._buffer) + self._fill

    def write(self, data: bytes | memoryview) -> int:
        """Take all of ``data``."""
        rest = memoryview(data).cast("B")
        size = len(rest)
        while rest:
            part = rest[: len(self._buffer) - self._fill]
            self._buffer[self._fill : self._fill + len(part)] = part
            self._fill += len(part)
            rest = rest[len(part) :]
            if self._fill == len(self._buffer):
                self._emit()
        return size

    def flush(self) -> None:
        """Do nothing: torch.save calls this after every tensor, a chunk is written when full."""

    def finish(self) -> FileDigest:
        """Write what is left, wait until all is on the disk, and tell what should be there."""
        size = self.tell()
        if self._fill:
            self._emit()
        os.fsync(self._handle)
        return FileDigest(size, self._digests)

    def _emit(self) -> None:
        with memoryview(self._buffer)[: self._fill] as chunk:
            value = self._beside.submit(digest, chunk)
            try:
                _write_all(self._handle, chunk)
            except OSError as error:
                self.failure = error
                raise
            finally:  # the digest must not look at a buffer that is going away
                self._digests.append(value.result())
        self._fill = 0
        self._alive()


class VerifiedFile:
    """Random access to a file, one verified chunk at a time.

    Args:
        handle: an open file descriptor; it stays the caller's.
        name: for messages.
        expected: what the manifest says about the file. None trusts the file as it is: for
            checkpoints of other makers that have no manifest.
        chunk_bytes: size of all chunks but the last.
        alive: called for every chunk, in the thread that asks for it.

    Raises:
        DamagedError: the file's size, or a chunk that was touched, is not as expected.
    """

    def __init__(
        self,
        handle: int,
        name: str,
        expected: FileDigest | None,
        chunk_bytes: int,
        alive: Alive = unwatched,
    ) -> None:
        self._handle = handle
        self._alive = alive
        self._name = name
        self._digests = None if expected is None else expected.chunks
        self._chunk_bytes = chunk_bytes
        self._last: tuple[int, bytearray] = (-1, bytearray())
        self.bytes = os.fstat(handle).st_size
        if expected is not None and self.bytes != expected.bytes:
            raise DamagedError(f"{name} has {self.bytes} bytes instead of {expected.bytes}")

    def read(self, offset: int, length: int) -> bytes:
        """Bytes ``offset`` to ``offset + length``, all of them verified."""
        if offset < 0 or length < 0 or offset + length > self.bytes:
            raise DamagedError(f"{self._name} has no bytes {offset} to {offset + length}")
        first, last = offset // self._chunk_bytes, (offset + length - 1) // self._chunk_bytes

        def part(index: int) -> memoryview:
            chunk = self._chunk(index)
            if index == last:  # the next tensor in the file begins in the chunk this one ends in
                self._last = (index, chunk)
            start = index * self._chunk_bytes
            return memoryview(chunk)[max(offset - start, 0) : offset + length - start]

        return b"".join(_in_parallel(part, range(first, last + 1), self._alive))

    def verify(self, share: int = 0, of: int = 1) -> None:
        """Read and check every ``of``-th chunk, beginning with chunk ``share``."""
        chunks = -(-self.bytes // self._chunk_bytes)
        _in_parallel(self._check, range(share, chunks, of), self._alive)

    def forget_cached(self) -> None:
        """Ask the kernel to drop its copy, so that the next read really asks the storage."""
        os.posix_fadvise(self._handle, 0, 0, os.POSIX_FADV_DONTNEED)

    def _check(self, index: int) -> None:
        self._chunk(index)

    def _chunk(self, index: int) -> bytearray:
        known, chunk = self._last
        if known == index:
            return chunk
        start = index * self._chunk_bytes
        chunk = bytearray(min(self._chunk_bytes, self.bytes - start))
        self._fill(chunk, start)
        if self._digests is not None and digest(chunk) != self._digests[index]:
            end = start + len(chunk)
            raise DamagedError(f"{self._name} is damaged between bytes {start} and {end}")
        return chunk

    def _fill(self, chunk: bytearray, start: int) -> None:
        done = 0
        with memoryview(chunk) as view:
            while done < len(chunk):
                count = os.preadv(self._handle, [view[done:]], start + done)
                if count == 0:
                    raise DamagedError(f"{self._name} ends early, at byte {start + done}")
                done += count


class Folder:
    """An open folder. Files are opened relative to it, never through a symbolic link.

    ``alive`` is for whoever reads those files.

    Raises:
        DamagedError: there is no such folder or file, or it is not a plain one.
    """

    def __init__(self, path: Path, handle: int, alive: Alive) -> None:
        self.path = path
        self.alive = alive
        self._handle = handle

    @classmethod
    @contextmanager
    def open(cls, path: Path, alive: Alive = unwatched) -> Iterator["Folder"]:
        """Open ``path``, whose last part must not be a symbolic link."""
        try:
            handle = os.open(path, _READ | os.O_DIRECTORY)
        except OSError as error:
            raise unread(f"{path.name} can't be opened", error) from error
        try:
            yield cls(path, handle, alive)
        finally:
            os.close(handle)

    def has(self, name: str) -> bool:
        """Whether there is anything of that name."""
        try:
            os.stat(name, dir_fd=self._handle, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return True

    @contextmanager
    def file(self, name: str) -> Iterator[int]:
        """A descriptor of the plain file ``name`` for reading."""
        try:
            # O_NONBLOCK: a named pipe in place of a file must not block us.
            handle = os.open(name, _READ | os.O_NONBLOCK, dir_fd=self._handle)
        except FileNotFoundError as error:
            raise DamagedError(f"{name} is missing") from error
        except OSError as error:
            raise unread(f"{name} can't be opened", error) from error
        try:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise DamagedError(f"{name} is not a plain file")
            yield handle
        finally:
            os.close(handle)

    def small_file(self, name: str, limit: int) -> bytes:
        """Content of a file of at most ``limit`` bytes."""
        with self.file(name) as handle:
            size = os.fstat(handle).st_size
            if size > limit:
                raise DamagedError(f"{name} is larger than any real one ({size} bytes)")
            return VerifiedFile(handle, name, None, CHUNK_BYTES).read(0, size)


def _write_all(handle: int, data: memoryview) -> None:
    while data:
        data = data[os.write(handle, data) :]


def _in_parallel(work: Callable[[int], T], indices: range, alive: Alive) -> list[T]:
    """``work`` of all indices; reading and digesting leave the interpreter lock alone."""
    if len(indices) <= 1:
        return [_living(work(index), alive) for index in indices]
    with ThreadPoolExecutor(min(_THREADS, len(indices)), "verify") as pool:
        return [_living(result, alive) for result in pool.map(work, indices)]


def _living(result: T, alive: Alive) -> T:
    """A result, whose being there is a sign of life."""
    alive()
    return result
