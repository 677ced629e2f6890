"""Reading one checkpoint into the tensors of a state, verified byte by byte.

Rank 0 reads the manifest once and tells the others its text, so all ranks check against the same
promise. Each rank then verifies the table of contents and the chunks that its own tensors need, in
the memory it copies them from.
"""

import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadPlan

from . import manifest, metadata, planning, tensors
from .errors import CheckpointConfigError, DamagedError
from .files import CHUNK_BYTES, FileDigest, Folder, VerifiedFile, unread
from .manifest import Manifest
from .peers import Peers

logger = logging.getLogger(__name__)

_DATA_FILE = re.compile(r"\A__[0-9]{1,7}_[0-9]{1,7}\.distcp\Z")


def promise(peers: Peers, path: Path) -> Manifest:
    """What the checkpoint at ``path`` says about itself; all files are there, with their lengths.

    Raises:
        DamagedError: on every rank, if rank 0 finds it so.
    """

    def look() -> str:
        with reading(), Folder.open(path, peers.alive) as folder:
            found = manifest.read(folder)
            manifest.check_sizes(folder, found)
            return manifest.encode(found).decode()

    return manifest.decode(peers.first(look).encode())


def verify(peers: Peers, path: Path, promised: Manifest) -> None:
    """Check all chunks, each rank a share of them.

    Raises:
        DamagedError: on every rank, if any rank finds it so.
    """

    def check() -> None:
        with reading(), Folder.open(path, peers.alive) as folder:
            manifest.verify(folder, promised, peers.rank, peers.size)

    peers.everywhere(check)


def fill(peers: Peers, path: Path, promised: Manifest, state: dict[str, Any]) -> None:
    """Fill the state's tensors in place.

    Raises:
        DamagedError: on every rank, if any rank finds it so; tensors may have been filled in part.
        CheckpointConfigError: the checkpoint has no such tensors; nothing was filled.
    """
    expected = {entry.name: entry.expected for entry in promised.files}
    _fill(peers, path, expected, promised.chunk_bytes, state)


def fill_foreign(peers: Peers, path: Path, state: dict[str, Any], model: str) -> None:
    """Fill the state from a step folder of another run, or of another trainer.

    Other trainers write no manifest. Nobody vouches for the bytes then, but reading them runs no
    code of theirs either. Where the folder holds bare weights, as a last save of weights only does,
    they are looked for without the section's name.

    Args:
        peers: the ranks that load together.
        path: the step folder.
        state: nested dicts of tensors.
        model: the section of the state that holds the weights.

    Raises:
        DamagedError: it can't be read, or it doesn't match its manifest.
        CheckpointConfigError: it has no such tensors.
    """

    def look() -> tuple[str | None, list[str], bool]:
        with reading(), Folder.open(path, peers.alive) as folder:
            signed = folder.has(manifest.NAME)
            known = manifest.encode(manifest.read(folder)).decode() if signed else None
            names = [name for name in os.listdir(path) if _DATA_FILE.match(name)]
            table = open_table(folder, dict.fromkeys([*names, manifest.METADATA]), CHUNK_BYTES)
            return known, names, model in planning.sections(table)

    text, names, sectioned = peers.first(look)
    content = state if sectioned else state[model]
    if text is not None:
        fill(peers, path, manifest.decode(text.encode()), content)
        return
    if peers.rank == 0:
        logger.warning("%s has no %s: its bytes can't be verified", path, manifest.NAME)
    _fill(peers, path, dict.fromkeys([*names, manifest.METADATA]), CHUNK_BYTES, content)


@contextmanager
def reading() -> Iterator[None]:
    """Pass over what storage doesn't give out: there may be an older one on a good spot."""
    try:
        yield
    except OSError as error:
        raise unread("it can't be read", error) from error


def open_table(
    folder: Folder, expected: Mapping[str, FileDigest | None], chunk_bytes: int
) -> Metadata:
    """The verified table of contents of an open step folder.

    Raises:
        DamagedError: it, or the length of a file, is not as expected.
    """
    sizes = {}
    for name, known in expected.items():
        with folder.file(name) as handle:
            sizes[name] = VerifiedFile(handle, name, known, chunk_bytes).bytes
    if sizes[manifest.METADATA] > metadata.SIZE_LIMIT:
        raise DamagedError(f"{manifest.METADATA} is larger than any real one")
    with folder.file(manifest.METADATA) as handle:
        known = expected[manifest.METADATA]
        file = VerifiedFile(handle, manifest.METADATA, known, chunk_bytes)
        return metadata.load(file.read(0, file.bytes), sizes)


def _fill(
    peers: Peers,
    path: Path,
    expected: Mapping[str, FileDigest | None],
    chunk_bytes: int,
    state: dict[str, Any],
) -> None:
    def plan() -> tuple[DefaultLoadPlanner, LoadPlan, Metadata]:
        with reading(), Folder.open(path, peers.alive) as folder:
            table = open_table(folder, expected, chunk_bytes)
        try:
            return (*planning.request(state, table), table)
        except CheckpointConfigError as error:
            raise CheckpointConfigError(
                f"{path} was saved by another model: {error}; restore the model's settings, or "
                "name the section in checkpoint.exclude_from_loading"
            ) from error

    def read() -> None:
        with reading(), Folder.open(path, peers.alive) as folder:
            tensors.read(folder, expected, chunk_bytes, table, steps, planner)

    # All plans before any read: a checkpoint that doesn't fit must not fill half of the tensors.
    planner, steps, table = peers.everywhere(plan)
    peers.everywhere(read)
