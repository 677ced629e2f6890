"""Tensors to and from DCP's ``.distcp`` files: each part is one ``torch.save`` archive in a row.

Before torch.load sees a part, its bytes were verified and it is known to be a plain, uncompressed
archive no larger than itself (no legacy pickle format, no zip bomb); and torch.load runs with
``weights_only``.
"""

import io
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem, WriteItem

from pretrain_trainer.alive import Alive, unwatched

from .errors import CheckpointConfigError, DamagedError
from .files import ChunkWriter, FileDigest, Folder, VerifiedFile


def write(
    path: Path,
    items: Sequence[WriteItem],
    planner: DefaultSavePlanner,
    chunk_bytes: int,
    alive: Alive = unwatched,
) -> tuple[list[tuple[int, int]], FileDigest]:
    """Write the items one after another into a new file, and sync it.

    Returns:
        (offset, length) of every item in bytes, and the file's digest.

    Raises:
        OSError: the storage failed.
    """
    places = []
    with ChunkWriter(path, chunk_bytes, alive) as file:
        for item in items:
            offset = file.tell()
            _save(planner, item, file)
            places.append((offset, file.tell() - offset))
        return places, file.finish()


def read(
    folder: Folder,
    expected: Mapping[str, FileDigest | None],
    chunk_bytes: int,
    table: Metadata,
    plan: LoadPlan,
    planner: DefaultLoadPlanner,
) -> None:
    """Carry out a load plan: copy what it asks for into the planner's tensors.

    Args:
        folder: the open step folder.
        expected: digests by file name; None for files that nobody vouches for.
        chunk_bytes: size of the digests' chunks.
        table: the checked table of contents.
        plan: what to read.
        planner: knows the tensors to fill.

    Raises:
        DamagedError: bytes differ from their digest, or aren't the tensor that the table promises.
    """
    wanted: dict[str, list[tuple[_StorageInfo, ReadItem]]] = {}
    for item in plan.items:
        where = table.storage_data[item.storage_index]
        wanted.setdefault(where.relative_path, []).append((where, item))
    for name, items in wanted.items():
        items.sort(key=lambda pair: pair[0].offset)  # then every chunk is read once
        with folder.file(name) as handle:
            file = VerifiedFile(handle, name, expected[name], chunk_bytes, folder.alive)
            for where, item in items:
                _copy(_load(file, where, item), item, planner)


def _save(planner: DefaultSavePlanner, item: WriteItem, file: ChunkWriter) -> None:
    data: Any = planner.resolve_data(item)
    tensor = data.detach().cpu()
    if tensor.untyped_storage().size() != tensor.nbytes:
        tensor = tensor.clone()  # torch.save would write the whole storage that this is a part of
    try:
        torch.save(tensor, cast(IO[bytes], file))  # of IO, torch.save needs write and flush
    except RuntimeError as error:
        if file.failure is not None:  # torch hides it behind a complaint about positions
            raise file.failure from error
        raise


def _load(file: VerifiedFile, where: _StorageInfo, item: ReadItem) -> torch.Tensor:
    name = item.storage_index.fqn
    if item.type != LoadItemType.TENSOR or where.transform_descriptors:
        raise CheckpointConfigError(f"{name} is not a plain tensor")
    data = io.BytesIO(file.read(where.offset, where.length))
    _require_plain_archive(data, name)
    try:
        tensor = torch.load(data, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds; all mean: not what we wrote
        raise DamagedError(f"{name} can't be read: {type(error).__name__}: {error}") from error
    if not isinstance(tensor, torch.Tensor):
        raise DamagedError(f"{name} is a {type(tensor).__name__} instead of a tensor")
    return tensor


def _require_plain_archive(data: io.BytesIO, name: str) -> None:
    try:
        with zipfile.ZipFile(data) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise DamagedError(f"{name} is not a torch.save archive: {error}") from error
    stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
    if not stored or sum(entry.file_size for entry in entries) > data.getbuffer().nbytes:
        raise DamagedError(f"{name} unpacks to more than it is")
    data.seek(0)


def _copy(tensor: torch.Tensor, item: ReadItem, planner: DefaultLoadPlanner) -> None:
    target = planner.resolve_tensor(item).detach()
    part = tensor
    for dimension, (start, length) in enumerate(
        zip(item.storage_offsets, item.lengths, strict=True)
    ):
        if start + length > part.size(dimension):
            raise DamagedError(f"{item.storage_index.fqn} is smaller than the table says")
        part = part.narrow(dimension, start, length)
    if part.size() != target.size():
        raise DamagedError(f"{item.storage_index.fqn} has another shape than the table says")
    target.copy_(part)
