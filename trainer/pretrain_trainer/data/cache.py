"""Arrays that take long to compute, computed once per machine.

A rank that starts again after a fault must not read all data again, and the ranks of one machine
should not each read it. So an array is kept in a file in the folder for temporary files, the first
process that asks computes it while the others wait for its lock, and all map the same pages.

The cache is only ever a short cut. Where no file can be written, the array is computed in memory;
where a file is damaged, it is computed again.
"""

import fcntl
import hashlib
import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

logger = logging.getLogger(__name__)


def cached(key: str, compute: Callable[[], NDArray[np.int64]]) -> NDArray[np.int64]:
    """The array ``compute`` gives, int64 of one dimension; computed before if ``key`` is known."""
    name = hashlib.blake2b(key.encode(errors="surrogateescape"), digest_size=16).hexdigest()
    array = None
    try:
        path = _folder() / f"{name}.npy"
        # The lock is left behind: removing it would let two processes hold "the" lock at once.
        with path.with_suffix(".lock").open("wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if (array := _load(path)) is None:
                array = compute()
                _store(path, array)
    except OSError as error:
        logger.warning("index of the data set not cached: %s", error)
    return compute() if array is None else array


def _folder() -> Path:
    """A folder only this user can write: what others could put there would be trusted."""
    folder = Path(tempfile.gettempdir()) / f"pretrain-index-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if status.st_uid != os.getuid() or status.st_mode & 0o077 or not folder.is_dir():
        raise PermissionError(f"{folder} can be written by other users")
    return folder


def _load(path: Path) -> NDArray[np.int64] | None:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (FileNotFoundError, ValueError, EOFError):
        return None
    return array if array.dtype == np.int64 and array.ndim == 1 else None


def _store(path: Path, array: NDArray[np.int64]) -> None:
    """Write under another name first, so that a reader never sees half a file."""
    unfinished = path.with_suffix(".tmp")
    with unfinished.open("wb") as stream:
        np.save(stream, array)
    unfinished.replace(path)
